"""ONNX files against torch, by onnxruntime; and what is left behind when something is wrong."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import dogvae
from dogvae.commands import cli, flags
from dogvae.config import ModelConfig
from dogvae.data.dataset import Dataset
from dogvae.errors import RunFailed, UsageError
from dogvae.inference import onnx
from dogvae.inference.onnx import export_onnx
from dogvae.storage import Storage
from dogvae.training.export import export, export_again
from dogvae.training.run_folder import save_config
from tests.support.command import ROOT
from tests.support.runs import job, make_dataset, train

FILES = {"model.safetensors", "prior.safetensors", "README.md", "preview.png", "config.json"}
LIKELIHOODS = ("bernoulli", "continuous-bernoulli", "gaussian")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("onnx") / "dataset")


def trained(run: Path, dataset: Path, **settings: Any) -> Path:
    """The export of a run of one epoch, or more."""
    config = job(dataset, **{"epochs": 1, "latent_dim": 3, "lr": 1e-2, **settings})
    train(config, run)
    save_config(Storage(run), config)
    return Path(export(Storage(run), config).uri)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the default's batch norm."""
    run = tmp_path_factory.mktemp("onnx") / "run"
    trained(run, dataset)
    return run


@pytest.fixture(scope="module")
def ready(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that has its ONNX files."""
    folder = shutil.copytree(run / "export", tmp_path_factory.mktemp("onnx") / "export")
    export_onnx(folder)
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """An export that has none yet."""
    return shutil.copytree(run / "export", tmp_path / "export")


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@torch.no_grad()
def check(folder: Path, dataset: Path) -> None:
    """Both files give what torch gives, for batches of other sizes than the one that was looked at."""
    assert {p.name for p in folder.iterdir()} == FILES | {"encoder.onnx", "decoder.onnx"}
    model = dogvae.load(folder, "cpu").model
    encoder, decoder = session(folder / "encoder.onnx"), session(folder / "decoder.onnx")
    photos = np.concatenate([np.load(p) for p in sorted(dataset.glob("train-*.npy"))])
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


def test_files_are_torchs(ready: Path, dataset: Path) -> None:
    check(ready, dataset)


def combinations() -> list[Any]:
    """All that a network may be; the fast tests have one of each kind."""
    architectures = [("default", "batch"), ("default", "group"), ("notebook", "batch")]
    fast = {("default", "group", "continuous-bernoulli")}
    return [
        pytest.param(*each, marks=[] if each in fast else pytest.mark.slow)
        for each in ((*a, likelihood) for a, likelihood in itertools.product(architectures, LIKELIHOODS))
    ]


@pytest.mark.parametrize(("architecture", "norm", "likelihood"), combinations())
def test_every_network(architecture: str, norm: str, likelihood: str, dataset: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", dataset, architecture=architecture, norm=norm, likelihood=likelihood, epochs=2)
    assert dogvae.load(folder, "cpu").model.config == ModelConfig(
        architecture=architecture, norm=norm, likelihood=likelihood, image_size=32, width=4, latent_dim=3
    )
    export_onnx(folder)
    check(folder, dataset)


def test_names_and_shapes(ready: Path) -> None:
    """What a program that knows only the file is told; the batch may be of any size."""
    encoder, decoder = session(ready / "encoder.onnx"), session(ready / "decoder.onnx")

    def told(nodes: list[Any]) -> list[tuple[str, list[Any], str]]:
        return [(node.name, node.shape[1:], node.type) for node in nodes]

    assert told(encoder.get_inputs()) == [("pictures", [3, 32, 32], "tensor(float)")]
    assert told(encoder.get_outputs()) == [(name, [3, 4, 4], "tensor(float)") for name in ("mean", "logvar")]
    assert told(decoder.get_inputs()) == [("latents", [3, 4, 4], "tensor(float)")]
    assert told(decoder.get_outputs()) == [("pictures", [3, 32, 32], "tensor(float)")]
    for node in (*encoder.get_inputs(), *encoder.get_outputs(), *decoder.get_inputs(), *decoder.get_outputs()):
        assert isinstance(node.shape[0], str)


def test_files_stand_alone(ready: Path, tmp_path: Path) -> None:
    """No weights beside them: they may be moved."""
    for name in ("encoder.onnx", "decoder.onnx"):
        session(Path(shutil.copy(ready / name, tmp_path / name)))


def test_export_with_them_is_an_export_still(ready: Path, run: Path) -> None:
    assert np.array_equal(dogvae.load(ready, "cpu").sample(3), dogvae.load(run / "export", "cpu").sample(3))


# --- what goes wrong


class Off(nn.Module):
    """An encoder of which one mean is higher than it was."""

    def __init__(self, encoder: nn.Module, by: float) -> None:
        super().__init__()
        self.encoder, self.by = encoder, by

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.encoder(x)
        mean = mean.clone()
        mean[1, 2, 3, 3] += self.by
        return mean, logvar


@torch.no_grad()
def test_difference_is_the_largest_one(ready: Path, dataset: Path) -> None:
    """Relative to the largest output, so that it is seen in one of many numbers."""
    encoder = dogvae.load(ready, "cpu").model.encoder
    x = Dataset(dataset).val.gather(np.arange(4)).float() / 255
    assert onnx._difference(encoder, ready / "encoder.onnx", x) < 1e-5
    off = Off(encoder, 0.25)
    largest = float(off(x)[0].abs().max())
    assert onnx._difference(off, ready / "encoder.onnx", x) == pytest.approx(0.25 / largest, rel=1e-3)


def test_what_would_differ_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "TOLERANCE", -1)
    with pytest.raises(RunFailed, match=r"encoder\.onnx would differ from torch by .* of its largest output"):
        export_onnx(folder)
    assert {p.name for p in folder.iterdir()} == FILES


def test_what_would_differ_replaces_nothing(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were there before stay as they are."""
    folder = shutil.copytree(ready, tmp_path / "export")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(onnx, "TOLERANCE", -1)
    with pytest.raises(RunFailed):
        export_onnx(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_half_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder without its decoder."""
    apart = iter([0.0, 1.0])
    monkeypatch.setattr(onnx, "_difference", lambda network, path, x: next(apart))
    with pytest.raises(RunFailed, match=r"decoder\.onnx would differ"):
        export_onnx(folder)
    assert {p.name for p in folder.iterdir()} == FILES


class Nonsense:
    """A runtime that gives no numbers."""

    def __init__(self, path: str, providers: list[str]) -> None:
        self.inputs = [SimpleNamespace(name="x")]
        self.outputs = [(3, 4, 4)] * 2 if "encoder" in path else [(3, 32, 32)]

    def get_inputs(self) -> list[SimpleNamespace]:
        return self.inputs

    def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [np.full((len(feed["x"]), *shape), np.nan, np.float32) for shape in self.outputs]


def test_no_numbers_are_a_difference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", Nonsense)
    with pytest.raises(RunFailed):
        export_onnx(folder)


def test_files_of_older_weights_do_not_stay(ready: Path, run: Path, dataset: Path, tmp_path: Path) -> None:
    """A run that was trained longer and exported again has other weights."""
    again = tmp_path / "run"
    trained(again, dataset, epochs=2)
    for name in ("encoder.onnx", "decoder.onnx"):
        shutil.copy(ready / name, again / "export" / name)
    export_again(str(again))
    kept = [p.name for p in (again / "export").glob("*.onnx") if p.read_bytes() == (ready / p.name).read_bytes()]
    assert kept == []


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_missing_package(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"--onnx: needs more packages: pip install 'dogvae\[onnx\]'"):
        export_onnx(folder)
    assert {p.name for p in folder.iterdir()} == FILES


def test_what_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no exported model"):
        export_onnx(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_on_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--onnx: s3://dogs/export is not on a disk of this machine"):
        export_onnx("s3://dogs/export")
    assert not list(tmp_path.iterdir())


# --- the command


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `dogvae export ...`."""
    code = flags.run(cli._main, ["export", *map(str, argv)])
    return code, *capsys.readouterr()


def test_command_exports_a_run_and_its_onnx(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(again / "export")
    code, out, _ = command(capsys, again, "--onnx")
    assert code == 0
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{again}/export/encoder.onnx",
        f"{again}/export/decoder.onnx",
        f"{again}/export",
    ]
    check(again / "export", dataset)


def test_command_says_what_is_wrong(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for argv, text in (
        ((folder, "--onnx"), "pip install 'dogvae[onnx]'"),
        ((folder,), "--onnx adds encoder.onnx and decoder.onnx"),
        ((tmp_path, "--onnx"), "is not a run"),
    ):
        code, out, err = command(capsys, *argv)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert text in err
    monkeypatch.undo()
    monkeypatch.setattr(onnx, "TOLERANCE", -1)
    code, _, err = command(capsys, folder, "--onnx")
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_command_as_it_is_typed(folder: Path, dataset: Path) -> None:
    """Torch's exporter has much to say; none of it is for whoever typed this."""
    script = Path(sys.executable).with_name("dogvae")
    done = subprocess.run([script, "export", folder, "--onnx"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 3
    assert done.stdout.splitlines()[-1] == str(folder)
    check(folder, dataset)
