"""Tables of an evaluation, computed from its predictions.csv alone."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from modan_fast.downstream.results import COLUMNS, Series, auc
from shard_builder.settings import InputError


@dataclass(frozen=True)
class Row:
    """A line of the AUC table: mean and sample standard deviation over the repeats.

    `repeats` counts those with all folds of the task. What cannot be computed is None.
    """

    task: str
    recipe: str
    protocol: str
    init: str
    repeats: int
    mean: float | None
    std: float | None


def fold_aucs(predictions: Path) -> dict[Series, dict[int, dict[int, float | None]]]:
    """The AUC, or None, of each fold by series and repeat: `[series][repeat][fold]`, in the file's order.

    Raises `InputError` where the file is missing or a line is damaged.
    """
    labels: dict[tuple[Series, int, int], list[int]] = defaultdict(list)
    scores: dict[tuple[Series, int, int], list[float]] = defaultdict(list)
    try:
        with predictions.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) != COLUMNS:
                raise InputError(f"{predictions}, line 1: the columns must be {','.join(COLUMNS)}")
            for row in reader:
                try:
                    task, init, recipe, protocol, repeat, fold, _, label, score = row
                    cell = Series(task, init, recipe, protocol), int(repeat), int(fold)
                    labels[cell].append(int(label))
                    scores[cell].append(float(score))
                except ValueError as error:
                    raise InputError(
                        f"{predictions}, line {reader.line_num}: damaged; the same evaluation again repairs it"
                    ) from error
    except OSError as error:
        raise InputError(
            f"no predictions at {predictions} ({error.strerror}): run an evaluation first"
        ) from error
    table: dict[Series, dict[int, dict[int, float | None]]] = defaultdict(lambda: defaultdict(dict))
    for cell, found in scores.items():
        series, repeat_number, fold_number = cell
        table[series][repeat_number][fold_number] = auc(labels[cell], found)
    return table


def repeat_aucs(predictions: Path) -> dict[Series, dict[int, float | None]]:
    """The mean of the fold AUCs of each repeat that has all folds of its task; None where one has no AUC."""
    by_fold = fold_aucs(predictions)
    folds: dict[str, set[int]] = defaultdict(set)
    for series, repeats in by_fold.items():
        folds[series.task].update(*repeats.values())
    table: dict[Series, dict[int, float | None]] = {}
    for series, repeats in by_fold.items():
        table[series] = {}
        for repeat, aucs in sorted(repeats.items()):
            if aucs.keys() == folds[series.task]:
                known = [value for value in aucs.values() if value is not None]
                table[series][repeat] = statistics.fmean(known) if len(known) == len(aucs) else None
    return table


def auc_table(predictions: Path) -> list[Row]:
    """One row a (task, recipe, protocol, init), in the order of `predictions`."""
    rows = []
    for series, aucs in repeat_aucs(predictions).items():
        known = [value for value in aucs.values() if value is not None]
        whole = len(known) == len(aucs) > 0
        mean = statistics.fmean(known) if whole else None
        std = statistics.stdev(known) if whole and len(known) > 1 else None
        rows.append(Row(**series._asdict(), repeats=len(aucs), mean=mean, std=std))
    return rows
