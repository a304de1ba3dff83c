"""The benchmarks' arithmetic against independent truths; and, slowly, that each runs and says what it measured."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data
import gpu
import job
import measure
import overhead
import peers
import roofline
import scaling
import search
import step
from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.network import likelihood as loss
from dogvae.network.vae import VAE
from dogvae.storage import Storage
from dogvae.training.checkpoint import Checkpoints

CONFIGS = [
    {},
    {"samples": 3},
    {"preset": "notebook", "samples": 2},
    {"width": 16, "latent_dim": 5, "image_size": 32, "norm": "group"},
    {"width": 8, "latent_dim": 7, "image_size": 128, "samples": 10},
]


# --- roofline


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_flops_are_those_that_pytorch_counts(settings: dict[str, Any]) -> None:
    config = Config.make(**{"batch_size": 4, **settings})
    assert roofline.count(config)["image_gflop"] == pytest.approx(roofline.counted(config), rel=1e-9)


def test_flops_by_hand() -> None:
    """Multiply-adds of the default network, layer by layer, twice for FLOPs; the first has no input gradient."""
    first = 32**2 * 64 * 3 * 16
    encoder = first + 16**2 * 128 * 64 * 16 + 8**2 * 256 * 128 * 16 + 4**2 * 512 * 256 * 16 + 4**2 * 64 * 512 * 9
    decoder = 4**2 * 32 * 512 * 16 + 8**2 * 512 * 256 * 16 + 16**2 * 256 * 128 * 16 + 32**2 * 128 * 64 * 16
    decoder += 64**2 * 64 * 3 * 9
    colours = 64**2 * 9  # forward and for its input; a fixed matrix has no gradient
    found = roofline.count(Config.make(batch_size=4))
    assert found["encoder_gflop"] * 1e9 == pytest.approx(6 * encoder - 2 * first)
    assert found["decoder_gflop"] * 1e9 == pytest.approx(6 * decoder + 4 * colours)
    assert found["encoder_gflop"] == pytest.approx(0.645, abs=5e-4)
    assert found["decoder_gflop"] == pytest.approx(2.484, abs=5e-4)


def test_weights_are_all_counted() -> None:
    for settings in CONFIGS:
        config = Config.make(**settings)
        assert roofline.count(config)["weights"] == sum(p.numel() for p in VAE(config.model).parameters())


def test_bytes_by_hand() -> None:
    conv, norm, act = torch.nn.Conv2d(3, 8, 4), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    before, after = torch.Size((1, 3, 16, 16)), torch.Size((1, 8, 8, 8))
    read, written = 3 * 256 * 2, 8 * 64 * 2
    assert roofline.bytes_of(conv, before, after, item=2) == 3 * read + 3 * written
    assert roofline.bytes_of(norm, after, after, item=4) == 8 * 512 * 4
    assert roofline.bytes_of(act, after, after, item=4) == 5 * 512 * 4


def test_twice_the_batch_is_twice_the_work_but_for_the_weights() -> None:
    one, two = (roofline.count(Config.make(batch_size=n, precision="fp32")) for n in (4, 8))
    assert two["step_gflop"] == 2 * one["step_gflop"]
    weights = one["weights"] * (3 * 4 + 7 * 4 + 3 * 4) / 1e9
    assert two["step_gb"] - weights == pytest.approx(2 * (one["step_gb"] - weights))
    assert roofline.floors(one, tflops=2.0, gbs=100.0) == {
        "compute_s": pytest.approx(one["step_gflop"] / 2000), "memory_s": pytest.approx(one["step_gb"] / 100)
    }  # fmt: skip


# --- scaling


def test_a_ring_by_hand() -> None:
    """Four workers, 24 MB, 12.5 GB/s: each sends 1.5 * 24 MB in 2.88 ms; two messages there and two back."""
    assert scaling.exchange_s(4, 24e6, 12.5e9) == pytest.approx(2.88e-3)
    assert scaling.exchange_s(4, 24e6, 12.5e9, latency=1e-5) == pytest.approx(2.88e-3 + 4e-5)
    assert scaling.exchange_s(1, 24e6, 12.5e9, latency=1e-5) == 0


def test_an_exchange_hides_behind_the_backward_pass() -> None:
    same = dict(alone=0.009, nbytes=24e6, bandwidth=12.5e9, latency=0.0, waits=14)
    assert scaling.step_s(4, **same) == pytest.approx(0.009)  # 2.88 ms behind 6 ms
    assert scaling.step_s(4, **same, hidden=0.0) == pytest.approx(0.009 + 2.88e-3)
    assert scaling.step_s(4, **{**same, "alone": 0.003}) == pytest.approx(0.003 + 2.88e-3 - 0.002)
    # Batch norm waits 14 times for a message to all and back: two levels of a tree of four.
    assert scaling.step_s(4, **{**same, "latency": 1e-5}) == pytest.approx(0.009 + 14 * 4e-5)


def test_every_batch_norm_is_waited_for_twice() -> None:
    assert scaling.norm_waits(Config.make(width=4)) == 2 * (3 + 4)
    assert scaling.norm_waits(Config.make(width=4, norm="group")) == 0


# --- the peers


def test_the_notebooks_loss_is_that_of_its_preset() -> None:
    """From the same weights and the same latents: its probabilities and means, our logits and sums."""
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
    value = theirs.loss_function(*_reordered(theirs(x), x))
    logits, mu, logvar = ours(x, noise)
    nats = loss.reconstruction("bernoulli", logits, x).sum() + loss.kl(mu, logvar).sum()
    torch.testing.assert_close(value, nats / (n * 3 * 64 * 64))


def _reordered(out: tuple[Any, ...], x: torch.Tensor) -> tuple[Any, ...]:
    recon, mu, logvar = out
    return recon, x, mu, logvar


def test_the_plain_network_has_our_loss() -> None:
    torch.manual_seed(0)
    config = Config.make(width=4, latent_dim=3, samples=2, batch_size=4)
    network, x = peers.Network(config), torch.rand(4, 3, 64, 64)
    assert not [m for m in network.modules() if type(m).__name__ == "SyncBatchNorm"]
    ours = VAE(config.model)
    ours.load_state_dict(network.vae.state_dict())
    torch.manual_seed(1)
    value = network(x)
    torch.manual_seed(1)
    logits, mu, logvar = ours(x, torch.randn(2, 4, *ours.latent_shape))
    torch.testing.assert_close(value, (loss.reconstruction("bernoulli", logits, x) + loss.kl(mu, logvar)).mean())


@pytest.mark.parametrize("kind", [peers.NotebookDogs, peers.Photos])
def test_the_peers_augment_as_we_do(kind: Any) -> None:
    """Half are mirrored, a third turned; an image that is neither keeps its pixels; [0, 1], channels first."""
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


# --- what they stand on


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that slows down by half in the second round changes neither's ratio."""
    assert measure.ratio([10, 5, 10], [5, 2.5, 4]) == {"median": 2, "low": 2, "high": 2.5, "n": 3}
    assert measure.shown({"median": 2, "low": 1.5, "high": 2.25, "n": 3}, ".2f") == "2.00 (1.50-2.25)"


def test_the_peak_is_this_processs_own() -> None:
    """Of a process that is small, was started by this large one, and for a moment had 64 MB more."""
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
for seconds in [0.3, 0.1, 0.1, 0.3, 0.1]:
    time.sleep(seconds)
    if not turns.tick():
        break
"""


def test_a_turn_times_its_steps_and_not_what_leads_to_them(tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(path=str(measure.ROOT / "benchmarks")))
    with measure.contenders({"a": (measure.child(str(script)), 1)}) as started:
        measure.alternate(started, 1, lead=1, steps=2)
        measure.alternate(started, 1, lead=1, steps=1)
    first, second = started["a"].figures("seconds")
    assert 0.2 <= first < 0.45  # and not the 0.3 s before
    assert 0.1 <= second < 0.35


def test_a_contender_that_fails_is_told_with_its_error(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text("raise ValueError('no such dog')")
    with pytest.raises(SystemExit, match="no such dog"), measure.contenders({"a": (measure.child(str(script)), 1)}):
        pass


def test_sparse_datasets_open_and_take_no_room(tmp_path: Path) -> None:
    folder = data.sparse(tmp_path / "sparse", 10**6)
    split = Dataset(folder).train
    assert len(split) == 10**6
    assert split.nbytes == 10**6 * 3 * 64 * 64
    assert not split.gather(np.array([0, 5460, 5461, 10**6 - 1])).any()
    assert sum(file.stat().st_blocks for file in folder.iterdir()) * 512 < 5 * 2**20


def test_photos_and_their_config(tmp_path: Path) -> None:
    folder = job.write_photos(tmp_path / "data", 12, val=4)
    opened = Dataset(folder)
    opened.verify()
    assert (len(opened.train), len(opened.val)) == (12, 4)
    assert job.photos_of(folder).shape == (12, 3, 64, 64)
    config = job.config_for(folder, "notebook", argparse.Namespace(samples=2, batch_size=6, width=8))
    assert (config.samples, config.batch_size, config.model.width, config.model.architecture) == (2, 6, 8, "notebook")


def test_both_searches_have_the_same_trials() -> None:
    settings = search.given(argparse.Namespace(trials=3))
    assert [set(s) for s in settings] == [{"latent_dim", "lr", "samples"}] * 3
    assert settings == search.given(argparse.Namespace(trials=5))[:3]


# --- each of them, within this process where it needs no other


def answers(
    contend: Callable[[argparse.Namespace], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    turns: int,
    **args: Any,
) -> list[dict[str, Any]]:
    """What a contender says in so many turns of one step and two timed ones, after it was ready."""
    orders = json.dumps({"lead": 1, "steps": 2}) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns * orders))
    contend(argparse.Namespace(**{"threads": 1, "batch_size": 4, "samples": 2, "width": 4, "device": "cpu", **args}))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(measure.MARK)]
    return [json.loads(line.removeprefix(measure.MARK)) for line in lines]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job.write_photos(tmp_path_factory.mktemp("photos") / "data", 64, val=4)


@pytest.mark.parametrize("name", ["ours", "ours, notebook", "notebook"])
def test_step_contenders(
    name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"contender": name, "data": photos, "folder": tmp_path / "run", "loader_workers": 0}
    given |= {"warmup": 2, "repeats": 1, "steps": 2}
    ready, *turns = answers(step.contend, monkeypatch, capsys, turns=2, **given)
    assert ready == {}
    assert len(turns) == 2
    assert all(turn["seconds"] > 0 and turn["peak_mb"] > 50 for turn in turns)
    if name != "notebook":  # the loop was ended as Ctrl-C would: after the six steps that were asked for
        saved = Checkpoints(Storage(tmp_path / "run")).latest()
        assert saved is not None
        assert saved.meta["step"] == 6


@pytest.mark.parametrize("contend", [data.ours, data.loader])
def test_data_contenders(
    contend: Any, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *turns = answers(contend, monkeypatch, capsys, turns=7, data=photos, loader_workers=0)
    assert [turn["seconds"] > 0 for turn in turns] == 7 * [True]  # beyond an epoch of 16 batches


def test_memory_of_two_million_images(tmp_path: Path) -> None:
    n = 2 * 10**6
    args = argparse.Namespace(threads=1, batch_size=8, width=4)
    # In processes of their own: in this one, memory that was freed before hides what they take.
    ours = data.once("our_memory", args, data.sparse(tmp_path / "a", n))
    assert 15 < ours["own_mb"] < 40  # the order of two million images is 16 MB
    loader = data.once("loader_memory", args, data.sparse(tmp_path / "b", n, shard=n))
    assert 16 < loader["own_mb"] < 200  # a list of two million numbers


def test_data_wait(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (answer,) = answers(data.waiting, monkeypatch, capsys, 0, data=photos, batch_size=32)
    assert [0 <= share < 1 for share in answer["data_wait"]] == 2 * [True]


def test_a_row_of_scaling_by_hand() -> None:
    """One worker needs 100 ms, two 60 ms, of which 12 ms are the exchange, and two unconnected ones 50 ms."""
    fixed = {"sum_s": 0.012, "latency_s": 0.0, "alone_s": 0.048, "step_s": 0.060}
    one = {
        "strong 1": [{"step_s": 0.1}], "strong 2": [fixed],
        "unconnected strong 2": [{"step_s": 0.05}, {"step_s": 0.04}],
    }  # fmt: skip
    args = argparse.Namespace(workers=[1, 2], batch_size=16, gradient_bytes=24e6, waits=14)
    row = scaling.row("strong", 2, 16, [one, one], args)
    assert row["images_per_s"]["median"] == pytest.approx(16 / 0.06)
    assert row["efficiency"]["median"] == pytest.approx(0.1 / (2 * 0.06))
    assert row["exchange_share"]["median"] == pytest.approx(0.2)
    assert row["unconnected"]["median"] == pytest.approx(0.05 / 0.06)
    assert row["gb_per_s"] == pytest.approx(2)  # 24 MB in 12 ms: a ring of two sends all of them once
    assert row["predicted_s"] == pytest.approx([0.050, 0.062])


def test_stages_add_up_to_the_first_step() -> None:
    run = {"lines": {"Ray": 9.0, "launch": 12.0}, "first_step_s": 20.0}
    assert overhead.stages(run, imports=4.0) == {"imports": 4.0, "Ray": 5.0, "launch": 3.0, "workers": 8.0}


def main_of(module: Any, where: Path, monkeypatch: pytest.MonkeyPatch, *args: object) -> dict[str, Any]:
    """The figures that a benchmark writes; its table must name the machine."""
    out = where / "out.json"
    monkeypatch.setattr(sys, "argv", [module.__name__, "--json", str(out), *map(str, args)])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert not module.main(), said.getvalue()
    assert f"{measure.cores()} cores" in said.getvalue()
    figures: dict[str, Any] = json.loads(out.read_text())
    assert figures["versions"]["torch"] == torch.__version__.split("+")[0]
    return figures


def test_roofline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = ("--peak-tflops", 1, "--peak-gbs", 10)
    tiny = ("--width", 4, "--batch-size", 2, "--repeats", 1, "--threads", 1)
    found = main_of(roofline, tmp_path, monkeypatch, *tiny, *peaks)
    assert found["compute_s"] == pytest.approx(found["step_gflop"] / 1000)
    assert found["share"] == pytest.approx(max(found["compute_s"], found["memory_s"]) / found["step_s"]["median"])


TINY = ("--width", 4, "--batch-size", 4, "--steps", 2, "--repeats", 2)


@pytest.mark.slow
def test_step_with_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = (*TINY, "--samples", 2, "--loader-workers", 0)
    found = main_of(step, tmp_path, monkeypatch, *tiny, "--only", "ddp, 2 workers")["contenders"]["2"]
    assert found["ddp, 2 workers"]["images_per_s"]["n"] == 2


@pytest.mark.slow
def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = main_of(scaling, tmp_path, monkeypatch, *TINY, "--kinds", "strong", "--workers", 2)
    (strong,) = found["rows"]
    assert (strong["kind"], strong["workers"], strong["batch"]) == ("strong", 2, 4)
    assert strong["efficiency"]["median"] == pytest.approx(1)  # there is no smaller group to compare with
    assert strong["unconnected"]["median"] > 0
    assert strong["sum_s"]["median"] > 0
    assert [row["gpus"] for row in found["paper"]] == [8, 16, 64, 256, 1024] * 2


@pytest.mark.slow
def test_gpu_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part but the peers, who are started as `step` does."""
    parts = ("sweep", "variants", "curves", "training")
    found = main_of(gpu, tmp_path, monkeypatch, "--device", "cpu", "--quick", "--only", *parts)
    assert all(check["ok"] for check in found["checks"])
    assert len(found["checks"]) == 5
    assert "compiled" in found["variants"]["K1-batch4"]
    assert found["training"]["epochs"] == 2
