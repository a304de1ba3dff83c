"""Playing with an exported model: what comes out against plain numpy, and what is refused with one line."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

import dogvae
from dogvae.config import ModelConfig
from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from dogvae.inference.model import METHODS, PRIORS, DogVAE, load
from dogvae.network.vae import VAE
from tests.support.command import ROOT
from tests.support.exports import D, export_of_drawn_dogs
from tests.support.runs import SIZE


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Dataset and export."""
    return export_of_drawn_dogs(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def model(exported: tuple[Path, Path]) -> DogVAE:
    return load(exported[1], "cpu")


@pytest.fixture(scope="module")
def dogs(exported: tuple[Path, Path]) -> np.ndarray:
    """All training images, (100, 32, 32, 3) uint8."""
    train = Dataset(exported[0]).train
    return train.gather(np.arange(len(train))).numpy().transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def latents(model: DogVAE, dogs: np.ndarray) -> np.ndarray:
    """Of all training images, (100, 2, 4, 4)."""
    return model.encode(dogs)


@pytest.fixture
def damaged(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the export, to be damaged."""
    return shutil.copytree(exported[1], tmp_path / "export")


def by_hand(k: int = 3) -> DogVAE:
    """A model whose priors are known: a mixture of `k` Gaussians, far apart, and another Gaussian; 16 dimensions."""
    torch.manual_seed(0)
    small = VAE(ModelConfig(width=4, latent_dim=1, image_size=32))
    d = 16

    def factors(n: int) -> Tensor:
        loose = torch.randn(n, d, 3 * d)
        return torch.linalg.cholesky(loose @ loose.mT / (3 * d))

    weights = torch.arange(1.0, k + 1)
    prior = {
        "mixture.weights": weights / weights.sum(),
        "mixture.means": 4 * torch.randn(k, d),
        "mixture.factors": factors(k),
        "gaussian.weights": torch.ones(1),
        "gaussian.means": torch.randn(1, d),
        "gaussian.factors": factors(1),
        "directions": torch.eye(2, d),
        "scales": torch.ones(2),
    }
    return DogVAE(small, torch.device("cpu"), {}, prior)


def distribution(model: DogVAE, prior: str) -> torch.distributions.Distribution:
    """The same prior by torch's own code."""
    mixture = model._priors[prior].double()
    gaussians = MultivariateNormal(mixture.means, scale_tril=mixture.factors, validate_args=False)
    return MixtureSameFamily(Categorical(mixture.weights), gaussians)


# --- loading


def refused(folder: Path) -> str:
    """The one line that loading it ends with, which must name the folder."""
    with pytest.raises(UsageError) as error:
        load(folder, "cpu")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


def rewrite(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def replace(folder: Path, name: str, data: bytes) -> Path:
    """Another file, of which config.json knows the checksum: as if we had written it so, or an attacker."""
    (folder / name).write_bytes(data)
    files = json.loads((folder / "config.json").read_text())["files"]
    return rewrite(folder, files={**files, name: hashlib.sha256(data).hexdigest()})


def test_loading_what_export_wrote(exported: tuple[Path, Path]) -> None:
    model = dogvae.load(str(exported[1]))
    assert model.size == SIZE
    assert model.latent_shape == (2, 4, 4)
    assert model.about["dataset_fingerprint"] == Dataset(exported[0]).fingerprint
    assert not model.model.training
    weights = safetensors.torch.load_file(exported[1] / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.model.state_dict().items())


def test_no_export_there(exported: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path, exported[1].parent, exported[1] / "config.json"):
        assert "is no exported model" in refused(folder)
        assert "RUN/export" in refused(folder)


@pytest.mark.parametrize("data", [b"", b"not json", b'{"format": "dogvae-export"', b"\xff\xfe\x00"])
def test_config_that_is_no_json(data: bytes, damaged: Path) -> None:
    (damaged / "config.json").write_bytes(data)
    assert "is no exported model" in refused(damaged)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"dogvae-export"', "{}", '{"format": "dogvae-dataset"}'])
def test_config_of_something_else(text: str, damaged: Path) -> None:
    (damaged / "config.json").write_text(text)
    assert "is no exported model" in refused(damaged)


@pytest.mark.parametrize(("version", "remedy"), [(1, "export it again: dogvae export RUN"), (3, "newer dogvae")])
def test_other_versions(version: int, remedy: str, damaged: Path) -> None:
    message = refused(rewrite(damaged, version=version))
    assert f"version {version}, this dogvae reads 2" in message
    assert remedy in message


@pytest.mark.parametrize("version", ["2", None, [2]])
def test_versions_that_are_no_numbers(version: Any, damaged: Path) -> None:
    assert "format version" in refused(rewrite(damaged, version=version))


@pytest.mark.parametrize("name", ["model.safetensors", "prior.safetensors"])
def test_a_flipped_bit(name: str, damaged: Path) -> None:
    data = bytearray((damaged / name).read_bytes())
    for place in (0, 20, len(data) // 2, -1):
        data[place] ^= 1
        (damaged / name).write_bytes(data)
        assert f"{name} is damaged: it is not what was exported" in refused(damaged)
        data[place] ^= 1
    (damaged / name).write_bytes(data)
    load(damaged, "cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "prior.safetensors"])
def test_a_truncated_or_missing_file(name: str, damaged: Path) -> None:
    (damaged / name).write_bytes((damaged / name).read_bytes()[:-1])
    assert f"{name} is damaged" in refused(damaged)
    (damaged / name).unlink()
    assert name in refused(damaged)
    (damaged / name).mkdir()
    assert name in refused(damaged)


@pytest.mark.parametrize("name", ["model.safetensors", "prior.safetensors"])
def test_nothing_is_executed(name: str, damaged: Path) -> None:
    """A pickle in place of the tensors, with the right checksum, is not opened."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (damaged / "executed",)

    trap = pickle.dumps(Trap())
    pickle.loads(trap)
    (damaged / "executed").unlink()
    assert "is damaged" in refused(replace(damaged, name, trap))
    assert not (damaged / "executed").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": []},
        {"model": {"colour": "brown"}},
        {"files": None},
        {"files": ["model.safetensors"]},
        {"files": {"model.safetensors": 5}},
    ],
)
def test_config_of_the_wrong_types(changes: dict[str, Any], damaged: Path) -> None:
    assert "is damaged" in refused(rewrite(damaged, **changes))


@pytest.mark.parametrize("setting", [{"width": "wide"}, {"width": 3}, {"image_size": 33}, {"norm": "none"}])
def test_settings_that_no_model_has(setting: dict[str, Any], damaged: Path) -> None:
    model = json.loads((damaged / "config.json").read_text())["model"]
    assert "is damaged" in refused(rewrite(damaged, model={**model, **setting}))


def test_config_without_parts(damaged: Path) -> None:
    about = json.loads((damaged / "config.json").read_text())
    for name in ("model", "files"):
        (damaged / "config.json").write_text(json.dumps({k: v for k, v in about.items() if k != name}))
        assert name in refused(damaged)


def test_weights_of_another_model(damaged: Path) -> None:
    model = json.loads((damaged / "config.json").read_text())["model"]
    for setting in ({"width": 8}, {"latent_dim": 3}, {"norm": "group"}, {"image_size": 64}, {"likelihood": "gaussian"}):
        assert "is damaged" in refused(rewrite(damaged, model={**model, **setting}))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mixture.means", (1, D + 16)),
        ("mixture.factors", (1, D, D + 1)),
        ("gaussian.means", (1, D - 1)),
        ("gaussian.factors", (1, 16, 16)),
        ("directions", (32, D + 1)),
        ("scales", (31,)),
    ],
)
def test_prior_of_another_model(name: str, shape: tuple[int, ...], damaged: Path) -> None:
    prior = safetensors.torch.load((damaged / "prior.safetensors").read_bytes())
    changed = safetensors.torch.save({**prior, name: torch.ones(shape)})
    assert "another model's" in refused(replace(damaged, "prior.safetensors", changed))


def test_prior_without_parts(damaged: Path) -> None:
    prior = safetensors.torch.load((damaged / "prior.safetensors").read_bytes())
    for name in prior:
        rest = safetensors.torch.save({k: v for k, v in prior.items() if k != name})
        assert name in refused(replace(damaged, "prior.safetensors", rest))


@pytest.mark.parametrize("name", ["mixture.weights", "mixture.factors"])
def test_prior_whose_parts_disagree(name: str, damaged: Path) -> None:
    prior = safetensors.torch.load((damaged / "prior.safetensors").read_bytes())
    changed = safetensors.torch.save({**prior, name: prior[name].repeat(2, *[1] * (prior[name].ndim - 1))})
    assert "is damaged" in refused(replace(damaged, "prior.safetensors", changed))


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:-1", "cpu:x", "mps"])
def test_devices_that_are_none(device: str, exported: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=f"^--device: {device} ") as error:
        load(exported[1], device)
    assert "\n" not in str(error.value)


def test_a_gpu_where_there_is_none(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(UsageError, match=r"^--device: cuda.* say cpu"):
            load(exported[1], device)
    assert load(exported[1]).device == torch.device("cpu")


def test_a_loaded_model_does_not_look_at_its_files_again(damaged: Path) -> None:
    """Or a copy over them while a playground runs would change its dogs, and a shorter file end it by SIGBUS."""
    model = load(damaged, "cpu")
    file = damaged / "prior.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert model.sample_latents(1, prior="gaussian", temperature=0).any()


# --- what is known of the training images


def test_mean_directions_and_scales(model: DogVAE, latents: np.ndarray) -> None:
    flat = latents.reshape(len(latents), D).astype(np.float64)
    assert model.mean.ravel() == pytest.approx(flat.mean(axis=0), abs=1e-4)
    directions = model.directions.reshape(-1, D)
    assert len(directions) == len(model.scales) == 32
    assert directions @ directions.T == pytest.approx(np.eye(32), abs=1e-5)
    assert (flat @ directions.T).std(axis=0) == pytest.approx(model.scales, abs=1e-4)
    assert (np.diff(model.scales) <= 0).all()
    assert model.scales[0] > 2 * model.scales[15] > 0


def test_gaussian_prior_has_the_moments_of_the_posteriors(model: DogVAE, dogs: np.ndarray, latents: np.ndarray) -> None:
    with torch.no_grad():
        logvar = model.model.encoder(torch.from_numpy(dogs.transpose(0, 3, 1, 2).copy()).float() / 255)[1]
    variance = latents.reshape(-1, D).var(axis=0) + logvar.exp().flatten(1).mean(dim=0).numpy()
    n = 256 * 20
    drawn = model.sample_latents(n, prior="gaussian").reshape(n, D)
    assert drawn.mean(axis=0) == pytest.approx(latents.reshape(-1, D).mean(axis=0), abs=5 * math.sqrt(3 / n))
    assert drawn.var(axis=0) == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


# --- sampling


@pytest.mark.parametrize("prior", PRIORS)
def test_fewer_are_the_first_of_more(prior: str) -> None:
    """Also beyond the 256 that are drawn at once."""
    model = by_hand()
    many = model.sample_latents(300, seed=3, prior=prior)
    assert many.shape == (300, 1, 4, 4)
    assert many.dtype == np.float32
    for n in (1, 5, 255, 256, 257):
        assert np.array_equal(model.sample_latents(n, seed=3, prior=prior), many[:n])
    assert len(np.unique(many, axis=0)) == 300
    other = model.sample_latents(300, seed=4, prior=prior)
    assert not (other == many).all(axis=(1, 2, 3)).any()


def test_the_same_seed_gives_the_same_dogs(model: DogVAE, exported: tuple[Path, Path]) -> None:
    state = torch.get_rng_state()
    many = model.sample(64, seed=5)
    assert many.shape == (64, SIZE, SIZE, 3)
    assert many.dtype == np.uint8
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(load(exported[1]).sample(5, seed=5), many[:5])
    assert np.array_equal(model.sample(5), model.sample(5, seed=0))
    for seed in (0, 6, 2**70):
        different = np.abs(model.sample(5, seed=seed).astype(int) - many[:5])
        assert different.mean(axis=(1, 2, 3)).min() > 1
    # They are not all grey, nor all the same dog.
    assert many.std(axis=0).mean() > 5


def test_samples_are_the_decoded_latents_in_batches(model: DogVAE) -> None:
    batches = list(model.samples(260, seed=1, temperature=0.7, prior="normal"))
    assert [len(b) for b in batches] == [256, 4]
    whole = model.sample(260, 1, 0.7, "normal")
    assert np.array_equal(np.concatenate(batches), whole)
    latents = model.sample_latents(260, 1, 0.7, "normal")
    assert np.array_equal(model.decode(latents[250:]), whole[250:])


def test_latents_of_the_normal_prior() -> None:
    n = 256 * 20
    z = by_hand().sample_latents(n, prior="normal").reshape(n, 16)
    assert np.abs(z.mean(axis=0)).max() < 5 / math.sqrt(n)
    assert np.abs(np.cov(z.T) - np.eye(16)).max() < 5 * math.sqrt(2 / n)
    # Neighbours in the stream, and the same places of two batches, have nothing to do with each other.
    for lag in (1, 256):
        assert abs(np.mean(z[lag:] * z[:-lag])) < 5 / math.sqrt(z.size)


@pytest.mark.parametrize("prior", ["gaussian", "mixture"])
def test_latents_of_the_fitted_priors(prior: str) -> None:
    model, n = by_hand(), 256 * 20
    z = model.sample_latents(n, prior=prior).reshape(n, 16).astype(np.float64)
    parts = model._priors[prior].double()
    w, m = parts.weights.numpy(), parts.means.numpy()
    covariances = (parts.factors @ parts.factors.mT).numpy()
    labels = np.linalg.norm(z[:, None] - m, axis=2).argmin(axis=1)
    for k in range(len(w)):
        share = (labels == k).mean()
        assert share == pytest.approx(w[k], abs=5 * math.sqrt(w[k] * (1 - w[k]) / n) + 1e-12)
        white = np.linalg.solve(np.linalg.cholesky(covariances[k]), (z[labels == k] - m[k]).T)
        tolerance = 5 * math.sqrt(2 / (labels == k).sum())
        assert np.abs(white.mean(axis=1)).max() < tolerance
        assert np.abs(np.cov(white) - np.eye(16)).max() < tolerance


@pytest.mark.parametrize("prior", PRIORS)
def test_temperature_scales_what_is_around_the_means(prior: str) -> None:
    model = by_hand()
    means = model.sample_latents(300, temperature=0, prior=prior)
    centres = {"normal": torch.zeros(1, 16)} | {k: v.means for k, v in model._priors.items()}
    unique = np.unique(means.reshape(300, 16), axis=0)
    assert unique == pytest.approx(np.unique(centres[prior].numpy(), axis=0))
    plain = model.sample_latents(300, prior=prior)
    for temperature in (0.5, 2.0):
        scaled = model.sample_latents(300, temperature=temperature, prior=prior)
        assert scaled - means == pytest.approx(temperature * (plain - means), abs=1e-5)
    assert np.abs(plain - means).mean() > 0.2


@pytest.mark.parametrize("prior", PRIORS)
def test_log_prior_is_torchs(prior: str) -> None:
    model = by_hand()
    latents = model.sample_latents(20, prior="mixture")
    z = torch.from_numpy(latents).flatten(1).double()
    truth = Independent(Normal(torch.zeros(16), 1.0), 1) if prior == "normal" else distribution(model, prior)
    expected = truth.log_prob(z)
    got = model.log_prior(latents, prior)
    assert got.dtype == np.float64
    assert got == pytest.approx(expected.numpy(), rel=1e-9)


# --- encoding and decoding


def test_a_picture_does_not_depend_on_those_beside_it(model: DogVAE, dogs: np.ndarray) -> None:
    """Bit for bit, and latents too, which would show less than a grey level."""
    latents = model.sample_latents(40)
    together = model.decode(latents)
    for i in (0, 7, 39):
        assert np.array_equal(model.decode(latents[i : i + 1])[0], together[i])
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(model.decode(latents[order]), together[order])
    encoded = model.encode(dogs[:40])
    assert np.array_equal(model.encode(dogs[order]), encoded[order])
    assert np.array_equal(model.encode(dogs[39]), encoded[39:])


def test_encoding_and_decoding_are_the_networks(model: DogVAE, dogs: np.ndarray) -> None:
    x = torch.from_numpy(dogs[:6].transpose(0, 3, 1, 2).copy()).float() / 255
    with torch.no_grad():
        mu, _ = model.model.encoder(x)
        decoded = torch.sigmoid(model.model.decoder(mu))  # the mean of a Bernoulli
    got = model.encode(dogs[:6])
    assert got.dtype == np.float32
    assert got == pytest.approx(mu.numpy(), abs=1e-5)
    pictures = np.rint(255 * decoded.numpy().transpose(0, 2, 3, 1))
    assert np.abs(model.reconstruct(dogs[:6]) - pictures).max() <= 1
    assert np.array_equal(model.decode(torch.from_numpy(got)), model.reconstruct(dogs[:6]))


def test_prepared_is_what_the_model_sees(model: DogVAE, dogs: np.ndarray) -> None:
    large = dogs[0].repeat(3, axis=0).repeat(3, axis=1)
    seen = model.prepared([dogs[0], large])
    assert seen.shape == (2, SIZE, SIZE, 3)
    assert np.array_equal(seen[0], dogs[0])
    assert not np.array_equal(seen[1], dogs[0])
    assert np.array_equal(model.encode(large), model.encode(seen[1]))


def test_pil_images_are_the_arrays(model: DogVAE, dogs: np.ndarray) -> None:
    latents, (a, b, c) = model.sample_latents(3), dogs[:3]
    calls: list[Callable[[bool], Any]] = [
        lambda pil: model.sample(3, seed=2, pil=pil),
        lambda pil: model.decode(latents, pil=pil),
        lambda pil: model.reconstruct([a, b], pil=pil),
        lambda pil: model.interpolate(a, b, steps=4, pil=pil),
        lambda pil: model.walk([a, b, c], steps=3, pil=pil),
    ]
    for call in calls:
        images, arrays = call(True), call(False)
        assert len(images) == len(arrays) > 1
        for image, array in zip(images, arrays, strict=True):
            assert isinstance(image, Image.Image)
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), array)


def test_latents_backwards(model: DogVAE) -> None:
    """A walk back: numpy gives it negative strides, which torch refuses."""
    latents = model.sample_latents(3)
    assert np.array_equal(model.decode(latents[::-1]), model.decode(latents)[::-1])
    assert model.log_prior(latents[::-1]) == pytest.approx(model.log_prior(latents)[::-1], rel=1e-12)
    assert np.array_equal(model.path(latents[::-1], 4), model.path(latents[::-1].copy(), 4))


# --- walking


@pytest.mark.parametrize("method", METHODS)
def test_a_walk_begins_and_ends_with_the_reconstructions(method: str, model: DogVAE, dogs: np.ndarray) -> None:
    """Bit for bit."""
    a, b = dogs[0], dogs[1]
    walk = model.interpolate(a, b, steps=7, method=method)
    assert walk.shape == (7, SIZE, SIZE, 3)
    assert np.array_equal(walk[0], model.reconstruct([a])[0])
    assert np.array_equal(walk[-1], model.reconstruct([b])[0])
    assert len(np.unique(walk, axis=0)) == 7
    assert np.array_equal(walk, model.decode(model.path(model.encode([a, b]), 7, method)))
    assert np.array_equal(model.interpolate(a, b), model.interpolate(a, b, 32, "linear"))


@pytest.mark.parametrize("method", METHODS)
def test_a_walk_meets_every_stop(method: str, model: DogVAE, dogs: np.ndarray) -> None:
    for steps in (2, 5):
        walk = model.walk(list(dogs[:3]), steps, method)
        assert len(walk) == (3 - 1) * (steps - 1) + 1
        assert np.array_equal(walk[:: steps - 1], model.reconstruct(dogs[:3]))
        assert np.array_equal(walk[: steps - 1], model.interpolate(dogs[0], dogs[1], steps, method)[:-1])
    latents = model.encode(dogs[:4])
    assert np.array_equal(model.path(latents, 6, method)[::5], latents)


def test_linear_paths_are_numpys(model: DogVAE, latents: np.ndarray) -> None:
    a, b = latents[:2].astype(np.float64)
    t = np.linspace(0, 1, 9)[:, None, None, None]
    path = model.path(latents[:2], 9)
    assert path.dtype == np.float32
    assert path == pytest.approx((1 - t) * a + t * b, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_walk_leaves_the_one_and_nears_the_other(method: str, model: DogVAE, latents: np.ndarray) -> None:
    for i in range(0, 20, 2):
        a, b = latents[i : i + 2]
        path = model.path(np.stack([a, b]), 12, method)
        assert (np.diff(np.linalg.norm((path - a).reshape(12, -1), axis=1)) > 0).all()
        assert (np.diff(np.linalg.norm((path - b).reshape(12, -1), axis=1)) < 0).all()


def unit(seed: int) -> np.ndarray:
    z = np.random.default_rng(seed).normal(size=(2, 4, 4))
    return (z / np.linalg.norm(z)).astype(np.float32)


def angles(path: np.ndarray) -> np.ndarray:
    """Between each latent and the next."""
    flat = path.reshape(len(path), -1).astype(np.float64)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    return np.arccos(np.clip((flat[1:] * flat[:-1]).sum(axis=1), -1, 1))


def test_spherical_paths_turn_at_constant_speed(model: DogVAE) -> None:
    a, b = 3 * unit(0), 3 * unit(1)
    path = model.path(np.stack([a, b]), 11, "spherical")
    assert np.linalg.norm(path.reshape(11, -1), axis=1) == pytest.approx(np.full(11, 3.0), rel=1e-6)
    whole = math.acos(float((a * b).sum(dtype=np.float64)) / 9)
    assert angles(path) == pytest.approx(np.full(10, whole / 10), rel=1e-4)
    straight = np.linalg.norm(model.path(np.stack([a, b]), 11).reshape(11, -1), axis=1)
    assert straight.min() < 2.5  # which is the corner that it does not cut
    # It stays in the plane of the two.
    assert np.linalg.matrix_rank(path.reshape(11, -1).astype(np.float64), tol=1e-4) == 2


def test_spherical_paths_between_different_lengths(model: DogVAE) -> None:
    """Shoemake's formula: in the middle, (a + b) / (2 cos(angle / 2))."""
    a, b = 2 * unit(0), 5 * unit(1)
    angle = math.acos(float((a * b).sum(dtype=np.float64)) / 10)
    middle = model.path(np.stack([a, b]), 3, "spherical")[1]
    assert middle == pytest.approx((a + b) / (2 * math.cos(angle / 2)), abs=1e-5)


ENDS: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "the same": (unit(0), unit(0)),
    "opposite": (unit(0), -unit(0)),
    "opposite and longer": (unit(0), -3 * unit(0)),
    "longer": (unit(0), 4 * unit(0)),
    "from 0": (0 * unit(0), unit(0)),
    "to 0": (unit(0), 0 * unit(0)),
    "both 0": (0 * unit(0), 0 * unit(0)),
    "close": (unit(0), unit(0) + 1e-6 * unit(1)),
    "nearly opposite": (unit(0), -unit(0) + 1e-6 * unit(1)),
    "tiny": (1e-30 * unit(0), 1e-30 * unit(1)),
    "huge": (1e18 * unit(0), 1e18 * unit(1)),
}


@pytest.mark.parametrize("name", ENDS)
def test_spherical_paths_where_there_is_no_angle(name: str, model: DogVAE) -> None:
    """Both ends are met, nothing in between is not finite or far away."""
    start, end = ENDS[name]
    path = model.path(np.stack([start, end]), 9, "spherical")
    assert np.isfinite(path).all()
    assert np.array_equal(path[0], start)
    assert np.array_equal(path[-1], end)
    flat, (a, b) = path.reshape(9, -1).astype(np.float64), (z.astype(np.float64) for z in (start, end))
    longest = max(np.linalg.norm(a), np.linalg.norm(b))
    assert (np.linalg.norm(flat, axis=1) <= 1.001 * longest).all()
    assert np.linalg.norm(np.diff(flat, axis=0), axis=1).max() <= 1.01 * np.pi * longest / 8


# --- directions and neighbours


def test_direction_is_the_difference_of_the_means(model: DogVAE, dogs: np.ndarray, latents: np.ndarray) -> None:
    got = model.direction(dogs[:5], list(dogs[5:12]))
    assert got.shape == (2, 4, 4)
    expected = latents[:5].astype(np.float64).mean(axis=0) - latents[5:12].astype(np.float64).mean(axis=0)
    assert got == pytest.approx(expected, abs=1e-6)
    assert np.abs(got).max() > 0.1
    assert model.direction(dogs[3], dogs[4]) == pytest.approx(latents[3] - latents[4])


def test_neighbours_by_brute_force(
    model: DogVAE, exported: tuple[Path, Path], dogs: np.ndarray, latents: np.ndarray
) -> None:
    pictures = model.sample(30, seed=1)
    mine = model.encode(pictures).reshape(30, D).astype(np.float64)
    brute = np.linalg.norm(mine[:, None] - latents.reshape(100, D), axis=2)
    told: list[tuple[int, int]] = []
    indices, distances, images = model.neighbours(
        pictures, exported[0], k=6, progress=lambda done, total: told.append((done, total))
    )
    assert indices.shape == distances.shape == (30, 6)
    assert distances == pytest.approx(np.sort(brute, axis=1)[:, :6], abs=1e-3)
    assert np.take_along_axis(brute, indices, axis=1) == pytest.approx(distances, abs=1e-3)
    assert all(len(set(row)) == 6 for row in indices.tolist())
    assert np.array_equal(images, dogs[indices])
    assert told[-1] == (100, 100)


def test_a_training_image_is_its_own_neighbour(model: DogVAE, exported: tuple[Path, Path], dogs: np.ndarray) -> None:
    chosen = np.array([5, 50, 99])
    indices, distances, images = model.neighbours(dogs[chosen], Dataset(exported[0]), k=3)
    assert indices[:, 0].tolist() == chosen.tolist()
    assert distances[:, 0].max() < 1e-2
    assert distances[:, 1].min() > 0.1
    assert np.array_equal(images[:, 0], dogs[chosen])


def test_more_neighbours_than_there_are(model: DogVAE, exported: tuple[Path, Path], dogs: np.ndarray) -> None:
    indices, _, images = model.neighbours(dogs[0], exported[0], k=1000)
    assert sorted(indices[0].tolist()) == list(range(100))
    assert images.shape == (1, 100, SIZE, SIZE, 3)


def test_neighbours_in_another_dataset(model: DogVAE, write_dataset: Callable[..., Path], dogs: np.ndarray) -> None:
    wrong = write_dataset([np.zeros((3, 3, 64, 64), np.uint8)], [np.zeros((1, 3, 64, 64), np.uint8)])
    with pytest.raises(UsageError, match="has images of 64 pixels, this model is for 32"):
        model.neighbours(dogs[0], wrong)
    with pytest.raises(UsageError, match="is not a prepared dataset"):
        model.neighbours(dogs[0], wrong / "nowhere")


# --- what is refused


REFUSALS: dict[str, tuple[Callable[[DogVAE, np.ndarray], Any], str]] = {
    "no samples": (lambda m, z: m.sample(0), "-n: 0 is too small"),
    "fewer than none": (lambda m, z: m.sample(-3), "-n: -3 is too small"),
    "no latents": (lambda m, z: m.sample_latents(0), "-n: 0 is too small"),
    "no batches": (lambda m, z: list(m.samples(0)), "-n: 0 is too small"),
    "negative seed": (lambda m, z: m.sample(1, seed=-1), "--seed: -1 is too small"),
    "negative temperature": (lambda m, z: m.sample(1, temperature=-1), "--temperature: -1 must be"),
    "temperature that is no number": (lambda m, z: m.sample(1, temperature=math.nan), "--temperature: nan must be"),
    "infinite temperature": (lambda m, z: m.sample(1, temperature=math.inf), "--temperature: inf must be"),
    "unknown prior": (lambda m, z: m.sample(1, prior="banana"), "--prior: 'banana' is none of mixture, gaussian"),
    "unknown method": (lambda m, z: m.path(z, 4, "curved"), "--method: 'curved' is none of linear, spherical"),
    "one step": (lambda m, z: m.path(z, 1), "--steps: 1 is too small"),
    "one step of pictures": (lambda m, z: m.walk(m.decode(z), steps=1), "--steps: 1 is too small"),
    "one picture": (lambda m, z: m.walk(list(m.decode(z[:1]))), "a walk needs at least two pictures"),
    "no pictures": (lambda m, z: m.walk([]), "there are no pictures"),
    "nothing to encode": (lambda m, z: m.encode([]), "there are no pictures"),
    "nothing to decode": (lambda m, z: m.decode(z[:0]), "there are no pictures"),
    "one latent alone": (lambda m, z: m.decode(z[0]), r"shape \(2, 4, 4\), this model's are \(n, 2, 4, 4\)"),
    "flat latents": (lambda m, z: m.decode(z.reshape(-1, D)), r"latents have shape \(3, 32\)"),
    "latents with NaN": (lambda m, z: m.decode(np.where(z > 1, np.nan, z)), "not finite"),
    "infinite latents": (lambda m, z: m.decode(z / np.float32(0)), "not finite"),
    "no neighbours": (lambda m, z: m.neighbours(m.decode(z), "nowhere", k=0), "-k: 0 is too small"),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", REFUSALS)
def test_mistakes_are_told_in_a_line(name: str, model: DogVAE) -> None:
    call, reason = REFUSALS[name]
    with pytest.raises(UsageError, match=reason) as error:
        call(model, model.sample_latents(3))
    assert "\n" not in str(error.value)


MORE: dict[str, tuple[Callable[[DogVAE, np.ndarray], Any], str]] = {
    "a walk of one path": (lambda m, z: m.walk("a.jpg"), "a.jpg cannot be read"),
    "a walk of one array": (lambda m, z: m.walk(m.decode(z)[0]), "two pictures"),
    "a path of one latent": (lambda m, z: m.path(z[:1]), "two"),
    "a path of flat latents": (lambda m, z: m.path(z.reshape(3, D)), "latents have shape"),
    "density under an unknown prior": (lambda m, z: m.log_prior(z, "banana"), "--prior: 'banana' is none of"),
    "density of other latents": (lambda m, z: m.log_prior(z[:, :1]), "latents have shape"),
}


@pytest.mark.parametrize("name", MORE)
def test_more_mistakes_are_told_in_a_line(name: str, model: DogVAE) -> None:
    call, reason = MORE[name]
    with pytest.raises(UsageError, match=reason):
        call(model, model.sample_latents(3))


def test_double_precision_latents(model: DogVAE, latents: np.ndarray) -> None:
    """As numpy makes them of nearly everything."""
    assert model.path(latents[:2].astype(np.float64), 5) == pytest.approx(model.path(latents[:2], 5), abs=1e-6)


def test_more_pictures_than_memory_are_refused_at_once(model: DogVAE) -> None:
    n = psutil.virtual_memory().available // (3 * SIZE**2)
    began = time.monotonic()
    with pytest.raises(UsageError, match=f"-n: {n:,} pictures take .*`samples`"):
        model.sample(n)
    assert time.monotonic() - began < 1
    assert next(iter(model.samples(n))).shape == (256, SIZE, SIZE, 3)


# --- what it costs to begin


def in_new_process(code: str, *args: str) -> list[str]:
    """The words that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


def test_importing_the_package_costs_nothing() -> None:
    """Seconds of CPU, medians of 5 in turns; torch alone would take more than one."""
    codes = ("pass", "import dogvae")
    spent: dict[str, list[float]] = {code: [] for code in codes}
    for _ in range(5):
        for code in codes:
            words = in_new_process(f"import time, sys; {code}; print(time.process_time(), 'torch' in sys.modules)")
            spent[code].append(float(words[0]))
            assert words[1] == "False"
    assert statistics.median(spent["import dogvae"]) - statistics.median(spent["pass"]) < 0.1


def test_playing_begins_soon_and_without_ray(exported: tuple[Path, Path]) -> None:
    """From `import torch` on, one sample is there in 1.5 seconds, on one thread; of 3 tries, for other work may run."""
    code = """
import sys, time
import torch
torch.set_num_threads(1)
began = time.perf_counter()
import dogvae.inference.model
assert dogvae.load(sys.argv[1], "cpu").sample(1).any()
print(time.perf_counter() - began, *[name for name in sys.modules if name.startswith("ray")])
"""
    for _ in range(3):
        seconds, *rays = in_new_process(code, str(exported[1]))
        assert rays == []
        if float(seconds) < 1.5:
            return
    pytest.fail(f"{seconds} s")
