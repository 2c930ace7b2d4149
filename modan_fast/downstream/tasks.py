"""A downstream task: a folder of images that belong to one of two classes, with five published folds.

N images, H x W pixels.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shard_builder.settings import InputError, Report, silent

FOLDS = 5
SPLITS = ("train", "val", "test")
IMAGE_COLUMNS = ("filename", "img_dir")
LABEL_COLUMNS = ("label", "acl_label")
LABELS = {"benign": 0, "normal": 0, "no": 0, "0": 0, "malignant": 1, "yes": 1, "1": 1}


@dataclass(frozen=True)
class Fold:
    """One division of a task: rows of its images, each array int64 in the order of its fold file."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Task:
    """What a task's fold files say.

    `images` are the N paths under `folder`, sorted; `labels` (N,) int64 is 1 for the positive class
    (malignant, yes, 1) and 0 for the other; `sources` names the file and line where each image came up first;
    `sha256` covers names, labels, folds and the bytes of all images.
    """

    name: str
    folder: Path
    images: tuple[str, ...]
    labels: NDArray[np.int64]
    folds: tuple[Fold, ...]
    sources: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Cell:
    """One training of an evaluation's grid: repeat and fold, both counted from 1.

    All that is random in it is drawn from here, so it does not depend on what was trained before it.
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


def read_task(folder: Path) -> Task:
    """Read `{folder}/dataframe/{prefix}{train,val,test}_fold{1..5}.csv`, as RadImageNet publishes them.

    The prefix may be anything. The image column is `filename` or `img_dir`, the label column `label` or
    `acl_label`. Raises `InputError`, naming the file and line, for whatever does not fit.
    """
    labels: dict[str, int] = {}
    sources: dict[str, str] = {}
    named: dict[tuple[str, int], list[str]] = {}
    for key, path in _fold_files(folder).items():
        named[key] = []
        for where, image, label in _rows(path):
            if PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts:
                raise InputError(f"{where}: {image} lies outside the task folder: paths are relative to it")
            if image not in labels and not (folder / image).is_file():
                raise InputError(f"{where}: there is no image {image} in {folder}")
            if labels.setdefault(image, label) != label:
                raise InputError(f"{where}: {image} has another label than at {sources[image]}")
            sources.setdefault(image, where)
            named[key].append(image)
        classes = {labels[image] for image in named[key]}
        if not classes or (key[0] != "val" and len(classes) < 2):
            found = "no image" if not classes else "one class only"
            raise InputError(f"{path} has {found}: both classes are needed to train and to test")

    images = sorted(labels)
    row = {image: index for index, image in enumerate(images)}
    folds = tuple(
        Fold(*(np.array([row[image] for image in named[split, fold]], np.int64) for split in SPLITS))
        for fold in range(1, FOLDS + 1)
    )
    digest = hashlib.sha256(repr([(image, labels[image]) for image in images]).encode())
    for fold in folds:
        digest.update(repr([getattr(fold, split).tolist() for split in SPLITS]).encode())
    for image in images:
        digest.update(hashlib.sha256((folder / image).read_bytes()).digest())
    return Task(
        name=folder.resolve().name,
        folder=folder,
        images=tuple(images),
        labels=np.array([labels[image] for image in images], np.int64),
        folds=folds,
        sources=tuple(sources[image] for image in images),
        sha256=digest.hexdigest(),
    )


def decode(task: Task, image_size: int, report: Report = silent) -> NDArray[np.uint8]:
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
            report("decode", done, len(pixels), task.name)
    return pixels


def _fold_files(folder: Path) -> dict[tuple[str, int], Path]:
    """The 15 fold files by (split, fold)."""
    frames = folder / "dataframe"
    if not frames.is_dir():
        raise InputError(f"{folder} is no task: it has no folder dataframe with the fold files")
    files = {}
    for split in SPLITS:
        for fold in range(1, FOLDS + 1):
            wanted = f"{split}_fold{fold}.csv"
            found = sorted(path for path in frames.iterdir() if path.name.endswith(wanted))
            if len(found) != 1:
                names = " and ".join(path.name for path in found) or "none"
                raise InputError(f"{frames} must have one file *{wanted}, found {names}")
            files[split, fold] = found[0]
    return files


def _rows(path: Path) -> Iterator[tuple[str, str, int]]:
    """(where it stands, image, label) of each row of a fold file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            image_column = next((name for name in IMAGE_COLUMNS if name in columns), None)
            label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
            if image_column is None or label_column is None:
                raise InputError(
                    f"{path}, line 1: needs a column {' or '.join(IMAGE_COLUMNS)} and a column "
                    f"{' or '.join(LABEL_COLUMNS)}, has {', '.join(columns) or 'none'}"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                image, label = (row[image_column] or "").strip(), (row[label_column] or "").strip()
                if not image or not image.isprintable():
                    raise InputError(f"{where}: names no image")
                if label.lower() not in LABELS:
                    raise InputError(f"{where}: label {label!r} is none of {', '.join(LABELS)}")
                yield where, re.sub(r"^(\./)+", "", image), LABELS[label.lower()]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path} is no CSV file in UTF-8 ({error})") from error
