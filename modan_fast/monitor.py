"""What an encoder knows of a few images of its shard set, every few epochs, and whether its features have collapsed.

N images, H x H pixels, F features, D embedding dimensions, C values of a label.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from modan_fast.augment import ViewParameters, view_parameters
from modan_fast.config import PretrainConfig
from modan_fast.devices import compute_type
from modan_fast.loader import held_out
from modan_fast.render import render_view
from modan_fast.shards import ShardSet
from modan_fast.stream import Stream
from shard_builder.atomic import replacing
from shard_builder.settings import usable_cores

log = logging.getLogger(__name__)

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as DINO has them
AT_A_TIME = 64  # images; a training step holds more, and keeps its activations
LEVEL = 0.01  # a dimension that varies less than this, relative to the root mean square of all, has collapsed
# Features have collapsed if their effective rank is below this twice in a row; once, it may only be that the running
# statistics of batch-norm have seen few steps. Ranks of fewer images are not judged.
COLLAPSED_RANK, LEAST_JUDGED = 1.3, 16
SHOWN, LARGEST_SHOWN = 8, 256  # images in the picture of views; largest side of one in pixels


class Monitor:
    """Looks at an encoder while it is trained, without changing anything in it.

    The images are the same in every run of a shard set, and so are the boxes of their views; they are decoded once and
    wait on the device as bytes.
    """

    def __init__(self, shards: ShardSet, config: PretrainConfig, device: torch.device) -> None:
        """Raises `InputError` if a shard cannot be read."""
        manifest = shards.manifest
        assert config.image_size is not None, "the settings are resolved"
        self.config, self.device = config, device
        self.dtype = compute_type(config.precision, device)
        # Read apart from the training's store, which has another part of the set on each rank.
        pixels, labels, targets = _first(shards, held_out(manifest.samples), config.threads or usable_cores())
        pairs = max(2, len(pixels) // 4)
        first, second = (
            view_parameters(config.augmentation, 0, 0, np.arange(pairs), view, manifest.size) for view in (0, 1)
        )
        self._images = _rendered(pixels, _whole(len(pixels), manifest.size), config.image_size).to(device)
        self._first, self._second = (
            _rendered(pixels[:pairs], view, config.image_size).to(device) for view in (first, second)
        )
        parts = labels.split([len(values) for values in manifest.fields.values()], dim=1)
        self._labels = {name: _number(part).to(device) for name, part in zip(manifest.fields, parts, strict=True)}
        self._labels["class"] = targets.to(device)
        self._low_in_a_row, self._warned = 0, False
        self.latest: dict[str, float] = {}

    def due(self, epoch: int) -> bool:
        """Whether to look after `epoch` epochs."""
        return epoch % self.config.monitor_every == 0 or epoch == self.config.epochs

    @torch.no_grad()
    def look(self, encoder: nn.Module, head: nn.Module) -> dict[str, float]:
        """What `encoder` knows, by name, each beginning with `monitor/`; `latest` keeps it.

        Warns once if the features have collapsed. Weights, batch-norm's statistics and random numbers stay as they are.
        """
        begun = time.perf_counter()
        with _evaluating(encoder), _evaluating(head):
            features = self._features(encoder, self._images)
            views = [self._features(encoder, each) for each in (self._first, self._second)]
            # The logits of a classifier are no embedding.
            if self.config.method != "supervised":
                views = [_finite(head(each)) for each in views]
        found = {}
        for name, values in self._labels.items():
            known = values >= 0
            if len(values[known].unique()) > 1:
                found[f"knn_{name}"] = knn_accuracy(features[known], values[known])
                found[f"chance_{name}"] = float(values[known].bincount().max() / known.sum())
        found["rankme"] = rankme(features)
        found["alignment"] = alignment(*views)
        found["uniformity"] = (uniformity(views[0]) + uniformity(views[1])) / 2
        found["collapsed"] = collapsed_share(features)
        found = {name: round(value, 4) for name, value in found.items()}
        found["seconds"] = round(time.perf_counter() - begun, 3)
        self.latest = {f"monitor/{name}": value for name, value in found.items()}
        self._judge(found["rankme"])
        return self.latest

    def _judge(self, rank: float) -> None:
        """Warn, once, if the features have collapsed."""
        low = rank < COLLAPSED_RANK and len(self._images) >= LEAST_JUDGED
        self._low_in_a_row = self._low_in_a_row + 1 if low else 0
        if self._low_in_a_row == 2 and not self._warned:
            self._warned = True
            log.warning(
                "the features have collapsed: those of %d images differ in one direction only (RankMe is %.2f, with "
                "random weights above 5): try a smaller `lr`",
                len(self._images),
                rank,
            )

    def save_views(self, path: Path) -> None:
        """Write a PNG picture of some images, each beside its two views. Raises OSError if that fails."""
        rows = torch.linspace(0, len(self._first) - 1, min(SHOWN, len(self._first))).long()
        step = -(-self._images.shape[-1] // LARGEST_SHOWN)
        columns = [each[rows, 0, ::step, ::step].cpu() for each in (self._images, self._first, self._second)]
        picture = Image.fromarray(
            torch.cat([torch.cat(list(row), 1) for row in zip(*columns, strict=True)]).numpy()
        )
        with replacing(path) as file:
            picture.save(file, format="png")

    def _features(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Features (N, F) of images (N, 1, H, H) uint8, in float32."""
        mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        # Without cuDNN's choice by time, so that equal weights give equal numbers.
        fixed = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)
        with mixed, fixed:
            parts = [encoder((part / 255).to(self.dtype)).float() for part in images.split(AT_A_TIME)]
        return _finite(torch.cat(parts))


def knn_accuracy(features: Tensor, targets: Tensor) -> float:
    """The share of images whose label their nearest neighbours among the others name.

    `features` are (N, F), `targets` (N,) numbers. Neighbours vote with weight exp(cosine / `TEMPERATURE`), as in DINO.
    Those as near as the last of the `NEIGHBOURS` vote, too: equal features name the most frequent label.
    """
    unit = F.normalize(features, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    last = cosine.topk(min(NEIGHBOURS, len(features) - 1), dim=1).values[:, -1:]
    weights = torch.where(cosine >= last, ((cosine - 1) / TEMPERATURE).exp(), 0)
    votes = weights @ F.one_hot(targets).to(weights.dtype)
    return float((votes.argmax(1) == targets).double().mean())


def rankme(features: Tensor) -> float:
    """The effective rank of features (N, F): exp of the entropy of their normalised singular values (Garrido 2023)."""
    features = features.double()
    smaller = features @ features.T if len(features) < features.shape[1] else features.T @ features
    singular = torch.linalg.eigvalsh(smaller).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-30)
    return float(torch.special.entr(share).sum().exp())


def alignment(first: Tensor, second: Tensor) -> float:
    """The mean squared distance of two views' embeddings (N, D) on the sphere (Wang and Isola 2020); 0 is best."""
    return float((F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(1).mean())


def uniformity(embeddings: Tensor) -> float:
    """log of the mean of exp(-2 d²) over all pairs, d their distance on the sphere (Wang and Isola 2020).

    0 if all are equal, near -4 if (N, D) are spread evenly over a sphere of many dimensions.
    """
    distances = F.pdist(F.normalize(embeddings, dim=1))
    return float(distances.square().mul(-2).exp().mean().log())


def collapsed_share(features: Tensor) -> float:
    """The share of the dimensions of features (N, F) that are as good as constant.

    Their standard deviation is below `LEVEL` times the root mean square of all features.
    """
    scale = features.square().mean().sqrt()
    return float((features.std(0) <= LEVEL * scale).double().mean())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Batch-norm uses its running statistics, and dropout does nothing; afterwards each part is as it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _finite(features: Tensor) -> Tensor:
    """Features without NaN and infinities: with large weights, only the running statistics may overflow."""
    return torch.nan_to_num(features.float(), nan=0.0, posinf=0.0, neginf=0.0)


def _first(shards: ShardSet, count: int, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (N, S, S) uint8, labels (N, K) and targets (N,) of the first `count` samples."""
    stream = Stream(shards, renderer="torch", batch_size=AT_A_TIME, threads=threads)
    with closing(stream.fetch_first(count)) as batches:
        found = [(torch.stack(list(each.pixels)), each.labels, each.targets) for each in batches]
    pixels, labels, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
    return pixels, labels, targets


def _whole(count: int, canvas: int) -> ViewParameters:
    """The parameters of `count` views that show their image as it is."""
    ones, zeros = np.ones(count, np.float32), np.zeros(count, np.float32)
    box = np.tile(np.array([0, 0, canvas, canvas], np.int32), (count, 1))
    return ViewParameters(box, np.zeros(count, np.bool_), ones, ones, zeros)


def _rendered(pixels: Tensor, view: ViewParameters, size: int) -> Tensor:
    """The views (N, 1, size, size) as uint8."""
    return (255 * render_view(pixels, view, size)).round().byte()


def _number(bits: Tensor) -> Tensor:
    """The number of the value that each row of bits (N, C) sets, -1 where it sets none."""
    if not bits.shape[1]:
        return torch.full((len(bits),), -1)
    return torch.where(bits.bool().any(1), bits.int().argmax(1), -1)
