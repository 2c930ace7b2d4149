"""L2 logistic regression to convergence on frozen features; and the lowest loss that a linear probe could reach.

N images, F features, L columns of scores: 1 of a binary task, else one for each class or label.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from modan_fast.downstream.labels import Cell
from modan_fast.downstream.results import Trained
from modan_fast.downstream.tasks import Task

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # C of scikit-learn: a larger one shrinks less
TOLERANCE, MOST_STEPS = 1e-8, 20_000  # with scikit-learn's tolerance of 1e-4, probabilities were off by 0.1
SMALLEST = 1e-12  # probability in a loss

Floats = NDArray[np.float64]


def judge(
    features_NF: Tensor, task: Task, cells: Sequence[Cell], advance: Callable[[int], None] = lambda count: None
) -> list[Trained]:
    """Fit each cell's training images, choose C by the loss of its validation images, and score its test images.

    Features are standardised by the training images. Nothing is random: equal features and images give equal bytes,
    whatever is fitted beside them. `advance` is called with 1 after each cell.
    """
    features = features_NF.double().cpu().numpy()
    trained = []
    with _one_thread_a_fit(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for each in pool.map(lambda cell: _judge_one(features, task, cell), cells):
            trained.append(each)
            advance(1)
    return trained


def probabilities(
    features_NF: Floats, task: Task, train: NDArray[np.int64], rows: NDArray[np.int64]
) -> list[Floats]:
    """The probabilities (len(rows), L), for each of `STRENGTHS`, by fits of the images `train`.

    A class that has no training image gets 0; a class that all of them have, or a label, gets 1.
    """
    inputs, others = _standardised(features_NF, train, rows)
    if len(train) < inputs.shape[1]:
        # The weights lie in the space of the training images, so the fit is the same in its coordinates.
        basis = np.linalg.qr(inputs.T)[0]
        inputs, others = inputs @ basis, others @ basis
    if task.kind == "multiclass":
        return _path(inputs, task.labels[train], others, task.outputs, "lbfgs")
    columns = [
        _path(inputs, labels, others, 2, "newton-cholesky") for labels in np.atleast_2d(task.labels[train].T)
    ]
    return [np.stack([each[:, 1] for each in strength], axis=1) for strength in zip(*columns, strict=True)]


def lowest_loss(features_NF: Floats, task: Task, train: NDArray[np.int64]) -> float:
    """The infimum of the mean cross-entropy of linear classifiers without a penalty: 0 if the classes are separable."""
    inputs, _ = _standardised(features_NF, train, train[:0])
    left, sizes, _ = np.linalg.svd(inputs, full_matrices=False)
    basis = left[:, sizes > 1e-10 * max(sizes.max(initial=0), 1e-300)] * len(train) ** 0.5
    labels = task.labels[train]
    with _one_thread_a_fit():
        losses = [_lowest(basis, each) for each in (labels.T if labels.ndim == 2 else [labels])]
    return float(np.mean(losses))


def targets_of(task: Task, rows: NDArray[np.int64]) -> Floats:
    """What probabilities (n, L) are compared with: 1 for an image's class, or for each of its labels."""
    labels = task.labels[rows]
    if task.kind == "multiclass":
        return np.eye(task.outputs)[labels]
    return labels.reshape(len(rows), -1).astype(np.float64)


def _judge_one(features_NF: Floats, task: Task, cell: Cell) -> Trained:
    fold = cell.fold
    found = probabilities(features_NF, task, fold.train, np.concatenate([fold.val, fold.test]))
    truth = targets_of(task, fold.val)
    losses = [_cross_entropy(each[: len(fold.val)], truth, task) for each in found]
    best = int(np.argmin(losses))
    scores = found[best][len(fold.val) :].astype(np.float32)
    return Trained(scores[:, 0] if task.kind == "binary" else scores, chosen=(STRENGTHS[best], losses[best]))


def _cross_entropy(found: Floats, truth: Floats, task: Task) -> float:
    """The mean cross-entropy of probabilities, over images and labels."""
    if task.kind == "multiclass":
        return float(-np.log(np.maximum((found * truth).sum(1), SMALLEST)).mean())
    return float(-np.log(np.maximum(np.where(truth == 1, found, 1 - found), SMALLEST)).mean())


def _standardised(
    features_NF: Floats, train: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """The features of the images `train` with mean 0 and deviation 1, and those of `rows` in the same way."""
    scaler = StandardScaler().fit(features_NF[train])
    others = scaler.transform(features_NF[rows]) if len(rows) else features_NF[rows]
    return scaler.transform(features_NF[train]), others


def _path(inputs: Floats, labels: NDArray[np.int64], others: Floats, classes: int, solver: str) -> list[Floats]:
    """The probabilities of `classes` for each of `STRENGTHS`; each fit starts from the one before."""
    present = np.unique(labels)
    if len(present) == 1:
        certain = np.zeros((len(others), classes))
        certain[:, present] = 1
        return [certain] * len(STRENGTHS)
    model = LogisticRegression(solver=solver, tol=TOLERANCE, max_iter=MOST_STEPS, warm_start=True)
    path = []
    for strength in STRENGTHS:
        model.set_params(C=strength).fit(inputs, labels)
        found = np.zeros((len(others), classes))
        if len(others):
            found[:, present] = model.predict_proba(others)
        path.append(found)
    return path


def _lowest(basis: Floats, labels: NDArray[np.int64]) -> float:
    """The infimum of the mean cross-entropy for inputs of orthogonal columns, in which few steps are needed."""
    images, rank = basis.shape
    if rank >= images - 1 or len(np.unique(labels)) == 1:  # as many weights as images fit any labels
        return 0.0
    model = LogisticRegression(C=np.inf, tol=TOLERANCE, max_iter=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # where classes are separable there is no optimum
        found = model.fit(basis, labels).predict_proba(basis)
    right = found[np.arange(images), np.searchsorted(model.classes_, labels)]
    others = found.copy()
    others[np.arange(images), np.searchsorted(model.classes_, labels)] = -1
    if (right > others.max(axis=1)).all():  # larger weights then bring the loss as near to 0 as one likes
        return 0.0
    return float(-np.log(np.maximum(right, SMALLEST)).mean())


@contextmanager
def _one_thread_a_fit() -> Iterator[None]:
    """Threads of BLAS on matrices this small wait for one another: two took twenty times as long as one."""
    with threadpool_limits(1, user_api="blas"):
        yield
