"""The metrics equal scikit-learn's, tables worked out by hand, and are None where they cannot be computed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as sklearn

from modan_fast.downstream.metrics import (
    METRICS,
    auc,
    average_precision,
    balanced_accuracy,
    brier,
    calibration_error,
    class_aucs,
    f1,
    sensitivity,
    sensitivity_at_specificity,
    specificity,
)

Data = tuple[NDArray[np.int64], NDArray[np.float64]]
SEEDS = pytest.mark.parametrize("seed", range(12))


def data(kind: str, seed: int, images: int = 60) -> Data:
    """Labels and probabilities; odd seeds have many equal scores."""
    generator = np.random.default_rng(seed)
    if kind == "multiclass":
        labels = generator.permutation(np.arange(images) % 4)
        logits = generator.normal(0, 1, (images, 4)) + 1.0 * (labels[:, None] == range(4))
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    else:
        shape = (images, 3) if kind == "multilabel" else (images,)
        labels = generator.integers(0, 3, shape) // 2
        scores = 1 / (1 + np.exp(-generator.normal(2.0 * labels - 1, 1.5)))
    if seed % 2 and kind != "multiclass":
        scores = scores.round(1)
    return labels, scores


@SEEDS
def test_metrics_of_two_classes_equal_scikit_learns(seed: int) -> None:
    labels, scores = data("binary", seed)
    decided = scores >= 0.5
    assert auc(labels, scores) == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=1e-12)
    assert class_aucs(labels, scores) == [auc(labels, scores)]
    assert average_precision(labels, scores) == pytest.approx(sklearn.average_precision_score(labels, scores))
    assert balanced_accuracy(labels, scores) == pytest.approx(sklearn.balanced_accuracy_score(labels, decided))
    assert f1(labels, scores) == pytest.approx(sklearn.f1_score(labels, decided))
    assert brier(labels, scores) == pytest.approx(sklearn.brier_score_loss(labels, scores))
    assert sensitivity(labels, scores) == pytest.approx(sklearn.recall_score(labels, decided))
    assert specificity(labels, scores) == pytest.approx(sklearn.recall_score(labels, decided, pos_label=0))
    false, true, _ = sklearn.roc_curve(labels, scores, drop_intermediate=False)
    wanted = max(y for x, y in zip(false, true, strict=True) if 1 - x > 0.9 - 1e-9)
    assert sensitivity_at_specificity(labels, scores) == pytest.approx(wanted)


@SEEDS
def test_metrics_of_several_classes_equal_scikit_learns(seed: int) -> None:
    labels, scores = data("multiclass", seed)
    decided = scores.argmax(axis=1)
    one_hot = labels[:, None] == range(4)
    assert auc(labels, scores) == pytest.approx(sklearn.roc_auc_score(labels, scores, multi_class="ovr"))
    each = [sklearn.roc_auc_score(one_hot[:, index], scores[:, index]) for index in range(4)]
    assert class_aucs(labels, scores) == pytest.approx(each)
    assert average_precision(labels, scores) == pytest.approx(sklearn.average_precision_score(labels, scores))
    assert balanced_accuracy(labels, scores) == pytest.approx(sklearn.balanced_accuracy_score(labels, decided))
    assert sensitivity(labels, scores) == pytest.approx(sklearn.recall_score(labels, decided, average="macro"))
    tables = sklearn.multilabel_confusion_matrix(labels, decided)
    kept = np.mean([table[0, 0] / table[0].sum() for table in tables])
    assert specificity(labels, scores) == pytest.approx(kept)
    assert f1(labels, scores) == pytest.approx(sklearn.f1_score(labels, decided, average="macro"))
    assert brier(labels, scores) == pytest.approx(sklearn.brier_score_loss(labels, scores, scale_by_half=False))
    parts = [sensitivity_at_specificity(one_hot[:, index], scores[:, index]) for index in range(4)]
    assert sensitivity_at_specificity(labels, scores) == pytest.approx(np.mean([part for part in parts if part]))


@SEEDS
def test_metrics_of_several_labels_equal_scikit_learns(seed: int) -> None:
    labels, scores = data("multilabel", seed)
    decided = scores >= 0.5
    pairs = list(zip(labels.T, scores.T, strict=True))
    assert auc(labels, scores) == pytest.approx(sklearn.roc_auc_score(labels, scores, average="macro"))
    assert average_precision(labels, scores) == pytest.approx(sklearn.average_precision_score(labels, scores))
    assert f1(labels, scores) == pytest.approx(sklearn.f1_score(labels, decided, average="macro"))
    assert sensitivity(labels, scores) == pytest.approx(sklearn.recall_score(labels, decided, average="macro"))
    for metric, theirs in (
        (brier, sklearn.brier_score_loss),
        (balanced_accuracy, lambda y, s: sklearn.balanced_accuracy_score(y, s >= 0.5)),
        (calibration_error, calibration_error),
    ):
        assert metric(labels, scores) == pytest.approx(np.mean([theirs(*pair) for pair in pairs]))


def test_sensitivity_at_a_specificity_equals_a_table_worked_out_by_hand() -> None:
    # Of 10 negatives one may score as high as the threshold: 0.8, which 2 of 4 positives reach, not 0.7 with two.
    labels = [0] * 10 + [1] * 4
    scores = [0.8, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.8, 0.7, 0.2]
    assert sensitivity_at_specificity(labels, scores) == 0.5
    # With nine negatives none may: only 0.9 remains.
    assert sensitivity_at_specificity(labels[1:], [0.8, *scores[2:]]) == 0.25
    # A negative one scores most: no threshold is specific enough, so nothing is found.
    assert sensitivity_at_specificity([0, 1], [0.9, 0.8]) == 0


def test_the_calibration_error_equals_a_table_worked_out_by_hand() -> None:
    # 15 bins: 1/15 is in the first with 0, 0.1 in the second; 1 is in the last.
    labels, scores = [0, 1, 1, 1], [0.0, 1 / 15, 0.1, 1.0]
    # Bins of 2, 1 and 1 images: |1 - 1/15|, |1 - 0.1| and 0, over 4 images.
    assert calibration_error(labels, scores) == pytest.approx(((1 - 1 / 15) + 0.9 + 0) / 4)
    # Top label: confidences 0.6 (right), 0.7 (wrong), in bins 9 and 11.
    three = np.array([[0.6, 0.3, 0.1], [0.7, 0.2, 0.1]])
    assert calibration_error([0, 1], three) == pytest.approx((0.4 + 0.7) / 2)


def test_the_brier_score_equals_a_table_worked_out_by_hand() -> None:
    assert brier([1, 0], [0.8, 0.4]) == pytest.approx((0.04 + 0.16) / 2)
    assert brier([0, 2], np.array([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])) == pytest.approx((0.5 + 0.08) / 2)


@pytest.mark.parametrize("name", METRICS)
def test_what_cannot_be_computed_is_none(name: str) -> None:
    metric = METRICS[name]
    probabilities = name in ("Brier score", "calibration error")
    nothing = np.zeros(0)
    assert metric(nothing.astype(int), nothing) is None
    assert metric(np.array([0, 1]), np.array([0.2, np.nan])) is None
    absent = np.array([0, 1, 1]), np.full((3, 3), 1 / 3)  # class 2 has no image
    assert (metric(*absent) is None) == (not probabilities and name != "specificity")
    if probabilities:
        assert metric(np.array([0, 1]), np.array([0.2, 1.2])) is None, "no probability"


def test_a_positive_or_negative_class_alone_has_its_own_share_only() -> None:
    assert (sensitivity([1, 1], [0.4, 0.6]), specificity([1, 1], [0.4, 0.6])) == (0.5, None)
    assert (sensitivity([0, 0], [0.4, 0.6]), specificity([0, 0], [0.4, 0.6])) == (None, 0.5)
    assert balanced_accuracy([0, 0], [0.4, 0.6]) is None
    assert auc([1, 1], [0.4, 0.6]) is None
