"""A prepared dataset: the order of its images, their gathering, and what is said when it is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dogvae.data import writer as shards
from dogvae.data.dataset import Batches, Dataset, Split, epoch_order, grey_levels, moments, rank_slice
from dogvae.data.writer import Row
from dogvae.errors import UsageError

CPU = torch.device("cpu")
Writer = Callable[..., Path]


def noise(n: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, side, side), np.uint8)


@pytest.fixture
def arrays() -> list[np.ndarray]:
    """Three shards of 5, 1 and 7 images."""
    return [noise(5, seed=1), noise(1, seed=2), noise(7, seed=3)]


@pytest.fixture
def folder(write_dataset: Writer, arrays: list[np.ndarray]) -> Path:
    return write_dataset(arrays, [noise(4, seed=4)])


# --- the order of the images


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_epoch_order_is_a_permutation_of_seed_and_epoch(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    np.random.seed(epoch)  # the global state must not matter
    assert np.array_equal(epoch_order(n, seed, epoch), order)
    if n > 50:
        assert not np.array_equal(epoch_order(n, seed, epoch + 1), order)
        assert not np.array_equal(epoch_order(n, seed ^ 1, epoch), order)


def test_epoch_order_is_pinned() -> None:
    """Runs are resumed with other versions of numpy and of us: these numbers must never change."""
    assert epoch_order(12, seed=7, epoch=3).tolist() == [1, 3, 5, 9, 6, 11, 7, 10, 4, 0, 2, 8]


def test_epoch_order_is_shuffled_evenly() -> None:
    """Every image comes first about as often as any other: 4000 epochs of 8 images, within 5 standard deviations."""
    first = np.bincount([epoch_order(8, 0, epoch)[0] for epoch in range(4000)], minlength=8)
    assert np.abs(first - 500).max() < 5 * np.sqrt(4000 * (1 / 8) * (7 / 8))


@given(st.integers(0, 5000), st.integers(1, 200))
def test_rank_slices_partition_evenly(n: int, world_size: int) -> None:
    parts = [list(range(n))[rank_slice(n, rank, world_size)] for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(n))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


# --- gathering


def test_gather_over_shards_is_the_concatenation(folder: Path, arrays: list[np.ndarray]) -> None:
    whole = np.concatenate(arrays)
    split = Dataset(folder).train
    assert len(split) == 13
    assert split.image_shape == (3, 8, 8)
    assert split.nbytes == whole.nbytes
    for indices in (np.arange(13), np.arange(13)[::-1], np.array([4, 5, 6, 5, 12, 0, 4]), np.array([], np.int64)):
        got = split.gather(indices)
        assert got.dtype == torch.uint8
        assert np.array_equal(got.numpy(), whole[indices])


def test_gather_from_one_shard(folder: Path) -> None:
    val = Dataset(folder).val
    assert np.array_equal(val.gather(np.array([3, 0, 3])).numpy(), noise(4, seed=4)[[3, 0, 3]])
    val.gather(np.array([0])).zero_()  # a batch is a copy: writing to it must not reach the file
    assert np.array_equal(val.gather(np.array([0])).numpy(), noise(4, seed=4)[:1])


def test_batches_come_in_order(folder: Path, arrays: list[np.ndarray]) -> None:
    whole = np.concatenate(arrays)
    split = Dataset(folder).train
    asked = [np.array([3, 9, 1]), np.array([], np.int64), np.array([12]), np.arange(13)]
    got = list(Batches(split, CPU)(asked))
    assert len(got) == len(asked)
    for indices, batch in zip(asked, got, strict=True):
        assert batch.dtype == torch.uint8
        assert np.array_equal(batch.numpy(), whole[indices])
    assert list(Batches(split, CPU)([])) == []


def test_batches_tell_of_a_bad_index(folder: Path) -> None:
    with pytest.raises(IndexError):
        list(Batches(Dataset(folder).val, CPU)([np.array([0]), np.array([4])]))


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_moments_and_grey_levels(folder: Path, arrays: list[np.ndarray], chunk: int) -> None:
    whole = np.concatenate(arrays).astype(np.float64) / 255
    mean, square = moments(Dataset(folder).train, chunk)
    assert mean.dtype == square.dtype == torch.float64
    assert np.abs(mean.numpy() - whole.mean(axis=0)).max() < 1e-14
    assert np.abs(square.numpy() - (whole**2).mean(axis=0)).max() < 1e-14
    counts = grey_levels(Dataset(folder).train, chunk)
    assert np.array_equal(counts, np.histogram(np.concatenate(arrays), bins=np.arange(257))[0])


# --- what `dogvae prepare` writes


def test_opens_what_prepare_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * 3 * 8 * 8)  # 4 images a shard
    images = noise(11)
    rows = [Row(f"{i}.png", None, bytes([255 if i % 3 else 0]) * 32, image) for i, image in enumerate(images)]
    out = tmp_path / "out"
    out.mkdir()
    written = shards.write_dataset(out, rows, {"name": "noise"}, {"size": 8, "val_fraction": 0.5})
    dataset = Dataset(out)
    assert (dataset.size, dataset.fingerprint) == (8, written["fingerprint"])
    assert len(list(out.glob("train-*.npy"))) == 2
    for split, rest in ((dataset.train, [1, 2]), (dataset.val, [0])):
        expected = images[[i for i in range(11) if i % 3 in rest]]
        assert np.array_equal(split.gather(np.arange(len(split))).numpy(), expected)
    dataset.verify()


# --- damage


def shard(folder: Path, name: str = "train-00002.npy") -> Path:
    return folder / name


def manifest(folder: Path, **changes: Any) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def refused(folder: Path, file: Path) -> str:
    """The one line that opening it ends with, which must name the file."""
    with pytest.raises(UsageError) as error:
        Dataset(folder)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_truncated_shard(folder: Path) -> None:
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[:-1])
    assert f"{len(data) - 1} bytes, not {len(data)}" in refused(folder, shard(folder))


def test_missing_shard(folder: Path) -> None:
    shard(folder).unlink()
    assert "cannot be read" in refused(folder, shard(folder))


def replace_shard(folder: Path, data: bytes) -> None:
    """Other bytes, of which the manifest knows the length: as if a bug of ours had written them."""
    shard(folder).write_bytes(data)
    path = folder / "manifest.json"
    changed = json.loads(path.read_text())
    changed["splits"]["train"]["shards"][2]["bytes"] = len(data)
    path.write_text(json.dumps(changed))


def array_bytes(folder: Path, array: np.ndarray) -> bytes:
    np.save(folder / "other.npy", array, allow_pickle=True)
    return (folder / "other.npy").read_bytes()


@pytest.mark.parametrize(
    "array",
    [
        noise(7).astype(np.float32),
        noise(7).astype(np.int8),
        noise(7).transpose(0, 2, 3, 1),
        noise(6),
        noise(7, side=16),
        noise(7)[0],
    ],
)
def test_shard_of_another_shape_or_type(folder: Path, array: np.ndarray) -> None:
    replace_shard(folder, array_bytes(folder, array))
    assert str(array.dtype) in refused(folder, shard(folder))


def test_shard_that_is_no_array(folder: Path) -> None:
    replace_shard(folder, b"not an array")
    refused(folder, shard(folder))


def test_pickles_are_never_opened(folder: Path) -> None:
    replace_shard(folder, array_bytes(folder, np.array([{"x": 1}] * 7, dtype=object)))
    refused(folder, shard(folder))


def test_no_dataset_there(tmp_path: Path) -> None:
    assert "manifest.json" in refused(tmp_path, tmp_path)
    refused(tmp_path / "nowhere", tmp_path / "nowhere")


@pytest.mark.parametrize("data", [b"", b"not json", b'{"format": "dogvae-dataset"', b"\xff\xfe\x00"])
def test_manifest_that_is_no_json(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    assert "manifest.json" in refused(folder, folder)


@pytest.mark.parametrize("text", ["[]", "null", '"dogvae-dataset"', "{}", '{"format": "coco", "version": 1}'])
def test_foreign_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    refused(folder, folder / "manifest.json")


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_other_version(folder: Path, version: Any) -> None:
    message = refused(folder, manifest(folder, version=version))
    assert f"version {version}" in message
    assert "reads 1" in message


@pytest.mark.parametrize("changes", [{"splits": {}}, {"splits": None}, {"splits": {"train": {"shards": [{}]}}}])
def test_manifest_with_parts_missing(folder: Path, changes: dict[str, Any]) -> None:
    refused(folder, manifest(folder, **changes))


def test_verify_finds_a_flipped_bit(folder: Path) -> None:
    Dataset(folder).verify()
    for name in ("train-00001.npy", "val-00000.npy"):
        data = bytearray(shard(folder, name).read_bytes())
        data[-7] ^= 1
        shard(folder, name).write_bytes(data)
        with pytest.raises(UsageError, match=f"{name} .*checksum"):
            Dataset(folder).verify()
        data[-7] ^= 1
        shard(folder, name).write_bytes(data)
    Dataset(folder).verify()


def complaint(folder: Path, rank: int, world_size: int) -> str:
    """What this rank says about the dataset; nothing if it finds no fault."""
    try:
        Dataset(folder).verify(rank, world_size)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_every_shard_is_verified_by_one_rank(folder: Path, world_size: int) -> None:
    for name in ("train-00000.npy", "train-00001.npy", "train-00002.npy", "val-00000.npy"):
        data = shard(folder, name).read_bytes()
        shard(folder, name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        told = [complaint(folder, rank, world_size) for rank in range(world_size)]
        assert [name in line for line in told if line] == [True]
        shard(folder, name).write_bytes(data)


def test_split_without_shards_is_empty(tmp_path: Path) -> None:
    assert len(Split(tmp_path, [], 8)) == 0
