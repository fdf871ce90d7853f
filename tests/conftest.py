"""Fixtures of all tests: nothing is read from or written to the user's folders."""

import json
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from jahs_utils import data, device

# A busy machine is slow now and then: no property fails for its time.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

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


def lasting(*, steps):
    time.sleep(steps / 100)
    return {"steps": steps}


def timed(*, x):
    """Leave the begin and the end in the folder that MARKS names."""
    start = time.time()
    time.sleep(0.2)
    (Path(os.environ["MARKS"]) / f"timed-{x}").write_text(f"{start} {time.time()}")
    return {"x": x}


def hungry(*, x):
    """Runs out of memory where others use it, too: the first time."""
    mark = Path(os.environ["MARKS"]) / f"hungry-{x}"
    if not mark.exists():
        mark.touch()
        raise RuntimeError("CUDA out of memory")
    return {"x": x}


def not_finite(*, x):
    return {"inf": float("inf"), "nested": [1.0, float("nan")], "tensor": torch.tensor([x / 2])}


def not_json(*, x):
    return {"device": torch.device("cpu")}
''',
    """
EXPERIMENTS = {
    "train": Experiment(train, {"quick": grid(data="digits", seed=range(2))}),
    "square": Experiment(square, {
        "quick": grid(x=range(4)), "standard": grid(x=range(9)), "gpu": grid(x=range(5)),
    }),
    "slow_square": Experiment(slow_square, {"quick": grid(x=range(30))}),
    "lasting": Experiment(lasting, {
        "standard": grid(steps=[10, 20, 40]), "gpu": grid(steps=[6000, 30, 50, 9000]),
    }),
    "timed": Experiment(timed, {"gpu": grid(x=range(3))}, alone=True),
    "hungry": Experiment(hungry, {"gpu": grid(x=range(2))}),
    "failing": Experiment(failing, {"quick": grid(x=range(3))}),
    "killing": Experiment(killing, {"quick": grid(x=range(6)), "gpu": grid(x=range(4))}),
    "sleeping": Experiment(sleeping, {"quick": grid(x=range(20))}),
    "not_finite": Experiment(not_finite, {"quick": grid(x=1)}),
    "not_json": Experiment(not_json, {"quick": grid(x=1)}),
}
""",
]


def pytest_itemcollected(item: pytest.Item) -> None:
    """`pytest -k cuda` runs the tests that are skipped where there is no CUDA."""
    if any("CUDA" in str(mark.kwargs.get("reason")) for mark in item.iter_markers("skipif")):
        item.extra_keyword_matches.add("cuda")


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
        code = {"cell_type": "code", "execution_count": None, "outputs": []}
        exported = {"tags": ["export"]}
        made = [
            {"cell_type": "markdown", "metadata": {}, "source": "# Title"},
            code | {"metadata": {}, "source": "raise SystemExit('not exported')"},
            *(code | {"metadata": exported, "source": c.strip("\n")} for c in cells),
        ]
        numbered = [cell | {"id": f"cell-{k}"} for k, cell in enumerate(made)]
        notebook = {"cells": numbered, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        path = self.root / "chapters" / f"{name}.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
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
