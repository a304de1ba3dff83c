"""The shipped cluster.yaml and the shipped stack against a server that plays AWS, with hosts as its machines.

In cluster.yaml only the stack's outputs are filled in, as a person would. The server knows no deep learning image, so
the stack takes another image.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest

from dogvae.storage import Storage
from dogvae.training import metrics
from tests.hosts.account import REGION, ROOT, filled_in, make_stack
from tests.hosts.hosts import LAPTOP, Hosts, workplace
from tests.hosts.laptop import RAY, Laptop
from tests.support.command import wait_until

pytestmark = pytest.mark.slow
PORT = 5557
ENV = {
    "AWS_ENDPOINT_URL": f"http://{LAPTOP}:{PORT}",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": REGION,
}


class Cloud:
    """A server that plays AWS. For each machine that it starts a host boots: the head, then the worker."""

    def __init__(self, base: Path) -> None:
        self.hosts = Hosts(base, ["head", "w1"], "".join(f"export {k}={v}\n" for k, v in ENV.items()))
        self.laptop = Laptop(self.hosts, ENV)
        script = Path(sys.executable).with_name("moto_server")
        quiet = subprocess.DEVNULL
        self._server = subprocess.Popen(
            [script, "-H", LAPTOP, "-p", str(PORT)], env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
            stdout=quiet, stderr=quiet,
        )  # fmt: skip
        self.ec2 = self.client("ec2")
        wait_until(self._answers, 60)
        self._posed: dict[str, str] = {}
        self._open = True
        self._thread = threading.Thread(target=self._pose, daemon=True)
        self._thread.start()

    def client(self, service: str) -> Any:
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return boto3.client(service, endpoint_url=ENV["AWS_ENDPOINT_URL"], region_name=REGION, **keys)

    def _answers(self) -> bool:
        return socket.socket().connect_ex((LAPTOP, PORT)) == 0

    def machines(self) -> list[dict[str, Any]]:
        """All machines that were ever started."""
        return [i for r in self.ec2.describe_instances()["Reservations"] for i in r["Instances"]]

    def _pose(self) -> None:
        while self._open:
            for machine in self.machines():
                kind = {tag["Key"]: tag["Value"] for tag in machine.get("Tags", [])}.get("ray-node-type", "")
                name = {"head": "head", "worker": "w1"}.get(kind)
                if name and name not in self._posed and machine["State"]["Name"] == "running":
                    self._posed[name] = machine["InstanceId"]
                    key = self.laptop.home / f".ssh/{machine['KeyName']}.pem"
                    public = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, check=True).stdout
                    with (self.hosts.base / "key.pub").open("ab") as known:
                        known.write(public)
                    self.hosts[name].power_on()
                    self.hosts[name].readdress(machine["PrivateIpAddress"], machine["PublicIpAddress"])
            time.sleep(0.5)

    def close(self) -> None:
        self._open = False
        self._thread.join(10)
        self.hosts.close()
        self._server.kill()
        self._server.wait()


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with workplace() as folder, closing(Cloud(folder)) as made:
        yield made


def test_a_run_starts_its_machine_and_ray_down_ends_all(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stack, `ray up`, a dataset in the bucket, a run that waits for its worker, `ray down`."""
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    seconds = {}
    laptop, outputs = cloud.laptop, make_stack(cloud.client("cloudformation"))
    laptop.type(RAY, "get-auth-token", "--generate")
    laptop.write(ROOT / "cluster.yaml", filled_in(outputs))
    began = time.monotonic()
    laptop.ray("up")
    seconds["ray up"] = time.monotonic() - began
    assert len(cloud.machines()) == 1
    data, dogvae = f"s3://{outputs['Bucket']}/dogs", str(Path(RAY).with_name("dogvae"))
    laptop.type(dogvae, "prepare", "drawn:60", data, "--size", "32", "--val-fraction", "0.2")
    settings = "--width 4 --latent-dim 4 --batch-size 8 --epochs 3 --cpus 2"
    began = time.monotonic()
    typed = f"python train_distributed.py --data {data} --name run {settings}"
    told = laptop.ray("exec", f"cd code && {typed}")
    seconds["from nothing to a trained model"] = time.monotonic() - began
    print(json.dumps({what: round(s, 1) for what, s in seconds.items()}))
    assert "there is room for 0 of 2 workers: waiting at most 15:00" in told
    assert "Traceback" not in told
    run = f"s3://{outputs['Bucket']}/runs/run?endpoint_override={LAPTOP}:{PORT}&scheme=http&region={REGION}"
    assert [line["world_size"] for line in metrics.read(Storage(run))] == [2, 2, 2]
    head, worker = cloud.machines()
    for machine, profile in ((head, "HeadProfile"), (worker, "WorkerProfile")):
        assert machine["IamInstanceProfile"]["Arn"] == outputs[profile]
        assert [group["GroupId"] for group in machine["SecurityGroups"]] == [outputs["SecurityGroupId"]]
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
    assert (head["InstanceType"], worker["InstanceType"]) == ("m6i.xlarge", "g6.12xlarge")
    laptop.ray("down")
    assert {machine["State"]["Name"] for machine in cloud.machines()} == {"terminated"}
