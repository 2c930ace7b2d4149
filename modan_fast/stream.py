"""Samples straight from the tars, on local disks or behind URLs: read in any order, decoded in the background.

N samples of C x C pixels, K label bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modan_fast.ahead import one_ahead
from modan_fast.config import RendererName
from modan_fast.decode import open_decoder
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
    """A shard set of any size, read anew each epoch through the webdataset library."""

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
        read, does not match the manifest, or holds an image that does not decode.
        """
        with (
            closing(self._decoded(id_batches)) as decoded,
            ThreadPoolExecutor(1, thread_name_prefix="stream") as reader,
        ):
            ahead = deque(reader.submit(next, decoded, None) for _ in range(READ_AHEAD))
            try:
                while (batch := ahead.popleft().result()) is not None:
                    ahead.append(reader.submit(next, decoded, None))
                    yield batch
            finally:
                reader.shutdown(cancel_futures=True)

    def fetch_first(self, count: int) -> Generator[PixelBatch, None, None]:
        """The first `count` samples in storage order, in batches. Raises as `fetch`."""
        return self.fetch(np.split(np.arange(count), range(self._batch_size, count, self._batch_size)))

    def read(self, id_batches: Sequence[Ids]) -> Iterator[StoredBatch]:
        """The batches with these ids, not yet decoded."""
        samples = self._in_order(np.concatenate([np.empty(0, np.int64), *id_batches]))
        for ids in id_batches:
            yield StoredBatch(ids, list(islice(samples, len(ids))))

    def submit(self, batch: StoredBatch) -> None:
        """Start decoding a batch."""
        self._decoder.submit([sample.image for sample in batch.samples])

    def collect(self, batch: StoredBatch) -> PixelBatch:
        """The oldest submitted batch, decoded; raises `InputError` if an image in it is damaged."""
        try:
            pixels = torch.from_numpy(self._decoder.collect())
        except Exception as error:  # a decoder raises anything on damaged files
            raise InputError(
                f"{self.shards.location} holds an image that does not decode ({first_line(error)}): find it with "
                "`modan-fast verify`"
            ) from error
        labels = np.stack([np.frombuffer(sample.labels, np.uint8) for sample in batch.samples])
        targets = np.array([int.from_bytes(sample.target, "little") for sample in batch.samples], np.int64)
        tensors = (pixels, torch.from_numpy(labels), torch.from_numpy(targets))
        return PixelBatch(batch.ids, *(each.pin_memory() if self._pinned else each for each in tensors))

    def _decoded(self, id_batches: Sequence[Ids]) -> Generator[PixelBatch, None, None]:
        return one_ahead(self.read(id_batches), self.submit, self.collect)

    def _in_order(self, order: Ids) -> Iterator[StoredSample]:
        """The samples with the ids `order`; a shard is read when its first sample is due."""
        never = len(order)
        due = np.full(self._starts[-1], never)
        due[order] = np.arange(len(order))
        first_due = np.minimum.reduceat(due, self._starts[:-1])
        wanted = due < never
        arriving = self._read(shard for shard in np.argsort(first_due, kind="stable") if first_due[shard] < never)
        waiting: dict[int, StoredSample] = {}
        for sample in order.tolist():
            while sample not in waiting:
                number, stored = next(arriving)
                if wanted[number]:
                    waiting[number] = stored
            yield waiting.pop(sample)

    def _read(self, shards: Iterable[int]) -> Iterator[tuple[int, StoredSample]]:
        """The ids and members of all samples of these shards, shard by shard."""
        from webdataset.tariterators import tarfile_samples

        for shard in shards:
            url, expected = self.shards.shard_url(shard), self._starts[shard]
            # The metadata is for readers of the tar; training does not need it.
            opened = tarfile_samples([{"url": url}], select_files=lambda name: not name.endswith(".json"))
            try:
                for number, sample in enumerate(opened, expected):
                    if sample["__key__"] != f"{number:08}":
                        raise ValueError(f"sample {sample['__key__']} where {number:08} belongs")
                    yield number, StoredSample(sample[self._extension], sample["labels"], sample["target"])
                    expected = number + 1
                if expected != self._starts[shard + 1]:
                    raise ValueError(f"it ends after {expected - self._starts[shard]} samples")
            except Exception as error:  # raised by the library, a program that it starts, or the tar's reader
                raise InputError(
                    f"{url} cannot be read ({first_line(error)}): check it with `modan-fast verify`"
                ) from error
