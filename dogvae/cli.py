"""The `dogvae` command: prepare | sample | reconstruct | interpolate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dogvae import flags
from dogvae.config import CROPS, IMAGE_SIZES
from dogvae.console import UsageError, say

if TYPE_CHECKING:
    import numpy as np

STILL, MOVING, ARRAY = (".png",), (".gif", ".webp"), (".npy",)


def parser() -> argparse.ArgumentParser:
    """The command line, for --help and for the tests of the documentation."""
    top = flags.Parser(
        prog="dogvae", description="Variational autoencoders of dog photos. To train: train_distributed.py"
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="turn photos into a dataset of small square images")
    prepare.add_argument("source", help="a folder, a .zip or .tar(.gz), oxford-pets[:DIR], or drawn:COUNT[:SEED]")
    prepare.add_argument("out", help="the dataset's folder, made by this command")
    prepare.add_argument("--size", type=int, default=64, help=f"side in pixels, of {IMAGE_SIZES} (default: 64)")
    prepare.add_argument("--crop", default="center", help=f"one of {CROPS}; box cuts annotated dogs (default: center)")
    prepare.add_argument(
        "--val-fraction", type=float, default=0.05, help="share held out for validation (default: 0.05)"
    )
    prepare.add_argument("--workers", type=int, help="parallel tasks (default: all CPUs of the cluster)")

    def playing(name: str, text: str, output: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.add_argument("export", help="the folder of an exported model, such as runs/NAME/export")
        command.add_argument("-o", "--output", default=output, help=f".png, .gif, .webp or .npy (default: {output})")
        command.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
        return command

    sample = playing("sample", "dream up new dogs", "samples.png")
    sample.add_argument("-n", type=int, default=64, help="how many (default: 64)")
    sample.add_argument("--seed", type=int, default=0, help="another seed, other dogs (default: 0)")
    sample.add_argument("--temperature", type=float, default=1.0, help="below 1: more ordinary dogs (default: 1)")
    reconstruct = playing("reconstruct", "photos above what the model makes of them", "reconstruction.png")
    reconstruct.add_argument("photos", nargs="+")
    interpolate = playing("interpolate", "walk from one dog to another", "walk.gif")
    interpolate.add_argument("a")
    interpolate.add_argument("b")
    interpolate.add_argument("--steps", type=int, default=32, help="pictures on the way (default: 32)")
    for command in commands.choices.values():
        command.add_argument("--verbose", action="store_true", help="Ray's own log; tracebacks")
    return top


def _main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    if args.command == "prepare":
        from dogvae.prepare import prepare

        prepare(
            args.source, args.out, size=args.size, crop=args.crop, val_fraction=args.val_fraction, workers=args.workers
        )
        return
    output = Path(args.output)
    if output.suffix.lower() not in STILL + MOVING + ARRAY:
        raise UsageError(f"-o: {output} must end in one of {', '.join(STILL + MOVING + ARRAY)}")
    if not output.parent.is_dir():
        raise UsageError(f"-o: there is no folder {output.parent}")
    import dogvae

    model = dogvae.load(args.export, args.device)
    if args.command == "sample":
        save(output, model.sample(args.n, args.seed, args.temperature), columns=8)
    elif args.command == "reconstruct":
        import numpy as np

        pictures = np.concatenate([model.prepared(args.photos), model.reconstruct(args.photos)])
        save(output, pictures, columns=len(args.photos))
    else:
        save(output, model.interpolate(args.a, args.b, args.steps), columns=8)
    say(str(output))


def save(path: Path, pictures_nhwc: np.ndarray, columns: int) -> None:
    """Write uint8 pictures as the suffix says: a PNG grid of `columns`, a GIF or WebP of 20 a second, or an array."""
    import numpy as np
    from PIL import Image

    from dogvae.pictures import grid

    suffix = path.suffix.lower()
    if suffix in ARRAY:
        np.save(path, pictures_nhwc)
    elif suffix in STILL:
        Image.fromarray(grid(pictures_nhwc.transpose(0, 3, 1, 2), columns).transpose(1, 2, 0)).save(path)
    else:
        frames = [Image.fromarray(p).resize((p.shape[1] * 4, p.shape[0] * 4)) for p in pictures_nhwc]
        frames += frames[-2:0:-1]  # there and back again, so that the loop has no jump
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, loop=0)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(flags.run(_main))
