"""Where folds come from: published fold files are read; class folders are divided into five stratified folds."""

from __future__ import annotations

import csv
import json
import os
import re
import reprlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from shard_builder.settings import InputError

FOLDS = 5
SPLITS = ("train", "val", "test")
IMAGE_COLUMNS = ("filename", "img_dir")
LABEL_COLUMNS = ("label", "acl_label")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
MASK = re.compile(r"_mask(_\d+)?$")  # BUSI has the outline of a lesion beside its image
LONGEST_PATH = 4096  # characters; no system has longer ones
SEARCH_SECONDS = 20
LABELS = {"benign": 0, "normal": 0, "no": 0, "0": 0, "malignant": 1, "yes": 1, "1": 1}  # by class name

ImagesBySplit = dict[tuple[str, int], list[str]]
"""The paths of the images of each (split, fold)."""


@dataclass
class Listing:
    """The images of a task as its files or folders list them, by path relative to the task.

    `labels` are 0 or 1, `sources` the file and line that list an image first, `patients` are empty if unknown, and
    `words` are the class names of each label.
    """

    labels: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    words: dict[int, set[str]] = field(default_factory=lambda: {0: set(), 1: set()})


def read_folds(folder: Path, frames: Path, group: str | None) -> tuple[Listing, ImagesBySplit]:
    """Read the fold files in `frames`, which name images under `folder`.

    `group` is a column of patients, or a regular expression that finds them in the paths. Raises `InputError` that
    names the file and line.
    """
    listing = Listing()
    images_by_split: ImagesBySplit = {}
    for key, path in _fold_files(frames).items():
        images_by_split[key] = []
        for row in _rows(path, group):
            _add(listing, folder, row, group)
            images_by_split[key].append(row.image)
        classes = {listing.labels[image] for image in images_by_split[key]}
        if not classes or (key[0] != "val" and len(classes) < 2):
            found = "no image" if not classes else "one class only"
            raise InputError(f"{path} has {found}: both classes are needed to train and to test")
    _find_patients(listing, group)
    return listing, images_by_split


class _Row(NamedTuple):
    """A row of a fold file; `where` is its file and line, `patient` the value of the column `group`, if it exists."""

    where: str
    image: str
    word: str
    patient: str | None


def _add(listing: Listing, folder: Path, row: _Row, group: str | None) -> None:
    """Add a row to the listing; raise `InputError` if it contradicts an earlier one or names no image."""
    where, image, word, patient = row
    label = LABELS[word]
    if Path(image).anchor or ".." in Path(image).parts:
        raise InputError(f"{where}: {image} lies outside the task folder: paths are relative to it")
    # A link may lead anywhere, as in data sets that are trees of links; but what has no end, or waits for a writer, is
    # no regular file.
    if image not in listing.labels and not os.path.isfile(folder / image):
        raise InputError(f"{where}: there is no image {image} in {folder}")
    if listing.labels.setdefault(image, label) != label:
        raise InputError(f"{where}: {image} has another label than at {listing.sources[image]}")
    listing.sources.setdefault(image, where)
    listing.words[label].add(word)
    if group is not None:
        if patient is not None and not patient.strip():
            raise InputError(f"{where}: the column {group} is empty: name the patient of each image")
        if patient is not None:
            listing.patients[image] = patient


def class_folders(folder: Path, group: str | None, positive: str | None) -> Listing:
    """List the images in class folders: two of any names, or more whose names are all in `LABELS`, such as BUSI's.

    The positive class is `positive`, else the one known by its name, else the second of two. Masks are left out.
    """
    if not folder.is_dir():
        raise InputError(f"no task at {folder}: name a folder with `task`")
    classes = [path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith(".")]
    for path in classes:
        if path.resolve() in (whole := folder.resolve(), *whole.parents):
            raise InputError(f"{path} is a link to a folder around it: replace it by a folder of images")
    names = sorted(path.name for path in classes)
    positives = _positives(folder, names, positive)
    listing = Listing(words={0: set(names) - positives, 1: positives})
    for path in sorted(folder.glob("*/**/*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(path) and not MASK.search(path.stem):
            image = path.relative_to(folder).as_posix()
            if not image.isprintable() or image != image.encode(errors="replace").decode():
                raise InputError(f"{folder}: {image!a} is no name that a fold file can hold: rename it")
            name = image.split("/")[0]
            if name in names:
                listing.labels[image] = int(name in positives)
                listing.sources[image] = str(folder)
    _find_patients(listing, group)
    return listing


def _positives(folder: Path, names: list[str], positive: str | None) -> set[str]:
    """Which of the class folders `names` are positive. Raises `InputError` if their names do not decide it."""
    labels = [LABELS.get(name.lower()) for name in names]
    decided = positive is not None or (None not in labels and len(set(labels)) == 2)
    if len(names) < 2 or (len(names) > 2 and not decided):
        shown = f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
        raise InputError(
            f"{folder} is no task: it needs a folder dataframe with fold files, or two class folders, and has "
            f"{f'{len(names)} folders ({shown})' if names else 'none'}"
        )
    if positive is not None:
        if positive not in names:
            raise InputError(f"`positive={positive}` is no class folder of {folder}: name {' or '.join(names)}")
        return {positive}
    if len(names) == 2:
        # The first class is positive if its name says so, or if the second one's says that it is negative.
        return {names[0 if labels in ([1, None], [1, 0], [None, 0]) else 1]}
    return {name for name, label in zip(names, labels, strict=True) if label == 1}


def make_folds(folder: Path, listing: Listing, seed: int) -> ImagesBySplit:
    """Divide the images into stratified folds; each fold is validated on the test images of the next.

    The images of a patient are all in one fold's test images. Raises `InputError` for too few images or patients.
    """
    images = np.array(sorted(listing.labels))
    labels = np.array([listing.labels[image] for image in images])
    patients = [listing.patients.get(image, image) for image in images]
    for label, words in listing.words.items():
        found = len({patient for patient, each in zip(patients, labels, strict=True) if each == label})
        if found < FOLDS:
            what = "patients" if listing.patients else "images"
            raise InputError(f"{folder}/{min(words)} has {found} {what}: each of the {FOLDS} folds needs one")
    grouped = bool(listing.patients)
    splitter = (StratifiedGroupKFold if grouped else StratifiedKFold)(FOLDS, shuffle=True, random_state=seed)
    tests = [rows for _, rows in splitter.split(images, labels, patients if grouped else None)]
    images_by_split: ImagesBySplit = {}
    for fold in range(FOLDS):
        following = (fold + 1) % FOLDS
        rest = np.concatenate([rows for index, rows in enumerate(tests) if index not in (fold, following)])
        for split, rows in (("train", np.sort(rest)), ("val", tests[following]), ("test", tests[fold])):
            if len(set(labels[rows])) < 2:
                raise InputError(
                    f"{folder}: {split} of fold {fold + 1} would have one class only: too few patients"
                )
            images_by_split[split, fold + 1] = images[rows].tolist()
    return images_by_split


def _find_patients(listing: Listing, group: str | None) -> None:
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


def _fold_files(frames: Path) -> dict[tuple[str, int], Path]:
    """The 15 fold files by (split, fold)."""
    files = {}
    for split in SPLITS:
        for fold in range(1, FOLDS + 1):
            wanted = f"{split}_fold{fold}.csv"
            found = sorted(
                path for path in frames.iterdir() if path.name.endswith(wanted) and os.path.isfile(path)
            )
            if len(found) != 1:
                names = " and ".join(path.name for path in found) or "none"
                raise InputError(f"{frames} must have one file *{wanted}, found {names}")
            files[split, fold] = found[0]
    return files


def _rows(path: Path, group: str | None) -> Iterator[_Row]:
    """The rows of a fold file. Raises `InputError` for missing columns, unknown labels and broken files."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            image_column = next((name for name in IMAGE_COLUMNS if name in columns), None)
            label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
            if image_column is None or label_column is None:
                raise InputError(
                    f"{path}, line 1: needs a column {' or '.join(IMAGE_COLUMNS)} and a column "
                    f"{' or '.join(LABEL_COLUMNS)}, has {_listed(columns)}"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                image, label = (row[image_column] or "").strip(), (row[label_column] or "").strip()
                if not image or not image.isprintable() or len(image) > LONGEST_PATH:
                    raise InputError(f"{where}: names no image")
                if label.lower() not in LABELS:
                    raise InputError(f"{where}: label {reprlib.repr(label)} is none of {', '.join(LABELS)}")
                patient = row.get(group) if group else None
                yield _Row(where, re.sub(r"^(\./)+", "", image), label.lower(), patient)
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} is no CSV file in UTF-8 ({error})") from error


def _listed(names: Sequence[str]) -> str:
    """Some of the names of columns."""
    shown = ", ".join(name[:40] for name in names[:10])
    return f"{shown}{', …' if len(names) > 10 else ''}" if names else "none"
