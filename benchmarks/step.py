"""Images/s of our training loop against the notebook's, a plain DDP script, Lightning and pythae, in one run.

    python benchmarks/step.py [--samples 10 1] [--batch-size 8] [--repeats 5] [--json FILE]
    python benchmarks/step.py --device cuda --batch-size 256 --steps 30 --workers 1

Ours is `dogvae.training.loop.loop` itself: data, augmentation, averaged weights, the look at what is wanted after each
step.
The peers are in peers.py; they have no averaged weights and no checks. `notebook` has the notebook's own network (its
work: python benchmarks/roofline.py --preset notebook); `ours, notebook` is ours with `--preset notebook`, which is the
same network and loss. The other peers have our default network. Each contender is a process of its own with --threads
threads, or, as 2 workers, two of half as many; all take turns, a round of --steps each, and the first steps of a
process and of a round are not timed. Peers that are not installed are left out. On a GPU the peers but the notebook
have bf16 too.

The notebook has batches of 32; at K = 10 two cores need 8 s for one, so 8 is what is compared unless you say otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import job
import measure

OURS, OURS_2 = "ours", "ours, 2 workers"
# What is compared, with which of ours, and what it needs. Each runs with the same batch and K.
CONTENDERS: dict[str, tuple[str, str]] = {
    OURS: ("", "torch"),
    "ours, notebook": ("", "torch"),
    "notebook": (OURS, "torchvision"),
    "ddp": (OURS, "torchvision"),
    "lightning": (OURS, "lightning"),
    "pythae": (OURS, "pythae"),
    OURS_2: ("", "torch"),
    "ddp, 2 workers": (OURS_2, "torchvision"),
}


def contend(args: argparse.Namespace) -> None:
    """What each contender's process does, on each of its ranks."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(args.threads)
    rank = int(os.environ.get("RANK", 0))
    device = torch.device(args.device, rank if args.device == "cuda" else None)
    if args.device == "cuda":
        torch.cuda.set_device(device)  # or object collectives and synchronize() would use the first GPU on every rank
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    cuda = device.type == "cuda"

    def turns() -> measure.Turns:
        def peak() -> float:
            return torch.cuda.max_memory_allocated() / 2**20 if cuda else measure.peak_mb()

        return measure.Turns(torch.cuda.synchronize if cuda else lambda: None, peak)

    kind = args.contender.split(",")[0]
    config = job.config_for(args.data, "notebook" if "notebook" in args.contender else "default", args)
    if kind == "ours":
        train(config, args.folder, device, turns() if rank == 0 else None)
    else:
        import peers

        photos = job.photos_of(args.data)
        # Rank 0 takes the turns; the others follow it, and know how many steps it will have made.
        left = iter(range(steps_of(args) - 1, -1, -1))
        tick = turns().tick if rank == 0 else lambda: bool(next(left))
        getattr(peers, kind)(photos, config, args.loader_workers, device, tick)
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early takes connections with it that another still uses
        dist.destroy_process_group()


def steps_of(args: argparse.Namespace) -> int:
    """How many steps a contender makes in all."""
    return args.warmup + 1 + args.repeats * (1 + args.steps)


def train(config: Any, folder: str, device: Any, turns: measure.Turns | None) -> None:
    """Our loop, whole: the turns are taken where it tells of its progress, and end it as Ctrl-C would."""
    from dogvae.config import Safety
    from dogvae.storage import Storage
    from dogvae.training.loop import loop
    from dogvae.training.observer import Observer

    class Ticking(Observer):
        def progress(self, epoch: int, step: int, steps: int) -> None:
            assert turns is not None
            turns.tick()

        def stopping(self) -> bool:
            return turns is not None and turns.over

    measure.without_tensorboard()
    # No checkpoint within an epoch: one a minute would fall into every round, since the others' turns are minutes.
    loop(config, Storage(folder), device, Ticking(), Safety(checkpoint_s=1e9))


def compare(samples: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All contenders with so many posterior samples: images/s of each round, peak memory, ratios."""
    commands = {}
    width = ("--width", args.width) if args.width else ()
    for name, (_, needs) in CONTENDERS.items():
        two = name.endswith("2 workers")
        if (two and args.workers < 2) or (args.only and name not in args.only):
            continue
        if find_spec(needs) is None:
            print(f"{name}: left out, {needs} is not installed", file=sys.stderr)
            continue
        threads = max(1, args.threads // 2) if two else args.threads
        command = measure.child(
            __file__, "--contender", name, "--data", folder / "data", "--folder", folder / f"{name}-{samples}",
            "--threads", threads, "--samples", samples, "--batch-size", args.batch_size, *width,
            "--device", args.device, "--loader-workers", args.loader_workers,
            "--warmup", args.warmup, "--repeats", args.repeats, "--steps", args.steps,
        )  # fmt: skip
        commands[name] = (measure.ranks(2 if two else 1, command) if two or name == "ddp" else command, threads)
    with measure.contenders(commands) as started:
        measure.alternate(started, 1, lead=args.warmup, steps=1)
        for contender in started.values():
            contender.answers.clear()
        measure.alternate(started, args.repeats, lead=1, steps=args.steps)
        images = args.batch_size * args.steps
        rates = {name: [images / s for s in c.figures("seconds")] for name, c in started.items()}
        peaks = {name: max(c.figures("peak_mb")) for name, c in started.items()}
    return {
        name: {
            "images_per_s": measure.summary(rate),
            "peak_mb": peaks[name],
            **({"ratio": measure.ratio(rates[of], rate)} if (of := CONTENDERS[name][0]) in rates else {}),
        }
        for name, rate in rates.items()
    }


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[10, 1], help="posterior samples K (default: 10 1)")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step, over all workers (default: 8)")
    parser.add_argument("--width", type=int, help="(default: that of each network)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a round (default: 4)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=measure.cores(), help="(default: all cores)")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2), help="the most to compare (default: 2)")
    parser.add_argument(
        "--loader-workers", type=int, default=min(4, measure.cores()),
        help="processes that load data for a peer (default: the notebook's 4, at most one a core)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CONTENDERS, help="some contenders")
    for internal in ("--contender", "--data", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        args.samples = args.samples[0]
        contend(args)
        return

    figures: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "json"}, "contenders": {}}
    lines = [
        f"batch {args.batch_size}, width {args.width or 'of each network'}, {args.threads} threads, "
        f"{args.repeats} x {args.steps} steps"
    ]
    with tempfile.TemporaryDirectory() as folder:
        # One epoch: a loop that validates in between would be timed with it.
        job.write_photos(Path(folder) / "data", args.batch_size * (steps_of(args) + 2))
        for samples in args.samples:
            found = compare(samples, args, Path(folder))
            figures["contenders"][str(samples)] = found
            lines.append(
                f"\n{f'K = {samples}':<18}{'images/s':>22}{'peak MB':>10}{'ours is so many times as fast':>34}"
            )
            for name, row in found.items():
                times = measure.shown(row["ratio"], ".2f") if "ratio" in row else ""
                lines.append(f"{name:<18}{measure.shown(row['images_per_s']):>22}{row['peak_mb']:10.0f}{times:>34}")
    lines.append(f"\nmedian (least-largest) of rounds; peak memory without the {args.loader_workers} loader processes")
    measure.report(figures, lines, args, "torchvision", "lightning", "pythae")


if __name__ == "__main__":
    main()
