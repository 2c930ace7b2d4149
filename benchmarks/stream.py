"""How fast is a set streamed: samples read by their offsets, beside whole shards that are hashed and parsed?

The old way, whole shards through a window, is what a set behind a URL still needs. Both give the same batches.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Literal, get_args
from unittest import mock

import numpy as np
import psutil
import torch
from common.images import shard_set, stored_samples
from common.measuring import in_turn, options, positive, publish

from modan_fast import stream
from modan_fast.augment import sample_order
from modan_fast.config import Augmentation
from modan_fast.decode import DaliDecoder
from modan_fast.devices import pick_device
from modan_fast.loader import Loader
from modan_fast.render import Rendering, open_renderer
from modan_fast.shards import ShardSet, open_shards
from modan_fast.stream import IN_FLIGHT, Ids, Stream
from shard_builder.manifest import EXTENSIONS, Manifest, Shard
from shard_builder.settings import usable_cores
from shard_builder.writer import Sample, write_shard

Way = Literal["before", "whole shards", "by offset"]
WAYS = get_args(Way)
WINDOW = 2**14  # the default of `shuffle_window`
LARGER = 8


def repeated(shards: ShardSet, folder: Path, samples: int, per_shard: int) -> ShardSet:
    """A set of this many samples: those of `shards` again and again."""
    folder.mkdir()
    manifest = shards.manifest
    written: list[Shard] = []
    several = [
        Sample(each.image, np.frombuffer(each.labels, np.uint8), int.from_bytes(each.target, "little"), {})
        for each in stored_samples(shards, manifest.samples)
    ]
    endless = cycle(several)
    for first in range(0, samples, per_shard):
        tar = folder / f"shard-{len(written):06}.tar"
        some = islice(endless, min(per_shard, samples - first))
        written.append(write_shard(tar, some, first=first, extension=EXTENSIONS[manifest.codec]))
    Manifest(
        samples, manifest.size, manifest.codec, manifest.fields, manifest.classes, written, [], manifest.options
    ).save(folder)
    return open_shards(folder)


def stream_of(shards: ShardSet, batch_size: int, way: Way) -> Stream:
    """The set as a stream. `before` is what version 0.1.0 had: one shard ahead, and DALI for PNG images, too."""
    if way == "before":
        stream.IN_FLIGHT = 1
        decoder = DaliDecoder(batch_size, usable_cores())
        with mock.patch("modan_fast.stream.open_decoder", return_value=decoder):
            return Stream(shards, renderer="auto", batch_size=batch_size, threads=usable_cores(), whole=True)
    stream.IN_FLIGHT = IN_FLIGHT
    return Stream(
        shards, renderer="auto", batch_size=batch_size, threads=usable_cores(), whole=way == "whole shards"
    )


def batches_of(shards: ShardSet, batch_size: int, epoch: int) -> list[Ids]:
    """The sample ids of an epoch's batches."""
    order = sample_order(0, epoch, shards.counts, WINDOW)
    return np.split(order, range(batch_size, len(order), batch_size))


def samples_per_second(shards: ShardSet, batch_size: int, seconds: float, way: Way) -> list[float]:
    """Reading and checking alone, in whole epochs; the first one, in which indices are parsed, is not timed."""
    streamed = stream_of(shards, batch_size, way)
    begun, samples = 0.0, 0
    for epoch in count():
        if epoch == 1:
            begun, samples = time.perf_counter(), 0
        samples += sum(len(batch.ids) for batch in streamed.read(batches_of(shards, batch_size, epoch)))
        if epoch and time.perf_counter() - begun > seconds:
            break
    return [samples / (time.perf_counter() - begun)]


def images_per_second(
    shards: ShardSet, batch_size: int, device: torch.device, seconds: float, way: Way
) -> list[float]:
    """Batches of two views from the loader, after two batches that are not timed."""
    streamed, size = stream_of(shards, batch_size, way), shards.manifest.size
    rendering = Rendering(
        canvas=size,
        size=size,
        batch_size=2 * batch_size,
        device=device,
        dtype=torch.float32,
        threads=usable_cores(),
    )
    renderer = open_renderer("auto", rendering)
    loader = Loader(streamed, renderer, Augmentation(), batch_size=batch_size, drop_last=True)
    batches = loader.endless()
    for _ in range(2):
        next(batches)
    begun, images = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        images += len(next(batches).ids)
    taken = time.perf_counter() - begun
    batches.close()
    return [images / taken]


def added(location: Path, batch_size: int, way: Way) -> float:
    """MiB of memory that streaming an epoch adds to a process of its own, at most."""
    words = [sys.executable, __file__, "--memory-of", str(location), "--batch-size", str(batch_size)]
    ended = subprocess.run([*words, "--way", way], check=True, capture_output=True, text=True)  # noqa: S603 - itself
    return float(ended.stdout)


def print_added(arguments: argparse.Namespace) -> None:
    """What `added` starts."""
    shards, process = open_shards(arguments.memory_of), psutil.Process()
    streamed = stream_of(shards, arguments.batch_size, arguments.way)
    most = before = process.memory_info().rss
    for _ in streamed.fetch(batches_of(shards, arguments.batch_size, 0)):
        most = max(most, process.memory_info().rss)
    print((most - before) / 2**20)


def shares_read(shards: ShardSet, batch_size: int, ranks: int) -> list[int]:
    """The bytes that each of some ranks reads of the tars in an epoch."""
    read: list[int] = []
    reading = os.preadv

    def counting(*arguments: object) -> int:
        count = reading(*arguments)  # type: ignore[arg-type]
        read[-1] += count
        return count

    with mock.patch("os.preadv", counting):
        for rank in range(ranks):
            read.append(0)
            ids = [each[rank::ranks] for each in batches_of(shards, batch_size, epoch=0)]
            for _ in stream_of(shards, batch_size, "by offset").read(ids):
                pass
    return read


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--samples", type=positive, default=8_000, help="samples of the set")
    parser.add_argument("--per-shard", type=positive, default=1000, help="samples of a shard")
    parser.add_argument("--size", type=positive, default=64, help="side of images and views in pixels")
    parser.add_argument("--batch-size", type=positive, default=256, help="images in a batch")
    parser.add_argument("--seconds", type=float, default=5, help="least time of each timing")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_added(arguments)
        return
    device, batch_size = pick_device(arguments.device), arguments.batch_size
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        few = shard_set(None, scratch, count=512, size=arguments.size)
        shards = repeated(few, scratch / "set", arguments.samples, arguments.per_shard)
        larger = repeated(few, scratch / "larger", LARGER * arguments.samples, arguments.per_shard)
        for ours, theirs in zip(
            *(
                stream_of(shards, batch_size, way).fetch(batches_of(shards, batch_size, 0))
                for way in ("by offset", "whole shards")
            ),
            strict=True,
        ):
            assert isinstance(ours.pixels, torch.Tensor)
            assert isinstance(theirs.pixels, torch.Tensor)
            assert torch.equal(ours.pixels, theirs.pixels)
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.targets, theirs.targets)
        reading = {
            f"reading, {way}": partial(samples_per_second, shards, batch_size, arguments.seconds, way)
            for way in WAYS
        }
        loading = {
            f"loader, {way}": partial(images_per_second, shards, batch_size, device, arguments.seconds, way)
            for way in WAYS
        }
        measured = in_turn(reading | loading, arguments.rounds, "samples/s")
        peaks = {way: [added(Path(each.location), batch_size, way) for each in (shards, larger)] for way in WAYS}
        begun = time.perf_counter()
        opened = open_shards(larger.location)
        opening = time.perf_counter() - begun
        begun = time.perf_counter()
        for shard in range(len(opened.counts)):
            opened.places(shard)
        indexing = time.perf_counter() - begun
        alone = shares_read(shards, batch_size, 1)
        two = shares_read(shards, batch_size, 2)
        size = sum(shard.bytes for shard in shards.manifest.shards)
    publish(
        "stream",
        measured,
        unit="samples/s",
        ratios=[(f"{what}, by offset", f"{what}, {way}") for what in ("reading", "loader") for way in WAYS[:2]],
        notes=[
            f"{arguments.samples:,} grey PNG images of {arguments.size} px, {size / arguments.samples / 1000:.1f} kB a "
            f"sample in the tar, in the page cache; batches of {batch_size}; the loader makes two views of each image. "
            "All ways give the same batches. `before`: one shard ahead, images decoded by DALI.",
            *(
                f"An epoch adds, {way}: {small:.0f} MiB; {large:.0f} MiB with {LARGER} times as many samples."
                for way, (small, large) in peaks.items()
            ),
            f"Bytes read in an epoch: {alone[0]:,} by one rank; {two[0]:,} and {two[1]:,} by two, which is "
            f"{sum(two) / alone[0]:.3f} times as many; the tars have {size:,}.",
            f"Opening {LARGER * arguments.samples:,} samples: {opening:.2f} s; parsing all their indices, which "
            f"happens in the first epoch, shard by shard: {indexing:.2f} s.",
        ],
        arguments=argparse.Namespace(
            **{key: value for key, value in vars(arguments).items() if key not in ("memory_of", "way")}
        ),
        device=device,
    )


if __name__ == "__main__":
    main()
