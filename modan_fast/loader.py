"""Order, store, augmentation and renderer put together: the batches of an epoch.

B images a batch, V = 2B views (B for one view an image), H x H pixels, K label bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modan_fast.augment import ViewParameters, sample_order, view_parameters
from modan_fast.config import Augmentation, PretrainConfig
from modan_fast.render import Renderer, Rendering, open_renderer
from modan_fast.shards import ShardSet
from modan_fast.store import Store, open_store
from modan_fast.stream import Ids, Samples
from shard_builder.settings import InputError, Progress, no_progress, usable_cores


@dataclass(frozen=True)
class Batch:
    """`views` (V, 1, H, H) in [0, 1], channels-last, in the compute type; rows i and i + B show one image.
    `labels` (B, K) uint8, 0/1; `targets` (B,) int64, class indices; `ids` (B,) int64, sample ids, on the CPU.
    """

    views: Tensor
    labels: Tensor
    targets: Tensor
    ids: Tensor


class Loader:
    """The batches of any epoch, each a pure function of (seed, epoch, step).

    `batch_size` counts the images of a step on all ranks together; a rank gets every `world_size`-th of them.
    Each sample comes exactly once an epoch; `drop_last` leaves out what does not fill a batch at its end.
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
    ) -> None:
        self.store, self.renderer, self.augmentation = store, renderer, augmentation
        self.batch_size, self.seed, self.drop_last, self.views = batch_size, seed, drop_last, views
        self.window, self.rank, self.world_size = window, rank, world_size

    @property
    def steps(self) -> int:
        """Batches in an epoch; a rest that does not give each rank an image is left out."""
        full, rest = divmod(sum(self.store.counts), self.batch_size)
        return full + (rest >= self.world_size and not self.drop_last)

    def parts(self, epoch: int, start: int = 0) -> list[Ids]:
        """The sample ids of each batch of an epoch from step `start` on; of this rank."""
        order = sample_order(self.seed, epoch, self.store.counts, self.window)
        return [
            order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world_size]
            for step in range(start, self.steps)
        ]

    def parameters(self, epoch: int, ids: Ids) -> ViewParameters:
        """The parameters of all views of a batch: those of the first views, then those of the second."""
        view = np.repeat(np.arange(self.views), len(ids))
        return view_parameters(
            self.augmentation, self.seed, epoch, np.tile(ids, self.views), view, self.store.canvas
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on; the next one is rendered while one is in use."""
        rendering: Samples | None = None
        with closing(self._work(epoch, start)) as work:
            try:
                for samples, parameters in work:  # made ready while the renderer is busy
                    before, rendering = rendering, None
                    batch = self.collect(before) if before else None
                    self.renderer.submit(samples.pixels, parameters)
                    rendering = samples
                    if batch:
                        yield batch
                if rendering:
                    before, rendering = rendering, None
                    yield self.collect(before)
            finally:
                # An epoch that is left early must leave nothing in the renderer for the next.
                if rendering:
                    self.renderer.collect()

    def endless(self) -> Generator[Batch, None, None]:
        """The batches of epoch after epoch."""
        for epoch in itertools.count():
            yield from self.epoch(epoch)

    def _work(self, epoch: int, start: int) -> Generator[tuple[Samples, ViewParameters], None, None]:
        with closing(self.store.fetch(self.parts(epoch, start))) as fetched:
            for samples in fetched:
                yield samples, self.parameters(epoch, samples.ids)

    def collect(self, samples: Samples) -> Batch:
        """The batch of the samples that were the oldest given to `renderer`; waits until it is made."""
        views = self.renderer.collect()
        labels, targets = (each.to(views.device, non_blocking=True) for each in (samples.labels, samples.targets))
        return Batch(views, labels, targets, torch.from_numpy(samples.ids))


def open_loader(
    config: PretrainConfig,
    shards: ShardSet,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = no_progress,
) -> Loader:
    """The loader of a run: its store, filled, and its renderer, for views in `dtype` on `device`.

    Raises `InputError` where the set is smaller than a batch, is damaged, or does not fit where it is to be kept.
    """
    if shards.manifest.samples < config.batch_size:
        raise InputError(
            f"--batch-size {config.batch_size} is more than the {shards.manifest.samples} images in "
            f"{shards.place}: choose a smaller one"
        )
    threads = config.threads or usable_cores()
    store = open_store(
        shards,
        tier=config.store,
        renderer=config.renderer,
        device=device,
        batch_size=config.batch_size,
        threads=threads,
        progress=progress,
    )
    renderer = open_renderer(
        config.renderer,
        Rendering(
            canvas=store.canvas,
            size=config.image_size or store.canvas,
            batch_size=config.views * config.batch_size,
            device=device,
            dtype=dtype,
            threads=threads,
            blur=config.augmentation.blur > 0,
        ),
    )
    return Loader(
        store,
        renderer,
        config.augmentation,
        batch_size=config.batch_size,
        seed=config.seed,
        drop_last=config.drop_last,
        views=config.views,
        window=config.shuffle_window,
    )
