"""Train a prior for the VAE of a run, and export it with the VAE: new dogs are drawn from it.

dogvae fit-prior runs/NAME                 # a flow: minutes on a GPU, an hour on a few CPU cores
dogvae fit-prior runs/NAME --epochs 200    # longer; an interrupted flow goes on by the same command
dogvae fit-prior runs/NAME --prior gaussian   # without the flow: the Gaussian is fitted in seconds
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from dogvae.cluster import connect, nodes
from dogvae.commands import entry, flags
from dogvae.commands.remote import run_there
from dogvae.config import FLOW, Config, FlowConfig, check
from dogvae.console import say, waiting
from dogvae.storage import Storage
from dogvae.training import trackers
from dogvae.training.run_folder import open_run

SETTINGS = ("epochs", "batch_size", "lr", "width", "depth")  # of a flow that have flags


def parser() -> entry.Parser:
    """The command's flags."""
    top = entry.Parser(prog="dogvae fit-prior", description=__doc__)
    top.add_argument(
        "folder", metavar="RUN", help="the run of a VAE, such as runs/NAME: a folder, or a URI such as s3://"
    )
    top.add_argument("--prior", default="flow", help=f"one of {', '.join(flags.PRIORS)} (default: flow)")
    top.add_argument("--epochs", type=int, help=flags.PRIOR_EPOCHS)
    top.add_argument("--batch-size", type=int, help=f"images per step over all workers (default: {FLOW['batch_size']})")
    top.add_argument("--lr", type=float, help=f"peak learning rate of Adam (default: {FLOW['lr']})")
    for spec in fields(FlowConfig):
        if spec.name in SETTINGS:
            top.add_argument(f"--{spec.name}", type=int, help=f"{spec.metadata['help']} (default: {spec.default})")
    flags.add_log(top)
    top.add_argument("--verbose", action="store_true", help="show Ray's own log, and tracebacks")
    flags.add_workers(top)
    flags.add_safety(top)
    return top


def main(argv: Sequence[str]) -> int:
    """Run the command with the flags `argv`. Returns the exit status."""
    args = parse(argv)
    if (status := run_there(args, ["fit-prior"], argv)) is not None:
        return status
    if signum := fit_prior(args):
        say(f"stopped; to go on: dogvae fit-prior{flags.sent()} {shlex.quote(args.folder)}{flags.log_flag(args)}")
        return 128 + signum
    from dogvae.training.export import FOLDER

    folder = (Storage(args.folder) / FOLDER).uri
    if args.prior == "gaussian":
        say(folder)
    else:
        folder = shlex.quote(folder)
        say(f"the model   {folder}\nnext        dogvae sample {folder} -n 64 -o samples.png")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, checked without importing anything slow. Raises UsageError."""
    args = parser().parse_args(argv)
    flags.check_workers(args)
    check("prior", args.prior, str, {"choices": flags.PRIORS})
    settings = _settings(args)
    FlowConfig(**{name: settings[name] for name in ("width", "depth") if name in settings})
    Config.make(**{name: value for name, value in settings.items() if name not in ("width", "depth")})
    flags.safety(args)
    return args


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}


def fit_prior(args: argparse.Namespace) -> int | None:
    """Train the prior and export it. Returns the signal that stopped it after a checkpoint, or None.

    `args` come from `parse`. Raises UsageError and RunFailed.
    """
    with waiting("loading PyTorch"):
        from dogvae.training.export import export
        from dogvae.training.flow_run import fit_flow

    safety = flags.safety(args)
    run, config = open_run(args.folder)
    if args.prior == "gaussian":
        export(run, config, with_flow=False)
        return None
    tracking = trackers.prepare(args.log, args.folder)
    os.environ |= flags.network(args)
    say(connect.connect(args.address, args.verbose))
    workers = nodes.choose_workers(args.gpus, args.cpus)
    nodes.wait_for_nodes(workers, safety.node_patience_s)
    return fit_flow(run, config, _settings(args), workers, safety, args.verbose, tracking)
