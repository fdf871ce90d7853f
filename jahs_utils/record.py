"""Computing missing rows: in processes, on a GPU they share or on a cluster, within a time limit.

What a row will take is predicted from the rows there are; what cannot end in time is not started.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import os
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future
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
    Summary,
    compute_row,
    describe_row,
    find_experiment,
    key_id,
    listed,
    results_path,
)
from jahs_utils.networks import ConvNet
from jahs_utils.search import _become_worker, _environment
from jahs_utils.train import fit

Report = Callable[[str], object]

PATIENCE = 300.0  # seconds without any worker after which a cluster is given up
UNKNOWN = 120.0  # seconds that must be left to start a row of which nothing is known
GPU_ROOM = 6 * 2**30  # bytes of a GPU's memory for each process that shares it
KNEE = 1.15  # twice the processes must do this many times the work
WORK = ("epochs", "steps", "images", "total", "trials", "depth", "width")  # proportional to time
AGAIN = "what was computed is recorded: start it and call again"
SPEEDS = ("results", "speeds.jsonl")


# --- how long a row takes -------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Seconds, with a 90 % interval."""

    seconds: float
    low: float
    high: float


class Forecast:
    """Predicts the seconds of an experiment's rows from its recorded ones.

    Bayesian linear regression of log seconds on a key's entries: numbers by their logarithm, other
    values one by one. The prior: seconds grow with epochs, steps and the like, and differ between
    devices by the measured ratio of `speeds`; each of these is uncertain by a factor of about two.
    """

    def __init__(self, rows: Iterable[Row], device: str, speeds: dict[str, float]) -> None:
        self.device, self.speeds = device, speeds
        self.rows = [row for row in rows if row.status == "ok"]
        self.usual: dict[str, float] = {}

    def __call__(self, keys: Sequence[Key], processes: int | None) -> list[Estimate | None]:
        """None when no row of the experiment is recorded."""
        if not self.rows:
            return [None for _ in keys]
        from scipy.linalg import cho_solve
        from sklearn.feature_extraction import DictVectorizer
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, DotProduct

        seen, seen_prior = zip(*(self._features(r.key, r.device, r.processes) for r in self.rows))
        asked, prior = zip(*(self._features(key, self.device, processes) for key in keys))
        table = DictVectorizer(sparse=False).fit(seen + asked)
        kernel = DotProduct(4.0) + 0.2 * RBF(0.5)
        x, noise = table.transform(seen), 0.15
        y = np.log([max(row.wall_seconds, 1e-3) for row in self.rows]) - seen_prior
        model = GaussianProcessRegressor(kernel, alpha=noise**2, optimizer=None).fit(x, y)
        # Each row predicted from the others: where that is off, rows scatter more than assumed.
        precision = np.diag(cho_solve((model.L_, True), np.eye(len(seen))))
        noise *= max(1.0, float(np.sqrt(np.mean(np.square(model.alpha_) / precision))))
        model = GaussianProcessRegressor(kernel, alpha=noise**2, optimizer=None).fit(x, y)
        mean, spread = model.predict(table.transform(asked), return_std=True)
        middle, factor = np.exp(mean + prior), np.exp(1.645 * np.hypot(spread, noise))
        return [Estimate(*map(float, e)) for e in zip(middle, middle / factor, middle * factor)]

    @property
    def measured_here(self) -> bool:
        """Whether a row of this device is among the recorded ones."""
        return any(row.device == self.device for row in self.rows)

    def _features(self, key: Key, device: str, processes: int | None) -> tuple[dict, float]:
        """What distinguishes a row, in units of its coefficients' spread; expected log seconds."""
        features: dict[str, Any] = {"processes ": 0.5 * math.log(processes or 1)}
        prior = 2.0
        if device != self.device:
            features["device "] = device
            processors = [speed for d, speed in self.speeds.items() if d.endswith("threads")]
            other = max(processors, default=0) if device.endswith("threads") else 0
            here, there = self.speeds.get(self.device), self.speeds.get(device, other)
            if here and there:
                prior += math.log(here / there)
            else:  # a hundred times faster or slower
                features["speed "] = 3.0
        for name, value in key.items():
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
                features[name] = json.dumps(value, sort_keys=True)
            elif name != "seed":
                size = sum(abs(v) for v in values)
                work = name.split("_")[-1] in WORK and size > 0
                log = math.log(size) if work else math.log1p(size)
                log -= self.usual.setdefault(name, log)  # what a key does not name is as usual
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
        room = torch.cuda.mem_get_info(device)[0] // GPU_ROOM * torch.cuda.device_count()
        metrics["room"] = max(1, room)
    seconds = time.perf_counter() - start
    return describe_row({"device": hardware()}, metrics, seconds, code_version(measure_speed))


# --- where rows are computed ----------------------------------------------------------------------


class Here:
    """This process, one row at a time; the base of other places."""

    processes: int | None = 1

    def slots(self) -> int:
        """How many calls may run at once."""
        return self.processes or 0

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Begin a call; what comes of it is in the future."""
        future: Future = Future()
        future.set_result(function(*arguments))
        return future

    def close(self) -> None:
        """End all calls and processes."""

    def each(self, function: Callable[[], Any], times: int = 1) -> list[Any]:
        """What `function` returns in so many calls at once."""
        futures = [self.submit(function) for _ in range(times)]
        while concurrent.futures.wait(futures, 5).not_done:
            self.slots()  # raises when a cluster has none for too long
        try:
            return [future.result() for future in futures]
        except BrokenExecutor:
            raise ConnectionError("a process died while it loaded the book: see above") from None


class Processes(Here):
    """Processes that share the cores and the GPUs of this machine; one that dies is replaced."""

    def __init__(self, count: int) -> None:
        self.processes = count
        self._idle: queue.LifoQueue = queue.LifoQueue()  # the last that worked is warm
        self._executors = [self._start(k) for k in range(count)]
        self.keep(count)

    def _start(self, k: int) -> Any:
        from joblib.externals.loky import ProcessPoolExecutor

        # One process each, so that it is known what a process died of.
        own = {"initializer": _become_worker, "initargs": (None, os.getpid())}
        return ProcessPoolExecutor(1, env=_environment(k, self.processes), **own)

    def keep(self, count: int) -> None:
        """End all but `count` of the processes, which are idle."""
        while not self._idle.empty():
            self._idle.get()
        for executor in self._executors[count:]:
            executor.shutdown(kill_workers=True)
        self.processes, self._executors = count, self._executors[:count]
        for k in reversed(range(count)):
            self._idle.put(k)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        k = self._idle.get()

        def free(future: Future) -> None:
            if isinstance(future.exception(), BrokenExecutor):
                self._executors[k] = self._start(k)
            self._idle.put(k)

        future = self._executors[k].submit(function, *arguments)
        future.add_done_callback(free)
        return future

    def close(self) -> None:
        for executor in self._executors:
            executor.shutdown(kill_workers=True)


class Cluster(Here):
    """The workers of a Dask scheduler, as many as there are at a time."""

    processes = None

    def __init__(self, address: str) -> None:
        from distributed import Client

        self.address, self._seen = address, time.monotonic()
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # one line is enough
        self._client = self._answer(Client, address)
        self._executor = self._client.get_executor(pure=False, retries=0)

    def _answer(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except (OSError, RuntimeError) as error:
            raise self._gone(f"does not answer ({type(error).__name__})") from None

    def _gone(self, what: str) -> ConnectionError:
        return ConnectionError(f"the Dask scheduler {self.address} {what}; {AGAIN}")

    def slots(self) -> int:
        # Asked each time: workers may join late, and those that were killed return.
        info = self._answer(self._client.scheduler_info, n_workers=-1)
        if "workers" not in info:
            raise self._gone("went away")
        workers = len(info["workers"])
        self._seen = time.monotonic() if workers else self._seen
        if time.monotonic() - self._seen > PATIENCE:
            raise self._gone(f"has had no worker for {PATIENCE:.0f} s")
        return workers

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        return self._answer(self._executor.submit, function, *arguments)

    def close(self) -> None:
        self._client.close()


def open_lanes(workers: int | None, scheduler: str | None) -> Here:
    """A cluster or processes: `workers`, or one for each core or as many as a GPU may have."""
    if scheduler is not None:
        return Cluster(scheduler)
    if workers is not None:
        return Processes(whole(workers, "workers"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    most = 8 * torch.cuda.device_count() if pick_device().type == "cuda" else cores
    return Processes(min(cores, most))


# --- rows within a time limit ---------------------------------------------------------------------


class Work:
    """What is missing of the experiment "CHAPTER/NAME" at a profile."""

    def __init__(self, address: str, profile: str, retry_failed: bool = False) -> None:
        self.chapter, self.name, self.experiment = find_experiment(address)
        self.address, self._state, self.done = address, None, set()
        self.results = Results(results_path(self.chapter, self.name, profile))
        self.before = self.results.recorded()
        done = {k for k, row in self.before.items() if row.status == "ok" or not retry_failed}
        self.keys = self.experiment.keys(profile)
        self.missing = [key for key in self.keys if key_id(key) not in done]

    def learn(self, device: str, speeds: dict[str, float]) -> None:
        """Prepare `estimates` from the rows of all profiles."""
        files = [Results(results_path(self.chapter, self.name, p)) for p in PROFILES]
        self.forecast = Forecast([row for file in files for row in file.rows()], device, speeds)

    def estimate(self, key: Key, processes: int | None) -> Estimate | None:
        """What the row of a missing key will take; for all of them at once, until rows come."""
        state = processes, len(self.forecast.rows)
        if state != self._state:
            found = self.forecast(self.missing, processes)
            self._estimates = dict(zip(map(key_id, self.missing), found))
            self._state = state
        return self._estimates[key_id(key)]

    def left(self) -> list[Key]:
        """The missing keys for which nobody has recorded a row since."""
        after, named = self.results.recorded(), {key_id(key): key for key in self.missing}
        same = [k for k in named.keys() - self.done if after.get(k) == self.before.get(k)]
        return [key for k, key in named.items() if k in same]


class Job(NamedTuple):
    """One row to compute."""

    work: Work
    key: Key


class Run:
    """Computes rows on lanes and records them; `ok` and `failed` count them."""

    def __init__(self, lanes: Here, deadline: float, report: Report) -> None:
        self.lanes, self.deadline, self.report = lanes, deadline, report
        self.ok = self.failed = self._total = 0
        self._early = max(deadline - UNKNOWN, time.monotonic() / 2 + deadline / 2)
        self._deaths: collections.Counter[tuple[str, str]] = collections.Counter()
        self._running: dict[Future, tuple[Job, contextlib.ExitStack, Estimate | None]] = {}

    def compute(self, waiting: list[Job]) -> list[Job]:
        """Return the jobs for which there was no time; what runs at the deadline is ended."""
        self._total = len(waiting)
        with contextlib.ExitStack() as claims:
            while True:
                self._fill(waiting, claims)
                slots = self.lanes.slots()
                if not self._running and (slots or not waiting):
                    return waiting
                pause = max(0.0, min(5.0 if slots else 1.0, self.deadline - time.monotonic()))
                if not self._running:
                    time.sleep(pause)  # a cluster's workers may yet join
                wait = concurrent.futures.wait
                ended = wait(self._running, pause, "FIRST_COMPLETED").done
                for future in ended:
                    self._finish(future, waiting)
                if not ended and time.monotonic() >= self.deadline:
                    self.lanes.close()
                    return [job for job, _, _ in self._running.values()] + waiting

    def summary(self, left: int, reason: str) -> Summary:
        """What was done and why `left` rows are not there: `reason`, or others compute them."""
        reason = (reason or "other processes at work") if left else "complete"
        return Summary(self.ok, self.failed, left, reason)

    def _fill(self, waiting: list[Job], claims: contextlib.ExitStack) -> None:
        while waiting and len(self._running) < self.lanes.slots():
            if (found := self._next(waiting)) is None:
                return
            job, estimate = found
            claim = claims.enter_context(contextlib.ExitStack())
            known = job.work.before.get(key_id(job.key))
            if claim.enter_context(job.work.results.claim(job.key, known)):
                if not job.work.forecast.measured_here and self.deadline < math.inf:
                    self.report(f"{job.work.address}: its first row will tell how long one takes")
                future = self.lanes.submit(compute_row, job.work.address, job.key)
                self._running[future] = job, claim, estimate

    def _next(self, waiting: list[Job]) -> tuple[Job, Estimate | None] | None:
        """Take the first job that will end in time, if it may start now."""
        running = [job for job, _, _ in self._running.values()]
        if any(map(self._alone, running)):
            return None
        now, learning = time.monotonic(), {job.work.address for job in running}
        for k, job in enumerate(waiting):
            estimate = job.work.estimate(job.key, self._processes(job))
            if job.work.forecast.measured_here:
                fits = now + estimate.high <= self.deadline
            else:  # one row, early enough, before any other of its experiment
                fits = now + (estimate.low if estimate else 0.0) <= self.deadline
                fits = fits and now < self._early and job.work.address not in learning
            if fits or self.deadline == math.inf:
                return None if running and self._alone(job) else (waiting.pop(k), estimate)
        return None

    def _alone(self, job: Job) -> bool:
        # A row whose process died may have been another's victim: a second death is its own.
        died = self._deaths[job.work.address, key_id(job.key)]
        return job.work.experiment.alone or died > 0

    def _processes(self, job: Job) -> int | None:
        return 1 if self._alone(job) else self.lanes.processes

    def _finish(self, future: Future, waiting: list[Job]) -> None:
        job, claim, estimate = self._running.pop(future)
        processes = self._processes(job)
        row = self._row(future, job, processes)
        if row is None:
            waiting.append(job)
        else:
            expected = None if estimate is None else round(estimate.seconds, 2)
            job.work.done.add(key_id(job.key))
            row = dataclasses.replace(row, predicted_seconds=expected, processes=processes)
            if job.work.results.append(row):
                good = row.status == "ok"
                self.ok, self.failed = self.ok + good, self.failed + (not good)
                outcome = listed(row.metrics) if good else " ".join(row.error.split())
                count = f"{self.ok + self.failed}/{self._total}"
                took = f"{row.wall_seconds:.1f} s"
                key = f"{job.work.name} {listed(row.key)}"
                self.report(f"  {count}  {took}  {key}: {outcome[:90]}")
                if good:
                    job.work.forecast.rows.append(row)
        claim.close()

    def _row(self, future: Future, job: Job, processes: int | None) -> Row | None:
        """The row, or None when it is worth another try, alone."""
        named = job.work.address, key_id(job.key)
        try:
            row = future.result()
            crowded = processes != 1 and "out of memory" in f"{row.error} {row.metrics}".lower()
            self._deaths[named] += crowded
            return None if crowded else row
        except CancelledError:
            raise ConnectionError(f"the Dask scheduler went away; {AGAIN}") from None
        except Exception as error:
            if not isinstance(error, BrokenExecutor) and type(error).__name__ != "KilledWorker":
                raise
            self._deaths[named] += getattr(error, "allowed_failures", 0) + 1
        if self._deaths[named] < 2:
            return None
        error = f"KilledWorker: its process died {self._deaths[named]} times"
        return describe_row(job.key, {}, 0.0, code_version(job.work.experiment.unit), error)


def deadline_of(limit_seconds: float | None) -> float:
    """When a limit is over, on the monotonic clock; ValueError for a limit that cannot be."""
    if limit_seconds is None:
        return math.inf
    return time.monotonic() + number(limit_seconds, "limit_seconds", least=0)


# --- all chapters ---------------------------------------------------------------------------------


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
    works = _with_data([work for work in works if work.missing], report)
    if not works:
        report("no row is missing")
        return Summary(0, 0, 0, "complete")
    with contextlib.closing(open_lanes(workers, scheduler)) as lanes:
        device, speeds = _calibrate(lanes, workers is None, report)
        for work in works:
            work.learn(device, speeds)
        left, late = _outlook("to compute", works, lanes, report), []
        run = Run(lanes, deadline, report)
        if not dry_run:
            late = run.compute([Job(work, key) for work in works for key in work.missing])
            left = _outlook("left", works, lanes, report)
    return run.summary(left, "dry run" if dry_run else "time limit" if late else "")


def _with_data(works: list[Work], report: Report) -> list[Work]:
    """Those whose data this machine has or gets: every row of the others would fail."""
    needs = [(work, {key["data"] for key in work.missing if "data" in key}) for work in works]
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
    known = Results(book_root().joinpath(*SPEEDS))
    known.append(row)
    device, room = row.key["device"], row.metrics["room"]
    steps = {r.key["device"]: r.metrics["steps_per_second"] for r in [*known.rows(), row]}
    together = {1: steps[device]}
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
    report(f"{device}: {_at_once(lanes)} at a time (steps a second by processes: {tried})")
    return device, steps


def _outlook(what: str, works: Sequence[Work], lanes: Here, report: Report) -> int:
    """Report the rows without a record and the minutes they will take; returns their number."""
    count, known, total = 0, 0, np.zeros(3)
    for work in works:
        keys, alone = work.left(), work.experiment.alone
        found = [work.estimate(key, 1 if alone else lanes.processes) for key in keys]
        count += len(keys)
        times = "as long as its first row will tell"
        if keys and None not in found:
            seconds = np.sum(found, axis=0) / (1 if alone else min(_at_once(lanes), len(keys)))
            known, total, times = known + len(keys), total + seconds, _minutes(seconds)
        if keys:
            report(f"{what}: {work.address}: {len(keys)} rows, {times}")
    if count:
        report(f"{what} in all: {count} rows; {_minutes(total)} for {known} of them")
    return count


def _at_once(lanes: Here) -> int:
    return lanes.processes or max(1, lanes.slots())


def _minutes(seconds: Sequence[float]) -> str:
    middle, low, high = (f"{s / 60:.1f}" for s in seconds)
    return f"{middle} minutes (90 %: {low} to {high})"
