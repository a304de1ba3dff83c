"""`dogvae.load`: reads an export folder, checks every file in it, and returns the model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dogvae.config import FlowConfig, ModelConfig
from dogvae.errors import UsageError
from dogvae.inference.model import INFERENCE_BATCH, DogVAE
from dogvae.json_text import parse
from dogvae.network.flow import Flow
from dogvae.network.vae import VAE
from dogvae.storage import Storage, did_you_mean_folder

EXPORT_FORMAT, EXPORT_VERSION = "dogvae-export", 3
EXPORT = "export"  # the folder of an export in that of its run
FLOW_FILE = "flow.safetensors"  # of exports with a flow prior

FILLING = ("constant_", "fill_", "kaiming_uniform_", "normal_", "uniform_", "zero_")  # how torch initialises tensors

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)


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
            try:
                tensors[name] = safetensors.torch.load(content)
            except SafetensorError as error:
                raise ValueError(f"{name}: {error}") from error
        config = _settings(ModelConfig, about["model"], "model")
        model = _network(lambda: VAE(config), "model.safetensors", tensors)
        _check_tensors("prior.safetensors", tensors["prior.safetensors"], _prior_tensors(model, tensors))
        flow = None
        if FLOW_FILE in tensors:
            flow_config = _settings(FlowConfig, about["flow"]["settings"], "flow")
            flow = _network(lambda: Flow(flow_config, model.latent_shape), FLOW_FILE, tensors)
        return DogVAE(model, target, about, tensors["prior.safetensors"], flow)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} is damaged: {error}; export the run again") from error
    except KeyError as error:
        raise UsageError(f"{path} is damaged: config.json has no {error}; export the run again") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error}; export the run again") from error


def export_of(path: str | Path) -> str | Path:
    """`path`, or the export in it if `path` is the folder of a run or of a search with an export."""
    inside = Storage(path) / EXPORT
    return inside.local or inside.uri if inside.exists("config.json") else path


def read_about(path: str | Path) -> dict[str, Any]:
    """The config.json of an export, of this format and version. Raises UsageError as `load`."""
    folder = Storage(path)
    try:
        about = parse(folder.read("config.json"))
    except (OSError, ValueError) as error:
        why = "it has no config.json" if isinstance(error, FileNotFoundError) else str(error)
        if not folder.exists(""):
            why = "the folder does not exist"
        elif isinstance(error, NotADirectoryError):
            why = "it is not a folder"
        known = f"the export of a run is in RUN/export{did_you_mean_folder(path)}"
        raise UsageError(f"{path} is not an exported model: {why}; {known}") from error
    if not isinstance(about, dict) or about.get("format") != EXPORT_FORMAT:
        raise UsageError(f"{path} is not an exported model; the export of a run is in RUN/export")
    if (version := about.get("version")) != EXPORT_VERSION:
        if not isinstance(version, int):
            raise UsageError(f"{path} is damaged: config.json: version is {version!r}; export the run again")
        older = version < EXPORT_VERSION
        remedy = "use dogvae 0.1 for it, or train again" if older else "it needs a newer dogvae"
        raise UsageError(f"{path} has format version {version}, this dogvae reads {EXPORT_VERSION}: {remedy}")
    return about


def _settings(kind: type[T], settings: dict[str, Any], field: str) -> T:
    try:
        return kind(**settings)
    except (TypeError, UsageError) as error:
        raise ValueError(f"config.json: {field}: {error}") from error


def _network(make: Callable[[], Network], name: str, tensors: dict[str, dict[str, Tensor]]) -> Network:
    """The network that `make` returns, with the tensors of the file `name`, which must be its own."""
    with Uninitialised():
        network = make()
    _check_tensors(name, tensors[name], network.state_dict())
    network.load_state_dict(tensors[name])
    return network


class Uninitialised(TorchFunctionMode):
    """New parameters get no values. So a config.json of a huge network takes no memory before it is refused."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in FILLING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _prior_tensors(model: VAE, tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What prior.safetensors holds: a Gaussian, two parents, and any number of principal directions."""
    dims = math.prod(model.latent_shape)
    count = tensors["prior.safetensors"].get("scales", torch.empty(0)).numel()
    shapes = {"gaussian.mean": (dims,), "gaussian.factor": (dims, dims), "parents": (2, dims)}
    shapes |= {"directions": (count, dims), "scales": (count,)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _check_tensors(file: str, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError unless the tensors have the names, types and shapes of `expected`, and finite numbers."""
    for name in sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{file}: the tensor {name} is missing")
    for name in sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{file}: the tensor {name!r} belongs to another model")
    for name, tensor in tensors.items():
        has, needs = (f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (tensor, expected[name]))
        if has != needs:
            raise ValueError(f"{file}: the tensor {name} is {has}, and this model's {needs}")
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: the tensor {name} holds numbers that are not finite")


def _device(device: str | torch.device | None) -> torch.device:
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device: {device} is not a device: use cpu or cuda") from error
    if target.type not in INFERENCE_BATCH or (target.type == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"--device: {device} is not available on this machine: leave it out, or use cpu")
    return target
