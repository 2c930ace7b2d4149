"""Labels as numbers: sorted vocabularies of the label fields, and multi-hot bits. K bits in all."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_US_ABD = "aorta bladder cbd fibroid gb ivc kidney liver ovary pancreas portal_vein spleen uterus"
RADIMAGENET_US = {
    **dict.fromkeys(_US_ABD.split(), "abd"),
    **dict.fromkeys(("thyroid", "thyroid_nodule"), "thyroid"),
}
"""Anatomy of RadImageNet's 15 ultrasound classes. As shipped, their folders `US/class` have no anatomy level."""


def vocabularies(names: Sequence[str], rows: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """The sorted values that each of the fields `names` takes in `rows`; a row may lack a field."""
    found: dict[str, set[str]] = {name: set() for name in names}
    for row in rows:
        for name in names:
            if name in row:
                found[name].add(row[name])
    return {name: sorted(values) for name, values in found.items()}


def bit_names(fields: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of the K bits in order, such as `modality=CT`; `fields` maps each field to its vocabulary."""
    return [f"{name}={value}" for name, values in fields.items() for value in values]


def position(values: Sequence[str], value: str) -> int:
    """The index of `value` in the sorted `values`; raises `ValueError` if it is not among them."""
    found = bisect_left(values, value)
    if values[found : found + 1] != [value]:
        raise ValueError(f"{value!r} is not in list")
    return found


def multi_hot(row: Mapping[str, str], fields: Mapping[str, Sequence[str]]) -> NDArray[np.uint8]:
    """The labels (K,) uint8, 0/1, of one image. A missing value sets no bit.

    Raises `ValueError` for a value that is not in its field's vocabulary.
    """
    bits = np.zeros(sum(map(len, fields.values())), np.uint8)
    start = 0
    for name, values in fields.items():
        if name in row:
            bits[start + position(values, row[name])] = 1
        start += len(values)
    return bits
