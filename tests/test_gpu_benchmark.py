"""benchmarks/gpu.py on a CPU: its numbers, that it finds what is wrong, and that a part that fails loses nothing."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
import gpu_numbers
import gpu_speed
import measure
import roofline
from dogvae.network.vae import VAE
from dogvae.training.step import Trainer
from gpu_part import Part

LAYER = "decoder.layers.1.first.bias"


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return Part("cpu", True, tmp_path, tmp_path / "found.json")


def failed(found: dict[str, Any]) -> list[str]:
    return [check["name"] for check in found["checks"] if not check["ok"]]


def test_gradients_are_compared_for_every_layer_and_precision(part: Part) -> None:
    gpu_numbers.gradients(part)
    assert json.loads(part.file.read_text()) == part.found
    assert failed(part.found) == []
    assert len(part.found["checks"]) == 6
    layers = {name for name, _ in VAE(part.config().model).named_parameters()}
    fp32, bf16 = (part.found["figures"][f"default, {precision}"] for precision in ("fp32", "bf16"))
    assert fp32.keys() == bf16.keys() == layers
    assert 1e-8 < max(fp32.values()) < 1e-5
    assert 1e-3 < max(bf16.values()) < 3e-2


def test_gradients_a_ten_thousandth_off_are_found(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Trainer.step

    def step(self: Trainer, *args: Any) -> None:
        right(self, *args)
        gradient = self.parameters[LAYER].grad if self.config.preset == "default" else None
        if gradient is not None:
            gradient.mul_(1.0001)

    monkeypatch.setattr(Trainer, "step", step)
    gpu_numbers.gradients(part)
    assert set(failed(part.found)) == {f"gradients: default, {name}" for name in ("fp32 on the CPU", "fp32")}
    errors = part.found["figures"]["default, fp32"]
    assert errors[LAYER] == pytest.approx(1e-4, rel=0.1)


def test_steps_give_the_share_of_the_larger_floor(part: Part) -> None:
    gpu_speed.steps(part)
    figures = part.found["figures"]
    assert figures.keys() == {"peaks", "K1-batch2", "K1-batch4", "K10-batch2", "K10-batch4"}
    row, peaks = figures["K10-batch4"], figures["peaks"]
    count = roofline.count(part.config(samples=10, batch_size=4, precision="fp32"))
    floor = max(count["step_gflop"] / peaks["tflops"] / 1e3, count["step_gb"] / peaks["gbs"])
    assert row["share"] == pytest.approx(floor / row["step_s"]["median"])
    assert row["images_per_s"] == pytest.approx(4 / row["step_s"]["median"])


def test_waits_counts_the_calls_of_one_step(part: Part) -> None:
    gpu_speed.waits(part)
    row = part.found["figures"]["K1-batch4"]
    convolutions = [m for m in VAE(part.config().model).modules() if isinstance(m, torch.nn.Conv2d)]
    assert row["calls"]["aten::convolution"] == len(convolutions) + 1  # the last one makes colours
    assert row["calls"]["aten::_fused_adam_"] == 1
    assert row["launches"] == row["waits"] == 0  # there is no GPU


def test_part_that_fails_or_hangs_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = gpu.run_part("gradients", argparse.Namespace(device="cuda", quick=True), 100.0)
    assert failed(found) == ["gradients ran"]
    assert "CUDA" in found["checks"][-1]["detail"] or "NVIDIA" in found["checks"][-1]["detail"]
    assert list(found["figures"]) == ["default, fp32 on the CPU"]
    found = gpu.run_part("steps", argparse.Namespace(device="cpu", quick=False), 0.2)
    assert [check["detail"] for check in found["checks"]] == ["stopped after 0 s"]


@pytest.mark.slow
def test_command_runs_every_part_without_ray_and_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for absent in ("ray", "tensorboardX"):
        (tmp_path / f"{absent}.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", f"{measure.ROOT}:{tmp_path}")
    file = tmp_path / "gpu.json"
    command = [sys.executable, gpu.__file__, "--device", "cpu", "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    parts = found["parts"]
    assert parts.keys() == gpu.PARTS.keys()
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "\nok      notebook ran: " in done.stdout
    resumed = parts["resume"]["figures"]
    assert [row["resumed"] for row in resumed.values()] == [0, 0]
    epochs = parts["epochs"]["figures"]["epochs"]
    assert epochs["last"]["epoch"] == 2
    assert 0 < epochs["besides_steps_s"]["median"] < epochs["epoch_s"]["median"]
    losses = parts["curves"]["figures"]["fp32"]["losses"]
    assert losses[-1] < losses[0]
    dogs = parts["sampling"]["figures"]["4"]
    assert dogs["per_s"] == pytest.approx(4 / dogs["seconds"]["median"])
    assert parts["notebook"]["figures"]["K1, notebook"]["ratio"]["n"] == 2
