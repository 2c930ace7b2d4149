"""How many images a second does `modan-fast shard` pack, beside plain Pillow? And does its memory stay bounded?

Plain Pillow decodes, resizes and encodes the same images one after the other and writes nothing. `shard` also looks for
equal images and writes shards, checksums and the report; all of it counts, the start of its workers included.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np
import psutil
import torch
from common import in_turn, options, positive, publish
from loader import make_images
from PIL import Image

from shard_builder.build import build
from shard_builder.image import encode
from shard_builder.manifest import Codec
from shard_builder.options import BuildOptions
from shard_builder.scan import SUFFIXES

SETTINGS: dict[str, dict[str, int]] = {"png": {"compress_level": 1}, "jpeg": {"quality": 95}}
BUILD = """
import sys
from pathlib import Path
from shard_builder.build import build
from shard_builder.options import BuildOptions
build(Path(sys.argv[1]), Path(sys.argv[2]), BuildOptions(per_class=0, size=int(sys.argv[3])))
"""


def plain(files: Sequence[Path], size: int, codec: Codec) -> list[float]:
    """Images a second of Pillow alone, in this process."""
    start = time.perf_counter()
    for path in files:
        image = Image.open(path).convert("L").resize((size, size), Image.Resampling.BILINEAR)
        if codec == "raw":
            image.tobytes()
        else:
            image.save(io.BytesIO(), codec, **SETTINGS[codec])
    return [len(files) / (time.perf_counter() - start)]


def sharded(source: Path, images: int, size: int, codec: Codec) -> list[float]:
    """Images a second of a whole build, from scanning the source to the finished set."""
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        made = build(
            source, Path(scratch, "set"), BuildOptions(per_class=0, size=size, codec=codec, duplicates="keep")
        )
        seconds = time.perf_counter() - start
    assert made.manifest.samples + len(made.manifest.rejected) == images
    return [images / seconds]


def linked(files: Sequence[Path], count: int, folder: Path) -> list[Path]:
    """An archive of `count` images: links to the files, again and again."""
    links = []
    for number in range(count):
        file = files[number % len(files)]
        link = folder / "CT" / "lung" / str(number % 20) / f"{number:07}{file.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.absolute())
        links.append(link)
    return links


def tiny(count: int, folder: Path, side: int) -> None:
    """An archive of `count` different images of noise."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / "CT" / "lung" / str(number % 20) / f"{number:07}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(generator.integers(0, 256, (side, side), np.uint8), "png"))


def peak_memory(count: int, side: int) -> float:
    """The most memory in MiB that a build of so many tiny images takes, in its process and all its workers."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny(count, Path(scratch, "images"), side)
        process = psutil.Popen([sys.executable, "-c", BUILD, f"{scratch}/images", f"{scratch}/set", str(side)])
        peak = 0
        while process.poll() is None:
            rss = 0
            for each in [process, *process.children(recursive=True)]:
                with suppress(psutil.Error):  # it has just ended
                    rss += each.memory_info().rss
            peak = max(peak, rss)
            time.sleep(0.02)
        assert process.returncode == 0, "the build failed"
    print(f"{count:,} images: at most {peak / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    return peak / 2**20


def main() -> None:
    parser = options((__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--images", type=Path, help="folder with images to link to; synthetic if not given")
    parser.add_argument("--counts", type=positive, nargs="+", default=[2760, 16500], help="images to pack")
    parser.add_argument("--size", type=positive, default=224, help="side of the stored images in pixels")
    parser.add_argument("--codec", choices=get_args(Codec), default="png", help="how they are stored")
    parser.add_argument("--memory", type=positive, nargs=2, default=[4000, 40000], help="images for peak memory")
    parser.add_argument("--side", type=positive, default=48, help="side of these images in pixels")
    arguments = parser.parse_args()
    size, codec = arguments.size, arguments.codec
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images
        if images is None:
            images = Path(scratch, "images")
            make_images(images, 1000, size)
        files = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)
        candidates, ratios = {}, {}
        for count in arguments.counts:
            archive = Path(scratch, str(count))
            links = linked(files, count, archive)
            plain(links[: len(files)], size, codec)  # so that the files are in the page cache
            candidates[f"Pillow, {count:,} images"] = partial(plain, links, size, codec)
            candidates[f"modan-fast shard, {count:,} images"] = partial(sharded, archive, count, size, codec)
        measured = in_turn(candidates, arguments.rounds, "images/s")
        kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1000
    for count in arguments.counts:
        pillow, shard = (median(measured[f"{name}, {count:,} images"]) for name in ("Pillow", "modan-fast shard"))
        ratios[f"modan-fast shard / Pillow, {count:,} images, of medians"] = shard / pillow
    few, many = (peak_memory(count, arguments.side) for count in arguments.memory)
    publish(
        "shard",
        measured,
        unit="images/s",
        ratios=ratios,
        notes=[
            f"{codec}, {size} px, from {len(files):,} files of {kilobytes:.1f} kB on average, in the page cache and "
            "linked to until there are enough; Pillow writes PNG at level 1 and JPEG at quality 95.",
            f"Peak memory of the build and its workers together: {few:.0f} MiB for {arguments.memory[0]:,} images of "
            f"{arguments.side} px, {many:.0f} MiB for {arguments.memory[1]:,}: {many / few:.2f} times.",
        ],
        arguments=arguments,
        device=torch.device("cpu"),
    )


if __name__ == "__main__":
    main()
