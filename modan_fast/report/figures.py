"""Figures of images, views and embeddings, as PNG files.

N images, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt


def contact_sheet(
    path: Path, rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], headings: Sequence[str]
) -> None:
    """Write a sheet of images: a row is its name and its images, each (H, W) uint8; `headings` name the columns."""
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
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def embedding(path: Path, panels: Sequence[tuple[str, NDArray[np.float32]]], labels: Sequence[str]) -> None:
    """Write UMAP panels of features, each a title and (N, F) float32, coloured by `labels` (N), alike in all."""
    from umap import UMAP

    names = sorted(set(labels))
    colours = plt.get_cmap("tab20")(np.arange(len(names)) % 20)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels) + 2, 4.2), squeeze=False, layout="constrained"
    )
    for axis, (title, features) in zip(axes[0], panels, strict=True):
        # One job, because with a seed UMAP uses no more, and would warn.
        places = UMAP(n_neighbors=min(15, len(features) - 1), random_state=0, n_jobs=1).fit_transform(features)
        for name, colour in zip(names, colours, strict=True):
            mine = np.array([label == name for label in labels])
            axis.scatter(*places[mine].T, s=9, color=colour, label=name)
        axis.set(title=title, xticks=[], yticks=[])
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right center", frameon=False, markerscale=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
