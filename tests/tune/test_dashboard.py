"""The dashboard: TensorBoard's pages in a real browser, the printed links, object stores, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dogvae.errors import RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training.metrics import Recorder
from tests.support.browser import CHROMIUM, FLAGS, free_port, is_open
from tests.support.command import Command, wait_until
from tests.support.searches import PLAN, Remote, Spec, record, searched, setting, write_search
from tune import dashboard
from tune.hparams import write_hparams
from tune.search_folder import open_search
from tune.trial import name_of

SPECS = [Spec(one, state="running") for one in (setting(), setting(64, 0.00064, 1), setting(16, 0.0053, 3))]
NAMES = [name_of(number, spec.setting) for number, spec in enumerate(SPECS)]
EPOCHS = 12  # by default TensorBoard keeps only ten pictures
Capture = pytest.CaptureFixture[str]
VALIDATION = {"val/loss", "val/reconstruction", "val/kl", "val/explained"}
SCALARS = VALIDATION | {"workings/step", "workings/images_per_s", "workings/seconds"}


def trial_record(trial: int, epoch: int) -> dict[str, Any]:
    return record(epoch, 2000.0 + 10 * trial - 4 * epoch)


def pictures(epoch: int) -> dict[str, np.ndarray]:
    """Pictures of one random colour, with the names and sizes of a small dataset's."""
    rng = np.random.default_rng(epoch)
    sizes = {"reconstructions": (522, 1042), "samples, N(0, I)": (392, 1042), "walk": (132, 1042)}
    colours = {name: rng.integers(0, 256, (3, 1, 1), np.uint8) for name in sizes}
    return {name: np.broadcast_to(colours[name], (3, *size)) for name, size in sizes.items()}


def write_epochs(folder: Path, trial: int, epochs: range) -> None:
    before = [trial_record(trial, epoch) for epoch in range(epochs.start)]
    recorder = Recorder(Storage(folder / "trials" / NAMES[trial]), before)
    for epoch in epochs:
        recorder.record(trial_record(trial, epoch), pictures(epoch))
    recorder.close()


def write_events(folder: Path) -> Path:
    """Add the event files that training and `write_hparams` write; returns the search's folder."""
    for number, name in enumerate(NAMES):
        write_hparams(Storage(folder / f"trials/{name}"), f"best {number:02d}", SPECS[number].setting, PLAN.space)
        write_epochs(folder, number, range(EPOCHS))
    return folder


def get(url: str) -> Any:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        return json.load(answer)


# --- the pages


@pytest.mark.slow
def test_pages_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path(CHROMIUM).exists():
        pytest.skip("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    monkeypatch.delenv("RAY_DASHBOARD_ADDRESS", raising=False)
    write_events(write_search(tmp_path / "runs", SPECS))
    command = Command(tmp_path, "-m", "tune", "dashboard", "dogs")
    try:
        command.wait_for("\npictures  .*\n")
        links = dict(line.split(maxsplit=1) for line in command.text().splitlines())
        assert list(links) == ["starting", "settings", "curves", "pictures"], command.text()
        address = links["settings"].partition("#")[0]
        family = command.family()
        for name in NAMES:  # a page does not update by itself: wait until TensorBoard has read everything
            last = f"{address}data/plugin/images/images?run={name}&tag=view/walk&sample=0"
            wait_until(lambda last=last: len(get(last)) == EPOCHS, 60)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            page.set_default_timeout(60_000)
            check_settings(page, links["settings"], tmp_path)
            check_curves(page, links["curves"], tmp_path)
            check_pictures(page, links["pictures"], tmp_path)
            browser.close()
        tags = get(f"{address}data/plugin/scalars/tags")
        assert {run: set(named) for run, named in tags.items()} == dict.fromkeys(NAMES, SCALARS)
        command.process.send_signal(signal.SIGINT)
        assert command.wait(30) == 130
        assert command.text().splitlines()[len(links) :] == ["stopped"]
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert not is_open(int(re.findall(r":(\d+)", address)[0]))
    finally:
        command.stop()


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
    for number, row in enumerate(rows):
        last = trial_record(number, EPOCHS - 1)
        measured = [last[key] for key in ("val_loss", "val_reconstruction", "val_kl", "val_explained", "seconds")]
        assert row[0] == f"best {number:02d}"
        numbers = [*SPECS[number].setting.values(), *measured]
        assert [float(cell) for cell in row[2:10]] == pytest.approx(numbers, rel=1e-4)

    page.get_by_text("parallel coordinates view").click()
    plot = page.locator("tf-hparams-parallel-coords-plot svg")
    wait_until(lambda: plot.locator(".foreground path").count() == len(SPECS), 60)
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
        assert any(line.startswith(f"{name} {loss:,g} {EPOCHS} ") for line in lines), lines
    titles = page.locator("card-view tb-truncated-path").evaluate_all("all => all.map(tag => tag.title)")
    assert {"val/kl", "val/loss"} <= set(titles) <= VALIDATION
    assert page.get_by_label("smoothing").locator("visible=true").last.input_value() == "0"


def check_pictures(page: Any, link: str, shots: Path) -> None:
    """The reconstructions of every trial, with a slider over all epochs."""
    page.goto("about:blank")
    page.goto(link)
    cards = page.locator("tf-image-loader").filter(has_text="reconstructions")
    images = cards.locator("img")
    sizes = "all => all.map(image => [image.naturalWidth, image.naturalHeight])"
    wait_until(lambda: images.evaluate_all(sizes) == [[1042, 522]] * len(NAMES), 60)
    page.screenshot(path=shots / "pictures.png")
    steps = "all => all.map(slider => slider.max + 1)"
    assert cards.locator("paper-slider").evaluate_all(steps) == [EPOCHS] * len(NAMES)


# --- the command


@pytest.mark.parametrize("port", ["taken", 70_000])
def test_port_that_cannot_be_used_is_refused(tmp_path: Path, port: Any) -> None:
    search = searched(tmp_path, [])
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1] if port == "taken" else port
        message = rf"^--port {port}: .*; choose another, or leave --port out to get a free one$"
        with pytest.raises(UsageError, match=message):
            dashboard.dashboard(search, port)


def test_last_line_of_a_failing_tensorboard_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "FLAGS", ("--no_such_flag",))
    with pytest.raises(RunFailed, match=r"^TensorBoard has ended: .*unrecognized arguments: --no_such_flag"):
        dashboard.dashboard(searched(tmp_path, []), 0)


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
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


VERSION = b'{"version": "4", "ray_version": "2.60.0", "session_name": "session"}'


@pytest.mark.usefixtures("no_internet")
@pytest.mark.parametrize(
    ("address", "status", "body", "link"),
    [
        ("{}/", 200, VERSION, "{}"),
        ("{}/", 401, b"Unauthorized", "{} (it asks for a token, which `ray get-auth-token` prints)"),
        ("{}/", 200, b"another program", None),
        ("{}/", 404, VERSION, None),
        ("http://127.0.0.1:1", 200, VERSION, None),
        ("nonsense", 200, VERSION, None),
    ],
)
def test_link_to_rays_dashboard_is_printed_if_there_is_one(
    address: str, status: int, body: bytes, link: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with answering(status, body) as server:
        monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", address.format(server))
        dashboard._print_links("http://127.0.0.1:1")
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == (f"Ray       {link.format(server)}" if link else "pictures  http://127.0.0.1:1/#images")


# --- an object store


def test_only_new_bytes_are_copied_from_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended trials are not read again."""
    there, here = write_events(write_search(tmp_path, SPECS)), tmp_path / "copy"
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

    entries = (there / "trials.json").read_text()
    (there / "trials.json").write_text(entries.replace("running", "stopped", 2))
    dashboard.copy_events(Remote(there), here, copied)
    assert copied == set(NAMES[:2])
    looked: list[str] = []
    names = Storage.names
    monkeypatch.setattr(Storage, "names", lambda self, folder="": looked.append(folder) or names(self, folder))
    dashboard.copy_events(Remote(there), here, copied)
    assert looked == [f"trials/{NAMES[2]}"]


@pytest.mark.slow
def test_curves_grow_with_a_running_search_on_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    """And the temporary copy is deleted at the end."""
    folder = write_events(write_search(tmp_path, SPECS))
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
            wait_until(lambda: steps() == [*range(1, EPOCHS + 1)], 60)
            write_epochs(folder, 0, range(EPOCHS, EPOCHS + 1))
            wait_until(lambda: steps() == [*range(1, EPOCHS + 2)], 60)
            seen.extend(steps())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert dashboard.dashboard(search, port) == 143
    watcher.join()
    assert seen == [*range(1, EPOCHS + 2)]
    assert not is_open(port)
    assert list(scratch.iterdir()) == []
    said = capfd.readouterr()
    assert f"settings  http://127.0.0.1:{port}/#hparams" in said.out.splitlines()
    assert said.err == ""


# --- HParams


def test_changed_settings_replace_the_hparams_file(tmp_path: Path) -> None:
    """PBT changes settings. A resumed trial writes the same settings again: the file stays."""
    run = Storage(tmp_path / "00-lr0.001")
    write_hparams(run, "best 00", setting(), PLAN.space)
    (first,) = tmp_path.glob("*/*.hparams")
    old = first.stat().st_mtime_ns
    write_hparams(run, "best 00", dict(reversed(setting().items())), PLAN.space)
    assert first.stat().st_mtime_ns == old
    write_hparams(run, "best 00", setting(lr=0.002), PLAN.space)
    (now,) = tmp_path.glob("*/*.hparams")
    content = EventAccumulator(str(now)).Reload().SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = HParamsPluginData.FromString(content).session_start_info
    assert told.group_name == "best 00"
    assert {name: value.number_value for name, value in told.hparams.items()} == setting(lr=0.002)
