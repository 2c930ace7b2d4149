"""Open and read files that a stranger may have made: never a pipe or device, never more than a bound."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read; raises `OSError` if it cannot be opened, or is a pipe, device or socket, or a link to one.

    Opening a pipe can block forever, some devices never end, and others do something as soon as they are opened.
    """
    found = os.stat(path)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # open has its own message for folders
        raise OSError(errno.EINVAL, "not a file", str(path))
    # Some files of the system, such as /proc/kmsg, block like a pipe. They have no size; nor has an empty file.
    return open(path if found.st_size else os.devnull, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a file; raises `OSError` as `open_regular` does, and for a file of over `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"over {most >> 20} MiB", str(path))
        return file.read(size)
