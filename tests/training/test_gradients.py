"""The gradients of all ranks, the network's bfloat16 copy and the averaged weights, against torch's own ways."""

from __future__ import annotations

import copy
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dogvae.training import gradients
from dogvae.training.average import Average
from dogvae.training.bf16 import BF16Copy
from dogvae.training.gradients import Gradients
from tests.support.ranks import on_ranks


class Network(nn.Module):
    """Convolutions with a batch norm between them, and a linear layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.ConvTranspose2d(8, 4, 2))
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def network(memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    torch.manual_seed(0)
    return Network().to(memory_format=memory_format)


def images(seed: int) -> Tensor:
    return torch.randn((6, 3, 9, 9), generator=torch.Generator().manual_seed(seed))


def _differences(rank: int, world_size: int, group_bytes: int) -> None:
    gradients.GROUP_BYTES = group_bytes
    model = network()
    collected = Gradients(model.parameters(), world_size)
    sent: list[int] = []
    usual = dist.all_reduce

    def all_reduce(t: Tensor, *args: object, **kwargs: object) -> object:
        sent.append(t.numel())
        return usual(t, *args, **kwargs)

    dist.all_reduce = all_reduce
    for step in range(2):  # the first step is like all others
        model(images(10 * step + rank)).square().sum().backward()
        got = collected.take()
        wanted = [torch.zeros_like(p) for p in model.parameters()]
        for other in range(world_size):
            alone = network()
            alone(images(10 * step + other)).square().sum().backward()
            for total, p in zip(wanted, alone.parameters(), strict=True):
                total += 0 if p.grad is None else p.grad
        for one, total, p in zip(got, wanted, model.parameters(), strict=True):
            torch.testing.assert_close(one, total, rtol=1e-5, atol=1e-4)
            assert one.stride() == p.stride()
        model.zero_grad()
    sizes = [p.numel() for p in model.parameters()][::-1]
    steps = [sent[: len(sent) // 2], sent[len(sent) // 2 :]]
    assert steps[0] == steps[1]
    assert set(accumulate(steps[0])) <= set(accumulate(sizes))  # the last parameters leave first
    assert (len(steps[0]) == 1) == (group_bytes > 10**6)


@pytest.mark.parametrize("group_bytes", [100, 4 << 20])
def test_gradients_are_summed_over_ranks_in_the_same_groups_from_the_first_step_on(group_bytes: int) -> None:
    on_ranks(3, _differences, 3, group_bytes)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_bf16_copy_computes_what_autocast_computes(memory_format: torch.memory_format) -> None:
    """Outputs, gradients and batch norm's statistics bit for bit, also after the weights have changed."""
    plain, original = network(memory_format), network(memory_format)
    cast = BF16Copy(original)
    collected = Gradients(cast.network.parameters(), 1)
    for step in range(2):
        with torch.no_grad():
            for p, q in zip(plain.parameters(), original.parameters(), strict=True):
                p.mul_(1.1)
                q.mul_(1.1)
        cast.refresh()
        plain.zero_grad()
        outputs = []
        for net in (plain, cast.network):
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(net(images(step).contiguous(memory_format=memory_format)))
            outputs[-1].float().square().sum().backward()
        assert torch.equal(*outputs)
        for p, gradient in zip(plain.parameters(), collected.take(), strict=True):
            assert gradient.dtype == torch.float32
            assert torch.equal(torch.zeros_like(p) if p.grad is None else p.grad, gradient)
    for buffer, shared in zip(plain.buffers(), original.buffers(), strict=True):
        assert torch.equal(buffer, shared)


def test_fused_average_moves_as_a_lerp_and_can_be_called_off() -> None:
    weights, averages = network(), network()
    with torch.no_grad():
        for p in weights.parameters():
            p.add_(torch.randn_like(p))
    plain = copy.deepcopy(averages)
    fused, lerp = (Average(each, weights, fused) for each, fused in ((averages, True), (plain, False)))
    start = copy.deepcopy(averages.state_dict())
    fused.update(0.1, torch.ones(()))
    assert all(torch.equal(start[name], t) for name, t in averages.state_dict().items())
    for share in (0.1, 0.9):
        fused.update(share, torch.zeros(()))
        lerp.update(share, torch.zeros(()))
    for a, b, p in zip(averages.parameters(), plain.parameters(), weights.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, p)
