"""What an epoch reports: its clock, its numbers as text, and the loggers that receive them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from shard_builder.atomic import naming

LOOK_EVERY = 1.0  # seconds between two looks at the loss: reading it makes the host wait for the device

Item = TypeVar("Item")


class Logger(Protocol):
    """Receives the metrics of a run; pass your own to `pretrain`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the numbers, by name, after `step` epochs."""


class JsonlLogger:
    """Appends one JSON object a call to a file: `{"epoch": step, name: number, …}`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Logger.log`."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": step, **metrics}) + "\n")


def as_text(metrics: Mapping[str, float]) -> str:
    """The metrics of a running epoch as the text beside the progress bar."""
    return (
        f"loss {metrics['loss']:.3f}  {metrics['views_per_second']:.0f} views/s  "
        f"waiting {metrics['wait_share']:.0%}"
    )


class EpochClock:
    """Times an epoch, and how long the device waited for data in it.

    A CPU waits while the loader's `next` runs. A GPU gets its work ahead of time, so its waiting is the time between
    the end of one step and the moment the next views are ready, measured by its own events.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0, waited: float = 0.0) -> None:
        """`seconds` have already passed in the epoch, `waited` of them waiting for data."""
        self._cuda = device.type == "cuda"
        self._looked = time.perf_counter()
        self._begun = self._looked - seconds
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waited = waited

    def watch(self, batches: Iterator[Item]) -> Iterator[Item]:
        """The batches; every wait for one of them is timed."""
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
        """True at most once per `LOOK_EVERY` seconds."""
        now = time.perf_counter()
        if due := now - self._looked >= LOOK_EVERY:
            self._looked = now
        return due

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the epoch began."""
        return time.perf_counter() - self._begun

    @property
    def waited(self) -> float:
        """Seconds of the epoch so far spent waiting for data; on a GPU this synchronises with the last event."""
        if self._waits:
            self._waits[-1][1].synchronize()
            self._waited += sum(begun.elapsed_time(ended) for begun, ended in self._waits) / 1000
            self._waits.clear()
        return self._waited

    @property
    def wait_share(self) -> float:
        """`waited` as a share of the epoch so far."""
        return self.waited / self.seconds
