"""The commands as Python functions, and the runs and searches that they return, without Ray."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import dogvae
from dogvae.commands.python import as_flags
from dogvae.errors import UsageError
from dogvae.signals import stop_signals
from tests.support.cli import refused
from tests.support.exports import Exported
from tests.support.searches import FIVE, PLAN, SPACE, Spec, setting, write_search
from tune.trial import name_of


@pytest.mark.parametrize(
    ("given", "typed"),
    [
        ({"lr": 1e-4, "epochs": 0, "data": Path("my photos")}, ["--lr=0.0001", "--epochs=0", "--data=my photos"]),
        ({"gpus": None, "resume": False, "verbose": True}, ["--verbose"]),
        ({"augment": False}, ["--no-augment"]),
        ({"augment": True, "val_fraction": np.float64(0.1)}, ["--augment", "--val-fraction=0.1"]),
        ({"cpus": (2, 4)}, ["--cpus=2:4"]),
        ({"log": ["wandb", "mlflow"]}, ["--log=wandb,mlflow"]),
        ({"search": {"lr": "uniform(0,1)", "width": [8, 16]}},
         ["--search=lr=uniform(0,1)", "--search=width=choice(8,16)"]),
        ({"set": {"augment": False, "preset": "small"}}, ["--set=augment=false", "--set=preset=small"]),
    ],
)  # fmt: skip
def test_arguments_are_flags(given: dict[str, Any], typed: list[str]) -> None:
    assert as_flags(given) == typed


@pytest.mark.parametrize(
    ("call", "typed"),
    [
        (lambda: dogvae.train(lr=-1.0), "train --lr=-1.0"),
        (lambda: dogvae.train(lr="fast"), "train --lr=fast"),
        (lambda: dogvae.train(learning_rate=1), "train --learning-rate=1"),
        (lambda: dogvae.train("nowhere"), "train --data nowhere"),
        (lambda: dogvae.train(gpus=1, cpus=(2, 4)), "train --gpus 1 --cpus 2:4"),
        (lambda: dogvae.train(name="../dogs"), "train --name ../dogs"),
        (lambda: dogvae.train(name="dogs", resume=True, epochs=4), "train --name dogs --resume --epochs 4"),
        (lambda: dogvae.search(trials=0), "search --trials 0"),
        (lambda: dogvae.search(search={"colour": ["red"]}), "search --search colour=choice(red)"),
        (lambda: dogvae.search(set={"lr": 2}), "search --set lr=2"),
        (lambda: dogvae.prepare("nowhere", "dataset"), "prepare nowhere dataset"),
        (lambda: dogvae.prepare("portraits:9", "dataset", size=63), "prepare portraits:9 dataset --size 63"),
        (lambda: dogvae.fit_prior("nowhere", epochs=2), "fit-prior nowhere --epochs 2"),
        (lambda: dogvae.fit_prior("nowhere", depth=0), "fit-prior nowhere --depth 0"),
    ],
)
def test_mistakes_have_the_message_of_the_command(
    call: Callable[[], Any], typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        call()
    assert f"error: {error.value}\n" == refused(capsys, *typed.split())
    assert list(tmp_path.iterdir()) == []


def test_dashboard_address_is_refused_as_a_job_returns_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--address: only the command line sends jobs to http://head:8265"):
        dogvae.train("portraits:100", address="http://head:8265")
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(UsageError, match="only the command line"):
        dogvae.search("portraits:100")


def test_mistakes_are_found_before_anything_slow_is_imported() -> None:
    code = """if True:
        import sys, dogvae
        try:
            dogvae.train("nowhere", lr=1e-3)
        except ValueError as error:
            print(*{"torch", "ray", "matplotlib", "IPython"} & set(sys.modules), "nowhere" in str(error))
            print("train" in dir(dogvae), hasattr(dogvae, "tarin"))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\nTrue False\n", done.stderr


# --- a run


def test_run_has_its_epochs_and_its_model(exported: Exported) -> None:
    run = dogvae.open_run(exported.run)
    lines = [json.loads(line) for line in (exported.run / "metrics.jsonl").read_text().splitlines()]
    assert run.path == exported.run
    assert run.metrics == lines
    assert run.best == min(lines, key=lambda r: r["val_loss"])
    assert (len(run.data.train), run.config.epochs) == (100, 4)
    assert run.model is run.model
    assert np.array_equal(run.model.sample(3), dogvae.load(exported.folder).sample(3))


def test_run_that_was_stopped_is_exported_when_its_model_is_asked_for(exported: Exported, tmp_path: Path) -> None:
    copy = shutil.copytree(exported.run, tmp_path / "dogs", ignore=shutil.ignore_patterns("export"))
    metrics = copy / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    run = dogvae.open_run(copy)
    assert "3 of 4; run.resume() goes on" in repr(run)
    assert "<img" not in run._repr_html_()
    assert np.array_equal(run.model.sample(3), dogvae.load(exported.folder).sample(3))


def test_prior_of_a_run_is_fitted_and_exported(exported: Exported, tmp_path: Path) -> None:
    copy = shutil.copytree(exported.run, tmp_path / "dogs", ignore=shutil.ignore_patterns("export"))
    run = dogvae.open_run(copy).fit_prior(prior="gaussian")
    assert (run.path, run.model.priors[0]) == (copy, "gaussian")
    assert (copy / "export/config.json").exists()


def test_run_shows_its_best_epoch_and_its_preview(exported: Exported) -> None:
    run = dogvae.open_run(exported.run)
    assert run.best
    best = f"epoch {run.best['epoch'] + 1}: loss {run.best['val_loss']:.0f} = "
    assert re.fullmatch(rf"Run {exported.run}\n  epochs  4 of 4\n  best    {best}.* dB", repr(run))
    page = run._repr_html_()
    assert best in page
    data = re.findall('src="data:image/jpeg;base64,([^"]+)"', page)[0]
    shown, preview = Image.open(io.BytesIO(base64.b64decode(data))), Image.open(exported.folder / "preview.png")
    assert shown.size == preview.size
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(preview.convert("RGB"))).mean() < 8


def test_curves_of_a_run_are_its_metrics(exported: Exported) -> None:
    run = dogvae.open_run(exported.run)
    figure = run.plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.split(" (")[0] for title in titles] == ["loss", "reconstruction", "KL", "explained"]
    for axes, name in zip(figure.axes, ("loss", "reconstruction", "kl", "explained"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines["validation"].get_xdata()) == [1, 2, 3, 4]
        assert list(lines["validation"].get_ydata()) == [r[f"val_{name}"] for r in run.metrics]
        assert list(lines["best"].get_xdata()) == [run.best["epoch"] + 1]  # type: ignore[index]
        if name != "explained":
            assert list(lines["training"].get_ydata()) == [r[f"train_{name}"] for r in run.metrics]
    assert Image.open(io.BytesIO(figure._repr_png_())).size == (960, 210)  # type: ignore[attr-defined]
    assert plt.get_fignums() == []  # a notebook would show it twice


# --- a search


def test_search_has_its_trials_and_its_best_run(tmp_path: Path) -> None:
    search = dogvae.open_search(write_search(tmp_path, FIVE))
    assert search.path == tmp_path / "dogs"
    assert [trial["trial"] for trial in search.trials[:2]] == [1, 0]
    assert search.best.path == tmp_path / "dogs/trials" / name_of(1, FIVE[1].setting)
    assert [r["val_loss"] for r in search.best.metrics] == [7950.0, None, 7450.0]
    assert search.best.config.model.latent_dim == 16
    page = search._repr_html_()
    assert page.count("<tr>") == 6
    assert "gradients" not in page
    assert Image.open(io.BytesIO(search.plot()._repr_png_())).size == (960, 576)  # type: ignore[attr-defined]


def test_search_without_a_finished_epoch_has_a_text_and_no_best_run(tmp_path: Path) -> None:
    search = dogvae.open_search(write_search(tmp_path, [Spec(setting(), [], state="running")]))
    assert repr(search) == f"Search {tmp_path / 'dogs'}\n  trials  0 of {PLAN.trials}"
    with pytest.raises(UsageError, match=r"no trial of .* has finished an epoch"):
        _ = search.best
    assert set(SPACE) < set(search.trials[0])


# --- where it runs


def test_signals_are_left_alone_outside_of_the_main_thread() -> None:
    seen: list[Any] = []

    def inside() -> None:
        with stop_signals() as received:
            seen.append(received)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [[]]
