"""The ONNX files against PyTorch, by onnxruntime, and the folder after a failed export."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from dogvae.config import ModelConfig
from dogvae.data.dataset import Dataset
from dogvae.errors import RunFailed, UsageError
from dogvae.inference import onnx
from dogvae.inference.load import load
from dogvae.inference.onnx import export_onnx
from dogvae.storage import Storage
from dogvae.training.export import export, export_again
from tests.support.cli import dogvae, refused
from tests.support.command import ROOT
from tests.support.exports import LATENT, Exported
from tests.support.runs import job, train

FILES = {"model.safetensors", "prior.safetensors", "README.md", "preview.png", "config.json"}
ONNX = ("encoder.onnx", "decoder.onnx")


@pytest.fixture(scope="module")
def converted(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the export with its ONNX files."""
    folder = shutil.copytree(exported.folder, tmp_path_factory.mktemp("onnx") / "export")
    export_onnx(folder)
    return folder


@pytest.fixture
def folder(exported: Exported, tmp_path: Path) -> Path:
    """A copy of the export, without ONNX files."""
    return shutil.copytree(exported.folder, tmp_path / "export")


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@torch.no_grad()
def check(folder: Path, dataset: Path) -> None:
    """Both files give what PyTorch gives, for batch sizes other than the exporter's example."""
    assert names(folder) == {*FILES, *ONNX}
    model = load(folder, "cpu").model
    encoder, decoder = (session(folder / name) for name in ONNX)
    photos = Dataset(dataset).train.gather(np.arange(22)).numpy()
    for n in (1, 3, 17):
        x = photos[5 : 5 + n].astype(np.float32) / 255
        mean, logvar = encoder.run(["mean", "logvar"], {"pictures": x})
        for got, expected in zip((mean, logvar), model.encoder(torch.from_numpy(x)), strict=True):
            assert got.shape == (n, *model.latent_shape)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
        latents = 2 * np.random.default_rng(n).standard_normal((n, *model.latent_shape)).astype(np.float32)
        (pictures,) = decoder.run(["pictures"], {"latents": latents})
        assert pictures.shape == (n, 3, 32, 32)
        assert pictures.min() >= 0
        assert pictures.max() <= 1
        assert pictures.std() > 1e-3  # not flat grey, as before training
        np.testing.assert_allclose(pictures, model.decode_mean(torch.from_numpy(latents)), rtol=0, atol=2e-4)


# --- the files


def test_onnx_files_of_the_default_network_equal_pytorch(converted: Path, exported: Exported) -> None:
    check(converted, exported.dataset)


@pytest.mark.parametrize(
    ("architecture", "likelihood", "latent_size"),
    [
        ("notebook", "bernoulli", 4),
        pytest.param("notebook", "gaussian", 8, marks=pytest.mark.slow),
        pytest.param("default", "bernoulli", 8, marks=pytest.mark.slow),
        pytest.param("default", "gaussian", 16, marks=pytest.mark.slow),
    ],
)
def test_onnx_files_of_every_network_equal_pytorch(
    architecture: str, likelihood: str, latent_size: int, exported: Exported, tmp_path: Path
) -> None:
    settings = dict(architecture=architecture, likelihood=likelihood, latent_dim=3, latent_size=latent_size)
    config = job(exported.dataset, epochs=2, lr=1e-2, **settings)
    train(config, tmp_path / "run")
    folder = Path(export(Storage(tmp_path / "run"), config).uri)
    assert load(folder, "cpu").model.config == ModelConfig(image_size=32, width=4, **settings)
    export_onnx(folder)
    check(folder, exported.dataset)


def test_onnx_inputs_and_outputs_are_named_and_take_any_batch(converted: Path) -> None:
    encoder, decoder = (session(converted / name) for name in ONNX)

    def described(nodes: list[Any]) -> list[tuple[str, list[Any], str]]:
        assert all(isinstance(node.shape[0], str) for node in nodes)  # a name: any size
        return [(node.name, node.shape[1:], node.type) for node in nodes]

    latent, image = list(LATENT), [3, 32, 32]
    assert described(encoder.get_inputs()) == [("pictures", image, "tensor(float)")]
    assert described(encoder.get_outputs()) == [(name, latent, "tensor(float)") for name in ("mean", "logvar")]
    assert described(decoder.get_inputs()) == [("latents", latent, "tensor(float)")]
    assert described(decoder.get_outputs()) == [("pictures", image, "tensor(float)")]


def test_onnx_file_contains_its_weights(converted: Path, tmp_path: Path) -> None:
    for name in ONNX:
        session(Path(shutil.copy(converted / name, tmp_path / name)))


def test_exporting_again_removes_onnx_files_of_older_weights(
    converted: Path, exported: Exported, tmp_path: Path
) -> None:
    run = shutil.copytree(exported.run, tmp_path / "run")
    for name in ONNX:
        shutil.copy(converted / name, run / "export" / name)
    export_again(str(run))
    assert names(run / "export") == FILES


# --- failures


@torch.no_grad()
@pytest.mark.parametrize("shift", [0.25, math.nan])
def test_difference_is_the_largest_one_relative_to_the_largest_output(
    shift: float, converted: Path, exported: Exported
) -> None:
    encoder = load(converted, "cpu").model.encoder
    x = Dataset(exported.dataset).val.gather(np.arange(4)).float() / 255
    assert onnx._difference(encoder, converted / "encoder.onnx", x) < 1e-5
    mean, logvar = encoder(x)
    mean[1, 1, 3, 3] += shift
    got = onnx._difference(lambda x: (mean, logvar), converted / "encoder.onnx", x)
    assert got == pytest.approx(shift / float(mean.abs().max()), rel=1e-3, nan_ok=True)


def test_files_that_differ_from_pytorch_are_not_kept(
    folder: Path, converted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "TOLERANCE", -1)
    with pytest.raises(RunFailed, match=r"encoder\.onnx would differ from PyTorch by .* of its largest output"):
        export_onnx(folder)
    assert names(folder) == FILES
    for name in ONNX:  # and replace no older ones
        shutil.copy(converted / name, folder / name)
    code, _, err = dogvae(capsys, "export", folder, "--onnx")
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert names(folder) == {*FILES, *ONNX}
    assert all((folder / name).read_bytes() == (converted / name).read_bytes() for name in ONNX)


def test_encoder_without_its_decoder_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    differences = iter([0.0, math.nan])
    monkeypatch.setattr(onnx, "_difference", lambda network, path, x: next(differences))
    with pytest.raises(RunFailed, match=r"decoder\.onnx would differ"):
        export_onnx(folder)
    assert names(folder) == FILES


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_missing_package_is_named(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"--onnx needs other packages: pip install 'dogvae\[onnx\]'"):
        export_onnx(folder)
    assert names(folder) == FILES


def test_export_that_is_missing_or_remote_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is not an exported model"):
        export_onnx(tmp_path)
    with pytest.raises(UsageError, match="--onnx: s3://dogs/export is not on a disk of this machine"):
        export_onnx("s3://dogs/export")
    assert not list(tmp_path.iterdir())


# --- the command


def test_command_refuses_mistakes_with_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--onnx adds encoder.onnx and decoder.onnx" in refused(capsys, "export", folder)
    assert "config.json" in refused(capsys, "export", tmp_path, "--onnx")


@pytest.mark.slow
def test_command_exports_a_run_and_prints_the_files_only(exported: Exported, tmp_path: Path) -> None:
    """In a process of its own: what PyTorch's exporter prints is not shown."""
    run = shutil.copytree(exported.run, tmp_path / "run")
    shutil.rmtree(run / "export")
    script = Path(sys.executable).with_name("dogvae")
    done = subprocess.run([script, "export", run, "--onnx"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    printed = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert printed == [f"{run}/export/encoder.onnx", f"{run}/export/decoder.onnx", f"{run}/export"]
    check(run / "export", exported.dataset)


def test_missing_packages_are_named_before_a_run_is_exported(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dogvae.commands.cli.find_spec", lambda name: None if name == "onnxscript" else True)
    monkeypatch.setattr("dogvae.training.export.export_again", lambda run: pytest.fail("exported in vain"))
    message = "error: --onnx needs other packages (onnxscript): pip install 'dogvae[onnx]'\n"
    assert refused(capsys, "export", exported.run, "--onnx") == message
