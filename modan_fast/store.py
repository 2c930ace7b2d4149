"""Decode once: the pixels of a whole shard set as uint8, in sample order, on the GPU or in host memory.

What does not fit there is streamed, and read and decoded anew each epoch.

S samples, C x C canvas, K label bits.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from modan_fast import config
from modan_fast.shards import ShardSet, first_line
from modan_fast.stream import Ids, Samples, Stream
from shard_builder.settings import InputError, Progress, no_progress

log = logging.getLogger(__name__)

READ_BATCH = 64  # images decoded at a time
# Shares of the free memory that pixels may take; the rest is for activations, and for the machine's other users.
GPU_SHARE, HOST_SHARE = 0.5, 0.8
TITLES = {"gpu": "on the GPU", "host": "in host memory"}

Place = Literal["gpu", "host"]


class Store(Protocol):
    """What the loader needs of a place that holds samples: in memory, or in the tars themselves."""

    @property
    def tier(self) -> str:
        """Where samples are kept, as `--store` calls it."""

    @property
    def canvas(self) -> int:
        """Side of the stored images in pixels."""

    @property
    def counts(self) -> list[int]:
        """The samples of each shard."""

    def fetch(self, parts: Sequence[Ids]) -> Generator[Samples, None, None]:
        """The samples of each part, in its order."""


class NoRoomError(Exception):
    """The pixels do not fit into a tier. The message says why."""


@dataclass(frozen=True)
class Memory:
    """All samples of a shard set, decoded.

    `pixels` (S, C, C) uint8 lie on the GPU or in host memory; `labels` (S, K) uint8, 0/1, and `targets` (S,)
    int64, class indices, lie on the training device. `counts` holds the samples of each shard.
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

    def fetch(self, parts: Sequence[Ids]) -> Generator[Samples, None, None]:
        """The samples of each part, in its order, on the training device."""
        device = self.labels.device
        # At once, because a GPU does all that it was given before it takes what is not pinned.
        rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts])).to(device)
        copies = torch.cuda.Stream(device) if self.pixels.is_pinned() else None
        for ids, there in zip(parts, rows.split([len(ids) for ids in parts]), strict=True):
            pixels: Tensor | list[Tensor]
            if device.type == "cpu":
                pixels = [
                    self.pixels[sample] for sample in ids.tolist()
                ]  # gathered, they would be copied for nothing
            elif copies is not None:
                # Row by row, straight from the store: gathered first, they would be copied twice. Beside the training
                # that is under way, in a stream of their own.
                training = torch.cuda.current_stream(device)
                with torch.cuda.stream(copies):
                    pixels = torch.empty((len(ids), self.canvas, self.canvas), dtype=torch.uint8, device=device)
                    for row, sample in zip(pixels, ids.tolist(), strict=True):
                        row.copy_(self.pixels[sample], non_blocking=True)
                training.wait_stream(copies)
                pixels.record_stream(training)
            else:
                pixels = self.pixels[there]
            yield Samples(ids, pixels, self.labels[there], self.targets[there])


def open_store(
    shards: ShardSet,
    *,
    tier: config.Tier = "auto",
    renderer: config.Renderer = "auto",
    device: torch.device,
    batch_size: int,
    threads: int,
    progress: Progress = no_progress,
) -> Store:
    """Decode every sample once and keep it on the GPU or else in host memory; or else stream the samples.

    Says what it chose and why. Up to `batch_size` samples are fetched at a time; `renderer` says what decodes
    them. Raises `InputError` where a shard is damaged, or where the samples do not fit where `tier` says.
    """
    if tier == "gpu" and device.type != "cuda":
        raise InputError("--store gpu needs a GPU that torch can use: pass --store host")
    places: tuple[Place, ...] = ("gpu", "host") if device.type == "cuda" else ("host",)
    for place in places:
        if tier in ("auto", place):
            try:
                return read_all(
                    shards, place=place, renderer=renderer, device=device, threads=threads, progress=progress
                )
            except NoRoomError as error:
                if tier != "auto":
                    raise InputError(
                        f"--store {tier}: {error}: leave the option out, or pass --store stream"
                    ) from None
                log.warning("store: not %s, because %s", TITLES[place], error)
    log.info("store: streamed from %s", shards.place)
    return Stream(shards, renderer=renderer, batch_size=batch_size, threads=threads, pinned=device.type == "cuda")


def read_all(
    shards: ShardSet,
    *,
    place: Place = "host",
    renderer: config.Renderer = "auto",
    device: torch.device,
    threads: int,
    progress: Progress = no_progress,
) -> Memory:
    """Decode every sample once. Pixels in host memory are pinned where `device` is a GPU.

    Raises `InputError` where a shard is damaged, and `NoRoomError` where the pixels do not fit into `place`.
    """
    manifest = shards.manifest
    samples, canvas = manifest.samples, manifest.size
    pinned = place == "host" and device.type == "cuda"
    size = samples * canvas**2
    # Torch pins memory in powers of two.
    check_room(place, 1 << (size - 1).bit_length() if pinned else size, device)
    if not shards.remote:
        manifest.check_hashes(Path(shards.place), progress)
    try:
        pixels = torch.empty(
            (samples, canvas, canvas),
            dtype=torch.uint8,
            device=device if place == "gpu" else "cpu",
            pin_memory=pinned,
        )
    except RuntimeError as error:  # of which torch's out-of-memory errors are kinds
        raise NoRoomError(first_line(error)) from None
    labels = torch.empty((samples, manifest.bits), dtype=torch.uint8)
    targets = torch.empty(samples, dtype=torch.int64)
    stream = Stream(shards, renderer=renderer, batch_size=READ_BATCH, threads=threads)
    with closing(stream.first(samples)) as read:
        for each in read:
            assert isinstance(each.pixels, Tensor)
            here = slice(each.ids[0], each.ids[-1] + 1)
            pixels[here], labels[here], targets[here] = each.pixels, each.labels, each.targets
            progress("decoding", here.stop, samples, "")
            # The system gives memory out when it is first written to, and may by then have none left.
            left = (samples - here.stop) * canvas**2
            if place == "host" and not pinned and left > (free := psutil.virtual_memory().available):
                raise NoRoomError(f"other programs left {_gib(free)} for the last {_gib(left)} of pixels")
    return Memory(pixels, labels.to(device), targets.to(device), shards.counts)


def check_room(place: Place, size: int, device: torch.device) -> None:
    """Say that `size` bytes of pixels fit into the free memory of a place; raises `NoRoomError` where they do not."""
    if place == "gpu":
        free, share = torch.cuda.mem_get_info(device)[0], GPU_SHARE
    else:
        free, share = psutil.virtual_memory().available, HOST_SHARE
    if size > share * free:
        raise NoRoomError(f"{_gib(size)} of pixels are over {share:.0%} of the {_gib(free)} that are free")
    log.info("store: %s (%s of pixels, %s free)", TITLES[place], _gib(size), _gib(free))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
