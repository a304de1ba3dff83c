"""What the judge says of a model: which share of its pictures shows a dog, and how they compare with photos."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dogvae import rng
from dogvae.data.dataset import Dataset
from dogvae.inference.features import Kinds, Report, collect, distances, memorisation
from dogvae.inference.judge import REMEDY, Judge
from dogvae.inference.model import DogVAE
from dogvae.inference.priors import DENSITIES, FLOW
from dogvae.pictures import to_uint8
from dogvae.rng import Stream

ASKED = 256  # pictures of each kind that are enlarged to 224 pixels, which takes most of the time
TRAINING = 16_384  # training photos, the first of the dataset, among which the nearest to each sample is looked for
GRID = 4  # patches in a row and in a column of a shuffled photo


def verdict(model: DogVAE, dataset: Dataset, kinds: Kinds, most: int, report: Report) -> dict[str, Any]:
    """The judge's figures, from as many pictures of each kind: `most`, or as many as the smaller split has.

    `kinds` are "validation", "training" and the samples of each prior. Returns

    - `dog_share`: the share of at most 256 pictures that are called a dog with a probability above 1/2. The share of
      "shuffled" validation photos is the floor below which a share means nothing.
    - `frechet_judge`: Frechet distances from the validation photos; that of "training" is what a perfect model reaches.
    - `memorisation`: the term of MiFID for samples of the default prior, and for validation photos.
    - `without_judge`: None, or, if the judge is not installed, why all others are None.
    """
    try:
        judge = Judge(model.device)
    except ImportError:
        return {"dog_share": None, "frechet_judge": None, "memorisation": None, "without_judge": REMEDY}
    photos, training = ({kind: kinds[kind]} for kind in ("validation", "training"))
    made: Kinds = {"reconstructions": lambda n: (_reconstructed(model, x) for x in kinds["validation"](n))}
    made |= {prior: kinds[prior] for prior in model.priors}
    patchwork: Kinds = {"shuffled": lambda n: map(shuffled, kinds["validation"](n))}
    n = min(most, len(dataset.val), len(dataset.train))
    probability = collect(photos | patchwork | made, min(n, ASKED), judge.dog, "judge at 224 pixels", report)
    features = collect(photos | made, n, judge.features, "judge at 128 pixels", report)
    m = min(len(dataset.train), TRAINING)
    (seen,) = collect(training, m, judge.features, "judge at 128 pixels", report).values()
    return {
        "dog_share": {kind: float((p > 0.5).double().mean()) for kind, p in probability.items()},
        "frechet_judge": distances({"validation": features["validation"], "training": seen[:n], **features}),
        "memorisation": {kind: memorisation(features[kind], seen) for kind in ("validation", model.priors[0])},
        "without_judge": None,
    }


def shuffled(x_bchw: Tensor) -> Tensor:
    """Images cut into a 4x4 grid of patches, in random order: a dog's colours and textures without its shape."""
    b, side = len(x_bchw), x_bchw.shape[-1] // GRID
    patches = x_bchw.unflatten(3, (GRID, side)).unflatten(2, (GRID, side)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = np.stack([np.argsort(rng.words(GRID**2, Stream.PATCHES, i)) for i in range(b)])
    patches = patches[torch.arange(b)[:, None], torch.from_numpy(order)]
    return patches.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 4, 2, 5).reshape(x_bchw.shape)


def rounded(x_bchw: Tensor) -> Tensor:
    """Images in [0, 1], on any device, as a picture file of 8 bits holds them, on the CPU."""
    return torch.from_numpy(to_uint8(x_bchw)).float() / 255


def judge_rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The judge's figures as rows (name, value) of the table."""
    name = {prior: f"samples, {prior}" for prior in (FLOW, *DENSITIES)} | {"shuffled": "validation, patches shuffled"}
    for kind, share in (figures["dog_share"] or {}).items():
        yield f"called a dog: {name.get(kind, kind)}", f"{share:.1%}"
    for kind, distance in (figures["frechet_judge"] or {}).items():
        yield f"Frechet distance, judge: {name.get(kind, kind)}", f"{distance:,.1f}"
    for kind, distance in (figures["memorisation"] or {}).items():
        yield f"nearest training photo: {name.get(kind, kind)}", f"{distance:.3f}"


def _reconstructed(model: DogVAE, x: Tensor) -> Tensor:
    return rounded(model.model.decode_mean(model.model.encoder(x.to(model.device))[0]))
