"""The evaluation: every cell of the grid (init, protocol, repeat, fold) is trained once and written at once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modan_fast import machine, models
from modan_fast.checkpoint import load_encoder, load_imagenet, read_json, versions
from modan_fast.config import EvaluateConfig, Protocol, Stem, to_json
from modan_fast.downstream import finetune, probe
from modan_fast.downstream.results import Results, Series, auc
from modan_fast.downstream.tasks import Cell, Task, decode, read_task
from shard_builder.settings import InputError, Report, silent

SHAPING = ("image_size", "epochs", "batch_size", "lr", "probe_lr", "stem", "seed")  # settings that shape a score
FRESH = ("scratch", "imagenet")  # inits that are no run of ours
PRECISIONS = {torch.float32: "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Init:
    """An encoder to judge; `given` is None for `scratch`, whose weights are drawn anew for each cell."""

    name: str
    stem: Stem
    given: Mapping[str, Tensor] | None = None
    path: Path | None = None
    sha256: str | None = None

    def weights(self, cell: Cell, seed: int) -> Mapping[str, Tensor]:
        """The encoder's state, on the CPU, from which `cell` starts."""
        if self.given is not None:
            return self.given
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(cell.seed(seed, "encoder"))
            return models.encoder(self.stem).state_dict()

    def record(self) -> dict[str, Any]:
        """What runs.json says of it. The stem of `scratch` is one of the recipe's settings there."""
        if self.path is None:
            return {"kind": "scratch"}
        record = {"kind": "encoder", "path": str(self.path), "stem": self.stem, "sha256": self.sha256}
        run = self.path.parent / "config.json"
        return {**record, "shards": read_json(run).get("shards")} if run.is_file() else record


def evaluate(config: EvaluateConfig, report: Report = silent) -> list[tuple[Series, Cell]]:
    """Train what is missing of the grid that `config` spans; the cells trained, in their order.

    A killed evaluation is continued by the same call, a finished one returns an empty list at once. Raises
    `InputError`, before anything is trained, for bad input and for a results folder made with other settings,
    another task of the same name, or an init whose weights have changed since.
    """
    config = config.resolved()
    device = machine.pick_device(config.device)
    compute_type = machine.compute_type(config.precision, device)
    task = read_task(config.task)
    results = Results.open(config.out)
    inits = _inits(config, results.runs["inits"])
    settings = {**{name: getattr(config, name) for name in SHAPING}, "precision": PRECISIONS[compute_type]}
    results.admit(config.recipe, settings, task, {init.name: init.record() for init in inits})
    done = results.finished()
    repeats, folds = range(1, config.repeats + 1), range(1, len(task.folds) + 1)
    grid = [Cell(repeat, fold) for repeat in repeats for fold in folds]
    todo: dict[Series, list[Cell]] = {}
    for init in inits:
        for protocol in config.protocol:
            series = Series(task.name, init.name, config.recipe, protocol)
            if missing := [cell for cell in grid if (series, cell) not in done]:
                todo[series] = missing
    if not todo:
        return []

    results.runs["versions"] = versions()
    results.runs["config"] = to_json(config)
    results.save()
    pixels = torch.from_numpy(decode(task, config.image_size, report)).to(device)
    # A cell gives the same scores each time, so that it does not matter where an evaluation was interrupted.
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        by_name = {init.name: init for init in inits}
        for series, cells in todo.items():
            _train(series, cells, by_name[series.init], task, pixels, config, compute_type, results, report)
    finally:
        torch.backends.cudnn.deterministic = deterministic
    return [(series, cell) for series, cells in todo.items() for cell in cells]


def _train(
    series: Series,
    cells: Sequence[Cell],
    init: Init,
    task: Task,
    pixels: Tensor,
    config: EvaluateConfig,
    compute_type: torch.dtype,
    results: Results,
    report: Report,
) -> None:
    """Train `cells` of a series, and write each as soon as it is done."""
    protocol: Protocol = "probe" if series.protocol == "probe" else "finetune"
    done, note, since = 0, "", time.perf_counter()

    def tick(epochs: int) -> None:
        nonlocal done
        done += epochs
        report(f"{init.name} {protocol}", done, len(cells) * config.epochs, note)

    def write(cells: Sequence[Cell], scores: Sequence[NDArray[np.float32]]) -> None:
        nonlocal note, since
        results.append(series, task, cells, scores)
        now = time.perf_counter()
        results.add_time(series, len(cells), config.epochs, now - since)
        since = now
        last = cells[-1]
        value = auc(task.labels[task.folds[last.fold - 1].test], scores[-1])
        note = f"repeat {last.repeat} fold {last.fold} AUC {'–' if value is None else f'{value:.3f}'}"

    tick(0)
    encoder = models.encoder(init.stem)
    if protocol == "probe" and config.recipe == "paper":
        encoder.to(pixels.device).to(memory_format=torch.channels_last)
        # Features of a given encoder serve all cells, those of a fresh one only the cell it was drawn for.
        for block in [[cell] for cell in cells] if init.given is None else [cells]:
            encoder.load_state_dict(init.weights(block[0], config.seed))
            features = probe.extract(encoder, pixels, compute_type)
            scores = probe.train_heads(features, task, block, config, tick).cpu().numpy()
            write(block, [scores[row, task.folds[cell.fold - 1].test] for row, cell in enumerate(block)])
    else:
        network = finetune.network_for(encoder, config, protocol, pixels.device)
        for cell in cells:
            weights = init.weights(cell, config.seed)
            tested = finetune.train(network, weights, pixels, task, cell, config, protocol, compute_type, tick)
            write([cell], [tested.numpy()])
    tick(0)  # shows the last note


def _inits(config: EvaluateConfig, known: Mapping[str, Any]) -> list[Init]:
    """The inits of `config`, loaded. One is named as its folder or, where that name is taken, as it was given."""
    assert config.stem is not None
    paths = {text: _encoder_file(text) for text in config.init if text not in FRESH}
    digests = {text: hashlib.sha256(path.read_bytes()).hexdigest() for text, path in paths.items()}
    inits: dict[str, Init] = {}
    for text in config.init:
        if text == "scratch":
            inits[text] = Init(text, config.stem)
            continue
        if text == "imagenet":
            inits[text] = _imagenet(config)
            continue
        path, sha256, name = paths[text], digests[text], _short_name(paths[text])
        if name in known:
            # The same file with other weights keeps its name, to be refused under it.
            taken = known[name].get("sha256") != sha256 and known[name].get("path") != str(path)
        else:
            taken = any(_short_name(paths[other]) == name and digests[other] != sha256 for other in paths)
        if taken or name in FRESH:
            name = text
        encoder = load_encoder(path)
        if encoder.conv1.in_channels != 1:
            raise InputError(f"{path} takes {encoder.conv1.in_channels} channels, the images of a task have 1")
        stem = models.stem_of(encoder.conv1.weight)
        assert stem is not None
        inits[name] = Init(name, stem, encoder.state_dict(), path, sha256)
    return list(inits.values())


def _imagenet(config: EvaluateConfig) -> Init:
    """The init `imagenet`; what its stem has at random is drawn from the seed, and so the same in all cells."""
    assert config.stem is not None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        encoder = load_imagenet(config.imagenet_weights, config.stem, sum_filters=config.recipe == "paper")
    state = encoder.state_dict()
    digest = hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()
    return Init("imagenet", config.stem, state, config.imagenet_weights or Path("torchvision"), digest)


def _encoder_file(text: str) -> Path:
    """The file, as an absolute path, that holds the weights of a run folder or is itself named."""
    path = Path(text).resolve()
    path = path / "encoder.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no encoder at {path}: name a run folder of `modan-fast pretrain`, scratch or imagenet")
    return path


def _short_name(path: Path) -> str:
    """`mulsupcon` for mulsupcon/encoder.safetensors, `mulsupcon/encoder-0200` for another file beside it."""
    return path.parent.name if path.stem == "encoder" else f"{path.parent.name}/{path.stem}"
