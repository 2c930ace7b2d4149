"""A run folder: its files, and when a run may start, resume or replace another; writes and reads the checkpoint."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from modan_fast import __version__
from modan_fast.config import SMALLEST_IMAGE, PretrainConfig, is_url, to_json
from modan_fast.encoders import FILE as ENCODER
from modan_fast.encoders import Encoder, encoder_metadata, save_encoder
from modan_fast.folder import is_new, read_json, write_json
from modan_fast.recipes import pretrain_config
from modan_fast.remote import shown_location
from modan_fast.shards import ShardSet
from modan_fast.weights import LARGEST_FILE, unpacked_size
from shard_builder.atomic import replacing
from shard_builder.files import open_regular
from shard_builder.settings import InputError

log = logging.getLogger(__name__)

CONFIG, LOG, CHECKPOINT = "config.json", "log.jsonl", "checkpoint.pt"
VIEWS = "views.png"  # some images beside their two views
EVENTS = "tensorboard"


def nothing_to_do(config: PretrainConfig, shards: ShardSet, *, resume: bool, overwrite: bool) -> bool:
    """Whether the run folder holds this very run, finished.

    Raises `InputError` if it holds anything else and neither `resume` nor `overwrite` is set, and if the run in it
    cannot be resumed.
    """
    run = config.run
    if resume and overwrite:
        raise InputError("`resume=True` continues a run and `overwrite=True` replaces it: pass one of them")
    if not resume and not (run / CONFIG).exists():
        if not is_new(run):
            raise InputError(f"{run} exists and is no run folder: choose another one with `out`")
        return False
    written = _written(run)
    if overwrite:
        return False
    if resume and written["shards"]["fingerprint"] != shards.fingerprint:
        raise InputError(
            f"{shards.shown_location} is not the shard set that {run} was started with: name that one with `shards`"
        )
    same = _same(written, config, shards)
    done = finished_epochs(run)
    if done >= config.epochs and (resume or same):
        return True
    if resume:
        return False
    ways = "`resume=True` continues it, " if (run / CHECKPOINT).exists() else ""
    raise InputError(
        f"{run} holds a run of {'the same' if same else 'other'} settings ({done} of "
        f"{written['settings']['epochs']} epochs saved): {ways}`overwrite=True` replaces it"
    )


def holds(config: PretrainConfig, shards: ShardSet) -> bool:
    """Whether the run folder holds this very run, finished or not."""
    return (config.run / CONFIG).exists() and _same(_written(config.run), config, shards)


def _same(written: Mapping[str, Any], config: PretrainConfig, shards: ShardSet) -> bool:
    """Whether a run that was recorded has these settings. The fingerprint says which set it has, wherever that lies."""
    recorded = replace(_settings(config.run, written), shards=config.shards)
    return recorded == config and bool(written["shards"]["fingerprint"] == shards.fingerprint)


def settings_for(given: Mapping[str, Any], *, resume: bool) -> PretrainConfig:
    """The settings of a new run from `given`, or with `resume` those of the run that `given` names, changed by `given`.

    Raises `InputError` for settings that make no sense, or that a resumed run cannot change.
    """
    config = pretrain_config(given)
    return resumed_config(config.run, given) if resume else config


def resumed_config(run: Path, given: Mapping[str, Any]) -> PretrainConfig:
    """The settings of the run in the folder `run`, changed by those in `given` that may change.

    A recorded URL may be a command, and the record may be someone else's: `given` must repeat it. Nor does a record say
    where to write: `out` is always `run`. Raises `InputError` if there is no run, if a URL is not repeated, or if
    `given` changes another setting.
    """
    config = replace(_settings(run, _written(run)), out=run)
    if is_url(config.shards) and "shards" not in given:
        raise InputError(
            f"{run} was trained on {shown_location(config.shards)}: repeat it with `shards` to resume, a recorded URL "
            "is not opened"
        )
    if "shards" not in given:
        log.info("shards: %s, as recorded in %s", config.shards, run / CONFIG)
    wanted = pretrain_config({**to_json(config), **given, "out": run})
    wanted = wanted.resolved(config.image_size or SMALLEST_IMAGE)
    for field in fields(PretrainConfig):
        name = field.name
        may_change = field.metadata.get("changeable") and not (name == "epochs" and config.schedule != "steps")
        before, now = getattr(config, name), getattr(wanted, name)
        if before != now and not may_change:
            raise InputError(
                f"{run} was started with `{name}={before}`, not {now}: a resumed run keeps its settings"
            )
    return wanted


def begin(
    config: PretrainConfig,
    shards: ShardSet,
    *,
    preprocessing: Mapping[str, Any],
    chosen: Mapping[str, Any],
    resumed_at: int | None,
) -> None:
    """Write `config.json`; cut the log to the `resumed_at` epochs of the checkpoint, or clear the folder.

    Passwords in the URL of a shard set are left out: run folders are passed on, and a recorded URL is never opened.
    `preprocessing` is the encoder's input, `chosen` the values that automatic settings got on this machine.
    """
    run = config.run
    run.mkdir(parents=True, exist_ok=True)
    lines = (run / LOG).read_bytes().splitlines(keepends=True) if (run / LOG).is_file() else []
    outdated = [run / CHECKPOINT, run / VIEWS, *run.glob("encoder*.safetensors")] if resumed_at is None else []
    if resumed_at is None and not (run / EVENTS).is_symlink():  # which may lead anywhere
        outdated += (run / EVENTS).glob("events.out.tfevents.*")
    unfinished = [
        half for name in (CONFIG, LOG, CHECKPOINT, VIEWS, "encoder*.safetensors") for half in _halves(run, name)
    ]
    for path in (*outdated, *unfinished):
        path.unlink(missing_ok=True)
    with replacing(run / LOG) as file:
        file.writelines(_lines_of(lines, resumed_at or 0))
    manifest = shards.manifest
    content = {
        "settings": {**to_json(config), "shards": shown_location(config.shards)},
        "chosen": dict(chosen),
        "preprocessing": dict(preprocessing),
        "shards": {
            "fingerprint": shards.fingerprint,
            "samples": manifest.samples,
            "fields": manifest.fields,
            "classes": len(manifest.classes),
        },
        "versions": versions(),
    }
    write_json(run / CONFIG, content)


def _lines_of(lines: Sequence[bytes], epochs: int) -> list[bytes]:
    """The lines of a log for the first `epochs` epochs, the last one for each; a full disk may have torn a line."""
    found: dict[int, bytes] = {}
    for line in lines:
        with suppress(KeyError, RecursionError, TypeError, ValueError):
            epoch = json.loads(line)["epoch"]
            if type(epoch) is int and 1 <= epoch <= epochs and line.endswith(b"\n"):
                found[epoch] = line
    return [found[epoch] for epoch in sorted(found)]


def _halves(run: Path, name: str) -> list[Path]:
    """What a kill left of a file that was being written; version 0.1.0 named it `.NAME.PID`."""
    return [*run.glob(f"{name}.????????.part"), *run.glob(f".{name}.*")]


def versions() -> dict[str, str]:
    """The versions of everything that a result depends on."""
    found = {"modan_fast": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "nvidia-dali-cuda120", "numpy"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def save_checkpoint(run: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run: tensors, numbers, strings, and containers of them.

    Raises `InputError` if the run folder is gone: half of one would be of no use.
    """
    if not (run / CONFIG).exists():
        raise InputError(f"{run / CONFIG} is gone, and the run with it: start anew")
    with replacing(run / CHECKPOINT) as file:
        torch.save(dict(state), file)


def load_checkpoint(run: Path) -> dict[str, Any]:
    """The saved state, on the CPU. Raises `InputError` if it is missing or damaged."""
    path = run / CHECKPOINT
    if not path.exists():
        raise InputError(f"{run} has no checkpoint yet: `overwrite=True` starts it anew")
    try:
        if unpacked_size(path) > LARGEST_FILE:
            raise ValueError("too large")
        with open_regular(path) as file:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler or its zip reader meets
        raise InputError(f"{path} is no readable checkpoint: `overwrite=True` starts anew") from error
    return state


def save_run_encoder(config: PretrainConfig, encoder: Encoder, *, epoch: int, name: str = ENCODER) -> None:
    """Write the encoder of a run after `epoch` epochs as the file `name`."""
    metadata = {"epoch": str(epoch), "method": config.method, "recipe": config.recipe}
    save_encoder(config.run / name, encoder, metadata)


def finished_epochs(run: Path) -> int:
    """Epochs that the run's encoder was trained; 0 where there is none that can be read."""
    try:
        return int(encoder_metadata(run / ENCODER).get("epoch", "0"))
    except ValueError:
        return 0


def _settings(run: Path, written: Mapping[str, Any]) -> PretrainConfig:
    """The settings in a run's `config.json`. Those that are younger than the file have the recipe's values."""
    try:
        return pretrain_config(written["settings"])
    except (InputError, TypeError) as error:
        raise InputError(
            f"{run / CONFIG} holds no settings of this version ({error}): use the version that wrote it, or start "
            "anew with `overwrite=True`"
        ) from error


def _written(run: Path) -> dict[str, Any]:
    """The content of a run's `config.json`. Raises `InputError` if there is none."""
    path = run / CONFIG
    if not path.exists():
        raise InputError(f"no run to resume at {run}: leave out `resume=True` to start one")
    written = read_json(path)
    wanted = {"settings": "epochs", "shards": "fingerprint"}
    if not all(isinstance(part := written.get(name), dict) and key in part for name, key in wanted.items()):
        raise InputError(f"{run} exists and is no run folder: its config.json was written by another program")
    return written
