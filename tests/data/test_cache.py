"""The copy of a remote dataset on a node: fetched once, complete and correct, repaired when it is damaged."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dogvae.data import cache as module
from dogvae.data.cache import local_copy
from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from dogvae.storage import Storage
from tests.conftest import WriteDataset
from tests.support.command import wait_until
from tests.support.datasets import FETCH, child, fetched, file_states, flip_bit, noise, put, shards
from tests.support.s3 import Server

# Slows a child process down: its network takes SECONDS for each 4 kB of a file.
SLOW = """
import sys, time
from dogvae import storage
storage.BLOCK = 4096
whole = storage.Storage.blocks
def slow(self, name, start=0):
    for block in whole(self, name, start):
        time.sleep(SECONDS)
        yield block
storage.Storage.blocks = slow
"""


# --- the copy


@pytest.mark.parametrize("kind", ["path", "file", "s3"])
def test_uri_is_copied_and_a_path_is_used_in_place(kind: str, remote: Path, s3: Server, cache: Path) -> None:
    uri = {"path": remote, "file": f"file://{remote}", "s3": put(remote, s3)}[kind]
    copy, original = Dataset(uri), Dataset(remote)
    assert copy.path == uri
    assert copy.folder == (remote if kind == "path" else cache / original.fingerprint)
    assert cache.exists() == (kind != "path")
    assert {path.name for path in copy.folder.iterdir()} == {*shards(remote), "manifest.json"}
    assert shards(copy.folder) == shards(remote)
    assert copy.manifest == original.manifest
    for copied, split in ((copy.train, original.train), (copy.val, original.val)):
        everything = np.arange(len(split))
        assert torch.equal(copied.gather(everything), split.gather(everything))
    assert copy.verify() == []


def test_processes_of_a_node_share_one_download(remote: Path, s3: Server, cache: Path, tmp_path: Path) -> None:
    """Six processes ask at the same moment: each shard crosses the network once."""
    uri = put(remote, s3)
    before = len(s3.asked("GET"))
    code = SLOW.replace("SECONDS", "0.02") + "from pathlib import Path\nimport dogvae.data.cache\n"
    code += "print('ready', flush=True)\nwhile not Path(sys.argv[2]).exists(): time.sleep(0.001)\n" + FETCH
    children = [child(code, uri, tmp_path / "go") for _ in range(6)]
    for one in children:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    outputs = [one.communicate(timeout=60) for one in children]
    (folder,) = {out for out, _ in outputs}
    assert {err for _, err in outputs} == {""}
    assert shards(Path(folder.strip())) == shards(remote)
    requests = [name.removeprefix("dogs/") for name in s3.asked("GET")[before:]]
    blocks = {name: -(-len(data) // 4096) for name, data in shards(remote).items()}
    assert {name: requests.count(name) for name in blocks} == blocks
    assert requests.count("manifest.json") == 6
    assert len(list(cache.glob("*/manifest.json"))) == 1


def test_other_data_at_the_same_uri_get_another_copy(write_dataset: WriteDataset, remote: Path) -> None:
    uri = f"file://{remote}"
    old = Dataset(uri)
    shutil.rmtree(remote)
    write_dataset([noise(3, 20)], [noise(1, 21)], "remote")
    new = Dataset(uri)
    assert new.folder != old.folder
    assert (len(new.train), len(Dataset(old.folder).train)) == (3, 49)
    assert shards(new.folder) == shards(remote)


def test_complete_copy_of_the_fingerprint_needs_no_network(remote: Path, cache: Path) -> None:
    uri, fingerprint = f"file://{remote}", Dataset(remote).fingerprint
    for data in (uri, remote):
        with pytest.raises(UsageError, match=f"--data: {data} is not what this run was trained on"):
            Dataset(data, "0" * 64)
    assert list(cache.glob("*/*")) == []
    Dataset(uri, fingerprint)
    shutil.rmtree(remote)
    assert Dataset(uri, fingerprint).fingerprint == fingerprint
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        Dataset(uri)


# --- failures while fetching


def test_shard_with_a_wrong_checksum_is_named_and_the_others_are_kept(remote: Path, s3: Server, cache: Path) -> None:
    uri, good = put(remote, s3), shards(remote)
    flip_bit(remote / "train-00001.npy")
    Storage(uri).write("train-00001.npy", (remote / "train-00001.npy").read_bytes())
    with pytest.raises(UsageError, match=r"^[^\n]*checksum[^\n]*$") as error:
        local_copy(uri)
    assert Storage(uri).uri_of("train-00001.npy") in str(error.value)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    before = file_states(folder)
    assert "train-00001.npy" not in before
    assert not (folder / "manifest.json").exists()
    Storage(uri).write("train-00001.npy", good["train-00001.npy"])
    assert shards(local_copy(uri)) == good
    assert before.items() <= file_states(folder).items()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_fetch_is_continued(how: signal.Signals, remote: Path, s3: Server, cache: Path) -> None:
    uri = put(remote, s3)
    folder = cache / Dataset(remote).fingerprint
    killed = child(SLOW.replace("SECONDS", "0.4") + FETCH, uri)
    wait_until(lambda: folder.exists() and file_states(folder) and list(folder.glob(".*.partial")), 30)
    killed.send_signal(how)
    began = time.monotonic()
    killed.wait(30)
    assert time.monotonic() - began < 5  # Ctrl-C ends all transfers at their next block, not 12 s later
    done = file_states(folder)
    assert 0 < len(done) < 4
    assert not (folder / "manifest.json").exists()
    before = len(s3.asked("GET"))
    assert local_copy(uri) == folder
    requested = {name.removeprefix("dogs/") for name in s3.asked("GET")[before:]}
    assert requested == {"manifest.json", *shards(remote)} - set(done)
    assert done.items() <= file_states(folder).items()
    assert shards(folder) == shards(remote)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(("failures", "succeeds"), [(3, True), (4, False)])
def test_failed_read_is_retried_three_times(
    failures: int, succeeds: bool, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, whole = [OSError("connection reset")] * failures, Storage.blocks

    def flaky(storage: Storage, name: str, start: int = 0) -> Iterator[bytes]:
        data = b"".join(whole(storage, name, start))
        if name == "train-00000.npy" and left:
            yield data[:1000]
            raise left.pop()
        yield data

    monkeypatch.setattr(Storage, "blocks", flaky)
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    if succeeds:
        assert shards(local_copy(f"file://{remote}")) == shards(remote)
    else:
        with pytest.raises(UsageError, match=r"train-00000\.npy cannot be read: connection reset"):
            local_copy(f"file://{remote}")
    assert left == []


def test_missing_shard_is_reported_without_retries(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    (remote / "val-00000.npy").unlink()
    with pytest.raises(UsageError, match=r"val-00000\.npy cannot be read"):
        local_copy(f"file://{remote}")


@pytest.mark.parametrize(
    ("field", "value"),
    [("file", value) for value in ("../outside.npy", "/tmp/outside.npy", "a/b.npy", ".hidden", "", 7)]
    + [("fingerprint", value) for value in ("../../elsewhere", "", "ab12", 7, "G" * 64)],
)
def test_manifest_cannot_name_files_outside_the_copy(field: str, value: Any, remote: Path, cache: Path) -> None:
    manifest = json.loads((remote / "manifest.json").read_text())
    (manifest if field == "fingerprint" else manifest["splits"]["val"]["shards"][0])[field] = value
    (remote / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"manifest\.json is damaged"):
        local_copy(f"file://{remote}")
    assert list(cache.iterdir()) == []


# --- damage to a copy


DAMAGES: list[dict[str, bytes | None]] = [{"train-00000.npy": b"short", "val-00000.npy": None}]
DAMAGES += [{"manifest.json": manifest} for manifest in (b"", b"{", b'{"format": "dogvae-dataset"}', None)]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("with_fingerprint", [True, False])
def test_truncated_and_missing_files_of_a_copy_are_fetched_again(
    damage: dict[str, bytes | None], with_fingerprint: bool, remote: Path
) -> None:
    folder = fetched(f"file://{remote}")
    for name, data in damage.items():
        (folder / name).unlink()
        if data is not None:
            (folder / name).write_bytes(data)
    before = file_states(folder)
    copy = Dataset(f"file://{remote}", folder.name if with_fingerprint else "")
    assert copy.verify() == []
    assert copy.manifest == Dataset(remote).manifest
    assert shards(folder) == shards(remote)
    written = {name for name, state in file_states(folder).items() if state != before.get(name)}
    assert written == set(damage) & set(shards(remote))


def test_flipped_bit_in_a_copy_is_repaired(remote: Path) -> None:
    """A process that has the damaged file open keeps it; opening the file now gives the repaired one."""
    folder = fetched(f"file://{remote}")
    before = file_states(folder)
    flip_bit(folder / "train-00001.npy")
    damaged = (folder / "train-00001.npy").read_bytes()
    copy = Dataset(f"file://{remote}")
    with (folder / "train-00001.npy").open("rb") as opened:
        assert copy.verify(0, 2) == []  # the shards 0 and 2
        assert copy.verify(1, 2) == [folder / "train-00001.npy"]
        assert opened.read() == damaged
    assert shards(folder) == shards(remote)
    assert {name for name, state in file_states(folder).items() if state != before[name]} == {"train-00001.npy"}
    assert Dataset(f"file://{remote}").verify() == []


def test_copy_that_cannot_be_repaired_is_named(remote: Path) -> None:
    folder = fetched(f"file://{remote}")
    flip_bit(folder / "train-00001.npy")
    copy = Dataset(f"file://{remote}")
    flip_bit(remote / "train-00001.npy")
    with pytest.raises(UsageError, match=f"{folder}/train-00001.npy is damaged.*{remote}/train-00001.npy is not what"):
        copy.verify()
    shutil.rmtree(remote)
    with pytest.raises(UsageError, match=f"{folder}/train-00001.npy is damaged.*has no manifest"):
        copy.verify()
