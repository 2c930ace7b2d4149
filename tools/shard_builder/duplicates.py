"""Images with the same pixels, across all classes, and which of them are left out. N images chosen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shard_builder.entries import Entry, as_text

Duplicates = Literal["keep", "first", "drop"]


def find_duplicates(rows: NDArray[np.void], chosen: Sequence[Entry]) -> list[list[int]]:
    """Groups of chosen images with the same pixels, as their numbers. A group is sorted by path, groups by source.

    `rows` (N,) are `pack.ROW`. Images are the same if the digests of their original grey pixels are equal, whatever
    their files' bytes. Rejected images belong to no group.
    """
    numbers = np.flatnonzero(rows["bytes"])
    numbers = numbers[np.argsort(rows["digest"][numbers], kind="stable")]
    digests = rows["digest"][numbers]
    starts = np.flatnonzero(np.append(True, digests[1:] != digests[:-1]))
    stops = np.append(starts[1:], len(numbers))
    several = stops - starts > 1
    groups = [
        # By path even where the source is a hash of it: the key must not decide which image stays.
        sorted(numbers[start:stop].tolist(), key=lambda number: (chosen[number].file, chosen[number].frame or 0))
        for start, stop in zip(starts[several], stops[several], strict=True)
    ]
    return sorted(groups, key=lambda group: chosen[group[0]].source)


def duplicate_reasons(
    groups: Iterable[Sequence[int]], chosen: Sequence[Entry], policy: Duplicates
) -> dict[int, str]:
    """Why images of these groups are left out, by number: with `keep` none are, with `first` all but the first, with
    `drop` all.

    A reason names another image of the group: with `first` the one that stays, with `drop` one with other labels if
    there is one. It begins with `label conflict` if the labels of the two differ, else with `duplicate`.
    """
    reasons = {}
    for first, *others in groups if policy != "keep" else ():
        for number in [first, *others] if policy == "drop" else others:
            labels = labels_of(chosen[number])
            candidates = [first] if policy == "first" else [n for n in (first, *others) if n != number]
            named = min(candidates, key=lambda each: labels_of(chosen[each]) == labels)  # the first with others
            kind = "duplicate" if labels_of(chosen[named]) == labels else "label conflict"
            reasons[number] = f"{kind}: the same pixels as {as_text(chosen[named].source)}"
    return reasons


def labels_of(entry: Entry) -> tuple[object, ...]:
    """An image's class and label values, to compare with another image's."""
    return (entry.category, *sorted(entry.fields.items()))
