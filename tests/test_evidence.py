"""Estimates and intervals, against SciPy, simulation and hand-made cases."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from jahs_utils import evidence

RNG = np.random.default_rng(3)
A, B = pd.Series(RNG.normal(1.0, 1.0, 12)), pd.Series(RNG.normal(0.4, 2.0, 9))


def test_the_level_has_scipys_t_interval():
    found, wanted = evidence.level(A), stats.ttest_1samp(A, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert (found.estimate, found.n) == (pytest.approx(A.mean()), 12)


def test_a_difference_of_independent_groups_has_welchs_interval():
    found = evidence.difference(A, B, paired=False)
    wanted = stats.ttest_ind(A, B, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.n == 9


def test_a_paired_difference_uses_the_pairs_and_nothing_else():
    found = evidence.difference(A, B, paired=True)  # three of A have no partner
    wanted = stats.ttest_rel(A[:9], B).confidence_interval()
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_a_ratio_is_one_of_geometric_means():
    a, b = np.exp(A), np.exp(B)
    found, wanted = evidence.ratio(a, b, paired=False), evidence.difference(A, B, paired=False)
    assert found.estimate == pytest.approx(stats.gmean(a) / stats.gmean(b))
    assert (found.low, found.high) == pytest.approx((math.exp(wanted.low), math.exp(wanted.high)))


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_one_value_has_no_interval(statistic):
    found = evidence.level([0.5], statistic)
    assert (found.low, found.high, found.smallest) == (-math.inf, math.inf, math.inf)


def test_equal_values_have_an_interval_of_no_width():
    found = evidence.difference(pd.Series([3.0] * 4), pd.Series([2.0] * 4), paired=False)
    assert (found.estimate, found.low, found.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("method", ["spearman", "kendall", "pearson"])
def test_a_correlation_is_scipys_and_lies_in_its_interval(method):
    frame = pd.DataFrame({"x": np.arange(30.0), "y": np.arange(30.0) + RNG.normal(0, 9, 30)})
    found = evidence.correlation(frame, "x", "y", method)
    measure = {"spearman": stats.spearmanr, "kendall": stats.kendalltau, "pearson": stats.pearsonr}
    assert found.estimate == pytest.approx(measure[method](frame["x"], frame["y"]).statistic)
    assert found.low < found.estimate < found.high
    assert found.n == 30


def test_a_difference_of_correlations_of_a_column_with_itself_is_zero():
    frame = pd.DataFrame({"x": np.arange(20.0), "y": RNG.normal(size=20)})
    found = evidence.correlation(frame.assign(z=frame["x"] ** 3), "x", "y", against="z")
    assert (found.estimate, found.low, found.high) == pytest.approx((0.0, 0.0, 0.0))  # equal ranks


def test_rows_of_one_seed_are_one_value():
    frame = pd.DataFrame({"seed": [0, 0, 1, 1], "value": [1.0, 3.0, 5.0, 7.0]})
    assert evidence.values_by(frame, "value", ["seed"]).tolist() == [2.0, 6.0]


def test_copies_of_rows_do_not_narrow_a_clustered_interval():
    frame = pd.DataFrame({"x": RNG.normal(size=12), "seed": range(12)})
    frame["y"] = frame["x"] + RNG.normal(size=12)
    many = pd.concat([frame] * 5)
    once, copied = (evidence.correlation(f, "x", "y", cluster=["seed"]) for f in (frame, many))
    assert (once.low, once.high, once.n) == pytest.approx((copied.low, copied.high, copied.n))


def test_a_trend_is_the_step_between_neighbouring_values_of_the_key():
    frame = pd.DataFrame(
        [
            {"q": q, "seed": s, "value": 10 + s + 2 * k}
            for k, q in enumerate([0.1, 1, 50])
            for s in (0, 1, 2)
        ]
    )
    assert evidence.trend(frame, "q", "value", ["seed"])[:4] == (2.0, 2.0, 2.0, 3)
    line = stats.linregress([1, 1, 1, 2, 2, 2, 3, 3, 3], frame["value"])
    assert evidence.trend(frame, "q", "value", []).estimate == pytest.approx(line.slope)


def test_a_share_has_the_exact_binomial_interval():
    found = evidence.share([True] * 9 + [False])
    wanted = stats.binomtest(9, 10).proportion_ci()
    assert (found.estimate, found.low, found.high) == (0.9, wanted.low, wanted.high)


@pytest.mark.parametrize("n", [5, 20])
def test_the_smallest_effect_is_found_in_four_of_five_repetitions(n):
    """By simulation: data with exactly this effect, and how often the interval excludes zero."""
    rng = np.random.default_rng(0)
    effect = (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) / math.sqrt(n)
    samples = rng.normal(effect, 1.0, (4000, n))
    error = samples.std(axis=1, ddof=1) / math.sqrt(n)
    low = samples.mean(axis=1) - stats.t.ppf(0.975, n - 1) * error
    assert (low > 0).mean() == pytest.approx(0.8, abs=0.05)
    known = evidence._from_t(0.0, 1 / math.sqrt(n), n - 1, n)
    assert known.smallest == pytest.approx(effect)


def test_a_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(40):
        x = rng.normal(size=40)
        frame = pd.DataFrame({"x": x, "y": 0.6 * x + 0.8 * rng.normal(size=40)})
        found = evidence.correlation(frame, "x", "y", "pearson")
        covered += found.low < 0.6 < found.high
    assert covered >= 34  # of 40: 95 % less three standard errors of the count


def test_more_values_are_needed_the_nearer_the_estimate_is():
    found = evidence.level(A)
    assert evidence.needed(found, found.smallest / 2) == pytest.approx(4 * found.n, abs=1)
    assert evidence.needed(found, 0.0) == math.inf
