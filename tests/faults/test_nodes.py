"""Nodes that die, come back and are taken away with notice, on a Ray cluster of several raylets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from dogvae.config import Safety
from dogvae.storage import Storage
from dogvae.train import loop
from tests.faults.bench import EPOCHS, StopAt, differing, final, job, records
from tests.faults.test_processes import Command, flags

QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs for workers, so that it is never one of theirs that goes."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICK})
    yield made
    ray.shutdown()
    made.shutdown()


class Endangered(StopAt):
    """Is told of a node that will go after some steps; the node takes the process along some steps later."""

    def __init__(self, told: int, gone: int) -> None:
        super().__init__()
        self._told, self._gone, self._step = told, gone, 0

    def stopping(self) -> bool:
        self._step += 1
        time.sleep(0.15)  # so that the second between two questions is a few steps
        return False

    def preempted(self) -> bool:
        return self._step >= self._told

    def progress(self, epoch: int, step: int, steps: int) -> None:
        if self._step == self._gone:
            raise SystemExit


def test_at_most_one_step_is_lost_to_a_node_that_goes_with_notice(dataset: Path, tmp_path: Path) -> None:
    """Told during step 12, gone during step 26: there is a checkpoint of step 25 or 26, none was due otherwise."""
    config = job(dataset, epochs=40)
    observer = Endangered(told=12, gone=25)
    with pytest.raises(SystemExit):
        loop(config, Storage(tmp_path), torch.device("cpu"), observer, Safety(checkpoint_s=3600))
    assert any("about to go" in note for note in observer.notes)
    time.sleep(0.5)
    saved = max(int(f.name[5:14]) for f in (tmp_path / "checkpoints").glob("step-*"))
    assert saved in (25, 26)


def begin(where: Path, cluster: Cluster, config: Any, cpus: str) -> Command:
    typed = flags(config)
    typed[typed.index("--cpus") + 1] = cpus
    return Command(where, *typed, address=cluster.address)


def world_sizes(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line)["world_size"] for line in lines]


def wait_until(what: Any, command: Command, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert command.process.poll() is None, command.text()
        assert time.monotonic() < end, command.text()
        time.sleep(0.1)


@pytest.mark.slow
def test_elastic_run_shrinks_and_grows(cluster: Cluster, dataset: Path, whole: Path, tmp_path: Path) -> None:
    """--cpus 1:2: a raylet is killed, training goes on with one worker; a node comes, and it has two again."""
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    config = job(dataset, epochs=EPOCHS * 20)  # long enough for all of it; stopped in the end
    command = begin(tmp_path, cluster, config, "1:2")
    try:
        run = tmp_path / "runs/run"
        wait_until(lambda: world_sizes(run)[-1:] == [2], command, 120)
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: world_sizes(run)[-1:] == [1], command, 120)
        cluster.add_node(num_cpus=1)
        wait_until(lambda: world_sizes(run)[-1:] == [2], command, 120)
    finally:
        command.process.terminate()
        code = command.process.wait(60)
    assert code == 143, command.text()
    lines = records(run)
    assert [r["epoch"] for r in lines] == list(range(len(lines)))
    for ours, theirs in zip(lines[:3], records(whole)[:3], strict=True):
        assert ours["train_kl"] == pytest.approx(theirs["train_kl"], rel=1e-2)


@pytest.mark.slow
def test_node_that_goes_with_notice(cluster: Cluster, dataset: Path, whole: Path, tmp_path: Path) -> None:
    """Ray announces that a node will go, and it does: with a spare node the run ends bit for bit as if it had not."""
    first, _ = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    command = begin(tmp_path, cluster, job(dataset, epochs=EPOCHS), "2")
    try:
        command.wait_for(r"epoch 2/")
        cluster.add_node(num_cpus=1)
        ray_script = Path(sys.executable).with_name("ray")
        drain = [ray_script, "drain-node", "--address", cluster.address, "--node-id", first.node_id]
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*drain, *notice, "--deadline-remaining-seconds", "8"], check=True, env={**os.environ})
        command.wait_for("a node is about to go", 20)
        time.sleep(6)
        cluster.remove_node(first, allow_graceful=False)
        command.wait_for(r"going on in epoch \d+", 90)
        assert command.wait() == 0, command.text()
    finally:
        command.stop()
    run = tmp_path / "runs/run"
    assert differing(final(run), final(whole)) == []
    assert [r["epoch"] for r in records(run)] == list(range(EPOCHS))
    assert re.search(r"going on in epoch \d+ after step \d+, with 2 workers", command.text())
