"""`dogvae playground` as a process, and what a browser sends to it."""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from dogvae.data.drawn import draw
from tests.support.command import Command
from tests.support.exports import LATENT
from tests.support.images import encoded

ADDRESS = r"^playground  (http://\S+:\d+)$"
PHOTOS = [encoded(draw(i, 0, 100)) for i in (500, 501)]  # of dogs that the shared model was not trained on


def pack(latent: np.ndarray) -> str:
    return base64.b64encode(latent.astype("<f4").tobytes()).decode()


def unpack(dog: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(dog["latent"]), "<f4").reshape(LATENT)


class Playground(Command):
    """`dogvae playground ARGS` on the CPU, in a folder of its own."""

    def __init__(self, where: Path, *args: object) -> None:
        script = Path(sys.executable).with_name("dogvae")  # as pip installed it
        (where / "tmp").mkdir(parents=True)
        argv = [str(script), "playground", *map(str, args), "--device", "cpu"]
        super().__init__(where, *argv, env={**os.environ, "TMPDIR": f"{where}/tmp"})

    @property
    def address(self) -> str:
        self.wait_for("^playground  http://")
        return str(re.findall(ADDRESS, self.text(), re.M)[0])

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def get(self, path: str = "/", **options: Any) -> httpx.Response:
        return httpx.get(f"{self.address}{path}", trust_env=False, timeout=30, **options)

    def post(self, path: str, timeout: float = 60, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.address}/api/{path}", trust_env=False, timeout=timeout, **options)


@contextmanager
def playground(where: Path, *args: object) -> Iterator[Playground]:
    """A `Playground` that is stopped in the end."""
    command = Playground(where, *args)
    try:
        yield command
    finally:
        command.stop()
