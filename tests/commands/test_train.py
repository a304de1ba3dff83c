"""`train_distributed.py` on real Ray: a run from photos to pictures, and its messages when something is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dogvae
from dogvae.data.dataset import Dataset
from dogvae.inference.elbo import evaluate
from tests.support.command import ROOT, TRAIN
from tests.support.runs import write_images

SMALL = ["--width", "4", "--latent-dim", "4", "--batch-size", "16", "--cpus", "2", "--image-size", "32"]


def python(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python ARGS` as a user would, but always on a new Ray."""
    path = ":".join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, timeout=240, capture_output=True, text=True,
        env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": path},
    )  # fmt: skip


def command(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python(TRAIN, *args, cwd=cwd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/one: two epochs on 60 drawn dogs, by two CPU workers."""
    where = tmp_path_factory.mktemp("trained")
    done = command("--data", "drawn:60", "--val-fraction", "0.2", "--name", "one", "--epochs", "2", *SMALL, cwd=where)
    assert done.returncode == 0, done.stdout + done.stderr
    (where / "stdout").write_text(done.stdout)
    (where / "stderr").write_text(done.stderr)
    return where


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_folder_has_metrics_curves_pictures_and_checkpoints(trained: Path) -> None:
    run = trained / "runs/one"
    lines = records(run)
    assert [r["epoch"] for r in lines] == [0, 1]
    config = json.loads((run / "config.json").read_text())
    images = len(np.load(next(Path(config["data"]).glob("train-*.npy"))))
    assert [r["step"] for r in lines] == [-(-images // 16), 2 * -(-images // 16)]
    for r in lines:
        assert r["world_size"] == 2
        assert r["val_loss"] == pytest.approx(r["val_reconstruction"] + r["val_kl"], abs=1e-6)
        assert {"train_loss", "val_psnr", "val_explained", "images_per_s", "seconds", "data_wait"} <= set(r)
        assert 0 <= r["data_wait"] <= 1
        assert r["val_loss_per_pixel"] == pytest.approx(r["val_loss"] / (3 * 32 * 32))
    assert lines[1]["seconds"] > lines[0]["seconds"]
    board = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [e.value for e in board.Scalars("val/loss")] == pytest.approx([r["val_loss"] for r in lines])
    for picture in ("reconstructions", "samples, fitted prior", "samples, N(0, I)", "walk"):
        assert [e.step for e in board.Images(f"view/{picture}")] == [1, 2]
    with Image.open(run / "results.png") as page:
        assert page.width == 1400
    assert len(list((run / "checkpoints").glob("step-*.safetensors"))) == 2


def test_export_is_the_best_epoch_and_needs_neither_ray_nor_training(trained: Path) -> None:
    """Validated again, the exported weights score what the record of the best epoch says."""
    run = trained / "runs/one"
    best = min(records(run), key=lambda r: r["val_loss"])
    val = Dataset(json.loads((run / "config.json").read_text())["data"]).val
    model = dogvae.load(run / "export", "cpu").model
    assert evaluate(model, val, torch.device("cpu"))["loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    code = (
        "import sys, dogvae; x = dogvae.load(sys.argv[1]).sample(4, seed=1); assert x.shape == (4, 32, 32, 3), x.shape;"
        "bad = [n for n in sys.modules if n.startswith(('ray.', 'dogvae.training', 'dogvae.cluster'))];"
        "assert not bad, bad"
    )
    done = python("-c", code, run / "export", cwd=trained)
    assert done.returncode == 0, done.stderr


def test_console_prints_plain_lines(trained: Path) -> None:
    stdout = (trained / "stdout").read_text()
    lines = [line for line in stdout.splitlines() if line.startswith("training: epoch")]
    assert [line.split()[2] for line in lines] == ["1/2", "2/2"]
    assert all("reconstruction" in line and "images/s" in line and "left" in line for line in lines)
    assert re.search(
        r"the best    epoch [12]: loss .* \(0: the mean image, 1: perfect\)\nadvice      \S.*\n"
        r"the run     /.*/runs/one\nresults     /.*/runs/one/results.png\n",
        stdout,
    )
    assert "dogvae sample" in stdout
    assert "\x1b" not in stdout
    assert (trained / "stderr").read_text() == ""


def test_existing_name_is_refused_with_the_command_that_resumes(trained: Path) -> None:
    before = (trained / "runs/one/config.json").read_bytes()
    done = command("--data", "drawn:60", "--name", "one", "--epochs", "9", cwd=trained)
    assert done.returncode == 2
    assert "--name one --resume" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (trained / "runs/one/config.json").read_bytes() == before


def test_resuming_a_finished_run_trains_nothing(trained: Path) -> None:
    done = command("--name", "one", "--resume", cwd=trained)
    assert done.returncode == 0
    assert "has finished its 2 epochs" in done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--name one --resume --lr 0.5", ["--lr", "0.002", "0.5"]),
        ("--name nobody --resume", ["--resume", "nobody"]),
        ("--resume", ["--resume", "--name"]),
        ("--name ../x", ["--name", "../x"]),
        ("--data nowhere", ["nowhere"]),
        ("--lr nan", ["--lr"]),
        ("--preset huge", ["--preset", "notebook"]),
        ("--latent 3", ["--latent"]),
        ("--gpus 1 --cpus 1", ["--gpus", "--cpus"]),
        ("--checkpoint-every 5x", ["--checkpoint-every", "5m"]),
    ],
)
def test_mistakes_are_one_line_before_ray_starts(trained: Path, args: str, words: list[str]) -> None:
    started = time.monotonic()
    done = command(*args.split(), cwd=trained)
    assert done.returncode == 2, done.stdout + done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert done.stderr.count("\n") == 1
    assert "Ray at" not in done.stdout
    assert time.monotonic() - started < 20  # usually one or two seconds


def test_more_workers_than_the_cluster_has_are_refused(tmp_path: Path) -> None:
    done = command("--data", "drawn:60", "--cpus", "4096", cwd=tmp_path)
    assert done.returncode == 2
    assert f"try --cpus {os.cpu_count()}" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_the_settings_and_changes_nothing(trained: Path) -> None:
    before = sorted(trained.rglob("*"))
    done = command("--data", "drawn:60", "--val-fraction", "0.2", "--name", "dry", "--dry-run", *SMALL, cwd=trained)
    assert done.returncode == 0, done.stderr
    resolved = json.loads(done.stdout)
    assert resolved["workers"] == "2 CPU workers"
    assert resolved["model"]["width"] == 4
    assert resolved["batch_size"] == 16
    assert sorted(trained.rglob("*")) == before


def test_mistake_that_only_a_worker_sees_ends_the_command_with_one_line(trained: Path, tmp_path: Path) -> None:
    """A damaged shard: the driver does not read it."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    config = json.loads((trained / "runs/one/config.json").read_text())
    data = tmp_path / Path(config["data"]).relative_to(trained)
    shard = next(data.glob("train-*.npy"))
    shard.write_bytes(shard.read_bytes()[:-5])
    done = command("--name", "one", "--resume", "--data", data, "--epochs", "3", "--cpus", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert str(shard) in done.stderr
    assert "Traceback" not in done.stderr


# --- out of memory


@pytest.fixture(scope="module")
def blank_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 images: with 1,000 samples of 16,384 latents each, a step needs 1.3 TB, which no system gives."""
    blank = [np.zeros((3, 32, 32), np.uint8)] * 20_000
    return write_images(tmp_path_factory.mktemp("blank") / "dataset", train=blank[1:], val=blank[:1])


TOO_LARGE = {"latent_dim": "1024", "width": "4", "batch_size": "20000"}
OUT_OF_MEMORY = (
    r"out of memory on cpu of \S+ \(you tried to allocate \d+ bytes\): lower --batch-size, --samples or --width"
)


def test_out_of_memory_ends_the_run_at_once_with_one_line(blank_images: Path, tmp_path: Path) -> None:
    settings = [text for name, value in TOO_LARGE.items() for text in (f"--{name.replace('_', '-')}", value)]
    done = command("--data", blank_images, "--cpus", "2", "--samples", "1000", *settings, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(f"error: {OUT_OF_MEMORY}\n", done.stderr), done.stderr
    assert "Going on" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_out_of_memory_fails_a_trial_at_the_first_attempt(blank_images: Path, tmp_path: Path, workers: int) -> None:
    settings = [text for name, value in TOO_LARGE.items() for text in ("--set", f"{name}={value}")]
    done = python(
        "-m", "tune", "search", "--data", blank_images, "--trials", "1", *settings, "--search", "samples=choice(1000)",
        "--name", "large", "--workers-per-trial", str(workers), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    (trial,) = json.loads((tmp_path / "runs/large/trials.json").read_text())
    assert trial["state"] == "failed"
    assert re.fullmatch(OUT_OF_MEMORY, trial["reason"])
    assert "lost its process" not in done.stdout
