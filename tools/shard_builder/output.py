"""Where a shard set is put: what may lie there already, and how the finished set takes its place.

`place` is the folder's real path, `out` is how the user calls it. A build works in `.NAME.building` beside it, where
finished work outlives a killed build; the set that it replaces is `.NAME.replaced` for the moment of the swap.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shard_builder.atomic import sync_folder
from shard_builder.manifest import NAME, Manifest
from shard_builder.scan import as_text
from shard_builder.settings import InputError

if sys.platform != "win32":
    import fcntl

PART = r"(\.[0-9a-f]+)?\.part"
IN_SET = re.compile(rf"(manifest\.json|report\.html|shard-\d{{6,}}\.(tar|idx))({PART})?")
IN_WORK = re.compile(rf"lock|((spool|set|done)-[0-9a-f-]+)({PART})?")


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}")


def _foreign(folder: Path, ours: re.Pattern[str]) -> list[str]:
    """The names in `folder` that no build writes: such a folder is never removed."""
    return sorted(name for name in os.listdir(folder) if not ours.fullmatch(name))


def recover(place: Path) -> None:
    """Put right what a build that was killed at its very end has left: for the build that holds the lock."""
    aside = _beside(place, "replaced")
    if aside.exists():
        if place.exists():
            _remove_set(aside)
        else:
            os.replace(aside, place)


def _remove_set(folder: Path) -> None:
    if folder.exists() and not _foreign(folder, IN_SET):
        shutil.rmtree(folder)


def check_place(place: Path, out: Path, overwrite: bool) -> None:
    """Refuse, before any work, an output that can be neither left alone nor replaced."""
    if not place.exists():
        return
    if not place.is_dir():
        raise InputError(f"{out} is a file: name a folder with `out`")
    if os.path.ismount(place):
        raise InputError(f"{out} is a mount point, which no folder can replace: name one within it with `out`")
    if not os.listdir(place):
        return
    if foreign := _foreign(place, IN_SET):
        raise InputError(
            f"{out} holds {as_text(foreign[0])}, which is no part of a shard set: choose another `out`"
        )
    if not overwrite:
        try:
            Manifest.load(place).check_files(place)
        except InputError as error:
            raise InputError(
                f"{out} holds a damaged shard set: replace it with `overwrite=True` ({error})"
            ) from None


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
        f"{out} holds a shard set of another {other}: replace it with `overwrite=True`, or choose another `out`"
    )


@contextmanager
def building(place: Path, out: Path) -> Iterator[Path]:
    """A folder beside `place` to work in, for this process alone.

    It is removed once the work is done. On an error it stays, unless it is empty: what is finished in it belongs to
    the next build, and nothing else in it is ever read.
    """
    folder = _beside(place, "building")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock", out):
        try:
            if foreign := _foreign(folder, IN_WORK):
                raise InputError(
                    f"{folder} holds {as_text(foreign[0])}, which is no part of a build: move it away"
                )
            yield folder
            shutil.rmtree(folder)
        except BaseException:
            with suppress(OSError):
                (folder / "lock").unlink(missing_ok=True)
                folder.rmdir()
            raise


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    try:
        # To be written to: NFS locks no other files.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # its owner has finished, and removed the folder
        raise _another(out) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have finished, and removed it, since it was opened.
            mine = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            mine = False
        except OSError:
            mine = True  # the file system has no locks
        if not mine:
            raise _another(out)
        yield
    finally:
        os.close(descriptor)


def _another(out: Path) -> InputError:
    return InputError(f"another build is writing {out}: wait until it is done, or choose another `out`")


def put_in_place(folder: Path, place: Path) -> None:
    """Let the finished set `folder` become `place`, in the stead of what is there."""
    aside = _beside(place, "replaced")
    if place.exists():
        _remove_set(aside)
        os.replace(place, aside)
    try:
        os.replace(folder, place)
    except BaseException:
        if aside.exists():
            os.replace(aside, place)
        raise
    sync_folder(place.parent)
    _remove_set(aside)
