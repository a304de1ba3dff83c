"""metrics.jsonl and TensorBoard: what was recorded is read back, and an interruption leaves no epoch twice."""

from __future__ import annotations

import io
import json
import math
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dogvae.storage import Storage
from dogvae.training.metrics import Recorder, read


def record(epoch: int, run: int = 0) -> dict[str, Any]:
    """Of an epoch, with numbers that tell it and the run apart."""
    return {
        "epoch": epoch,
        "step": 10 * epoch + 10,
        "train_loss": 100.5 - epoch + run,
        "val_loss": 90.25 - epoch + run,
        "val_active_latents": 7 + epoch,
        "lr": 0.001 * (epoch + 1),
    }


TAGS = {
    "run/step": "step",
    "train/loss": "train_loss",
    "val/loss": "val_loss",
    "val/active_latents": "val_active_latents",
    "run/lr": "lr",
}


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 12, 20), np.uint8)


def board(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def next_second() -> None:
    """Event files are named by the second in which they begin."""
    time.sleep(1.01 - time.time() % 1)


def strict(line: str) -> Any:
    """JSON as others read it: without NaN and Infinity, which only Python knows."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_line_of_json_for_each_epoch(tmp_path: Path) -> None:
    recorder = Recorder(Storage(tmp_path), [])
    for epoch in range(3):
        recorder.record(record(epoch), {})
        recorder.wait()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [strict(line) for line in lines] == [record(e) for e in range(epoch + 1)]
    recorder.close()
    assert read(Storage(tmp_path)) == [record(epoch) for epoch in range(3)]


def test_numbers_that_are_none_are_still_json(tmp_path: Path) -> None:
    recorder = Recorder(Storage(tmp_path), [])
    recorder.record({"epoch": 0, "val_loss": math.nan, "train_loss": math.inf}, {})
    recorder.close()
    strict((tmp_path / "metrics.jsonl").read_text())


def test_nothing_recorded_yet(tmp_path: Path) -> None:
    assert read(Storage(tmp_path)) == []


def test_resume_drops_what_lies_beyond(tmp_path: Path) -> None:
    recorder = Recorder(Storage(tmp_path), [])
    for epoch in range(4):
        recorder.record(record(epoch), {})
    recorder.close()
    resumed = Recorder(Storage(tmp_path), [record(0), record(1)])
    resumed.record(record(2, run=1), {})
    resumed.close()
    assert read(Storage(tmp_path)) == [record(0), record(1), record(2, run=1)]


def test_tensorboard_reads_what_was_recorded(tmp_path: Path) -> None:
    recorder = Recorder(Storage(tmp_path), [])
    for epoch in range(3):
        recorder.record(record(epoch), {"samples": picture(epoch)} if epoch != 1 else {})
    recorder.close()
    events = board(tmp_path)
    assert set(events.Tags()["scalars"]) == set(TAGS)
    for tag, name in TAGS.items():
        got = [(event.step, event.value) for event in events.Scalars(tag)]
        assert got == [(epoch, pytest.approx(record(epoch)[name], rel=1e-6)) for epoch in range(3)]
    assert events.Tags()["images"] == ["samples"]
    images = events.Images("samples")
    assert [image.step for image in images] == [0, 2]
    for image in images:
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert np.array_equal(pixels, picture(image.step).transpose(1, 2, 0))


def test_tensorboard_sees_an_epoch_at_once(tmp_path: Path) -> None:
    """While the run goes on: nobody waits for its end to look at it, and what a kill leaves is complete."""
    recorder = Recorder(Storage(tmp_path), [])
    try:
        recorder.record(record(0), {f"picture-{i}": picture(i) for i in range(30)})
        recorder.wait()
        events = board(tmp_path)
        assert [event.step for event in events.Scalars("val/loss")] == [0]
        assert [len(events.Images(f"picture-{i}")) for i in range(30)] == [1] * 30
    finally:
        recorder.close()


def test_no_epoch_appears_twice_after_a_resume(tmp_path: Path) -> None:
    """A run is killed after epoch 3, of which epochs 2 and 3 have no checkpoint, and goes on; and once more."""
    killed = Recorder(Storage(tmp_path), [])
    for epoch in range(4):
        killed.record(record(epoch), {"samples": picture(epoch)})
    killed.wait()
    for run, first in ((1, 2), (2, 3)):
        next_second()
        resumed = Recorder(Storage(tmp_path), read(Storage(tmp_path))[:first])
        for epoch in range(first, 5):
            resumed.record(record(epoch, run), {"samples": picture(100 * run + epoch)})
        resumed.close()
    events = board(tmp_path)
    expected = [record(0), record(1), record(2, run=1), record(3, run=2), record(4, run=2)]
    for tag, name in TAGS.items():
        got = [(event.step, event.value) for event in events.Scalars(tag)]
        assert got == [(r["epoch"], pytest.approx(r[name], rel=1e-6)) for r in expected]
    images = events.Images("samples")
    assert [image.step for image in images] == [0, 1, 2, 3, 4]
    for image, seed in zip(images, [0, 1, 102, 203, 204], strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert np.array_equal(pixels, picture(seed).transpose(1, 2, 0))
    assert read(Storage(tmp_path)) == expected


def test_what_only_the_checkpoint_knows_is_written_at_the_start(tmp_path: Path) -> None:
    """A kill came after the checkpoint of epoch 2 and before its line, its curve and its successor."""
    killed = Recorder(Storage(tmp_path), [])
    killed.record(record(0), {})
    killed.wait()
    next_second()
    Recorder(Storage(tmp_path), [record(0), record(1)]).close()
    assert read(Storage(tmp_path)) == [record(0), record(1)]
    assert [event.step for event in board(tmp_path).Scalars("val/loss")] == [0, 1]


class Slow(Storage):
    """Storage that answers late."""

    def write(self, name: str, data: bytes) -> None:
        time.sleep(0.5)
        super().write(name, data)


def test_slow_storage_does_not_hold_up_training(tmp_path: Path) -> None:
    recorder = Recorder(Slow(tmp_path), [])
    began = time.monotonic()
    for epoch in range(4):
        recorder.record(record(epoch), {})
    assert time.monotonic() - began < 0.5
    recorder.close()
    assert read(Storage(tmp_path)) == [record(epoch) for epoch in range(4)]


def test_resume_within_the_same_second_keeps_the_curves(tmp_path: Path) -> None:
    next_second()
    for epoch in range(2):
        recorder = Recorder(Storage(tmp_path), [record(0)][:epoch])
        recorder.record(record(epoch), {})
        recorder.close()
    assert len(list(tmp_path.glob("events.*"))) == 2


class Failing(Storage):
    """Storage whose second write fails."""

    writes = 0

    def write(self, name: str, data: bytes) -> None:
        self.writes += 1
        if self.writes == 2:
            raise OSError("no space")
        super().write(name, data)


def test_what_could_not_be_written_comes_with_the_next_epoch(tmp_path: Path) -> None:
    told: list[str] = []
    recorder = Recorder(Failing(tmp_path), [], told.append)
    for epoch in range(3):
        recorder.record(record(epoch), {})
        recorder.wait()
        assert read(Storage(tmp_path)) == [record(e) for e in range(epoch if epoch == 1 else epoch + 1)]
    recorder.close()
    assert len(told) == 1
    assert "epoch 2 could not be written (no space)" in told[0]
    assert [event.step for event in board(tmp_path).Scalars("val/loss")] == [0, 1, 2]


class Refusing(Storage):
    """Storage that refuses the first writes."""

    refused = 0

    def write(self, name: str, data: bytes) -> None:
        if self.refused < 2:
            self.refused += 1
            raise OSError("no room")
        super().write(name, data)


def test_what_failed_to_the_end_is_tried_once_more(tmp_path: Path) -> None:
    told: list[str] = []
    recorder = Recorder(Refusing(tmp_path), [], told.append)
    for epoch in range(2):
        recorder.record(record(epoch), {})
    recorder.close()
    assert [line[:28] for line in told] == ["the metrics of epoch 1 could", "the metrics of epoch 2 could"]
    assert read(Storage(tmp_path)) == [record(0), record(1)]


def test_storage_that_hangs_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dogvae.training.metrics.CLOSE_S", 0.1)
    told: list[str] = []
    recorder = Recorder(Slow(tmp_path), [], told.append)
    recorder.record(record(0), {})
    began = time.monotonic()
    recorder.close()
    assert time.monotonic() - began < 0.4
    assert "does not answer" in told[0]
