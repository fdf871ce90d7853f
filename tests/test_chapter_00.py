"""The exported code of chapters/00_training.ipynb."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jahs_utils import load, load_chapter
from jahs_utils.networks import ConvNet, count_parameters

chapter = load_chapter("00_training")
AXES = chapter.AXES


def table_of(values: np.ndarray) -> pd.Series:
    """Scores over learning rate, width and depth from an array of shape (3, 3, 3)."""
    axes = [[0.01, 0.1, 1.0], [8, 16, 32], [1, 2, 3]]
    return pd.Series(values.ravel(), pd.MultiIndex.from_product(axes, names=AXES), dtype=float)


def rows_of(accuracy: np.ndarray, test: np.ndarray) -> pd.DataFrame:
    """Rows as `label` returns them, the same for three seeds."""
    scores = pd.DataFrame({"accuracy": table_of(accuracy), "test_accuracy": table_of(test)})
    return pd.concat([scores.reset_index().assign(seed=s) for s in range(3)], ignore_index=True)


def arrays(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((3, 3, 3))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_the_count_by_hand_is_the_networks(channels):
    assert chapter.count_by_hand(channels) == count_parameters(ConvNet(channels))


def test_the_plain_loop_is_torchs_sgd():
    data = load("digits", device="cpu")
    torch.manual_seed(0)
    ours, theirs = (ConvNet([4], image_size=8) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    chapter.plain_loop(ours, data, steps=5, lr=0.02, seed=3)
    optimizer = torch.optim.SGD(
        theirs.parameters(), 0.02, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(3))
    for batch in order.split(128)[:5]:
        images = (data.train_images[batch].float() - data.mean) / data.std
        loss = torch.nn.functional.cross_entropy(theirs(images), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for w, v in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(w, v, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 10_000), st.sampled_from(AXES), st.integers(0, 26))
@settings(deadline=None)
def test_coordinate_search_never_gets_worse(seed, first, start):
    scores = table_of(arrays(seed))
    order = (first, *(axis for axis in AXES if axis != first))
    point = dict(zip(AXES, scores.index[start]))
    found = chapter.coordinate_search(scores, point, order)
    assert scores[tuple(found.values())] >= scores[tuple(point.values())]


@given(st.integers(0, 10_000), st.integers(0, 26))
@settings(deadline=None)
def test_coordinate_search_solves_a_table_without_interaction(seed, start):
    one_axis = np.random.default_rng(seed).random((3, 3))
    scores = table_of(
        one_axis[0][:, None, None] + one_axis[1][None, :, None] + one_axis[2][None, None, :]
    )
    point = dict(zip(AXES, scores.index[start]))
    found = chapter.coordinate_search(scores, point, tuple(AXES))
    assert tuple(found.values()) == scores.idxmax()


def test_coordinate_search_can_be_caught_by_an_interaction():
    ridge = np.zeros((3, 3, 3))
    ridge[0, 0, 0], ridge[2, 2, 2] = 1.0, 2.0
    scores = table_of(ridge)
    found = chapter.coordinate_search(scores, dict(zip(AXES, (0.01, 8, 1))), tuple(AXES))
    assert tuple(found.values()) == (0.01, 8, 1)


def test_random_search_over_everything_finds_the_best():
    scores = table_of(arrays(1))
    found = chapter.random_search(scores, len(scores), np.random.default_rng(0))
    assert tuple(found.values()) == scores.idxmax()


def test_losses_are_zero_where_nothing_interacts_and_nothing_is_noise():
    one_axis = np.arange(3.0)
    table = one_axis[:, None, None] + one_axis[None, :, None] + one_axis[None, None, :]
    lost = chapter.losses_of_methods(rows_of(table, table), draws=5)
    tuned = lost[lost["method"] != "random, joint"]
    assert (tuned[["loss", "worst"]] == 0).all(axis=None)


def test_losses_are_test_points_below_the_joint_choice():
    table = np.zeros((3, 3, 3))
    table[2, 2, 2] = 0.5
    lost = chapter.losses_of_methods(rows_of(table, table), draws=2000)
    blind = lost[lost["method"] == "random, joint"]["loss"].mean()
    trainings = 3 + 3 + 3 - 2
    assert blind == pytest.approx(50 * (1 - trainings / 27), abs=1.5)


def test_a_training_that_diverged_counts_as_guessing():
    rows = pd.DataFrame({"channels": [[8, 8]], "accuracy": [np.nan], "test_accuracy": [np.nan]})
    labelled = chapter.label(rows).iloc[0]
    assert (labelled["accuracy"], labelled["width"], labelled["depth"]) == (0.1, 8, 2)


def test_one_row_repeats_bit_for_bit_and_depends_on_its_seed():
    key = {"data": "digits", "channels": [4], "lr": 0.05, "epochs": 1}
    measured = ("accuracy", "test_accuracy", "train_loss")
    first, again, other = (
        [chapter.train_once(**key, seed=seed)[m] for m in measured] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
