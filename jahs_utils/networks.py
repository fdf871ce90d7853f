"""Networks that several chapters share, and what they cost: parameters, FLOPs, memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jahs_utils.checks import shown, whole


def _sizes(**given: Sequence[int]) -> None:
    """Refuse a size that is not a whole number of at least 1."""
    for name, sizes in given.items():
        for size in sizes:
            whole(size, name)


def _odd(kernels: Sequence[int]) -> None:
    _sizes(kernels=kernels)
    if not kernels or any(k % 2 == 0 for k in kernels):
        raise ValueError(f"kernels must be odd numbers, such as (3, 3), got {shown(kernels)}")


class ConvLayer(nn.Module):
    """3x3 convolution, BatchNorm, ReLU and 2x2 max-pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        _sizes(in_channels=[in_channels], out_channels=[out_channels])
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        # ReLU is monotone, so it commutes with the maximum: pooling first gives the same bits
        # and leaves ReLU a quarter of the work.
        return F.relu(F.max_pool2d(self.norm(self.conv(x)), 2))


class ConvNet(nn.Module):
    """Berg's ConvNet: convolutional layers, optional fully-connected layers, a linear classifier.

    channels: output channels per `ConvLayer`; each halves the image. neurons: sizes of the
    fully-connected ReLU layers. Maps images (n, in_channels, image_size, image_size) to logits
    (n, classes). Raises ValueError for empty or non-positive sizes, and for more layers than the
    image can be halved.
    """

    capturable = True  # its Python does the same in each step: see `fit`

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 64),
        neurons: Sequence[int] = (),
        in_channels: int = 1,
        classes: int = 10,
        image_size: int = 28,
    ) -> None:
        super().__init__()
        _sizes(channels=channels, neurons=neurons, in_channels=[in_channels], classes=[classes])
        whole(len(channels), "the number of convolutional layers")
        side = whole(image_size, "image_size") // 2 ** len(channels)
        if side < 1:
            raise ValueError(
                f"{len(channels)} pooling layers shrink {image_size} pixels to none: use at most "
                f"{image_size.bit_length() - 1} convolutional layers"
            )
        widths = [in_channels, *channels]
        self.layers = nn.ModuleList(ConvLayer(i, o) for i, o in pairwise(widths))
        sizes = [channels[-1] * side**2, *neurons]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.classifier(x)


class ResidualBlock(nn.Module):
    """Pre-activation residual block: BatchNorm, ReLU, convolution for each kernel size.

    kernels: e.g. (3, 3) for the basic block B(3,3) of Zagoruyko and Komodakis (2016).
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, kernels: Sequence[int]
    ) -> None:
        super().__init__()
        _sizes(in_channels=[in_channels], out_channels=[out_channels], stride=[stride])
        _odd(kernels)
        widths = [in_channels] + [out_channels] * len(kernels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(i) for i in widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(i, out_channels, k, stride if n == 0 else 1, k // 2, bias=False)
            for n, (i, k) in enumerate(zip(widths, kernels))
        )
        same = in_channels == out_channels and stride == 1
        self.shortcut = (
            None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norms[0](x))
        residual = self.convs[0](activated)
        for norm, conv in zip(self.norms[1:], self.convs[1:]):
            residual = conv(F.relu(norm(residual)))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """Wide residual network (Zagoruyko and Komodakis 2016).

    depth: 6 N + 4, with N = (depth - 4) / 6 blocks in each of three groups. width: the factor k
    of the groups' 16, 32 and 64 channels. kernels: the block's convolutions, (3, 3) for B(3,3).
    Raises ValueError for a depth that is not 6 N + 4, even kernels and sizes below 1.
    """

    capturable = True

    def __init__(
        self,
        depth: int = 16,
        width: int = 2,
        kernels: Sequence[int] = (3, 3),
        in_channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        _sizes(depth=[depth], width=[width], in_channels=[in_channels], classes=[classes])
        _odd(kernels)
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6 N + 4 (10, 16, 22, 28, 40, ...), got {shown(depth)}")
        blocks, channels = [], 16
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        for group in range(3):
            for block in range((depth - 4) // 6):
                out = 16 * 2**group * width
                stride = 2 if group > 0 and block == 0 else 1
                blocks.append(ResidualBlock(channels, out, stride, kernels))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


class SubsampledConv2d(nn.Conv2d):
    """A strided 1x1 convolution that picks its pixels first and then goes with stride 1."""

    def forward(self, x: Tensor) -> Tensor:
        down, right = self.stride
        return F.conv2d(x[..., ::down, ::right], self.weight, self.bias)


def subsample_first(model: nn.Module) -> None:
    """Turn the strided 1x1 convolutions of fewer than 16 channels into `SubsampledConv2d`.

    Their backward pass in oneDNN, channels-last, writes beyond its memory: with AVX2 below 8 input
    channels, with AVX-512 below 16 (oneDNN's issue 6035, in torch 2.14.1). Gradients are wrong or
    the process dies; `benchmarks/corruption.py` shows it. Parameters and results stay the same.
    """
    for layer in model.modules():
        if (
            type(layer) is nn.Conv2d
            and layer.kernel_size == (1, 1)
            and layer.stride != (1, 1)
            and (layer.padding, layer.groups) == ((0, 0), 1)
            and layer.in_channels < 16
        ):
            layer.__class__ = SubsampledConv2d


class Cost(NamedTuple):
    """What a network costs; `flops` are per image and forward pass, an addition counting as one.

    activation_bytes: what one training step keeps for the backward pass, for the batch given.
    """

    parameters: int
    flops: int
    activation_bytes: int


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def network_cost(
    model: nn.Module, image_shape: tuple[int, int, int], batch_size: int = 128
) -> Cost:
    """Count a network without running it (on torch's meta device); the model is not changed."""
    _sizes(image_shape=image_shape, batch_size=[batch_size])
    shadow = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow.eval()(torch.empty(1, *image_shape, device="meta"))
    own = {p.untyped_storage()._cdata for p in shadow.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # holding it keeps its address unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        shadow.train()(torch.empty(batch_size, *image_shape, device="meta"))
    activations = sum(storage.nbytes() for storage in kept.values())
    return Cost(count_parameters(model), counter.get_total_flops(), activations)
