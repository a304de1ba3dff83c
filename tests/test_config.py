"""Settings: what they accept, what they refuse and with which message, and reading them from JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dogvae.config import REMOVED, Config, ModelConfig
from dogvae.errors import UsageError
from tests.support.settings import SETTINGS, flag_of

WRONG_TYPES: dict[type, list[Any]] = {
    str: [None, 3, 1.5, True, ["default"], {}],
    int: [None, "64", 64.0, True, False, [64]],
    float: [None, "0.1", True, False, [0.1]],
    bool: [None, 0, 1, "yes", 1.0],
}
MODEL_NAMES = {"architecture", "image_size", "width", "latent_dim", "latent_size", "likelihood"}
VALUES = {name: st.sampled_from(good) for name, (_, good, _) in SETTINGS.items()} | {
    "data": st.text(max_size=20),
    "lr": st.floats(0, 1, exclude_min=True),
    "beta": st.floats(0, allow_infinity=False),
    "epochs": st.integers(1),
}


def test_table_covers_every_setting() -> None:
    assert set(SETTINGS) == set(Config().flat())
    assert set(Config().to_dict()["model"]) == MODEL_NAMES
    nested = Config().to_dict()
    assert Config().flat() == {**nested["model"], **{k: v for k, v in nested.items() if k not in ("model", "flow")}}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, (_, good, _) in SETTINGS.items() for v in good])
def test_valid_value_is_kept(name: str, value: Any) -> None:
    config = Config.make(**{name: value})
    assert config.flat()[name] == value
    assert type(config.flat()[name]) is SETTINGS[name][0]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, v) for name, (kind, _, bad) in SETTINGS.items() for v in [*bad, *WRONG_TYPES[kind]]]
    + [(name, v) for name, (kind, _, _) in SETTINGS.items() if kind is float for v in (math.nan, math.inf, -math.inf)],
)
def test_invalid_value_is_refused_with_a_line_that_names_the_flag(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{flag_of(name)}: [^\n]+\Z"):
        Config.make(**{name: value})
    with pytest.raises(UsageError):  # the dataclasses check, too
        ModelConfig(**{name: value}) if name in MODEL_NAMES else Config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 0.0, "0.0 is too small, it must be above 0"),
        ("epochs", -1, "-1 is too small, it must be at least 0"),
        ("latent_dim", 1025, "1025 is too large, it must be at most 1024"),
        ("latent_size", 5, "5 is none of 4, 8, 16"),
        ("samples", 2.0, "2.0 is not an integer"),
        ("lr", "fast", "'fast' is not a number"),
        ("beta", math.nan, "nan is not a finite number"),
    ],
)
def test_message_says_what_is_allowed(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag_of(name)}: {re.escape(message)}$"):
        Config.make(**{name: value})


def test_integer_for_a_float_is_converted() -> None:
    beta = Config.make(beta=2).beta
    assert (beta, type(beta)) == (2.0, float)


@pytest.mark.parametrize("name", ["learning_rate", "latentdim", "model", "", *REMOVED])
def test_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match=f"called {name};.* latent_dim"):
        Config.make(**{name: 1})


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().lr = 0.1  # type: ignore[misc]


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES), st.fixed_dictionaries({}, optional=VALUES))
def test_json_round_trip_and_replace_keep_all_other_settings(values: dict[str, Any], changes: dict[str, Any]) -> None:
    config = Config.make(**values)
    before = config.flat()
    assert {name: before[name] for name in values} == values
    assert Config.from_json(json.dumps(config.to_dict()), "config.json") == config
    assert config.replace(**changes).flat() == {**before, **changes}
    assert config.flat() == before


def test_json_of_an_earlier_version_with_removed_settings_is_read() -> None:
    old = {**Config().to_dict(), "compile": "auto", "gradient_compression": "none"}
    assert Config.from_json(json.dumps(old), "config.json") == Config.make_nested(old) == Config()


def of_0_1(**model: Any) -> str:
    """The JSON of a run of version 0.1 with the notebook's network, and these changes to it."""
    nested = Config.make(preset="notebook").to_dict()
    del nested["model"]["latent_size"]
    return json.dumps({**nested, "model": {**nested["model"], "norm": "batch", **model}, "compile": "auto"})


def test_json_of_version_0_1_with_the_notebooks_network_is_read() -> None:
    assert Config.from_json(of_0_1(), "config.json") == Config.make(preset="notebook")


@pytest.mark.parametrize("other", [{"architecture": "default"}, {"norm": "group"}, {"likelihood": "gaussian"}])
def test_json_of_version_0_1_with_another_network_is_refused_in_one_line(other: dict[str, str]) -> None:
    with pytest.raises(
        UsageError, match=r"^config\.json: its network is of dogvae 0\.1: use that version for it, or train again$"
    ):
        Config.from_json(of_0_1(**other), "config.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"x"',
        "{}",
        '{"model": 3}',
        '{"model": [1]}',
        '{"model": {"latent_size": 4, "epochs": 3}, "epochs": 3}',
    ],
)
def test_other_json_is_refused_with_the_name_of_the_file(text: str) -> None:
    with pytest.raises(UsageError, match=r"^runs/a/config\.json is not the configuration of a run: "):
        Config.from_json(text, "runs/a/config.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "1" + 400 * "0"])
def test_json_with_a_number_that_is_not_finite_is_refused(number: str) -> None:
    text = json.dumps(Config().to_dict()).replace('"beta": 1.0', f'"beta": {number}')
    with pytest.raises(UsageError, match="--beta"):
        Config.from_json(text, "config.json")


def test_presets_are_defaults_and_the_notebooks_are_those_of_the_notebook() -> None:
    assert Config.make() == Config()
    config = Config.make(preset="notebook")
    assert (config.samples, config.lr, config.batch_size, config.epochs) == (10, 0.001, 32, 50)
    assert (config.schedule, config.lr_warmup, config.ema, config.grad_clip) == ("constant", 0.0, 0.0, 0.0)
    assert (config.beta, config.kl_warmup, config.loss_scale, config.augment) == (1.0, 0.0, "notebook", True)
    assert config.model == ModelConfig("notebook", 64, 64, 32, 4, "bernoulli")
    assert Config.make(preset="notebook", samples=3).samples == 3
    small = Config.make(preset="small")
    assert (small.model.width, small.batch_size, small.epochs) == (24, 16, 0)


@pytest.mark.parametrize(("images", "batch"), [(1, 16), (639, 16), (1280, 32), (2560, 64), (7000, 64), (10**7, 64)])
def test_batch_size_is_a_power_of_two_for_about_40_steps_an_epoch(images: int, batch: int) -> None:
    chosen = Config.make(latent_dim=8, batch_size=0).for_data("dogs", "ab12", 32, images)
    assert chosen == Config.make(latent_dim=8, batch_size=batch, data="dogs", fingerprint="ab12", image_size=32)
    assert Config.make(batch_size=7).for_data("dogs", "ab12", 32, images).batch_size == 7


@pytest.mark.parametrize(("images", "epochs"), [(300, 167), (7000, 7), (10**5, 4)])
def test_epochs_of_0_show_the_network_50000_images_in_at_least_4_epochs(images: int, epochs: int) -> None:
    assert Config.make(epochs=0).for_data("dogs", "ab12", 32, images).epochs == epochs
    assert Config.make(epochs=7).for_data("dogs", "ab12", 32, images).epochs == 7
