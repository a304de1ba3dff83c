"""A folder on a disk, a network share or an object store: whole files, written at once or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from dogvae.errors import UsageError

BLOCK = 8 * 2**20  # bytes; each is a request of its own to an object store


def is_uri(place: str | Path) -> bool:
    """Whether a place is named by a URI, such as `s3://bucket/dogs`, and not by a path."""
    return isinstance(place, str) and "://" in place


def cache_folder() -> Path:
    """Where this node keeps what it can get again: `$DOGVAE_CACHE`, by default `~/.cache/dogvae`."""
    return Path(os.environ.get("DOGVAE_CACHE") or "~/.cache/dogvae").expanduser().absolute()


class Storage:
    """Files below `uri`, which is a path or anything that pyarrow knows (`s3://bucket/runs`, `gs://...`).

    Names are relative to it, with `/`. Methods raise OSError as the file system does.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri).removeprefix("file://").rstrip("/") or "/"
        self.local: Path | None = None if is_uri(self.uri) else Path(self.uri).expanduser().absolute()
        try:
            if self.local:
                self.uri = str(self.local)
                self._fs, self._root = pafs.LocalFileSystem(), self.uri
            else:
                self._fs, self._root = pafs.FileSystem.from_uri(self.uri)
        except (ValueError, OSError) as error:
            raise UsageError(f"{uri} is no place for files: {error}") from error

    def __truediv__(self, name: str) -> Storage:
        return Storage(self.uri_of(name))

    def __str__(self) -> str:
        return self.uri

    def uri_of(self, name: str) -> str:
        """The path or URI of a file or folder in it."""
        if self.local:
            return str(self.local / name)
        head, query, options = self.uri.partition("?")
        return f"{head}/{name}{query}{options}"

    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError if there is none."""
        with self._fs.open_input_file(f"{self._root}/{name}") as file:
            return file.readall()

    def blocks(self, name: str, start: int = 0) -> Iterator[bytes]:
        """The file's bytes from `start` on, piece by piece; FileNotFoundError if there is none."""
        with self._fs.open_input_file(f"{self._root}/{name}") as file:
            file.seek(start)
            while block := file.read(BLOCK):
                yield block

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file: after a kill or a full disk there is the old file or the new one, never a part."""
        if self.local is None:
            # An object appears when its upload is complete.
            with self._fs.open_output_stream(f"{self._root}/{name}") as stream:
                stream.write(data)
            return
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def names(self, folder: str = "") -> list[str]:
        """The names of the files directly in `folder`, sorted; none if it does not exist."""
        selector = pafs.FileSelector(f"{self._root}/{folder}".rstrip("/"), allow_not_found=True)
        return sorted(f.base_name for f in self._fs.get_file_info(selector) if f.is_file)

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of that name."""
        return self._fs.get_file_info(f"{self._root}/{name}").type != pafs.FileType.NotFound

    def delete(self, name: str) -> None:
        """Delete a file; no error if it is gone already."""
        try:
            self._fs.delete_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return
