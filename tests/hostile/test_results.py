"""A results folder from a stranger: runs.json, predictions.csv, curves.csv, links, and the names in them."""

from __future__ import annotations

import copy
import csv
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modan_fast.config import ReportConfig, to_json
from modan_fast.downstream.evaluate import evaluate
from modan_fast.downstream.predictions import read_finished, read_predictions
from modan_fast.downstream.results import (
    CHOICE_COLUMNS,
    COLUMNS,
    CONVERGENCE_COLUMNS,
    CURVE_COLUMNS,
    Experiment,
    Results,
    recorded_settings,
)
from modan_fast.downstream.statistics import summaries
from modan_fast.downstream.tasks import Fold, Task
from modan_fast.recipes import evaluate_config
from modan_fast.report import embed, figures, page, page_figures, tables
from modan_fast.report.formats import Table, file_name, to_csv, to_files, to_html, to_latex, to_markdown
from shard_builder.settings import InputError

VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 0.5, -0.5, 2**31, 2**63, 10**400, float("nan"), float("inf"), -float("inf"), 1e308),
    *("", "x", "x" * 10_000, "\0", "\ud800", "\x1b[2J", "\u202e", "a\nb", "/etc/passwd", "../../x", "/dev/zero", "."),
    *("pipe:touch x {}", "http://localhost/x", "file:///etc/passwd", "<script>alert(1)</script>", "[red]x", "$\\frac"),
    *("paper", "finetune", "scratch", "imagenet", "torchvision", "=1+1", "7x7", [], [0], [-1, "x"], [[]], [{}], {}),
    *({"x": 1}, {"": None}, {"\ud800": 1}, {"paper": {"image_size": 10**9}}, {"breast": {"test_images": [4, 4]}}),
]  # fmt: skip
TASK = Task(
    *("breast", Path("breast"), tuple(f"{index}.png" for index in range(8)), np.arange(8) % 2),
    folds=(
        Fold(np.arange(4), np.arange(4), np.arange(4, 8)),
        Fold(np.arange(4, 8), np.arange(4, 8), np.arange(4)),
    ),
    **{"sources": (), "digests": (), "patients": (), "positive": "malignant", "sha256": "0" * 64},
)
SETTINGS = {"image_size": 32, "epochs": 3, "stem": "7x7", "lr": 1e-4, "precision": "float32"}
INITS = {"mulsupcon": {"kind": "encoder", "sha256": "1" * 64}, "scratch": {"kind": "scratch"}}


def content() -> tuple[dict[str, Any], bytes, bytes]:
    """What an evaluation wrote: runs.json, predictions.csv and curves.csv."""
    chance = random.Random(0)
    scores, curves = [COLUMNS], [CURVE_COLUMNS]
    for init in INITS:
        for repeat in (1, 2):
            for fold in (1, 2):
                key = ("breast", init, "paper", "probe", repeat, fold)
                scores += [(*key, f"{image}.png", image % 2, round(chance.random(), 4)) for image in range(4)]
                curves += [(*key, epoch, 1 / epoch) for epoch in (1, 2, 3)]
    time = {"task": "breast", "init": "scratch", "recipe": "paper", "protocol": "probe", "device": "CPU"}
    time |= {"cells": 4, "images": 12, "seconds": 3.0, "seconds_per_epoch": 0.25}
    record = {"path": "breast", "sha256": "0" * 64, "images": 8, "positive": "malignant", "test_images": [4, 4]}
    encoder = {"kind": "encoder", "method": "mulsupcon", "path": "gone/encoder.safetensors", "stem": "7x7"}
    runs = {
        "format": 1,
        "settings": {"paper": SETTINGS},
        "tasks": {"breast": record},
        "inits": {
            "mulsupcon": {**encoder, "sha256": "1" * 64, "shards": {"fingerprint": "0"}},
            "scratch": {"kind": "scratch"},
        },
        "times": [time],
        "versions": {"modan_fast": "0"},
    }
    return runs, *("".join(",".join(map(str, row)) + "\n" for row in rows).encode() for rows in (scores, curves))


RUNS, PREDICTIONS, CURVES = content()


def mutated(content: bytes, chance: random.Random) -> bytes:
    """`content` with some bytes changed, cut, inserted or repeated."""
    at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    some = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 8)))
    other = chance.choice([b"\0", b"\xff\xfe", b'"', b",", b"\n", b"\r", b"[", b"{", b"-", b"e9", some])
    return chance.choice(
        [
            content[:at] + some + content[at + len(some) :],
            content[:at] + other + content[at:],
            content[:at] + content[to:],
            content[:to] + content[at:],
            content[:at],
        ]
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value in a JSON object, with the object itself."""
    yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*path, key))


def with_value(path: tuple[Any, ...], value: Any) -> Any:
    """RUNS with another value at a place; without it if the value is `places`."""
    if not path:
        return value
    changed = copy.deepcopy(RUNS)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if value is places:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed


def run_files() -> Iterator[bytes]:
    for path in places(RUNS):
        for value in VALUES:
            yield json.dumps(with_value(path, value)).encode()
        if path:
            yield json.dumps(with_value(path, places)).encode()
    whole = json.dumps(RUNS).encode()
    yield from (
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xef\xbb\xbf" + whole,
        whole.decode().encode("utf-16"),
    )
    yield whole[:-1] + b"," + whole[1:]
    chance = random.Random(0)
    for _ in range(1000):
        yield mutated(whole, chance)


def lines_of(whole: bytes) -> Iterator[bytes]:
    """A CSV file with hostile cells, and damaged."""
    header, *lines = whole.decode().splitlines()
    cells = [
        "",
        "-1",
        "0",
        "1",
        "9" * 400,
        "9" * 5000,
        str(2**63),
        "nan",
        "inf",
        "-inf",
        "1e308",
        "1e400",
        "0x1",
        "²",
        "x",
    ]
    cells += [
        "x" * 10_000,
        "x" * 200_000,
        "\0",
        "\x1b[2J",
        "\u202e",
        '"a\nb"',
        '"',
        '"a"b',
        "a,b",
        "a\rb",
        "\ud800",
    ]
    cells += [
        "paper",
        "probe",
        "finetune",
        "scratch",
        "../../x",
        "<script>",
        "=1+1",
        "$\\frac",
        "_x",
        "1.5",
        " 1 ",
    ]
    for row in (0, 5, len(lines) - 1):
        for column in range(len(lines[0].split(","))):
            for cell in cells:
                changed = lines[row].split(",")
                changed[column] = cell
                text = "\n".join([header, *lines[:row], ",".join(changed), *lines[row + 1 :], ""])
                yield text.encode("utf-8", "surrogatepass")
    for column in range(4):  # one name in all lines
        for cell in cells:
            rows = [line.split(",") for line in lines]
            text = "\n".join([header, *(",".join([*row[:column], cell, *row[column + 1 :]]) for row in rows), ""])
            yield text.encode("utf-8", "surrogatepass")
    yield from (
        b"",
        whole * 2,
        b"\xef\xbb\xbf" + whole,
        whole.decode().encode("utf-16"),
        b"\0" * 1000,
        whole + b",",
    )
    chance = random.Random(0)
    for _ in range(1100):
        yield mutated(whole, chance)


def use_all(steps: list[Callable[[], Any]]) -> None:
    """Take all steps, and raise the first `InputError` of them."""
    found = []
    for step in steps:
        try:
            step()
        except InputError as error:
            found.append(error)
    if found:
        raise found[0]


def write_all(folder: Path, name: str, case: bytes) -> None:
    for other, whole in (
        ("runs.json", json.dumps(RUNS).encode()),
        ("predictions.csv", PREDICTIONS),
        ("curves.csv", CURVES),
    ):
        content = case if other == name else whole
        if (
            not (folder / other).exists() or (folder / other).read_bytes() != content
        ):  # the case before may have left it
            (folder / other).write_bytes(content)


def continue_evaluation(folder: Path) -> None:
    """What `evaluate` does with a results folder, but for the training."""
    results = Results.open(folder)
    results.admit("paper", SETTINGS, TASK, INITS)
    results.finished()
    experiment = Experiment("breast", "scratch", "paper", "probe")
    results.list_images(TASK)
    results.add_time(experiment, 1, 4, 1, 1.0, "CPU")


def read_for_report(folder: Path) -> None:
    """What `report` does with a runs.json, but for the figures."""
    runs = Results.open(folder).runs
    logs = {name: lines for name, init in runs["inits"].items() if (lines := page._log(init))}
    written = [*to_files(tables.time_table(runs["times"], logs)).values(), page._provenance(runs)]
    assert all(text.encode() for text in written)
    assert all(page._method(init, runs) is None or init for init in ("mulsupcon", "scratch"))
    use_all([lambda: recorded_settings(runs, "paper"), lambda: read_finished(folder)])


def test_no_runs_json_does_harm(survives) -> None:
    cases = list(run_files())
    assert len(cases) >= 2000

    def use(folder: Path) -> None:
        use_all(
            [lambda: read_for_report(folder), lambda: embed_nothing(folder), lambda: continue_evaluation(folder)]
        )

    def embed_nothing(folder: Path) -> None:
        with pytest.raises(InputError):
            embed.shards_of(Results.open(folder).runs)

    accepted, refused = survives(cases, lambda case, folder: write_all(folder, "runs.json", case), use)
    print(f"runs.json: {accepted} accepted, {refused} refused")
    assert accepted > 50
    assert refused > 1000


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_no_predictions_do_harm(survives, every: int) -> None:
    cases = list(lines_of(PREDICTIONS))
    assert len(cases) >= 2000
    cases = cases[::every]
    seen = []

    def report(folder: Path) -> None:
        predictions, _ = read_finished(folder)
        seen.append(folder)
        if len(seen) % 50 == 0:  # they take a tenth of a second
            rows = summaries(predictions)
            page._tables(predictions, rows, "mulsupcon", {"mulsupcon": None, "scratch": None})
            page_figures.plot_roc(folder, predictions)

    def use(folder: Path) -> None:
        use_all([lambda: report(folder), lambda: continue_evaluation(folder)])

    accepted, refused = survives(cases, lambda case, folder: write_all(folder, "predictions.csv", case), use)
    print(f"predictions.csv: {accepted} accepted, {refused} refused")
    assert accepted > 50 / every
    assert refused > 1000 / every


@pytest.mark.filterwarnings("ignore:Glyph", "ignore::RuntimeWarning")
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_no_curves_do_harm(survives, every: int) -> None:
    cases = list(lines_of(CURVES))
    assert len(cases) >= 2000
    cases = cases[::every]
    seen: list[Path] = []

    def use(folder: Path) -> None:
        page_figures._validation_losses(folder / "curves.csv")
        seen.append(folder)
        if len(seen) % 50 == 0:
            page_figures.plot_validation_loss(folder, folder / "curves.csv")
        continue_evaluation(folder)

    accepted, refused = survives(cases, lambda case, folder: write_all(folder, "curves.csv", case), use)
    print(f"curves.csv: {accepted} accepted, {refused} refused")
    assert accepted > 50 / every
    assert refused > 1000 / every


def of_several(kind: str) -> bytes:
    """A predictions.csv of three classes, or of three labels, by few labels, too."""
    chance = np.random.default_rng(0)
    rows = [",".join(COLUMNS)]
    for protocol in ("logistic", "knn:5"):
        for fold in (1, 2):
            for image in range(4):
                scores = " ".join(map(str, chance.dirichlet([1, 1, 1]).astype(np.float32)))
                label = str(image % 3) if kind == "multiclass" else f"{image % 2} {image // 2 % 2} 1"
                rows.append(f"breast,scratch,paper,{protocol},1,{fold},{image}.png,{label},{scores}")
    return ("\n".join(rows) + "\n").encode()


def several_hostile(whole: bytes) -> Iterator[bytes]:
    """Files with other numbers of labels and scores, and others than numbers."""
    lines = whole.decode().splitlines()
    cells = [
        "",
        " ",
        "0",
        "1",
        "0 1",
        "0 0 1",
        "0 1 0 1",
        "0  1 0",
        " 0 1 0",
        "0 1 0 ",
        "3",
        "-1",
        "00",
        "²",
        "１",
        "1e0",
    ]
    cells += [
        "2 0 0",
        "0.5 0.5 0.5",
        "nan nan nan",
        "nan 0.5 0.5",
        "inf 0 0",
        "-0.1 0.6 0.5",
        "1.1 0 0",
        "1e400 0 0",
    ]
    cells += [
        "0x1 0 0",
        "a b c",
        "0,5 0 0",
        "0\t0\t1",
        "9" * 400,
        " ".join(["0"] * 10_000),
        "0 " * 30_000,
        "\0 \0 \0",
    ]
    for row in (1, 8, 16):
        for column in (7, 8):
            for cell in cells:
                changed = lines[row].split(",")
                changed[column] = cell
                yield "\n".join([*lines[:row], ",".join(changed), *lines[row + 1 :], ""]).encode()
    for name in (
        "knn:",
        "knn:0",
        "knn:05",
        "knn:-1",
        "knn:5:5",
        "knn:" + "9" * 5000,
        "knn: 5",
        "KNN:5",
        ":5",
        "knn:²",
        "x:5",
    ):
        yield whole.replace(b"knn:5", name.encode())
    chance = random.Random(1)
    for _ in range(850):
        yield mutated(whole, chance)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_no_predictions_of_several_classes_or_labels_do_harm(survives, kind: str) -> None:
    cases = list(several_hostile(of_several(kind)))
    assert len(cases) >= 1000

    def use(folder: Path) -> None:
        for fold_runs in read_predictions(folder / "predictions.csv").values():
            for outcome in fold_runs.values():
                assert len(outcome.labels) == len(outcome.scores) == len(outcome.images)
                assert outcome.scores.ndim == 1 or np.isnan(outcome.scores).any() or (outcome.scores <= 1).all()

    accepted, refused = survives(cases, lambda case, folder: write_all(folder, "predictions.csv", case), use)
    print(f"predictions.csv, {kind}: {accepted} accepted, {refused} refused")
    assert accepted > 50
    assert refused > 500


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (",0,0.", ",0 1,0."),  # another number of labels
        (",0,", ",3,"),  # no class
        (",0,0.", ",0,1.0 0."),  # another number of scores
        (",0,0.", ",0,-0."),
        (",0,0.", ",0,7."),
    ],
)
def test_a_line_with_other_labels_or_scores_is_named(tmp_path: Path, old: str, new: str) -> None:
    text = of_several("multiclass").decode()
    at = text.index(old, text.index("2.png"))
    (tmp_path / "predictions.csv").write_text(text[:at] + new + text[at + len(old) :])
    with pytest.raises(
        InputError, match=r"predictions\.csv, line 5: damaged; the same evaluation again repairs it"
    ):
        read_predictions(tmp_path / "predictions.csv")


@pytest.mark.parametrize("name", ["convergence.csv", "chosen.csv", "breast-images.csv"])
def test_no_file_beside_the_predictions_does_harm(survives, name: str) -> None:
    columns = {"convergence.csv": CONVERGENCE_COLUMNS, "chosen.csv": CHOICE_COLUMNS}.get(name)
    key = ("breast", "scratch", "paper", "probe")
    if columns is None:
        rows = [
            ("image", "patient", "sex"),
            *((f"{image}.png", f"p{image // 2}", "FM"[image % 2]) for image in range(8)),
        ]
    else:
        rows = [columns]
        rows += [(*key, repeat, fold, *[0.5] * (len(columns) - 6)) for repeat in (1, 2) for fold in (1, 2)]
    whole = "".join(",".join(map(str, row)) + "\n" for row in rows).encode()
    chance = random.Random(2)
    cases = [whole, b"", b"\0" * 100, b"\xff\xfe", *(mutated(whole, chance) for _ in range(400))]

    def write(case: bytes, folder: Path) -> None:
        write_all(folder, "", b"")
        (folder / name).write_bytes(case)

    accepted, refused = survives(cases, write, continue_evaluation)
    print(f"{name}: {accepted} accepted, {refused} refused")
    assert accepted > 10
    assert refused > 100 or columns is None  # a list of images is written anew


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    write_all(tmp_path / "results", "", b"")
    return tmp_path / "results"


PLAIN = ReportConfig(samples=0)


@pytest.mark.parametrize(
    ("old", "new"),
    [(",probe,", ",mocov2,"), (",paper,", ",fast,"), (",1,2,0.png", ",1,0,0.png"), (",0,0.", ",2,0.")],
)
def test_a_line_that_no_evaluation_wrote_is_named(folder: Path, old: str, new: str) -> None:
    path = folder / "predictions.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=r"predictions\.csv, line \d+: damaged"):
        page.write_report(folder, PLAIN)


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        (("settings",), [], r"settings cannot be \[\]"),
        (("tasks",), 3, "tasks cannot be 3"),
        (("inits", "scratch"), 7, "init scratch cannot be 7"),
        (("times",), "late", "times cannot be 'late'"),
        (("times", 0, "seconds"), float("nan"), "times 0 seconds cannot be nan"),
        (("tasks", "breast", "test_images"), ["x"], "test_images cannot be 'x'"),
        (("versions",), "\ud800", "versions cannot be"),
    ],
)
def test_a_part_of_runs_json_of_a_wrong_type_is_named(folder: Path, path: Any, value: Any, found: str) -> None:
    (folder / "runs.json").write_text(json.dumps(with_value(path, value)))
    with pytest.raises(InputError, match=rf"runs\.json.* {found}"):
        Results.open(folder)


@pytest.mark.parametrize("name", ["report.html", "tables", "figures"])
def test_a_report_writes_through_no_link(folder: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    if name == "report.html":
        elsewhere.write_text("mine")
    else:
        elsewhere.mkdir()
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(InputError, match=rf"results/{name} is "):
        page.write_report(folder, PLAIN)
    assert elsewhere.read_text() == "mine" if elsewhere.is_file() else not list(elsewhere.iterdir())


def test_a_figure_that_is_a_link_is_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (folder / "figures").mkdir()
    (folder / "tables").mkdir()
    for name in ("figures/roc-breast-paper.svg", "figures/validation-loss.svg", "tables/times.md"):
        (folder / name).symlink_to(tmp_path / "mine")
    page.write_report(folder, PLAIN)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (folder / "figures" / "roc-breast-paper.svg").is_symlink()


@pytest.mark.parametrize(
    "name", ["predictions.csv", "curves.csv", "convergence.csv", "chosen.csv", "runs.json", "folds", "folds/task"]
)
def test_an_evaluation_writes_through_no_link(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    config = evaluate_config({"task": tmp_path / "task", "init": ["scratch"], "out": folder, "device": "cpu"})
    with pytest.raises(InputError, match=rf"results/{name} is "):
        evaluate(config)
    assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize("name", ["predictions.csv", "runs.json", "x-leakage.csv"])
def test_a_fifo_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=name):
        page.write_report(folder, PLAIN)


def test_imagenets_weights_are_not_fetched_for_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "modan_fast.pretrained.ResNet18_Weights.get_state_dict", lambda *_, **__: pytest.fail("fetched")
    )
    settings = to_json(evaluate_config({"init": ["imagenet"], "stem": "7x7", "image_size": 32}))
    record = {"kind": "encoder", "path": "torchvision", "sha256": "0" * 64}
    with pytest.raises(InputError, match=r"there is no .*resnet18-f37072fd\.pth: download"):
        embed._encoder("imagenet", record, settings)


def test_what_a_record_names_is_logged_when_it_is_opened(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"epoch": 1, "loss": 1, "seconds": 2, "views_per_second": 3}\n')
    runs = with_value(("inits", "mulsupcon", "path"), str(run / "encoder.safetensors"))
    (folder / "runs.json").write_text(json.dumps(runs))
    (run / "config.json").write_text(json.dumps({"settings": {"shards": str(tmp_path / "set")}}))
    page.write_report(folder, ReportConfig(samples=20, device="cpu"))
    assert f"{run}/log.jsonl, which runs.json names" in caplog.text
    assert f"{tmp_path}/set, which {run}/config.json names" in caplog.text
    for location in ("file:///set", "pipe:touch x {}"):
        (run / "config.json").write_text(json.dumps({"settings": {"shards": location}}))
        with pytest.raises(InputError, match="name the shard set with `shards`"):
            embed.shards_of(runs)


@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"loss": "x", "seconds": 1, "views_per_second": 1}', "[" * 100_000, "3"]
)
def test_a_log_without_numbers_is_named(folder: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "log.jsonl").write_text(line + "\n")
    runs = with_value(("inits", "mulsupcon", "path"), str(tmp_path / "encoder.safetensors"))
    (folder / "runs.json").write_text(json.dumps(runs))
    with pytest.raises(InputError, match=r"log\.jsonl is no readable log"):
        page.write_report(folder, PLAIN)


NAMES = [
    *(
        "<img src=x onerror=alert(1)>",
        "$\\frac",
        "$x",
        "_hidden",
        "[red]bold[/red]",
        "\x1b[2J",
        "a\nb",
        "x" * 10_000,
    ),
    *(
        "\u202eabc",
        "=cmd|' /C calc'!A0",
        "+1+1",
        "@SUM(A1)",
        "\t=1",
        "\\input{x}",
        "[x](http://localhost)",
        "a|b",
        "-x",
    ),
]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", NAMES)
def test_names_do_nothing_in_a_report(folder: Path, name: str) -> None:
    for file in ("predictions.csv", "curves.csv"):
        rows = list(csv.reader((folder / file).read_text().splitlines()))
        with (folder / file).open("w", newline="") as written:
            csv.writer(written).writerows([[name if cell == "scratch" else cell for cell in row] for row in rows])
    (folder / "runs.json").write_text(json.dumps(RUNS).replace('"scratch"', json.dumps(name)))
    text = page.write_report(folder, PLAIN).read_text()
    assert "<img src=x" not in text
    assert not {*"\x1b\u202e"} & {*text}
    for path in (folder / "tables").iterdir():
        content = path.read_text()
        assert not {*"\x1b\u202e\t"} & {*content}
        assert not re.search(r"(?<!\\)\]\(", content) or path.suffix != ".md"
        if path.suffix == ".csv":
            cells = [cell for row in csv.reader(content.splitlines()) for cell in row]
            formulas = [cell for cell in cells if cell.strip()[:1] in {*"=+-@"} and cell]
            assert all(cell.replace(".", "").lstrip("+-").isdigit() for cell in formulas), formulas


def test_names_stay_in_a_legend_and_no_mathematics_is_read(tmp_path: Path) -> None:
    lines = {name: np.ones((1, 3)) for name in ("_hidden", "$\\frac", "a" * 10_000)}
    figures.curves(tmp_path / "x.svg", [("$\\frac{", lines)], ("epoch", "loss"))
    written = (tmp_path / "x.svg").read_text()
    assert "_hidden" in written
    assert "$\\frac" in written
    figures.contact_sheet(tmp_path / "x.png", [("$\\frac", [np.zeros((4, 4), np.uint8)])], ["image"])


def test_each_form_of_a_table_disarms_its_own_marks() -> None:
    table = Table(
        "t", "T", ["a", "b"], [["=1+1", "-0.5"], ["+x", "+0.5"], ["[x", "<b>"], ["[x](http://y)", "a\\|b"]]
    )
    assert list(csv.reader(to_csv(table).splitlines()))[1:3] == [["'=1+1", "-0.5"], ["'+x", "+0.5"]]
    assert "\n{}[x & $<$b$>$ \\\\" in to_latex(table)
    assert "| [x\\](http://y) | a\\\\\\|b |" in to_markdown(table)
    assert "<b>" not in to_markdown(table) + to_html(table)
    assert len(file_name("x" * 10_000 + ".svg")) < 100
    assert file_name("x" * 10_000 + ".svg").endswith(".svg")
    assert file_name("x" * 300 + "a.svg") != file_name("x" * 300 + "b.svg")
