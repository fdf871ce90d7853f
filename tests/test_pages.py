"""What a reader of a page sees: folded code under a prompt that names it, and little else."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from jahs_utils.book import FOLDED, check_chapters, fold, visible_lines
from jahs_utils.chapters import chapter_names, chapter_path

MOST = 400  # visible lines of code a chapter; 350 is the aim
PROMPT = re.compile(r"# [A-Z][\w ]*: \S.*")
CODE = "# Draws: Error against budget\nx = 1"


def chapter(name: str) -> nbformat.NotebookNode:
    return nbformat.read(chapter_path(name), as_version=4)


def folded(name: str) -> list[nbformat.NotebookNode]:
    return [c for c in chapter(name).cells if FOLDED & set(c.metadata.get("tags", []))]


def cell(*tags: str, source: str = CODE, **metadata: object) -> nbformat.NotebookNode:
    return new_code_cell(source, metadata={"tags": list(tags), **metadata})


# --- the rules, in every chapter ------------------------------------------------------------------


@pytest.mark.parametrize("name", chapter_names())
def test_a_folded_cell_begins_with_a_comment_that_says_what_is_in_it(name: str) -> None:
    lines = [c.source.partition("\n")[0] for c in folded(name)]
    assert lines
    assert not [line for line in lines if not PROMPT.fullmatch(line)]


@pytest.mark.parametrize("name", chapter_names())
def test_what_folds_a_cell_follows_from_its_tags_and_first_line(name: str) -> None:
    stored = chapter(name)
    refreshed = copy.deepcopy(stored)
    fold(refreshed)
    assert [c.metadata for c in stored.cells] == [c.metadata for c in refreshed.cells]


@pytest.mark.parametrize("name", chapter_names())
def test_a_page_shows_little_code(name: str) -> None:
    assert visible_lines(chapter(name)) <= MOST


@pytest.mark.parametrize("name", chapter_names())
def test_a_cell_of_which_only_the_output_shows_has_one(name: str) -> None:
    alone = [c for c in folded(name) if "remove-input" in c.metadata.tags]
    assert not [c.source[:60] for c in alone if not c.outputs]


@pytest.mark.parametrize("name", chapter_names())
def test_every_figure_is_shown_under_its_title(name: str) -> None:
    """A figure that is left open is displayed as a picture: without title, on a white slab."""
    calls = [
        ast.unparse(node.func)
        for c in chapter(name).cells
        if c.cell_type == "code" and not c.source.startswith("%")
        for node in ast.walk(ast.parse(c.source))
        if isinstance(node, ast.Call)
    ]
    assert "show" in calls
    assert not {"plt.show", "plt.subplots", "plt.figure"} & set(calls)
    pictures = [
        c.source.partition("\n")[0]
        for c in chapter(name).cells
        for output in c.get("outputs", [])
        if {"image/png", "image/jpeg"} & set(output.get("data", {}))
    ]
    assert not pictures


# --- how folding works ----------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [["hide-input"], ["hide-cell", "export"], ["remove-input"]])
def test_a_tagged_cell_is_folded_on_the_site_in_jupyterlab_and_in_colab(tags: list[str]) -> None:
    notebook = new_notebook(cells=[cell(*tags)])
    fold(notebook)
    prompt = "Code: draws: Error against budget"
    assert notebook.cells[0].metadata == {
        "tags": tags,
        "mystnb": {"code_prompt_show": prompt, "code_prompt_hide": prompt},
        "jupyter": {"source_hidden": True},
        "cellView": "form",
    }


def test_folding_keeps_what_else_is_said_of_a_cell() -> None:
    notebook = new_notebook(cells=[cell("hide-input", mystnb={"image": {"alt": "A line"}})])
    fold(notebook)
    assert notebook.cells[0].metadata["mystnb"]["image"] == {"alt": "A line"}


def test_a_cell_that_loses_its_tag_is_unfolded() -> None:
    kept = {"mystnb": {"image": {"alt": "A line"}}, "jupyter": {"outputs_hidden": True}}
    notebook = new_notebook(cells=[cell("hide-input", **copy.deepcopy(kept)), cell("hide-cell")])
    fold(notebook)
    for one in notebook.cells:
        one.metadata.tags = ["export"]
    fold(notebook)
    assert [c.metadata for c in notebook.cells] == [
        {"tags": ["export"], **kept},
        {"tags": ["export"]},
    ]


def test_other_cells_are_left_alone() -> None:
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), cell("export")])
    before = copy.deepcopy(notebook)
    fold(notebook)
    assert notebook == before


@pytest.mark.parametrize("tag", [*sorted(FOLDED), "remove-cell"])
def test_only_code_that_is_on_the_page_counts_as_visible(tag: str) -> None:
    cells = [new_markdown_cell("One\n\nline"), cell("export"), cell(tag, "export"), cell()]
    assert visible_lines(new_notebook(cells=cells)) == 4


def test_the_checks_print_the_visible_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "90_lines.ipynb"
    nbformat.write(new_notebook(cells=[cell("hide-input"), cell()]), path)
    assert check_chapters([path]) == 0
    assert "90_lines: 2 visible lines" in capfd.readouterr().out


DRAWN = """from IPython.display import display

picture = '<figure>TITLE<svg width="1">DRAWING</svg></figure>'
display({"text/html": picture, "text/plain": "TITLE"}, raw=True)"""


@pytest.mark.parametrize(("changed", "status"), [("DRAWING", 0), ("TITLE", 1)])
def test_nbval_compares_the_title_of_a_figure_and_not_its_drawing(
    changed: str, status: int, tmp_path: Path
) -> None:
    page = '<figure>TITLE<svg width="1">DRAWING</svg></figure>'
    drawn = new_code_cell(DRAWN, execution_count=1)
    data = {"text/html": page.replace(changed, "another"), "text/plain": "TITLE"}
    drawn.outputs = [nbformat.v4.new_output("display_data", data)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "90_drawn.ipynb"
    nbformat.write(new_notebook(cells=[drawn], metadata={"kernelspec": kernel}), path)
    assert check_chapters([path]) == status
