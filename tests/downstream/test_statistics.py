from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from modan_fast.downstream.metrics import auc
from modan_fast.downstream.predictions import (
    Outcome,
    Predictions,
    by_fold,
    read_finished,
    read_predictions,
)
from modan_fast.downstream.results import Experiment
from modan_fast.downstream.statistics import Comparison, auc_table, comparisons, holm, summaries
from modan_fast.downstream.tasks import FoldRun
from shard_builder.settings import InputError

HEADER = "task,init,recipe,protocol,repeat,fold,image,label,score\n"


def lines(repeat: int, fold: int, labels: str, scores: str, init: str = "scratch") -> str:
    pairs = zip(labels.split(), scores.split(), strict=True)
    return "".join(
        f"nodule,{init},paper,probe,{repeat},{fold},{fold}-{index}.png,{label},{score}\n"
        for index, (label, score) in enumerate(pairs)
    )


def write(tmp_path: Path, *parts: str) -> Path:
    path = tmp_path / "predictions.csv"
    path.write_text(HEADER + "".join(parts))
    return path


FULL = (
    lines(1, 1, "0 0 1 1", "0.1 0.4 0.35 0.8"),  # 3 of 4 pairs in order: 0.75
    lines(1, 2, "0 1", "0.5 0.5"),  # a tie: 0.5
    lines(2, 1, "0 0 1 1", "0.1 0.2 0.3 0.4"),  # 1
    lines(2, 2, "0 1 1", "0.5 0.5 0.9"),  # a tie and a win: 0.75
)


def test_the_table_equals_values_worked_out_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path, *FULL)
    [folds] = by_fold(read_predictions(path), auc).values()
    assert {repeat: aucs.tolist() for repeat, aucs in folds.items()} == {1: [0.75, 0.5], 2: [1.0, 0.75]}
    [row] = auc_table(path.parent)
    assert (row.task, row.recipe, row.protocol, row.init) == ("nodule", "paper", "probe", "scratch")
    # Repeats 0.625 and 0.875; each is 0.125 from their mean, so the sample deviation is sqrt(2 * 0.125**2).
    assert (row.repeats, row.mean, row.std) == (2, 0.75, pytest.approx(0.1767766952966369))
    # The folds' means are 0.875 and 0.625: a quarter of all resamples has twice the lower, a quarter the higher.
    assert row.fold_interval == (0.625, 0.875)
    # Positives from 0.5 on: 1/2, 1/1, 0/2, 2/2. Negatives below: 2/2, 0/1, 2/2, 0/1.
    assert row.sensitivity == pytest.approx(((0.5 + 1) / 2 + (0 + 1) / 2) / 2)
    assert row.specificity == pytest.approx(((1 + 0) / 2 + (1 + 0) / 2) / 2)


def test_the_interval_is_students_t_clipped_to_what_an_auc_can_be() -> None:
    # Student's t with two degrees of freedom has its 97.5 % point at 4.3026527.
    [row] = summaries(predictions_of({"ours": [0.7, 0.75, 0.8]}))
    assert row.interval == pytest.approx((0.75 - 4.3026527 * 0.05 / 3**0.5, 0.75 + 4.3026527 * 0.05 / 3**0.5))
    [row] = summaries(predictions_of({"ours": [0.5, 0.95, 0.95]}))
    assert row.interval == (pytest.approx(0.8 - 4.3026527 * 0.15), 1)  # the deviation is 0.15 * sqrt(3)
    [row] = summaries(predictions_of({"ours": [0.0, 0.5, 1.0]}))
    assert row.interval == (0, 1)


def test_two_repeats_have_a_deviation_but_no_interval(tmp_path: Path) -> None:
    [row] = auc_table(write(tmp_path, *FULL).parent)
    assert (row.repeats, row.std, row.interval) == (2, pytest.approx(0.1767766952966369), None)


def test_one_repeat_has_no_deviation(tmp_path: Path) -> None:
    [row] = auc_table(write(tmp_path, *FULL[:2]).parent)
    assert (row.repeats, row.mean, row.std, row.interval) == (1, 0.625, None, None)


def test_a_repeat_that_lacks_folds_does_not_count(tmp_path: Path) -> None:
    path = write(tmp_path, *FULL[:3], lines(1, 1, "0 1", "0.1 0.9", init="other"))
    assert [(row.init, row.repeats, row.mean) for row in auc_table(path.parent)] == [
        ("scratch", 1, 0.625),
        ("other", 0, None),
    ]


@pytest.mark.parametrize(("labels", "scores"), [("0 0", "0.1 0.2"), ("0 1", "0.1 nan")])
def test_what_cannot_be_computed_is_none(tmp_path: Path, labels: str, scores: str) -> None:
    path = write(tmp_path, *FULL[:3], lines(2, 2, labels, scores))
    [row] = auc_table(path.parent)
    assert (row.repeats, row.mean, row.std, row.interval, row.fold_interval) == (2, None, None, None, None)
    if "nan" in scores:
        assert (row.sensitivity, row.specificity) == (None, None)


def test_repeats_that_an_evaluation_has_not_finished_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, *FULL[:3], lines(2, 2, "0 1", "0.5 0.5"), lines(1, 1, "0 0 1 1", "1 2 3 4", init="other"))
    task = {"test_images": [4, 2]}
    runs = {"format": 1, "settings": {}, "tasks": {"nodule": task}, "inits": {}, "times": []}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    finished, left_out = read_finished(tmp_path)
    assert {experiment.init: sorted(fold_runs) for experiment, fold_runs in finished.items()} == {
        "scratch": [FoldRun(1, 1), FoldRun(1, 2), FoldRun(2, 1), FoldRun(2, 2)]
    }
    assert left_out == 1
    task["test_images"] = [4, 2, 3]  # a third fold is still to come
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    with pytest.raises(InputError, match="has no finished repeat: run the evaluation to its end"):
        read_finished(tmp_path)


def test_a_missing_or_damaged_file_is_named_by_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no predictions at"):
        auc_table(tmp_path)
    with pytest.raises(InputError, match="line 4: damaged"):
        auc_table(write(tmp_path, "".join(FULL[0].splitlines(keepends=True)[:2]), "nodule,scr").parent)
    (tmp_path / "predictions.csv").write_text("a,b\n")
    with pytest.raises(InputError, match="line 1: the columns must be"):
        auc_table(tmp_path)


def predictions_of(aucs: dict[str, list[float]], protocol: str = "probe") -> Predictions:
    """Two folds a repeat whose AUCs are those given; each must be a multiple of 1/20."""

    def outcome(value: float, fold: int) -> Outcome:
        beaten = round(20 * value)  # of 20 negatives, by the one positive
        images = tuple(f"{fold}-{image}.png" for image in range(21))
        return Outcome(np.array([0] * 20 + [1]), np.array([*range(20), beaten - 0.5], np.float64), images)

    return {
        Experiment("nodule", init, "paper", protocol): {
            FoldRun(repeat, fold): outcome(value, fold)
            for repeat, value in enumerate(values, start=1)
            for fold in (1, 2)
        }
        for init, values in aucs.items()
    }


def test_an_init_that_wins_every_repeat_has_the_smallest_p_values_there_are() -> None:
    won = [0.5 + 0.05 * (repeat % 3) for repeat in range(10)]
    lost = [value - 0.05 * (repeat % 4 + 1) for repeat, value in enumerate(won)]
    [compared] = comparisons(predictions_of({"ours": won, "other": lost}), "ours")
    # Of the 2**10 signs that ten differences can have, one is as extreme, and two to both sides.
    assert compared.two_sided == pytest.approx(0.001953, abs=5e-7)
    assert compared.greater == pytest.approx(0.000977, abs=5e-7)
    assert (compared.repeats, compared.effect) == (10, 1)
    [reverse] = comparisons(predictions_of({"ours": won, "other": lost}), "other")
    assert (reverse.two_sided, reverse.greater, reverse.effect) == (compared.two_sided, 1, -1)


def test_ties_share_ranks_and_equal_repeats_drop_out() -> None:
    ours = [0.6, 0.6, 0.6, 0.6, 0.6]
    other = [0.5, 0.7, 0.5, 0.4, 0.6]
    [compared] = comparisons(predictions_of({"ours": ours, "other": other}), "ours")
    # The differences 0.1, -0.1, 0.1 share rank 2, 0.2 has rank 4, 0 drops out: 8 of 10 ranks are positive. Of the
    # 16 signs, positive rank sums of 8 and more come from all positive (10) and one of the twos negative (8, 3 ways).
    assert compared.effect == pytest.approx(0.6)
    assert compared.greater == pytest.approx(4 / 16)
    assert compared.two_sided == pytest.approx(8 / 16)
    assert compared.difference == pytest.approx(0.06)
    assert compared.repeats == 5


def test_p_values_are_scipys_of_the_repeat_means(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    aucs = {init: (generator.permutation(20)[:10] / 20).tolist() for init in ("ours", "a", "b")}
    for compared in comparisons(predictions_of(aucs), "ours"):
        difference = np.round(np.array(aucs["ours"]) - aucs[compared.init], 12)
        assert compared.two_sided == pytest.approx(stats.wilcoxon(difference).pvalue)
        assert compared.greater == pytest.approx(stats.wilcoxon(difference, alternative="greater").pvalue)


def test_inits_that_never_differ_or_share_no_repeat_cannot_be_compared() -> None:
    [same] = comparisons(predictions_of({"ours": [0.5, 0.6], "other": [0.5, 0.6]}), "ours")
    assert (same.difference, same.two_sided, same.greater, same.effect) == (0, None, None, None)
    [none] = comparisons(predictions_of({"ours": [0.5], "other": []}), "ours")
    assert none == Comparison("nodule", "paper", "probe", "other", "ours", 0)


def test_holms_adjustment_equals_a_table_worked_out_by_hand() -> None:
    # In order 0.01, 0.02, 0.03, 0.04: 4 * 0.01, 3 * 0.02, 2 * 0.03, and 1 * 0.04, which may not fall below 0.06.
    assert holm([0.04, 0.01, None, 0.03, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_a_comparison_is_adjusted_for_those_of_its_task_recipe_and_protocol() -> None:
    won = [0.5 + 0.05 * (repeat % 3) for repeat in range(10)]
    worse = [value - 0.05 for value in won]
    both = {
        **predictions_of({"ours": won, "a": worse, "b": worse}),
        **predictions_of({"ours": won, "a": worse}, protocol="finetune"),
        **predictions_of({"a": worse}, protocol="knn"),
    }
    probe_a, probe_b, finetune = comparisons(both, "ours")
    assert probe_a.holm_greater == pytest.approx(2 * 2**-10)
    assert probe_b.holm_two_sided == pytest.approx(2 * 2**-9)
    assert finetune.holm_greater == finetune.greater


def test_the_fold_bootstrap_spans_the_folds_and_is_the_same_each_time() -> None:
    predictions = predictions_of({"ours": [0.7, 0.8]})
    assert summaries(predictions) == summaries(predictions)
    [row] = summaries(predictions)
    assert row.fold_interval == pytest.approx((0.75, 0.75))
