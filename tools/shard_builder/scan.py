"""Find the images of a source and what their folders say of them, and choose those to pack."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shard_builder.labels import RADIMAGENET_US
from shard_builder.manifest import Rejected
from shard_builder.settings import InputError, Report, silent

SUFFIXES = (".png", ".jpg", ".jpeg")
LAYOUT = "expected MODALITY/anatomy/class/*.png or .jpg, or RadImageNet's US/class/*.png"


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a source: its path within it, with forward slashes, its label fields and its class."""

    source: str
    fields: Mapping[str, str]
    category: str


@dataclass(frozen=True)
class Scan:
    """What a source holds: the form of the source, the label fields in bit order, its images, and the misfits."""

    form: str
    fields: tuple[str, ...]
    entries: list[Entry]
    rejected: list[Rejected]


def scan_tree(
    source: Path,
    *,
    anatomy: Mapping[str, str] | None = None,
    skip_unknown: bool = False,
    report: Report = silent,
) -> Scan:
    """Find the images of a tree of folders `MODALITY/anatomy/class`; hidden files and other types are ignored.

    A folder `MODALITY/class` has no anatomy level: its anatomy is taken from `anatomy` (path to value), else from
    RadImageNet's ultrasound classes. Raises `InputError` where it is in neither (`skip_unknown` rejects its
    images instead), and where the source is no such tree.
    """
    anatomy = anatomy or {}
    if not source.is_dir():
        raise InputError(f"{source} {'is no folder' if source.exists() else 'does not exist'}: {LAYOUT}")
    found, rejected, others = _walk(source, report)
    depths = Counter(dict.fromkeys((2, 3), 0))
    for parts, names in found.items():
        depths[len(parts)] += len(names)
    fitting, total = depths[2] + depths[3], depths.total()
    if not total:
        raise InputError(f"no images in {source}, but {others} other files: {LAYOUT}")
    if fitting <= total / 2:
        example = next((*parts, min(names)) for parts, names in sorted(found.items()) if len(parts) not in (2, 3))
        raise InputError(
            f"{total - fitting:,} of {total:,} images in {source} lie at another depth, such as "
            f"{as_text('/'.join(example))}: {LAYOUT} (pass the folder that holds the modalities' folders)"
        )
    for path in sorted(set(anatomy) - {"/".join(parts) for parts in found if len(parts) == 2}):
        raise InputError(f"--anatomy {path}={anatomy[path]}: there are no images right in {source / path}")
    folders = sum(len(parts) in (2, 3) for parts in found)
    entries: list[Entry] = []
    unknown: dict[str, int] = {}
    for parts, names in sorted(found.items()):
        path, reason = "/".join(parts), ""
        fields: dict[str, str] = {}
        if len(parts) == 3:
            fields = {"modality": as_text(parts[0]), "anatomy": as_text(parts[1])}
        elif len(parts) == 2:
            known = anatomy.get(path) or (RADIMAGENET_US.get(parts[1]) if parts[0] == "US" else None)
            if known:
                fields = {"modality": as_text(parts[0]), "anatomy": known}
            else:
                unknown[path] = len(names)
                reason = "its folder names no anatomy"
        else:
            reason = "not at MODALITY/anatomy/class"
        if fields:
            category = "/".join([*fields.values(), as_text(parts[-1])])
            entries += [Entry(f"{path}/{name}", fields, category) for name in sorted(names)]
        else:
            rejected += [Rejected(as_text("/".join([*parts, name])), reason) for name in sorted(names)]
    if unknown and not skip_unknown:
        first = as_text(next(iter(unknown)))
        raise InputError(
            f"{first} names no anatomy and is no RadImageNet class: give it one with --anatomy {first}=abd, or "
            f"pass --skip-unknown ({len(unknown)} of {folders} folders, {sum(unknown.values()):,} images)"
        )
    rejected.sort(key=lambda each: each.source)
    return Scan("tree", ("modality", "anatomy"), entries, rejected)


def choose(entries: Iterable[Entry], *, per_class: int, seed: int) -> list[Entry]:
    """At most `per_class` images of each class (0: all), in the shuffled order in which they will be stored.

    An image's ranks are hashes of the seed, its class and its file name. So the choice within a class depends
    neither on the file system nor on the other classes, and is the same for a re-arranged tree.
    """

    def order(purpose: str, entry: Entry) -> tuple[bytes, str]:
        name = entry.source.rpartition("/")[2]
        # The purpose is part of it, else the classes with most images would come first in the storage order.
        key = f"{purpose} {seed} {entry.category}/".encode() + os.fsencode(name)
        return hashlib.sha256(key).digest(), entry.source

    classes = defaultdict(list)
    for entry in entries:
        classes[entry.category].append(entry)
    chosen = [
        entry
        for members in classes.values()
        for entry in sorted(members, key=lambda each: order("sample", each))[: per_class or None]
    ]
    return sorted(chosen, key=lambda each: order("shuffle", each))


def as_text(name: str) -> str:
    """A file or folder name as printable text: what is not UTF-8, or no printable character, is escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _walk(source: Path, report: Report) -> tuple[dict[tuple[str, ...], list[str]], list[Rejected], int]:
    """The image names in each folder, by its path's parts; what cannot be read; a count of other files."""
    found: dict[tuple[str, ...], list[str]] = {}
    rejected, visited, images, others = [], 0, 0, 0
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
            elif not each.name.lower().endswith(SUFFIXES):
                others += 1
            elif is_file:
                names.append(each.name)
            else:
                rejected.append(Rejected(as_text("/".join([*parts, each.name])), "not a file"))
        if names:
            found[parts] = names
        visited, images = visited + 1, images + len(names)
        report("scanning", visited, visited + len(waiting), f"{images:,} images")
    return found, rejected, others
