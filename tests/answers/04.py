"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

from typing import Any

from jahs_utils import load_chapter


def names() -> dict[str, Any]:
    """What the notebook has defined when a reader comes to its exercises."""
    return vars(load_chapter("04_vmo"))


# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {}

# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = []

# answers that must not pass, with the beginning of what the check says
WRONG = [
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
]
