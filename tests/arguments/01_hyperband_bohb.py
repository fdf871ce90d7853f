"""Exported functions of chapter 01 with numbers: a good call, and what is refused in its place.

Read by `tests/test_arguments.py`, which says what the tables mean.
"""

import math

import numpy as np
import pandas as pd
import torch
from bad_values import (
    COUNT,
    LONG,
    NO_NUMBER,
    NOT_NEGATIVE,
    NOT_NEGATIVE_COUNT,
    POSITIVE,
    SEED,
    SHARE,
    or_none,
)

from jahs_utils import load_chapter

chapter = load_chapter("01_hyperband_bohb")
X = np.array([0.1, 0.5])
CUBE = chapter.unit_cube(2)
POINT = {"x0": 0.5, "x1": 0.5}
ROWS = pd.DataFrame(
    {
        "errors": [[50.0, 40.0, 30.0, 20.0]] * 9,
        "shares": [[1 / 27, 1 / 9, 1 / 3, 1]] * 9,
        "max_budget": 27,
        "test_error": 20.0,
        "seconds": 1.0,
    }
)

POINTS = [[value] for value in (math.nan, -math.inf, -1, "3", None, [1], LONG)] + [[2, 1], 5, None]
FUNCTION = [None, 5, "loss", math.nan]
SEVERAL = [[value] for value in POSITIVE] + [[1, math.nan], [9, 1], [1, 1], [1, "3", 9], 5, None]
ETA = [*POSITIVE, 1, 0.5]
PERCENT = [*COUNT, 100]
WHOLE_ETA = [*COUNT, 1]
# inf: there is no limit
TOTAL = [value for value in or_none(POSITIVE) if value != math.inf]


def zero(config: dict, budget: float) -> float:
    return 0.0


def half(config: int, rung: int) -> tuple[float, float]:
    return 1.0, 0.5


def sampler() -> object:
    return chapter.BOHBSampler(CUBE)


BUDGETS = {"min_budget": 1, "max_budget": 3}
BAD_BUDGETS = {"min_budget": [*POSITIVE, 4], "max_budget": [*POSITIVE, 0.5]}
BOHB = {
    "top_percent": PERCENT,
    "candidates": COUNT,
    "random_fraction": SHARE,
    "bandwidth_factor": POSITIVE,
    "min_bandwidth": POSITIVE,
    "min_points": or_none(COUNT),
}
BOHB_SEED = [*SEED, 2**32]
GROUPS = [[value] * 3 for value in COUNT] + [[1, 1], 5, None]
NET = {
    "filters": 2,
    "blocks": [1, 1, 1],
    "widen": [1.0, 1.0, 1.0],
    "branches": [1, 1, 1],
    "death_rate": 0.0,
}
SMALL = {
    "filters": 2,
    "blocks": 1,
    "widen": 1.0,
    "branches": 1,
    "death_rate": 0.0,
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "batch_size": 32,
    "cutout_length": 0,
    "mixup_alpha": 0.0,
}
IMAGES = {"in_channels": COUNT, "classes": COUNT, "stem_stride": COUNT}

CASES = {
    "replay": ({"rows": ROWS, "seed": 0}, {"seed": SEED}),
    "check_budgets": (
        {"low": 1, "high": 9, "eta": 3},
        {"low": [*POSITIVE, 10], "high": [*POSITIVE, 0.5], "eta": [*ETA, 1.0000001]},
    ),
    "exact": ({"number": 0.1}, {"number": POSITIVE}),
    "successive_halving": (
        {"configs": [POINT] * 3, "evaluate": zero, "budgets": [1, 3], "eta": 3},
        {
            "evaluate": FUNCTION,
            "budgets": [*SEVERAL, [], list(range(1000, 0, -1))],
            "eta": [*ETA, 1.0000001],
        },
    ),
    "hyperband_brackets": (
        {"max_budget": 9, "eta": 3, "min_budget": 1},
        {
            "max_budget": [*POSITIVE, 0.5, 1e300],
            "eta": [*ETA, 1.0000001],
            "min_budget": [*POSITIVE, 10],
        },
    ),
    "hyperband": (
        {"sample": lambda: POINT, "evaluate": zero, "max_budget": 3},
        {
            "evaluate": FUNCTION,
            "max_budget": [*POSITIVE, 0.5],
            "min_budget": [*POSITIVE, 4],
            "eta": [*ETA, 1.0000001],
            "rounds": COUNT,
            "total": TOTAL,
        },
    ),
    "random_search": (
        {"sample": lambda: POINT, "evaluate": zero, "budget": 1, "total": 2},
        {"evaluate": FUNCTION, "budget": POSITIVE, "total": POSITIVE},
    ),
    "rbf": ({"a": X, "b": X, "length": 0.1}, {"length": POSITIVE}),
    "posterior": (
        {"x": X, "y": X, "at": X},
        {"length": POSITIVE, "noise": NOT_NEGATIVE},
    ),
    "expected_improvement": ({"mean": X, "deviation": X, "best": 0.2}, {"best": NO_NUMBER}),
    "Density": (
        {"points": np.array([[0.1], [0.9]]), "kinds": "c", "levels": np.array([0])},
        {"min_bandwidth": POSITIVE},
    ),
    "unit_cube": ({"dimensions": 2}, {"dimensions": [*COUNT, 10**9]}),
    "branin": ({"config": POINT, "share": 0.5}, {"share": SHARE}),
    "hartmann6": (
        {"config": {f"x{k}": 0.5 for k in range(6)}, "share": 0.5},
        {"share": SHARE},
    ),
    "counting_ones": (
        {
            "config": {f"bit{k}": 1 for k in range(8)} | {f"p{k}": 0.5 for k in range(8)},
            "share": 0.5,
        },
        {"share": [*SHARE, 0]},
    ),
    "make_problem": ({"name": "branin", "dead": 2}, {"dead": [*NOT_NEGATIVE_COUNT, 10**9]}),
    "split": (
        {"results": {1: [(k, X) for k in range(4)]}, "min_points": 2, "top_percent": 50},
        {
            "results": [None, 5, {1: [("low", X)] * 4}],
            "min_points": COUNT,
            "top_percent": PERCENT,
        },
    ),
    "draw_near": (
        {
            "good": chapter.Density(np.array([[0.1], [0.9]]), "c", np.array([0])),
            "count": 2,
            "factor": 3,
            "rng": np.random.default_rng(0),
        },
        {"count": COUNT, "factor": POSITIVE},
    ),
    "BOHBSampler": ({"space": CUBE}, BOHB | {"seed": BOHB_SEED}),
    "BOHBSampler.observe": (
        {"self": sampler(), "config": POINT, "budget": 1, "loss": 0.5},
        {"budget": POSITIVE, "loss": [None, "3", [1]]},  # nan and inf are crashes
    ),
    "bohb": (
        {"space": CUBE, "evaluate": zero, "max_budget": 3},
        BOHB
        | {
            "evaluate": FUNCTION,
            "max_budget": [*POSITIVE, 0.5],
            "min_budget": [*POSITIVE, 4],
            "eta": [*ETA, 1.0000001],
            "rounds": COUNT,
            "total": TOTAL,
            "seed": BOHB_SEED,
            "settings": [1],
        },
    ),
    "run_search": (
        {"method": "random", "space": CUBE, "evaluate": zero, "total": 3, "seed": 0} | BUDGETS,
        {"evaluate": FUNCTION, "total": POSITIVE, "seed": BOHB_SEED}
        | {"min_budget": POSITIVE, "max_budget": POSITIVE},
    ),
    "incumbents": ({"trials": [], "points": [0, 1]}, {"points": POINTS}),
    "shake_drop": (
        {"residual": torch.zeros(2, 3, 4, 4), "keep": 0.5, "training": True},
        {"keep": SHARE},
    ),
    "BranchedResNet": (
        NET,
        IMAGES
        | {
            "filters": COUNT,
            "blocks": GROUPS,
            "widen": [[value] * 3 for value in POSITIVE] + [[1.0], 5, None],
            "branches": GROUPS,
            "death_rate": SHARE,
        },
    ),
    "hyperparameter": (
        {"name": "x", "low": 1, "high": 4, "log": True},
        {"low": [*NO_NUMBER, 4, 5], "high": [*NO_NUMBER, 1, 0]},
    ),
    "build_network": ({"config": SMALL}, IMAGES),
    "restarts": ({"shares": [0.5, 1]}, {"shares": [*SEVERAL, []]}),
    "EvaluateAt": ({"shares": [0.5, 1]}, {"shares": SEVERAL}),
    "train_config": (
        {"config": SMALL, "data": "digits", "budget": 0.05, "shares": [1.0]},
        {"budget": POSITIVE, "shares": [*SEVERAL, []], "looks": SEVERAL, "seed": SEED},
    ),
    "architecture_first": (
        {"error": zero, "total": 6, "seed": 0} | BUDGETS,
        {"error": FUNCTION, "total": POSITIVE, "seed": BOHB_SEED} | BAD_BUDGETS,
    ),
    "replay_loss": (
        {"rows": ROWS, "bracket": 3, "seed": 0},
        {"bracket": [*or_none(NOT_NEGATIVE_COUNT), 4], "seed": SEED},
    ),
    "Synchronous": (
        {"first": 9, "rungs": 3},
        {"first": COUNT, "rungs": COUNT, "eta": WHOLE_ETA},
    ),
    "Asynchronous": ({"rungs": 3}, {"rungs": COUNT, "eta": WHOLE_ETA}),
    "simulate": (
        {"scheduler": chapter.Asynchronous(2), "workers": 2, "work": half, "horizon": 3},
        {"workers": COUNT, "work": [None, 5, "work"], "horizon": POSITIVE},
    ),
    "race": (
        {"rows": ROWS, "kind": "asynchronous", "workers": 2, "seed": 0},
        {"workers": COUNT, "seed": SEED},
    ),
}

LAYERS = "gets its numbers from BranchedResNet, which refuses"
HEARD = "hears of what simulate has run"
EXEMPT = {
    **dict.fromkeys(["conv", "BranchedBlock"], LAYERS),
    **dict.fromkeys(["Synchronous.report", "Asynchronous.report"], HEARD),
    "completed": "hands its budget on to the reader's function",
}
