"""`ray up docs/cluster.local.yaml` on hosts with sshd, and what the documentation promises of such a cluster.

The tests are one story, in their order: a head and two workers come up, and a third worker joins by hand.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.hosts import SHARE, USER, Hosts, workplace
from tests.hosts.laptop import RAY, Laptop
from tests.support.command import ROOT, TRAIN, Command, wait_until
from tests.support.runs import make_dataset

pytestmark = pytest.mark.slow

# The hosts share this machine's CPUs, so the head has none for Ray, and each other host has one.
# A machine that has lost its head gives up after 15 seconds instead of 60.
SIZES = """export RAY_gcs_rpc_server_reconnect_timeout_s=15
export RAY_OVERRIDE_RESOURCES='{"CPU": '$([ $(hostname) = head ] && echo 0 || echo 1)'}'\n"""


class Lab:
    """The hosts, the laptop, and the seconds that each step took."""

    def __init__(self, base: Path) -> None:
        self.hosts = Hosts(base, ["head", "w1", "w2", "w3", "stranger"], SIZES)
        self.laptop = Laptop(self.hosts, {"RAY_UP_enable_autoscaler_v2": "0"})
        self.seconds: dict[str, float] = {}
        self.runs = self.hosts.share / "runs"
        self.commands: list[Command] = []

    def up(self) -> None:
        for name in ("head", "w1", "w2", "w3"):
            self.hosts[name].power_on()
        self.laptop.type(RAY, "get-auth-token", "--generate")
        mine = {
            "head_ip: HEAD_IP": f"head_ip: {self.hosts['head'].address}",
            "WORKER_1_IP, WORKER_2_IP": f"{self.hosts['w1'].address}, {self.hosts['w2'].address}",
            "ssh_user: USER": f"ssh_user: {USER}",
            "~/.ssh/id_ed25519": f"{self.hosts.base}/key",
            "/mnt/SHARE": SHARE,
        }
        self.laptop.write(ROOT / "docs/cluster.local.yaml", mine)
        began = time.monotonic()
        self.laptop.ray("up")
        self.seconds["ray up"] = time.monotonic() - began
        self.seconds["nodes joined"] = wait_until(lambda: len(self.nodes()) == 3, 90)

    def join(self, name: str) -> None:
        """Set a machine up by hand, as docs/cluster.md says, and join it to the cluster."""
        head, host = self.hosts["head"], self.hosts[name]
        quiet = "-q -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        host.ssh("mkdir -p ~/.ray")
        for what in ("code", ".ray/auth_token", ".bashrc", ".dogvae-env"):
            head.ssh(f"scp -i ~/ray_bootstrap_key.pem {quiet} -r ~/{what} {host.address}:~/{what}")
        host.ssh(f"export RAY_AUTH_MODE=token; ray start --address={head.address}:6379")

    def nodes(self) -> dict[str, str]:
        return self.laptop.nodes(self.hosts["head"])

    def start(self, *args: str) -> Command:
        """Start `python ARGS` on the laptop; `close` stops it."""
        self.commands.append(self.laptop.start(*args))
        return self.commands[-1]

    def lines(self, run: str) -> list[dict[str, Any]]:
        path = self.runs / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def close(self) -> None:
        for command in self.commands:
            command.stop()
        self.laptop.close()
        self.hosts.close()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with workplace() as folder, closing(Lab(folder)) as made:
        make_dataset(made.hosts.share / "dogs")
        made.up()
        yield made


def test_doctor_reports_every_host_as_ready(lab: Lab) -> None:
    told = lab.laptop.ray("exec", f"dogvae doctor --data {SHARE}/dogs")
    assert re.search(r"✓ nodes +all +3 of 3 joined", told)
    for name in ("head", "w1", "w2"):
        for check in ("versions", "disk", "clock", "storage", "dataset", "shared"):
            assert re.search(rf"✓ {check} +{lab.hosts[name].address} ", told), told
    assert re.search(r"✓ gloo +all +3 of 3 reach each other", told)
    assert "✗" not in told
    assert [path.name for path in lab.runs.iterdir()] == []


PROBE = """
import socket, sys, urllib.error, urllib.request
head, token = sys.argv[1:]
def answers(port):
    return socket.socket().connect_ex((head, port)) == 0
def http(path):
    request = urllib.request.Request(f"http://{head}:8265{path}", headers={"Authorization": f"Bearer {token}"})
    try:
        return urllib.request.urlopen(request, timeout=3).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return "refused"
print("dashboard", http("/"))
print("jobs", http("/api/jobs/"))
import ray
for name, port, address in (("driver", 6379, f"{head}:6379"), ("client", 10001, f"ray://{head}:10001")):
    try:
        if answers(port):
            ray.init(address=address, logging_level="CRITICAL")
        print(name, "let in" if answers(port) else "refused")
    except Exception as error:
        print(name, "refused", type(error).__name__)
print("open", *(port for port in range(1, 65536) if answers(port)))
"""


@pytest.fixture(scope="module")
def strangers(lab: Lab) -> list[subprocess.Popen[str]]:
    """Two probes from a machine outside the cluster: one without a token, one with a wrong token."""
    tries = []
    for token in ("", "0" * 64):
        mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        env = {**lab.laptop.env, **mode, "HOME": str(lab.hosts.base / "nobody")}
        command = lab.hosts["stranger"].inside(sys.executable, "-c", PROBE, lab.hosts["head"].address, token)
        tries.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    return tries


def test_search_runs_trials_on_both_workers_and_exports(lab: Lab, strangers: object) -> None:
    settings = '--set width=4 --set latent_dim=4 --set batch_size=8 --search "lr=loguniform(1e-3,1e-2)"'
    typed = f"python -m tune search --data {SHARE}/dogs --name s --trials 4 --epochs 3 --scheduler none {settings}"
    told = lab.laptop.ray("exec", f"cd code && {typed}")
    entries = json.loads((lab.runs / "s/trials.json").read_text())
    assert [entry["state"] for entry in entries] == ["done"] * 4, told
    for name in ("w1", "w2"):
        lab.hosts[name].ssh("grep -q actor_name:ImplicitFunc /tmp/ray/session_latest/logs/worker-*.out")
    assert (lab.runs / "s/export/model.safetensors").exists()


def test_stranger_on_the_network_is_refused(lab: Lab, strangers: list[subprocess.Popen[str]]) -> None:
    """By dashboard, jobs, GCS and client, without a token and with a wrong one. Prints the ports that answer at all."""
    for one in strangers:
        told = dict(line.split(" ", 1) for line in one.communicate(timeout=180)[0].splitlines())
        assert told["dashboard"] == told["jobs"] == "refused"
        assert told["driver"].split()[0] == told["client"].split()[0] == "refused"
    answering = {int(port) for port in told["open"].split()}
    listening = {}
    for line in lab.hosts["head"].ssh("ss -ltnpH").splitlines():
        place, name = line.split()[3], re.search(r'users:\(\("([^"]+)', line)
        if not place.startswith(("127.", "[::1]")):
            listening[int(place.rsplit(":", 1)[1])] = name[1] if name else "?"
    print("a stranger reaches on the head:", {port: listening.get(port) for port in sorted(answering)})
    assert answering <= set(listening)
    assert {22, 6379} <= answering


def test_mistake_in_a_job_is_one_line_and_exit_status_2_on_the_laptop(lab: Lab) -> None:
    command = lab.start(TRAIN, "--address", lab.laptop.open_dashboard(), "--data", f"{SHARE}/nowhere", "--name", "x")
    assert command.wait(90) == 2, command.text()
    assert re.search(rf"^error: .*{SHARE}/nowhere", command.text(), re.M), command.text()
    assert "Traceback" not in command.text()


@pytest.fixture(scope="module")
def training(lab: Lab) -> Command:
    """A job from the laptop with `--cpus 1:2`, which trains on two hosts; a third host then joins by hand."""
    dashboard = lab.laptop.open_dashboard()
    began, clock = time.monotonic(), time.time()
    command = lab.start(
        TRAIN, "--address", dashboard, "--data", f"{SHARE}/dogs", "--name", "run", "--epochs", "100000", "--width", "4",
        "--latent-dim", "4", "--batch-size", "8", "--cpus", "1:2", "--checkpoint-every", "5s",
    )  # fmt: skip
    command.wait_until(lambda: lab.lines("run"), 120)
    lab.seconds["command to first epoch"] = time.monotonic() - began
    (events,) = (lab.runs / "run").glob("events.out.tfevents.*")  # made before the first step; the name has its time
    lab.seconds["command to first step"] = int(events.name.split(".")[3]) - clock
    assert lab.lines("run")[0]["world_size"] == 2
    lab.join("w3")
    wait_until(lambda: len(lab.nodes()) == 4, 60)
    return command


def newest_step(lab: Lab) -> int:
    """The step of the newest checkpoint."""
    return max(int(file.name[5:14]) for file in (lab.runs / "run/checkpoints").glob("step-*"))


def again(lab: Lab, command: Command, world_size: int, what: str, saved: int) -> None:
    """Wait for two epochs on `world_size` workers, resumed from the checkpoint of step `saved` or a later one."""
    began, before, restarts = time.monotonic(), len(lab.lines("run")), command.text().count("going on in epoch")

    def trains() -> bool:
        new = lab.lines("run")[before:]
        return len(new) > 1 and new[-1]["world_size"] == world_size and command.text().count("going on in") > restarts

    command.wait_until(trains, 180)
    lab.seconds[what] = time.monotonic() - began
    epoch, step, workers = re.findall(r"going on in epoch (\d+) after step (\d+), with (\d) worker", command.text())[-1]
    assert int(workers) == world_size
    assert 13 * (int(epoch) - 1) + int(step) >= saved


def test_run_survives_a_host_that_loses_power(lab: Lab, training: Command) -> None:
    saved = newest_step(lab)
    lab.hosts["w1"].power_off()
    again(lab, training, 2, "power lost to training again", saved)
    print(json.dumps({what: round(s, 1) for what, s in lab.seconds.items()}))


def test_run_saves_every_step_once_a_host_is_announced_to_go(lab: Lab, training: Command) -> None:
    """Then the host's cable is cut; the steps between the notice and the cut are not lost."""
    head, second = lab.hosts["head"], lab.hosts["w2"]
    node = lab.nodes()[second.address]
    head.ssh(
        f"ray drain-node --address {head.address}:6379 --node-id {node} --reason DRAIN_NODE_REASON_PREEMPTION "
        "--reason-message spot --deadline-remaining-seconds 8"
    )
    training.wait_for("a node is about to go", 30)
    time.sleep(2)
    saved = newest_step(lab)
    second.cut()
    again(lab, training, 1, "cable cut to training again", saved)


def test_run_takes_a_returning_host_in_and_stops_by_signal(lab: Lab, training: Command) -> None:
    """The head starts Ray on it, and one worker becomes two. A signal to the laptop's command then stops the job."""
    lab.hosts["w1"].power_on()
    again(lab, training, 2, "host switched on to training on it", newest_step(lab))
    training.process.terminate()
    assert training.wait(60) == 143, training.text()
    assert f"to go on: dogvae train --address {lab.laptop.open_dashboard()}" in training.text()
    assert "Traceback" not in training.text()
    epochs = [line["epoch"] for line in lab.lines("run")]
    assert epochs == list(range(len(epochs)))
    print(json.dumps({what: round(s, 1) for what, s in lab.seconds.items()}))
    # 20 and 35 on an idle machine; Ray's defaults would make them minutes.
    assert lab.seconds["power lost to training again"] < 40
    assert lab.seconds["cable cut to training again"] < 60


def test_ray_down_stops_ray_on_the_head_and_the_nodes_elsewhere(lab: Lab) -> None:
    lab.laptop.ray("down")
    for name in ("head", "w1", "w3"):
        wait_until(lambda host=lab.hosts[name]: "raylet/raylet" not in host.ssh("ps -eo args"), 60)
    left = lab.hosts["head"].ssh("ps -eo args")
    assert "gcs_server" not in left
    assert "dashboard" not in left
