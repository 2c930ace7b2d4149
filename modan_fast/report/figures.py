"""Plotting with matplotlib: contact sheets, UMAP panels, ROC curves and curves over epochs, into PNG and SVG files.

N images, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from shard_builder.atomic import replacing
from shard_builder.settings import printable

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # x and y

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


def roc(path: Path, panels: Sequence[Sequence[tuple[str, Sequence[Curve]]]], shown: int) -> None:
    """Write a grid of ROC panels, each a title and its folds' curves.

    The first `shown` curves are thin lines; the mean of all, at equal false-positive rates, is a thick one.
    """
    columns = max(map(len, panels))
    grid = np.linspace(0, 1, 201)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(panels),
            columns,
            figsize=(2.4 * columns, 2.65 * len(panels) + 0.2),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for line, row in zip(axes, panels, strict=True):
            for axis, (title, curves) in zip(line, row, strict=False):
                axis.plot([0, 1], [0, 1], color="#cccccc", linewidth=0.8, linestyle=(0, (4, 3)))
                for false, true in curves[:shown]:
                    axis.plot(false, true, color=COLOURS[0], alpha=0.45, linewidth=0.7)
                # At 0 np.interp takes the last point, that is the top of the curve's vertical start.
                mean = np.mean([np.interp(grid, false, true) for false, true in curves], axis=0)
                axis.plot(np.r_[0, grid], np.r_[0, mean], color="#111111", linewidth=1.7)
                axis.set(
                    xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal"
                )
                axis.set_title(title)
            for axis in line[len(row) :]:
                axis.axis("off")
        figure.supxlabel("1 − specificity", fontsize=9)
        figure.supylabel("sensitivity", fontsize=9)
        _save(figure, path)


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
            axis.grid(color="#e6e6e6", linewidth=0.6)
            axis.set_axisbelow(True)
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


def _layout(panels: int) -> tuple[int, int]:
    """Columns and rows of a grid of panels: at most three columns, and no more than its rows need."""
    rows = -(-panels // 3)
    return -(-panels // rows), rows


def _save(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write and close a figure; without the date, so that the same content gives the same bytes."""
    kind = path.suffix[1:]
    with replacing(path) as file:  # so that nothing is written through a link
        figure.savefig(file, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
