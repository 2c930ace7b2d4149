"""DALI's index of a tar: the line `v1.2 N`, then for each of N samples a line `ext offset size name ...`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


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


def parse_index(text: str) -> list[list[Member]]:
    """The members of each sample, from an index's text; raises `ValueError` if it is malformed."""
    head, *lines = text.splitlines() or [""]
    if head != f"v1.2 {len(lines)}":
        raise ValueError(f"its first line is {head[:40]!r}, followed by {len(lines)} lines")
    return [_parse_line(line) for line in lines]


def check_index(text: str, samples: int, size: int) -> None:
    """Raise `ValueError` unless the index has `samples` lines and its last member ends within `size` bytes.

    Parses two lines only, because it runs before every training.
    """
    head, _, lines = text.partition("\n")
    if head != f"v1.2 {samples}" or lines.count("\n") != samples:
        count = lines.count("\n")
        raise ValueError(f"its first line is {head[:40]!r}, followed by {count} lines, not {samples} samples")
    last = _parse_line(lines.rstrip("\n").rpartition("\n")[2])[-1]
    if last.offset + last.size > size:
        raise ValueError(f"{last.name} ends at byte {last.offset + last.size}, beyond the tar's {size}")


def _parse_line(line: str) -> list[Member]:
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(f"a line has {len(words)} words, not four for each member")
    fours = zip(*[iter(words)] * 4, strict=True)
    return [Member(extension, int(offset), int(size), name) for extension, offset, size, name in fours]
