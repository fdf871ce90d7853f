import json
import re
import runpy
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml

from jahs_utils import evidence, scoreboard
from jahs_utils.chapters import book_root, chapter_names, chapter_path
from jahs_utils.claims import Finding, Verdict, judge, read_claims
from jahs_utils.scoreboard import claims_json, claims_table, findings_table, sentence

PAGES = runpy.run_path(str(Path(__file__).parents[1] / "book" / "pages.py"))
headings, scoreboard_markdown = PAGES["headings"], PAGES["scoreboard_markdown"]
found_markdown, speed_markdown = PAGES["found_markdown"], PAGES["speed_markdown"]

NUMBER = {
    "id": "a",
    "kind": "number",
    "document": "A paper",
    "place": "Table 1",
    "statement": "Accuracy",
    "paper": {"value": 90.0, "spread": 0.5, "unit": "%"},
    "rows": {
        "experiment": "e",
        "profiles": ["paper", "standard"],
        "where": {"channels": [8, 8]},
        "column": "accuracy",
        "scale": 100,
    },
    "distinguishes": 1.0,
    "same_scale": ["standard"],
}
FINDING = {
    "id": "f",
    "kind": "finding",
    "document": "A paper",
    "place": "section 4",
    "statement": "Wide is more accurate than narrow",
    "scale": "toy",
    "unit": "points",
    "rows": {"experiment": "e", "profiles": ["standard"], "column": "accuracy", "scale": 100},
    "estimate": {
        "kind": "difference",
        "a": {"where": {"channels": [16]}},
        "b": {"where": {"channels": [8]}},
        "cluster": ["split"],
        "paired": True,
    },
    "said": {
        "holds": "Wide is ahead by {estimate} {interval}, n = {n}, from {b} to {a}.",
        "fails": "Wide is behind by {size}.",
        "undecided": "Undecided: {more} more rows, {minutes} minutes.",
    },
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

    def write_files(recorded, entry=NUMBER, /, **changes):
        lines = "".join(json.dumps(r) + "\n" for r in recorded)
        (folder / "e-standard.jsonl").write_text(lines, encoding="utf-8")
        entry = {k: v for k, v in (entry | changes).items() if v is not None}
        text = yaml.safe_dump([entry], allow_unicode=True)
        (folder / "claims.yml").write_text(text, encoding="utf-8")
        return read_claims()[0]

    return write_files


def three(center, spread=0.005):
    """Rows of three seeds with this mean and standard deviation."""
    return [row(center + k * spread, split=k) for k in (-1, 0, 1)]


# --- numbers --------------------------------------------------------------------------------------


def test_a_number_of_which_no_row_speaks_is_not_yet_run(write):
    where = {"channels": [4, 4], "wall_seconds": 1.0}
    claim = write(three(0.9), rows=NUMBER["rows"] | {"where": where})
    assert judge(claim).verdict == "not yet run"


def test_no_rows_at_all_are_not_a_run(write):
    claim = write(three(0.9), rows=NUMBER["rows"] | {"experiment": "another"})
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
    assert judge(write(three(accuracy), comparison=comparison)).verdict == verdict


def test_a_tolerance_follows_the_spread_and_never_exceeds_what_the_claim_distinguishes(write):
    paper = {"value": 90.0, "unit": "%"}
    calm = judge(write(three(0.9, 0.001), paper=paper))
    wild = judge(write(three(0.9, 0.05), paper=paper))
    assert (calm.tolerance, wild.tolerance) == pytest.approx((0.2, 0.5))


def test_a_random_number_is_undecided_below_three_runs(write):
    two = [row(0.9, 0), row(0.9, 1)]
    assert judge(write(two)).verdict == "undecided"
    assert judge(write(two, random=False, distinguishes=None, tolerance=1)).verdict == "reproduced"


def test_the_median_counts_where_the_document_prints_medians(write):
    rows = [row(0.9, 0), row(0.9, 1), row(0.2, 2)]
    assert judge(write(rows, statistic="median")).verdict == "reproduced"
    assert judge(write(rows)).verdict == "not reproduced"


def test_a_value_measured_at_another_scale_is_not_judged(write):
    found = judge(write(three(0.9), same_scale=["paper"]))
    assert (found.verdict, found.value) == ("other scale", pytest.approx(90.0))


def test_a_value_at_a_cap_of_ours_is_capped(write):
    assert judge(write(three(0.9), cap=90)).verdict == "capped"


def test_only_matching_rows_count(write):
    where = {"channels": [8, 8], "split": [-1, 0, 1]}
    wrong = [row(0.1, split="test"), row(0.1, channels=(16, 16))]
    found = judge(write([*three(0.9), *wrong], rows=NUMBER["rows"] | {"where": where}))
    assert (found.n, found.value) == (3, pytest.approx(90.0))


def test_two_numbers_that_share_rows_say_so(write):
    claim = write(three(0.9))
    path = book_root() / "results" / "90_small" / "claims.yml"
    path.write_text(yaml.safe_dump([NUMBER, NUMBER | {"id": "b", "statement": "Again"}]), "utf-8")
    assert claims_table()["runs"].tolist() == [
        '3 (standard); shared with "Again"',
        f'3 (standard); shared with "{claim.statement}"',
    ]


# --- findings -------------------------------------------------------------------------------------


def pairs(*gaps, base=0.8):
    """Rows of a narrow and a wide network for each seed, with these gaps."""
    both = (
        (row(base + 0.01 * k, k, (8,)), row(base + 0.01 * k + g, k, (16,)))
        for k, g in enumerate(gaps)
    )
    return [r for pair in both for r in pair]


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([0.02, 0.021, 0.019, 0.02], "holds"),
        ([-0.02, -0.021, -0.019, -0.02], "does not hold"),
        ([0.02, -0.021, 0.019, -0.02], "undecided"),
        ([0.02, 0.021], "undecided"),  # two pairs are too few, whatever they say
    ],
)
def test_the_verdict_of_a_finding_is_where_its_interval_lies(write, gaps, verdict):
    assert judge(write(pairs(*gaps), FINDING)).verdict == verdict


def test_an_effect_too_small_to_matter_does_not_hold(write):
    claim = write(pairs(0.001, -0.001, 0.0005, 0.0), FINDING)
    assert judge(claim).verdict == "undecided"
    matters = FINDING["estimate"] | {"matters": 1.0}
    assert judge(write(pairs(0.001, -0.001, 0.0005, 0.0), FINDING, estimate=matters)).verdict == (
        "does not hold"
    )


@pytest.mark.parametrize(("margin", "verdict"), [(0.5, "holds"), (0.005, "undecided")])
def test_equivalence_is_shown_not_assumed(write, margin, verdict):
    same = FINDING["estimate"] | {"kind": "equivalence", "margin": margin}
    assert (
        judge(write(pairs(0.001, -0.001, 0.0005, 0.0), FINDING, estimate=same)).verdict == verdict
    )


def test_the_other_side_can_be_asked_for(write):
    below = FINDING["estimate"] | {"expect": "below"}
    assert judge(write(pairs(-0.02, -0.021, -0.019), FINDING, estimate=below)).verdict == "holds"


def test_undecided_findings_say_what_would_decide(write):
    found = judge(write(pairs(0.02, -0.005, 0.03, -0.01), FINDING))
    needed = evidence.needed(found.effect, found.value)
    assert found.more == pytest.approx(2 * (needed - 4))  # two rows a pair
    assert found.minutes == pytest.approx(found.more * 1.0 / 60)  # of one second each


def test_a_sentence_has_the_verdicts_wording_and_the_rows_numbers(write):
    write(pairs(0.02, 0.021, 0.019, 0.02), FINDING)
    said = "Wide is ahead by 2.00 [1.87, 2.13], n = 4, from 81.50 to 83.50."
    assert sentence("f") == said
    mixed = write(pairs(-0.0002, -0.00021, 0.0004, 0.0), FINDING)
    assert "[-0.0" in findings_table()["estimate"][0]  # a sign stays unless all is zero
    assert mixed.id == "f"
    write(pairs(-0.02, -0.021, -0.019, -0.02), FINDING)
    assert sentence("f") == "Wide is behind by 2.00."


def test_a_finding_that_nothing_answers_yet_names_what_will(write):
    write(three(0.9), FINDING, rows=None, estimate=None, next="99/experiment")
    assert findings_table()["verdict"].tolist() == ["not yet run: 99/experiment"]


def test_an_exported_function_can_prepare_the_rows(book):
    book.write(
        "90_small", ["def doubled(rows):\n    return rows.assign(twice=2 * rows['accuracy'])"]
    )
    folder = book.root / "results" / "90_small"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(r) + "\n" for r in three(0.3))
    (folder / "e-standard.jsonl").write_text(lines, encoding="utf-8")
    rows = FINDING["rows"] | {"column": "twice", "through": "doubled"}
    entry = FINDING | {"rows": rows, "estimate": {"kind": "level", "than": 50}}
    (folder / "claims.yml").write_text(yaml.safe_dump([entry]), encoding="utf-8")
    assert judge(read_claims()[0]).value == pytest.approx(60)


def test_programs_get_every_claim_as_plain_data(write):
    write(pairs(0.02, 0.021, 0.019, 0.02), FINDING)
    (entry,) = json.loads(json.dumps(claims_json()))
    assert (entry["id"], entry["kind"], entry["verdict"], entry["n"]) == (
        "f",
        "finding",
        "holds",
        4,
    )
    assert entry["interval"][0] < entry["value"] < entry["interval"][1]


# --- malformed entries ----------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [NUMBER, FINDING], ids=["number", "finding"])
def test_a_column_that_does_not_exist_is_named(write, entry):
    claim = write([*three(0.9), *pairs(0.1)], entry, rows=entry["rows"] | {"column": "acuracy"})
    with pytest.raises(ValueError, match="no column 'acuracy'"):
        judge(claim)


@pytest.mark.parametrize(
    ("entry", "change", "named"),
    [
        (NUMBER, {"distinguishes": -1}, "distinguishes"),
        (NUMBER, {"comparison": "same"}, "comparison"),
        (NUMBER, {"surplus": 1}, "surplus"),
        (NUMBER, {"tolerance": 1}, "no `tolerance`"),
        (NUMBER, {"random": False}, "has `tolerance`"),
        (NUMBER, {"kind": "word"}, "a: "),
        (FINDING, {"estimate": {"kind": "difference"}}, "needs a, b"),
        (FINDING, {"estimate": {"kind": "level", "paired": True}}, "cluster"),
        (FINDING, {"estimate": None}, "stand together"),
        (FINDING, {"estimate": None, "rows": None}, "next"),
    ],
)
def test_a_malformed_claim_is_named_with_its_place(write, entry, change, named):
    with pytest.raises(ValueError, match=f"claim 1: .*{named}"):
        write(three(0.9), entry, **change)


def test_a_claim_that_a_page_misspells_is_named_with_the_nearest(write):
    write(three(0.9), FINDING)
    with pytest.raises(ValueError, match="did you mean 'f'"):
        sentence("ff")


def test_a_tag_that_would_run_code_is_refused(write):
    write([row(0.9)])
    path = book_root() / "results" / "90_small" / "claims.yml"
    path.write_text("!!python/object/apply:os.system ['true']", encoding="utf-8")
    with pytest.raises(ValueError, match="not YAML"):
        read_claims()


# --- the real book --------------------------------------------------------------------------------


def stored_tables(chapter: str) -> str:
    """The stored outputs of the chapter's tables of numbers and findings, as text."""
    cells = nbformat.read(chapter_path(chapter), as_version=4).cells
    return "".join(
        output["data"]["text/html"]
        for cell in cells
        if cell.cell_type == "code" and re.search(r"(claims|findings)_table\(", cell.source)
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    )


def disagreeing_chapters() -> list[str]:
    """Chapters whose stored tables are not what claims and rows give now."""
    return [
        chapter
        for chapter in chapter_names()
        for table, index in ((claims_table(chapter), "claim"), (findings_table(chapter), "finding"))
        if len(table) and table.set_index(index).to_html() not in stored_tables(chapter)
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
    assert set(disagreeing_chapters()) == {"00_training"}


def test_every_claim_leads_to_a_heading_of_its_chapter():
    places = {chapter: headings(chapter) for chapter in chapter_names()}
    lost = [c.id for c in read_claims() if c.section and c.section not in places[c.chapter]]
    assert lost == []
    assert [c.id for c in read_claims() if c.section is None] == []


def test_every_document_has_findings_and_every_chapter_its_headline():
    findings = [c for c in read_claims() if isinstance(c, Finding)]
    assert sum(c.document != "This book" for c in findings) >= 35
    headlines = [c.chapter for c in findings if c.headline]
    assert sorted(headlines) == chapter_names()


def test_every_wording_of_every_finding_can_be_filled_in(monkeypatch):
    effect = evidence.Effect(1.0, 0.5, 1.5, 3, 0.1, 0.5)
    for verdict in ("holds", "does not hold", "undecided"):
        filled = Verdict(verdict, "standard", effect, groups=(1.0, 2.0), more=3, minutes=4)
        monkeypatch.setattr(scoreboard, "judge", lambda claim, filled=filled: filled)
        for claim in read_claims():
            if isinstance(claim, Finding) and claim.said and claim.estimate:
                assert "{" not in sentence(claim.id)


def test_the_scoreboard_holds_every_claim():
    board = scoreboard_markdown()
    assert all(claim.statement in board for claim in read_claims())


def test_the_title_page_draws_and_says_what_each_chapter_found():
    page = found_markdown()
    for claim in read_claims():
        if isinstance(claim, Finding) and claim.headline:
            assert sentence(claim.id) in page
            assert f">{claim.chapter[:2]}  {claim.statement[:20]}" in page  # a text of the picture
    assert page.count("<figure") == 1


def test_a_page_without_a_place_for_its_table_is_an_error(tmp_path):
    (tmp_path / "index.md").write_text("# Title\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^index\.md has no line <!-- found -->"):
        PAGES["fill_in"](tmp_path)


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
        path.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    page = speed_markdown()
    places = [page.index(text) for text in ("## Training", "a training", "## Search", "a search")]
    assert places == sorted(places)
    assert "(python 3.12.1, smac 3)" in page
