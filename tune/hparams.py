"""What TensorBoard's HParams tab is told: what is searched, what is measured, and the setting of each trial."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dogvae.storage import Storage
from tune.space import Space

SUFFIX = ".hparams"
METRICS = {
    "val/loss": "loss",
    "val/reconstruction": "reconstruction",
    "val/kl": "KL",
    "val/explained": "explained",
    "run/seconds": "seconds",
    "run/images_per_s": "images/s",
}


def hparams(run: Storage, name: str, setting: Mapping[str, Any], space: Space) -> None:
    """Write the setting of a trial beside its curves, and what is searched and measured: the columns of the table.

    The table calls a trial by its number, for it says the setting.
    """
    from tensorboardX.proto.api_pb2 import DataType, Experiment
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo

    info = SessionStartInfo(group_name=name.partition("-")[0])
    about = Experiment()
    for parameter, domain in space.domains.items():
        _fill(info.hparams[parameter], setting[parameter])
        column = about.hparam_infos.add(name=parameter)
        kind = {str: "STRING", bool: "BOOL"}.get(type(domain.values[0]), "FLOAT64")
        column.type = DataType.Value(f"DATA_TYPE_{kind}")
        if domain.kind == "choice":
            column.domain_discrete.extend(domain.values)
        else:
            column.domain_interval.min_value, column.domain_interval.max_value = map(float, domain.values)
    for tag, title in METRICS.items():
        metric = about.metric_infos.add(display_name=title)
        metric.name.tag = tag
    data = {
        "_hparams_/experiment": HParamsPluginData(experiment=about),
        "_hparams_/session_start_info": HParamsPluginData(session_start_info=info),
    }
    # A map has no order of its own: deterministic, so that the same setting is the same bytes.
    _write(run, {tag: plugin.SerializeToString(deterministic=True) for tag, plugin in data.items()})


def _fill(value: Any, setting: Any) -> None:
    if isinstance(setting, bool):
        value.bool_value = setting
    elif isinstance(setting, str):
        value.string_value = setting
    else:
        value.number_value = float(setting)


def _write(storage: Storage, contents: Mapping[str, bytes]) -> None:
    """Summaries of the plugin in an event file of their own, unless they are there; in place of others."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    for file in storage.names():
        if file.endswith(SUFFIX):
            there = storage.read(file)
            if all(content in there for content in contents.values()):
                return
            storage.delete(file)  # population based training has changed the setting
    with tempfile.TemporaryDirectory() as folder:
        writer = EventsWriter(f"{folder}/events", SUFFIX)
        for tag, content in contents.items():
            plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
            value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
            writer.write_event(Event(summary=Summary(value=[value])))
        writer.close()
        (written,) = Path(folder).iterdir()
        storage.write(written.name, written.read_bytes())
