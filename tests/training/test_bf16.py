"""Weights that are cast to bfloat16 together, the averaged weights, and DDP's order, against torch's own ways."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dogvae.config import Config
from dogvae.data.dataset import rank_slice
from dogvae.training import bf16
from dogvae.training.average import Average
from dogvae.training.bf16 import BF16
from dogvae.training.step import Trainer
from tests.support.ranks import on_ranks

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("group_bytes", [100, 4 << 20])
def test_weights_cast_together_compute_what_autocast_computes(
    memory_format: torch.memory_format, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, float32 gradients and batch norm's statistics bit for bit, also after the weights have changed."""
    monkeypatch.setattr(bf16, "GROUP_BYTES", group_bytes)
    plain, original = network(memory_format), network(memory_format)
    together = BF16(original)
    for step in range(2):
        outputs = []
        for net in (plain, together):
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(net(images(step).contiguous(memory_format=memory_format)))
            net.zero_grad()
            outputs[-1].float().square().sum().backward()
        assert outputs[0].dtype == torch.bfloat16
        assert torch.equal(*outputs)
        for p, q in zip(plain.parameters(), original.parameters(), strict=True):
            assert q.dtype == torch.float32
            if p.grad is not None:
                assert q.grad is not None
                assert q.grad.dtype == torch.float32
                assert torch.equal(p.grad, q.grad)
            with torch.no_grad():
                p.mul_(1.1)
                q.mul_(1.1)
    for buffer, other in zip(plain.buffers(), original.buffers(), strict=True):
        assert torch.equal(buffer, other)


def _gradients(rank: int, config: Config) -> None:
    """A step's gradients on three ranks, in a trainer that is new and in one that has made another step before."""
    new, old = Trainer(config, CPU), Trainer(config, CPU)
    generator = torch.Generator().manual_seed(7)
    batches = torch.randint(0, 256, (2, 12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    mine = rank_slice(12, rank, 3)
    old.step(batches[1][mine], 12, 0, 1, 2)
    old.load(new.state())
    assert isinstance(new.net, DistributedDataParallel)
    for trainer in (new, old):
        trainer.step(batches[0][mine], 12, 0, 0, 2)
    for name, p in new.parameters.items():
        assert p.grad is not None
        assert torch.equal(p.grad, old.parameters[name].grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["default", "notebook"])
def test_first_step_of_a_process_adds_gradients_in_the_order_of_all_others(preset: str) -> None:
    config = Config.make(preset=preset, width=4, latent_dim=2, latent_size=4, image_size=32, batch_size=12)
    on_ranks(3, _gradients, config)


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
