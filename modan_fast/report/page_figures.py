"""The page's figures: ROC and learning curves, speed and UMAP of a results folder, each as a file and as HTML."""

from __future__ import annotations

import base64
import csv
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_curve

from modan_fast.config import ReportConfig
from modan_fast.devices import pick_device
from modan_fast.downstream.predictions import Outcome, Predictions
from modan_fast.downstream.results import CURVE_COLUMNS, Experiment, key_of, recorded_settings
from modan_fast.downstream.tasks import FoldRun
from modan_fast.report import figures
from modan_fast.report.embed import features, pretraining_images, shards_of
from modan_fast.report.formats import file_name, shown
from modan_fast.report.tables import PROTOCOLS
from modan_fast.shards import ShardSet
from shard_builder.settings import InputError, Progress

FEWEST = 10  # images of a UMAP

Logs = Mapping[str, Sequence[Mapping[str, Any]]]
"""The lines of each run's log.jsonl, by init."""


def plot_roc(folder: Path, predictions: Predictions) -> str:
    """ROC curves: a figure per task and recipe, a row per protocol, a panel per init."""
    grids: dict[tuple[str, str], dict[str, list[tuple[str, list[figures.Curve]]]]] = {}
    for experiment, fold_runs in sorted(predictions.items(), key=lambda item: item[0].protocol):
        if curves := [roc_curve(*fold_runs[each])[:2] for each in sorted(fold_runs) if _has_roc(fold_runs[each])]:
            rows = grids.setdefault((experiment.task, experiment.recipe), {})
            title = f"{figures.label(experiment.init)}\n{PROTOCOLS[experiment.protocol]}"
            rows.setdefault(experiment.protocol, []).append((title, curves))
    content = ""
    for (task, recipe), rows in grids.items():
        path = folder / file_name(f"roc-{task}-{recipe}.svg")
        figures.roc(path, list(rows.values()), shown=5)
        content += _figure(
            path,
            f"ROC curves, {task}, {recipe}",
            f"{task}, recipe {recipe}. Thin: the five folds of the first repeat. Thick: the mean of all folds and "
            "repeats at equal false-positive rates.",
        )
    return content


def _has_roc(outcome: Outcome) -> bool:
    return len(set(outcome.labels)) == 2 and bool(np.isfinite(outcome.scores).all())


def plot_validation_loss(folder: Path, curves: Path) -> str:
    """Validation losses in a curves.csv over the epochs: a panel per task, protocol and recipe."""
    if not os.path.isfile(curves):
        return ""
    grouped: dict[tuple[str, str, str], dict[str, NDArray[np.float64]]] = {}
    for experiment, losses in _validation_losses(curves).items():
        grouped.setdefault((experiment.task, experiment.recipe, experiment.protocol), {})[experiment.init] = (
            losses
        )
    if not grouped:
        return ""
    panels = [
        (f"{figures.label(task)}, {PROTOCOLS[protocol]}, {recipe}", inits)
        for (task, recipe, protocol), inits in sorted(grouped.items())
    ]
    path = folder / "validation-loss.svg"
    figures.curves(path, panels, ("epoch", "validation loss"))
    return _figure(
        path,
        "Validation loss over the epochs",
        "Validation loss of fine-tuning and probing: median and interquartile range of all folds and repeats.",
    )


def _validation_losses(curves: Path) -> dict[Experiment, NDArray[np.float64]]:
    """The validation losses (fold runs, epochs) of each experiment, without fold runs that a kill has cut short.

    Raises `InputError` for a damaged file.
    """
    found: dict[Experiment, dict[FoldRun, list[float]]] = {}
    try:
        with curves.open(encoding="utf-8", newline="") as file:
            for row in islice(csv.reader(file), 1, None):
                if len(row) == len(CURVE_COLUMNS):
                    experiment, fold_run = key_of(row[:4], row[4], row[5])
                    found.setdefault(experiment, {}).setdefault(fold_run, []).append(float(row[-1]))
    except (ValueError, TypeError, csv.Error, OSError) as error:
        raise InputError(f"{curves} is damaged ({error}): the same evaluation again repairs it") from error
    losses = {}
    for experiment, fold_runs in found.items():
        epochs = max(map(len, fold_runs.values()))
        losses[experiment] = np.array([each for each in fold_runs.values() if len(each) == epochs])
    return losses


def plot_pretraining_loss(folder: Path, logs: Logs) -> str:
    """Training loss of each run over the epochs."""
    return _plot_logs(
        folder / "pretraining-loss.svg",
        logs,
        ("loss", "loss"),
        "Pretraining loss",
        "Training loss of the runs. The losses of different methods are not comparable.",
    )


def plot_speed(folder: Path, logs: Logs) -> str:
    """Views per second of each run over the epochs."""
    return _plot_logs(
        folder / "pretraining-speed.svg",
        logs,
        ("views_per_second", "views/s"),
        "Views per second in pretraining",
        "Views per second in each epoch of the runs.",
    )


def _plot_logs(path: Path, logs: Logs, metric: tuple[str, str], alternative: str, caption: str) -> str:
    """A panel per run of one metric in its log; `metric` is its name there and on the axis."""
    if not logs:
        return ""
    name, axis = metric
    panels = [
        (figures.label(init), {"": np.array([[line[name] for line in log]], np.float64)})
        for init, log in logs.items()
    ]
    figures.curves(path, panels, ("epoch", axis))
    return _figure(path, alternative, caption)


def plot_umap(
    folder: Path,
    runs: Mapping[str, Any],
    recipe: str,
    shards: ShardSet | None,
    config: ReportConfig,
    progress: Progress,
) -> str:
    """UMAP of pretraining images, a panel per init; or a note why there is none.

    `runs` is the content of runs.json. The images are those of `shards`, by default of the inits' own shard set.
    """
    path = folder / "umap.png"
    path.unlink(missing_ok=True)  # it may show other inits or images
    if not config.samples:
        return ""
    try:
        settings = recorded_settings(runs, recipe)
        images, names = pretraining_images(shards or shards_of(runs), config.samples, settings["image_size"])
    except InputError as error:
        return _no_umap(str(error))
    if len(names) < FEWEST:
        return _no_umap(f"{len(names)} images are too few, it needs {FEWEST}")
    found, missing = features(runs["inits"], settings, images, pick_device(config.device), progress)
    if not found:
        return _no_umap("; ".join(missing))
    figures.embedding(path, [(figures.label(name), each) for name, each in found.items()], names)
    without = f" Without a panel: {'; '.join(missing)}." if missing else ""
    return _figure(
        path,
        "UMAP of penultimate features",
        f"Penultimate features of {len(names):,} pretraining images, one UMAP per init. Colours show modality and "
        f"anatomy, markers show modality, the same in all panels. The axes have no unit.{without}",
    )


def _no_umap(reason: str) -> str:
    return f'<p class="note">No UMAP: {shown(reason)}</p>'


def _figure(path: Path, alternative: str, caption: str) -> str:
    """An image file, embedded in an HTML figure."""
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    width = "" if kind == "svg+xml" else f' width="{Image.open(path).width * 96 // figures.DPI}"'
    return (
        f'<figure><img{width} src="data:image/{kind};base64,{data}" alt="{shown(alternative)}">'
        f"<figcaption>{shown(caption)} ({shown(path.parent.name)}/{shown(path.name)})</figcaption></figure>\n"
    )
