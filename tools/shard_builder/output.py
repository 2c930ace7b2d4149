"""Where a shard set is put: what may lie there already, and how the finished set takes its place.

`place` is the folder's real path, `out` is how the user calls it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shard_builder.atomic import sync_folder
from shard_builder.manifest import NAME, Manifest
from shard_builder.scan import as_text
from shard_builder.settings import InputError

if sys.platform != "win32":
    import fcntl

OURS = re.compile(r"(manifest\.json|shard-\d{6,}\.(tar|idx)|spool-\d{6,})(\.part)?")


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}")


def _foreign(folder: Path) -> list[str]:
    """The names in `folder` that no build writes: such a folder is never removed."""
    return sorted(name for name in os.listdir(folder) if not OURS.fullmatch(name))


def _remove(folder: Path) -> None:
    if folder.exists() and not _foreign(folder):
        shutil.rmtree(folder)


def recover(place: Path) -> None:
    """Put back the set that a killed build had moved aside."""
    aside = _beside(place, "replaced")
    if aside.exists() and not place.exists():
        os.replace(aside, place)


def check_place(place: Path, out: Path, overwrite: bool) -> None:
    """Refuse, before any work, an output that can be neither left alone nor replaced."""
    if not place.exists() or (place.is_dir() and not os.listdir(place)):
        return
    if not place.is_dir():
        raise InputError(f"{out} is a file: name a folder with --out")
    if foreign := _foreign(place):
        raise InputError(
            f"{out} holds {as_text(foreign[0])}, which is no part of a shard set: name another --out"
        )
    if not overwrite:
        try:
            Manifest.load(place).check_files(place)
        except InputError as error:
            raise InputError(f"{out} holds a damaged shard set: replace it with --overwrite ({error})") from None


def existing_set(place: Path, out: Path, recorded: Mapping[str, Any]) -> Manifest | None:
    """The finished set at `place`, if it is of these options; `InputError` if it is of others."""
    if not (place / NAME).exists():
        return None
    existing = Manifest.load(place)
    if existing.options == recorded:
        return existing
    # The source comes last: its digest is of the chosen images, so another seed changes it too.
    names = sorted([*recorded, *existing.options], key=lambda name: name == "source")
    name = next(name for name in names if existing.options.get(name) != recorded.get(name))
    other = "source" if name == "source" else f"{name}: {existing.options.get(name)}, not {recorded.get(name)}"
    raise InputError(
        f"{out} holds a shard set of another {other}: replace it with --overwrite, or name another --out"
    )


@contextmanager
def building(place: Path, out: Path) -> Iterator[Path]:
    """A folder beside `place` to build in, for this process alone; it is removed if the build fails."""
    folder = _beside(place, "building")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, out):
        if foreign := _foreign(folder):
            raise InputError(f"{folder} holds {as_text(foreign[0])}, which is no part of a build: move it away")
        for name in os.listdir(folder):  # of a build that was killed
            (folder / name).unlink()
        try:
            yield folder
        except BaseException:
            _remove(folder)
            raise


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have finished, and moved it away, since it was opened.
            mine = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        except BlockingIOError:
            mine = False
        if not mine:
            raise InputError(f"another build is writing {out}: wait until it is done, or name another --out")
        yield
    finally:
        os.close(descriptor)


def put_in_place(folder: Path, place: Path) -> None:
    aside = _beside(place, "replaced")
    if place.exists():
        _remove(aside)
        os.replace(place, aside)
    try:
        os.replace(folder, place)
    except BaseException:
        if aside.exists():
            os.replace(aside, place)
        raise
    sync_folder(place.parent)
    _remove(aside)
