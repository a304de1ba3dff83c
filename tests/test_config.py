"""Settings: what they accept, what they refuse and in which words, and that every one of them can be typed."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dogvae.commands import flags
from dogvae.config import Config, ModelConfig, Safety
from dogvae.errors import RunFailed, UsageError

# What each setting may be, written down a second time: (type, valid values at the edges, values out of range).
TABLE: dict[str, tuple[type, list[Any], list[Any]]] = {
    "architecture": (str, ["default", "notebook"], ["resnet", "", "Default"]),
    "image_size": (int, [32, 64, 128], [0, 63, 256, -64]),
    "width": (int, [4, 64, 512], [3, 0, -64, 513]),
    "latent_dim": (int, [1, 32, 1024], [0, -1, 1025]),
    "norm": (str, ["group", "batch"], ["layer", "none"]),
    "likelihood": (str, ["bernoulli", "continuous-bernoulli", "gaussian"], ["poisson", "continuous_bernoulli"]),
    "data": (str, ["", "s3://bucket/dogs"], []),
    "fingerprint": (str, ["", "ab12"], []),
    "preset": (str, ["default", "notebook", "small"], ["large", ""]),
    "epochs": (int, [1, 10**6], [0, -5]),
    "batch_size": (int, [0, 1, 4096], [-1, -32]),
    "lr": (float, [1e-8, 2e-3, 1.0], [0.0, -1e-3, 1.001]),
    "schedule": (str, ["cosine", "constant"], ["linear"]),
    "lr_warmup": (float, [0.0, 2.5], [-0.1]),
    "samples": (int, [1, 1000], [0, 1001]),
    "beta": (float, [0.0, 4.0], [-1e-9]),
    "kl_warmup": (float, [0.0, 10.0], [-1.0]),
    "grad_clip": (float, [0.0, 5.0], [-0.5]),
    "ema": (float, [0.0, 0.995, 0.999999], [-0.1, 0.9999999, 1.0]),
    "augment": (bool, [True, False], []),
    "loss_scale": (str, ["image", "notebook"], ["pixel"]),
    "precision": (str, ["auto", "bf16", "fp32"], ["fp16"]),
    "compile": (str, ["auto", "on", "off"], ["yes", ""]),
    "gradient_compression": (str, ["none", "bf16"], ["fp16", "auto"]),
    "seed": (int, [0, 2**32 - 1], [-1, 2**32]),
}
WRONG_TYPES: dict[type, list[Any]] = {
    str: [None, 3, 1.5, True, ["default"], {}],
    int: [None, "64", 64.0, True, False, [64]],
    float: [None, "0.1", True, False, [0.1]],
    bool: [None, 0, 1, "yes", 1.0],
}
MODEL_NAMES = {"architecture", "image_size", "width", "latent_dim", "norm", "likelihood"}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def words_of(error: pytest.ExceptionInfo[UsageError]) -> list[str]:
    """The message, which must be one line, in words, so that `--lr` is not found within `--lr-warmup`."""
    assert "\n" not in str(error.value)
    return re.findall(r"--[a-z-]+|[^\s:,;]+", str(error.value))


def test_table_covers_every_setting() -> None:
    assert set(TABLE) == set(Config().flat())
    assert set(Config().to_dict()["model"]) == MODEL_NAMES


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, (_, good, _) in TABLE.items() for v in good])
def test_valid_value_is_kept(name: str, value: Any) -> None:
    config = Config.make(**{name: value})
    assert config.flat()[name] == value
    assert type(config.flat()[name]) is TABLE[name][0]


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, v) for name, (kind, _, bad) in TABLE.items() for v in [*bad, *WRONG_TYPES[kind]]]
    + [(name, v) for name, (kind, _, _) in TABLE.items() if kind is float for v in (math.nan, math.inf, -math.inf)],
)
def test_invalid_value_is_refused_by_flag(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as error:
        Config.make(**{name: value})
    assert flag_of(name) in words_of(error)
    with pytest.raises(UsageError):  # the dataclasses themselves let nothing through either
        ModelConfig(**{name: value}) if name in MODEL_NAMES else Config(**{name: value})


def test_huge_integer_for_a_float_is_refused() -> None:
    with pytest.raises(UsageError, match="--beta"):
        Config.from_json(json.dumps(Config().to_dict()).replace('"beta": 1.0', '"beta": 1' + 400 * "0"), "x")


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("lr", 0.0, "above 0"),
        ("epochs", 0, "at least 1"),
        ("latent_dim", 1025, "at most 1024"),
        ("norm", "layer", "group, batch"),
        ("samples", 2.0, "int"),
    ],
)
def test_message_tells_what_is_allowed(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy) as error:
        Config.make(**{name: value})
    assert str(value) in str(error.value)


def test_whole_number_for_a_float_becomes_one() -> None:
    beta = Config.make(beta=2).beta
    assert beta == 2.0
    assert type(beta) is float


@pytest.mark.parametrize("name", ["learning_rate", "latentdim", "model", ""])
def test_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as error:
        Config.make(**{name: 1})
    assert f"called {name};" in str(error.value)
    assert "latent_dim" in str(error.value)  # the remedy: the names there are


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().lr = 0.1  # type: ignore[misc]


VALID = {
    "architecture": st.sampled_from(["default", "notebook"]),
    "image_size": st.sampled_from([32, 64, 128]),
    "width": st.integers(4, 512),
    "latent_dim": st.integers(1, 1024),
    "norm": st.sampled_from(["group", "batch"]),
    "likelihood": st.sampled_from(["bernoulli", "continuous-bernoulli", "gaussian"]),
    "data": st.text(max_size=20),
    "fingerprint": st.text("0123456789abcdef", max_size=64),
    "preset": st.sampled_from(["default", "notebook", "small"]),
    "epochs": st.integers(1),
    "batch_size": st.integers(0),
    "lr": st.floats(0, 1, exclude_min=True),
    "schedule": st.sampled_from(["cosine", "constant"]),
    "lr_warmup": st.floats(0, allow_infinity=False),
    "samples": st.integers(1, 1000),
    "beta": st.floats(0, allow_infinity=False),
    "kl_warmup": st.floats(0, allow_infinity=False),
    "grad_clip": st.floats(0, allow_infinity=False),
    "ema": st.floats(0, 0.999999),
    "augment": st.booleans(),
    "loss_scale": st.sampled_from(["image", "notebook"]),
    "precision": st.sampled_from(["auto", "bf16", "fp32"]),
    "compile": st.sampled_from(["auto", "on", "off"]),
    "gradient_compression": st.sampled_from(["none", "bf16"]),
    "seed": st.integers(0, 2**32 - 1),
}


@settings(max_examples=100, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALID))
def test_json_round_trip(values: dict[str, Any]) -> None:
    config = Config.make(**values)
    flat = config.flat()
    assert {name: flat[name] for name in values} == values
    text = json.dumps(config.to_dict())
    assert Config.from_json(text, "config.json") == config
    assert json.dumps(Config.from_json(text, "config.json").to_dict()) == text


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries({}, optional=VALID), st.fixed_dictionaries({}, optional=VALID))
def test_replace_changes_those_and_no_others(values: dict[str, Any], changes: dict[str, Any]) -> None:
    config = Config.make(**values)
    before = config.flat()
    assert config.replace(**changes).flat() == {**before, **changes}
    assert config.flat() == before


def test_replace_of_model_settings_is_checked() -> None:
    changed = Config().replace(latent_dim=7, norm="batch", epochs=3)
    assert (changed.model.latent_dim, changed.model.norm, changed.epochs) == (7, "batch", 3)
    with pytest.raises(UsageError, match="--latent-dim"):
        Config().replace(latent_dim=0)


def test_flat_and_nested_hold_the_same() -> None:
    nested = Config().to_dict()
    assert Config().flat() == {**nested["model"], **{k: v for k, v in nested.items() if k != "model"}}


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
        '{"model": {"epochs": 3}, "epochs": 3}',
    ],
)
def test_json_of_something_else(text: str) -> None:
    with pytest.raises(UsageError, match=r"^runs/a/config\.json is no configuration"):
        Config.from_json(text, "runs/a/config.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_json_with_numbers_that_are_none(number: str) -> None:
    text = json.dumps(Config().to_dict()).replace('"beta": 1.0', f'"beta": {number}')
    with pytest.raises(UsageError, match="--beta"):
        Config.from_json(text, "config.json")


def test_notebook_preset_is_the_notebook() -> None:
    config = Config.make(preset="notebook")
    assert (config.samples, config.lr, config.batch_size, config.epochs) == (10, 0.001, 32, 50)
    assert (config.schedule, config.lr_warmup, config.ema, config.grad_clip) == ("constant", 0.0, 0.0, 0.0)
    assert (config.beta, config.kl_warmup, config.loss_scale, config.augment) == (1.0, 0.0, "notebook", True)
    assert config.model == ModelConfig("notebook", 64, 64, 32, "batch", "bernoulli")


def test_presets_are_defaults_only() -> None:
    assert Config.make() == Config()
    assert Config.make(preset="notebook", samples=3).samples == 3
    small = Config.make(preset="small")
    assert (small.model.width, small.model.latent_dim, small.epochs) == (16, 16, 12)


@pytest.mark.parametrize(
    ("images", "batch"), [(1, 16), (639, 16), (1280, 32), (2560, 64), (7000, 128), (10240, 256), (10**7, 256)]
)
def test_batch_size_from_the_data(images: int, batch: int) -> None:
    decided = Config.make(latent_dim=8, batch_size=0).for_data("dogs", "ab12", 32, images)
    assert decided == Config.make(
        latent_dim=8, batch_size=batch, data="dogs", fingerprint="ab12", image_size=32
    )  # 40 steps an epoch, as a power of two
    assert Config.make(batch_size=7).for_data("dogs", "ab12", 32, images).batch_size == 7


# --- flags


def parsed(*argv: str) -> argparse.Namespace:
    return flags.training_parser("train_distributed.py", "description").parse_args(argv)


def test_internal_settings_are_those_without_a_flag() -> None:
    assert set(flags.INTERNAL) == {"architecture", "data", "fingerprint", "loss_scale"}


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"architecture", "data", "fingerprint", "loss_scale"}))
def test_every_setting_has_a_flag_that_tells_its_default(name: str) -> None:
    kind, good, _ = TABLE[name]
    value = good[-1]
    typed = ["--no-" + name] if kind is bool else [flag_of(name), str(value)]
    assert flags.given(parsed(*typed)) == {name: value}
    text = " ".join(flags.training_parser("train_distributed.py", None).format_help().split("options:")[1].split())
    entry = text[text.index(f" {flag_of(name)}{',' if kind is bool else ''} ") :]
    # the first default after the flag is its own
    told = re.search(r"\(default: (.*?)\)", entry)
    assert told
    assert told[1] == str(Config().flat()[name])


@pytest.mark.parametrize("name", ["architecture", "fingerprint", "loss_scale"])
def test_internal_settings_cannot_be_typed(name: str) -> None:
    with pytest.raises(UsageError, match=f"{flag_of(name)} "):
        parsed(flag_of(name), "x")


def test_given_is_what_was_typed() -> None:
    assert flags.given(parsed()) == {}
    assert flags.given(parsed("--epochs", "50", "--no-augment")) == {"epochs": 50, "augment": False}  # 50: the default
    assert flags.given(parsed("--lr-warmup", "0", "--augment")) == {"lr_warmup": 0.0, "augment": True}
    assert flags.given(parsed("--data", "dogs", "--name", "n", "--gpus", "2", "--crop", "box")) == {}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--epochs"], "--epochs"),
        (["--epoch", "3"], "--epoch"),  # no abbreviations: `--lr` would be one of `--lr-warmup` one day
        (["--colour", "red"], "--colour"),
        (["dogs"], "dogs"),
    ],
)
def test_parser_errors_are_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(UsageError) as error:
        parsed(*argv)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("(see train_distributed.py --help)")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpus", "1", "--cpus", "2"], "--gpus and --cpus"),
        (["--gpus", "0"], "--gpus"),
        (["--cpus", "-1"], "--cpus"),
        (["--max-failures", "-2"], "--max-failures"),
        (["--max-skipped", "0"], "--max-skipped"),
        (["--val-fraction", "0"], "--val-fraction"),
        (["--val-fraction", "0.95"], "--val-fraction"),
        (["--val-fraction", "nan"], "--val-fraction"),
        (["--crop", "square"], "--crop"),
        (["--resume", "--name", "a", "--crop", "box"], "--resume"),
        (["--resume", "--name", "a", "--val-fraction", "0.1"], "--resume"),
    ],
)
def test_contradicting_flags(argv: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        flags.check_training(parsed(*argv))


def test_flags_that_are_fine() -> None:
    for argv in ([], ["--gpus", "1"], ["--cpus", "8", "--max-failures", "-1"], ["--val-fraction", "0.9"]):
        flags.check_training(parsed(*argv))


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("5m", 300), ("2h", 7200), ("1.5m", 90), ("0.5s", 0.5)])
def test_times(text: str, seconds: float) -> None:
    assert flags.safety(parsed("--checkpoint-every", text)) == Safety(checkpoint_s=seconds)
    assert flags.safety(parsed("--storage-patience", text)) == Safety(patience_s=seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "0s", "0.0h", "-5m", "5x", "5d", "m5", "1e3s", "5 m", "infs", "nans", "1.5", ".5s"]
)
def test_times_that_are_none(text: str) -> None:
    for flag in ("--checkpoint-every", "--storage-patience"):
        with pytest.raises(UsageError, match=flag) as error:
            flags.safety(parsed(f"{flag}={text}"))
        assert "30s, 5m or 2h" in str(error.value)


def test_safety_from_the_flags() -> None:
    """A plain number is one of steps, and there must be some."""
    assert flags.safety(parsed()) == Safety() == Safety(60.0, 0, 20, 600.0)
    typed = parsed("--checkpoint-every", "7", "--max-skipped", "3", "--storage-patience", "90s")
    assert flags.safety(typed) == Safety(60.0, 7, 3, 90.0)
    with pytest.raises(UsageError, match="--checkpoint-every"):
        flags.safety(parsed("--checkpoint-every", "0"))


def test_numbers_of_workers() -> None:
    good = {"1": 1, "12": 12, "2:4": (2, 4), "3:3": (3, 3)}
    assert {text: parsed("--cpus", text).cpus for text in good} == good
    for text in ("0", "0:2", "4:2", "2:", ":4", "2:x", "1.5", "2:3:4", "many"):
        with pytest.raises(UsageError, match=r"--gpus.*2:4"):
            parsed("--gpus", text)


def test_run_returns_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def fine(argv: Any) -> None:
        seen.append(argv)

    def mistaken(argv: Any) -> None:
        raise UsageError("--data: nothing is there")

    def failed(argv: Any) -> None:
        raise RunFailed("the disk is full")

    def interrupted(argv: Any) -> None:
        raise KeyboardInterrupt

    def broken(argv: Any) -> None:
        raise ZeroDivisionError

    assert flags.run(fine, ["a", "b"]) == 0
    assert seen == [["a", "b"]]
    assert flags.run(lambda argv: 3, []) == 3
    assert capsys.readouterr() == ("", "")
    assert flags.run(mistaken, []) == 2
    assert capsys.readouterr() == ("", "error: --data: nothing is there\n")
    assert flags.run(failed, ["--verbose"]) == 1
    assert capsys.readouterr() == ("", "error: the disk is full\n")
    assert flags.run(interrupted, []) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    with pytest.raises(UsageError):  # the traceback that was asked for
        flags.run(mistaken, ["--verbose"])
    with pytest.raises(ZeroDivisionError):  # our own mistakes are not told as the user's
        flags.run(broken, [])


def test_run_after_the_reader_has_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def piped(argv: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # `run` gives it up; the other tests need it back
    assert flags.run(piped, []) == 141
