"""Estimates from recorded rows: an effect, its 95 % interval, and what the rows could have shown.

Rows that share a seed, a fold or a parent are not independent: they are averaged (or resampled)
together, and what is counted is how many independent groups there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL, POWER = 0.95, 0.80
NORMAL_REACH = float(stats.norm.ppf(0.5 + LEVEL / 2) + stats.norm.ppf(POWER))  # standard errors
RESAMPLES = 2000
Statistic = Literal["mean", "median"]


class Effect(NamedTuple):
    """An estimate with its interval [low, high] over `n` independent values.

    error: standard error. smallest: the smallest distance from the value it is held against that
    this many rows would have shown with 80 % power.
    """

    estimate: float
    low: float
    high: float
    n: int
    error: float
    smallest: float


def exact(estimate: float) -> Effect:
    """An effect of quantities that no seed moves, such as counts of parameters."""
    return Effect(estimate, estimate, estimate, 1, 0.0, 0.0)


def _from_t(estimate: float, error: float, degrees: float, n: int) -> Effect:
    """A t-interval, and the effect found with 80 % power, both from the standard error."""
    if n < 2 or not degrees > 0:
        return Effect(estimate, -math.inf, math.inf, n, math.inf, math.inf)
    reach = stats.t.ppf(0.5 + LEVEL / 2, degrees)
    smallest = float((reach + stats.t.ppf(POWER, degrees)) * error)
    half = float(reach * error)
    return Effect(estimate, estimate - half, estimate + half, n, error, smallest)


def _from_bootstrap(statistic: Callable[..., float], groups: Sequence[Sequence], n: int) -> Effect:
    """A percentile interval; each group's members are drawn anew, groups independently."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        picks = (rng.integers(len(group), size=len(group)) for group in groups)
        drawn.append(statistic(*([g[k] for k in pick] for g, pick in zip(groups, picks))))
    drawn = np.array(drawn)[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    error = float(drawn.std(ddof=1))
    found = float(statistic(*groups)), float(low), float(high)
    return Effect(*found, n, error, NORMAL_REACH * error)


def level(values: Sequence[float], statistic: Statistic = "mean") -> Effect:
    """Mean (t-interval) or median (bootstrap) of independent values."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if statistic == "median" and n > 1:
        return _from_bootstrap(np.median, [values], n)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return _from_t(float(values.mean()), error, n - 1, n)


def difference(a: pd.Series, b: pd.Series, paired: bool, statistic: Statistic = "mean") -> Effect:
    """a - b: of pairs that share an index (t-interval of the differences), or Welch's interval."""
    if paired:
        return level((a - b).dropna().to_numpy(), statistic)
    n = min(len(a), len(b))
    if statistic == "median":
        groups = [a.to_numpy(), b.to_numpy()]
        return _from_bootstrap(lambda x, y: np.median(x) - np.median(y), groups, n)
    parts = [x.var() / len(x) for x in (a, b)]
    freedom = sum(p**2 / max(1, len(x) - 1) for p, x in zip(parts, (a, b)))
    degrees = sum(parts) ** 2 / freedom if freedom else 1.0
    return _from_t(float(a.mean() - b.mean()), math.sqrt(sum(parts)), degrees, n)


def ratio(a: pd.Series, b: pd.Series, paired: bool) -> Effect:
    """a / b as the ratio of geometric means; `error` and `smallest` are of its logarithm."""
    effect = difference(np.log(a), np.log(b), paired)
    estimate, low, high = (math.exp(min(x, 700.0)) for x in effect[:3])
    return Effect(estimate, low, high, *effect[3:])


def correlation(
    frame: pd.DataFrame,
    x: str,
    y: str,
    method: str = "spearman",
    cluster: Sequence[str] = (),
    against: str | None = None,
) -> Effect:
    """Correlation of two columns, whole clusters resampled; less that of `against` with y."""
    columns = [y, x] if against is None else [y, x, against]
    table = frame[columns].to_numpy(dtype=float)
    places = _clusters(frame, cluster) if cluster else np.arange(len(table))[:, None]

    def correlate(rows: np.ndarray) -> float:
        drawn = table[rows].T
        if np.ptp(drawn, axis=1).min() == 0:
            return math.nan
        if method == "kendall":
            found = [stats.kendalltau(drawn[0], other).statistic for other in drawn[1:]]
        else:
            drawn = stats.rankdata(drawn, axis=1) if method == "spearman" else drawn
            found = np.corrcoef(drawn)[0, 1:]
        return float(found[0] - sum(found[1:]))

    if len(places) < 3:
        return _from_t(correlate(np.arange(len(table))), math.inf, 0, len(places))
    return _from_bootstrap(lambda picked: correlate(np.concatenate(picked)), [places], len(places))


def trend(frame: pd.DataFrame, over: str, y: str, cluster: list[str]) -> Effect:
    """Change of `y` from one value of the ordered key `over` to the next, by least squares.

    One slope for each cluster and a t-interval over clusters; without clusters the slope of all
    rows with its t-interval.
    """
    steps = frame[over].rank(method="dense").to_numpy(dtype=float)
    values = frame[y].to_numpy(dtype=float)
    if not cluster:
        line = stats.linregress(steps, values)
        return _from_t(float(line.slope), float(line.stderr), len(steps) - 2, len(steps))
    apart = [k for k in _clusters(frame, cluster) if np.ptp(steps[k]) > 0]
    return level([stats.linregress(steps[k], values[k]).slope for k in apart])


def share(successes: Sequence[bool]) -> Effect:
    """Share of successes with its exact (Clopper-Pearson) interval."""
    n, hits = len(successes), int(sum(bool(s) for s in successes))
    interval = stats.binomtest(hits, n).proportion_ci(LEVEL)
    error = math.sqrt(0.25 / n)
    return Effect(hits / n, interval.low, interval.high, n, error, NORMAL_REACH * error)


def values_by(frame: pd.DataFrame, column: str, cluster: Sequence[str]) -> pd.Series:
    """The column's mean for each cluster, indexed by it; without clusters the column itself."""
    values = frame[column].astype(float)
    if not cluster:
        return values.reset_index(drop=True)
    return values.groupby(_names(frame, cluster)).mean()


def _clusters(frame: pd.DataFrame, cluster: Sequence[str]) -> list[np.ndarray]:
    """The places of each cluster's rows."""
    return list(frame.groupby(_names(frame, cluster)).indices.values())


def _names(frame: pd.DataFrame, cluster: Sequence[str]) -> list[pd.Series]:
    return [frame[column].map(str) for column in cluster]  # lists, too, can be grouped so


def needed(effect: Effect, distance: float) -> float:
    """How many independent values would show, with 80 % power, an effect this far off."""
    if effect.n < 2 or not math.isfinite(effect.smallest) or distance == 0:
        return math.inf
    return max(effect.n + 1.0, math.ceil(effect.n * (effect.smallest / abs(distance)) ** 2))
