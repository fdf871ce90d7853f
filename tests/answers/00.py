"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

from typing import Any

from jahs_utils import load, load_chapter, read_results
from jahs_utils.networks import ConvNet


def names() -> dict[str, Any]:
    chapter = load_chapter("00_training")
    recorded = chapter.label(read_results("00_training", "joint_grid", "standard"))
    held_out = load("digits", device="cpu").hold_out(300)
    small = {"ConvNet": lambda channels: ConvNet(channels, image_size=8)}
    return vars(chapter) | {"recorded": recorded, "held_out": held_out} | small


# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {1: "answer_1 = 126_154"}

# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = []

# answers that must not pass, with the beginning of what the check says
WRONG = [
    (1, "answer_1 = 126_153", ""),
    (2, "def best_under(rows, limit):\n    return (1.0, 8, 1)", ""),
    (3, "def repeated(scores, start, order):\n    return start", ""),
    (4, "def warm_up(fraction, epoch):\n    return 1 - fraction", ""),
]
