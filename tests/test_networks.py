"""Shared networks and what they cost."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from jahs_utils.networks import (
    ConvLayer,
    ConvNet,
    ResidualBlock,
    WideResNet,
    count_parameters,
    network_cost,
    subsample_first,
)


@pytest.mark.parametrize(("channels", "count"), [((8, 8, 8), 2002), ((16, 32, 64), 29178)])
def test_bergs_networks_have_the_published_parameter_counts(channels, count):
    assert count_parameters(ConvNet(channels)) == count


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), max_size=2),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(8, 17),
)
def test_parameters_are_those_of_the_layers_by_hand(channels, neurons, c, classes, size):
    expected, previous, side = 0, c, size
    for width in channels:
        expected += 9 * previous * width + 2 * width  # convolution, BatchNorm
        previous, side = width, side // 2
    previous *= side**2
    for width in [*neurons, classes]:
        expected += previous * width + width
        previous = width
    network = ConvNet(channels, neurons, c, classes, size)
    assert count_parameters(network) == expected


def test_frozen_parameters_are_not_counted():
    network = ConvNet((8, 8, 8))
    network.classifier.requires_grad_(False)
    assert count_parameters(network) == 2002 - (72 * 10 + 10)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2), st.integers(8, 20))
def test_logits_are_one_row_per_image_and_one_column_per_class(depth, hidden, size):
    network = ConvNet([4] * depth, [5] * hidden, 3, 7, size)
    assert network(torch.rand(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("train", [True, False])
def test_pooling_before_relu_gives_the_same_bits_as_relu_before_pooling(size, train):
    torch.manual_seed(0)
    layer = ConvLayer(3, 6).train(train)
    with torch.no_grad():
        layer.norm.weight.uniform_(-2, 2)
        layer.norm.bias.uniform_(-1, 1)
    x = torch.randn(5, 3, size, size)
    expected = F.max_pool2d(F.relu(layer.norm(layer.conv(x))), 2)
    assert torch.equal(layer(x), expected)


def test_the_network_is_the_composition_of_its_layers():
    torch.manual_seed(0)
    network = ConvNet((4, 6), (5,), 1, 3, 8).eval()
    first, second = network.layers
    plain = nn.Sequential(
        *(first.conv, first.norm, nn.ReLU(), nn.MaxPool2d(2)),
        *(second.conv, second.norm, nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), network.hidden[0], nn.ReLU(), network.classifier),
    ).eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(network(x), plain(x))


@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": ()},
        {"channels": (8, 0)},
        {"neurons": (-1,)},
        {"in_channels": 0},
        {"classes": 0},
        {"channels": (8,) * 5},
    ],
)
def test_a_convnet_that_cannot_be_is_one_line(sizes):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        ConvNet(**sizes)


def test_too_many_layers_are_told_the_largest_depth():
    with pytest.raises(ValueError, match="use at most 4 convolutional layers"):
        ConvNet([8] * 5, image_size=28)


@pytest.mark.parametrize(
    ("depth", "width", "kernels", "millions"),
    [
        # Zagoruyko and Komodakis (2016), tables 2 (block types, width 2) and 4, 5 (B(3,3))
        (40, 2, (1, 3, 1), 1.4),
        (40, 2, (3, 1), 1.2),
        (40, 2, (1, 3), 1.3),
        (40, 2, (3, 1, 1), 1.3),
        (28, 2, (3, 3), 1.5),
        (22, 2, (3, 1, 3), 1.1),
        (40, 1, (3, 3), 0.6),
        (40, 2, (3, 3), 2.2),
        (40, 4, (3, 3), 8.9),
        (40, 8, (3, 3), 35.7),
        (28, 10, (3, 3), 36.5),
        (28, 12, (3, 3), 52.5),
        (22, 8, (3, 3), 17.2),
        (22, 10, (3, 3), 26.8),
        (16, 8, (3, 3), 11.0),
        (16, 10, (3, 3), 17.1),
    ],
)
def test_wide_resnets_have_the_published_parameter_counts(depth, width, kernels, millions):
    with torch.device("meta"):
        network = WideResNet(depth, width, kernels)
    assert round(count_parameters(network) / 1e6, 1) == millions


@settings(max_examples=5, deadline=None)
@given(st.sampled_from([10, 16]), st.integers(1, 2), st.sampled_from([(3, 3), (1, 3, 1), (5,)]))
def test_a_wide_resnet_maps_images_to_logits(depth, width, kernels):
    network = WideResNet(depth, width, kernels, in_channels=1, classes=4)
    assert network(torch.rand(2, 1, 12, 12)).shape == (2, 4)


def test_a_residual_block_with_dead_convolutions_is_the_identity():
    block = ResidualBlock(4, 4, 1, (3, 3))
    nn.init.zeros_(block.convs[1].weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 12},
        {"depth": 4},
        {"width": 0},
        {"kernels": ()},
        {"kernels": (2, 2)},
        {"kernels": (3, 0)},
        {"classes": 0},
        {"in_channels": 0},
    ],
)
def test_a_wide_resnet_that_cannot_be_is_one_line(wrong):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        WideResNet(**wrong)


def test_flops_are_two_per_multiplication_counted_by_hand():
    # 8 pixels -> 4 after the first layer -> 2 after the second
    by_hand = 2 * (8 * 8 * 9 * 3 * 4 + 4 * 4 * 9 * 4 * 6 + 2 * 2 * 6 * 5 + 5 * 10)
    assert network_cost(ConvNet((4, 6), (5,), 3, 10, 8), (3, 8, 8)).flops == by_hand


def test_flops_of_a_strided_residual_block_are_counted_by_hand():
    network = WideResNet(10, 1, in_channels=1)
    convolutions = 8 * 8 * 9 * 16 + 2 * (8 * 8 * 9 * 16 * 16)  # stem; group 1, no shortcut
    convolutions += 4 * 4 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)  # group 2 with its shortcut
    convolutions += 2 * 2 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    assert network_cost(network, (1, 8, 8)).flops == 2 * (convolutions + 64 * 10)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (ConvNet((4, 6), (5,), 1, 10, 9), (1, 9, 9)),
        (WideResNet(10, 1), (3, 8, 8)),
    ],
    ids=["ConvNet", "WideResNet"],
)
def test_activation_bytes_are_what_a_real_step_saves(network, shape):
    weights = {p.data_ptr() for p in network.parameters()}
    saved = {}

    def remember(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        logits = network.train()(torch.rand(6, *shape))
    measured = sum(storage.nbytes() for storage in saved.values())
    assert logits.requires_grad
    assert network_cost(network, shape, batch_size=6).activation_bytes == measured


def test_counting_does_not_change_the_network():
    network = ConvNet((4,)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network_cost(network, (1, 28, 28))
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("channels", [3, 8, 12])
def test_subsampling_first_gives_the_gradients_of_the_strided_convolution(channels: int) -> None:
    layer = nn.Conv2d(channels, 16, 1, stride=2).to(memory_format=torch.channels_last)
    images = torch.randn(33, channels, 15, 14).to(memory_format=torch.channels_last)
    exact = nn.Conv2d(channels, 16, 1, stride=2).double()
    exact.load_state_dict(layer.state_dict())
    with torch.backends.mkldnn.flags(enabled=False):
        exact(images.double()).square().sum().backward()
    subsample_first(nn.Sequential(layer))
    layer(images).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-3)


def test_subsampling_first_leaves_other_convolutions_alone() -> None:
    others = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, 2), nn.Conv2d(16, 8, 1, 2), nn.Conv2d(4, 8, 1, 2, 1)
    )
    subsample_first(others)
    assert all(type(layer) is nn.Conv2d for layer in others)
