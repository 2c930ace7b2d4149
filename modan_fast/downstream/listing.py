"""What a task's files or folders say of its images: labels, sources, patients, subgroups; whatever their layout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from modan_fast.downstream.classes import Kind
from shard_builder.settings import InputError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LONGEST_PATH = 4096  # characters; no system has longer ones
SEARCH_SECONDS = 20

ImagesBySplit = dict[tuple[str, int], list[str]]
"""The paths of the images of each (split, fold); folds are counted from 1."""

Label = int | tuple[int, ...]
"""The label of an image: an index of its class, or 0 or 1 for each label of a multi-label task."""


class Choices(NamedTuple):
    """What the user says of a task: see `read_task`. `subgroups` are columns."""

    group: str | None = None
    positive: str | None = None
    words: str | None = None
    columns: tuple[str, ...] = ()
    subgroups: tuple[str, ...] = ()


@dataclass
class Listing:
    """The images of a task as its files or folders list them, by path relative to `folder`.

    `sources` are the file and line that list an image first, `patients` are empty if unknown, `subgroups` the value of
    each column that divides the images. `places` say where each (split, fold) was read, `class_places` where the images
    of a class are, and `task` the file or folder that lists them; these are for messages.
    """

    folder: Path
    kind: Kind = "binary"
    classes: tuple[str, ...] = ("negative", "positive")
    labels: dict[str, Label] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    subgroups: dict[str, dict[str, str]] = field(default_factory=dict)
    places: dict[tuple[str, int], str] = field(default_factory=dict)
    class_places: dict[int, str] = field(default_factory=dict)
    task: str = ""

    def __post_init__(self) -> None:
        self.task = self.task or str(self.folder)

    def place(self, split: str, fold: int) -> str:
        """Where a split of a fold was read, or which it is."""
        return self.places.get((split, fold), f"{self.task}: {split} of fold {fold}")


def checked_path(folder: Path, image: str, where: str) -> str:
    """An image's path as a table gives it, without `./`. Raises `InputError` if it is none, or leads outside."""
    if not image or not image.isprintable() or len(image) > LONGEST_PATH:
        raise InputError(f"{where}: names no image")
    image = re.sub(r"^(\./)+", "", image)
    if Path(image).anchor or ".." in Path(image).parts:
        raise InputError(f"{where}: {image} lies outside the task folder: paths are relative to it")
    return image


def check_image(folder: Path, image: str, where: str) -> None:
    """Raise `InputError` if a task's folder has no such image."""
    # A link may lead anywhere, as in data sets that are trees of links; but what has no end, or waits for a writer, is
    # no regular file.
    if not os.path.isfile(folder / image):
        raise InputError(f"{where}: there is no image {image} in {folder}")


def find_patients(listing: Listing, group: str | None) -> None:
    """Add the patients that the regular expression `group` finds in the paths of images that have none.

    Raises `InputError` where it finds nothing, and if it takes longer than `SEARCH_SECONDS`.
    """
    images = [image for image in listing.labels if image not in listing.patients]
    if group is None or not images:
        return
    # In a process of its own: a search such as that of (a+)+$ may take longer than anybody lives.
    command, question = [sys.executable, "-I", "-c", SEARCH], json.dumps([group, images])
    try:
        done = subprocess.run(  # noqa: S603
            command, input=question, capture_output=True, text=True, timeout=SEARCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"`group={group}` takes over {SEARCH_SECONDS} seconds to search {len(images):,} paths: name a simpler one"
        ) from None
    if done.returncode:
        raise InputError(
            f"`group={group}` cannot be searched for ({done.stderr.strip()[-200:]}): name a simpler one"
        )
    for image, patient in zip(images, json.loads(done.stdout), strict=True):
        if not patient:
            raise InputError(
                f"{listing.sources[image]}: `group={group}` is no column, and finds nothing in {image}"
            )
        listing.patients[image] = patient


SEARCH = """
import json, re, sys
group, images = json.load(sys.stdin)
found = map(re.compile(group).search, images)
json.dump([match and match[1 if match.re.groups else 0] for match in found], sys.stdout)
"""


def refuse_columns(choices: Choices, what: str) -> None:
    """Raise `InputError` if the user named columns, and the task has none."""
    for name in (*choices.columns, *choices.subgroups):
        raise InputError(f"{what} has no columns, such as {name}: write the task as a CSV file with this column")


def shared_value(known: dict[str, str], image: str, value: str, column: str, where: str) -> None:
    """Add an image's value in a column. Raises `InputError` if an earlier row has another one."""
    if known.setdefault(image, value) != value:
        raise InputError(f"{where}: {image} has another {column} than in a row before: correct one")


def numbered(values: Iterable[str]) -> list[str]:
    """Words in order; numbers by their values."""
    values = list(values)
    numbers = all(re.fullmatch(r"\d{1,18}", value) for value in values)
    return sorted(values, key=lambda value: (int(value) if numbers else 0, value))
