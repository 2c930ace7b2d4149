from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from modan_fast.config import EvaluateConfig
from modan_fast.downstream.evaluate import evaluate
from modan_fast.downstream.results import Series
from modan_fast.downstream.statistics import auc_table
from modan_fast.downstream.tasks import Cell
from shard_builder.settings import InputError

MakeTask = Callable[..., Path]
MakeRun = Callable[..., Path]


def settings(task: Path, **values: object) -> EvaluateConfig:
    small = {"repeats": 1, "epochs": 1, "batch_size": 16, "image_size": 32, "stem": "7x7", "device": "cpu"}
    default = {"task": task, "init": ("scratch",), "out": task.parent / "results"}
    return EvaluateConfig(**{**default, **small, **values})  # type: ignore[arg-type]


def content(config: EvaluateConfig) -> bytes:
    return (config.out / "predictions.csv").read_bytes()


def test_a_separable_task_is_learnt_and_a_random_one_is_not(make_task: MakeTask, make_run: MakeRun) -> None:
    run = str(make_run("run"))
    for separable, low, high in ((True, 0.95, 1.0), (False, 0.2, 0.8)):
        task = make_task(f"separable-{separable}", separable=separable)
        rates = {"lr": 1e-3, "probe_lr": 1e-2}
        config = settings(task, init=(run,), out=task / "results", epochs=3, batch_size=8, **rates)
        evaluate(config)
        rows = auc_table(config.out / "predictions.csv")
        assert [row.protocol for row in rows] == ["finetune", "probe"]
        for row in rows:
            assert row.mean is not None
            assert low <= row.mean <= high


def test_predictions_hold_every_test_image_once_a_fold(make_task: MakeTask, make_run: MakeRun) -> None:
    config = settings(make_task(), init=("scratch", str(make_run("runs/mulsupcon"))), protocol=("probe",))
    trained = evaluate(config)
    assert trained == [
        (Series("nodule", init, "paper", "probe"), Cell(1, fold))
        for init in ("scratch", "mulsupcon")
        for fold in range(1, 6)
    ]
    with (config.out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for init in ("scratch", "mulsupcon"):
        images = [row["image"] for row in rows if row["init"] == init]
        assert sorted(images) == [f"images/{index:03}.png" for index in range(43)]
    for row in rows:
        assert int(row["label"]) == int(row["image"][7:10]) % 2
        assert 0 <= float(row["score"]) <= 1
        with (config.task / "dataframe" / f"nodule_test_fold{row['fold']}.csv").open() as file:
            assert f"{row['image']}," in file.read()
    runs = json.loads((config.out / "runs.json").read_text())
    assert runs["inits"]["mulsupcon"]["stem"] == "7x7"
    assert runs["inits"]["scratch"] == {"kind": "scratch"}
    assert [line["cells"] for line in runs["times"]] == [5, 5]


def test_a_finished_evaluation_is_left_alone(make_task: MakeTask) -> None:
    config = settings(make_task(), protocol=("probe",))
    assert len(evaluate(config)) == 5
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in config.out.iterdir()}
    assert evaluate(config) == []
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in config.out.iterdir()} == before


def test_what_is_added_later_equals_what_is_done_at_once(make_task: MakeTask, make_run: MakeRun) -> None:
    run = str(make_run("mulsupcon"))
    first = settings(make_task(), protocol=("probe",))
    evaluate(first)
    begun = content(first)
    whole = replace(first, init=(run, "scratch"), repeats=2)
    assert len(evaluate(replace(first, init=(run,)))) == 5
    assert len(evaluate(whole)) == 10
    assert content(first).startswith(begun)
    at_once = replace(whole, out=first.out.with_name("at-once"))
    evaluate(at_once)
    assert sorted(content(first).splitlines()) == sorted(content(at_once).splitlines())


KILLED = """
import os, signal, sys
from pathlib import Path

import torch
from modan_fast.config import EvaluateConfig
from modan_fast.downstream.evaluate import evaluate

def report(stage, done, total, note):
    if stage == "scratch finetune" and done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
task, out = map(Path, sys.argv[1:])
evaluate(EvaluateConfig(task=task, init=("scratch",), out=out, repeats=1, epochs=1, batch_size=16, image_size=32,
                        stem="7x7", device="cpu"), report)
"""


def test_a_killed_evaluation_continues_to_the_same_bytes(make_task: MakeTask) -> None:
    config = settings(make_task(count=23))
    evaluate(config)
    killed = replace(config, out=config.out.with_name("killed"))
    arguments = [sys.executable, "-c", KILLED, str(killed.task), str(killed.out)]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    # The kill came in the third cell, after two were written; half a line more stands for one in the writing.
    with (killed.out / "predictions.csv").open("ab") as file:
        file.write(b"nodule,scratch,paper,finetune,1,3,images/004.png,0,0.5\nnodule,scratch,paper,fine")
    trained = evaluate(killed)
    assert [cell.fold for series, cell in trained if series.protocol == "finetune"] == [3, 4, 5]
    assert content(killed) == content(config)


def test_a_file_cut_anywhere_is_repaired_to_the_same_bytes(make_task: MakeTask) -> None:
    config = settings(make_task(), protocol=("probe",))
    evaluate(config)
    whole = content(config)
    for cut in (10, len(whole) // 2, len(whole) - 1):
        (config.out / "predictions.csv").write_bytes(whole[:cut])
        assert evaluate(config)
        assert content(config) == whole


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 64}, "was made with --image-size 32, not 64: give --image-size 32, or another"),
        ({"epochs": 2}, "--epochs 1, not 2"),
        ({"seed": 1}, "--seed 0, not 1"),
        ({"stem": "3x3"}, "--stem 7x7, not 3x3"),
        ({"precision": "bf16"}, "--precision float32, not bf16"),
    ],
)
def test_other_settings_are_refused(made: EvaluateConfig, changed: dict[str, object], message: str) -> None:
    before = content(made)
    with pytest.raises(InputError, match=message):
        evaluate(replace(made, **changed))  # type: ignore[arg-type]
    assert content(made) == before


@pytest.fixture
def made(make_task: MakeTask) -> EvaluateConfig:
    """A results folder with settings, but without a cell."""
    config = settings(make_task(), protocol=("probe",))

    def stop(stage: str, done: int, total: int, note: str) -> None:
        if stage == "scratch probe" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(replace(config, init=("scratch",)), stop)
    (config.out / "predictions.csv").touch()
    return config


def test_another_task_of_the_same_name_is_refused(made: EvaluateConfig) -> None:
    shutil.copy(made.task / "images" / "001.png", made.task / "images" / "003.png")
    with pytest.raises(InputError, match="other images or folds of task nodule"):
        evaluate(made)


def test_an_init_whose_weights_changed_is_refused(made: EvaluateConfig, make_run: MakeRun) -> None:
    config = replace(made, init=(str(make_run("mulsupcon")),))
    evaluate(config)
    make_run("mulsupcon", seed=2)
    with pytest.raises(InputError, match=r"the weights of mulsupcon \(.*\) have changed"):
        evaluate(config)


def test_two_runs_of_one_name_are_named_as_given(made: EvaluateConfig, make_run: MakeRun) -> None:
    first, second = make_run("a/run"), make_run("b/run", seed=2)
    both = replace(made, init=(str(first), str(second)))
    assert {series.init for series, _ in evaluate(both)} == {str(first), str(second)}
    assert evaluate(both) == []


def test_a_second_run_of_a_name_leaves_the_first_its_name(made: EvaluateConfig, make_run: MakeRun) -> None:
    first, second = make_run("a/run"), make_run("b/run", seed=2)
    assert {series.init for series, _ in evaluate(replace(made, init=(str(first),)))} == {"run"}
    both = replace(made, init=(str(first), str(second)))
    assert {series.init for series, _ in evaluate(both)} == {str(second)}
    assert evaluate(both) == []


def test_an_encoder_file_is_named_after_its_run(made: EvaluateConfig, make_run: MakeRun) -> None:
    run = make_run("mulsupcon")
    (run / "encoder.safetensors").rename(run / "encoder-0200.safetensors")
    trained = evaluate(replace(made, init=(str(run / "encoder-0200.safetensors"),)))
    assert {series.init for series, _ in trained} == {"mulsupcon/encoder-0200"}


def test_an_encoder_that_does_not_fit_is_refused(made: EvaluateConfig, make_run: MakeRun) -> None:
    with pytest.raises(InputError, match="takes 3 channels"):
        evaluate(replace(made, init=(str(make_run("rgb", channels=3)),)))
    with pytest.raises(InputError, match="no encoder at"):
        evaluate(replace(made, init=("nowhere",)))


def test_predictions_without_runs_are_refused(made: EvaluateConfig) -> None:
    (made.out / "runs.json").unlink()
    with pytest.raises(InputError, match=r"has predictions\.csv but no runs\.json"):
        evaluate(made)


def test_both_recipes_share_a_results_folder(make_task: MakeTask) -> None:
    config = settings(make_task(), protocol=("probe",))
    evaluate(config)
    evaluate(replace(config, recipe="released-code", protocol=("finetune", "probe")))
    rows = auc_table(config.out / "predictions.csv")
    assert [(row.recipe, row.protocol, row.repeats) for row in rows] == [
        ("paper", "probe", 1),
        ("released-code", "finetune", 1),
        ("released-code", "probe", 1),
    ]
