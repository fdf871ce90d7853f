"""The exported code of chapters/05_smash.ipynb."""

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from properties import SEEDS, few
from scipy import stats
from test_grids import grids_of
from torch import Tensor, nn

from jahs_utils import load, load_chapter
from jahs_utils.data import DATASETS
from jahs_utils.experiments import Results, describe_row, results_path
from jahs_utils.networks import count_parameters
from jahs_utils.plots import new_figure

pytestmark = pytest.mark.usefixtures("on_the_cpu")
chapter = load_chapter("05_smash")
Op, Block, Space = chapter.Op, chapter.Block, chapter.Space
NAN, INF = math.nan, math.inf
# Besides the two of the book: one with hardly any freedom, one without a second bank or kernel.
SPACES = chapter.SPACES | {
    "narrow": Space(2, 2, 2, 4, 6, (1, 2), ((1, 1), (3, 2)), (1, 2)),
    "one bank": Space(1, 1, 1, 3, 2, (1, 3), ((3, 1),), (1,)),
}
SMALL, PAPER, NARROW = SPACES["small"], SPACES["paper"], SPACES["narrow"]
TINY_HYPER = {"growth": 2, "stages": (1, 1)}


ANY_SPACE = st.sampled_from(sorted(SPACES))


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def sampled(seed: int, space: Any = SMALL) -> Any:
    return chapter.sample_architecture(rng_of(seed), space)


def many(count: int, space: Any, seed: int = 0) -> Iterator[Any]:
    rng = rng_of(seed)
    return (chapter.sample_architecture(rng, space) for _ in range(count))


def ops_of(architecture: Any) -> list[tuple[Any, Any]]:
    """(block, op) in the order in which they run."""
    return [(block, op) for block in architecture for op in block.ops]


def random_numbers(seed: int, *shape: int) -> Tensor:
    return torch.tensor(rng_of(seed).normal(size=shape))


def refuses(call: Callable[[], object], *words: object) -> None:
    """It raises a ValueError of one line that has these words."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def is_plain(row: dict) -> bool:
    return json.loads(json.dumps(row)) == row


# --- architectures: sampling ----------------------------------------------------------------------


@given(SEEDS, ANY_SPACE)
@few(100)
def test_a_sampled_architecture_is_legal(seed, name):
    architecture = sampled(seed, SPACES[name])
    chapter.check_architecture(architecture, SPACES[name])
    assert len(architecture) == SPACES[name].blocks


@given(SEEDS)
@few(20)
def test_a_seed_samples_one_architecture(seed):
    assert sampled(seed) == sampled(seed)
    assert sampled(seed) != sampled(seed + 1)


def test_an_architecture_is_plain_data():
    for architecture in many(30, SMALL):
        as_lists = [dataclasses.asdict(block) for block in architecture]
        assert json.loads(json.dumps(as_lists)) == json.loads(repr_as_json(as_lists))
        assert hash(architecture) == hash(copy.deepcopy(architecture))
        for _, op in ops_of(architecture):
            assert all(type(there) is bool for there in op.active)
            numbers = (*op.reads, *op.writes, op.units, op.kernel, op.dilation, op.groups)
            assert all(type(number) is int for number in numbers)


def repr_as_json(value: object) -> str:
    text = repr(value).replace("(", "[").replace(",)", "]").replace(")", "]")
    return text.replace("'", '"').replace("True", "true").replace("False", "false")


@given(SEEDS, ANY_SPACE)
@few(60)
def test_sampled_ops_read_filled_banks_and_fill_new_ones_in_order(seed, name):
    for block in sampled(seed, SPACES[name]):
        filled = [0]
        for op in block.ops:
            assert set(op.reads) <= set(filled)
            for bank in op.writes:
                if bank not in filled:
                    assert bank == len(filled)
                    filled.append(bank)


def subsets(banks: int) -> set[tuple[int, ...]]:
    sizes = range(1, banks + 1)
    return {c for size in sizes for c in itertools.combinations(range(banks), size)}


@pytest.mark.parametrize("name", ["small", "narrow", "one bank"])
def test_all_that_a_space_has_is_sampled(name):
    space = SPACES[name]
    blocks = [block for architecture in many(1500, space) for block in architecture]
    ops = [op for block in blocks for op in block.ops]

    def seen(*names: str, where: Sequence[Any] = ops) -> set:
        return {tuple(getattr(x, n) for n in names) for x in where}

    assert seen("banks", where=blocks) == {(k,) for k in range(1, space.banks + 1)}
    steps = range(space.unit, space.channels + 1, space.unit)
    assert seen("channels", where=blocks) == {(k,) for k in steps}
    assert {len(b.ops) for b in blocks} == {*range(space.ops[0], space.ops[1] + 1)}
    steps = range(space.unit, space.units + 1, space.unit)
    assert seen("units") == {(k,) for k in steps}
    patterns = itertools.product((False, True), repeat=4)
    assert seen("active") == {(p,) for p in patterns if any(p)}
    kernels = {(side, d + 1) for side, widest in space.kernels for d in range(widest)}
    assert seen("kernel", "dilation") == kernels
    assert seen("groups") == {(g,) for g in space.groups}
    assert seen("reads") == {(banks,) for banks in subsets(space.banks)}
    assert seen("writes") == {(banks,) for banks in subsets(space.banks)}


def test_few_banks_are_written_more_often_than_many():
    ops = [op for a in many(300, PAPER) for _, op in ops_of(a)]
    counts = np.bincount([len(op.writes) for op in ops], minlength=5)[1:]
    assert (np.diff(counts) < 0).all()


# --- architectures: what is legal -----------------------------------------------------------------

PLAIN = Op((0,), (0,), 4)


def with_op(**changes: object) -> Any:
    """Three blocks of two ops; op 1 of block 2 is changed."""
    block = Block(2, 8, (PLAIN, PLAIN))
    return (block, block, Block(2, 8, (PLAIN, dataclasses.replace(PLAIN, **changes))))


ANYWHERE = [
    ({"reads": ()}, "reads ()"),
    ({"reads": (0, 0)}, "reads (0, 0)"),
    ({"reads": (1, 0)}, "reads (1, 0)"),
    ({"reads": (-1,)}, "reads bank -1"),
    ({"reads": (2,)}, "reads bank 2, there are 2"),
    ({"reads": (1,)}, "reads bank 1, which is empty"),
    ({"writes": ()}, "writes ()"),
    ({"writes": (1, 1)}, "writes (1, 1)"),
    ({"writes": (1, 0)}, "writes (1, 0)"),
    ({"writes": (-1,)}, "writes bank -1"),
    ({"writes": (0, 3)}, "writes bank 3, there are 2"),
    ({"active": (False,) * 4}, "active (False, False, False, False)"),
    ({"active": ()}, "active ()"),
    ({"active": (True,) * 3}, "active (True, True, True)"),
    ({"active": (True,) * 5}, "active (True, True, True, True, True)"),
    ({"units": 0}, "units 0"),
    ({"units": -4}, "units -4"),
    ({"kernel": 0}, "kernel 0"),
    ({"kernel": 2}, "kernel 2"),
    ({"kernel": -3}, "kernel -3"),
    ({"dilation": 0}, "dilation 0"),
    ({"dilation": -1}, "dilation -1"),
    ({"groups": 0}, "groups 0"),
    ({"groups": -1}, "groups -1"),
    ({"groups": 3}, "3 groups do not divide 4 and 8"),
    ({"units": 6, "groups": 4}, "4 groups do not divide 6 and 8"),
    ({"units": 16, "groups": 16}, "16 groups do not divide 16 and 8"),
]
OF_SMALL = [
    ({"kernel": 7}, "kernel 7"),
    ({"kernel": 1}, "kernel 1"),
    ({"dilation": 3}, "dilation 3 is above 2"),
    ({"kernel": 5, "dilation": 2}, "dilation 2 is above 1"),
    ({"groups": 8, "units": 8}, "8 groups"),
    ({"units": 6}, "6 units"),
    ({"units": 36}, "36 units"),
]


@pytest.mark.parametrize(("changes", "words"), ANYWHERE)
def test_a_rule_that_is_broken_anywhere_is_named_with_block_and_op(changes, words):
    architecture = with_op(**changes)
    refuses(lambda: chapter.check_architecture(architecture), "block 2", "op 1", words)
    refuses(lambda: chapter.check_architecture(architecture, SMALL), "block 2", "op 1", words)
    assert not chapter.is_legal(architecture, None)


@pytest.mark.parametrize(("changes", "words"), OF_SMALL)
def test_what_a_space_lacks_is_named_with_block_and_op(changes, words):
    architecture = with_op(**changes)
    chapter.check_architecture(architecture)
    refuses(lambda: chapter.check_architecture(architecture, SMALL), "block 2", "op 1", words)
    assert not chapter.is_legal(architecture, SMALL)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"banks": 4}, "4 banks"),
        ({"channels": 20}, "20 channels"),
        ({"channels": 6}, "6 channels"),
        ({"ops": (PLAIN,) * 4}, "4 ops"),
    ],
)
def test_a_block_that_a_space_does_not_have_is_named(changes, words):
    blocks = list(with_op())
    blocks[1] = dataclasses.replace(blocks[1], **changes)
    chapter.check_architecture(tuple(blocks))
    refuses(lambda: chapter.check_architecture(tuple(blocks), SMALL), "block 1", words)


@pytest.mark.parametrize("changes", [{"banks": 0}, {"channels": 0}, {"ops": ()}, {"channels": -4}])
@pytest.mark.parametrize("space", [None, SMALL])
def test_a_block_needs_banks_channels_and_ops(changes, space):
    block = dataclasses.replace(Block(1, 8, (PLAIN,)), **changes)
    refuses(lambda: chapter.check_architecture((block,) * 3, space), "block 0")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_space_has_a_number_of_blocks(count):
    blocks = (Block(1, 8, (PLAIN,)),) * count
    refuses(lambda: chapter.check_architecture(blocks, SMALL), f"{count} blocks", 3)


def test_an_architecture_has_a_block():
    refuses(lambda: chapter.check_architecture(()))


@pytest.mark.parametrize(
    "changes",
    [{"kernel": NAN}, {"kernel": 3.0}, {"dilation": NAN}, {"dilation": 1.5}, {"units": 4.0}],
)
def test_sizes_of_an_op_are_integers(changes):
    refuses(lambda: chapter.check_architecture(with_op(**changes)), "block 2", "op 1")


BANKS = st.lists(st.integers(0, 3), max_size=3).map(tuple)
SOME_OPS = st.builds(
    Op,
    BANKS,
    BANKS,
    st.sampled_from([0, 3, 4, 8, 36]),
    st.lists(st.booleans(), min_size=4, max_size=4).map(tuple),
    st.sampled_from([2, 3, 5, 7]),
    st.integers(0, 3),
    st.sampled_from([0, 1, 2, 3, 4, 8]),
)


def is_fine(op: Any, channels: int, banks: int, filled: set[int]) -> bool:
    """The rules of any space, said differently."""
    out = channels * len(op.writes)
    return (
        all(0 <= bank < banks for bank in (*op.reads, *op.writes))
        and all(list(x) == sorted(set(x)) and len(x) > 0 for x in (op.reads, op.writes))
        and filled.issuperset(op.reads)
        and sum(op.active) > 0
        and op.units > 0
        and op.kernel % 2 == 1
        and op.dilation > 0
        and op.groups > 0
        and math.gcd(op.units, out, op.groups) == op.groups
    )


def is_of_small(op: Any) -> bool:
    return (
        op.units in range(4, 33, 4)
        and (op.kernel, op.dilation) in {(3, 1), (3, 2), (5, 1)}
        and op.groups in {1, 2, 4}
    )


@given(SOME_OPS, SOME_OPS)
@few(400)
def test_an_architecture_is_legal_when_all_rules_hold(first, second):
    block = Block(3, 8, (first, second))
    fine = is_fine(first, 8, 3, {0}) and is_fine(second, 8, 3, {0, *first.writes})
    assert chapter.is_legal((block,), None) == fine
    space = dataclasses.replace(SMALL, blocks=1)
    small = fine and is_of_small(first) and is_of_small(second)
    assert chapter.is_legal((block,), space) == small


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": 4},  # 8 groups do not divide it
        {"units": 4},
        {"kernels": ((4, 1),)},
        {"ops": (0, 1)},
        {"ops": (3, 2)},
        {"blocks": 0},
        {"unit": 0},
        {"groups": (3,)},
        {"kernels": ((3, 0),)},
        {"kernels": ((3, 1), (3, 2))},
        {"kernels": ()},
        {"groups": ()},
        {"channels": 60},
        {"units": NAN},
        {"banks": 1.5},
        {"kernels": ((3, NAN),)},
    ],
)
def test_a_space_that_cannot_be_is_refused(changes):
    refuses(lambda: Space(**changes), *changes)


# --- architectures: mutations ---------------------------------------------------------------------


@given(SEEDS, st.sampled_from(["small", "narrow", "paper"]), st.floats(0.02, 0.4))
@few(60)
def test_a_mutation_is_legal_different_and_of_the_same_sizes(seed, name, chance):
    space = SPACES[name]
    architecture = sampled(seed, space)
    kept = copy.deepcopy(architecture)
    found = chapter.mutate(architecture, rng_of(seed), space, chance)
    chapter.check_architecture(found, space)
    assert found != architecture
    assert architecture == kept
    sizes = [[(b.banks, b.channels, len(b.ops)) for b in a] for a in (architecture, found)]
    assert sizes[0] == sizes[1]
    assert found == chapter.mutate(architecture, rng_of(seed), space, chance)


def changed_fields(before: Any, after: Any) -> list[set[str]]:
    """For each op, the names of fields that are not the same."""
    names = [field.name for field in dataclasses.fields(Op)]
    pairs = [(a, b) for (_, a), (_, b) in zip(ops_of(before), ops_of(after))]
    return [{n for n in names if getattr(a, n) != getattr(b, n)} for a, b in pairs]


def test_mutations_reach_every_field():
    seen = set()
    for seed in range(60):
        architecture = sampled(seed)
        found = chapter.mutate(architecture, rng_of(seed), SMALL, 0.3)
        seen.update(*changed_fields(architecture, found))
    assert seen == {field.name for field in dataclasses.fields(Op)}


def test_a_larger_chance_changes_more():
    def changes(chance: float) -> int:
        pairs = [(a, chapter.mutate(a, rng_of(1), SMALL, chance)) for a in many(40, SMALL)]
        return sum(len(names) for pair in pairs for names in changed_fields(*pair))

    assert changes(0.02) < changes(0.2) < changes(0.6)


@pytest.mark.parametrize("chance", [0, -0.1, 1.01, NAN, INF, -INF])
def test_a_chance_that_is_none_is_refused(chance):
    refuses(lambda: chapter.mutate(sampled(0), rng_of(0), SMALL, chance), "chance", chance)


def test_a_space_with_a_single_architecture_has_no_mutation():
    space = Space(1, 1, 1, 1, 1, (1, 1), ((1, 1),), (1,))
    lone = (Block(1, 1, (Op((0,), (0,), 1, (True,) * 4, 1),)),)
    first = chapter.mutate(lone, rng_of(0), space, 0.5)
    assert first[0].ops[0].active != (True,) * 4
    refuses(lambda: chapter.mutate(lone, rng_of(0), space, 1e-12), "no mutation", 1e-12)


def test_every_field_can_be_drawn_again_at_once():
    for seed in range(3):
        chapter.mutate(sampled(seed, PAPER), rng_of(seed), PAPER, 1.0)


def test_what_is_of_another_space_cannot_be_mutated():
    refuses(lambda: chapter.mutate(sampled(0, PAPER), rng_of(0), SMALL), "block 0")


# --- architectures: known blocks and drawings -----------------------------------------------------


@pytest.mark.parametrize("ops", [1, 2, 5])
@pytest.mark.parametrize(("channels", "units"), [(1, 1), (4, 6), (8, 8)])
def test_the_known_blocks_are_legal(channels, units, ops):
    known = (
        chapter.resnet_block(channels, ops, units),
        chapter.densenet_block(channels, ops, units),
        chapter.fractalnet_block(channels, units),
    )
    chapter.check_architecture(known)
    assert [block.channels for block in known] == [channels] * 3
    assert {op.units for _, op in ops_of(known)} == {units}
    assert [len(block.ops) for block in known] == [ops, ops, 7]


def drawn_dots(ax: Any, block: Any) -> list[tuple[set[int], set[int]]]:
    """For each row, where the open dots are and where the filled ones are."""
    found = []
    for row in range(len(block.ops)):
        kinds: dict[bool, set[int]] = {True: set(), False: set()}
        for line in ax.lines:
            if line.get_marker() == "o" and set(line.get_ydata()) == {row}:
                kinds[line.get_markerfacecolor() == "white"] |= set(line.get_xdata())
        found.append((kinds[True], kinds[False]))
    return found


@pytest.mark.parametrize(
    "block",
    [
        *sampled(0),
        *sampled(1, PAPER),
        *sampled(2, SPACES["one bank"]),
        chapter.resnet_block(8, 3, 8),
        chapter.densenet_block(8, 3, 16),
        chapter.fractalnet_block(8, 8),
    ],
)
def test_a_drawing_shows_what_each_op_reads_writes_and_does(block):
    figure, axes = new_figure()
    chapter.draw_block(block, axes[0, 0], "a title")
    figure.canvas.draw()
    texts = [text.get_text() for text in axes[0, 0].texts]
    assert "a title" in {axes[0, 0].get_title(loc) for loc in ("left", "center", "right")}
    assert drawn_dots(axes[0, 0], block) == [(set(op.reads), set(op.writes)) for op in block.ops]
    assert {str(bank) for bank in range(block.banks)} <= set(texts)
    told = [text.split() for text in texts if "x" in text]
    patterns = ["".join("1" if there else "0" for there in op.active) for op in block.ops]
    expected = [[str(op.units), f"{op.kernel}x{op.kernel}"] for op in block.ops]
    assert told == [[*words, pattern] for words, pattern in zip(expected, patterns)]
    plt.close(figure)


def expected_arrows(block: Any) -> set[tuple[int, int]]:
    """(writer, reader) of one bank, the writer first; -1 is the input, the last is the output."""
    end = len(block.ops)
    writes = {-1: (0,)} | {k: op.writes for k, op in enumerate(block.ops)}
    reads = {k: op.reads for k, op in enumerate(block.ops)} | {end: range(block.banks)}
    return {
        (w, r) for w in writes for r in reads if w < r and not {*writes[w]}.isdisjoint(reads[r])
    }


KNOWN_ARROWS = [
    (chapter.resnet_block(4, 2, 4), {(-1, 0), (-1, 1), (-1, 2), (0, 1), (0, 2), (1, 2)}),
    (chapter.densenet_block(4, 2, 4), {(-1, 0), (-1, 1), (-1, 2), (0, 1), (0, 2), (1, 2)}),
    (
        Block(3, 4, (Op((0,), (1,), 4), Op((1,), (2,), 4))),
        {(-1, 0), (0, 1), (-1, 2), (0, 2), (1, 2)},
    ),
]


@pytest.mark.parametrize(("block", "arrows"), KNOWN_ARROWS)
def test_a_residual_and_a_dense_block_have_the_same_readers(block, arrows):
    assert chapter.arrows_of(block) == sorted(arrows) == sorted(expected_arrows(block))


@given(SEEDS, ANY_SPACE)
@few(40)
def test_an_arrow_goes_from_who_writes_a_bank_to_who_reads_it_later(seed, name):
    for block in sampled(seed, SPACES[name]):
        assert chapter.arrows_of(block) == sorted(expected_arrows(block))


@pytest.mark.parametrize("block", [*sampled(1), chapter.fractalnet_block(4, 4)])
def test_an_unrolled_drawing_has_all_ops_and_arrows(block):
    figure, axes = new_figure()
    chapter.draw_unrolled(block, axes[0, 0], "unrolled")
    figure.canvas.draw()
    texts = [text.get_text() for text in axes[0, 0].texts]
    names = [text for text in texts if text]
    assert names == ["in", *(str(k + 1) for k in range(len(block.ops))), "out"]
    assert texts.count("") == len(chapter.arrows_of(block))
    plt.close(figure)


# --- what ops compute -----------------------------------------------------------------------------


def random_weights(block: Any, seed: int) -> list[tuple[Tensor, list[Tensor | None]]]:
    """For each op, the 1x1 weight and the four others, in float64."""
    found = []
    for number, op in enumerate(block.ops):
        shape = (op.units, len(op.reads) * block.channels, 1, 1)
        shapes = [shape, *chapter.conv_shapes(op, block.channels)]
        drawn = [
            None if s is None else random_numbers(seed + 10 * number + k, *s) / math.prod(s[1:])
            for k, s in enumerate(shapes)
        ]
        found.append((drawn[0], drawn[1:]))
    return found


def run(block: Any, x: Tensor, drawn: Sequence[Any]) -> list[Tensor]:
    return chapter.run_block(block, x, lambda number, op: drawn[number])


def conv_of(weight: Tensor, **how: int) -> nn.Conv2d:
    """A convolution of torch that keeps the size of an image."""
    out, given, side, _ = weight.shape
    groups = how.get("groups", 1)
    conv = nn.Conv2d(
        given * groups, out, side, bias=False, padding="same", dtype=weight.dtype, **how
    )
    conv.load_state_dict({"weight": weight})
    return conv


class Branches(nn.Module):
    """An op as torch modules: ReLU and 1x1, then the sum of one or two branches."""

    def __init__(self, op: Any, reduce: Tensor, convs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.ReLU(), conv_of(reduce))
        self.branches = nn.ModuleList()
        for pair in (convs[:2], convs[2:]):
            layers: list[nn.Module] = []
            for weight in pair:
                if weight is not None:
                    conv = conv_of(weight, groups=op.groups, dilation=op.dilation)
                    layers += [nn.ReLU(), conv]
            if layers:
                self.branches.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


def ordinary_block(block: Any, x: Tensor, drawn: Sequence[Any]) -> list[Tensor]:
    """Banks of zeros to which is added; those never written are left out."""
    width = block.channels
    memory = torch.zeros(len(x), block.banks, width, *x.shape[2:], dtype=x.dtype)
    memory[:, 0], touched = x, {0}
    for op, weights in zip(block.ops, drawn):
        result = Branches(op, *weights)(memory[:, list(op.reads)].flatten(1, 2))
        for part, bank in enumerate(op.writes):
            memory[:, bank] += result[:, part * width : (part + 1) * width]
            touched.add(bank)
    return [memory[:, bank] for bank in sorted(touched)]


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@given(SEEDS, ANY_SPACE)
@few(40)
@torch.no_grad()
def test_a_block_computes_what_torch_modules_compute(seed, name):
    block = sampled(seed, SPACES[name])[0]
    x = random_numbers(seed, 2, block.channels, 6, 7)
    drawn = random_weights(block, seed)
    close(run(block, x, drawn), ordinary_block(block, x, drawn))


FREE_OPS = st.builds(
    Op,
    st.sampled_from([(0,), (1,), (0, 1)]),
    st.sampled_from([(0,), (2,), (0, 2), (1, 2), (0, 1, 2)]),
    st.sampled_from([4, 8, 12]),
    st.sampled_from([p for p in itertools.product((False, True), repeat=4) if any(p)]),
    st.sampled_from([1, 3, 5, 7]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
)


@given(FREE_OPS, SEEDS)
@few(60)
@torch.no_grad()
def test_an_op_of_any_kind_computes_what_torch_modules_compute(op, seed):
    block = Block(3, 4, (Op((0,), (1,), 4), op))
    x = random_numbers(seed, 2, 4, 5, 8)
    drawn = random_weights(block, seed)
    close(run(block, x, drawn), ordinary_block(block, x, drawn))


class Layer(nn.Module):
    """ReLU, 1x1, and one or two times ReLU, 3x3."""

    def __init__(self, weights: Sequence[Tensor | None]) -> None:
        super().__init__()
        convs = [conv_of(weight) for weight in weights if weight is not None]
        self.layers = nn.Sequential(*itertools.chain(*((nn.ReLU(), conv) for conv in convs)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def layers_of(drawn: Sequence[Any]) -> list[Layer]:
    return [Layer([reduce, *convs]) for reduce, convs in drawn]


@given(SEEDS, st.integers(1, 5), st.integers(1, 9))
@few(15)
@torch.no_grad()
def test_the_resnet_block_adds_each_layer_to_what_was_there(seed, ops, units):
    block = chapter.resnet_block(3, ops, units)
    x, drawn = random_numbers(seed, 2, 3, 6, 6), random_weights(block, seed)
    expected = x
    for layer in layers_of(drawn):
        assert len(layer.layers) == 6  # 1x1, and two convolutions
        expected = expected + layer(expected)
    close(run(block, x, drawn), [expected])


@given(SEEDS, st.integers(1, 5), st.integers(1, 9))
@few(15)
@torch.no_grad()
def test_the_densenet_block_appends_each_layer_to_what_was_there(seed, ops, units):
    block = chapter.densenet_block(3, ops, units)
    x, drawn = random_numbers(seed, 2, 3, 6, 6), random_weights(block, seed)
    expected = x
    for layer in layers_of(drawn):
        expected = torch.cat([expected, layer(expected)], 1)
    close([torch.cat(run(block, x, drawn), 1)], [expected])


@given(SEEDS, st.integers(1, 9))
@few(15)
@torch.no_grad()
def test_the_fractalnet_block_is_the_third_fractal(seed, units):
    block = chapter.fractalnet_block(3, units)
    x, drawn = random_numbers(seed, 2, 3, 6, 6), random_weights(block, seed)
    left = iter(layers_of([drawn[k] for k in (0, 1, 2, 5, 6, 3, 4)]))

    def fractal(depth: int, layers: Iterator[Layer]) -> Callable[[Tensor], Tensor]:
        """f_1 = conv; f_(C+1)(x) = conv(x) + f_C(f_C(x)); the third, innermost first."""
        if depth == 1:
            return next(layers)
        beside = next(layers)
        inner, outer = fractal(depth - 1, layers), fractal(depth - 1, layers)
        return lambda z: beside(z) + outer(inner(z))

    # The block's ops are f_2's three, then conv of f_3, then the second f_2's three.
    first = fractal(2, left)
    second_left = iter(layers_of([drawn[k] for k in (4, 5, 6)]))
    second = fractal(2, second_left)
    beside = layers_of([drawn[3]])[0]
    expected = beside(x) + second(first(x))
    found = run(block, x, drawn)
    torch.testing.assert_close(found[block.ops[-1].writes[0]], expected, rtol=0, atol=1e-9)


def test_a_block_does_not_change_what_enters_it():
    block = chapter.resnet_block(4, 2, 8)
    x = random_numbers(0, 2, 4, 5, 5)
    kept = x.clone()
    run(block, x, random_weights(block, 1))
    assert torch.equal(x, kept)


@given(SEEDS, ANY_SPACE)
@few(30)
def test_weights_are_asked_for_op_by_op_and_written_banks_come_back(seed, name):
    block = sampled(seed, SPACES[name])[0]
    drawn, asked = random_weights(block, seed), []

    def weights(number: int, op: Any) -> Any:
        asked.append((number, op))
        return drawn[number]

    found = chapter.run_block(block, random_numbers(0, 1, block.channels, 4, 4), weights)
    assert asked == list(enumerate(block.ops))
    written = {0}.union(*(op.writes for op in block.ops))
    assert chapter.written_banks(block) == sorted(written)
    assert [part.shape[1] for part in found] == [block.channels] * len(written)


# --- encodings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"), [("small", 800), ("paper", 300), ("narrow", 1500), ("one bank", 1500)]
)
def test_thousands_of_architectures_come_back_from_their_encodings(name, count):
    space = SPACES[name]
    for architecture in many(count, space, seed=7):
        assert chapter.decode(chapter.encode(architecture, space), space) == architecture


@pytest.mark.parametrize("name", SPACES)
def test_the_parts_of_an_encoding_are_disjoint_and_cover_its_channels(name):
    space = SPACES[name]
    parts = list(chapter.channel_layout(space).values())
    places = [place for part in parts for place in range(part.start, part.stop)]
    assert places == list(range(parts[-1].stop))
    assert all(part.stop > part.start and part.step is None for part in parts)
    for architecture in many(20, space):
        assert chapter.encode(architecture, space).shape[1] == len(places)


def expected_marks(number: int, block: Any, op: Any, space: Any, row: int, column: int) -> dict:
    """What holds +1 at one place of an op's rows, in the words of the layout."""
    slots = block.channels // space.unit
    return {
        "used": [0],
        "start": [0] if row == 0 else [],
        "block": [number],
        "banks": [block.banks - 1],
        "read": [op.reads[row // slots]],
        "row": [row % slots],
        "column": [column],
        "written": list(op.writes),
        "active": [k for k in range(4) if op.active[k]],
        "kernel": [k for k, (side, _) in enumerate(space.kernels) if side == op.kernel],
        "dilation": [op.dilation - 1],
        "groups": [k for k, g in enumerate(space.groups) if g == op.groups],
    }


def expected_encoding(architecture: Any, space: Any) -> np.ndarray:
    """c, place by place."""
    layout = chapter.channel_layout(space)
    rows = []
    for number, block in enumerate(architecture):
        for op in block.ops:
            for row in range(len(op.reads) * block.channels // space.unit):
                c = -np.ones((layout["groups"].stop, space.units // space.unit))
                for column in range(op.units // space.unit):
                    marks = expected_marks(number, block, op, space, row, column)
                    assert list(marks) == list(layout)
                    for name, places in marks.items():
                        for place in places:
                            c[layout[name].start + place, column] = 1
                rows.append(c)
    return np.stack(rows, 1)[None]


@given(SEEDS, ANY_SPACE)
@few(25)
def test_an_encoding_says_at_each_place_what_an_op_is(seed, name):
    architecture = sampled(seed, SPACES[name])
    found = chapter.encode(architecture, SPACES[name])
    np.testing.assert_array_equal(found.numpy(), expected_encoding(architecture, SPACES[name]))
    assert found.dtype == torch.float32


@given(SEEDS, ANY_SPACE)
@few(40)
def test_an_encoding_has_a_row_for_each_unit_read_and_nothing_but_ones(seed, name):
    space = SPACES[name]
    architecture = sampled(seed, space)
    c = chapter.encode(architecture, space)
    read = [len(op.reads) * block.channels for block, op in ops_of(architecture)]
    assert c.shape[2] * space.unit == sum(read)
    assert c.shape[3] * space.unit == space.units
    assert set(c.unique().tolist()) <= {-1.0, 1.0}
    assert [
        chapter.op_rows(block, op, space) * space.unit for block, op in ops_of(architecture)
    ] == read


def test_what_is_not_of_the_space_has_no_encoding():
    refuses(lambda: chapter.encode(sampled(0, PAPER), SMALL), "block 0")
    refuses(lambda: chapter.encode(with_op(reads=(1,)), SMALL), "block 2", "op 1")
    refuses(lambda: chapter.encode(sampled(0)[:2], SMALL), "2 blocks")


def test_decoding_changes_nothing_and_takes_any_exact_number_format():
    architecture = sampled(3)
    c = chapter.encode(architecture, SMALL)
    kept = c.clone()
    for form in (c, c.double(), c.bfloat16(), c.clone().requires_grad_()):
        assert chapter.decode(form, SMALL) == architecture
    assert torch.equal(c, kept)


def check_spoiled(c: Tensor, space: Any, original: Any = None) -> bool:
    """Refused in one line, or exactly the encoding of what is found; True if refused."""
    try:
        found = chapter.decode(c, space)
    except ValueError as error:
        message = str(error)
    else:
        assert found != original
        assert torch.equal(chapter.encode(found, space), c)
        return False
    assert "\n" not in message
    assert "c encodes no architecture" in message
    return True


@given(st.sampled_from(["small", "narrow", "one bank"]), SEEDS, st.data())
@few(150)
def test_a_flipped_entry_is_noticed(name, seed, data):
    architecture = sampled(seed, SPACES[name])
    c = chapter.encode(architecture, SPACES[name])
    place = data.draw(st.integers(0, c.numel() - 1))
    c.view(-1)[place] *= -1
    check_spoiled(c, SPACES[name], architecture)


def test_every_flipped_entry_of_an_encoding_is_noticed():
    space = SPACES["one bank"]
    architecture = (Block(1, 2, (Op((0,), (0,), 2, (True, False, True, True)),)),)
    c = chapter.encode(architecture, space)
    for place in range(c.numel()):
        spoiled = c.clone()
        spoiled.view(-1)[place] *= -1
        assert check_spoiled(spoiled, space, architecture)


@given(SEEDS, st.data())
@few(60)
def test_flipped_channels_and_rows_are_noticed(seed, data):
    architecture = sampled(seed, NARROW)
    c = chapter.encode(architecture, NARROW)
    axis = data.draw(st.integers(1, 3))
    place = data.draw(st.integers(0, c.shape[axis] - 1))
    c.select(axis, place).mul_(-1)
    check_spoiled(c, NARROW, architecture)


@given(SEEDS, st.data(), st.sampled_from(["cut", "double", "move", "roll"]))
@few(80)
def test_rows_that_are_cut_doubled_or_moved_are_noticed(seed, data, how):
    architecture = sampled(seed, NARROW)
    c = chapter.encode(architecture, NARROW)
    rows = list(range(c.shape[2]))
    row = data.draw(st.integers(0, len(rows) - 1))
    if how == "cut":
        del rows[row]
    elif how == "double":
        rows.insert(row, row)
    elif how == "move":
        rows.insert(data.draw(st.integers(0, len(rows) - 1)), rows.pop(row))
    else:
        rows = rows[row:] + rows[:row]
    spoiled = c[:, :, rows]
    if torch.equal(spoiled, c):
        assert chapter.decode(spoiled, NARROW) == architecture
    else:
        check_spoiled(spoiled, NARROW, architecture)


@given(SEEDS, st.sampled_from([NAN, INF, -INF, 0.0, 0.5, 2.0, 1 + 1e-6]), st.data())
@few(60)
def test_other_numbers_than_ones_are_refused(seed, value, data):
    c = chapter.encode(sampled(seed, NARROW), NARROW)
    place = data.draw(st.integers(0, c.numel() - 1))
    c.view(-1)[place] = value
    refuses(lambda: chapter.decode(c, NARROW), "c encodes no architecture")


def c_of_small() -> Tensor:
    return chapter.encode(sampled(0), SMALL)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c[0],
        lambda c: c[None],
        lambda c: torch.tensor(1.0),
        lambda c: torch.cat([c, c]),
        lambda c: c[:, :-1],
        lambda c: torch.cat([c, c[:, :1]], 1),
        lambda c: c[..., :-1],
        lambda c: c[..., :0],
        lambda c: c[:0],
        lambda c: c.mT,
    ],
)
def test_a_wrong_shape_is_named(spoil):
    spoiled = spoil(c_of_small())
    refuses(lambda: chapter.decode(spoiled, SMALL), "c must have the shape", tuple(spoiled.shape))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c[:, :, :0],
        lambda c: c[:, :, 1:],
        lambda c: c[:, :, :-1],
        lambda c: torch.cat([c, c], 2),
        lambda c: torch.cat([c, -c], 2),
        lambda c: c.flip(1),
        lambda c: c.flip(2),
        lambda c: c.flip(3),
        lambda c: -c,
        lambda c: 0 * c,
        lambda c: NAN * c,
        lambda c: INF * c,
        lambda c: 0.5 * c,
        torch.ones_like,
        lambda c: -torch.ones_like(c),
    ],
)
def test_a_spoiled_encoding_is_refused(spoil):
    refuses(lambda: chapter.decode(spoil(c_of_small()), SMALL), "c encodes no architecture")


def test_an_encoding_of_another_space_is_refused():
    refuses(lambda: chapter.decode(c_of_small(), PAPER), "c must have the shape")
    wider = dataclasses.replace(SMALL, blocks=4)
    refuses(lambda: chapter.decode(c_of_small(), wider), "c must have the shape")
    longer = dataclasses.replace(SMALL, ops=(4, 5))
    refuses(lambda: chapter.decode(c_of_small(), longer), "c encodes no architecture")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: None,
        lambda c: c.numpy(),
        lambda c: c.tolist(),
        lambda c: "c",
        lambda c: c.to(torch.complex64),
        lambda c: c.to_sparse(),
        lambda c: c.to("meta"),
        lambda c: c > 0,
    ],
)
def test_what_is_no_dense_tensor_of_numbers_is_refused(spoil):
    refuses(lambda: chapter.decode(spoil(c_of_small()), SMALL), "c must ")


# --- generated weights ----------------------------------------------------------------------------


def normalised(weight: Tensor) -> Tensor:
    """A 1x1 weight as it is used; the one place that says which norm is 1."""
    return weight / weight.square().sum(1, keepdim=True).sqrt()


def is_normalised(weight: Tensor) -> bool:
    return torch.allclose(normalised(weight.double()), weight.double(), atol=1e-5)


@pytest.fixture(scope="module")
def hypernets() -> dict[str, Any]:
    torch.manual_seed(0)
    return {name: chapter.HyperNet(space, **TINY_HYPER) for name, space in SPACES.items()}


@pytest.mark.parametrize("name", ["small", "paper", "narrow", "one bank"])
@torch.no_grad()
def test_generated_weights_have_the_shapes_that_an_own_network_needs(hypernets, name):
    for architecture in many(15, SPACES[name]):
        weights = chapter.generate(hypernets[name], architecture)
        ops = ops_of(architecture)
        own = [op[0] for block in chapter.OwnNet(architecture, 1, 2).ops for op in block]
        assert [w.shape for w in weights] == [w.shape for w in own]
        assert [w.shape for w in weights] == [
            (op.units, len(op.reads) * block.channels, 1, 1) for block, op in ops
        ]


@pytest.mark.parametrize("name", ["small", "paper"])
@torch.no_grad()
def test_generated_weights_are_normalised(hypernets, name):
    for architecture in many(10, SPACES[name]):
        assert all(map(is_normalised, chapter.generate(hypernets[name], architecture)))


@torch.no_grad()
def test_generated_weights_are_a_function_of_the_encoding(hypernets):
    first, second = sampled(0), sampled(1)
    for architecture in (first, second):
        again = [chapter.generate(hypernets["small"], architecture) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*again))
    told = chapter.encode(first, SMALL)
    right = chapter.generate(hypernets["small"], first)
    given_right = chapter.generate(hypernets["small"], first, told)
    given_wrong = chapter.generate(hypernets["small"], first, -told)
    assert all(torch.equal(a, b) for a, b in zip(right, given_right))
    assert not any(torch.equal(a, b) for a, b in zip(right, given_wrong))


class KnownTiles(nn.Module):
    """In place of a HyperNet: every number that it gives is another one."""

    def __init__(self, space: Any) -> None:
        super().__init__()
        self.space = space
        self.out = nn.Conv2d(1, space.unit**2, 1, dtype=torch.float64)
        self.told: list[Tensor] = []

    def forward(self, c: Tensor) -> Tensor:
        self.told.append(c)
        shape = (self.space.unit**2, *c.shape[2:])
        return 1 + torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


@given(SEEDS, ANY_SPACE)
@few(20)
def test_each_generated_weight_comes_from_its_tile(seed, name):
    """A tile's channel a * N + b is what unit a of its column takes from channel b of its row."""
    space = SPACES[name]
    architecture, n, top = sampled(seed, space), space.unit, 0
    known = KnownTiles(space)
    found = chapter.generate(known, architecture)
    (c,) = known.told
    assert torch.equal(c, chapter.encode(architecture, space).to(c))
    tiles = KnownTiles(space)(c).numpy()
    for (block, op), weight in zip(ops_of(architecture), found):
        channels = len(op.reads) * block.channels
        unit, channel = np.meshgrid(np.arange(op.units), np.arange(channels), indexing="ij")
        place = n * (unit % n) + channel % n
        expected = torch.tensor(tiles[place, top + channel // n, unit // n])[:, :, None, None]
        torch.testing.assert_close(weight, normalised(expected), rtol=0, atol=1e-12)
        top += channels // n


@pytest.mark.parametrize("name", ["small", "paper"])
def test_gradients_of_generated_weights_reach_all_of_the_hypernet(name):
    torch.manual_seed(1)
    hypernet = chapter.HyperNet(SPACES[name], growth=3, stages=(2, 1))
    weights = chapter.generate(hypernet, sampled(2, SPACES[name]))
    sum((w * torch.randn_like(w)).sum() for w in weights).backward()
    for parameter in hypernet.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


@given(st.integers(1, 4), st.lists(st.integers(1, 2), max_size=3))
@few(12)
@torch.no_grad()
def test_the_hypernet_is_a_weight_normalised_densenet_that_keeps_the_size(growth, stages):
    torch.manual_seed(0)
    hypernet = chapter.HyperNet(SMALL, growth, stages)
    c = torch.randn(1, chapter.channel_layout(SMALL)["groups"].stop, 5, 8)
    x = c
    for layer in hypernet.layers:
        g = layer.parametrizations.weight.original0.normal_()
        v = layer.parametrizations.weight.original1
        weight = g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = torch.cat([x, F.conv2d(torch.where(x > 0, x, 0.02 * x), weight, layer.bias, 1, 1)], 1)
    assert x.shape[1] == c.shape[1] + growth * sum(stages)
    expected = F.conv2d(torch.where(x > 0, x, 0.02 * x), hypernet.out.weight, hypernet.out.bias)
    found = hypernet(c)
    assert found.shape == (SMALL.unit**2, 5, 8)
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in hypernet.modules())


@pytest.mark.parametrize(
    "wrong", [lambda c: c[:, :, :-1], lambda c: torch.cat([c, c], 2), lambda c: c[:, :-1]]
)
def test_another_encoding_has_the_shape_of_the_right_one(hypernets, wrong):
    refuses(lambda: chapter.generate(hypernets["small"], sampled(0), wrong(c_of_small())))


# --- parts of the main network --------------------------------------------------------------------


@given(SEEDS, st.integers(1, 5), st.booleans())
@few(20)
def test_a_part_norm_is_batchnorm_of_the_first_channels(seed, width, training):
    torch.manual_seed(seed % 1000)
    part = chapter.PartNorm(5, track_running_stats=False).double().train(training)
    nn.init.normal_(part.weight)
    nn.init.normal_(part.bias)
    ordinary = nn.BatchNorm2d(width).double()
    ordinary.load_state_dict(
        {"weight": part.weight[:width], "bias": part.bias[:width]}, strict=False
    )
    x = 3 + random_numbers(seed, 4, width, 3, 2)
    torch.testing.assert_close(part(x), ordinary(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_part_norm_with_running_statistics_is_batchnorm(training):
    part = chapter.PartNorm(3, track_running_stats=True).double()
    ordinary = nn.BatchNorm2d(3).double()
    for seed in range(3):
        part(random_numbers(seed, 4, 3, 2, 2))
        ordinary(random_numbers(seed, 4, 3, 2, 2))
    x = random_numbers(9, 4, 3, 2, 2)
    torch.testing.assert_close(part.train(training)(x), ordinary.train(training)(x))


def mean_of_squares(x: Tensor) -> Tensor:
    """Means of 2x2 pixels; what is left over at the ends is a mean of fewer."""
    rows = [part.mean(2) for part in x.split(2, 2)]
    # A mean of means is right here: all that are averaged have as many pixels.
    return torch.stack([torch.stack([p.mean(2) for p in r.split(2, 2)], 2) for r in rows], 2)


@given(SEEDS, st.sampled_from(sorted(subsets(3))), st.integers(1, 4), st.booleans())
@few(25)
@torch.no_grad()
def test_a_merge_is_a_sum_of_linear_maps_of_normalised_banks(seed, present, width, last):
    torch.manual_seed(seed % 1000)
    merge = chapter.PartMerge(3, 4, 6, False).double()
    banks = {bank: random_numbers(seed + bank, 3, width, 5, 4) for bank in present}
    expected = torch.zeros(3, 5, 5, 4, dtype=torch.float64)
    for bank, x in banks.items():
        normal = F.relu(F.batch_norm(x, None, None, training=True))
        expected += torch.einsum("ncij,oc->noij", normal, merge.weights[bank][:5, :width])
    small = expected.mean((2, 3), keepdim=True) if last else mean_of_squares(expected)
    torch.testing.assert_close(merge(banks, 5, last), small)


@given(SEEDS, st.sampled_from(["small", "narrow", "one bank"]))
@few(30)
def test_shared_convolutions_have_the_shapes_that_an_op_needs(seed, name):
    space = SPACES[name]
    shared = chapter.SharedConvs(space)
    for block, op in ops_of(sampled(seed, space)):
        found = shared(op, block.channels)
        assert [w is not None for w in found] == list(op.active)
        shapes = [None if w is None else tuple(w.shape) for w in found]
        assert shapes == chapter.conv_shapes(op, block.channels)


def test_a_part_of_a_shared_convolution_keeps_the_scale_of_its_inputs():
    torch.manual_seed(0)
    shared = chapter.SharedConvs(Space())
    for kernel, groups in itertools.product((3, 5, 7), (1, 4)):
        op = Op((0,), (0, 1), 96, (True,) * 4, kernel, groups=groups)
        for weight in shared(op, 64):
            expected = math.sqrt(2 / math.prod(weight.shape[1:]))
            assert float(weight.detach().std()) == pytest.approx(expected, rel=0.05)


def test_a_smaller_kernel_is_the_centre_of_a_larger_one():
    shared = chapter.SharedConvs(Space())
    sizes = {}
    for kernel in (3, 5, 7):
        (weight, *_) = shared(Op((0,), (0,), 16, kernel=kernel), 16)
        sizes[kernel] = weight * math.prod(weight.shape[1:]) ** 0.5
    torch.testing.assert_close(sizes[7][..., 1:-1, 1:-1], sizes[5])
    torch.testing.assert_close(sizes[5][..., 1:-1, 1:-1], sizes[3])


def test_ops_share_their_convolutions_and_leave_the_rest_alone():
    shared = chapter.SharedConvs(SMALL)
    small = Op((0,), (0,), 8, (True, False, False, True), 3, groups=2)
    sum(w.square().sum() for w in shared(small, 4) if w is not None).backward()
    first, second, third, fourth = (weight.grad for weight in shared.weights)
    assert second is None
    assert third is None
    for slope in (first, fourth):
        used = slope != 0
        assert used.sum() == 4 * 4 * 3 * 3
        assert used.any((2, 3)).sum() == 4 * 4
        assert used[..., 1:4, 1:4].sum() == used.sum()
    before = [w.detach().clone() for w in shared(Op((0,), (0,), 32, (True,) * 4), 16)]
    with torch.no_grad():
        for weight in (shared.weights[0], shared.weights[3]):
            weight -= weight.grad
    after = shared(Op((0,), (0,), 32, (True,) * 4), 16)
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [False, True, True, False]


@torch.no_grad()
def test_a_supernets_1x1_weights_are_normalised_and_of_the_right_shapes():
    shared = chapter.SharedReduce(SMALL)
    for architecture in many(20, SMALL):
        found = shared(architecture)
        shapes = [(op.units, len(op.reads) * b.channels, 1, 1) for b, op in ops_of(architecture)]
        assert [tuple(w.shape) for w in found] == shapes
        assert all(map(is_normalised, found))


@torch.no_grad()
def test_a_supernet_knows_the_banks_and_the_number_of_an_op_and_nothing_else():
    shared = chapter.SharedReduce(SMALL)

    def weights(*ops: Any) -> list[Tensor]:
        block = Block(3, 8, ops)
        return shared((block, block, block))

    both, one = Op((0, 1), (0,), 8), Op((1,), (0,), 8)
    first = Op((0,), (1,), 4)
    read_both = weights(first, both)[1]
    read_one = weights(first, one)[1]
    torch.testing.assert_close(normalised(read_both[:, 8:]), read_one)  # the part of bank 1
    other = dataclasses.replace(one, active=(True,) * 4, kernel=5, groups=2, writes=(0, 2))
    assert torch.equal(weights(first, other)[1], read_one)
    fewer = dataclasses.replace(one, units=4)
    torch.testing.assert_close(weights(first, fewer)[1], normalised(read_one[:4]))
    everywhere = weights(first, first)
    assert len({tuple(w.flatten().tolist()) for w in everywhere}) == 6


# --- the main network -----------------------------------------------------------------------------


def smash_net(hyper: dict | None, space: Any = SMALL, seed: int = 0, **how: Any) -> Any:
    """A SMASH network for images (1, 8, 8) of four classes, whose BatchNorms are not trivial."""
    torch.manual_seed(seed)
    shape = {"in_channels": 1, "classes": 4, "seed": seed} | how
    net = chapter.SmashNet(space, hyper=hyper, **shape)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    nn.init.normal_(net.frame.bias)
    return net


def copy_norm(own: nn.BatchNorm2d, shared: nn.BatchNorm2d) -> None:
    width = own.num_features
    own.weight.copy_(shared.weight[:width])
    own.bias.copy_(shared.bias[:width])


@torch.no_grad()
def own_copy(net: Any, architecture: Any) -> Any:
    """An `OwnNet` that has of a SMASH network's weights those that an architecture uses."""
    stem = net.frame.stem
    own = chapter.OwnNet(architecture, stem.in_channels, len(net.frame.bias), stem.stride[0])
    own = own.to(stem.weight)
    first = architecture[0].channels
    own.frame.stem.weight.copy_(stem.weight[:first])
    if stem.bias is not None:
        own.frame.stem.bias.copy_(stem.bias[:first])
    if hasattr(net.frame, "norm"):
        copy_norm(own.frame.norm, net.frame.norm)
    for mine, shared in zip(own.frame.merges, net.frame.merges):
        for bank, weight in enumerate(mine.weights):
            weight.copy_(shared.weights[bank][: weight.shape[0], : weight.shape[1]])
            copy_norm(mine.norms[bank], shared.norms[bank])
    own.frame.bias.copy_(net.frame.bias)
    reduce = iter(chapter.reductions(net.reduce, architecture))
    for number, block in enumerate(architecture):
        for place, op in enumerate(block.ops):
            convs = [w for w in net.convs[number](op, block.channels) if w is not None]
            for mine, theirs in zip(own.ops[number][place], [next(reduce), *convs], strict=True):
                mine.copy_(theirs)
    return own


@pytest.mark.parametrize("hyper", [TINY_HYPER, None], ids=["hypernet", "supernet"])
@pytest.mark.parametrize(
    ("name", "stride", "channels", "seeds"), [("small", 2, 1, range(8)), ("paper", 1, 3, [0])]
)
@torch.no_grad()
def test_a_smash_network_is_the_network_with_its_generated_weights(
    hyper, name, stride, channels, seeds
):
    net = smash_net(hyper, SPACES[name], stride=stride, in_channels=channels).double()
    images = random_numbers(1, 5, channels, 8, 8)
    for seed in seeds:
        architecture = sampled(seed, SPACES[name])
        own = own_copy(net, architecture).train()
        found = net(images, architecture)
        torch.testing.assert_close(found, own(images), rtol=0, atol=1e-9)
        torch.testing.assert_close(net.eval()(images, architecture), found)


@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7)])
@torch.no_grad()
def test_logits_come_for_images_of_any_size(shape, stride, classes):
    sizes = {"in_channels": shape[0], "classes": classes, "stride": stride}
    images = torch.randn(3, *shape)
    assert smash_net(TINY_HYPER, NARROW, **sizes)(images).shape == (3, classes)
    own = chapter.OwnNet(sampled(0, NARROW), **sizes)
    for training in (True, False):
        assert own.train(training)(images).shape == (3, classes)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("side", [8, 9, 13])
def test_the_first_convolution_sees_every_pixel(stride, side):
    net = smash_net(None, NARROW, stride=stride)
    images = torch.ones(1, 1, side, side, requires_grad=True)
    net.frame.stem(images).square().sum().backward()
    assert (images.grad != 0).all()


def test_batchnorm_stands_only_in_transitions_and_the_classifier():
    for net in (smash_net(TINY_HYPER), chapter.OwnNet(sampled(0), 1, 10)):
        places = [
            n for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        outside = {place for place in places if not place.startswith("frame.merges.")}
        assert outside <= {"frame.norm"}
        assert len(places) > len(outside)


def used_banks(block: Any) -> set[int]:
    return {0, *(bank for op in block.ops for bank in op.writes)}


@given(SEEDS)
@few(12)
def test_all_that_an_architecture_uses_learns(seed):
    architecture = sampled(seed)
    torch.manual_seed(0)
    own = chapter.OwnNet(architecture, 1, 4).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "relu", F.softplus)  # or units that are never active hide the others
        F.cross_entropy(own(random_numbers(seed, 6, 1, 8, 8)), torch.arange(6) % 4).backward()
    unused = {
        f"frame.merges.{number}.{kind}"
        for number, block in enumerate(architecture)
        for bank in {*range(block.banks)} - used_banks(block)
        for kind in (f"weights.{bank}", f"norms.{bank}.weight", f"norms.{bank}.bias")
    }
    for name, parameter in own.named_parameters():
        if name in unused:
            assert parameter.grad is None
        else:
            assert torch.isfinite(parameter.grad).all(), name
            if "stem.bias" not in name:  # a BatchNorm behind it would cancel it
                assert parameter.grad.abs().sum() > 0, name


def test_a_bank_that_nothing_writes_does_not_learn():
    block = Block(4, 4, (Op((0,), (2,), 4), PLAIN))
    torch.manual_seed(0)
    own = chapter.OwnNet((block, block), 1, 4)
    F.cross_entropy(own(torch.randn(6, 1, 8, 8)), torch.arange(6) % 4).backward()
    for merge in own.frame.merges:
        learned = [weight.grad is not None for weight in merge.weights]
        assert learned[:3] == [True, False, True]
        assert not any(learned[3:])


@pytest.mark.parametrize("hyper", [TINY_HYPER, None], ids=["hypernet", "supernet"])
def test_what_an_architecture_does_not_use_of_a_smash_network_does_not_learn(hyper):
    op = Op((0,), (1,), 4, (False, False, True, False))
    architecture = (Block(2, 4, (op,)),) * 3
    net = smash_net(hyper).double()
    images = random_numbers(0, 6, 1, 8, 8)
    F.cross_entropy(net(images, architecture), torch.arange(6) % 4).backward()
    for number, (convs, merge) in enumerate(zip(net.convs, net.frame.merges)):
        assert [w.grad is not None for w in convs.weights] == [False, False, True, False]
        slope = convs.weights[2].grad != 0
        assert slope[:4, :4, 1:4, 1:4].any()
        assert slope[:4, :4, 1:4, 1:4].sum() == slope.sum()
        assert [w.grad is not None for w in merge.weights] == [True, True, False]
        outs = 4
        assert (merge.weights[1].grad != 0).sum() <= 4 * outs
        assert (merge.weights[1].grad[:outs, :4] != 0).any(), number
        assert not merge.norms[1].weight.grad[4:].any()
    assert not net.frame.stem.weight.grad[4:].any()
    assert net.frame.stem.weight.grad[:4].abs().sum() > 0
    reached = [p.grad is not None and p.grad.abs().sum() > 0 for p in net.reduce.parameters()]
    if hyper is None:  # op 0 of each block, of up to three
        assert reached == [True, False, False] * 3
    else:
        assert all(reached)


def recorded_samples(monkeypatch: pytest.MonkeyPatch) -> list:
    """What is sampled from now on."""
    found: list = []
    sample = chapter.sample_architecture

    def recording(*arguments: Any) -> Any:
        found.append(sample(*arguments))
        return found[-1]

    monkeypatch.setattr(chapter, "sample_architecture", recording)
    return found


@torch.no_grad()
def test_every_call_without_an_architecture_draws_a_new_one(monkeypatch):
    drawn = recorded_samples(monkeypatch)
    images = torch.randn(4, 1, 8, 8)
    logits = []
    for seed in (0, 0, 1):
        net = smash_net(TINY_HYPER, NARROW, seed)
        logits.append([net(images) for _ in range(4)])
    first, again, other = drawn[:4], drawn[4:8], drawn[8:]
    assert len(set(first)) == 4
    assert first == again
    assert first != other
    assert all(torch.equal(a, b) for a, b in zip(*logits[:2]))


def test_a_network_that_is_told_an_architecture_draws_none(monkeypatch):
    net = smash_net(TINY_HYPER, NARROW)
    before, drawn = copy.deepcopy(net.rng), recorded_samples(monkeypatch)
    net(torch.randn(4, 1, 8, 8), sampled(0, NARROW))
    assert net.rng.bit_generator.state == before.bit_generator.state
    assert len(drawn) == 1  # the test's own


@torch.no_grad()
def test_a_smash_network_can_be_told_a_lie():
    net, architecture = smash_net(TINY_HYPER), sampled(0)
    images, c = torch.randn(4, 1, 8, 8), chapter.encode(architecture, SMALL)
    assert torch.equal(net(images, architecture, c), net(images, architecture))
    assert not torch.equal(net(images, architecture, -c), net(images, architecture))


def test_an_own_network_answers_for_each_image_alone_once_it_is_trained():
    torch.manual_seed(0)
    own = chapter.OwnNet(sampled(0), 1, 4).double()
    images = random_numbers(0, 6, 1, 8, 8)
    for _ in range(3):
        own(images)
    own.eval()
    torch.testing.assert_close(own(images[2:3]), own(images)[2:3])
    own.train()
    assert not torch.allclose(own(images[:3])[2:3], own(images)[2:3])


def test_the_1x1_weights_of_an_own_network_are_used_normalised():
    torch.manual_seed(0)
    own = chapter.OwnNet(sampled(0), 1, 4).double()
    images = random_numbers(0, 4, 1, 8, 8)
    expected = own(images)
    with torch.no_grad():
        for op in itertools.chain(*own.ops):
            assert is_normalised(op[0])
            op[0] *= 3
    torch.testing.assert_close(own(images), expected)


def test_an_own_network_of_an_illegal_architecture_is_refused():
    refuses(lambda: chapter.OwnNet(with_op(reads=(1,)), 1, 10), "block 2", "op 1")


@pytest.mark.parametrize("hyper", [TINY_HYPER, None], ids=["hypernet", "supernet"])
def test_an_architecture_of_another_space_is_refused(hyper):
    net = smash_net(hyper)
    refuses(lambda: net(torch.randn(2, 1, 8, 8), sampled(0, PAPER)), "block 0")


@pytest.mark.parametrize("stride", [0, -1, NAN, 1.5])
def test_a_stride_that_is_none_is_refused(stride):
    refuses(lambda: smash_net(None, NARROW, stride=stride), "stride", stride)


# --- training and scores --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini() -> Any:
    return load("fashion_mnist_mini", device="cpu")


@pytest.fixture(scope="module")
def part(mini) -> Any:
    """120 images, and 40 of them to test on."""
    return mini.subset(120).hold_out(40)


SHORT = {"epochs": 1, "batch_size": 20, "stride": 2, "lr": 0.01}


def trained(data: Any, **changes: Any) -> Any:
    how = SHORT | {"hyper": TINY_HYPER} | changes
    return chapter.train_smash(data, NARROW, **how)


def test_every_batch_trains_another_architecture(part, monkeypatch):
    drawn = recorded_samples(monkeypatch)
    trained(part, epochs=3)
    assert len(drawn) >= 12
    assert len(set(drawn[:12])) > 10  # the space is small, so one may come twice


@pytest.mark.parametrize("hyper", [TINY_HYPER, None], ids=["hypernet", "supernet"])
def test_hypernet_shared_weights_and_frame_are_trained_together(part, hyper):
    torch.manual_seed(4)
    start = chapter.SmashNet(NARROW, 1, 10, hyper, 2, 4)
    net, seconds = trained(part, hyper=hyper, epochs=5, seed=4)
    assert seconds > 0
    assert not net.training
    moved = {
        name.split(".")[0]
        for (name, a), b in zip(net.named_parameters(), start.parameters())
        if not torch.equal(a, b)
    }
    assert moved == {"frame", "convs", "reduce"}
    still = [
        n for (n, a), b in zip(net.named_parameters(), start.parameters()) if torch.equal(a, b)
    ]
    if hyper is not None:
        assert not [name for name in still if name.startswith("reduce")]


def test_a_training_is_the_same_for_a_seed(part):
    nets = [trained(part, seed=seed)[0] for seed in (1, 1, 2)]
    first, again, other = (
        torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_was_trained_scores_better_than_chance(mini):
    space = Space(4, 1, 2, 8, 16, (1, 2), ((1, 1), (3, 2)), (1, 2))
    how = SHORT | {"hyper": TINY_HYPER, "epochs": 3, "stride": 4, "lr": 0.05}
    net, _ = chapter.train_smash(mini.subset(1200), space, **how)
    scores = [chapter.smash_score(a, net, mini, 500) for a in many(5, space)]
    assert np.mean(scores) < 0.8


@pytest.mark.parametrize("name", ["epochs", "lr"])
@pytest.mark.parametrize("value", [0, -1, NAN, INF])
def test_numbers_of_a_training_are_positive(part, name, value):
    refuses(lambda: trained(part, **{name: value}), name, value)
    refuses(
        lambda: chapter.train_from_scratch(
            sampled(0), part, **{"epochs": 1, "batch_size": 20, name: value}
        ),
        name,
        value,
    )


@pytest.mark.parametrize("value", [0, -1, NAN, 81])
def test_a_batch_has_some_of_the_images(part, value):
    refuses(lambda: trained(part, batch_size=value), "batch_size", value)


def test_a_training_whose_loss_is_not_finite_is_refused(part):
    refuses(lambda: trained(part, lr=1e30, epochs=3), "ended early")


def test_adam_has_the_momenta_of_the_papers_code():
    parameter = nn.Parameter(torch.ones(1))
    (group,) = chapter.adam(0.02)([parameter]).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.02, (0.5, 0.999), 0)
    assert group["params"] == [parameter]


class Answering(nn.Module):
    """In place of a network: logits that depend on the image alone; notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Any, Any]] = []

    def forward(self, images: Tensor, architecture: Any, c: Any) -> Tensor:
        self.calls.append((images, architecture, c))
        assert not torch.is_grad_enabled()
        return images.flatten(1)[:, 300:400:10]


@pytest.mark.parametrize(
    ("images", "sizes"),
    [
        (1, [1]),
        (7, [7]),
        (1000, [1000]),
        (1001, [1000, 1]),
        (1500, [1000, 500]),
        (None, [1000, 1000]),
    ],
)
def test_a_score_is_the_share_of_wrong_answers_in_batches_of_a_thousand(mini, images, sizes):
    net = Answering()
    found = chapter.smash_score("an architecture", net, mini, images, "a lie")
    assert [len(batch) for batch, _, _ in net.calls] == sizes
    assert {(a, c) for _, a, c in net.calls} == {("an architecture", "a lie")}
    batch = torch.cat([batch for batch, _, _ in net.calls])
    torch.testing.assert_close(batch, mini.normalize(mini.test_images[: sum(sizes)]))
    pixels = mini.test_images[: sum(sizes)].numpy().reshape(sum(sizes), -1)[:, 300:400:10]
    wrong = sum(int(p.argmax() != k) for p, k in zip(pixels, mini.test_labels.tolist()))
    assert found == pytest.approx(wrong / sum(sizes), abs=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_a_score_changes_nothing_in_the_network(mini, training):
    net = smash_net(TINY_HYPER, NARROW, classes=10, stride=4).train(training)
    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(net.rng.bit_generator.state)
    architecture = sampled(0, NARROW)
    scores = [chapter.smash_score(architecture, net, mini, 50) for _ in range(2)]
    assert scores[0] == scores[1]
    assert 0 <= scores[0] <= 1
    assert {module.training for module in net.modules()} == {training}
    assert net.rng.bit_generator.state == state
    assert all(p.grad is None for p in net.parameters())
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("images", [0, -1, NAN, INF, 1.5, 2001])
def test_a_score_needs_a_number_of_images(mini, images):
    refuses(lambda: chapter.smash_score(None, Answering(), mini, images), images)


SCRATCH = {"epochs": 1, "batch_size": 20, "stride": 2}


def test_a_training_from_scratch_says_how_it_went_and_repeats(mini):
    data, rows = mini.subset(120), []
    for seed in (3, 3, 4):
        torch.randn(seed)  # what was drawn before is none of its business
        rows.append(chapter.train_from_scratch(sampled(0), data, seed=seed, **SCRATCH))
    row = rows[0]
    assert set(row) == {"accuracy", "error", "seconds", "parameters"}
    assert row["error"] == 1 - row["accuracy"]
    assert 0 <= row["error"] <= 1
    assert row["seconds"] > 0
    assert row["parameters"] == count_parameters(chapter.OwnNet(sampled(0), 1, 10, 2))
    assert rows[1]["error"] == row["error"]
    assert rows[2]["error"] != row["error"]
    assert is_plain(row)


def test_a_training_from_scratch_that_diverges_has_no_error(part):
    row = chapter.train_from_scratch(sampled(0), part, lr=1e20, **SCRATCH | {"epochs": 3})
    assert math.isnan(row["error"])
    assert math.isnan(row["accuracy"])
    assert row["parameters"] > 0


# --- lies and steps -------------------------------------------------------------------------------

LIES = chapter.LIES


@given(SEEDS, st.sampled_from(["small", "paper", "narrow"]), st.sampled_from(sorted(LIES)))
@few(80)
def test_a_lie_is_another_encoding_of_the_same_shape(seed, name, kind):
    space = SPACES[name]
    c = chapter.encode(sampled(seed, space), space)
    kept = c.clone()
    lie = LIES[kind](c, space, rng_of(seed + 1))
    assert torch.equal(c, kept)
    assert lie.shape == c.shape
    assert lie.dtype == c.dtype
    assert set(lie.unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(lie, c)
    assert torch.equal(lie, LIES[kind](c, space, rng_of(seed + 1)))


def others_than(c: Tensor, space: Any, *names: str) -> Tensor:
    """The channels of all parts that are not named."""
    layout = chapter.channel_layout(space)
    return torch.cat([c[:, part] for name, part in layout.items() if name not in names], 1)


@given(SEEDS)
@few(25)
def test_a_lie_about_dilation_moves_every_ops_dilation(seed):
    c = chapter.encode(sampled(seed, PAPER), PAPER)
    lie = chapter.lie_about_dilation(c, PAPER, rng_of(seed))
    part = chapter.channel_layout(PAPER)["dilation"]
    assert torch.equal(others_than(lie, PAPER, "dilation"), others_than(c, PAPER, "dilation"))
    truth, told = c[:, part] > 0, lie[:, part] > 0
    assert torch.equal(truth.sum(1), told.sum(1))
    assert not (truth & told).any()


def test_lies_about_dilation_tell_all_others():
    c = chapter.encode(sampled(0, PAPER), PAPER)
    lies = {
        tuple(chapter.lie_about_dilation(c, PAPER, rng_of(k)).flatten().tolist()) for k in range(20)
    }
    assert len(lies) == 2  # of three dilations


@given(SEEDS)
@few(25)
def test_a_lie_about_banks_renames_each_of_them(seed):
    c = chapter.encode(sampled(seed), SMALL)
    lie = chapter.lie_about_banks(c, SMALL, rng_of(seed))
    layout = chapter.channel_layout(SMALL)
    assert torch.equal(
        others_than(lie, SMALL, "read", "written"), others_than(c, SMALL, "read", "written")
    )
    truth, told = ((x[0, layout["read"]] > 0).flatten(1).float() for x in (c, lie))
    assert not (truth * told).any()
    names = [
        order
        for order in itertools.permutations(range(3))
        if all(
            torch.equal(lie[:, layout[n]], c[:, layout[n]][:, order]) for n in ("read", "written")
        )
    ]
    assert any(all(k != bank for k, bank in enumerate(order)) for order in names)


@given(SEEDS)
@few(25)
def test_a_lie_about_all_tells_of_another_architecture_again_and_again(seed):
    c = chapter.encode(sampled(seed), SMALL)
    lie = chapter.lie_about_all(c, SMALL, rng_of(seed + 1))
    other = chapter.encode(sampled(seed + 1), SMALL)
    for row in range(c.shape[2]):
        assert torch.equal(lie[:, :, row], other[:, :, row % other.shape[2]])


class Patient:
    """A generator that gives up when it is asked for too many permutations."""

    def __init__(self) -> None:
        self.rng, self.left = rng_of(0), 200

    def permutation(self, *arguments: Any) -> np.ndarray:
        self.left -= 1
        assert self.left > 0, "asked for 200 permutations"
        return self.rng.permutation(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)


@pytest.mark.parametrize("kind", LIES)
def test_a_space_with_one_bank_and_one_dilation_ends_every_lie(kind):
    space = SPACES["one bank"]
    c = chapter.encode(sampled(0, space), space)
    assert LIES[kind](c, space, Patient()).shape == c.shape


# Fields that a step changes; those of one group together.
STEPS = ({"reads"}, {"writes"}, {"units"}, {"active"}, {"groups"}, {"kernel", "dilation"})


def other_ops(op: Any, space: Any) -> Iterator[Any]:
    """All that differ in one choice, legal or not."""
    values = {name: range(1, 9) for name in ("kernel", "dilation", "groups")}
    values["units"] = range(1, space.units + 5)
    values["active"] = [*itertools.product((False, True), repeat=4)]
    values["reads"] = values["writes"] = subsets(space.banks + 1)
    for step in STEPS:
        for chosen in itertools.product(*(values[name] for name in step)):
            other = dataclasses.replace(op, **dict(zip(step, chosen)))
            if other != op and len(other.reads) == len(op.reads):
                yield other


def expected_neighbours(architecture: Any, space: Any) -> set:
    found = set()
    for number, block in enumerate(architecture):
        for place, op in enumerate(block.ops):
            for other in other_ops(op, space):
                ops = (*block.ops[:place], other, *block.ops[place + 1 :])
                blocks = list(architecture)
                blocks[number] = dataclasses.replace(block, ops=ops)
                if chapter.is_legal(tuple(blocks), space):
                    found.add(tuple(blocks))
    return found


DENSE = Block(3, 8, (Op((0,), (1,), 8), Op((0, 1), (2,), 8), Op((1, 2), (0,), 4)))


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("small", (DENSE, DENSE, chapter.resnet_block(8, 2, 16))),
        *((n, sampled(k, SPACES[n])) for n in ("small", "narrow", "one bank") for k in range(2)),
    ],
)
def test_neighbours_are_all_that_differ_in_one_choice_of_one_op(name, architecture):
    found = chapter.neighbours(architecture, SPACES[name])
    assert len(set(found)) == len(found)
    assert set(found) == expected_neighbours(architecture, SPACES[name])


@given(SEEDS, st.sampled_from(["small", "paper", "narrow"]))
@few(8)
def test_neighbours_are_legal_and_have_encodings_of_the_same_shape(seed, name):
    space = SPACES[name]
    architecture = sampled(seed, space)
    shape = chapter.encode(architecture, space).shape
    found = chapter.neighbours(architecture, space)
    for other in found:
        chapter.check_architecture(other, space)
        assert sum(map(bool, changed_fields(architecture, other))) == 1
    for other in found[:: max(1, len(found) // 10)]:
        assert chapter.encode(other, space).shape == shape


@dataclasses.dataclass
class FewImages:
    """In the place of a data set: images that are normalised already, in float64."""

    test_images: Tensor
    test_labels: Tensor

    def normalize(self, images: Tensor) -> Tensor:
        return images


def test_a_predicted_effect_is_the_slope_of_the_loss_towards_the_other():
    images, labels = random_numbers(5, 12, 1, 8, 8), torch.arange(12) % 4
    net, data = smash_net(TINY_HYPER).double().eval(), FewImages(images, labels)
    architecture = sampled(5)
    others = chapter.neighbours(architecture, SMALL)[::9]
    c = chapter.encode(architecture, SMALL).double()

    @torch.no_grad()
    def loss(step: Tensor) -> float:
        logits = net(data.test_images[:10], architecture, c + step)
        return float(F.cross_entropy(logits, data.test_labels[:10]))

    found = chapter.predicted_effects(architecture, others, net, data, 10)
    expected = []
    for other in others:
        step = 1e-6 * (chapter.encode(other, SMALL).double() - c)
        expected.append((loss(step) - loss(-step)) / 2e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert np.abs(expected).max() > 1e-4
    assert all(p.grad is None for p in net.parameters())


def test_predicted_effects_have_the_batches_of_a_score():
    images, labels = random_numbers(5, 1005, 1, 4, 4), torch.arange(1005) % 4
    net, architecture = smash_net(TINY_HYPER, NARROW).double(), sampled(0, NARROW)
    others = chapter.neighbours(architecture, NARROW)[:3]
    data = FewImages(images, labels)
    found = chapter.predicted_effects(architecture, others, net, data, 1005)
    parts = [FewImages(images[k], labels[k]) for k in (slice(1000), slice(1000, 1005))]
    effects = [
        chapter.predicted_effects(architecture, others, net, part, len(part.test_labels))
        for part in parts
    ]
    expected = (1000 * effects[0] + 5 * effects[1]) / 1005
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_walks_step_from_neighbour_to_neighbour(mini, monkeypatch):
    visited = []

    def score(architecture: Any, *_: Any) -> float:
        visited.append(architecture)
        return float(len(visited))

    monkeypatch.setattr(chapter, "smash_score", score)
    net = smash_net(TINY_HYPER, NARROW)
    start = sampled(0, NARROW)
    found = [chapter.follow(start, net, mini, 10, rng_of(k), 4) for k in (1, 1, 2)]
    paths = [visited[:5], visited[5:10], visited[10:]]
    assert found[0] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert paths[0] == paths[1] != paths[2]
    for path in paths:
        assert path[0] == start
        for before, after in itertools.pairwise(path):
            assert after in chapter.neighbours(before, NARROW)


def test_a_walk_by_the_gradient_takes_the_best_prediction(mini, monkeypatch):
    visited, offered = [], []

    def predict(architecture: Any, others: Sequence[Any], *_: Any) -> np.ndarray:
        offered.append((architecture, others))
        return np.cos(np.arange(len(others)) + len(offered))

    monkeypatch.setattr(chapter, "smash_score", lambda a, *_: visited.append(a) or 0.5)
    monkeypatch.setattr(chapter, "predicted_effects", predict)
    start = sampled(0, NARROW)
    found = chapter.follow(start, smash_net(TINY_HYPER, NARROW), mini, 10, None, 3)
    assert found == [0.5] * 4
    assert [start, *visited[1:-1]] == [architecture for architecture, _ in offered]
    for step, (_, others) in enumerate(offered, start=1):
        best = min(range(len(others)), key=lambda k: math.cos(k + step))
        assert visited[step] == others[best]


def test_a_walk_starts_with_the_score_of_its_start(part):
    net = smash_net(TINY_HYPER, NARROW, classes=10, stride=4)
    start = sampled(0, NARROW)
    for rng in (None, rng_of(0)):
        found = chapter.follow(start, net, part, 40, rng, 2)
        assert len(found) == 3
        assert found[0] == chapter.smash_score(start, net, part, 40)


# --- proxies --------------------------------------------------------------------------------------


def linear_layers(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), *layers)


def convnet(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4, 5, bias=bias),
    )


@pytest.mark.parametrize("net", [linear_layers(16, 3, 5), convnet(), convnet(True)])
def test_the_gradient_norm_is_that_of_all_slopes_of_the_loss(net):
    images, labels = torch.randn(6, 1, 4, 4), torch.arange(6) % 5
    found = chapter.gradient_norm(copy.deepcopy(net), images, labels)
    loss = nn.CrossEntropyLoss()(net(images), labels)
    loss.backward()
    squares = [s**2 for p in net.parameters() for s in p.grad.flatten().tolist()]
    assert found == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-5)


@pytest.mark.parametrize("sizes", [(4, 3), (4, 3, 2), (4, 6, 5, 3)])
def test_synflow_of_a_linear_network_is_the_sum_of_its_paths(sizes):
    net = linear_layers(*sizes)
    ones = np.ones(4)
    for layer in net[1:]:
        ones = np.abs(layer.weight.detach().numpy().astype(float)) @ ones
    expected = math.log((len(sizes) - 1) * ones.sum())  # each layer cuts all paths
    found = chapter.synflow(net, torch.randn(3, 1, 2, 2), torch.zeros(3))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_synflow_is_the_sum_of_weight_times_slope(bias):
    net = convnet(bias)
    positive = copy.deepcopy(net).double()
    for p in positive.parameters():
        p.data = p.data.abs()
    total = positive(torch.ones(1, 1, 4, 4, dtype=torch.float64)).sum()
    total.backward()
    expected = math.log(
        math.fsum(float((p.detach() * p.grad).sum()) for p in positive.parameters())
    )
    images = 5 * torch.randn(7, 1, 4, 4)
    assert chapter.synflow(net, images, torch.zeros(7)) == pytest.approx(expected)
    if not bias:
        assert math.exp(expected) == pytest.approx(3 * float(total.detach()), rel=1e-9)


def test_synflow_does_not_look_at_the_images_or_signs():
    nets = [convnet(), convnet()]
    with torch.no_grad():
        for p in nets[1].parameters():
            p *= torch.where(torch.rand_like(p) < 0.5, -1, 1)
    found = [
        chapter.synflow(net, torch.randn(n, 1, 4, 4), torch.zeros(n))
        for net, n in zip(nets, (2, 9))
    ]
    assert found[0] == pytest.approx(found[1])


def test_the_jacobian_of_a_linear_map_cannot_tell_images_apart():
    found = chapter.jacobian_covariance(linear_layers(16, 5), torch.randn(7, 1, 4, 4), None)
    k = 1e-5
    values = [7 + k, *[k] * 6]
    expected = -sum(math.log(v) + 1 / v for v in values)
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_jacobian_covariance_is_that_of_gradients_image_by_image():
    net, images = convnet(True), torch.randn(6, 1, 4, 4)
    slopes = []
    for image in images:
        x = image[None].clone().requires_grad_()
        net(x).sum().backward()
        slopes.append(x.grad.flatten().double().numpy())
    centred = [s - s.mean() for s in slopes]
    unit = [s / math.sqrt(s @ s) for s in centred]
    values = np.linalg.eigvalsh([[a @ b for b in unit] for a in unit]) + 1e-5
    expected = -sum(math.log(v) + 1 / v for v in values)
    found = chapter.jacobian_covariance(copy.deepcopy(net), images, None)
    assert found == pytest.approx(expected, rel=1e-3)
    assert not images.requires_grad


def test_networks_that_tell_images_apart_have_a_higher_score():
    same = chapter.jacobian_covariance(linear_layers(16, 5), torch.randn(7, 1, 4, 4), None)
    different = chapter.jacobian_covariance(convnet(True), torch.randn(7, 1, 4, 4), None)
    assert different > same


@pytest.mark.parametrize("name", chapter.PROXIES)
def test_proxies_of_architectures_are_finite_differ_and_repeat(name, part):
    found = []
    for number in (0, 0, 1, 2):
        torch.manual_seed(0)
        net = chapter.own_net(chapter.listed_architecture(number, "small"), part, 2)
        images = part.normalize(part.train_images[:16])
        found.append(chapter.PROXIES[name](net, images, part.train_labels[:16]))
    assert all(isinstance(value, float) and math.isfinite(value) for value in found)
    assert found[0] == found[1]
    assert len(set(found)) == 3


# --- comparisons of rankings ----------------------------------------------------------------------


def columns(seed: int, count: int, size: int) -> np.ndarray:
    """Columns of numbers that have something to do with each other."""
    rng = rng_of(seed)
    return rng.normal(size=(size, count)) + rng.uniform(0, 2) * rng.normal(size=count)


@given(SEEDS)
@few(20)
def test_correlations_are_those_of_their_definitions(seed):
    x, y = columns(seed, 12, 2)
    ranks = [stats.rankdata(column) for column in (x, y)]
    pairs = [*itertools.combinations(range(12), 2)]
    agree = [np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in pairs]
    expected = {
        "Pearson": np.corrcoef(x, y)[0, 1],
        "Spearman": np.corrcoef(*ranks)[0, 1],
        "Kendall": np.mean(agree),
    }
    found = {name: correlate(x, y) for name, correlate in chapter.CORRELATIONS.items()}
    assert found == pytest.approx(expected)


@given(SEEDS, st.integers(0, 3))
@few(30)
def test_a_partial_rank_correlation_is_that_of_the_precision_matrix(seed, controls):
    """Whittaker (1990): minus the scaled entry of the inverse correlation matrix of all ranks."""
    table = columns(seed, 15, 2 + controls)
    precision = np.linalg.inv(np.corrcoef([stats.rankdata(row) for row in table]))
    expected = -precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1])
    assert chapter.partial_spearman(*table) == pytest.approx(expected)


def test_a_control_that_explains_everything_leaves_nothing():
    rng = rng_of(0)
    size = rng.normal(size=400)
    x, y = size + 0.3 * rng.normal(size=400), size + 0.3 * rng.normal(size=400)
    assert chapter.partial_spearman(x, y) > 0.8
    assert abs(chapter.partial_spearman(x, y, size)) < 0.2


def test_an_interval_is_that_of_scipys_bootstrap():
    x = rng_of(1).normal(size=60)
    found = chapter.interval_of(np.mean, x)
    expected = stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, method="percentile", rng=rng_of(2)
    ).confidence_interval
    assert found[0] == pytest.approx(x.mean())
    assert found[1:] == pytest.approx(tuple(expected), abs=0.03)
    assert found == chapter.interval_of(np.mean, list(x))


def test_an_interval_draws_whole_rows():
    x = rng_of(1).normal(size=20)
    found = chapter.interval_of(chapter.CORRELATIONS["Spearman"], x, 2 * x)
    assert found == pytest.approx((1.0, 1.0, 1.0))


# --- experiments ----------------------------------------------------------------------------------


def test_a_listed_architecture_is_the_same_for_its_number():
    listed = [chapter.listed_architecture(k, "small", which) for which in (0, 1) for k in range(30)]
    assert listed[:30] == [chapter.listed_architecture(k, "small") for k in range(30)]
    assert len(set(listed)) == 60
    for name, space in chapter.SPACES.items():
        chapter.check_architecture(chapter.listed_architecture(3, name), space)


def test_an_unknown_space_has_no_list():
    refuses(lambda: chapter.listed_architecture(0, "smal"), "unknown space 'smal'", "small")


@pytest.mark.parametrize("images", [None, 200])
def test_held_out_images_are_no_official_test_images(mini, images):
    data = chapter.held_out_data("fashion_mnist_mini", images, 50)
    total = images or len(mini.train_labels)
    assert (len(data.train_labels), len(data.test_labels)) == (total - 50, 50)
    official = {bytes(image.numpy()) for image in mini.train_images}
    both = [*data.train_images, *data.test_images]
    assert len({bytes(image.numpy()) for image in both} & official) == total


SMASHED = {
    "data": "fashion_mnist_mini",
    "space": "small",
    "hyper": "tiny",
    "epochs": 0.5,
    "lr": 0.01,
    "batch_size": 20,
    "stride": 4,
    "seed": 0,
    "count": 3,
    "held_out": 40,
    "scored": 30,
    "images": 120,
}


def lasting(row: dict) -> dict:
    """What does not depend on how fast the machine is."""
    return {name: value for name, value in row.items() if "seconds" not in name}


@pytest.mark.parametrize("hyper", ["tiny", "none"])
def test_a_row_of_smash_has_scores_lies_and_sizes(hyper):
    lies = {"tiny": 2, "none": 0}[hyper]
    row = chapter.smash_and_score(**SMASHED | {"hyper": hyper, "lies": lies})
    assert is_plain(row)
    shares = [row["scores"], *(row[f"lie_{name}"] for name in LIES)]
    assert [len(share) for share in shares] == [3, lies, lies, lies]
    assert all(0 <= score <= 1 for share in shares for score in share)
    assert all(
        round(30 * score) == pytest.approx(30 * score) for share in shares for score in share
    )
    assert row["walk_gradient"] == row["walk_random"] == []
    assert row["seconds"] > 0
    assert row["score_seconds"] > 0
    net = chapter.SmashNet(SMALL, 1, 10, chapter.HYPERS[hyper], 4)
    assert row["parameters"] == count_parameters(net.reduce)
    assert row["parameters"] + row["main_parameters"] == count_parameters(net)


def test_a_row_of_smash_has_walks_that_start_at_the_scores_and_repeats():
    rows = [chapter.smash_and_score(**SMASHED | {"walks": 1, "count": 2}) for _ in range(2)]
    assert lasting(rows[0]) == lasting(rows[1])
    for name in ("gradient", "random"):
        path = rows[0][f"walk_{name}"]
        assert len(path) == 6
        assert path[0] == rows[0]["scores"][0]


def test_scores_do_not_depend_on_what_else_is_asked():
    few_scores = chapter.smash_and_score(**SMASHED | {"count": 2})["scores"]
    assert chapter.smash_and_score(**SMASHED | {"lies": 1})["scores"][:2] == few_scores


WRONG = [
    ({"data": "mnist"}, "unknown data set 'mnist'"),
    ({"hyper": "tin"}, "unknown HyperNet 'tin'"),
    *(({"lr": value}, "lr") for value in (0, -1, NAN, INF)),
    *(({"epochs": value}, "epochs") for value in (0, -1, NAN, INF)),
    *(({"held_out": value}, "hold out") for value in (0, -1, NAN, INF, 120)),
    *(({"images": value}, "subset") for value in (0, -1, NAN, INF, 10**6)),
    *(({"batch_size": value}, "batch_size") for value in (0, -1, NAN, 81)),
    ({"space": "tiny"}, "unknown space 'tiny'"),
    *(({"count": value}, "count") for value in (0, -1, NAN, 1.5)),
    *(({"scored": value}, "scored") for value in (0, -1, NAN, INF, 1.5, 41)),
    *(({"lies": value}, "lies") for value in (-1, NAN, 4)),
    *(({"walks": value}, "walks") for value in (-1, NAN, 4)),
    *(({"stride": value}, "stride") for value in (0, -1, NAN)),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_a_row_of_smash_that_cannot_be_is_refused(wrong, words):
    refuses(lambda: chapter.smash_and_score(**SMASHED | wrong), words, *wrong.values())


@pytest.mark.parametrize("asked", ["lies", "walks"])
def test_a_supernet_cannot_be_lied_to_and_has_no_gradient_to_follow(asked, monkeypatch):
    monkeypatch.setattr(chapter, "train_smash", None)  # not to be called
    refuses(lambda: chapter.smash_and_score(**SMASHED | {"hyper": "none", asked: 1}), asked)


SCORES = [0.4, 0.2, 0.3, 0.2]  # best first: 1, 3, 2, 0
RANKING = {"data": "fashion_mnist_mini", "space": "small", "hyper": "tiny", "seed": 0}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A book with rows of the first two experiments."""
    (tmp_path / "chapters").mkdir()
    monkeypatch.setenv("JAHS_BOOK", str(tmp_path))

    def record(name: str, key: dict, metrics: dict) -> None:
        path = results_path("05_smash", name, "quick")
        path.parent.mkdir(parents=True, exist_ok=True)
        Results(path).append(describe_row(key, metrics, 1.0, "code"))

    record("smash", SMASHED, {"scores": SCORES})
    record("smash", SMASHED | {"hyper": "none"}, {"scores": SCORES[::-1]})
    record("smash", SMASHED | {"hyper": "small", "epochs": 1}, {"scores": SCORES})
    record("smash", SMASHED | {"hyper": "small", "epochs": 2}, {"scores": SCORES})
    for place, short_error in enumerate([0.5, 0.6, 0.25, 0.7]):
        metrics = {"number": [1, 3, 2, 0][place], "short_error": short_error}
        record("real", TRAINED | {"place": place}, metrics)
    return record


TRAINED = {
    **RANKING,
    "profile": "quick",
    "epochs": 1,
    "short": 0.2,
    "stride": 4,
    "held_out": 20,
    "images": 600,
}
CHOSEN = {**RANKING, "found_on": "fashion_mnist_mini", "profile": "quick"} | {
    "epochs": 0.3,
    "stride": 4,
    "images": 600,
}


@pytest.mark.usefixtures("recorded")
def test_a_ranking_is_that_of_recorded_scores_and_ties_keep_their_order():
    assert chapter.ranked("quick", **RANKING) == [1, 3, 2, 0]
    assert chapter.ranked("quick", **RANKING | {"hyper": "none"}) == [0, 2, 1, 3]


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("changes", "count"), [({"seed": 5}, 0), ({"data": "digits"}, 0), ({"hyper": "small"}, 2)]
)
def test_a_ranking_needs_exactly_one_row(changes, count):
    key = RANKING | changes
    refuses(lambda: chapter.ranked("quick", **key), f"{count} rows", *changes.values())


@pytest.mark.usefixtures("recorded")
def test_a_ranking_that_was_not_recorded_says_how_to_record_it():
    refuses(lambda: chapter.ranked("standard", **RANKING), "experiment run 05_smash/smash")
    refuses(lambda: chapter.ranked("fast", **RANKING), "unknown profile 'fast'")


@pytest.mark.usefixtures("recorded")
def test_what_is_chosen_is_the_best_by_its_recorded_rows():
    def choose(by: str, seed: int = 0, **key: Any) -> Any:
        return chapter.choose_by(by, "quick", seed, **RANKING | key)

    listed = partial(chapter.listed_architecture, space="small")
    assert choose("SMASH") == listed(1)
    assert choose("SMASH", hyper="none") == listed(0)
    assert choose("short training") == listed(2)
    assert choose("random") == listed(0, which=1)
    assert choose("random", 7) == listed(7, which=1)


@pytest.mark.usefixtures("recorded")
def test_a_choice_without_its_rows_is_refused():
    def choose(by: str, **key: Any) -> Any:
        return chapter.choose_by(by, "quick", 0, **RANKING | key)

    refuses(lambda: choose("short training", data="digits"), "no rows of real for digits")
    refuses(lambda: choose("SMASH", data="digits"), "0 rows of smash")
    refuses(lambda: choose("random", space="smal"), "unknown space 'smal'")


@pytest.mark.usefixtures("recorded")
def test_an_unknown_way_to_choose_is_refused():
    refuses(lambda: chapter.choose_by("smash", "quick", 0, **RANKING), "unknown choice 'smash'")


@pytest.mark.usefixtures("recorded")
def test_a_row_of_real_has_errors_sizes_and_proxies_and_repeats():
    rows = [chapter.train_ranked(**TRAINED, place=2) for _ in range(2)]
    row = rows[0]
    assert lasting(row) == lasting(rows[1])
    assert is_plain(row)
    assert row["number"] == 2
    assert all(math.isfinite(value) for value in row.values())
    assert 0 <= row["error"] <= 1
    assert 0 <= row["short_error"] <= 1
    assert {"seconds", "short_seconds", "parameters", "flops", "ops", "convs"} <= set(row)
    for name in chapter.PROXIES:
        assert row[f"{name} seconds"] > 0
    architecture = chapter.listed_architecture(2, "small")
    described = chapter.describe_architecture(architecture, load("fashion_mnist_mini"), 4)
    assert row | described == row


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("place", [-1, 4, NAN])
def test_a_place_is_one_of_the_ranking(place):
    refuses(lambda: chapter.train_ranked(**TRAINED | {"epochs": 0.2}, place=place), "place", place)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"data": "mnist"}, "unknown data set 'mnist'"),
        ({"hyper": "no"}, "0 rows"),
        ({"epochs": NAN}, "epochs"),
        ({"short": 0}, "short"),
        ({"held_out": -1}, "got -1"),
        ({"images": NAN}, "nan"),
    ],
)
def test_a_row_of_real_that_cannot_be_is_refused(wrong, words):
    refuses(lambda: chapter.train_ranked(**TRAINED | {"epochs": 0.2, "place": 0} | wrong), words)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("by", chapter.CHOICES)
def test_a_row_of_final_is_a_training_of_what_was_chosen(by):
    rows = [chapter.train_chosen(**CHOSEN, by=by) for _ in range(2)]
    assert lasting(rows[0]) == lasting(rows[1])
    assert is_plain(rows[0])
    assert all(math.isfinite(value) for value in rows[0].values())
    assert 0 <= rows[0]["error"] <= 1
    if by != "hand-made":
        chosen = chapter.choose_by(by, "quick", 0, **RANKING)
        own = chapter.own_net(chosen, load("fashion_mnist_mini"), 4)
        assert rows[0]["parameters"] == count_parameters(own)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"by": "smash"}, "unknown choice 'smash'"),
        ({"space": "tiny"}, "0 rows"),
        ({"by": "random", "space": "tiny"}, "unknown space 'tiny'"),
        ({"found_on": "digits"}, "0 rows"),
        ({"epochs": INF}, "epochs"),
        ({"data": "mnist"}, "unknown data set 'mnist'"),
    ],
)
def test_a_row_of_final_that_cannot_be_is_refused(wrong, words):
    refuses(lambda: chapter.train_chosen(**CHOSEN | {"by": "SMASH"} | wrong), words)


@pytest.mark.parametrize("number", range(4))
def test_the_hand_made_network_is_as_large_as_its_family_allows(mini, number):
    def size(architecture: Any) -> int:
        return count_parameters(chapter.own_net(architecture, mini, 2))

    model = chapter.listed_architecture(number, "small")
    found = chapter.hand_made(model, SMALL, mini, 2)
    first = found[0].channels
    ops = len(found[0].ops)
    assert found == tuple(chapter.resnet_block(first * 2**k, ops, first * 2**k) for k in range(3))
    family = [
        size(tuple(chapter.resnet_block(4 * w * 2**k, n, 4 * w * 2**k) for k in range(3)))
        for w in range(1, 5)
        for n in range(1, 5)
    ]
    assert abs(size(found) - size(model)) <= min(abs(s - size(model)) for s in family)


def test_an_architecture_is_described_by_what_it_costs(mini):
    op = Op((0,), (0,), 8, (True, False, False, True), 3, groups=2)
    architecture = (Block(1, 8, (op, PLAIN)), Block(2, 4, (Op((0,), (1,), 4),)))
    found = chapter.describe_architecture(architecture, mini, 2)
    own = chapter.own_net(architecture, mini, 2)
    assert (found["ops"], found["convs"]) == (3, 4)
    assert found["parameters"] == sum(p.numel() for p in own.parameters())
    first, second = 14 * 14, 7 * 7
    convs = first * (9 * 8 + 8 * 8 + 2 * 8 * 4 * 9 + 8 * 4 + 4 * 8 * 9)
    convs += second * (4 * 4 + 4 * 4 * 9)
    merge_after, merge_before = second * 8 * 4, first * 8 * 4  # pooling may stand before or after
    classifier = 2 * 4 * 10
    expected = {2 * (convs + merge + classifier) for merge in (merge_after, merge_before)}
    assert found["flops"] in expected


# --- the grids ------------------------------------------------------------------------------------

GRIDS = grids_of(chapter)


@pytest.mark.parametrize(("experiment", "profile"), GRIDS)
def test_the_grids_name_what_there_is(experiment, profile):
    for key in experiment.keys(profile):
        assert key["space"] in chapter.SPACES
        assert key["hyper"] in chapter.HYPERS
        assert key["data"] in DATASETS
        assert key.get("found_on", key["data"]) in DATASETS
        assert key.get("profile", profile) == profile
        assert key.get("scored", 1) <= key.get("held_out", 1)
        assert max(key.get("lies", 0), key.get("walks", 0)) <= key.get("count", 0)


@pytest.mark.parametrize("profile", chapter.SMASH_GRIDS)
def test_supernets_are_not_asked_about_encodings(profile):
    for key in smash_rows(profile, hyper="none"):
        assert not key.get("lies", 0)
        assert not key.get("walks", 0)


def smash_rows(profile: str, **key: Any) -> list[dict]:
    keys = chapter.EXPERIMENTS["smash"].keys(profile)
    return [row for row in keys if all(row[name] == value for name, value in key.items())]


@pytest.mark.parametrize("profile", chapter.REAL_GRIDS)
def test_every_ranking_that_real_trainings_need_is_one_row_of_smash(profile):
    for key in chapter.EXPERIMENTS["real"].keys(profile):
        (row,) = smash_rows(profile, **{name: key[name] for name in RANKING})
        assert 0 <= key["place"] < row["count"]
        assert (row["held_out"], row["stride"]) == (key["held_out"], key["stride"])
        assert row.get("images") == key.get("images")


@pytest.mark.parametrize("profile", chapter.FINAL_GRIDS)
def test_every_choice_of_the_last_experiment_has_its_rows(profile):
    real = {key["data"] for key in chapter.EXPERIMENTS["real"].keys(profile)}
    found = set()
    for key in chapter.EXPERIMENTS["final"].keys(profile):
        assert key["by"] in chapter.CHOICES
        names = {"data": key["found_on"], "space": key["space"], "hyper": key["hyper"], "seed": 0}
        if key["by"] in ("SMASH", "hand-made"):
            assert len(smash_rows(profile, **names)) == 1
        if key["by"] == "short training":
            assert key["found_on"] in real
        found.add((key["by"], key["data"] == key["found_on"]))
    assert found >= {(by, True) for by in chapter.CHOICES} | {("SMASH", False)}
