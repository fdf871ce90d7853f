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

RULE = """
def floor_first_rungs(max_budget, eta):
    s_max = 0
    while eta ** (s_max + 1) <= max_budget:
        s_max += 1
    rungs = [(s_max + 1) // (s + 1) * eta**s for s in range(s_max, -1, -1)]
    return {form}
"""
WASTED = """
def wasted_share(bracket):
    wasted = spent = 0.0
    for order in range(100):
        sample, look_up = replay(table, order)
        rungs = hyperband_brackets(27)[bracket]
        configs = [sample() for _ in range(rungs[0][0])]
        for t in successive_halving(configs, look_up, [r for _, r in rungs]):
            spent += {cost}
            wasted += {cost} * (not top_ten[t.config["row"]])
    return {form}
"""


def rule(form: str) -> str:
    return RULE.format(form=form)


def wasted(form: str = "wasted / spent", cost: str = "t.budget") -> str:
    return WASTED.format(form=form, cost=cost)


# further right answers, in another form than the folded solution: (exercise, answer)
RIGHT: list[tuple[int, str]] = [
    (1, "answer_1 = 423.0"),
    (1, "answer_1 = np.float32(423)"),
    (1, "answer_1 = torch.tensor([423])"),
    (1, "answer_1 = (423,)"),
    (2, rule("tuple(rungs)")),
    (2, rule("np.array(rungs, dtype=np.float32)")),
    (2, rule("torch.tensor(rungs)")),
    (3, wasted("np.float32(wasted / spent)")),
    (3, wasted("torch.tensor(wasted / spent, requires_grad=True)")),
    (3, wasted("[wasted / spent]")),
    (4, "settings_4 = {'min_budget': 9.0}"),
    (4, "settings_4 = {'min_budget': np.int64(9), 'eta': 3}"),
    (4, "settings_4 = dict(min_budget=9, candidates=128)"),
]

# answers that must not pass, with the beginning of what the check says
WRONG = [
    (1, "answer_1 = 432", "not yet: (s_max + 1) R"),
    (1, "answer_1 = 324", "not yet: how many rungs"),
    (1, "answer_1 = 'many'", "not yet: one finite number"),
    (1, "answer_1 = float('nan')", "not yet: one finite number"),
    (1, "answer_1 = [108, 99, 108, 108]", "not yet: one finite number"),
    (1, "answer_1 = {}", "not yet: one finite number"),
    (
        2,
        "def floor_first_rungs(top, eta):\n    return [eta**4, eta**3, eta**2, eta, 1]",
        "not yet: wrong for R = 81",
    ),
    (
        2,
        "def floor_first_rungs(top, eta):\n"
        "    brackets = hyperband_brackets(top, eta, rule='floor')\n"
        "    return [bracket[0][0] for bracket in brackets]",
        "not yet: hyperband_brackets is the rule",
    ),
    (
        2,
        "import math\n"
        "def floor_first_rungs(top, eta):\n"
        "    s_max = round(math.log(top) / math.log(eta) - 0.49999)\n"
        "    return [(s_max + 1) // (s + 1) * eta**s for s in range(s_max, -1, -1)]",
        "not yet: a logarithm",
    ),
    (2, "def floor_first_rungs(top, eta):\n    return 1 / 0", "not yet: it raises ZeroDivision"),
    (2, "def floor_first_rungs(top, eta):\n    return [float('nan')]", "not yet: a list of"),
    (2, rule("rungs[::-1]"), "not yet: wrong for R = 81"),
    (2, "floor_first_rungs = [81, 27, 9, 6, 5]", "not yet: this should be a function"),
    (3, "def wasted_share(bracket):\n    return 1 - top_ten.mean()", "not yet: bracket 0"),
    (3, wasted(cost="1"), "not yet: bracket 0"),
    (3, wasted("1 - wasted / spent"), "not yet: bracket 0"),
    (3, wasted("wasted"), "not yet: bracket 0"),
    (3, "def wasted_share(bracket):\n    return float('nan')", "not yet: one finite share"),
    (3, "def wasted_share(bracket):\n    return top_ten['x']", "not yet: it raises IndexError"),
    (3, "wasted_share = 0.9", "not yet: this should be a function"),
    (4, "settings_4 = {'min_budget': 3}", "not yet: "),
    (4, "settings_4 = {'total': 10_000}", "not yet: leave total"),
    (4, "settings_4 = {'seed': 3, 'min_budget': 9}", "not yet: leave seed"),
    (4, "settings_4 = [9]", "not yet: a dict"),
    (4, "settings_4 = {'least_budget': 9}", "not yet: it raises TypeError"),
    (4, "settings_4 = {'min_budget': 'nine'}", "not yet: a min_budget from"),
    (4, "settings_4 = {'min_budget': 100}", "not yet: it raises ValueError"),
    (4, "settings_4 = {'eta': 1.0000001}", "not yet: it raises ValueError"),
]
