"""Which Ray is joined, how many workers a cluster has room for, and waiting for its nodes; real nodes: tests/hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from dogvae.cluster import nodes
from dogvae.cluster.connect import _started_by_user
from dogvae.cluster.nodes import Workers
from dogvae.errors import RunFailed, UsageError
from tests.support.command import ROOT

HEAD, GPU = {"CPU": 0.0}, {"CPU": 4.0, "GPU": 1.0}  # nodes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- which Ray is joined


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file in which `ray start` notes its address, with the address of a server that listens."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    file = tmp_path / "ray/ray_current_cluster"
    file.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        file.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        yield file


def test_ray_of_this_user_is_found_and_that_of_another_is_not(noted: Path) -> None:
    assert _started_by_user() == noted.read_text()
    if os.getuid() == 0:  # giving a file to another user needs root
        os.chown(noted, 12345, 12345)
        assert _started_by_user() is None


def test_ray_that_has_ended_is_not_joined(noted: Path) -> None:
    noted.write_text(f"127.0.0.1:{free_port()}")
    began = time.monotonic()
    assert _started_by_user() is None
    noted.unlink()
    assert _started_by_user() is None
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:{port}", "no Ray answers at"),
        ("ray://127.0.0.1:10001", "neither HOST:PORT"),
        ("http://127.0.0.1:{port}", "does not let us in"),
    ],
)
def test_address_without_an_answer_is_refused_with_one_line(address: str, message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "train_distributed.py", "--address", address.format(port=free_port())], cwd=tmp_path,
        capture_output=True, text=True, env={name: v for name, v in os.environ.items() if name != "RAY_ADDRESS"},
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "--address" in done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_workers_of_a_ray_of_our_own_have_the_niceness_that_is_documented(tmp_path: Path) -> None:
    asked = "from dogvae.cluster.connect import connect; import os, ray; connect()\n"
    asked += "print(ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0))"
    env = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    for given, expected in (({}, 5), ({"RAY_worker_niceness": "1"}, 1)):
        done = subprocess.run(
            [sys.executable, "-c", asked], cwd=tmp_path, capture_output=True, text=True, env=env | given
        )
        assert done.stdout.split() == [str(expected)], done.stderr


# --- the workers of a cluster


def fake_cluster(monkeypatch: pytest.MonkeyPatch, there: list[dict[str, float]], limits: dict[str, int] | None) -> None:
    """A cluster of these nodes, which an autoscaler may extend to these limits."""
    total = {kind: sum(node.get(kind, 0) for node in there) for kind in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in there])
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(nodes, "_autoscaler_limits", lambda: limits)


def test_workers_are_chosen_from_nodes_that_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cluster(monkeypatch, [HEAD], {"CPU": 16, "GPU": 4})
    assert nodes.choose_workers(None, None) == Workers(4, True)
    assert nodes.choose_workers(3, None) == Workers(3, True)
    assert nodes.missing(Workers((2, 4), True)) == "there is room for 0 of 2 workers"
    assert (nodes.slots(4, 1.0), nodes.most_slots(4, 1.0), nodes.most_slots(1, 0.5)) == (0, 4, 8)
    assert nodes.has_gpus()
    with pytest.raises(UsageError, match=r"--gpus 5: the cluster has 4 GPUs and 16 CPUs at most; try --gpus 4"):
        nodes.choose_workers(5, None)


def test_limits_and_least_nodes_come_from_the_autoscalers_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head counts, and `max_workers` limits all kinds together. What local machines have is unknown."""
    head, gpu = {"resources": {"CPU": 2}}, {"min_workers": 2, "max_workers": 4, "resources": {"CPU": 4, "GPU": 1}}
    aws = {"provider": {"type": "aws"}, "max_workers": 3, "head_node_type": "head"}
    ips = ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
    local = {"provider": {"type": "local", "worker_ips": ips}, "max_workers": 3, "head_node_type": "head"}
    cases: list[tuple[Any, Any, int]] = [
        ({**aws, "available_node_types": {"head": head, "gpu": gpu}}, {"CPU": 14, "GPU": 3}, 3),
        ({**local, "available_node_types": {"local": {"min_workers": 0, "max_workers": 4, "resources": {}}}}, None, 4),
        (None, None, 1),
    ]
    for config, limits, least in cases:
        monkeypatch.setattr(nodes, "_autoscaler_config", lambda config=config: config)
        assert nodes._autoscaler_limits() == limits
        assert nodes.least_nodes() == least


def test_config_is_read_from_the_file_of_the_running_autoscaler(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("max_workers: 3\n")
    sleep = "import time; time.sleep(60)"
    typed = [sys.executable, "-c", sleep, "--gcs-address=1.2.3.4:5", f"--autoscaling-config={tmp_path}/config.yaml"]
    with subprocess.Popen(typed) as monitor:
        try:
            assert nodes._read_autoscaler_config("1.2.3.4:5") == {"max_workers": 3}
            assert nodes._read_autoscaler_config("1.2.3.4:6") is None
        finally:
            monitor.kill()


# --- waiting for nodes


class Autoscaler:
    """Keeps the requests that it gets. A second GPU node comes at the third look, if `adds_node`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, adds_node: bool) -> None:
        self.requests: list[Any] = []
        looks: list[int] = []

        def current_nodes() -> list[dict[str, Any]]:
            looks.append(1)
            there = [HEAD, GPU, GPU] if adds_node and len(looks) > 2 else [HEAD, GPU]
            return [{"Alive": True, "Resources": node} for node in there]

        fake_cluster(monkeypatch, [HEAD, GPU], {"CPU": 16, "GPU": 4})
        monkeypatch.setattr(ray, "nodes", current_nodes)
        monkeypatch.setattr(nodes, "NODES_INTERVAL_S", 0.02)
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: self.requests.append(bundles))


def test_nodes_are_requested_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    autoscaler = Autoscaler(monkeypatch, adds_node=True)
    nodes.wait_for_nodes(Workers((2, 4), True), 60)
    assert autoscaler.requests == [[{"CPU": 1.0, "GPU": 1.0}] * 4, []]
    assert "there is room for 1 of 2 workers: waiting at most 1:00" in capsys.readouterr().out


def test_waiting_for_nodes_ends_and_withdraws_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    autoscaler = Autoscaler(monkeypatch, adds_node=False)
    with pytest.raises(RunFailed, match=r"room for 1 of 2 workers after .*ray status.*--node-patience"):
        nodes.wait_for_nodes(Workers(2, True), 0.1)
    assert autoscaler.requests[-1] == []


def test_nodes_are_not_waited_for_without_need_or_autoscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    autoscaler = Autoscaler(monkeypatch, adds_node=False)
    nodes.wait_for_nodes(Workers((1, 4), True), 60)
    assert autoscaler.requests == []
    fake_cluster(monkeypatch, [{"CPU": 1.0, "GPU": 2.0}], None)
    with pytest.raises(UsageError, match="room for 1 of 2 workers, and no autoscaler"):
        nodes.wait_for_nodes(Workers(2, True), 60)
