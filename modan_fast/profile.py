"""Where the time of a training step goes, stage by stage, and what limits the speed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from statistics import mean

from modan_fast.config import PretrainConfig
from modan_fast.devices import pick_device, same_bits, synchronise
from modan_fast.loader import Loader, loader_of
from modan_fast.metrics import EpochClock
from modan_fast.shards import open_shards
from modan_fast.step import TrainState
from modan_fast.stream import PixelBatch, Stream
from shard_builder.settings import Progress, no_progress

STEPS, SECONDS = 20, 20.0  # a measurement ends after 20 steps, or after 20 seconds and at least two steps
LITTLE = 0.02  # share of the time that the device may wait before the data is called the limit

COMPUTE = ("forward", "backward", "optimiser")
# What makes an earlier stage faster.
REMEDIES = {
    "read": "a faster disk or network, or enough memory for `store=host`",
    "decode": "more cores, shards made with --codec raw, or enough memory for `store=host`",
    "fetch": "a GPU with room for the pixels (`store=gpu`)",
    "augment": "a faster core (it runs on one)",
    "render": "more cores, or a GPU",
}


@dataclass(frozen=True)
class Profile:
    """`stages`: mean seconds of each stage of a step, measured alone; `step`: seconds of a step in training, where the
    stages before `forward` run in the background; `waits`: the share of `step` that the device waits for data.
    """

    stages: dict[str, float]
    step: float
    waits: float

    @property
    def verdict(self) -> str:
        """What limits the speed, as a sentence."""
        if self.waits > LITTLE:
            before = {stage: self.stages[stage] for stage in REMEDIES if stage in self.stages}
            slowest = max(before, key=before.__getitem__)
            return (
                f"The data limits the speed: the device waits for it {self.waits:.0%} of the time, and the slowest "
                f"stage before it is {slowest}. What would help: {REMEDIES[slowest]}."
            )
        longest = max(COMPUTE, key=self.stages.__getitem__)
        share = self.stages[longest] / self.step
        return (
            f"The training step limits the speed, most of all {longest} ({share:.0%} of it): the device waits for "
            f"data {self.waits:.1%} of the time."
        )


def profile(config: PretrainConfig, progress: Progress = no_progress) -> Profile:
    """Time some steps of the run that `config` describes; nothing is written. Raises as `pretrain`."""
    shards = open_shards(config.shards)
    config = config.resolved(shards.manifest.size)
    device = pick_device(config.device)
    loader = loader_of(config, shards, device=device, progress=progress)
    state = TrainState(config, classes=len(shards.manifest.classes), steps=len(loader), device=device)
    with same_bits(config.deterministic, device):
        step, waits = _in_training(loader, state, progress)
        return Profile(_one_by_one(loader, state, progress), step, waits)


def _in_training(loader: Loader, state: TrainState, progress: Progress) -> tuple[float, float]:
    """Seconds of a step, and the share of them that the device waits for data."""
    with closing(loader.endless()) as batches:
        state.update(next(batches))  # compiles, and chooses algorithms
        synchronise(state.device)
        clock = EpochClock(state.device)
        for done, batch in enumerate(clock.watch(batches), start=1):
            state.update(batch)
            progress("in training", done, STEPS, "")
            if done == STEPS or (done > 1 and clock.seconds > SECONDS):
                break
        synchronise(state.device)
        return clock.seconds / done, clock.wait_share


def _one_by_one(loader: Loader, state: TrainState, progress: Progress) -> dict[str, float]:
    """Mean seconds of each stage of a step, while nothing else runs."""
    taken: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        synchronise(state.device)
        taken[stage].append(time.perf_counter() - begun)

    begun = time.perf_counter()
    for done, pixels in enumerate(_fetched(loader, timed), start=1):
        with timed("augment"):
            ready = pixels, loader.parameters(0, pixels.ids)
        with timed("render"):
            loader.submit(ready)
            batch = loader.collect(ready)
        with timed("forward"):
            loss = state.forward(batch)
        with timed("backward"):
            state.backward(loss)
        with timed("optimiser"):
            state.optimise()
        progress("stage by stage", done, STEPS, "")
        if done == STEPS or (done > 1 and time.perf_counter() - begun > SECONDS):
            break
    return {stage: mean(seconds) for stage, seconds in taken.items()}


def _fetched(loader: Loader, timed: Callable[[str], AbstractContextManager[None]]) -> Iterator[PixelBatch]:
    """The pixels of an epoch's batches; those of a stream are read, then decoded."""
    store, id_batches = loader.store, loader.id_batches(0)
    if not isinstance(store, Stream):
        for ids in id_batches:
            with timed("fetch"):
                (batch,) = store.fetch([ids])
            yield batch
        return
    reading = store.read(id_batches)
    for _ in id_batches:
        with timed("read"):
            stored = next(reading)
        with timed("decode"):
            store.submit(stored)
            batch = store.collect(stored)
        yield batch
