"""How a mean fold AUC would vary with other patients: a bootstrap of patients, and DeLong's variance.

Folds are judged by different networks, whose scores have different scales. So images are ranked within their fold and
repeat only, and what is resampled is the number of the tables: the mean over repeats and folds (and classes) of the
AUC. The networks stay as they are: neither method trains them again.

R repeats, n images of a fold, C classes, P patients (or images, where no patient is named), B resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from modan_fast.downstream.predictions import Outcome
from modan_fast.downstream.tasks import FoldRun

CONFIDENCE = 0.95
RESAMPLES = 2000
MOST_RESAMPLED = (
    5000  # test images; with more, DeLong's interval is the same to three decimals, and fits the memory
)
MOST_LOST = 0.1  # of the resamples may lack a class
CHUNK = 2**22  # pairs of images at once

Interval = tuple[float, float]


class FoldScores(NamedTuple):
    """A fold's test images: `patients` (n) int64 in [0, P), `labels` (n) or (n, C), `scores` (R, n) or (R, n, C)."""

    patients: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]


def scores_of_folds(
    fold_runs: Mapping[FoldRun, Outcome], repeats: Sequence[int], number_of: Mapping[str, int]
) -> list[FoldScores] | None:
    """The folds of an experiment in some repeats; `number_of` has the patient of each image.

    None without repeats, if a fold's images are not the same in each, and if a score is not finite.
    """
    folds = []
    for fold in sorted({fold_run.fold for fold_run in fold_runs}):
        outcomes = [fold_runs[FoldRun(repeat, fold)] for repeat in repeats if FoldRun(repeat, fold) in fold_runs]
        if not repeats or len(outcomes) < len(repeats):
            return None
        first = outcomes[0]
        if any(each.images != first.images or not np.array_equal(each.labels, first.labels) for each in outcomes):
            return None
        patients = np.array([number_of[image] for image in first.images], np.int64)
        folds.append(FoldScores(patients, first.labels, np.stack([each.scores for each in outcomes])))
    return folds if folds and all(np.isfinite(fold.scores).all() for fold in folds) else None


def draw(folds: Sequence[NDArray[np.int64]], patients: int) -> NDArray[np.float32] | None:
    """How often each patient is in each resample, (B, P) float32, always the same; None for too many images.

    `folds` are the patients of each fold's test images. Patients are drawn within their fold; if one of them is tested
    in several folds, from all.
    """
    if not patients or sum(map(len, folds)) > MOST_RESAMPLED:
        return None
    strata = [np.unique(each) for each in folds if len(each)]
    everybody = np.unique(np.concatenate(strata))
    if sum(map(len, strata)) > len(everybody):
        strata = [everybody]
    generator = np.random.default_rng(0)
    counts = np.zeros((RESAMPLES, patients), np.float32)
    for each in strata:
        counts[:, each] = generator.multinomial(len(each), np.full(len(each), 1 / len(each)), RESAMPLES)
    return counts


def resampled_aucs(folds: Sequence[FoldScores], counts: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mean AUC over repeats, folds and classes in each resample, (B); NaN where a class is missing."""
    total, terms = np.zeros(len(counts)), 0
    for fold in folds:
        weights = counts[:, fold.patients]
        for positive, scores in _classes(fold):
            total += _weighted_auc(positive, scores, weights)
            terms += 1
    return total / terms


def _weighted_auc(
    positive: NDArray[np.bool_], scores: NDArray[np.float64], weights: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The AUC, averaged over repeats, (B), if each image counts as often as `weights` (B, n) say.

    The weights are the same in each repeat, so the pairs that are in order are counted over all repeats first.
    """
    above, below = scores[:, positive], scores[:, ~positive]
    upper, lower = weights[:, positive], weights[:, ~positive]
    won = np.zeros(len(weights))
    step = max(1, CHUNK // max(1, below.shape[1]))
    for start in range(0, above.shape[1], step):
        # Twice the pairs in order, ties once: whole numbers, which float32 multiplies without an error here.
        pairs = np.zeros((above[:, start : start + step].shape[1], below.shape[1]), np.float32)
        for high, low in zip(above[:, start : start + step], below, strict=True):
            pairs += (high[:, None] > low).astype(np.float32) + (high[:, None] >= low)
        won += ((upper[:, start : start + step] @ pairs) * lower).sum(axis=1, dtype=np.float64)
    total = upper.sum(axis=1, dtype=np.float64) * lower.sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a class is missing
        return won / (2 * len(scores) * total)


def percentiles(values: NDArray[np.float64]) -> Interval | None:
    """The middle 95 % of the resamples that have all classes; None if over `MOST_LOST` of them do not."""
    known = values[np.isfinite(values)]
    if len(known) < (1 - MOST_LOST) * len(values):
        return None
    low, high = np.quantile(known, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


class DeLong(NamedTuple):
    """A mean AUC, or a difference of two, with its standard error."""

    value: float
    error: float

    def interval(self, least: float = 0.0) -> Interval:
        """The normal 95 % interval, clipped to [least, 1]."""
        half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * self.error
        return max(least, self.value - half), min(1.0, self.value + half)

    def p_value(self) -> float | None:
        """Two-sided, of the hypothesis that the value is 0; None without an error."""
        return float(2 * stats.norm.sf(abs(self.value) / self.error)) if self.error else None


def delong(folds: Sequence[FoldScores], others: Sequence[FoldScores] | None = None) -> DeLong | None:
    """DeLong's variance of a mean AUC, or of its difference to that of `others` on the same images.

    Of one fold, one repeat and two classes it is that of DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988); with
    several images of a patient that of Obuchowski (Biometrics 53, 1997). A mean over repeats, folds and classes is
    linear in the same components, so they are averaged, too. None if a class has images of fewer than two patients.
    """
    patients = 1 + max((int(fold.patients.max(initial=-1)) for fold in folds), default=-1)
    scaled, plain = np.zeros((2, patients)), np.zeros((2, patients))
    values = []
    for number, fold in enumerate(folds):
        theirs = None if others is None else list(_classes(others[number]))
        for index, (positive, scores) in enumerate(_classes(fold)):
            components = _placements(positive, scores)
            if components is not None and theirs is not None:
                subtracted = _placements(*theirs[index])
                components = None if subtracted is None else components - subtracted
            if components is None:
                return None
            values.append(components[positive].mean())
            for side, chosen in enumerate((positive, ~positive)):
                whose = fold.patients[chosen]
                clusters = len(np.unique(whose))
                if clusters < 2:
                    return None
                deviations = (components[chosen] - components[chosen].mean()) / len(whose)
                each = np.bincount(whose, deviations, minlength=patients)
                plain[side] += each
                scaled[side] += each * (clusters / (clusters - 1)) ** 0.5
    if not values:
        return None
    everybody = len(np.unique(np.concatenate([fold.patients for fold in folds])))
    both = 2 * everybody / (everybody - 1) * (plain[0] @ plain[1])
    variance = max(0.0, float((scaled**2).sum() + both)) / len(values) ** 2
    return DeLong(float(np.mean(values)), variance**0.5)


def _placements(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Of each image (n) the share of the other class that is on the right side of it, averaged over repeats."""
    above, below = np.count_nonzero(positive), np.count_nonzero(~positive)
    if not above or not below:
        return None
    placed = np.empty(scores.shape)
    ranks = stats.rankdata(scores, axis=1)
    placed[:, positive] = (ranks[:, positive] - stats.rankdata(scores[:, positive], axis=1)) / below
    placed[:, ~positive] = 1 - (ranks[:, ~positive] - stats.rankdata(scores[:, ~positive], axis=1)) / above
    return placed.mean(axis=0)


def _classes(fold: FoldScores) -> Iterator[tuple[NDArray[np.bool_], NDArray[Any]]]:
    """Of the positive class, of each class or of each label: which images have it, and their scores (R, n)."""
    if fold.scores.ndim == 2:
        yield fold.labels == 1, fold.scores
    else:
        for index in range(fold.scores.shape[2]):
            positive = fold.labels == index if fold.labels.ndim == 1 else fold.labels[:, index] == 1
            yield positive, fold.scores[:, :, index]
