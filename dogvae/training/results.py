"""results.png: a run's curves and pictures on one page, drawn beside training."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dogvae.training.metrics import best, describe
from dogvae.training.previews import FITTED, NORMAL, WALK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, VALIDATION = "#56B4E9", "#D55E00"  # colours that the colour-blind can tell apart (Okabe and Ito 2008)
STYLE = {"font.size": 11, "axes.grid": True, "grid.color": "#E8E8E8", "axes.spines.top": False}
STYLE |= {"axes.spines.right": False}


def draw(name: str, records: Sequence[dict[str, Any]], pictures: Mapping[str, np.ndarray]) -> bytes:
    """A PNG of 1400 pixels in width: the curves of `records` above `pictures` (3, H, W) uint8, with their names.

    The walk is left out, and so are samples from N(0, I) if there are others.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    buffer, last = io.BytesIO(), records[-1]
    left_out = {WALK, NORMAL} if FITTED in pictures else {WALK}
    pictures = {label: picture for label, picture in pictures.items() if label not in left_out}
    top = best(records)
    # Two pictures in a row; each is 6.6 inches wide.
    pairs = [list(pictures.items())[i : i + 2] for i in range(0, len(pictures), 2)]
    heights = [2.6, *(6.6 * max(p.shape[1] / p.shape[2] for _, p in pair) + 0.4 for pair in pairs)]
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(14, sum(heights) + 0.8), dpi=100, layout="constrained")
        title = f"{name}, after epoch {last['epoch'] + 1}"
        if top:
            title += f"; the best is epoch {top['epoch'] + 1}: {describe(top)}"
        figure.suptitle(textwrap.fill(title, 130), fontsize=13, weight="bold")
        rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _curves(list(rows[0].subplots(1, 3)), records)
        for row, pair in zip(rows[1:], pairs, strict=True):
            for axes, (label, picture) in zip(row.subplots(1, 2), [*pair, ("", None)][:2], strict=True):
                axes.set_axis_off()
                if picture is not None:
                    axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
                    axes.set_anchor("N")
                    axes.set_title(label, fontsize=11)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _curves(panels: list[Axes], records: Sequence[dict[str, Any]]) -> None:
    """Draw the loss, the share that is explained, and the KL; for a flow, the two losses."""
    is_flow = "val_gaussian_loss" in records[-1]
    _curve(panels[0], records, {"train_loss": "training", "val_loss": "validation"}, "loss")
    if is_flow:
        _curve(panels[1], records, {"val_loss": "flow", "val_gaussian_loss": "Gaussian alone"}, "validation loss")
        panels[2].set_axis_off()
    else:
        _curve(panels[1], records, {"val_explained": "validation"}, "explained (0: the mean image, 1: perfect)")
        _curve(panels[2], records, {"train_kl": "training", "val_kl": "validation"}, "KL (nats per image)")


def _curve(axes: Axes, records: Sequence[dict[str, Any]], names: Mapping[str, str], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [record["epoch"] + 1 for record in records]
    shown: list[float] = []
    for colour, (key, label) in zip((TRAIN, VALIDATION), names.items(), strict=False):
        values = [math.nan if record.get(key) is None else record[key] for record in records]
        colour = VALIDATION if len(names) == 1 else colour
        axes.plot(epochs, values, color=colour, label=label, marker="o" if len(values) < 3 else "")
        shown += [value for value in values[len(values) // 10 :] if math.isfinite(value)]
    if shown:  # the first tenth of the epochs, whose losses are far away, may leave the picture
        room = 0.05 * (max(shown) - min(shown)) or 0.05 * abs(shown[0]) or 1.0
        axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.set(title=title, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:,g}")
    if len(names) > 1:
        axes.legend()
