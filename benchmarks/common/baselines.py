"""Baselines of several benchmarks: the published loss, and torchvision's augmentation in a torch DataLoader.

N images, V = 2N views of H x H pixels, K label bits, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from modan_fast.config import Augmentation

AUGMENTATION = Augmentation()
TEMPERATURE, THRESHOLD = 0.07, 0.3
NO_LABELS = torch.empty(0, dtype=torch.uint8)

Sample = tuple[Tensor, Tensor, Tensor]
"""Two views (1, H, H) of an image, and its labels (K,) or `NO_LABELS`."""


def stacked_jaccard(a_K: Tensor, b_K: Tensor) -> Tensor:
    """Jaccard similarity of two label sets as in public multi-label SupCon code, over a stacked pair."""
    pair_2K = torch.stack([a_K, b_K])
    return torch.min(pair_2K, dim=0).values.sum() / torch.max(pair_2K, dim=0).values.sum()


def published_loss(
    embeddings_VD: Tensor, labels_NK: Tensor, similarity: Callable[[Tensor, Tensor], Tensor] = stacked_jaccard
) -> Tensor:
    """Eq. 3 of ModAn-MulSupCon with the Jaccard matrix filled pair by pair."""
    images = len(labels_NK)
    overlap_NN = torch.zeros(images, images, device=labels_NK.device)
    for i in range(images):
        for j in range(images):
            overlap_NN[i, j] = similarity(labels_NK[i], labels_NK[j])
    z_VD = F.normalize(embeddings_VD, dim=1)
    weight_VV = overlap_NN.repeat(2, 2)
    others_VV = 1 - torch.eye(2 * images, device=labels_NK.device)
    positive_VV = (weight_VV >= THRESHOLD).float() * others_VV
    logits_VV = z_VD @ z_VD.T / TEMPERATURE
    logits_VV = logits_VV - logits_VV.max(1, keepdim=True).values.detach()
    log_softmax_VV = logits_VV - (logits_VV.exp() * others_VV).sum(1, keepdim=True).log()
    return -((positive_VV * weight_VV * log_softmax_VV).sum(1) / positive_VV.sum(1)).mean()


def augmentation(library: Any, size: int, *last: Any, published: bool = False) -> Any:
    """The paper's augmentation with `torchvision.transforms` or its `v2`, then the transforms `last`.

    `published` adds the steps that change nothing on one channel.
    """
    colour = {"saturation": 0.4, "hue": 0.1} if published else {}
    jitter = library.ColorJitter(brightness=AUGMENTATION.brightness, contrast=AUGMENTATION.contrast, **colour)
    last = (library.RandomGrayscale(0.2), *last) if published else last
    return library.Compose(
        [
            library.RandomResizedCrop(size, scale=AUGMENTATION.scale, ratio=AUGMENTATION.ratio, antialias=True),
            library.RandomHorizontalFlip(AUGMENTATION.flip),
            library.RandomApply([jitter], p=AUGMENTATION.jitter),
            *last,
        ]
    )


def read_file(files: list[Path], index: int) -> Image.Image:
    """A file's image in grey."""
    return Image.open(files[index]).convert("L")


def no_labels(index: int) -> Tensor:
    """The `labels` of a `TwoViews` without any."""
    return NO_LABELS


def two_views(transform: Callable[[Any], Tensor], image: Any, labels: Tensor = NO_LABELS) -> Sample:
    """Two views of an image, with its labels."""
    return transform(image), transform(image), labels


class TwoViews(Dataset[Sample]):
    """Two views of each image that `read` returns, with what `labels` returns; both are called with an index."""

    def __init__(
        self,
        read: Callable[[int], Any],
        transform: Callable[[Any], Tensor],
        labels: Callable[[int], Tensor] = no_labels,
    ) -> None:
        self.read, self.transform, self.labels = read, transform, labels

    def __getitem__(self, index: int) -> Sample:
        return two_views(self.transform, self.read(index), self.labels(index))


class EndlessOrder(Sampler[int]):
    """All samples in a new order each epoch, without end: no worker waits for the end of an epoch."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.samples).tolist()


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Views (V, 1, H, H), all first ones before all second ones, and labels (N, K)."""
    first, second, labels = zip(*samples, strict=True)
    return torch.stack([*first, *second]), torch.stack(labels)


def torch_batches(
    data: Any, samples: int | None, batch_size: int, workers: int, device: torch.device
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Views and labels of batches without end; closing the generator stops the workers.

    `data` has `samples` samples; `None` for an iterable dataset, which has an order of its own.
    """
    loader = DataLoader(
        data,
        batch_size,
        sampler=EndlessOrder(samples) if samples else None,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    for views, labels in loader:
        yield views.to(device, non_blocking=True), labels.to(device, non_blocking=True)
