"""The pretraining loop: from settings and a shard set to a run folder."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from modan_fast import run
from modan_fast.config import PretrainConfig
from modan_fast.devices import device_name, out_of_memory, peak_memory, pick_device
from modan_fast.encoders import preprocessing
from modan_fast.folder import check_writable, locked
from modan_fast.loader import Batch, Loader, loader_of
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
    `KeyboardInterrupt` after SIGINT, SIGTERM or SIGHUP, once the state is saved. The state is also saved if the data or
    the disk fails.
    """
    shards = open_shards(config.shards)
    config = config.resolved(shards.manifest.size)
    folder = config.run

    def is_finished() -> bool:
        if finished := run.nothing_to_do(config, shards, resume=resume, overwrite=overwrite):
            log.info("%s is finished with these settings and left as it is", folder)
        return finished

    if is_finished():
        return folder
    check_writable(folder)
    check_labels(config, shards)
    device = pick_device(config.device)
    with stop_requested() as stop:
        with stop.at_once():
            loader = loader_of(config, shards, device=device, progress=progress)
            state = TrainState(
                config, classes=len(shards.manifest.classes), steps=len(loader), device=device, resumed=resume
            )
        with locked(folder, "training"):
            # Another process may have written to the folder while this one filled its store.
            if is_finished():
                return folder
            if resume:
                with stop.at_once():
                    restore(state, folder)
            begin(config, shards, loader, state, resumed=resume)
            everyone = [JsonlLogger(folder / run.LOG), *loggers]
            checkpoints = Checkpoints(state)
            try:
                with saved_if_it_ends_early(checkpoints):
                    while state.epoch < config.epochs:
                        train_epoch(state, loader, everyone, checkpoints, stop, progress)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise too_large(state) from error
    return folder


def train_epoch(
    state: TrainState,
    loader: Loader,
    loggers: Sequence[Logger],
    checkpoints: Checkpoints,
    stop: Stop,
    progress: Progress,
) -> None:
    """Train the rest of an epoch, log it, and save the state where that is due.

    Raises `Stopped` after a signal, between two steps.
    """
    config, samples = state.config, sum(loader.store.counts)
    for batch in state.clock.watch(stop.between_steps(loader.epoch(state.epoch, state.step))):
        state.update(batch)
        if state.epoch_finished:
            break
        if stop.requested:
            raise Stopped
        if (due := checkpoints.due) or state.clock.time_to_look():
            check_finite(state)
            show(progress, state, state.metrics(samples))
        if due:
            checkpoints.save()
    check_finite(state)
    metrics = state.metrics(samples)
    show(progress, state, metrics)
    metrics |= peak_memory(state.device)
    # The epoch ends once it is recorded: if the disk is full, a resumed run records it again.
    epoch = state.epoch + 1
    for logger in loggers:
        logger.log(metrics, step=epoch)
    if epoch in config.keep:
        run.save_run_encoder(config, state.encoder, epoch=epoch, name=f"encoder-{epoch:04d}.safetensors")
    state.end_epoch()
    finished = state.epoch == config.epochs
    if state.epoch % config.checkpoint_every == 0 or finished or checkpoints.due:
        checkpoints.save()
    if stop.requested and not finished:
        raise Stopped


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
            f"all {manifest.samples:,} images of {shards.shown_location} have {what}: {config.method} has nothing to "
            "distinguish; add images with other labels, or pass `method=simclr`"
        )


def restore(state: TrainState, folder: Path) -> None:
    """Continue `state` from the checkpoint in a run folder; raises `InputError` if it does not belong to the run."""
    saved = run.load_checkpoint(folder)
    try:
        state.load_state_dict(saved)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
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


class Checkpoints:
    """Saves a training state, and knows when it is due: `checkpoint_minutes` after it was last saved."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether so much time has passed that the state should be saved, also within an epoch."""
        minutes = self.state.config.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._saved >= 60 * minutes

    def save(self) -> None:
        """Write the checkpoint, then the encoder. Raises OSError if that fails; the files before stay as they were."""
        config = self.state.config
        run.save_checkpoint(config.run, self.state.state_dict())
        run.save_run_encoder(config, self.state.encoder, epoch=self.state.epoch)
        self._saved = time.monotonic()


@contextmanager
def saved_if_it_ends_early(checkpoints: Checkpoints) -> Iterator[None]:
    """Save the state if a signal, the data or the disk ends the training, so that no finished step is lost.

    Raises `Stopped` as it came; an error as `InputError` that says what is saved; `FloatingPointError` if the loss of
    the state is not finite, which is then not saved.
    """
    state, folder = checkpoints.state, checkpoints.state.config.run
    try:
        yield
    except (Stopped, InputError, OSError) as ended:
        if state.step:
            check_finite(state)
        why: BaseException = ended
        try:
            checkpoints.save()
            kept = (
                f"{state.epoch} epochs and {state.step} steps are saved in {folder}, `resume=True` continues them"
            )
        except (InputError, OSError) as error:
            why = error if isinstance(ended, Stopped) else ended
            kept = kept_in(folder)
        if isinstance(why, (Stopped, BrokenPipeError)):
            raise
        reason = f"{why.filename}: {why.strerror}" if isinstance(why, OSError) else str(why)
        raise InputError(f"{reason}; {kept}") from why


def too_large(state: TrainState) -> InputError:
    """The error of a step that does not fit into memory. The step is not saved: it was not finished."""
    config = state.config
    what = f"a step of {config.batch_size} images of {config.image_size} px"
    if config.micro_batch:
        what += f", {config.micro_batch} at a time,"
    if fits := state.largest_micro_batch():
        remedy = f"pass `micro_batch={fits}`, which fits"
    else:
        remedy = f"pass a `batch_size` below {config.batch_size}, or a smaller `image_size`"
    return InputError(
        f"{what} does not fit into the memory of {device_name(state.device)}: {remedy}; {kept_in(config.run)}"
    )


def check_finite(state: TrainState) -> None:
    """Raise FloatingPointError if the loss of the epoch so far is not finite."""
    if not math.isfinite(loss := state.loss):
        raise FloatingPointError(
            f"the loss is {loss} in epoch {state.epoch + 1}, step {state.step}: try a smaller `lr`; "
            f"{kept_in(state.config.run)}"
        )


def kept_in(folder: Path) -> str:
    """What a run folder keeps of a run that cannot save its state."""
    return (
        f"{folder} keeps the last checkpoint" if (folder / run.CHECKPOINT).exists() else "nothing was saved yet"
    )


def show(progress: Progress, state: TrainState, metrics: Mapping[str, float]) -> None:
    """Show how far the run is."""
    done, epochs = state.epoch * state.steps + state.step, state.config.epochs
    progress("pretraining", done, epochs * state.steps, f"epoch {state.epoch + 1}/{epochs}  {as_text(metrics)}")


class Stopped(KeyboardInterrupt):
    """A signal asked the run to save its state and end."""


class Stop:
    """Whether a signal has asked the run to end. The loop looks at `requested` after each step."""

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Stopped` as soon as a signal arrives: no step is under way here, but the wait may be long."""
        try:
            self._at_once = True
            if self.requested:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def between_steps(self, batches: Generator[Batch, None, None]) -> Iterator[Batch]:
        """The batches; `Stopped` is raised at once while one is awaited."""
        with closing(batches):
            while True:
                with self.at_once():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def request(self) -> None:
        """What a signal does."""
        if not self.requested:
            self.requested = True
            log.warning("stopping after this step; press Ctrl-C to stop at once")
        if self._at_once:
            raise Stopped


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """A `Stop` that SIGINT, SIGTERM and SIGHUP request.

    A second SIGINT ends the process as usual, because somebody is waiting. The others change nothing when repeated:
    schedulers send them several times. A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}

    def request(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(number, before[number])
        stop.request()

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
