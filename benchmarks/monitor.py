"""What does watching a run cost? The same training with and without the monitor, in turns."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from common.images import shard_set
from common.measuring import in_turn, options, positive, publish

from modan_fast.api import pretrain
from modan_fast.devices import pick_device
from modan_fast.encoders import FILE
from modan_fast.monitor import held_out
from modan_fast.run import LOG

WATCHED, ALONE = "with the monitor", "without"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shards", type=Path, help="shard set; synthetic images by default")
    parser.add_argument("--count", type=positive, default=1000, help="synthetic images")
    parser.add_argument("--image-size", type=positive, default=64)
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--epochs", type=positive, default=3, help="of each training; one look each")
    parser.add_argument("--stem", default="7x7", choices=("3x3", "7x7"))
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    shares: list[float] = []

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shards = shard_set(arguments.shards, scratch, count=arguments.count, size=arguments.image_size)

        def turn(every: int) -> list[float]:
            """Seconds of each epoch but the first, which compiles and tunes, with its look."""
            run = pretrain(
                shards=shards.location,
                out=scratch / f"run-{every}",
                overwrite=(scratch / f"run-{every}").exists(),
                epochs=arguments.epochs + 1,
                batch_size=arguments.batch_size,
                image_size=arguments.image_size,
                stem=arguments.stem,
                device=arguments.device,
                monitor_every=every,
                checkpoint_every=arguments.epochs + 1,
            )
            lines = [json.loads(line) for line in (run / LOG).read_text().splitlines()][1:]
            looks = [line.get("monitor/seconds", 0.0) for line in lines]
            if every:
                shares.extend(look / line["seconds"] for line, look in zip(lines, looks, strict=True))
            return [line["seconds"] + look for line, look in zip(lines, looks, strict=True)]

        measured = in_turn({WATCHED: partial(turn, 1), ALONE: partial(turn, 0)}, arguments.rounds, "s")
        same = (scratch / "run-1" / FILE).read_bytes() == (scratch / "run-0" / FILE).read_bytes()
        samples = shards.manifest.samples

    publish(
        "monitor",
        measured,
        unit="s an epoch",
        ratios=[(WATCHED, ALONE)],
        notes=[
            f"{samples:,} images of {arguments.image_size} px, ResNet-18 with a {arguments.stem} stem; "
            f"{held_out(samples)} images are held out, and looked at after each epoch.",
            f"A look takes {100 * median(shares):.2f} % of its epoch's time by its own clock "
            f"({100 * min(shares):.2f} to {100 * max(shares):.2f} %); the ratio above has the machine's noise, too.",
            f"The encoders of both runs have {'the same bytes' if same else 'other bytes'}.",
        ],
        arguments=arguments,
        device=device,
    )


if __name__ == "__main__":
    main()
