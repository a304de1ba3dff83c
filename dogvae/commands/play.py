"""Commands that draw pictures with an exported model: sample, reconstruct, litter, walk, directions, neighbours.

Modules that import torch are imported late, so that mistakes in the flags are reported at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dogvae.console import Progress, say
from dogvae.data.manifest import read_manifest
from dogvae.errors import UsageError

MOST_COLUMNS = 12  # of photos and reconstructions
LITTER_COLUMNS = 4  # of two photos and their reconstructions, and of the children below them
AT_ONCE = 64  # pictures between two updates of the progress line
STEPS = 9  # pictures in a row of `directions`


def sample(args: argparse.Namespace) -> None:
    """`dogvae sample`: a grid of new dogs, or an array of them, written batch by batch."""
    output, model = _begin(args, args.n)
    import numpy as np

    from dogvae.pictures import ARRAY, save, save_array

    batches = _with_progress(
        "sampling", args.n, model.samples(args.n, args.seed, args.temperature, args.prior, args.guidance)
    )
    if output.suffix.lower() in ARRAY:
        save_array(output, batches, args.n)
    else:
        save(output, np.concatenate(list(batches)), columns=8)


def reconstruct(args: argparse.Namespace) -> None:
    """`dogvae reconstruct`: photos, each above its reconstruction."""
    output, model = _begin(args, 2 * len(args.photos))
    import numpy as np

    from dogvae.pictures import STILL, save

    pairs = np.stack([model.prepared(args.photos), model.reconstruct(args.photos)])
    columns = min(len(args.photos), MOST_COLUMNS)
    if output.suffix.lower() in STILL:  # rows of photos and of reconstructions alternate; blanks fill the last two
        blank = np.full((2, -len(args.photos) % columns, *pairs.shape[2:]), 255, np.uint8)
        pairs = np.concatenate([pairs, blank], axis=1).reshape(2, -1, columns, *pairs.shape[2:]).swapaxes(0, 1)
    save(output, pairs.reshape(-1, *pairs.shape[-3:]), columns)


def litter(args: argparse.Namespace) -> None:
    """`dogvae litter`: children of two photos. A grid begins with the photos and their reconstructions."""
    output, model = _begin(args, LITTER_COLUMNS + args.n)
    import numpy as np

    from dogvae.pictures import STILL, save

    parents = [args.a, args.b]
    pictures = _decode(model, model.litter_latents(*parents, args.n, args.seed, args.temperature))
    if output.suffix.lower() in STILL:
        pictures = np.concatenate([model.prepared(parents), model.reconstruct(parents), pictures])
    save(output, pictures, LITTER_COLUMNS)


def walk(args: argparse.Namespace) -> None:
    """`dogvae interpolate` and `dogvae walk`: pictures on the way from photo to photo."""
    photos = args.photos if args.command == "walk" else [args.a, args.b]
    output, model = _begin(args, (len(photos) - 1) * (args.steps - 1) + 1)
    from dogvae.pictures import save

    save(output, _decode(model, model.path(model.encode(photos), args.steps, args.method)), columns=8)


def directions(args: argparse.Namespace) -> None:
    """`dogvae directions`: a row of pictures for each direction, with the unchanged dog in the middle."""
    if (args.photos_with is None) != (args.photos_without is None):
        raise UsageError("--with and --without belong together: photos that have something, and photos that do not")
    if args.n < 1:
        raise UsageError(f"-n: {args.n} is too small, it must be at least 1")
    output, model = _begin(args, STEPS * args.n)
    import numpy as np

    from dogvae.inference.model import SPAN
    from dogvae.pictures import save

    start = model.encode(args.photo)[0] if args.photo else model.mean
    if args.photos_with:  # the right end of the row is one whole difference away
        moves = model.direction(args.photos_with, args.photos_without)[None] / SPAN
    else:
        moves = model.moves[: args.n]
    far = np.linspace(-SPAN, SPAN, STEPS, dtype=np.float32)[:, None, None, None]
    save(output, _decode(model, np.concatenate([start + far * move for move in moves])), columns=STEPS)


def neighbours(args: argparse.Namespace) -> None:
    """`dogvae neighbours`: photos or samples, each in front of the nearest training photos."""
    read_manifest(args.dataset)  # reports a mistake before a model is loaded
    output, model = _begin(args, (len(args.photos) or args.n) * (args.k + 1))
    import numpy as np

    from dogvae.pictures import save

    if args.photos:
        pictures = model.prepared(args.photos)
    else:
        pictures = model.sample(args.n, args.seed, args.temperature, args.prior, guidance=args.guidance)
    with Progress("neighbours") as line:
        _, distances, images = model.neighbours(
            pictures, args.dataset, args.k, lambda done, total: line.update(done, total, f"photo {done:,} of {total:,}")
        )
    for i, row in enumerate(distances):
        say(f"{args.photos[i] if args.photos else f'sample {i}'}: distances {', '.join(f'{d:.1f}' for d in row)}")
    save(output, np.concatenate([pictures[:, None], images], axis=1).reshape(-1, *pictures.shape[1:]), args.k + 1)


def _begin(args: argparse.Namespace, n: int) -> tuple[Path, Any]:
    """The output file, after a check that it can hold `n` pictures, and the model."""
    from dogvae.pictures import check_output

    output = Path(args.output)
    check_output(output, n)
    import dogvae

    return output, dogvae.load(args.export, args.device)


def _decode(model: Any, latents: Any) -> Any:
    """The pictures (n, h, h, 3) uint8 of latents (n, d, 4, 4), with progress."""
    import numpy as np

    parts = (model.decode(latents[start : start + AT_ONCE]) for start in range(0, len(latents), AT_ONCE))
    return np.concatenate(list(_with_progress("drawing", len(latents), parts)))


def _with_progress(title: str, n: int, batches: Iterator[Any]) -> Iterator[Any]:
    """Pass on batches of `n` pictures in all, with a progress line."""
    done = 0
    with Progress(title) as line:
        for batch in batches:
            yield batch
            done += len(batch)
            line.update(done, n, f"{done:,} of {n:,} dogs")
