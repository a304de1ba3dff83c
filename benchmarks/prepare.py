"""Images/s of `dogvae prepare` against a plain Pillow loop, in one run.

    python benchmarks/prepare.py PHOTOS [--size 64] [--repeats 5]

The loop does what every script does, in one process: open, convert to RGB, resize the short side, crop the centre.
Ours is the whole preparation, files and checksums included, on all cores. Ray is started and its workers are warm
before the clock runs; what that costs is printed too. Both use the same filter. The difference in pixels says what
decoding JPEGs at a reduced scale costs: against the exact centre crop at full scale, so that it is nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

LANCZOS = Image.Resampling.LANCZOS


def plain(paths: list[Path], size: int) -> np.ndarray:
    """The photos as (n, size, size, 3) uint8, the usual way."""
    images = []
    for path in paths:
        with Image.open(path) as file:
            image = file.convert("RGB")
        scale = size / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), LANCZOS)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        images.append(np.asarray(image.crop((left, top, left + size, top + size))))
    return np.stack(images)


def full_scale(path: Path, size: int) -> np.ndarray:
    """The centre square (size, size, 3) uint8, decoded at full scale."""
    with Image.open(path) as file:
        return np.asarray(ImageOps.fit(ImageOps.exif_transpose(file).convert("RGB"), (size, size), LANCZOS))


def main() -> None:
    from dogvae.cluster import connect
    from dogvae.decode import crops
    from dogvae.photos import Photo
    from dogvae.prepare import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of photos that can all be read")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    paths = sorted(path for path in args.photos.rglob("*") if path.is_file())

    os.environ.setdefault("RAY_worker_niceness", "0")  # the loop has normal priority, and so should the workers have
    started = time.perf_counter()
    connect()
    ray_s = time.perf_counter() - started

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            prepare(str(args.photos), Path(folder) / "dataset", size=args.size)

    started = time.perf_counter()
    ours()
    first_s = time.perf_counter() - started
    plain_s: list[float] = []
    ours_s: list[float] = []
    for _ in range(args.repeats):
        for seconds, run in ((plain_s, lambda: plain(paths, args.size)), (ours_s, ours)):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    plain_rate, ours_rate = (len(paths) / statistics.median(seconds) for seconds in (plain_s, ours_s))

    difference = []
    for path in paths:
        [(_, pixels)] = crops(Photo(path.name, path.read_bytes()), args.size)
        assert not isinstance(pixels, str), f"{path}: {pixels}"
        difference.append(np.abs(pixels.transpose(1, 2, 0).astype(int) - full_scale(path, args.size)).mean())
    print(f"{len(paths)} photos to {args.size} x {args.size} on {os.cpu_count()} cores, medians of {args.repeats} runs")
    print(f"plain Pillow loop  {plain_rate:7.0f} images/s ({', '.join(f'{s:.2f}' for s in plain_s)} s)")
    print(f"dogvae prepare     {ours_rate:7.0f} images/s ({', '.join(f'{s:.2f}' for s in ours_s)} s)")
    print(f"ratio              {ours_rate / plain_rate:7.2f}")
    print(f"pixels differ from decoding at full scale by {np.mean(difference):.2f} of 255 on average")
    print(f"not counted: {ray_s:.1f} s to start Ray, {first_s - len(paths) / ours_rate:.1f} s more in the first run")


if __name__ == "__main__":
    main()
