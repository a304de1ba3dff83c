"""Random numbers: each purpose has a stream of its own, the same on every machine and at every number of workers."""

from __future__ import annotations

from enum import IntEnum, unique
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
"""Of the streams. A run goes on only with the streams it began with: a checkpoint says which those are."""


@unique
class Stream(IntEnum):
    """What random numbers are for, and the key that each purpose draws by."""

    WEIGHTS = 1  # (seed)
    ORDER = 2  # (seed, epoch): of the training images
    AUGMENTATION = 3  # (seed, epoch, step)
    POSTERIOR = 4  # (seed, epoch, step): the noise of a training step
    VALIDATION = 5  # (chunk): the posterior's noise
    PREVIEW = 6  # (): the samples that TensorBoard shows
    PRIOR = 7  # (): the held-out latents that decide how a prior is fitted
    CLUSTERS = 8  # (): where the prior's components begin
    SAMPLE = 9  # (seed, batch): the noise of a sampled latent
    COMPONENT = 10  # (seed, batch): the prior's component that a sampled latent comes from
    IMPORTANCE = 11  # (image): the draws of the importance-weighted bound
    EXAMPLE = 12  # (): the pictures that an ONNX export is tried with


def words(n: int, stream: Stream, *key: int) -> np.ndarray:
    """`n` random uint64 words, which depend only on the stream and its key: numbers from 0 to 2^64 - 1.

    The words are raw Philox output. NumPy keeps the output of bit generators over versions, not that of distributions.
    """
    # A SeedSequence reads its numbers as 32-bit words and pads them with zeros, so that (1, 0) would be (1,), and
    # (2**32,) would be (0, 1). Two words for each number, behind the stream's, leave no two keys alike.
    entropy = [int(stream), *(half for number in key for half in (number & 0xFFFFFFFF, number >> 32))]
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)


def seed(stream: Stream, *key: int) -> int:
    """A seed for a torch.Generator, from 0 to 2^63 - 1."""
    return int(words(1, stream, *key)[0] >> 1)


def normal(shape: tuple[int, ...], stream: Stream, *key: int) -> Tensor:
    """Standard normal numbers, float32. They are drawn on the CPU, so that every device gets the same."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed(stream, *key)))
