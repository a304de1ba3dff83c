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


def hparams(run: Storage, name: str, setting: Mapping[str, Any]) -> None:
    """Write the setting of a trial beside its curves, unless it is there."""
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo

    info = SessionStartInfo(group_name=name)
    for parameter, value in setting.items():
        _fill(info.hparams[parameter], value)
    _write(run, "_hparams_/session_start_info", HParamsPluginData(session_start_info=info))


def experiment(folder: Storage, space: Space) -> None:
    """Write what is searched and measured into the folder of all trials: the columns of the table and their order."""
    from tensorboardX.proto.api_pb2 import DataType, Experiment
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    about = Experiment()
    for name, domain in space.domains.items():
        info = about.hparam_infos.add(name=name)
        text = isinstance(domain.values[0], str)
        switch = isinstance(domain.values[0], bool)
        kind = "STRING" if text else "BOOL" if switch else "FLOAT64"
        info.type = DataType.Value(f"DATA_TYPE_{kind}")
        if domain.kind == "choice":
            info.domain_discrete.extend(domain.values)
        else:
            info.domain_interval.min_value, info.domain_interval.max_value = map(float, domain.values)
    for tag, title in METRICS.items():
        metric = about.metric_infos.add(display_name=title)
        metric.name.tag = tag
    _write(folder, "_hparams_/experiment", HParamsPluginData(experiment=about))


def _fill(value: Any, setting: Any) -> None:
    if isinstance(setting, bool):
        value.bool_value = setting
    elif isinstance(setting, str):
        value.string_value = setting
    else:
        value.number_value = float(setting)


def _write(storage: Storage, tag: str, data: Any) -> None:
    """One summary in an event file of its own."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    if any(file.endswith(SUFFIX) for file in storage.names()):
        return
    metadata = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
    )
    with tempfile.TemporaryDirectory() as folder:
        writer = EventsWriter(f"{folder}/events", SUFFIX)
        writer.write_event(Event(summary=Summary(value=[Summary.Value(tag=tag, metadata=metadata)])))
        writer.close()
        (written,) = Path(folder).iterdir()
        storage.write(written.name, written.read_bytes())
