"""The curves of a run as a matplotlib figure: loss, its two terms and *explained*, epoch by epoch."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from dogvae.training import metrics

PANELS = {
    "loss": "loss (nats per image)",
    "reconstruction": "reconstruction (nats per image)",
    "kl": "KL (nats per image)",
    "explained": "explained (1: perfect)",
    "gaussian_loss": "loss of the Gaussian",  # of a flow prior
}
CELL = 960  # pixels: the width of a notebook's cell
TRAIN, VAL, BEST = "#ADADAD", "#0072B2", "#D55E00"  # colours that the colour-blind can tell apart
STYLE = {"axes.grid": True, "grid.color": "#E8E8E8", "axes.spines.top": False, "axes.spines.right": False}


class Plot(Figure):
    """A figure that a notebook shows, also without `%matplotlib` and pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=min(self.dpi, CELL / self.get_figwidth()))
        return buffer.getvalue()


def curves(records: Sequence[dict[str, Any]]) -> Plot:
    """Curves of training and validation; the best epoch has a ring. `records` are those of metrics.jsonl."""
    shown = _shown(records)
    with style.context(["default", STYLE]):
        figure = Plot(figsize=(3.2 * max(1, len(shown)), 2.8), dpi=80, layout="constrained")
        if shown:
            draw(figure, records)
        else:
            figure.text(0.5, 0.5, "no epoch has ended yet", ha="center")
        figure.draw_without_rendering()  # ticks take the style when they are first drawn
    return figure


def draw(figure: FigureBase, records: Sequence[dict[str, Any]]) -> None:
    """Draw the panels of `curves` into a figure, or a part of one. There must be a record."""
    shown, best = _shown(records), metrics.best(records)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, title) in zip(panels, shown.items(), strict=True):
        visible: list[float] = []
        for split, colour in (("train", TRAIN), ("val", VAL)):
            known = [r for r in records if r.get(f"{split}_{name}") is not None]
            if known:
                label = "training" if split == "train" else "validation"
                x, y = [r["epoch"] + 1 for r in known], [r[f"{split}_{name}"] for r in known]
                axes.plot(x, y, color=colour, label=label, marker="." if len(known) == 1 else "")
                visible += filter(math.isfinite, y[len(y) // 10 :])
        if best and best.get(f"val_{name}") is not None:
            axes.plot(best["epoch"] + 1, best[f"val_{name}"], "o", color=BEST, fillstyle="none", ms=9, label="best")
            visible.append(best[f"val_{name}"])
        if visible:  # the first tenth of the epochs, whose losses are far away, may leave the picture
            room = 0.08 * (max(visible) - min(visible)) or 0.05 * abs(visible[0]) or 1.0
            axes.set_ylim(min(visible) - room, max(visible) + room)
        axes.set(title=title, xlabel="epoch")
        axes.title.set_fontsize(10)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[0].legend(frameon=False)


def _shown(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The titles of the panels by the name of their number."""
    return {name: title for name, title in PANELS.items() if any(f"val_{name}" in r for r in records)}
