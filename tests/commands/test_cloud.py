"""`dogvae cloud setup` and `dogvae cloud check`, as processes against a server that plays AWS.

moto cannot show how long a stack takes, that it fails, AWS's price list, expired credentials, or spot machines.
"""

from __future__ import annotations

import os
import pty
import re
import socketserver
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from dogvae.cluster.cluster_file import ClusterFile
from tests.support.aws import REGION, Aws
from tests.support.command import ROOT

HOME = "203.0.113.7/32"
SETUP = ("setup", "--ssh-from", HOME)


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    with closing(Aws()) as server:
        yield server


@dataclass
class User:
    """A user with an empty account and a home directory, in which a cluster.yaml lies."""

    home: Path
    aws: Aws

    def cloud(self, *args: str, stdin: Any = subprocess.DEVNULL, **env: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of `dogvae cloud ARGS`."""
        here = {**os.environ, **self.aws.env, "HOME": str(self.home), "PYTHONPATH": str(ROOT), **env}
        typed = [sys.executable, "-m", "dogvae", "cloud", *args]
        done = subprocess.run(typed, cwd=self.home, env=here, stdin=stdin, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    def answering(self, answer: str, *args: str) -> tuple[int, str, str]:
        """As `cloud`, on a terminal at which the user types `answer`."""
        keyboard, terminal = pty.openpty()
        os.write(keyboard, answer.encode())
        done = self.cloud(*args, stdin=terminal)
        os.close(terminal)
        os.close(keyboard)
        return done

    def ready(self) -> None:
        """Set the account up."""
        assert self.cloud(*SETUP, "--yes")[0] == 0

    def refused(self, *args: str, **env: str) -> str:
        """The error of `dogvae cloud ARGS`, which exits with 2 and prints that one line to stderr."""
        code, _, err = self.cloud(*args, **env)
        assert (code, err.count("\n"), err[:7]) == (2, 1, "error: "), err
        return err

    def state(self) -> tuple[str, dict[str, str]]:
        """All that the account has, and all files of the user."""
        files = {str(path): path.read_text() for path in self.home.rglob("*") if path.is_file()}
        return self.aws.inventory(), files

    def wrong(self, *args: str) -> list[str]:
        """What `dogvae cloud check` finds wrong, sorted; it exits with 1 if that is anything."""
        code, out, _ = self.cloud("check", *args)
        wrong = re.findall(r"(?m)^WRONG +(.*?):", out)
        assert code == bool(wrong), out
        return sorted(wrong)


@pytest.fixture
def user(aws: Aws, tmp_path: Path) -> User:
    aws.empty()
    (tmp_path / "cluster.yaml").write_text((ROOT / "cluster.yaml").read_text())
    return User(tmp_path, aws)


def test_setup_of_an_empty_account_gives_a_file_that_check_and_ray_accept(user: User) -> None:
    code, out, _ = user.answering("y\n", *SETUP)
    assert code == 0
    assert "will do: cloudformation:CreateStack dogvae" in out
    assert "head, at most 1 m6i.xlarge: $0.192" in out  # from the file's comment: moto has no price list
    assert "at most $4.79 an hour" in out
    assert "seen in public lists on 20" in out
    (stack,) = user.aws.client("cloudformation").describe_stacks(StackName="dogvae")["Stacks"]
    file = ClusterFile(user.home / "my-cluster.yaml")
    assert file.values == {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
    assert not file.placeholders()
    validate_config(prepare_config(yaml.safe_load(file.text)))
    token = user.home / ".ray/auth_token"
    assert re.fullmatch(r"[0-9a-f]{64}", token.read_text())
    assert token.stat().st_mode & 0o777 == 0o600
    assert user.wrong() == []

    before = user.state()
    code, out, _ = user.cloud(*SETUP)  # without --yes: there is nothing to ask
    assert (code, out.count("keeps "), out.count("will do")) == (0, 3, 0)
    assert user.state() == before


@pytest.mark.parametrize(("answer", "status"), [(None, 2), ("n\n", 1), ("\x04", 1)])
def test_setup_without_consent_changes_nothing(user: User, answer: str | None, status: int) -> None:
    """Without a terminal, and by a terminal with the answer `n` or with Ctrl-D."""
    before = user.state()
    if answer is None:
        assert "--yes" in user.refused(*SETUP)
    else:
        code, out, _ = user.answering(answer, *SETUP)
        assert (code, out.count("will do: "), out.splitlines()[-1]) == (
            status, 3, "make these changes? [y/N] nothing was changed"
        )  # fmt: skip
    assert user.state() == before


def test_setup_from_another_address_updates_the_group_and_keeps_edits_and_token(user: User) -> None:
    user.ready()
    file, token = user.home / "my-cluster.yaml", (user.home / ".ray/auth_token").read_text()
    file.write_text(file.read_text().replace("idle_timeout_minutes: 10", "idle_timeout_minutes: 20"))
    code, out, _ = user.cloud("setup", "--ssh-from", "198.51.100.0/24", "--yes")
    assert (code, "UpdateStack dogvae: SSH from 198.51.100.0/24 instead of 203.0.113.7/32" in out) == (0, True)
    assert "idle_timeout_minutes: 20" in file.read_text()
    assert (user.home / ".ray/auth_token").read_text() == token
    group = ClusterFile(file).values["SecurityGroupId"]
    (made,) = user.aws.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    assert [n["CidrIp"] for rule in made["IpPermissions"] for n in rule["IpRanges"]] == ["198.51.100.0/24"]
    assert user.wrong() == []


def test_setup_in_another_region_says_that_the_quota_is_too_small(user: User) -> None:
    code, out, _ = user.cloud(*SETUP, "--region", "eu-central-1", "--yes", "--output", "eu.yaml")
    assert code == 0
    assert re.search(r"12xlarge: WRONG, needs 48 vCPUs, the quota is 0: .*L-DB2E81BA .*value 48 .*eu-central-1", out)
    text = (user.home / "eu.yaml").read_text()
    assert "  region: eu-central-1\n" in text
    assert "AWS_DEFAULT_REGION=eu-central-1'" in text
    assert user.wrong("eu.yaml") == ["quota for 1 g6.12xlarge"]


def test_check_lists_placeholders_and_what_does_not_exist(user: User) -> None:
    values = ["bucket", "head's instance profile", "image", "security group"]
    assert user.wrong() == [*values, "token", "workers' instance profile"]
    user.ready()
    file = user.home / "my-cluster.yaml"
    gone = {"Bucket": "gone", "ImageId": "ami-0", "SecurityGroupId": "sg-0"}
    gone |= {name: f"arn:aws:iam::123456789012:instance-profile/{name}" for name in ("HeadProfile", "WorkerProfile")}
    file.write_text(ClusterFile(file).filled(gone, REGION))
    assert user.wrong() == [*values, "workers' instance profile"]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (("InstanceType: g6.12xlarge", "InstanceType: g6.13xlarge"), "instance types"),
        (("max_workers: 1\n", "max_workers: 3\n"), "quota for 3 g6.12xlarge"),
        (("AWS_DEFAULT_REGION=us-west-2", "AWS_DEFAULT_REGION=us-east-1"), "region"),
        (("ssh_user: ubuntu", "ssh_user: ubuntu, ssh_private_key: ~/no.pem"), "key pair"),
    ],
)
def test_check_finds_a_mistake_in_the_file(user: User, change: tuple[str, str], wrong: str) -> None:
    text = (user.home / "cluster.yaml").read_text()
    assert change[0] in text
    (user.home / "cluster.yaml").write_text(text.replace(*change))
    assert wrong in user.wrong()


@pytest.mark.parametrize(
    ("args", "env", "error"),
    [
        (["check"], {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no AWS credentials.*aws configure"),
        (["check"], {"AWS_PROFILE": "absent"}, r"profile \(absent\)"),
        (["check"], {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect"),
        (["check", "absent.yaml"], {}, "absent.yaml: there is no such file"),
        ([*SETUP, "--region", "us-wst-2"], {}, "--region: .* did you mean us-west-2"),
        ([*SETUP, "--output", "absent/a.yaml"], {}, "--output: there is no folder absent"),
        (["setup", "--ssh-from", "0.0.0.0/0"], {}, "--ssh-from: 0.0.0.0/0 is wider than a /16"),
        (["setup", "--ssh-from", "10.0.0.0/15"], {}, "--ssh-from: 10.0.0.0/15 is wider"),
        (["setup", "--ssh-from", "::/0"], {}, "--ssh-from: ::/0 is no IPv4 network"),
        (["setup"], {"HTTPS_PROXY": "http://127.0.0.1:9"}, "--ssh-from auto: https://checkip.* does not answer"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_with_its_remedy(user: User, args: list[str], env: dict[str, str], error: str) -> None:
    assert re.search(error, user.refused(*args, **env))


def test_missing_permission_is_named(user: User) -> None:
    iam = user.aws.client("iam")
    iam.create_user(UserName="guest")
    key = iam.create_access_key(UserName="guest")["AccessKey"]
    with user.aws.permissions():
        keys = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
        denied, unknown = user.refused(*SETUP, **keys), user.refused("check")
    assert "lack the permission cloudformation:DescribeStacks: ask the administrator" in denied
    assert "AWS does not accept these credentials" in unknown


class AddressService(socketserver.StreamRequestHandler):
    """A proxy that answers as checkip.amazonaws.com does, with TLS."""

    certificate: Path

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        with context.wrap_socket(self.connection, server_side=True) as connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n198.51.100.9\n")


def test_ssh_from_auto_is_the_public_address_of_this_machine(user: User) -> None:
    name, pem, trusted = "checkip.amazonaws.com", user.home / "proxy.pem", user.home / "trusted.pem"
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, "-keyout", pem, "-out", trusted]
    subprocess.run(made, check=True, capture_output=True)
    pem.write_text(pem.read_text() + trusted.read_text())
    AddressService.certificate = pem
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), AddressService) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        way = {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.server_address[1]}", "SSL_CERT_FILE": str(trusted)}
        _, out, _ = user.cloud("setup", **way)
        proxy.shutdown()
    assert "SSH from 198.51.100.9/32 (this machine's address by https://checkip.amazonaws.com)" in out
