"""Samples straight from the tars, on local disks or behind URLs: read in any order, decoded in the background.

N samples of C x C pixels, K label bits.
"""

from __future__ import annotations

import tarfile
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from modan_fast.ahead import one_ahead
from modan_fast.config import RendererName
from modan_fast.decode import check_header, open_decoder
from modan_fast.shards import ShardSet, first_line
from shard_builder.manifest import EXTENSIONS
from shard_builder.settings import InputError

READ_AHEAD = 2  # batches that are read and decoded before they are asked for

Ids = NDArray[np.int64]


class StoredSample(NamedTuple):
    """A sample's members as they are stored."""

    image: bytes
    labels: bytes
    target: bytes


@dataclass(frozen=True)
class PixelBatch:
    """N decoded samples: `ids` (N,) int64, `pixels` (N, C, C) uint8 or a list of N images, `labels` (N, K) uint8, 0/1,
    and `targets` (N,) int64, class indices. The ids are on the CPU, the tensors on any device.
    """

    ids: Ids
    pixels: Tensor | list[Tensor]
    labels: Tensor
    targets: Tensor


class StoredBatch(NamedTuple):
    """The ids (N,) of a batch, and its N samples as they are stored."""

    ids: Ids
    samples: list[StoredSample]


class Stream:
    """A shard set of any size, read anew each epoch. Each shard is compared with its checksum before it is used."""

    tier = "stream"

    def __init__(
        self,
        shards: ShardSet,
        *,
        renderer: RendererName,
        batch_size: int,
        threads: int,
        pinned: bool = False,
    ) -> None:
        """`batch_size` is the size of the largest batch; `renderer` chooses the decoder.

        Tensors in `pinned` memory can be copied to a GPU without making the host wait.
        """
        self.shards, self._batch_size, self._pinned = shards, batch_size, pinned
        manifest = shards.manifest
        self.canvas, self.counts = manifest.size, shards.counts
        self._extension = EXTENSIONS[manifest.codec]
        self._starts = np.cumsum([0, *self.counts])
        self._decoder = open_decoder(
            renderer, codec=manifest.codec, size=manifest.size, batch_size=batch_size, threads=threads
        )

    def fetch(self, id_batches: Sequence[Ids]) -> Generator[PixelBatch, None, None]:
        """The batches of samples with these ids, in order; the next ones are read and decoded in the background.

        Each shard is read once. Its samples wait in memory until they are due. Raises `InputError` if a shard cannot be
        read, does not match the manifest, or holds an image that does not decode. To close the generator takes no
        longer than a batch needs to be decoded, also while a server keeps it waiting.
        """
        stop = threading.Event()
        with (
            closing(one_ahead(self.read(id_batches, stop), self.submit, self.collect)) as decoded,
            ThreadPoolExecutor(1, thread_name_prefix="stream") as reader,
        ):
            ahead = deque(reader.submit(next, decoded, None) for _ in range(READ_AHEAD))
            try:
                while (batch := ahead.popleft().result()) is not None:
                    ahead.append(reader.submit(next, decoded, None))
                    yield batch
            finally:
                stop.set()
                reader.shutdown(cancel_futures=True)

    def fetch_first(self, count: int) -> Generator[PixelBatch, None, None]:
        """The first `count` samples in storage order, in batches. Raises as `fetch`."""
        return self.fetch(np.split(np.arange(count), range(self._batch_size, count, self._batch_size)))

    def read(
        self, id_batches: Sequence[Ids], stop: threading.Event | None = None
    ) -> Generator[StoredBatch, None, None]:
        """The batches with these ids, not yet decoded. Ends soon, with `CancelledError`, after `stop` is set."""
        largest, free = (
            max(shard.bytes for shard in self.shards.manifest.shards),
            psutil.virtual_memory().available,
        )
        if 2 * largest > free:  # one in use, and the next one
            raise InputError(
                f"{self.shards.shown_location} has shards of {largest / 2**30:.1f} GiB, two of which do not "
                f"fit into the {free / 2**30:.1f} GiB of free memory: shard with smaller `samples_per_shard`"
            )
        order = np.concatenate([np.empty(0, np.int64), *id_batches])
        with closing(self._in_order(order, stop or threading.Event())) as samples:
            for ids in id_batches:
                yield StoredBatch(ids, list(islice(samples, len(ids))))

    def submit(self, batch: StoredBatch) -> None:
        """Start decoding a batch."""
        self._decoder.submit([sample.image for sample in batch.samples])

    def collect(self, batch: StoredBatch) -> PixelBatch:
        """The oldest submitted batch, decoded; raises `InputError` if an image in it is damaged."""
        try:
            pixels = torch.from_numpy(self._decoder.collect())
            if pixels.shape != (shape := (len(batch.samples), self.canvas, self.canvas)):
                raise ValueError(f"{tuple(pixels.shape)} pixels where {shape} belong")
        except Exception as error:  # a decoder raises anything on damaged files
            raise InputError(
                f"{self.shards.shown_location} holds an image that does not decode ({first_line(error)}): "
                "find it with `modan-fast verify`"
            ) from error
        labels = np.stack([np.frombuffer(sample.labels, np.uint8) for sample in batch.samples])
        targets = np.array([int.from_bytes(sample.target, "little") for sample in batch.samples], np.int64)
        tensors = (pixels, torch.from_numpy(labels), torch.from_numpy(targets))
        return PixelBatch(batch.ids, *(each.pin_memory() if self._pinned else each for each in tensors))

    def _in_order(self, order: Ids, stop: threading.Event) -> Generator[StoredSample, None, None]:
        """The samples with the ids `order`; a shard is read when its first sample is due."""
        never = len(order)
        due = np.full(self._starts[-1], never)
        due[order] = np.arange(len(order))
        first_due = np.minimum.reduceat(due, self._starts[:-1])
        wanted = due < never
        shards = [shard for shard in np.argsort(first_due, kind="stable").tolist() if first_due[shard] < never]
        waiting: dict[int, StoredSample] = {}
        with closing(self._read(shards, stop)) as arriving:
            for sample in order.tolist():
                while sample not in waiting:
                    number, stored = next(arriving)
                    if wanted[number]:
                        waiting[number] = stored
                yield waiting.pop(sample)

    def _read(self, shards: list[int], stop: threading.Event) -> Generator[tuple[int, StoredSample], None, None]:
        """The ids and members of all samples of these shards, shard by shard; the next shard is read meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="shard") as reader:
            ahead: deque[Future[bytes]] = deque()
            try:
                for number, shard in enumerate(shards):
                    for each in shards[number + len(ahead) : number + 2]:
                        ahead.append(reader.submit(self.shards.read, each, stop))
                    yield from self._samples(shard, ahead.popleft().result())
            finally:
                stop.set()
                reader.shutdown(cancel_futures=True)

    def _samples(self, shard: int, content: bytes) -> Generator[tuple[int, StoredSample], None, None]:
        """The ids and members of the samples in a shard's bytes, checked."""
        at, manifest = 0, self.shards.manifest
        for number in range(self._starts[shard], self._starts[shard + 1]):
            try:
                image, at = member(content, at, f"{number:08}.{self._extension}")
                labels, at = member(content, at, f"{number:08}.labels")
                target, at = member(content, at, f"{number:08}.target")
                _, at = member(content, at, f"{number:08}.json")  # for readers of the tar
                check_header(image, manifest.codec, manifest.size)
                if len(labels) != manifest.bits or labels.strip(b"\0\1"):
                    raise ValueError(f"its labels are not {manifest.bits} bytes of 0 or 1")
                if len(target) != 4 or int.from_bytes(target, "little") >= len(manifest.classes):
                    raise ValueError(f"its target is not the number of one of {len(manifest.classes)} classes")
            except ValueError as error:
                raise InputError(
                    f"{self.shards.shown(shard)}: sample {number:08} cannot be used: {error}; shard the source again"
                ) from None
            yield number, StoredSample(image, labels, target)
        if content.count(0, at) != len(content) - at:
            raise InputError(
                f"{self.shards.shown(shard)} holds more than the {self.counts[shard]} samples of its manifest: shard "
                "the source again"
            )


def member(content: bytes, at: int, name: str) -> tuple[bytes, int]:
    """The member `name` of a tar, whose header is at byte `at`, and where the next header is.

    Raises `ValueError` if another header is there. Only what a shard may hold is read: an ordinary file. Readers of any
    tar also expand compressed tars and sparse files, some kilobytes of which may become any number of gigabytes.
    """
    if not content.startswith(name.encode() + b"\0", at):
        raise ValueError(f"{name} is not at byte {at:,} of the tar")
    size = content[at + 124 : at + 136].strip(b"\0 ")
    if content[at + 156 : at + 157] not in (b"0", b"\0") or not size.isdigit():
        raise ValueError(f"{name} is no ordinary file in the tar")
    start = at + tarfile.BLOCKSIZE
    end = start + int(size, 8)
    if end > len(content):
        raise ValueError(f"{name} goes on after the end of the tar")
    return content[start:end], end + -end % tarfile.BLOCKSIZE
