"""Commands on paper GPUs, from what the user types to the export: training and searching through Ray, sampling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dogvae.storage import Storage
from dogvae.training import metrics
from tests.support.command import TRAIN, Command

if TYPE_CHECKING:
    from tests.support.exports import Exported

Run = Callable[..., dict[str, Any]]
SMALL = {"width": 4, "latent_dim": 4, "image_size": 32, "batch_size": 40}


@pytest.mark.slow
def test_training_on_two_gpus_ends_in_an_export(paper_environment: dict[str, str], tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    command = Command(
        tmp_path, TRAIN, "--gpus", "2", "--data", "drawn:200", *flags, "--epochs", "2", "--name", "run",
        env={**paper_environment, "PAPER_GPUS": "2"},
    )  # fmt: skip
    try:
        assert command.wait(120) == 0, command.text()
    finally:
        command.stop()
    assert "2 epochs on 2 GPU workers" in command.text()
    run = tmp_path / "runs" / "run"
    assert [record["world_size"] for record in metrics.read(Storage(run))] == [2, 2]
    assert (run / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_search_on_halves_of_a_gpu_trains_all_trials(paper_environment: dict[str, str], tmp_path: Path) -> None:
    settings = [f"--set={name}={value}" for name, value in SMALL.items() if name != "image_size"]
    command = Command(
        tmp_path, "-m", "tune", "search", "--gpus-per-trial", "0.5", "--data", "drawn:200", "--trials", "2",
        "--search", "lr=choice(0.001,0.002)", *settings, "--epochs", "2",
        "--name", "search", env=paper_environment,
    )  # fmt: skip
    try:
        assert command.wait(120) == 0, command.text()
    finally:
        command.stop()
    trials = json.loads((tmp_path / "runs" / "search" / "trials.json").read_text())
    assert [trial["state"] for trial in trials] == ["done", "done"]


def test_exported_model_works_on_the_gpu(on_paper_gpu: Run, exported: Exported) -> None:
    assert on_paper_gpu("models:shapes", export=str(exported.folder), dataset=str(exported.dataset)) == {
        "device": "cuda",
        "sample": [70, 32, 32, 3],
        "reconstruct": [3, 32, 32, 3],
        "walk": [7, 32, 32, 3],
        "neighbours": [3, 2],
        "distances": [3, 2],
    }
