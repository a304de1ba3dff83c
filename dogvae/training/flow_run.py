"""The run that trains a flow prior for a run's VAE: a run of its own, in the folder `prior-...` of the VAE's run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dogvae.cluster.nodes import Workers
from dogvae.config import FLOW, Config, FlowConfig, Safety
from dogvae.console import say
from dogvae.data.manifest import read_manifest
from dogvae.errors import UsageError
from dogvae.inference.load import read_about
from dogvae.storage import Storage
from dogvae.training import metrics
from dogvae.training.export import FOLDER, export, prior_run
from dogvae.training.on_ray import launch
from dogvae.training.run_folder import CONFIG, check_kept, is_finished, runs_and_name, save_config
from dogvae.training.trackers import Tracking


def fit_flow(
    run: Storage,
    config: Config,
    settings: dict[str, Any],
    workers: Workers,
    safety: Safety,
    verbose: bool,
    tracking: Tracking | None = None,
) -> int | None:
    """Export the VAE of `run`, train a flow for it, from its latest checkpoint if there is one, and export both.

    `settings` are those of the flow's Config that differ from `FLOW`, with `width` and `depth`. A flow that goes on
    keeps its settings, but for `epochs`. Returns and raises as `launch` does.
    """
    export(run, config)
    storage, own = flow_config(run, config, settings)
    if not is_finished(storage, own):
        save_config(storage, own)
        say(f"{storage.uri}: a flow prior, {own.epochs} epochs on {workers}")
        tracking = tracking and replace(tracking, group=runs_and_name(run)[1])
        if signum := launch(own, storage, workers, safety, verbose, tracking):
            return signum
    export(run, config)
    best = metrics.best(metrics.read(storage))
    assert best
    say(f"\nthe prior   epoch {best['epoch'] + 1}: {metrics.describe(best)}")
    if best["val_loss"] >= best["val_gaussian_loss"]:
        say("            the flow is no better: the export has the Gaussian alone")
    return None


def flow_config(run: Storage, config: Config, settings: dict[str, Any]) -> tuple[Storage, Config]:
    """The storage and the config of the run that trains a flow for the exported VAE of `run`."""
    exported = run / FOLDER
    weights = read_about(exported.uri)["files"]["model.safetensors"]
    storage = prior_run(run, weights)
    size = {name: value for name, value in settings.items() if name in ("width", "depth")}
    rest = {name: value for name, value in settings.items() if name not in size}
    if storage.exists(CONFIG):
        old = Config.from_json(storage.read(CONFIG).decode(), f"{storage.uri}/{CONFIG}")
        assert old.flow
        for name, value in size.items():
            if value != getattr(old.flow, name):
                raise UsageError(
                    f"--{name}: {storage.uri} was begun with {getattr(old.flow, name)}, not {value}; a prior that goes "
                    "on keeps its settings, and a new one needs that folder to be moved away"
                )
        check_kept(old, rest)
        return storage, old.replace(flow=replace(old.flow, vae=exported.uri), data=config.data, **rest)
    flow = FlowConfig(vae=exported.uri, weights=weights, **size)
    model = config.to_dict()["model"]
    own = Config.make(**{**model, **FLOW, "seed": config.seed, "augment": config.augment, **rest}, flow=flow)
    images = read_manifest(config.data, config.fingerprint)["splits"]["train"]["count"]
    return storage, own.for_data(config.data, config.fingerprint, config.model.image_size, images)
