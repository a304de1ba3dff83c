"""The flags of commands: every setting has one, mistakes are one line, and the exit status of a command."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dogvae.cluster.network import TO_WORKERS, worker_environment
from dogvae.cluster.submit import SENT
from dogvae.commands import entry, flags
from dogvae.commands.remote import run_there
from dogvae.config import Config, Safety
from dogvae.errors import RunFailed, UsageError
from tests.support.command import ROOT
from tests.support.exports import Exported
from tests.support.settings import SETTINGS, flag_of

WITHOUT_FLAG = {"architecture", "data", "fingerprint", "loss_scale"}


def parsed(*argv: str) -> argparse.Namespace:
    return flags.training_parser("train_distributed.py", "description").parse_args(argv)


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - WITHOUT_FLAG))
def test_every_setting_has_a_flag_whose_help_says_the_default(name: str) -> None:
    kind, good, _ = SETTINGS[name]
    typed = ["--no-" + name] if kind is bool else [flag_of(name), str(good[-1])]
    assert flags.given(parsed(*typed)) == {name: good[-1]}
    text = " ".join(flags.training_parser("train_distributed.py", None).format_help().split("options:")[1].split())
    entry = text[text.index(f" {flag_of(name)}{',' if kind is bool else ''} ") :]
    default = re.search(r"\(default: (.*?)\)", entry)
    assert default
    assert default[1] == str(Config().flat()[name])


def test_settings_of_preset_and_data_have_no_flag() -> None:
    assert set(flags.INTERNAL) == WITHOUT_FLAG
    for name in WITHOUT_FLAG - {"data"}:
        with pytest.raises(UsageError, match=f"{flag_of(name)} "):
            parsed(flag_of(name), "x")


def test_given_has_the_typed_settings_only() -> None:
    assert flags.given(parsed()) == {}
    assert flags.given(parsed("--epochs", "50", "--no-augment")) == {"epochs": 50, "augment": False}  # 50: the default
    assert flags.given(parsed("--size", "32")) == flags.given(parsed("--image-size", "32")) == {"image_size": 32}
    assert flags.given(parsed("--lr-warmup", "0", "--augment")) == {"lr_warmup": 0.0, "augment": True}
    assert flags.given(parsed("--data", "dogs", "--name", "n", "--gpus", "2", "--crop", "box")) == {}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--epochs many", "--epochs"),
        ("--epochs 1.5", "--epochs"),
        ("--epochs", "--epochs"),
        ("--epoch 3", "--epoch"),  # no abbreviations: a later flag could make them ambiguous
        ("--colour red", "--colour"),
        ("--compile on", "--compile"),
        ("dogs", "dogs"),
        ("--gpus 0", "--gpus"),
        ("--cpus -1", "--cpus"),
    ],
)
def test_error_of_the_parser_is_one_line(argv: str, words: str) -> None:
    with pytest.raises(UsageError, match=rf"^.*{words}.* \(see train_distributed\.py --help\)\Z"):
        parsed(*argv.split())


def test_mistyped_flag_is_answered_with_the_closest_one() -> None:
    with pytest.raises(UsageError, match=r"--epoch=3; did you mean --epochs\? \(see train_distributed\.py --help\)"):
        parsed("--epoch=3")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--gpus 1 --cpus 2", "--gpus and --cpus"),
        ("--max-failures -2", "--max-failures"),
        ("--max-skipped 0", "--max-skipped"),
        ("--val-fraction 0", "--val-fraction"),
        ("--val-fraction 0.95", "--val-fraction"),
        ("--val-fraction nan", "--val-fraction"),
        ("--crop square", "--crop"),
        ("--from-search a --crop box", "--from-search"),
    ],
)
def test_flags_out_of_range_or_contradicting_are_refused(argv: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        flags.check_training(parsed(*argv.split()))


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("5m", 300), ("2h", 7200), ("1.5m", 90), ("0.5s", 0.5)])
def test_times_have_a_unit(text: str, seconds: float) -> None:
    assert flags.safety(parsed("--checkpoint-every", text)) == Safety(checkpoint_s=seconds)
    assert flags.safety(parsed("--storage-patience", text)) == Safety(patience_s=seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "0s", "0.0h", "-5m", "5x", "5d", "m5", "1e3s", "5 m", "infs", "nans", "1.5", ".5s"]
)
def test_other_times_are_refused(text: str) -> None:
    for flag in ("--checkpoint-every", "--storage-patience"):
        with pytest.raises(UsageError, match=f"{flag}.*30s, 5m or 2h"):
            flags.safety(parsed(f"{flag}={text}"))


def test_checkpoint_every_may_be_a_number_of_steps() -> None:
    assert flags.safety(parsed()) == Safety() == Safety(60.0, 0, 20, 600.0)
    typed = parsed("--checkpoint-every", "7", "--max-skipped", "3", "--storage-patience", "90s")
    assert flags.safety(typed) == Safety(60.0, 7, 3, 90.0)
    with pytest.raises(UsageError, match="--checkpoint-every"):
        flags.safety(parsed("--checkpoint-every", "0"))


def test_workers_are_a_number_or_a_range() -> None:
    good = {"1": 1, "12": 12, "2:4": (2, 4), "3:3": (3, 3)}
    assert {text: parsed("--cpus", text).cpus for text in good} == good
    for text in ("0", "0:2", "4:2", "2:", ":4", "2:x", "1.5", "2:3:4", "many"):
        with pytest.raises(UsageError, match=r"--gpus.*2:4"):
            parsed("--gpus", text)


def test_nccl_flags_and_settings_of_ray_train_reach_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(TO_WORKERS)]:
        monkeypatch.delenv(name)
    typed = {"NCCL_SOCKET_IFNAME": "eth7", "NCCL_DEBUG": "INFO"}
    assert flags.network(parsed("--nccl-socket-ifname", "eth7", "--nccl-debug", "info")) == typed
    for name, value in {**typed, "RAY_TRAIN_METRICS_ENABLED": "0", "OTHER": "x"}.items():
        monkeypatch.setenv(name, value)
    assert worker_environment() == {**typed, "RAY_TRAIN_METRICS_ENABLED": "0"}


# --- commands that run elsewhere


@pytest.mark.parametrize(("flag", "value"), [("--runs", "results"), ("--data", "photos")])
def test_command_sent_to_a_cluster_refuses_paths_of_this_machine(
    flag: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / value).mkdir()
    monkeypatch.chdir(tmp_path)
    typed = ["--address", "http://127.0.0.1:1", flag, value]
    with pytest.raises(UsageError, match=f"{flag}: {value} is a path on this machine"):
        run_there(parsed(*typed), ["train"], typed)


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_command_without_the_url_of_a_dashboard_runs_here(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run_there(argparse.Namespace(address=address, runs="runs", data="photos"), ["train"], []) is None


def test_printed_commands_have_the_flags_that_they_need_where_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOGVAE_RUNS", raising=False)
    assert (flags.sent(), flags.runs_flag("runs"), flags.runs_flag("my runs")) == ("", "", " --runs 'my runs'")
    monkeypatch.setenv("DOGVAE_RUNS", "/mnt/share/runs")
    assert flags.runs_flag("/mnt/share/runs") == ""
    monkeypatch.setenv(SENT, "http://localhost:8265")
    assert flags.sent() == " --address http://localhost:8265"
    assert flags.runs_flag("/mnt/share/runs") == " --runs /mnt/share/runs"


# --- the exit status


@pytest.mark.parametrize(
    ("raised", "status", "err"),
    [
        (UsageError("--data: nothing is there"), 2, "error: --data: nothing is there\n"),
        (RunFailed("the disk is full"), 1, "error: the disk is full\n"),
        (UsageError("a\nb\r\u2028c"), 2, "error: a b c\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            PermissionError(13, "Permission denied", "/runs"),
            2,
            "error: /runs: Permission denied; choose another folder\n",
        ),
        (BrokenPipeError(), 141, ""),  # as of `| head`
    ],
)
def test_errors_become_an_exit_status_and_one_line(
    raised: BaseException, status: int, err: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(argv: Any) -> None:
        raise raised

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # `run` sets it to None for a broken pipe
    assert entry.run(main, []) == status
    assert capsys.readouterr().err == err


def test_status_of_a_command_is_returned_and_other_errors_are_raised() -> None:
    seen: list[Any] = []
    assert entry.run(seen.append, ["a", "b"]) == 0
    assert seen == [["a", "b"]]
    assert entry.run(lambda argv: 3, []) == 3

    def mistaken(argv: Any) -> None:
        raise UsageError("--data: nothing is there")

    with pytest.raises(UsageError):  # the traceback that was asked for
        entry.run(mistaken, ["--verbose"])
    with pytest.raises(ZeroDivisionError):
        entry.run(lambda argv: 1 // 0, [])


# --- arguments that are no names


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        (["--runs", ""], "--runs"),
        (["--runs="], "--runs"),
        (["photos", ""], "the argument after photos"),
        (["", "out"], "the argument after the command"),
    ],
)
def test_empty_argument_is_refused(typed: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(lambda argv: pytest.fail("it was run"), typed) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}: the text is empty")


def test_names_that_are_not_utf8_work_or_are_refused_with_one_line(tmp_path: Path, exported: Exported) -> None:
    """As SOURCE, OUT, EXPORT, a photo, the output and the working folder."""
    odd = os.fsencode(tmp_path) + b"/\xff"
    photo = odd + b"/\xfe.png"
    os.mkdir(odd)
    Image.new("RGB", (40, 40)).save(os.fsdecode(photo))
    shutil.copytree(exported.folder, os.fsdecode(odd + b"/export"))

    def run(cwd: bytes, *argv: bytes) -> tuple[int, str]:
        args = [sys.executable, "-m", "dogvae", *argv]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
        done = subprocess.run(args, cwd=cwd, env=env, capture_output=True, timeout=100)
        return done.returncode, done.stderr.decode()

    here, export = os.fsencode(tmp_path), os.fsencode(exported.folder)
    assert run(here, b"reconstruct", export, photo, b"-o", b"r.png") == (0, "")
    for cwd, argv in (
        (here, (b"prepare", odd, b"out")),
        (here, (b"prepare", b"drawn:5", odd + b"/out")),
        (here, (b"sample", odd + b"/export")),
        (odd, (b"sample", export, b"-o", b"s.png")),
        (odd, (b"train", b"--data", b"drawn:5")),
    ):
        status, told = run(cwd, *argv)
        assert (status, told.count("\n")) == (2, 1), told
        assert "is not a name in UTF-8" in told
