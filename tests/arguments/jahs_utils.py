"""Public functions of the package that take numbers: a good call, and what is refused in its place.

Read by `tests/test_arguments.py`, which says what the tables mean.
"""

import math

import altair
import pandas as pd
import torch
from bad_values import (
    COUNT,
    COUNTS,
    LONG,
    NO_NUMBER,
    NOT_NEGATIVE,
    NOT_NEGATIVE_COUNT,
    POSITIVE,
    SEED,
    SHARE,
    or_none,
)
from ConfigSpace import ConfigurationSpace

from jahs_utils import load
from jahs_utils.device import NumberFormat
from jahs_utils.networks import ConvNet
from jahs_utils.search import Evaluator

DIGITS = load("digits", device="cpu", subset=100)
CPU, PLAIN = torch.device("cpu"), NumberFormat("float32", False)
IMAGES, LABELS = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])


def small() -> ConvNet:
    return ConvNet((2,), (), 1, 10, 8)


def zero(config: dict, budget: float) -> float:
    return 0.0


def changed(**values: list) -> dict[str, list]:
    """Bad values of a training's settings."""
    settings = {
        "epochs": or_none(POSITIVE),
        "momentum": SHARE,
        "weight_decay": NOT_NEGATIVE,
        "batch_size": [*COUNT, 101],
        "evaluate_every": or_none(COUNT),
    }
    return settings | values


FRAME = pd.DataFrame({"x": [1]})
CHART = altair.Chart(FRAME).mark_point().encode(x="x:Q")
CHANNELS = {"in_channels": COUNT, "classes": COUNT}
KERNELS = [*COUNTS, (), (2, 2)]
SEARCH = {"min_budget": 1, "max_budget": 3, "trials": 1, "space": ConfigurationSpace({"x": (0, 9)})}

CASES = {
    "data.load": ({"name": "digits", "device": "cpu", "subset": 50}, {"subset": or_none(COUNT)}),
    "data.ImageData.subset": ({"self": DIGITS, "n": 50}, {"n": [*COUNT, 9, 91, 101], "seed": SEED}),
    "data.ImageData.hold_out": ({"self": DIGITS, "n": 50}, {"n": [*COUNT, 9, 91], "seed": SEED}),
    "data.ImageData.folds": ({"self": DIGITS}, {"k": [*COUNT, 1, 99], "seed": SEED}),
    "data.augment": (
        {"images": IMAGES, "crop": 0, "cutout": 2},
        {"crop": NOT_NEGATIVE_COUNT, "cutout": NOT_NEGATIVE_COUNT},
    ),
    "data.mixup": (
        {"images": IMAGES, "labels": LABELS, "alpha": 1, "classes": 2},
        {"alpha": NOT_NEGATIVE, "classes": COUNT},
    ),
    "device.seconds_per_call": ({"call": int, "device": CPU, "repeats": 1}, {"repeats": COUNT}),
    "record.run_experiment": (
        {"address": "00_training/baseline", "profile": "standard", "limit_seconds": 0},
        {"workers": COUNT, "limit_seconds": or_none(NOT_NEGATIVE)},
    ),
    "interactive.interactive": (
        {"chart": CHART, "title": "", "alt": "", "says": "", "table": FRAME, "number": 1},
        {"number": COUNT},
    ),
    "networks.ConvLayer": (
        {"in_channels": 1, "out_channels": 2},
        {"in_channels": COUNT, "out_channels": COUNT},
    ),
    "networks.ConvNet": (
        {"channels": (2, 2), "neurons": (3,)},
        CHANNELS | {"channels": [*COUNTS, ()], "neurons": COUNTS, "image_size": [*COUNT, 3]},
    ),
    "networks.ResidualBlock": (
        {"in_channels": 2, "out_channels": 2, "stride": 1, "kernels": (3, 3)},
        {"in_channels": COUNT, "out_channels": COUNT, "stride": COUNT, "kernels": KERNELS},
    ),
    "networks.WideResNet": (
        {"depth": 10, "width": 1},
        CHANNELS | {"depth": [*COUNT, 4, 11], "width": COUNT, "kernels": KERNELS},
    ),
    "networks.network_cost": (
        {"model": small(), "image_shape": (1, 8, 8), "batch_size": 2},
        {"image_shape": [(1, 8, value) for value in COUNT], "batch_size": COUNT},
    ),
    "plots.new_figure": (
        {"rows": 1, "columns": 2, "size": (5, 3)},
        {
            "rows": COUNT,
            "columns": COUNT,
            "size": [3, LONG, *((5.4, value) for value in POSITIVE)],
        },
    ),
    "plots.mean_interval": ({"values": [1, 2], "level": 0.9}, {"values": [], "level": SHARE}),
    "plots.spread": (
        {"values": [1, 2], "scale": -100, "digits": 0},
        {"values": [], "scale": NO_NUMBER, "digits": NOT_NEGATIVE_COUNT},
    ),
    "record.deadline_of": ({"limit_seconds": 0}, {"limit_seconds": or_none(NOT_NEGATIVE)}),
    "record.open_lanes": ({"workers": 1, "scheduler": None}, {"workers": or_none(COUNT)}),
    "search.Evaluator": (
        {"evaluate": zero},
        {
            "evaluate": [3, None, LONG],
            "total": [value for value in POSITIVE if value != math.inf],
            "limit_seconds": or_none(POSITIVE),
            "workers": [*COUNT, 10**6],
        },
    ),
    "search.Evaluator.of": (
        {"evaluate": Evaluator(zero), "total": 3},
        {"total": [value for value in POSITIVE if value != math.inf]},
    ),
    "search.Evaluator.start": (
        {"self": Evaluator(zero), "config": {}, "budget": 1},
        {"budget": POSITIVE},
    ),
    "search.smac_search": (
        SEARCH | {"evaluate": zero},
        {
            "min_budget": [*POSITIVE, 4],
            "max_budget": [*POSITIVE, 0.5, 1e9],
            "eta": [*POSITIVE, 1, 0.5, 1.0000001],
            "total": or_none(POSITIVE),
            "trials": COUNT,
            "seed": SEED,
            "workers": COUNT,
            "limit_seconds": or_none(POSITIVE),
        },
    ),
    "train.SGDR": ({}, {"period": [*POSITIVE, 1e-9], "factor": [*POSITIVE, 0.5]}),
    "train.fit": (
        {"model": small(), "data": DIGITS, "epochs": 1, "batch_size": 50, "number_format": PLAIN},
        changed(
            steps=or_none([*COUNT]),
            seconds=or_none(POSITIVE),
            lr=POSITIVE,
            mixup=NOT_NEGATIVE,
            seed=SEED,
        ),
    ),
    "train.evaluate": ({"model": small(), "data": DIGITS}, {"batch_size": COUNT}),
}

OF_ROWS = "of recorded rows, where nan stands for what is missing"
IN_EVERY_STEP = "called in every training step"
EXEMPT = {
    "networks.SubsampledConv2d": "is made of a convolution that exists",
    "train.constant": IN_EVERY_STEP,
    "train.cosine": IN_EVERY_STEP,
    "checks.number": "it is the check",
    "checks.positive": "it is the check",
    "checks.whole": "it is the check",
    "cli.run_one": "it hands its arguments on to record.run_experiment",
    "cli.record": "it hands its arguments on to record.record",
    "record.record": "it hands its arguments on to deadline_of and open_lanes",
    "evidence.exact": OF_ROWS,
    "evidence.level": OF_ROWS,
    "evidence.needed": OF_ROWS,
    "experiments.describe_row": "a time that was measured",
    "plots.diagram": "Matplotlib refuses places that are no numbers",
    "plots.dots_by_group": OF_ROWS,
    "progress.ProgressBar": IN_EVERY_STEP,
    "progress.ProgressBar.update": IN_EVERY_STEP,
} | dict.fromkeys(
    [
        "record.Run",
        "record.Run.summary",
        "record.Work.learn",
        "record.forecast",
        "workers.Here.each",
        "workers.Processes",
        "workers.Processes.keep",
        "workers.environment",
    ],
    "part of a run, whose arguments are refused before it begins",
)
