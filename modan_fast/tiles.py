"""A contrastive loss over the images of all ranks, in tiles: memory grows with the number of images, not of pairs.

n images of this rank, r of a tile, N of all ranks; R = 2r and V = 2N views, D embedding dimensions, K label bits. Row
i + N of all views, or i + r of a tile's, is the other view of row i. The products of views z are the logits.

This module is imported where it is first needed, because torch.compiler takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from modan_fast import ranks

PAIRS_ON_CPU = 2048**2  # of views that a tile holds: 16 MiB of float32, because more is slower there
PAIRS_ON_GPU = 4096**2

# What ranks tell one another stays outside of compiled graphs.
gathered = torch.compiler.disable(ranks.gathered)
summed = torch.compiler.disable(ranks.summed)


class Tile(NamedTuple):
    """Some images of this rank: z (2, r, D), labels (r, K), and which of all images they are (r,)."""

    z: Tensor
    labels: Tensor
    itself: Tensor


class Everything(NamedTuple):
    """All images, z (V, D) and labels (N, K), and how pairs of them are judged.

    `weigh` takes the labels of a tile, those of all, and which of all the tile's images are; it returns the weights
    (r, N) of pairs, and the number (r,) of an image's positives, itself included.
    """

    z: Tensor
    labels: Tensor
    weigh: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    instance_weight: float


def _totals(tile: Tile, everything: Everything) -> Tensor:
    """What a tile's images tell all others: (r, 4).

    The columns are the offsets of both views' logits, the share of one positive in an anchor's mean, and the part of V
    times the loss. exp(logit - offset) is the softmax times its factor in the loss.
    """
    z_2rD, labels_rK, itself_r = tile
    z_VD, labels_NK, weigh, instance_weight = everything
    images, everyone = len(labels_rK), len(labels_NK)
    weight_rN, positives_r = weigh(labels_rK, labels_NK, itself_r)
    share_r = 1 / (2 * positives_r - 1)
    logits_RV = z_2rD.flatten(0, 1) @ z_VD.T
    # The sums of weights and of logits hold each anchor paired with itself; subtract those terms.
    total_r = 2 * weight_rN.sum(1) - 1
    pull_r = (weight_rN * logits_RV.view(2, images, 2, everyone).sum((0, 2))).sum(1) - (z_2rD**2).sum((0, 2))
    itself_R = torch.cat([itself_r, itself_r + everyone])
    log_total_2r = logits_RV.scatter_(1, itself_R[:, None], -torch.inf).logsumexp(1).view(2, images)
    factor_r = share_r * total_r + instance_weight
    pull_r = share_r * pull_r + 2 * instance_weight * (z_2rD[0] * z_2rD[1]).sum(1)
    part_r = factor_r * log_total_2r.sum(0) - pull_r
    return torch.stack([*(log_total_2r - factor_r.log()), share_r, part_r], 1)


def _gradient(tile: Tile, everything: Everything, offset_V: Tensor, share_N: Tensor) -> Tensor:
    """V times the gradient at a tile's views, as anchors and as others' positives and negatives: (2, r, D).

    `offset_V` and `share_N` are the first columns of `_totals`, of all images.
    """
    z_2rD, labels_rK, itself_r = tile
    z_VD, labels_NK, weigh, instance_weight = everything
    images, everyone = len(labels_rK), len(labels_NK)
    weight_rN, _ = weigh(labels_rK, labels_NK, itself_r)
    itself_R = torch.cat([itself_r, itself_r + everyone])
    logits_RV = z_2rD.flatten(0, 1) @ z_VD.T
    at_logits_RV = (logits_RV - offset_V[itself_R, None]).exp_().add_((logits_RV - offset_V).exp_())
    pull_rN = weight_rN * (share_N[itself_r, None] + share_N)
    at_logits_RV.view(2, images, 2, everyone).sub_(pull_rN[:, None])
    at_logits_RV.scatter_(1, itself_R[:, None], 0)
    return (at_logits_RV @ z_VD).view_as(z_2rD) - 2 * instance_weight * z_2rD.flip(0)


@torch.compiler.disable(recursive=False)  # the loops run in Python; each function above is compiled alone
def tiled_contrast(
    own: Everything, counts: Sequence[int] | None, tile: int | None, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of the images of all ranks, and its gradient at this rank's views times the number of ranks.

    `own` are the images of this rank, and `counts` the numbers of images of all ranks, exchanged if None; one number
    keeps to this rank. `tile` is how many images of this rank are compared with all at a time, by default so many that
    the pairs are as above. Ranks exchange embeddings and labels, then four numbers an image, with which each finds the
    gradient at its views alone. Raises ValueError if this rank has not as many images as `counts` says.
    """
    z_VD, labels_nK, *_ = own
    images, dimensions = len(labels_nK), z_VD.shape[1]
    if counts is None:
        counts = gathered(torch.tensor([images], device=z_VD.device), [1] * dist.get_world_size()).tolist()
    rank = dist.get_rank() if len(counts) > 1 else 0
    if counts[rank] != images:
        raise ValueError(f"`counts` says {counts[rank]} images on rank {rank}, got labels of {images}")
    z_2nD = z_VD.view(2, images, dimensions)
    everything = own
    if len(counts) > 1:
        rows = gathered(torch.cat([*z_2nD, labels_nK], 1), counts)
        first_ND, second_ND, labels_NK = rows.split([dimensions, dimensions, labels_nK.shape[1]], 1)
        everything = own._replace(z=torch.cat([first_ND, second_ND]), labels=labels_NK.contiguous())
    views, before = 2 * sum(counts), sum(counts[:rank])
    pairs = PAIRS_ON_CPU if z_VD.device.type == "cpu" else PAIRS_ON_GPU
    tile = tile or max(1, pairs // (2 * views))
    itself_n = torch.arange(before, before + images, device=z_VD.device)
    tiles = list(map(Tile, z_2nD.split(tile, 1), labels_nK.split(tile), itself_n.split(tile)))
    totals_n4 = z_VD.new_empty(images, 4)
    for each, totals_r4 in zip(tiles, totals_n4.split(tile), strict=True):
        totals_r4.copy_(_totals(each, everything))
    totals_N4 = gathered(totals_n4, counts)
    value = totals_N4[:, 3].sum() / views
    if not with_gradient:
        return value, None
    offset_V, share_N = totals_N4[:, :2].T.flatten(), totals_N4[:, 2].contiguous()
    gradient_2nD = torch.empty_like(z_2nD)
    for each, gradient_2rD in zip(tiles, gradient_2nD.split(tile, 1), strict=True):
        gradient_2rD.copy_(_gradient(each, everything, offset_V, share_N))
    return value, gradient_2nD.mul_(len(counts) / views).flatten(0, 1)
