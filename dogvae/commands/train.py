"""Train a VAE on dog photos, on all GPUs or CPUs that Ray has.

python train_distributed.py                           # a first look: draws its own dogs, trains within minutes
python train_distributed.py --data photos --gpus 4    # a folder, an archive, or a dataset of `dogvae prepare`
python train_distributed.py --name NAME --resume      # resume an interrupted run
python train_distributed.py --address http://localhost:8265 --data s3://BUCKET/dogs   # on a cluster

`dogvae train` is the same command and works in any folder.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence

from dogvae.cluster import connect, nodes
from dogvae.commands import flags
from dogvae.commands.remote import run_there
from dogvae.config import Config
from dogvae.console import say
from dogvae.data.find import DEFAULT_DATA, DataChoice
from dogvae.storage import Storage
from dogvae.training import metrics, run_folder
from tune.ranking import best_run
from tune.search_folder import open_search

PROG = "train_distributed.py"
# A run without --data, within minutes. Drawn dogs have little detail: a 4x4 latent shows it, and samples well.
FIRST_LOOK = {"preset": "small", "epochs": 16, "latent_size": 4, "latent_dim": 32}


def main(argv: Sequence[str], prog: str = PROG) -> int:
    """Train with the flags `argv`; `prog` is the program that the user typed. Returns the exit status."""
    args = flags.training_parser(prog, __doc__).parse_args(argv)
    flags.check_training(args)
    safety = flags.safety(args)
    settings = flags.given(args)
    choice = DataChoice(args.data or DEFAULT_DATA, settings.get("image_size"), args.crop, args.val_fraction)
    name = args.name or run_folder.default_name(args.from_search or choice.data)
    is_new = not (args.resume or args.from_search)
    if args.data is None and is_new and "preset" not in settings:
        settings = {**FIRST_LOOK, **settings}
    config = Config.make(data=choice.data, **settings)  # finds mistakes before anything slow is imported
    if (status := run_there(args, ["train"], argv)) is not None:
        return status
    if args.resume:
        storage, config = run_folder.open_old(args.runs, args.name, settings, args.data)
        if run_folder.is_finished(storage, config):
            say(f"{storage.uri} has finished its {config.epochs} epochs; for more, add --epochs {2 * config.epochs}")
            if args.prior == "gaussian":
                finish(storage, config, args.runs)
                return 0
    else:
        storage = run_folder.open_new(args.runs, name)
        if args.from_search:
            source, config = best_run(open_search(args.runs, args.from_search))
            config = run_folder.check_copy(source, config, settings)
        else:
            choice.check()
    os.environ |= flags.network(args)
    say(connect.connect(args.address, args.verbose))
    workers = nodes.choose_workers(args.gpus, args.cpus)
    if args.dry_run:
        say(json.dumps({"run": storage.uri, "workers": str(workers), **config.to_dict()}, indent=2))
        return 0
    nodes.wait_for_nodes(workers, safety.node_patience_s)
    if is_new:
        dataset = choice.open(args.runs)
        say(f"{len(dataset.train)} training and {len(dataset.val)} validation images: {dataset.path}")
        config = config.for_data(str(dataset.path), dataset.fingerprint, dataset.size, len(dataset.train))

    from dogvae.training.on_ray import launch

    if args.from_search:
        run_folder.copy_checkpoints(source, storage)
    run_folder.save_config(storage, config)
    say(f"{storage.uri}: {config.epochs} epochs on {workers}")
    signum = None
    if not run_folder.is_finished(storage, config):
        signum = launch(config, storage, workers, safety, args.verbose)
    if not signum and args.prior == "flow":
        from dogvae.training.flow_run import fit_flow

        signum = fit_flow(storage, config, {"epochs": args.prior_epochs}, workers, safety, args.verbose)
    if signum:
        prior = f" --prior {args.prior}" if args.prior != flags.PRIORS[0] else ""
        where = f"{flags.sent()} --runs {shlex.quote(args.runs)}"
        say(f"stopped; to go on: {flags.typed(prog)}{where} --name {name} --resume{prior}")
        return 128 + signum
    finish(storage, config, args.runs)
    return 0


def finish(storage: Storage, config: Config, logdir: str) -> None:
    """Export the best checkpoint; print where everything is and what to type next."""
    from dogvae.training.export import export

    folder = export(storage, config).uri
    records = metrics.read(storage)
    best = metrics.best(records)
    if best:
        say(f"\nthe best    epoch {best['epoch'] + 1}: {metrics.describe(best)} (0: the mean image, 1: perfect)")
    if metrics.still_improving(records):
        say(f"            it was still improving: more epochs help, such as --epochs {2 * config.epochs}")
    say(f"""\
the run     {storage.uri}
the model   {folder}
next        tensorboard --logdir {shlex.quote(logdir)}
            dogvae sample {shlex.quote(folder)} -n 64 -o samples.png
            dogvae playground {shlex.quote(folder)}""")
