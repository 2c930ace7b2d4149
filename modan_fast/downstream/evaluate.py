"""The evaluation: train the fold runs that a results folder lacks, and record each as soon as it is done.

Under torchrun the ranks share the fold runs of each experiment, and rank 0 records what all of them give, in order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from modan_fast.config import EvaluateConfig, Protocol, to_json
from modan_fast.devices import TYPES, device_name, pick_device, wants_compile
from modan_fast.devices import compute_type as compute_type_of
from modan_fast.downstream import finetune, knn, leaks, logistic, probe
from modan_fast.downstream.inits import Init, load_inits
from modan_fast.downstream.labels import Cell, cells_of
from modan_fast.downstream.metrics import auc
from modan_fast.downstream.results import (
    SIDE_FILES,
    Experiment,
    Results,
    Trained,
    own_file,
    own_folder,
    protocol_of,
)
from modan_fast.downstream.subgroups import ENDING
from modan_fast.downstream.tasks import FoldRun, Task, decode, read_task, task_name, write_folds
from modan_fast.encoders import Architecture, Encoder
from modan_fast.folder import check_writable, locked
from modan_fast.ranks import ONE, Ranks, joined
from modan_fast.run import versions
from shard_builder.settings import InputError, Progress, no_progress

log = logging.getLogger(__name__)

PRECISIONS = {dtype: name for name, dtype in TYPES.items()}
SHAPING = (  # the settings, beside the precision, that change scores
    *("image_size", "epochs", "batch_size", "lr", "probe_lr", "encoder", "stem", "seed", "color"),
    *("probe_batch_norm", "finetune_head", "model_selection", "sum_filters"),
)
KEPT_FEATURES = 2**30  # bytes, of the random encoders of `scratch`, for the protocols that share them

Missing = list[tuple[Experiment, str, list[FoldRun]]]
"""The fold runs that the results lack, by experiment and init."""


def evaluate(config: EvaluateConfig, progress: Progress = no_progress) -> list[tuple[Experiment, FoldRun]]:
    """Train the fold runs that the results folder lacks, and return them in the order of training.

    A killed evaluation is continued by the same call; a finished one returns an empty list at once. Under torchrun all
    ranks call it, and only rank 0 writes. Raises `InputError`, before anything is trained, for bad input and for a
    results folder made with other settings, another task of the same name, or an init whose weights have changed since.
    On other ranks than the one where an error was found it is raised as `Ranks.together` says.
    """
    with joined(config.device) as ranks, ExitStack() as held:
        return _evaluate(config.resolved(), ranks, held, progress if ranks.first else no_progress)


def _evaluate(
    config: EvaluateConfig, ranks: Ranks, held: ExitStack, progress: Progress
) -> list[tuple[Experiment, FoldRun]]:
    """`evaluate` on one of the ranks; rank 0 holds the folder's lock by `held`."""
    device = ranks.together(lambda: pick_device(config.device))
    compute_type = compute_type_of(config.precision, device)
    folds, task, inits = ranks.decided(lambda: _read(config))
    results = Results(config.out, {})

    def begin() -> Missing:
        nonlocal results
        held.enter_context(locked(config.out, "evaluation"))
        results = Results.open(config.out)
        settings = {**{name: getattr(config, name) for name in SHAPING}, "precision": PRECISIONS[compute_type]}
        return _begin(config, settings, task, inits, results, folds)

    missing = ranks.decided(begin)
    if not missing:
        return []

    by_name = {init.name: init for init in inits}
    channels = {_channels(config, by_name[name]) for _, name, _ in missing}
    pixels = ranks.together(
        lambda: {
            each: torch.from_numpy(decode(task, config.image_size, progress, channels=each)).to(device)
            for each in sorted(channels)
        }
    )
    trainer = FoldRunTrainer(task, pixels, config, compute_type, results, progress, ranks)
    # A fold run gives the same scores each time, so it does not matter where an evaluation was interrupted.
    with _deterministic_convolutions():
        for experiment, name, fold_runs in missing:
            trainer.train(experiment, by_name[name], fold_runs)
    return [(experiment, fold_run) for experiment, _, fold_runs in missing for fold_run in fold_runs]


def _read(config: EvaluateConfig) -> tuple[Path, Task, list[Init]]:
    """Where the task's folds are kept, the task and the inits; the results folder is looked at before it is locked."""
    check_writable(config.out)
    for name in ("predictions.csv", "runs.json", *SIDE_FILES):
        own_file(config.out / name)
    folds = own_folder(own_folder(config.out / "folds") / task_name(config.task))
    task = read_task(
        config.task,
        folds=folds,
        seed=config.seed,
        group=config.group,
        positive=config.positive,
        words=config.words,
        columns=config.columns,
        subgroup=config.subgroup,
        leave_out=config.leave_out,
    )
    own_file(config.out / f"{task.name}{ENDING}")
    inits = load_inits(config, Results.open(config.out).runs["inits"])
    if task.kind != "binary" and "finetune" in config.protocol and any(_headless(config, init) for init in inits):
        raise InputError(
            f"`finetune_head={config.finetune_head}` is for two classes, and {task.name} has {len(task.classes)} "
            f"{'labels' if task.kind == 'multilabel' else 'classes'}: pass `finetune_head=linear`"
        )
    return folds, task, inits


def _begin(
    config: EvaluateConfig,
    settings: Mapping[str, object],
    task: Task,
    inits: Sequence[Init],
    results: Results,
    folds: Path,
) -> Missing:
    """Compare the call with the open results folder, record it there, and say what is missing."""
    columns = (results.runs["tasks"].get(task.name) or {}).get("subgroups")
    results.admit(config.recipe, settings, task, {init.name: init.record() for init in inits})
    missing = _missing(config, task, inits, results)
    if missing:
        results.runs["versions"] = versions()
        results.runs["config"] = to_json(config)
    if missing or results.runs["tasks"][task.name].get("subgroups") != columns:
        results.save()
    if missing and task.new_folds:
        write_folds(task, folds)
    results.list_images(task)
    _list_leaks(task, config.out)
    return missing


def _missing(config: EvaluateConfig, task: Task, inits: Sequence[Init], results: Results) -> Missing:
    """The fold runs that the results lack, by experiment; complete experiments are left out.

    Where nothing is random, with given weights and all labelled images, there is one repeat: others would be copies.
    """
    done = results.finished()
    missing = []
    for init in inits:
        for protocol in config.protocol:
            for count in (None, *config.labels):
                name: str = protocol if count is None else f"{protocol}:{count}"
                experiment = Experiment(task.name, init.name, config.recipe, name)
                repeats = config.repeats if count is None else config.tries
                if count is None and protocol in ("logistic", "knn") and not init.is_random:
                    repeats = 1
                wanted = [
                    FoldRun(repeat, fold)
                    for repeat in range(1, repeats + 1)
                    for fold in range(1, len(task.folds) + 1)
                ]
                cells_of(task, wanted, config.seed, count)  # raises an error before anything is trained
                if fold_runs := [fold_run for fold_run in wanted if (experiment, fold_run) not in done]:
                    missing.append((experiment, init.name, fold_runs))
    return missing


def _channels(config: EvaluateConfig, init: Init) -> int:
    """The channels of the pixels that an encoder gets; grey ones are repeated inside it."""
    return 3 if config.color and init.architecture.channels == 3 else 1


def _headless(config: EvaluateConfig, init: Init) -> bool:
    """Whether the features are the logits in fine-tuning."""
    head = config.finetune_head
    return head == "identity" or (head == "identity-except-simclr" and init.method != "simclr")


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


class FoldRunTrainer:
    """Trains fold runs. They share the task's pixels, on the device, and the networks, which each of them resets.

    `pixels` are by their number of channels. The features of an init are kept for the protocols that share them.
    """

    def __init__(
        self,
        task: Task,
        pixels: Mapping[int, Tensor],
        config: EvaluateConfig,
        compute_type: torch.dtype,
        results: Results,
        progress: Progress,
        ranks: Ranks = ONE,
    ) -> None:
        self.task, self.pixels, self.config = task, pixels, config
        self.compute_type, self.results, self.progress, self.ranks = compute_type, results, progress, ranks
        self.device = next(iter(pixels.values())).device
        self.compiled = wants_compile(config.compile, self.device)
        self.networks: dict[tuple[Architecture, Protocol, bool], finetune.TaskNetwork] = {}
        self.encoders: dict[Architecture, Encoder] = {}
        self.features: dict[tuple[str, FoldRun | None], tuple[Tensor, float]] = {}
        self.saved = 0.0  # seconds that kept features have saved

    def train(self, experiment: Experiment, init: Init, fold_runs: Sequence[FoldRun]) -> None:
        """Train the fold runs of an experiment, and record each as soon as it is done.

        On several ranks each takes its share of a block, and rank 0 records the block. A block is a fold run a rank;
        heads on one encoder's features are one block.
        """
        protocol, count = protocol_of(experiment.protocol)
        ranks, cells = self.ranks, cells_of(self.task, fold_runs, self.config.seed, count)
        on_pixels = protocol == "finetune" or (protocol == "probe" and self.config.probe_batch_norm == "training")
        together = not on_pixels and not init.is_random
        size = len(cells) if together else ranks.size
        epochs = self.config.epochs if protocol in ("finetune", "probe") else 1
        shown, note, begun, self.saved = 0.0, "", time.perf_counter(), 0.0

        def advance(epochs_done: float) -> None:
            nonlocal shown
            shown += epochs_done
            self.progress(f"{init.name} {experiment.protocol}", round(shown), len(cells) * epochs, note)

        advance(0)
        if together:
            self._features_of(init, None, ranks)
        for start in range(0, len(cells), size):
            block = cells[start : start + size]
            own = block[ranks.rank :: ranks.size]

            def train(own: list[Cell] = own, share: float = len(block) / max(1, len(own))) -> list[Trained]:
                # Other ranks are about as far as this one.
                return self._train(init, protocol, own, on_pixels, lambda count: advance(count * share))

            found = ranks.all(ranks.together(train))
            trained = [found[index % ranks.size][index // ranks.size] for index in range(len(block))]
            seconds = time.perf_counter() - begun
            begun += seconds
            ranks.decided(partial(self._record, experiment, block, trained, epochs, seconds + self.saved))
            self.saved = 0.0
            last = block[-1]
            value = auc(self.task.labels[last.fold.test], trained[-1].scores)
            shown = (start + len(block)) * epochs
            repeat, fold = last.fold_run.repeat, last.fold_run.fold
            note = f"repeat {repeat} fold {fold} AUC {'–' if value is None else f'{value:.3f}'}"
        advance(0)  # shows the last note

    def _record(
        self,
        experiment: Experiment,
        cells: Sequence[Cell],
        trained: Sequence[Trained],
        epochs: int,
        seconds: float,
    ) -> None:
        self.results.append(experiment, self.task, [cell.fold_run for cell in cells], trained)
        images = epochs * sum(len(cell.fold.train) for cell in cells)
        device = timed_device(self.device, self.ranks)
        self.results.add_time(experiment, len(cells), images, epochs, seconds, device)

    def _train(
        self,
        init: Init,
        protocol: Protocol,
        cells: Sequence[Cell],
        on_pixels: bool,
        advance: Callable[[int], None],
    ) -> list[Trained]:
        """Train cells on this rank, whose features are either those of given weights or of one cell's random ones."""
        if not cells:
            return []
        if on_pixels:
            return [self._train_network(init, protocol, cell, advance) for cell in cells]
        features = self._features_of(init, cells[0].fold_run if init.is_random else None)
        if protocol == "probe":
            return self._probe(features, init, cells, advance)
        judge = logistic.judge if protocol == "logistic" else knn.judge
        return judge(features, self.task, cells, advance)

    def _features_of(self, init: Init, fold_run: FoldRun | None, ranks: Ranks = ONE) -> Tensor:
        """The features of all images: of given weights, extracted by all ranks, or of a fold run's random ones."""
        key = init.name, fold_run
        if any(name != init.name for name, _ in self.features):
            self.features.clear()
        if key in self.features:
            features, seconds = self.features[key]
            self.saved += seconds
            return features
        begun = time.perf_counter()
        if init.architecture not in self.encoders:
            self.encoders.clear()
            encoder = Encoder(init.architecture).to(self.device).to(memory_format=torch.channels_last)
            self.encoders[init.architecture] = encoder
        encoder = self.encoders[init.architecture]
        encoder.load_weights(init.weights_for(fold_run or FoldRun(1, 1), self.config.seed))
        features = probe.extract(encoder, self.pixels[_channels(self.config, init)], self.compute_type, ranks)
        kept = sum(each.nbytes for each, _ in self.features.values())
        if fold_run is None or kept + features.nbytes <= KEPT_FEATURES:
            self.features[key] = features, time.perf_counter() - begun
        return features

    def _probe(
        self, features: Tensor, init: Init, cells: Sequence[Cell], advance: Callable[[int], None]
    ) -> list[Trained]:
        """Train linear heads on features, and compare their losses with the lowest possible ones."""
        heads = probe.train_heads(features, self.task, cells, self.config, advance)
        inputs = features.double().cpu().numpy()
        optima: dict[bytes, float] = {}
        trained = []
        for cell, scores, losses, ends in zip(cells, *(each.numpy() for each in heads), strict=True):
            rows = cell.fold.train.tobytes()
            if rows not in optima:
                optima[rows] = logistic.lowest_loss(inputs, self.task, cell.fold.train)
            trained.append(Trained(scores[cell.fold.test], losses, (*ends, optima[rows])))
        return trained

    def _train_network(
        self, init: Init, protocol: Protocol, cell: Cell, advance: Callable[[int], None]
    ) -> Trained:
        """Train encoder and head on the pixels."""
        weights = init.weights_for(cell.fold_run, self.config.seed)
        pixels = self.pixels[_channels(self.config, init)]
        scores, losses = finetune.train(
            self._network(init, protocol),
            weights,
            pixels,
            self.task,
            cell,
            self.config,
            self.compute_type,
            advance,
        )
        return Trained(scores.numpy(), losses.numpy())

    def _network(self, init: Init, protocol: Protocol) -> finetune.TaskNetwork:
        """The network for an init; inits of the same shape share one, so that it is compiled once."""
        headless = protocol == "finetune" and _headless(self.config, init)
        key = init.architecture, protocol, headless
        if key not in self.networks:
            self.networks[key] = finetune.task_network(
                init.architecture,
                protocol,
                self.device,
                outputs=self.task.outputs,
                headless=headless,
                compiled=self.compiled,
            )
        return self.networks[key]


def timed_device(device: torch.device, ranks: Ranks = ONE) -> str:
    """The device in the table of times; a CPU with its number of threads, and how many ranks have one."""
    name = device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return name if ranks.size == 1 else f"{name}, {ranks.size} ranks"
