"""The playground: what its server computes and refuses, the command as a process, and the page in a real browser."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from fastapi import FastAPI
from PIL import Image

import dogvae
from dogvae.commands import cli, flags
from dogvae.data.drawn import draw
from dogvae.inference.model import METHODS, PRIORS, DogVAE
from dogvae.inference.playground import MOST_BYTES, SPAN, make_app
from dogvae.storage import Storage
from dogvae.training.export import export
from tests.support.browser import CHROMIUM, FLAGS, free_port, is_open
from tests.support.command import Command
from tests.support.runs import SIZE, job, make_dataset, train

SHAPE = (2, 4, 4)
MB = 2**20
Request = tuple[str, Any]  # where it goes, and what is sent: JSON, or bytes as they are


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a model that was trained for a moment, of a run that is called `dogs`."""
    where = tmp_path_factory.mktemp("playground")
    config = job(make_dataset(where / "dataset"), epochs=2, latent_dim=SHAPE[0])
    train(config, where / "dogs")
    return Path(export(Storage(where / "dogs"), config).uri)


@pytest.fixture(scope="module")
def model(folder: Path) -> DogVAE:
    return dogvae.load(folder, "cpu")


# --- the application, without a network


class Client:
    """Asks an application in this process; what is raised in it is raised here."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def ask(self, method: str, path: str, **what: Any) -> httpx.Response:
        async def answer() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://playground") as client:
                return await client.request(method, path, **what)

        return asyncio.run(answer())

    def send(self, path: str, body: Any) -> httpx.Response:
        """JSON with all that Python writes in it, NaN too; bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", f"/api/{path}", content=content, headers={"Content-Type": "application/json"})

    def good(self, path: str, body: Any) -> Any:
        answer = self.send(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def client(model: DogVAE) -> Client:
    async def decode(latents: np.ndarray) -> np.ndarray:
        return model.decode(latents)

    return Client(make_app(model, "dogs", decode))


def pack(latent: np.ndarray) -> str:
    return base64.b64encode(latent.astype("<f4").tobytes()).decode()


def unpack(dog: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(dog["latent"]), "<f4").reshape(SHAPE)


def pixels(url: str) -> np.ndarray:
    """(h, w, 3) uint8 of a picture as the page shows it."""
    start, _, data = url.partition(",")
    assert start == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Up to a step of brightness: a sum in another order is rounded otherwise."""
    return one.shape == other.shape and np.abs(one.astype(int) - other.astype(int)).max() <= 1


DOGS = [encoded(draw(i, 0, 100)) for i in (500, 501)]  # which the model was not trained with


def test_what_the_page_is_told(client: Client, model: DogVAE) -> None:
    answer = client.ask("GET", "/api/about")
    assert answer.status_code == 200
    about = answer.json()
    assert (about["name"], about["size"], about["latents"]) == ("dogs", SIZE, int(np.prod(SHAPE)))
    assert tuple(about["priors"]) == PRIORS
    assert np.array_equal(unpack(about["mean"]), model.mean)
    assert np.array_equal(pixels(about["mean"]["picture"]), model.decode(model.mean[None])[0])
    assert len(about["directions"]) == 12
    for i, ends in enumerate(about["directions"]):
        far = SPAN * model.scales[i] * model.directions[i]
        for end, latent in (("low", model.mean - far), ("high", model.mean + far)):
            assert same(pixels(ends[end]), model.decode(latent[None])[0])


def test_the_page_asks_for_nothing_from_elsewhere(client: Client) -> None:
    answer = client.ask("GET", "/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\([\"']?https?:", answer.text)


@pytest.mark.parametrize(
    ("n", "seed", "temperature", "prior"),
    [(12, 0, 1.0, "mixture"), (1, 2**53 - 1, 0.3, "gaussian"), (64, 7, 3, "normal"), (2, 5, 0, "mixture")],
)
def test_a_litter(client: Client, model: DogVAE, n: int, seed: int, temperature: float, prior: str) -> None:
    """The dogs that `model.sample` gives, with their latents."""
    wish = {"n": n, "seed": seed, "temperature": temperature, "prior": prior}
    dogs = client.good("sample", wish)["dogs"]
    assert np.array_equal([pixels(dog["picture"]) for dog in dogs], model.sample(n, seed, temperature, prior))
    assert np.array_equal([unpack(dog) for dog in dogs], model.sample_latents(n, seed, temperature, prior))


def test_a_litter_when_nothing_is_said(client: Client, model: DogVAE) -> None:
    assert np.array_equal([pixels(dog["picture"]) for dog in client.good("sample", {})["dogs"]], model.sample(12))


@pytest.mark.parametrize("shifts", [[], [1.5, -2.0], [SPAN, -SPAN] * 6])
def test_moving_a_dog(client: Client, model: DogVAE, shifts: list[float]) -> None:
    start = model.encode(np.asarray(draw(500, 0, SIZE)))[0]
    moved = start.copy()
    for i, shift in enumerate(shifts):
        moved += shift * model.scales[i] * model.directions[i]
    dog = client.good("move", {"latent": pack(start), "shifts": shifts})
    np.testing.assert_allclose(unpack(dog), moved, rtol=1e-5, atol=1e-5)
    assert same(pixels(dog["picture"]), model.decode(moved[None])[0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_photo(client: Client, model: DogVAE, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo"
    path.write_bytes(encoded(draw(500, 0, 150), kind))
    dog = client.good("photo", path.read_bytes())
    assert np.array_equal(pixels(dog["photo"]), model.prepared(path)[0])
    assert np.array_equal(pixels(dog["picture"]), model.reconstruct(path)[0])
    assert np.array_equal(unpack(dog), model.encode(path)[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_walk_meets_its_dogs(client: Client, model: DogVAE, method: str) -> None:
    stops = client.good("sample", {"n": 3, "seed": 4})["dogs"]
    steps = client.good("walk", {"latents": [dog["latent"] for dog in stops], "steps": 5, "method": method})["dogs"]
    assert len(steps) == 9
    assert steps[::4] == stops
    path = model.path(np.stack([unpack(dog) for dog in stops]), 5, method)
    assert np.array_equal([pixels(dog["picture"]) for dog in steps], model.decode(path))


def test_a_walk_as_an_animation(client: Client) -> None:
    """There and back, without end: twice the steps, without the two ends once more."""
    stops = client.good("sample", {"n": 3, "seed": 4})["dogs"]
    answer = client.send("walk.gif", {"latents": [dog["latent"] for dog in stops], "steps": 5})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "image/gif"
    assert "filename=walk.gif" in answer.headers["Content-Disposition"]
    animation = Image.open(io.BytesIO(answer.content))
    assert animation.size == (4 * SIZE, 4 * SIZE)
    assert animation.info["loop"] == 0
    shown = []
    for frame in range(animation.n_frames):
        animation.seek(frame)
        shown += [np.asarray(animation.convert("RGB"))] * (animation.info["duration"] // 50)  # same ones are merged
    assert len(shown) == 16
    for frame, dog in ((0, stops[0]), (4, stops[1]), (8, stops[2]), (12, stops[1])):
        assert np.abs(shown[frame][2::4, 2::4].astype(int) - pixels(dog["picture"])).mean() < 8  # of 256 colours only


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims to be so large, and has next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pieces = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


MEAN = pack(np.zeros(SHAPE))
NUMBERS = np.zeros(SHAPE, np.float32)
BAD: dict[str, Request] = {
    "no dogs": ("sample", {"n": 0}),
    "too many dogs": ("sample", {"n": 65}),
    "dogs that are no number": ("sample", {"n": "x"}),
    "half a dog": ("sample", {"n": 1.5}),
    "a number of 5000 digits": ("sample", b'{"n": ' + b"1" * 5000 + b"}"),
    "a negative seed": ("sample", {"seed": -1}),
    "a large seed": ("sample", {"seed": 2**60}),
    "temperature NaN": ("sample", {"temperature": float("nan")}),
    "temperature infinite": ("sample", {"temperature": float("inf")}),
    "temperature negative": ("sample", {"temperature": -1}),
    "temperature null": ("sample", {"temperature": None}),
    "an unknown prior": ("sample", {"prior": "uniform"}),
    "a prior of half a character": ("sample", {"prior": "\ud800"}),
    "a prior of many lines": ("sample", {"prior": "a\nb\n" * 100}),
    "a list": ("sample", []),
    "no JSON": ("sample", b"n=12"),
    "nothing": ("sample", b""),
    "not UTF-8": ("sample", b'{"prior": "\xff"}'),
    "deep JSON": ("sample", b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "5 MB of JSON": ("move", {"latent": "A" * 5 * MB}),
    "no latent": ("move", {"shifts": []}),
    "not base64": ("move", {"latent": "~~~~"}),
    "not ASCII": ("move", {"latent": "ä" * 172}),
    "a short latent": ("move", {"latent": pack(NUMBERS.ravel()[:-1])}),
    "a long latent": ("move", {"latent": pack(np.zeros(33))}),
    "an empty latent": ("move", {"latent": ""}),
    "NaN in the latent": ("move", {"latent": pack(np.full(SHAPE, np.nan))}),
    "infinity in the latent": ("move", {"latent": pack(np.full(SHAPE, np.inf))}),
    "too many shifts": ("move", {"latent": MEAN, "shifts": [0.0] * 13}),
    "shift NaN": ("move", {"latent": MEAN, "shifts": [float("nan")]}),
    "a far shift": ("move", {"latent": MEAN, "shifts": [1e9]}),
    "shifts that are no list": ("move", {"latent": MEAN, "shifts": 1}),
    "a walk of one dog": ("walk", {"latents": [MEAN]}),
    "a walk of nine dogs": ("walk", {"latents": [MEAN] * 9}),
    "a walk of one step": ("walk", {"latents": [MEAN] * 2, "steps": 1}),
    "a walk of many steps": ("walk", {"latents": [MEAN] * 2, "steps": 1000}),
    "a walk that jumps": ("walk", {"latents": [MEAN] * 2, "method": "jump"}),
    "a walk to nowhere": ("walk", {"latents": [MEAN, pack(np.full(SHAPE, np.nan))]}),
    "a round walk to nowhere": ("walk.gif", {"latents": [MEAN, pack(NUMBERS + np.inf)], "method": "spherical"}),
    "an animation of one dog": ("walk.gif", {"latents": [MEAN]}),
    "an empty photo": ("photo", b""),
    "a text for a photo": ("photo", b"this is a text file\n" * 10),
    "half a photo": ("photo", encoded(draw(1, 0, 200), "JPEG")[:2000]),
    "a decompression bomb": ("photo", png_header(30_000, 30_000)),
    "a smaller bomb": ("photo", png_header(12_000, 10_000)),
    "a photo of one row that never ends": ("photo", png_header(2**31 - 1, 1)),
    "PostScript": ("photo", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
}


def refused(answer: httpx.Response) -> str:
    """The line that says why."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:500])
    error = answer.json()
    assert error.keys() == {"error"}
    assert error["error"].strip()
    assert "\n" not in error["error"]
    return str(error["error"])


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_answered_with_a_line(client: Client, what: str) -> None:
    line = refused(client.send(*BAD[what]))
    assert len(line) < 1000
    assert len(client.good("sample", {"n": 1})["dogs"]) == 1


def test_an_error_does_not_repeat_what_was_sent(client: Client) -> None:
    for path, body in (("sample", {"prior": "x" * MB}), ("walk", {"latents": [MEAN] * 2, "method": "x" * MB})):
        assert len(refused(client.send(path, body))) < 1000


def test_a_photo_of_21_mb(client: Client) -> None:
    answer = client.send("photo", bytes(MOST_BYTES + 1))
    assert answer.status_code == 413
    assert "20 MB" in refused(answer)
    assert "known format" in refused(client.send("photo", bytes(MOST_BYTES)))  # as large as may be, but no photo


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404), ("GET", "/api/", 404), ("GET", "/api/../../etc/passwd", 404), ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404), ("GET", "/api/sample", 405), ("POST", "/", 405), ("DELETE", "/api/about", 405),
    ],
)  # fmt: skip
def test_an_address_that_is_none(client: Client, method: str, path: str, status: int) -> None:
    answer = client.ask(method, path)
    assert answer.status_code == status
    refused(answer)
    if status == 405:
        assert answer.headers["Allow"]  # RFC 9110 wants it said


def test_latents_out_of_this_world(client: Client) -> None:
    """The largest numbers are no dog, but no fault of the server's either."""
    far = pack(NUMBERS + np.finfo(np.float32).max)
    for path, body in (
        ("move", {"latent": far, "shifts": [3.0] * 12}),
        ("walk", {"latents": [far, MEAN], "steps": 3}),
        ("walk", {"latents": [far, pack(NUMBERS - np.finfo(np.float32).max)], "steps": 3, "method": "spherical"}),
    ):
        answer = client.send(path, body)
        if answer.status_code != 200:
            refused(answer)


# --- the command


class Playground(Command):
    """`dogvae playground ...` as a process, and its address."""

    def __init__(self, where: Path, *args: str) -> None:
        script = Path(sys.executable).with_name("dogvae")  # as pip installed it
        (where / "tmp").mkdir(parents=True)
        super().__init__(
            where, str(script), "playground", *args, "--device", "cpu", env={**os.environ, "TMPDIR": f"{where}/tmp"}
        )

    @property
    def address(self) -> str:
        self.wait_for("^playground  http://")
        return re.findall(r"^playground  (http://\S+:\d+)$", self.text(), re.M)[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    """One for all tests that do not end it, and which may say nothing but its address."""
    command = Playground(tmp_path_factory.mktemp("server") / "here", str(folder))
    try:
        address = command.address
        get(f"{address}/")
        yield command
        assert command.text() == f"playground  {address}\n"
    finally:
        command.stop()


def get(url: str, **what: Any) -> httpx.Response:
    return httpx.get(url, trust_env=False, verify=False, timeout=30, **what)


def post(url: str, timeout: float = 60, **what: Any) -> httpx.Response:
    return httpx.post(url, trust_env=False, verify=False, timeout=timeout, **what)


def test_a_name_that_is_not_ours(server: Playground, model: DogVAE) -> None:
    """A page from elsewhere may reach us by a name of its own, which it lets mean 127.0.0.1: that is refused."""
    for host in ("evil.example", f"evil.example:{server.port}", "localhost.evil.example", "127.0.0.1.evil.example"):
        assert get(f"{server.address}/api/about", headers={"Host": host}).status_code == 400
    for host in (f"localhost:{server.port}", "127.0.0.1", f"LOCALHOST:{server.port}"):
        assert get(f"{server.address}/api/about", headers={"Host": host}).json()["name"] == "dogs"
    dogs = post(f"{server.address}/api/sample", json={"n": 2, "seed": 3}).json()["dogs"]
    assert np.array_equal([pixels(dog["picture"]) for dog in dogs], model.sample(2, seed=3))


def endless(megabytes: int) -> Iterator[bytes]:
    for _ in range(megabytes):
        yield bytes(MB)


@pytest.mark.parametrize("path", ["photo", "sample", "move", "walk.gif"])
def test_100_mb_are_refused_while_they_come(server: Playground, path: str) -> None:
    """Not when they have all come: whoever can reach the page could fill the memory."""
    post(f"{server.address}/api/photo", content=DOGS[0])  # what the first photo takes is not counted
    before, most = server.memory(), 0
    with ThreadPoolExecutor(1) as other:
        upload = other.submit(post, f"{server.address}/api/{path}", content=endless(100))
        while not upload.done():
            most = max(most, server.memory())
            time.sleep(0.01)
        with suppress(httpx.TransportError):  # it hung up before we had said all
            assert upload.result().status_code == 413
    assert most - before < 70 * MB
    assert len(post(f"{server.address}/api/sample", json={"n": 3}).json()["dogs"]) == 3


@pytest.mark.slow
def test_photos_of_many_pixels_at_once(server: Playground) -> None:
    """100 kB of PNG are 36 million pixels, which is not too many for a photo; but only for one at a time."""
    photo = encoded(Image.new("RGB", (6000, 6000)))
    post(f"{server.address}/api/photo", content=photo)  # so that what one takes is known
    before, most = server.memory(), 0
    with ThreadPoolExecutor(10) as others:
        uploads = [others.submit(post, f"{server.address}/api/photo", 120, content=photo) for _ in range(10)]
        while not all(upload.done() for upload in uploads):
            most = max(most, server.memory())
            time.sleep(0.01)
        assert [upload.result().status_code for upload in uploads] == [200] * 10
    assert most - before < 500 * MB  # 108 MB each


def test_who_goes_away_while_speaking_is_not_talked_about(server: Playground) -> None:
    """A tab closed during an upload is no error, and leaves no traceback on the console."""
    for path in ("photo", "sample"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST /api/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
            time.sleep(0.2)
    assert post(f"{server.address}/api/sample", json={"n": 1}).status_code == 200
    time.sleep(0.3)
    assert server.text() == f"playground  {server.address}\n"


def test_it_ends_when_it_is_told_to(folder: Path, tmp_path: Path) -> None:
    """By Ctrl-C and by SIGTERM, with a browser still connected, on this machine's addresses and on all."""
    port = free_port()
    commands = {
        "all": (signal.SIGINT, Playground(tmp_path / "all", str(folder), "--host", "0.0.0.0", "--port", str(port))),
        "local": (signal.SIGTERM, Playground(tmp_path / "local", str(folder), "--host", "localhost")),
    }
    try:
        assert commands["all"][1].address == f"http://{socket.gethostname()}:{port}"  # where others find it
        for name, (signum, command) in commands.items():
            address = f"http://localhost:{command.port}"
            with httpx.Client(trust_env=False, base_url=address, timeout=30) as browser:
                assert browser.get("/").status_code == 200
                foreign = browser.get("/api/about", headers={"Host": "dogs.example"})
                assert foreign.status_code == (200 if name == "all" else 400)
                family = command.family()
                command.process.send_signal(signum)
                assert command.wait(20) == 128 + signum
            assert psutil.wait_procs(family, timeout=10)[1] == []
            assert not is_open(command.port)
            assert list((tmp_path / name / "tmp").iterdir()) == []
            lines = command.text().splitlines()
            assert lines[0] == f"playground  {command.address}"
            if name == "all":
                assert len(lines) == 2
                assert "whoever can reach this machine can use the page" in lines[1]
            else:
                assert len(lines) == 1
    finally:
        for _, command in commands.values():
            command.stop()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_in_the_middle_of_a_request(folder: Path, tmp_path: Path, signum: signal.Signals) -> None:
    command = Playground(tmp_path / "here", str(folder))
    try:
        walk = {"latents": [MEAN, pack(np.ones(SHAPE))] * 4, "steps": 64}
        address = command.address
        get(f"{address}/")
        with ThreadPoolExecutor(20) as others:
            for _ in range(20):
                others.submit(post, f"{address}/api/walk.gif", json=walk)
            time.sleep(0.5)
            began = time.monotonic()
            command.process.send_signal(signum)
            assert command.wait(20) == 128 + signum
            assert time.monotonic() - began < 10
        assert not is_open(int(address.rpartition(":")[2]))
        assert "Traceback" not in command.text()
    finally:
        command.stop()


@pytest.mark.slow
def test_it_answers_as_soon_as_it_says_where(folder: Path, tmp_path: Path) -> None:
    """Whoever clicks the address at once is not turned away."""
    command = Playground(tmp_path / "here", str(folder))
    try:
        while not (found := re.findall(r"^playground  (http://\S+:\d+)$", command.text(), re.M)):
            assert command.process.poll() is None
        assert get(f"{found[0]}/").status_code == 200
    finally:
        command.stop()


@pytest.mark.slow
def test_the_loopback_of_ipv6(folder: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    command = Playground(tmp_path / "here", str(folder), "--host", "::1")
    try:
        assert command.address == f"http://[::1]:{command.port}"
        assert get(f"{command.address}/api/about").json()["name"] == "dogs"
        assert get(f"{command.address}/api/about", headers={"Host": "evil.example"}).status_code == 400
    finally:
        command.stop()


@pytest.mark.slow
def test_a_locale_that_is_not_utf8(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is UTF-8 whatever the machine speaks."""
    for name, value in (("LC_ALL", "C"), ("PYTHONCOERCECLOCALE", "0"), ("PYTHONUTF8", "0")):
        monkeypatch.setenv(name, value)
    command = Playground(tmp_path / "here", str(folder))
    try:
        page = get(f"{command.address}/")
        assert page.status_code == 200
        assert "Waking the model…" in page.text
    finally:
        command.stop()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--port", "-1"], "--port -1: must be from 0 to 65535"),
        (["--port", "x"], "--port"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),  # a network for documentation: nobody's address
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", ".".join(["a" * 70] * 2)], "--host aaa"),
        (["--device", "abacus"], "--device"),
    ],
)
def test_a_place_that_cannot_be_had(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    assert flags.run(cli._main, ["playground", str(folder), "--device", "cpu", *args]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {says}") or line.startswith(f"error: argument {says}")


def test_what_is_no_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nowhere", folder.parent):
        assert flags.run(cli._main, ["playground", str(path)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert line.startswith(f"error: {path} is no exported model")


def test_a_port_that_is_taken(server: Playground, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = server.port
    assert flags.run(cli._main, ["playground", str(folder), "--port", str(port)]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"error: --host 127.0.0.1 --port {port}: Address already in use\n")


@pytest.mark.slow
def test_two_that_want_the_same_port(folder: Path, tmp_path: Path) -> None:
    """Started at the same time, while neither listens yet: one gets it, the other says so."""
    port = free_port()
    commands = [Playground(tmp_path / name, str(folder), "--port", str(port)) for name in ("one", "other")]
    try:
        end = time.monotonic() + 60
        while all(command.process.poll() is None for command in commands):
            assert time.monotonic() < end, [command.text() for command in commands]
            time.sleep(0.05)
        (loser,) = [command for command in commands if command.process.poll() is not None]
        (winner,) = [command for command in commands if command is not loser]
        assert loser.process.returncode == 2
        assert loser.text() == f"error: --host 127.0.0.1 --port {port}: Address already in use\n"
        assert get(f"{winner.address}/").status_code == 200
    finally:
        for command in commands:
            command.stop()


# --- the page in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        pytest.skip("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


class Page:
    """The page in a context of its own, what it asked the server for, and what it complained of on its console."""

    def __init__(self, context: Any, address: str) -> None:
        self.address = address
        self.context = context
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.moving = self.most_moving = 0
        self.page = context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._request)
        self.page.on("requestfinished", self._finished)
        self.page.on("requestfailed", self._finished)

    def _request(self, request: Any) -> None:
        assert request.url.startswith((self.address, "data:", "blob:")), request.url
        self.asked += re.findall("/api/(.*)", request.url)
        self.moving += request.url.endswith("/api/move")
        self.most_moving = max(self.most_moving, self.moving)

    def _finished(self, request: Any) -> None:
        self.moving -= request.url.endswith("/api/move")

    def open(self) -> None:
        self.page.goto(self.address)
        self.page.wait_for_selector("#litter .tile:nth-child(12) img[src^=data]")

    def src(self, selector: str) -> str:
        return str(self.page.get_attribute(selector, "src"))

    def litter(self) -> list[str]:
        return [str(image.get_attribute("src")) for image in self.page.locator("#litter img").all()]

    def until(self, what: Any, seconds: float = 20) -> None:
        """The page's policy forbids eval, which playwright's own waiting for a condition needs."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end
            self.page.wait_for_timeout(30)

    def status(self) -> str:
        return str(self.page.inner_text("#status"))

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.id"))


@pytest.fixture
def page(browser: Any, server: Playground) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    page = Page(context, server.address)
    page.open()
    yield page
    assert page.complaints == []
    context.close()


def latent_of_your_dog(page: Page) -> str:
    """The page opens with the first dog of a litter, whose seed it shows."""
    wish = {"n": 12, "seed": int(page.page.input_value("#seed"))}
    return str(post(f"{page.address}/api/sample", json=wish).json()["dogs"][0]["latent"])


def test_sliders(page: Page, server: Playground) -> None:
    """By keyboard: another picture, that of the slider's last value, and back to the first one."""
    first = page.src("#dog")
    assert first == page.litter()[0]
    page.page.focus("#shift-0")
    for _ in range(7):
        page.page.keyboard.press("ArrowRight")
    shifts = [0.7, *[0.0] * 11]
    assert page.page.input_value("#shift-0") == "0.7"
    wanted = post(f"{server.address}/api/move", json={"latent": latent_of_your_dog(page), "shifts": shifts}).json()
    page.until(lambda: page.src("#dog") == wanted["picture"])
    assert wanted["picture"] != first

    page.page.keyboard.press("Tab")  # to the button that says 0.7
    page.page.keyboard.press("Enter")
    page.until(lambda: page.src("#dog") == first)
    assert (page.focused(), page.page.input_value("#shift-0")) == ("shift-0", "0")

    page.page.get_by_text("4 more").click()
    page.page.fill("#shift-11", "-3")
    page.page.fill("#shift-1", "3")
    page.until(lambda: page.src("#dog") != first)
    page.page.click("#reset")
    page.until(lambda: page.src("#dog") == first)
    with page.page.expect_download() as download:
        page.page.click("#download")
    assert download.value.suggested_filename == "dog.png"
    assert Image.open(download.value.path()).size == (512, 512)


def test_dragging_a_slider(page: Page) -> None:
    """Never two requests at a time, however fast the mouse is, and at its end the picture of the end."""
    box = page.page.locator("#shift-0").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.page.mouse.move(x, y)
    page.page.mouse.down()
    page.page.mouse.move(x + box["width"] / 3, y, steps=50)
    page.page.mouse.up()
    shift = float(page.page.input_value("#shift-0"))
    assert shift > 1.5
    wanted = post(
        f"{page.address}/api/move", json={"latent": latent_of_your_dog(page), "shifts": [shift, *[0.0] * 11]}
    ).json()
    page.until(lambda: page.src("#dog") == wanted["picture"])
    assert 1 <= page.asked.count("move") <= 50
    assert page.most_moving == 1


def test_litters_and_the_shelf(page: Page) -> None:
    first, seed = page.litter(), page.page.input_value("#seed")
    assert len(set(first)) == 12
    for _ in range(100):
        page.page.keyboard.press("Tab")
        if page.focused() == "new-litter":
            break
    page.page.keyboard.press("Enter")
    page.until(lambda: not set(first) & set(page.litter()))
    assert page.page.input_value("#seed") != seed
    page.page.fill("#seed", seed)
    page.until(lambda: page.litter() == first)
    page.page.keyboard.press("n")  # typed into the seed it is no wish
    assert page.page.input_value("#seed") == seed
    page.page.focus("#shift-2")
    page.page.keyboard.press("n")
    page.until(lambda: not set(first) & set(page.litter()))

    second = page.litter()
    page.page.select_option("#prior", "normal")
    page.until(lambda: not set(second) & set(page.litter()))
    page.page.select_option("#prior", "mixture")
    page.until(lambda: page.litter() == second)
    page.page.fill("#temperature", "0")
    page.until(lambda: not set(second) & set(page.litter()))
    assert page.page.inner_text("#degrees") == "0.00"
    page.page.fill("#temperature", "1")
    page.until(lambda: page.litter() == second)

    page.page.locator("#litter button").nth(2).click()
    page.until(lambda: page.src("#dog") == second[2])
    page.page.click("#keep")
    assert page.page.locator("#litter .pin").nth(2).is_checked()
    page.page.locator("#litter .pin").nth(5).check()
    page.page.locator("#litter .pin").nth(6).check()
    page.page.locator("#litter .pin").nth(6).uncheck()
    kept = page.page.locator("#shelf img")
    assert [image.get_attribute("src") for image in kept.all()] == [second[2], second[5]]
    page.page.reload()
    page.page.wait_for_selector("#litter .tile:nth-child(12) img[src^=data]")
    assert [image.get_attribute("src") for image in kept.all()] == [second[2], second[5]]
    page.page.locator("#shelf .pic").nth(1).click()
    page.until(lambda: page.src("#dog") == second[5])
    page.page.locator("#shelf button[title=remove]").first.click()
    assert [image.get_attribute("src") for image in kept.all()] == [second[5]]
    assert page.page.evaluate("document.activeElement.title") == "remove"  # of the next one: the keyboard is not lost


def test_photos_and_the_walk_between_them(page: Page, model: DogVAE, tmp_path: Path) -> None:
    for name, data in zip(("a.png", "b.png"), DOGS, strict=True):
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    page.page.set_input_files("#photos", paths)
    page.page.wait_for_selector("#frame[src]")
    ends = [model.reconstruct(path)[0] for path in paths]
    for slot, end in zip(("#walk-from img", "#walk-to img"), ends, strict=True):
        assert np.array_equal(pixels(page.src(slot)), end)
    assert page.page.locator("#shelf .photo img").count() == 4

    page.page.focus("#walk")
    asked = len(page.asked)
    frames = []
    for key, at in (("Home", "0"), ("ArrowRight", "1"), ("End", "32")):
        page.page.keyboard.press(key)
        assert page.page.input_value("#walk") == at
        frames.append(pixels(page.src("#frame")))
    page.page.fill("#walk", "16")
    middle = pixels(page.src("#frame"))
    assert np.array_equal(frames[0], ends[0])
    assert np.array_equal(frames[2], ends[1])
    assert not any(np.array_equal(middle, end) for end in ends)
    assert len(page.asked) == asked  # all steps are here already

    with page.page.expect_download() as download:
        page.page.click("#gif")
    assert download.value.suggested_filename == "walk.gif"
    animation = Image.open(download.value.path())
    durations = []
    for frame in range(animation.n_frames):
        animation.seek(frame)
        durations.append(animation.info["duration"])
    assert sum(durations) == 64 * 50
    with page.page.expect_download() as download:
        page.page.click("#download-frame")
    assert Image.open(download.value.path()).size == (512, 512)

    page.page.click("#play")
    page.until(lambda: page.page.input_value("#walk") != "16")
    page.page.click("#play")
    straight = page.src("#frame")
    page.page.select_option("#method", "spherical")
    page.until(lambda: page.src("#frame") != straight)
    assert page.asked.count("walk") == 2
    page.page.click("#take")
    assert page.src("#dog") == page.src("#frame")

    litter = page.litter()
    page.page.click("#walk-from")
    page.page.keyboard.press("Escape")
    page.page.click("#walk-from")
    page.page.locator("#litter button").nth(8).click()
    page.page.click("#use-to")
    assert page.src("#walk-from img") == litter[8]
    page.page.fill("#walk", "0")
    page.until(lambda: page.src("#frame") == litter[8])
    page.page.fill("#walk", "32")
    page.until(lambda: page.src("#frame") == page.src("#dog"))


def test_files_that_are_no_photos(page: Page, model: DogVAE, tmp_path: Path) -> None:
    """A line says which and why, also one with a hostile name; those that are photos are taken."""
    name = "<img src=x onerror=alert(1)>.txt"
    for file, content in ((name, b"a text"), ("dog.png", DOGS[0]), ("large.jpg", bytes(MOST_BYTES + 1))):
        (tmp_path / file).write_bytes(content)
    page.page.set_input_files("#photos", [tmp_path / file for file in (name, "dog.png", "large.jpg")])
    page.until(lambda: "larger than 20 MB" in page.status())
    assert f"{name}: this photo cannot be used: not an image of a known format" in page.status()
    assert np.array_equal(pixels(page.src("#walk-from img")), model.reconstruct(Image.open(io.BytesIO(DOGS[0])))[0])
    assert page.asked.count("photo") == 2  # the large one stays at home
    before = page.litter()
    page.page.click("#new-litter")
    page.until(lambda: not set(before) & set(page.litter()))
    # What the browser itself writes about an answer of 400.
    page.complaints = [line for line in page.complaints if "responded with a status of 400" not in line]


def test_dropping_a_photo(page: Page, model: DogVAE) -> None:
    script = """(data) => {
        const carried = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        carried.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
        return carried;
    }"""
    carried = page.page.evaluate_handle(script, base64.b64encode(DOGS[1]).decode())
    page.page.dispatch_event("h1", "dragover", {"dataTransfer": carried})
    page.page.dispatch_event("h1", "drop", {"dataTransfer": carried})
    page.page.wait_for_selector("#shelf .photo")
    assert np.array_equal(pixels(page.src("#walk-from img")), model.reconstruct(Image.open(io.BytesIO(DOGS[1])))[0])


def test_a_server_in_trouble(page: Page) -> None:
    """Its own words are shown; what was on the page stays; and when it is back the page goes on."""
    before = page.litter()
    answer = {"status": 500, "content_type": "application/json", "body": '{"error": "out of memory"}'}
    page.page.route("**/api/sample", lambda route: route.fulfill(**answer))
    page.page.click("#new-litter")
    page.until(lambda: page.status() == "out of memory")
    assert page.litter() == before
    page.page.unroute("**/api/sample")
    page.page.route("**/api/move", lambda route: route.abort())
    page.page.focus("#shift-0")
    page.page.keyboard.press("ArrowRight")
    page.until(lambda: "does not answer" in page.status())
    page.page.unroute("**/api/move")
    before_move = page.src("#dog")
    page.page.keyboard.press("ArrowRight")
    page.until(lambda: page.src("#dog") != before_move)
    page.page.click("#new-litter")
    page.until(lambda: not set(before) & set(page.litter()))
    page.complaints = [line for line in page.complaints if "Failed to load resource" not in line]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone(browser: Any, server: Playground, scheme: str) -> None:
    """Nothing is wider than 360 pixels, also not with all of it open and in use."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page = Page(context, server.address)
    page.open()
    files = [{"name": "a" * 120 + ".png", "mimeType": "image/png", "buffer": dog} for dog in DOGS]
    page.page.set_input_files("#photos", files)
    page.page.wait_for_selector("#frame[src]")
    page.page.get_by_text("4 more").tap()
    page.page.locator("#litter button").first.tap()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 360
    wide = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 360).map(e => e.id)"
    assert page.page.evaluate(wide) == []
    assert page.complaints == []
    context.close()
