"""The training step, the validation, and the loop over epochs. Knows torch.distributed, but nothing of Ray.

Every random draw comes from (seed, epoch, step) and is made for the global batch, of which each rank takes its slice:
neither an interruption nor the number of workers changes what is computed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dogvae import loss, metrics, pictures
from dogvae.augment import augment, draws
from dogvae.checkpoint import Checkpoints
from dogvae.config import Config
from dogvae.console import UsageError
from dogvae.dataset import Batches, Dataset, Split, epoch_order, grey_levels, moments, random_words, rank_slice
from dogvae.model import VAE
from dogvae.storage import Storage

VAL_SAMPLES = 4  # posterior samples in validation, whatever a run trains with: any two runs compare
VAL_CHUNK = 32  # images validated at once; fixed, so that every world size computes the same numbers
ACTIVE_VARIANCE = 0.01  # Burda, Grosse & Salakhutdinov 2016: a latent is active if its mean varies more than this
PICTURES = 10  # how often over a run pictures go to TensorBoard
NOISE, VALIDATION = 2, 3  # what a draw is for, so that no two purposes share their random numbers (1: augmentation)


T = TypeVar("T")


class Observer:
    """What the loop tells the outside, and asks it; the base class is deaf and never stops."""

    def progress(self, epoch: int, step: int, steps: int) -> None:
        """Rank 0, after each step: `step` of `steps` of this epoch are done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Every rank, after each epoch: its record, the same on all ranks."""


class Trainer:
    """The model, its optimiser and its averaged weights on one rank, and one step of training."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(config.seed)  # every rank starts from the same weights, at every world size
        self.model = VAE(config.model).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if config.ema else None
        if device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        self.net: Any = self.model
        if self.world_size > 1:
            devices = [device] if device.type == "cuda" else None
            self.net = DistributedDataParallel(self.model, device_ids=devices)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=config.lr, fused=True)
        self.bf16 = config.precision == "bf16" or (
            config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        self.noise = torch.Generator(device)
        # Of this epoch on this rank, over the steps that were not skipped: images, loss, reconstruction and KL in nats,
        # gradient norms; and how many steps were skipped.
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)

    def step(self, images: Tensor, n: int, epoch: int, step: int, steps: int) -> None:
        """One step on this rank's slice, uint8 (b, 3, h, h), of a global batch of `n` images; `steps` make an epoch."""
        config, device = self.config, self.device
        mine = rank_slice(n, self.rank, self.world_size)
        x = images.float() / 255
        if config.augment:
            flip, degrees = (torch.from_numpy(a[mine]).to(device) for a in draws(n, config.seed, epoch, step))
            x = augment(x, flip, degrees)
        if device.type == "cuda":
            x = x.to(memory_format=torch.channels_last)
        self.noise.manual_seed(int(random_words(1, config.seed, epoch, step, NOISE)[0] >> 1))
        noise = torch.randn((config.samples, n, *self.model.latent_shape), generator=self.noise, device=device)
        # Batch norm takes its statistics in passing: should the step be skipped, they are put back.
        before = [buffer.clone() for buffer in self.model.buffers()]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            logits, mu, logvar = self.net(x, noise[:, mine])
        reconstruction = loss.reconstruction(config.model.likelihood, logits, x, self.model.log_scale)
        kl = loss.kl(mu, logvar)
        beta = beta_at(config, epoch + step / steps)
        objective = self._objective(reconstruction.sum(), kl.sum(), beta, n)
        self.optimizer.zero_grad(set_to_none=True)
        # DDP averages over ranks: times their number, the slices' sums add up to the mean over the global batch.
        (objective * self.world_size).backward()
        skipped, norm = self._update(lr_at(config, epoch + step / steps), epoch * steps + step, before)
        nats = torch.stack([reconstruction.sum() + beta * kl.sum(), reconstruction.sum(), kl.sum()]).detach().double()
        images_nats_norm = torch.cat([nats.new_tensor([len(x)]), nats, norm.double()[None]])
        taken = torch.where(skipped > 0, torch.zeros_like(images_nats_norm), images_nats_norm)
        self.sums += torch.cat([taken, skipped.double()[None]])

    def _objective(self, reconstruction: Tensor, kl: Tensor, beta: float, n: int) -> Tensor:
        """This rank's part of the loss of a global batch of `n` images, from sums over its own images."""
        if self.config.loss_scale == "image":
            return (reconstruction + beta * kl) / n
        # The notebook: cross-entropy averaged over the pixels there are, KL over those of a full batch.
        pixels = 3 * self.config.model.image_size**2
        return reconstruction / (n * pixels) + beta * kl / (self.config.batch_size * pixels)

    def _update(self, lr: float, number: int, before: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Apply the gradients of step `number` of the run, unless they are not finite: then nothing changes, and the
        buffers are again what they were `before`. Returns whether it was skipped (1. or 0.) and the gradients' norm.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.grad_clip, norm)
        skipped = (~torch.isfinite(norm)).float()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The fused Adam leaves weights and moments alone where `found_inf` is 1, without asking the device first.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        for buffer, old in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(torch.where(skipped > 0, old, buffer))
        if self.ema is not None:
            # Early on the average is short, or it would remember the random weights it started from.
            decay = min(self.config.ema, (1 + number) / (10 + number))
            averaged: list[Tensor] = list(self.ema.parameters())
            steps = torch._foreach_sub([p.detach() for p in self.parameters.values()], averaged)
            torch._foreach_mul_(steps, (1 - skipped) * (1 - decay))
            torch._foreach_add_(averaged, steps)
            for mean, value in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                mean.copy_(value)
        return skipped, norm

    @property
    def judged(self) -> VAE:
        """The model that is validated and exported: the averaged weights if there are any."""
        return self.ema or self.model

    def state(self) -> dict[str, Tensor]:
        """All tensors of the training state, by names that do not depend on the world size."""
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema/{name}": t for name, t in self.ema.state_dict().items()}
        for name, p in self.parameters.items():
            tensors |= {f"adam/{key}/{name}": t for key, t in self.optimizer.state.get(p, {}).items()}
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.model.load_state_dict(part(tensors, "model"))
        if self.ema is not None:
            self.ema.load_state_dict(part(tensors, "ema"))
        for key in ("step", "exp_avg", "exp_avg_sq"):
            for name, tensor in part(tensors, f"adam/{key}").items():
                self.optimizer.state[self.parameters[name]][key] = tensor.to(self.device, copy=True)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix + "/"): t for name, t in tensors.items() if name.startswith(prefix + "/")}


def lr_at(config: Config, epoch: float) -> float:
    """Learning rate at a moment of training, in epochs: linear warm-up, then constant or half a cosine down to 1%."""
    if epoch < config.lr_warmup:
        return config.lr * (epoch + 0.01) / (config.lr_warmup + 0.01)
    if config.schedule == "constant":
        return config.lr
    share = (epoch - config.lr_warmup) / max(config.epochs - config.lr_warmup, 1e-9)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def beta_at(config: Config, epoch: float) -> float:
    """Weight of the KL term at a moment of training, in epochs: linear from 0 over the warm-up."""
    return config.beta * min(1.0, epoch / config.kl_warmup) if config.kl_warmup else config.beta


@torch.inference_mode()
def evaluate(model: VAE, split: Split, device: torch.device, rank: int = 0, world_size: int = 1) -> dict[str, float]:
    """Exact validation: the mean over all images of the split, the same number at every world size.

    The negative ELBO (beta 1, `VAL_SAMPLES` samples, fixed noise), its two terms, PSNR of the posterior mean's decoding
    (dB, mean over images) and the number of active latents. Every rank must call it; all get the result.
    """
    model.eval()
    n, latents = len(split), math.prod(model.latent_shape)
    chunks = [np.arange(start, min(start + VAL_CHUNK, n)) for start in range(0, n, VAL_CHUNK)]
    table = torch.zeros(len(chunks), 3 + 2 * latents, dtype=torch.float64, device=device)
    mine = range(rank, len(chunks), world_size)
    for c, images in zip(mine, Batches(split, device)([chunks[c] for c in mine]), strict=True):
        x = images.float() / 255
        noise = pictures.normal((VAL_SAMPLES, len(x), *model.latent_shape), int(random_words(1, c, VALIDATION)[0] >> 1))
        logits, mu, logvar = model(x, noise.to(device))
        table[c, 0] = loss.reconstruction(model.config.likelihood, logits, x, model.log_scale).double().sum()
        table[c, 1] = loss.kl(mu, logvar).double().sum()
        table[c, 2] = loss.psnr(model.decode_mean(mu), x).double().sum()
        means = mu.flatten(1).double()
        table[c, 3:] = torch.cat([means.sum(0), means.square().sum(0)])
    if world_size > 1:
        dist.all_reduce(table)  # each row comes from one rank, the others add zeros: the sum is exact
    sums = table.sum(dim=0).cpu() / n
    variance = sums[3 + latents :] - sums[3 : 3 + latents].square()
    model.train()
    return {
        "loss": float(sums[0] + sums[1]),
        "reconstruction": float(sums[0]),
        "kl": float(sums[1]),
        "psnr": float(sums[2]),
        "active_latents": int((variance > ACTIVE_VARIANCE).sum()),
    }


def baselines(likelihood: str, dataset: Dataset) -> tuple[float, float]:
    """(floor, mean): the least possible reconstruction term on validation, and the mean training image's."""
    floor = float(grey_levels(dataset.val) @ loss.floor_table(likelihood)) / len(dataset.val)
    return floor, loss.flat_score(likelihood, moments(dataset.train)[0], *moments(dataset.val))


def open_data(config: Config) -> Dataset:
    """The run's dataset; UsageError if it is not the one that the run began with."""
    dataset = Dataset(config.data)
    if dataset.fingerprint != config.fingerprint:
        raise UsageError(f"--data: {config.data} has changed since this run began (its fingerprint differs)")
    return dataset


def loop(config: Config, storage: Storage, device: torch.device, observer: Observer) -> None:
    """Train from the latest checkpoint in `storage`, or from the start, to the last epoch. Every rank calls it."""
    dataset = _together(lambda: open_data(config))
    trainer = Trainer(config, device)
    rank, world_size = trainer.rank, trainer.world_size
    checkpoints = Checkpoints(storage)
    saved = _agree(checkpoints.latest() if rank == 0 else None, world_size)
    meta: dict[str, Any] = {"epoch": 0, "step": 0, "seconds": 0.0, "baselines": None}
    if saved is not None:
        trainer.load(saved.tensors)
        meta = saved.meta
        if rank == 0:
            trainer.sums.copy_(saved.tensors["sums"])
    if meta["baselines"] is None:
        meta["baselines"] = _agree(baselines(config.model.likelihood, dataset) if rank == 0 else None, world_size)
    recorder = metrics.Recorder(storage, meta["epoch"]) if rank == 0 else None
    try:
        for epoch in range(meta["epoch"], config.epochs):
            meta, record = _epoch(trainer, dataset, epoch, meta, checkpoints, observer)
            if recorder:
                every = max(1, config.epochs // PICTURES)
                shown = epoch % every == 0 or epoch == config.epochs - 1
                photos = dataset.val.gather(np.arange(min(8, len(dataset.val))))
                recorder.record(record, _pictures(trainer.judged, photos, device) if shown else {})
                checkpoints.save({**trainer.state(), "sums": trainer.sums}, meta)
            observer.epoch(record)
        checkpoints.wait()
    finally:
        if recorder:
            recorder.close()


def _epoch(
    trainer: Trainer, dataset: Dataset, epoch: int, meta: dict[str, Any], checkpoints: Checkpoints, observer: Observer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rest of an epoch and its validation: what a checkpoint says of it, and its record."""
    config, n, rank, world_size = trainer.config, len(dataset.train), trainer.rank, trainer.world_size
    steps = -(-n // config.batch_size)
    order = epoch_order(n, config.seed, epoch)
    globals_ = [order[i * config.batch_size : (i + 1) * config.batch_size] for i in range(steps)]
    first = meta["step"] - epoch * steps
    mine = [batch[rank_slice(len(batch), rank, world_size)] for batch in globals_[first:]]
    began, waited = time.perf_counter(), 0.0
    trainer.net.train()
    batches = Batches(dataset.train, trainer.device)(mine)
    for step in range(first, steps):
        asked = time.perf_counter()
        images = next(batches)
        waited += time.perf_counter() - asked
        trainer.step(images, len(globals_[step]), epoch, step, steps)
        if rank == 0:
            observer.progress(epoch, step + 1, steps)
    sums = trainer.sums.clone()
    if world_size > 1:
        dist.all_reduce(sums)
    sums[4:] /= world_size  # gradient norm and skipped steps are the same on all ranks
    trained = time.perf_counter() - began
    val = evaluate(trainer.judged, dataset.val, trainer.device, rank, world_size)
    trainer.sums.zero_()
    seconds = meta["seconds"] + time.perf_counter() - began
    floor, mean = meta["baselines"]
    norm, skipped = sums[4:].tolist()
    total, reconstruction, kl = (sums[1:4] / sums[0]).tolist()
    record = {
        "epoch": epoch,
        "step": (epoch + 1) * steps,
        "train_loss": total,
        "train_reconstruction": reconstruction,
        "train_kl": kl,
        **{f"val_{name}": value for name, value in val.items()},
        "val_explained": loss.explained(val["loss"], floor, mean),
        "val_loss_per_pixel": val["loss"] / (3 * config.model.image_size**2),
        "lr": lr_at(config, epoch + (steps - 1) / steps),
        "beta": beta_at(config, epoch + (steps - 1) / steps),
        "gradient_norm": norm / max(1, steps - skipped),
        "skipped_steps": int(skipped),
        "images_per_s": sum(map(len, globals_[first:])) / trained,
        "data_wait": waited / trained,
        "world_size": world_size,
        "seconds": seconds,
    }
    after = {
        **meta,
        "epoch": epoch + 1,
        "step": record["step"],
        "seconds": seconds,
        "val_loss": val["loss"],
        "metrics": record,
        "config": config.to_dict(),
        "fingerprint": dataset.fingerprint,
    }
    return after, record


@torch.inference_mode()
def _pictures(model: VAE, photos: Tensor, device: torch.device) -> dict[str, np.ndarray]:
    model.eval()
    try:
        return pictures.standard(model, photos, device)
    finally:
        model.train()


def _together(action: Callable[[], T]) -> T:
    """Run an action on every rank; a user's mistake that shows on one of them is raised on all, so that none waits."""
    result, problem = None, None
    try:
        result = action()
    except UsageError as error:
        problem = str(error)
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    if first := next(filter(None, problems), None):
        raise UsageError(first)
    return cast(T, result)


def _agree(value: Any, world_size: int) -> Any:
    """Rank 0's value, on every rank."""
    if world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
