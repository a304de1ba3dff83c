"""Nodes that are cut off, come, and are taken away with notice: real networks, real raylets."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch

from dogvae.config import Safety
from dogvae.storage import Storage
from dogvae.train import loop
from tests.command import TRAIN, Command
from tests.faults.bench import EPOCHS, StopAt, job, records
from tests.faults.net import ENV, Net
from tests.faults.test_processes import flags


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


def world_sizes(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line)["world_size"] for line in lines]


def newest_step(run: Path) -> int:
    return max(int(f.name[5:14]) for f in (run / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_elastic_run_grows_and_outlives_a_node_that_goes(net: Net, dataset: Path, whole: Path, tmp_path: Path) -> None:
    """--cpus 1:2 on one node gets a second one, which is then announced to go, and whose cable is cut.

    One worker, two, one: no epoch is missing or twice, and the losses are those of an undisturbed run.
    """
    net.add()
    typed = flags(job(dataset, epochs=EPOCHS * 20))  # long enough for all of it; stopped in the end
    typed[typed.index("--cpus") + 1] = "1:2"
    command = Command(tmp_path, TRAIN, *typed, address=net.address, inside=net.head.inside, env=ENV)
    try:
        run = tmp_path / "runs/run"
        command.wait_until(lambda: world_sizes(run)[-1:] == [1], 120)
        second = net.add()
        grown = command.wait_until(lambda: world_sizes(run)[-1:] == [2], 120)
        notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        at = ["--address", net.address, "--node-id", net.id_of(second), "--deadline-remaining-seconds", "8"]
        net.head.ray("drain-node", *at, *notice)
        command.wait_for("a node is about to go", 30)
        time.sleep(2)
        saved = newest_step(run)
        second.cut()
        left = command.wait_until(lambda: world_sizes(run)[-1:] == [1], 120)
        print(f"an epoch with the new node after {grown:.1f} s; one without it {left:.1f} s after it was cut off")
    finally:
        command.process.terminate()
        code = command.process.wait(60)
    assert code == 143, command.text()
    went_on = re.findall(r"going on in epoch (\d+) after step (\d+), with (\d) worker", command.text())
    assert [workers for _, _, workers in went_on] == ["2", "1"]
    epoch, step, _ = map(int, went_on[-1])
    assert 13 * (epoch - 1) + step >= saved
    lines = records(run)
    assert [r["epoch"] for r in lines] == list(range(len(lines)))
    for ours, theirs in zip(lines[:3], records(whole)[:3], strict=True):
        assert ours["train_kl"] == pytest.approx(theirs["train_kl"], rel=1e-2)
