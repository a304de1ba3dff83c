"""metrics.jsonl and TensorBoard: what was recorded is read back, and a resumed run has no epoch twice."""

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
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dogvae.config import Config
from dogvae.storage import Storage
from dogvae.training import results
from dogvae.training.metrics import Recorder, describe, json_ready, read, still_improving
from dogvae.training.previews import NORMAL
from tests.support.storage import UnreliableStorage

TAGS = {
    "workings/step": "step",
    "train/loss": "train_loss",
    "val/loss": "val_loss",
    "workings/val_active_latents": "val_active_latents",
    "workings/lr": "lr",
}


def record(epoch: int, run: int = 0) -> dict[str, Any]:
    """The record of an epoch, with numbers that differ from epoch to epoch and from run to run."""
    return {
        "epoch": epoch,
        "step": 10 * epoch + 10,
        "train_loss": 100.5 - epoch + run,
        "val_loss": 90.25 - epoch + run,
        "val_active_latents": 7 + epoch,
        "lr": 0.001 * (epoch + 1),
    }


def validated(epoch: int) -> dict[str, Any]:
    """The record of an epoch of a VAE, with the numbers that results.png shows."""
    names = ("loss", "reconstruction", "kl", "explained", "psnr")
    return {"epoch": epoch, "train_loss": 9.0 - epoch, "train_kl": 1.0, **{f"val_{n}": 8.0 - epoch for n in names}}


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 12, 20), np.uint8)


def check_tensorboard(folder: Path, records: list[dict[str, Any]], pictures: dict[int, int]) -> None:
    """The curves are those of the records, and the pictures, by epoch, those with these seeds."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert set(events.Tags()["scalars"]) == set(TAGS)
    for tag, name in TAGS.items():
        got = [(event.step, event.value) for event in events.Scalars(tag)]
        assert got == [(r["epoch"] + 1, pytest.approx(r[name], rel=1e-6)) for r in records]
    assert events.Tags()["images"] == [f"view/{NORMAL}"] * bool(pictures)
    images = events.Images(f"view/{NORMAL}") if pictures else []
    assert [image.step for image in images] == [epoch + 1 for epoch in pictures]
    for image in images:
        pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert np.array_equal(pixels, picture(pictures[image.step - 1]).transpose(1, 2, 0))


def next_second() -> None:
    """Event files are named by the second in which they begin."""
    time.sleep(1.01 - time.time() % 1)


def strict(line: str) -> Any:
    """JSON as other programs read it: without NaN and Infinity, which only Python knows."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_every_epoch_is_at_once_in_metrics_jsonl_and_tensorboard(tmp_path: Path) -> None:
    assert read(Storage(tmp_path)) == []
    recorder = Recorder(Storage(tmp_path), [])
    for epoch in range(3):
        recorder.record(record(epoch), {NORMAL: picture(epoch)} if epoch != 1 else {})
        recorder.wait()
        expected = [record(e) for e in range(epoch + 1)]
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [strict(line) for line in lines] == read(Storage(tmp_path)) == expected
        check_tensorboard(tmp_path, expected, {e: e for e in (0, 2) if e <= epoch})
    recorder.close()
    check_tensorboard(tmp_path, expected, {0: 0, 2: 2})


@pytest.mark.parametrize(
    ("explained", "improving"),
    [
        ([0.6, 0.7, 0.8, 0.81], True),  # 0.2 to 0.19 is 5% less
        ([0.6, 0.7, 0.8, 0.805], False),  # 2.5% less
        ([0.6, 0.7, 0.8, 0.79], False),
        ([0.6, 0.7, 0.8], False),  # too few epochs to say
        ([0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8], False),
        ([0.6, 0.7, None, 0.8], False),
    ],
)
def test_run_is_still_improving_if_its_last_quarter_left_less_unexplained(
    explained: list[float | None], improving: bool
) -> None:
    assert still_improving([{"val_explained": value} for value in explained]) == improving


def test_epoch_of_images_that_do_not_differ_is_described_before_and_after_json() -> None:
    names = ("loss", "reconstruction", "kl", "psnr")
    record = {f"val_{name}": 1.0 for name in names} | {"val_explained": math.nan}
    for each in (record, json_ready(record)):
        assert describe(each).endswith("explained not defined (the images do not differ), 1.0 dB")


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    recorder = Recorder(Storage(tmp_path), [])
    recorder.record({"epoch": 0, "val_loss": math.nan, "train_loss": math.inf}, {})
    recorder.close()
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"epoch": 0, "val_loss": None, "train_loss": None}


def test_resumed_runs_replace_the_epochs_that_have_no_checkpoint(tmp_path: Path) -> None:
    """A run is killed after epoch 3 and resumed from a checkpoint of epoch 1; then again from one of epoch 2."""
    killed = Recorder(Storage(tmp_path), [])
    for epoch in range(4):
        killed.record(record(epoch), {NORMAL: picture(epoch)})
    killed.wait()
    for run, first in ((1, 2), (2, 3)):
        next_second()
        resumed = Recorder(Storage(tmp_path), read(Storage(tmp_path))[:first])
        for epoch in range(first, 5):
            resumed.record(record(epoch, run), {NORMAL: picture(100 * run + epoch)})
        resumed.close()
    expected = [record(0), record(1), record(2, run=1), record(3, run=2), record(4, run=2)]
    assert read(Storage(tmp_path)) == expected
    check_tensorboard(tmp_path, expected, {0: 0, 1: 1, 2: 102, 3: 203, 4: 204})


def test_epochs_that_only_the_checkpoint_holds_are_written_at_the_start(tmp_path: Path) -> None:
    """A kill came after the checkpoint of epoch 1 and before its line and its curve."""
    killed = Recorder(Storage(tmp_path), [])
    killed.record(record(0), {})
    killed.wait()
    next_second()
    Recorder(Storage(tmp_path), [record(0), record(1)]).close()
    assert read(Storage(tmp_path)) == [record(0), record(1)]
    check_tensorboard(tmp_path, [record(0), record(1)], {})


def test_resume_within_the_same_second_keeps_the_first_event_file(tmp_path: Path) -> None:
    next_second()
    for epoch in range(2):
        recorder = Recorder(Storage(tmp_path), [record(0)][:epoch])
        recorder.record(record(epoch), {})
        recorder.close()
    assert len(list(tmp_path.glob("events.*"))) == 2


def test_settings_and_the_end_of_a_run_are_in_tensorboard(tmp_path: Path) -> None:
    """Only the HParams of a run that has done all its epochs have the status SUCCESS; a resumed run has them once."""
    config = Config.make(lr=0.25)
    for ended in (False, True):
        recorder = Recorder(Storage(tmp_path), read(Storage(tmp_path)), config=config)
        recorder.record({**validated(len(read(Storage(tmp_path)))), "lr": 0.25}, {})
        recorder.close("finished" if ended else "stopped")
        events = EventAccumulator(str(tmp_path)).Reload()
        text = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
        assert json.loads(text.strip("`\n"))["lr"] == 0.25
        plugin = HParamsPluginData.FromString(
            events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        )
        assert plugin.session_start_info.hparams["lr"].number_value == 0.25
        if not ended:
            with pytest.raises(KeyError):
                events.SummaryMetadata("_hparams_/session_end_info")
            next_second()
    end = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_end_info").plugin_data.content)
    assert end.session_end_info.status == Status.Value("STATUS_SUCCESS")


def test_results_png_is_drawn_at_once_and_at_the_end_but_seldom_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = results.draw
    monkeypatch.setattr(results, "draw", lambda *args: drawn.append(len(args[1])) or draw(*args))
    recorder = Recorder(Storage(tmp_path), [], config=Config.make())
    for epoch in range(4):
        recorder.record(validated(epoch), {NORMAL: picture(epoch)} if epoch != 2 else {})
        recorder.wait()
    assert drawn == [1]
    recorder.close()
    assert drawn == [1, 4]
    Recorder(Storage(tmp_path / "trial"), []).close()
    assert not (tmp_path / "trial/results.png").exists()


def test_slow_storage_does_not_delay_training(tmp_path: Path) -> None:
    recorder = Recorder(UnreliableStorage(tmp_path, delay_s=0.2), [])
    began = time.monotonic()
    for epoch in range(4):
        recorder.record(record(epoch), {})
    assert time.monotonic() - began < 0.6  # four writes of 0.2 s would take 0.8
    recorder.close()
    assert read(Storage(tmp_path)) == [record(epoch) for epoch in range(4)]


@pytest.mark.parametrize(
    ("epochs", "fails", "noted"),
    [
        pytest.param(3, [1], [2], id="with the next epoch"),
        pytest.param(2, [0, 1], [1, 2], id="at the end"),
    ],
)
def test_lines_that_could_not_be_written_are_written_later(
    tmp_path: Path, epochs: int, fails: list[int], noted: list[int]
) -> None:
    notes: list[str] = []
    recorder = Recorder(UnreliableStorage(tmp_path, fails), [], notes.append)
    for epoch in range(epochs):
        recorder.record(record(epoch), {})
        recorder.wait()
    recorder.close()
    assert notes == [
        f"the metrics of epoch {epoch} could not be written (no answer): trying again later" for epoch in noted
    ]
    assert read(Storage(tmp_path)) == [record(epoch) for epoch in range(epochs)]
    check_tensorboard(tmp_path, [record(epoch) for epoch in range(epochs)], {})


def test_hanging_storage_does_not_delay_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dogvae.training.metrics.CLOSE_S", 0.1)
    notes: list[str] = []
    recorder = Recorder(UnreliableStorage(tmp_path, delay_s=1.0), [], notes.append)
    recorder.record(record(0), {})
    began = time.monotonic()
    recorder.close()
    assert time.monotonic() - began < 0.9
    assert "does not answer" in notes[0]
