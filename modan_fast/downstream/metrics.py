"""AUC, sensitivity and specificity of a fold run's predictions.

Each takes labels, 0 or 1, and scores of the same images, and returns None for what cannot be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

THRESHOLD = 0.5  # an image counts as positive from this score on

Labels = Sequence[int] | NDArray[np.int64]
Scores = Sequence[float] | NDArray[np.floating[Any]]


def auc(labels: Labels, scores: Scores) -> float | None:
    """Area under the ROC curve, in [0, 1]; None if a class is missing or a score is not finite."""
    if len(set(labels)) < 2 or not np.isfinite(scores).all():
        return None
    return float(roc_auc_score(labels, scores))


def sensitivity(labels: Labels, scores: Scores) -> float | None:
    """Share of the positive images whose score is at least `THRESHOLD`; None if a score is not finite."""
    return _share(labels, scores, 1)


def specificity(labels: Labels, scores: Scores) -> float | None:
    """Share of the negative images whose score is below `THRESHOLD`; None if a score is not finite."""
    return _share(labels, scores, 0)


def _share(labels: Labels, scores: Scores, label: int) -> float | None:
    """The share of the images of one class that are classified as such."""
    chosen = np.asarray(labels) == label
    if not chosen.any() or not np.isfinite(scores).all():
        return None
    return float(((np.asarray(scores)[chosen] >= THRESHOLD) == label).mean())
