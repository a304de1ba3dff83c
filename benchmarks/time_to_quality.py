"""How much sooner a preset reproduces unseen photos as well as the notebook's recipe does at its end.

    python benchmarks/time_to_quality.py DATASET [--epochs 40] [--preset small] [--runs FOLDER] [--json FILE]

Both train on the same photos and machine, one after the other, by `train_distributed.py`: the notebook's preset with
K = 10, then ours. Quality is the PSNR of the decoded posterior means on the validation photos. Seconds are those of
training and validation, without the start: `seconds` of metrics.jsonl. Our ratio flatters the notebook, whose preset
is faster here than its own loop (benchmarks/step.py). With --runs, an interrupted measurement goes on where it was.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
from dogvae.storage import Storage
from dogvae.training import metrics


def train(name: str, runs: Path, data: str, *settings: str) -> list[dict[str, Any]]:
    """The records of a run, which is trained or resumed if it has not finished."""
    known = (runs / name / "config.json").exists()
    given = ["--resume"] if known else ["--data", data, *settings]
    script = [sys.executable, str(measure.ROOT / "train_distributed.py"), "--runs", str(runs), "--name", name]
    subprocess.run([*script, *given], check=True)
    return metrics.read(Storage(str(runs / name)))


def first_as_good(records: list[dict[str, Any]], psnr: float) -> dict[str, Any] | None:
    """The first record with at least this PSNR."""
    return next((record for record in records if record["val_psnr"] >= psnr), None)


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("dataset", help="prepared by `dogvae prepare`")
    parser.add_argument("--epochs", type=int, default=40, help="of the notebook (default: 40)")
    parser.add_argument("--preset", default="small", help="of ours (default: small)")
    parser.add_argument("--runs", help="keep the runs in this folder, and resume those that are there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(args.runs or folder)
        notebook = train("notebook", runs, args.dataset, "--preset", "notebook", "--epochs", str(args.epochs))
        ours = train("ours", runs, args.dataset, "--preset", args.preset)
    target = max(record["val_psnr"] for record in notebook)
    reached = first_as_good(notebook, target)
    assert reached is not None
    sooner = first_as_good(ours, target)
    figures: dict[str, Any] = {
        "notebook": {"psnr": target, "seconds": reached["seconds"], "epochs": len(notebook)},
        "ours": {"psnr": max(record["val_psnr"] for record in ours), "seconds": ours[-1]["seconds"]},
        "ours_at_that_psnr_s": sooner["seconds"] if sooner else None,
        "ratio": reached["seconds"] / sooner["seconds"] if sooner else None,
    }
    lines = [
        f"the notebook's recipe   {target:.2f} dB after {reached['seconds']:,.0f} s",
        f"ours, as good           after {sooner['seconds']:,.1f} s: {figures['ratio']:.0f} times sooner"
        if sooner
        else "ours, as good           never",
        f"ours, at the end        {figures['ours']['psnr']:.2f} dB after {ours[-1]['seconds']:,.0f} s",
    ]
    measure.report(figures, lines, args, "torch", "ray")


if __name__ == "__main__":
    main()
