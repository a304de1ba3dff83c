"""Mixed precision with few kernels: weights are cast together; autocast casts each weight by a kernel of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # the layers that autocast computes in bfloat16
GROUP_BYTES = 8 << 20  # of weights that are cast together; their gradients are cast when all of them are there


class BF16(nn.Module):
    """A network for use under autocast whose convolutions and linear layers get bfloat16 copies of their weights.

    The weights themselves stay float32, and so do their gradients. Backward comes to the last layers first: these are
    the first group, whose gradients can leave for other ranks while backward goes on.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        layers = [(name, module) for name, module in network.named_modules() if isinstance(module, CAST)]
        names = [f"{layer}.{name}" for layer, module in layers for name, _ in module.named_parameters(recurse=False)]
        sizes = {name: p.numel() * p.element_size() for name, p in network.named_parameters()}
        self._groups: list[list[str]] = [[]]
        for name in reversed(names):
            if sum(sizes[other] for other in self._groups[-1]) >= GROUP_BYTES:
                self._groups.append([])
            self._groups[-1].append(name)

    def forward(self, *inputs: Any) -> Any:
        """What the network returns for the same inputs."""
        weights = dict(self.network.named_parameters())
        cast: dict[str, Tensor] = {}
        for group in self._groups:
            originals = [weights[name] for name in group]
            flat = torch.cat([_flattened(p) for p in originals]).bfloat16()
            parts = flat.split([p.numel() for p in originals])
            cast |= {name: _shaped(part, p) for name, part, p in zip(group, parts, originals, strict=True)}
        return torch.func.functional_call(self.network, cast, inputs)


def _flattened(p: Tensor) -> Tensor:
    """The elements of a weight in the order in which they are in memory: a view."""
    return (p.permute(0, 2, 3, 1) if _innermost(p) else p).reshape(-1)


def _shaped(flat: Tensor, p: Tensor) -> Tensor:
    """The inverse of `_flattened`: a view with the shape and the strides of `p`."""
    if _innermost(p):
        return flat.view([p.shape[i] for i in (0, 2, 3, 1)]).permute(0, 3, 1, 2)
    return flat.view(p.shape)


def _innermost(p: Tensor) -> bool:
    """Whether the channels of a weight are innermost in memory."""
    return p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
