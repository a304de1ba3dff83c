"""The playground on a Ray cluster: many at once, each gets its own dogs; and what is left when it is stopped."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from pydantic import ValidationError

import dogvae
from dogvae.inference.model import DogVAE
from dogvae.inference.playground import PAGE
from dogvae.storage import Storage
from dogvae.training.export import export
from tests.support.command import Command
from tests.support.runs import job, make_dataset, train

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own, about pydantic
    from dogvae.inference.serve import Arguments, Playground, app

AT_ONCE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a model that was trained for a moment, in a run called `dogs`."""
    where = tmp_path_factory.mktemp("serve")
    config = job(make_dataset(where / "dataset"), epochs=4, latent_dim=2, lr=1e-2)
    train(config, where / "dogs")
    return Path(export(Storage(where / "dogs"), config).uri)


@pytest.fixture(scope="module")
def model(folder: Path) -> DogVAE:
    return dogvae.load(folder, "cpu")


# --- without a cluster


def test_requests_that_are_decoded_together_are_taken_apart(model: DogVAE) -> None:
    """As on a GPU, where a batch has several requests of several dogs each."""
    requests = [model.sample_latents(n, seed=n) for n in (3, 1, 5)]
    together = Playground.decode_together.__wrapped__  # what Serve calls with a batch
    parts = asyncio.run(together(SimpleNamespace(model=model), requests))
    assert [len(part) for part in parts] == [3, 1, 5]
    for part, n in zip(parts, (3, 1, 5), strict=True):
        assert np.array_equal(part, model.sample(n, seed=n))


def test_arguments_are_checked() -> None:
    """They come as words: `serve run dogvae.serve:app export=... replicas=2 gpus=0.5`."""
    arguments = Arguments.model_validate({"export": "runs/dogs/export", "replicas": "2", "gpus": "0.5"})
    assert (arguments.export, arguments.gpus) == ("runs/dogs/export", 0.5)
    with pytest.raises(ValidationError, match="export"):
        Arguments.model_validate({})
    with pytest.raises(ValidationError, match="gpus"):
        Arguments.model_validate({"export": "x", "gpus": "some"})


@pytest.mark.parametrize("replicas", [2, "auto"])
def test_replicas_are_as_many_as_were_wished(replicas: int | str) -> None:
    deployment = app(Arguments(export="x", replicas=replicas, gpus=0.25))._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == 0.25
    if replicas == "auto":
        assert deployment._deployment_config.autoscaling_config is not None
    else:
        assert deployment.num_replicas == 2


def test_replicas_that_were_typed_are_a_number() -> None:
    arguments = Arguments.model_validate({"export": "x", "replicas": "2"})
    assert app(arguments)._bound_deployment.num_replicas == 2


# --- on a cluster


class Site:
    """A running `serve run`, and where it answers."""

    def __init__(self, command: Command, port: int) -> None:
        self.command = command
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def answers(self) -> bool:
        try:
            return self.client.get("/").status_code == 200
        except httpx.TransportError:
            return False

    def sample(self, **wish: Any) -> np.ndarray:
        answer = self.client.post("/api/sample", json=wish)
        assert answer.status_code == 200, answer.text
        return np.stack([pixels(dog["picture"]) for dog in answer.json()["dogs"]])


@pytest.fixture(scope="module")
def site(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Like `serve run dogvae.serve:app export=...`, but on a port that nobody has."""
    where = tmp_path_factory.mktemp("site")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"import_path": "dogvae.serve:app", "args": {"export": str(folder)}}],
    }
    (where / "serve.yaml").write_text(json.dumps(config))  # JSON is YAML
    script = Path(sys.executable).with_name("serve")
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    running = Site(Command(where, str(script), "run", "serve.yaml", env=env), port)
    try:
        running.command.wait_until(running.answers, 240)
        yield running
    finally:
        running.client.close()
        running.command.stop()


def pixels(url: str) -> np.ndarray:
    head, data = url.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.slow
def test_page_is_served(site: Site) -> None:
    page = site.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert page.text == PAGE.read_text()
    assert site.client.get("/api/about").json()["name"] == "dogs"


@pytest.mark.slow
def test_samples_are_those_of_the_model(site: Site, model: DogVAE) -> None:
    for wish in ({"n": 5, "seed": 3}, {"n": 2, "seed": 3, "prior": "normal", "temperature": 0.5}):
        assert np.array_equal(site.sample(**wish), model.sample(**wish))


@pytest.mark.slow
def test_many_at_once_get_their_own_dogs(site: Site, model: DogVAE) -> None:
    """More than a replica takes at once; of different sizes."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda i: site.sample(n=1 + i % 3, seed=i), range(AT_ONCE)))
    expected = [model.sample(1 + i % 3, seed=i) for i in range(AT_ONCE)]
    assert len({dogs[0].tobytes() for dogs in expected}) == AT_ONCE
    assert all(np.array_equal(got, dogs) for got, dogs in zip(answers, expected, strict=True))


@pytest.mark.slow
def test_bad_requests_do_no_harm(site: Site, model: DogVAE) -> None:
    """To others that are asked at the same time."""

    def bad(i: int) -> httpx.Response:
        kinds: list[dict[str, Any]] = [
            {"url": "/api/sample", "json": {"n": 0}},
            {"url": "/api/sample", "json": {"prior": "cat"}},
            {"url": "/api/sample", "content": b"{"},
            {"url": "/api/move", "json": {"latent": base64.b64encode(b"1234").decode()}},
            {"url": "/api/move", "json": {"latent": base64.b64encode(np.full(32, np.nan, "<f4").tobytes()).decode()}},
            {"url": "/api/photo", "content": b"no photo"},
        ]
        return site.client.post(**kinds[i])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        wrong = [pool.submit(bad, i) for i in range(6)]
        right = [pool.submit(site.sample, n=1, seed=i) for i in range(10)]
    assert [answer.result().status_code for answer in wrong] == [422, 400, 422, 400, 400, 400]
    assert all(answer.result().json()["error"] for answer in wrong)
    assert all(np.array_equal(answer.result(), model.sample(1, seed=i)) for i, answer in enumerate(right))
    assert np.array_equal(site.sample(n=1, seed=99), model.sample(1, seed=99))


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(site: Site) -> None:
    """The last one: it ends the server."""
    family = site.command.family()
    names = " ".join(p.name() for p in family)
    assert "gcs_server" in names
    assert "raylet" in names
    site.command.process.send_signal(signal.SIGINT)
    assert site.command.wait(120) == 0
    _, left = psutil.wait_procs(family[1:], timeout=60)
    assert left == []
    assert not site.answers()
