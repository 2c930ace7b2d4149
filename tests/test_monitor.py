"""What the monitor measures, that it disturbs nothing, and that it calls a collapsed run by its name."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from modan_fast.api import pretrain
from modan_fast.augment import sample_order
from modan_fast.demo import some_classes
from modan_fast.loader import loader_of
from modan_fast.monitor import Monitor, alignment, collapsed_share, held_out, knn_accuracy, rankme, uniformity
from modan_fast.phantom import phantom_archive
from modan_fast.recipes import pretrain_config
from modan_fast.shards import open_shards
from modan_fast.step import TrainState
from modan_fast.store import read_all
from shard_builder.build import build
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError

CPU = torch.device("cpu")
SMALL = {"image_size": 32, "stem": "7x7", "device": "cpu", "threads": 1, "batch_size": 16}
TINY = "timm/test_resnet"


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Some hundred synthetic images of 32 px: CT, MR and ultrasound of nine anatomies."""
    root = tmp_path_factory.mktemp("phantom")
    phantom_archive(root / "archive", per_class=8, size=32, classes=some_classes(), workers=1)
    build(root / "archive", root / "shards", BuildOptions(size=32, workers=1))
    return root / "shards"


def monitor_and_state(folder, **settings):
    shards = open_shards(folder)
    config = pretrain_config({**SMALL, "shards": str(folder), **settings}).resolved(shards.manifest.size)
    state = TrainState(config, classes=len(shards.manifest.classes), steps=3, device=CPU)
    return Monitor(shards, config, CPU), state


def trained(folder, out, **settings):
    """The run folder and the lines of its log."""
    run = pretrain(**{**SMALL, "shards": str(folder), "out": out, **settings})
    return run, [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_knn_is_that_of_scikit_learn_leaving_one_out():
    torch.manual_seed(0)
    targets = torch.randint(0, 4, (90,))
    features = torch.randn(90, 8) + 1.5 * F.one_hot(targets, 8)
    unit = F.normalize(features, dim=1).double().numpy()
    hits = 0
    for left_out in range(90):
        others = np.delete(np.arange(90), left_out)
        voters = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        voters.fit(unit[others], targets[others])
        hits += voters.predict(unit[left_out : left_out + 1])[0] == targets[left_out]
    assert 0.4 < hits / 90 < 1
    assert knn_accuracy(features, targets) == pytest.approx(hits / 90)


def test_equal_features_know_the_most_frequent_label_only():
    targets = torch.tensor([0] * 6 + [1] * 3 + [2] * 2)
    assert knn_accuracy(torch.ones(11, 5), targets) == pytest.approx(6 / 11)
    assert knn_accuracy(torch.zeros(11, 5), targets) == pytest.approx(6 / 11)


@pytest.mark.parametrize("shape", [(50, 12), (12, 50)])
def test_rankme_is_the_entropy_of_the_singular_values(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    singular = np.linalg.svd(features.double().numpy(), compute_uv=False)
    share = singular / singular.sum()
    assert rankme(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)), rel=1e-6)


def test_rankme_of_r_equal_orthogonal_directions_is_r():
    assert rankme(F.one_hot(torch.arange(40) % 5, 16).float()) == pytest.approx(5, rel=1e-4)
    assert rankme(torch.ones(40, 16)) == pytest.approx(1, abs=1e-3)
    assert math.isfinite(rankme(torch.zeros(40, 16)))


def test_alignment_and_uniformity_are_loops_of_the_paper():
    first, second = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(2)).double()
    one, other = (each / each.norm(dim=1, keepdim=True) for each in (first, second))
    assert alignment(first, second) == pytest.approx(
        sum(float((one[i] - other[i]) @ (one[i] - other[i])) for i in range(7)) / 7
    )
    pairs = [math.exp(-2 * float((one[i] - one[j]).norm()) ** 2) for i in range(7) for j in range(i)]
    assert uniformity(first) == pytest.approx(math.log(sum(pairs) / len(pairs)))


def test_constant_dimensions_are_collapsed_ones():
    features = torch.randn(100, 10, generator=torch.Generator().manual_seed(3))
    assert collapsed_share(features) == 0
    features[:, :3] = torch.tensor([0.0, 5.0, -1.0])
    assert collapsed_share(features) == pytest.approx(0.3)
    assert collapsed_share(torch.zeros(10, 4)) == 1


def test_one_image_in_fifty_is_held_out_at_most_2000_and_more_of_small_sets():
    assert [held_out(n) for n in (2, 12, 48, 256, 1000, 3200, 10_000, 10**5, 10**8)] == [
        *(2, 3, 12, 64, 64, 64),
        *(200, 2000, 2000),
    ]


def test_the_images_are_the_first_ones_of_the_set_with_their_labels(shards):
    monitor, state = monitor_and_state(shards, image_size=48)
    stored = read_all(open_shards(shards), renderer="torch", device=CPU, threads=1)
    assert torch.equal(monitor._images[:, 0], stored.pixels[:12])
    found = monitor.look(state.encoder, state.model.head)
    counts = stored.targets[:12].bincount()
    assert found["monitor/chance_class"] == pytest.approx(int(counts.max()) / 12, abs=1e-4)
    assert {"monitor/knn_modality", "monitor/knn_anatomy", "monitor/rankme", "monitor/seconds"} <= set(found)


def test_images_without_a_value_of_a_field_are_left_out_of_its_knn(shards):
    monitor, state = monitor_and_state(shards)
    known = monitor._labels["modality"] == monitor._labels["modality"].mode().values
    monitor._labels["modality"] = torch.where(known, monitor._labels["modality"], -1)
    found = monitor.look(state.encoder, state.model.head)
    assert "monitor/knn_modality" not in found  # one value is left: there is nothing to know
    monitor._labels["modality"][:2] = torch.tensor([0, 1])
    monitor._labels["modality"][2:] = -1
    assert monitor.look(state.encoder, state.model.head)["monitor/chance_modality"] == 0.5


@pytest.mark.parametrize("encoder", ["resnet18", "timm/efficientnet_b0"])
def test_a_look_changes_no_weight_no_statistic_no_mode_and_no_random_number(shards, encoder):
    monitor, state = monitor_and_state(shards, encoder=encoder)
    state.model.encoder.network.eval()  # parts that do not train stay as they are
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    modes, random = [each.training for each in state.model.modules()], torch.get_rng_state()
    first = monitor.look(state.encoder, state.model.head)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    assert modes == [each.training for each in state.model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in state.model.parameters())
    second = monitor.look(state.encoder, state.model.head)
    assert {**first, "monitor/seconds": 0} == {**second, "monitor/seconds": 0}


def test_features_that_are_not_finite_count_as_collapsed(shards):
    monitor, state = monitor_and_state(shards)
    with torch.no_grad():
        state.encoder.network.layer4[1].bn2.weight.fill_(torch.nan)
    found = monitor.look(state.encoder, state.model.head)
    assert found["monitor/collapsed"] == 1
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("method", ["mulsupcon", "simclr", "supcon", "supervised"])
def test_a_healthy_run_is_not_called_collapsed(phantom, tmp_path, caplog, method):
    _, log = trained(phantom, tmp_path / "run", method=method, epochs=2, batch_size=64)
    assert len(log) == 2
    assert all(line["monitor/rankme"] > 2 for line in log)
    assert "collapsed" not in caplog.text


@pytest.mark.parametrize(
    ("encoder", "method"), [("resnet18", "mulsupcon"), (TINY, "simclr"), (TINY, "supervised")]
)
def test_a_monitored_run_gives_the_same_encoder(shards, tmp_path, encoder, method):
    settings = {
        "method": method,
        "encoder": encoder,
        "drop_path": None if encoder == "resnet18" else 0.2,
        "epochs": 2,
    }
    watched, log = trained(shards, tmp_path / "watched", **settings)
    alone, bare = trained(shards, tmp_path / "alone", monitor_every=0, **settings)
    assert (watched / "encoder.safetensors").read_bytes() == (alone / "encoder.safetensors").read_bytes()
    assert [line["loss"] for line in log] == [line["loss"] for line in bare]
    assert not [name for line in bare for name in line if name.startswith("monitor/")]


def test_a_learning_rate_far_too_high_is_called_a_collapse_within_three_epochs_once(phantom, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, log = trained(phantom, tmp_path / "run", batch_size=64, epochs=4, lr=5.0)
    warnings = [message for message in caplog.messages if "collapsed" in message]
    assert len(warnings) == 1
    assert warnings[0].endswith("try a smaller `lr`")
    assert max(line["monitor/rankme"] for line in log[1:3]) < 1.3
    assert all(math.isfinite(line["loss"]) for line in log), "the loss alone would not tell"


def test_a_single_low_rank_is_no_collapse(shards, caplog):
    monitor, _ = monitor_and_state(shards)
    monitor._images = monitor._images.repeat(2, 1, 1, 1)
    for rank in (1.0, 8.0, 1.0, 9.0):
        monitor._judge(rank)
    assert not caplog.records
    for rank in (1.0, 1.0, 1.0, 4.0, 1.0, 1.0):
        monitor._judge(rank)
    assert len(caplog.records) == 1


def test_the_monitor_looks_every_n_epochs_and_at_the_last(shards, tmp_path):
    _, log = trained(shards, tmp_path / "run", epochs=5, monitor_every=2, encoder=TINY)
    assert [line["epoch"] for line in log if "monitor/rankme" in line] == [2, 4, 5]


def test_the_views_are_a_picture_of_images_beside_their_two_views(shards, tmp_path):
    run, _ = trained(shards, tmp_path / "run", epochs=1, encoder=TINY)
    with Image.open(run / "views.png") as picture:
        assert picture.size == (3 * 32, 3 * 32)  # a quarter of twelve images
        pixels = np.asarray(picture)
    monitor, _ = monitor_and_state(shards)
    assert np.array_equal(pixels[:32, :32], monitor._images[0, 0].numpy())
    assert np.array_equal(pixels[32:64, 64:], monitor._second[1, 0].numpy())


@pytest.mark.parametrize("window", [8, 2**14])
def test_held_out_images_are_left_out_of_training_and_the_others_keep_their_order(shards, window):
    settings = {**SMALL, "shards": str(shards), "drop_last": False, "shuffle_window": window}
    opened = open_shards(shards)

    def loader(**more):
        return loader_of(pretrain_config({**settings, **more}).resolved(48), opened, device=CPU)

    without, everything = loader(monitor_held_out=True), loader()
    for epoch in range(2):
        full = sample_order(0, epoch, opened.counts, window)
        assert np.array_equal(np.concatenate(everything.id_batches(epoch)), full)
        assert np.array_equal(np.concatenate(without.id_batches(epoch)), full[full >= 12])
    assert (len(without), len(everything)) == (3, 3)
    assert without.samples == 36
    assert sorted(np.concatenate([batch.ids for batch in without.epoch(0)])) == list(range(12, 48))


def test_a_batch_larger_than_what_is_not_held_out_is_refused(shards, tmp_path):
    with pytest.raises(InputError, match="36 images in .* that are not held out"):
        trained(shards, tmp_path / "run", batch_size=40, monitor_held_out=True)
