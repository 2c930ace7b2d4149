"""The metrics of a fold run's predictions: ranking, decisions and probabilities, for each kind of task.

Each takes labels and scores of the same images, and returns None for what cannot be computed. The shapes tell the kind
of task: binary has labels (N) of 0 and 1 and scores (N) of the positive class; multiclass has labels (N) of class
indices and scores (N, C); multilabel has labels (N, C) of 0 and 1 and scores (N, C). A metric of several classes or
labels is the mean over them (macro), each against the rest; it is None if it cannot be computed for one of them, so
that a mean over fewer classes never stands beside a mean over all.

The tests compare each with scikit-learn's, whose checks of every small array take 20 times as long as the arithmetic:
minutes for the report of three encoders, three tasks and four protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLD = (
    0.5  # an image counts as positive from this score on; of several classes it has the one that scores most
)
SPECIFICITY = 0.9  # at which the sensitivity is read from the ROC curve
BINS = 15  # of the calibration error

Labels = Sequence[int] | NDArray[np.int64]
Scores = Sequence[float] | NDArray[np.floating[Any]]
Metric = Callable[[NDArray[np.int64], NDArray[np.float64]], float | None]


def auc(labels: Labels, scores: Scores) -> float | None:
    """Area under the ROC curve, in [0, 1]; None if a class is missing or a score is not finite."""
    return _mean(class_aucs(labels, scores))


def class_aucs(labels: Labels, scores: Scores) -> list[float | None]:
    """The AUC of each class against the rest, or of each label; of a binary task the one of the positive class."""

    def of_one(hits: NDArray[np.int64], alarms: NDArray[np.int64]) -> float:
        # Whole numbers until the end: twice the pairs in order.
        pairs = (np.diff(alarms, prepend=0) * (2 * hits - np.diff(hits, prepend=0))).sum()
        return float(pairs / (2 * hits[-1] * alarms[-1]))

    return _each(of_one, labels, scores)


def average_precision(labels: Labels, scores: Scores) -> float | None:
    """Average precision: the mean precision at each positive image, in the order of the scores."""

    def of_one(hits: NDArray[np.int64], alarms: NDArray[np.int64]) -> float:
        return float((np.diff(hits, prepend=0) * hits / (hits + alarms)).sum() / hits[-1])

    return _mean(_each(of_one, labels, scores))


def sensitivity_at_specificity(labels: Labels, scores: Scores) -> float | None:
    """The highest sensitivity of all thresholds with a specificity of at least `SPECIFICITY`, not interpolated."""

    def of_one(hits: NDArray[np.int64], alarms: NDArray[np.int64]) -> float:
        # 1 - 0.9 is a little less than a tenth.
        allowed = alarms <= (1 - SPECIFICITY + 1e-9) * alarms[-1]
        return float(hits[allowed].max(initial=0) / hits[-1])

    return _mean(_each(of_one, labels, scores))


def sensitivity(labels: Labels, scores: Scores) -> float | None:
    """Share of the positive images that are classified as such; None if there are none, or a score is not finite."""
    return _share(labels, scores, positive=True)


def specificity(labels: Labels, scores: Scores) -> float | None:
    """Share of the negative images that are classified as such; None if there are none, or a score is not finite."""
    return _share(labels, scores, positive=False)


def balanced_accuracy(labels: Labels, scores: Scores) -> float | None:
    """The mean over the classes of the share of their images that are classified right; a label has two classes."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    recalled, kept = sensitivity(labels, scores), specificity(labels, scores)
    if scores.ndim == 2 and labels.ndim == 1:
        return recalled
    return None if recalled is None or kept is None else (recalled + kept) / 2


def f1(labels: Labels, scores: Scores) -> float | None:
    """F1 of the positive class, or the mean of the classes' or labels' F1; None if one of them has no image."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if not np.isfinite(scores).all():
        return None
    values: list[float | None] = []
    for truth, decided in _decisions(labels, scores):
        hits = np.count_nonzero(decided[truth == 1])
        images = np.count_nonzero(truth == 1)
        values.append(2 * hits / (images + np.count_nonzero(decided)) if images else None)
    return _mean(values)


def brier(labels: Labels, scores: Scores) -> float | None:
    """Mean squared error of the probabilities; of several classes their sum, in [0, 2]; of labels their mean."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if not _are_probabilities(scores):
        return None
    if scores.ndim == 2 and labels.ndim == 1:
        return float(((scores - (labels[:, None] == np.arange(scores.shape[1]))) ** 2).sum(axis=1).mean())
    return float(((scores - labels) ** 2).mean())


def calibration_error(labels: Labels, scores: Scores) -> float | None:
    """Expected calibration error over `BINS` bins of equal width (Guo et al., ICML 2017).

    The mean over the images of the distance between the mean probability and the share of hits in an image's bin. With
    several classes these are the probability of the class that scores most, and whether it is the right one (top-label
    calibration); else the probability and the label of the positive class, and the mean over the labels.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if not _are_probabilities(scores):
        return None
    errors = []
    for hits, probabilities in confidences(labels, scores):
        counts, hit, expected = reliability(hits, probabilities)
        errors.append(float(np.abs(hit - expected).sum() / counts.sum()))
    return _mean(errors)


def confidences(
    labels: NDArray[np.int64], scores: NDArray[np.floating[Any]]
) -> list[tuple[NDArray[np.bool_], NDArray[np.floating[Any]]]]:
    """What is calibrated, hits and probabilities: of a positive class, of the class that scores most, or each label."""
    if scores.ndim == 2 and labels.ndim == 1:
        return [(scores.argmax(axis=1) == labels, scores.max(axis=1))]
    return [(positive == 1, each) for positive, each in columns_of(labels, scores)]


def reliability(
    hits: NDArray[np.bool_], probabilities: NDArray[np.floating[Any]]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The images in each of `BINS` bins of probability, their hits, and the sum of their probabilities."""
    # A bin has its upper end but not its lower one, and the first has both.
    bins = np.clip(np.ceil(probabilities * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return (
        np.bincount(bins, minlength=BINS),
        np.bincount(bins, hits, minlength=BINS),
        np.bincount(bins, probabilities, minlength=BINS),
    )


METRICS: dict[str, Metric] = {
    "AUC": auc,
    "average precision": average_precision,
    "balanced accuracy": balanced_accuracy,
    "F1": f1,
    "sensitivity at 90 % specificity": sensitivity_at_specificity,
    "sensitivity": sensitivity,
    "specificity": specificity,
    "Brier score": brier,
    "calibration error": calibration_error,
}
"""The metrics by the names that tables give them."""


def columns_of(
    labels: NDArray[Any], scores: NDArray[Any]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Labels of 0 and 1, and scores, of the positive class, of each class against the rest, or of each label."""
    if scores.ndim == 1:
        yield labels, scores
    else:
        for index in range(scores.shape[1]):
            yield (labels == index).astype(np.int64) if labels.ndim == 1 else labels[:, index], scores[:, index]


def _decisions(labels: NDArray[Any], scores: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """As `columns_of`, with whether an image is classified so in place of its score."""
    decided = scores >= THRESHOLD
    if scores.ndim == 2 and labels.ndim == 1:
        decided = scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1])
    return columns_of(labels, decided)


def ranked(
    positive: NDArray[np.int64], scores: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many positive and how many negative images score at least each score that occurs, the highest first."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(positive[order], dtype=np.int64)[last]
    return hits, last + 1 - hits


def _each(metric: Callable[..., float], labels: Labels, scores: Scores) -> list[float | None]:
    """A metric, a function of what `ranked` returns, of each class.

    None where all images or none are of the class, and if a score is not finite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    finite = bool(np.isfinite(scores).all())
    return [
        metric(*ranked(positive, each)) if finite and 0 < np.count_nonzero(positive) < len(positive) else None
        for positive, each in columns_of(labels, scores)
    ]


def _are_probabilities(scores: NDArray[Any]) -> bool:
    return len(scores) > 0 and bool(((scores >= 0) & (scores <= 1)).all())


def _share(labels: Labels, scores: Scores, *, positive: bool) -> float | None:
    """The share of the images with a label, or without it, that are classified so."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if not np.isfinite(scores).all():
        return None
    shares: list[float | None] = []
    for truth, decided in _decisions(labels, scores):
        chosen = (truth == 1) == positive
        shares.append(float((decided[chosen] == positive).mean()) if chosen.any() else None)
    return _mean(shares)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if one of them is."""
    known = [each for each in values if each is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
