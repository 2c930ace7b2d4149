"""The report's tables: 4 and 5 beside the paper's numbers, then the summaries, comparisons and times behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modan_fast.downstream.metrics import THRESHOLD
from modan_fast.downstream.statistics import FEWEST_REPEATS, Comparison, Interval, Row
from modan_fast.report import paper
from modan_fast.report.formats import Table

DASH = "–"
PROTOCOLS = {"finetune": "fine-tuning", "probe": "linear probing"}


def paper_table(
    recipe: str,
    protocol: str,
    rows: Sequence[Row],
    comparisons: Sequence[Comparison],
    methods: Mapping[str, str | None],
) -> Table:
    """Table 4 or 5: a line per init, with its AUC and p-value on each task beside those of the paper's method.

    `methods` gives the paper's name of each init's method. The paper's methods that no init has come last.
    """
    mine = [row for row in rows if (row.recipe, row.protocol) == (recipe, protocol)]
    tasks = list(dict.fromkeys(row.task for row in mine))
    compared = {
        (each.task, each.init): each for each in comparisons if (each.recipe, each.protocol) == (recipe, protocol)
    }
    summary = {(row.task, row.init): row for row in mine}
    printed = paper.published()
    content = []
    for init, method in _lines(mine, methods):
        line = [init or DASH, method or DASH]
        for task in tasks:
            row, comparison = summary.get((task, init or "")), compared.get((task, init or ""))
            theirs = printed.get((protocol, paper.task_of(task) or "", method or ""))
            line += [
                number(row.mean if row else None),
                span(row.interval if row else None),
                p_value(comparison.greater if comparison else None),
                (theirs and theirs.auc) or DASH,
                (theirs and theirs.p_value) or DASH,
            ]
        content.append(line)
    reference = comparisons[0].reference if comparisons else None
    return Table(
        name=f"{paper.TABLES[protocol].lower().replace(' ', '')}-{recipe}",
        title=f"{paper.TABLES[protocol]}: {PROTOCOLS[protocol]}, recipe {recipe}",
        head=["init", "paper's name", *(["AUC", "95 % CI", "p", "paper AUC", "paper p"] * len(tasks))],
        rows=content,
        groups=[("", 2), *((task, 5) for task in tasks)],
        note="AUC: mean over the repeats of the mean over five folds. 95 % CI: Student's t over the repeats, clipped "
        f"to [0, 1], from {FEWEST_REPEATS} repeats on; it shows the noise of training on these folds, not that of the "
        "data (see Statistics). "
        + (
            f"p: one-sided Wilcoxon signed-rank test that {reference} is greater, not adjusted; the paper's p tests "
            "ModAn-MulSupCon."
            if reference
            else "p: needs a second init."
        ),
    )


def _lines(rows: Sequence[Row], methods: Mapping[str, str | None]) -> list[tuple[str | None, str | None]]:
    """(init, the paper's method) of each line, in the paper's order; methods without an init last."""
    order = [*paper.METHODS.values(), None]
    inits = sorted(dict.fromkeys(row.init for row in rows), key=lambda init: order.index(methods.get(init)))
    lines: list[tuple[str | None, str | None]] = [(init, methods.get(init)) for init in inits]
    if any(paper.task_of(row.task) for row in rows):
        found = {method for _, method in lines}
        lines += [(None, method) for method in paper.METHODS.values() if method not in found]
    return lines


def summary_table(rows: Sequence[Row]) -> Table:
    """All statistics of each init by itself."""
    return Table(
        name="inits",
        title="Each init by itself",
        head=[
            *("task", "recipe", "protocol", "init", "repeats", "AUC", "SD", "95 % CI, repeats", "95 % CI, folds"),
            *("sensitivity", "specificity"),
        ],
        rows=[
            [
                *(row.task, row.recipe, row.protocol, row.init, str(row.repeats)),
                *(number(row.mean), number(row.std), span(row.interval), span(row.fold_interval)),
                *(number(row.sensitivity), number(row.specificity)),
            ]
            for row in rows
        ],
        note="CI, repeats: Student's t, clipped to [0, 1], from three repeats on. Repeats run on identical folds, so "
        "this interval shows the noise of training (initial weights and batch order), not that of the data: with "
        "enough repeats it shrinks to nothing. CI, folds: a bootstrap of the five folds' mean AUCs. Five are few, and "
        "they share training images: even for five independent normal values this interval contains the mean in 84 % "
        f"of cases, not 95 %. An image counts as positive if its score is at least {THRESHOLD}; this says little about "
        "fine-tuning without a head (released-code), where every feature counts as a class.",
    )


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """The reference against the other inits."""
    return Table(
        name="comparisons",
        title=f"{comparisons[0].reference if comparisons else 'The reference'} against the others",
        head=[
            *("task", "recipe", "protocol", "other init", "repeats", "difference", "95 % CI, folds"),
            *("p two-sided", "Holm", "p one-sided", "Holm", "effect"),
        ],
        rows=[
            [
                *(each.task, each.recipe, each.protocol, each.init, str(each.repeats)),
                *(number(each.difference, signed=True), span(each.fold_interval, signed=True)),
                *(p_value(each.two_sided), p_value(each.holm_two_sided)),
                *(p_value(each.greater), p_value(each.holm_greater), number(each.effect, signed=True)),
            ]
            for each in comparisons
        ],
        note="Difference: the reference's AUC minus the other's. p: Wilcoxon signed-rank test over the repeats, which "
        "also covers only the noise of training on these folds; one-sided: the reference is greater. Holm: p adjusted "
        "for the inits compared in the same task, recipe and protocol. Effect: rank-biserial correlation, +1 if the "
        "reference wins every repeat. With n repeats, a one-sided p is at least 1/2ⁿ.",
    )


def time_table(
    times: Sequence[Mapping[str, Any]], pretraining: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Table:
    """Seconds per epoch of pretraining, fine-tuning and probing beside the paper's.

    `times` are those of runs.json, `pretraining` the lines of each run's log.jsonl, by init.
    """
    rows = []
    for init, epochs in pretraining.items():
        taken = sorted(line["seconds"] for line in epochs)
        speeds = sorted(line["views_per_second"] for line in epochs)
        middle = len(epochs) // 2
        rows.append(
            [
                *("pretraining", DASH, init, DASH, DASH, f"{len(epochs)} epochs", seconds(taken[middle])),
                *(f"{speeds[middle]:,.0f} views", seconds(paper.SECONDS["pretraining"])),
            ]
        )
    rows += [
        [
            *(
                PROTOCOLS[line["protocol"]],
                line["task"],
                line["init"],
                line["recipe"],
                line.get("device") or DASH,
            ),
            *(f"{line['cells']} trainings", seconds(line["seconds_per_epoch"])),
            f"{line['images'] / line['seconds']:,.0f}" if line.get("images") and line["seconds"] else DASH,
            seconds(paper.SECONDS[line["protocol"]]),
        ]
        for line in times
    ]
    return Table(
        name="times",
        title="Seconds per epoch",
        head=[
            *("what", "task", "init", "recipe", "device", "measured over", "s per epoch", "images/s"),
            "paper, s per epoch",
        ],
        rows=rows,
        note="Wall-clock time with everything included: feature extraction, validation, scoring and compilation. "
        "Probes of one encoder train together; their time is divided among them. Pretraining: the median epoch. The "
        "paper measured on a Quadro RTX 8000 at 224 px.",
    )


def number(value: float | None, *, signed: bool = False) -> str:
    """Three decimals, or a dash."""
    return DASH if value is None else f"{value:+.3f}" if signed else f"{value:.3f}"


def span(interval: Interval | None, *, signed: bool = False) -> str:
    """Both ends of an interval, or a dash."""
    if interval is None:
        return DASH
    return f"[{number(interval[0], signed=signed)}, {number(interval[1], signed=signed)}]"


def p_value(value: float | None) -> str:
    """Three decimals from 0.1 on, below it three significant digits; `<0.0001`, or a dash."""
    if value is None:
        return DASH
    if value < 1e-4:
        return "<0.0001"
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def seconds(value: float) -> str:
    """Three significant digits, or whole seconds from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
