import json
import shutil

import nbformat
import pytest
import yaml

from jahs_utils.chapters import book_root, chapter_names, chapter_path
from jahs_utils.claims import claims_table, judge, read_claims, scoreboard_markdown, speed_markdown

CLAIM = {
    "id": "a",
    "document": "A paper",
    "place": "Table 1",
    "statement": "Accuracy",
    "paper": {"value": 90.0, "spread": 0.5, "unit": "%"},
    "answer": {
        "experiment": "e",
        "profiles": ["paper", "standard"],
        "where": {"channels": [8, 8], "split": [0, 1]},
        "column": "accuracy",
        "scale": 100,
        "least_rows": 2,
    },
    "comparison": "close",
    "tolerance": 0.5,
    "partly": 1.0,
}

VERSIONS = {"python": "3.12.1", "torch": "2.14.1"}


def row(accuracy, split=0, channels=(8, 8)):
    return {
        "key": {"channels": list(channels), "split": split},
        "status": "ok",
        "metrics": {"accuracy": accuracy},
        "error": None,
        "seed": None,
        "data": None,
        "code": "0",
        "versions": {},
        "device": "a machine",
        "number_format": "float32",
        "wall_seconds": 1.0,
        "finished": "2026-01-01T00:00:00Z",
    }


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write rows and a claim into an empty book; returns the claim as read back."""
    (tmp_path / "chapters").mkdir()
    folder = tmp_path / "results" / "90_small"
    folder.mkdir(parents=True)
    monkeypatch.setenv("JAHS_BOOK", str(tmp_path))

    def write_files(rows, **changes):
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        (folder / "e-standard.jsonl").write_text(lines)
        (folder / "claims.yml").write_text(yaml.safe_dump([CLAIM | changes]))
        return read_claims()[0]

    return write_files


def test_a_claim_of_which_no_row_speaks_is_not_yet_run(write):
    where = {"channels": [4, 4], "split": [0, 1], "wall_seconds": 1.0}
    claim = write([row(0.9)], answer=CLAIM["answer"] | {"where": where})
    assert judge(claim).verdict == "not yet run"


@pytest.mark.parametrize(
    ("comparison", "accuracy", "verdict"),
    [
        ("close", 0.904, "reproduced"),
        ("close", 0.893, "partly"),
        ("close", 0.92, "not reproduced"),
        ("at_least", 0.92, "reproduced"),
        ("at_least", 0.88, "not reproduced"),
        ("at_most", 0.88, "reproduced"),
        ("at_most", 0.908, "partly"),
    ],
)
def test_the_verdict_follows_from_the_rows(write, comparison, accuracy, verdict):
    claim = write([row(accuracy, 0), row(accuracy, 1)], comparison=comparison)
    assert judge(claim).verdict == verdict


def test_only_matching_rows_count(write):
    wrong = [row(0.1, split="test"), row(0.1, channels=(16, 16))]
    found = judge(write([row(0.90, 0), row(0.91, 1), *wrong]))
    assert (found.n, found.value) == (2, pytest.approx(90.5))


def test_too_few_rows_are_not_a_run(write):
    assert judge(write([row(0.9, 0)])).verdict == "not yet run"


def test_no_rows_at_all_are_not_a_run(write):
    claim = write([row(0.9)], answer=CLAIM["answer"] | {"experiment": "another"})
    assert judge(claim).verdict == "not yet run"


def test_a_column_that_does_not_exist_is_named(write):
    claim = write([row(0.9)], answer=CLAIM["answer"] | {"column": "acuracy"})
    with pytest.raises(ValueError, match="no column 'acuracy'"):
        judge(claim)


@pytest.mark.parametrize("change", [{"tolerance": -1}, {"comparison": "same"}, {"surplus": 1}])
def test_a_malformed_claim_is_named_with_its_place(write, change):
    with pytest.raises(ValueError, match=f"claim 1: {next(iter(change))}"):
        write([row(0.9)], **change)


def test_a_tag_that_would_run_code_is_refused(write):
    write([row(0.9)])
    path = book_root() / "results" / "90_small" / "claims.yml"
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="not YAML"):
        read_claims()


# --- the real book --------------------------------------------------------------------------------


def stored_claims(chapter: str) -> str:
    """The stored output of the chapter's table of claims, as text."""
    for cell in nbformat.read(chapter_path(chapter), as_version=4).cells:
        if cell.cell_type == "code" and f'claims_table("{chapter}")' in cell.source:
            return cell.outputs[0]["data"]["text/html"]
    raise AssertionError(f"{chapter} shows no table of its claims")


def disagreeing_chapters() -> list[str]:
    """Chapters whose stored table of claims is not what claims and rows give now."""
    return [
        chapter
        for chapter in chapter_names()
        if claims_table(chapter).set_index("claim").to_html() not in stored_claims(chapter)
    ]


def test_pages_claims_and_rows_agree():
    assert disagreeing_chapters() == []


def test_a_changed_number_of_a_paper_is_noticed(tmp_path, monkeypatch):
    real = book_root()
    (tmp_path / "chapters").symlink_to(real / "chapters")
    shutil.copytree(real / "results", tmp_path / "results")
    path = tmp_path / "results" / "00_training" / "claims.yml"
    text = path.read_text(encoding="utf-8")
    assert "value: 91.2" in text
    path.write_text(text.replace("value: 91.2", "value: 91.3"), encoding="utf-8")
    monkeypatch.setenv("JAHS_BOOK", str(tmp_path))
    assert disagreeing_chapters() == ["00_training"]


def test_the_scoreboard_holds_every_claim():
    board = scoreboard_markdown()
    assert all(claim.statement in board for claim in read_claims())


def test_the_speed_page_shows_the_recorded_benchmark():
    assert "DataLoader loop" in speed_markdown()


def test_every_benchmark_has_its_place_on_the_speed_page(tmp_path, monkeypatch):
    monkeypatch.setenv("JAHS_BOOK", str(tmp_path))
    (tmp_path / "chapters").mkdir()
    (tmp_path / "results" / "benchmarks").mkdir(parents=True)
    for name in ("search", "training"):
        metrics = {"columns": ["one", "ms"], "table": [[f"a {name}", "1"]], "versions": "smac 3"}
        whole = row(0.9) | {"key": {"kind": "cpu"}, "metrics": metrics, "versions": VERSIONS}
        path = tmp_path / "results" / "benchmarks" / f"{name}.jsonl"
        path.write_text(json.dumps(whole) + "\n")
    page = speed_markdown()
    places = [page.index(text) for text in ("## Training", "a training", "## Search", "a search")]
    assert places == sorted(places)
    assert "(python 3.12.1, smac 3)" in page
