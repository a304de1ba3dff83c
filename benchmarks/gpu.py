"""Every figure that needs a GPU, in one command of under 8 minutes; needs neither a network nor Ray.

    PYTHONPATH=. python benchmarks/gpu.py --json FILE
    python benchmarks/gpu.py --device cpu --quick      # runs every line, tiny, in a minute: its figures mean nothing

GPU figures have not been taken yet: this has only run on CPUs so far. It measures

- peers     images/s of our loop beside the notebook's and a plain DDP script (step.py), at K = 1 and K = 10
- sweep     ms, images/s and share of the roofline (roofline.py) of our step, by K and batch size
- variants  our step changed in one thing: fp32, contiguous, torch.compile, without averaging, without augmentation
- curves    the losses of the step as it is on GPUs and of a plain one (fp32, contiguous), from the same seed
- training  50 epochs of 20,000 images at K = 1 by `dogvae.training.loop.loop`, validation and checkpoints included

and checks itself: what must hold (finite losses, equal curves, no floor undercut, data on the device) is printed as
`ok` or `FAILED`, and the exit code is 1 if anything failed. A part that cannot run, or has no time left, says so and
the others go on; figures are written after each part, so that a command that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import job
import measure
import roofline
import step
from dogvae.config import Config, Safety
from dogvae.data.dataset import Batches, Dataset
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.loop import loop
from dogvae.training.observer import Observer
from dogvae.training.optimizer import Adam
from dogvae.training.step import Trainer
from roofline import settle

MOST_APART = 0.01  # of the two curves' losses, relative: what a changed order of sums and bf16 may do


class Bench:
    """The device, the sizes, and what has been found so far."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        quick = args.quick
        self.device, self.folder, self.quick = torch.device(args.device), folder, quick
        self.ends = time.monotonic() + 60 * args.minutes
        # A width of 0 is that of each network.
        self.width, self.rounds, self.steps = (4, 2, 2) if quick else (0, 5, 10)
        self.batches = {1: (2, 4), 10: (2,)} if quick else {1: (32, 128, 256, 512, 1024), 10: (32, 128)}
        self.images, self.epochs = (64, 2) if quick else (20_000, 50)
        self.checks: list[dict[str, Any]] = []
        self.lines: list[str] = []

    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def check(self, name: str, ok: bool, detail: str) -> None:
        self.checks.append({"name": name, "ok": bool(ok), "detail": detail})

    def config(self, samples: int, batch: int, **settings: Any) -> Config:
        width = {"width": self.width} if self.width else {}
        return Config.make(**{**width, "samples": samples, "batch_size": batch, **settings})


def timed(runs: dict[str, Callable[[], None]], bench: Bench) -> dict[str, list[float]]:
    """Seconds a step of each, in turns of some steps; the device is waited for at a turn's ends only."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(bench.rounds):
        for name in runs if number % 2 == 0 else reversed(runs):
            runs[name]()
            settle(bench.device)
            began = time.perf_counter()
            for _ in range(bench.steps):
                runs[name]()
            settle(bench.device)
            seconds[name].append((time.perf_counter() - began) / bench.steps)
    return seconds


def stepping(trainer: Trainer, bench: Bench) -> Callable[[], None]:
    """Our step on random images that are on the device."""
    n, size = trainer.config.batch_size, trainer.config.model.image_size
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=bench.device)
    number = iter(range(10**9))
    return lambda: trainer.step(images, n, 0, next(number), 10**6)


def contiguous(trainer: Trainer) -> None:
    """Undo the trainer's channels_last: its weights', and its input's just before the network."""
    trainer.model.to(memory_format=torch.contiguous_format)
    trainer.optimizer = Adam(trainer.parameters)  # CUDA's kernel wants moments with the strides of their weights
    trainer.model.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))


# --- the parts


def peers(bench: Bench) -> dict[str, Any]:
    found = {}
    for samples, batch in ((1, max(bench.batches[1][:3])), (10, bench.batches[10][0])):
        args = argparse.Namespace(
            samples=samples, batch_size=batch, width=bench.width, device=bench.device.type, workers=1,
            repeats=bench.rounds, steps=3 * bench.steps, warmup=2 if bench.quick else 10,
            threads=1 if bench.quick else 4, loader_workers=1 if bench.quick else min(4, measure.cores()),
            only=["ours", "notebook"] if bench.quick else ["ours", "notebook", "ddp"],
        )  # fmt: skip
        folder = bench.folder / f"peers-{samples}"
        job.write_photos(folder / "data", batch * (step.steps_of(args) + 2))
        found[str(samples)] = step.compare(samples, args, folder)
        for name, row in found[str(samples)].items():
            ratio = f"  ours / it {measure.shown(row['ratio'], '.2f')}" if "ratio" in row else ""
            rate, peak = measure.shown(row["images_per_s"], ".0f"), row["peak_mb"]
            bench.lines.append(f"K = {samples}, batch {batch}: {name:<10}{rate:>24} images/s {peak:8.0f} MB{ratio}")
        if not bench.quick:
            times = found[str(samples)]["notebook"]["ratio"]["low"]
            bench.check(f"faster than the notebook at K = {samples}", times > 1, f"{times:.2f} times at least")
    return found


def sweep(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    bf16 = Trainer(bench.config(1, 1, width=4), bench.device).bf16
    kind = torch.bfloat16 if bf16 else torch.float32
    tflops, gbs = roofline.peaks(bench.device, kind, bench.rounds, 256 if bench.quick else 0)
    bench.lines.append(f"peaks: {tflops:.1f} TFLOP/s in {kind}, {gbs:.0f} GB/s")
    for samples, batches in bench.batches.items():
        for batch in batches:
            config = bench.config(samples, batch, precision="bf16" if bf16 else "fp32")
            count = roofline.count(config)
            floor = max(roofline.floors(count, tflops, gbs).values())
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step_s = measure.summary(timed({"": stepping(Trainer(config, bench.device), bench)}, bench)[""])
            peak = torch.cuda.max_memory_allocated() / 2**20 if bench.device.type == "cuda" else measure.peak_mb()
            share = floor / step_s["median"]
            found[f"K{samples}-batch{batch}"] = {
                "step_s": step_s, "images_per_s": batch / step_s["median"], "floor_s": floor, "share": share,
                "tflops": count["step_gflop"] / step_s["median"] / 1e3, "peak_mb": peak,
            }  # fmt: skip
            bench.lines.append(
                f"K = {samples}, batch {batch:>4}: {1e3 * step_s['median']:8.2f} ms"
                f" {batch / step_s['median']:8.0f} images/s {share:4.0%} of the roofline {peak:8.0f} MB"
            )
    shares = [row["share"] for row in found.values()]
    if not bench.quick:
        bench.check("no step is faster than its floor", max(shares) < 1.05, f"{max(shares):.0%} at most")
    return {"peak_tflops": tflops, "peak_gbs": gbs, "steps": found}


def variants(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for samples, batch in ((1, max(bench.batches[1][:3])), (10, bench.batches[10][0])):
        config = bench.config(samples, batch)
        bf16 = {"precision": "bf16"}  # on the CPU of --quick too
        trainers = {
            "as it is": Trainer(config.replace(**bf16), bench.device),
            "fp32": Trainer(config.replace(precision="fp32"), bench.device),
            "contiguous": Trainer(config.replace(**bf16), bench.device),
            "compiled": Trainer(config.replace(**bf16), bench.device),
            "no averaging": Trainer(config.replace(ema=0.0, **bf16), bench.device),
            "no augmentation": Trainer(config.replace(augment=False, **bf16), bench.device),
        }
        contiguous(trainers["contiguous"])
        # The compiler's own backend needs a minute, and compilers; for --quick it is enough that the network is traced.
        compiled = torch.compile(trainers["compiled"].net, backend="eager" if bench.quick else "inductor")
        trainers["compiled"].net = compiled
        runs = {name: stepping(trainer, bench) for name, trainer in trainers.items()}
        began = time.perf_counter()
        try:
            runs["compiled"]()
            settle(bench.device)
        except (RuntimeError, ImportError, OSError) as error:
            bench.lines.append(f"K = {samples}: torch.compile is not possible here: {str(error).splitlines()[0][:100]}")
            del runs["compiled"]
        compile_s = time.perf_counter() - began
        seconds = timed(runs, bench)
        found[f"K{samples}-batch{batch}"] = {
            name: {"step_s": measure.summary(s), "ratio": measure.ratio(s, seconds["as it is"])}
            for name, s in seconds.items()
        } | {"compile_s": compile_s}
        for name, s in seconds.items():
            times = measure.shown(measure.ratio(s, seconds["as it is"]), ".3f")
            ms = measure.shown(measure.summary([1e3 * x for x in s]), ".2f")
            bench.lines.append(f"K = {samples}, batch {batch}: {name:<16}{ms:>24} ms   it / as it is {times}")
    return found


def curves(bench: Bench) -> dict[str, Any]:
    steps, batch, chunks = (4, 8, 2) if bench.quick else (300, 128, 10)
    data = Dataset(job.write_photos(bench.folder / "curves", steps * batch if bench.quick else 2000)).train
    losses: dict[str, list[float]] = {}
    for name, precision in (("as it is", "bf16"), ("plain", "fp32")):
        trainer = Trainer(bench.config(1, batch, precision=precision, kl_warmup=0.0), bench.device)
        if name == "plain":
            contiguous(trainer)
        order = np.random.default_rng(0).integers(0, len(data), (steps, batch))
        losses[name] = []
        for number, images in enumerate(Batches(data, bench.device)(order)):
            trainer.step(images, batch, number * 10 // steps, number, steps)
            if (number + 1) % (steps // chunks) == 0:
                losses[name].append(trainer.sums.described(trainer.sums.over_ranks(), 1)["train_loss"])
                trainer.sums.clear()
    apart = max(abs(a / b - 1) for a, b in zip(losses["as it is"], losses["plain"], strict=True))
    bench.check("losses as they are and of a plain step agree", apart < MOST_APART, f"{apart:.3%} apart at most")
    bench.check("losses are finite", all(map(math.isfinite, losses["as it is"])), f"last {losses['as it is'][-1]:.1f}")
    bench.lines.append(f"losses, nats an image: {', '.join(f'{x:.0f}' for x in losses['as it is'])}")
    bench.lines.append(f"plain:                 {', '.join(f'{x:.0f}' for x in losses['plain'])}")
    return {**losses, "most_apart": apart}


class _Lines:
    """What stands in for the recorder where tensorboardX is not installed: metrics.jsonl alone."""

    def __init__(self, storage: Storage, records: list[dict[str, Any]], note: Any) -> None:
        self._storage, self._records = storage, list(records)

    def record(self, record: dict[str, Any], pictures: Any) -> None:
        self._records.append(metrics.json_ready(record))
        self._storage.write(metrics.FILE, "".join(json.dumps(r) + "\n" for r in self._records).encode())

    def wait(self) -> None:
        """Nothing is written in the background."""

    def close(self) -> None:
        """Nothing is open."""


def training(bench: Bench) -> dict[str, Any]:
    class UntilTheEnd(Observer):
        def stopping(self) -> bool:
            return bench.left_s() < 10

    if find_spec("tensorboardX") is None:
        metrics.Recorder = _Lines  # type: ignore[assignment, misc]
    data = Dataset(job.write_photos(bench.folder / "photos", bench.images, val=max(8, bench.images // 20)))
    config = bench.config(1, 0, epochs=bench.epochs)
    config = config.for_data(str(data.path), data.fingerprint, data.size, len(data.train))
    storage = Storage(bench.folder / "run")
    began = time.perf_counter()
    done = loop(config, storage, bench.device, UntilTheEnd(), Safety())
    took = time.perf_counter() - began
    records = metrics.read(storage)
    if not records:
        raise RuntimeError("no epoch was done in time")
    last, speed = records[-1], measure.summary([r["images_per_s"] for r in records[1:] or records])
    bench.check(f"{bench.epochs} epochs were done", done, f"{len(records)} of them in {took:.1f} s")
    if bench.device.type == "cuda":
        resident = Batches(data.train, bench.device)._resident is not None
        bench.check("the images are on the device", resident, f"data_wait {last['data_wait']:.2%}")
    bench.check("no step was skipped", not last["skipped_steps"], f"explained {last['val_explained']:.3f}")
    bench.lines.append(
        f"{len(records)} epochs of {bench.images} images, batch {config.batch_size}: {took:.1f} s in all, "
        f"{last['seconds']:.1f} s in epochs, {measure.shown(speed, '.0f')} images/s"
    )
    return {"seconds": took, "epochs": len(records), "images_per_s": speed, "last": last}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "sweep": sweep, "variants": variants, "curves": curves, "peers": peers, "training": training
}  # fmt: skip


def main() -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that it runs, not how fast")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no part begins (default: 7.5)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no GPU here; --device cpu --quick shows that this runs")
    torch.set_num_threads(1 if args.quick else measure.cores())
    figures: dict[str, Any] = {"device": args.device, "quick": args.quick, "seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for name in args.only:
            bench.lines.append(f"\n{name}")
            began = time.monotonic()
            if bench.left_s() < 30:
                bench.check(f"{name} ran", False, "no time was left")
                continue
            try:
                figures[name] = PARTS[name](bench)
            except (RuntimeError, ValueError, ImportError, OSError, AssertionError) as error:
                bench.check(f"{name} ran", False, f"{type(error).__name__}: {str(error)[:300]}")
            figures["seconds"][name] = time.monotonic() - began
            if args.device == "cuda":
                torch.cuda.empty_cache()
            if args.json:
                args.json.write_text(json.dumps({**figures, "checks": bench.checks}, indent=2))
    figures["checks"] = bench.checks
    told = [f"{'ok' if c['ok'] else 'FAILED':<8}{c['name']}: {c['detail']}" for c in bench.checks]
    measure.report(figures, [*bench.lines, "", *told], args, "torchvision")
    return 0 if all(check["ok"] for check in bench.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
