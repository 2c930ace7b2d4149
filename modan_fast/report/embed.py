"""Features of pretraining images by each judged encoder, for the UMAP.

N images, F features.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from modan_fast.config import changed, is_url
from modan_fast.downstream.inits import imagenet, random_encoder
from modan_fast.downstream.probe import apply_to_all
from modan_fast.encoders import Architecture, Encoder, encoder_file, shapes_of
from modan_fast.folder import read_json
from modan_fast.pretrained import TORCHVISION, cached_imagenet, load_encoder
from modan_fast.recipes import evaluate_config
from modan_fast.remote import shown_location
from modan_fast.shards import ShardSet, open_shards
from modan_fast.store import READ_BATCH
from modan_fast.stream import Stream
from shard_builder.settings import InputError, Progress, usable_cores

log = logging.getLogger(__name__)

MOST_WEIGHTS = 10**9  # of a network that a record names; a ViT-H has 0.6 × 10**9


def pretraining_images(shards: ShardSet, samples: int, size: int) -> tuple[Tensor, list[str]]:
    """Pixels (N, 1, size, size) uint8 of the first samples, and the modality and anatomy of each.

    A shard set is shuffled when it is built, so its first samples are a random choice.
    """
    values = [bit.partition("=")[2] for bit in shards.manifest.labels]
    stream = Stream(shards, renderer="auto", batch_size=READ_BATCH, threads=usable_cores())
    pixels, names = [], []
    for batch in stream.fetch_first(min(samples, shards.manifest.samples)):
        for image, bits in zip(batch.pixels, batch.labels.numpy(), strict=True):
            stretched = Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.BILINEAR)
            pixels.append(np.asarray(stretched))
            names.append(" ".join(values[bit] for bit in bits.nonzero()[0]) or "no label")
    return torch.from_numpy(np.stack(pixels))[:, None], names


def shards_of(runs: Mapping[str, Any]) -> ShardSet:
    """The shard set of the first init that is a run. Raises `InputError` if there is none, or if it has changed.

    A recorded URL is not opened, because it may be a command and the record may be someone else's.
    """
    for init in runs["inits"].values():
        config = Path(init.get("path") or "").parent / "config.json"
        if init.get("shards") and os.path.isfile(config):
            settings = read_json(config).get("settings")
            location = settings.get("shards") if isinstance(settings, dict) else None
            if not isinstance(location, str):
                raise InputError(f"{config} names no shard set: name it with `shards`")
            if is_url(location):
                raise InputError(
                    f"{config.parent} was trained on {shown_location(location)}: name the shard set with `shards`"
                )
            log.info("opening the shard set %s, which %s names", location, config)
            shards = open_shards(location)
            if shards.fingerprint == init["shards"].get("fingerprint"):
                return shards
            raise InputError(f"{shards.location} has changed since {config.parent} was trained on it")
    raise InputError("no init is a run with a known shard set: name one with `shards`")


def features(
    inits: Mapping[str, Any],
    settings: Mapping[str, Any],
    images: Tensor,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Features (N, F) float32 of the images by init, and for each init without features the reason.

    `inits` and `settings` are those recorded in runs.json.
    """
    found, missing = {}, []
    for done, (name, init) in enumerate(inits.items(), start=1):
        try:
            encoder = _encoder(name, init, settings)
        except InputError as error:
            missing.append(f"{name}: {error}")
            continue
        encoder.to(device).to(memory_format=torch.channels_last)
        each = apply_to_all(encoder, images.to(device), torch.float32).cpu().numpy()
        if np.isfinite(each).all():
            found[name] = each
        else:
            missing.append(f"{name}: its features are not finite")
        progress("features", done, len(inits), name)
    return found, missing


def _encoder(name: str, init: Mapping[str, Any], settings: Mapping[str, Any]) -> Encoder:
    """The judged encoder; a new random one for `scratch`. Raises `InputError` if its file is gone or has changed."""
    size = settings["image_size"]
    if init["kind"] == "scratch":
        architecture = Architecture.of(settings["encoder"], stem=settings["stem"], image_size=size)
        if sum(shape.numel() for shape in shapes_of(architecture).values()) > MOST_WEIGHTS:
            raise InputError(f"{settings['encoder']} is too large to be made for a report")
        return random_encoder(architecture, 0)
    if not (init.get("path") and init.get("sha256")):
        raise InputError("runs.json names no file of it")
    path = Path(init["path"])
    normalize = bool((init.get("normalized") or {}).get(settings["recipe"]))
    if name == "imagenet":
        # A copy that is here, because a report of someone's results must not download anything.
        file = cached_imagenet() if path == TORCHVISION else path
        if not os.path.isfile(file):
            raise InputError(f"there is no {file}: download resnet18-f37072fd.pth and save it there")
        log.info("opening the weights %s, which runs.json names", file)
        judged = imagenet(file, changed(evaluate_config({"init": ["imagenet"]}), settings), normalize=normalize)
        if judged.sha256 != init["sha256"]:
            raise InputError(f"{path} has changed since it was judged")
        encoder = Encoder(judged.architecture)
        assert judged.weights is not None
        encoder.load_weights(judged.weights)
        return encoder
    if not os.path.isfile(path):
        raise InputError(f"{path} is gone or has changed since it was judged")
    log.info("opening the encoder %s, which runs.json names", path)
    if hashlib.sha256(encoder_file(path).read_bytes()).hexdigest() != init["sha256"]:
        raise InputError(f"{path} is gone or has changed since it was judged")
    source = f"{init['encoder']}={path}" if init.get("encoder") else path
    return load_encoder(source, normalize=normalize).resized(size)
