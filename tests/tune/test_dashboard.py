"""The dashboard as a person meets it: TensorBoard's pages in a real browser, its links, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dogvae.errors import RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training.metrics import Recorder
from tests.support.browser import CHROMIUM, FLAGS, free_port, is_open
from tests.support.searches import SPACE, Remote
from tune import dashboard as module
from tune import ranking as results
from tune.dashboard import copy_events, dashboard
from tune.hparams import hparams
from tune.search_folder import open_search
from tune.space import Space

ROOT = Path(__file__).parents[2]
SETTINGS: list[dict[str, Any]] = [
    {"latent_dim": 32, "lr": 0.001, "samples": 10},
    {"latent_dim": 64, "lr": 0.00064, "samples": 1},
    {"latent_dim": 16, "lr": 0.0053, "samples": 3},
]
NAMES = ["00-latent_dim32-lr0.001-samples10", "01-latent_dim64-lr0.00064-samples1", "02-latent_dim16-lr0.0053-samples3"]
EPOCHS = 12  # more than the ten pictures that TensorBoard keeps unless told otherwise
SCALARS = {
    *("train/loss", "train/reconstruction", "train/kl"),
    *("val/loss", "val/reconstruction", "val/kl", "val/psnr", "val/active_latents", "val/explained"),
    *("val/loss_per_pixel", "run/step", "run/lr", "run/beta", "run/gradient_norm", "run/skipped_steps"),
    *("run/images_per_s", "run/data_wait", "run/world_size", "run/seconds"),
}


def record(trial: int, epoch: int) -> dict[str, Any]:
    """A line of metrics.jsonl, with all that training writes."""
    kl, reconstruction = 3.0 + trial + epoch, 2000.0 + 10 * trial - 5 * epoch
    loss = {"loss": kl + reconstruction, "reconstruction": reconstruction, "kl": kl}
    return {
        "epoch": epoch,
        "step": 13 * (epoch + 1),
        **{f"train_{name}": value + 5 for name, value in loss.items()},
        **{f"val_{name}": value for name, value in loss.items()},
        "val_psnr": 12.0 + epoch / 10,
        "val_active_latents": 8 * epoch,
        "val_explained": 0.02 * epoch - 0.1,
        "val_loss_per_pixel": loss["loss"] / 3072,
        "lr": 1e-3 / (epoch + 1),
        "beta": min(1.0, 0.3 * (epoch + 1)),
        "gradient_norm": 600.0 - epoch,
        "skipped_steps": 0,
        "images_per_s": 120.0 + trial,
        "data_wait": 0.02,
        "world_size": 1,
        "seconds": 0.9 * (epoch + 1),
    }


def pictures(epoch: int) -> dict[str, np.ndarray]:
    """As training writes them, of the sizes of a small dataset."""
    rng = np.random.default_rng(epoch)
    sizes = {"reconstructions": (70, 274), "samples": (138, 274), "walk": (138, 274)}
    return {name: rng.integers(0, 256, (3, *size), np.uint8) for name, size in sizes.items()}


def write_epochs(folder: Path, trial: int, epochs: range) -> None:
    before = [record(trial, epoch) for epoch in range(epochs.start)]
    recorder = Recorder(Storage(folder / "trials" / NAMES[trial]), before)
    for epoch in epochs:
        recorder.record(record(trial, epoch), pictures(epoch))
    recorder.close()


def write_search(folder: Path, state: str = "done", epochs: int = EPOCHS) -> Path:
    """The folder of a search, written by what a search writes it with, but without Ray."""
    storage = Storage(folder)
    for number, (name, setting) in enumerate(zip(NAMES, SETTINGS, strict=True)):
        hparams(storage / f"trials/{name}", name, setting, Space.from_json(SPACE))
        write_epochs(folder, number, range(epochs))
    entries = [
        {"number": number, "name": name, "setting": SETTINGS[number], "state": state, "reason": ""}
        for number, name in enumerate(NAMES)
    ]
    (folder / "trials.json").write_text(json.dumps(entries))
    about = {"format": "dogvae-search", "version": 1, "space": SPACE, "trials": 3, "seed": 0}
    (folder / "search.json").write_text(json.dumps(about))
    return folder


def get(url: str) -> Any:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        return json.load(answer)


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


# --- the pages


@pytest.mark.slow
def test_the_pages_in_a_browser(tmp_path: Path) -> None:
    if not Path(CHROMIUM).exists():
        pytest.skip("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    write_search(tmp_path / "runs/dogs")
    command = [sys.executable, "-m", "tune", "dashboard", "dogs", "--runs", str(tmp_path / "runs")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("RAY_DASHBOARD_ADDRESS", None)
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        assert process.stderr
        links = {}
        for line in process.stdout:
            links |= dict([line.split(maxsplit=1)])
            if "Ray" in links:
                break
        assert list(links) == ["starting", "settings", "curves", "pictures", "Ray"], process.stderr.read()
        address = links["settings"].partition("#")[0]
        family = psutil.Process(process.pid).children(recursive=True)
        for name in NAMES:  # what a page shows does not grow by itself, and this machine may be busy
            last = f"{address}data/plugin/images/images?run={name}&tag=walk&sample=0"
            until(lambda last=last: len(get(last)) == EPOCHS)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.set_default_timeout(60_000)
            the_settings(page, links["settings"].strip(), tmp_path)
            the_curves(page, links["curves"].strip(), tmp_path)
            the_pictures(page, links["pictures"].strip(), tmp_path)
            browser.close()
        tags = get(f"{address}data/plugin/scalars/tags")
        assert {run: set(named) for run, named in tags.items()} == dict.fromkeys(NAMES, SCALARS)

        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == ""
        assert family
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert not is_open(int(re.findall(r":(\d+)", address)[0]))
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


def the_settings(page: Any, link: str, shots: Path) -> None:
    """A row for each trial, with what is searched and what came of it, and the same as parallel coordinates."""
    page.goto(link)
    grid = page.locator("tf-hparams-table-view vaadin-grid")
    # The cells are the page's, but only the grid knows their rows.
    read = """grid => [...grid.shadowRoot.querySelectorAll('#header tr, #items tr')].map(
        row => [...row.children].map(cell => cell.querySelector('slot').assignedNodes()[0]?.innerText.trim()))"""
    until(lambda: len(grid.evaluate(read)) == 4)
    header, *rows = grid.evaluate(read)
    page.screenshot(path=shots / "settings.png")
    parameters, metrics = ["latent_dim", "lr", "samples"], ["loss", "reconstruction", "KL", "explained", "seconds"]
    assert header == ["Trial ID", "Show Metrics", *parameters, *metrics]
    for number, (row, setting) in enumerate(zip(rows, SETTINGS, strict=True)):
        last = record(number, EPOCHS - 1)
        values = [*setting.values(), *(last[f"val_{n}"] for n in ("loss", "reconstruction", "kl", "explained"))]
        assert row[0] == f"{number:02d}"
        assert [float(cell) for cell in row[2:10]] == pytest.approx([*values, last["seconds"]], rel=1e-4)

    page.get_by_text("parallel coordinates view").click()
    plot = page.locator("tf-hparams-parallel-coords-plot svg")
    until(lambda: plot.locator(".foreground path").count() == len(SETTINGS))
    page.screenshot(path=shots / "parallel.png")
    names = [text for text in plot.locator("text").all_text_contents() if not re.search(r"\d", text)]
    assert names == parameters + metrics


def the_curves(page: Any, link: str, shots: Path) -> None:
    """Those of the validation, unsmoothed, with a line for each trial."""
    page.goto("about:blank")  # or only what stands behind the # would change
    page.goto(link)
    card = page.locator("scalar-card").filter(has=page.locator("[title='val/loss']"))
    until(lambda: card.locator("svg path").count() > 0 and card.get_by_text("1,959").count() > 0)
    page.screenshot(path=shots / "curves.png")
    last = {name: record(trial, EPOCHS - 1)["val_loss"] for trial, name in enumerate(NAMES)}
    lines = [" ".join(text.split()) for text in card.locator("table tr, tb-data-table-content-row").all_inner_texts()]
    for name, loss in last.items():
        assert any(line.startswith(f"{name} {loss:,g} {EPOCHS - 1} ") for line in lines), lines
    titles = page.locator("card-view tb-truncated-path").evaluate_all("all => all.map(tag => tag.title)")
    assert {"val/kl", "val/loss"} <= set(titles) <= {tag for tag in SCALARS if tag.startswith("val/")}
    assert page.get_by_label("smoothing").locator("visible=true").last.input_value() == "0"


def the_pictures(page: Any, link: str, shots: Path) -> None:
    """The reconstructions of every trial, of all epochs that have some."""
    page.goto("about:blank")
    page.goto(link)
    cards = page.locator("tf-image-loader").filter(has_text="reconstructions")
    images = cards.locator("img")
    sizes = "all => all.map(image => [image.naturalWidth, image.naturalHeight])"
    until(lambda: images.evaluate_all(sizes) == [[274, 70]] * len(NAMES))
    page.screenshot(path=shots / "pictures.png")
    steps = "all => all.map(slider => slider.max + 1)"
    assert cards.locator("paper-slider").evaluate_all(steps) == [EPOCHS] * len(NAMES)


# --- the command


@pytest.mark.parametrize("port", ["taken", 70_000])
def test_a_port_that_cannot_be_had(tmp_path: Path, port: Any) -> None:
    search = open_search(str(tmp_path), write_search(tmp_path / "dogs", epochs=1).name)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1] if port == "taken" else port
        with pytest.raises(UsageError) as error:
            dashboard(search, port)
    assert str(error.value).startswith(f"--port {port}: ")
    assert str(error.value).endswith("; give another, or leave it out for a free one")


def test_tensorboards_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = open_search(str(tmp_path), write_search(tmp_path / "dogs", epochs=1).name)
    monkeypatch.setattr(module, "FLAGS", ("--no_such_flag",))
    with pytest.raises(RunFailed, match=r"^TensorBoard has ended: .*unrecognized arguments: --no_such_flag"):
        dashboard(search, 0)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that always says the same; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/api/version" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ray_line(capsys: pytest.CaptureFixture[str]) -> str:
    module._show("http://127.0.0.1:1")
    return capsys.readouterr().out.splitlines()[-1]


VERSION = b'{"version": "4", "ray_version": "2.60.0", "session_name": "session"}'


NONE = "Ray       no dashboard on this machine; for that of a cluster: ray dashboard cluster.yaml"


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (200, VERSION, "Ray       {}"),
        (401, b"Unauthorized", "Ray       {} (it asks for a token, which `ray get-auth-token` prints)"),
        (200, b"another program", NONE),
        (404, VERSION, NONE),
    ],
)
def test_rays_dashboard(
    status: int, body: bytes, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(status, body) as address:
        monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", f"{address}/")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which nobody answers at
        assert ray_line(capsys) == line.format(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "nonsense", "http://"])
def test_no_dashboard_of_rays(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", address)
    assert ray_line(capsys) == NONE


# --- an object store


def test_what_is_copied_from_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only TensorBoard's files, the new part of them, and nothing of trials that have ended."""
    there, here = write_search(tmp_path / "dogs", "running"), tmp_path / "copy"
    copied: set[str] = set()
    copy_events(Remote(there), here, copied)
    wanted = sorted(path.relative_to(there) for path in there.rglob("events.*"))
    assert len(wanted) == 6
    assert sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file()) == wanted
    assert all((here / path).read_bytes() == (there / path).read_bytes() for path in wanted)

    grown = next(path for path in wanted if NAMES[1] in str(path) and not path.name.endswith("hparams"))
    with (here / grown).open("rb") as reader:
        known = len(reader.read())
        write_epochs(there, 1, range(EPOCHS, EPOCHS + 1))  # a file of its own
        (there / grown).write_bytes((there / grown).read_bytes() + b"more")
        copy_events(Remote(there), here, copied)
        assert reader.read() == b"more"
    assert (here / grown).stat().st_size == known + 4
    assert len(list(here.rglob("events.*"))) == 7
    assert copied == set()

    entries = json.loads((there / "trials.json").read_text())
    (there / "trials.json").write_text(json.dumps([{**e, "state": "stopped"} for e in entries[:2]] + entries[2:]))
    copy_events(Remote(there), here, copied)
    assert copied == set(NAMES[:2])
    looked: list[str] = []
    names = Storage.names
    monkeypatch.setattr(Storage, "names", lambda self, folder="": looked.append(folder) or names(self, folder))
    copy_events(Remote(there), here, copied)
    assert looked == [f"trials/{NAMES[2]}"]


@pytest.mark.slow
def test_a_search_that_goes_on_in_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's curves grow as those in the store do; nothing is left at the end."""
    folder = write_search(tmp_path / "dogs", "running")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(results, "Storage", Remote)
    monkeypatch.setattr(module, "REFRESH_S", 0.5)
    search, port = open_search(str(tmp_path), "dogs"), free_port()
    assert search.storage.local is None
    seen: list[int] = []

    def watch() -> None:
        try:
            address = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run={NAMES[0]}&tag=val/loss"

            def steps() -> list[int]:
                return [step for _, step, _ in get(address)] if is_open(port) else []

            until(lambda: len(os.listdir(scratch)) == 1 and is_open(port))
            until(lambda: steps() == [*range(EPOCHS)])
            write_epochs(folder, 0, range(EPOCHS, EPOCHS + 1))
            until(lambda: steps() == [*range(EPOCHS + 1)])
            seen.extend(steps())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert dashboard(search, port) == 143
    watcher.join()
    assert seen == [*range(EPOCHS + 1)]
    assert not is_open(port)
    assert list(scratch.iterdir()) == []
    said = capfd.readouterr()
    assert f"settings  http://127.0.0.1:{port}/#hparams" in said.out.splitlines()
    assert said.err == ""


# --- what the HParams tab is told


def test_a_setting_that_changes_takes_the_place_of_the_old(tmp_path: Path) -> None:
    """As population based training does; told the same again, as a resumed trial does, the file stays."""
    run = Storage(tmp_path / "00-lr0.001")
    hparams(run, "00-lr0.001", {"lr": 0.001, "latent_dim": 16, "samples": 3}, Space.from_json(SPACE))
    (first,) = tmp_path.glob("*/*.hparams")
    old = first.stat().st_mtime_ns
    hparams(run, "00-lr0.001", {"samples": 3, "latent_dim": 16, "lr": 0.001}, Space.from_json(SPACE))
    assert first.stat().st_mtime_ns == old
    hparams(run, "00-lr0.001", {"lr": 0.002, "latent_dim": 16, "samples": 3}, Space.from_json(SPACE))
    (now,) = tmp_path.glob("*/*.hparams")
    events = EventAccumulator(str(now))
    events.Reload()
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = HParamsPluginData.FromString(content).session_start_info
    assert told.group_name == "00"
    assert {name: value.number_value for name, value in told.hparams.items()} == {
        "lr": 0.002,
        "latent_dim": 16,
        "samples": 3,
    }
