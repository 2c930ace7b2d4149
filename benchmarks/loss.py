"""How fast is the multi-label loss, forward and backward, beside the published way of computing it?

The published way compares the label sets of all pairs of images in a Python double loop. Its tiny reductions wake
all of torch's threads each time, so it is timed on one thread, too, where it is at its best. All candidates are
checked to give the same value and gradient before any is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from common import device_of, in_turn, options, positive, publish, synchronise
from torch import Tensor
from torch.nn import functional as F

from modan_fast.losses import MulSupConLoss

MODALITIES, ANATOMIES = 3, 9
TEMPERATURE, THRESHOLD = 0.07, 0.3

Loss = Callable[[Tensor, Tensor], Tensor]


def stacked(a_K: Tensor, b_K: Tensor) -> Tensor:
    """Jaccard similarity of two label sets as public multi-label SupCon code has it, over a stacked pair."""
    pair_2K = torch.stack([a_K, b_K])
    return torch.min(pair_2K, dim=0).values.sum() / torch.max(pair_2K, dim=0).values.sum()


def elementwise(a_K: Tensor, b_K: Tensor) -> Tensor:
    """The same with as few tensor operations as it can be written with."""
    return torch.min(a_K, b_K).sum() / torch.max(a_K, b_K).sum()


def published_loss(
    embeddings_VD: Tensor, labels_NK: Tensor, similarity: Callable[[Tensor, Tensor], Tensor] = stacked
) -> Tensor:
    """Eq. 3 of ModAn-MulSupCon with the Jaccard matrix filled pair by pair; V = 2N views of N images."""
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


def published_on_one_thread(
    embeddings_VD: Tensor, labels_NK: Tensor, similarity: Callable[[Tensor, Tensor], Tensor] = stacked
) -> Tensor:
    """`published_loss`, without the threads that only hinder it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return published_loss(embeddings_VD, labels_NK, similarity)
    finally:
        torch.set_num_threads(threads)


def step(loss: Loss, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    value = loss(embeddings, labels)
    return value.detach(), torch.autograd.grad(value, embeddings)[0]


def main() -> None:
    parser = options((__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--images", type=positive, default=256, help="images in a batch; each has two views")
    parser.add_argument("--dimensions", type=positive, default=128, help="of an embedding")
    parser.add_argument("--repeats", type=positive, default=50, help="steps of our loss a turn; the loop has one")
    parser.add_argument("--compile", action="store_true", help="time our loss with torch.compile, too")
    arguments = parser.parse_args()
    device = device_of(arguments.device)

    torch.manual_seed(0)
    images = arguments.images
    labels = torch.cat(
        [F.one_hot(torch.randint(count, (images,)), count) for count in (MODALITIES, ANATOMIES)], dim=1
    )
    labels = labels.float().to(device)
    embeddings = torch.randn(2 * images, arguments.dimensions, device=device, requires_grad=True)
    ours = MulSupConLoss(TEMPERATURE, THRESHOLD)
    baselines: dict[str, tuple[Loss, int]] = {"published": (published_loss, 1)}
    if device.type == "cpu":
        baselines["published, on one thread"] = published_on_one_thread, 1
        baselines["the same, fewest operations, on one thread"] = (
            partial(published_on_one_thread, similarity=elementwise),
            1,
        )
    candidates: dict[str, tuple[Loss, int]] = {"ours": (ours, arguments.repeats)}
    if arguments.compile:
        candidates["ours, compiled"] = torch.compile(ours, dynamic=False), arguments.repeats

    value, gradient = step(published_on_one_thread, embeddings, labels)
    for loss, _ in candidates.values():
        same_value, same_gradient = step(loss, embeddings, labels)
        torch.testing.assert_close(same_value, value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(same_gradient, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))

    def turn(loss: Loss, repeats: int) -> list[float]:
        """Milliseconds of each of the steps of a turn."""
        if repeats > 1:
            for _ in range(5):
                step(loss, embeddings, labels)
        taken = []
        for _ in range(repeats):
            synchronise(device)
            start = time.perf_counter()
            step(loss, embeddings, labels)
            synchronise(device)
            taken.append(1e3 * (time.perf_counter() - start))
        return taken

    measured = in_turn(
        {name: lambda each=each: turn(*each) for name, each in (baselines | candidates).items()},  # type: ignore[misc]
        arguments.rounds,
        "ms",
    )
    publish(
        "loss",
        measured,
        unit="ms a step",
        ratios={
            f"{baseline} / {candidate}, of medians": median(measured[baseline]) / median(measured[candidate])
            for baseline in baselines
            for candidate in candidates
        },
        notes=[
            f"Forward and backward, {images} images with two views each, {arguments.dimensions} dimensions, "
            f"{labels.shape[1]} label bits, float32.",
            f"All give the value {value:.5f} and the same gradient, to float32's rounding.",
        ],
        arguments=arguments,
        device=device,
    )


if __name__ == "__main__":
    main()
