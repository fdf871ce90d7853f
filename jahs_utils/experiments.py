"""Recorded experiments: a grid of keys, one function per row, rows that survive anything.

A row is one JSON line in `results/CHAPTER/NAME-PROFILE.jsonl`, written whole or not at all. A run
computes only the keys that have no row yet, so it can be killed and started again at any moment.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import filelock
import pandas as pd
import pydantic
import torch

from jahs_utils.chapters import book_root, code_version, load_chapter
from jahs_utils.checks import PROFILES, one_of
from jahs_utils.data import load
from jahs_utils.device import cache_folder, describe_device, fastest_format, pick_device
from jahs_utils.progress import ProgressBar

Key = dict[str, Any]
LIBRARIES = ("torch", "numpy", "smac", "ConfigSpace", "jahs-utils")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A grid of keys per profile and the function that computes one row.

    unit: called as `unit(**key)`; returns the metrics as a flat dict of numbers, strings and
    lists. A key named `data` names a data set, a key named `seed` the seed: both go into the
    row's provenance. grids: profile name -> list of keys (see `grid`).
    """

    unit: Callable[..., dict[str, Any]]
    grids: dict[str, list[Key]]

    def keys(self, profile: str) -> list[Key]:
        """The keys of a profile; ValueError when the experiment has no such profile."""
        return self.grids[one_of(profile, self.grids, "profile of this experiment")]


def grid(**values: Any) -> list[Key]:
    """All combinations of the values; a list, tuple or range varies, anything else is fixed.

    `grid(lr=[0.1, 1.0], seed=range(2), data="digits")` makes four keys. To pass a sequence as one
    value, put it in a list: `channels=[(8, 8)]`.
    """
    axes = [v if isinstance(v, (list, tuple, range)) else [v] for v in values.values()]
    keys = [dict(zip(values, combination)) for combination in itertools.product(*axes)]
    return [json.loads(json.dumps(key)) for key in keys]  # tuples become lists, as in the rows


class DataSource(pydantic.BaseModel, extra="forbid"):
    """Which copy of a data set a row was computed from."""

    name: str
    checksum: str
    source: str


class Row(pydantic.BaseModel, extra="forbid"):
    """One line of a results file: the key, what was measured, and how it came about."""

    key: dict[str, Any]
    status: Literal["ok", "failed"]
    metrics: dict[str, Any]
    error: str | None
    seed: int | None
    data: DataSource | None
    code: str
    versions: dict[str, str]
    device: str
    number_format: str
    wall_seconds: float
    finished: datetime.datetime


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
        if not self.path.exists():
            return {}
        lines = self.path.read_bytes().split(b"\n")[:-1]
        rows: dict[str, Row] = {}
        for number, line in enumerate(lines, start=1):
            try:
                row = Row.model_validate_json(line)
            except pydantic.ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(map(str, problem["loc"])) or "line"
                raise ValueError(f"{self.path}, line {number}: {where}: {problem['msg']}") from None
            known = rows.get(key_id(row.key))
            if known is not None and known.status == "ok":
                raise ValueError(f"{self.path}, line {number}: a second row for {row.key}")
            rows[key_id(row.key)] = row
        return rows

    def append(self, row: Row) -> bool:
        """Write a row unless its key has a good one already; True when it was written."""
        line = row.model_dump_json().encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock("file"):
            if any(r.status == "ok" and r.key == row.key for r in self.rows()):
                return False
            with open(self.path, "ab+") as file:
                self._cut_torn_line(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        return True

    @contextlib.contextmanager
    def claim(self, key: Key, known: Row | None = None) -> Iterator[bool]:
        """Yield True if no other process works on `key` or has recorded it; ends with the process.

        known: the row of the key that the caller has seen, to be computed again.
        """
        lock = self._lock(key_id(key))
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            yield False
            return
        try:
            yield self.recorded().get(key_id(key)) == known
        finally:
            lock.release()

    def _lock(self, name: str) -> filelock.BaseFileLock:
        place = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        folder = cache_folder() / "locks" / place
        folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(folder / name)

    @staticmethod
    def _cut_torn_line(file: Any) -> None:
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
        file.seek(0, os.SEEK_END)


def key_id(key: Key) -> str:
    """A short name of a key that does not depend on the order of its entries."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def results_path(chapter: str, name: str, profile: str) -> Path:
    """Where the rows of an experiment are: `results/CHAPTER/NAME-PROFILE.jsonl`."""
    return (
        book_root() / "results" / chapter / f"{name}-{one_of(profile, PROFILES, 'profile')}.jsonl"
    )


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
    extra = ({"wall_seconds": r.wall_seconds, "device": r.device} for r in rows)
    frame = pd.DataFrame([r.key | r.metrics | e for r, e in zip(rows, extra)])
    key_names = list(rows[0].key)
    order = [c for c in key_names if frame[c].map(type).ne(list).all()]
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
        run_experiment(address, profile, report=print)
        return read_results(chapter, name, profile)
    rows = []
    with ProgressBar(len(experiment.keys(profile)), name) as bar:
        for done, key in enumerate(experiment.keys(profile)):
            bar.update(done)
            rows.append(key | _plain(experiment.unit(**key)))
    return pd.DataFrame(rows)


def recorded_costs(chapter: str) -> pd.DataFrame:
    """What the recorded rows of a chapter cost: rows, minutes and device per file."""
    folder = book_root() / "results" / chapter
    table = []
    for path in sorted(folder.glob("*.jsonl")):
        name, _, profile = path.stem.rpartition("-")
        rows = Results(path).rows()
        minutes = sum(row.wall_seconds for row in rows) / 60
        devices = ", ".join(sorted({row.device for row in rows}))
        table.append((name, profile, len(rows), round(minutes, 1), devices))
    return pd.DataFrame(table, columns=["experiment", "profile", "rows", "minutes", "device"])


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
    return describe_row(key, metrics, time.perf_counter() - start, code_version(unit), error)


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
        versions={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
        device=describe_device(device),
        number_format=f"{form.precision}{' channels-last' if form.channels_last else ''}",
        wall_seconds=round(seconds, 4),
        finished=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
    )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did: rows written (`ok`, `failed`), keys still without a row, and why."""

    ok: int
    failed: int
    left: int
    reason: str


def run_experiment(
    address: str,
    profile: str,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    limit_seconds: float | None = None,
    retry_failed: bool = False,
    report: Callable[[str], object] = lambda line: None,
) -> Summary:
    """Compute and record the rows of "CHAPTER/NAME" that are missing at `profile`.

    workers: local processes (1: this process), each with its share of the cores, or with a GPU of
    its own. scheduler: address of a Dask cluster to use instead. limit_seconds: start nothing
    that the slowest row so far would not finish in time. retry_failed: compute failed rows again.
    """
    chapter, name, experiment = find_experiment(address)
    results = Results(results_path(chapter, name, profile))
    deadline = math.inf if limit_seconds is None else time.monotonic() + limit_seconds
    before = results.recorded()
    done = {k for k, row in before.items() if row.status == "ok" or not retry_failed}
    missing = [key for key in experiment.keys(profile) if key_id(key) not in done]
    report(f"{address} {profile}: {len(missing)} rows to compute, {len(done)} recorded")
    if scheduler is None and workers <= 1:
        stream = _in_this_process(address, missing, results, before, deadline)
    else:
        stream = _on_dask(address, missing, results, before, workers, scheduler, deadline)
    ok = failed = 0
    computed = set()
    for row in stream:
        computed.add(key_id(row.key))
        if results.append(row):
            ok, failed = ok + (row.status == "ok"), failed + (row.status == "failed")
            outcome = " ".join(row.error.split()) if row.error else _listed(row.metrics)
            count = f"{ok + failed}/{len(missing)}"
            report(f"  {count}  {row.wall_seconds:.1f} s  {_listed(row.key)}: {outcome[:90]}")
    after, open_keys = results.recorded(), {key_id(key) for key in missing} - computed
    left = sum(after.get(k) == before.get(k) for k in open_keys)
    late = left and time.monotonic() + 1 >= deadline - _slowest(results)
    reason = "complete" if not left else ("time limit" if late else "other processes at work")
    return Summary(ok, failed, left, reason)


def _in_this_process(
    address: str,
    missing: Sequence[Key],
    results: Results,
    before: dict[str, Row],
    deadline: float,
) -> Iterator[Row]:
    slowest = 0.0
    for key in missing:
        if time.monotonic() + slowest > deadline:
            return
        with results.claim(key, before.get(key_id(key))) as mine:
            if not mine:
                continue
            row = compute_row(address, key)
            slowest = max(slowest, row.wall_seconds)
            yield row  # written by the caller while the claim is held


def _on_dask(
    address: str,
    missing: Sequence[Key],
    results: Results,
    before: dict[str, Row],
    workers: int,
    scheduler: str | None,
    deadline: float,
) -> Iterator[Row]:
    from distributed import Client, wait
    from distributed.scheduler import KilledWorker

    waiting, slowest = list(missing), 0.0
    deaths: collections.Counter[str] = collections.Counter()
    held: dict[Any, tuple[Key, contextlib.ExitStack]] = {}
    with contextlib.ExitStack() as stack:
        cluster = scheduler or stack.enter_context(_local_cluster(workers))
        client = stack.enter_context(Client(cluster))

        def submit_to_idle_workers() -> None:
            # Counted anew each time: a cluster's workers may join late, and killed ones return.
            lanes = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
            # A key during which a worker died runs alone the next time: a second death is its own.
            suspect = any(deaths[key_id(key)] for key, _ in held.values())
            while waiting and len(held) < lanes and not suspect:
                suspect = deaths[key_id(waiting[0])] > 0
                if time.monotonic() + slowest > deadline or (suspect and held):
                    return
                key = waiting.pop(0)
                claim = stack.enter_context(contextlib.ExitStack())
                if claim.enter_context(results.claim(key, before.get(key_id(key)))):
                    future = client.submit(compute_row, address, key, pure=False, retries=0)
                    held[future] = key, claim
                else:
                    claim.close()

        submit_to_idle_workers()
        while held:
            for future in wait(list(held), return_when="FIRST_COMPLETED").done:
                key, claim = held.pop(future)
                try:
                    row = future.result()
                except KilledWorker:
                    deaths[key_id(key)] += 1
                    if deaths[key_id(key)] < 2:
                        waiting.append(key)
                        claim.close()
                        continue
                    code = code_version(find_experiment(address)[2].unit)
                    row = describe_row(key, {}, 0.0, code, "KilledWorker: its process died twice")
                slowest = max(slowest, row.wall_seconds)
                yield row  # written by the caller while the claim is held
                claim.close()
            submit_to_idle_workers()


@contextlib.contextmanager
def _local_cluster(workers: int) -> Iterator[Any]:
    """Worker processes that share the cores, or one per GPU where there are GPUs."""
    import dask
    from distributed import Nanny, SpecCluster
    from distributed.scheduler import Scheduler

    gpus = torch.cuda.device_count()
    workers = min(workers, gpus) if gpus else workers
    threads = max(1, (os.cpu_count() or 1) // workers)
    shared = {"JAHS_PROGRESS": "0", "OMP_NUM_THREADS": str(threads)}
    shared |= {"MKL_NUM_THREADS": str(threads)}  # Dask sets 1, which torch would take
    quiet = {"silence_logs": logging.ERROR}  # restarts are expected: rows tell what went wrong
    specs = {}
    for k in range(workers):
        environment = shared | ({"CUDA_VISIBLE_DEVICES": str(k)} if gpus else {})
        options = {"nthreads": 1, "env": environment, "memory_limit": 0} | quiet
        specs[k] = {"cls": Nanny, "options": options}
    # The caller decides what to try again. The default of the second, 15 s, gives a worker up for
    # lost while it imports torch after a restart.
    settings = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.deploy.lost-worker-timeout": "10 minutes",
    }
    options = {"dashboard": False, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    server = {"cls": Scheduler, "options": options}
    with dask.config.set(settings), SpecCluster(specs, scheduler=server, **quiet) as cluster:
        yield cluster


def _slowest(results: Results) -> float:
    return max((row.wall_seconds for row in results.rows()), default=0.0)


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


def _listed(values: dict[str, Any]) -> str:
    short = ((k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in values.items())
    return ", ".join(f"{k}={v}" for k, v in short)
