"""Reading predictions.csv: the outcome of each fold run, the finished repeats, and a metric of each fold."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modan_fast.downstream.results import COLUMNS, Experiment, Results, key_of
from modan_fast.downstream.tasks import FoldRun
from shard_builder.settings import InputError

MOST_EXPERIMENTS = 1000  # in one report


class Outcome(NamedTuple):
    """The test images of a fold run: `labels` int64, 0 or 1, and `scores` float64, in the file's order."""

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]


Predictions = Mapping[Experiment, Mapping[FoldRun, Outcome]]
Metric = Callable[[NDArray[np.int64], NDArray[np.float64]], float | None]


def read_predictions(path: Path) -> Predictions:
    """The content of a predictions.csv, in its order. Raises `InputError` if it is missing or a line is damaged."""
    found: dict[Experiment, dict[FoldRun, tuple[list[int], list[float]]]] = {}
    try:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise InputError(f"{path} is no regular file: replace it by a copy")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) != COLUMNS:
                raise InputError(f"{path}, line 1: the columns must be {','.join(COLUMNS)}")
            for row in reader:
                try:
                    *key, repeat, fold, _, label, score = row
                    experiment, fold_run = key_of(key, repeat, fold)
                    if label not in ("0", "1"):
                        raise ValueError("no label")
                    labels, scores = found.setdefault(experiment, {}).setdefault(fold_run, ([], []))
                    labels.append(int(label))
                    scores.append(float(score))
                except (TypeError, ValueError) as error:
                    raise InputError(
                        f"{path}, line {reader.line_num}: damaged; the same evaluation again repairs it"
                    ) from error
    except OSError as error:
        raise InputError(f"no predictions at {path} ({error.strerror}): run an evaluation first") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV file in UTF-8 ({error}): choose another results folder") from error
    if len(found) > MOST_EXPERIMENTS:
        raise InputError(f"{path} has {len(found):,} experiments, over {MOST_EXPERIMENTS:,}: divide it")
    return {
        experiment: {
            fold_run: Outcome(np.array(labels), np.array(scores))
            for fold_run, (labels, scores) in fold_runs.items()
        }
        for experiment, fold_runs in found.items()
    }


def read_finished(folder: Path) -> tuple[Predictions, int]:
    """The finished repeats in a results folder, and the number of fold runs of unfinished ones, which are left out.

    A repeat is finished if every fold of its task has all the test images that runs.json counts; without a runs.json
    all repeats count as finished. Raises `InputError` if none is finished, and as `read_predictions`.
    """
    predictions = read_predictions(folder / "predictions.csv")
    tasks = Results.open(folder).runs["tasks"] if os.path.lexists(folder / "runs.json") else {}
    finished: dict[Experiment, dict[FoldRun, Outcome]] = {}
    for experiment, fold_runs in predictions.items():
        test_images = tasks.get(experiment.task, {}).get("test_images") or ()
        repeats = {
            repeat
            for repeat in {fold_run.repeat for fold_run in fold_runs}
            if all(
                (outcome := fold_runs.get(FoldRun(repeat, fold))) and len(outcome.labels) == images
                for fold, images in enumerate(test_images, start=1)
            )
        }
        if whole := {fold_run: outcome for fold_run, outcome in fold_runs.items() if fold_run.repeat in repeats}:
            finished[experiment] = whole
    if not finished:
        raise InputError(
            f"{folder / 'predictions.csv'} has no finished repeat: run the evaluation to its end first"
        )
    return finished, sum(map(len, predictions.values())) - sum(map(len, finished.values()))


def by_fold(predictions: Predictions, metric: Metric) -> dict[Experiment, dict[int, NDArray[np.float64]]]:
    """A metric of each fold, `[experiment][repeat][fold - 1]`, with NaN for None; only repeats with all folds."""
    folds: dict[str, set[int]] = defaultdict(set)
    for experiment, fold_runs in predictions.items():
        folds[experiment.task].update(fold_run.fold for fold_run in fold_runs)
    table: dict[Experiment, dict[int, NDArray[np.float64]]] = {}
    for experiment, fold_runs in predictions.items():
        wanted = sorted(folds[experiment.task])
        table[experiment] = {
            # np.array turns None into NaN.
            repeat: np.array([metric(*fold_runs[FoldRun(repeat, fold)]) for fold in wanted], np.float64)
            for repeat in sorted({fold_run.repeat for fold_run in fold_runs})
            if all(FoldRun(repeat, fold) in fold_runs for fold in wanted)
        }
    return table
