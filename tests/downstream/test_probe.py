from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modan_fast.config import EvaluateConfig
from modan_fast.downstream.probe import initial_head, train_heads
from modan_fast.downstream.tasks import FoldRun, Task, read_task

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
    together, losses_together = train_heads(features, task, FOLD_RUNS, CONFIG)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.double(), torch.stack(alone), atol=1e-6, rtol=0)
    torch.testing.assert_close(losses_together, torch.tensor(losses), atol=1e-6, rtol=0)


def test_the_last_epoch_is_judged_where_it_is_asked_for(task: Task) -> None:
    features, fold_runs = weak_features(task), FOLD_RUNS[:5]
    last, _ = train_heads(features, task, fold_runs, replace(CONFIG, model_selection="last-epoch"))
    alone = [train_alone(features, task, fold_run, select=False)[0] for fold_run in fold_runs]
    torch.testing.assert_close(last.double(), torch.stack(alone), atol=1e-6, rtol=0)
    assert not torch.equal(last, train_heads(features, task, fold_runs, CONFIG)[0])


def test_a_heads_scores_do_not_depend_on_the_heads_beside_it(task: Task) -> None:
    features = weak_features(task)
    together, _ = train_heads(features, task, FOLD_RUNS, CONFIG)
    for row, fold_run in enumerate(FOLD_RUNS):
        assert torch.equal(train_heads(features, task, [fold_run], CONFIG)[0][0], together[row])
    assert torch.equal(train_heads(features, task, FOLD_RUNS[7:2:-1], CONFIG)[0], together[3:8].flip(0))


def test_fold_runs_differ_in_their_start_and_order(task: Task) -> None:
    scores, _ = train_heads(weak_features(task), task, FOLD_RUNS, CONFIG)
    assert len({tuple(row.tolist()) for row in scores}) == len(FOLD_RUNS)
