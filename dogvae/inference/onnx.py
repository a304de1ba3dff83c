"""An exported model as two ONNX files, for programs without PyTorch. Needs `pip install 'dogvae[onnx]'`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dogvae import rng
from dogvae.console import say
from dogvae.errors import RunFailed, UsageError
from dogvae.inference.model import load
from dogvae.network.vae import VAE
from dogvae.rng import Stream

OPSET = 18
TOLERANCE = 1e-3  # how far any output may be from torch's, times the largest output


class _Decoder(nn.Module):
    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.decode_mean(latents)


def export_onnx(folder: str | Path) -> None:
    """Add encoder.onnx and decoder.onnx to an export, the batch of any size.

    The encoder takes `pictures` (n, 3, h, h) float32 in [0, 1] and gives the posterior's `mean` and `logvar`, each
    (n, d, 4, 4); the decoder takes `latents` (n, d, 4, 4) and gives `pictures`. Raises UsageError if the packages are
    missing, and RunFailed, leaving no file behind, if the outputs are not torch's.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError("--onnx: needs more packages: pip install 'dogvae[onnx]'") from error
    if "://" in str(folder):
        raise UsageError(f"--onnx: {folder} is not on a disk of this machine; copy it to one first")
    playing = load(folder, "cpu")
    model = playing.model
    pictures = torch.rand(
        2, 3, playing.size, playing.size, generator=torch.Generator().manual_seed(rng.seed(Stream.EXAMPLE))
    )
    latents = torch.from_numpy(playing.sample_latents(2))
    made = {}
    try:
        for name, network, example, outputs in (
            ("encoder", model.encoder, pictures, ["mean", "logvar"]),
            ("decoder", _Decoder(model).eval(), latents, ["pictures"]),
        ):
            path = Path(folder) / f"{name}.onnx"
            made[path] = partial = path.with_name(f".{path.name}.partial")
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
            # Another batch than the example's: it must not have been taken for a constant.
            apart = _difference(network, partial, torch.cat([example, example.flip(0), example[:1]]))
            if not apart <= TOLERANCE:  # NaN is not either
                raise RunFailed(f"{path} would differ from torch by {apart:.2g} of its largest output")
            say(f"{path}: at most {apart:.1g} from torch")
        for path, partial in made.items():
            partial.replace(path)
    finally:
        for partial in made.values():
            partial.unlink(missing_ok=True)


@torch.inference_mode()
def _difference(network: nn.Module, path: Path, x: Tensor) -> float:
    """How far onnxruntime's outputs are from torch's, at most, relative to torch's largest."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    theirs: Sequence[np.ndarray] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    ours = network(x)
    pairs = zip(ours if isinstance(ours, tuple) else (ours,), theirs, strict=True)
    apart = [np.abs(a.numpy() - b).max() / max(np.abs(a.numpy()).max(), 1e-12) for a, b in pairs]
    return float(np.max(apart))
