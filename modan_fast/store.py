"""Decode once: the pixels of a whole shard set as uint8, in sample order, on the GPU or in host memory.

S samples, C x C canvas, K label bits.
"""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from modan_fast import config
from modan_fast.shards import ShardSet
from shard_builder.settings import InputError, Report, silent

log = logging.getLogger(__name__)

READ_BATCH = 64  # images decoded at a time
# Shares of the free memory that pixels may take; the rest is for activations, and for the machine's other users.
GPU_SHARE, HOST_SHARE = 0.5, 0.8

Chunk = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]


@dataclass(frozen=True)
class Store:
    """All samples of a shard set, decoded.

    `pixels` (S, C, C) uint8 lie on the GPU or in host memory; `labels` (S, K) uint8, 0/1, and `targets` (S,)
    int64, class indices, lie on the training device.
    """

    pixels: Tensor
    labels: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def canvas(self) -> int:
        """Side of the stored images in pixels."""
        return self.pixels.shape[1]


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be imported."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def pick_tier(tier: config.Tier, size: int, device: torch.device) -> Literal["gpu", "host"]:
    """Where `size` bytes of pixels are kept: as told, or the GPU if they fit there, else host memory.

    Logs the choice and its reason. Raises `InputError` where they fit nowhere, or not where they were told to.
    """
    pixels = f"{size / 2**30:.2f} GiB of pixels"
    if tier == "gpu" and device.type != "cuda":
        raise InputError("--store gpu needs a GPU that torch can use: pass --store host")
    if device.type == "cuda" and tier != "host":
        free, _ = torch.cuda.mem_get_info(device)
        if size <= GPU_SHARE * free:
            log.info("store: gpu (%s, %.1f GiB free)", pixels, free / 2**30)
            return "gpu"
        if tier == "gpu":
            raise InputError(f"--store gpu: {pixels} are over half of the {free / 2**30:.1f} GiB free on the GPU")
    free = psutil.virtual_memory().available
    if size > HOST_SHARE * free:
        raise InputError(
            f"{pixels} do not fit into the {free / 2**30:.1f} GiB of free memory: shard with a smaller "
            "--size or --per-class"
        )
    log.info("store: host memory (%s, %.1f GiB free)", pixels, free / 2**30)
    return "host"


def open_store(
    shards: ShardSet,
    *,
    tier: config.Tier = "auto",
    renderer: config.Renderer = "auto",
    device: torch.device,
    threads: int,
    report: Report = silent,
) -> Store:
    """Check the shards' hashes and decode every sample once.

    Raises `InputError` where a shard is damaged, or where memory does not suffice.
    """
    manifest = shards.manifest
    samples, canvas = manifest.samples, manifest.size
    kept = pick_tier(tier, samples * canvas**2, device)
    manifest.check_hashes(shards.folder, report)
    pixels = torch.empty((samples, canvas, canvas), dtype=torch.uint8, device=device if kept == "gpu" else "cpu")
    labels = np.empty((samples, manifest.bits), np.uint8)
    targets = np.empty(samples, np.int64)
    with_dali = renderer != "torch" and dali_installed()
    done = 0
    for chunk in _read_with_dali(shards, threads) if with_dali else _read_with_pillow(shards):
        part = slice(done, done + len(chunk[0]))
        pixels[part], labels[part], targets[part] = torch.from_numpy(chunk[0]), chunk[1], chunk[2]
        done = part.stop
        report("decoding", done, samples, "")
    return Store(pixels, torch.from_numpy(labels).to(device), torch.from_numpy(targets).to(device))


def _read_with_dali(shards: ShardSet, threads: int) -> Iterator[Chunk]:
    """The samples in storage order, through DALI's webdataset reader, which wants the index beside each tar."""
    from nvidia.dali import Pipeline, fn, types

    manifest = shards.manifest
    pipeline = Pipeline(batch_size=READ_BATCH, num_threads=threads, device_id=None)
    with pipeline:
        encoded, labels, target = fn.readers.webdataset(  # type: ignore[misc]
            paths=[str(path) for path in shards.tars],
            index_paths=[str(path) for path in shards.indices],
            ext=[_extension(manifest.codec), "labels", "target"],
            missing_component_behavior="error",
        )
        shape = (manifest.size, manifest.size, 1)
        pixels: Any = (
            fn.reshape(encoded, shape=shape)
            if manifest.codec == "raw"
            else fn.decoders.image(encoded, output_type=types.GRAY)
        )
        labels = fn.reshape(labels, shape=(manifest.bits,))
        pipeline.set_outputs(pixels, labels, fn.reinterpret(target, dtype=types.INT32, shape=(1,)))
    pipeline.build()
    for done in range(0, manifest.samples, READ_BATCH):
        # The reader starts over at the end, so the last batch is filled up with samples that were read before.
        count = min(READ_BATCH, manifest.samples - done)
        read = [output.as_array()[:count] for output in pipeline.run()]
        yield read[0][..., 0], read[1], read[2][:, 0].astype(np.int64)


def _read_with_pillow(shards: ShardSet) -> Iterator[Chunk]:
    """The samples in storage order, through the webdataset library and Pillow."""
    import webdataset

    manifest = shards.manifest
    size, extension = manifest.size, _extension(manifest.codec)
    for sample in webdataset.WebDataset([str(path) for path in shards.tars], shardshuffle=False):
        if manifest.codec == "raw":
            pixels = np.frombuffer(sample[extension], np.uint8).reshape(size, size)
        else:
            pixels = np.asarray(Image.open(io.BytesIO(sample[extension])))
        target = np.frombuffer(sample["target"], "<i4").astype(np.int64)
        yield pixels[None].copy(), np.frombuffer(sample["labels"], np.uint8)[None], target


def _extension(codec: str) -> str:
    return "jpg" if codec == "jpeg" else codec
