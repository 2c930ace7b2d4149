"""The AUC table that `evaluate` prints."""

from pathlib import Path

from modan_fast.cli.screen import print_aucs
from modan_fast.downstream.statistics import Row


def test_the_table_has_both_intervals_and_few_labels_a_table_of_their_own(capsys):
    key = ("breast", "paper")
    rows = [
        Row(*key, "logistic", "scratch", 3, 0.75, 0.1, interval=(0.7, 0.8), patient_interval=(0.61, 0.82)),
        Row(*key, "probe", "scratch", 2, None, None),
        Row(*key, "logistic:5", "scratch", 4, 0.6541, None, labels=5, spread=0.02),
    ]
    print_aucs(Path("results"), rows)
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "scratch" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["breast", "paper", "logistic", "scratch", "3", "0.750", "0.700 to 0.800", "0.610 to 0.820"],
        ["breast", "paper", "probe", "scratch", "2", "–", "–", "–"],
        ["breast", "paper", "logistic", "scratch", "5", "4", "0.654", "0.020"],
    ]


def test_the_heading_says_whether_patients_or_images_are_resampled(capsys):
    for units in ("patients", "images"):
        print_aucs(Path("results"), [Row("breast", "paper", "probe", "scratch", 1, 0.5, None, units=units)])
        assert f"CI, {units}" in capsys.readouterr().out.replace("\n", " ")
    print_aucs(Path("results"), [])
    assert capsys.readouterr().out == ""
