"""Learning rate and KL weight over training, by hand calculation."""

from __future__ import annotations

import math

import pytest

from dogvae.training.schedule import beta_at, lr_at
from tests.support.steps import config_of


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            dict(lr_warmup=2.0, schedule="cosine"),
            {
                0.0: 0.1 * 0.01 / 2.01,  # not 0, which would waste the first step
                1.0: 0.1 * 1.01 / 2.01,
                2.0: 0.1,
                4.0: 0.1 * (0.01 + 0.99 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos 45 degrees
                6.0: 0.1 * (0.01 + 0.99 * 0.5),
                10.0: 0.001,
                12.0: 0.001,
            },
        ),
        (dict(lr_warmup=0.0), {0.0: 0.1, 3.5: 0.1, 10.0: 0.1}),
        (dict(lr_warmup=1.0), {0.5: 0.1 * 0.51 / 1.01, 1.0: 0.1, 9.9: 0.1}),
        (dict(lr_warmup=20.0, schedule="cosine"), {10.0: 0.1 * 10.01 / 20.01}),  # longer than the run
        (dict(lr_warmup=10.0, schedule="cosine"), {10.0: 0.1}),
    ],
)
def test_learning_rate(settings: dict[str, object], expected: dict[float, float]) -> None:
    config = config_of(lr=0.1, epochs=10, **settings)
    assert {epoch: lr_at(config, epoch) for epoch in expected} == pytest.approx(expected, rel=1e-12)


def test_beta_grows_linearly_during_its_warm_up() -> None:
    expected = {0.0: 0.0, 1.0: 0.75, 2.5: 1.875, 4.0: 3.0, 9.0: 3.0}
    config = config_of(beta=3.0, kl_warmup=4.0)
    assert {epoch: beta_at(config, epoch) for epoch in expected} == pytest.approx(expected)
    assert [beta_at(config_of(beta=3.0, kl_warmup=0.0), epoch) for epoch in (0.0, 7.0)] == [3.0, 3.0]
