"""`dogvae runs`: what it tells of runs, searches and other folders."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dogvae.storage import Storage
from dogvae.training.run_folder import save_config
from tests.support.cli import dogvae, refused
from tests.support.searches import EPOCHS, PLAN, Spec, record, setting, write_search


def write_run(runs: Path, name: str, losses: list[float], age_s: float) -> None:
    save_config(Storage(runs / name), PLAN.config)
    lines = [json.dumps(record(epoch, loss)) + "\n" for epoch, loss in enumerate(losses)]
    if lines:
        (runs / name / "metrics.jsonl").write_text("".join(lines))
    written = time.time() - age_s
    for file in (runs / name).iterdir():
        os.utime(file, (written, written))


def test_runs_are_listed_by_age_with_their_best_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, "old", [7000.0 + (epoch == 1) for epoch in range(EPOCHS)], 3 * 86_400)
    write_run(tmp_path, "begun", [7300.4, 7200.4], 3700)
    write_run(tmp_path, "empty", [], 60)
    write_search(tmp_path, [Spec(setting(), [1.0]), Spec(setting(), state="running")], name="search")
    (tmp_path / "other").mkdir()
    (tmp_path / ".datasets").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    status, out, err = dogvae(capsys, "runs", "--runs", tmp_path)
    assert (status, err) == (0, "")
    explained = record(1, 7200.4)["val_explained"]
    assert [line.split() for line in out.splitlines()] == [
        ["name", "state", "epochs", "loss", "explained", "age"],
        ["broken", "damaged", "-", "-", "-", "-"],
        [
            "old",
            "done",
            *f"{EPOCHS} of {EPOCHS}".split(),
            "7,000",
            f"{record(0, 7000.0)['val_explained']:.3f}",
            "3",
            "days",
        ],
        [
            "begun",
            "unfinished",
            *f"2 of {EPOCHS}".split(),
            "7,200",
            f"{explained:.3f}",
            out.split("begun")[1].split()[6],
        ],
        ["empty", "unfinished", *f"0 of {EPOCHS}".split(), "-", "-", out.split("empty")[1].split()[6]],
        ["search", "search", *["1", "of", "2", "trials"], "-", "-", out.split()[-1]],
    ]
    assert out.split("begun")[1].split()[6].startswith("1:01:4")


def test_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"there are no runs in {tmp_path}" in refused(capsys, "runs", "--runs", tmp_path)
