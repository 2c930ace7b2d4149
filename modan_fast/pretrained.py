"""Weights that encoders start from or are judged with: of a run, of anybody's file, of timm, of ImageNet.

N images, C channels, H x W pixels.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from modan_fast.config import LARGEST_IMAGE, Stem
from modan_fast.encoders import (
    FIRST,
    KERNELS,
    RESNET18,
    TIMM,
    Architecture,
    Encoder,
    check_name,
    encoder_file,
    encoder_metadata,
    published_architecture,
    shapes_of,
    timm_config,
)
from modan_fast.weights import COUNT, UnusableError, check_weights, match, read_weights
from shard_builder.settings import InputError

log = logging.getLogger(__name__)

TORCHVISION = Path("torchvision")  # stands for ImageNet's weights where no file was named


def named_file(text: str) -> tuple[str | None, str]:
    """The encoder and the file of `ENCODER=FILE`, or None and `text`."""
    name, equals, file = text.partition("=")
    return (name, file) if equals and (name == RESNET18 or name.startswith(TIMM)) else (None, text)


def is_published(text: str) -> bool:
    """Whether `text` is timm/NAME, for the weights that timm downloads."""
    return text.startswith(TIMM) and "=" not in text and not os.path.exists(text)


def load_encoder(source: str | Path, *, normalize: bool = True, grey: bool = True) -> Encoder:
    """The encoder in `source`, for grey images in [0, 1], in evaluation mode.

    `source` is a run folder, a file of weights, `ENCODER=FILE` for a file of another program (`timm/densenet121=x.pt`),
    or `timm/NAME` for the weights that the timm library downloads. A file is .safetensors, .pth or .pt; no code in it
    runs. Names may have prefixes or number a network's parts, as RadImageNet's do (see `weights.match`); what was
    matched is logged. A file that names no encoder must hold a ResNet-18.

    With `normalize` the weights of other programs get the mean and standard deviation that they were trained with, as
    timm knows them; else images stay in [0, 1]. With `grey`, three-channel weights whose input is not normalised become
    those of an equivalent encoder of one channel: the filters of the first convolution are summed.

    Raises `InputError` if there is no such file or encoder, if a weight is missing or of another shape, and for
    weights that are not finite.
    """
    text = str(source)
    if is_published(text):
        return _published(text, normalize=normalize, grey=grey)
    name, file = named_file(text)
    path = encoder_file(file)
    weights = _read(path)
    if name is None:
        architecture = _recorded(path)
        if architecture is None:
            architecture = Architecture(stem=_stem_of(weights, path))
    else:
        architecture = published_architecture(name, normalize=normalize)
    return _loaded(architecture, weights, path, ours=name is None, grey=grey)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_weights(path)
    except UnusableError as error:
        raise InputError(
            f"{path} holds no weights that can be read ({error}): give a .safetensors, .pth or .pt file of tensors, or "
            "the folder of a run"
        ) from error


def _published(name: str, *, normalize: bool, grey: bool) -> Encoder:
    """An encoder with the weights that timm downloads, or has cached."""
    import timm

    architecture = published_architecture(name, normalize=normalize)
    try:
        network = timm.create_model(name.removeprefix(TIMM), pretrained=True, num_classes=0)
    except Exception as error:  # a download may fail in any way, and some models have no weights
        raise InputError(
            f"timm gives no weights for {name} ({' '.join(str(error).split())[:200]}): pass {name}=FILE with a file of "
            "them"
        ) from error
    return _loaded(architecture, network.state_dict(), Path(name), ours=False, grey=grey)


def _recorded(path: Path) -> Architecture | None:
    """The architecture that `save_encoder` recorded, None for a file without one. Raises `InputError` if it is odd."""
    text = encoder_metadata(path).get("architecture")
    if text is None:
        return None
    try:
        found = json.loads(text)
        mean, std = (tuple(float(each) for each in found[name]) for name in ("mean", "std"))
        size = found["image_size"]
        stem = found["stem"]
        if (stem not in KERNELS) if found["name"] == RESNET18 else stem is not None:
            raise ValueError("an unknown stem")
        if type(found["channels"]) is not int or found["channels"] not in (1, 3):
            raise ValueError("unknown values")
        if not (size is None or (type(size) is int and 0 < size <= LARGEST_IMAGE)):
            raise ValueError("a wrong image size")
        if not {len(mean), len(std)} <= {1, found["channels"]} or not all(map(isfinite, mean + std)) or 0 in std:
            raise ValueError("a wrong normalisation")
        architecture = Architecture(found["name"], stem, found["channels"], size, mean, std)
        check_name(architecture.name)
    except (InputError, AttributeError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise InputError(
            f"{path} records an architecture that is none of ours ({error}): use another file"
        ) from error
    return architecture


def _loaded(
    architecture: Architecture, weights: Mapping[str, Tensor], path: Path, *, ours: bool, grey: bool
) -> Encoder:
    """An encoder with the weights in a file, matched by name and checked.

    Files of `ours` hold an encoder only, so every name must match. Of other files what was left out is logged, and must
    not belong to a part of the network: a deeper network would give a shallower one all its names.
    """
    matching = match(weights, shapes_of(architecture))
    first = _first_weight(architecture)
    given = matching.weights
    if first in given and given[first].ndim > 1 and given[first].shape[1] != architecture.channels:
        channels = given[first].shape[1]
        if channels not in (1, 3) or architecture.normalises:
            raise InputError(f"{path}: {first} has {channels} input channels, not {architecture.channels}")
        architecture = replace(architecture, channels=channels)
    shapes = shapes_of(architecture)
    extra = [name for name in matching.left_out if not _is_head(name.removeprefix(matching.prefix))]
    wrong = [f"it lacks {name[:100]}" for name in matching.missing]
    wrong += [
        f"it has {tuple(given[name].shape)} for {name}, not {tuple(shape)}"
        for name, shape in shapes.items()
        if name in given and given[name].shape != shape
    ]
    wrong += [
        f"{name} is {value.dtype}"
        for name, value in given.items()
        if not (value.is_floating_point() or name.endswith(COUNT))
    ]
    parts = {name.partition(".")[0] for name in shapes}
    wrong += [
        f"it has an extra {name[:100]}"
        for name in extra
        if ours or name.removeprefix(matching.prefix).partition(".")[0] in parts
    ]
    if wrong:
        more = f" ({len(wrong)} such names)" if len(wrong) > 1 else ""
        raise InputError(f"{path} is no {architecture.name}: {wrong[0]}{more}; name its encoder as ENCODER=FILE")
    if not ours:
        log.info("%s: %s", path, matching)
    if grey and architecture.channels == 3 and not architecture.normalises and first:
        architecture = replace(architecture, channels=1)
        given = {**given, first: given[first].float().sum(1, keepdim=True)}
    encoder = Encoder(architecture)
    # Weights from before torch 0.4.1 do not count batches.
    encoder.load_weights({name: given.get(name, value) for name, value in encoder.weights.items()})
    check_weights(encoder.weights, path)
    return encoder.eval()


def _is_head(name: str) -> bool:
    return name.partition(".")[0] in ("fc", "head", "classifier")


def _first_weight(architecture: Architecture) -> str:
    """The name of the weight whose second axis is the input channels; empty where there are several."""
    if architecture.name == RESNET18:
        return FIRST
    first = timm_config(architecture.name).get("first_conv")
    return f"{first}.weight" if isinstance(first, str) else ""


def _stem_of(weights: Mapping[str, Tensor], path: Path) -> Stem:
    """The stem that has a first convolution of this shape. Raises `InputError` for another network."""
    first = weights.get(FIRST, torch.empty(0))
    found = next((stem for stem, (kernel, _) in KERNELS.items() if first.shape[2:] == (kernel, kernel)), None)
    if found is None or 0 in first.shape:
        raise InputError(
            f"{path} names no encoder and holds no ResNet-18 with a 3x3 or 7x7 stem: name its encoder as ENCODER=FILE, "
            "such as timm/densenet121=FILE"
        )
    return found


def imagenet_encoder(path: Path | None, architecture: Architecture, *, sum_filters: bool) -> Encoder:
    """A ResNet-18 with ImageNet's weights: those in the file `path`, by default torchvision's.

    The first convolution has three channels there. For one channel the three filters are summed, which is what a grey
    image in RGB would see. It stays random where `sum_filters` is off (as in the released code) and where the stem has
    another shape. Raises `InputError` where there are no weights, or none of a ResNet-18.
    """
    encoder = Encoder(architecture)
    weights = imagenet_weights(path)
    try:
        encoder.load_weights(_fitted(weights, encoder.weights, sum_filters=sum_filters))
    except RuntimeError as error:  # other names or shapes
        raise _no_imagenet(path, error) from error
    check_weights(encoder.weights, path or TORCHVISION)
    return encoder


def _fitted(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, sum_filters: bool
) -> dict[str, Tensor]:
    """ImageNet's `weights` without `fc`, and with a first convolution of the shape in `wanted`."""
    given = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    random, first = wanted[FIRST], given.get(FIRST, torch.empty(0))
    # Compared before anything is computed: a shape may be larger than the memory, without a value behind it.
    fits = first.shape[:1] + first.shape[2:] == random.shape[:1] + random.shape[2:] and 1 <= first.shape[1] <= 4
    if fits and sum_filters and random.shape[1] == 1:
        first = first.float().sum(1, keepdim=True)
    if first.shape != random.shape or (random.shape[1] == 1 and not sum_filters):
        first = random
    given[FIRST] = first
    for name in wanted.keys() - given.keys():
        # Weights from before torch 0.4.1 do not count batches; nothing here reads the count.
        if name.endswith(COUNT):
            given[name] = wanted[name]
    return given


def cached_imagenet() -> Path:
    """Where torchvision keeps its ImageNet weights once they are downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(ResNet18_Weights.IMAGENET1K_V1.url).name


def imagenet_weights(path: Path | None) -> dict[str, Tensor]:
    """The tensors in a file, by default torchvision's for ImageNet, which are downloaded.

    No code in the file runs. Raises `InputError` if there are no weights, or others than plain ones.
    """
    try:
        if path is None:
            return dict(ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False))
        return read_weights(path)
    except Exception as error:  # a download may fail in any way
        raise _no_imagenet(path, error) from error


def _no_imagenet(path: Path | None, error: Exception) -> InputError:
    if path is None:
        reason = " ".join(str(error).split())[:200]
        return InputError(
            f"torchvision's ImageNet weights cannot be fetched ({reason}): download resnet18-f37072fd.pth and name it "
            "with `imagenet_weights`"
        )
    return InputError(f"{path} holds no weights of torchvision's ResNet-18: name resnet18-f37072fd.pth")
