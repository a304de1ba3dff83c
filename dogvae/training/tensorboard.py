"""TensorBoard's event file of a run: curves, pictures, and the settings, as a text and for the HParams tab."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dogvae.storage import Storage

# TensorBoard sorts groups by name: `train` and `val` come first, then pictures and all other numbers of a record.
SHOWN_FIRST = {"train_loss", "train_reconstruction", "train_kl", "val_loss", "val_reconstruction", "val_kl"}
SHOWN_FIRST |= {"val_explained", "val_psnr", "val_gaussian_loss"}
PICTURES, OTHERS = "view", "workings"


def tag_of(name: str) -> str:
    """The tag of a number of a record: `val_loss` -> `val/loss`, `lr` -> `workings/lr`."""
    return name.replace("_", "/", 1) if name in SHOWN_FIRST else f"{OTHERS}/{name}"


class EventFile:
    """Appends events to a new file in the run's folder. Steps are epochs as the console counts them, from 1 on."""

    def __init__(self, storage: Storage, known: int) -> None:
        """Begin a file that follows `known` epochs: TensorBoard drops what earlier files say of later ones."""
        # Not SummaryWriter: its thread decides when to write, so a kill could lose the last epochs.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._storage = storage
        # TensorBoard needs a local folder. For an object store, its files are uploaded after each epoch.
        self._folder = storage.local or Path(tempfile.mkdtemp(prefix="dogvae-events-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(self._folder / "events"), f".{uuid.uuid4().hex[:8]}")
        self._add(known + 1, session_log=SessionLog(status=SessionLog.START))

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Add a run's settings."""
        from tensorboardX import summary
        from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo

        self._add(0, summary=summary.text("settings", f"```\n{json.dumps(settings, indent=2)}\n```"))
        info = SessionStartInfo()
        for name, value in settings.items():
            fill(info.hparams[name], value)
        data = HParamsPluginData(session_start_info=info)
        self._add(0, summary=hparams({"_hparams_/session_start_info": serialized(data)}))

    def record(self, record: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
        """Add an epoch: its numbers, and pictures (3, H, W) uint8 by name. Then write and upload the file."""
        from tensorboardX import summary

        step = record["epoch"] + 1
        for name, value in record.items():
            if name != "epoch" and value is not None:
                self._add(step, summary=summary.scalar(tag_of(name), value))
        for name, picture in pictures.items():
            image = summary.image("picture", picture)
            image.value[0].tag = f"{PICTURES}/{name}"  # `summary.image` would replace its spaces and brackets
            self._add(step, summary=image)
        self._events.flush()
        self._upload()

    def end(self) -> None:
        """Say that the run has ended well."""
        self._add(0, summary=hparams({"_hparams_/session_end_info": ended(True)}))

    def close(self) -> None:
        """Write what is left to write."""
        self._events.close()
        self._upload()

    def delete_copy(self) -> None:
        """Delete the local folder of an object store."""
        if self._storage.local is None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, **what))

    def _upload(self) -> None:
        if self._storage.local is None:
            for path in self._folder.iterdir():
                self._storage.write(path.name, path.read_bytes())


def hparams(contents: Mapping[str, bytes]) -> Any:
    """The summary of serialised HParamsPluginData by tag, as the HParams tab reads it."""
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    values = []
    for tag, content in contents.items():
        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
        values.append(Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin)))
    return Summary(value=values)


def ended(well: bool) -> bytes:
    """The content of `_hparams_/session_end_info`."""
    from tensorboardX.proto.api_pb2 import Status
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo

    status = Status.Value("STATUS_SUCCESS" if well else "STATUS_FAILURE")
    return serialized(HParamsPluginData(session_end_info=SessionEndInfo(status=status)))


def serialized(data: Any) -> bytes:
    """The bytes of a message; equal ones for equal messages, although a protobuf map has no fixed order."""
    content: bytes = data.SerializeToString(deterministic=True)
    return content


def fill(message: Any, value: Any) -> None:
    """Put a setting into a protobuf Value."""
    if isinstance(value, bool):
        message.bool_value = value
    elif isinstance(value, str):
        message.string_value = value
    else:
        message.number_value = float(value)
