"""Files in a folder on a disk, a network share or an object store, read and written whole and atomically."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from dogvae.errors import UsageError, did_you_mean

BLOCK = 8 * 2**20  # bytes; an object store gets one request for each


def is_uri(place: str | Path) -> bool:
    """Whether `place` is a URI, such as `s3://bucket/dogs`, rather than a path."""
    return isinstance(place, str) and "://" in place


def cache_folder() -> Path:
    """The folder on this node for files that can be fetched again: `$DOGVAE_CACHE`, by default `~/.cache/dogvae`."""
    return Path(os.environ.get("DOGVAE_CACHE") or "~/.cache/dogvae").expanduser().absolute()


def did_you_mean_folder(path: str | Path) -> str:
    """`; did you mean NAME?` for a missing folder: one of all runs ($DOGVAE_RUNS, or `runs`), or one beside it."""
    missing = Storage(path).local
    if missing is None or missing.exists():
        return ""
    runs = Path(os.environ.get("DOGVAE_RUNS") or "runs")  # a URI is no folder here: it is not looked into
    if not missing.is_relative_to(runs.absolute()) and (runs / path).is_dir():
        return f"; did you mean {runs / path}?"
    while not missing.parent.exists():
        missing = missing.parent
    return did_you_mean(missing.name, Storage(missing.parent).folders() if missing.parent.is_dir() else ())


class Storage:
    """The files below `uri`, a path or a URI that pyarrow knows (`s3://bucket/runs`, `gs://...`).

    Names are relative to `uri`, with `/`. `local` is the folder's absolute path, or None for a remote file system.
    Methods raise OSError; creating a Storage for an unknown kind of URI raises UsageError.
    """

    def __init__(self, uri: str | Path) -> None:
        if not str(uri):
            raise UsageError("the name of a folder is empty")
        self.uri = str(uri).removeprefix("file://").rstrip("/") or "/"
        self.local: Path | None = None if is_uri(self.uri) else Path(self.uri).expanduser().absolute()
        try:
            if self.local:
                self.uri = str(self.local)
                self.uri.encode()  # pyarrow takes no other names
                self._fs, self._root = pafs.LocalFileSystem(), self.uri
            else:
                self._fs, self._root = pafs.FileSystem.from_uri(self.uri)
        except UnicodeEncodeError as error:
            raise UsageError(f"{self.uri!r} is not a name in UTF-8: rename it, or use another folder") from error
        except (ValueError, OSError) as error:
            raise UsageError(f"{uri} is neither a folder nor a URI of a known file system: {error}") from error

    def __truediv__(self, name: str) -> Storage:
        return Storage(self.uri_of(name))

    def __str__(self) -> str:
        return self.uri

    def uri_of(self, name: str) -> str:
        """The path or URI of the file or folder `name`."""
        if self.local:
            return str(self.local / name)
        head, query, options = self.uri.partition("?")
        return f"{head}/{name}{query}{options}"

    def read(self, name: str) -> bytes:
        """The bytes of a file; FileNotFoundError if it does not exist."""
        with self._fs.open_input_file(f"{self._root}/{name}") as file:
            return file.readall()

    def blocks(self, name: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from `start` on, in blocks; FileNotFoundError if it does not exist."""
        with self._fs.open_input_file(f"{self._root}/{name}") as file:
            file.seek(start)
            while block := file.read(BLOCK):
                yield block

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: a kill or a full disk leaves the old file or the new one, never a part of it."""
        if self.local is None:
            # Object stores show an object only when its upload is complete.
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
        """The sorted names of the files directly in `folder`; an empty list if the folder does not exist."""
        selector = pafs.FileSelector(f"{self._root}/{folder}".rstrip("/"), allow_not_found=True)
        return sorted(f.base_name for f in self._fs.get_file_info(selector) if f.is_file)

    def folders(self) -> list[str]:
        """The sorted names of the folders directly in this one; an empty list if it does not exist."""
        selector = pafs.FileSelector(self._root, allow_not_found=True)
        return sorted(f.base_name for f in self._fs.get_file_info(selector) if f.type == pafs.FileType.Directory)

    def exists(self, name: str) -> bool:
        """Whether the file or folder `name` exists."""
        return self._fs.get_file_info(f"{self._root}/{name}").type != pafs.FileType.NotFound

    def modified(self, name: str) -> float:
        """When a file was last written, in seconds since 1970; FileNotFoundError if it does not exist."""
        info = self._fs.get_file_info(f"{self._root}/{name}")
        if info.type == pafs.FileType.NotFound:
            raise FileNotFoundError(self.uri_of(name))
        return float(info.mtime_ns) / 1e9

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        try:
            self._fs.delete_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return
