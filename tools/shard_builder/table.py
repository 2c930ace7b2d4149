"""Tables of images and their labels, as CSV files. RadImageNet's own, `filename,label`, are read by their paths."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shard_builder.manifest import Rejected
from shard_builder.scan import NO_ANATOMY, Entry, Names, Scan, as_text, class_of, folder_labels, is_image, renamed
from shard_builder.settings import InputError, Progress, no_progress

PATHS = ("path", "filename")
PREFIX = "radiology_ai"
"""The folder that RadImageNet's archive unpacks to, with which the paths in its tables begin."""


def columns(table: Path) -> list[str]:
    """The names of a table's columns in lower case; raises `InputError` where they are no table of images."""
    _, header = next(_lines(table), (1, []))
    names = [name.strip().lower() for name in header]
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise InputError(f"{table}, row 1: there are two columns {twice}: remove one")
    if not set(PATHS) & set(names):
        raise InputError(
            f"{table}, row 1: there is no column path among {_listed(header)}: name the columns in the first row, "
            "separated by commas"
        )
    return names


def scan_table(
    tables: Sequence[Path],
    root: Path,
    fields: Sequence[str],
    *,
    anatomy: Mapping[str, str] | None = None,
    names: Names | None = None,
    skip_unknown: bool = False,
    skip_missing: bool = False,
    progress: Progress = no_progress,
) -> Scan:
    """The images that the rows of `tables` name, by paths within the folder `root`, and their labels.

    Without `fields` the paths tell the labels, as those of a tree do. A column `class` names an image's class. An
    image may be named again with the same labels. Raises `InputError` with table and row for what cannot be used.
    """
    names = names or {}
    entries: dict[str, Entry] = {}
    places: dict[str, tuple[Path, int]] = {}
    labels: dict[tuple[str, ...], tuple[dict[str, str], str] | None] = {}  # few differ: rows share them
    rejected = []
    for place, path, cells in _images(tables, root, ("class", *fields)):
        folder = "" if fields else path.rpartition("/")[0].removeprefix(f"{PREFIX}/")
        known = (*cells, folder)
        if known not in labels:
            labels[known] = _labels(cells, fields, folder, anatomy or {}, names)
        found = labels[known]
        if found:
            entry = Entry(path, *found)
            if entries.setdefault(path, entry) != entry:
                first = "row {1} of {0}".format(*places[path])
                raise InputError(_at(place, f"names the same image as {first}, with other labels: keep one"))
        elif skip_unknown:
            rejected.append(Rejected(as_text(path), NO_ANATOMY))
        else:
            called = as_text(folder) if folder and is_image(path) else "its path"  # others may name patients
            way = f"give it one with `anatomy={called}=abd`, or pass `skip_unknown=True`, or "
            way = way if folder.count("/") == 1 else ""
            raise InputError(_at(place, f"{called} names no modality and anatomy: {way}add columns with labels"))
        places.setdefault(path, place)
        if len(places) % 10_000 == 0:
            progress("reading rows", len(places), len(places) + 1, "")  # nobody knows how many there are
    progress("reading rows", len(places), len(places), "")
    for folder in sorted(set(anatomy or {}) - {known[-1] for known in labels}):
        raise InputError(f"`anatomy={folder}`: no row of {tables[0]} names an image right in {folder}")
    missing = _missing(root, entries)
    if missing and not (skip_missing and len(missing) < len(entries)):
        first = missing[0]
        shown = f", {as_text(first)}," if is_image(first) else ""  # others may name patients
        raise InputError(
            _at(
                places[first],
                f"its image{shown} is not in {root} ({len(missing):,} of {len(entries):,} images are not there): "
                f"name their folder, as in `modan-fast shard FOLDER --table {tables[0].name}`, correct the table, or "
                "pass `skip_missing=True`",
            )
        )
    rejected += [Rejected(as_text(path), "not in the folder of the images") for path in missing]
    for path in missing:
        del entries[path]
    return Scan("table", tuple(fields or ("modality", "anatomy")), list(entries.values()), rejected, root)


def read_names(table: Path, fields: Sequence[str]) -> dict[tuple[str, str], str]:
    """New names of values, from a CSV file with the columns `field,from,to`; the fields must be among `fields`."""
    lines = _lines(table)
    _, header = next(lines, (1, []))
    if [name.strip().lower() for name in header] != ["field", "from", "to"]:
        raise InputError(f"{table}, row 1: its columns must be field,from,to, not {_listed(header)}")
    names: dict[tuple[str, str], str] = {}
    for row, cells in lines:
        if len(cells) != 3:
            raise InputError(_at((table, row), f"has {len(cells)} cells, not 3: field,from,to"))
        name, old, new = (cell.strip() for cell in cells)
        if name not in fields:
            raise InputError(
                _at((table, row), f"there is no field {name or '(empty)'}: name one of {', '.join(fields)}")
            )
        if not old:
            raise InputError(_at((table, row), "names no value to change: fill the column from"))
        if names.setdefault((name, old), new) != new:
            raise InputError(_at((table, row), f"gives {name} {old} another name than a row before: keep one"))
    return names


def _images(
    tables: Sequence[Path], root: Path, wanted: Sequence[str]
) -> Iterator[tuple[tuple[Path, int], str, tuple[str, ...]]]:
    """The rows: where each is, the path of its image, and its cells in the columns `wanted`, empty for none."""
    moved = not (root / PREFIX).is_dir()
    for table in tables:
        header = columns(table)
        if lacking := [name for name in wanted[1:] if name not in header]:
            raise InputError(f"{table}, row 1: there is no column {lacking[0]} among {_listed(header)}")
        places = [header.index(name) if name in header else -1 for name in wanted]
        at = next(header.index(name) for name in PATHS if name in header)
        lines = _lines(table)
        next(lines)
        for row, cells in lines:
            if len(cells) != len(header):
                raise InputError(_at((table, row), f"has {len(cells)} cells, and the first row {len(header)}"))
            path = cells[at].strip().replace("\\", "/")
            parts = [part for part in path.split("/") if part not in ("", ".")]
            if not parts or path.startswith("/") or ".." in parts or parts[0][1:2] == ":":
                raise InputError(_at((table, row), f"its path must be one within {root}, without .. or a drive"))
            path = "/".join(parts[1:] if moved and parts[0] == PREFIX else parts)
            yield (table, row), path, tuple(cells[place].strip() if place >= 0 else "" for place in places)


def _labels(
    cells: Sequence[str], fields: Sequence[str], folder: str, anatomy: Mapping[str, str], names: Names
) -> tuple[dict[str, str], str] | None:
    """The fields and the class of a row with these cells: its class, then the values of `fields`."""
    if fields:
        found = renamed({name: as_text(value) for name, value in zip(fields, cells[1:], strict=True)}, names)
        return found, as_text(cells[0]) or class_of(found, fields)
    read = folder_labels(folder.split("/"), anatomy, names)
    return read and (read[0], as_text(cells[0]) or read[1])


def _missing(root: Path, paths: Mapping[str, Entry]) -> list[str]:
    """Those of `paths` that `root` lacks. Each folder is listed once: quicker than to ask for each file."""
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
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
    except OSError as error:
        raise InputError(f"{table} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{table} is no text in UTF-8: save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{table}, row {reader.line_num if reader else 1}: no CSV: {error}") from None


def _at(place: tuple[Path, int], what: str) -> str:
    return f"{place[0]}, row {place[1]}: {what}"


def _listed(header: Sequence[str]) -> str:
    return as_text(", ".join(header))[:200] or "none"
