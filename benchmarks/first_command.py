"""Where the seconds of the README's first command go, of a resume, and of a search of six trials.

    python benchmarks/first_command.py [--commands train resume search] [--install] [--repeats 1] [--json FILE]
    python benchmarks/first_command.py --commands train --epochs 2 --beside 2    # beside two busy processes

With --install also the installation before it, into a fresh virtual environment: `pip install -e .` of this checkout.
The stages of a command end with its own lines, its first step and its epochs, which the run writes down:

    imports       a process that imports what the command does, and ends (measured beside it)
    Ray           the rest, until the command says what it is attached to
    drawing       until it says what it trains on: 2,000 portraits are drawn and prepared
    workers       until the first step: their processes, imports and process group, checksums, the network
    steps         the training itself
    validation    of each epoch
    saving        pictures, curves and checkpoints, between the epochs
    prior, export the last checkpoint, the fitted prior, the preview, and the end of Ray

Of a search, `trials` lasts from the first trial's start to the last one's end. Of it, `their epochs` is training and
validation, divided by the number of trials at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
from overhead import importing, lines_of

Stages = dict[str, float]
SEARCH = ["--trials", "6", "--epochs", "3", "--set", "preset=small", "--set", "samples=1", "--scheduler", "none"]
COMMANDS = ["train", "resume", "search"]
BAR = 40  # characters of the longest stage


def stages_of_run(command: list[str], run: Path) -> Stages:
    """Train in a new or an old run; which epochs are new is seen from the run's records."""
    from dogvae.data.dataset import Dataset

    known = len(records_of(run))
    began, came, ended = lines_of(command, {"Ray": "Ray at ", "drawing": " epochs on "})
    new = records_of(run)[known:]
    before = records_of(run)[known - 1]["seconds"] if known else 0.0
    trained = [new[0]["seconds"] - before, *(b["seconds"] - a["seconds"] for a, b in pairwise(new))]
    images = len(Dataset(json.loads((run / "config.json").read_text())["data"]).train)
    steps = sum(images / record["images_per_s"] for record in new)
    ends = measure.epoch_ends(run)[known:]
    first_step = ends[0] - trained[0]
    imports = importing()
    return {
        "imports": imports,
        "Ray": came["Ray"] - imports,
        "drawing": came["drawing"] - came["Ray"],
        "workers": first_step - began - came["drawing"],
        "steps": steps,
        "validation": sum(trained) - steps,
        "saving": ends[-1] - first_step - sum(trained),
        "prior, export": ended - ends[-1],
    }


def stages_of_search(command: list[str], search: Path, at_once: int) -> Stages:
    """A search of a prepared dataset."""
    began, came, ended = lines_of(command, {"Ray": "Ray at "})
    trials = sorted((search / "trials").iterdir())
    first = min((trial / "config.json").stat().st_mtime for trial in trials)
    last = max((trial / "metrics.jsonl").stat().st_mtime for trial in trials)
    epochs = sum(records_of(trial)[-1]["seconds"] for trial in trials) / at_once
    imports = importing()
    return {
        "imports": imports,
        "Ray": came["Ray"] - imports,
        "first trial": first - began - came["Ray"],
        "their epochs": epochs,
        "between": last - first - epochs,
        "report, export": ended - last,
    }


def records_of(run: Path) -> list[dict[str, Any]]:
    from dogvae.storage import Storage
    from dogvae.training import metrics

    return metrics.read(Storage(run)) if run.exists() else []


def installing(folder: Path) -> float:
    """Seconds of a fresh virtual environment with this checkout in it."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", "-e", str(measure.ROOT)], check=True)
    return time.perf_counter() - began


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute, started by the same terminal."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def table(name: str, rounds: list[Stages]) -> list[str]:
    """The medians of the stages, each with its share and a bar."""
    medians = {stage: measure.summary([r[stage] for r in rounds]) for stage in rounds[0]}
    whole, longest = sum(m["median"] for m in medians.values()), max(m["median"] for m in medians.values())
    lines = [f"\n{name}: {measure.shown(measure.summary([sum(r.values()) for r in rounds]))} s"]
    for stage, figure in medians.items():
        bar = "█" * round(BAR * max(0.0, figure["median"]) / longest)
        lines.append(f"  {stage:<14}{measure.shown(figure):>22} s{figure['median'] / whole:>6.0%}  {bar}")
    return lines


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--install", action="store_true", help="measure the installation, too")
    parser.add_argument("--data", help="to train on (default: what the first command draws)")
    parser.add_argument("--epochs", type=int, help="of the training (default: the command's)")
    parser.add_argument("--beside", type=int, default=0, help="busy processes beside the commands (default: none)")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    found: dict[str, list[Stages]] = {}
    with tempfile.TemporaryDirectory() as folder, busy(args.beside):
        if args.install:
            found["install"] = [{"pip": installing(Path(folder) / "venv")}]
        for number in range(args.repeats):
            for name, stages in commands(args, Path(folder) / str(number)).items():
                if name == "train" or name in args.commands:
                    found.setdefault(name, []).append(stages())
    lines = [line for name, rounds in found.items() for line in table(name, rounds)]
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    settings["niceness"] = os.environ.get("RAY_worker_niceness")  # noqa: SIM112  (Ray's spelling)
    measure.report({"settings": settings, "stages": found}, lines, args, "ray")


def commands(args: argparse.Namespace, runs: Path) -> dict[str, Callable[[], Stages]]:
    """The commands, in the order in which they run: a resume and a search use what the training has left."""
    script = [sys.executable, str(measure.ROOT / "train_distributed.py"), "--runs", str(runs), "--name", "first"]
    data = ["--data", args.data] if args.data else []
    epochs = ["--epochs", str(args.epochs)] if args.epochs else []
    run = runs / "first"

    def resume() -> Stages:
        more = len(records_of(run)) + 2
        return stages_of_run([*script, "--resume", "--epochs", str(more)], run)

    def search() -> Stages:
        dataset = json.loads((run / "config.json").read_text())["data"]
        command = [sys.executable, "-m", "tune", "search", "--runs", str(runs), "--name", "search", "--data", dataset]
        return stages_of_search([*command, *SEARCH], runs / "search", min(6, measure.cores()))

    return {"train": lambda: stages_of_run([*script, *data, *epochs], run), "resume": resume, "search": search}


if __name__ == "__main__":
    main()
