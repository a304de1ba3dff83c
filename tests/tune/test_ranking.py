"""The ranking of trials against tables by hand, the Pareto front, importances against their formulas, the best run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dogvae.errors import UsageError
from tests.support.searches import FIVE, PLAN, Spec, searched, setting
from tune.ranking import best_run, common_epoch, equal_time, importance, pareto, rows


def test_table_of_five_trials_by_hand(tmp_path: Path) -> None:
    """Trial 0 is done after 30 s, the equal time. Trial 1 has then done one of its three epochs."""
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
    assert [row["trial"] for row in pareto(rows(search))] == [2, 0, 1]


def test_equal_time_while_no_trial_is_done_is_what_all_have_reached(tmp_path: Path) -> None:
    specs = [
        Spec(setting(), [8000.0] * 5, 10.0, "running"),
        Spec(setting(), [7900.0, 7800.0], 15.0, "stopped"),
        Spec(setting(), [9000.0], 1.0, "failed"),
        Spec(setting(), [], 1.0, "waiting"),
    ]
    assert equal_time(searched(tmp_path / "a", specs)) == 30.0
    empty = searched(tmp_path / "b", [Spec(setting(), [], state="running")])
    assert (equal_time(empty), rows(empty)[0]["loss_at_equal_time"]) == (None, None)


def test_rank_is_by_loss_then_number_and_failed_trials_come_last(tmp_path: Path) -> None:
    specs = [
        Spec(setting(), [], state="failed"),
        Spec(setting(), [7000.0], state="failed"),
        Spec(setting(), [None, None], state="stopped"),
        Spec(setting(), [], state="waiting"),
        Spec(setting(), [7500.0], state="running"),
        Spec(setting(), [7400.0]),
        Spec(setting(), [7500.0]),
    ]
    ranked = [(5, 1), (4, 2), (6, 3), (2, None), (3, None), (0, None), (1, None)]
    assert [(row["trial"], row["rank"]) for row in rows(searched(tmp_path, specs))] == ranked


def test_nan_and_epochs_after_the_equal_time_are_no_loss(tmp_path: Path) -> None:
    """DogVAE writes null, but Python also reads the NaN of another writer."""
    specs = [
        Spec(setting(), [math.nan, 7500.0, math.inf]),
        Spec(setting(), [7600.0], 31.0),
        Spec(setting(), [math.nan]),
    ]
    table = [(row["loss"], row["loss_at_equal_time"]) for row in rows(searched(tmp_path, specs))]
    assert table == [(7500.0, None), (7600.0, None), (None, None)]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12))
def test_pareto_front_has_the_rows_that_no_other_dominates(points: list[tuple[int, int]]) -> None:
    """Few values, so that there are ties: equal points do not dominate each other."""
    table = [{"trial": i, "seconds": s, "loss": x, "state": "done"} for i, (s, x) in enumerate(points)]
    expected = {
        i for i, (s, x) in enumerate(points) if not any(s2 <= s and x2 <= x and (s2, x2) != (s, x) for s2, x2 in points)
    }
    front = pareto(table)
    assert {row["trial"] for row in front} == expected
    assert [row["seconds"] for row in front] == sorted(row["seconds"] for row in front)


# --- importance


def epsilon_squared(groups: list[list[float]]) -> float:
    """Kelley's own form: (SS between - df between * MS within) / SS total."""
    everyone = [x for group in groups for x in group]
    mean = sum(everyone) / len(everyone)
    within = sum((x - sum(group) / len(group)) ** 2 for group in groups for x in group)
    total = sum((x - mean) ** 2 for x in everyone)
    k, n = len(groups), len(everyone)
    return (total - within - (k - 1) * within / (n - k)) / total


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


def test_importance_compares_the_last_epoch_that_all_have_reached(tmp_path: Path) -> None:
    """There samples decides; what the longer trials did afterwards, by latent_dim, does not count."""
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
def test_importance_is_none_where_the_trials_cannot_say(tmp_path: Path, specs: list[Spec]) -> None:
    assert importance(searched(tmp_path, specs)) == {"latent_dim": None, "lr": None, "samples": None}


# --- the best run


def test_best_run_is_the_first_of_the_ranking_with_its_config(tmp_path: Path) -> None:
    run, config = best_run(searched(tmp_path, FIVE))
    assert run.uri == f"{tmp_path}/dogs/trials/01-latent_dim16-lr0.001-samples3"
    assert config == PLAN.config.replace(**FIVE[1].setting)


@pytest.mark.parametrize("spec", [Spec(setting()), Spec(setting(), [None]), Spec(setting(), [100.0], state="failed")])
def test_there_is_no_best_run_without_a_ranked_trial(spec: Spec, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^no trial of .*/dogs has finished an epoch$"):
        best_run(searched(tmp_path, [spec]))


@pytest.mark.parametrize("text", ['{"mod', None])
def test_damaged_config_of_the_best_run_is_named(text: str | None, tmp_path: Path) -> None:
    search = searched(tmp_path, [Spec(setting(), [500.0])])
    (file,) = tmp_path.rglob("config.json")
    file.write_text(text) if text else file.unlink()
    with pytest.raises(UsageError, match=r"config\.json"):
        best_run(search)
