"""The search space: parsing and refusing domains and fixed values, drawing from domains, the settings of each trial."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dogvae.config import Config
from dogvae.errors import UsageError
from tests.support.searches import contains, setting
from tune.space import DECIDED_BY, Domain, Space, label, parse_fixed

DRAWS = 2000


def parse_one(text: str) -> Domain:
    return Space.parse([text], {}).domains[text.split("=")[0].strip()]


def distance_from_uniform(shares: list[float]) -> float:
    """The Kolmogorov-Smirnov statistic against the uniform distribution on [0, 1]."""
    n = len(shares)
    return max(max((i + 1) / n - x, x - i / n) for i, x in enumerate(sorted(shares)))


# --- parsing


def test_search_adds_or_replaces_and_set_removes_domains() -> None:
    default = {"latent_dim": "choice(4,8,16,32)", "lr": "loguniform(0.0003,0.01)", "samples": "choice(1,3,10)"}
    assert Space.parse([], {}).to_json() == default
    space = Space.parse(["beta=uniform(0,4)", "lr=choice(0.001)"], {"samples": 3, "width": 16})
    assert list(space.domains) == ["latent_dim", "lr", "beta"]
    assert space.domains["lr"] == Domain("choice", (0.001,))
    assert space.domains["beta"] == Domain("uniform", (0.0, 4.0))
    assert set(Space.parse(["beta=uniform(0,4)"], setting()).domains) == {"beta"}


@pytest.mark.parametrize(
    ("text", "kind", "values", "written"),
    [
        (" latent_dim = choice( 8, 16 ) ", "choice", (8, 16), "choice(8,16)"),
        ("lr=loguniform(1e-4,1e-2)", "loguniform", (0.0001, 0.01), "loguniform(0.0001,0.01)"),
        ("beta=choice(1,4)", "choice", (1.0, 4.0), "choice(1.0,4.0)"),
        ("batch_size=randint(16,256)", "randint", (16, 256), "randint(16,256)"),
        ("schedule=choice(cosine,constant)", "choice", ("cosine", "constant"), "choice(cosine,constant)"),
        ("augment=choice(true,false)", "choice", (True, False), "choice(true,false)"),
    ],
)
def test_values_have_the_type_of_their_setting(text: str, kind: str, values: tuple[Any, ...], written: str) -> None:
    domain = parse_one(text)
    assert (domain.kind, domain.values, str(domain)) == (kind, values, written)
    assert [type(v) for v in domain.values] == [type(v) for v in values]


def bounds(low: float, high: float) -> st.SearchStrategy[tuple[float, float]]:
    pairs = st.lists(st.floats(low, high), min_size=2, max_size=2, unique=True).map(sorted)
    return pairs.map(lambda pair: (pair[0], pair[1]))


INTS = st.lists(st.integers(1, 1000), min_size=1, max_size=5, unique=True).map(tuple)
SPACES = st.fixed_dictionaries(
    {},
    optional={
        "lr": bounds(1e-300, 1.0).map(lambda pair: Domain("loguniform", pair)),
        "beta": bounds(0.0, 1e300).map(lambda pair: Domain("uniform", pair)),
        "latent_dim": INTS.map(lambda values: Domain("choice", values)),
        "samples": INTS.filter(lambda v: len(v) > 1).map(lambda v: Domain("randint", (min(v), max(v)))),
        "augment": st.sampled_from([(True,), (False,), (True, False)]).map(lambda values: Domain("choice", values)),
        "likelihood": st.permutations(["gaussian", "bernoulli"]).map(lambda values: Domain("choice", tuple(values))),
        "grad_clip": st.lists(st.floats(0, 1e300), min_size=1, max_size=5, unique=True).map(
            lambda values: Domain("choice", tuple(values))
        ),
    },
)


@settings(max_examples=100, deadline=None)
@given(SPACES)
def test_written_space_is_read_back(domains: dict[str, Domain]) -> None:
    space = Space(domains)
    back = Space.from_json(json.loads(json.dumps(space.to_json())))
    assert back == space
    assert list(back.domains) == list(domains)
    typed = Space.parse([f"{name}={domain}" for name, domain in domains.items()], {})
    assert {name: typed.domains[name] for name in domains} == domains


# --- refusing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", r": 'lr' is not NAME=KIND\(...\), such as lr=loguniform\(3e-4,1e-2\)$"),
        ("lr=0.1", r": 'lr=0.1' is not NAME=KIND"),
        ("lr=uniform(0.1,0.2", r": .*is not NAME=KIND"),
        ("lr=log-uniform(0.1,0.2)", r" lr: .*'log-uniform'.* choice, uniform, loguniform, randint$"),
        ("learning_rate=choice(0.1)", r": .*'learning_rate'.* latent_dim, latent_size, likelihood, lr, lr_warmup"),
        ("lr=uniform(0.1)", r" lr: uniform\(0.1\) must have two bounds, low and high, not 1$"),
        ("samples=randint(1,2,3)", r" samples: .*two bounds.* not 3$"),
        ("lr=uniform(0.2,0.1)", r" lr: uniform\(0.2,0.1\) is empty.*below"),
        ("beta=uniform(0,inf)", r" beta: inf "),
        ("beta=uniform(0,1e999)", r" beta: inf "),
        ("beta=loguniform(0,1)", r" beta: .*no logarithm at 0.0.*above 0$"),
        ("lr=choice()", r" lr: choice\(\) has no values.*at least one$"),
        ("lr=choice(0.1,1e-1)", r" lr: .*has a value twice"),
        ("latent_dim=uniform(8,16)", r" latent_dim: uniform .*type int; use choice or randint$"),
        ("likelihood=uniform(0,1)", r" likelihood: uniform .*type str; use choice$"),
        ("lr=randint(0,1)", r" lr: randint .*type float; use choice or uniform or loguniform$"),
        ("latent_dim=choice(8,2000)", r" latent_dim: 2000 .*1024$"),
        ("latent_dim=choice(8,1.5)", r" latent_dim: '1.5' .*int"),
        ("batch_size=randint(1,9223372036854775807)", rf" batch_size: .*too large.* {2**62}$"),
        ("augment=choice(1,0)", r" augment: '1' is neither true nor false$"),
        ("lr=choice(__import__('os').getcwd())", r" lr: .*__import__"),
    ],
)
def test_wrong_domain_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^--search{message}") as error:
        Space.parse([text], {})
    assert "\n" not in str(error.value)
    assert re.findall(r"--\w[\w-]*", str(error.value)) == ["--search"]  # no flag of the training command


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width", r": 'width' is not NAME=VALUE, such as width=32$"),
        ("=3", r": '=3' is not NAME=VALUE"),
        ("widht=16", r": .*'widht'.* preset, .*width"),
        ("width=1.5", r" width: '1.5' .*int"),
        ("width=2", r" width: 2 .*4$"),
        ("schedule=cosine=constant", r" schedule: 'cosine=constant' .*cosine, constant"),
        ("preset=large", r" preset: 'large' .*default, notebook, small"),
    ],
)
def test_wrong_fixed_value_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^--set{message}") as error:
        parse_fixed([text])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "flag"), DECIDED_BY.items())
def test_setting_that_all_trials_share_is_refused_with_its_flag(name: str, flag: str) -> None:
    with pytest.raises(UsageError, match=rf"^--search {name}: .*; use {flag} instead$"):
        Space.parse([f"{name}=choice(1,2)"], {})
    if name != "preset":
        with pytest.raises(UsageError, match=rf"^--set {name}: .*; use {flag} instead$"):
            parse_fixed([f"{name}=1"])


@pytest.mark.parametrize(
    ("texts", "fixed", "message"),
    [
        (["lr=choice(0.1)"], {"lr": 0.1}, " lr: --set fixes it already"),
        (["lr=choice(0.1)", "lr=choice(0.1)"], {}, " lr: given twice"),
        ([], setting(), ": --set fixes every setting .* add another"),
    ],
)
def test_contradicting_search_and_set_are_refused(texts: list[str], fixed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^--search{message}"):
        Space.parse(texts, fixed)


def test_unknown_name_lists_the_settings_that_can_be_searched() -> None:
    with pytest.raises(UsageError) as error:
        Space.parse(["x=choice(1)"], {})
    assert set(str(error.value).partition("settings are ")[2].split(", ")) == set(Config().flat()) - set(DECIDED_BY)


# --- drawing


@pytest.mark.parametrize("high", [0.01, 0.3, 0.7, 1.0])
def test_narrow_loguniform_stays_within_its_bounds(high: float) -> None:
    low = math.nextafter(high, 0)
    rng = np.random.default_rng(5)
    assert {Domain("loguniform", (low, high)).draw(rng) for _ in range(DRAWS)} <= {low, high}


@settings(max_examples=100, deadline=None)
@given(SPACES, st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_drawn_settings_are_valid_for_a_run(domains: dict[str, Domain], seed: int, number: int) -> None:
    drawn = Space(domains).setting(seed, number)
    assert set(drawn) == set(domains)
    flat = Config.make(**drawn).flat()
    assert {name: flat[name] for name in drawn} == drawn
    assert json.loads(json.dumps(drawn)) == drawn  # plain Python
    assert all(contains(domains[name], value) for name, value in drawn.items())


@pytest.mark.parametrize(
    ("domain", "value", "nearest"),
    [
        (Domain("choice", (64, 8, 16)), 45, 64),
        (Domain("choice", (0.1, 0.5)), 7.0, 0.5),
        (Domain("choice", ("cosine", "linear")), "constant", "cosine"),
        (Domain("choice", (False,)), True, False),
        (Domain("uniform", (0.5, 2.0)), 1.25, 1.25),
        (Domain("loguniform", (1e-4, 1e-2)), 1.0, 1e-2),
        (Domain("randint", (2, 5)), 1, 2),
    ],
)
def test_nearest_value_of_a_domain(domain: Domain, value: Any, nearest: Any) -> None:
    assert domain.nearest(value) == nearest
    assert type(domain.nearest(value)) is type(nearest)


# --- the settings of each trial


def test_trial_0_is_nearest_to_the_notebook() -> None:
    assert Space.parse([], {}).setting(3, 0) == {"latent_dim": 32, "lr": 1e-3, "samples": 10}
    space = Space.parse(
        ["lr=loguniform(2e-3,1e-2)", "samples=choice(1,3)", "latent_size=choice(8,16)"], {"latent_dim": 8}
    )
    assert space.setting(3, 0) == {"lr": 2e-3, "samples": 3, "latent_size": 8}


def test_settings_depend_only_on_seed_and_number() -> None:
    space = Space.parse([], {})
    before = space.setting(3, 7)
    np.random.seed(0)
    for number in range(20):
        space.setting(4, number)
    assert space.setting(3, 7) == before
    assert Space.from_json(space.to_json()).setting(3, 7) == before
    assert len({space.setting(seed, number)["lr"] for seed in range(10) for number in range(1, 11)}) == 100


def test_order_of_the_flags_does_not_matter() -> None:
    texts = ["beta=uniform(0,4)", "width=randint(4,64)", "schedule=choice(cosine,constant)"]
    one, other = Space.parse(texts, {}), Space.parse(texts[::-1], {})
    assert list(one.domains) != list(other.domains)
    assert [one.setting(0, k) for k in range(20)] == [other.setting(0, k) for k in range(20)]


def test_trials_cover_the_space_evenly() -> None:
    """Neighbouring numbers seed the generator: their draws must be as independent as those of one stream."""
    texts = ["lr=loguniform(1e-4,1e-2)", "beta=uniform(0.5,4.5)", "samples=randint(3,5)", "augment=choice(true,false)"]
    space = Space.parse(texts, {})
    trials = [space.setting(0, number) for number in range(1, DRAWS + 1)]
    shares = np.array([[(math.log10(t["lr"]) + 4) / 2, (t["beta"] - 0.5) / 4] for t in trials])
    for column in shares.T:
        assert distance_from_uniform(column.tolist()) < 1.63 / math.sqrt(DRAWS)  # 99%
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < 4 / math.sqrt(DRAWS)
    assert abs(np.corrcoef(shares.T)[0, 1]) < 4 / math.sqrt(DRAWS)
    combinations = Counter((t["latent_dim"], t["samples"], t["augment"]) for t in trials)
    assert len(combinations) == 4 * 3 * 2
    assert max(abs(count - DRAWS / 24) for count in combinations.values()) < 4 * math.sqrt(DRAWS / 24)


# --- fixed values and labels


def test_fixed_values_have_the_type_of_their_setting() -> None:
    typed = ["width=16", "beta=4", "augment=false", "latent_size=16", " lr = 1e-3 ", "preset=notebook", "batch_size=0"]
    fixed = parse_fixed(typed)
    expected = dict(width=16, beta=4.0, augment=False, latent_size=16, lr=1e-3, preset="notebook", batch_size=0)
    assert list(fixed.items()) == list(expected.items())
    assert [type(v) for v in fixed.values()] == [type(v) for v in expected.values()]
    with pytest.raises(UsageError, match=r"^--set width: given twice"):
        parse_fixed(["width=16", "lr=0.1", "width=16"])


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"samples": 3, "lr": 0.0021345, "latent_dim": 16}, "latent_dim16-lr0.0021-samples3"),
        ({"kl_warmup": 2.5e20}, "kl_warmup2.5e20"),  # no plus sign
        ({"schedule": "cosine", "augment": False}, "augmentfalse-schedulecosine"),
        ({}, ""),
        (
            {"likelihood": "bernoulli", "latent_dim": 1024, "latent_size": 16, "precision": "bf16", "seed": 1},
            "latent_dim1024-latent_size16-likelihoodbernoulli-precisionbf",  # cut to 60 characters
        ),
    ],
)
def test_label(setting: dict[str, Any], text: str) -> None:
    assert label(setting) == text


@settings(max_examples=100, deadline=None)
@given(SPACES, st.integers(0, 1000))
def test_label_is_a_valid_folder_name(domains: dict[str, Domain], number: int) -> None:
    drawn = Space(domains).setting(0, number)
    assert re.fullmatch(r"[\w.-]{0,60}", label(drawn), re.ASCII)
    assert label(dict(reversed(drawn.items()))) == label(drawn)
