"""Answers to the exercises of one chapter: right ones, and wrong ones with what is said of them."""

from typing import Any

import numpy as np
from scipy import stats

from jahs_utils import load_chapter, read_results


def names() -> dict[str, Any]:
    rows = read_results("01_hyperband_bohb", "fidelity", "standard")
    table = rows[rows["unit"] == "images"].reset_index(drop=True)
    errors = np.array(table["errors"].tolist(), dtype=float)
    top_ten = stats.rankdata(errors[:, -1]) <= 10
    recorded = {"table": table, "errors": errors, "top_ten": top_ten, "BUDGETS": [1, 3, 9, 27]}
    return vars(load_chapter("01_hyperband_bohb")) | recorded


# answers that the folded solutions give in words
IN_WORDS: dict[int, str] = {1: "answer_1 = 423"}

# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = []

# answers that must not pass, with the beginning of what the check says
WRONG = [
    (1, "answer_1 = 432", ""),
    (2, "def floor_first_rungs(top, eta):\n    return [eta**4, eta**3, eta**2, eta, 1]", ""),
    (3, "def wasted_share(bracket):\n    return 1 - top_ten.mean()", ""),
    (4, "settings_4 = {'min_budget': 3}", ""),
]
