"""The loop: it learns, it resumes exactly, and its run folder is what other programs read."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import safetensors.torch
import torch
import torchvision
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from modan_fast import metrics, trainer
from modan_fast.config import PretrainConfig, to_json
from modan_fast.devices import wants_compile
from modan_fast.encoders import Architecture
from modan_fast.pretrained import imagenet_encoder, load_encoder
from modan_fast.recipes import PRETRAIN, pretrain_config
from modan_fast.run import finished_epochs, load_checkpoint, resumed_config
from modan_fast.step import TrainState, lr_at, rate_at
from modan_fast.trainer import pretrain
from shard_builder.build import build
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError


def settings(shards, out, **changes):
    """Two seconds' worth of training."""
    small = {"epochs": 3, "batch_size": 12, "image_size": 32, "stem": "7x7", "warmup_epochs": 0, "lr": 0.02}
    small["milestones"] = ()
    return PretrainConfig(shards=str(shards), out=out, device="cpu", threads=2, **{**small, **changes})


def logged(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run):
    return safetensors.torch.load_file(run / "encoder.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    return pretrain(settings(shards, tmp_path_factory.mktemp("runs") / "whole"))


def test_the_loss_falls(shards, tmp_path):
    # The whole set is one batch: the value of this loss depends on which labels meet in a batch.
    run = pretrain(settings(shards, tmp_path / "run", epochs=6, batch_size=48, lr=0.01))
    losses = [entry["loss"] for entry in logged(run)]
    assert losses[0] > losses[2] > losses[5]
    assert losses[5] < losses[0] - 0.2


def test_the_log_tells_the_wall_clock_the_speed_and_the_wait_of_each_epoch(finished):
    for number, entry in enumerate(logged(finished), start=1):
        assert entry["epoch"] == number
        assert entry["views_per_second"] == pytest.approx(2 * 48 / entry["seconds"], rel=0.05)
        # The process holds torch, and less than the machine has.
        assert 0.1 < entry["peak_host_gib"] < psutil.virtual_memory().total / 2**30
        assert 0 <= entry["wait_share"] <= 1


def test_plain_torchvision_loads_the_encoder_with_only_fc_missing(finished):
    plain = torchvision.models.resnet18()
    plain.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    missing, unexpected = plain.load_state_dict(weights(finished), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"}
    assert not unexpected
    plain.fc = torch.nn.Identity()
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(plain.eval()(images), load_encoder(finished).eval()(images))


def test_an_encoder_of_three_channels_fits_torchvisions_network_as_it_is(shards, tmp_path):
    run = pretrain(settings(shards, tmp_path / "run", channels=3, epochs=1))
    plain = torchvision.models.resnet18()
    missing, unexpected = plain.load_state_dict(weights(run), strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"}
    assert not unexpected
    assert json.loads((run / "config.json").read_text())["preprocessing"]["channels"] == 3
    plain.fc = torch.nn.Identity()
    images = torch.rand(2, 1, 32, 32)
    seen = plain.eval()(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(load_encoder(run).eval()(images), seen, rtol=1e-4, atol=1e-5)


def test_three_equal_channels_see_what_one_of_summed_filters_sees(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "imagenet.pth")
    grey, colour = (
        imagenet_encoder(
            tmp_path / "imagenet.pth", Architecture(stem="7x7", channels=channels), sum_filters=True
        ).eval()
        for channels in (1, 3)
    )
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_the_run_folder_tells_how_it_came_about(finished, shards):
    written = json.loads((finished / "config.json").read_text())
    assert pretrain_config(written["settings"]) == settings(shards, finished)
    assert written["preprocessing"] == {"image_size": 32, "channels": 1, "mean": 0.0, "std": 1.0}
    chosen = {"device": "CPU", "precision": "float32", "compile": False, "renderer": "torch", "store": "host"}
    assert written["chosen"] == {**chosen, "threads": 2}
    assert written["versions"]["torch"] == torch.__version__
    assert written["shards"]["samples"] == 48
    torch.load(finished / "checkpoint.pt", weights_only=True)
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        ["config.json", "log.jsonl", "checkpoint.pt", "encoder.safetensors", "tensorboard", "views.png"]
    )


@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_run_stopped_by_ctrl_c_and_resumed_equals_one_that_was_never_stopped(finished, shards, tmp_path, at):
    config = settings(shards, tmp_path / "run")

    def stop_at(stage, done, total, note=""):
        if stage == "pretraining" and done == at:
            os.kill(os.getpid(), signal.SIGINT)

    # With a look at every step, progress is shown at every step.
    looked, metrics.LOOK_EVERY = metrics.LOOK_EVERY, 0.0
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, progress=stop_at)
    finally:
        metrics.LOOK_EVERY = looked
    state = load_checkpoint(tmp_path / "run")
    assert state["epoch"] * 4 + state["step"] == at
    state["seconds"] += 1000
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    pretrain(config, resume=True)
    # The time before the stop counts.
    assert [entry["seconds"] > 999 for entry in logged(tmp_path / "run")] == [
        number == at // 4 for number in range(3)
    ]
    assert_same_weights(weights(tmp_path / "run"), weights(finished))
    assert [entry["loss"] for entry in logged(tmp_path / "run")] == pytest.approx(
        [entry["loss"] for entry in logged(finished)], rel=1e-6
    )


KILLED_AT_A_STEP = """
import json, os, signal, sys
from modan_fast import metrics, trainer
from modan_fast.recipes import pretrain_config

def kill_at(stage, done, total, note=""):
    if stage == "pretraining" and done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

metrics.LOOK_EVERY = 0.0
trainer.pretrain(pretrain_config(json.loads(sys.argv[1])), progress=kill_at)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no kill -9")
@pytest.mark.parametrize(("tier", "at", "threads"), [("host", 6, 1), ("stream", 7, 3)])
def test_a_killed_process_is_resumed_to_the_same_weights_whatever_the_threads(
    shards, tmp_path, tier, at, threads
):
    # A window smaller than the set, and a last batch that is not full.
    changes = {"shuffle_window": 25, "batch_size": 13, "drop_last": False, "checkpoint_every": 1}
    whole = pretrain(settings(shards, tmp_path / "whole", store="host", **changes))
    config = settings(shards, tmp_path / "run", store=tier, **changes)
    arguments = [json.dumps(to_json(replace(config, threads=threads))), str(at)]
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_A_STEP, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "run")["epoch"] == (at - 1) // 4
    pretrain(config, resume=True)
    assert_same_weights(weights(tmp_path / "run"), weights(whole))


def test_an_encoder_that_a_kill_has_left_behind_its_checkpoint_is_made_up_for(finished, shards, tmp_path):
    config = settings(shards, tmp_path / "run", epochs=2)
    pretrain(config)
    (early,) = [(tmp_path / "run" / "encoder.safetensors").read_bytes()]
    pretrain(replace(config, epochs=3), resume=True)
    (tmp_path / "run" / "encoder.safetensors").write_bytes(early)
    pretrain(replace(config, epochs=3), resume=True)
    assert_same_weights(weights(tmp_path / "run"), weights(finished))


def test_a_state_can_be_continued_on_a_machine_that_scales_losses_or_fuses_steps(shards, tmp_path):
    config = settings(shards, tmp_path)
    step = TrainState(config, classes=4, steps=4, device=torch.device("cpu"))
    state = step.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = True
    step._scaler = torch.amp.GradScaler("cpu", enabled=True)
    step.load_state_dict(state)
    assert not any(group["fused"] for group in step.optimizer.param_groups)


def test_a_resumed_run_forgets_log_lines_that_no_checkpoint_holds(finished, shards, tmp_path):
    config = settings(shards, tmp_path / "run", epochs=2)
    pretrain(config)
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"epoch": 3, "loss": 99}\n{"epo')
    pretrain(replace(config, epochs=3), resume=True)
    assert [entry["epoch"] for entry in logged(tmp_path / "run")] == [1, 2, 3]
    assert_same_weights(weights(tmp_path / "run"), weights(finished))


def test_a_finished_run_is_left_alone_and_another_is_refused(finished, shards):
    before = (finished / "encoder.safetensors").stat().st_mtime_ns
    assert pretrain(settings(shards, finished)) == finished
    assert pretrain(settings(shards, finished), resume=True) == finished
    assert (finished / "encoder.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="`resume=True` continues it, `overwrite=True` replaces it"):
        pretrain(settings(shards, finished, temperature=0.2))


def test_overwrite_replaces_a_run(shards, tmp_path):
    pretrain(settings(shards, tmp_path / "run", epochs=1))
    pretrain(settings(shards, tmp_path / "run", epochs=1, seed=5), overwrite=True)
    assert len(logged(tmp_path / "run")) == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["seed"] == 5


def test_the_same_run_gives_the_same_bytes_and_a_file_that_others_may_read(finished, shards, tmp_path):
    run = pretrain(settings(shards, tmp_path / "run"))
    file, other = run / "encoder.safetensors", finished / "encoder.safetensors"
    assert file.read_bytes() == other.read_bytes()
    assert file.stat().st_mode == (run / "config.json").stat().st_mode
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata.pop("architecture")) == to_json(Architecture(stem="7x7"))
    assert metadata == {"epoch": "3", "method": "mulsupcon", "recipe": "paper"}


def test_a_second_training_in_a_folder_is_refused_while_the_first_is_at_work(shards, tmp_path):
    config = settings(shards, tmp_path / "run", checkpoint_every=1)

    def meanwhile(stage, done, total, note):
        if stage == "pretraining" and done > 8:
            with pytest.raises(InputError, match="another training is writing to .*: wait for it"):
                pretrain(config, resume=True)

    pretrain(config, progress=meanwhile)
    assert [entry["epoch"] for entry in logged(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_that_is_no_run_is_never_written_to(shards, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="is no run folder"):
        pretrain(settings(shards, tmp_path), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_another_programs_config_is_never_replaced(shards, tmp_path, overwrite):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="its config.json was written by another program"):
        pretrain(settings(shards, tmp_path), overwrite=overwrite)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "vit"}'


def test_resuming_keeps_the_runs_settings_but_for_those_of_the_machine(finished):
    assert resumed_config(finished, {"epochs": 9, "threads": 1}).epochs == 9
    with pytest.raises(InputError, match=r"`temperature=0\.07`, not 0\.5"):
        resumed_config(finished, {"temperature": 0.5})
    with pytest.raises(InputError, match="no run to resume"):
        resumed_config(finished / "elsewhere", {})


def test_a_batch_larger_than_the_set_is_refused_before_anything_is_written(shards, tmp_path):
    with pytest.raises(InputError, match="`batch_size=64` is more than the 48 images"):
        pretrain(settings(shards, tmp_path / "run", batch_size=64))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_longer_finite_ends_the_run_and_keeps_the_last_checkpoint(shards, tmp_path):
    config = settings(shards, tmp_path / "run", epochs=1)
    pretrain(config)
    with pytest.raises(FloatingPointError, match="try a smaller `lr`; nothing was saved yet"):
        pretrain(replace(config, epochs=4, lr=1e30), overwrite=True)
    with pytest.raises(InputError, match=r"\(0 of 4 epochs saved\): `overwrite=True` replaces it"):
        pretrain(config)


def test_a_stop_never_saves_weights_whose_loss_is_not_finite(shards, tmp_path, monkeypatch):
    class Diverging(TrainState):
        def forward(self, batch):
            os.kill(os.getpid(), signal.SIGINT)
            return super().forward(batch) * torch.nan

    monkeypatch.setattr(trainer, "TrainState", Diverging)
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1, step 1"):
        pretrain(settings(shards, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_the_schedule_equals_torchs_linear_warm_up_and_multi_step_decay():
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.05)
    warm = LinearLR(optimizer, start_factor=0.01 / 0.05, total_iters=30)
    steps = MultiStepLR(optimizer, [70, 80, 90], 0.1)
    for step in range(100):
        ours = lr_at(step, peak=0.05, start=0.01, warmup=30, milestones=[70, 80, 90])
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), step
        optimizer.step()
        warm.step()
        steps.step()


def test_the_warm_up_of_a_small_learning_rate_never_exceeds_it():
    config = PretrainConfig(lr=1e-4).resolved(224)
    assert {rate_at(config, step, steps=5) for step in range(30)} == {1e-4}


def test_the_cosine_equals_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    cosine = CosineAnnealingLR(optimizer, 40)
    config = PretrainConfig(method="simclr", schedule="cosine", epochs=40)
    for epoch in range(40):
        for step in (0, 6):
            assert rate_at(config, epoch * 7 + step, 7) == pytest.approx(optimizer.param_groups[0]["lr"]), epoch
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize("recipe", ["paper", "released-code"])
@pytest.mark.parametrize("method", ["supcon", "simclr", "supervised"])
def test_every_method_trains_and_leaves_an_encoder_that_loads(shards, tmp_path, imagenet, method, recipe):
    given = {"method": method, "recipe": recipe, "shards": shards, "out": tmp_path / "run", "device": "cpu"}
    small = {"epochs": 1, "batch_size": 12, "image_size": 32, "stem": "7x7", "threads": 1}
    if (method, recipe) == ("supervised", "released-code"):
        small["imagenet_weights"] = imagenet
    pretrain(pretrain_config({**given, **small}))
    assert 0 < logged(tmp_path / "run")[0]["loss"] < 20
    assert load_encoder(tmp_path / "run").eval()(torch.rand(2, 1, 32, 32)).shape == (2, 512)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Random weights in the form of torchvision's for ImageNet: there is no downloading in tests."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def test_grey_images_look_to_summed_imagenet_filters_as_rgb_ones_do(imagenet):
    rgb = torchvision.models.resnet18()
    rgb.load_state_dict(torch.load(imagenet))
    rgb.fc = torch.nn.Identity()
    grey = imagenet_encoder(imagenet, Architecture(stem="7x7"), sum_filters=True)
    images = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(
        grey.eval()(images), rgb.eval()(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
    )
    for fresh in (
        imagenet_encoder(imagenet, Architecture(stem="7x7"), sum_filters=False),
        imagenet_encoder(imagenet, Architecture(stem="3x3"), sum_filters=True),
    ):
        assert torch.equal(fresh.network.layer4[1].conv2.weight, rgb.layer4[1].conv2.weight)
        assert fresh.network.conv1.weight.shape != rgb.conv1.weight.shape


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(InputError, match=r"resnet34\.pth holds no weights of torchvision's ResNet-18"):
        imagenet_encoder(tmp_path / "resnet34.pth", Architecture(stem="7x7"), sum_filters=True)


@pytest.mark.parametrize(
    ("epochs", "milestones"), [(10, (7, 8, 9)), (1000, (700, 800, 900)), (100, (70, 80, 90))]
)
def test_milestones_are_shares_of_the_epochs(epochs, milestones):
    config = PretrainConfig(epochs=epochs).resolved(224)
    assert config.milestones == milestones
    before = [rate_at(config, milestone * 63 - 1, 63) for milestone in milestones]
    after = [rate_at(config, milestone * 63, 63) for milestone in milestones]
    assert before == pytest.approx([0.05, 0.005, 0.0005])
    assert after == pytest.approx([0.005, 0.0005, 0.00005])


def test_a_resumed_run_keeps_its_milestones_when_it_gets_more_epochs(shards, tmp_path):
    run = pretrain(settings(shards, tmp_path / "run", epochs=2, milestones=(0.5,)))
    longer = resumed_config(run, {"epochs": 4})
    assert (longer.epochs, longer.milestones) == (4, (1,))
    pretrain(longer, resume=True)
    assert [entry["lr"] for entry in logged(run)] == pytest.approx([0.02, 0.002, 0.002, 0.002])


@pytest.mark.parametrize(
    ("method", "what"), [("mulsupcon", "labels modality=CT, anatomy=lung"), ("supervised", "class CT")]
)
def test_a_set_with_nothing_to_distinguish_is_refused_before_training(archive, tmp_path, method, what):
    shutil.copytree(archive / "CT" / "lung", tmp_path / "one" / "CT" / "lung")
    build(tmp_path / "one", tmp_path / "shards", BuildOptions(size=32, workers=1))
    with pytest.raises(
        InputError, match=f"all 12 images of .* have the {what}.*{method} has nothing to distinguish"
    ):
        pretrain(settings(tmp_path / "shards", tmp_path / "run", method=method))
    assert not (tmp_path / "run").exists()
    pretrain(settings(tmp_path / "shards", tmp_path / "run", method="simclr", epochs=1))


def test_a_logger_gets_the_numbers_of_every_epoch_that_the_log_file_gets(shards, tmp_path):
    class Recorder:
        def __init__(self):
            self.seen = []

        def log(self, metrics, step):
            self.seen.append({"epoch": step, **metrics})

    recorder = Recorder()
    run = pretrain(settings(shards, tmp_path / "run", epochs=2), loggers=[recorder])
    assert recorder.seen == logged(run)


def test_every_recipe_survives_its_way_through_json():
    for method, recipe in PRETRAIN:
        weights = {"imagenet_weights": "w.pth"} if (method, recipe) == ("supervised", "released-code") else {}
        config = pretrain_config({"method": method, "recipe": recipe, **weights})
        assert (config.method, config.recipe) == (method, recipe)
        assert pretrain_config(json.loads(json.dumps(to_json(config)))) == config


def test_without_a_compiler_nothing_is_compiled_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert not wants_compile(True, torch.device("cpu"))
    assert "no C++ compiler" in caplog.text
    assert not wants_compile(None, torch.device("cpu"))


def test_a_damaged_encoder_is_made_anew_from_the_checkpoint(finished, shards, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / ".checkpoint.pt.4711").write_bytes(b"left by a kill")
    (run / "encoder.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"0 of 3 epochs saved\): `resume=True` continues it"):
        pretrain(settings(shards, run))
    pretrain(settings(shards, run), resume=True)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in finished.iterdir())
    assert_same_weights(weights(run), weights(finished))


def test_a_state_and_settings_of_something_else_are_named(finished, shards, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    more = replace(settings(shards, run), epochs=9)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for foreign in ({"epoch": 1}, {**state, "model": {}}, [1]):
        torch.save(foreign, run / "checkpoint.pt")
        with pytest.raises(InputError, match="holds no state of this run"):
            pretrain(more, resume=True)
    config = json.loads((run / "config.json").read_text())
    for changed, message in [
        ({"epochs": "many"}, "holds no settings"),
        ({"method": "mocov2"}, "`method` must be one of mulsupcon, .*got 'mocov2'"),
        ({"beta": 1}, "unknown setting `beta`"),
    ]:
        (run / "config.json").write_text(json.dumps({**config, "settings": {**config["settings"], **changed}}))
        with pytest.raises(InputError, match=message):
            resumed_config(run, {})
    (run / "config.json").write_text('{"settings": 3, "shards": 4}')
    with pytest.raises(InputError, match="was written by another program"):
        resumed_config(run, {})


def test_a_run_below_a_file_is_refused_before_any_image_is_read(shards, tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(InputError, match="notes is no folder; choose another folder with `out`"):
        pretrain(settings(shards, tmp_path / "notes" / "run"), progress=pytest.fail)


def test_a_whole_network_of_torchvision_is_an_encoder_without_its_classifier(tmp_path):
    network = torchvision.models.resnet18()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "whole.safetensors")
    encoder = load_encoder(tmp_path / "whole.safetensors")
    assert torch.equal(encoder.network.conv1.weight, network.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(encoder.network.layer4[1].conv2.weight, network.layer4[1].conv2.weight)


def test_a_damaged_checkpoint_and_foreign_weights_are_named(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "encoder.safetensors"):
        (run / name).write_bytes((finished / name).read_bytes())
    (run / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="is no readable checkpoint"):
        load_checkpoint(run)
    assert finished_epochs(run) == 3
    safetensors.torch.save_file({"conv1.weight": torch.zeros(64, 1, 5, 5)}, run / "encoder.safetensors")
    with pytest.raises(InputError, match="holds no ResNet-18 with a 3x3 or 7x7 stem"):
        load_encoder(run)
    other = {key: value for key, value in weights(finished).items() if key != "layer4.1.conv2.weight"}
    safetensors.torch.save_file(other, run / "encoder.safetensors")
    with pytest.raises(InputError, match=r"it lacks layer4\.1\.conv2\.weight"):
        load_encoder(run)
