"""Tasks that are CSV files: fold files, the files of one split, or one file for all images.

The columns are those of `IMAGE_COLUMNS`, of `LABEL_COLUMNS` or others that the user names, and the user's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from modan_fast.downstream.classes import BITS, LONGEST_NAME, MOST_CLASSES, decide, listed
from modan_fast.downstream.csv_files import Table, fold_files, read_table, split_files
from modan_fast.downstream.listing import (
    SPLIT_NAMES,
    Choices,
    ImagesBySplit,
    Label,
    Listing,
    check_image,
    checked_path,
    find_patients,
    shared_value,
)
from shard_builder.settings import InputError

IMAGE_COLUMNS = ("filename", "img_dir", "path", "image", "dir")
LABEL_COLUMNS = ("label", "acl_label", "class")
MOST_VALUES, LONGEST_VALUE = 100, 200  # of a column that divides the images, and characters of one


def read_dataframe(folder: Path, choices: Choices) -> tuple[Listing, ImagesBySplit]:
    """Read the fold files, or those of one split, in the folder `dataframe` of a task.

    Raises `InputError` that names the file and line.
    """
    files = fold_files(folder / "dataframe") or split_files(folder / "dataframe")
    if choices.positive is not None:
        raise InputError(
            f"`positive` is for class folders: the fold files of {folder} say which is positive, or name their words "
            "with `words`"
        )
    return read_split_tables(folder, files, choices)


def read_split_tables(
    folder: Path, files: dict[tuple[str, int], Path], choices: Choices
) -> tuple[Listing, ImagesBySplit]:
    """Read the tables of each split and fold."""
    tables = {key: read_table(path) for key, path in files.items()}
    listing, images = _read(folder, list(tables.values()), choices, str(folder / "dataframe"))
    listing.places = {key: str(path) for key, path in files.items()}
    return listing, dict(zip(tables, images, strict=True))


def read_csv(path: Path, choices: Choices) -> tuple[Listing, ImagesBySplit]:
    """Read one table of all images, and its column `split` or `fold` if it has one.

    Raises `InputError` that names the line.
    """
    table = read_table(path)
    split, fold = table.column(["split"]), table.column(["fold"])
    if split is not None and fold is not None:
        raise InputError(f"{path}, line 1: has a column split and a column fold: remove or rename one")
    listing, (images,) = _read(path.parent, [table], choices, str(path))
    seen: set[str] = set()
    for (number, _), image in zip(table.rows, images, strict=True):
        if image in seen:
            raise InputError(f"{table.where(number)}: {image} is listed twice: remove a line")
        seen.add(image)
    if split is not None:
        return listing, _by_split(table, images, split)
    if fold is not None:
        return listing, _by_fold(table, images, fold)
    return listing, {}


def _by_split(table: Table, images: Sequence[str], column: int) -> ImagesBySplit:
    by_split: ImagesBySplit = {}
    for (number, cells), image in zip(table.rows, images, strict=True):
        if (split := SPLIT_NAMES.get(cells[column].strip().lower())) is None:
            raise InputError(
                f"{table.where(number)}: the column split is {cells[column][:40]!r}, not train, val or test"
            )
        by_split.setdefault((split, 1), []).append(image)
    for split in ("train", "test"):
        if (split, 1) not in by_split:
            raise InputError(
                f"{table.path}: no line has {split} in the column split: name the images of each split"
            )
    return by_split


def _by_fold(table: Table, images: Sequence[str], column: int) -> ImagesBySplit:
    """The folds of a column that numbers them: each is validated on the test images of the next, if there are three."""
    folds: dict[int, list[str]] = {}
    for (number, cells), image in zip(table.rows, images, strict=True):
        if not re.fullmatch(r"[0-9]{1,4}", cells[column].strip()):
            raise InputError(f"{table.where(number)}: the column fold is {cells[column][:40]!r}, no number")
        folds.setdefault(int(cells[column]), []).append(image)
    first = min(folds)
    if len(folds) < 2 or first > 1 or sorted(folds) != list(range(first, first + len(folds))):
        raise InputError(
            f"{table.path}: the column fold has {listed([str(fold) for fold in sorted(folds)])}: number the folds from "
            "1, at least two"
        )
    by_split: ImagesBySplit = {}
    for fold in range(len(folds)):
        apart = {fold, (fold + 1) % len(folds)} if len(folds) > 2 else {fold}
        rest = [number for number in range(len(folds)) if number not in apart]
        by_split["test", fold + 1] = folds[first + fold]
        by_split["train", fold + 1] = [image for number in rest for image in folds[first + number]]
        for other in apart - {fold}:
            by_split["val", fold + 1] = folds[first + other]
    return by_split


def _read(folder: Path, tables: Sequence[Table], choices: Choices, task: str) -> tuple[Listing, list[list[str]]]:
    """The images that the tables list, and those of each table in order."""
    image_columns = [_image_column(table) for table in tables]
    label_columns = _label_columns(tables, choices)
    listing = Listing(folder, task=task, subgroups={column: {} for column in choices.subgroups})
    images: list[list[str]] = []
    for table, image_column in zip(tables, image_columns, strict=True):
        group = table.column([choices.group]) if choices.group else None
        subgroups = {column: table.needed(column) for column in choices.subgroups}
        images.append([])
        for number, cells in table.rows:
            where = table.where(number)
            image = checked_path(folder, cells[image_column].strip(), where)
            if image not in listing.sources:
                check_image(folder, image, where)
                listing.sources[image] = where
            if group is not None:
                if not cells[group].strip():
                    raise InputError(
                        f"{where}: the column {choices.group} is empty: name the patient of each image"
                    )
                listing.patients[image] = cells[group]
            for column, index in subgroups.items():
                value = cells[index].strip()
                if not value.isprintable() or len(value) > LONGEST_VALUE:
                    raise InputError(f"{where}: the column {column} has no value that a table can show")
                shared_value(listing.subgroups[column], image, value, column, where)
            images[-1].append(image)
    if not listing.sources:
        raise InputError(f"{task} lists no image: name the images in its lines")
    for column, values in listing.subgroups.items():
        if len(found := set(values.values())) > MOST_VALUES:
            raise InputError(
                f"{task}: the column {column} has {len(found):,} values: name one of {MOST_VALUES} at most"
            )
    if len(label_columns[0]) == 1:
        _read_words(listing, tables, images, [index for (index,) in label_columns], choices, task)
    else:
        _read_bits(listing, tables, images, label_columns, choices)
    find_patients(listing, choices.group)
    return listing, images


def _image_column(table: Table) -> int:
    if (index := table.column(IMAGE_COLUMNS)) is None:
        raise InputError(
            f"{table.path}, line 1: needs a column {' or '.join(IMAGE_COLUMNS)} and a column "
            f"{' or '.join(LABEL_COLUMNS)}, has {listed(table.columns)}"
        )
    return index


def _label_columns(tables: Sequence[Table], choices: Choices) -> list[list[int]]:
    """The columns of labels of each table: those that the user names, one of words, or all that hold only 0 and 1."""
    if choices.columns:
        if len(set(choices.columns)) < len(choices.columns):
            raise InputError(f"`columns` names {', '.join(choices.columns)}: name each column once")
        return [[table.needed(name) for name in choices.columns] for table in tables]
    words = [table.column(LABEL_COLUMNS) for table in tables]
    if None not in words:
        return [[index] for index in words if index is not None]
    other = {"split", "fold", *IMAGE_COLUMNS, choices.group, *choices.subgroups}
    names = [
        name
        for name in tables[0].columns
        if name and name.lower() not in other and name not in other and _all_bits(tables, name)
    ]
    if not names:
        table = tables[words.index(None)]
        raise InputError(
            f"{table.path}, line 1: needs a column {' or '.join(LABEL_COLUMNS)}, or columns that hold only 0 and 1, "
            f"has {listed(table.columns)}: name the columns of labels with `columns`"
        )
    return [[table.needed(name) for name in names] for table in tables]


def _all_bits(tables: Sequence[Table], name: str) -> bool:
    for table in tables:
        index = table.column([name])
        if index is None or any(cells[index].strip() not in BITS for _, cells in table.rows):
            return False
    return True


def _read_words(
    listing: Listing,
    tables: Sequence[Table],
    images: Sequence[Sequence[str]],
    columns: Sequence[int],
    choices: Choices,
    task: str,
) -> None:
    """Give each image the class of the word in its table's column."""
    found: dict[str, str] = {}  # each word, and where it is first
    for table, column in zip(tables, columns, strict=True):
        for number, cells in table.rows:
            if not (word := cells[column].strip().lower()):
                raise InputError(f"{table.where(number)}: label '' is none: name the class of each image")
            found.setdefault(word, table.where(number))
    decided = decide(found, task, positive=choices.positive, words=choices.words, folders=False)
    listing.kind, listing.classes = decided.kind, decided.names
    listing.class_places = {label: f"{task}: class {name}" for label, name in enumerate(decided.names)}
    for table, column, listed_images in zip(tables, columns, images, strict=True):
        for (number, cells), image in zip(table.rows, listed_images, strict=True):
            _add_label(listing, image, decided.labels[cells[column].strip().lower()], table.where(number))


def _read_bits(
    listing: Listing,
    tables: Sequence[Table],
    images: Sequence[Sequence[str]],
    columns: Sequence[Sequence[int]],
    choices: Choices,
) -> None:
    """Give each image the 0 or 1 of each of its table's columns of labels."""
    names = [tables[0].columns[index] for index in columns[0]]
    if len(names) > MOST_CLASSES:
        raise InputError(f"{tables[0].path} has {len(names):,} columns of labels: name some with `columns`")
    if long := [name for name in names if len(name) > LONGEST_NAME or not name.isprintable()]:
        raise InputError(f"{tables[0].path}, line 1: {long[0][:100]!r} is no name of a label: rename the column")
    if choices.positive is not None:
        raise InputError(
            "`positive` is for one column of labels: leave it out, or name that column with `columns`"
        )
    bits: Mapping[str, int] = BITS
    if choices.words is not None:
        found = _words_of(tables, columns)
        decided = decide(found, "", positive=None, words=choices.words, folders=False)
        if decided.kind != "binary":
            raise InputError(
                f"`words={choices.words}` must name the words of positive and negative: of each label"
            )
        bits = decided.labels
    listing.kind, listing.classes = "multilabel", tuple(names)
    for table, indices, listed_images in zip(tables, columns, images, strict=True):
        for (number, cells), image in zip(table.rows, listed_images, strict=True):
            label = tuple(bits.get(cells[index].strip().lower(), -1) for index in indices)
            if -1 in label:
                index = indices[label.index(-1)]
                raise InputError(
                    f"{table.where(number)}: the column {table.columns[index]} is {cells[index][:40]!r}, not 0 or 1: "
                    "correct it, or say what its words mean with `words=positive=…,negative=…`"
                )
            _add_label(listing, image, label, table.where(number))


def _words_of(tables: Sequence[Table], columns: Sequence[Sequence[int]]) -> dict[str, str]:
    return {
        cells[index].strip().lower(): table.where(number)
        for table, indices in zip(tables, columns, strict=True)
        for number, cells in table.rows
        for index in indices
    }


def _add_label(listing: Listing, image: str, label: Label, where: str) -> None:
    if listing.labels.setdefault(image, label) != label:
        raise InputError(f"{where}: {image} has another label than at {listing.sources[image]}")
