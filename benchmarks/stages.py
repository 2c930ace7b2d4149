"""What does a view cost, stage by stage, on the way from a stored image to float32 pixels?

The renderer's DALI pipeline is built again and again, each time with one operator more, and timed on the same images
with the same parameters; the difference is what the operator costs. Decoding is timed alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import in_turn, options, positive, publish
from loader import AUGMENTATION, members, shards_or_made

from modan_fast.augment import view_parameters
from modan_fast.decode import DaliDecoder
from modan_fast.render import DaliRenderer, Rendering, dali_arguments, dali_pipeline
from modan_fast.store import read_all
from shard_builder.settings import usable_cores

# Those of `render.dali_stages` but the last, and how many of `render.dali_arguments` each and those before it take
# where views are as large as the stored images.
STAGES = {
    "copy: cut the crop out": 2,
    "resample": 3,
    "jitter: brightness": 4,
    "jitter: mean": 4,
    "jitter: contrast": 5,
}


def main() -> None:
    parser = options((__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--shards", type=Path, help="PNG shards; synthetic images if not given")
    parser.add_argument("--batch-size", type=positive, default=256, help="images in a batch, of two views each")
    parser.add_argument("--repeats", type=positive, default=10, help="batches of a turn")
    parser.set_defaults(device="cpu")
    arguments = parser.parse_args()
    device, batch_size, cores = torch.device("cpu"), arguments.batch_size, usable_cores()
    with tempfile.TemporaryDirectory() as name:
        shards = shards_or_made(arguments.shards, Path(name), batch_size)
        store = read_all(shards, device=device, threads=cores)
        files = [data for name, data in members(shards) if name.endswith(".png")]
    size, ids = store.canvas, np.arange(batch_size)
    pixels = store.pixels[:batch_size]
    parameters = view_parameters(AUGMENTATION, 0, 0, np.tile(ids, 2), np.repeat([0, 1], batch_size), store.canvas)
    decoder = DaliDecoder(batch_size, cores)
    rendering = Rendering(size, size, 2 * batch_size, device, torch.float32, cores)
    renderer = DaliRenderer(rendering)

    def decode() -> None:
        decoder.submit(files[:batch_size])
        decoder.collect()

    def render() -> None:
        renderer.submit(pixels, parameters)
        renderer.collect()

    fed = list(dali_arguments(parameters, rendering).items())
    rows = list(pixels[..., None].numpy()) * 2

    def run(pipeline: Any, inputs: int) -> None:
        pipeline.feed_input("pixels", rows, layout="HWC")
        for key, values in fed[:inputs]:
            pipeline.feed_input(key, values)
        pipeline.schedule_run()
        pipeline.share_outputs()
        pipeline.release_outputs()

    def turn(work: Callable[[], None]) -> list[float]:
        """Microseconds that an image, or its two views, took in each of the batches."""
        work()
        taken = []
        for _ in range(arguments.repeats):
            begun = time.perf_counter()
            work()
            taken.append(1e6 * (time.perf_counter() - begun) / batch_size)
        return taken

    candidates: dict[str, Callable[[], None]] = {"decode PNG": decode}
    for stages, (title, inputs) in enumerate(STAGES.items(), start=1):
        pipeline = dali_pipeline(rendering, stages)
        candidates[f"up to {title}"] = partial(run, pipeline, inputs)
    candidates["whole view, to float32"] = render
    measured = in_turn(
        {title: partial(turn, work) for title, work in candidates.items()}, arguments.rounds, "µs an image"
    )
    times = {title: median(values) for title, values in measured.items()}
    ends = [0.0, *(times[f"up to {title}"] for title in STAGES), times["whole view, to float32"]]
    costs = {
        title: after - before
        for title, before, after in zip([*STAGES, "convert to float32"], ends, ends[1:], strict=False)
    }
    whole = ends[-1]
    publish(
        "stages",
        measured,
        unit="µs an image",
        ratios={},
        notes=[
            f"Two views of {size} px of each of {batch_size} images, {cores} threads.",
            "Share of a view's time: "
            + ", ".join(f"{title} {cost / whole:.0%}" for title, cost in costs.items())
            + f". Decoding, once an epoch for both views when streamed and once a run from the store, is "
            f"{times['decode PNG'] / whole:.0%} of the same time.",
        ],
        arguments=arguments,
        device=device,
    )


if __name__ == "__main__":
    main()
