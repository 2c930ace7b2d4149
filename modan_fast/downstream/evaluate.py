"""The evaluation: every cell of the grid (init, protocol, repeat, fold) is trained once and written at once."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modan_fast import machine, models
from modan_fast.checkpoint import versions
from modan_fast.config import EvaluateConfig, Protocol, to_json
from modan_fast.downstream import finetune, probe
from modan_fast.downstream.inits import Init, load_inits
from modan_fast.downstream.results import Results, Series, auc
from modan_fast.downstream.tasks import (
    Cell,
    Leak,
    Task,
    decode,
    leak_counts,
    leaks,
    read_leaks,
    read_task,
    write_folds,
)
from modan_fast.folder import check_writable, locked
from modan_fast.step import wants_compile
from shard_builder.settings import Progress, no_progress

log = logging.getLogger(__name__)

Array = NDArray[np.float32]
SHAPING = ("image_size", "epochs", "batch_size", "lr", "probe_lr", "stem", "seed")  # settings that shape a score
PRECISIONS = {torch.float32: "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def evaluate(config: EvaluateConfig, progress: Progress = no_progress) -> list[tuple[Series, Cell]]:
    """Train what is missing of the grid that `config` spans; the cells trained, in their order.

    A killed evaluation is continued by the same call, a finished one returns an empty list at once. Raises
    `InputError`, before anything is trained, for bad input and for a results folder made with other settings,
    another task of the same name, or an init whose weights have changed since.
    """
    config = config.resolved()
    check_writable(config.out)
    device = machine.pick_device(config.device)
    compute_type = machine.compute_type(config.precision, device)
    folds = config.out / "folds" / config.task.resolve().name
    task = read_task(config.task, folds=folds, seed=config.seed, group=config.group, positive=config.positive)
    inits = load_inits(config, Results.open(config.out).runs["inits"])
    settings = {**{name: getattr(config, name) for name in SHAPING}, "precision": PRECISIONS[compute_type]}
    with locked(config.out, "evaluation"):
        results = Results.open(config.out)
        results.admit(config.recipe, settings, task, {init.name: init.record() for init in inits})
        done = results.finished()
        repeats, numbers = range(1, config.repeats + 1), range(1, len(task.folds) + 1)
        grid = [Cell(repeat, fold) for repeat in repeats for fold in numbers]
        todo: dict[Series, list[Cell]] = {}
        for init in inits:
            for protocol in config.protocol:
                series = Series(task.name, init.name, config.recipe, protocol)
                if missing := [cell for cell in grid if (series, cell) not in done]:
                    todo[series] = missing
        if not todo:
            _tell_leaks(task, config)
            return []

        results.runs["versions"] = versions()
        results.runs["config"] = to_json(config)
        results.save()
        if task.made:
            write_folds(task, folds)
        _tell_leaks(task, config)
        pixels = torch.from_numpy(decode(task, config.image_size, progress)).to(device)
        grid_of = Grid(task, pixels, config, compute_type, results, progress)
        # A cell gives the same scores each time, so that it does not matter where an evaluation was interrupted.
        deterministic = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = True
        try:
            by_name = {init.name: init for init in inits}
            for series, cells in todo.items():
                grid_of.train(series, cells, by_name[series.init])
        finally:
            torch.backends.cudnn.deterministic = deterministic
        return [(series, cell) for series, cells in todo.items() for cell in cells]


class Grid:
    """What the cells of an evaluation share: the task's pixels on the device, and the networks that they reset."""

    def __init__(
        self,
        task: Task,
        pixels: Tensor,
        config: EvaluateConfig,
        compute_type: torch.dtype,
        results: Results,
        progress: Progress,
    ) -> None:
        self.task, self.pixels, self.config = task, pixels, config
        self.compute_type, self.results, self.progress = compute_type, results, progress
        self.device = device_name(pixels.device)
        self.compiled = wants_compile(config.compile, pixels.device)
        self.trainees: dict[tuple[Any, ...], finetune.Trainee] = {}

    def train(self, series: Series, cells: Sequence[Cell], init: Init) -> None:
        """Train `cells` of a series, and write each as soon as it is done."""
        task, config = self.task, self.config
        protocol: Protocol = "probe" if series.protocol == "probe" else "finetune"
        done, note, since = 0, "", time.perf_counter()

        def tick(epochs: int) -> None:
            nonlocal done
            done += epochs
            self.progress(f"{init.name} {protocol}", done, len(cells) * config.epochs, note)

        def write(cells: Sequence[Cell], scores: Sequence[Array], losses: Sequence[Array]) -> None:
            nonlocal note, since
            self.results.append(series, task, cells, scores, losses)
            now = time.perf_counter()
            self.results.add_time(series, task, cells, config.epochs, now - since, self.device)
            since = now
            last = cells[-1]
            value = auc(task.labels[task.folds[last.fold - 1].test], scores[-1])
            note = f"repeat {last.repeat} fold {last.fold} AUC {'–' if value is None else f'{value:.3f}'}"

        tick(0)
        if protocol == "probe" and config.recipe == "paper":
            encoder = models.encoder(init.stem).to(self.pixels.device).to(memory_format=torch.channels_last)
            # Features of a given encoder serve all cells, those of a fresh one only the cell it was drawn for.
            for block in [[cell] for cell in cells] if init.given is None else [cells]:
                encoder.load_state_dict(init.weights(block[0], config.seed))
                features = probe.extract(encoder, self.pixels, self.compute_type)
                heads = [each.numpy() for each in probe.train_heads(features, task, block, config, tick)]
                scores = [row[task.folds[cell.fold - 1].test] for cell, row in zip(block, heads[0], strict=True)]
                write(block, scores, list(heads[1]))
        else:
            trainee = self.trainee(init, protocol)
            for cell in cells:
                weights = init.weights(cell, config.seed)
                trained = finetune.train(
                    trainee, weights, self.pixels, task, cell, config, self.compute_type, tick
                )
                write([cell], *([each.numpy()] for each in trained))
        tick(0)  # shows the last note

    def trainee(self, init: Init, protocol: Protocol) -> finetune.Trainee:
        """The network that suits an init; one compiled step serves all inits of its shape."""
        # The released code fine-tunes without a head, but for SimCLR's encoder.
        headless = self.config.recipe == "released-code" and protocol == "finetune" and init.method != "simclr"
        key = init.stem, protocol, headless
        if key not in self.trainees:
            self.trainees[key] = finetune.trainee(
                init.stem, protocol, self.pixels.device, headless=headless, compiled=self.compiled
            )
        return self.trainees[key]


def device_name(device: torch.device) -> str:
    """What the times were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _tell_leaks(task: Task, config: EvaluateConfig) -> None:
    """Warn of folds whose test images are given away by train images, and list them beside the results."""
    found = leaks(task)
    path = config.out / f"{task.name}-leakage.csv"
    if path.exists() and not task.patients:
        # Who was told of patients before would miss them now that nothing names them.
        found += [leak for leak in read_leaks(path) if leak.shared == "patient"]
    if not found:
        path.unlink(missing_ok=True)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Leak._fields, *sorted(found)])
    log.warning(
        "%s: test images that an image of their train fold gives away: %s (%s); an AUC may be too high",
        task.name,
        leak_counts(found),
        path,
    )
