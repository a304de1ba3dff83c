"""The picture of the report: its size, its words without overlap, its axes and panels, and the Pareto front."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from tests.support.searches import FIVE, SPACE, Spec, many, searched, setting
from tune import report
from tune.ranking import importance
from tune.report import picture

TIME = "time of training and validation (s)"
EIGHT = {**SPACE, "width": "randint(16,64)", "likelihood": "choice(gaussian,bernoulli)", "beta": "uniform(0.5,2)"}
EIGHT |= {"augment": "choice(true,false)", "lr_warmup": "loguniform(0.5,3)"}
LONG = {
    "likelihood": "choice(gaussian,bernoulli)",
    "schedule": "choice(constant,cosine)",
    "ema": "uniform(0.99,0.9999)",
}
LONG |= {"lr": "choice(0.0001,0.0002,0.0005,0.001,0.002,0.004,0.005,0.007,0.01)", "precision": "choice(fp32,bf16)"}
CASES: dict[str, tuple[list[Spec], dict[str, str]]] = {
    "one": (many(1), SPACE),
    "one of one epoch": (many(1, epochs=1), SPACE),
    "forty": (many(40), SPACE),
    "one parameter": (many(12, {"lr": SPACE["lr"]}), {"lr": SPACE["lr"]}),
    "eight parameters": (many(40, EIGHT), EIGHT),
    "long labels": (many(20, LONG), LONG),
    "a failed, a running, an empty, a diverged one": ([*FIVE, Spec(setting(), [1e9], 7.0)], SPACE),
    "equal": ([Spec(setting(), [7000.0])] * 5, SPACE),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved: their parts are easier to check than pixels."""
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
    """The axes by their x label."""
    return {axes.get_xlabel(): axes for axes in figure.axes}


@pytest.mark.parametrize("case", CASES)
def test_picture_is_drawn_to_size_and_no_two_words_overlap(tmp_path: Path, drawn: list[Figure], case: str) -> None:
    image = Image.open(io.BytesIO(picture(searched(tmp_path, *CASES[case]))))
    assert (image.format, image.size) == ("PNG", (1500, 900))
    colours = image.convert("RGB").getcolors(1500 * 900)
    assert colours is not None
    assert len(colours) > 100
    white = next(count for count, colour in colours if colour == (255, 255, 255))
    assert 0.5 < white / (1500 * 900) < 0.99
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


@pytest.mark.parametrize("specs", [[], [Spec(setting(), state="running"), Spec(setting(), [None], state="failed")]])
def test_picture_before_the_first_epoch_says_so(tmp_path: Path, drawn: list[Figure], specs: list[Spec]) -> None:
    image = Image.open(io.BytesIO(picture(searched(tmp_path, specs))))
    assert image.size == (1500, 900)
    assert texts(drawn[0]) == [f"dogs: no epoch yet in {len(specs)} trials"]


def test_picture_names_and_rings_the_best_trial(tmp_path: Path, drawn: list[Figure]) -> None:
    picture(searched(tmp_path, FIVE))
    said = texts(drawn[0])
    assert "dogs: best of 5 is trial 1 (latent_dim 16, lr 0.001, samples 3): 7,450.0 nats per image" in said
    assert {"trial 1: 16", "trial 1: 0.001", "trial 1: 3", "trial 1, the best"} <= set(said)
    assert {"loss (nats per image)", "best loss so far (nats per image)", TIME, "epochs done"} <= set(said)
    ring = panels(drawn[0])["lr"].collections[-1]
    assert np.asarray(ring.get_offsets()).tolist() == [[0.001, 7450.0]]
    assert np.asarray(ring.get_facecolor()).size == 0


def test_each_parameter_has_the_axis_of_its_domain(tmp_path: Path, drawn: list[Figure]) -> None:
    space = {
        "lr": SPACE["lr"],
        "beta": "uniform(0.5,2)",
        "samples": SPACE["samples"],
        "likelihood": "choice(gaussian,bernoulli)",
    }
    picture(searched(tmp_path, many(12, space), space))
    axes = panels(drawn[0])
    assert [axes[name].get_xscale() for name in ("lr", "beta", "samples")] == ["log", "linear", "linear"]
    assert axes["lr"].get_xlim()[0] < 0.0001 < 0.01 < axes["lr"].get_xlim()[1]
    assert [tick.get_text() for tick in axes["samples"].get_xticklabels()] == ["1", "3", "10"]
    assert axes["samples"].get_xticks().tolist() == [0, 1, 2]


def test_four_most_important_parameters_have_panels_and_all_have_bars(tmp_path: Path, drawn: list[Figure]) -> None:
    search = searched(tmp_path, many(40, EIGHT), EIGHT)
    picture(search)
    shares = importance(search)
    first = sorted(EIGHT, key=lambda name: -(shares[name] or 0))[:4]
    assert first[0] == "lr"
    assert [name for name in panels(drawn[0]) if name in EIGHT] == first
    bars = next(axes for label, axes in panels(drawn[0]).items() if label.startswith("share of the variance"))
    assert {tick.get_text() for tick in bars.get_yticklabels()} == set(EIGHT)
    widths = sorted(bar.get_width() for bar in bars.findobj(Rectangle) if bar in bars.patches)
    assert widths == pytest.approx(sorted(share or 0 for share in shares.values()))


def test_importances_of_few_trials_are_not_shown(tmp_path: Path, drawn: list[Figure]) -> None:
    for n in (9, 10):
        picture(searched(tmp_path / str(n), many(n), SPACE))
    few, enough = (any(label.startswith("share of the variance") for label in panels(figure)) for figure in drawn)
    assert (few, enough) == (False, True)


def test_terrible_losses_do_not_squeeze_the_good_ones(tmp_path: Path, drawn: list[Figure]) -> None:
    """In neither panel: a first epoch of 20,000 nats, and a trial that ends at 90,000."""
    specs = [Spec(setting(), [20000.0, *(7500.0 - 10 * i - e for e in range(9))], 5.0 + i) for i in range(8)]
    picture(searched(tmp_path, [*specs, Spec(setting(lr=0.01), [90000.0], 5.0, "stopped")]))
    axes = panels(drawn[0])
    for name in ("lr", TIME):
        low, high = axes[name].get_ylim()
        assert low < 7422 < 7492 < high < 8000
    triangle = np.asarray(axes["lr"].collections[0].get_offsets())
    assert triangle.tolist() == [[0.01, pytest.approx(axes["lr"].get_ylim()[1], abs=10)]]


def test_time_panel_styles_trials_by_state_and_marks_the_front(tmp_path: Path, drawn: list[Figure]) -> None:
    picture(searched(tmp_path, [*FIVE, Spec(setting(), [7990.0, 7980.0, 8010.0], 3.0, "running")]))
    axes = panels(drawn[0])[TIME]
    lines = {
        tuple(np.asarray(line.get_ydata()).tolist()): (to_hex(line.get_color()).upper(), line.get_linewidth())
        for line in axes.lines
    }
    assert lines[(7950.0, 7450.0)] == (report.BEST, 3.2)
    assert lines[(7900.0, 7600.0, 7500.0)] == (report.ALIVE, 1.6)
    assert lines[(7990.0, 7980.0, 7980.0)] == (report.ALIVE, 1.6)  # the best so far
    assert lines[(8000.0,)] == lines[(7000.0,)] == (report.ENDED, 0.9)
    marked = next(line for line in axes.lines if line.get_marker() == "D")
    assert np.array(marked.get_xydata()).tolist() == [[4.0, 8000.0], [9.0, 7980.0], [30.0, 7500.0], [60.0, 7450.0]]
    stairs = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert np.array(stairs.get_ydata()).tolist() == [8000.0, 7980.0, 7500.0, 7450.0, 7450.0]
    assert {text.get_text() for text in axes.texts} == {"0", "1", "2", "5"}


def test_best_trial_keeps_its_number_where_numbers_would_overlap(tmp_path: Path, drawn: list[Figure]) -> None:
    picture(searched(tmp_path, [Spec(setting(), [7500.0])] * 3))
    assert [text.get_text() for text in panels(drawn[0])[TIME].texts] == ["0"]


def test_time_axis_is_logarithmic_if_some_trials_ended_much_earlier(tmp_path: Path, drawn: list[Figure]) -> None:
    for i, early in enumerate((4.0, 40.0)):
        picture(searched(tmp_path / str(i), [Spec(setting(), [7500.0], 34.0), Spec(setting(), [7600.0], early)]))
    assert [panels(figure)[TIME].get_xscale() for figure in drawn] == ["log", "linear"]
    assert not any("$" in text for text in texts(drawn[0]))  # seconds as plain numbers
