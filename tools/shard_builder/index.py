"""DALI's index of a tar: `v1.2 N`, then a line a sample, `ext offset size name` for each component."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Component(NamedTuple):
    """One member of a sample: its extension without the dot, and where its bytes lie in the tar."""

    extension: str
    offset: int
    size: int
    name: str


def format_index(samples: Sequence[Iterable[Component]]) -> str:
    """The text of the index file of a shard with these samples, in storage order."""
    lines = [" ".join(f"{each[0]} {each[1]} {each[2]} {each[3]}" for each in sample) for sample in samples]
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


def parse_index(text: str) -> list[list[Component]]:
    """The inverse of `format_index`; raises `ValueError` for any other text."""
    head, *lines = text.splitlines() or [""]
    if head != f"v1.2 {len(lines)}":
        raise ValueError(f"it says {head[:40]!r} over {len(lines)} lines")
    return [_parse_line(line) for line in lines]


def check_index(text: str, samples: int, size: int) -> None:
    """Raise `ValueError` unless the index counts `samples` and its last member ends within `size` bytes.

    Reads two lines only: it runs before every training.
    """
    head, _, lines = text.partition("\n")
    if head != f"v1.2 {samples}" or lines.count("\n") != samples:
        raise ValueError(f"it says {head[:40]!r} over {lines.count(chr(10))} lines, not {samples} samples")
    last = _parse_line(lines.rstrip("\n").rpartition("\n")[2])[-1]
    if last.offset + last.size > size:
        raise ValueError(f"{last.name} ends at byte {last.offset + last.size}, beyond the tar's {size}")


def _parse_line(line: str) -> list[Component]:
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(f"a line has {len(words)} words, not four a component")
    quadruples = zip(*[iter(words)] * 4, strict=True)
    return [Component(extension, int(offset), int(size), name) for extension, offset, size, name in quadruples]
