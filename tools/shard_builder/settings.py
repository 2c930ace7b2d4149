"""What all commands share: settings with help and checks, `InputError`, `Progress`, and the number of usable cores."""

from __future__ import annotations

import math
import os
import reprlib
import types
import typing
import unicodedata
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, Literal

Progress = Callable[[str, int, int, str], None]
"""Called as `progress(stage, done, total, note)`, always from the thread that started the work."""


class InputError(ValueError):
    """Wrong use or bad input. The message is one line: what was found, where, and what to do.

    Settings are written as Python arguments in backticks: `` `batch_size` `` or `` `overwrite=True` ``. The command
    line shows these as `--batch-size` and `--overwrite`. Names from files may be quoted as they are: the message is
    made `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` on one line that cannot command a terminal.

    Line ends become spaces. Other control characters, such as that of terminal escapes, marks that reverse the
    direction of writing, and what is no character become escapes (`\\x1b`).
    """
    return "".join(
        " "
        if character in "\n\r\t\v\f\x1c\x1d\x1e\x85\u2028\u2029"
        else character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cf", "Cs")
        else character
        for character in text
    )


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a default and a help text; the command line makes an option of it.

    `metadata` may hold bounds for `check_settings`: `least` and `most` (inclusive), `above` and `below` (exclusive),
    and `why`, their reason, for the message. NaN and infinity are outside any bound.
    """
    return field(default=default, metadata={"help": help, **metadata})


def check_settings(settings: Any) -> None:
    """Check every field of a dataclass: a value of a `Literal` type must be one of its words, a number within bounds.

    `None` passes where the type allows it; a tuple is checked value by value. Raises `InputError` naming the field.
    """
    kinds = typing.get_type_hints(type(settings))
    for each in fields(settings):
        value = getattr(settings, each.name)
        for single in value if isinstance(value, tuple) else (value,):
            if single is None:
                continue
            _check_choice(each.name, single, kinds[each.name])
            if isinstance(single, (int, float)) and not isinstance(single, bool):
                _check_bounds(each.name, single, each.metadata)


def _check_choice(name: str, value: Any, kind: Any) -> None:
    words = literal_words(kind)
    if words and value not in words:
        raise InputError(f"`{name}` must be one of {', '.join(words)}, got {value!r}")


def literal_words(kind: Any) -> tuple[str, ...]:
    """The words of a `Literal`, also of one inside `X | None` or `tuple[X, ...]`; none for another type."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) in (tuple, typing.Union):
        return next((words for inner in typing.get_args(kind) if (words := literal_words(inner))), ())
    return ()


def _check_bounds(name: str, value: float, bounds: typing.Mapping[str, Any]) -> None:
    rules = []
    for key, words, holds in (
        ("least", "at least", lambda bound: value >= bound),
        ("above", "above", lambda bound: value > bound),
        ("most", "at most", lambda bound: value <= bound),
        ("below", "below", lambda bound: value < bound),
    ):
        if key in bounds:
            rules.append((f"{words} {bounds[key]}", holds(bounds[key])))
    if isinstance(value, int) and abs(value) >= 2**63:
        rules.append(("a number of 64 bits", False))
    elif rules and not math.isfinite(value):
        rules.append(("finite", False))
    if not all(kept for _, kept in rules):
        why = f" ({bounds['why']})" if "why" in bounds else ""
        raise InputError(
            f"`{name}` must be {' and '.join(rule for rule, _ in rules)}{why}, got {reprlib.repr(value)}"
        )


def no_progress(stage: str, done: int, total: int, note: str = "") -> None:
    """The `Progress` that shows nothing."""


def usable_cores() -> int:
    """The number of CPU cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1
