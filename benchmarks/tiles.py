"""How much memory and time does the multi-label loss take in tiles, beside all pairs at once?

Forward and backward. Each measurement has a process of its own, because a peak cannot be taken back. All pairs at once
are left out where they would not fit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

import psutil
import torch
from common.measuring import in_turn, options, positive, publish, timed

from modan_fast import losses
from modan_fast.devices import peak_memory, pick_device

MATRICES = 3.3  # float32, of all pairs of views, that are held at once: measured at 4,096 images


def peaks(
    arguments: Sequence[str], way: str, images: int, times: list[float], values: list[float]
) -> list[float]:
    """The peak in MiB of some steps in a new process, over that before the first; adds its milliseconds and loss."""
    command = [sys.executable, __file__, *arguments, "--only", way, "--images", str(images)]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this file
    found = json.loads(ended.stdout)
    times.extend(found["ms"])
    values.append(found["value"])
    return [found["mib"]]


def measure(way: str, images: int, dimensions: int, steps: int, device: torch.device) -> None:
    """Print the peak, the times and the loss as JSON."""
    torch.manual_seed(0)
    losses.DENSE_PAIRS = 4 * images**2 if way == "at once" else 0
    loss = losses.MulSupConLoss()
    labels = (torch.rand(images, 12, device=device) < 0.2).float()
    embeddings = torch.randn(2 * images, dimensions, device=device, requires_grad=True)

    def step(rows: int) -> float:
        # Both halves of few rows are views of the same images, which is as good for a warm-up.
        value = loss(embeddings[: 2 * rows], labels[:rows])
        torch.autograd.grad(value, embeddings)
        return float(value.detach())

    step(2)  # imports and starts what all sizes need
    name = "peak_gpu_gib" if device.type == "cuda" else "peak_host_gib"
    before = peak_memory(device)[name]
    values: list[float] = []
    seconds = timed(lambda: values.append(step(images)), device, times=steps, warm_up=1)
    mib = 1024 * (peak_memory(device)[name] - before)
    print(json.dumps({"mib": mib, "ms": [1e3 * each for each in seconds], "value": values[-1]}))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=positive, nargs="+", default=[256, 1024, 4096], help="images in a batch")
    parser.add_argument("--dimensions", type=positive, default=128, help="of an embedding")
    parser.add_argument("--steps", type=positive, default=3, help="steps of each process")
    parser.add_argument("--only", choices=("at once", "in tiles"), help="measure this way in this process")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    if arguments.only:
        measure(arguments.only, arguments.images[0], arguments.dimensions, arguments.steps, device)
        return
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    passed = ["--dimensions", str(arguments.dimensions), "--steps", str(arguments.steps)]
    passed += ["--device", arguments.device]
    turns, ratios, notes = {}, [], []
    times: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    for images in arguments.images:
        needed = MATRICES * 4 * (2 * images) ** 2
        ways = ["at once", "in tiles"]
        if needed > free / 2:
            ways = ways[1:]
            notes.append(
                f"{images:,} images at once were left out: they need about {needed / 2**30:.0f} GiB, "
                f"more than half of the {free / 2**30:.0f} GiB free."
            )
        names = [f"{images:,} images {way}" for way in ways]
        ratios += [(names[0], names[1])] if len(names) == 2 else []
        for name, way in zip(names, ways, strict=True):
            times[name], values[name] = [], []
            turns[name] = partial(peaks, passed, way, images, times[name], values[name])
    measured = in_turn(turns, arguments.rounds, "MiB")
    for one, other in ratios:
        torch.testing.assert_close(torch.tensor(values[one]), torch.tensor(values[other]), rtol=1e-5, atol=1e-5)
    notes.insert(
        0,
        f"Forward and backward of MulSupCon, {arguments.dimensions} dimensions, 12 label bits, float32; each image has "
        "two views. Both ways give the same value, to float32's rounding. "
        f"{torch.get_num_threads()} of torch's threads on the CPU.",
    )
    results = [("memory", "MiB over the process before its first step", measured), ("time", "ms a step", times)]
    for what, unit, figures in results:
        publish(
            "tiles",
            figures,
            unit=unit,
            ratios=ratios,
            notes=notes,
            arguments=arguments,
            device=device,
            variant=f"{what}-{arguments.dimensions}",
        )


if __name__ == "__main__":
    main()
