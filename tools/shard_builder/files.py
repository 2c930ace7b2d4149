"""Open and read files that a stranger may have made: never a pipe or device, never more than a bound."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; raises `OSError` if it cannot be opened, or is a pipe, device or socket, or a link to one.

    Opening a pipe can block forever, some devices never end, and others do something as soon as they are opened.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # open has a message of its own for folders
        raise OSError(errno.EINVAL, "not a file", str(path))
    return open(path, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a file; raises `OSError` as `open_regular` does, and for a file of over `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"over {most >> 20} MiB", str(path))
        return file.read(size)  # a file of the system may have no size and no end
