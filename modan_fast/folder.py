"""A folder that a command writes to: free or not, one writer at a time, its files never half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from shard_builder.settings import InputError

LOCK = ".lock"


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep every other `what` out of a folder; the system gives the lock back, however this one ends.

    Raises `InputError` where another one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another {what} is writing to {folder}: wait for it, or name another folder with --out"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            (folder / LOCK).unlink()
        lock.release()


def check_writable(folder: Path) -> None:
    """Raise `InputError`, before any work, where nothing can be written to a folder that may be missing yet."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    why = "is no folder" if not there.is_dir() else "may not be written to"
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(f"nothing can be written to {folder}: {there} {why}; name another one with --out")


def is_new(folder: Path) -> bool:
    """Whether nothing is at `folder`, or nothing in it but a lock."""
    return not folder.exists() or (folder.is_dir() and all(path.name == LOCK for path in folder.iterdir()))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path beside `path`, then put the result in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with open(beside, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda at: at.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `InputError` where it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no readable JSON object ({error}): restore it, or move it away") from error
