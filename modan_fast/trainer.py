"""The pretraining loop: from settings and a shard set to a run folder."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from modan_fast import run
from modan_fast.config import PretrainConfig
from modan_fast.devices import device_name, peak_memory, pick_device
from modan_fast.encoders import preprocessing
from modan_fast.folder import check_writable, locked
from modan_fast.loader import Loader, loader_of
from modan_fast.metrics import JsonlLogger, Logger, as_text
from modan_fast.shards import ShardSet, open_shards
from modan_fast.step import TrainState
from shard_builder.settings import InputError, Progress, no_progress, usable_cores

log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    loggers: Sequence[Logger] = (),
    progress: Progress = no_progress,
) -> Path:
    """Train as `config` says; return the run folder. Each of `loggers` gets the metrics of every epoch.

    A finished run of the same settings is left alone. Raises `InputError` for settings or files that do not fit and for
    an existing run without `resume` or `overwrite`; `FloatingPointError` if the loss is no longer finite;
    `KeyboardInterrupt` after SIGINT or SIGTERM, once the state is saved.
    """
    shards = open_shards(config.shards)
    config = config.resolved(shards.manifest.size)
    folder = config.run
    if run.nothing_to_do(config, shards, resume=resume, overwrite=overwrite):
        log.info("%s is finished with these settings and left as it is", folder)
        return folder
    check_writable(folder)
    check_labels(config, shards)
    device = pick_device(config.device)
    loader = loader_of(config, shards, device=device, progress=progress)
    state = TrainState(config, classes=len(shards.manifest.classes), steps=len(loader), device=device)
    with locked(folder, "training"), stop_requested() as stop:
        if resume:
            restore(state, folder)
        begin(config, shards, loader, state, resumed=resume)
        everyone = [JsonlLogger(folder / run.LOG), *loggers]
        while state.epoch < config.epochs:
            for batch in state.clock.watch(loader.epoch(state.epoch, state.step)):
                state.update(batch)
                if state.epoch_finished or stop.is_set() or state.clock.time_to_look():
                    metrics = state.metrics(shards.manifest.samples)
                    check_finite(state, metrics["loss"], folder)
                    show(progress, state, metrics)
                if stop.is_set() and not state.epoch_finished:
                    save(state)
                    raise KeyboardInterrupt
            state.end_epoch()
            for logger in everyone:
                logger.log(metrics | peak_memory(device), step=state.epoch)
            if state.epoch in config.keep:
                name = f"encoder-{state.epoch:04d}.safetensors"
                run.save_run_encoder(config, state.encoder, epoch=state.epoch, name=name)
            finished = state.epoch == config.epochs
            if state.epoch % config.checkpoint_every == 0 or finished or stop.is_set():
                save(state)
            if stop.is_set() and not finished:
                raise KeyboardInterrupt
    return folder


def check_labels(config: PretrainConfig, shards: ShardSet) -> None:
    """Raise `InputError` if all images have the same labels, so that the method cannot learn to distinguish them."""
    manifest = shards.manifest
    one_value_each = all(len(values) <= 1 for values in manifest.fields.values())
    missing = manifest.options.get("source", {}).get("missing")  # such images have other labels
    what = None
    if config.method in ("mulsupcon", "supcon") and one_value_each and not missing:
        what = f"the labels {', '.join(manifest.labels)}"
    elif config.method == "supervised" and len(manifest.classes) == 1:
        what = f"the class {manifest.classes[0]}"
    if what:
        raise InputError(
            f"all {manifest.samples:,} images of {shards.location} have {what}: {config.method} has nothing to "
            "distinguish; add images with other labels, or pass `method=simclr`"
        )


def restore(state: TrainState, folder: Path) -> None:
    """Continue `state` from the checkpoint in a run folder; raises `InputError` if it does not belong to the run."""
    saved = run.load_checkpoint(folder)
    try:
        state.load_state_dict(saved)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / run.CHECKPOINT} holds no state of this run: restore it, or start anew with `overwrite=True`"
        ) from error
    # A kill between the two writes of `save` leaves an older encoder.
    run.save_run_encoder(state.config, state.encoder, epoch=state.epoch)


def begin(config: PretrainConfig, shards: ShardSet, loader: Loader, state: TrainState, *, resumed: bool) -> None:
    """Log and record the values that automatic settings got on this machine, and make the folder ready."""
    chosen = {
        "device": device_name(state.device),
        "precision": str(state.dtype).removeprefix("torch."),
        "compile": state.compiled,
        "renderer": loader.renderer.name,
        "store": loader.store.tier,
        "threads": config.threads or usable_cores(),
    }
    log.info("training: %s", ", ".join(f"{name} {value}" for name, value in chosen.items()))
    run.begin(
        config,
        shards,
        preprocessing=preprocessing(state.encoder, config.image_size),
        chosen=chosen,
        resumed_at=state.epoch if resumed else None,
    )


def save(state: TrainState) -> None:
    """Write the checkpoint and the encoder."""
    run.save_checkpoint(state.config.run, state.state_dict())
    run.save_run_encoder(state.config, state.encoder, epoch=state.epoch)


def check_finite(state: TrainState, loss: float, folder: Path) -> None:
    """Raise FloatingPointError if the loss is not finite."""
    if math.isfinite(loss):
        return
    kept = (
        f"{folder} keeps the last checkpoint" if (folder / run.CHECKPOINT).exists() else "nothing was saved yet"
    )
    raise FloatingPointError(
        f"the loss is {loss} in epoch {state.epoch + 1}, step {state.step}: try a smaller `lr`; {kept}"
    )


def show(progress: Progress, state: TrainState, metrics: Mapping[str, float]) -> None:
    """Show how far the run is."""
    done, epochs = state.epoch * state.steps + state.step, state.config.epochs
    progress("pretraining", done, epochs * state.steps, f"epoch {state.epoch + 1}/{epochs}  {as_text(metrics)}")


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second signal ends the process as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def request(number: int, frame: object) -> None:
        log.warning("stopping after this step; once more to stop at once")
        stop.set()
        for each in signals:
            signal.signal(each, before[each])

    for number in signals:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number in signals:
            signal.signal(number, before[number])
