"""Folds: made for tasks that have none, with patients together and classes alike; read back; and checked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from modan_fast.downstream.classes import listed
from modan_fast.downstream.csv_files import fold_files, read_table
from modan_fast.downstream.listing import ImagesBySplit, Label, Listing, numbered
from shard_builder.settings import InputError

log = logging.getLogger(__name__)

FOLDS = 5  # that are made; a part that is taken for validation is a fifth, too


def label_text(label: Label) -> str:
    """A label in a fold file: its number, or 0 or 1 for each of several."""
    return " ".join(map(str, label)) if isinstance(label, tuple) else str(label)


def completed(
    listing: Listing, given: ImagesBySplit, recorded: Path | None, seed: int, leave_out: str | None
) -> tuple[ImagesBySplit, bool]:
    """The folds of a task, and whether some were made now.

    `given` are those of its files, perhaps without validation images; if there are none, five are made. What an earlier
    evaluation made is in the folder `recorded`. With `leave_out`, a fold tests the images of each value of that column.
    Raises `InputError` where images or patients do not suffice, and where the recorded folds are others.
    """
    if leave_out is not None:
        given = _by_value(listing, leave_out)
    if given and all(("val", fold) in given for _, fold in given):
        return given, False
    if recorded is not None and recorded.is_dir():
        return _recorded(listing, given, recorded), False
    return (_carved(listing, given, seed) if given else _made(listing, seed)), True


def _recorded(listing: Listing, given: ImagesBySplit, recorded: Path) -> ImagesBySplit:
    """The folds that an earlier evaluation made. Raises `InputError` if they are not of this task."""
    images: ImagesBySplit = {}
    labels: dict[str, str] = {}
    for key, path in fold_files(recorded).items():
        table = read_table(path)
        image_column, label_column = table.needed("filename"), table.needed("label")
        images[key] = [cells[image_column] for _, cells in table.rows]
        labels |= {cells[image_column]: cells[label_column] for _, cells in table.rows}
    wanted = {image: label_text(label) for image, label in listing.labels.items()}
    another = "choose another results folder with `out`"
    if labels != wanted:
        odd = sorted(labels.items() ^ wanted.items())[0][0]
        raise InputError(
            f"{recorded} has the folds of other images or classes than {listing.task} ({odd} is one): {another}"
        )
    folds = {fold for _, fold in given} or set(range(1, FOLDS + 1))
    same = {fold for _, fold in images} == folds
    if given and same:
        tests = all(set(images["test", fold]) == set(given["test", fold]) for fold in folds)
        same = tests and all(
            {*images["train", fold], *images["val", fold]} == set(given["train", fold]) for fold in folds
        )
    elif same:
        same = all(set(images["val", fold]) == set(images["test", fold % FOLDS + 1]) for fold in folds)
    if not same:
        raise InputError(f"{recorded} has other folds than those of {listing.task}: {another}")
    return images


def _made(listing: Listing, seed: int) -> ImagesBySplit:
    """Five stratified folds; each is validated on the test images of the next.

    The images of a patient are all in one fold's test images.
    """
    images, labels, groups = _arrays(listing, sorted(listing.labels))
    if len(set(groups)) < FOLDS:
        raise InputError(
            f"{listing.task} has {len(set(groups))} images or patients: each of the {FOLDS} folds needs one"
        )
    if labels.ndim == 1:
        _check_counts(listing, labels, groups)
    tests = _parts(labels, groups, seed, bool(listing.patients))
    images_by_split: ImagesBySplit = {}
    for fold in range(FOLDS):
        following = (fold + 1) % FOLDS
        rest = np.concatenate([rows for index, rows in enumerate(tests) if index not in (fold, following)])
        for split, rows in (("train", np.sort(rest)), ("val", tests[following]), ("test", tests[fold])):
            if listing.kind == "binary" and len(set(labels[rows])) < 2:
                raise InputError(
                    f"{listing.task}: {split} of fold {fold + 1} would have one class only: too few patients"
                )
            images_by_split[split, fold + 1] = images[rows].tolist()
    return images_by_split


def _check_counts(listing: Listing, labels: NDArray[np.int64], groups: Sequence[str]) -> None:
    """Raise `InputError` if a class has fewer images, or patients, than there are folds to make."""
    for label in range(len(listing.classes)):
        found = len({group for group, each in zip(groups, labels, strict=True) if each == label})
        if found < FOLDS:
            what = "patients" if listing.patients else "images"
            place = listing.class_places[label]
            raise InputError(f"{place} has {found} {what}: each of the {FOLDS} folds needs one")


def _carved(listing: Listing, given: ImagesBySplit, seed: int) -> ImagesBySplit:
    """The folds, with a stratified fifth of the training images for validation."""
    folds = dict(given)
    for fold in sorted({fold for _, fold in given}):
        images, labels, groups = _arrays(listing, given["train", fold])
        if len(set(groups)) < FOLDS or (labels.ndim == 1 and max(np.bincount(labels)) < FOLDS):
            raise InputError(
                f"{listing.place('train', fold)} has too few images to take a fifth of them for validation: name "
                "validation images, too"
            )
        held = _parts(labels, groups, seed, bool(listing.patients))[0]
        folds["train", fold] = np.delete(images, held).tolist()
        folds["val", fold] = images[held].tolist()
    return folds


def _by_value(listing: Listing, column: str) -> ImagesBySplit:
    """For each value of a column a fold that tests its images, and trains on the others."""
    values = listing.subgroups[column]
    if empty := [image for image in listing.labels if not values[image]]:
        raise InputError(
            f"{listing.sources[empty[0]]}: the column {column} is empty: `leave_out` needs a value of each image"
        )
    found = numbered(set(values.values()))
    if len(found) < 2:
        raise InputError(
            f"{listing.task}: the column {column} has one value only ({''.join(found)}): `leave_out` needs two"
        )
    folds: ImagesBySplit = {}
    for fold, value in enumerate(found, start=1):
        for split in ("train", "test"):
            folds[split, fold] = [
                image for image in sorted(listing.labels) if (values[image] == value) == (split == "test")
            ]
            listing.places[split, fold] = f"{listing.task}: {split} of fold {fold}, which leaves out {value},"
    return folds


def _arrays(listing: Listing, images: Sequence[str]) -> tuple[NDArray[np.str_], NDArray[np.int64], list[str]]:
    """Images, their labels, and what must stay together: a patient's images, else each image alone."""
    labels = np.array([listing.labels[image] for image in images], np.int64)
    return np.array(images), labels, [listing.patients.get(image, image) for image in images]


def _parts(labels: NDArray[np.int64], groups: Sequence[str], seed: int, grouped: bool) -> list[NDArray[np.int64]]:
    """Rows divided into five stratified parts, with each group in one."""
    if labels.ndim == 2:
        return _multilabel_parts(labels, groups, seed)
    splitter = (StratifiedGroupKFold if grouped else StratifiedKFold)(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer images than parts: what matters is checked later
        return [rows for _, rows in splitter.split(labels, labels, groups if grouped else None)]


def _multilabel_parts(labels_NL: NDArray[np.int64], groups: Sequence[str], seed: int) -> list[NDArray[np.int64]]:
    """The same for several labels: the rarest label first, its groups go where it is wanted most.

    That is the iterative stratification of Sechidis, Tsoumakas and Vlahavas (2011), with groups in place of images.
    """
    _, group_N = np.unique(np.array(groups), return_inverse=True)
    count = int(group_N.max()) + 1
    # Of each group: the images with each label, and at the end all its images.
    held_G = np.zeros((count, labels_NL.shape[1] + 1), np.int64)
    np.add.at(held_G, group_N, np.column_stack([labels_NL, np.ones(len(labels_NL), np.int64)]))
    wanted = np.tile(held_G.sum(0) / FOLDS, (FOLDS, 1))
    part_G = np.full(count, -1)
    order = np.random.default_rng(seed).permutation(count)
    for label in [*np.argsort(labels_NL.sum(0), kind="stable"), -1]:
        waiting = [group for group in order if part_G[group] < 0 and held_G[group, label]]
        for group in sorted(waiting, key=lambda group: -held_G[group, label]):
            part = max(range(FOLDS), key=lambda part: (wanted[part, label], wanted[part, -1]))
            part_G[group] = part
            wanted[part] -= held_G[group]
    return [np.flatnonzero(part_G[group_N] == part) for part in range(FOLDS)]


def check_folds(listing: Listing, folds: ImagesBySplit) -> None:
    """Raise `InputError` if a fold cannot train or test its classes; warn of classes that a test lacks."""
    for (split, fold), images in folds.items():
        place = listing.place(split, fold)
        if not images:
            raise InputError(f"{place} has no image: both classes are needed to train and to test")
        if split == "val":
            continue
        labels = np.array([listing.labels[image] for image in images], np.int64)
        if listing.kind == "binary":
            if len(set(labels)) < 2:
                raise InputError(f"{place} has one class only: both classes are needed to train and to test")
            continue
        if listing.kind == "multiclass":
            present = np.bincount(labels, minlength=len(listing.classes)) > 0
            enough, what = present.sum() > 1, "image of class"
        else:
            present = (labels.min(0) == 0) & (labels.max(0) == 1)
            enough, what = bool(present.any()), "image with, or none without, label"
        lacking = listed([name for name, each in zip(listing.classes, present, strict=True) if not each], " and ")
        if split == "train" and not present.all():
            raise InputError(f"{place} has no {what} {lacking}: each is needed to train")
        if not enough:
            raise InputError(f"{place} has one class only: two are needed to test")
        if not present.all():
            log.warning("%s has no %s %s: its metrics leave it out", place, what, lacking)
