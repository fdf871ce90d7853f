"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

from typing import Any

from jahs_utils import load_chapter


def names() -> dict[str, Any]:
    """What the notebook has defined when a reader comes to its exercises."""
    return vars(load_chapter("02_north_select"))


# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {}

# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = []

# answers that must not pass, with the beginning of what the check says
WRONG = [
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
]
