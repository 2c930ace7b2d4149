"""What only a GPU shows: its renderers, its arithmetic beside the CPU's, states that move between the two, and NCCL."""

import math
import os
import socket
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch

from modan_fast import trainer
from modan_fast.augment import ViewParameters, view_parameters
from modan_fast.config import Augmentation
from modan_fast.decode import dali_installed
from modan_fast.loader import Batch, loader_of
from modan_fast.losses import MulSupConLoss, NTXentLoss, SupConLoss
from modan_fast.recipes import pretrain_config
from modan_fast.render import Rendering, open_renderer, render_view
from modan_fast.shards import open_shards
from modan_fast.step import TrainState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RENDERERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI here"))]


def images(count, canvas, seed=0):
    """Smooth structure with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 7, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (canvas, canvas), mode="bicubic")[:, 0]
    noise = 0.05 * torch.randn(count, canvas, canvas, generator=generator)
    return ((smooth + noise) * 255).clamp(0, 255).to(torch.uint8)


def two_views(ids, canvas, epoch=0, **augmentation):
    count = len(ids)
    return view_parameters(
        Augmentation(**augmentation), 3, epoch, np.tile(ids, 2), np.repeat([0, 1], count), canvas
    )


def rendering(canvas, size, images, **changes):
    given = {"device": GPU, "dtype": torch.float32, "threads": 2}
    return Rendering(canvas, size, 2 * images, **(given | changes))


def levels(views, pixels, view, size):
    """The differences from the reference in grey levels."""
    return 255 * (views.float().cpu() - render_view(pixels, view, size)).abs()


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize(("canvas", "size"), [(96, 96), (224, 64), (64, 96)])
def test_blurred_views_equal_the_reference(renderer, canvas, size):
    pixels, view = images(24, canvas), two_views(np.arange(24), canvas, jitter=0.0, blur=0.5)
    made = open_renderer(renderer, rendering(canvas, size, 24, blur=True))
    made.submit(pixels.to(GPU), view)
    difference = levels(made.collect(), pixels, view, size)
    if renderer == "torch":
        assert difference.max() < 0.01  # nothing is rounded to 8 bits
    assert difference.mean() < 0.5
    assert difference[:, :, 1:-1, 1:-1].max() < 3


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_batches_of_every_size_equal_the_reference(renderer, on_gpu):
    """A last batch is smaller, and a full one follows it; with one view an image, as the supervised method has it."""
    pixels = images(40, 96)
    made = open_renderer(renderer, rendering(96, 64, 16))
    for epoch in range(3):
        for ids in np.split(np.arange(40), [16, 32, 39]):  # 16, 16, 7 and 1 images
            chosen, view = pixels[ids], two_views(ids, 96, epoch)
            if epoch == 2:
                view = ViewParameters(**{name: values[: len(ids)] for name, values in vars(view).items()})
            given = chosen.to(GPU) if on_gpu else chosen.pin_memory()
            made.submit(given, view)
            views = made.collect()
            assert views.shape == (len(view.flip), 1, 64, 64)
            difference = levels(views, chosen, view, 64)
            assert difference.mean() < 0.5
            assert difference[:, :, 1:-1, 1:-1].max() < 6


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_views_that_are_kept_stay_as_they_were_rendered(renderer, dtype):
    """One batch ahead, as the loader works, with other work on the GPU, whose memory must not be that of a view."""
    made = open_renderer(renderer, rendering(96, 64, 16, dtype=dtype))
    pixels, kept, given = images(160, 96), [], []
    busy = torch.randn(2048, 2048, device=GPU)
    for turn in range(20):
        ids = np.arange(16) + 16 * (turn % 10)
        given.append((pixels[ids], two_views(ids, 96, epoch=turn)))
        collected = [made.collect()] if turn else []
        made.submit(given[-1][0].to(GPU, non_blocking=True), given[-1][1])
        kept += collected
        for _ in range(10):
            busy = (busy @ busy).clamp_(-1, 1)
        torch.empty(2**24, device=GPU).fill_(7)  # takes memory that was freed
    kept.append(made.collect())
    torch.cuda.synchronize(GPU)
    assert len({each.data_ptr() for each in kept}) == 20
    rounding = 255 * {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 0.0}[dtype]
    for views, (chosen, view) in zip(kept, given, strict=True):
        assert views.dtype == dtype
        assert views.is_contiguous(memory_format=torch.channels_last)
        difference = levels(views, chosen, view, 64)
        assert difference.mean() < 0.5 + rounding
        assert difference[:, :, 1:-1, 1:-1].max() < 6 + rounding


def config_of(shards, out, **changes):
    given = {"shards": str(shards), "out": str(out), "image_size": 32, "batch_size": 24, "stem": "7x7"}
    given |= {"epochs": 2, "warmup_epochs": 0, "device": GPU.type, "compile": False, "threads": 2}
    return pretrain_config({**given, **changes})


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_all_tiers_give_equal_views_while_the_gpu_trains(shards, tmp_path, renderer, blur):
    made = {}
    for tier in ("gpu", "host", "stream"):
        config = config_of(
            shards, tmp_path, store=tier, renderer=renderer, drop_last=False, augmentation={"blur": blur}
        )
        loading = loader_of(config, open_shards(shards), device=GPU)
        busy, made[tier] = torch.randn(1024, 1024, device=GPU), []
        for epoch in range(3):
            for batch in loading.epoch(epoch):
                busy = (busy @ busy).clamp_(-1, 1)
                made[tier].append(batch)
        assert loading.store.tier == tier
    for batches in zip(*made.values(), strict=True):
        for name in ("ids", "labels", "targets", "views"):
            values = [getattr(batch, name) for batch in batches]
            assert torch.equal(values[0], values[1]), name
            assert torch.equal(values[0], values[2]), name


def a_batch(device, images=12, size=32):
    generator = torch.Generator().manual_seed(1)
    views = torch.rand(2 * images, 1, size, size, generator=generator)
    labels = (torch.rand(images, 5, generator=generator) < 0.4).to(torch.uint8)
    views = views.to(device, memory_format=torch.channels_last)
    return Batch(views, labels.to(device), (torch.arange(images) % 3).to(device), torch.arange(images))


def new_state(device, **changes):
    given = {"image_size": 32, "stem": "7x7", "batch_size": 12, "warmup_epochs": 0, "precision": "float32"}
    config = pretrain_config({**given, "compile": False, **changes}).resolved(32)
    return TrainState(config, classes=3, steps=10, device=device)


@pytest.mark.parametrize("method", ["mulsupcon", "supcon", "simclr", "supervised"])
def test_a_step_in_float32_is_that_of_the_cpu(monkeypatch, method):
    # TF32, which convolutions use by default, keeps 11 of 24 bits.
    flags = torch.backends.cudnn.flags
    monkeypatch.setattr(torch.backends.cudnn, "flags", lambda **given: flags(**{**given, "allow_tf32": False}))
    losses, gradients = [], []
    for device in (CPU, GPU):
        state, batch = new_state(device, method=method), a_batch(device)
        if method == "supervised":
            batch = Batch(batch.views[:12], batch.labels, batch.targets, batch.ids)
        losses.append(state.forward_backward(batch).cpu())
        gradients.append(torch.cat([each.grad.flatten().cpu() for each in state.model.parameters()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    apart = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert apart < 1e-2


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "float32"])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_compute_type_trains_also_compiled(precision, compiled):
    state, batch = new_state(GPU, precision=precision, compile=compiled, optimizer="adam", lr=1e-3), a_batch(GPU)
    assert state.compiled == compiled
    views = batch.views.to(state.dtype)
    losses = []
    for _ in range(8):
        state.update(Batch(views, batch.labels, batch.targets, batch.ids))
        losses.append(state.loss)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(("begun", "resumed"), [(CPU, GPU), (GPU, CPU), (GPU, GPU)])
def test_a_state_begun_on_one_device_is_continued_on_another(optimizer, begun, resumed):
    saved = new_state(begun, optimizer=optimizer, lr=1e-3)
    saved.update(a_batch(begun))
    continued = new_state(resumed, optimizer=optimizer, lr=1e-3)
    on_disk = torch.utils._pytree.tree_map(
        lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, deepcopy(saved.state_dict())
    )
    continued.load_state_dict(on_disk)
    assert continued.optimizer.param_groups[0]["fused"] == (resumed.type == "cuda")
    for state in (saved, continued):
        state.update(a_batch(state.device))
    assert continued.loss == pytest.approx(saved.loss, rel=0.02)
    for ours, theirs in zip(continued.model.parameters(), saved.model.parameters(), strict=True):
        # Adam moves each weight by about the learning rate, whatever the size of its gradient.
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach().cpu(), rtol=0.02, atol=2.5e-3)


def weights_of(run):
    return torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["model"]


def test_a_run_moves_from_the_gpu_to_the_cpu_and_back(shards, tmp_path):
    run = tmp_path / "run"
    changes = {"precision": "float32", "optimizer": "adam", "lr": 1e-3, "milestones": (10.0,)}
    for epochs, device in ((1, GPU), (2, CPU), (3, GPU)):
        config = config_of(shards, run, epochs=epochs, device=device.type, **changes)
        trainer.pretrain(config, resume=epochs > 1)
    assert all(torch.isfinite(each).all() for each in weights_of(run).values())


@pytest.mark.parametrize("stem", ["7x7", "3x3"])
@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_deterministic_run_gives_the_same_bits_twice_also_resumed(shards, tmp_path, stem, renderer):
    changes = {"deterministic": True, "stem": stem, "renderer": renderer, "milestones": (10.0,)}
    for name in ("one", "other"):
        trainer.pretrain(config_of(shards, tmp_path / name, **changes))
    for epochs in (1, 2):
        trainer.pretrain(config_of(shards, tmp_path / "in two", epochs=epochs, **changes), resume=epochs == 2)
    assert not torch.are_deterministic_algorithms_enabled()
    expected = weights_of(tmp_path / "one")
    for name in ("other", "in two"):
        found = weights_of(tmp_path / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("loss", [MulSupConLoss, SupConLoss, NTXentLoss])
@pytest.mark.parametrize("tile", [1, 5, 16])
def test_a_tiled_loss_equals_the_whole_one(loss, tile):
    generator = torch.Generator().manual_seed(2)
    labels = (torch.rand(16, 6, generator=generator) < 0.4).to(torch.uint8).to(GPU)
    start = torch.randn(32, 24, generator=generator).to(GPU)
    found = []
    for made in (loss(), loss(tile=tile)):
        embeddings = start.clone().requires_grad_()
        value = made(embeddings, labels)
        value.backward()
        found.append((value.detach(), embeddings.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


NCCL = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from modan_fast.batch_norm import synchronised
from modan_fast.ranks import summed
from modan_fast.recipes import pretrain_config
from modan_fast.step import TrainState

device = torch.device("cuda", 0)
torch.cuda.set_device(device)
dist.init_process_group("nccl", device_id=device)
control = dist.new_group(backend="gloo")
told = [None]
dist.all_gather_object(told, "here", group=control)
assert told == ["here"]
own = torch.arange(6.0, device=device)
assert torch.equal(summed(own), own)
found = torch.empty_like(own)
dist.all_gather_into_tensor(found, own)
assert torch.equal(found, own)

config = pretrain_config({"image_size": 32, "stem": "7x7", "precision": "float32", "compile": False}).resolved(32)
views = torch.rand(16, 1, 32, 32, device=device)
gradients = []
for wrapped in (False, True):
    model = TrainState(config, classes=3, steps=1, device=device).model
    if wrapped:
        model = synchronised(model, device) or model
        model = DistributedDataParallel(model.to(device), broadcast_buffers=False, gradient_as_bucket_view=True)
    model(views).square().mean().backward()
    gradients.append(torch.cat([each.grad.flatten() for each in model.parameters()]))
apart = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
assert apart < 1e-2, apart
dist.destroy_process_group()
"""


def test_one_rank_over_nccl_has_the_gradients_of_no_rank():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    given = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    subprocess.run([sys.executable, "-c", NCCL], env=given, check=True, timeout=300)


def test_torchrun_with_one_rank_trains_on_the_gpu(shards, tmp_path):
    given = ["--shards", shards, "--out", tmp_path / "run", "--image-size", "32", "--stem", "7x7"]
    given += ["--epochs", "1", "--batch-size", "24", "--device", GPU.type, "--no-compile"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    subprocess.run([*command, "-m", "modan_fast", "pretrain", *map(str, given)], check=True, timeout=600)
    assert (tmp_path / "run" / "encoder.safetensors").exists()
