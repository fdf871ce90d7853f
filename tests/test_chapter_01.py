"""The exported code of chapters/01_hyperband_bohb.ipynb."""

import copy
import heapq
import itertools
import json
import math
import re
from collections import Counter
from fractions import Fraction

import ConfigSpace as cs
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import few
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from smac.intensifier.successive_halving import SuccessiveHalving

from jahs_utils import load, load_chapter, read_results
from jahs_utils.networks import ResidualBlock, WideResNet, count_parameters
from jahs_utils.search import Evaluator, Trial, smac_search

chapter = load_chapter("01_hyperband_bohb")


# --- brackets -------------------------------------------------------------------------------------


def sizes_of(brackets: list) -> list[list[int]]:
    return [[n for n, _ in bracket] for bracket in brackets]


def budgets_of(brackets: list) -> list[list[float]]:
    return [[r for _, r in bracket] for bracket in brackets]


def test_the_floor_rule_gives_table_5():
    assert chapter.hyperband_brackets(81, 3, rule="floor") == [
        [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        [(27, 3), (9, 9), (3, 27), (1, 81)],
        [(9, 9), (3, 27), (1, 81)],
        [(6, 27), (2, 81)],
        [(5, 81)],
    ]


def test_the_ceil_rule_gives_algorithm_1():
    brackets = chapter.hyperband_brackets(81, 3)
    assert [bracket[0] for bracket in brackets] == [(81, 1), (34, 3), (15, 9), (8, 27), (5, 81)]
    assert sizes_of(brackets)[1:3] == [[34, 11, 3, 1], [15, 5, 1]]


def test_whole_budgets_are_ints():
    budgets = itertools.chain(*budgets_of(chapter.hyperband_brackets(81.0, 3)))
    assert {type(budget) for budget in budgets} == {int}


@pytest.mark.parametrize(
    ("low", "high", "eta", "count"),
    [
        (1, 243, 3, 6),
        (1, 1000, 10, 4),
        (1, 39.0625, 2.5, 5),
        (0.4, 6.25, 2.5, 4),
        (0.1, 0.9, 3, 3),
        (0.1, 72.9, 3, 7),
        (1 / 27, 1, 3, 4),
        (np.float64(0.1), np.float64(0.9), 3, 3),
        (5, 5, 3, 1),
    ],
)
def test_a_power_of_eta_is_counted_exactly(low, high, eta, count):
    assert len(chapter.hyperband_brackets(high, eta, low)) == count


@pytest.mark.parametrize("eta", [2, 3, 7, 10])
def test_a_minimum_that_only_a_rounded_float_can_say_counts_as_what_is_meant(eta):
    counts = [len(chapter.hyperband_brackets(1, eta, 1 / eta**k)) for k in range(8)]
    assert counts == list(range(1, 9))


def test_budgets_in_other_units_make_the_same_brackets():
    seconds = chapter.hyperband_brackets(10_800, 3, 400)
    minutes = chapter.hyperband_brackets(10_800 / 60, 3, 400 / 60)
    assert sizes_of(minutes) == sizes_of(seconds)


@given(
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.integers(0, 3),
    st.sampled_from(["2", "3", "4", "5", "10", "2.5", "1.5", "1.75"]),
    st.sampled_from(["ceil", "floor"]),
)
@few(150)
def test_brackets_are_those_of_exact_arithmetic(a, b, digits, eta, rule):
    low, high = sorted([Fraction(a, 10**digits), Fraction(b, 10**digits)])
    brackets = chapter.hyperband_brackets(float(high), float(eta), float(low), rule)
    eta, s_max = Fraction(eta), len(brackets) - 1
    assert low * eta**s_max <= high < low * eta ** (s_max + 1)
    for s, bracket in zip(range(s_max, -1, -1), brackets):
        share = Fraction(s_max + 1, s + 1)
        first = math.ceil(share * eta**s) if rule == "ceil" else int(int(share) * eta**s)
        assert bracket == [
            (max(1, math.floor(first / eta**i)), float(high / eta ** (s - i))) for i in range(s + 1)
        ]
        assert bracket[0][1] >= float(low)
        assert bracket[-1][1] == float(high)


ETAS = (2, 3, 4, 5, 7, 10, 1.5, 2.5)
HIGHS = (*range(1, 130), 243, 729, 1000, 1024, 2187, 6561, 10_000)


def test_the_ceil_rule_is_smacs_except_where_its_powers_are_rounded_down():
    equal = different = 0
    for high, eta in itertools.product(HIGHS, ETAS):
        brackets = chapter.hyperband_brackets(high, eta)
        s_max = len(brackets) - 1
        for s, bracket in zip(range(s_max, -1, -1), brackets):
            budgets, sizes = SuccessiveHalving._compute_configs_and_budgets_for_stages(
                eta, high, s, s_max
            )
            assert [r for _, r in bracket] == pytest.approx(budgets, rel=1e-12)
            for i, ((ours, _), theirs) in enumerate(zip(bracket, sizes)):
                exact = Fraction(bracket[0][0]) / Fraction(str(eta)) ** i
                rounded_down = exact.denominator == 1 and theirs == ours - 1
                assert ours == theirs or rounded_down, (high, eta, bracket, sizes)
                equal, different = equal + (ours == theirs), different + rounded_down
    assert different < 0.02 * equal


def smac_brackets(high: float, eta: float, low: float) -> list[list[float]]:
    s_max = SuccessiveHalving._get_max_iterations(eta, high, low)
    compute = SuccessiveHalving._compute_configs_and_budgets_for_stages
    return [compute(eta, high, s, s_max)[0] for s in range(s_max, -1, -1)]


@pytest.mark.parametrize(("eta", "budgets"), [(3, [[10]]), (2.5, [[4, 10], [10]])])
def test_from_4_to_10_there_is_one_bracket_with_eta_3_and_two_with_2_5(eta, budgets):
    assert budgets_of(chapter.hyperband_brackets(10, eta, 4)) == budgets
    assert smac_brackets(10, eta, 4) == [pytest.approx(bracket) for bracket in budgets]


def hpbandster_brackets(high: float, eta: float, low: float) -> list[list[tuple[int, float]]]:
    """As HpBandSter's hyperband.py computes them, in floating point."""
    count = -int(np.log(low / high) / np.log(eta)) + 1
    budgets = high * np.power(eta, -np.linspace(count - 1, 0, count))
    brackets = []
    for s in range(count - 1, -1, -1):
        first = int(np.floor(count / (s + 1)) * eta**s)
        sizes = [max(int(first * eta ** (-i)), 1) for i in range(s + 1)]
        brackets.append(list(zip(sizes, budgets[-s - 1 :])))
    return brackets


def test_the_floor_rule_is_hpbandsters_except_where_floats_fall_short_of_a_power():
    fewer, smaller = set(), set()
    for high, eta in itertools.product(HIGHS, ETAS):
        ours = chapter.hyperband_brackets(high, eta, rule="floor")
        theirs = hpbandster_brackets(high, eta, 1)
        if len(ours) != len(theirs):
            assert len(theirs) == len(ours) - 1
            assert Fraction(str(eta)) ** (len(ours) - 1) == high
            fewer.add((high, eta))
            continue
        for our, their in zip(ours, theirs):
            assert [r for _, r in our] == pytest.approx([r for _, r in their], rel=1e-12)
            for i, ((n, _), (m, _)) in enumerate(zip(our, their)):
                if n != m:
                    assert m == n - 1
                    assert (Fraction(our[0][0]) / Fraction(str(eta)) ** i).denominator == 1
                    smaller.add((high, eta))
    assert fewer == {(243, 3), (10, 10), (100, 10), (1000, 10), (10_000, 10)}
    assert {eta for _, eta in smaller} == {7}


def test_from_400_to_10800_the_floor_rule_starts_27_9_6_and_4():
    brackets = chapter.hyperband_brackets(10_800, 3, 400, "floor")
    assert sizes_of(brackets) == [[27, 9, 3, 1], [9, 3, 1], [6, 2], [4]]
    assert budgets_of(brackets)[0] == [400, 1200, 3600, 10_800]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((9, 3, 10), "10"),
        ((9, 1), "1"),
        ((9, 0.5), "0.5"),
        ((9, -3), "-3"),
        ((9, math.nan), "nan"),
        ((9, math.inf), "inf"),
        ((0,), "0"),
        ((-9,), "-9"),
        ((math.inf,), "inf"),
        ((math.nan,), "nan"),
        ((9, 3, 0), "0"),
        ((9, 3, -1), "-1"),
        ((9, 3, math.nan), "nan"),
        ((9, 3, math.inf), "inf"),
        ((9, 3, "1"), "'1'"),
        ((9, 3, 1, "round"), "'round'"),
    ],
)
def test_brackets_that_cannot_be_are_refused_in_one_line(arguments, named):
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        chapter.hyperband_brackets(*arguments)
    assert "\n" not in str(caught.value)


# --- successive halving, Hyperband, random search -------------------------------------------------


def numbered(n: int) -> list[dict]:
    return [{"x": k} for k in range(n)]


def counter() -> callable:
    """sample() that draws 0, 1, 2, ..."""
    numbers = itertools.count()
    return lambda: {"x": next(numbers)}


def by_budget(trials: list[Trial]) -> dict[float, list[int]]:
    found: dict[float, list[int]] = {}
    for trial in trials:
        found.setdefault(trial.budget, []).append(trial.config["x"])
    return found


def scrambled(x: int) -> float:
    """A loss that differs between configurations and has no order in them."""
    return math.sin(12.9898 * x + 1) * 43758.5453 % 1


@given(st.permutations(range(20)), st.integers(1, 20), st.sampled_from([2, 3, 4, 2.5]))
@settings(deadline=None)
def test_where_budgets_agree_each_rung_keeps_the_best_in_order(losses, n, eta):
    trials = chapter.successive_halving(
        numbered(n), lambda config, budget: losses[config["x"]] + 100 / budget, [1, 2, 5], eta
    )
    ranked = sorted(range(n), key=lambda x: losses[x])
    kept = [max(1, math.floor(n / Fraction(str(eta)) ** rung)) for rung in range(3)]
    assert by_budget(trials) == {
        1: list(range(n)),
        2: ranked[: kept[1]],
        5: [x for x in ranked if x in ranked[: kept[2]]],
    }
    assert trials[-1].config["x"] in ranked[: kept[2]]


def test_rungs_have_the_sizes_of_the_bracket():
    for rule in ("ceil", "floor"):
        for bracket in chapter.hyperband_brackets(27, 3, rule=rule):
            trials = chapter.successive_halving(
                numbered(bracket[0][0]), lambda c, b: scrambled(c["x"]), [r for _, r in bracket]
            )
            assert list(Counter(t.budget for t in trials).items()) == [(r, n) for n, r in bracket]


def test_of_equal_losses_the_first_drawn_go_on():
    trials = chapter.successive_halving(numbered(9), lambda config, budget: 1.0, [1, 3, 9])
    assert by_budget(trials) == {1: list(range(9)), 3: [0, 1, 2], 9: [0]}


def failing(config: dict, budget: float) -> float:
    """Every second configuration fails, each in another way."""
    x = config["x"]
    if x % 8 == 1:
        raise RuntimeError("no such network")
    return {3: math.nan, 5: math.inf, 7: -math.inf}.get(x % 8, float(x))


def test_what_fails_is_an_infinite_loss_and_is_not_promoted():
    trials = chapter.successive_halving(numbered(18), failing, [1, 3, 9])
    assert by_budget(trials) == {1: list(range(18)), 3: [0, 2, 4, 6, 8, 10], 9: [0, 2]}
    assert all((t.loss == math.inf) == (t.config["x"] % 2 == 1) for t in trials)
    assert all((t.error is not None) == (t.config["x"] % 2 == 1) for t in trials)


def test_a_rung_shrinks_to_those_that_did_not_fail():
    def fragile(config, budget):
        return 1.0 if config["x"] == 7 else math.nan

    trials = chapter.successive_halving(numbered(9), fragile, [1, 3, 9])
    assert by_budget(trials) == {1: list(range(9)), 3: [7], 9: [7]}


def test_a_search_in_which_everything_fails_ends():
    def broken(config, budget):
        raise OSError("no data")

    trials = chapter.hyperband(counter(), broken, 9)
    firsts = [bracket[0] for bracket in chapter.hyperband_brackets(9)]
    assert [t.budget for t in trials] == [r for n, r in firsts for _ in range(n)]
    assert {t.loss for t in trials} == {math.inf}
    assert len(chapter.random_search(counter(), broken, 9, 30)) == 3
    space = chapter.unit_cube(2)
    assert sum(t.budget for t in chapter.bohb(space, broken, 9, total=100)) > 91


def test_each_result_is_heard_before_the_next_draw():
    events = []
    numbers = itertools.count()

    def sample():
        events.append("draw")
        return {"x": next(numbers)}

    def evaluate(config, budget):
        events.append("evaluate")
        return scrambled(config["x"])

    heard = []

    def observe(*result):
        events.append("observe")
        heard.append(result)

    trials = chapter.hyperband(sample, evaluate, 9, observe=observe)
    text = " ".join(events)
    assert text.replace("draw evaluate observe", "").replace("evaluate observe", "").strip() == ""
    assert text.count("draw") == sum(b[0][0] for b in chapter.hyperband_brackets(9))
    assert heard == [(t.config, t.budget, t.loss) for t in trials]


def test_a_failure_is_heard_too():
    heard = []
    chapter.successive_halving(numbered(4), failing, [1], observe=lambda *r: heard.append(r[2]))
    assert heard == [0, math.inf, 2, math.inf]


@pytest.mark.parametrize(
    "budgets", [[], [1, 1], [3, 1], [0, 1], [-1, 1], [1, math.nan], [math.inf]]
)
def test_budgets_that_do_not_rise_are_refused(budgets):
    with pytest.raises(ValueError, match="budget"):
        chapter.successive_halving(numbered(3), lambda config, budget: 1.0, budgets)


def test_an_eta_that_halves_nothing_is_refused():
    with pytest.raises(ValueError, match="eta must be above 1"):
        chapter.successive_halving(numbered(3), lambda config, budget: 1.0, [1, 3], 1)


SEARCHES = {
    "random": lambda total: chapter.random_search(
        counter(), lambda config, budget: scrambled(config["x"]), 9, total
    ),
    "hyperband": lambda total: chapter.hyperband(
        counter(), lambda config, budget: scrambled(config["x"]), 9, total=total
    ),
    "bohb": lambda total: chapter.bohb(
        chapter.unit_cube(1), lambda config, budget: config["x0"], 9, total=total, seed=2
    ),
}


@pytest.mark.parametrize("method", SEARCHES)
@given(total=st.floats(0.1, 150))
@few(25)
def test_a_search_ends_where_the_next_trial_would_exceed_the_total(method, total):
    trials = SEARCHES[method](total)
    more = SEARCHES[method](total + 20)
    spent = sum(t.budget for t in trials)
    assert spent <= total * (1 + 1e-9)
    assert [(t.config, t.budget) for t in more[: len(trials)]] == [
        (t.config, t.budget) for t in trials
    ]
    assert spent + more[len(trials)].budget > total


@pytest.mark.parametrize(("own", "given_total"), [(60, None), (60, 500), (500, 60)])
def test_a_total_of_the_evaluator_counts_too(own, given_total):
    evaluator = Evaluator(lambda config, budget: scrambled(config["x"]), total=own)
    trials = chapter.hyperband(counter(), evaluator, 9, total=given_total)
    assert trials == evaluator.trials
    assert 60 - 9 < sum(t.budget for t in trials) <= 60


class EndlessError(BaseException):
    """Passes through an Evaluator, which counts other exceptions as failed trials."""


@pytest.mark.parametrize(
    "search",
    [
        lambda evaluate: chapter.random_search(counter(), evaluate, 9, 60),
        lambda evaluate: chapter.hyperband(counter(), evaluate, 9, total=60),
        lambda evaluate: chapter.bohb(chapter.unit_cube(1), evaluate, 9, total=60),
    ],
    ids=["random", "hyperband", "bohb"],
)
def test_a_total_holds_for_an_evaluator_without_one(search):
    calls = []

    def evaluate(config, budget):
        calls.append(budget)
        if len(calls) > 200:
            raise EndlessError
        return scrambled(len(calls))

    search(Evaluator(evaluate))
    assert 60 - 9 < sum(calls) <= 60


def test_hyperband_repeats_its_brackets_for_rounds():
    once, twice = (
        chapter.hyperband(counter(), lambda c, b: scrambled(c["x"]), 9, rounds=r) for r in (1, 2)
    )
    assert [t.budget for t in once] * 2 == [t.budget for t in twice]
    assert sum(b[0][0] for b in chapter.hyperband_brackets(9)) == len({t.config["x"] for t in once})


# --- the density ----------------------------------------------------------------------------------


def mixed_data(kinds: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, d) in which every level occurs, and the numbers of levels (d,)."""
    rng = np.random.default_rng(seed)
    levels = np.array([0 if kind == "c" else rng.integers(2, 6) for kind in kinds])
    columns = [
        rng.random(n) if kind == "c" else rng.permutation(np.arange(n) % count)
        for kind, count in zip(kinds, levels)
    ]
    return np.column_stack(columns).astype(float), levels


@pytest.mark.filterwarnings("ignore:After 0.17:FutureWarning")  # of random numbers
@given(st.text("cuo", min_size=1, max_size=5), st.integers(6, 40), st.integers(0, 10_000))
@few(60)
def test_the_density_is_that_of_statsmodels(kinds, n, seed):
    from statsmodels.nonparametric.kernel_density import KDEMultivariate

    points, levels = mixed_data(kinds, n, seed)
    at, _ = mixed_data(kinds, 8, seed + 1)
    at = np.where([kind == "c" for kind in kinds], at, np.minimum(at, np.maximum(levels - 1, 0)))
    ours = chapter.Density(points, kinds, levels)
    theirs = KDEMultivariate(points, kinds, ours.bandwidth)
    np.testing.assert_allclose(np.exp(ours.log(at)), theirs.pdf(at), rtol=1e-10)


@pytest.mark.filterwarnings("ignore:After 0.17:FutureWarning")  # of random numbers
@given(st.text("cuo", min_size=1, max_size=5), st.integers(6, 40), st.integers(0, 10_000))
@few(60)
def test_bandwidths_follow_the_normal_reference_where_a_kernel_stays_a_density(kinds, n, seed):
    from statsmodels.nonparametric.kernel_density import KDEMultivariate

    points, levels = mixed_data(kinds, n, seed)
    points[:, 0] = np.where(kinds[0] == "c", points[0, 0], points[:, 0])  # deviation 0
    reference = KDEMultivariate(points, kinds, "normal_reference").bw
    for kind, count, h, rule in zip(
        kinds, levels, chapter.Density(points, kinds, levels, 0.01).bandwidth, reference
    ):
        highest = math.inf if kind == "c" else 1 - 1 / count
        assert h == pytest.approx(min(max(rule, 0.01), highest), rel=1e-12)


@pytest.mark.parametrize(("kinds", "top"), [("u", 4), ("o", 4)])
def test_a_discrete_density_sums_to_1(kinds, top):
    points = np.array([[0.0], [0.0], [3.0], [1.0], [3.0], [3.0]])
    density = chapter.Density(points, kinds, np.array([top]))
    # The kernel of Wang and van Ryzin lives on all whole numbers.
    values = np.arange(top) if kinds == "u" else np.arange(-200, 200)
    assert np.exp(density.log(values[:, None].astype(float))).sum() == pytest.approx(1)


def test_a_continuous_density_integrates_to_1():
    points = np.random.default_rng(0).random((20, 2))
    line = np.linspace(-1, 2, 241)
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    density = np.exp(chapter.Density(points, "cc", np.zeros(2, int)).log(grid))
    assert density.sum() * (line[1] - line[0]) ** 2 == pytest.approx(1, abs=1e-3)


def test_far_from_all_points_the_log_density_is_finite_and_falls():
    points = np.array([[0.5 + 1e-6, 1, 1], *[[0.5, 1, 1]] * 4])
    density = chapter.Density(points, "cuo", np.array([0, 3, 4]))
    at = np.array([[0.5, 1, 1], [0.7, 1, 1], [1.0, 0, 3], [1e6, 0, 3]])
    logs = density.log(at)
    assert np.isfinite(logs).all()
    assert (np.diff(logs) < 0).all()


# --- the sampler of BOHB --------------------------------------------------------------------------


def feed(sampler: object, space: cs.ConfigurationSpace, loss: callable, n: int, budget=1) -> None:
    """Let the sampler observe the losses of `n` random configurations."""
    for _ in range(n):
        config = space.sample_configuration()
        sampler.observe(dict(config), budget, loss(config))


def drawn(sampler: object, n: int) -> np.ndarray:
    return np.array([sampler.sample().get_array() for _ in range(n)])


def test_until_one_budget_has_enough_results_draws_are_random():
    space = chapter.unit_cube(2)
    plain = copy.deepcopy(space)
    plain.seed(5)
    sampler = chapter.BOHBSampler(space, seed=5, random_fraction=0)
    expected = [plain.sample_configuration() for _ in range(13)]
    for k in range(6):  # 3 points each for good and bad: 6 results at one budget
        for budget in (1, 3)[: 2 if k < 5 else 1]:
            config = sampler.sample()
            assert dict(config) == dict(expected.pop(0))
            sampler.observe(config, budget, k)
    assert dict(sampler.sample()) != dict(expected[0])


def test_min_points_may_be_chosen():
    space = chapter.unit_cube(2)
    plain = copy.deepcopy(space)
    plain.seed(0)
    sampler = chapter.BOHBSampler(space, seed=0, random_fraction=0, min_points=10)
    expected = [dict(plain.sample_configuration()) for _ in range(21)]
    assert [dict(sampler.sample()) for _ in range(10)] == expected[:10]
    feed(sampler, space, lambda config: config["x0"], 19)
    assert [dict(sampler.sample()) for _ in range(10)] == expected[10:20]
    feed(sampler, space, lambda config: config["x0"], 1)
    assert dict(sampler.sample()) != expected[20]


def test_the_random_share_of_draws_is_random():
    space = chapter.unit_cube(1)
    sampler = chapter.BOHBSampler(space, seed=1, min_bandwidth=1e-3)
    space.seed(0)
    feed(sampler, space, lambda config: abs(config["x0"] - 0.9), 200)
    far = (np.abs(drawn(sampler, 900) - 0.9) > 0.3).mean()
    # A third of the draws is uniform, 0.6 of those are far: 0.2 with a standard error of 0.013.
    assert far == pytest.approx(0.2, abs=0.055)


def test_the_largest_budget_with_enough_results_decides():
    space = chapter.unit_cube(1)
    space.seed(3)
    sampler = chapter.BOHBSampler(space, random_fraction=0)
    feed(sampler, space, lambda config: abs(config["x0"] - 0.9), 60, budget=1)
    misled = np.median(drawn(sampler, 100))
    feed(sampler, space, lambda config: abs(config["x0"] - 0.1), 3, budget=9)
    still_misled = np.median(drawn(sampler, 100))
    feed(sampler, space, lambda config: abs(config["x0"] - 0.1), 17, budget=9)
    right = np.median(drawn(sampler, 100))
    assert misled == pytest.approx(0.9, abs=0.1)
    assert still_misled == pytest.approx(0.9, abs=0.1)
    assert right == pytest.approx(0.1, abs=0.15)


@pytest.mark.parametrize("center", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("factor", [1, 3])
def test_candidates_are_normal_around_good_points_and_inside(center, factor):
    good = chapter.Density(np.full((4, 1), center), "c", np.zeros(1, int), min_bandwidth=0.05)
    drawn_now = chapter.draw_near(good, 3000, factor, np.random.default_rng(0))[:, 0]
    deviation = 0.05 * factor
    expected = stats.truncnorm(-center / deviation, (1 - center) / deviation, center, deviation)
    assert 0 <= drawn_now.min() <= drawn_now.max() <= 1
    assert stats.kstest(drawn_now, expected.cdf).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["u", "o"])
def test_candidates_have_another_level_as_often_as_the_bandwidth_says(kind):
    good = chapter.Density(np.full((4, 1), 2.0), kind, np.array([4]), min_bandwidth=0.4)
    drawn_now = chapter.draw_near(good, 4000, 3, np.random.default_rng(0))[:, 0]
    counts = [np.sum(drawn_now == level) for level in range(4)]
    assert stats.chisquare(counts, 4000 * np.array([0.1, 0.1, 0.7, 0.1])).pvalue > 1e-3


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0]), max_size=30),
    st.integers(0, 60),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_good_points_are_the_lowest_losses_and_never_crashes(losses, crashes, min_points, random):
    losses = losses + [math.inf] * crashes
    random.shuffle(losses)
    results = {1: [(loss, np.array([float(k)])) for k, loss in enumerate(losses)]}
    sets = chapter.split(results, min_points, 15)
    finite = sum(map(math.isfinite, losses))
    assert (sets is None) == (len(losses) < 2 * min_points or finite < min_points)
    if sets is not None:
        good, bad = ([int(k) for k in points[:, 0]] for points in sets)
        assert min_points <= len(good) <= max(min_points, 0.15 * len(losses))
        assert len(bad) >= min_points
        assert not set(good) & set(bad)
        assert all(math.isfinite(losses[k]) for k in good)
        assert max(losses[k] for k in good) <= min(losses[k] for k in bad)


def test_a_crash_at_the_largest_budget_does_not_hide_a_smaller_one():
    points = [np.array([k / 10]) for k in range(10)]
    results = {1: list(zip(range(10), points)), 9: [(math.inf, p) for p in points]}
    good, _ = chapter.split(results, 2, 15)
    assert good[:, 0].tolist() == [0.0, 0.1]


@pytest.mark.parametrize("crash", [math.inf, math.nan, -math.inf])
def test_crashed_configurations_count_as_bad(crash):
    space = chapter.unit_cube(1)
    space.seed(0)
    sampler = chapter.BOHBSampler(space, random_fraction=0)
    feed(sampler, space, lambda config: crash if config["x0"] < 0.8 else 1.0, 60)
    assert (drawn(sampler, 100) > 0.7).mean() > 0.9


def rich_space() -> cs.ConfigurationSpace:
    """All supported kinds, two levels of conditions and two kinds of forbidden clauses."""
    space = cs.ConfigurationSpace(seed=1)
    kind = cs.Categorical("kind", ["a", "b", "c"], default="b")
    depth = cs.Integer("depth", (1, 16), log=True)
    rate = cs.Float("rate", (1e-5, 1.0), log=True)
    inner = cs.Categorical("inner", ["p", "q"])
    deep = cs.Float("deep", (0.0, 1.0))
    size = cs.OrdinalHyperparameter("size", ["s", "m", "l"])
    x, y = cs.Float("x", (-1.0, 1.0)), cs.Integer("y", (-5, 5))
    space.add([kind, depth, rate, inner, deep, size, x, y, cs.Constant("constant", "same")])
    space.add(
        [
            cs.EqualsCondition(inner, kind, "b"),
            cs.EqualsCondition(deep, inner, "q"),
            cs.InCondition(rate, kind, ["a", "b"]),
        ]
    )
    space.add(
        cs.ForbiddenAndConjunction(
            cs.ForbiddenEqualsClause(kind, "a"), cs.ForbiddenInClause(size, ["s", "m"])
        )
    )
    space.add(cs.ForbiddenGreaterThanRelation(x, y))
    return space


def check_legal(config: cs.Configuration) -> None:
    """Legal, and with exactly the active hyperparameters."""
    config.check_valid_configuration()
    active = {"kind", "depth", "size", "x", "y", "constant"}
    active |= {"rate"} if config["kind"] in "ab" else set()
    active |= {"inner"} if config["kind"] == "b" else set()
    active |= {"deep"} if config.get("inner") == "q" else set()
    assert set(config) == active
    assert config["x"] <= config["y"]
    assert not (config["kind"] == "a" and config["size"] in "sm")
    assert 1 <= config["depth"] <= 16
    assert isinstance(config["depth"], int | np.integer)
    assert 1e-5 <= config.get("rate", 1) <= 1
    assert config["constant"] == "same"


@pytest.mark.parametrize("favoured", ["a", "b", "c"])
def test_every_draw_is_legal_and_has_no_inactive_values(favoured):
    sampler = chapter.BOHBSampler(rich_space(), random_fraction=0.1, min_points=4)
    for _ in range(150):
        config = sampler.sample()
        check_legal(config)
        good = (config["kind"] == favoured) + (config.get("deep", 0) > 0.5)
        sampler.observe(dict(config), 1, abs(config["x"] - 0.5) - good)
    assert np.mean([sampler.sample()["kind"] == favoured for _ in range(50)]) > 0.6


def test_draws_follow_the_order_of_ordinals_and_the_scale_of_logarithms():
    space = cs.ConfigurationSpace(seed=0)
    space.add(cs.OrdinalHyperparameter("level", [*range(9)]))
    space.add(cs.Float("rate", (1e-6, 1.0), log=True))
    sampler = chapter.BOHBSampler(space, random_fraction=0)
    feed(sampler, space, lambda c: abs(c["level"] - 6) + abs(math.log10(c["rate"]) + 4), 100)
    configs = [sampler.sample() for _ in range(100)]
    assert np.mean([abs(c["level"] - 6) <= 1 for c in configs]) > 0.8  # a third of all
    assert np.mean([abs(math.log10(c["rate"]) + 4) < 1 for c in configs]) > 0.8  # a third of all


@pytest.mark.parametrize(
    "only",
    [
        cs.Float("x", (0, 1)),
        cs.Float("x", (1e-3, 10), log=True),
        cs.Integer("x", (0, 1)),
        cs.Integer("x", (1, 1000), log=True),
        cs.Categorical("x", ["a", "b"]),
        cs.Categorical("x", ["a"]),
        cs.OrdinalHyperparameter("x", [1, 2, 4]),
        cs.Constant("x", 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("min_bandwidth", [1e-3, 0.6])
def test_one_hyperparameter_of_any_kind_is_enough(only, min_bandwidth):
    space = cs.ConfigurationSpace(seed=0)
    space.add(only)
    sampler = chapter.BOHBSampler(space, random_fraction=0, min_bandwidth=min_bandwidth)
    for k in range(40):
        config = sampler.sample()
        config.check_valid_configuration()
        sampler.observe(config, 1, scrambled(k))


def test_the_same_seed_gives_the_same_draws_and_another_seed_others():
    def draws(seed):
        sampler, found = chapter.BOHBSampler(rich_space(), seed=seed, min_points=4), []
        for _ in range(40):
            found.append(dict(sampler.sample()))
            sampler.observe(found[-1], 1, found[-1]["x"])
        return found

    first = draws(0)
    assert draws(0) == first
    assert draws(1) != first


@pytest.mark.parametrize("method", ["random", "hyperband", "bohb"])
def test_a_search_leaves_the_callers_space_as_it_was(method):
    space, untouched = rich_space(), rich_space()
    chapter.run_search(method, space, lambda config, budget: config["x"], 1, 9, 60, 0)
    assert space == untouched
    assert space.sample_configuration(5) == untouched.sample_configuration(5)


@pytest.mark.parametrize(
    "hyperparameter",
    [
        cs.Float("odd", (0, 1), distribution=cs.Normal(0.5, 0.1)),
        cs.Integer("odd", (0, 9), distribution=cs.Normal(5, 1)),
        cs.Float("odd", (0, 1), distribution=cs.Beta(2, 2)),
    ],
    ids=lambda h: type(h).__name__,
)
def test_a_hyperparameter_without_a_kernel_is_named(hyperparameter):
    space = cs.ConfigurationSpace()
    space.add([cs.Float("x", (0, 1)), hyperparameter])
    with pytest.raises(ValueError, match=f"odd is a {type(hyperparameter).__name__}"):
        chapter.BOHBSampler(space)


def test_a_space_without_hyperparameters_is_refused():
    with pytest.raises(ValueError, match="no hyperparameters"):
        chapter.BOHBSampler(cs.ConfigurationSpace())


@pytest.mark.parametrize(
    "config", [{"z": 0.5}, {"x0": 7.0}, {"x0": 0.5, "z": 1}, {"x0": "high"}, {"x0": math.nan}, {}]
)
def test_a_configuration_of_another_space_is_named(config):
    sampler = chapter.BOHBSampler(chapter.unit_cube(1))
    with pytest.raises(ValueError, match="not of this space") as caught:
        sampler.observe(config, 1, 0.0)
    assert str(config) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf])
def test_a_result_without_a_budget_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget must be .* got {budget}"):
        chapter.BOHBSampler(chapter.unit_cube(1)).observe({"x0": 0.5}, budget, 0.0)


def test_draws_are_closer_to_the_optimum_than_uniform_ones():
    space = chapter.unit_cube(3)
    space.seed(0)
    sampler = chapter.BOHBSampler(space, random_fraction=0)

    def distance(point):
        return np.abs(point - [0.2, 0.5, 0.9]).sum(-1)

    feed(sampler, space, lambda config: distance(config.get_array()), 60)
    uniform = distance(np.array([c.get_array() for c in space.sample_configuration(80)]))
    ours = distance(drawn(sampler, 80))
    assert stats.mannwhitneyu(ours, uniform, alternative="less").pvalue < 1e-9
    assert np.median(ours) < 0.7 * np.median(uniform)


@pytest.mark.parametrize(("function", "seeds"), [("branin", 12), ("hartmann6", 12)])
def test_bohb_ends_nearer_to_the_minimum_than_random_search(function, seeds):
    ours, theirs = (
        [
            chapter.search_synthetic(function=function, dead=0, method=m, total=32, seed=s)["final"]
            for s in range(seeds)
        ]
        for m in ("bohb", "random")
    )
    assert stats.wilcoxon(ours, theirs, alternative="less").pvalue < 0.05


def test_bohb_counts_more_ones_than_random_search():
    ours, theirs = (
        [
            chapter.search_synthetic(function="counting_ones", dead=0, method=m, total=16, seed=s)[
                "final"
            ]
            for s in range(8)
        ]
        for m in ("bohb", "random")
    )
    assert stats.wilcoxon(ours, theirs, alternative="less").pvalue < 0.05


# --- the Gaussian process -------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=12, unique=True),
    st.floats(0.05, 0.5),
    st.sampled_from([1e-4, 1e-2, 0.3]),
)
@few(40)
def test_the_posterior_is_that_of_scikit_learn(places, length, noise):
    x = np.array(places) / 100
    y, at = np.sin(7 * x) + x, np.linspace(-0.5, 1.5, 41)
    theirs = GaussianProcessRegressor(RBF(length, "fixed"), optimizer=None, alpha=noise)
    mean, deviation = theirs.fit(x[:, None], y).predict(at[:, None], return_std=True)
    ours = chapter.posterior(x, y, at, length, noise)
    np.testing.assert_allclose(ours[0], mean, atol=1e-8)
    np.testing.assert_allclose(ours[1] ** 2, deviation**2, atol=1e-9)


def test_far_from_all_observations_the_posterior_is_the_prior():
    mean, deviation = chapter.posterior(np.array([0.0]), np.array([3.0]), np.array([0.0, 9.0]))
    assert mean == pytest.approx([3, 0], abs=1e-4)
    assert deviation == pytest.approx([0, 1], abs=2e-3)


@pytest.mark.parametrize("length", [0, -1, math.nan])
def test_a_length_that_is_not_positive_is_refused(length):
    with pytest.raises(ValueError, match=f"length .* {length}"):
        chapter.posterior(np.zeros(1), np.zeros(1), np.zeros(1), length)


@pytest.mark.parametrize("mean", [-2.0, 0.0, 0.5, 1.5])
@pytest.mark.parametrize("deviation", [0.1, 1.0, 3.0])
def test_expected_improvement_is_a_mean_of_improvements(mean, deviation):
    draws = np.random.default_rng(0).normal(mean, deviation, 100_000)
    gains = np.maximum(0.4 - draws, 0)
    expected = chapter.expected_improvement(np.array([mean]), np.array([deviation]), 0.4)[0]
    assert expected == pytest.approx(gains.mean(), abs=4 * gains.std() / 100_000**0.5 + 1e-12)


def test_nothing_is_expected_far_above_the_best_and_all_where_nothing_is_unknown():
    mean = np.array([9.0, 60.0, 1e6, -3.0, 3.0])
    deviation = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    gains = chapter.expected_improvement(mean, deviation, 0.0)
    assert gains == pytest.approx([0, 0, 0, 3, 0], abs=1e-9)
    assert (gains > -1e-15).all()


# --- synthetic problems ---------------------------------------------------------------------------


@pytest.mark.parametrize("x, y", [(-np.pi, 12.275), (np.pi, 2.275), (9.42478, 2.475)])  # noqa: PT006
def test_branin_has_its_three_minima(x, y):
    config = {"x0": (x + 5) / 15, "x1": y / 15}
    assert chapter.branin(config) == pytest.approx(0.397887, abs=1e-5)
    assert chapter.make_problem("branin").optimum == pytest.approx(0.397887, abs=1e-6)


def test_hartmann6_has_its_minimum():
    place = (0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573)
    config = {f"x{k}": value for k, value in enumerate(place)}
    assert chapter.hartmann6(config) == pytest.approx(-3.32237, abs=1e-5)
    assert chapter.make_problem("hartmann6").optimum == pytest.approx(-3.32237, abs=1e-5)


def test_counting_ones_counts_to_minus_16():
    ones = {f"bit{k}": 1 for k in range(8)} | {f"p{k}": 1.0 for k in range(8)}
    assert chapter.counting_ones(ones) == chapter.make_problem("counting_ones").optimum == -16
    half = {f"bit{k}": k % 2 for k in range(8)} | {f"p{k}": 0.25 for k in range(8)}
    assert chapter.counting_ones(half) == -6


def test_coins_are_estimated_without_bias_and_better_with_more_throws():
    config = {f"bit{k}": 0 for k in range(8)} | {f"p{k}": 0.5 for k in range(8)}
    rng = np.random.default_rng(0)
    for share, throws in ((9 / 729, 9), (1, 729)):
        seen = np.array([chapter.counting_ones(config, share, rng) for _ in range(2000)])
        deviation = (8 * 0.25 / throws) ** 0.5
        assert seen.mean() == pytest.approx(-4, abs=4.5 * deviation / 2000**0.5)
        assert seen.std() == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize("name", ["branin", "hartmann6"])
def test_the_full_budget_sees_the_truth_and_less_does_not(name):
    problem = chapter.make_problem(name)
    problem.space.seed(0)
    for config in problem.space.sample_configuration(20):
        truth = problem.function(config)
        rng = np.random.default_rng(0)
        assert problem.function(config, 1, rng) == truth
        assert problem.function(config, 1 / 27, rng) != truth
        assert truth >= problem.optimum


def test_the_low_fidelity_of_hartmann6_is_within_a_tenth_of_each_summand():
    config = {f"x{k}": 0.5 for k in range(6)}
    assert 0 < chapter.hartmann6(config, 0.0) - chapter.hartmann6(config) < 0.4


@pytest.mark.parametrize("name", ["branin", "hartmann6", "counting_ones"])
def test_dead_inputs_are_drawn_and_not_read(name):
    alive, padded = chapter.make_problem(name), chapter.make_problem(name, 3)
    assert set(padded.space) - set(alive.space) == {"dead0", "dead1", "dead2"}
    config = dict(padded.space.sample_configuration())
    other = config | {f"dead{k}": 1 - config[f"dead{k}"] for k in range(3)}
    assert padded.function(config) == padded.function(other)


def test_an_unknown_function_is_named():
    with pytest.raises(ValueError, match="unknown function 'brannin'"):
        chapter.make_problem("brannin")


# --- shake-shake and ShakeDrop --------------------------------------------------------------------


def test_two_coefficients_have_one_value_and_another_gradient():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    forward, backward = torch.rand(2, 4, 3, dtype=torch.float64)
    out = chapter.two_coefficients(x, forward, backward)
    out.sum().backward()
    torch.testing.assert_close(out, forward * x)
    torch.testing.assert_close(x.grad, backward)


def coefficients(combine: callable, branches: int, n: int, side: int = 2) -> tuple:
    """Forward and backward coefficients (branches, n) of each image, recovered from outside.

    Fails unless one coefficient an image explains all its channels and pixels.
    """
    shape = (n, 3, side, side)
    residuals = [torch.randn(shape, dtype=torch.float64) for _ in range(branches)]
    for residual in residuals:
        residual.requires_grad_()
    out = combine(residuals)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    columns = torch.stack([r.detach().flatten(1) for r in residuals], 2)
    target = out.detach().flatten(1)[:, :, None]
    forward = torch.linalg.lstsq(columns, target).solution
    torch.testing.assert_close(columns @ forward, target, rtol=1e-5, atol=1e-6)
    ratios = torch.stack([r.grad / gradient for r in residuals]).flatten(2)
    torch.testing.assert_close(ratios, ratios[:, :, :1].expand_as(ratios), rtol=1e-5, atol=1e-6)
    return forward[:, :, 0].T, ratios[:, :, 0]


def shaken(residuals: list) -> torch.Tensor:
    return chapter.shake_shake(residuals, training=True)


@pytest.mark.parametrize("branches", [2, 3, 5])
def test_shake_shake_draws_convex_coefficients_anew_for_each_image_and_pass(branches):
    torch.manual_seed(0)
    forward, backward = coefficients(shaken, branches, 50)
    for drawn_now in (forward, backward):
        torch.testing.assert_close(drawn_now.sum(0), torch.ones(50, dtype=torch.float64))
        assert drawn_now.min() >= 0
        assert len(drawn_now[0].round(decimals=5).unique()) > 45
    assert (forward - backward).abs().max(0).values.min() > 1e-4
    again, _ = coefficients(shaken, branches, 50)
    assert (again - forward).abs().max(0).values.min() > 1e-4


@pytest.mark.parametrize("branches", [2, 4])
def test_shake_shake_is_uniform_on_the_simplex(branches):
    torch.manual_seed(1)
    forward, backward = coefficients(shaken, branches, 3000)
    for drawn_now in (*forward, *backward):  # for two branches Beta(1, 1) is U(0, 1)
        assert stats.kstest(drawn_now, stats.beta(1, branches - 1).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(forward[0], backward[0])[0, 1]) < 4.5 / 3000**0.5


def test_shake_shake_is_the_mean_when_testing():
    residuals = [torch.randn(4, 3, 2, 2, requires_grad=True) for _ in range(3)]
    out = chapter.shake_shake(residuals, training=False)
    torch.testing.assert_close(out, sum(residuals) / 3)
    out.sum().backward()
    torch.testing.assert_close(residuals[1].grad, torch.full((4, 3, 2, 2), 1 / 3))


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24], ids=["smallest", "largest"])
def test_the_extreme_draws_of_torch_give_finite_coefficients(draw, monkeypatch):
    # In a search's millions of draws, torch.rand gives 0 now and then (each time with 2^-24).
    rand = torch.rand

    def with_an_extreme(*shape, **options):
        numbers = rand(*shape, **options)
        numbers.view(-1)[0] = draw
        return numbers

    monkeypatch.setattr(torch, "rand", with_an_extreme)
    residuals = [torch.ones(2, 1, 1, 1) for _ in range(2)]
    assert chapter.shake_shake(residuals, training=True).isfinite().all()
    assert chapter.shake_drop(residuals[0], 0.5, training=True).isfinite().all()


def dropped(keep: float) -> callable:
    return lambda residuals: chapter.shake_drop(residuals[0], keep, training=True)


def test_shake_drop_passes_an_image_or_draws_two_coefficients():
    torch.manual_seed(0)
    keep, n = 0.4, 4000
    forward, backward = (c[0].numpy() for c in coefficients(dropped(keep), 1, n, side=1))
    passed = np.isclose(forward, 1, atol=1e-9) & np.isclose(backward, 1, atol=1e-9)
    assert passed.mean() == pytest.approx(keep, abs=4.5 * (keep * (1 - keep) / n) ** 0.5)
    shaken_forward, shaken_backward = forward[~passed], backward[~passed]
    assert stats.kstest(shaken_forward, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert stats.kstest(shaken_backward, stats.uniform(0, 1).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(shaken_forward, shaken_backward)[0, 1]) < 4.5 / (~passed).sum() ** 0.5


def test_shake_drop_has_one_coefficient_for_all_pixels_of_an_image():
    torch.manual_seed(0)
    forward, _ = coefficients(dropped(0.0), 1, 30, side=4)
    assert len(forward[0].round(decimals=5).unique()) == 30


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8])
def test_what_shake_drop_gives_when_testing_is_the_mean_of_training(keep):
    torch.manual_seed(0)
    n = 40_000
    ones = torch.ones(n, 1, 1, 1)
    assert torch.equal(chapter.shake_drop(3 * ones, keep, training=False), keep * (3 * ones))
    seen = chapter.shake_drop(ones, keep, training=True)
    # Its standard error is at most 0.003, so a mean that is off by 0.03 fails almost surely.
    deviation = (keep + (1 - keep) / 3 - keep**2) ** 0.5
    assert float(seen.mean()) == pytest.approx(keep, abs=4.5 * deviation / n**0.5)


@pytest.mark.parametrize("training", [True, False])
def test_keeping_everything_changes_nothing(training):
    x = torch.randn(5, 3, 2, 2)
    assert torch.equal(chapter.shake_drop(x, 1, training), x)
    assert torch.equal(chapter.shake_drop(x, 1 - 0.5 * 0.0, training), x)


# --- branched networks ----------------------------------------------------------------------------


def as_residual_state(branched: dict, prefix: str = "") -> dict:
    """The state of one-branch blocks under the names of `ResidualBlock`."""
    names = {
        "norm": "norms.0",
        "branches.0.0": "convs.0",
        "branches.0.1": "norms.1",
        "branches.0.3": "convs.1",
        "shortcut": "shortcut",
    }
    state = {}
    for key, value in branched.items():
        head = next((h for h in names if key.removeprefix(prefix).startswith(f"{h}.")), None)
        state[key if head is None else key.replace(head, names[head], 1)] = value
    return state


def assert_same_network(ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor) -> None:
    """Equal outputs and equal gradients of all weights, in training and in testing."""
    assert count_parameters(ours) == count_parameters(theirs)
    for training in (True, False):
        out, expected = (network.train(training)(x) for network in (ours, theirs))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for network, value in ((ours, out), (theirs, expected)):
            network.zero_grad()
            value.square().sum().backward()
        for w, v in zip(gradients(ours), gradients(theirs)):
            torch.testing.assert_close(w, v, rtol=1e-8, atol=1e-10)


def gradients(network: torch.nn.Module) -> list[torch.Tensor]:
    """In an order that both kinds of blocks share."""
    return sorted((p.grad for p in network.parameters()), key=lambda g: (g.shape, float(g.sum())))


@pytest.mark.parametrize(("channels", "stride"), [((4, 4), 1), ((4, 6), 1), ((4, 4), 2)])
def test_a_block_with_one_branch_is_the_residual_block(channels, stride):
    torch.manual_seed(0)
    ours = chapter.BranchedBlock(*channels, stride, 1, 1.0).double()
    theirs = ResidualBlock(*channels, stride, (3, 3)).double()
    theirs.load_state_dict(as_residual_state(ours.state_dict()))
    assert_same_network(ours, theirs, torch.randn(3, 4, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 2)])
def test_one_branch_without_death_is_the_wide_residual_network(depth, width):
    torch.manual_seed(0)
    n = (depth - 4) // 6
    ours = chapter.BranchedResNet(16, [n] * 3, [width, 2, 2], [1] * 3, 0.0).double()
    theirs = WideResNet(depth, width).double()
    state = {}
    for key, value in ours.state_dict().items():
        head, _, rest = key.partition(".")
        if head == "blocks":
            number, _, inner = rest.partition(".")
            ((inner, value),) = as_residual_state({inner: value}).items()
            key = f"blocks.{number}.{inner}"
        state[key] = value
    theirs.load_state_dict(state)
    assert_same_network(ours, theirs, torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_the_death_rate_grows_linearly_to_the_last_block():
    network = chapter.BranchedResNet(2, [1, 2, 1], [1, 1, 1], [1, 1, 1], 0.8)
    assert [1 - block.keep for block in network.blocks] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_branches_are_averaged_when_testing():
    torch.manual_seed(0)
    block = chapter.BranchedBlock(3, 3, 1, 3, 1.0).eval()
    x = torch.randn(2, 3, 4, 4)
    active = F.relu(block.norm(x))
    expected = x + sum(branch(active) for branch in block.branches) / 3
    torch.testing.assert_close(block(x), expected)


def test_the_strided_stem_halves_the_image():
    x = torch.randn(1, 1, 8, 8)
    for stride in (1, 2):
        network = chapter.BranchedResNet(2, [1] * 3, [1] * 3, [1] * 3, 0, 1, 10, stride)
        assert network.stem(x).shape[-1] == 8 // stride
        assert network(torch.cat([x, x])).shape == (2, 10)


@pytest.mark.parametrize("kernels", chapter.BLOCK_TYPES)
def test_the_blocks_of_table_2_have_the_printed_millions_of_weights(kernels):
    sizes, depth, millions, _ = chapter.BLOCK_TYPES[kernels]
    assert kernels == f"B({','.join(map(str, sizes))})"
    found = chapter.size_of(depth=depth, width=2, kernels=list(sizes))["parameters"]
    assert round(found, 1) == millions


@pytest.mark.parametrize("deep", chapter.DEEPENING)
def test_blocks_deepened_at_constant_size_are_as_many_convolutions_in_all(deep):
    depth, _ = chapter.DEEPENING[deep]
    assert depth % 6 == 4
    assert (depth - 4) // 6 * deep == 12
    found = chapter.size_of(depth=depth, width=2, kernels=[3] * deep)["parameters"]
    assert round(found, 1) == 2.2


@pytest.mark.parametrize("shape", chapter.WIDE, ids=lambda s: f"{s[0]}-{s[1]}")
def test_the_networks_of_table_4_have_the_printed_millions_of_weights(shape):
    found = chapter.size_of(depth=shape[0], width=shape[1], kernels=[3, 3])["parameters"]
    assert round(found, 1) == chapter.WIDE[shape][0]


# --- the spaces and their networks ----------------------------------------------------------------

PUBLISHED = {
    "blocks_1": (int, 1, 16, True),
    "blocks_2": (int, 1, 16, True),
    "blocks_3": (int, 1, 16, True),
    "filters": (int, 8, 32, True),
    "widen_1": (float, 0.5, 8, True),
    "widen_2": (float, 0.5, 4, True),
    "widen_3": (float, 0.5, 4, True),
    "branches_1": (int, 1, 5, False),
    "branches_2": (int, 1, 5, False),
    "branches_3": (int, 1, 5, False),
    "learning_rate": (float, 1e-3, 1, True),
    "batch_size": (int, 32, 128, True),
    "weight_decay": (float, 1e-5, 1e-3, True),
    "momentum": (float, 1e-3, 0.99, False),
    "mixup_alpha": (float, 0, 1, False),
    "cutout_length": (int, 0, 20, False),
    "death_rate": (float, 0, 1, False),
}


def described(space: cs.ConfigurationSpace) -> dict[str, tuple]:
    return {
        name: (
            int if isinstance(p, cs.UniformIntegerHyperparameter) else float,
            p.lower,
            p.upper,
            p.log,
        )
        for name, p in space.items()
    }


def test_the_joint_space_has_the_17_published_ranges():
    assert described(chapter.joint_space()) == PUBLISHED


def test_the_small_space_ties_the_groups_and_keeps_how_networks_are_trained():
    space = described(chapter.small_space())
    trained = ("learning_rate", "batch_size", "weight_decay", "momentum", "mixup_alpha")
    assert set(space) == {
        *("blocks", "filters", "widen", "branches", "cutout_length", "death_rate"),
        *trained,
    }
    assert {name: space[name] for name in trained} == {name: PUBLISHED[name] for name in trained}


def test_the_small_space_may_be_restricted():
    names = ["widen", "momentum"]
    assert set(chapter.small_space(names)) == set(names)
    both = {*chapter.small_space(chapter.ARCHITECTURE), *chapter.small_space(["momentum"])}
    assert both == {*chapter.ARCHITECTURE, "momentum"}


def formula(
    filters: int, blocks: list, widen: list, branches: list, in_channels: int, classes: int
) -> int:
    """Parameters in closed form, all blocks of a group but its first at once."""
    count, before = 9 * in_channels * filters, filters
    for group in range(3):
        out = max(1, round(filters * math.prod(widen[: group + 1])))
        moved = group > 0 or before != out
        branch = 9 * out * out + 2 * out
        count += 2 * before + branches[group] * (branch + 9 * before * out) + moved * before * out
        count += (blocks[group] - 1) * (2 * out + branches[group] * (branch + 9 * out * out))
        before = out
    return count + 2 * before + before * classes + classes


@given(
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
    st.integers(4, 9),
    st.lists(st.floats(0.5, 3), min_size=3, max_size=3),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
    st.integers(1, 3),
    st.integers(2, 11),
)
@few(30)
def test_parameters_are_counted_by_a_formula(blocks, filters, widen, branches, channels, classes):
    with torch.device("meta"):
        network = chapter.BranchedResNet(filters, blocks, widen, branches, 0.5, channels, classes)
    expected = formula(filters, blocks, widen, branches, channels, classes)
    assert count_parameters(network) == expected


def one_step(network: torch.nn.Module, images: torch.Tensor) -> float:
    """A step of SGD on random labels; returns the loss."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True)
    labels = torch.arange(len(images), device=images.device) % 10
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    return loss


def assert_trains(network: torch.nn.Module, images: torch.Tensor) -> None:
    before = [p.detach().clone() for p in network.parameters()]
    assert one_step(network, images).isfinite()
    for was, parameter in zip(before, network.parameters()):
        assert parameter.isfinite().all()
        assert not torch.equal(was, parameter)


CORNERS = list(itertools.product((0, 1), repeat=5))


@pytest.mark.parametrize("corner", CORNERS, ids=lambda c: "".join(map(str, c)))
def test_every_corner_of_the_small_architectures_trains(corner):
    torch.manual_seed(0)
    space = chapter.small_space()
    config = {
        name: (space[name].lower, space[name].upper)[high]
        for name, high in zip((*chapter.ARCHITECTURE, "death_rate"), corner)
    }
    network = chapter.build_network(config, in_channels=1, stem_stride=2)
    assert_trains(network, torch.randn(6, 1, 28, 28))


def joint_corner(blocks: int, filters: int, widen: int, branches: int, death_rate: int) -> dict:
    """Each at its lower or upper end, the three groups alike."""
    ends = {name: PUBLISHED[name][1:3] for name in PUBLISHED}
    names = {
        **{f"blocks_{g}": blocks for g in (1, 2, 3)},
        "filters": filters,
        **{f"widen_{g}": widen for g in (1, 2, 3)},
        **{f"branches_{g}": branches for g in (1, 2, 3)},
        "death_rate": death_rate,
    }
    return {name: ends[name][high] for name, high in names.items()}


def grouped(config: dict, name: str) -> list:
    return [config[f"{name}_{g}"] for g in (1, 2, 3)]


@pytest.mark.parametrize("corner", CORNERS, ids=lambda c: "".join(map(str, c)))
def test_every_corner_of_the_joint_space_can_be_built_and_counted(corner):
    config = joint_corner(*corner)
    with torch.device("meta"):
        network = chapter.build_network(config)
    assert len(network.blocks) == sum(grouped(config, "blocks"))
    groups = [grouped(config, name) for name in ("blocks", "widen", "branches")]
    assert count_parameters(network) == formula(config["filters"], *groups, 3, 10)


# Each pair of factors meets in all four ways, and the largest and the smallest are among them.
PAIRWISE = ["11111", "00011", "00110", "01001", "10100", "11000", "00000"]


def test_the_chosen_corners_cover_all_pairs():
    for a, b in itertools.combinations(range(5), 2):
        assert {(corner[a], corner[b]) for corner in PAIRWISE} == set(itertools.product("01", "01"))


@pytest.mark.parametrize("corner", PAIRWISE)
def test_corners_of_the_joint_space_make_a_step_without_memory(corner):
    with torch.device("meta"):
        network = chapter.build_network(joint_corner(*map(int, corner)))
        loss = one_step(network, torch.empty(2, 3, 32, 32))
    assert loss.shape == ()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())


@pytest.mark.parametrize("seed", range(12))
def test_random_joint_configurations_train(seed):
    torch.manual_seed(seed)
    space = chapter.joint_space()
    space.seed(seed)
    config = dict(space.sample_configuration())
    config["filters"] = 8
    for g in (1, 2, 3):  # small enough for a test
        config[f"blocks_{g}"] = 1 + config[f"blocks_{g}"] % 2
        config[f"widen_{g}"] = min(config[f"widen_{g}"], 1.5)
    network = chapter.build_network(config, in_channels=1)
    assert len({len(block.branches) for block in network.blocks}) <= 3
    assert_trains(network, torch.randn(4, 1, 8, 8))


# --- training a configuration ---------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 0.99), max_size=4, unique=True), st.floats(0, 1))
@settings(deadline=None)
def test_each_restart_is_a_cosine_of_its_own(inner, fraction):
    shares = [*sorted(inner), 1]
    factor = chapter.restarts(shares)
    low, high = next((a, b) for a, b in zip([0, *shares], shares) if fraction < b or b == 1)
    expected = 0.5 * (1 + math.cos(math.pi * (fraction - low) / (high - low)))
    assert factor(fraction, 0.0) == pytest.approx(expected, abs=1e-9)


def test_the_rate_is_full_after_each_share_and_zero_before_it():
    shares = [1 / 27, 1 / 9, 1 / 3, 1]
    factor = chapter.restarts(shares)
    for share in (0, *shares[:-1]):
        assert factor(share + 1e-9, 0.0) == pytest.approx(1, abs=1e-6)
    for share in shares:
        assert factor(share - 1e-9, 0.0) == pytest.approx(0, abs=1e-6)
    assert factor(1.0, 0.0) == factor(1 + 1e-9, 0.0) == 0


def test_without_inner_shares_the_rate_is_one_cosine():
    factor = chapter.restarts([1])
    for fraction in np.linspace(0, 1, 21):
        assert factor(fraction, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * fraction)))


SMALL_CONFIG = {
    "blocks": 1,
    "filters": 4,
    "widen": 1.0,
    "branches": 2,
    "learning_rate": 0.1,
    "batch_size": 64,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "mixup_alpha": 0.2,
    "cutout_length": 2,
    "death_rate": 0.5,
}


def assert_whole(error: float, images: int) -> None:
    """An error in per cent of so many images."""
    assert error * images / 100 == pytest.approx(round(error * images / 100), abs=1e-6)


def test_a_training_reports_held_out_errors_on_the_way_and_at_the_end():
    found, again, other = (
        chapter.train_config(SMALL_CONFIG, "digits", 0.64, [0.5, 1], looks=[0.2, 0.5], seed=s)
        for s in (0, 0, 1)
    )
    official = load("digits")
    held_out, tested = len(official.train_labels) // 10, len(official.test_labels)
    assert found["stopped"] == "epochs"
    assert len(found["errors"]) == 3
    for error in found["errors"]:
        assert_whole(error, held_out)
    assert_whole(found["test_error"], tested)
    assert found["parameters"] == formula(4, [1] * 3, [1.0] * 3, [2] * 3, 1, 10)
    measured = ("errors", "test_error", "parameters")
    assert [found[m] for m in measured] == [again[m] for m in measured]
    assert [found[m] for m in measured] != [other[m] for m in measured]


def test_a_budget_of_images_is_counted_in_thousands(monkeypatch):
    steps = []

    class Count(chapter.EvaluateAt):
        def on_step(self, training):
            steps.append(training.step)

    monkeypatch.setattr(chapter, "EvaluateAt", Count)
    chapter.train_config(SMALL_CONFIG, "digits", 0.64, [1], test=False)
    assert steps == list(range(1, 11))  # of 64 images each


def test_a_training_without_test_has_no_test_error():
    found = chapter.train_config(SMALL_CONFIG, "digits", 0.1, [1], test=False)
    assert math.isnan(found["test_error"])
    assert len(found["errors"]) == 1
    assert math.isfinite(found["errors"][0])


def test_a_training_of_few_steps_still_has_an_error_at_every_look():
    # Two steps: the first passes all three looks at once.
    config = SMALL_CONFIG | {"batch_size": 128}
    looks = [1 / 27, 1 / 9, 1 / 3]
    found = chapter.train_config(config, "digits", 0.256, [*looks, 1], looks=looks)
    assert np.isfinite(found["errors"]).all()
    assert len(found["errors"]) == 4


def test_a_training_that_diverges_has_no_errors_after_it():
    config = SMALL_CONFIG | {"learning_rate": 1e30}
    found = chapter.train_config(config, "digits", 1, [0.5, 1], looks=[0.5])
    assert "not finite" in found["stopped"]
    assert math.isnan(found["errors"][-1])
    assert len(found["errors"]) == 2


def test_seconds_are_a_budget():
    found = chapter.train_config(SMALL_CONFIG, "digits", 0.2, [1], unit="seconds")
    assert found["stopped"] == "seconds"
    assert 0.2 <= found["seconds"] < 5


def test_an_unknown_unit_is_named():
    with pytest.raises(ValueError, match="'epochs'"):
        chapter.train_config(SMALL_CONFIG, "digits", 0.1, [1], unit="epochs")


@pytest.mark.parametrize("seed", range(6))
def test_random_small_configurations_train(seed):
    row = chapter.train_random(
        data="digits", space="small", unit="images", max_budget=0.4, shares=[1 / 3, 1], seed=seed
    )
    assert set(chapter.small_space()) <= set(row)
    assert row["stopped"] == "epochs"
    assert len(row["errors"]) == 2
    assert all(0 <= error <= 100 for error in [*row["errors"], row["test_error"]])


def test_a_joint_configuration_trains_from_its_own_keys():
    config = {f"{name}_{g}": 1 for name in ("blocks", "widen", "branches") for g in (1, 2, 3)}
    config |= {k: v for k, v in SMALL_CONFIG.items() if k not in ("blocks", "widen", "branches")}
    found = chapter.train_config(config, "digits", 0.1, [1])
    assert found["stopped"] == "epochs"
    assert found["parameters"] == formula(4, [1] * 3, [1] * 3, [1] * 3, 1, 10)


def test_a_wide_network_trains_and_is_tested_on_all_test_images():
    row = chapter.train_wide(
        data="digits", images=300, depth=10, width=1, kernels=[3, 1], epochs=0.5, seed=0
    )
    assert_whole(row["error"], len(load("digits").test_labels))
    assert row["errors"][-1] == row["error"]
    assert row["stopped"] == "epochs"
    assert row["parameters"] == count_parameters(WideResNet(10, 1, (3, 1), 1))


# --- searches on the same terms -------------------------------------------------------------------


def slow_incumbents(trials: list[Trial], points: list[float]) -> list[int]:
    answers = []
    for point in points:
        spent = np.cumsum([t.budget for t in trials])
        done = [k for k, s in enumerate(spent) if s <= point * 1.000001]
        good = [k for k in done if math.isfinite(trials[k].loss)]
        largest = max((trials[k].budget for k in good), default=None)
        candidates = [k for k in good if trials[k].budget == largest]
        answers.append(min(candidates, key=lambda k: trials[k].loss, default=-1))
    return answers


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 3, 9]), st.sampled_from([0.1, 0.2, 0.3, 0.4, math.inf])),
        max_size=20,
    ),
    st.lists(st.floats(0, 100), max_size=6),
)
@settings(deadline=None)
def test_the_incumbent_is_the_lowest_loss_at_the_largest_budget_so_far(results, points):
    trials = [Trial({"x": k}, b, loss, 0.0) for k, (b, loss) in enumerate(results)]
    points = sorted(points)
    assert chapter.incumbents(trials, points) == slow_incumbents(trials, points)


def test_a_rounded_sum_of_budgets_reaches_its_point():
    trials = [Trial({}, 0.1, 1.0, 0.0)] * 3
    trials[2] = Trial({}, 0.1, 0.5, 0.0)
    assert chapter.incumbents(trials, [0.1, 0.3]) == [0, 2]


@pytest.mark.parametrize("method", ["random", "hyperband", "bohb"])
def test_a_method_spends_no_more_than_its_total_and_repeats_per_seed(method):
    problem = chapter.make_problem("branin")

    def search(seed):
        trials = chapter.run_search(
            method, problem.space, lambda c, b: problem.function(c, b / 27), 1, 27, 110, seed
        )
        return [(t.config, t.budget, t.loss) for t in trials]

    trials = search(0)
    assert 80 < sum(budget for _, budget, _ in trials) <= 110
    assert max(budget for _, budget, _ in trials) == 27
    assert search(0) == trials
    assert search(1) != trials


def test_smac_is_asked_on_the_same_terms():
    problem = chapter.make_problem("branin")

    def evaluate(config, budget):
        return problem.function(config, budget / 27)

    trials = chapter.run_search("smac", problem.space, evaluate, 9, 27, 100, 3)
    expected = smac_search(problem.space, evaluate, min_budget=9, max_budget=27, total=100, seed=3)
    for ours, theirs in zip(trials, expected, strict=True):
        assert (ours.config, ours.budget, ours.loss) == (theirs.config, theirs.budget, theirs.loss)
    assert 70 < sum(t.budget for t in trials) <= 100


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="unknown method 'grid'"):
        chapter.run_search("grid", chapter.unit_cube(1), lambda c, b: 0.0, 1, 9, 20, 0)


@pytest.mark.parametrize("method", ["random", "hyperband", "bohb"])
@pytest.mark.parametrize("function", ["branin", "hartmann6", "counting_ones"])
def test_a_synthetic_search_reports_the_true_regret(method, function):
    def row(seed):
        return chapter.search_synthetic(
            function=function, dead=2, method=method, total=6, seed=seed
        )

    found = row(3)
    assert len(found["regret"]) == 6
    assert found["final"] == found["regret"][-1]
    assert 5 < found["spent"] <= 6
    assert min(found["regret"]) >= 0
    assert row(3) == found
    assert row(4) != found


def test_random_search_never_gets_worse():
    row = chapter.search_synthetic(function="hartmann6", dead=0, method="random", total=20, seed=0)
    assert row["trials"] == row["spent"] == 20
    assert (np.diff(row["regret"]) <= 0).all()


@pytest.fixture
def quick_training(monkeypatch):
    """`train_config` without training; every seventh call fails. Returns the list of calls."""
    calls = []

    def train(config, data, budget, shares, *, unit, looks=(), test=True, seed=0):
        calls.append((dict(config), budget, list(shares)))
        if len(calls) % 7 == 0:
            raise RuntimeError("diverged")
        loss = abs(math.log10(config["learning_rate"]) + 1) + abs(config["filters"] - 6) / 4
        errors = [loss + 1 / (budget * share) for share in (*looks, 1)]
        return {"errors": errors, "test_error": 100 + errors[-1] if test else math.nan}

    monkeypatch.setattr(chapter, "train_config", train)
    return calls


def search_networks(method: str, seed: int = 0, space: str = "small") -> dict:
    return chapter.search_networks(
        data="digits",
        space=space,
        method=method,
        unit="images",
        min_budget=1 / 9,
        max_budget=1,
        total=8,
        seed=seed,
    )


@pytest.mark.parametrize(
    ("space", "method"),
    [
        *(("small", m) for m in ("random", "hyperband", "bohb", "architecture first")),
        *(("joint", m) for m in ("random", "hyperband", "bohb")),
    ],
)
def test_a_search_for_networks_reports_every_training(space, method, quick_training):
    row = search_networks(method, space=space)
    assert len(quick_training) == len(row["budgets"]) == len(row["errors"])
    assert len(row["test_errors"]) == len(row["configs"]) == len(quick_training)
    assert sum(row["budgets"]) <= 8 * (1 + 1e-9)
    for k, (config, budget, shares) in enumerate(quick_training):
        assert json.loads(row["configs"][k]) == pytest.approx(config)
        assert set(config) == set(chapter.SPACES[space]())
        assert row["budgets"][k] == pytest.approx(budget)
        rungs = [r for r in (1 / 9, 1 / 3, 1) if r <= budget * 1.001]
        assert [share * budget for share in shares] == pytest.approx(rungs)
        assert (row["errors"][k] == math.inf) == (k % 7 == 6)
        if budget < 1 or k % 7 == 6:
            assert math.isnan(row["test_errors"][k])
        else:
            assert row["test_errors"][k] == row["errors"][k] + 100
    trials = [Trial({}, b, e, 0.0) for b, e in zip(row["budgets"], row["errors"])]
    (answer,) = slow_incumbents(trials, [8])
    assert row["final_test_error"] == row["test_errors"][answer]


@pytest.mark.parametrize("max_budget", [1 / 3, 200 / 7])
def test_a_full_budget_that_is_no_round_number_is_tested_too(max_budget, quick_training):
    row = chapter.search_networks(
        data="digits",
        space="small",
        method="hyperband",
        unit="images",
        min_budget=max_budget / 3,
        max_budget=max_budget,
        total=4 * max_budget,
        seed=0,
    )
    full = [b == pytest.approx(max_budget) for b in row["budgets"]]
    failed = [error == math.inf for error in row["errors"]]
    expected = [f and not bad for f, bad in zip(full, failed)]
    assert any(expected)
    assert [math.isfinite(error) for error in row["test_errors"]] == expected


def test_the_architecture_is_searched_first_and_then_kept(quick_training):
    row = search_networks("architecture first", seed=1)
    rest = [name for name in chapter.small_space() if name not in chapter.ARCHITECTURE]
    default = dict(chapter.small_space().get_default_configuration())
    changed = [any(config[n] != default[n] for n in rest) for config, _, _ in quick_training]
    first = quick_training[: changed.index(True)]
    second = quick_training[changed.index(True) :]
    spent = [sum(budget for _, budget, _ in half) for half in (first, second)]
    assert all(2 < half <= 4 * (1 + 1e-9) for half in spent)
    kept = {tuple(config[n] for n in chapter.ARCHITECTURE) for config, _, _ in second}
    tried = {tuple(config[n] for n in chapter.ARCHITECTURE) for config, _, _ in first}
    assert len(tried) > 3
    trials = [Trial({}, b, e, 0.0) for b, e in zip(row["budgets"], row["errors"])]
    (answer,) = slow_incumbents(trials[: len(first)], [8])
    assert kept == {tuple(first[answer][0][n] for n in chapter.ARCHITECTURE)}
    assert len({config["learning_rate"] for config, _, _ in second}) > 3


# --- simulated workers ----------------------------------------------------------------------------


class Watched:
    """A scheduler that notes what it was asked and told, in order."""

    def __init__(self, scheduler: object) -> None:
        self.scheduler, self.events = scheduler, []

    def next_job(self) -> tuple[int, int] | None:
        job = self.scheduler.next_job()
        if job is not None:
            self.events.append(("job", *job))
        return job

    def report(self, config: int, rung: int, loss: float) -> None:
        self.events.append(("report", config, rung, loss))
        self.scheduler.report(config, rung, loss)

    @property
    def jobs(self) -> list[tuple[int, int]]:
        return [event[1:] for event in self.events if event[0] == "job"]


def uneven(config: int, rung: int) -> tuple[float, float]:
    """Durations that differ and grow with the rung; losses without order."""
    return 3**rung * (0.5 + scrambled(config + 100)), scrambled(config) + 0.1 * scrambled(rung)


def even(config: int, rung: int) -> tuple[float, float]:
    return 1.0, scrambled(config)


SCHEDULERS = {
    "synchronous": lambda: chapter.Synchronous(9, 3),
    "asynchronous": lambda: chapter.Asynchronous(3),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_worker_is_never_idle(scheduler):
    results, idle = chapter.simulate(SCHEDULERS[scheduler](), 1, uneven, 200)
    assert idle == pytest.approx(0, abs=1e-12)
    durations = [uneven(r.config, r.rung)[0] for r in results]
    assert [r.time for r in results] == pytest.approx(np.cumsum(durations))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("workers", [1, 3, 8])
def test_simulated_time_adds_up(scheduler, workers):
    horizon = 60
    longer, _ = chapter.simulate(SCHEDULERS[scheduler](), workers, uneven, horizon + 30)
    results, idle = chapter.simulate(SCHEDULERS[scheduler](), workers, uneven, horizon)
    assert results == [r for r in longer if r.time <= horizon]
    assert [r.time for r in results] == sorted(r.time for r in results)
    spans = [(r.time - uneven(r.config, r.rung)[0], r.time) for r in longer]
    busy = sum(max(0, min(end, horizon) - start) for start, end in spans)
    assert idle == pytest.approx(1 - busy / (workers * horizon), abs=1e-9)
    for time in np.linspace(0.5, horizon - 0.5, 20):
        assert sum(start < time < end for start, end in spans) <= workers
    assert all(r.loss == uneven(r.config, r.rung)[1] for r in results)


def test_synchronous_halving_promotes_what_successive_halving_promotes():
    results, _ = chapter.simulate(chapter.Synchronous(9, 3), 4, uneven, 200)
    per_bracket = 9 + 3 + 1
    for bracket in range(3):
        found = results[bracket * per_bracket : (bracket + 1) * per_bracket]
        trials = chapter.successive_halving(
            [{"x": 9 * bracket + k} for k in range(9)],
            lambda config, budget: uneven(config["x"], round(math.log(budget, 3)))[1],
            [1, 3, 9],
        )
        ours = [{r.config for r in found if r.rung == rung} for rung in range(3)]
        assert ours == [set(xs) for xs in by_budget(trials).values()]


@pytest.mark.parametrize(("first", "rungs", "sizes"), [(10, 3, [10, 3, 1]), (4, 3, [4, 1, 1])])
def test_a_synchronous_rung_never_runs_dry(first, rungs, sizes):
    results, _ = chapter.simulate(chapter.Synchronous(first, rungs), 2, even, sum(sizes))
    assert [r.rung for r in results[: sum(sizes)]] == np.repeat(range(rungs), sizes).tolist()


def test_equal_durations_and_enough_workers_make_a_bracket_take_one_step_a_rung():
    results, idle = chapter.simulate(chapter.Synchronous(9, 3), 9, even, 6)
    assert [r.time for r in results] == [1] * 9 + [2] * 3 + [3] + [4] * 9 + [5] * 3 + [6]
    assert idle == pytest.approx(1 - (9 + 3 + 1) / 27)


def test_synchronous_workers_wait_for_the_slowest():
    def one_is_slow(config, rung):
        return (10.0 if config == 0 else 1.0), float(config)

    results, _ = chapter.simulate(chapter.Synchronous(9, 2), 9, one_is_slow, 11)
    assert [(r.time, r.rung) for r in results] == [(1, 0)] * 8 + [(10, 0)] + [(11, 1)] * 2


@pytest.mark.parametrize("workers", [1, 4, 25])
@pytest.mark.parametrize("eta", [2, 3])
def test_asynchronous_halving_promotes_only_the_best_each_once_and_as_soon_as_it_can(workers, eta):
    rungs = 4
    watched = Watched(chapter.Asynchronous(rungs, eta))
    _, idle = chapter.simulate(watched, workers, uneven, 80)
    assert idle == pytest.approx(0, abs=1e-9)
    assert len(set(watched.jobs)) == len(watched.jobs)
    finished = [[] for _ in range(rungs)]
    promoted, started = set(), itertools.count()
    for event, config, rung, *loss in watched.events:
        if event == "report":
            finished[rung].append((loss[0], config))
            continue
        can = [
            {c for _, c in heapq.nsmallest(len(done) // eta, done) if (c, k + 1) not in promoted}
            for k, done in enumerate(finished[:-1])
        ]
        highest = max((k for k, configs in enumerate(can) if configs), default=None)
        if highest is None:
            assert (config, rung) == (next(started), 0)
        else:
            assert rung == highest + 1
            assert config in can[highest]
            promoted.add((config, rung))
    assert {rung for _, rung in watched.jobs} == set(range(rungs))


def test_of_several_promotions_the_one_to_the_highest_rung_comes_first():
    scheduler = chapter.Asynchronous(3)
    for config in range(6):
        scheduler.report(config, 0, float(config))
    for config in (6, 7, 8):
        scheduler.report(config, 1, float(-config))
    assert [scheduler.next_job() for _ in range(4)] == [(8, 2), (0, 1), (1, 1), (0, 0)]


@pytest.mark.parametrize("loss", [math.inf, math.nan])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_diverged_configuration_is_not_promoted_before_others(scheduler, loss):
    def work(config, rung):
        """Every second configuration has no loss."""
        return 1.0 + scrambled(config), loss if config % 2 else scrambled(config)

    watched = Watched(SCHEDULERS[scheduler]())
    chapter.simulate(watched, 4, work, 60)
    promoted = [config for config, rung in watched.jobs if rung > 0]
    assert promoted
    assert all(config % 2 == 0 for config in promoted)


# --- replayed trainings ---------------------------------------------------------------------------


@pytest.fixture
def recorded() -> pd.DataFrame:
    """Ten configurations with errors at 1/27, 1/9, 1/3 and all of a budget of 27."""
    return pd.DataFrame(
        {
            "errors": [[100.0 * k + column for column in range(4)] for k in range(10)],
            "shares": [[1 / 27, 1 / 9, 1 / 3, 1]] * 10,
            "max_budget": 27,
        }
    )


def test_a_replay_answers_with_the_recorded_error_of_the_budget(recorded):
    _, look_up = chapter.replay(recorded, 0)
    (bracket, *_) = chapter.hyperband_brackets(27)
    for column, (_, budget) in enumerate(bracket):
        assert [look_up({"row": k}, budget) for k in range(10)] == [
            100 * k + column for k in range(10)
        ]


def test_a_replay_draws_every_configuration_once_before_it_draws_one_again(recorded):
    sample, _ = chapter.replay(recorded, 3)
    drawn_rows = [sample()["row"] for _ in range(30)]
    passes = [drawn_rows[k : k + 10] for k in (0, 10, 20)]
    assert [sorted(p) for p in passes] == [list(range(10))] * 3
    assert len({tuple(p) for p in passes}) == 3
    again, _ = chapter.replay(recorded, 3)
    assert [again()["row"] for _ in range(30)] == drawn_rows


def test_a_replayed_search_finds_the_best_where_budgets_agree(recorded):
    recorded.at[4, "errors"] = [math.nan] * 4
    sample, look_up = chapter.replay(recorded, 0)
    trials = chapter.hyperband(sample, look_up, 27)
    answer = chapter.incumbents(trials, [math.inf])[0]
    assert trials[answer].config == {"row": 0}
    lost = [t for t in trials if t.config["row"] == 4]
    assert lost
    assert all(t.loss == math.inf for t in lost)


# --- tables that answer findings ------------------------------------------------------------------


def rows_of(name: str) -> pd.DataFrame:
    return read_results("01_hyperband_bohb", name, "standard")


def test_recorded_replays_are_those_of_the_recorded_networks():
    row = rows_of("brackets").set_index("strategy").loc["s = 0"]
    again = chapter.replay_brackets(strategy="s = 0", orders=row["orders"])
    assert again["losses"] == pytest.approx(row["losses"])


@pytest.mark.parametrize("kind", ["synchronous", "asynchronous"])
def test_recorded_races_are_those_of_the_recorded_networks(kind):
    rows = rows_of("workers")
    (row,) = rows[(rows["kind"] == kind) & (rows["workers"] == 4)].itertuples()
    networks = chapter.recorded_networks()
    again = [chapter.race(networks, kind, 4, order)[2] for order in range(3)]
    assert again == pytest.approx(row.times[:3], abs=1e-3)


def test_an_unknown_strategy_or_kind_of_halving_is_named():
    with pytest.raises(ValueError, match="unknown strategy 's = 4'"):
        chapter.replay_brackets(strategy="s = 4", orders=1)
    with pytest.raises(ValueError, match="unknown kind of halving 'lazy'"):
        chapter.race_workers(kind="lazy", workers=1, orders=1)


def test_searches_stand_side_by_side_by_function_and_seed():
    rows = rows_of("synthetic")
    table = chapter.side_by_side(rows)
    assert len(table) == len(rows[rows["method"] == "bohb"])
    one = table[(table["function"] == "branin") & (table["seed"] == 7)].iloc[0]
    same = rows[(rows["function"] == "branin") & (rows["seed"] == 7) & (rows["method"] == "bohb")]
    assert one["bohb"] == same["final"].item()
    assert one["bohb_way"] == pytest.approx(np.mean(same["regret"].item()))


def test_a_training_that_broke_down_counts_as_the_worst():
    rows = pd.DataFrame({"errors": [[90.0, 80.0], [90.0, math.nan]]})
    table = chapter.errors_by_budget(rows)
    assert table["rung_1"].tolist() == [90, 90]
    assert table["rung_2"].tolist() == [80, 100]


def wide_rows(*sizes: tuple[int, int, list[int]]) -> pd.DataFrame:
    """Rows of Wide ResNets, each of depth, width and kernels."""
    rows = pd.DataFrame(sizes, columns=["depth", "width", "kernels"])
    return rows.assign(seconds=10.0, epochs=2)


def test_thin_and_wide_networks_are_paired_by_size():
    rows = wide_rows((40, 4, [3, 3]), (16, 8, [3, 3]), (28, 2, [3, 3]), (40, 2, [1, 3, 1]))
    table = chapter.thin_and_wide(rows)
    assert table["shape"].tolist() == ["thin", "wide"]
    assert set(table["pair"]) == {"40-4 and 16-8"}


def test_block_types_are_compared_at_the_printed_sizes_where_these_are_recorded():
    small = [(16, 1, [3, 3]), (16, 1, [1, 3, 1]), (10, 1, [3, 3])]
    full = [(40, 2, [1, 3, 1]), (28, 2, [3, 3]), (40, 2, [3, 3])]
    assert chapter.block_types(wide_rows(*small))["block"].tolist() == ["B(3,3)", "B(1,3,1)"]
    table = chapter.block_types(wide_rows(*small, *full))
    assert table["block"].tolist() == ["B(1,3,1)", "B(3,3)"]
    assert table["basic"].tolist() == [False, True]
    assert table["measured_seconds"].tolist() == [5, 5]


def test_seconds_are_those_of_as_many_blocks_as_printed():
    (seconds,) = chapter.block_types(wide_rows((16, 1, [1, 3])))["measured_seconds"]
    assert seconds == 5 * 6 / 2  # WRN-40 has six blocks a group, WRN-16 two


def test_convolutions_a_block_are_compared_at_equal_convolutions_in_all():
    rows = wide_rows((76, 2, [3]), (40, 2, [3, 3]), (28, 2, [3, 3]), (22, 2, [3] * 4))
    assert chapter.convolutions(rows)["convolutions"].tolist() == [1, 2, 4]


def test_the_textbook_setting_is_one_of_the_small_space():
    cs.Configuration(chapter.small_space(), values=chapter.TEXTBOOK)


def test_a_thousandfold_of_budgets_is_refused():
    with pytest.raises(ValueError, match="over 50 budgets: raise eta or min_budget"):
        chapter.hyperband_brackets(27, eta=1.0000001)
