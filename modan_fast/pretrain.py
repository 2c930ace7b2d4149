"""The pretraining loop."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from modan_fast import checkpoint
from modan_fast.config import PretrainConfig
from modan_fast.folder import check_writable, locked
from modan_fast.loader import Batch, open_loader
from modan_fast.machine import compute_type, peak_memory, pick_device
from modan_fast.shards import open_shards
from modan_fast.step import Step
from shard_builder.settings import InputError, Progress, no_progress, usable_cores

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds between two looks at the loss: reading it makes the host wait for the device


def pretrain(
    config: PretrainConfig, *, resume: bool = False, overwrite: bool = False, progress: Progress = no_progress
) -> Path:
    """Train as `config` says and write the run folder, whose path is returned.

    A finished run of the same settings is left alone. Raises `InputError` for settings or files that do not
    fit and for an existing run without `resume` or `overwrite`; `FloatingPointError` where the loss is no longer
    finite; `KeyboardInterrupt` after SIGINT or SIGTERM, once the state is saved.
    """
    shards = open_shards(config.shards)
    config = replace(config, image_size=config.image_size or shards.manifest.size)
    run = config.run
    if checkpoint.nothing_to_do(config, shards, resume=resume, overwrite=overwrite):
        log.info("%s is finished with these settings and left as it is", run)
        return run
    check_writable(run)

    device = pick_device(config.device)
    dtype = compute_type(config.precision, device)
    loader = open_loader(config, shards, device=device, dtype=dtype, progress=progress)
    training = Step(config, classes=len(shards.manifest.classes), steps=loader.steps, device=device)
    chosen = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "precision": str(dtype).removeprefix("torch."),
        "compile": training.compiled,
        "renderer": loader.renderer.name,
        "store": loader.store.tier,
        "threads": config.threads or usable_cores(),
    }
    log.info("training: %s", ", ".join(f"{name} {value}" for name, value in chosen.items()))

    def save(epoch: int, step: int) -> None:
        """Write all that resuming in `epoch` (0-based) before `step` needs, and the encoder."""
        state = {"epoch": epoch, "step": step, "loss_sum": loss_sum, **training.state()}
        state |= {"seconds": clock.seconds, "waited": clock.waited} if step else {"seconds": 0.0, "waited": 0.0}
        checkpoint.save(run, state, training.encoder, config)

    first_epoch, first_step, loss_sum = 0, 0, torch.zeros((), device=device)
    seconds = waited = 0.0  # of the epoch before it was interrupted
    with locked(run, "training"), _asked_to_stop() as stop:
        if resume:
            state = checkpoint.load(run)
            try:
                first_epoch, first_step, loss_sum = state["epoch"], state["step"], state["loss_sum"].to(device)
                seconds, waited = state["seconds"], state["waited"]
                training.load_state(state)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise InputError(
                    f"{run / 'checkpoint.pt'} holds no state of this run: restore it, or --overwrite starts anew"
                ) from error
            # A kill may have come between the checkpoint and the encoder that belongs to it.
            checkpoint.save_encoder(run / "encoder.safetensors", training.encoder, config, epoch=first_epoch)
        checkpoint.begin(config, shards, chosen=chosen, resumed_at=first_epoch if resume else None)

        total = config.epochs * loader.steps
        for epoch in range(first_epoch, config.epochs):
            clock = EpochClock(device, seconds, waited)
            for step, batch in enumerate(clock.watch(loader.epoch(epoch, first_step)), start=first_step):
                loss_sum += training.update(batch, epoch * loader.steps + step)
                last = step + 1 == loader.steps
                if last or stop.is_set() or clock.time_to_look():
                    loss = loss_sum.item() / (step + 1)
                    if not math.isfinite(loss):
                        saved = (run / "checkpoint.pt").exists()
                        kept = f"{run} keeps the last checkpoint" if saved else "nothing was saved yet"
                        raise FloatingPointError(
                            f"the loss is {loss} in epoch {epoch + 1}, step {step + 1}: try a smaller --lr; {kept}"
                        )
                    images = min((step + 1) * config.batch_size, shards.manifest.samples)
                    speed = images * config.views / clock.seconds
                    note = f"epoch {epoch + 1}/{config.epochs}  loss {loss:.3f}  {speed:.0f} views/s"
                    progress(
                        "pretraining",
                        epoch * loader.steps + step + 1,
                        total,
                        f"{note}  waiting {clock.wait_share:.0%}",
                    )
                if stop.is_set() and not last:
                    save(epoch, step + 1)
                    raise KeyboardInterrupt
            checkpoint.append_log(
                run,
                {
                    "epoch": epoch + 1,
                    "loss": loss,
                    "lr": training.optimizer.param_groups[0]["lr"],
                    "seconds": round(clock.seconds, 3),
                    "views_per_second": round(speed, 1),
                    "wait_share": round(clock.wait_share, 4),
                    **peak_memory(device),
                },
            )
            first_step, loss_sum = 0, torch.zeros_like(loss_sum)
            seconds = waited = 0.0
            if epoch + 1 in config.keep:
                checkpoint.save_encoder(
                    run / f"encoder-{epoch + 1:04d}.safetensors", training.encoder, config, epoch=epoch + 1
                )
            if (epoch + 1) % config.checkpoint_every == 0 or epoch + 1 == config.epochs or stop.is_set():
                save(epoch + 1, 0)
            if stop.is_set() and epoch + 1 < config.epochs:
                raise KeyboardInterrupt
    return run


class EpochClock:
    """Times an epoch, and how long the device waited for data in it.

    A CPU waits while the loader's `next` runs. A GPU is given its work ahead of time, so what counts is the
    time that passes on it between the end of one step and the moment the next views are ready, by its own clock.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0, waited: float = 0.0) -> None:
        """`seconds` have passed in the epoch before, `waited` of them for data."""
        self._cuda = device.type == "cuda"
        self._looked = time.perf_counter()
        self._begun = self._looked - seconds
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waited = waited

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with every wait for one of them timed."""
        while True:
            begun = self._mark()
            batch = next(batches, None)
            ended = self._mark()
            if batch is None:
                return
            if isinstance(begun, float) and isinstance(ended, float):
                self._waited += ended - begun
            else:
                self._waits.append((begun, ended))  # type: ignore[arg-type]
            yield batch

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def time_to_look(self) -> bool:
        """Whether it is long enough ago that this said so."""
        now = time.perf_counter()
        if due := now - self._looked >= LOOK_EVERY:
            self._looked = now
        return due

    @property
    def seconds(self) -> float:
        """Wall-clock since the epoch began."""
        return time.perf_counter() - self._begun

    @property
    def waited(self) -> float:
        """Seconds of the epoch so far that were spent waiting for data; on a GPU it waits for the last event."""
        if self._waits:
            self._waits[-1][1].synchronize()
            self._waited += sum(begun.elapsed_time(ended) for begun, ended in self._waits) / 1000
            self._waits.clear()
        return self._waited

    @property
    def wait_share(self) -> float:
        """`waited` as a share of the epoch so far."""
        return self.waited / self.seconds


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one ends the process as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, frame: object) -> None:
        log.warning("stopping after this step; once more to stop at once")
        stop.set()
        for each in signals:
            signal.signal(each, before[each])

    for number in signals:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number in signals:
            signal.signal(number, before[number])
