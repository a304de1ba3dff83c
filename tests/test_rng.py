"""Random numbers: the same for ever, and never the same for two purposes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dogvae import rng
from dogvae.rng import Stream

# Small numbers, which keys are made of most often, and numbers of more than 32 bits, which NumPy splits.
NUMBERS = (0, 1, 2, 3, 5, 2**32 - 1, 2**32, 2**32 + 1, 2**53)


def test_streams_are_pinned() -> None:
    """Runs go on with other versions of NumPy and of us: these numbers must never change."""
    assert rng.words(2, Stream.AUGMENTATION, 7, 3, 5).tolist() == [11556218749048083250, 10287870899406592045]
    assert rng.words(4, Stream.AUGMENTATION, 7, 3, 5)[:2].tolist() == [11556218749048083250, 10287870899406592045]


@pytest.mark.parametrize("arity", [0, 1, 2, 3])
def test_no_two_keys_and_no_two_streams_share_their_numbers(arity: int) -> None:
    """At seed 0, validation's chunk 0 used to be drawn from the numbers that order epoch 3."""
    keys = list(itertools.product(Stream, itertools.product(NUMBERS, repeat=arity)))
    first = {int(rng.words(1, stream, *key)[0]) for stream, key in keys}
    assert len(first) == len(keys)


def test_no_stream_is_another_with_a_shorter_key() -> None:
    """NumPy pads what a stream begins with by zeros: the purposes have to differ whatever the length of their keys."""
    keys = [(stream, (0,) * arity) for stream in Stream for arity in range(4)]
    first = [int(rng.words(1, stream, *key)[0]) for stream, key in keys]
    of_one_stream = {stream: {f for (s, _), f in zip(keys, first, strict=True) if s == stream} for stream in Stream}
    for a, b in itertools.combinations(Stream, 2):
        assert not of_one_stream[a] & of_one_stream[b]


def test_numbers_are_even_over_all_words() -> None:
    uniform = rng.words(100_000, Stream.ORDER, 1, 2) / 2.0**64
    counts = np.bincount((uniform * 10).astype(int), minlength=10)
    assert np.abs(counts - 10_000).max() < 5 * np.sqrt(10_000 * 0.9)


def test_normal_is_drawn_from_the_stream_alone() -> None:
    torch.manual_seed(1)
    first = rng.normal((2, 3), Stream.VALIDATION, 4)
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(int(rng.words(1, Stream.VALIDATION, 4)[0] >> 1))
    assert torch.equal(first, torch.randn(2, 3, generator=generator))
    assert not torch.equal(first, rng.normal((2, 3), Stream.VALIDATION, 5))
