"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

from typing import Any

from jahs_utils import load_chapter


def names() -> dict[str, Any]:
    """What the notebook has defined when a reader comes to its exercises."""
    return vars(load_chapter("05_smash"))


# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {}

# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = []

# answers that must not pass, with the beginning of what the check says
WRONG = [
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
]
