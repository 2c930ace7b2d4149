"""Read a finished shard set: its labels, counts, images, and a description. S samples, K label bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shard_builder.files import open_regular
from shard_builder.image import MAX_BYTES, open_stored
from shard_builder.index import parse_index, parse_line, read_index
from shard_builder.manifest import Manifest, Rejected
from shard_builder.settings import InputError, Progress, no_progress, printable

MOST_GROUPS = 200  # rows of a sheet
MOST_LETTERS = 200  # of a name in a description


@dataclass(frozen=True)
class Contents:
    """A shard set with its labels in storage order: `labels` (S, K) uint8, 0/1, `targets` (S,) int32 class indices."""

    folder: Path
    manifest: Manifest
    labels: NDArray[np.uint8]
    targets: NDArray[np.int32]

    @property
    def values(self) -> dict[str, dict[str, int]]:
        """The number of samples with each value of each field; the empty text counts those without a value."""
        counts, start = {}, 0
        for name, vocabulary in self.manifest.fields.items():
            bits = self.labels[:, start : start + len(vocabulary)]
            found = dict(zip(vocabulary, bits.sum(0, dtype=np.int64).tolist(), strict=True))
            without = len(bits) - int(bits.any(1).sum())
            counts[name] = found | ({"": without} if without else {})
            start += len(vocabulary)
        return counts

    @property
    def classes(self) -> dict[str, int]:
        """The number of samples of each class."""
        counts = np.bincount(self.targets, minlength=len(self.manifest.classes))
        return dict(zip(self.manifest.classes, counts.tolist(), strict=True))

    def groups(self, most: int) -> dict[str, list[int]]:
        """Up to `most` sample ids for each combination of the first two fields, such as `CT lung`.

        Only the first `MOST_GROUPS` combinations: more make no sheet that anyone could look at.
        """
        names = [value for values in list(self.manifest.fields.values())[:2] for value in values]
        combinations, group = np.unique(self.labels[:, : len(names)], axis=0, return_inverse=True)
        found = {}
        for number, bits in enumerate(combinations[:MOST_GROUPS]):
            title = " ".join(name for name, bit in zip(names, bits, strict=True) if bit) or "unlabelled"
            found[title] = np.flatnonzero(group.ravel() == number)[:most].tolist()
        return dict(sorted(found.items()))


def read_contents(folder: Path, progress: Progress = no_progress) -> Contents:
    """Read the labels of all samples; raises `InputError` if `folder` holds no whole shard set."""
    manifest = Manifest.load(folder)
    manifest.check_files(folder)
    labels = np.empty((manifest.samples, manifest.bits), np.uint8)
    targets = np.empty((manifest.samples, 1), "<i4")
    sample = 0
    for done, shard in enumerate(manifest.shards, 1):
        tar = folder / shard.name
        try:
            with open_regular(tar) as file:
                for members in parse_index(read_index(tar)):
                    for array, member in zip((labels, targets), members[1:3], strict=True):
                        if member.size != array[sample].nbytes:
                            raise ValueError  # numpy would repeat a single byte
                        file.seek(member.offset)
                        array[sample] = np.frombuffer(file.read(member.size), array.dtype)
                    sample += 1
        except (OSError, ValueError):
            raise InputError(f"{tar} is damaged: run `modan-fast verify {folder}` for details") from None
        progress("reading", done, len(manifest.shards), "")
    if labels.max(initial=0) > 1 or not 0 <= targets.min() <= targets.max() < len(manifest.classes):
        raise InputError(f"{folder} is damaged: run `modan-fast verify {folder}` for details")
    return Contents(folder, manifest, labels, targets[:, 0])


def read_images(folder: Path, manifest: Manifest, samples: Iterable[int]) -> Iterator[Image.Image]:
    """The grey images of the samples with these ids, one at a time; raises `InputError` if one is damaged."""
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    read = -1
    for sample in samples:
        number = int(np.searchsorted(starts, sample, "right")) - 1
        tar = folder / manifest.shards[number].name
        try:
            if number != read:
                lines, read = read_index(tar).split("\n")[1:], number
            image, *_ = parse_line(lines[sample - int(starts[number])])
            with open_regular(tar) as file:
                file.seek(image.offset)
                data = file.read(min(image.size, MAX_BYTES))
            picture = open_stored(data, manifest.codec, manifest.size)
        except (OSError, ValueError):
            raise InputError(f"{tar} is damaged: run `modan-fast verify {folder}` for details") from None
        yield picture


def kinds(rejected: Iterable[Rejected]) -> dict[str, int]:
    """The number of rejections for each kind of reason (its text before a colon), most frequent first."""
    counts = Counter(each.reason.partition(":")[0] for each in rejected)
    return dict(sorted(counts.items(), key=lambda kind: (-kind[1], kind[0])))


def describe(contents: Contents) -> str:
    """The shard set as lines of text: its size, and counts of labels, classes and rejections.

    Names are cut and made `printable`, for they may come from a stranger.
    """

    def shown(name: str) -> str:
        return printable(name if len(name) <= MOST_LETTERS else f"{name[:MOST_LETTERS]}…") or "(none)"

    manifest = contents.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{manifest.samples:,} images of {manifest.size} x {manifest.size} pixels, {manifest.codec}; "
        f"{len(manifest.shards):,} shards, {size / 2**20:,.1f} MiB"
    ]
    tables = {f"{shown(name)} ({len(counts)})": counts for name, counts in contents.values.items()}
    tables[f"class ({len(manifest.classes)})"] = contents.classes
    tables[f"left out ({len(manifest.rejected)})"] = kinds(manifest.rejected)
    width = max(len(shown(name)) for counts in tables.values() for name in [*counts, ""])
    for title, counts in tables.items():
        lines += ["", title, *(f"  {shown(name):{width}}  {count:9,}" for name, count in counts.items())]
    return "\n".join(lines)
