"""Inits of other programs: how their input is recorded, and that a results folder holds to it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from modan_fast.config import EvaluateConfig, ReportConfig
from modan_fast.downstream.evaluate import evaluate
from modan_fast.downstream.inits import load_inits
from modan_fast.downstream.statistics import auc_table
from modan_fast.encoders import IMAGENET_MEAN
from modan_fast.recipes import evaluate_config
from modan_fast.report.page import write_report
from shard_builder.settings import InputError


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A ResNet-18 as another program saves it."""
    torch.manual_seed(0)
    path = tmp_path / "weights" / "theirs.pth"
    path.parent.mkdir()
    torch.save({"state_dict": torchvision.models.resnet18().state_dict()}, path)
    return path


@pytest.fixture
def settings(make_task_folder: Path, theirs: Path, tmp_path: Path) -> EvaluateConfig:
    given = {"task": str(make_task_folder), "init": [f"resnet18={theirs}"], "out": str(tmp_path / "results")}
    return evaluate_config({**given, "protocol": ["probe"], "repeats": 1, "epochs": 1, "image_size": 32})


def test_another_programs_weights_see_what_they_were_trained_with(settings: EvaluateConfig, theirs: Path) -> None:
    [init] = load_inits(settings, {})
    assert init.name == "weights/theirs"
    assert (init.architecture.channels, init.architecture.mean) == (3, IMAGENET_MEAN)
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load(theirs)["state_dict"])
    assert torch.equal(init.weights["conv1.weight"], network.conv1.weight)
    [plain] = load_inits(replace(settings, normalize=False), {})
    assert plain.architecture.channels == 1
    torch.testing.assert_close(plain.weights["conv1.weight"], network.conv1.weight.sum(1, keepdim=True))


def test_the_input_is_recorded_for_each_recipe_and_kept(settings: EvaluateConfig, tmp_path: Path) -> None:
    evaluate(settings)
    with pytest.raises(InputError, match="has weights/theirs with `normalize=True`: pass that"):
        evaluate(replace(settings, normalize=False))
    evaluate(replace(settings, recipe="released-code", normalize=False, stem="7x7"))
    init = json.loads((tmp_path / "results" / "runs.json").read_text())["inits"]["weights/theirs"]
    assert init["normalized"] == {"paper": True, "released-code": False}
    assert (init["encoder"], init["architecture"]) == ("resnet18", "resnet18")
    assert {row.recipe for row in auc_table(tmp_path / "results")} == {"paper", "released-code"}
    page = write_report(tmp_path / "results", ReportConfig(samples=0)).read_text()
    assert "normalised in paper, not normalised in released-code" in page


def test_results_of_versions_that_normalised_nothing_ask_for_that(
    settings: EvaluateConfig, tmp_path: Path
) -> None:
    evaluate(replace(settings, normalize=False))
    path = tmp_path / "results" / "runs.json"
    runs = json.loads(path.read_text())
    del runs["inits"]["weights/theirs"]["normalized"]
    path.write_text(json.dumps(runs))
    with pytest.raises(InputError, match="with `normalize=False`: pass that"):
        evaluate(settings)
    assert evaluate(replace(settings, normalize=False)) == []


def test_normalising_changes_the_scores(settings: EvaluateConfig, tmp_path: Path) -> None:
    evaluate(settings)
    evaluate(replace(settings, normalize=False, out=tmp_path / "other"))
    one, other = ((tmp_path / name / "predictions.csv").read_text() for name in ("results", "other"))
    assert one != other


def test_scratch_may_be_any_network(settings: EvaluateConfig, tmp_path: Path) -> None:
    evaluate(replace(settings, init=("scratch",), encoder="timm/convnext_atto"))
    runs = json.loads((tmp_path / "results" / "runs.json").read_text())
    assert runs["settings"]["paper"]["encoder"] == "timm/convnext_atto"
    with pytest.raises(InputError, match="was made with `encoder=timm/convnext_atto`, not resnet18"):
        evaluate(replace(settings, init=("scratch",)))


def test_one_file_under_two_encoders_is_two_inits(settings: EvaluateConfig, theirs: Path, tmp_path: Path) -> None:
    both = (f"resnet18={theirs}", f"timm/resnet18={theirs}")
    evaluate(replace(settings, init=both))
    assert {row.init for row in auc_table(tmp_path / "results")} == set(both)
    evaluate(replace(settings, init=both[:1], out=tmp_path / "other"))
    assert len(evaluate(replace(settings, init=both[1:], out=tmp_path / "other"))) == 5
    runs = json.loads((tmp_path / "other" / "runs.json").read_text())
    assert {init["encoder"] for init in runs["inits"].values()} == {"resnet18", "timm/resnet18"}


def test_a_recipe_begun_meanwhile_does_not_hide_what_an_earlier_version_did(
    settings: EvaluateConfig, tmp_path: Path
) -> None:
    evaluate(replace(settings, normalize=False))
    path = tmp_path / "results" / "runs.json"
    runs = json.loads(path.read_text())
    del runs["inits"]["weights/theirs"]["normalized"]
    path.write_text(json.dumps(runs))
    evaluate(replace(settings, recipe="released-code", normalize=False, stem="7x7"))
    with pytest.raises(InputError, match="with `normalize=False`: pass that"):
        evaluate(replace(settings, repeats=2))
