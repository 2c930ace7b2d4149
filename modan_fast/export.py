"""An encoder as a folder that other programs load: timm's format, safetensors, ONNX, and a model card.

N images, C channels, H x W pixels, F features.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modan_fast import __version__
from modan_fast.config import ExportConfig, Method, PretrainConfig, is_url
from modan_fast.downstream.results import Results
from modan_fast.downstream.statistics import auc_table
from modan_fast.encoders import (
    KERNELS,
    RESNET18,
    TIMM,
    Architecture,
    Encoder,
    described,
    encoder_file,
    encoder_metadata,
    save_encoder,
    timm_config,
)
from modan_fast.folder import check_writable, read_json, write_json, write_text
from modan_fast.pretrained import is_published, load_encoder, named_file
from modan_fast.recipes import pretrain_config
from modan_fast.report.formats import Table, to_markdown
from modan_fast.report.tables import summary_table
from shard_builder.atomic import new_folder
from shard_builder.files import read_regular
from shard_builder.manifest import MAX_BYTES, Manifest
from shard_builder.manifest import NAME as MANIFEST
from shard_builder.settings import InputError, printable

log = logging.getLogger(__name__)

WEIGHTS, CONFIG, CARD, ONNX = "model.safetensors", "config.json", "README.md", "model.onnx"
FILES = {WEIGHTS, CONFIG, CARD, ONNX, f"{ONNX}.data"}
COUNTS = ("samples", "classes")  # of the shard set that a run records
USUAL_SIZE = 224  # pixels, where none is recorded
LARGEST_ONNX = 2**30  # bytes of weights in one file; from 2 GiB on protobuf cannot hold them
MOST_VALUES, LONGEST = 20, 60  # names of a field that a card lists, and characters of one

USED_LABELS: dict[Method, str] = {
    "mulsupcon": "images whose sets of labels overlap were drawn together",
    "supcon": "images with equal labels were drawn together",
    "simclr": "two views of one image were drawn together, and no label was used",
    "supervised": "it was trained to name the class of an image",
}
# The settings that a card lists, each with the methods that use it; none for all of them.
SETTINGS: dict[str, tuple[Method, ...]] = {
    **dict.fromkeys(("method", "recipe", "epochs", "batch_size", "image_size", "start_from", "init_from"), ()),
    "temperature": ("mulsupcon", "supcon", "simclr"),
    "threshold": ("mulsupcon",),
    "instance_weight": ("mulsupcon", "supcon"),
    **dict.fromkeys(("optimizer", "lr", "weight_decay", "warmup_epochs", "schedule", "milestones"), ()),
    **dict.fromkeys(("clip_norm", "drop_path", "augmentation", "seed"), ()),
}


@dataclass(frozen=True)
class Record:
    """What a run folder's config.json says of an encoder's pretraining. It may be a stranger's: texts are unchecked."""

    settings: PretrainConfig
    fields: Mapping[str, list[str]]
    samples: int
    classes: int
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """An encoder to export: its file, if it has one, the SHA-256 of that file, and what is known of it."""

    encoder: Encoder
    name: str
    file: Path | None = None
    sha256: str | None = None
    epoch: str | None = None
    record: Record | None = None

    @property
    def image_size(self) -> int | None:
        """The side of the images that it was trained with, where that is known."""
        recorded = self.record.settings.image_size if self.record else None
        return self.encoder.architecture.image_size or recorded

    @property
    def example_size(self) -> int:
        """`image_size`, or where it is unknown the usual one."""
        return self.image_size or USUAL_SIZE


def export_encoder(run: str | Path, out: Path, config: ExportConfig, *, overwrite: bool = False) -> Path:
    """Write the folder `out` with an encoder's weights and model card, and config.json where timm can express it.

    `run` is whatever `load_encoder` takes. An existing export is replaced with `overwrite`. Raises `InputError` for a
    wrong use and for files that cannot be used, and `OSError` if the folder cannot be written.
    """
    _check_out(out, overwrite=overwrite)
    if config.onnx:
        _check_onnx()
    source = _open(str(run))
    results = None if config.results is None else _results_of(source, config.results)
    architecture = source.encoder.architecture
    with new_folder(out) as folder:
        metadata = {"format": "pt", **({"epoch": source.epoch} if source.epoch else {})}
        if source.record:
            metadata |= {"method": source.record.settings.method, "recipe": source.record.settings.recipe}
        save_encoder(folder / WEIGHTS, source.encoder, metadata)
        if in_timm(architecture):
            write_json(folder / CONFIG, timm_json(source.encoder, source.example_size))
        shape = write_onnx(source.encoder, folder / ONNX, source.example_size) if config.onnx else None
        sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        write_text(folder / CARD, card(source, sha256=sha256, onnx_shape=shape, results=results))
        if out.is_dir():  # an older export, of which nothing is removed before the new one is complete
            for name in FILES:
                (out / name).unlink(missing_ok=True)
    return out


def _check_out(out: Path, *, overwrite: bool) -> None:
    """Raise `InputError` if `out` holds anything that may not be replaced, or cannot be written."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} is a link, or no folder: choose another one with `out`")
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if found and (other := [name for name in found if name not in FILES]):
        raise InputError(f"{out} holds other files than an export ({other[0]}): choose another folder with `out`")
    if found and not overwrite:
        raise InputError(f"{out} exists: `overwrite=True` replaces it, or choose another folder with `out`")
    check_writable(out.absolute().parent)


def _check_onnx() -> None:
    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise InputError("`onnx=True` needs onnx and onnxscript: pip install 'modan-fast[onnx]'")


def _open(text: str) -> Source:
    """The encoder in `text`, with what its file and its run record."""
    encoder = load_encoder(text)
    if is_published(text):
        return Source(encoder, text)
    named, name = named_file(text)
    file = encoder_file(name)
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if named:
        return Source(encoder, file.name, file, sha256)
    epoch = encoder_metadata(file).get("epoch", "")
    known = epoch if epoch.isascii() and epoch.isdecimal() and len(epoch) < 10 else None
    return Source(encoder, file.absolute().parent.name, file, sha256, known, _record(file.parent / "config.json"))


def _record(path: Path) -> Record | None:
    """What a run's config.json says; None if there is none. Raises `InputError` for a damaged one."""
    if not os.path.isfile(path):
        return None
    written = read_json(path)
    shards, settings = written.get("shards"), written.get("settings")
    if not (isinstance(shards, dict) and isinstance(settings, dict)):
        return None  # another program's, such as timm's
    try:
        _check_shards(shards)
        return Record(pretrain_config(settings), *(shards[name] for name in ("fields", *COUNTS, "fingerprint")))
    except (InputError, TypeError) as error:
        raise InputError(
            f"{path} is no record of a run ({error}): restore it, or export a copy of the encoder's file from another "
            "folder"
        ) from error


def _check_shards(shards: Mapping[str, Any]) -> None:
    """Raise `InputError` that names the first part of a recorded shard set that is of a wrong type."""
    fields = shards.get("fields")
    lists = list(fields.values()) if isinstance(fields, dict) else [None]
    if not all(isinstance(each, list) and all(isinstance(value, str) for value in each) for each in lists):
        raise InputError("its fields are no lists of texts")
    for name in COUNTS:
        if type(count := shards.get(name)) is not int or not 0 <= count < 2**63:
            raise InputError(f"its {name} are no count")
    if not isinstance(shards.get("fingerprint"), str):
        raise InputError("it has no fingerprint")


def _manifest(record: Record) -> Manifest | None:
    """The manifest of the run's shard set, where the recorded path still holds that very set. No URL is opened."""
    location = record.settings.shards
    path = Path(location) / MANIFEST
    if is_url(location) or not os.path.isfile(path):
        return None
    try:
        content = read_regular(path, MAX_BYTES)
        if hashlib.sha256(content).hexdigest() != record.fingerprint:
            return None
        manifest = Manifest.parse(content, str(path))
    except (InputError, OSError):  # it only adds details to a card
        return None
    log.info("shards: %s, as recorded in the run", path)
    return manifest


def _results_of(source: Source, folder: Path) -> str:
    """The AUC table of this encoder in a results folder, in Markdown. Raises `InputError` if it was not judged."""
    rows = auc_table(folder)
    inits = Results.open(folder).runs["inits"]
    names = {name for name, init in inits.items() if source.sha256 and init.get("sha256") == source.sha256}
    rows = [row for row in rows if row.init in names]
    if not rows:
        raise InputError(
            f"{folder} has no finished repeats of these weights (SHA-256 {source.sha256 or 'unknown'}): name the "
            "results of `modan-fast evaluate` of this file with `results`, or leave it out"
        )
    return to_markdown(replace(summary_table(rows), title="AUCs of this encoder"))


def in_timm(architecture: Architecture) -> bool:
    """Whether timm builds this network: all of its own, and torchvision's ResNet-18 with the 7x7 stem."""
    return architecture.name != RESNET18 or architecture.stem == "7x7"


def timm_json(encoder: Encoder, image_size: int) -> dict[str, Any]:
    """The content of a config.json from which `timm.create_model("local-dir:FOLDER")` builds the network."""
    architecture = encoder.architecture
    name = architecture.name.removeprefix(TIMM).partition(".")[0]  # without the tag of published weights
    traits = timm_config(architecture.name)
    arguments: dict[str, Any] = {"in_chans": architecture.channels}
    if architecture.image_size:
        arguments["img_size"] = architecture.image_size
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "modan_fast",
            "custom_load": False,
            "input_size": [architecture.channels, image_size, image_size],
            "fixed_input_size": architecture.fixed_size,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",  # the whole image, stretched to a square
            "mean": _for_each_channel(architecture.mean, architecture.channels),
            "std": _for_each_channel(architecture.std, architecture.channels),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": traits.get("first_conv"),
            "classifier": traits.get("classifier"),
        },
    }


def _for_each_channel(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) if len(values) == channels else list(values) * channels


class FromPixels(nn.Module):
    """Grey images (N, 1, H, W) of 0 to 255, uint8, to features (N, F): an encoder with its preprocessing."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder(images.float() / 255)
        return features


def write_onnx(encoder: Encoder, path: Path, image_size: int) -> list[int | str]:
    """Write an encoder with its preprocessing as ONNX: `images` (N, 1, H, W) uint8 to `features` (N, F) float32.

    N is free; so are H and W, unless the network's size is fixed. Returns the shape of `images`, with names for what is
    free. The file names no path of this machine. Raises `InputError` if torch cannot export the network.
    """
    free: dict[int, str] = {0: "batch"}
    if not encoder.architecture.fixed_size:
        free |= {2: "height", 3: "width"}
    example = torch.zeros(2, 1, image_size, image_size, dtype=torch.uint8)
    training = encoder.training
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                FromPixels(encoder),
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes={"images": free},
            )
            graph = program.model.graph
            _forget_sources(program.model)
            # Larger weights go into model.onnx.data.
            large = sum(value.numel() * 4 for value in encoder.weights.values()) > LARGEST_ONNX
            program.save(str(path), external_data=large)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"torch cannot export {encoder.architecture.name} as ONNX ({printable(reason)[:200]}): leave out "
            "`onnx=True`"
        ) from error
    finally:
        encoder.train(training)
    return [size if isinstance(size, int) else str(size) for size in graph.inputs[0].shape]


def _forget_sources(model: Any) -> None:
    """Remove what the exporter notes of every node: stack traces, with the paths of this machine."""
    model.metadata_props.clear()
    for graph in [model.graph, *model.functions.values()]:
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, log and warnings, which speak of torch's insides, from the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def card(source: Source, *, sha256: str, onnx_shape: list[int | str] | None, results: str | None) -> str:
    """The model card: Markdown after a YAML header. No text of a record becomes HTML, a link or a line of its own.

    `sha256` is that of model.safetensors, `onnx_shape` the input's shape of model.onnx if it was written, `results` a
    table.
    """
    architecture = source.encoder.architecture
    record = source.record
    about = [
        ["network", described(architecture)],
        ["features", f"{source.encoder.num_features}"],
        ["parameters", f"{sum(each.numel() for each in source.encoder.parameters()):,}"],
        ["epochs trained", source.epoch or "not recorded"],
        ["written by", f"modan-fast {__version__}, from {_cut(source.name)}"],
        ["SHA-256 of its source", source.sha256 or "weights published by timm"],
        [f"SHA-256 of {WEIGHTS}", sha256],
    ]
    parts = [
        _header(architecture, record),
        "# An image encoder for medical images\n",
        _what(source),
        _table("The encoder", ["", ""], about),
        *(_pretraining(record) if record else [NOT_RECORDED]),
        _preprocessing(source),
        "## How to load it\n\nThe examples run in this folder, after the one above.\n",
        *_loading(source.encoder, onnx_shape),
        "## Measured\n",
        results or "No results were named when this card was written.\n",
        _limits(record),
        CITATION if record else "",
    ]
    return "\n".join(part for part in parts if part)


NOT_RECORDED = "## Pretraining\n\nNothing is recorded about how these weights were trained.\n"
CITATION = (
    "## Citation\n\nModAn-MulSupCon (Takaya and Inamori): multi-hot labels of modality and anatomy and a "
    "Jaccard-weighted supervised contrastive loss. It is the method `mulsupcon`; `supcon`, `simclr` and `supervised` "
    "are what the paper compares it with. modan-fast is a rebuild, and not by its authors.\n"
)


def _header(architecture: Architecture, record: Record | None) -> str:
    tags = ["medical-imaging", "feature-extraction", "safetensors"]
    if in_timm(architecture):
        tags.insert(0, "timm")
    if record:
        tags.append(record.settings.method)
    lines = [
        f"library_name: {'timm' if in_timm(architecture) else 'modan-fast'}",
        "pipeline_tag: image-feature-extraction",
        "license: unknown  # to be filled in by whoever passes this folder on",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---\n"])


def _what(source: Source) -> str:
    record = source.record
    if record is None:
        how = "How it was trained is not recorded."
    else:
        how = (
            f"It was pretrained with the method `{record.settings.method}` on {record.samples:,} images; "
            f"{USED_LABELS[record.settings.method]}."
        )
    return (
        f"It maps grey images to {source.encoder.num_features} features, for a classifier to be trained on, or to be "
        f"fine-tuned with one. {how}\n"
    )


def _table(title: str, head: list[str], rows: list[list[str]], note: str = "") -> str:
    return to_markdown(Table(name="", title=title, head=head, rows=rows, note=note))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _pretraining(record: Record) -> list[str]:
    """Data and settings of a run, as two tables."""
    settings = record.settings
    rows = []
    for name, values in list(record.fields.items())[:MOST_VALUES]:
        more = f", and {len(values) - MOST_VALUES:,} more" if len(values) > MOST_VALUES else ""
        rows.append([_cut(name), f"{len(values):,}", ", ".join(map(_cut, values[:MOST_VALUES])) + more])
    note = f"{record.samples:,} images of {record.classes:,} classes."
    if manifest := _manifest(record):
        note += (
            f" Stored with {manifest.size} px as {manifest.codec}; {len(manifest.rejected):,} images of the source "
            "were left out."
        )
    note += f" SHA-256 of the shard set's manifest: {record.fingerprint[:64]}."
    data = _table("The images", ["field of labels", "values", "which"], rows, note)
    return ["## Pretraining\n", data, _table("Settings", ["setting", "value"], _settings_rows(settings))]


def _settings_rows(settings: PretrainConfig) -> list[list[str]]:
    rows = []
    for name, methods in SETTINGS.items():
        value = getattr(settings, name)
        if value is None or value == () or (methods and settings.method not in methods):
            continue
        if name == "augmentation":
            value = ", ".join(f"{key} {_plain(each)}" for key, each in vars(value).items())
        elif name == "init_from":
            value = _cut(re.split(r"[\\/]", value)[-1])  # without the folders of a machine
        rows.append([name, _plain(value)])
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " to ".join(map(_plain, value)) if len(value) == 2 else ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _preprocessing(source: Source) -> str:
    architecture, size = source.encoder.architecture, source.example_size
    if architecture.fixed_size:
        about = f"The network takes images of {size} x {size} pixels only"
    elif source.image_size:
        about = f"It was trained with images of {size} x {size} pixels; the network takes other sizes, too"
    else:
        about = f"The size that it was trained with is not recorded; {size} x {size} below is only the usual one"
    steps = "An image is made grey, stretched to the square (bilinear, antialiased) and divided by 255"
    if architecture.channels > 1:
        steps += f", then repeated for {architecture.channels} equal channels"
    if architecture.normalises:
        steps += (
            f". Then {list(architecture.mean)} is subtracted and the result divided by {list(architecture.std)}"
        )
    else:
        steps += ". Nothing else: no mean is subtracted"
    inputs = "images / 255"
    if architecture.channels > 1:
        inputs = f"images.expand(-1, {architecture.channels}, -1, -1) / 255"
    lines = ["inputs = " + inputs]
    if architecture.normalises:
        mean, std = (list(values) for values in (architecture.mean, architecture.std))
        lines += [
            f"mean, std = torch.tensor({mean}).view(1, -1, 1, 1), torch.tensor({std}).view(1, -1, 1, 1)",
            "inputs = (inputs - mean) / std",
        ]
    code = [
        "import numpy as np",
        "import torch",
        "from PIL import Image",
        "",
        f'image = Image.open("image.png").convert("L").resize(({size}, {size}), Image.Resampling.BILINEAR)',
        "images = torch.from_numpy(np.array(image))[None, None]  # uint8, (1, 1, H, W)",
        *lines,
    ]
    return f"## Input\n\n{steps}. {about}.\n\n{_python(code)}"


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```\n"])


def _loading(encoder: Encoder, onnx_shape: list[int | str] | None) -> list[str]:
    """How to load the folder with each library that can; the code blocks run as they are."""
    architecture = encoder.architecture
    parts = []
    if in_timm(architecture):
        parts += [
            "With timm. Without `pretrained=True` the weights would be random:\n",
            _python(
                [
                    "import timm",
                    "",
                    'network = timm.create_model("local-dir:.", pretrained=True, num_classes=0).eval()',
                    "with torch.no_grad():",
                    "    features = network(inputs)",
                ]
            ),
        ]
    else:
        parts.append(
            f"timm has no ResNet-18 with a single {architecture.stem} stem, so this folder has no config.json of "
            "timm's.\n"
        )
    if architecture.name == RESNET18 and architecture.stem:
        kernel, stride = KERNELS[architecture.stem]
        convolution = f"{architecture.channels}, 64, {kernel}, {stride}, padding={kernel // 2}, bias=False"
        parts += [
            "With torchvision:\n",
            _python(
                [
                    "import torchvision",
                    "from safetensors.torch import load_file",
                    "",
                    "network = torchvision.models.resnet18()",
                    f"network.conv1 = torch.nn.Conv2d({convolution})",
                    "network.fc = torch.nn.Identity()",
                    f'network.load_state_dict(load_file("{WEIGHTS}"))',
                    "network.eval()",
                    "with torch.no_grad():",
                    "    features = network(inputs)",
                ]
            ),
        ]
    parts += [
        "With modan-fast, whose encoders repeat channels and normalise by themselves:\n",
        _python(
            [
                "import modan_fast",
                "",
                f'encoder = modan_fast.load_encoder("{WEIGHTS}")',
                "with torch.no_grad():",
                "    features = encoder(images / 255)",
            ]
        ),
    ]
    if onnx_shape:
        shape = ", ".join(map(str, onnx_shape))
        parts += [
            f"With onnxruntime. The preprocessing is inside: `images` are uint8, ({shape}), grey values of 0 to 255:\n",
            _python(
                [
                    "import onnxruntime",
                    "",
                    f'session = onnxruntime.InferenceSession("{ONNX}")',
                    'features = session.run(["features"], {"images": images.numpy()})[0]',
                ]
            ),
        ]
    return parts


def _limits(record: Record | None) -> str:
    lines = [
        "It is not a medical device, and no finding or diagnosis may rest on it. It is for research.",
        "What was measured above holds for those images only; nothing is known about other scanners, hospitals or "
        "groups of patients.",
    ]
    if record:
        lines.append(
            "The labels are what the archive's folders, table or headers state. Nobody checked them against the "
            "images, and none of them is a diagnosis made for this purpose."
        )
    else:
        lines.append("What it was trained on, and with which labels, is not recorded.")
    lines.append(
        "Features may tell more about an image than it shows at a glance, such as the device it came from."
    )
    return "\n".join(["## Limits\n", *(f"* {line}" for line in lines), ""])
