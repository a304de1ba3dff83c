"""What a tracker has of a run, read by the tracker's own tools."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from PIL import Image

EXIT_CODES = {"finished": 0, "stopped": 255, "failed": 1}  # of Weights & Biases; 255: as after Ctrl-C
MLFLOW_STATES = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}


@dataclass
class Sent:
    """A run of a tracker: numbers by step and tag, the sizes of pictures by tag and step."""

    name: str
    group: str
    state: str
    config: dict[str, Any]
    numbers: dict[int, dict[str, float]]
    pictures: dict[str, dict[int, tuple[int, int]]]
    best: dict[str, float]


def of_mlflow(experiment: str = "dogvae") -> list[Sent]:
    """The runs of an experiment of the store that MLFLOW_TRACKING_URI names."""
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    assert found
    return [_of_mlflow(client, run) for run in client.search_runs([found.experiment_id])]


def _of_mlflow(client: MlflowClient, run: Any) -> Sent:
    numbers: dict[int, dict[str, float]] = defaultdict(dict)
    for tag in run.data.metrics:
        for metric in [] if tag.startswith("best/") else client.get_metric_history(run.info.run_id, tag):
            assert tag not in numbers[metric.step], f"step {metric.step} of {tag} is there twice"
            numbers[metric.step][tag] = metric.value
    pictures: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    for file in client.list_artifacts(run.info.run_id, "images"):
        if named := re.fullmatch(r"images/(.*)\+step\+(\d+)\+timestamp\+.*\.png", file.path):
            with (
                TemporaryDirectory() as folder,
                Image.open(client.download_artifacts(run.info.run_id, file.path, folder)) as picture,
            ):
                pictures[named[1].replace("~", "/")][int(named[2])] = picture.size
    return Sent(
        name=run.info.run_name,
        group=run.data.tags.get("group", ""),
        state=MLFLOW_STATES.get(run.info.status, run.info.status),
        config=run.data.params,
        numbers=dict(numbers),
        pictures=dict(pictures),
        best={tag: value for tag, value in run.data.metrics.items() if tag.startswith("best/")},
    )


def of_wandb(folder: Path) -> list[Sent]:
    """The runs whose offline files are in `folder`/wandb. A resumed run has a file for each attempt."""
    runs: dict[str, Sent] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        for kind, content in ((record["type"], record.get(record["type"])) for record in map(json.loads, lines)):
            if kind == "run":
                assert content["project"] == "dogvae"
                new = Sent(content["display_name"], content.get("run_group", ""), "", {}, {}, defaultdict(dict), {})
                sent = runs.setdefault(content["run_id"], new)
            elif kind == "config":
                sent.config |= content["update"]
            elif kind == "summary":
                sent.best |= {k: v for k, v in content["update"].items() if k.startswith("best/")}
                sent.state = content["update"].get("state", sent.state)
            elif kind == "history":
                step, item = content["item"]["_step"], content["item"]
                assert step not in sent.numbers, f"step {step} is there twice"
                numbers = {k: v for k, v in item.items() if not k.startswith(("_", "view/"))}
                sent.numbers[step] = numbers
                for tag, path in ((k.removesuffix(".path"), v) for k, v in item.items() if k.endswith(".path")):
                    sent.pictures[tag][step] = Image.open(file.parent / "files" / path).size
            elif kind == "exit":
                assert content.get("exit_code", 0) == EXIT_CODES[sent.state]
    return list(runs.values())
