"""The report of a search: a table on the console, report.csv, report.json, and the picture report.png."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dogvae.console import say
from dogvae.errors import UsageError
from tune.ranking import Row, common_epoch, equal_time, importance, is_ranked, pareto, rows
from tune.search_folder import Search, Trial, parameters
from tune.space import Domain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

    from dogvae.training.curves import Plot

FILES = CSV, JSON, PNG = "report.csv", "report.json", "report.png"
FORMATS = {"loss": ",.1f", "reconstruction": ",.1f", "kl": ",.1f", "loss_at_equal_time": ",.1f"}
FORMATS |= {"seconds": ",.0f", "images_per_s": ",.0f"}
FIRST_TO_GO = ("reconstruction", "kl", "images_per_s", "rank", "loss_at_equal_time", "seconds")  # on narrow terminals
PANELS = 4  # parameters in the picture
SHARES_FROM = 10  # trials; what a parameter explains in fewer is mostly chance, and not shown
# Colours that the colour-blind can tell apart (Okabe and Ito 2008).
BEST, ALIVE, ENDED, FRONT = "#D55E00", "#0072B2", "#ADADAD", "#000000"
STYLE = {"font.size": 11, "axes.grid": True, "grid.color": "#E8E8E8", "axes.axisbelow": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.h_pad": 0.1}
HALO = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
NOTE: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": True, "zorder": 7, "bbox": HALO}


def write(search: Search) -> None:
    """Write report.csv, report.json and report.png into the search's folder; UsageError if that fails."""
    table, text = rows(search), io.StringIO()
    columns = list(table[0]) if table else ["rank", "trial", *parameters(search)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    about = {"equal_time_s": equal_time(search), "importance": importance(search), "trials": table}
    png = picture(search)
    try:
        search.storage.write(CSV, text.getvalue().encode())
        search.storage.write(JSON, (json.dumps(about, indent=2, allow_nan=False) + "\n").encode())
        search.storage.write(PNG, png)
    except OSError as error:
        raise UsageError(f"{search.storage.uri} cannot be written to: {error}") from error


def picture(search: Search) -> bytes:
    """A PNG of 1500x900 pixels of `figure`."""
    buffer = io.BytesIO()
    figure(search).savefig(buffer, format="png")
    return buffer.getvalue()


def figure(search: Search) -> Plot:
    """A figure of 15x9 inches: the loss against four parameters and against time, and the importances."""
    from matplotlib import style
    from matplotlib.ticker import MaxNLocator

    from dogvae.training.curves import Plot

    table = rows(search)
    ranked = list(filter(is_ranked, table))
    with style.context(["default", STYLE]):
        figure = Plot(figsize=(15, 9), dpi=100, layout="constrained")
        name = search.storage.uri.partition("?")[0].rpartition("/")[2]
        title = textwrap.fill(f"{name}: {_best(search, table)}", 105)
        if not ranked:
            figure.text(0.5, 0.5, title, fontsize=20, ha="center")
        else:
            figure.suptitle(title, fontsize=15, weight="bold")
            top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.15), hspace=0.03)[:, 0]
            shares = importance(search)
            shown = sorted(shares, key=lambda name: -(shares[name] or 0.0))[:PANELS]
            panels = list(top.subplots(1, len(shown), sharey=True, squeeze=False)[0])
            for axes, name in zip(panels, shown, strict=True):
                dots = _parameter_panel(axes, name, search.space.domains[name], ranked)
            panels[0].set_ylabel("loss (nats per image)")
            top.colorbar(dots, ax=panels, label="epochs done", pad=0.01, ticks=MaxNLocator(integer=True))
            if len(ranked) >= SHARES_FROM:
                left, right = bottom.subplots(1, 2, width_ratios=(2.2, 1))
                _importance_panel(right, shares, common_epoch(search))
            else:
                left = bottom.subplots()
            _time_panel(left, search.trials, ranked)
        figure.draw_without_rendering()  # ticks take the style when they are first drawn
    return figure


def _limits(losses: Sequence[float]) -> tuple[float, float]:
    """The limits of a loss axis; losses above Tukey's fence, q3 + 1.5 (q3 - q1), lie outside."""
    low, (q1, q3) = min(losses), np.quantile(losses, (0.25, 0.75))
    high = max(loss for loss in losses if loss <= q3 + 1.5 * (q3 - q1))
    room = (high - low) or abs(low) / 100 or 1.0
    return low - 0.2 * room, high + 0.08 * room


def _parameter_panel(axes: Axes, name: str, domain: Domain, ranked: list[Row]) -> PathCollection:
    """Draw loss against one parameter. The best trial has a ring; losses above the axis are triangles at its edge."""
    from matplotlib import colormaps, ticker
    from matplotlib.colors import ListedColormap

    values, losses, epochs = zip(*((row[name], row["loss"], row["epochs"]) for row in ranked), strict=True)
    bottom, top = _limits(losses)
    if domain.kind == "choice":
        # Evenly spaced choices. Dots of one choice are moved sideways by their trial number, so that none is hidden.
        levels = list(dict.fromkeys([*sorted(domain.values), *values]))
        shift = {row["trial"]: 0.3 * (row["trial"] * 0.618 % 1 - 0.5) * (values.count(row[name]) > 1) for row in ranked}
        x = np.array([levels.index(row[name]) + shift[row["trial"]] for row in ranked])
        labels = [textwrap.fill(_short(level), 12) for level in levels]
        axes.set_xticks(range(len(levels)), labels)
        if sum(min(12, len(label)) + 2 for label in labels) > 44:
            axes.tick_params(axis="x", rotation=90)
        axes.set_xlim(-0.5, len(levels) - 0.5)
    else:
        x, (low, high) = np.array(values, float), domain.values
        axes.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
        locator: ticker.Locator = ticker.MaxNLocator(4, integer=domain.kind == "randint")
        if domain.kind == "loguniform":
            axes.set(xscale="log", xlim=(low * (low / high) ** 0.04, high * (high / low) ** 0.04))
            if (decades := math.log10(high / low)) > 0.8:
                locator = ticker.LogLocator(subs=(1, 3) if decades < 2.5 else (1,))
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set(xlabel=name, ylim=(bottom, top))
    axes.yaxis.set_major_formatter("{x:,g}")
    colours = ListedColormap(colormaps["viridis_r"](np.linspace(0.08, 1, 256)))
    look = {"cmap": colours, "vmin": 0, "vmax": max(epochs), "edgecolors": "#555555", "clip_on": False, "zorder": 3}
    for mask, marker in ((np.array(losses) > top, "^"), (np.array(losses) <= top, "o")):
        y, c = np.minimum(losses, top)[mask], np.array(epochs)[mask]
        dots = axes.scatter(x[mask], y, 60, c, marker=marker, **look)
    axes.scatter(x[:1], losses[:1], 260, facecolors="none", edgecolors=BEST, linewidths=2.5, zorder=4)
    across = (axes.transScale + axes.transLimits).transform((x[0], losses[0]))[0]
    side = "left" if across < 0.3 else "right" if across > 0.7 else "center"
    text = f"trial {ranked[0]['trial']}: {_short(values[0])}"
    # Below the dot, where no other trial can be.
    axes.annotate(text, (x[0], losses[0]), (0, -12), color=BEST, weight="bold", ha=side, va="top", **NOTE)
    return dots


def _time_panel(axes: Axes, trials: list[Trial], ranked: list[Row]) -> None:
    """Draw each trial's best loss so far against its seconds, and the Pareto front with trial numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    best = ranked[0]["trial"]
    times: list[float] = []
    every: list[float] = []
    for trial in sorted(filter(lambda t: t.finite, trials), key=lambda t: t.number != best):
        seconds = [r["seconds"] for r in trial.finite]
        losses = np.minimum.accumulate([r["val_loss"] for r in trial.finite])
        times += seconds
        every += losses.tolist()
        label, colour, width = "done or going on", ALIVE, 1.6
        if trial.state in ("stopped", "failed"):
            label, colour, width = "ended early or failed", ENDED, 0.9
        if trial.number == best:
            label, colour, width = f"trial {best}, the best", BEST, 3.2
        axes.plot(seconds, losses, "o-", color=colour, lw=width, ms=4, markevery=[-1], label=label, zorder=width)
    front = pareto(ranked)
    x, y = [row["seconds"] for row in front], [row["loss"] for row in front]
    start, end = min(times), max(times)
    if start > 0 and 8 * x[0] < end:  # else trials that ended early would crowd at the left
        axes.set(xscale="log", xlim=(start * (start / end) ** 0.04, end * (end / start) ** 0.03))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.03 * end)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.plot([*x, axes.get_xlim()[1]], [*y, y[-1]], color=FRONT, ls="--", lw=1, drawstyle="steps-post", zorder=5)
    axes.plot(x, y, "D", color=FRONT, mfc="white", ms=7, zorder=6, label="Pareto front: no trial is faster and better")
    axes.set(ylim=_limits(every), xlabel="time of training and validation (s)")
    axes.set(ylabel="best loss so far (nats per image)", title="Every trial against time")
    taken: list[np.ndarray] = []
    for row in sorted(front, key=lambda row: row["rank"]):  # no number where two are too close
        place = (axes.transScale + axes.transLimits).transform((row["seconds"], row["loss"]))
        if all((abs(place - other) > (0.035, 0.06)).any() for other in taken):
            taken.append(place)
            axes.annotate(f"{row['trial']}", (row["seconds"], row["loss"]), (-7, -7), ha="right", va="top", **NOTE)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(reversed(labels), reversed(handles), strict=True))
    axes.legend([*once.values()][::-1], [*once][::-1], loc="best")


def _importance_panel(axes: Axes, shares: dict[str, float | None], epoch: int) -> None:
    """Draw a bar for each parameter."""
    names = sorted(shares, key=lambda name: shares[name] or 0.0)
    axes.barh(names, [shares[name] or 0.0 for name in names], 0.6, color=ALIVE)
    for i, name in enumerate(names):
        axes.text((shares[name] or 0.0) + 0.02, i, _percent(shares[name]), va="center")
    middle, half = (len(names) - 1) / 2, max(3, len(names)) / 2 + 0.1
    axes.set(xlim=(0, 1.15), ylim=(middle - half, middle + half), title="What each parameter alone explains")
    axes.set_xlabel(f"share of the variance of the loss after epoch {epoch}")
    axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "25%", "50%", "75%", "100%"))
    axes.grid(visible=False, axis="y")


def show(search: Search) -> None:
    """Print the table, the best trial, the importances, the paths of the files, and why trials failed."""
    table, time_s = rows(search), equal_time(search)
    titles = {key: key for key in ("rank", "trial", *parameters(search), "epochs", "loss", "reconstruction")}
    titles |= {"kl": "KL", "seconds": "seconds", "images_per_s": "images/s"}
    titles |= {"loss_at_equal_time": "at equal time" if time_s is None else f"at {time_s:,.0f} s", "state": "state"}
    cells = {key: [title, *(_cell(key, row[key]) for row in table)] for key, title in titles.items()}
    widths = {key: max(map(len, column)) for key, column in cells.items()}
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text

        console = Console()
        for key in FIRST_TO_GO:
            if sum(widths.values()) + 2 * len(widths) > console.width:
                del widths[key], cells[key]
        rich = Table(*(Column(column[0], justify="right", overflow="fold") for column in cells.values()), box=None)
        for line in zip(*(column[1:] for column in cells.values()), strict=True):
            rich.add_row(*map(Text, line))
        console.print(rich)
    else:
        for line in zip(*cells.values(), strict=True):
            say("  ".join(cell.rjust(width) for cell, width in zip(line, widths.values(), strict=True)))
    say(_best(search, table))
    if (epoch := common_epoch(search)) and sum(map(is_ranked, table)) >= SHARES_FROM:
        parts = ", ".join(f"{name} {_percent(share)}" for name, share in importance(search).items())
        say(f"share of the loss variance that each setting alone explains, after epoch {epoch}: {parts}")
    if written := [name for name in (*FILES, "export") if search.storage.exists(name)]:
        say("\n".join(f"see {search.storage.uri_of(name)}" for name in written))  # a terminal would break a long line
    for row in table:
        if row["state"] == "failed":
            say(f"trial {row['trial']} failed: {row['reason']}")


def _best(search: Search, table: list[Row]) -> str:
    if not table or not is_ranked(table[0]):
        return f"no epoch yet in {len(table)} trial{'' if len(table) == 1 else 's'}"
    best, names = table[0], parameters(search)
    setting = ", ".join(f"{name} {_short(best[name])}" for name in names)
    return f"best of {len(table)} is trial {best['trial']} ({setting}): {best['loss']:,.1f} nats per image"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if 0.9 < value < 1 else f"{value:.3g}"  # a decay of 0.9995 must not read 1
    return str(value).lower() if isinstance(value, bool) else str(value)


def _percent(share: float | None) -> str:
    return "not known" if share is None else f"{share:.0%}"


def _cell(key: str, value: Any) -> str:
    return "-" if value is None else f"{value:{FORMATS[key]}}" if key in FORMATS else _short(value)
