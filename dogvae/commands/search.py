"""The hyperparameter search on the command line.

python -m tune search --data dataset --trials 24     # which latent dimension, learning rate and sample count?
python -m tune search --resume NAME                  # continue an interrupted search
python -m tune report NAME                           # the ranked table and report.png, also while it runs
python -m tune dashboard NAME                        # TensorBoard on all trials, in the browser

`dogvae search` is `python -m tune search`, anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from dogvae.cluster import connect, nodes
from dogvae.commands import entry, flags
from dogvae.commands.remote import run_there
from dogvae.config import Config, check
from dogvae.console import say, waiting
from dogvae.data.find import DEFAULT_DATA, DataChoice
from dogvae.errors import RunFailed, UsageError
from dogvae.storage import Storage
from dogvae.training import run_folder, trackers
from tune.ranking import best_run
from tune.search_folder import ABOUT, FOLDER, LIMITS, Entry, Search, SearchPlan, Trial, open_search, save
from tune.space import DEFAULT, Space, parse_fixed

PROG = "python -m tune"
ENDING = "-search"  # of the name of a search that was begun without --name


def parser(prog: str) -> entry.Parser:
    """The commands search, report and dashboard with their flags."""
    top = entry.Parser(prog=prog, description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    search = commands.add_parser("search", help="train many settings side by side, and export the best model")
    search.add_argument(
        "--data", help="photos or a prepared dataset, as for train_distributed.py (default: portraits:2000)"
    )
    search.add_argument("--name", help="the search's name (default: from the data and the time)")
    flags.add_resume(search, "search")
    search.add_argument("--trials", type=int, help="number of trials (default: 12)")
    search.add_argument("--epochs", type=int, help="maximum epochs of a trial (default: the preset's)")
    search.add_argument(
        "--search", action="append", default=[], metavar="NAME=DOMAIN",
        help="a setting to search: choice(A,B), uniform(LOW,HIGH), loguniform(LOW,HIGH) or randint(LOW,HIGH); "
        f"repeatable (default: {' '.join(DEFAULT)})",
    )  # fmt: skip
    search.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="fixed",
        help="a setting for all trials, such as width=32 or preset=small; repeatable",
    )  # fmt: skip
    search.add_argument("--searcher", help="random, or optuna, which learns from the losses (default: random)")
    search.add_argument(
        "--scheduler", help="asha stops the worse two thirds early, pbt mutates the better, none (default: asha)"
    )
    search.add_argument("--seed", type=int, help="seed of everything random (default: 0)")
    search.add_argument(
        "--time-budget", type=flags.duration, metavar="TIME", help="stop after that time, as by Ctrl-C: 30m, 2h"
    )
    search.add_argument(
        "--gpus-per-trial", type=float, metavar="N",
        help="GPUs of each worker: 0, 1, or a fraction that shares a GPU (default: 1 if there are GPUs)",
    )  # fmt: skip
    search.add_argument("--cpus-per-trial", type=int, metavar="N", help="CPUs of each worker (default: 1)")
    search.add_argument("--workers-per-trial", type=int, metavar="K", help="train each trial on K workers (default: 1)")
    search.add_argument("--dry-run", action="store_true", help="print the plan and the first settings, and stop")
    flags.add_log(search)
    flags.add_address(search)
    flags.add_node_patience(search)
    for name, text in (
        ("report", "print the ranked table, and draw report.png"),
        ("dashboard", "show the trials in TensorBoard, in the browser"),
    ):
        commands.add_parser(name, help=text).add_argument("name", metavar="NAME", help="the search's name")
    commands.choices["dashboard"].add_argument("--port", type=int, default=0, help="(default: a free one)")
    for command in commands.choices.values():
        flags.add_runs(command)
        command.add_argument("--verbose", action="store_true", help="print Ray's own log, and tracebacks")
    return top


def main(argv: Sequence[str], prog: str = PROG) -> int:
    """Run the command in `argv`; `prog` is how the user called the program. Returns the exit status."""
    args = parse(argv, prog)
    if args.command == "report":
        from tune import report

        found = open_search(args.runs, args.name)
        with waiting("drawing the report"):
            report.write(found)
        report.show(found)
        return 0
    if args.command == "dashboard":
        from tune.dashboard import dashboard

        return dashboard(open_search(args.runs, args.name), args.port)
    if (status := run_there(args, argv[:1], argv[1:])) is not None:
        return status
    ended = search(args)
    if ended is None:
        return 0
    name, where = run_folder.runs_and_name(ended.found.storage)[1], flags.runs_flag(args.runs)
    finish(ended, name, where)
    if ended.stopped is None:
        return 0
    say(f"stopped; to go on: {prog} search{flags.sent()} --resume {name}{where}{flags.log_flag(args)}")
    return 128 + ended.stopped if ended.stopped else 0


def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """The flags of the command in `argv`, checked. Raises UsageError."""
    args = parser(prog).parse_args(argv)
    if args.command == "search":
        check_flags(args)
    return args


@dataclass(frozen=True)
class Ended:
    """A search when it has ended: by itself, by the signal `stopped` after checkpoints, or by its time budget (0)."""

    found: Search
    stopped: int | None
    best: Config | None
    """The config of the best trial, which is exported; None if no trial has finished an epoch."""


def search(args: argparse.Namespace) -> Ended | None:
    """Run a new or resumed search, write its report, and export its best trial. Returns None after --dry-run.

    `args` come from `parse`. Raises UsageError, and RunFailed if all trials have failed.
    """
    name, data = args.name, args.data or DEFAULT_DATA
    known: list[Entry] = []
    if args.resume:
        name = name or run_folder.newest(args.runs, data, ENDING, ABOUT)
        old = open_search(args.runs, name)
        storage, plan = old.storage, SearchPlan.from_dict(old.about, old.storage.uri)
        check_same(args, plan)
        known = [resumed_entry(storage, plan, trial) for trial in old.trials]
        if args.trials is not None and args.trials < plan.trials:
            raise UsageError(f"--trials: this search has {plan.trials} trials already, and {args.trials} are fewer")
        plan = replace(plan, trials=args.trials or plan.trials)
    else:
        name = name or f"{run_folder.default_name(data)}{ENDING}"
        storage, plan = plan_new(args, name, data)

    tracking = None if args.dry_run else trackers.prepare(args.log, args.runs)
    with waiting("loading Ray Tune"):
        from tune.disk import check_disk
        from tune.schedulers import make_scheduler
        from tune.search import run

    # Errors in the plan must be raised before anything is written.
    make_scheduler(plan)
    if plan.searcher == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UsageError("--searcher optuna: Optuna is not installed; type pip install optuna")
    with redirect_stdout(sys.stderr if args.dry_run else sys.stdout):
        say(connect.connect(args.address, args.verbose))
    if not args.resume and args.gpus_per_trial is None:
        plan = replace(plan, gpus=float(nodes.has_gpus()))
    at_once = nodes.most_slots(plan.cpus, plan.gpus) // plan.workers
    if at_once < 1:
        each = f"{plan.workers} worker{'s' * (plan.workers > 1)} of {plan.cpus} CPUs and {plan.gpus:g} GPUs"
        raise UsageError(
            f"--cpus-per-trial, --gpus-per-trial, --workers-per-trial: a trial of {each} never fits into this cluster"
        )
    if args.dry_run:
        shown = [plan.space.setting(plan.seed, n) for n in range(min(5, plan.trials))]
        say(f"{plan.to_json()}{at_once} at once; the first settings:\n" + "\n".join(map(str, shown)))
        return None
    nodes.wait_for_nodes(nodes.Workers(plan.workers, plan.gpus > 0, plan.cpus), args.node_patience)
    if not args.resume:
        dataset = DataChoice(data).open(args.runs)
        say(f"{len(dataset.train)} training and {len(dataset.val)} validation images: {dataset.path}")
        filled = plan.config.for_data(str(dataset.path), dataset.fingerprint, dataset.size, len(dataset.train))
        plan = replace(plan, config=filled)
    check_disk(storage, plan, {entry.number for entry in known})
    save(storage, plan, known)
    most = "one epoch" if plan.config.epochs == 1 else f"at most {plan.config.epochs} epochs"
    say(f"{storage.uri}: {plan.trials} trials of {most}, {at_once} at a time")
    say(f"watch it: python -m tune dashboard {name}{flags.runs_flag(args.runs)}")
    stopped = run(storage, plan, known, at_once, args.time_budget, tracking)
    return exported(open_search(args.runs, name), stopped)


def plan_new(args: argparse.Namespace, name: str, data: str) -> tuple[Storage, SearchPlan]:
    """The folder and the plan of a new search; its dataset is not opened yet. Raises UsageError if the name is used."""
    fixed = parse_fixed(args.fixed)
    space = Space.parse(args.search, fixed)
    settings: dict[str, Any] = {"seed": args.seed or 0, **fixed}
    if args.data is None and "preset" not in settings:
        settings = {"preset": "small", "epochs": 8, **settings}  # within minutes
    if args.epochs is not None:
        settings["epochs"] = args.epochs
    config = Config.make(data=data, **settings)
    storage = Storage(args.runs) / run_folder.check_name(name)
    if storage.exists(ABOUT):
        raise UsageError(f"--name: {storage.uri} exists; continue it with --resume {name}, or choose another name")
    storage = run_folder.open_new(args.runs, name)
    DataChoice(data).check()
    return storage, SearchPlan(
        space=space, config=config, trials=args.trials or 12, searcher=args.searcher or "random",
        scheduler=args.scheduler or "asha", seed=args.seed or 0, workers=args.workers_per_trial or 1,
        cpus=args.cpus_per_trial or 1, gpus=args.gpus_per_trial or 0.0,
    )  # fmt: skip


def resumed_entry(storage: Storage, plan: SearchPlan, trial: Trial) -> Entry:
    """What a resumed search knows of a trial; an ended one goes on if a kill prevented its last epoch or checkpoint."""
    state = trial.state
    if state in ("done", "stopped"):
        all_epochs = state == "stopped" or trial.epoch >= plan.config.epochs
        if not (all_epochs and run_folder.is_saved(storage / f"{FOLDER}/{trial.name}", trial.records)):
            state = "waiting"
    return Entry(trial.number, trial.name, trial.setting, state, trial.reason)


def check_flags(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that contradict each other or are out of range."""
    flag_of = {name: f"{name}_per_trial" if name in ("gpus", "cpus", "workers") else name for name in LIMITS}
    for name, (kind, limits) in LIMITS.items():
        if (value := getattr(args, flag_of[name])) is not None and name != "gpus":
            check(flag_of[name], value, kind, limits)
    if args.gpus_per_trial is not None:
        check("gpus_per_trial", args.gpus_per_trial, float, {"low": 0})
    gpus = args.gpus_per_trial or 0
    if gpus > 1 or (gpus % 1 and (args.workers_per_trial or 1) > 1):
        raise UsageError(
            "--gpus-per-trial: a worker has one GPU, or a fraction if it is alone; for more, --workers-per-trial 4"
        )
    if args.scheduler == "pbt" and args.searcher == "optuna":
        raise UsageError("--scheduler pbt: it chooses the settings itself; leave out --searcher optuna")
    if args.scheduler == "pbt" and (args.workers_per_trial or 1) > 1:
        raise UsageError("--scheduler pbt: its trials have one worker each; leave out --workers-per-trial")
    flags.resumed_name(args)


def check_same(args: argparse.Namespace, plan: SearchPlan) -> None:
    """UsageError for a flag that differs from what the resumed search began with."""
    fixed = parse_fixed(args.fixed)
    has = plan.config.flat()
    pairs = [("--set " + name, value, has[name]) for name, value in fixed.items()]
    pairs += [("--epochs", args.epochs, plan.config.epochs), ("--seed", args.seed, plan.seed)]
    pairs += [("--searcher", args.searcher, plan.searcher), ("--scheduler", args.scheduler, plan.scheduler)]
    for name in ("gpus", "cpus", "workers"):
        pairs.append((f"--{name}-per-trial", getattr(args, f"{name}_per_trial"), getattr(plan, name)))
    if args.search:
        pairs.append(("--search", Space.parse(args.search, fixed), plan.space))
    for flag, typed, kept in pairs:
        chosen = typed == 0 and flag in ("--epochs", "--set batch_size")  # 0 had the search choose
        if typed is not None and typed != kept and not chosen:
            told = "" if flag == "--search" else f": this search has {kept}, not {typed}"
            raise UsageError(f"{flag}{told or ': this search has other domains'}; a resumed search keeps its settings")
    if args.data is not None:
        DataChoice(args.data).resumed(plan.config.data, plan.config.fingerprint)


def exported(found: Search, stopped: int | None) -> Ended:
    """Write the report of a search that has ended, and export its best model.

    Raises RunFailed if no trial has finished an epoch, unless the search was interrupted.
    """
    from dogvae.training.export import FOLDER as EXPORT
    from dogvae.training.export import export
    from tune import report

    with waiting("drawing the report"):
        report.write(found)
    try:
        run, config = best_run(found)
    except UsageError as error:
        if stopped is not None:
            return Ended(found, stopped, None)
        report.show(found)
        raise RunFailed(f"{error}; see the reasons above, or first train one setting as a run of its own") from error
    export(run, config, found.storage / EXPORT)
    return Ended(found, stopped, config)


def finish(ended: Ended, name: str, where: str) -> None:
    """Print the report and the next commands."""
    from dogvae.training.export import FOLDER as EXPORT
    from tune import report

    report.show(ended.found)
    if ended.best is None:
        return
    folder = (ended.found.storage / EXPORT).uri
    say(f"""
the model   {folder}
next        python -m tune dashboard {name}{where}
            dogvae sample {shlex.quote(folder)} -n 64 -o samples.png
            dogvae train{flags.sent()}{where} --from-search {name} --epochs {10 * ended.best.epochs}""")
