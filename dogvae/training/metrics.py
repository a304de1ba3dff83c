"""What a run leaves to be read: metrics.jsonl, a line an epoch, and TensorBoard events. Only rank 0 writes them."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import Any

import numpy as np

from dogvae.console import warn
from dogvae.storage import Storage

FILE = "metrics.jsonl"
CLOSE_S = 30.0  # how long the end of a run waits for its last lines


def read(storage: Storage) -> list[dict[str, Any]]:
    """The epochs of a run so far, oldest first; none if it has not finished one."""
    try:
        lines = storage.read(FILE).decode().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def finite(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records whose validation loss is a finite number."""
    return [r for r in records if r["val_loss"] is not None and math.isfinite(r["val_loss"])]


def best(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The record of the epoch with the least validation loss."""
    return min(finite(records), key=lambda r: r["val_loss"], default=None)


def describe(record: dict[str, Any]) -> str:
    """An epoch's validation in words."""
    loss, reconstruction, kl, explained = (record[f"val_{k}"] for k in ("loss", "reconstruction", "kl", "explained"))
    return f"loss {loss:.0f} = reconstruction {reconstruction:.0f} + KL {kl:.0f}, explained {explained:.3f}"


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a line of the file has it: None for what is no finite number."""
    return {k: v if math.isfinite(v) else None for k, v in record.items()}


class Recorder:
    """Writes the record of each epoch after `records`, those of the epochs before; what a file says beyond is dropped.

    In the background, so that storage which fails or hangs does not hold up training: it is noted, and the next epoch
    writes all lines again.
    """

    def __init__(self, storage: Storage, records: Sequence[dict[str, Any]], note: Callable[[str], None] = warn) -> None:
        # Not SummaryWriter: its thread writes when it likes, and what a kill leaves then lacks the last epochs.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._storage, self._note = storage, note
        self._records = list(records)
        self._thread = ThreadPoolExecutor(1)
        self._behind = False  # the file lacks lines
        # TensorBoard needs a local folder; for an object store it is a copy that is uploaded epoch by epoch.
        self._folder = storage.local or Path(tempfile.mkdtemp(prefix="dogvae-events-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._board = EventsWriter(str(self._folder / "events"), f".{uuid.uuid4().hex[:8]}")
        # Tells TensorBoard to forget what earlier files say of these epochs.
        first = min(len(self._records), len(read(storage)))
        self._event(first, session_log=SessionLog(status=SessionLog.START))
        for known in self._records[first:]:  # a kill came between their checkpoint and them
            self._thread.submit(self._write, self._records[:], known, {})

    def record(self, record: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        """Append an epoch: `record["epoch"]` and its numbers, and pictures (3, H, W) uint8 by name."""
        self._records.append(plain(record))
        self._thread.submit(self._write, list(self._records), record, pictures)

    def _write(self, records: list[dict[str, Any]], record: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        from tensorboardX import summary

        epoch = record["epoch"]
        try:
            for name, value in record.items():
                if name != "epoch" and value is not None:
                    group, _, rest = name.partition("_")
                    tag = f"{group}/{rest}" if group in ("train", "val") else f"run/{name}"
                    self._event(epoch, summary=summary.scalar(tag, value))
            for name, picture in pictures.items():
                self._event(epoch, summary=summary.image(name, picture))
            self._write_lines(records)
            self._board.flush()
            self._upload()
        except OSError as error:
            self._behind = True
            self._note(f"the metrics of epoch {epoch + 1} could not be written ({error}): trying again later")

    def wait(self) -> None:
        """Until what was recorded is written, or was tried."""
        self._thread.submit(int).result()

    def _write_lines(self, records: list[dict[str, Any]]) -> None:
        self._storage.write(FILE, "".join(json.dumps(r) + "\n" for r in records).encode())
        self._behind = False

    def _catch_up(self) -> None:
        if self._behind:
            try:
                self._write_lines(self._records)
            except OSError as error:
                self._note(f"the last lines of {FILE} are missing ({error}): a run that goes on writes them")

    def close(self) -> None:
        """Write what is still to be written; of an object store the local copy goes.

        Does not wait for ever for storage that hangs: the checkpoint knows what is missing then.
        """
        try:
            self._thread.submit(self._catch_up).result(CLOSE_S)
        except TimeoutError:
            self._thread.shutdown(wait=False)
            self._note(f"{self._storage.uri} does not answer: the last lines of {FILE} may be missing")
            return
        self._thread.shutdown()
        try:
            self._board.close()
            self._upload()
        except OSError as error:
            self._note(f"TensorBoard's file could not be finished ({error})")
        if self._storage.local is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _event(self, epoch: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._board.write_event(Event(wall_time=time.time(), step=epoch, **what))

    def _upload(self) -> None:
        if self._storage.local is None:
            for path in self._folder.iterdir():
                self._storage.write(path.name, path.read_bytes())
