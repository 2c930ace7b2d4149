"""DALI's index of a tar: the line `v1.2 N`, then for each of N samples a line `ext offset size name ...`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shard_builder.files import read_regular

MAX_BYTES = 2**28  # of an index: over a million samples
MAX_LINE = 1000  # characters; four members take about 150
MAX_DIGITS = 18  # of an offset or size, so that a sum of them fits into 64 bits


class Member(NamedTuple):
    """One file of a sample in a tar: its extension without the dot, the offset and size of its bytes, its name."""

    extension: str
    offset: int
    size: int
    name: str


def format_index(samples: Sequence[Iterable[Member]]) -> str:
    """The text of a shard's index; `samples` are the members of each sample, in storage order."""
    lines = [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in sample) for sample in samples]
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


def read_index(tar: Path) -> str:
    """The text of the index beside `tar`; raises `OSError` if it cannot be read, `ValueError` if it is not ASCII."""
    return read_regular(tar.with_suffix(".idx"), MAX_BYTES).decode("ascii")


def parse_index(text: str) -> Iterator[list[Member]]:
    """The members of each sample, one sample at a time, from an index's text; raises `ValueError` if it is malformed.

    The first line is checked at once, the others when their samples are due.
    """
    count = text.count("\n") - 1
    _check_head(text, count, f"followed by {max(count, 0)} lines")
    return _samples(text)


def first_places(text: str, samples: int) -> NDArray[np.int64]:
    """Offset and size (samples, 2) of each sample's first member, which is the image, from an index's text.

    As much as a stream needs, in a tenth of the time of `parse_index`. Raises `ValueError` if the index is malformed.
    """
    count = text.count("\n") - 1
    _check_head(text, samples, f"followed by {max(count, 0)} lines, not {samples} samples")
    if len(text) > (samples + 1) * MAX_LINE or count != samples or text.count(" ") != 15 * samples + 1:
        raise ValueError(f"it has {count} lines, not {samples} samples of four members")
    # All words in one list: many small lists would wake the garbage collector.
    words = text[text.index("\n") + 1 : -1].replace("\n", " ").split(" ")
    numbers = words[1::16] + words[2::16]
    together = "".join(numbers)
    if "" in numbers or max(map(len, numbers)) > MAX_DIGITS or not (together.isascii() and together.isdigit()):
        raise ValueError("an offset or size is no number, or a line has not four members")
    return np.array(list(map(int, numbers)), np.int64).reshape(2, samples).T


def check_index(text: str, samples: int, size: int) -> None:
    """Raise `ValueError` unless the index has `samples` lines and its last member ends within `size` bytes.

    Parses two lines only, because it runs before every training.
    """
    count = text.count("\n") - 1
    _check_head(text, samples, f"followed by {max(count, 0)} lines, not {samples} samples")
    if count != samples:
        raise ValueError(f"it has {count} lines, not {samples} samples")
    last = parse_line(text[text.rfind("\n", 0, -1) + 1 : -1])[-1]
    if last.offset + last.size > size:
        raise ValueError(f"{last.name} ends at byte {last.offset + last.size}, beyond the tar's {size}")


def _check_head(text: str, samples: int, what: str) -> None:
    """Raise `ValueError` unless the first line states this number of samples, and the last line ends."""
    head = f"v1.2 {samples}\n"
    if not (text.startswith(head) and text.endswith("\n")):
        raise ValueError(f"its first line is {text[:40].partition(chr(10))[0]!r}, {what}")


def _samples(text: str) -> Iterator[list[Member]]:
    start = text.index("\n") + 1
    while start < len(text):
        end = text.index("\n", start)
        yield parse_line(text[start:end])
        start = end + 1


def parse_line(line: str) -> list[Member]:
    """The members of a sample, from its line; raises `ValueError` if it is malformed."""
    if len(line) > MAX_LINE:
        raise ValueError(f"a line has {len(line):,} characters, over {MAX_LINE:,}")
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(f"a line has {len(words)} words, not four for each member")
    fours = list(zip(*[iter(words)] * 4, strict=True))
    if bad := [
        word for four in fours for word in four[1:3] if not re.fullmatch(f"[0-9]{{1,{MAX_DIGITS}}}", word)
    ]:
        raise ValueError(f"an offset or size is {bad[0][:40]!r}")
    return [Member(extension, int(offset), int(size), name) for extension, offset, size, name in fours]
