"""Exports a model as two ONNX files, for programs without PyTorch. Needs `pip install 'dogvae[onnx]'`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dogvae import rng
from dogvae.console import say
from dogvae.errors import RunFailed, UsageError
from dogvae.inference.load import load
from dogvae.network.vae import VAE
from dogvae.rng import Stream

OPSET = 18
TOLERANCE = 1e-3  # largest difference from PyTorch's outputs, as a share of the largest output


class _Decoder(nn.Module):
    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.decode_mean(latents)


def export_onnx(folder: str | Path) -> None:
    """Add encoder.onnx and decoder.onnx to an export folder. Both take a batch of any size n.

    The encoder maps `pictures` (n, 3, h, h) float32 in [0, 1] to the posterior's `mean` and `logvar`, each
    (n, d, s, s). The decoder maps `latents` (n, d, s, s) to `pictures`. Raises UsageError if the packages are missing
    or the folder is not on a disk, and RunFailed if the outputs differ from PyTorch's. Then no file is added.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError("--onnx needs other packages: pip install 'dogvae[onnx]'") from error
    if "://" in str(folder):
        raise UsageError(f"--onnx: {folder} is not on a disk of this machine; copy it to a local folder first")
    loaded = load(folder, "cpu")
    model = loaded.model
    pictures = torch.rand(
        2, 3, loaded.size, loaded.size, generator=torch.Generator().manual_seed(rng.seed(Stream.EXAMPLE))
    )
    latents = torch.from_numpy(loaded.sample_latents(2))
    partials = {}
    try:
        for name, network, example, outputs in (
            ("encoder", model.encoder, pictures, ["mean", "logvar"]),
            ("decoder", _Decoder(model).eval(), latents, ["pictures"]),
        ):
            path = Path(folder) / f"{name}.onnx"
            partials[path] = partial = path.with_name(f".{path.name}.partial")
            torch.onnx.export(
                network,
                (example,),
                str(partial),
                input_names=["pictures" if name == "encoder" else "latents"],
                output_names=outputs,
                dynamic_shapes=({0: "n"},),
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                verbose=False,
            )
            # A batch size other than the example's shows whether the exporter took that one for a constant.
            difference = _difference(network, partial, torch.cat([example, example.flip(0), example[:1]]))
            if not difference <= TOLERANCE:  # also if it is NaN
                raise RunFailed(f"{path} would differ from PyTorch by {difference:.2g} of its largest output")
            say(f"{path}: differs from PyTorch by at most {difference:.1g} of its largest output")
        for path, partial in partials.items():
            partial.replace(path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


@torch.inference_mode()
def _difference(network: nn.Module, path: Path, x: Tensor) -> float:
    """The largest difference between onnxruntime's and PyTorch's outputs, relative to the largest output of PyTorch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    actual: Sequence[np.ndarray] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = network(x)
    pairs = zip(expected if isinstance(expected, tuple) else (expected,), actual, strict=True)
    return float(np.max([np.abs(a.numpy() - b).max() / max(np.abs(a.numpy()).max(), 1e-12) for a, b in pairs]))
