"""Whether the probes converged: convergence.csv in a results folder, which the evaluation writes beside its scores."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from modan_fast.downstream.results import CONVERGENCE_COLUMNS, Experiment, key_of
from modan_fast.downstream.tasks import FoldRun
from shard_builder.settings import InputError

NAME = "convergence.csv"
STILL_FALLING = 0.01  # of the loss in the last epoch
FAR = 0.05  # from the optimum, in nats of cross-entropy


@dataclass(frozen=True)
class Convergence:
    """How far the probes of an experiment came, as means over its `trainings`.

    `falling` of them lost more than 1 % of their training loss in the last epoch. `loss` is the training loss after it,
    `optimum` the lowest one of the same problem: softmax regression on the same features and images, without a penalty.
    """

    task: str
    recipe: str
    protocol: str
    init: str
    trainings: int
    falling: int
    loss: float
    optimum: float

    @property
    def distance(self) -> float:
        """The loss above the optimum."""
        return self.loss - self.optimum

    @property
    def converged(self) -> bool:
        """Whether no loss still fell, and their mean is at the optimum; one that is no number did not converge."""
        return not self.falling and self.distance <= FAR


def read_convergence(folder: Path) -> list[Convergence]:
    """A row for each experiment in a folder's convergence.csv, in its order; none without that file.

    Raises `InputError` for a damaged file. A last line that a kill has cut short is left out.
    """
    path = folder / NAME
    if not os.path.lexists(path):
        return []
    found: dict[Experiment, dict[FoldRun, tuple[float, float, float]]] = defaultdict(dict)
    try:
        if not os.path.isfile(path):
            raise ValueError("no file")
        content = path.read_text(encoding="utf-8")
        head, *rows = csv.reader(content[: content.rfind("\n") + 1].splitlines())
        if tuple(head) != CONVERGENCE_COLUMNS:
            raise ValueError(f"the columns must be {','.join(CONVERGENCE_COLUMNS)}")
        for *key, repeat, fold, last, before, optimum in rows:
            experiment, fold_run = key_of(key, repeat, fold)
            found[experiment][fold_run] = float(last), float(before), float(optimum)
    except (ValueError, TypeError, csv.Error, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): the same evaluation again repairs it") from error
    return [_summary(experiment, list(losses.values())) for experiment, losses in found.items()]


def _summary(experiment: Experiment, losses: list[tuple[float, float, float]]) -> Convergence:
    return Convergence(
        **experiment._asdict(),
        trainings=len(losses),
        # So that a loss that is no number counts as falling.
        falling=sum(not before - last <= STILL_FALLING * before for last, before, _ in losses),
        loss=sum(last for last, _, _ in losses) / len(losses),
        optimum=sum(optimum for _, _, optimum in losses) / len(losses),
    )
