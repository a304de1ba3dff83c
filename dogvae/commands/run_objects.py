"""`Run` and `Search`: what `dogvae.train` and `dogvae.search` return, with their numbers, curves and models."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dogvae.commands import python
from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.errors import UsageError
from dogvae.storage import Storage
from dogvae.training import metrics, run_folder
from tune import ranking, search_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dogvae.inference.model import DogVAE

ROWS = 12  # trials that a notebook shows


def open_run(path: str | Path) -> Run:
    """The run in a folder, such as `runs/dogs` or `s3://...`. Raises UsageError if there is none."""
    return Run(*run_folder.open_run(str(path)))


def open_search(path: str | Path) -> Search:
    """The search in a folder, such as `runs/best` or `s3://...`. Raises UsageError if there is none."""
    return Search(search_folder.open_search(*run_folder.runs_and_name(Storage(path))))


class Run:
    """A run: its folder, its epochs and its model. `dogvae.train` and `dogvae.open_run` return one."""

    RESUME = "run.resume()"

    def __init__(self, storage: Storage, config: Config, search: Storage | None = None) -> None:
        self._storage, self._search = storage, search  # with `search`: its best trial
        self.config = config
        """All settings."""

    @property
    def path(self) -> Path | str:
        """The folder: a Path, or a URI."""
        return self._storage.local or self._storage.uri

    @property
    def _home(self) -> Storage:
        """The folder that has the export."""
        return self._search or self._storage

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The finished epochs, one dict each: `pandas.DataFrame(run.metrics)`. docs/training.md explains the fields."""
        return metrics.read(self._storage)

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch with the least validation loss; None before the first."""
        return metrics.best(self.metrics)

    @property
    def data(self) -> Dataset:
        """The dataset, with its splits `train` and `val`."""
        return Dataset(self.config.data, self.config.fingerprint)

    @cached_property
    def model(self) -> DogVAE:
        """The model of the best epoch; a run that was stopped is exported now. UsageError before its first epoch."""
        from dogvae.inference.load import load

        folder = _export(self._home)
        if not folder.exists(run_folder.CONFIG):
            from dogvae.training.export import export

            export(self._storage, self.config, folder)
        return load(folder.uri)

    def plot(self) -> Figure:
        """A matplotlib figure: loss, reconstruction, KL and *explained* over the epochs."""
        from dogvae.training.curves import curves

        return curves(self.metrics)

    def resume(self, **settings: Any) -> Run:
        """Train on: a stopped run to its end, or a finished one to more `epochs=`.

        `settings` are those of `dogvae.train`; a run keeps its settings, so workers and `epochs` may differ. The best
        trial of a search goes on in a new run.
        """
        runs, name = run_folder.runs_and_name(self._home)
        if self._search:
            return python.train(runs=runs, from_search=name, **settings)
        return python.train(runs=runs, name=name, resume=True, **settings)

    def fit_prior(self, **settings: Any) -> Run:
        """Train a prior for this run's model: `dogvae.fit_prior`. Returns the run with its new prior."""
        return python.fit_prior(self, **settings)

    def _facts(self) -> dict[str, str]:
        done, best = len(self.metrics), self.best
        left = "" if done >= self.config.epochs else f"; {self.RESUME} goes on"
        found = {"best": f"epoch {best['epoch'] + 1}: {metrics.describe(best)}"} if best else {}
        return {"epochs": f"{done} of {self.config.epochs}{left}", **found}

    def __repr__(self) -> str:
        return "\n".join([f"Run {self.path}", *(f"  {name:8}{text}" for name, text in self._facts().items())])

    def _repr_html_(self) -> str:
        facts = [[name, text] for name, text in {"run": str(self.path), **self._facts()}.items()]
        return _table(facts) + _preview(self._home)


class Search:
    """A search: its folder, its trials and the best run. `dogvae.search` and `dogvae.open_search` return one."""

    RESUME = "search.resume()"

    def __init__(self, found: search_folder.Search) -> None:
        self._found = found

    @property
    def path(self) -> Path | str:
        """The folder: a Path, or a URI."""
        return self._found.storage.local or self._found.storage.uri

    @property
    def trials(self) -> list[dict[str, Any]]:
        """The trials, best first, one dict each: `pandas.DataFrame(search.trials)`."""
        return ranking.rows(self._found)

    @property
    def best(self) -> Run:
        """The run of the best trial. Raises UsageError before a trial has finished an epoch."""
        return Run(*ranking.best_run(self._found), search=self._found.storage)

    @cached_property
    def model(self) -> DogVAE:
        """The model of the best trial."""
        return self.best.model

    def plot(self) -> Figure:
        """A matplotlib figure: the loss against each setting and against time, and how much each setting matters."""
        from tune.report import figure

        return figure(self._found)

    def resume(self, **settings: Any) -> Search:
        """Go on with a search that was stopped, or with more `trials=`."""
        runs, name = run_folder.runs_and_name(self._found.storage)
        return python.search(runs=runs, resume=name, **settings)

    def __repr__(self) -> str:
        trials, ended = self.trials, ("done", "stopped", "failed")
        lines = [f"Search {self.path}", f"  trials  {sum(t['state'] in ended for t in trials)} of {self._planned}"]
        try:
            best, run = trials[0], self.best
        except (IndexError, UsageError):
            return "\n".join(lines)
        setting = ", ".join(f"{name} {best[name]:.3g}" for name in search_folder.parameters(self._found))
        return "\n".join([*lines, f"  best    trial {best['trial']}: {setting}; {run._facts()['best']}"])

    @property
    def _planned(self) -> int:
        return self._found.about["trials"]

    def _repr_html_(self) -> str:
        names = ["trial", *search_folder.parameters(self._found), "epochs", "loss", "explained", "seconds", "state"]
        rows = [[_cell(trial[name]) for name in names] for trial in self.trials[:ROWS]]
        return escape(str(self.path)) + _table([names, *rows]) + _preview(self._found.storage)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ("".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _export(home: Storage) -> Storage:
    from dogvae.inference.load import EXPORT  # late, as it imports torch

    return home / EXPORT


def _preview(home: Storage) -> str:
    """An `img` of the export's preview as a small JPEG; nothing without an export."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(_export(home).read("preview.png"))).convert("RGB")
    except OSError:
        return ""
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG")
    data = base64.b64encode(jpeg.getvalue()).decode()
    return f'<img alt="samples, and a walk between two dogs" src="data:image/jpeg;base64,{data}">'
