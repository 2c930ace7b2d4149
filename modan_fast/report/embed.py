"""Features of pretraining images, for the UMAP of each init."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from modan_fast.downstream.inits import TORCHVISION, imagenet
from modan_fast.downstream.probe import apply_to_all
from modan_fast.downstream.results import recorded_settings
from modan_fast.encoders import Encoder, load_encoder
from modan_fast.folder import read_json
from modan_fast.shards import ShardSet, open_shards
from modan_fast.store import READ_BATCH
from modan_fast.stream import Stream
from shard_builder.settings import InputError, Progress, usable_cores


def pretraining_images(shards: ShardSet, samples: int, size: int) -> tuple[Tensor, list[str]]:
    """Pixels (N, 1, size, size) uint8 of the first samples, and the modality and anatomy of each.

    A shard set is shuffled when it is built, so its first samples are a random choice.
    """
    values = [bit.partition("=")[2] for bit in shards.manifest.labels]
    stream = Stream(shards, renderer="auto", batch_size=READ_BATCH, threads=usable_cores())
    pixels, names = [], []
    for read in stream.fetch_first(min(samples, shards.manifest.samples)):
        for image, bits in zip(read.pixels, read.labels.numpy(), strict=True):
            stretched = Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BILINEAR)
            pixels.append(np.asarray(stretched))
            names.append(" ".join(values[bit] for bit in bits.nonzero()[0]) or "no label")
    return torch.from_numpy(np.stack(pixels))[:, None], names


def shards_of(runs: Mapping[str, Any]) -> ShardSet:
    """The shard set that the first run among the inits was trained on.

    Raises `InputError` where there is none, or none any more.
    """
    for init in runs["inits"].values():
        config = Path(init.get("path", "")).parent / "config.json"
        if init.get("shards") and config.is_file():
            shards = open_shards(read_json(config)["settings"]["shards"])
            if shards.fingerprint == init["shards"]["fingerprint"]:
                return shards
            raise InputError(f"{shards.location} has changed since {config.parent} was trained on it")
    raise InputError("no init is a run that tells its shard set: name one with `shards`")


def features(
    runs: Mapping[str, Any], recipe: str, images: Tensor, device: torch.device, progress: Progress
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Features (N, 512) float32 of the images by init, and why some inits have none."""
    found, missing = {}, []
    for done, (name, init) in enumerate(runs["inits"].items(), start=1):
        try:
            encoder = _encoder(name, init, runs, recipe)
        except InputError as error:
            missing.append(f"{name}: {error}")
            continue
        encoder.to(device).to(memory_format=torch.channels_last)
        found[name] = apply_to_all(encoder, images.to(device), torch.float32).cpu().numpy()
        progress("features", done, len(runs["inits"]), name)
    return found, missing


def _encoder(name: str, init: Mapping[str, Any], runs: Mapping[str, Any], recipe: str) -> Encoder:
    """The encoder that was judged; of `scratch` a fresh one. `InputError` where its file is gone or has changed."""
    if init["kind"] == "scratch":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return Encoder(recorded_settings(runs, recipe)["stem"])
    path = Path(init["path"])
    if name == "imagenet":
        recorded = recorded_settings(runs, recipe)
        stem, seed, sum_filters = (recorded[name] for name in ("stem", "seed", "sum_filters"))
        judged = imagenet(None if path == TORCHVISION else path, stem, seed, sum_filters=sum_filters)
        if judged.sha256 != init["sha256"]:
            raise InputError(f"{path} has changed since it was judged")
        encoder = Encoder(stem)
        assert judged.given is not None
        encoder.load_weights(judged.given)
        return encoder
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != init["sha256"]:
        raise InputError(f"{path} is gone or has changed since it was judged")
    return load_encoder(path)
