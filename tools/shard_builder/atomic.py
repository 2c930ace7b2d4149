"""Write beside, then rename: nobody ever sees half a file or half a folder."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

UNFINISHED = r"(\.[0-9a-f]{8}\.part)"
"""Regular expression of what follows a file's or folder's name while it is being written."""


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` once it is complete. On an error `path` stays as it was.

    A durable file is on the disk before it gets its name, so that not even a power cut leaves half of it. Missing
    parent folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with open(beside, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` once it is complete. On an error nothing is left.

    `path` must be missing or an empty folder; missing parent folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.mkdir()
    try:
        yield beside
        if os.name != "posix" and path.is_dir():
            path.rmdir()  # elsewhere a rename replaces no folder
        os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _beside(path: Path) -> Path:
    # A name of its own: the last worker of a killed build may still be writing the same file.
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk, so that a rename outlives a power cut."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
