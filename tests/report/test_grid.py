"""The report of three encoders, three kinds of tasks, four protocols, few labels, subgroups and a monitored run."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html import escape
from pathlib import Path

import pytest

from modan_fast.config import ReportConfig
from modan_fast.downstream.predictions import read_finished
from modan_fast.downstream.statistics import summaries
from modan_fast.downstream.subgroups import read_images
from modan_fast.report.page import write_report

TASKS = ("breast", "kidney", "hemorrhage")


@pytest.fixture(scope="module")
def site(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report's folder."""
    return write_report(grid, ReportConfig(samples=0, out=tmp_path_factory.mktemp("site"))).parent


def rows_of(site: Path, name: str) -> list[dict[str, str]]:
    with (site / "tables" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_table_and_figure_is_there_and_on_the_page(site: Path) -> None:
    figures = {path.name for path in (site / "figures").iterdir()}
    wanted = {"forest.svg", "monitor.svg", "pretraining-loss.svg", "pretraining-speed.svg", "validation-loss.svg"}
    assert figures == wanted | {
        f"{kind}-{task}-paper.svg" for kind in ("roc", "calibration", "few-labels") for task in TASKS
    }
    text = (site / "report.html").read_text()
    assert text.count("<img ") == len(figures)
    assert re.findall(r"(?:src|href)=\"(?!#|data:)", text) == []
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings[:4] == ["Results", "Task breast", "Task kidney", "Task hemorrhage"]
    assert text.index("figures/forest.svg") < text.index("<h2>Task breast")
    tables = {path.stem for path in (site / "tables").iterdir()}
    assert {"subgroups", "few-labels", "convergence", "inits", "comparisons", "times"} < tables
    assert {f"metrics-{task}-paper" for task in TASKS} < tables


def test_the_tables_have_the_numbers_of_the_statistics(grid: Path, site: Path) -> None:
    summary = {
        (row.task, row.protocol, row.init): row
        for row in summaries(read_finished(grid)[0], read_images(grid))
        if row.labels is None
    }
    for task in TASKS:
        rows = rows_of(site, f"metrics-{task}-paper.csv")
        assert len(rows) == 12
        row = summary[task, "logistic", "scratch"]
        [line] = [each for each in rows if (each["protocol"], each["init"]) == ("logistic regression", "scratch")]
        assert row.patient_interval is not None
        low, high = row.patient_interval
        assert (line["AUC"], line["95 % CI, patients"]) == (f"{row.mean:.3f}", f"[{low:.3f}, {high:.3f}]")
        assert line["Brier"] == f"{row.metrics['Brier score']:.3f}"
    [line] = [
        each
        for each in rows_of(site, "classes-kidney-paper.csv")
        if (each["protocol"], each["init"]) == ("nearest neighbours", "imagenet")
    ]
    aucs = [f"{each:.3f}" for each in summary["kidney", "knn", "imagenet"].class_aucs]
    assert [line[name] for name in ("cyst", "normal", "stone", "tumour")] == aucs
    assert not (site / "tables" / "classes-breast-paper.csv").exists()


def test_subgroups_and_few_labels_have_a_line_each(site: Path) -> None:
    lines = rows_of(site, "subgroups.csv")
    assert len(lines) == 3 * 3 * 4 * 4
    assert {(line["column"], line["value"]) for line in lines} == {
        *(("institution", "north"), ("institution", "south"), ("sex", "f"), ("sex", "m"))
    }
    head = rows_of(site, "subgroups-breast-paper.csv")[0]
    assert [name.split(" (")[0] for name in head] == [
        *("protocol", "init", "institution north", "institution south", "sex f", "sex m")
    ]
    few = rows_of(site, "few-labels.csv")
    assert len(few) == 3 * 3 * 2 * 4
    assert [line["labels a class"] for line in few[:12]] == [*"111", *"555", *["10"] * 3, *["25"] * 3]


def test_the_papers_tables_are_of_its_protocols_and_of_tasks_of_two_classes(site: Path) -> None:
    papers = [path.name for path in (site / "tables").glob("table*.csv")]
    assert sorted(papers) == ["table4-paper.csv", "table5-paper.csv"]
    assert [*rows_of(site, "table5-paper.csv")[0]][2:4] == ["breast AUC", "breast 95 % CI"]


def test_each_probe_that_did_not_converge_is_named_beside_its_results(site: Path) -> None:
    text = (site / "report.html").read_text()
    assert "The probe did not converge on breast, kidney, hemorrhage" in text
    section = text[text.index("<h2>Task kidney") : text.index("<h2>Task hemorrhage")]
    assert "mulsupcon 15 of 15, loss 0.610, optimum 0.200" in section


def test_an_older_folder_says_nothing_of_convergence_subgroups_or_a_monitor(results: Path) -> None:
    text = write_report(results, ReportConfig(samples=0)).read_text()
    assert "converge" not in text
    assert "subgroup" not in text
    assert "monitor" not in text
    assert "95 % CI, images" in text


def test_a_task_with_tags_in_its_name_cannot_break_the_page(grid: Path, tmp_path: Path) -> None:
    folder, evil = tmp_path / "results", "<b>task"
    shutil.copytree(grid, folder)
    for name in ("predictions.csv", "curves.csv", "convergence.csv"):
        lines = [
            line for line in (folder / name).read_text().splitlines(keepends=True) if ",logistic:" not in line
        ]
        kept = [line for line in lines if not line.startswith(("kidney", "hemorrhage")) and ",knn" not in line]
        (folder / name).write_text("".join(kept).replace("breast,", f"{evil},"))
    runs = json.loads((folder / "runs.json").read_text())
    runs["tasks"] = {}
    (folder / "runs.json").write_text(json.dumps(runs))
    text = write_report(folder, ReportConfig(samples=0)).read_text()
    assert evil not in text
    assert f"<h2>Task {escape(evil)}</h2>" in text


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_everything_fits_the_width_of_a_browser(site: Path, in_browser, width: int) -> None:
    text = (site / "report.html").read_text()
    shown = in_browser(text, width)
    assert "CONSOLE" not in shown.stderr
    assert f'data-widths="{width} {width}"' in shown.stdout
    assert f'data-images="{text.count("<img ")}"' in shown.stdout
