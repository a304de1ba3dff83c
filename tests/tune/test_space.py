"""What a search draws from: how domains are written, refused and drawn, and that every trial is its number's alone."""

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
from tune.space import DEFAULT, SETTLED, Domain, Space, label, parse_fixed

DRAWS = 2000


def only(text: str) -> Domain:
    """The domain that `text` names."""
    return Space.parse([text], {}).domains[text.split("=")[0].strip()]


def distance_from_uniform(shares: list[float]) -> float:
    """The Kolmogorov-Smirnov statistic against the uniform distribution on [0, 1]."""
    n = len(shares)
    return max(max((i + 1) / n - x, x - i / n) for i, x in enumerate(sorted(shares)))


def drawn(domain: Domain, count: int = DRAWS) -> list[Any]:
    rng = np.random.default_rng(5)
    return [domain.draw(rng) for _ in range(count)]


# --- what is written


def test_default_space() -> None:
    assert Space.parse([], {}).domains == {
        "latent_dim": Domain("choice", (8, 16, 32, 64)),
        "lr": Domain("loguniform", (0.0001, 0.01)),
        "samples": Domain("choice", (1, 3, 10)),
    }
    assert Space.parse(DEFAULT, {}) == Space.parse([], {})


def test_search_adds_to_the_default_or_replaces_it() -> None:
    space = Space.parse(["beta=uniform(0,4)", "lr=choice(0.001)"], {})
    assert list(space.domains) == ["latent_dim", "lr", "samples", "beta"]
    assert space.domains["lr"] == Domain("choice", (0.001,))
    assert space.domains["beta"] == Domain("uniform", (0.0, 4.0))
    assert space.domains["samples"] == Domain("choice", (1, 3, 10))


def test_what_is_fixed_is_not_searched() -> None:
    assert set(Space.parse([], {"lr": 1e-3, "width": 16}).domains) == {"latent_dim", "samples"}
    fixed = {"lr": 1e-3, "latent_dim": 8, "samples": 1}
    assert set(Space.parse(["beta=uniform(0,4)"], fixed).domains) == {"beta"}


@pytest.mark.parametrize(
    ("text", "kind", "values", "written"),
    [
        ("latent_dim=choice(8,16,32)", "choice", (8, 16, 32), "choice(8,16,32)"),
        (" latent_dim = choice( 8, 16 ) ", "choice", (8, 16), "choice(8,16)"),
        ("lr=loguniform(1e-4,1e-2)", "loguniform", (0.0001, 0.01), "loguniform(0.0001,0.01)"),
        ("beta=choice(1,4)", "choice", (1.0, 4.0), "choice(1.0,4.0)"),
        ("kl_warmup=uniform(0,10)", "uniform", (0.0, 10.0), "uniform(0.0,10.0)"),
        ("batch_size=randint(16,256)", "randint", (16, 256), "randint(16,256)"),
        ("norm=choice(group,batch)", "choice", ("group", "batch"), "choice(group,batch)"),
        ("augment=choice(true,false)", "choice", (True, False), "choice(true,false)"),
        ("likelihood=choice(continuous-bernoulli)", "choice", ("continuous-bernoulli",), None),
        ("width=choice(16)", "choice", (16,), "choice(16)"),
    ],
)
def test_values_have_the_type_of_their_setting(text: str, kind: str, values: tuple[Any, ...], written: str) -> None:
    domain = only(text)
    assert (domain.kind, domain.values) == (kind, values)
    assert [type(v) for v in domain.values] == [type(v) for v in values]
    assert str(domain) == (written or text.partition("=")[2])


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
        "norm": st.permutations(["group", "batch"]).map(lambda values: Domain("choice", tuple(values))),
        "grad_clip": st.lists(st.floats(0, 1e300), min_size=1, max_size=5, unique=True).map(
            lambda values: Domain("choice", tuple(values))
        ),
    },
)


@settings(max_examples=100, deadline=None)
@given(SPACES)
def test_what_is_written_is_read_back(domains: dict[str, Domain]) -> None:
    space = Space(domains)
    back = Space.from_json(json.loads(json.dumps(space.to_json())))
    assert back == space
    assert list(back.domains) == list(domains)
    typed = Space.parse([f"{name}={domain}" for name, domain in domains.items()], {})
    assert {name: typed.domains[name] for name in domains} == domains


def test_json_is_what_is_typed() -> None:
    texts = {"latent_dim": "choice(8,16,32,64)", "lr": "loguniform(0.0001,0.01)", "samples": "choice(1,3,10)"}
    assert Space.parse([], {}).to_json() == texts


# --- what is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr", ["'lr'", "NAME=KIND(...)", "lr=loguniform(1e-4,1e-2)"]),
        ("", ["''", "NAME=KIND(...)"]),
        ("lr=0.1", ["'lr=0.1'", "NAME=KIND(...)"]),
        ("lr=uniform(0.1,0.2", ["NAME=KIND(...)"]),
        ("lr=uniform(0.1,0.2)x", ["NAME=KIND(...)"]),
        ("uniform(0.1,0.2)", ["NAME=KIND(...)"]),
        ("lr=uniform(0.1,\n0.2)", [r"\n", "NAME=KIND(...)"]),
        ("lr=log-uniform(0.1,0.2)", ["--search lr:", "'log-uniform'", "choice, uniform, loguniform, randint"]),
        ("lr=Choice(0.1)", ["--search lr:", "'Choice'", "choice, uniform, loguniform, randint"]),
        ("learning_rate=choice(0.1)", ["'learning_rate'", "batch_size, beta", "latent_dim, likelihood, lr, lr_warmup"]),
        ("latent-dim=choice(8)", ["'latent-dim'", "latent_dim"]),
        ("model=choice(8)", ["'model'", "latent_dim"]),
        ("lr=uniform(0.1)", ["--search lr:", "uniform(0.1) must have two bounds, low and high, not 1"]),
        ("lr=loguniform()", ["--search lr:", "two bounds", "not 0"]),
        ("samples=randint(1,2,3)", ["--search samples:", "randint(1,2,3) must have two bounds", "not 3"]),
        ("lr=uniform(0.2,0.1)", ["--search lr:", "uniform(0.2,0.1) is empty", "below"]),
        ("beta=uniform(0,-0.0)", ["--search beta:", "is empty"]),
        ("samples=randint(3,3)", ["--search samples:", "randint(3,3) is empty", "below"]),
        ("beta=uniform(0,inf)", ["--search beta:", "inf is not a finite number"]),
        ("beta=uniform(nan,1)", ["--search beta:", "nan is not a finite number"]),
        ("beta=uniform(0,1e999)", ["--search beta:", "inf is not a finite number"]),
        ("beta=choice(0,nan)", ["--search beta:", "nan is not a finite number"]),
        ("beta=loguniform(0,1)", ["--search beta:", "loguniform(0,1) has no logarithm", "above 0"]),
        ("lr=loguniform(0,1)", ["--search lr:", "0.0 is too small", "above 0"]),
        ("lr=choice()", ["--search lr:", "choice() has no values", "at least one"]),
        ("lr=choice( )", ["--search lr:", "choice() has no values"]),
        ("lr=choice(0.1,)", ["--search lr:", "'' is not a number"]),
        ("latent_dim=choice(8,16,8)", ["--search latent_dim:", "choice(8,16,8) has a value twice"]),
        ("lr=choice(0.1,1e-1)", ["--search lr:", "has a value twice"]),
        ("augment=choice(true,true)", ["--search augment:", "has a value twice"]),
        ("latent_dim=uniform(8,16)", ["--search latent_dim:", "uniform", "type int", "choice or randint"]),
        ("samples=loguniform(1,10)", ["--search samples:", "loguniform", "type int", "choice or randint"]),
        ("norm=uniform(0,1)", ["--search norm:", "uniform", "type str", "use choice"]),
        ("norm=randint(0,1)", ["--search norm:", "randint", "type str", "use choice"]),
        ("augment=loguniform(1,2)", ["--search augment:", "loguniform", "type bool", "use choice"]),
        ("augment=randint(0,1)", ["--search augment:", "randint", "type bool", "use choice"]),
        ("lr=randint(0,1)", ["--search lr:", "randint", "type float", "choice or uniform or loguniform"]),
        ("latent_dim=choice(8,2000)", ["--search latent_dim:", "2000 is too large", "at most 1024"]),
        ("latent_dim=choice(8,1.5)", ["--search latent_dim:", "'1.5' is not an integer"]),
        ("latent_dim=choice(8,many)", ["--search latent_dim:", "'many' is not an integer"]),
        ("samples=randint(0,3)", ["--search samples:", "0 is too small", "at least 1"]),
        ("batch_size=randint(1,9223372036854775807)", ["--search batch_size:", "too large", str(2**62)]),
        ("lr=uniform(0.1,2)", ["--search lr:", "2.0 is too large", "at most 1"]),
        ("norm=choice(group,layer)", ["--search norm:", "'layer'", "group, batch"]),
        ("augment=choice(yes,no)", ["--search augment:", "'yes'", "true nor false"]),
        ("augment=choice(1,0)", ["--search augment:", "'1'", "true nor false"]),
        ("lr=choice(__import__('os').getcwd())", ["--search lr:", "is not a number"]),
        ("epochs=choice(1,2)", ["--search epochs:", "cannot be searched", "--epochs"]),
        ("seed=randint(1,2)", ["--search seed:", "cannot be searched", "--seed"]),
        ("data=choice(a,b)", ["--search data:", "cannot be searched", "--data"]),
        ("fingerprint=choice(a,b)", ["--search fingerprint:", "cannot be searched", "--data"]),
        ("image_size=choice(32,64)", ["--search image_size:", "cannot be searched", "--data"]),
        ("preset=choice(small)", ["--search preset:", "cannot be searched", "--set preset"]),
        ("architecture=choice(notebook)", ["--search architecture:", "cannot be searched", "--set preset"]),
        ("loss_scale=choice(image)", ["--search loss_scale:", "cannot be searched", "--set preset"]),
    ],
)
def test_search_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        Space.parse([text], {})
    message = str(error.value)
    assert message.startswith("--search")
    assert "\n" not in message
    for word in words:
        assert word in message
    if text.partition("=")[0] not in SETTLED:  # else the message says which flag decides it
        assert re.findall(r"--\w[\w-]*", message) == ["--search"]  # and not the training command's flag


@pytest.mark.parametrize(
    ("texts", "fixed", "words"),
    [
        (["lr=choice(0.1)"], {"lr": 0.1}, ["--search lr:", "--set"]),
        (["beta=uniform(0,1)"], {"beta": 0.1}, ["--search beta:", "--set"]),
        (["lr=choice(0.1)", "lr=choice(0.1)"], {}, ["--search lr:", "twice"]),
        ([], {"lr": 0.1, "latent_dim": 8, "samples": 1}, ["--search:", "--set", "name something else"]),
    ],
)
def test_search_and_set_contradict(texts: list[str], fixed: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        Space.parse(texts, fixed)
    assert str(error.value).startswith("--search")
    for word in words:
        assert word in str(error.value)


def test_refused_names_are_told_apart_from_those_there_are() -> None:
    with pytest.raises(UsageError) as error:
        Space.parse(["x=choice(1)"], {})
    told = str(error.value).partition("there are ")[2].split(", ")
    assert set(told) == set(Config().flat()) - set(SETTLED)
    assert "batch_size" in told


def test_json_that_was_damaged_is_refused() -> None:
    with pytest.raises(UsageError, match="lr"):
        Space.from_json({"lr": "loguniform(0.1"})
    with pytest.raises(UsageError, match="samples"):
        Space.from_json({"samples": "choice(0)"})


# --- what is drawn


@pytest.mark.parametrize(
    ("domain", "share"),
    [
        (Domain("loguniform", (1e-4, 1e-2)), lambda v: (math.log10(v) + 4) / 2),
        (Domain("uniform", (0.5, 4.5)), lambda v: (v - 0.5) / 4),
    ],
)
def test_distribution_of_ranges(domain: Domain, share: Any) -> None:
    values = drawn(domain)
    assert {type(v) for v in values} == {float}
    assert distance_from_uniform([share(v) for v in values]) < 1.63 / math.sqrt(DRAWS)  # 99%


@pytest.mark.parametrize(
    ("domain", "all_values"),
    [
        (Domain("randint", (3, 7)), [3, 4, 5, 6, 7]),
        (Domain("choice", (8, 16, 64)), [8, 16, 64]),
        (Domain("choice", ("group", "batch")), ["group", "batch"]),
        (Domain("choice", (True, False)), [True, False]),
    ],
)
def test_distribution_of_what_can_be_counted(domain: Domain, all_values: list[Any]) -> None:
    values = drawn(domain)
    counts, share = Counter(values), 1 / len(all_values)
    assert set(counts) == set(all_values)
    assert {type(v) for v in values} == {type(all_values[0])}
    for count in counts.values():
        assert abs(count - DRAWS * share) < 4 * math.sqrt(DRAWS * share * (1 - share))


@pytest.mark.parametrize("high", [0.01, 0.3, 0.7, 1.0])
def test_a_narrow_loguniform_stays_within_its_bounds(high: float) -> None:
    low = math.nextafter(high, 0)
    assert set(drawn(Domain("loguniform", (low, high)))) <= {low, high}


@settings(max_examples=100, deadline=None)
@given(SPACES, st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_every_setting_is_one_that_a_run_accepts(domains: dict[str, Domain], seed: int, number: int) -> None:
    setting = Space(domains).setting(seed, number)
    assert set(setting) == set(domains)
    flat = Config.make(**setting).flat()
    assert {name: flat[name] for name in setting} == setting
    assert json.loads(json.dumps(setting)) == setting  # plain Python
    for name, domain in domains.items():
        inside = domain.values if domain.kind == "choice" else None
        assert setting[name] in inside if inside else domain.values[0] <= setting[name] <= domain.values[1]


@pytest.mark.parametrize(
    ("domain", "value", "nearest"),
    [
        (Domain("choice", (8, 16, 64)), 16, 16),
        (Domain("choice", (8, 16, 64)), 35, 16),
        (Domain("choice", (64, 8, 16)), 45, 64),
        (Domain("choice", (0.1, 0.5)), 0.29, 0.1),
        (Domain("choice", (0.1, 0.5)), 7.0, 0.5),
        (Domain("choice", ("group", "batch")), "batch", "batch"),
        (Domain("choice", ("cosine",)), "constant", "cosine"),
        (Domain("choice", ("continuous-bernoulli", "gaussian")), "bernoulli", "continuous-bernoulli"),
        (Domain("choice", (False,)), True, False),
        (Domain("choice", (False, True)), True, True),
        (Domain("uniform", (0.5, 2.0)), 1.25, 1.25),
        (Domain("uniform", (0.5, 2.0)), 0.0, 0.5),
        (Domain("uniform", (0.5, 2.0)), 3.0, 2.0),
        (Domain("loguniform", (1e-4, 1e-2)), 1e-3, 1e-3),
        (Domain("loguniform", (1e-4, 1e-2)), 0.0, 1e-4),
        (Domain("loguniform", (1e-4, 1e-2)), 1.0, 1e-2),
        (Domain("randint", (2, 5)), 5, 5),
        (Domain("randint", (2, 5)), 1, 2),
        (Domain("randint", (2, 5)), 10, 5),
    ],
)
def test_nearest(domain: Domain, value: Any, nearest: Any) -> None:
    assert domain.nearest(value) == nearest
    assert type(domain.nearest(value)) is type(nearest)


# --- trials


def test_first_trial_is_the_notebook() -> None:
    assert Space.parse([], {}).setting(3, 0) == {"latent_dim": 32, "lr": 1e-3, "samples": 10}
    space = Space.parse(["lr=loguniform(2e-3,1e-2)", "samples=choice(1,3)", "norm=choice(group)"], {"latent_dim": 8})
    closest = {"lr": 2e-3, "samples": 3, "norm": "group"}
    assert space.setting(3, 0) == space.first(Config.make(preset="notebook").flat()) == closest
    assert space.first(Config.make(lr=5e-3, samples=1).flat()) == {"lr": 5e-3, "samples": 1, "norm": "group"}


def test_trial_depends_on_seed_and_number_alone() -> None:
    space = Space.parse([], {})
    before = space.setting(3, 7)
    np.random.seed(0)
    for number in range(20):
        space.setting(4, number)
    assert space.setting(3, 7) == before
    assert Space.from_json(space.to_json()).setting(3, 7) == before
    assert len({space.setting(3, number)["lr"] for number in range(100)}) == 100
    assert len({space.setting(seed, number)["lr"] for seed in range(10) for number in range(1, 11)}) == 100


def test_order_of_the_flags_does_not_matter() -> None:
    texts = ["beta=uniform(0,4)", "width=randint(4,64)", "norm=choice(group,batch)"]
    one, other = Space.parse(texts, {}), Space.parse(texts[::-1], {})
    assert list(one.domains) != list(other.domains)
    assert [one.setting(0, k) for k in range(20)] == [other.setting(0, k) for k in range(20)]


def test_trials_cover_the_space() -> None:
    # Neighbouring numbers seed the generator: their draws must be as good as those of one stream.
    space = Space.parse(["beta=uniform(0,1)"], {})
    trials = [space.setting(0, number) for number in range(1, DRAWS + 1)]
    shares = np.array([[(math.log10(t["lr"]) + 4) / 2, t["beta"]] for t in trials])
    for column in shares.T:
        assert distance_from_uniform(column.tolist()) < 1.63 / math.sqrt(DRAWS)
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < 4 / math.sqrt(DRAWS)
    assert abs(np.corrcoef(shares.T)[0, 1]) < 4 / math.sqrt(DRAWS)
    pairs = Counter((t["latent_dim"], t["samples"]) for t in trials)
    assert len(pairs) == 12
    assert max(abs(count - DRAWS / 12) for count in pairs.values()) < 4 * math.sqrt(DRAWS / 12)


def test_ray_draws_from_the_same_domains() -> None:
    pytest.importorskip("ray.tune")
    rng = np.random.RandomState(0)

    def draws(text: str) -> list[Any]:
        return only(text).as_tune().sample(size=300, random_state=rng)

    assert set(draws("samples=randint(3,6)")) == {3, 4, 5, 6}
    assert set(draws("norm=choice(group,batch)")) == {"group", "batch"}
    linear, log = draws("lr=uniform(1e-4,1e-2)"), draws("lr=loguniform(1e-4,1e-2)")
    assert distance_from_uniform([(v - 1e-4) / (1e-2 - 1e-4) for v in linear]) < 1.63 / math.sqrt(300)
    assert distance_from_uniform([(math.log10(v) + 4) / 2 for v in log]) < 1.63 / math.sqrt(300)


# --- what is fixed


def test_set_has_the_type_of_its_setting() -> None:
    typed = ["width=16", "beta=4", "augment=false", "norm=group", " lr = 1e-3 ", "preset=notebook", "batch_size=0"]
    fixed = parse_fixed(typed)
    expected = dict(width=16, beta=4.0, augment=False, norm="group", lr=1e-3, preset="notebook", batch_size=0)
    assert fixed == expected
    assert {name: type(v) for name, v in fixed.items()} == {name: type(v) for name, v in expected.items()}
    assert list(fixed) == list(expected)
    assert parse_fixed([]) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("width", ["'width'", "NAME=VALUE", "width=32"]),
        ("=3", ["'=3'", "NAME=VALUE"]),
        ("widht=16", ["'widht'", "width", "preset"]),
        ("model=16", ["'model'", "latent_dim"]),
        ("width=", ["--set width:", "'' is not an integer"]),
        ("width=1.5", ["--set width:", "'1.5' is not an integer"]),
        ("width=2", ["--set width:", "2 is too small", "at least 4"]),
        ("lr=0", ["--set lr:", "0.0 is too small", "above 0"]),
        ("lr=nan", ["--set lr:", "nan is not a finite number"]),
        ("lr=fast", ["--set lr:", "'fast' is not a number"]),
        ("norm=layer", ["--set norm:", "'layer'", "group, batch"]),
        ("norm=group=batch", ["--set norm:", "'group=batch'", "group, batch"]),
        ("preset=large", ["--set preset:", "'large'", "default, notebook, small"]),
        ("augment=1", ["--set augment:", "'1'", "true nor false"]),
        ("epochs=3", ["--set epochs:", "cannot be set", ", --epochs decides"]),
        ("seed=3", ["--set seed:", "cannot be set", ", --seed decides"]),
        ("data=dogs", ["--set data:", "cannot be set", ", --data decides"]),
        ("fingerprint=ab12", ["--set fingerprint:", "cannot be set", ", --data decides"]),
        ("image_size=32", ["--set image_size:", "cannot be set", ", --data decides"]),
        ("architecture=notebook", ["--set architecture:", "cannot be set", "preset"]),
        ("loss_scale=notebook", ["--set loss_scale:", "cannot be set", "preset"]),
    ],
)
def test_set_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        parse_fixed([text])
    assert str(error.value).startswith("--set")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_set_twice() -> None:
    with pytest.raises(UsageError, match=r"^--set width: given twice"):
        parse_fixed(["width=16", "lr=0.1", "width=16"])


# --- labels


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"samples": 3, "lr": 0.0021345, "latent_dim": 16}, "latent_dim16-lr0.0021-samples3"),
        ({"lr": 1e-5, "beta": 1.0}, "beta1-lr1e-05"),
        ({"kl_warmup": 2.5e20}, "kl_warmup2.5e20"),  # no plus sign
        ({"norm": "group", "augment": False}, "augmentfalse-normgroup"),
        ({"batch_size": 12345}, "batch_size12345"),
        ({}, ""),
    ],
)
def test_label(setting: dict[str, Any], text: str) -> None:
    assert label(setting) == text


@settings(max_examples=100, deadline=None)
@given(SPACES, st.integers(0, 1000))
def test_label_is_a_name_for_a_folder(domains: dict[str, Domain], number: int) -> None:
    setting = Space(domains).setting(0, number)
    assert re.fullmatch(r"[\w.-]{0,60}", label(setting), re.ASCII)
    assert label(dict(reversed(setting.items()))) == label(setting)


def test_long_label_is_cut() -> None:
    setting = {"likelihood": "continuous-bernoulli", "latent_dim": 1024, "schedule": "constant", "precision": "bf16"}
    assert label(setting) == "latent_dim1024-likelihoodcontinuous-bernoulli-precisionbf16-"
    assert len(label(setting)) == 60
