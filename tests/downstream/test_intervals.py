"""Bootstrap and DeLong against a published example, loops from the formulas, scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from modan_fast.downstream.intervals import (
    CHUNK,
    RESAMPLES,
    FoldScores,
    delong,
    draw,
    percentiles,
    resampled_aucs,
    scores_of_folds,
)
from modan_fast.downstream.metrics import auc
from modan_fast.downstream.predictions import Outcome
from modan_fast.downstream.tasks import FoldRun

# Albumin, total protein, the K-G score and the outcome of 43 of the patients of DeLong, DeLong and Clarke-Pearson
# (Biometrics 44, 1988), as the manual of SAS's LOGISTIC procedure prints them.
NUMBERS = """
3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0
3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0 1.6 5.6 5 1
3.8 5.7 5 1 3.7 6.7 6 1 3.2 5.4 4 1 3.8 6.6 6 1
4.1 6.6 5 1 3.6 5.7 5 1 4.3 7.0 4 1 3.6 6.7 4 0
2.3 4.4 6 1 4.2 7.6 4 0 4.0 6.6 6 0 3.5 5.8 6 1
3.8 6.8 7 1 3.0 4.7 8 0 4.5 7.4 5 1 3.7 7.4 5 1
3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1 4.3 6.5 4 1
3.2 5.1 5 1 2.6 4.7 6 1 3.3 6.8 6 0 1.7 4.0 7 0
3.7 6.1 5 1 3.3 6.3 7 1 4.2 7.7 6 1 3.5 6.2 5 1
2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1
3.3 5.7 6 1 3.7 6.9 5 1 3.6 6.6 5 1
"""
PATIENTS = np.array([float(number) for line in NUMBERS.splitlines() for number in line.split()]).reshape(43, 4)


def folds_of(labels: Sequence[NDArray[np.int64]], scores: Sequence[NDArray[np.float64]]) -> list[FoldScores]:
    """Folds of images that are each a patient's only one."""
    starts = np.cumsum([0, *map(len, labels)])
    return [
        FoldScores(start + np.arange(len(each)), each, score)
        for start, each, score in zip(starts, labels, scores, strict=False)
    ]


def published(column: int) -> list[FoldScores]:
    sign = -1 if column == 2 else 1  # a high K-G score is bad
    return folds_of([PATIENTS[:, 3].astype(np.int64)], [sign * PATIENTS[None, :, column]])


def made(seed: int, folds: int = 3, repeats: int = 2, images: int = 24) -> list[FoldScores]:
    generator = np.random.default_rng(seed)
    labels = [np.arange(images) % 2 for _ in range(folds)]
    scores = [generator.normal(each, 1.2, (repeats, images)).round(1) for each in labels]
    return folds_of(labels, scores)


@pytest.mark.parametrize(
    ("column", "area", "error"), [(0, 0.7366, 0.0927), (1, 0.6478, 0.1000), (2, 0.7258, 0.1028)]
)
def test_delongs_error_equals_the_published_example(column: int, area: float, error: float) -> None:
    found = delong(published(column))
    assert found is not None
    assert (found.value, found.error) == (pytest.approx(area, abs=5e-5), pytest.approx(error, abs=5e-5))


@pytest.mark.parametrize(
    ("column", "difference", "error", "p"), [(0, 0.0108, 0.0953, 0.9102), (1, -0.078, 0.1046, 0.4561)]
)
def test_delongs_test_of_two_scores_equals_the_published_example(
    column: int, difference: float, error: float, p: float
) -> None:
    found = delong(published(column), published(2))
    assert found is not None
    assert (found.value, found.error) == (pytest.approx(difference, abs=5e-5), pytest.approx(error, abs=5e-5))
    assert found.p_value() == pytest.approx(p, abs=5e-5)
    low, high = found.interval(least=-1)
    assert (low, high) == pytest.approx((difference - 1.96 * error, difference + 1.96 * error), abs=3e-4)


def wins(high: float, low: float) -> float:
    return 1.0 if high > low else 0.5 if high == low else 0.0


def clustered_variance(fold: FoldScores, other: FoldScores) -> float:
    """Obuchowski's variance of a difference of AUCs (Biometrics 53, 1997) by loops over all pairs of images."""
    upper, lower = np.flatnonzero(fold.labels == 1), np.flatnonzero(fold.labels == 0)
    v10 = {i: np.mean([wins(fold.scores[0, i], fold.scores[0, j]) for j in lower]) for i in upper}
    v01 = {j: np.mean([wins(fold.scores[0, i], fold.scores[0, j]) for i in upper]) for j in lower}
    for i in upper:
        v10[i] -= np.mean([wins(other.scores[0, i], other.scores[0, j]) for j in lower])
    for j in lower:
        v01[j] -= np.mean([wins(other.scores[0, i], other.scores[0, j]) for i in upper])
    area = np.mean(list(v10.values()))
    clusters = sorted(set(fold.patients.tolist()))
    sums10 = [sum(v10[i] - area for i in upper if fold.patients[i] == c) for c in clusters]
    sums01 = [sum(v01[j] - area for j in lower if fold.patients[j] == c) for c in clusters]
    m, n = len(upper), len(lower)
    i10, i01, i = len(set(fold.patients[upper])), len(set(fold.patients[lower])), len(clusters)
    s10 = i10 / ((i10 - 1) * m) * sum(each**2 for each in sums10)
    s01 = i01 / ((i01 - 1) * n) * sum(each**2 for each in sums01)
    s11 = i / (i - 1) * sum(a * b for a, b in zip(sums10, sums01, strict=True))
    return float(s10 / m + s01 / n + 2 * s11 / (m * n))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("images_of_a_patient", [1, 3])
def test_the_variance_with_several_images_of_a_patient_equals_obuchowskis_by_loops(
    seed: int, images_of_a_patient: int
) -> None:
    generator = np.random.default_rng(seed)
    patients = np.arange(30) // images_of_a_patient
    labels = generator.integers(0, 2, 30)
    one, other = (FoldScores(patients, labels, generator.normal(labels, 1, (1, 30)).round(1)) for _ in range(2))
    found = delong([one], [other])
    assert found is not None
    assert found.error**2 == pytest.approx(clustered_variance(one, other))


def test_a_mean_over_folds_has_the_variance_of_a_mean_of_independent_ones() -> None:
    folds = made(0, folds=4, repeats=1)
    each = [delong([fold]) for fold in folds]
    found = delong(folds)
    assert found is not None
    assert found.value == pytest.approx(np.mean([one.value for one in each if one]))
    assert found.error**2 == pytest.approx(sum(one.error**2 for one in each if one) / 16)


def test_equal_inits_have_no_p_value_and_a_class_of_one_patient_no_variance() -> None:
    folds = made(0)
    same = delong(folds, folds)
    assert same is not None
    assert (same.value, same.error, same.p_value()) == (0, 0, None)
    assert delong(folds_of([np.array([0, 0, 1])], [np.zeros((1, 3))])) is None
    assert delong(folds_of([np.array([0, 0, 0])], [np.zeros((1, 3))])) is None


def mean_auc(folds: Sequence[FoldScores], counts: NDArray[np.float32]) -> float:
    """The mean AUC of a resample by scikit-learn, with each image repeated."""
    values = []
    for fold in folds:
        rows = np.repeat(np.arange(len(fold.patients)), counts[fold.patients].astype(int))
        for scores in fold.scores:
            if len(set(fold.labels[rows])) < 2:
                return float("nan")
            if scores.ndim == 1:
                values.append(roc_auc_score(fold.labels[rows], scores[rows]))
            else:
                values.append(roc_auc_score(fold.labels[rows], scores[rows], multi_class="ovr"))
    return float(np.mean(values))


def test_each_resample_has_scikit_learns_auc_of_the_repeated_images() -> None:
    folds = made(1)
    counts = draw([fold.patients for fold in folds], 72)
    assert counts is not None
    found = resampled_aucs(folds, counts)
    for resample in range(50):
        assert found[resample] == pytest.approx(mean_auc(folds, counts[resample]), abs=1e-12)


def test_each_resample_of_several_classes_has_scikit_learns_auc() -> None:
    generator = np.random.default_rng(2)
    shares = generator.dirichlet((1, 1, 1), (2, 45))
    folds = folds_of([np.arange(45) % 3], [shares])
    counts = draw([fold.patients for fold in folds], 45)
    assert counts is not None
    found = resampled_aucs(folds, counts)
    for resample in range(30):
        assert found[resample] == pytest.approx(mean_auc(folds, counts[resample]), abs=1e-12)


def test_many_pairs_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = made(3)
    counts = draw([fold.patients for fold in folds], 72)
    assert counts is not None
    whole = resampled_aucs(folds, counts)
    monkeypatch.setattr("modan_fast.downstream.intervals.CHUNK", 30)
    assert CHUNK > 30
    assert resampled_aucs(folds, counts).tolist() == whole.tolist()


def test_the_bootstrap_agrees_with_scipys() -> None:
    [fold] = folds = made(4, folds=1, repeats=1, images=80)
    counts = draw([fold.patients], 80)
    assert counts is not None
    found = percentiles(resampled_aucs(folds, counts))
    theirs = stats.bootstrap(
        (fold.labels, fold.scores[0]),
        auc,
        paired=True,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert found == pytest.approx((theirs.low, theirs.high), abs=0.012)
    by_formula = delong(folds)
    assert by_formula is not None
    assert found == pytest.approx(by_formula.interval(), abs=0.03)


def test_the_images_of_a_patient_are_drawn_together_and_patients_within_their_fold() -> None:
    folds = [np.array([0, 0, 0, 1, 2]), np.array([3, 4, 4, 5])]
    counts = draw(folds, 6)
    assert counts is not None
    assert counts.shape == (RESAMPLES, 6)
    assert set(counts[:, :3].sum(axis=1)) == {3}
    assert set(counts[:, 3:].sum(axis=1)) == {3}
    assert np.array_equal(counts, np.asarray(draw(folds, 6))), "the same each time"


def test_patients_in_several_folds_are_drawn_from_all() -> None:
    counts = draw([np.array([0, 1, 2]), np.array([2, 3])], 4)
    assert counts is not None
    assert set(counts.sum(axis=1)) == {4}
    assert len(set(counts[:, :2].sum(axis=1))) > 1


def test_several_images_of_a_patient_widen_the_interval() -> None:
    generator = np.random.default_rng(5)
    labels = np.repeat(np.arange(40) % 2, 5)
    scores = np.repeat(generator.normal(np.arange(40) % 2, 1), 5)[None]

    def width(patients: NDArray[np.int64]) -> float:
        counts = draw([patients], int(patients.max()) + 1)
        assert counts is not None
        found = percentiles(resampled_aucs([FoldScores(patients, labels, scores)], counts))
        assert found is not None
        return found[1] - found[0]

    # Five equal images of a patient tell no more than one: the interval is sqrt(5) times as wide.
    assert width(np.repeat(np.arange(40), 5)) == pytest.approx(5**0.5 * width(np.arange(200)), rel=0.15)


def test_resamples_without_a_class_are_left_out_unless_they_are_many() -> None:
    assert percentiles(np.array([0.5, 0.7, *[0.6] * 17, np.nan])) is not None
    assert percentiles(np.array([0.5, 0.7, np.nan])) is None


def test_too_many_images_are_not_resampled() -> None:
    assert draw([np.arange(5001)], 5001) is None


def test_folds_whose_images_differ_between_repeats_are_not_averaged() -> None:
    number_of = {"a": 0, "b": 1, "c": 2}
    one = Outcome(np.array([0, 1]), np.array([0.1, 0.9]), ("a", "b"))
    other = Outcome(np.array([0, 1]), np.array([0.1, 0.9]), ("a", "c"))
    runs = {FoldRun(1, 1): one, FoldRun(2, 1): one}
    found = scores_of_folds(runs, [1, 2], number_of)
    assert found is not None
    assert found[0].scores.shape == (2, 2)
    assert scores_of_folds({**runs, FoldRun(2, 1): other}, [1, 2], number_of) is None
    assert scores_of_folds(runs, [1, 2, 3], number_of) is None
    assert scores_of_folds(runs, [], number_of) is None
    infinite = one._replace(scores=np.array([np.nan, 1]))
    assert scores_of_folds({FoldRun(1, 1): infinite}, [1], number_of) is None
