"""Checkpoints: the full training state in one verified file, written whole, off the training path.

A checkpoint is a safetensors file, so loading it runs no code. Its name carries the step and the SHA-256 of its bytes:
`step-000000800-3fa9c1d2e4b5a697.safetensors`. A file that does not hash to its name was torn and is never used.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from dogvae.console import warn
from dogvae.storage import Storage

FOLDER = "checkpoints"
KEEP_LATEST = 2  # the newest, and the one before it should the newest turn out to be torn
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.safetensors")


class Checkpoint(NamedTuple):
    """Tensors by name, and what else was known when they were saved (JSON): among it `epoch`, `step`, `val_loss`."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of the run in `storage`: the best by `val_loss` and the latest ones are kept."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage / FOLDER
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._val_loss: dict[str, float] = {}  # of the checkpoints that have one

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy the state at once and write it in the background; waits for the write before, and raises its error."""
        self.wait()
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        self._pending = self._writer.submit(self._write, copies, meta)

    def wait(self) -> None:
        """Until the last save is on the storage; raises OSError if it could not be written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none. A torn one is named in a warning."""
        return self._first_whole(reversed(self._names()))

    def best(self) -> Checkpoint | None:
        """The whole checkpoint with the least `val_loss`, else the latest."""
        scored = [(loss, name) for name in self._names() if (loss := self._loss_of(name)) is not None]
        return self._first_whole([name for _, name in sorted(scored)]) or self.latest()

    def _names(self) -> list[str]:
        return [name for name in self._storage.names() if _NAME.fullmatch(name)]

    def _write(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        data = safetensors.torch.save(tensors, {"meta": json.dumps(meta)})
        name = f"step-{meta['step']:09d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        self._storage.write(name, data)
        if (loss := meta.get("val_loss")) is not None:
            self._val_loss[name] = loss
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

    def _first_whole(self, names: Any) -> Checkpoint | None:
        return next((checkpoint for name in names if (checkpoint := self._read(name)) is not None), None)

    def _read(self, name: str) -> Checkpoint | None:
        data = self._storage.read(name)
        match = _NAME.fullmatch(name)
        assert match
        if hashlib.sha256(data).hexdigest()[:16] != match[2]:
            warn(f"{self._storage.uri}/{name} is torn (its checksum differs): taking the checkpoint before it")
            return None
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return Checkpoint(safetensors.torch.load(data), json.loads(header["__metadata__"]["meta"]))
