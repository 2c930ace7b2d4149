"""Where decoded pixels are kept: on the GPU or in host memory, decoded once; a set that does not fit is streamed.

S samples of C x C pixels, K label bits.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from modan_fast.config import RendererName, Tier
from modan_fast.devices import pixel_budget
from modan_fast.shards import ShardSet, first_line
from modan_fast.stream import Ids, PixelBatch, Stream
from shard_builder.settings import InputError, Progress, no_progress

log = logging.getLogger(__name__)

READ_BATCH = 64  # images decoded at a time
TIER_NAMES = {"gpu": "on the GPU", "host": "in host memory"}

MemoryTier = Literal["gpu", "host"]


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
        copies = torch.cuda.Stream(device) if self.pixels.is_pinned() else None
        for ids, on_device in zip(id_batches, rows.split([len(ids) for ids in id_batches]), strict=True):
            pixels: Tensor | list[Tensor]
            if device.type == "cpu":
                pixels = [self.pixels[sample] for sample in ids.tolist()]  # views of the store: no copy
            elif copies is not None:
                # Row by row straight from the store, because gathering them first would be a second copy; in a stream
                # of its own, so that the copies run beside the training step.
                training = torch.cuda.current_stream(device)
                with torch.cuda.stream(copies):
                    pixels = torch.empty((len(ids), self.canvas, self.canvas), dtype=torch.uint8, device=device)
                    for row, sample in zip(pixels, ids.tolist(), strict=True):
                        row.copy_(self.pixels[sample], non_blocking=True)
                training.wait_stream(copies)
                pixels.record_stream(training)
            else:
                pixels = self.pixels[on_device]
            yield PixelBatch(ids, pixels, self.labels[on_device], self.targets[on_device])


def open_store(
    shards: ShardSet,
    *,
    tier: Tier = "auto",
    renderer: RendererName = "auto",
    device: torch.device,
    batch_size: int,
    threads: int,
    progress: Progress = no_progress,
) -> Store:
    """Decode every sample once and keep it on the GPU, else in host memory; or else stream the samples.

    Logs the choice and its reason. Batches have up to `batch_size` samples; `renderer` chooses the decoder. Raises
    `InputError` if a shard is damaged, or if the samples do not fit into the `tier` asked for.
    """
    if tier == "gpu" and device.type != "cuda":
        raise InputError("`store=gpu` needs a GPU that torch can use: pass `store=host`")
    candidates: tuple[MemoryTier, ...] = ("gpu", "host") if device.type == "cuda" else ("host",)
    for candidate in candidates:
        if tier in ("auto", candidate):
            try:
                return read_all(
                    shards, tier=candidate, renderer=renderer, device=device, threads=threads, progress=progress
                )
            except NoRoomError as error:
                if tier != "auto":
                    raise InputError(
                        f"`store={tier}`: {error}: leave the setting out, or pass `store=stream`"
                    ) from None
                log.warning("store: not %s, because %s", TIER_NAMES[candidate], error)
    log.info("store: streamed from %s", shards.shown_location)
    return Stream(shards, renderer=renderer, batch_size=batch_size, threads=threads, pinned=device.type == "cuda")


def read_all(
    shards: ShardSet,
    *,
    tier: MemoryTier = "host",
    renderer: RendererName = "auto",
    device: torch.device,
    threads: int,
    progress: Progress = no_progress,
) -> InMemoryStore:
    """Decode every sample once into a tier. Pixels in host memory are pinned if `device` is a GPU.

    Raises `InputError` if a shard is damaged, and `NoRoomError` if the pixels do not fit.
    """
    manifest = shards.manifest
    samples, canvas = manifest.samples, manifest.size
    pinned = tier == "host" and device.type == "cuda"
    size = samples * canvas**2
    # torch rounds pinned memory up to a power of two.
    size = 1 << (size - 1).bit_length() if pinned else size
    check_room(tier, size + samples * manifest.bits, device)
    try:
        pixels = torch.empty(
            (samples, canvas, canvas),
            dtype=torch.uint8,
            device=device if tier == "gpu" else "cpu",
            pin_memory=pinned,
        )
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        raise NoRoomError(first_line(error)) from None
    labels = torch.empty((samples, manifest.bits), dtype=torch.uint8)
    targets = torch.empty(samples, dtype=torch.int64)
    stream = Stream(shards, renderer=renderer, batch_size=READ_BATCH, threads=threads)
    with closing(stream.fetch_first(samples)) as batches:
        for batch in batches:
            assert isinstance(batch.pixels, Tensor)
            rows = slice(batch.ids[0], batch.ids[-1] + 1)
            pixels[rows], labels[rows], targets[rows] = batch.pixels, batch.labels, batch.targets
            progress("decoding", rows.stop, samples, "")
            # The system provides memory at the first write to it, and may have run out by then.
            left = (samples - rows.stop) * canvas**2
            if tier == "host" and not pinned and left > (free := psutil.virtual_memory().available):
                raise NoRoomError(f"other programs left {_gib(free)} for the last {_gib(left)} of pixels")
    return InMemoryStore(pixels, labels.to(device), targets.to(device), shards.counts)


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
