"""A server that plays AWS, in a process of its own, and what a test asks it."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.command import ROOT
from tests.support.servers import start_moto

REGION = "us-west-2"
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


class Aws:
    """The server. `env` are the variables by which boto3 finds it."""

    def __init__(self) -> None:
        self.process, self.port, self._log = start_moto(sys.executable, ROOT / "tests/support/aws_server.py")
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {**KEYS, "AWS_ENDPOINT_URL": self.url}

    def empty(self) -> None:
        """Delete all that the account has."""
        self._post("reset")

    @contextmanager
    def permissions(self) -> Iterator[None]:
        """The server checks keys and permissions while the block runs."""
        self._post("reset-auth", "0")
        try:
            yield
        finally:
            self._post("reset-auth", "inf")

    def _post(self, name: str, text: str = "") -> None:
        request = urllib.request.Request(f"{self.url}/moto-api/{name}", text.encode(), {"Content-Type": "text/plain"})
        urllib.request.urlopen(request).read()

    def client(self, service: str, region: str = REGION) -> Any:
        import boto3

        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        return boto3.client(service, endpoint_url=self.url, region_name=region, **keys)

    def inventory(self) -> str:
        """Everything that a set-up could make in the account, as text to compare."""
        ec2, iam = self.client("ec2"), self.client("iam")
        listed = [
            self.client("cloudformation").describe_stacks()["Stacks"],
            self.client("s3").list_buckets()["Buckets"],
            ec2.describe_security_groups()["SecurityGroups"],
            ec2.describe_instances()["Reservations"],
            ec2.describe_key_pairs()["KeyPairs"],
            iam.list_roles()["Roles"],
            iam.list_instance_profiles()["InstanceProfiles"],
        ]
        return json.dumps(listed, default=str, sort_keys=True)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
