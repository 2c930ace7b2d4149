"""`Entry`, an image of a source with its labels; `Scan`, all that a source holds; and the random choice per class."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shard_builder.manifest import Rejected

ValueMap = Mapping[tuple[str, str], str]
"""New label values: (field, old value) to new value. An empty new value removes the label."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source: its name in the shard set, its label fields, its class, and its file.

    `source` is the image's path within the source folder, with forward slashes; for a DICOM file it is a hash, and
    `path` is the path. `frame` counts from 0 within a DICOM file; it is None for PNG and JPEG files.
    """

    source: str
    fields: Mapping[str, str]
    category: str
    path: str = ""
    frame: int | None = None

    @property
    def file(self) -> str:
        """Path of the image's file within the source."""
        return self.path or self.source


@dataclass(frozen=True)
class Scan:
    """What a source holds: its form, the label fields in bit order, its images, and what was rejected.

    `form` is tree, table or dicom. Paths are relative to the folder `root`. `unknown` counts, by field, the headers
    whose text is in no vocabulary. `hidden` maps the hashes of rejected DICOM files to their paths.
    """

    form: str
    fields: tuple[str, ...]
    entries: list[Entry]
    rejected: list[Rejected]
    root: Path
    unknown: Mapping[str, int] = field(default_factory=dict)
    hidden: Mapping[str, str] = field(default_factory=dict)


def mapped(fields: Mapping[str, str], value_map: ValueMap) -> dict[str, str]:
    """`fields` with the new values of `value_map`."""
    values = {field: value_map.get((field, value), value) for field, value in fields.items()}
    return {field: value for field, value in values.items() if value}


def class_of(fields: Mapping[str, str], order: Iterable[str]) -> str:
    """The class of an image whose source names none: its field values, joined."""
    return "/".join(fields.get(name, "unknown") for name in order)


def choose(entries: Iterable[Entry], *, per_class: int, seed: int) -> list[Entry]:
    """At most `per_class` random images of each class (0: all), in the shuffled order in which they are stored.

    Images are ranked by hashes of the seed, the class and the file name, or the path if a class repeats file names.
    So the choice within a class depends on neither the file system nor the other classes, and a rearranged tree
    gives the same one.
    """

    def rank(purpose: str, category: str, name: str) -> bytes:
        # Without the purpose, the classes with most images would come first in the storage order.
        return hashlib.sha256(f"{purpose} {seed} {category}/".encode() + os.fsencode(name)).digest()

    classes = defaultdict(list)
    for entry in entries:
        classes[entry.category].append(entry)
    chosen: list[tuple[bytes, str, Entry]] = []
    for category, members in classes.items():
        names = [entry.source.rpartition("/")[2] for entry in members]
        if len(set(names)) < len(names):  # such as view1.png of each patient
            names = [entry.source for entry in members]
        ranked = [
            (rank("sample", category, name), entry.source, name, entry)
            for name, entry in zip(names, members, strict=True)
        ]
        ranked.sort(key=lambda each: each[:2])
        chosen += [
            (rank("shuffle", category, name), source, entry)
            for _, source, name, entry in ranked[: per_class or None]
        ]
    return [entry for *_, entry in sorted(chosen, key=lambda each: each[:2])]


def as_text(name: str) -> str:
    """A file or folder name as printable text; bytes that are not UTF-8 and unprintable characters are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
