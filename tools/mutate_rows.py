"""Does a page notice when a recorded row changes?

Multiplies one metric of one row by 1.2, runs the cells that depend on that file again, and looks
whether an output that nbval compares has changed or a cell has failed; then the next row. Prints
the share of rows that are noticed, for each file and in all, with and without the checksums of the
chapters' tables of costs.

    python tools/mutate_rows.py [--rows 10] [CHAPTER ...]
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import re
import shutil
import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from jahs_utils import experiments, plots
from jahs_utils.chapters import book_root, chapter_names

READERS = ("read_results", "claims_table", "findings_table", "conclude", "sentence")
COSTS = "recorded_costs"
Outputs = dict[int, str]


def used_names(source: str) -> tuple[set[str], set[str]]:
    """Names that a cell reads and names that it binds."""
    tree = ast.parse(re.sub(r"(?m)^\s*[%!].*$", "pass", source))
    read, bound = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return read, bound


class Page:
    """The cells of a chapter that follow from recorded rows, and what they need to run."""

    def __init__(self, chapter: str) -> None:
        self.chapter = chapter
        path = book_root() / "chapters" / f"{chapter}.ipynb"
        cells = nbformat.read(path, as_version=4).cells
        self.cells = {k: c for k, c in enumerate(cells) if c.cell_type == "code"}
        self.names = {k: used_names(cell.source) for k, cell in self.cells.items()}
        self.shown, tainted = [], set()
        for k in self.cells:
            read, bound = self.names[k]
            if "export" in self.tags(k):
                continue
            if read & {*READERS, COSTS} or read & tainted:
                self.shown.append(k)
                tainted |= bound
            else:
                tainted -= bound
        self.shell = InteractiveShell.instance()
        self.shell.reset(new_session=False)
        for k in self._needed():
            self.run(k)

    def tags(self, k: int) -> list[str]:
        return self.cells[k].metadata.get("tags", [])

    def _needed(self) -> list[int]:
        """Cells that bind what the shown cells read, and what those read in turn."""
        wanted = set().union(*(self.names[k][0] for k in self.shown))
        needed = set()
        for k in sorted(set(self.cells) - set(self.shown), reverse=True):
            if wanted & self.names[k][1] or "export" in self.tags(k):
                needed.add(k)
                wanted |= self.names[k][0]
        return sorted(needed)

    def run(self, k: int) -> str:
        """A cell's outputs as nbval compares them: without drawings, or the error's name."""
        with capture_output() as captured:
            done = self.shell.run_cell(self.cells[k].source, store_history=False)
        plt.close("all")
        if not done.success:
            return f"failed: {done.error_in_exec or done.error_before_exec!r}"
        parts = [captured.stdout, *(json.dumps(out.data) for out in captured.outputs)]
        return re.sub(r"<svg.*?</svg>", "", "\n".join(parts), flags=re.DOTALL)

    def outputs(self, cells: list[int]) -> Outputs:
        return {k: self.run(k) for k in cells if "nbval-ignore-output" not in self.tags(k)}

    def reads(self, experiment: str) -> list[int]:
        """The shown cells that may change with an experiment: all from its first reader on."""
        return [
            k
            for k in self.shown
            if not re.search(rf"{READERS[0]}\(", self.cells[k].source)
            or re.search(rf'"{experiment}"', self.cells[k].source)
            or re.search(rf"{READERS[0]}\((?!\s*\")", self.cells[k].source)
        ]


def mutate(line: str, rng: random.Random) -> tuple[str, str]:
    """The row with one metric multiplied by 1.2, and the metric's name."""
    row = json.loads(line)
    numbers = [n for n, v in row["metrics"].items() if isinstance(v, int | float) and v]
    lists = [n for n, v in row["metrics"].items() if isinstance(v, list) and v]
    name = rng.choice(numbers or lists)
    row["metrics"][name] = scaled(row["metrics"][name])
    return json.dumps(row), name


def scaled(value: object) -> object:
    """Numbers, also those in lists, times 1.2; whole numbers stay whole."""
    if isinstance(value, list):
        return [scaled(v) for v in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return max(value + 1, round(1.2 * value)) if isinstance(value, int) else 1.2 * value


def noticed(page: Page, path: Path, number: int, rows: int) -> tuple[int, int, int, list[str]]:
    """Rows tried, noticed by what the page says, noticed with checksums; metrics that were not."""
    rng = random.Random(f"{path.name} {number}")
    cells = page.reads(path.stem.rpartition("-")[0])
    before = page.outputs(cells)
    lines = path.read_text(encoding="utf-8").splitlines()
    picked = sorted(rng.sample(range(len(lines)), min(rows, len(lines))))
    said = with_checksum = 0
    missed = []
    for k in picked:
        changed, name = mutate(lines[k], rng)
        path.write_text("\n".join([*lines[:k], changed, *lines[k + 1 :], ""]), encoding="utf-8")
        after = page.outputs(cells)
        different = [c for c in before if before[c] != after[c]]
        by_costs = [c for c in different if COSTS in page.cells[c].source]
        said += len(different) > len(by_costs)
        with_checksum += bool(different)
        if len(different) == len(by_costs):
            missed.append(name)
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return len(picked), said, with_checksum, missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", default=None)
    parser.add_argument("--rows", type=int, default=10, help="rows of each file, drawn at random")
    asked = parser.parse_args()
    real = book_root()
    mpl.use("agg")
    plots._svg = lambda figure, alt: alt  # the drawing itself is not compared
    totals = [0, 0, 0]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(real / "results", Path(folder) / "results")
        (Path(folder) / "chapters").symlink_to(real / "chapters")
        os.environ |= {"JAHS_BOOK": folder, "JAHS_PROGRESS": "0"}
        for chapter in asked.chapters or chapter_names():
            with contextlib.chdir(real / "chapters"):
                page = Page(chapter)
                shown = [p for p in sorted((Path(folder) / "results" / chapter).glob("*.jsonl"))]
                for path in shown:
                    experiments.Results(path).rows()
                    tried, said, summed, missed = noticed(page, path, 0, asked.rows)
                    print(
                        f"{chapter}/{path.stem}: {said} of {tried} rows change what the page says, "
                        f"{summed} with checksums"
                        + (f"; not: {', '.join(missed)}" if missed else "")
                    )
                    totals = [a + b for a, b in zip(totals, (tried, said, summed))]
    tried, said, summed = totals
    print(f"in all, of {tried} rows: {said / tried:.1%} change what pages say,")
    print(f"{summed / tried:.1%} with the checksums of the rows")


if __name__ == "__main__":
    main()
