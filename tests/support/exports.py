"""A small trained model and its export, which tests share."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from dogvae.config import FlowConfig
from dogvae.network.flow import Flow
from dogvae.storage import Storage
from dogvae.training.export import export
from dogvae.training.run_folder import save_config
from tests.support.runs import job, make_dataset, train

LATENT = (2, 4, 4)
DIMS = 2 * 4 * 4  # of a latent


@dataclass(frozen=True)
class Exported:
    """A finished run called `dogs`, its dataset and its export. Tests that change a file copy the folder first."""

    dataset: Path
    run: Path
    folder: Path


def train_and_export(where: Path) -> Exported:
    """Train a model of 2 x 4 x 4 latents on 100 drawn dogs, and export it."""
    config = job(make_dataset(where / "dataset"), epochs=4, latent_dim=LATENT[0], lr=1e-2)
    run = where / "dogs"
    train(config, run)
    save_config(Storage(run), config)
    return Exported(Path(config.data), run, Path(export(Storage(run), config).uri))


def with_flow(exported: Exported, folder: Path) -> Path:
    """A copy of the export with an untrained flow, whose correction of the Gaussian is random."""
    shutil.copytree(exported.folder, folder)
    torch.manual_seed(0)
    flow = Flow(FlowConfig(width=32, depth=1), LATENT)
    torch.nn.init.normal_(flow.out.weight, std=0.1)
    content = safetensors.torch.save(flow.state_dict())
    (folder / "flow.safetensors").write_bytes(content)
    about = json.loads((folder / "config.json").read_text())
    about["flow"] = {"settings": {"width": 32, "depth": 1}, "metrics": {}}
    about["files"]["flow.safetensors"] = hashlib.sha256(content).hexdigest()
    (folder / "config.json").write_text(json.dumps(about))
    return folder
