"""Uploading a dataset to an object store: continued after an interruption, and never opened half complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from dogvae.data.cache import local_copy
from dogvae.data.manifest import existing_manifest, read_manifest
from dogvae.data.upload import upload
from dogvae.errors import UsageError
from dogvae.storage import Storage
from tests.conftest import WriteDataset
from tests.support.command import wait_until
from tests.support.datasets import child, noise, put, shards
from tests.support.s3 import Server

# Uploads a folder, but pauses before every shard after the first.
UPLOAD = """
import sys, time
from pathlib import Path
from dogvae import storage
from dogvae.data.upload import upload
write = storage.Storage.write
def slow(self, name, data):
    time.sleep(10 * (name > "train-00001"))
    write(self, name, data)
storage.Storage.write = slow
upload(Path(sys.argv[1]), storage.Storage(sys.argv[2]))
"""


def test_interrupted_upload_is_continued(remote: Path, s3: Server) -> None:
    uri = s3.uri("new")
    killed = child(UPLOAD, remote, uri)
    wait_until(lambda: {"train-00000.npy", ".uploading.json"} <= set(Storage(uri).names()), 30)
    killed.kill()
    killed.wait()
    assert set(Storage(uri).names()) == {"train-00000.npy", ".uploading.json"}
    assert existing_manifest(Storage(uri)) is None
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        local_copy(uri)
    upload(remote, Storage(uri))
    sent = [name.removeprefix("new/") for name in s3.asked("PUT") if name.startswith("new/") and name != "new/"]
    files = sorted(path.name for path in remote.iterdir())
    assert sorted(set(sent) - {".uploading.json"}) == files
    assert sent.count("train-00000.npy") == 1
    assert sent[-1] == "manifest.json"
    assert Storage(uri).names() == files
    assert shards(local_copy(uri)) == shards(remote)


def test_interrupted_upload_of_other_data_is_overwritten(remote: Path, write_dataset: WriteDataset, s3: Server) -> None:
    other, place = write_dataset([noise(6, 1)], [noise(2, 2)], "other"), Storage(s3.uri("new"))
    place.write(".uploading.json", (other / "manifest.json").read_bytes())
    place.write("train-00000.npy", (other / "train-00000.npy").read_bytes())
    upload(remote, place)
    assert shards(local_copy(place.uri)) == shards(remote)


def test_other_files_at_the_destination_are_refused(remote: Path, s3: Server) -> None:
    place = Storage(s3.uri("new"))
    assert existing_manifest(place) is None
    place.write("thesis.txt", b"dear")
    with pytest.raises(UsageError, match="exists and is not a dataset of this version"):
        existing_manifest(place)
    assert existing_manifest(Storage(put(remote, s3))) == read_manifest(remote)
