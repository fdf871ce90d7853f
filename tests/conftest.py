"""Fixtures of all tests: nothing is read from or written to the user's folders."""

import linecache
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from jahs_utils import data, device

SMALL_CHAPTER = [
    """
import os
import signal
import time
from pathlib import Path

import torch

from jahs_utils import Experiment, fit, grid, load
from jahs_utils.device import NumberFormat
from jahs_utils.networks import ConvNet
""",
    '''
FORMAT = NumberFormat("float32", False)


def train(*, data, seed):
    """Five steps on digits."""
    torch.manual_seed(seed)
    network = ConvNet((4,), (), 1, 10, 8)
    fit(network, load(data, subset=200), steps=5, batch_size=32, seed=seed, number_format=FORMAT)
    return {"weights": network.classifier.weight.detach().sum(1)}


def square(*, x):
    """Leave a mark for every computation, in the folder that MARKS names."""
    if "MARKS" in os.environ:
        with open(Path(os.environ["MARKS"]) / str(x), "a", encoding="utf-8") as file:
            file.write("computed\\n")
    return {"square": x * x}


def slow_square(*, x):
    time.sleep(0.05)
    return square(x=x)


def failing(*, x):
    if x == 1:
        raise RuntimeError("one is\\nnot allowed")
    return square(x=x)


def killing(*, x):
    if x == 1:
        os._exit(3)
    return square(x=x)


def sleeping(*, x):
    time.sleep(0.3)
    return {"x": x}


def not_finite(*, x):
    return {"inf": float("inf"), "nested": [1.0, float("nan")], "tensor": torch.tensor([x / 2])}


def not_json(*, x):
    return {"device": torch.device("cpu")}
''',
    """
EXPERIMENTS = {
    "train": Experiment(train, {"quick": grid(data="digits", seed=range(2))}),
    "square": Experiment(square, {"quick": grid(x=range(4)), "standard": grid(x=range(9))}),
    "slow_square": Experiment(slow_square, {"quick": grid(x=range(30))}),
    "failing": Experiment(failing, {"quick": grid(x=range(3))}),
    "killing": Experiment(killing, {"quick": grid(x=range(6))}),
    "sleeping": Experiment(sleeping, {"quick": grid(x=range(20))}),
    "not_finite": Experiment(not_finite, {"quick": grid(x=1)}),
    "not_json": Experiment(not_json, {"quick": grid(x=1)}),
}
""",
]


def _compute_in_float32(patch: pytest.MonkeyPatch) -> None:
    """Keep float32 as the number format of this machine, in the cache that worker processes read.

    Which format is fast differs from machine to machine; what a test compares must not.
    """
    plain = device.NumberFormat("float32", False)
    with patch.context() as measured:
        measured.setattr(device, "measure_formats", lambda _: {plain: 0.0})
        for threads in range(1, (os.cpu_count() or 1) + 1):
            torch.set_num_threads(threads)
            assert device.fastest_format(torch.device("cpu")) == plain
    device._measure_and_keep.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, no progress bars, and nothing that the caller has set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAHS_PROGRESS", "0")
        patch.setenv("JAHS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("JAHS_DATA", raising=False)
        patch.delenv("JAHS_BOOK", raising=False)
        threads = torch.get_num_threads()
        _compute_in_float32(patch)
        torch.set_num_threads(1)  # ten times faster for small networks where cores are busy
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def on_the_cpu() -> Iterator[None]:
    """Units compute on the CPU, whatever this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAHS_DEVICE", "cpu")
        yield


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that JAHS_DATA names, with an empty cache beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("JAHS_DATA", str(folder))
    monkeypatch.setenv("JAHS_CACHE", str(tmp_path / "cache"))
    data._load.cache_clear()
    yield folder
    data._load.cache_clear()


class Book:
    """A book root with chapters made by the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "chapters").mkdir()

    def write(self, name: str, cells: list[str]) -> Path:
        """Write a chapter whose code `cells` are all tagged `export`."""
        exported = [new_code_cell(c.strip("\n"), metadata={"tags": ["export"]}) for c in cells]
        other = [new_markdown_cell("# Title"), new_code_cell("raise SystemExit('not exported')")]
        path = self.root / "chapters" / f"{name}.ipynb"
        nbformat.write(new_notebook(cells=[*other, *exported]), path)
        self.forget(name)
        return path

    def forget(self, name: str) -> None:
        """Let the next import read the chapter again, as a new process would."""
        sys.modules.pop(f"jahs_utils.chapters.{name}", None)
        linecache.clearcache()


@pytest.fixture(scope="session")
def make_book() -> Callable[[Path], Book]:
    """Make a book root whose one chapter, 90_small, declares small experiments."""

    def make(root: Path) -> Book:
        made = Book(root)
        made.write("90_small", SMALL_CHAPTER)
        return made

    return make


@pytest.fixture
def book(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_book: Callable[[Path], Book]
) -> Iterator[Book]:
    """A small book (see `make_book`) that JAHS_BOOK names."""
    root = tmp_path / "book"
    root.mkdir()
    monkeypatch.setenv("JAHS_BOOK", str(root))
    made = make_book(root)
    yield made
    for path in (root / "chapters").glob("*.ipynb"):
        made.forget(path.stem)
