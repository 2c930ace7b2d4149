"""The results folder: predictions.csv and curves.csv, to which finished fold runs are appended, and runs.json, which
records what made them. Inits, tasks, protocols, recipes and repeats can be added later; other settings are refused.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from modan_fast.config import to_json
from modan_fast.downstream.tasks import FoldRun, Task
from modan_fast.folder import is_new, read_json, write_json
from modan_fast.recipes import evaluate_config
from shard_builder.atomic import replacing
from shard_builder.settings import InputError

FORMAT = 1


class Experiment(NamedTuple):
    """All repeats and folds of one task, init, recipe and protocol. The first columns of predictions.csv."""

    task: str
    init: str
    recipe: str
    protocol: str


COLUMNS = (*Experiment._fields, "repeat", "fold", "image", "label", "score")
CURVE_COLUMNS = (*Experiment._fields, "repeat", "fold", "epoch", "val_loss")


def auc(
    labels: Sequence[int] | NDArray[np.int64], scores: Sequence[float] | NDArray[np.floating[Any]]
) -> float | None:
    """Area under the ROC curve, in [0, 1]; None where a class is missing or a score is not finite."""
    if len(set(labels)) < 2 or not np.isfinite(scores).all():
        return None
    return float(roc_auc_score(labels, scores))


def recorded_settings(runs: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """The settings that runs.json records for a recipe; one that it lacks, being older, has the recipe's value."""
    defaults = to_json(evaluate_config({"recipe": recipe, "init": ("scratch",)}).resolved())
    return {**defaults, **runs["settings"].get(recipe, {})}


@dataclass(frozen=True)
class Results:
    """An open results folder; `runs` is the content of its runs.json."""

    folder: Path
    runs: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Results:
        """The folder as it is, or as a new one would be: nothing is written. `InputError` if it is no such."""
        path = folder / "runs.json"
        if not path.exists():
            if (folder / "predictions.csv").exists():
                raise InputError(f"{folder} has predictions.csv but no runs.json: choose another with `out`")
            if not is_new(folder):
                raise InputError(f"{folder} exists and is no results folder: choose another one with `out`")
            return cls(folder, {"format": FORMAT, "settings": {}, "tasks": {}, "inits": {}, "times": []})
        runs = read_json(path)
        if runs.get("format") != FORMAT:
            raise InputError(f"{path} has format {runs.get('format')}, this version reads {FORMAT}")
        return cls(folder, runs)

    @property
    def predictions(self) -> Path:
        """Its predictions.csv."""
        return self.folder / "predictions.csv"

    @property
    def curves(self) -> Path:
        """Its curves.csv: the validation loss after each epoch of each fold_run."""
        return self.folder / "curves.csv"

    def admit(
        self, recipe: str, settings: Mapping[str, Any], task: Task, inits: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Add what is new to `runs`; `InputError` where something contradicts what the folder was made with."""
        before = recorded_settings(self.runs, recipe) if recipe in self.runs["settings"] else settings
        for name, value in settings.items():
            if before.get(name) != value:
                setting = f"`{name}={before.get(name)}`"
                raise InputError(
                    f"{self.folder} was made with {setting}, not {value}: "
                    f"pass {setting}, or choose another folder with `out`"
                )
        self.runs["settings"][recipe] = dict(settings)
        record = {
            "path": str(task.folder.resolve()),
            "sha256": task.sha256,
            "images": len(task.images),
            "positive": task.positive,
            "test_images": [len(fold.test) for fold in task.folds],
        }
        if self.runs["tasks"].setdefault(task.name, record)["sha256"] != task.sha256:
            raise InputError(
                f"{self.folder} was made with other images or folds of task {task.name}: "
                f"choose another folder with `out`"
            )
        for name, init in inits.items():
            if self.runs["inits"].setdefault(name, dict(init)).get("sha256") != init.get("sha256"):
                raise InputError(
                    f"the weights of {name} ({init.get('path')}) have changed since {self.folder} was made: "
                    f"choose another folder with `out`"
                )

    def save(self) -> None:
        """Write runs.json."""
        write_json(self.folder / "runs.json", self.runs)

    def finished(self) -> set[tuple[Experiment, FoldRun]]:
        """The finished fold runs in predictions.csv. Half a line or half a fold run, left by a kill, is cut off."""
        keys, lines = _lines(self.predictions, COLUMNS)
        wanted = {}
        for number, key in enumerate(keys, start=2):
            try:
                experiment, fold_run = key
                wanted[key] = self.runs["tasks"][experiment.task]["test_images"][fold_run.fold - 1]
            except (IndexError, KeyError, TypeError) as error:
                where = f"{self.predictions}, line {number}"
                raise InputError(f"{where}: damaged; choose another folder with `out`") from error
        whole = {key for key, count in Counter(keys).items() if count == wanted[key]}
        _keep(self.predictions, keys, lines, whole)
        _keep(self.curves, *_lines(self.curves, CURVE_COLUMNS), whole)
        return whole

    def append(
        self,
        experiment: Experiment,
        task: Task,
        fold_runs: Sequence[FoldRun],
        scores: Sequence[NDArray[np.float32]],
        losses: Sequence[NDArray[np.float32]],
    ) -> None:
        """Append the test images of `fold_runs` to predictions.csv, and their validation losses to curves.csv.

        A number is its shortest exact float32 decimal.
        """
        curves, predictions = [], []
        for fold_run, fold_scores, fold_losses in zip(fold_runs, scores, losses, strict=True):
            key = (*experiment, fold_run.repeat, fold_run.fold)
            curves += [(*key, epoch, str(loss)) for epoch, loss in enumerate(fold_losses, start=1)]
            for row, score in zip(task.folds[fold_run.fold - 1].test, fold_scores, strict=True):
                predictions.append((*key, task.images[row], task.labels[row], str(score)))
        # The predictions come last, because a fold run with predictions counts as finished.
        _append(self.curves, CURVE_COLUMNS, curves)
        _append(self.predictions, COLUMNS, predictions)

    def add_time(
        self,
        experiment: Experiment,
        task: Task,
        fold_runs: Sequence[FoldRun],
        epochs: int,
        seconds: float,
        device: str,
    ) -> None:
        """Add the wall-clock of `fold_runs`, all their work included, to the line of the experiment and device."""
        times = self.runs["times"]
        key = {**experiment._asdict(), "device": device}
        line = next((line for line in times if key.items() <= line.items()), None)
        if line is None:
            line = {**key, "cells": 0, "images": 0, "seconds": 0.0}
            times.append(line)
        line["cells"] += len(fold_runs)
        line["images"] += epochs * sum(len(task.folds[fold_run.fold - 1].train) for fold_run in fold_runs)
        line["seconds"] += seconds
        line["seconds_per_epoch"] = line["seconds"] / (line["cells"] * epochs)
        self.save()


def _lines(path: Path, columns: Sequence[str]) -> tuple[list[tuple[Experiment, FoldRun]], list[bytes]]:
    """The fold run of each line of a CSV file, and the lines with the head; an unfinished last line is left out.

    Raises `InputError` for a line that names no fold run, and where the columns are not `columns`.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    if lines and lines[0] != _line(columns):
        raise InputError(f"{path} was written by another program: choose another folder with `out`")
    keys = []
    for number, row in enumerate(csv.reader(line.decode(errors="replace") for line in lines[1:]), start=2):
        try:
            keys.append((Experiment(*row[:4]), FoldRun(int(row[4]), int(row[5]))))
        except (IndexError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: damaged; choose another folder with `out`") from error
    return keys, lines


def _keep(
    path: Path,
    keys: Sequence[tuple[Experiment, FoldRun]],
    lines: Sequence[bytes],
    whole: set[tuple[Experiment, FoldRun]],
) -> None:
    """Cut a CSV file down to its head and the lines of the `whole` fold runs."""
    kept = b"".join([*lines[:1], *(line for key, line in zip(keys, lines[1:], strict=True) if key in whole)])
    if path.exists() and kept != path.read_bytes():
        with replacing(path) as file:
            file.write(kept)


def _append(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Add rows to a CSV file, which gets its head first, and see them on the disk."""
    with path.open("ab") as file:
        if not file.tell():
            file.write(_line(columns))
        file.write(b"".join(map(_line, rows)))
        file.flush()
        os.fsync(file.fileno())


def _line(values: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()
