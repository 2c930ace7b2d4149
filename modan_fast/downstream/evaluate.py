"""The evaluation: trains what is missing of the grid (init, protocol, repeat, fold), and writes each result at once."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modan_fast.config import EvaluateConfig, Protocol, to_json
from modan_fast.devices import TYPES, device_name, pick_device, wants_compile
from modan_fast.devices import compute_type as compute_type_of
from modan_fast.downstream import finetune, probe
from modan_fast.downstream.inits import Init, load_inits
from modan_fast.downstream.results import Experiment, Results, auc
from modan_fast.downstream.tasks import (
    FoldRun,
    Leak,
    Task,
    decode,
    leak_counts,
    leaks,
    read_leaks,
    read_task,
    write_folds,
)
from modan_fast.encoders import Encoder
from modan_fast.folder import check_writable, locked, write_text
from modan_fast.run import versions
from shard_builder.settings import Progress, no_progress

log = logging.getLogger(__name__)

Array = NDArray[np.float32]
SHAPING = (  # settings that shape a score
    *("image_size", "epochs", "batch_size", "lr", "probe_lr", "stem", "seed"),
    *("probe_batch_norm", "finetune_head", "model_selection", "sum_filters"),
)
PRECISIONS = {dtype: name for name, dtype in TYPES.items()}


def evaluate(config: EvaluateConfig, progress: Progress = no_progress) -> list[tuple[Experiment, FoldRun]]:
    """Train what is missing of the grid in `config`; return the fold runs that were trained, in order.

    A killed evaluation is continued by the same call, a finished one returns an empty list at once. Raises
    `InputError`, before anything is trained, for bad input and for a results folder made with other settings,
    another task of the same name, or an init whose weights have changed since.
    """
    config = config.resolved()
    check_writable(config.out)
    device = pick_device(config.device)
    compute_type = compute_type_of(config.precision, device)
    folds = config.out / "folds" / config.task.resolve().name
    task = read_task(config.task, folds=folds, seed=config.seed, group=config.group, positive=config.positive)
    inits = load_inits(config, Results.open(config.out).runs["inits"])
    settings = {**{name: getattr(config, name) for name in SHAPING}, "precision": PRECISIONS[compute_type]}
    with locked(config.out, "evaluation"):
        results = Results.open(config.out)
        results.admit(config.recipe, settings, task, {init.name: init.record() for init in inits})
        done = results.finished()
        repeats, numbers = range(1, config.repeats + 1), range(1, len(task.folds) + 1)
        grid = [FoldRun(repeat, fold) for repeat in repeats for fold in numbers]
        todo: dict[Experiment, list[FoldRun]] = {}
        for init in inits:
            for protocol in config.protocol:
                experiment = Experiment(task.name, init.name, config.recipe, protocol)
                if missing := [fold_run for fold_run in grid if (experiment, fold_run) not in done]:
                    todo[experiment] = missing
        if not todo:
            _list_leaks(task, config)
            return []

        results.runs["versions"] = versions()
        results.runs["config"] = to_json(config)
        results.save()
        if task.made:
            write_folds(task, folds)
        _list_leaks(task, config)
        pixels = torch.from_numpy(decode(task, config.image_size, progress)).to(device)
        trainer = Trainer(task, pixels, config, compute_type, results, progress)
        # Deterministic, so that an interrupted evaluation gives the same scores as an uninterrupted one.
        deterministic = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = True
        try:
            by_name = {init.name: init for init in inits}
            for experiment, fold_runs in todo.items():
                trainer.train(experiment, fold_runs, by_name[experiment.init])
        finally:
            torch.backends.cudnn.deterministic = deterministic
        return [(experiment, fold_run) for experiment, fold_runs in todo.items() for fold_run in fold_runs]


class Trainer:
    """Trains the fold runs of an evaluation, with the task's pixels on the device and networks that are reset."""

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
        self.device = timed_device(pixels.device)
        self.compiled = wants_compile(config.compile, pixels.device)
        self.networks: dict[tuple[Any, ...], finetune.TaskNetwork] = {}

    def train(self, experiment: Experiment, fold_runs: Sequence[FoldRun], init: Init) -> None:
        """Train fold runs of an experiment, and write each as soon as it is done."""
        task, config = self.task, self.config
        protocol: Protocol = "probe" if experiment.protocol == "probe" else "finetune"
        done, note, since = 0, "", time.perf_counter()

        def advance(epochs: int) -> None:
            nonlocal done
            done += epochs
            self.progress(f"{init.name} {protocol}", done, len(fold_runs) * config.epochs, note)

        def write(fold_runs: Sequence[FoldRun], scores: Sequence[Array], losses: Sequence[Array]) -> None:
            nonlocal note, since
            self.results.append(experiment, task, fold_runs, scores, losses)
            now = time.perf_counter()
            self.results.add_time(experiment, task, fold_runs, config.epochs, now - since, self.device)
            since = now
            last = fold_runs[-1]
            value = auc(task.labels[task.folds[last.fold - 1].test], scores[-1])
            note = f"repeat {last.repeat} fold {last.fold} AUC {'–' if value is None else f'{value:.3f}'}"

        advance(0)
        if protocol == "probe" and config.probe_batch_norm == "frozen":
            encoder = Encoder(init.stem).to(self.pixels.device).to(memory_format=torch.channels_last)
            # Features of a trained encoder serve all fold runs, those of a random one only its own fold run.
            for block in [[fold_run] for fold_run in fold_runs] if init.given is None else [fold_runs]:
                encoder.load_weights(init.weights(block[0], config.seed))
                features = probe.extract(encoder, self.pixels, self.compute_type)
                heads = [each.numpy() for each in probe.train_heads(features, task, block, config, advance)]
                scores = [
                    row[task.folds[fold_run.fold - 1].test] for fold_run, row in zip(block, heads[0], strict=True)
                ]
                write(block, scores, list(heads[1]))
        else:
            network = self.network(init, protocol)
            for fold_run in fold_runs:
                weights = init.weights(fold_run, config.seed)
                trained = finetune.train(
                    network, weights, self.pixels, task, fold_run, config, self.compute_type, advance
                )
                write([fold_run], *([each.numpy()] for each in trained))
        advance(0)  # shows the last note

    def network(self, init: Init, protocol: Protocol) -> finetune.TaskNetwork:
        """The network for an init; one compiled forward pass serves all inits of the same shape."""
        head = self.config.finetune_head
        linear = head == "linear" or (head == "identity-except-simclr" and init.method == "simclr")
        headless = protocol == "finetune" and not linear
        key = init.stem, protocol, headless
        if key not in self.networks:
            self.networks[key] = finetune.task_network(
                init.stem, protocol, self.pixels.device, headless=headless, compiled=self.compiled
            )
        return self.networks[key]


def timed_device(device: torch.device) -> str:
    """The device in the table of times; a CPU with its number of threads."""
    return device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _list_leaks(task: Task, config: EvaluateConfig) -> None:
    """Warn of test images that share a patient or identical bytes with a training image, and list them in a file."""
    found = leaks(task)
    path = config.out / f"{task.name}-leakage.csv"
    if path.exists() and not task.patients:
        # Leaks by patient were found when `group` named the patients; keep them.
        found += [leak for leak in read_leaks(path) if leak.shared == "patient"]
    if not found:
        path.unlink(missing_ok=True)
        return
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows([Leak._fields, *sorted(found)])
    write_text(path, rows.getvalue())
    log.warning(
        "%s: test images that share a patient or identical bytes with a training image: %s (%s); AUCs may be too high",
        task.name,
        leak_counts(found),
        path,
    )
