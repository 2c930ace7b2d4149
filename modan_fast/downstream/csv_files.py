"""CSV files of tasks: found by their names, and read whole."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modan_fast.downstream.classes import listed
from modan_fast.downstream.listing import SPLIT_NAMES, SPLITS
from shard_builder.files import open_regular
from shard_builder.settings import InputError

FOLD_FILE = re.compile(r"(train|val|test)_fold0*(\d{1,4})\.csv$")
SPLIT_FILE = re.compile(r"(?:^|[\W_\d])(train|val|valid|validation|test)\.csv$")
MOST_BYTES = 2**27  # of a CSV file


@dataclass(frozen=True)
class Table:
    """A CSV file: its columns, and the cells of each line by its number; missing cells are empty."""

    path: Path
    columns: list[str]
    rows: list[tuple[int, list[str]]]

    def column(self, names: Sequence[str]) -> int | None:
        """The first of the columns `names` that the table has, whatever their case. Raises `InputError` for two."""
        lower = [column.lower() for column in self.columns]
        name = next((name.lower() for name in names if name.lower() in lower), None)
        if name is None:
            return None
        if lower.count(name) > 1:
            raise InputError(f"{self.path}, line 1: there are two columns {name}: remove or rename one")
        return lower.index(name)

    def needed(self, name: str) -> int:
        """The column `name`. Raises `InputError` if there is none."""
        if (index := self.column([name])) is None:
            raise InputError(f"{self.path}, line 1: there is no column {name}, but {listed(self.columns)}")
        return index

    def where(self, number: int) -> str:
        """A line, for a message."""
        return f"{self.path}, line {number}"


def read_table(path: Path) -> Table:
    """Read a CSV file. Raises `InputError` if it is none."""
    try:
        with open_regular(path) as binary:
            if os.fstat(binary.fileno()).st_size > MOST_BYTES:
                raise InputError(f"{path} has over {MOST_BYTES >> 20} MiB: it is no table of a task")
            file = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, cells + [""] * (len(header) - len(cells))) for cells in reader if cells]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV file in UTF-8 ({error})") from error
    return Table(path, header, rows)


def fold_files(frames: Path) -> dict[tuple[str, int], Path]:
    """The fold files in a folder, by split and fold; none if nothing is named like one."""
    found: dict[tuple[str, int], list[Path]] = {}
    for path in sorted(frames.iterdir()):
        if (match := FOLD_FILE.search(path.name)) and os.path.isfile(path):
            found.setdefault((match[1], int(match[2])), []).append(path)
    if not found:
        return {}
    files = {}
    for fold in range(1, max(fold for _, fold in found) + 1):
        for split in SPLITS:
            paths = found.pop((split, fold), [])
            if len(paths) != 1:
                names = " and ".join(path.name for path in paths) or "none"
                raise InputError(f"{frames} must have one file *{split}_fold{fold}.csv, found {names}")
            files[split, fold] = paths[0]
    if found:
        raise InputError(f"{min(found.values())[0]} is of fold 0: folds are counted from 1")
    return files


def split_files(frames: Path) -> dict[tuple[str, int], Path]:
    """The files of one split in a folder; that for validation may be missing."""
    files: dict[tuple[str, int], Path] = {}
    for path in sorted(frames.iterdir()):
        if (match := SPLIT_FILE.search(path.name)) and os.path.isfile(path):
            other = files.setdefault((SPLIT_NAMES[match[1]], 1), path)
            if other != path:
                raise InputError(f"{frames} has both {other.name} and {path.name}: move one away")
    for split in ("train", "test"):
        if (split, 1) not in files:
            raise InputError(
                f"{frames} must have fold files *train_fold1.csv, *val_fold1.csv, …, or one file *{split}.csv"
            )
    return files
