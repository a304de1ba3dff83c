"""Checkpoints: equal bit for bit, the right ones kept, damaged ones never used, written in the background."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dogvae.errors import RunFailed
from dogvae.storage import Storage
from dogvae.training.checkpoint import Checkpoint, Checkpoints
from tests.support.storage import UnreliableStorage


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/weight": torch.randn(3, 4, generator=generator),
        "model/odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.tensor(2**40 + seed),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(3, 4, generator=generator).T,
        "images": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
    }


def meta(step: int, val_loss: float | None = None) -> dict[str, Any]:
    return {"epoch": step // 10, "step": step, "config": {"lr": 0.1, "ä": [None]}, "val_loss": val_loss}


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def save(checkpoints: Checkpoints, step: int, loss: float | None = None) -> None:
    """Save tensors that are drawn with the step as their seed, and wait until they are written."""
    checkpoints.save(tensors(step), meta(step, loss))
    checkpoints.wait()


def saved(folder: Path, *losses: float | None) -> Checkpoints:
    """One checkpoint for each loss, at steps 10, 20, ..."""
    checkpoints = Checkpoints(Storage(folder))
    for i, loss in enumerate(losses, 1):
        save(checkpoints, 10 * i, loss)
    return checkpoints


def files(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").iterdir())


def steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in files(folder)]


def step_of(checkpoint: Checkpoint | None) -> int:
    """The step of a checkpoint, after a comparison of its tensors bit for bit."""
    assert checkpoint is not None
    step = int(checkpoint.meta["step"])
    assert {k: bits(t) for k, t in checkpoint.tensors.items()} == {k: bits(t) for k, t in tensors(step).items()}
    return step


def busy(checkpoints: Checkpoints) -> threading.Event:
    """Keep the writer busy, as a slow disk would, until the event is set."""
    free = threading.Event()
    checkpoints._thread.submit(free.wait, 30)
    return free


# --- the files


def test_checkpoint_is_a_safetensors_file_named_by_step_and_checksum(tmp_path: Path) -> None:
    """A length, a JSON header and the numbers: it holds nothing that could be executed."""
    saved(tmp_path, 2.5)
    (path,) = files(tmp_path)
    data = path.read_bytes()
    assert path.name == f"step-000000010-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header.pop("__metadata__")["meta"]) == meta(10, 2.5)
    assert set(header) == set(tensors())
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()]
    assert 8 + length + sum(sizes) == len(data)
    loaded = Checkpoints(Storage(tmp_path)).latest()
    assert step_of(loaded) == 10
    assert loaded is not None
    assert loaded.meta == meta(10, 2.5)


def test_empty_storage_has_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(tmp_path))
    checkpoints.wait()
    assert checkpoints.latest() is None
    assert checkpoints.best() is None


# --- which are kept


@settings(max_examples=25, deadline=None)
@given(
    losses=st.lists(st.one_of(st.integers(0, 5).map(float), st.none(), st.just(float("nan"))), min_size=1, max_size=6)
)
def test_the_best_and_the_two_latest_are_kept(
    losses: list[float | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    checkpoints = saved(folder, *losses)
    # Only numbers compete, and of equal losses the first stays.
    scored = [(loss, 10 * i + 10) for i, loss in enumerate(losses) if loss is not None and loss == loss]
    every = [10 * i + 10 for i in range(len(losses))]
    best = min(scored)[1] if scored else every[-1]
    assert steps(folder) == sorted({*every[-2:], *([best] if scored else [])})
    for opened in (checkpoints, Checkpoints(Storage(folder))):
        assert step_of(opened.latest()) == every[-1]
        assert step_of(opened.best()) == best


def test_a_new_process_keeps_the_best_of_those_it_finds(tmp_path: Path) -> None:
    saved(tmp_path, 1.0, 3.0, 3.0)
    checkpoints = Checkpoints(Storage(tmp_path))
    for step in (40, 50, 60):
        save(checkpoints, step, 2.0)
    assert steps(tmp_path) == [10, 50, 60]
    assert step_of(checkpoints.best()) == 10


# --- damage


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "emptied", "longer"])
def test_damaged_file_is_skipped_with_a_warning(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, 3.0, 2.0, 1.0)
    newest = files(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    if damage == "bit-flipped":
        data[-3] ^= 4
    newest.write_bytes({"truncated": data[:-1], "emptied": b"", "longer": data + b"\0"}.get(damage, bytes(data)))
    for find in (Checkpoints.latest, Checkpoints.best):
        checkpoints = Checkpoints(Storage(tmp_path))
        assert step_of(find(checkpoints)) == 20
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"warning: {newest} is damaged")
    checkpoints.latest()
    assert checkpoints.last_step == 20
    for path in files(tmp_path):
        path.write_bytes(b"")
    assert Checkpoints(Storage(tmp_path)).latest() is None
    assert Checkpoints(Storage(tmp_path)).best() is None


def test_other_files_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 2.0)
    (whole,) = files(tmp_path)
    for name in (f".{whole.name}.1a2b3c4d.partial", "step-000000099.safetensors", "notes.txt", f"{whole.name}.bak"):
        (whole.parent / name).write_bytes(b"junk")
    assert step_of(Checkpoints(Storage(tmp_path)).latest()) == 10
    assert step_of(Checkpoints(Storage(tmp_path)).best()) == 10
    assert capsys.readouterr().err == ""


# --- writing in the background


def test_save_copies_the_state_and_does_not_wait_for_the_storage(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(tmp_path))
    free = busy(checkpoints)
    state = tensors(10)
    checkpoints.save(state, meta(10, 1.0))
    assert not (tmp_path / "checkpoints").exists()
    for tensor in state.values():
        tensor.zero_()
    free.set()
    checkpoints.wait()
    assert step_of(checkpoints.latest()) == 10


def test_queue_keeps_only_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(tmp_path))
    free = busy(checkpoints)
    for step, loss in enumerate([5.0, 3.0, 4.0, None, float("nan"), 6.0], start=1):
        checkpoints.save(tensors(step), meta(step, loss))
    free.set()
    checkpoints.wait()
    assert steps(tmp_path) == [2, 6]
    assert step_of(checkpoints.best()) == 2


# --- storage that fails


def test_state_is_written_that_is_saved_while_the_thread_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread has found nothing more to write, and its future is not done yet."""
    checkpoints, write = Checkpoints(Storage(tmp_path)), Checkpoints._write_waiting
    found_nothing, saved_again = threading.Event(), threading.Event()

    def slow_end(self: Checkpoints) -> None:
        write(self)
        found_nothing.set()
        saved_again.wait(10)

    monkeypatch.setattr(Checkpoints, "_write_waiting", slow_end)
    checkpoints.save(tensors(), meta(10))
    assert found_nothing.wait(10)
    checkpoints.save(tensors(), meta(20))
    saved_again.set()
    checkpoints.wait()
    assert steps(tmp_path) == [10, 20]


def test_hanging_storage_ends_the_run_when_patience_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dogvae.training.checkpoint.LONGEST_PAUSE_S", 0.1)
    checkpoints = Checkpoints(UnreliableStorage(tmp_path, delay_s=2.0), patience_s=0.5)
    checkpoints.save(tensors(10), meta(10))
    checkpoints.check()
    time.sleep(1)
    with pytest.raises(RunFailed, match="does not answer"):
        checkpoints.check()
    checkpoints.wait()
    assert steps(tmp_path) == [10]


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dogvae.training.checkpoint.time", clock)
    return clock


def test_pauses_between_attempts_grow_and_start_again_after_a_success(tmp_path: Path, clock: Clock) -> None:
    """Of two queued states the first takes 91 s of pauses, the second 7 s: each less than the patience of 93 s."""
    notes: list[str] = []
    checkpoints = Checkpoints(UnreliableStorage(tmp_path, [*range(7), 8, 9, 10]), notes.append, patience_s=93)
    free = busy(checkpoints)
    checkpoints.save(tensors(10), meta(10, 1.0))
    checkpoints.save(tensors(20), meta(20))
    free.set()
    checkpoints.wait()
    assert clock.pauses == [1, 2, 4, 8, 16, 30, 30, 1, 2, 4]
    assert steps(tmp_path) == [10, 20]
    assert checkpoints.last_step == 20
    failed = "a checkpoint could not be written (no answer): training goes on, and it is tried again"
    assert notes == [failed, "checkpoints can be written again"] * 2


def test_patience_counts_from_the_last_success(tmp_path: Path, clock: Clock) -> None:
    checkpoints = Checkpoints(UnreliableStorage(tmp_path, range(1, 99)), lambda line: None, patience_s=10)
    save(checkpoints, 10)
    clock.now = 1000
    checkpoints.save(tensors(20), meta(20))
    for end in (checkpoints.wait, checkpoints.check):
        with pytest.raises(RunFailed, match=r"for 10 seconds \(no answer\); the last good one is of step 10"):
            end()
    assert clock.pauses == [1, 2, 4, 8]
