"""Plotting with matplotlib: contact sheets, UMAP panels, forest plots, lines and curves, into PNG and SVG files.

N images, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from shard_builder.atomic import replacing
from shard_builder.settings import printable

Interval = tuple[float, float]

# Okabe and Ito's palette without black and yellow, then Tol's: adjacent colours also differ for colour-blind readers.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
COLOURS += ["#332288", "#882255", "#999933", "#44AA99", "#661100", "#777777"]
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1.2))]
DPI = 150
LONGEST = 60  # characters of a name
MARKERS = ["o", "^", "s", "D", "v", "P"]
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "text.parse_math": False,  # a name may hold a $
    "svg.hashsalt": "modan-fast",  # the same ids in the file each time
    "svg.fonttype": "path",
}


def label(name: str) -> str:
    """A name as a text in a figure: on one line, and short. A legend leaves out what begins with an underscore."""
    text = printable(name)
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return f" {text}" if text.startswith("_") else text


def contact_sheet(
    path: Path, rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], headings: Sequence[str]
) -> None:
    """Write a sheet of images. A row is its name and its images, each (H, W) uint8; `headings` name the columns."""
    figure, axes = plt.subplots(
        len(rows),
        len(headings),
        figsize=(1.4 * len(headings) + 1, 1.45 * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(label(name), rotation=0, ha="right", va="center", parse_math=False)
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=10)
    _save(figure, path, dpi=110)


def embedding(path: Path, panels: Sequence[tuple[str, NDArray[np.float32]]], labels: Sequence[str]) -> None:
    """Write UMAP panels, each a title and features (N, F) float32 of the same N images.

    `labels` (N) are words such as `CT lung`: the first word chooses the marker, the whole label the colour.
    """
    from umap import UMAP

    names = sorted(set(labels))
    kinds = sorted({name.split(" ")[0] for name in names})
    columns, rows = _layout(len(panels))
    legend_columns = max(1, min(len(names), 3 * columns))
    legend = 0.5 + 0.22 * -(-len(names) // legend_columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(4 * columns, 4 * rows + legend), squeeze=False, layout="constrained"
        )
        for axis, (title, features) in zip(axes.flat, panels, strict=False):
            # With a seed UMAP runs one job anyway, and warns if it was asked for more.
            umap = UMAP(n_neighbors=min(15, len(features) - 1), random_state=0, n_jobs=1)
            points = umap.fit_transform(features)
            for index, name in enumerate(names):
                mine = np.array([label == name for label in labels])
                look = {
                    "color": COLOURS[index % len(COLOURS)],
                    "marker": MARKERS[kinds.index(name.split(" ")[0]) % len(MARKERS)],
                }
                axis.scatter(*points[mine].T, s=9, alpha=0.75, linewidths=0, label=label(name), **look)
            axis.set(title=title, xticks=[], yticks=[])
            axis.spines[:].set_visible(True)
            axis.spines[:].set_color("#bbbbbb")
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        handles, texts = axes[0][0].get_legend_handles_labels()
        shown = figure.legend(
            handles, texts, loc="outside lower center", ncols=legend_columns, frameon=False, markerscale=2.2
        )
        for handle in filter(None, shown.legend_handles):
            handle.set_alpha(1)
        _save(figure, path)


class Line(NamedTuple):
    """A line of a panel, with a band from `low` to `high` around it; `level` is drawn across the panel, dotted."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    level: float | None = None


def lines(
    path: Path,
    panels: Sequence[tuple[str, Sequence[Line]]],
    labels: tuple[str, str],
    names: Sequence[str],
    *,
    square: bool = False,
    marked: bool = False,
    logarithmic: bool = False,
) -> None:
    """Write panels of lines, each a title and its lines; `labels` name the axes.

    A line has the colour of its name's place in `names`. `square` panels show [0, 1] with the diagonal, `marked` ones
    every point, `logarithmic` ones the x values that occur.
    """
    columns, rows = _layout(len(panels), most=4 if square else 3)
    size = (2.75, 2.8) if square else (4, 2.7)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(size[0] * columns, size[1] * rows + 0.5), squeeze=False, layout="constrained"
        )
        for axis, (title, drawn) in zip(axes.flat, panels, strict=False):
            if square:
                axis.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle=(0, (4, 3)))
                ticks = (0, 0.25, 0.5, 0.75, 1)
                axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=ticks, yticks=ticks, aspect="equal")
                axis.set_xticklabels(["0", "", "0.5", "", "1"])
                axis.set_yticklabels(["0", "", "0.5", "", "1"])
            for line in drawn:
                colour, dash, marker = _look(names, line.name)
                mark: Any = {"marker": marker, "markersize": 4.5, "markeredgewidth": 0} if marked else {}
                axis.plot(line.x, line.y, color=colour, linestyle=dash, linewidth=1.5, **mark)
                if line.low is not None and line.high is not None:
                    axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.12, linewidth=0)
                if line.level is not None:
                    axis.axhline(line.level, color=colour, linewidth=1, linestyle=(0, (1, 2)))
            if logarithmic:
                axis.set_xscale("log")
                occurring = sorted({float(x) for line in drawn for x in line.x})
                axis.set_xticks(occurring, [f"{x:g}" for x in occurring])
                axis.set_xticks([], minor=True)
            elif not square:
                axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.set(title=title)
            _grid(axis)
        _finish(figure, axes, len(panels), labels, names, marked=marked)
        _save(figure, path)


def forest(
    path: Path,
    panels: Sequence[tuple[str, Mapping[str, Mapping[str, tuple[float, Interval | None]]]]],
    label_x: str,
    names: Sequence[str],
) -> None:
    """Write a forest plot: panels of a title and, by group and name, a value with its interval.

    The groups of all panels have the same lines, from the top; `names` give order and colours within a group.
    """
    groups = list(dict.fromkeys(group for _, content in panels for group in content))
    columns, rows = _layout(len(panels))
    step = 1 / (len(names) + 1.2)
    height = max(1.6, 0.24 * (len(names) + 1.2) * len(groups)) + 0.5
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(3.2 * columns + 1.2, height * rows + 0.4), squeeze=False, layout="constrained"
        )
        for number, (axis, (title, content)) in enumerate(zip(axes.flat, panels, strict=False)):
            for place, group in enumerate(groups):
                if place:
                    axis.axhline(place - 0.5, color="#dddddd", linewidth=0.8)
                for name, (value, interval) in content.get(group, {}).items():
                    colour, _, marker = _look(names, name)
                    y = place + (names.index(name) - (len(names) - 1) / 2) * step
                    if interval:
                        axis.plot(interval, (y, y), color=colour, linewidth=1.5, solid_capstyle="butt")
                    axis.plot(value, y, marker=marker, color=colour, markersize=5, markeredgewidth=0)
            if axis.get_xlim()[0] < 0.5 < axis.get_xlim()[1]:
                axis.axvline(0.5, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            axis.set(title=title, ylim=(len(groups) - 0.5, -0.5))
            axis.set_xlim(max(0.0, axis.get_xlim()[0]), min(1.0, axis.get_xlim()[1]))
            axis.set_yticks(range(len(groups)), groups if number % columns == 0 else [""] * len(groups))
            axis.tick_params(axis="y", length=0)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.grid(axis="x", color="#e6e6e6", linewidth=0.6)
            axis.set_axisbelow(True)
        _finish(figure, axes, len(panels), (label_x, ""), names, marked=True)
        _save(figure, path)


def _look(names: Sequence[str], name: str) -> tuple[str, Any, str]:
    """Colour, dashes and marker of a name."""
    index = names.index(name)
    return COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)]


def _grid(axis: Axes) -> None:
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)


def _finish(
    figure: Figure,
    axes: NDArray[Any],
    panels: int,
    labels: tuple[str, str],
    names: Sequence[str],
    *,
    marked: bool = False,
) -> None:
    """Labels of the outer axes, a legend of the names if there are several, and no empty panels."""
    columns = axes.shape[1]
    for number, axis in enumerate(axes.flat):
        if number >= panels:
            axis.axis("off")
        elif number + columns >= panels:
            axis.set_xlabel(labels[0])
    for row in axes:
        row[0].set_ylabel(labels[1])
    if len(names) > 1:
        handles = []
        for name in names:
            colour, dash, marker = _look(names, name)
            marks: Any = {"marker": marker, "markersize": 5, "markeredgewidth": 0} if marked else {}
            handles.append(Line2D([], [], color=colour, linestyle=dash, linewidth=1.5, **marks))
        figure.legend(
            handles,
            list(map(label, names)),
            loc="outside lower center",
            ncols=min(len(names), max(1, 2 * columns)),
            frameon=False,
        )


def curves(
    path: Path, panels: Sequence[tuple[str, Mapping[str, NDArray[np.float64]]]], labels: tuple[str, str]
) -> None:
    """Write panels of curves over epochs, each a title and arrays (runs, epochs) by name.

    A line is the median of the runs, a band their interquartile range. `labels` name the axes; a name has the same
    colour in all panels.
    """
    names = list(dict.fromkeys(name for _, lines in panels for name in lines))
    columns, rows = _layout(len(panels))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(4 * columns, 2.7 * rows + 0.4), squeeze=False, layout="constrained"
        )
        for axis, (title, lines) in zip(axes.flat, panels, strict=False):
            for name, values in lines.items():
                index = names.index(name)
                epochs = np.arange(1, values.shape[1] + 1)
                low, middle, high = np.nanquantile(values, (0.25, 0.5, 0.75), axis=0)
                colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
                axis.plot(epochs, middle, color=colour, linestyle=dash, linewidth=1.6)
                if len(values) > 1:
                    axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set(title=title, xlabel=labels[0])
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            _grid(axis)
        for line in axes:
            line[0].set_ylabel(labels[1])
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        if len(names) > 1:
            looks = [(COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]) for index in range(len(names))]
            handles = [Line2D([], [], color=colour, linestyle=dash, linewidth=1.6) for colour, dash in looks]
            figure.legend(
                handles,
                list(map(label, names)),
                loc="outside lower center",
                ncols=min(len(names), 5),
                frameon=False,
            )
        _save(figure, path)


def _layout(panels: int, most: int = 3) -> tuple[int, int]:
    """Columns and rows of a grid of panels: at most `most` columns, and no more than its rows need."""
    rows = -(-panels // most)
    return -(-panels // rows), rows


def _save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write and close a figure; without the date, so that the same content gives the same bytes."""
    kind = path.suffix[1:]
    with replacing(path) as file:  # so that nothing is written through a link
        figure.savefig(file, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
