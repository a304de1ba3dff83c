"""Random numbers: one stream for each purpose, the same on every machine and with every number of workers."""

from __future__ import annotations

from enum import IntEnum, unique
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
"""Version of the streams, saved in each checkpoint. A run can resume only with the version that it began with."""


@unique
class Stream(IntEnum):
    """The purposes of random numbers. Comments give the key of each stream."""

    WEIGHTS = 1  # (seed)
    ORDER = 2  # (seed, epoch): order of the training images
    AUGMENTATION = 3  # (seed, epoch, step)
    POSTERIOR = 4  # (seed, epoch, step): posterior noise of a training step
    VALIDATION = 5  # (chunk): posterior noise of validation
    PREVIEW = 6  # (): the samples that TensorBoard shows
    PRIOR = 7  # (): held-out latents that choose how the prior is fitted
    SAMPLE = 9  # (seed, batch): noise of sampled latents
    IMPORTANCE = 11  # (image): samples of the importance-weighted bound
    EXAMPLE = 12  # (): pictures that an ONNX export is tested with
    LITTER = 13  # (seed, child): mask and posterior noise of a child of two dogs
    PATCHES = 14  # (place in a batch): order of a shuffled photo's patches
    FLOW = 15  # (chunk): noise and times in the validation of a flow prior


def words(n: int, stream: Stream, *key: int) -> np.ndarray:
    """`n` random integers from 0 to 2^64 - 1, uint64 (n,), which depend only on the stream and its key.

    They are raw Philox output: across versions NumPy keeps the output of bit generators, but not of distributions.
    """
    # A SeedSequence splits numbers into 32-bit words and pads them with zeros: (1, 0) would equal (1,), and (2**32,)
    # would equal (0, 1). Two words for each number after the stream's word make all keys distinct.
    entropy = [int(stream), *(half for number in key for half in (number & 0xFFFFFFFF, number >> 32))]
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n)


def seed(stream: Stream, *key: int) -> int:
    """A seed for a torch.Generator, from 0 to 2^63 - 1."""
    return int(words(1, stream, *key)[0] >> 1)


def normal(shape: tuple[int, ...], stream: Stream, *key: int) -> Tensor:
    """Standard normal float32 numbers of the given shape. Drawn on the CPU, so that every device gets the same."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed(stream, *key)))
