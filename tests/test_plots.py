import re
import subprocess
import sys
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from scipy import stats

from jahs_utils import plots
from jahs_utils.plots import (
    COLORS,
    diagram,
    dots_by_group,
    line_with_runs,
    mean_interval,
    new_figure,
    show,
    spread,
    summarise,
)

Draw = Callable[[mpl.axes.Axes], object]
BOXES = {"ask": (0, 0, "sample", COLORS[0]), "fit": (3, 0, "train for\nr epochs", "black")}
ARROWS = [("ask", "fit", "27"), ("fit", "ask", "η r", 0.5)]


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
    # in a Python of its own: other tests draw, and drawing sets the style
    code = (
        "import matplotlib as mpl, matplotlib.pyplot as plt; before = dict(mpl.rcParams); "
        "import jahs_utils.plots; assert dict(mpl.rcParams) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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


# --- figures on a page ----------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Draws on the axes of a new figure, shows it and returns what a notebook gets."""

    def draw(*drawings: Draw, title: str = "Title", alt: str = "What is seen") -> dict[str, str]:
        got = []
        monkeypatch.setattr(plots, "display", lambda data, raw: got.append(data))
        fig, axes = new_figure(1, max(1, len(drawings)))
        for drawing, ax in zip(drawings, axes[0]):
            drawing(ax)
        show(fig, title, alt)
        assert not plt.fignum_exists(fig.number)
        return got[0]

    return draw


def drawing(page: dict[str, str]) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", page["text/html"], re.S)[0])


def random_points(ax: mpl.axes.Axes) -> None:
    ax.scatter(*np.random.default_rng(0).random((2, 250)))


def inks(ax: mpl.axes.Axes) -> None:
    ax.plot([0, 1], [0, 1], "o-", color="black", markerfacecolor="white", label="a line")
    ax.fill_between([0, 1], [0, 1], color="0.8", alpha=0.5)
    ax.text(0.5, 0.5, "grey", color="grey")
    ax.legend()


def test_a_figure_is_html_under_its_title_and_text_elsewhere(shown):
    page = shown(title="A < B & C", alt='the "best"')
    assert "<figcaption><strong>A &lt; B &amp; C</strong></figcaption>" in page["text/html"]
    assert page["text/plain"] == "A < B & C"
    root = drawing(page)
    assert (root.get("role"), root.get("aria-label")) == ("img", 'the "best"')
    assert root.get("width") == "100%"
    assert root.get("height") is None


def test_the_same_figure_is_the_same_page(shown):
    assert shown(random_points, inks) == shown(random_points, inks)


def test_ids_are_those_of_one_figure(shown):
    def ids(page):
        return {node.get("id") for node in drawing(page).iter() if node.get("id")}

    one, other = shown(inks), shown(inks, alt="Something else")
    assert ids(one)
    assert not ids(one) & ids(other)
    for page in (one, other):
        named = set(re.findall(r'(?:url\(|href=")#([^")]+)', page["text/html"]))
        assert named == ids(page)


def test_black_grey_and_white_are_the_ink_and_the_paper_of_the_page(shown):
    text = shown(inks)["text/html"]
    assert not re.findall(r"#(\w\w)\1\1\b", text.replace(plots.PAPER, ""))
    assert "fill: currentColor; fill-opacity: 0.5" in text  # grey text
    assert "fill: currentColor; fill-opacity: 0.1" in text  # 0.2 of the ink, half transparent
    assert "fill: var(--paper)" in text


def test_nothing_lies_behind_a_figure(shown):
    root = drawing(shown(random_points))
    box = [float(x) for x in root.get("viewBox").split()]
    corner = f"{box[2]:g} {box[3]:g}"
    assert not [n for n in root.iter() if corner in n.get("d", "") and "none" not in n.get("style")]


def test_text_is_text_in_the_font_of_the_page(shown):
    page = shown(lambda ax: ax.set_xlabel("rate η in $x^2$"))["text/html"]
    assert "font-family" not in page
    assert "<style" not in page
    assert "η" in page


def test_white_text_stays_white_and_a_tinted_black_stays_black(shown):
    def label(ax):
        ax.text(0, 0, "a", color="white")
        ax.text(1, 1, "b", color="#000001")

    assert {"fill: #fff", "fill: #000001"} <= set(re.findall(r"fill: #\w+", str(shown(label))))


def test_coordinates_are_short(shown):
    assert not re.findall(r"\d\.\d{3,}", shown(random_points)["text/html"])
    assert len(shown(random_points)["text/html"]) < 60_000


def test_images_keep_their_pixels(shown):
    root = drawing(shown(lambda ax: ax.imshow(np.eye(5))))
    [image] = root.iter("image")
    assert (image.get("width"), image.get("height")) == ("5", "5")
    assert "pixelated" in image.get("style")
    assert image.get("href").startswith("data:image/png;base64,")


@pytest.mark.parametrize("width", [5.4, 8.0])
def test_text_is_at_least_nine_pixels_high_on_a_phone(width):
    fig, _ = new_figure(size=(width, 3))
    assert mpl.rcParams["font.size"] / (72 * width) * 340 >= 9
    plt.close(fig)


def luminance(color: str) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("page", ["#ffffff", "#121212", "#111111"])  # the book, JupyterLab
@pytest.mark.parametrize("color", COLORS[:-1])
def test_colours_are_legible_on_white_and_on_dark(color, page):
    low, high = sorted([luminance(color), luminance(page)])
    assert (high + 0.05) / (low + 0.05) >= 3


def test_every_run_is_a_dot_and_the_mean_a_line():
    fig, axes = new_figure()
    dots_by_group(axes[0, 0], {"a": [1.0, 2.0, 6.0], "b": [4.0]})
    points = [list(line.get_xdata()) for line in axes[0, 0].lines]
    assert points == [[1, 2, 6], [3, 3], [4], [4, 4]]
    assert len(set(axes[0, 0].lines[0].get_ydata())) == 3
    assert [label.get_text() for label in axes[0, 0].get_yticklabels()] == ["a", "b"]
    bottom, top = axes[0, 0].get_ylim()
    assert bottom > top  # the first group is on top
    plt.close(fig)


def test_a_line_stands_among_its_runs():
    fig, axes = new_figure()
    line_with_runs(axes[0, 0], pd.DataFrame({"x": [1, 1, 2], "y": [1, 3, 5]}), "x", "y", "runs")
    mean, runs = axes[0, 0].lines
    assert list(mean.get_ydata()) == [2, 5]
    assert list(runs.get_ydata()) == [1, 3, 5]
    plt.close(fig)


def test_a_diagram_lies_inside_its_figure():
    fig, axes = new_figure(size=(5.4, 2.4))
    diagram(axes[0, 0], BOXES, ARROWS)
    fig.draw_without_rendering()
    texts = [text for text in axes[0, 0].texts if text.get_text()]
    assert [text.get_text() for text in texts] == ["sample", "train for\nr epochs", "27", "η r"]
    for text in texts:
        box = text.get_bbox_patch().get_window_extent()
        assert fig.bbox.containsx(box.x0)
        assert fig.bbox.containsx(box.x1)
        assert fig.bbox.containsy(box.y0)
        assert fig.bbox.containsy(box.y1)
    plt.close(fig)


def test_the_label_of_an_arrow_lies_on_it():
    fig, axes = new_figure(size=(5.4, 2.4))
    diagram(axes[0, 0], BOXES, ARROWS)
    fig.draw_without_rendering()
    label, arrow = axes[0, 0].texts[-1], axes[0, 0].texts[-2].arrow_patch
    ends = arrow.get_transform().transform(arrow.get_path().vertices[[0, 1, 2]])
    middle = ends[0] / 4 + ends[1] / 2 + ends[2] / 4  # of a quadratic curve
    at = axes[0, 0].transData.transform(label.get_position())
    assert np.linalg.norm(at - middle) < 30
    plt.close(fig)
