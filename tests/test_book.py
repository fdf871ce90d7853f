"""Chapters are run, refreshed and checked: on short notebooks in a book of their own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from jahs_utils import book
from jahs_utils.chapters import chapter_names

ROOT = Path(__file__).parents[1]
EXACT, MEASURED = "sum(range(5)) + seed", "import time\n\ntime.perf_counter()"


@pytest.fixture
def chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`00_short`, the only chapter of a book: an exact cell and one that differs in each run."""
    cells = [
        new_markdown_cell("# A short chapter"),
        new_code_cell('profile = "quick"\nseed = 0', metadata={"tags": ["parameters"]}),
        new_code_cell(EXACT),
        new_code_cell(MEASURED, metadata={"tags": ["nbval-ignore-output"]}),
    ]
    kernel = {"name": "no-such-kernel", "display_name": "None", "language": "python"}
    path = tmp_path / "chapters" / "00_short.ipynb"
    path.parent.mkdir()
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    monkeypatch.setenv("JAHS_BOOK", str(tmp_path))
    return path


def add_cell(path: Path, source: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(new_code_cell(source))
    nbformat.write(notebook, path)


def result(path: Path, source: str = EXACT) -> str:
    """The stored result of the cell with this source."""
    cells = nbformat.read(path, as_version=4).cells
    [cell] = [cell for cell in cells if cell.source == source]
    return cell.outputs[0].data["text/plain"]


def without_measured(path: Path) -> str:
    return path.read_text(encoding="utf-8").replace(result(path, MEASURED), "measured")


def test_a_run_leaves_the_chapter_alone_and_adds_no_cell(chapter: Path, tmp_path: Path) -> None:
    before = chapter.read_bytes()
    assert book.run_chapter("00_short", tmp_path / "out" / "ran.ipynb") > 0
    assert chapter.read_bytes() == before
    assert result(tmp_path / "out" / "ran.ipynb") == "10"
    assert len(nbformat.read(tmp_path / "out" / "ran.ipynb", as_version=4).cells) == 4


def test_other_parameters_reach_the_cells(chapter: Path, tmp_path: Path) -> None:
    book.run_chapter("00_short", tmp_path / "ran.ipynb", parameters={"seed": 7})
    assert result(tmp_path / "ran.ipynb") == "17"


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        ({"parameters": {"sed": 1}}, "choose one of profile, seed"),
        ({"profile": "fast"}, "choose one of quick, standard, gpu, paper"),
        ({"name": "00_shrt"}, "choose one of 00_short"),
    ],
)
def test_unknown_names_give_one_line_with_the_choices(
    chapter: Path, tmp_path: Path, arguments: dict, choices: str
) -> None:
    with pytest.raises(ValueError, match=choices) as caught:
        book.run_chapter(**{"name": "00_short", "out": tmp_path / "ran.ipynb"} | arguments)
    assert "\n" not in str(caught.value)


def test_a_failing_cell_is_named_and_the_run_up_to_it_is_kept(
    chapter: Path, tmp_path: Path
) -> None:
    add_cell(chapter, "raise RuntimeError('first line\\nthe learning rate is negative')")
    with pytest.raises(book.BookError) as caught:
        book.run_chapter("00_short", tmp_path / "ran.ipynb")
    message = str(caught.value)
    assert message.startswith("00_short, cell [4]: RuntimeError: the learning rate is negative")
    assert "ran.ipynb" in message
    assert result(tmp_path / "ran.ipynb") == "10"


def test_a_kernel_that_dies_is_reported(chapter: Path, tmp_path: Path) -> None:
    add_cell(chapter, "import os\n\nos.kill(os.getpid(), 9)")
    with pytest.raises(book.BookError, match="00_short: its Python process died"):
        book.run_chapter("00_short", tmp_path / "ran.ipynb")


def test_a_second_refresh_changes_nothing_but_measured_outputs(chapter: Path) -> None:
    book.refresh_chapter("00_short")
    first = without_measured(chapter)
    assert result(chapter) == "10"
    book.refresh_chapter("00_short")
    assert without_measured(chapter) == first
    assert "papermill" not in first
    assert os.listdir(chapter.parent) == ["00_short.ipynb"]


def test_a_failed_refresh_leaves_the_chapter_as_it_was(chapter: Path) -> None:
    add_cell(chapter, "1 / 0")
    before = chapter.read_bytes()
    with pytest.raises(book.BookError, match="ZeroDivisionError"):
        book.refresh_chapter("00_short")
    assert chapter.read_bytes() == before


def test_nbval_fails_when_one_stored_output_of_an_exact_cell_changes(
    chapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    book.refresh_chapter("00_short")
    copy = tmp_path / "copy.ipynb"
    stored = chapter.read_text(encoding="utf-8")
    copy.write_text(stored.replace('"10"', '"11"'), encoding="utf-8")
    assert book.check_chapters(["00_short"]) == 0
    capfd.readouterr()
    assert book.check_chapters([copy]) == 1
    assert "11" in capfd.readouterr().out


def test_a_home_that_cannot_be_written_is_enough(chapter: Path, tmp_path: Path) -> None:
    add_cell(chapter, "import matplotlib.pyplot as plt\n\nplt.plot([0, 1])\nplt.show()")
    homes = ("JUPYTER", "IPYTHON", "MPL", "XDG")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(homes)}
    environment |= {"HOME": "/dev/null/none", "JAHS_CACHE": str(tmp_path / "cache")}
    program = (
        "from jahs_utils.book import check_chapters, refresh_chapter\n"
        "refresh_chapter('00_short')\n"
        "raise SystemExit(check_chapters(['00_short']))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:IPython", "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    assert (tmp_path / "cache" / f"notebooks-{os.getuid()}" / "matplotlib").is_dir()


ODD = "a b [c] {d} é 漢 $HOME ~"  # a folder as somebody else names it
WHERE = 'import os\n\n[os.environ[f"JAHS_{name}"] for name in ("BOOK", "CACHE", "DATA")]'


def test_folders_of_any_name_reach_notebooks_and_checks(
    chapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_cell(chapter, WHERE)
    odd = tmp_path / ODD / "book"
    odd.mkdir(parents=True)
    chapter.parent.rename(odd / "chapters")
    monkeypatch.chdir(odd.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAHS_BOOK", "book")
    monkeypatch.setenv("JAHS_CACHE", f"~/{ODD}/cache")
    monkeypatch.setenv("JAHS_DATA", "../data")
    book.run_chapter("00_short", Path("~") / ODD / "ran {seed}.ipynb", parameters={"seed": 7})
    ran = odd.parent / "ran {seed}.ipynb"
    assert result(ran) == "17"
    told = [str(odd), str(odd.parent / "cache"), f"{odd.parent}/../data"]
    assert ast.literal_eval(result(ran, WHERE)) == told
    book.refresh_chapter("00_short")
    assert book.check_chapters() == 0
    assert sorted(os.listdir(odd.parent)) == ["book", "cache", "ran {seed}.ipynb"]


def test_a_notebook_of_another_system_is_read_without_a_remark(
    chapter: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """With a byte-order mark, line ends of Windows and cells without ids."""
    book.refresh_chapter("00_short")
    notebook = json.loads(chapter.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        del cell["id"]
        cell["source"] = "".join(cell["source"]).replace("\n", "\r\n")
    foreign = json.dumps(notebook, indent=1).replace("\n", "\r\n")
    chapter.write_bytes(foreign.encode("utf-8-sig"))
    capfd.readouterr()
    assert book.check_chapters() == 0
    book.run_chapter("00_short", tmp_path / "ran.ipynb", parameters={"seed": 7})
    assert result(tmp_path / "ran.ipynb") == "17"
    printed = "".join(capfd.readouterr())
    assert "warning" not in printed.lower()
    assert not [w for w in recwarn if "id" in str(w.message)]


def test_the_c_locale_without_utf_8_mode_is_enough(chapter: Path, tmp_path: Path) -> None:
    add_cell(chapter, "print('91.4 ± 0.2')\nopen('é.txt', 'w').write('±') and None")
    odd = tmp_path / "é"
    odd.mkdir()
    chapter.parent.rename(odd / "chapters")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "JAHS_BOOK": str(odd)}
    command = [sys.executable, "-m", "jahs_utils.cli", "run", "00_short", "--out", "ü.ipynb"]
    done = subprocess.run(
        command, env=os.environ | plain, cwd=odd, capture_output=True, encoding="utf-8"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ü.ipynb (")
    assert "91.4 ± 0.2" in (odd / "ü.ipynb").read_text(encoding="utf-8")
    assert (odd / "chapters" / "é.txt").read_text(encoding="utf-8") == "±"


def test_a_cache_that_cannot_be_written_is_one_line(
    chapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAHS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"^cannot write to [^\n]* in JAHS_CACHE$"):
        book.check_chapters()


@pytest.mark.parametrize("out", ["ran.txt", "folder", "chapters/00_short.ipynb"])
def test_only_another_notebook_is_written(chapter: Path, tmp_path: Path, out: str) -> None:
    before = chapter.read_bytes()
    with pytest.raises(ValueError, match=r"^out must be [^\n]*NAME\.ipynb, got [^\n]*$"):
        book.run_chapter("00_short", tmp_path / out)
    assert chapter.read_bytes() == before


# --- parameters -----------------------------------------------------------------------------------

DEFAULTS = """
# profile = "not this one"
profile = "quick"; seed = 0
text = "a = b"
rate: float = 0.1
exact = True
sizes = [
    8,
    8,
]
anything = None
computed = 2 * len(sizes)
"""


@pytest.fixture
def many(chapter: Path) -> Path:
    """The chapter with defaults of every kind."""
    notebook = nbformat.read(chapter, as_version=4)
    notebook.cells[1].source = DEFAULTS.strip()
    nbformat.write(notebook, chapter)
    return chapter


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("seed", 3),
        ("rate", 1),
        ("rate", 1e-3),
        ("exact", False),
        ("text", "c=d"),
        ("sizes", [4]),
        ("anything", 3),
        ("anything", "no"),
        ("computed", [1]),
    ],
)
def test_a_value_of_the_defaults_type_is_taken(many: Path, parameter: str, value: object) -> None:
    changed = book.chapter_parameters("00_short", {parameter: value})
    assert changed == {parameter: value}
    assert type(changed[parameter]) is (float if parameter == "rate" else type(value))


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("seed", "1e"),
        ("seed", "010"),
        ("seed", "12:30"),
        ("seed", 1.0),
        ("seed", True),
        ("seed", None),
        ("exact", "no"),
        ("exact", 0),
        ("rate", "fast"),
        ("rate", float("inf")),
        ("rate", float("nan")),
        ("text", 1),
        ("sizes", (4, 4)),
        ("sizes", 4),
        ("seed", list(range(1000))),
        ("text", [["x"] * 1000] * 1000),
        ("profile", 1),
    ],
)
def test_a_value_of_another_type_is_one_line_with_the_way_out(
    many: Path, parameter: str, value: object
) -> None:
    with pytest.raises(ValueError, match=rf"^{parameter} of 00_short [^\n]*$") as caught:
        book.chapter_parameters("00_short", {parameter: value})
    assert len(str(caught.value)) <= 200


def test_every_assignment_of_the_parameter_cell_is_known(many: Path) -> None:
    with pytest.raises(ValueError, match="choose one of profile, seed, text, rate, exact, sizes, "):
        book.chapter_parameters("00_short", {"x": 1})


def test_a_value_that_is_the_default_adds_no_cell(many: Path) -> None:
    same = {"text": "a = b", "sizes": [8, 8], "anything": None, "profile": "quick"}
    assert book.chapter_parameters("00_short", same) == {}


def test_unknown_parameters_stop_a_build_before_it_starts(chapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown parameter of 00_short 'sed'"):
        book.build(parameters={"sed": 1})
    assert not (tmp_path / "_build").exists()


def test_every_chapter_is_in_the_table_of_contents() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [page["file"] for part in toc["parts"] for page in part["chapters"]]
    assert [f for f in listed if f.startswith("chapters/")] == [
        f"chapters/{name}" for name in chapter_names()
    ]


def test_notebooks_need_no_kernel_of_their_name(chapter: Path, tmp_path: Path) -> None:
    add_cell(chapter, "import sys\n\nsys.executable")
    book.run_chapter("00_short", tmp_path / "ran.ipynb")
    assert result(tmp_path / "ran.ipynb", "import sys\n\nsys.executable") == repr(sys.executable)
