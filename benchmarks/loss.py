"""How fast is the multi-label loss, forward and backward, beside the published way of computing it?

The published way compares the label sets of all pairs of images in a Python double loop. Its tiny reductions wake all
of torch's threads each time, so it is also timed on one thread, where it is fastest. Before the timing, all candidates
are checked to give the same value and gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common.baselines import TEMPERATURE, THRESHOLD, published_loss, stacked_jaccard
from common.measuring import in_turn, options, positive, publish, timed
from torch import Tensor
from torch.nn import functional as F

from modan_fast.devices import pick_device
from modan_fast.losses import MulSupConLoss

MODALITIES, ANATOMIES = 3, 9

Loss = Callable[[Tensor, Tensor], Tensor]


def shortest_jaccard(a_K: Tensor, b_K: Tensor) -> Tensor:
    """`stacked_jaccard` with the fewest tensor operations."""
    return torch.min(a_K, b_K).sum() / torch.max(a_K, b_K).sum()


def on_one_thread(
    embeddings_VD: Tensor, labels_NK: Tensor, similarity: Callable[[Tensor, Tensor], Tensor] = stacked_jaccard
) -> Tensor:
    """`published_loss` on one thread."""
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
    parser = options(__doc__)
    parser.add_argument("--images", type=positive, default=256, help="images in a batch; each has two views")
    parser.add_argument("--dimensions", type=positive, default=128, help="of an embedding")
    parser.add_argument("--repeats", type=positive, default=50, help="steps of our loss a turn; the loop has one")
    parser.add_argument("--compile", action="store_true", help="time our loss with torch.compile, too")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)

    torch.manual_seed(0)
    images = arguments.images
    labels = torch.cat(
        [F.one_hot(torch.randint(count, (images,)), count) for count in (MODALITIES, ANATOMIES)], dim=1
    )
    labels = labels.float().to(device)
    embeddings = torch.randn(2 * images, arguments.dimensions, device=device, requires_grad=True)
    ours: dict[str, Loss] = {"ours": MulSupConLoss(TEMPERATURE, THRESHOLD)}
    if arguments.compile:
        ours["ours, compiled"] = torch.compile(ours["ours"], dynamic=False)
    baselines: dict[str, Loss] = {"published": published_loss}
    if device.type == "cpu":
        baselines["published, on one thread"] = on_one_thread
        baselines["the same, fewest operations, on one thread"] = partial(
            on_one_thread, similarity=shortest_jaccard
        )

    value, gradient = step(on_one_thread, embeddings, labels)
    for loss in ours.values():
        our_value, our_gradient = step(loss, embeddings, labels)
        torch.testing.assert_close(our_value, value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(our_gradient, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))

    def turn(loss: Loss, repeats: int, warm_up: int) -> list[float]:
        """Milliseconds of each step."""
        work = partial(step, loss, embeddings, labels)
        return [1e3 * seconds for seconds in timed(work, device, times=repeats, warm_up=warm_up)]

    turns = {name: partial(turn, loss, 1, 0) for name, loss in baselines.items()}
    turns |= {name: partial(turn, loss, arguments.repeats, 5) for name, loss in ours.items()}
    publish(
        "loss",
        in_turn(turns, arguments.rounds, "ms"),
        unit="ms a step",
        ratios=[(baseline, our_name) for baseline in baselines for our_name in ours],
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
