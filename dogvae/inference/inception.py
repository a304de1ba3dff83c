"""The Inception network of the published Frechet distances (FID)."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dogvae.errors import UsageError

REMEDY = "FID as it is published needs another package: pip install 'dogvae[fid]'"
TIMEOUT_S = 10.0  # of the download, when nothing comes


def load_inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from images (b, 3, h, h) in [0, 1] to the features (b, 2048) of FID (Heusel et al. 2017).

    The network and its way of enlarging images are those of torch-fidelity, which gives the values of the original
    code. The weights are downloaded once. Raises UsageError if the package or the weights are not to be had.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise UsageError(REMEDY) from error

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        # torch-fidelity, which then finds the file, would run code in it. With weights_only torch refuses such a file.
        torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, progress=False, weights_only=True)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UsageError(f"the Inception network's weights could not be downloaded: {reason}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        path = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
        raise UsageError(f"{path} does not hold the Inception network's weights: delete it, and try again") from error
    finally:
        socket.setdefaulttimeout(before)

    def features(x: Tensor) -> Tensor:
        return network((x.to(device) * 255).round().to(torch.uint8))[0]

    return features
