"""Train a VAE on dog photos, on all GPUs or CPUs that Ray has.

python train_distributed.py                           # a first look: draws its own dogs, trains within minutes
python train_distributed.py --data photos --gpus 4    # a folder, an archive, or a dataset of `dogvae prepare`
python train_distributed.py --name NAME --resume      # resume an interrupted run
python train_distributed.py --address http://localhost:8265 --data s3://BUCKET/dogs   # on a cluster

`dogvae train` is the same command and works in any folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from dogvae.cluster import connect, nodes
from dogvae.commands import flags
from dogvae.commands.remote import run_there
from dogvae.config import Config
from dogvae.console import say, waiting, warn
from dogvae.data.find import DEFAULT_DATA, DataChoice
from dogvae.storage import Storage
from dogvae.training import metrics, run_folder, trackers
from tune.ranking import best_run
from tune.search_folder import open_search

PROG = "train_distributed.py"
# A run without --data, within minutes. Drawn dogs have little detail: a 4x4 latent shows it, and samples well.
FIRST_LOOK = {"preset": "small", "epochs": 14, "latent_size": 4, "latent_dim": 32}


@dataclass(frozen=True)
class Trained:
    """A run when its training has ended: by itself, or by the signal `signum` after a checkpoint."""

    storage: Storage
    config: Config
    signum: int | None = None


def main(argv: Sequence[str], prog: str = PROG) -> int:
    """Train with the flags `argv`; `prog` is the program that the user typed. Returns the exit status."""
    args = parse(argv, prog)
    if (status := run_there(args, ["train"], argv)) is not None:
        return status
    ended = train(args)
    if ended is None:
        return 0
    if ended.signum:
        prior = f" --prior {args.prior}" if args.prior != flags.PRIORS[0] else ""
        where = f"{flags.sent()} --runs {shlex.quote(args.runs)} --name {run_folder.runs_and_name(ended.storage)[1]}"
        say(f"stopped; to go on: {flags.typed(prog)}{where} --resume{prior}{flags.log_flag(args)}")
        if metrics.best(metrics.read(ended.storage)):
            say(f"to use the best so far: dogvae export {shlex.quote(ended.storage.uri)}")
        return 128 + ended.signum
    finish(ended.storage, ended.config, args.runs)
    return 0


def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The flags, checked without importing anything slow. Raises UsageError."""
    args = flags.training_parser(prog, __doc__).parse_args(argv)
    flags.check_training(args)
    flags.safety(args)
    Config.make(**_settings(args))
    return args


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were typed; those of a first look are added to a new run without --data."""
    settings = flags.given(args)
    is_first_look = args.data is None and not (args.resume or args.from_search) and "preset" not in settings
    return {**FIRST_LOOK, **settings} if is_first_look else settings


def train(args: argparse.Namespace) -> Trained | None:
    """Begin or resume a run, train and export it. Returns None after --dry-run, which only prints the plan.

    `args` come from `parse`. Raises UsageError and RunFailed.
    """
    safety = flags.safety(args)
    if args.resume and args.name and args.data and not run_folder.exists(args.runs, args.name):
        warn(f"--resume: there is no run {args.name} in {args.runs} yet, so it starts now")  # as a retried job needs
        args.resume = False
    settings = _settings(args)
    choice = DataChoice(args.data or DEFAULT_DATA, settings.get("image_size"), args.crop, args.val_fraction)
    if args.resume:
        name = args.name or run_folder.newest(args.runs, args.from_search or choice.data)
        storage, config = run_folder.open_old(args.runs, name, settings, args.data, args.crop, args.val_fraction)
        if run_folder.is_finished(storage, config):
            say(f"{storage.uri} has finished its {config.epochs} epochs; for more, add --epochs {2 * config.epochs}")
            if args.prior == "gaussian":
                return _exported(storage, config)
    else:
        storage = run_folder.open_new(args.runs, args.name or run_folder.default_name(args.from_search or choice.data))
        if args.from_search:
            source, config = best_run(open_search(args.runs, args.from_search))
            config = run_folder.check_copy(source, config, settings)
        else:
            choice.check()
            config = Config.make(data=choice.data, **settings)
    tracking = None if args.dry_run else trackers.prepare(args.log, args.runs)
    os.environ |= flags.network(args)
    with redirect_stdout(sys.stderr if args.dry_run else sys.stdout):
        say(connect.connect(args.address, args.verbose))
    workers = nodes.choose_workers(args.gpus, args.cpus)
    if args.dry_run:
        say(json.dumps({"run": storage.uri, "workers": str(workers), **config.to_dict()}, indent=2))
        return None
    nodes.wait_for_nodes(workers, safety.node_patience_s)
    if not (args.resume or args.from_search):
        dataset = choice.open(args.runs)
        say(f"{len(dataset.train)} training and {len(dataset.val)} validation images: {dataset.path}")
        config = config.for_data(str(dataset.path), dataset.fingerprint, dataset.size, len(dataset.train))

    with waiting("loading Ray Train"):
        from dogvae.training.on_ray import launch

    if args.from_search and not args.resume:
        run_folder.copy_checkpoints(source, storage)
    run_folder.save_config(storage, config)
    say(f"{storage.uri}: {config.epochs} epochs on {workers}")
    signum = None
    if not run_folder.is_finished(storage, config):
        signum = launch(config, storage, workers, safety, args.verbose, tracking)
    if not signum and args.prior == "flow":
        from dogvae.training.flow_run import fit_flow

        of_flow = {"epochs": args.prior_epochs}
        signum = fit_flow(storage, config, of_flow, workers, safety, args.verbose, tracking)
    if signum or args.prior == "flow":  # whose training ends with an export
        return Trained(storage, config, signum)
    return _exported(storage, config)


def _exported(storage: Storage, config: Config) -> Trained:
    try:
        with waiting("loading PyTorch"):
            from dogvae.training.export import export

        export(storage, config)
    except KeyboardInterrupt:
        say(f"all epochs are trained; to export the best: dogvae export {shlex.quote(storage.uri)}")
        raise
    return Trained(storage, config)


def finish(storage: Storage, config: Config, logdir: str) -> None:
    """Print the best epoch, where everything is and what to type next."""
    from dogvae.training.advice import advice_of
    from dogvae.training.export import FOLDER

    folder = (storage / FOLDER).uri
    best = metrics.best(metrics.read(storage))
    if best:
        say(f"\nthe best    epoch {best['epoch'] + 1}: {metrics.describe(best)} (0: the mean image, 1: perfect)")
    if (advice := advice_of(storage, config)) is not None:
        say(f"advice      {advice}")
    say(f"""\
the run     {storage.uri}
results     {storage.uri_of(metrics.RESULTS)}
the model   {folder}
next        tensorboard --logdir {shlex.quote(logdir)}
            dogvae sample {shlex.quote(folder)} -n 64 -o samples.png
            dogvae playground {shlex.quote(folder)}""")
