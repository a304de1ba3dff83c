"""The number of workers does not change the result: real processes, gloo, no Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dogvae.config import Config
from dogvae.data.dataset import Dataset, epoch_order
from dogvae.data.drawn import draw
from dogvae.data.writer import Row, write_dataset
from dogvae.errors import UsageError
from dogvae.inference.elbo import evaluate
from dogvae.storage import Storage
from dogvae.training.loop import loop
from dogvae.training.observer import Observer
from dogvae.training.step import Trainer
from tests.conftest import start_ranks

SIZE, TRAIN, VAL, BATCH = 32, 61, 40, 12  # 61 = 5 x 12 + 1: the last batch leaves all ranks but one without an image


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn dogs; in each the first pixel of the red channel is its row, so that an image tells which one it is."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = []
    for i in [*range(TRAIN, TRAIN + VAL), *range(TRAIN)]:
        pixels = np.asarray(draw(i, 0, SIZE)).transpose(2, 0, 1).copy()
        pixels[0, 0, 0] = i if i < TRAIN else 255
        digest = (0 if i >= TRAIN else 2**63).to_bytes(8, "big") + i.to_bytes(24, "big")
        rows.append(Row(f"{i}.png", None, digest, pixels))
    settings = {"size": SIZE, "crop": "center", "val_fraction": 0.4}
    write_dataset(folder, rows, {"kind": "test", "name": "test", "signature": ""}, settings)
    return folder


def _train(rank: int, world_size: int, config: Config, out: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}.init", rank=rank, world_size=world_size)
    seen: list[list[int]] = []
    step = Trainer.step

    def watched(self: Trainer, images: torch.Tensor, *args: Any) -> None:
        seen.append(images[:, 0, 0, 0].tolist())
        step(self, images, *args)

    Trainer.step = watched  # type: ignore[method-assign]
    try:
        loop(config, Storage(out), torch.device("cpu"), Observer())
    finally:
        Trainer.step = step  # type: ignore[method-assign]
    Path(f"{out}.seen{rank}").write_text(json.dumps(seen))
    if world_size > 1:
        assert ("torch._dynamo" in sys.modules) == (config.compile == "on")  # its import takes longer than torch's
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0
    Path(f"{out}.graphs{rank}").write_text(str(graphs))
    if world_size > 1:
        dist.destroy_process_group()


def train(world_size: int, config: Config, out: Path) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The records of the epochs, and the images of every global batch in order."""
    if world_size == 1:
        _train(0, 1, config, str(out))
    else:
        start_ranks(_train, world_size, world_size, config, str(out))
    seen = [json.loads(Path(f"{out}.seen{rank}").read_text()) for rank in range(world_size)]
    batches = [[image for part in parts for image in part] for parts in zip(*seen, strict=True)]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], batches


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_training_on_1_2_and_3_workers(dataset: Path, tmp_path: Path, norm: str) -> None:
    config = Config.make(norm=norm, width=4, latent_dim=4, epochs=2, samples=2).for_data(
        str(dataset), Dataset(dataset).fingerprint, SIZE, TRAIN
    )
    config = config.replace(batch_size=BATCH)
    alone, order = train(1, config, tmp_path / "1")
    for epoch in (0, 1):
        expected = epoch_order(TRAIN, config.seed, epoch)
        assert [i for batch in order[epoch * 6 : epoch * 6 + 6] for i in batch] == expected.tolist()
    for world_size in (2, 3):
        records, batches = train(world_size, config, tmp_path / str(world_size))
        assert batches == order
        for ours, theirs in zip(records, alone, strict=True):
            assert ours["world_size"] == world_size
            for name in ("val_loss", "val_reconstruction", "train_loss", "val_psnr"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def _evaluate(rank: int, world_size: int, data: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.init", rank=rank, world_size=world_size)
    Path(f"{out}.{rank}").write_text(json.dumps(_validation(data, rank, world_size)))
    dist.destroy_process_group()


def _validation(data: str, rank: int, world_size: int) -> dict[str, float]:
    config = Config.make(width=4, latent_dim=4, image_size=SIZE)
    torch.manual_seed(1)
    trainer_model = Trainer(config, torch.device("cpu")).evaluated_model
    torch.nn.init.normal_(trainer_model.decoder.layers[-1].weight, std=0.3)  # so that the pictures are not all grey
    return evaluate(trainer_model, Dataset(data).val, torch.device("cpu"), rank, world_size)


@pytest.mark.slow
def test_validation_is_the_same_number_on_1_2_and_4_workers(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = _validation(str(dataset), 0, 1)
    torch.set_num_threads(threads)
    for world_size in (2, 4):
        out = str(tmp_path / str(world_size))
        start_ranks(_evaluate, world_size, world_size, str(dataset), out)
        for rank in range(world_size):
            assert json.loads(Path(f"{out}.{rank}").read_text()) == alone


def _step(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/init", rank=rank, world_size=2)
    images = torch.arange(4 * 3 * SIZE**2).view(4, 3, SIZE, SIZE).remainder(251).to(torch.uint8)
    gradients = []
    for compression in ("none", "bf16"):
        config = Config.make(width=4, latent_dim=4, image_size=SIZE, batch_size=4, gradient_compression=compression)
        trainer = Trainer(config, torch.device("cpu"))
        trainer.step(images[2 * rank : 2 * rank + 2], 4, epoch=0, step=0, steps=5)
        gradients.append([p.grad for p in trainer.parameters.values()])
    torch.save(gradients, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_are_exchanged_in_half_their_size(tmp_path: Path) -> None:
    start_ranks(_step, 2, str(tmp_path))
    (full, half), (_, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for exact, rounded, other in zip(full, half, others, strict=True):
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert torch.equal(rounded, other)
        assert (rounded - exact).norm() <= 2**-7 * exact.norm()  # a bfloat16 has 8 bits
    assert not all(torch.equal(exact, exact.bfloat16().float()) for exact in full)


@pytest.mark.slow
def test_compiled_is_the_same(dataset: Path, tmp_path: Path) -> None:
    """On two workers, with batches that are short and slices that are empty."""
    config = Config.make(width=4, latent_dim=4, epochs=2, samples=2, batch_size=BATCH)
    config = config.for_data(str(dataset), Dataset(dataset).fingerprint, SIZE, TRAIN)
    plain, _ = train(2, config, tmp_path / "plain")
    compiled, _ = train(2, config.replace(compile="on"), tmp_path / "compiled")
    assert (tmp_path / "plain.graphs0").read_text() == "0"
    assert int((tmp_path / "compiled.graphs0").read_text()) > 5
    for ours, theirs in zip(compiled, plain, strict=True):
        for name in ("val_loss", "val_reconstruction", "train_loss", "val_psnr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def test_compiling_without_a_compiler(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = Config.make(width=4, compile="on").for_data(str(dataset), Dataset(dataset).fingerprint, SIZE, TRAIN)
    with pytest.raises(UsageError, match=r"--compile on: .* has no C\+\+ compiler no-such-compiler"):
        loop(config, Storage(tmp_path / "run"), torch.device("cpu"), Observer())
    assert not (tmp_path / "run").exists()
