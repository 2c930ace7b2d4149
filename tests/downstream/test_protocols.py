"""Logistic regression, nearest neighbours and few labels, beside loops from the formulas and other programs' fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modan_fast.downstream import knn, logistic
from modan_fast.downstream.labels import cells_of
from modan_fast.downstream.tasks import Fold, FoldRun, Kind, Task
from shard_builder.settings import InputError


def synthetic(kind: Kind, images: int = 120, features: int = 20) -> tuple[torch.Tensor, Task]:
    """Features of the size that networks have, and a task whose labels depend on them and on chance."""
    chance = np.random.default_rng(3)
    inputs = chance.normal(size=(images, features)) * chance.uniform(0.1, 9, features) + chance.normal(
        size=features
    )
    hidden = (inputs - inputs.mean(0)) / inputs.std(0) @ chance.normal(size=(features, 3)) / features**0.5
    hidden += chance.normal(size=hidden.shape)
    labels = {"binary": hidden[:, 0] > 0, "multiclass": hidden.argmax(1), "multilabel": hidden > 0.5}[
        kind
    ].astype(int)
    rows = chance.permutation(images)
    fold = Fold(*np.split(rows, [images * 6 // 10, images * 8 // 10]))
    names = tuple(map(str, range(images)))
    classes = ("no", "yes") if kind == "binary" else ("a", "b", "c")
    task = Task(
        *("made", Path(), names, labels, (fold, fold), names, names, (), "yes" * (kind == "binary"), ""),
        kind=kind,
        classes=classes,
    )
    return torch.from_numpy(inputs).float(), task


KINDS = ("binary", "multiclass", "multilabel")


@pytest.mark.parametrize("features", [20, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_logistic_probabilities_are_those_of_scikit_learns_own_pipeline(kind: Kind, features: int) -> None:
    inputs, task = synthetic(kind, features=features)
    fold = task.folds[0]
    whole = inputs.double().numpy()
    found = logistic.probabilities(whole, task, fold.train, fold.test)
    for strength, each in zip(logistic.STRENGTHS, found, strict=True):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-10, max_iter=100_000))
        columns = task.labels.T if kind == "multilabel" else [task.labels]
        fits = [
            model.fit(whole[fold.train], labels[fold.train]).predict_proba(whole[fold.test]) for labels in columns
        ]
        expected = fits[0] if kind == "multiclass" else np.stack([fit[:, 1] for fit in fits], axis=1)
        np.testing.assert_allclose(each, expected, atol=1e-5)


def objective(
    weights: NDArray[np.float64], inputs: NDArray[np.float64], labels: NDArray[np.int64], c: float
) -> float:
    """Half the squared weights plus C times the sum of the cross-entropies, from the formula; c = inf: their mean."""
    classes = 1 if labels.max() == 1 else labels.max() + 1
    table = weights.reshape(classes, -1)
    logits = inputs @ table[:, :-1].T + table[:, -1]
    if classes == 1:
        losses = -log_expit(np.where(labels == 1, logits[:, 0], -logits[:, 0]))
    else:
        losses = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return float(losses.mean() if np.isinf(c) else 0.5 * (table[:, :-1] ** 2).sum() + c * losses.sum())


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_logistic_regression_is_the_minimum_of_its_formula(kind: Kind) -> None:
    inputs, task = synthetic(kind, images=60, features=4)
    fold = task.folds[0]
    whole = inputs.double().numpy()
    scaled = (whole - whole[fold.train].mean(0)) / whole[fold.train].std(0)
    found = logistic.probabilities(whole, task, fold.train, fold.test)
    size = 5 * (1 if kind == "binary" else 3)
    for strength, each in zip(logistic.STRENGTHS, found, strict=True):
        arguments = (scaled[fold.train], task.labels[fold.train], strength)
        table = minimize(objective, np.zeros(size), arguments, tol=1e-10).x.reshape(-1, 5)
        logits = scaled[fold.test] @ table[:, :-1].T + table[:, -1]
        expected = expit(logits) if kind == "binary" else np.exp(log_softmax(logits, axis=1))
        np.testing.assert_allclose(each, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_c_is_chosen_by_the_validation_images_alone(kind: Kind) -> None:
    inputs, task = synthetic(kind)
    cells = cells_of(task, [FoldRun(1, 1)], 0)
    [trained] = logistic.judge(inputs, task, cells)
    fold = task.folds[0]
    found = logistic.probabilities(inputs.double().numpy(), task, fold.train, fold.val)
    truth = task.labels[fold.val]
    if kind == "multiclass":
        losses = [-np.log(each[np.arange(len(truth)), truth]).mean() for each in found]
    else:
        truth = truth.reshape(len(truth), -1)
        losses = [-np.log(np.where(truth == 1, each, 1 - each)).mean() for each in found]
    assert trained.chosen == (logistic.STRENGTHS[int(np.argmin(losses))], pytest.approx(min(losses)))
    assert 0 < int(np.argmin(losses)) < 4, "the choice must matter"
    changed = task.labels.copy()
    changed[fold.test] = 0
    [again] = logistic.judge(inputs, Task(**{**vars(task), "labels": changed}), cells)
    assert np.array_equal(again.scores, trained.scores)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_does_not_depend_on_the_fits_beside_it(kind: Kind) -> None:
    inputs, task = synthetic(kind, features=200)
    cells = cells_of(task, [FoldRun(repeat, 1) for repeat in (1, 2, 3)], 0, count=9)
    for judge in (logistic.judge, knn.judge):
        together = judge(inputs, task, cells)
        for cell, each in zip(cells, together, strict=True):
            [alone] = judge(inputs, task, [cell])
            assert np.array_equal(alone.scores, each.scores)
            assert alone.chosen == each.chosen


def test_a_class_or_label_that_no_training_image_has_is_never_scored() -> None:
    for kind in KINDS:
        inputs, task = synthetic(kind)
        labels, train = task.labels.copy(), task.folds[0].train
        if kind == "multilabel":
            labels[train, 1] = 0
        else:
            labels[train[labels[train] == 1]] = 0
        task = Task(**{**vars(task), "labels": labels})
        for judge in (logistic.judge, knn.judge):
            [trained] = judge(inputs, task, cells_of(task, [FoldRun(1, 1)], 0))
            scores = trained.scores if kind == "binary" else trained.scores[:, 1]
            assert np.array_equal(scores, np.zeros(len(scores)))
            assert np.isfinite(trained.scores).all()


@pytest.mark.parametrize("kind", KINDS)
def test_votes_are_counted_as_a_loop_counts_them(kind: Kind) -> None:
    inputs, task = synthetic(kind)
    fold, whole = task.folds[0], inputs.double().numpy()
    lengths = np.linalg.norm(whole, axis=1)

    def share(row: int, count: int) -> NDArray[np.float64]:
        cosines = whole[fold.train] @ whole[row] / lengths[fold.train] / lengths[row]
        nearest = np.argsort(-cosines)[:count]
        weights = np.exp(cosines[nearest] / 0.07)
        votes = np.zeros(len(task.classes))
        for weight, neighbour in zip(weights, fold.train[nearest], strict=True):
            votes += weight * (
                task.labels[neighbour] if kind == "multilabel" else np.eye(len(votes))[task.labels[neighbour]]
            )
        return votes / weights.sum()

    errors = {}
    for count in (10, 20):  # there are 72 training images
        truth = (
            task.labels[fold.val] if kind == "multilabel" else np.eye(len(task.classes))[task.labels[fold.val]]
        )
        errors[count] = ((np.array([share(row, count) for row in fold.val]) - truth) ** 2).mean()
    best = min(errors, key=errors.__getitem__)
    [trained] = knn.judge(inputs, task, cells_of(task, [FoldRun(1, 1)], 0))
    assert trained.chosen == (best, pytest.approx(errors[best]))
    expected = np.array([share(row, best) for row in fold.test])
    np.testing.assert_allclose(trained.scores, expected[:, 1] if kind == "binary" else expected, atol=1e-6)


def test_votes_are_those_of_scikit_learns_classifier() -> None:
    inputs, task = synthetic("multiclass", images=300)
    fold = task.folds[0]
    unit = torch.nn.functional.normalize(inputs.double(), dim=1)
    train = torch.from_numpy(fold.train)
    targets = torch.nn.functional.one_hot(torch.from_numpy(task.labels[fold.train]), 3).double()
    found = knn.vote(unit[train], targets, unit[fold.test], [10, 100])
    for count, shares in zip((10, 100), found, strict=True):
        model = KNeighborsClassifier(count, metric="cosine", weights=lambda far: np.exp((1 - far) / 0.07))
        model.fit(inputs.double().numpy()[fold.train], task.labels[fold.train])
        np.testing.assert_allclose(shares, model.predict_proba(inputs.double().numpy()[fold.test]), atol=1e-9)


def test_the_lowest_loss_is_zero_where_the_classes_are_separable_and_else_that_of_the_formula() -> None:
    for kind in ("binary", "multiclass"):
        inputs, task = synthetic(kind, images=150, features=4)
        fold, whole = task.folds[0], inputs.double().numpy()
        scaled = (whole - whole[fold.train].mean(0)) / whole[fold.train].std(0)
        arguments = (scaled[fold.train], task.labels[fold.train], np.inf)
        expected = minimize(objective, np.zeros(5 * (1 if kind == "binary" else 3)), arguments, tol=1e-10).fun
        assert expected > 0.1
        assert logistic.lowest_loss(whole, task, fold.train) == pytest.approx(expected, abs=1e-6)
    inputs, task = synthetic("binary", images=150, features=4)
    separable = Task(**{**vars(task), "labels": (inputs[:, 1] > inputs[:, 1].median()).long().numpy()})
    assert logistic.lowest_loss(inputs.double().numpy(), separable, task.folds[0].train) == 0
    inputs, task = synthetic("multilabel", features=200)  # more weights than images
    assert logistic.lowest_loss(inputs.double().numpy(), task, task.folds[0].train) == 0


def test_a_few_labelled_images_of_each_class_are_drawn_from_the_training_images() -> None:
    _, task = synthetic("multiclass", images=300)
    runs = [FoldRun(repeat, fold) for repeat in (1, 2) for fold in (1, 2)]
    drawn = {count: cells_of(task, runs, 0, count) for count in (1, 5, 10, 1000)}
    for count, cells in drawn.items():
        for cell in cells:
            train = task.folds[0].train
            classes = np.bincount(task.labels[cell.fold.train], minlength=3)
            assert classes.tolist() == np.minimum(np.bincount(task.labels[train]), count).tolist()
            assert {*cell.fold.train} <= {*train}
            assert cell.fold.val is task.folds[0].val
            assert cell.fold.test is task.folds[0].test
    for one, five in zip(drawn[1], drawn[5], strict=True):
        assert {*one.fold.train} < {*five.fold.train}
    assert len({tuple(cell.fold.train) for cell in drawn[5]}) == 4, "tries and folds draw other images"
    assert [tuple(cell.fold.train) for cell in cells_of(task, runs, 1, 5)] != [
        tuple(cell.fold.train) for cell in drawn[5]
    ]


def test_few_labels_are_images_with_each_label_and_images_without_any() -> None:
    _, task = synthetic("multilabel", images=300)
    [cell] = cells_of(task, [FoldRun(1, 1)], 0, 4)
    chosen = task.labels[cell.fold.train]
    assert (chosen.sum(0) >= 4).all()
    assert (chosen.sum(1) == 0).sum() == 4
    assert len(chosen) <= 16
    labels = np.ones_like(task.labels)
    with pytest.raises(
        InputError, match="fold 1 of task made has one image to train on: give more with `labels`"
    ):
        # One image has all labels.
        cells_of(Task(**{**vars(task), "labels": labels[:, :1], "classes": ("a",)}), [FoldRun(1, 1)], 0, 1)
