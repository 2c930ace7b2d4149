"""Trees of images: list the files of a source folder, and read labels from folders MODALITY/anatomy/class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shard_builder.entries import Entry, Scan, ValueMap, as_text, class_of, mapped
from shard_builder.labels import RADIMAGENET_US
from shard_builder.manifest import Rejected
from shard_builder.settings import InputError, Progress, no_progress

SUFFIXES = (".png", ".jpg", ".jpeg")
OTHER_SUFFIXES = (".bmp", ".gif", ".jp2", ".tif", ".tiff", ".webp")
"""Images of other types. A tree lists them as rejected and ignores all other files."""

LAYOUT = (
    "expected MODALITY/anatomy/class/*.png or .jpg, RadImageNet's US/class/*.png, DICOM files, or a CSV table"
)
NO_ANATOMY = "its folder names no anatomy"

Folder = tuple[str, ...]
"""A folder's path within the source, as its components; empty for the source itself."""


@dataclass(frozen=True)
class Files:
    """The files of a source.

    `found` maps each folder to the names of its files; `broken` are paths that are neither file nor folder, such as
    dead links; `rejected` are folders that were not listed.
    """

    found: dict[Folder, list[str]]
    broken: list[str]
    rejected: list[Rejected]

    def paths(self) -> Iterator[str]:
        """The paths of all files found, sorted."""
        for folder, names in sorted(self.found.items()):
            for name in sorted(names):
                yield "/".join([*folder, name])


def walk(source: Path, progress: Progress = no_progress) -> Files:
    """List all files below the folder `source` except hidden ones; raises `InputError` if it is no folder."""
    if not source.is_dir():
        raise InputError(f"{source} {'is no folder' if source.exists() else 'does not exist'}: {LAYOUT}")
    found: dict[Folder, list[str]] = {}
    broken: list[str] = []
    rejected: list[Rejected] = []
    visited, count = 0, 0
    waiting: list[tuple[Folder, frozenset[tuple[int, int]]]] = [((), frozenset())]
    while waiting:
        folder, above = waiting.pop()
        path = "/".join(folder)
        try:
            state = (source / path).stat()
            if (state.st_dev, state.st_ino) in above:
                rejected.append(Rejected(as_text(path), "a link back to a folder that it lies in"))
                continue
            with os.scandir(source / path) as scanned:
                inside = list(scanned)
        except OSError as error:
            if not folder:
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
            # Links below the class level are not followed: links among siblings give countless paths.
            if is_folder and not (len(folder) >= 3 and each.is_symlink()):
                waiting.append(((*folder, each.name), above))
            elif is_folder:
                rejected.append(Rejected(as_text(f"{path}/{each.name}"), "a link below MODALITY/anatomy/class"))
            elif is_file:
                names.append(each.name)
            else:
                broken.append("/".join([*folder, each.name]))
        if names:
            found[folder] = names
        visited, count = visited + 1, count + len(names)
        progress("scanning", visited, visited + len(waiting), f"{count:,} files")
    return Files(found, broken, rejected)


def scan_tree(
    source: Path,
    files: Files | None = None,
    *,
    anatomy: Mapping[str, str] | None = None,
    value_map: ValueMap | None = None,
    skip_unknown: bool = False,
    progress: Progress = no_progress,
) -> Scan:
    """Find the PNG and JPEG images of a tree of folders `MODALITY/anatomy/class`, and reject images of other types.

    `files` are those of `source`, if they have been listed already. For `anatomy` and `value_map` see
    `folder_labels`. Raises `InputError` if a folder names no anatomy (`skip_unknown` rejects its images instead), or
    if most images are at another depth.
    """
    anatomy = anatomy or {}
    files = files or walk(source, progress)
    images = {folder: sorted(filter(is_image, names)) for folder, names in files.found.items()}
    images = {folder: names for folder, names in sorted(images.items()) if names}
    _check_depths(source, files, images)
    for path in sorted(set(anatomy) - {"/".join(folder) for folder in images if len(folder) == 2}):
        raise InputError(f"`anatomy={path}={anatomy[path]}`: there are no images directly in {source / path}")

    rejected = files.rejected + [Rejected(as_text(path), "not a file") for path in filter(is_image, files.broken)]
    rejected += [
        Rejected(as_text(path), "not a PNG or JPEG image: convert it")
        for path in files.paths()
        if path.lower().endswith(OTHER_SUFFIXES)
    ]
    entries: list[Entry] = []
    unknown: dict[str, int] = {}
    for folder, names in images.items():
        paths = ["/".join([*folder, name]) for name in names]
        if labels := folder_labels(folder, anatomy, value_map or {}):
            entries += [Entry(path, *labels) for path in paths]
            continue
        reason = "not at MODALITY/anatomy/class"
        if len(folder) == 2:
            unknown["/".join(folder)] = len(names)
            reason = NO_ANATOMY
        rejected += [Rejected(as_text(path), reason) for path in paths]
    if unknown and not skip_unknown:
        first = as_text(next(iter(unknown)))
        folders = sum(map(_fits, images))
        raise InputError(
            f"{first} names no anatomy and is no RadImageNet class: name it with `anatomy={first}=abd`, or pass "
            f"`skip_unknown=True` ({len(unknown)} of {folders} folders, {sum(unknown.values()):,} images)"
        )
    rejected.sort(key=lambda each: each.source)
    return Scan("tree", ("modality", "anatomy"), entries, rejected, source)


def _fits(folder: Folder) -> bool:
    """Whether a folder has the depth of MODALITY/anatomy/class or MODALITY/class."""
    return len(folder) in (2, 3)


def _check_depths(source: Path, files: Files, images: Mapping[Folder, list[str]]) -> None:
    """Raise `InputError` if there are no images, or if half of them or more are at another depth."""
    total = sum(map(len, images.values()))
    if not total:
        others = sum(map(len, files.found.values()))
        raise InputError(f"no images in {source}, but {others} other files: {LAYOUT}")
    misplaced = {folder: names for folder, names in images.items() if not _fits(folder)}
    count = sum(map(len, misplaced.values()))
    if 2 * count >= total:
        folder, names = next(iter(misplaced.items()))
        example = as_text("/".join([*folder, names[0]]))
        raise InputError(
            f"{count:,} of {total:,} images in {source} lie at another depth, such as {example}: {LAYOUT} (pass the "
            "folder that holds the modalities' folders)"
        )


def is_image(name: str) -> bool:
    """Whether a file's name ends like that of a PNG or JPEG file."""
    return name.lower().endswith(SUFFIXES)


def folder_labels(
    folder: Folder, anatomy: Mapping[str, str], value_map: ValueMap
) -> tuple[dict[str, str], str] | None:
    """The fields and the class that a folder's path names, `MODALITY/anatomy/class`; None if it names neither.

    For `MODALITY/class` the anatomy is that of `anatomy` (path to value), else of RadImageNet's ultrasound classes.
    Fields get the new values of `value_map`.
    """
    if not _fits(folder):
        return None
    if len(folder) == 3:
        modality, region, name = folder
    else:
        modality, name = folder
        region = anatomy.get("/".join(folder)) or (RADIMAGENET_US.get(name, "") if modality == "US" else "")
    if not region:
        return None
    fields = mapped({"modality": as_text(modality), "anatomy": as_text(region)}, value_map)
    return fields, f"{class_of(fields, ('modality', 'anatomy'))}/{as_text(name)}"
