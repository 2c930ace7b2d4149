"""The HTML page of a results folder, with all tables and figures, which are also written as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from modan_fast.config import ReportConfig
from modan_fast.downstream.results import Results
from modan_fast.downstream.statistics import comparisons, read_finished, summaries
from modan_fast.downstream.tasks import leak_counts, read_leaks
from modan_fast.folder import check_writable, write_text
from modan_fast.report import formats, paper, tables
from modan_fast.report.plots import plot_curves, plot_roc, plot_speed, plot_umap
from modan_fast.shards import open_shards
from shard_builder.settings import InputError, Progress, no_progress

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
    """Write report.html with its tables/ and figures/ from a results folder; the page's path.

    The same results give the same files. Raises `InputError` where there are no results, or the reference is none
    of their inits. What only the UMAP needs may be missing; the page then says so.
    """
    predictions, unfinished = read_finished(results)
    out = config.out or results
    check_writable(out)
    shards = open_shards(config.shards) if config.shards else None
    page = out / "report.html"
    if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{page} was written by another program: choose another folder with `out`")
    # Predictions alone make tables and ROC curves.
    runs = Results.open(results).runs if (results / "runs.json").exists() else NO_RUNS
    methods = {init: _method(init, runs) for init in dict.fromkeys(series.init for series in predictions)}
    reference = _reference(config.reference, methods)
    (out / "tables").mkdir(parents=True, exist_ok=True)
    (out / "figures").mkdir(exist_ok=True)

    progress("report", 0, 4, "tables")
    rows, compared = summaries(predictions), comparisons(predictions, reference)
    logs = {name: log for name, init in runs["inits"].items() if (log := _log(init))}
    published = [
        tables.paper_table(recipe, protocol, rows, compared, methods)
        for recipe, protocol in sorted({(row.recipe, row.protocol) for row in rows})
    ]
    behind = [tables.summary_table(rows), tables.comparison_table(compared)]
    times = tables.time_table(runs["times"], logs)
    for table in (*published, *behind, times):
        for name, text in formats.write(table).items():
            write_text(out / "tables" / name, text)

    progress("report", 1, 4, "ROC curves")
    roc = plot_roc(out / "figures", predictions)
    progress("report", 2, 4, "learning curves")
    learning = plot_curves(out / "figures", results / "curves.csv", logs)
    speed = plot_speed(out / "figures", logs)
    progress("report", 3, 4, "UMAP")
    umap = plot_umap(out / "figures", runs, next(iter(predictions)).recipe, shards, config, progress)
    progress("report", 4, 4, "")

    sections = [
        ("Results", "".join(map(formats.to_html, published)) + _unfinished(unfinished) + _leakage(results)),
        ("Statistics", "".join(map(formats.to_html, behind))),
        ("ROC curves", roc),
        ("Pretraining images", umap),
        ("Learning curves", learning),
        ("Speed", formats.to_html(times) + speed),
        ("What was judged", _provenance(runs)),
    ]
    repeats = max(row.repeats for row in rows)
    text = PAGE.format(
        mark=MARK,
        title=f"Encoders judged: {escape(', '.join(dict.fromkeys(row.task for row in rows)))}",
        lead=escape(
            f"{len(methods)} inits, at most {repeats} {'repeat' if repeats == 1 else 'repeats'} of five folds, "
            f"compared with {reference}. Made by modan-fast {runs.get('versions', {}).get('modan_fast', '')} from "
            f"{results.name}/."
        ),
        style=files("modan_fast.report").joinpath("page.css").read_text(encoding="utf-8"),
        links="".join(f'<a href="#{_anchor(name)}">{name}</a>' for name, content in sections if content),
        sections="\n".join(
            f'<section id="{_anchor(name)}"><h2>{name}</h2>\n{content}</section>'
            for name, content in sections
            if content
        ),
    )
    write_text(page, text)
    return page


def _reference(asked: str | None, methods: Mapping[str, str | None]) -> str:
    """The init to compare with: as asked, or the first one of the paper's method, or else the first."""
    if asked is None:
        return next(
            (init for init, method in methods.items() if method == paper.METHODS["mulsupcon"]),
            next(iter(methods)),
        )
    if asked not in methods:
        raise InputError(f"`reference={asked}` is none of the inits judged: {', '.join(methods)}")
    return asked


def _method(init: str, runs: Mapping[str, Any]) -> str | None:
    """The paper's name of an init's method."""
    return paper.METHODS.get(runs["inits"].get(init, {}).get("method") or init)


def _log(init: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The epochs in the log of the run that an init comes from, if it is still there."""
    path = Path(init["path"]).parent / "log.jsonl" if "path" in init else None
    if path is None or not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise InputError(f"{path} is no readable log ({error}): restore it, or move it away") from error


def _unfinished(trainings: int) -> str:
    """That some trainings are of repeats that are not finished."""
    note = f"The evaluation is not finished: {trainings} trainings of unfinished repeats are left out."
    return f'<p class="note">{note}</p>' if trainings else ""


def _leakage(results: Path) -> str:
    """What the evaluation found of images that train and test share."""
    notes = []
    for path in sorted(results.glob("*-leakage.csv")):
        counts = leak_counts(read_leaks(path))
        task = path.name.removesuffix("-leakage.csv")
        notes.append(
            f"{task}: test images that share a patient or identical bytes with a training image: {counts} "
            f"({path.name}). "
            "Its AUCs may be too high, for all inits alike."
        )
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _provenance(runs: Mapping[str, Any]) -> str:
    """Inits, tasks, settings and versions."""
    facts = []
    for name, init in runs["inits"].items():
        known = [
            f"{key} {value}" for key, value in init.items() if key in ("kind", "method", "stem", "path") and value
        ]
        facts.append(
            (name, ", ".join([*known, *([f"SHA-256 {init['sha256'][:12]}"] if init.get("sha256") else [])]))
        )
    for name, task in runs["tasks"].items():
        positive = f", positive class {task['positive']}" if task.get("positive") else ""
        facts.append((name, f"{task['images']} images{positive}, SHA-256 {task['sha256'][:12]}"))
    facts += [
        (f"recipe {recipe}", ", ".join(f"{name} {value}" for name, value in settings.items()))
        for recipe, settings in runs["settings"].items()
    ]
    facts.append(
        ("versions", ", ".join(f"{name} {version}" for name, version in runs.get("versions", {}).items()))
    )
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in facts)
    return f"<dl>{lines}</dl>"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
