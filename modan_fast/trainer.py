"""The pretraining loop: from settings and a shard set to a run folder."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from modan_fast import run
from modan_fast.config import PretrainConfig
from modan_fast.devices import (
    device_name,
    is_not_deterministic,
    out_of_memory,
    peak_memory,
    pick_device,
    same_bits,
)
from modan_fast.encoders import preprocessing
from modan_fast.folder import check_writable, locked
from modan_fast.loader import Batch, Loader, loader_of
from modan_fast.metrics import JsonlLogger, Logger, as_text, check_loggers, library_loggers
from modan_fast.monitor import Monitor
from modan_fast.ranks import LOST, EndedElsewhere, LostRankError, Ranks, joined, lost_rank
from modan_fast.shards import ShardSet, open_shards
from modan_fast.step import TrainState
from shard_builder.settings import InputError, Progress, no_progress

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

    Under torchrun the ranks train together. Rank 0 locks and writes the run folder, and only its `loggers` and its
    `progress` are used; a run that torchrun has restarted goes on from its checkpoint.

    A finished run of the same settings is left alone. Raises `InputError` for settings or files that do not fit and for
    an existing run without `resume` or `overwrite`; `FloatingPointError` if the loss is no longer finite;
    `KeyboardInterrupt` after SIGINT, SIGTERM or SIGHUP, once the state is saved. The state is also saved if the data or
    the disk fails. Ranks other than 0 raise `EndedElsewhere` for what rank 0, or the rank where it happened, raises.
    """
    with joined(config.device) as ranks:
        try:
            return _pretrain(config, ranks, resume, overwrite, loggers, progress if ranks.first else no_progress)
        except FloatingPointError as error:  # all ranks know the loss
            if ranks.first:
                raise
            raise EndedElsewhere(str(error), 1) from error


def _pretrain(
    config: PretrainConfig,
    ranks: Ranks,
    resume: bool,
    overwrite: bool,
    loggers: Sequence[Logger],
    progress: Progress,
) -> Path:
    # Scripts that look for a checkpoint do so on each machine.
    resume, overwrite = ranks.from_first((resume, overwrite))
    shards = ranks.together(lambda: open_shards(config.shards))
    check_same(shards, ranks)
    config = config.resolved(shards.manifest.size)
    folder = config.run
    if ranks.restarts and ranks.decided(lambda: run.holds(config, shards)):
        resume = ranks.decided((folder / run.CHECKPOINT).exists)
        overwrite = not resume

    def is_finished() -> bool:
        if finished := run.nothing_to_do(config, shards, resume=resume, overwrite=overwrite):
            log.info("%s is finished with these settings and left as it is", folder)
        return finished

    def check() -> bool:
        if is_finished():
            return True
        check_writable(folder)
        check_labels(config, shards)
        check_ranks(config, ranks)
        check_loggers(config.log)
        return False

    if ranks.decided(check):
        return folder
    device = ranks.together(lambda: pick_device(config.device))
    with stop_requested() as stop, same_bits(config.deterministic, device), ExitStack() as held:

        def opened() -> tuple[Loader, TrainState, Monitor | None]:
            with stop.at_once():
                loader = loader_of(config, shards, device=device, ranks=ranks, progress=progress)
                classes, steps = len(shards.manifest.classes), len(loader)
                state = TrainState(
                    config, classes=classes, steps=steps, device=device, resumed=resume, ranks=ranks
                )
                watches = ranks.first and config.monitor_every
                return loader, state, Monitor(shards, config, device) if watches else None

        loader, state, monitor = ranks.together(opened)
        ranks.decided(lambda: held.enter_context(locked(folder, "training")))
        # Another process may have written to the folder while this one filled its store.
        if ranks.decided(is_finished):
            return folder
        if resume:
            restore(state, folder)
        everyone: list[Logger] = []

        def start_recording() -> None:
            begin(config, shards, loader, state, resumed=resume)
            libraries = library_loggers(config, state.epoch)
            everyone.extend([JsonlLogger(folder / run.LOG), *loggers, *libraries])
            if monitor and not resume:
                monitor.save_views(folder / run.VIEWS)
            for library in libraries:
                held.callback(library.close)
                if monitor and not resume:
                    library.log_views(folder / run.VIEWS)

        ranks.decided(start_recording)
        state.connect()
        checkpoints = Checkpoints(state)
        try:
            with saved_if_it_ends_early(checkpoints):
                while state.epoch < config.epochs:
                    train_epoch(state, loader, monitor, everyone, checkpoints, stop, progress)
        except (MemoryError, RuntimeError) as error:
            if lost_rank(error):
                raise LostRankError(f"{LOST}; {kept_in(folder)}") from error
            if is_not_deterministic(error):
                what = str(error).partition(" does not have")[0]
                raise InputError(
                    f"`deterministic`: {what} has no form that gives the same bits each time: leave the setting out, "
                    f"or choose another `encoder`; {kept_in(folder)}"
                ) from error
            if not out_of_memory(error):
                raise
            raise too_large(state) from error
    return folder


def train_epoch(
    state: TrainState,
    loader: Loader,
    monitor: Monitor | None,
    loggers: Sequence[Logger],
    checkpoints: Checkpoints,
    stop: Stop,
    progress: Progress,
) -> None:
    """Train the rest of an epoch, log it, and save the state where that is due.

    Raises `Stopped` after a signal, between two steps. With several ranks all call it; a signal or an error on one of
    them ends it on all.
    """
    config, ranks, samples = state.config, state.ranks, loader.samples
    with closing(loader.epoch(state.epoch, state.step)) as batches:
        awaited = state.clock.watch(batches)
        while not state.epoch_finished:
            batch, failure = next_batch(awaited, stop, ranks)
            due = agreed(state, checkpoints, stop, failure)
            if due.stop:
                raise Stopped
            if due.look or due.save:
                check_finite(state)
                show(progress, state, state.metrics(samples))
            if due.save:
                checkpoints.save()
            if stop.requested and ranks.size == 1:  # meanwhile
                raise Stopped
            assert batch is not None, "an epoch has as many batches as steps"
            state.update(batch)
    check_finite(state)
    metrics = state.metrics(samples) | peak_memory(state.device)
    due = agreed(state, checkpoints, stop)
    epoch = state.epoch + 1

    def record() -> None:
        if monitor and monitor.due(epoch):
            metrics.update(monitor.look(state.encoder, state.model.head))
        show(progress, state, metrics)
        for logger in loggers:
            logger.log(metrics, step=epoch)
        if epoch in config.keep:
            run.save_run_encoder(config, state.encoder, epoch=epoch, name=f"encoder-{epoch:04d}.safetensors")

    # The epoch ends once it is recorded: if the disk is full, a resumed run records it again.
    ranks.decided(record)
    state.end_epoch()
    finished = state.epoch == config.epochs
    if state.epoch % config.checkpoint_every == 0 or finished or due.save:
        checkpoints.save()
    if due.stop and not finished:
        raise Stopped


def next_batch(batches: Iterator[Batch], stop: Stop, ranks: Ranks) -> tuple[Batch | None, Exception | None]:
    """The next batch; with several ranks, or else the error, which all ranks have to hear of.

    Raises `Stopped` at once if a signal arrives meanwhile and there is no other rank to agree with.
    """
    try:
        with stop.at_once():
            return next(batches, None), None
    except Stopped:
        if ranks.size == 1:
            raise
        return None, None
    except Exception as error:
        if ranks.size == 1:
            raise
        return None, error


class Due(NamedTuple):
    """What all ranks do before the next step."""

    stop: bool
    save: bool
    look: bool


def agreed(state: TrainState, checkpoints: Checkpoints, stop: Stop, failure: Exception | None = None) -> Due:
    """What is due between two steps, the same on all ranks: a signal on any of them stops all, rank 0's clock decides
    the rest. Raises on all ranks if there was a `failure` on one.
    """
    ranks, by_clock = state.ranks, state.ranks.first and state.step > 0
    save, look = by_clock and checkpoints.due, by_clock and state.clock.time_to_look()
    failed, *due = (bool(each) for each in ranks.highest([failure is not None, stop.requested, save, look]))
    if failed:
        ranks.agree(failure)
    return Due(*due)


def check_same(shards: ShardSet, ranks: Ranks) -> None:
    """Raise `InputError` if another rank, on another machine, has found another shard set."""
    found = ranks.all(shards.fingerprint)
    other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
    ranks.agree(
        InputError(f"{shards.shown_location} is another shard set on rank {other} than on rank 0: copy it anew")
        if other is not None
        else None
    )


def check_ranks(config: PretrainConfig, ranks: Ranks) -> None:
    """Raise `InputError` if there are more ranks than images in a batch."""
    if config.batch_size < ranks.size:
        raise InputError(
            f"`batch_size={config.batch_size}` leaves some of {ranks.size} ranks without an image: it counts the "
            "images of all ranks together"
        )


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
    ranks = state.ranks
    saved = ranks.decided(lambda: run.load_checkpoint(folder))

    def load() -> None:
        try:
            state.load_state_dict(saved)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder / run.CHECKPOINT} holds no state of this run: restore it, or start anew with `overwrite=True`"
            ) from error

    ranks.together(load)
    # A kill between the two writes of `save` leaves an older encoder.
    ranks.decided(lambda: run.save_run_encoder(state.config, state.encoder, epoch=state.epoch))


def begin(config: PretrainConfig, shards: ShardSet, loader: Loader, state: TrainState, *, resumed: bool) -> None:
    """Log and record the values that automatic settings got on this machine, and make the folder ready."""
    chosen = {
        "device": device_name(state.device),
        "precision": str(state.dtype).removeprefix("torch."),
        "compile": state.compiled,
        "renderer": loader.renderer.name,
        "store": loader.store.tier,
        "threads": config.threads or state.ranks.cores,
    }
    if state.ranks.size > 1:
        chosen["ranks"] = state.ranks.size
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
        """Let rank 0 write the state, while the others wait. Raises OSError if that fails."""
        self.state.ranks.decided(self.write)

    def write(self) -> None:
        """Write the checkpoint, then the encoder. Raises OSError if that fails; the files before stay as they were."""
        config = self.state.config
        run.save_checkpoint(config.run, self.state.state_dict())
        run.save_run_encoder(config, self.state.encoder, epoch=self.state.epoch)
        self._saved = time.monotonic()


@contextmanager
def saved_if_it_ends_early(checkpoints: Checkpoints) -> Iterator[None]:
    """Save the state if a signal, the data, the disk or another rank ends the training: no finished step is lost.

    Raises `Stopped` as it came; an error as `InputError` that says what is saved; `FloatingPointError` if the loss of
    the state is not finite, which is then not saved.
    """
    state, folder = checkpoints.state, checkpoints.state.config.run
    if not state.ranks.first:
        yield
        return
    try:
        yield
    except (Stopped, InputError, OSError) as ended:
        if state.step:
            check_finite(state)
        why: BaseException = ended
        try:
            checkpoints.write()  # the other ranks may be gone
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
    # The other ranks take no part in trying.
    if fits := state.largest_micro_batch() if state.ranks.size == 1 else None:
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
