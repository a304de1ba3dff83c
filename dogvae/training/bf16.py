"""A network's copy for mixed precision. Autocast would cast each weight and each gradient by a kernel of its own."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dogvae.training.gradients import flatten, unflatten

CAST = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # the layers whose weights autocast casts, too


class BF16Copy:
    """A copy of a network whose convolutions and linear layers hold their weights in bfloat16.

    All other parameters are float32. The copy shares them with the original, and the buffers, but constants are
    bfloat16, too. The original's parameters become views of one tensor.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network)
        parameters = list(network.parameters())
        with torch.no_grad():
            self._float32 = torch.cat([flatten(p, p) for p in parameters])
        self._bfloat16 = self._float32.bfloat16()
        wide, narrow = unflatten(self._float32, parameters), unflatten(self._bfloat16, parameters)
        parts = dict(zip(parameters, zip(wide, narrow, strict=True), strict=True))
        for module, layer in zip(network.modules(), self.network.modules(), strict=True):
            for name, p in module.named_parameters(recurse=False):
                p.data = parts[p][0]
                layer.register_parameter(name, nn.Parameter(parts[p][isinstance(module, CAST)]))
            kept = module.state_dict()
            for name, buffer in module.named_buffers(recurse=False):
                setattr(layer, name, buffer if name in kept else buffer.bfloat16())

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights of the original."""
        self._bfloat16.copy_(self._float32)
