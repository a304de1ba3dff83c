"""`dogvae playground` as a process: addresses, limits on memory, how it ends, and mistakes."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from dogvae.inference.model import DogVAE
from dogvae.inference.playground_server import usual_listener
from tests.support.browser import free_port, is_open
from tests.support.cli import refused
from tests.support.exports import LATENT, Exported
from tests.support.images import encoded, pixels
from tests.support.playground import ADDRESS, PHOTOS, Playground, pack, playground

MB = 2**20


def test_foreign_host_names_are_refused(server: Playground, model: DogVAE) -> None:
    """Against DNS rebinding: a foreign page could point its own host name at 127.0.0.1."""
    for host in ("evil.example", f"evil.example:{server.port}", "localhost.evil.example", "127.0.0.1.evil.example"):
        assert server.get("/api/about", headers={"Host": host}).status_code == 400
    for host in (f"localhost:{server.port}", "127.0.0.1", f"LOCALHOST:{server.port}"):
        assert server.get("/api/about", headers={"Host": host}).json()["name"] == "dogs"
    dogs = server.post("sample", json={"n": 2, "seed": 3}).json()["dogs"]
    assert np.array_equal([pixels(dog["picture"]) for dog in dogs], model.sample(2, seed=3))


def test_post_of_another_sites_page_is_refused(server: Playground) -> None:
    ours = (f"http://localhost:{server.port}", f"http://127.0.0.1:{server.port}")
    for origin in ("https://evil.example", "null", f"http://localhost:{server.port + 1}", f"{ours[0]}.example", "x"):
        answer = server.post("sample", json={"n": 1}, headers={"Origin": origin})
        assert (answer.status_code, answer.json()["error"]) == (403, f"a page of {origin} may not use this playground")
    for origin in ours:
        headers = {"Origin": origin, "Host": origin.removeprefix("http://")}
        assert server.post("sample", json={"n": 1}, headers=headers).status_code == 200


def growth(server: Playground, requests: list[Future[httpx.Response]]) -> int:
    """The bytes by which the server's memory grows until all requests are answered."""
    process = psutil.Process(server.process.pid)
    before = most = process.memory_info().rss
    while not all(request.done() for request in requests):
        most = max(most, process.memory_info().rss)
        time.sleep(0.01)
    return most - before


def zeros(megabytes: int) -> Iterator[bytes]:
    for _ in range(megabytes):
        yield bytes(MB)


@pytest.mark.parametrize("path", ["photo", "sample", "move", "walk.gif"])
def test_body_of_100_mb_is_refused_before_it_fills_the_memory(server: Playground, path: str) -> None:
    server.post("photo", content=PHOTOS[0])  # the first photo takes memory once
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(server.post, path, content=zeros(100))
        assert growth(server, [upload]) < 70 * MB
    with suppress(httpx.TransportError):  # the server closes the connection while the client is still sending
        assert upload.result().status_code == 413
    assert len(server.post("sample", json={"n": 3}).json()["dogs"]) == 3


@pytest.mark.slow
def test_photos_of_many_pixels_are_decoded_one_at_a_time(server: Playground) -> None:
    """A PNG file of 100 kB has 36 million pixels, which take 108 MB."""
    photo = encoded(Image.new("RGB", (6000, 6000)))
    server.post("photo", content=photo)  # the first photo takes memory once
    with ThreadPoolExecutor(10) as pool:
        uploads = [pool.submit(server.post, "photo", 120, content=photo) for _ in range(10)]
        assert growth(server, uploads) < 500 * MB
    assert [upload.result().status_code for upload in uploads] == [200] * 10


def test_client_that_disconnects_during_an_upload_is_not_logged(server: Playground) -> None:
    for path in ("photo", "sample"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST /api/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
            time.sleep(0.2)
    assert server.post("sample", json={"n": 1}).status_code == 200
    time.sleep(0.3)
    assert server.text() == f"playground  {server.address}\n"


@pytest.mark.parametrize(
    ("host", "signum", "foreign_status"), [("0.0.0.0", signal.SIGINT, 200), ("localhost", signal.SIGTERM, 400)]
)
def test_signal_ends_the_server_while_a_browser_is_connected(
    host: str, signum: signal.Signals, foreign_status: int, exported: Exported, tmp_path: Path
) -> None:
    """On this machine's addresses only, and on all addresses, where any host name is accepted and a line warns."""
    port = free_port()
    with playground(tmp_path / "here", exported.folder, "--host", host, "--port", port) as command:
        name = socket.gethostname() if host == "0.0.0.0" else host
        printed = f"playground  http://{name}:{port}\n"
        if host == "0.0.0.0":
            printed += (
                "listening on 0.0.0.0: anyone who can reach this machine can use the page, and upload photos to it\n"
            )
        command.wait_for("^playground")
        with httpx.Client(trust_env=False, base_url=f"http://localhost:{port}", timeout=30) as browser:
            assert browser.get("/").status_code == 200
            assert browser.get("/api/about", headers={"Host": "dogs.example"}).status_code == foreign_status
            family = command.family()
            command.process.send_signal(signum)
            assert command.wait(20) == 128 + signum
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert not is_open(port)
        assert list((tmp_path / "here/tmp").iterdir()) == []
        assert command.text() == f"{printed}stopped\n"


def test_open_opens_the_page(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only with --open. A machine without a browser says so."""
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    with playground(tmp_path / "closed", exported.folder) as command:
        assert command.get().status_code == 200
        assert not opened.exists()
    with playground(tmp_path / "here", exported.folder, "--open") as command:
        address = command.address
        command.wait_until(lambda: opened.exists() and opened.read_text())
        assert opened.read_text() == f"{address}\n"
        assert command.text() == f"playground  {address}\n"
    monkeypatch.setenv("BROWSER", "false %s")
    with playground(tmp_path / "none", exported.folder, "--open") as command:
        command.wait_for("--open: this machine has no browser")
        assert command.get().status_code == 200


def test_port_of_a_model_stays_the_same() -> None:
    """A browser keeps the shelf for an address. While the port is taken, another one is used."""
    with usual_listener("127.0.0.1", "runs/some/export") as first:
        port = first.getsockname()[1]
        with usual_listener("127.0.0.1", "runs/some/export") as second:
            assert second.getsockname()[1] != port
    with usual_listener("127.0.0.1", "runs/some") as again, usual_listener("127.0.0.1", "runs/other/export") as other:
        assert again.getsockname()[1] == port != other.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_server_during_long_requests(
    exported: Exported, tmp_path: Path, signum: signal.Signals
) -> None:
    walk = {"latents": [pack(np.zeros(LATENT)), pack(np.ones(LATENT))] * 4, "steps": 64}
    with playground(tmp_path / "here", exported.folder) as command, ThreadPoolExecutor(20) as pool:
        command.get()
        port = command.port
        for _ in range(20):
            pool.submit(command.post, "walk.gif", json=walk)
        time.sleep(0.5)
        began = time.monotonic()
        command.process.send_signal(signum)
        assert command.wait(20) == 128 + signum
        assert time.monotonic() - began < 10
        assert not is_open(port)
        assert "Traceback" not in command.text()


@pytest.mark.slow
def test_server_answers_as_soon_as_its_address_is_printed(exported: Exported, tmp_path: Path) -> None:
    with playground(tmp_path / "here", exported.folder) as command:
        while not (found := re.findall(ADDRESS, command.text(), re.M)):
            assert command.process.poll() is None
        assert httpx.get(f"{found[0]}/", trust_env=False, timeout=30).status_code == 200


@pytest.mark.slow
def test_server_on_the_ipv6_loopback(exported: Exported, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    with playground(tmp_path / "here", exported.folder, "--host", "::1") as command:
        assert command.address == f"http://[::1]:{command.port}"
        assert command.get("/api/about").json()["name"] == "dogs"
        assert command.get("/api/about", headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.slow
def test_page_is_utf8_in_any_locale(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LC_ALL", "C"), ("PYTHONCOERCECLOCALE", "0"), ("PYTHONUTF8", "0")):
        monkeypatch.setenv(name, value)
    with playground(tmp_path / "here", exported.folder) as command:
        assert "Loading the model…" in command.get().text


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--port", "-1"], "--port -1: must be from 0 to 65535"),
        (["--port", "x"], "argument --port"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),  # TEST-NET-1: the address of no machine
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", ".".join(["a" * 70] * 2)], "--host aaa"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_unusable_argument_is_refused_with_one_line(
    exported: Exported, capsys: pytest.CaptureFixture[str], args: list[str], error: str
) -> None:
    line = refused(capsys, "playground", exported.folder, "--device", "cpu", *args)
    assert line.startswith(f"error: {error}")


def test_folder_without_an_export_is_refused(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{exported.dataset} is not an exported model" in refused(capsys, "playground", exported.dataset)


def test_port_in_use_is_refused(server: Playground, exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "playground", exported.folder, "--port", server.port)
    assert line == f"error: --host 127.0.0.1 --port {server.port}: Address already in use\n"


@pytest.mark.slow
def test_second_server_on_a_port_is_refused_while_the_first_still_loads(exported: Exported, tmp_path: Path) -> None:
    port = free_port()
    args = (exported.folder, "--port", port)
    with playground(tmp_path / "one", *args) as one, playground(tmp_path / "other", *args) as other:
        end = time.monotonic() + 60
        while one.process.poll() is None and other.process.poll() is None:
            assert time.monotonic() < end, one.text() + other.text()
            time.sleep(0.05)
        loser, winner = (one, other) if one.process.poll() is not None else (other, one)
        assert loser.process.returncode == 2
        assert loser.text() == f"error: --host 127.0.0.1 --port {port}: Address already in use\n"
        assert winner.get().status_code == 200
