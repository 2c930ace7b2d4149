"""How much memory does a training step take, whole, in micro-batches and with checkpointed activations?

Each candidate runs in a process of its own, because a peak cannot be taken back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from common.measuring import in_turn, options, positive, publish, timed

from modan_fast.devices import peak_memory, pick_device
from modan_fast.loader import Batch
from modan_fast.recipes import pretrain_config
from modan_fast.step import TrainState

STEPS = 3


def peaks(arguments: Sequence[str], candidate: str, micro_batch: int) -> list[float]:
    """The peak in MiB of some steps of a candidate, measured by a new process, over that before the first step."""
    command = [sys.executable, __file__, *arguments, "--only", candidate, "--micro-batch", str(micro_batch)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this file
    found = json.loads(ended.stdout)
    print(f"{candidate}: {found['seconds']:.2f} s a step", file=sys.stderr)
    return [found["mib"]]


def measure(encoder: str, images: int, size: int, candidate: str, micro_batch: int, device: torch.device) -> None:
    """Print the peak and the time of a step as JSON."""
    config = pretrain_config(
        {
            "encoder": encoder,
            "image_size": size,
            "batch_size": images,
            "micro_batch": micro_batch if candidate == "micro-batches" else None,
            "checkpoint_activations": candidate == "checkpointed activations",
        }
    )
    state = TrainState(config.resolved(size), classes=2, steps=STEPS + 1, device=device)
    views = torch.rand(2 * images, 1, size, size, dtype=state.dtype, device=device)
    labels = (torch.rand(images, 12, device=device) < 0.2).to(torch.uint8)
    batch = Batch(views, labels, torch.zeros(images, dtype=torch.int64, device=device), torch.arange(images))
    name = "peak_gpu_gib" if device.type == "cuda" else "peak_host_gib"
    before = peak_memory(device)[name]
    seconds = timed(lambda: state.update(batch), device, times=STEPS)
    print(json.dumps({"mib": 1024 * (peak_memory(device)[name] - before), "seconds": median(seconds)}))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--encoder", default="timm/convnext_atto", help="as of modan-fast pretrain")
    parser.add_argument("--images", type=positive, default=32, help="images in a batch; each has two views")
    parser.add_argument("--image-size", type=positive, default=224, help="side of a view in pixels")
    parser.add_argument("--micro-batch", type=positive, default=8, help="images at a time")
    parser.add_argument("--only", help="measure one candidate in this process")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    shape = (arguments.encoder, arguments.images, arguments.image_size)
    if arguments.only:
        measure(*shape, arguments.only, arguments.micro_batch, device)
        return
    passed = ["--encoder", shape[0], "--images", str(shape[1]), "--image-size", str(shape[2])]
    passed += ["--device", arguments.device]
    names = ["whole", "micro-batches", "checkpointed activations"]
    turns = {name: partial(peaks, passed, name, arguments.micro_batch) for name in names}
    publish(
        "memory",
        in_turn(turns, arguments.rounds, "MiB"),
        unit="MiB over the process before its first step",
        ratios=[(names[0], name) for name in names[1:]],
        notes=[
            f"{arguments.encoder}, {arguments.images} images of {arguments.image_size} px with two views each, "
            f"micro-batches of {arguments.micro_batch} images. Gradients and optimiser are in each figure."
        ],
        arguments=arguments,
        device=device,
        variant=arguments.encoder.removeprefix("timm/"),
    )


if __name__ == "__main__":
    main()
