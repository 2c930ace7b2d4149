"""Contrastive losses over two views of each image, from matrix products only.

N images, K label bits, D embedding dimensions, V = 2N views; row i and row i + N of the embeddings are the two
views of image i. The value is float32 (float64 for float64 input), computed outside autocast, and can be
differentiated once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def jaccard(labels: Tensor) -> Tensor:
    """Jaccard similarity of all pairs of label sets: 0/1 (N, K) to [0, 1] (N, N); 0 between two empty sets."""
    both_NN = labels @ labels.T
    count_N = labels.sum(1)
    either_NN = count_N[:, None] + count_N - both_NN
    return both_NN / either_NN.clamp(min=1)


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


def _check(temperature: float, instance_weight: float = 0.0) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be above 0 and finite, got {temperature}")
    if not 0 <= instance_weight < math.inf:
        raise ValueError(f"`instance_weight` must be at least 0 and finite, got {instance_weight}")


class MulSupConLoss(nn.Module):
    """Multi-label supervised contrastive loss, Eq. 3 of ModAn-MulSupCon.

    A pair is positive if the Jaccard similarity of its label sets is at least `threshold`, in [0, 1], and is weighted
    with that similarity. With a threshold of 0 every pair is positive; pairs of weight 0 count as positives, too.
    `instance_weight` times NT-Xent of the same embeddings, at the same temperature, is added.

    Call with `embeddings` (2N, D), floating point, of any scale, and `labels` (N, K), 0/1; returns a scalar. Raises
    ValueError if the shapes do not fit, `temperature` is not above 0, `threshold` is outside [0, 1] or
    `instance_weight` is negative.

    Examples:
        >>> loss = MulSupConLoss()
        >>> bool(loss(torch.randn(8, 128), torch.eye(4)) > 0)  # four images, each with a label of its own
        True
    """

    def __init__(self, temperature: float = 0.07, threshold: float = 0.3, instance_weight: float = 0.0) -> None:
        super().__init__()
        _check(temperature, instance_weight)
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be in [0, 1], got {threshold}")
        self.temperature = temperature
        self.threshold = threshold
        self.instance_weight = instance_weight

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings_VD, labels_NK = _checked(embeddings, labels)
            overlap_NN = jaccard(labels_NK).fill_diagonal_(1)
            positive_NN = overlap_NN >= self.threshold
            positives_N = positive_NN.sum(1, dtype=overlap_NN.dtype)
            weight_NN = overlap_NN.where(positive_NN, 0)
            return contrast(embeddings_VD, weight_NN, positives_N, self.temperature, self.instance_weight)


class SupConLoss(nn.Module):
    """Supervised contrastive loss (Khosla et al. 2020, Eq. 2): positives are images with an equal label row.

    Called as `MulSupConLoss`, also with an `instance_weight`.
    """

    def __init__(self, temperature: float = 0.07, instance_weight: float = 0.0) -> None:
        super().__init__()
        _check(temperature, instance_weight)
        self.temperature = temperature
        self.instance_weight = instance_weight

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings_VD, labels_NK = _checked(embeddings, labels)
            count_N = labels_NK.sum(1)
            differing_NN = count_N[:, None] + count_N - 2 * labels_NK @ labels_NK.T
            equal_NN = (differing_NN == 0).to(labels_NK.dtype)
            positives_N = equal_NN.sum(1)
            return contrast(embeddings_VD, equal_NN, positives_N, self.temperature, self.instance_weight)


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross-entropy (SimCLR, Chen et al. 2020, Eq. 1): the only positive of a
    view is the other view of its image.

    Called as `MulSupConLoss`; of the labels only their number is used.
    """

    def __init__(self, temperature: float = 0.10) -> None:
        super().__init__()
        _check(temperature)
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings_VD, labels_NK = _checked(embeddings, labels)
            itself_NN = torch.eye(len(labels_NK), dtype=embeddings_VD.dtype, device=embeddings_VD.device)
            return contrast(embeddings_VD, itself_NN, itself_NN.sum(1), self.temperature)
