"""Test images: synthetic ones, a shard set to measure on, and its stored images as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modan_fast.phantom import phantom_archive
from modan_fast.shards import ShardSet, open_shards
from modan_fast.stream import StoredSample, Stream
from shard_builder.build import build
from shard_builder.options import BuildOptions

CLASSES = ("CT/lung/Nodule", "CT/abd/liver_lesion", "MR/brain/edema", "MR/knee/normal", "US/liver")


def synthetic_images(folder: Path, count: int, size: int) -> None:
    """Write at least `count` grey PNG files, equally many of each class."""
    phantom_archive(folder, per_class=-(-count // len(CLASSES)), size=size, classes=CLASSES)


def shard_set(
    shards: Path | None, scratch: Path, *, images: Path | None = None, count: int, size: int = 224
) -> ShardSet:
    """Open the set `shards`; without it, build one in `scratch` from `images`, or from `count` synthetic images."""
    if shards is None:
        if images is None:
            images = scratch / "images"
            synthetic_images(images, count, size)
        shards = scratch / "shards"
        # Small shards, so that every worker of the webdataset library gets some.
        build(images, shards, BuildOptions(per_class=0, size=size, samples_per_shard=64))
    return open_shards(shards)


def stored_samples(shards: ShardSet, count: int) -> Iterator[StoredSample]:
    """The first `count` samples as they are stored."""
    stream = Stream(shards, renderer="torch", batch_size=1, threads=1)
    for batch in stream.read(list(np.arange(count)[:, None])):
        yield from batch.samples


def image_files(shards: ShardSet, folder: Path) -> tuple[list[Path], list[bytes]]:
    """Write the stored PNG images to files in the new `folder`; the files and their label bits, in storage order."""
    folder.mkdir()
    files, labels = [], []
    for number, sample in enumerate(stored_samples(shards, shards.manifest.samples)):
        files.append(folder / f"{number:08}.png")
        files[-1].write_bytes(sample.image)
        labels.append(sample.labels)
    return files, labels
