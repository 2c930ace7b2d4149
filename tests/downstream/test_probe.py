from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modan_fast.config import EvaluateConfig
from modan_fast.downstream.probe import initial_head, train_heads
from modan_fast.downstream.tasks import Cell, Task, read_task

CONFIG = EvaluateConfig(init=("scratch",), epochs=12, batch_size=8, probe_lr=0.003, seed=5).resolved()
CELLS = [Cell(repeat, fold) for repeat in (1, 2) for fold in (1, 2, 3, 4, 5)]


@pytest.fixture
def task(make_task: Callable[..., Path]) -> Task:
    return read_task(make_task())


def weak_features(task: Task) -> Tensor:
    noise = torch.randn(len(task.images), 512, generator=torch.Generator().manual_seed(0))
    return noise + 0.2 * torch.from_numpy(task.labels)[:, None]


def train_alone(features: Tensor, task: Task, cell: Cell) -> tuple[Tensor, int]:
    """The scores of one head trained as the paper says, by torch's own parts, and its best epoch."""
    fold, labels, inputs = task.folds[cell.fold - 1], torch.from_numpy(task.labels), features.double()
    head = nn.Linear(512, 2).double()
    start = initial_head(cell, CONFIG.seed)
    head.load_state_dict({"weight": start[:, :512], "bias": start[:, 512]})
    assert CONFIG.probe_lr is not None
    optimizer = torch.optim.Adam(head.parameters(), lr=CONFIG.probe_lr)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.1)
    order = cell.generator(CONFIG.seed, "order")
    best, best_loss, best_epoch = head, torch.inf, -1
    for epoch in range(CONFIG.epochs):
        shuffled = torch.from_numpy(fold.train)[torch.randperm(len(fold.train), generator=order)]
        for rows in shuffled.split(CONFIG.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(head(inputs[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
        loss = functional.cross_entropy(head(inputs[fold.val]), labels[fold.val]).item()
        if loss < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(head), loss, epoch
    return torch.softmax(best(inputs), dim=1)[:, 1].detach(), best_epoch


def test_heads_trained_together_equal_heads_trained_one_by_one(task: Task) -> None:
    steps = {-(-len(fold.train) // CONFIG.batch_size) for fold in task.folds}
    assert len(steps) > 1, "the folds must differ in their number of steps"
    features = weak_features(task)
    alone, best_epochs = zip(*(train_alone(features, task, cell) for cell in CELLS), strict=True)
    assert len(set(best_epochs)) > 2, "selection by validation loss must matter"
    together = train_heads(features, task, CELLS, CONFIG)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.double(), torch.stack(alone), atol=1e-6, rtol=0)


def test_a_heads_scores_do_not_depend_on_the_heads_beside_it(task: Task) -> None:
    features = weak_features(task)
    together = train_heads(features, task, CELLS, CONFIG)
    for row, cell in enumerate(CELLS):
        assert torch.equal(train_heads(features, task, [cell], CONFIG)[0], together[row])
    assert torch.equal(train_heads(features, task, CELLS[7:2:-1], CONFIG), together[3:8].flip(0))


def test_cells_differ_in_their_start_and_order(task: Task) -> None:
    scores = train_heads(weak_features(task), task, CELLS, CONFIG)
    assert len({tuple(row.tolist()) for row in scores}) == len(CELLS)
