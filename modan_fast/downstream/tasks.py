"""A downstream task: images, labels, folds and pixels, read from disk; and `FoldRun`, one training with its seeds.

N images, H x W pixels.
"""

from __future__ import annotations

import csv
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from modan_fast.downstream.folds import (
    FOLDS,
    SPLITS,
    ImagesBySplit,
    Listing,
    class_folders,
    make_folds,
    read_folds,
)
from shard_builder.atomic import new_folder
from shard_builder.settings import InputError, Progress, no_progress

# Of an image, as in shard_builder: what is larger would fill the memory.
MOST_PIXELS, MOST_BYTES = 2**26, 2**28
LARGE = 2**23  # pixels
# Not all that Pillow knows: it hands PostScript to a program.
FORMATS = ("PNG", "JPEG", "JPEG2000", "BMP", "DIB", "TIFF", "GIF", "WEBP", "PPM", "PCX", "TGA", "SGI")


@dataclass(frozen=True)
class Fold:
    """One division of a task: rows of its images, each array int64 in the order of its fold file."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True, order=True)
class FoldRun:
    """One training of an experiment: its repeat and its fold, both counted from 1.

    All randomness of the training is seeded by these two numbers, so it does not depend on what was trained before.
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


@dataclass(frozen=True)
class Task:
    """The content of a task's fold files or class folders.

    `images` are the N paths under `folder`, sorted. `labels` (N,) int64 is 1 for the class `positive` and 0 for the
    other. For each image, `sources` has the file and line that list it first, `digests` its SHA-256, `patients` its
    patient; `patients` is empty if they are unknown. `sha256` covers names, labels, folds and the bytes of all images.
    `new_folds` is true if the folds were made just now and are in no file yet.
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
    new_folds: bool = False

    def fold_of(self, fold_run: FoldRun) -> Fold:
        """The fold that a fold run trains and is tested on."""
        return self.folds[fold_run.fold - 1]


def read_task(
    folder: Path,
    *,
    folds: Path | None = None,
    seed: int = 0,
    group: str | None = None,
    positive: str | None = None,
) -> Task:
    """Read a task with published folds, or one of class folders.

    Published folds are `{folder}/dataframe/{prefix}{train,val,test}_fold{1..5}.csv`, as RadImageNet has them. The
    prefix may be anything, the image column is `filename` or `img_dir`, the label column `label` or `acl_label`.
    Without them, `folder` has a folder for each class; `positive` names the positive one. Its folds are those in
    `folds` or, if that does not exist, made from `seed`. `group` is a column of the fold files, or a regular
    expression whose first group, or whole match, in an image's path names the patient. Raises `InputError` that names
    the file and line.
    """
    if not (name := folder.resolve().name).isprintable():
        raise InputError(f"{name} is no name that the tables can hold: rename the task's folder")
    if os.path.isdir(folder / "dataframe"):
        if positive is not None:
            raise InputError(f"`positive` is for class folders: the fold files of {folder} say which is positive")
        listing, images_by_split = read_folds(folder, folder / "dataframe", group)
        return _task(folder, listing, images_by_split)
    listing = class_folders(folder, group, positive)
    if folds is not None and os.path.isdir(folds):
        return _task(folder, listing, _kept_folds(folder, folds, listing))
    return _task(folder, listing, make_folds(folder, listing, seed), new_folds=True)


def _kept_folds(folder: Path, folds: Path, listing: Listing) -> ImagesBySplit:
    """The folds that an earlier evaluation made for class folders. Raises `InputError` if the images have changed."""
    listed, images_by_split = read_folds(folder, folds, None)
    if listed.labels != listing.labels:
        odd = sorted(listed.labels.items() ^ listing.labels.items())[0][0]
        raise InputError(
            f"{folds} has the folds of other images or classes than {folder} ({odd} is one): "
            "choose another results folder with `out`"
        )
    return images_by_split


def _task(folder: Path, listing: Listing, images_by_split: ImagesBySplit, *, new_folds: bool = False) -> Task:
    images = sorted(listing.labels)
    row = {image: index for index, image in enumerate(images)}
    folds = tuple(
        Fold(*(np.array([row[image] for image in images_by_split[split, fold]], np.int64) for split in SPLITS))
        for fold in range(1, FOLDS + 1)
    )
    digest = hashlib.sha256(repr([(image, listing.labels[image]) for image in images]).encode())
    for fold in folds:
        digest.update(repr([getattr(fold, split).tolist() for split in SPLITS]).encode())
    digests = [_digest(folder / image, listing.sources[image]) for image in images]
    for each in digests:
        digest.update(each.digest())
    return Task(
        name=folder.resolve().name,
        folder=folder,
        images=tuple(images),
        labels=np.array([listing.labels[image] for image in images], np.int64),
        folds=folds,
        sources=tuple(listing.sources[image] for image in images),
        digests=tuple(each.hexdigest() for each in digests),
        patients=tuple(listing.patients[image] for image in images) if listing.patients else (),
        positive=" or ".join(sorted(listing.words[1])),
        sha256=digest.hexdigest(),
        new_folds=new_folds,
    )


def _digest(path: Path, where: str) -> hashlib._Hash:
    """The SHA-256 of an image. Raises `InputError` if it cannot be read."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{where}: {path} has over {MOST_BYTES >> 20} MiB: replace it")
        return hashlib.sha256(path.read_bytes())
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read ({error.strerror}): replace it") from error


def write_folds(task: Task, folder: Path) -> None:
    """Write the folds of a task as fold files into the new folder `folder`."""
    with new_folder(folder) as unfinished:
        for number, fold in enumerate(task.folds, start=1):
            for split in SPLITS:
                with (unfinished / f"{split}_fold{number}.csv").open("w", encoding="utf-8", newline="") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(["filename", "label"])
                    writer.writerows((task.images[row], task.labels[row]) for row in getattr(fold, split))


def decode(task: Task, image_size: int, progress: Progress = no_progress) -> NDArray[np.uint8]:
    """The task's images as grey pixels (N, 1, image_size, image_size), stretched as the images of a shard set are.

    The resampling is bilinear and antialiased. Raises `InputError` for an image that does not decode.
    """
    pixels = np.empty((len(task.images), 1, image_size, image_size), np.uint8)
    large = Lock()  # one at a time: a few bytes may declare an image of half a GiB

    def read(row: int) -> None:
        try:
            with Image.open(task.folder / task.images[row], formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"over {MOST_PIXELS:,} pixels")
                if image.mode[0] in "IF":
                    raise ValueError("more than 8 bits a pixel")
                with large if image.width * image.height > LARGE else nullcontext():
                    grey = image.convert("L").resize((image_size, image_size), Image.Resampling.BILINEAR)
        except Exception as error:  # Pillow raises errors of any type for damaged files
            raise InputError(
                f"{task.sources[row]}: {task.images[row]} does not decode ({str(error)[:200]}): replace it"
            ) from error
        pixels[row, 0] = np.asarray(grey)

    with ThreadPoolExecutor() as pool:
        for done, _ in enumerate(pool.map(read, range(len(pixels))), start=1):
            progress("decode", done, len(pixels), task.name)
    return pixels
