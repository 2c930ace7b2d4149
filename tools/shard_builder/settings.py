"""What the settings of every stage are made of: the error for bad input, and a field that carries its help."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import field
from typing import Any

Report = Callable[[str, int, int, str], None]
"""Progress: called as `report(stage, done, total, note)` from the thread that started the work."""


class InputError(ValueError):
    """Wrong use or bad input. The message is one line: what was found, where, what to do."""


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a default and a help text; the command line shows both."""
    return field(default=default, metadata={"help": help, **metadata})


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """The `Report` that shows nothing."""


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1
