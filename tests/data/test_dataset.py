"""A prepared dataset: the order of its images, their batches, and what is said when its files are damaged."""

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

from dogvae.data.dataset import Batches, Dataset, Split, epoch_order, pixel_sums, rank_slice
from dogvae.errors import UsageError
from tests.conftest import WriteDataset
from tests.support.datasets import flip_bit, noise

CPU = torch.device("cpu")


@pytest.fixture
def arrays() -> list[np.ndarray]:
    """Three shards of 5, 1 and 7 images."""
    return [noise(n, n, side=8) for n in (5, 1, 7)]


@pytest.fixture
def folder(write_dataset: WriteDataset, arrays: list[np.ndarray]) -> Path:
    return write_dataset(arrays, [noise(4, 4, side=8)])


# --- the order of the images


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_epoch_order_is_a_permutation_of_seed_and_epoch(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    np.random.seed(epoch)  # NumPy's global generator must not matter
    assert np.array_equal(epoch_order(n, seed, epoch), order)
    if n > 50:
        assert not np.array_equal(epoch_order(n, seed, epoch + 1), order)
        assert not np.array_equal(epoch_order(n, seed ^ 1, epoch), order)


def test_epoch_order_never_changes() -> None:
    """Runs are resumed with other versions of NumPy and of this project."""
    assert epoch_order(12, seed=7, epoch=3).tolist() == [1, 3, 5, 9, 6, 11, 7, 10, 4, 0, 2, 8]


def test_epoch_order_is_uniform() -> None:
    """Each of 8 images comes first in 1/8 of 4000 epochs, within 5 standard deviations."""
    first = np.bincount([epoch_order(8, 0, epoch)[0] for epoch in range(4000)], minlength=8)
    assert np.abs(first - 500).max() < 5 * np.sqrt(4000 * (1 / 8) * (7 / 8))


@given(st.integers(0, 5000), st.integers(1, 200))
def test_rank_slices_cover_a_batch_evenly(n: int, world_size: int) -> None:
    parts = [list(range(n))[rank_slice(n, rank, world_size)] for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(n))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


# --- reading images


def test_gather_reads_across_shards(folder: Path, arrays: list[np.ndarray]) -> None:
    whole = np.concatenate(arrays)
    split = Dataset(folder).train
    assert len(split) == 13
    assert split.image_shape == (3, 8, 8)
    assert split.nbytes == whole.nbytes
    for indices in (np.arange(13), np.arange(13)[::-1], np.array([4, 5, 6, 5, 12, 0, 4]), np.array([], np.int64)):
        images = split.gather(indices)
        assert images.dtype == torch.uint8
        assert np.array_equal(images.numpy(), whole[indices])


def test_gather_copies_from_a_single_shard(folder: Path) -> None:
    val, stored = Dataset(folder).val, noise(4, 4, side=8)
    assert np.array_equal(val.gather(np.array([3, 0, 3])).numpy(), stored[[3, 0, 3]])
    val.gather(np.array([0])).zero_()  # writing to a batch must not change the file
    assert np.array_equal(val.gather(np.array([0])).numpy(), stored[:1])


def test_split_without_shards_is_empty(tmp_path: Path) -> None:
    assert len(Split(tmp_path, [], 8)) == 0


def test_batches_come_in_the_order_of_their_indices(folder: Path, arrays: list[np.ndarray]) -> None:
    whole = np.concatenate(arrays)
    split = Dataset(folder).train
    indices = [np.array([3, 9, 1]), np.array([], np.int64), np.array([12]), np.arange(13)]
    for wanted, batch in zip(indices, Batches(split, CPU)(indices), strict=True):
        assert batch.dtype == torch.uint8
        assert np.array_equal(batch.numpy(), whole[wanted])
    assert list(Batches(split, CPU)([])) == []
    with pytest.raises(IndexError):
        list(Batches(split, CPU)([np.array([0]), np.array([13])]))


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_pixel_sums_equal_those_of_numpy(folder: Path, arrays: list[np.ndarray], chunk: int) -> None:
    whole = np.concatenate(arrays).astype(np.int64)
    total, squares = pixel_sums(Dataset(folder).train, chunk).numpy()
    assert np.array_equal(total, whole.sum(axis=0))
    assert np.array_equal(squares, (whole**2).sum(axis=0))


# --- damage


def refusal(folder: Path) -> str:
    """The error, one line, that opening the dataset ends with."""
    with pytest.raises(UsageError) as error:
        Dataset(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_truncated_or_missing_shard_is_named(folder: Path) -> None:
    shard = folder / "train-00002.npy"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    assert f"{shard} has {len(data) - 1} bytes, not {len(data)}" in refusal(folder)
    shard.unlink()
    assert f"{shard} cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    "array",
    [
        noise(7, side=8).astype(np.float32),
        noise(7, side=8).astype(np.int8),
        noise(7, side=8).transpose(0, 2, 3, 1),
        noise(6, side=8),
        noise(7, side=16),
        noise(7, side=8)[0],
        np.array([{"x": 1}] * 7, dtype=object),  # a pickle, which is never opened
        b"not an array",
    ],
    ids=lambda array: "bytes" if isinstance(array, bytes) else f"{array.dtype}{array.shape}",
)
def test_shard_with_other_contents_is_refused(folder: Path, array: np.ndarray | bytes) -> None:
    shard = folder / "train-00002.npy"
    if isinstance(array, bytes):
        shard.write_bytes(array)
    else:
        np.save(shard, array, allow_pickle=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][2]["bytes"] = shard.stat().st_size  # or the length would be refused
    (folder / "manifest.json").write_text(json.dumps(manifest))
    is_array = isinstance(array, np.ndarray) and array.dtype != object
    assert f"{shard} {f'holds {array.dtype}' if is_array else 'cannot be read'}" in refusal(folder)


def test_folder_without_a_dataset_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert f"{folder} is not a prepared dataset: it has no manifest.json" in refusal(folder)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [(data, "cannot be read") for data in (b"", b"not json", b'{"format": "dogvae-dataset"', b"\xff\xfe\x00")]
    + [
        (data, "is not the manifest of a prepared dataset")
        for data in (b"[]", b"null", b'"dogvae-dataset"', b"{}", b'{"format": "coco", "version": 1}')
    ]
    + [({"version": version}, f"version {version}, but this dogvae reads 1") for version in (2, 0, "1", None)]
    + [
        ({"splits": splits}, "is damaged")
        for splits in ({}, None, {"train": {"shards": [{}]}}, {"train": {"shards": []}})
    ]
    + [(b"[" * 100_000, "nested"), (b'{"a":' * 100 + b"1" + b"}" * 100, "nested"), (b"9" * 5000, "cannot be read")]
    + [
        ({"settings": None}, "is damaged (settings is None)"),
        ({"rejected": "no"}, "is damaged (rejected is 'no')"),
        ({"size": 16}, "is damaged (its fingerprint is not that of its shards)"),
        ({"fingerprint": "0" * 64}, "is damaged (its fingerprint is not that of its shards)"),
    ],
)
def test_bad_manifest_is_refused(folder: Path, manifest: bytes | dict[str, Any], message: str) -> None:
    path = folder / "manifest.json"
    if isinstance(manifest, dict):
        manifest = json.dumps({**json.loads(path.read_text()), **manifest}).encode()
    path.write_bytes(manifest)
    assert message in refusal(folder)
    assert str(folder) in refusal(folder)
    assert "manifest.json" in refusal(folder)


def edited(folder: Path, split: str, edit: Callable[[dict[str, Any]], None]) -> str:
    """Why a dataset is refused after an edit of a split in its manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest["splits"][split])
    path.write_text(json.dumps(manifest))
    return refusal(folder)


@pytest.mark.parametrize(
    ("split", "edit", "message"),
    [
        ("val", lambda s: s.update(shards=[], count=0), "the split val has no shards"),
        ("train", lambda s: s.update(shards=[]), "the split train has no shards"),
        ("train", lambda s: s.update(shards=s["shards"] * 2), "the shards of train do not have 13 images together"),
        ("train", lambda s: s.update(shards=s["shards"] * 2, count=26), "a shard is listed twice"),
        ("train", lambda s: s["shards"].pop(), "the shards of train do not have 13 images together"),
        ("train", lambda s: s["shards"][0].update(count=True), "train-00000.npy has True images"),
        ("train", lambda s: s["shards"][0].update(bytes=-1), "and -1 bytes"),
        ("train", lambda s: s["shards"][0].update(sha256="0" * 64), "its fingerprint is not that of its shards"),
        ("val", lambda s: s["shards"][0].pop("sha256"), "no 'sha256'"),
    ],
)
def test_edited_split_is_damaged(
    folder: Path, split: str, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    told = edited(folder, split, edit)
    assert "manifest.json is damaged (" in told
    assert message in told


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_each_shard_is_verified_by_one_rank(folder: Path, world_size: int) -> None:
    def complaint(rank: int) -> str:
        try:
            assert Dataset(folder).verify(rank, world_size) == []
        except UsageError as error:
            return str(error)
        return ""

    for name in ("train-00000.npy", "train-00001.npy", "train-00002.npy", "val-00000.npy"):
        assert "".join(map(complaint, range(world_size))) == ""
        flip_bit(folder / name)
        complaints = [complaint(rank) for rank in range(world_size)]
        assert [f"{name} is not what was prepared" in line for line in complaints if line] == [True]
        flip_bit(folder / name)
