import functools

import pytest
import torch

from jahs_utils import load
from jahs_utils.networks import ConvNet
from jahs_utils.populations import Member, fit_population
from jahs_utils.train import fit

BUILD = functools.partial(ConvNet, (8, 16), image_size=8)


@pytest.fixture(scope="module")
def members():
    folds = load("digits", device="cpu").subset(1200).folds(3)
    return [Member(fold, lr, seed) for seed, (fold, lr) in enumerate(zip(folds, (0.02, 0.05, 0.1)))]


@pytest.fixture(scope="module")
def alone(members):
    networks = []
    for member in members:
        torch.manual_seed(member.seed)
        network = BUILD()
        history = fit(
            network, member.data, epochs=1, lr=member.lr, seed=member.seed, evaluate_every=None
        )
        networks.append((network, history))
    return networks


@pytest.mark.parametrize("mode", ["one_by_one", "together", "processes"])
def test_every_mode_trains_the_networks_that_fit_trains(mode, members, alone):
    for (network, history), (expected, wanted) in zip(
        fit_population(BUILD, members, epochs=1, mode=mode), alone
    ):
        for (name, value), reference in zip(
            network.state_dict().items(), expected.state_dict().values()
        ):
            torch.testing.assert_close(value, reference, rtol=2e-3, atol=2e-4, msg=name)
        assert history.final("train_loss") == pytest.approx(wanted.final("train_loss"), rel=1e-3)
        assert history.final("lr") == pytest.approx(wanted.final("lr"))
        assert history.stopped == wanted.stopped == "epochs"


def test_auto_on_a_cpu_is_bit_for_bit_what_fit_does(members, alone):
    for (network, _), (expected, _) in zip(fit_population(BUILD, members, epochs=1), alone):
        for value, reference in zip(network.parameters(), expected.parameters()):
            assert torch.equal(value, reference)


def test_a_member_that_diverges_does_not_take_the_others_along(members):
    wild = Member(members[0].data, 1e12, 0)
    (_, lost), (network, kept) = fit_population(
        BUILD, [wild, members[1]], epochs=1, momentum=0.0, mode="together"
    )
    assert "not finite" in lost.stopped
    assert kept.completed
    assert all(p.isfinite().all() for p in network.parameters())


def test_members_of_different_size_are_refused(members):
    smaller = Member(members[0].data.subset(500), 0.1, 0)
    with pytest.raises(ValueError, match="training sets of one shape"):
        fit_population(BUILD, [members[0], smaller], epochs=1)


def test_an_unknown_mode_names_the_choices(members):
    with pytest.raises(ValueError, match="one_by_one, together, processes"):
        fit_population(BUILD, members, epochs=1, mode="parallel")


def test_an_empty_population_is_refused():
    with pytest.raises(ValueError, match=r"number of members must be .* at least 1, got 0"):
        fit_population(BUILD, [], epochs=1)
