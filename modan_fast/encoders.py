"""What an encoder is (network, stem, channels, feature size, input scale), and how its weights are read and written.

N images, C channels, H x W pixels, F features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

from modan_fast.config import Stem
from shard_builder.atomic import replacing
from shard_builder.settings import InputError

FILE = "encoder.safetensors"  # in a run folder
FIRST = "conv1.weight"
KERNELS: dict[Stem, tuple[int, int]] = {
    "3x3": (3, 1),
    "7x7": (7, 2),
}  # kernel and stride of the first convolution


class Encoder(nn.Module):
    """A ResNet-18 that maps grey images (N, 1, H, W) in [0, 1] to features (N, num_features).

    It is torchvision's network with `fc` the identity and another first convolution, its `stem`: `7x7` with stride 2 as
    torchvision builds it, or `3x3` with stride 1 as the paper has it. The max-pool stays. Grey images are repeated for
    each of `channels`. New weights are sampled from torch's global generator.
    """

    num_features = 512

    def __init__(self, stem: Stem = "3x3", channels: int = 1) -> None:
        super().__init__()
        self.stem, self.channels = stem, channels
        self.network = resnet18(weights=None)
        kernel, stride = KERNELS[stem]
        # With torch's default initialisation, as in the released code, which replaces this layer, too.
        self.network.conv1 = nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False)
        self.network.fc = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images.expand(-1, self.channels, -1, -1))
        return features

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers under torchvision's names, without `fc`."""
        return self.network.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over `weights`; raises RuntimeError where names or shapes differ."""
        self.network.load_state_dict(weights)


def preprocessing(encoder: Encoder, image_size: int | None) -> dict[str, Any]:
    """The input that an encoder of ours was trained on: pixels / 255, then (x - mean) / std, which changes nothing."""
    return {"image_size": image_size, "channels": encoder.channels, "mean": 0.0, "std": 1.0}


def encoder_file(source: str | Path) -> Path:
    """The encoder's file of a run folder, or `source` itself. Raises `InputError` if there is no such file."""
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no encoder at {path}: name a run folder of `modan-fast pretrain`, scratch or imagenet")
    return path


def save_encoder(path: Path, encoder: Encoder, metadata: Mapping[str, str]) -> None:
    """Write the weights as safetensors; equal weights and metadata give equal bytes."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in encoder.weights.items()}
    content = safetensors.torch.save(tensors, dict(metadata))
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
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}


def load_encoder(source: str | Path) -> Encoder:
    """The encoder of a run folder or a safetensors file, for grey images, in evaluation mode.

    The stem is read off the weights. A three-channel encoder becomes an equivalent one-channel encoder: the filters of
    its first convolution are summed. Raises `InputError` if there is no file, or if it is not a ResNet-18's.
    """
    path = encoder_file(source)
    try:
        weights: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is no readable safetensors file ({error}): give one, or the folder of a run"
        ) from error
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    stem = _stem_of(weights)
    if stem is None:
        raise InputError(f"{path} holds no ResNet-18 with a 3x3 or 7x7 stem: give the weights of one")
    wanted = Encoder(stem, channels=weights[FIRST].shape[1]).weights
    for name in sorted(wanted.keys() | weights.keys()):
        have, want = weights.get(name), wanted.get(name)
        if have is None or want is None or have.shape != want.shape:
            found = (
                "lacks" if have is None else "has an extra" if want is None else f"has {tuple(have.shape)} for"
            )
            raise InputError(f"{path} is no ResNet-18: it {found} {name}")
    weights[FIRST] = weights[FIRST].sum(1, keepdim=True)
    encoder = Encoder(stem)
    encoder.load_weights(weights)
    return encoder.eval()


def _stem_of(weights: Mapping[str, Tensor]) -> Stem | None:
    """The stem that has a first convolution of this shape; None for another architecture."""
    shape = tuple(weights[FIRST].shape) if FIRST in weights else ()
    return next((stem for stem, (kernel, _) in KERNELS.items() if shape[2:] == (kernel, kernel)), None)


def imagenet_encoder(path: Path | None, stem: Stem, *, sum_filters: bool, channels: int = 1) -> Encoder:
    """An encoder with ImageNet's weights: those in the file `path`, by default torchvision's.

    The first convolution has three channels there. For one channel the three filters are summed, which is what a grey
    image in RGB would see. It stays random where `sum_filters` is off (as in the released code) and where the stem has
    another shape. Raises `InputError` where there are no weights, or none of a ResNet-18.
    """
    encoder = Encoder(stem, channels)
    weights = imagenet_weights(path)
    try:
        encoder.load_weights(_fitted(weights, encoder.weights, sum_filters=sum_filters))
    except Exception as error:  # a file may hold anything
        raise _unusable(path, error) from error
    return encoder


def _fitted(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, sum_filters: bool
) -> dict[str, Tensor]:
    """ImageNet's `weights` without `fc`, and with a first convolution of the shape in `wanted`."""
    given = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    random, first = wanted[FIRST], given.get(FIRST, torch.empty(0))
    if random.shape[1] == 1:
        first = first.sum(1, keepdim=True) if sum_filters else random
    given[FIRST] = first if first.shape == random.shape else random
    for name in wanted.keys() - given.keys():
        # Weights from before torch 0.4.1 do not count batches; nothing here reads the count.
        if name.endswith("num_batches_tracked"):
            given[name] = wanted[name]
    return given


def imagenet_weights(path: Path | None) -> dict[str, Tensor]:
    """The tensors in a file, by default torchvision's for ImageNet, which are downloaded.

    Raises `InputError` if there are none.
    """
    try:
        if path is None:
            return dict(ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False))
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a file may be anything, and a download may fail in any way
        raise _unusable(path, error) from error


def _unusable(path: Path | None, error: Exception) -> InputError:
    if path is None:
        reason = " ".join(str(error).split())[:200]
        return InputError(
            f"torchvision's ImageNet weights cannot be fetched ({reason}): download resnet18-f37072fd.pth and name it "
            "with `imagenet_weights`"
        )
    # torch's own message about an unreadable file advises to run code from it.
    return InputError(f"{path} holds no weights of torchvision's ResNet-18: name resnet18-f37072fd.pth")
