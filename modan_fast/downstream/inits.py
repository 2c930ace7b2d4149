"""The encoders that an evaluation judges: a run's, a file's, torchvision's for ImageNet, or fresh ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from modan_fast import models
from modan_fast.checkpoint import load_encoder, load_imagenet, read_json
from modan_fast.config import EvaluateConfig, Stem
from modan_fast.downstream.tasks import Cell
from shard_builder.settings import InputError

FRESH = ("scratch", "imagenet")  # inits that are no run of ours


@dataclass(frozen=True)
class Init:
    """An encoder to judge; `given` is None for `scratch`, whose weights are drawn anew for each cell."""

    name: str
    stem: Stem
    given: Mapping[str, Tensor] | None = None
    path: Path | None = None
    sha256: str | None = None
    method: str | None = None

    def weights(self, cell: Cell, seed: int) -> Mapping[str, Tensor]:
        """The encoder's state, on the CPU, from which `cell` starts."""
        if self.given is not None:
            return self.given
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(cell.seed(seed, "encoder"))
            return models.encoder(self.stem).state_dict()

    def record(self) -> dict[str, Any]:
        """What runs.json says of it. The stem of `scratch` is one of the recipe's settings there."""
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
    assert config.stem is not None
    paths = {text: _encoder_file(text) for text in config.init if text not in FRESH}
    digests = {text: hashlib.sha256(path.read_bytes()).hexdigest() for text, path in paths.items()}
    inits: dict[str, Init] = {}
    for text in config.init:
        if text == "scratch":
            inits[text] = Init(text, config.stem)
            continue
        if text == "imagenet":
            inits[text] = imagenet(config)
            continue
        path, sha256, name = paths[text], digests[text], _short_name(paths[text])
        if name in known:
            # The same file with other weights keeps its name, to be refused under it.
            taken = known[name].get("sha256") != sha256 and known[name].get("path") != str(path)
        else:
            taken = any(_short_name(paths[other]) == name and digests[other] != sha256 for other in paths)
        if taken or name in FRESH:
            name = text
        encoder = load_encoder(path)
        stem = models.stem_of(encoder.conv1.weight)
        assert stem is not None
        inits[name] = Init(name, stem, encoder.state_dict(), path, sha256, _method(path))
    return list(inits.values())


def imagenet(config: EvaluateConfig) -> Init:
    """The init `imagenet`; what its stem has at random is drawn from the seed, and so the same in all cells."""
    assert config.stem is not None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        encoder = load_imagenet(config.imagenet_weights, config.stem, sum_filters=config.recipe == "paper")
    state = encoder.state_dict()
    digest = hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()
    return Init("imagenet", config.stem, state, config.imagenet_weights or Path("torchvision"), digest)


def _method(path: Path) -> str | None:
    """How the encoder in a file was pretrained, by its run's config.json or else the file's own metadata."""
    run = path.parent / "config.json"
    if run.is_file():
        return (read_json(run).get("settings") or {}).get("method")
    with safetensors.safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("method")


def _encoder_file(text: str) -> Path:
    """The file, as an absolute path, that holds the weights of a run folder or is itself named."""
    path = Path(text).resolve()
    path = path / "encoder.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no encoder at {path}: name a run folder of `modan-fast pretrain`, scratch or imagenet")
    return path


def _short_name(path: Path) -> str:
    """`mulsupcon` for mulsupcon/encoder.safetensors, `mulsupcon/encoder-0200` for another file beside it."""
    return path.parent.name if path.stem == "encoder" else f"{path.parent.name}/{path.stem}"
