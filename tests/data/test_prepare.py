"""From photos to a dataset, on a real Ray: files, crashed tasks, races, repeated and interrupted runs."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
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
from PIL import Image

from dogvae.data import prepare as module
from dogvae.data import writer
from dogvae.data.atomic import atomic_folder
from dogvae.data.dataset import Dataset
from dogvae.data.drawn import draw
from dogvae.data.photos import Drawing, Photo, Rejected, Source
from dogvae.data.prepare import cached, prepare
from dogvae.errors import UsageError
from dogvae.storage import Storage
from tests.conftest import WriteDataset
from tests.support.command import wait_until
from tests.support.datasets import contents, grey_photos, noise
from tests.support.s3 import Server

SETTINGS = {"size": 32, "crop": "center", "val_fraction": 0.3}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test
    yield
    ray.shutdown()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Items(Source):
    kind = name = "items"

    def __init__(self, items: list[Photo | Rejected]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Photo | Rejected]:
        return iter(self._items)


def write(out: Path, photos: list[Photo], workers: int | None = None) -> dict[str, Any]:
    """Prepare the photos; returns the manifest."""
    module._prepare(Items([*photos]), "0", out, SETTINGS, workers)
    return dict(json.loads((out / "manifest.json").read_text()))


# --- what is written


def test_files_of_a_dataset_are_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 30 * 3 * 32 * 32 + 1)  # 30 images per shard
    source = grey_photos(tmp_path / "photos", 100)
    (source / "bad.jpg").write_bytes(b"junk")
    (source / "x,\n.txt").write_bytes(b"x")
    out = prepare(str(source), tmp_path / "out", size=32, val_fraction=0.2)
    assert names(tmp_path) == ["out", "photos"]
    stored = {
        split: np.concatenate([np.load(path) for path in sorted(Path(out).glob(f"{split}-*.npy"))])
        for split in ("train", "val")
    }
    assert all(image.dtype == np.uint8 and image.flags.c_contiguous for image in stored.values())

    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("0*.png")}
    rows = table(tmp_path / "out/index.csv")
    assert [row["source_path"] for row in rows] == sorted(hashes)
    expected = {name for name, digest in hashes.items() if int(digest[:16], 16) / 2**64 < 0.2}
    assert {row["source_path"] for row in rows if row["split"] == "val"} == expected
    for row in rows:
        split, number = row["image_id"].split("/")
        assert split == row["split"]
        assert np.unique(stored[split][int(number)]).tolist() == [int(row["source_path"][:3])]

    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["settings"] == {"size": 32, "crop": "center", "val_fraction": 0.2}
    assert (manifest["source"]["kind"], manifest["source"]["name"]) == ("folder", str(source))
    assert manifest["rejected"] == 2
    for split, described in manifest["splits"].items():
        assert described["count"] == len(stored[split]) == sum(shard["count"] for shard in described["shards"])
        assert [shard["count"] for shard in described["shards"][:-1]] == [30] * (len(described["shards"]) - 1)
        for shard in described["shards"]:
            data = (tmp_path / "out" / shard["file"]).read_bytes()
            assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(manifest["splits"]["train"]["shards"]) > 1
    assert {row["path"]: row["reason"] for row in table(tmp_path / "out/rejected.csv")} == {
        "bad.jpg": "not an image of a known format (JPEG, PNG, WEBP, GIF, BMP, AVIF, TIFF)",
        "x,\n.txt": "suffix '.txt' is not an image's",
    }

    opened = Dataset(out)
    assert (opened.size, opened.fingerprint) == (32, manifest["fingerprint"])
    for split_name, split in (("train", opened.train), ("val", opened.val)):
        assert np.array_equal(split.gather(np.arange(len(split))).numpy(), stored[split_name])
    assert opened.verify() == []


def test_boxes_of_a_photo_are_in_the_same_split(tmp_path: Path) -> None:
    xml = "<bndbox><xmin>{0}</xmin><ymin>0</ymin><xmax>{1}</xmax><ymax>64</ymax></bndbox>"
    source = grey_photos(tmp_path / "dogs", 20, side=96)
    (source / "Annotation").mkdir()
    for i in range(19):
        boxes = "".join(xml.format(*sides) for sides in ((0, 40), (32, 128), (150, 190)))
        (source / f"Annotation/{i:03d}").write_text(f"<a>{boxes}</a>")
    prepare(str(source), tmp_path / "out", size=32, crop="box", val_fraction=0.3)
    rows = table(tmp_path / "out/index.csv")
    assert [row["box"] for row in rows] == ["0 0 40 64", "32 0 128 64"] * 19
    assert all(a["split"] == b["split"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    reasons = [row["reason"] for row in table(tmp_path / "out/rejected.csv")]
    assert reasons == ["box (150, 0, 190, 64) is empty or outside the image (96 x 96 pixels)"] * 19 + [
        "no bounding box"
    ]


def test_last_line_counts_near_duplicates_and_damaged_profiles(tmp_path: Path, capsys: Any) -> None:
    (source := tmp_path / "photos").mkdir()
    for i in range(9):
        draw(i, 0, 96).save(source / f"{i}.png", icc_profile=b"junk" if i == 3 else None)
        if i in (0, 4):
            draw(i, 0, 160).save(source / f"{i}-copy.jpg", quality=60)
    for _ in range(2):
        prepare(str(source), tmp_path / "out", size=32, val_fraction=0.3)
        assert (
            ", 2 near-duplicates kept on one side, 1 damaged colour profiles ignored, 0 rej" in capsys.readouterr().out
        )
    found = [(row["source_path"], row["duplicate_of"]) for row in table(tmp_path / "out/index.csv")]
    assert [pair for pair in found if pair[1]] == [("0.png", "0-copy.jpg"), ("4.png", "4-copy.jpg")]


def test_file_name_that_is_not_utf8_is_written_escaped(tmp_path: Path) -> None:
    source = grey_photos(tmp_path / "photos", 4)
    os.rename(source / "000.png", os.fsencode(source) + b"/\xff.png")
    prepare(str(source), tmp_path / "out", size=32)
    assert "\\udcff.png" in {row["source_path"] for row in table(tmp_path / "out/index.csv")}


# --- tasks


def test_dataset_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = grey_photos(tmp_path / "photos", 90)
    (source / "050.jpg").write_bytes(b"junk")
    one, two = (Path(prepare(str(source), tmp_path / str(n), size=64, workers=n)) for n in (1, 2))
    assert contents(one) == contents(two)


def test_workers_limit_the_tasks_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(module, "BATCH_PHOTOS", 1)
    assert (most_at_once(1), most_at_once(2)) == (1, 2)


def test_only_the_photo_that_crashes_its_task_is_rejected(tmp_path: Path) -> None:
    class Deadly(Drawing):
        def draw(self, size: int) -> Image.Image:
            assert "torch" not in sys.modules, "the tasks import torch"
            if self.index == 7:
                os.kill(os.getpid(), signal.SIGSEGV)
            return Image.new("RGB", (size, size), (self.index, 0, 0))

    manifest = write(tmp_path / "out", [Photo(f"{i}", Deadly(i, 0)) for i in range(40)])
    assert sum(split["count"] for split in manifest["splits"].values()) == 39
    assert table(tmp_path / "out/rejected.csv") == [{"path": "7", "reason": "its decoder crashed"}]


# --- repeated, simultaneous and interrupted runs


def test_repeated_run_does_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    source, out = grey_photos(tmp_path / "photos", 10), tmp_path / "out"
    prepare(str(source), out, size=32)
    before = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    code = f"import sys; from dogvae.data.prepare import prepare; prepare({str(source)!r}, {str(out)!r}, size=32);"
    code += "sys.exit('ray' in sys.modules)"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (again.returncode, again.stderr) == (0, "")
    assert "is already prepared: " in again.stdout
    with pytest.raises(UsageError, match=r"--size 32, not 64; --val-fraction 0\.05, not 0\.5: name another"):
        prepare(str(source), out, size=64, val_fraction=0.5)
    with pytest.raises(UsageError, match=r"another SOURCE, .*photos"):
        prepare(str(grey_photos(tmp_path / "others", 3)), out, size=32)
    grey_photos(source, 1, start=50)
    with pytest.raises(UsageError, match="a SOURCE that has changed since"):
        prepare(str(source), out, size=32)
    assert {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]} == before


def test_cached_prepares_once_for_each_source_and_settings(tmp_path: Path) -> None:
    source = grey_photos(tmp_path / "photos", 10)
    first = cached(str(source), tmp_path / "prepared", size=32)
    before = first.stat().st_mtime_ns
    assert cached(str(source), tmp_path / "prepared", size=32, workers=1) == first
    assert first.stat().st_mtime_ns == before
    assert cached(str(source), tmp_path / "prepared", size=64) != first
    grey_photos(source, 1, start=50)
    assert cached(str(source), tmp_path / "prepared", size=32) != first
    assert len(names(tmp_path / "prepared")) == 3


def test_two_runs_into_the_same_folder_both_succeed(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(prepare, "drawn:40:1", tmp_path / "out", size=32) for _ in range(2)]
        assert [run.result() for run in runs] == [tmp_path / "out"] * 2
    assert names(tmp_path) == ["out"]
    assert {row["source_path"] for row in table(tmp_path / "out/index.csv")} == {f"drawn:{i}:1" for i in range(40)}


def test_folder_that_was_deleted_as_a_leftover_before_its_lock_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_now, deleted = os.open, []

    def open_late(path: Any, *how: Any) -> int:
        if not deleted:  # as another process does that found no lock
            path.rmdir()
            deleted.append(path)
        return open_now(path, *how)

    monkeypatch.setattr(os, "open", open_late)
    with atomic_folder(tmp_path / "out") as folder:
        assert folder not in deleted
        (folder / "photo").touch()
    assert names(tmp_path / "out") == ["photo"]


def test_leftovers_are_deleted_unless_a_run_uses_them(tmp_path: Path, write_dataset: WriteDataset) -> None:
    """And of two runs into the same folder, the first one to finish wins."""
    place = tmp_path / "place"
    first, second = (write_dataset([noise(2, i)], [noise(1, i)], f"dataset-{i}") for i in range(2))
    with atomic_folder(place / "out") as slow:
        for name in (".out.partial-dead", ".other.partial-dead"):
            (place / name).mkdir()
        with atomic_folder(place / "out") as fast:
            assert names(place) == sorted([".other.partial-dead", slow.name, fast.name])
            shutil.copytree(first, fast, dirs_exist_ok=True)
        shutil.copytree(second, slow, dirs_exist_ok=True)
    assert names(place) == [".other.partial-dead", "out"]
    assert contents(place / "out") == contents(first)


def test_run_that_was_overtaken_by_one_with_other_settings_is_refused(tmp_path: Path) -> None:
    class Overtaken(Items):
        def __iter__(self) -> Iterator[Photo | Rejected]:
            write(tmp_path / "out", photos)
            return iter(photos)

    photos = [Photo(str(i), Drawing(i, 0)) for i in range(4)]
    with pytest.raises(UsageError, match="--size 32, not 64"):
        module._prepare(Overtaken([]), "0", tmp_path / "out", SETTINGS | {"size": 64}, None)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["size"] == 32
    assert names(tmp_path) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_run_leaves_no_dataset_and_the_next_one_cleans_up(tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out"
    code = f"from dogvae.data.prepare import prepare; prepare('drawn:100000', {str(out)!r}, size=32)"
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    run = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE)
    wait_until(lambda: any(p.stat().st_size > 1000 for p in tmp_path.glob(".out.partial-*/index.csv")), 60)
    run.send_signal(how)
    assert run.wait(60) != 0
    assert not out.exists()
    assert len(names(tmp_path)) == (1 if how is signal.SIGKILL else 0)
    prepare(str(grey_photos(tmp_path / "photos", 5)), out, size=32)
    assert names(tmp_path) == ["out", "photos"]


# --- mistakes


def test_python_that_workers_cannot_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks wait for CPUs that are never free, as they wait where Ray cannot start its processes."""
    held = ray.remote(num_cpus=2)(lambda: time.sleep(60)).remote()
    time.sleep(1)
    monkeypatch.setattr(module, "START_S", 0.5)
    monkeypatch.setattr(sys, "executable", "/root/nobody/python")
    with pytest.raises(UsageError, match=r"no process within 0\.5 s: this user may not execute /root/nobody/python"):
        prepare(str(grey_photos(tmp_path / "photos", 2)), tmp_path / "out")
    monkeypatch.undo()
    ray.cancel(held, force=True)
    code = "import sys; sys.executable = '/root/nobody/python'; from dogvae.cluster.connect import connect; connect()"
    env = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert "UsageError: Ray cannot start processes: this user may not execute /root/nobody/python" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 65}, r"--size 65: must be one of 32, 64, 96, 128"),
        ({"val_fraction": 0.0}, "--val-fraction"),
        ({"val_fraction": 0.95}, "--val-fraction"),
        ({"val_fraction": float("nan")}, "--val-fraction"),
        ({"workers": 0}, "--workers"),
        ({"crop": "middle"}, "--crop middle: must be one of center, box"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    for function in (prepare, cached):
        with pytest.raises(UsageError, match=message):
            function(str(grey_photos(tmp_path / "photos", 2)), tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_become_a_dataset_is_refused(tmp_path: Path) -> None:
    source = grey_photos(tmp_path / "photos", 3)
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
    with pytest.raises(UsageError, match="is inside SOURCE"):
        cached(str(source), source / "cache")
    assert contents(foreign) == {"thesis.txt": b"dear"}
    assert len(names(source)) == 3


def test_out_may_be_an_empty_folder_or_a_link_to_one(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "out").symlink_to(real)
    assert prepare(str(grey_photos(tmp_path / "photos", 3)), tmp_path / "out", size=32) == real
    assert (real / "manifest.json").exists()


def test_source_without_two_usable_photos_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    (source / "a.jpg").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"no usable photo: all 1 files were rejected, for example a\.jpg: not an im"):
        prepare(str(source), tmp_path / "out")
    for name in ("b.png", "c.png"):
        Image.new("RGB", (20, 20)).save(source / name)
    with pytest.raises(UsageError, match=r"all 2 usable images .* at least two different photos"):
        prepare(str(source), tmp_path / "out")
    assert names(tmp_path) == ["photos"]


# --- object stores


def test_object_store_gets_the_same_files_as_a_folder(
    s3: Server, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, uri = grey_photos(tmp_path / "photos", 10), s3.uri("dogs")
    (source / "x.jpg").write_bytes(b"no photo")
    assert prepare(str(source), f"file://{tmp_path}/here", size=32) == tmp_path / "here"
    capsys.readouterr()
    assert prepare(str(source), uri, size=32) == uri
    printed = capsys.readouterr().out
    assert f"{uri}: 9 train + 1 val images, 1 rejected, " in printed
    assert f"{Storage(uri).uri_of('rejected.csv')} lists the 1 rejected" in printed
    assert "cache" not in printed
    assert {name: Storage(uri).read(name) for name in Storage(uri).names()} == contents(tmp_path / "here")
    assert not list(cache.parent.rglob("*.npy"))
    before = len(s3.asked("PUT"))
    prepare(str(source), uri, size=32)
    assert "is already prepared: " in capsys.readouterr().out
    with pytest.raises(UsageError, match="--size 32, not 64: name another"):
        prepare(str(source), uri, size=64)
    assert len(s3.asked("PUT")) == before


def test_interrupted_upload_is_continued_without_decoding(
    s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, uri, write_file = grey_photos(tmp_path / "photos", 10), s3.uri("dogs"), Storage.write

    def failing(storage: Storage, name: str, data: bytes) -> None:
        if name == "val-00000.npy":
            raise OSError("connection reset")
        write_file(storage, name, data)

    with monkeypatch.context() as broken:
        broken.setattr(Storage, "write", failing)
        with pytest.raises(UsageError, match=r"^OUT .* cannot be written: connection reset"):
            prepare(str(source), uri, size=32)
    assert "manifest.json" not in Storage(uri).names()
    monkeypatch.setattr(module, "decode_batch", None)
    prepare(str(source), uri, size=32)
    assert len(Dataset(uri).train) + len(Dataset(uri).val) == 10


def test_unwritable_object_store_is_refused_before_photos_are_read(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DecodedRows", lambda *args: pytest.fail("photos are read"))
    options = f"?endpoint_override=127.0.0.1:{s3.port}&scheme=http&region=us-east-1"
    with pytest.raises(UsageError, match=r"^OUT s3://no-such-bucket/dogs.* cannot be written: "):
        prepare("drawn:10", f"s3://no-such-bucket/dogs{options}")
