"""The doctor: what a node reports, and what the doctor makes of the report of a healthy node and of others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dogvae.commands.doctor import Finding, _inspect, _judge, _read, _versions, show
from dogvae.data.dataset import Dataset
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
