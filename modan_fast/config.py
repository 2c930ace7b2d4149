"""The settings of each command as frozen dataclasses, and how they are read from JSON, YAML and keyword arguments."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from shard_builder.settings import InputError, check_settings, literal_words, option

Method = Literal["mulsupcon", "simclr", "supcon", "supervised"]
Recipe = Literal["paper", "released-code"]  # of an evaluation, and of pretraining:
PretrainRecipe = Literal["paper", "released-code", "vit"]
Stem = Literal["3x3", "7x7"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "fp16", "bf16"]
RendererName = Literal["auto", "dali", "torch"]
Tier = Literal["auto", "gpu", "host", "stream"]
Protocol = Literal["finetune", "probe", "logistic", "knn"]
LoggerName = Literal["tensorboard", "wandb", "mlflow"]
FinetuneHead = Literal["linear", "identity", "identity-except-simclr"]

LARGEST_SEED = 2**63 - 1
SMALLEST_IMAGE, LARGEST_IMAGE = 32, 4096  # a ResNet halves the side five times
MOST_THREADS = 1024
LARGEST_FILE, LONGEST_VALUE, LONGEST_NAME = 2**18, 10_000, 100  # of settings, in characters


@dataclass(frozen=True)
class Augmentation:
    """The distribution of a view, as torchvision's transforms define it; `augment` samples from it.

    Saturation, hue and RandomGrayscale have no setting: they change nothing on one channel, nor on three equal ones.
    """

    scale: tuple[float, float] = option(
        (0.2, 1.0), "Smallest and largest share of the image that a crop covers.", recipe=True, above=0, most=1
    )
    ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3), "Smallest and largest width over height of a crop.", recipe=True, above=0, most=100
    )
    flip: float = option(0.5, "Probability of a horizontal flip.", recipe=True, least=0, most=1)
    jitter: float = option(0.8, "Probability that brightness and contrast change.", recipe=True, least=0, most=1)
    brightness: float = option(
        0.4, "Strength of the brightness change: the factor is uniform in 1 ± this.", recipe=True, least=0
    )
    contrast: float = option(0.4, "Strength of the contrast change, as of brightness.", recipe=True, least=0)
    blur: float = option(0.0, "Probability of a Gaussian blur.", recipe=True, least=0, most=1)
    sigma: tuple[float, float] = option(
        (0.1, 2.0),
        "Smallest and largest sigma of the blur, in pixels of the view.",
        recipe=True,
        above=0,
        most=100,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("scale", "ratio", "sigma"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise InputError(f"`{name}` must be two numbers, the smaller one first, got {bounds}")


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `modan-fast pretrain`. The defaults are the recipe `paper` of `mulsupcon`.

    A field marked `recipe` gets its default from the recipe. A field marked `changeable` may be changed when a run is
    resumed: it says where things are and how they are computed, not what is computed. `None` stands for what depends on
    the shard set or the machine; `config.json` records the value that was used.
    """

    method: Method = option("mulsupcon", "Pretraining method.")
    recipe: PretrainRecipe = option(
        "paper", "Named settings: the paper's text, the code its authors released, or what a ViT needs to train."
    )
    shards: str = option(
        "shards",
        "Shard set to train on, as `modan-fast shard` writes it: a folder, or a URL (https://host/set, gs://, hf://, "
        "or pipe:COMMAND with {} for a file's name).",
        changeable=True,
    )
    out: Path | None = option(None, "Run folder to write; runs/METHOD by default.", changeable=True)
    epochs: int = option(1000, "Epochs to train.", recipe=True, changeable=True, least=1)
    batch_size: int = option(
        256, "Images per step; each gives two views.", recipe=True, least=2, why="a contrast needs a negative"
    )
    image_size: int | None = option(
        None,
        "Side of a view in pixels; by default that of the stored images.",
        least=SMALLEST_IMAGE,
        most=LARGEST_IMAGE,
    )
    encoder: str = option(
        "resnet18",
        "Network: resnet18 (torchvision's), or timm/NAME for a model of the timm library.",
        recipe=True,
    )
    stem: Stem = option(
        "3x3", "First convolution of resnet18: 3x3 with stride 1, or 7x7 with stride 2.", recipe=True
    )
    channels: int = option(
        1, "Input channels of the encoder: 1, or 3 equal ones for programs that expect RGB. Images are grey."
    )
    start_from: Literal["random", "imagenet"] = option("random", "Initial weights of the encoder.", recipe=True)
    imagenet_weights: Path | None = option(
        None, "File of torchvision's ResNet-18 weights, to start from ImageNet without a download."
    )
    init_from: str | None = option(
        None,
        "Weights to start from, of the same encoder: a run folder, a file, ENCODER=FILE for another program's file, or "
        "timm/NAME for published weights.",
    )
    normalize: bool = option(
        False,
        "Give the encoder what its published weights expect: three channels, minus their mean, over their standard "
        "deviation. For `init_from`.",
    )
    sum_filters: bool = option(
        True,
        "Start from ImageNet with the first convolution's RGB filters summed; else that convolution is random.",
        recipe=True,
    )
    temperature: float = option(0.07, "Softmax temperature; lower is sharper.", recipe=True, above=0)
    threshold: float = option(
        0.3,
        "Smallest Jaccard similarity of a positive pair; with 0 every pair is positive.",
        recipe=True,
        least=0,
        most=1,
    )
    instance_weight: float = option(
        0.0,
        "Weight of NT-Xent, added to mulsupcon or supcon on the same embeddings: keeps images of one label apart.",
        recipe=True,
        least=0,
    )
    optimizer: Literal["sgd", "adam", "adamw"] = option("sgd", "Optimiser.", recipe=True)
    lr: float = option(0.05, "Learning rate after the warm-up.", recipe=True, above=0)
    momentum: float = option(0.9, "Momentum of SGD.", recipe=True, least=0, below=1)
    weight_decay: float = option(1e-4, "Weight decay.", recipe=True, least=0)
    decay_all: bool = option(
        True, "Decay every parameter; else norms, biases and positions are left alone.", recipe=True
    )
    clip_norm: float | None = option(
        None, "Largest norm of the gradient of all parameters; larger ones are scaled down.", recipe=True, above=0
    )
    drop_path: float | None = option(
        None, "Rate of stochastic depth; by default the network's own.", recipe=True, least=0, below=1
    )
    warmup_epochs: int = option(
        3, "Epochs in which the learning rate rises linearly to its full value.", recipe=True, least=0
    )
    warmup_from: float = option(0.01, "Learning rate at the first step of the warm-up.", recipe=True, least=0)
    schedule: Literal["steps", "cosine", "warmup-cosine"] = option(
        "steps",
        "Decay after the warm-up: a tenth at each milestone, or half a cosine (warmup-cosine); cosine has no warm-up.",
        recipe=True,
    )
    milestones: tuple[float, ...] = option(
        (0.7, 0.8, 0.9),
        "When the learning rate drops to a tenth: shares of the epochs (below 1), or epochs.",
        recipe=True,
        above=0,
    )
    keep: tuple[int, ...] = option((), "Epochs whose encoder is kept beside the last.", recipe=True, least=1)
    drop_last: bool = option(True, "Leave out an epoch's last batch if it is not full.", recipe=True)
    augmentation: Augmentation = field(default=Augmentation(), metadata={"recipe": True})
    seed: int = option(0, "Seed of weights, sample order and views.", least=0, most=LARGEST_SEED)
    device: Device = option("auto", "Where to train; a GPU if there is one.", changeable=True)
    precision: Precision = option(
        "auto", "Compute type: bf16 from Ampere on, fp16 on older GPUs, float32 on CPUs."
    )
    compile: bool | None = option(
        None, "Compile model and loss with torch.compile; by default on GPUs only.", changeable=True
    )
    renderer: RendererName = option(
        "auto",
        "What makes the views: DALI on a GPU where it is installed, torch on a CPU, where it is about as fast.",
        changeable=True,
    )
    store: Tier = option(
        "auto",
        "Where decoded pixels are kept: on the GPU if they fit, else in host memory, else nowhere (stream).",
        changeable=True,
    )
    shuffle_window: int = option(
        16_384,
        "Images that are shuffled together; of a set behind a URL as many wait in memory, encoded.",
        least=1,
    )
    threads: int | None = option(
        None,
        "CPU threads that decode and render; all cores by default.",
        changeable=True,
        least=1,
        most=MOST_THREADS,
    )
    micro_batch: int | None = option(
        None,
        "Images that are computed at a time, on all ranks together, to save memory; the loss is still that of the "
        "whole batch. Takes about a third more time; batch-norm sees a micro-batch.",
        least=2,
        why="batch-norm needs two images",
    )
    sync_batch_norm: bool = option(
        True,
        "With several ranks (torchrun): batch-norm takes its statistics from the images of all ranks, so that their "
        "number changes nothing.",
    )
    deterministic: bool = option(
        False,
        "On a GPU: use only operations that give the same bits each time, which is slower. A CPU always does.",
        changeable=True,
    )
    monitor_every: int = option(
        1,
        "Epochs between two looks at what the encoder knows of images held out for it; 0: none.",
        changeable=True,
        least=0,
    )
    monitor_held_out: bool = option(False, "Leave the images of the monitor out of training.")
    log: tuple[LoggerName, ...] = option(
        (), "Also log to wandb or mlflow; TensorBoard is used where it is installed. Repeatable.", changeable=True
    )
    checkpoint_activations: bool = option(
        False, "Compute activations of a timm/ encoder again instead of keeping them: less memory, more time."
    )
    checkpoint_every: int = option(10, "Epochs between two checkpoints.", changeable=True, least=1)
    checkpoint_minutes: float | None = option(
        10.0, "Minutes between two checkpoints at most, also within an epoch.", changeable=True, above=0
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.channels not in (1, 3):
            raise InputError(f"`channels` must be 1 or 3, got {self.channels}")
        if any(milestone >= 1 and milestone != int(milestone) for milestone in self.milestones):
            raise InputError(
                f"`milestones` must be shares of the epochs below 1 or whole epochs, got {self.milestones}"
            )
        if self.instance_weight and self.method not in ("mulsupcon", "supcon"):
            raise InputError(f"`instance_weight` is for mulsupcon and supcon, not {self.method}: leave it out")
        if self.init_from and self.start_from == "imagenet":
            raise InputError("`init_from` and `start_from=imagenet` contradict each other: pass one of them")
        if self.imagenet_weights and self.start_from != "imagenet":
            raise InputError("`imagenet_weights` needs `start_from=imagenet`: pass both, or neither")

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.out or Path("runs") / self.method

    @property
    def views(self) -> int:
        """Views per image in a batch: two to contrast, one to classify."""
        return 1 if self.method == "supervised" else 2

    def resolved(self, stored_size: int) -> PretrainConfig:
        """The same settings with milestones as epochs, and the image size of a set whose images have `stored_size`.

        A resumed run therefore keeps the milestones that it began with, whatever its `epochs`.
        """
        epochs = (round(each * self.epochs) if each < 1 else int(each) for each in self.milestones)
        return replace(self, image_size=self.image_size or stored_size, milestones=tuple(epochs))


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `modan-fast evaluate`; the defaults are the paper's downstream training (recipe `paper`)."""

    task: Path = option(
        Path("task"),
        "Task: a folder with dataframe/*_{train,val,test}_fold{1..5}.csv or *_{train,val,test}.csv, with class "
        "folders, or with train, val and test folders of them; a CSV file with a column for each label; a .npz file "
        "of MedMNIST; a CSV file that names DICOM files.",
    )
    init: tuple[str, ...] = option(
        (),
        "Encoder to judge: a run folder, a file of weights, ENCODER=FILE for another program's (as "
        "timm/densenet121=FILE), timm/NAME for published weights, scratch, or imagenet. Repeatable.",
    )
    protocol: tuple[Protocol, ...] = option(
        ("finetune", "probe", "logistic", "knn"),
        "Protocol; all by default: finetune and probe as in the paper, logistic regression to convergence, and k "
        "nearest neighbours. Repeatable.",
    )
    labels: tuple[int, ...] = option(
        (), "Also train on as many labelled images of each class, to draw few-label curves. Repeatable.", least=1
    )
    tries: int = option(5, "How often those images are sampled, for each fold.", least=1)
    recipe: Recipe = option("paper", "Named settings: the paper's text, or the code its authors released.")
    out: Path = option(Path("results"), "Results folder to write.")
    group: str | None = option(
        None, "Patient of an image: a column of the fold files, or a regular expression for its path."
    )
    positive: str | None = option(
        None,
        "Positive class: one of the class folders, or a word of a CSV file; malignant, yes, 1 or the second folder.",
    )
    words: str | None = option(
        None,
        "What words of labels mean, as positive=p|NCP,negative=n, or classes in order, as a,b,c; the published tasks' "
        "words are known.",
    )
    columns: tuple[str, ...] = option(
        (), "Label columns of a CSV file, each 0 or 1; by default all that hold only these. Repeatable."
    )
    subgroup: tuple[str, ...] = option(
        (),
        "Column, such as institution, device or sex, by whose values the report divides each metric. Repeatable.",
    )
    leave_out: str | None = option(
        None, "Column, such as institution: each fold tests on one of its values, and trains on the others."
    )
    color: bool = option(
        False, "Give encoders of three channels the colours of the images; else three equal grey channels."
    )
    repeats: int = option(10, "How often all folds are trained.", least=1)
    epochs: int = option(10, "Epochs of each training.", least=1)
    batch_size: int = option(32, "Images per step.", least=2, why="batch-norm needs two images")
    image_size: int = option(224, "Side of an image in pixels.", least=SMALLEST_IMAGE, most=LARGEST_IMAGE)
    lr: float = option(1e-4, "Learning rate of Adam; a tenth after every five epochs.", recipe=True, above=0)
    probe_lr: float | None = option(
        None,
        "Learning rate of the probe; by default lr, and 1e-3 in released-code.",
        recipe=True,
        above=0,
    )
    probe_batch_norm: Literal["frozen", "training"] = option(
        "frozen",
        "Batch-norm of the probed encoder: frozen statistics, or statistics that move with each training batch.",
        recipe=True,
    )
    finetune_head: FinetuneHead = option(
        "linear",
        "Head of fine-tuning: a two-way linear layer, or identity (the features are the logits, the first two of "
        "which are the classes); identity-except-simclr gives SimCLR's encoders the linear one.",
        recipe=True,
    )
    model_selection: Literal["lowest-val-loss", "last-epoch"] = option(
        "lowest-val-loss", "Which epoch of a training is judged.", recipe=True
    )
    encoder: str = option("resnet18", "Network of `scratch`: resnet18, or timm/NAME.", recipe=True)
    stem: Stem = option("3x3", "First convolution of a resnet18 as `scratch` or `imagenet`.", recipe=True)
    normalize: bool = option(
        True,
        "Give weights of other programs the mean and standard deviation that they were trained with.",
        recipe=True,
    )
    sum_filters: bool = option(
        True,
        "Give `imagenet` the sum of its first convolution's RGB filters; else that convolution is random.",
        recipe=True,
    )
    imagenet_weights: Path | None = option(None, "File of the weights of `imagenet`; torchvision's by default.")
    seed: int = option(0, "Seed of initial weights and batch order.", least=0, most=LARGEST_SEED)
    device: Device = option("auto", "Where to train; a GPU if there is one.")
    precision: Precision = option(
        "auto", "Compute type: bf16 from Ampere on, fp16 on older GPUs, float32 on CPUs."
    )
    compile: bool | None = option(None, "Compile fine-tuning with torch.compile; by default on GPUs only.")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.group is not None:
            try:
                re.compile(self.group)
            except (re.error, RecursionError, OverflowError) as error:
                raise InputError(f"`group={self.group}` is no regular expression ({error})") from error
        if not self.init:
            raise InputError("no encoder to judge: name one or more with `init=RUN_FOLDER` or `init=scratch`")

    def resolved(self) -> EvaluateConfig:
        """The same settings with the probe's learning rate in place of `None`."""
        return replace(self, probe_lr=self.probe_lr or self.lr)


@dataclass(frozen=True)
class EmbedConfig:
    """Settings of `modan-fast embed`. Those from `table` on say how a source is read, and are not for shard sets."""

    init: str | None = option(
        None,
        "Encoder: a run folder, a file of weights, ENCODER=FILE for another program's (as timm/densenet121=FILE), "
        "timm/NAME for published weights, or imagenet.",
    )
    out: Path | None = option(None, "File to write: .npz, .csv or .parquet.")
    image_size: int | None = option(
        None,
        "Side of an image in pixels; by default that of the run, else 224.",
        least=SMALLEST_IMAGE,
        most=LARGEST_IMAGE,
    )
    batch_size: int = option(64, "Images at a time.", least=1, most=2**16)
    normalize: bool = option(
        True, "Give weights of other programs the mean and standard deviation that they were trained with."
    )
    imagenet_weights: Path | None = option(None, "File of the weights of `imagenet`; torchvision's by default.")
    device: Device = option("auto", "Where to compute; a GPU if there is one.")
    precision: Precision = option(
        "auto", "Compute type: bf16 from Ampere on, fp16 on older GPUs, float32 on CPUs."
    )
    threads: int | None = option(
        None, "CPU threads that decode images; all cores by default.", least=1, most=MOST_THREADS
    )
    table: tuple[str, ...] = option((), "CSV file of images in SOURCE, as for `shard`. Repeatable.")
    fields: str | None = option(None, "Label fields of a table or of DICOM files, as a,b,c, as for `shard`.")
    skip_missing: bool = option(False, "Leave out rows of a table whose image does not exist.")
    frames: int = option(
        1, "Frames to take from a DICOM file with several, evenly spaced; 1 takes the middle one.", least=1
    )
    allow_burned_in: bool = option(
        False, "Take DICOM files whose headers say that text is burned into the pixels."
    )
    key: Path | None = option(
        None,
        "File of the key that hashes the paths of DICOM files, made if missing. By default beside the output.",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.imagenet_weights and self.init != "imagenet":
            raise InputError("`imagenet_weights` needs `init=imagenet`: pass both, or neither")


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `modan-fast report`."""

    out: Path | None = option(None, "Folder to write to; the results folder by default.")
    reference: str | None = option(
        None, "Init that the others are compared with; by default the first one of the method mulsupcon."
    )
    shards: str | None = option(
        None, "Shard set (folder or URL) whose images the UMAP shows; by default that of the inits."
    )
    samples: int = option(2000, "Images in the UMAP; 0 leaves it out.", least=0)
    device: Device = option("auto", "Where to compute features; a GPU if there is one.")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class ExportConfig:
    """Settings of `modan-fast export`."""

    onnx: bool = option(False, "Also write model.onnx, with the preprocessing inside.")
    results: Path | None = option(
        None, "Results folder of `modan-fast evaluate`, whose AUCs of this encoder the model card shows."
    )


def to_json(settings: Any) -> dict[str, Any]:
    """The settings as JSON values: paths become strings, tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, Path) else value

    return dict(plain(asdict(settings)))


Settings = TypeVar("Settings")


def changed(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """`settings` with the values in `given`, by field name; of a nested dataclass as `augmentation.scale` or a mapping.

    Values may be JSON's: lists for tuples, strings for paths. Raises `InputError` for an unknown name and for a value
    of the wrong type.
    """
    kinds = typing.get_type_hints(type(settings))
    values: dict[str, Any] = {}
    for name, value in given.items():
        outer, _, inner = name.partition(".")
        if outer not in kinds or (inner and not is_dataclass(kinds[outer])):
            raise InputError(f"unknown setting `{name}`{_similar(outer, kinds)}")
        if is_dataclass(kinds[outer]) and (inner or isinstance(value, Mapping)):
            nested = values.get(outer, getattr(settings, outer))
            values[outer] = changed(nested, {inner: value} if inner else value)
        else:
            values[outer] = _typed(name, kinds[outer], value)
    return replace(settings, **values)  # type: ignore[type-var]


def _similar(name: str, known: typing.Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean `{found[0]}`?" if found else ""


def _typed(name: str, kind: Any, value: Any) -> Any:
    """`value` as the type `kind`; `InputError` where it is of another one."""
    if isinstance(value, int) and abs(value) >= 2**63:  # it may be too long to be shown, and no float
        raise InputError(f"`{name}` is an integer of over 64 bits: give a smaller one")
    if isinstance(kind, types.UnionType):
        wanted = next(part for part in kind.__args__ if part is not types.NoneType)
        return None if value is None else _typed(name, wanted, value)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            wanted = typing.get_args(kind)[0]
            return tuple(_typed(name, wanted, each) for each in value)
    elif kind is float:
        if isinstance(value, str):  # YAML reads 1e-4 as text
            try:
                return float(value)
            except ValueError:
                pass
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind in (Path, str):
        if isinstance(value, (str, Path)) and _can_be_a_path(str(value)):
            return kind(value)
    elif words := literal_words(kind):
        if value in words:
            return value
        raise InputError(f"`{name}` must be one of {', '.join(words)}, got {reprlib.repr(value)}")
    elif isinstance(value, kind):
        return value
    article = {int: "an integer", float: "a number", bool: "true or false", Path: "a path", str: "a text"}
    wanted_text = "a list" if typing.get_origin(kind) is tuple else article.get(kind, str(kind))
    raise InputError(f"`{name}` must be {wanted_text}, got {reprlib.repr(value)}")


def _can_be_a_path(text: str) -> bool:
    """Whether the system can be asked for a path of this name; a file of settings may hold any character."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def is_url(location: str) -> bool:
    """Whether `location` begins with a URL's scheme; a single letter is a Windows drive."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", location) is not None


def read_settings(path: Path, kind: type, named: Collection[str] = ()) -> dict[str, Any]:
    """The settings that a YAML or JSON file gives for the dataclass `kind`, by name; nested ones as `outer.inner`.

    Those in `named`, which the user gave beside the file, are left out. A run's `config.json` is such a file: its part
    `settings` is read. Raises `InputError` that names the line of an unknown setting, of one that is given twice, of a
    URL, and of whatever is no YAML.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise InputError(f"{path} has over {LARGEST_FILE:,} characters: name a file of settings")
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a YAML or JSON file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise InputError(f"{where}: no YAML or JSON ({reason})") from error
    if root is None:
        return {}
    root = next((value for key, value in _mapping(root, path) if key.value == "settings"), root)
    given: dict[str, Any] = {}
    _collect(root, kind, "", path, given)
    given = {name: value for name, value in given.items() if name not in named}
    for name, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and (danger := _danger(name, each)):
                raise InputError(
                    f"{path} {danger}, which is done only if you name it yourself: repeat `{name}={each}`"
                )
    return given


def _danger(name: str, value: str) -> str | None:
    """What a setting in a file would do that only the user may ask for, because the file may be someone else's."""
    if name == "shards" and is_url(value):
        return "names a URL, and a URL may be a command"
    if name in ("init_from", "init") and value.startswith("timm/") and "=" not in value:
        return "downloads weights"
    if name == "out" and (Path(value).is_absolute() or ".." in Path(value).parts):
        return "writes to a folder elsewhere"
    return None


def _collect(node: yaml.Node, kind: type, prefix: str, path: Path, given: dict[str, Any]) -> None:
    """Add the settings below `node` to `given`."""
    kinds = typing.get_type_hints(kind)
    for key_node, value in _mapping(node, path):
        where = f"{path}, line {key_node.start_mark.line + 1}"
        key = "".join(each if each.isprintable() else "?" for each in key_node.value[:LONGEST_NAME])
        outer, _, inner = key.partition(".")
        name = prefix + key
        if is_dataclass(kinds.get(outer)):
            nested = typing.get_type_hints(kinds[outer])
            if not inner:
                _collect(value, kinds[outer], f"{name}.", path, given)
                continue
            known = inner in nested
        else:
            known = key in kinds
        if not known:
            raise InputError(f"{where}: unknown setting `{name}`{_similar(outer, kinds)}")
        if name in given:
            raise InputError(f"{where}: `{name}` is given twice")
        # Every setting is a word or a list of words. What is nested deeper may be a few lines that fill the memory.
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(part, yaml.ScalarNode) and len(part.value) <= LONGEST_VALUE for part in parts):
            raise InputError(f"{where}: `{name}` must be one value, or a list of values")
        try:
            given[name] = yaml.SafeLoader("").construct_object(value, deep=True)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # `!!bool maybe` is a KeyError
            raise InputError(f"{where}: `{name}` has no usable value") from error


def _mapping(node: yaml.Node, path: Path) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys and values of a YAML mapping."""
    if not isinstance(node, yaml.MappingNode) or not all(
        isinstance(key, yaml.ScalarNode) for key, _ in node.value
    ):
        raise InputError(f"{path}, line {node.start_mark.line + 1}: settings must be `name: value` pairs")
    return list(node.value)
