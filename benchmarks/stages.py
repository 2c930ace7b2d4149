"""What does a view cost, stage by stage, on the way from a stored image to float32 pixels?

The renderer's DALI pipeline is built several times, each time with one operator more, and timed on the CPU on the same
images with the same parameters; the difference is what the operator costs. Decoding is timed alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common.baselines import AUGMENTATION
from common.images import shard_set, stored_samples
from common.measuring import in_turn, options, positive, publish, timed

from modan_fast.augment import view_parameters
from modan_fast.decode import DaliDecoder
from modan_fast.render import DaliRenderer, Rendering, dali_arguments, dali_pipeline
from modan_fast.store import read_all
from shard_builder.settings import usable_cores

# All stages of `render.dali_stages` but the last. The number counts the `render.dali_arguments` that the pipeline up to
# this stage takes, where views are as large as the stored images.
STAGES = {
    "copy: cut the crop out": 2,
    "resample": 3,
    "jitter: brightness": 4,
    "jitter: mean": 4,
    "jitter: contrast": 5,
}


def main() -> None:
    parser = options(__doc__, device=False)
    parser.add_argument("--shards", type=Path, help="PNG shards; synthetic images if not given")
    parser.add_argument("--batch-size", type=positive, default=256, help="images in a batch, of two views each")
    parser.add_argument("--repeats", type=positive, default=10, help="batches of a turn")
    arguments = parser.parse_args()
    device, batch_size, cores = torch.device("cpu"), arguments.batch_size, usable_cores()
    with tempfile.TemporaryDirectory() as scratch:
        shards = shard_set(arguments.shards, Path(scratch), count=batch_size)
        if shards.manifest.codec != "png" or shards.manifest.samples < batch_size:
            parser.error(f"--shards must hold {batch_size} PNG images")
        store = read_all(shards, device=device, threads=cores)
        files = [sample.image for sample in stored_samples(shards, batch_size)]
    size, ids = store.canvas, np.arange(batch_size)
    pixels = store.pixels[:batch_size]
    parameters = view_parameters(AUGMENTATION, 0, 0, np.tile(ids, 2), np.repeat([0, 1], batch_size), size)
    decoder = DaliDecoder(batch_size, cores)
    rendering = Rendering(size, size, 2 * batch_size, device, torch.float32, cores)
    renderer = DaliRenderer(rendering)

    def decode() -> None:
        decoder.submit(files)
        decoder.collect()

    def render() -> None:
        renderer.submit(pixels, parameters)
        renderer.collect()

    inputs = list(dali_arguments(parameters, rendering).items())
    rows = list(pixels[..., None].numpy()) * 2

    def run(pipeline: Any, input_count: int) -> None:
        pipeline.feed_input("pixels", rows, layout="HWC")
        for name, values in inputs[:input_count]:
            pipeline.feed_input(name, values)
        pipeline.schedule_run()
        pipeline.share_outputs()
        pipeline.release_outputs()

    def turn(work: Callable[[], None]) -> list[float]:
        """Microseconds an image, or its two views, in each batch."""
        return [1e6 * each / batch_size for each in timed(work, device, times=arguments.repeats, warm_up=1)]

    candidates: dict[str, Callable[[], None]] = {"decode PNG": decode}
    for stages, (title, input_count) in enumerate(STAGES.items(), start=1):
        candidates[f"up to {title}"] = partial(run, dali_pipeline(rendering, stages), input_count)
    candidates["whole view, to float32"] = render
    measured = in_turn(
        {title: partial(turn, work) for title, work in candidates.items()}, arguments.rounds, "µs an image"
    )
    decoding, *ends = (median(values) for values in measured.values())
    costs = np.diff(ends, prepend=0) / ends[-1]
    shares = zip([*STAGES, "convert to float32"], costs, strict=True)
    publish(
        "stages",
        measured,
        unit="µs an image",
        notes=[
            f"Two views of {size} px of each of {batch_size} images, {cores} threads.",
            f"Share of a view's time: {', '.join(f'{title} {share:.0%}' for title, share in shares)}. Decoding, once "
            "an epoch for both views when streamed and once a run from the store, takes "
            f"{decoding / ends[-1]:.0%} of the time of a view.",
        ],
        arguments=arguments,
        device=device,
    )


if __name__ == "__main__":
    main()
