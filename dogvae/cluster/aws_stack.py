"""The stack of aws-account.yaml: whether an account has it, making it, and updating it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dogvae.cluster.aws import Account, Refused
from dogvae.console import Progress
from dogvae.errors import RunFailed

TEMPLATE = Path(__file__).with_name("aws-account.yaml").read_text()
POLL_INTERVAL_S = 2.0
READY = {"CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE"}


class Stack:
    """A stack's state when this object was made. Raises RunFailed for a stack that cannot be used or changed now."""

    def __init__(self, account: Account, name: str) -> None:
        self._account, self.name = account, name
        self._found = self._describe()
        self.request = "cloudformation:UpdateStack" if self._found else "cloudformation:CreateStack"
        status = self._found["StackStatus"] if self._found else ""
        if status.endswith("_IN_PROGRESS"):
            raise RunFailed(f"the stack {name} is changing ({status}): wait some minutes, and type this again")
        if status and status not in READY:
            remedy = f"aws cloudformation delete-stack --stack-name {name} --region {account.region}"
            raise RunFailed(f"the stack {name} is unusable ({status}): type `{remedy}`, then this again")

    def _describe(self) -> dict[str, Any] | None:
        try:
            (found,) = self._account.ask("cloudformation", "describe_stacks", StackName=self.name)["Stacks"]
        except Refused as error:
            if "does not exist" in str(error):
                return None
            raise
        return dict(found)

    def outputs(self) -> dict[str, str]:
        """The stack's outputs by name."""
        return {o["OutputKey"]: o["OutputValue"] for o in (self._found or {}).get("Outputs", [])}

    def difference(self, ssh_from: str) -> str:
        """What would be made, or differs from the template with SSH from `ssh_from`; empty if nothing does."""
        if self._found is None:
            return "a bucket, a security group, and roles for the head and the workers"
        template = self._account.ask("cloudformation", "get_template", StackName=self.name)["TemplateBody"]
        parameters = {p["ParameterKey"]: p["ParameterValue"] for p in self._found.get("Parameters", [])}
        now = parameters.get("SshFrom", "nowhere")
        differs = [] if now == ssh_from else [f"SSH from {ssh_from} instead of {now}"]
        return ", ".join(differs + ([] if str(template).strip() == TEMPLATE.strip() else ["another template"]))

    def deploy(self, ssh_from: str) -> dict[str, str]:
        """Make or update the stack, and wait for it. Returns its outputs; raises RunFailed with AWS's reason."""
        operation = "update_stack" if self._found else "create_stack"
        try:
            self._account.ask(
                "cloudformation", operation, StackName=self.name, TemplateBody=TEMPLATE,
                Parameters=[{"ParameterKey": "SshFrom", "ParameterValue": ssh_from}], Capabilities=["CAPABILITY_IAM"],
            )  # fmt: skip
        except Refused as error:
            if "No updates" not in str(error):
                raise
        with Progress(f"stack {self.name}") as line:
            total = TEMPLATE.count("Type: AWS::") - 1  # the type of the parameter Image begins like that, too
            while (found := self._describe()) is None or found["StackStatus"].endswith("_IN_PROGRESS"):
                parts = self._account.ask("cloudformation", "describe_stack_resources", StackName=self.name)
                done = sum(p["ResourceStatus"].endswith("_COMPLETE") for p in parts["StackResources"])
                line.update(done, total, f"{done} of {total} parts are ready")
                time.sleep(POLL_INTERVAL_S)
        if found["StackStatus"] not in {"CREATE_COMPLETE", "UPDATE_COMPLETE"}:
            events = self._account.ask("cloudformation", "describe_stack_events", StackName=self.name)["StackEvents"]
            failed = [e for e in events if e["ResourceStatus"].endswith("_FAILED")]  # the newest first
            why = failed[-1].get("ResourceStatusReason", "") if failed else ""
            raise RunFailed(f"the stack {self.name} failed ({found['StackStatus']}): {why}")
        self._found = found
        return self.outputs()
