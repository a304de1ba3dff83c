"""docs/aws-account.yaml as a stack in moto, and what Ray's own AWS code does with it and cluster.yaml."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.session import get_session
from cfnlint.api import lint_all
from moto import mock_aws
from ray.autoscaler._private.aws import config as ray_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.aws.utils import client_cache, resource_cache
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.hosts.account import (
    HOME,
    NAME,
    PARAMETERS,
    PLACEHOLDERS,
    REGION,
    RESOURCES,
    ROOT,
    TEMPLATE,
    Loader,
    filled_in,
    make_stack,
)

CLUSTER = (ROOT / "cluster.yaml").read_text()
GUIDE = ROOT / "docs/cluster.md"
Json = dict[str, Any]


@dataclass
class Account:
    """An account with the stack; `calls` are the requests since the stack was made, by their IAM names."""

    outputs: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, Json]] = field(default_factory=list)

    def cluster(self) -> Json:
        """cluster.yaml with the stack's outputs, after the checks of `ray up`."""
        text = CLUSTER
        for placeholder, value in filled_in(self.outputs).items():
            assert placeholder in text
            text = text.replace(placeholder, value)
        config = prepare_config(yaml.safe_load(text))
        validate_config(config)
        return config

    def role(self, output: str) -> str:
        profile = self.outputs[output].rpartition("/")[2]
        (role,) = boto3.client("iam").get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
        return role["RoleName"]

    def policies(self, output: str) -> dict[str, Json]:
        """The policies of a profile's role, with all references resolved."""
        iam, role = boto3.client("iam"), self.role(output)
        assert iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"] == []
        names = iam.list_role_policies(RoleName=role)["PolicyNames"]
        return {n: iam.get_role_policy(RoleName=role, PolicyName=n)["PolicyDocument"] for n in names}

    def statements(self, output: str) -> list[Json]:
        return [s for document in self.policies(output).values() for s in document["Statement"]]


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Account]:
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes its new key to ~/.ssh
    for cache in (resource_cache, client_cache, ray_aws._get_subnets_or_die):
        cache.cache_clear()
    made = Account()
    with mock_aws():
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", boto3.Session())
        with pytest.warns(UserWarning, match="AWS::S3::BucketPolicy"):  # missing in moto; cfn-lint checks it
            made.outputs = make_stack(boto3.client("cloudformation"))
        boto3.DEFAULT_SESSION.events.register(
            "provide-client-params.*.*",
            lambda params, model, **_: made.calls.append((f"{model.service_model.service_name}:{model.name}", params)),
        )
        yield made


def listed(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def allowed(statements: list[Json], action: str, resource: str, given: dict[str, str] | None = None) -> bool:
    """Whether a statement allows an action, by the rules of IAM that these policies use; `given` is for conditions."""
    for s in statements:
        assert s["Effect"] == "Allow"
        assert s.keys() <= {"Effect", "Action", "Resource", "Condition"}
        assert s.get("Condition", {}).keys() <= {"StringEquals"}
        wanted = s.get("Condition", {}).get("StringEquals", {})
        if (
            action in listed(s["Action"])
            and any(fnmatchcase(resource, pattern) for pattern in listed(s["Resource"]))
            and all((given or {}).get(key) == value for key, value in wanted.items())
        ):
            return True
    return False


def ec2(kind: str, account: str = "123456789012") -> str:
    return f"arn:aws:ec2:{REGION}:{account}:{kind}"


def test_template_is_valid_by_awss_descriptions_of_the_resources() -> None:
    """cfn-lint has the descriptions."""

    def errors(template: str) -> list[str]:
        return [str(match) for match in lint_all(template) if match.rule.severity != "informational"]

    assert errors(TEMPLATE) == []
    assert len(errors(TEMPLATE.replace("BlockPublicPolicy", "BlockPublicPolicies"))) == 1


@pytest.mark.parametrize(
    ("accepted", "networks"),
    [
        (True, ["203.0.113.7/32", "10.1.0.0/16", "192.168.1.0/24", "1.2.3.4/29"]),
        (False, ["0.0.0.0/0", "1.2.3.4/0", "1.2.3.4/00", "10.0.0.0/8", "10.0.0.0/15"]),  # wider than a big office
        (False, ["1.2.3.4/33", "1.2.3.4", "::/0", "", "1.2.3/32"]),  # no IPv4 network
    ],
)
def test_ssh_from_accepts_ipv4_networks_no_wider_than_a_16(accepted: bool, networks: list[str]) -> None:
    pattern = PARAMETERS["SshFrom"]["AllowedPattern"]
    assert [bool(re.fullmatch(pattern, network)) for network in networks] == [accepted] * len(networks)
    assert "Default" not in PARAMETERS["SshFrom"]


def test_security_group_admits_only_ssh_and_the_machines_themselves(account: Account) -> None:
    group = account.outputs["SecurityGroupId"]
    (made,) = boto3.client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    rules = [
        (r["IpProtocol"], r.get("FromPort"), r.get("ToPort"), [n["CidrIp"] for n in r["IpRanges"]],
         [g["GroupId"] for g in r["UserIdGroupPairs"]], r["Ipv6Ranges"], r["PrefixListIds"])
        for r in made["IpPermissions"]
    ]  # fmt: skip
    assert sorted(rules) == [("-1", None, None, [], [group], [], []), ("tcp", 22, 22, [HOME], [], [], [])]


def test_bucket_is_private_and_outlives_the_stack() -> None:
    bucket = RESOURCES["Bucket"]
    assert bucket["DeletionPolicy"] == bucket["UpdateReplacePolicy"] == "Retain"
    assert set(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["Properties"]["PublicAccessBlockConfiguration"]) == 4
    (rule,) = bucket["Properties"]["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    (statement,) = RESOURCES["OnlyEncryptedTraffic"]["Properties"]["PolicyDocument"]["Statement"]
    assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "s3:*")
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert len(statement["Resource"]) == 2


def test_every_action_of_the_policies_exists() -> None:
    """IAM would accept a misspelt action, which allows nothing."""
    documents = [r["Properties"]["PolicyDocument"] for r in RESOURCES.values() if r["Type"] == "AWS::IAM::Policy"]
    actions = {a for document in documents for s in document["Statement"] for a in listed(s["Action"])}
    assert len(actions) == 11
    # Permissions whose name differs from that of the request.
    requests = {"s3:ListBucket": "s3:ListObjectsV2", "iam:PassRole": None}
    for action in actions:
        assert "*" not in action
        request = requests.get(action, action)
        if request:
            service, _, name = request.partition(":")
            assert name in get_session().get_service_model(service).operation_names, action


@pytest.mark.parametrize("profile", ["HeadProfile", "WorkerProfile"])
def test_roles_reach_the_one_bucket_and_no_other(account: Account, profile: str) -> None:
    """They may do what pyarrow requests, and may not make, empty or open a bucket."""
    arn, statements = f"arn:aws:s3:::{account.outputs['Bucket']}", account.statements(profile)
    assert allowed(statements, "s3:ListBucket", arn)
    for action in ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload"):
        assert allowed(statements, f"s3:{action}", f"{arn}/runs/dogs/checkpoints/a")
        assert not allowed(statements, f"s3:{action}", f"{arn}2/runs/dogs/checkpoints/a")
    assert {r for s in statements for r in listed(s["Resource"]) if r.startswith("arn:aws:s3")} == {arn, f"{arn}/*"}
    roles = boto3.client("iam").list_roles()["Roles"]
    assert {r["RoleName"] for r in roles} == {account.role("HeadProfile"), account.role("WorkerProfile")}
    for role in roles:
        (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
        assert statement["Principal"] == {"Service": "ec2.amazonaws.com"}


def test_workers_may_use_storage_only(account: Account) -> None:
    assert account.policies("WorkerProfile").keys() == {"runs"}
    assert {a.split(":")[0] for s in account.statements("WorkerProfile") for a in listed(s["Action"])} == {"s3"}


def test_ray_up_adds_only_a_key_pair_to_the_account(account: Account) -> None:
    config = AWSNodeProvider.fillout_available_node_types_resources(account.cluster())
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert "GPU" not in types["head"]["resources"]
    assert types["gpu"]["resources"].items() >= {"CPU": 48, "GPU": 4}.items()
    account.calls.clear()
    booted = ray_aws.bootstrap_aws(config)
    changes = [call for call, _ in account.calls if not re.search(":(Describe|Get|List)", call)]
    assert changes == ["ec2:CreateKeyPair"]
    nodes = [kind["node_config"] for kind in booted["available_node_types"].values()]
    assert all(node["SecurityGroupIds"] == [account.outputs["SecurityGroupId"]] for node in nodes)


def test_head_may_do_what_ray_requests_and_no_more(account: Account) -> None:
    """Ray's provider starts, lists, tags and ends a worker; the head's policies must allow these requests."""
    config = ray_aws.bootstrap_aws(account.cluster())
    node_config = config["available_node_types"]["gpu"]["node_config"]
    account.calls.clear()
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    tags = {"ray-node-type": "worker", "ray-node-name": f"ray-{NAME}-worker", "ray-user-node-type": "gpu"}
    (worker,) = provider.create_node(node_config, tags, 1)
    assert provider.non_terminated_nodes({"ray-node-type": "worker"}) == [worker]
    provider.set_node_tags(worker, {"ray-node-status": "up-to-date"})
    (found,) = boto3.client("ec2").describe_instances(InstanceIds=[worker])["Reservations"][0]["Instances"]
    provider.terminate_node(worker)
    asked = dict(account.calls)
    assert set(asked) == {"ec2:RunInstances", "ec2:CreateTags", "ec2:DescribeInstances", "ec2:TerminateInstances"}

    assert found["IamInstanceProfile"]["Arn"] == account.outputs["WorkerProfile"]
    assert [g["GroupId"] for g in found["SecurityGroups"]] == [account.outputs["SecurityGroupId"]]
    assert found["MetadataOptions"]["HttpTokens"] == "required"
    assert {"Key": "project", "Value": "dogvae"} in found["Tags"]
    named = next(tag["Value"] for tag in found["Tags"] if tag["Key"] == "ray-cluster-name")
    assert named == NAME

    run, instance = asked["ec2:RunInstances"], ec2(f"instance/{worker}")
    (sent,) = [s["Tags"] for s in run["TagSpecifications"] if s["ResourceType"] == "instance"]
    launch, cluster = {"ec2:CreateAction": "RunInstances"}, "ray-cluster-name"
    this, another = ({f"aws:ResourceTag/{cluster}": name} for name in (named, "another"))
    worker_role, head_role = (
        f"arn:aws:iam::123456789012:role/{account.role(f'{r}Profile')}" for r in ("Worker", "Head")
    )
    to_ec2, to_lambda = ({"iam:PassedToService": f"{service}.amazonaws.com"} for service in ("ec2", "lambda"))
    parts = [f"subnet/{run['SubnetId']}", f"key-pair/{run['KeyName']}", "volume/*", "network-interface/*"]
    parts += [f"security-group/{group}" for group in run["SecurityGroupIds"]]
    may: list[tuple[str, str, dict[str, str]]] = [
        ("ec2:DescribeInstances", "*", {}),
        ("ec2:RunInstances", ec2("instance/*"), {f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in sent}),
        ("ec2:RunInstances", ec2(f"image/{run['ImageId']}", account=""), {}),
        *(("ec2:RunInstances", ec2(part), {}) for part in parts),
        *(("ec2:CreateTags", ec2(f"{s['ResourceType']}/*"), launch) for s in run["TagSpecifications"]),
        ("ec2:CreateTags", instance, this),
        ("ec2:TerminateInstances", instance, this),
        ("iam:PassRole", worker_role, to_ec2),
    ]
    may_not: list[tuple[str, str, dict[str, str]]] = [
        ("ec2:RunInstances", ec2("instance/*"), {}),
        ("ec2:RunInstances", ec2("instance/*"), {f"aws:RequestTag/{cluster}": "another"}),
        ("ec2:RunInstances", ec2("security-group/sg-0"), {}),
        ("ec2:TerminateInstances", instance, {}),
        ("ec2:TerminateInstances", instance, another),
        ("ec2:CreateTags", instance, another),
        ("ec2:CreateTags", ec2("snapshot/snap-0"), launch),
        ("iam:PassRole", worker_role, to_lambda),
        ("iam:PassRole", head_role, to_ec2),
    ]
    head = account.statements("HeadProfile")
    assert [wish for wish in may if not allowed(head, *wish)] == []
    assert [wish for wish in may_not if allowed(head, *wish)] == []


def test_outputs_have_the_names_of_the_values_in_cluster_yaml(account: Account) -> None:
    """The stack's name is the cluster's name: the head's rights depend on it."""
    config = yaml.safe_load(CLUSTER)
    assert account.outputs.keys() == config["metadata"].keys() == PLACEHOLDERS.keys()
    for name, output in yaml.load(TEMPLATE, Loader)["Outputs"].items():
        assert output["Description"] == f"goes to metadata.{name} in cluster.yaml"
    assert f"--stack-name {config['cluster_name']} " in TEMPLATE
    assert config["cluster_name"] == NAME


def test_guide_shows_the_policies_of_the_head(account: Account) -> None:
    """With words in capitals for what differs from account to account."""
    text = json.dumps(account.policies("HeadProfile"))
    words = {
        account.outputs["Bucket"]: "BUCKET",
        account.outputs["SecurityGroupId"]: "SECURITY_GROUP",
        account.role("WorkerProfile"): "WORKER_ROLE",
        "123456789012": "ACCOUNT",
        REGION: "REGION",
    }
    for value, word in words.items():
        assert value in text
        text = text.replace(value, word)
    policies = json.loads(text)
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", GUIDE.read_text(), re.S)]
    assert [block for block in blocks if "Statement" in block] == [policies["runs"], policies["workers"]]
