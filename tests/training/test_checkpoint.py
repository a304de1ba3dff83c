"""Checkpoints: bit for bit, the right ones kept, torn ones never used, written behind the training's back."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterable
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


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/weight": torch.randn(3, 4, generator=generator),
        "model/odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.tensor(2**40 + seed),
        "empty": torch.empty(0, 3),
        "turned": torch.randn(3, 4, generator=generator).T,
        "images": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
    }


def meta(step: int, val_loss: float | None = None) -> dict[str, Any]:
    return {"epoch": step // 10, "step": step, "config": {"lr": 0.1, "ä": [None]}, "val_loss": val_loss}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and bits(a[name]) == bits(b[name])
        for name in a
    )


def saved(folder: Path, *losses: float | None) -> Checkpoints:
    """One checkpoint for each loss, at steps 10, 20, ..., with the step as the seed of its tensors."""
    checkpoints = Checkpoints(Storage(folder))
    for i, loss in enumerate(losses):
        checkpoints.save(tensors(10 * i + 10), meta(10 * i + 10, loss))
        checkpoints.wait()
    return checkpoints


def files(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").iterdir())


def steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in files(folder)]


def step_of(checkpoint: Checkpoint | None) -> int:
    assert checkpoint is not None
    assert same(checkpoint.tensors, tensors(checkpoint.meta["step"]))
    return int(checkpoint.meta["step"])


# --- what is in them


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    saved(tmp_path, 2.5)
    loaded = Checkpoints(Storage(tmp_path)).latest()  # as another process would
    assert loaded is not None
    assert same(loaded.tensors, tensors(10))
    assert loaded.meta == meta(10, 2.5)


def test_name_tells_step_and_checksum(tmp_path: Path) -> None:
    saved(tmp_path, 2.5)
    (path,) = files(tmp_path)
    assert path.name == f"step-000000010-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.safetensors"


def test_no_pickle_inside(tmp_path: Path) -> None:
    """The file is a length, a JSON header and the numbers, and nothing more: there is no code that could be run."""
    saved(tmp_path, 2.5)
    data = files(tmp_path)[0].read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header.pop("__metadata__")["meta"]) == meta(10, 2.5)
    assert set(header) == set(tensors())
    assert 8 + length + max(entry["data_offsets"][1] for entry in header.values()) == len(data)
    assert (
        sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()) == len(data) - 8 - length
    )


def test_nothing_there(tmp_path: Path) -> None:
    assert Checkpoints(Storage(tmp_path)).latest() is None
    assert Checkpoints(Storage(tmp_path)).best() is None
    Checkpoints(Storage(tmp_path)).wait()


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
    # By hand: only numbers compete, and of equals the first one stays.
    scored = [(loss, 10 * i + 10) for i, loss in enumerate(losses) if loss is not None and loss == loss]
    every = [10 * i + 10 for i in range(len(losses))]
    best = min(scored)[1] if scored else every[-1]
    assert steps(folder) == sorted({*every[-2:], *([best] if scored else [])})
    for opened in (checkpoints, Checkpoints(Storage(folder))):
        assert step_of(opened.latest()) == every[-1]
        assert step_of(opened.best()) == best


def test_the_best_survives_a_restart(tmp_path: Path) -> None:
    """A new process knows the losses of what it finds, not only of what it has written itself."""
    saved(tmp_path, 1.0, 3.0, 3.0)
    checkpoints = Checkpoints(Storage(tmp_path))
    for step in (40, 50, 60):
        checkpoints.save(tensors(step), meta(step, 2.0))
        checkpoints.wait()
    assert steps(tmp_path) == [10, 50, 60]
    assert step_of(checkpoints.best()) == 10


def test_order_is_that_of_the_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(tmp_path))
    for step in (9, 10, 100):
        checkpoints.save(tensors(step), meta(step))
        checkpoints.wait()
    assert steps(tmp_path) == [10, 100]
    assert step_of(checkpoints.latest()) == 100


# --- damage


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "emptied", "longer"])
def test_torn_file_is_skipped_with_a_warning(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 3.0, 2.0, 1.0)
    newest = files(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    if damage == "bit-flipped":
        data[-3] ^= 4
    newest.write_bytes({"truncated": data[:-1], "emptied": b"", "longer": data + b"\0"}.get(damage, bytes(data)))
    capsys.readouterr()
    for wanted in (Checkpoints.latest, Checkpoints.best):
        assert step_of(wanted(Checkpoints(Storage(tmp_path)))) == 20
        told = capsys.readouterr()
        assert told.out == ""
        assert str(newest) in told.err
        assert told.err.startswith("warning: ")


def test_all_torn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 2.0, 1.0)
    for path in files(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    assert Checkpoints(Storage(tmp_path)).latest() is None
    assert all(path.name in capsys.readouterr().err for path in files(tmp_path)[:1])
    assert Checkpoints(Storage(tmp_path)).best() is None


def test_goes_on_after_a_torn_one(tmp_path: Path) -> None:
    """The step that was torn is done again: its file has another name, and the torn one is not taken for it."""
    saved(tmp_path, 3.0, 2.0)
    torn = files(tmp_path)[-1]
    torn.write_bytes(torn.read_bytes()[:-5])
    checkpoints = Checkpoints(Storage(tmp_path))
    assert step_of(checkpoints.latest()) == 10
    checkpoints.save(tensors(20), {**meta(20, 2.0), "seconds": 7})
    checkpoints.wait()
    assert step_of(checkpoints.latest()) == 20
    assert step_of(Checkpoints(Storage(tmp_path)).best()) == 20


def test_leftovers_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, 2.0)
    (whole,) = files(tmp_path)
    for name in (f".{whole.name}.1a2b3c4d.partial", "step-000000099.safetensors", "notes.txt", f"{whole.name}.bak"):
        (whole.parent / name).write_bytes(b"junk")
    assert step_of(Checkpoints(Storage(tmp_path)).latest()) == 10
    assert step_of(Checkpoints(Storage(tmp_path)).best()) == 10
    assert capsys.readouterr().err == ""


# --- when they are written


def test_save_does_not_wait_for_the_storage(tmp_path: Path) -> None:
    """With the writer busy, as with a slow disk, `save` returns, having copied what training changes next."""
    checkpoints = Checkpoints(Storage(tmp_path))
    free = threading.Event()
    checkpoints._thread.submit(free.wait, 30)
    state = tensors(10)
    checkpoints.save(state, meta(10, 1.0))
    assert not (tmp_path / "checkpoints").exists()
    for tensor in state.values():
        tensor.zero_()
    free.set()
    checkpoints.wait()
    assert step_of(checkpoints.latest()) == 10


def test_of_those_that_wait_the_newest_and_the_best_are_written(tmp_path: Path) -> None:
    """The writer is busy for long: training is not held up, and what matters of six epochs is there in the end."""
    checkpoints = Checkpoints(Storage(tmp_path))
    free = threading.Event()
    checkpoints._thread.submit(free.wait, 30)
    for step, loss in enumerate([5.0, 3.0, 4.0, None, float("nan"), 6.0], start=1):
        checkpoints.save(tensors(step), meta(step, loss))
    free.set()
    checkpoints.wait()
    assert steps(tmp_path) == [2, 6]
    assert step_of(checkpoints.best()) == 2


class Hung(Storage):
    """Storage that does not answer, like a network share whose server has gone."""

    answers = threading.Event()

    def __truediv__(self, name: str) -> Storage:
        return Hung(f"{self.uri}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self.answers.wait(30)
        super().write(name, data)


def test_patience_with_storage_that_does_not_answer_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dogvae.training.checkpoint.LONGEST_PAUSE_S", 0.1)
    checkpoints = Checkpoints(Hung(tmp_path), patience_s=0.2)
    checkpoints.save(tensors(10), meta(10))
    checkpoints.check()
    time.sleep(0.5)
    with pytest.raises(RunFailed, match="does not answer"):
        checkpoints.check()
    Hung.answers.set()
    checkpoints.wait()
    assert steps(tmp_path) == [10]


def blocked(folder: Path) -> Path:
    """The folder of the checkpoints, replaced by a file."""
    target = folder / "checkpoints"
    shutil.rmtree(target, ignore_errors=True)
    target.write_text("in the way")
    return target


def test_training_goes_on_while_storage_fails(tmp_path: Path) -> None:
    """Saves neither wait nor raise; once the storage is back the newest state is written. Both are told in a line."""
    told: list[str] = []
    checkpoints = Checkpoints(Storage(tmp_path), told.append, patience_s=60)
    target = blocked(tmp_path)
    for step in (10, 20, 30):
        checkpoints.save(tensors(step), meta(step))
        checkpoints.check()
        time.sleep(0.2)
    assert len(told) == 1
    assert "could not be written" in told[0]
    target.unlink()
    checkpoints.wait()
    assert steps(tmp_path) == [30]
    assert checkpoints.last_step == 30
    assert len(told) == 2


def test_patience_ends(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Storage(tmp_path), lambda line: None, patience_s=0.5)
    checkpoints.save(tensors(10), meta(10))
    checkpoints.wait()
    blocked(tmp_path)
    checkpoints.save(tensors(20), meta(20))
    with pytest.raises(RunFailed, match=r"checkpoints.*step 10"):
        checkpoints.wait()
    with pytest.raises(RunFailed):
        checkpoints.check()


class Clock:
    """Time that goes on when somebody sleeps, and only then."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, []  # type: float, list[float]

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Failing(Storage):
    """Refuses some writes: those whose turn is in `fails`, counted from 0."""

    def __init__(self, uri: str | Path, fails: Iterable[int]) -> None:
        super().__init__(uri)
        self.fails, self.turn = set(fails), -1

    def __truediv__(self, name: str) -> Storage:
        return Failing(f"{self.uri}/{name}", self.fails)

    def write(self, name: str, data: bytes) -> None:
        self.turn += 1
        if self.turn in self.fails:
            raise OSError("no answer")
        super().write(name, data)


def test_pauses_grow_and_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two states wait; seven tries fail before the first, three before the second: 91 s and 7 s, each less than 93."""
    clock, told, free = Clock(), list[str](), threading.Event()
    monkeypatch.setattr("dogvae.training.checkpoint.time", clock)
    checkpoints = Checkpoints(Failing(tmp_path, [*range(7), 8, 9, 10]), told.append, patience_s=93)
    checkpoints._thread.submit(free.wait, 30)
    checkpoints.save(tensors(10), meta(10, 1.0))
    checkpoints.save(tensors(20), meta(20))
    free.set()
    checkpoints.wait()
    assert clock.pauses == [1, 2, 4, 8, 16, 30, 30, 1, 2, 4]
    assert steps(tmp_path) == [10, 20]
    assert [line.split(" (")[0] for line in told] == [
        "a checkpoint could not be written",
        "checkpoints can be written again",
    ] * 2


def test_patience_counts_from_the_last_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("dogvae.training.checkpoint.time", clock)
    checkpoints = Checkpoints(Failing(tmp_path, range(1, 99)), lambda line: None, patience_s=10)
    checkpoints.save(tensors(10), meta(10))
    checkpoints.wait()
    clock.now = 1000
    checkpoints.save(tensors(20), meta(20))
    with pytest.raises(RunFailed, match=r"for 10 seconds \(no answer\); the last good one is of step 10"):
        checkpoints.wait()
    assert clock.pauses == [1, 2, 4, 8]


def test_last_step_is_that_of_what_was_found(tmp_path: Path) -> None:
    saved(tmp_path, 3.0, 2.0)
    files(tmp_path)[-1].write_bytes(b"")
    checkpoints = Checkpoints(Storage(tmp_path), lambda line: None)
    checkpoints.latest()
    assert checkpoints.last_step == 10
