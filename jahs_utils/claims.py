"""Claims: what a document prints or says, the recorded rows that answer it, a computed verdict.

A *number* is a value that a document prints; a *finding* is a statement about methods, a
document's or this book's own. Both stand in `results/CHAPTER/claims.yml`.
"""

from __future__ import annotations

import collections
import functools
import math
import operator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import pydantic
import yaml

from jahs_utils import evidence
from jahs_utils.chapters import book_root, load_chapter
from jahs_utils.checks import one_of
from jahs_utils.evidence import Effect, Statistic
from jahs_utils.experiments import read_results, results_path

LEAST_RUNS = 3  # of a quantity that changes with the seed
FINDING_VERDICTS = ("holds", "does not hold")
OPEN_VERDICTS = ("undecided", "not yet run")
VERDICTS = (
    *("reproduced", "partly", "not reproduced", "capped", "other scale"),
    *(*FINDING_VERDICTS, *OPEN_VERDICTS),
)
Profile = Literal["quick", "standard", "gpu", "paper"]


class _Model(pydantic.BaseModel, extra="forbid"): ...


class Reported(_Model):
    """What the document prints: a value, its spread where one is given, and the unit of both."""

    value: float
    spread: float | None = None
    unit: str


class Rows(_Model):
    """Which rows: those of `experiment` (or "CHAPTER/NAME") that match `where`.

    profiles: in order of preference; the first with enough rows counts. column: a column or an
    expression of columns ("child - parent"), times `scale`. through: an exported function of the
    chapter that turns the rows into another table first.
    """

    experiment: str
    profiles: list[Profile] = ["paper", "gpu", "standard"]
    where: dict[str, Any] = {}
    column: str | None = None
    scale: float = 1.0
    through: str | None = None


class Group(_Model):
    """One of the groups that are compared: what differs from the finding's `rows`."""

    experiment: str | None = None
    where: dict[str, Any] = {}
    column: str | None = None


class _Claim(_Model):
    """What numbers and findings share. section: the chapter's heading under which it is asked."""

    id: str
    chapter: str
    document: str
    place: str
    statement: str
    section: str | None = None
    rows: Rows | None = None
    deviations: list[str] = []


class Number(_Claim):
    """A printed number, held against the statistic of rows that the document itself prints.

    comparison: "close", or "at_least" and "at_most" (no worse than the value). random: False for
    what no seed moves; then `tolerance` is the rounding of the print. A random quantity needs
    three runs; its tolerance is twice the larger of the two spreads over runs, and never more than
    half of what the claim `distinguishes`, the smallest difference that the document draws a
    conclusion from. same_scale: profiles with the document's data and budget; values of others are
    shown and not judged. cap: a limit of ours, in the unit, at which a value says nothing.
    """

    kind: Literal["number"]
    paper: Reported
    rows: Rows
    random: bool = True
    statistic: Statistic = "mean"
    comparison: Literal["close", "at_least", "at_most"] = "close"
    tolerance: float | None = pydantic.Field(default=None, gt=0)
    distinguishes: float | None = pydantic.Field(default=None, gt=0)
    same_scale: list[Profile] = ["paper"]
    cap: float | None = None

    @pydantic.model_validator(mode="after")
    def _one_tolerance(self) -> Number:
        if self.random and (self.distinguishes is None or self.tolerance is not None):
            raise ValueError("a number that is random has `distinguishes` and no `tolerance`")
        if not self.random and (self.tolerance is None or self.distinguishes is not None):
            raise ValueError("a number that is not random has `tolerance` and no `distinguishes`")
        return self

    @property
    def groups(self) -> list[Group]:
        return [Group()]

    @property
    def least(self) -> int:
        return LEAST_RUNS if self.random else 1


class Estimate(_Model):
    """What is estimated from the rows, and which side of `than` the statement asks for.

    level: of one group. difference (a - b), ratio (a / b), equivalence (a - b within `margin`).
    correlation: of columns x and y, less that of `against` and y where given. trend: change per
    step of the ordered key `over`. share: of rows for which the column is true.

    cluster: keys that rows share and that are not independent (seed, fold, parent); paired: groups
    are compared within clusters. matters: the smallest effect that counts: an interval that
    excludes it says "does not hold", too. deterministic: no seed moves the values.
    """

    kind: Literal["level", "difference", "ratio", "equivalence", "correlation", "trend", "share"]
    expect: Literal["above", "below"] = "above"
    than: float | None = None
    margin: float | None = pydantic.Field(default=None, gt=0)
    matters: float | None = pydantic.Field(default=None, gt=0)
    a: Group | None = None
    b: Group | None = None
    x: str | None = None
    y: str | None = None
    against: str | None = None
    method: Literal["spearman", "kendall", "pearson"] = "spearman"
    over: str | None = None
    statistic: Statistic = "mean"
    cluster: list[str] = []
    paired: bool = False
    deterministic: bool = False

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Estimate:
        needs = {"equivalence": "a b margin", "correlation": "x y", "trend": "over"}
        needs |= {"difference": "a b", "ratio": "a b"}
        wanted = needs.get(self.kind, "").split()
        missing = [name for name in wanted if getattr(self, name) is None]
        if missing:
            raise ValueError(f"an estimate of kind {self.kind} needs {', '.join(missing)}")
        if self.paired and not self.cluster:
            raise ValueError("paired groups need `cluster`, the keys that make a pair")
        return self

    @property
    def reference(self) -> float:
        """The value that the estimate is held against."""
        usual = {"ratio": 1.0, "share": 0.5}.get(self.kind, 0.0)
        return usual if self.than is None else self.than


class Said(_Model):
    """The sentence of each verdict; `{estimate}`, `{low}` ... are filled in (see `sentence`)."""

    holds: str
    fails: str
    undecided: str
    open: str = ""


class Finding(_Claim):
    """A statement in our words, what is estimated for it, and the scale at which it was asked.

    rows and estimate are absent where no experiment of the book has the rows yet; `next` names
    the experiment that will decide. headline: this is the chapter's line on the title page.
    """

    kind: Literal["finding"]
    scale: str
    unit: str = ""
    estimate: Estimate | None = None
    digits: int | None = None
    next: str = ""
    said: Said | None = None
    headline: bool = False

    @pydantic.model_validator(mode="after")
    def _answerable(self) -> Finding:
        if (self.rows is None) != (self.estimate is None):
            raise ValueError("`rows` and `estimate` stand together")
        if self.rows is None and not self.next:
            raise ValueError("a finding without rows names under `next` what will decide it")
        return self

    @property
    def groups(self) -> list[Group]:
        pair = [self.estimate.a, self.estimate.b]
        return pair if all(pair) else [Group()]

    @property
    def least(self) -> int:
        return 1 if self.estimate.deterministic else LEAST_RUNS


Claim = Annotated[Number | Finding, pydantic.Field(discriminator="kind")]
_READ = pydantic.TypeAdapter(Claim)


class Verdict(NamedTuple):
    """What the rows say. Values are in the claim's unit; `effect` is None without rows.

    spread: standard deviation over rows. groups: the levels of a and b. more, minutes: for
    "undecided", the further rows that would decide and their time.
    """

    verdict: str
    profile: str = ""
    effect: Effect | None = None
    spread: float = math.nan
    groups: tuple[float, ...] = ()
    tolerance: float = math.nan
    more: float = math.nan
    minutes: float = math.nan
    devices: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        return self.effect.estimate if self.effect else math.nan

    @property
    def n(self) -> int:
        return self.effect.n if self.effect else 0


def read_claims(chapter: str | None = None) -> list[Claim]:
    """The claims of a chapter (or all); ValueError naming the file and the malformed entry."""
    files = sorted((book_root() / "results").glob("*/claims.yml"))
    claims = [claim for path in files for claim in _read(path, path.stat().st_mtime_ns)]
    twice = [n for n, k in collections.Counter(c.id for c in claims).items() if k > 1]
    if twice:
        raise ValueError(f"two claims are named {', '.join(sorted(twice))}")
    return [claim for claim in claims if chapter in (None, claim.chapter)]


@functools.lru_cache(maxsize=32)
def _read(path: Path, stamp: int) -> tuple[Claim, ...]:
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    claims = []
    for number, entry in enumerate(entries or [], start=1):
        try:
            claims.append(_READ.validate_python(entry | {"chapter": path.parent.name}))
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"][1:])) or str(entry.get("id", "entry"))
            raise ValueError(f"{path}, claim {number}: {where}: {problem['msg']}") from None
    return tuple(claims)


def find_claim(id: str) -> Claim:
    """The claim of this id; ValueError with the nearest one for an unknown id."""
    claims = {claim.id: claim for claim in read_claims()}
    return claims[one_of(id, claims, "claim")]


# --- rows -----------------------------------------------------------------------------------------


def _frame(claim: _Claim, group: Group, profile: str) -> pd.DataFrame | None:
    """The rows of a group at a profile, with its column as `value`; None where there are none."""
    rows = claim.rows
    address = group.experiment or rows.experiment
    chapter, _, name = address.rpartition("/")
    chapter = chapter or claim.chapter
    path = results_path(chapter, name, profile)
    if not path.exists():
        return None
    frame = _table(chapter, name, profile, path, path.stat().st_mtime_ns)
    if rows.through:
        made = getattr(load_chapter(chapter), rows.through)(frame.copy())
        seconds = frame["wall_seconds"].sum() / max(1, len(made))
        frame = made.assign(wall_seconds=seconds, device=frame["device"].iloc[0])

    def column(asked: str) -> pd.Series:
        try:
            return frame[asked] if asked in frame else frame.eval(asked)
        except Exception:  # what the parser raises depends on the text
            raise ValueError(f"claim {claim.id}: no column {asked!r} in {address}") from None

    for key, wanted in (rows.where | group.where).items():
        matches = [_matches(wanted, value) for value in column(key)]
        frame = frame[pd.Series(matches, frame.index, dtype=bool)]  # a list may be empty
    if frame.empty:
        return None
    name = group.column or rows.column
    return frame.assign(value=column(name).astype(float) * rows.scale) if name else frame


@functools.lru_cache(maxsize=256)
def _table(chapter: str, name: str, profile: str, path: Path, stamp: int) -> pd.DataFrame:
    return read_results(chapter, name, profile)


def _matches(wanted: Any, value: Any) -> bool:
    """Whether a value is the one that is wanted, or one of them."""
    any_of = isinstance(wanted, list) and not isinstance(value, list)  # channels are a list
    return value in wanted if any_of else value == wanted


# --- verdicts -------------------------------------------------------------------------------------


def judge(claim: Claim) -> Verdict:
    """Compare a claim with its rows."""
    text, results = claim.model_dump_json(), book_root() / "results"
    files = sorted(results.glob(f"{'*' if '/' in text else claim.chapter}/*.jsonl"))
    return _judge(text, str(results), tuple(path.stat().st_mtime_ns for path in files))


@functools.lru_cache(maxsize=1024)
def _judge(text: str, results: str, stamps: tuple[int, ...]) -> Verdict:
    claim = _READ.validate_json(text)
    first = Verdict("not yet run")
    for profile in claim.rows.profiles if claim.rows else []:
        frames = [_frame(claim, group, profile) for group in claim.groups]
        if all(frame is not None for frame in frames):
            verdict = _judge_at(claim, profile, frames)
            if verdict.n >= claim.least:
                return verdict
            first = first if first.n else verdict._replace(verdict="undecided")
    return first


def _judge_at(claim: Claim, profile: str, frames: list[pd.DataFrame]) -> Verdict:
    devices = tuple(sorted({device for frame in frames for device in frame["device"]}))
    if isinstance(claim, Number):
        verdict = _judge_number(claim, profile, frames[0]["value"])
    else:
        effect, groups = _estimate(claim.estimate, frames)
        verdict = Verdict(_side(claim.estimate, effect), profile, effect, groups=groups)
        if verdict.verdict == "undecided":
            seconds = sum(float(frame["wall_seconds"].sum()) for frame in frames)
            rows = sum(map(len, frames)) / max(1, effect.n)
            more = evidence.needed(effect, _distance(claim.estimate, effect)) - effect.n
            minutes = more * seconds / max(1, effect.n) / 60
            verdict = verdict._replace(more=more * rows, minutes=minutes)
    return verdict._replace(devices=devices)


def _judge_number(claim: Number, profile: str, values: pd.Series) -> Verdict:
    value, spread = float(values.agg(claim.statistic)), float(values.std())
    if claim.random:
        effect = evidence.level(values, claim.statistic)
        spreads = [s for s in (spread, claim.paper.spread) if s is not None and not math.isnan(s)]
        tolerance = min(2 * max(spreads, default=math.inf), claim.distinguishes / 2)
    else:
        effect, tolerance = evidence.exact(value)._replace(n=len(values)), claim.tolerance
    lack = claim.paper.value - value
    lack = {"close": abs(lack), "at_least": lack, "at_most": -lack}[claim.comparison]
    if claim.cap is not None and abs(value - claim.cap) <= 0.02 * abs(claim.cap):
        verdict = "capped"
    elif profile not in claim.same_scale:
        verdict = "other scale"
    elif lack <= tolerance * (1 + 1e-9):
        verdict = "reproduced"
    else:
        verdict = "partly" if lack <= 2 * tolerance else "not reproduced"
    return Verdict(verdict, profile, effect, spread, tolerance=tolerance)


def _estimate(asked: Estimate, frames: list[pd.DataFrame]) -> tuple[Effect, tuple[float, ...]]:
    """The effect, and the level of each group."""
    first, cluster = frames[0], asked.cluster
    if asked.kind == "correlation":
        columns = (asked.x, asked.y, asked.method, cluster, asked.against)
        return evidence.correlation(first, *columns), ()
    if asked.kind == "trend":
        return evidence.trend(first, asked.over, "value", cluster), ()
    if asked.kind == "share":
        return evidence.share(first["value"] > 0), ()
    groups = [evidence.values_by(frame, "value", cluster) for frame in frames]
    levels = tuple(float(values.agg(asked.statistic)) for values in groups)
    if asked.deterministic:
        gap = operator.truediv if asked.kind == "ratio" else operator.sub
        effect = evidence.exact(functools.reduce(gap, levels))
    elif asked.kind == "level":
        effect = evidence.level(groups[0], asked.statistic)
    elif asked.kind == "ratio":
        effect = evidence.ratio(*groups, asked.paired)
    else:
        effect = evidence.difference(*groups, asked.paired, asked.statistic)
    return effect, levels


def _side(asked: Estimate, effect: Effect) -> str:
    """holds, does not hold or undecided, by where the interval lies."""
    low, high = effect.low - asked.reference, effect.high - asked.reference
    if asked.kind == "equivalence":
        holds = -asked.margin < low and high < asked.margin
        fails = low > asked.margin or high < -asked.margin
    else:
        low, high = (low, high) if asked.expect == "above" else (-high, -low)
        holds, fails = low > 0, high < 0 or high < (asked.matters or 0)
    return "holds" if holds else "does not hold" if fails else "undecided"


def _distance(asked: Estimate, effect: Effect) -> float:
    """How far the estimate is from where the verdict changes (a ratio's on its log scale)."""
    if asked.kind == "equivalence":
        return asked.margin - abs(effect.estimate)
    if asked.kind == "ratio":
        return math.log(effect.estimate / asked.reference)
    return effect.estimate - asked.reference
