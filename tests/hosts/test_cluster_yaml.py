"""cluster.yaml and docs/cluster.local.yaml, checked by Ray, by EC2's description of its requests and by a shell."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import click
import pytest
import yaml
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config, with_head_node_ip

ROOT = Path(__file__).parents[2]
FILES = {"aws": ROOT / "cluster.yaml", "local": ROOT / "docs/cluster.local.yaml"}
UBUNTU = "case $- in\n    *i*) ;;\n      *) return;;\nesac\n"  # how its .bashrc begins
Config = dict[str, Any]


def load(name: str) -> Config:
    return yaml.safe_load(FILES[name].read_text())


def accepted(config: Config) -> Config:
    """The config after the checks of `ray up`, which come before any request to AWS; raises for what Ray refuses."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file_and_adds_no_commands(name: str) -> None:
    """Ray's default commands for AWS would install another Ray from elsewhere."""
    prepared = accepted(load(name))
    ours = {command for key, commands in load(name).items() if key.endswith("_commands") for command in commands}
    for key in (key for key in prepared if key.endswith("_commands")):
        assert set(prepared[key]) <= ours, key
    validate_config(prepare_config(prepared))  # the head reads what `ray up` made of the file


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("aws", lambda c: c.update(max_worker=4)),
        ("aws", lambda c: c.update(max_workers="4")),
        ("aws", lambda c: c.update(head_node_type="heads")),
        ("aws", lambda c: c["available_node_types"]["gpu"].pop("node_config")),
        ("aws", lambda c: c["available_node_types"]["gpu"].update(resources={"GPU": 0.5})),
        ("local", lambda c: c["auth"].update(ssh_key="id")),
        ("local", lambda c: c["provider"].pop("head_ip")),
    ],
)
def test_ray_refuses_a_mistake_in_the_file(name: str, spoil: Callable[[Config], Any]) -> None:
    """So the test above would fail for a mistake of ours."""
    config = load(name)
    spoil(config)
    with pytest.raises((ValidationError, ValueError, KeyError, click.ClickException)):
        accepted(config)


def wrong(shape: Any, value: Any, path: str = "") -> Iterator[str]:
    """What EC2's own description finds wrong; botocore checks names and types, and this also the allowed words."""
    if not path and (report := ParamValidator().validate(value, shape)).has_errors():
        yield report.generate_report()
    if shape.type_name == "structure" and isinstance(value, dict):
        for key in value.keys() & shape.members.keys():
            yield from wrong(shape.members[key], value[key], f"{path}.{key}")
    elif shape.type_name == "list" and isinstance(value, list):
        for item in value:
            yield from wrong(shape.member, item, f"{path}[]")
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield f"{path}: {value}"


def complaints(node_config: Config) -> list[str]:
    """What is wrong with the request that AWSNodeProvider would send for a machine, which Ray itself does not check."""
    request = {key: value for key, value in node_config.items() if key != "SubnetIds"}
    request |= {"SubnetId": "subnet-0", "KeyName": "key", "MinCount": 1, "MaxCount": 1}
    model = botocore.session.get_session().get_service_model("ec2")
    return list(wrong(model.operation_model("RunInstances").input_shape, request))


def test_ec2_accepts_the_machines() -> None:
    types = accepted(load("aws"))["available_node_types"]
    assert {name: complaints(kind["node_config"]) for name, kind in types.items()} == {"head": [], "gpu": []}
    spot = re.search(r"# (InstanceMarketOptions: .*)", FILES["aws"].read_text())
    assert spot, "the choice that the file offers"
    assert complaints(types["gpu"]["node_config"] | yaml.safe_load(spot[1])) == []
    other = re.search(r"# (InstanceType: g6.xlarge)\n", FILES["aws"].read_text())
    assert other, "the other choice"
    assert complaints(types["gpu"]["node_config"] | yaml.safe_load(other[1])) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda n: n.update(InstanceTyp="g6.xlarge"),
        lambda n: n.update(InstanceType="g6.xxlarge"),
        lambda n: n.update(SecurityGroupIds="sg-0"),
        lambda n: n["MetadataOptions"].update(HttpToken="required"),
        lambda n: n["BlockDeviceMappings"][0]["Ebs"].update(VolumeType="gp4"),
    ],
)
def test_ec2_refuses_a_misspelt_name_type_or_word_at_any_depth(spoil: Callable[[Config], Any]) -> None:
    node_config = copy.deepcopy(load("aws")["available_node_types"]["gpu"]["node_config"])
    spoil(node_config)
    assert len(complaints(node_config)) == 1


def test_each_value_to_change_stands_once_and_reaches_every_place() -> None:
    """The region stands in two places, and is the same in both."""
    config = load("aws")
    values, types = config["metadata"], config["available_node_types"]
    for kind in types.values():
        assert kind["node_config"]["ImageId"] == values["ImageId"]
        assert kind["node_config"]["SecurityGroupIds"] == values["SecurityGroupId"]
    assert types["head"]["node_config"]["IamInstanceProfile"] == values["HeadProfile"]
    assert types["gpu"]["node_config"]["IamInstanceProfile"] == values["WorkerProfile"]
    assert config["setup_commands"][0] == values["Bucket"]
    assert f"AWS_DEFAULT_REGION={config['provider']['region']}'" in values["Bucket"]
    text = FILES["aws"].read_text()
    for placeholder in ("ami-IMAGE_ID", "sg-SECURITY_GROUP_ID", "HEAD_PROFILE", "WORKER_PROFILE"):
        assert text.count(placeholder) == 1, placeholder
    local = load("local")
    assert local["setup_commands"][0] == local["metadata"]["Runs"]


def test_the_file_is_safe_and_cheap_as_it_stands() -> None:
    """Keys of roles stay on the machine, groups and roles are our own, idle machines end."""
    config = accepted(load("aws"))
    assert not config["provider"]["cache_stopped_nodes"]
    assert config["idle_timeout_minutes"] == 10
    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        assert node["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        assert node["SecurityGroupIds"]
        assert node["IamInstanceProfile"]
        assert node["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
        assert kind["min_workers"] == 0
        assert kind["max_workers"] == {"head": 0, "gpu": 1}[name]
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_both_files_set_machines_up_alike() -> None:
    """They differ in where runs are kept, which each says at its top."""
    ours, theirs = load("aws"), load("local")
    for key in ("file_mounts", "rsync_exclude", "rsync_filter", "worker_start_ray_commands"):
        assert ours[key] == theirs[key]
    assert ours["setup_commands"][1:] == theirs["setup_commands"][1:]


def test_no_secrets_in_the_repository() -> None:
    """No AWS key, private key or Ray token in any file that git does not ignore."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout
    secret = re.compile(rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{64}\b")
    names = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    assert FILES["aws"] in names
    assert [name for name in names if name.is_file() and secret.search(name.read_bytes())] == []
    for found in (b"AKIA" + b"A" * 16, b"-----BEGIN OPENSSH " + b"PRIVATE KEY-----", b"0" * 64):
        assert secret.search(found)


class Machine:
    """A home folder like that of a new Ubuntu machine, with programs that only record how they were called."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.calls = home / "calls"
        (home / ".ray").mkdir(parents=True)
        (home / ".ray/auth_token").write_text("token")
        (home / ".bashrc").write_text(UBUNTU)
        (home / ".profile").write_text('[ -f "$HOME/.bashrc" ] && . "$HOME/.bashrc"\n')
        make = 'if [ "$1" = venv ]; then mkdir -p ~/venv/bin; touch ~/venv/bin/python; chmod +x ~/venv/bin/python; fi'
        self.program(home / ".local/bin/uv", make)
        self.program(home / "venv/bin/ray", "")

    def program(self, path: Path, more: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "$RAY_AUTH_MODE|{path.name} $*" >> {self.calls}\n{more}\n')
        path.chmod(0o755)

    def shell(self, command: str) -> str:
        """The output of a command in a shell with an empty environment."""
        env = {"HOME": str(self.home), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-c", command], env=env, cwd=self.home, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, commands: list[str]) -> list[str]:
        """Run commands as Ray does over ssh. Returns the calls of programs, each with its mode of authentication."""
        self.calls.unlink(missing_ok=True)
        for command in with_head_node_ip(commands, "10.0.0.1"):
            self.shell(" ".join(_with_interactive(command)))
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.mark.parametrize("name", FILES)
def test_commands_set_a_machine_up_and_start_ray_with_a_token(name: str, tmp_path: Path) -> None:
    """Run twice, as Ray does, through the shells that Ray uses; `uv` and `ray` only record their calls."""
    machine, config = Machine(tmp_path / "home"), accepted(load(name))
    setup, home = config["head_setup_commands"], tmp_path / "home"
    install = f"token|uv pip install --python {home}/venv/bin/python -c {home}/code/constraints.txt"
    calls = machine.run(setup)
    again = [f"{install} setuptools>=77", f"{install} --no-build-isolation -e {home}/code"]
    again += [f"{install} boto3"] if name == "aws" else []
    assert calls == [f"token|uv venv --python 3.11 {home}/venv", *again]
    assert machine.run(setup) == again

    assert (home / ".bashrc").read_text() == f". ~/.dogvae-env\n{UBUNTU}"
    assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    assert (home / ".ray").stat().st_mode & 0o777 == 0o700
    runs = {"aws": "s3://BUCKET/runs us-west-2", "local": "/mnt/SHARE/runs "}[name]
    told = 'echo "$DOGVAE_RUNS $AWS_DEFAULT_REGION|$RAY_AUTH_MODE|$RAY_USAGE_STATS_ENABLED|$(command -v python)"'
    for login in (f". ~/.bashrc; {told}", " ".join(_with_interactive(told))):
        assert machine.shell(login).splitlines()[-1] == f"{runs}|token|0|{home}/venv/bin/python"

    starts = [config[f"{kind}_start_ray_commands"] for kind in ("head", "worker")]
    # Each sets the mode itself: a machine without the mode would ask nobody for a token.
    assert all(re.match(r"export RAY_AUTH_MODE=token\b.*ray start", commands[1], re.S) for commands in starts)
    head, worker = map(machine.run, starts)
    assert head[0] == worker[0] == "token|ray stop"
    assert worker[1:] == ["token|ray start --address=10.0.0.1:6379"]
    mode, flags = head[1].split("|ray start ")
    assert mode == "token"
    assert {"--head", "--port=6379", "--dashboard-host=127.0.0.1"} <= set(flags.split())
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in flags
    assert ("--num-cpus=0" in flags) == (name == "aws")


@pytest.mark.parametrize("name", FILES)
def test_commands_parse_as_shell_also_when_uncommented(name: str) -> None:
    text = FILES[name].read_text()
    offered = yaml.safe_load(re.sub(r"(?m)^  # (- |  \S)", r"  \1", text))
    assert (len(offered["setup_commands"]) > len(load(name)["setup_commands"])) == (name == "aws")
    for commands in (value for key, value in offered.items() if key.endswith("_commands")):
        for command in commands:
            done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0, command + done.stderr
