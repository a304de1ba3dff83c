"""Commands that take photos: folders, patterns and broken files among them, sheets of several pages, formats, `~`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dogvae.commands import play
from dogvae.inference.load import load
from dogvae.inference.model import DogVAE
from tests.support.cli import dogvae, refused
from tests.support.exports import Exported
from tests.support.runs import SIZE, drawn_dogs

Capture = pytest.CaptureFixture[str]
DOGS = [dog.transpose(1, 2, 0) for dog in drawn_dogs(26)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder and the home: photos/00.png to photos/more/25.png, a broken one and a text among them."""
    (tmp_path / "photos/more").mkdir(parents=True)
    for i, dog in enumerate(DOGS):
        Image.fromarray(dog).save(tmp_path / f"photos/{'more/' if i > 19 else ''}{i:02d}.png")
    (tmp_path / "photos/07b.png").write_bytes(b"broken")
    (tmp_path / "photos/README.txt").write_text("dogs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def model(exported: Exported) -> DogVAE:
    return load(exported.folder, "cpu")


def opened(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    y, x = 2 + row * (SIZE + 2), 2 + column * (SIZE + 2)
    return sheet[y : y + SIZE, x : x + SIZE]


@pytest.mark.parametrize(
    ("named", "numbers", "broken"),
    [
        (["photos"], range(26), 1),
        (["~/photos"], range(26), 1),
        (["photos/more"], range(20, 26), 0),
        (["photos/more/*", "photos/0?.png"], [*range(20, 26), *range(10)], 0),
        (["photos/**/2*.png"], range(20, 26), 0),
        ([f"photos/{i:02d}.png" for i in range(12)] + ["photos/07b.png"], range(12), 1),  # as a shell expands photos/*
    ],
)
def test_reconstruct_takes_folders_and_patterns_and_counts_broken_photos(
    named: list[str], numbers: list[int], broken: int, place: Path, exported: Exported, model: DogVAE, capsys: Capture
) -> None:
    status, out, err = dogvae(capsys, "reconstruct", exported.folder, *named, "-o", "x.npy")
    assert (status, out) == (0, "x.npy\n")
    assert err.count("\n") == broken
    if broken:
        assert f"warning: 1 of {len(numbers) + 1} photos skipped; the first: " in err
        assert "07b.png" in err
    got, dogs = np.load("x.npy"), np.stack([DOGS[i] for i in sorted(numbers)])
    assert len(got) == 2 * len(dogs)
    order = np.argsort(list(numbers))
    assert np.array_equal(got[: len(dogs)][order], dogs)
    assert np.array_equal(got[len(dogs) :][order], model.reconstruct(dogs))


def test_more_photos_than_a_page_holds_fill_several_sheets(
    place: Path, exported: Exported, model: DogVAE, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of photos a page: 24 photos on the first one, 2 on the second one."""
    monkeypatch.setattr(play, "PAGE", 24)
    status, out, _ = dogvae(capsys, "reconstruct", exported.folder, "photos", "-o", "x.png")
    assert (status, out) == (0, "x-1.png to x-2.png\n")
    assert sorted(path.name for path in place.glob("x*")) == ["x-1.png", "x-2.png"]
    first, second = opened("x-1.png"), opened("x-2.png")
    assert first.shape == (2 + 4 * (SIZE + 2), 2 + 12 * (SIZE + 2), 3)
    assert second.shape == (2 + 2 * (SIZE + 2), 2 + 2 * (SIZE + 2), 3)
    for sheet, row, column, i in ((first, 0, 0, 0), (first, 2, 11, 23), (second, 0, 1, 25)):
        assert np.array_equal(tile(sheet, row, column), DOGS[i])
        assert np.array_equal(tile(sheet, row + 1, column), model.reconstruct(DOGS[i])[0])


def test_pictures_are_written_as_jpeg(place: Path, exported: Exported, model: DogVAE, capsys: Capture) -> None:
    assert dogvae(capsys, "sample", exported.folder, "-n", 1, "-o", "~/x.JPG")[0] == 0
    with Image.open(place / "x.JPG") as image:
        assert image.format == "JPEG"
    error = tile(opened(place / "x.JPG"), 0, 0).astype(int) - model.sample(1)[0]
    assert np.abs(error).mean() < 4


def test_other_commands_take_folders_too(place: Path, exported: Exported, model: DogVAE, capsys: Capture) -> None:
    assert dogvae(capsys, "walk", exported.folder, "photos/more", "--steps", 2, "-o", "x.npy")[0] == 0
    assert np.array_equal(np.load("x.npy"), model.reconstruct(np.stack(DOGS[20:])))
    assert dogvae(capsys, "walk", exported.folder, *(3 * ["photos/03.png"]), "--steps", 2, "-o", "z.npy")[0] == 0
    assert len(np.load("z.npy")) == 3
    flags = ("--with", "photos/more", "--without", "photos/0*", "-n", 1, "-o", "y.npy")
    status, _, err = dogvae(capsys, "directions", exported.folder, *flags)
    assert status == 0
    assert "1 of 11 photos skipped" in err
    difference = model.direction(np.stack(DOGS[20:]), np.stack(DOGS[:10]))
    assert np.array_equal(np.load("y.npy")[[8]], model.decode((model.mean + difference)[None]))
    status, out, _ = dogvae(capsys, "neighbours", exported.folder, exported.dataset, "~/photos/more", "-k", 1)
    assert status == 0
    assert [line.split("/")[-1][:6] for line in out.splitlines()[:-1]] == [f"{i}.png" for i in range(20, 26)]


def test_folders_without_photos_and_photos_that_are_needed_are_refused(
    place: Path, exported: Exported, capsys: Capture
) -> None:
    shutil.rmtree("photos/more")
    (place / "photos/more").mkdir()
    assert "photos/more: there are no photos" in refused(capsys, "reconstruct", exported.folder, "photos/more")
    assert "photos/*.gif: there are no photos" in refused(capsys, "walk", exported.folder, "photos/*.gif")
    assert "07b.png" in refused(capsys, "reconstruct", exported.folder, "photos/07b.png")
    assert "07b.png" in refused(capsys, "walk", exported.folder, "photos/01.png", "photos/07b.png", "photos/02.png")
    assert "07b.png" in refused(capsys, "interpolate", exported.folder, "photos/01.png", "photos/07b.png")
