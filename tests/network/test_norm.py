"""The notebook's batch normalisation over 2 and 3 ranks, with uneven and empty slices, against torch's on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dogvae.network.norm import SyncBatchNorm, _Normalize
from tests.support.ranks import start_ranks

CHANNELS = 4
STEPS = 3  # so that running statistics are updated more than once
# Images of each rank, by world size: even, uneven, and with a rank that has none.
SLICES = {2: [(4, 4), (5, 2), (6, 0), (0, 3)], 3: [(2, 2, 2), (1, 5, 2), (3, 0, 4), (0, 0, 5)]}
CASES = [(world, slices) for world, every in SLICES.items() for slices in every]


def problem(n: int, step: int) -> tuple[Tensor, Tensor]:
    """A whole batch whose channels have other means and variances than 0 and 1, and a gradient of its outputs."""
    generator = torch.Generator().manual_seed(100 * n + step)
    scale = torch.tensor([0.1, 1.0, 5.0, 30.0]).view(1, CHANNELS, 1, 1)
    shift = torch.tensor([0.0, -2.0, 10.0, 100.0]).view(1, CHANNELS, 1, 1)
    x, gradient = (torch.randn(n, CHANNELS, 3, 2, generator=generator) for _ in range(2))
    return x * scale + shift, gradient


def trained(norm: nn.BatchNorm2d, n: int, part: slice) -> dict[str, Tensor]:
    """A few steps on a part of each batch: outputs and gradients of the last one, and all statistics."""
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.3]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5]))
    for step in range(STEPS):
        norm.zero_grad()
        x, gradient = (t.to(norm.weight.dtype) for t in problem(n, step))
        mine = x[part].clone().requires_grad_()
        y = norm(mine)
        y.backward(gradient[part])
    gradients = {"x_grad": mine.grad, "weight_grad": norm.weight.grad, "bias_grad": norm.bias.grad}
    assert None not in gradients.values()
    return {"y": y.detach(), **gradients, **{name: t.clone() for name, t in norm.named_buffers()}}  # type: ignore[dict-item]


def work(rank: int, folder: str) -> None:
    """The process of one rank in groups of each size, which saves its results of all cases."""
    torch.set_num_threads(1)
    for world, every in SLICES.items():
        if rank >= world:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/init-{world}", rank=rank, world_size=world)
        results: dict[Any, Any] = {}
        for slices in every:
            start = sum(slices[:rank])
            part = slice(start, start + slices[rank])
            norm = SyncBatchNorm(CHANNELS, momentum=0.3)
            results[slices] = trained(norm, sum(slices), part)
            results[slices]["eval"] = norm.eval()(problem(sum(slices), 9)[0][part]).detach()
            half = SyncBatchNorm(CHANNELS)(problem(sum(slices), 0)[0][part].bfloat16())
            results[slices]["half"] = half.detach()
        torch.save(results, f"{folder}/{world}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Any, Any]]]:
    """The results of each rank, by world size. One set of processes runs all cases, as starting them takes long."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    start_ranks(work, 3, str(folder))
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in SLICES}


def close(got: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest value of each channel; (n, channels, h, w)."""
    scale = expected.abs().amax(dim=(0, 2, 3), keepdim=True)
    assert (got.double() - expected).abs().div(scale).max() < 1e-5


@pytest.mark.parametrize(("world", "slices"), CASES)
def test_all_ranks_together_equal_one_batch_norm(results: Any, world: int, slices: tuple[int, ...]) -> None:
    ranks = [every[slices] for every in results[world]]
    whole = nn.BatchNorm2d(CHANNELS, momentum=0.3).double()  # free of rounding errors of its own
    expected = trained(whole, sum(slices), slice(None))
    for name in ("y", "x_grad"):
        close(torch.cat([rank[name] for rank in ranks]), expected[name])
    for name in ("weight_grad", "bias_grad"):
        total = torch.stack([rank[name] for rank in ranks]).double().sum(dim=0)
        assert (total - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()
    for rank in ranks:
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(rank[name].double(), expected[name], rtol=1e-5, atol=1e-7)
            assert torch.equal(rank[name], ranks[0][name])  # rank 0 saves them for all
        assert rank["num_batches_tracked"] == STEPS
    close(torch.cat([rank["eval"] for rank in ranks]), whole.eval()(problem(sum(slices), 9)[0].double()).detach())


@pytest.mark.parametrize(("world", "slices"), CASES)
def test_bfloat16_stays_bfloat16(results: Any, world: int, slices: tuple[int, ...]) -> None:
    got = torch.cat([every[slices]["half"] for every in results[world]])
    assert got.dtype == torch.bfloat16
    x = problem(sum(slices), 0)[0].bfloat16().double()
    assert (got.double() - nn.BatchNorm2d(CHANNELS).double()(x)).abs().max() < 0.02


def test_one_rank_equals_torch_bit_for_bit() -> None:
    got, expected = (trained(kind(CHANNELS), 6, slice(0, 6)) for kind in (SyncBatchNorm, nn.BatchNorm2d))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def cuda_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[None, Tensor, Tensor]:
    """`native_batch_norm_backward` as CUDA's kernel computes it: from the inverse standard deviation that it is given.

    aten/src/ATen/native/cuda/Normalization.cu, batch_norm_backward_cuda: the kernel computes it from the running
    variance only if none is given, while the CPU's kernel always does.
    """
    _running_mean, _running_var, mean, invstd, _train, _eps, _mask = rest
    centred = x - mean[:, None, None]
    return None, (dy * centred).sum((0, 2, 3)) * invstd, dy.sum((0, 2, 3))


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_gradients_with_cudas_kernel_equal_those_of_torch(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.ops.aten, "native_batch_norm_backward", cuda_backward)
        generator = torch.Generator().manual_seed(0)
        x = scale * torch.randn(8, 16, 9, 9, generator=generator) + 1
        weight, bias = torch.rand(2, 16, generator=generator)
        # Correlated with x, as real gradients are. Otherwise an error in that term would be too small to see.
        gradient = torch.randn(x.shape, generator=generator) + (x - 1) / scale

        def gradients(norm: Any) -> list[Tensor]:
            leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
            norm(*leaves).backward(gradient.double())
            return [leaf.grad for leaf in leaves if leaf.grad is not None]

        got = gradients(lambda *leaves: _Normalize.apply(*leaves, 1, 1e-5)[0])
        expected = gradients(lambda *leaves: F.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=1e-5))
        for a, b in zip(got, expected, strict=True):
            assert (a - b).norm() < 1e-5 * b.norm()
    finally:
        dist.destroy_process_group()
