"""`dogvae fit-prior` and `--prior flow`: a flow from command to pictures on real Ray, stopped and resumed; mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dogvae
from tests.support.cli import refused
from tests.support.command import ROOT
from tests.support.exports import Exported
from tests.support.runs import latest

TINY = ["--width", "32", "--depth", "1", "--batch-size", "16", "--cpus", "2"]


def started(*args: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """`dogvae ARGS` in a process, on a new Ray."""
    path = ":".join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-m", "dogvae", *map(str, args)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": path},
    )  # fmt: skip


def run(*args: str | Path, cwd: Path) -> str:
    process = started(*args, cwd=cwd)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return out


@pytest.mark.slow
def test_flow_is_trained_stopped_resumed_and_drawn_from(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.run, tmp_path / "dogs")
    process = started("fit-prior", "dogs", "--epochs", "30", *TINY, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("dogs/prior-*/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "stopped; to go on: dogvae fit-prior dogs" in out
    (folder,) = tmp_path.glob("dogs/prior-*")
    steps = latest(folder).meta["step"]
    assert 0 < steps < 30 * 7

    out = run("fit-prior", "dogs", "--cpus", "2", cwd=tmp_path)
    assert "the prior   epoch" in out
    assert latest(folder).meta["step"] == 30 * 7 > steps
    assert "has finished" not in out
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == list(range(30))
    assert min(r["val_loss"] for r in records) < records[0]["val_gaussian_loss"]
    assert dogvae.load(tmp_path / "dogs/export").priors == ("flow", "gaussian", "normal")
    run("sample", "dogs/export", "-n", "4", "--guidance", "0.5", "--temperature", "0.9", cwd=tmp_path)
    assert (tmp_path / "samples.png").exists()

    run("fit-prior", "dogs", "--prior", "gaussian", cwd=tmp_path)
    assert dogvae.load(tmp_path / "dogs/export").priors == ("gaussian", "normal")


@pytest.mark.slow
def test_train_with_a_flow_exports_both(tmp_path: Path) -> None:
    small = ["--width", "4", "--latent-dim", "4", "--batch-size", "16", "--cpus", "2", "--image-size", "32"]
    data = ["--data", "drawn:60", "--val-fraction", "0.2"]
    epochs = ["--epochs", "1", "--prior", "flow", "--prior-epochs", "1"]
    out = run("train", *data, "--name", "one", *epochs, *small, cwd=tmp_path)
    assert "a flow prior, 1 epochs on 2 CPU workers" in out
    assert out.index("the prior   epoch 1: velocity loss") < out.index("the best    epoch 1: loss")
    assert len(list(tmp_path.glob("runs/one/prior-*/checkpoints/step-*"))) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("nowhere", "nowhere is not a run: it has no config.json"),
        ("RUN --prior mixture", "--prior: 'mixture' is none of gaussian, flow"),
        ("RUN --width 100", "--width: 100 is not a multiple of 32"),
        ("RUN --width 16", "--width: 16 is too small"),
        ("RUN --depth 0", "--depth: 0 is too small"),
        ("RUN --epochs -1", "--epochs: -1 is too small"),
        ("RUN --lr 0", "--lr: 0.0 is too small"),
        ("RUN --cpus 1 --gpus 1", "--gpus and --cpus: give one of them"),
        ("RUN --address http://localhost:1 ", "RUN: "),
    ],
)
def test_mistakes_are_one_line_before_ray_starts(
    exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: str, message: str
) -> None:
    monkeypatch.chdir(exported.run.parent)
    assert message in refused(capsys, "fit-prior", *args.replace("RUN", exported.run.name).split())
