"""500 damaged manifests, configs and exports: each is read, or refused with one line, in little time and memory."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dogvae.commands import entry
from dogvae.data.dataset import Dataset
from dogvae.data.prepare import prepare
from dogvae.inference.load import load
from dogvae.training.run_folder import open_run
from tests.support.exports import Exported
from tests.support.searches import Spec, setting, write_search
from tune.search_folder import SearchPlan, open_search

LONGEST_S, MOST_BYTES = 10, 2 << 30
HOSTILE = [
    None, True, -1, 0, 1, 7.5, 10**400, float("nan"), float("inf"), "", "x", "\n", "../..", "\udcff", "9" * 100_000, [],
    {}, [[]], {"": {}}, [None] * 1000, 2**63, 512,
]  # fmt: skip


def damaged_json(data: bytes, draw: random.Random) -> bytes:
    """A JSON text after one to three edits of its values, or of its bytes."""
    if draw.random() < 0.3:
        return damaged_bytes(data, draw)
    value = json.loads(data)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(value))
        if places:
            parent, key = draw.choice(places)
            edit = draw.randrange(4)
            if edit == 0:
                del parent[key]
            elif edit == 1 and isinstance(parent[key], list):
                parent[key] = parent[key] * draw.choice((0, 2, 50))
            elif edit == 2:
                other, its = draw.choice(places)
                parent[key] = copy.deepcopy(other[its])
            else:
                parent[key] = copy.deepcopy(draw.choice(HOSTILE))
    return json.dumps(value).encode() if draw.random() < 0.95 else b"[" * 100_000


def _places(value: Any) -> Any:
    """All (parent, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from _places(child)


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes after flips, a cut, an insertion or a doubled part."""
    at, size = draw.randrange(len(data)), draw.randint(1, 64)
    edit = draw.randrange(4)
    if edit == 0:
        flipped = bytearray(data)
        for _ in range(size):
            flipped[draw.randrange(min(len(data), 2000))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if edit == 1:
        return data[:at]
    inserted = draw.randbytes(size) if edit == 2 else data[at : at + size] * draw.choice((1, 1000))
    return data[:at] + inserted + data[at:]


def damage_tensors(file: Path, config: Path, draw: random.Random) -> None:
    """Damage a file of tensors or its header, and give it the right checksum."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.5:
        header = damaged_json(data[8 : 8 + length], draw)
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    else:
        data = damaged_bytes(data, draw)
    file.write_bytes(data)
    about = json.loads(config.read_text())
    about["files"][file.name] = hashlib.sha256(data).hexdigest()
    config.write_text(json.dumps(about))


def check(door: Callable[[], Any], what: str, capsys: pytest.CaptureFixture[str]) -> int:
    """The exit status of a command that opens a damaged file: 0, or 2 with one line."""

    def main(argv: Any) -> None:
        door()

    began = time.monotonic()
    status = entry.run(main, [])
    _, told = capsys.readouterr()
    assert time.monotonic() - began < LONGEST_S, what
    assert (status, told.count("\n"), told[:7]) in ((0, 0, ""), (2, 1, "error: ")), f"{what}: {told}"
    return status


def test_damaged_files_are_read_or_refused_with_one_line(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    search = write_search(tmp_path / "searches", [Spec(setting(), [7000.0, 6900.0]), Spec(setting(8), [7100.0])])

    def dataset(folder: Path) -> Any:
        opened = Dataset(folder)
        assert min(len(opened.train), len(opened.val)) > 0
        return opened.verify()

    def found(folder: Path) -> Any:
        opened = open_search(str(folder.parent), folder.name)
        return SearchPlan.from_dict(opened.about, "search")

    doors: list[tuple[Path, str, int, Callable[[Path], Any]]] = [
        (exported.dataset, "manifest.json", 120, dataset),
        (exported.dataset, "manifest.json", 30, lambda folder: prepare("drawn:5", folder)),
        (exported.run, "config.json", 100, lambda folder: open_run(str(folder))),
        (search, "search.json", 25, found),
        (search, "trials.json", 25, found),
        (exported.folder, "config.json", 100, lambda folder: load(folder, "cpu").sample(1)),
        (exported.folder, "model.safetensors", 50, lambda folder: load(folder, "cpu").sample(1)),
        (exported.folder, "prior.safetensors", 50, lambda folder: load(folder, "cpu").sample(1)),
    ]
    refused = total = 0
    for origin, name, count, door in doors:
        for seed in range(count):
            draw = random.Random(f"{name} {seed}")
            folder = Path(shutil.copytree(origin, tmp_path / "copy"))
            file = folder / name
            if file.suffix == ".json":
                file.write_bytes(damaged_json(file.read_bytes(), draw))
            else:
                damage_tensors(file, folder / "config.json", draw)
            refused += check(lambda door=door, folder=folder: door(folder), f"{name}, seed {seed}", capsys) == 2
            total += 1
            shutil.rmtree(folder)
    assert total == 500
    assert refused > 300  # the others are edits that change nothing that is read
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < MOST_BYTES
