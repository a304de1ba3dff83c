"""The commands as Python functions: `dogvae.train`, `dogvae.search`, `dogvae.prepare`, `dogvae.fit_prior`.

An argument has the name of its flag, with `_` for `-`. It is written as that flag, and goes the way of the command:
the same checks, defaults and messages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dogvae.commands import entry, flags
from dogvae.errors import UsageError
from dogvae.jupyter import silence_widgets

if TYPE_CHECKING:
    from dogvae.commands.run_objects import Run, Search

Count = int | tuple[int, int] | None
"""A number of workers, or a range."""


def train(
    data: str | Path | None = None,
    *,
    name: str | None = None,
    runs: str | Path | None = None,
    epochs: int | None = None,
    gpus: Count = None,
    cpus: Count = None,
    **settings: Any,
) -> Run:
    """Train a VAE on photos or a prepared dataset, and export the best epoch: the command `dogvae train`.

    `settings` are all other flags of `dogvae train --help`, such as `preset="small"`, `lr=1e-3` or `augment=False`.
    `gpus=(2, 4)` is the range `--gpus 2:4`. Ctrl-C, or the stop button of a notebook, saves a checkpoint and returns
    the run so far; pressed again, it raises KeyboardInterrupt. Raises UsageError and RunFailed as the command does.
    """
    from dogvae.commands import train as command
    from dogvae.commands.run_objects import Run

    given = dict(data=data, name=name, runs=runs, epochs=epochs, gpus=gpus, cpus=cpus, **settings)
    args = command.parse(as_flags(given), "dogvae train")
    with _in_this_process(args):
        ended = command.train(args)
    if ended is None:
        raise UsageError("--dry-run: it prints the plan and returns no run; use the command line")
    run = Run(ended.storage, ended.config)
    if ended.signum:
        print(f"stopped after a checkpoint; {run.RESUME} goes on")
    return run


def search(
    data: str | Path | None = None,
    *,
    name: str | None = None,
    runs: str | Path | None = None,
    trials: int | None = None,
    epochs: int | None = None,
    **settings: Any,
) -> Search:
    """Train many settings side by side, and export the best model: the command `dogvae search`.

    `settings` are all other flags of `dogvae search --help`. `search={"lr": "loguniform(1e-4,1e-2)", "width": [8, 16]}`
    gives settings to search, where a list is a choice. `set={"preset": "small"}` gives settings for all trials. Ctrl-C
    saves a checkpoint of each trial and returns the search so far. Raises UsageError and RunFailed as the command does.
    """
    from dogvae.commands import search as command
    from dogvae.commands.run_objects import Search

    given = dict(data=data, name=name, runs=runs, trials=trials, epochs=epochs, **settings)
    args = command.parse(["search", *as_flags(given)], "dogvae")
    with _in_this_process(args):
        ended = command.search(args)
    if ended is None:
        raise UsageError("--dry-run: it prints the plan and returns no search; use the command line")
    found = Search(ended.found)
    if ended.stopped is not None:
        print(f"stopped after a checkpoint of each trial; {found.RESUME} goes on")
    return found


def prepare(source: str | Path, out: str | Path, **settings: Any) -> Path | str:
    """Turn photos into a dataset of small square images, and return `out`: the command `dogvae prepare`.

    `settings` are the flags of `dogvae prepare --help`, such as `size` and `val_fraction`. Raises UsageError.
    """
    from dogvae.commands import cli

    args = cli.parser().parse_args(["prepare", *as_flags(settings), "--", str(source), str(out)])
    with _in_this_process(args):
        return cli.prepared(args)


def fit_prior(run: Run | str | Path, **settings: Any) -> Run:
    """Train a prior for the VAE of a run, so that new dogs look more like dogs: the command `dogvae fit-prior`.

    `settings` are the flags of `dogvae fit-prior --help`, such as `epochs`. Returns the run with its new prior. Ctrl-C
    saves a checkpoint, and the same call goes on. Raises UsageError and RunFailed.
    """
    from dogvae.commands import fit_prior as command
    from dogvae.commands.run_objects import Run, open_run

    folder = str(run.path if isinstance(run, Run) else run)
    args = command.parse([*as_flags(settings), "--", folder])
    with _in_this_process(args):
        if command.fit_prior(args):
            print("stopped after a checkpoint; the same call goes on")
    return open_run(folder)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as they would be typed: `lr=0.1` as `--lr=0.1`. None is left out, and so is False for a mere flag."""
    words = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is False and name in flags.switches():
            words.append(f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words.append(f"{flag}={','.join(map(_text, value))}")
        elif isinstance(value, dict):
            words += [f"{flag}={key}={_text(item)}" for key, item in value.items()]
        elif value is not None and value is not False:
            words.append(f"{flag}={':'.join(map(_text, value)) if isinstance(value, tuple) else _text(value)}")
    return words


def _text(value: Any) -> str:
    """A value as it would be typed; a list is a choice."""
    if isinstance(value, list):
        return f"choice({','.join(map(_text, value))})"
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def _in_this_process(args: Any) -> Iterator[None]:
    """Use Ray in a Python process that goes on after the command."""
    address = getattr(args, "address", None) or os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise UsageError(f"--address: only the command line sends jobs to {address}; give HOST:PORT of the head")
    # Read when Ray is imported. Threads that still use Ray after its end would start another one.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    silence_widgets()
    entry.use_fast_start()
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        import ray

        ray.shutdown()  # the workers would go on
        if isinstance(error, SystemExit) and error.code != 130:
            raise
        raise KeyboardInterrupt from error
