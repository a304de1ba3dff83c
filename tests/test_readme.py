"""The documentation: its commands run as written, its lists of files and names are true, its sentences are short."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dogvae.data.drawn import draw
from tests.support.runs import make_dataset

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = [line for line in COMMANDS if not line.startswith("ray ")]  # tests/hosts runs those
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SET_UP = r"python -m venv \.venv && \. \.venv/bin/activate && pip install -e \S+ && "
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LONGEST = 30  # words of a sentence


# --- the commands


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, with a folder of photos."""
    folder = tmp_path_factory.mktemp("readme") / "dogvae"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "photos").mkdir()
    for i in range(120):
        name = {0: "a", 1: "b"}.get(i, str(i))
        draw(i, 0, 96).save(folder / f"photos/{name}.jpg")
    return folder


def shell(command: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell whose `python` is this one, with the packages that the set-up would install."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "RAY_ADDRESS": "local", "PYTHONPATH": str(folder), **env}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, timeout=400, capture_output=True, text=True)


def succeed(command: str, folder: Path) -> str:
    """Run a command that must succeed; what it printed."""
    done = shell(command, folder)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def one(part: str) -> str:
    """The one command of the README that has this part."""
    (command,) = [command for command in COMMANDS if part in command]
    return command


@pytest.mark.alone
@pytest.mark.slow
def test_first_command_trains_on_drawn_dogs_in_minutes(checkout: Path) -> None:
    command = re.sub(f"^{SET_UP}", "", COMMANDS[0])
    assert command == "python train_distributed.py"
    started = time.monotonic()
    told = succeed(command, checkout)
    assert time.monotonic() - started < 300  # "about two minutes on two cores", if nothing else runs on them
    (export,) = (checkout / "runs").glob("portraits-*/export")
    assert (export / "preview.png").exists()
    assert str(export) in told
    assert "epoch 14/14" in told


@pytest.mark.slow
def test_commands_for_your_own_dogs_make_their_pictures(checkout: Path) -> None:
    commands = COMMANDS[2:7]
    assert [command.split()[1] for command in commands] == [
        "prepare", "train_distributed.py", "sample", "reconstruct", "interpolate"
    ]  # fmt: skip
    commands[1] += " --epochs 4"  # to save time
    for command in [*commands, one("dogvae litter"), one("dogvae directions"), one("dogvae neighbours")]:
        succeed(command, checkout)
    pictures = "samples", "reconstructions-1", "reconstructions-2", "litter", "directions", "neighbours"
    for picture in (*(f"{name}.png" for name in pictures), "walk.gif"):  # over 96 photos fill several sheets
        assert (checkout / picture).stat().st_size > 1000
    assert "negative ELBO" in succeed(one("dogvae evaluate"), checkout)
    (python,) = [block for block in PYTHON if "dogvae.load(" in block]
    check = "assert (len(dogs), len(litter)) == (64, 12) and walk.shape == (32, 64, 64, 3); print(latents.shape)"
    (checkout / "played.py").write_text(python + check)
    done = shell("python played.py", checkout)
    assert done.stdout == "(1, 8, 8, 8)\n", done.stderr
    assert "has finished its" in succeed(one("--resume"), checkout)


@pytest.mark.slow
def test_commands_of_the_search_export_the_best_trial(checkout: Path) -> None:
    """With fewer trials and epochs, and a narrower network, to save time."""
    if not (checkout / "dataset").exists():
        succeed("dogvae prepare photos dataset --val-fraction 0.1", checkout)
    told = succeed(f"{one('-m tune search')} --trials 2 --epochs 2 --set width=8", checkout)
    told += succeed(one("-m tune report"), checkout)
    assert "best of 2 is trial" in told
    assert (checkout / "runs/best/report.png").stat().st_size > 10_000
    assert (checkout / "runs/best/export/config.json").exists()
    assert '"epochs": 200' in succeed(f"{one('--from-search')} --dry-run", checkout)


@pytest.mark.slow
def test_python_of_the_readme_trains_and_searches(checkout: Path) -> None:
    """With fewer trials and epochs, and narrower networks, to save time."""
    (python,) = [block for block in PYTHON if "dogvae.train(" in block]
    little_work = {
        "epochs=40": "epochs=2, width=8", "trials=12": "trials=2, epochs=2", '"small"}': '"small", "width": 8}',
        "epochs=200": "epochs=3",
    }  # fmt: skip
    for much, little in little_work.items():
        assert much in python
        python = python.replace(much, little)
    check = "print(len(run.metrics), len(figure.axes), dogs.shape, len(search.trials), len(longer.metrics))"
    (checkout / "trained.py").write_text(python + check)
    done = shell("python trained.py", checkout)
    assert done.stdout.splitlines()[-1:] == ["2 4 (64, 64, 64, 3) 2 3"], done.stderr


def test_missing_gpus_are_an_error_that_counts_what_there_is(tmp_path: Path) -> None:
    shutil.copy(ROOT / "train_distributed.py", tmp_path)
    make_dataset(tmp_path / "dataset")
    done = shell(one("--gpus 4"), tmp_path, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "--gpus 4: the cluster has" in done.stderr


def test_tensorboard_serves_the_runs(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    script = Path(sys.executable).with_name("tensorboard")
    process = subprocess.Popen(
        [script, *one("tensorboard").split()[1:], "--port", "0"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr
        assert any("http://localhost" in line for line in process.stderr)
    finally:
        process.terminate()
        process.wait(20)


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    playing = "sample|reconstruct|interpolate|litter|playground|directions|neighbours|evaluate"
    known = rf"pip install|dogvae (cloud setup|prepare|{playing})|train_distributed\.py|tensorboard|-m tune"
    assert all(re.search(known, command) for command in COMMANDS)
    assert COMMANDS[1].endswith("pip install -e '.[dev]' && pytest")
    assert len(COMMANDS) == 20


# --- the lists


def test_list_of_files_in_the_readme_is_complete() -> None:
    (block,) = re.findall(r"```\n(train_distributed\.py.*?)```", README, re.S)
    folder, files, folders = "", set(), set()
    for line in block.splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
            folders.add(name)
        else:
            files.add(folder + name if line.startswith(" ") else name)
    modules = {path.relative_to(ROOT).as_posix() for wing in ("dogvae", "tune") for path in (ROOT / wing).rglob("*.py")}
    assert {file for file in files if "/" in file} == {name for name in modules if not name.endswith("__init__.py")}
    assert [name for name in files | folders if not (ROOT / name).exists()] == []


def test_walks_of_the_architecture_name_what_exists() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    stops = re.findall(r"^\| `([\w/]+\.py)` \| (`[^|]+) \|", text, re.M)
    assert len(stops) == 24
    for file, names in stops:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(class|def) {name}\b", source, re.M), f"{file}: {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        to = (ROOT / page).parent / file if file else ROOT / page
        assert to.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", to.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


# --- the sentences


def sentences(text: str) -> Iterator[str]:
    """The sentences of a page, without code blocks, tables, headings and pictures. Inline code counts as one word."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = [line for line in text.splitlines() if not line.startswith(("    ", "|", "#", "!"))]
    for block in re.split(r"\n\s*\n|\n\s*(?:-|\d+\.) ", "\n".join(lines)):
        plain = re.sub(r"^\s*(?:-|\d+\.) ", "", re.sub(r"`[^`]*`", "code", block))
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", plain)
        yield from (" ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?])[)*]*\s+", plain))


def test_sentences_are_split_as_a_reader_would() -> None:
    page = "# A title\n\nOne `a b c` two.  Three\nfour ([five](six.md)).\n\n- seven\n- eight?\n\n```\ncode\n```\n"
    assert [s for s in sentences(page) if s] == ["One code two.", "Three four (five).", "seven", "eight?"]


@pytest.mark.parametrize("page", PAGES)
def test_no_sentence_is_longer_than_thirty_words(page: str) -> None:
    long = [sentence for sentence in sentences((ROOT / page).read_text()) if len(sentence.split()) > LONGEST]
    assert long == []
