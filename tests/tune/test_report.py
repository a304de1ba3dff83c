"""The report's files against the ranking, and its table on the console and on a terminal."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dogvae.errors import UsageError
from tests.support.searches import FIVE, SPACE, Remote, Spec, searched, setting
from tune.ranking import importance, rows
from tune.report import show, write


def strict_json(text: str) -> Any:
    """JSON without NaN and Infinity, which only Python reads."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_files_have_the_numbers_of_the_ranking(tmp_path: Path) -> None:
    search = searched(tmp_path, FIVE)
    write(search)
    about = strict_json((tmp_path / "dogs/report.json").read_text())
    assert about == {"equal_time_s": 30.0, "importance": importance(search), "trials": rows(search)}
    with (tmp_path / "dogs/report.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [list(row) for row in table] == [list(rows(search)[0])] * 5
    for read, row in zip(table, rows(search), strict=True):
        assert list(read.values()) == ["" if value is None else str(value) for value in row.values()]


def test_files_without_trials_and_on_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.search_folder.Storage", Remote)
    search = searched(tmp_path, [])
    write(search)
    assert {"report.csv", "report.json", "report.png"} <= set(search.storage.names())
    assert strict_json(search.storage.read("report.json").decode())["trials"] == []
    assert search.storage.read("report.csv").startswith(b"rank,trial,latent_dim,lr,samples")


def test_nan_in_the_metrics_is_null_in_report_json(tmp_path: Path) -> None:
    search = searched(tmp_path, [Spec(setting(), [7000.0])])
    search.trials[0].records[0]["val_explained"] = float("nan")
    write(search)
    assert strict_json((tmp_path / "dogs/report.json").read_text())["trials"][0]["explained"] is None


def test_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    search = searched(tmp_path, FIVE)
    (tmp_path / "dogs/report.json").mkdir()
    with pytest.raises(UsageError, match=r"dogs cannot be written to: .*report\.json"):
        write(search)


def test_matplotlib_is_imported_late_and_without_pyplot() -> None:
    code = (
        "import sys, tune.report as r, tune.search_folder as f; from dogvae.storage import Storage\n"
        "assert not {'matplotlib', 'torch', 'ray'} & set(sys.modules)\n"
        "trial = f.Trial(0, '0', {'beta': 1.0}, 'done', '', records=[])\n"
        "r.picture(f.Search(Storage('.'), {'space': {'beta': 'uniform(0,2)'}}, [trial]))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules; print('late')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "late\n"


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
        *(f"see {at}/{name}" for name in ("report.csv", "report.json", "report.png", "export")),
        "trial 4 failed: epoch 3: the gradients were not finite",
    ]


SHARES = "share of the loss variance that each setting alone explains, after epoch 1: "


@pytest.mark.parametrize(
    ("specs", "space", "line"),
    [
        ([Spec(setting(8 * 2 ** (i % 2)), [7000.0 + 100 * (i % 2) + i]) for i in range(10)], SPACE,
         SHARES + "latent_dim 100%, lr not known, samples not known"),
        ([Spec(setting(), state="running")], SPACE, "no epoch yet in 1 trial"),
        ([Spec({"ema": 0.9995}, [7000.0])], {"ema": "uniform(0.9,0.9999)"},
         "best of 1 is trial 0 (ema 0.9995): 7,000.0 nats per image"),
    ],
    ids=["importances in percent", "no epoch yet", "a decay that is not 1"],
)  # fmt: skip
def test_lines_below_the_table(
    specs: list[Spec], space: dict[str, str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(searched(tmp_path, specs, space))
    lines = capsys.readouterr().out.splitlines()
    assert line in lines
    assert any(SHARES in line for line in lines) == (len(specs) >= 10)


@pytest.mark.parametrize(("columns", "left_out"), [(200, []), (90, ["reconstruction", "KL", "images/s"])])
def test_terminal_gets_the_columns_that_fit(
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
