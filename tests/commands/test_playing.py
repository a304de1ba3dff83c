"""The commands for an exported model: the pictures in the files that they write, and the mistakes that they refuse."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dogvae.data.dataset import Dataset
from dogvae.inference.load import load
from dogvae.inference.model import DogVAE
from tests.support.animations import frames_of
from tests.support.cli import dogvae, refused
from tests.support.exports import Exported
from tests.support.runs import SIZE

GAP = 2


@dataclass(frozen=True)
class Place:
    """The shared export and its model, and three of its training images, also as PNG files `a`, `b` and `c`."""

    dataset: Path
    export: Path
    model: DogVAE
    photos: dict[str, str]
    arrays: np.ndarray


@pytest.fixture(scope="module")
def place(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("playing")
    arrays = Dataset(exported.dataset).train.gather(np.array([3, 40, 77])).numpy().transpose(0, 2, 3, 1)
    photos = {}
    for name, array in zip("abc", arrays, strict=True):
        photos[name] = str(folder / f"{name}.png")
        Image.fromarray(array).save(photos[name])
    return Place(exported.dataset, exported.folder, load(exported.folder, "cpu"), photos, arrays)


Run = Callable[..., list[str]]


@pytest.fixture
def run(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `dogvae COMMAND EXPORT ...` in an empty folder, where it must succeed; returns the printed lines."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *args: object) -> list[str]:
        code, out, err = dogvae(capsys, command, place.export, *args)
        assert (code, err) == (0, "")
        return out.splitlines()

    return run


def opened(name: str) -> np.ndarray:
    with Image.open(name) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def tiles(sheet: np.ndarray, columns: int, n: int) -> np.ndarray:
    """The first n pictures (n, h, h, 3) of a grid, whose other pixels must all be white."""
    rows = -(-n // columns)
    assert sheet.shape == (rows * (SIZE + GAP) + GAP, columns * (SIZE + GAP) + GAP, 3)
    rest, cut = sheet.copy(), []
    for i in range(n):
        top, left = GAP + i // columns * (SIZE + GAP), GAP + i % columns * (SIZE + GAP)
        cut.append(sheet[top : top + SIZE, left : left + SIZE].copy())
        rest[top : top + SIZE, left : left + SIZE] = 255
    assert (rest == 255).all()
    return np.stack(cut)


# --- what is written


def test_sample_writes_a_grid(run: Run, place: Place) -> None:
    assert run("sample", "-n", 11, "--seed", 3) == ["samples.png"]
    assert np.array_equal(tiles(opened("samples.png"), 8, 11), place.model.sample(11, seed=3))
    run("sample", "-n", 3, "-o", "few.PNG")
    assert np.array_equal(tiles(opened("few.PNG"), 3, 3), place.model.sample(3))


def test_sample_writes_several_batches_to_one_array(run: Run, place: Place) -> None:
    assert run("sample", "-n", 600, "-o", "x.NPY") == ["x.NPY"]
    array = np.load("x.NPY")
    assert array.dtype == np.uint8
    assert np.array_equal(array, place.model.sample(600))
    assert [path.name for path in Path.cwd().iterdir()] == ["x.NPY"]


def test_sample_uses_all_its_flags(run: Run, place: Place) -> None:
    run("sample", "-n", 3, "--seed", 9, "--temperature", 0.5, "--prior", "normal", "-o", "x.npy", "--device", "cpu")
    got = np.load("x.npy")
    assert np.array_equal(got, place.model.sample(3, 9, 0.5, "normal"))
    for other in (place.model.sample(3, 9, 0.5), place.model.sample(3, 9, prior="normal")):
        assert not np.array_equal(got, other)


def test_reconstruct_puts_photos_above_reconstructions(run: Run, place: Place) -> None:
    assert run("reconstruct", *place.photos.values()) == ["reconstruction.png"]
    got = tiles(opened("reconstruction.png"), 3, 6)
    assert np.array_equal(got[:3], place.arrays)
    assert np.array_equal(got[3:], place.model.reconstruct(place.arrays))
    assert run("reconstruct", place.photos["a"], "-o", "x.npy") == ["x.npy"]
    assert np.array_equal(np.load("x.npy"), got[[0, 3]])


def test_litter_puts_the_parents_above_the_children(run: Run, place: Place) -> None:
    a, b = place.photos["a"], place.photos["b"]
    assert run("litter", a, b) == ["litter.png"]
    got = tiles(opened("litter.png"), 4, 16)
    assert np.array_equal(got[:2], place.arrays[:2])
    assert np.array_equal(got[2:4], place.model.reconstruct(place.arrays[:2]))
    assert np.array_equal(got[4:], place.model.litter(a, b))
    flags = ("-n", 5, "--seed", 3, "--temperature", 0.2)
    assert run("litter", a, b, *flags, "-o", "x.npy", "--device", "cpu") == ["x.npy"]
    assert np.array_equal(np.load("x.npy"), place.model.litter(a, b, 5, 3, 0.2))
    run("litter", a, b, *flags, "-o", "x.gif")
    assert len(frames_of("x.gif")[0]) == 2 * 5 - 2


def test_interpolate_writes_a_gif_of_32_steps_and_back(run: Run, place: Place) -> None:
    a, b = place.photos["a"], place.photos["b"]
    assert run("interpolate", a, b) == ["walk.gif"]
    frames, _ = frames_of("walk.gif")
    assert frames.shape == (62, 4 * SIZE, 4 * SIZE, 3)
    walk = place.model.interpolate(a, b)
    for frame, i in ((0, 0), (10, 10), (31, 31), (52, 10)):
        enlarged = np.asarray(Image.fromarray(walk[i]).resize((4 * SIZE, 4 * SIZE)))
        assert np.abs(frames[frame].astype(int) - enlarged).mean() < 12  # of 256, for the palette


@pytest.mark.parametrize("method", ["linear", "spherical"])
def test_walk_passes_through_each_photo(method: str, run: Run, place: Place) -> None:
    run("walk", *place.photos.values(), "--steps", 4, "--method", method, "-o", "x.npy")
    got = np.load("x.npy")
    assert np.array_equal(got[[0, 3, 6]], place.model.reconstruct(place.arrays))
    assert np.array_equal(got, place.model.walk(list(place.arrays), 4, method))
    run("walk", *place.photos.values(), "--steps", 4, "--method", method, "-o", "x.png")
    assert np.array_equal(tiles(opened("x.png"), 7, 7), got)


def decoded(place: Place, latents: np.ndarray) -> np.ndarray:
    """As int, for differences: a sum in another order may change a pixel by one grey level."""
    return place.model.decode(latents).astype(int)


def test_directions_extend_three_deviations_to_each_side(run: Run, place: Place) -> None:
    assert run("directions", "-n", 3) == ["directions.png"]
    got = tiles(opened("directions.png"), 9, 27).reshape(3, 9, SIZE, SIZE, 3)
    model = place.model
    for row in range(3):
        assert np.array_equal(got[row, 4], model.decode(model.mean[None])[0])
        for column, far in enumerate((-3, -2.25, -1.5, -0.75, 0, 0.75, 1.5, 2.25, 3)):
            latent = model.mean + np.float32(far * model.scales[row]) * model.directions[row]
            assert np.abs(got[row, column] - decoded(place, latent[None])[0]).max() <= 1
    assert np.abs(got[0, 0].astype(int) - got[0, 8]).mean() > 2
    run("directions", "-o", "x.npy")
    assert np.load("x.npy").shape == (8 * 9, SIZE, SIZE, 3)


def test_directions_start_from_a_photo(run: Run, place: Place) -> None:
    run("directions", "-n", 2, "--photo", place.photos["b"], "-o", "x.npy")
    got = np.load("x.npy").reshape(2, 9, SIZE, SIZE, 3)
    for row in got:
        assert np.array_equal(row[4], place.model.reconstruct(place.arrays[1])[0])
    assert len(np.unique(got.reshape(18, -1), axis=0)) == 17


def test_directions_end_at_the_photos_of_with(run: Run, place: Place) -> None:
    """The right end adds mean(with) - mean(without) once, and the left end subtracts it."""
    a, b, c = place.photos.values()
    za, zb, zc = place.model.encode(place.arrays)
    mean = (za + zb) / 2
    run("directions", "--with", a, b, "--without", c, "--photo", c, "-o", "x.npy")
    got = np.load("x.npy")
    assert got.shape == (9, SIZE, SIZE, 3)
    assert np.abs(got[[0, 4, 8]] - decoded(place, np.stack([zc - (mean - zc), zc, mean]))).max() <= 1
    run("directions", "--with", a, "--without", b, "-o", "x.npy")
    ends = decoded(place, np.stack([place.model.mean + s * (za - zb) for s in (-1, 0, 1)]))
    assert np.abs(np.load("x.npy")[[0, 4, 8]] - ends).max() <= 1


def test_first_neighbour_of_a_training_image_is_itself(run: Run, place: Place) -> None:
    lines = run("neighbours", place.dataset, *place.photos.values(), "-k", 4)
    got = tiles(opened("neighbours.png"), 5, 15).reshape(3, 5, SIZE, SIZE, 3)
    assert np.array_equal(got[:, 0], place.arrays)
    assert np.array_equal(got[:, 1], place.arrays)
    _, distances, images = place.model.neighbours(place.arrays, place.dataset, k=4)
    assert np.array_equal(got[:, 1:], images)
    for line, photo, row in zip(lines, place.photos.values(), distances, strict=False):
        assert line == f"{photo}: distances 0.0, {row[1]:.1f}, {row[2]:.1f}, {row[3]:.1f}"
    assert lines[3:] == ["neighbours.png"]


def test_neighbours_of_samples(run: Run, place: Place) -> None:
    flags = ("--seed", 2, "--temperature", 0.8, "--prior", "normal")
    lines = run("neighbours", place.dataset, "-n", 3, *flags, "-o", "x.npy")
    assert [line.split(":")[0] for line in lines] == ["sample 0", "sample 1", "sample 2", "x.npy"]
    got = np.load("x.npy").reshape(3, 8, SIZE, SIZE, 3)
    samples = place.model.sample(3, 2, 0.8, "normal")
    assert np.array_equal(got[:, 0], samples)
    assert np.array_equal(got[:, 1:], place.model.neighbours(samples, place.dataset, k=7)[2])


# --- what is refused


REFUSALS: dict[str, tuple[str, str]] = {
    "suffix": ("sample E -o dogs.bmp", "-o: dogs.bmp must end in one of .png, .jpg, .jpeg, .gif, .webp, .mp4, .npy"),
    "missing folder": ("sample E -o nowhere/dogs.png", "-o: the folder nowhere does not exist"),
    "output is a folder": ("sample E -o folder.png", "-o: folder.png is a folder"),
    "npy in /proc": ("sample E -n 1 -o /proc/self/x.npy", "-o: /proc/self/x.npy cannot be written"),
    "long name": (f"sample E -n 1 -o {'x' * 300}.png", "cannot be written"),
    "no samples": ("sample E -n 0 -o dogs.npy", "-n: 0 is too small, it must be at least 1"),
    "seed": ("sample E --seed -1", "--seed: -1 is too small"),
    "temperature": ("sample E --temperature nan -o dogs.npy", "--temperature: nan must be"),
    "prior": ("sample E --prior banana", "--prior: 'banana' is none of flow, gaussian, normal"),
    "device": ("sample E --device banana", "--device: banana is not a device"),
    "missing export": ("sample nowhere", "nowhere is not an exported model"),
    "damaged export": ("sample broken", "broken/model.safetensors is damaged"),
    "no photos": ("reconstruct E", "the following arguments are required: photos"),
    "missing photo": ("reconstruct E A nowhere.jpg", "nowhere.jpg cannot be read: No such file"),
    "text for a photo": ("reconstruct E A text.jpg", "text.jpg cannot be used"),
    "folder for a photo": ("reconstruct E folder.png -o x.png", "folder.png: there are no photos"),
    "one parent": ("litter E A", "the following arguments are required: b"),
    "missing parent": ("litter E A nowhere.jpg -o x.png", "nowhere.jpg cannot be read: No such file"),
    "no children": ("litter E A B -n 0", "-n: 0 is too small, it must be at least 1"),
    "too many children": ("litter E A B -n 9997", "-o: 10,001 pictures are too many for .png"),
    "one photo": ("interpolate E A", "the following arguments are required: b"),
    "one step": ("interpolate E A B --steps 1", "--steps: 1 is too small, it must be at least 2"),
    "method": ("interpolate E A B --method curved", "--method: 'curved' is none of linear, spherical"),
    "walk of one": ("walk E A", "a walk needs at least two pictures"),
    "with alone": ("directions E --with A", "--with and --without"),
    "no directions": ("directions E -n 0", "-n: 0 is too small"),
    "without a text": ("directions E --with A --without text.jpg", "text.jpg cannot be used"),
    "no neighbours": ("neighbours E DATA -k 0", "-k: 0 is too small"),
    "neighbours of none": ("neighbours E DATA -n 0", "-n: 0 is too small"),
    "neighbours in another size": ("neighbours E LARGE", "has images of 64 pixels, this model needs 32"),
    "missing dataset": ("neighbours E nowhere", "prepared dataset"),
    "no command": ("", "the following arguments are required: COMMAND"),
    "unknown command": ("bark E", "invalid choice: 'bark'"),
    "mistyped command": ("reconstuct E A", "; did you mean reconstruct? (see dogvae --help)"),
    "mistyped flag": ("sample E --temprature 1", "--temprature 1; did you mean --temperature? (see dogvae --help)"),
    "mistyped prior": ("sample nowhere --prior gausian", "; did you mean gaussian?"),
    "flag before the model": ("sample nowhere -n 0", "-n: 0 is too small"),
    "unwritable dataset": ("prepare drawn:4 /sys/dogs", "/sys"),
    "unknown flag": ("sample E --colour brown", "unrecognized arguments: --colour brown"),
    "shortened flag": ("sample E --temp 1", "unrecognized arguments: --temp 1"),
    "too many samples": ("sample E -n 2000000000", "-o: 2,000,000,000 pictures are too many for .png"),
    "too many steps": ("interpolate E A B --steps 20000", "too many"),
    "too many neighbours": ("neighbours E DATA -n 20000 -k 1", "too many"),
}


@pytest.fixture
def stands_for(
    place: Place, write_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """A folder with unusable files, and what the capital words of `REFUSALS` stand for."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.jpg").write_text("The quick brown fox")
    shutil.copytree(place.export, tmp_path / "broken")
    with (tmp_path / "broken/model.safetensors").open("ab") as file:
        file.write(b"\0")
    black = np.zeros((2, 3, 64, 64), np.uint8)
    monkeypatch.chdir(tmp_path)
    words = {"E": place.export, "RUN": place.export.parent, "DATA": place.dataset, "A": place.photos["a"]}
    return {**words, "B": place.photos["b"], "LARGE": write_dataset([black], [black], "large")}


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", REFUSALS)
def test_mistake_is_refused_with_one_line_and_nothing_is_written(
    name: str, stands_for: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pictures that are not needed were decoded")

    if name.startswith("too many"):
        monkeypatch.setattr(DogVAE, "decode", decode)
    command, reason = REFUSALS[name]
    for file in ("dogs.npy", "samples.png"):  # an older result stays
        Path(file).write_text("my picture")
    before = contents()
    assert reason in refused(capsys, *[stands_for.get(word, word) for word in command.split()])
    assert contents() == before


def test_interrupted_array_is_not_kept(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look like a complete one."""
    monkeypatch.chdir(tmp_path)
    decode, calls = DogVAE.decode, 0

    def interrupted(self: DogVAE, latents: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(DogVAE, "decode", interrupted)
    assert dogvae(capsys, "sample", place.export, "-n", 300, "-o", "x.npy") == (130, "", "interrupted\n")
    assert calls == 2
    assert not list(tmp_path.iterdir())


# --- in a process


def test_installed_command_samples_and_refuses(place: Place, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("dogvae")), "sample", str(place.export), "-n", "2"]
    done = subprocess.run([*command, "-o", "x.npy"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x.npy\n", "")
    assert np.array_equal(np.load(tmp_path / "x.npy"), place.model.sample(2))
    done = subprocess.run([*command, "--seed", "x"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: argument --seed: invalid int value: 'x' (see dogvae sample --help)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
