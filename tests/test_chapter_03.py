"""The exported code of chapters/03_nash.ipynb."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from properties import SEEDS, few
from scipy import integrate, stats
from test_grids import grids_of
from torch import nn

from jahs_utils import evaluate, fit, load, load_chapter
from jahs_utils.chapters import book_root
from jahs_utils.device import NumberFormat, cache_folder
from jahs_utils.experiments import _plain
from jahs_utils.networks import count_parameters
from jahs_utils.train import cosine

pytestmark = pytest.mark.usefixtures("on_the_cpu")
chapter = load_chapter("03_nash")
BOOK = book_root()
FORMAT = NumberFormat("float32", False)
NAN, INF = math.nan, math.inf
OPERATORS, METHODS = chapter.OPERATORS, chapter.METHODS
INSERTING = {"insert convolution", "insert separable convolution"}


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- networks, images and comparisons -------------------------------------------------------------


def random_network(
    widths: list[int],
    in_channels: int = 3,
    side: int = 8,
    classes: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """A vanilla model whose BatchNorm has been somewhere else than at the start."""
    torch.manual_seed(seed)
    network = chapter.vanilla_model(in_channels, classes, side, widths).to(dtype)
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 2)
                norm.bias.uniform_(-0.5, 1)
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.3, 3)
    return network


@st.composite
def starts(draw: st.DrawFn, least_width: int = 1) -> dict:
    """Arguments of `random_network`."""
    widths = draw(st.lists(st.integers(least_width, least_width + 4), min_size=1, max_size=3))
    return {
        "widths": widths,
        "in_channels": draw(st.integers(1, 3)),
        "side": draw(st.integers(2 ** (len(widths) - 1), 9)),
        "classes": draw(st.integers(2, 5)),
        "seed": draw(SEEDS),
    }


def ready(start: dict, seed: int, n: int) -> Any:
    """A network in which every operator finds a place, as a rule: n + 1 operators were applied."""
    rng = rng_of(seed)
    return chapter.mutate(chapter.insert_conv(random_network(**start), rng), n, rng)


def apply(name: str, network: Any, seed: int) -> Any:
    """The child by an operator; examples in which it finds no place do not count."""
    try:
        return chapter.find_operator(name)(network, rng_of(seed))
    except chapter.NotApplicable:
        assume(False)


def images_for(network: Any, count: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    like = next(network.parameters())
    return torch.randn(count, *network.image_shape, generator=generator, dtype=like.dtype)


def answer(network: Any, x: torch.Tensor, training: bool = False) -> torch.Tensor:
    """What a network computes; its own statistics stay as they are."""
    with torch.no_grad():
        return copy.deepcopy(network).train(training)(x)


def distance(one: Any, other: Any, x: torch.Tensor, training: bool = False) -> float:
    """The largest difference of two answers, relative to the largest."""
    a, b = answer(one, x, training), answer(other, x, training)
    return float((a - b).abs().max() / a.abs().max())


def snapshot(network: Any) -> dict:
    """All that a network is."""
    state = {name: value.tolist() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    return {"is": chapter.describe(network), "state": state, "modes": modes}


def convolutions(network: Any) -> dict[int, int]:
    """Output channels of each convolution."""
    kinds = (nn.Conv2d, chapter.SeparableConv)
    found = chapter.shapes(network)
    return {n: found[n].channels for n in network.inputs if isinstance(network[n], kinds)}


def newest(network: Any, *kinds: type) -> Any:
    return network[max(n for n in network.inputs if isinstance(network[n], kinds))]


# --- graphs ---------------------------------------------------------------------------------------


def graph_of(inputs: dict[int, tuple[int, ...]]) -> Any:
    made = chapter.Graph()
    made.inputs = dict(inputs)
    return made


@st.composite
def graphs(draw: st.DrawFn) -> dict[int, tuple[int, ...]]:
    """Graphs with one answer, their nodes in any order."""
    count = draw(st.integers(1, 8))
    inputs = {}
    for node in range(1, count + 1):
        earlier = st.integers(0, node - 1)
        inputs[node] = tuple(draw(st.lists(earlier, min_size=1, max_size=3)))
    read = {k for given_ in inputs.values() for k in given_}
    inputs[count] += tuple(k for k in range(1, count) if k not in read)
    names = draw(st.permutations(range(1, count + 1)))
    renamed = {0: 0} | dict(zip(range(1, count + 1), names))
    renamed_inputs = {renamed[n]: tuple(renamed[k] for k in inputs[n]) for n in inputs}
    return {n: renamed_inputs[n] for n in draw(st.permutations(list(renamed_inputs)))}


def as_networkx(inputs: dict[int, tuple[int, ...]]) -> nx.DiGraph:
    return nx.DiGraph((k, n) for n, given_ in inputs.items() for k in given_)


@given(graphs())
def test_sorted_nodes_come_after_those_they_read(inputs):
    graph = graph_of(inputs)
    graph.sort()
    order = [0, *graph.inputs]
    assert graph.inputs == inputs
    for node, given_ in graph.inputs.items():
        assert all(order.index(k) < order.index(node) for k in given_)


@given(graphs())
def test_sorting_twice_changes_nothing(inputs):
    graph = graph_of(inputs)
    graph.sort()
    order = list(graph.inputs)
    graph.sort()
    assert list(graph.inputs) == order


@given(graphs())
def test_ancestors_are_those_of_networkx(inputs):
    graph, reference = graph_of(inputs), as_networkx(inputs)
    for node in inputs:
        assert chapter.ancestors(graph, node) == nx.ancestors(reference, node)
    assert chapter.ancestors(graph, 0) == set()


@given(graphs())
def test_readers_are_the_successors_of_networkx(inputs):
    graph, reference = graph_of(inputs), as_networkx(inputs)
    for node in (0, *inputs):
        assert sorted(graph.readers(node)) == sorted(set(reference.successors(node)))


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({1: (0,), 2: (1, 7)}, r"2 reads \{7\}"),
        ({1: (0, 3), 2: (1,), 3: (2,), 4: (3,)}, "circle.*1.*2.*3|circle.*3.*2.*1"),
        ({1: (1,)}, "circle.*1"),
        ({1: (0,), 2: (1,), 3: (1,)}, r"not \[2, 3\]"),
    ],
    ids=["unknown input", "circle", "loop", "two ends"],
)
def test_a_graph_that_cannot_be_is_refused_with_its_nodes(inputs, named):
    with pytest.raises(ValueError, match=named):
        graph_of(inputs).sort()


def test_redirected_readers_read_the_new_node_at_the_same_place():
    graph = graph_of({1: (0,), 2: (1, 0, 1), 3: (1, 2), 4: (3, 1)})
    graph.redirect(1, 9, [2, 4])
    assert graph.inputs == {1: (0,), 2: (9, 0, 9), 3: (1, 2), 4: (3, 9)}


# --- the network ----------------------------------------------------------------------------------


def branched() -> Any:
    """Two convolutions side by side, joined in both ways."""
    torch.manual_seed(0)
    layers = {
        1: chapter.conv_layer(3, 2, 3),
        2: chapter.conv_layer(3, 2, 5, separable=True),
        3: chapter.ConvexSum(),
        4: chapter.Concat(),
        5: chapter.GlobalPool(),
        6: nn.Linear(4, 5),
    }
    with torch.no_grad():
        layers[3].alpha.fill_(0.3)
    inputs = {6: (5,), 5: (4,), 4: (3, 1), 3: (2, 1), 2: (0,), 1: (0,)}
    return chapter.Network(inputs, layers, (3, 6, 6))


def test_a_chain_computes_what_its_layers_compute_one_after_the_other():
    network = random_network([3, 4], 2, 7)
    chain = nn.Sequential(*(network[k] for k in sorted(network.inputs))).eval()
    x = images_for(network)
    expected = chain(x)
    assert len(chain) == 9
    assert torch.equal(network.eval()(x), expected)


def test_branches_compute_what_their_layers_compute_together():
    network = branched()
    x = images_for(network)
    one = nn.functional.conv2d(x, network[1].weight, padding=1)
    deep = nn.functional.conv2d(x, network[2].depthwise.weight, padding=2, groups=3)
    two = nn.functional.conv2d(deep, network[2].pointwise.weight)
    joined = torch.cat([0.3 * two + 0.7 * one, one], 1).mean((2, 3))
    torch.testing.assert_close(network(x), network[6](joined))


def test_a_network_that_two_layers_would_answer_is_refused():
    layers = {1: nn.ReLU(), 2: nn.ReLU()}
    with pytest.raises(ValueError, match=r"not \[1, 2\]"):
        chapter.Network({1: (0,), 2: (0,)}, layers, (1, 4, 4))


def test_inserted_layers_have_numbers_of_their_own_and_can_be_removed():
    network = branched()
    x = images_for(network)
    before = network(x)
    number = network.insert(nn.ReLU(), (5,))
    network.redirect(5, number, [6])
    network.sort()
    assert number == 7
    network.redirect(7, 5, [6])
    network.remove([7])
    assert list(network.inputs) == list(branched().inputs)
    assert set(network.state_dict()) == set(branched().state_dict())
    assert torch.equal(network(x), before)


def vanilla_by_hand() -> nn.Sequential:
    def block(given_: int, width: int) -> list[nn.Module]:
        conv = nn.Conv2d(given_, width, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(width), nn.ReLU()]

    return nn.Sequential(
        *block(3, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.MaxPool2d(2),
        *block(128, 256),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def test_the_vanilla_model_is_the_one_of_the_report():
    network, by_hand = chapter.vanilla_model(), vanilla_by_hand().eval()
    assert network.image_shape == (3, 32, 32)
    assert network.history == ()
    assert count_parameters(network) == count_parameters(by_hand) == 373_834
    for mine, other in zip(network.state_dict().values(), by_hand.state_dict().values()):
        other.copy_(mine)
    x = images_for(network, 2)
    torch.testing.assert_close(network.eval()(x), by_hand(x))


def test_a_copy_of_a_network_is_independent():
    network = branched()
    before, copied = snapshot(network), copy.deepcopy(network)
    with torch.no_grad():
        for value in copied.parameters():
            value += 1
    copied.redirect(4, copied.insert(nn.ReLU(), (4,)), [5])
    copied.sort()
    copied.history = ("other",)
    assert snapshot(network) == before
    assert snapshot(copied) != before


@pytest.mark.parametrize(("held_out", "expected"), [(None, 143), (300, 300)])
def test_a_tenth_of_the_images_is_held_out_unless_told(held_out, expected):
    images = chapter.held_out_data("digits", held_out)
    assert len(images.test_labels) == expected
    assert len(images.train_labels) == 1437 - expected


# --- shapes and plans -----------------------------------------------------------------------------


@given(starts(), SEEDS, st.integers(0, 6))
@few(25)
def test_shapes_are_those_of_what_the_layers_give(start, seed, n):
    network = ready(start, seed, n).eval()
    found, seen = chapter.shapes(network), {}
    for number in network.inputs:
        network[number].register_forward_hook(
            lambda layer, given_, out, number=number: seen.update({number: out.shape})
        )
    network(images_for(network, 1))
    assert set(seen) == set(network.inputs) == set(found) - {0}
    for number, shape in seen.items():
        sides = set(shape[2:]) or {1}
        assert (found[number].channels, {found[number].side}) == (shape[1], sides)


def planned() -> Any:
    """Block 1-3 of 3 channels, block 4-6 of 2, both in a Concat that convolution 8 reads."""
    layers = {
        **{1: chapter.conv_layer(1, 3, 3), 2: nn.BatchNorm2d(3), 3: nn.ReLU()},
        **{4: chapter.conv_layer(3, 2, 3), 5: nn.BatchNorm2d(2), 6: nn.ReLU()},
        **{7: chapter.Concat(), 8: chapter.conv_layer(5, 3, 1), 9: chapter.ConvexSum()},
        **{10: chapter.GlobalPool(), 11: nn.Linear(3, 2)},
    }
    inputs = {n: (n - 1,) for n in layers} | {7: (6, 3), 9: (8, 8)}
    return chapter.Network(inputs, layers, (1, 4, 4))


def test_a_plan_names_the_channels_that_each_layer_behind_is_given():
    source = torch.tensor([0, 1, 2, 1, chapter.NEW])
    plan = chapter.plan_changes(planned(), 1, source)
    assert {number: given_.tolist() for number, given_ in plan.items()} == {
        2: [0, 1, 2, 1, -1],
        3: [0, 1, 2, 1, -1],
        4: [0, 1, 2, 1, -1],
        8: [0, 1, 2, 3, 4, 3, -1],  # behind the two channels of the other block
    }


def test_a_sum_of_channels_that_change_alike_has_a_plan():
    plan = chapter.plan_changes(planned(), 8, torch.tensor([0, 1, 2, 0]))
    assert plan[9].tolist() == plan[11].tolist() == [0, 1, 2, 0]


def test_a_sum_of_channels_of_which_one_part_changes_has_no_plan():
    network = planned()
    network.inputs[9] = (3, 8)
    network.sort()
    with pytest.raises(chapter.NotApplicable, match="the sum 9 needs equal channels"):
        chapter.plan_changes(network, 1, torch.tensor([0, 1, 2, 1]))


SOURCES = st.lists(st.integers(-1, 4), min_size=1, max_size=12)


@given(SOURCES, st.integers(0, 1), st.floats(-2, 2))
def test_taken_entries_are_those_of_numpy(source, dim, new):
    tensor = torch.arange(25.0).view(5, 5) + 1
    taken = np.take(tensor.numpy(), np.maximum(source, 0), dim)
    lines = np.expand_dims(np.array(source) == -1, 1 - dim)
    expected = np.where(lines, np.float32(new), taken)
    found = chapter.take(tensor, torch.tensor(source), dim, new)
    assert np.array_equal(found.numpy(), expected)


@given(SOURCES, SEEDS)
def test_shares_of_the_copies_of_a_channel_add_up_to_1(source, seed):
    found = chapter.shares(torch.tensor(source), rng_of(seed)).numpy()
    assert len(found) == len(source)
    for channel in set(source) - {-1}:
        assert found[np.array(source) == channel].sum() == pytest.approx(1, abs=1e-12)
    assert (found[np.array(source) == -1] == 0).all()
    assert (found[np.array(source) >= 0] > 0).all()


@given(st.integers(2, 10), SEEDS)
def test_shares_of_copies_differ(copies, seed):
    found = chapter.shares(torch.zeros(copies, dtype=torch.int64), rng_of(seed))
    assert len(set(found.tolist())) == copies


# --- every operator -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
@given(start=starts(), seed=SEEDS, n=st.integers(0, 4))
@few(15)
def test_an_operator_preserves_the_function(name, start, seed, n):
    network = ready(start, seed, n)
    child = apply(name, network, seed)
    assert chapter.describe(child) != chapter.describe(network)
    assert distance(network, child, images_for(network)) < 1e-9


@given(starts(), SEEDS, st.integers(5, 20))
@few(15)
def test_a_chain_of_operators_preserves_the_function(start, seed, n):
    network = random_network(**start)
    child = chapter.mutate(network, n, rng_of(seed))
    assert len(child.history) == n
    assert distance(network, child, images_for(network)) < 1e-9


@given(starts(), SEEDS, st.integers(5, 20))
@few(10)
def test_a_chain_of_operators_preserves_the_function_in_single_precision(start, seed, n):
    network = random_network(**start, dtype=torch.float32)
    child = chapter.mutate(network, n, rng_of(seed))
    assert {p.dtype for p in child.parameters()} == {torch.float32}
    assert distance(network, child, images_for(network)) < 1e-4


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in INSERTING])
@given(start=starts(), seed=SEEDS, n=st.integers(0, 4))
@few(12)
def test_in_training_an_operator_that_inserts_nothing_preserves_the_function(name, start, seed, n):
    network = ready(start, seed, n)
    child = apply(name, network, seed)
    assert distance(network, child, images_for(network, 16), training=True) < 1e-9


@pytest.mark.parametrize("name", sorted(INSERTING))
def test_in_training_an_inserted_block_changes_less_than_one_with_a_new_batchnorm(name):
    inserted, plain = [], []
    for seed in range(12):
        network = random_network([16, 16], seed=seed)
        child, x = OPERATORS[name](network, rng_of(seed)), images_for(network, 32, seed)
        inserted.append(distance(network, child, x, training=True))
        norm = newest(child, nn.BatchNorm2d)
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
        plain.append(distance(network, child, x, training=True))
    assert max(inserted) < 0.3
    assert 0 < np.mean(inserted) < 0.5 * np.mean(plain)


@pytest.mark.parametrize("name", [*OPERATORS, *chapter.SHRINKING])
@given(start=starts(4), seed=SEEDS, n=st.integers(0, 3))
@few(6)
def test_an_operator_leaves_the_parent_as_it_is(name, start, seed, n):
    network = ready(start, seed, n)
    before = snapshot(network)
    child = apply(name, network, seed)
    with torch.no_grad():
        for value in [*child.parameters(), *child.buffers()]:
            value += 1
    assert snapshot(network) == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*OPERATORS, *chapter.SHRINKING])
def test_a_child_is_in_the_mode_of_its_parent(name, training):
    network = chapter.insert_conv(random_network([4, 4]), rng_of(0)).train(training)
    child = chapter.find_operator(name)(network, rng_of(0))
    assert {module.training for module in child.modules()} == {training}


@pytest.mark.parametrize("name", [*OPERATORS, *chapter.SHRINKING])
def test_the_generator_alone_decides_the_child(name):
    network = chapter.insert_conv(random_network([5, 4]), rng_of(1))
    children = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        children.append(snapshot(chapter.find_operator(name)(network, rng_of(3))))
        assert torch.equal(torch.get_rng_state(), before)
    assert children[0] == children[1]


def test_other_generators_draw_other_children():
    network = random_network([5, 4])
    found = {chapter.describe(chapter.mutate(network, 3, rng_of(seed))) for seed in range(10)}
    assert len(found) > 5


def after_two_steps(network: Any, count: int = 32) -> Any:
    """A network after two steps of SGD, with the gradients of the second."""
    trained = copy.deepcopy(network).train()
    x = images_for(network, count)
    labels = torch.arange(count) % trained(x).shape[1]
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x), labels).backward()
        optimizer.step()
    return trained


def without_gradient(network: Any) -> list[str]:
    """Parameters of which a channel has no gradient."""
    return [
        name
        for name, value in network.named_parameters()
        if not value.grad.reshape(len(value) if value.ndim else 1, -1).any(1).all()
    ]


@pytest.mark.parametrize("name", OPERATORS)
def test_after_a_step_every_channel_of_a_child_learns(name):
    for seed in range(3):
        network = chapter.insert_separable(random_network([8, 8], seed=seed), rng_of(seed))
        child = OPERATORS[name](network, rng_of(seed))
        assert without_gradient(after_two_steps(child)) == []


@given(SEEDS, st.integers(2, 8))
@few(8)
def test_after_a_step_every_parameter_of_a_chain_learns(seed, n):
    child = chapter.mutate(random_network([8, 8], seed=seed), n, rng_of(seed))
    trained = after_two_steps(child)
    assert [name for name, value in trained.named_parameters() if not value.grad.any()] == []


def test_a_separable_convolution_learns_from_new_channels():
    """Were the filters of new channels zero, they and what reads them would stay zero for ever."""
    learned = 0
    for seed in range(25):
        network = chapter.insert_separable(random_network([8, 8], seed=seed), rng_of(seed))
        before = count_parameters(newest(network, chapter.SeparableConv))
        child = chapter.merge_concat(network, rng_of(seed + 100))
        layer = newest(child, chapter.SeparableConv)
        if count_parameters(layer) > before:
            learned += 1
            assert not layer.pointwise.weight[:, 8:].any()
            trained = newest(after_two_steps(child), chapter.SeparableConv)
            assert trained.depthwise.weight.grad[8:].flatten(1).any(1).all()
            assert trained.pointwise.weight[:, 8:].any()
    assert learned


# --- alter channels -------------------------------------------------------------------------------


@given(starts(), SEEDS, st.integers(0, 5))
@few(25)
def test_altering_widens_exactly_one_convolution_by_2_or_4(start, seed, n):
    network = ready(start, seed, n)
    before, after = convolutions(network), convolutions(apply("alter channels", network, seed))
    changed = [n for n in before if after[n] != before[n]]
    assert set(before) == set(after)
    assert len(changed) == 1
    assert after[changed[0]] / before[changed[0]] in (2, 4)


def test_altering_goes_to_600_channels_and_not_beyond():
    network = random_network([150, 200, 301], 1, 4, dtype=torch.float32)
    children = [chapter.alter_channels(network, rng_of(seed)) for seed in range(25)]
    found = {tuple(convolutions(child).values()) for child in children}
    assert found == {(300, 200, 301), (600, 200, 301), (150, 400, 301)}


def test_altering_where_nothing_can_be_widened_is_not_applicable():
    network = random_network([301], 1, 1, dtype=torch.float32)
    with pytest.raises(chapter.NotApplicable, match="no convolution can be widened"):
        chapter.alter_channels(network, rng_of(0))


def test_altering_passes_over_a_convolution_whose_copies_would_meet_others_in_a_sum():
    network = chapter.insert_conv(random_network([4]), rng_of(0))
    first, second = convolutions(network)
    summed = chapter.merge_convex(network, rng_of(0))
    assert {"ConvexSum"} <= {type(layer).__name__ for layer in summed.layers.values()}
    with pytest.raises(chapter.NotApplicable):  # both convolutions are parts of the sum
        chapter.alter_channels(summed, rng_of(0))
    for number in (first, second):
        with pytest.raises(chapter.NotApplicable):
            chapter.plan_changes(summed, number, torch.arange(8) % 4)


@pytest.mark.parametrize("seed", range(4))
def test_copies_do_not_stay_copies(seed):
    network = random_network([8, 8], seed=seed)
    child = chapter.alter_channels(network, rng_of(seed))
    (number,) = [n for n, width in convolutions(child).items() if width != 8]
    rows = [row.tolist() for row in child[number].weight]
    assert rows[:8] == network[number].weight.tolist()
    assert all(row in rows[:8] for row in rows[8:])
    trained = after_two_steps(child)[number].weight.flatten(1)
    assert torch.cdist(trained, trained).fill_diagonal_(1).min() > 1e-9


# --- insertions -----------------------------------------------------------------------------------


def identity_kernels(channels: int, kernel: int) -> np.ndarray:
    """As the slides print them: a 1 in the middle where input and output have the same number."""
    middle = {3: [[0, 0, 0], [0, 1, 0], [0, 0, 0]]}
    middle[5] = np.pad(middle[3], 1).tolist()
    kernels = np.zeros((channels, channels, kernel, kernel))
    for channel in range(channels):
        kernels[channel, channel] = middle[kernel]
    return kernels


def test_an_inserted_convolution_has_the_kernels_of_the_slides():
    network, kernels = random_network([3]), set()
    for seed in range(8):
        weight = newest(chapter.insert_conv(network, rng_of(seed)), nn.Conv2d).weight
        kernels.add(weight.shape[-1])
        assert np.array_equal(weight.detach(), identity_kernels(3, weight.shape[-1]))
    assert kernels == {3, 5}


def test_an_inserted_separable_convolution_has_the_kernels_of_the_slides():
    network, kernels = random_network([3]), set()
    for seed in range(8):
        layer = newest(chapter.insert_separable(network, rng_of(seed)), chapter.SeparableConv)
        depthwise, kernel = layer.depthwise.weight.detach(), layer.depthwise.kernel_size[0]
        kernels.add(kernel)
        expected = [identity_kernels(3, kernel)[k, k][None] for k in range(3)]
        assert np.array_equal(depthwise, expected)
        assert np.array_equal(layer.pointwise.weight.detach()[:, :, 0, 0], np.eye(3))
    assert kernels == {3, 5}


@pytest.mark.parametrize("name", sorted(INSERTING))
def test_an_inserted_batchnorm_undoes_what_it_does(name):
    norm = newest(OPERATORS[name](random_network([6]), rng_of(0)), nn.BatchNorm2d)
    assert torch.equal(norm.bias, norm.running_mean)
    torch.testing.assert_close(norm.weight, (norm.running_var + norm.eps).sqrt())


def test_a_block_is_inserted_between_a_relu_and_all_that_read_it():
    network = random_network([3, 4])
    child = chapter.insert_conv(network, rng_of(0))
    conv, norm, relu = sorted(set(child.inputs) - set(network.inputs))
    (spot,) = child.inputs[conv]
    assert isinstance(child[spot], nn.ReLU)
    assert child.readers(spot) == [conv]
    assert child.readers(relu) == network.readers(spot)
    assert (child.inputs[norm], child.inputs[relu]) == ((conv,), (norm,))


def test_without_a_batchnorm_and_relu_nothing_is_inserted():
    network = branched()
    for name in INSERTING:
        with pytest.raises(chapter.NotApplicable, match="no BatchNorm and ReLU"):
            OPERATORS[name](network, rng_of(0))


def integrated_moments(mean: float, deviation: float) -> tuple[float, float]:
    """Mean and variance of max(0, mean + deviation z), z standard normal, by integration."""

    def moment(power: int) -> float:
        def density(z: float) -> float:
            return max(0, mean + deviation * z) ** power * stats.norm.pdf(z)

        kink = min(max(-mean / deviation, -9.9), 9.9)
        parts = [(-10, kink), (kink, 10)]
        return sum(integrate.quad(density, *part, epsabs=1e-13)[0] for part in parts)

    return moment(1), moment(2) - moment(1) ** 2


SCALES = st.tuples(st.floats(0.05, 3), st.sampled_from([-1, 1])).map(math.prod)


@given(st.floats(-3, 3), SCALES)
@few(40)
def test_moments_behind_a_relu_are_those_of_an_integral(mean, scale):
    norm = nn.BatchNorm2d(1).double()
    nn.init.constant_(norm.bias, mean)
    nn.init.constant_(norm.weight, scale)
    found = [float(moment) for moment in chapter.relu_moments(norm)]
    assert found == pytest.approx(integrated_moments(mean, scale), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_channels_that_do_not_vary_are_those_of_their_bias(dtype):
    norm = nn.BatchNorm2d(3).to(dtype)
    norm.load_state_dict(
        norm.state_dict() | {"weight": torch.zeros(3), "bias": torch.tensor([-2.0, 0, 3])}
    )
    mean, variance = chapter.relu_moments(norm)
    assert mean.tolist() == pytest.approx([0, 0, 3], abs=1e-6)
    assert variance.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


# --- merges and splits ----------------------------------------------------------------------------


@given(starts(), SEEDS, st.integers(0, 5))
@few(25)
def test_a_convex_merge_is_of_one_shape_and_begins_with_alpha_1(start, seed, n):
    network = ready(start, seed, n)
    child = apply("merge convexly", network, seed)
    (number,) = set(child.inputs) - set(network.inputs)
    found, (a, b) = chapter.shapes(child), child.inputs[number]
    assert type(child[number]) is chapter.ConvexSum
    assert child[number].alpha.item() == 1
    assert child[number].alpha.requires_grad
    assert found[a] == found[b] == found[number]
    assert a != b
    assert child.readers(a) == [number]
    assert sorted(child.readers(number)) == sorted(network.readers(a))


@given(starts(), SEEDS, st.integers(0, 5))
@few(25)
def test_a_concatenation_has_the_channels_of_both(start, seed, n):
    network = ready(start, seed, n)
    child = apply("merge by concatenation", network, seed)
    (number,) = set(child.inputs) - set(network.inputs)
    found, (a, b) = chapter.shapes(child), child.inputs[number]
    assert type(child[number]) is chapter.Concat
    assert found[number].channels == found[a].channels + found[b].channels
    assert found[a].side == found[b].side
    assert sorted(child.readers(number)) == sorted(network.readers(a))


def test_what_reads_a_concatenation_ignores_the_new_channels():
    network = chapter.insert_conv(random_network([3]), rng_of(0))
    child = chapter.merge_concat(network, rng_of(0))
    dense = max(network.inputs, key=lambda n: isinstance(network[n], nn.Linear))
    assert isinstance(newest(child, chapter.Concat), nn.Module)
    assert torch.equal(child[dense].weight[:, :3], network[dense].weight)
    assert child[dense].weight.shape[1] == 6
    assert not child[dense].weight[:, 3:].any()


@given(starts(), SEEDS, st.integers(0, 6), st.booleans())
@few(40)
def test_the_pairs_are_all_that_fit_and_make_no_circle(start, seed, n, same_channels):
    network = ready(start, seed, n)
    reference, found = as_networkx(network.inputs), chapter.shapes(network)
    spots = [n for n in network.inputs if isinstance(network[n], nn.ReLU | nn.MaxPool2d)]
    expected = {
        (a, b)
        for a in spots
        for b in spots
        if b not in {a} | nx.descendants(reference, a)
        and found[a].side == found[b].side
        and (found[a].channels == found[b].channels or not same_channels)
    }
    pairs = chapter.pairs_of(network, same_channels)
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected


def test_a_single_block_has_nothing_to_merge():
    with pytest.raises(chapter.NotApplicable, match="no two layers can be mixed"):
        chapter.merge_convex(random_network([3]), rng_of(0))


@pytest.mark.parametrize("name", [*OPERATORS, *chapter.SHRINKING])
@given(start=starts(3), seed=SEEDS, n=st.integers(2, 6))
@few(8)
def test_whether_an_operator_finds_a_place_does_not_depend_on_the_generator(name, start, seed, n):
    network, found = ready(start, seed, n), set()
    for k in range(6):
        try:
            chapter.find_operator(name)(network, rng_of(k))
            found.add("a place")
        except chapter.NotApplicable:
            found.add("none")
    assert len(found) == 1


@given(st.integers(2, 40), SEEDS)
@few(40)
def test_a_split_has_30_and_70_percent_of_the_channels(width, seed):
    network = random_network([width], 1, 1)
    child = chapter.split_conv(network, rng_of(seed))
    first, second = convolutions(child).values()
    assert first + second == width
    assert min(first, second) >= 1
    assert abs(first - 0.3 * width) <= 0.5 or first == 1
    joined = newest(child, chapter.Concat)
    (number,) = [n for n in child.inputs if child[n] is joined]
    found = chapter.shapes(child)
    assert [found[k].channels for k in child.inputs[number]] == [first, second]


def test_a_split_of_ten_channels_is_into_three_and_seven():
    child = chapter.split_conv(random_network([10]), rng_of(0))
    assert sorted(convolutions(child).values()) == [3, 7]
    assert len(child.inputs) == len(random_network([10]).inputs) + 4


def test_a_convolution_of_one_channel_is_not_split():
    with pytest.raises(chapter.NotApplicable, match="no Conv-BN-ReLU block"):
        chapter.split_conv(random_network([1, 1]), rng_of(0))


@given(starts(), SEEDS, st.integers(0, 8))
@few(20)
def test_blocks_are_convolutions_with_batchnorm_and_relu_that_nobody_else_reads(start, seed, n):
    network = ready(start, seed, n)
    blocks = chapter.blocks_of(network)
    plain = [k for k in network.inputs if isinstance(network[k], nn.Conv2d)]
    assert [conv for conv, _, _ in blocks] == plain  # no operator reads inside of a block
    for conv, norm, relu in blocks:
        assert (network.inputs[norm], network.inputs[relu]) == ((conv,), (norm,))
        assert isinstance(network[norm], nn.BatchNorm2d)
        assert isinstance(network[relu], nn.ReLU)


# --- shrinking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", chapter.SHRINKING)
@given(start=starts(4), seed=SEEDS, n=st.integers(0, 5))
@few(15)
def test_shrinking_makes_a_smaller_network_that_works(name, start, seed, n):
    network = ready(start, seed, n)
    child = apply(name, network, seed)
    assert count_parameters(child) < count_parameters(network)
    assert chapter.describe(chapter.rebuild(chapter.describe(child))) == chapter.describe(child)
    found = answer(child, images_for(child), training=True)
    assert found.shape == (4, start["classes"])
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", chapter.SHRINKING)
def test_a_network_made_smaller_can_be_changed_again(name):
    for seed in range(10):
        network = chapter.mutate(random_network([6, 5], seed=seed), 5, rng_of(seed))
        with contextlib.suppress(chapter.NotApplicable):
            network = chapter.find_operator(name)(network, rng_of(seed))
        child = chapter.mutate(network, 5, rng_of(seed))
        assert distance(network, child, images_for(network)) < 1e-9


@given(st.integers(4, 20), SEEDS)
@few(25)
def test_the_weakest_quarter_of_the_channels_is_dropped(width, seed):
    network = random_network([width], seed=seed)
    norm, conv = network[2], network[1]
    strength = (norm.weight**2 + norm.bias**2).detach().numpy()
    kept = np.sort(np.argsort(-strength)[: width - width // 4])
    child = chapter.drop_channels(network, rng_of(seed))
    assert torch.equal(child[1].weight, conv.weight[kept])
    assert torch.equal(child[2].running_var, norm.running_var[kept])
    torch.testing.assert_close(child[5].weight, network[5].weight[:, kept])


def test_dropping_channels_that_are_zero_preserves_the_function():
    network = random_network([8])
    with torch.no_grad():
        network[2].weight[[1, 6]] = 0
        network[2].bias[[1, 6]] = 0
    child = chapter.drop_channels(network, rng_of(0))
    assert convolutions(child) == {1: 6}
    assert distance(network, child, images_for(network)) < 1e-12


def test_dropping_the_identity_preserves_the_function():
    for seed in range(5):
        network = random_network([4, 4])
        child = chapter.drop_block(chapter.insert_conv(network, rng_of(seed)), rng_of(0))
        assert len(child.inputs) == len(network.inputs)
        assert distance(network, child, images_for(network)) < 1e-12


def test_what_is_too_small_to_shrink_is_not_applicable():
    for operator, message in (
        (chapter.drop_channels, "no convolution can lose channels"),
        (chapter.drop_block, "no block can be removed"),
    ):
        with pytest.raises(chapter.NotApplicable, match=message):
            operator(random_network([3, 2]), rng_of(0))


def test_operators_that_shrink_are_not_among_the_six():
    assert len(OPERATORS) == 6
    assert not set(OPERATORS) & set(chapter.SHRINKING)


# --- chains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OPERATORS, *chapter.SHRINKING])
def test_an_operator_is_found_by_its_name(name):
    assert chapter.find_operator(name) is (OPERATORS | chapter.SHRINKING)[name]


def test_an_unknown_operator_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"unknown operator 'widen'.*alter channels.*drop block"):
        chapter.find_operator("widen")


def test_no_mutation_makes_an_equal_copy():
    network = random_network([3, 4])
    before = snapshot(network)
    child = chapter.mutate(network, 0, rng_of(0))
    assert snapshot(child) == before
    with torch.no_grad():
        child[1].weight += 1
    assert snapshot(network) == before


def test_fewer_mutations_than_none_are_refused():
    with pytest.raises(ValueError, match="whole number of at least 0, got -1"):
        chapter.mutate(random_network([3]), -1, rng_of(0))


@given(SEEDS, st.integers(0, 4), st.integers(1, 4))
@few(15)
def test_the_history_of_a_child_is_that_of_its_parent_and_its_own(seed, before, n):
    parent = chapter.mutate(random_network([3, 3]), before, rng_of(seed))
    child = chapter.mutate(parent, n, rng_of(seed + 1))
    assert len(parent.history) == before
    assert child.history[:before] == parent.history
    assert len(child.history) == before + n
    assert set(child.history) <= set(OPERATORS)


def test_the_operators_drawn_are_those_applied():
    kinds = {"insert convolution": 1, "split convolution": 2}
    for seed in range(10):
        child = chapter.mutate(random_network([6]), 2, rng_of(seed), dict.fromkeys(kinds, 1.0))
        counts = Counter(child.history)
        assert len(convolutions(child)) == 1 + counts.total()


def test_only_operators_with_a_chance_are_drawn():
    chances = {"split convolution": 2.0, "drop channels": 1.0, "insert convolution": 0.5}
    histories = [
        chapter.mutate(random_network([9]), 2, rng_of(k), chances).history for k in range(40)
    ]
    assert {name for history in histories for name in history} == set(chances)


def test_all_six_are_drawn_alike_unless_told():
    network = chapter.insert_conv(random_network([2, 2], 1, 2), rng_of(0))
    drawn = [chapter.random_morphism(network, rng_of(seed)).history[-1] for seed in range(300)]
    assert set(drawn) == set(OPERATORS)
    assert stats.chisquare([*Counter(drawn).values()]).pvalue > 1e-4


@pytest.mark.parametrize("unit", [1, 1000])
def test_chances_count_in_any_unit(unit):
    chances = {"insert convolution": 3 * unit, "split convolution": unit}
    network = random_network([2], 1, 1)
    drawn = [chapter.random_morphism(network, rng_of(k), chances).history[-1] for k in range(300)]
    assert 0.65 < drawn.count("insert convolution") / 300 < 0.85


WIDE = {"widths": [301], "in_channels": 1, "side": 1, "dtype": torch.float32}


def test_an_operator_that_finds_no_place_is_replaced():
    chances = {"alter channels": 1e6, "merge convexly": 1e6, "split convolution": 1.0}
    for seed in range(5):
        child = chapter.random_morphism(random_network(**WIDE), rng_of(seed), chances)
        assert child.history == ("split convolution",)
    assert len(chances) == 3


@pytest.mark.parametrize(
    "chances",
    [
        {"alter channels": 1.0, "merge convexly": 2.0},
        {"alter channels": 1.0, "split convolution": 0.0},
    ],
    ids=["none finds a place", "the one that would has no chance"],
)
def test_where_no_operator_finds_a_place_none_is_applicable(chances):
    with pytest.raises(chapter.NotApplicable, match="no operator finds a place"):
        chapter.random_morphism(random_network(**WIDE), rng_of(0), chances)


def test_an_unknown_operator_among_the_chances_is_refused():
    with pytest.raises(ValueError, match="unknown operator 'widen'"):
        chapter.mutate(random_network([3]), 1, rng_of(0), {"widen": 1.0})


@pytest.mark.parametrize("width", [300, 600])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_fast_on_the_largest_network(name, width):
    large = chapter.vanilla_model(3, 10, 32, (width,) * 3)
    begin = time.process_time()
    with contextlib.suppress(chapter.NotApplicable):
        OPERATORS[name](large, rng_of(0))
    assert time.process_time() - begin < 1


# --- drawings -------------------------------------------------------------------------------------


def drawn_boxes(network: Any, title: str = "") -> list:
    figure = Figure()
    ax = figure.subplots()
    chapter.draw(network, ax, title)
    figure.canvas.draw()
    assert title in (ax.get_title("left"), ax.get_title("center"))  # where the style puts it
    return [text for text in ax.texts if text.get_bbox_patch() is not None]


@given(starts(), SEEDS, st.integers(0, 8))
@few(6)
def test_a_drawing_has_a_box_for_each_layer_but_batchnorm_and_relu(start, seed, n):
    network = ready(start, seed, n)
    boxes = drawn_boxes(network)
    kinds = Counter(type(network[k]).__name__ for k in network.inputs)
    drawn = Counter(box.get_text().split("\n")[0] for box in boxes)
    assert len(boxes) == 1 + len(network.inputs) - kinds["BatchNorm2d"] - kinds["ReLU"]
    names = {"SeparableConv": "sep", "Concat": "cat", "ConvexSum": "mix", "MaxPool2d": "pool"}
    for kind, name in names.items():
        assert drawn[name] == kinds[kind]
    assert drawn["3x3"] + drawn["5x5"] == kinds["Conv2d"]
    assert drawn["in"] == drawn["mean"] == drawn[str(start["classes"])] == 1
    assert len({box.get_position() for box in boxes}) == len(boxes)


def test_a_drawing_goes_from_left_to_right():
    network = chapter.split_conv(random_network([10, 4]), rng_of(0))
    boxes = drawn_boxes(network, "a title")
    columns = {box.get_text(): box.get_position()[0] for box in boxes}
    assert columns["in"] == 0
    assert columns["mean"] == max(columns.values()) - 1


# --- architectures as text, children as files -----------------------------------------------------


@given(starts(), SEEDS, st.integers(0, 10))
@few(20)
def test_a_network_can_be_built_again_from_its_description(start, seed, n):
    network = random_network(**start, dtype=torch.float32)
    network = chapter.mutate(network, n, rng_of(seed))
    text = chapter.describe(network)
    again = chapter.rebuild(text)
    assert json.loads(text)[0] == list(network.image_shape)
    assert chapter.describe(again) == text
    assert count_parameters(again) == count_parameters(network)
    assert (again.history, again.image_shape) == (network.history, network.image_shape)
    again.load_state_dict(network.state_dict())
    x = images_for(network)
    assert torch.equal(answer(again, x), answer(network, x))
    a, b = (chapter.mutate(net, 2, rng_of(seed)) for net in (network, again))
    assert chapter.describe(a) == chapter.describe(b)


def test_a_description_has_no_weights():
    a, b = (chapter.describe(random_network([30, 40], seed=seed)) for seed in (0, 1))
    assert a == b
    assert len(a) < 1000


def test_a_layer_of_unknown_kind_is_refused_with_the_choices():
    text = chapter.describe(random_network([3])).replace('"GlobalPool"', '"MeanPool"')
    with pytest.raises(ValueError, match=r"unknown layer 'MeanPool'.*GlobalPool.*ConvexSum"):
        chapter.rebuild(text)


def child_of(n: int, index: int = 3, **changes: object) -> Any:
    network = chapter.mutate(random_network([3, 4], dtype=torch.float32), n, rng_of(1))
    made = chapter.Child(network, {"lr": 0.1, "weight_decay": 1e-3}, index, (0.25, 0.5), 1.5, 7.25)
    return dataclasses.replace(made, **changes)


def test_a_saved_child_is_loaded_as_it_was(tmp_path):
    for n in (0, 6):
        child, path = child_of(n), tmp_path / f"child{n}.pt"
        chapter.save_child(child, path)
        again = chapter.load_child(path)
        known = ("settings", "index", "accuracies", "epochs", "seconds", "score")
        assert [getattr(again, name) for name in known] == [getattr(child, name) for name in known]
        assert snapshot(again.network) == snapshot(child.network)
        assert again.network.history == child.network.history
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child0.pt", "child6.pt"]


def test_a_child_that_broke_down_is_loaded_as_one(tmp_path):
    chapter.save_child(child_of(1, accuracies=(0.5, NAN)), tmp_path / "child.pt")
    assert chapter.load_child(tmp_path / "child.pt").score == -1


@pytest.mark.parametrize(
    ("accuracies", "score"), [((), 0), ((0.25, 0.5), 0.5), ((0.5, NAN), -1), ((NAN, 0.5), 0.5)]
)
def test_the_score_of_a_child_is_its_last_accuracy(accuracies, score):
    assert child_of(0, accuracies=accuracies).score == score


def test_of_a_decided_step_only_the_winner_keeps_its_weights(tmp_path):
    names = [f"step{s}-rung{r}-child{c}" for s, r, c in [(2, 0, 3), (2, 1, 3), (2, 1, 4)]]
    names += ["step1-rung1-child3", "step21-rung1-child4"]
    winner = child_of(2)
    for name in names:
        chapter.save_child(winner, tmp_path / f"{name}.pt")
    chapter.drop_weights(tmp_path, 2, winner)
    found = {p.stem: chapter.load_child(p) for p in tmp_path.glob("*.pt")}
    assert set(found) == set(names)
    kept = {n for n, c in found.items() if snapshot(c.network) == snapshot(winner.network)}
    assert kept == {"step2-rung1-child3", "step1-rung1-child3", "step21-rung1-child4"}
    for child in found.values():
        assert chapter.describe(child.network) == chapter.describe(winner.network)
        assert (child.accuracies, child.seconds) == (winner.accuracies, winner.seconds)


# --- methods and schedules ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rungs", "restarts", "separable"),
    [
        ("NASH", ((8, 20),), True, False),
        ("SH", ((8, 5), (4, 10), (2, 20), (1, 40)), False, False),
        ("SHR", ((8, 5), (4, 10), (2, 20), (1, 40)), True, False),
        ("SHRSep", ((8, 5), (4, 10), (2, 20), (1, 40)), True, True),
    ],
)
def test_the_methods_are_those_of_the_slides(name, rungs, restarts, separable):
    method = METHODS[name]
    assert (method.rungs, method.restarts) == (rungs, restarts)
    expected = set(OPERATORS) - (set() if separable else {"insert separable convolution"})
    assert set(method.chances) == expected
    assert len(set(method.chances.values())) == 1
    assert (method.shrink, method.tuned) == (None, False)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_spends_160_epochs_a_step_on_8_children(name):
    assert sum(count * epochs for count, epochs in METHODS[name].rungs) == 160
    assert METHODS[name].rungs[0][0] == 8


@pytest.mark.parametrize("name", METHODS)
def test_every_method_draws_operators_that_exist(name):
    method = METHODS[name]
    for operator in {**method.chances, **(method.shrink or {})}:
        assert callable(chapter.find_operator(operator))


def test_only_the_method_that_shrinks_may_shrink():
    assert [name for name, method in METHODS.items() if method.shrink] == ["shrinking"]
    assert set(METHODS["shrinking"].shrink) == set(chapter.SHRINKING)


def test_a_rung_that_restarts_has_a_cosine_of_its_own():
    assert chapter.rung_schedule(15, None) == "cosine"


def test_rungs_without_restarts_follow_one_cosine():
    done, ends = 0, []
    for epochs in (5, 10, 20, 40):
        schedule = chapter.rung_schedule(done, 75)
        for epoch in np.linspace(0, epochs, 9):
            expected = 0.5 + 0.5 * math.cos(math.pi * (done + epoch) / 75)
            assert schedule(NAN, epoch) == pytest.approx(expected, abs=1e-12)
        ends += [schedule(0, 0), schedule(1, epochs)]
        done += epochs
    assert ends[0] == 1
    assert ends[1:-1:2] == pytest.approx(ends[2::2])  # no jump between two rungs
    assert ends[-1] == pytest.approx(0, abs=1e-12)


def test_the_shared_cosine_does_not_rise_again_where_steps_end_later_than_epochs():
    assert chapter.rung_schedule(70, 75)(0.5, 8) == pytest.approx(0, abs=1e-12)


DATA = load("digits", device="cpu").hold_out(300)


def test_a_child_is_trained_as_fit_trains_its_network():
    child = child_of(0, accuracies=(0.5,), epochs=1.0, network=digits_network())
    trained = chapter.train_child(child, DATA, 0.5, 2.0, 3, number_format=FORMAT)
    by_hand = copy.deepcopy(child.network)

    def second_quarter(fraction: float, epoch: float) -> float:
        return cosine((1 + epoch) / 2, epoch)

    how = {"schedule": second_quarter, "lr": 0.1, "weight_decay": 1e-3, "number_format": FORMAT}
    history = fit(by_hand, DATA, epochs=0.5, seed=3, **how)
    assert snapshot(trained.network) == snapshot(by_hand)
    assert trained.accuracies == (0.5, history.final("eval_accuracy"))
    assert (trained.epochs, trained.index) == (1.5, 3)
    assert trained.seconds > child.seconds


def digits_network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return chapter.vanilla_model(1, 10, 8, (4, 4, 4))


def test_training_leaves_the_child_as_it_is():
    child = child_of(0, network=digits_network())
    before = snapshot(child.network)
    trained = chapter.train_child(child, DATA, 0.2, None, 3, number_format=FORMAT)
    assert snapshot(child.network) == before
    assert snapshot(trained.network) != before
    assert child.accuracies == (0.25, 0.5)


def test_a_training_that_breaks_down_is_nan():
    child = child_of(0, network=digits_network(), settings={"lr": 1e20})
    trained = chapter.train_child(child, DATA, 0.5, None, 3, number_format=FORMAT)
    assert math.isnan(trained.accuracies[-1])
    assert trained.score == -1


# --- children -------------------------------------------------------------------------------------


def first_child(widths: tuple[int, ...] = (4, 4), **changes: float) -> Any:
    rates = {"lr": 0.1, "weight_decay": 1e-3} | changes
    return chapter.Child(
        random_network([*widths], 1, 4, dtype=torch.float32), rates, 5, (0.5,), 9.0
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_children_are_the_parent_and_seven_mutations_of_it(name):
    parent = first_child()
    before = snapshot(parent.network)
    children = chapter.make_children(parent, METHODS[name], rng_of(0))
    assert [child.index for child in children] == list(range(8))
    assert snapshot(children[0].network) == before
    assert children[0].settings == parent.settings
    assert [len(child.network.history) for child in children] == [0] + 7 * [5]
    assert len({chapter.describe(child.network) for child in children}) == 8
    assert {(child.accuracies, child.epochs, child.seconds) for child in children} == {((), 0, 0)}
    assert snapshot(parent.network) == before


def test_no_child_is_larger_than_allowed():
    sizes = {600: [], INF: []}
    for limit, found in sizes.items():
        for seed in range(3):
            children = chapter.make_children(first_child(), METHODS["SHR"], rng_of(seed), 5, limit)
            found += [count_parameters(child.network) for child in children]
    assert len(sizes[600]) == 24
    assert max(sizes[600]) <= 600 < max(sizes[INF])


def test_children_that_are_all_too_large_are_not_applicable():
    parent = first_child()
    limit = count_parameters(parent.network)
    message = f"200 draws gave 0 children of at most {limit} parameters, 7 are needed"
    only = METHODS["SHR"]._replace(chances={"insert convolution": 1.0})
    with pytest.raises(chapter.NotApplicable, match=message):
        chapter.make_children(parent, only, rng_of(0), 1, limit)


def test_two_hundred_draws_are_enough_for_two_hundred_children():
    method = METHODS["NASH"]._replace(rungs=((201, 1.0),))
    children = chapter.make_children(first_child((2,)), method, rng_of(0), mutations=0)
    assert len(children) == 201


def test_settings_mutate_within_a_factor_of_two_where_they_are_tuned():
    lists = [chapter.make_children(first_child(), METHODS["tuned"], rng_of(k), 1) for k in range(8)]
    children = [child for children in lists for child in children[1:]]
    for name, value in (("lr", 0.1), ("weight_decay", 1e-3)):
        factors = np.array([child.settings[name] / value for child in children])
        assert ((factors >= 0.5) & (factors <= 2)).all()
        assert len(set(factors)) == 56
        assert factors.min() < 0.6
        assert factors.max() > 1.7
    ratios = {child.settings["lr"] / child.settings["weight_decay"] for child in children}
    assert len(ratios) == 56


@pytest.mark.parametrize("name", [name for name in METHODS if name != "tuned"])
def test_settings_stay_where_they_are_not_tuned(name):
    children = chapter.make_children(first_child(), METHODS[name], rng_of(0), 1)
    assert {json.dumps(child.settings) for child in children} == {
        json.dumps({"lr": 0.1, "weight_decay": 1e-3})
    }


@pytest.mark.parametrize(("times", "shrinks"), [(1.9, True), (2.0, False), (3.0, False)])
def test_a_network_shrinks_only_above_half_of_the_largest_size(times, shrinks):
    parent = first_child((8, 8))
    limit = times * count_parameters(parent.network)
    drawn = set()
    for seed in range(4):
        children = chapter.make_children(parent, METHODS["shrinking"], rng_of(seed), 2, limit)
        drawn |= {name for child in children for name in child.network.history}
    assert bool(drawn & set(chapter.SHRINKING)) == shrinks
    assert drawn & set(OPERATORS)


# --- one step -------------------------------------------------------------------------------------


class Pretended:
    """A training that gives children the scores of a table, (children, rungs)."""

    def __init__(self, table: Any) -> None:
        self.table, self.calls = np.array(table, dtype=float), []

    def __call__(self, children: list, epochs: float, total: float | None, rung: int) -> list:
        self.calls.append(([child.index for child in children], epochs, total, rung))
        return [
            dataclasses.replace(
                child,
                accuracies=(*child.accuracies, float(self.table[child.index, rung])),
                epochs=child.epochs + epochs,
            )
            for child in children
        ]


NETWORK = random_network([1], 1, 1)


def eight() -> list:
    return [chapter.Child(NETWORK, {"lr": 0.1}, k) for k in range(8)]


def step(table: Any, method: str = "SHR", **how: Any) -> tuple[Any, list, Pretended]:
    train = Pretended(table)
    winner, every = chapter.climb_step(eight(), METHODS[method], train, **how)
    return winner, every, train


TABLES = st.permutations(range(32)).map(lambda p: np.reshape(p, (8, 4)) / 32)


@pytest.mark.parametrize("method", METHODS)
@given(table=TABLES, scale=st.sampled_from([1.0, 0.25]))
@few(20)
def test_the_best_of_a_rung_go_on_to_the_next(method, table, scale):
    winner, every, train = step(table, method, scale=scale)
    left, expected = list(range(8)), []
    total = None if METHODS[method].restarts else 75 * scale
    for rung, (count, epochs) in enumerate(METHODS[method].rungs):
        if rung:
            left = sorted(left, key=lambda k: -table[k, rung - 1])[:count]
        expected.append((sorted(left), scale * epochs, total, rung))
    assert [(sorted(ran), *rest) for ran, *rest in train.calls] == expected
    assert winner.index == max(left, key=lambda k: table[k, rung])
    assert sorted(child.index for child in every) == list(range(8))
    assert sum(child.epochs for child in every) == pytest.approx(160 * scale)


def test_the_winner_is_the_child_as_it_was_trained():
    table = np.zeros((8, 4))
    table[6] = [0.5, 0.25, 0.75, 0.3]
    winner, every, _ = step(table)
    assert (winner.accuracies, winner.epochs) == ((0.5, 0.25, 0.75, 0.3), 75)
    assert any(child is winner for child in every)


@given(TABLES)
@few(20)
def test_losers_that_run_on_do_not_change_what_wins(table):
    usual, _, _ = step(table)
    winner, every, train = step(table, losers=True)
    assert (winner.index, winner.accuracies) == (usual.index, usual.accuracies)
    assert [len(ran) for ran, *_ in train.calls] == [8, 8, 8, 8]
    assert {child.epochs for child in every} == {75}
    for child in every:
        assert child.accuracies == tuple(table[child.index])


def test_losers_cannot_win_however_good_they_become():
    table = np.zeros((8, 4))
    table[:, 0] = np.arange(8) / 10
    table[0, 1:] = 1
    winner, every, _ = step(table, losers=True)
    assert winner.index == 7 or winner.index >= 4
    assert max(every, key=lambda child: child.score).index == 0


def test_children_that_break_down_are_out_and_the_step_goes_on():
    table = np.tile(np.arange(8)[:, None] / 10, 4)
    table[7, 0] = table[6, 1] = table[5, 2] = NAN
    winner, _, train = step(table)
    ran = [sorted(indices) for indices, *_ in train.calls]
    assert ran == [list(range(8)), [3, 4, 5, 6], [4, 5], [4]]
    assert winner.index == 4


def test_a_winner_that_breaks_down_on_the_last_rung_is_none():
    table = np.tile(np.arange(8)[:, None] / 10, 4)
    table[7, 3] = NAN
    winner, _, _ = step(table)
    assert winner.index == 6


def test_when_every_child_breaks_down_the_winner_is_worse_than_all():
    winner, every, _ = step(np.full((8, 4), NAN))
    assert winner.score == -1
    assert len(every) == 8


BROKEN_TABLES = st.tuples(TABLES, SEEDS, st.floats(0.1, 0.8)).map(
    lambda drawn: np.where(rng_of(drawn[1]).random((8, 4)) < drawn[2], NAN, drawn[0])
)


@given(BROKEN_TABLES)
@few(30)
def test_a_child_that_broke_down_is_not_trained_again(table):
    _, _, train = step(table)
    for ran, _, _, rung in train.calls:
        assert not [k for k in ran if np.isnan(table[k, :rung]).any()]


@given(BROKEN_TABLES)
@few(30)
def test_losers_cannot_win_where_children_break_down(table):
    table = np.where(np.isnan(table).cumsum(1) > 0, NAN, table)  # what is broken stays broken
    usual, _, _ = step(table)
    winner, _, _ = step(table, losers=True)
    assert (winner.index, winner.score) == (usual.index, usual.score)


@given(BROKEN_TABLES)
@few(30)
def test_a_child_that_broke_down_wins_only_if_all_did(table):
    winner, every, _ = step(table)
    if any(child.score >= 0 for child in every):
        assert winner.score >= 0
    else:
        assert winner.score == -1


# --- a climb --------------------------------------------------------------------------------------

CLIMB = {
    "steps": 2,
    "scale": 0.02,
    "mutations": 2,
    "widths": (4, 4, 4),
    "largest": 8000,
    "lr": 0.05,
    "seed": 1,
    "number_format": FORMAT,
}
TRAININGS = 1 + 2 * 15


def climb(method: str = "SHR", **changes: Any) -> Any:
    return chapter.hill_climb(DATA, method, **CLIMB | changes)


def lasting(found: Any) -> dict:
    """All of a climb but the clock."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in found.children]
    weights = {k: v.tolist() for k, v in found.best.network.state_dict().items()}
    made = {"rows": rows, "stopped": found.stopped, "weights": weights}
    made |= {"settings": found.best.settings, "is": chapter.describe(found.best.network)}
    return json.loads(json.dumps(made))


@contextlib.contextmanager
def counted_fits(before: Callable[[int, Any], None] = lambda number, data: None) -> Iterator[list]:
    """Count the trainings that complete; `before` is called ahead of each."""
    original, done = chapter.fit, []
    begun = 0

    @functools.wraps(original)
    def counting(model: nn.Module, data: Any, **options: Any) -> Any:
        nonlocal begun
        begun += 1
        before(begun, data)
        history = original(model, data, **options)
        done.append(options)
        return history

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter, "fit", counting)
        yield done


def kill_at(last: int) -> Callable[[int, Any], None]:
    def kill(number: int, data: Any) -> None:
        if number == last:
            raise KeyboardInterrupt

    return kill


@pytest.fixture(scope="module")
def alone() -> Any:
    with counted_fits() as done:
        found = climb()
    assert len(done) == TRAININGS
    return found


def test_a_climb_repeats_bit_for_bit(alone):
    torch.manual_seed(7)
    assert lasting(climb()) == lasting(alone)


def test_another_seed_is_another_climb(alone):
    assert lasting(climb(seed=2)) != lasting(alone)


def test_a_climb_of_more_steps_begins_with_that_of_fewer(alone):
    rows = lasting(climb(steps=1))["rows"]
    assert rows == lasting(alone)["rows"][: len(rows)]


def test_a_step_starts_where_the_last_one_ended(alone):
    rows = alone.children
    winners = [row for row in rows if row["won"]]
    assert [row["step"] for row in winners] == [0, 1, 2]
    history = [name for row in winners for name in row["operators"]]
    assert list(alone.best.network.history) == history
    for number in (1, 2):
        unchanged = next(r for r in rows if (r["step"], r["index"]) == (number, 0))
        assert unchanged["parameters"] == winners[number - 1]["parameters"]
    assert count_parameters(alone.best.network) == winners[-1]["parameters"]


def test_the_best_network_has_the_accuracy_of_its_row(alone):
    (won,) = [row for row in alone.children if row["won"] and row["step"] == 2]
    found = evaluate(alone.best.network, DATA, number_format=FORMAT)
    assert found.accuracy == won["accuracies"][-1] > 0.1


@pytest.mark.parametrize("method", ["NASH", "SH", "larger first budget", "shrinking"])
def test_a_step_has_one_winner_and_spends_160_epochs(method):
    found = climb(method, steps=1, scale=0.01)
    steps = [row["step"] for row in found.children]
    assert Counter(steps) == {0: 1, 1: 8}
    for number in (0, 1):
        assert sum(row["won"] for row in found.children if row["step"] == number) == 1
    assert found.spent("epochs") == pytest.approx(0.01 * (20 + 160))
    assert found.spent("seconds") > 0
    assert found.stopped == "steps"
    rungs = METHODS[method].rungs
    reached = sorted(len(row["accuracies"]) for row in found.children if row["step"])
    expected = sorted(sum(count > place for count, _ in rungs) for place in range(8))
    assert reached == expected


def test_losers_are_trained_to_the_end_without_a_chance(alone):
    found = climb(losers=True, steps=1)
    usual = [row for row in alone.children if row["step"] == 1]
    rows = [row for row in found.children if row["step"] == 1]
    assert [row["won"] for row in rows] == [row["won"] for row in usual]
    assert {len(row["accuracies"]) for row in rows} == {4}
    for row, other in zip(rows, usual):
        assert row["accuracies"][: len(other["accuracies"])] == other["accuracies"]


def test_children_of_a_tuned_climb_are_trained_with_their_settings():
    with counted_fits() as done:
        found = climb("tuned", steps=1)
    rates = {row["lr"] for row in found.children}
    assert len(rates) == 8
    assert {options["lr"] for options in done} == rates
    won = next(row for row in found.children if row["won"] and row["step"])
    assert found.best.settings == {name: won[name] for name in ("lr", "weight_decay")}


def test_options_are_those_of_fit():
    with counted_fits() as done:
        climb(steps=0, batch_size=37, mixup=0.5)
    assert [(options["batch_size"], options["mixup"]) for options in done] == [(37, 0.5)]


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_climb_in_a_folder_is_the_same(tmp_path, alone, channels_last):
    form = NumberFormat("float32", channels_last)
    expected = climb(number_format=form) if channels_last else alone
    with counted_fits() as done:
        found = climb(folder=tmp_path, number_format=form)
    assert len(done) == TRAININGS
    assert lasting(found) == lasting(expected)


@pytest.mark.parametrize("last", [7, 17])
def test_a_climb_that_was_killed_goes_on(tmp_path, alone, last):
    with counted_fits(kill_at(last)), pytest.raises(KeyboardInterrupt):
        climb(folder=tmp_path)
    with counted_fits() as done:
        found = climb(folder=str(tmp_path))
    assert len(done) == TRAININGS - (last - 1)
    assert lasting(found) == lasting(alone)


def test_a_climb_that_is_complete_trains_nothing_again(tmp_path, alone):
    climb(folder=tmp_path, steps=1)
    with counted_fits() as done:
        assert lasting(climb(folder=tmp_path)) == lasting(alone)
        assert len(done) == 15
        again = climb(folder=tmp_path)
    assert len(done) == 15
    assert lasting(again) == lasting(alone)
    assert again.spent("seconds") > 0


@pytest.mark.parametrize("write", [5, 20], ids=lambda write: f"write {write}")
def test_a_climb_that_was_killed_while_it_wrote_goes_on(tmp_path, alone, write, monkeypatch):
    """Of the writes of a step, 15 are children; the others drop the weights of those that lost."""
    original, count = torch.save, 0

    def killed_half_way(state: Any, path: Path) -> None:
        nonlocal count
        count += 1
        original(state, path)
        if count == write:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed_half_way)
    with pytest.raises(KeyboardInterrupt):
        climb(folder=tmp_path)
    monkeypatch.undo()
    assert lasting(climb(folder=tmp_path)) == lasting(alone)


def test_other_climbs_may_share_the_folder(tmp_path, alone):
    for changes in ({"seed": 2}, {"scale": 0.01}, {"widths": (5, 4, 4)}, {"lr": 0.01}):
        climb(folder=tmp_path, steps=0, **changes)
    climb("SH", folder=tmp_path, steps=0)
    climb(folder=tmp_path, steps=0, losers=True)
    with counted_fits() as done:
        found = climb(folder=tmp_path)
    assert len(done) == TRAININGS
    assert lasting(found) == lasting(alone)


def test_climbs_trained_with_other_options_may_share_the_folder(tmp_path):
    climb(folder=tmp_path, steps=0, batch_size=64)
    expected, found = climb(steps=0), climb(folder=tmp_path, steps=0)
    assert lasting(found) == lasting(expected)


OTHER_PROCESS = """
import json, sys, time
from pathlib import Path
import test_chapter_03 as tests

tests.torch.set_num_threads(1)
folder = Path(sys.argv[1])
with tests.counted_fits(tests.in_no_hurry) as done:
    (folder / "ready").touch()
    found = tests.climb(folder=folder)
print(json.dumps([len(done), tests.lasting(found)]))
"""


def in_no_hurry(number: int, data: Any) -> None:
    time.sleep(0.03)


def test_two_processes_share_a_climb(tmp_path, alone):
    environment = os.environ | {"JAHS_BOOK": str(BOOK), "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)],
        cwd=Path(__file__).parent,
        env=environment,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        while not (tmp_path / "ready").exists():
            assert other.poll() is None
            time.sleep(0.05)
        with counted_fits(in_no_hurry) as done:
            found = climb(folder=tmp_path)
        printed, _ = other.communicate(timeout=60)
    finally:
        other.kill()
    others, theirs = json.loads(printed)
    assert lasting(found) == theirs == lasting(alone)
    assert len(done) + others == TRAININGS
    assert min(len(done), others) > 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "SHRR"}, r"unknown method 'SHRR'.*NASH, SH, SHR, SHRSep"),
        ({"largest": 300}, r"vanilla model has 398 parameters.*300: raise largest"),
        ({"scale": 0}, "scale must be .* 0"),
        ({"scale": -1.0}, "scale must be .* -1.0"),
        ({"scale": NAN}, "scale must be .* nan"),
        ({"lr": 0}, "lr must be .* 0"),
    ],
    ids=str,
)
def test_a_climb_that_cannot_be_is_refused(changes, message):
    with counted_fits() as done, pytest.raises(ValueError, match=message):
        climb(**changes)
    assert done == []


@pytest.mark.parametrize("seconds", [0, 1e-9])
def test_after_its_time_no_step_begins(seconds):
    found = climb(seconds=seconds)
    assert found.stopped == "seconds"
    assert [row["step"] for row in found.children] == [0]


def test_a_climb_of_which_all_children_are_too_large_says_so(monkeypatch):
    inserting = METHODS["SHR"]._replace(chances={"insert convolution": 1.0})
    monkeypatch.setitem(METHODS, "SHR", inserting)
    size = count_parameters(digits_network())
    found = climb(largest=size, mutations=1)
    message = f"200 draws gave 0 children of at most {size} parameters, 7 are needed"
    assert found.stopped == message
    assert [row["step"] for row in found.children] == [0]


def test_no_network_of_a_climb_is_larger_than_allowed(alone):
    assert max(row["parameters"] for row in alone.children) <= CLIMB["largest"]
    assert climb(largest=1500, steps=1).stopped == "steps"


def broken_rows(found: Any) -> list:
    return [row for row in found.children if np.isnan(row["accuracies"]).any()]


def test_a_climb_of_which_every_child_breaks_down_says_so(tmp_path):
    for folder in (None, tmp_path, tmp_path):
        found = climb(lr=1e20, folder=folder)
        assert found.stopped == "every child broke down"
        assert len(broken_rows(found)) == len(found.children) == 9
        assert [row["step"] for row in found.children if row["won"]] == [0, 1]


def out_of_memory(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory")


def test_a_child_without_memory_has_broken_down_and_the_clock_goes_on():
    found = climb(loss=out_of_memory)
    assert found.stopped == "every child broke down"
    assert len(broken_rows(found)) == len(found.children)
    assert math.isfinite(found.spent("seconds"))


def test_one_child_without_memory_does_not_end_the_climb(alone):
    """Children of more parameters than the second largest are too large for the memory."""
    sizes = sorted({row["parameters"] for row in alone.children if row["step"] == 1})
    limit = sizes[-2]

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if count_parameters(model) > limit:
            raise torch.OutOfMemoryError("no memory")
        return nn.functional.cross_entropy(model(images).float(), labels)

    found = climb(loss=loss, steps=1)
    assert found.stopped == "steps"
    assert {row["parameters"] > limit for row in broken_rows(found)} == {True}
    assert any(row["won"] for row in found.children if row["step"] == 1)


# --- units ----------------------------------------------------------------------------------------

UNIT = {
    "data": "digits",
    "method": "SHR",
    "seed": 1,
    "lr": 0.05,
    "final_lr": 0.1,
    "scale": 0.01,
    "steps": 1,
    "mutations": 2,
    "widths": [4, 4, 4],
    "largest": 8000,
}
HOW = {key: value for key, value in UNIT.items() if key not in {"data", "method", "final_lr"}}


def as_json(metrics: dict) -> dict:
    return json.loads(json.dumps(_plain(metrics), allow_nan=False))


@pytest.fixture(scope="module")
def climbed() -> dict:
    return as_json(chapter.climb_and_test(**UNIT))


def test_a_climb_and_test_describes_what_it_found(climbed):
    network, rows = chapter.rebuild(climbed["architecture"]), json.loads(climbed["children"])
    assert climbed["parameters"] == count_parameters(network)
    assert climbed["stopped"] == "steps"
    assert climbed["epochs"] == pytest.approx(0.01 * 180)
    assert climbed["seconds"] > 0
    assert Counter(row["step"] for row in rows) == {0: 1, 1: 8}
    keys = {"lr", "weight_decay", "step", "index", "operators", "parameters", "accuracies"}
    assert set(rows[0]) == keys | {"epochs", "won"}
    shares = {k.removesuffix("_share"): v for k, v in climbed.items() if k.endswith("_share")}
    assert shares == pytest.approx(chapter.layer_shares(network))


def test_what_a_climb_found_is_trained_on_all_images_and_tested(climbed):
    found = chapter.hill_climb(chapter.held_out_data("digits"), "SHR", **HOW)
    history = fit(found.best.network, load("digits"), epochs=2, lr=0.1, seed=1)
    assert climbed["accuracy"] == history.final("eval_accuracy") > 0.15
    assert climbed["architecture"] == chapter.describe(found.best.network)


def test_a_climb_that_is_tested_leaves_nothing_behind(climbed):
    assert list((cache_folder() / "climbs").iterdir()) == []


def timeless(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name != "seconds"}


def test_a_unit_that_was_killed_in_its_climb_goes_on(climbed):
    with counted_fits(kill_at(6)), pytest.raises(KeyboardInterrupt):
        chapter.climb_and_test(**UNIT)
    with counted_fits() as done:
        assert timeless(as_json(chapter.climb_and_test(**UNIT))) == timeless(climbed)
    assert len(done) == 17 - 5


def test_a_unit_that_was_killed_in_its_test_keeps_its_climb(climbed):
    with counted_fits(kill_at(17)), pytest.raises(KeyboardInterrupt):
        chapter.climb_and_test(**UNIT)
    with counted_fits() as done:
        assert timeless(as_json(chapter.climb_and_test(**UNIT))) == timeless(climbed)
    assert len(done) == 1


def test_an_augmented_climb_augments_all_its_trainings():
    with counted_fits() as done:
        chapter.climb_and_test(**UNIT | {"augmented": True, "steps": 0})
    assert len(done) == 2
    for options in done:
        assert options["mixup"] == 1
        assert options["augment"].keywords == {"crop": 4, "flip": True, "cutout": 16}


def test_the_final_learning_rate_follows_that_of_the_winner():
    with counted_fits() as done:
        found = chapter.climb_and_test(**UNIT | {"method": "tuned"})
    won = [row for row in json.loads(found["children"]) if row["won"]][-1]
    assert done[-1]["lr"] == pytest.approx(won["lr"] / 0.05 * 0.1)
    assert done[-1]["weight_decay"] == pytest.approx(won["weight_decay"])


def test_hours_limit_a_climb_that_is_tested():
    assert chapter.climb_and_test(**UNIT | {"hours": 1e-12})["stopped"] == "seconds"


def test_a_race_has_an_entry_for_each_child_on_all_rungs():
    found = as_json(chapter.race_losers(**HOW, data="digits", method="SH"))
    assert set(found) == {"step", "index", "parameters", "accuracies", "won"}
    assert found["step"] == 8 * [1]
    assert sorted(found["index"]) == list(range(8))
    assert {len(accuracies) for accuracies in found["accuracies"]} == {4}
    assert sum(found["won"]) == 1
    assert len(found["parameters"]) == 8


INHERITANCE = {"data": "digits", "seed": 1, "widths": [6, 6, 6], "lr": 0.1}
INHERITANCE |= {"parent_epochs": 4, "child_epochs": 0.5}


@pytest.fixture(scope="module")
def inheritance() -> dict:
    return as_json(chapter.compare_inheritance(**INHERITANCE))


def test_a_child_is_born_with_the_accuracy_of_its_parent(inheritance):
    assert inheritance["at_birth"] == inheritance["parent"] > 0.2


def test_an_inheritance_has_a_child_of_five_operators(inheritance):
    arms = {"inherited", "scratch", "scratch_long"}
    assert set(inheritance) == arms | {"parent", "at_birth", "operators", "parameters"}
    assert len(inheritance["operators"]) == 5
    assert all(0 < inheritance[arm] <= 1 for arm in arms)


def test_who_learns_from_scratch_has_the_epochs_of_the_child_or_of_both():
    with counted_fits() as done:
        chapter.compare_inheritance(**INHERITANCE)
    assert [options["epochs"] for options in done] == [4, 0.5, 0.5, 4.5]


@pytest.mark.parametrize("method", ["SH", "SHR"])
def test_a_trace_follows_a_child_through_all_rungs(method):
    settings_ = {"data": "digits", "seed": 1, "widths": [4, 4, 4], "lr": 0.05}
    found = as_json(chapter.trace_rungs(**settings_, method=method, scale=0.2))
    assert set(found) == {"parent", "epochs", "rates", "accuracies"}
    assert len(found["epochs"]) == len(found["rates"]) == len(found["accuracies"]) == 15
    assert found["epochs"] == list(range(1, 16))  # 1, 2, 4 and 8 epochs
    ends = [found["rates"][k - 1] for k in (1, 3, 7)]
    if method == "SHR":
        assert max(ends) < 0.1 * 0.05
    else:
        expected = [0.05 * cosine((k - 0.1) / 15, k) for k in (1, 3, 7)]
        assert ends == pytest.approx(expected, rel=1e-2)
    assert found["rates"][-1] < 0.01 * 0.05
    assert all(0 < accuracy <= 1 for accuracy in found["accuracies"])


@given(starts(), SEEDS, st.integers(0, 10))
@few(20)
def test_shares_of_layers_count_every_layer_once(start, seed, n):
    network = ready(start, seed, n)
    kinds = Counter(type(network[k]).__name__ for k in network.inputs)
    total = sum(kinds[k] for k in kinds if k not in {"BatchNorm2d", "ReLU", "GlobalPool"})
    assert chapter.layer_shares(network) == {
        "conv": kinds["Conv2d"] / total,
        "separable": kinds["SeparableConv"] / total,
        "merge": (kinds["Concat"] + kinds["ConvexSum"]) / total,
        "other": (kinds["MaxPool2d"] + kinds["Linear"]) / total,
    }
    assert sum(chapter.layer_shares(network).values()) == pytest.approx(1)


def test_half_of_the_layers_of_the_vanilla_model_are_convolutions():
    shares = chapter.layer_shares(chapter.vanilla_model())
    assert shares == {"conv": 0.5, "separable": 0, "merge": 0, "other": 0.5}


# --- tables of recorded rows ----------------------------------------------------------------------


@given(starts(), SEEDS, st.integers(0, 8))
@few(10)
def test_layers_are_counted_as_the_report_counts_them(start, seed, n):
    network = ready(start, seed, n)
    network.history = ("insert convolution", *network.history)
    row = {"method": "SH", "seed": 0, "accuracy": 0.9, "architecture": chapter.describe(network)}
    (counted,) = chapter.count_layers(pd.DataFrame([row])).to_dict("records")
    kinds = Counter(type(network[k]).__name__ for k in network.inputs)
    blocks = 3 * (kinds["Conv2d"] + kinds["SeparableConv"])
    joins = kinds["Concat"] + kinds["ConvexSum"]
    total = blocks + joins + kinds["MaxPool2d"] + 1
    assert counted["convolution"] + counted["separable"] == pytest.approx(100 * blocks / total)
    assert counted["merge"] == pytest.approx(100 * joins / total)
    splits = network.history.count("split convolution")
    assert counted["split"] == pytest.approx(100 * splits / total)


def test_the_better_networks_of_a_method_are_above_its_median():
    architecture = chapter.describe(digits_network())
    accuracies = {"NASH": [0.8, 0.9], "SH": [0.1, 0.2, 0.3]}
    rows = [
        {"method": method, "seed": k, "accuracy": accuracy, "architecture": architecture}
        for method, values in accuracies.items()
        for k, accuracy in enumerate(values)
    ]
    better = chapter.count_layers(pd.DataFrame(rows))["better"]
    assert better.tolist() == [False, True, False, False, True]


def test_the_table_of_steps_follows_winners_and_counts_their_epochs(climbed):
    rows = pd.DataFrame([climbed | {"method": "SHR", "seed": 1}])
    (step,) = chapter.step_table(rows).to_dict("records")
    children = json.loads(climbed["children"])
    (winner,) = [c for c in children if c["won"] and c["step"] == 1]
    born = [c for c in children if c["step"] == 1]
    assert step["parent"] == pytest.approx(100 * children[0]["accuracies"][-1])
    assert step["best"] == pytest.approx(100 * winner["accuracies"][-1])
    assert step["lineage"] == pytest.approx(0.01 * (20 + 75))
    assert step["first"] == pytest.approx(100 * np.mean([c["accuracies"][0] for c in born]))
    sizes = {
        out: stats.gmean([c["parameters"] for c in born if (len(c["accuracies"]) == 1) == out])
        for out in (True, False)
    }
    assert step["out_larger"] == pytest.approx(100 * (sizes[True] / sizes[False] - 1))


def test_the_table_of_races_knows_who_should_have_won():
    race = {
        "method": "SH",
        "seed": 0,
        "step": [1, 1, 1],
        "parameters": [10, 20, 30],
        "accuracies": [[0.5, 0.6], [0.4, 0.7], [0.3, 0.8]],
        "won": [False, True, False],
    }
    (found,) = chapter.race_table(pd.DataFrame([race])).to_dict("records")
    assert (found["right"], found["place"]) == (False, 3)
    assert found["lost"] == pytest.approx(10)
    assert found["agreement"] == found["size_first"] == pytest.approx(-1)
    assert found["size_last"] == pytest.approx(1)


def test_the_ends_of_rungs_have_drops():
    accuracies = [0.5, 0.4, 0.6, 0.55, 0.6, 0.6, 0.7] + 8 * [0.75]
    row = {"method": "SHR", "seed": 0, "scale": 0.2, "parent": 0.45, "accuracies": accuracies}
    found = chapter.rung_ends(pd.DataFrame([row | {"epochs": list(range(1, 16))}]))
    assert found["drop"].tolist() == pytest.approx([10, 5, -5])
    assert found["gap"].tolist() == pytest.approx(3 * [5])
    assert found["last"].tolist() == pytest.approx(3 * [75])


AUGMENTATION = {"data": "digits", "seed": 1, "widths": [4, 4, 4], "lr": 0.05, "epochs": 0.2}


@pytest.mark.parametrize("added", [[], ["cutout"], ["mixup", "shift"]], ids=str)
def test_a_vanilla_model_is_trained_with_flips_and_what_is_added(added):
    with counted_fits() as done:
        found = chapter.train_augmented(**AUGMENTATION, added=added)
    (options,) = done
    crop, cutout = 4 * ("shift" in added), 16 * ("cutout" in added)
    assert options["augment"].keywords == {"flip": True, "crop": crop, "cutout": cutout}
    assert options["mixup"] == ("mixup" in added)
    assert found["count"] == len(added)
    assert 0 < found["accuracy"] <= 1


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match=r"unknown augmentation 'cutuot'.*did you mean 'cutout'"):
        chapter.train_augmented(**AUGMENTATION, added=["cutuot"])


# --- grids ----------------------------------------------------------------------------------------

GRIDS = grids_of(chapter)


@pytest.mark.parametrize(("experiment", "profile"), GRIDS)
def test_every_key_names_a_method_and_settings_of_a_climb(experiment, profile):
    climbing = inspect.signature(chapter.hill_climb).parameters
    for key in experiment.keys(profile):
        bound = inspect.signature(experiment.unit).bind(**key)
        assert set(bound.arguments.get("settings", {})) <= set(climbing)
        assert key.get("method", "SHR") in METHODS


@pytest.mark.parametrize(("experiment", "profile"), GRIDS)
def test_no_climb_starts_beyond_its_limit(experiment, profile):
    for key in experiment.keys(profile):
        smallest = count_parameters(chapter.vanilla_model(3, 10, 32, key["widths"]))
        assert smallest <= key.get("largest", INF)


def test_the_quick_grids_take_the_small_images():
    keys = [k for e in chapter.EXPERIMENTS.values() for k in e.grids.get("quick", [])]
    assert {key["data"] for key in keys} == {"fashion_mnist_mini"}


@pytest.mark.parametrize(
    ("profile", "data", "seeds"),
    [("standard", "fashion_mnist", 4), ("gpu", "cifar10", 4), ("paper", "cifar10", 8)],
)
def test_the_four_methods_of_the_slides_climb_from_as_many_seeds(profile, data, seeds):
    keys = chapter.EXPERIMENTS["climb"].keys(profile)
    assert {key["data"] for key in keys} == {data}
    expected = {(m, s) for m in ("NASH", "SH", "SHR", "SHRSep") for s in range(seeds)}
    assert {(key["method"], key["seed"]) for key in keys} == expected
    assert len(keys) == 4 * seeds


@pytest.mark.parametrize("profile", ["standard", "paper"])
def test_methods_of_one_seed_differ_in_the_method_only(profile):
    keys = [
        {k: v for k, v in key.items() if k not in {"method", "seed"}}
        for name in ("climb", "after")
        for key in chapter.EXPERIMENTS[name].keys(profile)
    ]
    assert len(keys) > 8
    assert all(key == keys[0] for key in keys)


def test_the_paper_profile_has_the_numbers_of_the_report():
    key = chapter.EXPERIMENTS["climb"].keys("paper")[0]
    assert (key["scale"], key["widths"], key["lr"]) == (1.0, [64, 128, 256], 0.01)
    assert (key["largest"], key["final_lr"], key["augmented"]) == (20_000_000, 0.025, True)
