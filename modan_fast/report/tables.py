"""The report's tables: metrics, subgroups and few labels of a task, Tables 4 and 5, and what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modan_fast.downstream.convergence import FAR, Convergence
from modan_fast.downstream.intervals import MOST_RESAMPLED, RESAMPLES, Interval
from modan_fast.downstream.metrics import BINS, THRESHOLD
from modan_fast.downstream.results import protocol_of
from modan_fast.downstream.statistics import FEWEST_REPEATS, Comparison, Row, SubgroupRow
from modan_fast.report import paper
from modan_fast.report.formats import Table

DASH = "–"
PROTOCOLS = {
    "finetune": "fine-tuning",
    "probe": "linear probing",
    "logistic": "logistic regression",
    "knn": "nearest neighbours",
}
MEASURES = {
    "average precision": "avg. precision",
    "balanced accuracy": "bal. accuracy",
    "F1": "F1",
    "sensitivity at 90 % specificity": "sens. at 90 % spec.",
    "sensitivity": "sens.",
    "specificity": "spec.",
    "Brier score": "Brier",
    "calibration error": "ECE",
}
"""The headings of the metrics beside the AUC."""


def protocol_name(protocol: str) -> str:
    """A protocol in words, with its number of labels."""
    name, labels = protocol_of(protocol)
    return f"{PROTOCOLS[name]}{_labels(labels)}"


def _labels(labels: int | None) -> str:
    return "" if labels is None else f", {labels} {'label' if labels == 1 else 'labels'} a class"


def by_protocol(protocol: str) -> tuple[int, int]:
    """A key that sorts protocols in the order of `PROTOCOLS`, then by the number of labels."""
    name, labels = protocol_of(protocol)
    return list(PROTOCOLS).index(name), labels or 0


def metric_table(task: str, recipe: str, rows: Sequence[Row]) -> Table:
    """All metrics of a task's inits under a recipe: a line per protocol and init."""
    mine = [row for row in rows if (row.task, row.recipe) == (task, recipe) and row.labels is None]
    units = mine[0].units if mine else "images"
    return Table(
        name=f"metrics-{task}-{recipe}",
        title=f"{task}, recipe {recipe}",
        head=["protocol", "init", "repeats", "AUC", f"95 % CI, {units}", *MEASURES.values()],
        rows=[
            [
                *(protocol_name(row.protocol), row.init, str(row.repeats)),
                *(number(row.mean), span(row.patient_interval)),
                *(number(row.metrics.get(name)) for name in MEASURES),
            ]
            for row in sorted(mine, key=lambda row: by_protocol(row.protocol))
        ],
        note=f"Means over repeats of means over test folds. CI: {units} resampled {RESAMPLES:,} times, the networks as "
        "they are. Of several classes or labels, a metric is the mean over each against the rest. An image is classed "
        f"as positive from a score of {THRESHOLD} on, or as the class that scores most. Brier: squared error of the "
        f"probabilities. ECE: expected calibration error, {BINS} bins of equal width; 0 is best for both. They mean "
        "little for fine-tuning without a head (released-code).",
    )


def class_table(task: str, recipe: str, rows: Sequence[Row], classes: Sequence[str]) -> Table:
    """The AUC of each class against the rest, or of each label; `classes` may be empty if the names are unknown."""
    mine = [row for row in rows if (row.task, row.recipe) == (task, recipe) and len(row.class_aucs) > 1]
    columns = max((len(row.class_aucs) for row in mine), default=0)
    names = list(classes) if len(classes) == columns else [f"class {index}" for index in range(columns)]
    return Table(
        name=f"classes-{task}-{recipe}",
        title=f"AUC of each class, {task}, recipe {recipe}",
        head=["protocol", "init", *names],
        rows=[
            [protocol_name(row.protocol), row.init, *map(number, row.class_aucs)]
            for row in sorted(mine, key=lambda row: by_protocol(row.protocol))
            if len(row.class_aucs) == columns
        ],
        note=f"Each class against the rest, or each label. A class that a test fold lacks has {DASH}, and so has the "
        "mean.",
    )


def subgroup_table(task: str, recipe: str, rows: Sequence[SubgroupRow]) -> Table:
    """The AUC by subgroup: a line per protocol and init, a column for each value of each subgroup column."""
    mine = [row for row in rows if (row.task, row.recipe) == (task, recipe)]
    values = {(row.column, row.value): row for row in mine}
    columns = dict.fromkeys(column for column, _ in values)
    cells = {(row.protocol, row.init, row.column, row.value): row.metrics["AUC"] for row in mine}
    lines = dict.fromkeys((row.protocol, row.init) for row in mine)
    return Table(
        name=f"subgroups-{task}-{recipe}",
        title=f"AUC by subgroup, {task}, recipe {recipe}",
        head=["protocol", "init", *(f"{value} ({_size(row)})" for (_, value), row in values.items())],
        rows=[
            [protocol_name(line[0]), line[1], *(number(cells.get((*line, *value))) for value in values)]
            for line in sorted(lines, key=lambda line: by_protocol(line[0]))
        ],
        groups=[("", 2), *((column, sum(each == column for each, _ in values)) for column in columns)],
        note="In brackets: test images, and those of the positive class or of each class. Mean over the folds in which "
        "the subgroup has all classes. Folds that leave a value out test on that value alone. The other metrics: "
        "tables/subgroups.csv.",
    )


def _size(row: SubgroupRow) -> str:
    return f"{row.images}, {'/'.join(map(str, row.counts))} {'positive' if len(row.counts) == 1 else 'by class'}"


def all_subgroups(rows: Sequence[SubgroupRow]) -> Table:
    """Every metric of every subgroup."""
    names = ["AUC", *MEASURES]
    return Table(
        name="subgroups",
        title="Subgroups",
        head=[
            *("task", "recipe", "protocol", "init", "column", "value", "images", "positives", "folds"),
            *(MEASURES.get(name, name) for name in names),
        ],
        rows=[
            [
                *(row.task, row.recipe, row.protocol, row.init, row.column, row.value, str(row.images)),
                *("/".join(map(str, row.counts)), str(row.folds)),
                *(number(row.metrics.get(name)) for name in names),
            ]
            for row in rows
        ],
        note="Positives: images of the positive class, or of each class or label. Folds: those in which an AUC can be "
        "computed.",
    )


def few_label_table(rows: Sequence[Row]) -> Table:
    """The points of all few-label curves."""
    mine = [row for row in rows if row.labels is not None]
    return Table(
        name="few-labels",
        title="Few labels",
        head=["task", "recipe", "protocol", "labels a class", "init", "tries", "AUC", "SD"],
        rows=[
            [
                *(row.task, row.recipe, PROTOCOLS[protocol_of(row.protocol)[0]], str(row.labels), row.init),
                *(str(row.repeats), number(row.mean), number(row.spread)),
            ]
            for row in sorted(mine, key=lambda row: (row.task, row.recipe, by_protocol(row.protocol)))
        ],
        note="SD: of the AUCs of all tries and folds.",
    )


def convergence_table(rows: Sequence[Convergence]) -> Table:
    """How far the probes came."""
    return Table(
        name="convergence",
        title="Convergence of the probes",
        head=["task", "recipe", "protocol", "init", "trainings", "still falling", "loss", "optimum", "distance"],
        rows=[
            [
                *(row.task, row.recipe, row.protocol, row.init, str(row.trainings), str(row.falling)),
                *(number(row.loss), number(row.optimum), number(row.distance)),
            ]
            for row in rows
        ],
        note="Still falling: trainings whose loss fell by more than 1 % in the last epoch. Loss: mean training loss "
        "after it. Optimum: the lowest loss of the same problem, softmax regression on the same features and images. "
        f"A probe has converged if no loss still falls and its distance is at most {FAR}.",
    )


def convergence_warning(task: str, recipe: str, rows: Sequence[Convergence]) -> str:
    """A sentence on the probes of a task that did not converge; empty if all did, or none are known."""
    late = [
        row
        for row in rows
        if (row.task, row.recipe) == (task, recipe) and protocol_of(row.protocol)[1] is None and not row.converged
    ]
    if not late:
        return ""
    found = "; ".join(
        f"{row.init} {row.falling} of {row.trainings}, loss {row.loss:.3f}, optimum {row.optimum:.3f}"
        for row in late
    )
    return (
        "The probe did not converge. Trainings whose loss still fell by more than 1 % in the last epoch, their mean "
        f"training loss, and the lowest one of the same problem: {found}. Its AUCs depend on the scale of the "
        "features; those of logistic regression and nearest neighbours do not."
    )


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
        note="AUC: mean over the repeats of the mean over the folds. 95 % CI: Student's t over the repeats, clipped "
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
            *("95 % CI, patients", "sensitivity", "specificity"),
        ],
        rows=[
            [
                *(row.task, row.recipe, row.protocol, row.init, str(row.repeats)),
                *(number(row.mean), number(row.std), span(row.interval), span(row.fold_interval)),
                *(span(row.patient_interval), number(row.sensitivity), number(row.specificity)),
            ]
            for row in rows
            if row.labels is None
        ],
        note="CI, repeats: Student's t, clipped to [0, 1], from three repeats on. Repeats run on identical folds, so "
        "this interval shows the noise of training (initial weights and batch order), not that of the data: with "
        "enough repeats it shrinks to nothing. CI, folds: a bootstrap of the folds' mean AUCs. Five are few, and they "
        "share training images: even for five independent normal values this interval contains the mean in 84 % of "
        f"cases, not 95 %. CI, patients: {RESAMPLES:,} resamples of the patients (of the images, where no patient is "
        f"named), within their folds; the networks stay as they are. With over {MOST_RESAMPLED:,} test images it is "
        f"DeLong's. An image counts as positive if its score is at least {THRESHOLD}; this says little about "
        "fine-tuning without a head (released-code), where every feature counts as a class.",
    )


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """The reference against the other inits."""
    return Table(
        name="comparisons",
        title=f"{comparisons[0].reference if comparisons else 'The reference'} against the others",
        head=[
            *("task", "recipe", "protocol", "other init", "repeats", "difference", "95 % CI, folds"),
            *("95 % CI, patients", "p DeLong", "Holm", "p two-sided", "Holm", "p one-sided", "Holm", "effect"),
        ],
        rows=[
            [
                *(each.task, each.recipe, each.protocol, each.init, str(each.repeats)),
                *(number(each.difference, signed=True), span(each.fold_interval, signed=True)),
                *(span(each.patient_interval, signed=True), p_value(each.delong), p_value(each.holm_delong)),
                *(p_value(each.two_sided), p_value(each.holm_two_sided)),
                *(p_value(each.greater), p_value(each.holm_greater), number(each.effect, signed=True)),
            ]
            for each in comparisons
        ],
        note="Difference: the reference's AUC minus the other's. CI, patients: a bootstrap of the patients (of the "
        "images, where no patient is named), the same for both inits; p DeLong: DeLong's test of the same question, "
        "two-sided. Both say what other test patients would change, with the networks as they are. p: Wilcoxon "
        "signed-rank test over the repeats, which "
        "covers only the noise of training on these folds; one-sided: the reference is greater. Holm: p adjusted "
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
                protocol_name(line["protocol"]),
                line["task"],
                line["init"],
                line["recipe"],
                line.get("device") or DASH,
            ),
            *(f"{line['cells']} trainings", seconds(line["seconds_per_epoch"])),
            f"{line['images'] / line['seconds']:,.0f}" if line.get("images") and line["seconds"] else DASH,
            seconds(paper.SECONDS[line["protocol"]]) if line["protocol"] in paper.SECONDS else DASH,
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
