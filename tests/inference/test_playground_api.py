"""The playground's API in this process: its answers equal the model's, and faulty requests are refused with a line."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from dogvae.data.drawn import draw
from dogvae.inference.litter import children
from dogvae.inference.load import load
from dogvae.inference.model import METHODS, SPAN, DogVAE
from dogvae.inference.playground import MOST_BYTES, make_app
from dogvae.inference.priors import DENSITIES
from dogvae.network.flow import GUIDANCE
from tests.support.exports import LATENT, Exported, with_flow
from tests.support.images import encoded, pixels
from tests.support.playground import pack, unpack
from tests.support.runs import SIZE

MB = 2**20


@pytest.fixture(scope="module")
def app(model: DogVAE) -> FastAPI:
    async def decode(latents: np.ndarray) -> np.ndarray:
        return model.decode(latents)

    return make_app(model, "dogs", decode)


def request(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """The answer of an application in this process. What the application raises is raised here."""

    async def answer() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://playground") as client:
            return await client.request(method, path, **options)

    return asyncio.run(answer())


def send(app: FastAPI, path: str, body: Any) -> httpx.Response:
    """Post `body` as JSON as Python writes it, with NaN; bytes are sent as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(app, "POST", f"/api/{path}", content=content, headers={"Content-Type": "application/json"})


def ok(app: FastAPI, path: str, body: Any) -> Any:
    answer = send(app, path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def pictures(dogs: list[dict[str, str]]) -> np.ndarray:
    return np.stack([pixels(dog["picture"]) for dog in dogs])


def close(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal up to one grey level, because sums in another order are rounded differently."""
    return one.shape == other.shape and np.abs(one.astype(int) - other.astype(int)).max() <= 1


# --- answers


def test_about_describes_the_model_and_its_directions(app: FastAPI, model: DogVAE) -> None:
    about = request(app, "GET", "/api/about").json()
    assert (about["name"], about["size"], about["latents"]) == ("dogs", SIZE, int(np.prod(LATENT)))
    assert tuple(about["priors"]) == DENSITIES
    assert np.array_equal(unpack(about["mean"]), model.mean)
    assert np.array_equal(pixels(about["mean"]["picture"]), model.decode(model.mean[None])[0])
    assert np.array_equal([unpack(dog) for dog in about["parents"]], model.parents)
    assert about["directions"] == 12


def test_page_loads_nothing_from_other_hosts(app: FastAPI) -> None:
    answer = request(app, "GET", "/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"].split("; ")
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\([\"']?https?:", answer.text)


@pytest.mark.parametrize(
    ("n", "seed", "temperature", "prior"),
    [(12, 0, 1.0, "gaussian"), (1, 2**53 - 1, 0.3, "gaussian"), (64, 7, 3, "normal"), (2, 5, 0, "gaussian")],
)
def test_sample_returns_the_models_samples_and_latents(
    app: FastAPI, model: DogVAE, n: int, seed: int, temperature: float, prior: str
) -> None:
    dogs = ok(app, "sample", {"n": n, "seed": seed, "temperature": temperature, "prior": prior})["dogs"]
    assert np.array_equal(pictures(dogs), model.sample(n, seed, temperature, prior))
    assert np.array_equal([unpack(dog) for dog in dogs], model.sample_latents(n, seed, temperature, prior))


def test_sample_of_a_flow_takes_its_guidance(exported: Exported, tmp_path: Path) -> None:
    model = load(with_flow(exported, tmp_path / "export"), "cpu")

    async def decode(latents: np.ndarray) -> np.ndarray:
        return model.decode(latents)

    app = make_app(model, "dogs", decode)
    about = request(app, "GET", "/api/about").json()
    assert (about["priors"][0], about["guidance"]) == ("flow", GUIDANCE)
    for guidance in (None, 0, 2):
        dogs = ok(app, "sample", {"n": 2, "seed": 3, "guidance": guidance})["dogs"]
        assert np.array_equal(pictures(dogs), model.sample(2, 3, guidance=guidance))
    for guidance in (-0.1, 2.1, float("nan"), float("inf"), "much"):
        assert error_of(send(app, "sample", {"guidance": guidance})).startswith("guidance: ")


def test_sample_defaults_to_12_dogs(app: FastAPI, model: DogVAE) -> None:
    assert np.array_equal(pictures(ok(app, "sample", {})["dogs"]), model.sample(12))


@pytest.mark.parametrize("shifts", [[], [1.5, -2.0], [SPAN, -SPAN] * 6])
def test_move_adds_directions_in_standard_deviations(app: FastAPI, model: DogVAE, shifts: list[float]) -> None:
    start = model.encode(np.asarray(draw(500, 0, SIZE)))[0]
    moved = start.copy()
    for i, shift in enumerate(shifts):
        moved += shift * model.scales[i] * model.directions[i]
    dog = ok(app, "move", {"latent": pack(start), "shifts": shifts})
    np.testing.assert_allclose(unpack(dog), moved, rtol=1e-5, atol=1e-5)
    assert close(pixels(dog["picture"]), model.decode(moved[None])[0])


@pytest.mark.parametrize("shifts", [[], [0.5, 1.5], [1.0] * 12])
def test_ends_are_the_dog_moved_to_both_ends_of_a_direction(app: FastAPI, model: DogVAE, shifts: list[float]) -> None:
    latent, others = pack(model.mean + model.moves[3]), [*shifts, *[0.0] * 12][:12]
    for i in (0, 1, 11):
        found = ok(app, "ends", {"latent": latent, "shifts": shifts, "direction": i})
        for end, shift in (("low", -SPAN), ("high", SPAN)):
            body = {"latent": latent, "shifts": [*others[:i], shift, *others[i + 1 :]]}
            assert found[end] == ok(app, "move", body)["picture"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_photo_returns_its_reconstruction_and_latent(app: FastAPI, model: DogVAE, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo"
    path.write_bytes(encoded(draw(500, 0, 150), kind))
    dog = ok(app, "photo", path.read_bytes())
    assert np.array_equal(pixels(dog["photo"]), model.prepared(path)[0])
    assert np.array_equal(pixels(dog["picture"]), model.reconstruct(path)[0])
    assert np.array_equal(unpack(dog), model.encode(path)[0])


@pytest.mark.parametrize("method", METHODS)
def test_walk_passes_through_its_dogs(app: FastAPI, model: DogVAE, method: str) -> None:
    stops = ok(app, "sample", {"n": 3, "seed": 4})["dogs"]
    steps = ok(app, "walk", {"latents": [dog["latent"] for dog in stops], "steps": 5, "method": method})["dogs"]
    assert len(steps) == 9
    assert steps[::4] == stops
    path = model.path(np.stack([unpack(dog) for dog in stops]), 5, method)
    assert np.array_equal(pictures(steps), model.decode(path))


def test_litter_lies_between_its_parents(app: FastAPI, model: DogVAE) -> None:
    """The noise is that of the encoder's posterior of the parents' pictures."""
    parents = ok(app, "sample", {"n": 2, "seed": 4})["dogs"]
    latents = np.stack([unpack(dog) for dog in parents])
    body = {"latents": [dog["latent"] for dog in parents]}
    dogs = ok(app, "litter", body)["dogs"]
    expected = children(latents, model.posterior(pictures(parents))[1], 12, 0, 0.7)
    assert np.array_equal([unpack(dog) for dog in dogs], expected)
    assert np.array_equal(pictures(dogs), model.decode(expected))
    calm = ok(app, "litter", {**body, "n": 3, "seed": 5, "temperature": 0})["dogs"]
    assert np.array_equal([unpack(dog) for dog in calm], children(latents, 0 * latents, 3, 5, 0))


def test_walk_gif_runs_forwards_and_backwards(app: FastAPI) -> None:
    stops = ok(app, "sample", {"n": 3, "seed": 4})["dogs"]
    answer = send(app, "walk.gif", {"latents": [dog["latent"] for dog in stops], "steps": 5})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "image/gif"
    assert "filename=walk.gif" in answer.headers["Content-Disposition"]
    animation = Image.open(io.BytesIO(answer.content))
    assert animation.size == (4 * SIZE, 4 * SIZE)
    assert animation.info["loop"] == 0
    shown = []
    for frame in range(animation.n_frames):
        animation.seek(frame)
        shown += [np.asarray(animation.convert("RGB"))] * (animation.info["duration"] // 50)  # equal frames are merged
    assert len(shown) == 16
    for frame, dog in ((0, stops[0]), (4, stops[1]), (8, stops[2]), (12, stops[1])):
        assert np.abs(shown[frame][2::4, 2::4].astype(int) - pixels(dog["picture"])).mean() < 8  # of 256 colours


# --- refusals


NUMBERS = np.zeros(LATENT, np.float32)
ZERO = pack(NUMBERS)
BAD: dict[str, tuple[str, Any]] = {
    "no dogs": ("sample", {"n": 0}),
    "too many dogs": ("sample", {"n": 65}),
    "n is not a number": ("sample", {"n": "x"}),
    "n of 5000 digits": ("sample", b'{"n": ' + b"1" * 5000 + b"}"),
    "negative seed": ("sample", {"seed": -1}),
    "too large seed": ("sample", {"seed": 2**60}),
    "temperature NaN": ("sample", {"temperature": float("nan")}),
    "temperature negative": ("sample", {"temperature": -1}),
    "temperature null": ("sample", {"temperature": None}),
    "unknown prior": ("sample", {"prior": "uniform"}),
    "prior of half a character": ("sample", {"prior": "\ud800"}),
    "prior of many lines": ("sample", {"prior": "a\nb\n" * 100}),
    "prior of a megabyte": ("sample", {"prior": "x" * MB}),
    "a list": ("sample", []),
    "not JSON": ("sample", b"n=12"),
    "empty body": ("sample", b""),
    "deeply nested JSON": ("sample", b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "5 MB of JSON": ("move", {"latent": "A" * 5 * MB}),
    "missing latent": ("move", {"shifts": []}),
    "latent not base64": ("move", {"latent": "~~~~"}),
    "latent not ASCII": ("move", {"latent": "ä" * 172}),
    "latent too long": ("move", {"latent": pack(np.zeros(33))}),
    "latent with NaN": ("move", {"latent": pack(np.full(LATENT, np.nan))}),
    "latent with infinity": ("move", {"latent": pack(np.full(LATENT, np.inf))}),
    "too many shifts": ("move", {"latent": ZERO, "shifts": [0.0] * 13}),
    "shift too far": ("move", {"latent": ZERO, "shifts": [1e9]}),
    "shifts not a list": ("move", {"latent": ZERO, "shifts": 1}),
    "ends of no direction": ("ends", {"latent": ZERO}),
    "ends of direction -1": ("ends", {"latent": ZERO, "direction": -1}),
    "ends of direction 12": ("ends", {"latent": ZERO, "direction": 12}),
    "ends of NaN": ("ends", {"latent": pack(np.full(LATENT, np.nan)), "direction": 0}),
    "guidance without a flow": ("sample", {"guidance": 0.5}),
    "walk of one dog": ("walk", {"latents": [ZERO]}),
    "walk of nine dogs": ("walk", {"latents": [ZERO] * 9}),
    "walk of one step": ("walk", {"latents": [ZERO] * 2, "steps": 1}),
    "walk by an unknown method": ("walk", {"latents": [ZERO] * 2, "method": "jump"}),
    "walk by a method of a megabyte": ("walk", {"latents": [ZERO] * 2, "method": "x" * MB}),
    "walk to NaN": ("walk", {"latents": [ZERO, pack(np.full(LATENT, np.nan))]}),
    "spherical walk to infinity": ("walk.gif", {"latents": [ZERO, pack(NUMBERS + np.inf)], "method": "spherical"}),
    "litter of one dog": ("litter", {"latents": [ZERO]}),
    "litter of three dogs": ("litter", {"latents": [ZERO] * 3}),
    "litter of too many": ("litter", {"latents": [ZERO] * 2, "n": 65}),
    "litter at temperature NaN": ("litter", {"latents": [ZERO] * 2, "temperature": float("nan")}),
    "litter of NaN": ("litter", {"latents": [ZERO, pack(np.full(LATENT, np.nan))]}),
    "empty photo": ("photo", b""),
    "text as a photo": ("photo", b"this is a text file\n" * 10),
}


def error_of(answer: httpx.Response) -> str:
    """The error of a refused request: one short line, which does not repeat what was sent."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:500])
    assert answer.json().keys() == {"error"}
    line = str(answer.json()["error"])
    assert line.strip()
    assert "\n" not in line
    assert len(line) < 1000
    return line


@pytest.mark.parametrize("name", BAD)
def test_faulty_request_is_refused_with_one_line(app: FastAPI, name: str) -> None:
    error_of(send(app, *BAD[name]))
    assert len(ok(app, "sample", {"n": 1})["dogs"]) == 1


def test_body_of_more_than_20_mb_is_refused(app: FastAPI) -> None:
    answer = send(app, "photo", bytes(MOST_BYTES + 1))
    assert answer.status_code == 413
    assert "20 MB" in error_of(answer)
    assert "known format" in error_of(send(app, "photo", bytes(MOST_BYTES)))  # read, but not an image


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404), ("GET", "/api/", 404), ("GET", "/api/../../etc/passwd", 404), ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404), ("GET", "/api/sample", 405), ("POST", "/", 405), ("DELETE", "/api/about", 405),
    ],
)  # fmt: skip
def test_unknown_path_or_method_is_refused(app: FastAPI, method: str, path: str, status: int) -> None:
    answer = request(app, method, path)
    assert answer.status_code == status
    error_of(answer)
    if status == 405:
        assert answer.headers["Allow"]  # RFC 9110 requires it


LARGEST = NUMBERS + np.finfo(np.float32).max


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("move", {"latent": pack(LARGEST), "shifts": [3.0] * 12}, 200),
        ("walk", {"latents": [pack(LARGEST), ZERO], "steps": 3}, 200),
        ("litter", {"latents": [pack(LARGEST), pack(-LARGEST)]}, 400),
        ("walk", {"latents": [pack(LARGEST), pack(-LARGEST)], "steps": 3, "method": "spherical"}, 400),
    ],
    ids=["move", "walk", "litter that overflows", "walk that overflows"],
)
def test_latents_of_the_largest_numbers_are_no_server_error(app: FastAPI, path: str, body: Any, status: int) -> None:
    answer = send(app, path, body)
    assert answer.status_code == status
    if status == 400:
        assert "not finite" in error_of(answer)
