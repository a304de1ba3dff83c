"""Images/s of `dogvae prepare` against a plain Pillow loop, in one run.

    python benchmarks/prepare.py PHOTOS [--size 64] [--repeats 5] [--json FILE]

The loop does in one process what most scripts do: open, convert to RGB, resize the short side, crop the centre. Ours is
the whole preparation on all cores, with its files and checksums. Ray and its workers are warm before the clock starts;
what their start costs is printed too. Both use the same filter. `dogvae prepare` decodes JPEGs at a reduced scale: the
printed difference in pixels is that to the exact centre crop, decoded at full scale.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import measure

LANCZOS = Image.Resampling.LANCZOS


def plain(paths: list[Path], size: int) -> np.ndarray:
    """The photos as (n, size, size, 3) uint8, by the loop that most scripts have."""
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
    from dogvae.cluster.connect import connect
    from dogvae.data.decode import crops
    from dogvae.data.photos import Photo
    from dogvae.data.prepare import prepare

    parser = measure.parser(__doc__)
    parser.add_argument("photos", type=Path, help="a folder of photos, all of them readable")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    paths = sorted(path for path in args.photos.rglob("*") if path.is_file())

    os.environ.setdefault("RAY_worker_niceness", "0")  # normal priority, which the loop has too
    started = time.perf_counter()
    connect()
    ray_s = time.perf_counter() - started

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            prepare(str(args.photos), Path(folder) / "dataset", size=args.size)

    started = time.perf_counter()
    ours()
    first_s = time.perf_counter() - started
    rates: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(args.repeats):
        for name, run in (("plain", lambda: plain(paths, args.size)), ("ours", ours)):
            started = time.perf_counter()
            run()
            rates[name].append(len(paths) / (time.perf_counter() - started))
    plain_rate, ours_rate = (measure.summary(rates[name]) for name in ("plain", "ours"))
    ratio = measure.ratio(rates["ours"], rates["plain"])

    difference = []
    for path in paths:
        [(_, pixels)] = crops(Photo(path.name, path.read_bytes()), args.size)
        assert not isinstance(pixels, str), f"{path}: {pixels}"
        difference.append(np.abs(pixels.transpose(1, 2, 0).astype(int) - full_scale(path, args.size)).mean())
    apart, more_s = float(np.mean(difference)), first_s - len(paths) / ours_rate["median"]
    lines = [
        f"{len(paths)} photos to {args.size} x {args.size}, medians of {args.repeats} runs",
        f"plain Pillow loop  {measure.shown(plain_rate, '.0f')} images/s",
        f"dogvae prepare     {measure.shown(ours_rate, '.0f')} images/s",
        f"ratio              {measure.shown(ratio, '.2f')}",
        f"pixels differ from decoding at full scale by {apart:.2f} of 255 on average",
        f"not counted: {ray_s:.1f} s to start Ray, {more_s:.1f} s more in the first run",
    ]
    figures = {"plain_images_per_s": plain_rate, "ours_images_per_s": ours_rate, "ratio": ratio, "pixels": apart}
    measure.report({**figures, "ray_s": ray_s, "first_more_s": more_s}, lines, args, "pillow", "ray")


if __name__ == "__main__":
    main()
