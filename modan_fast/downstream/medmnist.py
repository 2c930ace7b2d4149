"""MedMNIST's .npz files: arrays `train_images`, `train_labels` and so on, read by rows, so that none fills the memory.

N rows of a split, L labels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modan_fast.downstream.classes import MOST_CLASSES, decide
from modan_fast.downstream.listing import (
    SPLITS,
    Choices,
    ImagesBySplit,
    Listing,
    find_patients,
    refuse_columns,
)
from shard_builder.files import open_regular
from shard_builder.settings import InputError

MOST_ROWS, MOST_SIDE = 10**6, 8192
CHUNK = 2**20  # bytes that are read at a time


class _Member(NamedTuple):
    """An array in the archive."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int


def read_medmnist(path: Path, choices: Choices) -> tuple[Listing, ImagesBySplit, dict[str, bytes]]:
    """The rows of a MedMNIST file, named as `train/000123`, their splits, and the SHA-256 of each.

    Raises `InputError` for another file.
    """
    refuse_columns(choices._replace(columns=()), f"{path}")
    listing = Listing(path)
    images: ImagesBySplit = {}
    digests: dict[str, bytes] = {}
    labels = []
    with _archive(path) as archive:
        for split, member in _image_members(path, archive).items():
            names = [f"{split}/{row:06}" for row in range(member.shape[0])]
            images[split, 1] = names
            listing.places[split, 1] = f"{path}: {split}_images"
            listing.sources |= dict.fromkeys(names, listing.places[split, 1])
            labels.append(_labels(path, archive, split, member.shape[0]))
            digests |= {name: hashlib.sha256(row).digest() for name, row in _rows(archive, split, member)}
    if len({each.shape[1] for each in labels}) > 1:
        raise InputError(f"{path}: the splits have different numbers of labels: it is no file of MedMNIST")
    _give_labels(listing, np.concatenate(labels), choices)
    find_patients(listing, choices.group)
    return listing, images, digests


def rows(path: Path) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The name and the pixels, (H, W) or (H, W, 3), of each row. Raises `InputError` for another file."""
    with _archive(path) as archive:
        for split, member in _image_members(path, archive).items():
            for name, row in _rows(archive, split, member):
                yield name, np.frombuffer(row, np.uint8).reshape(member.shape[1:])


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except InputError:
        raise
    # What zipfile raises for damaged archives, and for compressions and passwords that it does not know.
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is no whole .npz file of MedMNIST ({str(error)[:100]}): replace it") from error


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> _Member:
    """An array's header. Raises `InputError` if the array is not what it says, before any of it is read."""
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise InputError(f"{path} has no array {name}: name a .npz file of MedMNIST") from None
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: {name} is in a compression that is not read: save it with numpy")
    with archive.open(entry) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
                version
            ]
            shape, fortran, dtype = read(file)
        # The header is parsed as Python, which raises anything.
        except Exception as error:
            raise InputError(f"{path}: {name} is no array of numpy: replace the file") from error
        if fortran or dtype.kind not in "uib" or not all(0 < side <= MOST_ROWS for side in shape):
            raise InputError(
                f"{path}: {name} is no array of MedMNIST ({dtype}, {str(shape)[:60]}): replace the file"
            )
        start = file.tell()
    size = dtype.itemsize
    for side in shape:
        size *= side
    if entry.file_size != start + size:
        raise InputError(f"{path}: {name} has not the bytes of its shape {shape}: replace the file")
    return _Member(f"{name}.npy", shape, dtype, start)


def _image_members(path: Path, archive: zipfile.ZipFile) -> dict[str, _Member]:
    """The images of each split; that for validation may be missing."""
    members = {}
    for split in SPLITS:
        if split == "val" and "val_images.npy" not in archive.namelist():
            continue
        member = _member(path, archive, f"{split}_images")
        shape, kind = member.shape, member.dtype
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] != 3) or kind != np.uint8:
            raise InputError(
                f"{path}: {split}_images is {kind}, {shape}: grey images are uint8, (N, H, W), and coloured ones "
                "(N, H, W, 3); volumes are not read"
            )
        if max(shape[1:3]) > MOST_SIDE:
            raise InputError(
                f"{path}: {split}_images has images of {shape[1]} x {shape[2]}: over {MOST_SIDE} pixels"
            )
        members[split] = member
    return members


def _labels(path: Path, archive: zipfile.ZipFile, split: str, count: int) -> NDArray[Any]:
    """The labels (N, L) of a split."""
    member = _member(path, archive, f"{split}_labels")
    shape = member.shape
    if len(shape) not in (1, 2) or shape[0] != count or (len(shape) == 2 and shape[1] > MOST_CLASSES):
        raise InputError(
            f"{path}: {split}_labels is {shape}, beside {count:,} images: it needs a row for each image"
        )
    with archive.open(member.name) as file:
        _exactly(file, member.start)
        content = _exactly(file, count * member.dtype.itemsize * (shape[1] if len(shape) == 2 else 1), last=True)
    return np.frombuffer(content, member.dtype).reshape(count, -1)


def _rows(archive: zipfile.ZipFile, split: str, member: _Member) -> Iterator[tuple[str, bytes]]:
    """The name and the bytes of each row of a split's images."""
    count = member.shape[0]
    size = int(np.prod(member.shape[1:], dtype=np.int64))
    at_once = max(1, CHUNK // size)
    with archive.open(member.name) as file:
        _exactly(file, member.start)
        for first in range(0, count, at_once):
            after = min(first + at_once, count)
            block = _exactly(file, (after - first) * size, last=after == count)
            for row in range(first, after):
                yield f"{split}/{row:06}", block[(row - first) * size : (row - first + 1) * size]


def _exactly(file: IO[bytes], size: int, *, last: bool = False) -> bytes:
    """The next bytes; those that are the `last` end the array, which checks its checksum. Raises ValueError."""
    content = file.read(size)
    if len(content) < size or (last and file.read(1)):
        raise ValueError("another size than it declares")
    return content


def _give_labels(listing: Listing, labels_NL: NDArray[Any], choices: Choices) -> None:
    names = list(listing.sources)
    path = str(listing.folder)
    if labels_NL.shape[1] == 1:
        if choices.columns:
            raise InputError(f"`columns` names labels, and {path} has one: name its classes with `words`")
        numbers = labels_NL[:, 0].astype(int).tolist()
        found = {str(number): path for number in numbers}
        decided = decide(found, path, positive=choices.positive, words=choices.words, folders=False)
        listing.kind, listing.classes = decided.kind, decided.names
        listing.class_places = {label: f"{path}: class {name}" for label, name in enumerate(decided.names)}
        listing.labels |= {name: decided.labels[str(number)] for name, number in zip(names, numbers, strict=True)}
        return
    if choices.positive is not None or choices.words is not None:
        raise InputError(
            f"`positive` and `words` are for one label, and {path} has {labels_NL.shape[1]}: leave them out"
        )
    if not np.isin(labels_NL, (0, 1)).all():
        raise InputError(f"{path}: labels of {labels_NL.shape[1]} columns must be 0 or 1: correct them")
    classes = choices.columns or tuple(str(number) for number in range(labels_NL.shape[1]))
    if len(classes) != labels_NL.shape[1] or len(set(classes)) < len(classes):
        raise InputError(
            f"`columns` names {len(classes)} labels, and {path} has {labels_NL.shape[1]}: name each once"
        )
    listing.kind, listing.classes = "multilabel", classes
    listing.labels |= dict(zip(names, map(tuple, labels_NL.astype(int).tolist()), strict=True))
