"""The grids of all chapters' experiments."""

import inspect
from types import ModuleType
from typing import Any

import pytest

from jahs_utils import load_chapter
from jahs_utils.chapters import chapter_names
from jahs_utils.experiments import key_id


def grids_of(chapter: ModuleType) -> list[Any]:
    """Parameters of a test: each experiment with each of its profiles."""
    return [
        pytest.param(experiment, profile, id=f"{name}-{profile}")
        for name, experiment in chapter.EXPERIMENTS.items()
        for profile in experiment.grids
    ]


GRIDS = [
    pytest.param(*grid.values, id=f"{name}-{grid.id}")
    for name in chapter_names()
    for grid in grids_of(load_chapter(name))
]


@pytest.mark.parametrize(("experiment", "profile"), GRIDS)
def test_every_key_can_be_given_to_its_unit(experiment, profile):
    signature = inspect.signature(experiment.unit)
    for key in experiment.keys(profile):
        signature.bind(**key)


@pytest.mark.parametrize(("experiment", "profile"), GRIDS)
def test_no_key_is_there_twice(experiment, profile):
    keys = experiment.keys(profile)
    assert len({key_id(key) for key in keys}) == len(keys) > 0
