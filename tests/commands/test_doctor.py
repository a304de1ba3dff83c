"""The doctor: what a node reports, and what the doctor makes of the report of a healthy node and of others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dogvae.commands.doctor import Finding, _inspect, _judge, _judge_speed, _read, _versions, show
from dogvae.commands.doctor_group import add_ranks, free_port, time_gradients
from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.network.vae import VAE
from tests.support.ranks import start_ranks
from tests.support.runs import make_dataset


def findings(began: float = 100.0, ended: float = 101.0, **changes: Any) -> dict[str, Finding]:
    """The findings about a node that has everything it should have, but for these changes."""
    answer = {
        "versions": _versions(), "gpus": 1, "clock": 100.5, "disk": 50 << 30, "shm": 8 << 30, "storage": "",
        "probe": ".probe", "data": "", "images": 120, "fingerprint": "0123456789", "copy": "", **changes,
    }  # fmt: skip
    node = {"Resources": {"CPU": 4.0, "GPU": 1.0}}
    return {f.check: f for f in _judge(node, "10.0.0.1", answer, _versions(), began, ended, "runs", "dataset")}


@pytest.mark.parametrize(
    ("check", "changes", "found"),
    [
        ("versions", {"versions": {**_versions(), "torch": "1.0"}}, r"^torch 1\.0, here "),
        ("GPUs", {"gpus": 0}, "Ray counts 1, torch sees 0"),
        ("clock", {"clock": 90.0}, "10 s off"),
        ("clock", {"clock": 161.0}, "60 s off"),
        ("disk", {"disk": 1 << 30}, "1 GB free"),
        ("memory", {"shm": 64 << 20}, "0.1 GB"),
        ("storage", {"storage": "permission denied"}, "permission denied"),
        ("dataset", {"data": "there is no dataset"}, "there is no dataset"),
    ],
)
def test_one_fault_is_found_with_its_remedy(check: str, changes: dict[str, Any], found: str) -> None:
    wrong = {name: f for name, f in findings(**changes).items() if not f.ok}
    assert list(wrong) == [check]
    assert re.search(found, wrong[check].found)
    assert wrong[check].remedy


def test_healthy_node_has_no_fault() -> None:
    """Also if its answer comes late, which does not mean that its clock is off."""
    for found in (findings(), findings(clock=140.0, ended=160.0)):
        assert all(f.ok for f in found.values())
        assert found["versions"].found == "same as here"
        assert found["dataset"].found == "120 images, fingerprint 01234567"


@pytest.mark.parametrize(
    ("gpus", "step_ms", "exchange_ms", "ok", "found"),
    [
        ([1, 1, 1, 1], 7.0, 15.0, False, "12.5 MB .* in 15.0 ms, one node trains a step of 64 images in 7.0 ms"),
        ([1, 1, 1, 1], 28.0, 15.0, True, "28.0 ms"),
        ([4, 2], 40.0, 15.0, False, "10.0 ms"),  # four GPUs of one node are faster without the other node
        ([4, 2], 80.0, 15.0, True, "20.0 ms"),
    ],
)
def test_network_that_is_slower_than_one_node_is_found(
    gpus: list[int], step_ms: float, exchange_ms: float, ok: bool, found: str
) -> None:
    finding = _judge_speed(step_ms / 1e3, exchange_ms / 1e3, 12.5, gpus)
    assert finding.ok == ok
    assert re.search(found, finding.found)
    assert f"all {sum(gpus)} GPUs would be slower: use --gpus {max(gpus)}" in finding.remedy


TINY = Config.make(width=4, batch_size=2)


def measure_on(rank: int, ports: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    times = time_gradients(TINY, "gloo", "127.0.0.1", ports[0], 2, rank)
    total = add_ranks("gloo", "127.0.0.1", ports[1], 2, rank)
    (folder / str(rank)).write_text(json.dumps([*times, total]))


def test_nodes_time_a_step_and_the_exchange_of_its_gradients(tmp_path: Path) -> None:
    start_ranks(measure_on, 2, [free_port(0), free_port(1)], tmp_path)
    for rank in "01":
        step_s, exchange_s, nbytes, total = json.loads((tmp_path / rank).read_text())
        assert 0 < exchange_s < step_s < 5  # two processes on one machine, and hardly any weights
        assert nbytes == 4 * sum(p.numel() for p in VAE(TINY.model).parameters())
        assert total == 1


def test_show_prints_a_line_for_each_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert not show([Finding("disk", "a", True, "fine", "x"), Finding("clock", "bb", False, "9 s off", "turn on NTP")])
    assert capsys.readouterr().out == "✓ disk   a   fine\n✗ clock  bb  9 s off: turn on NTP\n"


def test_node_reports_its_dataset_and_leaves_a_file_in_the_storage(tmp_path: Path) -> None:
    make_dataset(tmp_path / "dataset")
    found = _inspect(str(tmp_path / "runs"), str(tmp_path / "dataset"), "token", 3)
    assert (found["images"], found["data"], found["storage"]) == (120, "", "")
    assert found["fingerprint"] == Dataset(tmp_path / "dataset").fingerprint
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [found["probe"]]
    assert _read(str(tmp_path / "runs"), [found["probe"], "another"], 0) == 1
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in _inspect(str(tmp_path / "file"), None, "token", 0)["storage"]
