"""Rows of all chapters: what they will take, in which order, on what, and within which time."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import pytest_itemcollected
from test_train import needs_cuda as NEEDED

from jahs_utils import record as recording
from jahs_utils import workers as lanes_of
from jahs_utils.experiments import Results, Row, results_path
from jahs_utils.record import Run, forecast, record, run_experiment
from jahs_utils.workers import Cluster, Here, Processes

ROOT = Path(__file__).parents[1]
ROW = {
    "key": {"x": 0},
    "status": "ok",
    "metrics": {},
    "error": None,
    "seed": None,
    "data": None,
    "code": "0",
    "versions": {},
    "device": "here",
    "number_format": "float32",
    "wall_seconds": 1.0,
    "finished": "2026-01-01T00:00:00Z",
}


def row(seconds: float, device: str = "here", **key) -> Row:
    return Row.read(
        json.dumps(ROW | {"key": key, "wall_seconds": seconds, "device": device}).encode()
    )


def results(name: str, profile: str = "gpu") -> Results:
    return Results(results_path("90_small", name, profile))


def keys(name: str, profile: str = "gpu") -> list:
    return [next(iter(row.key.values())) for row in results(name, profile).rows()]


@pytest.fixture
def marks(tmp_path, monkeypatch):
    """A folder for what units leave behind."""
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv("MARKS", str(folder))
    return folder


@pytest.fixture
def quietly(monkeypatch):
    """`record` in this process, with a known speed, and what it reports."""
    monkeypatch.setattr(recording, "open_lanes", lambda workers, scheduler: Here())
    speed = dataclasses.replace(row(1.0, device=recording.hardware()), key={"device": "x"})
    speed = dataclasses.replace(
        speed,
        key={"device": recording.hardware()},
        metrics={"steps_per_second": 100.0, "room": 0},
    )
    monkeypatch.setattr(recording, "measure_speed", lambda: speed)
    reported = []

    def call(profile, *addresses, **options):
        summary = record(profile, addresses, report=reported.append, **options)
        return summary, "\n".join(reported)

    return call


# --- forecasts ------------------------------------------------------------------------------------


def predict(rows: list[Row], speeds: dict | None = None, processes: int = 1, **key):
    (estimate,) = forecast(rows, [key], "here", speeds or {}, processes)
    return estimate


def test_nothing_is_predicted_from_nothing():
    assert predict([], epochs=1) is None


def test_failed_rows_do_not_count(book):
    results("square").append(dataclasses.replace(row(1.0, x=0), status="failed"))
    work = recording.Work("90_small/square", "gpu")
    work.learn("here", {}, 1)
    assert [job.estimate for job in work.jobs] == [None] * 4


def test_a_row_like_a_recorded_one_takes_as_long():
    estimate = predict([row(7.0, epochs=3, seed=0)], epochs=3, seed=1)
    assert estimate.seconds == pytest.approx(7, rel=0.1)
    assert 4 < estimate.low < estimate.seconds < estimate.high < 12


def test_epochs_are_work_from_the_first_row_on():
    assert predict([row(7.0, epochs=3)], epochs=30).seconds == pytest.approx(70, rel=0.3)


def test_what_a_number_costs_is_learnt():
    rows = [row(0.5 * width**2, width=width, lr=lr) for width in (1, 2, 4) for lr in (0.1, 0.2)]
    assert predict(rows, width=8, lr=0.1).seconds == pytest.approx(32, rel=0.35)


def test_what_a_name_costs_is_learnt():
    rows = [
        row({"slow": 10.0, "fast": 1.0}[m], method=m, seed=s)
        for m in ("slow", "fast")
        for s in (0, 1)
    ]
    assert predict(rows, method="slow", seed=2).seconds == pytest.approx(10, rel=0.2)
    assert predict(rows, method="fast", seed=2).seconds == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("device", ["there", "Some processor, 2 threads"])
def test_rows_of_another_device_are_scaled_by_the_ratio_of_speeds(device):
    speeds = {"here": 200.0, "there": 10.0, "Another processor, 1 threads": 10.0}
    estimate = predict([row(60.0, device, epochs=3)], speeds, epochs=3)
    assert estimate.seconds == pytest.approx(3, rel=0.2)
    assert estimate.high > 3 * estimate.seconds  # no row of this device says how well that holds


def test_little_is_known_from_a_device_of_unknown_speed():
    estimate = predict([row(60.0, "there", epochs=3)], {"here": 200.0}, epochs=3)
    assert estimate.low < 1 < 60 < estimate.high


def test_a_row_of_this_device_outweighs_those_of_others():
    rows = [row(60.0, "there", epochs=e) for e in (1, 2, 3)] + [row(0.5, epochs=1)]
    assert predict(rows, {"here": 200.0, "there": 10.0}, epochs=1).seconds == pytest.approx(
        0.5, rel=0.2
    )


def test_rows_that_scatter_make_wide_intervals():
    calm = [row(10.0, seed=s) for s in range(8)]
    wild = [row(s, seed=k) for k, s in enumerate((2.0, 50.0, 4.0, 20.0, 3.0, 40.0, 5.0, 30.0))]
    widths = [e.high / e.low for e in (predict(calm, seed=9), predict(wild, seed=9))]
    assert widths[1] > 5 * widths[0]


# --- the order of worth, and what is left out -----------------------------------------------------


def worth(book, text: str) -> None:
    (book.root / "results").mkdir(exist_ok=True)
    (book.root / "results" / "worth.yml").write_text(text, encoding="utf-8")


def test_what_is_worth_most_comes_first_and_the_rest_as_chapters_have_it(book, quietly):
    worth(book, "gpu: [90_small/timed, 90_small/hungry]")
    _, reported = quietly("gpu", dry_run=True)
    listed = [line.split(":")[1].strip() for line in reported.splitlines() if "rows, " in line]
    assert listed == [f"90_small/{n}" for n in ("timed", "hungry", "square", "lasting", "killing")]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("gpu: [90_small/squar]", r"unknown experiment of 90_small in results/worth.yml 'squar'"),
        ("gpu: [90_smal/square]", r"unknown chapter in results/worth.yml '90_smal'"),
        ("gpu: 90_small/square", r"worth.yml: a list of CHAPTER/NAME is wanted"),
        ("gpu: [1]", r"worth.yml: a list of CHAPTER/NAME is wanted"),
        ("- gpu", r"worth.yml: a list of CHAPTER/NAME is wanted"),
        ("gpu: [", r"worth.yml: a list of CHAPTER/NAME is wanted"),
    ],
)
def test_a_wrong_list_of_worth_is_one_line(book, quietly, text, complaint):
    worth(book, text)
    with pytest.raises(ValueError, match=rf"^[^\n]*{complaint}[^\n]*$"):
        quietly("gpu")


def test_the_books_own_list_names_experiments_that_exist():
    listed = recording._worth("gpu")
    assert len(set(listed)) == len(listed) > 0
    recording._in_order("gpu", (), print)  # refuses names that do not exist


def test_an_experiment_without_the_profile_is_no_choice(book, quietly):
    with pytest.raises(ValueError, match=r"unknown experiment with profile 'gpu' '90_small/train'"):
        quietly("gpu", "90_small/train")


def test_a_chapter_that_cannot_be_imported_is_left_out_in_one_line(book, quietly):
    book.write("91_more", ["import no_such_library\nEXPERIMENTS = {}"])
    summary, reported = quietly("gpu", "90_small/square")
    assert summary.reason == "complete"
    assert "91_more is left out: No module named 'no_such_library'" in reported.splitlines()


def test_an_experiment_whose_data_are_not_there_is_left_out_in_one_line(book, quietly, monkeypatch):
    def nothing(name, device):
        raise ValueError(f"{name} is nowhere")

    monkeypatch.setattr(recording, "load", nothing)
    summary, reported = quietly("quick", "90_small/train", "90_small/square")
    told = "left out for want of digits: 90_small/train (digits is nowhere)"
    assert told in reported.splitlines()
    assert (summary.ok, summary.reason) == (4, "complete")


# --- runs -----------------------------------------------------------------------------------------


def test_a_dry_run_computes_nothing_and_tells_rows_minutes_and_device(book, quietly, marks):
    for x in (0, 1):
        results("square").append(dataclasses.replace(row(60.0, recording.hardware()), key={"x": x}))
    summary, reported = quietly("gpu", "90_small/square", dry_run=True)
    assert (summary.ok, summary.left, summary.reason) == (0, 3, "dry run")
    assert recording.hardware() in reported
    middle = float(reported.split("90_small/square: 3 rows, ")[1].split()[0])
    assert middle == pytest.approx(3, rel=0.2)
    assert list(marks.iterdir()) == []


def test_predicted_and_true_seconds_are_in_the_row(book, quietly):
    quietly("standard", "90_small/lasting")
    rows = results("lasting", "standard").rows()
    assert rows[0].predicted_seconds is None
    for found in rows[1:]:
        assert found.predicted_seconds == pytest.approx(found.wall_seconds, rel=0.6)
        assert found.processes == 1


def test_what_does_not_fit_is_left_and_what_does_is_computed(book, quietly):
    quietly("standard", "90_small/lasting")  # from which the others are predicted
    summary, reported = quietly("gpu", "90_small/lasting", limit_seconds=5)
    assert keys("lasting") == [30, 50]
    assert (summary.ok, summary.left, summary.reason) == (2, 2, "time limit")
    minutes = float(reported.split("left in all: 2 rows; ")[1].split()[0])
    assert minutes == pytest.approx(2.5, rel=0.5)


def test_an_unknown_row_is_not_started_late(book, monkeypatch):
    monkeypatch.setattr(recording, "UNKNOWN", 1.0)
    work = recording.Work("90_small/square", "gpu")
    work.learn("here", {}, 1)
    begun = time.monotonic() - 10
    monkeypatch.setattr(recording.time, "monotonic", itertools.count(begun, 0.001).__next__)
    run = Run(Here(), begun + 5, print)
    monkeypatch.setattr(recording.time, "monotonic", itertools.count(begun + 4.5, 0.001).__next__)
    assert len(run.compute(work.jobs)) == 5


def test_the_first_row_of_an_experiment_says_that_it_is_the_calibration(book, quietly):
    _, reported = quietly("gpu", "90_small/square", limit_seconds=60)
    told = "90_small/square: its first row will tell how long one takes"
    assert reported.splitlines().count(told) == 1


def test_the_speed_of_a_device_is_kept_beside_the_rows(book, quietly):
    quietly("gpu", "90_small/square")
    quietly("standard", "90_small/square")
    (speed,) = Results(book.root / "results" / "speeds.jsonl").rows()
    assert speed.key == {"device": recording.hardware()}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"limit_seconds": float("nan")}, "limit_seconds must be a finite number of at least 0"),
        ({"limit_seconds": -1.0}, "limit_seconds must be a finite number of at least 0"),
        ({"workers": 0}, "workers must be a whole number of at least 1"),
        ({"workers": 1.5}, "workers must be a whole number of at least 1"),
    ],
)
@pytest.mark.parametrize("function", [record, run_experiment])
def test_numbers_that_cannot_be_are_refused_in_one_line(book, function, options, complaint):
    address = ["90_small/square"] if function is record else "90_small/square"
    arguments = ("gpu", address) if function is record else (address, "gpu")
    with pytest.raises(ValueError, match=rf"^{complaint}[^\n]*$"):
        function(*arguments, **options)


# --- the number of processes on a GPU -------------------------------------------------------------


class Card(Processes):
    """Eight processes on a pretended GPU of which `steps` tells what so many do together."""

    def __init__(self, steps: dict[int, float], room: int) -> None:
        self.processes, self.steps, self.room = 8, steps, room

    def each(self, function, times=1):
        metrics = {"steps_per_second": self.steps[times] / times, "room": self.room}
        return [dataclasses.replace(row(1.0), key={"device": "card"}, metrics=metrics)] * times

    def keep(self, count):
        self.processes = count


@pytest.mark.parametrize(
    ("steps", "room", "kept"),
    [
        ({1: 100, 2: 200, 4: 390, 8: 700}, 20, 8),
        ({1: 100, 2: 180, 4: 300, 8: 310}, 20, 4),
        ({1: 100, 2: 105, 4: 300, 8: 900}, 20, 1),
        ({1: 100, 2: 200, 4: 390, 8: 700}, 3, 2),
        ({1: 100}, 1, 1),
    ],
)
def test_processes_share_a_gpu_up_to_the_knee_and_its_memory(book, steps, room, kept):
    card = Card(steps, room)
    recording._calibrate(card, True, print)
    assert card.processes == kept


def test_a_number_of_processes_that_was_asked_for_is_kept(book):
    card = Card({1: 100, 2: 100}, 20)
    recording._calibrate(card, False, print)
    assert card.processes == 8


@pytest.mark.parametrize(
    ("kind", "device", "count"),
    [("cuda", "auto", 16), ("cuda", "cuda:1", 8), ("cpu", "cpu", 40)],
)
def test_a_gpu_has_up_to_eight_processes_and_the_cpu_one_for_each_core(
    kind, device, count, monkeypatch
):
    monkeypatch.setattr(recording, "cores", lambda: 40)
    monkeypatch.setattr(recording, "pick_device", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("JAHS_DEVICE", device)
    assert recording.open_lanes(None, None).processes == count
    assert recording.open_lanes(3, None).processes == 3


def test_each_gpu_has_its_own_memory_for_processes(book, monkeypatch):
    monkeypatch.setattr(recording, "gpus", lambda: ["4", "7"])
    card = Card({1: 100, 2: 200, 4: 390}, 2)
    recording._calibrate(card, True, print)
    assert card.processes == 4


# --- processes ------------------------------------------------------------------------------------

JAHS = [sys.executable, "-m", "jahs_utils.cli"]


def environment(folder: Path, **more: str) -> dict[str, str]:
    paths = [str(folder), str(ROOT)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | more


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")


def within(seconds: float, condition) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


MISSING = """
import sys
from importlib.machinery import PathFinder

NAMES = set("smac ConfigSpace papermill jupyter_client nbclient nbformat IPython ipykernel "
            "dask distributed platformdirs tqdm lightning matplotlib".split())

class Bare:
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in NAMES else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


@pytest.fixture(scope="module")
def bare_run(make_book, tmp_path_factory):
    """The command on two processes of a machine that lacks most of what the book installs."""
    root = tmp_path_factory.mktemp("bare")
    book = make_book(root)
    book.write("91_smac", ["from smac import Scenario\nEXPERIMENTS = {}"])
    (root / "sitecustomize.py").write_text(MISSING, encoding="utf-8")
    (root / "marks").mkdir()
    done = subprocess.run(
        [*JAHS, "record", "--profile", "gpu", "--workers", "2"]
        + [f"90_small/{name}" for name in ("timed", "hungry", "killing", "square")],
        env=environment(root, JAHS_BOOK=str(root), MARKS=str(root / "marks")),
        cwd=root,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAHS_BOOK", str(root))
        rows = {n: results(n).rows() for n in ("timed", "hungry", "killing", "square")}
    return root, done, rows


def test_rows_are_recorded_on_a_bare_machine(bare_run):
    _, done, rows = bare_run
    assert [len(found) for found in rows.values()] == [3, 2, 4, 5], done.stdout
    assert "smac" not in rows["square"][0].versions
    assert rows["square"][0].versions["jahs-utils"]
    assert done.stdout.splitlines()[-1] == "13 rows, 1 failed, 0 left: complete"


def test_rows_need_no_pydantic(book, tmp_path):
    # Newer versions of typer do, so that the command cannot be tried without.
    hook = MISSING.replace('set("', 'set("typer pydantic yaml ')
    (tmp_path / "sitecustomize.py").write_text(hook, encoding="utf-8")
    code = "from jahs_utils.record import *; print(run_experiment('90_small/square', 'gpu'))"
    subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), check=True, timeout=100)
    assert keys("square") == [0, 1, 2, 3, 4]


def test_a_bare_machine_says_which_chapter_it_leaves_out(bare_run):
    assert "91_smac is left out: No module named 'smac'" in bare_run[1].stdout.splitlines()


def test_rows_that_measure_times_have_none_beside_them(bare_run):
    root, _, rows = bare_run
    texts = [path.read_text(encoding="utf-8") for path in (root / "marks").glob("timed-*")]
    spans = sorted(tuple(map(float, text.split())) for text in texts)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert {found.processes for found in rows["timed"]} == {1}


def test_memory_that_ran_out_beside_others_is_tried_again_alone(bare_run):
    assert [(r.status, r.processes) for r in bare_run[2]["hungry"]] == [("ok", 1)] * 2


def test_a_row_says_how_many_processes_shared_the_machine(bare_run):
    assert {found.processes for found in bare_run[2]["square"]} == {2}


def test_a_row_that_kills_its_process_is_a_failed_row_and_the_others_are_kept(bare_run):
    errors = {row.key["x"]: row.error for row in bare_run[2]["killing"]}
    assert errors.pop(1) == "KilledWorker: its process died 2 times"
    assert errors == {0: None, 2: None, 3: None}


def test_what_runs_at_the_deadline_is_ended_and_left(book):
    lanes = Processes(1)
    (pid,) = lanes.each(os.getpid)
    work = recording.Work("90_small/lasting", "gpu")
    work.learn(*lanes.each(recording.hardware), {}, 1)
    start = time.monotonic()
    run = Run(lanes, start + 1.5, print)
    late = run.compute(work.jobs[:1])
    assert time.monotonic() - start < 20
    assert [job.key for job in late] == [{"steps": 6000}]
    assert keys("lasting") == []
    assert within(20, lambda: not alive(pid))


def test_a_run_that_is_killed_takes_its_processes_along_and_goes_on(book, marks, tmp_path):
    command = [*JAHS, "experiment", "run", "90_small/slow_square", "--workers", "2"]
    first = subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.DEVNULL)
    file = results("slow_square", "quick")
    assert within(120, lambda: file.path.exists() and len(file.rows()) >= 3)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text(encoding="utf-8")
    first.send_signal(signal.SIGKILL)
    first.wait()
    recorded = file.rows()
    assert within(20, lambda: not any(map(alive, map(int, children.split()))))
    assert run_experiment("90_small/slow_square", "quick").reason == "complete"
    assert file.rows()[: len(recorded)] == recorded
    assert sorted(keys("slow_square", "quick")) == list(range(30))


# --- clusters -------------------------------------------------------------------------------------

SCHEDULER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def outer(make_book, tmp_path_factory):
    """A book, and a Dask cluster of two workers with the settings that Dask comes with."""
    root = tmp_path_factory.mktemp("outer")
    make_book(root)
    (root / "cluster.py").write_text(SCHEDULER, encoding="utf-8")
    own = environment(root, JAHS_BOOK=str(root))
    cluster = subprocess.Popen(
        [sys.executable, str(root / "cluster.py")],
        env=own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        start_new_session=True,
    )
    address = cluster.stdout.readline().strip()

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(cluster.pid, signal.SIGKILL)
        cluster.wait()

    def start(*arguments: str) -> subprocess.Popen:
        command = [*JAHS, *arguments, "--scheduler", address]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        # A client looks so long for a scheduler that went away.
        patience = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s"}
        return subprocess.Popen(command, env=own | patience, cwd=root, **pipes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAHS_BOOK", str(root))
        yield start, end
    end()


def test_a_row_that_kills_workers_of_any_cluster_fails_and_the_others_are_kept(outer):
    start, _ = outer
    run = start("experiment", "run", "90_small/killing", "--profile", "gpu")
    printed, errors = run.communicate(timeout=300)
    assert printed.splitlines()[-1] == "3 rows, 1 failed, 0 left: complete", errors
    found = {row.key["x"]: row.error for row in results("killing").rows()}
    assert found == {0: None, 1: "KilledWorker: its process died 4 times", 2: None, 3: None}


def test_a_scheduler_that_goes_away_is_one_line_and_what_was_computed_is_kept(outer):
    start, end = outer
    run = start("experiment", "run", "90_small/sleeping", "--profile", "quick")
    lines = iter(run.stdout.readline, "")
    assert next(line for line in lines if "2/20" in line)
    end()
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2
    assert len(errors.splitlines()) == 1, errors
    assert "the Dask scheduler tcp://127.0.0.1:" in errors
    assert len(keys("sleeping", "quick")) >= 2


def test_a_scheduler_that_is_not_there_is_one_line(book, monkeypatch):
    pytest.importorskip("distributed")  # has the settings that dask.config changes
    dask = pytest.importorskip("dask")
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(ConnectionError, match=r"^the Dask scheduler tcp://127.0.0.1:1 [^\n]*$"),
    ):
        run_experiment("90_small/square", "quick", scheduler="tcp://127.0.0.1:1")


def test_a_cluster_without_workers_is_given_up(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(lanes_of, "PATIENCE", 0.3)
    none = {"n_workers": 0, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**none) as cluster:
        lanes = Cluster(cluster.scheduler_address)
        with pytest.raises(ConnectionError, match=r"has had no worker for 0 s[^\n]*$"):
            within(10, lambda: lanes.slots() > 0)
        lanes.close()


# --- the script for a GPU -------------------------------------------------------------------------

CHECK = ROOT / "tools" / "gpu_check.sh"

TOY = """
from brought_along import value
from jahs_utils import Experiment, grid


def unit(*, x):
    return {"y": value}


EXPERIMENTS = {"toy": Experiment(unit, {"gpu": grid(x=range(2))})}
"""


def test_the_script_runs_what_it_is_asked_for_and_keeps_rows_and_a_table(book, tmp_path):
    (book.root / "chapters" / "90_small.ipynb").unlink()
    book.write("90_toy", [TOY])
    wheels, out = tmp_path / "wheels", tmp_path / "a folder"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "brought_along-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought_along.py", "value = 7")
    own = {"PYTHON": sys.executable, "OUT": str(out), "JAHS_BOOK": str(book.root)}
    done = subprocess.run(
        ["bash", CHECK, "--parts", "record", "--seconds", "200", "--wheels", wheels],
        env=os.environ | own,
        capture_output=True,
        encoding="utf-8",
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    name, status, _, *last = (out / "table.txt").read_text("utf-8").splitlines()[1].split()
    assert (name, status) == ("record", "0"), (out / "record.txt").read_text("utf-8")
    assert " ".join(last) == "2 rows, 0 failed, 0 left: complete"
    with tarfile.open(out / "results.tar.gz") as rows:
        names = set(rows.getnames())
    assert names == {"results/90_toy/toy-gpu.jsonl", "results/speeds.jsonl"}


@pytest.mark.parametrize("arguments", [["--second", "1"], ["--seconds", "x"], ["--seconds"]])
def test_the_script_refuses_what_it_does_not_know_in_one_line(arguments):
    done = subprocess.run(["bash", CHECK, *arguments], capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check.sh: ")
    assert len(done.stderr.splitlines()) == 1


def test_tests_that_need_cuda_are_found_by_that_name():
    item = types.SimpleNamespace(extra_keyword_matches=set(), iter_markers=lambda _: [NEEDED.mark])
    pytest_itemcollected(item)
    assert item.extra_keyword_matches == {"cuda"}
