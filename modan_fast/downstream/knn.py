"""Weighted votes of the k nearest training images, as DINO counts them; k is chosen on the validation fold.

N images, F features, Q questions, L columns of scores: 2 of a binary task, else one for each class or label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from modan_fast.downstream.labels import Cell
from modan_fast.downstream.results import Trained
from modan_fast.downstream.tasks import Task

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
QUESTIONS = 256  # at once; bounds memory


def judge(
    features_NF: Tensor, task: Task, cells: Sequence[Cell], advance: Callable[[int], None] = lambda count: None
) -> list[Trained]:
    """Score the test images of each cell by the shares of votes, with the k whose shares suit its validation images.

    That is the one with the lowest mean squared error (Brier score), which unlike a cross-entropy is finite where no
    neighbour is of an image's class. Nothing is random. `advance` is called with 1 after each cell.
    """
    features_NF = functional.normalize(features_NF.double(), dim=1)
    targets_NL = _targets(task).to(features_NF)
    trained = []
    for cell in cells:
        train, val, test = (
            torch.from_numpy(rows).to(features_NF.device)
            for rows in (cell.fold.train, cell.fold.val, cell.fold.test)
        )
        counts = [count for count in NEIGHBOURS if count <= len(train)] or [len(train)]
        rows = torch.cat([val, test])
        shares = vote(features_NF[train], targets_NL[train], features_NF[rows], counts)
        errors = [float((each[: len(val)] - targets_NL[val]).square().mean()) for each in shares]
        best = int(np.argmin(errors))
        scores = shares[best][len(val) :].float().cpu().numpy()
        trained.append(
            Trained(scores[:, 1] if task.kind == "binary" else scores, chosen=(counts[best], errors[best]))
        )
        advance(1)
    return trained


def vote(train_NF: Tensor, targets_NL: Tensor, questions_QF: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The shares of votes (Q, L) for each number of neighbours in `counts`; features have the length 1.

    A neighbour's vote weighs exp(cosine / T).
    """
    shares: list[list[Tensor]] = [[] for _ in counts]
    for part in questions_QF.split(QUESTIONS):
        nearest = (part @ train_NF.T).topk(max(counts), dim=1)
        weights = ((nearest.values - 1) / TEMPERATURE).exp()  # - 1 cancels out; no share is 0 / 0
        votes = weights[:, :, None] * targets_NL[nearest.indices]
        for found, count in zip(shares, counts, strict=True):
            found.append(votes[:, :count].sum(1) / weights[:, :count].sum(1, keepdim=True))
    return [torch.cat(found) for found in shares]


def _targets(task: Task) -> Tensor:
    """1 where an image is of a class, or has a label (N, L)."""
    labels = torch.from_numpy(task.labels)
    return labels if task.kind == "multilabel" else functional.one_hot(labels, task.outputs)
