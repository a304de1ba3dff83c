"""Statistics of a network's features of pictures: Frechet distances, and the distance to the nearest training photo."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Report = Callable[[str, int, int], None]  # progress: (text, done, total)
Kinds = dict[str, Callable[[int], Iterator[Tensor]]]  # at most n pictures of a kind: batches (b, 3, h, h) in [0, 1]
ROWS = 256  # pictures compared with all training photos at a time


@torch.inference_mode()
def collect(kinds: Kinds, n: int, network: Callable[[Tensor], Tensor], text: str, report: Report) -> dict[str, Tensor]:
    """What `network` returns for at most `n` pictures of each kind, (n, d) or (n,) float32 on the CPU."""
    features = {}
    for kind, pictures in kinds.items():
        parts: list[Tensor] = []
        for x in pictures(n):
            parts.append(network(x).float().cpu())
            report(f"{text}, {kind}: image", sum(map(len, parts)), n)
        features[kind] = torch.cat(parts)
    return features


def distances(features: dict[str, Tensor]) -> dict[str, float]:
    """Frechet distances between the features (n, d) of the first kind of pictures and those of each other kind."""
    first, *others = features
    return {kind: frechet(features[first], features[kind]) for kind in others}


def frechet(a_nd: Tensor, b_md: Tensor) -> float:
    """Frechet distance of two Gaussians that have the moments of two sets of features (Heusel et al. 2017, eq. 6).

    Covariances are unbiased, as in published distances. That of a single point is 0.
    """
    a, b = a_nd.double(), b_md.double()
    cov_a, cov_b = (torch.cov(x.T, correction=min(1, len(x) - 1)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric.
    both = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * both)


def memorisation(a_nd: Tensor, training_md: Tensor) -> float:
    """Mean over pictures of the smallest cosine distance to a training photo, by features; 0 for copies, at most 1.

    This is the memorisation term s of MiFID (Bai et al. 2021). MiFID multiplies the Frechet distance by 1 / s if s is
    below a threshold, and by 1 if it is not. Here s stands alone, beside that of photos which no training saw.
    """
    training = F.normalize(training_md.double())
    nearest = [(F.normalize(part.double()) @ training.T).abs().amax(dim=1) for part in a_nd.split(ROWS)]
    return float(1 - torch.cat(nearest).clamp_max(1).mean())  # rounding may exceed 1
