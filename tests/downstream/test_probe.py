from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from modan_fast.config import EvaluateConfig
from modan_fast.downstream.labels import cells_of
from modan_fast.downstream.probe import initial_head, train_heads
from modan_fast.downstream.tasks import FoldRun, Kind, Task, read_task

CONFIG = EvaluateConfig(init=("scratch",), epochs=12, batch_size=8, probe_lr=0.003, seed=5).resolved()
FOLD_RUNS = [FoldRun(repeat, fold) for repeat in (1, 2) for fold in (1, 2, 3, 4, 5)]


@pytest.fixture
def task(make_task: Callable[..., Path]) -> Task:
    return read_task(make_task())


def weak_features(task: Task) -> Tensor:
    noise = torch.randn(len(task.images), 512, generator=torch.Generator().manual_seed(0))
    return noise + 0.2 * torch.from_numpy(task.labels)[:, None]


def train_alone(
    features: Tensor, task: Task, fold_run: FoldRun, select: bool = True
) -> tuple[Tensor, list[float]]:
    """The scores of one head that torch's own classes train, and its validation losses.

    The head is that of the lowest validation loss, or without `select` the last one.
    """
    fold, labels, inputs = task.fold_of(fold_run), torch.from_numpy(task.labels), features.double()
    head = nn.Linear(512, 2).double()
    start = initial_head(fold_run, CONFIG.seed, 512)
    head.load_state_dict({"weight": start[:, :512], "bias": start[:, 512]})
    assert CONFIG.probe_lr is not None
    optimizer = torch.optim.Adam(head.parameters(), lr=CONFIG.probe_lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
    order = fold_run.generator(CONFIG.seed, "order")
    best, losses = head, [torch.inf]
    for _ in range(CONFIG.epochs):
        shuffled = torch.from_numpy(fold.train)[torch.randperm(len(fold.train), generator=order)]
        for rows in shuffled.split(CONFIG.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(head(inputs[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
        loss = functional.cross_entropy(head(inputs[fold.val]), labels[fold.val]).item()
        if loss < min(losses) or not select:
            best = copy.deepcopy(head)
        losses.append(loss)
    return torch.softmax(best(inputs), dim=1)[:, 1].detach(), losses[1:]


def test_heads_trained_together_equal_heads_trained_one_by_one(task: Task) -> None:
    steps = {-(-len(fold.train) // CONFIG.batch_size) for fold in task.folds}
    assert len(steps) > 1, "the folds must differ in their number of steps"
    features = weak_features(task)
    alone, losses = zip(*(train_alone(features, task, fold_run) for fold_run in FOLD_RUNS), strict=True)
    assert len({each.index(min(each)) for each in losses}) > 2, "selection by validation loss must matter"
    together, losses_together, _ = train_heads(features, task, cells_of(task, FOLD_RUNS, 5), CONFIG)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.double(), torch.stack(alone), atol=1e-6, rtol=0)
    torch.testing.assert_close(losses_together, torch.tensor(losses), atol=1e-6, rtol=0)


def test_the_last_epoch_is_judged_where_it_is_asked_for(task: Task) -> None:
    features, fold_runs = weak_features(task), FOLD_RUNS[:5]
    cells = cells_of(task, fold_runs, 5)
    last = train_heads(features, task, cells, replace(CONFIG, model_selection="last-epoch")).scores
    alone = [train_alone(features, task, fold_run, select=False)[0] for fold_run in fold_runs]
    torch.testing.assert_close(last.double(), torch.stack(alone), atol=1e-6, rtol=0)
    assert not torch.equal(last, train_heads(features, task, cells, CONFIG)[0])


def test_a_heads_scores_do_not_depend_on_the_heads_beside_it(task: Task) -> None:
    features = weak_features(task)
    cells = cells_of(task, FOLD_RUNS, 5)
    together = train_heads(features, task, cells, CONFIG)
    for row, cell in enumerate(cells):
        for alone, whole in zip(train_heads(features, task, [cell], CONFIG), together, strict=True):
            assert torch.equal(alone[0], whole[row])
    assert torch.equal(train_heads(features, task, cells[7:2:-1], CONFIG).scores, together.scores[3:8].flip(0))


def test_fold_runs_differ_in_their_start_and_order(task: Task) -> None:
    scores = train_heads(weak_features(task), task, cells_of(task, FOLD_RUNS, 5), CONFIG).scores
    assert len({tuple(row.tolist()) for row in scores}) == len(FOLD_RUNS)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_heads_of_several_classes_or_labels_equal_torchs_own(task: Task, kind: Kind) -> None:
    chance = np.random.default_rng(1)
    labels = chance.integers(0, 3, 43) if kind == "multiclass" else chance.integers(0, 2, (43, 3))
    task = replace(task, kind=kind, labels=labels, classes=("a", "b", "c"))
    features = torch.randn(43, 16, generator=torch.Generator().manual_seed(0))
    truth = torch.from_numpy(labels)
    cells = cells_of(task, FOLD_RUNS, 5)
    together = train_heads(features, task, cells, CONFIG)
    assert together.scores.shape == (10, 43, 3)

    def loss_of(head: nn.Linear, rows: NDArray[np.int64]) -> Tensor:
        logits = head(features[rows].double())
        if kind == "multiclass":
            return functional.cross_entropy(logits, truth[rows])
        return functional.binary_cross_entropy_with_logits(logits, truth[rows].double())

    for row, (fold_run, fold) in enumerate(cells):
        head = nn.Linear(16, 3).double()
        start = initial_head(fold_run, CONFIG.seed, 16, 3)
        head.load_state_dict({"weight": start[:, :16], "bias": start[:, 16]})
        optimizer = torch.optim.Adam(head.parameters(), lr=0.003)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
        order = fold_run.generator(CONFIG.seed, "order")
        best, losses, ends = head, [torch.inf], []
        for _ in range(CONFIG.epochs):
            shuffled = torch.from_numpy(fold.train)[torch.randperm(len(fold.train), generator=order)]
            for rows in shuffled.split(CONFIG.batch_size):
                optimizer.zero_grad()
                loss_of(head, rows.numpy()).backward()
                optimizer.step()
            schedule.step()
            loss = loss_of(head, fold.val).item()
            best = copy.deepcopy(head) if loss < min(losses) else best
            losses.append(loss)
            ends.append(loss_of(head, fold.train).item())
        logits = best(features.double()).detach()
        expected = torch.softmax(logits, 1) if kind == "multiclass" else torch.sigmoid(logits)
        torch.testing.assert_close(together.scores[row].double(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(together.losses[row], torch.tensor(losses[1:]), atol=1e-6, rtol=0)
        torch.testing.assert_close(together.ends[row], torch.tensor(ends[:-3:-1]), atol=1e-6, rtol=0)


def test_the_losses_of_the_training_images_are_those_of_the_last_two_epochs(task: Task) -> None:
    features, cells = weak_features(task), cells_of(task, FOLD_RUNS[:2], 5)
    settings = replace(CONFIG, epochs=1)
    first, both = (train_heads(features, task, cells, replace(settings, epochs=each)) for each in (1, 2))
    assert torch.equal(first.ends[:, 0], both.ends[:, 1])
    start = initial_head(cells[0].fold_run, CONFIG.seed, 512)
    rows = cells[0].fold.train
    logits = functional.pad(features[rows], (0, 1), value=1.0).double() @ start.double().T
    assert first.ends[0, 1] == pytest.approx(
        functional.cross_entropy(logits, torch.from_numpy(task.labels[rows]))
    )
