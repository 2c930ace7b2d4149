"""What bounds a training step on 1, 8 and 64 GPUs: counted bytes over given speeds, beside measured parts.

Measured on this machine: the exchange by which ranks agree before each step, reading stored images by their offsets in
a local shard, and decoding them. Given, because no cluster is at hand: the speeds of links and of a step on a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common.images import synthetic_images
from common.measuring import in_turn, options, publish

from modan_fast.decode import open_decoder
from modan_fast.encoders import Encoder
from modan_fast.ranks import joined

EMBEDDING = 1000
TIMES = 200
# What every process runs to time the agreement; rank 0 prints seconds.
AGREE = "import scaling; scaling.agree()"


def agree() -> None:
    """Print the seconds of one agreement between the ranks."""
    with joined("cpu") as ranks:
        seconds = []
        for _ in range(TIMES):
            begun = time.perf_counter()
            ranks.highest([0, 0, 0, 0])
            seconds.append(time.perf_counter() - begun)
        if ranks.first:
            print(median(seconds))


def agreement(size: int) -> list[float]:
    """Seconds of an agreement between `size` processes of this machine."""
    variables = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29_876}
    started = []
    for rank in range(size):
        own = {name: str(value) for name, value in {**variables, "RANK": rank, "LOCAL_RANK": rank}.items()}
        command = [sys.executable, "-c", AGREE]
        started.append(
            subprocess.Popen(  # noqa: S603 - this file
                command, env={**os.environ, **own}, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
            )
        )
    said = [each.communicate()[0] for each in started]
    return [float(said[0])]


def reading(path: Path, size: int) -> list[float]:
    """Seconds to read one image of `size` bytes anywhere in a file that the system has in memory."""
    at = np.random.default_rng(0).integers(0, path.stat().st_size - size, 20_000).tolist()
    file = os.open(path, os.O_RDONLY)
    try:
        begun = time.perf_counter()
        for each in at:
            os.pread(file, size, each)
        return [(time.perf_counter() - begun) / len(at)]
    finally:
        os.close(file)


def decoding(image: bytes, size: int) -> list[float]:
    """Seconds to decode one image on one core."""
    decoder = open_decoder("torch", codec="png", size=size, batch_size=200, threads=1)
    begun = time.perf_counter()
    decoder.submit([image] * 200)
    decoder.collect()
    return [(time.perf_counter() - begun) / 200]


def model(gpus: int, given: argparse.Namespace, parameters: int, norms: int, image: float) -> dict[str, float]:
    """Milliseconds of the parts of a step, with `given.images` images a GPU and `image` seconds to get one."""
    machines = -(-gpus // given.gpus_a_machine)
    link = given.link_in_gb if machines == 1 else given.link_out_gb
    latency = given.latency_in_us if machines == 1 else given.latency_out_us
    share = (gpus - 1) / gpus
    views = 2 * given.images * gpus
    milli = 1e3 / 1e9
    # The part of the loss that grows with the ranks: own views by all views, forward once and backward twice.
    products = 3 * 2 * (2 * given.images) * views * EMBEDDING
    return {
        "network, forward and backward": given.step_ms,
        "loss, own views by all": products / (given.tflops * 1e12) * 1e3,
        "all-reduce of gradients, beside the backward pass": 2 * share * 4 * parameters / link * milli,
        "gather of embeddings": share * 4 * views * EMBEDDING / link * milli,
        "batch-norm's exchanges": 2 * norms * latency / 1e3 if gpus > 1 else 0.0,
        "reading and decoding, if streamed, in the background": given.images * image / given.cores_a_gpu * 1e3,
    }


def main() -> None:
    parser = options(__doc__, device=False)
    parser.add_argument("--images", type=int, default=256, help="images of a step on each GPU")
    parser.add_argument(
        "--step-ms", type=float, default=35.0, help="network of so many images at 224 px on one GPU"
    )
    parser.add_argument("--tflops", type=float, default=60.0, help="float32 products of a GPU")
    parser.add_argument("--gpus-a-machine", type=int, default=8)
    parser.add_argument("--link-in-gb", type=float, default=300.0, help="GB/s between GPUs of a machine")
    parser.add_argument("--link-out-gb", type=float, default=40.0, help="GB/s of a GPU to other machines")
    parser.add_argument("--latency-in-us", type=float, default=20.0, help="of a small exchange in a machine")
    parser.add_argument("--latency-out-us", type=float, default=50.0, help="of a small exchange between machines")
    parser.add_argument("--cores-a-gpu", type=int, default=12)
    given = parser.parse_args()
    encoder = Encoder("3x3")
    parameters = sum(each.numel() for each in encoder.parameters()) + encoder.num_features * EMBEDDING
    norms = sum(isinstance(each, torch.nn.BatchNorm2d) for each in encoder.modules())
    with tempfile.TemporaryDirectory() as folder:
        synthetic_images(Path(folder) / "images", 1, 224)
        png = next((Path(folder) / "images").rglob("*.png")).read_bytes()
        shard = Path(folder) / "shard"
        shard.write_bytes(png * (2**28 // len(png)))
        candidates = {
            "agreement of 2 processes": lambda: agreement(2),
            f"reading {len(png):,} bytes by offset": lambda: reading(shard, len(png)),
            "decoding 224 px, PNG, one core": lambda: decoding(png, 224),
        }
        measured = in_turn(candidates, given.rounds, "s")
    read, decode = (median(measured[name]) for name in list(candidates)[1:])
    lines = []
    for gpus in (1, 8, 64):
        parts = model(gpus, given, parameters, norms, read + decode)
        shown = "; ".join(f"{name} {value:.2f}" for name, value in parts.items())
        lines.append(f"model, {gpus} GPUs, ms of a step: {shown}")
    publish(
        "scaling",
        measured,
        unit="s",
        notes=[
            f"{parameters:,} parameters (ResNet-18, 3x3 stem, with its head), {norms} batch-norm layers.",
            *lines,
            "The model's speeds of links and GPUs are given on the command line, not measured.",
        ],
        arguments=given,
        device=torch.device("cpu"),
    )


if __name__ == "__main__":
    main()
