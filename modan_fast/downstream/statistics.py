"""AUCs with confidence intervals from predictions.csv, and tests of one init against the others.

Repeats on identical folds differ in initial weights and batch order only, so they show the noise of
training. Only the folds show how a result varies with the patients, as far as five folds can.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from modan_fast.downstream.results import COLUMNS, Experiment, Results, auc
from modan_fast.downstream.tasks import FoldRun
from shard_builder.settings import InputError

THRESHOLD = 0.5  # of the score, from which on an image counts as positive in sensitivity and specificity
CONFIDENCE = 0.95
RESAMPLES = 9999


class Outcome(NamedTuple):
    """The test images of a fold run: `labels` int64, 0 or 1, and `scores` float64, in the file's order."""

    labels: NDArray[np.int64]
    scores: NDArray[np.float64]


Predictions = Mapping[Experiment, Mapping[FoldRun, Outcome]]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """An init's line for one task, recipe and protocol. What cannot be computed is None.

    `repeats` counts those with all folds of the task. `mean` and `std` are the mean and the sample standard
    deviation over them of their mean fold AUCs, and `interval` is the 95 % interval of the mean by Student's t.
    `fold_interval` is a bootstrap of the folds' mean AUCs. `sensitivity` and `specificity` are taken where a score
    of 0.5 counts as positive, and averaged as the AUC is.
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
    """The reference beside another init, in one task, recipe and protocol. What cannot be computed is None.

    `difference` is the mean over the `repeats` that both have of the reference's AUC minus the other's,
    `fold_interval` its bootstrap over the folds. The p-values are of the Wilcoxon signed-rank test over the
    repeats, `greater` against "the reference is not greater"; the `holm` ones are adjusted for all inits that the
    reference is compared with there. `effect` is the rank-biserial correlation in [-1, 1], 1 where the reference
    wins every repeat.
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


def read_predictions(path: Path) -> Predictions:
    """What predictions.csv holds, in the file's order.

    Raises `InputError` where the file is missing or a line is damaged.
    """
    found: dict[Experiment, dict[FoldRun, tuple[list[int], list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: ([], []))
    )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) != COLUMNS:
                raise InputError(f"{path}, line 1: the columns must be {','.join(COLUMNS)}")
            for row in reader:
                try:
                    task, init, recipe, protocol, repeat, fold, _, label, score = row
                    labels, scores = found[Experiment(task, init, recipe, protocol)][
                        FoldRun(int(repeat), int(fold))
                    ]
                    labels.append(int(label))
                    scores.append(float(score))
                except ValueError as error:
                    raise InputError(
                        f"{path}, line {reader.line_num}: damaged; the same evaluation again repairs it"
                    ) from error
    except OSError as error:
        raise InputError(f"no predictions at {path} ({error.strerror}): run an evaluation first") from error
    return {
        experiment: {
            fold_run: Outcome(np.array(labels), np.array(scores))
            for fold_run, (labels, scores) in fold_runs.items()
        }
        for experiment, fold_runs in found.items()
    }


def read_finished(folder: Path) -> tuple[Predictions, int]:
    """The finished repeats in a results folder, and how many trainings of unfinished ones are left out.

    A repeat is finished when each fold of its task has all test images, as runs.json counts them. Predictions without
    a runs.json are taken as they are. Raises `InputError` where there is nothing finished, and as `read_predictions`.
    """
    predictions = read_predictions(folder / "predictions.csv")
    tasks = Results.open(folder).runs["tasks"] if (folder / "runs.json").exists() else {}
    finished: dict[Experiment, dict[FoldRun, Outcome]] = {}
    for experiment, fold_runs in predictions.items():
        wanted = tasks.get(experiment.task, {}).get("test_images")
        repeats = {fold_run.repeat for fold_run in fold_runs}
        if wanted is not None:
            repeats = {
                repeat
                for repeat in repeats
                if all(
                    (outcome := fold_runs.get(FoldRun(repeat, fold))) and len(outcome.labels) == images
                    for fold, images in enumerate(wanted, start=1)
                )
            }
        if whole := {fold_run: outcome for fold_run, outcome in fold_runs.items() if fold_run.repeat in repeats}:
            finished[experiment] = whole
    if not finished:
        raise InputError(
            f"{folder / 'predictions.csv'} has no finished repeat: run the evaluation to its end first"
        )
    return finished, sum(map(len, predictions.values())) - sum(map(len, finished.values()))


def auc_table(folder: Path) -> list[Row]:
    """`summaries` of what is finished in a results folder."""
    return summaries(read_finished(folder)[0])


def by_fold(
    predictions: Predictions, measure: Callable[[Outcome], float | None]
) -> dict[Experiment, dict[int, NDArray[np.float64]]]:
    """A measure of each fold, `[experiment][repeat][fold - 1]`, of the repeats with all folds; NaN where it is None."""
    folds: dict[str, set[int]] = defaultdict(set)
    for experiment, fold_runs in predictions.items():
        folds[experiment.task].update(fold_run.fold for fold_run in fold_runs)
    table: dict[Experiment, dict[int, NDArray[np.float64]]] = {}
    for experiment, fold_runs in predictions.items():
        wanted = sorted(folds[experiment.task])
        repeats = sorted({fold_run.repeat for fold_run in fold_runs})
        table[experiment] = {
            # None becomes NaN.
            repeat: np.array([measure(fold_runs[FoldRun(repeat, fold)]) for fold in wanted], np.float64)
            for repeat in repeats
            if all(FoldRun(repeat, fold) in fold_runs for fold in wanted)
        }
    return table


def fold_auc(outcome: Outcome) -> float | None:
    """The AUC of a fold run."""
    return auc(outcome.labels, outcome.scores)


def sensitivity(outcome: Outcome) -> float | None:
    """Share of the positive images whose score is at least 0.5; None where one is not finite."""
    return _share(outcome, 1, outcome.scores >= THRESHOLD)


def specificity(outcome: Outcome) -> float | None:
    """Share of the negative images whose score is below 0.5; None where one is not finite."""
    return _share(outcome, 0, outcome.scores < THRESHOLD)


def summaries(predictions: Predictions) -> list[Row]:
    """One row a (task, recipe, protocol, init), in the order of `predictions`."""
    found, missed = by_fold(predictions, sensitivity), by_fold(predictions, specificity)
    rows = []
    for experiment, repeats in by_fold(predictions, fold_auc).items():
        aucs_R, spread, reach = _repeat_means(repeats), None, None
        if len(aucs_R) > 1 and np.isfinite(aucs_R).all():
            spread = statistics.stdev(aucs_R)
            reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(aucs_R) - 1)) * spread / len(aucs_R) ** 0.5
        mean = _mean(aucs_R)
        rows.append(
            Row(
                **experiment._asdict(),
                repeats=len(repeats),
                mean=mean,
                std=spread,
                interval=None if mean is None or reach is None else (mean - reach, mean + reach),
                fold_interval=_bootstrap(list(repeats.values())),
                sensitivity=_mean(_repeat_means(found[experiment])),
                specificity=_mean(_repeat_means(missed[experiment])),
            )
        )
    return rows


def comparisons(predictions: Predictions, reference: str) -> list[Comparison]:
    """The init `reference` against each other one, wherever it was judged, in the order of `predictions`."""
    table = by_fold(predictions, fold_auc)
    families: dict[Experiment, list[Comparison]] = defaultdict(list)
    for experiment, repeats in table.items():
        own = experiment._replace(init=reference)
        if own in table and experiment != own:
            both = sorted(table[own].keys() & repeats.keys())
            # Rounded, so that differences that are equal but for rounding are ties.
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
    """Holm's step-down adjustment of a family of p-values; None is no member of it (Scand. J. Stat. 6, 1979)."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        adjusted[index] = largest = max(largest, min(1.0, (len(known) - rank) * p))
    return adjusted


def _compare(experiment: Experiment, reference: str, differences_RF: Sequence[NDArray[np.float64]]) -> Comparison:
    """The comparison, not yet adjusted, from the differences of fold AUCs of each repeat."""
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
    # Zeros are dropped, ties share their mean rank; up to 50 repeats without ties, and 13 with, p is exact.
    greater = stats.wilcoxon(differences_R, alternative="greater")
    rank_sum = nonzero * (nonzero + 1) / 2
    return replace(
        compared,
        two_sided=float(stats.wilcoxon(differences_R).pvalue),
        greater=float(greater.pvalue),
        effect=float(2 * greater.statistic / rank_sum - 1),
    )


def _bootstrap(values_RF: Sequence[NDArray[np.float64]]) -> Interval | None:
    """Percentile interval of the mean of the folds' means over the repeats, the folds resampled with replacement."""
    if not values_RF:
        return None
    folds_F = np.mean(values_RF, axis=0)
    if len(folds_F) < 2 or not np.isfinite(folds_F).all():
        return None
    interval = stats.bootstrap(
        (folds_F,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _repeat_means(repeats: Mapping[int, NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.array([folds_F.mean() for folds_F in repeats.values()])


def _mean(values: NDArray[np.float64]) -> float | None:
    """The mean; None of nothing, and where a value could not be computed."""
    return statistics.fmean(values) if len(values) and np.isfinite(values).all() else None


def _share(outcome: Outcome, label: int, hits: NDArray[np.bool_]) -> float | None:
    """The share of `hits` among the images of a class."""
    among = hits[outcome.labels == label]
    return float(among.mean()) if len(among) and np.isfinite(outcome.scores).all() else None
