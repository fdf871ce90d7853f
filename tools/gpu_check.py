"""What the first minutes on a GPU should find out; `tools/gpu_check.sh` runs part after part.

    python tools/gpu_check.py PART [--seconds 60]

Every part prints lines as it goes and the whole traceback of what fails, and then goes on. On the
CPU (JAHS_DEVICE=cpu) everything runs at toy size and nothing is captured.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from together import Together, loss_together

from jahs_utils import fit, load
from jahs_utils.chapters import chapter_names, load_chapter
from jahs_utils.data import ImageData, augment
from jahs_utils.device import (
    NumberFormat,
    describe_device,
    fastest_format,
    measure_formats,
    pick_device,
)
from jahs_utils.networks import ConvNet, WideResNet
from jahs_utils.train import Callback, Training, replace_parameter

DEVICE = pick_device()
GPU = DEVICE.type == "cuda"
FORMATS = [NumberFormat(p, c) for p in ("float32", "bfloat16") for c in (False, True)]
PLAIN = FORMATS[0]
CAPTURES = (False, True) if GPU else (False,)
failures = 0


@contextmanager
def shown() -> Iterator[None]:
    """Print the traceback of what fails, and go on."""
    global failures
    try:
        yield
    except Exception:
        failures += 1
        traceback.print_exc(file=sys.stdout)


def small_data() -> ImageData:
    return load("fashion_mnist_mini", device=DEVICE, subset=6000 if GPU else 1000)


def random_cifar(images: int) -> ImageData:
    """Noise of CIFAR-10's shape: times do not depend on what is in the pictures."""
    mini = small_data()
    colour = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    labels = torch.randint(10, (images,), device=DEVICE)
    parts = {"train_images": colour, "train_labels": labels}
    parts |= {"test_images": colour[:10], "test_labels": labels[:10]}
    return ImageData(**vars(mini) | parts)


def trained(make: Callable[[], nn.Module], data: ImageData, **settings: object) -> tuple:
    torch.manual_seed(0)
    model = make()
    history = fit(model, data, **({"lr": 0.02, "evaluate_every": None} | settings))
    return model, history


def distance(first: nn.Module, second: nn.Module) -> float:
    """Largest difference between two networks' tensors."""
    pairs = zip(first.state_dict().values(), second.state_dict().values())
    return max((p.double() - q.double()).abs().max().item() for p, q in pairs)


def engine() -> None:
    """Is cuDNN on inside a step, and how long is a step: eager, captured, in each format?"""
    print(f"{describe_device(DEVICE)}; torch {torch.__version__}; {DEVICE}")
    cudnn, seen = torch.backends.cudnn, []

    def look(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append((cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32))
        return F.cross_entropy(model(images).float(), labels)

    with shown():
        trained(ConvNet, small_data(), steps=2, loss=look)
        print(f"cuDNN enabled, deterministic, benchmark, TF32 in a step: {seen[-1]}")
    colour = random_cifar(25600 if GPU else 640)
    wide = [("WRN-16-4", lambda: WideResNet(16, 4)), ("WRN-28-10", lambda: WideResNet(28, 10))]
    nets = [("ConvNet", ConvNet, small_data()), *((n, m, colour) for n, m in wide if GPU)]
    for (name, make, data), form, capture in itertools.product(nets, FORMATS, CAPTURES):
        if name == "WRN-28-10" and form.precision == "float32":
            continue
        with shown():
            how = {"number_format": form, "capture": capture}
            spent = []
            for steps in (30, 90) if GPU else (2, 6):
                start = time.perf_counter()
                trained(make, data, steps=steps, **how)
                if GPU:
                    torch.cuda.synchronize(DEVICE)
                spent.append((steps, time.perf_counter() - start))
            (few, short), (many, long) = spent  # start and capture are in both
            step = 1000 * (long - short) / (many - few)
            print(f"{name:10} {form!s:58} captured {capture!s:5}: {step:.3f} ms a step")


def capture() -> None:
    """Captured against eager, and each twice with one seed."""
    data = small_data()
    plain, drawn = {}, {"augment": functools.partial(augment, crop=2, cutout=4), "mixup": 0.4}
    for name, form, extra in itertools.product(("sgd", "adam", "adamw"), FORMATS, (plain, drawn)):
        with shown():
            how = {"steps": 60 if GPU else 6, "optimizer": name, "number_format": form, **extra}
            how["lr"] = 0.02 if name == "sgd" else 0.001
            runs = [trained(ConvNet, data, capture=c, **how)[0] for c in CAPTURES for _ in "ab"]
            repeats = [distance(a, b) for a, b in zip(runs[::2], runs[1::2])]
            across = distance(runs[0], runs[-1])
            print(
                f"{name:5} {form!s:58} drawn {bool(extra)!s:5}: twice {repeats}, apart {across:.1e}"
            )


class Widen(Callback):
    """Eight more channels after the first convolution, every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    @torch.no_grad()
    def on_step(self, training: Training) -> None:
        if training.step % self.every:
            return
        first, second = training.model.layers[:2]
        for module, name, dimension in (
            (first.conv, "weight", 0),
            (first.norm, "weight", 0),
            (first.norm, "bias", 0),
            (second.conv, "weight", 1),
        ):
            old = getattr(module, name)
            shape = list(old.shape)
            shape[dimension] = 8
            more = torch.full(shape, 0.01, device=old.device)
            replace_parameter(module, name, torch.cat([old, more], dimension))
        for name, fill in (("running_mean", 0.0), ("running_var", 1.0)):
            old = getattr(first.norm, name)
            setattr(first.norm, name, torch.cat([old, torch.full((8,), fill, device=old.device)]))


def growth() -> None:
    """Growth with an evaluation after each epoch: captured against eager, in each layout."""
    data = small_data()
    for form in FORMATS:
        with shown():
            found = []
            for c in CAPTURES:
                how = {"callbacks": [Widen(70 if GPU else 5)], "evaluate_every": 1, "capture": c}
                found.append(
                    trained(ConvNet, data, epochs=4 if GPU else 2, number_format=form, **how)
                )
            losses = [[round(x, 5) for x in h.frame.train_loss] for _, h in found]
            seconds = [round(h.final("seconds"), 2) for _, h in found]
            apart = distance(found[0][0], found[-1][0])
            print(f"{form!s:58}: apart {apart:.1e}; losses {losses}; seconds {seconds}")


def together() -> None:
    """Five networks as one module against five fits: the same numbers, seconds of a network."""
    data, how = small_data(), {"epochs": 4 if GPU else 1, "number_format": FORMATS[1]}

    def five() -> Together:
        return Together([ConvNet() for _ in range(5)])

    for c in CAPTURES:
        with shown():
            torch.manual_seed(0)
            alone = [ConvNet() for _ in range(5)]
            start = time.perf_counter()
            for model in alone:
                fit(model, data, lr=0.02, evaluate_every=None, capture=c, **how)
            middle = time.perf_counter()
            module, history = trained(five, data, loss=loss_together, capture=c, **how)
            end = time.perf_counter()
            apart = [distance(m, a.cpu()) for m, a in zip(module.members(ConvNet), alone)]
            print(
                f"captured {c!s:5}: together {(end - middle) / 5:.2f} s, one by one "
                f"{(middle - start) / 5:.2f} s a network; apart {max(apart):.1e}; {history.stopped}"
            )


def formats() -> None:
    """The choice of a number format, three times."""
    for _ in range(3 if GPU else 1):
        with shown():
            seconds = measure_formats(DEVICE)
            listed = ", ".join(f"{p} {c}: {1000 * s:.2f} ms" for (p, c), s in seconds.items())
            print(f"{fastest_format(DEVICE, measure=True)}; precision, channels-last: {listed}")


def units(seconds: float) -> None:
    """A quick unit of each chapter's experiments, those that stand first before the others."""
    end, declared = time.monotonic() + seconds, {}
    for name in chapter_names():
        with shown():
            experiments = getattr(load_chapter(name), "EXPERIMENTS", {})
            declared[name] = [(n, e) for n, e in experiments.items() if "quick" in e.grids]
    rounds = itertools.zip_longest(*([(c, *e) for e in es] for c, es in declared.items()))
    for chapter, name, experiment in filter(None, itertools.chain.from_iterable(rounds)):
        if time.monotonic() > end:
            print(f"no time for {chapter}/{name}")
            continue
        with shown():
            start = time.perf_counter()
            experiment.unit(**experiment.keys("quick")[0])
            print(f"{chapter}/{name}: {time.perf_counter() - start:.1f} s", flush=True)


def steps_a_second(seconds: float) -> float:
    _, history = trained(ConvNet, small_data(), seconds=seconds)
    return history.final("step") / history.final("seconds")


def processes() -> None:
    """Steps a second of one, two and four processes on one device."""
    for count in (1, 2, 4):
        with (
            shown(),
            ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool,
        ):
            for seconds in (0.5, 4.0 if GPU else 0.5):  # the first time, they start and warm up
                jobs = [pool.submit(steps_a_second, seconds) for _ in range(count)]
                speeds = [job.result() for job in jobs]
            print(f"{count} processes: {sum(speeds):.0f} steps a second ({speeds})", flush=True)


PARTS = {f.__name__: f for f in (engine, capture, growth, together, formats, processes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "units"])
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    if arguments.part == "units":
        units(arguments.seconds)
    else:
        PARTS[arguments.part]()
    print(f"{arguments.part}: {failures} failed")
    sys.exit(min(failures, 1))


if __name__ == "__main__":
    main()
