"""The metrics of a run: metrics.jsonl, with a line for each epoch, and the thread that writes it on rank 0.

The thread also writes TensorBoard's file and results.png.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from typing import TYPE_CHECKING, Any

import numpy as np

from dogvae.config import Config
from dogvae.console import explained_text, warn
from dogvae.json_text import parse
from dogvae.storage import Storage
from dogvae.training.tensorboard import EventFile

if TYPE_CHECKING:
    from dogvae.training.trackers import Tracker

FILE, RESULTS = "metrics.jsonl", "results.png"
LEAST_GAIN = 0.03  # of a run that is still improving
DRAWING = 0.02  # share of the time in which results.png may be drawn
CLOSE_S = 30.0  # how long a run waits at its end for the last write


def read(storage: Storage) -> list[dict[str, Any]]:
    """The records of the finished epochs of a run, oldest first."""
    try:
        lines = storage.read(FILE).decode().splitlines()
    except FileNotFoundError:
        return []
    return [parse(line) for line in lines]


def with_finite_loss(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records whose validation loss is a finite number."""
    return [r for r in records if r["val_loss"] is not None and math.isfinite(r["val_loss"])]


def best(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The record with the least validation loss, or None."""
    return min(with_finite_loss(records), key=lambda r: r["val_loss"], default=None)


def still_improving(records: Sequence[dict[str, Any]]) -> bool:
    """Whether the last quarter of the epochs lowered the unexplained share of the variance by more than 3%."""
    if len(records) < 4:
        return False
    before, after = (records[i].get("val_explained") for i in (-1 - len(records) // 4, -1))
    return before is not None and after is not None and 1 - after < (1 - LEAST_GAIN) * (1 - before)


def describe(record: dict[str, Any]) -> str:
    """The validation of an epoch in words, for the console."""
    if "val_gaussian_loss" in record:  # of a flow prior
        return f"velocity loss {record['val_loss']:.4f}, of the Gaussian {record['val_gaussian_loss']:.4f}"
    names = ("loss", "reconstruction", "kl", "explained", "psnr")
    loss, reconstruction, kl, explained, psnr = (record[f"val_{name}"] for name in names)
    terms = f"loss {loss:.0f} = reconstruction {reconstruction:.0f} + KL {kl:.0f}"
    return f"{terms}, explained {explained_text(explained)}, {psnr:.1f} dB"


def json_ready(record: dict[str, Any]) -> dict[str, Any]:
    """A copy of a record with None for NaN and infinity, which JSON does not have."""
    return {k: v if math.isfinite(v) else None for k, v in record.items()}


class Recorder:
    """Writes a record for each epoch, after the given `records` of earlier epochs. Later lines in the file are dropped.

    With a `config`, it also writes the settings for TensorBoard, and keeps results.png up to date. Writing happens in
    the background, so that slow or failing storage does not delay training. A failure is noted, and the next epoch
    writes all lines again. The `trackers` get each epoch, too.
    """

    def __init__(
        self,
        storage: Storage,
        records: Sequence[dict[str, Any]],
        note: Callable[[str], None] = warn,
        config: Config | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._storage, self._note, self._config, self._trackers = storage, note, config, trackers
        self._records = list(records)
        self._thread = ThreadPoolExecutor(1)
        self._behind = False  # whether the file lacks lines
        self._undrawn: tuple[list[dict[str, Any]], dict[str, np.ndarray]] | None = None  # what results.png lacks
        self._draw_again = 0.0  # the time from which on results.png may be drawn again
        first = min(len(self._records), len(read(storage)))
        self._events = EventFile(storage, first)
        if config is not None:
            self._events.begin({k: v for k, v in config.flat().items() if k not in ("data", "fingerprint")})
        for known in self._records[first:]:  # a kill came after their checkpoint and before their line
            self._thread.submit(self._write, self._records[:], known, {})

    def record(self, record: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        """Append an epoch: its record, and pictures (3, H, W) uint8 by name."""
        self._records.append(json_ready(record))
        self._thread.submit(self._write, list(self._records), record, pictures)
        for tracker in self._trackers:
            tracker.record(self._records[-1], pictures)

    def _write(self, records: list[dict[str, Any]], record: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        try:
            self._events.record(record, pictures)
            self._write_lines(records)
        except OSError as error:
            self._behind = True
            self._note(f"the metrics of epoch {record['epoch'] + 1} could not be written ({error}): trying again later")
        if pictures and self._config is not None:
            self._undrawn = records, pictures
        if time.monotonic() >= self._draw_again:
            self._draw()

    def wait(self, last: bool = False) -> None:
        """Wait until all recorded epochs have been written, or have failed. `last`: end the runs of the trackers."""
        self._thread.submit(int).result()
        for tracker in self._trackers:
            if last:
                tracker.close("finished", self._records)
            else:
                tracker.wait()
        self._trackers = () if last else self._trackers

    def _write_lines(self, records: list[dict[str, Any]]) -> None:
        self._storage.write(FILE, "".join(json.dumps(r) + "\n" for r in records).encode())
        self._behind = False

    def _draw(self) -> None:
        if self._undrawn is None:
            return
        from dogvae.training import results  # late: most processes that read metrics draw nothing

        began = time.monotonic()
        name = self._storage.uri.partition("?")[0].rpartition("/")[2]
        try:
            self._storage.write(RESULTS, results.draw(name, *self._undrawn))
        except OSError as error:
            self._note(f"{RESULTS} could not be written ({error})")
        self._undrawn = None
        now = time.monotonic()
        self._draw_again = now + (now - began) / DRAWING

    def _catch_up(self) -> None:
        self._draw()
        if self._behind:
            try:
                self._write_lines(self._records)
            except OSError as error:
                self._note(f"the last lines of {FILE} are missing ({error}): a resumed run writes them")

    def close(self, state: str = "stopped") -> None:
        """Write what is left to write, and delete the local folder of an object store.

        `state` is how the run has ended: `finished`, `stopped` or `failed`. Storage that hangs is given up after
        CLOSE_S seconds: the checkpoint holds all records, so a resumed run can write the missing lines.
        """
        for tracker in self._trackers:
            tracker.close(state, self._records)
        try:
            self._thread.submit(self._catch_up).result(CLOSE_S)
        except TimeoutError:
            self._thread.shutdown(wait=False)
            self._note(f"{self._storage.uri} does not answer: the last lines of {FILE} may be missing")
            return
        self._thread.shutdown()
        try:
            if state == "finished" and self._config is not None:
                self._events.end()
            self._events.close()
        except OSError as error:
            self._note(f"TensorBoard's file could not be finished ({error})")
        self._events.delete_copy()
