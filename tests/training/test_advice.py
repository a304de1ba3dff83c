"""The advice at the end of a run: records and runs that deserve each one, and those that do not."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dogvae.config import Config
from dogvae.storage import Storage
from dogvae.training.advice import advice, advice_of, overfits_since
from dogvae.training.export import export
from dogvae.training.run_folder import open_run
from tests.support.exports import Exported
from tests.support.runs import drawn_dogs, job, train

DOGS = np.stack(drawn_dogs(8)).transpose(0, 2, 3, 1)
CONFIG = Config.make(epochs=40)  # of 512 latents


def records(explained: list[float], train: list[float] | None = None, active: int = 512) -> list[dict[str, Any]]:
    """Epochs whose loss falls as more is explained."""
    losses = train or [-value for value in explained]
    return [
        {"epoch": i, "val_loss": -value, "val_explained": value, "train_loss": loss, "val_active_latents": active}
        for i, (value, loss) in enumerate(zip(explained, losses, strict=True))
    ]


def grey(share: float) -> np.ndarray:
    """The dogs with `share` of their colour replaced by grey."""
    return ((1 - share) * DOGS + share * DOGS.mean(axis=-1, keepdims=True)).round().astype(np.uint8)


def clipped(share: float) -> np.ndarray:
    """The dogs with that share of additional values at 0 or 255."""
    values, free = DOGS.copy(), (DOGS > 0) & (DOGS < 255)
    chosen = np.flatnonzero(free)[: round(share * DOGS.size)]
    values.reshape(-1)[chosen] = 255 * (np.arange(len(chosen)) % 2)
    return values


FLAT = [0.1, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]  # neither improving nor overfitting


@pytest.mark.parametrize(
    ("words", "deserves", "does_not"),
    [
        ("still improving.*--epochs 80", {"explained": [0.2, 0.4, 0.6, 0.8]}, {"explained": [0.5, 0.8, 0.9, 0.9]}),
        ("overfitted since epoch 3", {"explained": [0.5, 0.8, 0.9, 0.85, 0.8, 0.8], "train": [6, 5, 4, 3, 2, 1]}, {}),
        ("179 training photos are few.*200", {"n_photos": 179}, {"n_photos": 200}),
        ("lost their colours", {"made": grey(0.7)}, {"made": grey(0.3)}),
        ("fully black or white: lower --lr", {"made": clipped(0.15)}, {"made": clipped(0.05)}),
        (r"almost nothing.*\(9 of 512 vary\).*--beta", {"active": 9}, {"active": 11}),
        ("finite loss: lower --lr", {"explained": [math.nan] * 4}, {}),
    ],
)
def test_advice_is_given_when_it_is_due_only(words: str, deserves: dict[str, Any], does_not: dict[str, Any]) -> None:
    def given(n_photos: int = 2000, made: Any = DOGS, explained: Any = FLAT, **of_records: Any) -> str | None:
        return advice(CONFIG, records(explained, **of_records), n_photos, DOGS, made)

    line = given(**deserves)
    assert line is not None
    assert re.search(words, line), line
    assert given(**does_not) is None


@pytest.mark.parametrize(
    ("explained", "train", "since"),
    [
        ([0.5, 0.9, 0.85, 0.8], [4, 3, 2, 1], 2),
        ([0.5, 0.9, 0.898, 0.898], [4, 3, 2, 1], None),  # 2% more is unexplained
        ([0.5, 0.9, 0.85, 0.8], [4, 3, 4, 5], None),  # training got worse, too: it diverged
        ([0.5, 0.8, 0.9, 0.85], [4, 3, 2, 1], None),  # the best epoch is among the last quarter
        ([0.9, 0.8, 0.7], [4, 3, 2], None),  # too few epochs to say
        ([0.9, math.nan, 0.7, math.nan], [4, 3, 2, 1], None),
    ],
)
def test_overfitting_needs_worse_validation_and_better_training(
    explained: list[float], train: list[float], since: int | None
) -> None:
    assert overfits_since(records(explained, train)) == since


def test_run_that_ended_too_early_and_run_whose_latents_collapsed(exported: Exported, tmp_path: Path) -> None:
    line = advice_of(*open_run(str(exported.run)))
    assert line is not None
    assert line == "the pictures have lost their colours: train longer, such as --epochs 8"
    config, run = job(exported.dataset, epochs=2, beta=1e5, kl_warmup=0.0), Storage(tmp_path / "run")
    train(config, run)
    export(run, config)
    line = advice_of(run, config)
    assert line is not None
    assert line.startswith("the latents say almost nothing about a photo (0 of 64 vary)")
