"""The parameters of a view (crop, flip, jitter, blur) and the order of samples, from (seed, epoch, sample, view).

Every random number is one word of a counter-based generator. It depends on its own coordinates alone, and not on
threads, ranks, batches or earlier numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modan_fast.config import Augmentation

UInt32s = NDArray[np.uint32]

ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after as many
# Offsets of the words in a view's stream. A new parameter takes new words, so that the others keep their values.
CROP, POSITION, FLIP, JITTER, BRIGHTNESS, CONTRAST, BLUR, SIGMA = 0, 20, 22, 23, 24, 25, 26, 27
WORDS = 28
ORDER_STREAM, SHARD_STREAM = 2**32 - 1, 2**32 - 2  # stream numbers that no view has


def philox(counter: tuple[UInt32s, ...], key: tuple[int, int]) -> UInt32s:
    """Philox4x32-10 (Salmon et al. 2011): from four counter words, broadcast to shape S, random words (*S, 4)."""
    c0, c1, c2, c3 = (word.astype(np.uint64) for word in np.broadcast_arrays(*counter))
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_words(
    seed: int, epoch: int, ids: NDArray[np.int64], stream: int | NDArray[np.int64], words: int
) -> UInt32s:
    """Random 32-bit words (N, words) of N samples; `stream` is a number or (N,); `words` is a multiple of 4."""
    counter = (np.arange(words // 4), np.reshape(stream, (-1, 1)), ids[:, None], np.array(epoch))
    key = (seed & 0xFFFFFFFF, seed >> 32)
    return philox(tuple(word.astype(np.uint32) for word in counter), key).reshape(len(ids), words)


def sample_order(seed: int, epoch: int, counts: Sequence[int], window: int) -> NDArray[np.int64]:
    """The sample ids 0 … S - 1 in the order of an epoch; `counts` holds the number of samples in each shard.

    A set of up to `window` samples is shuffled as a whole. Of a larger set, the shards come in random order, and each
    sample then moves by less than `window` positions. Reading the shards one by one in that order therefore needs
    memory for `window` samples only.
    """
    samples = sum(counts)
    words = random_words(seed, epoch, np.arange(samples), ORDER_STREAM, 4).astype(np.uint64)
    rank = words[:, 0] << np.uint64(32) | words[:, 1]
    if samples <= window:
        return np.argsort(rank, kind="stable")
    starts = np.cumsum([0, *counts])
    shuffled = np.argsort(random_words(seed, epoch, np.arange(len(counts)), SHARD_STREAM, 4)[:, 0], kind="stable")
    ids = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shuffled])
    # Sorted by position plus a random part of the window: no two samples a window or more apart change their order.
    moved = np.arange(samples) + window * (rank[ids] / 2.0**64)
    return ids[np.argsort(moved, kind="stable")]


@dataclass(frozen=True)
class ViewParameters:
    """How a view is made of each of N images: crop, resize, flip, brightness, contrast and blur, in this order.

    `box` (N, 4) int32: top, left, height, width, in pixels of the stored image. `flip` (N,) bool: mirrored left to
    right. `brightness`, `contrast` (N,) float32: factors as in torchvision; 1 changes nothing. `sigma` (N,) float32: of
    a Gaussian blur, in pixels of the view; 0 means no blur.
    """

    box: NDArray[np.int32]
    flip: NDArray[np.bool_]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    sigma: NDArray[np.float32]


def view_parameters(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    ids: NDArray[np.int64],
    view: int | NDArray[np.int64],
    canvas: int,
) -> ViewParameters:
    """The parameters of view 0 or 1 of the samples `ids` (N,), whose stored images have `canvas` x `canvas` pixels.

    `view` is one number for all samples, or (N,). Boxes are distributed as in torchvision's RandomResizedCrop, factors
    as in its ColorJitter.
    """
    uniform = (random_words(seed, epoch, ids, view, WORDS) + 0.5) / 2**32  # in (0, 1), float64
    attempts = uniform[:, CROP : CROP + 2 * ATTEMPTS].reshape(len(ids), ATTEMPTS, 2)
    area = canvas**2 * _between(augmentation.scale, attempts[..., 0])
    ratio = np.exp(_between((np.log(augmentation.ratio[0]), np.log(augmentation.ratio[1])), attempts[..., 1]))
    height, width = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (height >= 1) & (width >= 1) & (height <= canvas) & (width <= canvas)
    first = fits.argmax(1)[:, None]
    # If no attempt fits, the whole image, as in torchvision where that ratio is allowed.
    height = np.where(fits.any(1), np.take_along_axis(height, first, 1)[:, 0], canvas)
    width = np.where(fits.any(1), np.take_along_axis(width, first, 1)[:, 0], canvas)
    top = np.floor(uniform[:, POSITION] * (canvas - height + 1))
    left = np.floor(uniform[:, POSITION + 1] * (canvas - width + 1))

    jitter = uniform[:, JITTER] < augmentation.jitter

    def factor(strength: float, word: int) -> NDArray[np.float32]:
        sampled = _between((max(0.0, 1 - strength), 1 + strength), uniform[:, word])
        return np.where(jitter, sampled, 1).astype(np.float32)

    return ViewParameters(
        box=np.stack([top, left, height, width], axis=1).astype(np.int32),
        flip=uniform[:, FLIP] < augmentation.flip,
        brightness=factor(augmentation.brightness, BRIGHTNESS),
        contrast=factor(augmentation.contrast, CONTRAST),
        sigma=np.where(
            uniform[:, BLUR] < augmentation.blur, _between(augmentation.sigma, uniform[:, SIGMA]), 0
        ).astype(np.float32),
    )


def _between(bounds: tuple[float, float], uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform
