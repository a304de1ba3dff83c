"""What an export holds: the best weights, a prior fitted to them, and files that are what they say."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import dogvae
from dogvae.commands import cli, entry
from dogvae.commands import train as train_command
from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from dogvae.network import prior
from dogvae.network.prior import Gaussian
from dogvae.network.vae import VAE
from dogvae.storage import Storage
from dogvae.training.checkpoint import Checkpoint, Checkpoints
from dogvae.training.export import export, export_again, is_export
from dogvae.training.run_folder import save_config
from tests.support.exports import Exported
from tests.support.runs import SIZE, drawn_dogs, job, latest, train, write_images

VAL = 12
LATENTS = 2 * 4 * 4
FILES = {"model.safetensors", "prior.safetensors", "README.md", "preview.png", "config.json"}


def trained(where: Path, dataset: Path, stop_at: int | None = None, **settings: Any) -> tuple[Path, Config]:
    """A run of the real loop."""
    config = job(dataset, **{"epochs": 4, "latent_dim": 2, "lr": 1e-2, **settings})
    train(config, where / "run", stop_at=stop_at)
    save_config(Storage(where / "run"), config)
    return where / "run", config


@pytest.fixture(scope="module")
def few_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dogs = drawn_dogs(VAL + 30)
    return write_images(tmp_path_factory.mktemp("few") / "dataset", train=dogs[VAL:], val=dogs[:VAL])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A run on dark photos and bright negatives, whose last epoch was worse than the one before, with other weights."""
    where = tmp_path_factory.mktemp("export")
    photos = [255 - dog // 4 if i % 2 else dog // 4 for i, dog in enumerate(drawn_dogs(VAL + 100))]
    run, config = trained(where, write_images(where / "dataset", train=photos[VAL:], val=photos[:VAL]))
    last = latest(run)
    worse = last.meta["val_loss"] + 100
    record = {**last.meta["records"][-1], "epoch": 4, "val_loss": worse}
    meta = {**last.meta, "epoch": 5, "step": last.meta["step"] + 1, "val_loss": worse}
    checkpoints = Checkpoints(Storage(run))
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
    """Copies of the run with its export, and of its dataset, that a test may damage."""
    dataset = shutil.copytree(run[1].data, tmp_path / "photos")
    shutil.copytree(run[0], tmp_path / "run")
    save_config(Storage(tmp_path / "run"), run[1].replace(data=str(dataset)))
    return tmp_path / "run", dataset


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def best(run: Path) -> Checkpoint:
    found = Checkpoints(Storage(run)).best()
    assert found is not None
    return found


def weights_of(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name[len(kind) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{kind}/")}


@torch.no_grad()
def posteriors(config: Config, weights: dict[str, Tensor], n: int | None = None) -> tuple[Tensor, Tensor]:
    """Means and variances of the training photos, in one batch."""
    model = VAE(config.model).eval()
    model.load_state_dict(weights)
    paths = sorted(Path(config.data).glob("train-*.npy"))
    mu, logvar = model.encoder(torch.from_numpy(np.concatenate([np.load(p) for p in paths])[:n]).float() / 255)
    return mu.flatten(1), logvar.exp().flatten(1)


def same(gaussian: Gaussian, tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors are the Gaussian, up to rounding, which depends on the batch size."""
    mean, factor = tensors["gaussian.mean"], tensors["gaussian.factor"]
    close = [torch.allclose(a.float(), b, 1e-3, 1e-4) for a, b in ((gaussian.mean, mean), (gaussian.factor, factor))]
    return all(close)


# --- the files


def test_config_describes_the_export_and_holds_checksums(run: tuple[Path, Config], folder: Path) -> None:
    config, said = run[1], about(folder)
    assert {p.name for p in folder.iterdir()} == FILES
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    assert said["files"] == {name: digests[name] for name in ("model.safetensors", "prior.safetensors")}
    assert (said["format"], said["version"], said["dogvae"]) == ("dogvae-export", 3, dogvae.__version__)
    assert said["model"] == config.to_dict()["model"]
    assert said["training"]["lr"] == 1e-2
    assert said["dataset_fingerprint"] == Dataset(config.data).fingerprint
    assert said["metrics"] == best(run[0])[1]["records"][-1]
    assert said["metrics"]["epoch"] == 3  # the last epoch is 4
    assert said["sigma"] == said["metrics"]["val_sigma"]
    assert 1 / 255 < said["sigma"] < 0.5


def test_weights_are_the_averaged_ones_of_the_best_epoch(run: tuple[Path, Config], folder: Path) -> None:
    tensors, _ = best(run[0])
    weights = load_file(folder / "model.safetensors")
    averaged, raw = weights_of(tensors, "ema"), weights_of(tensors, "model")
    assert weights.keys() == averaged.keys()
    assert all(torch.equal(weights[name], averaged[name]) for name in weights)
    assert any(not torch.equal(weights[name], raw[name]) for name in weights)


def test_without_averaging_the_weights_themselves_are_exported(few_photos: Path, tmp_path: Path) -> None:
    run, config = trained(tmp_path, few_photos, ema=0.0, epochs=2)
    weights, raw = load_file(Path(export(Storage(run), config).uri) / "model.safetensors"), best(run)[0]
    assert {f"model/{name}" for name in weights} == {name for name in raw if name.startswith("model/")}
    assert all(torch.equal(weights[name], raw[f"model/{name}"]) for name in weights)


def test_export_does_not_name_the_place_of_the_photos(run: tuple[Path, Config], folder: Path) -> None:
    assert "data" not in about(folder)["training"]
    for name in FILES:
        assert run[1].data.encode() not in (folder / name).read_bytes()


def test_second_export_is_equal_byte_for_byte(run: tuple[Path, Config], folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    again = Path(export(Storage(run[0]), run[1], Storage(tmp_path / "again")).uri)
    assert {p.name for p in again.iterdir()} == FILES
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


# --- the prior


def test_prior_is_fitted_to_the_posteriors_of_the_exported_weights(run: tuple[Path, Config], folder: Path) -> None:
    """Not of the weights without averaging. Directions are those of a singular value decomposition of the means."""
    path, config = run
    tensors, _ = best(path)
    saved = load_file(folder / "prior.safetensors")
    mu, var = posteriors(config, weights_of(tensors, "ema"))
    shapes = {"directions": (32, LATENTS), "scales": (32,), "parents": (2, LATENTS)}
    shapes |= {"gaussian.mean": (LATENTS,), "gaussian.factor": (LATENTS, LATENTS)}
    assert same(prior.fit(mu, var), saved)
    assert {name: tuple(t.shape) for name, t in saved.items()} == shapes
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert not same(prior.fit(*posteriors(config, weights_of(tensors, "model"))), saved)
    _, values, vectors = np.linalg.svd((mu - mu.mean(dim=0)).double().numpy(), full_matrices=False)
    np.testing.assert_allclose(saved["scales"], values / np.sqrt(len(mu)), rtol=1e-3)
    cosines = np.abs((saved["directions"].double().numpy() * vectors).sum(axis=1))
    np.testing.assert_allclose(cosines[:3], 1, atol=1e-3)


def test_prior_is_fitted_to_a_limited_number_of_images(
    run: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = run
    monkeypatch.setattr(prior, "MOST_IMAGES", 45)
    folder = Path(export(Storage(path), config, Storage(tmp_path / "few")).uri)
    gaussian = prior.fit(*posteriors(config, weights_of(best(path)[0], "ema"), 45))
    assert same(gaussian, load_file(folder / "prior.safetensors"))


def test_progress_of_an_export_is_one_count_from_the_first_photo_to_the_preview(
    run: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[float, float, str]] = []
    monkeypatch.setattr("dogvae.console.Progress.update", lambda self, *counts: told.append(counts))
    export(Storage(run[0]), run[1], Storage(tmp_path))
    done, totals, texts = zip(*told, strict=True)
    assert (done[0], done[-1]) == (0, totals[0])
    assert list(done) == sorted(done)
    assert len(set(totals)) == 1
    stages = list(dict.fromkeys(text.partition(" image")[0] for text in texts))
    assert stages == ["encoding the photos", "encoding", "fitting the prior", "drawing a preview", "writing"]


# --- preview and model card


def test_preview_shows_32_samples_and_a_walk_between_validation_photos(run: tuple[Path, Config], folder: Path) -> None:
    """8 pictures in a row, with 2 pixels around each. The walk goes between the playground's first parents."""
    sheet = np.asarray(Image.open(folder / "preview.png"))
    assert sheet.shape == (2 + 5 * (SIZE + 2), 2 + 8 * (SIZE + 2), 3)

    def tile(row: int, column: int) -> np.ndarray:
        y, x = 2 + row * (SIZE + 2), 2 + column * (SIZE + 2)
        return sheet[y : y + SIZE, x : x + SIZE].astype(int)

    model = dogvae.load(folder, "cpu")
    samples = model.sample(32).astype(int)  # one by one; the preview is decoded at once, which rounds otherwise
    assert all(np.abs(tile(i // 8, i % 8) - samples[i]).max() <= 1 for i in range(32))
    val = np.concatenate([np.load(p) for p in sorted(Path(run[1].data).glob("val-*.npy"))]).transpose(0, 2, 3, 1)
    reconstructions = model.reconstruct(list(val)).astype(int)
    for column, latent in ((0, model.parents[0]), (7, model.parents[1])):
        assert np.abs(tile(4, column) - model.decode(latent[None])[0]).max() <= 1
        assert np.abs(tile(4, column) - reconstructions).max(axis=(1, 2, 3)).min() <= 1  # of one of the photos
    assert (sheet[:2] == 255).all()


def test_model_card_has_the_figures(folder: Path) -> None:
    card, metrics = (folder / "README.md").read_text(), about(folder)["metrics"]
    assert "32x32 RGB images to a 32-dimensional latent\n(2 channels of 4x4) and back. Likelihood: gaussian." in card
    assert f"| negative ELBO | {metrics['val_loss']:.1f} nats per image |" in card
    assert f"| bits per dimension | {metrics['val_bits_per_dim']:.3f} |" in card
    assert f"| PSNR | {metrics['val_psnr']:.2f} dB |" in card
    assert f"| active latents of 32 | {metrics['val_active_latents']} |" in card
    assert "Best of 4 epochs: epoch 4." in card
    assert about(folder)["dataset_fingerprint"] in card
    assert "Samples come from a Gaussian, fitted to" in card


# --- runs and exports


def test_run_without_a_finished_epoch_cannot_be_exported(few_photos: Path, tmp_path: Path) -> None:
    run, config = trained(tmp_path, few_photos, stop_at=3)
    assert list((run / "checkpoints").iterdir())
    with pytest.raises(UsageError, match="has no finished epoch to export"):
        export(Storage(run), config)
    assert not (run / "export").exists()


def test_run_of_version_0_1_names_the_version_that_exports_it(run: tuple[Path, Config], tmp_path: Path) -> None:
    saved = best(run[0])
    (record,) = saved.meta["records"][-1:]
    del record["val_sigma"]
    checkpoints = Checkpoints(Storage(tmp_path))
    checkpoints.save(saved.tensors, saved.meta)
    checkpoints.wait()
    with pytest.raises(UsageError, match=r"was trained by dogvae 0\.1: export it with that version"):
        export(Storage(tmp_path), run[1])
    assert not (tmp_path / "export").exists()


def test_is_export_distinguishes_exports_from_runs(run: tuple[Path, Config], folder: Path, tmp_path: Path) -> None:
    assert is_export(str(folder))
    for path in (run[0], run[1].data, tmp_path):
        assert not is_export(str(path))
    save_config(Storage(tmp_path), run[1].replace(data="/home/me/dogvae-export-photos"))
    assert not is_export(str(tmp_path))


# --- the command


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `dogvae export ...`."""
    code = entry.run(cli._main, ["export", *map(str, argv)])
    return code, *capsys.readouterr()


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The single error line of `dogvae export ...`."""
    code, out, err = command(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_command_replaces_a_damaged_export(
    copy: tuple[Path, Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = copy[0] / "export"
    (damaged / "model.safetensors").write_bytes(b"damaged")
    (damaged / "preview.png").unlink()
    with pytest.raises(UsageError):
        dogvae.load(damaged, "cpu")
    assert command(capsys, copy[0]) == (0, f"{damaged}\n", "")
    for name in FILES:
        assert (damaged / name).read_bytes() == (folder / name).read_bytes(), name
    assert export_again(str(copy[0])) == str(damaged)


def test_command_refuses_a_missing_or_other_dataset(
    copy: tuple[Path, Path], few_photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export of before stays."""
    run, dataset = copy
    shutil.rmtree(dataset)
    assert str(dataset) in refused(capsys, run)
    shutil.copytree(few_photos, dataset)
    assert str(dataset) in refused(capsys, run)
    assert dogvae.load(run / "export", "cpu").sample(1).shape == (1, SIZE, SIZE, 3)


def test_command_refuses_what_is_not_a_run(
    folder: Path, run: tuple[Path, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is an exported model already; --onnx adds" in refused(capsys, folder)
    for path in (tmp_path, tmp_path / "none", run[1].data):
        assert f"{path} is not a run: it has no config.json" in refused(capsys, path)
    for text in ("[]", "{", '{"model": {"width": 1}}', '{"format": "other"}'):
        (tmp_path / "config.json").write_text(text)
        refused(capsys, tmp_path)


def test_ctrl_c_during_the_export_of_a_trained_run_says_how_to_export_it(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dogvae.training.export.export", interrupted)
    run = Storage(exported.run)
    with pytest.raises(KeyboardInterrupt):
        train_command._exported(run, Config.from_json(run.read("config.json").decode(), run.uri))
    assert f"all epochs are trained; to export the best: dogvae export {exported.run}\n" in capsys.readouterr().out
