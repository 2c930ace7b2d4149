"""Order, store, augmentation and renderer put together: the batches of an epoch.

B images a batch, V = 2B views (B for one view an image), H x H pixels, K label bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modan_fast.augment import sample_order, view_parameters
from modan_fast.config import Augmentation
from modan_fast.render import Renderer
from modan_fast.store import Store


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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.store, self.renderer, self.augmentation = store, renderer, augmentation
        self.batch_size, self.seed, self.drop_last, self.views = batch_size, seed, drop_last, views
        self.rank, self.world_size = rank, world_size

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.store), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on; the next one is rendered while one is in use."""
        order = sample_order(self.seed, epoch, len(self.store))
        parts = [
            order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world_size]
            for step in range(start, self.steps)
        ]
        if not parts:
            return
        self._submit(epoch, parts[0])
        pending = True
        try:
            for step, part in enumerate(parts):
                views = self.renderer.collect()
                pending = step + 1 < len(parts)
                if pending:
                    self._submit(epoch, parts[step + 1])
                ids = torch.from_numpy(part)
                on_device = ids.to(self.store.labels.device, non_blocking=True)
                yield Batch(views, self.store.labels[on_device], self.store.targets[on_device], ids)
        finally:
            # An epoch that is left early must leave nothing in the renderer for the next.
            if pending:
                self.renderer.collect()

    def _submit(self, epoch: int, ids: NDArray[np.int64]) -> None:
        canvas = self.store.canvas
        views = [
            view_parameters(self.augmentation, self.seed, epoch, ids, view, canvas) for view in range(self.views)
        ]
        pixels = self.store.pixels
        self.renderer.submit(pixels[torch.from_numpy(ids).to(pixels.device)], views)
