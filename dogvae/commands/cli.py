"""The `dogvae` command: its parser, and which function each subcommand calls."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dogvae import __version__
from dogvae.commands import entry, flags, play
from dogvae.config import CROPS, IMAGE_SIZES
from dogvae.console import Progress, say, waiting
from dogvae.data.manifest import read_manifest
from dogvae.errors import UsageError

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
PHOTOS = "files, folders, or patterns such as 'photos/*.jpg'"
DATASET = "a dataset that `dogvae prepare` made: a folder, or a URI such as s3://"


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; tests of the documentation read it, too."""
    top = entry.Parser(prog="dogvae", description="Variational autoencoders of dog photos, trained on Ray.")
    top.add_argument("--version", action="version", version=f"dogvae {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # `_main` passes these to train.py, search.py, fit_prior.py and cloud.py, which have parsers of their own.
    commands.add_parser("train", help="train a VAE on photos, on all GPUs or CPUs that Ray has")
    commands.add_parser("search", help="find the best latent dimension, learning rate and sample count")

    commands.add_parser("fit-prior", help="train a prior for a run's VAE, so that new dogs look more like dogs")
    commands.add_parser("cloud", help="set up an AWS account for a cluster, or check it")

    prepare = commands.add_parser("prepare", help="turn photos into a dataset of small square images")
    prepare.add_argument(
        "source",
        help="a folder, a .zip or .tar(.gz), oxford-pets[:DIR], or dogs that the program draws: drawn:COUNT, "
        "portraits:COUNT",
    )
    prepare.add_argument("out", help="the folder of the new dataset, or a URI such as s3://")
    prepare.add_argument(
        "--image-size",
        "--size",
        dest="size",
        type=int,
        default=64,
        help=f"side of the images in pixels, one of {IMAGE_SIZES} (default: 64)",
    )
    prepare.add_argument(
        "--crop",
        default="center",
        metavar="{" + ",".join(CROPS) + "}",
        help="box cuts out annotated dogs (default: center)",
    )
    prepare.add_argument(
        "--val-fraction", type=float, default=0.05, help="share of the photos held out for validation (default: 0.05)"
    )
    prepare.add_argument("--workers", type=int, help="parallel tasks (default: all CPUs of the cluster)")
    prepare.set_defaults(run=_prepare)

    listing = commands.add_parser("runs", help="list the runs and searches of a folder")
    flags.add_runs(listing)
    listing.set_defaults(run=_runs)

    doctor = commands.add_parser("doctor", help="check every node of the cluster for what training needs")
    doctor.add_argument("--data", help="a prepared dataset that every node has to see or fetch")
    flags.add_runs(doctor)
    flags.add_address(doctor)
    doctor.set_defaults(run=_doctor)

    def add_playing(name: str, run: Any, text: str, output: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        command.add_argument("export", help="folder of an exported model, such as runs/NAME/export")
        if output:
            suffixes = ".png, .jpg, .gif, .webp, .mp4 or .npy"
            command.add_argument("-o", "--output", default=output, help=f"output file: {suffixes} (default: {output})")
        command.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
        return command

    def add_sampling(command: argparse.ArgumentParser) -> None:
        command.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
        command.add_argument("--temperature", type=float, default=1.0, help="below 1: more average dogs (default: 1)")
        command.add_argument(
            "--prior",
            metavar="{flow,gaussian,normal}",
            help="flow, if the model has one; gaussian, fitted to the training photos; or normal, N(0, I) "
            "(default: the first of these that the model has)",
        )
        command.add_argument(
            "--guidance",
            type=float,
            help="of a flow: how far it moves away from the Gaussian (default: 0.5; 0: not at all)",
        )

    def add_path(command: argparse.ArgumentParser) -> None:
        command.add_argument("--steps", type=int, default=32, help="pictures from one photo to the next (default: 32)")
        command.add_argument(
            "--method",
            default="linear",
            metavar="{linear,spherical}",
            help="interpolation of latents (default: linear)",
        )

    sample = add_playing("sample", play.sample, "draw new dogs", "samples.png")
    sample.add_argument("-n", type=int, default=64, help="how many (default: 64)")
    add_sampling(sample)
    reconstruct = add_playing(
        "reconstruct", play.reconstruct, "draw photos above their reconstructions", "reconstruction.png"
    )
    reconstruct.add_argument("photos", nargs="+", help=PHOTOS)
    litter = add_playing("litter", play.litter, "draw children of two dogs", "litter.png")
    litter.description = (
        "Draw children of two dogs: random mixtures of two photos' latents. A .png shows the two photos and their\n"
        "reconstructions first; the other formats hold the children alone. Dogs in a like pose give the best children."
    )
    litter.add_argument("a", help="photo of one parent")
    litter.add_argument("b", help="photo of the other parent")
    litter.add_argument("-n", type=int, default=12, help="how many children (default: 12)")
    litter.add_argument("--seed", type=int, default=0, help="seed of the children (default: 0)")
    litter.add_argument(
        "--temperature", type=float, default=0.7, help="scale of the noise; 0: mixtures without noise (default: 0.7)"
    )
    interpolate = add_playing("interpolate", play.walk, "draw a walk from one photo to another", "walk.gif")
    interpolate.add_argument("a", help="photo at the start")
    interpolate.add_argument("b", help="photo at the end")
    add_path(interpolate)
    walk = add_playing("walk", play.walk, "draw a walk through several photos", "walk.gif")
    walk.add_argument("photos", nargs="+", help=PHOTOS)
    add_path(walk)
    directions = add_playing(
        "directions", play.directions, "change a dog along the directions in which photos differ most", "directions.png"
    )
    directions.add_argument("-n", type=int, default=8, help="how many directions; each is a row (default: 8)")
    directions.add_argument("--photo", help="the photo to change (default: the mean dog)")
    directions.add_argument(
        "--with", nargs="+", dest="photos_with", metavar="PHOTO", help="one direction instead: towards these photos"
    )
    directions.add_argument(
        "--without", nargs="+", dest="photos_without", metavar="PHOTO", help="and away from these (with --with)"
    )
    neighbours = add_playing(
        "neighbours", play.neighbours, "draw samples or photos beside their nearest training photos", "neighbours.png"
    )
    neighbours.add_argument("dataset", help=DATASET)
    neighbours.add_argument("photos", nargs="*", help="photos to compare (default: samples)")
    neighbours.add_argument("-k", type=int, default=7, help="how many neighbours each has (default: 7)")
    neighbours.add_argument("-n", type=int, default=8, help="how many samples, if no photos are given (default: 8)")
    add_sampling(neighbours)
    evaluate = add_playing(
        "evaluate", _evaluate, "print bounds on the likelihood, PSNR, SSIM, Frechet distances and the share of dogs"
    )
    evaluate.add_argument("dataset", help=DATASET)
    evaluate.add_argument(
        "--samples", type=int, default=64, help="samples of the importance-weighted bound (default: 64)"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    evaluate.add_argument(
        "--inception",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also compute FID, by the Inception network of published figures, which is downloaded once (default: yes)",
    )
    playground = add_playing("playground", _playground, "play with the model in the browser")
    playground.add_argument(
        "--port", type=int, help="port to listen on; 0: a free one (default: one that stays the same for a model)"
    )
    playground.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    playground.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    export = commands.add_parser("export", help="export a run anew, or an exported model to ONNX")
    export.add_argument("run_or_export", help="a run, such as runs/NAME, or with --onnx an exported model")
    export.add_argument("--onnx", action="store_true", help="also write encoder.onnx and decoder.onnx")
    export.set_defaults(run=_export)
    for command in commands.choices.values():
        command.add_argument("--verbose", action="store_true", help="show Ray's own log, and tracebacks")
    return top


def _prepare(args: argparse.Namespace) -> None:
    prepared(args)


def prepared(args: argparse.Namespace) -> Path | str:
    """Prepare a dataset with the flags `args`. Returns its folder, or its URI."""
    from dogvae.data.prepare import prepare

    source, out = os.path.expanduser(args.source), os.path.expanduser(args.out)
    settings = dict(size=args.size, crop=args.crop, val_fraction=args.val_fraction, workers=args.workers)
    return prepare(source, out, **settings)


def _runs(args: argparse.Namespace) -> None:
    from dogvae.commands.runs import runs

    runs(args)


def _doctor(args: argparse.Namespace) -> int:
    from dogvae.cluster import connect
    from dogvae.commands import doctor
    from dogvae.commands.remote import run_there

    if (status := run_there(args, [], args.argv)) is not None:
        return status
    say(connect.connect(args.address, args.verbose))
    with waiting("examining every node"):
        report = doctor.examine(args.runs, args.data)
    return 0 if doctor.show(report) else 1


def _evaluate(args: argparse.Namespace) -> None:
    read_manifest(args.dataset)
    with waiting("loading the model"):
        import dogvae
        from dogvae.data.dataset import Dataset
        from dogvae.inference.evaluate import measure, table

    if args.json:
        with redirect_stdout(sys.stderr):  # torch prints about its downloads
            model, dataset = dogvae.load(args.export, args.device), Dataset(args.dataset)
            figures = measure(model, dataset, args.samples, args.inception, lambda text, done, total: None)
        say(json.dumps(figures, indent=2))
        return
    model, dataset = dogvae.load(args.export, args.device), Dataset(args.dataset)
    current = ""
    with Progress("evaluate") as line:

        def show(text: str, done: int, total: int) -> None:
            nonlocal current
            if text != current:
                current = text
                line.restart()
            line.update(done, total, f"{text} {done:,} of {total:,}")

        figures = measure(model, dataset, args.samples, args.inception, show)
    say(table(figures, args.samples))


def _playground(args: argparse.Namespace) -> int:
    with waiting("loading PyTorch"):
        from dogvae.inference.playground_server import serve

    return serve(args.export, args.device, args.host, args.port, args.open)


def _export(args: argparse.Namespace) -> None:
    if args.onnx and (missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]):
        raise UsageError(f"--onnx needs other packages ({', '.join(missing)}): pip install 'dogvae[onnx]'")
    with waiting("loading PyTorch"):
        from dogvae.training.export import export_again, is_export

    folder = os.path.expanduser(args.run_or_export)
    if not is_export(folder):
        folder = export_again(folder)
    elif not args.onnx:
        raise UsageError(f"{folder} is an exported model already; --onnx adds encoder.onnx and decoder.onnx")
    if args.onnx:
        with waiting("writing encoder.onnx and decoder.onnx"):
            from dogvae.inference.onnx import export_onnx

            export_onnx(folder)
    say(folder)


def _main(argv: Sequence[str]) -> int | None:
    if argv[:1] == ["train"]:
        from dogvae.commands import train

        return train.main(argv[1:], "dogvae train")
    if argv[:1] == ["search"]:
        from dogvae.commands import search

        return search.main(argv, "dogvae")
    if argv[:1] == ["fit-prior"]:
        from dogvae.commands import fit_prior

        return fit_prior.main(argv[1:])
    if argv[:1] == ["cloud"]:
        from dogvae.commands import cloud

        return cloud.main(argv[1:])
    args = parser().parse_args(argv)
    args.argv = argv
    code: int | None = args.run(args)
    if hasattr(args, "output"):
        say(args.output)
    return code


def main() -> int:
    """Run `dogvae` with the arguments of this process; returns the exit status."""
    return entry.run(_main)
