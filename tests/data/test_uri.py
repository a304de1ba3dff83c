"""Datasets named by a URI: training on them, resuming with them, and what the commands and the doctor say."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dogvae.commands.doctor import Finding, _inspect, _judge, _versions
from dogvae.config import Config
from dogvae.data import writer
from dogvae.data.dataset import Dataset
from dogvae.data.find import DataChoice
from dogvae.storage import Storage
from dogvae.training import preflight, ranks, run_folder
from dogvae.training.loop import loop
from tests.support.command import TRAIN, Command
from tests.support.datasets import fetched, flip_bit, put, shards
from tests.support.ranks import start_ranks
from tests.support.runs import StopAt, differing, final, job, make_dataset, records, train
from tests.support.s3 import Server


def _rank(rank: int, init: str, caches: list[str], keys: dict[str, str], config: Config, run: str, late_s: int) -> None:
    """A rank with a cache of its own, as on another node; with `late_s`, rank 1 opens its data so many seconds late."""
    os.environ.update(keys, DOGVAE_CACHE=caches[rank])
    torch.set_num_threads(1)
    opened, ranks.SILENT_S = preflight.Dataset, 1.0

    def late(*args: Any) -> Dataset:
        time.sleep(late_s)
        preflight.Dataset = opened  # type: ignore[misc]
        return opened(*args)

    if late_s and rank == 1:
        preflight.Dataset = late  # type: ignore[assignment, misc]
    timeout = timedelta(seconds=late_s / 2 or 600)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=len(caches), timeout=timeout)
    observer = StopAt(1 if late_s else None)
    loop(config, Storage(run), torch.device("cpu"), observer)
    Path(f"{run}-notes-{rank}").write_text("\n".join(observer.notes))
    dist.destroy_process_group()


@pytest.mark.slow
def test_training_on_copies_equals_training_on_a_shared_folder(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 on one node, 1 and 2 on another: one download for each node, and a damaged copy is repaired."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 30 * 3 * 32 * 32)  # 4 shards for training, 1 for validation
    dataset = make_dataset(tmp_path / "dataset")
    uri, config = put(dataset, s3), job(dataset, epochs=2)
    train(config, tmp_path / "plain", 3)
    caches = [str(tmp_path / name) for name in ("one", "other", "other")]
    monkeypatch.setenv("DOGVAE_CACHE", caches[1])
    damaged = fetched(uri) / "train-00000.npy"  # rank 0, on the other node, would verify it in a shared folder
    flip_bit(damaged)
    before = len(s3.asked("GET"))
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    start_ranks(_rank, 3, str(tmp_path / "init"), caches, keys, config.replace(data=uri), str(tmp_path / "run"), 0)
    assert differing(final(tmp_path / "plain"), final(tmp_path / "run")) == []
    assert records(tmp_path / "plain") == records(tmp_path / "run")
    for cache in caches:
        assert shards(Path(cache) / "datasets" / config.fingerprint) == shards(dataset)
    requests = [name.removeprefix("dogs/") for name in s3.asked("GET")[before:]]
    expected = {**dict.fromkeys(shards(dataset), 1), damaged.name: 2}
    assert {name: requests.count(name) for name in expected} == expected
    notes = [(tmp_path / f"run-notes-{rank}").read_text() for rank in range(3)]
    assert sum(f"{damaged} on " in note and "was damaged" in note for note in notes) == 1


@pytest.mark.slow
def test_ranks_wait_for_a_node_that_fetches_longer_than_the_timeout(tmp_path: Path) -> None:
    config = job(make_dataset(tmp_path / "dataset"), epochs=1)
    start_ranks(_rank, 2, str(tmp_path / "init"), ["one", "other"], {}, config, str(tmp_path / "run"), 6)
    assert (tmp_path / "run-notes-0").read_text() == f"waiting for the dataset on {socket.gethostname()}"
    assert (tmp_path / "run-notes-1").read_text() == ""


def test_data_of_a_run_is_absolute_and_a_uri_stays_a_uri(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert DataChoice("file://remote").open("runs").path == f"file://{remote}"
    assert DataChoice(f"file://{remote}").open("runs").path == f"file://{remote}"
    assert DataChoice("remote").open("runs").path == remote


def test_run_resumes_with_the_same_data_at_a_uri(remote: Path, s3: Server, tmp_path: Path) -> None:
    config = Config.make(data=str(remote), fingerprint=Dataset(remote).fingerprint, image_size=32)
    run_folder.save_config(Storage(tmp_path / "runs/one"), config)
    uri = put(remote, s3)
    assert run_folder.open_old(str(tmp_path / "runs"), "one", {}, uri)[1].data == uri


def test_name_of_a_run_leaves_out_options_and_keys_of_a_uri() -> None:
    assert re.fullmatch(
        r"dogs-\d{8}-\d{6}", run_folder.default_name("s3://key:secret@bucket/dogs?region=eu&scheme=http")
    )


BAD = {
    "s3://{bucket}/nothing{options}": "has no manifest.json; to make one: dogvae prepare PHOTOS s3://",
    "s3://no-such-bucket/dogs{options}": "has no manifest.json",
    "s3://{bucket}/photos{options}": "has no manifest.json",
    "s3://{bucket}/other{options}": "is not the manifest of a prepared dataset",
    "file:///nowhere/dogs": "file:///nowhere/dogs is not a prepared dataset",
    "nonsense://dogs": "nonsense://dogs is neither a folder nor a URI of a known file system",
}
DOGVAE = str(Path(sys.executable).with_name("dogvae"))
COMMANDS = {
    "train": [TRAIN, "--data"],
    "search": ["-m", "tune", "search", "--data"],
    "neighbours": [DOGVAE, "neighbours", "export"],
    "evaluate": [DOGVAE, "evaluate", "export"],
}


@pytest.mark.parametrize(
    ("command", "uri"), [("train", uri) for uri in BAD] + [(command, next(iter(BAD))) for command in [*COMMANDS][1:]]
)
def test_bad_uri_ends_a_command_with_one_line_before_anything_starts(
    command: str, uri: str, s3: Server, tmp_path: Path
) -> None:
    Storage(s3.uri("photos")).write("rex.jpg", b"a photo")
    Storage(s3.uri("other")).write("manifest.json", b"{}")
    options = f"?endpoint_override=127.0.0.1:{s3.port}&scheme=http&region=us-east-1"
    place = uri.format(bucket=s3.bucket, options=options)
    began = time.monotonic()
    done = Command(tmp_path, *COMMANDS[command], place)
    assert done.wait(60) == 2, done.text()
    assert time.monotonic() - began < 10  # an idle machine takes 1 or 2 s; Ray or a model would take longer
    assert done.text().startswith("error: ")
    assert done.text().count("\n") == 1, done.text()
    assert BAD[uri] in done.text()
    assert place.partition("?")[0] in done.text()
    assert not (tmp_path / "cache").exists()


def test_doctor_reports_the_copy_and_fetches_nothing(
    remote: Path, s3: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, about = put(remote, s3), f"51 images, fingerprint {Dataset(remote).fingerprint[:8]}"

    def look(data: str) -> Finding:
        node = {"Resources": {"CPU": 4.0}}
        answer = _inspect(str(tmp_path / "runs"), data, "token", 0)
        findings = _judge(node, "10.0.0.1", answer, _versions(), time.time(), time.time(), "runs", data)
        return next(f for f in findings if f.check == "dataset")

    assert look(str(remote)).found == about
    assert (look(uri).ok, look(uri).found) == (True, f"{about}, 0.1 MB to fetch")
    assert not cache.exists()
    monkeypatch.setenv("DOGVAE_CACHE_GB", "0.00001")
    assert not look(uri).ok
    assert look(uri).found.startswith("DOGVAE_CACHE_GB: ")
    monkeypatch.delenv("DOGVAE_CACHE_GB")
    folder = fetched(uri)
    assert look(uri).found == f"{about}, fetched already: {folder}"
    missing = look(s3.uri("nowhere"))
    assert not missing.ok
    assert "has no manifest.json" in missing.found
    assert "reach it" in missing.remedy
