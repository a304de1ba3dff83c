"""The playground on one core: how long a slider takes to answer, and how soon a model draws its first dog.

    python benchmarks/playground.py [EXPORT] [--seconds 5] [--json FILE]

Without EXPORT it takes an untrained model of the default size, which computes as much as a trained one. The server is
the real command, bound to one core; the client runs on another core if there is one. The client drags a slider, a
request after another. It requests the pictures at the ends of the sliders as the page does when a dog has settled, and
moves a slider while two of them are drawn. Then fresh processes with one thread measure the seconds from a Python that
has imported torch to the first dog, and the seconds of 64 dogs. docs/decisions.md says how to measure many people at
once.
"""

from __future__ import annotations

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import measure

SIZE, TRAIN, VAL = 64, 200, 20  # of the untrained model
REPEATS = 3
IN_SIGHT = 8  # sliders
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


def untrained(folder: Path) -> Path:
    """The export of an untrained model of the default width, as a run writes it."""
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
    last = [layer for layer in model.decoder.modules() if isinstance(layer, torch.nn.Conv2d)][-1]
    torch.nn.init.normal_(last.weight, std=0.1)  # its initial weights draw flat grey
    figures = ("loss", "reconstruction", "kl", "bits_per_dim", "explained", "psnr")
    record = {"epoch": 0, "val_active_latents": 0, "val_sigma": 0.1, **{f"val_{name}": 0.0 for name in figures}}
    checkpoints = Checkpoints(Storage(folder / "untrained"))
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoints.save(tensors, {"step": 1, "epoch": 1, "val_loss": 0.0, "records": [record]})
    checkpoints.wait()
    return Path(export(Storage(folder / "untrained"), config).uri)


@contextmanager
def playground(export: Path) -> Iterator[str]:
    """The address of a server on one core; this process stays off that core if there is another."""
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


def slider_s(address: str, seconds: float) -> list[float]:
    """Seconds of each answer while one client moves sliders, a request after another."""
    draw, waits = random.Random(0), []
    with httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
        directions = client.get("/api/about").json()["directions"]
        (dog,) = client.post("/api/sample", json={"n": 1}).json()["dogs"]
        ends = time.perf_counter() + seconds
        while (began := time.perf_counter()) < ends:
            shifts = [round(draw.uniform(-3, 3), 1) for _ in range(directions)]
            client.post("/api/move", json={"latent": dog["latent"], "shifts": shifts}).raise_for_status()
            waits.append(time.perf_counter() - began)
    return waits


def ends_s(address: str) -> tuple[float, list[float]]:
    """Seconds to draw the ends of the sliders in sight, and of each answer to a slider that moves meanwhile."""
    with httpx.Client(base_url=address, timeout=120, trust_env=False) as client, ThreadPoolExecutor(1) as other:
        (dog,) = client.post("/api/sample", json={"n": 1}).json()["dogs"]

        def post(path: str, **body: Any) -> float:
            began = time.perf_counter()
            client.post(f"/api/{path}", json={"latent": dog["latent"], **body}).raise_for_status()
            return time.perf_counter() - began

        drawn = sum(post("ends", direction=i) for i in range(IN_SIGHT))
        waits = []
        for i in range(10 * IN_SIGHT):
            ends = other.submit(post, "ends", direction=i % IN_SIGHT)
            time.sleep(0.005)  # the server has begun with them
            waits.append(post("move", shifts=[1.0]))
            ends.result()
        return drawn, waits


def start_s(export: Path) -> tuple[float, float]:
    """Seconds to the first dog, and of 64 dogs: medians of fresh processes with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START.format(export=str(export))]
    runs = [json.loads(subprocess.check_output(command, env=env, text=True)) for _ in range(REPEATS)]
    return statistics.median(first for first, _ in runs), statistics.median(many for _, many in runs)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("export", nargs="?", type=Path, help="(default: an untrained model of the default size)")
    parser.add_argument("--seconds", type=float, default=5, help="that the slider moves (default: 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export = args.export or untrained(Path(folder))
        with playground(export) as address:
            waits_ms = [1e3 * s for s in slider_s(address, args.seconds)]
            ends, behind = ends_s(address)
        first_s, many_s = start_s(export)
        model = json.loads((export / "config.json").read_text())["model"]
    median, p95, p99 = (float(np.percentile(waits_ms, q)) for q in (50, 95, 99))
    figures: dict[str, Any] = {
        "model": {name: model[name] for name in ("image_size", "width", "latent_dim", "latent_size")},
        "slider_ms": {"count": len(waits_ms), "median": median, "p95": p95, "p99": p99},
        "ends_s": ends,
        "slider_behind_ends_ms": 1e3 * statistics.median(behind),
        "first_sample_s": first_s,
        "64_samples_s": many_s,
    }
    lines = [
        f"{model['image_size']} x {model['image_size']} pixels, width {model['width']}, latent "
        f"{model['latent_dim']} x {model['latent_size']} x {model['latent_size']}; server on 1 core",
        f"slider: {len(waits_ms)} answers, median {median:.1f} ms, p95 {p95:.1f}, p99 {p99:.1f}",
        f"ends of {IN_SIGHT} sliders: {ends:.2f} s; a slider that moves while two of them are drawn: median "
        f"{1e3 * statistics.median(behind):.1f} ms",
        f"one thread, medians of {REPEATS} processes: load and first sample {first_s:.2f} s beyond `import torch`; "
        f"64 samples {many_s:.2f} s",
    ]
    measure.report(figures, lines, args, "fastapi", "uvicorn", "httpx")


if __name__ == "__main__":
    main()
