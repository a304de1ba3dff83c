"""What moto cannot play: AWS's price list, a stack that takes time and fails, refusals by code. Answers are AWS's."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from setuptools import build_meta

from dogvae.cluster import aws, aws_stack
from dogvae.cluster.aws import Account, Refused
from dogvae.cluster.aws_machines import costs, quotas
from dogvae.cluster.aws_stack import Stack
from dogvae.cluster.cluster_file import ClusterFile, Machines
from dogvae.errors import RunFailed, UsageError
from tests.support.command import ROOT


class Answers(Account):
    """An account whose answers are given: the next one of a list for each request, or a function's."""

    region = "us-west-2"

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, []

    def ask(self, service: str, operation: str, **parameters: Any) -> Any:
        self.asked.append((service, operation))
        answer = self.answers[operation]
        answer = answer(**parameters) if isinstance(answer, Callable) else answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_costs_add_the_prices_of_the_price_list() -> None:
    def get_products(ServiceCode: str, Filters: list[dict[str, str]]) -> Any:
        asked = {f["Field"]: f["Value"] for f in Filters}
        assert (ServiceCode, asked["regionCode"], asked["operatingSystem"]) == ("AmazonEC2", "us-west-2", "Linux")
        usd = {"m6i.xlarge": "0.2000000000", "g6.12xlarge": "5.0000000000"}[asked["instanceType"]]
        dimension = {"unit": "Hrs", "pricePerUnit": {"USD": usd}}
        terms = {"OnDemand": {"SKU.TERM": {"priceDimensions": {"SKU.TERM.RATE": dimension}}}, "Reserved": {}}
        return {"PriceList": [json.dumps({"product": {"sku": "SKU"}, "terms": terms})]}

    head, gpu, total = costs(Answers(get_products=get_products), ClusterFile(ROOT / "cluster.yaml"))
    assert "m6i.xlarge: $0.200 an hour" in head
    assert "g6.12xlarge: $5.000 an hour" in gpu
    assert total.startswith("all together: at most $5.20 an hour")
    assert total.endswith("(by AWS's price list)")


def test_costs_without_any_price_say_so(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    text = (ROOT / "cluster.yaml").read_text()
    file.write_text(text.replace("InstanceType: g6.12xlarge", "InstanceType: g6.24xlarge"))
    *_, gpu, total = costs(Answers(get_products=[{"PriceList": []}] * 2), ClusterFile(file))
    assert "g6.24xlarge: price unknown" in gpu
    assert total.startswith("all together: price unknown")


def test_spot_machines_have_their_own_quota() -> None:
    types = {"InstanceTypes": [{"InstanceType": "g6.xlarge", "VCpuInfo": {"DefaultVCpus": 4}}]}
    machines = [Machines("a", "g6.xlarge", 4, spot=True, head=False), Machines("b", "g6.xlarge", 1, False, False)]

    def get_service_quota(ServiceCode: str, QuotaCode: str) -> Any:
        return {"Quota": {"Value": {"L-3819A6DF": 8.0, "L-DB2E81BA": 4.0}[QuotaCode]}}

    spot, on_demand = quotas(Answers(describe_instance_types=[types], get_service_quota=get_service_quota), machines)
    assert (spot.ok, on_demand.ok) == (False, True)
    assert "needs 16 vCPUs of spot machines, the quota is 8" in spot.text


def state(status: str, **more: Any) -> Any:
    return {"Stacks": [{"StackName": "dogvae", "StackStatus": status, **more}]}


def test_stack_is_awaited_and_its_failure_says_the_first_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws_stack, "POLL_INTERVAL_S", 0.0)
    events = [
        {"ResourceStatus": "ROLLBACK_COMPLETE"},
        {"ResourceStatus": "CREATE_FAILED", "ResourceStatusReason": "Resource creation cancelled"},
        {"ResourceStatus": "CREATE_FAILED", "ResourceStatusReason": "There is no default VPC"},
    ]
    part = {"StackResources": [{"ResourceStatus": "CREATE_COMPLETE"}]}
    absent = Refused("Stack with id dogvae does not exist (ValidationError)", "ValidationError")
    states = [absent, *[state("CREATE_IN_PROGRESS")] * 2, state("ROLLBACK_COMPLETE")]
    account = Answers(
        describe_stacks=states, create_stack=[{}], describe_stack_resources=[part] * 2,
        describe_stack_events=[{"StackEvents": events}],
    )  # fmt: skip
    stack = Stack(account, "dogvae")
    with pytest.raises(RunFailed, match=r"failed \(ROLLBACK_COMPLETE\): There is no default VPC"):
        stack.deploy("203.0.113.7/32")
    assert states == []


@pytest.mark.parametrize(
    ("status", "remedy"), [("ROLLBACK_COMPLETE", "delete-stack"), ("UPDATE_IN_PROGRESS", "wait some minutes")]
)
def test_stack_that_cannot_be_used_is_refused_with_the_remedy(status: str, remedy: str) -> None:
    with pytest.raises(RunFailed, match=remedy):
        Stack(Answers(describe_stacks=[state(status)]), "dogvae")


@pytest.mark.parametrize(
    ("code", "message", "text"),
    [
        ("ExpiredToken", "The security token included in the request is expired", "expired: sign in again"),
        (
            "AccessDenied",
            "User: x is not authorized to perform: iam:CreateRole on y",
            "permission iam:Create",
        ),
        ("UnauthorizedOperation", "You are not authorized to perform this operation.", "ec2:DescribeImages: ask"),
        ("Throttling", "Rate exceeded\nslow down", r"^ec2:DescribeImages: Rate exceeded slow down \(Throttling\)$"),
    ],
)
def test_refusal_of_aws_is_one_line_with_a_remedy(code: str, message: str, text: str) -> None:
    error = ClientError({"Error": {"Code": code, "Message": message}}, "DescribeImages")
    with pytest.raises(Refused, match=text):
        raise Answers()._explain("ec2", error)


def test_missing_boto3_is_refused_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'dogvae\[cloud\]'"):
        Account("us-west-2", "--region")


def test_wheel_contains_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dogvae").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "dogvae/cluster"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "dogvae/__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    wheel = build_meta.build_wheel(str(tmp_path))
    assert (
        zipfile.ZipFile(wheel).read("dogvae/cluster/aws-account.yaml") == (ROOT / "docs/aws-account.yaml").read_bytes()
    )
