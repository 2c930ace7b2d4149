"""The numbers behind Tables 4 and 5: AUCs with confidence intervals, and Wilcoxon tests of one init against the others.

Repeats on identical folds differ in initial weights and batch order only, so their spread is the noise of training.
The spread over the five folds is the only hint at how results would differ for other patients.

R repeats, F folds.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from modan_fast.downstream.metrics import auc, sensitivity, specificity
from modan_fast.downstream.predictions import Predictions, by_fold, read_finished
from modan_fast.downstream.results import Experiment

CONFIDENCE = 0.95
RESAMPLES = 9999
FEWEST_REPEATS = 3  # for an interval; with two it would be ± 12.7 standard errors

Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """The summary of an init for one task, recipe and protocol. What cannot be computed is None.

    `repeats` counts those with all folds of the task. `mean` and `std` are the mean and the sample standard deviation
    of the repeats' mean fold AUCs. `interval` is the 95 % interval of the mean by Student's t, clipped to [0, 1], from
    three repeats on. `fold_interval` is a bootstrap of the folds' mean AUCs. `sensitivity` and `specificity` are
    averaged as the AUC is.
    """

    task: str
    recipe: str
    protocol: str
    init: str
    repeats: int
    mean: float | None
    std: float | None
    interval: Interval | None = None
    fold_interval: Interval | None = None
    sensitivity: float | None = None
    specificity: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The reference against another init, in one task, recipe and protocol. What cannot be computed is None.

    `difference` is the reference's AUC minus the other's, averaged over the `repeats` that both have, and
    `fold_interval` its bootstrap over the folds. The p-values are of the Wilcoxon signed-rank test over the repeats:
    `two_sided`, and `greater` for the alternative that the reference is greater. The `holm` ones are adjusted for all
    inits that the reference is compared with there. `effect` is the rank-biserial correlation in [-1, 1], 1 if the
    reference wins every repeat.
    """

    task: str
    recipe: str
    protocol: str
    init: str
    reference: str
    repeats: int
    difference: float | None = None
    fold_interval: Interval | None = None
    two_sided: float | None = None
    greater: float | None = None
    holm_two_sided: float | None = None
    holm_greater: float | None = None
    effect: float | None = None


def auc_table(folder: Path) -> list[Row]:
    """`summaries` of the finished repeats in a results folder. Raises `InputError` if there are none."""
    return summaries(read_finished(folder)[0])


def summaries(predictions: Predictions) -> list[Row]:
    """One row per experiment, in the order of `predictions`."""
    sensitivities, specificities = by_fold(predictions, sensitivity), by_fold(predictions, specificity)
    rows = []
    for experiment, aucs in by_fold(predictions, auc).items():
        aucs_R = _repeat_means(aucs)
        mean = _mean(aucs_R)
        std = None if mean is None or len(aucs_R) < 2 else statistics.stdev(aucs_R)
        rows.append(
            Row(
                **experiment._asdict(),
                repeats=len(aucs_R),
                mean=mean,
                std=std,
                interval=_interval(mean, std, len(aucs_R)),
                fold_interval=_bootstrap(list(aucs.values())),
                sensitivity=_mean(_repeat_means(sensitivities[experiment])),
                specificity=_mean(_repeat_means(specificities[experiment])),
            )
        )
    return rows


def comparisons(predictions: Predictions, reference: str) -> list[Comparison]:
    """The init `reference` against each other one, wherever it was judged, in the order of `predictions`."""
    table = by_fold(predictions, auc)
    families: dict[Experiment, list[Comparison]] = defaultdict(list)
    for experiment, repeats in table.items():
        own = experiment._replace(init=reference)
        if own in table and experiment != own:
            both = sorted(table[own].keys() & repeats.keys())
            # Rounded, so that differences which only differ in their last bits tie.
            differences_RF = [(table[own][repeat] - repeats[repeat]).round(12) for repeat in both]
            families[own].append(_compare(experiment, reference, differences_RF))
    adjusted = []
    for family in families.values():
        two_sided, greater = holm([each.two_sided for each in family]), holm([each.greater for each in family])
        adjusted += [
            replace(each, holm_two_sided=both_sides, holm_greater=one_side)
            for each, both_sides, one_side in zip(family, two_sided, greater, strict=True)
        ]
    return adjusted


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of a family of p-values, without those that are None (Scand. J. Stat. 6, 1979)."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        adjusted[index] = largest = max(largest, min(1.0, (len(known) - rank) * p))
    return adjusted


def _compare(experiment: Experiment, reference: str, differences_RF: Sequence[NDArray[np.float64]]) -> Comparison:
    """The comparison, not yet adjusted, from the differences of the fold AUCs of each repeat."""
    differences_R = np.array([each.mean() for each in differences_RF]).round(12)
    compared = Comparison(
        **experiment._asdict(),
        reference=reference,
        repeats=len(differences_R),
        difference=_mean(differences_R),
        fold_interval=_bootstrap(differences_RF),
    )
    nonzero = np.count_nonzero(differences_R)
    if compared.difference is None or not nonzero:
        return compared
    # Zeros are dropped, ties share their mean rank; p is exact up to 50 repeats without ties, and up to 13 with ties.
    greater = stats.wilcoxon(differences_R, alternative="greater")
    rank_sum = nonzero * (nonzero + 1) / 2
    return replace(
        compared,
        two_sided=float(stats.wilcoxon(differences_R).pvalue),
        greater=float(greater.pvalue),
        effect=float(2 * greater.statistic / rank_sum - 1),
    )


def _interval(mean: float | None, std: float | None, repeats: int) -> Interval | None:
    """Student's t interval of a mean AUC, clipped to [0, 1]; None below `FEWEST_REPEATS`."""
    if mean is None or std is None or repeats < FEWEST_REPEATS:
        return None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, repeats - 1)) * std / repeats**0.5
    return max(0.0, mean - half), min(1.0, mean + half)


def _bootstrap(values_RF: Sequence[NDArray[np.float64]]) -> Interval | None:
    """Percentile interval of the mean over folds; the folds' means over the repeats are resampled."""
    if not values_RF:
        return None
    folds_F = np.mean(values_RF, axis=0)
    if len(folds_F) < 2 or not np.isfinite(folds_F).all():
        return None
    found = stats.bootstrap(
        (folds_F,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def _repeat_means(repeats: Mapping[int, NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.array([folds_F.mean() for folds_F in repeats.values()])


def _mean(values: NDArray[np.float64]) -> float | None:
    """The mean; None of no values, and if one of them is not finite."""
    return statistics.fmean(values) if len(values) and np.isfinite(values).all() else None
