"""Networks trained as one module are the networks that `fit` trains alone."""

import functools
import sys
from pathlib import Path

import pytest
import torch

from jahs_utils import load
from jahs_utils.device import NumberFormat
from jahs_utils.networks import ConvNet
from jahs_utils.train import evaluate, fit

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from together import Together, loss_together

BUILD = functools.partial(ConvNet, (8, 16), image_size=8)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def networks() -> list[ConvNet]:
    torch.manual_seed(0)
    return [BUILD() for _ in range(3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_networks_trained_together_are_those_trained_alone(channels_last, device):
    data, form = load("digits", device=device, subset=1000), NumberFormat("float32", channels_last)
    how = {"epochs": 1, "lr": 0.05, "number_format": form, "evaluate_every": None}
    how["capture"] = device == "cuda"
    five, alone = Together(networks()), networks()
    fit(five, data, loss=loss_together, **how)
    for member, network in zip(five.members(BUILD), alone):
        fit(network, data, **how)
        for (name, value), p in zip(network.state_dict().items(), member.state_dict().values()):
            torch.testing.assert_close(p.to(device), value, rtol=2e-3, atol=2e-4, msg=name)
        scores = [evaluate(n, data, number_format=form).loss for n in (member, network)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-3)
