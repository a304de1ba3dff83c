"""results.png: a run's curves and pictures on one page, drawn beside training."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from dogvae.training import curves
from dogvae.training.metrics import best, describe
from dogvae.training.previews import FITTED, NORMAL, WALK


def draw(name: str, records: Sequence[dict[str, Any]], pictures: Mapping[str, np.ndarray]) -> bytes:
    """A PNG of 1400 pixels in width: the curves of `records` above `pictures` (3, H, W) uint8, with their names.

    The walk is left out, and so are samples from N(0, I) if there are others.
    """
    buffer, last = io.BytesIO(), records[-1]
    left_out = {WALK, NORMAL} if FITTED in pictures else {WALK}
    pictures = {label: picture for label, picture in pictures.items() if label not in left_out}
    top = best(records)
    # Two pictures in a row; each is 6.6 inches wide.
    pairs = [list(pictures.items())[i : i + 2] for i in range(0, len(pictures), 2)]
    heights = [2.6, *(6.6 * max(p.shape[1] / p.shape[2] for _, p in pair) + 0.4 for pair in pairs)]
    with style.context(["default", curves.STYLE]):
        figure = Figure(figsize=(14, sum(heights) + 0.8), dpi=100, layout="constrained")
        title = f"{name}, after epoch {last['epoch'] + 1}"
        if top:
            title += f"; the best is epoch {top['epoch'] + 1}: {describe(top)}"
        figure.suptitle(textwrap.fill(title, 130), fontsize=13, weight="bold")
        rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        curves.draw(rows[0], records)
        for row, pair in zip(rows[1:], pairs, strict=True):
            for axes, (label, picture) in zip(row.subplots(1, 2), [*pair, ("", None)][:2], strict=True):
                axes.set_axis_off()
                if picture is not None:
                    axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
                    axes.set_anchor("N")
                    axes.set_title(label, fontsize=11)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
