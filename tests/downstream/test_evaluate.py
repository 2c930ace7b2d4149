from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from modan_fast.config import EvaluateConfig
from modan_fast.downstream import finetune
from modan_fast.downstream.evaluate import evaluate
from modan_fast.downstream.results import Experiment
from modan_fast.downstream.statistics import auc_table
from modan_fast.downstream.tasks import FoldRun, read_task
from modan_fast.recipes import evaluate_config
from shard_builder.settings import InputError

MakeTask = Callable[..., Path]
MakeRun = Callable[..., Path]


def settings(task: Path, **values: object) -> EvaluateConfig:
    small = {"repeats": 1, "epochs": 1, "batch_size": 16, "image_size": 32, "stem": "7x7", "device": "cpu"}
    default = {
        "task": task,
        "init": ("scratch",),
        "out": task.parent / "results",
        "protocol": ("finetune", "probe"),
    }
    return evaluate_config({**default, **small, **values})


def content(config: EvaluateConfig) -> bytes:
    return (config.out / "predictions.csv").read_bytes()


def test_a_separable_task_is_learnt_and_a_random_one_is_not(make_task: MakeTask, make_run: MakeRun) -> None:
    run = str(make_run("run"))
    for separable, low, high in ((True, 0.95, 1.0), (False, 0.2, 0.8)):
        task = make_task(f"separable-{separable}", separable=separable)
        rates = {"lr": 1e-3, "probe_lr": 1e-2}
        protocols = ("finetune", "probe", "logistic", "knn")
        config = settings(
            task, init=(run,), out=task / "results", protocol=protocols, epochs=3, batch_size=8, **rates
        )
        evaluate(config)
        rows = auc_table(config.out)
        assert [row.protocol for row in rows] == [*protocols]
        for row in rows:
            assert row.mean is not None
            assert low <= row.mean <= high


def test_predictions_hold_every_test_image_once_a_fold(make_task: MakeTask, make_run: MakeRun) -> None:
    config = settings(make_task(), init=("scratch", str(make_run("runs/mulsupcon"))), protocol=("probe",))
    trained = evaluate(config)
    assert trained == [
        (Experiment("nodule", init, "paper", "probe"), FoldRun(1, fold))
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


def test_a_command_killed_halfway_and_run_again_gives_the_same_bytes_and_table(make_task: MakeTask) -> None:
    config = settings(make_task(count=23), protocol=("finetune",))
    evaluate(config)
    killed = replace(config, out=config.out.with_name("killed"))
    words = [
        "evaluate",
        "--task",
        config.task,
        "--init",
        "scratch",
        "--protocol",
        "finetune",
        "--out",
        killed.out,
    ]
    words += [
        "--repeats",
        1,
        "--epochs",
        1,
        "--batch-size",
        16,
        "--image-size",
        32,
        "--stem",
        "7x7",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "modan_fast", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        while not (killed.out / "predictions.csv").exists():
            assert running.poll() is None
            time.sleep(0.01)
        running.kill()
    assert len(content(killed)) < len(content(config)), "it must be killed before it has finished"
    # Half a line stands for a fold run that was being written.
    with (killed.out / "predictions.csv").open("ab") as file:
        file.write(b"nodule,scratch,paper,finetune,1,5,images/008.png,0,0.5\nnodule,scratch,paper,fine")
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert content(killed) == content(config)
    assert (killed.out / "curves.csv").read_bytes() == (config.out / "curves.csv").read_bytes()
    [row] = auc_table(killed.out)
    assert f"{row.mean:.3f}" in again.stdout


def test_a_second_evaluation_in_a_folder_is_refused_while_the_first_is_at_work(begun: EvaluateConfig) -> None:
    def meanwhile(stage: str, done: int, total: int, note: str) -> None:
        if done == 1:
            with pytest.raises(InputError, match="another evaluation is writing to .*: wait for it"):
                evaluate(begun)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(begun, meanwhile)
    assert evaluate(begun), "an interrupted evaluation leaves no lock behind"


def test_every_fold_run_records_the_validation_loss_of_each_epoch(make_task: MakeTask) -> None:
    config = settings(make_task(count=23), epochs=2)
    evaluate(config)
    with (config.out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = [(row["protocol"], int(row["fold"]), int(row["epoch"])) for row in rows]
    assert keys == [
        (protocol, fold, epoch) for protocol in config.protocol for fold in range(1, 6) for epoch in (1, 2)
    ]
    assert all(0 < float(row["val_loss"]) < 10 for row in rows)


def test_released_code_fine_tunes_a_simclr_encoder_with_a_two_way_head(
    make_task: MakeTask, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {}
    build = finetune.task_network

    def spy(*arguments: object, headless: bool, **named: object) -> finetune.TaskNetwork:
        network = build(*arguments, headless=headless, **named)  # type: ignore[arg-type]
        built[headless] = network.network[1]
        return network

    monkeypatch.setattr(finetune, "task_network", spy)
    simclr, other = make_run("a"), make_run("b", seed=2)
    (simclr / "config.json").write_text(json.dumps({"settings": {"method": "simclr"}}))
    inits = (str(simclr), str(other))
    config = settings(make_task(count=23), init=inits, recipe="released-code", protocol=("finetune",))
    evaluate(config)
    assert isinstance(built[False], torch.nn.Linear)
    assert built[False].out_features == 2
    assert isinstance(built[True], torch.nn.Identity)
    runs = json.loads((config.out / "runs.json").read_text())
    assert (runs["inits"]["a"]["method"], runs["inits"]["b"]["method"]) == ("simclr", None)


def test_the_times_of_an_evaluation_name_their_device(make_task: MakeTask) -> None:
    config = settings(make_task(count=23), epochs=2, protocol=("probe",))
    evaluate(config)
    [line] = json.loads((config.out / "runs.json").read_text())["times"]
    assert line["cells"] == 5
    assert line["device"].startswith("CPU")
    assert line["seconds_per_epoch"] == pytest.approx(line["seconds"] / 10)
    trained = sum(len(fold.train) for fold in read_task(config.task).folds)
    assert line["images"] == 2 * trained


def make_class_folders(task: Path) -> Path:
    """The images of a task in two class folders, named for 8 patients."""
    folder = task.with_name("classes")
    for index, image in enumerate(sorted((task / "images").iterdir())):
        copy = folder / ("healthy" if index % 2 == 0 else "ill") / f"p{index % 16:02}-{index:03}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, copy)
    return folder


def test_class_folders_get_folds_once_for_all_methods(make_task: MakeTask) -> None:
    config = settings(make_class_folders(make_task()), protocol=("probe",), group=r"p(\d+)-")
    evaluate(config)
    folds = {path.name: path.read_bytes() for path in (config.out / "folds" / "classes").iterdir()}
    assert len(folds) == 15
    other = replace(config, out=config.out.with_name("other"))
    evaluate(other)
    assert {path.name: path.read_bytes() for path in (other.out / "folds" / "classes").iterdir()} == folds
    assert evaluate(replace(config, repeats=2))
    assert not (config.out / "classes-leakage.csv").exists()
    shutil.copy(config.task / "ill" / "p01-001.png", config.task / "ill" / "p01-999.png")
    with pytest.raises(InputError, match=r"ill/p01-999\.png is one.*another results folder"):
        evaluate(config)


def test_leaks_are_logged_and_listed(make_task: MakeTask, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_task()
    # Fold 1 tests image 0 and trains on image 6. Only images 40 and 41 share no patient with a training image.
    shutil.copy(folder / "images" / "000.png", folder / "images" / "006.png")
    config = settings(folder, protocol=("probe",), group=r"(\d\d)\d\.png")
    evaluate(config)
    with (config.out / "nodule-leakage.csv").open() as file:
        rows = list(csv.DictReader(file))
    identical = {(row["fold"], row["test_image"], row["train_image"]) for row in rows if row["shared"] == "bytes"}
    assert identical == {("1", "images/000.png", "images/006.png"), ("4", "images/006.png", "images/000.png")}
    assert {row["shared"] for row in rows} == {"bytes", "patient"}
    assert "2 by the same bytes, 41 by the same patient" in caplog.text
    assert "nodule-leakage.csv" in caplog.text
    # A later call without patients keeps the leaks by patient, and a finished evaluation lists leaks, too.
    evaluate(replace(config, repeats=2, group=None))
    with (config.out / "nodule-leakage.csv").open() as file:
        assert list(csv.DictReader(file)) == rows
    (config.out / "nodule-leakage.csv").unlink()
    assert evaluate(config) == []
    with (config.out / "nodule-leakage.csv").open() as file:
        assert list(csv.DictReader(file)) == rows


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
        ({"image_size": 64}, "was made with `image_size=32`, not 64: pass `image_size=32`, or choose another"),
        ({"epochs": 2}, "`epochs=1`, not 2"),
        ({"seed": 1}, "`seed=0`, not 1"),
        ({"stem": "3x3"}, "`stem=7x7`, not 3x3"),
        ({"precision": "bf16"}, "`precision=float32`, not bf16"),
        ({"model_selection": "last-epoch"}, "`model_selection=lowest-val-loss`, not last-epoch"),
    ],
)
def test_other_settings_are_refused(begun: EvaluateConfig, changed: dict[str, object], message: str) -> None:
    before = content(begun)
    with pytest.raises(InputError, match=message):
        evaluate(replace(begun, **changed))  # type: ignore[arg-type]
    assert content(begun) == before


def test_settings_that_an_older_folder_lacks_have_the_recipes_values(begun: EvaluateConfig) -> None:
    path = begun.out / "runs.json"
    whole = json.loads(path.read_text())
    older = json.loads(path.read_text())
    for name in ("probe_batch_norm", "finetune_head", "model_selection", "sum_filters"):
        del older["settings"]["paper"][name]
    path.write_text(json.dumps(older))
    with pytest.raises(InputError, match="made with `probe_batch_norm=frozen`, not training"):
        evaluate(replace(begun, probe_batch_norm="training"))
    assert len(evaluate(begun)) == 5
    assert json.loads(path.read_text())["settings"] == whole["settings"]


@pytest.fixture
def begun(make_task: MakeTask) -> EvaluateConfig:
    """A results folder with settings, but without a fold run."""
    config = settings(make_task(), protocol=("probe",))

    def stop(stage: str, done: int, total: int, note: str) -> None:
        if stage == "scratch probe" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(replace(config, init=("scratch",)), stop)
    (config.out / "predictions.csv").touch()
    return config


def test_another_task_of_the_same_name_is_refused(begun: EvaluateConfig) -> None:
    shutil.copy(begun.task / "images" / "001.png", begun.task / "images" / "003.png")
    with pytest.raises(InputError, match="other images or folds of task nodule"):
        evaluate(begun)


def test_an_init_whose_weights_changed_is_refused(begun: EvaluateConfig, make_run: MakeRun) -> None:
    config = replace(begun, init=(str(make_run("mulsupcon")),))
    evaluate(config)
    make_run("mulsupcon", seed=2)
    with pytest.raises(InputError, match=r"the weights of mulsupcon \(.*\) have changed"):
        evaluate(config)


def test_two_runs_of_one_name_are_named_as_given(begun: EvaluateConfig, make_run: MakeRun) -> None:
    first, second = make_run("a/run"), make_run("b/run", seed=2)
    both = replace(begun, init=(str(first), str(second)))
    assert {experiment.init for experiment, _ in evaluate(both)} == {str(first), str(second)}
    assert evaluate(both) == []
    assert evaluate(replace(begun, init=(str(first),))) == []  # under the name that it has here


def test_a_second_run_of_a_name_leaves_the_first_its_name(begun: EvaluateConfig, make_run: MakeRun) -> None:
    first, second = make_run("a/run"), make_run("b/run", seed=2)
    assert {experiment.init for experiment, _ in evaluate(replace(begun, init=(str(first),)))} == {"run"}
    both = replace(begun, init=(str(first), str(second)))
    assert {experiment.init for experiment, _ in evaluate(both)} == {str(second)}
    assert evaluate(both) == []


def test_an_encoder_file_is_named_after_its_run(begun: EvaluateConfig, make_run: MakeRun) -> None:
    run = make_run("mulsupcon")
    (run / "encoder.safetensors").rename(run / "encoder-0200.safetensors")
    trained = evaluate(replace(begun, init=(str(run / "encoder-0200.safetensors"),)))
    assert {experiment.init for experiment, _ in trained} == {"mulsupcon/encoder-0200"}


def test_an_encoder_that_has_diverged_is_named_before_anything_is_trained(
    begun: EvaluateConfig, make_run: MakeRun
) -> None:
    good, bad = make_run("good"), make_run("bad")
    tensors = load_file(bad / "encoder.safetensors")
    tensors["layer1.0.conv1.weight"][0, 0] = torch.nan
    save_file(tensors, bad / "encoder.safetensors")
    before = content(begun)
    with pytest.raises(InputError, match=r"bad/encoder\.safetensors holds weights that are not finite"):
        evaluate(replace(begun, init=(str(good), str(bad))))
    assert content(begun) == before


def test_imagenet_is_judged_under_both_recipes_and_lost_filters_are_logged(
    make_task: MakeTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    given = {"protocol": ("probe",), "init": ("imagenet",), "imagenet_weights": weights}
    one = settings(make_task(), **given)
    evaluate(one)
    assert "does not fit" not in caplog.text
    evaluate(settings(one.task, recipe="released-code", **given))
    assert {row.recipe for row in auc_table(one.out)} == {"paper", "released-code"}
    evaluate(replace(one, stem="3x3", out=tmp_path / "other"))
    assert "its first convolution is 7x7 and does not fit a 3x3 stem, so that one is random" in caplog.text
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    with pytest.raises(InputError, match="the weights of imagenet .* have changed"):
        evaluate(replace(one, repeats=2))


def test_an_encoder_that_does_not_fit_is_refused(begun: EvaluateConfig, make_run: MakeRun) -> None:
    with pytest.raises(InputError, match="no encoder at"):
        evaluate(replace(begun, init=("nowhere",)))


def test_a_folder_of_other_things_and_a_needless_positive_are_refused(
    begun: EvaluateConfig, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match="mine exists and is no results folder"):
        evaluate(replace(begun, out=tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="`positive` is for class folders"):
        evaluate(replace(begun, positive="yes"))


def test_predictions_without_runs_are_refused(begun: EvaluateConfig) -> None:
    (begun.out / "runs.json").unlink()
    with pytest.raises(InputError, match=r"has predictions\.csv but no runs\.json"):
        evaluate(begun)


def test_both_recipes_share_a_results_folder(make_task: MakeTask) -> None:
    config = settings(make_task(), protocol=("probe",))
    evaluate(config)
    evaluate(settings(config.task, recipe="released-code"))
    rows = auc_table(config.out)
    assert [(row.recipe, row.protocol, row.repeats) for row in rows] == [
        ("paper", "probe", 1),
        ("released-code", "finetune", 1),
        ("released-code", "probe", 1),
    ]
