"""Networks of one shape as one module: one vectorised step trains all of them, by `fit`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


class Together(nn.Module):
    """Maps images (n, c, h, w) to logits (n, classes, members), in evaluation to their mean.

    Convolutions become grouped ones. Train it with `loss_together`: each member then sees the
    same batches and gets the gradient that it would get alone.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        parameters, buffers = stack_module_state(list(models))
        self.skeleton = [models[0]]  # in a list, so that its parameters are not this module's
        self.count, self.names = len(models), (list(parameters), list(buffers))
        # Members lie one behind the other, so that the weights of convolutions stay 4-dimensional.
        self.values = nn.ParameterList(p.detach().flatten(0, 1) for p in parameters.values())
        for k, buffer in enumerate(buffers.values()):
            self.register_buffer(f"buffer{k}", buffer)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        names, buffer_names = self.names
        parameters = [value.unflatten(0, (self.count, -1)) for value in self.values]
        buffers = [getattr(self, f"buffer{k}") for k in range(len(buffer_names))]
        return dict(zip(names, parameters)), dict(zip(buffer_names, buffers))

    def forward(self, x: Tensor) -> Tensor:
        (skeleton,) = self.skeleton
        skeleton.train(self.training)
        one = vmap(
            lambda parameters, buffers: functional_call(skeleton, (parameters, buffers), (x,)),
            out_dims=-1,
            randomness="different",
        )
        logits = one(*self._state())
        return logits if self.training else logits.mean(-1)

    @torch.no_grad()
    def members(self, build: type[nn.Module]) -> list[nn.Module]:
        """Each network by itself; build: makes one of their shape."""
        parameters, buffers = self._state()
        state, found = parameters | buffers, []
        for k in range(self.count):
            found.append(build())
            found[-1].load_state_dict({name: value[k] for name, value in state.items()})
        return found


def loss_together(model: Together, images: Tensor, labels: Tensor) -> Tensor:
    """The sum of the members' cross-entropies."""
    logits = model(images).float()
    members = logits.shape[-1]
    return members * F.cross_entropy(logits, labels[:, None].expand(-1, members))
