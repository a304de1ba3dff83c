"""`dogvae.load`: reads an export folder, checks every file in it, and returns the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from dogvae.config import FlowConfig, ModelConfig
from dogvae.errors import UsageError
from dogvae.inference.model import INFERENCE_BATCH, DogVAE
from dogvae.network.flow import Flow
from dogvae.network.vae import VAE
from dogvae.storage import Storage

EXPORT_FORMAT, EXPORT_VERSION = "dogvae-export", 3
EXPORT = "export"  # the folder of an export in that of its run
FLOW_FILE = "flow.safetensors"  # of exports with a flow prior


def load(path: str | Path, device: str | torch.device | None = None) -> DogVAE:
    """The model of an export folder (a path or `s3://...`) on `device` (default: the GPU if there is one).

    The folder of a run or of a search stands for the export in it. No code from the folder is executed. Raises
    UsageError if the folder is not an export, has another format version or is damaged, and if the device is not
    available.
    """
    path = export_of(path)
    folder, target = Storage(path), _device(device)
    about = read_about(path)
    try:
        tensors = {}
        for name in ("model.safetensors", "prior.safetensors", *([FLOW_FILE] if about.get("flow") else [])):
            content = folder.read(name)
            if hashlib.sha256(content).hexdigest() != about["files"][name]:
                raise UsageError(f"{path}/{name} is damaged: its checksum is wrong; export the run again")
            tensors[name] = safetensors.torch.load(content)
        model = VAE(_config(about["model"]))
        model.load_state_dict(tensors["model.safetensors"])
        flow = None
        if FLOW_FILE in tensors:
            flow = Flow(FlowConfig(**about["flow"]["settings"]), model.latent_shape)
            flow.load_state_dict(tensors[FLOW_FILE])
        return DogVAE(model, target, about, tensors["prior.safetensors"], flow)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} is damaged: {error}; export the run again") from error
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]}; export the run again") from error


def export_of(path: str | Path) -> str | Path:
    """`path`, or the export in it if `path` is the folder of a run or of a search with an export."""
    inside = Storage(path) / EXPORT
    return inside.local or inside.uri if inside.exists("config.json") else path


def read_about(path: str | Path) -> dict[str, Any]:
    """The config.json of an export, of this format and version. Raises UsageError as `load`."""
    folder = Storage(path)
    try:
        about = json.loads(folder.read("config.json"))
    except (OSError, ValueError) as error:
        why = "it has no config.json" if isinstance(error, FileNotFoundError) else str(error)
        if not folder.exists(""):
            why = "the folder does not exist"
        elif isinstance(error, NotADirectoryError):
            why = "it is not a folder"
        raise UsageError(f"{path} is not an exported model: {why}; the export of a run is in RUN/export") from error
    if not isinstance(about, dict) or about.get("format") != EXPORT_FORMAT:
        raise UsageError(f"{path} is not an exported model; the export of a run is in RUN/export")
    if (version := about.get("version")) != EXPORT_VERSION:
        older = isinstance(version, int) and version < EXPORT_VERSION
        remedy = "use dogvae 0.1 for it, or train again" if older else "it needs a newer dogvae"
        raise UsageError(f"{path} has format version {version}, this dogvae reads {EXPORT_VERSION}: {remedy}")
    return about


def _config(settings: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**settings)
    except UsageError as error:
        raise ValueError(f"config.json: {error}") from error


def _device(device: str | torch.device | None) -> torch.device:
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device: {device} is not a device: use cpu or cuda") from error
    if target.type not in INFERENCE_BATCH or (target.type == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"--device: {device} is not available on this machine: leave it out, or use cpu")
    return target
