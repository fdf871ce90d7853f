"""CUDA graphs on the CPU, for tests of what a captured step does and must not do.

A capture runs nothing: what its operations changed is put back. A replay runs the operations again
on the tensors, and with the Python numbers, of the capture. That is all that a real graph knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jahs_utils import train


class Graph(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`; `made` counts those captured."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        given = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
        self.before += [(leaf, leaf.clone()) for leaf in given if 0 not in leaf.stride()]
        result = operation(*arguments, **options)
        self.calls.append((operation, arguments, options, result))
        return result

    @contextmanager
    def capture(self) -> Iterator[None]:
        Graph.made += 1
        random = torch.get_rng_state()
        with self:
            yield
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, value in reversed(self.before):
                tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for operation, arguments, options, result in self.calls:
            again = operation(*arguments, **options)
            for kept, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class Stream:
    """Work is done when it is called: there is nothing to wait for."""

    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


def simulate(patch: pytest.MonkeyPatch) -> None:
    """Let `fit` capture steps on the CPU."""
    patch.setattr(train, "_can_capture", lambda device: True)
    patch.setattr(Graph, "made", 0)
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", lambda graph, stream: graph.capture())
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "current_stream", Stream)
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
