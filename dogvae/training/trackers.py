"""Weights & Biases and MLflow: what `--log` sends there, beside TensorBoard's file.

A tracker has a run for each run (or trial) of ours. `wandb.json` or `mlflow.json` in our run's folder holds its id and
how many epochs it has, so that a resumed run goes on in it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from dogvae.config import Config
from dogvae.console import waiting
from dogvae.errors import UsageError
from dogvae.json_text import parse
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.tensorboard import PICTURES, tag_of

PROJECT = "dogvae"  # of Weights & Biases, and the experiment of MLflow, unless their variables name another
PREFIXES = ("WANDB_", "MLFLOW_")  # of the variables that both read
SERVICE = "WANDB_SERVICE"  # wandb sets it: the socket of this process, which ends with it
RUNNING = "running"  # the state of a run that has not ended, in its file
CLOSE_S = 30.0  # how long a run waits at its end for each tracker
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"  # MLflow's own default takes minutes


@dataclass(frozen=True)
class Tracking:
    """What `--log` asks for, as the workers need it."""

    names: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)
    """The trackers' variables, which may hold keys: a worker may be on a node without them."""
    group: str = ""
    """The search of a trial, or the run of the VAE whose prior is trained."""


def prepare(names: Sequence[str], runs: str) -> Tracking | None:
    """Check that runs in the folder `runs` can be sent to these trackers. Returns None without names.

    Raises UsageError for a missing package, a missing API key and a server that does not answer; asks for nothing.
    """
    environment: dict[str, str] = {}
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # wandb leaves a folder `wandb`, which counts as a package
            raise UsageError(f"--log {name}: it is not installed; type pip install 'dogvae[{name}]'")
        with waiting(f"looking for {name}"):
            try:
                environment |= KINDS[name].environment(Storage(runs))
            except UsageError:
                raise
            except Exception as error:  # of any kind: the user reads one line
                raise UsageError(f"--log {name}: {_first_line(error)}") from error
    given = {k: v for k, v in os.environ.items() if k.startswith(PREFIXES) and k != SERVICE}
    return Tracking(tuple(names), {**given, **environment}) if names else None


class Tracker:
    """Sends a run to one tracker, in a thread of its own: a slow server delays nothing.

    The first failure is noted. Then the tracker gets nothing more, until the run is resumed: it gets what it lacks.
    """

    def __init__(
        self,
        name: str,
        tracking: Tracking,
        config: Config,
        storage: Storage,
        records: Sequence[dict[str, Any]],
        note: Callable[[str], None],
    ) -> None:
        """`records` are the epochs so far. Those that the tracker lacks are sent, without pictures."""
        os.environ.pop(SERVICE, None)
        os.environ |= tracking.environment
        self._name, self._storage, self._note, self._failed = name, storage, note, False
        self._thread = ThreadPoolExecutor(1)
        self._submit(self._open, config, tracking.group, list(records))

    def record(self, record: dict[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
        """Send an epoch: its JSON-ready record, and pictures (3, H, W) uint8 by name."""
        self._submit(self._send, record, pictures)

    def wait(self) -> None:
        """Wait until all epochs have been sent, or the tracker has failed."""
        self._finish(self._submit(lambda: None))

    def close(self, state: str, records: Sequence[dict[str, Any]]) -> None:
        """Send the best of `records`, and how the run has ended: `finished`, `stopped` or `failed`."""
        self._finish(self._submit(self._end, state, metrics.best(records)))
        self._thread.shutdown(wait=not self._failed, cancel_futures=True)

    def _finish(self, future: Future[None]) -> None:
        try:
            future.result(CLOSE_S)
        except TimeoutError:
            self._fail(f"no answer within {CLOSE_S:g} s")

    def _submit(self, action: Callable[..., None], *args: Any) -> Future[None]:
        def attempt() -> None:
            if self._failed:
                return
            try:
                action(*args)
            except Exception as error:  # noqa: BLE001  (of any kind: a tracker never ends the training)
                self._fail(_first_line(error))

        return self._thread.submit(attempt)

    def _fail(self, why: str) -> None:
        if self._failed:
            return
        self._failed = True
        self._note(
            f"--log {self._name}: {why}; the training goes on, and --resume --log {self._name} sends what is missing"
        )

    def _open(self, config: Config, group: str, records: list[dict[str, Any]]) -> None:
        kept: dict[str, Any] = {"run": "", "epochs": 0}
        if self._storage.exists(self._file):
            kept = parse(self._storage.read(self._file))
        name = self._storage.uri.partition("?")[0].rpartition("/")[2]
        flow = {f"flow_{key}": value for key, value in asdict(config.flow).items()} if config.flow else {}
        self._run = KINDS[self._name](kept["run"], name, group, {**config.flat(), **flow}, self._storage)
        self._epochs = self._first = max(kept["epochs"], self._run.epochs)
        self._save()
        self._note(f"{self._name}: {self._run.where}")
        for record in records:
            self._send(record, {})

    def _send(self, record: dict[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
        if record["epoch"] < self._epochs:  # repeated after a kill
            return
        numbers = {tag_of(k): float(v) for k, v in record.items() if k != "epoch" and v is not None}
        self._run.log(record["epoch"] + 1, numbers, {name: p.transpose(1, 2, 0) for name, p in pictures.items()})
        self._epochs = record["epoch"] + 1
        self._save()

    def _save(self, state: str = RUNNING) -> None:
        safe = state != RUNNING or self._run.survives_kill
        kept = {"run": self._run.id, "epochs": self._epochs if safe else self._first, "state": state}
        self._storage.write(self._file, json.dumps(kept).encode())

    @property
    def _file(self) -> str:
        return f"{self._name}.json"

    def _end(self, state: str, best: dict[str, Any] | None) -> None:
        numbers = {f"best/{k.removeprefix('val_')}": float(v) for k, v in (best or {}).items() if k.startswith("val_")}
        self._run.end(state, {**numbers, "best/epoch": best["epoch"] + 1.0} if best else {})
        self._save(state)


def start_trackers(tracking: Tracking | None, *about: Any) -> list[Tracker]:
    """The trackers of a run; `about` are the other arguments of a Tracker."""
    return [Tracker(name, tracking, *about) for name in tracking.names] if tracking else []


def end_killed(tracking: Tracking, config: Config, storage: Storage, state: str, note: Callable[[str], None]) -> None:
    """End a run in the trackers where it is still running, because its process was killed."""
    records = metrics.read(storage)
    for name in tracking.names:
        if storage.exists(f"{name}.json") and parse(storage.read(f"{name}.json"))["state"] == RUNNING:
            Tracker(name, tracking, config, storage, records, note).close(state, records)


class _Wandb:
    """A run of Weights & Biases."""

    epochs = 0  # its server ignores steps that it has
    survives_kill = False  # what is in its buffers is lost until the run has ended

    @staticmethod
    def environment(runs: Storage) -> dict[str, str]:
        import wandb

        settings = wandb.setup(wandb.Settings(silent=True)).settings  # also from files, of an earlier environment
        found = {name: os.environ.get(f"WANDB_{name.upper()}") for name in ("mode", "project", "entity", "dir")}
        found = {name: value or getattr(settings, name, None) for name, value in found.items()}
        mode, folder = found["mode"], found["dir"]
        offline = mode in ("offline", "dryrun")
        if not (offline or mode == "disabled" or wandb.run or wandb.login(prompt=False, verify=False)):
            raise UsageError(
                "--log wandb: there is no API key; type wandb login, or set WANDB_API_KEY or WANDB_MODE=offline"
            )
        if offline and runs.local is None and not folder:
            raise UsageError("--log wandb: offline it needs a folder on a disk; set WANDB_DIR to one")
        found |= {"project": found["project"] or PROJECT, "dir": folder and os.path.abspath(folder)}
        return {f"WANDB_{name.upper()}": value for name, value in found.items() if value}

    def __init__(self, run: str, name: str, group: str, config: dict[str, Any], storage: Storage) -> None:
        import wandb

        self.id = run or uuid.uuid4().hex[:8]
        folder = os.environ.get("WANDB_DIR") or storage.local
        if not folder:
            self._temporary = tempfile.TemporaryDirectory(prefix="dogvae-wandb-", ignore_cleanup_errors=True)
            folder = self._temporary.name
        os.makedirs(folder, exist_ok=True)
        variables: dict[str, Any] = {
            name: os.environ.get(f"WANDB_{name.upper()}") for name in ("project", "entity", "mode")
        }
        self._run: Any = wandb.init(
            id=self.id, resume="allow", reinit="create_new", name=name, group=group or None, dir=folder,
            settings=wandb.Settings(silent=True, console="off"), **variables,
        )  # fmt: skip
        self._run.config.update(config, allow_val_change=True)  # a resumed run may have more epochs
        self.where = self._run.url or f"offline, to send it: wandb sync {self._run.dir.removesuffix('/files')}"

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        import wandb

        images = {f"{PICTURES}/{name}": wandb.Image(picture) for name, picture in pictures.items()}
        self._run.log({**numbers, **images}, step=step)

    def end(self, state: str, best: Mapping[str, float]) -> None:
        self._run.summary.update({**best, "state": state})
        self._run.finish(exit_code={"finished": 0, "stopped": 255, "failed": 1}[state])  # 255: as after Ctrl-C


class _Mlflow:
    """A run of MLflow."""

    survives_kill = True

    @staticmethod
    def environment(runs: Storage) -> dict[str, str]:
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        before = os.environ.get(RETRIES)
        os.environ[RETRIES] = before or "1"
        try:
            import mlflow

            uri = mlflow.get_tracking_uri()
            scheme, mark, path = uri.rpartition("sqlite:///")
            if mark or not ("://" in uri or uri.startswith("databricks")):
                uri = scheme + mark + os.path.abspath(path)  # workers have another working folder
            client, name = mlflow.MlflowClient(uri), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            if not (experiment := os.environ.get("MLFLOW_EXPERIMENT_ID", "")):
                found = client.get_experiment_by_name(name)
                experiment = found.experiment_id if found else client.create_experiment(name)
            client.get_experiment(experiment)
        except ImportError as error:  # of SQLAlchemy, which mlflow-skinny does not bring
            raise UsageError(f"--log mlflow: {error}; type pip install 'dogvae[mlflow]'") from error
        finally:
            del os.environ[RETRIES]
            os.environ |= {RETRIES: before} if before else {}
        return {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_ID": experiment}

    def __init__(self, run: str, name: str, group: str, config: dict[str, Any], storage: Storage) -> None:
        import mlflow

        self._mlflow, self.epochs = mlflow, 0
        self._client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        if run:
            self._client.update_run(run, status="RUNNING")
            history = self._client.get_metric_history(run, tag_of("seconds"))
            self.epochs = max((metric.step for metric in history), default=0)
        else:
            tags = {"group": group} if group else {}
            run = self._client.create_run(os.environ["MLFLOW_EXPERIMENT_ID"], run_name=name, tags=tags).info.run_id
            params = [mlflow.entities.Param(key, str(value)) for key, value in config.items()]
            self._client.log_batch(run, params=params)
        self.id, self.where = run, f"run {run} at {self._client.tracking_uri}"

    def log(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():  # before the numbers: an epoch that has them is complete
            key = re.sub(r"[^a-zA-Z0-9_./ -]", "", f"{PICTURES}/{name}")  # MLflow takes no others
            self._client.log_image(self.id, picture, key=key, step=step, synchronous=True)
        now = int(1000 * time.time())
        self._client.log_batch(self.id, [self._mlflow.entities.Metric(k, v, now, step) for k, v in numbers.items()])

    def end(self, state: str, best: Mapping[str, float]) -> None:
        if best:
            self.log(int(best["best/epoch"]), best, {})
        self._client.set_terminated(self.id, {"stopped": "KILLED"}.get(state, state.upper()))


KINDS: dict[str, type[_Wandb] | type[_Mlflow]] = {"wandb": _Wandb, "mlflow": _Mlflow}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
