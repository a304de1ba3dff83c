"""A network's copy for mixed precision. Autocast would cast each weight and each gradient by a kernel of its own."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dogvae.training.gradients import flatten, unflatten

CAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # the layers whose weights autocast casts, too


class BF16Copy:
    """A copy of a network whose convolutions and linear layers hold their weights in bfloat16.

    All other parameters are float32, and the buffers are those of the original.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network)
        originals = [p.detach() for p in network.parameters()]
        self._originals = [flatten(p, p) for p in originals]
        self._float32 = torch.cat(self._originals)
        self._bfloat16 = self._float32.bfloat16()
        wide, narrow = unflatten(self._float32, originals), unflatten(self._bfloat16, originals)
        parts = dict(zip(network.parameters(), zip(wide, narrow, strict=True), strict=True))
        for module, layer in zip(network.modules(), self.network.modules(), strict=True):
            for name, p in module.named_parameters(recurse=False):
                layer.register_parameter(name, nn.Parameter(parts[p][isinstance(module, CAST)]))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(layer, name, buffer)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights of the original."""
        torch.cat(self._originals, out=self._float32)
        self._bfloat16.copy_(self._float32)
