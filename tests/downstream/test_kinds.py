"""Tasks of several classes and labels by all protocols: killed, continued, and shared by ranks, with the same bytes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modan_fast.config import EvaluateConfig
from modan_fast.downstream.evaluate import evaluate
from modan_fast.downstream.predictions import read_finished
from modan_fast.downstream.results import SIDE_FILES
from modan_fast.downstream.tasks import read_task
from modan_fast.recipes import evaluate_config
from shard_builder.settings import InputError

FILES = ("predictions.csv", *SIDE_FILES)
SMALL = {
    "repeats": 2,
    "epochs": 1,
    "batch_size": 16,
    "image_size": 32,
    "stem": "7x7",
    "device": "cpu",
    "tries": 2,
}
COLORS = ((200, 60, 60), (60, 200, 60), (60, 60, 200))


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """The number of threads changes the last bits of a fine-tuning on a CPU; a rank of two has one of two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def three_classes(tmp_path: Path) -> Path:
    """Class folders of 45 images, whose classes differ in colour, and a little in brightness."""
    chance = np.random.default_rng(0)
    for index in range(45):
        pixels = chance.integers(0, 90, (36, 36, 3)) + np.array(COLORS[index % 3]) // 2 + 20 * (index % 3)
        path = tmp_path / "organs" / ("kidney", "liver", "spleen")[index % 3] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return tmp_path / "organs"


@pytest.fixture
def two_labels(tmp_path: Path) -> Path:
    """A CSV file of 45 images with two labels, which are bright halves of an image."""
    chance = np.random.default_rng(0)
    (tmp_path / "findings").mkdir()
    rows = ["filename,left,right"]
    for index in range(45):
        left, right = index % 2, index // 2 % 2
        pixels = chance.integers(0, 90, (36, 36), dtype=np.uint8)
        pixels[:, :18] += 120 * left
        pixels[:, 18:] += 120 * right
        Image.fromarray(pixels).save(tmp_path / "findings" / f"{index:02}.png")
        rows.append(f"{index:02}.png,{left},{right}")
    (tmp_path / "findings" / "labels.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "findings" / "labels.csv"


def settings(task: Path, out: str = "results", **values: object) -> EvaluateConfig:
    where = task.parents[1] if task.suffix else task.parent
    return evaluate_config({"task": task, "init": ("scratch",), "out": where / out, **SMALL, **values})


def written(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def lines(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def stopped_after(experiments: int) -> Callable[[str, int, int, str], None]:
    """A progress that interrupts the evaluation in the middle of an experiment."""
    seen: list[str] = []

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage != "decode" and stage not in seen:
            seen.append(stage)
        if len(seen) > experiments and done >= 1 and note:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("kind", "stop"), [("multiclass", 8), ("multilabel", 1)])
def test_all_protocols_judge_a_task_of_several_classes_or_labels_and_continue_to_the_same_bytes(
    kind: str, stop: int, three_classes: Path, two_labels: Path, make_run: Callable[..., Path]
) -> None:
    init = (str(make_run("run")), "scratch")
    task = three_classes if kind == "multiclass" else two_labels
    protocols = ("probe", "logistic", "knn")
    config = settings(task, init=init, labels=(2,), tries=1, protocol=protocols, color=kind == "multiclass")
    trained = evaluate(config)
    names = [f"{name}{few}" for name in protocols for few in ("", ":2")]
    assert list(dict.fromkeys(experiment.protocol for experiment, _ in trained)) == names
    counts = {(experiment.init, experiment.protocol): 0 for experiment, _ in trained}
    for experiment, _ in trained:
        counts[experiment.init, experiment.protocol] += 1
    # Given weights leave nothing to chance, so there is one repeat.
    twice = {("run", "probe"), *(("scratch", name) for name in protocols)}
    assert counts == {key: 10 if key in twice else 5 for key in counts}

    truth = read_task(task, folds=config.out / "folds" / ("organs" if kind == "multiclass" else "labels"))
    predictions, unfinished = read_finished(config.out)
    assert unfinished == 0
    for fold_runs in predictions.values():
        for fold_run, outcome in fold_runs.items():
            rows = truth.fold_of(fold_run).test
            assert outcome.images == tuple(truth.images[row] for row in rows)
            assert np.array_equal(outcome.labels, truth.labels[rows])
            assert outcome.scores.shape == (len(rows), 3 if kind == "multiclass" else 2)
            if kind == "multiclass":
                np.testing.assert_allclose(outcome.scores.sum(1), 1, atol=1e-6)
    record = json.loads((config.out / "runs.json").read_text())["tasks"][truth.name]
    assert (record["kind"], tuple(record["classes"])) == (kind, truth.classes)
    assert {row["protocol"] for row in lines(config.out / "convergence.csv")} == {"probe", "probe:2"}
    chosen = {(row["protocol"].split(":")[0], float(row["chosen"])) for row in lines(config.out / "chosen.csv")}
    assert {name for name, _ in chosen} == {"logistic", "knn"}
    assert {value for name, value in chosen if name == "knn"} <= {
        10,
        20,
        6,
        7,
        8,
    }  # 27 images, or 2 of each class

    again = replace(config, out=config.out.with_name("again"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(again, stopped_after(stop))
    for name in FILES:  # half a line, as of a fold run that was being written
        if (again.out / name).exists():
            with (again.out / name).open("ab") as file:
                file.write(b"organs,scra")
    assert evaluate(again)
    assert written(again.out) == written(config.out)
    assert evaluate(again) == []


def test_features_as_logits_are_for_two_classes_only(three_classes: Path) -> None:
    config = settings(three_classes, recipe="released-code")
    message = (
        "`finetune_head=identity-except-simclr` is for two classes, and organs has 3 classes: pass `finetune_"
    )
    with pytest.raises(InputError, match=message):
        evaluate(config)
    assert not config.out.exists()
    assert evaluate(replace(config, protocol=("knn",), repeats=1))


def test_colours_are_given_to_encoders_of_three_channels_only(
    three_classes: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    theirs = make_run("colour", channels=3) / "encoder.safetensors"
    init = (str(make_run("grey")), f"resnet18={theirs}")
    config = settings(three_classes, init=init, protocol=("knn",))
    evaluate(config)
    colored = replace(config, color=True, out=tmp_path / "colored")
    evaluate(colored)
    one, other = ({row["init"]: "" for row in lines(each.out / "predictions.csv")} for each in (config, colored))
    for scores, each in ((one, config), (other, colored)):
        for row in lines(each.out / "predictions.csv"):
            scores[row["init"]] += row["score"] + "\n"
    assert one["grey"] == other["grey"]
    assert one["colour"] != other["colour"]
    with pytest.raises(InputError, match="made with `color=False`, not True"):
        evaluate(replace(config, color=True))


def test_the_patients_and_subgroups_of_the_images_are_listed_and_kept(three_classes: Path) -> None:
    config = settings(three_classes, protocol=("knn",), group=r"/(\d)\d\.png")
    evaluate(config)
    rows = lines(config.out / "organs-images.csv")
    assert [(row["image"], row["patient"]) for row in rows[:2]] == [
        ("kidney/00.png", "0"),
        ("kidney/03.png", "0"),
    ]
    assert len(rows) == 45
    before = (config.out / "organs-images.csv").read_bytes()
    evaluate(replace(config, group=None))
    assert (config.out / "organs-images.csv").read_bytes() == before
    (config.out / "organs-images.csv").write_text("image\n\0")
    assert evaluate(config) == []
    assert (config.out / "organs-images.csv").read_bytes() == before


COMMAND = """
import sys, torch
from pathlib import Path
from modan_fast.config import to_json
from modan_fast.downstream.evaluate import evaluate
from modan_fast.ranks import EndedElsewhere
from modan_fast.recipes import evaluate_config
import json
torch.set_num_threads(1)
for given in json.loads(sys.argv[1]):
    try:
        evaluate(evaluate_config(given))
    except EndedElsewhere as error:
        print(f"exit code {error.code}", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


def words(config: EvaluateConfig, ranks: int = 1, **before: str) -> list[str]:
    """A command that evaluates by one process or several; `before` are settings of an evaluation that fails first."""
    given = {**SMALL, "task": str(config.task), "init": list(config.init), "out": str(config.out)}
    given |= {"protocol": list(config.protocol), "labels": list(config.labels), "repeats": config.repeats}
    script = config.out.with_name("command.py")
    script.write_text(COMMAND)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    return [
        sys.executable,
        *launcher,
        str(script),
        json.dumps([*([{**given, **before}] if before else []), given]),
    ]


def test_an_evaluation_killed_by_the_system_continues_to_the_same_bytes(three_classes: Path) -> None:
    config = settings(three_classes, repeats=1)
    evaluate(config)
    killed = replace(config, out=config.out.with_name("killed"))
    with subprocess.Popen(words(killed), stdout=subprocess.DEVNULL) as running:
        path = killed.out / "chosen.csv"
        while not (path.exists() and path.read_bytes().count(b"\n") > 3):
            assert running.poll() is None
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    assert len((killed.out / "predictions.csv").read_bytes()) < len((config.out / "predictions.csv").read_bytes())
    evaluate(killed)
    assert written(killed.out) == written(config.out)


def test_ranks_divide_an_evaluation_and_write_what_one_process_writes(
    three_classes: Path, make_run: Callable[..., Path]
) -> None:
    init = (str(make_run("run")), "scratch")
    config = settings(three_classes, init=init, repeats=1, protocol=("finetune", "probe"))
    evaluate(config)
    shared = replace(config, out=config.out.with_name("shared"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = words(shared, 2, task="nowhere")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # An error ends all ranks, and rank 0 says why.
    assert sorted(line.split(" ")[0] for line in done.stdout.splitlines()) == ["InputError:", "exit"]
    assert "exit code 2" in done.stdout
    assert written(shared.out) == written(config.out)
    runs = json.loads((shared.out / "runs.json").read_text())
    assert {line["device"] for line in runs["times"]} == {"CPU, 1 threads, 2 ranks"}
    assert evaluate(shared) == []
