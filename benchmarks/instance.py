"""What does the instance term cost? MulSupCon with it, beside MulSupCon alone and both losses one after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common.measuring import in_turn, options, positive, publish, timed
from torch import Tensor

from modan_fast.devices import pick_device
from modan_fast.losses import MulSupConLoss, NTXentLoss

TEMPERATURE, WEIGHT = 0.07, 1.0


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=positive, default=256, help="images in a batch; each has two views")
    parser.add_argument("--dimensions", type=positive, default=128, help="of an embedding")
    parser.add_argument("--repeats", type=positive, default=50, help="steps a turn")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)

    torch.manual_seed(0)
    labels = (torch.rand(arguments.images, 12, device=device) < 0.2).float()
    embeddings = torch.randn(2 * arguments.images, arguments.dimensions, device=device, requires_grad=True)
    alone, instance = MulSupConLoss(TEMPERATURE), NTXentLoss(TEMPERATURE)
    candidates: dict[str, Callable[[], Tensor]] = {
        "MulSupCon": lambda: alone(embeddings, labels),
        "MulSupCon with the instance term": partial(
            MulSupConLoss(TEMPERATURE, instance_weight=WEIGHT), embeddings, labels
        ),
        "MulSupCon, then NT-Xent": lambda: alone(embeddings, labels) + WEIGHT * instance(embeddings, labels),
    }
    _, combined, separate = ((loss(), *torch.autograd.grad(loss(), embeddings)) for loss in candidates.values())
    torch.testing.assert_close(combined, separate, rtol=1e-4, atol=1e-5)

    def turn(loss: Callable[[], Tensor]) -> list[float]:
        """Milliseconds of each step, forward and backward."""

        def step() -> None:
            torch.autograd.grad(loss(), embeddings)

        return [1e3 * seconds for seconds in timed(step, device, times=arguments.repeats, warm_up=5)]

    names = list(candidates)
    publish(
        "instance",
        in_turn({name: partial(turn, loss) for name, loss in candidates.items()}, arguments.rounds, "ms"),
        unit="ms a step",
        ratios=[(names[2], names[1]), (names[1], names[0])],
        notes=[
            f"Forward and backward, {arguments.images} images with two views each, {arguments.dimensions} dimensions, "
            "float32. Value and gradient of the two ways to add the term are the same, to float32's rounding."
        ],
        arguments=arguments,
        device=device,
    )


if __name__ == "__main__":
    main()
