"""Train while something is killed at random moments, then compare with a run that nothing befell.

    python tests/faults/soak.py --minutes 20 --seed 0

Each kill is a SIGKILL, drawn by the seed, to a worker, to all workers at once, or to the driver, which is then started
again with --resume. Prints a line for each kill, and at the end how many were survived, what a kill cost, and whether
the weights, the optimiser's state and the average are those of the uninterrupted run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.faults.test_processes import flags
from tests.support.command import TRAIN, Command
from tests.support.runs import differing, final, job, make_dataset, records, train


def epochs_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def soak(minutes: float, seed: int, kills: int, where: Path) -> int:
    """Run until `kills` are done or time is up, then to the end; returns 0 if all is well."""
    chance = random.Random(seed)
    dataset = make_dataset(where / "dataset")
    epochs = max(60, 12 * kills)  # about one kill in ten epochs
    config = job(dataset, epochs=epochs)
    train(config, where / "whole", 2)
    run, end = where / "runs/run", time.monotonic() + 60 * minutes
    command = Command(where, TRAIN, *flags(config), "--max-failures", "-1")
    seconds: list[float] = []
    while len(seconds) < kills and time.monotonic() < end and command.process.poll() is None:
        seen = epochs_done(run)
        while epochs_done(run) == seen and command.process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 2))
        victims = command.workers()
        if command.process.poll() is not None or len(victims) < 2:
            continue
        before, killed = epochs_done(run), time.monotonic()
        what = chance.choice(["a worker", "a worker", "all workers", "the driver"])
        if what == "the driver":
            command.process.kill()
            command.process.wait()
            command = Command(where, TRAIN, "--name", "run", "--resume", "--cpus", "2", "--max-failures", "-1")
        else:
            for victim in victims[:1] if what == "a worker" else victims:
                victim.kill()
        # Without their driver, workers may still end an epoch: what counts is what the new driver is told.
        again = what == "the driver"
        while epochs_done(run) <= before or (again and "training: epoch" not in command.text()):
            if command.process.poll() not in (None, 0):
                print(command.text())
                return 1
            time.sleep(0.05)
        seconds.append(time.monotonic() - killed)
        print(
            f"kill {len(seconds)}: {what} in epoch {before + 1}, the next epoch ended {seconds[-1]:.1f} s later",
            flush=True,
        )
    code = command.wait(3600)
    whole = differing(final(run), final(where / "whole"))
    numbers = [r["epoch"] for r in records(run)] == list(range(epochs))
    print(f"{len(seconds)} kills, {len(seconds) if code == 0 else 'not all'} survived")
    if seconds:
        middle, most = statistics.median(seconds), max(seconds)
        print(f"seconds from a kill to the next epoch's end: median {middle:.1f}, most {most:.1f}")
    print(f"weights, optimiser and average equal bit for bit: {'yes' if not whole else f'no, {whole}'}")
    print(f"a line for every epoch, none twice: {'yes' if numbers else 'no'}")
    print(json.dumps({"kills": len(seconds), "exit": code, "equal": not whole, "seed": seed}))
    return 0 if code == 0 and not whole and numbers else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dogvae-soak-") as folder:
        sys.exit(soak(args.minutes, args.seed, args.kills, Path(folder)))
