"""`dogvae cloud check`: what `ray up` would meet in an account, looked up without changing anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from dogvae.cluster.aws import Account, Refused
from dogvae.cluster.aws_machines import Finding, quotas
from dogvae.cluster.aws_stack import TEMPLATE
from dogvae.cluster.cluster_file import ClusterFile

TOKEN = "~/.ray/auth_token"
SETUP = "`dogvae cloud setup` fills it in"
NEWEST = re.findall(r"Default: (/aws/\S+)", TEMPLATE)[0]  # the parameter that names the newest image
Question = Callable[[Account, ClusterFile, str], str]


def check(account: Account, file: ClusterFile) -> list[Finding]:
    """A finding for each thing that `ray up` needs. If all are ok, EC2 is asked whether it would start the head."""
    image = f"put the newest there: `aws ssm get-parameter --region {account.region} --name {NEWEST}`"
    questions: dict[str, tuple[str, Question, str]] = {
        "ImageId": ("image", _image, image),
        "SecurityGroupId": ("security group", _group, SETUP),
        "HeadProfile": ("head's instance profile", _profile, SETUP),
        "WorkerProfile": ("workers' instance profile", _profile, SETUP),
        "Bucket": ("bucket", _bucket, SETUP),
    }
    findings = [Finding("credentials", True, f"account {account.id}, as {account.user}"), _region(file)]
    placeholders = file.placeholders()
    for name, (what, question, remedy) in questions.items():
        value = file.values[name]
        if name not in placeholders:
            findings.append(_look(what, question, account, file, value, remedy))
        elif value or name != "Bucket":  # without s3:// runs are kept on a share
            findings.append(Finding(what, False, f"metadata.{name} has {value or 'nothing'}, a placeholder: {SETUP}"))
    findings.append(_look("key pair", _key_pair, account, file, "", "see auth and KeyName in the file"))
    token = Path(TOKEN).expanduser().is_file()
    findings.append(Finding("token", token, TOKEN if token else f"{TOKEN} is missing: `dogvae cloud setup` makes it"))
    findings += quotas(account, file.machines())
    if all(finding.ok for finding in findings):
        findings.append(_look("start of the head", _trial_start, account, file, "", "see the head's node_config"))
    return findings


def _look(what: str, question: Question, account: Account, file: ClusterFile, value: str, remedy: str) -> Finding:
    try:
        return Finding(what, True, question(account, file, value))
    except Refused as error:
        return Finding(what, False, str(error) if error.has_remedy else f"{error}; {remedy}")


def _region(file: ClusterFile) -> Finding:
    machines = re.search(r"AWS_DEFAULT_REGION=([\w-]+)", str(file.config["metadata"]["Bucket"]))
    if machines is None or machines[1] == file.region:
        return Finding("region", True, file.region)
    differ = f"provider.region is {file.region}, but metadata.Bucket says {machines[1]}: make them the same"
    return Finding("region", False, differ)


def _image(account: Account, file: ClusterFile, image: str) -> str:
    images = account.ask("ec2", "describe_images", ImageIds=[image])["Images"]
    if not images:
        raise Refused(f"{image} does not exist in {account.region}", "NotFound")
    return f"{image}, {images[0].get('Name', 'without a name')}"


def _group(account: Account, file: ClusterFile, group: str) -> str:
    return f"{group}, {len(_subnets(account, file, group))} subnets that `ray up` can use"


def _subnets(account: Account, file: ClusterFile, group: str) -> list[str]:
    """The subnets that Ray's provider accepts: of the group's VPC, and with public addresses if it needs them."""
    (found,) = account.ask("ec2", "describe_security_groups", GroupIds=[group])["SecurityGroups"]
    of_vpc = [{"Name": "vpc-id", "Values": [found["VpcId"]]}]
    subnets = account.ask("ec2", "describe_subnets", Filters=of_vpc)["Subnets"]
    internal, chosen = file.config["provider"].get("use_internal_ips", False), file.head.get("SubnetIds")
    usable = [s["SubnetId"] for s in subnets if s["State"] == "available" and (internal or s["MapPublicIpOnLaunch"])]
    usable = [subnet for subnet in usable if chosen is None or subnet in chosen]
    if not usable:
        raise Refused(f"{found['VpcId']} has no subnet that gives machines public addresses: make one", "", True)
    return usable


def _profile(account: Account, file: ClusterFile, arn: str) -> str:
    name = arn.rpartition("/")[2]
    account.ask("iam", "get_instance_profile", InstanceProfileName=name)
    return name


def _bucket(account: Account, file: ClusterFile, bucket: str) -> str:
    try:
        account.ask("s3", "head_bucket", Bucket=bucket)
    except Refused as error:
        why = {"404": "does not exist", "301": f"is in another region than {account.region}"}.get(error.code)
        if why is None:
            raise
        raise Refused(f"{bucket} {why}", error.code) from error
    return f"s3://{bucket}"


def _key_pair(account: Account, file: ClusterFile, _: str) -> str:
    key, name = file.config.get("auth", {}).get("ssh_private_key"), file.head.get("KeyName", "")
    if key is None:
        return "`ray up` makes one, or uses the one that it made before"
    if not Path(key).expanduser().is_file():
        raise Refused(f"auth.ssh_private_key: there is no file {key}", "")
    account.ask("ec2", "describe_key_pairs", KeyNames=[name])
    return f"{name}, with {key}"


def _trial_start(account: Account, file: ClusterFile, _: str) -> str:
    """Asks EC2 whether it would start the head; `DryRun` has it answer by the code of an error, and start nothing."""
    subnet = _subnets(account, file, file.values["SecurityGroupId"])[0]
    node = {name: value for name, value in file.head.items() if name not in ("SubnetIds", "KeyName")}
    try:
        account.ask("ec2", "run_instances", **node, SubnetId=subnet, MinCount=1, MaxCount=1, DryRun=True)
    except Refused as error:
        if error.code != "DryRunOperation":
            raise
    return "EC2 would do it"
