"""Runs on an object store: a real S3 server on this machine, interrupted, resumed, and gone for a while."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pyarrow.fs import FileSystem

from dogvae import metrics
from dogvae.checkpoint import Checkpoints
from dogvae.config import Safety
from dogvae.storage import Storage
from dogvae.train import loop
from tests.faults.bench import StopAt, differing, final, job, train

CPU = torch.device("cpu")


class Server:
    """moto's S3, which keeps its objects in memory: stopped (SIGSTOP) it answers nobody, but forgets nothing."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        script = Path(sys.executable).with_name("moto_server")
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen([script, "-p", str(self.port)], stdout=quiet, stderr=quiet)
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert time.monotonic() < end
            time.sleep(0.1)

    def uri(self, name: str) -> str:
        options = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        return f"s3://dogs/{name}?{options}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_interrupted_and_resumed_on_s3(server: Server, dataset: Path, tmp_path: Path) -> None:
    config = job(dataset)
    train(config, tmp_path / "whole")
    FileSystem.from_uri(server.uri(""))[0].create_dir("dogs")
    run = Storage(server.uri("runs")) / "run"
    assert not loop(config, run, CPU, StopAt(20), Safety(checkpoint_steps=5))
    assert loop(config, run, CPU, StopAt())
    saved = Checkpoints(run).latest()
    assert saved is not None
    assert differing(saved.tensors, final(tmp_path / "whole")) == []
    assert [r["epoch"] for r in metrics.read(run)] == [0, 1, 2, 3]
    names = run.names()
    assert "metrics.jsonl" in names
    assert sum(name.startswith("events.") for name in names) == 2
    assert not [name for name in names if name.startswith(".probe")]
    assert len(run.names("checkpoints")) in (2, 3)
