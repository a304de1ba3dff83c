"""What an export holds: the best weights, a prior fitted to them, and files that are what they say."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import dogvae
from dogvae.commands import cli, flags
from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.data.drawn import draw
from dogvae.data.writer import Row, write_dataset
from dogvae.errors import UsageError
from dogvae.network import prior
from dogvae.network.prior import Mixture
from dogvae.network.vae import VAE
from dogvae.storage import Storage
from dogvae.training.checkpoint import Checkpoints
from dogvae.training.export import export, export_again, is_export
from dogvae.training.run_folder import save_config
from tests.support.runs import job, train

SIZE, VAL = 32, 12
LATENTS = 2 * 4 * 4
FILES = {"model.safetensors", "prior.safetensors", "README.md", "preview.png", "config.json"}


def drawn(folder: Path, images: int, two_kinds: bool = False) -> Path:
    """A dataset of drawn dogs; of two kinds, every other one is a negative, and none has middle greys."""
    rows = []
    for i in range(VAL + images):
        pixels = np.asarray(draw(i, 0, SIZE)).transpose(2, 0, 1)
        if two_kinds:
            pixels = 255 - pixels // 4 if i % 2 else pixels // 4
        digest = (0 if i < VAL else 2**63).to_bytes(8, "big") + i.to_bytes(24, "big")
        rows.append(Row(f"{i}.png", None, digest, np.ascontiguousarray(pixels)))
    folder.mkdir()
    settings = {"size": SIZE, "crop": "center", "val_fraction": 0.1}
    write_dataset(folder, rows, {"kind": "test", "name": "test", "signature": ""}, settings)
    return folder


def trained(where: Path, dataset: Path, stop_at: int | None = None, **settings: Any) -> tuple[Path, Config]:
    """A run by the real loop."""
    config = job(dataset, **{"epochs": 4, "latent_dim": 2, "lr": 1e-2, **settings})
    run = where / "run"
    train(config, run, stop_at=stop_at)
    save_config(Storage(run), config)
    return run, config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """Photos of two kinds; the last epoch was worse than the one before it, and had other weights."""
    where = tmp_path_factory.mktemp("export")
    run, config = trained(where, drawn(where / "dataset", 100, two_kinds=True))
    checkpoints = Checkpoints(Storage(run))
    last = checkpoints.latest()
    assert last is not None
    worse = last.meta["val_loss"] + 100
    record = {**last.meta["records"][-1], "epoch": 4, "val_loss": worse}
    meta = {**last.meta, "epoch": 5, "step": last.meta["step"] + 1, "val_loss": worse}
    checkpoints.save(
        {k: 0.5 * v if v.is_floating_point() else v for k, v in last.tensors.items()},
        {**meta, "records": [*last.meta["records"], record]},
    )
    checkpoints.wait()
    return run, config


@pytest.fixture(scope="module")
def folder(run: tuple[Path, Config]) -> Path:
    path = Path(export(Storage(run[0]), run[1]).uri)
    assert path == run[0] / "export"
    return path


@pytest.fixture
def copy(run: tuple[Path, Config], folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The run with its export, and its dataset, to be spoilt."""
    dataset = shutil.copytree(run[1].data, tmp_path / "photos")
    shutil.copytree(run[0], tmp_path / "run")
    save_config(Storage(tmp_path / "run"), run[1].replace(data=str(dataset)))
    return tmp_path / "run", dataset


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def best(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The checkpoint of the least loss, read without our code."""
    found = []
    for path in (run / "checkpoints").glob("step-*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()["meta"])
        if meta["val_loss"] is not None:
            found.append((meta["val_loss"], path, meta))
    assert len(found) > 1
    _, path, meta = min(found, key=lambda each: each[0])
    return load_file(path), meta


def weights_of(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name[len(kind) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{kind}/")}


@torch.no_grad()
def posteriors(config: Config, weights: dict[str, Tensor], n: int | None = None) -> tuple[Tensor, Tensor]:
    """Means and variances of the training photos, all at once."""
    model = VAE(config.model).eval()
    model.load_state_dict(weights)
    paths = sorted(Path(config.data).glob("train-*.npy"))
    mu, logvar = model.encoder(torch.from_numpy(np.concatenate([np.load(p) for p in paths])[:n]).float() / 255)
    return mu.flatten(1), logvar.exp().flatten(1)


def same(mixture: Mixture, tensors: dict[str, Tensor], name: str) -> bool:
    """Whether the tensors of that name are the mixture's, but for what the size of a batch does to the last digits."""
    return all(
        t.shape == tensors[f"{name}.{part}"].shape and torch.allclose(t.float(), tensors[f"{name}.{part}"], 1e-3, 1e-4)
        for part, t in vars(mixture).items()
    )


# --- the files


def test_checksums_are_right(folder: Path) -> None:
    assert {p.name for p in folder.iterdir()} == FILES
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    assert about(folder)["files"] == {name: digests[name] for name in ("model.safetensors", "prior.safetensors")}


def test_weights_are_the_best_epochs_averaged_ones(run: tuple[Path, Config], folder: Path) -> None:
    tensors, meta = best(run[0])
    weights = load_file(folder / "model.safetensors")
    averaged, raw = weights_of(tensors, "ema"), weights_of(tensors, "model")
    assert weights.keys() == averaged.keys()
    assert all(torch.equal(weights[name], averaged[name]) for name in weights)
    assert any(not torch.equal(weights[name], raw[name]) for name in weights)
    assert about(folder)["metrics"] == meta["records"][-1]
    assert about(folder)["metrics"]["epoch"] == 3  # not the last


def test_without_average_the_weights_are_exported(tmp_path: Path) -> None:
    run, config = trained(tmp_path, drawn(tmp_path / "dataset", 30), ema=0.0, epochs=2)
    weights, raw = load_file(Path(export(Storage(run), config).uri) / "model.safetensors"), best(run)[0]
    assert {f"model/{name}" for name in weights} == {name for name in raw if name.startswith("model/")}
    assert all(torch.equal(weights[name], raw[f"model/{name}"]) for name in weights)


def test_config_says_what_it_is(run: tuple[Path, Config], folder: Path) -> None:
    config, said = run[1], about(folder)
    assert (said["format"], said["version"]) == ("dogvae-export", 2)
    assert said["model"] == config.to_dict()["model"]
    assert said["training"]["lr"] == 1e-2
    assert said["dataset_fingerprint"] == Dataset(config.data).fingerprint
    assert said["dogvae"] == dogvae.__version__


def test_export_does_not_tell_where_the_photos_are(run: tuple[Path, Config], folder: Path) -> None:
    """It is made to be given away."""
    assert "data" not in about(folder)["training"]
    for name in FILES:
        assert run[1].data.encode() not in (folder / name).read_bytes()


# --- the prior


def test_prior_has_the_shapes_it_should(folder: Path) -> None:
    tensors = load_file(folder / "prior.safetensors")
    k = about(folder)["components"]
    expected = {"directions": (32, LATENTS), "scales": (32,)}
    for name, count in (("gaussian", 1), ("mixture", k)):
        expected |= {
            f"{name}.weights": (count,),
            f"{name}.means": (count, LATENTS),
            f"{name}.factors": (count, LATENTS, LATENTS),
        }
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    for name in ("gaussian", "mixture"):
        assert float(tensors[f"{name}.weights"].sum()) == pytest.approx(1, abs=1e-6)
        assert torch.equal(tensors[f"{name}.factors"], tensors[f"{name}.factors"].tril())
        assert (tensors[f"{name}.factors"].diagonal(dim1=1, dim2=2) > 0).all()


def test_prior_is_fitted_to_the_training_posteriors(run: tuple[Path, Config], folder: Path) -> None:
    """Of the averaged weights of the best epoch; those of the weights themselves are others."""
    path, config = run
    tensors, _ = best(path)
    saved = load_file(folder / "prior.safetensors")
    mu, var = posteriors(config, weights_of(tensors, "ema"))
    gaussian, mixture = prior.fit(mu, var)
    assert same(gaussian, saved, "gaussian")
    assert same(mixture, saved, "mixture")
    assert not same(prior.fit(*posteriors(config, weights_of(tensors, "model")))[0], saved, "gaussian")
    # The mean needs no fitting, and the variances are those of the aggregated posterior.
    torch.testing.assert_close(saved["gaussian.means"][0], mu.mean(dim=0), rtol=0, atol=1e-5)
    spread = mu.var(dim=0, correction=0) + var.mean(dim=0)
    covariance = saved["gaussian.factors"][0] @ saved["gaussian.factors"][0].T
    torch.testing.assert_close(covariance.diagonal(), spread, rtol=1e-3, atol=1e-5)


def test_directions_are_the_principal_ones(run: tuple[Path, Config], folder: Path) -> None:
    """By a singular value decomposition of the centred means."""
    mu, _ = posteriors(run[1], weights_of(best(run[0])[0], "ema"))
    _, values, vectors = np.linalg.svd((mu - mu.mean(dim=0)).double().numpy(), full_matrices=False)
    saved = load_file(folder / "prior.safetensors")
    np.testing.assert_allclose(saved["scales"], values / np.sqrt(len(mu)), rtol=1e-3)
    alike = np.abs((saved["directions"].double().numpy() * vectors).sum(axis=1))
    np.testing.assert_allclose(alike[:3], 1, atol=1e-3)


def test_prior_is_fitted_to_so_many_images_at_most(
    run: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = run
    monkeypatch.setattr(prior, "MOST_IMAGES", 45)
    folder = Path(export(Storage(path), config, Storage(tmp_path / "few")).uri)
    gaussian, mixture = prior.fit(*posteriors(config, weights_of(best(path)[0], "ema"), 45))
    saved = load_file(folder / "prior.safetensors")
    assert same(gaussian, saved, "gaussian")
    assert same(mixture, saved, "mixture")


# --- what people see


def test_preview_shows_samples_and_a_walk(run: tuple[Path, Config], folder: Path) -> None:
    """8 in a row, with 2 pixels around each: 32 samples, and a walk from the first validation photo to the eighth."""
    sheet = np.asarray(Image.open(folder / "preview.png"))
    assert sheet.shape == (2 + 5 * (SIZE + 2), 2 + 8 * (SIZE + 2), 3)

    def tile(row: int, column: int) -> np.ndarray:
        y, x = 2 + row * (SIZE + 2), 2 + column * (SIZE + 2)
        return sheet[y : y + SIZE, x : x + SIZE].astype(int)

    model = dogvae.load(folder, "cpu")
    samples = model.sample(32)
    assert all(np.array_equal(tile(i // 8, i % 8), samples[i]) for i in range(32))
    val = np.concatenate([np.load(p) for p in sorted(Path(run[1].data).glob("val-*.npy"))]).transpose(0, 2, 3, 1)
    for column, photo in ((0, val[0]), (7, val[7])):
        assert np.abs(tile(4, column) - model.reconstruct(photo)[0]).max() <= 1
    assert (sheet[:2] == 255).all()


def test_card_names_the_number_of_components(folder: Path, tmp_path: Path) -> None:
    """Photos of two kinds make a mixture; of too few photos there is one Gaussian."""
    k = about(folder)["components"]
    assert k > 1
    assert k == len(load_file(folder / "prior.safetensors")["mixture.weights"])
    assert f"Samples come from a mixture of {k} Gaussians, fitted to" in (folder / "README.md").read_text()
    run, config = trained(tmp_path, drawn(tmp_path / "dataset", 30), epochs=1)
    few = Path(export(Storage(run), config).uri)
    assert about(few)["components"] == 1
    assert "Samples come from a Gaussian, fitted to" in (few / "README.md").read_text()


def test_card_has_the_figures(folder: Path) -> None:
    card, metrics = (folder / "README.md").read_text(), about(folder)["metrics"]
    assert f"| negative ELBO | {metrics['val_loss']:.1f} nats per image |" in card
    assert f"| PSNR | {metrics['val_psnr']:.2f} dB |" in card
    assert f"| active latents of 32 | {metrics['val_active_latents']} |" in card
    assert "Best of 4 epochs: epoch 4." in card
    assert about(folder)["dataset_fingerprint"] in card


# --- again


def test_export_is_the_same_again(run: tuple[Path, Config], folder: Path, tmp_path: Path) -> None:
    """Byte for byte, whatever the global generator does."""
    torch.manual_seed(99)
    again = Path(export(Storage(run[0]), run[1], Storage(tmp_path / "again")).uri)
    assert {p.name for p in again.iterdir()} == FILES
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_export_again_mends_what_is_there(copy: tuple[Path, Path], folder: Path) -> None:
    spoilt = copy[0] / "export"
    (spoilt / "model.safetensors").write_bytes(b"torn")
    (spoilt / "preview.png").unlink()
    with pytest.raises(UsageError):
        dogvae.load(spoilt, "cpu")
    assert export_again(str(copy[0])) == str(spoilt)
    for name in FILES:
        assert (spoilt / name).read_bytes() == (folder / name).read_bytes(), name


def test_run_without_an_epoch_has_nothing_to_export(tmp_path: Path) -> None:
    run, config = trained(tmp_path, drawn(tmp_path / "dataset", 30), stop_at=3)
    assert list((run / "checkpoints").iterdir())
    with pytest.raises(UsageError, match="has no finished epoch to export"):
        export(Storage(run), config)
    assert not (run / "export").exists()


def test_runs_and_exports_are_told_apart(run: tuple[Path, Config], folder: Path, tmp_path: Path) -> None:
    assert is_export(str(folder))
    assert not is_export(str(run[0]))
    assert not is_export(run[1].data)
    assert not is_export(str(tmp_path))


def test_run_on_photos_of_any_name_is_a_run(run: tuple[Path, Config], tmp_path: Path) -> None:
    save_config(Storage(tmp_path), run[1].replace(data="/home/me/dogvae-export-photos"))
    assert not is_export(str(tmp_path))


# --- the command


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `dogvae export ...`."""
    code = flags.run(cli._main, ["export", *map(str, argv)])
    return code, *capsys.readouterr()


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that it ends with."""
    code, out, err = command(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_command_exports_a_run_again(copy: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy[0] / "export")
    assert command(capsys, copy[0]) == (0, f"{copy[0]}/export\n", "")
    assert {p.name for p in (copy[0] / "export").iterdir()} == FILES


def test_export_needs_the_dataset(copy: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Which may be gone; what was exported before stays."""
    run, dataset = copy
    shutil.rmtree(dataset)
    assert str(dataset) in refused(capsys, run)
    assert dogvae.load(run / "export", "cpu").sample(1).shape == (1, SIZE, SIZE, 3)


def test_export_needs_the_same_dataset(copy: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Its fingerprint goes into the export."""
    run, dataset = copy
    shutil.rmtree(dataset)
    drawn(dataset, 50)
    assert str(dataset) in refused(capsys, run)


def test_what_is_no_run_is_refused(
    folder: Path, run: tuple[Path, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is an exported model already; --onnx adds" in refused(capsys, folder)
    for path in (tmp_path, tmp_path / "none", run[1].data):
        assert f"{path} is no run: it has no config.json" in refused(capsys, path)
    for text in ("[]", "{", '{"model": {"width": 1}}', '{"format": "other"}'):
        (tmp_path / "config.json").write_text(text)
        refused(capsys, tmp_path)
