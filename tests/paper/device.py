"""The paper GPU from the inside of a process: its counters, and convolutions, which are shapes only.

torch imports this module itself, as it does device backends: `tests.paper.conftest` registers the entry point.
"""

from __future__ import annotations

import ctypes
import warnings
from typing import Any

import torch
from torch import Tensor

KINDS = ("launches", "copies", "memsets", "collectives", "waits", "host_to_device", "device_to_host")
"""What is counted, in the order of papergpu.c. `copies` holds those of all directions; `waits` are of the host."""


class _Kernel(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("name", ctypes.c_char_p), ("launches", ctypes.c_long))


_library = ctypes.CDLL(None)
_counts = (ctypes.c_long * len(KINDS)).in_dll(_library, "paper_counts")
_kernels = (_Kernel * (1 << 16)).in_dll(_library, "paper_kernels")


def counts() -> dict[str, int]:
    """How often the process has done what `KINDS` name, since the last `reset`."""
    return dict(zip(KINDS, _counts, strict=True))


def kernels() -> dict[str, int]:
    """The launches of each kernel since the last `reset`, by its mangled name; convolutions and products have none."""
    return {k.name.decode(): k.launches for k in _kernels if k.launches}


def reset() -> None:
    """Set all counts to zero."""
    ctypes.memset(_counts, 0, ctypes.sizeof(_counts))
    for kernel in _kernels:
        kernel.launches = 0


def install() -> None:
    """Stand in for cuDNN's convolutions, which need a real device."""
    global _implementations
    torch.backends.cudnn.enabled = False  # batch norm: torch's own kernels stand in for cuDNN's
    warnings.filterwarnings("ignore", "Warning only once for all operators")
    _implementations = torch.library.Library("aten", "IMPL")
    _implementations.impl("convolution", _convolution, "CUDA")
    _implementations.impl("convolution_backward", _convolution_backward, "CUDA")


def _innermost(t: Tensor) -> bool:
    """Whether the channels of a tensor are innermost in memory."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format in which cuDNN computes: channels innermost if either tensor has them so."""
    return torch.channels_last if _innermost(x) or _innermost(weight) else torch.contiguous_format


def _check(*tensors: Tensor | None) -> None:
    kinds = {(t.device, t.dtype) for t in tensors if t is not None}
    assert len(kinds) == 1, f"a convolution of {kinds}"


def _launch(n: int) -> None:
    _counts[KINDS.index("launches")] += n


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Tensor:  # fmt: skip
    _check(x, weight, bias)
    order = _format(x, weight)
    x, weight = x.contiguous(memory_format=order), weight.contiguous(memory_format=order)
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if transposed:
        channels = weight.shape[1] * groups
        sides = [(x.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + reach[i] + output_padding[i] + 1 for i in (0, 1)]
    else:
        channels = weight.shape[0]
        sides = [(x.shape[2 + i] + 2 * padding[i] - reach[i] - 1) // stride[i] + 1 for i in (0, 1)]
    _launch(1)
    y = torch.empty((len(x), channels, *sides), dtype=x.dtype, device=x.device, memory_format=order)
    return y if bias is None else y.add_(bias[:, None, None])


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    _check(dy, x, weight)
    order = _format(x, weight)
    dy = dy.contiguous(memory_format=order)
    _launch(sum(mask[:2]))
    dx, dweight = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=order) if asked else None
        for t, asked in zip((x, weight), mask, strict=False)
    )
    return dx, dweight, dy.sum((0, 2, 3)) if mask[2] else None
