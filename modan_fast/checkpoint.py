"""A run folder's files: written atomically, read without running code from them."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import ResNet, ResNet18_Weights

from modan_fast import __version__, models
from modan_fast.config import MAY_CHANGE_ON_RESUME, PretrainConfig, Stem, from_json, to_json
from modan_fast.folder import is_new, read_json, write_atomically, write_json
from modan_fast.shards import ShardSet
from shard_builder.settings import InputError


def nothing_to_do(config: PretrainConfig, shards: ShardSet, *, resume: bool, overwrite: bool) -> bool:
    """Whether `config.run` holds this very run, finished.

    Raises `InputError` where it holds anything else and neither `resume` nor `overwrite` says what is to be
    done with it, and where a run cannot be resumed.
    """
    run = config.run
    if resume and overwrite:
        raise InputError("--resume continues a run and --overwrite replaces it: pass one of them")
    if not resume and not (run / "config.json").exists():
        if not is_new(run):
            raise InputError(f"{run} exists and is no run folder: name another one with --out")
        return False
    written = _written(run)
    if overwrite:
        return False
    if resume and written["shards"]["fingerprint"] != shards.fingerprint:
        raise InputError(
            f"{shards.place} is not the shard set that {run} was started with: name that one with --shards"
        )
    same = written["settings"] == to_json(config) and written["shards"]["fingerprint"] == shards.fingerprint
    done = finished_epochs(run)
    if done >= config.epochs and (resume or same):
        return True
    if resume:
        return False
    ways = "--resume continues it, " if (run / "checkpoint.pt").exists() else ""
    raise InputError(
        f"{run} holds a run of {'the same' if same else 'other'} settings ({done} of "
        f"{written['settings']['epochs']} epochs saved): {ways}--overwrite replaces it"
    )


def resumed_config(run: Path, given: Mapping[str, Any]) -> PretrainConfig:
    """The settings of the run in `run`, changed by those of `given` that may change.

    Raises `InputError` where there is no run, or where another setting is given a new value.
    """
    try:
        config = from_json(PretrainConfig, _written(run)["settings"])
    except TypeError as error:  # a value of another type
        raise InputError(f"{run / 'config.json'} holds no settings ({error}): --overwrite starts anew") from error
    for name, value in given.items():
        fixed = name not in MAY_CHANGE_ON_RESUME or (name == "epochs" and config.schedule == "cosine")
        if fixed and value != getattr(config, name):
            raise InputError(
                f"{run} was started with --{name.replace('_', '-')} {getattr(config, name)}, not {value}: a "
                "resumed run keeps its settings"
            )
    return replace(config, **given)


def begin(config: PretrainConfig, shards: ShardSet, *, chosen: Mapping[str, Any], resumed_at: int | None) -> None:
    """Write `config.json`; cut the log back to the `resumed_at` epochs of the checkpoint, or clear the folder.

    `chosen` is what the settings that leave a choice came to on this machine.
    """
    run = config.run
    run.mkdir(parents=True, exist_ok=True)
    log = run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    outdated = [run / "checkpoint.pt", *run.glob("encoder*.safetensors")] if resumed_at is None else []
    # What a kill has left of a file that was being written: see `write_atomically`.
    names = ("config.json", "log.jsonl", "checkpoint.pt", "encoder*.safetensors")
    halves = (half for name in names for half in run.glob(f".{name}.*"))
    for path in (*outdated, *halves):
        path.unlink(missing_ok=True)
    write_atomically(log, lambda at: at.write_text("".join(lines[: resumed_at or 0]), encoding="utf-8"))
    manifest = shards.manifest
    content = {
        "settings": to_json(config),
        "chosen": dict(chosen),
        "preprocessing": {"image_size": config.image_size, "channels": config.channels, "mean": 0.0, "std": 1.0},
        "shards": {
            "fingerprint": shards.fingerprint,
            "samples": manifest.samples,
            "fields": manifest.fields,
            "classes": len(manifest.classes),
        },
        "versions": versions(),
    }
    write_json(run / "config.json", content)


def versions() -> dict[str, str]:
    """The versions of everything that a result depends on."""
    found = {"modan_fast": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "nvidia-dali-cuda120", "numpy"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def append_log(run: Path, entry: Mapping[str, Any]) -> None:
    """Add an epoch's line to the run's log."""
    with (run / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(entry) + "\n")


def save(run: Path, state: Mapping[str, Any], encoder: ResNet, config: PretrainConfig) -> None:
    """Write a run's state (tensors, numbers, strings and containers of them) and its encoder."""
    write_atomically(run / "checkpoint.pt", lambda at: torch.save(dict(state), at))
    save_encoder(run / "encoder.safetensors", encoder, config, epoch=state["epoch"])


def load(run: Path) -> dict[str, Any]:
    """The state that `save` wrote, on the CPU. Raises `InputError` where it is missing or damaged."""
    path = run / "checkpoint.pt"
    if not path.exists():
        raise InputError(f"{run} has no checkpoint yet: --overwrite starts it anew")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler or its zip reader meets
        raise InputError(f"{path} is no readable checkpoint: --overwrite starts anew") from error
    return state


def save_encoder(path: Path, encoder: ResNet, config: PretrainConfig, *, epoch: int) -> None:
    """Write the backbone as safetensors under torchvision's key names, without `fc`; equal ones give equal bytes."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    metadata = {"epoch": str(epoch), "method": config.method, "recipe": config.recipe, "stem": config.stem}
    content = safetensors.torch.save(tensors, metadata)
    # The library puts the metadata into another order each time. The header's length comes before it.
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = metadata
    text = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
    write_atomically(path, lambda at: at.write_bytes(content[:8] + text + content[end:]))


def finished_epochs(run: Path) -> int:
    """Epochs of training that a run's encoder has seen; 0 where there is none that can be read."""
    try:
        with safetensors.safe_open(run / "encoder.safetensors", "pt") as file:
            return int(file.metadata()["epoch"])
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return 0


def load_encoder(source: Path) -> ResNet:
    """The encoder of a run folder, or of a safetensors file, for grey images; its stem is read off the weights.

    One that was trained on three equal channels becomes one of a single channel, with the sums of its first filters:
    it sees the same. Raises `InputError` where there is none, or where it is not a ResNet-18.
    """
    path = source / "encoder.safetensors" if source.is_dir() else source
    if not path.is_file():
        raise InputError(f"no encoder at {path}: name a run folder of `modan-fast pretrain`, scratch or imagenet")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is no readable safetensors file ({error}): give one, or the folder of a run"
        ) from error
    tensors = {key: value for key, value in tensors.items() if not key.startswith("fc.")}
    stem = models.stem_of(tensors["conv1.weight"]) if "conv1.weight" in tensors else None
    if stem is None:
        raise InputError(f"{path} holds no ResNet-18 with a 3x3 or 7x7 stem: give the weights of one")
    wanted = models.encoder(stem, channels=tensors["conv1.weight"].shape[1]).state_dict()
    for key in sorted(wanted.keys() | tensors.keys()):
        have, want = tensors.get(key), wanted.get(key)
        if have is None or want is None or have.shape != want.shape:
            found = (
                "lacks" if have is None else "has an extra" if want is None else f"has {tuple(have.shape)} for"
            )
            raise InputError(f"{path} is no ResNet-18: it {found} {key}")
    tensors["conv1.weight"] = tensors["conv1.weight"].sum(1, keepdim=True)
    encoder = models.encoder(stem)
    encoder.load_state_dict(tensors)
    return encoder


def load_imagenet(path: Path | None, stem: Stem, *, sum_filters: bool, channels: int = 1) -> ResNet:
    """A ResNet-18 with torchvision's ImageNet weights. See `models.start_from_imagenet` and `imagenet_weights`.

    Raises `InputError` where there are none, or none of a ResNet-18.
    """
    encoder = models.encoder(stem, channels)
    try:
        models.start_from_imagenet(encoder, imagenet_weights(path), sum_filters=sum_filters)
    except InputError:
        raise
    except Exception as error:  # a file may hold anything
        raise _unusable(path, error) from error
    return encoder


def imagenet_weights(path: Path | None) -> dict[str, Tensor]:
    """The tensors of a file, or else torchvision's for ImageNet, which it downloads; `InputError` if there are none."""
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
            "with --imagenet-weights"
        )
    # What torch says of a file that it cannot read is advice to run code from it.
    return InputError(f"{path} holds no weights of torchvision's ResNet-18: name resnet18-f37072fd.pth")


def _written(run: Path) -> dict[str, Any]:
    """What `begin` wrote of the run in `run`; `InputError` where there is none."""
    path = run / "config.json"
    if not path.exists():
        raise InputError(f"no run to resume at {run}: leave out --resume to start one")
    written = read_json(path)
    wanted = {"settings": "epochs", "shards": "fingerprint"}
    if not all(isinstance(part := written.get(name), dict) and key in part for name, key in wanted.items()):
        raise InputError(f"{run} exists and is no run folder: its config.json is of another program")
    return written
