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
from modan_fast.downstream.predictions import Predictions, read_finished
from modan_fast.downstream.results import Results, own_file, own_folder
from modan_fast.downstream.statistics import Row, comparisons, summaries
from modan_fast.folder import check_writable, write_text
from modan_fast.report import paper, tables
from modan_fast.report.formats import Table, shown, to_files, to_html
from modan_fast.report.page_figures import (
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

    progress("report", 0, 4, "tables")
    rows = summaries(predictions)
    main, behind = _tables(predictions, rows, reference, methods)
    times = tables.time_table(runs["times"], logs)
    for table in (*main, *behind, times):
        for name, text in to_files(table).items():
            write_text(out / "tables" / name, text)

    progress("report", 1, 4, "ROC curves")
    roc = plot_roc(figures, predictions)
    progress("report", 2, 4, "learning curves")
    learning = plot_validation_loss(figures, results / "curves.csv") + plot_pretraining_loss(figures, logs)
    speed = plot_speed(figures, logs)
    progress("report", 3, 4, "UMAP")
    umap = plot_umap(figures, runs, next(iter(predictions)).recipe, shards, config, progress)
    progress("report", 4, 4, "")

    sections = {
        "Results": "".join(map(to_html, main)) + _unfinished(unfinished) + _leaks(results),
        "Statistics": "".join(map(to_html, behind)),
        "ROC curves": roc,
        "Pretraining images": umap,
        "Learning curves": learning,
        "Speed": to_html(times) + speed,
        "Provenance": _provenance(runs),
    }
    repeats = max(row.repeats for row in rows)
    version = (runs.get("versions") or {}).get("modan_fast", "")
    write_text(
        page,
        _html(
            f"Downstream results: {', '.join(dict.fromkeys(row.task for row in rows))}",
            f"{len(methods)} inits, up to {repeats} {'repeat' if repeats == 1 else 'repeats'} of five folds, reference "
            f"{reference}. From {results.name}/, evaluated with modan-fast {version}.",
            sections,
        ),
    )
    return page


def _tables(
    predictions: Predictions, rows: Sequence[Row], reference: str, methods: Mapping[str, str | None]
) -> tuple[list[Table], list[Table]]:
    """Tables 4 and 5 of each recipe, and the tables of statistics behind them."""
    compared = comparisons(predictions, reference)
    main = [
        tables.paper_table(recipe, protocol, rows, compared, methods)
        for recipe, protocol in sorted({(row.recipe, row.protocol) for row in rows})
    ]
    return main, [tables.summary_table(rows), tables.comparison_table(compared)]


def _html(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """The page; empty sections are left out."""
    filled = {name: content for name, content in sections.items() if content}
    return PAGE.format(
        mark=MARK,
        title=shown(title),
        lead=shown(lead),
        style=files("modan_fast.report").joinpath("page.css").read_text(encoding="utf-8"),
        links="".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in filled),
        sections="\n".join(
            f'<section id="{_anchor(name)}"><h2>{name}</h2>\n{content}</section>'
            for name, content in filled.items()
        ),
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


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
    """The lines in the log of the run that an init comes from; none if the run is gone.

    Raises `InputError` for lines without the numbers of an epoch.
    """
    path = Path(init["path"]).parent / "log.jsonl" if init.get("path") else None
    if path is None or not os.path.isfile(path):
        return []
    log.info("reading %s, which runs.json names", path)
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{name: float(line[name]) for name in LOGGED} for line in lines]
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
