"""Put a prepared dataset on an object store, file by file, so that nobody can open it before it is complete."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dogvae.console import Progress
from dogvae.data.manifest import MANIFEST, UPLOADING
from dogvae.errors import UsageError
from dogvae.storage import Storage

PARALLEL_FILES = 4


def upload(folder: Path, out: Storage) -> None:
    """Upload the dataset in `folder` to `out`, its manifest last. An interrupted upload is continued.

    Raises UsageError if `out` cannot be written.
    """
    manifest = (folder / MANIFEST).read_bytes()
    try:
        uploaded = set(out.names())
        if UPLOADING not in uploaded or out.read(UPLOADING) != manifest:
            out.write(UPLOADING, manifest)
            uploaded = set()  # the files there belong to another dataset, whose upload was interrupted
        paths = sorted(path for path in folder.iterdir() if path.name not in {*uploaded, MANIFEST})
        with ThreadPoolExecutor(PARALLEL_FILES) as pool, Progress("uploading") as line:
            for done, _ in enumerate(pool.map(lambda path: out.write(path.name, path.read_bytes()), paths), 1):
                line.update(done, len(paths), f"{done} of {len(paths)} files to {out}")
        out.write(MANIFEST, manifest)
        out.delete(UPLOADING)
    except OSError as error:
        raise UsageError(f"OUT {out} cannot be written: {error}") from error


def check_writable(out: Storage) -> None:
    """Raise UsageError if `out` cannot be written: before the photos are prepared rather than afterwards."""
    try:
        if UPLOADING not in out.names():
            out.write(UPLOADING, b"")
            out.delete(UPLOADING)
    except OSError as error:
        raise UsageError(f"OUT {out} cannot be written: {error}") from error
