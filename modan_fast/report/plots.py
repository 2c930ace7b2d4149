"""The figures of a results folder: each is plotted into a file and returned as HTML for the page."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_curve

from modan_fast.config import ReportConfig
from modan_fast.devices import pick_device
from modan_fast.downstream.results import CURVE_COLUMNS, Experiment
from modan_fast.downstream.statistics import Predictions
from modan_fast.downstream.tasks import FoldRun
from modan_fast.report import figures, tables
from modan_fast.report.embed import features, pretraining_images, shards_of
from modan_fast.shards import ShardSet
from shard_builder.settings import InputError, Progress

FEWEST = 10  # images of a UMAP


def plot_roc(folder: Path, predictions: Predictions) -> str:
    """ROC curves of each task and recipe: a panel an init and protocol."""
    content = ""
    for task, recipe in dict.fromkeys((experiment.task, experiment.recipe) for experiment in predictions):
        panels: dict[str, list[tuple[str, list[figures.Curve]]]] = {}
        for experiment, fold_runs in sorted(predictions.items(), key=lambda item: item[0].protocol):
            if (experiment.task, experiment.recipe) == (task, recipe):
                curves = [
                    roc_curve(outcome.labels, outcome.scores)[:2]
                    for _, outcome in sorted(fold_runs.items(), key=lambda item: (item[0].repeat, item[0].fold))
                    if len(set(outcome.labels)) == 2 and np.isfinite(outcome.scores).all()
                ]
                if curves:
                    title = f"{experiment.init}\n{tables.PROTOCOLS[experiment.protocol]}"
                    panels.setdefault(experiment.protocol, []).append((title, curves))
        if panels:
            path = folder / f"roc-{task}-{recipe}.svg"
            figures.roc(path, list(panels.values()), shown=5)
            content += _figure(
                path,
                f"ROC curves, {task}, {recipe}",
                f"{task}, recipe {recipe}. Thin: the five folds of the first repeat. Thick: the mean of all folds and "
                "repeats at equal false-positive rates.",
            )
    return content


def plot_curves(folder: Path, losses: Path, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Validation loss of the downstream trainings, and loss of the pretrainings."""
    content = ""
    if losses.exists():
        found: dict[Experiment, dict[FoldRun, list[float]]] = {}
        with losses.open(encoding="utf-8", newline="") as file:
            for row in islice(csv.reader(file), 1, None):
                if len(row) == len(CURVE_COLUMNS):
                    fold_run = FoldRun(int(row[4]), int(row[5]))
                    found.setdefault(Experiment(*row[:4]), {}).setdefault(fold_run, []).append(float(row[-1]))
        grouped: dict[tuple[str, str, str], dict[str, NDArray[np.float64]]] = {}
        for experiment, fold_runs in found.items():
            epochs = max(map(len, fold_runs.values()))  # a killed evaluation leaves its last training short
            whole = np.array([each for each in fold_runs.values() if len(each) == epochs])
            grouped.setdefault((experiment.task, experiment.recipe, experiment.protocol), {})[experiment.init] = (
                whole
            )
        panels = [
            (f"{task}, {tables.PROTOCOLS[protocol]}, {recipe}", inits)
            for (task, recipe, protocol), inits in sorted(grouped.items())
        ]
        if panels:
            path = folder / "validation-loss.svg"
            figures.curves(path, panels, ("epoch", "validation loss"))
            content += _figure(
                path,
                "Validation loss over the epochs",
                "Validation loss of fine-tuning and probing: the median of all folds and repeats, and the middle half.",
            )
    if logs:
        path = folder / "pretraining-loss.svg"
        figures.curves(path, _over_epochs(logs, "loss"), ("epoch", "loss"))
        content += _figure(
            path,
            "Pretraining loss",
            "Training loss of the runs. The methods' losses cannot be compared with each other.",
        )
    return content


def plot_speed(folder: Path, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    if not logs:
        return ""
    path = folder / "pretraining-speed.svg"
    figures.curves(path, _over_epochs(logs, "views_per_second"), ("epoch", "views/s"))
    return _figure(path, "Views a second in pretraining", "Views a second in each epoch of the runs.")


def _over_epochs(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], name: str
) -> list[tuple[str, dict[str, NDArray[np.float64]]]]:
    """A panel a run of what its log calls `name`."""
    return [(init, {"": np.array([[line[name] for line in log]], np.float64)}) for init, log in logs.items()]


def plot_umap(
    folder: Path,
    runs: Mapping[str, Any],
    recipe: str,
    shards: ShardSet | None,
    config: ReportConfig,
    progress: Progress,
) -> str:
    """UMAP of the pretraining images, of `shards` or else the inits' own, one panel an init, or why there is none."""
    path = folder / "umap.png"
    path.unlink(missing_ok=True)  # of other inits or images, it may be
    if not config.samples:
        return ""
    try:
        shards = shards or shards_of(runs)
        images, names = pretraining_images(
            shards, config.samples, runs["settings"].get(recipe, {}).get("image_size", 224)
        )
    except InputError as error:
        return f'<p class="note">No UMAP: {escape(str(error))}</p>'
    if len(names) < FEWEST:
        return f'<p class="note">No UMAP: {len(names)} images are too few, it needs {FEWEST}.</p>'
    found, missing = features(runs, recipe, images, pick_device(config.device), progress)
    if not found:
        return f'<p class="note">No UMAP: {escape("; ".join(missing))}</p>'
    figures.embedding(path, list(found.items()), names)
    without = f" Without a panel: {'; '.join(missing)}." if missing else ""
    return _figure(
        path,
        "UMAP of penultimate features",
        f"Penultimate features of {len(names):,} pretraining images, one UMAP an init. Colours stand for modality and "
        f"anatomy and markers for modality, alike in all panels. Axes have no unit.{without}",
    )


def _figure(path: Path, alternative: str, caption: str) -> str:
    """A picture inside the page."""
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    width = "" if kind == "svg+xml" else f' width="{Image.open(path).width * 96 // figures.DPI}"'
    return (
        f'<figure><img{width} src="data:image/{kind};base64,{data}" alt="{escape(alternative)}">'
        f"<figcaption>{escape(caption)} ({escape(path.parent.name)}/{escape(path.name)})</figcaption></figure>\n"
    )
