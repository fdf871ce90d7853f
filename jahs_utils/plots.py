"""Figures in one style: colour-blind-safe, legible on light and dark pages, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

# Okabe and Ito (2008), without the yellow that vanishes on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

STYLE = {
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.0, 3.4), **options: object
) -> tuple[Figure, np.ndarray]:
    """A figure in the book's style and its axes as an array of shape (rows, columns).

    size: inches; 7 is the width of the text. options: for `plt.subplots`.
    """
    plt.rcParams.update(STYLE)  # here, not at import: a reader's own style is left alone
    return plt.subplots(rows, columns, figsize=size, squeeze=False, **options)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of its t-interval; the half width is nan for fewer than two values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(stats.t.ppf(0.5 + level / 2, len(values) - 1) * error)


def summarise(frame: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Mean, half width of the 95 % interval and count of a column for each group, tidy."""
    groups = frame.groupby(by, sort=True)[column]
    rows = [(*key, *mean_interval(v), len(v)) for key, v in groups]  # a key is a tuple
    return pd.DataFrame(rows, columns=[*by, "mean", "half_width", "count"])


def line_with_runs(
    ax: Axes, frame: pd.DataFrame, x: str, y: str, label: str, **style: object
) -> None:
    """The mean of `y` over `x` as a line, and every run behind it as a dot.

    For few runs: dots show all there is, where an interval of two or three would hide it.
    """
    mean = frame.groupby(x, sort=True)[y].mean()
    (line,) = ax.plot(mean.index, mean, label=label, **style)
    ax.plot(frame[x], frame[y], "o", markersize=3.5, alpha=0.55, color=line.get_color())


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and standard deviation as text, "91.4 ± 0.2"; of one value, the value."""
    mean = f"{scale * np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {scale * np.std(values, ddof=1):.{digits}f}"
