"""The doctor: on a healthy machine, on one with something wrong, and what it makes of a node's answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dogvae.commands.doctor import Finding, _judge, _look, _read, _versions, show
from dogvae.data.dataset import Dataset
from tests.support.runs import make_dataset

NODE = {"Resources": {"CPU": 4.0, "GPU": 1.0}}


def answer(**changes: Any) -> dict[str, Any]:
    """Of a node that has all that it should."""
    well = {"versions": _versions(), "gpus": 1, "clock": 100.5, "disk": 50 << 30, "shm": 8 << 30}
    return {
        **well,
        "storage": "",
        "probe": ".probe",
        "data": "",
        "images": 120,
        "fingerprint": "0123456789",
        "copy": "",
        **changes,
    }


def judged(**changes: Any) -> dict[str, Finding]:
    findings = _judge(NODE, "10.0.0.1", answer(**changes), _versions(), 100.0, 101.0, "runs", "dataset")
    return {f.check: f for f in findings}


def test_all_is_well() -> None:
    assert {name for name, f in judged().items() if not f.ok} == set()
    assert judged()["dataset"].found == "120 images, fingerprint 01234567"


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
def test_one_thing_is_wrong(check: str, changes: dict[str, Any], found: str) -> None:
    """It alone is told, with what was found and what to do."""
    wrong = {name: f for name, f in judged(**changes).items() if not f.ok}
    assert list(wrong) == [check]
    assert re.search(found, wrong[check].found)
    assert wrong[check].remedy


def test_a_clock_is_compared_with_the_time_that_asking_took() -> None:
    """An answer that came late says nothing against a clock."""
    findings = _judge(NODE, "n", answer(clock=140.0), _versions(), 100.0, 160.0, "runs", None)
    assert all(f.ok for f in findings)
    assert "dataset" not in {f.check for f in findings}


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert not show([Finding("disk", "a", True, "fine", "x"), Finding("clock", "bb", False, "9 s off", "turn on NTP")])
    assert capsys.readouterr().out == "✓ disk   a   fine\n✗ clock  bb  9 s off: turn on NTP\n"


def test_what_a_node_answers(tmp_path: Path) -> None:
    """Of the dataset and of the storage; the probe stays until all have looked for it."""
    make_dataset(tmp_path / "dataset")
    found = _look(str(tmp_path / "runs"), str(tmp_path / "dataset"), "token", 3)
    assert (found["images"], found["data"], found["storage"]) == (120, "", "")
    assert found["fingerprint"] == Dataset(tmp_path / "dataset").fingerprint
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [found["probe"]]
    assert _read(str(tmp_path / "runs"), [found["probe"], "another"], 0) == 1
    (tmp_path / "file").write_text("no folder")
    assert str(tmp_path / "file") in _look(str(tmp_path / "file"), None, "token", 0)["storage"]
