"""Where calls run: in this process, in processes that may die, or on the workers of a cluster."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from typing import Any

PATIENCE = 300.0  # seconds without any worker after which a cluster is given up
AGAIN = "what was computed is recorded: start it and call again"


class Died(ChildProcessError):
    """A call ended with its process, after so many `seconds`; the text says how."""

    seconds: float


class Here:
    """This process, one call at a time; the base of other places.

    first: what every call gets before its own arguments; it is sent to each process once.
    processes: how many there are, None where they come and go.
    """

    processes: int | None = 1

    def __init__(self, *first: Any) -> None:
        self._first = first

    def slots(self) -> int:
        """How many calls may run at once."""
        return self.processes or 0

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Begin a call; what comes of it, or how it `Died`, is in the future."""
        future: Future = Future()
        future.set_result(function(*self._first, *arguments))
        return future

    def each(self, function: Callable[..., Any], times: int = 1) -> list[Any]:
        """What `function` returns in so many calls at once."""
        futures = [self.submit(function) for _ in range(times)]
        while concurrent.futures.wait(futures, 5).not_done:
            self.slots()  # raises when a cluster has none for too long
        return [future.result() for future in futures]

    def close(self) -> None:
        """End all calls and processes; another call starts new ones."""


class Processes(Here):
    """Processes that share the cores and GPUs of this machine; one that dies is replaced.

    limit: seconds after which a call ends with its process. No more calls than processes at once.
    """

    def __init__(self, count: int, *first: Any, limit: float | None = None) -> None:
        super().__init__(*first)
        self._count, self._limit = count, limit
        self._executors: dict[int, Any] = {}  # one process each, so that a death has one cause
        self._threads = ThreadPoolExecutor(count)  # one waits for one process
        self._calls: set[Future] = set()
        self.keep(count)

    def keep(self, count: int) -> None:
        """End all but `count` of the processes; none may be at work."""
        self.processes = count
        self._idle: queue.PriorityQueue[int] = queue.PriorityQueue()  # the first are warm
        for k in range(self._count):
            self._idle.put(k) if k < count else self._end(k)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        call = self._threads.submit(self._run, function, arguments)
        self._calls = {other for other in self._calls if not other.done()} | {call}
        return call

    def _run(self, function: Callable[..., Any], arguments: tuple) -> Any:
        k = self._idle.get()
        try:
            executor, start = self._ready(k), time.monotonic()
            try:
                return executor.submit(_call, function, arguments).result(self._limit)
            except TimeoutError:
                died = Died(f"took longer than {self._limit:g} s")
            except BrokenExecutor as problem:
                code = re.search(r"\{(.+?)\}", str(problem))
                died = Died(f"its process died{f': {code[1]}' if code else ''}")
            self._end(k)
            died.seconds = time.monotonic() - start
            raise died
        finally:
            self._idle.put(k)

    def _ready(self, k: int) -> Any:
        from joblib.externals.loky import ProcessPoolExecutor

        for _ in range(2):  # a process may have died while it was idle
            if k not in self._executors:
                self._executors[k] = ProcessPoolExecutor(
                    max_workers=1,
                    initializer=_become_worker,
                    initargs=(self._first, os.getpid()),  # by cloudpickle: notebooks may define it
                    env=environment(k, self._count),
                )
            with contextlib.suppress(BrokenExecutor):
                executor = self._executors[k]
                executor.submit(int).result()
                return executor
            self._end(k)
        raise ChildProcessError("two processes died while they started: their output tells why")

    def _end(self, k: int) -> None:
        executor = self._executors.pop(k, None)
        if executor is not None:
            executor.shutdown(kill_workers=True)

    def close(self) -> None:
        waiting = True
        while waiting:  # a call may be about to start a process
            for k in [*self._executors]:
                self._end(k)
            waiting = concurrent.futures.wait(self._calls, 0.1).not_done


_first: tuple = ()  # of the calls in this process, if it is one of `Processes`


def _become_worker(first: tuple, owner: int) -> None:
    from joblib.externals.loky import process_executor

    global _first
    _first = first
    process_executor._USE_PSUTIL = False  # Loky would replace a process that grows by 300 MB
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()


def _end_with(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(1)
    os._exit(1)  # the owner was killed: what is computed for it must not hold the GPU


def _call(function: Callable[..., Any], arguments: tuple) -> Any:
    return function(*_first, *arguments)


def environment(k: int, count: int) -> dict[str, str]:
    """Of process `k` of so many: no progress bars, its share of the cores, one of the GPUs."""
    own = {"JAHS_PROGRESS": "0"}
    if count > 1:
        own |= dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS"], str(max(1, cores() // count)))
        if names := gpus():
            own["CUDA_VISIBLE_DEVICES"] = names[k % len(names)]
    return own


def cores() -> int:
    """The processor cores that this process may use."""
    import joblib

    return joblib.cpu_count()


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be for one of several processes; none if JAHS_DEVICE tells."""
    import torch

    if os.environ.get("JAHS_DEVICE", "auto") not in ("auto", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]


class Cluster(Here):
    """The workers of a Dask scheduler, as many as there are at a time."""

    processes = None

    def __init__(self, address: str) -> None:
        from distributed import Client

        super().__init__()
        self.address, self._seen = address, time.monotonic()
        for name in ("distributed", "distributed.client"):  # one line is enough
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._client = self._answer(Client, address)
        self._executor = self._client.get_executor(pure=False, retries=0)

    def _answer(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except (OSError, RuntimeError) as error:
            raise self.gone(f"does not answer ({type(error).__name__})") from None

    def gone(self, what: str) -> ConnectionError:
        """What to raise when the scheduler is of no more use."""
        return ConnectionError(f"the Dask scheduler {self.address} {what}; {AGAIN}")

    def slots(self) -> int:
        # Asked each time: workers may join late, and those that were killed return.
        info = self._answer(self._client.scheduler_info, n_workers=-1)
        if "workers" not in info:
            raise self.gone("went away")
        workers = len(info["workers"])
        self._seen = time.monotonic() if workers else self._seen
        if time.monotonic() - self._seen > PATIENCE:
            raise self.gone(f"has had no worker for {PATIENCE:.0f} s")
        return workers

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        return self._answer(self._executor.submit, function, *arguments)

    def close(self) -> None:
        self._client.close()
