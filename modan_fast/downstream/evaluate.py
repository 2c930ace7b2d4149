"""The evaluation: train the fold runs that a results folder lacks, and record each as soon as it is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modan_fast.config import EvaluateConfig, Protocol, to_json
from modan_fast.devices import TYPES, device_name, pick_device, wants_compile
from modan_fast.devices import compute_type as compute_type_of
from modan_fast.downstream import finetune, leaks, probe
from modan_fast.downstream.inits import Init, load_inits
from modan_fast.downstream.metrics import auc
from modan_fast.downstream.results import Experiment, Results, own_file, own_folder
from modan_fast.downstream.tasks import FoldRun, Task, decode, read_task, write_folds
from modan_fast.encoders import Architecture, Encoder
from modan_fast.folder import check_writable, locked
from modan_fast.run import versions
from shard_builder.settings import Progress, no_progress

log = logging.getLogger(__name__)

PRECISIONS = {dtype: name for name, dtype in TYPES.items()}
SHAPING = (  # the settings, beside the precision, that change scores
    *("image_size", "epochs", "batch_size", "lr", "probe_lr", "encoder", "stem", "seed"),
    *("probe_batch_norm", "finetune_head", "model_selection", "sum_filters"),
)


def evaluate(config: EvaluateConfig, progress: Progress = no_progress) -> list[tuple[Experiment, FoldRun]]:
    """Train the fold runs that the results folder lacks, and return them in the order of training.

    A killed evaluation is continued by the same call; a finished one returns an empty list at once. Raises
    `InputError`, before anything is trained, for bad input and for a results folder made with other settings,
    another task of the same name, or an init whose weights have changed since.
    """
    config = config.resolved()
    check_writable(config.out)
    for name in ("predictions.csv", "curves.csv", "runs.json"):
        own_file(config.out / name)
    device = pick_device(config.device)
    compute_type = compute_type_of(config.precision, device)
    folds = own_folder(own_folder(config.out / "folds") / config.task.resolve().name)
    task = read_task(config.task, folds=folds, seed=config.seed, group=config.group, positive=config.positive)
    inits = load_inits(config, Results.open(config.out).runs["inits"])
    settings = {**{name: getattr(config, name) for name in SHAPING}, "precision": PRECISIONS[compute_type]}
    with locked(config.out, "evaluation"):
        results = Results.open(config.out)
        results.admit(config.recipe, settings, task, {init.name: init.record() for init in inits})
        missing = _missing(config, task, inits, results)
        if missing:
            results.runs["versions"] = versions()
            results.runs["config"] = to_json(config)
            results.save()
            if task.new_folds:
                write_folds(task, folds)
        _list_leaks(task, config.out)
        if not missing:
            return []

        pixels = torch.from_numpy(decode(task, config.image_size, progress)).to(device)
        trainer = FoldRunTrainer(task, pixels, config, compute_type, results, progress)
        # A fold run gives the same scores each time, so it does not matter where an evaluation was interrupted.
        with _deterministic_convolutions():
            for experiment, init, fold_runs in missing:
                trainer.train(experiment, init, fold_runs)
        return [(experiment, fold_run) for experiment, _, fold_runs in missing for fold_run in fold_runs]


def _missing(
    config: EvaluateConfig, task: Task, inits: Sequence[Init], results: Results
) -> list[tuple[Experiment, Init, list[FoldRun]]]:
    """The fold runs that the results lack, by experiment; complete experiments are left out."""
    done = results.finished()
    repeats, folds = range(1, config.repeats + 1), range(1, len(task.folds) + 1)
    wanted = [FoldRun(repeat, fold) for repeat in repeats for fold in folds]
    missing = []
    for init in inits:
        for protocol in config.protocol:
            experiment = Experiment(task.name, init.name, config.recipe, protocol)
            if fold_runs := [fold_run for fold_run in wanted if (experiment, fold_run) not in done]:
                missing.append((experiment, init, fold_runs))
    return missing


def _list_leaks(task: Task, out: Path) -> None:
    """Warn of leaks in the folds, and list them beside the results."""
    path = out / f"{task.name}{leaks.ENDING}"
    if found := leaks.update_leaks(task, path):
        log.warning("%s: %s (%s); AUCs may be too high", task.name, leaks.describe(found), path)


@contextmanager
def _deterministic_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


class Trained(NamedTuple):
    """Fold runs that were trained together: for each, the scores of its test images and the losses of its epochs."""

    fold_runs: Sequence[FoldRun]
    scores: Sequence[NDArray[np.float32]]
    losses: Sequence[NDArray[np.float32]]


class FoldRunTrainer:
    """Trains fold runs. They share the task's pixels, on the device, and the networks, which each of them resets."""

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
        self.compiled = wants_compile(config.compile, pixels.device)
        self.networks: dict[tuple[Architecture, Protocol, bool], finetune.TaskNetwork] = {}

    def train(self, experiment: Experiment, init: Init, fold_runs: Sequence[FoldRun]) -> None:
        """Train the fold runs of an experiment, and record each as soon as it is done."""
        task, epochs = self.task, self.config.epochs
        protocol: Protocol = "probe" if experiment.protocol == "probe" else "finetune"
        device = timed_device(self.pixels.device)
        done, note, begun = 0, "", time.perf_counter()

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(f"{init.name} {protocol}", done, len(fold_runs) * epochs, note)

        advance(0)
        if protocol == "probe" and self.config.probe_batch_norm == "frozen":
            blocks = self._probe_features(init, fold_runs, advance)
        else:
            blocks = self._train_networks(init, protocol, fold_runs, advance)
        for trained in blocks:
            self.results.append(experiment, task, *trained)
            now = time.perf_counter()
            self.results.add_time(experiment, task, trained.fold_runs, epochs, now - begun, device)
            begun = now
            last = trained.fold_runs[-1]
            value = auc(task.labels[task.fold_of(last).test], trained.scores[-1])
            note = f"repeat {last.repeat} fold {last.fold} AUC {'–' if value is None else f'{value:.3f}'}"
        advance(0)  # shows the last note

    def _probe_features(
        self, init: Init, fold_runs: Sequence[FoldRun], advance: Callable[[int], None]
    ) -> Iterator[Trained]:
        """Extract features and train linear heads on them."""
        encoder = Encoder(init.architecture).to(self.pixels.device).to(memory_format=torch.channels_last)
        # The features of given weights serve all fold runs; those of random weights only one.
        blocks = [[fold_run] for fold_run in fold_runs] if init.weights is None else [fold_runs]
        for block in blocks:
            encoder.load_weights(init.weights_for(block[0], self.config.seed))
            features = probe.extract(encoder, self.pixels, self.compute_type)
            scores, losses = probe.train_heads(features, self.task, block, self.config, advance)
            rows = [self.task.fold_of(fold_run).test for fold_run in block]
            tested = [each[test] for each, test in zip(scores.numpy(), rows, strict=True)]
            yield Trained(block, tested, list(losses.numpy()))

    def _train_networks(
        self,
        init: Init,
        protocol: Protocol,
        fold_runs: Sequence[FoldRun],
        advance: Callable[[int], None],
    ) -> Iterator[Trained]:
        """Train encoder and head on the pixels, one fold run after another."""
        network = self._network(init, protocol)
        for fold_run in fold_runs:
            weights = init.weights_for(fold_run, self.config.seed)
            scores, losses = finetune.train(
                network, weights, self.pixels, self.task, fold_run, self.config, self.compute_type, advance
            )
            yield Trained([fold_run], [scores.numpy()], [losses.numpy()])

    def _network(self, init: Init, protocol: Protocol) -> finetune.TaskNetwork:
        """The network for an init; inits of the same shape share one, so that it is compiled once."""
        head = self.config.finetune_head
        linear = head == "linear" or (head == "identity-except-simclr" and init.method == "simclr")
        headless = protocol == "finetune" and not linear
        key = init.architecture, protocol, headless
        if key not in self.networks:
            self.networks[key] = finetune.task_network(
                init.architecture, protocol, self.pixels.device, headless=headless, compiled=self.compiled
            )
        return self.networks[key]


def timed_device(device: torch.device) -> str:
    """The device in the table of times; a CPU with its number of threads."""
    return device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
