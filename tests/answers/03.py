"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

from typing import Any

from jahs_utils import load_chapter


def names() -> dict[str, Any]:
    """What the notebook has defined when a reader comes to its exercises."""
    return vars(load_chapter("03_nash"))


# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {}

# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = []

# answers that must not pass, with the beginning of what the check says
WRONG = [
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
]
