"""Write beside, then rename: nobody ever sees half a file or half a folder."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from shard_builder.settings import InputError

UNFINISHED = r"((\.[0-9a-f]{8})?\.part)"
"""Regular expression of what follows a file's or folder's name while it is being written.

The first versions wrote no hexadecimal token.
"""


OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` once it is complete. On an error `path` stays as it was.

    A durable file is on the disk before it gets its name, so not even a power cut leaves half of it. Missing parent
    folders are made. Raises `OSError`, with the file's name, if it cannot be written.
    """
    with _written_beside(path, os.replace, durable=durable) as file:
        yield file


@contextmanager
def new_private_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that only its owner may read, which becomes `path` once it is complete.

    If another process has made `path` by then, that file stays. Missing parent folders are made.
    """

    def link(beside: Path, path: Path) -> None:
        try:
            with suppress(FileExistsError):
                os.link(beside, path)
        except OSError:  # a file system without hard links
            os.replace(beside, path)

    with _written_beside(path, link, mode=0o600) as file:
        yield file


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` once it is complete. On an error nothing is left.

    `path` must be missing or an empty folder; missing parent folders are made. Raises `InputError` if another process
    has filled it by then, and `OSError` if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.mkdir()
    try:
        with naming(path):
            yield beside
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} was filled by another process: use that, or choose another folder")
        if os.name != "posix" and path.is_dir():
            path.rmdir()  # elsewhere a rename replaces no folder
        os.replace(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an `OSError` of the disk that names no file, such as that of a full one."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # On a full disk torch.save raises a RuntimeError of its own, in whose context is that of the disk.
        cause: BaseException | None = error
        while not isinstance(cause, OSError | None):
            cause = cause.__context__
        if cause is None:
            raise
        if cause.filename is None and cause.errno in OF_THE_DISK:
            cause.filename = str(path)
        raise cause from None


@contextmanager
def _written_beside(
    path: Path, commit: Callable[[Path, Path], None], *, durable: bool = True, mode: int = 0o666
) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with (
            naming(path),
            open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file,
        ):
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        commit(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
