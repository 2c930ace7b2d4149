"""Whose the images of a task are: NAME-images.csv in a results folder, with the patient and the subgroups of each."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shard_builder.settings import InputError

ENDING = "-images.csv"  # after the task's name, in the results folder
COLUMNS = ["image", "patient"]  # then one for each subgroup
MOST_VALUES = 50  # of a subgroup column: more are no groups


@dataclass(frozen=True)
class Images:
    """The `patients` of images, without those that are unknown; and by column, the images' `subgroups`."""

    patients: Mapping[str, str] = field(default_factory=dict)
    subgroups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read_images(folder: Path) -> dict[str, Images]:
    """What the files `NAME-images.csv` of a results folder say, by task; of older folders nothing.

    Raises `InputError` for a damaged file, and for a column with over `MOST_VALUES` values.
    """
    # Found by looking, because a task's name in somebody's predictions may lead out of the folder.
    paths = sorted(folder.glob(f"*{ENDING}"))
    return {path.name.removesuffix(ENDING): _read(path) for path in paths}


def _read(path: Path) -> Images:
    patients: dict[str, str] = {}
    try:
        if not os.path.isfile(path):
            raise ValueError("no file")
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            head = next(reader, [])
            names = head[len(COLUMNS) :]
            if head[: len(COLUMNS)] != COLUMNS or len(set(names)) < len(names):
                raise ValueError(f"its columns must be {','.join(COLUMNS)}, then others, each once")
            subgroups: dict[str, dict[str, str]] = {name: {} for name in names}
            for image, patient, *values in reader:
                if patient:
                    patients[image] = patient
                for name, value in zip(names, values, strict=True):
                    if value:
                        subgroups[name][image] = value
    except (ValueError, csv.Error, OSError) as error:
        raise InputError(f"{path} is no list of images ({error}): the same evaluation again writes it") from error
    for name, value_of in subgroups.items():
        if (found := len(set(value_of.values()))) > MOST_VALUES:
            raise InputError(
                f"{path}: column {name[:40]} has {found:,} values, over {MOST_VALUES}: it names no subgroups"
            )
    return Images(patients, subgroups)
