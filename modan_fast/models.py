"""The encoder, its stem, and the head that pretraining puts on it.

N images, C channels, H x W pixels, F = 512 features, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18

from modan_fast.config import Method, Stem

FEATURES = 512


def encoder(stem: Stem = "3x3", channels: int = 1) -> ResNet:
    """A ResNet-18 that maps images (N, C, H, W) to features (N, 512): torchvision's, with `fc` the identity.

    `stem` is its first convolution: `7x7` with stride 2 as torchvision builds it, `3x3` with stride 1 as the
    paper has it. The rest, max-pool included, is unchanged. Weights are drawn from torch's global generator, those of
    the first convolution as torch draws them by default, because the released code puts a new one in.
    """
    network = resnet18(weights=None)
    kernel, stride = (3, 1) if stem == "3x3" else (7, 2)
    network.conv1 = nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False)
    network.fc = nn.Identity()
    return network


def stem_of(conv1_weight: Tensor) -> Stem | None:
    """The stem that has a first convolution of this weight, or None for that of another architecture."""
    kernels: dict[tuple[int, ...], Stem] = {(3, 3): "3x3", (7, 7): "7x7"}
    return kernels.get(tuple(conv1_weight.shape[2:]))


def head(method: Method, classes: int) -> nn.Module:
    """What pretraining puts on the features: (N, 512) to embeddings (N, D), or to one logit a class.

    The contrastive methods with labels have no projection head: their embedding is what the ResNet's own `fc`
    makes of the features, 1000 numbers. SimCLR's has one hidden layer.
    """
    if method == "supervised":
        return nn.Linear(FEATURES, classes)
    if method == "simclr":
        return nn.Sequential(nn.Linear(FEATURES, 2048), nn.ReLU(inplace=True), nn.Linear(2048, 128))
    return nn.Linear(FEATURES, 1000)


def start_from_imagenet(encoder: ResNet, weights: Mapping[str, Tensor], *, sum_filters: bool) -> None:
    """Give `encoder` the weights of torchvision's ResNet-18 for ImageNet, except `fc`.

    Its first convolution has three channels there. For one channel the filters of the three are summed, which is
    what a grey image in RGB would see; they are left as drawn at random where `sum_filters` is off (as in the
    released code) and where the stem has another shape. Raises ValueError where other weights do not fit.
    """
    wanted = encoder.state_dict()
    given = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    drawn, first = wanted["conv1.weight"], given.get("conv1.weight", torch.empty(0))
    if drawn.shape[1] == 1:
        first = first.sum(1, keepdim=True) if sum_filters else drawn
    given["conv1.weight"] = first if first.shape == drawn.shape else drawn
    for key in wanted.keys() - given.keys():
        # Weights from before torch 0.4.1 do not count batches; nothing here reads the count.
        if key.endswith("num_batches_tracked"):
            given[key] = wanted[key]
    try:
        encoder.load_state_dict(given)
    except RuntimeError as error:
        raise ValueError(
            f"{len(wanted.keys() ^ given.keys())} tensors have other names, or shapes differ"
        ) from error


class Pretrainee(nn.Module):
    """An encoder with its pretraining head: views (N, C, H, W) to embeddings (N, D)."""

    def __init__(self, encoder: ResNet, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, views: Tensor) -> Tensor:
        embeddings: Tensor = self.head(self.encoder(views))
        return embeddings
