"""What a search has left is read as it is, ranked as by hand, and drawn so that it can be read; damage is named."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from dogvae.errors import UsageError
from tests.support.searches import SPACE, Remote, Spec, build, many, record, searched, setting
from tune import report
from tune.ranking import common_epoch, equal_time, importance, pareto, rows
from tune.report import picture, show, write
from tune.search_folder import open_search, parameters

FIVE = [
    Spec(setting(8), [7900.0, 7600.0, 7500.0], 10.0),
    Spec(setting(16, samples=3), [7950.0, None, 7450.0], 20.0),
    Spec(setting(32, lr=0.002), [8000.0], 4.0, "stopped"),
    Spec(setting(64), [], 1.0, "running"),
    Spec(setting(64, lr=0.01), [7000.0, None], 5.0, "failed", "epoch 3: the gradients were not finite"),
]


# --- reading


def test_a_search_is_read_as_far_as_it_has_come(tmp_path: Path) -> None:
    search = searched(tmp_path, FIVE)
    assert search.storage.uri == f"{tmp_path}/dogs"
    assert search.about["trials"] == 5
    assert parameters(search) == ["latent_dim", "lr", "samples"]
    first, second, *_, last = search.trials
    assert (first.number, first.name, first.setting, first.state) == (0, "00-trial", setting(8), "done")
    assert second.records == [record(0, 7950.0, 20.0), record(1, None, 20.0), record(2, 7450.0, 20.0)]
    assert [trial.epoch for trial in search.trials] == [3, 3, 1, 0, 2]
    assert [trial.seconds for trial in search.trials] == [30, 60, 4, 0, 10]
    assert [trial.best and trial.best["val_loss"] for trial in search.trials] == [7500, 7450, 8000, None, 7000]
    assert last.reason == "epoch 3: the gradients were not finite"


def test_the_best_epoch_need_not_be_the_last(tmp_path: Path) -> None:
    search = searched(tmp_path, [Spec(setting(), [7500.0, 7400.0, 7450.0]), Spec(setting(), [None, None])])
    assert search.trials[0].best == record(1, 7400.0, 10.0)
    assert search.trials[1].best is None


def test_an_unknown_search_is_told_the_others(tmp_path: Path) -> None:
    for name in ("cats", "birds"):
        build(tmp_path, [], name=name)
    (tmp_path / "a-run").mkdir()
    with pytest.raises(UsageError) as error:
        open_search(str(tmp_path), "dogs")
    assert str(error.value) == f"no search is called dogs in {tmp_path}; there are birds, cats"


def test_an_unknown_search_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no search is called dogs in .*; there is none yet"):
        open_search(str(tmp_path / "nowhere"), "dogs")


def test_a_run_is_no_search(tmp_path: Path) -> None:
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs/config.json").write_text("{}")
    with pytest.raises(UsageError, match="dogs is no search but one run; see it by tensorboard"):
        open_search(str(tmp_path), "dogs")


@pytest.mark.parametrize("name", ["../dogs", "", "a b", ".hidden"])
def test_a_name_that_no_folder_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        open_search(str(tmp_path), name)


GOOD = {"number": 0, "name": "00-trial", "setting": setting(), "state": "done", "reason": ""}
DAMAGE: dict[str, tuple[str, str | None, list[str]]] = {
    # what: (file, its new text or None to delete it, words of the message)
    "no search.json": ("search.json", None, ["dogs is damaged", "search.json is missing", "copy"]),
    "half a search.json": ("search.json", '{"format": "dog', ["dogs is damaged", "search.json makes no sense", "copy"]),
    "not UTF-8": ("search.json", "\udcff", ["dogs is damaged", "search.json makes no sense", "copy"]),
    "a list": ("search.json", "[]", ["dogs is no search", "dogvae-search", "another name"]),
    "another format": ("search.json", '{"format": "dogvae-dataset"}', ["dogs is no search", "dogvae-search"]),
    "a newer version": (
        "search.json",
        '{"format": "dogvae-search", "version": 2, "space": {}}',
        ["version 2", "newer than 1", "update DogVAE"],
    ),
    "no version": ("search.json", '{"format": "dogvae-search"}', ["search.json has no 'version'", "copy"]),
    "no space": ("search.json", '{"format": "dogvae-search", "version": 1}', ["search.json has no 'space'", "copy"]),
    "an empty space": (
        "search.json",
        '{"format": "dogvae-search", "version": 1, "space": {}}',
        ["search.json makes no sense", "nothing is searched"],
    ),
    "an unknown domain": (
        "search.json",
        '{"format": "dogvae-search", "version": 1, "space": {"lr": "normal(0,1)"}}',
        ["search.json makes no sense", "normal"],
    ),
    "no trials.json": ("trials.json", None, ["dogs is damaged", "trials.json is missing", "copy"]),
    "half a trials.json": ("trials.json", '[{"number": 0', ["trials.json makes no sense", "copy"]),
    "trials by name": ("trials.json", '{"00-trial": {}}', ["trials.json makes no sense"]),
    "a trial without state": (
        "trials.json",
        json.dumps([{k: v for k, v in GOOD.items() if k != "state"}]),
        ["trials.json has no 'state'"],
    ),
    "an unknown state": ("trials.json", json.dumps([{**GOOD, "state": "lost"}]), ["trial 0 is 'lost'", "waiting"]),
    "a number that is none": ("trials.json", json.dumps([{**GOOD, "number": "x"}]), ["'x'", "00-trial"]),
    "another setting": ("trials.json", json.dumps([{**GOOD, "setting": {"beta": 1.0}}]), ["trial 0 sets beta"]),
    "a setting of another type": (
        "trials.json",
        json.dumps([{**GOOD, "setting": {**setting(), "lr": "fast"}}]),
        ["trials.json makes no sense"],
    ),
    "half a line of metrics": (
        "trials/00-trial/metrics.jsonl",
        '{"epoch": 0, "val',
        ["00-trial is damaged", "metrics.jsonl makes no sense", "delete it to leave its epochs out"],
    ),
    "metrics without a number": (
        "trials/00-trial/metrics.jsonl",
        '{"epoch": 0, "seconds": 1.0, "val_loss": 7000.0}',
        ["metrics.jsonl has no 'val_reconstruction'"],
    ),
    "metrics that are words": (
        "trials/00-trial/metrics.jsonl",
        json.dumps({**record(0, 7000.0, 1.0), "val_loss": "low"}),
        ["metrics.jsonl makes no sense"],
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_with_a_remedy(tmp_path: Path, what: str) -> None:
    file, text, words = DAMAGE[what]
    path = build(tmp_path, [Spec(setting(), [7000.0])]) / file
    open_search(str(tmp_path), "dogs")
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError) as error:
        open_search(str(tmp_path), "dogs")
    message = str(error.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    assert str(tmp_path) in message


def test_a_search_on_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.search_folder.Storage", Remote)
    search = searched(tmp_path, FIVE)
    assert search.storage.local is None
    assert [trial.epoch for trial in search.trials] == [3, 3, 1, 0, 2]
    write(search)
    assert {"report.csv", "report.json", "report.png"} <= set(search.storage.names())
    with pytest.raises(UsageError) as error:
        open_search(str(tmp_path), "cats")
    assert str(error.value) == f"no search is called cats in {tmp_path}"


# --- the table


def test_the_table_by_hand(tmp_path: Path) -> None:
    """Trial 0 is done after 30 s, so that is the time to compare at: trial 1 has done one of its three epochs then."""
    search = searched(tmp_path, FIVE)
    assert equal_time(search) == 30.0
    names = ["rank", "trial", "latent_dim", "lr", "samples", "state", "epochs", "loss", "reconstruction", "kl"]
    names += ["explained", "seconds", "images_per_s", "loss_at_equal_time", "reason"]
    nothing = [None] * 4
    failure = "epoch 3: the gradients were not finite"
    assert [list(row.values()) for row in rows(search)] == [
        [1, 1, 16, 0.001, 3, "done", 3, 7450.0, 7348.0, 102.0, 0.55, 60.0, 31.0, 7950.0, ""],
        [2, 0, 8, 0.001, 1, "done", 3, 7500.0, 7398.0, 102.0, 0.5, 30.0, 61.0, 7500.0, ""],
        [3, 2, 32, 0.002, 1, "stopped", 1, 8000.0, 7900.0, 100.0, 0.0, 4.0, 150.0, 8000.0, ""],
        [None, 3, 64, 0.001, 1, "running", 0, *nothing, 0.0, None, None, ""],
        [None, 4, 64, 0.01, 1, "failed", 2, 7000.0, 6900.0, 100.0, 1.0, 10.0, 120.5, 7000.0, failure],
    ]
    assert all(list(row) == names for row in rows(search))


def test_equal_time_while_no_trial_is_done(tmp_path: Path) -> None:
    """What all have reached, but for those that failed or have nothing."""
    specs = [
        Spec(setting(), [8000.0] * 5, 10.0, "running"),
        Spec(setting(), [7900.0, 7800.0], 15.0, "stopped"),
        Spec(setting(), [9000.0], 1.0, "failed"),
        Spec(setting(), [], 1.0, "waiting"),
    ]
    assert equal_time(searched(tmp_path, specs)) == 30.0


def test_there_is_no_equal_time_before_the_first_epoch(tmp_path: Path) -> None:
    search = searched(tmp_path, [Spec(setting(), [], state="running")])
    assert equal_time(search) is None
    assert rows(search)[0]["loss_at_equal_time"] is None


def test_a_slow_trial_has_no_loss_at_equal_time(tmp_path: Path) -> None:
    search = searched(tmp_path, [Spec(setting(), [7500.0] * 3, 10.0), Spec(setting(), [7400.0] * 3, 31.0)])
    assert {row["trial"]: row["loss_at_equal_time"] for row in rows(search)} == {0: 7500.0, 1: None}


def test_ties_are_broken_by_the_trials_number(tmp_path: Path) -> None:
    specs = [Spec(setting(), [7500.0]), Spec(setting(), [7400.0]), Spec(setting(), [7500.0]), Spec(setting(), [7400.0])]
    assert [row["trial"] for row in rows(searched(tmp_path, specs))] == [1, 3, 0, 2]


def test_failed_ones_are_last_and_those_without_a_finite_loss_before_them(tmp_path: Path) -> None:
    specs = [
        Spec(setting(), [], state="failed"),
        Spec(setting(), [7000.0], state="failed"),
        Spec(setting(), [None, None], state="stopped"),
        Spec(setting(), [], state="waiting"),
        Spec(setting(), [7500.0], state="running"),
    ]
    assert [(row["trial"], row["rank"]) for row in rows(searched(tmp_path, specs))] == [
        (4, 1),
        (2, None),
        (3, None),
        (0, None),
        (1, None),
    ]


def test_nan_in_the_metrics_is_no_loss(tmp_path: Path) -> None:
    """Ours are null, but Python reads NaN where another writer leaves it."""
    search = searched(tmp_path, [Spec(setting(), [math.nan, 7500.0, math.inf]), Spec(setting(), [math.nan])])
    assert [row["loss"] for row in rows(search)] == [7500.0, None]
    assert rows(search)[1]["loss_at_equal_time"] is None


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12))
def test_pareto_is_what_no_other_dominates(points: list[tuple[int, int]]) -> None:
    """Few values, so that there are ties: equal points do not dominate each other."""
    table = [{"trial": i, "seconds": s, "loss": x, "state": "done"} for i, (s, x) in enumerate(points)]
    expected = {
        i for i, (s, x) in enumerate(points) if not any(s2 <= s and x2 <= x and (s2, x2) != (s, x) for s2, x2 in points)
    }
    front = pareto(table)
    assert {row["trial"] for row in front} == expected
    assert [row["seconds"] for row in front] == sorted(row["seconds"] for row in front)


def test_failed_trials_are_not_on_the_front(tmp_path: Path) -> None:
    assert [row["trial"] for row in pareto(rows(searched(tmp_path, FIVE)))] == [2, 0, 1]


# --- importance


def epsilon_squared(groups: list[list[float]]) -> float:
    """Kelley's own form: (SS between - df between * MS within) / SS total."""
    everyone = [x for group in groups for x in group]
    mean = sum(everyone) / len(everyone)
    within = sum((x - sum(group) / len(group)) ** 2 for group in groups for x in group)
    total = sum((x - mean) ** 2 for x in everyone)
    between = total - within
    k, n = len(groups), len(everyone)
    return (between - (k - 1) * within / (n - k)) / total


def test_importance_of_a_choice_is_the_corrected_correlation_ratio(tmp_path: Path) -> None:
    groups = {8: [7600.0, 7620.0, 7590.0], 16: [7500.0, 7530.0], 32: [7400.0, 7450.0, 7480.0, 7390.0]}
    specs = [Spec(setting(dim), [loss]) for dim, losses in groups.items() for loss in losses]
    share = importance(searched(tmp_path, specs))["latent_dim"]
    assert share == pytest.approx(epsilon_squared(list(groups.values())))
    assert share == pytest.approx((51683.33 - 2 * 6316.67 / 6) / 58000, abs=1e-6)  # the sums of squares by hand


@pytest.mark.parametrize("kind", ["loguniform", "uniform"])
def test_importance_of_a_range_is_the_corrected_fit_of_a_parabola(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    lr = np.exp(rng.uniform(math.log(1e-4), math.log(1e-2), 15))
    y = 7300 + 150 * np.log10(lr / 1e-3) ** 2 + rng.normal(0, 30, 15)
    specs = [Spec({"lr": float(v)}, [float(loss)]) for v, loss in zip(lr, y, strict=True)]
    share = importance(searched(tmp_path, specs, {"lr": f"{kind}(0.0001,0.01)"}))["lr"]
    x = np.log(lr) if kind == "loguniform" else lr
    _, residual, *_ = np.polyfit(x, y, 2, full=True)
    assert share == pytest.approx(1 - residual[0] / 12 / (np.var(y) * 15 / 14), rel=1e-6)


def test_a_good_value_in_the_middle_counts(tmp_path: Path) -> None:
    """A valley, to which any measure of rising or falling is blind."""
    rates = [1e-4 * 100 ** (i / 10) for i in range(11)]
    specs = [Spec({"lr": lr}, [7300 + 100 * math.log10(lr / 1e-3) ** 2]) for lr in rates]
    assert importance(searched(tmp_path, specs, {"lr": "loguniform(0.0001,0.01)"}))["lr"] == pytest.approx(1.0)


def test_what_has_no_influence_gets_none(tmp_path: Path) -> None:
    """Uncorrected, chance would give 3 groups among 8 trials 0.29 on average, and a parabola as much."""
    rng = np.random.default_rng(1)
    shares: dict[str, list[float]] = {"samples": [], "beta": []}
    for i in range(100):
        specs = [
            Spec({"samples": (1, 3, 10)[n % 3], "beta": float(rng.random())}, [float(rng.normal(7500, 50))])
            for n in range(8)
        ]
        space = {"samples": "choice(1,3,10)", "beta": "uniform(0,1)"}
        for name, share in importance(searched(tmp_path / str(i), specs, space)).items():
            assert share is not None
            assert 0 <= share <= 1
            shares[name].append(share)
    assert np.median(shares["samples"]) < 0.05
    assert np.median(shares["beta"]) < 0.05


def test_importance_is_told_at_the_last_epoch_that_all_have_reached(tmp_path: Path) -> None:
    """There samples decides; what the longer ones did afterwards, by latent_dim, does not count."""
    specs = [
        Spec(setting(8, samples=1), [9000.0, 7500.0, 7000.0]),
        Spec(setting(64, samples=1), [9100.0, 7501.0, 6000.0]),
        Spec(setting(8, samples=3), [9100.0, 7600.0], state="stopped"),
        Spec(setting(64, samples=3), [9000.0, 7601.0], state="running"),
        Spec(setting(64, samples=3), [9900.0], state="failed"),
        Spec(setting(8, samples=3), [9900.0, 9900.0, 9900.0], state="failed"),
        Spec(setting(64, samples=3), [], state="running"),
    ]
    search = searched(tmp_path, specs)
    assert common_epoch(search) == 2
    shares = importance(search)
    assert shares["samples"] == pytest.approx(epsilon_squared([[7500.0, 7501.0], [7600.0, 7601.0]]))
    assert shares["latent_dim"] == 0.0


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [Spec(setting(dim, lr, k), [7000.0 + dim]) for dim, lr, k in ((8, 1e-3, 1), (8, 2e-3, 3), (16, 3e-3, 1))],
        [Spec(setting(dim, lr, k), [7000.1]) for dim, lr, k in 2 * ((8, 1e-3, 1), (8, 2e-3, 3), (16, 3e-3, 1))],
        [Spec(setting(), [7000.0 + i]) for i in range(6)],
        [Spec(setting(8 * 2**i, 1e-3, 1), [7000.0 + i]) for i in range(4)],
        [Spec(setting(8, 1e-3, 1 if i else 3), [7000.0 + i if i < 3 else None]) for i in range(6)],
    ],
    ids=["none", "three trials", "all losses equal", "nothing varies", "as many groups as trials", "three are finite"],
)
def test_importance_that_cannot_be_told(tmp_path: Path, specs: list[Spec]) -> None:
    assert importance(searched(tmp_path, specs)) == {"latent_dim": None, "lr": None, "samples": None}


# --- the files


def strict(text: str) -> Any:
    """JSON as others read it: without NaN and Infinity, which only Python knows."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_files_say_what_the_table_says(tmp_path: Path) -> None:
    search = searched(tmp_path, FIVE)
    write(search)
    about = strict((tmp_path / "dogs/report.json").read_text())
    assert about == {"equal_time_s": 30.0, "importance": importance(search), "trials": rows(search)}
    with (tmp_path / "dogs/report.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [list(row) for row in table] == [list(rows(search)[0])] * 5
    for read, row in zip(table, rows(search), strict=True):
        assert list(read.values()) == ["" if value is None else str(value) for value in row.values()]


def test_files_of_a_search_without_trials(tmp_path: Path) -> None:
    write(searched(tmp_path, []))
    assert strict((tmp_path / "dogs/report.json").read_text())["trials"] == []
    assert (tmp_path / "dogs/report.csv").read_text().startswith("rank,trial,latent_dim,lr,samples")


def test_files_that_are_not_finite_are_still_json(tmp_path: Path) -> None:
    folder = build(tmp_path, [Spec(setting(), [7000.0])])
    path = folder / "trials/00-trial/metrics.jsonl"
    path.write_text(path.read_text().replace('"val_explained": 1.0', '"val_explained": NaN'))
    assert "NaN" in path.read_text()
    write(open_search(str(tmp_path), "dogs"))
    assert strict((folder / "report.json").read_text())["trials"][0]["explained"] is None


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    search = searched(tmp_path, FIVE)
    (tmp_path / "dogs/report.json").mkdir()
    with pytest.raises(UsageError, match=r"dogs cannot be written to: .*report\.json"):
        write(search)


# --- the picture

EIGHT = {**SPACE, "width": "randint(16,64)", "norm": "choice(group,batch)", "beta": "uniform(0.5,2)"}
EIGHT |= {"augment": "choice(true,false)", "lr_warmup": "loguniform(0.5,3)"}
LONG = {"likelihood": "choice(bernoulli,continuous-bernoulli,gaussian)", "ema": "uniform(0.99,0.9999)"}
LONG |= {"lr": "choice(0.0001,0.0002,0.0005,0.001,0.002,0.004,0.005,0.007,0.01)", "precision": "choice(fp32,bf16)"}
CASES: dict[str, tuple[list[Spec], dict[str, str]]] = {
    "one": (many(1), SPACE),
    "one of one epoch": (many(1, epochs=1), SPACE),
    "twelve": (many(12), SPACE),
    "forty": (many(40), SPACE),
    "one parameter": (many(12, {"lr": SPACE["lr"]}), {"lr": SPACE["lr"]}),
    "eight parameters": (many(40, EIGHT), EIGHT),
    "long labels": (many(20, LONG), LONG),
    "a failed, a running, an empty, a diverged one": ([*FIVE, Spec(setting(), [1e9], 7.0)], SPACE),
    "equal": ([Spec(setting(), [7000.0])] * 5, SPACE),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved: what is in a picture is easier asked of them."""
    figures = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def texts(figure: Figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in figure.findobj(Text) if text.get_text()]


def panels(figure: Figure) -> dict[str, Axes]:
    """The axes by what their x axis says."""
    return {axes.get_xlabel(): axes for axes in figure.axes}


@pytest.mark.parametrize("case", ["one", "forty", "eight parameters"])
def test_picture_has_its_size_and_is_no_blank(tmp_path: Path, case: str) -> None:
    image = Image.open(io.BytesIO(picture(searched(tmp_path, *CASES[case]))))
    assert (image.format, image.size) == ("PNG", (1500, 900))
    colours = image.convert("RGB").getcolors(1500 * 900)
    assert colours is not None
    assert len(colours) > 100
    white = next(count for count, colour in colours if colour == (255, 255, 255))
    assert 0.5 < white / (1500 * 900) < 0.99


@pytest.mark.parametrize("case", CASES)
def test_no_two_words_of_the_picture_overlap(tmp_path: Path, drawn: list[Figure], case: str) -> None:
    picture(searched(tmp_path, *CASES[case]))
    hidden = set()
    for axes in drawn[0].axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    boxes = [
        (text.get_text(), Bbox(Text.get_window_extent(text)))
        for text in drawn[0].findobj(Text)
        if text.get_text() and text.get_visible() and text not in hidden
    ]
    assert len(boxes) > 20
    assert [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.overlaps(two)] == []
    places = [(text, box, Bbox([[0, 0], [1500, 900]])) for text, box in boxes]
    places += [(t.get_text(), Text.get_window_extent(t), axes.bbox) for axes in drawn[0].axes for t in axes.texts]
    assert [text for text, box, room in places if not (room.contains(*box.min) and room.contains(*box.max))] == []


@pytest.mark.parametrize("specs", [[], [Spec(setting(), [], state="running"), Spec(setting(), [None], state="failed")]])
def test_picture_before_the_first_epoch_says_so(tmp_path: Path, drawn: list[Figure], specs: list[Spec]) -> None:
    image = Image.open(io.BytesIO(picture(searched(tmp_path, specs))))
    assert image.size == (1500, 900)
    assert texts(drawn[0]) == [f"dogs: no epoch yet in {len(specs)} trials"]


def test_picture_answers_which_is_best(tmp_path: Path, drawn: list[Figure]) -> None:
    picture(searched(tmp_path, FIVE))
    said = texts(drawn[0])
    assert "dogs: best of 5 is trial 1 (latent_dim 16, lr 0.001, samples 3): 7,450.0 nats per image" in said
    assert {"trial 1: 16", "trial 1: 0.001", "trial 1: 3", "trial 1, the best"} <= set(said)
    assert {"loss (nats per image)", "best loss so far (nats per image)"} <= set(said)
    assert {"time of training and validation (s)", "epochs done"} <= set(said)
    axes = panels(drawn[0])["lr"]
    ring = axes.collections[-1]
    assert np.asarray(ring.get_offsets()).tolist() == [[0.001, 7450.0]]
    assert np.asarray(ring.get_facecolor()).size == 0


def test_each_parameter_has_its_axis(tmp_path: Path, drawn: list[Figure]) -> None:
    space = {"lr": SPACE["lr"], "beta": "uniform(0.5,2)", "samples": SPACE["samples"], "norm": "choice(group,batch)"}
    picture(searched(tmp_path, many(12, space), space))
    axes = panels(drawn[0])
    assert {name: axes[name].get_xscale() for name in ("lr", "beta", "samples")} == {
        "lr": "log",
        "beta": "linear",
        "samples": "linear",
    }
    assert axes["lr"].get_xlim()[0] < 0.0001 < 0.01 < axes["lr"].get_xlim()[1]
    assert [tick.get_text() for tick in axes["samples"].get_xticklabels()] == ["1", "3", "10"]
    assert axes["samples"].get_xticks().tolist() == [0, 1, 2]


def test_the_four_most_important_parameters_are_drawn_and_all_are_weighed(tmp_path: Path, drawn: list[Figure]) -> None:
    search = searched(tmp_path, many(40, EIGHT), EIGHT)
    picture(search)
    shares = importance(search)
    first = sorted(EIGHT, key=lambda name: -(shares[name] or 0))[:4]
    assert first[0] == "lr"
    assert [name for name in panels(drawn[0]) if name in EIGHT] == first
    bars = next(axes for label, axes in panels(drawn[0]).items() if label.startswith("share of the variance"))
    assert {tick.get_text() for tick in bars.get_yticklabels()} == set(EIGHT)
    assert sorted(bar.get_width() for bar in bars.findobj(Rectangle) if bar in bars.patches) == pytest.approx(
        sorted(share or 0 for share in shares.values())
    )


def test_terrible_losses_do_not_squeeze_the_good_ones(tmp_path: Path, drawn: list[Figure]) -> None:
    """In neither panel: a first epoch of 20,000 nats, and a trial that ends at 90,000."""
    specs = [Spec(setting(), [20000.0, *(7500.0 - 10 * i - e for e in range(9))], 5.0 + i) for i in range(8)]
    picture(searched(tmp_path, [*specs, Spec(setting(lr=0.01), [90000.0], 5.0, "stopped")]))
    axes = panels(drawn[0])
    for name in ("lr", "time of training and validation (s)"):
        low, high = axes[name].get_ylim()
        assert low < 7422 < 7492 < high < 8000
    triangle = np.asarray(axes["lr"].collections[0].get_offsets())
    assert triangle.tolist() == [[0.01, pytest.approx(axes["lr"].get_ylim()[1], abs=10)]]


def test_trials_that_ended_early_are_thin_and_grey(tmp_path: Path, drawn: list[Figure]) -> None:
    picture(searched(tmp_path, [*FIVE, Spec(setting(), [7990.0, 7980.0, 8010.0], 3.0, "running")]))
    lines = {
        tuple(np.asarray(line.get_ydata()).tolist()): (to_hex(line.get_color()).upper(), line.get_linewidth())
        for line in panels(drawn[0])["time of training and validation (s)"].lines
    }
    assert lines[(7950.0, 7450.0)] == (report.BEST, 3.2)
    assert lines[(7900.0, 7600.0, 7500.0)] == (report.ALIVE, 1.6)
    assert lines[(7990.0, 7980.0, 7980.0)] == (report.ALIVE, 1.6)  # the best so far
    assert lines[(8000.0,)] == lines[(7000.0,)] == (report.ENDED, 0.9)


def test_the_front_is_marked_and_numbered(tmp_path: Path, drawn: list[Figure]) -> None:
    search = searched(tmp_path, FIVE)
    picture(search)
    axes = panels(drawn[0])["time of training and validation (s)"]
    marked = next(line for line in axes.lines if line.get_marker() == "D")
    assert np.array(marked.get_xydata()).tolist() == [[4.0, 8000.0], [30.0, 7500.0], [60.0, 7450.0]]
    stairs = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert np.array(stairs.get_ydata()).tolist() == [8000.0, 7500.0, 7450.0, 7450.0]
    assert {text.get_text() for text in axes.texts} == {"0", "1", "2"}


def test_where_there_is_no_room_for_all_numbers_the_best_has_its_own(tmp_path: Path, drawn: list[Figure]) -> None:
    picture(searched(tmp_path, [Spec(setting(), [7500.0])] * 3))
    axes = panels(drawn[0])["time of training and validation (s)"]
    assert [text.get_text() for text in axes.texts] == ["0"]


def test_time_is_on_a_log_axis_if_trials_ended_long_before_others(tmp_path: Path, drawn: list[Figure]) -> None:
    for i, early in enumerate((4.0, 40.0)):
        picture(searched(tmp_path / str(i), [Spec(setting(), [7500.0], 34.0), Spec(setting(), [7600.0], early)]))
    name = "time of training and validation (s)"
    assert [panels(figure)[name].get_xscale() for figure in drawn] == ["log", "linear"]
    assert not any("$" in text for text in texts(drawn[0]))  # seconds as plain numbers


def test_matplotlib_is_loaded_late_and_needs_no_display() -> None:
    code = "import sys, tune.report; assert not {'matplotlib', 'torch', 'ray'} & set(sys.modules); print('late')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "late\n"
    code = (
        "import sys, tune.report as r, tune.ranking as t; from dogvae.storage import Storage\n"
        "trial = t.Trial(0, '0', {'beta': 1.0}, 'done', '', records=[])\n"
        "r.picture(t.Search(Storage('.'), {'space': {'beta': 'uniform(0,2)'}}, [trial]))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules; print('no pyplot')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "no pyplot\n"


# --- the console


def test_plain_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = searched(tmp_path, FIVE)
    write(search)
    (tmp_path / "dogs/export").mkdir()
    show(search)
    at = f"{tmp_path}/dogs"
    assert capsys.readouterr().out.splitlines() == [
        "rank  trial  latent_dim     lr  samples  epochs     loss  reconstruction     KL  seconds  images/s  at 30 s"
        "    state",
        "   1      1          16  0.001        3       3  7,450.0         7,348.0  102.0       60        31  7,950.0"
        "     done",
        "   2      0           8  0.001        1       3  7,500.0         7,398.0  102.0       30        61  7,500.0"
        "     done",
        "   3      2          32  0.002        1       1  8,000.0         7,900.0  100.0        4       150  8,000.0"
        "  stopped",
        "   -      3          64  0.001        1       0        -               -      -        0         -        -"
        "  running",
        "   -      4          64   0.01        1       2  7,000.0         6,900.0  100.0       10       120  7,000.0"
        "   failed",
        "best of 5 is trial 1 (latent_dim 16, lr 0.001, samples 3): 7,450.0 nats per image",
        "share of the loss's variance that each explains alone, after epoch 1: latent_dim not known, lr not known, "
        "samples not known",
        f"see {at}/report.csv, {at}/report.json, {at}/report.png, {at}/export",
        "trial 4 failed: epoch 3: the gradients were not finite",
    ]


def test_importances_are_shown_in_percent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs = [Spec(setting(8 * 2 ** (i % 2)), [7000.0 + 100 * (i % 2) + i]) for i in range(6)]
    search = searched(tmp_path, specs)
    assert importance(search)["latent_dim"] == pytest.approx(0.9986, abs=1e-3)
    show(search)
    assert "after epoch 1: latent_dim 100%, lr not known, samples not known\n" in capsys.readouterr().out


def test_table_before_the_first_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(searched(tmp_path, [Spec(setting(), [], state="running")]))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "   -      0          32  0.001        1       0     -               -   -        0         -              -"
        "  running",
        "no epoch yet in 1 trial",
    ]


def test_a_decay_close_to_1_is_not_shown_as_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(searched(tmp_path, [Spec({"ema": 0.9995}, [7000.0])], {"ema": "uniform(0.9,0.9999)"}))
    assert "best of 1 is trial 0 (ema 0.9995)" in capsys.readouterr().out


@pytest.mark.parametrize(("columns", "left_out"), [(200, []), (90, ["reconstruction", "KL", "images/s"])])
def test_a_terminal_gets_the_columns_that_fit(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    left_out: list[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show(searched(tmp_path, FIVE))
    table = capsys.readouterr().out.split("best of")[0]
    assert len(table.splitlines()) == 6  # nothing is folded
    for title in ("trial", "latent_dim", "loss", "reconstruction", "KL", "seconds", "images/s", "at 30 s", "state"):
        assert (title in table) == (title not in left_out), title
    assert "7,450.0" in table
