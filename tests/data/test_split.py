"""The train/validation split: decided by hashes alone, without losses, and never empty."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from dogvae.data.split import assign_splits, is_val
from dogvae.data.writer import Row


def sha(n: int) -> bytes:
    return hashlib.sha256(str(n).encode()).digest()


def assigned(numbers: list[int], val_fraction: float) -> dict[str, list[int]]:
    """The numbers in each split, in order; equal numbers are duplicates of a photo."""
    splits: dict[str, list[int]] = {"train": [], "val": []}
    for split, row in assign_splits([Row(str(n), None, sha(n), str(n)) for n in numbers], val_fraction):
        splits[split].append(int(row.path))
    return splits


def test_share_of_validation_photos_is_val_fraction() -> None:
    assert abs(sum(is_val(sha(i), 0.05) for i in range(20_000)) - 1000) < 150  # 5 standard deviations
    assert is_val(bytes(32), 1e-12)
    assert not is_val(b"\xff" * 32, 0.999999)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.floats(0.05, 0.95))
def test_hash_alone_decides_the_split(numbers: list[int], val_fraction: float) -> None:
    """So duplicates stay together, and adding photos moves no other photo."""
    splits = assigned(numbers, val_fraction)
    expected = [n for n in numbers if is_val(sha(n), val_fraction)]
    if expected:
        assert splits["val"] == expected
    assert sorted(splits["train"] + splits["val"]) == sorted(numbers)
    assert not set(splits["train"]) & set(splits["val"])


def test_photo_with_the_smallest_hash_is_for_validation_if_no_other_is() -> None:
    numbers = [*range(50), *range(0, 50, 2)]  # every second photo twice
    smallest = min(range(50), key=sha)
    splits = assigned(numbers, 1e-9)
    assert splits["val"] == [smallest] * numbers.count(smallest)
    assert sorted(splits["train"]) == sorted(n for n in numbers if n != smallest)
