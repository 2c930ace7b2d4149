"""CSV tables: read images and their labels, or the new label values of a `ValueMap`.

RadImageNet's own tables, `filename,label`, get their labels from the paths.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from shard_builder.entries import Entry, Scan, ValueMap, as_text, class_of, mapped
from shard_builder.files import open_regular
from shard_builder.manifest import Rejected
from shard_builder.scan import NO_ANATOMY, folder_labels, is_image
from shard_builder.settings import InputError, Progress, no_progress

PATHS = ("path", "filename")
MAX_LINE = 2**22  # characters of a row
PREFIX = "radiology_ai"
"""The folder that RadImageNet's archive unpacks to; the paths in its tables begin with it."""


class Row(NamedTuple):
    """A row of a table, numbered from 1, as messages name it."""

    table: Path
    number: int

    def __str__(self) -> str:
        return f"{self.table}, row {self.number}"


def columns(table: Path) -> list[str]:
    """The names of a table's columns in lower case; raises `InputError` if it is no table of images."""
    _, header = next(_lines(table), (1, []))
    names = [name.strip().lower() for name in header]
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise InputError(f"{table}, row 1: there are two columns {twice[0]}: remove one")
    if not set(PATHS) & set(names):
        raise InputError(
            f"{table}, row 1: there is no column path among {_joined(header)}: name the columns in the first row, "
            "separated by commas"
        )
    return names


def scan_table(
    tables: Sequence[Path],
    root: Path,
    fields: Sequence[str],
    *,
    anatomy: Mapping[str, str] | None = None,
    value_map: ValueMap | None = None,
    skip_unknown: bool = False,
    skip_missing: bool = False,
    progress: Progress = no_progress,
) -> Scan:
    """The images in the rows of `tables`, by their paths within the folder `root`, and their labels.

    Without `fields` the labels come from the paths, as in a tree. A column `class` is an image's class. An image may
    be listed again with the same labels. Raises `InputError` naming the table and the row.
    """
    anatomy, value_map = anatomy or {}, value_map or {}
    entries: dict[str, Entry] = {}
    rows: dict[str, Row] = {}  # of each image, the first that lists it
    labels: dict[tuple[str, ...], tuple[dict[str, str], str] | None] = {}  # few differ: rows share them
    rejected = []
    for row, path, cells in _images(tables, root, ("class", *fields)):
        folder = "" if fields else path.rpartition("/")[0].removeprefix(f"{PREFIX}/")
        known = (*cells, folder)
        if known not in labels:
            labels[known] = _labels(cells, fields, folder, anatomy, value_map)
        found = labels[known]
        if found:
            entry = Entry(path, *found)
            if entries.setdefault(path, entry) != entry:
                first = rows[path]
                raise InputError(
                    f"{row}: names the same image as row {first.number} of {first.table}, with other labels: keep one"
                )
        elif skip_unknown:
            rejected.append(Rejected(as_text(path), NO_ANATOMY))
        else:
            raise InputError(f"{row}: {_without_labels(path, folder)}")
        rows.setdefault(path, row)
        if len(rows) % 10_000 == 0:
            progress("reading rows", len(rows), len(rows) + 1, "")  # the total is unknown until the end
    progress("reading rows", len(rows), len(rows), "")
    for folder in sorted(set(anatomy) - {known[-1] for known in labels}):
        raise InputError(f"`anatomy={folder}`: no row of {tables[0]} names an image directly in {folder}")

    missing = _missing(root, entries)
    if missing and not (skip_missing and len(missing) < len(entries)):
        first_missing = (
            f", {as_text(missing[0])}," if is_image(missing[0]) else ""
        )  # other names may name patients
        raise InputError(
            f"{rows[missing[0]]}: its image{first_missing} is not in {root} ({len(missing):,} of {len(entries):,} "
            f"images are missing): pass their folder as `source` and the table as `table={tables[0].name}`, correct "
            "the table, or pass `skip_missing=True`"
        )
    for path in missing:
        rejected.append(Rejected(as_text(path), "not in the folder of the images"))
        del entries[path]
    return Scan("table", tuple(fields or ("modality", "anatomy")), list(entries.values()), rejected, root)


def _without_labels(path: str, folder: str) -> str:
    """The message for an image whose path in `folder` names no modality and anatomy."""
    shown = as_text(folder) if folder and is_image(path) else "its path"  # other names may name patients
    name_it = ""
    if folder.count("/") == 1:
        name_it = f"name the anatomy with `anatomy={shown}=abd`, or pass `skip_unknown=True`, or "
    return f"{shown} names no modality and anatomy: {name_it}add columns of labels"


def read_value_map(table: Path, fields: Sequence[str]) -> ValueMap:
    """New label values, from a CSV file with the columns `field,from,to`; the fields must be among `fields`."""
    lines = _lines(table)
    _, header = next(lines, (1, []))
    if [name.strip().lower() for name in header] != ["field", "from", "to"]:
        raise InputError(f"{table}, row 1: its columns must be field,from,to, not {_joined(header)}")
    value_map: dict[tuple[str, str], str] = {}
    for number, cells in lines:
        row = Row(table, number)
        if len(cells) != 3:
            raise InputError(f"{row}: has {len(cells)} cells, not 3: field,from,to")
        name, old, new = (cell.strip() for cell in cells)
        if name not in fields:
            raise InputError(f"{row}: there is no field {name or '(empty)'}: name one of {', '.join(fields)}")
        if not old:
            raise InputError(f"{row}: names no value to change: fill the column from")
        if value_map.setdefault((name, old), new) != new:
            raise InputError(f"{row}: gives {name} {old} another name than a row before: keep one")
    return value_map


def _images(
    tables: Sequence[Path], root: Path, wanted: Sequence[str]
) -> Iterator[tuple[Row, str, tuple[str, ...]]]:
    """Each row, the path of its image, and its cells in the columns `wanted`, empty for a missing column.

    Only the first of these columns, the class, may be missing.
    """
    moved = not (root / PREFIX).is_dir()
    for table in tables:
        header = columns(table)
        if lacking := [name for name in wanted[1:] if name not in header]:
            raise InputError(f"{table}, row 1: there is no column {lacking[0]} among {_joined(header)}")
        indices = [header.index(name) if name in header else None for name in wanted]
        path_index = next(header.index(name) for name in PATHS if name in header)
        lines = _lines(table)
        next(lines)
        for number, cells in lines:
            row = Row(table, number)
            if len(cells) != len(header):
                raise InputError(f"{row}: has {len(cells)} cells, and the first row {len(header)}")
            path = cells[path_index].strip().replace("\\", "/")
            components = [each for each in path.split("/") if each not in ("", ".")]
            outside = path.startswith("/") or ".." in components or path[1:2] == ":"
            if not components or outside or "\0" in path:
                raise InputError(f"{row}: its path must be one within {root}, without .. or a drive")
            if moved and components[0] == PREFIX:
                components = components[1:]
            wanted_cells = (cells[index].strip() if index is not None else "" for index in indices)
            yield row, "/".join(components), tuple(wanted_cells)


def _labels(
    cells: Sequence[str], fields: Sequence[str], folder: str, anatomy: Mapping[str, str], value_map: ValueMap
) -> tuple[dict[str, str], str] | None:
    """The fields and the class of a row with these cells: its class, then the values of `fields`."""
    if fields:
        values = {name: as_text(value) for name, value in zip(fields, cells[1:], strict=True)}
        found = mapped(values, value_map)
        return found, as_text(cells[0]) or class_of(found, fields)
    by_folder = folder_labels(tuple(folder.split("/")), anatomy, value_map)
    return by_folder and (by_folder[0], as_text(cells[0]) or by_folder[1])


def _missing(root: Path, paths: Iterable[str]) -> list[str]:
    """Those of `paths` that `root` lacks. Each folder is listed once, which is faster than a look at each file."""
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(root / folder))
            except OSError:
                listed[folder] = set()
        if name not in listed[folder]:
            missing.append(path)
    return missing


def _lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV file that are not empty, numbered from 1, each as its cells."""
    reader = None
    try:
        with io.TextIOWrapper(open_regular(table), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(_bounded(file), strict=True)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
    except OSError as error:
        raise InputError(f"{table} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{table} is not UTF-8 text: save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{table}, row {reader.line_num if reader else 1}: is not valid CSV: {error}") from None


def _bounded(file: TextIO) -> Iterator[str]:
    """The lines of a file; raises `csv.Error` for one that would fill the memory."""
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise csv.Error(f"a line has over {MAX_LINE:,} characters")
        yield line


def _joined(header: Sequence[str]) -> str:
    return as_text(", ".join(header))[:200] or "none"
