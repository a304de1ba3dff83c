"""Flags that several commands share, and a flag for every setting."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from typing import Any

from dogvae.cluster.submit import SENT
from dogvae.commands.entry import Parser
from dogvae.config import CROPS, FLOW_SHOWN, VAL_FRACTION, Config, ModelConfig, Safety, check, fields_of
from dogvae.errors import UsageError, did_you_mean

PRIORS = ("gaussian", "flow")  # that follow the training of a VAE
TRACKERS = ("wandb", "mlflow")  # besides TensorBoard; dogvae/training/trackers.py
PRIOR_EPOCHS = f"epochs of a flow; 0: as many as show it {FLOW_SHOWN:,} images (default: 0)"
INTERNAL = ("architecture", "data", "fingerprint", "loss_scale")  # settings without a flag: set by preset or data


def typed(prog: str) -> str:
    """What to type to run `prog`: a script by the path that was typed."""
    script = sys.argv[0] if os.path.basename(sys.argv[0]) == prog else prog
    return f"python {shlex.quote(script)}" if prog.endswith(".py") else prog


def training_parser(prog: str, description: str | None) -> Parser:
    """The flags of `train_distributed.py` and `dogvae train`, which are the same command."""
    top = Parser(prog=prog, description=description)
    run = top.add_argument_group("run")
    run.add_argument(
        "--data",
        help="a folder or archive of photos, oxford-pets, drawn:COUNT, portraits:COUNT, or a prepared dataset, also by "
        "a URI such as s3:// (default: portraits:2000)",
    )
    add_runs(run)
    run.add_argument("--name", help="the run's name (default: made of the data's name and the time)")
    add_resume(run, "run")
    run.add_argument(
        "--from-search",
        metavar="SEARCH",
        help="continue the best trial of a search for more epochs, in a new run",
    )
    run.add_argument(
        "--dry-run", action="store_true", help="print all settings and the workers that would be used, and stop"
    )
    run.add_argument(
        "--prior", default=PRIORS[0], metavar="{" + ",".join(PRIORS) + "}",
        help="what new dogs are drawn from: a Gaussian, fitted in seconds, or a flow, trained after the VAE, "
        f"which draws better dogs (default: {PRIORS[0]})",
    )  # fmt: skip
    run.add_argument("--prior-epochs", type=int, default=0, metavar="N", help=PRIOR_EPOCHS)
    add_log(run)
    run.add_argument("--verbose", action="store_true", help="show Ray's own log, and tracebacks")
    add_workers(top)
    add_safety(top)
    add_settings(top)
    data = next(group for group in top._action_groups if group.title == "data")
    data.add_argument("--val-fraction", type=float, help="share of photos held out for validation (default: 0.05)")
    data.add_argument("--crop", help="center, or box for annotated dogs (default: center)")
    return top


def add_workers(top: argparse.ArgumentParser) -> None:
    """Add the flags of the cluster and its workers."""
    workers = top.add_argument_group("workers")
    add_address(workers)
    workers.add_argument(
        "--gpus", type=span, metavar="N", help="number of workers with a GPU each (default: all GPUs, else CPU workers)"
    )
    workers.add_argument(
        "--cpus",
        type=span,
        metavar="N",
        help="number of workers with a CPU each, or a range such as 2:4 (default: one per node, with all its CPUs)",
    )
    workers.add_argument("--nccl-socket-ifname", metavar="NAME", help="network interface of GPU workers, such as eth0")
    workers.add_argument("--nccl-debug", metavar="LEVEL", help="level of NCCL's log, shown by --verbose: warn or info")


def add_safety(top: argparse.ArgumentParser) -> None:
    """Add the flags that `safety` reads."""
    safety = top.add_argument_group(
        "safety", "--gpus 2:4 or --cpus 2:4 takes 2 to 4 workers, as many as there are, and resizes as that changes."
    )
    safety.add_argument(
        "--checkpoint-every",
        default="60s",
        metavar="TIME",
        help="time between checkpoints within an epoch: 30s, 5m, 2h, or a number of steps (default: 60s)",
    )
    safety.add_argument(
        "--max-failures", type=int, default=3, help="how many lost workers to recover from; -1: any number (default: 3)"
    )
    safety.add_argument(
        "--max-skipped",
        type=int,
        default=20,
        help="end after so many steps in a row with non-finite gradients (default: 20)",
    )
    safety.add_argument(
        "--storage-patience", type=duration, default="10m", metavar="TIME",
        help="how long training continues while no checkpoint can be written (default: 10m)"
    )  # fmt: skip
    add_node_patience(safety)


def add_resume(parser: Any, what: str) -> None:
    """Add `--resume`; `resumed_name` reads it."""
    parser.add_argument(
        "--resume", nargs="?", const=True, default=False, metavar="NAME",
        help=f"go on with the {what} NAME, or that of --name, or else the newest of these data",
    )  # fmt: skip


def resumed_name(args: argparse.Namespace) -> None:
    """Make of `--resume NAME` what `--name NAME --resume` is. Raises UsageError for two names."""
    if isinstance(args.resume, str):
        if args.name not in (None, args.resume):
            raise UsageError(f"--resume {args.resume}: --name {args.name} is another name; leave one of them out")
        args.name, args.resume = args.resume, True


def default_runs() -> str:
    """The default of `--runs`. On a cluster, $DOGVAE_RUNS names the storage that its nodes share."""
    return os.environ.get("DOGVAE_RUNS") or "runs"


def sent() -> str:
    """` --address URL` if this is a job that was sent from elsewhere: a command typed there needs it."""
    address = os.environ.get(SENT, "")
    return f" --address {shlex.quote(address)}" if address else ""


def runs_flag(runs: str) -> str:
    """` --runs RUNS`, if a command needs it that the user types where this one was typed."""
    return f" --runs {shlex.quote(runs)}" if runs != default_runs() or os.environ.get(SENT) else ""


def add_runs(parser: Any) -> None:
    """Add `--runs`."""
    parser.add_argument(
        "--runs", default=default_runs(),
        help="folder of all runs, or a URI such as s3:// (default: $DOGVAE_RUNS, or else runs)",
    )  # fmt: skip


def add_log(parser: Any) -> None:
    """Add `--log`."""
    parser.add_argument(
        "--log", type=_trackers, default=(), metavar="{" + ",".join(TRACKERS) + "}",
        help="also send everything that TensorBoard gets to Weights & Biases, to MLflow, or to both: wandb,mlflow",
    )  # fmt: skip


def _trackers(text: str) -> tuple[str, ...]:
    """`wandb,mlflow` as a tuple."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS)
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(TRACKERS)}{hint}")
    return names


def log_flag(args: argparse.Namespace) -> str:
    """` --log NAMES` as it was typed, or an empty string."""
    return f" --log {','.join(args.log)}" if args.log else ""


def add_address(parser: Any) -> None:
    """Add `--address`."""
    parser.add_argument(
        "--address",
        help="a cluster: HOST:PORT of its head, from one of its nodes; or, from anywhere, http://HOST:8265 of its "
        "dashboard, to run there as a job (default: $RAY_ADDRESS, or the Ray that you started on this machine, or else "
        "a new one)",
    )


def add_node_patience(parser: Any) -> None:
    """Add `--node-patience`."""
    parser.add_argument(
        "--node-patience", type=duration, default="15m", metavar="TIME",
        help="how long to wait for nodes: new ones of an autoscaler, or lost ones (default: 15m)",
    )  # fmt: skip


def check_workers(args: argparse.Namespace) -> None:
    """UsageError for flags of workers and safety that contradict each other or are out of range."""
    if args.gpus is not None and args.cpus is not None:
        raise UsageError("--gpus and --cpus: give one of them; a GPU worker has its own CPU")
    check("max_skipped", args.max_skipped, int, {"low": 1})
    check("max_failures", args.max_failures, int, {"low": -1})


def check_training(args: argparse.Namespace) -> None:
    """UsageError for training flags that contradict each other or are out of range."""
    check_workers(args)
    check("prior", args.prior, str, {"choices": PRIORS})
    check("prior_epochs", args.prior_epochs, int, {"low": 0})
    if args.val_fraction is not None:
        check("val_fraction", args.val_fraction, float, VAL_FRACTION)
    if args.crop is not None:
        check("crop", args.crop, str, {"choices": CROPS})
    resumed_name(args)
    if args.from_search and args.data:
        raise UsageError("--from-search: it starts a new run on the data of the search; leave out --data")
    if args.from_search and (args.val_fraction is not None or args.crop is not None):
        raise UsageError("--from-search: its data are prepared already; leave out --val-fraction and --crop")


def span(text: str) -> int | tuple[int, int]:
    """`4` as 4, and `2:4` as (2, 4)."""
    low, colon, high = text.partition(":")
    if not low.isdecimal() or int(low) < 1 or (colon and (not high.isdecimal() or int(high) < int(low))):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of at least 1 nor a range such as 2:4")
    return (int(low), int(high)) if colon else int(low)


def duration(text: str) -> float:
    """`30s`, `5m` or `2h` in seconds."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    if unit is None or not re.fullmatch(r"\d+(\.\d+)?", text[:-1]) or float(text[:-1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30s, 5m or 2h")
    return unit * float(text[:-1])


def safety(args: argparse.Namespace) -> Safety:
    """The `Safety` of a run, from its flags."""
    every = args.checkpoint_every
    interval: dict[str, Any]
    try:
        interval = {"checkpoint_steps": int(every)} if every.isdecimal() else {"checkpoint_s": duration(every)}
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--checkpoint-every: {error}, nor a number of steps") from error
    if interval.get("checkpoint_steps") == 0:
        raise UsageError("--checkpoint-every: 0 steps are too few, it must be at least 1")
    return Safety(
        **interval, max_skipped=args.max_skipped, patience_s=args.storage_patience, max_failures=args.max_failures,
        node_patience_s=args.node_patience,
    )  # fmt: skip


def network(args: argparse.Namespace) -> dict[str, str]:
    """The `--nccl-...` flags as the environment variables that NCCL reads."""
    typed = {"NCCL_SOCKET_IFNAME": args.nccl_socket_ifname, "NCCL_DEBUG": args.nccl_debug and args.nccl_debug.upper()}
    return {name: value for name, value in typed.items() if value}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting of a Config; `given` reads those that were typed."""
    groups: dict[str, Any] = {}
    for name, spec, kind in [*fields_of(Config), *fields_of(ModelConfig)]:
        if name in INTERNAL:
            continue
        meta = spec.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        text = f"{meta['help']} (default: {spec.default})".replace("%", "%%")
        flag = "--" + name.replace("_", "-")
        names = [flag, "--size"] if name == "image_size" else [flag]  # as `dogvae prepare` has both
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            metavar = "{" + ",".join(map(str, meta["choices"])) + "}" if "choices" in meta else kind.__name__.upper()
            group.add_argument(*names, type=kind, default=None, help=text, metavar=metavar)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were typed on the command line, by name."""
    names = [name for name, _, _ in [*fields_of(Config), *fields_of(ModelConfig)] if name not in INTERNAL]
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def switches() -> set[str]:
    """The settings that are on or off: `--augment`, `--no-augment`."""
    return {name for name, _, kind in [*fields_of(Config), *fields_of(ModelConfig)] if kind is bool}
