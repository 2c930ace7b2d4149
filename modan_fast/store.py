"""Where decoded pixels are kept: on the GPU or in host memory, decoded once; a set that does not fit is streamed.

S samples of C x C pixels, K label bits.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor

from modan_fast.config import RendererName, Tier
from modan_fast.devices import pixel_budget
from modan_fast.ranks import ONE, Ranks
from modan_fast.shards import ShardSet, first_line
from modan_fast.stream import READ_AHEAD, Ids, PixelBatch, Stream, Uploader
from shard_builder.settings import InputError, Progress, no_progress

log = logging.getLogger(__name__)

READ_BATCH = 64  # images decoded at a time
PIECE = 2**28  # bytes that are copied to a GPU at a time
TIER_NAMES = {"gpu": "on the GPU", "host": "in host memory"}

MemoryTier = Literal["gpu", "host"]
Result = TypeVar("Result")


class Store(Protocol):
    """Holds or reads the samples of a shard set, for the loader."""

    @property
    def tier(self) -> str:
        """`gpu`, `host` or `stream`."""

    @property
    def canvas(self) -> int:
        """Side of the stored images in pixels."""

    @property
    def counts(self) -> list[int]:
        """The number of samples in each shard."""

    def fetch(self, id_batches: Sequence[Ids]) -> Generator[PixelBatch, None, None]:
        """The batches of samples with these ids, in order."""


class NoRoomError(Exception):
    """The pixels do not fit into a tier; the message gives the reason."""


@dataclass(frozen=True)
class InMemoryStore:
    """All samples of a shard set, decoded.

    `pixels` (S, C, C) uint8 lie on the GPU or in host memory; `labels` (S, K) uint8, 0/1, and `targets` (S,)
    int64, class indices, lie on the training device. `counts` holds the number of samples in each shard.
    """

    pixels: Tensor
    labels: Tensor
    targets: Tensor
    counts: list[int]

    @property
    def tier(self) -> str:
        """See `Store.tier`."""
        return "gpu" if self.pixels.is_cuda else "host"

    @property
    def canvas(self) -> int:
        """Side of the stored images in pixels."""
        return self.pixels.shape[1]

    def fetch(self, id_batches: Sequence[Ids]) -> Generator[PixelBatch, None, None]:
        """The batches of samples with these ids, in order, on the training device."""
        device = self.labels.device
        # One upload for all batches: an upload from unpinned memory waits until the GPU has finished its work.
        rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *id_batches])).to(device)
        gathered = self._gathered(id_batches)
        with closing(gathered):
            for ids, on_device in zip(id_batches, rows.split([len(ids) for ids in id_batches]), strict=True):
                pixels = self.pixels[on_device] if self.pixels.is_cuda else next(gathered)
                yield PixelBatch(ids, pixels, self.labels[on_device], self.targets[on_device])

    def _gathered(self, id_batches: Sequence[Ids]) -> Generator[Tensor | list[Tensor], None, None]:
        """The pixels of batches in host memory, on the training device."""
        if self.labels.device.type == "cpu":
            for ids in id_batches:
                yield [self.pixels[sample] for sample in ids.tolist()]  # views of the store: no copy
            return
        upload = Uploader(self.labels.device)
        with upload.thread("gather") as gatherer:
            ahead: deque[Future[Tensor]] = deque()
            try:
                for number in range(len(id_batches)):
                    for ids in id_batches[number + len(ahead) : number + 1 + READ_AHEAD]:
                        ahead.append(gatherer.submit(self._pinned, ids))
                    (pixels,) = upload(ahead.popleft().result())
                    yield pixels
            finally:
                gatherer.shutdown(cancel_futures=True)

    def _pinned(self, ids: Ids) -> Tensor:
        """The pixels of a batch in pinned memory, which torch uses again once its copy to the GPU has ended."""
        pixels = torch.empty((len(ids), self.canvas, self.canvas), dtype=torch.uint8, pin_memory=True)
        return torch.index_select(self.pixels, 0, torch.from_numpy(ids), out=pixels)


def open_store(
    shards: ShardSet,
    *,
    tier: Tier = "auto",
    renderer: RendererName = "auto",
    device: torch.device,
    batch_size: int,
    threads: int,
    ranks: Ranks = ONE,
    progress: Progress = no_progress,
) -> Store:
    """Decode every sample once and keep it on the GPU, else in host memory; or else stream the samples.

    Logs the choice and its reason. Batches have up to `batch_size` samples; `renderer` chooses the decoder. Raises
    `InputError` if a shard is damaged, or if the samples do not fit into the `tier` asked for. All `ranks` must call it
    together, and all raise if one does.
    """
    if tier == "gpu" and device.type != "cuda":
        raise InputError("`store=gpu` needs a GPU that torch can use: pass `store=host`")
    candidates: tuple[MemoryTier, ...] = ("gpu", "host") if device.type == "cuda" else ("host",)
    for candidate in candidates:
        if tier in ("auto", candidate):
            try:
                return read_all(
                    shards,
                    tier=candidate,
                    renderer=renderer,
                    device=device,
                    threads=threads,
                    ranks=ranks,
                    progress=progress,
                )
            except NoRoomError as error:
                if tier != "auto":
                    raise InputError(
                        f"`store={tier}`: {error}: leave the setting out, or pass `store=stream`"
                    ) from None
                log.warning("store: not %s, because %s", TIER_NAMES[candidate], error)
    log.info("store: streamed from %s", shards.shown_location)
    return Stream(shards, renderer=renderer, batch_size=batch_size, threads=threads, device=device)


def read_all(
    shards: ShardSet,
    *,
    tier: MemoryTier = "host",
    renderer: RendererName = "auto",
    device: torch.device,
    threads: int,
    ranks: Ranks = ONE,
    progress: Progress = no_progress,
) -> InMemoryStore:
    """Decode every sample once into a tier.

    The ranks of a machine decode a share each, into memory that all of them use; where they cannot share memory, each
    keeps all samples. All ranks must call it together.

    Raises `InputError` if a shard is damaged, and `NoRoomError` if the pixels do not fit; of several ranks, all raise.
    """
    manifest, canvas = shards.manifest, shards.manifest.size
    samples, pixel_bytes = manifest.samples, manifest.samples * canvas**2
    size = pixel_bytes + samples * (manifest.bits + 8)  # with labels and targets
    shared = share_memory(size + 1, ranks)
    copies = 1 if shared is not None else ranks.local_size

    def make() -> Tensor:
        check_room(tier, size * (1 if tier == "gpu" else copies), device)
        if tier == "host" and shared is not None:
            return torch.empty(0, dtype=torch.uint8)
        try:
            return torch.empty(
                (samples, canvas, canvas), dtype=torch.uint8, device=device if tier == "gpu" else "cpu"
            )
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise NoRoomError(first_line(error)) from None

    pixels = with_room(make, ranks)
    if tier == "gpu" and not has_room(size, ranks):
        shared = None  # then each rank decodes all samples for its own GPU
    if shared is None:
        labels = torch.empty((samples, manifest.bits), dtype=torch.uint8)
        targets = torch.empty(samples, dtype=torch.int64)
        filled, first, last = pixels, 0, len(shards.counts)
        ended = torch.zeros(1, dtype=torch.uint8)
    else:
        parts = torch.frombuffer(shared, dtype=torch.uint8).split(
            [8 * samples, pixel_bytes, samples * manifest.bits, 1]
        )
        targets, filled = parts[0].view(torch.int64), parts[1].view(samples, canvas, canvas)
        labels, ended = parts[2].view(samples, manifest.bits), parts[3]
        first, last = (len(shards.counts) * (ranks.local_rank + each) // ranks.local_size for each in (0, 1))
    stream = Stream(shards, renderer=renderer, batch_size=READ_BATCH, threads=threads, whole=True)

    def fill() -> None:
        before, count = int(stream.starts[first]), int(stream.starts[last] - stream.starts[first])
        try:
            with closing(stream.fetch_first(count, before)) as batches:
                for batch in batches if count else ():
                    assert isinstance(batch.pixels, Tensor)
                    rows = slice(batch.ids[0], batch.ids[-1] + 1)
                    filled[rows], labels[rows], targets[rows] = batch.pixels, batch.labels, batch.targets
                    done = rows.stop - before
                    progress("decoding", done, count, "")
                    if ended.item():
                        return  # another rank has failed, which this one is told below
                    # The system provides memory at the first write to it, and may have run out by then.
                    left = (count - done) * canvas**2 * ranks.local_size
                    if not filled.is_cuda and left > (free := psutil.virtual_memory().available):
                        raise NoRoomError(f"other programs left {_gib(free)} for the last {_gib(left)} of pixels")
        except BaseException:
            ended.fill_(1)
            raise

    with_room(fill, ranks)
    if tier == "host":
        pixels = filled
    elif filled is not pixels:
        for piece in range(0, samples, step := max(1, PIECE // canvas**2)):
            pixels[piece : piece + step].copy_(filled[piece : piece + step])
    return InMemoryStore(pixels, labels.to(device), targets.to(device), shards.counts)


def with_room(work: Callable[[], Result], ranks: Ranks) -> Result:
    """`work()` on every rank, as `Ranks.together`; if it raises `NoRoomError` on one, all raise that."""

    def tried() -> tuple[Result | None, str]:
        try:
            return work(), ""
        except NoRoomError as error:
            return None, str(error)

    result, _ = found = ranks.together(tried)
    if reasons := [reason for reason in ranks.all(found[1]) if reason]:
        raise NoRoomError(reasons[0])
    return result  # type: ignore[return-value]


def has_room(size: int, ranks: Ranks) -> bool:
    """Whether every machine has host memory for `size` bytes of pixels."""
    return all(ranks.all(size <= pixel_budget("host", torch.device("cpu"))[0]))


def share_memory(size: int, ranks: Ranks) -> mmap.mmap | None:
    """Memory that the ranks of a machine share, without a name that others could open.

    None if there is one rank on each machine, or if one machine's ranks cannot share memory. It is freed when no rank
    uses it any more, however they end.
    """
    if ranks.size == 1:
        return None
    with ExitStack() as held:
        own = None
        if ranks.local_size > 1 and ranks.local_rank == 0 and hasattr(os, "memfd_create"):
            with suppress(OSError):
                descriptor = os.memfd_create("modan-fast")
                held.callback(os.close, descriptor)
                os.truncate(descriptor, size)
                own = f"/proc/{os.getpid()}/fd/{descriptor}", os.fstat(descriptor).st_ino
        told, memory = ranks.all(own)[ranks.rank - ranks.local_rank], None
        if told is not None:
            path, inode = told
            with suppress(OSError), open(path, "r+b") as file:
                # In a container of its own a rank may see other processes by these numbers.
                if os.fstat(file.fileno()).st_ino == inode and os.fstat(file.fileno()).st_size == size:
                    memory = mmap.mmap(file.fileno(), size)
        shared = all(ranks.all(memory is not None or ranks.local_size == 1))
    if not shared:
        log.warning("store: the ranks of a machine cannot share memory here, so each keeps all pixels")
    return memory if shared else None


def check_room(tier: MemoryTier, size: int, device: torch.device) -> None:
    """Log that `size` bytes of pixels fit into the free memory of a tier; raise `NoRoomError` if they do not."""
    budget, free = pixel_budget(tier, device)
    if size > budget:
        raise NoRoomError(
            f"{_gib(size)} of pixels are over {budget / max(free, 1):.0%} of the {_gib(free)} that are free"
        )
    log.info("store: %s (%s of pixels, %s free)", TIER_NAMES[tier], _gib(size), _gib(free))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
