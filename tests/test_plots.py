import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jahs_utils.plots import COLORS, mean_interval, new_figure, spread, summarise


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20).filter(lambda v: np.std(v) > 1e-6))
def test_the_interval_is_scipys(values):
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_one_value_has_no_interval():
    assert np.isnan(mean_interval([1.0])[1])


def test_a_summary_has_one_row_per_group():
    frame = pd.DataFrame({"a": [1, 1, 2], "b": ["x", "x", "y"], "v": [1.0, 3.0, 5.0]})
    table = summarise(frame, ["a", "b"], "v")
    assert table[["a", "b", "mean", "count"]].to_numpy().tolist() == [
        [1, "x", 2, 2],
        [2, "y", 5, 1],
    ]


def test_importing_the_style_changes_no_setting_of_the_reader():
    assert mpl.rcParamsDefault["font.size"] == mpl.rcParams["font.size"]


def test_a_figure_uses_colours_that_differ_in_lightness():
    new_figure()
    light = [np.dot(mpl.colors.to_rgb(c), (0.299, 0.587, 0.114)) for c in COLORS[:4]]
    assert np.ptp(light) > 0.2


@pytest.mark.parametrize(
    ("values", "scale", "digits", "text"),
    [
        ([0.91, 0.93], 100, 1, "92.0 ± 1.4"),  # sqrt(2), one degree of freedom
        ([1, 2, 3], 1, 0, "2 ± 1"),
        ([0.5], 100, 2, "50.00"),
    ],
)
def test_a_spread_is_the_mean_and_the_sample_deviation(values, scale, digits, text):
    assert spread(values, scale, digits) == text
