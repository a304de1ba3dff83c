"""Every setting of a model and its training: its default, range and help text. The only place that checks them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from dogvae.errors import UsageError
from dogvae.json_text import parse

IMAGE_SIZES = tuple(range(32, 257, 32))
CROPS = ("center", "box")
VAL_FRACTION = {"above": 0, "high": 0.9}
# Of a run with `epochs` 0: images in all epochs together, of a VAE and of a flow prior; and the least epochs.
SHOWN, FLOW_SHOWN, LEAST_EPOCHS = 50_000, 200_000, 4
REMOVED = (
    "compile",
    "gradient_compression",
    "norm",
)  # settings of earlier versions: ignored in files that still hold them
TYPES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}


def setting(default: Any, group: str, text: str, **limits: Any) -> Any:
    """A dataclass field with a help text and limits: `low` and `high` (inclusive), `above` (exclusive), `choices`."""
    return field(default=default, metadata={"group": group, "help": text, **limits})


def check(name: str, value: Any, expected: type, limits: Any) -> Any:
    """Return `value` if it has the type `expected` and is within `limits`. Else a UsageError names the flag."""
    flag = "--" + name.replace("_", "-")
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise UsageError(f"{flag}: {value!r} is not {TYPES[expected]}")
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
    """Base of frozen dataclasses: checks every field against its type and limits."""

    def __post_init__(self) -> None:
        for name, spec, expected in fields_of(type(self)):
            object.__setattr__(self, name, check(name, getattr(self, name), expected, spec.metadata))


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """The settings of the network: enough to rebuild it before its weights are loaded."""

    architecture: str = setting(
        "default", "model", "the default network, or the notebook's exact one", choices=("default", "notebook")
    )
    image_size: int = setting(64, "data", "side of the square images in pixels", choices=IMAGE_SIZES)
    width: int = setting(
        48, "model", "channels at the first resolution; deeper ones have 2 and 4 times as many", low=4, high=512
    )
    latent_dim: int = setting(8, "model", "channels of the latent map", low=1, high=1024)
    latent_size: int = setting(
        8, "model", "side of the latent map: 8 shows more detail, 4 gives better samples", choices=(4, 8, 16)
    )
    likelihood: str = setting("gaussian", "model", "likelihood of a pixel value", choices=("gaussian", "bernoulli"))

    @property
    def latent_side(self) -> int:
        """Side of the latent map: `latent_size`, or the nearest that halving gives, as for images of 96 pixels."""
        halvings = round(math.log2(self.image_size / self.latent_size))
        while self.image_size % 2**halvings:
            halvings -= 1
        return self.image_size // 2**halvings


@dataclass(frozen=True)
class FlowConfig(_Checked):
    """The settings of a flow prior, and the VAE whose latents it learns."""

    vae: str = setting("", "data", "path or URI of the exported VAE")
    weights: str = setting("", "data", "SHA-256 of the VAE's weights")
    width: int = setting(192, "model", "numbers that the transformer has for each token", low=32, high=2048)
    depth: int = setting(6, "model", "blocks of the transformer", low=1, high=64)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 32:
            raise UsageError(f"--width: {self.width} is not a multiple of 32, the size of an attention head")


@dataclass(frozen=True)
class Config(_Checked):
    """All settings of a run: model, data and training. The number of workers and the machines are not settings.

    A run with a `flow` trains a flow prior for the latents of a VAE, whose settings are `model`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig | None = None
    data: str = setting("", "data", "path or URI of the prepared dataset")
    fingerprint: str = setting("", "data", "the dataset's fingerprint")
    preset: str = setting(
        "default", "model", "set of defaults for the other settings", choices=("default", "notebook", "small")
    )
    epochs: int = setting(
        50,
        "training",
        f"passes over the training images; 0: as many as show the network {SHOWN:,} images, at least {LEAST_EPOCHS}",
        low=0,
    )
    batch_size: int = setting(
        0, "training", "images per step over all workers; 0: a 40th of the training images", low=0
    )
    lr: float = setting(2e-3, "training", "peak learning rate of Adam", above=0, high=1)
    schedule: str = setting(
        "cosine", "training", "learning rate schedule after the warm-up", choices=("cosine", "constant")
    )
    lr_warmup: float = setting(1.0, "training", "epochs of linear warm-up of the learning rate", low=0)
    samples: int = setting(1, "training", "posterior samples per image and step", low=1, high=1000)
    beta: float = setting(1.0, "training", "weight of the KL term", low=0)
    kl_warmup: float = setting(0.0, "training", "epochs over which beta grows linearly from 0", low=0)
    grad_clip: float = setting(
        1000.0, "training", "clip the gradient norm, in nats per image, to this value; 0: no clipping", low=0
    )
    ema: float = setting(
        0.995,
        "training",
        "decay of the averaged weights (EMA), which are validated and exported; 0: no average",
        low=0,
        high=0.999999,
    )
    augment: bool = setting(
        True, "training", "flip training images (p 0.5) and rotate them by up to 10 degrees (p 0.3)"
    )
    loss_scale: str = setting(
        "image",
        "training",
        "unit of the loss: nats per image, or the notebook's mean per pixel",
        choices=("image", "notebook"),
    )
    precision: str = setting(
        "auto", "training", "auto: bf16 autocast on GPUs that support it, else fp32", choices=("auto", "bf16", "fp32")
    )
    seed: int = setting(0, "training", "seed of all random numbers", low=0, high=2**32 - 1)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values; those of the model are nested under `model`."""
        return dataclasses.asdict(self)

    def flat(self) -> dict[str, Any]:
        """All settings by name, including those of the model, but without those of a flow."""
        nested = self.to_dict()
        del nested["flow"]
        return {**nested.pop("model"), **nested}

    def for_data(self, data: str, fingerprint: str, image_size: int, images: int) -> Config:
        """A copy for a dataset with that many training images; chooses the batch size and the epochs if they are 0."""
        # About 40 steps an epoch (experiments: docs/quality.md): a power of two from 16 to 64.
        batch_size = self.batch_size or min(64, max(16, 2 ** round(math.log2(images / 40))))
        shown = FLOW_SHOWN if self.flow else SHOWN
        epochs = self.epochs or max(LEAST_EPOCHS, round(shown / images))
        chosen = dict(batch_size=batch_size, epochs=epochs)
        return self.replace(data=data, fingerprint=fingerprint, image_size=image_size, **chosen)

    def replace(self, **changes: Any) -> Config:
        """A checked copy with some settings changed; settings of the model are named as in `flat`."""
        return Config.make(**{**self.flat(), "flow": self.flow, **changes})

    @staticmethod
    def make(**settings: Any) -> Config:
        """A Config from flat settings; defaults come from `settings["preset"]`.

        Raises UsageError for an unknown name, a wrong type or a value out of range.
        """
        preset = check("preset", settings.get("preset", "default"), str, dict(choices=tuple(PRESETS)))
        settings = {**PRESETS[preset], **settings}
        known = {"flow"} | {name for name, _, _ in fields_of(Config)} | {name for name, _, _ in fields_of(ModelConfig)}
        if unknown := sorted(set(settings) - known):
            raise UsageError(f"no setting is called {', '.join(unknown)}; settings are {', '.join(sorted(known))}")
        model_names = {name for name, _, _ in fields_of(ModelConfig)}
        model = ModelConfig(**{k: v for k, v in settings.items() if k in model_names})
        return Config(model=model, **{k: v for k, v in settings.items() if k not in model_names})

    @staticmethod
    def make_nested(nested: dict[str, Any]) -> Config:
        """A Config from the result of `to_dict`, also from one that an earlier version wrote."""
        settings = {name: value for name, value in nested.items() if name not in REMOVED}
        model, flow = settings.pop("model"), settings.pop("flow", None)
        if "latent_size" not in model:  # written before version 0.2
            notebook = {"architecture": "notebook", "norm": "batch", "likelihood": "bernoulli"}
            if not model.items() >= notebook.items():
                raise UsageError("its network is of dogvae 0.1: use that version for it, or train again")
            model = {**model, "latent_size": PRESETS["notebook"]["latent_size"]}
        model = {name: value for name, value in model.items() if name not in REMOVED}
        return Config.make(flow=flow and FlowConfig(**flow), **model, **settings)

    @staticmethod
    def from_json(text: str, where: str) -> Config:
        """A Config from the JSON of `to_dict`; a UsageError about any other text names the file `where`."""
        try:
            return Config.make_nested(parse(text))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{where} is not the configuration of a run: {error}") from error


@dataclass(frozen=True)
class Safety:
    """When a run saves, how long it waits and when it gives up. Does not change the numbers that are computed."""

    checkpoint_s: float = 60.0  # seconds between checkpoints within an epoch; each epoch also ends with one
    checkpoint_steps: int = 0  # steps between checkpoints; replaces `checkpoint_s` if not 0
    max_skipped: int = 20  # the run ends after this many consecutive steps with non-finite gradients
    patience_s: float = 600.0  # how long training continues while no checkpoint can be written
    max_failures: int = 3  # how many lost workers to recover from; -1: any number
    node_patience_s: float = 900.0  # how long to wait for nodes that the workers need


def fields_of(kind: type) -> list[tuple[str, dataclasses.Field[Any], type]]:
    """(name, field, type) of each setting of a config class, in order; the nested `model` is left out."""
    types = {"str": str, "int": int, "float": float, "bool": bool}
    return [(f.name, f, types[str(f.type)]) for f in dataclasses.fields(kind) if f.type in types]


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The settings of the reference notebook.
    "notebook": dict(
        architecture="notebook",
        likelihood="bernoulli",
        width=64,
        latent_dim=32,
        latent_size=4,
        samples=10,
        lr=1e-3,
        schedule="constant",
        lr_warmup=0.0,
        ema=0.0,
        batch_size=32,
        epochs=50,
        loss_scale="notebook",
        grad_clip=0.0,
    ),
    # Trains within minutes on a laptop.
    "small": dict(width=24, epochs=0, batch_size=16, lr=3e-3),
}
# A flow prior (experiments: docs/quality.md). The encoder costs as much as a draw or two, so each image has four.
FLOW: dict[str, Any] = dict(epochs=0, batch_size=32, samples=4, lr=1e-3, ema=0.999, grad_clip=1.0)
