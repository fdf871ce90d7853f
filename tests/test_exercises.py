"""The exercises of all chapters, as their readers have them: tasks, checks and folded solutions."""

import functools
import re
from typing import Any

import nbformat
import numpy as np
import pytest
from scipy import stats

from jahs_utils import load, load_chapter, read_results
from jahs_utils.chapters import chapter_path
from jahs_utils.networks import ConvNet


def names_00() -> dict[str, Any]:
    chapter = load_chapter("00_training")
    recorded = chapter.label(read_results("00_training", "joint_grid", "standard"))
    held_out = load("digits", device="cpu").hold_out(300)
    small = {"ConvNet": lambda channels: ConvNet(channels, image_size=8)}
    return vars(chapter) | {"recorded": recorded, "held_out": held_out} | small


def names_01() -> dict[str, Any]:
    rows = read_results("01_hyperband_bohb", "fidelity", "standard")
    table = rows[rows["unit"] == "images"].reset_index(drop=True)
    errors = np.array(table["errors"].tolist(), dtype=float)
    top_ten = stats.rankdata(errors[:, -1]) <= 10
    recorded = {"table": table, "errors": errors, "top_ten": top_ten, "BUDGETS": [1, 3, 9, 27]}
    return vars(load_chapter("01_hyperband_bohb")) | recorded


# what a notebook has defined when a reader comes to its exercises
NAMES = {
    "00_training": names_00,
    "01_hyperband_bohb": names_01,
    "02_north_select": lambda: vars(load_chapter("02_north_select")),
    "03_nash": lambda: vars(load_chapter("03_nash")),
    "04_vmo": lambda: vars(load_chapter("04_vmo")),
    "05_smash": lambda: vars(load_chapter("05_smash")),
}

# answers that the folded solutions give in words
IN_WORDS = {"00_training": {1: "answer_1 = 126_154"}, "01_hyperband_bohb": {1: "answer_1 = 423"}}

# answers that must not pass, with the beginning of what the check says
WRONG = {
    "00_training": [
        (1, "answer_1 = 126_153", ""),
        (2, "def best_under(rows, limit):\n    return (1.0, 8, 1)", ""),
        (3, "def repeated(scores, start, order):\n    return start", ""),
        (4, "def warm_up(fraction, epoch):\n    return 1 - fraction", ""),
    ],
    "01_hyperband_bohb": [
        (1, "answer_1 = 432", ""),
        (2, "def floor_first_rungs(top, eta):\n    return [eta**4, eta**3, eta**2, eta, 1]", ""),
        (3, "def wasted_share(bracket):\n    return 1 - top_ten.mean()", ""),
        (4, "settings_4 = {'min_budget': 3}", ""),
    ],
    "02_north_select": [
        (1, "answer_1 = 0.5", "too small"),
        (1, "answer_1 = 1.0", "larger than needed"),
        (2, "exact_add = lambda r, n, q: neurons_to_add(float(r), n, float(q)) + 1", "not yet"),
        (
            2,
            "exact_add = lambda r, n, q: max(0, math.floor((float(r) - float(q)) * n))",
            "not yet",
        ),
        (3, "answer_3 = 1", "not this one"),
        (
            4,
            "cifar_network = lambda: (GrowingConvNet([8] * 3, [8], 3, 10, 32), "
            "Grow(EffectiveRank(1.0), limit=60_000))",
            "not yet: nothing has grown",
        ),
        (
            4,
            "cifar_network = lambda: (GrowingConvNet([8] * 3, [], 3, 10, 32), "
            "Grow(EffectiveRank(0.5), limit=60_000))",
            "not yet: three convolutional",
        ),
        (
            4,
            "cifar_network = lambda: (GrowingConvNet([8] * 3, [8], 3, 10, 32), "
            "Grow(EffectiveRank(0.5), limit=50_000))",
            "not yet: the limit",
        ),
    ],
    "03_nash": [
        (1, "answer_1 = (40, 160)", "not yet"),
        (
            2,
            "def identity_weights(channels, kernel):\n"
            "    ones = torch.ones(channels, 1, kernel, kernel)\n"
            "    return ones, torch.eye(channels)[:, :, None, None]",
            "not yet: not the identity for 1",
        ),
        (
            2,
            "def identity_weights(channels, kernel):\n    return [torch.eye(channels)] * 2",
            "not yet: a weight",
        ),
        (3, "answer_3 = 'a'", "not this one"),
        (3, "answer_3 = 'b'", "not this one"),
        (4, "def gentle(fraction, rung):\n    return cosine(fraction, 0)", "not yet: it jumps"),
        (
            4,
            "def gentle(fraction, rung):\n    return float(fraction == 0 == rung)",
            "not yet: the mean",
        ),
        (4, "def gentle(fraction, rung):\n    return 0.9", "not yet: it must start"),
    ],
    "04_vmo": [
        (1, "answer_1 = (0.58, 0.58)", "not yet"),
        (1, "answer_1 = (0.4, 0.0)", "not yet"),
        (
            2,
            "def mask_width(choice):\n    return choice.argmax(-1) + 1.0",
            "not yet: wrong for 5 channels",
        ),
        (
            2,
            "def mask_width(choice):\n    return choice @ torch.arange(float(choice.shape[-1]))",
            "not yet: wrong for 1 channels",
        ),
        (3, "answer_3 = 'unbiased'", "not so"),
        (
            4,
            "def next_temperature(t, entropy, start):\n    return max(0.001, 0.99 * t)",
            "not yet: 0.099 after 0.1, not 0.1",
        ),
        (
            4,
            "def next_temperature(t, entropy, start):\n"
            "    return 0.99 * t if entropy < start / 2 else t",
            "not yet: 0.00099",
        ),
    ],
    "05_smash": [
        (1, "answer_1 = 43", "not yet"),
        (2, "def unet_block(channels, units):\n    return resnet_block(8, 3, 16)", "not yet: who"),
        (
            2,
            "def unet_block(channels, units):\n"
            "    return Block(4, channels, (Op((1, 2), (3,), units),))",
            "not yet: block 0, op 0: reads bank 1",
        ),
        (3, "def count_simple(space):\n    return 15 * 3 * 2 * 4 - 1", "not yet"),
        (
            4,
            "def most_overrated(scores, errors):\n    return int(np.argmax(errors))",
            "not yet",
        ),
    ],
}


class Exercises:
    """Runs the checks of a chapter's exercises."""

    def __init__(self, chapter: str) -> None:
        cells = nbformat.read(chapter_path(chapter), as_version=4).cells
        self.names = NAMES[chapter]()
        self.tasks = {
            int(found[1]): cell.source
            for cell in cells
            if cell.cell_type == "code" and (found := re.search(r"def check_(\d)", cell.source))
        }
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        blocks = re.findall(r"Solution (\d)\n```python\n(.*?)```", prose, flags=re.DOTALL)
        code = {int(number): solution for number, solution in blocks}
        self.solutions = IN_WORDS.get(chapter, {}) | code

    def verdict(self, number: int, solution: str = "") -> str:
        """What the check of an exercise says of a solution put below its task."""
        *task, call = self.tasks[number].rstrip().splitlines()
        space = dict(self.names)
        exec("\n".join(task) + "\n" + solution, space)
        return eval(call, space)


exercises_of = functools.cache(Exercises)


@pytest.mark.parametrize("chapter", NAMES)
def test_every_exercise_with_a_check_has_a_folded_solution(chapter):
    exercises = exercises_of(chapter)
    assert exercises.tasks.keys() == exercises.solutions.keys()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("chapter", NAMES)
def test_an_exercise_starts_unanswered_and_accepts_its_solution(chapter, number):
    exercises = exercises_of(chapter)
    assert exercises.verdict(number) == "no answer yet"
    assert exercises.verdict(number, exercises.solutions[number]).startswith("right")


@pytest.mark.parametrize(
    ("chapter", "number", "wrong", "verdict"),
    [(chapter, *case) for chapter, cases in WRONG.items() for case in cases],
)
def test_a_wrong_answer_does_not_pass(chapter, number, wrong, verdict):
    said = exercises_of(chapter).verdict(number, wrong)
    assert said.startswith(verdict)
    assert not said.startswith(("right", "no answer"))
