"""A downstream task: images of two classes, in five folds that are published with them or made once.

N images, H x W pixels.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from modan_fast.downstream.folds import FOLDS, SPLITS, class_folders, make_folds, read_folds
from shard_builder.atomic import new_folder
from shard_builder.settings import InputError, Progress, no_progress


@dataclass(frozen=True)
class Fold:
    """One division of a task: rows of its images, each array int64 in the order of its fold file."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """A downstream task, as its fold files or class folders define it.

    `images` are the N paths under `folder`, sorted; `labels` (N,) int64 is 1 for the class `positive` and 0 for
    the other; `sources` names the file and line where each image came up first, `digests` its SHA-256,
    `patients` whom it shows (empty where nothing says so); `sha256` covers names, labels, folds and the bytes of
    all images. `made` is whether the folds are new and in no file yet.
    """

    name: str
    folder: Path
    images: tuple[str, ...]
    labels: NDArray[np.int64]
    folds: tuple[Fold, ...]
    sources: tuple[str, ...]
    digests: tuple[str, ...]
    patients: tuple[str, ...]
    positive: str
    sha256: str
    made: bool = False


@dataclass(frozen=True)
class FoldRun:
    """One training of an evaluation's grid: repeat and fold, both counted from 1.

    Its seeds depend on nothing else, so neither does its result on what was trained before it.
    """

    repeat: int
    fold: int

    def seed(self, seed: int, purpose: str) -> int:
        """The seed, in [0, 2**64), for one `purpose` (`encoder`, `head`, `order`) under the user's `seed`."""
        entropy = (seed, self.repeat, self.fold, int.from_bytes(purpose.encode()))
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def generator(self, seed: int, purpose: str) -> torch.Generator:
        """A CPU generator with that seed."""
        return torch.Generator().manual_seed(self.seed(seed, purpose))


def read_task(
    folder: Path,
    *,
    folds: Path | None = None,
    seed: int = 0,
    group: str | None = None,
    positive: str | None = None,
) -> Task:
    """Read a task with published folds, or one of two class folders.

    Published folds are `{folder}/dataframe/{prefix}{train,val,test}_fold{1..5}.csv`, as RadImageNet has them. The
    prefix may be anything, the image column is `filename` or `img_dir`, the label column `label` or `acl_label`.
    Without them, `folder` has a folder for each of two classes, of which `positive` names the positive one; the
    folds are those in `folds` or, where that does not exist, made from `seed`. `group` is a column of the fold
    files or a regular expression whose first group, or whole match, in an image's path names the patient.
    Raises `InputError`, naming the file and line, for whatever does not fit.
    """
    made = False
    if (folder / "dataframe").is_dir():
        if positive is not None:
            raise InputError(f"`positive` is for class folders: the fold files of {folder} say which is positive")
        listing, named = read_folds(folder, folder / "dataframe", group)
    else:
        listing = class_folders(folder, group, positive)
        if made := folds is None or not folds.is_dir():
            named = make_folds(folder, listing, seed)
        else:
            assert folds is not None
            listed, named = read_folds(folder, folds, None)
            if listed.labels != listing.labels:
                odd = sorted(listed.labels.items() ^ listing.labels.items())[0][0]
                raise InputError(
                    f"{folds} has the folds of other images or classes than {folder} ({odd} is one): "
                    "choose another results folder with `out`"
                )

    images = sorted(listing.labels)
    row = {image: index for index, image in enumerate(images)}
    divided = tuple(
        Fold(*(np.array([row[image] for image in named[split, fold]], np.int64) for split in SPLITS))
        for fold in range(1, FOLDS + 1)
    )
    digest = hashlib.sha256(repr([(image, listing.labels[image]) for image in images]).encode())
    for fold in divided:
        digest.update(repr([getattr(fold, split).tolist() for split in SPLITS]).encode())
    digests = [hashlib.sha256((folder / image).read_bytes()) for image in images]
    for each in digests:
        digest.update(each.digest())
    return Task(
        name=folder.resolve().name,
        folder=folder,
        images=tuple(images),
        labels=np.array([listing.labels[image] for image in images], np.int64),
        folds=divided,
        sources=tuple(listing.sources[image] for image in images),
        digests=tuple(each.hexdigest() for each in digests),
        patients=tuple(listing.patients[image] for image in images) if listing.patients else (),
        positive=" or ".join(sorted(listing.words[1])),
        sha256=digest.hexdigest(),
        made=made,
    )


def write_folds(task: Task, folder: Path) -> None:
    """Write the folds of a task as fold files into the new folder `folder`."""
    with new_folder(folder) as beside:
        for number, fold in enumerate(task.folds, start=1):
            for split in SPLITS:
                with (beside / f"{split}_fold{number}.csv").open("w", encoding="utf-8", newline="") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(["filename", "label"])
                    writer.writerows((task.images[row], task.labels[row]) for row in getattr(fold, split))


class Leak(NamedTuple):
    """A test image that shares identical `bytes` or a `patient` with an image that its fold trains on."""

    fold: int
    shared: str
    test_image: str
    train_image: str


def leaks(task: Task) -> list[Leak]:
    """The leaks of a task's folds; where several train images share with a test image, the first of them."""
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


def read_leaks(path: Path) -> list[Leak]:
    """The leaks in a file that an evaluation has listed them in."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Leak(int(fold), *rest) for fold, *rest in islice(csv.reader(file), 1, None)]


def leak_counts(found: Iterable[Leak]) -> str:
    """How many images have leaks, by what is shared; kinds without leaks are left out."""
    images: dict[str, set[str]] = {}
    for leak in found:
        images.setdefault(leak.shared, set()).add(leak.test_image)
    return ", ".join(f"{len(tested)} by the same {shared}" for shared, tested in images.items())


def decode(task: Task, image_size: int, progress: Progress = no_progress) -> NDArray[np.uint8]:
    """The task's images as grey pixels (N, 1, image_size, image_size), stretched as shards are.

    The resampling is bilinear and antialiased. Raises `InputError` for an image that does not decode.
    """
    pixels = np.empty((len(task.images), 1, image_size, image_size), np.uint8)

    def read(row: int) -> None:
        try:
            with Image.open(task.folder / task.images[row]) as image:
                if image.mode[0] in "IF":
                    raise ValueError("more than 8 bits a pixel")
                grey = image.convert("L").resize((image_size, image_size), Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(
                f"{task.sources[row]}: {task.images[row]} does not decode ({error}): replace it"
            ) from error
        pixels[row, 0] = np.asarray(grey)

    with ThreadPoolExecutor() as pool:
        for done, _ in enumerate(pool.map(read, range(len(pixels))), start=1):
            progress("decode", done, len(pixels), task.name)
    return pixels
