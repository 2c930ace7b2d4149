"""Where the time of a training step goes, stage by stage, and what limits the speed."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np
import torch

from modan_fast.config import PretrainConfig
from modan_fast.loader import Loader, open_loader
from modan_fast.machine import compute_type, pick_device
from modan_fast.pretrain import EpochClock
from modan_fast.shards import open_shards
from modan_fast.step import Step
from modan_fast.stream import Samples, Stream
from shard_builder.settings import Progress, no_progress

STEPS, SECONDS = 20, 20.0  # a measurement ends after so many steps, or after two and so long
LITTLE = 0.02  # share of the time that the device may wait without a word

COMPUTE = ("forward", "backward", "optimiser")
# What makes a stage before these faster.
REMEDIES = {
    "read": "a faster disk or network, or enough memory for --store host",
    "decode": "more cores, shards made with --codec raw, or enough memory for --store host",
    "fetch": "a GPU with room for the pixels (--store gpu)",
    "augment": "a faster core, for it runs on one",
    "render": "more cores, or a GPU",
}


@dataclass(frozen=True)
class Profile:
    """`stages`: mean seconds that each stage of a step takes alone; `step`: seconds of a step in training, where
    the stages before `forward` run in the background; `waits`: the share of these that the device waits for data.
    """

    stages: dict[str, float]
    step: float
    waits: float

    @property
    def verdict(self) -> str:
        """What limits the speed, in words."""
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
    """Time some steps of the run that `config` describes; nothing is written. Raises as `pretrain` does."""
    shards = open_shards(config.shards)
    config = replace(config, image_size=config.image_size or shards.manifest.size)
    device = pick_device(config.device)
    loader = open_loader(
        config, shards, device=device, dtype=compute_type(config.precision, device), progress=progress
    )
    training = Step(config, classes=len(shards.manifest.classes), steps=loader.steps, device=device)
    step, waits = _in_training(loader, training, device, progress)
    return Profile(_one_by_one(loader, training, device, progress), step, waits)


def _in_training(loader: Loader, training: Step, device: torch.device, progress: Progress) -> tuple[float, float]:
    """Seconds of a step, and the share of them that the device waits for data."""
    with closing(loader.endless()) as batches:
        training.update(next(batches), 0)  # compiles, and chooses algorithms
        _synchronise(device)
        clock = EpochClock(device)
        for done, batch in enumerate(clock.watch(batches), start=1):
            training.update(batch, 0)
            progress("in training", done, STEPS, "")
            if done == STEPS or (done > 1 and clock.seconds > SECONDS):
                break
        _synchronise(device)
        return clock.seconds / done, clock.wait_share


def _one_by_one(loader: Loader, training: Step, device: torch.device, progress: Progress) -> dict[str, float]:
    """Mean seconds of each stage of a step, while nothing else runs."""
    taken: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        _synchronise(device)
        taken[stage].append(time.perf_counter() - begun)

    begun = time.perf_counter()
    for done, samples in enumerate(_fetched(loader, timed), start=1):
        with timed("augment"):
            parameters = loader.parameters(0, samples.ids)
        with timed("render"):
            loader.renderer.submit(samples.pixels, parameters)
            batch = loader.collect(samples)
        with timed("forward"):
            loss = training.forward(batch)
        with timed("backward"):
            training.backward(loss)
        with timed("optimiser"):
            training.optimise(0)
        progress("stage by stage", done, STEPS, "")
        if done == STEPS or (done > 1 and time.perf_counter() - begun > SECONDS):
            break
    return {stage: mean(seconds) for stage, seconds in taken.items()}


def _fetched(loader: Loader, timed: Callable[[str], AbstractContextManager[None]]) -> Iterator[Samples]:
    """The samples of an epoch's batches; a stream's are read, then decoded."""
    store, parts = loader.store, loader.parts(0)
    if not isinstance(store, Stream):
        for ids in parts:
            with timed("fetch"):
                (samples,) = store.fetch([ids])
            yield samples
        return
    encoded = store.encoded(np.concatenate(parts))
    for ids in parts:
        with timed("read"):
            members = list(itertools.islice(encoded, len(ids)))
        with timed("decode"):
            store.decoder.submit([image for image, _, _ in members])
            samples = store.collect(ids, members)
        yield samples


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
