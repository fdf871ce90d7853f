"""The training engine against plain loops, and what it promises about budgets and seeds."""

import copy
import math
import time
from contextlib import contextmanager
from functools import partial

import cuda_graphs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jahs_utils import train as train_module
from jahs_utils.data import augment, load
from jahs_utils.device import NumberFormat
from jahs_utils.networks import ConvNet
from jahs_utils.train import (
    SGDR,
    Callback,
    carry_optimizer_state,
    constant,
    cosine,
    evaluate,
    fit,
    replace_parameter,
)

PLAIN = NumberFormat("float32", False)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def digits():
    return load("digits", device="cpu", subset=200)


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ConvNet((4, 6), (), 1, 10, 8)


def two_layers(seed: int = 0) -> nn.Sequential:
    """Hidden units that can grow: layers 1 and 3."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))


def train(model, data, **settings):
    """`fit` in plain float32, ten steps unless told otherwise."""
    if not {"epochs", "steps", "seconds"} & set(settings):
        settings["steps"] = 10
    return fit(model, data, **({"batch_size": 32, "number_format": PLAIN} | settings))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(weights(first), weights(second), strict=True))


class Call(Callback):
    """Runs `action(training)` after each step."""

    def __init__(self, action):
        self.action = action

    def on_step(self, training):
        self.action(training)


# --- against plain loops --------------------------------------------------------------------------


def plain_batches(data, epochs: int, batch_size: int, seed: int):
    """Normalised batches in the order that `fit` documents: new each epoch, whole batches only."""
    orders = torch.Generator().manual_seed(seed)
    images = data.train_images.double()
    images = (images - data.mean) / data.std
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=orders)
        for start in range(0, len(images) - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            yield images[batch].float(), data.train_labels[batch]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_fit_is_the_plain_pytorch_loop(name, digits):
    ours, theirs = small_net(), small_net()
    train(ours, digits, epochs=3, lr=0.01, optimizer=name, schedule="cosine", seed=5)
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, 0.01, 0.9, weight_decay=5e-4, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=5e-4),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=5e-4),
    }[name](theirs.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=18)
    for images, labels in plain_batches(digits, 3, 32, seed=5):
        optimizer.zero_grad()
        F.cross_entropy(theirs(images), labels).backward()
        optimizer.step()
        schedule.step()
    for p, q in zip(weights(ours), weights(theirs)):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


def test_the_training_loss_is_the_mean_over_the_epochs_steps(digits):
    ours, theirs = small_net(), small_net()
    history = train(ours, digits, epochs=2, lr=1e-9, seed=1)  # the weights hardly move
    losses = [
        F.cross_entropy(theirs(images), labels).item()
        for images, labels in plain_batches(digits, 2, 32, seed=1)
    ]
    expected = np.reshape(losses, (2, 6)).mean(1)
    np.testing.assert_allclose(history.frame.train_loss, expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [7, 360, 1000])
def test_evaluate_is_the_plain_loop(batch_size, digits):
    model = small_net().eval()
    with torch.no_grad():
        logits = model(((digits.test_images.double() - digits.mean) / digits.std).float())
    found = evaluate(model, digits, batch_size=batch_size, number_format=PLAIN)
    assert found.loss == pytest.approx(F.cross_entropy(logits, digits.test_labels).item(), rel=1e-5)
    assert found.accuracy == (logits.argmax(1) == digits.test_labels).double().mean().item()


@pytest.mark.parametrize("mode", [True, False])
def test_evaluate_leaves_the_model_in_the_mode_it_was_in(mode, digits):
    model = small_net().train(mode)
    evaluate(model, digits, number_format=PLAIN)
    assert model.training is mode


def test_evaluate_does_not_change_the_model(digits):
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    evaluate(model, digits, number_format=PLAIN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluate_takes_the_training_part(digits):
    model = small_net()
    swapped = digits.__class__(
        **{
            **vars(digits),
            "test_images": digits.train_images,
            "test_labels": digits.train_labels,
        }
    )
    on_train = evaluate(model, digits, part="train", number_format=PLAIN)
    assert on_train == evaluate(model, swapped, number_format=PLAIN)


@pytest.mark.parametrize(
    "form", [NumberFormat("float32", True), NumberFormat("bfloat16", False)], ids=str
)
def test_every_number_format_learns(form, digits):
    history = train(small_net(), digits, epochs=6, number_format=form)
    assert history.number_format == form
    assert history.final("eval_accuracy") > 0.4


def test_a_training_learns_real_images():
    data = load("fashion_mnist_mini", device="cpu")
    history = fit(small_net_28(), data.subset(3000), epochs=1, number_format=PLAIN, lr=0.1)
    assert history.final("eval_accuracy") > 0.5


def small_net_28() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet((8, 8, 8))


# --- seeds ----------------------------------------------------------------------------------------


def noise(images):
    return images + torch.randint_like(images, 3)


def test_one_seed_repeats_bit_for_bit(digits):
    first, second = small_net(), small_net()
    histories = [
        train(model, digits, epochs=2, seed=3, augment=noise, mixup=0.4)
        for model in (first, second)
    ]
    assert same(first, second)
    frames = [history.frame.drop(columns="seconds") for history in histories]
    assert frames[0].equals(frames[1])


def test_two_seeds_differ(digits):
    first, second = small_net(), small_net()
    train(first, digits, seed=0)
    train(second, digits, seed=1)
    assert not same(first, second)


def test_the_callers_random_state_does_not_matter(digits):
    first, second = small_net(), small_net()
    torch.manual_seed(1)
    train(first, digits, augment=noise)
    torch.manual_seed(2)
    train(second, digits, augment=noise)
    assert same(first, second)


def test_the_callers_random_state_is_restored(digits):
    model = small_net()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(model, digits, augment=noise)
    assert torch.equal(torch.rand(3), expected)


def test_a_numpy_seed_is_a_seed(digits):
    first, second = small_net(), small_net()
    train(first, digits, seed=3)
    train(second, digits, seed=np.int64(3))
    assert same(first, second)


def test_evaluation_does_not_change_the_training(digits):
    first, second = small_net(), small_net()
    train(first, digits, epochs=3)
    train(second, digits, epochs=3, evaluate_every=None)
    assert same(first, second)


# --- schedules ------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.floats(0, 100))
def test_constant_is_one(fraction, epoch):
    assert constant(fraction, epoch) == 1.0


@given(st.floats(0, 1))
def test_cosine_falls_from_one_to_zero_symmetrically(fraction):
    assert cosine(0, 0) == 1
    assert cosine(1, 0) == pytest.approx(0, abs=1e-15)
    assert cosine(fraction, 0) + cosine(1 - fraction, 0) == pytest.approx(1)


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0])
def test_sgdr_is_pytorchs_warm_restarts(factor):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=2, T_mult=int(factor)
    )
    ours = SGDR(2.0, factor)
    for k in range(60):
        theirs.step(k / 4)
        assert ours(0.0, k / 4) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)


@pytest.mark.parametrize("wrong", [{"period": 0.0}, {"period": -1}, {"factor": 0.5}, {"factor": 0}])
def test_an_sgdr_that_would_never_end_a_period_is_one_line(wrong):
    with pytest.raises(ValueError, match=r"^SGDR's (period|factor) must be [^\n]*$"):
        SGDR(**wrong)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1] * 4),
        ("cosine", [0.05 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]),
        (lambda fraction, epoch: 1 + epoch, [0.1 * (1 + k / 6) for k in range(4)]),
        (lambda fraction, epoch: 1 - fraction, [0.1 * (1 - k / 4) for k in range(4)]),
    ],
    ids=["constant", "cosine", "of the epoch", "of the budget"],
)
def test_each_step_has_its_schedules_rate(schedule, expected, digits):
    rates = []
    look = Call(lambda t: rates.append((t.lr, t.optimizer.param_groups[0]["lr"])))
    train(small_net(), digits, steps=4, lr=0.1, schedule=schedule, callbacks=[look])
    np.testing.assert_allclose(rates, np.repeat(expected, 2).reshape(4, 2), rtol=1e-12)


# --- budgets --------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(epochs=st.floats(0.05, 3.0))
def test_epochs_may_be_fractions_rounded_up_to_steps(epochs):
    digits = load("digits", device="cpu", subset=200)
    history = train(two_layers(), digits, epochs=epochs, batch_size=50, evaluate_every=None)
    assert history.stopped == "epochs"
    assert history.final("step") == math.ceil(epochs * 4 - 1e-6)


@pytest.mark.parametrize("steps", [1, 6, 7])
def test_steps_are_counted_exactly(steps, digits):
    history = train(small_net(), digits, steps=steps)
    assert (history.final("step"), history.stopped) == (steps, "steps")


def test_seconds_end_a_training(digits):
    history = train(two_layers(), digits, seconds=0.3, schedule="constant")
    assert history.stopped == "seconds"
    assert 0.3 <= history.final("seconds") < 3


def test_the_first_budget_that_is_used_up_ends_a_training(digits):
    assert train(small_net(), digits, epochs=100, steps=3, seconds=1000).stopped == "steps"


class SlowToEvaluate(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = two_layers()

    def forward(self, x):
        if not self.training:
            time.sleep(0.2)
        return self.net(x)


def seconds_not_counted(model, data, **settings) -> float:
    start = time.perf_counter()
    history = train(model, data, **settings)
    return time.perf_counter() - start - history.final("seconds")


def test_time_for_evaluation_is_not_training_time(digits):
    assert seconds_not_counted(SlowToEvaluate(), digits, epochs=2) >= 2 * 0.2


def test_time_in_callbacks_is_not_training_time(digits):
    sleep = Call(lambda training: time.sleep(0.1))
    assert seconds_not_counted(two_layers(), digits, steps=5, callbacks=[sleep]) >= 5 * 0.1


def test_batches_are_whole_and_the_rest_of_an_epoch_is_left_out(digits):
    sizes = []
    train(small_net(), digits, epochs=1, callbacks=[Call(lambda t: sizes.append(len(t.images)))])
    assert sizes == [32] * 6


# --- history --------------------------------------------------------------------------------------


def test_a_history_has_one_row_an_epoch_with_the_documented_columns(digits):
    history = train(small_net(), digits, epochs=2.5)
    assert list(history.frame.columns) == [
        *("epoch", "step", "seconds", "lr", "train_loss", "eval_loss", "eval_accuracy")
    ]
    assert history.frame.epoch.tolist() == [1, 2, 3]
    assert history.frame.step.tolist() == [6, 12, 15]
    assert history.frame.seconds.is_monotonic_increasing
    assert history.completed


@pytest.mark.parametrize(
    ("every", "evaluated"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (None, [5])]
)
def test_evaluations_are_made_when_due_and_at_the_end(every, evaluated, digits):
    frame = train(two_layers(), digits, epochs=5, evaluate_every=every).frame
    assert frame.epoch[frame.eval_accuracy.notna()].tolist() == evaluated


def test_the_recorded_evaluation_is_that_of_the_trained_model(digits):
    model = small_net()
    history = train(model, digits, epochs=2)
    found = evaluate(model, digits, number_format=PLAIN)
    assert (history.final("eval_loss"), history.final("eval_accuracy")) == tuple(found)


def test_an_unknown_column_is_one_line_with_the_choices(digits):
    with pytest.raises(ValueError, match=r"^unknown column 'acc'.*eval_accuracy[^\n]*$"):
        train(small_net(), digits, steps=1).final("acc")


# --- endings --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_training_with_the_reason(digits):
    history = train(two_layers(), digits, epochs=30, lr=1e20)
    assert history.stopped.startswith("loss not finite by step ")
    assert not history.completed
    assert history.final("step") <= 50
    assert math.isnan(history.final("eval_accuracy"))


def test_memory_that_runs_out_ends_the_training_with_the_reason(digits):
    def greedy(model, images, labels):
        if len(images) == 32 and greedy.calls == 3:
            torch.empty(1 << 50)
        greedy.calls += 1
        return F.cross_entropy(model(images), labels)

    greedy.calls = 0
    history = train(small_net(), digits, loss=greedy)
    assert history.stopped == "out of memory at step 4: reduce batch_size (32) or the network"
    assert not history.completed


def test_another_error_is_not_taken_for_memory(digits):
    def wrong(model, images, labels):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        train(small_net(), digits, loss=wrong)


def test_a_callback_stops_after_its_step(digits):
    def stop_at_3(training):
        if training.step == 3:
            training.stop("enough")

    history = train(small_net(), digits, epochs=5, callbacks=[Call(stop_at_3)])
    assert (history.stopped, history.final("step"), history.completed) == ("enough", 3, False)
    assert not math.isnan(history.final("eval_accuracy"))


def test_a_callback_stops_before_the_first_step(digits):
    class AtOnce(Callback):
        def on_start(self, training):
            training.stop("not needed")

    model = small_net()
    history = train(model, digits, callbacks=[AtOnce()])
    assert (history.stopped, len(history.frame)) == ("not needed", 0)
    assert math.isnan(history.final("eval_accuracy"))
    assert same(model, small_net())


def test_a_callback_stops_after_an_epoch_whose_row_it_sees(digits):
    class AfterTwo(Callback):
        def on_epoch(self, training):
            if training.rows[-1]["epoch"] == 2:
                training.stop("two")

    history = train(small_net(), digits, epochs=9, callbacks=[AfterTwo()])
    assert (history.stopped, len(history.frame)) == ("two", 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "cosin"}, r"unknown schedule 'cosin'.*constant, cosine, sgdr"),
        ({"optimizer": "lion"}, r"unknown optimizer 'lion'.*sgd, adam, adamw"),
        ({"batch_size": 0}, r"batch_size must be a whole number from 1 to 200, got 0"),
        ({"batch_size": 201}, r"batch_size must be a whole number from 1 to 200, got 201"),
        ({"lr": 0.0}, r"lr must be a finite number above 0, got 0.0"),
        ({"lr": math.nan}, r"lr must be a finite number above 0, got nan"),
        ({"steps": 0}, r"steps must be a finite number above 0, got 0"),
        ({"epochs": math.inf}, r"epochs must be a finite number above 0, got inf"),
        ({"evaluate_every": 0}, r"evaluate_every must be a whole number of at least 1, got 0"),
        ({"mixup": -1.0}, r"mixup must be a finite number of at least 0, got -1.0"),
        ({"capture": True}, r"capture=True needs a CUDA device, the data is on cpu"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_setting_that_cannot_be_is_one_line(wrong, message, digits):
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        train(small_net(), digits, **wrong)


def test_no_budget_is_one_line(digits):
    with pytest.raises(ValueError, match=r"^fit needs a budget: give epochs, steps or seconds$"):
        fit(small_net(), digits)


def test_an_unknown_part_is_one_line_with_the_choices(digits):
    with pytest.raises(ValueError, match=r"^unknown part 'val': choose one of test, train$"):
        evaluate(small_net(), digits, part="val")


# --- parameters that grow -------------------------------------------------------------------------


def grown(value: torch.Tensor, shape: tuple[int, ...], fill: float) -> torch.Tensor:
    """`value` in the leading corner of a tensor full of `fill`."""
    larger = torch.full(shape, fill)
    larger[tuple(slice(size) for size in value.shape)] = value
    return larger


SHAPES = {"1.weight": (6, 64), "1.bias": (6,), "3.weight": (10, 6)}  # two more hidden units


def grow(model: nn.Sequential, fill: float = 0.01) -> None:
    for path, shape in SHAPES.items():
        layer, name = path.split(".")
        module = model[int(layer)]
        replace_parameter(module, name, grown(getattr(module, name).detach(), shape, fill))


def grow_at(*steps: int) -> Call:
    return Call(lambda training: grow(training.model) if training.step in steps else None)


def test_growth_keeps_the_momentum_of_the_old_entries_and_starts_the_new_at_zero(digits):
    seen = {}

    def look(training):
        seen[training.step] = {
            name: training.optimizer.state[p]["momentum_buffer"].clone()
            for name, p in training.model.named_parameters()
        }
        if training.step == 3:
            grow(training.model)

    gradients = {}  # without decay, momentum is 0.9 * momentum + gradient

    def look_at_gradients(training):
        if training.step == 4:
            gradients.update({n: p.grad.clone() for n, p in training.model.named_parameters()})

    train(
        two_layers(),
        digits,
        steps=4,
        weight_decay=0.0,
        callbacks=[Call(look), Call(look_at_gradients)],
    )
    for name, momentum in seen[4].items():
        before = grown(seen[3][name], momentum.shape, 0.0)
        torch.testing.assert_close(momentum, 0.9 * before + gradients[name])


def test_training_on_after_growth_is_the_plain_loop_with_padded_momentum(digits):
    ours, theirs = two_layers(), two_layers()
    train(ours, digits, epochs=2, lr=0.05, schedule="constant", callbacks=[grow_at(4)])
    values = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    momenta = {name: torch.zeros_like(value) for name, value in values.items()}
    for step, (images, labels) in enumerate(plain_batches(digits, 2, 32, seed=0), start=1):
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        hidden = F.relu(F.linear(images.flatten(1), leaves["1.weight"], leaves["1.bias"]))
        logits = F.linear(hidden, leaves["3.weight"], leaves["3.bias"])
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(leaves.values()))
        for (name, value), gradient in zip(leaves.items(), gradients):
            gradient = gradient + 5e-4 * value.detach()
            momenta[name] = 0.9 * momenta[name] + gradient
            values[name] = value.detach() - 0.05 * (gradient + 0.9 * momenta[name])
        if step == 4:
            for name, shape in SHAPES.items():
                values[name] = grown(values[name], shape, 0.01)
                momenta[name] = grown(momenta[name], shape, 0.0)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.detach(), values[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_growth_keeps_every_moment_of_adam(name, digits):
    kept = {}

    def look(training):
        state = training.optimizer.state[training.model[1].weight]
        kept[training.step] = {key: value.clone() for key, value in state.items()}
        if training.step == 3:
            grow(training.model)

    train(two_layers(), digits, steps=4, optimizer=name, callbacks=[Call(look)])
    assert kept[4]["step"] == kept[3]["step"] + 1
    assert kept[4]["exp_avg_sq"].shape == (6, 64)
    old = kept[4]["exp_avg_sq"][:4]
    assert (old >= 0.999 * kept[3]["exp_avg_sq"] - 1e-12).all()  # v = 0.999 v + 0.001 g^2


def test_two_growths_in_one_callback_carry_the_state_over_both(digits):
    once, twice = two_layers(), two_layers()

    def grow_in_two(training):
        if training.step == 4:
            weight = training.model[1].weight.detach()
            replace_parameter(training.model[1], "weight", grown(weight, (5, 64), 0.01))
            grow(training.model)

    train(once, digits, callbacks=[grow_at(4)])
    train(twice, digits, callbacks=[Call(grow_in_two)])
    assert same(once, twice)


def test_growth_before_a_training_does_not_lose_state_at_growth_within_it(digits):
    """A parameter grown beforehand has no past in this training's optimizer."""
    marked, plain = two_layers(), two_layers()
    grow(marked)
    for path, shape in SHAPES.items():
        layer, name = path.split(".")
        module = plain[int(layer)]
        setattr(module, name, nn.Parameter(grown(getattr(module, name).detach(), shape, 0.01)))

    def widen_head(training):
        if training.step == 4:
            bias = training.model[3].bias.detach()
            replace_parameter(training.model[3], "bias", bias)

    train(marked, digits, callbacks=[Call(widen_head)])
    train(plain, digits, callbacks=[Call(widen_head)])
    assert same(marked, plain)


def test_replacing_a_parameter_by_itself_changes_nothing(digits):
    replaced, plain = two_layers(), two_layers()

    def replace(training):
        layer = training.model[1]
        replace_parameter(layer, "weight", layer.weight.detach())

    train(replaced, digits, callbacks=[Call(replace)])
    train(plain, digits)
    assert same(replaced, plain)


def test_a_module_added_in_training_is_trained(digits):
    added = nn.Linear(10, 10)
    before = added.weight.detach().clone()

    def add(training):
        if training.step == 2:
            training.model.append(added)

    train(two_layers(), digits, steps=5, callbacks=[Call(add)])
    assert not torch.equal(added.weight, before)


def test_a_parameter_unused_in_the_first_steps_is_trained_later(digits):
    """As in a network that draws its path anew for each batch."""
    model = two_layers()
    model.append(nn.Linear(10, 10))
    before = model[4].weight.detach().clone()
    calls = []

    def skip_last_layer_at_first(model, images, labels):
        calls.append(None)
        return F.cross_entropy((model[:4] if len(calls) <= 2 else model)(images), labels)

    train(model, digits, steps=5, loss=skip_last_layer_at_first)
    assert not torch.equal(model[4].weight, before)


def test_a_module_taken_away_in_training_is_trained_no_more(digits):
    model = two_layers()
    model.append(nn.Linear(10, 10))
    removed = model[4]
    seen = []

    def remove(training):
        if training.step == 2:
            training.model.pop(4)
            seen.append(removed.weight.detach().clone())

    train(model, digits, steps=5, callbacks=[Call(remove)])
    assert torch.equal(removed.weight, seen[0])


def test_parameters_stay_in_their_optimizer_group_through_growth(digits):
    def two_groups(parameters):
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    found = []

    def look(training):
        if training.step == 2:
            grow(training.model)
        if training.step == 3:
            groups = training.optimizer.param_groups
            found.extend([p.ndim for p in group["params"]] for group in groups)

    train(two_layers(), digits, steps=3, optimizer=two_groups, callbacks=[Call(look)])
    assert found == [[2, 2], [1, 1]]


def test_a_parameter_cannot_shrink():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"^weight cannot shrink from \(2, 3\) to \(2, 2\)$"):
        replace_parameter(layer, "weight", torch.zeros(2, 2))


def test_a_frozen_parameter_stays_frozen_when_replaced():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    assert not replace_parameter(layer, "weight", torch.zeros(4, 3)).requires_grad


def test_carrying_state_frees_the_old_parameter():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    old = list(layer.parameters())
    new = replace_parameter(layer, "weight", torch.zeros(4, 3))
    carry_optimizer_state(optimizer, old, layer)
    assert not hasattr(new, "grown_from")


# --- one layout for a parameter, its momentum and what is captured --------------------------------

FORMATS = [NumberFormat(p, c) for p in ("float32", "bfloat16") for c in (False, True)]


def grow_convolutions(model: ConvNet) -> None:
    """Eight more channels between the two convolutions."""
    first, second = model.layers
    more = len(first.conv.weight) + 8
    for module, name, shape in (
        (first.conv, "weight", (more, *first.conv.weight.shape[1:])),
        (first.norm, "weight", (more,)),
        (first.norm, "bias", (more,)),
        (second.conv, "weight", (len(second.conv.weight), more, 3, 3)),
    ):
        old = getattr(module, name).detach().cpu()
        replace_parameter(module, name, grown(old, shape, 0.05).to(next(model.parameters()).device))
    for name, fill in (("running_mean", 0.0), ("running_var", 1.0)):
        old = getattr(first.norm, name)
        setattr(first.norm, name, grown(old.cpu(), (more,), fill).to(old.device))


def grow_convolutions_at(*steps: int) -> Call:
    return Call(lambda t: grow_convolutions(t.model) if t.step in steps else None)


def network(seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet((8, 16), (), 1, 10, 8)


def test_growth_and_evaluation_each_epoch_train_alike_in_both_layouts(digits):
    models = network(), network()
    for model, channels_last in zip(models, (False, True)):
        form = NumberFormat("float32", channels_last)
        grow_twice = grow_convolutions_at(2, 4)
        # not longer: training amplifies the rounding, in which the layouts differ
        train(model, digits, epochs=2, number_format=form, lr=0.05, callbacks=[grow_twice])
    for p, q in zip(*map(weights, models)):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_a_parameter_and_its_momentum_have_one_layout_after_growth(digits):
    strides = []

    def look(training):
        for p in training.model.parameters():
            strides.append((p.stride(), training.optimizer.state[p]["momentum_buffer"].stride()))

    form = NumberFormat("float32", True)
    watch = [Call(look), grow_convolutions_at(4)]
    train(network(), digits, epochs=2, number_format=form, callbacks=watch)
    assert all(first == second for first, second in strides)


def test_evaluation_leaves_the_parameters_where_and_as_they_are(digits):
    model = network()
    before = [(p.data_ptr(), p.stride()) for p in model.parameters()]
    evaluate(model, digits, number_format=NumberFormat("float32", True))
    assert [(p.data_ptr(), p.stride()) for p in model.parameters()] == before


# --- cuDNN and hooks ------------------------------------------------------------------------------


def test_cudnn_computes_each_step_in_float32_and_the_same_way_each_time(digits):
    cudnn, seen = torch.backends.cudnn, []

    def look(model, images, labels):
        seen.append((cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32))
        return F.cross_entropy(model(images), labels)

    train(small_net(), digits, loss=look)
    assert {*seen} == {(True, True, False, False)}
    assert not cudnn.deterministic


@pytest.mark.parametrize(("hook", "pauses"), [("on_start", 1), ("on_step", 18), ("on_epoch", 3)])
def test_only_a_hook_that_is_overridden_stops_the_clock(hook, pauses, digits, monkeypatch):
    waits = []
    monkeypatch.setattr(train_module._Clock, "_wait", lambda clock: waits.append(None))
    train(small_net(), digits, epochs=3)
    without = len(waits)
    callback = type("One", (Callback,), {hook: lambda self, training: None})()
    train(small_net(), digits, epochs=3, callbacks=[Callback(), callback])
    # Before the first step and after an epoch the clock stands already.
    assert len(waits) - 2 * without == (pauses if hook == "on_step" else 0)


# --- captured steps -------------------------------------------------------------------------------


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=needs_cuda)])
def captured(request, monkeypatch):
    """Digits where steps can be captured, after three eager ones."""
    monkeypatch.setattr(train_module, "EAGER_STEPS", 3)
    if request.param == "simulated":
        cuda_graphs.simulate(monkeypatch)
    return load("digits", device="cpu" if request.param == "simulated" else "cuda", subset=200)


@pytest.fixture
def simulated(monkeypatch, digits):
    cuda_graphs.simulate(monkeypatch)
    monkeypatch.setattr(train_module, "EAGER_STEPS", 3)
    return digits


def check_captured_is_eager(data, make=network, **settings) -> None:
    callbacks = settings.pop("callbacks", lambda: [])
    settings = {"epochs": 3, "lr": 0.01} | settings
    models, histories = (make(), make()), []
    for model, capture in zip(models, (False, True)):
        own = settings | {"callbacks": callbacks(), "capture": capture}
        histories.append(train(model, data, **own))
    bfloat16 = histories[0].number_format.precision == "bfloat16"
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for (name, p), q in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda text, name=name: name + text)
    losses = [history.frame.train_loss for history in histories]
    np.testing.assert_allclose(*losses, rtol=1e-2 if bfloat16 else 1e-4)


def test_a_captured_training_really_replays(simulated):
    train(network(), simulated, epochs=3, capture=True)
    assert cuda_graphs.Graph.made == 1


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_captured_step_is_the_eager_one(name, form, captured):
    check_captured_is_eager(captured, optimizer=name, number_format=form)


def test_a_captured_step_draws_augmentation_and_mixtures_as_the_eager_one(captured):
    check_captured_is_eager(captured, augment=partial(augment, crop=1, cutout=2), mixup=0.4)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_step_is_captured_again_after_growth_with_evaluations_between(form, captured):
    growth = partial(grow_convolutions_at, 5, 11)  # the second within three steps of an evaluation
    check_captured_is_eager(captured, callbacks=lambda: [growth()], number_format=form, epochs=4)


def test_a_captured_training_repeats_bit_for_bit(captured):
    first, second = network(), network()
    for model in (first, second):
        train(model, captured, epochs=3, capture=True, mixup=0.4, augment=augment)
    assert same(first, second)


class Scaled(nn.Module):
    """A network with a number that Python computes with, as a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = network(), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.net(x)


@pytest.mark.parametrize("steps", [(7,), range(18)], ids=["once", "in each step"])
def test_a_number_that_a_callback_changes_is_not_frozen_in_a_graph(steps, captured):
    def change(training):
        if training.step in steps:
            training.model.scale *= 0.8

    check_captured_is_eager(captured, Scaled, callbacks=lambda: [Call(change)])


def test_a_parameter_that_moves_in_memory_is_not_left_behind_by_a_graph(captured):
    def move(training):
        if training.step == 7:
            for p in training.model.parameters():
                p.data = p.data.clone()

    check_captured_is_eager(captured, callbacks=lambda: [Call(move)])


def test_what_grows_again_and_again_is_hardly_captured(simulated):
    growth = grow_convolutions_at(*range(2, 18, 2))
    train(network(), simulated, epochs=4, capture=True, callbacks=[growth])
    assert cuda_graphs.Graph.made == 1  # after the last growth


def test_augmentation_is_drawn_anew_in_every_captured_step(captured):
    def random_pixels(images):
        return torch.randint_like(images, 256)

    seen = []
    look = Call(lambda t: seen.append(t.images.sum().item()))
    train(network(), captured, steps=8, capture=True, augment=random_pixels, callbacks=[look])
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        ({}, 1),
        ({"augment": partial(augment, crop=1), "mixup": 0.4, "optimizer": "adamw"}, 1),
        ({"capture": False}, 0),
        ({"augment": noise}, 0),
        ({"loss": lambda model, images, labels: F.cross_entropy(model(images), labels)}, 0),
        ({"optimizer": lambda ps: torch.optim.SGD(ps, 0.1, fused=True)}, 0),
    ],
    ids=["plain", "ours", "not wanted", "augmentation", "loss", "optimizer"],
)
def test_a_step_is_captured_unasked_where_all_of_it_is_known(settings, graphs, simulated):
    train(network(), simulated, **{"capture": None} | settings)
    assert cuda_graphs.Graph.made == graphs


def test_an_unknown_network_is_not_captured_unasked(simulated):
    train(two_layers(), simulated, capture=None)
    assert cuda_graphs.Graph.made == 0


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda ps: torch.optim.Adam(ps, lr=0.01, betas=(0.5, 0.999)),  # as chapter 05 makes it
        lambda ps: torch.optim.SGD(ps, lr=0.01),
    ],
    ids=["Adam", "SGD"],
)
def test_an_optimizer_that_no_graph_holds_is_one_line(optimizer, captured):
    wanted = r"^capture=True needs an optimizer made with capturable=True [^\n]*$"
    with pytest.raises(ValueError, match=wanted):
        train(network(), captured, capture=True, optimizer=optimizer)


def test_memory_that_runs_out_in_a_capture_ends_the_training_with_the_reason(
    simulated, monkeypatch
):
    @contextmanager
    def fail(graph, stream):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        finally:  # what leaving the capture makes of it
            raise RuntimeError("CUDA error: operation failed due to a previous error")
        yield

    monkeypatch.setattr(torch.cuda, "graph", fail)
    history = train(network(), simulated, capture=True)
    assert history.stopped.startswith("out of memory at step 4: reduce batch_size (32)")


# --- progress -------------------------------------------------------------------------------------

NOTEBOOK = """
import time
from jahs_utils import fit, load
from jahs_utils.device import NumberFormat
from jahs_utils.networks import ConvNet
from jahs_utils.train import Callback

class Slow(Callback):
    def on_step(self, training):
        time.sleep(0.1)

data = load("digits", device="cpu", subset=200)
form = NumberFormat("float32", False)
history = fit(ConvNet((4,), (), 1, 10, 8), data, steps=5, batch_size=32, number_format=form,
              callbacks=[Slow()])
assert history.stopped == "steps"
"""


def test_a_progress_bar_leaves_nothing_in_a_notebooks_outputs(monkeypatch, tmp_path):
    nbclient, v4 = map(pytest.importorskip, ("nbclient", "nbformat.v4"))
    monkeypatch.delenv("JAHS_PROGRESS")
    notebook = v4.new_notebook(cells=[v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    outputs = notebook.cells[0].outputs
    assert [output.output_type for output in outputs] == ["display_data"]  # the bar was there
    assert [output for output in outputs if output.get("data") or output.get("text")] == []


def test_no_bar_is_drawn_where_nobody_looks(digits, capfd, monkeypatch):
    monkeypatch.delenv("JAHS_PROGRESS")
    train(small_net(), digits)
    assert capfd.readouterr() == ("", "")
