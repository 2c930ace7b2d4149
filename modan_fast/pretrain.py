"""The pretraining loop."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from modan_fast import checkpoint, models
from modan_fast.config import PretrainConfig
from modan_fast.loader import Batch, Loader
from modan_fast.losses import MulSupConLoss, NTXentLoss, SupConLoss
from modan_fast.machine import compiler, compute_type, pick_device
from modan_fast.models import Pretrainee, head
from modan_fast.render import open_renderer
from modan_fast.shards import open_shards
from modan_fast.store import open_store
from shard_builder.settings import InputError, Report, silent, usable_cores

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds between two looks at the loss: reading it makes the host wait for the device


def pretrain(
    config: PretrainConfig, *, resume: bool = False, overwrite: bool = False, report: Report = silent
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
    if shards.manifest.samples < config.batch_size:
        raise InputError(
            f"--batch-size {config.batch_size} is more than the {shards.manifest.samples} images in "
            f"{config.shards}: choose a smaller one"
        )

    device = pick_device(config.device)
    dtype = compute_type(config.precision, device)
    threads = config.threads or usable_cores()
    store = open_store(
        shards, tier=config.store, renderer=config.renderer, device=device, threads=threads, report=report
    )
    renderer = open_renderer(
        config.renderer,
        size=config.image_size or store.canvas,
        batch_size=config.batch_size,
        device=device,
        dtype=dtype,
        threads=threads,
        views=config.views,
        blur=config.augmentation.blur > 0,
    )
    loader = Loader(
        store,
        renderer,
        config.augmentation,
        batch_size=config.batch_size,
        seed=config.seed,
        drop_last=config.drop_last,
        views=config.views,
    )

    torch.manual_seed(config.seed)
    encoder = first_encoder(config)
    model = Pretrainee(encoder, head(config.method, len(shards.manifest.classes)))
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss_of: Any = loss_function(config)
    optimizer = optimizer_of(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    compiled = wants_compile(config.compile, device)
    forward: Any = torch.compile(model) if compiled else model
    loss_of = torch.compile(loss_of) if compiled else loss_of
    log.info(
        "training on %s, %s, %s",
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU ({threads} threads)",
        str(dtype).removeprefix("torch."),
        "compiled" if compiled else "not compiled",
    )

    def update(batch: Batch, step: int) -> Tensor:
        """One step of training; returns its loss, which stays on the device."""
        for group in optimizer.param_groups:
            group["lr"] = rate_at(config, step, loader.steps)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            embeddings = forward(batch.views)
        loss: Tensor = loss_of(embeddings.float(), batch.targets if config.views == 1 else batch.labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def save(epoch: int, step: int) -> None:
        """Write all that resuming in `epoch` (0-based) before `step` needs, and the encoder."""
        state = {
            "epoch": epoch,
            "step": step,
            "loss_sum": loss_sum,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        checkpoint.save(run, state, encoder, config)

    first_epoch, first_step, loss_sum = 0, 0, torch.zeros((), device=device)
    if resume:
        state = checkpoint.load(run)
        first_epoch, first_step, loss_sum = state["epoch"], state["step"], state["loss_sum"].to(device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    checkpoint.begin(config, shards, resumed_at=first_epoch if resume else None)

    model.train()
    total = config.epochs * loader.steps
    with _asked_to_stop() as stop:
        for epoch in range(first_epoch, config.epochs):
            clock = EpochClock(device)
            for step, batch in enumerate(clock.watch(loader.epoch(epoch, first_step)), start=first_step):
                loss_sum += update(batch, epoch * loader.steps + step)
                last = step + 1 == loader.steps
                if last or clock.time_to_look():
                    loss = loss_sum.item() / (step + 1)
                    if not math.isfinite(loss):
                        raise FloatingPointError(
                            f"the loss is {loss} in epoch {epoch + 1}, step {step + 1}: try a smaller --lr; "
                            f"{run} keeps the last checkpoint"
                        )
                    speed = (step + 1 - first_step) * config.batch_size / clock.seconds
                    note = f"epoch {epoch + 1}/{config.epochs}  loss {loss:.3f}  {speed:.0f} images/s"
                    report(
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
                    "lr": optimizer.param_groups[0]["lr"],
                    "seconds": round(clock.seconds, 3),
                    "images_per_second": round(speed, 1),
                    "wait_share": round(clock.wait_share, 4),
                },
            )
            first_step, loss_sum = 0, torch.zeros_like(loss_sum)
            if (epoch + 1) % config.checkpoint_every == 0 or epoch + 1 == config.epochs or stop.is_set():
                save(epoch + 1, 0)
            if epoch + 1 in config.keep:
                checkpoint.save_encoder(
                    run / f"encoder-{epoch + 1:04d}.safetensors", encoder, config, epoch=epoch + 1
                )
            if stop.is_set() and epoch + 1 < config.epochs:
                raise KeyboardInterrupt
    return run


def first_encoder(config: PretrainConfig) -> ResNet:
    """The encoder that a run starts from: random, or with ImageNet's weights where they are named or the recipe
    has them (the published supervised baseline starts from them, with a first convolution drawn at random).
    """
    released = config.recipe == "released-code"
    if config.imagenet_weights is None and not (released and config.method == "supervised"):
        return models.encoder(config.stem)
    return checkpoint.load_imagenet(config.imagenet_weights, config.stem, sum_filters=not released)


def loss_function(config: PretrainConfig) -> nn.Module:
    """The loss of a method, called with embeddings and labels, or with logits and targets for `supervised`."""
    losses: dict[str, Callable[[], nn.Module]] = {
        "mulsupcon": lambda: MulSupConLoss(config.temperature, config.threshold),
        "supcon": lambda: SupConLoss(config.temperature),
        "simclr": lambda: NTXentLoss(config.temperature),
        "supervised": nn.CrossEntropyLoss,
    }
    return losses[config.method]()


def optimizer_of(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a run; fused on a GPU, where with another one the loss scaler reads back every step."""
    parameters = list(model.parameters())
    fused = parameters[0].is_cuda
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay, fused=fused)


def lr_at(step: int, *, peak: float, start: float, warmup: int, milestones: Iterable[int]) -> float:
    """Learning rate of a step: linear from `start` to `peak` over `warmup` steps, a tenth from each milestone."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return peak * math.prod(0.1 for milestone in milestones if step >= milestone)


def cosine_lr_at(epoch: int, *, peak: float, epochs: int) -> float:
    """Learning rate of an epoch, from 0: from `peak` along half a cosine towards 0 (SGDR, Eq. 5, no restarts)."""
    return peak * (1 + math.cos(math.pi * epoch / epochs)) / 2


def rate_at(config: PretrainConfig, step: int, steps: int) -> float:
    """Learning rate of a step of a run whose epochs have `steps` steps."""
    if config.schedule == "cosine":
        return cosine_lr_at(step // steps, peak=config.lr, epochs=config.epochs)
    return lr_at(
        step,
        peak=config.lr,
        start=config.warmup_from,
        warmup=config.warmup_epochs * steps,
        milestones=[epoch * steps for epoch in config.milestones],
    )


def wants_compile(asked: bool | None, device: torch.device) -> bool:
    """Whether to compile: as asked, by default on GPUs only; never, with a warning, without a C++ compiler."""
    if not (device.type == "cuda" if asked is None else asked):
        return False
    if compiler():
        return True
    log.warning("no C++ compiler found, so nothing is compiled: install g++ for more speed")
    return False


class EpochClock:
    """Times an epoch, and how long the device waited for data in it.

    A CPU waits while the loader's `next` runs. A GPU is given its work ahead of time, so what counts is the
    time that passes on it between the end of one step and the moment the next views are ready, by its own clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun = self._looked = time.perf_counter()
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waited = 0.0

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
    def wait_share(self) -> float:
        """Share of the epoch so far that was spent waiting for data; on a GPU it waits for the last event."""
        if self._waits:
            self._waits[-1][1].synchronize()
            self._waited += sum(begun.elapsed_time(ended) for begun, ended in self._waits) / 1000
            self._waits.clear()
        return self._waited / self.seconds


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
