"""Recorded experiments: a grid of keys, one function per row, rows that survive anything.

A row is one JSON line in `results/CHAPTER/NAME-PROFILE.jsonl`, written whole or not at all. A run
computes only the keys that have no row yet, so it can be killed and started again at any moment.
`jahs_utils.record` computes rows; this module says what they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import platform
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch

import jahs_utils
from jahs_utils.chapters import book_root, code_version, load_chapter
from jahs_utils.checks import PROFILES, one_of
from jahs_utils.data import load
from jahs_utils.device import describe_device, fastest_format, pick_device
from jahs_utils.lines import append_line, read_lines
from jahs_utils.progress import ProgressBar

Key = dict[str, Any]
LIBRARIES = ("torch", "numpy", "smac", "ConfigSpace")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A grid of keys per profile and the function that computes one row.

    unit: called as `unit(**key)`; returns the metrics as a flat dict of numbers, strings and
    lists. A key named `data` names a data set, a key named `seed` the seed: both go into the
    row's provenance. grids: profile name -> list of keys (see `grid`). alone: whether a row may
    have no other beside it on the machine, because it measures times.
    """

    unit: Callable[..., dict[str, Any]]
    grids: dict[str, list[Key]]
    alone: bool = False

    def keys(self, profile: str) -> list[Key]:
        """The keys of a profile; ValueError for an unknown profile and for what is no key."""
        keys = self.grids[one_of(profile, self.grids, "profile of this experiment")]
        for key in keys:
            _check_key(key)
        return keys


def _check_key(key: Key) -> None:
    if not isinstance(key, dict) or not all(isinstance(name, str) for name in key):
        raise ValueError(f"a key must be a dict of names and values, got {key!r}")
    for name, kind in (("seed", int), ("data", str)):
        if not isinstance(key.get(name, kind()), kind) or isinstance(key.get(name), bool):
            raise ValueError(f"key {key!r}: {name} must be of type {kind.__name__}")
    try:
        json.dumps(key, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"key {key!r} cannot stand in a row: {error}") from None


def grid(**values: Any) -> list[Key]:
    """All combinations of the values; a list, tuple or range varies, anything else is fixed.

    `grid(lr=[0.1, 1.0], seed=range(2), data="digits")` makes four keys. To pass a sequence as one
    value, put it in a list: `channels=[(8, 8)]`.
    """
    axes = [v if isinstance(v, (list, tuple, range)) else [v] for v in values.values()]
    keys = [dict(zip(values, combination)) for combination in itertools.product(*axes)]
    return [json.loads(json.dumps(key)) for key in keys]  # tuples become lists, as in the rows


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Which copy of a data set a row was computed from."""

    name: str
    checksum: str
    source: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a results file: the key, what was measured, and how it came about.

    predicted_seconds: what was expected before the row was started. processes: how many shared
    the machine while it was computed, where that is known.
    """

    key: dict
    status: str
    metrics: dict
    error: str | None
    seed: int | None
    data: DataSource | None
    code: str
    versions: dict
    device: str
    number_format: str
    wall_seconds: float | int
    finished: datetime.datetime
    predicted_seconds: float | int | None = None
    processes: int | None = None

    @classmethod
    def read(cls, line: bytes) -> Row:
        """The row in a line of JSON; ValueError with the field that is wrong."""
        name, fields = "line", {}
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("a row is an object with names and values")
            entry = {"predicted_seconds": None, "processes": None} | entry
            for name in entry.keys() ^ _kinds(cls).keys():
                raise ValueError("no field of a row" if name in entry else "missing")
            for name, kind in _kinds(cls).items():
                fields[name] = READ[name](entry[name]) if name in READ else entry[name]
                if not isinstance(fields[name], kind):
                    raise ValueError(f"{entry[name]!r} is of the wrong type")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
        return cls(**fields)

    def line(self) -> bytes:
        """The row as a line of JSON."""
        finished = self.finished.isoformat().replace("+00:00", "Z")
        entry = dataclasses.asdict(self) | {"finished": finished}
        text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")  # lone surrogates as JSON has them


READ: dict[str, Callable[[Any], Any]] = {  # from what JSON has
    "data": lambda value: value if value is None else DataSource(**value),
    "finished": datetime.datetime.fromisoformat,
    "status": lambda value: one_of(value, ("ok", "failed"), "status"),
}
_kinds = functools.cache(typing.get_type_hints)


class Results:
    """The rows of one experiment and profile in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All complete rows, oldest first; see `recorded`."""
        return list(self.recorded().values())

    def recorded(self) -> dict[str, Row]:
        """All complete rows by `key_id`, oldest first; a retried key counts with its last row.

        Raises ValueError with the line number for a line that is not a row. An unfinished last
        line (a run was killed in the middle of writing) is not a row yet and is passed over.
        """
        rows: dict[str, Row] = {}
        for number, line in enumerate(read_lines(self.path), start=1):
            try:
                row = Row.read(line)
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: {error}") from None
            known = rows.get(key_id(row.key))
            if known is not None and known.status == "ok":
                raise ValueError(f"{self.path}, line {number}: a second row for {row.key}")
            rows[key_id(row.key)] = row
        return rows

    def append(self, row: Row) -> bool:
        """Write a row unless its key has a good one already; True when it was written."""
        with self._lock("file"):
            if any(r.status == "ok" and r.key == row.key for r in self.rows()):
                return False
            append_line(self.path, row.line())
        return True

    @contextlib.contextmanager
    def claim(self, key: Key, known: Row | None = None) -> Iterator[bool]:
        """Yield True if no other process works on `key` or has recorded it; ends with the process.

        known: the row of the key that the caller has seen, to be computed again.
        """
        lock = self._lock(key_id(key))
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(blocking=False)
        try:
            yield lock.is_locked and self.recorded().get(key_id(key)) == known
        finally:
            lock.release()

    def _lock(self, name: str) -> filelock.BaseFileLock:
        # Beside the rows, which the machines of a cluster share: flock holds on NFS as well and
        # ends with its process; filelock takes marker files where a file system has no flock.
        folder = self.path.parent / ".locks" / self.path.stem
        folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(folder / name)


def key_id(key: Key) -> str:
    """A short name of a key that does not depend on the order of its entries."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def results_path(chapter: str, name: str, profile: str) -> Path:
    """Where the rows of an experiment are: `results/CHAPTER/NAME-PROFILE.jsonl`."""
    one_of(profile, PROFILES, "profile")
    return book_root() / "results" / chapter / f"{name}-{profile}.jsonl"


def read_results(chapter: str, name: str, profile: str) -> pd.DataFrame:
    """The good rows of an experiment as a frame: keys, metrics, `wall_seconds` and `device`.

    Raises ValueError when there are no rows, and when a row is malformed.
    """
    path = results_path(chapter, name, profile)
    rows = [row for row in Results(path).rows() if row.status == "ok"]
    if not rows:
        raise ValueError(
            f"no recorded rows of {chapter}/{name} at profile {profile!r}: "
            f"jahs experiment run {chapter}/{name} --profile {profile}"
        )
    measured = [{"wall_seconds": row.wall_seconds, "device": row.device} for row in rows]
    frame = pd.DataFrame([row.key | row.metrics | m for row, m in zip(rows, measured)])
    order = [name for name in rows[0].key if frame[name].map(type).ne(list).all()]
    return frame.sort_values(order, kind="stable", ignore_index=True, key=_sortable)


def _sortable(column: pd.Series) -> pd.Series:
    return column.map(str) if column.map(type).nunique() > 1 else column


def obtain_rows(address: str, profile: str) -> pd.DataFrame:
    """The rows of "CHAPTER/NAME" at `profile`, as `read_results` gives them.

    "quick" computes them now and keeps nothing, so that a chapter's live experiment is live;
    the other profiles compute and record only what is missing.
    """
    chapter, name, experiment = find_experiment(address)
    if profile != "quick":
        from jahs_utils.record import run_experiment

        run_experiment(address, profile, report=print)
        return read_results(chapter, name, profile)
    rows = []
    with ProgressBar(len(experiment.keys(profile)), name) as bar:
        for done, key in enumerate(experiment.keys(profile)):
            bar.update(done)
            rows.append(key | _plain(experiment.unit(**key)))
    return pd.DataFrame(rows)


def recorded_costs(chapter: str) -> pd.DataFrame:
    """What the recorded rows of a chapter cost: rows, minutes and device per file.

    The checksum is of keys and metrics: a page that was made from other rows shows another one.
    """
    folder = book_root() / "results" / chapter
    table = []
    for path in sorted(folder.glob("*.jsonl")):
        (name, _, profile), rows = path.stem.rpartition("-"), Results(path).rows()
        minutes = sum(row.wall_seconds for row in rows) / 60
        devices = ", ".join(sorted({row.device for row in rows}))
        content = sorted(json.dumps([row.key, row.status, row.metrics]) for row in rows)
        checksum = hashlib.sha256("\n".join(content).encode()).hexdigest()[:8]
        table.append((name, profile, len(rows), round(minutes, 1), devices, checksum))
    columns = ["experiment", "profile", "rows", "minutes", "device", "checksum"]
    return pd.DataFrame(table, columns=columns)


def find_experiment(address: str) -> tuple[str, str, Experiment]:
    """Turn "CHAPTER/NAME" into the chapter, the name and the experiment it declares."""
    chapter, _, name = address.partition("/")
    module = load_chapter(chapter)
    declared = getattr(module, "EXPERIMENTS", {})
    return chapter, name, declared[one_of(name, declared, f"experiment of {chapter}")]


# --- computing rows -------------------------------------------------------------------------------


def compute_row(address: str, key: Key) -> Row:
    """Run one unit and describe how it came about; an exception becomes a failed row."""
    unit = find_experiment(address)[2].unit
    start = time.perf_counter()
    try:
        metrics, error = _plain(unit(**key)), None
    except Exception as problem:
        metrics, error = {}, f"{type(problem).__name__}: {problem}"
    seconds = time.perf_counter() - start
    torch.cuda.empty_cache()  # other processes may share the GPU; does nothing where there is none
    return describe_row(key, metrics, seconds, code_version(unit), error)


def describe_row(
    key: Key, metrics: dict[str, Any], seconds: float, code: str, error: str | None = None
) -> Row:
    """Complete a measurement, or an error, with where and how it was made."""
    device = pick_device()
    form = fastest_format(device)
    data = None
    if "data" in key and error is None:
        loaded = load(key["data"])
        data = DataSource(name=loaded.name, checksum=loaded.checksum, source=loaded.source)
    return Row(
        key=key,
        status="ok" if error is None else "failed",
        metrics=metrics,
        error=error,
        seed=key.get("seed"),
        data=data,
        code=code,
        versions=_versions(),
        device=describe_device(device),
        number_format=f"{form.precision}{' channels-last' if form.channels_last else ''}",
        wall_seconds=round(seconds, 4),
        finished=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:  # what a machine lacks, a row can do without
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions | {"jahs-utils": jahs_utils.__version__}


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics as JSON: NumPy numbers and tensors become Python's, what is not finite null."""

    def convert(value: Any) -> Any:
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {str(k): convert(v) for k, v in value.items()}
        if isinstance(value, Iterable) and not isinstance(value, str):
            return [convert(v) for v in value]
        return value

    plain = {str(name): convert(value) for name, value in metrics.items()}
    json.dumps(plain)  # what JSON cannot hold fails here, as the unit's error
    return plain


def listed(values: dict[str, Any]) -> str:
    short = ((k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in values.items())
    return ", ".join(f"{k}={v}" for k, v in short)
