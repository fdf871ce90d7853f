"""Evaluations that are counted and survive anything, and the search by SMAC."""

import ctypes
import dataclasses
import inspect
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cloudpickle
import numpy as np
import psutil
import pytest
import torch
from ConfigSpace import (
    AndConjunction,
    Categorical,
    Configuration,
    ConfigurationSpace,
    Constant,
    EqualsCondition,
    Float,
    ForbiddenAndConjunction,
    ForbiddenEqualsClause,
    Integer,
    OrConjunction,
)

from jahs_utils.search import Evaluator, OutOfBudget, Trial, _costs, best, smac_search
from jahs_utils.workers import environment

# Functions of this file reach processes as those of notebooks do, and without importing it there.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def quadratic(config, budget):
    return (config["x"] - 0.3) ** 2 + 1 / budget


def counting(calls):
    """`quadratic`, and a list of the configurations and budgets it was called with."""

    def evaluate(config, budget):
        calls.append((config, budget))
        return quadratic(config, budget)

    return evaluate


def gone(pid: int, patience: float = 30) -> bool:
    """True as soon as the process has ended, False when it has not after `patience` seconds."""
    end = time.monotonic() + patience
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def run_script(path: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    path.write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, path],
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


# --- evaluations ----------------------------------------------------------------------------------


def test_an_evaluation_is_a_trial():
    trial = Evaluator(quadratic)({"x": 0.3}, 4)
    assert (trial.config, trial.budget, trial.loss, trial.error) == ({"x": 0.3}, 4, 0.25, None)
    assert 0 <= trial.seconds < 1


def test_trials_and_their_budgets_add_up():
    evaluator = Evaluator(quadratic)
    trials = [evaluator({"x": x}, budget) for x, budget in [(0.0, 1), (0.5, 2.5), (1.0, 4)]]
    assert evaluator.trials == trials
    assert evaluator.spent == 7.5


def test_configurations_arrive_as_plain_python_values():
    space = mixed_space()
    space.seed(0)
    seen = []
    evaluator = Evaluator(lambda config, budget: seen.append(config) or 0.0)
    for configuration in space.sample_configuration(20):
        evaluator(configuration, 1)
    evaluator({"a": np.float32(0.5), "b": [np.int64(3)], "c": {"d": np.str_("e")}}, 1)
    types = {type(value) for config in seen[:-1] for value in config.values()}
    assert types == {int, float, str, bool, tuple}
    assert repr(seen[-1]) == "{'a': 0.5, 'b': [3], 'c': {'d': 'e'}}"


@pytest.mark.parametrize(
    ("budget", "plain"),
    [
        (np.float64(9.0), 9),
        (np.int64(3), 3),
        (243 * 3.0**-5, 1),
        (12_345_678_901, 12_345_678_901),
        (10 / 9, 1.111111111),
        (30 * 3.0**-3, 1.111111111),
    ],
)
def test_budgets_are_whole_or_rounded_to_ten_digits(budget, plain):
    trial = Evaluator(quadratic)({"x": 0}, budget)
    assert trial.budget == plain
    assert type(trial.budget) is type(plain)


def test_what_an_evaluation_does_to_its_configuration_stays_with_it():
    trial = Evaluator(lambda config, budget: config["sizes"].pop())({"sizes": [1, 2]}, 1)
    assert trial.config == {"sizes": [1, 2]}


def test_an_exception_is_a_failed_trial_with_one_line():
    def failing(config, budget):
        raise RuntimeError("out of\n  memory")

    trial = Evaluator(failing)({}, 1)
    assert trial.loss == math.inf
    assert trial.error == "RuntimeError: out of memory"


@pytest.mark.parametrize("loss", [math.nan, -math.inf, None, "0.5", 1j, [0.5], np.zeros(2)])
def test_what_is_not_a_finite_number_is_a_failed_trial(loss):
    trial = Evaluator(lambda config, budget: loss)({}, 1)
    assert trial.loss == math.inf
    assert trial.error.startswith("ValueError: ")


@pytest.mark.parametrize("loss", [np.float32(0.5), np.array(0.5), torch.tensor([0.5])])
def test_a_number_of_any_library_is_a_loss(loss):
    assert repr(Evaluator(lambda config, budget: loss)({}, 1).loss) == "0.5"


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("limit_seconds", [None, 30])
def test_interrupts_pass_through_and_the_search_can_go_on(exception, limit_seconds):
    def interrupted(config, budget):
        if config["x"] == 1:
            raise exception
        return 0.0

    with Evaluator(interrupted, limit_seconds=limit_seconds) as evaluator:
        with pytest.raises(exception):
            evaluator({"x": 1}, 1)
        assert (evaluator.trials, evaluator.spent) == ([], 0)
        assert evaluator({"x": 2}, 1).error is None


def test_no_evaluation_exceeds_the_total():
    evaluator = Evaluator(quadratic, total=5)
    evaluator({"x": 0}, 3)
    with pytest.raises(OutOfBudget, match="budget 3 after 3 exceeds the total of 5"):
        evaluator({"x": 0}, 3)
    evaluator({"x": 0}, 2)
    assert evaluator.spent == 5


def test_failed_evaluations_count_towards_the_total():
    evaluator = Evaluator(lambda config, budget: math.nan, total=2)
    evaluator({}, 2)
    with pytest.raises(OutOfBudget):
        evaluator({}, 1)


def test_rounded_budgets_add_up_to_the_total():
    evaluator = Evaluator(quadratic, total=10)
    for _ in range(9):
        evaluator({"x": 0}, 10 / 9)
    assert len(evaluator.trials) == 9


def test_a_function_or_an_evaluator_can_be_given():
    evaluator = Evaluator(quadratic)
    assert Evaluator.of(evaluator) is evaluator
    assert Evaluator.of(quadratic)({"x": 0.3}, 1).loss == 1


@pytest.mark.parametrize(("own", "given", "total"), [(5, 3, 3), (3, 5, 3), (math.inf, 3, 3)])
def test_the_smaller_of_two_totals_holds(own, given, total):
    assert Evaluator.of(Evaluator(quadratic, total=own), total=given).total == total


@pytest.mark.parametrize("evaluate", [Evaluator(quadratic), 3])
def test_only_a_function_can_be_evaluated(evaluate):
    with pytest.raises(TypeError, match="must be a function"):
        Evaluator(evaluate)


@pytest.mark.parametrize("option", [{"total": 0}, {"limit_seconds": 0}, {"workers": 0}])
def test_options_out_of_range_are_named(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be .*got 0"):
        Evaluator(quadratic, **option)


def test_nothing_finishes_that_was_not_started():
    with pytest.raises(ValueError, match="call start first"):
        Evaluator(quadratic).finish()


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf, "3"])
def test_a_budget_out_of_range_is_named(budget):
    with pytest.raises(ValueError, match=f"budget must be .* got {budget!r}"):
        Evaluator(quadratic)({"x": 0}, budget)


# --- the best trial -------------------------------------------------------------------------------


def test_the_best_trial_is_of_the_largest_budget_at_which_one_succeeded():
    evaluator = Evaluator(lambda config, budget: config["x"] if budget < 9 else math.nan)
    for x, budget in [(0.1, 1), (0.7, 3), (0.5, 3), (0.0, 9)]:
        evaluator({"x": x}, budget)
    assert best(evaluator.trials).config == {"x": 0.5}


def test_no_best_trial_among_failures_or_none():
    with pytest.raises(ValueError, match="there are none"):
        best([])
    with pytest.raises(ValueError, match="the first of 1: KeyError: 'x'"):
        best([Evaluator(quadratic)({}, 1)])


# --- journals -------------------------------------------------------------------------------------

CALLS = [({"x": 0.5, "shape": (1, 2)}, 1), ({"x": 1 / 3}, 10 / 9), ({"y": 0}, 3), ({"x": 2}, 3)]


@pytest.fixture
def journal(tmp_path) -> Path:
    return tmp_path / "new" / "journal.jsonl"


def test_a_journal_answers_the_same_calls_without_an_evaluation(journal):
    first, again, calls = Evaluator(quadratic, journal=journal), [], []
    for call in CALLS[:3]:
        first(*call)
    second = Evaluator(counting(calls), journal=journal)
    again = [second(*call) for call in CALLS]
    assert again[:3] == first.trials
    assert calls == CALLS[3:]
    assert second.spent == first.spent + 3
    assert len(journal.read_text(encoding="utf-8").splitlines()) == 4


def test_failures_are_null_in_a_journal_of_valid_json(journal):
    Evaluator(lambda config, budget: math.nan, journal=journal)({"x": 1}, 2)

    def no_constant(name):
        raise AssertionError(name)

    (line,) = journal.read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=no_constant)["loss"] is None


@pytest.mark.parametrize("cut", [1, 20])
def test_a_torn_last_line_is_evaluated_again(cut, journal):
    first, calls = Evaluator(quadratic, journal=journal), []
    for call in CALLS[:3]:
        first(*call)
    journal.write_bytes(journal.read_bytes()[:-cut])
    second = Evaluator(counting(calls), journal=journal)
    for call in CALLS:
        second(*call)
    assert calls == CALLS[2:]
    assert [json.loads(line)["config"].get("x") for line in journal.open(encoding="utf-8")] == [
        0.5,
        1 / 3,
        None,
        2,
    ]


@pytest.mark.parametrize("call", [({"x": 0.25}, 1), ({"x": 0.5}, 2)])
def test_another_call_than_the_recorded_one_is_refused(call, journal):
    Evaluator(quadratic, journal=journal)({"x": 0.5}, 1)
    config, budget = call
    with pytest.raises(ValueError, match="delete the file") as error:
        Evaluator(quadratic, journal=journal)(config, budget)
    asked, recorded = f"asked for {config} at budget {budget}", "{'x': 0.5} at budget 1 is recorded"
    assert str(error.value).startswith(f"{journal}, line 1: {asked}, but {recorded}")


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', "null"])
def test_a_line_that_is_not_a_trial_is_named(line, journal):
    Evaluator(quadratic, journal=journal)({"x": 0.5}, 1)
    with open(journal, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="line 2: not a trial"):
        Evaluator(quadratic, journal=journal)


def test_two_searches_cannot_write_to_one_journal(journal):
    first, second = (Evaluator(quadratic, journal=journal) for _ in range(2))
    first({"x": 0}, 1)
    with pytest.raises(RuntimeError, match="another search writes"):
        second({"x": 0}, 1)


def test_what_a_journal_cannot_hold_is_not_evaluated(journal):
    calls = []
    with pytest.raises(TypeError, match="not JSON serializable"):
        Evaluator(counting(calls), journal=journal)({"x": quadratic}, 1)
    assert calls == []


# --- processes ------------------------------------------------------------------------------------


def ends_as_told(config, budget):
    """The id of the process that evaluates, if it survives."""
    match config["end"]:
        case "sleep":
            time.sleep(60)
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
    return os.getpid()


@pytest.fixture(scope="module")
def limited():
    with Evaluator(ends_as_told, limit_seconds=1) as evaluator:
        yield evaluator


def test_evaluations_with_a_limit_share_one_process_of_their_own(limited):
    first, second = (limited({"end": "well"}, 1) for _ in range(2))
    assert first.loss == second.loss != os.getpid()


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("sleep", "took longer than 1 s"),
        ("exit", "its process died: EXIT(3)"),
        ("kill", "its process died: SIGKILL(-9)"),
        ("segfault", "its process died: SIGSEGV(-11)"),
    ],
)
def test_the_end_of_a_process_is_a_failed_trial_and_the_next_gets_another(limited, end, error):
    before = int(limited({"end": "well"}, 1).loss)
    trial = limited({"end": end}, 1)
    assert (trial.loss, trial.error) == (math.inf, error)
    assert trial.seconds < 5
    assert gone(before)
    assert limited({"end": "well"}, 1).loss != before


def test_a_process_that_died_while_idle_costs_no_trial(limited):
    before = int(limited({"end": "well"}, 1).loss)
    os.kill(before, signal.SIGKILL)
    assert limited({"end": "well"}, 1).error is None


def test_nothing_runs_after_an_evaluator_is_closed():
    with Evaluator(ends_as_told, limit_seconds=30) as evaluator:
        pid = int(evaluator({"end": "well"}, 1).loss)
        assert psutil.pid_exists(pid)
    assert gone(pid)


def test_a_function_that_cannot_be_sent_to_a_process_is_an_error():
    lock = __import__("threading").Lock()
    with (
        Evaluator(lambda config, budget: lock.locked(), limit_seconds=1) as evaluator,
        pytest.raises(TypeError, match="cannot pickle"),
    ):
        evaluator({}, 1)


IN_MAIN = """
import sys
from jahs_utils.search import Evaluator

offset = 0.5

def evaluate(config, budget):
    if config["x"] == 2:
        import os, time
        print(os.getpid(), flush=True)
        time.sleep(60)
    return config["x"] + offset

class Slow:
    def __reduce__(self):  # takes seconds to arrive in another process
        return arrive, ()

def arrive():
    import os, time
    print(os.getpid(), flush=True)
    time.sleep(2)

if sys.argv[1:] == ["load"]:
    slow = Slow()
    Evaluator(lambda config, budget: slow, limit_seconds=60)({}, 1)
evaluator = Evaluator(evaluate, limit_seconds=60)
print(evaluator({"x": 1}, 1).loss, flush=True)
if sys.argv[1:]:
    evaluator({"x": 2}, 1)
"""


def test_a_script_may_define_the_function_and_leave_the_evaluator_open(tmp_path):
    result = run_script(tmp_path / "script.py", IN_MAIN)
    assert (result.stdout, result.stderr) == ("1.5\n", "")


@pytest.mark.parametrize(("when", "before"), [("load", ""), ("evaluate", "1.5\n")])
def test_a_killed_search_takes_its_processes_with_it(when, before, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(IN_MAIN, encoding="utf-8")
    search = subprocess.Popen(
        [sys.executable, script, when], stdout=subprocess.PIPE, encoding="utf-8"
    )
    with search:
        assert not before or search.stdout.readline() == before
        pid = int(search.stdout.readline())
        assert not gone(pid, 0)
        search.kill()
    assert gone(pid)


def test_workers_evaluate_at_the_same_time_and_finish_in_their_own_order(tmp_path, journal):
    def meeting(config, budget):
        """The second to start ends first, and the first only when a second has come."""
        me, other = config["me"], 1 - config["me"]
        (tmp_path / f"{me}-here").touch()
        end = time.monotonic() + 60
        while not (tmp_path / (f"{other}-here" if me else f"{other}-done")).exists():
            if time.monotonic() > end:
                raise TimeoutError("alone")
            time.sleep(0.01)
        (tmp_path / f"{me}-done").touch()
        time.sleep(0 if me else 0.3)
        return me

    losses = []
    for _ in range(2):  # the second time, the journal answers
        with Evaluator(meeting, workers=2, journal=journal, total=2) as evaluator:
            numbers = [evaluator.start({"me": me}, 1) for me in range(2)]
            with pytest.raises(OutOfBudget):
                evaluator.start({"me": 2}, 1)
            ended = [evaluator.finish() for _ in numbers]
        losses.append([trial.loss for _, trial in ended])
        assert [number for number, _ in ended] == numbers[::-1]
        for path in tmp_path.glob("*-*"):
            path.unlink()
    assert losses == [[1, 0], [1, 0]]


def test_workers_share_cores_and_gpus_and_show_no_progress(monkeypatch):
    def environment(config, budget):
        time.sleep(0.3)  # long enough for both workers to get one
        names = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "JAHS_PROGRESS"
        raise LookupError(" ".join(os.environ[name] for name in names))

    monkeypatch.setattr("joblib.cpu_count", lambda: 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with Evaluator(environment, workers=2) as evaluator:
        for _ in range(2):
            evaluator.start({}, 1)
        errors = {evaluator.finish()[1].error for _ in range(2)}
    assert errors == {"LookupError: 3 4 0", "LookupError: 3 7 0"}


@pytest.mark.parametrize(
    ("visible", "device", "given"),
    [
        ("4,7", "auto", ["4", "7", "4"]),
        ("GPU-ab,MIG-cd", "cuda", ["GPU-ab", "MIG-cd", "GPU-ab"]),
        (None, "auto", ["0", "1", "0"]),
        ("4,7", "cuda:1", [None] * 3),
        ("4,7", "cpu", [None] * 3),
    ],
)
def test_processes_take_turns_at_the_gpus_they_may_use(visible, device, given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("JAHS_DEVICE", device)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [environment(k, 3).get("CUDA_VISIBLE_DEVICES") for k in range(3)] == given


def test_interrupting_a_search_ends_all_its_workers(tmp_path):
    def interrupting(config, budget):
        (tmp_path / str(os.getpid())).touch()
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        if config["x"] == 0:
            raise KeyboardInterrupt
        time.sleep(60)

    with Evaluator(interrupting, workers=2) as evaluator:
        for x in range(2):
            evaluator.start({"x": x}, 1)
        with pytest.raises(KeyboardInterrupt):
            evaluator.finish()
        assert all(gone(int(path.name), 0) for path in tmp_path.iterdir())


# --- the search by SMAC ---------------------------------------------------------------------------


def line_space() -> ConfigurationSpace:
    return ConfigurationSpace({"x": (0.0, 1.0), "y": (1, 100)})


def mixed_space() -> ConfigurationSpace:
    space = ConfigurationSpace()
    kind, depth = Categorical("kind", ["conv", "dense"]), Integer("depth", (1, 9))
    rate = Float("rate", (1e-4, 1.0), log=True)
    space.add(
        kind,
        depth,
        rate,
        Categorical("size", ["small", "medium", "large"], ordered=True),
        Categorical("shape", [(1, 2), (3, 4)]),
        Categorical("flag", [True, False]),
        Constant("classes", 10),
    )
    space.add(EqualsCondition(depth, kind, "conv"), EqualsCondition(rate, kind, "dense"))
    return space


def mixed_loss(config, budget):
    return config.get("depth", 0) + config.get("rate", 0) + len(config["size"]) + 1 / budget


def search(evaluate=None, space=None, **options) -> "list[Trial]":
    options = {"min_budget": 1, "max_budget": 9, "trials": 12} | options
    return smac_search(space or line_space(), evaluate or quadratic, **options)


def asked(trials: "list[Trial]") -> list[tuple]:
    return [(trial.config, trial.budget, trial.loss) for trial in trials]


def test_smac_is_imported_only_by_its_search():
    code = "import sys, jahs_utils.search; print({*sys.modules} & {*sys.argv})"
    modules = ["smac", "ConfigSpace", "torch", "joblib", "numpy", "dask"]
    assert subprocess.check_output([sys.executable, "-c", code, *modules]) == b"set()\n"


def test_two_searches_with_one_seed_are_identical_and_leave_the_space_as_it_is():
    space = mixed_space()
    space.seed(5)
    twin = mixed_space()
    twin.seed(5)
    first, second = (search(mixed_loss, space, trials=16) for _ in range(2))
    assert asked(first) == asked(second)
    assert space.sample_configuration(3) == twin.sample_configuration(3)


def test_another_seed_is_another_search():
    assert asked(search(seed=1, trials=3)) != asked(search(seed=2, trials=3))


def test_conditional_categorical_and_ordinal_spaces_are_searched():
    space = mixed_space()
    trials = search(mixed_loss, space, trials=16)
    assert all(trial.error is None for trial in trials)
    for trial in trials:
        Configuration(space, trial.config).check_valid_configuration()


def test_the_forest_finds_its_way():
    def distance(trials):
        return np.mean([abs(trial.config["x"] - 0.3) for trial in trials])

    trials = search(trials=30)
    assert distance(trials[-7:]) < distance(trials[:7]) / 2


def test_a_search_ends_before_the_trial_that_exceeds_its_total():
    trials = search(trials=None, total=30)
    evaluator = Evaluator(quadratic, total=30)
    for trial in trials:
        evaluator(trial.config, trial.budget)
    assert 30 - 9 < evaluator.spent <= 30


def test_a_search_ends_with_whichever_comes_first():
    assert len(search(trials=4, total=1000)) == 4
    assert len(search(trials=1000, total=4, max_budget=1)) == 4


@pytest.mark.parametrize(
    ("eta", "low", "high", "budgets"),
    [
        (3, 4, 10, {10}),
        (2.5, 4, 10, {4, 10}),
        (3, 1, 10, {1.111111111, 3.333333333, 10}),
        (3, 5, 5, {5}),
    ],
)
def test_budgets_are_those_of_hyperband(eta, low, high, budgets):
    trials = search(min_budget=low, max_budget=high, eta=eta, trials=13)
    assert {trial.budget for trial in trials} == budgets


def test_the_lowest_budget_is_used_where_a_logarithm_falls_short():
    assert search(min_budget=1, max_budget=243, trials=1)[0].budget == 1


def test_no_trial_is_made_twice():
    trials = search(trials=20)
    assert len({(repr(trial.config), trial.budget) for trial in trials}) == 20


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda x: math.nan, id="all-fail"),
        pytest.param(lambda x: 1e9 if x < 0.5 else 2e9, id="equal-and-large"),
        pytest.param(lambda x: -1e9 if x < 0.5 else math.inf, id="negative-or-failed"),
        pytest.param(lambda x: 10 ** (60 * x - 30), id="far-apart"),
        pytest.param(lambda x: 1e308 if x < 0.5 else math.nan, id="largest-or-failed"),
        pytest.param(lambda x: x if x < 0.5 else 1e308, id="small-or-largest"),
        pytest.param(
            lambda x: -1e308 if x < 0.3 else 1e308 if x < 0.6 else math.nan, id="all-there-is"
        ),
    ],
)
def test_any_losses_fit_the_model(loss, recwarn):
    trials = search(lambda config, budget: loss(config["x"]), trials=16)
    assert len(trials) == 16
    assert not recwarn.list


def test_failed_trials_are_not_promoted():
    """The first to fail is told before a worse loss is known, and still counts as worse."""
    count = iter(range(100))

    def late(config, budget):
        number = next(count)
        return math.nan if number in (1, 2, 3) else 10.0 + number

    trials = search(late, trials=13)
    failed = [trial.config for trial in trials if trial.error]
    assert len(failed) == 3
    assert all(trial.budget == 1 for trial in trials if trial.config in failed)


@pytest.mark.parametrize("losses", [[1e308, None], [0.1, 1e308, None], [-1e308, 1e308, None]])
def test_costs_are_finite_and_keep_their_order(losses):
    trials = [Trial({}, 1, math.inf if x is None else x, 0.0, "died" * (x is None)) for x in losses]
    costs = _costs([dataclasses.replace(t, error=t.error or None) for t in trials])
    assert all(math.isfinite(cost) for cost in costs)
    assert costs == sorted(costs)


def test_costs_of_usual_losses_are_the_losses_with_failures_beyond_the_worst():
    trials = [Trial({}, 1, 0.25, 0.0), Trial({}, 1, 0.75, 0.0), Trial({}, 1, math.inf, 0.0, "died")]
    assert _costs(trials) == [0.25, 0.75, 1.25]


def test_conditions_joined_by_and_for_one_child_and_by_or_for_another_are_searched():
    a, b = Categorical("a", [0, 1, 2]), Categorical("b", [0, 1, 2])
    both, either = Float("both", (0.0, 1.0)), Float("either", (0.0, 1.0))
    space = ConfigurationSpace()
    space.add(a, b, both, either)
    space.add(
        AndConjunction(EqualsCondition(both, a, 1), EqualsCondition(both, b, 1)),
        OrConjunction(EqualsCondition(either, a, 1), EqualsCondition(either, b, 1)),
    )

    def loss(config, budget):
        return config["a"] + config.get("both", 1) + config.get("either", 1)

    trials = search(loss, space, trials=20)
    assert len(trials) == 20
    for trial in trials:
        Configuration(space, trial.config).check_valid_configuration()


def forbidden_space() -> ConfigurationSpace:
    space = ConfigurationSpace({"a": [0, 1], "b": [0, 1], "c": [0, 1]})
    space.add(
        *(
            ForbiddenAndConjunction(
                ForbiddenEqualsClause(space[one], 1), ForbiddenEqualsClause(space[other], value)
            )
            for one, other in [("a", "b"), ("a", "c"), ("b", "c")]
            for value in (0, 1)
        )
    )
    return space


@pytest.mark.parametrize(
    "space", [ConfigurationSpace({"a": 1.0}), ConfigurationSpace({"a": ["x", "y"]})]
)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_space_that_is_used_up_ends_the_search(space, workers):
    trials = search(lambda config, budget: 0.5, space, trials=30, workers=workers)
    assert 1 <= len(trials) <= 2 * 3


def test_a_space_with_fewer_configurations_than_dimensions_is_searched():
    assert search(lambda config, budget: config["c"], forbidden_space(), trials=30)


def test_a_search_prints_asks_and_leaves_nothing(tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", None)
    level = logging.getLogger("smac").level, logging.getLogger().level
    search(space=ConfigurationSpace({"x": (0, 12)}), trials=40)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert list(tmp_path.iterdir()) == []
    assert (logging.getLogger("smac").level, logging.getLogger().level) == level


def test_a_search_with_workers_makes_as_many_trials(tmp_path):
    def slow(config, budget):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.05)
        return quadratic(config, budget)

    trials = search(slow, trials=10, workers=2)
    assert len(trials) == 10
    assert all(trial.loss == quadratic(trial.config, trial.budget) for trial in trials)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_search_goes_on_when_an_evaluation_is_too_slow_or_dies():
    def fragile(config, budget):
        if config["x"] < 0.6:
            os._exit(1)
        if config["x"] > 0.9:
            time.sleep(60)
        return config["x"]

    errors = {trial.error for trial in search(fragile, trials=8, limit_seconds=1)}
    assert errors == {None, "its process died: EXIT(1)", "took longer than 1 s"}


def test_a_finished_search_in_a_folder_is_read_from_it(tmp_path):
    calls = []
    first = search(folder=tmp_path / "new")
    second = search(counting(calls), folder=tmp_path / "new")
    assert first == second
    assert calls == []
    assert (tmp_path / "new" / "smac" / "0" / "runhistory.json").exists()


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"max_budget": 27}, {"eta": 2}, {"trials": 3}, {"workers": 2}, {"total": 9}],
)
def test_a_folder_with_another_search_is_refused(other, tmp_path):
    search(folder=tmp_path, trials=2)
    (name,) = other
    with pytest.raises(ValueError, match=rf"holds a search with {name} \w+, not {other[name]}: "):
        search(folder=tmp_path, **{"trials": 2} | other)


def test_a_folder_with_a_search_of_another_space_is_refused(tmp_path):
    search(folder=tmp_path, trials=2)
    with pytest.raises(ValueError, match="holds a search with space"):
        search(folder=tmp_path, trials=2, space=ConfigurationSpace({"x": (0.0, 2.0)}))


KILLED = """
import time
from ConfigSpace import *
from jahs_utils.search import smac_search

{functions}

search(marking({marks!r}, 18), mixed_space(), trials=24, workers={workers}, folder={folder!r})
"""


def mark(config, budget):
    return repr((sorted(config.items()), budget)) + "\n"


def marking(marks, last=100):
    """`mixed_loss`, with a line in the file `marks` for each call; the `last` takes a minute."""

    def evaluate(config, budget):
        with open(marks, "a+", encoding="utf-8") as file:
            file.write(mark(config, budget))
            file.seek(0)
            if len(file.readlines()) >= last:
                time.sleep(60)
        return mixed_loss(config, budget)

    return evaluate


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_search_goes_on_and_evaluates_nothing_twice(workers, tmp_path):
    marks, folder = tmp_path / "marks", str(tmp_path / "search")
    sources = map(inspect.getsource, (mixed_space, mixed_loss, mark, marking, search))
    functions = "\n".join(sources)
    code = KILLED.format(functions=functions, marks=str(marks), workers=workers, folder=folder)
    journal = tmp_path / "search" / "trials.jsonl"
    with subprocess.Popen([sys.executable, "-c", code]) as killed:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 18 - workers:
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    recorded = journal.read_bytes().count(b"\n")
    trials = search(marking(marks), mixed_space(), trials=24, workers=workers, folder=folder)
    times = Counter(marks.read_text(encoding="utf-8").splitlines(keepends=True))
    marked = [mark(trial.config, trial.budget) for trial in trials]
    assert len(trials) == 24
    assert all(times[line] == 1 for line in marked[:recorded])
    assert set(times) == set(marked)
    if workers == 1:
        assert asked(trials) == asked(search(mixed_loss, mixed_space(), trials=24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_budget": 0}, "min_budget must be .* got 0"),
        ({"max_budget": -3}, "max_budget must be .* got -3"),
        ({"min_budget": 10}, "max_budget must be .* from 10 to 100000, got 9"),
        ({"eta": 1}, "eta must be .* got 1"),
        ({"eta": 1.0000001}, "eta must be .* at most 100 rungs, got 1.0000001"),
        ({"trials": None}, "give total .* or trials"),
        ({"trials": 0}, "trials must be .* got 0"),
        ({"total": 0}, "total must be .* got 0"),
        ({"workers": 0}, "workers must be .* got 0"),
        ({"seed": -1}, "seed must be .* got -1"),
        ({"limit_seconds": 0}, "limit_seconds must be .* got 0"),
    ],
)
def test_arguments_that_make_no_search_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        search(**options)


def test_a_space_without_hyperparameters_is_named():
    with pytest.raises(ValueError, match="no hyperparameters"):
        smac_search(ConfigurationSpace(), quadratic, min_budget=1, max_budget=9, trials=1)
