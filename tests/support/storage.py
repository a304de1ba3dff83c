"""Storage that fails or is slow."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from dogvae.storage import Storage


class UnreliableStorage(Storage):
    """Each write takes `delay_s` seconds. Writes whose numbers, counted from 0, are in `fails` raise OSError."""

    def __init__(self, uri: str | Path, fails: Iterable[int] = (), delay_s: float = 0.0) -> None:
        super().__init__(uri)
        self._fails, self._delay_s, self._number = set(fails), delay_s, -1

    def __truediv__(self, name: str) -> Storage:
        return UnreliableStorage(f"{self.uri}/{name}", self._fails, self._delay_s)

    def write(self, name: str, data: bytes) -> None:
        self._number += 1
        time.sleep(self._delay_s)
        if self._number in self._fails:
            raise OSError("no answer")
        super().write(name, data)
