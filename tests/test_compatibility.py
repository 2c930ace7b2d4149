"""What version 0.1.0 wrote opens in this version: its shard set, run folder and results folder."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from modan_fast.config import ReportConfig
from modan_fast.downstream.evaluate import evaluate
from modan_fast.downstream.statistics import auc_table
from modan_fast.loader import open_loader
from modan_fast.pretrained import load_encoder
from modan_fast.recipes import evaluate_config
from modan_fast.report.page import write_report
from modan_fast.run import finished_epochs, settings_for
from modan_fast.trainer import pretrain
from shard_builder.verify import verify

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A folder with `shards`, `run`, `results` and the `task`, as 0.1.0 wrote them in /data/fixture.

    Every tensor of the encoder had one value before the training, so that the archive is small.
    """
    with tarfile.open(FIXTURES / "written-by-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_shard_set_of_0_1_0_is_whole_and_is_loaded(old):
    assert not verify(old / "shards", workers=1).damage
    loader = open_loader(old / "shards", batch_size=6, device="cpu", threads=1)
    ids = [sample for batch in loader for sample in batch.ids.tolist()]
    assert sorted(ids) == list(range(12))


def test_a_run_of_0_1_0_is_resumed_to_the_loss_that_0_1_0_reached(old):
    assert finished_epochs(old / "run") == 1
    assert load_encoder(old / "run").architecture.stem == "7x7"
    settings = settings_for({"out": old / "run", "epochs": 2}, resume=True)
    # It counted milestones in epochs, and keeps them.
    assert settings.milestones == (700, 800, 900)
    pretrain(settings, resume=True)
    losses = [json.loads(line)["loss"] for line in (old / "run" / "log.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([2.3978962898254395, 2.3978958129882812], rel=1e-6)


def test_an_evaluation_of_0_1_0_is_finished_and_its_report_is_written(old):
    predictions = (old / "results" / "predictions.csv").read_bytes()
    # The init is known by its path and bytes; the path was /data/fixture/run.
    runs = old / "results" / "runs.json"
    runs.write_text(runs.read_text().replace("/data/fixture", str(old)))
    before = auc_table(old / "results")
    settings = {"task": "task", "init": ["run", "scratch"], "repeats": 1, "epochs": 1, "image_size": 32}
    settings |= {"batch_size": 4, "stem": "7x7", "device": "cpu", "protocol": ["finetune", "probe"]}
    assert evaluate(evaluate_config(settings)) == []
    assert (old / "results" / "predictions.csv").read_bytes() == predictions
    assert auc_table(old / "results") == before
    page = write_report(old / "results", ReportConfig(device="cpu", samples=0))
    assert "Table 4" in page.read_text(encoding="utf-8")


def test_predictions_of_0_1_0_are_enough_for_a_report(old):
    shutil.rmtree(old / "run")
    assert write_report(old / "results", ReportConfig(device="cpu", samples=0)).exists()
