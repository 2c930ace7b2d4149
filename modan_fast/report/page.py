"""report.html: one HTML page with all tables and figures of a results folder, which are also written as files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from modan_fast.config import ReportConfig
from modan_fast.downstream import leaks
from modan_fast.downstream.convergence import Convergence, read_convergence
from modan_fast.downstream.predictions import Predictions, read_finished
from modan_fast.downstream.results import Results, own_file, own_folder
from modan_fast.downstream.statistics import Row, SubgroupRow, comparisons, subgroup_rows, summaries
from modan_fast.downstream.subgroups import Images, read_images
from modan_fast.folder import check_writable, write_text
from modan_fast.report import paper, tables
from modan_fast.report.formats import Table, shown, to_files, to_html
from modan_fast.report.page_figures import (
    plot_calibration,
    plot_few_labels,
    plot_forest,
    plot_monitor,
    plot_pretraining_loss,
    plot_roc,
    plot_speed,
    plot_umap,
    plot_validation_loss,
)
from modan_fast.shards import open_shards
from shard_builder.settings import InputError, Progress, no_progress

log = logging.getLogger(__name__)

LOGGED = ("loss", "seconds", "views_per_second")
MONITOR = "monitor/"  # before the names of the monitor's numbers in a log
MOST_ROWS = 24  # of a table that is not folded
NO_RUNS: dict[str, Any] = {"inits": {}, "tasks": {}, "settings": {}, "times": []}
MARK = '<meta name="generator" content="modan-fast report">'
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{mark}
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{title}</h1>
<p class="lead">{lead}</p></header>
<nav aria-label="Sections">{links}</nav>
<main>
{sections}
</main>
</body>
</html>
"""


def write_report(results: Path, config: ReportConfig, progress: Progress = no_progress) -> Path:
    """Write report.html with its tables/ and figures/ from a results folder; return the page's path.

    The same results give the same files. Raises `InputError` if there are no results, if the reference is none of
    their inits, and if a part of the output is a link. If the UMAP cannot be made, the page states why.
    """
    predictions, unfinished = read_finished(results)
    out = config.out or results
    check_writable(out)
    page, figures = own_file(out / "report.html"), own_folder(out / "figures")
    own_folder(out / "tables")
    shards = open_shards(config.shards) if config.shards else None
    if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{page} was written by another program: choose another folder with `out`")
    # Predictions alone are enough for tables and ROC curves.
    runs = Results.open(results).runs if os.path.lexists(results / "runs.json") else NO_RUNS
    methods = {init: _method(init, runs) for init in dict.fromkeys(each.init for each in predictions)}
    reference = _reference(config.reference, methods)
    logs = {name: lines for name, init in runs["inits"].items() if (lines := _log(init))}
    figures.mkdir(parents=True, exist_ok=True)

    names = list(methods)  # an init has the same colour in all figures

    progress("report", 0, 4, "tables")
    images = read_images(results)
    converged = read_convergence(results)
    rows, groups = summaries(predictions, images), subgroup_rows(predictions, images)
    whole = [row for row in rows if row.labels is None]
    main, behind = _tables(predictions, rows, reference, methods, images)
    times = tables.time_table(runs["times"], logs)
    few = [tables.few_label_table(rows)] if len(whole) < len(rows) else []
    late = [tables.convergence_table(converged)] if converged else []
    files_only = [tables.all_subgroups(groups)] if groups else []
    of_tasks = {
        key: _task_tables(*key, rows, groups, runs)
        for key in dict.fromkeys((row.task, row.recipe) for row in whole)
    }
    for table in (
        *main,
        *behind,
        *few,
        *late,
        *files_only,
        times,
        *(each for kept in of_tasks.values() for each in kept),
    ):
        for name, text in to_files(table).items():
            write_text(out / "tables" / name, text)

    progress("report", 1, 4, "curves")
    forest = plot_forest(figures, rows, names)
    roc, calibration = plot_roc(figures, predictions, names), plot_calibration(figures, predictions, names)
    curves = plot_few_labels(figures, rows, names)
    progress("report", 2, 4, "learning curves")
    learning = plot_validation_loss(figures, results / "curves.csv") + plot_pretraining_loss(figures, logs)
    learning += plot_monitor(figures, logs)
    speed = plot_speed(figures, logs)
    progress("report", 3, 4, "UMAP")
    umap = plot_umap(figures, runs, next(iter(predictions)).recipe, shards, config, progress)
    progress("report", 4, 4, "")

    of_task: dict[str, str] = {}
    for (task, recipe), kept in of_tasks.items():
        first, *rest = map(_folded, kept)
        warning = tables.convergence_warning(task, recipe, converged)
        figures_of = "".join(each.get((task, recipe), "") for each in (roc, calibration, curves))
        text = first + (_note(warning) if warning else "") + figures_of + "".join(rest)
        of_task[task] = of_task.get(task, "") + text
    sections = [
        ("results", "Results", _unfinished(unfinished) + _leaks(results) + _late(converged) + forest),
        *(
            (f"task-{number}", f"Task {task}", text)
            for number, (task, text) in enumerate(of_task.items(), start=1)
        ),
        ("paper", "The paper's tables", "".join(map(to_html, main)) + (_late(converged) if main else "")),
        ("statistics", "Statistics", "".join(map(_folded, [*behind, *few, *late]))),
        ("umap", "Pretraining images", umap),
        ("learning", "Learning curves", learning),
        ("speed", "Speed", _folded(times) + speed),
        ("provenance", "Provenance", _provenance(runs)),
    ]
    version = (runs.get("versions") or {}).get("modan_fast", "")
    write_text(
        page,
        _html(
            f"Downstream results: {', '.join(dict.fromkeys(row.task for row in rows))}",
            f"{len(methods)} inits, {_counted(whole or rows)}, reference {reference}. From {results.name}/, evaluated "
            f"with modan-fast {version}.",
            sections,
        ),
    )
    return page


def _tables(
    predictions: Predictions,
    rows: Sequence[Row],
    reference: str,
    methods: Mapping[str, str | None],
    images: Mapping[str, Images] | None = None,
) -> tuple[list[Table], list[Table]]:
    """Tables 4 and 5 of each recipe, of tasks of two classes, and the tables of statistics behind them."""
    compared = comparisons(predictions, reference, images)
    binary = [row for row in rows if row.protocol in paper.TABLES and len(row.class_aucs) < 2]
    main = [
        tables.paper_table(recipe, protocol, binary, compared, methods)
        for recipe, protocol in sorted({(row.recipe, row.protocol) for row in binary})
    ]
    return main, [tables.summary_table(rows), tables.comparison_table(compared)]


def _task_tables(
    task: str, recipe: str, rows: Sequence[Row], groups: Sequence[SubgroupRow], runs: Mapping[str, Any]
) -> list[Table]:
    """The tables of a task under a recipe: metrics, then those of classes and subgroups, if it has any."""
    classes = runs["tasks"].get(task, {}).get("classes") or ()
    further = [tables.class_table(task, recipe, rows, classes), tables.subgroup_table(task, recipe, groups)]
    return [tables.metric_table(task, recipe, rows), *(table for table in further if table.rows)]


def _counted(rows: Sequence[Row]) -> str:
    """How many repeats of how many folds there are at most."""
    repeats, folds = max(row.repeats for row in rows), max(row.folds for row in rows)
    words = {1: "one fold", 5: "five folds"}
    return f"up to {repeats} {'repeat' if repeats == 1 else 'repeats'} of {words.get(folds, f'{folds} folds')}"


def _folded(table: Table) -> str:
    """The table as HTML; a long one is folded away."""
    if len(table.rows) <= MOST_ROWS:
        return to_html(table)
    return f"<details><summary>{shown(table.title)} ({len(table.rows)} lines)</summary>{to_html(table)}</details>"


def _late(converged: Sequence[Convergence]) -> str:
    """A note if probes did not converge."""
    late = dict.fromkeys(row.task for row in converged if not row.converged)
    if not late:
        return ""
    return _note(f"The probe did not converge on {', '.join(late)}: see the section of each task.")


def _html(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The page; `sections` are anchors, headings and contents, and empty ones are left out."""
    filled = [(anchor, shown(name), content) for anchor, name, content in sections if content]
    return PAGE.format(
        mark=MARK,
        title=shown(title),
        lead=shown(lead),
        style=files("modan_fast.report").joinpath("page.css").read_text(encoding="utf-8"),
        links="".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in filled),
        sections="\n".join(
            f'<section id="{anchor}"><h2>{name}</h2>\n{content}</section>' for anchor, name, content in filled
        ),
    )


def _reference(asked: str | None, methods: Mapping[str, str | None]) -> str:
    """The init to compare with: as asked, else the first one of the paper's method, else the first."""
    if asked is None:
        ours = paper.METHODS["mulsupcon"]
        return next((init for init, method in methods.items() if method == ours), next(iter(methods)))
    if asked not in methods:
        raise InputError(f"`reference={asked}` is none of the inits judged: {', '.join(methods)}")
    return asked


def _method(init: str, runs: Mapping[str, Any]) -> str | None:
    """The paper's name of an init's method."""
    return paper.METHODS.get(runs["inits"].get(init, {}).get("method") or init)


def _log(init: Mapping[str, Any]) -> list[dict[str, float]]:
    """The lines in the log of the run that an init comes from, with the monitor's numbers; none if the run is gone.

    Raises `InputError` for lines without the numbers of an epoch.
    """
    path = Path(init["path"]).parent / "log.jsonl" if init.get("path") else None
    if path is None or not os.path.isfile(path):
        return []
    log.info("reading %s, which runs.json names", path)
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            {
                **{name: float(line[name]) for name in LOGGED},
                **{name: float(value) for name, value in line.items() if name.startswith(MONITOR)},
                "epoch": float(line.get("epoch", number)),
            }
            for number, line in enumerate(lines, start=1)
        ]
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError, OSError) as error:
        raise InputError(f"{path} is no readable log ({error}): restore it, or move it away") from error


def _unfinished(fold_runs: int) -> str:
    if not fold_runs:
        return ""
    return _note(f"The evaluation is not finished: {fold_runs} trainings of unfinished repeats are left out.")


def _leaks(results: Path) -> str:
    """A note for each task whose folds have leaks, as the evaluation listed them."""
    notes = []
    for path in sorted(results.glob(f"*{leaks.ENDING}")):
        task, found = path.name.removesuffix(leaks.ENDING), leaks.describe(leaks.read_leaks(path))
        notes.append(f"{task}: {found} ({path.name}). Its AUCs may be too high, for all inits alike.")
    return "".join(map(_note, notes))


def _note(text: str) -> str:
    return f'<p class="note">{shown(text)}</p>'


def _provenance(runs: Mapping[str, Any]) -> str:
    """Inits, tasks, settings and versions."""
    facts: list[tuple[str, str]] = []
    for name, init in runs["inits"].items():
        known = [
            f"{key} {init[key]}" for key in ("kind", "method", "path", "architecture", "stem") if init.get(key)
        ]
        normalized = (init.get("normalized") or {}).items()
        known += [f"{'' if each else 'not '}normalised in {recipe}" for recipe, each in normalized]
        facts.append((name, ", ".join([*known, *_digest(init)])))
    for name, task in runs["tasks"].items():
        positive = [f"positive class {task['positive']}"] if task.get("positive") else []
        images = [f"{task['images']} images"] if "images" in task else []
        facts.append((name, ", ".join([*images, *positive, *_digest(task)])))
    facts += [(f"recipe {recipe}", _listed(settings)) for recipe, settings in runs["settings"].items()]
    facts.append(("versions", _listed(runs.get("versions") or {})))
    lines = "".join(f"<dt>{shown(name)}</dt><dd>{shown(text)}</dd>\n" for name, text in facts)
    return f"<dl>{lines}</dl>"


def _digest(record: Mapping[str, Any]) -> list[str]:
    return [f"SHA-256 {record['sha256'][:12]}"] if record.get("sha256") else []


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
