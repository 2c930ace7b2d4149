"""The demo goes the whole way and can be repeated."""

import json

import pytest
from PIL import Image

from modan_fast import demo as module
from modan_fast.config import ReportConfig
from modan_fast.demo import demo
from modan_fast.downstream.statistics import auc_table
from modan_fast.report.page import write_report
from modan_fast.run import finished_epochs
from shard_builder.settings import InputError


def test_the_demo_leaves_every_part_and_continues_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SIZE", 32)
    monkeypatch.setattr(module, "PER_CLASS", 2)
    monkeypatch.setattr(module, "TASK_IMAGES", 40)
    small = {"batch_size": 32, "image_size": 32}
    monkeypatch.setattr(module, "PRETRAINING", {**module.PRETRAINING, **small, "epochs": 1})
    monkeypatch.setattr(module, "EVALUATION", {**module.EVALUATION, "image_size": 32, "epochs": 1})
    made = demo(tmp_path / "demo")
    for path in vars(made).values():
        assert path.exists(), path
    assert finished_epochs(made.run) == 1
    assert {(row.init, row.protocol) for row in auc_table(made.results)} == {
        (init, protocol) for init in ("run", "scratch") for protocol in ("finetune", "probe", "logistic", "knn")
    }
    for picture in (made.contact_sheet, made.embedding):
        assert min(Image.open(picture).size) > 300
    page = write_report(made.results, ReportConfig(samples=0)).read_text(encoding="utf-8")
    speeds = [json.loads(line)["views_per_second"] for line in (made.run / "log.jsonl").read_text().splitlines()]
    assert f"{sorted(speeds)[len(speeds) // 2]:,.0f} views" in page
    assert (made.results / "figures" / "pretraining-speed.svg").exists()
    before = {
        path: path.stat().st_mtime_ns for path in (made.run, made.results / "predictions.csv", made.archive)
    }
    assert demo(tmp_path / "demo") == made
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_what_a_killed_demo_leaves_is_no_reason_to_refuse_it(tmp_path, monkeypatch):
    class ReachedError(Exception):
        pass

    def reached(*_, **__):
        raise ReachedError

    for name in (".archive.part123", ".shards.building"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(module, "phantom_archive", reached)
    with pytest.raises(ReachedError):
        demo(tmp_path)


def test_a_folder_that_is_no_demo_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="is no folder of a demo"):
        demo(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").exists()
