"""The machine: which device to use, what it is, and which number format is fast on it."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from jahs_utils.checks import named_folder, one_of, whole

torch.backends.cudnn.allow_tf32 = False  # "float32" is float32: what holds to 1e-6 holds on GPUs


class NumberFormat(NamedTuple):
    """How a network computes: `precision` is "float32" or "bfloat16" (autocast)."""

    precision: str
    channels_last: bool


def cache_folder() -> Path:
    """The folder for data and measurements: `$JAHS_CACHE`, else the user's cache folder."""
    if named := named_folder("JAHS_CACHE"):
        return named
    import platformdirs  # a machine that only computes may lack it

    return Path(platformdirs.user_cache_dir("jahs")).absolute()


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:1" or "mps" into a device that this machine has.

    "auto" takes what `$JAHS_DEVICE` names, else a GPU, else the CPU.
    Raises ValueError when the device is unknown or missing.
    """
    name = os.environ.get("JAHS_DEVICE", "auto") if str(name) == "auto" else name
    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda"] + [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        available.append("mps")
    if str(name) == "auto":
        return torch.device("cuda" if "cuda" in available else "cpu")
    return torch.device(one_of(str(name), ["auto", *available], "device"))


def use_device(name: str) -> torch.device:
    """Make `name` what "auto" means in this process and in the workers it starts."""
    device = pick_device(name)
    os.environ["JAHS_DEVICE"] = str(device)
    return device


def describe_device(device: torch.device) -> str:
    """A short name of the hardware, for provenance: the GPU's, or the CPU and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def seconds_per_call(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Median wall time of `call` in seconds after two warm-up calls; waits for a GPU to finish."""
    whole(repeats, "repeats")
    times = []
    for k in range(repeats + 2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if k >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_formats(device: torch.device) -> dict[NumberFormat, float]:
    """Seconds per training step of a reference ConvNet in each number format.

    A GPU gets a larger one: the launches of the small one would take longer than its arithmetic.
    """
    on_gpu = device.type == "cuda"
    images, i, j, k = (512, 64, 128, 256) if on_gpu else (128, 16, 32, 64)

    def step_seconds(form: NumberFormat) -> float:
        layout = torch.channels_last if form.channels_last else torch.contiguous_format
        net = nn.Sequential(
            *(nn.Conv2d(i, j, 3, padding=1), nn.BatchNorm2d(j), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(j, k, 3, padding=1), nn.BatchNorm2d(k), nn.MaxPool2d(2), nn.ReLU()),
        ).to(device, memory_format=layout)
        batch = torch.rand(images, i, 28, 28, device=device).to(memory_format=layout)
        use_bfloat16 = form.precision == "bfloat16"

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
                loss = net(batch).float().square().mean()
            loss.backward()

        return seconds_per_call(step, device)

    forms = [NumberFormat(p, c) for p in ("float32", "bfloat16") for c in (False, True)]
    # The measurement must not shift a seeded run, and works inside no_grad and inference_mode.
    forked = torch.random.fork_rng([device] if on_gpu else [])
    with forked, torch.inference_mode(False), torch.enable_grad():
        return {form: step_seconds(form) for form in forms}


def fastest_format(device: torch.device, measure: bool = False) -> NumberFormat:
    """The number format that trains fastest on this machine, measured once and remembered.

    The choice is kept in the cache folder, so that later runs on this machine use the same
    arithmetic and repeat bit for bit. bfloat16 must win by 15 % to be chosen: it is less exact.
    `measure=True` measures again.
    """
    name = f"{describe_device(device)} torch {torch.__version__}"
    path = cache_folder() / "number_format" / (_file_name(name) + ".json")
    if not measure and (known := _read_format(path)) is not None:
        return known
    return _measure_and_keep(device, path, fresh=time.time() if measure else 0.0)


@functools.lru_cache(maxsize=16)
def _measure_and_keep(device: torch.device, path: Path, fresh: float) -> NumberFormat:
    seconds = measure_formats(device)
    handicap = {"float32": 1.0, "bfloat16": 1.15}
    best = min(seconds, key=lambda form: seconds[form] * handicap[form.precision])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{uuid.uuid4().hex}")  # born with the umask's permissions
        draft.write_text(json.dumps(best._asdict()), "utf-8")
        try:
            if fresh:
                os.replace(draft, path)
            else:  # the first of several processes decides
                os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except FileExistsError:
        pass
    except OSError:
        return best  # no cache to write to: the choice holds for this process
    return _read_format(path) or best


def _read_format(path: Path) -> NumberFormat | None:
    try:
        entry = json.loads(path.read_text("utf-8-sig"))
        precision = one_of(entry["precision"], ["float32", "bfloat16"], "precision")
        return NumberFormat(precision, bool(entry["channels_last"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)
