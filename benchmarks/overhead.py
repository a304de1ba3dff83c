"""What Ray costs a training: images/s beside the bare loop, and the seconds from the command to the first step.

    python benchmarks/overhead.py [--workers 1 2] [--repeats 3] [--json FILE]
    python benchmarks/overhead.py --shortcuts

With --shortcuts: the command alone, in turn with each shortcut of `dogvae.training.fast_start`, with some and with all.

In turn: the real command, `python train_distributed.py --data ... --cpus N`, which starts Ray, and
`dogvae.training.loop.loop` in N plain processes (under torchrun if they are more than one). Same data, settings and
threads, one thread a worker.
Speeds are those that the runs write down, of all epochs but the first. When the first step begins is read from the run
as well; the stages before it from the command's own lines:

    imports    a process that imports what the command does, and ends (measured beside it)
    Ray        the rest, until the command says what it is attached to
    launch     until it says what it trains on: dataset, folder of the run
    workers    until the first step: the workers' processes, their imports (and Ray Train's in the command, meanwhile),
               their group, checksums, the network
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import job
import measure

STAGES = {"Ray": "Ray at ", "launch": " epochs on "}  # each ends with a line that has this
SHORTCUTS = {  # a row of the table: DOGVAE_FAST_START
    "public doors alone": "0",
    "node": "node",
    "controller": "controller",
    "node, controller": "node,controller",
    "controller, workers": "controller,workers",
    "all": "1",
}
IMPORTS = "import ray, train_distributed, dogvae.data.dataset"


def bare(args: argparse.Namespace) -> None:
    """Our loop on one rank, without Ray."""
    import torch
    import torch.distributed as dist

    from dogvae.storage import Storage
    from dogvae.training.loop import loop
    from dogvae.training.observer import Observer

    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    config = job.config_for(args.data, "default", args, epochs=args.epochs)
    loop(config, Storage(args.folder), torch.device("cpu"), Observer())
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early takes connections with it that another still uses
        dist.destroy_process_group()


def lines_of(command: list[str], marks: dict[str, str], **environment: str) -> tuple[float, dict[str, float], float]:
    """Run a command that starts a Ray of its own, with one thread a worker.

    Returns when it began and ended, in seconds since 1970, and how many seconds after its begin the first line came
    that has the text of each mark.
    """
    # Ray gives its workers as many threads as they have CPUs; never a cluster that is already there.
    env = {**measure.environment(1), "RAY_ADDRESS": "local", **environment}
    came: dict[str, float] = {}
    said: list[str] = []
    began = time.time()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            said.append(line)
            for mark, text in marks.items():
                if text in line:
                    came.setdefault(mark, time.time() - began)
        if process.wait():
            log.seek(0)
            sys.exit(f"{' '.join(command)}:\n{''.join(said)}{log.read()[-3000:]}")
    return began, came, time.time()


def watched(command: list[str], run: Path, shortcuts: str = "1") -> dict[str, Any]:
    """Run a command that trains into `run`: when its lines came and its first step began, and its epochs' speeds."""
    from dogvae.storage import Storage
    from dogvae.training import metrics

    began, came, ended = lines_of(command, STAGES, DOGVAE_FAST_START=shortcuts)
    records = metrics.read(Storage(run))
    speed = statistics.median(record["images_per_s"] for record in records[1:])
    first_step_s = measure.epoch_ends(run)[0] - records[0]["seconds"] - began
    return {"lines": came, "first_step_s": first_step_s, "all_s": ended - began, "images_per_s": speed}


def importing() -> float:
    """Seconds of a process that imports what the command does before it starts Ray."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], env=measure.environment(1), check=True)
    return time.perf_counter() - began


def stages(ray: dict[str, Any], imports: float) -> dict[str, float]:
    """Seconds of each stage of one run of the command."""
    lines = ray["lines"]
    return {
        "imports": imports,
        "Ray": lines["Ray"] - imports,
        "launch": lines["launch"] - lines["Ray"],
        "workers": ray["first_step_s"] - lines["launch"],
    }


def compare(workers: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both ways with so many workers, in turn."""
    settings = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("samples", "batch_size", "width")]
    settings += ["--data", str(folder / "data"), "--epochs", str(args.epochs)]
    rounds = []
    for number in range(args.repeats):
        runs = folder / f"{workers}-{number}"

        def with_ray(runs: Path = runs) -> dict[str, Any]:
            script = str(measure.ROOT / "train_distributed.py")
            where = ["--runs", str(runs), "--name", "ray", "--cpus", str(workers)]
            return watched([sys.executable, script, *settings, *where], runs / "ray")

        def without(runs: Path = runs) -> dict[str, Any]:
            command = measure.child(__file__, *settings, "--bare", "--folder", runs / "bare")
            return watched(measure.ranks(workers, command) if workers > 1 else command, runs / "bare")

        if number % 2 == 0:
            ray, plain = with_ray(), without()
        else:
            plain, ray = without(), with_ray()
        rounds.append((ray, plain, stages(ray, importing())))
    of_ray, of_plain, of_stages = zip(*rounds, strict=True)
    found: dict[str, Any] = {
        f"{way}_{key}": measure.summary([run[key] for run in runs])
        for way, runs in (("ray", of_ray), ("bare", of_plain))
        for key in ("images_per_s", "first_step_s", "all_s")
    }
    found["ratio"] = measure.ratio([r["images_per_s"] for r in of_ray], [r["images_per_s"] for r in of_plain])
    found["stages_s"] = {name: measure.summary([s[name] for s in of_stages]) for name in of_stages[0]}
    return found


def shortcuts(workers: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The command with each set of shortcuts, in turn: seconds to the first step, and to its end."""
    settings = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("samples", "batch_size", "width")]
    script = [sys.executable, str(measure.ROOT / "train_distributed.py"), *settings, "--data", str(folder / "data")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SHORTCUTS}
    for number in range(args.repeats):
        for name, value in SHORTCUTS.items():
            runs = folder / f"{name}-{workers}-{number}"
            given = ["--epochs", str(args.epochs), "--runs", str(runs), "--name", "run", "--cpus", str(workers)]
            found[name].append(watched([*script, *given], runs / "run", value))
    return {
        name: {key: measure.summary([run[key] for run in runs]) for key in ("first_step_s", "all_s")}
        for name, runs in found.items()
    }


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--images", type=int, default=480, help="to train on (default: 480)")
    parser.add_argument("--epochs", type=int, default=4, help="the first is not counted (default: 4)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shortcuts", action="store_true", help="what each shortcut of a start saves")
    for internal in ("--data", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        bare(args)
        return
    lines = [
        f"width {args.width}, batch {args.batch_size}, K = {args.samples}, {args.images} images, 1 thread a worker"
    ]
    figures: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "json"}, "workers": {}}
    with tempfile.TemporaryDirectory() as folder:
        job.write_photos(Path(folder) / "data", args.images)
        for workers in args.workers:
            if args.shortcuts:
                found = shortcuts(workers, args, Path(folder))
                figures["workers"][str(workers)] = found
                lines.append(f"\n{f'{workers} workers':<20}{'first step, s':>24}{'all, s':>24}")
                lines += [
                    f"{name:<20}{measure.shown(f['first_step_s']):>24}{measure.shown(f['all_s']):>24}"
                    for name, f in found.items()
                ]
                continue
            found = compare(workers, args, Path(folder))
            figures["workers"][str(workers)] = found
            told = ", ".join(f"{name} {measure.shown(f)}" for name, f in found["stages_s"].items())
            lines += [
                f"\n{workers} worker{'s' * (workers > 1)}{'with Ray':>30}{'bare':>24}{'with Ray / bare':>22}",
                f"{'images/s':<16}{measure.shown(found['ray_images_per_s']):>24}"
                f"{measure.shown(found['bare_images_per_s']):>24}{measure.shown(found['ratio'], '.3f'):>22}",
                f"{'first step, s':<16}{measure.shown(found['ray_first_step_s']):>24}"
                f"{measure.shown(found['bare_first_step_s']):>24}",
                f"{'all, s':<16}{measure.shown(found['ray_all_s']):>24}{measure.shown(found['bare_all_s']):>24}",
                f"of the first: {told}",
            ]
    measure.report(figures, lines, args, "ray")


if __name__ == "__main__":
    main()
