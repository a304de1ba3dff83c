"""The job that all fault tests run, and where it ends when nothing befalls it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow.fs import FileSystem

from tests.faults.bench import EPOCHS, job, make_dataset, train


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 training and 20 validation images of 32x32 pixels."""
    return make_dataset(tmp_path_factory.mktemp("faults") / "dataset")


@pytest.fixture(scope="session")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job on two ranks for `EPOCHS`, without Ray and uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(job(dataset, epochs=EPOCHS), out, 2)
    return out


class Server:
    """moto's S3, which keeps its objects in memory."""

    bucket = "dogs"

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

    def stop(self) -> None:
        """From now on it answers nobody, and forgets nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def uri(self, name: str) -> str:
        options = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        return f"s3://{self.bucket}/{name}?{options}"


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
