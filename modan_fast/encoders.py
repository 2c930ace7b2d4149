"""What an encoder is (network, input, feature size), and how it is built and saved.

N images, C channels, H x W pixels, F features.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from modan_fast.config import Stem
from modan_fast.weights import LARGEST_FILE
from shard_builder.atomic import replacing
from shard_builder.settings import InputError

FILE = "encoder.safetensors"  # in a run folder
RESNET18, TIMM = "resnet18", "timm/"
FIRST = "conv1.weight"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KERNELS: dict[Stem, tuple[int, int]] = {
    "3x3": (3, 1),
    "7x7": (7, 2),
}  # kernel and stride of the first convolution


@dataclass(frozen=True)
class Architecture:
    """Which network an encoder is, and what it is given.

    `name` is `resnet18`, which is torchvision's, or `timm/NAME` for a model of the timm library. Only the first has a
    `stem`: `7x7` with stride 2 as torchvision builds it, or `3x3` with stride 1 as the paper has it. A network whose
    input has a fixed size, such as a ViT, is built for `image_size`. Its input is (pixels / 255 - mean) / std, with one
    value for all channels or one for each. `drop_path` is the rate of stochastic depth while it trains, by default the
    network's own.
    """

    name: str = RESNET18
    stem: Stem | None = "3x3"
    channels: int = 1
    image_size: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    drop_path: float | None = None

    @property
    def normalises(self) -> bool:
        """Whether the input is changed at all."""
        return any(self.mean) or any(value != 1 for value in self.std)

    @property
    def fixed_size(self) -> bool:
        """Whether the network takes images of one size only."""
        return self.name != RESNET18 and bool(timm_config(self.name).get("fixed_input_size"))

    @classmethod
    def of(cls, name: str, *, image_size: int | None = None, **values: Any) -> Architecture:
        """The architecture of that name, with `image_size` only where it matters. Raises `InputError` if unknown."""
        check_name(name)
        built = cls(name, **values)
        if name != RESNET18:
            built = replace(built, stem=None)
        return replace(built, image_size=image_size) if built.fixed_size else built


def described(architecture: Architecture) -> str:
    """The network and its input in words, as `resnet18 with a 7x7 stem and 1 channel`."""
    stem = f"a {architecture.stem} stem and " if architecture.stem else ""
    size = f" of {architecture.image_size} px" if architecture.image_size else ""
    normalised = ", normalised" if architecture.normalises else ""
    channels = f"{architecture.channels} channel{'s' * (architecture.channels > 1)}"
    return f"{architecture.name} with {stem}{channels}{size}{normalised}"


def check_name(name: str) -> None:
    """Raise `InputError` if there is no encoder of that name."""
    import timm

    if name == RESNET18:
        return
    # A name may have a tag of published weights, as resnet50.a1_in1k; `is_model` does not look at it.
    if name.startswith(TIMM) and timm.is_model(name.removeprefix(TIMM)):
        with suppress(RuntimeError):
            timm.get_pretrained_cfg(name.removeprefix(TIMM))
            return
    close = difflib.get_close_matches(name.removeprefix(TIMM), [RESNET18, *timm.list_models()], 3)
    similar = (
        f"; similar: {', '.join(each if each == RESNET18 else TIMM + each for each in close)}" if close else ""
    )
    raise InputError(
        f"`encoder={name[:100]}` must be resnet18 or timm/NAME, NAME as timm.list_models() has it{similar}"
    )


def timm_config(name: str) -> dict[str, Any]:
    """What timm knows of a model's published weights: mean, std, input size, first convolution."""
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    return config.to_dict() if config else {}


def published_architecture(
    name: str, *, image_size: int | None = None, normalize: bool = True, **values: Any
) -> Architecture:
    """The architecture of a network's published weights: three channels, and if `normalize` their mean and deviation.

    A network whose size is fixed gets that of the weights, unless `image_size` says otherwise. Raises `InputError` for
    an unknown name.
    """
    check_name(name)
    config = timm_config(name) if name != RESNET18 else {}
    if normalize:
        values |= {
            "mean": tuple(config.get("mean", IMAGENET_MEAN)),
            "std": tuple(config.get("std", IMAGENET_STD)),
        }
    if name == RESNET18:
        values = {"stem": "7x7", **values}
    size = image_size or config.get("input_size", (3, 224, 224))[-1]
    return Architecture.of(name, image_size=size, channels=3, **values)


class Encoder(nn.Module):
    """A network that maps grey images (N, 1, H, W) in [0, 1] to features (N, num_features).

    Grey images are repeated for each of the architecture's channels, then normalised as it says. A ResNet-18 is
    torchvision's with `fc` the identity; its max-pool stays. New weights are sampled from torch's global generator.
    Raises `InputError` if timm has no such network, or none with these settings.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: Architecture | Stem = Architecture()) -> None:
        super().__init__()
        if isinstance(architecture, str):
            architecture = Architecture(stem=architecture)
        self.architecture = architecture
        self.network, self.num_features = _network(architecture)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(architecture, name), device="cpu").view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(-1, self.architecture.channels, -1, -1)
        if self.architecture.normalises:
            images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.network(images)
        return features

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers under torchvision's or timm's names, without a classifier."""
        return self.network.state_dict()

    @property
    def not_decayed(self) -> set[str]:
        """Names of parameters that weight decay leaves alone in the network's own recipe, such as a ViT's positions."""
        names = self.network.no_weight_decay() if hasattr(self.network, "no_weight_decay") else ()
        return set(names)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over `weights`; raises RuntimeError where names or shapes differ."""
        self.network.load_state_dict(weights)

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them: less memory, more time.

        Raises `InputError` if the network does not offer it.
        """
        if not hasattr(self.network, "set_grad_checkpointing"):
            raise InputError(f"{self.architecture.name} cannot checkpoint activations: choose a timm/ encoder")
        self.network.set_grad_checkpointing(True)

    def resized(self, image_size: int) -> Encoder:
        """This encoder for images of another size: itself, or a copy with resampled positions if its size is fixed.

        Raises `InputError` if the network cannot be resized.
        """
        if not self.architecture.fixed_size or self.architecture.image_size == image_size:
            return self
        resized = Encoder(self.architecture)
        resized.load_weights(self.weights)
        resized.architecture = replace(self.architecture, image_size=image_size)
        try:
            resized.network.set_input_size(img_size=image_size)
        except Exception as error:  # timm asserts, or has no such method
            raise InputError(
                f"{self.architecture.name} takes images of {self.architecture.image_size} px only, not {image_size} "
                f"({error}): pass `image_size={self.architecture.image_size}`"
            ) from error
        return resized.train(self.training)


def _network(architecture: Architecture) -> tuple[Any, int]:
    """The network and its feature size."""
    if architecture.name == RESNET18:
        assert architecture.stem is not None
        resnet = resnet18(weights=None)
        kernel, stride = KERNELS[architecture.stem]
        # With torch's default initialisation, as in the released code, which replaces this layer, too.
        resnet.conv1 = nn.Conv2d(architecture.channels, 64, kernel, stride, padding=kernel // 2, bias=False)
        resnet.fc = nn.Identity()
        return resnet, 512
    import timm

    settings: dict[str, Any] = {"in_chans": architecture.channels, "num_classes": 0}
    if architecture.image_size:
        settings["img_size"] = architecture.image_size
    if architecture.drop_path is not None:
        settings["drop_path_rate"] = architecture.drop_path
    try:
        network: Any = timm.create_model(architecture.name.removeprefix(TIMM), pretrained=False, **settings)
        return network, int(getattr(network, "head_hidden_size", None) or network.num_features)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        wanted = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise InputError(
            f"timm builds no {architecture.name} with {wanted} ({error}): choose other ones"
        ) from error


@lru_cache(maxsize=8)
def shapes_of(architecture: Architecture) -> dict[str, torch.Size]:
    """The shapes of an encoder's weights, found without memory for them."""
    with torch.device("meta"):
        return {name: value.shape for name, value in Encoder(architecture).weights.items()}


def preprocessing(encoder: Encoder, image_size: int | None) -> dict[str, Any]:
    """The input that an encoder expects: pixels / 255 of grey images, then (x - mean) / std in each channel."""
    architecture = encoder.architecture

    def plain(values: tuple[float, ...]) -> float | list[float]:
        return values[0] if len(values) == 1 else list(values)

    return {
        "image_size": image_size,
        "channels": architecture.channels,
        "mean": plain(architecture.mean),
        "std": plain(architecture.std),
    }


def encoder_file(source: str | Path) -> Path:
    """The encoder's file of a run folder, or `source` itself. Raises `InputError` if there is no such file."""
    path = Path(source)
    path = path / FILE if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise InputError(
            f"no encoder at {path}: name a run folder of `modan-fast pretrain`, a file of weights, timm/NAME=FILE, "
            "scratch or imagenet"
        )
    if os.path.getsize(path) > LARGEST_FILE:
        raise InputError(
            f"{path} has over {LARGEST_FILE >> 30} GiB, more than an encoder: give the weights of one"
        )
    return path


def save_encoder(path: Path, encoder: Encoder, metadata: Mapping[str, str]) -> None:
    """Write the weights as safetensors; equal weights and metadata give equal bytes.

    The architecture is written as the metadata `architecture`, in JSON.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in encoder.weights.items()}
    metadata = {**metadata, "architecture": json.dumps(asdict(encoder.architecture))}
    content = safetensors.torch.save(tensors, metadata)
    # The library writes the metadata in a random order. The first 8 bytes are the header's length.
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = metadata
    text = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
    with replacing(path) as file:
        file.write(content[:8] + text + content[end:])


def encoder_metadata(path: Path) -> dict[str, str]:
    """The metadata of an encoder's file, such as `epoch` and `method`; none where the file cannot be read."""
    try:
        with safetensors.safe_open(encoder_file(path), "pt") as file:
            return dict(file.metadata() or {})
    except (InputError, OSError, safetensors.SafetensorError):
        return {}
