"""Checkpoints: the full training state in one file with a checksum, written in the background.

A checkpoint is a safetensors file, so loading it runs no code. Its name holds the step and the first 16 hex digits of
the SHA-256 of its bytes: `step-000000800-3fa9c1d2e4b5a697.safetensors`. A file whose hash differs is never used.
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
import torch
from torch import Tensor

from dogvae.console import warn
from dogvae.errors import RunFailed
from dogvae.storage import Storage
from dogvae.training.run_folder import CHECKPOINTS

KEEP_LATEST = 2  # the newest, and the one before it in case the newest is damaged
LONGEST_PAUSE_S = 30.0  # between two attempts to write
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.safetensors")


class Checkpoint(NamedTuple):
    """Tensors by name, and JSON-ready `meta`: `epoch`, `step`, `val_loss` and whatever else the loop saves."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class _Waiting(NamedTuple):
    """A state to write; its tensors are complete once `arrived` has happened."""

    tensors: dict[str, Tensor]
    arrived: torch.cuda.Event | None
    meta: dict[str, Any]


def _moving_to_host(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """The tensors in host memory, and the event that ends the copies of a GPU's: they have a stream of their own."""
    device = next((t.device for t in tensors.values() if t.is_cuda), None)
    if device is None:
        return tensors, None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        moved = {name: t.to("cpu", non_blocking=True) for name, t in tensors.items()}
    for t in tensors.values():
        if t.is_cuda:
            t.record_stream(stream)  # its memory is free for others only after its copy
    return moved, stream.record_event()


def _score(meta: dict[str, Any]) -> float:
    """`val_loss`, or infinity without one: the best checkpoint has the least."""
    loss = meta.get("val_loss")
    return loss if loss is not None and math.isfinite(loss) else math.inf


class Checkpoints:
    """The checkpoints of the run in `storage`. The latest ones and the best by `val_loss` are kept.

    Writing happens in the background. At most two states queue behind a running write: the newest and the best. While
    the storage fails, writing is retried with growing pauses; after `patience_s` seconds without success it ends with
    RunFailed. `note` gets a line for each damaged file, and when the storage fails and recovers.
    """

    def __init__(self, storage: Storage, note: Callable[[str], None] = warn, patience_s: float = 600.0) -> None:
        self._storage = storage / CHECKPOINTS
        self._note = note
        self._patience_s = patience_s
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._lock = Lock()
        self._waiting: list[_Waiting] = []
        self._since = 0.0  # when a write last succeeded, or the writing began
        self._failing = False  # whether the last write failed
        self._scores: dict[str, float] = {}  # `_score` of each file
        self.last_step = 0
        """Step of the newest checkpoint that is known to be on the storage."""

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Copy the state now and write it in the background. Raises as `check` does.

        Tensors of a GPU are copied there. The copies move to host memory beside the next steps, and no host waits.
        """
        self.check()
        copies = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        state = _Waiting(*_moving_to_host(copies), meta)
        with self._lock:
            idle = not self._waiting  # a state waits until it is written, and then the thread looks again
            best = min(self._waiting, key=lambda c: _score(c.meta), default=None)
            best_first = [best] if best and _score(best.meta) < math.inf else []
            self._waiting = [*best_first, state]
            if idle:
                self._since = time.monotonic()
                self._writing = self._thread.submit(self._write_waiting)

    def wait(self) -> None:
        """Wait until all saved states are on the storage. Raises RunFailed if writing was given up."""
        if self._writing is not None:
            self._writing.result()

    def check(self) -> None:
        """Raise RunFailed if writing was given up, or hangs for too long. Does not wait."""
        if self._writing is None:
            return
        if self._writing.done():
            self._writing.result()
        elif time.monotonic() - self._since > self._patience_s + LONGEST_PAUSE_S:
            raise self._given_up("it does not answer")

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, or None."""
        found = self._first_undamaged(reversed(self._names()))
        self.last_step = found.meta["step"] if found else 0
        return found

    def best(self) -> Checkpoint | None:
        """The undamaged checkpoint with the least `val_loss`; without any `val_loss`, the latest."""
        scored = [(loss, name) for name in self._names() if (loss := self._loss_of(name)) is not None]
        return self._first_undamaged(name for _, name in sorted(scored)) or self.latest()

    def _names(self) -> list[str]:
        return [name for name in self._storage.names() if _NAME.fullmatch(name)]

    def _write_waiting(self) -> None:
        """Write the queued states until the queue is empty."""
        pause = 1.0
        while True:
            with self._lock:
                if not self._waiting:
                    return
                state = self._waiting[0]
            if state.arrived is not None:
                state.arrived.synchronize()
            try:
                self._write(state.tensors, state.meta)
            except OSError as error:
                if time.monotonic() - self._since > self._patience_s:
                    raise self._given_up(str(error)) from error
                if not self._failing:
                    self._failing = True
                    self._note(f"a checkpoint could not be written ({error}): training goes on, and it is tried again")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            if self._failing:
                self._failing = False
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
        self._scores[name] = _score(meta)
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
        if name not in self._scores:
            checkpoint = self._read(name)
            self._scores[name] = _score(checkpoint.meta) if checkpoint else math.inf
        loss = self._scores[name]
        return loss if loss < math.inf else None

    def _first_undamaged(self, names: Iterable[str]) -> Checkpoint | None:
        return next((checkpoint for name in names if (checkpoint := self._read(name)) is not None), None)

    def _read(self, name: str) -> Checkpoint | None:
        data = self._storage.read(name)
        match = _NAME.fullmatch(name)
        assert match
        if hashlib.sha256(data).hexdigest()[:16] != match[2]:
            self._note(f"{self._storage.uri}/{name} is damaged (its checksum differs): it is not used")
            return None
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return Checkpoint(safetensors.torch.load(data), json.loads(header["__metadata__"]["meta"]))


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, under the rest of their names."""
    return {name.removeprefix(prefix + "/"): t for name, t in tensors.items() if name.startswith(prefix + "/")}
