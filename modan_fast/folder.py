"""An output folder: whether it is free, one writer at a time, and its JSON files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from shard_builder.atomic import replacing
from shard_builder.files import read_regular
from shard_builder.settings import InputError

LOCK = ".lock"
LARGEST_JSON = 2**28  # bytes


def _has_no_locks(path: Path) -> bool:
    """Whether the file system of a file refuses locks, as some of networks do."""
    try:
        import fcntl  # Unix only
    except ImportError:
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.ENOSYS, errno.EOPNOTSUPP)
    return False


@contextmanager
def locked(folder: Path, activity: str) -> Iterator[None]:
    """Hold a folder's lock, for one writer at a time. The system releases it however the process ends.

    `activity` names the work in the message. Raises `InputError` if another process holds the lock, or if there can be
    none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{path} is no lock: move it away, or choose another folder with `out`")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        # Where the file system has no locks, the file itself is the lock, and it outlives the death of a machine.
        left = f"; if none runs on any machine, remove {path}" if _has_no_locks(path) else ""
        raise InputError(
            f"another {activity} is writing to {folder}: wait for it, or choose another folder with `out`{left}"
        ) from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be locked ({error.strerror}): choose another folder with `out`"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file
            (folder / LOCK).unlink()
        lock.release()


def check_writable(folder: Path) -> None:
    """Raise `InputError`, before any work, if nothing can be written to a folder, which may be missing yet."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    why = "is no folder" if not existing.is_dir() else "may not be written to"
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise InputError(
            f"nothing can be written to {folder}: {existing} {why}; choose another folder with `out`"
        )


def is_new(folder: Path) -> bool:
    """Whether `folder` is missing, or holds nothing but a lock."""
    return not folder.exists() or (folder.is_dir() and all(path.name == LOCK for path in folder.iterdir()))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically. What is no character, as in a file name that is not UTF-8, becomes `\\udcff`."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # JSON reads it back as it was


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `InputError` if it cannot be read, or is damaged."""
    try:
        return dict(json.loads(read_regular(path, LARGEST_JSON).decode()))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): restore it, or move it away") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no readable JSON object ({error}): restore it, or move it away") from error
