"""One training step and the training state, against the same thing computed plainly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dogvae.training.augment import augment, draws
from dogvae.training.step import Trainer
from tests.support.command import in_new_process
from tests.support.runs import differing
from tests.support.steps import CPU, config_of, noise_of, photos, plain_means, plain_sigma, plain_terms, trainer_of

LIKELIHOODS = ["gaussian", "bernoulli"]


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.state().items()}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("augmented", [False, True])
def test_gradient_is_that_of_the_mean_negative_elbo(likelihood: str, augmented: bool) -> None:
    """Of a short batch: 3 images instead of 4. In the middle of the KL warm-up."""
    config = config_of(likelihood=likelihood, augment=augmented, beta=2.0, kl_warmup=4.0)
    trainer = trainer_of(config)
    images = photos(3)
    x = images.float() / 255
    if augmented:
        x = augment(x, *(torch.from_numpy(a) for a in draws(3, 5, 2, 0)))
        assert not torch.equal(x, images.float() / 255)
    model = trainer.model
    noise = noise_of(config, 3, 2, 0)
    sigma = plain_sigma(plain_means(model, x, noise), x)  # the best one for this batch, as a constant
    reconstruction, kl = plain_terms(model, x, noise, sigma)
    beta = 1.0  # at epoch 2 of 4, on the way to 2
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


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_two_steps_equal_plain_adam_with_clipping_warm_up_and_averaging(clip: float) -> None:
    config = config_of(grad_clip=clip, lr_warmup=2.0, ema=0.9)
    trainer, plain = trainer_of(config), trainer_of(config).model
    averaged = [p.detach().clone().double() for p in trainer.ema.parameters()]  # type: ignore[union-attr]
    optimizer = torch.optim.Adam(plain.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, fused=False, foreach=False)
    for step in range(2):
        images = photos(4, seed=step)
        terms = plain_terms(plain, images.float() / 255, noise_of(config, 4, 0, step), sigma=0)
        optimizer.zero_grad()
        (terms[0] + terms[1]).mean().backward()
        if clip:
            assert float(nn.utils.clip_grad_norm_(plain.parameters(), clip)) > clip
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step / 8 + 0.01) / 2.01
        optimizer.step()
        decay = (1 + step) / (10 + step)  # at first less than 0.9
        averaged = [
            decay * a + (1 - decay) * p.detach().double() for a, p in zip(averaged, plain.parameters(), strict=True)
        ]
        trainer.step(images, 4, epoch=0, step=step, steps=8)
    for got, expected in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    assert trainer.evaluated_model is trainer.ema
    for mean, expected_mean in zip(trainer.evaluated_model.parameters(), averaged, strict=True):
        torch.testing.assert_close(mean.double(), expected_mean, rtol=0, atol=2e-6)


def test_without_averaging_the_weights_themselves_are_validated() -> None:
    trainer = trainer_of(config_of(ema=0.0))
    assert trainer.ema is None
    assert trainer.evaluated_model is trainer.model


def test_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(99)
    settings = ({"seed": 1}, {"seed": 1, "lr": 0.5}, {"seed": 2})
    one, again, other = (Trainer(config_of(**given), CPU).state() for given in settings)
    assert differing(one, again) == []
    assert differing(one, other) != []


def test_random_draws_of_a_step_depend_on_seed_epoch_and_step_alone() -> None:
    config = config_of(augment=True)

    def sums_after(epoch: int, step: int) -> tuple[float, ...]:
        trainer = trainer_of(config)
        torch.manual_seed(step + 7 * epoch)
        trainer.step(photos(4), 4, epoch, step, 5)
        return tuple(trainer.sums.over_ranks().tolist())

    assert sums_after(1, 2) == sums_after(1, 2)
    assert len({sums_after(*key) for key in ((1, 2), (1, 3), (2, 2))}) == 3


# --- state


def test_state_holds_weights_average_and_moments() -> None:
    trainer = trainer_of(config_of(architecture="notebook", ema=0.5))
    weights = [name for name, _ in trainer.model.named_parameters()]
    expected = {f"{kind}/{name}" for kind in ("model", "ema") for name in trainer.model.state_dict()}
    expected |= {f"adam/{key}/{name}" for key in ("exp_avg", "exp_avg_sq") for name in weights}
    assert set(trainer.state()) == expected | {"adam/updates", "streak"}
    assert any("running_var" in name for name in expected)


# --- steps with non-finite gradients


def with_nan(n: int) -> Tensor:
    """Images of which one value is NaN."""
    images = photos(n).float()
    images[1, 2, 3, 4] = math.nan
    return images


@pytest.mark.parametrize(
    ("steps_before", "settings"),
    [
        (0, {}),
        (1, {}),
        (0, {"grad_clip": 1.0}),
        (1, {"grad_clip": 1.0}),
        (0, {"architecture": "notebook"}),
        (1, {"ema": 0.9}),
        (1, {"likelihood": "gaussian"}),
    ],
)
def test_non_finite_step_changes_nothing_but_the_count_of_skipped_steps(
    steps_before: int, settings: dict[str, Any]
) -> None:
    """Weights, moments, running statistics and average stay. The next step is as if there had been no such step."""
    config = config_of(**settings)
    trainer, spared = trainer_of(config), trainer_of(config)
    for each in (trainer, spared)[: 2 * steps_before]:
        each.step(photos(4, seed=1), 4, 0, 0, 5)
    before, sums = snapshot(trainer), trainer.sums.over_ranks().clone()
    assert before["streak"] == 0
    trainer.step(with_nan(4), 4, 0, 1, 5)
    assert differing(before, trainer.state()) == ["streak"]
    assert trainer.streak == 1
    assert trainer.sums.over_ranks()[5] == sums[5] + 1 == 1
    assert torch.equal(trainer.sums.over_ranks()[:5], sums[:5])
    for each in (trainer, spared):
        each.step(photos(4, seed=2), 4, 0, 2, 5)
    assert differing(trainer.state(), spared.state()) == []
    assert torch.equal(trainer.sums.over_ranks()[:5], spared.sums.over_ranks()[:5])


def test_one_rank_does_not_import_torchs_compiler() -> None:
    """`torch.optim.Adam` would, and sympy comes with a gradient that `backward` is given: 1.3 s of each start."""
    code = """
import sys
from tests.support.steps import config_of, photos, trainer_of
trainer_of(config_of(ema=0.9)).step(photos(4), 4, epoch=0, step=0, steps=1)
print(*{"torch._dynamo", "sympy"} & set(sys.modules))
"""
    assert in_new_process(code) == []
