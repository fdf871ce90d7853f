"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

import re
from typing import Any

import nbformat

from jahs_utils import load_chapter
from jahs_utils.chapters import chapter_path


def names() -> dict[str, Any]:
    """What the notebook has defined when a reader comes to its checks: exports and blank answers.

    Each blank answer stands in a cell of its own before the folded cell that checks it.
    """
    found = dict(vars(load_chapter("04_vmo")))
    for cell in nbformat.read(chapter_path("04_vmo"), as_version=4).cells:
        if cell.cell_type == "code" and re.match(
            r"answer_\d = None|def \w+\(.*?\"\"\"Your", cell.source, re.S
        ):
            exec(cell.source, found)
    return found


# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {}

# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = [
    (1, "answer_1 = [0.58, 0.18]"),
    (1, "answer_1 = np.array([0.58, 0.18], dtype=np.float32)"),
    (1, "answer_1 = torch.tensor([0.58, 0.18], dtype=torch.float64)"),
    (2, "def mask_width(choice):\n    return choice @ torch.arange(1.0, 1 + choice.shape[-1])"),
    (
        2,
        "def mask_width(choice):\n"
        "    return choice.double().numpy() @ np.arange(1, 1 + choice.shape[-1])",
    ),
    (
        2,
        "def mask_width(choice):\n"
        "    return ((choice * torch.arange(choice.shape[-1])).sum(-1) + 1).tolist()",
    ),
    (3, "answer_3 = 'Biased'"),
    (3, "answer_3 = ' biased '"),
    (3, "answer_3 = np.str_('biased')"),
    (
        4,
        "def next_temperature(t, entropy, start):\n"
        "    return np.float32(max(0.001, 0.99 * t) if 2 * entropy < start else t)",
    ),
    (
        4,
        "def next_temperature(t, entropy, start):\n"
        "    return torch.tensor(max(1e-3, t - t / 100) if entropy / start < 0.5 else t)",
    ),
    (
        4,
        "def next_temperature(t, entropy, start):\n"
        "    if entropy >= 0.5 * start:\n        return t\n"
        "    return np.maximum(0.001, 0.99 * t)",
    ),
]

# answers that must not pass, with the beginning of what the check says
WRONG = [
    (1, "answer_1 = (0.58, 0.58)", "not yet: the gap"),
    (1, "answer_1 = (0.4, 0.0)", "not yet: the bound"),
    (1, "answer_1 = 0.58", "not yet: answer with two numbers"),
    (1, "answer_1 = (0.58, None)", "not yet: answer with two numbers"),
    (1, "answer_1 = (float('nan'), 0.18)", "not yet: the bound"),
    (1, "answer_1 = torch.ones(2, 2)", "not yet: answer with two numbers"),
    (1, "answer_1 = 'a bound'", "not yet: answer with two numbers"),
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
    (
        2,
        "def mask_width(choice):\n    return width_mask(choice).sum(-1)",
        "not yet: this builds the mask",
    ),
    (
        2,
        "def mask_width(choice):\n"
        "    return (choice * torch.arange(1, 1 + choice.shape[-1])).sum(-1, keepdim=True)",
        "not yet: the shape is (1,)",
    ),
    (2, "def mask_width(choice):\n    raise KeyError('no')", "not yet: it raises KeyError"),
    (2, "def mask_width(choice):\n    return 'five'", "not yet: it raises"),
    (2, "mask_width = 5", "not yet: mask_width must be a function"),
    (
        2,
        "def mask_width(choice):\n    return choice.sum(-1) * float('nan')",
        "not yet: wrong for 1 channels",
    ),
    (3, "answer_3 = 'unbiased'", "not so"),
    (3, "answer_3 = ' Unbiased'", "not so"),
    (3, "answer_3 = True", "not yet: answer"),
    (3, "answer_3 = 'yes'", "not yet: answer"),
    (3, "answer_3 = float('nan')", "not yet: answer"),
    (3, "answer_3 = ['biased']", "not yet: answer"),
    (
        4,
        "def next_temperature(t, entropy, start):\n    return max(0.001, 0.99 * t)",
        "not yet: 0.099 after 0.1",
    ),
    (
        4,
        "def next_temperature(t, entropy, start):\n"
        "    return 0.99 * t if entropy < start / 2 else t",
        "not yet: 0.00099",
    ),
    (
        4,
        "def next_temperature(t, entropy, start):\n"
        "    return max(0.001, 0.99 * t) if entropy < 1.0 else t",
        "not yet: 0.1 after 0.1",
    ),
    (
        4,
        "def next_temperature(t, entropy, start):\n"
        "    return max(0.001, 0.99 * t) if entropy <= start / 2 else t",
        "not yet: 0.099 after 0.1",
    ),
    (4, "def next_temperature(t):\n    return t", "not yet: it raises TypeError"),
    (4, "def next_temperature(t, entropy, start):\n    return 'cold'", "not yet: it raises"),
    (4, "next_temperature = 0.1", "not yet: next_temperature must be a function"),
    (
        4,
        "def next_temperature(t, entropy, start):\n    return float('nan')",
        "not yet: nan after 0.1",
    ),
]
