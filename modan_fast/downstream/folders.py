"""Tasks that are folders of images: one for each class, or such folders within `train`, `val` and `test`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from modan_fast.downstream.classes import decide
from modan_fast.downstream.listing import (
    SPLIT_NAMES,
    Choices,
    ImagesBySplit,
    Listing,
    find_patients,
    refuse_columns,
)
from shard_builder.settings import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
MASK = re.compile(r"_mask(_\d+)?$")  # BUSI has the outline of a lesion beside its image


def read_folders(folder: Path, choices: Choices) -> tuple[Listing, ImagesBySplit]:
    """List the images in class folders: of the task, or of its folders `train`, `test` and perhaps `val`.

    Masks are left out. Raises `InputError` for anything else.
    """
    if not folder.is_dir():
        raise InputError(f"no task at {folder}: name a folder, a CSV file or a .npz file with `task`")
    inside = subfolders(folder)
    splits = {SPLIT_NAMES[path.name.lower()]: path for path in inside if path.name.lower() in SPLIT_NAMES}
    if "train" not in splits:
        listing = _listing(folder, {"": inside}, choices)
        return listing, {}
    names = [path.name for path in inside]
    if "test" not in splits or len(splits) < len(names):
        raise InputError(
            f"{folder} has the folders {', '.join(sorted(names)[:5])}: a task of one split has train, test and, if "
            "there is one, val, and nothing else: rename or move the others"
        )
    listing = _listing(folder, {path.name: subfolders(path) for path in splits.values()}, choices)
    listing.places = {(split, 1): str(path) for split, path in splits.items()}
    images: ImagesBySplit = {(split, 1): [] for split in splits}
    by_name = {path.name: split for split, path in splits.items()}
    for image in listing.labels:
        images[by_name[image.split("/")[0]], 1].append(image)
    return listing, images


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden. Raises `InputError` for a link that leads around it."""
    found = sorted(path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
    for path in found:
        if path.resolve() in (whole := folder.resolve(), *whole.parents):
            raise InputError(f"{path} is a link to a folder around it: replace it by a folder of images")
    return found


def _listing(folder: Path, classes: dict[str, list[Path]], choices: Choices) -> Listing:
    """The images in the class folders of each part of the task: of itself (""), or of a split's folder."""
    refuse_columns(choices, f"{folder}, which has class folders,")
    found = {path.name: str(path) for paths in classes.values() for path in paths}
    if len(found) < 2:
        shown = f"{len(found)} folders ({', '.join(found)})" if found else "none"
        if table := next((path for path in sorted(folder.iterdir()) if path.suffix in (".csv", ".npz")), None):
            shown += f"; name {table} itself, if it is the task"
        raise InputError(
            f"{folder} is no task: it needs a folder dataframe with fold files, or two class folders, and has {shown}"
        )
    decided = decide(found, str(folder), positive=choices.positive, words=choices.words, folders=True)
    listing = Listing(folder, decided.kind, decided.names)
    for name, label in sorted(decided.labels.items(), reverse=True):
        listing.class_places[label] = f"{folder}/{name}"
    names = {path for paths in classes.values() for path in paths}
    for path in sorted(folder.glob("*/**/*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(path) and not MASK.search(path.stem):
            image = path.relative_to(folder).as_posix()
            if not image.isprintable() or image != image.encode(errors="replace").decode():
                raise InputError(f"{folder}: {image!a} is no name that a fold file can hold: rename it")
            parts = image.split("/")
            own = folder.joinpath(*parts[: 1 if "" in classes else 2])
            if own in names and own != path:
                listing.labels[image] = decided.labels[own.name]
                listing.sources[image] = str(folder)
    find_patients(listing, choices.group)
    return listing
