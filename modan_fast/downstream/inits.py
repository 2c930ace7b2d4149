"""The encoders that an evaluation judges: of a run, of a file, torchvision's for ImageNet, or random ones."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modan_fast.config import EvaluateConfig, Stem
from modan_fast.downstream.tasks import FoldRun
from modan_fast.encoders import (
    Encoder,
    encoder_file,
    encoder_metadata,
    imagenet_encoder,
    imagenet_weights,
    load_encoder,
)
from modan_fast.folder import read_json
from shard_builder.settings import InputError

log = logging.getLogger(__name__)

TORCHVISION = Path("torchvision")  # recorded as the path if no file of ImageNet's weights was named
FRESH = ("scratch", "imagenet")  # inits that are no run of ours


@dataclass(frozen=True)
class Init:
    """An encoder to judge; `given` is None for `scratch`, whose weights are sampled anew for each fold run."""

    name: str
    stem: Stem
    given: Mapping[str, Tensor] | None = None
    path: Path | None = None
    sha256: str | None = None
    method: str | None = None

    def weights(self, fold_run: FoldRun, seed: int) -> Mapping[str, Tensor]:
        """The initial weights of the encoder for a fold run, on the CPU."""
        if self.given is not None:
            return self.given
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(fold_run.seed(seed, "encoder"))
            return Encoder(self.stem).weights

    def record(self) -> dict[str, Any]:
        """The entry in runs.json. It records the stem of `scratch` among the recipe's settings."""
        if self.path is None:
            return {"kind": "scratch"}
        record = {
            "kind": "encoder",
            "method": self.method,
            "path": str(self.path),
            "stem": self.stem,
            "sha256": self.sha256,
        }
        run = self.path.parent / "config.json"
        return {**record, "shards": read_json(run).get("shards")} if run.is_file() else record


def load_inits(config: EvaluateConfig, known: Mapping[str, Any]) -> list[Init]:
    """The inits of `config`, loaded. One is named as its folder or, where that name is taken, as it was given."""
    paths = {text: encoder_file(Path(text).resolve()) for text in config.init if text not in FRESH}
    digests = {text: hashlib.sha256(path.read_bytes()).hexdigest() for text, path in paths.items()}
    inits: dict[str, Init] = {}
    for text in config.init:
        if text == "scratch":
            inits[text] = Init(text, config.stem)
            continue
        if text == "imagenet":
            inits[text] = imagenet(
                config.imagenet_weights, config.stem, config.seed, sum_filters=config.sum_filters
            )
            continue
        path, sha256, name = paths[text], digests[text], _short_name(paths[text])
        same = (
            each for each, init in known.items() if (init.get("sha256"), init.get("path")) == (sha256, str(path))
        )
        if before := next(same, None):
            name, taken = before, False
        elif name in known:
            # The same file with other weights keeps its name, to be refused under it.
            taken = known[name].get("sha256") != sha256 and known[name].get("path") != str(path)
        else:
            taken = any(_short_name(paths[other]) == name and digests[other] != sha256 for other in paths)
        if taken or name in FRESH:
            name = text
        encoder = load_encoder(path)
        if not all(tensor.isfinite().all() for tensor in encoder.weights.values()):
            raise InputError(f"{path} holds weights that are not finite: its pretraining diverged")
        inits[name] = Init(name, encoder.stem, encoder.weights, path, sha256, _method(path))
    return list(inits.values())


def imagenet(path: Path | None, stem: Stem, seed: int, *, sum_filters: bool) -> Init:
    """The init `imagenet`, from a file or else torchvision; its digest is that of the weights in the file.

    A random stem is sampled from the seed, and so is the same in all fold runs. The paper's 3x3 stem cannot hold
    ImageNet's filters: a warning says so.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = imagenet_encoder(path, stem, sum_filters=sum_filters)
    if sum_filters and stem != "7x7":
        log.warning(
            "imagenet: its first convolution is 7x7 and does not fit a %s stem, so that one is random: `stem=7x7` "
            "keeps it",
            stem,
        )
    given = imagenet_weights(path)
    digest = hashlib.sha256(b"".join(given[key].numpy().tobytes() for key in sorted(given))).hexdigest()
    return Init("imagenet", stem, encoder.weights, path or TORCHVISION, digest)


def _method(path: Path) -> str | None:
    """The pretraining method of an encoder's file, from its run's config.json or else the file's metadata."""
    run = path.parent / "config.json"
    if run.is_file():
        settings = read_json(run).get("settings")
        return settings.get("method") if isinstance(settings, dict) else None
    return encoder_metadata(path).get("method")


def _short_name(path: Path) -> str:
    """`mulsupcon` for mulsupcon/encoder.safetensors, `mulsupcon/encoder-0200` for another file in the folder."""
    return path.parent.name if path.stem == "encoder" else f"{path.parent.name}/{path.stem}"
