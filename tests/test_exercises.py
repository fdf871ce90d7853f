"""The exercises of all chapters, as their readers have them: tasks, checks and folded solutions.

The answers that are tried stand in tests/answers, one file a chapter.
"""

import functools
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from jahs_utils.chapters import chapter_names, chapter_path

CHAPTERS = chapter_names()


@functools.cache
def answers(chapter: str) -> ModuleType:
    """The file of answers to a chapter's exercises."""
    path = Path(__file__).parent / "answers" / f"{chapter[:2]}.py"
    spec = importlib.util.spec_from_file_location(f"answers_{chapter[:2]}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Exercises:
    """Runs the checks of a chapter's exercises."""

    def __init__(self, chapter: str) -> None:
        cells = nbformat.read(chapter_path(chapter), as_version=4).cells
        self.names = answers(chapter).names()
        self.tasks = {
            int(found[1]): cell.source
            for cell in cells
            if cell.cell_type == "code" and (found := re.search(r"def check_(\d)", cell.source))
        }
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        blocks = re.findall(r"Solution (\d)\n```python\n(.*?)```", prose, flags=re.DOTALL)
        code = {int(number): solution for number, solution in blocks}
        self.solutions = answers(chapter).IN_WORDS | code

    def verdict(self, number: int, solution: str = "") -> str:
        """What the check of an exercise says of a solution put below its task."""
        *task, call = self.tasks[number].rstrip().splitlines()
        space = dict(self.names)
        exec("\n".join(task) + "\n" + solution, space)
        return eval(call, space)


exercises_of = functools.cache(Exercises)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_exercise_with_a_check_has_a_folded_solution(chapter):
    exercises = exercises_of(chapter)
    assert exercises.tasks.keys() == exercises.solutions.keys()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_an_exercise_starts_unanswered_and_accepts_its_solution(chapter, number):
    exercises = exercises_of(chapter)
    assert exercises.verdict(number) == "no answer yet"
    assert exercises.verdict(number, exercises.solutions[number]).startswith("right")


@pytest.mark.parametrize(
    ("chapter", "number", "wrong", "verdict"),
    [(chapter, *case) for chapter in CHAPTERS for case in answers(chapter).WRONG],
)
def test_a_wrong_answer_does_not_pass(chapter, number, wrong, verdict):
    said = exercises_of(chapter).verdict(number, wrong)
    assert said.startswith(verdict)
    assert not said.startswith(("right", "no answer"))


@pytest.mark.parametrize(
    ("chapter", "number", "right"),
    [(chapter, *case) for chapter in CHAPTERS for case in answers(chapter).RIGHT],
)
def test_a_right_answer_in_another_form_passes(chapter, number, right):
    assert exercises_of(chapter).verdict(number, right).startswith("right")
