"""Which images a fold run trains on: all of its fold's, or a few of each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from modan_fast.downstream.tasks import Fold, FoldRun, Task
from shard_builder.settings import InputError


class Cell(NamedTuple):
    """A fold run, and the images that it trains on, is selected by, and is tested on."""

    fold_run: FoldRun
    fold: Fold


def cells_of(task: Task, fold_runs: Sequence[FoldRun], seed: int, count: int | None = None) -> list[Cell]:
    """The cells of fold runs: on whole folds, or on `count` labelled images of each class.

    Raises `InputError` if fewer than two images are left to train on, because batch-norm needs two.
    """
    cells = []
    for fold_run in fold_runs:
        fold = task.fold_of(fold_run)
        if count is not None:
            fold = replace(fold, train=_few(task, fold.train, fold_run, seed, count))
        if len(fold.train) < 2:
            raise InputError(
                f"fold {fold_run.fold} of task {task.name} has one image to train on: give more with `labels`"
            )
        cells.append(Cell(fold_run, fold))
    return cells


def _few(task: Task, rows: NDArray[np.int64], fold_run: FoldRun, seed: int, count: int) -> NDArray[np.int64]:
    """The rows of `count` images of each class, or of all where a class has fewer, in the order of the fold.

    Where an image may have several labels, these are the images with each label, and those without any. Each class is
    shuffled once for a fold run, so five images of a class are among its ten.
    """
    generator = fold_run.generator(seed, "labels")
    chosen = np.zeros(len(rows), bool)
    for members in _members(task, rows):
        found = np.flatnonzero(members)
        order = torch.randperm(len(found), generator=generator).numpy()
        chosen[found[order[:count]]] = True
    return rows[chosen]


def _members(task: Task, rows: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """For each class, which of the rows are of it."""
    labels = task.labels[rows]
    if task.kind == "multilabel":
        return [*(labels.T == 1), ~labels.any(axis=1)]
    return [labels == index for index in range(task.outputs)]
