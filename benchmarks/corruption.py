"""The smallest program in which oneDNN's strided 1x1 convolution writes beyond its memory.

Channels-last, fewer input channels than the kernel's block (8 with AVX2, 16 with AVX-512): the
weights' gradient is wrong, or the process dies or hangs (oneDNN's issue 6035, torch 2.14.1).
`fit` goes around it with `jahs_utils.networks.subsample_first`; when this program prints errors of
rounding only, on both kinds of processors, that function can go.

Usage: python benchmarks/corruption.py [--channels 4] [--image 64] [--threads 2] [--mended]
--mended shows the same layer after `subsample_first`. ONEDNN_MAX_CPU_ISA=AVX2 picks the kernel.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from jahs_utils.networks import subsample_first


def gradient_errors(channels: int, image: int, mended: bool, steps: int = 20) -> list[float]:
    """Largest error of the weights' gradient in each step, relative to float64 without oneDNN."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 16, 1, stride=2, bias=False).to(memory_format=torch.channels_last)
    images = torch.randn(32, channels, image, image)
    exact = layer.weight.detach().double().requires_grad_()
    with torch.backends.mkldnn.flags(enabled=False):
        nn.functional.conv2d(images.double(), exact, stride=2).square().sum().backward()
    model = nn.Sequential(layer)
    if mended:
        subsample_first(model)
    errors = []
    for _ in range(steps):
        model.zero_grad()
        model(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
        error = (layer.weight.grad - exact.grad).abs().max() / exact.grad.abs().max()
        errors.append(float(error))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--image", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mended", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    errors = gradient_errors(arguments.channels, arguments.image, arguments.mended)
    print(f"largest relative error of the weights' gradient: {max(errors):.1e}")


if __name__ == "__main__":
    main()
