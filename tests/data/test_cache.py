"""A dataset that is somewhere else: one download for a node, whole and right or not there, and room for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dogvae.commands.doctor import Finding, _inspect, _judge, _versions
from dogvae.config import Config
from dogvae.data import cache as fetch
from dogvae.data import manifest, writer
from dogvae.data.cache import local_copy
from dogvae.data.dataset import Dataset
from dogvae.data.find import DataChoice
from dogvae.data.prepare import upload
from dogvae.errors import UsageError
from dogvae.storage import Storage
from dogvae.training import preflight, ranks
from dogvae.training import run_folder as runs
from dogvae.training.loop import loop
from tests.conftest import WriteDataset
from tests.support.command import ROOT, TRAIN, Command
from tests.support.ranks import start_ranks
from tests.support.runs import StopAt, differing, final, job, make_dataset, records, train
from tests.support.s3 import Server

# What a child process does first: a network that takes 0.1 s for each 4 kB of a file.
SLOW = """
import sys, time
from dogvae import storage
storage.BLOCK = 4096
whole = storage.Storage.blocks
def slow(self, name, start=0):
    for block in whole(self, name, start):
        time.sleep(0.1)
        yield block
storage.Storage.blocks = slow
"""
FETCH = "import sys; from dogvae.data.cache import local_copy; print(local_copy(sys.argv[1]), flush=True)\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This node's cache: where the copies are."""
    monkeypatch.setenv("DOGVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DOGVAE_CACHE_GB", raising=False)
    yield tmp_path / "cache/datasets"
    for held in fetch._in_use.values():
        os.close(held)
    fetch._in_use.clear()


def noise(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), np.uint8)


@pytest.fixture
def remote(write_dataset: WriteDataset) -> Path:
    """Four shards of 40, 5, 4 and 2 images: 6 to 123 kB."""
    return write_dataset([noise(n, n) for n in (40, 5, 4)], [noise(2, 9)], "remote")


def put(folder: Path, s3: Server, name: str = "dogs") -> str:
    """The folder on the object store, file by file."""
    uri = s3.uri(name)
    for path in folder.iterdir():
        Storage(uri).write(path.name, path.read_bytes())
    return uri


def child(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def fetched(uri: str) -> Path:
    """The copy, made by a process that has ended: nobody uses it any more."""
    out, err = child(FETCH, uri).communicate(timeout=60)
    assert out, err
    return Path(out.strip())


def until(what: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def shards_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """What differs if a shard has been written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.npy")}


def alter(path: Path) -> None:
    """Another byte, the same length."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


# --- the copy


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_copy_is_the_original_byte_for_byte(kind: str, remote: Path, s3: Server, cache: Path) -> None:
    uri = put(remote, s3) if kind == "s3" else f"file://{remote}"
    copy, original = Dataset(uri), Dataset(remote)
    assert copy.path == uri
    assert copy.folder == cache / original.fingerprint
    assert shards_in(copy.folder) == shards_in(remote)
    assert {path.name for path in copy.folder.iterdir()} == {*shards_in(remote), "manifest.json"}
    assert copy.manifest == original.manifest
    for ours, theirs in ((copy.train, original.train), (copy.val, original.val)):
        everything = np.arange(len(theirs))
        assert torch.equal(ours.gather(everything), theirs.gather(everything))
    assert copy.verify() == []


def test_path_is_used_in_place(remote: Path, cache: Path) -> None:
    for path in (remote, str(remote)):
        assert local_copy(path) == remote
        assert Dataset(path).folder == remote
    assert not cache.exists()


def test_one_download_for_all_processes_of_a_node(remote: Path, s3: Server, cache: Path, tmp_path: Path) -> None:
    """Six that ask at the same moment: each shard crosses the network once."""
    uri = put(remote, s3)
    before = len(s3.asked("GET"))
    code = SLOW + "from pathlib import Path\nimport dogvae.data.cache\nprint('ready', flush=True)\n"
    code += "while not Path(sys.argv[2]).exists(): time.sleep(0.001)\n" + FETCH
    children = [child(code, uri, tmp_path / "go") for _ in range(6)]
    for one in children:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    told = [one.communicate(timeout=60) for one in children]
    (folder,) = {out for out, _ in told}
    assert {err for _, err in told} == {""}
    assert shards_in(Path(folder.strip())) == shards_in(remote)
    sizes = {path.name: path.stat().st_size for path in remote.glob("*.npy")}
    asked = [name.removeprefix("dogs/") for name in s3.asked("GET")[before:]]
    assert {name: asked.count(name) for name in sizes} == {name: -(-size // 4096) for name, size in sizes.items()}
    assert asked.count("manifest.json") == 6
    assert len(list(cache.glob("*/manifest.json"))) == 1


def test_other_data_at_the_same_place_are_another_copy(write_dataset: WriteDataset, remote: Path) -> None:
    uri = f"file://{remote}"
    old = Dataset(uri)
    shutil.rmtree(remote)
    write_dataset([noise(3, 20)], [noise(1, 21)], "remote")
    new = Dataset(uri)
    assert new.folder != old.folder
    assert (len(new.train), len(Dataset(old.folder).train)) == (3, 49)
    assert shards_in(new.folder) == shards_in(remote)


def test_node_that_has_what_is_wanted_asks_nobody(remote: Path, cache: Path) -> None:
    uri, fingerprint = f"file://{remote}", Dataset(remote).fingerprint
    with pytest.raises(UsageError, match=f"--data: {uri} is not what this run was trained on"):
        Dataset(uri, "0" * 64)
    assert list(cache.glob("*/*")) == []
    with pytest.raises(UsageError, match="not what this run was trained on"):
        Dataset(remote, "0" * 64)
    Dataset(uri, fingerprint)
    shutil.rmtree(remote)
    assert Dataset(uri, fingerprint).fingerprint == fingerprint
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        Dataset(uri)


# --- what goes wrong on the way


def test_wrong_checksum_is_named_and_what_was_right_is_kept(remote: Path, s3: Server, cache: Path) -> None:
    wrong = remote / "train-00001.npy"
    good = wrong.read_bytes()
    alter(wrong)
    uri = put(remote, s3)
    with pytest.raises(UsageError) as error:
        local_copy(uri)
    assert Storage(uri).uri_of("train-00001.npy") in str(error.value)
    assert "checksum" in str(error.value)
    assert "\n" not in str(error.value)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert not (folder / "train-00001.npy").exists()
    assert not (folder / "manifest.json").exists()
    before = states(folder)
    Storage(uri).write("train-00001.npy", good)
    assert local_copy(uri) == folder
    wrong.write_bytes(good)
    assert shards_in(folder) == shards_in(remote)
    assert before.items() <= states(folder).items()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_torn_download_goes_on(how: signal.Signals, remote: Path, s3: Server, cache: Path) -> None:
    uri = put(remote, s3)
    folder = cache / Dataset(remote).fingerprint
    torn = child(SLOW.replace("0.1", "0.4") + FETCH, uri)
    until(lambda: folder.exists() and states(folder) and list(folder.glob(".*.partial")))
    torn.send_signal(how)
    began = time.monotonic()
    torn.wait(30)
    assert time.monotonic() - began < 5  # Ctrl-C too ends what is under way at its next piece, not 12 s later
    there = states(folder)
    assert 0 < len(there) < 4
    assert not (folder / "manifest.json").exists()
    before = len(s3.asked("GET"))
    assert local_copy(uri) == folder
    asked = {name.removeprefix("dogs/") for name in s3.asked("GET")[before:]}
    assert asked == {"manifest.json", *shards_in(remote)} - set(there)
    assert there.items() <= states(folder).items()
    assert shards_in(folder) == shards_in(remote)
    assert not list(folder.glob(".*"))


class Flaky:
    """Reading that fails after a kilobyte, for the first `times`."""

    def __init__(self, times: int) -> None:
        self.left, self.whole = times, Storage.blocks

    def __call__(self, storage: Storage, name: str, start: int = 0) -> Iterator[bytes]:
        data = b"".join(self.whole(storage, name, start))
        if name == "train-00000.npy" and self.left:
            self.left -= 1
            yield data[:1000]
            raise OSError("connection reset")
        yield data


@pytest.mark.parametrize(("times", "ends_well"), [(3, True), (4, False)])
def test_reading_that_fails_goes_on_there(
    times: int, ends_well: bool, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = Flaky(times)
    monkeypatch.setattr(Storage, "blocks", lambda *args: flaky(*args))
    monkeypatch.setattr(fetch, "PAUSE_S", 0.01)
    if ends_well:
        assert shards_in(local_copy(f"file://{remote}")) == shards_in(remote)
    else:
        with pytest.raises(UsageError, match=r"train-00000\.npy cannot be read: connection reset"):
            local_copy(f"file://{remote}")
    assert flaky.left == 0


def test_missing_shard_is_named_at_once(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("there is nothing to wait for"))
    (remote / "val-00000.npy").unlink()
    with pytest.raises(UsageError, match=r"val-00000\.npy cannot be read"):
        local_copy(f"file://{remote}")


@pytest.mark.parametrize("name", ["../outside.npy", "/tmp/outside.npy", "a/b.npy", ".hidden", "", 7])
def test_names_in_a_manifest_do_not_lead_elsewhere(name: Any, remote: Path, cache: Path) -> None:
    path = remote / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["val"]["shards"][0]["file"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"manifest\.json is incomplete"):
        local_copy(f"file://{remote}")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("fingerprint", ["../../elsewhere", "", "ab12", 7, "G" * 64])
def test_fingerprint_does_not_lead_elsewhere(fingerprint: Any, remote: Path, cache: Path) -> None:
    path = remote / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": fingerprint}))
    with pytest.raises(UsageError, match=r"manifest\.json is incomplete"):
        local_copy(f"file://{remote}")
    assert list(cache.iterdir()) == []


# --- what happens to a copy later


def test_truncated_or_missing_shard_of_a_copy_is_fetched_again(remote: Path) -> None:
    folder = fetched(f"file://{remote}")
    (folder / "train-00000.npy").write_bytes(b"short")
    (folder / "val-00000.npy").unlink()
    before = states(folder)
    for fingerprint in ("", folder.name):
        copy = Dataset(f"file://{remote}", fingerprint)
        assert copy.verify() == []
    assert shards_in(folder) == shards_in(remote)
    again = states(folder)
    assert {name for name in again if again[name] != before.get(name)} == {"train-00000.npy", "val-00000.npy"}


@pytest.mark.parametrize("text", ["", "{", '{"format": "dogvae-dataset"}'])
def test_damaged_manifest_of_a_copy_is_written_again(text: str, remote: Path) -> None:
    folder = fetched(f"file://{remote}")
    (folder / "manifest.json").write_text(text)
    before = states(folder)
    assert Dataset(f"file://{remote}", folder.name).manifest == Dataset(remote).manifest
    assert states(folder) == before


def test_altered_copy_is_found_and_mended(remote: Path) -> None:
    """Those who had the damaged file open keep it; whoever opens it now has the right one."""
    folder = fetched(f"file://{remote}")
    right, before = (folder / "train-00001.npy").read_bytes(), states(folder)
    alter(folder / "train-00001.npy")
    wrong = (folder / "train-00001.npy").read_bytes()
    copy = Dataset(f"file://{remote}")
    with (folder / "train-00001.npy").open("rb") as opened:
        assert copy.verify(0, 2) == []  # the shards 0 and 2
        assert copy.verify(1, 2) == [folder / "train-00001.npy"]
        assert opened.read() == wrong
    assert (folder / "train-00001.npy").read_bytes() == right
    after = states(folder)
    assert {name for name in after if after[name] != before[name]} == {"train-00001.npy"}
    assert Dataset(f"file://{remote}").verify() == []


def test_altered_copy_that_cannot_be_mended_is_named(remote: Path) -> None:
    folder = fetched(f"file://{remote}")
    alter(folder / "train-00001.npy")
    copy = Dataset(f"file://{remote}")
    alter(remote / "train-00001.npy")
    with pytest.raises(UsageError, match=f"{folder}/train-00001.npy is damaged.*{remote}/train-00001.npy is not what"):
        copy.verify()
    shutil.rmtree(remote)
    with pytest.raises(UsageError, match=f"{folder}/train-00001.npy is damaged.*has no manifest"):
        copy.verify()


# --- room


@pytest.fixture
def three(write_dataset: WriteDataset) -> list[str]:
    """Datasets of the same size."""
    return [f"file://{write_dataset([noise(8, i)], [noise(1, 10 + i)], f'remote-{i}')}" for i in range(3)]


def gb(datasets: float) -> str:
    """The limit that so many of the `three` fit."""
    return str(datasets * (9 * 3 * 32 * 32 + 2 * 128) / 2**30)


def copy_of(uri: str, cache: Path) -> Path:
    return cache / Dataset(uri.removeprefix("file://")).fingerprint


def lru(folder: Path, seconds: float) -> None:
    """As if it had been used so many seconds ago."""
    then = time.time() - seconds
    os.utime(folder.with_suffix(".lock"), (then, then))


def test_least_recently_used_goes_first(three: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (copy_of(uri, cache) for uri in three)
    assert [fetched(uri) for uri in three[:2]] == [a, b]
    lru(a, 200)
    lru(b, 100)
    fetched(three[0])  # which makes it the last one used
    monkeypatch.setenv("DOGVAE_CACHE_GB", gb(2.1))
    fetched(three[2])
    assert [path.exists() for path in (a, b, c)] == [True, False, True]
    fetched(three[1])
    assert [path.exists() for path in (a, b, c)] == [False, True, True]
    assert shards_in(b) == shards_in(Path(three[1].removeprefix("file://")))


def test_all_stay_if_there_is_room(three: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOGVAE_CACHE_GB", gb(3.1))
    assert all(fetched(uri).exists() for uri in three)
    assert all(copy_of(uri, cache).exists() for uri in three)


def test_what_is_in_use_stays(three: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (copy_of(uri, cache) for uri in three)
    fetched(three[0])
    user = child(FETCH + "import time; time.sleep(600)", three[1])
    assert user.stdout is not None
    assert user.stdout.readline() == f"{b}\n"
    try:
        lru(a, 100)
        lru(b, 200)  # its user has been at work for long
        monkeypatch.setenv("DOGVAE_CACHE_GB", gb(2.1))
        fetched(three[2])
        assert [path.exists() for path in (a, b, c)] == [False, True, True]
        monkeypatch.setenv("DOGVAE_CACHE_GB", gb(1.1))
        with pytest.raises(UsageError, match=r"^DOGVAE_CACHE_GB: .* MB.* MB that are in use.* MB: .* higher$"):
            local_copy(three[0])
        assert [path.exists() for path in (a, b, c)] == [False, True, True]  # nothing goes in vain
    finally:
        user.kill()
        user.wait()
    fetched(three[0])
    assert [path.exists() for path in (a, b, c)] == [True, False, False]


def test_larger_than_the_limit(three: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = fetched(three[0])
    monkeypatch.setenv("DOGVAE_CACHE_GB", gb(0.9))
    with pytest.raises(UsageError, match=r"DOGVAE_CACHE_GB: the dataset has 0\.0 MB, and .* may have 0\.0 MB"):
        local_copy(three[1])
    assert a.exists()
    assert fetched(three[0]) == a  # what is here already is used


@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf", "50GB"])
def test_limit_that_is_none(value: str, remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOGVAE_CACHE_GB", value)
    with pytest.raises(UsageError, match=f"^DOGVAE_CACHE_GB: '{value}' "):
        local_copy(f"file://{remote}")


def test_disk_without_room(three: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody uses makes room on the disk too; if that is not enough, it stays."""
    a = fetched(three[0])
    free = 0
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    lock = fetch._lock(a.with_suffix(".lock"), fetch.fcntl.LOCK_SH)
    with pytest.raises(UsageError, match=r"^DOGVAE_CACHE: .* has 0\.0 MB to spare, the dataset needs 0\.0 MB"):
        local_copy(three[1])
    os.close(lock)
    assert a.exists()
    assert shards_in(local_copy(three[1])) == shards_in(Path(three[1].removeprefix("file://")))
    assert not a.exists()
    free = 10**9
    assert local_copy(three[2]).exists()
    assert copy_of(three[1], cache).exists()


def test_nothing_else_is_deleted(three: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither beside the copies nor behind a link among them."""
    fetched(three[0])
    for path in (cache / "mine", cache.parent / "oxford-pets", cache / ("a" * 63), cache.parent.parent / "elsewhere"):
        path.mkdir()
        (path / "file").write_bytes(bytes(10**6))
    (cache / ("b" * 64)).symlink_to(cache.parent.parent / "elsewhere")
    before = {path for path in cache.parent.parent.rglob("*") if copy_of(three[0], cache) not in (path, *path.parents)}
    monkeypatch.setenv("DOGVAE_CACHE_GB", gb(1.1))
    fetched(three[1])
    assert not copy_of(three[0], cache).exists()
    assert before <= set(cache.parent.parent.rglob("*"))


def test_cache_that_cannot_be_written(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DOGVAE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=f"^DOGVAE_CACHE: {tmp_path}/file/datasets cannot be used .*: name a folder"):
        local_copy(f"file://{remote}")


# --- training on it


def _node(rank: int, init: str, caches: list[str], keys: dict[str, str], config: Config, run: str) -> None:
    """A rank on a node of its own, as far as its disk goes."""
    os.environ.update(keys, DOGVAE_CACHE=caches[rank])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=len(caches))
    observer = StopAt()
    loop(config, Storage(run), torch.device("cpu"), observer)
    Path(f"{run}-notes-{rank}").write_text("\n".join(observer.notes))
    dist.destroy_process_group()


@pytest.mark.slow
def test_nodes_train_as_on_a_shared_folder(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 on a node, 1 and 2 on another: one download on each, and what was damaged there is mended and told."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 30 * 3 * 32 * 32)  # 4 shards of training images, and one more
    dataset = make_dataset(tmp_path / "dataset")
    uri, config = put(dataset, s3), job(dataset, epochs=2)
    train(config, tmp_path / "plain", 3)
    caches = [str(tmp_path / name) for name in ("one", "other", "other")]
    monkeypatch.setenv("DOGVAE_CACHE", caches[1])
    damaged = fetched(uri) / "train-00000.npy"  # on the node without the rank that would look at it on a shared folder
    alter(damaged)
    before = len(s3.asked("GET"))
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    start_ranks(_node, 3, str(tmp_path / "init"), caches, keys, config.replace(data=uri), str(tmp_path / "run"))
    assert differing(final(tmp_path / "plain"), final(tmp_path / "run")) == []
    assert records(tmp_path / "plain") == records(tmp_path / "run")
    for cache in caches:
        assert shards_in(Path(cache) / "datasets" / config.fingerprint) == shards_in(dataset)
    asked = [name.removeprefix("dogs/") for name in s3.asked("GET")[before:]]
    twice = {damaged.name}
    assert {name: asked.count(name) for name in shards_in(dataset)} == {n: 1 + (n in twice) for n in shards_in(dataset)}
    notes = [(tmp_path / f"run-notes-{rank}").read_text() for rank in range(3)]
    assert sum(f"{damaged} on " in note and "was damaged" in note for note in notes) == 1


def _patient(rank: int, init: str, config: Config, run: str) -> None:
    """Two ranks that wait 3 s for each other at most, and one whose data take 6 s to come."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2, timeout=timedelta(seconds=3))
    ranks.SILENT_S = 1.0
    opened = preflight.Dataset

    def late(*args: Any) -> Dataset:
        time.sleep(6)
        preflight.Dataset = opened  # type: ignore[misc]
        return opened(*args)

    if rank == 1:
        preflight.Dataset = late  # type: ignore[assignment, misc]
    observer = StopAt(1)
    assert not loop(config, Storage(run), torch.device("cpu"), observer)
    Path(f"{run}-notes-{rank}").write_text("\n".join(observer.notes))
    dist.destroy_process_group()


@pytest.mark.slow
def test_nodes_wait_for_one_that_fetches_long(tmp_path: Path) -> None:
    config = job(make_dataset(tmp_path / "dataset"), epochs=1)
    start_ranks(_patient, 2, str(tmp_path / "init"), config, str(tmp_path / "run"))
    assert (tmp_path / "run-notes-0").read_text() == f"waiting for the dataset on {socket.gethostname()}"
    assert (tmp_path / "run-notes-1").read_text() == ""


def test_training_refuses_other_data(remote: Path) -> None:
    config = Config.make(image_size=32, data=f"file://{remote}", fingerprint="0" * 64)
    with pytest.raises(UsageError, match="not what this run was trained on"):
        loop(config, Storage(remote.parent / "run"), torch.device("cpu"), StopAt())


# --- the commands


def test_config_keeps_the_uri(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each node makes a copy of its own; what is relative is not, in other processes."""
    monkeypatch.chdir(tmp_path)
    assert DataChoice("file://remote").open("runs").path == f"file://{remote}"
    assert DataChoice(f"file://{remote}").open("runs").path == f"file://{remote}"
    assert DataChoice("remote").open("runs").path == remote


def test_resuming_with_the_data_elsewhere(remote: Path, s3: Server, tmp_path: Path) -> None:
    config = Config.make(data=str(remote), fingerprint=Dataset(remote).fingerprint, image_size=32)
    runs.save_config(Storage(tmp_path / "runs/one"), config)
    uri = put(remote, s3)
    assert runs.open_old(str(tmp_path / "runs"), "one", {}, uri)[1].data == uri
    other = json.loads((remote / "manifest.json").read_text())
    Storage(uri).write("manifest.json", json.dumps({**other, "fingerprint": "0" * 64}).encode())
    with pytest.raises(UsageError, match="not what this run was trained on"):
        runs.open_old(str(tmp_path / "runs"), "one", {}, uri)


def test_name_of_a_run_has_no_options_of_a_uri() -> None:
    assert re.fullmatch(r"dogs-\d{8}-\d{6}", runs.default_name("s3://key:secret@bucket/dogs?region=eu&scheme=http"))


BAD = {
    "s3://{bucket}/nothing{options}": "has no manifest.json; to make one of photos: dogvae prepare PHOTOS s3://",
    "s3://no-such-bucket/dogs{options}": "has no manifest.json",
    "s3://{bucket}/photos{options}": "has no manifest.json",
    "s3://{bucket}/other{options}": "is not the manifest of a prepared dataset",
    "file:///nowhere/dogs": "file:///nowhere/dogs is no prepared dataset",
    "nonsense://dogs": "nonsense://dogs is no place for files",
}
DOGVAE = str(Path(sys.executable).with_name("dogvae"))
COMMANDS = {
    "train": [TRAIN, "--data"],
    "search": ["-m", "tune", "search", "--data"],
    "neighbours": [DOGVAE, "neighbours", "export"],
    "evaluate": [DOGVAE, "evaluate", "export"],
}


@pytest.mark.parametrize(
    ("command", "uri"), [("train", uri) for uri in BAD] + [(command, next(iter(BAD))) for command in COMMANDS]
)
def test_bad_uri_is_one_line_at_once(command: str, uri: str, s3: Server, tmp_path: Path) -> None:
    """Before Ray starts or a model is loaded."""
    Storage(s3.uri("photos")).write("rex.jpg", b"a photo")
    Storage(s3.uri("other")).write("manifest.json", b"{}")
    options = f"?endpoint_override=127.0.0.1:{s3.port}&scheme=http&region=us-east-1"
    place = uri.format(bucket=s3.bucket, options=options)
    began = time.monotonic()
    done = Command(tmp_path, *COMMANDS[command], place)
    assert done.wait(60) == 2, done.text()
    assert time.monotonic() - began < 10  # one or two seconds on an idle machine
    assert done.text().startswith("error: ")
    assert done.text().count("\n") == 1, done.text()
    assert BAD[uri] in done.text()
    assert place.partition("?")[0] in done.text()
    assert not (tmp_path / "cache").exists()


def test_doctor_looks_and_fetches_nothing(
    remote: Path, s3: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, fingerprint = put(remote, s3), Dataset(remote).fingerprint

    def look(data: str = uri) -> Finding:
        node = {"Resources": {"CPU": 4.0}}
        answer = _inspect(str(tmp_path / "runs"), data, "token", 0)
        findings = _judge(node, "10.0.0.1", answer, _versions(), time.time(), time.time(), "runs", data)
        return next(f for f in findings if f.check == "dataset")

    assert look().found == f"51 images, fingerprint {fingerprint[:8]}, 0.1 MB to fetch"
    assert look().ok
    assert not cache.exists()
    monkeypatch.setenv("DOGVAE_CACHE_GB", "0.00001")
    assert not look().ok
    assert look().found.startswith("DOGVAE_CACHE_GB: ")
    monkeypatch.delenv("DOGVAE_CACHE_GB")
    folder = fetched(uri)
    assert look().found == f"51 images, fingerprint {fingerprint[:8]}, fetched already: {folder}"
    assert not look(s3.uri("nowhere")).ok
    assert "has no manifest.json" in look(s3.uri("nowhere")).found
    assert "reach it" in look(s3.uri("nowhere")).remedy
    assert look(str(remote)).found == f"51 images, fingerprint {fingerprint[:8]}"


# --- uploading, what `dogvae prepare PHOTOS s3://...` ends with


def test_torn_upload_goes_on(remote: Path, s3: Server) -> None:
    """What came across is not sent again, and nobody takes it for a dataset before it is whole."""
    uri = s3.uri("new")
    code = "import sys, time\nfrom pathlib import Path\nfrom dogvae import storage\nwrite = storage.Storage.write\n"
    code += "def slow(self, name, data):\n    time.sleep(10 * (name > 'train-00001')); write(self, name, data)\n"
    code += "storage.Storage.write = slow\nfrom dogvae.data.prepare import upload\n"
    torn = child(code + "upload(Path(sys.argv[1]), storage.Storage(sys.argv[2]))", remote, uri)
    until(lambda: {"train-00000.npy", ".uploading.json"} <= set(Storage(uri).names()))
    torn.kill()
    torn.wait()
    there = set(Storage(uri).names())
    assert there == {"train-00000.npy", ".uploading.json"}
    assert manifest.existing(Storage(uri)) is None
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        local_copy(uri)
    upload(remote, Storage(uri))
    sent = [name.removeprefix("new/") for name in s3.asked("PUT") if name.startswith("new/") and name != "new/"]
    assert sorted(set(sent) - {".uploading.json"}) == sorted(path.name for path in remote.iterdir())
    assert sent.count("train-00000.npy") == 1
    assert sent[-1] == "manifest.json"
    assert Storage(uri).names() == sorted(path.name for path in remote.iterdir())
    assert shards_in(local_copy(uri)) == shards_in(remote)


def test_torn_upload_of_other_data_is_overwritten(remote: Path, write_dataset: WriteDataset, s3: Server) -> None:
    other, place = write_dataset([noise(6, 1)], [noise(2, 2)], "other"), Storage(s3.uri("new"))
    place.write(".uploading.json", (other / "manifest.json").read_bytes())
    place.write("train-00000.npy", (other / "train-00000.npy").read_bytes())
    upload(remote, place)
    assert shards_in(local_copy(place.uri)) == shards_in(remote)


def test_what_is_there_is_not_overwritten(remote: Path, s3: Server) -> None:
    place = Storage(s3.uri("new"))
    assert manifest.existing(place) is None
    place.write("thesis.txt", b"dear")
    with pytest.raises(UsageError, match="exists and is not a dataset of this version"):
        manifest.existing(place)
    assert manifest.existing(Storage(put(remote, s3))) == manifest.read_manifest(remote)
