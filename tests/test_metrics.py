"""Loggers: what TensorBoard reads back, what Weights & Biases and MLflow are told, and that none stops a training."""

import json
import logging
import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from modan_fast import metrics
from modan_fast.api import pretrain
from modan_fast.metrics import as_text, check_loggers, library_loggers
from modan_fast.recipes import pretrain_config
from shard_builder.settings import InputError

SMALL = {"image_size": 32, "encoder": "timm/test_resnet", "device": "cpu", "threads": 1, "batch_size": 16}


def trained(folder, out, **settings):
    return pretrain(**{**SMALL, "shards": str(folder), "out": out, **settings})


def read_back(run):
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def scalars(run, name):
    return [(event.step, event.value) for event in read_back(run).Scalars(name)]


def lines(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


class Recorder:
    """A stand-in for a library: every call on it, with its arguments."""

    def __init__(self, fails=()):
        self.calls, self.fails = [], fails

    def __call__(self, name):
        def call(*values, **named):
            self.calls.append((name, values, named))
            if name in self.fails:
                raise ConnectionError("no route to the server\nand so on")

        return call

    def named(self, name):
        return [(values, named) for each, values, named in self.calls if each == name]


@pytest.fixture
def fake_wandb(monkeypatch):
    """The library wandb, as far as it is used; `init` returns a run."""

    def install(fails=()):
        recorder = Recorder(fails)
        module, run = ModuleType("wandb"), ModuleType("run")
        run.log, run.finish = recorder("log"), recorder("finish")
        module.Image = lambda path: f"picture {path}"
        module.init = lambda **named: recorder("init")(**named) or run
        monkeypatch.setitem(sys.modules, "wandb", module)
        return recorder

    return install


@pytest.fixture
def fake_mlflow(monkeypatch):
    """The library mlflow, as far as it is used."""
    recorder, module = Recorder(), ModuleType("mlflow")
    for name in ("active_run", "start_run", "log_params", "log_metrics", "log_artifact", "end_run"):
        setattr(module, name, recorder(name))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return recorder


def test_tensorboard_reads_back_the_numbers_the_settings_and_the_views(shards, tmp_path):
    run = trained(shards, tmp_path / "run", epochs=2, lr=0.03)
    for name in ("loss", "lr", "monitor/rankme", "monitor/knn_class", "views_per_second"):
        wanted = [(line["epoch"], line[name]) for line in lines(run)]
        assert scalars(run, name) == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
    found = read_back(run)
    (views,) = found.Images("views")
    (tmp_path / "views.png").write_bytes(views.encoded_image_string)
    with Image.open(tmp_path / "views.png") as seen, Image.open(run / "views.png") as kept:
        assert np.array_equal(np.asarray(seen.convert("L")), np.asarray(kept))
    assert views.step == 0
    (settings,) = found.Tensors("settings/text_summary")
    assert "| lr | 0.03 |" in make_ndarray(settings.tensor_proto)[0].decode()


def test_a_resumed_run_has_no_doubled_points_even_of_epochs_that_were_lost(shards, tmp_path):
    class Fails:
        def log(self, metrics, step):
            if step == 4:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):  # epochs 3 and 4 are in no checkpoint
        pretrain(
            **SMALL, shards=str(shards), out=tmp_path / "run", epochs=5, checkpoint_every=2, loggers=[Fails()]
        )
    run = pretrain(out=tmp_path / "run", resume=True)
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert [step for step, _ in scalars(run, "loss")] == [1, 2, 3, 4, 5]
    assert [value for _, value in scalars(run, "loss")] == pytest.approx([line["loss"] for line in lines(run)])


def test_a_run_that_replaces_another_hides_its_points(shards, tmp_path):
    trained(shards, tmp_path / "run", epochs=3)
    run = trained(shards, tmp_path / "run", epochs=1, overwrite=True)
    assert [step for step, _ in scalars(run, "loss")] == [1]


def test_a_link_named_tensorboard_is_replaced_and_not_followed(shards, tmp_path):
    run = trained(shards, tmp_path / "run", epochs=1)
    (run / "tensorboard").rename(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").iterdir())
    (run / "tensorboard").symlink_to(tmp_path / "elsewhere")
    pretrain(out=run, resume=True, epochs=2)
    assert sorted((tmp_path / "elsewhere").iterdir()) == before
    assert [step for step, _ in scalars(run, "loss")] == [2]


def test_wandb_gets_the_name_the_settings_the_views_and_the_numbers(shards, tmp_path, fake_wandb):
    recorder = fake_wandb()
    run = trained(shards, tmp_path / "first", epochs=2, log=["wandb"])
    ((_, begun),) = recorder.named("init")
    assert (begun["name"], begun["group"], begun["dir"]) == ("first", "first", str(run))
    assert begun["config"]["batch_size"] == 16
    (views, *logged) = recorder.named("log")
    assert views == (({"views": f"picture {run / 'views.png'}"},), {"step": 0})
    assert [(values[0], named["step"]) for values, named in logged] == [
        ({name: value for name, value in line.items() if name != "epoch"}, line["epoch"]) for line in lines(run)
    ]
    assert recorder.calls[-1][0] == "finish"


def test_mlflow_gets_the_name_the_settings_the_views_and_the_numbers(shards, tmp_path, fake_mlflow):
    run = trained(shards, tmp_path / "first", epochs=2, log=["mlflow"])
    assert fake_mlflow.named("start_run") == [((), {"run_name": "first", "nested": False})]
    (((params,), _),) = fake_mlflow.named("log_params")
    assert (params["epochs"], params["augmentation.flip"]) == ("2", "0.5")
    assert fake_mlflow.named("log_artifact") == [((str(run / "views.png"),), {})]
    logged = fake_mlflow.named("log_metrics")
    assert [(values[0]["loss"], named["step"]) for values, named in logged] == [
        (line["loss"], line["epoch"]) for line in lines(run)
    ]
    assert fake_mlflow.calls[-1][0] == "end_run"


def test_names_that_mlflow_refuses_are_changed(fake_mlflow, tmp_path):
    config = pretrain_config({"out": tmp_path, "log": ["mlflow"]}).resolved(32)
    logger = metrics.LibraryLogger("mlflow", config, 0)
    logger.log({"monitor/knn_côté(1)": 0.5}, 1)
    assert fake_mlflow.named("log_metrics") == [(({"monitor/knn_c_t__1_": 0.5},), {"step": 1})]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_server_that_does_not_answer_is_one_warning(shards, tmp_path, fake_wandb, caplog, fails):
    fake_wandb([fails])
    with caplog.at_level(logging.WARNING):
        run = trained(shards, tmp_path / "run", epochs=2, log=["wandb"])
    assert len(lines(run)) == 2
    assert [message for message in caplog.messages if "wandb" in message] == [
        "wandb cannot log (no route to the server): the training goes on, log.jsonl has all numbers"
    ]


def test_a_missing_library_is_refused_before_anything_is_written(shards, tmp_path, monkeypatch):
    find = metrics.importlib.util.find_spec
    monkeypatch.setattr(
        metrics.importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name)
    )
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    with pytest.raises(InputError, match=r"`log=mlflow` needs mlflow.*pip install 'modan-fast\[mlflow\]'"):
        trained(shards, tmp_path / "run", epochs=1, log=["mlflow"])
    assert not (tmp_path / "run").exists()


def test_without_tensorboard_a_run_has_no_events_and_no_warning(shards, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "_installed", lambda name: False)
    run = trained(shards, tmp_path / "run", epochs=1)
    assert not (run / "tensorboard").exists()
    assert not [each for each in caplog.records if each.levelname != "INFO"]
    with pytest.raises(InputError, match="`log=tensorboard`"):
        check_loggers(["tensorboard"])


def test_a_password_in_a_url_reaches_no_logger(tmp_path, fake_wandb):
    recorder = fake_wandb()
    config = pretrain_config(
        {"out": tmp_path, "log": ["wandb"], "shards": "https://me:secret@host/set?token=secret"}
    ).resolved(32)
    for logger in library_loggers(config, 0):
        logger.close()
    assert "secret" not in str(recorder.calls)
    assert not [path for path in (tmp_path / "tensorboard").iterdir() if b"secret" in path.read_bytes()]


def test_the_progress_line_shows_knn_once_it_is_known():
    running = {"loss": 1.5, "views_per_second": 100.0, "wait_share": 0.02}
    assert as_text(running) == "loss 1.500  100 views/s  waiting 2%"
    assert as_text({**running, "monitor/knn_class": 0.4321}) == "loss 1.500  100 views/s  waiting 2%  knn 43%"
