"""The batches of an epoch: order, store, augmentation and renderer put together.

B images a batch, V = 2B views (B for one view an image), H x H pixels, K label bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modan_fast.ahead import one_ahead
from modan_fast.augment import ViewParameters, sample_order, view_parameters
from modan_fast.config import Augmentation, PretrainConfig, RendererName, Tier
from modan_fast.devices import compute_type, pick_device
from modan_fast.ranks import ONE, Ranks
from modan_fast.render import Renderer, Rendering, open_renderer
from modan_fast.shards import ShardSet, open_shards
from modan_fast.store import Store, open_store
from modan_fast.stream import Ids, PixelBatch
from shard_builder.settings import InputError, Progress, no_progress


@dataclass(frozen=True)
class Batch:
    """`views` (V, 1, H, H) in [0, 1], channels-last, in the compute type; rows i and i + B show one image.
    `labels` (B, K) uint8, 0/1; `targets` (B,) int64, class indices; `ids` (B,) int64, sample ids, on the CPU.

    `counts` are the images of each rank in this step, by rank; B of them are here, which may be none. `()` means that
    all are here.
    """

    views: Tensor
    labels: Tensor
    targets: Tensor
    ids: Tensor
    counts: tuple[int, ...] = ()


ONE_IN, LEAST, MOST = 50, 64, 2000  # images that are held out for the monitor


def held_out(samples: int) -> int:
    """How many images of a set are the monitor's: those with the smallest ids, a random part, as sets are shuffled.

    One in `ONE_IN`, at most `MOST`; in small sets up to `LEAST`, but no more than a quarter.
    """
    return max(2, min(MOST, max(samples // ONE_IN, min(LEAST, samples // 4))))


class Loader:
    """The batches of any epoch, each a pure function of (seed, epoch, step).

    Iterating over it gives the batches of the next epoch, from epoch 0 on; `len` is the number of batches in one.
    Every sample comes exactly once an epoch; `drop_last` leaves out a last batch that is not full. `batch_size` counts
    the images of a step on all ranks together; each rank gets every `world_size`-th of them, so that a rank may have
    none in a last batch that is smaller than the number of ranks. The `held_out` samples with the smallest ids are left
    out; the others keep their order.
    """

    def __init__(
        self,
        store: Store,
        renderer: Renderer,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int = 0,
        drop_last: bool = False,
        views: int = 2,
        window: int = 2**14,
        rank: int = 0,
        world_size: int = 1,
        held_out: int = 0,
        rendering: Rendering | None = None,
    ) -> None:
        """`rendering` says what views are where a rank has none to render."""
        self.store, self.renderer, self.augmentation = store, renderer, augmentation
        self.batch_size, self.seed, self.drop_last, self.views = batch_size, seed, drop_last, views
        self.window, self.rank, self.world_size, self.rendering = window, rank, world_size, rendering
        self.held_out = held_out
        self._epochs = itertools.count()

    @property
    def samples(self) -> int:
        """The number of samples in an epoch, on all ranks together."""
        return sum(self.store.counts) - self.held_out

    def __len__(self) -> int:
        full, rest = divmod(self.samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(next(self._epochs))

    def id_batches(self, epoch: int, start: int = 0) -> list[Ids]:
        """The sample ids of this rank's batches of an epoch, from step `start` on."""
        order = sample_order(self.seed, epoch, self.store.counts, self.window)
        order = order[order >= self.held_out]
        return [
            order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world_size]
            for step in range(start, len(self))
        ]

    def counts(self, step: int) -> tuple[int, ...]:
        """The number of images that each rank has in a step of an epoch."""
        images = min(self.batch_size, self.samples - step * self.batch_size)
        return tuple(Ranks(size=self.world_size).shares(images))

    def parameters(self, epoch: int, ids: Ids) -> ViewParameters:
        """The parameters of all views of a batch: the first views of all images, then the second."""
        view = np.repeat(np.arange(self.views), len(ids))
        return view_parameters(
            self.augmentation, self.seed, epoch, np.tile(ids, self.views), view, self.store.canvas
        )

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch from step `start` on; the next one is rendered while one is in use."""
        with closing(self._ready(epoch, start)) as ready:
            for step, batch in enumerate(one_ahead(ready, self.submit, self.collect), start):
                yield replace(batch, counts=self.counts(step))

    def endless(self) -> Generator[Batch, None, None]:
        """The batches of epoch after epoch."""
        for epoch in itertools.count():
            yield from self.epoch(epoch)

    def _ready(self, epoch: int, start: int) -> Generator[tuple[PixelBatch, ViewParameters], None, None]:
        """The pixels and view parameters of each batch; computed while the renderer is busy."""
        with closing(self.store.fetch(self.id_batches(epoch, start))) as fetched:
            for batch in fetched:
                yield batch, self.parameters(epoch, batch.ids)

    def submit(self, ready: tuple[PixelBatch, ViewParameters]) -> None:
        """Start rendering a batch."""
        batch, parameters = ready
        if len(batch.ids):
            self.renderer.submit(batch.pixels, parameters)

    def collect(self, ready: tuple[PixelBatch, ViewParameters]) -> Batch:
        """The oldest submitted batch, rendered; waits until it is."""
        batch, _ = ready
        views = self.renderer.collect() if len(batch.ids) else self._no_views()
        labels, targets = (each.to(views.device, non_blocking=True) for each in (batch.labels, batch.targets))
        return Batch(views, labels, targets, torch.from_numpy(batch.ids))

    def _no_views(self) -> Tensor:
        """What a rank has in a step in which it has no image."""
        made = self.rendering
        assert made is not None, "a loader of several ranks needs `rendering`"
        return torch.empty((0, 1, made.size, made.size), dtype=made.dtype, device=made.device)


def open_loader(
    shards: ShardSet | str | Path,
    *,
    batch_size: int | None = None,
    image_size: int | None = None,
    views: int = 2,
    augmentation: Augmentation = Augmentation(),  # noqa: B008 - frozen
    drop_last: bool = True,
    seed: int = 0,
    device: torch.device | str = "auto",
    precision: str = "auto",
    renderer: RendererName = "auto",
    store: Tier = "auto",
    shuffle_window: int = 2**14,
    threads: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    ranks: Ranks = ONE,
    hold_out: bool = False,
    progress: Progress = no_progress,
) -> Loader:
    """A loader for the shard set in a folder or behind a URL: `for batch in open_loader("shards")`.

    `batch_size` is in images (by default 256, or all where there are fewer), `image_size` in pixels (by default that of
    the stored images). `device`, `precision`, `renderer` and `store` are as in `PretrainConfig`. The set is decoded
    into memory first, if it fits there. In a distributed program of your own, pass `rank` and `world_size`: each
    process then keeps a set of its own in memory. `ranks` are those of `modan-fast pretrain`, which share one a
    machine; all of them must call this function together. `threads` are by default a rank's share of the cores.
    `hold_out` leaves out the images that the monitor of a run looks at.

    Raises `InputError` if the set is missing, damaged, smaller than a batch, or too large for the `store` asked for.
    """
    opened = shards if isinstance(shards, ShardSet) else open_shards(shards)
    left_out = held_out(opened.manifest.samples) if hold_out else 0
    samples = opened.manifest.samples - left_out
    if batch_size is None:
        batch_size = min(256, samples)
    if samples < batch_size:
        raise InputError(
            f"`batch_size={batch_size}` is more than the {samples} images in {opened.shown_location}"
            f"{' that are not held out' if left_out else ''}: choose a smaller one"
        )
    where = device if isinstance(device, torch.device) else pick_device(device)
    threads = threads or ranks.cores
    pixels = open_store(
        opened,
        tier=store,
        renderer=renderer,
        device=where,
        batch_size=batch_size,
        threads=threads,
        ranks=ranks,
        progress=progress if ranks.first else no_progress,
    )
    rendering = Rendering(
        canvas=pixels.canvas,
        size=image_size or pixels.canvas,
        batch_size=views * batch_size,
        device=where,
        dtype=compute_type(precision, where),
        threads=threads,
        blur=augmentation.blur > 0,
    )
    return Loader(
        pixels,
        open_renderer(renderer, rendering),
        augmentation,
        batch_size=batch_size,
        seed=seed,
        drop_last=drop_last,
        views=views,
        window=shuffle_window,
        rank=ranks.rank if rank is None else rank,
        world_size=ranks.size if world_size is None else world_size,
        held_out=left_out,
        rendering=rendering,
    )


def loader_of(
    config: PretrainConfig,
    shards: ShardSet,
    *,
    device: torch.device,
    ranks: Ranks = ONE,
    progress: Progress = no_progress,
) -> Loader:
    """The loader of a pretraining run. Raises as `open_loader`."""
    return open_loader(
        shards,
        batch_size=config.batch_size,
        image_size=config.image_size,
        views=config.views,
        augmentation=config.augmentation,
        drop_last=config.drop_last,
        seed=config.seed,
        device=device,
        precision=config.precision,
        renderer=config.renderer,
        store=config.store,
        shuffle_window=config.shuffle_window,
        threads=config.threads,
        ranks=ranks,
        hold_out=config.monitor_held_out,
        progress=progress,
    )
