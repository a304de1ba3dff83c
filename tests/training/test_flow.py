"""A flow prior as a run: its loss, world sizes, resuming, and the export that it joins."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dogvae
from dogvae import rng
from dogvae.config import Config
from dogvae.data.dataset import Dataset, epoch_order
from dogvae.errors import UsageError
from dogvae.network.flow import Flow, GaussianField
from dogvae.rng import Stream
from dogvae.storage import Storage
from dogvae.training.checkpoint import part
from dogvae.training.export import export
from dogvae.training.flow_run import flow_config
from dogvae.training.flow_task import VAL_DRAWS
from dogvae.training.run_folder import open_run, save_config
from dogvae.training.step import Trainer
from tests.support.exports import DIMS, Exported, train_and_export
from tests.support.runs import TRAIN, differing, final, records, train

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"width": 32, "depth": 1, "epochs": 3, "batch_size": 12, "lr": 3e-3}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return train_and_export(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def config(vae: Exported) -> Config:
    """Nine steps an epoch; the last has four images."""
    assert TRAIN % 12 == 4
    return flow_config(*open_run(str(vae.run)), SETTINGS)[1]


@pytest.fixture(scope="module")
def alone(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the flow on one rank."""
    out = tmp_path_factory.mktemp("flow") / "alone"
    train(config, out)
    return out


def trained_flow(config: Config, out: Path) -> Flow:
    flow = Flow(config.flow, (2, 4, 4))  # type: ignore[arg-type]
    flow.load_state_dict(part(final(out), "ema"))
    return flow.eval()


@torch.inference_mode()
def test_validation_loss_equals_a_slow_computation(vae: Exported, config: Config, alone: Path) -> None:
    """Image by image, in float64, with the stratified times and the noise of the validation's stream."""
    model, val, flow = dogvae.load(vae.folder), Dataset(vae.dataset).val, trained_flow(config, alone)
    field = GaussianField.of(model.gaussian, CPU)
    assert len(val) <= 32  # one chunk
    noise = rng.normal((VAL_DRAWS, len(val), 2 * DIMS), Stream.FLOW, 0)
    offsets = rng.words(len(val), Stream.FLOW, 0, 1) / 2**64
    errors, gaussian_errors = [], []
    for i in range(len(val)):
        x = val.gather(np.array([i])).float() / 255
        mu, logvar = (tensor.flatten() for tensor in model.model.encoder(x))
        for k in range(VAL_DRAWS):
            t = torch.tensor([(k + offsets[i]) / VAL_DRAWS], dtype=torch.float32)
            z = mu + logvar.exp().sqrt() * noise[k, i, :DIMS]
            end, start = (z - field.mean) / field.scale, noise[k, i, DIMS:]
            between = ((1 - t) * start + t * end)[None]
            gaussian = field.velocity(between, t)[0]
            errors.append(float((gaussian + flow(between, t)[0] - (end - start)).double().square().mean()))
            gaussian_errors.append(float((gaussian - (end - start)).double().square().mean()))
    last = records(alone)[-1]
    assert last["val_loss"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert last["val_gaussian_loss"] == pytest.approx(np.mean(gaussian_errors), rel=1e-5)
    assert 0.05 < last["val_gaussian_loss"] < 2


def test_training_loss_of_the_first_step_is_that_of_the_gaussian_field(config: Config, vae: Exported) -> None:
    """The correction is still zero, so a velocity's error is known from the noise of the step alone."""
    once = config.replace(augment=False)
    trainer = Trainer(once, CPU)
    data = Dataset(vae.dataset)
    images = data.train.gather(epoch_order(len(data.train), config.seed, 0)[:12])
    trainer.step(images, 12, 0, 0, 9)
    generator = torch.Generator().manual_seed(rng.seed(Stream.POSTERIOR, config.seed, 0, 0))
    noise = torch.randn((config.samples, 12, 2 * DIMS + 1), generator=generator)
    model = dogvae.load(vae.folder)
    field = GaussianField.of(model.gaussian, CPU)
    with torch.no_grad():
        mu, logvar = (tensor.flatten(1) for tensor in model.model.encoder(images.float() / 255))
    total = 0.0
    for draw in noise:
        posterior, start, t = draw[:, :DIMS], draw[:, DIMS:-1], draw[:, -1].sigmoid()
        end = (mu + logvar.exp().sqrt() * posterior - field.mean) / field.scale
        between = (1 - t[:, None]) * start + t[:, None] * end
        total += float((field.velocity(between, t) - (end - start)).square().mean()) / config.samples
    got = trainer.sums.described(trainer.sums.over_ranks(), 1)["train_loss"]
    assert got == pytest.approx(total, rel=1e-4)
    assert bool(trainer.parameters["out.weight"].detach().any())


def test_stopped_flow_resumes_to_the_same_bits(config: Config, alone: Path, tmp_path: Path) -> None:
    train(config, tmp_path, stop_at=13)
    train(config, tmp_path)
    assert differing(final(alone), final(tmp_path)) == []
    assert records(tmp_path) == records(alone)


@pytest.mark.slow
def test_two_and_three_ranks_train_the_same_flow(config: Config, alone: Path, tmp_path: Path) -> None:
    """With 33 images a step, the last step of 100 images has one: two of three ranks have none."""
    for world_size, own in ((2, config), (3, config.replace(batch_size=33))):
        lines, expected = tmp_path / str(world_size), tmp_path / f"{world_size}-alone"
        train(own, lines, world_size)
        train(own, expected)
        for got, want in zip(records(lines), records(expected), strict=True):
            for name in ("train_loss", "val_loss", "val_gaussian_loss"):
                assert got[name] == pytest.approx(want[name], rel=1e-4)


@pytest.fixture(scope="module")
def with_flow(vae: Exported, config: Config, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The run with its flow, whose loss is made to be the better one, and their export."""
    run = tmp_path_factory.mktemp("exported") / "dogs"
    shutil.copytree(vae.run, run)
    storage, own = flow_config(*open_run(str(run)), SETTINGS)
    shutil.copytree(alone, storage.local)  # type: ignore[arg-type]
    save_config(storage, own)
    assert min(r["val_loss"] for r in records(alone)) < records(alone)[0]["val_gaussian_loss"]
    return replace(vae, run=run, folder=Path(export(*open_run(str(run))).uri))


def test_export_has_the_flow_and_draws_from_it(with_flow: Exported, vae: Exported, alone: Path) -> None:
    model, plain = dogvae.load(with_flow.folder), dogvae.load(vae.folder)
    assert model.priors == ("flow", "gaussian", "normal")
    assert plain.priors == ("gaussian", "normal")
    dogs = model.sample_latents(20, seed=3)
    assert np.array_equal(dogs, model.sample_latents(20, seed=3, prior="flow"))
    np.testing.assert_allclose(dogs[:5], model.sample_latents(5, seed=3), rtol=0, atol=0)  # other batches
    assert np.array_equal(model.sample_latents(5, prior="gaussian"), plain.sample_latents(5))
    assert not np.allclose(dogs[:5], model.sample_latents(5, seed=3, prior="gaussian"), atol=1e-3)
    assert not np.allclose(dogs[:5], model.sample_latents(5, seed=3, guidance=0.0), atol=1e-4)
    about = json.loads((with_flow.folder / "config.json").read_text())
    best = min(records(alone), key=lambda r: r["val_loss"])
    assert about["flow"]["metrics"]["val_loss"] == best["val_loss"]
    assert f"{best['val_loss']:.4f}" in (with_flow.folder / "README.md").read_text()


def test_export_without_the_flow_removes_its_file(with_flow: Exported, tmp_path: Path) -> None:
    run = tmp_path / "dogs"
    shutil.copytree(with_flow.run, run)
    folder = Path(export(*open_run(str(run)), with_flow=False).uri)
    assert not (folder / "flow.safetensors").exists()
    assert dogvae.load(folder).priors == ("gaussian", "normal")


def test_damaged_flow_is_refused(with_flow: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(with_flow.folder, folder)
    content = bytearray((folder / "flow.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "flow.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"flow\.safetensors is damaged"):
        dogvae.load(folder)


def test_what_only_a_flow_has_is_refused_without_one(vae: Exported) -> None:
    model = dogvae.load(vae.folder)
    with pytest.raises(UsageError, match="--prior: this model has no flow; `dogvae fit-prior RUN` trains one"):
        model.sample(1, prior="flow")
    with pytest.raises(UsageError, match="--guidance: only a flow has it"):
        model.sample(1, guidance=1.0)


def test_flow_keeps_its_settings_and_its_vae(with_flow: Exported, tmp_path: Path) -> None:
    run, config = open_run(str(with_flow.run))
    assert flow_config(run, config, {})[1].epochs == 3
    assert flow_config(run, config, {"epochs": 5})[1].epochs == 5
    with pytest.raises(UsageError, match=r"--width: .* was begun with 32, not 64"):
        flow_config(run, config, {"width": 64})
    with pytest.raises(UsageError, match=r"--lr: this run has 0\.003, not 0\.1"):
        flow_config(run, config, {"lr": 0.1})
    storage, own = flow_config(run, config, {})
    about = json.loads((with_flow.folder / "config.json").read_text())
    assert storage.uri.endswith(f"/prior-{about['files']['model.safetensors'][:8]}")
    assert own.flow
    with pytest.raises(UsageError, match="holds another model"):
        Trainer(own.replace(flow=replace(own.flow, weights="0" * 64)), CPU)
    # Another model of the same run gets a folder of its own.
    copy = Storage(tmp_path / "dogs")
    shutil.copytree(with_flow.run, tmp_path / "dogs")
    about["files"]["model.safetensors"] = "1" * 64
    (tmp_path / "dogs/export/config.json").write_text(json.dumps(about))
    assert flow_config(copy, config, {})[0].uri.endswith("/prior-11111111")
