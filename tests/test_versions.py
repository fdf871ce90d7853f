"""pyproject.toml, requirements.lock and environment.yml say the same."""

import itertools
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pinned(lock: str) -> dict[str, list[Requirement]]:
    """Package name -> its locked requirements (several where they depend on the Python)."""
    pins: dict[str, list[Requirement]] = {}
    for line in lock.splitlines():
        if line and not line.startswith((" ", "#")):
            requirement = Requirement(line.rstrip(" \\"))
            pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return pins


def disagreements(project: dict, lock: str, environment: dict) -> list[str]:
    """What does not fit together, one line each."""
    table = project["project"]
    wanted = [*table["dependencies"], *itertools.chain(*table["optional-dependencies"].values())]
    pins, problems = pinned(lock), []
    for requirement in map(Requirement, wanted):
        found = pins.get(canonicalize_name(requirement.name), [])
        versions = [str(next(iter(pin.specifier)).version) for pin in found]
        if not versions:
            problems.append(f"{requirement.name} is not locked")
        problems += [
            f"{requirement.name} {version} is locked, {requirement.specifier} is wanted"
            for version in versions
            if Version(version) not in requirement.specifier
        ]
    python = next(d for d in environment["dependencies"] if str(d).startswith("python"))
    if python.removeprefix("python") != table["requires-python"]:
        problems.append(f"environment.yml has {python}, pyproject {table['requires-python']}")
    from_pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    if "-r requirements.lock" not in from_pip:
        problems.append("environment.yml does not install requirements.lock")
    others = [entry for entry in from_pip if re.match(r"[a-zA-Z]", entry)]
    return problems + [f"environment.yml names {entry} beside the lock" for entry in others]


@pytest.fixture
def files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    return project, (ROOT / "requirements.lock").read_text(encoding="utf-8"), environment


def test_the_three_files_agree(files):
    assert disagreements(*files) == []


def test_a_version_outside_the_range_is_noticed(files):
    project, lock, environment = files
    older = re.sub(r"^torch==[\d.]+", "torch==2.10.0", lock, flags=re.MULTILINE)
    assert any(
        "torch 2.10.0 is locked" in line for line in disagreements(project, older, environment)
    )


def test_a_missing_package_is_noticed(files):
    project, lock, environment = files
    without = re.sub(r"^smac==", "smuck==", lock, flags=re.MULTILINE)
    assert "smac is not locked" in disagreements(project, without, environment)


def test_another_python_range_is_noticed(files):
    project, lock, environment = files
    environment["dependencies"][0] = "python>=3.12,<3.14"
    assert any(
        "environment.yml has python>=3.12" in d for d in disagreements(project, lock, environment)
    )


def test_the_lock_names_no_host_and_no_path(files):
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links|@ ", files[1])


def test_every_locked_package_has_hashes(files):
    entries = re.split(r"\n(?=\S)", files[1].strip())
    assert all("--hash=sha256:" in entry for entry in entries)
