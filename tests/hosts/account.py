"""Makes docs/aws-account.yaml into a stack, and puts its outputs into cluster.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TEMPLATE = (ROOT / "docs/aws-account.yaml").read_text()
KNOWN_TO_MOTO = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-6.1-x86_64"
PLACEHOLDERS = {
    "Bucket": "BUCKET",
    "ImageId": "ami-IMAGE_ID",
    "SecurityGroupId": "sg-SECURITY_GROUP_ID",
    "HeadProfile": "arn:aws:iam::ACCOUNT:instance-profile/HEAD_PROFILE",
    "WorkerProfile": "arn:aws:iam::ACCOUNT:instance-profile/WORKER_PROFILE",
}
NAME, REGION, HOME = "dogvae", "us-west-2", "203.0.113.7/32"


class Loader(yaml.SafeLoader):
    """Reads `!Ref x` as text, for tests of the template itself."""


Loader.add_multi_constructor("!", lambda loader, tag, node: f"{tag} {node.value}")
RESOURCES = yaml.load(TEMPLATE, Loader)["Resources"]
PARAMETERS = yaml.load(TEMPLATE, Loader)["Parameters"]


def make_stack(cloudformation: Any) -> dict[str, str]:
    """Make the stack with a client of moto, which has no deep learning images; returns the outputs."""
    cloudformation.create_stack(
        StackName=NAME,
        TemplateBody=TEMPLATE.replace(PARAMETERS["Image"]["Default"], KNOWN_TO_MOTO),
        Parameters=[{"ParameterKey": "SshFrom", "ParameterValue": HOME}],
        Capabilities=["CAPABILITY_IAM"],
    )
    (stack,) = cloudformation.describe_stacks(StackName=NAME)["Stacks"]
    return {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}


def filled_in(outputs: dict[str, str]) -> dict[str, str]:
    """The changes that a person makes to cluster.yaml: each placeholder, and the output that replaces it."""
    return {placeholder: outputs[output] for output, placeholder in PLACEHOLDERS.items()}
