"""A small trained model and its export, which tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
