"""The results folder: predictions.csv and the files beside it, one fold run appended after another, and runs.json.

runs.json records what was judged and how. Inits, tasks, protocols, recipes and repeats can be added later; other
settings are refused.
"""

from __future__ import annotations

import csv
import io
import os
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from modan_fast.config import Protocol, Recipe, Stem, changed, to_json
from modan_fast.downstream.subgroups import COLUMNS as IMAGE_COLUMNS
from modan_fast.downstream.subgroups import ENDING
from modan_fast.downstream.tasks import FoldRun, Kind, Task
from modan_fast.folder import is_new, read_json, write_json
from modan_fast.recipes import evaluate_config
from shard_builder.atomic import naming, replacing
from shard_builder.settings import InputError

FORMAT = 1


class Experiment(NamedTuple):
    """What is compared: an init judged on a task by a protocol. These are the first columns of predictions.csv.

    The protocol `logistic:5` is `logistic` on five labelled images of each class; its repeats are tries.
    """

    task: str
    init: str
    recipe: str
    protocol: str


COLUMNS = (*Experiment._fields, "repeat", "fold", "image", "label", "score")
CURVE_COLUMNS = (*Experiment._fields, "repeat", "fold", "epoch", "val_loss")
CONVERGENCE_COLUMNS = (*Experiment._fields, "repeat", "fold", "last_loss", "before_loss", "optimum")
CHOICE_COLUMNS = (*Experiment._fields, "repeat", "fold", "chosen", "val_loss")
SIDE_FILES = {  # beside predictions.csv; a fold run has lines in some of them
    "curves.csv": CURVE_COLUMNS,
    "convergence.csv": CONVERGENCE_COLUMNS,
    "chosen.csv": CHOICE_COLUMNS,
}
PROTOCOL = re.compile(r"([a-z]+)(?::([1-9][0-9]{0,8}))?")


class Trained(NamedTuple):
    """What the training of a fold run gave.

    `scores` float32 are those of its test images (n,), or (n, C) for C classes or labels; `losses` float32 the
    validation loss of each epoch. `convergence` is the training loss after the last epoch, the one before it and the
    lowest possible one. `chosen` is the C or k that the validation fold chose, and its loss there.
    """

    scores: NDArray[np.float32]
    losses: NDArray[np.float32] | Sequence[np.float32] = ()
    convergence: tuple[float, float, float] | None = None
    chosen: tuple[float, float] | None = None


def protocol_of(text: str) -> tuple[Protocol, int | None]:
    """A protocol, and its number of labelled images of each class; None for all. Raises ValueError if it is none."""
    found = PROTOCOL.fullmatch(text)
    if found is None or found[1] not in get_args(Protocol):
        raise ValueError("no protocol")
    return cast(Protocol, found[1]), int(found[2]) if found[2] else None


def key_of(names: Sequence[str], repeat: str, fold: str) -> tuple[Experiment, FoldRun]:
    """The first columns of a line as its experiment and fold run. Raises TypeError or ValueError for other values."""
    experiment, fold_run = Experiment(*names), FoldRun(int(repeat), int(fold))
    protocol_of(experiment.protocol)
    if experiment.recipe not in get_args(Recipe) or fold_run.repeat < 1 or fold_run.fold < 1:
        raise ValueError("no experiment of this program")
    return experiment, fold_run


def own_file(path: Path) -> Path:
    """`path`, a file of an output folder. Raises `InputError` if it is a link, or waits for a writer, as a FIFO does.

    What is appended to a link changes a file elsewhere, which whoever made the folder chose.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{path} is no regular file: replace it by a copy, or choose another folder with `out`")
    return path


def own_folder(path: Path) -> Path:
    """`path`, a folder in an output folder, which may be missing. Raises `InputError` if it is a link or a file."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path} is a link, or no folder: remove it, or choose another folder with `out`")
    return path


def recorded_settings(runs: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """The settings that runs.json records for a recipe.

    Settings that are not recorded, because an earlier version wrote the file, have the recipe's values. Raises
    `InputError` for an unknown recipe, and for settings that are none.
    """
    defaults = evaluate_config({"recipe": recipe, "init": ["scratch"]}).resolved()
    return to_json(changed(defaults, runs["settings"].get(recipe, {})))


# What the fields of runs.json may be: a type, some words, or what a function takes. Those with a ? may be missing.
Kinds = Mapping[str, Any]
RUNS: Kinds = {"settings": dict, "tasks": dict, "inits": dict, "times": list, "versions?": dict}
TASK: dict[str, Any] = {"path?": str, "sha256?": str, "images?": int, "positive?": str, "test_images?": list}
TASK |= {"kind?": get_args(Kind), "classes?": list, "subgroups?": list}
INIT: Kinds = {
    **{"kind": str, "method?": str, "path?": str, "stem?": get_args(Stem), "sha256?": str},
    **{"shards?": dict, "architecture?": str, "encoder?": str, "normalized?": dict},
}
TIME: Kinds = {
    **{"task": str, "init": str, "recipe": str, "protocol": protocol_of, "device?": str},
    **{"cells": int, "images?": int, "seconds": float, "seconds_per_epoch": float},
}


def _is_protocol(text: str) -> bool:
    try:
        return bool(protocol_of(text))
    except ValueError:
        return False


def _check_runs(runs: dict[str, Any], path: Path) -> None:
    """Raise `InputError` that names the first part of a runs.json that is of a wrong type."""

    def check(where: str, value: Any, kind: Any) -> None:
        if isinstance(kind, tuple):
            right = value in kind
        elif kind is protocol_of:
            right = isinstance(value, str) and _is_protocol(value)
        elif kind in (int, float):
            # Below 2**63, because a larger integer may be no float.
            right = isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 <= value < 2**63
        else:
            right = isinstance(value, kind)
        if not right:
            raise InputError(f"{path}: {where} cannot be {reprlib.repr(value)}: restore the file")

    def check_fields(where: str, value: Any, kinds: Kinds) -> None:
        check(where, value, dict)
        for field, kind in kinds.items():
            name = field.rstrip("?")
            if value.get(name) is not None or name == field:
                check(f"{where} {name}".strip(), value.get(name), kind)

    check_fields("", runs, RUNS)
    for name, settings in runs["settings"].items():
        check(f"settings {name[:40]}", settings, dict)
    for name, task in runs["tasks"].items():
        check_fields(f"task {name[:40]}", task, TASK)
        for count in task.get("test_images") or ():
            check(f"task {name[:40]} test_images", count, int)
        for field in ("classes", "subgroups"):
            for word in task.get(field) or ():
                check(f"task {name[:40]} {field}", word, str)
    for name, init in runs["inits"].items():
        check_fields(f"init {name[:40]}", init, INIT)
    for number, line in enumerate(runs["times"]):
        check_fields(f"times {number}", line, TIME)


@dataclass(frozen=True)
class Results:
    """An open results folder; `runs` is the content of its runs.json."""

    folder: Path
    runs: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Results:
        """Open a results folder, or one that does not exist yet; nothing is written.

        Raises `InputError` if the folder holds anything else, and if a part of runs.json is of a wrong type.
        """
        path = folder / "runs.json"
        if os.path.lexists(path) and not os.path.isfile(path):
            raise InputError(f"{path} is no regular file: restore it, or choose another folder with `out`")
        if not path.exists():
            if (folder / "predictions.csv").exists():
                raise InputError(
                    f"{folder} has predictions.csv but no runs.json: choose another folder with `out`"
                )
            if not is_new(folder):
                raise InputError(f"{folder} exists and is no results folder: choose another one with `out`")
            return cls(folder, {"format": FORMAT, "settings": {}, "tasks": {}, "inits": {}, "times": []})
        runs = read_json(path)
        if runs.get("format") != FORMAT:
            raise InputError(
                f"{path} has format {reprlib.repr(runs.get('format'))}, this version reads {FORMAT}: use the version "
                "that wrote it"
            )
        _check_runs(runs, path)
        return cls(folder, runs)

    @property
    def predictions(self) -> Path:
        """Its predictions.csv."""
        return self.folder / "predictions.csv"

    def admit(
        self, recipe: str, settings: Mapping[str, Any], task: Task, inits: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Add settings, task and inits to `runs`. Raises `InputError` if they contradict what is recorded there."""
        earlier = set(self.runs["settings"])
        if recipe in earlier:
            self._compare(recorded_settings(self.runs, recipe), settings)
        self.runs["settings"][recipe] = dict(settings)
        record = {
            "path": str(task.folder.resolve()),
            "sha256": task.sha256,
            "images": len(task.images),
            "positive": task.positive,
            "test_images": [len(fold.test) for fold in task.folds],
            "kind": task.kind,
            "classes": list(task.classes),
        }
        known = self.runs["tasks"].setdefault(task.name, record)
        if known.get("sha256") != task.sha256:
            raise InputError(
                f"{self.folder} was made with other images or folds of task {task.name}: "
                "choose another folder with `out`"
            )
        if task.subgroups:
            known["subgroups"] = sorted({*(known.get("subgroups") or ()), *task.subgroups})
        for name, init in inits.items():
            self._compare_input(name, init, recipe, earlier)
            if self.runs["inits"].setdefault(name, dict(init)).get("sha256") != init.get("sha256"):
                raise InputError(
                    f"the weights of {name} ({init.get('path')}) have changed since {self.folder} was made: "
                    "choose another folder with `out`"
                )

    def _compare_input(self, name: str, init: Mapping[str, Any], recipe: str, earlier: set[str]) -> None:
        """Record whether the input of another program's weights is normalised in a recipe; refuse another choice."""
        if "normalized" not in init:
            return
        known = self.runs["inits"].get(name)
        # Earlier versions normalised nothing, and did not say so.
        by_recipe = known.get("normalized", dict.fromkeys(earlier, False)) if known else {}
        recorded = by_recipe.get(recipe, init["normalized"])
        if recorded != init["normalized"]:
            raise InputError(
                f"{self.folder} has {name} with `normalize={recorded}`: pass that, or choose another folder with `out`"
            )
        self.runs["inits"][name] = {**(known or init), "normalized": {**by_recipe, recipe: recorded}}

    def _compare(self, recorded: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            if recorded.get(name) != value:
                setting = f"`{name}={recorded.get(name)}`"
                raise InputError(
                    f"{self.folder} was made with {setting}, not {value}: "
                    f"pass {setting}, or choose another folder with `out`"
                )

    def save(self) -> None:
        """Write runs.json. Raises `InputError` if the results folder is gone: half of one would be of no use."""
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} is gone: start the evaluation anew")
        write_json(self.folder / "runs.json", self.runs)

    def finished(self) -> set[tuple[Experiment, FoldRun]]:
        """The fold runs whose test images are all in predictions.csv. Unfinished ones are removed from all files."""
        keys, lines = _lines(self.predictions, COLUMNS)
        wanted = {}
        for number, key in enumerate(keys, start=2):
            experiment, fold_run = key
            try:
                wanted[key] = self.runs["tasks"][experiment.task]["test_images"][fold_run.fold - 1]
            except (IndexError, KeyError, TypeError) as error:
                raise _damaged(self.predictions, number) from error
        finished = {key for key, count in Counter(keys).items() if count == wanted[key]}
        _keep(self.predictions, keys, lines, finished)
        for name, columns in SIDE_FILES.items():
            _keep(self.folder / name, *_lines(self.folder / name, columns), finished)
        return finished

    def append(
        self, experiment: Experiment, task: Task, fold_runs: Sequence[FoldRun], trained: Sequence[Trained]
    ) -> None:
        """Append the test images of the fold runs to predictions.csv, and their losses to the files beside it.

        Numbers are written as the shortest decimal that gives the same float32. Several labels, or scores, of an image
        are separated by spaces.
        """
        sides: dict[str, list[Sequence[Any]]] = {name: [] for name in SIDE_FILES}
        predictions = []
        for fold_run, each in zip(fold_runs, trained, strict=True):
            key = (*experiment, fold_run.repeat, fold_run.fold)
            sides["curves.csv"] += [(*key, epoch, str(loss)) for epoch, loss in enumerate(each.losses, start=1)]
            for name, values in (("convergence.csv", each.convergence), ("chosen.csv", each.chosen)):
                if values is not None:
                    sides[name].append((*key, *(str(np.float32(value)) for value in values)))
            for row, score in zip(task.fold_of(fold_run).test, each.scores, strict=True):
                predictions.append((*key, task.images[row], _joined(task.labels[row]), _joined(score)))
        # The predictions come last, because a fold run that has them counts as finished.
        for name, rows in sides.items():
            if rows:
                _append(self.folder / name, SIDE_FILES[name], rows)
        _append(self.predictions, COLUMNS, predictions)

    def list_images(self, task: Task) -> None:
        """Write the patient and the subgroups of each image of a task to NAME-images.csv.

        What an earlier evaluation knew of the same images is kept.
        """
        path = own_file(self.folder / f"{task.name}{ENDING}")
        columns, known = _images_in(path)
        given = {name: dict(zip(task.images, values, strict=True)) for name, values in task.subgroups.items()}
        if task.patients:
            given["patient"] = dict(zip(task.images, task.patients, strict=True))
        header = dict.fromkeys([*IMAGE_COLUMNS, *columns, *task.subgroups])
        rows = [tuple(header)]
        for image in task.images:
            row = {
                **known.get(image, {}),
                **{name: values[image] for name, values in given.items()},
                "image": image,
            }
            rows.append(tuple(row.get(name) or "" for name in header))
        content = b"".join(map(_line, rows))
        if not path.exists() or path.read_bytes() != content:
            with replacing(path) as file:
                file.write(content)

    def add_time(
        self, experiment: Experiment, cells: int, images: int, epochs: int, seconds: float, device: str
    ) -> None:
        """Add the wall-clock time of fold runs, with everything they needed, to that of their experiment and device.

        `images` are those that they trained on, in all epochs.
        """
        times = self.runs["times"]
        key = {**experiment._asdict(), "device": device}
        line = next((line for line in times if key.items() <= line.items()), None)
        if line is None:
            line = {**key, "cells": 0, "images": 0, "seconds": 0.0}
            times.append(line)
        line["cells"] += cells
        line["images"] = (line.get("images") or 0) + images
        line["seconds"] += seconds
        line["seconds_per_epoch"] = line["seconds"] / (line["cells"] * epochs)
        self.save()


def _images_in(path: Path) -> tuple[Sequence[str], dict[str, dict[str, str]]]:
    """The columns of a NAME-images.csv and the row of each image; nothing of a damaged one, which is written anew."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            return reader.fieldnames or (), {row["image"]: row for row in reader}
    except (OSError, ValueError, KeyError, csv.Error):
        return (), {}


def _joined(values: Any) -> str:
    """A number as text, or several with spaces between them."""
    return str(values) if np.ndim(values) == 0 else " ".join(map(str, values))


def _lines(path: Path, columns: Sequence[str]) -> tuple[list[tuple[Experiment, FoldRun]], list[bytes]]:
    """The experiment and fold run of each line of a CSV file, and the lines with the header before them.

    An unfinished last line is left out. Raises `InputError` for a damaged line and for other columns than `columns`.
    """
    content = path.read_bytes() if os.path.isfile(path) else b""
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
    if lines and lines[0] != _line(columns):
        raise InputError(f"{path} was written by another program: choose another folder with `out`")
    keys = []
    try:
        for row in csv.reader((line.decode() for line in lines[1:]), strict=True):
            if len(row) != len(columns):
                raise ValueError("another number of columns")
            keys.append(key_of(row[:4], row[4], row[5]))
        if len(keys) != len(lines[1:]):
            raise ValueError("a line break within quotation marks")
    except (csv.Error, TypeError, ValueError) as error:
        raise _damaged(path, len(keys) + 2) from error
    return keys, lines


def _damaged(path: Path, line: int) -> InputError:
    return InputError(f"{path}, line {line}: damaged; choose another folder with `out`")


def _keep(
    path: Path,
    keys: Sequence[tuple[Experiment, FoldRun]],
    lines: Sequence[bytes],
    kept: set[tuple[Experiment, FoldRun]],
) -> None:
    """Reduce a CSV file to its header and the lines of the fold runs in `kept`."""
    content = b"".join([*lines[:1], *(line for key, line in zip(keys, lines[1:], strict=True) if key in kept)])
    if path.exists() and content != path.read_bytes():
        with replacing(path) as file:
            file.write(content)


def _append(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Append rows to a CSV file, to a new one after its header, and flush them to the disk."""
    with naming(path), own_file(path).open("ab") as file:
        if not file.tell():
            file.write(_line(columns))
        file.write(b"".join(map(_line, rows)))
        file.flush()
        os.fsync(file.fileno())


def _line(values: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()
