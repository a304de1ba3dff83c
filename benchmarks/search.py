"""Trials an hour of `python -m tune search` against Ray's own example of Train within Tune, on the same trials.

    python benchmarks/search.py [--trials 6] [--epochs 3] [--repeats 2] [--json FILE]

The peer is the example of Ray's guide: a Tuner over a function that runs a TorchTrainer of one worker for each trial
and passes its reports on with TuneReportCallback. Both train by `dogvae.training.loop.loop` on the same drawn dogs,
with the same settings and without a scheduler. A trial has one CPU; as many run at once as the machine has cores. Ray
reserves a CPU for the function that only waits for its workers. The peer reserves a hundredth of one instead, or two
cores would never run two trials.

Seconds are those of the whole commands, which take turns: imports, Ray's start, and for ours the report and the export
of the best model. "Beyond training" is the time that a trial took of a core, without its epochs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import job
import measure

SPACE = ["latent_dim=choice(4,8)", "lr=loguniform(1e-4,1e-2)", "samples=choice(1,2)"]


def given(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of all trials, as our search draws them."""
    from tune.space import Space

    space = Space.parse(SPACE, {})
    return [space.setting(0, number) for number in range(args.trials)]


def nested(args: argparse.Namespace) -> None:
    """Ray's example around our loop."""
    import ray
    import ray.train
    import ray.tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    config = job.config_for(args.data, "default", args, epochs=args.epochs)

    def train_fn_per_worker(train_loop_config: dict[str, Any]) -> None:
        import torch

        from dogvae.storage import Storage
        from dogvae.training.loop import loop
        from dogvae.training.observer import Observer

        class Reporting(Observer):
            def epoch(self, record: dict[str, Any]) -> None:
                ray.train.report({"loss": record["val_loss"]})

        torch.set_num_threads(1)
        storage = Storage(train_loop_config["folder"]) / ray.train.get_context().get_experiment_name()
        loop(config.replace(**train_loop_config["setting"]), storage, torch.device("cpu"), Reporting())

    def train_driver_fn(config: dict[str, Any]) -> None:
        trainer = TorchTrainer(
            train_fn_per_worker,
            train_loop_config={"setting": config["setting"], "folder": str(Path(args.folder) / "runs")},
            scaling_config=ray.train.ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(
                name=f"train-trial_id={ray.tune.get_context().get_trial_id()}",
                storage_path=str(Path(args.folder) / "train"),
                callbacks=[TuneReportCallback()],
            ),
        )
        trainer.fit()

    ray.init(include_dashboard=False, log_to_driver=False)
    results = ray.tune.Tuner(
        ray.tune.with_resources(train_driver_fn, {"CPU": 0.01}),
        param_space={"setting": ray.tune.grid_search(given(args))},
        tune_config=ray.tune.TuneConfig(
            metric="loss", mode="min", max_concurrent_trials=int(ray.cluster_resources()["CPU"])
        ),
        run_config=ray.tune.RunConfig(name="tune", storage_path=str(Path(args.folder) / "tune"), verbose=0),
    ).fit()
    assert not results.num_errors, results.errors


def timed(command: list[str], runs: Path, trials: int) -> dict[str, float]:
    """Run a search: its seconds, and the seconds that the epochs of its trials took."""
    env = {**measure.environment(1), "RAY_ADDRESS": "local"}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        if subprocess.run(command, env=env, stdout=log, stderr=log, cwd=runs.parent).returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}:\n{log.read()[-3000:]}")
    seconds = time.perf_counter() - began
    files = sorted(runs.rglob("metrics.jsonl"))
    assert len(files) == trials, f"{len(files)} trials were trained, not {trials}"
    trained = sum(json.loads(file.read_text().splitlines()[-1])["seconds"] for file in files)
    at_once = min(measure.cores(), trials)
    return {
        "seconds": seconds,
        "trials_per_h": 3600 * trials / seconds,
        "trained_s": trained,
        "beyond_s": (seconds * at_once - trained) / trials,
    }


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    for internal in ("--data", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--nested", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.samples = 1
    if args.nested:
        nested(args)
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "nested": []}
    with tempfile.TemporaryDirectory() as temporary:
        data = job.write_photos(Path(temporary) / "data", args.images)
        sizes = {"batch_size": args.batch_size, "width": args.width}
        for number in range(args.repeats):
            folder = Path(temporary) / str(number)
            (folder / "ours").mkdir(parents=True)
            (folder / "nested").mkdir()
            ours = [sys.executable, "-m", "tune", "search", "--runs", str(folder / "ours" / "runs"), "--name", "s"]
            ours += ["--data", str(data), "--scheduler", "none", "--epochs", str(args.epochs)]
            ours += ["--trials", str(args.trials), *(part for text in SPACE for part in ("--search", text))]
            ours += [part for name, value in sizes.items() for part in ("--set", f"{name}={value}")]
            theirs = measure.child(
                __file__, "--nested", "--data", data, "--folder", folder / "nested", "--trials", args.trials,
                "--epochs", args.epochs, "--batch-size", args.batch_size, "--width", args.width,
            )  # fmt: skip
            commands = {"ours": ours, "nested": theirs}
            for name in commands if number % 2 == 0 else reversed(commands):
                found[name].append(timed(commands[name], folder / name / "runs", args.trials))
    lines = [
        f"{args.trials} trials of {args.epochs} epochs of {args.images} images, {measure.cores()} at once",
        f"{'':<8}{'trials/h':>22}{'seconds':>22}{'of them training':>22}{'beyond training, a trial':>26}",
    ]
    figures: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "json"}}
    for name, runs in found.items():
        figures[name] = {key: measure.summary([run[key] for run in runs]) for key in runs[0]}
        shown = [measure.shown(figures[name][key]) for key in ("trials_per_h", "seconds", "trained_s", "beyond_s")]
        lines.append(f"{name:<8}{shown[0]:>22}{shown[1]:>22}{shown[2]:>22}{shown[3]:>26}")
    rates = ([run["trials_per_h"] for run in found[name]] for name in ("ours", "nested"))
    figures["ratio"] = measure.ratio(*rates)
    lines.append(f"ours / nested: {measure.shown(figures['ratio'], '.2f')}")
    measure.report(figures, lines, args, "ray")


if __name__ == "__main__":
    main()
