"""The manifest of a prepared dataset, `manifest.json`: its format, reading it, and checking it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from dogvae.errors import UsageError
from dogvae.storage import Storage

MANIFEST, FORMAT, VERSION = "manifest.json", "dogvae-dataset", 1
UPLOADING = ".uploading.json"  # on an object store: the manifest of a dataset whose upload is not complete


def fingerprint(size: int, splits: dict[str, Any]) -> str:
    """SHA-256 of the image size and, for each split, of its count and its shards' checksums, as sorted JSON."""
    parts = {name: [split["count"], *(shard["sha256"] for shard in split["shards"])] for name, split in splits.items()}
    return hashlib.sha256(json.dumps([size, parts], sort_keys=True).encode()).hexdigest()


def shards_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards of both splits. Each has `file`, `count` (images), `bytes` and `sha256`."""
    return [shard for split in ("train", "val") for shard in manifest["splits"][split]["shards"]]


def read_manifest(data: str | Path, fingerprint: str = "") -> dict[str, Any]:
    """The manifest of the prepared dataset at a path or URI, checked for completeness.

    Raises UsageError if it is missing or damaged, of another version, or has another fingerprint than `fingerprint`.
    """
    storage = Storage(data)
    where = storage.uri_of(MANIFEST)
    try:
        manifest = json.loads(storage.read(MANIFEST))
    except FileNotFoundError as error:
        raise UsageError(
            f"{data} is not a prepared dataset: it has no {MANIFEST}; to make one: dogvae prepare PHOTOS {data}"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{data} is not a prepared dataset: its {MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f"{where} is not the manifest of a prepared dataset")
    if manifest.get("version") != VERSION:
        raise UsageError(
            f"{where} has format version {manifest.get('version')}, but this dogvae reads {VERSION}: "
            "prepare the photos again"
        )
    try:
        shards = shards_of(manifest)
        complete = all({"file", "count", "bytes", "sha256"} <= set(shard) for shard in shards)
        complete = complete and {"size", "fingerprint", "settings", "source", "rejected"} <= set(manifest)
        # The cache writes files and deletes folders by these names: they must not lead out of it.
        complete = complete and all(re.fullmatch(r"\w[\w.-]*", shard["file"]) for shard in shards)
        complete = complete and bool(re.fullmatch("[0-9a-f]{64}", manifest["fingerprint"]))
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UsageError(f"{where} is incomplete: prepare the photos again")
    if fingerprint and manifest["fingerprint"] != fingerprint:
        raise UsageError(f"--data: {data} is not what this run was trained on (its fingerprint differs)")
    return manifest


def existing_manifest(out: Path | Storage) -> dict[str, Any] | None:
    """The manifest of the dataset in `out`; None if `out` is missing or empty, or its upload is not complete.

    Raises UsageError if there is anything else in `out`.
    """
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
