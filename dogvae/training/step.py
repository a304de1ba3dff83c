"""The model, its optimiser and one step of training on one rank. Knows torch.distributed, but nothing of Ray.

Every random draw comes from (seed, epoch, step) and is made for the global batch, of which each rank takes its slice:
neither an interruption nor the number of workers changes what is computed.
"""

from __future__ import annotations

import copy
import math
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dogvae import rng
from dogvae.config import Config
from dogvae.data.dataset import rank_slice
from dogvae.rng import Stream
from dogvae.training.augment import augment, draws
from dogvae.training.average import Average
from dogvae.training.bf16 import BF16
from dogvae.training.checkpoint import part
from dogvae.training.flow_task import FlowTask
from dogvae.training.memory import keep_freed_memory
from dogvae.training.optimizer import Adam
from dogvae.training.schedule import lr_at
from dogvae.training.sums import EpochSums
from dogvae.training.task import Task, VAETask

BUCKET_MB = 8  # of gradients that leave together; the default network has 12 MB


class Trainer:
    """The model, its optimiser and its averaged weights on one rank, and one step of training."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # Every rank starts from the same weights, at every world size.
        torch.manual_seed(rng.seed(Stream.WEIGHTS, config.seed))
        self.task: Task = FlowTask(config, device) if config.flow else VAETask(config, device)
        self.model = self.task.network().to(device).to(memory_format=self.task.memory_format)
        if device.type == "cpu":
            keep_freed_memory()
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if config.ema else None
        self.average = Average(self.ema, self.model, fused=device.type == "cuda") if self.ema is not None else None
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = Adam(self.parameters)
        self.statistics = statistics_of(self.model)
        self.averaged_statistics = statistics_of(self.ema) if self.ema is not None else []
        self.bf16 = config.precision == "bf16" or (
            config.precision == "auto"
            and device.type == "cuda"
            and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        self.net: nn.Module = BF16(self.model) if self.bf16 else self.model  # what computes the losses
        if self.world_size > 1:
            self.net = self._distributed(self.net)
        # DDP averages over ranks: times their number, the slices' sums add up to the mean over the global batch.
        # None for one rank: given a tensor, torch imports sympy in the first step.
        self.factor = torch.full((), float(self.world_size), device=device) if self.world_size > 1 else None
        self.noise = torch.Generator(device)
        self.sums = EpochSums(device, self.task.terms)  # of this epoch
        self.streak = torch.zeros((), dtype=torch.int64, device=device)  # steps skipped in a row, up to now

    def step(self, images: Tensor, n: int, epoch: int, step: int, steps: int) -> None:
        """One step on this rank's slice, uint8 (b, 3, h, h), of a global batch of `n` images; `steps` make an epoch."""
        config, device = self.config, self.device
        mine = rank_slice(n, self.rank, self.world_size)
        x = images / 255
        if config.augment:
            flip, degrees = (torch.from_numpy(a[mine]) for a in draws(n, config.seed, epoch, step))
            x = augment(x, flip, degrees)
        x = x.contiguous(memory_format=self.task.memory_format)
        self.noise.manual_seed(rng.seed(Stream.POSTERIOR, config.seed, epoch, step))
        noise = torch.randn((config.samples, n, *self.task.noise_shape), generator=self.noise, device=device)
        # Batch norm takes its statistics in passing: should the step be skipped, they are put back.
        before = [statistic.clone() for statistic in self.statistics]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            objective, nats = self.task.losses(self.net, x, noise[:, mine], n, epoch + step / steps)
        for p in self.parameters.values():
            p.grad = None
        objective.backward(self.factor)
        skipped, norm = self._update(lr_at(config, epoch + step / steps), epoch * steps + step, before)
        self.sums.add(len(x), nats, norm, skipped)
        self.streak = (self.streak + 1) * skipped

    def _distributed(self, network: nn.Module) -> nn.Module:
        """The network in DDP, whose buckets are arranged already, so that they leave while backward runs.

        DDP arranges its buckets in the order of the gradients, after its first backward pass. The gradients of three
        and more ranks would be added up in another order in a process that has just started than in one that has not.
        So one pass comes before all steps. It changes nothing, as batch norm's statistics are put back.
        """
        # One kernel that copies all gradients of a bucket: torch has it from 2.15 on.
        batched = "batched_grad_copy" in signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {"batched_grad_copy": True} if batched else {}
        net = DistributedDataParallel(
            network,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=BUCKET_MB,
            **options,
        )
        net.broadcast_buffers = False  # they are equal on all ranks
        before = [statistic.clone() for statistic in self.statistics]
        side = self.config.model.image_size
        x = torch.zeros(1, 3, side, side, device=self.device).contiguous(memory_format=self.task.memory_format)
        noise = torch.zeros(self.config.samples, 1, *self.task.noise_shape, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            self.task.losses(net, x, noise, self.world_size, 0.0)[0].backward()
        self.model.zero_grad(set_to_none=True)
        for statistic, old in zip(self.statistics, before, strict=True):
            statistic.copy_(old)
        return net

    def _update(self, lr: float, number: int, before: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Apply the gradients of step `number` of the run, unless they are not finite: then nothing changes, and batch
        norm's statistics are again what they were `before`. Returns whether it was skipped, a bool (), and the norm
        of the gradients.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.grad_clip, norm)
        skipped = ~(norm < math.inf)  # also if it is NaN
        as_number = skipped.float()
        self.optimizer.step(lr, as_number)
        for statistic, old in zip(self.statistics, before, strict=True):
            statistic.copy_(torch.where(skipped, old, statistic))
        if self.average is not None:
            # Early on the average is short, or it would remember the random weights it started from.
            decay = min(self.config.ema, (1 + number) / (10 + number))
            self.average.update(1 - decay, as_number)
            for mean, value in zip(self.averaged_statistics, self.statistics, strict=True):
                mean.copy_(value)
        return skipped, norm

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(p.numel() * p.element_size() for p in self.parameters.values())

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is validated and exported: the averaged weights if there are any."""
        return self.ema or self.model

    def state(self) -> dict[str, Tensor]:
        """All tensors of the training state, by names that do not depend on the world size."""
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema/{name}": t for name, t in self.ema.state_dict().items()}
        tensors |= {f"adam/{name}": t for name, t in self.optimizer.state().items()}
        return tensors | {"streak": self.streak}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave, and, if it is there, what `EpochSums.over_ranks` gave as `sums`."""
        self.model.load_state_dict(part(tensors, "model"))
        if self.ema is not None:
            self.ema.load_state_dict(part(tensors, "ema"))
        self.optimizer.load(part(tensors, "adam"))
        self.streak = tensors["streak"].to(self.device, copy=True)
        if "sums" in tensors:
            self.sums.load(tensors["sums"], self.rank)


def statistics_of(network: nn.Module) -> list[Tensor]:
    """The buffers that training changes: batch norm's statistics."""
    kept = network.state_dict(keep_vars=True)
    return [buffer for name, buffer in network.named_buffers() if name in kept]
