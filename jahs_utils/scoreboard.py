"""How pages show claims: sentences, tables, the scoreboard, the title page, the speed page."""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from jahs_utils.chapters import book_root, chapter_names, chapter_path
from jahs_utils.claims import (
    FINDING_VERDICTS,
    OPEN_VERDICTS,
    VERDICTS,
    Finding,
    Number,
    Verdict,
    find_claim,
    judge,
    read_claims,
)
from jahs_utils.experiments import Results
from jahs_utils.plots import COLORS, figure_html, new_figure

BENCHMARK_ROWS = Path("results", "benchmarks", "training.jsonl")
WORDING = {"holds": "holds", "does not hold": "fails", "undecided": "undecided"}


# --- sentences ------------------------------------------------------------------------------------


def sentence(id: str) -> str:
    """The sentence of a finding's verdict, with its numbers: the text of a page or a title.

    Wordings stand in the claim (`said`). They may name {estimate}, {size} (without its sign),
    {low}, {high}, {interval}, {a} and {b} (the groups' levels), {n}, {smallest}, {more} (rows)
    and {minutes}. Raises ValueError for a claim that has no wordings.
    """
    claim = find_claim(id)
    if not isinstance(claim, Finding) or claim.said is None:
        raise ValueError(f"claim {id} has no `said`: a page cannot cite it")
    verdict = judge(claim)
    if verdict.effect is None:
        return claim.said.open or f"No row answers yet whether this holds: {claim.statement}."
    effect, digits = verdict.effect, _digits(claim, verdict)
    shown = {
        **{"estimate": effect.estimate, "size": abs(effect.estimate)},
        **{"low": effect.low, "high": effect.high, **dict(zip("ab", verdict.groups))},
    }
    text = {name: _fixed(value, digits) for name, value in shown.items()}
    text |= {
        "interval": f"[{text['low']}, {text['high']}]",
        "n": effect.n,
        "smallest": _smallest(claim, verdict),
        "more": _count(verdict.more),
        "minutes": _count(verdict.minutes),
    }
    return getattr(claim.said, WORDING[verdict.verdict]).format(**text)


def conclude(*ids: str) -> Any:
    """The sentences of findings as one paragraph of Markdown: what a page concludes."""
    from IPython.display import Markdown

    return Markdown(" ".join(sentence(id) for id in ids))


def _fixed(value: float, digits: int) -> str:
    """With so many digits behind the point; what rounds to zero has no sign."""
    return f"{value:z.{digits}f}"


def _digits(claim: Finding, verdict: Verdict) -> int:
    """Digits behind the point: down to the first two of the interval's half width."""
    if claim.digits is not None:
        return claim.digits
    half = (verdict.effect.high - verdict.effect.low) / 2
    if not math.isfinite(half) or half <= 0:
        return 2 if abs(verdict.effect.estimate) < 100 else 0
    return min(4, max(0, 1 - math.floor(math.log10(half))))


def _smallest(claim: Finding, verdict: Verdict) -> str:
    smallest = verdict.effect.smallest
    if claim.estimate.deterministic or not math.isfinite(smallest):
        return "-"
    if claim.estimate.kind == "ratio":
        return f"a factor of {math.exp(smallest):.2f}"
    return f"{smallest:.{_digits(claim, verdict)}f} {claim.unit}".strip()


def _count(value: float) -> str:
    """A number of rows or minutes, rounded up to two digits; what is out of reach is said so."""
    if not math.isfinite(value) or value > 1e5:
        return "more than 100,000"
    step = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return f"{math.ceil(value / step) * step:,}"


# --- tables ---------------------------------------------------------------------------------------


def claims_table(chapter: str | None = None) -> pd.DataFrame:
    """The printed numbers of a chapter (or all) beside what was measured, as text."""
    claims = [claim for claim in read_claims(chapter) if isinstance(claim, Number)]
    together = _sharing(claims)
    columns = ["claim", "source", "paper", "measured", "runs", "verdict"]
    table = [
        (
            claim.statement,
            f"{claim.document}, {claim.place}",
            _amount(claim.paper.value, claim.paper.spread, claim.paper.unit),
            _measured(claim, verdict),
            _runs(verdict) + together.get(claim.id, ""),
            verdict.verdict,
        )
        for claim, verdict in ((claim, judge(claim)) for claim in claims)
    ]
    return _whole(pd.DataFrame(table, columns=columns))


def findings_table(chapter: str | None = None) -> pd.DataFrame:
    """The findings of a chapter (or all): estimate, interval, power and verdict, as text."""
    columns = ["finding", "source", "asked at", "estimate", "n", "would have shown", "verdict"]
    table = []
    for claim in read_claims(chapter):
        if isinstance(claim, Finding):
            verdict = judge(claim)
            shown = "-" if verdict.effect is None else _smallest(claim, verdict)
            table.append(
                (
                    claim.statement,
                    f"{claim.document}, {claim.place}",
                    claim.scale,
                    _estimated(claim, verdict),
                    verdict.n or "-",
                    shown,
                    verdict.verdict + _what_decides(claim, verdict),
                )
            )
    return _whole(pd.DataFrame(table, columns=columns))


def _whole(table: pd.DataFrame) -> pd.DataFrame:
    """The table, which notebooks then show without cutting its sentences."""
    pd.set_option("display.max_colwidth", None)
    return table


def _what_decides(claim: Finding, verdict: Verdict) -> str:
    if verdict.verdict == "not yet run":
        return f": {claim.next}" if claim.next else ""
    if verdict.verdict != "undecided":
        return ""
    if not math.isfinite(verdict.more):
        return ": too few runs" if verdict.n < 3 else ""
    return f": {_count(verdict.more)} more rows, {_count(verdict.minutes)} min"


def _sharing(claims: Sequence[Number]) -> dict[str, str]:
    """For each number whose rows answer others, too: which."""
    same = collections.defaultdict(list)
    for claim in claims:
        asked = claim.rows.model_dump(exclude={"scale"})
        same[json.dumps([claim.chapter, asked], sort_keys=True)].append(claim)
    return {
        claim.id: "; shared with "
        + ", ".join(f'"{other.statement}"' for other in group if other is not claim)
        for group in same.values()
        for claim in group
        if len(group) > 1
    }


def _runs(verdict: Verdict) -> str:
    return f"{verdict.n} ({verdict.profile})" if verdict.n else "0"


def _measured(claim: Number, verdict: Verdict) -> str:
    shown = _amount(verdict.value, verdict.spread, claim.paper.unit)
    return shown if math.isnan(verdict.tolerance) else f"{shown} (within {verdict.tolerance:.2g})"


def _estimated(claim: Finding, verdict: Verdict) -> str:
    if verdict.effect is None:
        return "-"
    effect, digits = verdict.effect, _digits(claim, verdict)
    shown = _fixed(effect.estimate, digits)
    if not claim.estimate.deterministic and math.isfinite(effect.high):
        shown += f" [{_fixed(effect.low, digits)}, {_fixed(effect.high, digits)}]"
    return f"{shown} {claim.unit}".strip()


def _amount(value: float, spread: float | None, unit: str) -> str:
    if math.isnan(value):
        return "-"
    if spread is None or math.isnan(spread) or spread <= 1e-9 * abs(value):
        return f"{value:.4g} {unit}"
    digits = max(1, -math.floor(math.log10(spread)))  # down to the spread's first digit
    return f"{value:.{digits}f} ± {spread:.{digits}f} {unit}"


def markdown(rows: Iterable[Sequence[object]], columns: Iterable[str]) -> str:
    """A Markdown table."""
    lines = [list(columns), ["---"] * len(list(columns)), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


# --- for other programs ---------------------------------------------------------------------------


def claims_json() -> list[dict[str, Any]]:
    """Every claim with its verdict, as plain data; None where there are no rows."""
    entries = []
    for claim in read_claims():
        verdict = judge(claim)
        found = verdict.effect
        bounds = (
            [x if math.isfinite(x) else None for x in (found.low, found.high)] if found else None
        )
        entries.append(
            {
                "id": claim.id,
                "kind": claim.kind,
                "chapter": claim.chapter,
                "document": claim.document,
                "place": claim.place,
                "statement": claim.statement,
                "verdict": verdict.verdict,
                "value": found.estimate if found else None,
                "interval": bounds,
                "n": verdict.n,
                "profile": verdict.profile or None,
                "unit": claim.paper.unit if isinstance(claim, Number) else claim.unit,
            }
        )
    return entries


def counts(chapter: str | None = None) -> pd.DataFrame:
    """How many claims of each kind have each verdict: one row a kind, one column a verdict."""
    found = [(claim.kind, judge(claim).verdict) for claim in read_claims(chapter)]
    tally = collections.Counter(found)
    kinds = [kind for kind in ("number", "finding") if any(k == kind for k, _ in found)]
    columns = [v for v in VERDICTS if any(w == v for _, w in found)]
    table = [[tally[kind, verdict] for verdict in columns] for kind in kinds]
    return pd.DataFrame(table, pd.Index([f"{kind}s" for kind in kinds]), columns)


# --- pages ----------------------------------------------------------------------------------------


def chapter_title(chapter: str) -> str:
    """The heading of a chapter's notebook."""
    return headings(chapter)[0]


def headings(chapter: str) -> list[str]:
    """All headings of a chapter's notebook, in order."""
    cells = nbformat.read(chapter_path(chapter), as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return [heading.strip() for heading in re.findall(r"(?m)^#+ (.+)$", text)]


def scoreboard_markdown() -> str:
    """All claims: a figure, counts by kind, then for each chapter its numbers and findings."""
    tally = counts()
    rows = [(kind, *row) for kind, row in zip(tally.index, tally.to_numpy())]
    parts = [_overview(), markdown(rows, ["", *tally])]
    for chapter in chapter_names():
        if claims := read_claims(chapter):
            tally = collections.Counter(judge(claim).verdict for claim in claims)
            said = ", ".join(f"{tally[v]} {v}" for v in VERDICTS if tally[v])
            parts.append(f"## {chapter_title(chapter)}\n\n{said}.")
            parts += _folded(chapter, claims)
    return "\n\n".join(parts)


def _folded(chapter: str, claims: Sequence[Number | Finding]) -> list[str]:
    """A chapter's tables under their counts, and how to compute the rows behind them."""
    linked = {}
    for claim in claims:
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


def _commands(claims: Sequence[Number | Finding]) -> pd.DataFrame:
    """The commands that compute the rows of these claims, and where those on record were made."""
    made: dict[tuple[str, str], set[str]] = {}
    for claim in claims:
        if claim.rows is not None:
            verdict = judge(claim)
            address = claim.rows.experiment
            address = address if "/" in address else f"{claim.chapter}/{address}"
            key = (address, verdict.profile or claim.rows.profiles[0])
            made.setdefault(key, set()).update(verdict.devices)
    table = [
        (f"`jahs experiment run {address} --profile {profile}`", ", ".join(sorted(on)) or "not yet")
        for (address, profile), on in sorted(made.items())
    ]
    return pd.DataFrame(table, columns=["rows", "recorded on"])


def _slug(heading: str) -> str:
    """The anchor that the book gives to a heading (as GitHub does)."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


SHADES = {
    "reproduced, holds": COLORS[0],
    "partly": COLORS[4],
    "not reproduced, does not hold": COLORS[1],
    "undecided": COLORS[5],
    "capped": COLORS[3],
    "other scale": "0.45",
    "not yet run": "0.75",
}


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
        judged = [(c, judge(c)) for c in read_claims(chapter) if isinstance(c, Number)]
        shown = [(c, v) for c, v in judged if v.effect is not None]
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
        collections.Counter(
            judge(c).verdict for c in read_claims(chapter) if isinstance(c, Finding)
        )
        for chapter in chapters
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


def found_markdown() -> str:
    """The title page: what each chapter found, by the verdict of its headline finding."""
    lines = []
    for claim in read_claims():
        if isinstance(claim, Finding) and claim.headline:
            title = chapter_title(claim.chapter)
            lines.append((f"[{title}](/chapters/{claim.chapter}.ipynb)", sentence(claim.id)))
    return markdown(lines, ["Chapter", "What it found"])


def speed_markdown() -> str:
    """For each benchmark the newest row of each kind of device as Markdown tables.

    A row's metrics may name under "versions" what it depends on; else it is torch.
    """
    parts = []
    files = (book_root() / BENCHMARK_ROWS).parent.glob("*.jsonl")
    for path in sorted(files, key=lambda path: (path.name != BENCHMARK_ROWS.name, path.name)):
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
