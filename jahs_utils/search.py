"""What search chapters share: evaluations that are counted and survive anything, and SMAC.

A search asks for the losses of configurations at budgets. An `Evaluator` stands between it and the
function that trains: it counts, times and limits, turns failures into trials, and keeps a journal
from which a search that was killed replays itself.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import numbers
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jahs_utils.checks import number, positive, shown, whole
from jahs_utils.lines import append_line, read_lines
from jahs_utils.workers import Died, Here, Processes

if TYPE_CHECKING:
    from ConfigSpace import ConfigurationSpace
    from smac import MultiFidelityFacade

RANGE = 10_000  # of budgets: SMAC begins with about as many configurations
RUNGS = 100  # more come of an eta that is 1 but for a slip
LARGEST = 1e150  # of a cost: its square is finite

Config = dict[str, Any]
Evaluate = Callable[[Config, float], float]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One evaluation: the `loss` of `config` at `budget`, or `math.inf` and the `error`.

    config: plain Python values. budget: in the units of the search. seconds: wall-clock time.
    error: one line, None when the evaluation succeeded.
    """

    config: Config
    budget: float
    loss: float
    seconds: float
    error: str | None = None


class OutOfBudget(Exception):
    """The next evaluation would take a search beyond its total budget."""


def best(trials: list[Trial]) -> Trial:
    """The trial of lowest loss at the largest budget at which any trial succeeded.

    Losses at different budgets do not compare. Raises ValueError when no trial succeeded.
    """
    good = [trial for trial in trials if trial.error is None]
    if not good:
        reason = f"the first of {len(trials)}: {trials[0].error}" if trials else "there are none"
        raise ValueError(f"no trial succeeded; {reason}")
    largest = max(trial.budget for trial in good)
    return min((t for t in good if t.budget == largest), key=lambda trial: trial.loss)


class Evaluator:
    """Calls `evaluate(config, budget)` for a search and keeps the `trials` in order of completion.

    `evaluator(config, budget)` returns a Trial. With several `workers`, `start` begins
    evaluations and `finish` waits for the next one that ends. `spent` is the sum of the budgets of
    all trials. An exception, a loss that is not a finite number, an evaluation that is too slow and
    a process that dies make a trial with loss inf; KeyboardInterrupt and SystemExit pass through.

    evaluate: takes a dict of plain Python values and a budget (int when integral), returns the
    loss. total: what `spent` may not exceed. journal: a JSONL file with one line a trial; the
    trials it holds answer the first calls without an evaluation, so that a deterministic search
    that was killed goes on when it is started again. limit_seconds: after which an evaluation is
    killed; loading `evaluate` does not count. With it, or with several workers, evaluations run in
    processes of their own: use `with`, or `close` in the end. Raises ValueError for a number out of
    range and for a journal with a line that is not a trial.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        *,
        total: float = math.inf,
        journal: str | os.PathLike[str] | None = None,
        limit_seconds: float | None = None,
        workers: int = 1,
    ) -> None:
        if isinstance(evaluate, Evaluator) or not callable(evaluate):
            raise TypeError(f"evaluate must be a function, got {shown(evaluate)}: see Evaluator.of")
        if limit_seconds is not None:
            limit_seconds = min(positive(limit_seconds, "limit_seconds"), threading.TIMEOUT_MAX)
        whole(workers, "workers", 1, 1000)
        self.trials: list[Trial] = []
        self.spent: float = 0
        self.total = _check_total(total)
        self._journal = None if journal is None else _Journal(_path(journal))
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[Config, float]] = {}  # started and not finished
        self._running: dict[int, concurrent.futures.Future[Trial]] = {}  # those at work
        self._place = Here(evaluate)
        if limit_seconds is not None or workers > 1:
            self._place = Processes(workers, evaluate, limit=limit_seconds)

    @classmethod
    def of(cls, evaluate: Evaluate | Evaluator, total: float = math.inf) -> Evaluator:
        """Any function in an Evaluator; an Evaluator as it is, with the smaller of two totals."""
        if not isinstance(evaluate, cls):
            return cls(evaluate, total=total)
        evaluate.total = min(evaluate.total, _check_total(total))
        return evaluate

    def __call__(self, config: Mapping[str, Any], budget: float) -> Trial:
        """Evaluate one configuration; raises what `start` and `finish` raise."""
        self.start(config, budget)
        return self.finish()[1]

    def start(self, config: Mapping[str, Any], budget: float) -> int:
        """Begin an evaluation; returns its number, by which `finish` names it.

        Raises OutOfBudget when it would take `spent` above `total`, ValueError for a budget that
        is not above 0.
        """
        config, budget = _plain(config), _rounded(budget)
        spent = self.spent + sum(asked_budget for _, asked_budget in self._asked.values())
        if spent + budget > self.total * (1 + 1e-9):
            raise OutOfBudget(f"budget {budget} after {spent} exceeds the total of {self.total}")
        if self._journal is not None:
            _as_json(config)  # what JSON cannot hold fails here, before it is evaluated
        number = next(self._numbers)
        self._asked[number] = config, budget
        return number

    def finish(self) -> tuple[int, Trial]:
        """Wait for the next evaluation that ends; returns its number and its trial.

        Raises ValueError when none was started, and when the journal holds another one here.
        """
        if not self._asked:
            raise ValueError("no evaluation was started that has not finished: call start first")
        try:
            if self._journal is not None and len(self.trials) < len(self._journal.trials):
                number, trial = self._journal.answer(len(self.trials), self._asked)
            else:
                number, trial = self._next_result()
                if self._journal is not None:
                    self._journal.append(trial)
        except BaseException:
            self.close()
            raise
        del self._asked[number]
        self.trials.append(trial)
        self.spent += trial.budget
        return number, trial

    def _next_result(self) -> tuple[int, Trial]:
        for key, asked in self._asked.items():
            if key not in self._running and len(self._running) < self._place.slots():
                self._running[key] = self._place.submit(_attempt, *asked)
        done, _ = concurrent.futures.wait(self._running.values(), return_when="FIRST_COMPLETED")
        key = next(key for key, future in self._running.items() if future in done)
        try:
            return key, self._running.pop(key).result()
        except Died as end:
            return key, Trial(*self._asked[key], math.inf, end.seconds, str(end))

    def close(self) -> None:
        """End all processes; evaluations that have not finished are dropped."""
        self._place.close()
        self._running.clear()
        self._asked.clear()

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_total(total: float) -> float:
    return total if total == math.inf else positive(total, "total")


def _attempt(evaluate: Evaluate, config: Config, budget: float) -> Trial:
    start = time.perf_counter()
    try:
        loss, error = _as_loss(evaluate(copy.deepcopy(config), budget)), None
    except Exception as problem:
        loss, error = math.inf, " ".join(f"{type(problem).__name__}: {problem}".split())
    return Trial(config, budget, loss, time.perf_counter() - start, error)


def _as_loss(value: Any) -> float:
    number = value.item() if hasattr(value, "item") else value
    if not (isinstance(number, numbers.Real) and math.isfinite(number)):
        raise ValueError(f"a loss must be a finite number, got {shown(value)}")
    return float(number)


def _rounded(budget: float) -> float:
    budget = _plain(positive(budget, "budget"))
    if budget != int(budget):
        budget = float(f"{budget:.10g}")  # one number, by whatever route it was computed
    return int(budget) if budget == int(budget) else budget


def _plain(value: Any) -> Any:
    """`value` with mappings as dicts and NumPy's scalars, strings and arrays as Python's."""
    if isinstance(value, Mapping):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(v) for v in value)
    return value.tolist() if hasattr(value, "tolist") else value


def _path(place: str | os.PathLike[str]) -> Path:
    return Path(place).expanduser().absolute()


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


class _Journal:
    """Trials as JSON lines; `trials` are those of earlier runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.trials = path, []
        for place, line in enumerate(read_lines(path), start=1):
            try:
                entry = json.loads(line)
                loss = math.inf if entry["loss"] is None else entry["loss"]
                self.trials.append(Trial(**entry | {"loss": loss}))
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path}, line {place}: not a trial: delete the file or name another journal"
                ) from None
        self._lines = len(self.trials)

    def answer(self, index: int, asked: Mapping[int, tuple[Config, float]]) -> tuple[int, Trial]:
        """The trial at `index` and the number of the evaluation that it answers."""
        trial = self.trials[index]
        for asked_as, (config, budget) in asked.items():
            if (_as_json(config), budget) == (trial.config, trial.budget):
                return asked_as, dataclasses.replace(trial, config=config)
        calls = " or ".join(f"{config} at budget {budget}" for config, budget in asked.values())
        raise ValueError(
            f"{self.path}, line {index + 1}: asked for {calls}, but {trial.config} at budget "
            f"{trial.budget} is recorded: the seed or other settings have changed since; restore "
            "them, delete the file or name another journal"
        )

    def append(self, trial: Trial) -> None:
        entry = dataclasses.asdict(trial) | {"loss": trial.loss if trial.error is None else None}
        if len(read_lines(self.path)) != self._lines:
            raise RuntimeError(f"{self.path}: another search writes to this journal")
        append_line(self.path, json.dumps(entry, allow_nan=False).encode())
        self._lines += 1


# --- SMAC -----------------------------------------------------------------------------------------


def smac_search(
    space: ConfigurationSpace,
    evaluate: Evaluate,
    *,
    min_budget: float,
    max_budget: float,
    eta: float = 3,
    total: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    workers: int = 1,
    limit_seconds: float | None = None,
) -> list[Trial]:
    """Search with SMAC's MultiFidelityFacade: Hyperband whose configurations a forest suggests.

    Ends before the evaluation that would exceed `total` (sum of budgets) or the number of
    `trials`, and when SMAC finds nothing new in a small finite `space`. Returns all trials in order
    of completion; with one worker and no limit_seconds, the same ones for the same arguments.

    evaluate, workers, limit_seconds: as for `Evaluator`. folder: keeps the journal and, in the end,
    SMAC's own files; called again with the same arguments, a search that was killed goes on.
    Raises ValueError for arguments that make no search or are not those of the search in `folder`.
    """
    positive(min_budget, "min_budget")
    number(positive(max_budget, "max_budget"), "max_budget", min_budget, RANGE * min_budget)
    if positive(eta, "eta") <= 1 or math.log(max_budget / min_budget) > RUNGS * math.log(eta):
        raise ValueError(f"eta must be above 1 and make at most {RUNGS} rungs, got {eta!r}")
    if total is None and trials is None:
        raise ValueError("nothing would end this search: give total (sum of budgets) or trials")
    if total is not None:
        positive(total, "total")
    if trials is not None:
        whole(trials, "trials")
    whole(seed, "seed", 0, 2**32 - 1)
    if len(space) == 0:
        raise ValueError(f"the space has no hyperparameters: {shown(space)}")
    hyperband = {"min_budget": min_budget, "max_budget": max_budget, "eta": eta, "seed": seed}
    ends = {"total": total, "trials": trials, "workers": workers, "limit_seconds": limit_seconds}
    arguments = _plain(hyperband | ends)
    place = tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(folder)
    with place as home:
        home = _path(home)
        evaluator = Evaluator(
            evaluate,
            total=total or math.inf,
            journal=None if folder is None else home / "trials.jsonl",
            limit_seconds=limit_seconds,
            workers=workers,
        )
        if folder is not None:
            described = json.dumps(space.to_serialized_dict(), default=str).encode()
            digest = hashlib.sha256(described).hexdigest()[:12]
            _keep_arguments(home / "search.json", {"space": digest} | arguments)
        with evaluator:
            smac, at_once = _build_smac(space, home, arguments)
            _run_smac(smac, evaluator, at_once, trials or math.inf)
    return evaluator.trials


def _keep_arguments(path: Path, arguments: dict[str, Any]) -> None:
    known = json.loads(path.read_text("utf-8-sig")) if path.exists() else arguments
    changed = [f"{k} {known.get(k)}, not {v}" for k, v in arguments.items() if known.get(k) != v]
    if changed:
        raise ValueError(
            f"{path.parent} holds a search with {'; '.join(changed)}: call it with those "
            "arguments, delete the folder or name another"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(arguments), "utf-8")
    os.replace(draft, path)


def _build_smac(
    space: ConfigurationSpace, home: Path, arguments: dict[str, Any]
) -> tuple[MultiFidelityFacade, int]:
    """SMAC's facade, and how many evaluations it may be asked for before it is told a result."""
    from smac import MultiFidelityFacade, Scenario
    from smac.intensifier.hyperband_utils import get_n_trials_for_hyperband_multifidelity
    from smac.main.config_selector import ConfigSelector

    # SMAC takes the floor of a logarithm, which falls short of the integer for 1 to 243.
    budgets = {"min_budget": arguments["min_budget"] * (1 - 1e-9)}
    budgets["max_budget"] = arguments["max_budget"]
    planned, eta = arguments["trials"] or sys.maxsize, arguments["eta"]
    if arguments["total"]:
        affordable = get_n_trials_for_hyperband_multifidelity(
            arguments["total"], **budgets, eta=eta, print_summary=False
        )
        planned = max(1, min(planned, affordable))
    space = copy.deepcopy(space)  # SMAC seeds it
    space.seed(arguments["seed"])
    sample = space.sample_configuration(10 * (len(space) + 1) + arguments["workers"])
    distinct = len(set(sample))
    # SMAC would look for ever for configurations that a small space does not have: to fit its first
    # model, or because all that there are run at the moment.
    enough = min(len(space) + 1, distinct)
    at_once = min(arguments["workers"], distinct - enough + 1)
    scenario = Scenario(
        space,
        name="smac",
        output_directory=home,
        deterministic=True,
        n_trials=planned,
        seed=arguments["seed"],
        **budgets,
    )
    # SMAC takes the starts of its local search from a set, whose order changes with each process.
    maximizer = MultiFidelityFacade.get_acquisition_maximizer(scenario)
    local_search = maximizer._local_search
    unordered = local_search._get_init_points_from_previous_configs
    local_search._get_init_points_from_previous_configs = lambda *arguments: sorted(
        unordered(*arguments), key=repr
    )
    with _calm():
        smac = MultiFidelityFacade(
            scenario,
            acquisition_maximizer=maximizer,
            intensifier=MultiFidelityFacade.get_intensifier(scenario, eta=eta),
            config_selector=ConfigSelector(scenario, min_trials=enough),
            logging_level=False,
            overwrite=True,  # a search goes on from its journal, and SMAC must not ask
        )
    return smac, at_once


def _run_smac(smac: MultiFidelityFacade, evaluator: Evaluator, at_once: int, trials: float) -> None:
    from smac.main.exceptions import ConfigurationSpaceExhaustedException
    from smac.runhistory import StatusType, TrialValue

    asked, finished, told = {}, [], []
    more = True
    while True:
        while more and len(asked) < min(at_once, trials - len(finished)):
            try:
                with _calm():
                    info = smac.ask()
                asked[evaluator.start(info.config, info.budget)] = info
            except (StopIteration, ConfigurationSpaceExhaustedException, OutOfBudget):
                more = False
        if not asked:
            break
        # What was asked and told depends only on the order in which evaluations end. The journal
        # keeps that order, so that several workers resume as exactly as one.
        number, _ = evaluator.finish()
        finished.append(asked.pop(number))
        costs = _costs(evaluator.trials)
        for info, trial, cost, before in zip(finished, evaluator.trials, costs, [*told, None]):
            if cost != before:
                status = StatusType.CRASHED if trial.error else StatusType.SUCCESS
                with _calm():
                    smac.tell(info, TrialValue(cost, trial.seconds, status=status), save=False)
        told = costs
    with _calm():
        smac.optimizer.save()


def _costs(trials: list[Trial]) -> list[float]:
    """What SMAC is told: finite, in the order of the losses, and failures beyond the worst.

    Losses above 1 are divided by the best: SMAC's logarithm breaks at equal costs above 1e6.
    """
    losses = [trial.loss for trial in trials if trial.error is None] or [0.0]
    lowest, highest = min(losses), max(losses)
    scale = max(1.0, abs(lowest))
    failure = highest + (highest - lowest or scale)
    return [min(min(trial.loss, failure) / scale, LARGEST) for trial in trials]


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """SMAC in one thread, which halves its time, and without its remarks on small spaces."""
    from joblib import parallel_config

    logger = logging.getLogger("smac")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), parallel_config(backend="sequential"):
            yield
    finally:
        logger.setLevel(level)
