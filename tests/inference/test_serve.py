"""The playground under Ray Serve: concurrent requests each get their own dogs, and Ctrl-C stops everything."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
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
from pydantic import ValidationError

from dogvae.inference.model import DogVAE
from dogvae.inference.playground import PAGE
from tests.support.browser import free_port
from tests.support.command import Command
from tests.support.exports import Exported
from tests.support.images import pixels

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own, about pydantic
    from dogvae.inference.serve import Arguments, Playground, app

CLIENTS = 16


# --- without a cluster


def test_batch_of_requests_is_split_into_the_pictures_of_each(model: DogVAE) -> None:
    """As on a GPU, where one batch holds several requests of several dogs."""
    requests = [model.sample_latents(n, seed=n) for n in (3, 1, 5)]
    decode_together = Playground.decode_together.__wrapped__  # what Serve calls with a batch
    parts = asyncio.run(decode_together(SimpleNamespace(model=model), requests))
    for part, n in zip(parts, (3, 1, 5), strict=True):
        assert np.array_equal(part, model.sample(n, seed=n))


def test_arguments_are_parsed_from_the_command_line() -> None:
    """`serve run` passes strings: `serve run dogvae.serve:app export=... replicas=2 gpus=0.5`."""
    arguments = Arguments.model_validate({"export": "runs/dogs/export", "replicas": "2", "gpus": "0.5"})
    assert (arguments.export, arguments.gpus) == ("runs/dogs/export", 0.5)
    assert app(arguments)._bound_deployment.num_replicas == 2
    for wrong, values in (("export", {}), ("gpus", {"export": "x", "gpus": "some"})):
        with pytest.raises(ValidationError, match=wrong):
            Arguments.model_validate(values)


@pytest.mark.parametrize("replicas", [2, "auto"])
def test_deployment_has_the_replicas_and_gpus_of_the_arguments(replicas: int | str) -> None:
    deployment = app(Arguments(export="x", replicas=replicas, gpus=0.25))._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == 0.25
    if replicas == "auto":
        assert deployment._deployment_config.autoscaling_config is not None
    else:
        assert deployment.num_replicas == 2


# --- on a cluster


class Site:
    """A running `serve run` and a client of it."""

    def __init__(self, command: Command, port: int) -> None:
        self.command = command
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def answers(self) -> bool:
        try:
            return self.client.get("/").status_code == 200
        except httpx.TransportError:
            return False

    def sample(self, **wanted: Any) -> np.ndarray:
        answer = self.client.post("/api/sample", json=wanted)
        assert answer.status_code == 200, answer.text
        return np.stack([pixels(dog["picture"]) for dog in answer.json()["dogs"]])


@pytest.fixture(scope="module")
def site(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """`serve run dogvae.serve:app export=...` on a free port."""
    where, port = tmp_path_factory.mktemp("site"), free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"import_path": "dogvae.serve:app", "args": {"export": str(exported.folder)}}],
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


@pytest.mark.slow
def test_page_and_samples_are_served(site: Site, model: DogVAE) -> None:
    page = site.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert page.text == PAGE.read_text()
    assert site.client.get("/api/about").json()["name"] == "dogs"
    for wanted in ({"n": 5, "seed": 3}, {"n": 2, "seed": 3, "prior": "normal", "temperature": 0.5}):
        assert np.array_equal(site.sample(**wanted), model.sample(**wanted))


@pytest.mark.slow
def test_concurrent_requests_get_their_own_dogs(site: Site, model: DogVAE) -> None:
    """More requests than a replica decodes at a time, of different sizes."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda i: site.sample(n=1 + i % 3, seed=i), range(CLIENTS)))
    expected = [model.sample(1 + i % 3, seed=i) for i in range(CLIENTS)]
    assert len({dogs[0].tobytes() for dogs in expected}) == CLIENTS
    assert all(np.array_equal(got, dogs) for got, dogs in zip(answers, expected, strict=True))


FAULTY: list[tuple[int, dict[str, Any]]] = [
    (422, {"url": "/api/sample", "json": {"n": 0}}),
    (400, {"url": "/api/sample", "json": {"prior": "cat"}}),
    (422, {"url": "/api/sample", "content": b"{"}),
    (400, {"url": "/api/move", "json": {"latent": base64.b64encode(b"1234").decode()}}),
    (400, {"url": "/api/move", "json": {"latent": base64.b64encode(np.full(32, np.nan, "<f4").tobytes()).decode()}}),
    (400, {"url": "/api/photo", "content": b"no photo"}),
]


@pytest.mark.slow
def test_faulty_requests_do_not_disturb_concurrent_ones(site: Site, model: DogVAE) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        faulty = [pool.submit(site.client.post, **request) for _, request in FAULTY]
        right = [pool.submit(site.sample, n=1, seed=i) for i in range(10)]
    assert [answer.result().status_code for answer in faulty] == [status for status, _ in FAULTY]
    assert all(answer.result().json()["error"] for answer in faulty)
    assert all(np.array_equal(answer.result(), model.sample(1, seed=i)) for i, answer in enumerate(right))
    assert np.array_equal(site.sample(n=1, seed=99), model.sample(1, seed=99))


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(site: Site) -> None:
    """The last test, because it ends the server."""
    family = site.command.family()
    names = " ".join(p.name() for p in family)
    assert "gcs_server" in names
    assert "raylet" in names
    site.command.process.send_signal(signal.SIGINT)
    assert site.command.wait(120) == 0
    _, left = psutil.wait_procs(family[1:], timeout=60)
    assert left == []
    assert not site.answers()
