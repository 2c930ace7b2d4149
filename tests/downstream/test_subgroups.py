"""NAME-images.csv: patients of the intervals, and metrics by subgroup."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from modan_fast.downstream.predictions import Outcome, Predictions
from modan_fast.downstream.results import Experiment
from modan_fast.downstream.statistics import comparisons, subgroup_rows, summaries
from modan_fast.downstream.subgroups import Images, read_images
from modan_fast.downstream.tasks import FoldRun
from shard_builder.settings import InputError

FOLDS, N = 2, 20


def predictions(protocol: str = "probe", classes: int = 1, repeats: int = 3) -> Predictions:
    """Two inits on two folds of 20 images; `ours` knows more."""
    generator = np.random.default_rng(0)

    def outcome(fold: int, known: float) -> Outcome:
        labels = np.arange(N) % max(2, classes)
        scores = generator.normal(known * labels, 1, N)
        if classes > 1:
            scores = generator.normal(0, 1, (N, classes)) + known * (labels[:, None] == range(classes))
        return Outcome(labels, 1 / (1 + np.exp(-scores)), tuple(f"{fold}-{image}.png" for image in range(N)))

    return {
        Experiment("lesion", init, "paper", protocol): {
            FoldRun(repeat, fold): outcome(fold, known)
            for repeat in range(1, repeats + 1)
            for fold in range(1, FOLDS + 1)
        }
        for init, known in (("ours", 1.5), ("other", 0.5))
    }


def images(value_of: dict[str, str]) -> dict[str, Images]:
    return {"lesion": Images(subgroups={"site": value_of})}


NAMES = [f"{fold}-{image}.png" for fold in (1, 2) for image in range(N)]


def test_a_subgroups_metrics_are_those_of_its_images_averaged_over_folds_and_repeats() -> None:
    site = {name: "north" if int(name[2:-4]) < 12 else "south" for name in NAMES}
    made = predictions()
    rows = subgroup_rows(made, images(site))
    assert [(row.init, row.value, row.images, row.counts, row.folds) for row in rows] == [
        ("ours", "north", 24, (12,), 2),
        ("ours", "south", 16, (8,), 2),
        ("other", "north", 24, (12,), 2),
        ("other", "south", 16, (8,), 2),
    ]
    outcomes = made[Experiment("lesion", "ours", "paper", "probe")].values()
    wanted = np.mean([roc_auc_score(each.labels[:12], each.scores[:12]) for each in outcomes])
    assert rows[0].metrics["AUC"] == pytest.approx(wanted)


def test_folds_that_leave_a_value_out_give_a_row_for_each_value() -> None:
    site = {name: f"hospital {name[0]}" for name in NAMES}
    made = predictions()
    first, second = subgroup_rows(made, images(site))[:2]
    outcomes = made[Experiment("lesion", "ours", "paper", "probe")]
    for row, fold in ((first, 1), (second, 2)):
        aucs = [roc_auc_score(*outcomes[FoldRun(repeat, fold)][:2]) for repeat in (1, 2, 3)]
        assert (row.images, row.folds, row.metrics["AUC"]) == (N, 1, pytest.approx(np.mean(aucs)))


def test_a_subgroup_without_both_classes_has_dashes_and_images_without_a_value_are_in_none() -> None:
    site = {name: "all positive" for name in NAMES if int(name[2:-4]) % 2}
    [row, _] = subgroup_rows(predictions(), images(site))
    assert (row.images, row.counts, row.folds, row.metrics["AUC"], row.metrics["F1"] is None) == (
        20,
        (20,),
        0,
        None,
        False,
    )
    assert 0 <= (row.metrics["Brier score"] or -1) <= 1


def test_several_classes_are_counted_each_and_few_labels_have_no_subgroups() -> None:
    site = dict.fromkeys(NAMES, "north")
    row = subgroup_rows(predictions(classes=4), images(site))[0]
    assert row.counts == (10, 10, 10, 10)
    assert subgroup_rows(predictions("logistic:5"), images(site)) == []
    assert subgroup_rows(predictions(), {}) == []


def test_intervals_are_over_patients_where_they_are_named_and_else_over_images() -> None:
    patients = {name: f"{name[0]}-{int(name[2:-4]) // 4}" for name in NAMES}
    [over_images, _], [over_patients, _] = (
        summaries(predictions()),
        summaries(predictions(), {"lesion": Images(patients)}),
    )
    assert (over_images.units, over_patients.units) == ("images", "patients")
    assert over_images.patient_interval != over_patients.patient_interval
    for row in (over_images, over_patients):
        assert row.patient_interval is not None
        assert row.mean is not None
        assert 0 <= row.patient_interval[0] < row.mean < row.patient_interval[1] <= 1
    # The interval over the repeats does not know of patients.
    assert over_images.interval == over_patients.interval


def test_the_bootstrap_of_a_difference_takes_the_same_patients_for_both() -> None:
    made = predictions()
    [compared] = comparisons(made, "ours")
    [reverse] = comparisons(made, "other")
    assert compared.patient_interval is not None
    assert reverse.patient_interval is not None
    assert compared.patient_interval == pytest.approx([-each for each in reverse.patient_interval[::-1]])
    assert compared.delong == reverse.delong == compared.holm_delong
    assert compared.delong is not None
    assert 0 < compared.delong < 0.05
    twin = {key: made[Experiment("lesion", "ours", "paper", "probe")] for key in made}
    [same] = comparisons(twin, "ours")
    assert (same.patient_interval, same.delong) == ((0, 0), None)


def test_a_few_label_row_has_the_spread_over_tries_and_folds_and_is_not_compared() -> None:
    made = predictions("logistic:5")
    row = summaries(made)[0]
    outcomes = made[Experiment("lesion", "ours", "paper", "logistic:5")].values()
    aucs = [roc_auc_score(each.labels, each.scores) for each in outcomes]
    assert (row.labels, row.repeats, row.folds, row.metrics) == (5, 3, 2, {})
    assert (row.mean, row.spread) == (pytest.approx(np.mean(aucs)), pytest.approx(np.std(aucs, ddof=1)))
    assert comparisons(made, "ours") == []


def test_the_auc_of_each_class_is_averaged_over_folds_and_repeats() -> None:
    made = predictions(classes=3)
    row = summaries(made)[0]
    outcomes = made[Experiment("lesion", "ours", "paper", "probe")].values()
    wanted = [
        np.mean([roc_auc_score(each.labels == index, each.scores[:, index]) for each in outcomes])
        for index in range(3)
    ]
    assert row.class_aucs == pytest.approx(tuple(wanted))
    assert row.mean == pytest.approx(np.mean(wanted))


def test_images_are_read_with_patients_and_subgroups_where_they_have_them(tmp_path: Path) -> None:
    assert read_images(tmp_path) == {}
    (tmp_path / "lesion-images.csv").write_text("image,patient,site\na.png,p1,north\nb.png,,\n")
    found = read_images(tmp_path)["lesion"]
    assert (found.patients, found.subgroups) == ({"a.png": "p1"}, {"site": {"a.png": "north"}})


@pytest.mark.parametrize(
    "content",
    ["", "image\n", "image,patient,site,site\n", "image,patient,site\na.png,p1\n", "image,patient\n\udc80,p\n"],
)
def test_a_damaged_list_of_images_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "lesion-images.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"lesion-images\.csv is no list of images .* the same evaluation again"):
        read_images(tmp_path)


def test_a_column_of_too_many_values_is_refused(tmp_path: Path) -> None:
    rows = "".join(f"{number}.png,p,{number}\n" for number in range(51))
    (tmp_path / "lesion-images.csv").write_text(f"image,patient,serial\n{rows}")
    with pytest.raises(InputError, match="column serial has 51 values, over 50: it names no subgroups"):
        read_images(tmp_path)
