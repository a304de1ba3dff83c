"""The manifest of a prepared dataset: what it is, and how it is read and checked."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from dogvae.errors import UsageError
from dogvae.storage import Storage

MANIFEST, FORMAT, VERSION = "manifest.json", "dogvae-dataset", 1
UPLOADING = ".uploading.json"  # on an object store: the manifest of the dataset that is being put there


def fingerprint(size: int, splits: dict[str, Any]) -> str:
    """SHA-256 of what the images are: their size, and each split's count and checksums of shards, as sorted JSON."""
    parts = {name: [split["count"], *(shard["sha256"] for shard in split["shards"])] for name, split in splits.items()}
    return hashlib.sha256(json.dumps([size, parts], sort_keys=True).encode()).hexdigest()


def shards_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """All shards: file, count of images, bytes, SHA-256."""
    return [shard for split in ("train", "val") for shard in manifest["splits"][split]["shards"]]


def read_manifest(data: str | Path, fingerprint: str = "") -> dict[str, Any]:
    """The checked manifest of the prepared dataset at a path or URI, and of no other than `fingerprint`, if given.

    Raises UsageError that says what is wrong with it.
    """
    storage = Storage(data)
    where = storage.uri_of(MANIFEST)
    try:
        manifest = json.loads(storage.read(MANIFEST))
    except FileNotFoundError as error:
        raise UsageError(
            f"{data} is no prepared dataset: it has no {MANIFEST}; to make one of photos: dogvae prepare PHOTOS {data}"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{data} is no prepared dataset: its {MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f"{where} is not the manifest of a prepared dataset")
    if manifest.get("version") != VERSION:
        raise UsageError(
            f"{where} has format version {manifest.get('version')}, this dogvae reads {VERSION}: "
            "prepare the photos again"
        )
    try:
        shards = shards_of(manifest)
        complete = all({"file", "count", "bytes", "sha256"} <= set(shard) for shard in shards)
        complete = complete and {"size", "fingerprint", "settings", "source", "rejected"} <= set(manifest)
        # Files are written, and folders deleted, by these names: they must not lead elsewhere.
        complete = complete and all(re.fullmatch(r"\w[\w.-]*", shard["file"]) for shard in shards)
        complete = complete and bool(re.fullmatch("[0-9a-f]{64}", manifest["fingerprint"]))
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UsageError(f"{where} is incomplete: prepare the photos again")
    if fingerprint and manifest["fingerprint"] != fingerprint:
        raise UsageError(f"--data: {data} is not what this run was trained on (its fingerprint differs)")
    return manifest


def existing(out: Path | Storage) -> dict[str, Any] | None:
    """The manifest of the dataset in `out`, None if nothing is there yet; UsageError if something else is."""
    if isinstance(out, Path):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        out = Storage(out)
    else:
        try:
            names = out.names()
        except OSError as error:
            raise UsageError(f"OUT {out} cannot be read: {error}") from error
        if not names or (UPLOADING in names and MANIFEST not in names):
            return None
    try:
        manifest = json.loads(out.read(MANIFEST))
        known = (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
    except (OSError, ValueError, LookupError, TypeError):
        known = False
    if not known:
        raise UsageError(f"OUT {out} exists and is not a dataset of this version: name another folder, or empty it")
    return dict(manifest)
