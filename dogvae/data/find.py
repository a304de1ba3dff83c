"""Which dataset a run learns from: a prepared one, or photos that are prepared once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dogvae.config import CROPS
from dogvae.data.manifest import MANIFEST, read_manifest
from dogvae.data.source import open_source
from dogvae.errors import UsageError
from dogvae.storage import Storage, cache_folder, is_uri

if TYPE_CHECKING:
    from dogvae.data.dataset import Dataset


CACHE = ".datasets"  # below the runs, hidden: no run can be called so
DRAWN = "portraits:2000"  # what a run without --data learns from


@dataclass(frozen=True)
class DataChoice:
    """What a run learns from, and how photos become its images."""

    data: str = DRAWN
    """Photos, as `open_source` takes them, or a prepared dataset."""
    image_size: int | None = None
    """Side of the images in pixels. None, here and below, is the default for photos, and what a dataset has."""
    crop: str | None = None
    val_fraction: float | None = None

    def check(self) -> None:
        """UsageError, at once, if `data` is neither photos nor a dataset, or a dataset with other settings."""
        if not self._is_prepared:
            open_source(self.data, self.crop or CROPS[0])
            return
        settings = read_manifest(self.data)["settings"]
        for flag, name, value in (
            ("--image-size", "size", self.image_size),
            ("--crop", "crop", self.crop),
            ("--val-fraction", "val_fraction", self.val_fraction),
        ):
            if value is not None and value != (has := settings[name]):
                raise UsageError(f"{flag}: {self.data} was prepared with {has}; prepare the photos again for {value}")

    def open(self, runs: str) -> Dataset:
        """The dataset that `data` is, or that is made of the photos, once, in a cache beside the runs."""
        from dogvae.data.dataset import Dataset

        if self._is_prepared:
            return Dataset(absolute(self.data))
        from dogvae.data.prepare import cached

        cache = Storage(runs).local or cache_folder()
        settings: dict[str, Any] = {"size": self.image_size, "crop": self.crop, "val_fraction": self.val_fraction}
        return Dataset(cached(self.data, cache / CACHE, **{k: v for k, v in settings.items() if v is not None}))

    @property
    def _is_prepared(self) -> bool:
        return is_uri(self.data) or (Path(self.data) / MANIFEST).exists()


def absolute(data: str) -> str:
    """The path or URI of a dataset that means the same in every process, wherever it runs."""
    if is_uri(data) and not data.startswith("file://"):
        return data
    path = str(Storage(data).local)
    return f"file://{path}" if is_uri(data) else path
