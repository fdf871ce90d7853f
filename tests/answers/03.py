"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

from typing import Any

import nbformat

from jahs_utils import load_chapter
from jahs_utils.chapters import chapter_path


def names() -> dict[str, Any]:
    """What the notebook has defined when a reader comes to its exercises, unanswered."""
    space = dict(vars(load_chapter("03_nash")))
    for cell in nbformat.read(chapter_path("03_nash"), as_version=4).cells:
        if cell.cell_type == "code" and cell.source.startswith("# Your answer"):
            exec(cell.source, space)
    return space


# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {}

IDENTITY = """
def identity_weights(channels, kernel):
    depthwise = np.zeros((channels, 1, kernel, kernel), dtype=np.float64)
    depthwise[:, 0, kernel // 2, kernel // 2] = 1
    pointwise = np.eye(channels).reshape(channels, channels, 1, 1)
    return {}
"""
DEPTHWISE = """
def identity_weights(channels, kernel):
    depthwise = torch.zeros(channels, 1, kernel, kernel)
    depthwise[:, 0, {place}] = {value}
    return depthwise, torch.eye(channels)[:, :, None, None]
"""

# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = [
    (1, "answer_1 = [75.0, 160.0]"),
    (1, "answer_1 = np.array([75, 160])"),
    (1, "answer_1 = torch.tensor([75, 160])"),
    (2, IDENTITY.format("depthwise, pointwise")),
    (2, IDENTITY.format("depthwise.tolist(), pointwise.tolist()")),
    (2, IDENTITY.format("[torch.tensor(depthwise, requires_grad=True), pointwise]")),
    (3, "answer_3 = 'C'"),
    (3, "answer_3 = 'c '"),
    (3, "answer_3 = '(c)'"),
    (4, "def gentle(fraction, rung):\n    return 1"),
    (4, "def gentle(fraction, rung):\n    return np.float32(1 - 0.2 * rung)"),
    (4, "def gentle(fraction, rung):\n    return torch.tensor(1 - fraction * 0.3)"),
]

# answers that must not pass, with the beginning of what the check says
WRONG = [
    (1, "answer_1 = (40, 160)", "not yet: the winner"),
    (1, "answer_1 = (75, 600)", "not yet: on each rung"),
    (1, "answer_1 = 75", "not yet: answer with two"),
    (1, "answer_1 = 'seventy-five'", "not yet: answer with a pair"),
    (1, "answer_1 = (75, None)", "not yet: on each rung"),
    (1, "answer_1 = {75: 160}", "not yet: answer with a pair"),
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
    (2, DEPTHWISE.format(place="0, 0", value=1), "not yet: not the identity for 1"),
    (2, DEPTHWISE.format(place="1, 1", value="float('nan')"), "not yet: not the identity"),
    (2, "def identity_weights(channels, kernel):\n    return 1 / 0", "not yet: it gives no"),
    (2, "def identity_weights(channels, kernel):\n    return 'two'", "not yet: it gives no"),
    (
        2,
        "def identity_weights(channels, kernel):\n"
        "    return [torch.ones(channels, 1, kernel, kernel)]",
        "not yet: two weights",
    ),
    (3, "answer_3 = 'a'", "not this one"),
    (3, "answer_3 = 'b'", "not this one"),
    (3, "answer_3 = 'ac'", "not yet: answer with one letter"),
    (3, "answer_3 = 3", "not yet: answer with one letter"),
    (3, "answer_3 = ''", "not yet: answer with one letter"),
    (3, "answer_3 = ['c']", "not yet: answer with one letter"),
    (4, "def gentle(fraction, rung):\n    return cosine(fraction, 0)", "not yet: it jumps"),
    (
        4,
        "def gentle(fraction, rung):\n    return float(fraction == 0 == rung)",
        "not yet: the mean",
    ),
    (4, "def gentle(fraction, rung):\n    return 0.9", "not yet: it must start"),
    (4, "def gentle(fraction, rung):\n    return 1 - 2 * fraction * rung", "not yet: it jumps"),
    (4, "def gentle(fraction, rung):\n    return 1 - 0.5 * rung", "not yet: a rate below"),
    (
        4,
        "def gentle(fraction, rung):\n    return float('nan') if rung else 1.0",
        "not yet: a rate is not finite",
    ),
    (4, "def gentle(fraction, rung):\n    return [1] if rung else 1", "not yet: it gives no"),
    (
        4,
        "def gentle(fraction, rung):\n    return max(0, 1 - 20 * fraction) if rung else 1",
        "not yet: it jumps",
    ),
]
