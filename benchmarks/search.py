"""Milliseconds per trial of searches whose objective costs nothing: what a suggestion costs.

Five hyperparameters (two floats, two integers, a choice), budgets 1 to 27 with eta 3, one process:
the book's `bohb`, SMAC's multi-fidelity facade as it comes and through `smac_search`, HpBandSter's
BOHB, Optuna's TPE with its Hyperband pruner, and as the floor random configurations of ConfigSpace.
`bohb` searches the 17 hyperparameters of the joint space as well. The methods take turns, round
after round, so that a drifting machine drifts for all; an untimed round goes ahead.

A trial is one evaluation at one budget; in Optuna it is a configuration that climbs the rungs until
it is pruned. A whole search is timed, set-up included, and divided by its trials. `bohb` gets the
budget of the whole rounds of brackets, HpBandSter the number of brackets, that come nearest to
--trials; the others stop there. HpBandSter's name server and worker are started before the clock.

HpBandSter is left out where it is not installed: it needs a C compiler and is not in the lock.
    python -m pip install hpbandster

Usage: python benchmarks/search.py [--rounds 5] [--trials 200] [--record]
--record appends the row to results/benchmarks/search.jsonl, from which the book's speed page is
made.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import optuna
from ConfigSpace import Categorical, ConfigurationSpace, Float, Integer
from ConfigSpace.hyperparameters import (
    CategoricalHyperparameter,
    Hyperparameter,
    UniformIntegerHyperparameter,
)
from smac import MultiFidelityFacade, Scenario

from jahs_utils.chapters import book_root, code_version, load_chapter
from jahs_utils.device import use_device
from jahs_utils.experiments import Results, describe_row
from jahs_utils.scoreboard import markdown
from jahs_utils.search import smac_search

CHAPTER = load_chapter("01_hyperband_bohb")
ROWS = Path("results", "benchmarks", "search.jsonl")
LIBRARIES = ("ConfigSpace", "smac", "hpbandster", "optuna")
MIN_BUDGET, MAX_BUDGET, ETA = 1, 27, 3
RUNGS = (1, 3, 9, 27)
BRACKETS, THEIR_TRIALS = 4, 40 + 13 + 8 + 4  # HpBandSter's: from four rungs down to one


@dataclasses.dataclass
class Run:
    """One search, seen from its objective: trials, distinct configurations, seconds."""

    wanted: int
    seed: int
    trials: int = 0
    configurations: set[tuple] = dataclasses.field(default_factory=set)
    seconds: float = 0.0

    def count(self, config: Mapping[str, float]) -> None:
        self.trials += 1
        self.configurations.add(tuple(sorted(config.items())))

    def evaluate(self, config: Mapping[str, float], budget: float) -> float:
        self.count(config)
        return loss(config, budget)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - start


def loss(config: Mapping[str, float], budget: float) -> float:
    """A smooth function of any non-negative numbers that falls with the budget."""
    distances = [(math.log10(1e-6 + value) + 1) ** 2 for value in config.values()]
    return float(sum(distances) / len(distances) + 1 / budget)


def five_hyperparameters() -> ConfigurationSpace:
    space = ConfigurationSpace()
    space.add(Float("learning_rate", (1e-4, 1.0), log=True), Float("momentum", (0.0, 0.99)))
    space.add(Integer("width", (8, 256), log=True), Integer("depth", (1, 5)))
    space.add(Categorical("kernel", [3, 5, 7]))
    return space


# --- the contestants ------------------------------------------------------------------------------


def book_bohb(space: ConfigurationSpace, run: Run) -> None:
    brackets = CHAPTER.hyperband_brackets(MAX_BUDGET, eta=ETA, min_budget=MIN_BUDGET)
    rungs = list(itertools.chain(*brackets))
    rounds = max(1, round(run.wanted / sum(n for n, _ in rungs)))
    total = rounds * sum(n * budget for n, budget in rungs)
    budgets = {"min_budget": MIN_BUDGET, "eta": ETA, "total": total}
    with run.timed():
        CHAPTER.bohb(space, run.evaluate, MAX_BUDGET, seed=run.seed, **budgets)


def smac_facade(space: ConfigurationSpace, run: Run) -> None:
    def target(config: Mapping[str, float], seed: int = 0, budget: float = 0.0) -> float:
        return run.evaluate(dict(config), budget)

    budgets = {"min_budget": MIN_BUDGET, "max_budget": MAX_BUDGET}
    with tempfile.TemporaryDirectory() as folder, run.timed():
        limits = {"n_trials": run.wanted, "seed": run.seed, "deterministic": True}
        scenario = Scenario(space, output_directory=Path(folder), **limits, **budgets)
        intensifier = MultiFidelityFacade.get_intensifier(scenario, eta=ETA)
        options = {"intensifier": intensifier, "logging_level": False, "overwrite": True}
        MultiFidelityFacade(scenario, target, **options).optimize()


def smac(space: ConfigurationSpace, run: Run) -> None:
    budgets = {"min_budget": MIN_BUDGET, "max_budget": MAX_BUDGET, "eta": ETA}
    with run.timed():
        smac_search(space, run.evaluate, trials=run.wanted, seed=run.seed, **budgets)


def hpbandster_bohb(space: ConfigurationSpace, run: Run) -> None:
    from hpbandster.core.nameserver import NameServer
    from hpbandster.core.worker import Worker
    from hpbandster.optimizers import BOHB

    class InThisProcess(Worker):
        def compute(self, *, config: dict, budget: float, **_: object) -> dict:
            return {"loss": run.evaluate(config, budget), "info": {}}

    def plain_config(budget: float) -> tuple[dict, dict]:
        config, info = suggested(budget)
        return {name: getattr(v, "item", lambda v=v: v)() for name, v in config.items()}, info

    brackets = max(1, round(run.wanted * BRACKETS / THEIR_TRIALS))
    np.random.seed(run.seed)  # noqa: NPY002 - it draws from the global generator
    space.seed(run.seed)
    names = {"run_id": "benchmark", "host": "127.0.0.1"}
    nameserver = NameServer(port=0, **names)
    names["nameserver"], names["nameserver_port"] = nameserver.start()
    InThisProcess(**names).run(background=True)
    optimizer = BOHB(space, ETA, MIN_BUDGET, MAX_BUDGET, **names)
    # It hangs without a word on NumPy's numbers, which its messages cannot carry.
    suggested = optimizer.config_generator.get_config
    optimizer.config_generator.get_config = plain_config
    optimizer.budgets = optimizer.budgets.tolist()
    try:
        optimizer.wait_for_workers()
        with run.timed():
            optimizer.run(brackets)
    finally:
        optimizer.shutdown(shutdown_workers=True)
        nameserver.shutdown()


def optuna_tpe(space: ConfigurationSpace, run: Run) -> None:
    def objective(trial: optuna.Trial) -> float:
        config = {parameter.name: suggest(trial, parameter) for parameter in space.values()}
        run.count(config)
        for budget in RUNGS:
            trial.report(loss(config, budget), budget)
            if trial.should_prune():
                raise optuna.TrialPruned
        return loss(config, MAX_BUDGET)

    with run.timed():
        sampler = optuna.samplers.TPESampler(multivariate=True, seed=run.seed)
        pruner = optuna.pruners.HyperbandPruner(MIN_BUDGET, MAX_BUDGET, ETA)
        optuna.create_study(sampler=sampler, pruner=pruner).optimize(objective, run.wanted)


def suggest(trial: optuna.Trial, parameter: Hyperparameter) -> float:
    """Optuna's suggestion for a hyperparameter of ConfigSpace."""
    if isinstance(parameter, CategoricalHyperparameter):
        return trial.suggest_categorical(parameter.name, parameter.choices)
    integer = isinstance(parameter, UniformIntegerHyperparameter)
    ask = trial.suggest_int if integer else trial.suggest_float
    return ask(parameter.name, parameter.lower, parameter.upper, log=parameter.log)


def random_search(space: ConfigurationSpace, run: Run) -> None:
    space.seed(run.seed)
    with run.timed():
        for _ in range(run.wanted):
            run.evaluate(dict(space.sample_configuration()), MAX_BUDGET)


# --- the comparison -------------------------------------------------------------------------------


def contestants() -> dict[str, Callable[[Run], None]]:
    """Name -> one search. The first is what the others are compared with."""

    def on_five(search: Callable[[ConfigurationSpace, Run], None]) -> Callable[[Run], None]:
        return lambda run: search(five_hyperparameters(), run)

    calls = {
        "`bohb`": on_five(book_bohb),
        "`bohb`, joint space of 17": lambda run: book_bohb(CHAPTER.joint_space(), run),
        "SMAC, multi-fidelity facade": on_five(smac_facade),
        "SMAC, `smac_search`": on_five(smac),
        "HpBandSter, BOHB": on_five(hpbandster_bohb),
        "Optuna, TPE and Hyperband": on_five(optuna_tpe),
        "ConfigSpace, random": on_five(random_search),
    }
    if importlib.util.find_spec("hpbandster") is None:
        print("HpBandSter is not installed and left out: python -m pip install hpbandster")
        del calls["HpBandSter, BOHB"]
    return calls


def benchmark(rounds: int, trials: int) -> list[list[str]]:
    """Rows of name, trials, configurations, milliseconds per trial, their range, ratio."""
    calls = contestants()
    runs: dict[str, list[Run]] = {name: [] for name in calls}
    for k in range(-1, rounds):  # the first round is not counted
        for name, call in calls.items():
            run = Run(trials, seed=max(k, 0))
            call(run)
            if k >= 0:
                runs[name].append(run)
                print(f"round {k + 1}/{rounds}  {name}: {milliseconds(run):.2f} ms", flush=True)
    reference = statistics.median(map(milliseconds, runs[next(iter(calls))]))
    table = []
    for name in calls:
        times = [milliseconds(run) for run in runs[name]]
        median = statistics.median(times)
        counts = [
            f"{statistics.mean(run.trials for run in runs[name]):.0f}",
            f"{statistics.mean(len(run.configurations) for run in runs[name]):.0f}",
        ]
        spread = f"{min(times):.2f} to {max(times):.2f}"
        table.append([name, *counts, f"{median:.2f}", spread, f"{median / reference:.3g}"])
    return table


def milliseconds(run: Run) -> float:
    return 1000 * run.seconds / run.trials


COLUMNS = [
    "one search",
    "trials",
    "configurations",
    "milliseconds per trial (median)",
    "lowest to highest",
    "times `bohb`",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("smac", "hpbandster"):
        logging.getLogger(name).setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    device = use_device("cpu")
    start = time.perf_counter()
    table = benchmark(arguments.rounds, arguments.trials)
    key = {"kind": device.type, "rounds": arguments.rounds, "trials": arguments.trials, "seed": 0}
    key |= {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"}
    metrics = {"columns": COLUMNS, "table": table, "versions": versions()}
    row = describe_row(key, metrics, time.perf_counter() - start, code_version(benchmark))
    print("\n" + markdown(table, COLUMNS))
    if arguments.record:
        Results(book_root() / ROWS).append(row)
        print(f"recorded in {ROWS}")


def versions() -> str:
    installed = (name for name in LIBRARIES if importlib.util.find_spec(name) is not None)
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)


if __name__ == "__main__":
    main()
