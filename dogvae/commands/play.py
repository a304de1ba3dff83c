"""Commands that draw pictures with an exported model: sample, reconstruct, litter, walk, directions, neighbours.

Modules that import torch are imported late, so that mistakes in the flags are reported at once.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dogvae.console import Progress, say, waiting, warn
from dogvae.data.folders import Folder
from dogvae.data.manifest import read_manifest
from dogvae.data.photos import Rejected
from dogvae.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

MOST_COLUMNS = 12  # of photos and reconstructions
MOST_TYPED = 12  # photos; when more are named, those that cannot be used are skipped
PAGE = 96  # photos on a sheet of reconstructions; more photos are written to several files
LITTER_COLUMNS = 4  # of two photos and their reconstructions, and of the children below them
AT_ONCE = {"cpu": 8, "cuda": 64}  # pictures between two updates of the progress line, by device type
PhotoFile = tuple[str, bool]  # its path, and whether it is needed
STEPS = 9  # pictures in a row of `directions`


def sample(args: argparse.Namespace) -> None:
    """`dogvae sample`: a grid of new dogs, or an array of them, written batch by batch."""
    output, model = _begin(args, args.n)
    import numpy as np

    from dogvae.pictures import ARRAY, save, save_array

    latents = model.latent_batches(args.n, args.seed, args.temperature, args.prior, args.guidance)
    batches = _with_progress("sampling", args.n, (part for batch in latents for part in _decoded(model, batch)))
    if output.suffix.lower() in ARRAY:
        save_array(output, batches, args.n)
    else:
        save(output, np.concatenate(list(batches)), columns=8)


def reconstruct(args: argparse.Namespace) -> None:
    """`dogvae reconstruct`: photos, each above its reconstruction. Many photos fill several sheets."""
    from dogvae.pictures import STILL

    photos = photo_files(args.photos)
    is_sheet = Path(args.output).suffix.lower() in STILL
    output, model = _begin(args, 2 * (min(len(photos), PAGE) if is_sheet else len(photos)))
    import numpy as np

    from dogvae.pictures import save

    rows: list[np.ndarray] = []  # (2, n, h, h, 3): photos and their reconstructions
    written: list[Path] = []
    with Progress("reconstructing") as line:
        read = _read(model, photos)
        while row := list(itertools.islice(read, MOST_COLUMNS)):
            pictures = np.stack([picture for _, picture in row])
            rows.append(np.stack([pictures, model.reconstruct(pictures)]))
            done = row[-1][0] + 1
            line.update(done, len(photos), f"photo {done:,} of {len(photos):,}")
            if is_sheet and len(photos) > PAGE and len(rows) == PAGE // MOST_COLUMNS:
                written.append(_save_sheet(output, rows, len(written) + 1))
                rows = []
    if not is_sheet:
        save(output, np.concatenate(rows, axis=1).reshape(-1, *rows[0].shape[2:]), columns=1)
    elif rows:
        written.append(_save_sheet(output, rows, len(written) + 1 if len(photos) > PAGE else 0))
    if len(written) > 1:
        args.output = f"{written[0]} to {written[-1].name}"


def _save_sheet(output: Path, rows: list[np.ndarray], page: int) -> Path:
    """Write rows (2, n, h, h, 3) as a sheet, photos above reconstructions; page 0 is the only one. Returns its path."""
    import numpy as np

    from dogvae.pictures import save

    columns = rows[0].shape[1]
    blank = np.full((2, columns - rows[-1].shape[1], *rows[-1].shape[2:]), 255, np.uint8)
    pictures = np.stack([*rows[:-1], np.concatenate([rows[-1], blank], axis=1)])
    path = output.with_stem(f"{output.stem}-{page}") if page else output
    save(path, pictures.reshape(-1, *pictures.shape[3:]), columns)
    return path


def litter(args: argparse.Namespace) -> None:
    """`dogvae litter`: children of two photos. A grid begins with the photos and their reconstructions."""
    parents = [os.path.expanduser(args.a), os.path.expanduser(args.b)]
    output, model = _begin(args, LITTER_COLUMNS + args.n)
    import numpy as np

    from dogvae.pictures import STILL, save

    pictures = _decode(model, model.litter_latents(*parents, args.n, args.seed, args.temperature))
    if output.suffix.lower() in STILL:
        pictures = np.concatenate([model.prepared(parents), model.reconstruct(parents), pictures])
    save(output, pictures, LITTER_COLUMNS)


def walk(args: argparse.Namespace) -> None:
    """`dogvae interpolate` and `dogvae walk`: pictures on the way from photo to photo."""
    photos = photo_files(args.photos if args.command == "walk" else [args.a, args.b])
    output, model = _begin(args, (len(photos) - 1) * (args.steps - 1) + 1)
    from dogvae.pictures import save

    latents = model.encode(_pictures(model, photos))
    save(output, _decode(model, model.path(latents, args.steps, args.method)), columns=8)


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

    start = model.encode(os.path.expanduser(args.photo))[0] if args.photo else model.mean
    if args.photos_with:  # the right end of the row is one whole difference away
        two = [_pictures(model, photo_files(names)) for names in (args.photos_with, args.photos_without)]
        moves = model.direction(*two)[None] / SPAN
    else:
        moves = model.moves[: args.n]
    far = np.linspace(-SPAN, SPAN, STEPS, dtype=np.float32)[:, None, None, None]
    save(output, _decode(model, np.concatenate([start + far * move for move in moves])), columns=STEPS)


def neighbours(args: argparse.Namespace) -> None:
    """`dogvae neighbours`: photos or samples, each in front of the nearest training photos."""
    read_manifest(args.dataset)  # reports a mistake before a model is loaded
    photos = photo_files(args.photos)
    output, model = _begin(args, (len(photos) or args.n) * (args.k + 1))
    import numpy as np

    from dogvae.pictures import save

    names = [f"sample {i}" for i in range(args.n)]
    if photos:
        read = list(_read(model, photos))
        names, pictures = [photos[i][0] for i, _ in read], np.stack([picture for _, picture in read])
    else:
        pictures = model.sample(args.n, args.seed, args.temperature, args.prior, guidance=args.guidance)
    with Progress("neighbours") as line:
        _, distances, images = model.neighbours(
            pictures, args.dataset, args.k, lambda done, total: line.update(done, total, f"photo {done:,} of {total:,}")
        )
    for i, row in enumerate(distances):
        say(f"{names[i]}: distances {', '.join(f'{d:.1f}' for d in row)}")
    save(output, np.concatenate([pictures[:, None], images], axis=1).reshape(-1, *pictures.shape[1:]), args.k + 1)


def _begin(args: argparse.Namespace, n: int) -> tuple[Path, Any]:
    """The output file, after a check that it can hold `n` pictures, and the model."""
    from dogvae.pictures import check_output

    _check(args)
    output = Path(args.output).expanduser()
    check_output(output, n)
    with waiting("loading the model"):
        import dogvae

        return output, dogvae.load(args.export, args.device)


def _check(args: argparse.Namespace) -> None:
    """UsageError for a number or a word out of range, before PyTorch and the model are loaded."""
    for flag, least in (("-n", 1), ("-k", 1), ("--steps", 2), ("--seed", 0)):
        value = getattr(args, flag.strip("-"), None)
        if value is not None and value < least:
            raise UsageError(f"{flag}: {value} is too small, it must be at least {least}")
    if not 0 <= getattr(args, "temperature", 1) < float("inf"):
        raise UsageError(f"--temperature: {args.temperature} must be a finite number, at least 0")
    for flag, known in (("--method", ("linear", "spherical")), ("--prior", ("flow", "gaussian", "normal"))):
        word = getattr(args, flag.strip("-"), None)
        if word is not None and word not in known:
            raise UsageError(f"{flag}: {word!r} is none of {', '.join(known)}{did_you_mean(word, known)}")


def photo_files(names: Sequence[str]) -> list[PhotoFile]:
    """The files that `names` stand for: files, folders of photos at any depth, and patterns such as `photos/*.jpg`.

    A photo that was named is needed, if no more were named than a user types: a shell makes many names of a pattern.
    Raises UsageError for a folder or a pattern without photos.
    """
    files: list[PhotoFile] = []
    for name in names:
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            folder = Folder(path, "center")
            folder.defer_reading = True
            found = [os.path.join(path, photo.path) for photo in folder if not isinstance(photo, Rejected)]
        elif glob.has_magic(path) and not os.path.lexists(path):
            found = sorted(file for file in glob.glob(path, recursive=True) if not os.path.isdir(file))
        else:
            files.append((path, len(names) <= MOST_TYPED))
            continue
        if not found:
            raise UsageError(f"{name}: there are no photos")
        files += [(file, False) for file in found]
    return files


def _read(model: Any, files: Sequence[PhotoFile]) -> Iterator[tuple[int, np.ndarray]]:
    """The number and the pixels (h, h, 3) uint8 of each photo. Those that cannot be used are skipped and counted.

    Raises UsageError if none can be used, or if one that is needed cannot.
    """
    errors = []
    for i, (file, is_needed) in enumerate(files):
        try:
            yield i, model.prepared(file)[0]
        except UsageError as error:  # noqa: PERF203
            if is_needed:
                raise
            errors.append(error)
    if len(errors) == len(files):
        raise errors[0]
    if errors:
        warn(f"{len(errors)} of {len(files)} photos skipped; the first: {errors[0]}")


def _pictures(model: Any, files: Sequence[PhotoFile]) -> np.ndarray:
    """The pixels (n, h, h, 3) of `_read`."""
    import numpy as np

    return np.stack([picture for _, picture in _read(model, files)])


def _decode(model: Any, latents: Any) -> Any:
    """The pictures (n, h, h, 3) uint8 of latents (n, d, 4, 4), with progress."""
    import numpy as np

    return np.concatenate(list(_with_progress("drawing", len(latents), _decoded(model, latents))))


def _decoded(model: Any, latents: Any) -> Iterator[Any]:
    size = AT_ONCE[model.device.type]
    return (model.decode(latents[start : start + size]) for start in range(0, len(latents), size))


def _with_progress(title: str, n: int, batches: Iterator[Any]) -> Iterator[Any]:
    """Pass on batches of `n` pictures in all, with a progress line."""
    done = 0
    with Progress(title) as line:
        line.update(0, n, f"0 of {n:,} dogs")
        for batch in batches:
            yield batch
            done += len(batch)
            line.update(done, n, f"{done:,} of {n:,} dogs")
