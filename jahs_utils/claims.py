"""Claims: what a paper reports, the recorded rows that answer it, and a computed verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import pydantic
import yaml

from jahs_utils.chapters import book_root
from jahs_utils.experiments import Results, read_results, results_path

BENCHMARK_ROWS = Path("results", "benchmarks", "training.jsonl")


class Reported(pydantic.BaseModel, extra="forbid"):
    """What the paper prints: a value, its spread where one is given, and the unit of both."""

    value: float
    spread: float | None = None
    unit: str


class Answer(pydantic.BaseModel, extra="forbid"):
    """The rows that answer a claim: `column` times `scale`, over the rows that match `where`.

    profiles: in order of preference; the first with at least `least_rows` rows counts.
    """

    experiment: str
    profiles: list[Literal["quick", "standard", "paper"]]
    where: dict[str, Any] = {}
    column: str
    scale: float = 1.0
    least_rows: int = 1


class Claim(pydantic.BaseModel, extra="forbid"):
    """One number of a paper. tolerances are in the paper's unit.

    comparison: "close" (within the tolerance of the value), "at_least" or "at_most" (not worse
    than the value by more than the tolerance). `tolerance` makes it reproduced, the wider
    `partly` partly so.
    """

    id: str
    chapter: str
    document: str
    place: str
    statement: str
    paper: Reported
    answer: Answer
    comparison: Literal["close", "at_least", "at_most"]
    tolerance: float = pydantic.Field(gt=0)
    partly: float = pydantic.Field(gt=0)
    deviations: list[str] = []


class Verdict(NamedTuple):
    """Mean and standard deviation over `n` rows, in the paper's unit, and what follows."""

    value: float
    spread: float
    n: int
    profile: str
    verdict: str


def read_claims() -> list[Claim]:
    """The claims of all chapters; ValueError naming the file and the entry that is malformed."""
    claims = []
    for path in sorted((book_root() / "results").glob("*/claims.yml")):
        try:
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        for number, entry in enumerate(entries or [], start=1):
            try:
                claims.append(Claim.model_validate(entry | {"chapter": path.parent.name}))
            except pydantic.ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(map(str, problem["loc"]))
                raise ValueError(f"{path}, claim {number}: {where}: {problem['msg']}") from None
    names = [claim.id for claim in claims]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two claims are named {', '.join(twice)}")
    return claims


def judge(claim: Claim) -> Verdict:
    """Compare a claim with its rows."""
    answer = claim.answer
    for profile in answer.profiles:
        if not results_path(claim.chapter, answer.experiment, profile).exists():
            continue
        rows = read_results(claim.chapter, answer.experiment, profile)
        for column in [*answer.where, answer.column]:
            if column not in rows:
                raise ValueError(f"claim {claim.id}: no column {column!r} in {answer.experiment}")
        for column, wanted in answer.where.items():
            # a list stands for itself (channels) or for any of its members (folds)
            matches = [v == wanted or _is_choice(wanted, v) for v in rows[column]]
            rows = rows[pd.Series(matches, rows.index, dtype=bool)]  # a list may be empty
        if len(rows) >= answer.least_rows:
            values = rows[answer.column].astype(float) * answer.scale
            mean = float(values.mean())
            spread = float(values.std()) if len(values) > 1 else math.nan
            return Verdict(mean, spread, len(values), profile, _verdict(claim, mean))
    return Verdict(math.nan, math.nan, 0, "", "not yet run")


def _is_choice(wanted: Any, value: Any) -> bool:
    return isinstance(wanted, list) and not isinstance(value, list) and value in wanted


def _verdict(claim: Claim, value: float) -> str:
    lack = {
        "close": abs(value - claim.paper.value),
        "at_least": claim.paper.value - value,
        "at_most": value - claim.paper.value,
    }[claim.comparison]
    if lack <= claim.tolerance:
        return "reproduced"
    return "partly" if lack <= claim.partly else "not reproduced"


def claims_table(chapter: str | None = None) -> pd.DataFrame:
    """The claims of a chapter (or all) beside what was measured, one row each, as text."""
    table = []
    for claim in read_claims():
        if chapter in (None, claim.chapter):
            verdict, unit = judge(claim), claim.paper.unit
            table.append(
                {
                    "claim": claim.statement,
                    "source": f"{claim.document}, {claim.place}",
                    "paper": _amount(claim.paper.value, claim.paper.spread, unit),
                    "measured": _amount(verdict.value, verdict.spread, unit),
                    "runs": f"{verdict.n} ({verdict.profile})" if verdict.n else "0",
                    "verdict": verdict.verdict,
                }
            )
    columns = ["claim", "source", "paper", "measured", "runs", "verdict"]
    return pd.DataFrame(table, columns=columns)


def scoreboard_markdown() -> str:
    """All claims as a Markdown table, after a line that counts the verdicts."""
    parts = []
    for chapter in sorted({claim.chapter for claim in read_claims()}):
        table = claims_table(chapter)
        counts = table["verdict"].value_counts()
        line = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        parts.append(f"## {chapter}\n\n{line}.\n\n{markdown(table.to_numpy(), table.columns)}")
    return "\n\n".join(parts) or "No claims are on record yet."


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


def _amount(value: float, spread: float | None, unit: str) -> str:
    if math.isnan(value):
        return "-"
    if spread is None or math.isnan(spread) or spread <= 1e-9 * abs(value):
        return f"{value:.4g} {unit}"
    digits = max(1, -math.floor(math.log10(spread)))  # down to the spread's first digit
    return f"{value:.{digits}f} ± {spread:.{digits}f} {unit}"


def markdown(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> str:
    """A Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
