"""A downstream task: images, labels, folds and pixels, read from disk; and `FoldRun`, one training with its seeds.

N images, H x W pixels.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from modan_fast.downstream import medmnist
from modan_fast.downstream.classes import Kind
from modan_fast.downstream.folders import read_folders
from modan_fast.downstream.folds import check_folds, completed, label_text
from modan_fast.downstream.listing import SPLITS, Choices, ImagesBySplit, Listing
from modan_fast.downstream.pixels import digest, read_image, resized
from modan_fast.downstream.tables import IMAGE_COLUMNS, LABEL_COLUMNS, read_csv, read_dataframe
from shard_builder.atomic import new_folder
from shard_builder.settings import InputError, Progress, no_progress

ARRAYS = ".npz"
AT_ONCE = 1024  # rows of an array that are decoded together


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
    """The content of a task, whatever its layout.

    `images` are the N paths under `folder`, sorted; of a MedMNIST file `folder` is that file, and `images` are its
    rows. `kind` says what `labels` int64 are: of a binary task (N,), 1 for the class `positive` and 0 for the other; of
    a multi-class task (N,), an index into `classes`; of a multi-label one (N, L), 1 where the image has that one of
    `classes`. For each image, `sources` has the file and line that list it first, `digests` its SHA-256, `patients` its
    patient; `patients` is empty if they are unknown, and `subgroups` its value in each column that divides the images,
    empty where the value is missing. `sha256` covers names, labels, folds and the bytes of all images. `new_folds` is
    true if the folds were made just now and are in no file yet.
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
    kind: Kind = "binary"
    classes: tuple[str, ...] = ("negative", "positive")
    subgroups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def outputs(self) -> int:
        """The number of logits of a head: two of a binary task, else one a class."""
        return len(self.classes)

    def fold_of(self, fold_run: FoldRun) -> Fold:
        """The fold that a fold run trains and is tested on."""
        return self.folds[fold_run.fold - 1]


def task_name(path: Path) -> str:
    """The name of the task at a path: that of its folder, or of its file without the ending."""
    path = path.resolve()
    return path.stem if path.is_file() else path.name


def read_task(
    path: Path,
    *,
    folds: Path | None = None,
    seed: int = 0,
    group: str | None = None,
    positive: str | None = None,
    words: str | None = None,
    columns: Sequence[str] = (),
    subgroup: Sequence[str] = (),
    leave_out: str | None = None,
) -> Task:
    """Read a task of any layout.

    A folder with `dataframe/*{train,val,test}_fold{1..F}.csv`, as RadImageNet has them, or `*{train,val,test}.csv`; a
    folder with a folder for each class, or with `train`, `val` and `test` folders of these; a CSV file of all images;
    a .npz file of MedMNIST. Of a folder or file without folds or validation images, these are what an earlier
    evaluation wrote into the folder `folds`, or are made from `seed`.

    `group` is a column, or a regular expression whose first group, or whole match, in an image's path names the
    patient. `positive` names the positive class, `words` the words of each class (see `classes.parsed`), `columns` the
    columns of labels, `subgroup` columns that divide the images. With `leave_out`, a fold tests the images of each
    value of that column. Raises `InputError` that names the file and line.
    """
    if not (name := task_name(path)).isprintable():
        raise InputError(f"{name} is no name that the tables can hold: rename the task's folder")
    divided = tuple(dict.fromkeys((*subgroup, *([leave_out] if leave_out is not None else []))))
    if wrong := [column for column in divided if column.lower() in (*IMAGE_COLUMNS, *LABEL_COLUMNS)]:
        raise InputError(f"`subgroup={wrong[0]}` is the column of images or labels: name another one")
    choices = Choices(group, positive, words, tuple(columns), divided)
    known: Mapping[str, bytes] = {}
    if os.path.isfile(path) and path.suffix.lower() == ARRAYS:
        listing, given, known = medmnist.read_medmnist(path, choices)
    elif os.path.isfile(path) and path.suffix.lower() == ".csv":
        listing, given = read_csv(path, choices)
    elif os.path.isfile(path):
        raise InputError(f"{path} is no task: name a folder, a CSV file or a .npz file of MedMNIST")
    elif os.path.isdir(path / "dataframe"):
        listing, given = read_dataframe(path, choices)
    else:
        listing, given = read_folders(path, choices)
    images_by_split, new = completed(listing, given, folds, seed, leave_out)
    check_folds(listing, images_by_split)
    return _task(name, listing, images_by_split, known, new_folds=new)


def _task(
    name: str, listing: Listing, images_by_split: ImagesBySplit, known: Mapping[str, bytes], *, new_folds: bool
) -> Task:
    """The task; `known` are the digests of images that are no files."""
    images = sorted(listing.labels)
    row = {image: index for index, image in enumerate(images)}
    folds = tuple(
        Fold(*(np.array([row[image] for image in images_by_split[split, fold]], np.int64) for split in SPLITS))
        for fold in sorted({fold for _, fold in images_by_split})
    )
    whole = hashlib.sha256(repr([(image, listing.labels[image]) for image in images]).encode())
    if listing.kind != "binary":
        whole.update(repr((listing.kind, listing.classes)).encode())
    for fold in folds:
        whole.update(repr([getattr(fold, split).tolist() for split in SPLITS]).encode())
    digests = [known.get(image) or digest(listing.folder / image, listing.sources[image]) for image in images]
    for each in digests:
        whole.update(each)
    return Task(
        name=name,
        folder=listing.folder,
        images=tuple(images),
        labels=np.array([listing.labels[image] for image in images], np.int64),
        folds=folds,
        sources=tuple(listing.sources[image] for image in images),
        digests=tuple(each.hex() for each in digests),
        patients=tuple(listing.patients[image] for image in images) if listing.patients else (),
        positive=listing.classes[1] if listing.kind == "binary" else "",
        sha256=whole.hexdigest(),
        new_folds=new_folds,
        kind=listing.kind,
        classes=listing.classes,
        subgroups={
            column: tuple(values[image] for image in images) for column, values in listing.subgroups.items()
        },
    )


def write_folds(task: Task, folder: Path) -> None:
    """Write the folds of a task as fold files into the new folder `folder`."""
    labels = [label_text(tuple(label) if task.labels.ndim == 2 else label) for label in task.labels.tolist()]
    with new_folder(folder) as unfinished:
        for number, fold in enumerate(task.folds, start=1):
            for split in SPLITS:
                with (unfinished / f"{split}_fold{number}.csv").open("w", encoding="utf-8", newline="") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(["filename", "label"])
                    writer.writerows((task.images[row], labels[row]) for row in getattr(fold, split))


def decode(task: Task, image_size: int, progress: Progress = no_progress, channels: int = 1) -> NDArray[np.uint8]:
    """The task's images as pixels (N, channels, image_size, image_size), stretched as the images of a shard set are.

    One channel is grey, three are red, green and blue. The resampling is bilinear and antialiased. Raises `InputError`
    for an image that does not decode.
    """
    pixels = np.empty((len(task.images), channels, image_size, image_size), np.uint8)

    def read_file(row: int) -> None:
        try:
            image = read_image(task.folder / task.images[row], image_size, channels)
        except Exception as error:  # Pillow raises errors of any type for damaged files
            raise InputError(
                f"{task.sources[row]}: {task.images[row]} does not decode ({str(error)[:200]}): replace it"
            ) from error
        put(row, image)

    def read_row(named: tuple[int, NDArray[np.uint8]]) -> None:
        row, array = named
        put(row, resized(Image.fromarray(array), image_size, channels))

    def put(row: int, image: Image.Image) -> None:
        pixels[row] = np.asarray(image).reshape(image_size, image_size, channels).transpose(2, 0, 1)

    if task.folder.suffix.lower() == ARRAYS and task.folder.is_file():
        row_of = {image: row for row, image in enumerate(task.images)}
        arrays = ((row_of[name], array) for name, array in medmnist.rows(task.folder) if name in row_of)
        work = _mapped(read_row, arrays)
    else:
        work = _mapped(read_file, range(len(pixels)))
    for done, _ in enumerate(work, start=1):
        progress("decode", done, len(pixels), task.name)
    return pixels


def _mapped(function: Callable[[Any], None], items: Iterable[Any]) -> Iterator[None]:
    """`function` of each of the items, on all cores; an executor's own `map` would take all of them at once."""
    iterator = iter(items)
    with ThreadPoolExecutor() as pool:
        while block := list(islice(iterator, AT_ONCE)):
            yield from pool.map(function, block)
