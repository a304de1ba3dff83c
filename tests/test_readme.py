"""The commands of the README, run as they are written, one after another, in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dogvae.data.drawn import draw

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = [line for line in COMMANDS if not line.startswith("ray ")]  # run in tests/cluster, on hosts
SET_UP = r"python -m venv \.venv && \. \.venv/bin/activate && pip install -e \S+ && "


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files, and some photos to stand in for the reader's."""
    folder = tmp_path_factory.mktemp("readme") / "dogvae"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "photos").mkdir()
    for i in range(120):
        name = {0: "a", 1: "b"}.get(i, str(i))
        draw(i, 0, 96).save(folder / f"photos/{name}.jpg")
    return folder


def shell(command: str, checkout: Path, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """In a shell whose `python` is this one, with the packages that the set-up would install."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "RAY_ADDRESS": "local", "PYTHONPATH": str(checkout)}
    return subprocess.run(
        ["bash", "-c", command], cwd=checkout, env=env, timeout=timeout, capture_output=True, text=True
    )


@pytest.mark.slow
def test_first_command_trains_on_drawn_dogs_in_minutes(checkout: Path) -> None:
    command = re.sub(f"^{SET_UP}", "", COMMANDS[0])
    assert command == "python train_distributed.py"
    started = time.monotonic()
    done = shell(command, checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 300  # "in two or three minutes on two cores", if nothing else runs on them
    (export,) = (checkout / "runs").glob("portraits-*/export")
    assert (export / "preview.png").exists()
    assert str(export) in done.stdout
    assert "epoch 8/8" in done.stdout + done.stderr


@pytest.mark.slow
def test_commands_for_your_own_dogs(checkout: Path) -> None:
    commands = COMMANDS[2:7]
    assert [c.split()[:2] for c in commands] == [
        ["dogvae", "prepare"],
        ["python", "train_distributed.py"],
        ["dogvae", "sample"],
        ["dogvae", "reconstruct"],
        ["dogvae", "interpolate"],
    ]
    for command in commands:
        done = shell(command, checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    for picture in ("samples.png", "reconstructions.png", "walk.gif"):
        assert (checkout / picture).stat().st_size > 1000
    playing = [c for c in COMMANDS if re.match("dogvae (directions|neighbours|evaluate)", c)]
    assert len(playing) == 3
    for command in playing:
        done = shell(command, checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert "negative ELBO" in done.stdout
    for picture in ("directions.png", "neighbours.png"):
        assert (checkout / picture).stat().st_size > 1000
    python = re.search(r"```python\n(.*?)```", README, re.S)
    assert python
    check = "; assert dogs.shape == (64, 64, 64, 3) and walk.shape == (32, 64, 64, 3); print(latents.shape)"
    (checkout / "played.py").write_text(python[1] + check.removeprefix("; "))
    done = shell("python played.py", checkout)
    assert done.stdout == "(1, 16, 4, 4)\n", done.stderr
    resumed = next(c for c in COMMANDS if c.endswith("--resume"))
    done = shell(resumed, checkout)
    assert "has finished its" in done.stdout, done.stderr


@pytest.mark.slow
def test_commands_of_the_search(checkout: Path) -> None:
    """With fewer trials and epochs than a reader has patience for."""
    if not (checkout / "dataset").exists():
        shell("dogvae prepare photos dataset --val-fraction 0.1", checkout)
    search, report = (next(c for c in COMMANDS if f"-m tune {name}" in c) for name in ("search", "report"))
    for command in (f"{search} --trials 2 --epochs 2", report):
        done = shell(command, checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert "best of 2 is trial" in done.stdout
    assert (checkout / "runs/best/report.png").stat().st_size > 10_000
    assert (checkout / "runs/best/export/config.json").exists()
    longer = next(c for c in COMMANDS if "--from-search" in c)
    done = shell(f"{longer} --dry-run", checkout)
    assert '"epochs": 200' in done.stdout, done.stderr


def test_gpus_that_are_not_there(checkout: Path) -> None:
    """The command for four GPUs gets as far as it can: without them it says what there is instead."""
    shell("dogvae prepare photos dataset --val-fraction 0.1", checkout)
    command = next(c for c in COMMANDS if "--gpus 4" in c)
    done = shell(command, checkout)
    assert done.returncode == 0 or "--gpus 4: the cluster has" in done.stderr


def test_tensorboard_starts(checkout: Path) -> None:
    command = next(c for c in COMMANDS if c.startswith("tensorboard"))
    (checkout / "runs").mkdir(exist_ok=True)
    script = Path(sys.executable).with_name("tensorboard")
    process = subprocess.Popen(
        [script, *command.split()[1:], "--port", "0"], cwd=checkout, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr
        assert any("http://localhost" in line for line in process.stderr)
    finally:
        process.terminate()  # Ctrl-C is ignored by what a shell started in the background
        process.wait(20)


def test_every_command_is_covered() -> None:
    playing = "sample|reconstruct|interpolate|playground|directions|neighbours|evaluate"
    known = rf"pip install|dogvae (prepare|{playing})|train_distributed\.py|tensorboard|-m tune"
    assert all(re.search(known, command) for command in COMMANDS)
    assert COMMANDS[1].endswith("pip install -e '.[dev]' && pytest")
    assert len(COMMANDS) == 18
