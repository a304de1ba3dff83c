"""Checkpoints: the full training state in one verified file, written whole, off the training path.

A checkpoint is a safetensors file, so loading it runs no code. Its name carries the step and the SHA-256 of its bytes:
`step-000000800-3fa9c1d2e4b5a697.safetensors`. A file that does not hash to its name was torn and is never used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from dogvae.console import warn
from dogvae.errors import RunFailed
from dogvae.storage import Storage
from dogvae.training.run_folder import CHECKPOINTS

KEEP_LATEST = 2  # the newest, and the one before it should the newest turn out to be torn
LONGEST_PAUSE_S = 30.0
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.safetensors")


class Checkpoint(NamedTuple):
    """Tensors by name, and what else was known when they were saved (JSON): among it `epoch`, `step`, `val_loss`."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def _score(meta: dict[str, Any]) -> float:
    """`val_loss`, infinite if there is none: what the best has least of."""
    loss = meta.get("val_loss")
    return loss if loss is not None and math.isfinite(loss) else math.inf


class Checkpoints:
    """The checkpoints of the run in `storage`: the best by `val_loss` and the latest ones are kept.

    Writing never holds up training: while one state is being written only the newest of those that wait, and the best
    of them, wait on. `note` hears, in a line, of torn files and of storage that fails and comes back. While it fails,
    writing is tried again with growing pauses; after `patience_s` without success `check` raises.
    """

    def __init__(self, storage: Storage, note: Callable[[str], None] = warn, patience_s: float = 600.0) -> None:
        self._storage = storage / CHECKPOINTS
        self._note = note
        self._patience_s = patience_s
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._lock = Lock()
        self._waiting: list[Checkpoint] = []
        self._since = 0.0  # when writing last succeeded, or began
        self._trouble = False  # the storage fails
        self._val_loss: dict[str, float] = {}  # by file; infinite: has none
        self.last_step = 0
        """Of the newest checkpoint that is known to be on the storage."""

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy the state at once and write it in the background; raises as `check`."""
        self.check()
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        with self._lock:
            best = min(self._waiting, key=lambda c: _score(c.meta), default=None)
            worth = [best] if best and _score(best.meta) < math.inf else []
            self._waiting = [*worth, Checkpoint(copies, meta)]
            if self._writing is None or self._writing.done():
                self._since = time.monotonic()
                self._writing = self._thread.submit(self._write_waiting)

    def wait(self) -> None:
        """Until what was saved is on the storage; raises RunFailed if that was given up."""
        if self._writing is not None:
            self._writing.result()

    def check(self) -> None:
        """Raise RunFailed if writing was given up, or has hung for too long; does not wait."""
        if self._writing is None:
            return
        if self._writing.done():
            self._writing.result()
        elif time.monotonic() - self._since > self._patience_s + LONGEST_PAUSE_S:
            raise self._given_up("it does not answer")

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

    def _write_waiting(self) -> None:
        """Write what waits, until nothing does."""
        pause = 1.0
        while True:
            with self._lock:
                if not self._waiting:
                    return
                state = self._waiting[0]
            try:
                self._write(*state)
            except OSError as error:
                if time.monotonic() - self._since > self._patience_s:
                    raise self._given_up(str(error)) from error
                if not self._trouble:
                    self._trouble = True
                    self._note(f"a checkpoint could not be written ({error}): training on, and trying again")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            if self._trouble:
                self._trouble = False
                self._note("checkpoints can be written again")
            self._since, pause = time.monotonic(), 1.0
            with self._lock:
                self._waiting = [other for other in self._waiting if other is not state]

    def _given_up(self, why: str) -> RunFailed:
        return RunFailed(
            f"--runs: no checkpoint could be written to {self._storage.uri} for {self._patience_s:.0f} seconds "
            f"({why}); the last good one is of step {self.last_step}"
        )

    def _write(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        data = safetensors.torch.save(tensors, {"meta": json.dumps(meta)})
        name = f"step-{meta['step']:09d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        self._storage.write(name, data)
        self._val_loss[name] = _score(meta)
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
            self._val_loss[name] = _score(checkpoint.meta) if checkpoint else math.inf
        loss = self._val_loss[name]
        return loss if loss < math.inf else None

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


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix + "/"): t for name, t in tensors.items() if name.startswith(prefix + "/")}
