"""Samples straight from the tars, on local disks or behind URLs: read in any order, decoded in the background.

Of a set in a folder each sample is read by its offset in the shard's index, when it is due. Of a set behind a URL whole
shards are read, and each is compared with its checksum before it is used.

N samples of C x C pixels, K label bits.
"""

from __future__ import annotations

import os
import tarfile
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import psutil
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from modan_fast.ahead import one_ahead
from modan_fast.config import RendererName
from modan_fast.decode import Pixels, Stored, check_header, decode_into, open_decoder, png_start
from modan_fast.shards import ShardSet, first_line
from shard_builder.manifest import EXTENSIONS
from shard_builder.settings import InputError

READ_AHEAD = 2  # batches that are read and decoded before they are asked for
ADVISED = 4  # batches that the system is told of before they are read, so that it reads them meanwhile
IN_FLIGHT = 4  # whole shards that are read at the same time
MOST_OPEN = 128  # files of a set in a folder; a process may have some hundred
LARGE = 2**28  # bytes of a batch above which the free memory is asked for first
BLOCK = tarfile.BLOCKSIZE
CPU = torch.device("cpu")

Ids = NDArray[np.int64]
Sizes = TypeVar("Sizes", int, NDArray[np.int64])


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


@dataclass(frozen=True)
class StoredBatch:
    """N samples, not yet decoded: `ids` (N,), the stored bytes of N images, `labels` (N, K) 0/1, `targets` (N,)."""

    ids: Ids
    images: list[Stored]
    labels: NDArray[np.uint8]
    targets: NDArray[np.int64]

    @property
    def samples(self) -> Iterator[StoredSample]:
        """The samples one by one, as they are stored."""
        for image, labels, target in zip(self.images, self.labels, self.targets, strict=True):
            yield StoredSample(bytes(image), labels.tobytes(), int(target).to_bytes(4, "little"))


class Stream:
    """A shard set of any size, read anew each epoch."""

    tier = "stream"

    def __init__(
        self,
        shards: ShardSet,
        *,
        renderer: RendererName,
        batch_size: int,
        threads: int,
        device: torch.device = CPU,
        whole: bool = False,
    ) -> None:
        """`batch_size` is the size of the largest batch; `renderer` chooses the decoder; batches arrive on `device`.

        With `whole`, and always behind a URL, whole shards are read and compared with their checksums. Else the samples
        are read by their offsets.
        """
        self.shards, self.device, self._batch_size = shards, device, batch_size
        manifest = shards.manifest
        self.canvas, self.counts = manifest.size, shards.counts
        self.extension = EXTENSIONS[manifest.codec]
        self.starts = np.cumsum([0, *self.counts])
        # Windows has no `preadv`.
        self._by_offset = None if whole or shards.remote or not hasattr(os, "preadv") else _ByOffset(self)
        self._decoder = open_decoder(
            renderer, codec=manifest.codec, size=manifest.size, batch_size=batch_size, threads=threads
        )

    def fetch(self, id_batches: Sequence[Ids]) -> Generator[PixelBatch, None, None]:
        """The batches of samples with these ids, in order; the next ones are read and decoded in the background.

        Raises `InputError` if a shard cannot be read, does not match the manifest, or holds an image that does not
        decode. To close the generator takes no longer than a batch needs to be decoded, also while a server keeps it
        waiting.
        """
        stop, upload = threading.Event(), Uploader(self.device)
        with (
            closing(one_ahead(self.read(id_batches, stop), self.submit, self.collect)) as decoded,
            upload.thread("stream") as reader,
        ):
            ahead = deque(reader.submit(next, decoded, None) for _ in range(READ_AHEAD))
            try:
                while (batch := ahead.popleft().result()) is not None:
                    ahead.append(reader.submit(next, decoded, None))
                    assert isinstance(batch.pixels, Tensor)
                    pixels, labels, targets = upload(batch.pixels, batch.labels, batch.targets)
                    yield PixelBatch(batch.ids, pixels, labels, targets)
            finally:
                stop.set()
                reader.shutdown(cancel_futures=True)

    def fetch_first(self, count: int, after: int = 0) -> Generator[PixelBatch, None, None]:
        """The first `count` samples in storage order, or those `after` so many, in batches. Raises as `fetch`."""
        ids = np.arange(after, after + count)
        return self.fetch(np.split(ids, range(self._batch_size, count, self._batch_size)))

    def read(
        self, id_batches: Sequence[Ids], stop: threading.Event | None = None
    ) -> Generator[StoredBatch, None, None]:
        """The batches with these ids, not yet decoded. Ends soon, with `CancelledError`, after `stop` is set."""
        if self._by_offset is not None:
            yield from self._by_offset.read(id_batches)
            return
        order = np.concatenate([np.empty(0, np.int64), *id_batches])
        with closing(self._in_order(order, stop or threading.Event())) as samples:
            for ids in id_batches:
                yield self.batch_of(ids, list(islice(samples, len(ids))))

    def batch_of(self, ids: Ids, samples: Sequence[StoredSample]) -> StoredBatch:
        """A batch of checked samples."""
        labels = np.frombuffer(bytearray().join(each.labels for each in samples), np.uint8)
        targets = np.frombuffer(b"".join(each.target for each in samples), "<u4").astype(np.int64)
        bits = self.shards.manifest.bits
        return StoredBatch(ids, [each.image for each in samples], labels.reshape(len(ids), bits), targets)

    def submit(self, batch: StoredBatch) -> None:
        """Start decoding a batch."""
        if batch.images:
            self._decoder.submit(batch.images)

    def collect(self, batch: StoredBatch) -> PixelBatch:
        """The oldest submitted batch, decoded; raises `InputError` if an image in it is damaged."""
        shape = (len(batch.ids), self.canvas, self.canvas)
        try:
            pixels = self._decoder.collect() if batch.images else np.empty(shape, np.uint8)
            if pixels.shape != shape:
                raise ValueError(f"{pixels.shape} pixels where {shape} belong")
        except Exception as error:  # a decoder raises anything on damaged files
            raise InputError(
                f"{self._undecodable(batch)} ({first_line(error)}): find what is damaged with `modan-fast verify`"
            ) from error
        tensors = map(torch.from_numpy, (pixels, batch.labels, batch.targets))
        pinned = self.device.type == "cuda"  # so that the host does not wait for the copy to the GPU
        return PixelBatch(batch.ids, *(each.pin_memory() if pinned else each for each in tensors))

    def _undecodable(self, batch: StoredBatch) -> str:
        """Where an image that does not decode is, if it can be found."""
        for number, image in zip(batch.ids.tolist(), batch.images, strict=True):
            try:
                decode_into(np.empty((self.canvas, self.canvas), np.uint8), image, self.shards.manifest.codec)
            except Exception:  # a decoder raises anything on damaged files
                return f"{self.place(number)} holds an image that does not decode"
        return f"{self.shards.shown_location} holds an image that does not decode"

    def place(self, number: int) -> str:
        """Shard and sample, for people."""
        shard = int(np.searchsorted(self.starts, number, "right")) - 1
        return f"{self.shards.shown(shard)}: sample {number:08}"

    def unusable(self, number: int, why: object) -> InputError:
        """The error of a sample that is not what its manifest says."""
        return InputError(f"{self.place(number)} cannot be used: {why}; shard the source again")

    def _in_order(self, order: Ids, stop: threading.Event) -> Generator[StoredSample, None, None]:
        """The samples with the ids `order`; a shard is read when its first sample is due.

        Each shard is read once; its samples wait in memory until they are due. Of several ranks each reads every shard
        that holds a sample of its own: all of them.
        """
        never = len(order)
        due = np.full(self.starts[-1], never)
        due[order] = np.arange(len(order))
        first_due = np.minimum.reduceat(due, self.starts[:-1])
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
        """The ids and members of all samples of these shards, shard by shard; the next shards are read meanwhile."""
        largest, free = (
            max(shard.bytes for shard in self.shards.manifest.shards),
            psutil.virtual_memory().available,
        )
        # One in use, and the next ones; more than one of these only within half of the free memory.
        if 2 * largest > free:
            raise InputError(
                f"{self.shards.shown_location} has shards of {largest / 2**30:.1f} GiB, two of which do not "
                f"fit into the {free / 2**30:.1f} GiB of free memory: shard with smaller `samples_per_shard`"
            )
        flying = max(1, min(IN_FLIGHT, free // 2 // max(1, largest) - 1))
        with ThreadPoolExecutor(flying, thread_name_prefix="shard") as reader:
            ahead: deque[Future[bytes]] = deque()
            try:
                for number, shard in enumerate(shards):
                    for each in shards[number + len(ahead) : number + 1 + flying]:
                        ahead.append(reader.submit(self.shards.read, each, stop))
                    yield from self._samples(shard, ahead.popleft().result())
            finally:
                stop.set()
                reader.shutdown(cancel_futures=True)

    def _samples(self, shard: int, content: bytes) -> Generator[tuple[int, StoredSample], None, None]:
        """The ids and members of the samples in a shard's bytes, checked."""
        at = 0
        for number in range(self.starts[shard], self.starts[shard + 1]):
            try:
                sample, at = self.sample(content, at, number)
                _, at = member(content, at, f"{number:08}.json")  # for readers of the tar
            except ValueError as error:
                raise self.unusable(number, error) from None
            yield number, sample
        if content.count(0, at) != len(content) - at:
            raise InputError(
                f"{self.shards.shown(shard)} holds more than the {self.counts[shard]} samples of its manifest: shard "
                "the source again"
            )

    def sample(self, content: bytes, at: int, number: int) -> tuple[StoredSample, int]:
        """The sample whose first header is at byte `at`, and where the header after it is.

        Raises `ValueError` if it is not what the manifest says.
        """
        manifest = self.shards.manifest
        image, at = member(content, at, f"{number:08}.{self.extension}")
        labels, at = member(content, at, f"{number:08}.labels")
        target, at = member(content, at, f"{number:08}.target")
        check_header(image, manifest.codec, manifest.size)
        if len(labels) != manifest.bits or labels.strip(b"\0\1"):
            raise ValueError(f"its labels are not {manifest.bits} bytes of 0 or 1")
        if len(target) != 4 or int.from_bytes(target, "little") >= len(manifest.classes):
            raise ValueError(f"its target is not the number of one of {len(manifest.classes)} classes")
        return StoredSample(image, labels, target), at


class _Places(NamedTuple):
    """Where the N samples of a batch are: `shards` (N,), the `offsets` (N,) of their first headers, `sizes` (N,) of
    their images, and `lengths` (N,) up to the end of their targets, in bytes.
    """

    shards: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    lengths: NDArray[np.int64]


class _ByOffset:
    """Reads samples of a set in a folder by their offsets. Of each sample two numbers are kept, 16 bytes.

    A sample's checks are those of `Stream.sample`, made for a whole batch at a time: a sample that passes them for sure
    is used, and all others are looked at one by one.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream, self.shards = stream, stream.shards
        self._starts = stream.starts
        samples, manifest = int(self._starts[-1]), stream.shards.manifest
        self._offsets, self._sizes = np.empty(samples, np.int64), np.empty(samples, np.int64)
        self._known = np.zeros(len(stream.counts), bool)  # shards whose index was read
        self._labels_to_target = BLOCK + padded(manifest.bits)
        self._after_image = 2 * BLOCK + self._labels_to_target + 4

    def read(self, id_batches: Sequence[Ids]) -> Generator[StoredBatch, None, None]:
        """The batches of samples with these ids, in order."""
        files: dict[int, BufferedReader] = {}
        places: deque[_Places] = deque()
        try:
            for number, ids in enumerate(id_batches):
                for each in id_batches[number + len(places) : number + 1 + ADVISED]:
                    places.append(self._find(each))
                    if len(places) > 1:
                        self._advise(places[-1], files)
                yield self._batch(ids, places.popleft(), files)
        finally:
            for file in files.values():
                file.close()

    def _find(self, ids: Ids) -> _Places:
        shards = np.searchsorted(self._starts, ids, "right") - 1
        for shard in np.unique(shards[~self._known[shards]]).tolist():
            self._learn(shard)
        sizes = self._sizes[ids]
        return _Places(shards, self._offsets[ids] - BLOCK, sizes, padded(sizes) + self._after_image)

    def _learn(self, shard: int) -> None:
        """Read the index of a shard. Its samples must follow one another within the tar, as it has them."""
        offsets, sizes = self.shards.places(shard).T
        first, bytes_ = int(self._starts[shard]), self.shards.manifest.shards[shard].bytes
        ends = offsets + padded(sizes) + self._after_image - BLOCK
        wrong = (offsets < BLOCK) | (ends > np.append(offsets[1:] - BLOCK, bytes_))
        if wrong.any():
            number = int(wrong.argmax())
            raise self.stream.unusable(
                first + number,
                f"its index has {sizes[number]:,} bytes at byte {offsets[number]:,}, which do not fit between the "
                "samples beside it",
            )
        rows = slice(first, first + len(offsets))
        self._offsets[rows], self._sizes[rows], self._known[shard] = offsets, sizes, True

    def _file(self, shard: int, files: dict[int, BufferedReader]) -> int:
        """The descriptor of a shard, opened if it is not among `files`; the last used is the last of them."""
        file = files.pop(shard, None) or self.shards.open(shard)
        files[shard] = file
        if len(files) > MOST_OPEN:
            files.pop(next(iter(files))).close()
        return file.fileno()

    def _advise(self, places: _Places, files: dict[int, BufferedReader]) -> None:
        """Let the system read the samples of a batch meanwhile, many at a time."""
        if not hasattr(os, "posix_fadvise"):
            return
        for shard in np.unique(places.shards).tolist():
            descriptor, chosen = self._file(shard, files), places.shards == shard
            for offset, length in zip(
                places.offsets[chosen].tolist(), places.lengths[chosen].tolist(), strict=True
            ):
                os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def _batch(self, ids: Ids, places: _Places, files: dict[int, BufferedReader]) -> StoredBatch:
        """Read and check a batch."""
        total, manifest = int(places.lengths.sum()), self.shards.manifest
        if total > LARGE and total > (free := psutil.virtual_memory().available):
            raise InputError(
                f"{self.shards.shown_location}: the {len(ids):,} images of a batch have {total / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB of memory are free: choose a smaller `batch_size`"
            )
        content, ends = np.empty(total, np.uint8), np.cumsum(places.lengths)
        at = ends - places.lengths
        self._fill(content, at, places, files)
        labels_at = at + BLOCK + padded(places.sizes)
        target_at = labels_at + self._labels_to_target
        labels = rows_of(content, labels_at + BLOCK, manifest.bits)
        targets = rows_of(content, target_at + BLOCK, 4).view("<u4")[:, 0].astype(np.int64)
        sure = (labels <= 1).all(1) & (targets < len(manifest.classes))
        sure &= self._has_header(content, at, ids, self.stream.extension, places.sizes)
        sure &= self._has_header(content, labels_at, ids, "labels", np.full_like(ids, manifest.bits))
        sure &= self._has_header(content, target_at, ids, "target", np.full_like(ids, 4))
        sure &= self._has_image(content, at + BLOCK, places.sizes)
        begins = at + BLOCK
        images: list[Stored] = [
            content[begin:end]
            for begin, end in zip(begins.tolist(), (begins + places.sizes).tolist(), strict=True)
        ]
        for row in np.flatnonzero(~sure).tolist():
            try:
                images[row] = self._slowly(content[at[row] : ends[row]], int(ids[row]), int(places.sizes[row]))
            except ValueError as error:
                raise self.stream.unusable(int(ids[row]), error) from None
        return StoredBatch(ids, images, labels, targets)

    def _fill(
        self, content: Pixels, at: NDArray[np.int64], places: _Places, files: dict[int, BufferedReader]
    ) -> None:
        """Read the samples into `content`, shard by shard; raises `InputError` if a shard cannot be read or is cut."""
        buffer = memoryview(content)  # type: ignore[arg-type]  # Python 3.11 has no type for what numpy offers
        for shard in np.unique(places.shards).tolist():
            rows = np.flatnonzero(places.shards == shard)
            descriptor = self._file(shard, files)
            pieces = zip(
                at[rows].tolist(), places.offsets[rows].tolist(), places.lengths[rows].tolist(), strict=True
            )
            try:
                for begin, offset, length in pieces:
                    read = os.preadv(descriptor, (buffer[begin : begin + length],), offset)
                    while read < length:  # a read may end early, at 2 GiB or after a signal
                        more = os.preadv(descriptor, (buffer[begin + read : begin + length],), offset + read)
                        if not more:
                            raise InputError(
                                f"{self.shards.shown(shard)} became shorter while it was read: copy it again or shard "
                                "the source again"
                            )
                        read += more
            except OSError as error:
                raise InputError(f"{self.shards.shown(shard)} cannot be read ({error.strerror})") from None

    def _has_header(
        self, content: Pixels, at: NDArray[np.int64], ids: Ids, ending: str, sizes: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether a header of an ordinary file with this name and size, as most programs write it, is at each place."""
        name, size = rows_of(content, at, 8 + len(ending) + 2), rows_of(content, at + 124, 12)
        digits = ids[:, None] // 10 ** np.arange(7, -1, -1) % 10 + ord("0")
        octal = (sizes[:, None] >> 3 * np.arange(10, -1, -1) & 7) + ord("0")
        found = (name[:, :8] == digits).all(1) & (
            name[:, 8:] == np.frombuffer(f".{ending}\0".encode(), "u1")
        ).all(1)
        found &= (size[:, :11] == octal).all(1) & (size[:, 11] == 0)
        found &= content[at + 156] == ord("0")
        return found

    def _has_image(
        self, content: Pixels, at: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> NDArray[np.bool_] | bool:
        """Whether an image that `check_header` lets pass begins at each place; a JPEG file's header is looked for."""
        manifest = self.shards.manifest
        if manifest.codec == "raw":
            return sizes == manifest.size**2
        if manifest.codec == "png":
            start = np.frombuffer(png_start(manifest.size), np.uint8)
            return (sizes >= len(start)) & (rows_of(content, at, len(start)) == start).all(1)
        return False

    def _slowly(self, content: Pixels, number: int, size: int) -> bytes:
        """The image of one sample; raises `ValueError` if the sample is not what manifest and index say."""
        sample, _ = self.stream.sample(content.tobytes(), 0, number)
        if len(sample.image) != size:
            raise ValueError(f"its index gives its image {size:,} bytes, and the tar {len(sample.image):,}")
        return sample.image


def rows_of(content: Pixels, starts: NDArray[np.int64], width: int) -> Pixels:
    """`width` bytes from each of `starts` (N,) on: (N, width), a copy."""
    if not width or not len(starts):
        return np.empty((len(starts), width), np.uint8)
    return sliding_window_view(content, width)[starts]


def padded(size: Sizes) -> Sizes:
    """Bytes that a member of `size` bytes fills in a tar."""
    return size + -size % BLOCK


class Uploader:
    """Copies tensors to a device. To a GPU in a stream of its own, so that the copies run beside the training step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors on the device; those in pinned memory without making the host wait."""
        if self._copies is None:
            return list(tensors)
        training = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            there = [each.to(self.device, non_blocking=True) for each in tensors]
        training.wait_stream(self._copies)
        for each in there:
            each.record_stream(training)
        return there

    def thread(self, name: str) -> ThreadPoolExecutor:
        """A thread that may make pinned memory: torch must know its GPU in each thread, or it would take the first."""
        if self._copies is None:
            return ThreadPoolExecutor(1, thread_name_prefix=name)
        return ThreadPoolExecutor(1, name, initializer=torch.cuda.set_device, initargs=(self.device,))


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
    start = at + BLOCK
    end = start + int(size, 8)
    if end > len(content):
        raise ValueError(f"{name} goes on after the end of the tar")
    return content[start:end], end + -end % BLOCK
