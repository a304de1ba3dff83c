"""2,000 damaged photos and archives, always the same ones: no crash, no hang, little memory, refusals of one line."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import measure
from dogvae.data.decode import decode
from dogvae.data.photos import Photo, Rejected
from dogvae.data.source import open_source
from dogvae.errors import UsageError
from tests.support.command import ROOT
from tests.support.images import icc, png

COUNT, SECONDS, BYTES = 2000, 10, 2 * 2**30


def originals() -> dict[str, bytes]:
    """File name -> a whole file."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8)
    image = Image.fromarray(noise)
    files = {"16 bits.png": png(noise[..., :3].astype(int) * 257, 16, (9, 9, 9), icc("adobe", 2.2))}
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        buffer = io.BytesIO()
        picture = image.convert("RGB") if format == "JPEG" else image
        picture.save(buffer, format, exif=exif, icc_profile=icc("p3", 2.2))
        files[f"x.{format.lower()}"] = buffer.getvalue()
    for name, mode in (("x.tar", "w"), ("x.tar.gz", "w:gz")):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
            for photo, data in list(files.items())[:4]:
                member = tarfile.TarInfo(photo)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        files[name] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for photo, data in list(files.items())[:4]:
            archive.writestr(photo, data)
    return files | {"x.zip": buffer.getvalue()}


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, most of them near the start, where headers are; sometimes a part missing, doubled or 0xff."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        changed[int(len(changed) * rng.random() ** 3)] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
    start = int(rng.integers(len(changed)))
    length = int(rng.integers(1, 65))
    match rng.integers(6):
        case 0:
            del changed[start:]
        case 1:
            del changed[start : start + length]
        case 2:
            changed[start:start] = changed[start : start + length]
        case 3:
            changed[start : start + 8] = b"\xff" * 8
    return bytes(changed)


def reasons(name: str, data: bytes, folder: Path) -> list[str]:
    """Why the file, or what is in it, is refused."""
    if not name.endswith((".zip", ".tar", ".tar.gz")):
        return [pixels for _, pixels in decode(Photo(name, data), 32).crops if isinstance(pixels, str)]
    (folder / name).write_bytes(data)
    try:
        found = list(open_source(str(folder / name)))
    except UsageError as error:
        return [str(error)]
    photos = [reason for item in found if isinstance(item, Photo) for reason in reasons(item.path, item.data, folder)]
    return photos + [item.reason for item in found if isinstance(item, Rejected)]


def main() -> None:
    rng, files = np.random.default_rng(0), originals()
    refused = 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(COUNT):
            name = list(files)[i % len(files)]
            print(f"\r{i} {name}", end="", file=sys.stderr, flush=True)  # the last one is what crashed
            signal.alarm(SECONDS)
            found = reasons(name, damaged(files[name], rng), Path(folder))
            assert all(reason and "\n" not in reason for reason in found), found
            refused += bool(found)
    print(refused, round(measure.peak_mb() * 2**20))


@pytest.mark.slow
def test_damaged_files_neither_crash_nor_hang_nor_fill_the_memory() -> None:
    code = "import sys; sys.path.append('benchmarks'); import tests.data.test_fuzz as fuzz; fuzz.main()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    refused, memory = map(int, run.stdout.split())
    assert COUNT / 4 < refused < COUNT
    assert memory < BYTES
