"""What `--data` selects for a run: a prepared dataset, or photos that are prepared once and then reused."""

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


CACHE = ".datasets"  # in the runs folder; names of runs do not start with a dot
DEFAULT_DATA = "portraits:2000"  # for a run without --data


@dataclass(frozen=True)
class DataChoice:
    """The data of a run, and how photos are prepared for it."""

    data: str = DEFAULT_DATA
    """A source of photos (see `open_source`), or the path or URI of a prepared dataset."""
    image_size: int | None = None
    """Side of the images in pixels. None, here and below: the default for photos, any value for a dataset."""
    crop: str | None = None
    val_fraction: float | None = None

    def check(self) -> None:
        """Raise UsageError if `data` is neither photos nor a dataset, or a dataset with other settings."""
        if not self._is_prepared:
            open_source(self.data, self.crop or CROPS[0])
            return
        self._check_settings(self.data)

    def _check_settings(self, prepared: str) -> None:
        settings = read_manifest(prepared)["settings"]
        for flag, name, value in (
            ("--image-size", "size", self.image_size),
            ("--crop", "crop", self.crop),
            ("--val-fraction", "val_fraction", self.val_fraction),
        ):
            if value is not None and value != (has := settings.get(name)):
                raise UsageError(f"{flag}: {prepared} was prepared with {has}; prepare the photos again for {value}")

    def resumed(self, prepared: str, fingerprint: str) -> str:
        """Where the data of a run are that began with the dataset `prepared`: a copy of it may have another place.

        Photos must be those that the dataset was made of. Raises UsageError if this choice is other data.
        """
        self._check_settings(self.data if self._is_prepared else prepared)
        if self._is_prepared:
            read_manifest(self.data, fingerprint)
            return absolute(self.data)
        manifest = read_manifest(prepared)
        source = open_source(self.data, manifest["settings"].get("crop", CROPS[0]))
        if source.signature() != manifest["source"].get("signature"):
            raise UsageError(
                f"--data: {self.data} is not what this run was trained on, or has changed; without --data it goes on "
                f"with {prepared}"
            )
        return prepared

    def open(self, runs: str) -> Dataset:
        """Open the dataset. Photos are prepared once, into a cache in the folder `runs`, or on this node for a URI."""
        from dogvae.data.dataset import Dataset

        if self._is_prepared:
            return Dataset(absolute(self.data))
        from dogvae.data.prepare import cached

        cache = Storage(runs).local or cache_folder()
        settings: dict[str, Any] = {"size": self.image_size, "crop": self.crop, "val_fraction": self.val_fraction}
        return Dataset(cached(self.data, cache / CACHE, **{k: v for k, v in settings.items() if v is not None}))

    @property
    def _is_prepared(self) -> bool:
        return is_uri(self.data) or (Path(self.data).expanduser() / MANIFEST).exists()


def absolute(data: str) -> str:
    """`data`, a path or URI, made independent of the working directory."""
    if is_uri(data) and not data.startswith("file://"):
        return data
    path = str(Storage(data).local)
    return f"file://{path}" if is_uri(data) else path
