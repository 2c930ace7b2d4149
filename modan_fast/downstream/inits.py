"""The encoders that an evaluation judges, and their initial weights: a run's, a file's, `imagenet` and `scratch`."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modan_fast.config import EvaluateConfig
from modan_fast.downstream.tasks import FoldRun
from modan_fast.encoders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Architecture,
    Encoder,
    encoder_file,
    encoder_metadata,
)
from modan_fast.folder import read_json
from modan_fast.pretrained import (
    TORCHVISION,
    imagenet_encoder,
    imagenet_weights,
    is_published,
    load_encoder,
    named_file,
)
from shard_builder.settings import InputError

log = logging.getLogger(__name__)

WITHOUT_RUN = ("scratch", "imagenet")


class File(NamedTuple):
    """The file of an init, its SHA-256, and the ENCODER of ENCODER=FILE."""

    path: Path
    sha256: str
    encoder: str | None


@dataclass(frozen=True)
class Init:
    """An encoder to judge. `weights` is None for `scratch`, which gets new random weights in every fold run.

    `path` and `sha256` are of its file (for published weights, the digest is of the weights), `method` is how it was
    pretrained, if known. `encoder` is the ENCODER of ENCODER=FILE; weights of other programs are `foreign`.
    """

    name: str
    architecture: Architecture
    weights: Mapping[str, Tensor] | None = None
    path: Path | None = None
    sha256: str | None = None
    method: str | None = None
    encoder: str | None = None
    foreign: bool = False

    @property
    def is_random(self) -> bool:
        """Whether every fold run gets other weights."""
        return self.weights is None

    def weights_for(self, fold_run: FoldRun, seed: int) -> Mapping[str, Tensor]:
        """The encoder's weights, on the CPU, from which a fold run starts."""
        if self.weights is not None:
            return self.weights
        return random_encoder(self.architecture, fold_run.seed(seed, "encoder")).weights

    def record(self) -> dict[str, Any]:
        """Its entry in runs.json. The encoder and the stem of `scratch` are settings of the recipe there."""
        if self.path is None:
            return {"kind": "scratch"}
        record: dict[str, Any] = {
            "kind": "encoder",
            "method": self.method,
            "path": str(self.path),
            "architecture": self.architecture.name,
            "stem": self.architecture.stem,
            "sha256": self.sha256,
        }
        if self.encoder:
            record["encoder"] = self.encoder
        if self.foreign:
            record["normalized"] = self.architecture.normalises
        run = self.path.parent / "config.json"
        if not os.path.isfile(run):
            return record
        shards = read_json(run).get("shards")
        return {**record, "shards": shards if isinstance(shards, dict) else None}


def load_inits(config: EvaluateConfig, known: Mapping[str, Any]) -> list[Init]:
    """Load the inits of `config`; `known` are those that the results folder has already, by name.

    Raises `InputError` for a missing or unusable file, for weights that are not finite, and for names of two lines.
    """
    paths = {
        text: encoder_file(Path(named_file(text)[1]).resolve())
        for text in config.init
        if text not in WITHOUT_RUN and not is_published(text)
    }
    files = {text: File(path, _digest_of_file(path), named_file(text)[0]) for text, path in paths.items()}
    inits: dict[str, Init] = {}
    for text in config.init:
        if text == "scratch":
            size = config.image_size
            channels = 3 if config.color else 1
            init = Init(
                text, Architecture.of(config.encoder, stem=config.stem, image_size=size, channels=channels)
            )
        elif text == "imagenet":
            init = imagenet(config.imagenet_weights, config, normalize=config.normalize)
        elif text in files:
            init = _from_file(_name(text, files, known), files[text], config)
        else:
            encoder = load_encoder(text, normalize=config.normalize).resized(config.image_size)
            weights = encoder.weights
            init = Init(text, encoder.architecture, weights, Path(text), digest_of(weights), foreign=True)
        inits[init.name] = init
    for name in inits:
        if not name.isprintable():
            raise InputError(f"{name} is no name that the tables can hold: rename it")
    return list(inits.values())


def random_encoder(architecture: Architecture, seed: int) -> Encoder:
    """An encoder with random weights; torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Encoder(architecture)


def imagenet(path: Path | None, config: EvaluateConfig, *, normalize: bool) -> Init:
    """The init `imagenet`, from a file or from torchvision. Its digest is of the weights before the stem was fitted.

    With `normalize` its input has three channels and ImageNet's mean and standard deviation. A random stem is sampled
    from the seed, so it is the same in all fold runs. A warning is logged if ImageNet's filters were to be kept but do
    not fit the stem, as in the recipe `paper`.
    """
    values: dict[str, Any] = {"channels": 3, "mean": IMAGENET_MEAN, "std": IMAGENET_STD} if normalize else {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        architecture = Architecture(stem=config.stem, **values)
        encoder = imagenet_encoder(path, architecture, sum_filters=config.sum_filters)
    if config.sum_filters and config.stem != "7x7":
        log.warning(
            "imagenet: its first convolution is 7x7 and does not fit a %s stem, so that one is random: `stem=7x7` "
            "keeps it",
            config.stem,
        )
    digest = digest_of(imagenet_weights(path))
    return Init("imagenet", architecture, encoder.weights, path or TORCHVISION, digest, foreign=True)


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of weights, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(weights):  # as bytes, because numpy has no bfloat16
        digest.update(weights[name].detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_file(name: str, file: File, config: EvaluateConfig) -> Init:
    source = f"{file.encoder}={file.path}" if file.encoder else file.path
    encoder = load_encoder(source, normalize=config.normalize).resized(config.image_size)
    return Init(
        name,
        encoder.architecture,
        encoder.weights,
        file.path,
        file.sha256,
        method=_method(file.path),
        encoder=file.encoder,
        foreign=file.encoder is not None,
    )


def _name(text: str, files: Mapping[str, File], known: Mapping[str, Any]) -> str:
    """The name of the init given as `text`: that of its folder, or `text` if another init has that name.

    `files` has the file of each init that has one; a file may hold the weights of several encoders.
    """
    file = files[text]
    for name, record in known.items():
        if (record.get("path"), record.get("sha256"), record.get("encoder")) == (str(file.path), *file[1:]):
            return name
    name = _short_name(file.path)
    if name in known:
        # A file whose weights have changed keeps its name, so that `Results.admit` refuses it.
        other = known[name].get("path") != str(file.path) and known[name].get("sha256") != file.sha256
        taken = other or known[name].get("encoder") != file.encoder
    else:
        taken = any(_short_name(each.path) == name and each[1:] != file[1:] for each in files.values())
    return text if taken or name in WITHOUT_RUN else name


def _short_name(path: Path) -> str:
    """`mulsupcon` for mulsupcon/encoder.safetensors, `mulsupcon/encoder-0200` for another file beside it."""
    return path.parent.name if path.stem == "encoder" else f"{path.parent.name}/{path.stem}"


def _method(path: Path) -> str | None:
    """How the encoder in a file was pretrained: from its run's config.json, else from the file's own metadata."""
    run = path.parent / "config.json"
    if not os.path.isfile(run):
        return encoder_metadata(path).get("method")
    settings = read_json(run).get("settings")
    method = settings.get("method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) else None
