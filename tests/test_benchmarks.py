"""The benchmarks: their arithmetic against counts by hand, and that each runs and reports what it measures."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import data
import first_command
import job
import measure
import overhead
import peers
import playground
import roofline
import scale
import scaling
import step
from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.network import likelihood
from dogvae.network.vae import VAE, Residual
from dogvae.storage import Storage
from dogvae.training.checkpoint import Checkpoints
from tests.support.exports import Exported

# --- roofline


def test_flops_match_a_count_by_hand() -> None:
    """Multiply-adds of the default network, layer by layer, twice for FLOPs; the first layer has no input gradient."""
    first = 32**2 * 48 * 12 * 9
    blocks = 2 * 9 * (32**2 * 48**2 + 16**2 * 96**2 + 8**2 * 192**2)  # one residual block at each resolution
    encoder = first + blocks + 16**2 * 96 * 48 * 16 + 8**2 * 192 * 96 * 16 + 8**2 * 16 * 192 * 9
    decoder = 8**2 * 192 * 8 * 9 + 2 * blocks + 8**2 * 384 * 192 + 16**2 * 192 * 96 + 32**2 * 12 * 48 * 9
    colours = 64**2 * 9  # forward and for its input; a fixed matrix has no gradient
    found = roofline.count(Config.make(batch_size=4, samples=3))
    assert found["encoder_gflop"] * 1e9 == pytest.approx(6 * encoder - 2 * first)
    assert found["decoder_gflop"] * 1e9 == pytest.approx(6 * decoder + 4 * colours)
    assert found["step_gflop"] == pytest.approx(4 * (found["encoder_gflop"] + 3 * found["decoder_gflop"]))


def test_bytes_of_a_layer_match_a_count_by_hand() -> None:
    conv, norm, act = torch.nn.Conv2d(3, 8, 4), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    before, after = torch.Size((1, 3, 16, 16)), torch.Size((1, 8, 8, 8))
    read, written = 3 * 256 * 2, 8 * 64 * 2
    assert roofline.bytes_of(conv, before, after, item=2) == 3 * read + 3 * written
    assert roofline.bytes_of(norm, after, after, item=4) == 8 * 512 * 4
    assert roofline.bytes_of(act, after, after, item=4) == 5 * 512 * 4
    assert roofline.bytes_of(torch.nn.PixelUnshuffle(2), before, torch.Size((1, 12, 8, 8)), item=2) == 4 * read
    assert roofline.bytes_of(Residual(8), after, after, item=4) == (5 + 5 + 6) * 512 * 4  # besides its convolutions


def test_twice_the_batch_moves_twice_the_bytes_except_for_the_weights() -> None:
    one, two = (roofline.count(Config.make(batch_size=n, samples=3, precision="fp32")) for n in (4, 8))
    weights = one["weights"] * (3 * 4 + 7 * 4 + 3 * 4) / 1e9
    assert two["step_gb"] - weights == pytest.approx(2 * (one["step_gb"] - weights))
    assert roofline.floors(one, tflops=2.0, gbs=100.0) == {
        "compute_s": pytest.approx(one["step_gflop"] / 2000), "memory_s": pytest.approx(one["step_gb"] / 100)
    }  # fmt: skip


# --- the peers


def test_notebook_peer_has_the_loss_of_preset_notebook() -> None:
    """With the same weights and latents. The peer computes with probabilities and means, we with logits and sums."""
    torch.manual_seed(0)
    n, samples = 4, 3
    config = Config.make(preset="notebook", width=8, latent_dim=5, samples=samples, batch_size=n)
    ours, theirs = VAE(config.model), peers.NotebookVAE(5, samples, n, width=8)
    for name in ("encoder", "decoder"):
        weights = getattr(ours, name).state_dict().values()
        theirs_state = getattr(theirs, name).state_dict()
        getattr(theirs, name).load_state_dict(dict(zip(theirs_state, weights, strict=True)))
    x, noise = torch.rand(n, 3, 64, 64), torch.randn(samples, n, 5, 4, 4)
    theirs.reparameterize = lambda mu, logvar: [e * torch.exp(0.5 * logvar) + mu for e in noise]  # type: ignore[method-assign]
    recon, mu, logvar = theirs(x)
    value = theirs.loss_function(recon, x, mu, logvar)
    logits, mu, logvar = ours(x, noise)
    nats = likelihood.bernoulli(logits, x).sum() + likelihood.kl(mu, logvar).sum()
    torch.testing.assert_close(value, nats / (n * 3 * 64 * 64))


def test_ddp_peer_has_our_loss() -> None:
    """Less the constants of a Gaussian, per grey level, with the sigma that fits best."""
    torch.manual_seed(0)
    config = Config.make(width=4, latent_dim=3, samples=2, batch_size=4)
    network, x = peers.Network(config), torch.rand(4, 3, 64, 64)
    ours = VAE(config.model)
    ours.load_state_dict(network.vae.state_dict())
    torch.manual_seed(1)
    value = network(x)
    torch.manual_seed(1)
    outputs, mu, logvar = ours(x, torch.randn(2, 4, *ours.latent_shape))
    errors, pixels = likelihood.squared_errors("gaussian", outputs, x), 3 * 64**2
    sigma = likelihood.best_sigma(errors.sum(), 4 * pixels)
    nats = (likelihood.gaussian(errors, sigma, pixels) + likelihood.kl(mu, logvar)).mean()
    torch.testing.assert_close(value + pixels * (math.log(255) + 0.5 * math.log(2 * math.pi) + 0.5), nats)


@pytest.mark.parametrize("kind", [peers.NotebookDogs, peers.Photos])
def test_peers_augment_as_often_as_we_do(kind: Any) -> None:
    """Half of the images are mirrored, 30% are rotated; others keep their pixels, as (3, h, w) in [0, 1]."""
    photo = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    torch.manual_seed(0)
    dogs = kind(np.stack([photo] * 400))
    plain = torch.from_numpy(photo).float() / 255
    seen = [dogs[i] for i in range(400)]
    assert seen[0].shape == (3, 64, 64)
    same = sum(torch.allclose(x, plain, atol=1e-6) for x in seen)
    mirrored = sum(torch.allclose(x, plain.flip(2), atol=1e-6) for x in seen)
    assert abs(same - 140) < 40  # 0.5 * 0.7 of 400
    assert abs(mirrored - 140) < 40


# --- measuring


def test_ratio_ignores_a_round_in_which_the_machine_was_slow() -> None:
    assert measure.ratio([10, 5, 10], [5, 2.5, 4]) == {"median": 2, "low": 2, "high": 2.5, "n": 3}
    assert measure.shown({"median": 2, "low": 1.5, "high": 2.25, "n": 3}, ".2f") == "2.00 (1.50-2.25)"


def test_peak_memory_excludes_the_parent_process() -> None:
    """A small process, started by this large one, allocates 64 MB for a moment."""
    script = f"import sys; sys.path.insert(0, {str(measure.ROOT / 'benchmarks')!r}); import measure\n"
    script += "before = measure.peak_mb(); len(bytearray(2**26)); print(before, measure.peak_mb())"
    before, after = map(float, subprocess.check_output([sys.executable, "-c", script], text=True).split())
    assert before < 60  # this one has hundreds
    assert 60 < after - before < 70


ECHO = """
import sys, time
sys.path.insert(0, {path!r})
import measure
turns = measure.Turns()
for seconds in [0.9, 0.1, 0.1, 0.9, 0.1]:
    time.sleep(seconds)
    if not turns.tick():
        break
"""


def test_a_turn_times_its_steps_and_not_the_lead(tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(path=str(measure.ROOT / "benchmarks")))
    with measure.contenders({"a": (measure.child(str(script)), 1)}) as started:
        measure.alternate(started, 1, lead=1, steps=2)
        measure.alternate(started, 1, lead=1, steps=1)
    first, second = started["a"].figures("seconds")
    assert 0.2 <= first < 0.9  # without the 0.9 s of the lead
    assert 0.1 <= second < 0.9


def test_a_failed_contender_ends_the_benchmark_with_its_log(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text("raise ValueError('no such dog')")
    with pytest.raises(SystemExit, match="no such dog"), measure.contenders({"a": (measure.child(str(script)), 1)}):
        pass


def test_a_sparse_dataset_opens_and_takes_no_room(tmp_path: Path) -> None:
    folder = data.sparse(tmp_path / "sparse", 10**6)
    split = Dataset(folder).train
    assert len(split) == 10**6
    assert split.nbytes == 10**6 * 3 * 64 * 64
    assert not split.gather(np.array([0, 5460, 5461, 10**6 - 1])).any()
    assert sum(file.stat().st_blocks for file in folder.iterdir()) * 512 < 5 * 2**20


def test_written_photos_open_as_a_verified_dataset(tmp_path: Path) -> None:
    folder = job.write_photos(tmp_path / "data", 12, val=4)
    opened = Dataset(folder)
    opened.verify()
    assert (len(opened.train), len(opened.val)) == (12, 4)
    assert job.photos_of(folder).shape == (12, 3, 64, 64)
    config = job.config_for(folder, "notebook", argparse.Namespace(samples=2, batch_size=6, width=8))
    assert (config.samples, config.batch_size, config.model.width, config.model.architecture) == (2, 6, 8, "notebook")


# --- the benchmarks, each within this process where possible


def answers(
    contend: Callable[[argparse.Namespace], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    turns: int,
    **args: Any,
) -> list[dict[str, Any]]:
    """A contender's answers: that it is ready, then one for each turn of one step and two timed ones."""
    orders = json.dumps({"lead": 1, "steps": 2}) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns * orders))
    contend(argparse.Namespace(**{"threads": 1, "batch_size": 4, "samples": 2, "width": 4, "device": "cpu", **args}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(measure.MARK)]
    return [json.loads(line.removeprefix(measure.MARK)) for line in lines]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job.write_photos(tmp_path_factory.mktemp("photos") / "data", 64, val=4)


@pytest.mark.parametrize("name", ["ours", "ours, notebook", "notebook"])
def test_contenders_of_step_answer_each_turn(
    name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"contender": name, "data": photos, "folder": tmp_path / "run", "loader_workers": 0}
    given |= {"warmup": 2, "repeats": 1, "steps": 2}
    ready, *turns = answers(step.contend, monkeypatch, capsys, turns=2, **given)
    assert ready == {}
    assert len(turns) == 2
    assert all(turn["seconds"] > 0 and turn["peak_mb"] > 50 for turn in turns)
    if name != "notebook":  # the loop saved and stopped after the six steps that were ordered
        saved = Checkpoints(Storage(tmp_path / "run")).latest()
        assert saved is not None
        assert saved.meta["step"] == 6


@pytest.mark.parametrize("contend", [data.ours, data.loader])
def test_contenders_of_data_answer_across_epochs(
    contend: Any, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *turns = answers(contend, monkeypatch, capsys, turns=7, data=photos, loader_workers=0)
    assert [turn["seconds"] > 0 for turn in turns] == 7 * [True]  # more than an epoch of 16 batches


def test_memory_of_two_million_images_is_that_of_their_order(tmp_path: Path) -> None:
    n = 2 * 10**6
    args = argparse.Namespace(threads=1, batch_size=8, width=4)
    # In separate processes: here, memory that was freed before would hide what they take.
    ours = data.once("our_memory", args, data.sparse(tmp_path / "a", n))
    assert 15 < ours["own_mb"] < 40  # the order of two million images is 16 MB
    loader = data.once("loader_memory", args, data.sparse(tmp_path / "b", n, shard=n))
    assert 16 < loader["own_mb"] < 200  # the order as a list of two million numbers


def test_data_wait_is_a_share_of_each_epoch(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (answer,) = answers(data.waiting, monkeypatch, capsys, 0, data=photos, batch_size=32)
    assert [0 <= share < 1 for share in answer["data_wait"]] == 2 * [True]


def test_a_row_of_scaling_matches_a_count_by_hand() -> None:
    """One worker needs 100 ms, two 60 ms, of which 12 ms are the exchange, and two unconnected ones 50 ms."""
    one = {
        "strong 1": [{"step_s": 0.1}], "strong 2": [{"step_s": 0.060, "alone_s": 0.048}],
        "unconnected strong 2": [{"step_s": 0.05}, {"step_s": 0.04}],
    }  # fmt: skip
    row = scaling.row("strong", 2, [one, one], argparse.Namespace(workers=[1, 2], batch_size=16))
    assert row["images_per_s"]["median"] == pytest.approx(16 / 0.06)
    assert row["efficiency"]["median"] == pytest.approx(0.1 / (2 * 0.06))
    assert row["exchange"]["median"] == pytest.approx(0.2)
    assert row["unconnected"]["median"] == pytest.approx(0.05 / 0.06)


def test_playground_reports_the_wait_of_a_slider(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(playground, "REPEATS", 1)
    found = main_of(playground, tmp_path, monkeypatch, exported.folder, "--seconds", 0.3)
    assert found["slider_ms"]["count"] > 0
    assert 0 < found["slider_ms"]["median"] <= found["slider_ms"]["p99"]
    assert min(found[name] for name in ("ends_s", "slider_behind_ends_ms", "first_sample_s")) > 0


def test_stages_add_up_to_the_first_step() -> None:
    run = {"lines": {"Ray": 9.0, "launch": 12.0}, "first_step_s": 20.0}
    assert overhead.stages(run, imports=4.0) == {"imports": 4.0, "Ray": 5.0, "launch": 3.0, "workers": 8.0}


def main_of(module: Any, where: Path, monkeypatch: pytest.MonkeyPatch, *args: object) -> dict[str, Any]:
    """The figures that a benchmark writes to --json; its table must name the machine."""
    out = where / "out.json"
    monkeypatch.setattr(sys, "argv", [module.__name__, "--json", str(out), *map(str, args)])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert not module.main(), said.getvalue()
    assert f"{measure.cores()} cores" in said.getvalue()
    figures: dict[str, Any] = json.loads(out.read_text())
    assert figures["versions"]["torch"] == torch.__version__.split("+")[0]
    return figures


def test_roofline_reports_the_share_of_the_larger_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = ("--peak-tflops", 1, "--peak-gbs", 10)
    tiny = ("--width", 4, "--batch-size", 2, "--repeats", 1, "--threads", 1)
    found = main_of(roofline, tmp_path, monkeypatch, *tiny, *peaks)
    assert found["compute_s"] == pytest.approx(found["step_gflop"] / 1000)
    assert found["share"] == pytest.approx(max(found["compute_s"], found["memory_s"]) / found["step_s"]["median"])


def test_growth_is_the_exponent_of_the_last_two_rows() -> None:
    rows = [{"n": 1.0, "s": 9.0}, {"n": 10.0, "s": 2.0}, {"n": 100.0, "s": 200.0}]
    assert scale.growth(rows, "s") == pytest.approx(2)  # a hundred times as much for ten times as many
    assert scale.table("images", rows)[-1].split() == ["growth", "2.00"]


def test_scale_writes_and_opens_datasets_and_draws_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "SIZES", (200, 50_000))
    found = main_of(scale, tmp_path, monkeypatch, "--parts", "images", "--picture", tmp_path / "curves.png")["parts"]
    few, many = found["images"]
    assert (few["n"], many["n"]) == (200, 50_000)
    assert 0 < few["writing, s"] < many["writing, s"] < 60
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 300


@pytest.mark.slow
def test_scale_of_epochs_reads_what_a_run_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (twenty, fifty) = main_of(scale, tmp_path, monkeypatch, "--parts", "epochs", "--most", 50)["parts"]["epochs"]
    assert fifty["metrics.jsonl, KB"] == pytest.approx(2.5 * twenty["metrics.jsonl, KB"], rel=0.02)
    assert 0 < fifty["an epoch, ms"] < 400  # 48 on an idle machine; 503 when each epoch was reported to Ray Train
    assert 0.1 < fifty["folder, MB"] < 20


@pytest.mark.slow
def test_stages_of_the_first_command_fill_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    given = ("--commands", "train", "--data", "portraits:60", "--epochs", 2)
    found = main_of(first_command, tmp_path, monkeypatch, *given)["stages"]
    (stages,) = found.pop("train")
    assert found == {}
    assert min(stages.values()) >= 0
    assert all(stages[name] > 0.1 for name in ("imports", "Ray", "workers", "steps", "prior, export"))
    assert sum(stages.values()) == pytest.approx(time.monotonic() - began - stages["imports"], abs=3)


TINY = ("--width", 4, "--batch-size", 4, "--steps", 2, "--repeats", 2)


@pytest.mark.slow
def test_step_runs_the_ddp_peer_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = (*TINY, "--samples", 2, "--loader-workers", 0)
    found = main_of(step, tmp_path, monkeypatch, *tiny, "--only", "ddp, 2 workers")["contenders"]["2"]
    assert found["ddp, 2 workers"]["images_per_s"]["n"] == 2


@pytest.mark.slow
def test_scaling_compares_two_workers_with_unconnected_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = main_of(scaling, tmp_path, monkeypatch, *TINY, "--kinds", "strong", "--workers", 2)
    (strong,) = found["rows"]
    assert (strong["kind"], strong["workers"], strong["batch"]) == ("strong", 2, 4)
    assert strong["efficiency"]["median"] == pytest.approx(1)  # there is no smaller group to compare with
    assert strong["unconnected"]["median"] > 0
    assert strong["exchange"]["median"] < 1
