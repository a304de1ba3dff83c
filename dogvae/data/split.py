"""The train/validation split: which photos are for training, and which for validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dogvae.data.writer import Row


def is_val(digest: bytes, val_fraction: float) -> bool:
    """Whether the photo with this SHA-256 is for validation.

    The hash decides alone: duplicates fall on the same side, and adding or removing photos moves no other photo.
    """
    return int.from_bytes(digest[:8], "big") / 2**64 < val_fraction


def assign_splits(rows: Iterable[Row], val_fraction: float) -> Iterator[tuple[str, Row]]:
    """Yield each row with its split, "train" or "val".

    There is at least one validation photo: if `is_val` chooses none, the photo with the smallest hash is taken. Its
    rows, and those of its duplicates, are held back until a validation photo comes or a smaller hash.
    """
    held: list[Row] = []
    has_val = False
    for row in rows:
        if is_val(row.digest, val_fraction):
            yield from (("train", other) for other in held)
            held, has_val = [], True
            yield "val", row
        elif has_val or (held and row.digest > held[0].digest):
            yield "train", row
        elif held and row.digest == held[0].digest:
            held.append(row)
        else:
            yield from (("train", other) for other in held)
            held = [row]
    yield from (("val", row) for row in held)
