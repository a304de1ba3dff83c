"""SIGINT and SIGTERM at random moments: every command ends with one line and 128 + n, and leaves valid files."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dogvae.config import Config
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.checkpoint import Checkpoints
from tests.support.command import ROOT, TRAIN, Command
from tests.support.datasets import grey_photos
from tests.support.exports import Exported

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
TINY = ["--width", "4", "--latent-dim", "2", "--epochs", "300", "--batch-size", "16"]


def wait_for_handlers(command: Command) -> None:
    """Wait until the command handles SIGTERM itself: within half a second of CPU time, long before torch is there."""
    process = psutil.Process(command.process.pid)

    def handles() -> bool:
        _, _, caught = Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")
        return bool(int(caught.split()[0], 16) >> (signal.SIGTERM - 1) & 1)

    while not handles():
        time.sleep(0.002)
    assert process.cpu_times().user < 0.5


def signalled(where: Path, argv: list[str], signum: signal.Signals, after_s: float, times: int = 1) -> list[str]:
    """The lines that a command printed, after a signal so long after its start, and maybe a second one at once."""
    command = Command(where, *argv)
    try:
        wait_for_handlers(command)
        time.sleep(after_s)
        assert command.process.poll() is None, f"it has ended within {after_s} s: {command.text()}"
        family = command.family()
        for _ in range(times):
            command.process.send_signal(signum)
            time.sleep(0.05 * (times - 1))
        status = command.wait(60)
        told = f"{signum.name} after {after_s:.3f} s: {command.text()}"
        assert status == 128 + signum, told
        _, alive = psutil.wait_procs(family, timeout=20)
        assert alive == [], told
    finally:
        command.stop()
    lines = command.text().splitlines()
    # A run that has a checkpoint says how to go on, and how to use it as it is.
    assert lines[-1] == WORDS[signum] or any(line.startswith("stopped") for line in lines[-2:]), told
    for word in ("Traceback", "Exception", "Fatal", "SIGTERM", "SIGINT", "WARNING", "Error"):
        assert word not in command.text(), told
    return lines


def others(folder: Path) -> set[str]:
    """The names in a folder, but for the logs of commands."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("log-")}


def moments(name: str, count: int, longest_s: float) -> list[tuple[signal.Signals, float]]:
    """Random signals and times, which never change."""
    draw = random.Random(name)
    return [(draw.choice(list(WORDS)), draw.uniform(0, longest_s)) for _ in range(count)]


@pytest.mark.parametrize(
    ("typed", "longest_s"),
    [
        ("sample EXPORT -n 100000 -o a.npy", 3.0),
        ("evaluate EXPORT DATASET --samples 100000 --no-inception", 3.0),
        ("walk EXPORT 000.png 001.png --steps 100000 -o a.npy", 3.0),
        ("playground EXPORT", 4.0),
        ("export RUN", 0.8),
    ],
)
def test_command_without_ray_ends_with_one_line(
    typed: str, longest_s: float, exported: Exported, tmp_path: Path
) -> None:
    grey_photos(tmp_path, 2)
    places = {"EXPORT": exported.folder, "DATASET": exported.dataset, "RUN": exported.run}
    argv = ["-m", "dogvae", *(str(places.get(word, word)) for word in typed.split())]
    for signum, after_s in moments(typed, 2, longest_s):
        signalled(tmp_path, argv, signum, after_s)
    assert others(tmp_path) == {"000.png", "001.png"}


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_prepare_ends_with_one_line_and_leaves_nothing(times: int, tmp_path: Path) -> None:
    photos = grey_photos(tmp_path / "photos", 200)
    (photos / "many").mkdir()
    for n in range(20_000):
        (photos / f"many/{n}.png").hardlink_to(photos / "000.png")
    for signum, after_s in moments(f"prepare {times}", 4, 5.0):
        argv = ["-m", "dogvae", "prepare", str(photos), "out"]
        assert signalled(tmp_path, argv, signum, after_s, times)[-1] == WORDS[signum]
        left = others(tmp_path)
        assert left == {"photos"} or (times == 2 and all(".out.partial-" in name for name in left - {"photos"}))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_training_ends_with_one_line_and_can_be_resumed(times: int, exported: Exported, tmp_path: Path) -> None:
    for n, (signum, after_s) in enumerate(moments(f"train {times}", 2, 12.0)):
        argv = [TRAIN, "--data", str(exported.dataset), "--name", f"run{n}", *TINY]
        lines = signalled(tmp_path, argv, signum, after_s, times)
        run = Storage(tmp_path / f"runs/run{n}")
        assert lines[-1] == WORDS[signum] or run.exists("config.json")
        if run.exists("config.json"):
            Config.from_json(run.read("config.json").decode(), run.uri)
            metrics.read(run)
            Checkpoints(run).latest()


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_search_and_doctor_end_with_one_line(times: int, exported: Exported, tmp_path: Path) -> None:
    fixed = ["--set", "width=4", "--set", "latent_dim=2", "--epochs", "300"]
    for signum, after_s in moments(f"search {times}", 2, 10.0):
        argv = ["-m", "tune", "search", "--data", str(exported.dataset), "--trials", "4", *fixed]
        signalled(tmp_path, argv, signum, after_s, times)
    for signum, after_s in moments(f"doctor {times}", 1, 3.0):
        signalled(tmp_path, ["-m", "dogvae", "doctor"], signum, after_s, times)


@pytest.mark.parametrize(
    "work",
    [
        "class Lost:\n    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\nLost()\ntime.sleep(20)",
        "signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))\n"  # as `ray.init` does
        "class Lost:\n    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\nLost()\ntime.sleep(20)",
        "signals.CLEANUP_S = 1\ntry: os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException: time.sleep(20)",
        "try: os.kill(os.getpid(), signal.SIGTERM)\nexcept KeyboardInterrupt: raise RuntimeError('Ray has gone')",
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)",
    ],
    ids=["lost in a callback", "lost by Ray's handler", "swallowed", "replaced by another error", "after the end"],
)
def test_signal_ends_the_command_whatever_third_parties_do_with_it(work: str) -> None:
    code = f"import atexit, os, signal, sys, time\nfrom dogvae import signals\ndef main(): exec({work!r}, globals())\n"
    began = time.monotonic()
    argv = [sys.executable, "-c", code + "sys.exit(signals.run(main))"]
    done = subprocess.run(
        argv,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (143, "terminated\n")
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("rest", ["time.sleep(20); print('missed')", "return 0"])
@pytest.mark.parametrize(("times", "printed"), [(1, "imported\n"), (2, "")])
def test_signal_during_an_import_waits_for_its_end_and_a_second_one_does_not(
    times: int, printed: str, rest: str, tmp_path: Path
) -> None:
    """torch's C++ calls Python while it is imported: KeyboardInterrupt in there would abort the process."""
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    wait = "end = time.monotonic() + 0.1\nwhile time.monotonic() < end: time.sleep(0.001)"
    lines = ["import os, signal, time", kill, wait, *[kill] * (times - 1), "print('imported', flush=True)"]
    (tmp_path / "slow.py").write_text("\n".join(lines))
    code = f"import sys, time\nfrom dogvae import signals\ndef main(): import slow; {rest}\n"
    argv = [sys.executable, "-c", code + "sys.exit(signals.run(main))"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, printed, "terminated\n")
