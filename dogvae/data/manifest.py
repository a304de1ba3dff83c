"""The manifest of a prepared dataset, `manifest.json`: its format, reading it, and checking it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from dogvae.errors import UsageError
from dogvae.json_text import parse
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
        manifest = parse(storage.read(MANIFEST))
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
    _check(manifest, where)
    if fingerprint and manifest["fingerprint"] != fingerprint:
        raise UsageError(f"--data: {data} is not what this run was trained on (its fingerprint differs)")
    return manifest


def _check(manifest: dict[str, Any], where: str) -> None:
    """Raise UsageError unless the manifest is as `prepare` writes it."""
    try:
        wrong = _what_is_wrong(manifest)
    except (AttributeError, KeyError, TypeError) as error:  # what is missing, or of another type
        wrong = f"no {error}" if isinstance(error, KeyError) else str(error)
    if wrong:
        raise UsageError(f"{where} is damaged ({wrong}): prepare the photos again")


def _what_is_wrong(manifest: dict[str, Any]) -> str:
    """What of a manifest cannot be; empty if nothing. Raises KeyError or TypeError for what is missing or no text."""
    for name, kind in (("settings", dict), ("source", dict), ("rejected", int), ("size", int)):
        if not isinstance(manifest[name], kind):
            return f"{name} is {manifest[name]!r:.40}"
    for name in ("train", "val"):
        count, shards = manifest["splits"][name]["count"], manifest["splits"][name]["shards"]
        if not shards:
            return f"the split {name} has no shards"
        for shard in shards:
            # The cache writes files and deletes folders by these names: they must not lead out of it.
            for key, pattern in (("file", r"\w[\w.-]*"), ("sha256", "[0-9a-f]{64}")):
                if not re.fullmatch(pattern, shard[key]):
                    return f"a shard of {name} has the {key} {shard[key]!r:.80}"
            if not all(type(shard[key]) is int and shard[key] > 0 for key in ("count", "bytes")):
                return f"{shard['file']} has {shard['count']!r:.20} images and {shard['bytes']!r:.20} bytes"
        if type(count) is not int or count != sum(shard["count"] for shard in shards):
            return f"the shards of {name} do not have {count!r:.20} images together"
    files = [shard["file"] for shard in shards_of(manifest)]
    if len(set(files)) < len(files):
        return "a shard is listed twice"
    if manifest["fingerprint"] != fingerprint(manifest["size"], manifest["splits"]):
        return "its fingerprint is not that of its shards"
    return ""


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
        manifest = parse(out.read(MANIFEST))
        known = (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
    except (OSError, ValueError, LookupError, TypeError):
        known = False
    if not known:
        raise UsageError(f"OUT {out} exists and is not a dataset of this version: name another folder, or empty it")
    _check(manifest, f"OUT {out.uri_of(MANIFEST)}")
    return dict(manifest)
