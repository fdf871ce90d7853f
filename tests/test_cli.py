import subprocess
import sys
from typing import NamedTuple

import pytest

from jahs_utils.cli import _parse, main


class Done(NamedTuple):
    """How a call of the command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def jahs(monkeypatch, capsys):
    """Call the command's entry point in this process."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["jahs", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return Done(int(end.value.code or 0), *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (["run", "00_training", "--profile", "fast"], "quick, standard, gpu, paper"),
        (["run", "01_trainin"], "00_training"),
        (["run", "00_training", "--set", "sead=1"], "seed"),
        (["experiment", "run", "00_training/jont_grid"], "joint_grid"),
        (["experiment", "run", "00_training/joint_grid", "--profile", "fast"], "standard"),
        (["experiment", "run", "00_training/baseline", "--workers", "0"], "at least 1"),
        (["experiment", "run", "00_training/baseline", "--limit-seconds", "nan"], "at least 0"),
        (["record", "--profile", "fast"], "quick, standard, gpu, paper"),
        (["record", "00_training/jont_grid"], "joint_grid"),
        (["record", "--limit-seconds", "-1"], "at least 0"),
        (["record", "--limit-seconds", "ten"], "--limit-seconds"),
        (["experiment", "show", "00_training/baseline", "--profile", "quick"], "standard"),
        (["data", "import", "no-such-file.npz"], "no-such-file.npz"),
        (["no-such-command"], "no-such-command"),
        (["run", "00_training", "--set", "seed"], "name=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_wrong_name_ends_with_status_2_and_one_line(jahs, arguments, choices):
    done = jahs(*arguments)
    assert done.status == 2
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("jahs: ")
    assert choices in done.err


def test_a_wrong_device_ends_with_status_2_and_one_line(jahs, monkeypatch):
    monkeypatch.setenv("JAHS_DEVICE", "gpu")
    done = jahs("doctor")
    assert done.status == 2
    assert "unknown device 'gpu'" in done.err
    assert "cpu" in done.err


def test_doctor_names_device_and_folders(jahs):
    done = jahs("doctor")
    assert done.status == 0
    assert all(word in done.out for word in ("python", "device", "cache", "book"))


def test_experiments_are_listed_with_their_rows(jahs):
    assert "00_training/joint_grid: quick 0/24, standard 216/216" in jahs("experiment", "list").out


def test_recorded_rows_are_shown_with_their_code_version(jahs):
    shown = jahs("experiment", "show", "00_training/baseline").out
    assert "20 rows, 0 of them computed by older code" in shown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        ("1e-3", 1e-3),
        ("[8, 8]", [8, 8]),
        (" 0.1 ", 0.1),
        ("True", True),
        ("None", None),
        ('"1"', "1"),
        ("a=b", "a=b"),
        ("", ""),
        # what YAML takes for 8, False, 750 and a dict
        ("010", "010"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("a: b", "a: b"),
        ("__import__('os').getpid()", "__import__('os').getpid()"),
        ("(" * 5000, "(" * 5000),
    ],
)
def test_values_of_parameters_are_literals_of_python_or_text(text, value):
    parsed = _parse([f"name={text}"])["name"]
    assert (parsed, type(parsed)) == (value, type(value))


def test_a_value_of_another_type_ends_with_status_2_and_one_line(jahs):
    done = jahs("run", "00_training", "--set", "seed=no")
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert "seed of 00_training is of type int, got 'no' of type str" in done.err


@pytest.mark.parametrize("variable", ["JAHS_CACHE", "JAHS_DATA", "JAHS_BOOK"])
def test_a_home_that_does_not_exist_ends_with_status_2_and_one_line(jahs, variable, monkeypatch):
    monkeypatch.setenv(variable, "~nobody-of-this-name/jahs")
    done = jahs("doctor")
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert variable in done.err


def test_a_folder_for_a_file_ends_with_status_2_and_one_line(jahs, tmp_path):
    done = jahs("data", "import", str(tmp_path))
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert str(tmp_path) in done.err


def test_the_installed_command_reports_a_typo_without_loading_torch():
    code = (
        "import sys; from jahs_utils.cli import main; sys.argv[1:] = ['run', '00_trainin']\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout.strip()) == (2, "False")
