"""Checkpoints: the full training state in one verified file, written whole, off the training path.

A checkpoint is a safetensors file, so loading it runs no code. Its name carries the step and the SHA-256 of its bytes:
`step-000000800-3fa9c1d2e4b5a697.safetensors`. A file that does not hash to its name was torn and is never used.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from dogvae.console import RunFailed, warn
from dogvae.storage import Storage

FOLDER = "checkpoints"
KEEP_LATEST = 2  # the newest, and the one before it should the newest turn out to be torn
LONGEST_PAUSE_S = 30.0
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.safetensors")


class Checkpoint(NamedTuple):
    """Tensors by name, and what else was known when they were saved (JSON): among it `epoch`, `step`, `val_loss`."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of the run in `storage`: the best by `val_loss` and the latest ones are kept.

    `note` hears, in a line, of torn files and of storage that fails and comes back. While it fails, writing is tried
    again with growing pauses, and training goes on; after `patience_s` without success `check` raises.
    """

    def __init__(self, storage: Storage, note: Callable[[str], None] = warn, patience_s: float = 600.0) -> None:
        self._storage = storage / FOLDER
        self._note = note
        self._patience_s = patience_s
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._lock = Lock()
        self._newest: Checkpoint | None = None
        self._trouble = False  # the storage fails: a newer state replaces the one that waits to be written
        self._val_loss: dict[str, float] = {}  # of the checkpoints that have one; NaN: has none
        self.last_step = 0
        """Of the newest checkpoint that is known to be on the storage."""

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy the state at once and write it in the background, after the one before; raises as `check`."""
        self.check()
        if not self._trouble:
            self.wait()
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        with self._lock:
            self._newest = Checkpoint(copies, meta)
            if self._writing is None or self._writing.done():
                self._writing = self._thread.submit(self._write_newest)

    def wait(self) -> None:
        """Until what was saved is on the storage; raises RunFailed if that was given up."""
        if self._writing is not None:
            self._writing.result()

    def check(self) -> None:
        """Raise RunFailed if writing was given up; does not wait."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none."""
        found = self._first_whole(reversed(self._names()))
        self.last_step = found.meta["step"] if found else 0
        return found

    def best(self) -> Checkpoint | None:
        """The whole checkpoint with the least `val_loss`, else the latest."""
        scored = [(loss, name) for name in self._names() if (loss := self._loss_of(name)) is not None]
        return self._first_whole(name for _, name in sorted(scored)) or self.latest()

    def _names(self) -> list[str]:
        return [name for name in self._storage.names() if _NAME.fullmatch(name)]

    def _write_newest(self) -> None:
        """Write the newest state there is, until there is no newer one."""
        failing_since, pause, written = time.monotonic(), 1.0, None
        while True:
            with self._lock:
                newest = self._newest
                if newest is written or newest is None:
                    return
            try:
                self._write(*newest)
            except OSError as error:
                if time.monotonic() - failing_since > self._patience_s:
                    raise RunFailed(
                        f"--runs: no checkpoint could be written to {self._storage.uri} for {self._patience_s:.0f} "
                        f"seconds ({error}); the last good one is of step {self.last_step}"
                    ) from error
                if not self._trouble:
                    self._trouble = True
                    self._note(f"a checkpoint could not be written ({error}): training on, and trying again")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            if self._trouble:
                self._trouble = False
                self._note("checkpoints can be written again")
            failing_since, pause, written = time.monotonic(), 1.0, newest

    def _write(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        data = safetensors.torch.save(tensors, {"meta": json.dumps(meta)})
        name = f"step-{meta['step']:09d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        self._storage.write(name, data)
        loss = meta.get("val_loss")
        self._val_loss[name] = float("nan") if loss is None else loss
        self.last_step = meta["step"]
        self._prune()

    def _prune(self) -> None:
        names = self._names()
        scored = [(loss, name) for name in names if (loss := self._loss_of(name)) is not None]
        keep = {*names[-KEEP_LATEST:], *(name for _, name in sorted(scored)[:1])}
        for name in names:
            if name not in keep:
                self._storage.delete(name)

    def _loss_of(self, name: str) -> float | None:
        if name not in self._val_loss:
            checkpoint = self._read(name)
            loss = checkpoint.meta.get("val_loss") if checkpoint else None
            self._val_loss[name] = float("nan") if loss is None else loss
        loss = self._val_loss[name]
        return None if loss != loss else loss

    def _first_whole(self, names: Iterable[str]) -> Checkpoint | None:
        return next((checkpoint for name in names if (checkpoint := self._read(name)) is not None), None)

    def _read(self, name: str) -> Checkpoint | None:
        data = self._storage.read(name)
        match = _NAME.fullmatch(name)
        assert match
        if hashlib.sha256(data).hexdigest()[:16] != match[2]:
            self._note(f"{self._storage.uri}/{name} is torn (its checksum differs): it is not used")
            return None
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return Checkpoint(safetensors.torch.load(data), json.loads(header["__metadata__"]["meta"]))
