"""Figures in one style: colour-blind-safe, right on light, dark and narrow pages.

`show` puts a figure on the page as SVG. What is black, grey or white takes the page's ink and
paper; to keep one of them on every page (a label on an image), tint it: "#000001", "#fffffe".
"""

from __future__ import annotations

import hashlib
import html
import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from jahs_utils.checks import number, positive, whole

# Okabe and Ito (2008) without yellow; where they fade on white, darker. Black is the page's ink.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#3F99C9", "#BF8300", "#000000")

STYLE = {
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "image.interpolation": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
DOT = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
WIDTH, FONT = 5.4, 11.0  # inches and points: 10 pixels high on a phone, 15 in a wide window
PAGES = ("pst-color-background", "jp-layout-color0", "colab-primary-surface-color")
PAPER = f"var(--{', var(--'.join(PAGES)}, #fff)))"


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (WIDTH, 3.2), **options: object
) -> tuple[Figure, np.ndarray]:
    """A figure in the book's style and its axes as an array of shape (rows, columns).

    size: inches. Pages scale every figure to their width, so text grows with a wider one. Two
    columns of panels are legible on a phone, three are not: add rows. options: for `plt.subplots`.
    """
    whole(rows, "rows")
    whole(columns, "columns")
    for side in size:
        positive(side, "size")
    font = {"font.size": FONT * max(1.0, size[0] / WIDTH)}
    plt.rcParams.update(STYLE | font)  # here, not at import: a reader's own style is left alone
    return plt.subplots(rows, columns, figsize=size, squeeze=False, **options)


def show(figure: Figure, title: str, alt: str) -> None:
    """Display a figure under its title, as SVG in HTML, and close it.

    title: what the figure shows, a finding. alt: what is to be seen, for those who cannot see it.
    """
    display({"text/html": figure_html(figure, title, alt), "text/plain": title}, raw=True)


def figure_html(figure: Figure, title: str, alt: str) -> str:
    """The figure under its title as an element of a page (see `show`); closes it."""
    drawing = _svg(figure, alt)
    plt.close(figure)
    head = '<figure class="jahs-figure" style="margin: 1em 0; max-width: 34rem">'
    caption = f"<figcaption><strong>{html.escape(title)}</strong></figcaption>"
    return f"{head}\n{caption}\n{drawing}\n</figure>"


def _svg(figure: Figure, alt: str) -> str:
    """The figure as an element of a page: its font, ink and paper; short, the same every time."""
    file = io.StringIO()
    figure.set_facecolor("none")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jahs"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = re.sub(r"<(style|meta).*?</\1\w*>|xlink:(?=h)", "", file.getvalue(), flags=re.S)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    root = ElementTree.fromstring(text)
    for node in root.iter():
        node.tag, node.tail = node.tag.rpartition("}")[2], "\n"
        node.text = node.text if node.tag in ("text", "tspan") else None
        node.attrib = {k: v for k, v in node.items() if k != "id" or v in used}
        for key, value in [] if node.tag == "image" else node.items():
            value = re.sub(r"-?\d+\.\d+", lambda m: f"{round(float(m[0]), 2):g}", value)
            node.set(key, _style(value, node.tag) if key == "style" else " ".join(value.split()))
    look = f"fill: currentColor; stroke-linejoin: round; height: auto; --paper: {PAPER}"
    what = {"role": "img", "aria-label": alt, "viewBox": root.get("viewBox")}
    root.attrib = what | {"width": "100%", "style": look}
    text = ElementTree.tostring(root, encoding="unicode").strip()
    mark = hashlib.sha256(text.encode()).hexdigest()[:6]  # ids are the page's, not the figure's
    return re.sub(r'(url\(#|href="#|id=")', rf"\1f{mark}", text)


def _style(style: str, tag: str) -> str:
    def ink(found: re.Match[str]) -> str:
        part, grey, alpha = found[1], int(found[2], 16) / 255, float(found[3] or 1)
        paper = "#fff" if tag in ("g", "text", "tspan") else "var(--paper)"
        colour, alpha = (paper, alpha) if grey == 1 else ("currentColor", alpha * (1 - grey))
        return f"{part}: {colour}" + (f"; {part}-opacity: {alpha:.2g}" if alpha < 1 else "")

    style = re.sub(r"font-family: [^;]*(; )?", "", style)
    return re.sub(r"\b(fill|stroke): #(\w\w)\2\2\b(?:; \1-opacity: ([\d.]+))?", ink, style)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of its t-interval; the half width is nan for fewer than two values."""
    number(level, "level", 0, 1)
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
    ax.plot(frame[x], frame[y], "o", color=line.get_color(), **DOT)


def dots_by_group(
    ax: Axes, groups: Mapping[str, Sequence[float]], colors: Sequence[str] = COLORS
) -> None:
    """A row for each group, the first on top: every value a dot, the mean a line."""
    for row, (values, color) in enumerate(zip(groups.values(), itertools.cycle(colors))):
        height = row + np.linspace(-0.2, 0.2, len(values) + 2)[1:-1]  # no two dots at one height
        ax.plot(values, height, "o", color=color, **DOT)
        ax.plot([np.mean(values)] * 2, [row - 0.32, row + 0.32], color=color, linewidth=2.4)
    ax.set_yticks(range(len(groups)), list(groups))
    ax.set_ylim(len(groups) - 0.5, -0.5)


def diagram(
    ax: Axes,
    boxes: Mapping[str, tuple[float, float, str, str]],
    arrows: Iterable[tuple[str, str, str] | tuple[str, str, str, float]],
) -> None:
    """Boxes and arrows between them, drawn on axes that are switched off.

    boxes: name to (x, y, text, colour); one unit is as long across as up, texts may have lines.
    arrows: (from, to, label) or (from, to, label, bend); a bend of 0.4 is an arc to its right.
    """
    ax.set_axis_off()
    ax.set_aspect("equal")
    ax.figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # texts are measured without their box
    centred, drawn = {"ha": "center", "va": "center"}, {}
    for name, (x, y, label, colour) in boxes.items():
        look = {"fc": (colour, 0.12), "ec": colour, "lw": 1.4, "boxstyle": "round,pad=0.5"}
        drawn[name] = ax.text(x, y, label, bbox=look, **centred)
    for start, end, label, *bend in arrows:
        (x0, y0), (x1, y1) = drawn[start].get_position(), drawn[end].get_position()
        arc = bend[0] if bend else 0.0
        line = {"arrowstyle": "-|>", "color": "0.25", "connectionstyle": f"arc3,rad={arc}"}
        ends = {"patchA": drawn[start].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        ax.annotate("", (x1, y1), (x0, y0), arrowprops=line | ends | {"shrinkA": 1, "shrinkB": 1})
        x, y = (x0 + x1 + arc * (y1 - y0)) / 2, (y0 + y1 - arc * (x1 - x0)) / 2
        if label:
            ax.text(x, y, label, bbox={"fc": "white", "ec": "none", "pad": 1.5}, **centred)
    across, up = ([box[side] for box in boxes.values()] for side in (0, 1))
    ax.set(xlim=(min(across), max(across) + 1e-9), ylim=(min(up), max(up) + 1e-9))


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean and standard deviation as text, "91.4 ± 0.2"; of one value, the value."""
    number(scale, "scale")
    mean = f"{scale * np.mean(values):.{whole(digits, 'digits', 0)}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {scale * np.std(values, ddof=1):.{digits}f}"
