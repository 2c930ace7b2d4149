"""Leaks of a task: test images that share a patient or identical bytes with a training image of the same fold."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from modan_fast.downstream.tasks import Task
from modan_fast.folder import write_text
from shard_builder.settings import InputError

ENDING = "-leakage.csv"  # after the task's name, in the results folder


class Leak(NamedTuple):
    """A test image and the first training image of the same fold that shares its `bytes` or its `patient`."""

    fold: int
    shared: str
    test_image: str
    train_image: str


def find_leaks(task: Task) -> list[Leak]:
    """The leaks of all folds, by bytes and, if the patients are known, by patient."""
    found = []
    for number, fold in enumerate(task.folds, start=1):
        for shared, marks in (("bytes", task.digests), ("patient", task.patients)):
            if not marks:
                continue
            trained = {marks[row]: row for row in fold.train[::-1]}
            found += [
                Leak(number, shared, task.images[row], task.images[trained[marks[row]]])
                for row in fold.test
                if marks[row] in trained
            ]
    return found


def update_leaks(task: Task, path: Path) -> list[Leak]:
    """List the leaks of a task in a CSV file, and return them; without leaks the file is removed.

    The file's leaks by patient are kept if the patients are unknown now.
    """
    found = find_leaks(task)
    if path.exists() and not task.patients:
        found += [leak for leak in read_leaks(path) if leak.shared == "patient"]
    if found:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([Leak._fields, *sorted(found)])
        write_text(path, text.getvalue())
    else:
        path.unlink(missing_ok=True)
    return found


def read_leaks(path: Path) -> list[Leak]:
    """The leaks in a file that `update_leaks` wrote. Raises `InputError` if it is damaged."""
    try:
        if not os.path.isfile(path):
            raise ValueError("no file")
        with path.open(encoding="utf-8", newline="") as file:
            return [Leak(int(fold), *rest) for fold, *rest in islice(csv.reader(file), 1, None)]
    except (ValueError, TypeError, csv.Error, OSError) as error:
        raise InputError(f"{path} is no list of leaks: remove it, the same evaluation again writes it") from error


def describe(found: Iterable[Leak]) -> str:
    """The number of leaking test images in words; zero by patient is left out, because patients may be unknown."""
    images: dict[str, set[str]] = {}
    for leak in found:
        images.setdefault(leak.shared, set()).add(leak.test_image)
    counts = ", ".join(f"{len(tested)} by the same {shared}" for shared, tested in images.items())
    return f"test images that share a patient or identical bytes with a training image: {counts}"
