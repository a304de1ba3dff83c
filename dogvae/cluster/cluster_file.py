"""cluster.yaml: the values that come from the account's stack, and the machines that Ray may start."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dogvae.errors import UsageError

# How each output of the stack stands in `metadata`, and what a real value looks like. Placeholders have capitals.
VALUES = {
    "Bucket": (r"s3://([^/'\s]+)", r"[a-z0-9][a-z0-9.-]+"),
    "ImageId": (r"(ami-[\w-]+)", r"ami-[0-9a-f]+"),
    "SecurityGroupId": (r"(sg-[\w-]+)", r"sg-[0-9a-f]+"),
    "HeadProfile": (r"(arn:[^\s'\"}]+)", r"arn:[a-z-]+:iam::\d{12}:instance-profile/.+"),
    "WorkerProfile": (r"(arn:[^\s'\"}]+)", r"arn:[a-z-]+:iam::\d{12}:instance-profile/.+"),
}
PRICES = r"# US dollars an hour ([^:]*): ((?:.*\n#)*.*)"  # a comment of one or more lines


@dataclass(frozen=True)
class Machines:
    """The machines of one node type: at most `count`, of EC2's instance type `kind`."""

    name: str
    kind: str
    count: int
    spot: bool
    head: bool


class ClusterFile:
    """A `cluster.yaml` for AWS. Raises UsageError for a file that is missing, or is no such file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = path.read_text()
            self.config: dict[str, Any] = yaml.safe_load(self.text)
            self.name: str = self.config["cluster_name"]
            self.region: str = self.config["provider"]["region"]
            self.head_type: str = self.config["head_node_type"]
            self.nodes: dict[str, Any] = {n: t["node_config"] for n, t in self.config["available_node_types"].items()}
            self.head: dict[str, Any] = self.nodes[self.head_type]
            self.values: dict[str, str] = {name: self._value(name, where) for name, (where, _) in VALUES.items()}
        except FileNotFoundError as error:
            raise UsageError(f"{path}: there is no such file; type the command in the checkout of DogVAE") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: it is not a YAML file: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: {error} is missing; start from the cluster.yaml of DogVAE") from error

    def _value(self, name: str, where: str) -> str:
        found = re.search(where, str(self.config["metadata"][name]))
        return found[1] if found else ""

    def placeholders(self) -> dict[str, str]:
        """The values that no stack has given yet, by the names of the stack's outputs."""
        return {name: value for name, value in self.values.items() if not re.fullmatch(VALUES[name][1], value)}

    def filled(self, outputs: dict[str, str], region: str) -> str:
        """The file's text with the stack's outputs and its region in place of the present ones."""
        text = self.text
        for name, value in self.values.items():
            text = text.replace(value, outputs[name]) if value else text
        return re.sub(rf"(\bregion: |AWS_DEFAULT_REGION=|\.efs\.){re.escape(self.region)}\b", rf"\g<1>{region}", text)

    def machines(self) -> list[Machines]:
        """The machines of the file, the head's first."""
        most, types = self.config.get("max_workers", 2), self.config["available_node_types"]
        machines = [
            Machines(
                name,
                node["InstanceType"],
                1 if name == self.head_type else min(most, types[name].get("max_workers", most)),
                node.get("InstanceMarketOptions", {}).get("MarketType") == "spot",
                name == self.head_type,
            )
            for name, node in self.nodes.items()
        ]
        return sorted(machines, key=lambda m: not m.head)

    def noted_price(self, kind: str) -> tuple[float, str] | None:
        """US dollars an hour of an instance type by the file's comment, and where and when that was the price."""
        noted = re.search(PRICES, self.text)
        price = noted and re.search(rf"{re.escape(kind)} (\d+\.?\d*)", noted[2])
        return (float(price[1]), noted[1]) if noted and price else None
