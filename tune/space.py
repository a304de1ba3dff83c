"""The search space: a domain for each searched setting. A trial's settings depend only on the seed and its number."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dogvae.config import Config, ModelConfig, check, fields_of
from dogvae.errors import UsageError

DEFAULT = ("latent_dim=choice(4,8,16,32)", "lr=loguniform(3e-4,1e-2)", "samples=choice(1,3,10)")
KINDS: dict[str, tuple[type, ...]] = {  # kinds of domains, and the types of settings that each fits
    "choice": (int, float, str, bool),
    "uniform": (float,),
    "loguniform": (float,),
    "randint": (int,),
}
FIELDS = {name: (spec.metadata, kind) for name, spec, kind in [*fields_of(Config), *fields_of(ModelConfig)]}
# Settings that are the same for all trials, so that the trials can be compared; and the flag that sets each.
DECIDED_BY = {
    "data": "--data",
    "fingerprint": "--data",
    "image_size": "--data",
    "preset": "--set preset=...",
    "epochs": "--epochs",
    "seed": "--seed",
    "architecture": "--set preset=...",
    "loss_scale": "--set preset=...",
}
LARGEST_INT = 2**62  # Ray and NumPy draw 64-bit integers


@dataclass(frozen=True)
class Domain:
    """The values that one setting may take: `values` are the choices, or (low, high) with both ends included."""

    kind: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.kind}({','.join(map(_text, self.values))})"

    def draw(self, rng: np.random.Generator) -> Any:
        """A random value as a plain Python object, because JSON has no NumPy scalars."""
        if self.kind == "choice":
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(rng.integers(low, high, endpoint=True))
        if self.kind == "uniform":
            return rng.uniform(low, high)
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
        return min(max(drawn, low), high)  # exp(log(high)) may be rounded to above high

    def nearest(self, value: Any) -> Any:
        """`value` if it is in the domain, else the closest number; for texts the first choice."""
        if self.kind == "choice":
            if isinstance(value, str):
                return value if value in self.values else self.values[0]
            return min(self.values, key=lambda choice: abs(choice - value))
        low, high = self.values
        return min(max(value, low), high)  # also the closest on a log scale

    def as_tune(self) -> Any:
        """The same domain as an object of Ray Tune."""
        from ray import tune

        if self.kind == "choice":
            return tune.choice(list(self.values))
        low, high = self.values
        if self.kind == "randint":
            return tune.randint(low, high + 1)  # Ray excludes the upper end
        return tune.uniform(low, high) if self.kind == "uniform" else tune.loguniform(low, high)


@dataclass(frozen=True)
class Space:
    """The searched settings and their domains."""

    domains: dict[str, Domain]

    @staticmethod
    def parse(texts: Sequence[str], fixed: Mapping[str, Any]) -> Space:
        """The default space with the domains of `--search`, without the settings of `--set`. Raises UsageError."""
        named: dict[str, Domain] = {}
        for text in texts:
            name, domain = _named_domain(text)
            if name in named:
                raise UsageError(f"--search {name}: given twice; leave out one of them")
            if name in fixed:
                raise UsageError(f"--search {name}: --set fixes it already; leave out one of them")
            named[name] = domain
        default = {name: domain for name, domain in map(_named_domain, DEFAULT) if name not in fixed}
        if not (domains := {**default, **named}):
            raise UsageError("--search: --set fixes every setting of the default search; add another one to search")
        return Space(domains)

    def nearest(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The point of this space that is closest to `settings`."""
        return {name: domain.nearest(settings[name]) for name, domain in sorted(self.domains.items())}

    def setting(self, seed: int, number: int) -> dict[str, Any]:
        """The searched settings of a trial: closest to the notebook's for trial 0, random for the others.

        They depend on nothing else, so a resumed search draws the same trials as an uninterrupted one.
        """
        if number == 0:
            return self.nearest(Config.make(preset="notebook").flat())
        rng = np.random.default_rng([seed, number])
        # Sorted: the order of the flags must not matter.
        return {name: domain.draw(rng) for name, domain in sorted(self.domains.items())}

    def to_json(self) -> dict[str, str]:
        """The domains as texts, as search.json keeps them."""
        return {name: str(domain) for name, domain in self.domains.items()}

    @staticmethod
    def from_json(texts: Mapping[str, str]) -> Space:
        """The space that `to_json` wrote. Raises UsageError for a text that is not a domain."""
        return Space(dict(_named_domain(f"{name}={text}") for name, text in texts.items()))


def parse_fixed(texts: Sequence[str]) -> dict[str, Any]:
    """The settings of all trials, from the texts of `--set NAME=VALUE`. Raises UsageError."""
    fixed: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals):
            raise UsageError(f"--set: {text!r} is not NAME=VALUE, such as width=32")
        if name in DECIDED_BY and name != "preset":
            raise UsageError(f"--set {name}: all trials share this setting; use {DECIDED_BY[name]} instead")
        if name not in FIELDS:
            raise UsageError(f"--set: no setting is called {name!r}; the settings are {_names('preset')}")
        if name in fixed:
            raise UsageError(f"--set {name}: given twice; leave out one of them")
        fixed[name] = _value("--set", name, value)
    return fixed


def label(setting: Mapping[str, Any]) -> str:
    """A short name for folders and TensorBoard, such as `latent_dim16-lr0.0021-samples3`: ASCII, at most 60 characters.

    Similar settings may have the same name.
    """
    texts = (f"{name}{f'{v:.2g}' if isinstance(v, float) else _text(v)}" for name, v in sorted(setting.items()))
    return re.sub(r"[^\w.-]", "", "-".join(texts))[:60]


def _named_domain(text: str) -> tuple[str, Domain]:
    """The name and the domain of a text such as `lr=uniform(0,1)`, with values of the setting's type."""
    form = re.fullmatch(r"([^=]+)=([^(]+)\((.*)\)", text.strip())
    if form is None:
        raise UsageError(f"--search: {text!r} is not NAME=KIND(...), such as {DEFAULT[1]}")
    name, kind, inner = (part.strip() for part in form.groups())
    if name in DECIDED_BY:
        raise UsageError(f"--search {name}: all trials share this setting; use {DECIDED_BY[name]} instead")
    if name not in FIELDS:
        raise UsageError(f"--search: no setting is called {name!r}; the settings are {_names()}")
    where = f"--search {name}"
    if kind not in KINDS:
        raise UsageError(f"{where}: no kind is called {kind!r}; the kinds are {', '.join(KINDS)}")
    expected = FIELDS[name][1]
    if expected not in KINDS[kind]:
        fitting = " or ".join(other for other, types in KINDS.items() if expected in types)
        raise UsageError(f"{where}: {kind} does not fit values of type {expected.__name__}; use {fitting}")
    values = tuple(_value("--search", name, part.strip()) for part in inner.split(",")) if inner else ()
    if kind == "choice":
        if not values:
            raise UsageError(f"{where}: choice() has no values; give at least one")
        if len(set(values)) < len(values):
            raise UsageError(f"{where}: {kind}({inner}) has a value twice; leave out one of them")
        return name, Domain(kind, values)
    if len(values) != 2:
        raise UsageError(f"{where}: {kind}({inner}) must have two bounds, low and high, not {len(values)}")
    low, high = values
    if low >= high:
        raise UsageError(f"{where}: {kind}({inner}) is empty; the first bound must be below the second")
    if kind == "loguniform" and low <= 0:
        raise UsageError(f"{where}: {kind}({inner}) has no logarithm at {low}; the first bound must be above 0")
    if kind == "randint" and high > LARGEST_INT:
        raise UsageError(f"{where}: {high} is too large; it must be at most {LARGEST_INT}")
    return name, Domain(kind, values)


def _value(flag: str, name: str, text: str) -> Any:
    """`text` as a value of the setting. Raises a UsageError that begins with `flag`."""
    limits, expected = FIELDS[name]
    value: Any = text
    if expected is bool:
        if text not in ("true", "false"):
            raise UsageError(f"{flag} {name}: {text!r} is neither true nor false")
        value = text == "true"
    elif expected is not str:
        with contextlib.suppress(ValueError):  # `check` reports what is not a number
            value = expected(text)
    try:
        return check(name, value, expected, limits)
    except UsageError as error:
        # `check` names the flag of the training command, which the user did not type.
        raise UsageError(f"{flag} {name}: {str(error).partition(': ')[2]}") from error


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _names(*also: str) -> str:
    return ", ".join(sorted({*FIELDS} - {*DECIDED_BY} | {*also}))
