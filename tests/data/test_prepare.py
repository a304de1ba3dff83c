"""The whole way from photos to a dataset, on a real Ray: bytes, splits, crashes, kills, races, reruns."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dogvae.data import atomic, writer
from dogvae.data import prepare as module
from dogvae.data.dataset import Dataset
from dogvae.data.photos import Drawing, Photo, Rejected, Source
from dogvae.data.prepare import cached, prepare
from dogvae.data.split import is_val
from dogvae.data.writer import Row, write_dataset
from dogvae.errors import UsageError
from dogvae.storage import Storage
from tests.support.s3 import Server


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test
    yield
    ray.shutdown()


def photos(root: Path, count: int, start: int = 0) -> Path:
    """`count` PNGs of 32 x 32, each of one grey value, its number: so that a row says which photo it is."""
    root.mkdir(exist_ok=True)
    for i in range(start, start + count):
        Image.new("RGB", (32, 32), (i, i, i)).save(root / f"{i:03d}.png")
    return root


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def images(out: Path) -> dict[str, np.ndarray]:
    return {
        split: np.concatenate([np.load(p) for p in sorted(out.glob(f"{split}-*.npy"))]) for split in ("train", "val")
    }


def test_dataset_is_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 30 * 3 * 32 * 32 + 1)  # 30 images a shard
    source = photos(tmp_path / "photos", 100)
    (source / "bad.jpg").write_bytes(b"junk")
    (source / "x,\n.txt").write_bytes(b"x")
    out = prepare(str(source), tmp_path / "out", size=32, val_fraction=0.2)

    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("0*.png")}
    expected = {name for name, digest in hashes.items() if int(digest[:16], 16) / 2**64 < 0.2}
    rows = table(out / "index.csv")
    assert {row["source_path"] for row in rows if row["split"] == "val"} == expected
    assert [row["source_path"] for row in rows] == sorted(hashes)
    stored = images(out)
    for row in rows:
        split, number = row["image_id"].split("/")
        assert split == row["split"]
        assert np.unique(stored[split][int(number)]).tolist() == [int(row["source_path"][:3])]

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"] == {"size": 32, "crop": "center", "val_fraction": 0.2}
    assert (manifest["source"]["kind"], manifest["source"]["name"]) == ("folder", str(source))
    assert manifest["rejected"] == 2
    for split, described in manifest["splits"].items():
        assert described["count"] == len(stored[split]) == sum(shard["count"] for shard in described["shards"])
        assert [shard["count"] for shard in described["shards"][:-1]] == [30] * (len(described["shards"]) - 1)
        for shard in described["shards"]:
            data = (out / shard["file"]).read_bytes()
            assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(manifest["splits"]["train"]["shards"]) > 1
    assert {row["path"]: row["reason"] for row in table(out / "rejected.csv")} == {
        "bad.jpg": "not an image of a known format (JPEG, PNG, WEBP, GIF, BMP)",
        "x,\n.txt": "suffix '.txt' is not an image's",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]
    assert all(image.dtype == np.uint8 and image.flags.c_contiguous for image in stored.values())


def test_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 90)
    (source / "050.jpg").write_bytes(b"junk")
    one, two = (prepare(str(source), tmp_path / str(n), size=64, workers=n) for n in (1, 2))
    assert contents(one) == contents(two)


def test_fewer_workers_means_fewer_tasks_at_once(tmp_path: Path) -> None:
    class Timed(Drawing):
        def draw(self, size: int) -> Image.Image:
            start = time.time()
            time.sleep(0.05)
            (tmp_path / str(self.index)).write_text(f"{start} {time.time()}")
            return Image.new("RGB", (size, size), (self.index, 0, 0))

    def most_at_once(workers: int) -> int:
        write(tmp_path / f"out{workers}", [Photo(str(i), Timed(i, 0)) for i in range(8)], workers)
        spans = [tuple(map(float, (tmp_path / str(i)).read_text().split())) for i in range(8)]
        return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)

    module_batch, module.BATCH_PHOTOS = module.BATCH_PHOTOS, 1
    try:
        assert (most_at_once(1), most_at_once(2)) == (1, 2)
    finally:
        module.BATCH_PHOTOS = module_batch


class Items(Source):
    kind = name = "items"

    def __init__(self, items: list[Photo | Rejected]) -> None:
        self._items = items

    def signature(self) -> str:
        return "0"

    def __iter__(self) -> Iterator[Photo | Rejected]:
        return iter(self._items)


def write(out: Path, items: Any, workers: int | None = None) -> dict[str, Any]:
    module._prepare(Items(items), "0", out, SETTINGS, workers)
    return json.loads((out / "manifest.json").read_text())


class Deadly(Drawing):
    def draw(self, size: int) -> Image.Image:
        if self.index == 7:
            os.kill(os.getpid(), signal.SIGSEGV)
        return Image.new("RGB", (size, size), (self.index, 0, 0))


def test_only_the_photo_that_kills_its_worker_is_rejected(tmp_path: Path) -> None:
    manifest = write(tmp_path / "out", [Photo(f"{i}", Deadly(i, 0)) for i in range(40)])
    assert sum(split["count"] for split in manifest["splits"].values()) == 39
    assert table(tmp_path / "out/rejected.csv") == [{"path": "7", "reason": "its decoder crashed"}]


def test_workers_import_no_torch(tmp_path: Path) -> None:
    class Witness(Drawing):
        def draw(self, size: int) -> Image.Image:
            assert "torch" not in sys.modules, "torch is imported"
            return Image.new("RGB", (size, size), (self.index, 0, 0))

    assert write(tmp_path / "out", [Photo(str(i), Witness(i, 0)) for i in range(9)])["rejected"] == 0


def test_boxes_of_a_photo_stay_together(tmp_path: Path) -> None:
    xml = "<bndbox><xmin>{0}</xmin><ymin>0</ymin><xmax>{1}</xmax><ymax>32</ymax></bndbox>"
    source = photos(tmp_path / "dogs", 20)
    (source / "Annotation").mkdir()
    for i in range(19):
        (source / f"Annotation/{i:03d}").write_text(
            f"<a>{xml.format(0, 16)}{xml.format(16, 40)}{xml.format(50, 60)}</a>"
        )
    out = prepare(str(source), tmp_path / "out", size=32, crop="box", val_fraction=0.3)
    rows = table(out / "index.csv")
    assert [row["box"] for row in rows] == ["0 0 16 32", "16 0 40 32"] * 19
    assert all(a["split"] == b["split"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    reasons = [row["reason"] for row in table(out / "rejected.csv")]
    assert reasons[-1] == "no bounding box"
    assert reasons[:19] == ["box (50, 0, 60, 32) is empty or outside the image (32 x 32 pixels)"] * 19


def test_drawn_dogs(tmp_path: Path) -> None:
    out = prepare("drawn:6:1", tmp_path / "out", size=32, val_fraction=0.3)
    assert {row["source_path"] for row in table(out / "index.csv")} == {f"drawn:{i}:1" for i in range(6)}


def test_name_that_is_no_text_is_written_escaped(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 4)
    os.rename(source / "000.png", os.fsencode(source) + b"/\xff.png")
    out = prepare(str(source), tmp_path / "out", size=32)
    assert "\\udcff.png" in {row["source_path"] for row in table(out / "index.csv")}


def test_rerun_does_nothing_and_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = photos(tmp_path / "photos", 10), tmp_path / "out"
    prepare(str(source), out, size=32)
    before = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    capsys.readouterr()
    code = f"import sys; from dogvae.data.prepare import prepare; prepare({str(source)!r}, {str(out)!r}, size=32);"
    code += "sys.exit('ray' in sys.modules)"
    started = time.monotonic()
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - started < 5  # under a second on an idle machine; starting Ray takes longer
    assert (again.returncode, again.stderr) == (0, "")
    assert "is already prepared: " in again.stdout
    with pytest.raises(UsageError, match=r"--size 32, not 64; --val-fraction 0\.05, not 0\.5: name another"):
        prepare(str(source), out, size=64, val_fraction=0.5)
    with pytest.raises(UsageError, match=r"another SOURCE, .*photos"):
        prepare(str(photos(tmp_path / "others", 3)), out, size=32)
    photos(source, 1, start=50)
    with pytest.raises(UsageError, match="is inside SOURCE"):
        cached(str(source), source / "cache", size=32)
    with pytest.raises(UsageError, match="a SOURCE that has changed since"):
        prepare(str(source), out, size=32)
    assert {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]} == before


def test_cached_prepares_once_for_each_source_and_settings(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 10)
    first = cached(str(source), tmp_path / "cache", size=32)
    before = first.stat().st_mtime_ns
    assert cached(str(source), tmp_path / "cache", size=32, workers=1) == first
    assert first.stat().st_mtime_ns == before
    assert cached(str(source), tmp_path / "cache", size=64) != first
    photos(source, 1, start=50)
    assert cached(str(source), tmp_path / "cache", size=32) != first
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 65}, r"--size 65: must be one of 32, 64, 128"),
        ({"val_fraction": 0.0}, "--val-fraction"),
        ({"val_fraction": 1}, "--val-fraction"),
        ({"val_fraction": float("nan")}, "--val-fraction"),
        ({"workers": 0}, "--workers"),
        ({"crop": "middle"}, "--crop middle: must be one of center, box"),
    ],
)
def test_wrong_flags(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    for function in (prepare, cached):
        with pytest.raises(UsageError, match=message):
            function(str(photos(tmp_path / "photos", 2)), tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_wrong_places(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 3)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("dear")
    (tmp_path / "link").symlink_to(source)
    for out, message in {
        foreign: "is not a dataset",
        foreign / "thesis.txt": "is not a dataset",
        source / "out": "is inside SOURCE",
        tmp_path / "link/out": "is inside SOURCE",
        source: "is not a dataset",
        foreign / "thesis.txt/out": "cannot be written",
        Path("/proc/out"): "cannot be written",
    }.items():
        with pytest.raises(UsageError, match=message):
            prepare(str(source), out)
    assert contents(foreign) == {"thesis.txt": b"dear"}
    assert len(list(source.iterdir())) == 3


def test_empty_folder_and_link_to_one_can_be_out(tmp_path: Path) -> None:
    source, real = photos(tmp_path / "photos", 3), tmp_path / "real"
    real.mkdir()
    (tmp_path / "out").symlink_to(real)
    assert prepare(str(source), tmp_path / "out", size=32) == real
    assert (real / "manifest.json").exists()


def test_nothing_usable_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    (source / "a.jpg").write_bytes(b"junk")
    with pytest.raises(
        UsageError, match=r"no usable photo: all 1 files were rejected, for example a\.jpg: not an image"
    ):
        prepare(str(source), tmp_path / "out")
    Image.new("RGB", (9, 9)).save(source / "b.png")
    Image.new("RGB", (9, 9)).save(source / "c.png")  # the same bytes
    with pytest.raises(UsageError, match="at least two different photos"):
        prepare(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


SETTINGS = {"size": 32, "crop": "center", "val_fraction": 0.3}


def rows_of(numbers: list[int]) -> list[Row]:
    """A row for each number: equal numbers are duplicates."""
    return [
        Row(str(n), None, hashlib.sha256(str(n).encode()).digest(), np.full((3, 32, 32), n, np.uint8)) for n in numbers
    ]


def split_of(folder: Path, numbers: list[int], val_fraction: float) -> dict[str, list[int]]:
    folder.mkdir()
    write_dataset(folder, rows_of(numbers), {"name": "x"}, {"size": 32, "crop": "center", "val_fraction": val_fraction})
    return {split: pixels[:, 0, 0, 0].tolist() for split, pixels in images(folder).items()}


def test_smallest_hash_is_val_if_none_falls_there(tmp_path: Path) -> None:
    numbers = [*range(50), *range(0, 50, 2)]  # every second one twice
    smallest = min(range(50), key=lambda n: hashlib.sha256(str(n).encode()).digest())
    split = split_of(tmp_path / "out", numbers, 1e-9)
    assert split["val"] == [smallest] * numbers.count(smallest)
    assert sorted(split["train"]) == sorted(n for n in numbers if n != smallest)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=2, max_size=40), st.floats(0.05, 0.95))
def test_split_loses_nothing_and_keeps_duplicates_together(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], val_fraction: float
) -> None:
    folder = tmp_path_factory.mktemp("split") / "out"
    try:
        split = split_of(folder, numbers, val_fraction)
    except UsageError:
        kept = {n for n in numbers if not is_val(hashlib.sha256(str(n).encode()).digest(), val_fraction)}
        assert not kept or len(set(numbers)) == 1
        return
    assert sorted(split["train"] + split["val"]) == sorted(numbers)
    assert not set(split["train"]) & set(split["val"])


@settings(max_examples=25, deadline=None)
@given(st.sets(st.binary(max_size=20)), st.sets(st.binary(max_size=20)), st.floats(0.01, 0.99))
def test_adding_photos_moves_none(old: set[bytes], new: set[bytes], val_fraction: float) -> None:
    def val(photos: set[bytes]) -> set[bytes]:
        return {p for p in photos if is_val(hashlib.sha256(p).digest(), val_fraction)}

    assert val(old | new) & old == val(old)


def test_split_share() -> None:
    hits = sum(is_val(hashlib.sha256(str(i).encode()).digest(), 0.05) for i in range(20_000))
    assert abs(hits - 1000) < 150  # 5 standard deviations
    assert is_val(bytes(32), 1e-12)
    assert not is_val(b"\xff" * 32, 0.999999)


def test_racing_runs_both_succeed(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 40)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(prepare, str(source), tmp_path / "out", size=32) for _ in range(2)]
        assert [run.result() for run in runs] == [tmp_path / "out"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_loser_of_a_race_with_other_settings_is_told(tmp_path: Path) -> None:
    class Overtaken(Items):
        def __iter__(self) -> Iterator[Photo | Rejected]:
            write(tmp_path / "out", self._items)
            return iter(self._items)

    loser = Overtaken([Photo(str(i), Drawing(i, 0)) for i in range(4)])
    with pytest.raises(UsageError, match="--size 32, not 64"):
        module._prepare(loser, "0", tmp_path / "out", SETTINGS | {"size": 64}, None)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["size"] == 32
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_in_use_are_left_alone(tmp_path: Path) -> None:
    with atomic.atomic_folder(tmp_path / "out") as mine:
        (tmp_path / ".out.partial-dead").mkdir()
        (tmp_path / ".other.partial-dead").mkdir()
        with atomic.atomic_folder(tmp_path / "out") as theirs:
            assert mine.exists()
            assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".other.partial-dead", mine.name, theirs.name])
            write_dataset(theirs, rows_of([1, 2, 3]), {"name": "theirs"}, SETTINGS)
        write_dataset(mine, rows_of([4, 5, 6]), {"name": "mine"}, SETTINGS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.partial-dead", "out"]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["source"]["name"] == "theirs"  # who was first


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle(tmp_path: Path, how: signal.Signals) -> None:
    address = ray.get_runtime_context().gcs_address
    out = tmp_path / "out"
    code = f"from dogvae.data.prepare import prepare; prepare('drawn:100000', {str(out)!r}, size=32)"
    run = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "RAY_ADDRESS": address}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 1000 for path in tmp_path.glob(".out.partial-*/index.csv")):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(how)
    assert run.wait(60) != 0
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == (1 if how is signal.SIGKILL else 0)
    prepare(str(photos(tmp_path / "photos", 5)), out, size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_into_an_object_store(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same files as in a folder, by the same rules; nothing stays on this machine."""
    monkeypatch.setenv("DOGVAE_CACHE", str(tmp_path / "cache"))
    source, uri = photos(tmp_path / "photos", 10), s3.uri("dogs")
    (source / "x.jpg").write_bytes(b"no photo")
    here = prepare(str(source), f"file://{tmp_path}/here", size=32)
    assert here == tmp_path / "here"
    capsys.readouterr()
    assert prepare(str(source), uri, size=32) == uri
    told = capsys.readouterr().out
    assert f"{uri}: 9 train + 1 val images, 1 rejected, " in told
    assert f"{Storage(uri).uri_of('rejected.csv')} lists the 1 rejected" in told
    assert "cache" not in told
    assert {name: Storage(uri).read(name) for name in Storage(uri).names()} == contents(here)
    assert not list((tmp_path / "cache").rglob("*.npy"))
    before = len(s3.asked("PUT"))
    prepare(str(source), uri, size=32)
    assert "is already prepared: " in capsys.readouterr().out
    with pytest.raises(UsageError, match="--size 32, not 64: name another"):
        prepare(str(source), uri, size=64)
    assert len(s3.asked("PUT")) == before


def test_upload_that_was_interrupted_needs_no_photos_again(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOGVAE_CACHE", str(tmp_path / "cache"))
    source, uri = photos(tmp_path / "photos", 10), s3.uri("dogs")

    write = Storage.write

    def failing(storage: Storage, name: str, data: bytes) -> None:
        if name == "val-00000.npy":
            raise OSError("connection reset")
        write(storage, name, data)

    with monkeypatch.context() as broken:
        broken.setattr(Storage, "write", failing)
        with pytest.raises(UsageError, match=r"^OUT .* cannot be written: connection reset"):
            prepare(str(source), uri, size=32)
    assert "manifest.json" not in Storage(uri).names()
    monkeypatch.setattr(module, "decode_batch", None)
    prepare(str(source), uri, size=32)
    assert len(Dataset(uri).train) + len(Dataset(uri).val) == 10


def test_object_store_that_cannot_be_written_is_told_before_any_photo_is_read(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DecodedRows", lambda *args: pytest.fail("photos are read"))
    options = f"?endpoint_override=127.0.0.1:{s3.port}&scheme=http&region=us-east-1"
    with pytest.raises(UsageError, match=r"^OUT s3://no-such-bucket/dogs.* cannot be written: "):
        prepare("drawn:10", f"s3://no-such-bucket/dogs{options}")
