"""The exercises of a chapter as its readers have them: task cells, checks and folded solutions."""

import re
from typing import Any

import nbformat

from jahs_utils.chapters import chapter_path


class Exercises:
    """Runs the checks of a chapter's exercises.

    names: what the notebook has defined when a reader comes to them.
    """

    def __init__(self, chapter: str, names: dict[str, Any]) -> None:
        cells = nbformat.read(chapter_path(chapter), as_version=4).cells
        self.names = names
        self.tasks = {
            int(found[1]): cell.source
            for cell in cells
            if cell.cell_type == "code" and (found := re.search(r"def check_(\d)", cell.source))
        }
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        blocks = re.findall(r"Solution (\d)\n```python\n(.*?)```", prose, flags=re.DOTALL)
        self.solutions = {int(number): solution for number, solution in blocks}

    def verdict(self, number: int, solution: str = "") -> str:
        """What the check of an exercise says of a solution put below its task."""
        *task, call = self.tasks[number].rstrip().splitlines()
        space = dict(self.names)
        exec("\n".join(task) + "\n" + solution, space)
        return eval(call, space)
