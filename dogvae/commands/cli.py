"""The `dogvae` command: prepare photos, train, search, and play with an exported model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dogvae import __version__
from dogvae.commands import flags
from dogvae.config import CROPS, IMAGE_SIZES
from dogvae.console import Progress, say
from dogvae.data.manifest import read_manifest
from dogvae.errors import UsageError

MOST_COLUMNS = 12  # of photos and reconstructions
AT_ONCE = 64  # pictures between two steps of progress
DATASET = "a prepared dataset, such as `dogvae prepare` makes: a folder, or s3:// and the like"


def parser() -> argparse.ArgumentParser:
    """The command line, for --help and for the tests of the documentation."""
    top = flags.Parser(prog="dogvae", description="Variational autoencoders of dog photos, trained on Ray.")
    top.add_argument("--version", action="version", version=f"dogvae {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # The flags of these two are in files of their own, which `_main` asks.
    commands.add_parser("train", help="train a VAE on photos, on all the GPUs or CPUs that Ray has")
    commands.add_parser("search", help="find the best latent dimension, learning rate and sample count")

    prepare = commands.add_parser("prepare", help="turn photos into a dataset of small square images")
    prepare.add_argument(
        "source",
        help="a folder, a .zip or .tar(.gz), oxford-pets[:DIR], or drawn by the program: drawn:COUNT, portraits:COUNT",
    )
    prepare.add_argument("out", help="the dataset's folder, made by this command, or s3:// and the like")
    prepare.add_argument("--size", type=int, default=64, help=f"side in pixels, of {IMAGE_SIZES} (default: 64)")
    prepare.add_argument("--crop", default="center", help=f"one of {CROPS}; box cuts annotated dogs (default: center)")
    prepare.add_argument(
        "--val-fraction", type=float, default=0.05, help="share held out for validation (default: 0.05)"
    )
    prepare.add_argument("--workers", type=int, help="parallel tasks (default: all CPUs of the cluster)")
    prepare.set_defaults(run=_prepare)

    doctor = commands.add_parser("doctor", help="whether every node of the cluster has what training needs")
    doctor.add_argument("--data", help="a prepared dataset that every node should see or can fetch")
    flags.add_runs(doctor)
    flags.add_address(doctor)
    doctor.set_defaults(run=_doctor)

    def playing(name: str, run: Any, text: str, output: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("export", help="the folder of an exported model, such as runs/NAME/export")
        if output:
            suffixes = ".png, .gif, .webp, .mp4 or .npy"
            command.add_argument("-o", "--output", default=output, help=f"{suffixes} (default: {output})")
        command.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
        return command

    def drawing(command: argparse.ArgumentParser) -> None:
        command.add_argument("--seed", type=int, default=0, help="another seed, other dogs (default: 0)")
        command.add_argument("--temperature", type=float, default=1.0, help="below 1: more ordinary dogs (default: 1)")
        command.add_argument(
            "--prior", default="mixture", help="mixture or gaussian, fitted to the photos, or normal (default: mixture)"
        )

    def going(command: argparse.ArgumentParser) -> None:
        command.add_argument("--steps", type=int, default=32, help="pictures from one dog to the next (default: 32)")
        command.add_argument("--method", default="linear", help="linear or spherical (default: linear)")

    sample = playing("sample", _sample, "dream up new dogs", "samples.png")
    sample.add_argument("-n", type=int, default=64, help="how many (default: 64)")
    drawing(sample)
    reconstruct = playing(
        "reconstruct", _reconstruct, "photos above what the model makes of them", "reconstruction.png"
    )
    reconstruct.add_argument("photos", nargs="+")
    interpolate = playing("interpolate", _walk, "walk from one dog to another", "walk.gif")
    interpolate.add_argument("a")
    interpolate.add_argument("b")
    going(interpolate)
    walk = playing("walk", _walk, "walk from dog to dog to dog", "walk.gif")
    walk.add_argument("photos", nargs="+")
    going(walk)
    directions = playing(
        "directions", _directions, "a dog changed along the directions in which photos differ most", "directions.png"
    )
    directions.add_argument("-n", type=int, default=8, help="how many directions, a row each (default: 8)")
    directions.add_argument("--photo", help="the dog that is changed (default: the mean dog)")
    directions.add_argument(
        "--with", nargs="+", dest="photos_with", metavar="PHOTO", help="instead: towards these photos,"
    )
    directions.add_argument("--without", nargs="+", dest="photos_without", metavar="PHOTO", help="and away from these")
    neighbours = playing(
        "neighbours", _neighbours, "samples, or photos, beside the training photos nearest to them", "neighbours.png"
    )
    neighbours.add_argument("dataset", help=DATASET)
    neighbours.add_argument("photos", nargs="*", help="(default: samples)")
    neighbours.add_argument("-k", type=int, default=7, help="how many neighbours of each (default: 7)")
    neighbours.add_argument("-n", type=int, default=8, help="how many samples, without photos (default: 8)")
    drawing(neighbours)
    evaluate = playing("evaluate", _evaluate, "bounds on the likelihood, PSNR, SSIM, Frechet distances")
    evaluate.add_argument("dataset", help=DATASET)
    evaluate.add_argument("--samples", type=int, default=64, help="draws of the importance-weighted bound (64)")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    evaluate.add_argument(
        "--inception",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the Frechet distance of an Inception network, which is downloaded once (default: yes)",
    )
    playground = playing("playground", _playground, "play with the model in the browser")
    playground.add_argument("--port", type=int, default=0, help="(default: a free one)")
    playground.add_argument("--host", default="127.0.0.1", help="what to listen on (default: this machine only)")
    export = commands.add_parser("export", help="export a run again; or an exported model to ONNX")
    export.add_argument("run_or_export", help="a run, such as runs/NAME; or, with --onnx, an exported model")
    export.add_argument("--onnx", action="store_true", help="also encoder.onnx and decoder.onnx")
    export.set_defaults(run=_export)
    for command in commands.choices.values():
        command.add_argument("--verbose", action="store_true", help="Ray's own log; tracebacks")
    return top


def _prepare(args: argparse.Namespace) -> None:
    from dogvae.data.prepare import prepare

    prepare(args.source, args.out, size=args.size, crop=args.crop, val_fraction=args.val_fraction, workers=args.workers)


def _doctor(args: argparse.Namespace) -> int:
    from dogvae.cluster import connect
    from dogvae.commands import doctor
    from dogvae.commands.remote import run_there

    if (status := run_there(args, [], args.argv)) is not None:
        return status
    say(connect.connect(args.address, args.verbose))
    return 0 if doctor.show(doctor.examine(args.runs, args.data)) else 1


def _sample(args: argparse.Namespace) -> None:
    output, model = _begin(args, args.n)
    import numpy as np

    from dogvae.pictures import ARRAY, save, save_array

    batches = _shown("sampling", args.n, model.samples(args.n, args.seed, args.temperature, args.prior))
    if output.suffix.lower() in ARRAY:
        save_array(output, batches, args.n)
    else:
        save(output, np.concatenate(list(batches)), columns=8)


def _reconstruct(args: argparse.Namespace) -> None:
    output, model = _begin(args, 2 * len(args.photos))
    import numpy as np

    from dogvae.pictures import STILL, save

    pairs = np.stack([model.prepared(args.photos), model.reconstruct(args.photos)])
    columns = min(len(args.photos), MOST_COLUMNS)
    if output.suffix.lower() in STILL:  # a row of photos, below it theirs, and so on; the last two are filled up
        blank = np.full((2, -len(args.photos) % columns, *pairs.shape[2:]), 255, np.uint8)
        pairs = np.concatenate([pairs, blank], axis=1).reshape(2, -1, columns, *pairs.shape[2:]).swapaxes(0, 1)
    save(output, pairs.reshape(-1, *pairs.shape[-3:]), columns)


def _walk(args: argparse.Namespace) -> None:
    stops = args.photos if args.command == "walk" else [args.a, args.b]
    output, model = _begin(args, (len(stops) - 1) * (args.steps - 1) + 1)
    from dogvae.pictures import save

    save(output, _decode(model, model.path(model.encode(stops), args.steps, args.method)), columns=8)


def _directions(args: argparse.Namespace) -> None:
    if (args.photos_with is None) != (args.photos_without is None):
        raise UsageError("--with and --without belong together: photos that have something, and photos that do not")
    if args.n < 1:
        raise UsageError(f"-n: {args.n} is too small, it must be at least 1")
    output, model = _begin(args, 9 * args.n)
    import numpy as np

    from dogvae.inference.model import SPAN
    from dogvae.pictures import save

    start = model.encode(args.photo)[0] if args.photo else model.mean
    # With photos, the ends of the row are once the whole difference.
    moves = model.moves[: args.n]
    if args.photos_with:
        moves = model.direction(args.photos_with, args.photos_without)[None] / SPAN
    far = np.linspace(-SPAN, SPAN, 9, dtype=np.float32)[:, None, None, None]
    save(output, _decode(model, np.concatenate([start + far * move for move in moves])), columns=9)


def _neighbours(args: argparse.Namespace) -> None:
    read_manifest(args.dataset)  # a mistake there is told before a model is loaded
    output, model = _begin(args, (len(args.photos) or args.n) * (args.k + 1))
    import numpy as np

    from dogvae.pictures import save

    if args.photos:
        pictures = model.prepared(args.photos)
    else:
        pictures = model.sample(args.n, args.seed, args.temperature, args.prior)
    with Progress("neighbours") as line:
        _, distances, images = model.neighbours(
            pictures, args.dataset, args.k, lambda done, total: line.update(done, total, f"photo {done:,} of {total:,}")
        )
    for i, row in enumerate(distances):
        say(f"{args.photos[i] if args.photos else f'sample {i}'}: distances {', '.join(f'{d:.1f}' for d in row)}")
    save(output, np.concatenate([pictures[:, None], images], axis=1).reshape(-1, *pictures.shape[1:]), args.k + 1)


def _evaluate(args: argparse.Namespace) -> None:
    read_manifest(args.dataset)
    import dogvae
    from dogvae.data.dataset import Dataset
    from dogvae.inference.evaluate import measure, table

    model, dataset = dogvae.load(args.export, args.device), Dataset(args.dataset)
    if args.json:
        figures = measure(model, dataset, args.samples, args.inception, lambda text, done, total: None)
        say(json.dumps(figures, indent=2))
        return
    doing = ""
    with Progress("evaluate") as line:

        def tell(text: str, done: int, total: int) -> None:
            nonlocal doing
            if text != doing:
                doing = text
                line.restart()
            line.update(done, total, f"{text} {done:,} of {total:,}")

        figures = measure(model, dataset, args.samples, args.inception, tell)
    say(table(figures, args.samples))


def _playground(args: argparse.Namespace) -> int:
    from dogvae.inference.playground import serve

    return serve(args.export, args.device, args.host, args.port)


def _export(args: argparse.Namespace) -> None:
    from dogvae.training.export import export_again, is_export

    exported = args.run_or_export
    if not is_export(exported):
        exported = export_again(exported)
    elif not args.onnx:
        raise UsageError(f"{exported} is an exported model already; --onnx adds encoder.onnx and decoder.onnx")
    if args.onnx:
        from dogvae.inference.onnx import export_onnx

        export_onnx(exported)
    say(exported)


def _decode(model: Any, latents: Any) -> Any:
    """The pictures of latents, with progress."""
    import numpy as np

    parts = (model.decode(latents[start : start + AT_ONCE]) for start in range(0, len(latents), AT_ONCE))
    return np.concatenate(list(_shown("drawing", len(latents), parts)))


def _shown(title: str, n: int, batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches of `n` pictures in all, with progress."""
    done = 0
    with Progress(title) as line:
        for batch in batches:
            yield batch
            done += len(batch)
            line.update(done, n, f"{done:,} of {n:,} dogs")


def _begin(args: argparse.Namespace, n: int) -> tuple[Path, Any]:
    """Where the output of `n` pictures goes, checked, and the model."""
    from dogvae.pictures import check_output

    output = Path(args.output)
    check_output(output, n)
    import dogvae

    return output, dogvae.load(args.export, args.device)


def _main(argv: Sequence[str]) -> int | None:
    if argv[:1] == ["train"]:
        from dogvae.commands import train

        return train.main(argv[1:], "dogvae train")
    if argv[:1] == ["search"]:
        from dogvae.commands import search

        return search.main(argv, "dogvae")
    args = parser().parse_args(argv)
    args.argv = argv
    code: int | None = args.run(args)
    if hasattr(args, "output"):
        say(args.output)
    return code


def main() -> None:
    """Entry point of the console script."""
    sys.exit(flags.run(_main))
