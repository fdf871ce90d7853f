"""Seconds per epoch: `fit` against what you would write otherwise, in one process, alternating.

The same 16-32-64 ConvNet, complete Fashion-MNIST, batches of 128, SGD with momentum: a loop over
torchvision's Dataset and a DataLoader (0 and 2 workers), Lightning's Trainer on that DataLoader,
`fit` (on CUDA also its captured step), and five networks at once: vectorised as one module
(`together.py`), and in processes that share the machine.
Each is timed in turn, round after round, so that a drifting machine drifts for all. Accuracy over
seeds shows that the same thing is computed.

Usage: python benchmarks/training.py [--device cuda] [--rounds 3] [--share 1.0] [--record]
--share trains on that share of the images and scales the time. --record appends the row to
results/benchmarks/training.jsonl, from which the book's speed page is made.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pandas as pd
import torch
import torch.nn.functional as F
import torchvision
from together import Together, loss_together
from torch import nn
from torch.utils.data import DataLoader

from jahs_utils import evaluate, fit, load
from jahs_utils.chapters import book_root, code_version
from jahs_utils.data import ImageData
from jahs_utils.device import use_device
from jahs_utils.experiments import Results, describe_row
from jahs_utils.networks import ConvNet

try:
    import lightning
except ImportError:
    lightning = None

BATCH = 128
FIVE = 5


class TextbookLayer(nn.Sequential):
    """The layer as it is usually written, ReLU before the pooling."""

    def __init__(self, i: int, o: int) -> None:
        convolution = nn.Conv2d(i, o, 3, padding=1, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))


def textbook_network() -> nn.Module:
    """The 16-32-64 ConvNet as a plain nn.Sequential."""
    layers = [TextbookLayer(i, o) for i, o in ((1, 16), (16, 32), (32, 64))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 10))


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    parameters = network.parameters()
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)


class ImageByImage(torchvision.datasets.FashionMNIST):
    """torchvision's Dataset (image by image, with transforms) on the images `load` has found."""

    def __init__(self, data: ImageData) -> None:
        mean, std = (float(v) / 255 for v in (data.mean, data.std))
        steps = [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(mean, std)]
        self.transform, self.target_transform = torchvision.transforms.Compose(steps), None
        self.data, self.targets = data.train_images[:, 0].cpu(), data.train_labels.cpu()


def loader(data: ImageData, workers: int) -> DataLoader:
    pinned = data.device.type == "cuda"
    return DataLoader(
        ImageByImage(data), BATCH, shuffle=True, num_workers=workers, pin_memory=pinned
    )


def dataloader_loop(data: ImageData, workers: int, seed: int) -> nn.Module:
    """One epoch as in torchvision's tutorials."""
    torch.manual_seed(seed)
    network = textbook_network().to(data.device)
    optimizer = sgd(network)
    for images, labels in loader(data, workers):
        images, labels = images.to(data.device), labels.to(data.device)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


if lightning:

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = textbook_network()

        def training_step(self, batch: tuple, index: int) -> torch.Tensor:
            images, labels = batch
            return F.cross_entropy(self.network(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.network)


def lightning_epoch(data: ImageData, workers: int, seed: int) -> nn.Module:
    """One epoch by Lightning's Trainer, everything optional switched off."""
    torch.manual_seed(seed)
    module = Module()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="gpu" if data.device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, loader(data, workers))
    return module.network.to(data.device)


def fit_epoch(data: ImageData, seed: int, capture: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    network = ConvNet()
    settings = {"epochs": 1, "lr": 0.05, "schedule": "constant", "seed": seed}
    fit(network, data, evaluate_every=None, capture=capture, **settings)
    return network


def together_epoch(data: ImageData, seed: int, capture: bool) -> None:
    torch.manual_seed(seed)
    five = Together([ConvNet() for _ in range(FIVE)])
    settings = {"epochs": 1, "lr": 0.05, "schedule": "constant", "seed": seed}
    fit(five, data, loss=loss_together, evaluate_every=None, capture=capture, **settings)


def epoch_in_a_process(name: str, device: str, share: int, seed: int) -> None:
    data = load(name, device=device)
    data = dataclasses.replace(
        data.subset(share), test_images=data.test_images[:1], test_labels=data.test_labels[:1]
    )
    fit_epoch(data, seed, capture=data.device.type == "cuda")


class InProcesses:
    """Five networks at once in processes, which start and warm up before they are timed."""

    def __init__(self, data: ImageData) -> None:
        threads = max(1, (os.cpu_count() or 1) // FIVE)
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(FIVE, context, torch.set_num_threads, (threads,))
        self.job = data.name, str(data.device), len(data.train_labels)
        self(0)

    def __call__(self, seed: int) -> None:
        seeds = range(seed, seed + FIVE)
        jobs = [self.pool.submit(epoch_in_a_process, *self.job, s) for s in seeds]
        for job in jobs:
            job.result()


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def contestants(data: ImageData) -> dict[str, Callable[[int], object]]:
    """Name -> one epoch with a seed. Names that start with "five" train five networks."""
    calls: dict[str, Callable[[int], object]] = {
        "DataLoader loop": lambda seed: dataloader_loop(data, 0, seed),
        "DataLoader loop, 2 workers": lambda seed: dataloader_loop(data, 2, seed),
        "Lightning": lambda seed: lightning_epoch(data, 0, seed),
        "fit": lambda seed: fit_epoch(data, seed),
    }
    if lightning is None:
        del calls["Lightning"]
    calls["five networks, together"] = lambda seed: together_epoch(data, seed, False)
    calls["five networks, processes"] = InProcesses(data)
    if data.device.type == "cuda":
        calls["fit, captured step"] = lambda seed: fit_epoch(data, seed, True)
        calls["five networks, together, captured"] = lambda seed: together_epoch(data, seed, True)
    return calls


def benchmark(data: ImageData, scored: ImageData, rounds: int, scale: float) -> list[list[str]]:
    """Rows of name, seconds per epoch of one network, ratio, accuracy on `scored`."""
    calls = contestants(data)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    accuracies: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds):
        for name, call in calls.items():
            spent, network = timed(functools.partial(call, k), data.device)
            networks = FIVE if name.startswith("five") else 1
            seconds[name].append(spent * scale / networks)
            if isinstance(network, nn.Module):
                accuracies[name].append(evaluate(network, scored).accuracy)
            print(f"round {k + 1}/{rounds}  {name}: {seconds[name][-1]:.2f} s", flush=True)
    reference = min(statistics.median(seconds[n]) for n in calls if n.startswith("DataLoader"))
    table = []
    for name in calls:
        median = statistics.median(seconds[name])
        low, high = min(seconds[name]), max(seconds[name])
        scores = accuracies[name]
        accuracy = f"{100 * statistics.mean(scores):.1f}" if scores else ""
        spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        row = [name, f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{reference / median:.2f}"]
        table.append([*row, accuracy + spread])
    return table


COLUMNS = [
    "one epoch of one network",
    "seconds (median)",
    "lowest to highest",
    "times the best DataLoader loop",
    "accuracy after one epoch (%)",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    device = use_device(arguments.device)
    data = load(arguments.data, device=device)
    scored = data
    # `fit` ends with an evaluation, the others do not: leave it a single image.
    data = dataclasses.replace(
        data, test_images=data.test_images[:1], test_labels=data.test_labels[:1]
    )
    whole = len(data.train_labels)
    if arguments.share < 1:
        data = data.subset(round(whole * arguments.share))
    start = time.perf_counter()
    table = benchmark(data, scored, arguments.rounds, whole / len(data.train_labels))
    key = {"kind": device.type, "data": arguments.data, "rounds": arguments.rounds, "seed": 0}
    key |= {"share": arguments.share, "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"}
    metrics = {"columns": COLUMNS, "table": table}
    metrics["lightning"] = getattr(lightning, "__version__", "not installed")
    row = describe_row(key, metrics, time.perf_counter() - start, code_version(benchmark))
    print("\n" + pd.DataFrame(table, columns=COLUMNS).to_string(index=False))
    if arguments.record:
        rows = Results(book_root() / "results" / "benchmarks" / "training.jsonl")
        rows.append(row)
        print(f"recorded in {rows.path}")


if __name__ == "__main__":
    main()
