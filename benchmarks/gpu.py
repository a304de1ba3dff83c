"""Every figure that needs a GPU, in one command of under 8 minutes; needs neither a network nor Ray.

    PYTHONPATH=. python benchmarks/gpu.py --json FILE
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --quick     # every part, tiny: its times mean nothing

Each part is a process of its own with a time limit, so a part that fails or hangs costs the others nothing:

- gradients  of every layer after a step, in fp32, TF32 and bf16, against float64 on the CPU
- steps      milliseconds, images/s and share of the roofline (roofline.py), by K and batch size
- waits      launches, copies and waits for the GPU in a step, and how long the GPU works (torch.profiler)
- resume     weights after a kill and a resume against those of a run without one, with and without cuDNN's
             deterministic convolutions
- epochs     what an epoch of 20,000 images takes besides its steps, and how long the first step takes to come
- curves     losses of a short training in fp32 and bf16 on the GPU, and in fp32 on the CPU
- sampling   new dogs per second, and the export of a run
- notebook   images/s of our loop beside the notebook's (step.py)

What must hold is printed as `ok` or `FAILED`; the exit code is 1 if anything failed. --json is written after each part.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import measure
from gpu_numbers import curves, gradients, resume
from gpu_part import Part
from gpu_speed import epochs, notebook, sampling, steps, waits

# Parts in order of worth, and the most seconds that each may take.
PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    "gradients": (gradients, 90), "steps": (steps, 120), "waits": (waits, 60), "resume": (resume, 100),
    "epochs": (epochs, 90), "curves": (curves, 100), "sampling": (sampling, 40), "notebook": (notebook, 150),
}  # fmt: skip


def run_part(name: str, args: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """What a part found, in a process of its own that ends after `limit_s` seconds at the latest."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "found.json", Path(folder) / "log"
        command = measure.child(__file__, "--part", name, "--folder", folder, "--device", args.device)
        began = time.monotonic()
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, *["--quick"] * args.quick], env=measure.environment(1 if args.quick else measure.cores()),
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
            trouble = ""
            try:
                if code := process.wait(limit_s):
                    trouble = f"ended with {code}: " + " ".join(log.read_text().split())[-500:]
            except subprocess.TimeoutExpired:
                trouble = f"stopped after {limit_s:.0f} s"
                for started in [*psutil.Process(process.pid).children(recursive=True), process]:
                    started.kill()
                process.wait()
        found = json.loads(file.read_text()) if file.exists() else {"figures": {}, "lines": [], "checks": []}
    found["seconds"] = time.monotonic() - began
    found["checks"].append({"name": f"{name} ran", "ok": not trouble, "detail": trouble or f"{found['seconds']:.0f} s"})
    return found


def main() -> int:
    parser = measure.parser(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that it runs, not how fast")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which all ends (default: 7.5)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        measure.without_tensorboard()
        PARTS[args.part][0](Part(args.device, args.quick, args.folder, args.folder / "found.json"))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no GPU here; --device cpu --quick shows that this runs")
    ends = time.monotonic() + 60 * args.minutes
    about = {"machine": measure.machine(), "versions": measure.versions("torch", "numpy", "torchvision")}
    figures: dict[str, Any] = {**about, "device": args.device, "quick": args.quick, "parts": {}}
    lines, checks = [], []
    for name in args.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = figures["parts"][name] = run_part(name, args, max(1.0, min(PARTS[name][1], ends - time.monotonic())))
        lines += [f"\n{name}", *found["lines"]]
        checks += found["checks"]
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2) + "\n")
    told = [f"{'ok' if c['ok'] else 'FAILED':<8}{c['name']}: {c['detail']}" for c in checks]
    measure.report(figures, [*lines, "", *told], args)
    return 0 if all(c["ok"] for c in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
