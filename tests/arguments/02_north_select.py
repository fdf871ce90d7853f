"""Exported functions of chapter 02 with numbers: a good call, and what is refused in its place.

Read by `tests/test_arguments.py`, which says what the tables mean.
"""

import math

import numpy as np
import torch
from bad_values import (
    COUNT,
    COUNTS,
    LONG,
    NOT_NEGATIVE,
    NOT_NEGATIVE_COUNT,
    POSITIVE,
    SEED,
    SHARE,
    or_none,
)

from jahs_utils import load, load_chapter

chapter = load_chapter("02_north_select")
DIGITS = load("digits", device="cpu", subset=200)
MATRIX = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3)))


def network() -> torch.nn.Module:
    """A network of two convolutions and a hidden layer that has seen a batch."""
    grown = chapter.GrowingConvNet([2, 3], [4], 1, 10, 8)
    grown(torch.rand(4, 1, 8, 8))
    return grown


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


NET = network()
LAYER = [*NOT_NEGATIVE_COUNT, 3]  # there are three that can grow
# inf: there is no limit
LIMIT = [value for value in POSITIVE if value not in (math.inf, True)]
SEVERAL = [[value, 1.0] for value in (math.nan, math.inf, "3", None, LONG)]
SAMPLE = [*SEVERAL, [], [1.0], [math.nan] * 1000, 5, None]
DRAWN = {"network": NET, "layer": 0, "count": 2, "generator": rng()}
STATIC = {"learning_rate": 0.1, "conv_layers": 2, "fc_layers": 0, "channels_1": 2, "channels_2": 2}

CASES = {
    "adam_first_step": ({"step": 2}, {"step": COUNT, "beta_1": SHARE, "beta_2": SHARE}),
    "epsilon_rank_by_images": (
        {"h": MATRIX, "images": 4},
        {"images": COUNT, "epsilon": POSITIVE},
    ),
    "room_by_share": (
        {"network": NET, "layer": 0, "limit": 1000.0},
        {"layer": LAYER, "limit": LIMIT},
    ),
    "epsilon_rank": ({"h": MATRIX, "epsilon": 0.1}, {"epsilon": POSITIVE}),
    "neurons_to_add_epsilon": (
        {"rank": 3, "first_rank": 2, "n": 4, "n_first": 4},
        {
            "rank": NOT_NEGATIVE,
            "first_rank": NOT_NEGATIVE,
            "n": POSITIVE,
            "n_first": POSITIVE,
            "gamma": POSITIVE,
        },
    ),
    "neurons_to_add": (
        {"relative_erank": 0.9, "n": 8, "q": 0.5},
        {"relative_erank": SHARE, "n": POSITIVE, "q": SHARE},
    ),
    "rank_scores": ({"h": MATRIX, "h_new": MATRIX}, {"epsilon": POSITIVE}),
    "select_candidates": ({"h": MATRIX, "h_new": MATRIX, "k": 2}, {"k": [*COUNT, 4]}),
    "GrowingConvNet": (
        {"channels": [2], "neurons": [], "in_channels": 1, "classes": 10, "image_size": 8},
        {
            "channels": [*COUNTS, [], [2, 2, 2, 2]],
            "neurons": [value for value in COUNTS if value != ""],
            "in_channels": COUNT,
            "classes": COUNT,
            "image_size": COUNT,
        },
    ),
    "activations": ({"network": NET, "layer": 0}, {"layer": LAYER}),
    "draw_weights": ({"old": MATRIX, "count": 2, "generator": rng()}, {"count": COUNT}),
    "draw_candidates": (DRAWN, {"layer": LAYER, "count": COUNT}),
    "add_neurons": (
        {"network": network(), "layer": 0, "new": chapter.draw_candidates(**DRAWN)},
        {"layer": LAYER},
    ),
    "extend": (
        {"module": torch.nn.Linear(2, 3), "name": "bias", "new": torch.zeros(1)},
        {"dim": [*NOT_NEGATIVE_COUNT, 2]},
    ),
    "Selection": ({}, {"conv": COUNT, "fc": COUNT}),
    "grow_layer": (
        {
            "network": network(),
            "layer": 0,
            "h": torch.rand(64, 2),
            "count": 1,
            "selection": chapter.Selection(),
            "generator": rng(),
        },
        {"layer": LAYER, "count": COUNT},
    ),
    "kind_of": ({"network": NET, "layer": 0}, {"layer": LAYER}),
    "neuron_size": ({"network": NET, "layer": 0}, {"layer": LAYER}),
    "EffectiveRank": (
        {"q": 0.8},
        {"q": SHARE, "q_fc": or_none(SHARE), "smoothing": [*SHARE, 1]},
    ),
    "NorthSelect": ({"rank": chapter.erank}, {"rank": [None, 5, "erank"], "gamma": POSITIVE}),
    "room_for": (
        {"network": NET, "layer": 0, "limit": 1000},
        {"layer": LAYER, "limit": LIMIT},
    ),
    "check_start": ({"network": NET, "limit": 1000}, {"limit": [*LIMIT, 10]}),
    "Grow": (
        {"rule": chapter.EffectiveRank(0.8)},
        {"every": COUNT, "limit": or_none(POSITIVE), "widest": COUNT, "seed": SEED},
    ),
    "TraceRanks": ({"every": 5}, {"every": COUNT, "epsilon": POSITIVE}),
    "make_rule": (
        {"method": "erank"},
        {"q": SHARE, "smoothing": [*SHARE, 1], "gamma": POSITIVE, "epsilon": POSITIVE},
    ),
    "train_static": (
        {"channels": [2], "neurons": [], "data": DIGITS, "epochs": 1, "lr": 0.1, "seed": 0},
        {
            "channels": COUNTS,
            "neurons": COUNTS,
            "epochs": POSITIVE,
            "lr": POSITIVE,
            "seed": SEED,
        },
    ),
    "build": (
        {"config": STATIC, "data": DIGITS, "limit": 1000, "seed": 0},
        {"limit": POSITIVE, "seed": SEED},
    ),
    "validation_error": (
        {"config": STATIC, "budget": 0.2, "data": "digits", "limit": 1000, "seed": 0},
        {"budget": POSITIVE, "limit": POSITIVE, "seed": SEED},
    ),
    "z_test": ({"a": [1.0, 2.0], "b": [1.0, 3.0]}, {"a": SAMPLE, "b": SAMPLE}),
    "conv_flops": ({"channels": [2, 2], "data": DIGITS}, {"channels": [*COUNTS, []]}),
    "GrowTo": (
        {"first": [8], "last": [16], "growth": "slow", "steps": 100},
        {"first": COUNTS, "last": [*COUNTS, [8, 8]], "steps": [*COUNT, 49]},
    ),
    "GrowTo.widths": (
        {"self": chapter.GrowTo([8], [16], "slow", 100), "step": 20},
        {"step": NOT_NEGATIVE},
    ),
}

GRID = "makes a grid of the chapter; tests/test_grids.py tries its keys"
GRIDS = ["final", "longer", "overshoot", "paced", "scores", "search"]
GRIDS += ["sites", "thresholds", "variants"]
AUTHOR = "is tried with its protocols in tests/test_chapter_02.py"
OF_THE_AUTHOR = [
    "BatchStatistics",
    "GrowInTurn",
    "GrowInTurn.grow",
    "GrowInTurn.in_turn",
    "HeldEffectiveRank",
    "HoldOff.pass_on",
    "Protocol",
    "ProtocolNet",
    "RisingNorthSelect",
    "TraceByImages",
    "add_proposed",
    "build_under",
    "cross_validated_error",
    "draw_uniform",
    "grow_by_author",
    "propose",
    "rule_under",
]
EXEMPT = {
    **dict.fromkeys(OF_THE_AUTHOR, AUTHOR),
    "Grow.grow": "is called by on_step, with each layer of the network",
    **{f"{name}_grid": GRID for name in GRIDS},
    **{f"author_{name}_grid": GRID for name in ("final", "search", "sweep")},
}
