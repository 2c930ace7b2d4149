"""What stands beside a stranger's predictions, and predictions of several classes: read, or refused by one line."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modan_fast.downstream.convergence import read_convergence
from modan_fast.downstream.predictions import read_finished
from modan_fast.downstream.results import COLUMNS, CONVERGENCE_COLUMNS
from modan_fast.downstream.statistics import comparisons, subgroup_rows, summaries
from modan_fast.downstream.subgroups import read_images
from modan_fast.report import tables
from modan_fast.report.formats import to_files

KEY = "lesion,{},paper,probe,{},{}"
VALUES = [
    *(
        "",
        "x",
        "x" * 10_000,
        "\0",
        "\x1b[2J",
        "\u202e",
        '"',
        "a\nb",
        "../../x",
        "/etc/passwd",
        "=1+1",
        "<script>",
        "[red]",
    ),
    *(
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1",
        "2",
        "0.5",
        "1e400",
        "1e308",
        str(2**63),
        str(10**400),
        "true",
        "[]",
        "{}",
    ),
    *(
        "0 1",
        "0 0 1",
        "0.2 0.8",
        "0.2 0.3 0.5",
        "0.2  0.8",
        " ",
        "1 1",
        "nan nan nan",
        "9 9 9",
        "0.1 nan 0.9",
        "٣",
    ),
    *("finetune", "logistic:5", "logistic:0", "logistic:٥", "released-code"),
]
IMAGES = [f"{fold}-{image}.png" for fold in (1, 2) for image in range(6)]


def predicted(kind: str) -> str:
    """A predictions.csv of two inits, two repeats and two folds of three classes or labels."""
    chance = np.random.default_rng(0)
    lines = [",".join(COLUMNS)]
    for init in ("ours", "other"):
        for repeat in (1, 2):
            for image in IMAGES:
                labels = "0 1 1" if int(image[2]) % 2 else "1 0 0"
                scores = " ".join(f"{score:.3g}" for score in chance.dirichlet((1, 1, 1)))
                label = labels if kind == "multilabel" else str(int(image[2]) % 3)
                lines.append(f"{KEY.format(init, repeat, image[0])},{image},{label},{scores}")
    return "\n".join(lines) + "\n"


PREDICTIONS = {kind: predicted(kind) for kind in ("multiclass", "multilabel")}
LISTED = "image,patient,site,sex\n" + "".join(
    f"{name},p{name[2]},{'north' if '1' in name else 'south'},f\n" for name in IMAGES
)
CONVERGENCE = ",".join(CONVERGENCE_COLUMNS) + "\n"
CONVERGENCE += "".join(
    f"{KEY.format('ours', repeat, fold)},0.6,0.61,0.2\n" for repeat in (1, 2) for fold in (1, 2)
)


def cases(text: str, number: int) -> Iterator[bytes]:
    """Half of them with another value in a cell, half with other bytes."""
    chance = random.Random(0)
    rows = [line.split(",") for line in text.splitlines()]
    for _ in range(number // 2):
        changed = [list(row) for row in rows]
        row = chance.choice(changed)
        row[chance.randrange(len(row))] = chance.choice(VALUES)
        if chance.random() < 0.1:
            row.append(chance.choice(VALUES))
        if chance.random() < 0.1:
            del row[chance.randrange(len(row))]
        yield "".join(",".join(row) + "\n" for row in changed).encode()
    whole = text.encode()
    yield from (
        b"",
        b"\n",
        b"\0" * 1000,
        b"\xef\xbb\xbf" + whole,
        text.encode("utf-16"),
        whole + whole,
        b'"' + whole,
    )
    for _ in range(number // 2):
        at, to = sorted(chance.randrange(len(whole) + 1) for _ in range(2))
        some = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 6)))
        yield chance.choice(
            [whole[:at] + some + whole[at:], whole[:at] + whole[to:], whole[:to] + whole[at:], whole[:at]]
        )


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_no_predictions_of_several_classes_do_harm(survives, kind: str) -> None:
    seen = []

    def use(folder: Path) -> None:
        predictions, _ = read_finished(folder)
        seen.append(folder)
        if len(seen) % 20 == 0:  # they take a tenth of a second
            rows = summaries(predictions)
            made = [tables.summary_table(rows), tables.comparison_table(comparisons(predictions, "ours"))]
            made += [
                tables.metric_table("lesion", "paper", rows),
                tables.class_table("lesion", "paper", rows, ()),
            ]
            assert all(text for table in made for text in to_files(table).values())

    def write(case: bytes, folder: Path) -> None:
        (folder / "predictions.csv").write_bytes(case)

    accepted, refused = survives(cases(PREDICTIONS[kind], 2000), write, use)
    print(f"{kind}: {accepted} accepted, {refused} refused")
    assert accepted > 100
    assert refused > 1000


def test_no_list_of_images_does_harm(survives, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("good")
    (folder / "predictions.csv").write_text(PREDICTIONS["multiclass"])
    predictions, _ = read_finished(folder)
    seen = []

    def use(folder: Path) -> None:
        images = read_images(folder)
        seen.append(folder)
        if len(seen) % 20 == 0:
            rows = subgroup_rows(predictions, images)
            made = [tables.all_subgroups(rows), tables.subgroup_table("lesion", "paper", rows)]
            assert all(text for table in made for text in to_files(table).values())
        if len(seen) % 100 == 0:
            assert summaries(predictions, images)

    def write(case: bytes, folder: Path) -> None:
        (folder / "lesion-images.csv").write_bytes(case)

    accepted, refused = survives(cases(LISTED, 2000), write, use)
    print(f"NAME-images.csv: {accepted} accepted, {refused} refused")
    assert accepted > 100
    assert refused > 200


def test_no_record_of_convergence_does_harm(survives) -> None:
    def use(folder: Path) -> None:
        rows = read_convergence(folder)
        assert all(text for text in to_files(tables.convergence_table(rows)).values())
        tables.convergence_warning("lesion", "paper", rows)

    def write(case: bytes, folder: Path) -> None:
        (folder / "convergence.csv").write_bytes(case)

    accepted, refused = survives(cases(CONVERGENCE, 2000), write, use)
    print(f"convergence.csv: {accepted} accepted, {refused} refused")
    assert accepted > 100
    assert refused > 1000


@pytest.mark.parametrize("name", ["lesion-images.csv", "convergence.csv"])
def test_a_fifo_is_not_waited_for_and_a_name_leads_nowhere(tmp_path: Path, survives, name: str) -> None:

    def write(case: None, folder: Path) -> None:
        os.mkfifo(folder / name)

    def use(folder: Path) -> None:
        (read_images if "images" in name else read_convergence)(folder)

    assert survives([None], write, use) == (0, 1)
