"""`dogvae cloud setup`: an AWS account made ready for `ray up`; `dogvae cloud check`: whether it is."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import secrets
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from dogvae.commands import entry
from dogvae.console import say, waiting
from dogvae.errors import UsageError

OUTPUT = "my-cluster.yaml"
WIDEST = 16  # prefix length of the widest network that may use SSH; the template has the same limit
ADDRESS = "https://checkip.amazonaws.com"


def main(argv: Sequence[str]) -> int:
    """Run `dogvae cloud ARGV`; returns the exit status."""
    args = parser().parse_args(argv)
    code: int = args.run(args)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of `dogvae cloud`."""
    top = entry.Parser(prog="dogvae cloud", description="A cluster's account on AWS: make it ready, and check it.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    setup = commands.add_parser("setup", help="make what a cluster needs in your account, and its cluster.yaml")
    setup.description = (
        "Make the stack of aws-account.yaml in your AWS account (a bucket, a security group, two roles), a token for\n"
        "Ray, and a cluster.yaml with the stack's values. Shows what it costs and every change, and asks before it\n"
        "makes them. Run again, it changes what differs."
    )
    setup.add_argument("cluster", nargs="?", default="cluster.yaml", help="file to copy (default: cluster.yaml)")
    setup.add_argument("--region", help="region of AWS (default: that of the file)")
    setup.add_argument(
        "--ssh-from", default="auto", metavar="{auto,CIDR}",
        help="network that may use SSH, such as 203.0.113.7/32; at most a /16 (default: auto, this machine's address)",
    )  # fmt: skip
    setup.add_argument(
        "-o", "--output", default=OUTPUT,
        help=f"the copy; in a file that exists only the stack's values change (default: {OUTPUT})",
    )  # fmt: skip
    setup.add_argument("--yes", action="store_true", help="make the changes without asking")
    setup.set_defaults(run=_setup)
    check = commands.add_parser("check", help="say what `ray up` would meet, and change nothing")
    check.add_argument(
        "cluster", nargs="?", help=f"file to check (default: {OUTPUT} if it exists, or else cluster.yaml)"
    )
    check.set_defaults(run=_check)
    for command in commands.choices.values():
        command.add_argument("--verbose", action="store_true", help="show tracebacks")
    return top


def _check(args: argparse.Namespace) -> int:
    from dogvae.cluster.aws import Account
    from dogvae.cluster.aws_check import check
    from dogvae.cluster.cluster_file import ClusterFile

    default = OUTPUT if os.path.exists(OUTPUT) else "cluster.yaml"
    file = ClusterFile(Path(args.cluster or default).expanduser())
    with waiting("asking AWS"):
        findings = check(Account(file.region, str(file.path)), file)
    for finding in findings:
        say(f"{'ok   ' if finding.ok else 'WRONG'}  {finding.what}: {finding.text}")
    wrong = sum(not finding.ok for finding in findings)
    say(f"{file.path}: {wrong} to mend" if wrong else f"{file.path} is ready: ray up {file.path}")
    return 1 if wrong else 0


def _setup(args: argparse.Namespace) -> int:
    from dogvae.cluster.aws import Account
    from dogvae.cluster.aws_check import TOKEN
    from dogvae.cluster.aws_machines import costs, quotas
    from dogvae.cluster.aws_stack import Stack
    from dogvae.cluster.cluster_file import ClusterFile

    output, token = Path(args.output).expanduser(), Path(TOKEN).expanduser()
    if not output.parent.is_dir():
        raise UsageError(f"--output: there is no folder {output.parent}")
    file = ClusterFile(output if output.exists() else Path(args.cluster).expanduser())
    region = args.region or file.region
    with waiting("asking AWS"):
        account = Account(region, "--region" if args.region else str(file.path))
        ssh_from = _network(args.ssh_from)
        stack = Stack(account, file.name)
        difference = stack.difference(ssh_from)
        facts = [f"costs: {line}" for line in costs(account, file)]
        facts += [f"{f.what}: {'ok' if f.ok else 'WRONG'}, {f.text}" for f in quotas(account, file.machines())]
    own = f" (this machine's address by {ADDRESS})" if args.ssh_from == "auto" else ""
    say(f"account {account.id}, as {account.user}, in {region}; SSH from {ssh_from}{own}")

    to_do, kept = [], []
    if difference:
        to_do.append(f"{stack.request} {stack.name}: {difference}")
    else:
        kept.append(f"the stack {stack.name}")
    if token.exists():
        kept.append(f"the token {token}")
    else:
        to_do.append(f"write {token}: a new token; whoever has it can run anything on your cluster")
    if file.path != output:
        to_do.append(f"write {output}: {file.path} with the stack's values and the region")
    elif difference or file.filled(stack.outputs(), region) != file.text:
        to_do.append(f"write {output}: the stack's values and the region; all else in it stays")
    else:
        kept.append(str(output))
    for line in [*facts, *(f"keeps {what}" for what in kept), *(f"will do: {what}" for what in to_do)]:
        say(line)
    if to_do and not _agreed(args.yes):
        say("nothing was changed")
        return 1
    if to_do:
        outputs = stack.deploy(ssh_from) if difference else stack.outputs()
        _write_token(token)
        output.write_text(file.filled(outputs, region))
    say(f"{'ready' if to_do else 'nothing to do'}; next: dogvae cloud check {output}, then ray up {output}")
    say(
        f"to remove all but the bucket: ray down {output}, then aws cloudformation delete-stack --stack-name "
        f"{stack.name} --region {region}"
    )
    return 0


def _network(ssh_from: str) -> str:
    """`--ssh-from` as an IPv4 network; for `auto`, the address that this machine has on the internet."""
    if ssh_from == "auto":
        try:
            with urllib.request.urlopen(ADDRESS, timeout=10) as answer:
                ssh_from = answer.read(100).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--ssh-from auto: {ADDRESS} does not answer ({error}); name a network, such as 203.0.113.7/32"
            ) from error
    try:
        network = ipaddress.IPv4Network(ssh_from)
    except ValueError as error:
        raise UsageError(f"--ssh-from: {ssh_from} is no IPv4 network such as 203.0.113.7/32 ({error})") from error
    if network.prefixlen < WIDEST:
        raise UsageError(f"--ssh-from: {network} is wider than a /{WIDEST}: it would let in strangers")
    return str(network)


def _agreed(yes: bool) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError("--yes: `dogvae cloud setup` asks before it changes something, and there is no terminal")
    print("make these changes? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _write_token(token: Path) -> None:
    """Make Ray's token, unless there is one: readable by this user alone from its first moment on."""
    token.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))  # as `ray get-auth-token --generate` does
