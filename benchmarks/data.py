"""Feeding a training: our batches against a DataLoader with torchvision's transforms, and memory as datasets grow.

    python benchmarks/data.py [--batch-size 32] [--repeats 5] [--images 10000 100000 1000000 10000000] [--json FILE]

Speed: images/s on the CPU, augmented and ready for the network, without a training. Ours is `Batches` of
`dogvae.data.dataset` and `dogvae.training.augment`, with --threads threads. The peers are a DataLoader (peers.py) over
the same images in memory, alone in the training process, and with --loader-workers processes beside it. All take turns.

Memory: a process opens a dataset and draws its first batches. Its own memory (anonymous pages, without what imports
cost) is measured afterwards, and its peak while the images are put in order. Ours opens the dataset as the loop does;
the peer is a DataLoader with `shuffle=True` over one memory map. The files are sparse: 10 million images are 123 GB,
and need no room on the disk.

Last, `data_wait` of a training: the share of its time that the loop waits for a batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import measure

SIZE, BATCHES = 64, 20  # side of the images; batches that are drawn when memory is measured
SHARD = 2**26 // (3 * SIZE * SIZE)  # images of a shard, as `dogvae prepare` writes them


def sparse(folder: Path, images: int, shard: int = SHARD) -> Path:
    """A prepared dataset of black images that takes no room on the disk: only the headers are written."""
    import numpy as np

    from dogvae.data.manifest import fingerprint

    folder.mkdir(parents=True)

    def write(name: str, count: int) -> dict[str, Any]:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, SIZE, SIZE)}
        with (folder / name).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + count * 3 * SIZE * SIZE)
            return {"file": name, "count": count, "bytes": file.seek(0, 2), "sha256": 64 * "0"}

    counts = [min(shard, images - start) for start in range(0, images, shard)]
    train = [write(f"train-{i:05d}.npy", count) for i, count in enumerate(counts)]
    splits = {
        "train": {"count": images, "shards": train},
        "val": {"count": 1, "shards": [write("val-00000.npy", 1)]},
    }
    about = {"format": "dogvae-dataset", "version": 1, "size": SIZE, "settings": {}, "rejected": 0}
    about["fingerprint"] = fingerprint(SIZE, splits)
    (folder / "manifest.json").write_text(json.dumps({**about, "source": {}, "splits": splits}))
    return folder


# --- the contenders


def ours(args: argparse.Namespace) -> None:
    """Our batches, augmented, as the loop and the step make them."""
    import torch

    from dogvae.data.dataset import Batches, Dataset, epoch_order
    from dogvae.training.augment import augment, draws
    from dogvae.training.memory import keep_freed_memory

    keep_freed_memory()  # as a worker does
    torch.set_num_threads(args.threads)
    train, turns, epoch = Dataset(args.data).train, measure.Turns(), 0
    while not turns.over:
        order = epoch_order(len(train), 0, epoch)
        batches = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
        for step, images in enumerate(Batches(train, torch.device("cpu"))(batches)):
            flip, degrees = map(torch.from_numpy, draws(len(images), 0, epoch, step))
            augment(images.float() / 255, flip, degrees)
            if not turns.tick():
                return
        epoch += 1


def loader(args: argparse.Namespace) -> None:
    """A DataLoader over images in memory."""
    import torch

    import job
    from peers import Photos, loader_of

    torch.set_num_threads(args.threads)
    photos = Photos(job.photos_of(args.data))
    batches = loader_of(photos, args.batch_size, args.loader_workers, torch.device("cpu"), shuffle=True)
    turns = measure.Turns()
    while not turns.over:
        for _ in batches:
            if not turns.tick():
                return


def own_mb() -> float:
    """Anonymous memory of this process, in MB: it is not shared, and belongs to no memory map."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**10


def our_memory(args: argparse.Namespace) -> None:
    """Memory for the first epoch of a dataset that is opened as the loop opens it."""
    import torch

    from dogvae.data.dataset import Batches, Dataset, epoch_order, rank_slice

    before, top = own_mb(), measure.peak_mb()
    train = Dataset(args.data).train
    order = epoch_order(len(train), 0, 0)
    batches = (order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size))
    mine = (batch[rank_slice(len(batch), 0, 1)] for batch in batches)
    peak = measure.peak_mb()
    for _ in zip(range(BATCHES), Batches(train, torch.device("cpu"))(mine), strict=False):
        pass
    measure.say({"own_mb": own_mb() - before, "peak_mb": max(0.0, peak - top)})


def loader_memory(args: argparse.Namespace) -> None:
    """Memory for the same images in one memory map behind a DataLoader."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Mapped(Dataset[torch.Tensor]):
        def __init__(self, path: Path) -> None:
            self.images = np.load(path, mmap_mode="r")

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(self.images[index].copy())

        def __len__(self) -> int:
            return len(self.images)

    before, top = own_mb(), measure.peak_mb()
    batches = iter(DataLoader(Mapped(Path(args.data) / "train-00000.npy"), args.batch_size, shuffle=True))
    next(batches)
    peak = measure.peak_mb()
    for _ in zip(range(BATCHES), batches, strict=False):
        pass
    measure.say({"own_mb": own_mb() - before, "peak_mb": max(0.0, peak - top)})


def waiting(args: argparse.Namespace) -> None:
    """`data_wait` of each epoch of a training, without the first."""
    import torch

    import job
    from dogvae.storage import Storage
    from dogvae.training import metrics
    from dogvae.training.loop import loop
    from dogvae.training.observer import Observer

    torch.set_num_threads(args.threads)
    config = job.config_for(args.data, "default", args, epochs=3)
    storage = Storage(Path(args.data).parent / "run")
    loop(config, storage, torch.device("cpu"), Observer())
    measure.say({"data_wait": [record["data_wait"] for record in metrics.read(storage)[1:]]})


# --- the measurements


def once(name: str, args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """The answer of a contender that takes no turns."""
    contender = measure.Contender(name, command(name, args, data), args.threads)
    try:
        return contender.answer()
    finally:
        contender.close()


def command(name: str, args: argparse.Namespace, data: Path, loader_workers: int = 0) -> list[str]:
    given = ("--data", data, "--batch-size", args.batch_size, "--threads", args.threads, "--width", args.width)
    return measure.child(__file__, "--contender", name, "--loader-workers", loader_workers, *given)


def speeds(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Images/s of our batches and of the loaders, and the ratio of ours to each."""
    commands = {"ours": (command("ours", args, data), args.threads)}
    for workers in dict.fromkeys((0, args.loader_workers)):
        commands[f"DataLoader, {workers} workers"] = (command("loader", args, data, workers), args.threads)
    with measure.contenders(commands) as started:
        measure.alternate(started, args.repeats, lead=3, steps=args.steps)
        images = args.batch_size * args.steps
        rates = {name: [images / s for s in c.figures("seconds")] for name, c in started.items()}
    return {
        name: {"images_per_s": measure.summary(rate), "ratio": measure.ratio(rates["ours"], rate)}
        for name, rate in rates.items()
    }


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100, help="batches a round (default: 100)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="of the training process (default: 1)")
    parser.add_argument("--loader-workers", type=int, default=measure.cores(), help="(default: one a core)")
    parser.add_argument("--images", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7], help="of the datasets")
    parser.add_argument("--width", type=int, default=16, help="of the training for data_wait (default: 16)")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.samples = 1
    if args.contender:
        globals()[args.contender](args)
        return
    import job

    figures: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "json"}, "memory": {}}
    lines = [f"batch {args.batch_size}, {args.threads} threads, {args.repeats} rounds of {args.steps} batches"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job.write_photos(folder / "data", max(args.batch_size * (args.steps + 3), 640))
        figures["speed"] = speeds(args, folder / "data")
        for name, row in figures["speed"].items():
            rate, times = measure.shown(row["images_per_s"], ".0f"), measure.shown(row["ratio"], ".2f")
            lines.append(f"{name:<24}{rate:>24} images/s" + f"   ours / it: {times}" * (name != "ours"))
        lines.append(f"\n{'images':>12}{'ours, MB':>12}{'ordering':>12}{'DataLoader':>12}{'ordering':>12}")
        for images in args.images:
            shards, whole = sparse(folder / f"{images}", images), sparse(folder / f"{images}-whole", images, images)
            both = once("our_memory", args, shards), once("loader_memory", args, whole)
            figures["memory"][str(images)] = dict(zip(("ours", "loader"), both, strict=True))
            columns = "".join(f"{of[key]:>12.1f}" for of in both for key in ("own_mb", "peak_mb"))
            lines.append(f"{images:>12,}{columns}")
        waits = once("waiting", args, folder / "data")["data_wait"]
    figures["data_wait"] = statistics.median(waits)
    lines.append(f"\ndata_wait of a training of width {args.width}: {figures['data_wait']:.2%}")
    measure.report(figures, lines, args, "torchvision")


if __name__ == "__main__":
    main()
