"""The training engine: `fit` trains a network whose parameters may change while it trains."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jahs_utils.checks import number, one_of, positive, shown, whole
from jahs_utils.data import ImageData
from jahs_utils.data import augment as shift_and_flip
from jahs_utils.data import mixup as mix
from jahs_utils.device import NumberFormat, fastest_format
from jahs_utils.networks import subsample_first
from jahs_utils.progress import ProgressBar

CHECK_EVERY = 50  # steps between looks at the loss: each look makes a GPU wait
EAGER_STEPS = 20  # before a CUDA graph is captured, which costs about as much as they do


# --- schedules: (share of the budget used, epochs done) -> factor of the learning rate ------------


def constant(fraction: float, epoch: float) -> float:
    """The learning rate never changes."""
    return 1.0


def cosine(fraction: float, epoch: float) -> float:
    """One half-period of a cosine, from 1 to 0 over the whole budget."""
    return 0.5 * (1.0 + math.cos(math.pi * min(fraction, 1.0)))


@dataclasses.dataclass(frozen=True)
class SGDR:
    """Cosine with warm restarts (Loshchilov and Hutter 2017).

    period: epochs until the first restart. factor: each period is this much longer than the last.
    Raises ValueError for a period that is not positive or a factor below 1.
    """

    period: float = 1.0
    factor: float = 2.0

    def __post_init__(self) -> None:
        number(self.period, "SGDR's period", 1e-3)  # each call counts the periods that are over
        number(self.factor, "SGDR's factor", 1)

    def __call__(self, fraction: float, epoch: float) -> float:
        period = self.period
        while epoch >= period:
            epoch -= period
            period *= self.factor
        return 0.5 * (1.0 + math.cos(math.pi * epoch / period))


Schedule = Callable[[float, float], float]
SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "sgdr": SGDR()}


# --- what a training returns and what a callback sees ---------------------------------------------


@dataclasses.dataclass
class History:
    """What happened in a training.

    frame: one row an epoch with `epoch`, `step`, `seconds` (training only, evaluation excluded),
    `lr`, `train_loss`, `eval_loss`, `eval_accuracy`. stopped: why it ended.
    """

    frame: pd.DataFrame
    stopped: str
    number_format: NumberFormat

    @property
    def completed(self) -> bool:
        """Whether the budget was used up, with every loss finite."""
        return self.stopped in {"epochs", "steps", "seconds"}

    def final(self, column: str) -> float:
        """The last epoch's value of a column; nan when no epoch was completed."""
        one_of(column, self.frame.columns, "column")
        return float(self.frame[column].iloc[-1]) if len(self.frame) else math.nan


class Evaluation(NamedTuple):
    """Mean cross-entropy (nats) and share of correct answers."""

    loss: float
    accuracy: float


@dataclasses.dataclass
class Training:
    """What a callback sees and may change: the model's parameters, or `stop(reason)`.

    images and labels: the last batch, as the network got them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: ImageData
    step: int = 0
    epoch: int = 0
    fraction: float = 0.0
    lr: float = 0.0
    images: Tensor | None = None
    labels: Tensor | None = None
    stopped: str = ""
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def stop(self, reason: str) -> None:
        """End the training after this step, with `reason` in `History.stopped`."""
        self.stopped = reason


class Callback:
    """Base of callbacks; override what you need: a hook that nobody overrides costs nothing."""

    def on_start(self, training: Training) -> None:
        """Before the first step."""

    def on_step(self, training: Training) -> None:
        """After each optimizer step."""

    def on_epoch(self, training: Training) -> None:
        """After each epoch and its evaluation; `training.rows[-1]` is the epoch's row."""


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def classification_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the logits; labels are classes (n,) or soft labels (n, classes)."""
    return F.cross_entropy(model(images).float(), labels)


# --- training -------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    data: ImageData,
    *,
    epochs: float | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    lr: float = 0.1,
    schedule: str | Schedule = "cosine",
    optimizer: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    drop_last: bool = True,
    augment: Callable[[Tensor], Tensor] | None = None,
    mixup: float = 0.0,
    loss: Loss = classification_loss,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    number_format: NumberFormat | None = None,
    evaluate_every: int | None = 1,
    capture: bool | None = False,
) -> History:
    """Train `model` in place on `data.train_*`, evaluating on `data.test_*`.

    Budget: `epochs`, `steps` or `seconds` of training (forward, backward, step); the first to be
    used up ends it. Each epoch visits the images in a new order, in whole batches: fewer than a
    batch of images are left out of it, unless drop_last is False. augment: maps a uint8 batch to
    another. loss: for networks that need another than cross-entropy. evaluate_every: epochs
    between evaluations, None for only the last. capture: replay the step as a CUDA graph, for a
    network whose Python does the same in each step; None: on a GPU, if the network is `capturable`
    (those of `jahs_utils.networks` are) and its optimizer, loss and augmentation are ours.
    Parameters that callbacks grow keep their optimizer state.
    Raises ValueError for settings that cannot be; a loss that is not finite or memory that runs
    out ends the training with the reason in `History.stopped`.
    """
    limits = {"epochs": epochs, "steps": steps, "seconds": seconds}
    budget = _Budget(limits, len(data.train_labels), batch_size)
    if not drop_last:
        budget.steps_per_epoch = math.ceil(len(data.train_labels) / batch_size)
        if capture:
            raise ValueError("capture=True needs whole batches: leave drop_last as it is")
    if callable(schedule):
        factor_of = schedule
    else:
        factor_of = SCHEDULES[one_of(schedule, SCHEDULES, "schedule")]
    positive(lr, "lr")
    number(momentum, "momentum", 0, 1)
    number(weight_decay, "weight_decay", 0)
    number(mixup, "mixup", 0)
    whole(1 if evaluate_every is None else evaluate_every, "evaluate_every")
    whole(seed, "seed", 0, 2**64 - 1)
    device = data.device
    if capture is None:
        ours = isinstance(optimizer, str) and loss is classification_loss
        ours = ours and getattr(augment, "func", augment) in (None, shift_and_flip)
        capture = (
            ours and drop_last and getattr(model, "capturable", False) and _can_capture(device)
        )
    elif capture and not _can_capture(device):
        raise ValueError(f"capture=True needs a CUDA device, the data is on {device}")
    form = number_format or fastest_format(device)
    model.to(device, memory_format=_layout(form)).train()
    make_step = _CapturedStep if capture else _Step
    orders = torch.Generator().manual_seed(int(seed))
    clock = _Clock(device, precise=seconds is not None)

    with (
        _reproducible(seed, device),
        ProgressBar(1.0, "training") as bar,
    ):
        subsample_first(model)
        state = Training(model, _make_optimizer(model, optimizer, lr, momentum, weight_decay), data)
        run_step = make_step(state, form, augment, mixup, loss)
        known = list(model.parameters())
        for parameter in known:  # growth before this training is none of its business
            vars(parameter).pop("grown_from", None)

        def call_back(hook: str) -> None:
            nonlocal run_step, known
            idle = getattr(Callback, hook)
            calls = [getattr(callback, hook) for callback in callbacks]
            calls = [call for call in calls if getattr(call, "__func__", call) is not idle]
            if not calls:  # pausing the clock makes a GPU wait
                return
            clock.pause()
            for call in calls:
                call(state)
            if _changed(known, model):
                # Before the state is carried: a parameter and its momentum share one layout.
                model.to(device, memory_format=_layout(form))
                carry_optimizer_state(state.optimizer, known, model)
                known = list(model.parameters())
                subsample_first(model)
                run_step = make_step(state, form, augment, mixup, loss)
            clock.resume()

        try:
            call_back("on_start")
            clock.resume()
            while not state.stopped:
                state.epoch += 1
                order = torch.randperm(len(data.train_labels), generator=orders).to(device)
                total, first = torch.zeros((), device=device), state.step
                for batch in order.split(batch_size)[: budget.steps_per_epoch]:
                    state.lr = lr * factor_of(state.fraction, state.step / budget.steps_per_epoch)
                    total += run_step(batch)
                    state.step += 1
                    state.fraction, ended = budget.used(state.step, clock)
                    call_back("on_step")
                    look = state.step % CHECK_EVERY == 0 or ended
                    if look and not torch.isfinite(total):
                        state.stop(_not_finite(state))
                    elif ended and not state.stopped:
                        state.stop(ended)
                    bar.update(state.fraction, f"epoch {state.epoch}")
                    if state.stopped:
                        break
                clock.pause()
                train_loss = float(total) / (state.step - first)
                if not math.isfinite(train_loss):
                    state.stop(_not_finite(state))
                _record(state, clock.seconds, train_loss, evaluate_every, form)
                call_back("on_epoch")
                clock.resume()
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            state.stop(
                f"out of memory at step {state.step + 1}: reduce batch_size ({batch_size}) "
                f"or the network"
            )
    columns = ["epoch", "step", "seconds", "lr", "train_loss", "eval_loss", "eval_accuracy"]
    return History(pd.DataFrame(state.rows, columns=columns), state.stopped, form)


def evaluate(
    model: nn.Module,
    data: ImageData,
    *,
    part: str = "test",
    batch_size: int = 1000,
    number_format: NumberFormat | None = None,
) -> Evaluation:
    """Loss and accuracy of `model` on a part ("test" or "train") of `data`, in evaluation mode.

    The parameters stay where and as they are in memory: a captured step may be writing to them.
    """
    one_of(part, ("test", "train"), "part")
    whole(batch_size, "batch_size")
    images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
    form = number_format or fastest_format(data.device)
    was_training = model.training
    model.to(data.device).eval()
    loss = torch.zeros((), device=data.device)
    correct = torch.zeros((), device=data.device, dtype=torch.int64)
    with torch.inference_mode(), _autocast(data.device, form):
        for x, y in zip(images.split(batch_size), labels.split(batch_size)):
            logits = model(_arrange(data.normalize(x), form)).float()
            loss += F.cross_entropy(logits, y, reduction="sum")
            correct += (logits.argmax(1) == y).sum()
    model.train(was_training)
    return Evaluation(float(loss) / len(labels), int(correct) / len(labels))


class _Budget:
    """When a training ends: at a limit of epochs, steps or seconds, whichever comes first."""

    def __init__(self, limits: dict[str, float | None], images: int, batch_size: int) -> None:
        self.limits = {k: positive(v, k) for k, v in limits.items() if v is not None}
        whole(self.limits.get("steps", 1), "steps")
        if not self.limits:
            raise ValueError("fit needs a budget: give epochs, steps or seconds")
        self.steps_per_epoch = images // whole(batch_size, "batch_size", 1, whole(images, "images"))

    def used(self, step: int, clock: _Clock) -> tuple[float, str]:
        """Share of the budget that is used, and the name of the limit once it is reached."""
        done = {"epochs": step / self.steps_per_epoch, "steps": step}
        if "seconds" in self.limits:
            done["seconds"] = clock.seconds
        shares = {name: done[name] / limit for name, limit in self.limits.items()}
        name = max(shares, key=shares.__getitem__)
        reached = shares[name] >= 1 - 1e-9
        return min(shares[name], 1.0), name if reached else ""


# --- parameters that change while they train ------------------------------------------------------


def carry_optimizer_state(
    optimizer: torch.optim.Optimizer, old: Sequence[nn.Parameter], model: nn.Module
) -> None:
    """Point `optimizer` at the model's present parameters, keeping what it knows of the old ones.

    A parameter that took the place of a smaller one (growth appends at the end of each dimension)
    inherits its state in the leading corner, zero elsewhere. Replaced parameters are recognised
    by `grown_from`, set by `replace_parameter`.
    """
    states = {id(p): optimizer.state.pop(p) for p in old if p in optimizer.state}
    present = [p for p in model.parameters() if p.requires_grad]
    heirs = {id(getattr(p, "grown_from", p)): p for p in present}
    for group in optimizer.param_groups:
        group["params"] = [heirs.pop(id(p)) for p in group["params"] if id(p) in heirs]
    optimizer.param_groups[0]["params"] += heirs.values()  # added modules
    for parameter in present:
        origin = getattr(parameter, "grown_from", parameter)
        state = states.get(id(origin))
        if state is not None:
            optimizer.state[parameter] = {
                name: _enlarge(value, origin, parameter) for name, value in state.items()
            }
        if parameter is not origin:
            del parameter.grown_from  # the old tensor is free from here


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    """Put a grown `value` in place of a module's parameter; `fit` carries its optimizer state.

    value: at least as large as the old parameter in every dimension, old entries first.
    """
    old = getattr(module, name)
    if value.ndim != old.ndim or any(new < was for new, was in zip(value.shape, old.shape)):
        raise ValueError(f"{name} cannot shrink from {tuple(old.shape)} to {tuple(value.shape)}")
    new = nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad)
    new.grown_from = getattr(old, "grown_from", old)
    setattr(module, name, new)
    return new


def _start_momenta(optimizer: torch.optim.Optimizer) -> None:
    """Set missing momenta of SGD to zero: its fused step takes all of them or none.

    A parameter lacks one when it was added in training, or unused (no gradient) until now.
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(
                        parameter, requires_grad=False
                    )


def _enlarge(value: Any, old: Tensor, new: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value  # a step counter
    grown = torch.zeros_like(new, memory_format=torch.preserve_format)
    grown[tuple(slice(size) for size in value.shape)] = value
    return grown


def _changed(known: Sequence[nn.Parameter], model: nn.Module) -> bool:
    present = list(model.parameters())
    return len(present) != len(known) or any(p is not q for p, q in zip(present, known))


# --- one step -------------------------------------------------------------------------------------


class _Step:
    """Gather, normalise, forward, backward, update. Nothing in it waits for the device."""

    def __init__(
        self,
        state: Training,
        form: NumberFormat,
        augment: Callable[[Tensor], Tensor] | None,
        mixup: float,
        loss: Loss,
    ) -> None:
        self.state, self.form, self.loss = state, form, loss
        self.augment, self.mixup = augment, mixup
        _start_momenta(state.optimizer)

    def __call__(self, batch: Tensor) -> Tensor:
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.state.lr
        return self.step(batch)

    def step(self, batch: Tensor) -> Tensor:
        state, data = self.state, self.state.data
        images, labels = data.train_images.index_select(0, batch), data.train_labels[batch]
        if self.augment is not None:
            images = self.augment(images)
        images = data.normalize(images)
        if self.mixup:
            images, labels = mix(images, labels, self.mixup, len(data.classes))
        state.images, state.labels = _arrange(images, self.form), labels
        with _autocast(data.device, self.form):
            loss = self.loss(state.model, state.images, labels)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        state.optimizer.step()
        return loss.detach()


class _CapturedStep(_Step):
    """The same step as a CUDA graph: launched once instead of kernel by kernel.

    Steps run as usual on a side stream (a graph needs warmed-up libraries and existing optimizer
    state); then one is captured and replayed with new indices and learning rate. A graph keeps
    the addresses and the Python numbers it was captured with: when one of them changes, steps run
    as usual again until the next is captured.
    """

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.device, self.frozen = self.state.data.device, None
        self.stream = torch.cuda.Stream(self.device)
        for group in self.state.optimizer.param_groups:
            if not group.get("capturable", group.get("fused")):
                raise ValueError(
                    "capture=True needs an optimizer made with capturable=True (SGD: fused=True), "
                    f"got {shown(self.state.optimizer)}"
                )
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(self.device)

    def __call__(self, batch: Tensor) -> Tensor:
        for group in self.state.optimizer.param_groups:
            group["lr"].fill_(self.state.lr)
        frozen = _frozen(self.state)
        if frozen != self.frozen:
            self.frozen, self.runs, self.graph = frozen, 0, None
        if self.runs < EAGER_STEPS:
            self.runs += 1
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                loss = self.step(batch)
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.batch, self.graph = batch.clone(), torch.cuda.CUDAGraph()
            self.state.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.captured_loss = self.step(self.batch)
        self.batch.copy_(batch)
        self.graph.replay()
        return self.captured_loss


def _frozen(state: Training) -> tuple[list[int], list[tuple[str, float]]]:
    """What a CUDA graph of a step keeps: addresses, and the numbers of modules and optimizer."""
    tensors = itertools.chain(state.model.parameters(), state.model.buffers())
    owners = [*map(vars, state.model.modules()), *state.optimizer.param_groups]
    values = (entry for owner in owners for entry in owner.items())
    numbers = [(name, value) for name, value in values if isinstance(value, int | float)]
    return [tensor.data_ptr() for tensor in tensors], numbers


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


# --- small helpers --------------------------------------------------------------------------------


class _Clock:
    """Seconds spent training; paused during callbacks and evaluation."""

    def __init__(self, device: torch.device, precise: bool) -> None:
        self.device, self.precise = device, precise
        self._spent, self._since = 0.0, 0.0

    @property
    def seconds(self) -> float:
        if self.precise and self._since:
            self._wait()
        return self._spent + (time.perf_counter() - self._since if self._since else 0.0)

    def resume(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since:
            self._wait()
            self._spent, self._since = self._spent + time.perf_counter() - self._since, 0.0

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


OPTIMIZERS = ("sgd", "adam", "adamw")


def _make_optimizer(
    model: nn.Module,
    optimizer: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if callable(optimizer):
        return optimizer(parameters)
    one_of(optimizer, OPTIMIZERS, "optimizer")
    if optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr, momentum, 0.0, weight_decay, nesterov=momentum > 0, fused=True
        )
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    capturable = bool(parameters) and _can_capture(parameters[0].device)
    return kind(parameters, lr, weight_decay=weight_decay, fused=True, capturable=capturable)


def _record(
    state: Training,
    seconds: float,
    train_loss: float,
    evaluate_every: int | None,
    form: NumberFormat,
) -> None:
    due = evaluate_every is not None and state.epoch % evaluate_every == 0
    healthy = math.isfinite(train_loss)
    scores = Evaluation(math.nan, math.nan)
    if healthy and (due or state.stopped):
        scores = evaluate(state.model, state.data, number_format=form)
    state.rows.append(
        {
            "epoch": state.epoch,
            "step": state.step,
            "seconds": seconds,
            "lr": state.lr,
            "train_loss": train_loss,
            "eval_loss": scores.loss,
            "eval_accuracy": scores.accuracy,
        }
    )


def _not_finite(state: Training) -> str:
    return f"loss not finite by step {state.step} (lr {state.lr:.3g}): lower the learning rate"


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out; where a capture failed, its own error hides that one."""
    if error is None:
        return False
    named = any(words in str(error) for words in ("can't allocate memory", "out of memory"))
    named = named or isinstance(error, torch.OutOfMemoryError)
    return named or _out_of_memory(error.__context__)


def _layout(form: NumberFormat) -> torch.memory_format:
    return torch.channels_last if form.channels_last else torch.contiguous_format


def _arrange(images: Tensor, form: NumberFormat) -> Tensor:
    return images.contiguous(memory_format=_layout(form))


def _autocast(device: torch.device, form: NumberFormat) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=form.precision == "bfloat16")


@contextmanager
def _reproducible(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch for the block and restore its generators after; cuDNN without its lottery."""
    devices, cudnn = [device] if device.type == "cuda" else [], torch.backends.cudnn
    same = {"enabled": cudnn.enabled, "allow_tf32": cudnn.allow_tf32}  # `flags` has other defaults
    with torch.random.fork_rng(devices), cudnn.flags(deterministic=True, **same):
        torch.manual_seed(seed)
        yield
