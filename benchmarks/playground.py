"""The playground on one core: how long a slider takes to answer, what many people at once get, how soon it starts.

    python benchmarks/playground.py [EXPORT] [--clients 50] [--seconds 60] [--json FILE]

Without EXPORT: an untrained model of the default size, which computes as much as a trained one. The server is the real
command, bound to one core; those who ask run on another one if there is one. One client drags a slider, a request after
another. Then many clients at once, mostly doing that, some drawing litters, walking and uploading photos, none ever
pausing. Last, one thread in fresh processes: from a running Python that has imported torch to the first dog, and 64
dogs. Exits with 1 if a request was answered with an error, or not at all.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import measure

SIZE, TRAIN, VAL = 64, 200, 20  # of the untrained model
SLIDER_S = 5.0
MIX = {"move": 80, "sample": 10, "walk": 5, "photo": 5}  # of a hundred requests
ANSWER_S = 120.0  # no answer within: an error
REPEATS = 3
START = """
import json, time, torch
torch.set_num_threads(1)
began = time.perf_counter()
import dogvae
model = dogvae.load({export!r}, "cpu")
model.sample(1)
first = time.perf_counter() - began
model.sample(64, seed=1)
print(json.dumps([first, time.perf_counter() - began - first]))
"""
Answers = dict[str, list[float]]  # seconds, by what was asked


def untrained(folder: Path) -> Path:
    """The export of a model of the default width, as a run writes it, after an epoch that was none."""
    import torch

    from dogvae.config import Config
    from dogvae.data.dataset import Dataset
    from dogvae.network.vae import VAE
    from dogvae.storage import Storage
    from dogvae.training.checkpoint import Checkpoints
    from dogvae.training.export import export
    from job import write_photos

    data = Dataset(write_photos(folder / "dataset", TRAIN, VAL, SIZE))
    config = Config.make().for_data(str(data.path), data.fingerprint, SIZE, len(data.train))
    torch.manual_seed(0)
    model = VAE(config.model)
    torch.nn.init.normal_(model.decoder.layers[-1].weight, std=0.1)  # as it begins, it draws flat grey
    figures = ("loss", "reconstruction", "kl", "explained", "psnr")
    record = {"epoch": 0, "val_active_latents": 0, **{f"val_{name}": 0.0 for name in figures}}
    checkpoints = Checkpoints(Storage(folder / "untrained"))
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoints.save(tensors, {"step": 1, "epoch": 1, "val_loss": 0.0, "records": [record]})
    checkpoints.wait()
    return Path(export(Storage(folder / "untrained"), config).uri)


@contextmanager
def playground(export: Path) -> Iterator[str]:
    """The address of a server on one core."""
    cores = sorted(os.sched_getaffinity(0))
    command = ["taskset", "--cpu-list", str(cores[0]), str(Path(sys.executable).with_name("dogvae")), "playground"]
    process = subprocess.Popen([*command, str(export), "--device", "cpu"], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        said = process.stdout.readline()
        found = re.match(r"playground  (http://\S+)", said)
        if not found:
            sys.exit(f"the playground did not start: {said}")
        os.sched_setaffinity(0, cores[1:] or cores)
        yield found[1]
    finally:
        os.sched_setaffinity(0, cores)
        process.terminate()
        process.wait()


class Visitor:
    """Somebody with a browser: asks, waits for the answer, asks again."""

    def __init__(self, client: httpx.AsyncClient, number: int, directions: int, dogs: list[str]) -> None:
        self._client, self._directions, self._dogs = client, directions, dogs
        self._random = random.Random(number)
        self._photo = _photo(number)
        self.seconds: Answers = {name: [] for name in MIX}
        self.errors: list[str] = []

    async def play(self, until: float, mix: dict[str, int]) -> None:
        while time.perf_counter() < until:
            (name,) = self._random.choices([*mix], [*mix.values()])
            await self._ask(name)

    async def _ask(self, name: str) -> None:
        began = time.perf_counter()
        try:
            answer = await self._client.post(f"/api/{name}", **self._wish(name))
        except httpx.HTTPError as error:
            self.errors.append(f"{name}: {type(error).__name__} {error}")
            return
        if answer.status_code != 200:
            self.errors.append(f"{name}: {answer.status_code} {answer.text[:200]}")
            return
        self.seconds[name].append(time.perf_counter() - began)
        if name == "sample":
            self._dogs = [dog["latent"] for dog in answer.json()["dogs"]]

    def _wish(self, name: str) -> dict[str, Any]:
        if name == "photo":
            return {"content": self._photo}
        if name == "sample":
            return {"json": {"n": 12, "seed": self._random.randrange(2**32)}}
        if name == "walk":
            return {"json": {"latents": self._random.choices(self._dogs, k=2), "steps": 33}}
        shifts = [round(self._random.uniform(-3, 3), 1) for _ in range(self._directions)]
        return {"json": {"latent": self._random.choice(self._dogs), "shifts": shifts}}


def _photo(number: int) -> bytes:
    from dogvae.data.drawn import draw

    buffer = io.BytesIO()
    draw(number, 1, 512).save(buffer, "JPEG")
    return buffer.getvalue()


async def visit(address: str, clients: int, seconds: float, mix: dict[str, int]) -> tuple[Answers, list[str], float]:
    """So many visitors for so long: their waits, what went wrong, and the seconds until the last had its answer."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=ANSWER_S, trust_env=False) as client:
        about = (await client.get("/api/about")).json()
        dogs = (await client.post("/api/sample", json={"n": 12})).json()["dogs"]
        first = len(about["directions"]), [dog["latent"] for dog in dogs]
        visitors = [Visitor(client, number, *first) for number in range(clients)]
        began = time.perf_counter()
        await asyncio.gather(*(visitor.play(began + seconds, mix) for visitor in visitors))
        took = time.perf_counter() - began
    waits = {name: [s for visitor in visitors for s in visitor.seconds[name]] for name in mix}
    return waits, [error for visitor in visitors for error in visitor.errors], took


def summary(waits: list[float]) -> dict[str, float]:
    """The number of answers, and quantiles of the wait in ms."""
    quantiles = {"median": 50, "p95": 95, "p99": 99}
    return {"count": len(waits)} | {
        name: float(np.percentile(waits, q)) * 1e3 if waits else float("nan") for name, q in quantiles.items()
    }


def starting(export: Path) -> tuple[float, float]:
    """Seconds to the first dog, and of 64 dogs: medians of fresh processes with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START.format(export=str(export))]
    runs = [json.loads(subprocess.check_output(command, env=env, text=True)) for _ in range(REPEATS)]
    return statistics.median(first for first, _ in runs), statistics.median(many for _, many in runs)


def figures_of(export: Path, clients: int, seconds: float) -> dict[str, Any]:
    with playground(export) as address:
        slider, slider_errors, _ = asyncio.run(visit(address, 1, min(seconds, SLIDER_S), {"move": 1}))
        crowd, crowd_errors, took = asyncio.run(visit(address, clients, seconds, MIX))
    first_s, many_s = starting(export)
    config = json.loads((export / "config.json").read_text())["model"]
    return {
        "model": {name: config[name] for name in ("image_size", "width", "latent_dim")},
        "slider": summary(slider["move"]),
        "clients": clients,
        "seconds": took,
        "requests_per_s": sum(map(len, crowd.values())) / took,
        "crowd": {name: summary(waits) for name, waits in crowd.items()},
        "first_sample_s": first_s,
        "64_samples_s": many_s,
        "errors": slider_errors + crowd_errors,
    }


def table(figures: dict[str, Any]) -> list[str]:
    def row(name: str, s: dict[str, float]) -> str:
        return f"{name:<14}{s['count']:8.0f}{s['median']:10.1f}{s['p95']:10.1f}{s['p99']:10.1f}"

    model = figures["model"]
    size = f"{model['image_size']} x {model['image_size']} pixels, width {model['width']}, latent {model['latent_dim']}"
    return [
        f"{size}; server on 1 core",
        f"{'':<14}{'answers':>8}{'median':>10}{'p95':>10}{'p99':>10}  ms",
        row("1 client: move", figures["slider"]),
        f"{figures['clients']} clients for {figures['seconds']:.1f} s: {figures['requests_per_s']:.1f} requests/s, "
        f"{len(figures['errors'])} errors",
        *(row(f"  {name}", waits) for name, waits in figures["crowd"].items()),
        f"one thread, medians of {REPEATS} processes: load and first sample {figures['first_sample_s']:.2f} s "
        f"beyond `import torch`; 64 samples {figures['64_samples_s']:.2f} s",
        *(f"error: {error}" for error in figures["errors"][:10]),
    ]


def main() -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("export", nargs="?", type=Path, help="(default: an untrained model of the default size)")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = figures_of(args.export or untrained(Path(folder)), args.clients, args.seconds)
    measure.report(figures, table(figures), args, "fastapi", "uvicorn", "httpx")
    return 1 if figures["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
