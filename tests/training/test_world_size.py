"""Training and validation on 1 to 4 ranks give the same numbers: real processes, gloo, no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dogvae.config import Config
from dogvae.data.dataset import Dataset, epoch_order
from dogvae.inference.elbo import evaluate
from dogvae.storage import Storage
from dogvae.training.loop import loop
from dogvae.training.observer import Observer
from dogvae.training.step import Trainer
from tests.support.ranks import on_ranks
from tests.support.runs import SIZE, drawn_dogs, records, write_images

TRAIN, VAL, BATCH = 61, 40, 12  # 61 = 5 x 12 + 1: the last batch leaves all ranks but one without an image
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn dogs. The first red pixel of each training image is its number, so that the image can be recognised."""
    dogs = drawn_dogs(TRAIN + VAL)
    for i, pixels in enumerate(dogs):
        pixels[0, 0, 0] = i
    return write_images(tmp_path_factory.mktemp("world") / "dataset", train=dogs[:TRAIN], val=dogs[TRAIN:])


def _train(rank: int, config: Config, out: str) -> None:
    seen: list[list[int]] = []
    step = Trainer.step

    def watched(self: Trainer, images: torch.Tensor, *args: Any) -> None:
        seen.append(images[:, 0, 0, 0].tolist())
        step(self, images, *args)

    Trainer.step = watched  # type: ignore[method-assign]
    try:
        loop(config, Storage(out), CPU, Observer())
    finally:
        Trainer.step = step  # type: ignore[method-assign]
    Path(f"{out}.seen{rank}").write_text(json.dumps(seen))


def train(world_size: int, config: Config, out: Path) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The records of the epochs, and the numbers of the images of each global batch in order."""
    if world_size == 1:
        _train(0, config, str(out))
    else:
        on_ranks(world_size, _train, config, str(out))
    seen = [json.loads(Path(f"{out}.seen{rank}").read_text()) for rank in range(world_size)]
    batches = [[image for part in parts for image in part] for parts in zip(*seen, strict=True)]
    return records(out), batches


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "notebook"])
def test_1_2_and_3_ranks_train_on_the_same_batches_to_the_same_losses(
    dataset: Path, tmp_path: Path, preset: str
) -> None:
    settings = dict(preset=preset, width=4, latent_dim=4, latent_size=4, epochs=2, samples=2, batch_size=BATCH)
    config = Config.make(**settings).for_data(str(dataset), Dataset(dataset).fingerprint, SIZE, TRAIN)
    alone, order = train(1, config, tmp_path / "1")
    for epoch in (0, 1):
        expected = epoch_order(TRAIN, config.seed, epoch)
        assert [i for batch in order[epoch * 6 : epoch * 6 + 6] for i in batch] == expected.tolist()
    for world_size in (2, 3):
        lines, batches = train(world_size, config, tmp_path / str(world_size))
        assert batches == order
        for got, expected in zip(lines, alone, strict=True):
            for name in ("val_loss", "val_reconstruction", "val_sigma", "val_bits_per_dim", "train_loss", "val_psnr"):
                assert got[name] == pytest.approx(expected[name], rel=1e-3)


def _validate(rank: int, data: str, world_size: int, out: str) -> None:
    torch.manual_seed(1)
    model = Trainer(Config.make(width=4, latent_dim=4, latent_size=4, image_size=SIZE), CPU).model
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # so that the pictures are not all grey
    figures = evaluate(model, Dataset(data).val, CPU, rank, world_size)
    Path(f"{out}.{rank}").write_text(json.dumps(figures))


@pytest.mark.slow
def test_validation_is_the_same_bit_for_bit_on_1_2_and_4_ranks(dataset: Path, tmp_path: Path) -> None:
    _validate(0, str(dataset), 1, str(tmp_path / "1"))
    alone = json.loads((tmp_path / "1.0").read_text())
    for world_size in (2, 4):
        on_ranks(world_size, _validate, str(dataset), world_size, str(tmp_path / str(world_size)))
        for rank in range(world_size):
            assert json.loads((tmp_path / f"{world_size}.{rank}").read_text()) == alone
