"""Computing missing rows: in processes, on a GPU they share or on a cluster, within a time limit.

What a row will take is predicted from the rows there are; what cannot end in time is not started.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple

import numpy as np
import torch

from jahs_utils.chapters import book_root, chapter_names, code_version, load_chapter
from jahs_utils.checks import PROFILES, number, one_of, whole
from jahs_utils.data import load
from jahs_utils.device import describe_device, pick_device
from jahs_utils.experiments import (
    Key,
    Results,
    Row,
    compute_row,
    describe_row,
    find_experiment,
    key_id,
    listed,
    results_path,
)
from jahs_utils.networks import ConvNet
from jahs_utils.train import fit
from jahs_utils.workers import Cluster, Died, Here, Processes, cores, gpus

Report = Callable[[str], object]

UNKNOWN = 120.0  # seconds that must be left to start a row of which nothing is known
GPU_ROOM = 6 * 2**30  # bytes of a GPU's memory for each process that shares it
KNEE = 1.15  # twice the processes must do this many times the work
WORK = ("epochs", "steps", "images", "total", "trials", "depth", "width")  # proportional to time


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did: rows written (`ok`, `failed`), keys still without a row, and why."""

    ok: int
    failed: int
    left: int
    reason: str


# --- how long a row takes -------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Seconds, with a 90 % interval."""

    seconds: float
    low: float
    high: float


def forecast(
    rows: Sequence[Row],
    keys: Sequence[Key],
    device: str,
    speeds: dict[str, float],
    processes: int | None,
) -> list[Estimate | None]:
    """The seconds of an experiment's keys on `device`, from its good rows; None without any.

    Bayesian linear regression of log seconds on a key's entries: numbers by their logarithm, other
    values one by one. The prior: seconds grow with epochs, steps and the like, and differ between
    devices by the measured ratio of `speeds`; each of these is uncertain by a factor of about two.
    """
    if not rows or not keys:
        return [None for _ in keys]
    from scipy.linalg import cho_solve
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, DotProduct

    seen, seen_prior = zip(*(_features(r.key, r.processes, r.device, device, speeds) for r in rows))
    asked, prior = zip(*(_features(key, processes, device, device, speeds) for key in keys))
    table = DictVectorizer(sparse=False).fit(seen + asked)
    kernel, x, noise = DotProduct(4.0) + 0.2 * RBF(0.5), table.transform(seen), 0.15
    y = np.log([max(row.wall_seconds, 1e-3) for row in rows]) - seen_prior
    model = GaussianProcessRegressor(kernel, alpha=noise**2, optimizer=None).fit(x, y)
    # Each row predicted from the others: where that is off, rows scatter more than assumed.
    precision = np.diag(cho_solve((model.L_, True), np.eye(len(seen))))
    noise *= max(1.0, float(np.sqrt(np.mean(np.square(model.alpha_) / precision))))
    model = GaussianProcessRegressor(kernel, alpha=noise**2, optimizer=None).fit(x, y)
    mean, spread = model.predict(table.transform(asked), return_std=True)
    middle, factor = np.exp(mean + prior), np.exp(1.645 * np.hypot(spread, noise))
    return [Estimate(*map(float, e)) for e in zip(middle, middle / factor, middle * factor)]


def _features(
    key: Key, processes: int | None, device: str, here: str, speeds: dict[str, float]
) -> tuple[dict[str, Any], float]:
    """What distinguishes a row, in units of its coefficients' spread; expected log seconds."""
    features: dict[str, Any] = {"processes ": 0.5 * math.log(processes or 1)}
    prior = 0.0
    if device != here:
        features["device "] = device
        processors = [s for d, s in speeds.items() if d.endswith("threads")]
        other = max(processors, default=0) if device.endswith("threads") else 0
        ratio = speeds.get(here, 0) / (speeds.get(device, other) or math.inf)
        features["speed "] = 0.0 if ratio else 3.0  # a hundred times faster or slower
        prior = math.log(ratio) if ratio else 0.0
    for name, value in key.items():
        values = value if isinstance(value, list) else [value]
        if not all(type(v) in (int, float) for v in values):
            features[name] = json.dumps(value, sort_keys=True)
        elif name != "seed":
            size = sum(map(abs, values))
            work = name.split("_")[-1] in WORK and size > 0
            log = math.log(size) if work else math.log1p(size)
            features[name], prior = (0.3 if work else 0.5) * log, prior + work * log
    return features, prior


def hardware() -> str:
    """What a row that is computed in this process names as its device."""
    return describe_device(pick_device())


def measure_speed() -> Row:
    """Training steps a second of a small ConvNet, and how many processes a GPU has memory for."""
    start, device = time.perf_counter(), pick_device()
    data = load("fashion_mnist_mini", device=device)
    fit(ConvNet(), data, steps=5, evaluate_every=None)
    frame = fit(ConvNet(), data, seconds=0.7, evaluate_every=None).frame
    metrics = {"steps_per_second": float(frame.step.iloc[-1] / frame.seconds.iloc[-1]), "room": 0}
    if device.type == "cuda":
        metrics["room"] = max(1, torch.cuda.mem_get_info(device)[0] // GPU_ROOM)
    seconds = time.perf_counter() - start
    return describe_row({"device": hardware()}, metrics, seconds, code_version(measure_speed))


# --- rows within a time limit ---------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Job:
    """One row to compute; `known` is the failed one that it is to replace."""

    work: Work
    key: Key
    known: Row | None
    estimate: Estimate | None = None
    deaths: int = 0
    done: bool = False

    @property
    def alone(self) -> bool:
        """Whether no other row may be computed beside it."""
        # A row whose process died may have been another's victim: a second death is its own.
        return self.work.experiment.alone or self.deaths > 0


class Work:
    """What is missing of the experiment "CHAPTER/NAME" at a profile."""

    def __init__(self, address: str, profile: str, retry_failed: bool = False) -> None:
        self.chapter, self.name, self.experiment = find_experiment(address)
        self.address = address
        self.results = Results(results_path(self.chapter, self.name, profile))
        recorded = self.results.recorded()
        named = {key_id(key): key for key in self.experiment.keys(profile)}
        done = {k for k, row in recorded.items() if row.status == "ok" or not retry_failed}
        self.jobs = [Job(self, key, recorded.get(k)) for k, key in named.items() if k not in done]
        self.recorded = len(named) - len(self.jobs)

    def learn(self, device: str, speeds: dict[str, float], processes: int | None) -> None:
        """Estimate the jobs from the rows of all profiles, and again with every row to come."""
        files = [Results(results_path(self.chapter, self.name, p)) for p in PROFILES]
        self._rows = [row for file in files for row in file.rows()]
        self._circumstances = device, speeds, 1 if self.experiment.alone else processes
        self.add()

    def add(self, *rows: Row) -> None:
        """Take rows into account that were computed since."""
        self._rows = [row for row in [*self._rows, *rows] if row.status == "ok"]
        self.measured_here = any(row.device == self._circumstances[0] for row in self._rows)
        keys = [job.key for job in self.jobs]
        for job, estimate in zip(self.jobs, forecast(self._rows, keys, *self._circumstances)):
            job.estimate = estimate

    def left(self) -> list[Job]:
        """The jobs of which nobody has recorded a row since."""
        after = self.results.recorded()
        return [j for j in self.jobs if not j.done and after.get(key_id(j.key)) == j.known]


class Run:
    """Computes rows on lanes and records them; `ok` and `failed` count them."""

    def __init__(self, lanes: Here, deadline: float, report: Report) -> None:
        self.lanes, self.deadline, self.report = lanes, deadline, report
        self.ok = self.failed = self._total = 0
        self._early = max(deadline - UNKNOWN, time.monotonic() / 2 + deadline / 2)
        self._running: dict[Future, tuple[Job, contextlib.ExitStack]] = {}

    def compute(self, waiting: list[Job]) -> list[Job]:
        """Return the jobs for which there was no time; what runs at the deadline is ended."""
        self._total = len(waiting)
        with contextlib.ExitStack() as claims:
            while True:
                while len(self._running) < self.lanes.slots() and (job := self._next(waiting)):
                    self._start(job, claims.enter_context(contextlib.ExitStack()))
                slots = self.lanes.slots()
                if not self._running and (slots or not waiting):
                    return waiting
                pause = max(0.0, min(5.0 if slots else 1.0, self.deadline - time.monotonic()))
                if not self._running:
                    time.sleep(pause)  # a cluster's workers may yet join
                ended = concurrent.futures.wait(self._running, pause, "FIRST_COMPLETED").done
                for future in ended:
                    job, claim = self._running.pop(future)
                    with claim:
                        waiting += self._finish(future, job)
                if not ended and time.monotonic() >= self.deadline:
                    self.lanes.close()
                    return [job for job, _ in self._running.values()] + waiting

    def summary(self, left: int, reason: str) -> Summary:
        """What was done and why `left` rows are not there: `reason`, or others compute them."""
        reason = (reason or "other processes at work") if left else "complete"
        return Summary(self.ok, self.failed, left, reason)

    def _next(self, waiting: list[Job]) -> Job | None:
        """Take the first job that will end in time, if it may start now."""
        running, limited = [job for job, _ in self._running.values()], self.deadline < math.inf
        if any(job.alone for job in running):
            return None
        for job in waiting:
            start, estimate = time.monotonic(), job.estimate
            if job.work.measured_here:
                fits = start + estimate.high <= self.deadline
            else:  # one row, early enough, before any other of its experiment
                fits = start + (estimate.low if estimate else 0.0) <= self.deadline
                learning = limited and any(other.work is job.work for other in running)
                fits = fits and start < self._early and not learning
            if fits:
                if running and job.alone:
                    return None
                waiting.remove(job)
                return job
        return None

    def _start(self, job: Job, claim: contextlib.ExitStack) -> None:
        if claim.enter_context(job.work.results.claim(job.key, job.known)):
            if not job.work.measured_here and self.deadline < math.inf:
                self.report(f"{job.work.address}: its first row will tell how long one takes")
            future = self.lanes.submit(compute_row, job.work.address, job.key)
            self._running[future] = job, claim

    def _finish(self, future: Future, job: Job) -> list[Job]:
        """Record the row; the job comes back when it is worth another try, alone."""
        processes, expected = 1 if job.alone else self.lanes.processes, job.estimate
        try:
            row = future.result()
        except CancelledError:
            raise self.lanes.gone("went away") from None
        except Exception as problem:
            if not isinstance(problem, Died) and type(problem).__name__ != "KilledWorker":
                raise
            job.deaths += getattr(problem, "allowed_failures", 0) + 1
            if job.deaths < 2:
                return [job]
            error = f"KilledWorker: its process died {job.deaths} times"
            row = describe_row(job.key, {}, 0.0, code_version(job.work.experiment.unit), error)
        if processes != 1 and "out of memory" in f"{row.error} {row.metrics}".lower():
            job.deaths += 1
            return [job]
        seconds = None if expected is None else round(expected.seconds, 2)
        row = dataclasses.replace(row, predicted_seconds=seconds, processes=processes)
        job.done = True
        if job.work.results.append(row):
            good = row.status == "ok"
            self.ok, self.failed = self.ok + good, self.failed + (not good)
            outcome = listed(row.metrics) if good else " ".join(row.error.split())
            count = f"{self.ok + self.failed}/{self._total}  {row.wall_seconds:.1f} s"
            self.report(f"  {count}  {job.work.name} {listed(row.key)}: {outcome[:90]}")
            job.work.add(row)
        return []


def deadline_of(limit_seconds: float | None) -> float:
    """When a limit is over, on the monotonic clock; ValueError for a limit that cannot be."""
    if limit_seconds is None:
        return math.inf
    return time.monotonic() + number(limit_seconds, "limit_seconds", least=0)


def open_lanes(workers: int | None, scheduler: str | None) -> Here:
    """A cluster or processes: `workers`, or one for each core or as many as a GPU may have."""
    if scheduler is not None:
        return Cluster(scheduler)
    if workers is not None:
        return Processes(whole(workers, "workers"))
    on_gpu = pick_device().type == "cuda"
    return Processes(min(cores(), 8 * max(1, len(gpus()))) if on_gpu else cores())


# --- one experiment, and all chapters -------------------------------------------------------------


def run_experiment(
    address: str,
    profile: str,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    limit_seconds: float | None = None,
    retry_failed: bool = False,
    report: Report = lambda line: None,
) -> Summary:
    """Compute and record the rows of "CHAPTER/NAME" that are missing at `profile`.

    workers: local processes (1: this process), each with its share of the cores, or with a GPU of
    its own. scheduler: address of a Dask cluster to use instead. limit_seconds: start nothing
    that the recorded rows say would not end in time. retry_failed: compute failed rows again.
    Raises ValueError for a number out of range, ConnectionError for a cluster that goes away.
    """
    here = whole(workers, "workers") == 1 and scheduler is None
    deadline, work = deadline_of(limit_seconds), Work(address, profile, retry_failed)
    late = [*work.jobs]
    report(f"{address} {profile}: {len(late)} rows to compute, {work.recorded} recorded")
    with contextlib.closing(Here() if here else open_lanes(workers, scheduler)) as lanes:
        run = Run(lanes, deadline, report)
        if late and time.monotonic() < deadline:
            work.learn(*lanes.each(hardware), {}, lanes.processes)
            late = run.compute(late)
    return run.summary(len(work.left()), "time limit" if late else "")


def record(
    profile: str,
    addresses: Sequence[str] = (),
    *,
    limit_seconds: float | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    dry_run: bool = False,
    retry_failed: bool = False,
    report: Report = lambda line: None,
) -> Summary:
    """Compute the missing rows of all chapters, or of `addresses`, in the order of worth.yml.

    The other arguments are those of `run_experiment`; without `workers` there is a process for each
    core, or as many as make a GPU faster. dry_run: only report what it would take.
    """
    deadline = deadline_of(limit_seconds)
    works = [Work(a, profile, retry_failed) for a in _in_order(profile, addresses, report)]
    works = _with_data([work for work in works if work.jobs], report)
    if not works:
        report("no row is missing")
        return Summary(0, 0, 0, "complete")
    with contextlib.closing(open_lanes(workers, scheduler)) as lanes:
        device, speeds = _calibrate(lanes, workers is None, report)
        for work in works:
            work.learn(device, speeds, lanes.processes)
        left, late = _outlook("to compute", works, lanes, report), []
        run = Run(lanes, deadline, report)
        if not dry_run:
            late = run.compute([job for work in works for job in work.jobs])
            left = _outlook("left", works, lanes, report)
    return run.summary(left, "dry run" if dry_run else "time limit" if late else "")


def _with_data(works: list[Work], report: Report) -> list[Work]:
    """Those whose data this machine has or gets: every row of the others would fail."""
    needs = [(w, {job.key["data"] for job in w.jobs if "data" in job.key}) for w in works]
    lacking = set()
    for name in sorted(set().union(*(names for _, names in needs))):
        try:
            load(name, device="cpu")
        except ValueError as error:
            lacking.add(name)
            lost = ", ".join(work.address for work, names in needs if name in names)
            report(f"left out for want of {name}: {lost} ({error})")
    return [work for work, names in needs if not names & lacking]


def _in_order(profile: str, addresses: Sequence[str], report: Report) -> list[str]:
    """The experiments that have the profile, most worth per second first."""
    one_of(profile, PROFILES, "profile")
    declared: dict[str, dict] = {}
    for chapter in chapter_names():
        try:
            declared[chapter] = getattr(load_chapter(chapter), "EXPERIMENTS", {})
        except ImportError as error:
            report(f"{chapter} is left out: {error}")
    found = [f"{c}/{n}" for c, d in declared.items() for n, e in d.items() if profile in e.grids]
    first = _worth(profile)
    for address in first:
        chapter, _, name = address.partition("/")
        one_of(chapter, chapter_names(), "chapter in results/worth.yml")
        one_of(name, declared.get(chapter, [name]), f"experiment of {chapter} in results/worth.yml")
    found.sort(key=lambda address: first.index(address) if address in first else len(first))
    wanted = [one_of(a, found, f"experiment with profile {profile!r}") for a in addresses]
    return [address for address in found if address in wanted or not wanted]


def _worth(profile: str) -> list[str]:
    import yaml

    path = book_root() / "results" / "worth.yml"
    with contextlib.suppress(AttributeError, TypeError, ValueError, yaml.YAMLError):
        entries = yaml.safe_load(path.read_text(encoding="utf-8-sig") if path.exists() else "{}")
        names = entries.get(profile, [])
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    raise ValueError(f"{path}: a list of CHAPTER/NAME is wanted under the name of each profile")


def _calibrate(lanes: Here, choose: bool, report: Report) -> tuple[str, dict[str, float]]:
    """The device and the speeds of all known ones; keeps as many processes as a GPU can use."""
    (row,) = lanes.each(measure_speed)
    known = Results(book_root() / "results" / "speeds.jsonl")
    known.append(row)
    device, room = row.key["device"], row.metrics["room"] * max(1, len(gpus()))
    speeds = {r.key["device"]: r.metrics["steps_per_second"] for r in [*known.rows(), row]}
    together = {1: speeds[device]}
    if choose and room and lanes.processes:
        most = max(2**k for k in range(10) if 2**k <= min(lanes.processes, room))
        lanes.each(measure_speed, most)  # each of them starts and warms up
        n = best = 1
        while 2 * n <= most:
            n *= 2
            together[n] = sum(r.metrics["steps_per_second"] for r in lanes.each(measure_speed, n))
            if together[n] < KNEE * together[best]:
                break
            best = n
        lanes.keep(best)
    tried = ", ".join(f"{n}: {speed:.0f}" for n, speed in together.items())
    report(f"{device}: {max(1, lanes.slots())} at a time (steps a second by processes: {tried})")
    return device, speeds


def _outlook(what: str, works: Sequence[Work], lanes: Here, report: Report) -> int:
    """Report the rows without a record and the minutes they will take; returns their number."""
    count, known, total = 0, 0, np.zeros(3)
    for work in works:
        found = [job.estimate for job in work.left()]
        count += len(found)
        times = "as long as its first row will tell"
        if found and None not in found:
            at_once = 1 if work.experiment.alone else min(max(1, lanes.slots()), len(found))
            seconds = np.sum(found, axis=0) / at_once
            known, total, times = known + len(found), total + seconds, _minutes(seconds)
        if found:
            report(f"{what}: {work.address}: {len(found)} rows, {times}")
    if count:
        report(f"{what} in all: {count} rows; {_minutes(total)} for {known} of them")
    return count


def _minutes(seconds: Sequence[float]) -> str:
    middle, low, high = (f"{s / 60:.1f}" for s in seconds)
    return f"{middle} minutes (90 %: {low} to {high})"
