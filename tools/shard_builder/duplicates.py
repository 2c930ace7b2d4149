"""Images with the same pixels, across all classes, and which of them stay. N images chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shard_builder.scan import Entry, as_text

Duplicates = Literal["keep", "first", "drop"]


def same_pixels(rows: NDArray[np.void], chosen: Sequence[Entry]) -> list[list[int]]:
    """The numbers of images that are the same, group by group; a group is sorted by path, the groups by source.

    `rows` (N,) are `pack.ROW`: images are the same if the digests of their original grey pixels are, whatever
    their files' bytes; rejected ones are the same as none.
    """
    numbers = np.flatnonzero(rows["bytes"])
    numbers = numbers[np.argsort(rows["digest"][numbers], kind="stable")]
    digests = rows["digest"][numbers]
    starts = np.flatnonzero(np.append(True, digests[1:] != digests[:-1]))
    stops = np.append(starts[1:], len(numbers))
    several = stops - starts > 1
    groups = [
        # By path, also where the source is a hash of it: which copy stays must not hang on a key.
        sorted(numbers[start:stop].tolist(), key=lambda number: (chosen[number].file, chosen[number].frame or 0))
        for start, stop in zip(starts[several], stops[several], strict=True)
    ]
    return sorted(groups, key=lambda group: chosen[group[0]].source)


def set_aside(groups: Iterable[Sequence[int]], chosen: Sequence[Entry], how: Duplicates) -> dict[int, str]:
    """Which of the `groups` of equal images are left out, by number, and why.

    `keep`: none; `first`: all but the first by path; `drop`: all. A reason begins with `duplicate`, or with
    `label conflict` if the labels differ from those of the copy that it names: the one that stays, or with `drop`
    any, one of other labels if there is one.
    """
    reasons = {}
    for first, *others in groups if how != "keep" else ():
        for number in [first, *others] if how == "drop" else others:
            beside = [first] if how == "first" else [each for each in (first, *others) if each != number]
            beside.sort(key=lambda each: labels(chosen[each]) == labels(chosen[number]))
            kind = "duplicate" if labels(chosen[beside[0]]) == labels(chosen[number]) else "label conflict"
            reasons[number] = f"{kind}: the same pixels as {as_text(chosen[beside[0]].source)}"
    return reasons


def labels(entry: Entry) -> tuple[object, ...]:
    """All that training is told of an image."""
    return (entry.category, *sorted(entry.fields.items()))
