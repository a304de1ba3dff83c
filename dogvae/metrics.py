"""What a run leaves to be read: metrics.jsonl, a line an epoch, and TensorBoard events. Only rank 0 writes them."""

from __future__ import annotations

import json
import math
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dogvae.console import warn
from dogvae.storage import Storage

FILE = "metrics.jsonl"


def read(storage: Storage) -> list[dict[str, Any]]:
    """The epochs of a run so far, oldest first; none if it has not finished one."""
    try:
        lines = storage.read(FILE).decode().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


class Recorder:
    """Writes the record of each epoch from `first_epoch` on; what an interrupted run wrote beyond it is dropped."""

    def __init__(self, storage: Storage, first_epoch: int, note: Callable[[str], None] = warn) -> None:
        # Not SummaryWriter: its thread writes when it likes, and what a kill leaves then lacks the last epochs.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._storage, self._note = storage, note
        self._records = [record for record in read(storage) if record["epoch"] < first_epoch]
        # TensorBoard needs a local folder; for an object store it is a copy that is uploaded epoch by epoch.
        self._folder = storage.local or Path(tempfile.mkdtemp(prefix="dogvae-events-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._board = EventsWriter(str(self._folder / "events"), f".{uuid.uuid4().hex[:8]}")
        # Tells TensorBoard to forget what earlier files say of these epochs.
        self._event(first_epoch, session_log=SessionLog(status=SessionLog.START))

    def record(self, record: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        """Append an epoch: `record["epoch"]` and its numbers, and pictures (3, H, W) uint8 by name.

        Storage that fails does not stop a run: it is noted, and the next epoch writes all lines again.
        """
        self._records.append({k: v if math.isfinite(v) else None for k, v in record.items()})
        try:
            self._write(record, pictures)
        except OSError as error:
            self._note(f"the metrics of epoch {record['epoch'] + 1} could not be written ({error}): trying again later")

    def _write(self, record: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        from tensorboardX import summary

        self._storage.write(FILE, "".join(json.dumps(r) + "\n" for r in self._records).encode())
        epoch = record["epoch"]
        for name, value in record.items():
            if name != "epoch":
                group, _, rest = name.partition("_")
                tag = f"{group}/{rest}" if group in ("train", "val") else f"run/{name}"
                self._event(epoch, summary=summary.scalar(tag, value))
        for name, picture in pictures.items():
            self._event(epoch, summary=summary.image(name, picture))
        self._board.flush()
        self._upload()

    def close(self) -> None:
        """Finish the event file."""
        try:
            self._board.close()
            self._upload()
        except OSError as error:
            self._note(f"TensorBoard's file could not be finished ({error})")

    def _event(self, epoch: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._board.write_event(Event(wall_time=time.time(), step=epoch, **what))

    def _upload(self) -> None:
        if self._storage.local is None:
            for path in self._folder.iterdir():
                self._storage.write(path.name, path.read_bytes())
