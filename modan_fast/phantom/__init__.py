"""A synthetic archive in the shape of RadImageNet, and a small downstream task, for trials without patients' data.

CT, MR and ultrasound images of nine anatomies: maps of tissues (`anatomy`), rendered by a simple physics of each
modality (`physics`). They teach nothing about disease; they are for running, testing and timing everything else.
"""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modan_fast.phantom.folders import FOLDERS, PREFIXES, images_in
from modan_fast.phantom.picture import generator, picture
from shard_builder.atomic import new_folder
from shard_builder.settings import InputError, Progress, check_settings, no_progress, option, usable_cores

FOLDS = 5
CHUNK = 25  # images that a worker renders in one job
Chunk = tuple[str, int, int]  # class folder, first image, one past the last


@dataclass(frozen=True)
class _Settings:
    """The bounds of the functions' settings; making one checks them."""

    per_class: int = option(100, "Images per class.", least=1)
    images: int = option(200, "Images of a task.", least=4 * FOLDS, why="each split of a fold needs both classes")
    size: int = option(224, "Side of an image in pixels.", least=32)
    seed: int = option(0, "Seed of the images.", least=0)
    workers: int | None = option(None, "Processes; all cores by default.", least=1)

    def __post_init__(self) -> None:
        check_settings(self)


def phantom_plan(per_class: int = 100, classes: Sequence[str] | None = None) -> dict[str, int]:
    """The number of images in each class folder: RadImageNet's 165, or `classes` such as `CT/lung/Nodule`, `US/liver`.

    `per_class=100` gives 16,222 images in all, because ten classes have fewer than 100 (`folders.SMALL`). Other values
    scale these in proportion.
    """
    _Settings(per_class=per_class)
    chosen = FOLDERS.keys() if classes is None else dict.fromkeys(classes)
    unknown = [folder for folder in chosen if folder not in FOLDERS]
    if unknown:
        raise InputError(
            f"`classes`: {unknown[0]} is no class folder of RadImageNet: name one such as CT/lung/Nodule or US/liver"
        )
    if not chosen:
        raise InputError("`classes` is empty: leave it out to get all 165")
    return {folder: images_in(folder, per_class) for folder in sorted(chosen)}


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
    """Write `out/MODALITY/anatomy/class/*.png` (ultrasound without an anatomy level); return the number of images.

    The images are 8-bit grey, `size` x `size` pixels. Each is a pure function of (`seed`, folder, number): the bytes do
    not depend on `workers` (all cores by default), `per_class` or `classes`. `out` must be missing or an empty folder,
    and appears only when it is complete. Raises `InputError` for bad settings and an `out` that is in use.
    """
    _Settings(per_class=per_class, size=size, seed=seed, workers=workers)
    plan = phantom_plan(per_class, classes)
    out = _unused(out)
    chunks = [
        (folder, first, min(first + CHUNK, images))
        for folder, images in plan.items()
        for first in range(0, images, CHUNK)
    ]
    total, done = sum(plan.values()), 0
    with new_folder(out) as root:
        for folder in plan:
            (root / folder).mkdir(parents=True)
        for written in _write_all(root, chunks, size, seed, workers or usable_cores()):
            done += written
            progress("phantom", done, total, "")
    return total


def phantom_task(
    out: Path, *, images: int = 200, size: int = 224, seed: int = 0, progress: Progress = no_progress
) -> None:
    """Write a task in RadImageNet's form: breast ultrasound with a lesion (`malignant`) or without (`benign`).

    It consists of `out/images/*.png`, half of them with a lesion, and of
    `out/dataframe/phantom_{train,val,test}_fold{1..5}.csv` with the columns `filename,label`. Folds are stratified.
    Their test splits are disjoint and cover all images; a tenth of a fold's other images is for validation. Lesions are
    faint and lie anywhere in the gland; all images have lobules of fat that look a little like them. `out` must be
    missing or an empty folder, and appears only when it is complete. Raises `InputError` for bad settings and an `out`
    that is in use.
    """
    _Settings(images=images, size=size, seed=seed)
    out = _unused(out)
    random = generator(seed, "task")
    labels = random.permutation(images) % 2
    with new_folder(out) as root:
        (root / "images").mkdir()
        (root / "dataframe").mkdir()
        for index, label in enumerate(labels):
            pixels = picture(seed, "US", "breast", "tumor", index, size, lesion=bool(label))
            Image.fromarray(pixels).save(root / _task_image(index), compress_level=1)
            progress("task", index + 1, images, "")
        for fold, splits in enumerate(stratified_folds(labels, random), start=1):
            for split, rows in splits.items():
                path = root / "dataframe" / f"phantom_{split}_fold{fold}.csv"
                with open(path, "w", newline="", encoding="utf-8") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(["filename", "label"])
                    writer.writerows([_task_image(row), ("benign", "malignant")[labels[row]]] for row in rows)


def stratified_folds(
    labels: NDArray[np.int64], random: np.random.Generator
) -> list[dict[str, NDArray[np.int64]]]:
    """Row numbers of `train`, `val` and `test` in each of five folds, ascending; `labels` is (N,).

    Each split has the classes in the same proportion as `labels`.
    """
    rows_by_class = [random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    folds = []
    for fold in range(FOLDS):
        splits: dict[str, list[NDArray[np.int64]]] = {"train": [], "val": [], "test": []}
        for rows in rows_by_class:
            in_test = np.arange(len(rows)) % FOLDS == fold
            others = np.roll(rows[~in_test], -fold)
            validation = max(1, round(len(others) / 10))
            splits["test"].append(rows[in_test])
            splits["val"].append(others[:validation])
            splits["train"].append(others[validation:])
        folds.append({split: np.sort(np.concatenate(chosen)) for split, chosen in splits.items()})
    return folds


def _task_image(index: int) -> str:
    return f"images/phantom{index:05d}.png"


def _unused(out: Path) -> Path:
    """The absolute path of `out`. Raises `InputError` unless it is missing or an empty folder."""
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: choose another folder with `out`")
    return out


def _write_all(root: Path, chunks: list[Chunk], size: int, seed: int, workers: int) -> Iterator[int]:
    """Write all chunks, in processes if there are enough images; yield the number of images in each finished chunk."""
    if workers == 1 or sum(last - first for _, first, last in chunks) < 4 * CHUNK:
        yield from (_write(root, chunk, size, seed) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe in a process with threads
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
        # Noise hardly compresses, and level 1 takes a third of the default's time.
        Image.fromarray(pixels).save(root / folder / f"{prefix}{index:06d}.png", compress_level=1)
    return last - first
