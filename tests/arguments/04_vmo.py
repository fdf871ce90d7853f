"""Exported functions of chapter 04 with numbers: a good call, and what is refused in its place.

Read by `tests/test_arguments.py`, which says what the tables mean.
"""

import torch
from bad_values import COUNT, NOT_NEGATIVE, NOT_NEGATIVE_COUNT, POSITIVE, SEED

from jahs_utils import load, load_chapter
from jahs_utils.networks import ConvNet, WideResNet

chapter = load_chapter("04_vmo")
DIGITS = load("digits", device="cpu", subset=100)
LOGITS, NOISE = torch.zeros(3), torch.full((4, 3), 0.5)
BOTH = torch.full((2, 4, 3), 0.5)
NO_REAL = [value for value in POSITIVE if value not in (0, -1)]  # any finite number will do


def objective(choice: torch.Tensor) -> torch.Tensor:
    return (choice.sum(-1) - choice[..., 0]) ** 2


def convnet() -> ConvNet:
    return ConvNet((2, 3), (), 1, 10, 8)


def supernet() -> torch.nn.Module:
    return chapter.of_convnet(convnet(), 8)


def masked_block() -> torch.nn.Module:
    return chapter.of_wide_resnet(WideResNet(10, 1), 8).blocks[0]


ESTIMATED = {"objective": objective, "logits": LOGITS, "u": NOISE}
SURROGATE = {"surrogate": chapter.Surrogate(objective, LOGITS.shape), "objective": objective}
WRONG_WIDTHS = [[value, 1] for value in COUNT] + [[1], [9, 1]]

CASES = {
    "check_sampling": (
        {"logits": LOGITS, "u": NOISE, "temperature": 0.5},
        {"temperature": POSITIVE},
    ),
    "sample_concrete": (
        {"logits": LOGITS, "temperature": 0.5, "u": NOISE},
        {"temperature": POSITIVE},
    ),
    "score_function": (
        ESTIMATED | {"baseline": 0.3},
        {"baseline": [float("nan"), float("inf"), -float("inf")]},
    ),
    "concrete_gradient": (ESTIMATED | {"temperature": 0.5}, {"temperature": POSITIVE}),
    "straight_through": (ESTIMATED | {"temperature": 0.5}, {"temperature": POSITIVE}),
    "rebar": (
        ESTIMATED | {"v": NOISE, "temperature": 0.5, "strength": 1.0},
        {"temperature": POSITIVE, "strength": NO_REAL},
    ),
    "tune_surrogate": (
        SURROGATE | {"logits": LOGITS, "steps": 1, "samples": 2, "generator": torch.Generator()},
        {"steps": NOT_NEGATIVE_COUNT, "samples": COUNT},
    ),
    "MaskedLayer": ({"layer": convnet().layers[0], "side": 8}, {"side": COUNT}),
    "MaskedLayer.cut": (
        {"self": supernet().blocks[0], "given": 1, "width": 2},
        {"given": COUNT, "width": COUNT},
    ),
    "MaskedBlock": ({"block": WideResNet(10, 1).blocks[0], "side": 8}, {"side": COUNT}),
    "MaskedBlock.cut": (
        {"self": masked_block(), "given": 16, "width": 2},
        {"given": COUNT, "width": COUNT},
    ),
    "cut_conv": (
        {"conv": torch.nn.Conv2d(4, 4, 3), "given": 2, "width": 2},
        {"given": COUNT, "width": COUNT},
    ),
    "cut_norm": ({"norm": torch.nn.BatchNorm2d(4), "width": 2}, {"width": COUNT}),
    "Head": (
        {"channels": 4, "classes": 3, "norm": True},
        {"channels": COUNT, "classes": COUNT},
    ),
    "Head.cut": ({"self": chapter.Head(4, 3, norm=False), "channels": 2}, {"channels": COUNT}),
    "cut_out": (
        {"net": supernet(), "depth": 2, "widths": [1, 1]},
        {"depth": [*COUNT, 3], "widths": WRONG_WIDTHS},
    ),
    "Choice": ({"sizes": 4, "speed": 3.0}, {"sizes": COUNT, "speed": POSITIVE}),
    "Choices": (
        {"net": supernet(), "depth": True, "width": True, "speed": 3.0},
        {"speed": POSITIVE},
    ),
    "JointVMO": (
        {"net": supernet(), "gamma_depth": 0.1, "gamma_width": 0.1, "speed": 3.0},
        {"gamma_depth": NOT_NEGATIVE, "gamma_width": NOT_NEGATIVE, "speed": POSITIVE},
    ),
    "of_convnet": ({"network": convnet(), "image_size": 8}, {"image_size": COUNT}),
    "of_wide_resnet": ({"network": WideResNet(10, 1), "image_size": 8}, {"image_size": COUNT}),
    "Anneal": (
        {"first": 0.1, "last": 0.001, "looks": 5},
        {"first": POSITIVE, "last": POSITIVE, "looks": COUNT},
    ),
    "Anneal.temperature": (
        {"self": chapter.Anneal(), "fraction": 0.5},
        {"fraction": NOT_NEGATIVE},
    ),
    "make_network": (
        {"model": "convnet", "data": DIGITS, "sizes": [2, 3]},
        {"sizes": [[value] for value in COUNT] + [5, None]},
    ),
    "fit_widths": (
        {"net": supernet(), "shares": torch.ones(2).numpy(), "target": 30},
        {"target": POSITIVE},
    ),
    "start_afresh": ({"network": convnet(), "seed": 3}, {"seed": SEED}),
    "small_problem": (
        {"data": "digits", "width": 2, "epochs": 0.05, "batch": 8, "seed": 0},
        {"width": COUNT, "epochs": POSITIVE, "batch": COUNT, "seed": SEED},
    ),
    "estimate": (
        {
            "name": "concrete",
            "objective": objective,
            "logits": LOGITS,
            "noise": BOTH,
            "temperature": 0.5,
        },
        {"temperature": POSITIVE},
    ),
    "variants_grid": (
        {"shared": {"data": "digits"}, "epochs": 1, "seeds": 2},
        {"epochs": POSITIVE, "seeds": COUNT},
    ),
    "questions_of_the_paper": (
        {"shared": {"data": "digits"}, "epochs": 1, "seeds": 2},
        {"epochs": POSITIVE, "seeds": COUNT},
    ),
    "overhead_grid": (
        {"networks": [{"model": "convnet", "sizes": [[2]]}], "shared": {}, "steps": 2},
        {"steps": COUNT},
    ),
    "gradients_grid": (
        {"estimators": ["rebar"], "samples": 20, "seeds": [0]},
        {"samples": COUNT, "seeds": [[value] for value in SEED]},
    ),
}

EXEMPT = {
    "relax": "its temperature may be a tensor that is trained; its callers refuse",
    "DepthVMO": "hands its options to JointVMO",
    "WidthVMO": "hands its options to JointVMO",
    "make_vmo": "hands its sizes to make_network and its options to JointVMO",
}
