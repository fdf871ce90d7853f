"""Several networks of one shape trained at once: folds, seeds, learning rates."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from jahs_utils.checks import one_of, shown, whole
from jahs_utils.data import ImageData
from jahs_utils.device import NumberFormat, fastest_format
from jahs_utils.train import (
    SCHEDULES,
    Budget,
    History,
    Schedule,
    Training,
    _arrange,
    _autocast,
    _Clock,
    _layout,
    _not_finite,
    _record,
    _reproducible,
    check_settings,
    fit,
)

MODES = ("auto", "one_by_one", "together", "processes")


@dataclasses.dataclass(frozen=True)
class Member:
    """One network of a population: its data (a fold, say), learning rate and seed."""

    data: ImageData
    lr: float
    seed: int


def fit_population(
    build: Callable[[], nn.Module],
    members: Sequence[Member],
    *,
    epochs: float,
    schedule: str | Schedule = "cosine",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    evaluate_every: int | None = None,
    mode: str = "auto",
) -> list[tuple[nn.Module, History]]:
    """Train one network per member with SGD; the same result as `fit` for each of them.

    build: makes one untrained network; it is called with torch seeded by the member's seed.
    mode: "one_by_one"; "together" (one vectorised step for all, which becomes grouped
    convolutions; agrees with one by one to float rounding); "processes" (worker processes that
    share the cores; `build` must be picklable); "auto" takes "together" on a GPU, where small
    networks are bound by launches, and "one_by_one" elsewhere (see the speed page).
    Raises ValueError for members whose data differ in size, and for an unknown mode.
    """
    one_of(mode, MODES, "mode")
    whole(len(members), "the number of members")
    for member in members:
        check_settings(member.lr, momentum, weight_decay, evaluate_every, member.seed)
    sizes = sorted({tuple(member.data.train_images.shape) for member in members})
    if len(sizes) > 1:
        raise ValueError(f"members must have training sets of one shape, got {shown(sizes)}")
    if mode == "auto":
        mode = "together" if members[0].data.device.type == "cuda" else "one_by_one"
    settings = {
        "epochs": epochs,
        "schedule": schedule,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "evaluate_every": evaluate_every,
    }
    if mode == "together":
        return _fit_together(build, members, **settings)
    if mode == "processes":
        workers = min(len(members), os.cpu_count() or 1)
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // workers)
        with ProcessPoolExecutor(
            workers, context, initializer=torch.set_num_threads, initargs=(threads,)
        ) as pool:
            jobs = [pool.submit(_fit_one, build, member, settings) for member in members]
            return [job.result() for job in jobs]
    return [_fit_one(build, member, settings) for member in members]


def _fit_one(
    build: Callable[[], nn.Module], member: Member, settings: dict
) -> tuple[nn.Module, History]:
    model = _build(build, member)
    return model, fit(model, member.data, lr=member.lr, seed=member.seed, **settings)


def _build(build: Callable[[], nn.Module], member: Member) -> nn.Module:
    with _reproducible(member.seed, member.data.device):
        return build()


def _fit_together(
    build: Callable[[], nn.Module],
    members: Sequence[Member],
    *,
    epochs: float,
    schedule: str | Schedule,
    momentum: float,
    weight_decay: float,
    batch_size: int,
    evaluate_every: int | None,
) -> list[tuple[nn.Module, History]]:
    device = members[0].data.device
    form = fastest_format(device)
    factor_of = (
        schedule if callable(schedule) else SCHEDULES[one_of(schedule, SCHEDULES, "schedule")]
    )
    images = len(members[0].data.train_labels)
    budget = Budget(epochs, None, None, images, batch_size)
    models = [_build(build, m).to(device, memory_format=_layout(form)).train() for m in members]
    population = _Population(models, [m.lr for m in members], momentum, weight_decay, form)
    states = [Training(model, None, m.data) for model, m in zip(models, members)]
    orders = [torch.Generator().manual_seed(m.seed) for m in members]
    clock, step, ended = _Clock(device, precise=False), 0, ""
    while not ended:
        clock.resume()
        first, total = step, torch.zeros(len(members), device=device)
        order = torch.stack([torch.randperm(images, generator=o) for o in orders]).to(device)
        for batch in order.split(batch_size, dim=1)[: budget.steps_per_epoch]:
            fraction = min(step / budget.steps_per_epoch / epochs, 1.0)
            factor = factor_of(fraction, step / budget.steps_per_epoch)
            x = torch.stack([m.data.train_images[b] for m, b in zip(members, batch)])
            y = torch.stack([m.data.train_labels[b] for m, b in zip(members, batch)])
            x = torch.stack([_arrange(m.data.normalize(i), form) for m, i in zip(members, x)])
            total += population.step(x, y, factor)
            step += 1
            ended = budget.used(step, clock)[1]
            if ended:
                break
        clock.pause()
        for state, member, loss in zip(states, members, (total / (step - first)).tolist()):
            state.epoch, state.step, state.lr = state.epoch + 1, step, member.lr * factor
            if not math.isfinite(loss):
                state.stopped = state.stopped or _not_finite(state)
            if not state.stopped:  # a member that diverged has no further rows
                state.stopped = ended
                _record(state, clock.seconds, loss, evaluate_every, form)
    return [(s.model, History(pd.DataFrame(s.rows), s.stopped, form)) for s in states]


class _Population:
    """Stacked parameters of all members and one SGD step for all of them."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        rates: Sequence[float],
        momentum: float,
        weight_decay: float,
        form: NumberFormat,
    ) -> None:
        self.skeleton, self.form = models[0], form
        self.momentum, self.weight_decay = momentum, weight_decay
        parameters, self.buffers = stack_module_state(list(models))
        self.parameters = {k: v.detach().requires_grad_() for k, v in parameters.items()}
        self.velocity: dict[str, Tensor] | None = None
        self.rates = torch.tensor(rates, device=next(iter(parameters.values())).device)
        for k, model in enumerate(models):  # each model sees its slice, so it is always current
            for name, parameter in model.named_parameters():
                parameter.data = self.parameters[name].detach()[k]
            for name, buffer in model.named_buffers():
                buffer.data = self.buffers[name][k]

    def step(self, images: Tensor, labels: Tensor, factor: float) -> Tensor:
        """One step on images (members, n, c, h, w); returns the losses (members,)."""

        def loss_of(parameters: dict, buffers: dict, x: Tensor, y: Tensor) -> Tensor:
            logits = functional_call(self.skeleton, (parameters, buffers), (x,))
            return F.cross_entropy(logits.float(), y)

        with _autocast(images.device, self.form):
            losses = vmap(loss_of, randomness="different")(
                self.parameters, self.buffers, images, labels
            )
        names, values = list(self.parameters), list(self.parameters.values())
        gradients = dict(zip(names, torch.autograd.grad(losses.sum(), values)))
        self._update(gradients, self.rates * factor)
        return losses.detach()

    @torch.no_grad()
    def _update(self, gradients: dict[str, Tensor], rates: Tensor) -> None:
        """SGD with Nesterov momentum and coupled weight decay, as torch.optim.SGD defines it."""
        first = self.velocity is None
        self.velocity = self.velocity or {}
        for name, parameter in self.parameters.items():
            gradient = gradients[name].add(parameter, alpha=self.weight_decay)
            if self.momentum:
                if first:
                    self.velocity[name] = gradient.clone()
                else:
                    self.velocity[name].mul_(self.momentum).add_(gradient)
                gradient = gradient.add(self.velocity[name], alpha=self.momentum)
            parameter.sub_(gradient * rates.view(-1, *[1] * (parameter.ndim - 1)))
