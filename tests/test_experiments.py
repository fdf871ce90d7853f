"""Recorded experiments: rows that survive anything."""

import dataclasses
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jahs_utils.experiments import (
    Experiment,
    Results,
    Row,
    compute_row,
    find_experiment,
    grid,
    key_id,
    read_results,
    recorded_costs,
    results_path,
)
from jahs_utils.record import run_experiment


def results(name: str, profile: str = "quick") -> Results:
    return Results(results_path("90_small", name, profile))


def keys(name: str) -> list[int]:
    return sorted(row.key["x"] for row in results(name).rows())


def lines(name: str) -> list[dict]:
    text = results(name).path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def marks(tmp_path, monkeypatch):
    """A folder with one file per key; its lines count how often the key was computed."""
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv("MARKS", str(folder))
    return folder


def times_computed(folder: Path) -> Counter:
    return Counter(
        {int(path.name): len(path.read_text(encoding="utf-8").split()) for path in folder.iterdir()}
    )


def start_run(name: str) -> subprocess.Popen:
    code = f"from jahs_utils.record import *; run_experiment('90_small/{name}', 'quick')"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: one number format for all
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


# --- grids ----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.lists(st.integers(), min_size=1, max_size=3), max_size=4
    )
)
def test_a_grid_is_the_product_of_its_axes(axes):
    expected = [tuple(combination) for combination in itertools.product(*axes.values())]
    assert [tuple(key.values()) for key in grid(**axes)] == expected


def test_what_is_not_a_sequence_is_fixed_in_a_grid():
    assert grid(lr=(0.1, 1.0), seed=range(2), data="digits") == [
        {"lr": lr, "seed": seed, "data": "digits"} for lr in (0.1, 1.0) for seed in (0, 1)
    ]


def test_a_sequence_in_a_list_is_one_value_and_reads_as_its_row_will():
    assert grid(channels=[(8, 8)]) == [{"channels": [8, 8]}]


def test_the_name_of_a_key_does_not_depend_on_the_order_of_its_entries():
    assert key_id({"a": 1, "b": [2]}) == key_id({"b": [2], "a": 1})


@pytest.mark.parametrize("other", [{"a": 2}, {"b": 1}, {"a": 1.5}, {"a": "1"}, {"a": 1, "b": 0}])
def test_different_keys_have_different_names(other):
    assert key_id({"a": 1}) != key_id(other)


WRONG_KEYS = {
    "a name that is no text": {1: 2},
    "a seed that is no whole number": {"seed": "zero"},
    "a seed that is a truth value": {"seed": True},
    "a data set that is no name": {"data": 3},
    "a value that JSON has not": {"x": {1, 2}},
    "a number that is none": {"x": float("nan")},
    "no dict": [1],
}


@pytest.mark.parametrize("wrong", WRONG_KEYS)
def test_a_key_that_cannot_stand_in_a_row_is_one_line(wrong):
    experiment = Experiment(print, {"quick": [{"x": 1}, WRONG_KEYS[wrong]]})
    with pytest.raises(ValueError, match=r"^(a )?key [^\n]*$"):
        experiment.keys("quick")


# --- rows -----------------------------------------------------------------------------------------


def test_a_row_holds_the_key_the_metrics_and_their_provenance(book):
    row = compute_row("90_small/train", {"data": "digits", "seed": 1})
    assert row.status == "ok"
    assert row.seed == 1
    assert (row.data.name, row.data.source) == ("digits", "scikit-learn's load_digits")
    assert len(row.data.checksum) == 16
    assert {"python", "torch", "numpy", "jahs-utils"} <= set(row.versions)
    assert row.wall_seconds > 0


def test_a_row_reads_back_as_it_was_written(book):
    row = compute_row("90_small/train", {"data": "digits", "seed": 1})
    results("train").append(row)
    assert results("train").rows() == [row]


def test_metrics_that_are_not_finite_become_null(book):
    run_experiment("90_small/not_finite", "quick")
    (line,) = lines("not_finite")
    assert line["metrics"] == {"inf": None, "nested": [1.0, None], "tensor": [0.5]}


def test_metrics_that_json_cannot_hold_make_a_failed_row(book):
    run_experiment("90_small/not_json", "quick")
    (line,) = lines("not_json")
    assert (line["status"], line["metrics"]) == ("failed", {})
    assert "not JSON serializable" in line["error"]


WRONG_LINES = {
    "not JSON": (lambda row: "{", "line: "),
    "blank": (lambda row: "", "line: "),
    "a list": (lambda row: "[]", "line: "),
    "a field of null": (lambda row: json.dumps(row | {"code": None}), "code: "),
    "a field missing": (lambda row: json.dumps({k: row[k] for k in row if k != "code"}), "code: "),
    "no date": (lambda row: json.dumps(row | {"finished": "yesterday"}), "finished: "),
    "other data": (lambda row: json.dumps(row | {"data": {"name": "digits"}}), "data: "),
    "text for seconds": (lambda row: json.dumps(row | {"wall_seconds": "1"}), "wall_seconds: "),
    "no text": (lambda row: "\udcff", "line: "),
    "a field too many": (lambda row: json.dumps(row | {"extra": 1}), "extra: "),
    "another status": (lambda row: json.dumps(row | {"status": "fine"}), "status: "),
    "a second good row": (lambda row: json.dumps(row), "a second row for {'x': 1}"),
}


@pytest.mark.parametrize("wrong", WRONG_LINES)
def test_a_line_that_is_not_a_row_is_named_by_file_and_number(wrong, book):
    run_experiment("90_small/square", "quick")
    damage, complaint = WRONG_LINES[wrong]
    path = results("square").path
    whole = path.read_text(encoding="utf-8").splitlines()
    whole.insert(2, damage(json.loads(whole[1])))
    path.write_text("\n".join(whole) + "\n", "utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        results("square").rows()
    assert f"{path}, line 3: {complaint}" in str(caught.value)


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0, 0.9999))
def test_a_torn_last_line_is_passed_over_and_cut_by_the_next_row(share, tmp_path_factory):
    kept, torn, new = (dataclasses.replace(row, key={"x": x}) for x, row in enumerate([ROW] * 3))
    file = Results(tmp_path_factory.mktemp("torn") / "rows.jsonl")
    file.append(kept)
    line = torn.line()
    with open(file.path, "ab") as stream:
        stream.write(line[: 1 + int(share * len(line))])
    assert file.rows() == [kept]
    file.append(new)
    assert file.rows() == [kept, new]
    assert file.path.read_bytes().count(b"\n") == 2


ROW_FIELDS = {
    "key": {"x": 0},
    "status": "ok",
    "metrics": {"square": 0, "ü": 0.1},
    "error": None,
    "seed": None,
    "data": None,
    "code": "0",
    "versions": {},
    "device": "cpu",
    "number_format": "float32",
    "wall_seconds": 0.5,
    "finished": "2026-01-01T00:00:00Z",
}
ROW = Row.read(json.dumps(ROW_FIELDS).encode())


def test_rows_of_before_predictions_read_as_they_are():
    assert (ROW.predicted_seconds, ROW.processes) == (None, None)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_rows_that_an_editor_has_saved_are_read_and_continued(start, end, tmp_path):
    file = Results(tmp_path / "rows.jsonl")
    file.path.write_bytes(start + ROW.line() + end)
    assert file.rows() == [ROW]
    other = dataclasses.replace(ROW, key={"x": 1})
    file.append(other)
    assert file.rows() == [ROW, other]


def test_an_error_with_bytes_that_are_no_text_can_be_recorded(tmp_path):
    file = Results(tmp_path / "rows.jsonl")
    file.append(dataclasses.replace(ROW, status="failed", error="no file '\udcff'"))
    assert file.rows()[0].error == "no file '\udcff'"


def test_a_good_row_is_written_once(tmp_path):
    file = Results(tmp_path / "rows.jsonl")
    assert file.append(ROW)
    assert not file.append(ROW)
    assert file.rows() == [ROW]


def test_a_failed_row_gives_way_to_a_good_one(tmp_path):
    file = Results(tmp_path / "rows.jsonl")
    file.append(dataclasses.replace(ROW, status="failed", error="it"))
    assert file.append(ROW)
    assert file.rows() == [ROW]


def test_a_claimed_key_cannot_be_claimed_again_until_it_is_released(tmp_path):
    file = Results(tmp_path / "rows.jsonl")
    with file.claim({"x": 1}) as first, Results(file.path).claim({"x": 1}) as second:
        assert (first, second) == (True, False)
    with file.claim({"x": 1}) as third:
        assert third


def test_claims_stand_beside_the_rows_where_other_machines_see_them(tmp_path, monkeypatch):
    file = Results(tmp_path / "rows.jsonl")
    with file.claim({"x": 1}):
        monkeypatch.setenv("JAHS_CACHE", str(tmp_path / "cache of another machine"))
        with Results(file.path).claim({"x": 1}) as mine:
            assert not mine
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_a_claim_ends_with_its_process(tmp_path):
    file = Results(tmp_path / "rows.jsonl")
    code = (
        "import os; from pathlib import Path; from jahs_utils.experiments import Results\n"
        f"with Results(Path({str(file.path)!r})).claim({{'x': 1}}) as mine:\n"
        "    os._exit(7 if mine else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7
    with file.claim({"x": 1}) as mine:
        assert mine


def test_a_claim_on_a_file_system_without_locks_ends_with_its_process_too(tmp_path, monkeypatch):
    def no_flock(descriptor):
        raise OSError(errno.ENOSYS, "no flock here")

    monkeypatch.setattr("filelock._unix.lock_fd_nonblocking", no_flock)
    file = Results(tmp_path / "rows.jsonl")
    warnings.filterwarnings("ignore", "flock not supported")
    with file.claim({"x": 1}) as first, Results(file.path).claim({"x": 1}) as second:
        assert (first, second) == (True, False)
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        (marker,) = (tmp_path / ".locks" / "rows").iterdir()
        ours = marker.read_text("utf-8")
        marker.write_text(ours.replace(str(os.getpid()), str(gone.pid), 1), "utf-8")
        with Results(file.path).claim({"x": 1}) as third:
            assert third


def test_a_key_that_was_recorded_meanwhile_cannot_be_claimed(tmp_path):
    file = Results(tmp_path / "rows.jsonl")
    file.append(ROW)
    with file.claim(ROW.key) as mine:
        assert not mine


# --- runs in this process -------------------------------------------------------------------------


def test_a_run_records_every_key_of_its_profile(book):
    summary = run_experiment("90_small/square", "standard")
    assert (summary.ok, summary.failed, summary.left, summary.reason) == (9, 0, 0, "complete")
    rows = results("square", "standard").rows()
    assert {row.key["x"]: row.metrics["square"] for row in rows} == {x: x * x for x in range(9)}


def test_a_second_run_computes_nothing(book, marks):
    run_experiment("90_small/square", "quick")
    summary = run_experiment("90_small/square", "quick")
    assert (summary.ok, summary.left, summary.reason) == (0, 0, "complete")
    assert times_computed(marks) == {x: 1 for x in range(4)}


def test_a_run_reports_one_line_for_each_row(book):
    reported = []
    run_experiment("90_small/failing", "quick", report=reported.append)
    assert len(reported) == 1 + 3
    assert all("\n" not in line for line in reported)


def test_a_failing_unit_is_a_failed_row_and_the_rest_goes_on(book):
    summary = run_experiment("90_small/failing", "quick")
    assert (summary.ok, summary.failed, summary.left) == (2, 1, 0)
    (failed,) = [row for row in results("failing").rows() if row.status == "failed"]
    assert (failed.key, failed.error) == ({"x": 1}, "RuntimeError: one is\nnot allowed")


def test_a_failed_row_is_not_retried_unasked(book):
    run_experiment("90_small/failing", "quick")
    summary = run_experiment("90_small/failing", "quick")
    assert (summary.ok, summary.failed, summary.left) == (0, 0, 0)


def test_a_failed_row_is_retried_on_request(book, marks):
    run_experiment("90_small/failing", "quick")
    summary = run_experiment("90_small/failing", "quick", retry_failed=True)
    assert (summary.ok, summary.failed, summary.left) == (0, 1, 0)
    assert summary.reason == "complete"
    assert times_computed(marks) == {0: 1, 2: 1}


def test_a_key_that_another_process_works_on_is_left_to_it(book):
    with results("square").claim({"x": 2}):
        summary = run_experiment("90_small/square", "quick")
    assert (summary.left, summary.reason) == (1, "other processes at work")
    assert keys("square") == [0, 1, 3]


def metrics_by_seed() -> dict[int, dict]:
    results("train").path.unlink(missing_ok=True)
    run_experiment("90_small/train", "quick")
    return {row.seed: row.metrics for row in results("train").rows()}


def test_two_runs_with_one_seed_give_identical_metrics(book):
    assert metrics_by_seed() == metrics_by_seed()


def test_two_seeds_give_different_metrics(book):
    metrics = metrics_by_seed()
    assert metrics[0] != metrics[1]


def test_a_time_limit_starts_nothing_that_would_not_be_finished(book):
    summary = run_experiment("90_small/sleeping", "quick", limit_seconds=1.0)
    assert 1 <= summary.ok <= 3  # of 0.3 s each: a fourth would end after 1.2 s
    assert (summary.left, summary.reason) == (20 - summary.ok, "time limit")


@pytest.mark.parametrize("workers", [1, 2])
def test_no_time_starts_nothing(workers, book, marks):
    summary = run_experiment("90_small/square", "quick", limit_seconds=0.0, workers=workers)
    assert (summary.ok, summary.left, summary.reason) == (0, 4, "time limit")
    assert not times_computed(marks)


@pytest.mark.parametrize(
    ("address", "profile", "message"),
    [
        ("90_smal/square", "quick", "unknown chapter '90_smal'"),
        ("90_small/squar", "quick", "unknown experiment of 90_small 'squar'"),
        ("90_small", "quick", "unknown experiment of 90_small ''"),
        ("90_small/square", "quik", "unknown profile 'quik'"),
        ("90_small/square", "paper", "unknown profile of this experiment 'paper'"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_choices(address, profile, message, book):
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*: choose one of [^\n]+$"):
        run_experiment(address, profile)


def test_an_experiment_is_found_by_its_address(book):
    chapter, name, experiment = find_experiment("90_small/square")
    assert (chapter, name, experiment.unit.__name__) == ("90_small", "square", "square")


# --- reading --------------------------------------------------------------------------------------


def test_results_read_as_one_line_for_each_good_row(book):
    run_experiment("90_small/failing", "quick")
    frame = read_results("90_small", "failing", "quick")
    assert list(frame.columns) == ["x", "square", "wall_seconds", "device"]
    assert list(zip(frame.x, frame.square)) == [(0, 0), (2, 4)]


def test_results_are_sorted_by_key_whatever_the_order_of_the_rows(book):
    run_experiment("90_small/square", "quick")
    before = read_results("90_small", "square", "quick")
    path = results("square").path
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(reversed(lines)), encoding="utf-8")
    pd.testing.assert_frame_equal(read_results("90_small", "square", "quick"), before)


def test_no_recorded_rows_are_one_line_with_the_command(book):
    command = "jahs experiment run 90_small/square --profile standard"
    with pytest.raises(ValueError, match=rf"^no recorded rows of [^\n]*: {command}$"):
        read_results("90_small", "square", "standard")


def test_failed_rows_alone_are_no_recorded_rows(book):
    run_experiment("90_small/not_json", "quick")
    with pytest.raises(ValueError, match=r"^no recorded rows of"):
        read_results("90_small", "not_json", "quick")


# --- several processes ----------------------------------------------------------------------------


def test_a_killed_run_resumes_with_no_row_lost_or_doubled(book, marks):
    run = start_run("slow_square")
    while not results("slow_square").path.exists() or len(keys("slow_square")) < 5:
        assert run.poll() is None, "the run ended too early"
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    recorded = results("slow_square").rows()
    assert 5 <= len(recorded) < 30
    run_experiment("90_small/slow_square", "quick")
    assert [line["key"]["x"] for line in lines("slow_square")] == list(range(30))
    assert results("slow_square").rows()[: len(recorded)] == recorded
    assert times_computed(marks).total() <= 31  # the row in flight at most is computed again


def test_two_runs_at_once_compute_each_key_exactly_once(book, marks):
    runs = [start_run("slow_square") for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert sorted(line["key"]["x"] for line in lines("slow_square")) == list(range(30))
    assert times_computed(marks) == {x: 1 for x in range(30)}


@pytest.fixture(scope="module")
def cluster_run(make_book, tmp_path_factory):
    """A run of `killing` on two workers, while this process holds the claim of one key."""
    root = tmp_path_factory.mktemp("cluster")
    book = make_book(root)
    log = root / "log"
    code = (
        "from jahs_utils.record import *\n"
        "if __name__ == '__main__':\n"
        "    s = run_experiment('90_small/killing', 'quick', workers=2)\n"
        "    print(s.ok, s.failed, s.left, s.reason)\n"
    )
    script = root / "run.py"
    script.write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAHS_BOOK", str(root))
        file = results("killing")
        with file.claim({"x": 4}), open(log, "w", encoding="utf-8") as stream:
            done = subprocess.run(
                [sys.executable, str(script)],
                stdout=subprocess.PIPE,
                stderr=stream,
                encoding="utf-8",
                env=dict(os.environ),
                timeout=240,
            )
        expected = {
            x: compute_row("90_small/killing", {"x": x}).metrics
            for x in range(6)
            if x not in (1, 4)
        }
        book.forget("90_small")
    return {
        "printed": done.stdout,
        "log": log.read_text(encoding="utf-8"),
        "rows": {row.key["x"]: row for row in file.rows()},
        "expected": expected,
    }


def test_workers_record_what_one_process_records(cluster_run):
    good = {x: row.metrics for x, row in cluster_run["rows"].items() if row.status == "ok"}
    assert good == cluster_run["expected"], cluster_run["log"]


def test_a_unit_that_kills_its_worker_is_a_failed_row(cluster_run):
    row = cluster_run["rows"][1]
    assert row.status == "failed"
    assert row.error.startswith("KilledWorker: ")


def test_workers_leave_a_key_to_the_process_that_works_on_it(cluster_run):
    assert 4 not in cluster_run["rows"]
    assert cluster_run["printed"] == "4 1 1 other processes at work\n", cluster_run["log"]


def test_a_cluster_does_not_log_its_comings_and_goings(cluster_run):
    log = cluster_run["log"]
    assert " - INFO - " not in log
    assert " - WARNING - " not in log


def test_the_checksum_of_rows_changes_with_a_metric_and_not_with_time_or_order(book):
    run_experiment("90_small/square", "quick")
    path = results_path("90_small", "square", "quick")
    checksum = recorded_costs("90_small")["checksum"][0]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def rewritten(rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return recorded_costs("90_small")["checksum"][0]

    assert rewritten([line | {"wall_seconds": 9.0} for line in reversed(lines)]) == checksum
    lines[0]["metrics"]["square"] += 1
    assert rewritten(lines) != checksum
