"""The network: shapes, normalisation, posterior samples, and gradients equal to those of the reference notebook."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import ContinuousBernoulli

from dogvae import rng
from dogvae.config import Config, ModelConfig
from dogvae.network import likelihood
from dogvae.network.vae import LOGVAR_BOUND, VAE, Encoder
from dogvae.rng import Stream
from dogvae.training.step import Trainer
from peers import NotebookVAE

CPU = torch.device("cpu")


def config_of(**settings: object) -> ModelConfig:
    return ModelConfig(**{"image_size": 32, "width": 8, "latent_dim": 3, "norm": "group", **settings})


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


@pytest.mark.parametrize(
    ("architecture", "norm", "size"),
    list(itertools.product(["default", "notebook"], ["group", "batch"], [32, 64, 128])),
)
def test_shapes(architecture: str, norm: str, size: int) -> None:
    model = VAE(config_of(architecture=architecture, norm=norm, image_size=size))
    assert model.latent_shape == (3, 4, 4)
    logits, mu, logvar = model(torch.rand(2, 3, size, size), torch.randn(5, 2, 3, 4, 4))
    assert logits.shape == (5, 2, 3, size, size)
    assert mu.shape == logvar.shape == (2, 3, 4, 4)
    assert mu.dtype == logvar.dtype == torch.float32
    assert model.decode_mean(mu).shape == (2, 3, size, size)
    kinds = {type(module) for module in model.modules()}
    assert (nn.GroupNorm in kinds) == (norm == "group")
    assert any(issubclass(kind, nn.BatchNorm2d) for kind in kinds) == (norm == "batch")


@pytest.mark.parametrize(("size", "widths"), [(32, [8, 16, 32]), (64, [8, 16, 32, 64]), (128, [8, 16, 32, 64, 64])])
def test_widths_double_up_to_eight_times(size: int, widths: list[int]) -> None:
    model = VAE(config_of(image_size=size))
    encoder = [m.out_channels for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
    decoder = [m.out_channels for m in model.decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert encoder == [*widths, 6]
    assert decoder == [*reversed(widths), 3]


def test_group_norm_works_with_every_width_and_has_groups_of_eight_channels() -> None:
    with torch.device("meta"):  # shapes only: the largest network would fill gigabytes
        models = {width: VAE(config_of(width=width, image_size=32)) for width in range(4, 513)}
    groups = {width: [m for m in models[width].modules() if isinstance(m, nn.GroupNorm)] for width in (4, 32)}
    assert all(m.num_channels == 8 * m.num_groups for m in groups[32])
    assert all(m.num_groups == 1 for m in groups[4] if m.num_channels < 16)


def test_only_the_gaussian_learns_a_scale() -> None:
    for name in ("bernoulli", "continuous-bernoulli"):
        assert VAE(config_of(likelihood=name)).log_scale is None
    assert "log_scale" in dict(VAE(config_of(likelihood="gaussian")).named_parameters())


def test_log_variance_is_bounded() -> None:
    """With huge weights in the last layer the KL and its gradients stay finite."""
    encoder = Encoder(ModelConfig(image_size=32, width=8, latent_dim=4))
    with torch.no_grad():
        encoder.layers[-1].weight.mul_(1e6)  # type: ignore[union-attr,operator]
    mu, logvar = encoder(torch.rand(4, 3, 32, 32))
    assert 9.9 < logvar.abs().max() <= LOGVAR_BOUND == 10
    assert mu.abs().max() > 1e3  # only the log-variance is bounded
    likelihood.kl(mu * 0, logvar).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in encoder.parameters())


@pytest.mark.parametrize(("samples", "norm"), [(1, "group"), (3, "group"), (3, "batch")])
def test_samples_are_mu_plus_sigma_times_noise_and_decoded_independently(samples: int, norm: str) -> None:
    torch.manual_seed(0)
    model = randomised(VAE(config_of(norm=norm))).eval()
    x, noise = torch.rand(2, 3, 32, 32), torch.randn(samples, 2, 3, 4, 4)
    logits, mu, logvar = model(x, noise)
    assert torch.equal(mu, model.encoder(x)[0])
    assert torch.equal(logvar, model.encoder(x)[1])
    for s, b in itertools.product(range(samples), range(2)):
        z = mu[b : b + 1] + logvar[b : b + 1].exp().sqrt() * noise[s, b : b + 1]
        torch.testing.assert_close(logits[s, b], model.decoder(z)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, model(x, noise)[0])  # no random numbers are drawn inside


def test_decode_mean_is_the_mean_of_the_likelihood() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 3, 4, 4)
    model = randomised(VAE(config_of())).eval()
    assert torch.equal(model.decode_mean(z), torch.sigmoid(model.decoder(z)))
    model = randomised(VAE(config_of(likelihood="continuous-bernoulli"))).eval()
    bounded = 1000 * torch.tanh(model.decoder(z).double() / 1000)  # in float32 the mean of torch loses its digits
    expected = ContinuousBernoulli(logits=bounded).mean
    torch.testing.assert_close(model.decode_mean(z).double(), expected, rtol=0, atol=3e-5)


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
    assert float(trainer._objective(reconstruction, kl, 1.0, n)) == pytest.approx(value, rel=1e-5)
    assert largest_difference(trainer, notebook) < 1e-5
    for a, b in zip(trainer.model.buffers(), [*notebook.encoder.buffers(), *notebook.decoder.buffers()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_notebook_preset_does_not_share_batch_statistics_between_samples() -> None:
    trainer, notebook, _ = step_both(samples=3, n=FULL, train_mode=True, in_one_batch=True)
    assert largest_difference(trainer, notebook) > 1e-3
