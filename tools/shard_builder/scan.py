"""Find the images of a folder and what their folders say of them, and choose those to pack."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shard_builder.labels import RADIMAGENET_US
from shard_builder.manifest import Rejected
from shard_builder.settings import InputError, Progress, no_progress

SUFFIXES = (".png", ".jpg", ".jpeg")
OTHER_SUFFIXES = (".bmp", ".gif", ".jp2", ".tif", ".tiff", ".webp")
"""Of images that are no PNG or JPEG files: in a tree they are listed, other files are ignored."""

LAYOUT = (
    "expected MODALITY/anatomy/class/*.png or .jpg, RadImageNet's US/class/*.png, DICOM files, or a CSV table"
)
NO_ANATOMY = "its folder names no anatomy"

Names = Mapping[tuple[str, str], str]
"""New names of values: (field, value) to value."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source: what the set calls it, its label fields, its class, and where it is read.

    `source` is the path within the source, with forward slashes, or a hash of it, and then `path` is the path.
    `frame` counts in a DICOM file; PNG and JPEG files have none.
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
    """What a source holds: its form, the label fields in bit order, its images, and the misfits.

    Paths count from the folder `root`. `unknown` counts the header texts of each field that are in no vocabulary.
    """

    form: str
    fields: tuple[str, ...]
    entries: list[Entry]
    rejected: list[Rejected]
    root: Path
    unknown: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """The files in a folder: their names by the parts of their folder's path, and what is no file or unreadable."""

    found: dict[tuple[str, ...], list[str]]
    broken: list[str]
    rejected: list[Rejected]


def scan_tree(
    source: Path,
    files: Files | None = None,
    *,
    anatomy: Mapping[str, str] | None = None,
    names: Names | None = None,
    skip_unknown: bool = False,
    progress: Progress = no_progress,
) -> Scan:
    """Find the images of a tree of folders `MODALITY/anatomy/class`; hidden files and other types are ignored, but for
    images of other types, which are rejected.

    `files` are those of `source`, if they were listed before. For `anatomy` and `names` see `folder_labels`.
    Raises `InputError` where a folder names no anatomy (`skip_unknown` rejects its images instead), and where the
    source is no such tree.
    """
    anatomy = anatomy or {}
    files = files or walk(source, progress)
    images = {parts: list(filter(is_image, names)) for parts, names in files.found.items()}
    found = {parts: names for parts, names in images.items() if names}
    rejected = files.rejected + [Rejected(as_text(path), "not a file") for path in filter(is_image, files.broken)]
    rejected += [
        Rejected(as_text("/".join([*parts, name])), "not a PNG or JPEG image: convert it")
        for parts, inside in files.found.items()
        for name in inside
        if name.lower().endswith(OTHER_SUFFIXES)
    ]
    depths = Counter(dict.fromkeys((2, 3), 0))
    for parts, inside in found.items():
        depths[len(parts)] += len(inside)
    fitting, total = depths[2] + depths[3], depths.total()
    if not total:
        others = sum(map(len, files.found.values()))
        raise InputError(f"no images in {source}, but {others} other files: {LAYOUT}")
    if fitting <= total / 2:
        example = next(
            (*parts, min(inside)) for parts, inside in sorted(found.items()) if len(parts) not in (2, 3)
        )
        raise InputError(
            f"{total - fitting:,} of {total:,} images in {source} lie at another depth, such as "
            f"{as_text('/'.join(example))}: {LAYOUT} (pass the folder that holds the modalities' folders)"
        )
    for path in sorted(set(anatomy) - {"/".join(parts) for parts in found if len(parts) == 2}):
        raise InputError(f"`anatomy={path}={anatomy[path]}`: there are no images right in {source / path}")
    folders = sum(len(parts) in (2, 3) for parts in found)
    entries: list[Entry] = []
    unknown: dict[str, int] = {}
    for parts, inside in sorted(found.items()):
        path = "/".join(parts)
        if labels := folder_labels(parts, anatomy, names or {}):
            entries += [Entry(f"{path}/{name}", *labels) for name in sorted(inside)]
            continue
        reason = "not at MODALITY/anatomy/class"
        if len(parts) == 2:
            unknown[path] = len(inside)
            reason = NO_ANATOMY
        rejected += [Rejected(as_text("/".join([*parts, name])), reason) for name in sorted(inside)]
    if unknown and not skip_unknown:
        first = as_text(next(iter(unknown)))
        raise InputError(
            f"{first} names no anatomy and is no RadImageNet class: give it one with `anatomy={first}=abd`, or "
            f"pass `skip_unknown=True` ({len(unknown)} of {folders} folders, {sum(unknown.values()):,} images)"
        )
    rejected.sort(key=lambda each: each.source)
    return Scan("tree", ("modality", "anatomy"), entries, rejected, source)


def is_image(name: str) -> bool:
    """Whether a file's name says PNG or JPEG."""
    return name.lower().endswith(SUFFIXES)


def folder_labels(
    parts: Sequence[str], anatomy: Mapping[str, str], names: Names
) -> tuple[dict[str, str], str] | None:
    """The fields and the class that a folder's path says, `MODALITY/anatomy/class`; none where it says neither.

    A path `MODALITY/class` has no anatomy level: its anatomy is taken from `anatomy` (path to value), else from
    RadImageNet's ultrasound classes.
    """
    if len(parts) == 3:
        modality, region, _ = parts
    elif len(parts) == 2:
        modality, name = parts
        region = anatomy.get("/".join(parts)) or (RADIMAGENET_US.get(name, "") if modality == "US" else "")
    else:
        return None
    if not region:
        return None
    fields = renamed({"modality": as_text(modality), "anatomy": as_text(region)}, names)
    return fields, f"{class_of(fields, ('modality', 'anatomy'))}/{as_text(parts[-1])}"


def renamed(fields: Mapping[str, str], names: Names) -> dict[str, str]:
    """`fields` with the values that `names` gives them; an empty one is no value."""
    named = {field: names.get((field, value), value) for field, value in fields.items()}
    return {field: value for field, value in named.items() if value}


def class_of(fields: Mapping[str, str], order: Iterable[str]) -> str:
    """The class of an image that has no other: its field values, joined."""
    return "/".join(fields.get(name, "unknown") for name in order)


def choose(entries: Iterable[Entry], *, per_class: int, seed: int) -> list[Entry]:
    """At most `per_class` images of each class (0: all), in the shuffled order in which they will be stored.

    An image's ranks are hashes of the seed, its class and its file name, or its path where a class has equal names.
    So the choice within a class depends neither on the file system nor on the other classes, and is the same for a
    re-arranged tree.
    """

    def rank(purpose: str, category: str, name: str) -> bytes:
        # The purpose is part of it, else the classes with most images would come first in the storage order.
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
    """A file or folder name as printable text: what is not UTF-8, or no printable character, is escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def walk(source: Path, progress: Progress = no_progress) -> Files:
    """All files below the folder `source` but hidden ones; raises `InputError` where it is none."""
    if not source.is_dir():
        raise InputError(f"{source} {'is no folder' if source.exists() else 'does not exist'}: {LAYOUT}")
    found: dict[tuple[str, ...], list[str]] = {}
    broken: list[str] = []
    rejected: list[Rejected] = []
    visited, count = 0, 0
    waiting: list[tuple[tuple[str, ...], frozenset[tuple[int, int]]]] = [((), frozenset())]
    while waiting:
        parts, above = waiting.pop()
        folder, path = source.joinpath(*parts), "/".join(parts)
        try:
            state = folder.stat()
            if (state.st_dev, state.st_ino) in above:
                rejected.append(Rejected(as_text(path), "a link back to a folder that it lies in"))
                continue
            with os.scandir(folder) as scanned:
                inside = list(scanned)
        except OSError as error:
            if not parts:
                raise InputError(f"{source} cannot be read: {error.strerror}") from None
            rejected.append(Rejected(as_text(path), f"cannot be read: {error.strerror}"))
            continue
        above |= {(state.st_dev, state.st_ino)}
        names = []
        for each in inside:
            if each.name.startswith("."):
                continue
            try:
                is_folder, is_file = each.is_dir(), each.is_file()
            except OSError:  # a link to itself
                is_folder = is_file = False
            # Links below the class level are not followed: links among siblings have paths without number.
            if is_folder and not (len(parts) >= 3 and each.is_symlink()):
                waiting.append(((*parts, each.name), above))
            elif is_folder:
                rejected.append(Rejected(as_text(f"{path}/{each.name}"), "a link below MODALITY/anatomy/class"))
            elif is_file:
                names.append(each.name)
            else:
                broken.append("/".join([*parts, each.name]))
        if names:
            found[parts] = names
        visited, count = visited + 1, count + len(names)
        progress("scanning", visited, visited + len(waiting), f"{count:,} files")
    return Files(found, broken, rejected)
