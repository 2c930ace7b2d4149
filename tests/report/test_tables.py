from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from modan_fast.downstream.predictions import read_predictions
from modan_fast.downstream.statistics import comparisons, summaries
from modan_fast.report import paper
from modan_fast.report.formats import Table, file_name, to_csv, to_html, to_latex, to_markdown
from modan_fast.report.tables import comparison_table, number, p_value, paper_table, span, summary_table

METHODS = {"mulsupcon": "ModAn-MulSupCon", "scratch": "Scratch"}


def of(results: Path, protocol: str) -> Table:
    predictions = read_predictions(results / "predictions.csv")
    return paper_table("paper", protocol, summaries(predictions), comparisons(predictions, "mulsupcon"), METHODS)


def test_the_papers_own_figures_stand_beside_ours(results: Path) -> None:
    table = of(results, "finetune")
    rows = {row[1]: row for row in table.rows}
    assert list(rows) == ["ModAn-MulSupCon", "Scratch", "miniRINSimCLR", "miniRIN165", "ImageNet"]
    assert rows["ModAn-MulSupCon"][-2:] == ["0.926", "–"]
    assert rows["Scratch"][-2:] == ["0.884", "<0.05"]
    assert rows["miniRINSimCLR"] == ["–", "miniRINSimCLR", "–", "–", "–", "0.940", "1.000"]
    # mulsupcon wins all ten repeats.
    assert rows["Scratch"][4] == "0.000977"
    assert rows["ModAn-MulSupCon"][4] == "–"


def test_the_published_tables_are_whole() -> None:
    printed = paper.published()
    assert len(printed) == 2 * 3 * 5
    assert {method for _, _, method in printed} == set(paper.METHODS.values())
    assert printed["probe", "thyroid", "ImageNet"] == ("0.609", "0.080")
    assert printed["finetune", "acl", "miniRIN165"] == ("0.630", "<0.05")


@pytest.mark.parametrize(
    ("folder", "task"),
    [("breast", "breast"), ("mrnet-ACL", "acl"), ("thyroid_us", "thyroid"), ("oracle", None), ("lesion", None)],
)
def test_a_task_folder_is_known_by_a_word_of_its_name(folder: str, task: str | None) -> None:
    assert paper.task_of(folder) == task


def test_all_forms_have_the_same_content(results: Path) -> None:
    table = of(results, "probe")
    head, *rows = csv.reader(io.StringIO(to_csv(table)))
    assert head[2:4] == ["breast AUC", "breast 95 % CI"]
    assert rows == [list(row) for row in table.rows]
    for text in (to_markdown(table), to_html(table)):
        for row in rows:
            for entry in row:
                assert entry.replace("<", "&lt;") in text or entry in text
    latex = to_latex(table)
    assert latex.count(r"\\") == len(rows) + 2
    assert all(
        line.count("&") == len(head) - 1 for line in latex.splitlines() if line.startswith(("mul", "scratch"))
    )


def test_what_cannot_be_computed_is_a_dash() -> None:
    assert (number(None), span(None), p_value(None)) == ("–", "–", "–")
    assert comparison_table([]).rows == []
    assert summary_table([]).rows == []


def test_special_characters_are_escaped_in_each_form() -> None:
    table = Table("t", "a_b & c", ["x|y", "<i>"], [["50 %", "p<0.05"]])
    assert r"50 \%" in to_latex(table)
    assert r"p$<$0.05" in to_latex(table)
    assert r"a\_b \& c" in to_latex(table)
    assert r"x\|y" in to_markdown(table)
    assert "&lt;i&gt;" in to_html(table)


def test_a_file_name_leads_to_no_other_folder() -> None:
    assert file_name("table4-released-code.md") == "table4-released-code.md"
    assert file_name("roc-../../home/x-paper.svg") == "roc-.._.._home_x-paper.svg"
