"""A synthetic archive in the shape of RadImageNet, and a small downstream task, for trials without patients' data.

CT, MR and ultrasound pictures of nine anatomies, drawn from tissues (`anatomy`) by a simple physics of each
modality (`physics`). They teach nothing about disease; they let everything be run, tested and timed.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modan_fast.phantom.folders import FOLDERS, PREFIXES, images_in
from modan_fast.phantom.picture import generator, picture
from shard_builder.settings import InputError, Progress, no_progress, usable_cores

FOLDS = 5
CHUNK = 25  # images that a worker makes at a time
Chunk = tuple[str, int, int]  # class folder, first image, one past the last


def phantom_plan(per_class: int = 100, classes: Sequence[str] | None = None) -> dict[str, int]:
    """Images of each class folder: RadImageNet's 165, or those named in `classes` (`CT/lung/Nodule`, `US/liver`).

    With 100 per class they are 16,222, because ten classes have fewer (`folders.SMALL`); other numbers scale.
    """
    if per_class < 1:
        raise InputError(f"per_class must be at least 1, got {per_class}")
    wanted = FOLDERS.keys() if classes is None else dict.fromkeys(classes)
    unknown = [folder for folder in wanted if folder not in FOLDERS]
    if unknown:
        raise InputError(
            f"{unknown[0]} is no class folder of RadImageNet: name one like CT/lung/Nodule or US/liver"
        )
    if not wanted:
        raise InputError("no classes are named: leave classes out to get all 165")
    return {folder: images_in(folder, per_class) for folder in sorted(wanted)}


def phantom_archive(
    out: Path,
    *,
    per_class: int = 100,
    size: int = 224,
    seed: int = 0,
    workers: int | None = None,
    classes: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> int:
    """Write `out/MODALITY/anatomy/class/*.png` (ultrasound without an anatomy level); the number of images.

    8-bit grey, `size` x `size` pixels. An image is a pure function of (`seed`, folder, number), so the bytes
    do not depend on `workers` (as default all cores), `per_class` or `classes`. `out` must be new or empty, and
    appears only when it is complete.
    """
    plan = phantom_plan(per_class, classes)
    _check(size, seed)
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    chunks = [
        (folder, first, min(first + CHUNK, images))
        for folder, images in plan.items()
        for first in range(0, images, CHUNK)
    ]
    total, done = sum(plan.values()), 0
    with _appearing(out) as root:
        for folder in plan:
            (root / folder).mkdir(parents=True)
        for written in _write_all(root, chunks, size, seed, workers or usable_cores()):
            done += written
            progress("phantom", done, total, "")
    return total


def phantom_task(
    out: Path, *, images: int = 200, size: int = 224, seed: int = 0, progress: Progress = no_progress
) -> None:
    """Write a task in RadImageNet's form: breast ultrasound, with a lesion (`malignant`) or without (`benign`).

    `out/images/*.png`, half of them with a lesion, and `out/dataframe/phantom_{train,val,test}_fold{1..5}.csv`
    with the columns `filename,label`. Folds are stratified; their tests are disjoint and cover all images, and
    a tenth of a fold's other images is for validation. Lesions are faint, lie anywhere in the gland, and lobules
    of fat in all images look a little like them. `out` must be new or empty, and appears only when it is complete.
    """
    if images < 4 * FOLDS:
        raise InputError(
            f"images must be at least {4 * FOLDS}, so that each part of a fold has both classes, got {images}"
        )
    _check(size, seed)
    random = generator(seed, "task")
    labels = random.permutation(images) % 2
    with _appearing(out) as root:
        (root / "images").mkdir()
        (root / "dataframe").mkdir()
        for index, label in enumerate(labels):
            pixels = picture(seed, "US", "breast", "tumor", index, size, lesion=bool(label))
            Image.fromarray(pixels).save(root / _task_image(index), compress_level=1)
            progress("task", index + 1, images, "")
        for fold, parts in enumerate(stratified_folds(labels, random), start=1):
            for split, rows in parts.items():
                path = root / "dataframe" / f"phantom_{split}_fold{fold}.csv"
                with open(path, "w", newline="", encoding="utf-8") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(["filename", "label"])
                    writer.writerows([_task_image(row), ("benign", "malignant")[labels[row]]] for row in rows)


def stratified_folds(
    labels: NDArray[np.int64], random: np.random.Generator
) -> list[dict[str, NDArray[np.int64]]]:
    """Rows of `train`, `val` and `test` of five folds, ascending; each part has the classes' shares of the whole."""
    groups = [random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    folds = []
    for fold in range(FOLDS):
        parts: dict[str, list[NDArray[np.int64]]] = {"train": [], "val": [], "test": []}
        for group in groups:
            tested = np.arange(len(group)) % FOLDS == fold
            rest = np.roll(group[~tested], -fold)
            validated = max(1, round(len(rest) / 10))
            for split, rows in (("test", group[tested]), ("val", rest[:validated]), ("train", rest[validated:])):
                parts[split].append(rows)
        folds.append({split: np.sort(np.concatenate(rows)) for split, rows in parts.items()})
    return folds


def _task_image(index: int) -> str:
    return f"images/phantom{index:05d}.png"


def _check(size: int, seed: int) -> None:
    if size < 32:
        raise InputError(f"size must be at least 32 pixels, got {size}")
    if seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")


def _write_all(root: Path, chunks: list[Chunk], size: int, seed: int, workers: int) -> Iterator[int]:
    """Write all chunks, in processes where it pays; the images of each as it is done."""
    if workers == 1 or sum(last - first for _, first, last in chunks) < 4 * CHUNK:
        yield from (_write(root, chunk, size, seed) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside threads
    with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=context) as pool:
        try:
            futures = [pool.submit(_write, root, chunk, size, seed) for chunk in chunks]
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write(root: Path, chunk: Chunk, size: int, seed: int) -> int:
    folder, first, last = chunk
    modality, anatomy, name = FOLDERS[folder]
    prefix = PREFIXES.get((modality, anatomy), anatomy)
    for index in range(first, last):
        pixels = picture(seed, modality, anatomy, name, index, size)
        # Noise hardly compresses: level 1 takes a third of the default's time.
        Image.fromarray(pixels).save(root / folder / f"{prefix}{index:06d}.png", compress_level=1)
    return last - first


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end; on an error, or a break, nothing is left."""
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: name a new one, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.part{os.getpid()}")
    beside.mkdir()
    try:
        yield beside
        if out.exists():
            out.rmdir()  # empty, and in the way of the rename on some systems
        os.replace(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
