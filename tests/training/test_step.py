"""One step, one validation, one state: each against the same thing computed plainly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import ContinuousBernoulli, Normal, kl_divergence

from dogvae import rng
from dogvae.config import Config
from dogvae.data.dataset import Dataset, Split
from dogvae.inference.elbo import baselines, evaluate
from dogvae.network.vae import VAE
from dogvae.rng import Stream
from dogvae.storage import Storage
from dogvae.training.augment import augment, draws
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.schedule import beta_at, lr_at
from dogvae.training.step import Trainer

CPU = torch.device("cpu")
Writer = Callable[..., Path]


def config_of(**settings: Any) -> Config:
    """Small and plain; every setting that matters here is said, whatever the defaults."""
    plain: dict[str, Any] = dict(
        image_size=32,
        width=4,
        latent_dim=3,
        norm="group",
        likelihood="bernoulli",
        epochs=10,
        batch_size=4,
        lr=1e-2,
        schedule="constant",
        lr_warmup=0.0,
        samples=2,
        beta=1.0,
        kl_warmup=0.0,
        grad_clip=0.0,
        ema=0.0,
        augment=False,
        precision="fp32",
        seed=5,
    )
    return Config.make(**{**plain, **settings})


def photos(n: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), np.uint8))


def trainer_of(config: Config) -> Trainer:
    """With no weight at 0, as some are at first: then their neighbours' gradients would be 0 as well."""
    trainer = Trainer(config, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return trainer


def noise_of(config: Config, n: int, epoch: int, step: int) -> Tensor:
    """The documented draw of a step: keyed by (seed, epoch, step, 2), for the whole global batch."""
    generator = torch.Generator().manual_seed(rng.seed(Stream.POSTERIOR, config.seed, epoch, step))
    return torch.randn((config.samples, n, config.model.latent_dim, 4, 4), generator=generator)


def plain_terms(model: VAE, x: Tensor, noise: Tensor, likelihood: str) -> tuple[Tensor, Tensor]:
    """(reconstruction, KL) of each image, one image and one sample at a time, by torch's own distributions."""
    reconstructions, kls = [], []
    for b in range(len(x)):
        mu, logvar = model.encoder(x[b : b + 1])
        posterior = Normal(mu, torch.exp(logvar / 2))
        terms = []
        for s in range(len(noise)):
            logits = model.decoder(mu + posterior.scale * noise[s, b : b + 1])
            if likelihood == "bernoulli":
                terms.append(F.binary_cross_entropy(torch.sigmoid(logits), x[b : b + 1], reduction="sum"))
            elif likelihood == "gaussian":
                assert model.log_scale is not None
                scale = torch.exp((1 - torch.sigmoid(model.log_scale)) * math.log(1 / 255))
                terms.append(-Normal(torch.sigmoid(logits), scale).log_prob(x[b : b + 1]).sum())
            else:
                bounded = 1000 * torch.tanh(logits.double() / 1000)  # torch's own loses its digits in fp32
                terms.append(-ContinuousBernoulli(logits=bounded).log_prob(x[b : b + 1].double()).sum().float())
        reconstructions.append(torch.stack(terms).mean())
        kls.append(kl_divergence(posterior, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum())
    return torch.stack(reconstructions), torch.stack(kls)


# --- schedules


def test_learning_rate_by_hand() -> None:
    config = config_of(lr=0.1, lr_warmup=2.0, schedule="cosine", epochs=10)
    expected = {
        0.0: 0.1 * 0.01 / 2.01,  # not quite 0, or the first step would be wasted
        1.0: 0.1 * 1.01 / 2.01,
        2.0: 0.1,
        4.0: 0.1 * (0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos 45 degrees
        6.0: 0.1 * (0.01 + 0.99 * 0.5),
        10.0: 0.001,
        12.0: 0.001,
    }
    assert {epoch: lr_at(config, epoch) for epoch in expected} == pytest.approx(expected, rel=1e-12)


def test_constant_learning_rate() -> None:
    config = config_of(lr=0.1, lr_warmup=0.0)
    assert [lr_at(config, epoch) for epoch in (0.0, 3.5, 9.9, 10.0)] == [0.1] * 4
    config = config_of(lr=0.1, lr_warmup=1.0)
    assert [lr_at(config, epoch) for epoch in (0.5, 1.0, 9.9)] == pytest.approx([0.1 * 0.51 / 1.01, 0.1, 0.1])


def test_warm_up_longer_than_the_run() -> None:
    config = config_of(lr=0.1, lr_warmup=20.0, schedule="cosine", epochs=10)
    assert lr_at(config, 10.0) == pytest.approx(0.1 * 10.01 / 20.01)
    assert lr_at(config_of(lr=0.1, lr_warmup=10.0, schedule="cosine"), 10.0) == pytest.approx(0.1)


def test_beta_by_hand() -> None:
    config = config_of(beta=3.0, kl_warmup=4.0)
    expected = {0.0: 0.0, 1.0: 0.75, 2.5: 1.875, 4.0: 3.0, 9.0: 3.0}
    assert {epoch: beta_at(config, epoch) for epoch in expected} == pytest.approx(expected)
    assert [beta_at(config_of(beta=3.0), epoch) for epoch in (0.0, 7.0)] == [3.0, 3.0]


# --- a step


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous-bernoulli", "gaussian"])
@pytest.mark.parametrize("augmented", [False, True])
def test_gradient_is_that_of_the_mean_negative_elbo(likelihood: str, augmented: bool) -> None:
    """Of a short batch too: 3 images where a full batch has 4. Half way through the warm-up of beta."""
    config = config_of(likelihood=likelihood, augment=augmented, beta=2.0, kl_warmup=4.0)
    trainer = trainer_of(config)
    images = photos(3)
    x = images.float() / 255
    if augmented:
        x = augment(x, *(torch.from_numpy(a) for a in draws(3, 5, 2, 0)))
        assert not torch.equal(x, images.float() / 255)
    model = trainer.model
    reconstruction, kl = plain_terms(model, x, noise_of(config, 3, 2, 0), likelihood)
    beta = 1.0  # at epoch 2 of 4, of 2.0
    expected = torch.autograd.grad((reconstruction + beta * kl).mean(), list(model.parameters()))
    trainer.step(images, 3, epoch=2, step=0, steps=7)
    for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
        assert p.grad is not None
        assert gradient.norm() > 0, name
        assert float((p.grad - gradient).norm() / gradient.norm()) < 2e-5, name
    reconstruction, kl = reconstruction.detach(), kl.detach()
    total = float((reconstruction + beta * kl).sum())
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in expected))
    sums = [3, total, float(reconstruction.sum()), float(kl.sum()), norm, 0.0]
    assert trainer.sums.over_ranks().tolist() == pytest.approx(sums, rel=1e-5)


def adam(parameters: list[Tensor], lr: float) -> torch.optim.Adam:
    """As the textbook has it."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=False, foreach=False)


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_weights_and_average_after_two_steps(clip: float) -> None:
    """Against Adam on independent gradients, with clipping, the schedule of the learning rate, and the average."""
    config = config_of(grad_clip=clip, lr_warmup=2.0, ema=0.9)
    trainer, plain = trainer_of(config), trainer_of(config).model
    start = [p.detach().clone() for p in trainer.ema.parameters()]  # type: ignore[union-attr]
    optimizer = adam(list(plain.parameters()), lr=1.0)
    averaged = [p.double() for p in start]
    for step in range(2):
        images = photos(4, seed=step)
        terms = plain_terms(plain, images.float() / 255, noise_of(config, 4, 0, step), "bernoulli")
        optimizer.zero_grad()
        (terms[0] + terms[1]).mean().backward()
        if clip:
            assert float(nn.utils.clip_grad_norm_(plain.parameters(), clip)) > clip
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step / 8 + 0.01) / 2.01
        optimizer.step()
        decay = (1 + step) / (10 + step)  # shorter than 0.9 at first
        averaged = [
            decay * a + (1 - decay) * p.detach().double() for a, p in zip(averaged, plain.parameters(), strict=True)
        ]
        trainer.step(images, 4, epoch=0, step=step, steps=8)
    for ours, theirs in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert trainer.evaluated_model is trainer.ema
    for mean, expected in zip(trainer.evaluated_model.parameters(), averaged, strict=True):
        torch.testing.assert_close(mean.double(), expected, rtol=0, atol=2e-6)


def test_without_average_the_weights_are_judged() -> None:
    trainer = trainer_of(config_of(ema=0.0))
    assert trainer.ema is None
    assert trainer.evaluated_model is trainer.model


def test_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(99)
    one = Trainer(config_of(seed=1), CPU).state()
    again = Trainer(config_of(seed=1, lr=0.5), CPU).state()
    other = Trainer(config_of(seed=2), CPU).state()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_step_depends_on_its_key() -> None:
    """Another step of the same batch draws other noise; the same step the same, whatever the global generator does."""
    config = config_of(augment=True)

    def after(epoch: int, step: int) -> list[float]:
        trainer = trainer_of(config)
        torch.manual_seed(step + 7 * epoch)
        trainer.step(photos(4), 4, epoch, step, 5)
        return trainer.sums.over_ranks().tolist()

    assert after(1, 2) == after(1, 2)
    assert len({tuple(after(*key)) for key in ((1, 2), (1, 3), (2, 2))}) == 3


# --- state


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.state().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("settings", [dict(ema=0.9), dict(norm="batch", likelihood="gaussian", grad_clip=1.0)])
def test_state_goes_on_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    """Through a checkpoint file; 3 steps before it and 3 after it."""
    config = config_of(augment=True, **settings)
    trainer = trainer_of(config)
    for step in range(3):
        trainer.step(photos(4, seed=step), 4, 0, step, 6)
    before = snapshot(trainer)
    checkpoints = Checkpoints(Storage(tmp_path))
    checkpoints.save(trainer.state(), {"step": 3})
    checkpoints.wait()
    loaded = checkpoints.latest()
    assert loaded is not None
    resumed = Trainer(config.replace(seed=6), CPU)  # other weights at first: all must come from the state
    resumed.config = config
    resumed.load(loaded.tensors)
    assert differing(resumed.state(), trainer.state()) == []
    for step in range(3, 6):
        for each in (trainer, resumed):
            each.step(photos(4, seed=step), 4, 0, step, 6)
    assert differing(resumed.state(), trainer.state()) == []
    assert {*differing(trainer.state(), before), "streak"} == set(before)  # all else has moved since


def test_state_has_all_that_training_needs() -> None:
    trainer = trainer_of(config_of(norm="batch", ema=0.5))
    trainer.step(photos(4), 4, 0, 0, 1)
    weights = [name for name, _ in trainer.model.named_parameters()]
    expected = {f"{kind}/{name}" for kind in ("model", "ema") for name in trainer.model.state_dict()}
    expected |= {f"adam/{key}/{name}" for key in ("exp_avg", "exp_avg_sq") for name in weights}
    assert set(trainer.state()) == expected | {"adam/updates", "streak"}
    assert any("running_var" in name for name in expected)


# --- steps that go wrong


def broken(n: int) -> Tensor:
    """Images of which one value is not a number."""
    images = photos(n).float()
    images[1, 2, 3, 4] = math.nan
    return images


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("first", [True, False])
def test_step_that_is_not_finite_is_skipped(first: bool, clip: float) -> None:
    """As the first step of all, and later: neither weights nor Adam's moments move, and the next step is as if it
    had not been there.
    """
    config = config_of(grad_clip=clip)
    trainer, spared = trainer_of(config), trainer_of(config)
    if not first:
        for each in (trainer, spared):
            each.step(photos(4, seed=1), 4, 0, 0, 5)
    before, sums = snapshot(trainer), trainer.sums.over_ranks()
    assert before.pop("streak") == 0
    trainer.step(broken(4), 4, 0, 1, 5)
    after = snapshot(trainer)
    assert after.pop("streak") == 1
    assert differing(before, {name: after[name] for name in before}) == []
    assert trainer.sums.over_ranks()[5] == sums[5] + 1 == 1
    assert torch.equal(trainer.sums.over_ranks()[:5], sums[:5])
    for each in (trainer, spared):
        each.step(photos(4, seed=2), 4, 0, 2, 5)
    assert differing(trainer.state(), spared.state()) == []
    assert differing(before, {name: trainer.state()[name] for name in before}) == list(before)
    assert torch.equal(trainer.sums.over_ranks()[:5], spared.sums.over_ranks()[:5])


def test_skipped_step_leaves_the_statistics_alone() -> None:
    """Of batch norm: once they are not numbers, no later validation is one."""
    trainer = trainer_of(config_of(norm="batch"))
    before = snapshot(trainer)
    trainer.step(broken(4), 4, 0, 0, 5)
    after = snapshot(trainer)
    assert differing(before, {name: after[name] for name in before}) == ["streak"]


def test_skipped_step_leaves_the_average_alone() -> None:
    trainer = trainer_of(config_of(ema=0.9))
    trainer.step(photos(4), 4, 0, 0, 5)
    before = snapshot(trainer)
    trainer.step(broken(4), 4, 0, 1, 5)
    assert differing(before, trainer.state()) == ["streak"]


# --- validation


@pytest.fixture
def val(write_dataset: Writer) -> Split:
    """37 images in two shards: validation takes them in chunks of 32, of which the last is short."""
    arrays = [photos(30, seed=1).numpy(), photos(7, seed=2).numpy()]
    return Dataset(write_dataset([photos(2).numpy()], arrays)).val


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous-bernoulli", "gaussian"])
def test_validation_is_the_mean_over_images(val: Split, likelihood: str) -> None:
    """Recomputed image by image with the same noise: 4 samples, keyed by (chunk, 3)."""
    model = trainer_of(config_of(likelihood=likelihood, norm="batch")).model
    with torch.no_grad():  # latents that differ in how far their means vary from image to image
        head = model.encoder.layers[-1]
        assert isinstance(head, nn.Conv2d)
        head.weight[:3] *= torch.tensor([40.0, 1.0, 1e-3])[:, None, None, None]
    got = evaluate(model, val, CPU)
    assert model.training

    model.eval()
    x = val.gather(np.arange(37)).float() / 255
    noise = torch.cat(
        [
            torch.randn(4, n, 3, 4, 4, generator=torch.Generator().manual_seed(rng.seed(Stream.VALIDATION, chunk)))
            for chunk, n in ((0, 32), (1, 5))
        ],
        dim=1,
    )
    with torch.no_grad():
        reconstruction, kl = plain_terms(model, x, noise, likelihood)
        mu = torch.cat([model.encoder(x[b : b + 1])[0] for b in range(37)])
        pictures = model.decode_mean(mu).double()
    psnr = [10 * math.log10(1 / float((pictures[b] - x[b].double()).square().mean())) for b in range(37)]
    active = int((mu.double().numpy().reshape(37, -1).var(axis=0) > 0.01).sum())
    assert 0 < active < 48
    expected = {
        "loss": float((reconstruction + kl).double().mean()),
        "reconstruction": float(reconstruction.double().mean()),
        "kl": float(kl.double().mean()),
        "psnr": sum(psnr) / 37,
        "active_latents": active,
    }
    assert got == pytest.approx(expected, rel=2e-5, abs=2e-4)  # nats: sums of 3,072 pixels in fp32


def test_validation_does_not_change_the_model(val: Split) -> None:
    model = trainer_of(config_of(norm="batch")).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = evaluate(model, val, CPU)
    torch.manual_seed(1)
    assert evaluate(model, val, CPU) == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_baselines(write_dataset: Writer) -> None:
    """The floor is what each pixel costs at best; the mean is what the mean training image scores on validation."""
    train, val = photos(20, seed=1).numpy(), photos(9, seed=2).numpy()
    dataset = Dataset(write_dataset([train], [val]))
    floor, mean = baselines("bernoulli", dataset)
    x = val.astype(np.float64) / 255
    p = (train.astype(np.float64) / 255).mean(axis=0)
    inside = np.clip(x, 1e-12, 1 - 1e-12)
    entropy = -(x * np.log(inside) + (1 - x) * np.log(1 - inside))
    assert floor == pytest.approx(entropy.sum() / 9, rel=1e-9)
    assert mean == pytest.approx(-(x * np.log(p) + (1 - x) * np.log(1 - p)).sum() / 9, rel=1e-9)
