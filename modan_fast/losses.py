"""Losses of pretraining; the contrastive ones, over two views of each image, from matrix products only.

N images, K label bits, D embedding dimensions, V = 2N views; row i and row i + N of the embeddings are the two
views of image i. The value is float32 (float64 for float64 input), computed outside autocast, and can be
differentiated once.

With `gather_distributed`, the images are those of all ranks of torch.distributed's default group. Each rank passes its
own, and all get the loss of the whole batch. The gradient at a rank's own rows is that of this loss times the number of
ranks, because DistributedDataParallel averages gradients over ranks: back-propagate the value as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

DENSE_PAIRS = 4096**2  # of views, up to which tiles would only take time


def jaccard(labels: Tensor, others: Tensor | None = None) -> Tensor:
    """Jaccard similarity of label sets: 0/1 (n, K) and (N, K) to [0, 1] (n, N); 0 between two empty sets.

    Without `others` that of all pairs of `labels`.
    """
    others = labels if others is None else others
    both_nN = labels @ others.T
    either_nN = labels.sum(1)[:, None] + others.sum(1) - both_nN
    return both_nN / either_nN.clamp(min=1)


def equality(labels: Tensor, others: Tensor) -> Tensor:
    """1 for equal label sets, else 0: 0/1 (n, K) and (N, K) to (n, N)."""
    differing_nN = labels.sum(1)[:, None] + others.sum(1) - 2 * labels @ others.T
    return (differing_nN == 0).to(labels.dtype)


def nothing(labels: Tensor, others: Tensor) -> Tensor:
    """0 for all pairs: (n, K) and (N, K) to (n, N)."""
    return labels.new_zeros(len(labels), len(others))


def _only_once() -> None:
    """Refuse a second derivative, which the functions below would compute wrongly."""
    if torch.is_grad_enabled():
        raise RuntimeError("the loss has no second derivative: call backward without create_graph")


class LogTotal(torch.autograd.Function):
    """log sum_b exp(z_a . z_b) over all rows b except a: (V, D) to (V,).

    The backward pass needs one matrix product, (G + G') z, with G the gradient of the logits. Autograd, which does not
    know that the logits are symmetric, computes G z and G' z.
    """

    @staticmethod
    def forward(ctx: Any, z_VD: Tensor) -> Tensor:
        logits_VV = (z_VD @ z_VD.T).fill_diagonal_(-torch.inf)
        log_total_V = logits_VV.logsumexp(1)
        ctx.save_for_backward(z_VD, logits_VV, log_total_V)
        return log_total_V

    @staticmethod
    def backward(ctx: Any, gradient_V: Tensor) -> Tensor:
        _only_once()
        z_VD, logits_VV, log_total_V = ctx.saved_tensors
        as_anchor_VV = (logits_VV - log_total_V[:, None]).exp_().mul_(gradient_V[:, None])
        as_other_VV = (logits_VV - log_total_V).exp_().mul_(gradient_V)
        return as_anchor_VV.add_(as_other_VV) @ z_VD


class Pull(torch.autograd.Function):
    """sum_ij w_ij x_i . x_j for symmetric w: (N, D) and (N, N) to a scalar. The gradient reuses the product w x."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_NN: Tensor) -> Tensor:
        pulled_ND = weight_NN @ x_ND
        ctx.save_for_backward(pulled_ND)
        return (x_ND * pulled_ND).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _only_once()
        (pulled_ND,) = ctx.saved_tensors
        return 2 * gradient * pulled_ND, None


class Known(torch.autograd.Function):
    """A value whose gradient at `x` is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _only_once()
        (known,) = ctx.saved_tensors
        return gradient * known, None, None


def contrast(
    embeddings_VD: Tensor,
    weight_NN: Tensor,
    positives_N: Tensor,
    temperature: float,
    instance_weight: float = 0.0,
) -> Tensor:
    """Mean over anchors of the weighted cross-entropy between an anchor's positives and its softmax.

    `weight_NN` holds the weights of pairs of images: symmetric, 0 for a negative, and 1 on the diagonal, because the
    other view of an anchor's own image always weighs 1. `positives_N` counts an image's positive images, itself
    included. The sum over an anchor's positives is divided by their count (Eq. 3 of ModAn-MulSupCon; Eq. 2 of Khosla et
    al. 2020 if all weights are 1). `instance_weight` times NT-Xent of the same embeddings at the same temperature is
    added; it shares the softmax, so it needs no further product of all pairs.
    """
    z_VD = F.normalize(embeddings_VD, dim=1)
    log_total_V = LogTotal.apply(z_VD * temperature**-0.5)
    total_N = 2 * weight_NN.sum(1) - 1
    first_ND, second_ND = z_VD.chunk(2)
    share_N = 1 / (2 * positives_N - 1)  # of one positive in the mean
    # Only the softmax needs all pairs of views. An anchor's positives add up to sum_p w_ap z_a.z_p, and w is the same
    # for all four pairs of views of two images.
    pull = Pull.apply(first_ND + second_ND, weight_NN * (share_N[:, None] + share_N) / 2)
    # `pull` includes each anchor paired with itself; subtract those terms.
    itself = (share_N.repeat(2) * (z_VD * z_VD).sum(1)).sum()
    share_of_total_V = (share_N * total_N).repeat(2)
    pull = pull - itself
    if instance_weight:
        share_of_total_V = share_of_total_V + instance_weight
        pull = pull + 2 * instance_weight * (first_ND * second_ND).sum()
    return ((share_of_total_V * log_total_V).sum() - pull / temperature) / len(z_VD)


def _checked(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings in at least float32 and labels in the same type."""
    if embeddings.ndim != 2 or labels.ndim != 2 or len(embeddings) != 2 * len(labels):
        raise ValueError(
            f"embeddings must be (2N, D) and labels (N, K), got {tuple(embeddings.shape)} and "
            f"{tuple(labels.shape)}"
        )
    embeddings = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    return embeddings, labels.to(embeddings.dtype)


def _spread(gather_distributed: bool) -> bool:
    """Whether the images are those of several ranks."""
    return gather_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ContrastiveLoss(nn.Module):
    """What the losses below share: `similarity` of label sets, and from which `threshold` on a pair is positive."""

    similarity: Callable[[Tensor, Tensor], Tensor]

    def __init__(
        self,
        temperature: float,
        threshold: float,
        instance_weight: float,
        gather_distributed: bool,
        tile: int | None,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be above 0 and finite, got {temperature}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be in [0, 1], got {threshold}")
        if not 0 <= instance_weight < math.inf:
            raise ValueError(f"`instance_weight` must be at least 0 and finite, got {instance_weight}")
        if tile is not None and tile < 1:
            raise ValueError(f"`tile` must be at least 1 image, got {tile}")
        self.temperature = temperature
        self.threshold = threshold
        self.instance_weight = instance_weight
        self.gather_distributed = gather_distributed
        self.tile = tile

    def weigh(self, labels_nK: Tensor, others_NK: Tensor, itself_n: Tensor) -> tuple[Tensor, Tensor]:
        """The weights (n, N) of pairs of images, and the number (n,) of an image's positives, itself included.

        `itself_n` says which of the others each image is.
        """
        similarity_nN = self.similarity(labels_nK, others_NK).scatter_(1, itself_n[:, None], 1)
        positive_nN = similarity_nN >= self.threshold
        return similarity_nN.where(positive_nN, 0), positive_nN.sum(1, dtype=similarity_nN.dtype)

    def forward(self, embeddings: Tensor, labels: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The loss; `counts` are the numbers of images of all ranks, exchanged if None."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings_VD, labels_NK = _checked(embeddings, labels)
            spread = _spread(self.gather_distributed)
            if not spread and self.tile is None and len(embeddings_VD) ** 2 <= DENSE_PAIRS:
                itself_N = torch.arange(len(labels_NK), device=labels_NK.device)
                weight_NN, positives_N = self.weigh(labels_NK, labels_NK, itself_N)
                return contrast(embeddings_VD, weight_NN, positives_N, self.temperature, self.instance_weight)
            from modan_fast.tiles import Everything, tiled_contrast

            z_VD = F.normalize(embeddings_VD, dim=1) * self.temperature**-0.5
            own = Everything(z_VD.detach(), labels_NK, self.weigh, self.instance_weight)
            counts = counts if spread else [len(labels_NK)]
            value, gradient_VD = tiled_contrast(own, counts, self.tile, with_gradient=z_VD.requires_grad)
            return value if gradient_VD is None else Known.apply(z_VD, value, gradient_VD)


class MulSupConLoss(ContrastiveLoss):
    """Multi-label supervised contrastive loss, Eq. 3 of ModAn-MulSupCon.

    A pair is positive if the Jaccard similarity of its label sets is at least `threshold`, in [0, 1], and is weighted
    with that similarity. With a threshold of 0 every pair is positive; pairs of weight 0 count as positives, too.
    `instance_weight` times NT-Xent of the same embeddings, at the same temperature, is added.

    Call with `embeddings` (2N, D), floating point, of any scale, and `labels` (N, K), 0/1; returns a scalar. With
    `gather_distributed` these are the images of this rank, possibly none, and the loss is that of all ranks' images.
    `counts`, the numbers of images of all ranks, can be passed, too; else they are exchanged, and waited for.

    Up to 4,096 views the pairs are held in memory. Of more, or of several ranks, they are computed in tiles of `tile`
    images with all views, so that memory grows only with the number of images; by default a tile takes 16 MiB, or 64 on
    a GPU.

    Raises ValueError if the shapes or `counts` do not fit, `temperature` is not above 0, `threshold` is outside [0, 1],
    `instance_weight` is negative or `tile` is below 1.

    Examples:
        >>> loss = MulSupConLoss()
        >>> bool(loss(torch.randn(8, 128), torch.eye(4)) > 0)  # four images, each with a label of its own
        True
    """

    similarity = staticmethod(jaccard)

    def __init__(
        self,
        temperature: float = 0.07,
        threshold: float = 0.3,
        instance_weight: float = 0.0,
        *,
        gather_distributed: bool = False,
        tile: int | None = None,
    ) -> None:
        super().__init__(temperature, threshold, instance_weight, gather_distributed, tile)


class SupConLoss(ContrastiveLoss):
    """Supervised contrastive loss (Khosla et al. 2020, Eq. 2): positives are images with an equal label row.

    Made and called as `MulSupConLoss`, without a threshold.
    """

    similarity = staticmethod(equality)

    def __init__(
        self,
        temperature: float = 0.07,
        instance_weight: float = 0.0,
        *,
        gather_distributed: bool = False,
        tile: int | None = None,
    ) -> None:
        super().__init__(temperature, 1.0, instance_weight, gather_distributed, tile)


class NTXentLoss(ContrastiveLoss):
    """Normalised temperature-scaled cross-entropy (SimCLR, Chen et al. 2020, Eq. 1): the only positive of a
    view is the other view of its image.

    Made and called as `MulSupConLoss`, without threshold and instance weight; of the labels only their number is used.
    """

    similarity = staticmethod(nothing)

    def __init__(
        self, temperature: float = 0.10, *, gather_distributed: bool = False, tile: int | None = None
    ) -> None:
        super().__init__(temperature, 1.0, 0.0, gather_distributed, tile)


class ClassificationLoss(nn.Module):
    """Mean cross-entropy, of logits (N, C) and targets (N,); with `gather_distributed` that of all ranks' images.

    A rank may have none. It is called as the contrastive losses are, but needs no `counts`.
    """

    def __init__(self, *, gather_distributed: bool = False) -> None:
        super().__init__()
        self.gather_distributed = gather_distributed

    def forward(self, logits: Tensor, targets: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The loss; all ranks add up their images, so `counts` is not used."""
        if not _spread(self.gather_distributed):
            return F.cross_entropy(logits, targets)
        from modan_fast.tiles import summed

        own = F.cross_entropy(logits, targets, reduction="sum")
        total, images = summed(torch.stack([own.detach(), own.new_full((), len(targets))]))
        return Known.apply(own, total / images, dist.get_world_size() / images)
