"""The exported code of chapters/04_vmo.ipynb."""

import copy
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import SEEDS, few
from scipy import special, stats
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jahs_utils import evaluate, fit, load, load_chapter
from jahs_utils.device import NumberFormat
from jahs_utils.experiments import Results, describe_row, results_path
from jahs_utils.networks import ConvLayer, ConvNet, ResidualBlock, WideResNet, count_parameters

pytestmark = pytest.mark.usefixtures("on_the_cpu")
chapter = load_chapter("04_vmo")
NAN, INF = math.nan, math.inf
FLOAT64 = torch.float64
FORMAT = NumberFormat("float32", False)
# Of a test by samples: how often it would fail for right code if the seed were not fixed.
FALSE_ALARM = 1e-5


def random_numbers(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).uniform(size=shape))


def one_hot(size: int, of: int, dtype: torch.dtype = FLOAT64) -> Tensor:
    """The choice of a size, counted from 1."""
    return torch.eye(of, dtype=dtype)[size - 1]


def surprise(samples: Tensor, mean: Tensor) -> float:
    """p-value that independent samples have this mean (z-tests, Bonferroni)."""
    samples, mean = samples.detach().double().flatten(1), mean.double().flatten()
    errors = (samples.mean(0) - mean) / (samples.std(0) / len(samples) ** 0.5)
    return float(2 * stats.norm.sf(errors.abs()).min() * len(mean))


# --- sampling -------------------------------------------------------------------------------------

ANY = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))
INSIDE = st.floats(2**-10, 1 - 2**-10, width=32)
DTYPES = [FLOAT64, torch.float32, torch.bfloat16]


@st.composite
def draws(
    draw: st.DrawFn, most: float = 300, noise: st.SearchStrategy[float] = ANY
) -> tuple[Tensor, Tensor]:
    """Logits of any dtype, and uniform numbers; the extremes of both among them."""
    choices = draw(st.integers(1, 8))
    numbers = st.one_of(st.sampled_from([-most, most]), st.floats(-most, most, width=32))
    logits = draw(st.lists(numbers, min_size=choices, max_size=choices))
    inside = noise is INSIDE  # where ties would tell nothing
    u = draw(st.lists(noise, min_size=choices, max_size=choices, unique=inside))
    return torch.tensor(logits, dtype=draw(st.sampled_from(DTYPES))), torch.tensor(u)


def scores_of(logits: Tensor, u: Tensor) -> np.ndarray:
    """log phi plus Gumbel noise, by scipy."""
    return special.log_softmax(logits.double().numpy(), -1) + stats.gumbel_r.ppf(u.double().numpy())


@given(draws(), st.floats(1e-6, 10))
@few(60)
def test_a_concrete_sample_is_in_the_simplex(drawn, temperature):
    found = chapter.sample_concrete(drawn[0], temperature, drawn[1])
    assert found.shape == drawn[0].shape
    assert ((found >= 0) & (found <= 1)).all()
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


@given(draws())
@few(60)
def test_a_hard_sample_is_a_corner_of_the_simplex(drawn):
    found = chapter.sample_hard(*drawn)
    assert found.shape == drawn[0].shape
    assert sorted(found.tolist()) == [0.0] * (len(found) - 1) + [1.0]


@given(draws(), st.sampled_from([1e-6, 1e-3, 1.0]))
@few(60)
def test_the_gradient_of_a_concrete_sample_is_finite(drawn, temperature):
    logits = drawn[0].requires_grad_()
    found = chapter.sample_concrete(logits, temperature, drawn[1])
    found[0].backward()
    assert torch.isfinite(logits.grad).all()


def test_a_temperature_below_the_smallest_float32_gives_a_finite_sample():
    found = chapter.sample_concrete(torch.zeros(3), 1e-50, torch.tensor([0.2, 0.5, 0.7]))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_computed_in_float32_at_least(dtype):
    expected = FLOAT64 if dtype is FLOAT64 else torch.float32
    logits, u = torch.zeros(3, dtype=dtype), torch.full((3,), 0.5, dtype=dtype)
    assert chapter.sample_concrete(logits, 0.5, u).dtype == expected
    assert chapter.sample_hard(logits, u).dtype == expected


@given(SEEDS, st.floats(0.05, 10))
@few(50)
def test_a_concrete_sample_is_scipys_softmax_of_gumbel_scores(seed, temperature):
    logits, u = 3 * random_numbers(seed, 4, 6), uniform(seed + 1, 4, 6)
    expected = special.softmax(scores_of(logits, u) / temperature, -1)
    found = chapter.sample_concrete(logits, temperature, u)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@given(draws(10, INSIDE))
@few(60)
def test_a_hard_sample_is_at_the_largest_gumbel_score(drawn):
    scores = scores_of(*drawn)
    assume(len(scores) == 1 or np.diff(np.sort(scores))[-1] > 1e-3)
    assert int(chapter.sample_hard(*drawn).argmax()) == scores.argmax()


@given(draws(10, INSIDE))
@few(60)
def test_as_the_temperature_falls_a_concrete_sample_approaches_the_hard_one(drawn):
    scores = np.sort(scores_of(*drawn))
    assume(len(scores) == 1 or np.diff(scores)[-1] > 1e-3)
    hard = chapter.sample_hard(*drawn)
    soft = [chapter.sample_concrete(drawn[0], t, drawn[1]) for t in (10, 1, 0.1, 1e-2, 1e-6)]
    gaps = [float((s - hard).abs().max()) for s in soft]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(gaps))
    assert gaps[-1] < 1e-6


PROBABILITIES = torch.tensor([0.01, 0.09, 0.2, 0.3, 0.4], dtype=FLOAT64)
SAMPLES = 40_000
# The chi-square test finds frequencies that are off by 5 % of themselves, half of them up and half
# down (w = 0.05), in all but 1e-4 of its runs.
POWER = float(stats.ncx2.sf(stats.chi2.isf(FALSE_ALARM, df=4), df=4, nc=SAMPLES * 0.05**2))


def categorical_p(hard: Tensor) -> float:
    counts = hard.sum(0).numpy()
    return float(stats.chisquare(counts, SAMPLES * PROBABILITIES.numpy()).pvalue)


def test_hard_samples_have_the_frequencies_of_the_categorical_distribution():
    assert POWER > 1 - 1e-4
    u = uniform(0, SAMPLES, 5)
    hard = chapter.sample_hard(PROBABILITIES.log().expand(SAMPLES, 5), u)
    assert categorical_p(hard) > FALSE_ALARM


def test_the_largest_entries_of_concrete_samples_have_these_frequencies_too():
    logits = PROBABILITIES.float().log().expand(SAMPLES, 5) + 17  # a constant changes nothing
    soft = chapter.sample_concrete(logits, 2.0, uniform(1, SAMPLES, 5).float())
    assert categorical_p(F.one_hot(soft.argmax(-1), 5).double()) > FALSE_ALARM


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_the_log_odds_of_two_concrete_entries_are_logistic(temperature):
    logits = torch.tensor([0.7, -0.4], dtype=FLOAT64)
    u = 0.001 + 0.998 * uniform(2, 5000, 2)  # so that no log of 0 is taken
    soft = chapter.sample_concrete(logits.expand(5000, 2), temperature, u)
    odds = temperature * (soft[:, 0].log() - soft[:, 1].log())
    odds = odds[torch.isfinite(odds)]
    assert stats.kstest(odds.numpy() - 1.1, "logistic").pvalue > FALSE_ALARM


SAMPLERS = {
    "concrete": lambda logits, u: chapter.sample_concrete(logits, 0.5, u),
    "hard": chapter.sample_hard,
}


@pytest.mark.parametrize("temperature", [0, -1, NAN, INF])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature .* got {temperature}"):
        chapter.sample_concrete(torch.zeros(3), temperature, torch.rand(3))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_logits_that_are_not_finite_are_refused(sampler, value):
    with pytest.raises(ValueError, match=rf"logits must be finite.*{value}"):
        SAMPLERS[sampler](torch.tensor([0.0, value]), torch.rand(2))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_logits_without_choices_are_refused_with_their_shape(sampler, shape):
    with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
        SAMPLERS[sampler](torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize("value", [-0.25, 1.5, NAN])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_that_is_not_from_0_to_1_is_refused(sampler, value):
    with pytest.raises(ValueError, match=f"u must be from 0 to 1.*{value}"):
        SAMPLERS[sampler](torch.zeros(2), torch.tensor([0.5, value]))


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, *DTYPES])
def test_the_mask_of_a_width_is_that_many_ones(dtype):
    for full in range(1, 41):
        masks = chapter.width_mask(torch.eye(full, dtype=dtype))
        for width, mask in enumerate(masks.tolist(), start=1):
            assert mask == [1] * width + [0] * (full - width)


@given(SEEDS, st.integers(1, 40), st.floats(0.01, 5))
@few(50)
def test_soft_masks_fall_from_1(seed, full, temperature):
    choice = (random_numbers(seed, 3, full) / temperature).softmax(-1)
    mask = chapter.width_mask(choice)
    assert mask[:, 0].numpy() == pytest.approx(np.ones(3))
    assert (mask.diff() <= 0).all()
    assert (mask >= 0).all()


@given(SEEDS, st.integers(1, 40))
@few(50)
def test_a_channel_is_on_with_the_probability_of_its_width_or_a_larger_one(seed, full):
    choice = random_numbers(seed, full).softmax(-1)
    expected = [sum(choice[i:].tolist()) for i in range(full)]
    assert chapter.width_mask(choice).tolist() == pytest.approx(expected)


@given(SEEDS, st.integers(1, 40))
@few(50)
def test_the_expected_size_is_the_sum_of_the_mask(seed, full):
    choice = random_numbers(seed, 2, full).softmax(-1)
    expected = chapter.width_mask(choice).sum(-1)
    np.testing.assert_allclose(chapter.expected_size(choice), expected)


def test_the_size_of_a_one_hot_choice_is_what_it_stands_for():
    assert chapter.expected_size(torch.eye(7)).tolist() == [1, 2, 3, 4, 5, 6, 7]


NO_CHOICES = {
    "zero": [0.0, 0.0, 0.0],
    "negative": [1.25, 0.5, -0.75],
    "too much": [1.0, 0.25, 0.0],
    "too little": [0.5, 0.25, 0.0],
    "empty": [],
}


@pytest.mark.parametrize("wrong", NO_CHOICES.values(), ids=NO_CHOICES)
def test_what_is_no_choice_has_no_mask(wrong):
    with pytest.raises(ValueError, match=re.escape(f"adds up to 1, got {wrong}")):
        chapter.width_mask(torch.tensor(wrong))


def test_a_choice_of_nan_has_no_mask():
    with pytest.raises(ValueError, match="adds up to 1"):
        chapter.width_mask(torch.tensor([NAN, NAN]))


def test_no_choices_at_all_have_no_masks():
    with pytest.raises(ValueError, match="adds up to 1"):
        chapter.width_mask(torch.zeros(0, 3))


@given(SEEDS, st.integers(1, 6))
@few(50)
def test_the_chosen_depth_gives_the_outputs(seed, depths):
    outputs = [*random_numbers(seed, depths, 5, 3)]
    for depth, expected in enumerate(outputs, start=1):
        found = chapter.choose_depth(one_hot(depth, depths), outputs)
        assert torch.equal(found, expected)


@given(SEEDS, st.integers(1, 6))
@few(50)
def test_a_relaxed_depth_gives_the_mean_of_the_outputs(seed, depths):
    choice, outputs = random_numbers(seed, depths).softmax(-1), random_numbers(seed, depths, 5, 3)
    found = chapter.choose_depth(choice, [*outputs])
    np.testing.assert_allclose(found, np.average(outputs, axis=0, weights=choice))


@pytest.mark.parametrize("outputs", [0, 2, 4])
def test_other_than_an_output_for_each_depth_is_refused(outputs):
    with pytest.raises(ValueError, match=f"3 depths to choose from, {outputs} outputs"):
        chapter.choose_depth(one_hot(1, 3), [torch.zeros(5, 2)] * outputs)


# --- estimators -----------------------------------------------------------------------------------

LOSSES = torch.tensor([2.0, 0.5, 1.2, 0.1], dtype=FLOAT64)
TABLE = torch.tensor([[1.0, -2.0, 4.0], [3.0, -1.0, 0.5]], dtype=FLOAT64)


def bumpy(choice: Tensor) -> Tensor:
    """A loss of one choice among four that is not linear between them."""
    return (choice @ LOSSES.to(choice) - 0.3) ** 2


def joint(choice: Tensor) -> Tensor:
    """A loss of two choices among three that is no sum over them."""
    a, b = (choice * TABLE.to(choice)).sum(-1).unbind(-1)
    return a * b + b.sin()


PROBLEMS = {
    "one": (bumpy, torch.tensor([0.4, -0.3, 0.8, 0.1], dtype=FLOAT64)),
    "two": (joint, torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.9, -0.6]], dtype=FLOAT64)),
}
SHAPES = {"one": (4,), "two": (2, 3), "three": (3, 2), "grid": (2, 2, 2)}


def enumerated(objective: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The expectation of an objective, one choice after the other."""
    *variables, sizes = logits.shape
    q = logits.softmax(-1).view(-1, sizes)
    total = torch.zeros((), dtype=logits.dtype)
    for picks in itertools.product(range(sizes), repeat=len(q)):
        probability = math.prod(q[i, k] for i, k in enumerate(picks))
        choice = torch.eye(sizes, dtype=logits.dtype)[list(picks)].view(1, *variables, sizes)
        total = total + probability * objective(choice)[0]
    return total


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@given(seed=SEEDS)
@few(10)
def test_the_exact_gradient_is_that_of_the_enumerated_expectation(shape, seed):
    weights = random_numbers(seed, math.prod(shape), 2)
    logits = random_numbers(seed + 1, *shape).requires_grad_()

    def objective(choice: Tensor) -> Tensor:
        a, b = (choice.flatten(1) @ weights).unbind(-1)
        return a**2 + (a * b).sin()

    (expected,) = torch.autograd.grad(enumerated(objective, logits), logits)
    found = chapter.exact_gradient(objective, logits)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    direction = random_numbers(seed + 2, *shape)
    with torch.no_grad():
        above, below = (enumerated(objective, logits + e * direction) for e in (1e-5, -1e-5))
    slope = float((above - below) / 2e-5)
    assert float((found * direction).sum()) == pytest.approx(slope, abs=1e-7)


def noise_of(samples: int, logits: Tensor, seed: int = 0) -> Tensor:
    return uniform(seed, 2, samples, *logits.shape)


@functools.cache
def tuned(name: str) -> nn.Module:
    """A surrogate after some steps of its training."""
    objective, logits = PROBLEMS[name]
    torch.manual_seed(0)
    surrogate = chapter.Surrogate(objective, logits.shape)
    generator = torch.Generator().manual_seed(0)
    chapter.tune_surrogate(surrogate, objective, logits.float(), 60, generator, 32)
    return surrogate.double()


def wavy(scores: Tensor) -> Tensor:
    """A control variate that has nothing to do with the objective."""
    return scores.flatten(1).sin().sum(1)


# each: (objective, logits, u, v) to gradients, with what the unbiased ones must not depend on
UNBIASED = {
    "score function": lambda f, logits, u, v: chapter.score_function(f, logits, u),
    "baseline": lambda f, logits, u, v: chapter.score_function(f, logits, u, 1.5),
    "rebar, t = 0.1": lambda *problem: chapter.rebar(*problem, 0.1),
    "rebar, t = 1": lambda *problem: chapter.rebar(*problem, 1.0),
    "rebar, strength": lambda *problem: chapter.rebar(*problem, 0.5, 0.3),
    "any surrogate": lambda *problem: chapter.rebar(*problem, 1.0, surrogate=wavy),
}
BIASED = {
    "concrete": lambda f, logits, u, v: chapter.concrete_gradient(f, logits, u, 0.5),
    "straight-through": lambda f, logits, u, v: chapter.straight_through(f, logits, u, 0.5),
}


def p_of(estimator: Callable, name: str, samples: int = 20_000) -> float:
    """p-value that an estimator is unbiased on a problem.

    20,000 samples show a bias of 0.05 standard deviations of one in 98 % of the runs.
    """
    objective, logits = PROBLEMS[name]
    found = estimator(objective, logits, *noise_of(samples, logits))
    assert found.shape == (samples, *logits.shape)
    return surprise(found, chapter.exact_gradient(objective, logits))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("estimator", UNBIASED)
def test_unbiased_estimators_have_the_exact_mean(estimator, problem):
    assert p_of(UNBIASED[estimator], problem) > FALSE_ALARM


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("estimator", BIASED)
def test_biased_estimators_have_another_mean(estimator, problem):
    assert p_of(BIASED[estimator], problem) < 1e-9


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_trained_surrogate_leaves_rebar_unbiased(problem):
    surrogate = tuned(problem)
    p = p_of(lambda *given: chapter.rebar(*given, 1.0, surrogate=surrogate), problem)
    assert p > FALSE_ALARM


@pytest.mark.parametrize("problem", PROBLEMS)
def test_tuning_lowers_the_variance_of_a_surrogate(problem):
    objective, logits = PROBLEMS[problem]
    torch.manual_seed(0)
    before = chapter.Surrogate(objective, logits.shape).double()
    variances = [
        chapter.rebar(objective, logits, *noise_of(5000, logits), 1.0, surrogate=surrogate)
        .detach()
        .var(0)
        .sum()
        for surrogate in (before, tuned(problem))
    ]
    assert variances[1] < 0.97 * variances[0]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_control_variates_lower_the_variance(problem):
    objective, logits = PROBLEMS[problem]
    u, v = noise_of(5000, logits)
    plain = chapter.score_function(objective, logits, u).var(0).sum()
    assert chapter.rebar(objective, logits, u, v, 1.0).detach().var(0).sum() < 0.9 * plain


@given(SEEDS, st.sampled_from(list(PROBLEMS)), st.floats(0.1, 2))
@few(20)
def test_rebar_without_strength_is_the_score_function(seed, problem, temperature):
    objective, logits = PROBLEMS[problem]
    u, v = noise_of(10, logits, seed)
    found = chapter.rebar(objective, logits, u, v, temperature, strength=0.0).detach()
    expected = chapter.score_function(objective, logits, u)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@given(SEEDS)
@few(20)
def test_the_score_function_is_the_value_times_the_gradient_of_log_q(seed):
    objective, logits = PROBLEMS["two"]
    u = uniform(seed, 5, *logits.shape)
    found = chapter.score_function(objective, logits, u, 0.7)
    hard = chapter.sample_hard(logits.expand_as(u), u)
    for sample, gradient in zip(hard, found):
        given = logits.clone().requires_grad_()
        q = torch.distributions.OneHotCategorical(logits=given)
        (slope,) = torch.autograd.grad(q.log_prob(sample).sum(), given)
        gain = objective(sample[None]) - 0.7
        np.testing.assert_allclose(gradient, gain * slope, rtol=0, atol=1e-12)


@given(SEEDS, st.floats(0.2, 3))
@few(20)
def test_the_concrete_gradient_is_the_slope_of_the_relaxed_objective(seed, temperature):
    objective, logits = PROBLEMS["two"]
    u = 0.05 + 0.9 * uniform(seed, 1, *logits.shape)
    found = chapter.concrete_gradient(objective, logits, u, temperature)
    direction = random_numbers(seed, *logits.shape)
    above, below = (
        objective(chapter.sample_concrete((logits + e * direction)[None], temperature, u))
        for e in (1e-5, -1e-5)
    )
    slope = float((above - below) / 2e-5)
    assert float((found[0] * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-5)


@given(SEEDS)
@few(20)
def test_straight_through_takes_the_slope_of_the_objective_at_a_hard_sample(seed):
    logits = PROBLEMS["one"][1]
    u = uniform(seed, 6, 4)
    seen = []

    def objective(choice: Tensor) -> Tensor:
        seen.append(choice.detach())
        return bumpy(choice)

    found = chapter.straight_through(objective, logits, u, 0.5)
    hard = chapter.sample_hard(logits.expand_as(u), u)
    np.testing.assert_allclose(seen[0], hard, atol=1e-12)
    gains = 2 * (hard @ LOSSES - 0.3)

    def linear(choice: Tensor) -> Tensor:
        return (choice @ LOSSES) * gains

    expected = chapter.concrete_gradient(linear, logits, u, 0.5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@given(SEEDS, st.integers(1, 6), st.floats(0.1, 5))
@few(50)
def test_conditional_scores_are_largest_at_the_choice(seed, choices, spread):
    logits = spread * random_numbers(seed, 20, choices)
    hard = torch.eye(choices, dtype=FLOAT64)[torch.arange(20) % choices]
    v = 0.001 + 0.998 * uniform(seed + 1, 20, choices)
    found = chapter.conditional_scores(logits, hard, v)
    assert torch.isfinite(found).all()
    assert torch.equal(found.argmax(-1), hard.argmax(-1))


STATISTICS = {
    "first": lambda scores: scores[:, 0],
    "second": lambda scores: scores[:, 1],
    "third": lambda scores: scores[:, 2],
    "largest": lambda scores: scores.amax(1),
    "difference": lambda scores: scores[:, 0] - scores[:, 2],
    "lead": lambda scores: scores.sort(1).values.diff()[:, -1],
}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_conditional_scores_of_drawn_choices_are_distributed_as_free_ones(statistic):
    logits = torch.tensor([1.0, 0.0, -1.5], dtype=FLOAT64).expand(20_000, 3)
    u, v, other = uniform(5, 3, 20_000, 3)
    tied = chapter.conditional_scores(logits, chapter.sample_hard(logits, u), v)
    free = torch.tensor(scores_of(logits, other))
    p = stats.ks_2samp(*(STATISTICS[statistic](scores).numpy() for scores in (tied, free))).pvalue
    assert p > FALSE_ALARM


@pytest.mark.parametrize("gap", [50.0, 200.0])
def test_rebar_is_finite_where_the_distribution_is_certain(gap):
    logits = torch.tensor([gap, 0.0, 0.0, 0.0])
    found = chapter.rebar(bumpy, logits, *noise_of(10, logits).float(), 0.5)
    assert torch.isfinite(found).all()


# --- supernets ------------------------------------------------------------------------------------


def settle(net: nn.Module, channels: int, seed: int, image_size: int = 8) -> nn.Module:
    """Train a supernet in float64 on noise, with all choices relaxed."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.double().train().parameters(), lr=0.05)
    for _ in range(3):
        images = 1 + torch.randn(8, channels, image_size, image_size, generator=rng, dtype=FLOAT64)
        depth = torch.rand(len(net.blocks), generator=rng, dtype=FLOAT64).softmax(0)
        widths = [torch.rand(b.width, generator=rng, dtype=FLOAT64).softmax(0) for b in net.blocks]
        labels = torch.randint(4, (8,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(net(images, depth, widths), labels).backward()
        optimizer.step()
    return net


@functools.cache
def settled(kind: str, sizes: tuple[int, ...], channels: int, seed: int = 0) -> nn.Module:
    """A supernet of a ConvNet of these channels, or of a Wide ResNet of (depth, factor)."""
    torch.manual_seed(seed)
    if kind == "convnet":
        net = chapter.of_convnet(ConvNet(sizes, (), channels, 4, 8), 8)
    else:
        net = chapter.of_wide_resnet(WideResNet(*sizes, in_channels=channels, classes=4), 8)
    return settle(net, channels, seed)


NETS = [
    ("convnet", (5,), 1),
    ("convnet", (4, 6), 3),
    ("convnet", (6, 3, 5), 1),
    ("wrn", (10, 1), 3),
    ("wrn", (10, 2), 1),
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, int, list[int], Tensor]:
    """A settled supernet, one depth and widths of all its blocks, and images."""
    kind, sizes, channels = draw(st.sampled_from(NETS))
    net = settled(kind, sizes, channels)
    depth = draw(st.integers(1, len(net.blocks)))
    widths = [draw(st.integers(1, block.width)) for block in net.blocks]
    return net, depth, widths, random_numbers(draw(st.integers(0, 99)), 3, channels, 8, 8)


def choices_of(net: nn.Module, depth: int, widths: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Depth and widths of all blocks, one-hot."""
    full = [block.width for block in net.blocks]
    return one_hot(depth, len(full)), [one_hot(k, of) for k, of in zip(widths, full)]


def test_training_has_moved_the_statistics_of_every_settled_network():
    for kind, sizes, channels in NETS:
        norms = [
            m for m in settled(kind, sizes, channels).modules() if isinstance(m, nn.BatchNorm2d)
        ]
        assert norms
        assert all(norm.running_mean.abs().max() > 0.01 for norm in norms)
        assert all((norm.running_var - 1).abs().max() > 0.01 for norm in norms)
        assert all((norm.weight - 1).abs().max() > 0 for norm in norms)


@given(cases())
@few(40)
def test_the_network_cut_out_computes_what_the_masked_one_does(case):
    net, depth, widths, images = case
    small = chapter.cut_out(net.eval(), depth, widths[:depth])
    with torch.no_grad():
        expected = net(images, *choices_of(net, depth, widths))
        np.testing.assert_allclose(small(images), expected, rtol=0, atol=1e-9)
    assert not small.training


@given(cases())
@few(15)
def test_so_it_does_in_training(case):
    net, depth, widths, images = case
    net = copy.deepcopy(net).train()
    small = chapter.cut_out(net, depth, widths[:depth])
    expected = net(images, *choices_of(net, depth, widths))
    np.testing.assert_allclose(small(images).detach(), expected.detach(), rtol=0, atol=1e-9)
    assert small.training


@given(cases())
@few(20)
def test_the_network_cut_out_is_an_ordinary_one(case):
    net, depth, widths, _ = case
    small = chapter.cut_out(net, depth, widths[:depth])
    kinds = {type(module) for module in small.modules()}
    masked = {chapter.MaskedLayer, chapter.MaskedBlock, chapter.Supernet, chapter.Choice}
    assert not kinds & masked
    assert sum(isinstance(m, ConvLayer | ResidualBlock) for m in small.modules()) == depth
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            expected = (module.out_channels, module.in_channels)
            assert module.weight.shape[:2] == expected
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var.shape == module.weight.shape == (module.num_features,)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in small.parameters())


@given(st.data())
@few(20)
def test_a_convnet_cut_out_has_the_parameters_of_its_sizes(data):
    net = settled("convnet", (6, 3, 5), 1)
    depth = data.draw(st.integers(1, 3))
    widths = [data.draw(st.integers(1, k)) for k in (6, 3, 5)[:depth]]
    pairs = itertools.pairwise([1, *widths])
    expected = sum(9 * a * b + 2 * b for a, b in pairs) + 4 * widths[-1] + 4
    small = chapter.cut_out(net, depth, widths)
    assert count_parameters(small) == expected < count_parameters(net)


@given(st.integers(1, 3), st.integers(1, 16), st.integers(1, 32))
@few(15)
def test_a_wide_resnet_cut_out_loses_the_weights_of_its_inner_channels(depth, first, second):
    net = settled("wrn", (10, 1), 3)
    full = chapter.cut_out(net, depth, [16, 32, 64][:depth])
    small = chapter.cut_out(net, depth, [first, second, 64][:depth])
    # a channel inside has its weights in two convolutions, and two of BatchNorm
    lost = (16 - first) * (9 * 32 + 2) + (32 - second) * (9 * 48 + 2) * (depth > 1)
    assert count_parameters(full) - count_parameters(small) == lost
    assert count_parameters(small) < count_parameters(net)


def memory_of(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in module.state_dict().values()}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def is_unchanged(module: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def one_step(module: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.train()(images).square().mean().backward()
    optimizer.step()


@given(cases())
@few(15)
def test_training_the_network_cut_out_leaves_its_parent_alone_and_the_other_way_round(case):
    net, depth, widths, images = case
    net = copy.deepcopy(net)
    before = state_of(net)
    small = chapter.cut_out(net, depth, widths[:depth])
    assert is_unchanged(net, before)
    assert not memory_of(net) & memory_of(small)
    cut = state_of(small)
    one_step(small, images)
    assert not is_unchanged(small, cut)
    assert is_unchanged(net, before)
    trained = state_of(small)
    one_step(net, images)
    assert not is_unchanged(net, before)
    assert is_unchanged(small, trained)


@pytest.mark.parametrize("depth", [-1, 0, 4])
def test_a_depth_that_the_supernet_does_not_have_is_refused(depth):
    net = settled("convnet", (6, 3, 5), 1)
    with pytest.raises(ValueError, match=f"depth must be from 1 to 3, got {depth}"):
        chapter.cut_out(net, depth, [1] * max(depth, 0))


@pytest.mark.parametrize(("widths", "full", "wrong"), [([0, 1], 6, 0), ([6, 4], 3, 4)])
def test_a_width_that_a_block_does_not_have_is_refused(widths, full, wrong):
    net = settled("convnet", (6, 3, 5), 1)
    with pytest.raises(ValueError, match=f"width must be from 1 to {full}, got {wrong}"):
        chapter.cut_out(net, 2, widths)


@pytest.mark.parametrize("widths", [[], [1], [1, 1, 1]])
def test_other_than_one_width_for_each_block_is_refused(widths):
    net = settled("convnet", (6, 3, 5), 1)
    with pytest.raises(ValueError, match=re.escape(f"2 blocks need 2 widths, got {widths}")):
        chapter.cut_out(net, 2, widths)


def test_a_supernet_needs_a_classifier_on_every_block():
    net = settled("convnet", (6, 3, 5), 1)
    blocks, heads = [*net.blocks], [*net.heads]
    for wrong in ((blocks, heads[:2]), (blocks[:2], heads), ([], [])):
        with pytest.raises(ValueError, match=f"{len(wrong[0])} blocks .* got {len(wrong[1])}"):
            chapter.Supernet(nn.Identity(), *wrong)


@pytest.mark.parametrize("kernels", [(3,), (3, 3, 3)])
def test_blocks_of_other_than_two_convolutions_are_refused(kernels):
    network = WideResNet(10, 1, kernels)
    with pytest.raises(ValueError, match=f"two convolutions, got {len(kernels)}"):
        chapter.of_wide_resnet(network, 8)


def test_a_supernet_without_choices_is_the_convnet_it_was_made_of():
    torch.manual_seed(0)
    network = ConvNet((4, 5, 6), (), 1, 4, 8)  # its last layer gives one pixel
    net = chapter.of_convnet(network, 8)
    net.heads[-1][-1].load_state_dict(network.classifier.state_dict())
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(net.eval()(images), network.eval()(images))


def test_a_supernet_without_choices_is_the_wide_resnet_it_was_made_of():
    torch.manual_seed(0)
    network = WideResNet(16, 1, in_channels=1, classes=4)
    net = chapter.of_wide_resnet(network, 8)
    net.heads[-1][0].load_state_dict(network.norm.state_dict())
    net.heads[-1][-1].load_state_dict(network.classifier.state_dict())
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(net.eval()(images), network.eval()(images))


@given(cases())
@few(15)
def test_all_sizes_at_their_largest_are_the_same_as_no_choice(case):
    net, _, _, images = case
    full = [block.width for block in net.blocks]
    with torch.no_grad():
        expected = net.eval()(images)
        found = net(images, *choices_of(net, len(full), full))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


# --- models with distributions --------------------------------------------------------------------

KINDS = {"joint": chapter.JointVMO, "depth": chapter.DepthVMO, "width": chapter.WidthVMO}


def vmo_of(net: nn.Module, kind: str = "joint", seed: int | None = None, **options) -> nn.Module:
    """A model around a copy of a supernet, in float64; with a seed, its logits are random."""
    model = KINDS[kind](copy.deepcopy(net), **options).double()
    for number, choice in enumerate(model.choices):
        if seed is not None:
            choice.position.data = random_numbers(seed + number, len(choice.position))
    return model


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases(), seed=st.integers(0, 10**6))
@few(12)
def test_what_is_extracted_computes_what_the_model_does(kind, case, seed):
    net, _, _, images = case
    model = vmo_of(net, kind, seed).eval()
    small = model.extract()
    with torch.no_grad():
        np.testing.assert_allclose(small(images), model(images), rtol=0, atol=1e-9)
    assert not memory_of(model) & memory_of(small)
    assert count_parameters(small) < count_parameters(model)


@pytest.mark.parametrize("kind", KINDS)
@given(case=cases())
@few(12)
def test_the_most_probable_sizes_are_extracted(kind, case):
    net, depth, widths, images = case
    model = vmo_of(net, kind).eval()
    full = [block.width for block in net.blocks]
    sizes = [depth] * (kind != "width") + widths * (kind != "depth")
    for choice, size in zip(model.choices, sizes, strict=True):
        choice.position.data[size - 1] = 0.5
    depth = len(full) if kind == "width" else depth
    widths = full if kind == "depth" else widths
    assert model.choices.best() == (depth, widths[:depth])
    expected = chapter.cut_out(net.eval(), depth, widths[:depth])
    with torch.no_grad():
        np.testing.assert_allclose(model(images), expected(images), rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "sizes"), [("convnet", (6, 3, 5)), ("wrn", (10, 1))])
def test_without_a_choice_of_depth_no_inner_classifier_is_used(name, sizes, training):
    model = vmo_of(settled(name, sizes, 1), "width").train(training)
    for head in model.net.heads[:-1]:
        head.forward = None  # to call it is an error
    model(random_numbers(0, 3, 1, 8, 8)).sum().backward()
    assert all(p.grad is None for head in model.net.heads[:-1] for p in head.parameters())
    assert all(p.grad is not None for p in model.net.heads[-1].parameters())


def test_in_training_choices_are_sampled_and_evaluated_they_are_not():
    model, images = vmo_of(settled("convnet", (6, 3, 5), 1)), random_numbers(0, 3, 1, 8, 8)
    torch.manual_seed(0)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("option", ["size", "estimator"])
def test_an_unknown_option_is_refused_with_its_name(option):
    with pytest.raises(ValueError, match=f"unknown {option} 'best'"):
        chapter.JointVMO(settled("convnet", (5,), 1), **{option: "best"})


@given(SEEDS, st.floats(0.1, 20))
@few(50)
def test_logits_are_speed_times_the_parameter(seed, speed):
    choice = chapter.Choice(5, speed).double()
    assert choice.logits.tolist() == [0] * 5
    choice.position.data = random_numbers(seed, 5)
    np.testing.assert_allclose(choice.logits.detach(), speed * choice.position.detach())
    assert choice.entropy() == pytest.approx(
        stats.entropy(special.softmax(speed * choice.position.detach().numpy())), abs=1e-5
    )


# --- sizes ----------------------------------------------------------------------------------------


def conv_weights(blocks: Sequence[nn.Module]) -> int:
    return sum(
        module.weight.numel()
        for block in blocks
        for module in block.modules()
        if isinstance(module, nn.Conv2d)
    )


@given(cases())
@few(40)
def test_the_weights_of_a_choice_are_those_of_the_convolutions_cut_out(case):
    net, depth, widths, _ = case
    _, *blocks, _ = chapter.cut_out(net, depth, widths[:depth])
    found = chapter.weights_used(net, *choices_of(net, depth, widths))
    assert float(found) == conv_weights(blocks)


@pytest.mark.parametrize(("kind", "sizes"), [("convnet", (3, 5, 4)), ("wrn", (10, 1))])
@given(data=st.data(), side=st.integers(8, 17))
@few(20)
def test_the_operations_of_a_choice_are_those_that_torch_counts(kind, sizes, data, side):
    with torch.device("meta"):
        if kind == "convnet":
            net = chapter.of_convnet(ConvNet(sizes, (), 3, 4, side), side)
        else:
            net = chapter.of_wide_resnet(WideResNet(*sizes), side)
    depth = data.draw(st.integers(1, 3))
    widths = [data.draw(st.integers(1, block.width)) for block in net.blocks]
    stem, *blocks, _ = chapter.cut_out(net.eval(), depth, widths[:depth])
    given_to_blocks = stem(torch.empty(1, 3, side, side, device="meta"))
    with FlopCounterMode(display=False) as counter:
        nn.Sequential(*blocks)(given_to_blocks)
    found = chapter.weights_used(net, *choices_of(net, depth, widths), operations=True)
    assert float(found) == counter.get_total_flops() / 2


@pytest.mark.parametrize("operations", [False, True])
@given(seed=SEEDS)
@few(8)
def test_relaxed_choices_use_the_expected_number_of_weights(operations, seed):
    net = settled("convnet", (4, 3), 1, 1)
    depth, *widths = (random_numbers(seed + k, k).softmax(0) for k in (2, 4, 3))
    expected = sum(
        float(depth[d - 1] * widths[0][a - 1] * widths[1][b - 1])
        * float(chapter.weights_used(net, *choices_of(net, d, (a, b)), operations))
        for d, a, b in itertools.product((1, 2), range(1, 5), range(1, 4))
    )
    assert float(chapter.weights_used(net, depth, widths, operations)) == pytest.approx(expected)


@given(cases())
@few(10)
def test_without_a_choice_all_weights_of_that_kind_are_used(case):
    net, depth, widths, _ = case
    full = [block.width for block in net.blocks]
    deepest, narrow = choices_of(net, len(full), widths)
    shallow, widest = choices_of(net, depth, full)
    used = functools.partial(chapter.weights_used, net)
    assert float(used(None, None)) == float(used(deepest, widest)) == conv_weights(net.blocks)
    assert float(used(shallow, None)) == float(used(shallow, widest))
    assert float(used(None, narrow)) == float(used(deepest, narrow))


def test_kernels_of_other_sizes_are_counted_as_what_they_are():
    net = chapter.of_wide_resnet(WideResNet(10, 1, (1, 3)), 8)
    assert float(chapter.weights_used(net, None, None)) == conv_weights(net.blocks)


@given(cases(), st.floats(0, 10), st.floats(0, 10))
@few(20)
def test_the_regularizer_counts_depth_and_channels(case, gamma_depth, gamma_width):
    net, depth, widths, _ = case
    model = SimpleNamespace(
        net=net, gamma_depth=gamma_depth, gamma_width=gamma_width, size="counts"
    )
    chosen, masks = choices_of(net, depth, widths)
    found = chapter.regularizer(model, chosen, masks)
    assert float(found) == pytest.approx(gamma_depth * depth + gamma_width * sum(widths))
    assert float(chapter.regularizer(model, chosen, None)) == pytest.approx(gamma_depth * depth)
    found = chapter.regularizer(model, None, masks)
    assert float(found) == pytest.approx(gamma_width * sum(widths))


@pytest.mark.parametrize("size", ["parameters", "operations"])
@given(case=cases())
@few(10)
def test_the_regularizer_may_count_weights_or_operations(size, case):
    net, depth, widths, _ = case
    choices = choices_of(net, depth, widths)
    model = chapter.JointVMO(net, size=size, gamma_depth=0.5, gamma_width=1e-4)
    counted = float(chapter.weights_used(net, *choices, size == "operations"))
    expected = 0.5 * depth + 1e-4 * counted
    assert float(chapter.regularizer(model, *choices)) == pytest.approx(expected)


# --- the loss -------------------------------------------------------------------------------------

ESTIMATORS = chapter.ESTIMATORS
HARD = ESTIMATORS[1:]  # those that train the weights of one network
GAMMAS = {"gamma_depth": 0.5, "gamma_width": 0.2}
IMAGES = random_numbers(1, 6, 1, 8, 8).float()
LABELS = torch.tensor([0, 1, 2, 3, 1, 0])


def tiny(estimator: str, seed: int | None = None, **options) -> nn.Module:
    """Joint VMO on a ConvNet of two layers with three channels, at the temperature 0.5."""
    torch.manual_seed(0)
    net = chapter.of_convnet(ConvNet((3, 3), (), 1, 4, 8), 8)
    model = chapter.JointVMO(net, estimator=estimator, **GAMMAS | options)
    model.temperature = 0.5
    for number, choice in enumerate(model.choices):
        if seed is not None:
            choice.position.data = 0.2 * random_numbers(seed + number, len(choice.position)).float()
    return model


def hard_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """Everything that a model can choose, one-hot."""
    sizes = [len(choice.position) for choice in model.choices]
    return map(list, itertools.product(*(torch.eye(k) for k in sizes)))


def loss_of(model: nn.Module, choices: Sequence[Tensor]) -> Tensor:
    """Cross-entropy and the size of choices of the tiny network."""
    depth, *widths = choices
    sizes = [1 + int(choice.argmax()) for choice in choices]
    size = GAMMAS["gamma_depth"] * sizes[0] + GAMMAS["gamma_width"] * sum(sizes[1:])
    return F.cross_entropy(model.net(IMAGES, depth, widths), LABELS) + size


def positions_of(model: nn.Module) -> list[Tensor]:
    return [choice.position for choice in model.choices]


def gradient_samples(model: nn.Module, samples: int) -> Tensor:
    """Gradients of the loss with respect to the parameters of the distributions."""
    positions = positions_of(model)
    losses = (chapter.vmo_loss(model, IMAGES, LABELS) for _ in range(samples))
    return torch.stack([torch.cat(torch.autograd.grad(loss, positions)) for loss in losses])


def expected_gradient(model: nn.Module) -> Tensor:
    """The gradient of the bound, one choice after the other."""
    with torch.no_grad():
        losses = [loss_of(model, choices) for choices in hard_choices(model)]
    q = [choice.logits.softmax(0) for choice in model.choices]
    probabilities = [
        math.prod((one * p).sum() for one, p in zip(choices, q)) for choices in hard_choices(model)
    ]
    bound = sum(p * loss for p, loss in zip(probabilities, losses))
    return torch.cat(torch.autograd.grad(bound, positions_of(model)))


# 400 samples show a bias of a third of the standard deviation of one in 96 % of the runs.
@pytest.mark.parametrize(("estimator", "samples"), [("score function", 800), ("rebar", 400)])
def test_the_mean_gradient_of_unbiased_estimators_is_the_enumerated_one(estimator, samples):
    model = tiny(estimator, seed=3)
    torch.manual_seed(1)
    assert surprise(gradient_samples(model, samples), expected_gradient(model)) > FALSE_ALARM


def test_the_mean_gradient_of_the_relaxation_is_another():
    model = tiny("concrete", seed=3)
    model.temperature = 2.0
    torch.manual_seed(1)
    assert surprise(gradient_samples(model, 300), expected_gradient(model)) < FALSE_ALARM


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_has_the_value_of_a_sample_of_the_bound(estimator):
    model = tiny(estimator)
    model.choices[0].position.data = torch.tensor([0.0, 7.0])
    model.choices[1].position.data = torch.tensor([0.0, 7.0, 0.0])
    model.choices[2].position.data = torch.tensor([7.0, 0.0, 0.0])
    model.temperature = 0.01
    expected = loss_of(model, [one_hot(2, 2), one_hot(2, 3), one_hot(1, 3)])
    torch.manual_seed(0)
    found = chapter.vmo_loss(model, IMAGES, LABELS)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_reach_all_distributions_and_all_weights(estimator):
    model = tiny(estimator)
    torch.manual_seed(0)
    for _ in range(40):  # so that every channel is used by some samples
        chapter.vmo_loss(model, IMAGES, LABELS).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).all(), name


def weight_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """With respect to all weights, zero for those that are not used."""
    weights = [*model.net.parameters()]
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(w).flatten() if g is None else g.flatten()
            for g, w in zip(found, weights)
        ]
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("estimator", HARD)
def test_the_weights_get_the_gradient_of_one_hard_sample(estimator, seed):
    model = tiny(estimator, seed=seed)
    model.temperature = 2.0  # so that relaxed samples are far from hard ones
    candidates = torch.stack(
        [weight_gradients(model, loss_of(model, choices)) for choices in hard_choices(model)]
    )
    torch.manual_seed(seed)
    found = weight_gradients(model, chapter.vmo_loss(model, IMAGES, LABELS))
    errors = (candidates - found).norm(dim=1)
    assert errors.min() < 1e-5 * found.norm()
    assert errors.max() > 0.1 * found.norm()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_updates_the_statistics_of_batchnorm_once(estimator):
    torch.manual_seed(0)
    net = chapter.of_wide_resnet(WideResNet(10, 1, in_channels=1, classes=4), 8)
    model = chapter.JointVMO(net, estimator=estimator)
    expected = 0.1 * net.stem(IMAGES).mean((0, 2, 3)).detach()  # what no choice changes
    for step in (1, 2):
        chapter.vmo_loss(model, IMAGES, LABELS).backward()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {int(norm.num_batches_tracked) for norm in norms} == {step}
    found = net.blocks[0].block.norms[0].running_mean
    torch.testing.assert_close(found, expected * 1.9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_the_distributions_are_speed_times_those_of_the_logits(estimator):
    gradients = []
    for speed in (1.0, 6.0):
        model = tiny(estimator, speed=speed)  # all logits are zero
        torch.manual_seed(4)
        gradients.append(gradient_samples(model, 1)[0])
    torch.testing.assert_close(6 * gradients[0], gradients[1])


def test_the_baseline_of_the_score_function_approaches_the_mean_loss():
    model = tiny("score function")
    torch.manual_seed(0)
    with torch.no_grad():
        expected = np.mean([float(loss_of(model, choices)) for choices in hard_choices(model)])
        found = []
        for _ in range(300):
            chapter.vmo_loss(model, IMAGES, LABELS)
            found.append(float(model.baseline))
    assert found[0] < expected / 2
    assert np.mean(found[50:]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_any_choice_the_loss_is_the_cross_entropy(estimator):
    model = tiny(estimator, depth=False, width=False)
    expected = F.cross_entropy(model.net(IMAGES), LABELS)
    found = chapter.vmo_loss(model, IMAGES, LABELS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weight_gradients(model, found), weight_gradients(model, expected))


def test_rebar_can_train_a_model_that_has_decided():
    model = tiny("rebar", speed=10.0)
    model.choices[0].position.data = torch.tensor([5.0, 0.0])
    chapter.vmo_loss(model, IMAGES, LABELS).backward()
    assert all(torch.isfinite(position.grad).all() for position in positions_of(model))


# --- training -------------------------------------------------------------------------------------


def digits(images: int = 300):
    return load("digits", device="cpu", subset=images)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_at_the_lowest_temperature_stays_finite(estimator, precision):
    data, form = digits(), NumberFormat(precision, False)
    torch.manual_seed(0)
    model = chapter.make_vmo("convnet", data, [4, 5], "joint", estimator=estimator, speed=10.0)
    callbacks = [chapter.Anneal(1e-3, 1e-3)]
    history = fit(
        model,
        data,
        steps=8,
        batch_size=64,
        lr=0.05,
        loss=chapter.vmo_loss,
        callbacks=callbacks,
        number_format=form,
        evaluate_every=None,
    )
    assert history.stopped == "steps"
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    both = [evaluate(m, data, number_format=form).loss for m in (model, model.extract())]
    assert both[0] == pytest.approx(both[1], rel=0.02)


@pytest.mark.parametrize(("how", "middle"), [("log", 0.01), ("linear", 0.0505), ("constant", 0.1)])
def test_the_temperature_falls_as_it_is_told(how, middle):
    anneal = chapter.Anneal(0.1, 1e-3, how)
    found = [anneal.temperature(fraction) for fraction in (0, 0.5, 1)]
    assert found == pytest.approx([0.1, middle, 0.1 if how == "constant" else 1e-3])
    assert anneal.temperature(0.25) >= anneal.temperature(0.75)


def test_the_papers_annealing_is_the_default():
    anneal = chapter.Anneal()
    assert [anneal.temperature(fraction) for fraction in (0, 1)] == pytest.approx([0.1, 1e-3])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"first": 0}, "first must be .* got 0"),
        ({"first": -0.5}, "first must be .* got -0.5"),
        ({"last": 0.0}, "last must be .* got 0.0"),
        ({"last": NAN}, "last must be .* got nan"),
        ({"how": "cosine"}, "unknown annealing 'cosine'"),
    ],
)
def test_an_annealing_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        chapter.Anneal(**wrong)


def annealed(steps: int, **options) -> tuple[nn.Module, list[dict], list[float]]:
    """Rows of a training of nothing, and the temperature after each step."""
    model, anneal = tiny("concrete"), chapter.Anneal(**options)
    training = SimpleNamespace(model=model, step=0, fraction=0.0)
    anneal.on_start(training)
    temperatures = [model.temperature]
    for training.step in range(1, steps + 1):
        training.fraction = training.step / steps
        anneal.on_step(training)
        temperatures.append(model.temperature)
    return model, anneal.rows, temperatures


@pytest.mark.parametrize("how", chapter.ANNEALINGS)
def test_the_model_gets_the_temperature_of_each_step(how):
    _, _, found = annealed(20, how=how)
    anneal = chapter.Anneal(how=how)
    assert found == pytest.approx([anneal.temperature(step / 20) for step in range(21)])


@pytest.mark.parametrize("steps", [3, 50, 77, 1000])
def test_the_looks_are_spread_over_the_whole_training(steps):
    model, rows, _ = annealed(steps, looks=20)
    at = [row["step"] for row in rows]
    assert at[0] == 1
    assert at[-1] >= steps * (1 - 1 / 20)
    assert np.diff(at).max() <= math.ceil(steps / 20)
    assert len(rows) <= 21
    row = rows[-1]
    assert (row["depth"], row["widths"]) == model.choices.best()
    assert row["entropies"] == pytest.approx([math.log(2), math.log(3), math.log(3)])
    assert json.loads(json.dumps(rows)) == rows


def test_a_row_has_the_temperature_with_which_its_step_was_made():
    _, rows, temperatures = annealed(10, looks=10)
    assert [row["temperature"] for row in rows] == temperatures[:10]


def test_a_long_training_is_looked_at_as_often_as_told():
    _, rows, _ = annealed(1000, looks=20)
    assert len(rows) == 21


# --- experiments ----------------------------------------------------------------------------------

TRAINED = {"data": "digits", "model": "convnet", "sizes": [3, 4], "epochs": 1, "lr": 0.05}
TRAINED |= {"seed": 3}
FULL = 9 * 3 + 2 * 3 + 9 * 3 * 4 + 2 * 4 + 4 * 10 + 10  # parameters of the deepest and widest


def lasting(row: dict) -> dict:
    """What does not depend on the clock."""
    return {name: value for name, value in row.items() if not name.endswith("seconds")}


@pytest.mark.parametrize("choose", chapter.CHOICES)
def test_a_search_gives_the_network_that_it_chose(choose):
    row = chapter.train_vmo(**TRAINED, choose=choose)
    depth, widths = row["depth"], row["widths"]
    if choose in ("none", "width"):
        assert depth == 2
    if choose in ("none", "depth"):
        assert widths == [3, 4][:depth]
    pairs = itertools.pairwise([1, *widths])
    assert row["parameters"] == sum(9 * a * b + 2 * b for a, b in pairs) + 10 * widths[-1] + 10
    assert row["weight_share"] == pytest.approx(row["parameters"] / FULL)
    shares = [k / full for k, full in zip(widths, [3, 4])]
    assert row["width_share"] == pytest.approx(np.mean(shares))
    assert row["width_spread"] == pytest.approx(np.std(shares))
    assert row["layers"] == depth + 1
    assert row["accuracy"] == row["before_tuning"]
    assert row["stopped"] == "epochs"
    assert row["seconds"] > 0
    trace = json.loads(row["trace"])
    assert (trace[-1]["depth"], trace[-1]["widths"]) == (depth, widths)


def test_a_search_is_the_same_for_a_seed_and_can_be_recorded():
    rows = [chapter.train_vmo(**TRAINED | {"seed": seed}, choose="joint") for seed in (3, 3, 4)]
    assert lasting(rows[0]) == lasting(rows[1])
    assert lasting(rows[0]) != lasting(rows[2])
    assert json.loads(json.dumps(rows[0])) == rows[0]


def test_what_is_tuned_is_trained_on_after_the_search():
    row = chapter.train_vmo(**TRAINED | {"epochs": 4}, choose="depth", tune=0.5)
    assert json.loads(row["trace"])[-1]["step"] == 22  # two of four epochs
    assert row["accuracy"] > row["before_tuning"]


def test_augmentation_changes_a_search():
    plain, augmented = (
        chapter.train_vmo(**TRAINED, choose="width", augmented=yes) for yes in (False, True)
    )
    assert plain["trace"] != augmented["trace"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"choose": "both"}, "unknown choice 'both'"),
        ({"model": "conv"}, "unknown model 'conv'"),
        ({"annealing": "logs"}, "unknown annealing 'logs'"),
        ({"estimator": "relax"}, "unknown estimator 'relax'"),
        ({"size": "count"}, "unknown size 'count'"),
    ],
)
def test_a_search_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        chapter.train_vmo(**TRAINED | {"choose": "joint"} | wrong)


def test_the_layers_of_a_wide_resnet_are_counted_as_its_authors_do():
    vmo = chapter.make_vmo("wrn", digits(), [16, 1], "none")
    described = chapter.describe_choice(vmo)
    assert (described["depth"], described["layers"]) == (6, 16)
    assert described["width_share"] == described["weight_share"] == 1


CHOSEN = {"depth": 2, "widths": [2, 3]}


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """A book with recorded searches: two seeds, and two kinds of choices."""
    (tmp_path / "chapters").mkdir()
    monkeypatch.setenv("JAHS_BOOK", str(tmp_path))
    path = results_path("04_vmo", "table", "quick")
    path.parent.mkdir(parents=True)
    for choose, seed, metrics in (
        ("joint", 3, CHOSEN),
        ("joint", 4, {"depth": 1, "widths": [1]}),
        ("width", 3, {"depth": 2, "widths": [1, 1]}),
    ):
        key = TRAINED | {"choose": choose, "seed": seed}
        Results(path).append(describe_row(key, metrics, 1.0, "code"))


CONTROL = TRAINED | {"choose": "joint", "profile": "quick"}


@pytest.mark.parametrize(("choose", "expected"), [("joint", [2, 3]), ("width", [1, 1])])
def test_the_choice_of_a_search_is_found(searched, choose, expected):
    key = {"data": "digits", "sizes": [3, 4], "seed": 3, "choose": choose}
    assert chapter.find_choice("quick", **key) == (2, expected)


@pytest.mark.parametrize(("key", "found"), [({"seed": 9}, 0), ({"seed": 3}, 2)])
def test_a_choice_that_is_not_one_is_refused(searched, key, found):
    with pytest.raises(ValueError, match=f"{found} rows .*{next(iter(key.values()))}"):
        chapter.find_choice("quick", **key)


def test_a_control_of_the_same_shape_has_it(searched):
    row = chapter.train_control(**CONTROL, kind="same")
    assert row["widths"] == CHOSEN["widths"]
    assert row["parameters"] == row["target"]
    assert 0 <= row["accuracy"] <= 1


@pytest.mark.parametrize("kind", ["uniform", "random"])
def test_other_controls_have_about_its_size(searched, kind):
    row = chapter.train_control(**CONTROL, kind=kind)
    assert row["parameters"] == pytest.approx(row["target"], rel=0.2)
    assert len(row["widths"]) == CHOSEN["depth"]


def test_a_control_is_the_same_for_a_seed_and_can_be_recorded(searched):
    rows = [chapter.train_control(**CONTROL, kind="random") for _ in range(2)]
    assert rows[0] == rows[1]
    assert json.loads(json.dumps(rows[0])) == rows[0]


def test_an_unknown_control_is_refused(searched):
    with pytest.raises(ValueError, match="unknown control 'wide'"):
        chapter.train_control(**CONTROL, kind="wide")


@pytest.fixture(scope="module")
def wide_net() -> nn.Module:
    return chapter.of_convnet(ConvNet((8, 16, 32), (), 1, 10, 8), 8)


@given(st.integers(1, 3), st.floats(0.15, 1), st.integers(0, 1000))
@few(4)
def test_fitted_widths_have_the_size_that_is_asked_for(wide_net, depth, scale, seed):
    shares = np.random.default_rng(seed).uniform(0.5, 1, depth)
    full = np.array([8, 16, 32][:depth])
    wanted = [int(k) for k in np.maximum(np.round(scale * shares * full), 1)]
    target = count_parameters(chapter.cut_out(wide_net, depth, wanted))
    found = chapter.fit_widths(wide_net, shares, target)
    parameters = count_parameters(chapter.cut_out(wide_net, depth, found))
    assert parameters == pytest.approx(target, rel=0.15)


@pytest.mark.parametrize(("target", "expected"), [(1, [1, 1]), (10**9, [8, 16])])
def test_a_size_out_of_reach_gives_the_nearest_widths(wide_net, target, expected):
    assert chapter.fit_widths(wide_net, np.array([1.0, 0.5]), target) == expected


def test_to_start_afresh_forgets_all_that_was_learnt():
    used = settled("wrn", (10, 1), 3)
    networks = [
        copy.deepcopy(used),
        chapter.of_wide_resnet(WideResNet(10, 1, in_channels=3, classes=4), 8).double(),
    ]
    for network in networks:
        chapter.start_afresh(network, 5)
    assert is_unchanged(networks[0], state_of(networks[1]))
    chapter.start_afresh(networks[1], 6)
    first, second = (network.stem.weight for network in networks)
    assert not torch.equal(first, second)


OVERHEAD = {"data": "digits", "model": "convnet", "sizes": [3, 4], "steps": 1, "seed": 0}


@pytest.mark.parametrize("choose", ["depth", "width", "joint"])
def test_the_overhead_is_that_of_masks_and_classifiers(choose):
    row = chapter.measure_overhead(**OVERHEAD, choose=choose, estimator="concrete")
    assert all(value > 0 for value in row.values())
    assert json.loads(json.dumps(row)) == row
    assert row["plain_parameters"] == FULL - 40 - 10 + 16 * 10 + 10  # it reads all four pixels
    sizes = {"depth": 2, "width": 3 + 4, "joint": 2 + 3 + 4}[choose]
    assert row["vmo_parameters"] == FULL + 3 * 10 + 10 + sizes
    kept = {
        "products with a mask": (choose != "depth") * 3 * 16,
        "inner means": (choose != "width") * 3,
        "last mean": 4,
        "outputs": (choose != "width") * 2 * 10,
    }
    extra = row["vmo_bytes"] - row["plain_bytes"]
    assert 0 <= extra - 128 * 4 * sum(kept.values()) < 300  # the choices themselves


def test_rebar_keeps_more_for_the_backward_pass_than_the_relaxation():
    found = [
        chapter.measure_overhead(**OVERHEAD, choose="joint", estimator=estimator)["vmo_bytes"]
        for estimator in ("concrete", "rebar")
    ]
    assert found[1] > 1.5 * found[0]


PROBLEM = {"data": "digits", "width": 2, "epochs": 0.2, "batch": 16, "seed": 0}


def test_the_small_problem_is_the_loss_of_a_trained_network_of_three_layers():
    objective, logits = chapter.small_problem(**PROBLEM)
    assert logits.shape == (3, 2)
    assert logits.abs().max() > 0
    choices = torch.eye(2)[torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, 0]])]
    losses = objective(choices)
    assert losses.shape == (3,)
    assert ((losses > 0) & (losses < 10)).all()
    assert len(set(losses.tolist())) == 3
    torch.testing.assert_close(objective(choices[1:2]), losses[1:2])  # nothing is learnt meanwhile
    found = chapter.exact_gradient(objective, logits)
    given = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        enumerated(lambda choice: objective(choice).detach(), given), given
    )
    torch.testing.assert_close(found, expected)


@pytest.fixture
def short_tuning(monkeypatch):
    """Surrogates that are trained for two steps only."""

    def two_steps(surrogate, objective, logits, steps, generator, samples):
        tune(surrogate, objective, logits, 2, generator, samples)

    tune = chapter.tune_surrogate
    monkeypatch.setattr(chapter, "tune_surrogate", two_steps)


@pytest.mark.usefixtures("short_tuning")
@pytest.mark.parametrize("estimator", chapter.GRADIENTS)
def test_the_gradients_of_a_network_are_measured(estimator):
    measured = PROBLEM | {"estimator": estimator, "temperature": 0.5, "samples": 40}
    rows = [chapter.measure_gradients(**measured) for _ in range(2)]
    assert lasting(rows[0]) == lasting(rows[1])
    assert all(math.isfinite(value) and value > 0 for value in rows[0].values())
    assert rows[0]["expected"] == pytest.approx((rows[0]["variance"] / 40) ** 0.5)
    assert json.loads(json.dumps(rows[0])) == rows[0]


def test_an_unknown_estimator_cannot_be_measured():
    objective, logits = PROBLEMS["one"]
    with pytest.raises(ValueError, match="unknown estimator 'best'"):
        chapter.estimate("best", objective, logits, noise_of(2, logits), 0.5)


@pytest.mark.parametrize("estimator", ["score function", "with baseline", "rebar"])
def test_the_estimators_that_are_measured_are_unbiased_in_groups_too(estimator):
    objective, logits = PROBLEMS["two"]
    groups = [
        chapter.estimate(estimator, objective, logits, noise_of(20, logits, seed), 0.5)
        for seed in range(200)
    ]
    assert surprise(torch.cat(groups), chapter.exact_gradient(objective, logits)) > FALSE_ALARM


# --- what findings read from rows -----------------------------------------------------------------


def look(step: int, depth: int, widths: list[int], entropies: list[float]) -> dict:
    return {"step": step, "depth": depth, "widths": widths, "entropies": entropies}


def watched_row(choose: str, *looks: dict) -> dict:
    return {"choose": choose, "depth": looks[-1]["depth"], "trace": json.dumps(looks)}


JOINT_LOOKS = (
    look(1, 2, [3, 4], [1.0, 2.0, 4.0]),
    look(20, 1, [3], [0.5, 1.0, 4.0]),
    look(40, 1, [2], [0.1, 0.2, 4.0]),
    look(100, 1, [2], [0.0, 0.1, 4.0]),
)


def test_a_choice_is_settled_from_the_look_after_its_last_change():
    found = chapter.watch_choices(pd.DataFrame([watched_row("joint", *JOINT_LOOKS)])).iloc[0]
    assert found["settled"] == pytest.approx(0.4)
    assert found["settled_depth"] == pytest.approx(0.2)


def test_entropies_are_relative_to_the_start_and_of_what_the_network_uses():
    found = chapter.watch_choices(pd.DataFrame([watched_row("joint", *JOINT_LOOKS)])).iloc[0]
    assert found["entropy_tenth"] == pytest.approx(0.5)  # the third distribution is not used
    assert found["entropy_end"] == pytest.approx((0 + 0.05) / 2)


def test_a_choice_that_changes_at_the_last_look_is_settled_at_the_end():
    looks = (look(1, 1, [3], [1.0]), look(50, 1, [3], [1.0]), look(100, 1, [2], [1.0]))
    found = chapter.watch_choices(pd.DataFrame([watched_row("width", *looks)]))
    assert found["settled"].tolist() == [1.0]


def test_trainings_without_a_choice_are_not_watched():
    rows = pd.DataFrame(
        [watched_row("none", look(1, 1, [3], [])), watched_row("joint", *JOINT_LOOKS)]
    )
    assert chapter.watch_choices(rows)["choose"].tolist() == ["joint"]


def variant(seed: int, last: int, **changed: object) -> dict:
    return {"seed": seed, "depth": 4, "widths": [1, 2, 3, last]} | changed


def test_agreement_is_the_share_of_the_commonest_last_width_of_a_seed():
    rows = [variant(0, 7), variant(0, 7), variant(0, 7), variant(0, 9), variant(1, 5)]
    found = chapter.agree_on_last_width(pd.DataFrame(rows))
    assert found.to_dict("records") == [
        {"seed": 0, "agreement": 0.75},
        {"seed": 1, "agreement": 1.0},
    ]


def test_networks_of_other_depth_speed_or_estimator_do_not_count_as_alike():
    others = [
        variant(0, 9, depth=3, widths=[1, 2, 9]),
        variant(0, 9, speed=1.0),
        variant(0, 9, estimator="rebar"),
        variant(0, 9, tune=0.5),
        variant(0, 9, first=1.0),
    ]
    rows = [variant(0, 7, gamma_width=1e-3), variant(0, 7, annealing="linear"), *others]
    assert chapter.agree_on_last_width(pd.DataFrame(rows))["agreement"].tolist() == [1.0]


def test_the_gpu_profile_asks_what_the_papers_conclusion_asks_for():
    keys = chapter.VARIANTS_GRIDS["gpu"]
    asked = {"annealing", "first", "speed", "estimator", "tune"}
    assert all(len(asked & key.keys()) == 1 for key in keys)
    assert {name for key in keys for name in asked & key.keys()} == asked
    assert {key["seed"] for key in keys} == set(range(5))


@pytest.mark.parametrize("profile", ["standard", "gpu", "paper"])
def test_every_control_and_variant_has_its_search_in_the_table(profile):
    searches = [
        {name: key[name] for name in ("data", "model", "sizes", "seed", "epochs")}
        for key in chapter.TABLE_GRIDS[profile]
        if key["choose"] == "joint"
    ]
    for experiment in ("controls", "variants"):
        for key in chapter.EXPERIMENTS[experiment].keys(profile):
            assert {name: key[name] for name in searches[0]} in searches
