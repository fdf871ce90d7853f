"""What the pages of this folder show of recorded rows; `jahs book` puts it where their marks stand.

A page has a mark of its own line, such as `<!-- scoreboard -->`, and below stands the function
whose Markdown takes its place.
"""

from __future__ import annotations

import collections
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from jahs_utils.chapters import book_root, chapter_names, chapter_path, read_notebook
from jahs_utils.claims import (
    FINDING_VERDICTS,
    OPEN_VERDICTS,
    VERDICTS,
    Claim,
    Finding,
    Number,
    Verdict,
    read_claims,
)
from jahs_utils.experiments import Results
from jahs_utils.plots import COLORS, figure_html, new_figure
from jahs_utils.scoreboard import (
    claims_table,
    counts,
    findings_table,
    judged,
    markdown,
    sentence,
)

FIRST_BENCHMARK = "training"
SHADES = {
    "reproduced, holds": COLORS[0],
    "partly": COLORS[4],
    "not reproduced, does not hold": COLORS[1],
    "undecided": COLORS[5],
    "capped": COLORS[3],
    "other scale": "0.45",
    "not yet run": "0.75",
}


def fill_in(folder: Path) -> None:
    """Put tables and figures where the marks of the pages in `folder` stand."""
    for name, (mark, made) in PAGES.items():
        page = folder / name
        text = page.read_text("utf-8-sig")
        if mark not in text:
            raise ValueError(f"{name} has no line {mark}: its table has no place")
        page.write_text(text.replace(mark, made()), "utf-8")


def chapter_title(chapter: str) -> str:
    """The heading of a chapter's notebook."""
    return headings(chapter)[0]


def headings(chapter: str) -> list[str]:
    """All headings of a chapter's notebook, in order."""
    cells = read_notebook(chapter_path(chapter)).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return [heading.strip() for heading in re.findall(r"(?m)^#+ (.+)$", text)]


# --- the title page -------------------------------------------------------------------------------


def found_markdown() -> str:
    """What each chapter found: a picture of the headline findings, and their sentences."""
    headlines = [(c, v) for c, v in judged(kind=Finding) if c.headline]
    lines = [
        (f"[{chapter_title(claim.chapter)}](/chapters/{claim.chapter}.ipynb)", sentence(claim.id))
        for claim, _ in headlines
    ]
    return f"{_picture(headlines)}\n\n{markdown(lines, ['Chapter', 'What it found'])}"


def _picture(headlines: Sequence[tuple[Finding, Verdict]]) -> str:
    """Each headline finding on an axis of its own: estimate, interval, where it would not hold."""
    figure, axes = new_figure(len(headlines), 1, size=(5.4, 1.15 * len(headlines)))
    for ax, (claim, verdict) in zip(axes[:, 0], headlines):
        _draw_headline(ax, claim, verdict)
    seen = [verdict.verdict for _, verdict in headlines]
    shown = [name for name in (*FINDING_VERDICTS, *OPEN_VERDICTS) if name in seen]
    handles = [Line2D([], [], marker="o", color=_shade(name), label=name) for name in shown]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(shown))
    others = "".join(f", {seen.count(name)} {name}" for name in shown if name != "holds")
    title = f"{seen.count('holds')} of {len(seen)} headline findings hold{others}"
    alt = (
        "A row for each chapter: the estimate of its headline finding as a dot, its 95 % interval "
        "as a bar, and an upright line at the value that it is compared with."
    )
    return figure_html(figure, title, alt)


def _draw_headline(ax: Axes, claim: Finding, verdict: Verdict) -> None:
    question = f"{claim.chapter.partition('_')[0]}  {claim.statement}"
    ax.set_title("\n".join(textwrap.wrap(question, 68)))
    reference, effect = claim.estimate.reference, verdict.effect
    ax.axvline(reference, color="0.4", linewidth=1.4)
    if effect is not None:
        shade = _shade(verdict.verdict)
        ends = [end for end in (effect.low, effect.high) if np.isfinite(end)]
        ax.plot(ends, [0] * len(ends), color=shade, linewidth=5, solid_capstyle="round")
        ax.plot(effect.estimate, 0, "o", color=shade, markersize=10, markeredgecolor="white")
    ax.margins(x=0.08)
    ax.set(ylim=(-1, 1), yticks=[])
    ax.set_xlabel(claim.unit, loc="right")
    ax.locator_params(axis="x", nbins=5)
    ax.spines["left"].set_visible(False)


# --- the scoreboard -------------------------------------------------------------------------------


def scoreboard_markdown() -> str:
    """All claims: a figure, counts by kind, then for each chapter its numbers and findings."""
    tally = counts()
    rows = [(verdict, *tally[verdict]) for verdict in tally]
    parts = [_overview(), markdown(rows, ["verdict", *tally.index])]
    for chapter in chapter_names():
        if claims := judged(chapter):
            tally = collections.Counter(verdict.verdict for _, verdict in claims)
            said = ", ".join(f"{tally[v]} {v}" for v in VERDICTS if tally[v])
            parts.append(f"## {chapter_title(chapter)}\n\n{said}.")
            parts += _folded(chapter, claims)
    return "\n\n".join(parts)


def _folded(chapter: str, claims: Sequence[tuple[Claim, Verdict]]) -> list[str]:
    """A chapter's tables under their counts, and how to compute the rows behind them."""
    linked = {}
    for claim, _ in claims:
        place = f"#{_slug(claim.section)}" if claim.section else ""
        linked[claim.statement] = f"[{claim.statement}](/chapters/{chapter}.ipynb{place})"
    tables = {"numbers": claims_table(chapter), "findings": findings_table(chapter)}
    tables["commands"] = _commands(claims)
    return [
        f"::::{{dropdown}} {len(table)} {name}\n"
        + markdown([[linked.get(c, c) for c in row] for row in table.to_numpy()], table)
        + "\n::::"
        for name, table in tables.items()
        if len(table)
    ]


def _slug(heading: str) -> str:
    """The anchor that the book gives to a heading (as GitHub does)."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _commands(claims: Sequence[tuple[Claim, Verdict]]) -> pd.DataFrame:
    """The commands that compute the rows of these claims, and where those on record were made."""
    made = collections.defaultdict(set)
    for claim, verdict in claims:
        if claim.rows is not None:
            address = claim.rows.experiment
            address = address if "/" in address else f"{claim.chapter}/{address}"
            made[address, verdict.profile or claim.rows.profiles[0]] |= {*verdict.devices}
    table = [
        (f"`jahs experiment run {address} --profile {profile}`", ", ".join(sorted(on)) or "not yet")
        for (address, profile), on in sorted(made.items())
    ]
    return pd.DataFrame(table, columns=["rows", "recorded on"])


def _shade(verdict: str) -> str:
    return next(shade for names, shade in SHADES.items() if verdict in names.split(", "))


def _overview() -> str:
    """The figure of the scoreboard: numbers beside the documents', findings by verdict."""
    chapters = [chapter for chapter in chapter_names() if read_claims(chapter)]
    figure, axes = new_figure(2, 1, size=(5.4, 6.4))
    _draw_numbers(axes[0, 0], chapters)
    _draw_findings(axes[1, 0], chapters)
    tally = counts().sum()
    answered = sum(n for verdict, n in tally.items() if verdict not in OPEN_VERDICTS)
    title = f"{answered} of {tally.sum()} claims are answered by recorded rows"
    alt = (
        "Above, each printed number that was measured: ours over the document's with its interval, "
        "in the row of its chapter. Below, each chapter's findings by verdict."
    )
    return figure_html(figure, title, alt)


def _draw_numbers(ax: Axes, chapters: Sequence[str]) -> None:
    for place, chapter in enumerate(chapters):
        shown = [(c, v) for c, v in judged(chapter, Number) if v.effect is not None]
        for (claim, verdict), y in zip(shown, np.linspace(-0.36, 0.36, len(shown) + 2)[1:]):
            ours = np.array([verdict.effect.low, verdict.effect.high]) / claim.paper.value
            shade = _shade(verdict.verdict)
            if np.isfinite(ours).all():
                ax.plot(ours, [place + y] * 2, color=shade, linewidth=1.2)
            ax.plot(verdict.value / claim.paper.value, place + y, "o", color=shade, markersize=3.5)
    ax.axvline(1, color="0.5", linewidth=1, linestyle=":")
    ax.set_xscale("log")
    ax.set(xlim=(0.2, 5), xlabel="measured here / printed in the document")
    ax.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
    ax.minorticks_off()
    _chapter_axis(ax, chapters)


def _draw_findings(ax: Axes, chapters: Sequence[str]) -> None:
    tallies = [
        collections.Counter(v.verdict for _, v in judged(chapter, Finding)) for chapter in chapters
    ]
    left = np.zeros(len(chapters))
    for verdict in (*FINDING_VERDICTS, *OPEN_VERDICTS):
        width = np.array([tally[verdict] for tally in tallies])
        ax.barh(range(len(chapters)), width, left=left, height=0.6, color=_shade(verdict))
        left += width
    ax.set_xlabel("findings")
    handles = [
        Line2D([], [], marker="o", linestyle="", color=c, label=n) for n, c in SHADES.items()
    ]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.1, -0.22), ncols=2)
    _chapter_axis(ax, chapters)


def _chapter_axis(ax: Axes, chapters: Sequence[str]) -> None:
    ax.set_yticks(range(len(chapters)), [chapter.partition("_")[0] for chapter in chapters])
    ax.set(ylim=(len(chapters) - 0.5, -0.5), ylabel="chapter")


# --- the speed page -------------------------------------------------------------------------------


def speed_markdown() -> str:
    """For each benchmark the newest row of each kind of device as Markdown tables.

    A row's metrics may name under "versions" what it depends on; else it is torch.
    """
    parts = []
    files = (book_root() / "results" / "benchmarks").glob("*.jsonl")
    for path in sorted(files, key=lambda path: (path.stem != FIRST_BENCHMARK, path.stem)):
        rows = [row for row in Results(path).rows() if row.status == "ok"]
        newest = {row.key["kind"]: row for row in rows}  # rows are oldest first
        if newest:
            parts.append(f"## {path.stem.capitalize()}")
        for row in newest.values():
            of_torch = f"torch {row.versions['torch']}, {row.number_format}"
            versions = f"python {row.versions['python']}, {row.metrics.get('versions', of_torch)}"
            table = markdown(row.metrics["table"], row.metrics["columns"])
            title = f"### {row.key['kind'].upper()}: {row.device}"
            about = f"Measured on {row.finished:%Y-%m-%d} ({versions})."
            parts.append(f"{title}\n\n{about}\n\n{table}")
    return "\n\n".join(parts) or "No benchmark is on record yet."


PAGES = {
    "index.md": ("<!-- found -->", found_markdown),
    "scoreboard.md": ("<!-- scoreboard -->", scoreboard_markdown),
    "speed.md": ("<!-- speed-table -->", speed_markdown),
}
