"""The settings of each command as frozen dataclasses, and the named recipes: complete settings by method."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from shard_builder.settings import InputError, option

Method = Literal["mulsupcon", "simclr", "supcon", "supervised"]
Recipe = Literal["paper", "released-code"]
Stem = Literal["3x3", "7x7"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "fp16", "bf16"]
Renderer = Literal["auto", "dali", "torch"]
Tier = Literal["auto", "gpu", "host", "stream"]
Protocol = Literal["finetune", "probe"]


LARGEST = {"seed": 2**63 - 1, "image_size": 4096, "threads": 1024}


def in_range(name: str, value: float, least: float, why: str = "") -> None:
    """Raise `InputError` where the setting is smaller than it may be, or larger than `LARGEST` says."""
    if not value >= least or value == math.inf:
        raise InputError(f"--{name.replace('_', '-')} must be at least {least}{why and f' ({why})'}, got {value}")
    if value > LARGEST.get(name, value):
        raise InputError(f"--{name.replace('_', '-')} must be at most {LARGEST[name]}, got {value}")


def above_zero(name: str, value: float) -> None:
    """Raise `InputError` where the setting is not a positive number."""
    if not 0 < value < math.inf:
        raise InputError(f"--{name.replace('_', '-')} must be above 0, got {value}")


@dataclass(frozen=True)
class Augmentation:
    """The distribution of a view, as torchvision's transforms define it; `augment` samples it.

    Saturation, hue and RandomGrayscale change nothing on one channel, nor on three equal ones, and have no setting.
    """

    scale: tuple[float, float] = (0.2, 1.0)  # share of the canvas that a crop covers
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of a crop
    flip: float = 0.5  # probability of a horizontal flip
    jitter: float = 0.8  # probability that brightness and contrast change
    brightness: float = 0.4  # factors are uniform in 1 ± this
    contrast: float = 0.4
    blur: float = 0.0  # probability of a Gaussian blur whose sigma is uniform in `sigma`, in pixels of the view
    sigma: tuple[float, float] = (0.1, 2.0)


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `modan-fast pretrain`. The defaults are the recipe `paper` of `mulsupcon`.

    A field marked `recipe` is set by the recipe unless the user names a value. `None` stands for what only
    the shard set or the machine can tell; a run's `config.json` holds the values that it resolved to.
    """

    method: Method = option("mulsupcon", "Pretraining method.")
    recipe: Recipe = option("paper", "Named settings: the paper's text, or the code its authors released.")
    shards: str = option(
        "shards",
        "Shard set to train on, as `modan-fast shard` writes it: a folder, or a URL (https://host/set, gs://, hf://, "
        "or pipe:COMMAND with {} for a file's name).",
    )
    out: Path | None = option(None, "Run folder to write; runs/METHOD by default.")
    epochs: int = option(1000, "Epochs to train.", recipe=True)
    batch_size: int = option(256, "Images a step; each gives two views.", recipe=True)
    image_size: int | None = option(None, "Side of a view in pixels; the shard set's canvas by default.")
    stem: Stem = option("3x3", "First convolution: 3x3 stride 1, or 7x7 stride 2.", recipe=True)
    channels: int = option(
        1,
        "Channels of the encoder's input: 1, or 3 equal ones, for programs that expect RGB; the images are grey.",
    )
    temperature: float = option(0.07, "Softmax temperature; lower is sharper.", recipe=True)
    threshold: float = option(0.3, "Smallest Jaccard similarity of a positive pair.", recipe=True)
    optimizer: Literal["sgd", "adam"] = option("sgd", "Optimiser.", recipe=True)
    lr: float = option(0.05, "Learning rate after the warm-up.", recipe=True)
    momentum: float = option(0.9, "Momentum of SGD.", recipe=True)
    weight_decay: float = option(1e-4, "Weight decay.", recipe=True)
    warmup_epochs: int = option(
        3, "Epochs in which the learning rate rises linearly from 0.01 to a higher lr.", recipe=True
    )
    warmup_from: float = option(0.01, "Learning rate at the first step.", hidden=True)
    schedule: Literal["steps", "cosine"] = option(
        "steps", "Decay: a tenth after epochs 700, 800 and 900, or a cosine over all epochs.", recipe=True
    )
    milestones: tuple[int, ...] = option((700, 800, 900), "Epochs after which lr drops tenfold.", hidden=True)
    keep: tuple[int, ...] = option((), "Epochs after which the encoder is kept beside the last.", hidden=True)
    drop_last: bool = option(True, "Leave out an epoch's last batch where it is not full.", recipe=True)
    augmentation: Augmentation = option(Augmentation(), "Distribution of the views.", hidden=True)
    imagenet_weights: Path | None = option(None, "Weights of torchvision's ResNet-18 to start from, as a file.")
    seed: int = option(0, "Seed of weights, sample order and views.")
    device: Device = option("auto", "Where to train; a GPU if there is one.")
    precision: Precision = option(
        "auto", "Compute type: bf16 from Ampere on, fp16 on older GPUs, float32 on CPUs."
    )
    compile: bool | None = option(None, "Compile model and loss with torch.compile; by default on GPUs only.")
    renderer: Renderer = option(
        "auto",
        "What makes the views: DALI on a GPU where it is installed, and torch on a CPU, where it is about as fast.",
    )
    store: Tier = option(
        "auto", "Where decoded pixels are kept: the GPU if they fit, else host memory, else nowhere (stream)."
    )
    shuffle_window: int = option(
        16_384, "Images that are mixed at a time; up to as many wait in memory, encoded, when they are streamed."
    )
    threads: int | None = option(None, "CPU threads that decode and render; all cores by default.")
    checkpoint_every: int = option(10, "Epochs between two checkpoints.")

    def __post_init__(self) -> None:
        in_range("epochs", self.epochs, 1)
        in_range("batch_size", self.batch_size, 2, "a contrast needs a negative")
        in_range("warmup_epochs", self.warmup_epochs, 0)
        in_range("checkpoint_every", self.checkpoint_every, 1)
        in_range("seed", self.seed, 0)
        in_range("shuffle_window", self.shuffle_window, 1)
        if self.image_size is not None:
            in_range("image_size", self.image_size, 32, "a ResNet halves it five times")
        if self.threads is not None:
            in_range("threads", self.threads, 1)
        if self.channels not in (1, 3):
            raise InputError(f"--channels must be 1 or 3, got {self.channels}")
        above_zero("lr", self.lr)
        above_zero("temperature", self.temperature)
        in_range("weight_decay", self.weight_decay, 0)
        if not 0 <= self.momentum < 1:
            raise InputError(f"--momentum must be at least 0 and below 1, got {self.momentum}")
        if not 0 < self.threshold <= 1:
            raise InputError(f"--threshold must be above 0 and at most 1, got {self.threshold}")

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.out or Path("runs") / self.method

    @property
    def views(self) -> int:
        """Views of an image in a batch: two to contrast, one to classify."""
        return 1 if self.method == "supervised" else 2


_PAPER = PretrainConfig()
_RELEASED = PretrainConfig(
    recipe="released-code", stem="7x7", keep=(200,), drop_last=False, augmentation=Augmentation(scale=(0.08, 1.0))
)
_NO_STEPS: dict[str, Any] = {"warmup_epochs": 0, "milestones": ()}
_SIMCLR: dict[str, Any] = {
    "method": "simclr",
    "temperature": 0.1,
    "schedule": "cosine",
    "drop_last": True,
    **_NO_STEPS,
}
_ADAM: dict[str, Any] = {
    "method": "supervised",
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 0.0,
    **_NO_STEPS,
}

RECIPES: dict[tuple[Method, Recipe], PretrainConfig] = {
    ("mulsupcon", "paper"): _PAPER,
    ("mulsupcon", "released-code"): _RELEASED,
    ("supcon", "paper"): replace(_PAPER, method="supcon"),
    ("supcon", "released-code"): replace(_RELEASED, method="supcon"),
    ("simclr", "paper"): replace(_PAPER, **_SIMCLR),
    ("simclr", "released-code"): replace(
        _RELEASED, **_SIMCLR, augmentation=Augmentation(scale=(0.08, 1.0), blur=0.5)
    ),
    ("supervised", "paper"): replace(_PAPER, **_ADAM),
    ("supervised", "released-code"): replace(
        _RELEASED,
        **_ADAM,
        epochs=200,
        batch_size=32,
        keep=(),
        augmentation=Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0),
    ),
}

# What a resumed run may be given anew: where things are and how they are computed, not what is computed.
MAY_CHANGE_ON_RESUME = frozenset(
    {"shards", "out", "epochs", "device", "compile", "renderer", "store", "threads", "checkpoint_every"}
)


def pretrain_config(given: Mapping[str, Any]) -> PretrainConfig:
    """The settings of the recipe that `given` names, or of the default one, changed as `given` says."""
    recipe = RECIPES[given.get("method", "mulsupcon"), given.get("recipe", "paper")]
    return replace(recipe, **given)


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `modan-fast evaluate`; the defaults are the paper's downstream training."""

    task: Path = option(
        Path("task"), "Task: images and dataframe/*_{train,val,test}_fold{1..5}.csv, or two class folders."
    )
    init: tuple[str, ...] = option(
        (), "Encoder to judge: a run folder, an encoder file, scratch, or imagenet. Repeatable."
    )
    protocol: tuple[Protocol, ...] = option(("finetune", "probe"), "Protocol; both by default. Repeatable.")
    recipe: Recipe = option("paper", "Named settings: the paper's text, or the code its authors released.")
    out: Path = option(Path("results"), "Results folder to write.")
    group: str | None = option(
        None, "Patient of an image: a column of the fold files, or a regular expression for its path."
    )
    positive: str | None = option(None, "Positive one of two class folders; malignant, yes, 1 or the second.")
    repeats: int = option(10, "How often all folds are trained anew.")
    epochs: int = option(10, "Epochs of each training.")
    batch_size: int = option(32, "Images a step.")
    image_size: int = option(224, "Side of an image in pixels.")
    lr: float = option(1e-4, "Learning rate of Adam; divided by ten after every five epochs.")
    probe_lr: float | None = option(None, "The same of the probe; by default lr, or 1e-3 in released-code.")
    stem: Stem | None = option(None, "First convolution of `scratch` and `imagenet`; the recipe's by default.")
    imagenet_weights: Path | None = option(None, "File of the weights of `imagenet`; torchvision's by default.")
    seed: int = option(0, "Seed of initial weights and batch order.")
    device: Device = option("auto", "Where to train; a GPU if there is one.")
    precision: Precision = option(
        "auto", "Compute type: bf16 from Ampere on, fp16 on older GPUs, float32 on CPUs."
    )
    compile: bool | None = option(None, "Compile fine-tuning with torch.compile; by default on GPUs only.")

    def __post_init__(self) -> None:
        for name in ("repeats", "epochs"):
            in_range(name, getattr(self, name), 1)
        in_range("batch_size", self.batch_size, 2, "batch-norm needs two images")
        in_range("seed", self.seed, 0)
        in_range("image_size", self.image_size, 32, "a ResNet halves it five times")
        above_zero("lr", self.lr)
        if self.probe_lr is not None:
            above_zero("probe_lr", self.probe_lr)
        if self.group is not None:
            try:
                re.compile(self.group)
            except re.error as error:
                raise InputError(f"--group {self.group} is no regular expression ({error})") from error
        if not self.init:
            raise InputError("no encoder to judge: name one or more with --init RUN_FOLDER or --init scratch")

    def resolved(self) -> EvaluateConfig:
        """The same settings with the recipe's values in place of `None`."""
        paper = self.recipe == "paper"
        return replace(
            self,
            probe_lr=self.probe_lr or (self.lr if paper else 1e-3),
            stem=self.stem or ("3x3" if paper else "7x7"),
        )


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `modan-fast report`."""

    out: Path | None = option(None, "Folder to write to; the results folder by default.")
    reference: str | None = option(
        None, "Init that the others are compared with; by default the first one of the method mulsupcon."
    )
    shards: Path | None = option(None, "Shard set whose images the UMAP shows; by default the inits' own.")
    samples: int = option(2000, "Images in the UMAP; 0 leaves it out.")
    device: Device = option("auto", "Where to compute features; a GPU if there is one.")

    def __post_init__(self) -> None:
        in_range("samples", self.samples, 0)


def to_json(config: Any) -> dict[str, Any]:
    """The settings as JSON values: paths become strings, tuples lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, Path) else value

    return dict(plain(asdict(config)))


Config = TypeVar("Config")


def from_json(kind: type[Config], values: dict[str, Any]) -> Config:
    """The inverse of `to_json`; raises `InputError` for a setting that `kind` does not have."""

    def typed(wanted: Any, value: Any) -> Any:
        if isinstance(wanted, types.UnionType):
            return None if value is None else typed(wanted.__args__[0], value)
        if typing.get_origin(wanted) is Literal and value not in typing.get_args(wanted):
            raise InputError(f"unknown value {value!r}: it was written by another version of modan-fast")
        if is_dataclass(wanted):
            return from_json(wanted, value)  # type: ignore[arg-type]
        if wanted is Path:
            return Path(value)
        return tuple(value) if isinstance(value, list) else value

    kinds = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(kinds)):
        raise InputError(f"unknown setting {unknown[0]}: it was written by another version of modan-fast")
    return kind(**{name: typed(kinds[name], value) for name, value in values.items()})
