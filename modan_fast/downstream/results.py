"""The results folder: predictions.csv, to which finished cells are appended, and runs.json, which says what
made them. Inits, tasks, protocols, recipes and repeats can be added later; other settings are refused.
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

from modan_fast.checkpoint import read_json, write_atomically, write_json
from modan_fast.downstream.tasks import Cell, Task
from shard_builder.settings import InputError

FORMAT = 1


class Series(NamedTuple):
    """What is compared: the cells that differ in repeat and fold only. The first columns of predictions.csv."""

    task: str
    init: str
    recipe: str
    protocol: str


COLUMNS = (*Series._fields, "repeat", "fold", "image", "label", "score")
HEADER = ",".join(COLUMNS).encode() + b"\n"


def auc(labels: Sequence[int] | NDArray[np.int64], scores: Sequence[float] | NDArray[np.float32]) -> float | None:
    """Area under the ROC curve, in [0, 1]; None where a class is missing or a score is not finite."""
    if len(set(labels)) < 2 or not np.isfinite(scores).all():
        return None
    return float(roc_auc_score(labels, scores))


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
                raise InputError(f"{folder} has predictions.csv but no runs.json: name another with --out")
            return cls(folder, {"format": FORMAT, "settings": {}, "tasks": {}, "inits": {}, "times": []})
        runs = read_json(path)
        if runs.get("format") != FORMAT:
            raise InputError(f"{path} has format {runs.get('format')}, this version reads {FORMAT}")
        return cls(folder, runs)

    @property
    def predictions(self) -> Path:
        """Its predictions.csv."""
        return self.folder / "predictions.csv"

    def admit(
        self, recipe: str, settings: Mapping[str, Any], task: Task, inits: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Add what is new to `runs`; `InputError` where something contradicts what the folder was made with."""
        before = self.runs["settings"].setdefault(recipe, dict(settings))
        for name, value in settings.items():
            if before.get(name) != value:
                option = f"--{name.replace('_', '-')} {before.get(name)}"
                raise InputError(
                    f"{self.folder} was made with {option}, not {value}: "
                    f"give {option}, or another folder with --out"
                )
        record = {
            "path": str(task.folder.resolve()),
            "sha256": task.sha256,
            "images": len(task.images),
            "test_images": [len(fold.test) for fold in task.folds],
        }
        if self.runs["tasks"].setdefault(task.name, record)["sha256"] != task.sha256:
            raise InputError(
                f"{self.folder} was made with other images or folds of task {task.name}: "
                f"name another folder with --out"
            )
        for name, init in inits.items():
            if self.runs["inits"].setdefault(name, dict(init)).get("sha256") != init.get("sha256"):
                raise InputError(
                    f"the weights of {name} ({init.get('path')}) have changed since {self.folder} was made: "
                    f"name another folder with --out"
                )

    def save(self) -> None:
        """Write runs.json."""
        write_json(self.folder / "runs.json", self.runs)

    def finished(self) -> set[tuple[Series, Cell]]:
        """The cells in predictions.csv. What a kill leaves, half a line or half a cell, is cut off."""
        if not self.predictions.exists():
            return set()
        content = self.predictions.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        if lines and lines[0] != HEADER:
            raise InputError(f"{self.predictions} is of another making: name another folder with --out")
        keys, wanted = [], {}
        for number, row in enumerate(csv.reader(line.decode(errors="replace") for line in lines[1:]), start=2):
            try:
                key = Series(*row[:4]), Cell(int(row[4]), int(row[5]))
                wanted[key] = self.runs["tasks"][row[0]]["test_images"][int(row[5]) - 1]
            except (IndexError, KeyError, TypeError, ValueError) as error:
                where = f"{self.predictions}, line {number}"
                raise InputError(f"{where}: damaged; name another folder with --out") from error
            keys.append(key)
        whole = {key for key, count in Counter(keys).items() if count == wanted[key]}
        kept = b"".join([*lines[:1], *(line for key, line in zip(keys, lines[1:], strict=True) if key in whole)])
        if kept != content:
            write_atomically(self.predictions, lambda at: at.write_bytes(kept))
        return whole

    def append(
        self, series: Series, task: Task, cells: Sequence[Cell], scores: Sequence[NDArray[np.float32]]
    ) -> None:
        """Add the test images of `cells` to predictions.csv; a score is its shortest exact float32 decimal."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for cell, cell_scores in zip(cells, scores, strict=True):
            for row, score in zip(task.folds[cell.fold - 1].test, cell_scores, strict=True):
                writer.writerow((*series, cell.repeat, cell.fold, task.images[row], task.labels[row], str(score)))
        with self.predictions.open("ab") as file:
            if not file.tell():
                file.write(HEADER)
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())

    def add_time(self, series: Series, cells: int, epochs: int, seconds: float) -> None:
        """Add the wall-clock of `cells`, all their work included, to the line of their series in runs.json."""
        times = self.runs["times"]
        line = next((line for line in times if series._asdict().items() <= line.items()), None)
        if line is None:
            line = {**series._asdict(), "cells": 0, "seconds": 0.0}
            times.append(line)
        line["cells"] += cells
        line["seconds"] += seconds
        line["seconds_per_epoch"] = line["seconds"] / (line["cells"] * epochs)
        self.save()
