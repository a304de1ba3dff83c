"""What grows, and how: trials of a search, images of a dataset, epochs of a run, workers of a training.

    python benchmarks/scale.py [--parts trials images epochs workers] [--picture docs/scale.webp] [--json FILE]

    trials    a search of 200 tiny trials: seconds each takes beyond its training, memory of the command, trials.json
    images    datasets of 10,000 to 1,000,000 images of 32 pixels: writing them, and opening them for an epoch
    epochs    a run of 500 epochs: seconds an epoch, and what the run's folder holds
    workers   1 to 16 workers of one CPU, on the cores that there are: until the first step, and a step

Growth is the exponent between the last two rows: above 1, a figure grows faster than in proportion.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import job
import measure

TINY = {"width": 4, "batch_size": 16, "latent_dim": 4, "samples": 1}
TRAIN = [sys.executable, str(measure.ROOT / "train_distributed.py")]
SIZES = (10_000, 100_000, 1_000_000)
MB = 2**20
Row = dict[str, float]


def typed(**settings: Any) -> list[str]:
    """Settings as flags of training."""
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def running(command: list[str], folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    env = {**measure.environment(1), "RAY_ADDRESS": "local", **environment}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=(folder / "log").open("ab"), stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait():
        sys.exit((folder / "log").read_text()[-3000:])


def trials(folder: Path, most: int) -> list[Row]:
    """One search, looked at while it runs."""
    data = job.write_photos(folder / "data", 64, val=16, size=32)
    search = folder / "runs/search"
    command = [sys.executable, "-m", "tune", "search", "--runs", "runs", "--name", "search", "--data", str(data)]
    command += ["--trials", str(most), "--epochs", "1", "--scheduler", "none", "--search", "lr=loguniform(1e-4,1e-2)"]
    fixed = [text for name, value in TINY.items() for text in ("--set", f"{name}={value}")]
    process, rows, began = running([*command, *fixed], folder), [], 0.0
    driver, steps = psutil.Process(process.pid), [n for n in (10, 20, 50, 100, 200, 500) if n <= most]
    while process.poll() is None and steps:
        time.sleep(0.1)
        try:
            text = (search / "trials.json").read_text()
            states = [entry["state"] for entry in json.loads(text)]
        except (FileNotFoundError, ValueError):
            continue
        began = began or time.monotonic()
        if states.count("done") >= steps[0]:
            trained = sum(json.loads(f.read_text().splitlines()[-1])["seconds"] for f in search.rglob("metrics.jsonl"))
            spent = (time.monotonic() - began) * measure.cores() - trained
            rows.append({
                "n": steps.pop(0), "beyond training, s of a core": spent, "command, MB": driver.memory_info().rss / MB,
                "trials.json, KB": len(text) / 2**10,
            })  # fmt: skip
    finished(process, folder)
    return rows


def images(folder: Path, most: int) -> list[Row]:
    """Each size in a process of its own: memory that was freed would hide what the next takes."""
    rows = []
    for n in (n for n in SIZES if n <= most):
        command = [sys.executable, __file__, "--one", str(n), "--folder", str(folder / str(n))]
        answer = subprocess.run(command, env=measure.environment(1), check=True, stdout=subprocess.PIPE, text=True)
        rows.append({"n": n, **json.loads(answer.stdout)})
    return rows


def write_and_open(folder: Path, n: int) -> Row:
    """Write n images, open them, order them and read a batch."""
    import torch

    from dogvae.data.dataset import Batches, Dataset, epoch_order
    from dogvae.data.drawn import draw
    from dogvae.data.writer import Row as Image
    from dogvae.data.writer import write_dataset

    dogs = [np.asarray(draw(i, 0, 32)).transpose(2, 0, 1) for i in range(100)]
    random = np.random.default_rng(0)

    def rows() -> Iterator[Image]:
        """As of photos that are all different."""
        for i in range(n):
            yield Image(f"photos/{i:07d}.jpg", None, random.bytes(32), dogs[i % 100], random.bytes(80))

    folder.mkdir(parents=True)
    before, began = measure.peak_mb(), time.perf_counter()
    source = {"kind": "drawn", "name": "drawn", "signature": ""}
    write_dataset(folder, rows(), source, {"size": 32, "crop": "center", "val_fraction": 0.05})
    written = time.perf_counter()
    dataset = Dataset(folder)
    opened = time.perf_counter()
    dataset.verify()
    verified = time.perf_counter()
    order = epoch_order(len(dataset.train), 0, 0)
    ordered = time.perf_counter()
    next(Batches(dataset.train, torch.device("cpu"))(iter([order[:16]])))
    return {
        "writing, s": written - began, "writing, MB": measure.peak_mb() - before, "opening, s": opened - written,
        "checksums, s": verified - opened, "order of an epoch, s": ordered - verified,
        "first batch, s": time.perf_counter() - ordered,
    }  # fmt: skip


def epochs(folder: Path, most: int) -> list[Row]:
    """One run of tiny epochs."""
    data, run = job.write_photos(folder / "data", 64, val=16, size=32), folder / "runs/run"
    given = typed(**TINY, data=data, epochs=most, runs="runs", name="run", cpus=1)
    finished(running([*TRAIN, *given], folder), folder)
    ends = np.array(measure.epoch_ends(run))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = []
    for n in (n for n in (20, 50, 100, 200, 500, 1000) if n <= most):
        ms = 1000 * float(np.median(np.diff(ends[:n])[-15:]))
        rows.append({"n": n, "an epoch, ms": ms, "metrics.jsonl, KB": sum(map(len, lines[:n])) / 2**10})
    size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / MB
    rows[-1] |= {"folder, MB": size, "lines on the console": len((folder / "log").read_text().splitlines())}
    return rows


def workers(folder: Path, most: int) -> list[Row]:
    """Runs of twenty steps on one Ray that has been told of enough CPUs."""
    import ray

    data = job.write_photos(folder / "data", 320, val=16, size=32)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=most, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    address, rows, n = ray.get_runtime_context().gcs_address, [], 1
    while n <= most:
        given = typed(**TINY, data=data, epochs=2, runs="runs", name=f"{n}", cpus=n, address=address)
        began = time.time()
        finished(running([*TRAIN, *given], folder, RAY_ADDRESS=address), folder)
        ended, run = time.time(), folder / f"runs/{n}"
        ends, records = measure.epoch_ends(run), [json.loads(line) for line in (run / "metrics.jsonl").open()]
        first = ends[0] - records[0]["seconds"]
        rows.append({
            "n": n, "until the first step, s": first - began, "a step, ms": 16_000 / records[1]["images_per_s"],
            "the end, s": ended - ends[-1],
        })  # fmt: skip
        n *= 2
    ray.shutdown()
    return rows


PARTS: dict[str, tuple[Callable[[Path, int], list[Row]], int]] = {
    "trials": (trials, 200),
    "images": (images, 1_000_000),
    "epochs": (epochs, 500),
    "workers": (workers, 16),
}


def growth(rows: list[Row], name: str) -> float:
    """The exponent of a figure between the last two rows: 0 for none, 1 for growth in proportion."""
    (a, x), (b, y) = ((row["n"], row[name]) for row in rows[-2:])
    return math.log(y / x) / math.log(b / a) if min(x, y) > 0 else math.nan


def table(part: str, rows: list[Row]) -> list[str]:
    names = [name for name in rows[0] if name != "n"]
    widths = [max(12, len(name) + 2) for name in names]
    lines = ["", f"{part:<10}" + "".join(f"{name:>{w}}" for name, w in zip(names, widths, strict=True))]
    for row in rows:
        figures = (f"{row[name]:>{w},.{0 if row[name] >= 100 else 3}f}" for name, w in zip(names, widths, strict=True))
        lines.append(f"{row['n']:<10,.0f}" + "".join(figures))
    grown = (f"{growth(rows, name):>{w}.2f}" for name, w in zip(names, widths, strict=True))
    lines.append(f"{'growth':<10}" + "".join(grown))
    return lines + [f"{name}: {value:,.1f}" for name, value in rows[-1].items() if name not in rows[0]]


def draw(found: dict[str, list[Row]], path: Path) -> None:
    """A panel for each part; both axes are logarithmic, so that growth in proportion is a line like the grey one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(4.6 * len(found), 4.4), dpi=80, layout="constrained")
    for axes, (part, rows) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True):
        n = [row["n"] for row in rows]
        names = [name for name in rows[0] if name != "n"]
        figures = [row[name] for row in rows for name in names if row[name] > 0]
        low = min(figures)
        axes.loglog(n, [low * x / n[0] for x in n], color="0.85", zorder=0, linewidth=4, label="in proportion")
        for name in names:
            axes.loglog(n, [row[name] for row in rows], marker="o", markersize=4, label=name)
        axes.set_xticks(n, [f"{x:,.0f}" for x in n])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(max(figures))))
        axes.minorticks_off()
        axes.set_title(part)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.savefig(path)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--most", type=int, help="of what grows, in every part (default: as above)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the curves there")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(write_and_open(args.folder, args.one)))
        return
    found = {}
    for part in args.parts:
        run, most = PARTS[part]
        with tempfile.TemporaryDirectory() as folder:
            found[part] = run(Path(folder), args.most or most)
        print("\n".join(table(part, found[part])), flush=True)
    if args.picture:
        draw(found, args.picture)
    measure.report({"parts": found}, [], args, "ray")


if __name__ == "__main__":
    main()
