"""Reading predictions.csv: the outcome of each fold run, the finished repeats, and a metric of each fold."""

from __future__ import annotations

import csv
import os
import re
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
PLAIN = re.compile("0|[1-9][0-9]{0,5}")  # the index of a class


class Outcome(NamedTuple):
    """The test images of a fold run, in the file's order: `labels` int64, `scores` float64 and names.

    Of two classes both are (n,), a label 0 or 1 and the score of 1. Of C classes `labels` (n,) are indices and `scores`
    (n, C); of L labels both are (n, L).
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    images: tuple[str, ...]


Predictions = Mapping[Experiment, Mapping[FoldRun, Outcome]]
Metric = Callable[[NDArray[np.int64], NDArray[np.float64]], float | None]


class _Lines(NamedTuple):
    """The lines of a fold run while the file is read."""

    labels: list[str]
    scores: list[str]
    images: list[str]


def read_predictions(path: Path) -> Predictions:
    """The content of a predictions.csv, in its order. Raises `InputError` if it is missing or a line is damaged."""
    found: dict[Experiment, dict[FoldRun, Outcome]] = {}
    unread: dict[tuple[Experiment, FoldRun], _Lines] = {}
    names: dict[str, str] = {}  # of images, each once in memory
    forms: dict[str, tuple[int, int]] = {}  # by task: how many labels and scores an image has
    try:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise InputError(f"{path} is no regular file: replace it by a copy")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) != COLUMNS:
                raise InputError(f"{path}, line 1: the columns must be {','.join(COLUMNS)}")
            for row in reader:
                try:
                    *key, repeat, fold, image, label, score = row
                    experiment, fold_run = key_of(key, repeat, fold)
                    form = label.count(" ") + 1, score.count(" ") + 1
                    if forms.setdefault(experiment.task, form) != form:
                        raise ValueError("another number of labels or scores than before")
                    _check(label.split(" "), score.split(" "))
                    found.setdefault(experiment, {})
                    lines = unread.setdefault((experiment, fold_run), _Lines([], [], []))
                    lines.labels.append(label)
                    lines.scores.append(score)
                    lines.images.append(names.setdefault(image, image))
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
    for (experiment, fold_run), lines in unread.items():
        found[experiment][fold_run] = _outcome(lines)
    return found


def _check(labels: list[str], scores: list[str]) -> None:
    """Raise ValueError if an image has no labels and scores that an evaluation writes."""
    values = [float(score) for score in scores]
    if len(scores) == 1:
        right = labels in (["0"], ["1"])
    elif len(labels) == 1:
        right = PLAIN.fullmatch(labels[0]) is not None and int(labels[0]) < len(scores)
    else:
        right = len(labels) == len(scores) and all(label in ("0", "1") for label in labels)
    # What a diverged training scored is no number. Files of one score an image may hold any.
    if not right or (len(scores) > 1 and any(value < 0 or value > 1 for value in values)):
        raise ValueError("no label, or no probability")


def _outcome(lines: _Lines) -> Outcome:
    labels = np.array([[int(each) for each in label.split(" ")] for label in lines.labels], np.int64)
    scores = np.array([[float(each) for each in score.split(" ")] for score in lines.scores])
    return Outcome(
        labels[:, 0] if labels.shape[1] == 1 else labels,
        scores[:, 0] if scores.shape[1] == 1 else scores,
        tuple(lines.images),
    )


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
            repeat: np.array([metric(*fold_runs[FoldRun(repeat, fold)][:2]) for fold in wanted], np.float64)
            for repeat in sorted({fold_run.repeat for fold_run in fold_runs})
            if all(FoldRun(repeat, fold) in fold_runs for fold in wanted)
        }
    return table
