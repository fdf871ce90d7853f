"""How pages show claims: as sentences, as tables, and as data for other programs."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from jahs_utils.claims import (
    VERDICTS,
    Claim,
    Finding,
    Number,
    Verdict,
    find_claim,
    judge,
    read_claims,
)

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
    smallest = verdict.effect.smallest if verdict.effect else math.inf
    if not math.isfinite(smallest) or claim.estimate.deterministic:
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


def judged(chapter: str | None = None, kind: type | None = None) -> list[tuple[Claim, Verdict]]:
    """The claims of a chapter (or all), of one kind (or both), with their verdicts."""
    wanted = kind or (Number, Finding)
    return [(c, judge(c)) for c in read_claims(chapter) if isinstance(c, wanted)]


def claims_table(chapter: str | None = None) -> pd.DataFrame:
    """The printed numbers of a chapter (or all) beside what was measured, as text."""
    found = judged(chapter, Number)
    together = _sharing([claim for claim, _ in found])
    return _table(
        {
            "claim": claim.statement,
            "source": f"{claim.document}, {claim.place}",
            "paper": _amount(claim.paper.value, claim.paper.spread, claim.paper.unit),
            "measured": _measured(claim, verdict),
            "runs": _runs(verdict) + together.get(claim.id, ""),
            "verdict": verdict.verdict,
        }
        for claim, verdict in found
    )


def findings_table(chapter: str | None = None) -> pd.DataFrame:
    """The findings of a chapter (or all): estimate, interval, power and verdict, as text."""
    return _table(
        {
            "finding": claim.statement,
            "source": f"{claim.document}, {claim.place}",
            "asked at": claim.scale,
            "estimate": _estimated(claim, verdict),
            "n": verdict.n or "-",
            "would have shown": _smallest(claim, verdict),
            "verdict": verdict.verdict + _what_decides(claim, verdict),
        }
        for claim, verdict in judged(chapter, Finding)
    )


def _table(rows: Iterable[dict[str, object]]) -> pd.DataFrame:
    """The rows as a table, which notebooks then show without cutting its sentences."""
    pd.set_option("display.max_colwidth", None)
    return pd.DataFrame(rows)


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
    asked = [(claim.chapter, claim.rows.model_copy(update={"scale": 1.0})) for claim in claims]
    shared = {}
    for claim, rows in zip(claims, asked):
        others = [c.statement for c, r in zip(claims, asked) if r == rows and c is not claim]
        if others:
            shared[claim.id] = "; shared with " + ", ".join(f'"{other}"' for other in others)
    return shared


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


def claims_json(chapter: str | None = None) -> list[dict[str, Any]]:
    """Every claim with its verdict, as plain data; None where there are no rows."""
    told = {"id", "kind", "chapter", "document", "place", "statement"}
    entries = []
    for claim, verdict in judged(chapter):
        found = verdict.effect
        ends = [x if math.isfinite(x) else None for x in (found.low, found.high)] if found else None
        answer = {
            "verdict": verdict.verdict,
            "value": found.estimate if found else None,
            "interval": ends,
            "n": verdict.n,
            "profile": verdict.profile or None,
            "unit": claim.paper.unit if isinstance(claim, Number) else claim.unit,
        }
        entries.append(claim.model_dump(include=told) | answer)
    return entries


def counts(chapter: str | None = None) -> pd.DataFrame:
    """How many claims of each kind have each verdict: one row a kind, one column a verdict."""
    tally = collections.Counter((f"{c.kind}s", v.verdict) for c, v in judged(chapter))
    kinds, verdicts = map(set, zip(*tally)) if tally else ((), ())
    kinds = [kind for kind in ("numbers", "findings") if kind in kinds]
    columns = [verdict for verdict in VERDICTS if verdict in verdicts]
    return pd.DataFrame([[tally[k, v] for v in columns] for k in kinds], kinds, columns)
