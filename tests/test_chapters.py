"""Chapters as importable code."""

import inspect
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from jahs_utils.chapters import (
    book_root,
    chapter_names,
    chapter_path,
    code_version,
    exported_source,
    load_chapter,
)


def test_a_chapter_holds_its_exported_cells_and_nothing_else(book):
    module = load_chapter("90_small")
    assert module.square(x=3) == {"square": 9}  # the cell that is not exported raises SystemExit


def test_a_chapter_is_the_same_module_in_every_call(book):
    assert load_chapter("90_small") is load_chapter("90_small")


def test_a_function_knows_its_chapters_module(book):
    assert load_chapter("90_small").square.__module__ == "jahs_utils.chapters.90_small"


def test_a_function_pickles_into_a_process_that_has_imported_nothing(book):
    function = load_chapter("90_small").square
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(function, kwds={"x": 5}) == {"square": 25}


def test_a_function_survives_pickling_by_name(book):
    function = load_chapter("90_small").square
    assert pickle.loads(pickle.dumps(function)) is function


def trace_of_failure(module) -> str:
    try:
        module.failing(x=1)
    except RuntimeError as error:
        return "".join(traceback.format_exception(error))
    raise AssertionError("failing(x=1) did not fail")


def test_a_traceback_shows_the_chapters_line(book):
    trace = trace_of_failure(load_chapter("90_small"))
    assert '90_small.ipynb[export]", line' in trace
    assert '    raise RuntimeError("one is\\nnot allowed")' in trace


def test_a_traceback_shows_what_runs_when_the_notebook_was_edited_meanwhile(book):
    module = load_chapter("90_small")
    path = chapter_path("90_small")
    text = path.read_text(encoding="utf-8").replace("import signal", "import signal\\n\\n\\n")
    path.write_text(text, encoding="utf-8")
    assert '    raise RuntimeError("one is\\nnot allowed")' in trace_of_failure(module)


def test_the_source_of_a_function_is_its_cells(book):
    source = inspect.getsource(load_chapter("90_small").not_json)
    assert source == 'def not_json(*, x):\n    return {"device": torch.device("cpu")}\n'


def test_the_source_of_a_class_is_its_cells(book):
    text = "class Small:\n    '''A class.'''\n\n    def one(self):\n        return 1\n"
    book.write("91_class", ["import os", text])
    module = load_chapter("91_class")
    assert inspect.getsource(module.Small) == text
    assert inspect.getsource(module.Small.one) == "    def one(self):\n        return 1\n"


def test_exported_source_names_the_cell_of_each_part(book):
    source = exported_source(chapter_path("90_small"))
    heads = [line for line in source.splitlines() if line.startswith("# %%")]
    assert heads == [f"# %% 90_small.ipynb, cell {k}" for k in (2, 3, 4)]


@pytest.mark.parametrize(
    "statement",
    ["print('x')", "for k in range(3):\n    y = k", "if True:\n    y = 1", "x += 1", "del x"],
)
def test_an_export_cell_with_another_statement_is_refused_by_cell_and_line(statement, book):
    book.write("91_wrong", ["x = 1", f"z = 2\n{statement}"])
    expected = "91_wrong.ipynb, cell 3, line 2: an export cell holds only imports"
    with pytest.raises(ValueError, match=rf"^{expected}[^\n]*$"):
        load_chapter("91_wrong")


@pytest.mark.parametrize("line", ["%matplotlib inline", "!ls", "def f(:"])
def test_an_export_cell_that_is_not_plain_python_is_refused_by_cell_and_line(line, book):
    book.write("91_wrong", ["x = 1", f"z = 2\n{line}"])
    with pytest.raises(ValueError, match=r"^91_wrong.ipynb, cell 3, line 2: [^\n]*$"):
        load_chapter("91_wrong")


def test_a_docstring_is_allowed_in_an_export_cell(book):
    book.write("91_doc", ["'''What this is.'''\nx = 1"])
    assert load_chapter("91_doc").x == 1


def test_cells_without_the_tag_may_hold_anything(book):
    path = book.root / "chapters" / "91_magic.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("%matplotlib inline")]), path)
    assert exported_source(path) == ""


def test_an_unknown_chapter_is_one_line_with_the_choices(book):
    with pytest.raises(ValueError, match=r"^unknown chapter '90_smal' \(did you mean '90_small'"):
        load_chapter("90_smal")


def test_chapters_are_listed_in_order(book):
    book.write("10_later", ["x = 1"])
    book.write("09_earlier", ["x = 1"])
    assert chapter_names() == ["09_earlier", "10_later", "90_small"]


def test_the_root_is_the_named_one(book):
    assert book_root() == book.root


@pytest.mark.parametrize("below", [".", "chapters"])
def test_the_root_is_found_from_inside_the_book(below, book, monkeypatch):
    monkeypatch.delenv("JAHS_BOOK")
    monkeypatch.chdir(book.root / below)
    assert book_root() == book.root


def test_a_root_without_chapters_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("JAHS_BOOK", str(tmp_path))
    with pytest.raises(ValueError, match=rf"^no folder chapters/ in {tmp_path}: [^\n]*JAHS_BOOK$"):
        book_root()


# --- code_version ---------------------------------------------------------------------------------

VERSIONED = """
import functools
import torch
from torch.nn.functional import conv2d

RATE = 0.1
NAMES = {"alpha", "beta", "gamma", "delta"}
UNUSED = 1


@functools.lru_cache
def cached(x):
    return x + 1


class Scale:
    def __call__(self, x):
        return x * RATE


def helper(x):
    return Scale()(x) + cached(x) + len(NAMES)


def unit(x):
    return helper(x) if conv2d is not None else torch.ones(x)


def unrelated(x):
    return x
"""


def version(book, source: str) -> str:
    book.write("91_versioned", [source])
    return code_version(load_chapter("91_versioned").unit)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return helper(x) if", "return helper(x + 1) if"),
        ("cached(x) + len", "cached(x) - len"),
        ("return x * RATE", "return x / RATE"),
        ("RATE = 0.1", "RATE = 0.2"),
        ('"delta"', '"epsilon"'),
        ("return x + 1", "return x + 2"),
        ("    return x + 1", "    if x > 3:\n        raise StopIteration\n    return x + 1"),
    ],
    ids=["itself", "helper", "class", "constant", "set", "cached helper", "an error that steers"],
)
def test_the_version_changes_with_what_a_function_uses(old, new, book):
    assert VERSIONED.count(old) == 1
    assert version(book, VERSIONED.replace(old, new)) != version(book, VERSIONED)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("UNUSED = 1", "UNUSED = 2"),
        ("def unrelated(x):\n    return x", "def unrelated(x):\n    return 2 * x"),
        ("import torch\n", "import torch\nimport os\n\n\n"),
        (
            "    return helper(x) if",
            "    if not x:\n        raise ValueError\n    whole(x)\n    return helper(x) if",
        ),
    ],
    ids=["constant", "function", "lines moved", "refusals"],
)
def test_the_version_does_not_change_with_what_a_function_does_not_use(old, new, book):
    assert version(book, VERSIONED.replace(old, new, 1)) == version(book, VERSIONED)


def test_the_version_is_the_same_in_another_process(book):
    here = version(book, VERSIONED)
    code = (
        "from jahs_utils.chapters import *;print(code_version(load_chapter('91_versioned').unit))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.stdout.strip() == here, done.stderr
