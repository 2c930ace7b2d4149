"""The report's numbers: metrics with confidence intervals, tests of one init against the others, and subgroups.

Repeats on identical folds differ in initial weights and batch order only, so their spread is the noise of training.
How results would differ for other patients is what `intervals` says.

R repeats, F folds.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from modan_fast.downstream.intervals import (
    CONFIDENCE,
    Interval,
    delong,
    draw,
    percentiles,
    resampled_aucs,
    scores_of_folds,
)
from modan_fast.downstream.metrics import METRICS, auc, class_aucs
from modan_fast.downstream.predictions import Outcome, Predictions, by_fold, read_finished
from modan_fast.downstream.results import Experiment, protocol_of
from modan_fast.downstream.subgroups import Images, read_images
from modan_fast.downstream.tasks import FoldRun

FOLD_RESAMPLES = 9999
FEWEST_REPEATS = 3  # for an interval; with two it would be ± 12.7 standard errors


@dataclass(frozen=True)
class Row:
    """The summary of an init for one task, recipe and protocol. What cannot be computed is None.

    `repeats` counts those with all `folds` of the task. `mean` and `std` are the mean and the sample standard deviation
    of the repeats' mean fold AUCs, `spread` that of all fold AUCs. `interval` is the 95 % interval of the mean by
    Student's t, clipped to [0, 1], from three repeats on. `fold_interval` is a bootstrap of the folds' mean AUCs,
    `patient_interval` one of the patients, or of the images where no patient is named: `units` says which.
    `metrics` has all metrics by name, averaged as the AUC is, and `class_aucs` the AUC of each class or label.

    `protocol` is `logistic:5` for a point of a few-label curve, where repeats are tries; `labels` is then 5. Such a row
    has neither `patient_interval` nor `metrics`.
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
    folds: int = 0
    labels: int | None = None
    spread: float | None = None
    patient_interval: Interval | None = None
    units: str = "images"
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    class_aucs: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The reference against another init, in one task, recipe and protocol. What cannot be computed is None.

    `difference` is the reference's AUC minus the other's, averaged over the `repeats` that both have, and
    `fold_interval` its bootstrap over the folds. The p-values are of the Wilcoxon signed-rank test over the repeats:
    `two_sided`, and `greater` for the alternative that the reference is greater. The `holm` ones are adjusted for all
    inits that the reference is compared with there. `effect` is the rank-biserial correlation in [-1, 1], 1 if the
    reference wins every repeat.

    These concern other patients (`units`: patients, or images where none are named): `patient_interval` is the
    bootstrap of the difference, the same patients for both inits, and `delong` the two-sided p-value of DeLong's test.
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
    units: str = "images"
    patient_interval: Interval | None = None
    delong: float | None = None
    holm_delong: float | None = None


@dataclass(frozen=True)
class SubgroupRow:
    """The metrics of an experiment on the test images whose `column` has a `value`.

    `images` counts them, each once, and `counts` those of each class or label. A metric is the mean over the repeats
    and over the folds in which it can be computed; `folds` counts those that have an AUC. None if there is no fold.
    """

    task: str
    recipe: str
    protocol: str
    init: str
    column: str
    value: str
    images: int
    counts: tuple[int, ...]
    folds: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class _Sampled:
    """The patients of a task's images, as numbers, and how often a resample has each; `counts` is None for too many."""

    units: str
    number_of: Mapping[str, int]
    counts: NDArray[np.float32] | None


def auc_table(folder: Path) -> list[Row]:
    """`summaries` of the finished repeats in a results folder. Raises `InputError` if there are none."""
    return summaries(read_finished(folder)[0], read_images(folder))


def summaries(predictions: Predictions, images: Mapping[str, Images] | None = None) -> list[Row]:
    """One row per experiment, in the order of `predictions`; `images` name the patients of each task."""
    tables = {name: by_fold(predictions, metric) for name, metric in METRICS.items()}
    sampled = _sampled(predictions, images or {})
    rows = []
    for experiment, aucs in tables["AUC"].items():
        aucs_R = _repeat_means(aucs)
        mean = _mean(aucs_R)
        std = None if mean is None or len(aucs_R) < 2 else statistics.stdev(aucs_R)
        labels = protocol_of(experiment.protocol)[1]
        means = {name: _mean(_repeat_means(table[experiment])) for name, table in tables.items()}
        row = Row(
            **experiment._asdict(),
            repeats=len(aucs_R),
            mean=mean,
            std=std,
            interval=_interval(mean, std, len(aucs_R)),
            fold_interval=_bootstrap(list(aucs.values())),
            sensitivity=means["sensitivity"],
            specificity=means["specificity"],
            folds=len({fold_run.fold for fold_run in predictions[experiment]}),
            labels=labels,
            spread=_deviation(aucs),
            units=sampled[experiment.task].units,
        )
        if labels is None:
            outcomes = [each for run, each in predictions[experiment].items() if run.repeat in aucs]
            row = replace(
                row,
                patient_interval=_patient_interval(predictions[experiment], list(aucs), sampled[experiment.task]),
                metrics=means,
                class_aucs=_class_means(outcomes),
            )
        rows.append(row)
    return rows


def comparisons(
    predictions: Predictions, reference: str, images: Mapping[str, Images] | None = None
) -> list[Comparison]:
    """The init `reference` against each other one, wherever it was judged, in the order of `predictions`.

    Points of few-label curves are not compared.
    """
    table = {each: aucs for each, aucs in by_fold(predictions, auc).items() if not protocol_of(each.protocol)[1]}
    sampled = _sampled(predictions, images or {})
    families: dict[Experiment, list[Comparison]] = defaultdict(list)
    for experiment, repeats in table.items():
        own = experiment._replace(init=reference)
        if own in table and experiment != own:
            both = sorted(table[own].keys() & repeats.keys())
            # Rounded, so that differences which only differ in their last bits tie.
            differences_RF = [(table[own][repeat] - repeats[repeat]).round(12) for repeat in both]
            compared = _compare(experiment, reference, differences_RF)
            families[own].append(
                _over_patients(
                    compared, predictions[own], predictions[experiment], both, sampled[experiment.task]
                )
            )
    adjusted = []
    for family in families.values():
        two_sided, greater = holm([each.two_sided for each in family]), holm([each.greater for each in family])
        delongs = holm([each.delong for each in family])
        adjusted += [
            replace(each, holm_two_sided=both_sides, holm_greater=one_side, holm_delong=of_delong)
            for each, both_sides, one_side, of_delong in zip(family, two_sided, greater, delongs, strict=True)
        ]
    return adjusted


def subgroup_rows(predictions: Predictions, images: Mapping[str, Images]) -> list[SubgroupRow]:
    """A row for each experiment, subgroup column and value, without points of few-label curves."""
    rows = []
    for experiment, fold_runs in predictions.items():
        if protocol_of(experiment.protocol)[1] is not None or experiment.task not in images:
            continue
        for column, value_of in images[experiment.task].subgroups.items():
            values = sorted(set(value_of.values()))
            rows += [_subgroup(experiment, fold_runs, column, value, value_of) for value in values]
    return rows


def _subgroup(
    experiment: Experiment,
    fold_runs: Mapping[FoldRun, Outcome],
    column: str,
    value: str,
    value_of: Mapping[str, str],
) -> SubgroupRow:
    labels: dict[str, NDArray[np.int64]] = {}
    parts: dict[FoldRun, Outcome] = {}
    classes = 1
    for fold_run, outcome in fold_runs.items():
        chosen = np.array([value_of.get(image) == value for image in outcome.images], bool)
        names = tuple(image for image, mine in zip(outcome.images, chosen, strict=True) if mine)
        parts[fold_run] = Outcome(outcome.labels[chosen], outcome.scores[chosen], names)
        labels.update(zip(names, parts[fold_run].labels, strict=True))
        classes = outcome.scores.shape[1] if outcome.scores.ndim == 2 else 1
    finite = all(np.isfinite(part.scores).all() for part in parts.values())
    table = {
        name: {run: metric(part.labels, part.scores) if finite else None for run, part in parts.items()}
        for name, metric in METRICS.items()
    }
    known = np.array(list(labels.values()))
    if known.ndim == 2:
        counts = known.sum(axis=0).tolist()
    else:
        counts = [np.count_nonzero(known == index) for index in (range(classes) if classes > 1 else (1,))]
    return SubgroupRow(
        **experiment._asdict(),
        column=column,
        value=value,
        images=len(labels),
        counts=tuple(counts),
        folds=len({run.fold for run, each in table["AUC"].items() if each is not None}),
        metrics={name: _mean_of_known(values) for name, values in table.items()},
    )


def _mean_of_known(values: Mapping[FoldRun, float | None]) -> float | None:
    """The mean over the repeats of the means over the folds, of the values that are not None."""
    repeats: dict[int, list[float]] = defaultdict(list)
    for fold_run, each in values.items():
        if each is not None:
            repeats[fold_run.repeat].append(each)
    return statistics.fmean(map(statistics.fmean, repeats.values())) if repeats else None


def _sampled(predictions: Predictions, images: Mapping[str, Images]) -> dict[str, _Sampled]:
    """The patients of each task, and the resamples of them that all its inits share."""
    folds: dict[str, dict[int, tuple[str, ...]]] = defaultdict(dict)
    for experiment, fold_runs in predictions.items():
        for fold_run, outcome in fold_runs.items():
            folds[experiment.task].setdefault(fold_run.fold, outcome.images)
    sampled = {}
    for task, names in folds.items():
        patients = images[task].patients if task in images else {}
        # An image without a patient is one of its own; the tuple differs from every patient's name.
        keys: dict[Any, int] = {}
        every = dict.fromkeys(image for run in _runs_of(predictions, task) for image in run.images)
        number_of = {image: keys.setdefault(patients.get(image, (image,)), len(keys)) for image in every}
        units = [np.array([number_of[image] for image in names[fold]], np.int64) for fold in sorted(names)]
        known = any(image in patients for image in every)
        sampled[task] = _Sampled("patients" if known else "images", number_of, draw(units, len(keys)))
    return sampled


def _runs_of(predictions: Predictions, task: str) -> Iterable[Outcome]:
    return (
        outcome
        for experiment, fold_runs in predictions.items()
        if experiment.task == task
        for outcome in fold_runs.values()
    )


def _patient_interval(
    fold_runs: Mapping[FoldRun, Outcome], repeats: Sequence[int], sampled: _Sampled
) -> Interval | None:
    """The bootstrap's interval of a mean AUC; that of DeLong for too many images."""
    folds = scores_of_folds(fold_runs, repeats, sampled.number_of)
    if folds is None:
        return None
    if sampled.counts is not None:
        return percentiles(resampled_aucs(folds, sampled.counts))
    found = delong(folds)
    return None if found is None else found.interval()


def _over_patients(
    compared: Comparison,
    own: Mapping[FoldRun, Outcome],
    other: Mapping[FoldRun, Outcome],
    repeats: Sequence[int],
    sampled: _Sampled,
) -> Comparison:
    """The comparison with its interval and test over patients."""
    compared = replace(compared, units=sampled.units)
    mine, theirs = (scores_of_folds(each, repeats, sampled.number_of) for each in (own, other))
    if mine is None or theirs is None or len(mine) != len(theirs):
        return compared
    for one, another in zip(mine, theirs, strict=True):
        same = (np.array_equal(one.patients, another.patients), np.array_equal(one.labels, another.labels))
        if not all(same) or one.scores.shape != another.scores.shape:
            return compared
    found = delong(mine, theirs)
    interval = None if found is None else found.interval(least=-1)
    if sampled.counts is not None:
        interval = percentiles(resampled_aucs(mine, sampled.counts) - resampled_aucs(theirs, sampled.counts))
    return replace(compared, patient_interval=interval, delong=None if found is None else found.p_value())


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
        (folds_F,), np.mean, confidence_level=CONFIDENCE, n_resamples=FOLD_RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def _class_means(outcomes: Iterable[Outcome]) -> tuple[float | None, ...]:
    """The AUC of each class or label, averaged over fold runs; None if it cannot be computed in one of them."""
    aucs = np.array([class_aucs(each.labels, each.scores) for each in outcomes], np.float64)
    return tuple(_mean(each) for each in aucs.T)


def _deviation(repeats: Mapping[int, NDArray[np.float64]]) -> float | None:
    """The sample standard deviation of all fold AUCs; None of fewer than two, and if one of them is not finite."""
    values = np.concatenate([*repeats.values(), np.empty(0)])
    return statistics.stdev(values) if len(values) > 1 and np.isfinite(values).all() else None


def _repeat_means(repeats: Mapping[int, NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.array([folds_F.mean() for folds_F in repeats.values()])


def _mean(values: NDArray[np.float64]) -> float | None:
    """The mean; None of no values, and if one of them is not finite."""
    return statistics.fmean(values) if len(values) and np.isfinite(values).all() else None
