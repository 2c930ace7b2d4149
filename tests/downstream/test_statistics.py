from __future__ import annotations

from pathlib import Path

import pytest

from modan_fast.downstream.statistics import Row, auc_table, fold_aucs
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
    [folds] = fold_aucs(path).values()
    assert folds == {1: {1: 0.75, 2: 0.5}, 2: {1: 1.0, 2: 0.75}}
    # Repeats 0.625 and 0.875; each is 0.125 from their mean, so the sample deviation is sqrt(2 * 0.125**2).
    assert auc_table(path) == [
        Row("nodule", "paper", "probe", "scratch", 2, 0.75, pytest.approx(0.1767766952966369))
    ]


def test_one_repeat_has_no_deviation(tmp_path: Path) -> None:
    assert auc_table(write(tmp_path, *FULL[:2])) == [Row("nodule", "paper", "probe", "scratch", 1, 0.625, None)]


def test_a_repeat_that_lacks_folds_does_not_count(tmp_path: Path) -> None:
    path = write(tmp_path, *FULL[:3], lines(1, 1, "0 1", "0.1 0.9", init="other"))
    assert auc_table(path) == [
        Row("nodule", "paper", "probe", "scratch", 1, 0.625, None),
        Row("nodule", "paper", "probe", "other", 0, None, None),
    ]


@pytest.mark.parametrize(("labels", "scores"), [("0 0", "0.1 0.2"), ("0 1", "0.1 nan")])
def test_what_cannot_be_computed_is_none(tmp_path: Path, labels: str, scores: str) -> None:
    path = write(tmp_path, *FULL[:3], lines(2, 2, labels, scores))
    assert auc_table(path) == [Row("nodule", "paper", "probe", "scratch", 2, None, None)]


def test_a_missing_or_damaged_file_is_named_by_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no predictions at"):
        auc_table(tmp_path / "predictions.csv")
    with pytest.raises(InputError, match="line 4: damaged"):
        auc_table(write(tmp_path, "".join(FULL[0].splitlines(keepends=True)[:2]), "nodule,scr"))
    (tmp_path / "predictions.csv").write_text("a,b\n")
    with pytest.raises(InputError, match="line 1: the columns must be"):
        auc_table(tmp_path / "predictions.csv")
