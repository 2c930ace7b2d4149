"""What an epoch reports: its clock, its numbers as text, and the loggers that receive them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from modan_fast.config import LoggerName, PretrainConfig, to_json
from modan_fast.remote import shown_location
from modan_fast.run import EVENTS
from shard_builder.atomic import naming
from shard_builder.settings import InputError

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds between two looks at the loss: reading it makes the host wait for the device

LONGEST_PARAMETER = 500  # characters of a setting that every MLflow takes

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


class TensorBoardLogger:
    """Writes scalars, the settings and the views to event files in a run's folder `tensorboard`.

    Each call appends to the file and closes it: nothing is lost if the run is killed, and no thread prints errors.
    """

    def __init__(self, config: PretrainConfig, epoch: int) -> None:
        """The run continues after `epoch` epochs; what earlier processes wrote of later ones is hidden."""
        folder = config.run / EVENTS
        if folder.is_symlink():  # it may lead anywhere
            folder.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard import summary

        self._summary: Any = summary
        self._write(file_version="brain.Event:2")
        self._write(epoch + 1 if epoch else 0, session_log=SessionLog(status=SessionLog.START))
        self._write(epoch, summary=summary.text("settings", _table(_flat(recorded(config)))))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Logger.log`."""
        for name, value in metrics.items():
            self._write(step, summary=self._summary.scalar(name, value))

    def log_views(self, path: Path) -> None:
        """Show the picture in a PNG file."""
        from PIL import Image

        with Image.open(path) as picture:
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(picture.height, picture.width)
        self._write(0, summary=self._summary.image("views", pixels, dataformats="HW"))

    def close(self) -> None:
        """Nothing is open."""

    def _write(self, step: int = 0, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with self.path.open("ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), step=step, **content).SerializeToString())


class WandbLogger:
    """Logs to Weights & Biases, as its own variables say, such as WANDB_MODE and WANDB_PROJECT.

    A resumed run is a run of its own there, in the same group.
    """

    def __init__(self, config: PretrainConfig, epoch: int) -> None:
        wandb = importlib.import_module("wandb")
        name = config.run.resolve().name
        project = os.environ.get("WANDB_PROJECT", "modan-fast")
        self._image = wandb.Image
        self._run = wandb.init(
            project=project, name=name, group=name, dir=str(config.run), config=recorded(config), save_code=False
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Logger.log`."""
        self._run.log(dict(metrics), step=step)

    def log_views(self, path: Path) -> None:
        """Show the picture in a PNG file."""
        self._run.log({"views": self._image(str(path))}, step=0)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MlflowLogger:
    """Logs to MLflow, as its own variables say, such as MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.

    A resumed run is a run of its own there, with the same name.
    """

    def __init__(self, config: PretrainConfig, epoch: int) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.start_run(run_name=config.run.resolve().name, nested=self._mlflow.active_run() is not None)
        settings = _flat(recorded(config))
        self._mlflow.log_params({name: str(value)[:LONGEST_PARAMETER] for name, value in settings.items()})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Logger.log`."""
        # Names of label fields may hold what MLflow refuses.
        allowed = {re.sub(r"[^\w/. -]", "_", name, flags=re.ASCII): value for name, value in metrics.items()}
        self._mlflow.log_metrics(allowed, step=step)

    def log_views(self, path: Path) -> None:
        """Keep the picture in a PNG file."""
        self._mlflow.log_artifact(str(path))

    def close(self) -> None:
        """End the run there."""
        self._mlflow.end_run()


class LibraryLogger:
    """A logger of another library, whose failure is a warning, once: no server and no full disk stops a training."""

    def __init__(self, name: LoggerName, config: PretrainConfig, epoch: int) -> None:
        self.name, self._failed = name, False
        self._logger: Any = None
        with self._forgiving():
            self._logger = LIBRARIES[name](config, epoch)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Logger.log`."""
        self._call("log", metrics, step)

    def log_views(self, path: Path) -> None:
        """Show the picture in a PNG file."""
        self._call("log_views", path)

    def close(self) -> None:
        """Finish what the library has begun."""
        self._call("close")

    def _call(self, method: str, *values: Any) -> None:
        if self._logger is not None:
            with self._forgiving():
                getattr(self._logger, method)(*values)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a library raises anything
            if not self._failed:
                reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
                log.warning(
                    "%s cannot log (%s): the training goes on, log.jsonl has all numbers", self.name, reason
                )
            self._failed = True


def check_loggers(names: Collection[LoggerName]) -> None:
    """Raise `InputError` if the library of a logger is not installed."""
    for name in names:
        if not _installed(name):
            raise InputError(f"`log={name}` needs {name}: install it with `pip install 'modan-fast[{name}]'`")


def library_loggers(config: PretrainConfig, epoch: int) -> list[LibraryLogger]:
    """Loggers of the libraries that `config.log` names, and of TensorBoard where it is installed.

    The run continues after `epoch` epochs. `check_loggers` comes first.
    """
    return [
        LibraryLogger(name, config, epoch)
        for name in LIBRARIES
        if name in config.log or (name == "tensorboard" and _installed(name))
    ]


def recorded(config: PretrainConfig) -> dict[str, Any]:
    """The settings as others may see them: without passwords in the URL of a shard set."""
    return {**to_json(config), "shards": shown_location(config.shards)}


def _installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as `outer.inner`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        nested = value if isinstance(value, dict) else {}
        found |= {f"{name}.{inner}": each for inner, each in nested.items()} or {name: value}
    return found


def _table(settings: Mapping[str, Any]) -> str:
    """Settings as a table in Markdown."""
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


LIBRARIES: dict[LoggerName, Callable[[PretrainConfig, int], Any]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


def as_text(metrics: Mapping[str, float]) -> str:
    """The metrics of a running epoch as the text beside the progress bar."""
    text = (
        f"loss {metrics['loss']:.3f}  {metrics['views_per_second']:.0f} views/s  "
        f"waiting {metrics['wait_share']:.0%}"
    )
    known = metrics.get("monitor/knn_class")
    return text if known is None else f"{text}  knn {known:.0%}"


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
