"""Parts of gpu.py that compare numbers: gradients with float64, a resumed run with a whole one, losses with a CPU's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import measure
from dogvae.config import Config, Safety
from dogvae.data.dataset import Batches, epoch_order
from dogvae.inference.elbo import evaluate
from dogvae.network import likelihood
from dogvae.network.vae import VAE
from dogvae.storage import Storage
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.loop import loop
from dogvae.training.observer import Observer
from dogvae.training.step import Trainer
from gpu_part import Part

CPU = torch.device("cpu")
MOST_WRONG = {"fp32": 1e-5, "bf16": 0.1}  # largest relative error of a layer's gradient; on a CPU 3e-6 and 0.03
# Largest difference from the loss curve in fp32, as a share of what training gains. CPU and GPU draw other noise, which
# alone makes 8% (measured on a CPU with two seeds).
MOST_APART = {"bf16": 0.05, "fp32 on the CPU": 0.15}


@contextmanager
def ieee_convolutions() -> Iterator[None]:
    """fp32 convolutions in fp32: by default cuDNN rounds their inputs to TF32, which has 10 bits."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


class Doubles(TorchFunctionMode):
    """Makes `.float()`, which the network and the likelihoods call, keep float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.float else func(*args, **(kwargs or {}))


def gradient_errors(config: Config, device: torch.device) -> dict[str, float]:
    """Relative error of each weight's gradient after `Trainer.step`, against float64 on the CPU."""
    n, size = config.batch_size, config.model.image_size
    trainer, generator = Trainer(config, device), torch.Generator().manual_seed(0)
    with torch.no_grad():  # weights that begin at 0 make the gradients of their neighbours 0
        for p in trainer.parameters.values():
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(device))
    exact = VAE(config.model).double()
    for network in (trainer.net, exact):
        _without_kinks(network)
    exact.load_state_dict(trainer.model.state_dict())
    given: list[Tensor] = []  # images and noise as the network gets them

    def keep(_: Any, args: Any) -> None:
        given[:] = [a.detach().clone() for a in args]

    trainer.net.register_forward_pre_hook(keep)
    smooth = torch.rand(n, 3, size // 8, size // 8, generator=generator)
    images = torch.nn.functional.interpolate(smooth, size=size, mode="bilinear").mul(255).byte()
    trainer.step(images.to(device), n, 0, 0, 100)
    x, noise = (a.cpu().double() for a in given)
    with Doubles():
        outputs, mu, logvar = exact(x, noise)
        if config.model.likelihood == "bernoulli":
            reconstruction = likelihood.bernoulli(outputs, x).sum()
        else:
            errors, pixels = likelihood.squared_errors("gaussian", outputs, x), x[0].numel()
            sigma = likelihood.best_sigma(errors.detach().sum(), n * pixels)
            reconstruction = likelihood.gaussian(errors, sigma, pixels).sum()
        ((reconstruction + likelihood.kl(mu, logvar).sum()) / n).backward()
    truth = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    ours = {name: trainer.parameters[name].grad for name in truth}
    return {name: float((ours[name].cpu().double() - g).norm() / g.norm()) for name, g in truth.items()}


def _without_kinks(network: nn.Module) -> None:
    """SiLU for the notebook's ReLUs. Where rounding changes the sign of a ReLU's input, its gradient is another one,
    which alone makes errors of 1e-3 in fp32.
    """
    for layers in [m for m in network.modules() if isinstance(m, nn.Sequential)]:
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.ReLU | nn.LeakyReLU):
                layers[i] = nn.SiLU()


def gradients(part: Part) -> None:
    """In fp32 the worst layer must be far below the 5e-4 of TF32's rounding."""
    for preset in ("default", "notebook"):
        config = part.config(preset=preset, samples=2, batch_size=4 if part.quick else 16, grad_clip=0.0)
        config, exact = config.replace(loss_scale="image"), 0.0
        for name, precision, device, convolutions, most in (
            ("fp32 on the CPU", "fp32", CPU, nullcontext, MOST_WRONG["fp32"]),
            ("fp32", "fp32", part.device, ieee_convolutions, MOST_WRONG["fp32"]),
            ("fp32 as PyTorch is set", "fp32", part.device, nullcontext, None),
            ("bf16", "bf16", part.device, nullcontext, MOST_WRONG["bf16"]),
        ):
            with convolutions():
                errors = gradient_errors(config.replace(precision=precision), device)
            layer, worst = max(errors.items(), key=lambda item: item[1])
            line = f"{preset + ', ' + name:<34} median {statistics.median(errors.values()):.1e}, worst {worst:.1e}"
            exact = exact or worst
            tf32 = ": TF32" if most is None and worst > 20 * exact else ""
            part.say(f"{preset}, {name}", errors, f"{line} ({layer}){tf32}")
            if most is not None:
                part.check(f"gradients: {preset}, {name}", worst < most, f"worst {worst:.1e}")


def trained(folder: Path, config: Config, device: torch.device, observer: Observer) -> dict[str, Tensor]:
    """The whole state at the end of a run, which resumes where the folder has a checkpoint."""
    loop(config, Storage(folder), device, observer, Safety(checkpoint_steps=3))
    saved = Checkpoints(Storage(folder)).latest()
    assert saved is not None
    return saved.tensors


class KillsItself(Observer):
    """Ends the process without a warning after the fifth step, once the checkpoint of the third is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def progress(self, epoch: int, step: int, steps: int) -> None:
        while step == 5:
            if list(self._folder.glob("checkpoints/*.safetensors")):
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)


def killed(folder: Path, config: Config, device: torch.device, deterministic: bool) -> None:
    """A run in a process of its own that ends after five steps."""
    measure.without_tensorboard()
    torch.backends.cudnn.deterministic = deterministic
    trained(folder, config, device, KillsItself(folder))


def resume(part: Part) -> None:
    """Two whole runs and a killed one that is resumed, of 2 epochs of 8 steps, with averages and checkpoints."""
    batch = 4 if part.quick else 64
    data = part.photos(8 * batch, 8)
    config = part.config(epochs=2, batch_size=batch).for_data(
        str(data.path), data.fingerprint, data.size, len(data.train)
    )
    for deterministic in (True, False):
        torch.backends.cudnn.deterministic = deterministic
        name = f"{'' if deterministic else 'not '}deterministic"
        once, again = (trained(part.folder / f"{name} {i}", config, part.device, Observer()) for i in (1, 2))
        folder = part.folder / f"{name} killed"
        process = multiprocessing.get_context("spawn").Process(
            target=killed, args=(folder, config, part.device, deterministic)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"the run to kill ended with {process.exitcode}"
        resumed = trained(folder, config, part.device, Observer())
        row = {"again": apart(once, again), "resumed": apart(once, resumed)}
        part.say(name, row, f"{name} convolutions: run again {row['again']:.1e} apart, resumed {row['resumed']:.1e}")
        if deterministic or row["again"] == 0:
            part.check(f"resumed equals uninterrupted, {name}", row["resumed"] == 0, f"{row['resumed']:.1e} apart")


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative difference of two states' tensors."""
    assert a.keys() == b.keys()
    pairs = [(a[name].double(), b[name].double()) for name in a]
    return max(float((x - y).norm() / x.norm().clamp_min(1e-30)) for x, y in pairs)


def curves(part: Part) -> None:
    """Four epochs of 40 steps each, from the same weights, with the images in the same order."""
    steps, batch = (8, 8) if part.quick else (40, 32)
    data = part.photos(steps * batch, 64)
    found: dict[str, list[float]] = {}
    for name, precision, device in (
        ("fp32", "fp32", part.device), ("bf16", "bf16", part.device), ("fp32 on the CPU", "fp32", CPU)
    ):  # fmt: skip
        trainer = Trainer(part.config(batch_size=batch, epochs=4, precision=precision), device)
        losses = found[name] = []
        batches = Batches(data.train, device)
        for epoch in range(4):
            order = epoch_order(len(data.train), 0, epoch).reshape(steps, batch)
            for number, images in enumerate(batches(iter(order))):
                trainer.step(images, batch, epoch, number, steps)
                if (number + 1) % (steps // 2) == 0:
                    losses.append(trainer.sums.described(trainer.sums.over_ranks(), 1)["train_loss"])
                    trainer.sums.clear()
        val = evaluate(trainer.evaluated_model, data.val, device)["loss"]
        with ieee_convolutions():
            ieee = evaluate(trainer.evaluated_model, data.val, device)["loss"]
        line = f"{name:<16} {' '.join(f'{x:.0f}' for x in losses)}, validation {val:.1f}, with ieee {ieee:.1f}"
        part.say(name, {"losses": losses, "val_loss": val, "val_loss_ieee": ieee}, line)
    gain = found["fp32"][0] - found["fp32"][-1]
    for name, limit in MOST_APART.items():
        most = max(abs(a - b) for a, b in zip(found[name], found["fp32"], strict=True)) / gain
        part.check(f"losses of {name} and fp32 agree", most < limit, f"{most:.1%} of the gain apart at most")
