"""Any encoder: it trains, resumes exactly, is judged, and starts another run; and what is refused."""

import json
import os
import signal

import pytest
import safetensors.torch
import timm
import torch
import torchvision

from modan_fast import trainer
from modan_fast.downstream.evaluate import evaluate
from modan_fast.downstream.statistics import auc_table
from modan_fast.encoders import IMAGENET_MEAN, IMAGENET_STD, Architecture, Encoder
from modan_fast.pretrained import load_encoder
from modan_fast.recipes import evaluate_config, pretrain_config
from modan_fast.trainer import pretrain
from shard_builder.settings import InputError

ENCODERS = {
    "resnet18": {"stem": "3x3"},
    "timm/resnet50": {},
    "timm/vit_tiny_patch16_224": {"recipe": "vit"},
    "timm/convnext_atto": {"recipe": "vit"},
    "timm/densenet121": {},
}
SIZES = {"resnet18": 512, "timm/resnet50": 2048, "timm/vit_tiny_patch16_224": 192, "timm/convnext_atto": 320}


def settings(shards, out, **changes):
    given = {"shards": str(shards), "out": str(out), "image_size": 32, "batch_size": 24, "epochs": 2, "lr": 1e-3}
    return pretrain_config({**given, "warmup_epochs": 1, **changes})


def stopped_after(step, monkeypatch, config):
    """Train until the step of that number is done, then stop as SIGTERM would."""
    update, done = trainer.TrainState.update, []

    def updating(state, batch):
        update(state, batch)
        done.append(batch)
        if len(done) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainState, "update", updating)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_trains_resumes_exactly_and_is_judged(shards, make_task_folder, tmp_path, monkeypatch, name):
    changes = {"encoder": name, **ENCODERS[name]}
    whole = pretrain(settings(shards, tmp_path / "whole", **changes))
    config = settings(shards, tmp_path / "run", **changes)
    stopped_after(3, monkeypatch, config)
    pretrain(config, resume=True)
    assert (whole / "encoder.safetensors").read_bytes() == (tmp_path / "run" / "encoder.safetensors").read_bytes()
    encoder = load_encoder(whole)
    assert encoder(torch.rand(2, 1, 32, 32)).shape == (2, encoder.num_features)
    assert encoder.num_features == SIZES.get(name, 1024)
    protocols = ["probe"] if encoder.num_features == 2048 else ["finetune", "probe"]  # fine-tuning it takes long
    evaluate(
        evaluate_config(
            {"task": str(make_task_folder), "init": [str(whole)], "out": str(tmp_path / "results"), "repeats": 1}
            | {"epochs": 1, "image_size": 48, "batch_size": 8, "protocol": protocols}
        )
    )
    rows = {row.protocol: row.mean for row in auc_table(tmp_path / "results")}
    assert set(rows) == set(protocols)
    assert all(0 <= mean <= 1 for mean in rows.values())


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/vit_tiny_patch16_224"])
def test_an_encoder_of_timm_is_timms_network(name):
    torch.manual_seed(0)
    ours = Encoder(Architecture.of(name, image_size=64)).eval()
    size = {"img_size": 64} if "vit" in name else {}
    theirs = timm.create_model(name.removeprefix("timm/"), in_chans=1, num_classes=0, **size).eval()
    theirs.load_state_dict(ours.weights)
    images = torch.rand(2, 1, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_an_encoder_normalises_its_input_as_torchvision_does():
    architecture = Architecture(stem="7x7", channels=3, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    encoder = Encoder(architecture).eval()
    images = torch.rand(2, 1, 64, 64)
    normalised = torchvision.transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(encoder(images), encoder.network(normalised))


def test_a_vit_is_judged_at_another_size_than_it_was_trained_at():
    encoder = Encoder(Architecture.of("timm/vit_tiny_patch16_224", image_size=32)).eval()
    larger = encoder.resized(64)
    assert larger.architecture.image_size == 64
    assert larger.weights["pos_embed"].shape == (1, 1 + 16, 192)
    assert larger(torch.rand(1, 1, 64, 64)).shape == (1, 192)
    assert encoder.resized(32) is encoder
    assert torch.equal(larger.weights["blocks.0.attn.qkv.weight"], encoder.weights["blocks.0.attn.qkv.weight"])


def test_a_run_starts_from_the_weights_of_another(shards, tmp_path):
    first = pretrain(settings(shards, tmp_path / "first", epochs=1, stem="7x7"))
    config = settings(
        shards, tmp_path / "second", epochs=1, stem="7x7", init_from=str(first), lr=1e-12, momentum=0
    )
    before, after = load_encoder(first).weights, load_encoder(pretrain(config)).weights
    for name, value in before.items():
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(after[name], value)


def test_a_run_starts_from_another_programs_weights_with_their_input(shards, tmp_path):
    torch.save({"state_dict": torchvision.models.resnet18().state_dict()}, tmp_path / "theirs.pth")
    changes = {"stem": "7x7", "init_from": f"resnet18={tmp_path / 'theirs.pth'}", "epochs": 1}
    run = pretrain(settings(shards, tmp_path / "run", normalize=True, **changes))
    written = json.loads((run / "config.json").read_text())["preprocessing"]
    assert (written["channels"], written["mean"]) == (3, list(IMAGENET_MEAN))
    assert load_encoder(run).architecture.std == IMAGENET_STD
    grey = load_encoder(pretrain(settings(shards, tmp_path / "grey", **changes))).architecture
    assert (grey.channels, grey.normalises) == (1, False)
    with pytest.raises(
        InputError, match=r"is a resnet18 with a 7x7 stem .*, and the run's encoder a resnet18 with a 3x3"
    ):
        pretrain(settings(shards, tmp_path / "other", **{**changes, "stem": "3x3"}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet50",
            r"must be resnet18 or timm/NAME, NAME as timm.list_models\(\) has it; similar: .*timm/resnet50",
        ),
        ("timm/restnet50", "similar: timm/resnet50"),
        ("timm/hf-hub:someone/model", "must be resnet18 or timm/NAME"),
        ("timm/local-dir:/tmp", "must be resnet18 or timm/NAME"),
        ("timm/resnet50.<img>", "must be resnet18 or timm/NAME"),
    ],
)
def test_an_unknown_encoder_is_refused_with_similar_names(shards, tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        pretrain(settings(shards, tmp_path / "run", encoder=name))
    assert not (tmp_path / "run").exists()


def test_what_a_network_cannot_do_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match="timm builds no timm/densenet121 with .*drop_path_rate"):
        pretrain(settings(shards, tmp_path / "run", encoder="timm/densenet121", drop_path=0.1))
    with pytest.raises(InputError, match="resnet18 cannot checkpoint activations"):
        pretrain(settings(shards, tmp_path / "run", checkpoint_activations=True))


def test_checkpointed_activations_change_nothing_but_memory(shards, tmp_path):
    changes = {"encoder": "timm/vit_tiny_patch16_224", "epochs": 1}
    plain, checkpointed = (
        pretrain(settings(shards, tmp_path / str(each), checkpoint_activations=each, **changes))
        for each in (False, True)
    )
    one, other = (safetensors.torch.load_file(run / "encoder.safetensors") for run in (plain, checkpointed))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def weights_of(network):
    return network.state_dict()


def without(weights, *names):
    return {name: value for name, value in weights.items() if name not in names}


WRONG = {
    "an empty file": (None, "holds no weights that can be read"),
    "another network": (
        lambda: torchvision.models.resnet34().state_dict(),
        "it lacks|it has an extra|left out|is no",
    ),
    "a layer missing": (
        lambda: without(torchvision.models.resnet50().state_dict(), "layer3.2.conv2.weight"),
        r"is no timm/resnet50: it lacks layer3\.2\.conv2\.weight; name its encoder",
    ),
    "another width": (
        lambda: torchvision.models.wide_resnet50_2().state_dict(),
        r"it has \(128, 64, 1, 1\) for layer1\.0\.conv1\.weight, not \(64, 64, 1, 1\)",
    ),
    "no tensors": (lambda: {"epoch": 3}, "it holds no named tensors"),
    "a list": (lambda: [torch.zeros(1)], "it holds no named tensors"),
    "weights that are not finite": (
        lambda: torchvision.models.resnet50().state_dict() | {"bn1.weight": torch.full((64,), torch.nan)},
        r"holds weights that are not finite \(bn1\.weight\)",
    ),
    "integers": (
        lambda: torchvision.models.resnet50().state_dict() | {"bn1.weight": torch.ones(64, dtype=torch.int64)},
        r"bn1\.weight is torch\.int64",
    ),
    "four input channels": (
        lambda: torchvision.models.resnet50().state_dict() | {"conv1.weight": torch.zeros(64, 4, 7, 7)},
        r"conv1\.weight has 4 input channels, not 3",
    ),
    "another program's names": (
        lambda: {f"features.{number}.w": torch.zeros(3) for number in range(9)},
        "is no timm/resnet50: it lacks conv1.weight",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_in_a_line_that_says_what_is_wrong(tmp_path, case):
    make, message = WRONG[case]
    path = tmp_path / "theirs.pth"
    if make is None:
        path.touch()
    else:
        torch.save(make(), path)
    with pytest.raises(InputError, match=message) as refused:
        load_encoder(f"timm/resnet50={path}")
    assert str(path) in str(refused.value)
    print(f"{case}: {str(refused.value).replace(str(tmp_path), '')}")


def test_published_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(InputError, match=r"timm gives no weights for timm/resnet50 \(no network at all\): pass"):
        load_encoder("timm/resnet50")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("resnet18", torchvision.models.resnet34),
        ("timm/resnet50", torchvision.models.resnet101),
        ("timm/resnet18", lambda: timm.create_model("seresnet18")),
    ],
)
def test_a_deeper_network_is_not_taken_for_a_shallower_one(tmp_path, name, source):
    torch.save(source().state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(InputError, match=r"it has an extra layer"):
        load_encoder(f"{name}={tmp_path / 'deeper.pth'}")


def test_a_network_that_samples_by_itself_resumes_exactly_too(shards, tmp_path, monkeypatch):
    changes = {"encoder": "timm/ghostnet_100", "recipe": "paper", "epochs": 1, "batch_size": 12}  # it has dropout
    whole = pretrain(settings(shards, tmp_path / "whole", **changes))
    config = settings(shards, tmp_path / "run", **changes)
    stopped_after(2, monkeypatch, config)
    pretrain(config, resume=True)
    assert (whole / "encoder.safetensors").read_bytes() == (tmp_path / "run" / "encoder.safetensors").read_bytes()


def test_a_run_starts_from_three_channels_of_its_own_kind(shards, tmp_path):
    first = pretrain(settings(shards, tmp_path / "first", epochs=1, stem="7x7", channels=3))
    config = settings(
        shards, tmp_path / "second", epochs=1, stem="7x7", channels=3, init_from=str(first), lr=1e-12
    )
    pretrain(config)
    one, other = (
        safetensors.torch.load_file(tmp_path / name / "encoder.safetensors") for name in ("first", "second")
    )
    torch.testing.assert_close(other["conv1.weight"], one["conv1.weight"])


def test_numbers_in_metadata_are_integers(tmp_path):
    weights = Encoder("7x7").weights
    for channels in (1.0, True, 3.0, "1", None, 2):
        metadata = {"architecture": json.dumps({**json.loads(RECORDED), "channels": channels})}
        safetensors.torch.save_file(weights, tmp_path / "encoder.safetensors", metadata)
        with pytest.raises(InputError, match="records an architecture that is none of ours"):
            load_encoder(tmp_path)


RECORDED = '{"name": "resnet18", "stem": "7x7", "channels": 1, "image_size": null, "mean": [0.0], "std": [1.0]}'
