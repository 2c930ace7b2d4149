"""The page's figures, each as a file and as HTML: forest plot, ROC curves, calibration, few labels, logs and UMAP."""

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

from modan_fast.config import ReportConfig
from modan_fast.devices import pick_device
from modan_fast.downstream.metrics import columns_of, confidences, ranked, reliability
from modan_fast.downstream.predictions import Outcome, Predictions
from modan_fast.downstream.results import CURVE_COLUMNS, Experiment, key_of, protocol_of, recorded_settings
from modan_fast.downstream.statistics import Row
from modan_fast.downstream.tasks import FoldRun
from modan_fast.report import figures
from modan_fast.report.embed import features, pretraining_images, shards_of
from modan_fast.report.formats import file_name, shown
from modan_fast.report.tables import PROTOCOLS, by_protocol, protocol_name
from modan_fast.shards import ShardSet
from shard_builder.settings import InputError, Progress

FEWEST = 10  # images of a UMAP
GRID = np.linspace(0, 1, 101)  # false-positive rates of a mean ROC curve
SHOWN = 0.01  # of the images must be in a bin of a reliability curve
MOST_PANELS = 24  # of one figure

Logs = Mapping[str, Sequence[Mapping[str, Any]]]
"""The lines of each run's log.jsonl, by init."""


def plot_forest(folder: Path, rows: Sequence[Row], names: Sequence[str]) -> str:
    """AUC and interval of every init, protocol and task: a panel per task; without points of few-label curves."""
    recipes = len({row.recipe for row in rows})
    panels: dict[str, dict[str, dict[str, tuple[float, figures.Interval | None]]]] = {}
    for row in sorted(rows, key=lambda row: (row.recipe, by_protocol(row.protocol))):
        if row.labels is None and row.mean is not None:
            group = PROTOCOLS[row.protocol] + (f"\n{row.recipe}" if recipes > 1 else "")
            panels.setdefault(row.task, {}).setdefault(group, {})[row.init] = row.mean, row.patient_interval
    if not panels:
        return ""
    tasks = list(dict.fromkeys(row.task for row in rows if row.task in panels))
    content = ""
    for start in range(0, len(tasks), MOST_PANELS):
        path = folder / ("forest.svg" if not start else f"forest-{start // MOST_PANELS + 1}.svg")
        chosen = [(figures.label(task), panels[task]) for task in tasks[start : start + MOST_PANELS]]
        figures.forest(path, chosen, "AUC", names)
        content += _figure(
            path,
            "Forest plot of AUCs",
            "AUC of each encoder, task and protocol with its 95 % interval over patients (images, where no patient is "
            "named). The interval shows what other test patients would change, not what other trainings would. The "
            "axes differ between tasks.",
        )
    return content


Grids = dict[tuple[str, str], dict[str, list[tuple[str, list[Outcome]]]]]


def _grids(predictions: Predictions) -> Grids:
    """The outcomes of each init by (task, recipe) and protocol, without points of few-label curves."""
    grids: Grids = {}
    for experiment, fold_runs in sorted(predictions.items(), key=lambda item: by_protocol(item[0].protocol)):
        if protocol_of(experiment.protocol)[1] is None:
            outcomes = [fold_runs[each] for each in sorted(fold_runs)]
            panels = grids.setdefault((experiment.task, experiment.recipe), {})
            panels.setdefault(experiment.protocol, []).append((experiment.init, outcomes))
    return grids


def plot_roc(folder: Path, predictions: Predictions, names: Sequence[str] = ()) -> dict[tuple[str, str], str]:
    """ROC curves by (task, recipe): a panel per protocol, a line per init. `names` give the inits' colours."""
    names = names or list(dict.fromkeys(each.init for each in predictions))
    content = {}
    for (task, recipe), protocols in _grids(predictions).items():
        panels = []
        for protocol, inits in protocols.items():
            lines = []
            for init, outcomes in inits:
                if curves := [curve for each in outcomes if (curve := _mean_roc(each)) is not None]:
                    low, high = np.quantile(curves, (0.25, 0.75), axis=0)
                    lines.append(figures.Line(init, GRID, np.mean(curves, axis=0), low, high))
            if lines:
                panels.append((PROTOCOLS[protocol], lines))
        if not panels:
            continue
        path = folder / file_name(f"roc-{task}-{recipe}.svg")
        figures.lines(path, panels, ("1 − specificity", "sensitivity"), names, square=True)
        content[task, recipe] = _figure(
            path,
            f"ROC curves, {task}, {recipe}",
            "ROC curves: the mean of all folds and repeats (and of the classes, each against the rest) at equal "
            "false-positive rates; bands: the middle half of folds and repeats.",
        )
    return content


def _mean_roc(outcome: Outcome) -> NDArray[np.float64] | None:
    """The sensitivity at each rate of `GRID`, averaged over the classes; None if it cannot be computed for one."""
    curves = []
    for positive, scores in columns_of(outcome.labels, outcome.scores):
        if not np.isfinite(scores).all() or not 0 < np.count_nonzero(positive) < len(positive):
            return None
        hits, alarms = ranked(positive, scores)
        # At 0 np.interp takes the last point, the top of the curve's vertical start.
        curves.append(np.interp(GRID, np.append(0, alarms) / alarms[-1], np.append(0, hits) / hits[-1]))
    mean: NDArray[np.float64] = np.mean(curves, axis=0)
    return mean


def plot_calibration(folder: Path, predictions: Predictions, names: Sequence[str]) -> dict[tuple[str, str], str]:
    """Reliability curves by (task, recipe): a panel per protocol, a line per init."""
    content = {}
    for (task, recipe), protocols in _grids(predictions).items():
        panels, labels = [], ("predicted probability", "share of hits")
        for protocol, inits in protocols.items():
            lines = [line for init, outcomes in inits if (line := _reliability(init, outcomes)) is not None]
            if lines:
                panels.append((PROTOCOLS[protocol], lines))
        if not panels:
            continue
        path = folder / file_name(f"calibration-{task}-{recipe}.svg")
        figures.lines(path, panels, labels, names, square=True, marked=True)
        content[task, recipe] = _figure(
            path,
            f"Calibration, {task}, {recipe}",
            "Calibration: the share of positive images (of right answers, with several classes) among those of a "
            "predicted probability, over all folds and repeats; on the diagonal, probabilities are true. Bins with "
            "under 1 % of the images are left out.",
        )
    return content


def _reliability(name: str, outcomes: Sequence[Outcome]) -> figures.Line | None:
    """The reliability curve of all fold runs; None if a score is no probability."""
    if not all(((each.scores >= 0) & (each.scores <= 1)).all() for each in outcomes):
        return None
    bins = [
        reliability(hits, probabilities)
        for each in outcomes
        for hits, probabilities in confidences(each.labels, each.scores)
    ]
    counts, hits, expected = (np.sum(values, axis=0) for values in zip(*bins, strict=True))
    chosen = counts >= max(1, SHOWN * counts.sum())
    return figures.Line(name, expected[chosen] / counts[chosen], hits[chosen] / counts[chosen])


def plot_few_labels(folder: Path, rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[str, str], str]:
    """AUC against the number of labels by (task, recipe): a panel per protocol, a line per init."""
    grouped: dict[tuple[str, str], dict[str, dict[str, list[Row]]]] = {}
    whole = {(row.task, row.recipe, row.protocol, row.init): row.mean for row in rows if row.labels is None}
    for row in sorted(rows, key=lambda row: by_protocol(row.protocol)):
        if row.labels is not None and row.mean is not None:
            panels = grouped.setdefault((row.task, row.recipe), {})
            panels.setdefault(protocol_of(row.protocol)[0], {}).setdefault(row.init, []).append(row)
    content = {}
    for (task, recipe), protocols in grouped.items():
        drawn = []
        for protocol, inits in protocols.items():
            lines = []
            for init, points in inits.items():
                x = np.array([point.labels for point in points], np.float64)
                y = np.array([point.mean for point in points], np.float64)
                spread = np.array([point.spread or 0.0 for point in points])
                level = whole.get((task, recipe, protocol, init))
                lines.append(figures.Line(init, x, y, (y - spread).clip(0, 1), (y + spread).clip(0, 1), level))
            drawn.append((PROTOCOLS[protocol], lines))
        path = folder / file_name(f"few-labels-{task}-{recipe}.svg")
        figures.lines(path, drawn, ("labelled images of each class", "AUC"), names, marked=True, logarithmic=True)
        content[task, recipe] = _figure(
            path,
            f"Few-label curves, {task}, {recipe}",
            "Few labels: mean AUC over tries and folds; bands: one standard deviation of them; dotted: with all "
            "training images.",
        )
    return content


def plot_validation_loss(folder: Path, curves: Path) -> str:
    """Validation losses in a curves.csv over the epochs: a panel per task, protocol and recipe."""
    if not os.path.isfile(curves):
        return ""
    grouped: dict[tuple[str, str, str], dict[str, NDArray[np.float64]]] = {}
    for experiment, losses in _validation_losses(curves).items():
        if protocol_of(experiment.protocol)[1] is not None:
            continue  # of the few-label curves there would be too many
        grouped.setdefault((experiment.task, experiment.recipe, experiment.protocol), {})[experiment.init] = (
            losses
        )
    if not grouped:
        return ""
    panels = [
        (f"{figures.label(task)}, {protocol_name(protocol)}, {recipe}", inits)
        for (task, recipe, protocol), inits in sorted(grouped.items())
    ][:MOST_PANELS]
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


MONITORED = {
    "rankme": "RankMe (effective rank)",
    "alignment": "alignment (lower: closer views)",
    "uniformity": "uniformity (lower: more even)",
    "collapsed": "share of collapsed dimensions",
}


def plot_monitor(folder: Path, logs: Logs) -> str:
    """What the monitor wrote into the runs' logs over the epochs: a panel per number, a line per run."""
    keys = list(
        dict.fromkeys(key for log in logs.values() for line in log for key in line if key[:8] == "monitor/")
    )
    # In the monitor's order: the class and the fields by name, then the rest.
    keys.sort(key=lambda key: [*MONITORED].index(key[8:]) if key[8:] in MONITORED else -1)
    names = [init for init, log in logs.items() if any(key in line for line in log for key in keys)]
    panels = []
    for key in keys[:MOST_PANELS]:
        lines = []
        for init in names:
            points = [(line["epoch"], line[key]) for line in logs[init] if key in line]
            if points:
                x, y = np.array(points, np.float64).T
                lines.append(figures.Line(init, x, y))
        name = key[8:]
        words = name.removeprefix("knn_").replace("_", " ")
        title = MONITORED.get(name) or (f"kNN accuracy, {words}" if name != words else name)
        panels.append((figures.label(title), lines))
    if not panels:
        return ""
    path = folder / "monitor.svg"
    figures.lines(path, panels, ("epoch", ""), names, marked=True)
    return _figure(
        path,
        "Monitor of the pretraining",
        "Pretraining watched on held-out images: accuracy of nearest neighbours for the class and each field of the "
        "metadata, the effective rank of the features, how close two views of an image are, how evenly images are "
        "spread, and the share of dimensions that hardly vary.",
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
