"""What an encoder is (network, stem, channels, feature size, input scale), and how its weights are read and written.

N images, C channels, H x W pixels, F features.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
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
LARGEST_FILE = 2**29  # bytes; a ResNet-18 has 90 MB in float64
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
COUNT = "num_batches_tracked"  # the end of a name; torch's batch-norm has this integer, which nothing here reads
FIRST = "conv1.weight"
TORCHVISION = Path("torchvision")  # stands for ImageNet's weights where no file was named
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
    path = path / FILE if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise InputError(f"no encoder at {path}: name a run folder of `modan-fast pretrain`, scratch or imagenet")
    if os.path.getsize(path) > LARGEST_FILE:
        raise InputError(
            f"{path} has over {LARGEST_FILE >> 20} MiB, more than a ResNet-18: give the weights of one"
        )
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
        with safetensors.safe_open(encoder_file(path), "pt") as file:
            return dict(file.metadata() or {})
    except (InputError, OSError, safetensors.SafetensorError):
        return {}


def load_encoder(source: str | Path) -> Encoder:
    """The encoder of a run folder or a safetensors file, for grey images, in evaluation mode.

    The stem is read off the weights. A three-channel encoder becomes an equivalent one-channel encoder: the filters of
    its first convolution are summed. Raises `InputError` if there is no file, if it is not a ResNet-18's, and for
    weights that are not finite.
    """
    path = encoder_file(source)
    try:
        weights: dict[str, Tensor] = safetensors.torch.load_file(path)
    except Exception as error:  # the library raises its own error, OSError, KeyError for a type it cannot name, …
        reason = str(error)[:200]
        raise InputError(
            f"{path} is no readable safetensors file ({reason}): give one, or the folder of a run"
        ) from error
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    _check_types(weights, path)
    stem = _stem_of(weights)
    if stem is None:
        raise InputError(f"{path} holds no ResNet-18 with a 3x3 or 7x7 stem: give the weights of one")
    wanted = _shapes(stem, channels=weights[FIRST].shape[1])
    for name in sorted(wanted.keys() | weights.keys()):
        have, want = weights.get(name), wanted.get(name)
        if have is None or want is None or have.shape != want:
            found = (
                "lacks" if have is None else "has an extra" if want is None else f"has {tuple(have.shape)} for"
            )
            raise InputError(f"{path} is no ResNet-18: it {found} {name[:100]}")
    weights[FIRST] = weights[FIRST].float().sum(1, keepdim=True)
    with torch.device("meta"):  # no random weights, which would be replaced
        encoder = Encoder(stem)
    encoder = encoder.to_empty(device="cpu")
    encoder.load_weights(weights)
    _check_finite(encoder, path)
    return encoder.eval()


@lru_cache(maxsize=8)
def _shapes(stem: Stem, channels: int) -> dict[str, torch.Size]:
    """The shapes of an encoder's weights, found without memory for them."""
    with torch.device("meta"):
        return {name: value.shape for name, value in Encoder(stem, channels).weights.items()}


def _check_types(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise `InputError` that names the first of `weights` that is no plain tensor of floating-point numbers."""
    for name, value in weights.items():
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_neg()
        number = value.dtype in FLOATS or (name.endswith(COUNT) and value.dtype == torch.int64)
        if not (plain and number and value.device.type == "cpu"):
            kind = f"{value.dtype}, {value.layout}, {value.device}".replace("torch.", "")
            raise InputError(
                f"{path}: {name[:100]} is no tensor of floating-point numbers ({kind}): give weights"
            )


def _check_finite(encoder: Encoder, path: Path) -> None:
    for name, value in encoder.weights.items():
        if not value.isfinite().all():
            raise InputError(f"{path} holds weights that are not finite ({name}): its pretraining diverged")


def _stem_of(weights: Mapping[str, Tensor]) -> Stem | None:
    """The stem that has a first convolution of this shape; None for another architecture."""
    shape = tuple(weights[FIRST].shape) if FIRST in weights else ()
    found = next((stem for stem, (kernel, _) in KERNELS.items() if shape[2:] == (kernel, kernel)), None)
    return found if 0 not in shape else None


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
    except RuntimeError as error:  # other names or shapes
        raise _unusable(path, error) from error
    _check_finite(encoder, path or TORCHVISION)
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
            weights = dict(ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False))
        else:
            _check_size(path)
            if path.suffix == ".safetensors":
                weights = safetensors.torch.load_file(path)
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)
        # A tensor may be larger than the memory, and is not to be walked through.
        if not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
        ):
            raise TypeError("not every entry is a named tensor")
        if sum(value.nbytes for value in weights.values()) > LARGEST_FILE:
            raise ValueError("too large")
    except Exception as error:  # a file may be anything, and a download may fail in any way
        raise _unusable(path, error) from error
    _check_types(weights, path or TORCHVISION)
    return weights


def _check_size(path: Path) -> None:
    """Raise ValueError if `path` is no file, or one that fills the memory, also once it is unpacked."""
    if not os.path.isfile(path):
        raise ValueError("no file")
    size = os.path.getsize(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(part.file_size for part in archive.infolist()))
    if size > LARGEST_FILE:
        raise ValueError("too large")


def _unusable(path: Path | None, error: Exception) -> InputError:
    if path is None:
        reason = " ".join(str(error).split())[:200]
        return InputError(
            f"torchvision's ImageNet weights cannot be fetched ({reason}): download resnet18-f37072fd.pth and name it "
            "with `imagenet_weights`"
        )
    # torch's own message about an unreadable file advises to run code from it.
    return InputError(f"{path} holds no weights of torchvision's ResNet-18: name resnet18-f37072fd.pth")
