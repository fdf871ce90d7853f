"""Exported functions of chapter 03 with numbers: a good call, and what is refused in its place.

Read by `tests/test_arguments.py`, which says what the tables mean.
"""

import math

import numpy as np
from bad_values import COUNT, COUNTS, NOT_NEGATIVE, NOT_NEGATIVE_COUNT, POSITIVE, SEED, or_none

from jahs_utils import load, load_chapter

chapter = load_chapter("03_nash")
VANILLA = chapter.vanilla_model(1, 4, 8, [4, 4])
CHILD = chapter.Child(VANILLA, {"lr": 0.01})
BLOCK = {"in_channels": 2, "out_channels": 3, "kernel": 3}
BAD_BLOCK = {name: COUNT for name in BLOCK}
UNBOUNDED = [value for value in POSITIVE if value != math.inf]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def as_they_are(children: list, *place: object) -> list:
    return children


CASES = {
    "SeparableConv": (BLOCK, BAD_BLOCK),
    "conv_layer": (BLOCK, BAD_BLOCK),
    "vanilla_model": (
        {"in_channels": 1, "classes": 4, "image_size": 8, "widths": [4, 4]},
        {"in_channels": COUNT, "classes": COUNT, "image_size": COUNT, "widths": COUNTS},
    ),
    "held_out_data": ({"data": "digits", "held_out": 100}, {"held_out": or_none(COUNT)}),
    "identity_block": ({"before": VANILLA[2], "kernel": 3}, {"kernel": COUNT}),
    "split_conv": (
        {"network": VANILLA, "rng": rng(), "share": 0.3},
        {"share": [*NOT_NEGATIVE, 2]},
    ),
    "mutate": (
        {"network": VANILLA, "n": 1, "rng": rng()},
        {"n": NOT_NEGATIVE_COUNT, "chances": [{"no operator": 1.0}]},
    ),
    "make_children": (
        {"parent": CHILD, "method": chapter.METHODS["SH"], "rng": rng(), "largest": 1e6},
        {"mutations": NOT_NEGATIVE_COUNT, "largest": UNBOUNDED},
    ),
    "start_climb": (
        {
            "data": load("digits", device="cpu", subset=200),
            "widths": [4, 4],
            "settings": {"lr": 0.1},
            "largest": math.inf,
            "seed": 0,
        },
        {
            "widths": COUNTS,
            "settings": [{"lr": value} for value in NOT_NEGATIVE],
            "largest": UNBOUNDED,
            "seed": SEED,
        },
    ),
    "climb_step": (
        {"children": [CHILD], "method": chapter.METHODS["SH"], "train": as_they_are},
        {"scale": POSITIVE},
    ),
    "hill_climb": (
        {
            "data": load("digits", device="cpu", subset=200),
            "steps": 0,
            "scale": 0.01,
            "widths": [4, 4],
        },
        {
            "steps": NOT_NEGATIVE_COUNT,
            "scale": POSITIVE,
            "mutations": NOT_NEGATIVE_COUNT,
            "largest": UNBOUNDED,
            "seconds": [value for value in NOT_NEGATIVE if value != math.inf],
            "widths": COUNTS,
            "lr": POSITIVE,
            "weight_decay": NOT_NEGATIVE,
            "seed": SEED,
        },
    ),
}

NUMBERED = "takes the numbers of layers that the network itself has given"
CHECKED = "is called by hill_climb with what that has checked"
GRID = "makes a grid of the chapter; tests/test_grids.py tries its keys"
EXEMPT = {
    **dict.fromkeys(["Graph.readers", "Graph.redirect", "ancestors", "label_of"], NUMBERED),
    **dict.fromkeys(["plan_changes", "change_channels", "take"], NUMBERED),
    **dict.fromkeys(["Network", "Network.insert", "Network.remove"], "Graph.sort refuses"),
    **dict.fromkeys(["train_child", "train_rung", "rung_schedule", "vary"], CHECKED),
    **dict.fromkeys(["take_step", "Climb.add", "drop_weights"], CHECKED),
    "random_morphism": "numpy refuses chances that cannot be",
    "make_layer": "reads what describe has written",
    **dict.fromkeys(["climb_grid", "race_grid", "inheritance_grid"], GRID),
}
