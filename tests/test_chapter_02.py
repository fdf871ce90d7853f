"""The exported code of chapters/02_north_select.ipynb."""

import functools
import inspect
import itertools
import json
import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from properties import SEEDS, few
from scipy import stats
from sklearn.model_selection import StratifiedKFold
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW
from test_grids import grids_of

from jahs_utils import fit, load, load_chapter
from jahs_utils.device import cache_folder
from jahs_utils.experiments import Results, describe_row, results_path
from jahs_utils.networks import ConvNet, count_parameters, network_cost
from jahs_utils.search import smac_search
from jahs_utils.train import SGDR, Callback, Training

chapter = load_chapter("02_north_select")
NAN, INF = math.nan, math.inf
MINI = "fashion_mnist_mini"


def many() -> settings:
    return few(100)


def random_matrix(seed: int, samples: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(samples, columns))


def orthonormal(seed: int, samples: int, columns: int) -> np.ndarray:
    return np.linalg.qr(random_matrix(seed, samples, columns))[0]


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(array, dtype=dtype)


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """float32, of any rank and size of numbers, some columns zero or repeated."""
    samples, neurons = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    rank = draw(st.integers(1, neurons))
    rng = np.random.default_rng(draw(SEEDS))
    h = rng.normal(size=(samples, rank)) @ rng.normal(size=(rank, neurons))
    if draw(st.booleans()):
        h = np.maximum(h, 0)
    columns = st.lists(st.integers(0, neurons - 1), max_size=3)
    h[:, draw(columns)] = 0
    repeated = draw(columns)
    h[:, repeated] = h[:, rng.integers(0, neurons, len(repeated))]
    return (h * 10.0 ** draw(st.integers(-20, 20))).astype(np.float32)


def svd(h: np.ndarray) -> np.ndarray:
    return np.linalg.svd(h.astype(np.float64), compute_uv=False)


# --- ranks ----------------------------------------------------------------------------------------


@given(matrices())
@many()
def test_singular_values_are_those_of_numpy_in_float64(h):
    expected = svd(h)
    found = chapter.singular_values(torch.from_numpy(h)).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * expected[0])


@given(matrices())
@many()
def test_singular_values_of_float64_are_those_of_numpy_to_its_last_digits(h):
    expected = svd(h)
    found = chapter.singular_values(tensor(h)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * expected[0])


def test_many_samples_of_one_direction_have_one_singular_value():
    h = np.abs(random_matrix(0, 50_000, 1) @ random_matrix(1, 1, 32)).astype(np.float32)
    found = chapter.singular_values(torch.from_numpy(h)).numpy()
    np.testing.assert_allclose(found, svd(h), rtol=0, atol=1e-7 * svd(h)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_of_zero_have_singular_values_of_zero(dtype):
    assert chapter.singular_values(torch.zeros(5, 3, dtype=dtype)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", ["singular_values", "epsilon_rank", "erank"])
def test_activations_that_are_not_finite_are_refused_with_their_place(function, dtype, value):
    h = torch.ones(5, 3, dtype=dtype)
    h[2, 1] = value
    with pytest.raises(ValueError, match=f"not finite: {value} in sample 2, neuron 1"):
        getattr(chapter, function)(h)


@pytest.mark.parametrize("shape", [(5,), (0, 3), (5, 0), (2, 3, 4), ()])
@pytest.mark.parametrize("function", ["singular_values", "epsilon_rank", "erank"])
def test_activations_that_are_no_matrix_are_refused_with_their_shape(function, shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        getattr(chapter, function)(torch.ones(shape))


@given(matrices())
@many()
def test_erank_is_the_exponential_of_scipys_entropy(h):
    sigma = svd(h)
    expected = np.exp(stats.entropy(sigma)) if sigma.any() else 0
    assert chapter.erank(torch.from_numpy(h)) == pytest.approx(expected, rel=1e-5)
    assert chapter.erank(tensor(h)) == pytest.approx(expected, rel=1e-9)


@given(matrices())
@many()
def test_erank_is_from_1_to_the_smaller_side_of_the_matrix(h):
    assume(h.any())
    assert 1 - 1e-9 <= chapter.erank(torch.from_numpy(h)) <= min(h.shape) * (1 + 1e-9)


@given(SEEDS, st.integers(1, 30), st.integers(1, 10))
def test_erank_of_one_direction_is_1(seed, samples, neurons):
    h = np.outer(random_matrix(seed, samples, 1), random_matrix(seed + 1, neurons, 1))
    assert chapter.erank(tensor(h)) == pytest.approx(1, abs=1e-9)
    assert chapter.erank(tensor(h, torch.float32)) == pytest.approx(1, abs=1e-4)


@given(SEEDS, st.integers(1, 10))
def test_erank_of_orthonormal_columns_is_their_number(seed, neurons):
    h = orthonormal(seed, 30, neurons)
    assert chapter.erank(tensor(h)) == pytest.approx(neurons)
    assert chapter.erank(tensor(h, torch.float32)) == pytest.approx(neurons)


def test_erank_of_zero_is_0():
    assert chapter.erank(torch.zeros(5, 3)) == 0


@given(SEEDS, st.sampled_from([1e-30, 1e-3, 7.0, 1e30]))
def test_erank_does_not_depend_on_scale(seed, scale):
    h = np.maximum(random_matrix(seed, 30, 6), 0)
    expected = chapter.erank(tensor(h))
    assert chapter.erank(tensor(h * scale)) == pytest.approx(expected)
    assert chapter.erank(tensor(h * scale, torch.float32)) == pytest.approx(expected, rel=1e-5)


@given(SEEDS)
def test_erank_does_not_change_by_rotations_of_samples_and_neurons(seed):
    h = np.maximum(random_matrix(seed, 20, 6), 0)
    rotated = orthonormal(seed + 1, 20, 20) @ h @ orthonormal(seed + 2, 6, 6)
    assert chapter.erank(tensor(rotated)) == pytest.approx(chapter.erank(tensor(h)))


@given(SEEDS, st.floats(0.01, 1))
def test_where_the_epsilon_rank_jumps_erank_hardly_changes(seed, epsilon):
    u, v = orthonormal(seed, 25, 4), orthonormal(seed + 1, 4, 4)

    def of(last: float) -> torch.Tensor:
        """Activations whose last singular value over sqrt(samples) is `last` epsilons."""
        return tensor(5 * u @ np.diag([2, 2, 2, last * epsilon]) @ v)

    below, above = of(1 - 1e-6), of(1 + 1e-6)
    ranks = [chapter.epsilon_rank(h, epsilon) for h in (below, above)]
    assert ranks == [3, 4]
    assert chapter.erank(above) == pytest.approx(chapter.erank(below), abs=1e-4)


@given(matrices(), st.floats(0.001, 10))
@many()
def test_epsilon_rank_is_numpys_count(h, epsilon):
    h = h / (np.abs(h).max() or 1)
    sigma = svd(h) / math.sqrt(len(h))
    assume(np.abs(sigma - epsilon).min() > 1e-6)
    assert chapter.epsilon_rank(torch.from_numpy(h), epsilon) == np.sum(sigma > epsilon)


def test_epsilon_is_a_tenth_unless_given():
    assert chapter.epsilon_rank(torch.diag(torch.tensor([0.21, 0.25, 0.19, 0.0]))) == 2


def test_epsilon_rank_depends_on_scale_where_erank_does_not():
    h = tensor(5 * orthonormal(0, 25, 4))
    assert [chapter.epsilon_rank(c * h) for c in (1, 0.01)] == [4, 0]
    assert [chapter.erank(c * h) for c in (1, 0.01)] == pytest.approx([4, 4])


@given(SEEDS, st.floats(0.1, 1.5))
def test_samples_that_are_repeated_do_not_count(seed, epsilon):
    h = random_matrix(seed, 15, 5)
    assume(np.abs(svd(h) / math.sqrt(15) - epsilon).min() > 1e-9)
    once, twice = tensor(h), tensor(np.concatenate([h, h]))
    assert chapter.epsilon_rank(twice, epsilon) == chapter.epsilon_rank(once, epsilon)
    assert chapter.erank(twice) == pytest.approx(chapter.erank(once))


@pytest.mark.parametrize("epsilon", [0, -0.1, NAN, INF])
def test_an_epsilon_that_cannot_be_is_refused(epsilon):
    with pytest.raises(ValueError, match=f"epsilon must be .*{epsilon}"):
        chapter.epsilon_rank(torch.ones(2, 2), epsilon)


# --- how many neurons -----------------------------------------------------------------------------


@given(st.integers(0, 100_000), st.integers(1, 1000), st.integers(0, 1000))
def test_equation_4_is_exact(r, n, q):
    exact = (Fraction(r, 100_000) - Fraction(q, 1000)) * n
    assert chapter.neurons_to_add(r / 100_000, n, q / 1000) == max(0, math.ceil(exact))


def test_a_hundredth_of_100_neurons_is_1_neuron():
    assert chapter.neurons_to_add(0.81, 100, 0.8) == 1


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_threshold_1_never_grows(r, n):
    assert chapter.neurons_to_add(r, n, 1) == 0


@pytest.mark.parametrize("q", [0, 0.5, 1])
def test_a_relative_erank_that_exceeds_1_by_rounding_is_1(q):
    assert chapter.neurons_to_add(1 + 1e-7, 1000, q) == chapter.neurons_to_add(1.0, 1000, q)


@given(st.floats(0, 1), st.integers(1, 500), st.floats(0, 1), st.floats(0, 1))
def test_a_lower_threshold_asks_for_at_least_as_many(r, n, a, b):
    low, high = sorted([a, b])
    assert chapter.neurons_to_add(r, n, low) >= chapter.neurons_to_add(r, n, high)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0.5, 8, -0.1), "-0.1"),
        ((0.5, 8, 1.1), "1.1"),
        ((0.5, 8, NAN), "nan"),
        ((NAN, 8, 0.5), "nan"),
        ((1.01, 8, 0.5), "1.01"),
        ((-0.01, 8, 0.5), "-0.01"),
        ((0.5, 0, 0.5), "0"),
        ((0.5, -3, 0.5), "-3"),
    ],
)
def test_what_equation_4_cannot_take_is_refused(arguments, named):
    with pytest.raises(ValueError, match=f"got {re.escape(named)}$"):
        chapter.neurons_to_add(*arguments)


@given(st.integers(0, 100), st.integers(0, 50), st.integers(1, 100), st.integers(1, 50), st.data())
def test_equation_2_is_exact(rank, first_rank, n, n_first, data):
    gamma = data.draw(st.integers(1, 120))
    exact = rank - Fraction(gamma, 100) * n / n_first * first_rank
    found = chapter.neurons_to_add_epsilon(rank, first_rank, n, n_first, gamma / 100)
    assert found == max(0, math.floor(exact))


@pytest.mark.parametrize("gamma", [0.88, 0.9, 0.95, 0.99, 1.0])
def test_8_neurons_of_full_rank_never_grow_by_equation_2(gamma):
    assert chapter.neurons_to_add_epsilon(8, 8, 8, 8, gamma) == 0


def test_16_neurons_of_full_rank_grow_by_1_by_equation_2():
    assert chapter.neurons_to_add_epsilon(16, 16, 16, 16) == 1


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((8, 8, 0, 8), "n must .* 0"),
        ((8, 8, -2, 8), "n must .* -2"),
        ((8, 8, 8, 0), "n_first must .* 0"),
        ((8, 8, 8, 8, 0), "gamma must .* 0"),
        ((8, 8, 8, 8, NAN), "gamma must .* nan"),
    ],
)
def test_what_equation_2_cannot_take_is_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        chapter.neurons_to_add_epsilon(*arguments)


# --- which neurons --------------------------------------------------------------------------------


def numpy_residuals(h: np.ndarray, new: np.ndarray) -> np.ndarray:
    h, new = h.astype(np.float64), new.astype(np.float64)
    return np.linalg.norm(new - h @ np.linalg.lstsq(h, new, rcond=1e-6)[0], axis=0)


def assert_residuals_agree(h: np.ndarray, new: np.ndarray) -> None:
    """To 1e-7 of the candidate's length."""
    found = chapter.residuals(torch.from_numpy(h), torch.from_numpy(new)).numpy()
    lengths = np.linalg.norm(new.astype(np.float64), axis=0)
    assert np.all(np.abs(found - numpy_residuals(h, new)) <= 1e-7 * lengths)


@pytest.mark.parametrize("weakest", [1e-1, 1e-3, 1e-5])
def test_residuals_are_right_along_directions_that_hardly_exist(weakest):
    u, v = orthonormal(0, 200, 6), orthonormal(1, 6, 6)
    h = u @ np.diag([1, 1, 1, 1, 1, weakest]) @ v.T
    assert_residuals_agree(h, np.hstack([u[:, -1:], random_matrix(2, 200, 3)]))


@pytest.mark.parametrize("score", ["residual", "rank", "random"])
@pytest.mark.parametrize(
    ("h", "what"),
    [
        (torch.full((3, 2), NAN), "not finite: nan in sample 0, neuron 0"),
        (torch.ones(4, 2), r"as many samples each, got \(4, 2\) and \(3, 5\)"),
        (torch.full((3, 2), 1e200, dtype=torch.float64), "too large to be squared: 1e\\+200"),
    ],
)
def test_every_score_refuses_activations_it_cannot_compare(score, h, what):
    with pytest.raises(ValueError, match=what):
        chapter.select_candidates(h, torch.ones(3, 5), 2, score)


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Activations with duplicated, dead and dependent neurons; candidates inside and outside."""
    neurons = draw(st.integers(1, 8))
    samples = draw(st.sampled_from([3, 60]))
    h = np.maximum(random_matrix(draw(SEEDS), samples, neurons), 0)
    for kind in draw(st.lists(st.sampled_from(["duplicate", "dead", "dependent"]), max_size=3)):
        column = {
            "duplicate": h[:, :1],
            "dead": np.zeros((samples, 1)),
            "dependent": h.sum(1, keepdims=True),
        }[kind]
        h = np.concatenate([h, column], axis=1)
    new = np.maximum(random_matrix(draw(SEEDS), samples, 3), 0)
    inside = h @ random_matrix(draw(SEEDS), h.shape[1], 2)
    new = np.concatenate([new, inside, np.zeros((samples, 1))], axis=1)
    scale = 10.0 ** draw(st.integers(-10, 10))
    return (h * scale).astype(np.float32), new.astype(np.float32)


@given(layers())
@many()
def test_residuals_are_those_of_numpys_least_squares(layer):
    h, new = layer
    sigma = svd(h)
    assume(not np.any((sigma > 3e-7 * sigma[0]) & (sigma < 1e-5 * sigma[0])))
    assert_residuals_agree(h, new)


@given(SEEDS, st.integers(1, 8))
def test_residuals_of_independent_neurons_are_those_of_the_pseudoinverse(seed, neurons):
    h, new = random_matrix(seed, 40, neurons), random_matrix(seed + 1, 40, 5)
    expected = np.linalg.norm(new - h @ np.linalg.pinv(h) @ new, axis=0)
    found = chapter.residuals(tensor(h), tensor(new)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("samples", [511, 512, 513, 1300])
def test_any_number_of_samples_is_counted_whole(samples):
    h, new = random_matrix(0, samples, 4), random_matrix(1, samples, 3)
    found = chapter.residuals(tensor(h), tensor(new)).numpy()
    np.testing.assert_allclose(found, numpy_residuals(h, new), rtol=1e-9)
    found = chapter.rank_scores(tensor(h), tensor(new)).numpy()
    np.testing.assert_allclose(found, numpy_rank_scores(h, new), rtol=1e-9)


@given(SEEDS, st.integers(1, 8))
def test_what_the_layer_can_reconstruct_has_no_residual(seed, neurons):
    h = random_matrix(seed, 40, neurons)
    new = h @ random_matrix(seed + 1, neurons, 4)
    found = chapter.residuals(tensor(h), tensor(new), normalised=True)
    assert found.max() < 1e-6


@given(SEEDS, st.integers(1, 8))
def test_the_residual_of_what_is_orthogonal_is_its_own_length(seed, neurons):
    basis = orthonormal(seed, 40, neurons + 3)
    h = tensor(basis[:, :neurons] @ random_matrix(seed, neurons, neurons))
    new = tensor(basis[:, neurons:] * [1e-3, 1, 50])
    assert chapter.residuals(h, new).tolist() == pytest.approx([1e-3, 1, 50])
    assert chapter.residuals(h, new, normalised=True).tolist() == pytest.approx([1, 1, 1])


@given(layers(), st.sampled_from([1e-20, 1e-3, 1e20]))
@many()
def test_normalised_residuals_are_shares_that_scale_does_not_change(layer, scale):
    h, new = map(tensor, layer)
    shares = chapter.residuals(h, new, normalised=True)
    assert ((shares >= 0) & (shares <= 1 + 1e-12)).all()
    scaled = chapter.residuals(h, scale * new, normalised=True)
    torch.testing.assert_close(scaled, shares, rtol=0, atol=1e-6)


@given(layers())
@few(30)
def test_a_candidate_of_zeros_has_the_share_zero(layer):
    h, new = map(torch.from_numpy, layer)
    assert chapter.residuals(h, new, normalised=True)[-1] == 0


def test_a_layer_without_any_activation_reconstructs_nothing():
    new = random_matrix(0, 20, 3)
    found = chapter.residuals(torch.zeros(20, 4), tensor(new)).numpy()
    np.testing.assert_allclose(found, np.linalg.norm(new, axis=0))


@pytest.mark.parametrize(("strength", "residual"), [(1e-3, 0.0), (1e-8, 1.0)])
def test_directions_below_a_millionth_of_the_largest_count_as_absent(strength, residual):
    basis = orthonormal(0, 40, 3)
    h = tensor(basis * [1, 1, strength])
    found = chapter.residuals(h, tensor(basis[:, 2:]))
    assert found.item() == pytest.approx(residual, abs=1e-3)


@given(SEEDS, st.integers(1, 6), st.sampled_from([0.01, 0.3, 1.0]))
@many()
def test_rank_scores_are_one_svd_for_each_candidate(seed, neurons, epsilon):
    h = np.maximum(random_matrix(seed, 30, neurons), 0)
    h = np.concatenate([h, h[:, :1]], axis=1)
    new = np.concatenate([random_matrix(seed + 1, 30, 4), h[:, :1], 0 * h[:, :1]], axis=1)
    expected = []
    for candidate in new.T:
        sigma = svd(np.column_stack([h, candidate])) / math.sqrt(30)
        assume(np.abs(sigma - epsilon).min() > 1e-6)
        expected.append(np.sum(sigma > epsilon) + sigma.sum())
    found = chapter.rank_scores(tensor(h), tensor(new), epsilon).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_rank_scores_count_from_a_hundredth_unless_told():
    new = torch.diag(torch.tensor([0.0, 0.019, 0.021, 0.0]))[:, 1:3]  # over sqrt(4): 0.0095, 0.0105
    h = torch.tensor([[2.0], [0], [0], [0]])
    assert chapter.rank_scores(h, new).floor().tolist() == [2, 3]


@pytest.mark.parametrize("epsilon", [0, -1, NAN])
def test_rank_scores_refuse_an_epsilon_that_cannot_be(epsilon):
    with pytest.raises(ValueError, match=f"epsilon must be .*{epsilon}"):
        chapter.rank_scores(torch.ones(3, 2), torch.ones(3, 1), epsilon)


def numpy_rank_scores(h: np.ndarray, new: np.ndarray) -> np.ndarray:
    spectra = [svd(np.column_stack([h, c])) / math.sqrt(len(h)) for c in new.T]
    return np.array([np.sum(s > 0.01) + s.sum() for s in spectra])


REFERENCES = {
    "residual": numpy_residuals,
    "normalised": lambda h, new: numpy_residuals(h, new) / np.linalg.norm(new, axis=0),
    "rank": numpy_rank_scores,
    "least": lambda h, new: -numpy_residuals(h, new),
    "random": lambda h, new: -np.arange(new.shape[1]),
}


def test_every_score_has_a_reference():
    assert set(chapter.SCORES) == set(REFERENCES)


@pytest.mark.parametrize("score", REFERENCES)
@given(seed=SEEDS, k=st.integers(1, 9))
@few(25)
def test_the_best_candidates_are_chosen_in_order(score, seed, k):
    h = np.maximum(random_matrix(seed, 40, 5), 0)
    new = random_matrix(seed + 1, 40, 9) * np.linspace(0.5, 2, 9)
    values = REFERENCES[score](h, new)
    assume(np.diff(np.sort(values)).min() > 1e-6)
    chosen = chapter.select_candidates(tensor(h), tensor(new), k, score)
    assert chosen.tolist() == np.argsort(-values)[:k].tolist()


def test_candidates_are_chosen_by_their_residuals_unless_told():
    h, new = tensor(random_matrix(0, 40, 5)), tensor(random_matrix(1, 40, 9))
    chosen = chapter.select_candidates(h, new, 4)
    assert chosen.tolist() == chapter.select_candidates(h, new, 4, "residual").tolist()


@pytest.mark.parametrize("k", [0, -1, 10, NAN])
def test_as_many_candidates_as_there_are_not_are_refused(k):
    h, new = torch.ones(6, 2), torch.ones(6, 9)
    with pytest.raises(ValueError, match=f"number of candidates, 9, got {k}"):
        chapter.select_candidates(h, new, k)


def test_an_unknown_score_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown score 'residuals'.*residual, normalised"):
        chapter.select_candidates(torch.ones(6, 2), torch.ones(6, 9), 1, "residuals")


COMPARING = ["residual", "normalised", "rank", "least"]


@pytest.mark.parametrize("score", COMPARING)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("of_candidate", [False, True])
def test_scores_of_what_is_not_finite_are_refused_with_the_place(score, value, of_candidate):
    h, new = torch.ones(6, 2), torch.ones(6, 9)
    (new if of_candidate else h)[4, 1] = value
    with pytest.raises(ValueError, match=f"{value} in sample 4, neuron 1"):
        chapter.select_candidates(h, new, 1, score)


@pytest.mark.parametrize("score", COMPARING)
@pytest.mark.parametrize("shapes", [((6, 2), (5, 9)), ((6,), (6, 9)), ((6, 2, 1), (6, 9))])
def test_activations_that_do_not_fit_together_are_refused_with_their_shapes(score, shapes):
    with pytest.raises(ValueError, match=re.escape(f"{shapes[0]} and {shapes[1]}")):
        chapter.select_candidates(*map(torch.ones, shapes), 1, score)


# --- the network ----------------------------------------------------------------------------------


def networks(
    channels: list[int], neurons: list[int], io: tuple[int, int, int], seed: int = 0
) -> Any:
    """A GrowingConvNet whose BatchNorm and biases are not those of the start."""
    torch.manual_seed(seed)
    network = chapter.GrowingConvNet(channels, neurons, *io)
    with torch.no_grad():
        for layer in network.layers:
            layer.norm.weight.uniform_(0.5, 2)
            layer.norm.bias.uniform_(-1, 1)
    return network


@st.composite
def shapes(draw: st.DrawFn) -> dict:
    """Arguments of `networks`."""
    depth = draw(st.integers(1, 3))
    side = draw(st.integers(2**depth, 13))
    widths = st.integers(1, 9)
    return {
        "channels": draw(st.lists(widths, min_size=depth, max_size=depth)),
        "neurons": draw(st.lists(widths, max_size=2)),
        "io": (draw(st.integers(1, 3)), draw(st.integers(2, 5)), side),
        "seed": draw(SEEDS),
    }


def images_for(shape: dict, seed: int, count: int = 5) -> torch.Tensor:
    channels, _, side = shape["io"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, side, side, generator=generator)


class Case:
    """A network after a batch in training mode, and where it grows."""

    def __init__(self, shape: dict, layer: int, count: int, place: str, seed: int) -> None:
        self.shape, self.layer, self.count, self.place = shape, layer, count, place
        self.network, self.x = networks(**shape), images_for(shape, seed)
        self.depth = len(shape["channels"])
        with torch.no_grad():
            self.logits = self.network.train()(self.x)
        self.generator = torch.Generator().manual_seed(seed)

    def __repr__(self) -> str:
        return f"{self.shape}, layer {self.layer} + {self.count}, {self.place}"

    def candidates(self, count: int | None = None) -> Any:
        return chapter.draw_candidates(
            self.network, self.layer, count or self.count, self.generator, self.place
        )

    def grow(self) -> Any:
        new = self.candidates()
        chapter.add_neurons(self.network, self.layer, new)
        return new

    def evaluated(self) -> torch.Tensor:
        with torch.no_grad():
            logits = self.network.eval()(self.x)
        self.network.train()
        return logits

    def trained(self) -> torch.Tensor:
        with torch.no_grad():
            return self.network.train()(self.x)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(shapes())
    layer = draw(st.integers(0, len(shape["channels"]) + len(shape["neurons"]) - 1))
    place = draw(st.sampled_from(chapter.PLACES))
    return Case(shape, layer, draw(st.integers(1, 6)), place, draw(SEEDS))


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@given(shapes(), SEEDS)
@few(30)
def test_a_growing_network_computes_what_a_convnet_computes(shape, seed):
    network, x = networks(**shape), images_for(shape, seed)
    plain = ConvNet(shape["channels"], shape["neurons"], *shape["io"])
    plain.load_state_dict(network.state_dict())
    for mode in (True, False):
        assert torch.equal(network.train(mode)(x), plain.train(mode)(x))


def test_a_growing_network_starts_as_a_convnet_of_the_same_seed():
    torch.manual_seed(3)
    growing = chapter.GrowingConvNet([4, 5], [6], 1, 10, 8)
    torch.manual_seed(3)
    plain = ConvNet([4, 5], [6], 1, 10, 8)
    for name, value in plain.state_dict().items():
        assert torch.equal(growing.state_dict()[name], value), name


@given(shapes(), SEEDS)
@few(30)
def test_the_outputs_kept_are_what_each_layer_is_given_and_gives(shape, seed):
    network, x = networks(**shape), images_for(shape, seed)
    network.train()(x)
    modules = [*network.layers, *network.hidden]
    assert torch.equal(network.outputs[0], x)
    assert len(network.outputs) == len(modules) + 1
    for k, module in enumerate(modules):
        entering = network.outputs[k]
        if isinstance(module, torch.nn.Linear):
            expected = torch.relu(module(entering.flatten(1)))
        else:
            expected = module(entering)
        assert_same(network.outputs[k + 1], expected.detach())


def test_evaluation_leaves_the_outputs_of_the_last_batch():
    case = Case({"channels": [3], "neurons": [], "io": (1, 2, 4)}, 0, 1, "output", 0)
    before = list(case.network.outputs)
    case.network.eval()(case.x + 1)
    assert all(a is b for a, b in zip(case.network.outputs, before))


def test_widths_are_those_of_the_layers_without_the_classifier():
    assert networks([3, 4], [5, 6], (1, 10, 8)).widths == [3, 4, 5, 6]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_every_pixel_is_a_sample(images, channels, height, width):
    x = np.arange(images * channels * height * width, dtype=np.float32)
    x = x.reshape(images, channels, height, width)
    found = chapter.as_matrix(torch.from_numpy(x)).numpy()
    assert np.array_equal(found, x.transpose(0, 2, 3, 1).reshape(-1, channels))


def test_activations_in_half_precision_become_float32():
    assert chapter.as_matrix(torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.float32


def test_activations_before_batchnorm_are_the_rectified_convolution():
    case = Case({"channels": [3, 4], "neurons": [5], "io": (2, 3, 8)}, 1, 1, "output", 0)
    entering = case.network.layers[0](case.x)
    expected = torch.relu(case.network.layers[1].conv(entering)).detach().numpy()
    found = chapter.activations(case.network, 1, "before BatchNorm").numpy()
    expected = expected.transpose(0, 2, 3, 1).reshape(-1, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", chapter.PLACES)
def test_activations_of_a_fully_connected_layer_are_its_output_at_both_places(place):
    case = Case({"channels": [3], "neurons": [5], "io": (1, 3, 4)}, 1, 1, "output", 0)
    assert torch.equal(chapter.activations(case.network, 1, place), case.network.outputs[2])


def test_activations_before_any_batch_are_refused():
    with pytest.raises(ValueError, match="no activations yet: run a batch in training mode"):
        chapter.activations(networks([3], [], (1, 2, 4)), 0)


def test_an_unknown_place_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown place 'input'.*output, before BatchNorm"):
        chapter.activations(networks([3], [], (1, 2, 4)), 0, "input")


# --- surgery --------------------------------------------------------------------------------------


@given(cases())
@few(60)
def test_growth_does_not_change_what_the_network_computes(case):
    in_evaluation = case.evaluated()
    case.grow()
    assert_same(case.evaluated(), in_evaluation)
    assert_same(case.trained(), case.logits)


@given(cases())
@few(60)
def test_outputs_prepared_for_new_neurons_are_what_a_forward_pass_gives(case):
    case.grow()
    prepared = list(case.network.outputs)
    case.trained()
    for before, after in zip(prepared, case.network.outputs, strict=True):
        assert_same(before, after, 1e-4)


@given(cases())
@few(40)
def test_the_activations_of_candidates_are_those_they_have_as_neurons(case):
    new = case.grow()
    case.trained()
    h = chapter.activations(case.network, case.layer, case.place)
    assert_same(new.h, h[:, -case.count :], 1e-4)


@given(cases())
@few(40)
def test_growth_costs_the_parameters_it_says(case):
    before = count_parameters(case.network)
    size = chapter.neuron_size(case.network, case.layer)
    case.grow()
    assert count_parameters(case.network) == before + case.count * size


@given(cases())
@few(40)
def test_growth_widens_one_layer(case):
    expected = case.network.widths
    expected[case.layer] += case.count
    case.grow()
    assert case.network.widths == expected


@given(cases())
@few(40)
def test_a_grown_network_is_a_convnet_of_its_widths(case):
    case.grow()
    widths = case.network.widths
    fresh = ConvNet(widths[: case.depth], widths[case.depth :], *case.shape["io"])
    fresh.load_state_dict(case.network.state_dict())
    assert_same(fresh.eval()(case.x).detach(), case.evaluated())
    assert str(fresh) == str(case.network).replace("GrowingConvNet", "ConvNet")


@given(cases())
@few(40)
def test_new_weights_are_as_long_as_the_old_on_average(case):
    old = case.network.weighted[case.layer].weight.detach().flatten(1).norm(dim=1)
    case.grow()
    weights = case.network.weighted[case.layer].weight.detach().flatten(1)
    new = weights[-case.count :].norm(dim=1)
    assert_same(new, old.mean().expand(case.count))


@given(cases())
@few(40)
def test_the_next_layers_weights_are_the_old_ones_and_zeros(case):
    following = case.network.weighted[case.layer + 1]
    old = following.weight.detach().clone()
    case.grow()
    weight = following.weight.detach()
    width = old.shape[1]
    assert torch.equal(weight[:, :width], old)
    assert weight.shape[1] > width
    assert not weight[:, width:].any()


@pytest.mark.parametrize("layer", range(4))
def test_gradients_reach_the_weights_behind_new_neurons(layer):
    shape = {"channels": [4, 5], "neurons": [6, 7], "io": (2, 3, 8)}
    case = Case(shape, layer, 3, "output", 0)
    following = case.network.weighted[layer + 1]
    width = following.weight.shape[1]
    new = case.grow()
    torch.nn.functional.cross_entropy(case.network.train()(case.x), torch.arange(5) % 3).backward()
    grad = following.weight.grad[:, width:].unflatten(1, (3, -1))
    learning = grad.transpose(0, 1).flatten(1).any(1)
    active = new.outputs.transpose(0, 1).flatten(1).any(1)
    assert learning.tolist() == active.tolist()
    assert active.sum() >= 2


@given(cases())
@few(30)
def test_batchnorm_of_new_channels_has_the_statistics_of_the_last_batch(case):
    assume(case.layer < case.depth)
    case.grow()
    entering = case.network.outputs[case.layer].double()
    layer = case.network.layers[case.layer]
    given_ = torch.conv2d(entering, layer.conv.weight.double(), padding=1).detach().numpy()
    norm, new = layer.norm, slice(-case.count, None)
    mean, var = given_.mean((0, 2, 3))[new], given_.var((0, 2, 3))[new]
    np.testing.assert_allclose(norm.running_mean[new].numpy(), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_var[new].numpy(), var, rtol=1e-4, atol=1e-5)
    assert norm.weight[new].tolist() == [1] * case.count
    assert norm.bias[new].tolist() == [0] * case.count


def test_new_neurons_of_a_fully_connected_layer_have_no_bias():
    case = Case({"channels": [3], "neurons": [5], "io": (1, 3, 4)}, 1, 4, "output", 0)
    old = case.network.hidden[0].bias.tolist()
    case.grow()
    assert case.network.hidden[0].bias.tolist() == [*old, 0, 0, 0, 0]


def test_growth_keeps_convolutions_channels_last():
    case = Case({"channels": [3, 4], "neurons": [], "io": (1, 2, 8)}, 0, 2, "output", 0)
    case.network.to(memory_format=torch.channels_last)
    case.grow()
    for layer in case.network.layers:
        assert layer.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_candidates_taken_are_those_of_the_indices_in_order():
    for layer in (0, 1):
        case = Case({"channels": [3], "neurons": [4], "io": (1, 2, 4)}, layer, 1, "output", 0)
        drawn = case.candidates(6)
        taken = drawn.take(torch.tensor([4, 1]))
        assert torch.equal(taken.weights, drawn.weights[[4, 1]])
        assert torch.equal(taken.outputs, drawn.outputs[:, [4, 1]])
        assert torch.equal(taken.h, drawn.h[:, [4, 1]])
        for now, then in ((taken.mean, drawn.mean), (taken.var, drawn.var)):
            assert (now is then is None) or torch.equal(now, then[[4, 1]])


@pytest.mark.parametrize(("layer", "drawn"), [(0, 20), (1, 20), (2, 30)])
def test_a_layer_grows_by_the_most_orthogonal_of_its_candidates(layer, drawn):
    shape = {"channels": [4, 4], "neurons": [5], "io": (2, 3, 8)}
    case, twin = (Case(shape, layer, 3, "output", 7) for _ in range(2))
    new = twin.candidates(drawn)
    h = chapter.activations(case.network, layer)
    scores = numpy_residuals(h.numpy(), new.h.numpy())
    best = np.argsort(-scores)[:3].tolist()
    selection = chapter.Selection(conv=20, fc=30)
    chapter.grow_layer(case.network, layer, h, 3, selection, case.generator)
    assert_same(case.network.weighted[layer].weight.detach()[-3:], new.weights[best])


@pytest.mark.parametrize("score", REFERENCES)
def test_a_layer_grows_by_the_best_of_the_score_chosen(score):
    shape = {"channels": [4, 4], "neurons": [], "io": (2, 3, 8)}
    case, twin = (Case(shape, 1, 3, "output", 7) for _ in range(2))
    new = twin.candidates(20)
    h = chapter.activations(case.network, 1)
    best = np.argsort(-REFERENCES[score](h.numpy(), new.h.numpy()))[:3].tolist()
    selection = chapter.Selection(score, conv=20)
    chapter.grow_layer(case.network, 1, h, 3, selection, case.generator)
    assert_same(case.network.layers[1].conv.weight.detach()[-3:], new.weights[best])


def test_a_layer_may_grow_by_more_than_its_number_of_candidates():
    case = Case({"channels": [4], "neurons": [], "io": (1, 2, 4)}, 0, 1, "output", 0)
    h = chapter.activations(case.network, 0)
    chapter.grow_layer(case.network, 0, h, 9, chapter.Selection(conv=5), case.generator)
    assert case.network.widths == [13]


# --- rules ----------------------------------------------------------------------------------------


def activations_of_erank(r: float, neurons: int, seed: int = 0) -> torch.Tensor:
    """Orthonormal columns of which a share r is not zero: the relative erank is r."""
    h = orthonormal(seed, 40, neurons)
    h[:, round(r * neurons) :] = 0
    return tensor(h)


@given(st.lists(SEEDS, min_size=1, max_size=6), st.floats(0, 0.99), st.floats(0, 1))
@few(50)
def test_the_moving_average_starts_with_the_first_value(seeds, beta, q):
    rule, average = chapter.EffectiveRank(q, smoothing=beta), None
    for seed in seeds:
        h = tensor(np.maximum(random_matrix(seed, 30, 6), 0))
        r = np.exp(stats.entropy(svd(h.numpy()))) / 6
        average = r if average is None else beta * average + (1 - beta) * r
        wanted = rule(2, "conv", h, 10)
        assert rule.smooth_r == {2: pytest.approx(average)}
        assume(abs((average - q) * 6 - round((average - q) * 6)) > 1e-5)
        assert wanted == max(0, math.ceil((average - q) * 6))


def test_each_layer_has_a_moving_average_of_its_own():
    rule = chapter.EffectiveRank(0.5)
    rule(0, "conv", activations_of_erank(1, 10), 10)
    rule(1, "conv", activations_of_erank(0.5, 10), 10)
    assert rule.smooth_r == pytest.approx({0: 1, 1: 0.5})


def test_the_average_is_of_shares_so_that_it_survives_growth():
    rule = chapter.EffectiveRank(0.5)
    rule(0, "conv", activations_of_erank(1, 10), 10)
    assert rule(0, "conv", activations_of_erank(1, 20), 20) == 10


def test_the_average_weighs_the_past_by_nine_tenths_unless_told():
    rule = chapter.EffectiveRank(0.5)
    rule(0, "conv", activations_of_erank(1, 10), 10)
    rule(0, "conv", activations_of_erank(0.5, 10), 20)
    assert rule.smooth_r[0] == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("q_fc", "conv", "fc"), [(None, 6, 6), (0.9, 6, 1), (0.0, 6, 10), (1.0, 6, 0)]
)
def test_each_kind_of_layer_has_its_threshold(q_fc, conv, fc):
    rule, h = chapter.EffectiveRank(0.4, q_fc), activations_of_erank(1, 10)
    assert (rule(0, "conv", h, 10), rule(1, "fc", h, 10)) == (conv, fc)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"q": -0.1}, "q .*-0.1"),
        ({"q": 1.5}, "q .*1.5"),
        ({"q": NAN}, "q .*nan"),
        ({"q": 0.5, "q_fc": 1.2}, "q .*1.2"),
        ({"q": 0.5, "smoothing": 1}, "smoothing .*1"),
        ({"q": 0.5, "smoothing": -0.5}, "smoothing .*-0.5"),
        ({"q": 0.5, "smoothing": NAN}, "smoothing .*nan"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        chapter.EffectiveRank(**arguments)


@pytest.mark.parametrize("gamma", [0, -1, NAN])
def test_a_gamma_that_cannot_be_is_refused(gamma):
    with pytest.raises(ValueError, match=f"gamma must .*{gamma}"):
        chapter.NorthSelect(chapter.erank, gamma)


def test_north_select_keeps_the_first_batchs_rank_of_each_layer():
    ranks = iter([4.0, 10.0, 9.0, 30.0])
    rule = chapter.NorthSelect(lambda h: next(ranks), 0.5)
    narrow, wide = torch.ones(1, 8), torch.ones(1, 16)
    assert rule(0, "conv", narrow, 1) == 2  # 4 - 0.5 * 8 / 8 * 4
    assert rule(1, "conv", narrow, 1) == 5  # 10 - 0.5 * 8 / 8 * 10
    assert rule(0, "conv", wide, 2) == 5  # 9 - 0.5 * 16 / 8 * 4
    assert rule(1, "conv", narrow, 2) == 25  # 30 - 0.5 * 8 / 8 * 10


@pytest.mark.parametrize(
    ("settings_", "wanted"),
    [
        ({"q": 0.4}, 6),  # ceil((1 - 0.4) 10)
        ({"method": "erank"}, 0),  # q = 1
        ({"method": "north erank"}, 1),  # floor(10 - 0.9 * 10)
        ({"method": "north erank", "gamma": 0.5}, 5),
        ({"method": "north epsilon", "gamma": 0.5}, 5),
        ({"method": "north epsilon", "gamma": 0.5, "epsilon": 0.2}, 0),  # 1 / sqrt(40) is less
    ],
)
def test_a_rule_is_made_by_its_name(settings_, wanted):
    assert chapter.make_rule(**settings_)(0, "conv", activations_of_erank(1, 10), 10) == wanted


def test_smoothing_of_a_rule_by_name_is_passed_on():
    assert chapter.make_rule(q=0.4, smoothing=0.25).smoothing == 0.25


def test_an_unknown_method_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown method 'north'.*erank, north erank"):
        chapter.make_rule("north")


# --- growth in training ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """256 images of 8 by 8 pixels."""
    return load("digits", device="cpu", subset=256)


class Watch(Callback):
    """Notes what `look(training)` returns after every step."""

    def __init__(self, look: callable) -> None:
        self.look, self.seen = look, []

    def on_step(self, training: Training) -> None:
        self.seen.append(self.look(training))


def train(network: Any, data: Any, *callbacks: Callback, steps: int = 30, **settings_: Any) -> Any:
    settings_ = {"lr": 0.05, "batch_size": 32, "evaluate_every": None} | settings_
    return fit(network, data, steps=steps, callbacks=callbacks, **settings_)


def small(seed: int = 0, channels: tuple = (4, 4), neurons: tuple = (4,)) -> Any:
    torch.manual_seed(seed)
    return chapter.GrowingConvNet(list(channels), list(neurons), 1, 10, 8)


FEW = chapter.Selection(conv=10, fc=20)


def asks(*wanted: int) -> callable:
    """A rule that asks for as many neurons in each layer, always."""
    return lambda layer, kind, h, step: wanted[layer]


@given(
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    neurons=st.lists(st.integers(1, 5), max_size=2),
    room=st.integers(0, 1500),
    q=st.floats(0, 0.9),
    every=st.integers(2, 7),
)
@few(12)
def test_no_network_ever_passes_its_limit(digits, channels, neurons, room, q, every):
    network = small(0, channels, neurons)
    limit = count_parameters(network) + room
    grow = chapter.Grow(chapter.EffectiveRank(q), FEW, every=every, limit=limit)
    watch = Watch(lambda training: (count_parameters(training.model), training.model.widths))
    train(network, digits, grow, watch, steps=12)
    assert all(size <= limit for size, _ in watch.seen)
    if grow.halted:
        end = grow.trace[-1][0]
        assert len({tuple(widths) for _, widths in watch.seen[max(0, end - 1) :]}) == 1


def test_a_request_that_does_not_fit_gets_what_fits(digits):
    network = small()
    limit = count_parameters(network) + 10 * chapter.neuron_size(network, 0) + 7
    grow = chapter.Grow(asks(25, 0, 0), FEW, limit=limit)
    train(network, digits, grow)
    assert network.widths == [14, 4, 4]
    assert limit - count_parameters(network) == 7


def test_a_request_that_fits_exactly_does_not_end_growth(digits):
    network = small()
    limit = count_parameters(network) + 10 * chapter.neuron_size(network, 0)
    grow = chapter.Grow(asks(10, 0, 0), FEW, limit=limit, every=10)
    train(network, digits, grow, steps=11)
    assert network.widths == [14, 4, 4]
    assert not grow.halted


def test_a_request_that_does_not_fit_ends_the_growth_of_all_layers(digits):
    network, calls = small(), []

    def rule(layer, kind, h, step):
        calls.append(step)
        return [0, 10_000, 1][layer] if step == 10 else 1

    size = chapter.neuron_size(network, 1)
    limit = count_parameters(network) + 2 * size + 45
    grow = chapter.Grow(rule, FEW, limit=limit)
    train(network, digits, grow)
    assert network.widths == [4, 6, 4]
    assert limit - count_parameters(network) == 45 >= chapter.neuron_size(network, 2)
    assert grow.halted
    assert set(calls) == {10}


def test_without_a_limit_growth_does_not_end(digits):
    network = small()
    grow = chapter.Grow(asks(1, 2, 3), FEW, every=5)
    train(network, digits, grow, steps=31)
    assert network.widths == [10, 16, 22]
    assert not grow.halted


def test_a_network_that_starts_beyond_the_limit_is_refused_with_both_numbers(digits):
    network = small()
    grow = chapter.Grow(asks(0, 0, 0), limit=count_parameters(network) - 1)
    with pytest.raises(ValueError, match=f"{count_parameters(network)} .* {grow.limit}"):
        train(network, digits, grow)


def test_a_limit_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"limit .* nan"):
        chapter.Grow(asks(1), limit=NAN)


def test_what_could_not_be_trained_any_more_does_not_grow(digits):
    network, grow = small(), chapter.Grow(asks(1, 1, 1), every=5)
    fit(network, digits, steps=10, lr=0.01, callbacks=[grow])
    assert [step for step, _ in grow.trace] == [0, 5]


def test_a_network_may_start_at_the_limit(digits):
    network = small()
    grow = chapter.Grow(asks(0, 0, 0), limit=count_parameters(network))
    assert train(network, digits, grow).completed


def test_no_layer_gets_wider_than_the_widest(digits):
    network = small(channels=(4, 9))
    grow = chapter.Grow(asks(3, 3, 5), FEW, widest=8, every=5)
    train(network, digits, grow)
    assert network.widths == [8, 9, 8]
    assert not grow.halted


def test_the_rule_is_asked_for_each_layer_every_so_many_steps(digits):
    calls = []

    def rule(layer, kind, h, step):
        calls.append((step, layer, kind, tuple(h.shape)))
        return 0

    train(small(channels=(4, 5), neurons=(6,)), digits, chapter.Grow(rule, every=7))
    layers_ = [(0, "conv", (512, 4)), (1, "conv", (128, 5)), (2, "fc", (32, 6))]
    assert calls == [(step, *layer) for step in (7, 14, 21, 28) for layer in layers_]


def test_the_rule_sees_the_activations_of_the_place_chosen(digits):
    shapes_ = []

    def rule(layer, kind, h, step):
        shapes_.append(tuple(h.shape))
        return 0

    selection = chapter.Selection(place="before BatchNorm")
    train(small(), digits, chapter.Grow(rule, selection, every=20))
    assert shapes_ == [(2048, 4), (512, 4), (32, 4)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"score": "best"}, "unknown score 'best'"),
        ({"place": "input"}, "unknown place 'input'"),
        ({"conv": 0}, "conv .*0"),
        ({"conv": -1}, "conv .*-1"),
        ({"fc": 0}, "fc .*0"),
        ({"fc": NAN}, "fc .*nan"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        chapter.Selection(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "every .*0"),
        ({"every": -5}, "every .*-5"),
        ({"widest": 0}, "widest .*0"),
        ({"widest": NAN}, "widest .*nan"),
    ],
)
def test_growth_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        chapter.Grow(asks(0), **wrong)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_dead_layer_can_grow(digits, layer):
    network = small(channels=(4, 4), neurons=(4,))
    with torch.no_grad():
        if layer < 2:
            network.layers[layer].norm.weight.zero_()
            network.layers[layer].norm.bias.zero_()
        else:
            network.hidden[0].bias.fill_(-1e6)
    dead = []

    def rule(k, kind, h, step):
        if k == layer:
            dead.append(not h.any())
        return 2 if step == 10 else 0

    history = train(network, digits, chapter.Grow(rule, FEW))
    assert dead[0]
    assert history.completed
    assert network.widths == [6, 6, 6]
    assert not dead[-1]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_dead_layer_has_no_rank_to_grow_by(digits, layer):
    network = small()
    torch.nn.init.zeros_(network.layers[layer].norm.weight)
    grow = chapter.Grow(chapter.EffectiveRank(0.0, smoothing=0), FEW)
    assert train(network, digits, grow).completed
    assert network.widths[layer] == 4


def test_activations_that_are_not_finite_end_a_training_with_an_error(digits):
    network = small()
    with torch.no_grad():
        network.layers[0].conv.weight[1] = NAN
    with pytest.raises(ValueError, match="not finite: nan in sample 0, neuron 1"):
        train(network, digits, chapter.Grow(chapter.EffectiveRank(0.5), FEW, every=1))


def test_the_trace_is_the_start_and_every_change(digits):
    def rule(layer, kind, h, step):
        return {8: [1, 0, 2], 16: [0, 3, 0]}.get(step, [0, 0, 0])[layer]

    grow = chapter.Grow(rule, FEW, every=4)
    train(small(), digits, grow)
    assert grow.trace == [(0, [4, 4, 4]), (8, [5, 4, 6]), (16, [5, 7, 6])]


def test_lower_thresholds_grow_more_and_threshold_1_does_not(digits):
    sizes = []
    for q in (1.0, 0.7, 0.55, 0.4):
        network = small(channels=(8, 8), neurons=())
        grow = chapter.Grow(chapter.EffectiveRank(q), FEW)
        train(network, digits, grow)
        sizes.append(count_parameters(network))
    assert sizes[0] == count_parameters(small(channels=(8, 8), neurons=()))
    assert sizes == sorted(set(sizes))


def test_growth_from_8_to_the_baselines_widths_has_the_published_parameters():
    network = chapter.GrowingConvNet([8, 8, 8], (), 1, 10, 28)
    assert count_parameters(network) == 2_002
    pace = chapter.GrowTo([8, 8, 8], [16, 32, 64], "early", 50)
    train(network, load(MINI, device="cpu"), chapter.Grow(pace, FEW), steps=31, batch_size=10)
    assert count_parameters(network) == 29_178


def test_training_without_growth_is_that_of_a_convnet(digits):
    torch.manual_seed(0)
    plain = ConvNet([4, 4], [4], 1, 10, 8)
    growing = small()
    train(plain, digits)
    train(growing, digits, chapter.Grow(chapter.EffectiveRank(1.0)))
    for name, value in plain.state_dict().items():
        assert torch.equal(growing.state_dict()[name], value), name


def test_a_training_with_growth_repeats_bit_for_bit(digits):
    results = []
    for noise in (1, 2):
        network = small()
        torch.manual_seed(noise)  # the caller's random state does not matter
        grow = chapter.Grow(chapter.EffectiveRank(0.5), FEW, every=5, seed=4)
        train(network, digits, grow, seed=3)
        results.append((grow.trace, network.state_dict()))
    (trace, state), (trace_again, state_again) = results
    assert trace == trace_again
    assert len(trace) > 1
    assert all(torch.equal(state[name], state_again[name]) for name in state)


def test_another_seed_of_growth_draws_other_neurons(digits):
    weights = []
    for seed in (0, 1):
        network = small()
        train(network, digits, chapter.Grow(asks(2, 0, 0), FEW, seed=seed), steps=11)
        weights.append(network.layers[0].conv.weight.detach())
    assert torch.equal(weights[0][:4], weights[1][:4])
    assert not torch.equal(weights[0][4:], weights[1][4:])


class Momenta(Callback):
    """Momenta of all parameters: `before` in the steps, `after` in the epochs."""

    def __init__(self) -> None:
        self.before, self.after = [], []

    def of(self, training: Training) -> dict[str, torch.Tensor]:
        state = training.optimizer.state
        return {
            name: state[p]["momentum_buffer"].clone()
            for name, p in training.model.named_parameters()
            if p in state
        }

    def on_step(self, training: Training) -> None:
        self.before.append(self.of(training))

    def on_epoch(self, training: Training) -> None:
        self.after.append(self.of(training))


def test_growth_keeps_the_momentum_of_old_weights_and_starts_new_ones_at_zero(digits):
    network, momenta = small(), Momenta()
    grow = chapter.Grow(asks(2, 3, 4), FEW, every=4)
    # an epoch is a step: growth comes between its step and its end
    train(network, digits, momenta, grow, steps=5, batch_size=256)
    before, after = momenta.before[3], momenta.after[3]
    assert before.keys() == after.keys() == dict(network.named_parameters()).keys()
    grown = [name for name in before if before[name].shape != after[name].shape]
    assert len(grown) == len(before) - 1  # all but the classifier's bias
    for name, was in before.items():
        now = after[name].clone()
        corner = tuple(slice(size) for size in was.shape)
        assert was.any()
        assert torch.equal(now[corner], was)
        now[corner] = 0
        assert not now.any()
        assert now.shape == dict(network.named_parameters())[name].shape


def test_a_training_goes_on_after_growth_and_new_neurons_learn(digits):
    network = small()
    grow = chapter.Grow(asks(2, 2, 2), FEW, every=100)
    grow.every, late = 5, Watch(lambda training: setattr(grow, "halted", training.step >= 5))
    history = train(network, digits, grow, late, steps=60)
    assert history.completed
    assert np.isfinite(history.frame["train_loss"]).all()
    assert history.frame["train_loss"].iloc[-1] < history.frame["train_loss"].iloc[0]
    assert network.widths == [6, 6, 6]
    outgoing = [m.weight.detach() for m in network.weighted[1:]]
    for weight, inputs in zip(outgoing, (1, 4, 1)):  # 2 by 2 pixels where convolutions end
        new = weight[:, 4 * inputs :].abs().flatten(2 if weight.ndim > 2 else 1)
        assert new.sum() > 0


def test_ranks_are_recorded_after_the_first_step_and_every_so_many(digits):
    ranks, network = chapter.TraceRanks(12, epsilon=0.5), small()
    layers_ = Watch(lambda t: [chapter.activations(t.model, k) for k in range(3)])
    train(network, digits, ranks, layers_, steps=36)
    columns = ranks.columns()
    assert columns["rank_steps"] == [1, 12, 24, 36]
    for step, eranks, counts in zip(*columns.values()):
        seen = layers_.seen[step - 1]
        assert eranks == [chapter.erank(h) for h in seen]
        assert counts == [chapter.epsilon_rank(h, 0.5) for h in seen]
        assert counts != [chapter.epsilon_rank(h) for h in seen]


def test_residuals_of_a_trained_networks_activations_are_those_of_numpy(digits):
    network = small(channels=(8, 8), neurons=(6,))
    train(network, digits, steps=20)
    with torch.no_grad():  # a dead neuron and a duplicate in each layer
        for layer in network.layers:
            layer.norm.weight[0], layer.norm.bias[0] = 0, 0
            layer.conv.weight[1] = layer.conv.weight[2]
            layer.norm.weight[1], layer.norm.bias[1] = layer.norm.weight[2], layer.norm.bias[2]
    network.train()(digits.normalize(digits.train_images))
    generator = torch.Generator().manual_seed(0)
    for layer, place in itertools.product(range(3), chapter.PLACES):
        h = chapter.activations(network, layer, place)
        new = chapter.draw_candidates(network, layer, 20, generator, place).h
        assert h.dtype == torch.float32
        assert_residuals_agree(h.numpy(), new.numpy())


# --- growth by the clock --------------------------------------------------------------------------

GROWTHS = ("none", "early", "slow", "stages")


@pytest.mark.parametrize(
    ("growth", "steps", "moments"),
    [
        ("none", 100, [0]),
        ("early", 100, [10, 20, 30, 40, 50]),
        ("early", 3900, range(10, 101, 10)),
        ("slow", 100, range(10, 81, 10)),
        ("slow", 3900, range(10, 3121, 10)),
        ("stages", 100, [20, 40, 60, 80]),
        ("stages", 3900, [780, 1560, 2340, 3120]),
    ],
)
def test_growth_by_the_clock_has_its_moments(growth, steps, moments):
    first, last = [8, 80], [8 + 4 * len(moments), 80]  # four neurons a moment
    pace = chapter.GrowTo(first, last, growth, steps)
    for step in range(steps + 1):
        assert pace.widths(step) == [8 + 4 * sum(m <= step for m in moments), 80]


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 64)), min_size=1, max_size=4),
    st.sampled_from(GROWTHS),
    st.integers(50, 800),
)
@few(50)
def test_growth_by_the_clock_starts_at_first_rises_and_ends_at_last(widths, growth, steps):
    first, last = [a for a, _ in widths], [a + more for a, more in widths]
    pace = chapter.GrowTo(first, last, growth, steps)
    assert pace.widths(0) == (last if growth == "none" else first)
    assert pace.widths(steps) == last
    by_step = np.array([pace.widths(step) for step in range(steps + 1)])
    assert (np.diff(by_step, axis=0) >= 0).all()


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 100))
def test_the_rule_of_the_clock_asks_for_what_is_missing(width, more, step):
    pace = chapter.GrowTo([7, width], [7, width + more], "slow", 100)
    wanted = pace(1, "conv", torch.ones(3, width), step)
    assert wanted == pace.widths(step)[1] - width
    assert pace(1, "conv", torch.ones(3, width + more + 1), step) == 0


def test_an_unknown_growth_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown growth 'fast'.*none, early, slow, stages"):
        chapter.GrowTo([8], [16], "fast", 100)


@pytest.mark.parametrize("growth", GROWTHS)
def test_growth_by_the_clock_in_fewer_than_50_steps_is_refused(growth):
    assert chapter.GrowTo([8], [16], growth, 50).widths(50) == [16]
    with pytest.raises(ValueError, match="needs 50 steps, got 49"):
        chapter.GrowTo([8], [16], growth, 49)


@given(st.sampled_from([MINI, "digits"]), st.lists(st.integers(1, 70), min_size=1, max_size=3))
@few(40)
def test_operations_are_those_that_torch_counts(name, channels):
    data = load(name, device="cpu")
    io = chapter.shape_of(data)
    counted = network_cost(ConvNet(channels, (), *io), data.image_shape).flops
    assert chapter.conv_flops(channels, data) == counted


def test_the_operations_of_the_baseline_are_those_that_torch_counts():
    data = load(MINI, device="cpu")
    counted = network_cost(ConvNet([30, 34, 36, 27]), (1, 28, 28)).flops
    assert chapter.conv_flops([30, 34, 36, 27], data) == counted


@pytest.mark.parametrize("growth", GROWTHS)
def test_the_operations_of_a_pace_are_those_of_its_training(digits, growth):
    pace = chapter.GrowTo([2, 3], [6, 5], growth, 50)
    network = chapter.GrowingConvNet(pace.widths(0), (), 1, 10, 8)
    passes = []
    network.register_forward_pre_hook(
        lambda module, x: passes.append(list(module.widths)) if module.training else None
    )
    train(network, digits, chapter.Grow(pace, FEW), steps=50)
    costs = [network_cost(ConvNet(widths, (), 1, 10, 8), (1, 8, 8)).flops for widths in passes]
    assert network.widths == [6, 5]
    assert pace.flops(digits) == sum(costs)


# --- spaces ---------------------------------------------------------------------------------------


SPACES = {"growing": chapter.growing_space, "static": chapter.static_space}


def samples(space: str) -> list[dict]:
    made = SPACES[space]()
    made.seed(0)
    return [dict(config) for config in made.sample_configuration(150)]


@pytest.mark.parametrize(("space", "count"), [("growing", 5), ("static", 9)])
def test_the_spaces_have_as_many_hyperparameters_as_published(space, count):
    assert len(SPACES[space]()) == count


def test_the_threshold_of_fully_connected_layers_is_there_with_them():
    configs = samples("growing")
    assert all(("q_fc" in config) == (config["fc_layers"] > 0) for config in configs)
    assert {config["fc_layers"] for config in configs} == {0, 1, 2}


def test_sizes_are_there_for_the_layers_there_are():
    for config in samples("static"):
        sizes = {name for name in config if name[-1].isdigit()}
        expected = {f"channels_{k + 1}" for k in range(config["conv_layers"])}
        assert sizes == expected | {f"neurons_{k + 1}" for k in range(config["fc_layers"])}


@pytest.mark.parametrize("space", ["growing", "static"])
def test_every_configuration_makes_a_network_with_its_layers(space):
    data = load(MINI, device="cpu")
    for config in samples(space):
        network, callbacks = chapter.build(config, data, 10**6, seed=0)
        assert len(network.layers) == config["conv_layers"]
        assert len(network.hidden) == config["fc_layers"]
        assert len(callbacks) == (space == "growing")
        assert network.eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_a_static_configuration_has_its_sizes_in_order():
    config = {"conv_layers": 3, "fc_layers": 2, "learning_rate": 0.01}
    config |= {"channels_1": 9, "channels_2": 10, "channels_3": 11, "neurons_1": 12}
    network, _ = chapter.build(config | {"neurons_2": 13}, load(MINI, device="cpu"), 1, seed=0)
    expected = ConvNet([9, 10, 11], [12, 13])
    assert str(network) == str(expected)


def test_a_growing_configuration_starts_with_8_neurons_and_its_thresholds():
    config = {"conv_layers": 2, "fc_layers": 1, "q_conv": 0.3, "q_fc": 0.6}
    network, [grow] = chapter.build(config, load(MINI, device="cpu"), 12_345, seed=0)
    assert network.widths == [8, 8, 8]
    assert grow.rule.thresholds == {"conv": 0.3, "fc": 0.6}
    assert grow.limit == 12_345


def test_a_seed_makes_the_same_network_again():
    data = load(MINI, device="cpu")
    first, again, other = (chapter.build(chapter.BASELINE, data, 1, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def test_a_network_above_the_limit_is_not_trained_and_loses_by_its_size():
    config = {"conv_layers": 2, "fc_layers": 0, "learning_rate": 0.01}
    config |= {"channels_1": 128, "channels_2": 128}
    size = count_parameters(ConvNet([128, 128]))
    for limit in (30_000, size - 1):
        # no test waits for a training as long as this budget
        loss = chapter.validation_error(config, 1e9, data=MINI, limit=limit, seed=0)
        assert loss == size / limit > 1


def test_the_validation_error_is_that_of_a_training_on_five_sixths():
    config = {"conv_layers": 2, "fc_layers": 0, "learning_rate": 0.05}
    config |= {"channels_1": 4, "channels_2": 4}
    limit = count_parameters(ConvNet([4, 4]))  # not above it
    loss = chapter.validation_error(config, 0.5, data=MINI, limit=limit, seed=2)
    torch.manual_seed(2)
    network = ConvNet([4, 4])
    data = load(MINI).hold_out(1000)
    accuracy = fit(network, data, epochs=0.5, lr=0.05, seed=2).final("eval_accuracy")
    assert loss == 1 - accuracy
    assert 0 < loss < 0.9


@pytest.mark.parametrize(("eta", "budgets"), [(3, {10}), (2.5, {4, 10})])
@pytest.mark.parametrize("space", ["growing", "static"])
def test_smac_has_the_smaller_budget_with_eta_2_5_only(space, eta, budgets):
    trials = smac_search(
        SPACES[space](),
        lambda config, budget: config["learning_rate"],
        min_budget=4,
        max_budget=10,
        eta=eta,
        trials=6,
    )
    assert {trial.budget for trial in trials} == budgets


def test_six_evaluations_bring_five_configurations():
    trials = smac_search(
        chapter.growing_space(),
        lambda config, budget: config["learning_rate"],
        **{"min_budget": 4, "max_budget": 10, "eta": 2.5, "trials": 12},
    )
    assert len({json.dumps(trial.config, sort_keys=True) for trial in trials}) == 10


# --- units ----------------------------------------------------------------------------------------

CLOCKS = {"seconds", "growth_share", "trial_seconds"}


def lasting(metrics: dict) -> dict:
    """Metrics without measured times."""
    return {name: value for name, value in metrics.items() if name not in CLOCKS}


GROWING = {"data": MINI, "fold": 1, "initial": [4, 4], "epochs": 0.6, "lr": 0.05, "seed": 3}


@pytest.fixture(scope="module")
def grown() -> dict:
    return chapter.train_growing(**GROWING, q=0.5, looks=4, retrain=True, limit=3000)


def test_a_growing_training_returns_json(grown):
    assert json.loads(json.dumps(grown, allow_nan=False)) == grown


def test_a_growing_training_repeats_exactly(grown):
    again = chapter.train_growing(**GROWING, q=0.5, looks=4, retrain=True, limit=3000)
    assert lasting(again) == lasting(grown)


def test_a_growing_training_describes_its_growth(grown):
    assert grown["grown_widths"][0] == [4, 4]
    assert grown["grown_widths"][-1] == grown["channels"] != [4, 4]
    assert len(grown["grown_steps"]) == len(grown["grown_widths"])
    assert grown["grown_steps"][:2] == [0, 10]
    assert grown["parameters"] == count_parameters(ConvNet(grown["channels"])) <= 3000
    assert grown["halted"]
    assert grown["stopped"] == "epochs"
    assert 0 < grown["growth_share"] < 1
    assert grown["rank_steps"][:2] == [1, 5]  # 4 looks in 22 steps


def test_a_grown_network_is_trained_again_from_scratch(grown):
    torch.manual_seed(3)
    network = ConvNet(grown["channels"])
    history = fit(network, load(MINI).folds(5)[1], epochs=0.6, lr=0.05, seed=3)
    assert grown["retrained_accuracy"] == history.final("eval_accuracy")


def test_a_training_with_threshold_1_is_that_of_a_convnet_on_its_fold():
    found = chapter.train_growing(**GROWING, q=1.0)
    torch.manual_seed(3)
    history = fit(ConvNet([4, 4]), load(MINI).folds(5)[1], epochs=0.6, lr=0.05, seed=3)
    assert found["accuracy"] == history.final("eval_accuracy")
    assert "retrained_accuracy" not in found
    assert not found["halted"]


SHORT = GROWING | {"epochs": 0.3, "initial": [8, 8], "q": 0.5, "looks": 11}


@pytest.fixture(scope="module")
def usual() -> dict:
    return chapter.train_growing(**SHORT)


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "north erank", "gamma": 0.3},
        {"method": "north epsilon", "gamma": 0.3},
        {"every": 5},
        {"q": 0.4},
        {"score": "least"},
        {"place": "before BatchNorm"},
        {"seed": 4},
    ],
    ids=str,
)
def test_every_variant_of_growth_is_another(usual, changed):
    found = chapter.train_growing(**SHORT | changed)
    assert found["grown_steps"][1] == changed.get("every", 10)
    assert found["stopped"] == "epochs"
    assert lasting(found) != lasting(usual)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "south"}, "unknown method 'south'"),
        ({"score": "best"}, "unknown score 'best'"),
        ({"place": "input"}, "unknown place 'input'"),
        ({"q": 2.0}, "q must be .* 2.0"),
        ({"limit": 10}, "limit of 10"),
        ({"data": "letters"}, "unknown data set 'letters'"),
    ],
)
def test_a_growing_training_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        chapter.train_growing(**GROWING | wrong)


PACED = {"data": MINI, "first": [6, 8], "last": [6, 9], "epochs": 1.4, "lr": 0.05, "seed": 0}


@pytest.fixture(scope="module")
def paced() -> dict[str, dict]:
    kinds = {growth: {"growth": growth} for growth in ("none", "early", "slow")}
    kinds["as costly as slow"] = {"growth": "none", "as_costly_as": "slow"}
    return {name: chapter.train_paced(**PACED, **kind) for name, kind in kinds.items()}


def test_every_pace_ends_at_the_same_network(paced):
    assert {tuple(metrics["channels"]) for metrics in paced.values()} == {(6, 9)}
    assert {metrics["stopped"] for metrics in paced.values()} == {"steps"}


def test_slow_growth_costs_less_than_early_growth_and_that_less_than_none(paced):
    flops = [paced[growth]["forward_flops"] for growth in ("slow", "early", "none")]
    assert flops == sorted(set(flops))
    step = 128 * network_cost(ConvNet([6, 9]), (1, 28, 28)).flops
    assert flops[-1] == 54 * step


def test_a_training_as_costly_as_slow_growth_spends_its_operations(paced):
    step = 128 * network_cost(ConvNet([6, 9]), (1, 28, 28)).flops
    spent = paced["as costly as slow"]["forward_flops"]
    assert abs(spent - paced["slow"]["forward_flops"]) <= step
    assert spent == paced["as costly as slow"]["steps"] * step


def test_the_score_of_a_paced_training_counts():
    key = PACED | {"first": [2, 2], "growth": "slow"}
    found = [chapter.train_paced(**key, score=name) for name in ("residual", "least", "random")]
    assert {tuple(metrics["channels"]) for metrics in found} == {(6, 9)}
    assert len({metrics["accuracy"] for metrics in found}) > 1  # two may agree on some machine


def test_a_paced_training_repeats_exactly(paced):
    again = chapter.train_paced(**PACED, growth="slow")
    assert lasting(again) == lasting(paced["slow"])
    assert json.loads(json.dumps(again, allow_nan=False)) == again


@pytest.mark.parametrize(
    ("schedule", "meant"), [("cosine", "cosine"), ("restarts", SGDR(10 / 39, 1))]
)
def test_a_pace_without_growth_is_the_training_of_a_convnet(schedule, meant):
    settings_ = PACED | {"epochs": 1.3, "last": [4, 4]}
    found = chapter.train_paced(**settings_, growth="none", schedule=schedule)
    torch.manual_seed(0)
    data = load(MINI).hold_out(1000)
    history = fit(ConvNet([4, 4]), data, steps=50, lr=0.05, schedule=meant)
    assert found["accuracy"] == history.final("eval_accuracy")
    assert found["steps"] == 50


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"growth": "fast"}, "unknown growth 'fast'"),
        ({"growth": "slow", "as_costly_as": "fast"}, "unknown growth 'fast'"),
        ({"growth": "slow", "schedule": "linear"}, "unknown schedule 'linear'"),
        ({"growth": "slow", "score": "best"}, "unknown score 'best'"),
    ],
)
def test_a_paced_training_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        chapter.train_paced(**PACED | wrong)


FOUND = {"learning_rate": 0.05, "conv_layers": 2, "fc_layers": 1, "q_conv": 0.5, "q_fc": 0.7}


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """A book with recorded searches: two sets of images, and both spaces."""
    (tmp_path / "chapters").mkdir()
    monkeypatch.setenv("JAHS_BOOK", str(tmp_path))
    path = results_path("02_north_select", "search", "quick")
    path.parent.mkdir(parents=True)
    static = {"learning_rate": 0.05, "conv_layers": 2, "fc_layers": 0}
    static |= {"channels_1": 4, "channels_2": 5}
    for data, space, seed, incumbent, error in (
        ("digits", "growing", 0, {"wrong": 1}, 0.1),
        (MINI, "growing", 0, {"worse": 1}, 0.3),
        (MINI, "growing", 1, FOUND, 0.2),
        (MINI, "static", 0, static, 0.2),
    ):
        key = {"data": data, "space": space, "seed": seed}
        metrics = {"incumbent": json.dumps(incumbent), "incumbent_error": error}
        Results(path).append(describe_row(key, metrics, 1.0, "code"))
    return {"growing": FOUND, "static": static}


@pytest.mark.parametrize("arm", ["growing", "static"])
def test_the_incumbent_is_that_of_the_best_search_of_the_data(searched, arm):
    assert chapter.find_incumbent(arm, MINI, "quick") == searched[arm]


def test_an_arm_without_a_search_of_the_data_is_refused(searched):
    with pytest.raises(ValueError, match="no search of the static space on digits"):
        chapter.find_incumbent("static", "digits", "quick")


def test_the_baseline_has_the_published_parameters():
    config = chapter.find_incumbent("baseline", MINI, "quick")
    network, callbacks = chapter.build(config, load(MINI, device="cpu"), 30_000, seed=0)
    assert (count_parameters(network), callbacks) == (29_178, [])


def test_the_papers_incumbent_grows_four_convolutions_from_8():
    config = chapter.find_incumbent("paper", MINI, "quick")
    network, [grow] = chapter.build(config, load(MINI, device="cpu"), 30_000, seed=0)
    assert network.widths == [8, 8, 8, 8]
    assert grow.rule.thresholds["conv"] == 0.104


@pytest.mark.parametrize("profile", ["quick", "standard"])
def test_an_unknown_arm_is_refused_with_the_choices(profile):
    with pytest.raises(ValueError, match=r"unknown arm 'best'.*baseline, paper, growing, static"):
        chapter.find_incumbent("best", MINI, profile)


def test_an_arm_whose_search_is_not_recorded_says_how_to_run_it(searched):
    command = "jahs experiment run 02_north_select/search --profile paper"
    with pytest.raises(ValueError, match=command):
        chapter.find_incumbent("growing", MINI, "paper")


FINAL = {"data": MINI, "profile": "quick", "epochs": 0.25, "limit": 4000, "seed": 1}


def test_a_searched_arm_grows_and_is_trained_again_at_its_size(searched):
    found = chapter.train_final(**FINAL, arm="growing")
    assert json.loads(found["config"]) == FOUND
    widths = found["channels"]
    assert len(widths) == 3
    assert widths != [8, 8, 8]
    static = ConvNet(widths[:2], widths[2:])
    assert found["parameters"] == count_parameters(static) <= 4000
    torch.manual_seed(1)
    static = ConvNet(widths[:2], widths[2:])
    history = fit(static, load(MINI), epochs=0.25, lr=0.05, seed=1)
    assert found["retrained_accuracy"] == history.final("eval_accuracy")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert lasting(chapter.train_final(**FINAL, arm="growing")) == lasting(found)


def test_a_static_arm_is_scored_on_the_test_images(searched):
    found = chapter.train_final(**FINAL, arm="static")
    torch.manual_seed(1)
    network = ConvNet([4, 5])
    history = fit(network, load(MINI), epochs=0.25, lr=0.05, seed=1)
    assert found == {
        "config": json.dumps(searched["static"]),
        "parameters": count_parameters(network),
        "accuracy": history.final("eval_accuracy"),
    }


def test_a_final_training_of_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="unknown arm 'best'"):
        chapter.train_final(**FINAL, arm="best")


SEARCH = chapter.SEARCH_GRIDS["quick"][0] | {
    "trials": 4,
    "min_budget": 0.04,
    "max_budget": 0.1,
    "limit": 4000,
}


@pytest.fixture(scope="module")
def search() -> dict:
    return chapter.search_space(**SEARCH)


def test_a_search_returns_its_trials_and_the_best_at_the_largest_budget(search):
    trials = zip(search["losses"], search["configs"], search["budgets"])
    of_most = {config: loss for loss, config, budget in trials if budget == 0.1}
    assert len(search["budgets"]) == len(search["trial_seconds"]) == 4
    assert set(search["budgets"]) == {0.04, 0.1}
    assert search["incumbent_error"] == of_most[search["incumbent"]] == min(of_most.values())
    assert json.loads(json.dumps(search, allow_nan=False)) == search


def test_a_search_that_was_killed_goes_on(search, monkeypatch):
    original, calls = chapter.validation_error, []

    @functools.wraps(original)
    def killed_in_the_third(config, budget, **settings_):
        calls.append(budget)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(config, budget, **settings_)

    monkeypatch.setattr(chapter, "validation_error", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        chapter.search_space(**SEARCH)
    assert lasting(chapter.search_space(**SEARCH)) == lasting(search)
    assert len(calls) == 3 + 2


def test_a_search_that_is_complete_leaves_nothing_behind(search):
    assert list((cache_folder() / "searches").iterdir()) == []


def test_a_search_in_an_unknown_space_is_refused():
    with pytest.raises(ValueError, match=r"unknown space 'other'.*growing, static"):
        chapter.search_space(**SEARCH | {"space": "other"})


# --- grids ----------------------------------------------------------------------------------------

GRIDS = grids_of(chapter)


@pytest.mark.parametrize(("experiment", "profile"), GRIDS)
def test_every_key_names_a_rule_and_a_selection(experiment, profile):
    for key in experiment.keys(profile):
        bound = inspect.signature(experiment.unit).bind(**key)
        rule = bound.arguments.get("rule", {})
        assert callable(chapter.make_rule(**rule))
        chapter.Selection(key.get("score", "residual"), key.get("place", "output"))


@pytest.mark.parametrize(("experiment", "profile"), GRIDS)
def test_no_network_starts_beyond_its_limit(experiment, profile):
    for key in experiment.keys(profile):
        if "initial" in key:
            assert count_parameters(ConvNet(key["initial"])) <= (key.get("limit") or INF)


def test_the_quick_grids_take_the_small_images():
    for name, experiment in chapter.EXPERIMENTS.items():
        for key in experiment.grids.get("quick", []):
            assert key["data"] == MINI, name


def test_the_standard_thresholds_have_five_folds_each():
    keys = chapter.EXPERIMENTS["thresholds"].keys("standard")
    folds: dict[str, set] = {}
    for key in keys:
        rest = json.dumps({k: v for k, v in key.items() if k != "fold"}, sort_keys=True)
        folds.setdefault(rest, set()).add(key["fold"])
    assert all(found == set(range(5)) for found in folds.values())
    assert len(folds) > 1


def test_every_arm_is_an_incumbents():
    arms = {key["arm"] for key in chapter.EXPERIMENTS["final"].keys("standard")}
    assert arms == {"baseline", "paper", *SPACES}


@pytest.mark.parametrize("profile", ["quick", "standard", "paper"])
def test_paces_of_one_seed_differ_only_in_pace(profile):
    keys = chapter.EXPERIMENTS["paced"].keys(profile)
    same = [{k: key[k] for k in ("data", "epochs", "lr", "first", "last")} for key in keys]
    assert all(other == same[0] for other in same)
    for key in keys:
        pace = chapter.GrowTo(key["first"], key["last"], key["growth"], 78)
        assert pace.widths(78) == [16, 32, 64]


# --- the author's protocol ------------------------------------------------------------------------

AUTHOR = chapter.PROTOCOLS["author"]


@st.composite
def protocols(draw: st.DrawFn) -> Any:
    order = draw(st.sampled_from(chapter.ORDERS))
    statistics = draw(st.sampled_from(chapter.STATISTICS))
    return chapter.make_protocol("author", order=order, statistics=statistics)


def net_under(protocol: Any, channels: list, neurons: list, io: tuple, seed: int = 0) -> Any:
    """A ProtocolNet whose BatchNorm and biases are not those of the start."""
    torch.manual_seed(seed)
    network = chapter.ProtocolNet(channels, neurons, *io, protocol=protocol)
    with torch.no_grad():
        for norm in [*(layer.norm for layer in network.layers), *network.norms]:
            if not isinstance(norm, torch.nn.Identity):
                norm.weight.uniform_(0.5, 2)
                norm.bias.uniform_(-1, 1)
    return network


@st.composite
def nets_under(draw: st.DrawFn) -> tuple:
    """A network under some protocol after a batch of training, its images, and a layer."""
    depth = draw(st.integers(1, 3))
    side = draw(st.integers(2**depth, 13))
    widths = st.integers(2, 7)
    channels = draw(st.lists(widths, min_size=depth, max_size=depth))
    neurons = draw(st.lists(widths, max_size=2))
    io, seed = (draw(st.integers(1, 3)), draw(st.integers(2, 5)), side), draw(SEEDS)
    network = net_under(draw(protocols()), channels, neurons, io, seed)
    x = images_for({"io": io}, seed)
    with torch.no_grad():
        network.train()(x)
    return network, x, draw(st.integers(0, len(channels + neurons) - 1))


def test_the_authors_baseline_has_29_066_weights_by_his_count():
    network = chapter.ProtocolNet([16, 32, 64], protocol=AUTHOR)
    assert chapter.count_weights(network) == 29_066
    assert count_parameters(network) == 29_066 + 2 * (16 + 32 + 64)
    assert chapter.count_weights(chapter.ProtocolNet([8, 8, 8], protocol=AUTHOR)) == 1_978


def test_the_authors_layer_is_convolution_with_bias_relu_batchnorm_pool():
    network, x = net_under(AUTHOR, [3], [4], (2, 5, 8)), images_for({"io": (2, 5, 8)}, 1)
    nn = torch.nn.functional
    norm, fc_norm = network.layers[0].norm, network.norms[0]
    conv, linear = network.layers[0].conv, network.hidden[0]
    h = torch.relu(nn.conv2d(x, conv.weight, conv.bias, padding=1))
    h = nn.batch_norm(h, None, None, norm.weight, norm.bias, training=True)
    h = torch.relu(linear(nn.max_pool2d(h, 2).flatten(1)))
    h = nn.batch_norm(h, None, None, fc_norm.weight, fc_norm.bias, training=True)
    assert conv.bias is not None
    for mode in (True, False):  # tests go by the statistics of their batch
        assert_same(network.train(mode)(x), network.classifier(h))


def test_a_test_batch_is_normalised_by_itself_and_nothing_is_remembered():
    network, x = net_under(AUTHOR, [3], [], (1, 5, 4)).eval(), images_for({"io": (1, 5, 4)}, 1)
    before = network(x)
    network.train()(100 * x)
    assert torch.equal(network.eval()(x), before)
    assert not torch.allclose(network(x[:2]), before[:2])


@given(protocols(), SEEDS)
@few(10)
def test_the_order_of_a_layers_parts_shows_in_its_output(protocol, seed):
    network = net_under(protocol, [4], [3], (1, 5, 8), seed)
    network.train()(images_for({"io": (1, 5, 8)}, seed))
    negative = [bool((output < 0).any()) for output in network.outputs[1:]]
    assert negative == [protocol.order == "ReLU first"] * 2


@given(nets_under(), st.integers(1, 5))
@few(80)
def test_growth_under_any_protocol_does_not_change_what_a_network_computes(case, count):
    network, x, layer = case
    with torch.no_grad():
        before = {mode: network.train(mode)(x) for mode in (True, False)}
    h = chapter.activations(network, layer)
    widths = network.widths
    generator = torch.Generator().manual_seed(0)
    chapter.grow_by_author(network, layer, h, count, "residual", generator)
    prepared = list(network.outputs)
    with torch.no_grad():
        for mode in (False, True):
            assert_same(network.train(mode)(x), before[mode], 1e-4)
    widths[layer] += count
    assert network.widths == widths
    for now, then in zip(network.outputs, prepared, strict=True):
        assert_same(now, then, 1e-4)


@given(nets_under())
@few(40)
def test_new_entries_of_batchnorm_are_1_and_0_and_outgoing_weights_0(case):
    network, _, layer = case
    following = network.weighted[layer + 1].weight
    inputs, old_biases = following.shape[1], network.weighted[layer].bias
    new, bias = chapter.propose(network, layer, 3, torch.Generator().manual_seed(0))
    chapter.add_proposed(network, layer, new, bias)
    assert not network.weighted[layer + 1].weight[:, inputs:].any()
    convolutions = len(network.layers)
    norm = network.norms[layer - convolutions] if layer >= convolutions else None
    norm = network.layers[layer].norm if norm is None else norm
    if not isinstance(norm, torch.nn.Identity):
        assert norm.weight[-3:].tolist() == [1] * 3
        assert norm.bias[-3:].tolist() == [0] * 3
    module = network.weighted[layer]
    assert torch.equal(module.weight[-3:], new.weights)
    assert (module.bias is None) == (bias is None)
    if bias is not None:
        assert torch.equal(module.bias, torch.cat([old_biases, bias]))


def test_candidates_are_uniform_and_vary_as_the_old_weights():
    old = torch.randn(8, 5, 3, 3) * 0.3
    new = chapter.draw_uniform(old, 2000, torch.Generator().manual_seed(0))
    assert new.shape == (2000, 5, 3, 3)
    assert float(new.std()) == pytest.approx(float(old.std()), rel=1e-4)
    assert float(new.abs().max()) == pytest.approx(math.sqrt(3) * float(old.std()), rel=0.02)


def test_growth_takes_the_largest_residuals_of_100_candidates_more():
    twin, network = (net_under(AUTHOR, [4, 4], [], (1, 5, 8)) for _ in range(2))
    x = images_for({"io": (1, 5, 8)}, 1)
    for one in (twin, network):
        one.train()(x)
    generator, again = (torch.Generator().manual_seed(5) for _ in range(2))
    new, bias = chapter.propose(twin, 1, 103, generator)
    h = chapter.activations(network, 1)
    best = np.argsort(-numpy_residuals(h.numpy(), new.h.numpy()))[:3].tolist()
    chapter.grow_by_author(network, 1, h, 3, "residual", again)
    assert_same(network.layers[1].conv.weight[-3:], new.weights[best])
    assert_same(network.layers[1].conv.bias[-3:], bias[best])


def test_one_neuron_has_no_spread_to_draw_by():
    with pytest.raises(ValueError, match="no spread to draw by"):
        chapter.draw_uniform(torch.ones(1), 5, torch.Generator())


# Smoothed r by step, what the layer wants at each, and what the hold-off passes on.
RISING, FALLING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("r", "wanted", "passed"),
    [
        (RISING, [2] * 6, [0, 0, 0, 2, 2, 2]),  # four values are needed
        (FALLING, [2] * 6, [0] * 6),
        ([0.5] * 5, [1] * 5, [0, 0, 0, 1, 1]),  # level is at the maximum
        # free while nothing is wanted, so the first request passes though r falls; then bound
        ([*RISING[:4], 0.3, 0.2, 0.1], [0, 0, 0, 0, 3, 3, 3], [0, 0, 0, 0, 3, 0, 0]),
        # bound by a request that passed, until the next peak of four values
        ([*RISING[:4], 0.3, 0.35, 0.39, 0.41], [1] * 8, [0, 0, 0, 1, 0, 0, 0, 1]),
        # a peak of four values need not be one of all
        ([0.9, 0.1, 0.2, 0.3, 0.4], [1] * 5, [0, 0, 0, 0, 1]),
    ],
)
def test_the_hold_off_waits_for_a_peak_of_the_smoothed_r(r, wanted, passed):
    hold_off = chapter.HoldOff()
    assert [hold_off.pass_on(0, *step) for step in zip(r, wanted)] == passed


def test_each_layer_has_a_hold_off_of_its_own():
    hold_off = chapter.HoldOff()
    for r in RISING[:3]:
        hold_off.pass_on(0, r, 1)
    assert hold_off.pass_on(1, 0.4, 1) == 0
    assert hold_off.pass_on(0, 0.4, 1) == 1


def test_the_authors_r_starts_at_q_and_takes_a_tenth_of_the_new():
    rule, free = (chapter.HeldEffectiveRank(0.5, 0.2, hold_off=hold) for hold in (True, False))
    h, r, asked = activations_of_erank(1, 10), 0.5, []
    for step in range(1, 6):
        r = 0.9 * r + 0.1
        asked.append(rule(0, "conv", h, step))
        assert free(0, "conv", h, step) == math.ceil((r - 0.5) * 10 - 1e-9)
        assert rule.smooth_r[0] == pytest.approx(r)
    assert asked == [0, 0, 0, 2, 3]  # r rises: at its maximum from the fourth value on
    assert math.ceil((1 - 0.5 * 0.9**4 - 0.5) * 10) == 2
    rule(1, "fc", h, 1)
    assert rule.smooth_r[1] == pytest.approx(0.9 * 0.2 + 0.1)


def test_the_target_of_the_authors_north_select_is_the_largest_relative_rank_so_far():
    ranks = iter([4.0, 8.0, 8.0, 12.0, 6.0])
    rule = chapter.RisingNorthSelect(lambda h: next(ranks), 0.5)
    narrow, wide = torch.ones(1, 8), torch.ones(1, 16)
    assert rule(0, "conv", narrow, 1) == 2  # 8 (1/2 - 0.5 * 1/2)
    assert rule(0, "conv", narrow, 2) == 6  # 8 (1 - 0.5 * 1/2): the target before this step
    assert rule(0, "conv", narrow, 3) == 4  # 8 (1 - 0.5 * 1)
    assert rule(0, "conv", wide, 4) == 4  # 16 (3/4 - 0.5 * 1): it does not fall
    assert rule(1, "conv", narrow, 4) == 3  # 8 (3/4 - 0.5 * 3/4): another layer


def test_the_room_of_a_layer_is_its_share_of_the_weights_that_are_left():
    network = chapter.ProtocolNet([8, 8, 8], protocol=AUTHOR)
    assert chapter.count_weights(network) == 80 + 584 + 584 + 730
    left = 30_000 - 1_978
    assert chapter.room_by_share(network, 0, 30_000) == left * 8 // (80 + 584)
    assert chapter.room_by_share(network, 2, 30_000) == left * 8 // (584 + 730)
    assert chapter.room_by_share(network, 2, 1_979) == 0
    assert chapter.room_by_share(network, 1, INF) == INF


@given(st.lists(st.integers(2, 40), min_size=1, max_size=3), st.integers(0, 20_000), st.data())
@few(60)
def test_what_the_estimated_room_allows_never_passes_the_limit(channels, room, data):
    network = chapter.ProtocolNet(channels, [3], 1, 10, 8, protocol=AUTHOR)
    limit = chapter.count_weights(network) + room
    layer = data.draw(st.integers(0, len(channels)))
    widths = network.widths
    widths[layer] += chapter.room_by_share(network, layer, limit)
    wider = chapter.ProtocolNet(widths[:-1], widths[-1:], 1, 10, 8, protocol=AUTHOR)
    assert chapter.count_weights(wider) <= limit


def small_under(channels: tuple = (4, 4), neurons: tuple = (4,), **changes: Any) -> Any:
    torch.manual_seed(0)
    protocol = chapter.make_protocol("author", **changes)
    return protocol, chapter.ProtocolNet(channels, neurons, 1, 10, 8, protocol=protocol)


def train_author(data: Any, *callbacks: Callback, steps: int, **settings_: Any) -> Any:
    protocol, network = small_under()
    how = {"lr": 0.01, "steps": steps, "callbacks": callbacks} | settings_
    return network, chapter.fit_under(protocol, network, data, **how)


def test_the_rule_sees_every_step_the_last_layer_first_and_layers_grow_at_every_tenth(digits):
    calls = []

    def rule(layer, kind, h, step):
        calls.append((step, layer))
        return 1

    grow = chapter.GrowInTurn(rule)
    train_author(digits, grow, steps=22)
    assert calls == [(step, layer) for step in range(1, 23) for layer in (2, 1, 0)]
    assert grow.trace == [(0, [4] * 3), (1, [5] * 3), (11, [6] * 3), (21, [7] * 3)]
    calls.clear()
    train_author(digits, chapter.GrowInTurn(rule, each_step=False), steps=12)
    assert calls == [(step, layer) for step in (1, 11) for layer in (2, 1, 0)]


def test_a_layer_grows_to_its_widest_at_most(digits):
    grow = chapter.GrowInTurn(asks(9, 9, 9), widest=7, widest_fc=6)
    network, _ = train_author(digits, grow, steps=2)
    assert network.widths == [7, 7, 6]
    assert grow.cut is None


def test_the_limit_cuts_a_request_and_the_other_layers_may_grow_on(digits):
    _, network = small_under()
    room = chapter.count_weights(network) + 60  # for one neuron of the last layer, or of the first
    grow = chapter.GrowInTurn(asks(1, 0, 50), limit=room)
    network, _ = train_author(digits, grow, steps=2)
    assert chapter.count_weights(network) <= room
    assert grow.halted
    assert grow.cut == 1
    assert network.widths[2] > 4


@pytest.mark.parametrize(("step", "share"), [(1, 1), (2, 0.7443), (11, 0.4821)])
def test_the_first_step_of_a_weight_in_adam(step, share):
    """Against torch's Adam, with a gradient that is zero until this step."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    adam = torch.optim.Adam([weight], 0.01, eps=1e-30)
    for t in range(1, step + 1):
        weight.grad = torch.full_like(weight, float(t == step))
        adam.step()
    assert chapter.adam_first_step(step) == pytest.approx(-weight.item() / 0.01)
    assert chapter.adam_first_step(step) == pytest.approx(share, rel=1e-3)


def test_a_late_weights_first_step_in_adam_is_about_three_rates():
    assert chapter.adam_first_step(10_000) == pytest.approx(0.1 / math.sqrt(0.001), rel=1e-3)


def test_new_weights_share_adams_step_count(digits):
    """Outgoing weights are 0 when they come, so that they show their first step."""
    seen = Watch(lambda training: training.model.classifier.weight.detach().clone())
    grow = chapter.GrowInTurn(asks(0, 0, 3), every=5)
    train_author(digits, grow, seen, steps=7)  # grown after steps 1 and 6
    new = seen.seen[6][:, 7:10].abs()
    assert not seen.seen[5][:, 7:].any()
    moved = new[new > 1e-4]
    assert len(moved) > 20
    expected = torch.full_like(moved, 0.01 * chapter.adam_first_step(7))
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=0)


def test_an_incomplete_batch_is_used(digits):
    sizes = Watch(lambda training: len(training.labels))
    _, history = train_author(digits, sizes, steps=7)
    assert sizes.seen == [100, 100, 56, 100, 100, 56, 100]
    assert history.frame["step"].tolist() == [3, 6, 7]
    sizes.seen.clear()
    train_author(digits, sizes, steps=1000, epochs=2)
    assert sizes.seen == [100, 100, 56] * 2


def test_a_captured_step_needs_whole_batches(digits):
    with pytest.raises(ValueError, match="capture=True needs whole batches"):
        fit(ConvNet([4], (), 1, 10, 8), digits, epochs=1, drop_last=False, capture=True)


def test_the_papers_data_are_whole_batches():
    for images in (60_000, 60_000 * 4 // 5, 60_000 * 2 // 3):
        assert images % AUTHOR.batch_size == 0


def test_pixels_are_from_0_to_1_and_nothing_else(digits):
    pixels = chapter.prepare(digits, AUTHOR)
    assert torch.equal(pixels.normalize(digits.train_images), digits.train_images.float() / 255)
    assert chapter.prepare(digits, chapter.PROTOCOLS["book"]) is digits


def test_test_images_come_in_batches_of_100_that_are_normalised_by_themselves(digits):
    protocol, network = small_under()
    found = chapter.accuracy_under(protocol, network, digits)
    right = 0
    for x, y in zip(digits.test_images.split(100), digits.test_labels.split(100)):
        with torch.no_grad():
            right += int((network.train()(x.float() / 255).argmax(1) == y).sum())
    assert found == right / len(digits.test_labels)


@pytest.mark.parametrize("k", [3, 5])
def test_the_authors_folds_are_those_of_scikit_learn(k, monkeypatch):
    data, seen = load(MINI, device="cpu"), []
    labels = data.train_labels.numpy()
    split = StratifiedKFold(k, shuffle=True, random_state=42).split(labels, labels)

    def watched(protocol, network, images, **how):
        seen.append(images)
        raise KeyboardInterrupt

    monkeypatch.setattr(chapter, "fit_under", watched)
    for fold, (train_part, held) in enumerate(split):
        if k == 5:
            with pytest.raises(KeyboardInterrupt):
                chapter.train_under(**UNDER | {"fold": fold})
        else:
            seen.append(data.folds(3, 42)[fold])
        assert torch.equal(seen[-1].train_images, data.train_images[train_part])
        assert torch.equal(seen[-1].test_labels, data.train_labels[held])


@given(SEEDS, st.integers(1, 6), st.integers(1, 9), st.floats(0.05, 2))
@few(40)
def test_the_authors_epsilon_rank_divides_by_images(seed, images, pixels, epsilon):
    h = random_matrix(seed, images * pixels, 4)
    sigma = svd(h) / math.sqrt(images)
    assume(np.abs(sigma - epsilon).min() > 1e-6)
    found = chapter.epsilon_rank_by_images(tensor(h), images, epsilon)
    assert found == np.sum(sigma > epsilon)


UNDER = {"data": MINI, "protocol": "author", "epochs": 0.3, "lr": 0.01, "seed": 1, "fold": 1}
UNDER |= {"initial": [4, 4], "q": 0.5, "looks": 4}


@pytest.fixture(scope="module")
def under() -> dict:
    return chapter.train_under(**UNDER)


def test_a_training_under_the_authors_protocol_repeats_and_returns_json(under):
    assert json.loads(json.dumps(under, allow_nan=False)) == under
    assert lasting(chapter.train_under(**UNDER)) == lasting(under)
    assert under["channels"] != [4, 4]
    assert under["grown_steps"] == [0, 11]  # not at the first step, which the hold-off forbids
    assert under["rank_steps"] == [1, 3, 6, 9, 12, 15]
    assert len(under["eranks"]) == len(under["epsilon_ranks"]) == len(under["smooth_r"]) == 6
    network = chapter.ProtocolNet(under["channels"], protocol=AUTHOR)
    assert under["parameters"] == chapter.count_weights(network)
    table = chapter.growth_table(pd.DataFrame([UNDER | under | {"epochs": 1}]))
    assert table["width_1"][0] == under["channels"][0]


@pytest.mark.parametrize(
    "changed",
    [
        {"hold_off": False},
        {"each_step": False},
        {"optimizer": "sgd"},
        {"order": "BatchNorm first"},
        {"statistics": "running"},
        {"pixels": "standardised"},
        {"schedule": "cosine"},
        {"batch_size": 128},
        {"score": "normalised"},
        {"smoothing": 0.5},
        {"method": "north erank", "q": 1.0, "every": 1},
        {"limit": 2_250},
        {"fold": None},
    ],
    ids=str,
)
def test_each_setting_of_a_training_under_a_protocol_counts(under, changed):
    found = chapter.train_under(**UNDER | changed)
    assert found["stopped"] == "epochs"
    assert lasting(found) != lasting(under)
    if "limit" in changed:
        assert found["halted"]
        assert found["cut"] == 11
        assert found["parameters"] <= 2_250


def test_a_training_under_the_books_protocol_is_that_of_the_book():
    key = UNDER | {"protocol": "book", "lr": 0.05, "q": 1.0, "fold": 0}
    found = chapter.train_under(**key)
    torch.manual_seed(1)
    data = load(MINI).folds(5, 42)[0]
    history = fit(ConvNet([4, 4]), data, epochs=0.3, lr=0.05, seed=1)
    assert found["accuracy"] == history.final("eval_accuracy")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"protocol": "editor"}, "unknown protocol 'editor'"),
        ({"order": "pool first"}, "unknown order 'pool first'"),
        ({"method": "south"}, "unknown method 'south'"),
        ({"fold": 5}, "fold must .* 5"),
    ],
)
def test_a_training_under_a_protocol_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        chapter.train_under(**UNDER | wrong)


def test_a_setting_that_no_protocol_has_is_refused():
    with pytest.raises(ValueError, match="unknown setting of a protocol 'momentum'"):
        chapter.make_protocol("author", momentum=0.5)


def test_the_printed_incumbent_grows_within_its_limit_and_is_trained_again():
    key = chapter.EXPERIMENTS["author_final"].keys("quick")[1]
    found = chapter.train_final_under(**key | {"epochs": 0.25, "limit": 4_000})
    assert json.loads(found["config"]) == chapter.BERG
    assert len(found["channels"]) == 4
    assert found["halted"]
    assert found["parameters"] <= 4_000
    assert 0 < found["retrained_accuracy"] < 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found


SEARCH_UNDER = chapter.EXPERIMENTS["author_search"].keys("quick")[0]


def test_a_search_under_the_authors_protocol_counts_what_it_refused(monkeypatch):
    calls = []

    def error(config, budget, **how):
        calls.append((budget, how))
        return 1.5 if len(calls) == 2 else config["learning_rate"]

    monkeypatch.setattr(chapter, "cross_validated_error", error)
    monkeypatch.setattr(chapter, "code_version", lambda function: "test")
    found = chapter.search_under(**SEARCH_UNDER | {"trials": 6, "space": "static"})
    assert found["refused"] == 1
    assert found["budgets"].count(1) == 3
    assert json.loads(found["incumbent"])["learning_rate"] == found["incumbent_error"]
    assert calls[0][1]["folds"] == 2


def test_a_search_under_the_authors_protocol_tries_the_papers_configurations():
    keys = chapter.EXPERIMENTS["author_search"].keys("paper")
    for key, configurations in zip(keys, (60, 171), strict=True):
        trials = smac_search(
            SPACES[key["space"]](),
            lambda config, budget: config["learning_rate"],
            **{name: key[name] for name in ("min_budget", "max_budget", "eta", "trials")},
        )
        assert len({json.dumps(t.config, sort_keys=True) for t in trials}) == configurations
        assert {math.ceil(t.budget) for t in trials} == {4, 10}


def test_the_error_of_a_search_is_the_mean_over_folds_and_large_networks_are_refused():
    how = {"data": MINI, "protocol": "author", "folds": 2, "every": 1, "seed": 0}
    config = {"learning_rate": 0.01, "conv_layers": 2, "fc_layers": 0}
    config |= {"channels_1": 4, "channels_2": 4}
    error = chapter.cross_validated_error(config, 0.3, **how, limit=30_000)
    accuracies = []
    for k, images in enumerate(load(MINI).folds(2, 42)):
        torch.manual_seed(k)
        network = chapter.ProtocolNet([4, 4], protocol=AUTHOR)
        chapter.fit_under(AUTHOR, network, images, epochs=1, lr=0.01, seed=k)  # rounded up
        accuracies.append(chapter.accuracy_under(AUTHOR, network, images))
    assert error == pytest.approx(1 - np.mean(accuracies))
    weights = chapter.count_weights(network)
    assert chapter.cross_validated_error(config, 1, **how, limit=100) == weights / 100


def test_the_paper_profile_has_the_papers_runs():
    sweep = chapter.EXPERIMENTS["author_sweep"].keys("paper")
    assert len(sweep) == 5 * (8 + 1 + 1)
    thresholds = {key["q"] for key in sweep if key["initial"] == [8, 8, 8]}
    assert thresholds == {0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0}
    assert {(key["fold"], key["seed"]) for key in sweep} == {(k, k) for k in range(5)}
    final = chapter.EXPERIMENTS["author_final"].keys("paper")
    assert [key["arm"] for key in final].count("paper") == 10
    assert {key["limit"] for key in final} == {30_000}


# --- comparison -----------------------------------------------------------------------------------

MEASURES = st.lists(st.floats(0, 1).map(lambda x: round(x, 6)), min_size=2, max_size=12)


@given(MEASURES, MEASURES)
def test_the_z_test_is_that_of_statsmodels(a, b):
    assume(np.var(a) + np.var(b) > 0)
    _, p = CompareMeans(DescrStatsW(a), DescrStatsW(b)).ztest_ind(usevar="unequal")
    assert chapter.z_test(a, b) == pytest.approx(p, rel=1e-6, abs=1e-300)


def test_the_z_test_of_values_that_do_not_vary_is_certain():
    assert chapter.z_test([0.5, 0.5], [0.5, 0.5, 0.5]) == 1
    assert chapter.z_test([0.5, 0.5], [0.75, 0.75]) == 0


@pytest.mark.parametrize("few_values", [[], [0.5]])
def test_the_z_test_needs_two_values_of_each(few_values):
    for samples_ in ((few_values, [0.1, 0.2]), ([0.1, 0.2], few_values)):
        with pytest.raises(ValueError, match=re.escape(f"two values at least, got {few_values}")):
            chapter.z_test(*samples_)


# --- tables for claims ----------------------------------------------------------------------------


def test_a_table_of_growth_says_when_and_how_much_was_added():
    row = {
        "q": 0.8,
        "channels": [10, 14],
        "grown_steps": [0, 10, 30],
        "grown_widths": [[8, 8], [8, 11], [10, 14]],
        "halted": True,
        "epochs": 2,
        "rank_steps": [1, 20, 40],
        "eranks": [[4, 6], [4.4, 5.5], [5, 9]],
        "epsilon_ranks": [[8, 7], [8, 9], [6, 12]],
    }
    table = chapter.growth_table(pd.DataFrame([row, row | {"halted": False}]))
    first, second = table.iloc[0], table.iloc[1]
    assert first["slack"] == pytest.approx(0.2)
    assert (first["width_1"], first["width_2"], first["last_growth"]) == (10, 14, 30)
    assert first["limit_step"] == 30
    assert math.isnan(second["limit_step"])
    assert first["first_epoch"] == 3 / 8  # 3 of 8 neurons until step 20
    assert (first["r_1"], first["r_2"]) == pytest.approx((4.4 / 8, 5.5 / 11))
    assert (first["erank_change"], first["epsilon_change"]) == (1, -2)
    # floor(8 - 0.9 * 8) and floor(8 - 0.9 * 7)
    assert first["could_add"] == 1


def test_a_table_of_growth_leaves_out_what_does_not_grow():
    growing = {"grown_steps": [0, 10], "grown_widths": [[8], [9]], "channels": [9], "halted": False}
    static = dict.fromkeys(growing, math.nan)
    table = chapter.growth_table(pd.DataFrame([static, growing]))
    assert table["last_growth"].tolist() == [10]


def test_a_table_of_searches_counts_what_was_too_large_and_the_incumbents_size():
    static = {"learning_rate": 0.1, "conv_layers": 3, "fc_layers": 0}
    static |= {"channels_1": 16, "channels_2": 32, "channels_3": 64}
    rows = [
        {"incumbent": json.dumps(static), "losses": [0.2, 1.5, 7.0, 0.1]},
        {"incumbent": json.dumps(FOUND), "losses": [0.3, 0.2]},
    ]
    table = chapter.search_table(pd.DataFrame(rows))
    assert table["too_large"].tolist() == [0.5, 0]
    assert table["parameters"][0] == 29_178
    assert math.isnan(table["parameters"][1])
    assert table["q_conv"][1] == FOUND["q_conv"]


def test_every_recorded_pace_has_a_name():
    keys = chapter.EXPERIMENTS["paced"].keys("standard")
    table = chapter.pace_table(pd.DataFrame(keys))
    assert set(table["pace"]) == set(chapter.PACE_NAMES.values())
    assert set(table[table["growth"] == "early"]["pace"]) == {"early"}


def test_paces_without_variants_have_names_too():
    table = chapter.pace_table(pd.DataFrame([{"growth": "slow"}]))
    assert table["pace"].tolist() == ["slow"]


def test_scores_are_compared_on_a_trained_layer():
    key = {"data": MINI, "place": "output", "steps": 3, "seed": 0}
    found = chapter.compare_scores(**key)
    assert 0 <= found["same_best"] <= 10
    assert 0 <= found["same_best_share"] <= 10
    shares = {name: value for name, value in found.items() if "_with_" in name}
    assert all(-1 <= value <= 1 for value in shares.values())
    # what is a length goes with the length more than what is an angle
    assert found["residual_with_length"] > found["share_with_length"]
    assert found["svd_seconds"] > found["residual_seconds"] > 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# --- arguments ------------------------------------------------------------------------------------

WRONG_NUMBERS = {
    "rank": lambda: chapter.neurons_to_add_epsilon(NAN, 8, 8, 8),
    "first_rank": lambda: chapter.neurons_to_add_epsilon(8, -1, 8, 8),
    "n": lambda: chapter.neurons_to_add(0.5, NAN, 0.5),
    "q": lambda: chapter.neurons_to_add(0.5, 8, "high"),
    "the relative erank": lambda: chapter.neurons_to_add(None, 8, 0.5),
    "epsilon": lambda: chapter.epsilon_rank(torch.ones(3, 2), NAN),
    "k": lambda: chapter.select_candidates(torch.ones(3, 2), torch.ones(3, 4), 1.5),
    "every": lambda: chapter.Grow(chapter.EffectiveRank(0.5), every=2.5),
    "widest": lambda: chapter.Grow(chapter.EffectiveRank(0.5), widest=-1),
    "steps": lambda: chapter.GrowTo([8], [9], "slow", 60.5),
    "fold": lambda: chapter.train_growing(**GROWING | {"fold": 7}),
    "epochs": lambda: chapter.train_growing(**GROWING | {"epochs": NAN}),
    "trials": lambda: chapter.search_space(**SEARCH | {"trials": 0.5}),
    "values": lambda: chapter.z_test([0.1, NAN], [0.1, 0.2]),
}


@pytest.mark.parametrize("what", WRONG_NUMBERS)
def test_numbers_that_cannot_be_are_refused_in_one_line(what):
    with pytest.raises(ValueError, match=f"^{what} ") as caught:
        WRONG_NUMBERS[what]()
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 120
