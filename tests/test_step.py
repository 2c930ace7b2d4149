"""A training step: micro-batches, stochastic depth, weight decay, clipping and schedules."""

import math
from dataclasses import replace

import numpy as np
import pytest
import timm.optim
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from modan_fast import trainer
from modan_fast.config import PretrainConfig
from modan_fast.loader import Batch
from modan_fast.recipes import pretrain_config
from modan_fast.step import TrainState, micro_batches, rate_at
from shard_builder.settings import InputError

CPU = torch.device("cpu")


def new_state(**changes):
    """A state in float64, so that equal sums are equal to many digits."""
    given = {"encoder": "timm/convnext_atto", "image_size": 32, "lr": 1e-3, "momentum": 0.9, **changes}
    config = pretrain_config(given).resolved(32)
    state = TrainState(config, classes=3, steps=10, device=CPU)
    state.model.double()
    state.embed = state.model  # without the float32 of training
    return state


def batch_of(images, views=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(views * images, 1, 32, 32, generator=generator, dtype=torch.float64)
    labels = (torch.rand(images, 4, generator=generator) < 0.5).to(torch.uint8)
    return Batch(pixels, labels, torch.arange(images) % 3, torch.arange(images))


def gradients(state, batch, micro_batch=None):
    state.optimizer.zero_grad()
    loss = state.forward_backward(batch, micro_batch)
    return loss, {name: each.grad.clone() for name, each in state.model.named_parameters()}


@pytest.mark.parametrize("method", ["mulsupcon", "supcon", "simclr", "supervised"])
@pytest.mark.parametrize("micro_batch", [8, 5, 31])
def test_micro_batches_give_the_loss_and_the_gradients_of_the_whole_batch(method, micro_batch):
    state, batch = new_state(method=method), batch_of(32, views=1 if method == "supervised" else 2)
    loss, whole = gradients(state, batch)
    in_parts, parts = gradients(state, batch, micro_batch)
    torch.testing.assert_close(in_parts, loss, rtol=1e-12, atol=1e-12)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-12)


def test_micro_batches_hold_both_views_of_their_images_and_leave_no_image_alone():
    assert [each.tolist() for each in micro_batches(5, 2, 2)] == [[0, 1, 5, 6], [2, 3, 4, 7, 8, 9]]
    assert [each.tolist() for each in micro_batches(4, 2, 1)] == [[0, 1], [2, 3]]


def test_batch_norm_counts_each_micro_batch_once():
    state = new_state(encoder="resnet18", stem="7x7")
    gradients(state, batch_of(8), 2)
    norm = state.encoder.network.bn1
    assert norm.num_batches_tracked == 4
    assert norm.track_running_stats
    expected = torch.zeros(64, dtype=torch.float64)
    for rows in micro_batches(8, 2, 2):
        with torch.no_grad():
            outputs = state.encoder.network.conv1(batch_of(8).views[rows])
        expected = 0.9 * expected + 0.1 * outputs.mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, expected)


def test_stochastic_depth_samples_the_same_in_both_passes_and_anew_in_each_step():
    state, batch = new_state(drop_path=0.5), batch_of(8)
    loss, ours = gradients(state, batch, 4)
    state.optimizer.zero_grad()
    embedded = []
    for number, rows in enumerate(micro_batches(8, 4, 2)):
        entropy = (state.config.seed, 0, 0, number)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
        embedded.append((rows, state.model(batch.views[rows])))
    embeddings = torch.zeros(16, 1000, dtype=torch.float64)
    for rows, each in embedded:
        embeddings = embeddings.index_put((rows,), each)
    expected = state.loss_of(embeddings, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-12)
    state.step = 1
    assert gradients(state, batch, 4)[0] != loss


def test_weight_decay_leaves_alone_what_timm_leaves_alone():
    state = new_state(recipe="vit", encoder="timm/vit_tiny_patch16_224")
    decayed, kept = state.optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    network = state.encoder.network
    theirs = timm.optim.param_groups_weight_decay(network, 0.05, no_weight_decay_list=network.no_weight_decay())
    expected = {id(each) for group in theirs if group["weight_decay"] == 0 for each in group["params"]}
    assert {id(each) for each in kept["params"]} - {id(state.model.head.bias)} == expected
    assert id(state.model.head.weight) in {id(each) for each in decayed["params"]}


def test_the_gradient_is_clipped_to_the_norm(monkeypatch):
    state, batch = (
        new_state(optimizer="sgd", momentum=0.0, weight_decay=0.0, clip_norm=0.01, warmup_epochs=0),
        batch_of(8),
    )
    _, whole = gradients(state, batch)
    norm = math.sqrt(sum(float(each.square().sum()) for each in whole.values()))
    assert norm > 0.01
    before = {name: each.detach().clone() for name, each in state.model.named_parameters()}
    state.optimise()
    for name, parameter in state.model.named_parameters():
        step = state.config.lr * whole[name] * 0.01 / norm
        torch.testing.assert_close(before[name] - parameter.detach(), step, rtol=1e-4, atol=1e-12)


def test_a_cosine_after_a_warm_up_equals_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    warm = LinearLR(optimizer, start_factor=0.01 / 0.05, total_iters=5)
    cosine = SequentialLR(optimizer, [warm, CosineAnnealingLR(optimizer, 35)], [5])
    config = PretrainConfig(schedule="warmup-cosine", warmup_epochs=5, epochs=40)
    for epoch in range(40):
        assert rate_at(config, epoch * 7, 7) == pytest.approx(optimizer.param_groups[0]["lr"]), epoch
        optimizer.step()
        cosine.step()


def test_a_step_that_does_not_fit_names_the_largest_micro_batch_that_does(shards, tmp_path, monkeypatch):
    given = {
        "shards": str(shards),
        "out": str(tmp_path / "run"),
        "image_size": 32,
        "stem": "7x7",
        "batch_size": 24,
    }
    config = pretrain_config({**given, "epochs": 1, "warmup_epochs": 0})
    step = TrainState.forward_backward

    def small(state, batch, micro_batch=None):
        if (micro_batch or state.config.micro_batch or len(batch.ids)) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.14 GiB")
        return step(state, batch, micro_batch)

    monkeypatch.setattr(TrainState, "forward_backward", small)
    with pytest.raises(
        InputError, match=r"a step of 24 images of 32 px does not fit into .*: pass `micro_batch=6`, which"
    ):
        trainer.pretrain(config)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    trainer.pretrain(replace(config, micro_batch=6), overwrite=True)

    def never(state, batch, micro_batch=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainState, "forward_backward", never)
    with pytest.raises(InputError, match="pass a `batch_size` below 24, or a smaller `image_size`"):
        trainer.pretrain(config, overwrite=True)
