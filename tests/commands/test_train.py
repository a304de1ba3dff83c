"""The command itself, on real Ray: a run from photos to pictures, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dogvae
from dogvae.data.writer import Row
from dogvae.data.writer import write_dataset as shard_writer

ROOT = Path(__file__).parents[2]
SMALL = ["--width", "4", "--latent-dim", "4", "--batch-size", "16", "--cpus", "2", "--image-size", "32"]


def command(*args: str | Path, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run train_distributed.py as a user would, but never on somebody else's cluster."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train_distributed.py"), *map(str, args)],
        cwd=cwd, timeout=timeout, capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": "local"},
    )  # fmt: skip


def dogvae_command(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    dogvae_script = Path(sys.executable).with_name("dogvae")
    return subprocess.run([dogvae_script, *map(str, args)], cwd=cwd, timeout=120, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/one: two epochs on 60 drawn dogs, by two CPU workers."""
    where = tmp_path_factory.mktemp("road")
    done = command("--data", "drawn:60", "--val-fraction", "0.2", "--name", "one", "--epochs", "2", *SMALL, cwd=where)
    assert done.returncode == 0, done.stdout + done.stderr
    (where / "stdout").write_text(done.stdout)
    (where / "stderr").write_text(done.stderr)
    return where


def test_run_folder_holds_what_is_promised(trained: Path) -> None:
    run = trained / "runs/one"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [0, 1]
    config = json.loads((run / "config.json").read_text())
    images = len(np.load(next(Path(config["data"]).glob("train-*.npy"))))
    assert [r["step"] for r in records] == [-(-images // 16), 2 * -(-images // 16)]
    for r in records:
        assert r["world_size"] == 2
        assert r["val_loss"] == pytest.approx(r["val_reconstruction"] + r["val_kl"], abs=1e-6)
        assert {"train_loss", "val_psnr", "val_explained", "images_per_s", "seconds", "data_wait"} <= set(r)
        assert 0 <= r["data_wait"] <= 1
        assert r["val_loss_per_pixel"] == pytest.approx(r["val_loss"] / (3 * 32 * 32))
    assert records[1]["seconds"] > records[0]["seconds"]
    board = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [e.value for e in board.Scalars("val/loss")] == pytest.approx([r["val_loss"] for r in records])
    for picture in ("reconstructions", "samples", "walk"):
        assert [e.step for e in board.Images(picture)] == [0, 1]
    assert len(list((run / "checkpoints").glob("step-*.safetensors"))) == 2


def test_export_needs_neither_ray_nor_training(trained: Path) -> None:
    export = trained / "runs/one/export"
    files = {"model.safetensors", "prior.safetensors", "config.json", "README.md", "preview.png"}
    assert {p.name for p in export.iterdir()} == files
    assert Image.open(export / "preview.png").width > 200
    code = (
        "import sys, dogvae; x = dogvae.load(sys.argv[1]).sample(4, seed=1); assert x.shape == (4, 32, 32, 3), x.shape;"
        "bad = [n for n in sys.modules if n.startswith(('ray.', 'dogvae.training', 'dogvae.cluster'))];"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code, export], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_export_is_the_best_checkpoint(trained: Path) -> None:
    """The exported weights, validated afresh, score what the best epoch's record says."""
    import torch

    from dogvae.data.dataset import Dataset
    from dogvae.inference.elbo import evaluate

    run = trained / "runs/one"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min(records, key=lambda r: r["val_loss"])
    model = dogvae.load(run / "export", "cpu").model
    val = Dataset(json.loads((run / "config.json").read_text())["data"]).val
    assert evaluate(model, val, torch.device("cpu"))["loss"] == pytest.approx(best["val_loss"], rel=1e-6)
    assert f"{best['val_loss']:.1f} nats" in (run / "export/README.md").read_text()


def test_console_is_plain_lines(trained: Path) -> None:
    stdout = (trained / "stdout").read_text()
    lines = [line for line in stdout.splitlines() if line.startswith("training: epoch")]
    assert [line.split()[2] for line in lines] == ["1/2", "2/2"]
    assert all("reconstruction" in line and "images/s" in line and "left" in line for line in lines)
    assert "dogvae sample" in stdout
    assert "\x1b" not in stdout
    assert (trained / "stderr").read_text() == ""


def test_playing_from_the_shell(trained: Path) -> None:
    export = trained / "runs/one/export"
    for i in range(2):
        Image.new("RGB", (50 + i, 80), (200, 120 * i, 40)).save(trained / f"{i}.jpg")
    done = dogvae_command("sample", export, "-n", "10", "-o", "samples.png", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert Image.open(trained / "samples.png").size == (8 * 34 + 2, 2 * 34 + 2)
    assert dogvae_command("reconstruct", export, "0.jpg", "1.jpg", "-o", "r.png", cwd=trained).returncode == 0
    assert Image.open(trained / "r.png").size == (2 * 34 + 2, 2 * 34 + 2)
    walked = dogvae_command("interpolate", export, "0.jpg", "1.jpg", "--steps", "5", "-o", "w.gif", cwd=trained)
    assert walked.returncode == 0, walked.stderr
    walk = Image.open(trained / "w.gif")  # identical frames are stored as one, which lasts longer
    assert sum(walk.seek(i) or walk.info["duration"] for i in range(walk.n_frames)) == (5 + 3) * 50
    assert dogvae_command("sample", export, "-n", "3", "-o", "s.npy", cwd=trained).returncode == 0
    assert np.array_equal(np.load(trained / "s.npy"), dogvae.load(export).sample(3, seed=0))


def test_existing_name_is_refused_with_the_command(trained: Path) -> None:
    before = (trained / "runs/one/config.json").read_bytes()
    done = command("--data", "drawn:60", "--name", "one", "--epochs", "9", cwd=trained)
    assert done.returncode == 2
    assert "--name one --resume" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (trained / "runs/one/config.json").read_bytes() == before


def test_finished_run_says_so(trained: Path) -> None:
    done = command("--name", "one", "--resume", cwd=trained)
    assert done.returncode == 0
    assert "has finished its 2 epochs" in done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--name", "one", "--resume", "--lr", "0.5"], ["--lr", "0.002", "0.5"]),
        (["--name", "nobody", "--resume"], ["--resume", "nobody"]),
        (["--resume"], ["--resume", "--name"]),
        (["--name", "../x"], ["--name", "../x"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--epochs", "x"], ["--epochs"]),
        (["--lr", "nan"], ["--lr"]),
        (["--preset", "huge"], ["--preset", "notebook"]),
        (["--gpus", "1", "--cpus", "1"], ["--gpus", "--cpus"]),
        (["--gpus", "0"], ["--gpus", "2:4"]),
        (["--val-fraction", "1"], ["--val-fraction"]),
        (["--crop", "round"], ["--crop", "box"]),
        (["--latent", "3"], ["--latent"]),
        (["--cpus", "3:2"], ["--cpus", "2:4"]),
        (["--checkpoint-every", "5x"], ["--checkpoint-every", "5m"]),
        (["--checkpoint-every", "0"], ["--checkpoint-every"]),
        (["--storage-patience", "long"], ["--storage-patience", "5m"]),
        (["--max-skipped", "0"], ["--max-skipped"]),
        (["--max-failures", "-2"], ["--max-failures"]),
    ],
)
def test_mistakes_are_one_line_before_ray_starts(trained: Path, args: list[str], words: list[str]) -> None:
    started = time.monotonic()
    done = command(*args, cwd=trained)
    assert done.returncode == 2, done.stdout + done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert done.stderr.count("\n") == 1
    assert "Ray at" not in done.stdout
    assert time.monotonic() - started < 20  # it takes one or two seconds; starting Ray would show in the line above


def test_more_than_the_cluster_has(tmp_path: Path) -> None:
    done = command("--data", "drawn:60", "--cpus", "4096", cwd=tmp_path)
    assert done.returncode == 2
    assert f"try --cpus {os.cpu_count()}" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_dry_run_changes_nothing(trained: Path) -> None:
    before = sorted(trained.rglob("*"))
    done = command("--data", "drawn:60", "--val-fraction", "0.2", "--name", "dry", "--dry-run", *SMALL, cwd=trained)
    assert done.returncode == 0, done.stderr
    resolved = json.loads(done.stdout[done.stdout.index("{") :])
    assert resolved["workers"] == "2 CPU workers"
    assert resolved["model"]["width"] == 4
    assert resolved["batch_size"] == 16
    assert sorted(trained.rglob("*")) == before


def test_workers_own_error_is_shown(trained: Path, tmp_path: Path) -> None:
    """The data vanish between the driver's look and the workers': their message comes out, not Ray's."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    config = json.loads((trained / "runs/one/config.json").read_text())
    data = tmp_path / Path(config["data"]).relative_to(trained)
    shard = next(data.glob("train-*.npy"))
    shard.write_bytes(shard.read_bytes()[:-5])
    done = command("--name", "one", "--resume", "--data", data, "--epochs", "3", "--cpus", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert str(shard) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def blank_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 images: with 1,000 samples of 16,384 latents each a step needs 1.3 TB, which no system gives."""
    folder = tmp_path_factory.mktemp("blank") / "dataset"
    folder.mkdir()
    rows = [
        Row(
            f"{i}.png",
            None,
            (2**63 if i else 0).to_bytes(8, "big") + i.to_bytes(24, "big"),
            np.zeros((3, 32, 32), "u1"),
        )
        for i in range(20_000)
    ]
    settings = {"size": 32, "crop": "center", "val_fraction": 0.1}
    shard_writer(folder, rows, {"kind": "test", "name": "test", "signature": ""}, settings)
    return folder


TOO_LARGE = {"samples": "1000", "latent_dim": "1024", "width": "4", "batch_size": "20000"}
OUT_OF_MEMORY = (
    r"out of memory on cpu of \S+ \(you tried to allocate \d+ bytes\): lower --batch-size, --samples or --width"
)


def test_out_of_memory_ends_the_run_with_one_line(blank_images: Path, tmp_path: Path) -> None:
    """Not after three more attempts, and not by a traceback."""
    settings = [text for name, value in TOO_LARGE.items() for text in (f"--{name.replace('_', '-')}", value)]
    done = command("--data", blank_images, "--cpus", "2", *settings, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(f"error: {OUT_OF_MEMORY}\n", done.stderr), done.stderr
    assert "Going on" not in done.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_trial_that_is_out_of_memory_has_failed_once(blank_images: Path, tmp_path: Path, workers: int) -> None:
    settings = [text for name, value in TOO_LARGE.items() if name != "samples" for text in ("--set", f"{name}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "tune", "search", "--data", blank_images, "--trials", "1", *settings,
         "--search", "samples=choice(1000)", "--name", "large", "--workers-per-trial", str(workers)],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    (trial,) = json.loads((tmp_path / "runs/large/trials.json").read_text())
    assert trial["state"] == "failed"
    assert re.fullmatch(OUT_OF_MEMORY, trial["reason"])
    assert "lost its process" not in done.stdout
