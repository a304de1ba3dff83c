"""Every setting of a model and its training: its default, its range, its help text; checked here, once."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from dogvae.errors import UsageError

IMAGE_SIZES = (32, 64, 128)
CROPS = ("center", "box")


def setting(default: Any, group: str, text: str, **limits: Any) -> Any:
    """A dataclass field with its help text and its limits: `low`, `high`, `above` (exclusive), `choices`."""
    return field(default=default, metadata={"group": group, "help": text, **limits})


def check(name: str, value: Any, expected: type, limits: Any) -> Any:
    """Return `value` if it is of the `expected` type and within `limits`; else a UsageError names the flag."""
    flag = "--" + name.replace("_", "-")
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise UsageError(f"{flag}: {value!r} is no {expected.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{flag}: {value} is not a finite number")
    if "choices" in limits and value not in limits["choices"]:
        raise UsageError(f"{flag}: {value!r} is none of {', '.join(map(str, limits['choices']))}")
    low, above, high = limits.get("low"), limits.get("above"), limits.get("high")
    if (low is not None and value < low) or (above is not None and value <= above):
        raise UsageError(
            f"{flag}: {value} is too small, it must be {f'at least {low}' if above is None else f'above {above}'}"
        )
    if high is not None and value > high:
        raise UsageError(f"{flag}: {value} is too large, it must be at most {high}")
    return value


class _Checked:
    """Checks every field of a frozen dataclass against its type and limits."""

    def __post_init__(self) -> None:
        for name, spec, expected in fields_of(type(self)):
            object.__setattr__(self, name, check(name, getattr(self, name), expected, spec.metadata))


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """What the network is: all that is needed to build it again around its weights."""

    architecture: str = setting(
        "default", "model", "the notebook's exact network, or ours", choices=("default", "notebook")
    )
    image_size: int = setting(64, "data", "side of the square images in pixels", choices=IMAGE_SIZES)
    width: int = setting(
        64, "model", "channels of the first convolution; the deeper ones have 2, 4, 8 times as many", low=4, high=512
    )
    latent_dim: int = setting(
        32, "model", "channels of the 4x4 latent: the posterior has 16 times as many dimensions", low=1, high=1024
    )
    norm: str = setting("batch", "model", "normalisation layers", choices=("group", "batch"))
    likelihood: str = setting(
        "bernoulli", "model", "likelihood of a pixel", choices=("bernoulli", "continuous-bernoulli", "gaussian")
    )


@dataclass(frozen=True)
class Config(_Checked):
    """What a run is: the model, the data, the training. Neither the world size nor any machine is part of it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: str = setting("", "data", "the prepared dataset")
    fingerprint: str = setting("", "data", "the dataset's fingerprint")
    preset: str = setting(
        "default", "model", "where the other defaults come from", choices=("default", "notebook", "small")
    )
    epochs: int = setting(50, "training", "passes over the training images", low=1)
    batch_size: int = setting(
        0, "training", "images per step, over all workers together; 0 takes a 40th of the training images", low=0
    )
    lr: float = setting(2e-3, "training", "peak learning rate of Adam", above=0, high=1)
    schedule: str = setting("cosine", "training", "learning rate after the warm-up", choices=("cosine", "constant"))
    lr_warmup: float = setting(1.0, "training", "epochs of linear warm-up of the learning rate", low=0)
    samples: int = setting(1, "training", "posterior samples per image and step", low=1, high=1000)
    beta: float = setting(1.0, "training", "weight of the KL term", low=0)
    kl_warmup: float = setting(10.0, "training", "epochs over which beta grows linearly from 0", low=0)
    grad_clip: float = setting(0.0, "training", "largest norm of the gradient; 0 does not clip", low=0)
    ema: float = setting(
        0.995,
        "training",
        "decay of the averaged weights that are validated and exported; 0 keeps none",
        low=0,
        high=0.999999,
    )
    augment: bool = setting(True, "training", "flip (p 0.5) and rotate within 10 degrees (p 0.3) the training images")
    loss_scale: str = setting(
        "image", "training", "nats per image, or the notebook's mean per pixel", choices=("image", "notebook")
    )
    precision: str = setting(
        "auto", "training", "bf16 autocast on GPUs that have it, or fp32", choices=("auto", "bf16", "fp32")
    )
    compile: str = setting(
        "auto",
        "training",
        "torch.compile the network; auto does where that was measured to pay, which is nowhere yet",
        choices=("auto", "on", "off"),
    )
    gradient_compression: str = setting(
        "none",
        "training",
        "type in which workers exchange gradients: their own, or half of it",
        choices=("none", "bf16"),
    )
    seed: int = setting(0, "training", "everything random is drawn from it", low=0, high=2**32 - 1)

    def to_dict(self) -> dict[str, Any]:
        """Nested, JSON-ready."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """All settings by name, the model's among them."""
        nested = self.to_dict()
        return {**nested.pop("model"), **nested}

    def for_data(self, data: str, fingerprint: str, image_size: int, images: int) -> Config:
        """This config for a dataset with that many training images: what was left to the data is decided."""
        # About 40 steps an epoch, by the experiments in docs/quality.md; a power of two, at least 16, at most 256.
        batch_size = self.batch_size or min(256, max(16, 2 ** round(math.log2(images / 40))))
        return self.replace(data=data, fingerprint=fingerprint, image_size=image_size, batch_size=batch_size)

    def replace(self, **changes: Any) -> Config:
        """A checked copy with some settings changed, the model's by their own names too."""
        return Config.make(**{**self.flat(), **changes})

    @staticmethod
    def make(**settings: Any) -> Config:
        """A Config from flat settings, the unnamed ones from `settings["preset"]`.

        Raises UsageError for an unknown name, a wrong type or a value out of range.
        """
        preset = check("preset", settings.get("preset", "default"), str, dict(choices=tuple(PRESETS)))
        settings = {**PRESETS[preset], **settings}
        known = {name for name, _, _ in fields_of(Config)} | {name for name, _, _ in fields_of(ModelConfig)}
        if unknown := sorted(set(settings) - known):
            raise UsageError(f"no setting is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        model_names = {name for name, _, _ in fields_of(ModelConfig)}
        model = ModelConfig(**{k: v for k, v in settings.items() if k in model_names})
        return Config(model=model, **{k: v for k, v in settings.items() if k not in model_names})

    @staticmethod
    def make_nested(nested: dict[str, Any]) -> Config:
        """A Config from what `to_dict` gave."""
        settings = {**nested}
        return Config.make(**settings.pop("model"), **settings)

    @staticmethod
    def from_json(text: str, where: str) -> Config:
        """Read what `to_dict` wrote; `where` names the file in the error."""
        try:
            return Config.make_nested(json.loads(text))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UsageError(f"{where} is no configuration of a run: {error}") from error


@dataclass(frozen=True)
class Safety:
    """How a run guards itself; none of it changes what is computed."""

    checkpoint_s: float = 60.0  # seconds between checkpoints within an epoch; there is one after each epoch anyway
    checkpoint_steps: int = 0  # or the steps between them
    max_skipped: int = 20  # steps in a row whose gradients are not finite, before the run ends
    patience_s: float = 600.0  # how long it trains on while no checkpoint can be written
    max_failures: int = 3  # lost workers to recover from; -1: any number
    node_patience_s: float = 900.0  # how long it waits for nodes that workers need


def fields_of(kind: type) -> list[tuple[str, dataclasses.Field[Any], type]]:
    """(name, field, type) of the plain settings of a config class, in order."""
    types = {"str": str, "int": int, "float": float, "bool": bool}
    return [(f.name, f, types[str(f.type)]) for f in dataclasses.fields(kind) if f.type in types]


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The reference notebook, setting by setting.
    "notebook": dict(
        architecture="notebook",
        norm="batch",
        width=64,
        latent_dim=32,
        samples=10,
        lr=1e-3,
        schedule="constant",
        lr_warmup=0.0,
        ema=0.0,
        kl_warmup=0.0,
        batch_size=32,
        epochs=50,
        loss_scale="notebook",
    ),
    # Minutes on a laptop.
    "small": dict(width=16, latent_dim=16, epochs=12, batch_size=16, kl_warmup=3.0),
}
