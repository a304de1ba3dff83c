"""The dashboard: TensorBoard's pages in a real browser, the printed links, object stores, and its end."""

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
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from tests.support.command import ROOT, wait_until
from tests.support.searches import PLAN, Remote, Spec, record, setting, write_search
from tune import dashboard
from tune.hparams import write_hparams
from tune.search_folder import open_search
from tune.trial import name_of

SETTINGS = [setting(), setting(64, 0.00064, 1), setting(16, 0.0053, 3)]
NAMES = [name_of(number, one) for number, one in enumerate(SETTINGS)]
EPOCHS = 12  # by default TensorBoard keeps only ten pictures
SCALARS = {
    *("val/loss", "val/reconstruction", "val/kl", "val/explained"),
    *("run/step", "run/images_per_s", "run/seconds"),
}


def trial_record(trial: int, epoch: int) -> dict[str, Any]:
    return record(epoch, 2000.0 + 10 * trial - 4 * epoch)


def pictures(epoch: int) -> dict[str, np.ndarray]:
    """Random pictures with the names and sizes of a small dataset's."""
    rng = np.random.default_rng(epoch)
    sizes = {"reconstructions": (70, 274), "samples": (138, 274), "walk": (138, 274)}
    return {name: rng.integers(0, 256, (3, *size), np.uint8) for name, size in sizes.items()}


def write_epochs(folder: Path, trial: int, epochs: range) -> None:
    before = [trial_record(trial, epoch) for epoch in range(epochs.start)]
    recorder = Recorder(Storage(folder / "trials" / NAMES[trial]), before)
    for epoch in epochs:
        recorder.record(trial_record(trial, epoch), pictures(epoch))
    recorder.close()


def write_running_search(folder: Path, state: str = "done", epochs: int = EPOCHS) -> Path:
    """The folder of a search, with the event files that training and `write_hparams` write."""
    plan = replace(PLAN, trials=len(SETTINGS))
    write_search(folder.parent, [Spec(one, state=state) for one in SETTINGS], plan, folder.name)
    for number, (name, one) in enumerate(zip(NAMES, SETTINGS, strict=True)):
        write_hparams(Storage(folder / f"trials/{name}"), name, one, PLAN.space)
        write_epochs(folder, number, range(epochs))
    return folder


def get(url: str) -> Any:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        return json.load(answer)


# --- the pages


@pytest.mark.slow
def test_pages_in_a_browser(tmp_path: Path) -> None:
    if not Path(CHROMIUM).exists():
        pytest.skip("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    write_running_search(tmp_path / "runs/dogs")
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
        for name in NAMES:  # a page does not update by itself: wait until TensorBoard has read everything
            last = f"{address}data/plugin/images/images?run={name}&tag=walk&sample=0"
            wait_until(lambda last=last: len(get(last)) == EPOCHS, 60)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.set_default_timeout(60_000)
            check_settings(page, links["settings"].strip(), tmp_path)
            check_curves(page, links["curves"].strip(), tmp_path)
            check_pictures(page, links["pictures"].strip(), tmp_path)
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


def check_settings(page: Any, link: str, shots: Path) -> None:
    """The table has a row for each trial with its settings and metrics; the parallel coordinates have a line."""
    page.goto(link)
    grid = page.locator("tf-hparams-table-view vaadin-grid")
    # Only the grid's shadow DOM knows the rows of the cells.
    read = """grid => [...grid.shadowRoot.querySelectorAll('#header tr, #items tr')].map(
        row => [...row.children].map(cell => cell.querySelector('slot').assignedNodes()[0]?.innerText.trim()))"""
    wait_until(lambda: len(grid.evaluate(read)) == 4, 60)
    header, *rows = grid.evaluate(read)
    page.screenshot(path=shots / "settings.png")
    parameters, metrics = ["latent_dim", "lr", "samples"], ["loss", "reconstruction", "KL", "explained", "seconds"]
    assert header == ["Trial ID", "Show Metrics", *parameters, *metrics]
    for number, (row, one) in enumerate(zip(rows, SETTINGS, strict=True)):
        last = trial_record(number, EPOCHS - 1)
        values = [*one.values(), *(last[f"val_{n}"] for n in ("loss", "reconstruction", "kl", "explained"))]
        assert row[0] == f"{number:02d}"
        assert [float(cell) for cell in row[2:10]] == pytest.approx([*values, last["seconds"]], rel=1e-4)

    page.get_by_text("parallel coordinates view").click()
    plot = page.locator("tf-hparams-parallel-coords-plot svg")
    wait_until(lambda: plot.locator(".foreground path").count() == len(SETTINGS), 60)
    page.screenshot(path=shots / "parallel.png")
    names = [text for text in plot.locator("text").all_text_contents() if not re.search(r"\d", text)]
    assert names == parameters + metrics


def check_curves(page: Any, link: str, shots: Path) -> None:
    """The validation curves, unsmoothed, have a line for each trial."""
    page.goto("about:blank")  # else only the part after # would change
    page.goto(link)
    card = page.locator("scalar-card").filter(has=page.locator("[title='val/loss']"))
    wait_until(lambda: card.locator("svg path").count() > 0 and card.get_by_text("1,956").count() > 0, 60)
    page.screenshot(path=shots / "curves.png")
    last = {name: trial_record(trial, EPOCHS - 1)["val_loss"] for trial, name in enumerate(NAMES)}
    lines = [" ".join(text.split()) for text in card.locator("table tr, tb-data-table-content-row").all_inner_texts()]
    for name, loss in last.items():
        assert any(line.startswith(f"{name} {loss:,g} {EPOCHS - 1} ") for line in lines), lines
    titles = page.locator("card-view tb-truncated-path").evaluate_all("all => all.map(tag => tag.title)")
    assert {"val/kl", "val/loss"} <= set(titles) <= {tag for tag in SCALARS if tag.startswith("val/")}
    assert page.get_by_label("smoothing").locator("visible=true").last.input_value() == "0"


def check_pictures(page: Any, link: str, shots: Path) -> None:
    """The reconstructions of every trial, with a slider over all epochs."""
    page.goto("about:blank")
    page.goto(link)
    cards = page.locator("tf-image-loader").filter(has_text="reconstructions")
    images = cards.locator("img")
    sizes = "all => all.map(image => [image.naturalWidth, image.naturalHeight])"
    wait_until(lambda: images.evaluate_all(sizes) == [[274, 70]] * len(NAMES), 60)
    page.screenshot(path=shots / "pictures.png")
    steps = "all => all.map(slider => slider.max + 1)"
    assert cards.locator("paper-slider").evaluate_all(steps) == [EPOCHS] * len(NAMES)


# --- the command


@pytest.mark.parametrize("port", ["taken", 70_000])
def test_port_that_cannot_be_used_is_refused(tmp_path: Path, port: Any) -> None:
    search = open_search(str(tmp_path), write_running_search(tmp_path / "dogs", epochs=1).name)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1] if port == "taken" else port
        with pytest.raises(UsageError) as error:
            dashboard.dashboard(search, port)
    assert str(error.value).startswith(f"--port {port}: ")
    assert str(error.value).endswith("; choose another, or leave --port out to get a free one")


def test_last_line_of_a_failing_tensorboard_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = open_search(str(tmp_path), write_running_search(tmp_path / "dogs", epochs=1).name)
    monkeypatch.setattr(dashboard, "FLAGS", ("--no_such_flag",))
    with pytest.raises(RunFailed, match=r"^TensorBoard has ended: .*unrecognized arguments: --no_such_flag"):
        dashboard.dashboard(search, 0)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that gives this answer to /api/version; its address."""

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
    dashboard._print_links("http://127.0.0.1:1")
    return capsys.readouterr().out.splitlines()[-1]


VERSION = b'{"version": "4", "ray_version": "2.60.0", "session_name": "session"}'
NONE = "Ray       no dashboard on this machine; for the one of a cluster: ray dashboard cluster.yaml"


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (200, VERSION, "Ray       {}"),
        (401, b"Unauthorized", "Ray       {} (it asks for a token, which `ray get-auth-token` prints)"),
        (200, b"another program", NONE),
        (404, VERSION, NONE),
    ],
)
def test_link_to_rays_dashboard(
    status: int, body: bytes, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(status, body) as address:
        monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", f"{address}/")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
        assert ray_line(capsys) == line.format(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "nonsense", "http://"])
def test_missing_dashboard_of_ray_says_how_to_open_one(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", address)
    assert ray_line(capsys) == NONE


# --- an object store


def test_only_new_bytes_are_copied_from_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended trials are not read again."""
    there, here = write_running_search(tmp_path / "dogs", "running"), tmp_path / "copy"
    copied: set[str] = set()
    dashboard.copy_events(Remote(there), here, copied)
    wanted = sorted(path.relative_to(there) for path in there.rglob("events.*"))
    assert len(wanted) == 6
    assert sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file()) == wanted
    assert all((here / path).read_bytes() == (there / path).read_bytes() for path in wanted)

    grown = next(path for path in wanted if NAMES[1] in str(path) and not path.name.endswith("hparams"))
    with (here / grown).open("rb") as reader:
        known = len(reader.read())
        write_epochs(there, 1, range(EPOCHS, EPOCHS + 1))  # a file of its own
        (there / grown).write_bytes((there / grown).read_bytes() + b"more")
        dashboard.copy_events(Remote(there), here, copied)
        assert reader.read() == b"more"
    assert (here / grown).stat().st_size == known + 4
    assert len(list(here.rglob("events.*"))) == 7
    assert copied == set()

    entries = json.loads((there / "trials.json").read_text())
    (there / "trials.json").write_text(json.dumps([{**e, "state": "stopped"} for e in entries[:2]] + entries[2:]))
    dashboard.copy_events(Remote(there), here, copied)
    assert copied == set(NAMES[:2])
    looked: list[str] = []
    names = Storage.names
    monkeypatch.setattr(Storage, "names", lambda self, folder="": looked.append(folder) or names(self, folder))
    dashboard.copy_events(Remote(there), here, copied)
    assert looked == [f"trials/{NAMES[2]}"]


@pytest.mark.slow
def test_curves_grow_with_a_running_search_on_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the temporary copy is deleted at the end."""
    folder = write_running_search(tmp_path / "dogs", "running")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr("tune.search_folder.Storage", Remote)
    monkeypatch.setattr(dashboard, "REFRESH_S", 0.5)
    search, port = open_search(str(tmp_path), "dogs"), free_port()
    assert search.storage.local is None
    seen: list[int] = []

    def watch() -> None:
        try:
            address = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run={NAMES[0]}&tag=val/loss"

            def steps() -> list[int]:
                return [step for _, step, _ in get(address)] if is_open(port) else []

            wait_until(lambda: len(os.listdir(scratch)) == 1 and is_open(port), 60)
            wait_until(lambda: steps() == [*range(EPOCHS)], 60)
            write_epochs(folder, 0, range(EPOCHS, EPOCHS + 1))
            wait_until(lambda: steps() == [*range(EPOCHS + 1)], 60)
            seen.extend(steps())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert dashboard.dashboard(search, port) == 143
    watcher.join()
    assert seen == [*range(EPOCHS + 1)]
    assert not is_open(port)
    assert list(scratch.iterdir()) == []
    said = capfd.readouterr()
    assert f"settings  http://127.0.0.1:{port}/#hparams" in said.out.splitlines()
    assert said.err == ""


# --- HParams


def test_changed_settings_replace_the_hparams_file(tmp_path: Path) -> None:
    """PBT changes settings. A resumed trial writes the same settings again: the file stays."""
    run = Storage(tmp_path / "00-lr0.001")
    write_hparams(run, "00-lr0.001", setting(), PLAN.space)
    (first,) = tmp_path.glob("*/*.hparams")
    old = first.stat().st_mtime_ns
    write_hparams(run, "00-lr0.001", dict(reversed(setting().items())), PLAN.space)
    assert first.stat().st_mtime_ns == old
    write_hparams(run, "00-lr0.001", setting(lr=0.002), PLAN.space)
    (now,) = tmp_path.glob("*/*.hparams")
    events = EventAccumulator(str(now))
    events.Reload()
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = HParamsPluginData.FromString(content).session_start_info
    assert told.group_name == "00"
    assert {name: value.number_value for name, value in told.hparams.items()} == setting(lr=0.002)
