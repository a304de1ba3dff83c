"""The commands that play with an exported model: what is in the files that they write, and what they refuse."""

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
import torch
from PIL import Image

from dogvae import pictures
from dogvae.commands import cli, flags
from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from dogvae.inference.model import DogVAE, load
from tests.support.exports import export_of_drawn_dogs
from tests.support.runs import SIZE

GAP = 2


@dataclass(frozen=True)
class Place:
    """A folder with an export, its dataset, and photos: dogs `a`, `b`, `c` of the training images as PNG files."""

    folder: Path
    dataset: Path
    export: Path
    model: DogVAE
    photos: dict[str, str]
    arrays: np.ndarray


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("playing")
    dataset, export = export_of_drawn_dogs(folder)
    arrays = Dataset(dataset).train.gather(np.array([3, 40, 77])).numpy().transpose(0, 2, 3, 1)
    photos = {}
    for name, array in zip("abc", arrays, strict=True):
        photos[name] = str(folder / f"{name}.png")
        Image.fromarray(array).save(photos[name])
    return Place(folder, dataset, export, load(export, "cpu"), photos, arrays)


Run = Callable[..., list[str]]


@pytest.fixture
def run(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `dogvae COMMAND EXPORT ...` in an empty folder, where it must succeed; returns the lines it prints."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *args: object) -> list[str]:
        code = flags.run(cli._main, [command, str(place.export), *map(str, args)])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out.splitlines()

    return run


def opened(name: str) -> np.ndarray:
    with Image.open(name) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def tiles(sheet: np.ndarray, columns: int, n: int) -> np.ndarray:
    """The first n pictures of a grid, cut out by hand; all that is around them must be white."""
    rows = -(-n // columns)
    assert sheet.shape == (rows * (SIZE + GAP) + GAP, columns * (SIZE + GAP) + GAP, 3)
    rest, cut = sheet.copy(), []
    for i in range(n):
        top, left = GAP + i // columns * (SIZE + GAP), GAP + i % columns * (SIZE + GAP)
        cut.append(sheet[top : top + SIZE, left : left + SIZE].copy())
        rest[top : top + SIZE, left : left + SIZE] = 255
    assert (rest == 255).all()
    return np.stack(cut)


# --- files


def test_grid_by_hand() -> None:
    images = np.arange(3 * 1 * 2 * 3, dtype=np.uint8).reshape(3, 1, 2, 3)
    sheet = pictures.grid(images, columns=2, gap=1)
    assert sheet.shape == (5, 7, 3)
    expected = np.full((5, 7, 3), 255, np.uint8)
    expected[1, 1:3], expected[1, 4:6], expected[3, 1:3] = images[0, 0], images[1, 0], images[2, 0]
    assert np.array_equal(sheet, expected)
    # Fewer pictures than columns leave no empty columns.
    assert pictures.grid(images, columns=8, gap=1).shape == (3, 10, 3)
    assert pictures.grid(images, columns=0, gap=1).shape == (7, 4, 3)


def test_values_to_bytes() -> None:
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 0.25, 1.0, 1.5])
    assert pictures.to_uint8(values).tolist() == [0, 0, 0, 1, 64, 255, 255]


def greys(n: int) -> np.ndarray:
    """Flat pictures (n, 16, 16, 3), each brighter than the one before."""
    return np.repeat(np.linspace(20, 230, n).astype(np.uint8), 16 * 16 * 3).reshape(n, 16, 16, 3)


def frames_of(path: Path | str) -> tuple[np.ndarray, float]:
    """All frames of an animation (n, h, w, 3), and the seconds that each is shown."""
    if Path(path).suffix.lower() == ".mp4":
        import av

        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
            assert stream.average_rate
            return np.stack(frames), float(1 / stream.average_rate)
    with Image.open(path) as image:
        frames, durations = [], set()
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            image.load()
            frames.append(np.asarray(image.convert("RGB")))
            durations.add(image.info.get("duration"))
        assert image.info.get("loop") == 0  # without end
        assert len(durations) == 1
        return np.stack(frames), durations.pop() / 1000


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4", ".GIF", ".Mp4"])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_animations_go_there_and_back(suffix: str, n: int, tmp_path: Path) -> None:
    """Four times as large, 20 pictures a second; both ends are shown once, so that the loop has no jump."""
    path = tmp_path / f"walk{suffix}"
    pictures.check_output(path, 1)
    pictures.save(path, greys(n), columns=8)
    frames, seconds = frames_of(path)
    assert frames.shape == (2 * n - 2, 64, 64, 3)
    assert seconds == pytest.approx(1 / 20)
    there = [int(p[0, 0, 0]) for p in greys(n)]
    expected = there + there[1:-1][::-1]
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx(expected, abs=4)  # lossy
    assert frames.std(axis=(1, 2)).max() < 3


def test_an_animation_shows_what_is_where(tmp_path: Path) -> None:
    """And in its colours."""
    image = np.zeros((2, 16, 16, 3), np.uint8)
    image[0, :8, :8], image[1, 8:, 8:] = (250, 10, 10), (10, 10, 250)
    for suffix in (".gif", ".webp", ".mp4"):
        pictures.save(tmp_path / f"x{suffix}", image, columns=1)
        frames, _ = frames_of(tmp_path / f"x{suffix}")
        inner = (slice(6, 26), slice(38, 58))
        assert frames[0, inner[0], inner[0]].reshape(-1, 3).mean(axis=0) == pytest.approx([250, 10, 10], abs=16)
        assert frames[1, inner[1], inner[1]].reshape(-1, 3).mean(axis=0) == pytest.approx([10, 10, 250], abs=16)
        for frame, place in ((0, inner[1]), (1, inner[0])):
            assert frames[frame, place, place].max() < 16


def test_mp4_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is computed."""
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"pip install 'dogvae\[video\]'; or take \.gif"):
        pictures.check_output(tmp_path / "walk.mp4", 1)
    pictures.check_output(tmp_path / "walk.gif", 1)


# --- commands


def test_sample_draws_a_grid(run: Run, place: Place) -> None:
    assert run("sample", "-n", 11, "--seed", 3) == ["samples.png"]
    assert np.array_equal(tiles(opened("samples.png"), 8, 11), place.model.sample(11, seed=3))
    run("sample", "-n", 3, "-o", "few.PNG")
    assert np.array_equal(tiles(opened("few.PNG"), 3, 3), place.model.sample(3))


def test_sample_writes_arrays_batch_after_batch(run: Run, place: Place) -> None:
    assert run("sample", "-n", 600, "-o", "x.npy") == ["x.npy"]
    array = np.load("x.npy")
    assert array.dtype == np.uint8
    assert np.array_equal(array, place.model.sample(600))
    assert [path.name for path in Path.cwd().iterdir()] == ["x.npy"]


def test_sample_passes_on_what_was_said(run: Run, place: Place) -> None:
    run("sample", "-n", 3, "--seed", 9, "--temperature", 0.5, "--prior", "normal", "-o", "x.npy", "--device", "cpu")
    got = np.load("x.npy")
    assert np.array_equal(got, place.model.sample(3, 9, 0.5, "normal"))
    for other in (place.model.sample(3, 9, 0.5), place.model.sample(3, 9, prior="normal")):
        assert not np.array_equal(got, other)
    run("sample", "-n", 3, "--prior", "gaussian", "-o", "x.npy")
    assert np.array_equal(np.load("x.npy"), place.model.sample(3, prior="gaussian"))


def test_reconstruct_puts_photos_above_reconstructions(run: Run, place: Place) -> None:
    assert run("reconstruct", *place.photos.values()) == ["reconstruction.png"]
    got = tiles(opened("reconstruction.png"), 3, 6)
    assert np.array_equal(got[:3], place.arrays)
    assert np.array_equal(got[3:], place.model.reconstruct(place.arrays))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_interpolate_writes_an_animation(suffix: str, run: Run, place: Place) -> None:
    a, b = place.photos["a"], place.photos["b"]
    run("interpolate", a, b, "--steps", 6, "-o", f"x{suffix}")
    frames, _ = frames_of(f"x{suffix}")
    assert frames.shape == (10, 4 * SIZE, 4 * SIZE, 3)
    walk = place.model.interpolate(a, b, 6)
    there_and_back = [*range(6), 4, 3, 2, 1]
    for frame, i in zip(frames, there_and_back, strict=True):
        enlarged = np.asarray(Image.fromarray(walk[i]).resize((4 * SIZE, 4 * SIZE)))
        assert np.abs(frame.astype(int) - enlarged).mean() < 12  # of 256, for the palette and the compression


def test_interpolate_by_default(run: Run, place: Place) -> None:
    assert run("interpolate", place.photos["a"], place.photos["b"]) == ["walk.gif"]
    assert frames_of("walk.gif")[0].shape == (62, 4 * SIZE, 4 * SIZE, 3)


@pytest.mark.parametrize("method", ["linear", "spherical"])
def test_walk_meets_each_photo(method: str, run: Run, place: Place) -> None:
    run("walk", *place.photos.values(), "--steps", 4, "--method", method, "-o", "x.npy")
    got = np.load("x.npy")
    assert np.array_equal(got[[0, 3, 6]], place.model.reconstruct(place.arrays))
    assert np.array_equal(got, place.model.walk(list(place.arrays), 4, method))
    run("walk", *place.photos.values(), "--steps", 4, "--method", method, "-o", "x.png")
    assert np.array_equal(tiles(opened("x.png"), 7, 7), got)


def decoded(place: Place, latents: np.ndarray) -> np.ndarray:
    """In int, for differences: a latent that was added up in another order may be a grey level off."""
    return place.model.decode(latents).astype(int)


def test_directions_go_three_deviations_each_way(run: Run, place: Place) -> None:
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


def test_directions_of_a_photo(run: Run, place: Place) -> None:
    run("directions", "-n", 2, "--photo", place.photos["b"], "-o", "x.npy")
    got = np.load("x.npy").reshape(2, 9, SIZE, SIZE, 3)
    for row in got:
        assert np.array_equal(row[4], place.model.reconstruct(place.arrays[1])[0])
    assert len(np.unique(got.reshape(18, -1), axis=0)) == 17


def test_directions_towards_photos(run: Run, place: Place) -> None:
    """At the right end once the whole difference is added, at the left it is taken away."""
    a, b, c = place.photos.values()
    run("directions", "--with", a, b, "--without", c, "--photo", c, "-o", "x.npy")
    got = np.load("x.npy")
    za, zb, zc = place.model.encode(place.arrays)
    assert got.shape == (9, SIZE, SIZE, 3)
    ends = decoded(place, np.stack([zc - ((za + zb) / 2 - zc), zc, (za + zb) / 2]))
    assert np.abs(got[[0, 4, 8]] - ends).max() <= 1
    run("directions", "--with", a, "--without", b, "-o", "x.npy")
    ends = decoded(place, np.stack([place.model.mean + s * (za - zb) for s in (-1, 0, 1)]))
    assert np.abs(np.load("x.npy")[[0, 4, 8]] - ends).max() <= 1


def test_neighbours_of_photos(run: Run, place: Place) -> None:
    """Each photo is itself a training image: its first neighbour, at distance 0."""
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
    drawn = ("--seed", 2, "--temperature", 0.8, "--prior", "normal")
    lines = run("neighbours", place.dataset, "-n", 3, *drawn, "-o", "x.npy")
    assert [line.split(":")[0] for line in lines] == ["sample 0", "sample 1", "sample 2", "x.npy"]
    got = np.load("x.npy").reshape(3, 8, SIZE, SIZE, 3)
    samples = place.model.sample(3, 2, 0.8, "normal")
    assert np.array_equal(got[:, 0], samples)
    assert np.array_equal(got[:, 1:], place.model.neighbours(samples, place.dataset, k=7)[2])


@pytest.mark.parametrize("command", ["sample", "reconstruct"])
def test_arrays_are_written_where_it_was_said(command: str, run: Run, place: Place) -> None:
    args = [place.photos["a"]] if command == "reconstruct" else ["-n", 2]
    assert run(command, *args, "-o", "x.npy") == ["x.npy"]
    assert np.load("x.npy").shape == (2, SIZE, SIZE, 3)


def test_arrays_with_a_suffix_in_capitals(run: Run, place: Place) -> None:
    run("reconstruct", place.photos["a"], "-o", "x.NPY")
    assert [path.name for path in Path.cwd().iterdir()] == ["x.NPY"]


# --- what is refused


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line on stderr that a command ends with; it exits 2 and says nothing else."""
    code = flags.run(cli._main, list(map(str, args)))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


REFUSALS: dict[str, tuple[str, str]] = {
    "suffix": ("sample E -o dogs.jpg", "-o: dogs.jpg must end in one of .png, .gif, .webp, .mp4, .npy"),
    "no suffix": ("sample E -o dogs", "-o: dogs must end in one of"),
    "no folder": ("sample E -o nowhere/dogs.png", "-o: there is no folder nowhere"),
    "a folder": ("sample E -o folder.png", "-o: folder.png is a folder"),
    "no samples": ("sample E -n 0", "-n: 0 is too small, it must be at least 1"),
    "no array": ("sample E -n 0 -o dogs.npy", "-n: 0 is too small"),
    "fewer than none": ("sample E -n -5", "-n: -5 is too small"),
    "not a number": ("sample E -n many", "argument -n: invalid int value: 'many' (see dogvae sample --help)"),
    "seed": ("sample E --seed -1", "--seed: -1 is too small"),
    "temperature": ("sample E --temperature -0.5", "--temperature: -0.5 must be a number from 0 up"),
    "temperature nan": ("sample E --temperature nan -o dogs.npy", "--temperature: nan must be"),
    "temperature inf": ("sample E --temperature inf", "--temperature: inf must be"),
    "prior": ("sample E --prior banana", "--prior: 'banana' is none of mixture, gaussian, normal"),
    "device": ("sample E --device banana", "--device: banana is no device; cpu or cuda"),
    "no export": ("sample nowhere", "nowhere is no exported model"),
    "a run": ("sample RUN", "is no exported model"),
    "damaged": ("sample broken", "broken/model.safetensors is damaged"),
    "no photos": ("reconstruct E", "the following arguments are required: photos"),
    "missing photo": ("reconstruct E A nowhere.jpg", "nowhere.jpg cannot be read: No such file"),
    "text": ("reconstruct E A text.jpg", "text.jpg cannot be used: not an image of a known format"),
    "a folder as photo": ("reconstruct E folder.png -o x.png", "folder.png cannot be read: Is a directory"),
    "one photo": ("interpolate E A", "the following arguments are required: b"),
    "three photos": ("interpolate E A B A", "unrecognized arguments"),
    "one step": ("interpolate E A B --steps 1", "--steps: 1 is too small, it must be at least 2"),
    "method": ("interpolate E A B --method curved", "--method: 'curved' is none of linear, spherical"),
    "walk of one": ("walk E A", "a walk needs at least two pictures"),
    "walk in text": ("walk E A text.jpg", "text.jpg cannot be used"),
    "with": ("directions E --with A", "--with and --without belong together"),
    "without": ("directions E --without A", "--with and --without belong together"),
    "no directions": ("directions E -n 0", "-n: 0 is too small"),
    "photo of directions": ("directions E --photo text.jpg", "text.jpg cannot be used"),
    "with text": ("directions E --with A --without text.jpg", "text.jpg cannot be used"),
    "no neighbours": ("neighbours E DATA -k 0", "-k: 0 is too small"),
    "neighbours of none": ("neighbours E DATA -n 0", "-n: 0 is too small"),
    "no dataset": ("neighbours E nowhere", "nowhere is not a prepared dataset"),
    "export as dataset": ("neighbours E E", "is not a prepared dataset"),
    "no command": ("", "the following arguments are required: COMMAND"),
    "unknown command": ("bark E", "invalid choice: 'bark'"),
    "unknown flag": ("sample E --colour brown", "unrecognized arguments: --colour brown"),
    "shortened flag": ("sample E --temp 1", "unrecognized arguments: --temp 1"),
    "many samples": ("sample E -n 2000000000", "-o: 2,000,000,000 pictures are too many for .png"),
}


@pytest.fixture
def litter(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A folder with things that are of no use, and what the words in capitals stand for."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.jpg").write_text("The quick brown fox")
    shutil.copytree(place.export, tmp_path / "broken")
    with (tmp_path / "broken/model.safetensors").open("ab") as file:
        file.write(b"\0")
    monkeypatch.chdir(tmp_path)
    stands = {"E": place.export, "RUN": place.export.parent, "DATA": place.dataset}
    return {**stands, "A": place.photos["a"], "B": place.photos["b"]}


def listing() -> list[Path]:
    return sorted(Path().rglob("*"))


@pytest.mark.parametrize("name", REFUSALS)
def test_mistakes_are_told_in_a_line(name: str, litter: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    """With exit status 2, and nothing is written."""
    command, reason = REFUSALS[name]
    before = listing()
    assert reason in refused(capsys, *[litter.get(word, word) for word in command.split()])
    assert listing() == before


def test_a_gpu_where_there_is_none(
    litter: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device: cuda is not to be had here" in refused(capsys, "sample", litter["E"], "--device", "cuda")


def test_what_was_there_stays_when_a_command_is_refused(
    litter: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.png", "x.npy"):
        Path(name).write_text("my picture")
        for wrong in (["--temperature", "nan"], ["-n", "0"], ["--prior", "banana"]):
            refused(capsys, "sample", litter["E"], "-o", name, *wrong)
        assert Path(name).read_text() == "my picture"


def test_neighbours_in_a_dataset_of_another_size(
    litter: dict[str, object], write_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    black = np.zeros((2, 3, 64, 64), np.uint8)
    other = write_dataset([black], [black], "other")
    before = listing()
    line = refused(capsys, "neighbours", litter["E"], other)
    assert "has images of 64 pixels, this model is for 32" in line
    assert listing() == before


def test_too_many_for_a_grid(tmp_path: Path) -> None:
    black = np.zeros((20_000, 1, 1, 3), np.uint8)
    for suffix in (".png", ".gif", ".webp", ".mp4"):
        with pytest.raises(
            UsageError, match=f"-o: 20,000 pictures are too many for {suffix}, at most 10,000; take .npy"
        ):
            pictures.save(tmp_path / f"x{suffix}", black, columns=8)
    assert not list(tmp_path.iterdir())
    pictures.save(tmp_path / "x.npy", black, columns=8)
    assert np.load(tmp_path / "x.npy").shape == black.shape


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("pictures are decoded, to be thrown away")


@pytest.mark.parametrize(
    "command", ["sample E -n 20000 -o x.png", "interpolate E A B --steps 20000", "neighbours E DATA -n 20000 -k 1"]
)
def test_too_many_are_refused_before_they_are_drawn(
    command: str, litter: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DogVAE, "decode", never)
    before = listing()
    assert "too many" in refused(capsys, *[litter.get(word, word) for word in command.split()])
    assert listing() == before


@pytest.mark.parametrize("output", ["/proc/self/x.png", "/proc/self/x.npy", "x" * 300 + ".png"])
def test_a_place_that_cannot_be_written_to(
    output: str, litter: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "-o: " in refused(capsys, "sample", litter["E"], "-n", 1, "-o", output)


def test_an_interrupted_array_is_not_left_behind(
    litter: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would look like a whole one."""
    decode, calls = DogVAE.decode, 0

    def interrupted(self: DogVAE, latents: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(DogVAE, "decode", interrupted)
    assert flags.run(cli._main, ["sample", str(litter["E"]), "-n", "300", "-o", "x.npy"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert calls == 2
    assert not Path("x.npy").exists()


# --- as a command


def test_the_command_itself(place: Place, tmp_path: Path) -> None:
    """Once in a process of its own for each end: done, and refused."""
    command = [str(Path(sys.executable).with_name("dogvae")), "sample", str(place.export), "-n", "2"]
    done = subprocess.run([*command, "-o", "x.npy"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x.npy\n", "")
    assert np.array_equal(np.load(tmp_path / "x.npy"), place.model.sample(2))
    done = subprocess.run([*command, "--seed", "x"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: argument --seed: invalid int value: 'x' (see dogvae sample --help)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
