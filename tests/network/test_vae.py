"""The network: its shapes, its folded samples, and that the notebook's is the notebook's, gradients included."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dogvae import rng
from dogvae.config import Config, ModelConfig
from dogvae.network.vae import VAE
from dogvae.rng import Stream
from dogvae.training.step import Trainer

CPU = torch.device("cpu")


def config_of(**settings: object) -> ModelConfig:
    return ModelConfig(**{"image_size": 32, "width": 8, "latent_dim": 3, "norm": "group", **settings})


# --- shapes


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


def test_widths_double_up_to_eight_times() -> None:
    for size, widths in ((32, [8, 16, 32]), (64, [8, 16, 32, 64]), (128, [8, 16, 32, 64, 64])):
        model = VAE(config_of(image_size=size))
        encoder = [m.out_channels for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
        decoder = [m.out_channels for m in model.decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
        assert encoder == [*widths, 6]
        assert decoder == [*reversed(widths), 3]


def test_every_width_can_be_normalised() -> None:
    with torch.device("meta"):  # shapes only: the largest would fill gigabytes
        for width in range(4, 513):
            VAE(config_of(width=width, image_size=32))


def test_groups_have_eight_channels() -> None:
    groups = [m for m in VAE(config_of(width=32)).modules() if isinstance(m, nn.GroupNorm)]
    assert groups
    assert all(m.num_channels == 8 * m.num_groups for m in groups)
    assert all(
        m.num_groups == 1
        for m in VAE(config_of(width=4)).modules()
        if isinstance(m, nn.GroupNorm)
        if m.num_channels < 16
    )


def test_only_the_gaussian_learns_a_scale() -> None:
    for likelihood in ("bernoulli", "continuous-bernoulli"):
        assert VAE(config_of(likelihood=likelihood)).log_scale is None
    assert "log_scale" in dict(VAE(config_of(likelihood="gaussian")).named_parameters())


# --- samples


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(["group", "batch"]))
def test_folded_samples_are_each_decoded_alone(samples: int, batch: int, norm: str) -> None:
    torch.manual_seed(0)
    model = awake(VAE(config_of(norm=norm))).eval()
    z = torch.randn(samples, batch, 3, 4, 4)
    folded = model.decode_samples(z)
    for s in range(samples):
        torch.testing.assert_close(folded[s], model.decoder(z[s]), rtol=1e-4, atol=1e-5)
        for b in range(batch):
            torch.testing.assert_close(folded[s, b], model.decoder(z[s, b : b + 1])[0], rtol=1e-4, atol=1e-5)


def test_reparameterisation() -> None:
    """z = mu + sigma * noise, the same mu and sigma for all samples of an image."""
    torch.manual_seed(0)
    model = awake(VAE(config_of())).eval()
    x, noise = torch.rand(2, 3, 32, 32), torch.randn(3, 2, 3, 4, 4)
    logits, mu, logvar = model(x, noise)
    again = model.encoder(x)
    assert torch.equal(mu, again[0])
    assert torch.equal(logvar, again[1])
    for s in range(3):
        z = mu + logvar.exp().sqrt() * noise[s]
        torch.testing.assert_close(logits[s], model.decoder(z), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, model(x, noise)[0])  # nothing is drawn inside


def test_decode_mean_is_the_likelihoods() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 3, 4, 4)
    model = awake(VAE(config_of())).eval()
    assert torch.equal(model.decode_mean(z), torch.sigmoid(model.decoder(z)))
    model = awake(VAE(config_of(likelihood="continuous-bernoulli"))).eval()
    bounded = 1000 * torch.tanh(model.decoder(z).double() / 1000)  # torch's own mean loses its digits in fp32
    expected = torch.distributions.ContinuousBernoulli(logits=bounded).mean
    torch.testing.assert_close(model.decode_mean(z).double(), expected, rtol=0, atol=3e-5)


def awake(model: VAE) -> VAE:
    """With all weights random, also those that start at 0, and statistics that differ from mean 0 and variance 1."""
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


# --- the notebook


class Notebook(nn.Module):
    """The reference notebook's network and loss, written from the notebook and not from our code.

    Probabilities instead of logits, one decoding per posterior sample, and a KL that is divided by the pixels of a
    full batch whatever the batch.
    """

    def __init__(self, width: int, latent_dim: int, batch_size: int) -> None:
        super().__init__()
        w = width
        self.latent_dim, self.batch_size = latent_dim, batch_size
        self.encoder = nn.Sequential(
            nn.Conv2d(3, w, 4, 2, 2, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(w, 2 * w, 4, 2, 2, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 2, bias=False),
            nn.BatchNorm2d(4 * w),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * w, 8 * w, 4, 2, 2, bias=False),
            nn.BatchNorm2d(8 * w),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8 * w, 2 * latent_dim, 4, 1, 1, bias=False),
            nn.LeakyReLU(0.2),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(latent_dim, 8 * w, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8 * w),
            nn.ReLU(),
            nn.ConvTranspose2d(8 * w, 4 * w, 4, 2, 1, bias=False),
            nn.BatchNorm2d(4 * w),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * w),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * w, w, 4, 2, 1, bias=False),
            nn.BatchNorm2d(w),
            nn.ReLU(),
            nn.ConvTranspose2d(w, 3, 3, 1, 1),
            nn.Sigmoid(),
        )

    def take(self, model: VAE) -> None:
        """Our weights and statistics, which are in the same order; nothing may be left over on either side."""
        with torch.no_grad():
            for name in ("encoder", "decoder"):
                ours, theirs = getattr(model, name).state_dict(), getattr(self, name).state_dict()
                for a, b in zip(ours.values(), theirs.values(), strict=True):
                    assert a.shape == b.shape
                    b.copy_(a)

    def loss(self, x: Tensor, noises: list[Tensor], folded: bool = False) -> Tensor:
        parameters = self.encoder(x)
        mu, logvar = parameters[:, : self.latent_dim], parameters[:, self.latent_dim :]
        samples = [noise * (logvar * 0.5).exp() + mu for noise in noises]
        if folded:  # not the notebook: all samples share the statistics of one batch
            decoded = list(self.decoder(torch.cat(samples)).chunk(len(samples)))
        else:
            decoded = [self.decoder(z) for z in samples]
        bce = torch.zeros(())
        for recon in decoded:
            bce = bce + F.binary_cross_entropy(recon.reshape(-1, 3 * 64 * 64), x.reshape(-1, 3 * 64 * 64))
        bce = bce / len(samples)
        kld = -0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp())
        return bce + kld / (self.batch_size * 3 * 64 * 64)


FULL = 6  # images of a full batch


def both(
    samples: int, n: int, train_mode: bool, folded: bool = False, width: int = 8
) -> tuple[Trainer, Notebook, float]:
    """One step of our trainer and one backward pass of the notebook, from the same weights, images and noise.

    Returns both, their gradients still in place, and the notebook's loss; the trainer's is in `sums`.
    """
    config = Config.make(
        preset="notebook",
        batch_size=FULL,
        samples=samples,
        augment=False,
        precision="fp32",
        width=width,
        latent_dim=5,
        seed=3,
    )
    trainer = Trainer(config, CPU)
    awake(trainer.model)
    notebook = Notebook(width, 5, FULL)
    notebook.take(trainer.model)
    trainer.model.train(train_mode)
    notebook.train(train_mode)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, 64, 64), np.uint8))

    # The trainer's documented draw: standard normal from a generator keyed by (seed, epoch, step).
    generator = torch.Generator().manual_seed(rng.seed(Stream.POSTERIOR, 3, 1, 2))
    noise = torch.randn((samples, n, 5, 4, 4), generator=generator)
    value = notebook.loss(images.float() / 255, list(noise), folded)
    value.backward()
    trainer.step(images, n, epoch=1, step=2, steps=4)
    return trainer, notebook, float(value.detach())


def our_loss(trainer: Trainer, n: int) -> float:
    """The objective of the trainer's only step, through its own scaling of the sums it keeps."""
    _, _, reconstruction, kl, _, skipped = trainer.sums.over_ranks()
    assert skipped == 0
    return float(trainer._objective(reconstruction, kl, 1.0, n))


def largest_difference(trainer: Trainer, notebook: Notebook) -> float:
    """Of all gradients, relative to the norm of each."""
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


@pytest.mark.parametrize("n", [FULL, 2])
def test_notebook_with_one_sample(n: int) -> None:
    """Training mode. A short batch divides its cross-entropy by its own pixels, and its KL by a full batch's."""
    trainer, notebook, value = both(samples=1, n=n, train_mode=True)
    assert our_loss(trainer, n) == pytest.approx(value, rel=1e-5)
    assert largest_difference(trainer, notebook) < 1e-5


@pytest.mark.parametrize("n", [FULL, 2])
def test_notebook_with_three_samples(n: int) -> None:
    """With fixed statistics, as in evaluation mode: the notebook's loop over samples and our one batch agree."""
    trainer, notebook, value = both(samples=3, n=n, train_mode=False)
    assert our_loss(trainer, n) == pytest.approx(value, rel=1e-5)
    assert largest_difference(trainer, notebook) < 1e-5


def test_notebook_at_full_width() -> None:
    trainer, notebook, value = both(samples=1, n=2, train_mode=True, width=64)
    assert our_loss(trainer, 2) == pytest.approx(value, rel=1e-5)
    assert largest_difference(trainer, notebook) < 1e-5


def test_notebook_with_three_samples_in_training() -> None:
    """Its batch norm sees the samples one after another; ours decodes them in one call, but in as many groups."""
    trainer, notebook, value = both(samples=3, n=FULL, train_mode=True)
    assert our_loss(trainer, FULL) == pytest.approx(value, rel=1e-5)
    assert largest_difference(trainer, notebook) < 1e-5
    for a, b in zip(trainer.model.buffers(), [*notebook.encoder.buffers(), *notebook.decoder.buffers()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    _, notebook, _ = both(samples=3, n=FULL, train_mode=True, folded=True)  # one batch of all three is something else
    assert largest_difference(trainer, notebook) > 1e-3


def test_notebook_statistics_after_a_step() -> None:
    """With one sample, the running statistics that evaluation will use are the notebook's as well."""
    trainer, notebook, _ = both(samples=1, n=FULL, train_mode=True)
    theirs = [*notebook.encoder.buffers(), *notebook.decoder.buffers()]
    for a, b in zip(trainer.model.buffers(), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
