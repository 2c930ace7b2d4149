"""How long do 250 logistic regressions take, 5 folds x 10 repeats x 5 values of C, beside scikit-learn one by one?

The repeats divide the images differently, so that no fit is a copy of another one; in an evaluation of given weights
they would be. Scikit-learn is used plainly, a pipeline for each fit: once with its own tolerance, and once converged,
with the threads of BLAS as they come and with one. The timing starts with the features and ends with the probabilities
of the test images.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common.measuring import in_turn, options, positive, publish, timed
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from modan_fast.downstream.labels import Cell
from modan_fast.downstream.logistic import STRENGTHS, TOLERANCE, judge, probabilities
from modan_fast.downstream.tasks import Fold, FoldRun, Task


def features_of(images: int, features: int, classes: int) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Features whose variances fall as those of a network do, with labels that depend on some of them."""
    chance = np.random.default_rng(0)
    mixed = chance.normal(size=(features, features)) * np.exp(-np.arange(features) / 60)[:, None]
    found = chance.normal(size=(images, features)) @ mixed
    standard = (found - found.mean(0)) / found.std(0)
    hidden = standard[:, :20].sum(1) + 5 * chance.normal(size=images)
    labels = np.digitize(hidden, np.quantile(hidden, np.arange(1, classes) / classes))
    return torch.from_numpy(found).float(), labels


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=positive, default=780, help="780 are those of the breast task")
    parser.add_argument("--features", type=positive, default=512, help="512 are those of a ResNet-18")
    parser.add_argument("--repeats", type=positive, default=10, help="of five folds and five C; 10 give 250 fits")
    parser.add_argument("--classes", type=positive, default=2, help="of the task")
    parser.add_argument(
        "--all-threads", action=argparse.BooleanOptionalAction, default=False, help="also BLAS as it comes"
    )
    arguments = parser.parse_args()

    features, labels = features_of(arguments.images, arguments.features, arguments.classes)
    cells = []
    for repeat in range(1, arguments.repeats + 1):
        tenths = np.array_split(np.random.default_rng(repeat).permutation(arguments.images), 10)
        for first in range(0, 10, 2):
            test, val = np.concatenate(tenths[first : first + 2]), tenths[(first + 2) % 10]
            train = np.setdiff1d(np.arange(arguments.images), np.concatenate([test, val]))
            cells.append(Cell(FoldRun(repeat, first // 2 + 1), Fold(train, val, test)))
    names = tuple(map(str, range(arguments.images)))
    task = Task(
        *("synthetic", Path(), names, labels, tuple(cell.fold for cell in cells[:5]), names, names, (), "1", ""),
        kind="binary" if arguments.classes == 2 else "multiclass",
        classes=tuple(map(str, range(arguments.classes))),
    )
    whole = features.double().numpy()

    def plain(tolerance: float) -> list[NDArray[np.float64]]:
        found = []
        for cell in cells:
            for strength in STRENGTHS:
                model = make_pipeline(
                    StandardScaler(), LogisticRegression(C=strength, tol=tolerance, max_iter=100_000)
                )
                model.fit(whole[cell.fold.train], labels[cell.fold.train])
                found.append(model.predict_proba(whole[cell.fold.test]))
        return found

    def one_thread(tolerance: float) -> list[NDArray[np.float64]]:
        with threadpool_limits(1):
            return plain(tolerance)

    fold = cells[0].fold
    ours = probabilities(whole, task, fold.train, fold.test)
    furthest = {}
    for tolerance in (1e-4, TOLERANCE):
        furthest[tolerance] = 0.0
        for strength, each in zip(STRENGTHS, ours, strict=True):
            with threadpool_limits(1):
                model = make_pipeline(
                    StandardScaler(), LogisticRegression(C=strength, tol=tolerance, max_iter=100_000)
                )
                theirs = model.fit(whole[fold.train], labels[fold.train]).predict_proba(whole[fold.test])
            difference = np.abs(each - theirs[:, -each.shape[1] :]).max()
            furthest[tolerance] = max(furthest[tolerance], float(difference))

    fits = f"{len(cells) * len(STRENGTHS)} fits"
    device = torch.device("cpu")
    turns: dict[str, Callable[[], list[float]]] = {
        f"{fits}, modan_fast": partial(timed, lambda: judge(features, task, cells), device),
        f"{fits}, scikit-learn, converged, one thread": partial(timed, lambda: one_thread(TOLERANCE), device),
        f"{fits}, scikit-learn, its own tolerance, one thread": partial(timed, lambda: one_thread(1e-4), device),
    }
    if arguments.all_threads:
        turns[f"{fits}, scikit-learn, converged, all threads"] = partial(timed, lambda: plain(TOLERANCE), device)
    own, *others = turns
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        seconds = in_turn(turns, arguments.rounds, "s")
    publish(
        "logistic" if arguments.classes == 2 else f"logistic-{arguments.classes}-classes",
        seconds,
        unit=f"s for {fits}",
        ratios=[(other, own) for other in others],
        notes=[
            f"{arguments.images} images, {arguments.features} features, {arguments.classes} classes, "
            f"{torch.get_num_threads()} threads; a fold trains on seven tenths and tests on two.",
            f"Probabilities of the first fold's test images differ from ours by up to {furthest[TOLERANCE]:.1g} "
            f"where scikit-learn's tolerance is {TOLERANCE:g}, and by up to {furthest[1e-4]:.1g} where it is 1e-4.",
        ],
        arguments=arguments,
        device=device,
    )


if __name__ == "__main__":
    main()
