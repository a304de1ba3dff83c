"""The networks: shapes, first pictures, posterior samples, and gradients equal to those of the reference notebook."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dogvae import rng
from dogvae.config import IMAGE_SIZES, Config, ModelConfig
from dogvae.network import likelihood
from dogvae.network.vae import LOGVAR_BOUND, VAE, Encoder, Residual
from dogvae.rng import Stream
from dogvae.training.step import Trainer
from dogvae.training.task import VAETask
from peers import NotebookVAE

CPU = torch.device("cpu")
ARCHITECTURES = ["default", "notebook"]
LATENT_SIZES = [4, 8, 16]
SIDES = {96: {4: 3, 8: 6, 16: 12}}  # of latent maps, where they differ from `latent_size`


def config_of(**settings: object) -> ModelConfig:
    return ModelConfig(**{"image_size": 32, "width": 8, "latent_dim": 3, "latent_size": 4, **settings})


def randomised(model: VAE) -> VAE:
    """No weight is 0, as some are at first, and no running statistics are 0 and 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("size", "latent_size"), list(itertools.product([32, 64, 96, 128], LATENT_SIZES)))
def test_shapes(architecture: str, size: int, latent_size: int) -> None:
    model = VAE(config_of(architecture=architecture, width=4, image_size=size, latent_size=latent_size))
    s = SIDES.get(size, {}).get(latent_size, latent_size)
    assert model.latent_shape == (3, s, s)
    outputs, mu, logvar = model(torch.rand(2, 3, size, size), torch.randn(5, 2, 3, s, s))
    assert outputs.shape == (5, 2, 3, size, size)
    assert mu.shape == logvar.shape == (2, 3, s, s)
    assert mu.dtype == logvar.dtype == torch.float32
    assert model.decode_mean(mu).shape == (2, 3, size, size)


@pytest.mark.parametrize(("size", "latent_size"), list(itertools.product(IMAGE_SIZES, LATENT_SIZES)))
def test_side_of_the_latent_map_is_the_nearest_that_halving_gives(size: int, latent_size: int) -> None:
    sides = [size // 2**k for k in range(9) if size % 2**k == 0]
    nearest = min(sides, key=lambda side: abs(math.log(side / latent_size)))
    assert config_of(image_size=size, latent_size=latent_size).latent_side == nearest


@pytest.mark.parametrize(
    ("size", "latent_size", "widths"),
    [
        (32, 16, [8]),
        (32, 4, [8, 16, 32]),
        (64, 8, [8, 16, 32]),
        (64, 4, [8, 16, 32, 32]),
        (128, 4, [8, 16, 32, 32, 32]),
    ],
)
def test_widths_double_up_to_four_times(size: int, latent_size: int, widths: list[int]) -> None:
    """An encoder has one residual block for each stage, a decoder has two."""
    model = VAE(config_of(image_size=size, latent_size=latent_size))
    encoder, decoder = (
        [m.first.out_channels for m in part.modules() if isinstance(m, Residual)]
        for part in (model.encoder, model.decoder)
    )
    assert encoder == widths
    assert decoder == [width for width in reversed(widths) for _ in range(2)]


def test_log_variance_is_bounded() -> None:
    """With huge weights in the last layer the KL and its gradients stay finite."""
    encoder = Encoder(config_of())
    with torch.no_grad():
        encoder.layers[-1].weight.mul_(1e6)  # type: ignore[union-attr,operator]
    mu, logvar = encoder(torch.rand(4, 3, 32, 32))
    assert 9.9 < logvar.abs().max() <= LOGVAR_BOUND == 10
    assert mu.abs().max() > 1e3  # only the log-variance is bounded
    likelihood.kl(mu * 0, logvar).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in encoder.parameters())


# --- the default network


def test_residual_block_begins_as_the_identity() -> None:
    x = torch.randn(2, 8, 5, 5)
    block = Residual(8)
    assert torch.equal(block(x), x)
    with torch.no_grad():
        block.second.weight.normal_()
    assert (block(x) - x).abs().min() > 0


@pytest.mark.parametrize("name", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("latent_size", LATENT_SIZES)
def test_first_pictures_are_flat_grey(name: str, latent_size: int) -> None:
    torch.manual_seed(0)
    model = VAE(ModelConfig(image_size=64, latent_size=latent_size, likelihood=name))
    pictures = model.decode_mean(torch.randn(8, *model.latent_shape))
    assert (pictures - 0.5).abs().max() < 0.05
    assert pictures.std() > 0  # of weights of 0 the gradients in front of them would be 0


@pytest.mark.parametrize(
    ("channel", "colour"),
    [
        (0, [1 / math.sqrt(3)] * 3),
        (1, [0.5 / math.sqrt(2), 0, -0.5 / math.sqrt(2)]),
        (2, [0.5 / math.sqrt(6), -1 / math.sqrt(6), 0.5 / math.sqrt(6)]),
    ],
)
def test_outputs_are_brightness_red_against_blue_and_green_against_magenta(channel: int, colour: list[float]) -> None:
    decoder = VAE(config_of()).decoder
    last = [m for m in decoder.modules() if isinstance(m, nn.Conv2d)][-1]
    assert last.bias is not None
    with torch.no_grad():
        last.weight.zero_()
        last.bias[4 * channel : 4 * channel + 4] = 1  # of the four pixels that one pixel is shuffled into
    outputs = decoder(torch.randn(1, 3, 4, 4))
    torch.testing.assert_close(outputs, torch.tensor(colour)[:, None, None].expand(1, 3, 32, 32), rtol=0, atol=1e-6)


def test_image_does_not_depend_on_its_batch_mates() -> None:
    torch.manual_seed(0)
    model = randomised(VAE(config_of())).train()
    assert set(dict(model.named_buffers())) == {"decoder.to_rgb"}  # a constant
    x, noise = torch.rand(5, 3, 32, 32), torch.randn(2, 5, 3, 4, 4)
    together = model(x, noise)
    for b in range(5):
        alone = model(x[b : b + 1], noise[:, b : b + 1])
        torch.testing.assert_close(together[0][:, b], alone[0][:, 0], rtol=1e-5, atol=1e-5)
        for whole, one in zip(together[1:], alone[1:], strict=True):
            torch.testing.assert_close(whole[b], one[0], rtol=1e-5, atol=1e-5)


def test_gradient_of_a_batch_is_the_mean_of_the_gradients_of_its_images() -> None:
    torch.manual_seed(0)
    model = randomised(VAE(config_of()))
    x, noise = torch.rand(5, 3, 32, 32), torch.randn(2, 5, 3, 4, 4)

    def gradients(b: slice) -> list[Tensor]:
        outputs, mu, logvar = model(x[b], noise[:, b])
        errors = likelihood.squared_errors("gaussian", outputs, x[b])
        loss = (likelihood.gaussian(errors, 0.1, 3 * 32**2) + likelihood.kl(mu, logvar)).mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    alone = zip(*(gradients(slice(b, b + 1)) for b in range(5)), strict=True)
    for whole, each in zip(gradients(slice(None)), alone, strict=True):
        mean = torch.stack(each).mean(dim=0)
        assert (whole - mean).norm() <= 1e-5 * mean.norm()
        assert mean.norm() > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_without_images_has_outputs_and_gradients_of_its_shape(architecture: str) -> None:
    """A rank has no image of a last batch that is smaller than the number of ranks."""
    model = VAE(config_of(architecture=architecture)).eval()
    outputs, mu, _ = model(torch.rand(0, 3, 32, 32), torch.randn(2, 0, 3, 4, 4))
    assert (outputs.shape, mu.shape) == ((2, 0, 3, 32, 32), (0, 3, 4, 4))
    outputs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.decoder.parameters())


# --- posterior samples


@pytest.mark.parametrize(("samples", "architecture"), [(1, "default"), (3, "default"), (3, "notebook")])
def test_samples_are_mu_plus_sigma_times_noise_and_decoded_independently(samples: int, architecture: str) -> None:
    torch.manual_seed(0)
    model = randomised(VAE(config_of(architecture=architecture))).eval()
    x, noise = torch.rand(2, 3, 32, 32), torch.randn(samples, 2, 3, 4, 4)
    outputs, mu, logvar = model(x, noise)
    assert torch.equal(mu, model.encoder(x)[0])
    assert torch.equal(logvar, model.encoder(x)[1])
    for s, b in itertools.product(range(samples), range(2)):
        z = mu[b : b + 1] + logvar[b : b + 1].exp().sqrt() * noise[s, b : b + 1]
        torch.testing.assert_close(outputs[s, b], model.decoder(z)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs, model(x, noise)[0])  # no random numbers are drawn inside


def test_decode_mean_is_the_mean_of_the_likelihood() -> None:
    torch.manual_seed(0)
    z = 3 * torch.randn(2, 3, 4, 4)
    model = randomised(VAE(config_of(likelihood="bernoulli"))).eval()
    assert torch.equal(model.decode_mean(z), torch.sigmoid(model.decoder(z)))
    model = randomised(VAE(config_of(likelihood="gaussian"))).eval()
    assert torch.equal(model.decode_mean(z), (model.decoder(z) + 0.5).clip(0, 1))


# --- the notebook


class Notebook(NotebookVAE):
    """The notebook's network and loss, which are not our code. The noise of its posterior samples is given."""

    def copy_from(self, model: VAE) -> None:
        """Take the weights and statistics of our model, which are in the same order. None may be left over."""
        with torch.no_grad():
            for name in ("encoder", "decoder"):
                ours, theirs = getattr(model, name).state_dict(), getattr(self, name).state_dict()
                for a, b in zip(ours.values(), theirs.values(), strict=True):
                    assert a.shape == b.shape
                    b.copy_(a)

    def loss(self, x: Tensor, noises: list[Tensor], in_one_batch: bool = False) -> Tensor:
        parameters = self.encoder(x)
        mu, logvar = parameters[:, : self.latent_dim], parameters[:, self.latent_dim :]
        samples = [noise * (logvar * 0.5).exp() + mu for noise in noises]
        if in_one_batch:  # unlike the notebook: all samples share the statistics of one batch
            decoded = list(self.decode(torch.cat(samples)).chunk(len(samples)))
        else:
            decoded = [self.decode(z) for z in samples]
        return self.loss_function(decoded, x, mu, logvar)


FULL = 6  # images of a full batch


def step_both(
    samples: int, n: int, train_mode: bool, width: int = 8, in_one_batch: bool = False
) -> tuple[Trainer, Notebook, float]:
    """A step of our trainer and a backward pass of the notebook, from the same weights, images and noise.

    Returns both with their gradients, and the notebook's loss. The loss of the trainer is in its `sums`.
    """
    config = Config.make(
        preset="notebook", batch_size=FULL, samples=samples, augment=False, precision="fp32", width=width,
        latent_dim=5, seed=3,
    )  # fmt: skip
    trainer = Trainer(config, CPU)
    randomised(trainer.model)
    notebook = Notebook(5, samples, FULL, width)
    notebook.copy_from(trainer.model)
    trainer.model.train(train_mode)
    notebook.train(train_mode)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, 64, 64), np.uint8))
    generator = torch.Generator().manual_seed(rng.seed(Stream.POSTERIOR, 3, 1, 2))  # keyed by (seed, epoch, step)
    noise = torch.randn((samples, n, 5, 4, 4), generator=generator)
    value = notebook.loss(images.float() / 255, list(noise), in_one_batch)
    value.backward()
    trainer.step(images, n, epoch=1, step=2, steps=4)
    return trainer, notebook, float(value.detach())


def largest_difference(trainer: Trainer, notebook: Notebook) -> float:
    """The largest difference of any gradient, relative to its norm."""
    ours = [p.grad for p in trainer.model.parameters()]
    theirs = [p.grad for p in [*notebook.encoder.parameters(), *notebook.decoder.parameters()]]
    assert len(ours) == len(theirs) == 6 + 4 + 4 + 8 + 2 - 1
    differences = []
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        assert b is not None
        assert b.norm() > 0
        differences.append(float((a - b).norm() / b.norm()))
    return max(differences)


@pytest.mark.parametrize(
    ("samples", "n", "train_mode", "width"),
    [(1, FULL, True, 8), (1, 2, True, 8), (3, FULL, True, 8), (3, FULL, False, 8), (3, 2, False, 8), (1, 2, True, 64)],
)
def test_notebook_preset_has_the_loss_gradients_and_statistics_of_the_notebook(
    samples: int, n: int, train_mode: bool, width: int
) -> None:
    """Also for a short batch, which divides its cross-entropy by its own pixels, but its KL by those of a full one."""
    trainer, notebook, value = step_both(samples, n, train_mode, width)
    _, _, reconstruction, kl, _, skipped = trainer.sums.over_ranks()
    assert skipped == 0
    assert float(VAETask(trainer.config, CPU)._objective(reconstruction, kl, 1.0, n)) == pytest.approx(value, rel=1e-5)
    assert largest_difference(trainer, notebook) < 1e-5
    for a, b in zip(trainer.model.buffers(), [*notebook.encoder.buffers(), *notebook.decoder.buffers()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_notebook_preset_does_not_share_batch_statistics_between_samples() -> None:
    trainer, notebook, _ = step_both(samples=3, n=FULL, train_mode=True, in_one_batch=True)
    assert largest_difference(trainer, notebook) > 1e-3
