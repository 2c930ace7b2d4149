"""Samples straight from the tars, on local disks or behind URLs: read in any order, decoded in the background.

N samples, C x C canvas, K label bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modan_fast import config
from modan_fast.decode import open_decoder
from modan_fast.shards import ShardSet, first_line
from shard_builder.manifest import EXTENSIONS
from shard_builder.settings import InputError

AHEAD = 2  # batches that are read and decoded before they are asked for

Ids = NDArray[np.int64]
Encoded = tuple[bytes, bytes, bytes]  # members of a sample: image, labels, target


@dataclass(frozen=True)
class Samples:
    """N decoded samples: `ids` (N,), `pixels` (N, C, C) uint8, which may be a list of the images where they lie,
    `labels` (N, K) uint8, 0/1, and `targets` (N,) int64, class indices. The ids lie on the CPU, the rest anywhere.
    """

    ids: Ids
    pixels: Tensor | list[Tensor]
    labels: Tensor
    targets: Tensor


class Stream:
    """A shard set of any size, read anew each epoch through the webdataset library."""

    tier = "stream"

    def __init__(
        self,
        shards: ShardSet,
        *,
        renderer: config.Renderer,
        batch_size: int,
        threads: int,
        pinned: bool = False,
    ) -> None:
        """`batch_size` bounds the samples that are fetched at a time; `renderer` says what decodes them.

        `pinned` samples are copied to a GPU without its host's waiting for it.
        """
        self.shards, self._batch_size, self._pinned = shards, batch_size, pinned
        manifest = shards.manifest
        self.canvas, self.counts = manifest.size, shards.counts
        self._image = EXTENSIONS[manifest.codec]
        self._starts = np.cumsum([0, *self.counts])
        self.decoder = open_decoder(
            renderer, codec=manifest.codec, size=manifest.size, batch_size=batch_size, threads=threads
        )

    def fetch(self, parts: Sequence[Ids]) -> Generator[Samples, None, None]:
        """The samples of each part, in its order; the next ones are read and decoded in the background.

        Each shard is read once, and holds up samples in memory from the time it is read until they are due.
        Raises `InputError` where a shard cannot be read, is not the one that the manifest means, or holds an
        image that does not decode.
        """
        with (
            closing(self._decoded(parts)) as decoded,
            ThreadPoolExecutor(1, thread_name_prefix="stream") as reader,
        ):
            ahead = deque(reader.submit(next, decoded, None) for _ in range(AHEAD))
            try:
                while (samples := ahead.popleft().result()) is not None:
                    ahead.append(reader.submit(next, decoded, None))
                    yield samples
            finally:
                reader.shutdown(cancel_futures=True)

    def first(self, count: int) -> Generator[Samples, None, None]:
        """The first `count` samples in storage order, in parts of the batch size. Raises as `fetch`."""
        return self.fetch(np.split(np.arange(count), range(self._batch_size, count, self._batch_size)))

    def encoded(self, order: Ids) -> Iterator[Encoded]:
        """The members of the samples `order`; shards are read as the first of their samples is due."""
        never = len(order)
        due = np.full(self._starts[-1], never)
        due[order] = np.arange(len(order))
        first_due = np.minimum.reduceat(due, self._starts[:-1])
        wanted = due < never
        arriving = self._read(shard for shard in np.argsort(first_due, kind="stable") if first_due[shard] < never)
        waiting: dict[int, Encoded] = {}
        for sample in order.tolist():
            while sample not in waiting:
                number, members = next(arriving)
                if wanted[number]:
                    waiting[number] = members
            yield waiting.pop(sample)

    def collect(self, ids: Ids, members: Sequence[Encoded]) -> Samples:
        """The samples whose images were the oldest given to `decoder`; raises `InputError` where one is damaged."""
        try:
            pixels = torch.from_numpy(self.decoder.collect())
        except Exception as error:  # damaged files raise whatever the decoder stumbles over
            raise InputError(
                f"{self.shards.place} holds an image that does not decode ({first_line(error)}): "
                "modan-fast verify names it"
            ) from error
        labels = np.stack([np.frombuffer(labels, np.uint8) for _, labels, _ in members])
        targets = np.array([int.from_bytes(target, "little") for _, _, target in members], np.int64)
        tensors = (pixels, torch.from_numpy(labels), torch.from_numpy(targets))
        return Samples(ids, *(each.pin_memory() if self._pinned else each for each in tensors))

    def _decoded(self, parts: Sequence[Ids]) -> Generator[Samples, None, None]:
        encoded = self.encoded(np.concatenate([np.empty(0, np.int64), *parts]))
        decoding: tuple[Ids, list[Encoded]] | None = None
        try:
            for ids in parts:
                members = list(islice(encoded, len(ids)))  # read while the part before is decoded
                before, decoding = decoding, None
                done = self.collect(*before) if before else None
                self.decoder.submit([image for image, _, _ in members])
                decoding = ids, members
                if done:
                    yield done
            if decoding:
                before, decoding = decoding, None
                yield self.collect(*before)
        finally:
            if decoding:
                self.decoder.collect()  # so that it is empty for the next epoch

    def _read(self, shards: Iterable[int]) -> Iterator[tuple[int, Encoded]]:
        """The ids and members of all samples of these shards, one shard after the other."""
        from webdataset.tariterators import tarfile_samples

        for shard in shards:
            url, expected = self.shards.url(shard), self._starts[shard]
            # The metadata is for readers of the tar; training needs none of it.
            opened = tarfile_samples([{"url": url}], select_files=lambda name: not name.endswith(".json"))
            try:
                for number, sample in enumerate(opened, expected):
                    if sample["__key__"] != f"{number:08}":
                        raise ValueError(f"sample {sample['__key__']} where {number:08} belongs")
                    yield number, (sample[self._image], sample["labels"], sample["target"])
                    expected = number + 1
                if expected != self._starts[shard + 1]:
                    raise ValueError(f"it ends after {expected - self._starts[shard]} samples")
            except Exception as error:  # whatever the library, a program that it starts, or the tar makes of it
                raise InputError(
                    f"{url} cannot be read ({first_line(error)}): modan-fast verify checks it"
                ) from error
