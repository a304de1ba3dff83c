"""TensorBoard's HParams tab: the search space, the metrics, and the settings of each trial."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dogvae.storage import Storage
from dogvae.training.tensorboard import ended, fill, hparams, serialized
from tune.space import Space

SUFFIX, END_SUFFIX = ".hparams", ".ended"  # of the event files
METRICS = {  # the tag of a curve, and its title in the table
    "val/loss": "loss",
    "val/reconstruction": "reconstruction",
    "val/kl": "KL",
    "val/explained": "explained",
    "workings/seconds": "seconds",
    "workings/images_per_s": "images/s",
}


def write_hparams(run: Storage, name: str, setting: Mapping[str, Any], space: Space) -> None:
    """Write an event file with a trial's settings and the table's columns into the trial's folder `run`.

    The table shows `name`. Trials of one name would be one row, also those of two searches.
    """
    for file in run.names():
        if file.endswith(END_SUFFIX):  # the trial goes on
            run.delete(file)
    from tensorboardX.proto.api_pb2 import DataType, Experiment
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo

    info = SessionStartInfo(group_name=name)
    experiment = Experiment()
    for parameter, domain in space.domains.items():
        fill(info.hparams[parameter], setting[parameter])
        column = experiment.hparam_infos.add(name=parameter)
        kind = {str: "STRING", bool: "BOOL"}.get(type(domain.values[0]), "FLOAT64")
        column.type = DataType.Value(f"DATA_TYPE_{kind}")
        if domain.kind == "choice":
            column.domain_discrete.extend(domain.values)
        else:
            column.domain_interval.min_value, column.domain_interval.max_value = map(float, domain.values)
    for tag, title in METRICS.items():
        metric = experiment.metric_infos.add(display_name=title)
        metric.name.tag = tag
    data = {
        "_hparams_/experiment": HParamsPluginData(experiment=experiment),
        "_hparams_/session_start_info": HParamsPluginData(session_start_info=info),
    }
    _write(run, SUFFIX, {tag: serialized(plugin) for tag, plugin in data.items()})


def write_end(run: Storage, well: bool) -> None:
    """Write an event file that says how a trial has ended, into the trial's folder `run`."""
    _write(run, END_SUFFIX, {"_hparams_/session_end_info": ended(well)})


def _write(storage: Storage, suffix: str, contents: Mapping[str, bytes]) -> None:
    """Write the plugin's summaries by tag as one event file. An earlier file stays if it is equal, else goes."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event

    for file in storage.names():
        if file.endswith(suffix):
            written = storage.read(file)
            if all(content in written for content in contents.values()):
                return
            storage.delete(file)  # PBT has changed the settings
    with tempfile.TemporaryDirectory() as folder:
        writer = EventsWriter(f"{folder}/events", suffix)
        writer.write_event(Event(summary=hparams(contents)))
        writer.close()
        (path,) = Path(folder).iterdir()
        storage.write(path.name, path.read_bytes())
