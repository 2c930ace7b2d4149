"""How many images a second does `modan-fast shard` pack, beside plain Pillow, and does its memory stay bounded?

Plain Pillow decodes, resizes and encodes the same images one after the other and writes nothing. `shard` also looks for
equal images and writes shards, checksums and the report; its time includes all of that, and the start of its workers.
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
from typing import get_args

import numpy as np
import psutil
import torch
from common.images import synthetic_images
from common.measuring import in_turn, options, positive, publish, timed
from PIL import Image

from shard_builder.build import build
from shard_builder.image import encode
from shard_builder.manifest import Codec
from shard_builder.options import BuildOptions
from shard_builder.scan import SUFFIXES

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, int]] = {"png": {"compress_level": 1}, "jpeg": {"quality": 95}}
BUILD = """
import sys
from pathlib import Path
from shard_builder.build import build
from shard_builder.options import BuildOptions
build(Path(sys.argv[1]), Path(sys.argv[2]), BuildOptions(per_class=0, size=int(sys.argv[3])))
"""


def pack_with_pillow(files: Sequence[Path], size: int, codec: Codec) -> None:
    """Decode, resize and encode the files in this process; write nothing."""
    for path in files:
        image = Image.open(path).convert("L").resize((size, size), Image.Resampling.BILINEAR)
        if codec == "raw":
            image.tobytes()
        else:
            image.save(io.BytesIO(), codec, **SETTINGS[codec])


def pack_with_shard(source: Path, images: int, size: int, codec: Codec) -> None:
    """Build a shard set, from scanning the source to the finished set."""
    with tempfile.TemporaryDirectory() as scratch:
        options = BuildOptions(per_class=0, size=size, codec=codec, duplicates="keep")
        manifest = build(source, Path(scratch, "set"), options).manifest
    assert manifest.samples + len(manifest.rejected) == images


def file_of(folder: Path, number: int, suffix: str) -> Path:
    """The path of an image in an archive whose labels are read off its folders; the folder is made."""
    path = folder / "CT" / "lung" / str(number % 20) / f"{number:07}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def linked_archive(files: Sequence[Path], count: int, folder: Path) -> list[Path]:
    """An archive of `count` links to the files, repeated as often as needed."""
    links = []
    for number in range(count):
        file = files[number % len(files)]
        links.append(file_of(folder, number, file.suffix))
        links[-1].symlink_to(file.absolute())
    return links


def noise_archive(count: int, folder: Path, side: int) -> None:
    """An archive of `count` different images of noise."""
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (side, side), np.uint8)
        file_of(folder, number, ".png").write_bytes(encode(pixels, "png"))


def peak_memory(count: int, side: int) -> float:
    """Peak memory in MiB of a build of `count` tiny images, its process and all its workers together."""
    with tempfile.TemporaryDirectory() as scratch:
        noise_archive(count, Path(scratch, "images"), side)
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
    parser = options(__doc__, device=False)
    parser.add_argument("--images", type=Path, help="folder with images to link to; synthetic if not given")
    parser.add_argument("--counts", type=positive, nargs="+", default=[2760, 16500], help="images to pack")
    parser.add_argument("--size", type=positive, default=224, help="side of the stored images in pixels")
    parser.add_argument("--codec", choices=get_args(Codec), default="png", help="how they are stored")
    parser.add_argument("--memory", type=positive, nargs=2, default=[4000, 40000], help="images for peak memory")
    parser.add_argument("--side", type=positive, default=48, help="side of these images in pixels")
    arguments = parser.parse_args()
    size, codec = arguments.size, arguments.codec
    with tempfile.TemporaryDirectory() as name:
        scratch, images = Path(name), arguments.images
        if images is None:
            images = scratch / "images"
            synthetic_images(images, min(1000, *arguments.counts), size)
        files = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)
        kilobytes = sum(path.stat().st_size for path in files) / len(files) / 1000

        def turn(pack: partial[None], count: int) -> list[float]:
            """Images a second."""
            return [count / seconds for seconds in timed(pack, CPU)]

        candidates, ratios = {}, []
        for count in arguments.counts:
            links = linked_archive(files, count, scratch / str(count))
            pack_with_pillow(links[: len(files)], size, codec)  # so that the files are in the page cache
            pillow, shard = f"Pillow, {count:,} images", f"modan-fast shard, {count:,} images"
            candidates[pillow] = partial(turn, partial(pack_with_pillow, links, size, codec), count)
            candidates[shard] = partial(
                turn, partial(pack_with_shard, scratch / str(count), count, size, codec), count
            )
            ratios.append((shard, pillow))
        measured = in_turn(candidates, arguments.rounds, "images/s")
    few, many = (peak_memory(count, arguments.side) for count in arguments.memory)
    publish(
        "shard",
        measured,
        unit="images/s",
        ratios=ratios,
        notes=[
            f"{codec}, {size} px, from {len(files):,} files of {kilobytes:.1f} kB on average, in the page cache, "
            "linked to as often as needed; Pillow writes PNG at level 1 and JPEG at quality 95.",
            f"Peak memory of the build and its workers together: {few:.0f} MiB for {arguments.memory[0]:,} images of "
            f"{arguments.side} px, {many:.0f} MiB for {arguments.memory[1]:,}: {many / few:.2f} times.",
        ],
        arguments=arguments,
        device=CPU,
    )


if __name__ == "__main__":
    main()
