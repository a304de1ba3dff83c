"""Which Ray is joined, what a cluster has room for, and waiting for its nodes; the real ones: tests/cluster."""

from __future__ import annotations

import argparse
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

from dogvae.cluster import nodes as cluster
from dogvae.cluster.connect import _started_by_user
from dogvae.cluster.network import network_settings
from dogvae.cluster.nodes import Workers
from dogvae.cluster.submit import SENT
from dogvae.commands import flags
from dogvae.commands.remote import run_there
from dogvae.errors import RunFailed, UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file in which `ray start` notes its address; somebody listens there."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    file = tmp_path / "ray/ray_current_cluster"
    file.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        file.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        yield file


def test_what_this_user_started_is_found(noted: Path) -> None:
    assert _started_by_user() == noted.read_text()


@pytest.mark.skipif(os.getuid() != 0, reason="giving a file to somebody else needs root")
def test_what_somebody_else_started_is_not_joined(noted: Path) -> None:
    os.chown(noted, 12345, 12345)
    assert _started_by_user() is None


def test_what_has_gone_is_not_joined(noted: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        noted.write_text(f"127.0.0.1:{free.getsockname()[1]}")
    began = time.monotonic()
    assert _started_by_user() is None
    noted.unlink()
    assert _started_by_user() is None
    assert time.monotonic() - began < 1


def test_address_that_nobody_listens_at(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address, told in (
        (f"127.0.0.1:{port}", "no Ray answers at"),
        ("ray://127.0.0.1:10001", "neither HOST:PORT"),
        (f"http://127.0.0.1:{port}", "does not let us in"),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "train_distributed.py", "--address", address], cwd=tmp_path, capture_output=True,
            text=True, env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        assert "--address" in done.stderr
        assert told in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def made_up(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], limits: dict[str, int] | None) -> None:
    """A cluster of such nodes, which an autoscaler may bring to such limits."""
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.setattr(cluster, "_autoscaler_limits", lambda: limits)


HEAD, GPU = {"CPU": 0.0}, {"CPU": 4.0, "GPU": 1.0}


def test_plan_counts_nodes_that_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, [HEAD], {"CPU": 16, "GPU": 4})
    assert cluster.plan(None, None) == Workers(4, True)
    assert cluster.plan(3, None) == Workers(3, True)
    assert cluster.missing(Workers((2, 4), True)) == "there is room for 0 of 2 workers"
    assert (cluster.slots(4, 1.0), cluster.most_slots(4, 1.0), cluster.most_slots(1, 0.5)) == (0, 4, 8)
    assert cluster.has_gpus()
    with pytest.raises(UsageError, match=r"--gpus 5: the cluster has 4 GPUs and 16 CPUs at most; try --gpus 4"):
        cluster.plan(5, None)


def test_limits_and_least_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the head, and no more nodes than there may be in all; of one's own machines what they have is not known."""
    head, gpu = {"resources": {"CPU": 2}}, {"min_workers": 2, "max_workers": 4, "resources": {"CPU": 4, "GPU": 1}}
    config: dict[str, Any] = {"provider": {"type": "aws"}, "max_workers": 3, "head_node_type": "head"}
    config["available_node_types"] = {"head": head, "gpu": gpu}
    monkeypatch.setattr(cluster, "_config", lambda: config)
    assert cluster._autoscaler_limits() == {"CPU": 14, "GPU": 3}
    assert cluster.least_nodes() == 3
    config["available_node_types"] = {"local": {"min_workers": 0, "max_workers": 4, "resources": {}}}
    config["provider"] = {"type": "local", "worker_ips": ["10.0.0.2", "10.0.0.3", "10.0.0.4"]}
    assert cluster._autoscaler_limits() is None
    assert cluster.least_nodes() == 4
    monkeypatch.setattr(cluster, "_config", lambda: None)
    assert cluster._autoscaler_limits() is None
    assert cluster.least_nodes() == 1


def test_config_is_that_of_the_running_autoscaler(tmp_path: Path) -> None:
    """The file that its command line names."""
    (tmp_path / "config.yaml").write_text("max_workers: 3\n")
    sleep = "import time; time.sleep(60)"
    typed = [sys.executable, "-c", sleep, "--gcs-address=1.2.3.4:5", f"--autoscaling-config={tmp_path}/config.yaml"]
    with subprocess.Popen(typed) as monitor:
        try:
            assert cluster._config_here("1.2.3.4:5") == {"max_workers": 3}
            assert cluster._config_here("1.2.3.4:6") is None
        finally:
            monitor.kill()


class Asked:
    """What the autoscaler is asked for; the nodes come at the second look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, come: bool) -> None:
        self.bundles: list[Any] = []
        looks: list[int] = []

        def nodes() -> list[dict[str, Any]]:
            looks.append(1)
            there = [HEAD, GPU, GPU] if come and len(looks) > 2 else [HEAD, GPU]
            return [{"Alive": True, "Resources": node} for node in there]

        made_up(monkeypatch, [HEAD, GPU], {"CPU": 16, "GPU": 4})
        monkeypatch.setattr(ray, "nodes", nodes)
        monkeypatch.setattr(cluster, "NODES_INTERVAL_S", 0.02)
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: self.bundles.append(bundles))


def test_nodes_are_asked_for_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Asked(monkeypatch, come=True)
    cluster.wait_for_nodes(Workers((2, 4), True), 60)
    assert asked.bundles == [[{"CPU": 1.0, "GPU": 1.0}] * 4, []]
    assert "there is room for 1 of 2 workers: waiting at most 1:00" in capsys.readouterr().out


def test_waiting_for_nodes_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, come=False)
    with pytest.raises(RunFailed, match=r"room for 1 of 2 workers after .*ray status.*--node-patience"):
        cluster.wait_for_nodes(Workers(2, True), 0.1)
    assert asked.bundles[-1] == []  # it does not go on buying machines for nobody


def test_nodes_are_not_waited_for_without_need_or_hope(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, come=False)
    cluster.wait_for_nodes(Workers((1, 4), True), 60)
    assert asked.bundles == []
    made_up(monkeypatch, [{"CPU": 1.0, "GPU": 2.0}], None)
    with pytest.raises(UsageError, match="room for 1 of 2 workers, and no autoscaler"):
        cluster.wait_for_nodes(Workers(2, True), 60)


def test_workers_hear_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("NCCL_", "GLOO_", "TORCH_NCCL_"))]:
        monkeypatch.delenv(name)
    args = flags.training_parser("dogvae train", "").parse_args(
        ["--nccl-socket-ifname", "eth7", "--nccl-debug", "info"]
    )
    told = {"NCCL_SOCKET_IFNAME": "eth7", "NCCL_DEBUG": "INFO"}
    assert flags.network(args) == told
    for name, value in {**told, "GLOO_SOCKET_IFNAME": "eth1", "OTHER": "x"}.items():
        monkeypatch.setenv(name, value)
    assert network_settings() == {**told, "GLOO_SOCKET_IFNAME": "eth1"}


@pytest.mark.parametrize(("flag", "value"), [("--runs", "results"), ("--data", "photos")])
def test_job_takes_no_path_of_this_machine(
    flag: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / value).mkdir()
    monkeypatch.chdir(tmp_path)
    typed = ["--address", "http://127.0.0.1:1", flag, value]
    args = flags.training_parser("dogvae train", "").parse_args(typed)
    with pytest.raises(UsageError, match=f"{flag}: {value} is a path on this machine"):
        run_there(args, ["train"], typed)


def test_command_without_a_dashboard_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    args = argparse.Namespace(address=None, runs="runs", data="photos")
    assert run_there(args, ["train"], []) is None
    args.address = "10.0.0.1:6379"
    assert run_there(args, ["train"], []) is None


def test_flags_of_commands_that_are_typed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job tells how to come back to it from where it was sent."""
    monkeypatch.delenv("DOGVAE_RUNS", raising=False)
    assert (flags.sent(), flags.runs_flag("runs"), flags.runs_flag("my runs")) == ("", "", " --runs 'my runs'")
    monkeypatch.setenv("DOGVAE_RUNS", "/mnt/share/runs")
    assert flags.runs_flag("/mnt/share/runs") == ""
    monkeypatch.setenv(SENT, "http://localhost:8265")
    assert flags.sent() == " --address http://localhost:8265"
    assert flags.runs_flag("/mnt/share/runs") == " --runs /mnt/share/runs"
