"""The machine: devices, number formats, and the checks of arguments."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jahs_utils import device as device_module
from jahs_utils.checks import named_folder, one_of, positive, whole, writable_folder
from jahs_utils.device import (
    NumberFormat,
    cache_folder,
    describe_device,
    fastest_format,
    measure_formats,
    pick_device,
    seconds_per_call,
)

CPU = torch.device("cpu")


def one_call(call, device):
    """Seconds of a single call: the choice between formats is not what these tests look at."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(device_module, "seconds_per_call", one_call)
    monkeypatch.setenv("JAHS_CACHE", str(tmp_path))
    device_module._measure_and_keep.cache_clear()
    yield tmp_path
    device_module._measure_and_keep.cache_clear()


@pytest.fixture(scope="module")
def cached_format():
    """The session's choice: measured here if no test has measured it yet."""
    return fastest_format(CPU)


def test_auto_prefers_cuda_and_falls_back_to_the_cpu():
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "CPU", ""])
def test_an_unknown_or_missing_device_is_one_line_with_the_choices(name):
    with pytest.raises(ValueError, match=r"^unknown device .*choose one of auto, cpu[^\n]*$"):
        pick_device(name)


def test_a_torch_device_is_accepted():
    assert pick_device(CPU) == CPU


def test_the_cpu_is_described_with_its_threads():
    assert describe_device(CPU).endswith(f", {torch.get_num_threads()} threads")


def test_the_cache_folder_is_the_named_one(monkeypatch, tmp_path):
    monkeypatch.setenv("JAHS_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"


@pytest.mark.parametrize(
    ("named", "folder"),
    [
        ("~", "{home}"),
        ("~/a b [c] {d} é", "{home}/a b [c] {{d}} é"),
        ("data", "{here}/data"),
        ("./~", "{here}/~"),
        ("/x/../y", "/x/../y"),
    ],
)
@pytest.mark.parametrize("variable", ["JAHS_CACHE", "JAHS_DATA", "JAHS_BOOK"])
def test_a_named_folder_is_absolute_from_its_first_use(
    variable, named, folder, monkeypatch, tmp_path
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, named)
    monkeypatch.chdir(here)
    wanted = folder.format(home=tmp_path, here=here)
    assert str(named_folder(variable)) == wanted
    monkeypatch.chdir("/")
    assert str(named_folder(variable)) == os.environ[variable] == wanted


@pytest.mark.parametrize("named", ["", None])
def test_an_empty_name_is_no_folder(named, monkeypatch):
    monkeypatch.setenv("JAHS_DATA", "")
    if named is None:
        monkeypatch.delenv("JAHS_DATA")
    assert named_folder("JAHS_DATA") is None


def test_a_folder_in_the_place_of_another_users_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(
        ValueError, match=r"^cannot write to [^\n]*\(no permission\)[^\n]* JAHS_CACHE$"
    ):
        writable_folder(tmp_path / "cache")


@pytest.fixture
def quick_choice(fresh_cache, monkeypatch):
    plain = NumberFormat("float32", False)
    monkeypatch.setattr(device_module, "measure_formats", lambda _: {plain: 0.0})
    return fresh_cache


def test_others_may_read_what_is_remembered(quick_choice):
    before = os.umask(0o027)
    try:
        fastest_format(CPU)
    finally:
        os.umask(before)
    (path,) = (quick_choice / "number_format").iterdir()
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_another_user_has_remembered_and_closed_is_measured_here(quick_choice, monkeypatch):
    fastest_format(CPU)
    (path,) = (quick_choice / "number_format").iterdir()

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "read_text", refuse)
    assert isinstance(fastest_format(CPU), NumberFormat)
    assert [*path.parent.iterdir()] == [path]


def test_seconds_per_call_leaves_out_the_two_warm_up_calls():
    calls = []

    def call():
        calls.append(None)
        time.sleep(0.2 if len(calls) <= 2 else 0.001)

    assert seconds_per_call(call, CPU, repeats=3) < 0.1


def test_measuring_formats_does_not_shift_the_random_numbers(fresh_cache):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measure_formats(CPU)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_format_is_measured_inside_modes_without_gradients(mode, fresh_cache):
    with mode():
        assert isinstance(fastest_format(CPU), NumberFormat)


def test_the_remembered_format_is_used_without_measuring(fresh_cache):
    fastest_format(CPU)
    (path,) = (fresh_cache / "number_format").iterdir()
    path.write_text('{"precision": "bfloat16", "channels_last": false}', "utf-8")
    assert fastest_format(CPU) == NumberFormat("bfloat16", False)


@pytest.mark.parametrize("content", ["", "[]", '{"precision": "float8"}', "{torn"])
def test_a_damaged_memory_is_not_a_format(content, tmp_path):
    path = tmp_path / "format.json"
    path.write_text(content, "utf-8")
    assert device_module._read_format(path) is None


def test_measuring_again_replaces_the_memory(fresh_cache):
    fastest_format(CPU)
    (path,) = (fresh_cache / "number_format").iterdir()
    path.write_text('{"precision": "bfloat16", "channels_last": "torn', "utf-8")
    measured = fastest_format(CPU, measure=True)
    assert device_module._read_format(path) == measured


def test_another_process_uses_the_remembered_format(cached_format):
    code = (
        "import torch; from jahs_utils import device;"
        "device.measure_formats = None;"  # measuring would fail
        "print(tuple(device.fastest_format(torch.device('cpu'))))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.stdout.strip() == str(tuple(cached_format)), done.stderr


def test_a_cache_that_cannot_be_written_gives_one_choice_for_the_process(monkeypatch, fresh_cache):
    (fresh_cache / "file").touch()
    monkeypatch.setenv("JAHS_CACHE", str(fresh_cache / "file" / "below"))
    first = fastest_format(CPU)
    monkeypatch.setattr(device_module, "measure_formats", None)  # a second measurement would fail
    assert fastest_format(CPU) == first


# --- checks ---------------------------------------------------------------------------------------


def test_a_close_name_is_suggested():
    with pytest.raises(ValueError, match=r"did you mean 'cosine'\?\): choose one of constant, cos"):
        one_of("cosin", ["constant", "cosine"], "schedule")


def test_no_choices_are_said_to_be_none():
    with pytest.raises(ValueError, match="choose one of none"):
        one_of("x", [], "experiment")


@pytest.mark.parametrize("value", [["x"], None, 3, np.zeros(1000), "x" * 10_000, ["x"] * 10_000])
def test_what_is_no_name_is_one_short_line_with_the_choices(value):
    with pytest.raises(ValueError, match=r"^unknown schedule [^\n]* choose one of a, b$") as caught:
        one_of(value, ["a", "b"], "schedule")
    assert len(str(caught.value)) <= 200


def test_many_choices_are_cut():
    with pytest.raises(ValueError, match=r"choose one of a0, a1, [^\n]* \.\.\.$") as caught:
        one_of("x" * 500, [f"a{k}" for k in range(1000)], "column")
    assert len(str(caught.value)) <= 200


@given(st.one_of(st.integers(1), st.floats(1e-300, 1e300)))
def test_numbers_above_zero_are_positive(value):
    assert positive(value, "it") == value


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(3), np.float64(2)])
def test_numpy_numbers_above_zero_are_positive(value):
    assert positive(value, "it") == value


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", None, [1]])
def test_what_is_not_a_positive_number_is_named(value):
    with pytest.raises(ValueError, match=r"^lr must be a finite number above 0, got"):
        positive(value, "lr")


@given(st.integers(-5, 5), st.integers(0, 9))
def test_whole_numbers_in_their_bounds_are_whole(least, more):
    assert whole(least + more, "it", least) == least + more
    assert whole(np.int64(least), "it", least, least) == least


@pytest.mark.parametrize("value", [0, 6, -1, 2.0, float("nan"), "1", None, True])
def test_what_is_not_a_whole_number_in_its_bounds_is_named(value):
    with pytest.raises(ValueError, match=r"^count must be a whole number from 1 to 5, got"):
        whole(value, "count", 1, 5)
    with pytest.raises(ValueError, match=r"^count must be a whole number of at least 7, got"):
        whole(value, "count", 7)
