"""A run folder's files: written atomically, read without running code from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import ResNet

from modan_fast import models
from shard_builder.settings import InputError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path beside `path`, then put the result in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with open(beside, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda at: at.write_text(text, encoding="utf-8"))


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write all that resuming needs; tensors, numbers, strings and containers of them."""
    write_atomically(path, lambda at: torch.save(dict(state), at))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, on the CPU. Raises `InputError` where it is missing or damaged."""
    if not path.exists():
        raise InputError(f"no checkpoint at {path}: start the run without --resume")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler or its zip reader meets
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is no readable checkpoint ({reason}): restore it, or start anew") from error
    return state


def save_encoder(path: Path, encoder: ResNet, metadata: Mapping[str, str]) -> None:
    """Write the backbone as safetensors under torchvision's key names, without `fc`."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    write_atomically(path, lambda at: safetensors.torch.save_file(tensors, at, dict(metadata)))


def load_encoder(source: Path) -> ResNet:
    """The encoder of a run folder, or of a safetensors file; its stem and channels are read off the weights.

    Raises `InputError` where there is none, or where it is not a ResNet-18.
    """
    path = source / "encoder.safetensors" if source.is_dir() else source
    if not path.is_file():
        raise InputError(f"no encoder at {path}: name a run folder of `modan-fast pretrain`, or scratch")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is no readable safetensors file ({error})") from error
    stem = models.stem_of(tensors["conv1.weight"]) if "conv1.weight" in tensors else None
    if stem is None:
        raise InputError(f"{path} holds no ResNet-18 with a 3x3 or 7x7 stem: give the weights of one")
    encoder = models.encoder(stem, channels=tensors["conv1.weight"].shape[1])
    wanted = encoder.state_dict()
    for key in sorted(wanted.keys() | tensors.keys()):
        have, want = tensors.get(key), wanted.get(key)
        if have is None or want is None or have.shape != want.shape:
            found = (
                "lacks"
                if have is None
                else "has an extra"
                if want is None
                else f"has {tuple(have.shape)} for"
            )
            raise InputError(f"{path} is no ResNet-18: it {found} {key}")
    encoder.load_state_dict(tensors)
    return encoder
