"""What every test shares: one thread for the numbers, and tiny datasets written independently of `dogvae prepare`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pyarrow.fs import FileSystem

from tests.support.s3 import Server

if TYPE_CHECKING:
    from tests.support.exports import Exported

WriteDataset = Callable[..., Path]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background, for all processes of the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # the other process of the tests needs the cores: threads that wait do not spin
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and on a busy machine the threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def write_dataset(tmp_path: Path) -> WriteDataset:
    """Writes arrays (n, 3, h, h) as a prepared dataset, one shard for each array.

    It follows the documented format without the product's code, so that tests of reading do not depend on the writer.
    (`tests.support.runs.make_dataset` writes drawn dogs with the product's writer, for tests of training.)
    """

    def write(train: list[np.ndarray], val: list[np.ndarray], name: str = "dataset") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        splits: dict[str, dict[str, Any]] = {}
        for split, arrays in (("train", train), ("val", val)):
            shards = []
            for i, array in enumerate(arrays):
                path = folder / f"{split}-{i:05d}.npy"
                np.save(path, array)
                data = path.read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                shards.append({"file": path.name, "count": len(array), "bytes": len(data), "sha256": digest})
            splits[split] = {"count": sum(map(len, arrays)), "shards": shards}
        size = train[0].shape[-1]
        checksums = {split: [v["count"], *(shard["sha256"] for shard in v["shards"])] for split, v in splits.items()}
        manifest = {
            "format": "dogvae-dataset",
            "version": 1,
            "size": size,
            "channels": 3,
            "splits": splits,
            "fingerprint": hashlib.sha256(json.dumps([size, checksums], sort_keys=True).encode()).hexdigest(),
            "settings": {},
            "source": {"name": "test"},
            "rejected": 0,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return write


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A small trained model: its dataset, its run and its export. Tests that change a file copy the folder first."""
    from tests.support.exports import train_and_export  # late: it imports the whole product

    return train_and_export(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def no_internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Downloads fail: nobody listens where the proxy should be.

    `urlopen` reads the variables only once, at its first call in a process; so it forgets them before and after.
    """
    for protocol in ("http", "https"):
        monkeypatch.setenv(f"{protocol}_proxy", "http://127.0.0.1:9")
    urllib.request.install_opener(None)  # type: ignore[arg-type]
    yield
    urllib.request.install_opener(None)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    running = Server()
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with an empty bucket, and the keys to it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3_server.bucket = f"dogs-{uuid.uuid4().hex}"
    FileSystem.from_uri(s3_server.uri(""))[0].create_dir(s3_server.bucket)
    return s3_server
