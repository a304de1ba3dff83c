"""Random numbers: the same in every version, and never the same for two purposes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dogvae import rng
from dogvae.rng import Stream

# Small numbers, which most keys consist of, and numbers of more than 32 bits, which NumPy splits.
NUMBERS = (0, 1, 2, 3, 5, 2**32 - 1, 2**32, 2**32 + 1, 2**53)


def test_words_are_pinned() -> None:
    """Runs are resumed with other versions of NumPy and of dogvae, so these numbers must never change."""
    assert rng.words(2, Stream.AUGMENTATION, 7, 3, 5).tolist() == [11556218749048083250, 10287870899406592045]
    assert rng.words(4, Stream.AUGMENTATION, 7, 3, 5)[:2].tolist() == [11556218749048083250, 10287870899406592045]


@pytest.mark.parametrize("arity", [0, 1, 2, 3])
def test_no_two_keys_and_no_two_streams_share_their_numbers(arity: int) -> None:
    """In 0.1, at seed 0, the first chunk of validation had the numbers that ordered epoch 3."""
    keys = list(itertools.product(Stream, itertools.product(NUMBERS, repeat=arity)))
    first = {int(rng.words(1, stream, *key)[0]) for stream, key in keys}
    assert len(first) == len(keys)


def test_streams_with_keys_of_zeros_of_any_length_differ() -> None:
    """NumPy pads seeds with zeros."""
    numbers = {stream: {int(rng.words(1, stream, *(0,) * n)[0]) for n in range(4)} for stream in Stream}
    for a, b in itertools.combinations(Stream, 2):
        assert not numbers[a] & numbers[b]


def test_words_are_uniform() -> None:
    uniform = rng.words(100_000, Stream.ORDER, 1, 2) / 2.0**64
    counts = np.bincount((uniform * 10).astype(int), minlength=10)
    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(10_000 * 0.9)


def test_normal_depends_on_the_stream_and_not_on_the_global_generator() -> None:
    torch.manual_seed(1)
    first = rng.normal((2, 3), Stream.VALIDATION, 4)
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(int(rng.words(1, Stream.VALIDATION, 4)[0] >> 1))
    assert torch.equal(first, torch.randn(2, 3, generator=generator))
    assert not torch.equal(first, rng.normal((2, 3), Stream.VALIDATION, 5))
