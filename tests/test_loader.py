"""Batches: every sample once an epoch, the same views whatever makes them."""

import numpy as np
import pytest
import torch

from modan_fast.augment import view_parameters
from modan_fast.config import Augmentation
from modan_fast.decode import dali_installed
from modan_fast.loader import Loader, open_loader
from modan_fast.render import Rendering, open_renderer, render_view
from modan_fast.shards import open_shards
from modan_fast.store import open_store

RENDERERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI here"))]
CPU = torch.device("cpu")


def loader(shards, renderer="torch", batch_size=10, tier="host", threads=2, **settings):
    opened = open_shards(shards)
    store = open_store(opened, tier=tier, renderer=renderer, device=CPU, batch_size=batch_size, threads=threads)
    made = open_renderer(
        renderer,
        Rendering(
            canvas=store.canvas,
            size=32,
            batch_size=2 * batch_size,
            device=CPU,
            dtype=torch.float32,
            threads=threads,
        ),
    )
    return Loader(store, made, Augmentation(), batch_size=batch_size, seed=4, **settings)


@pytest.mark.parametrize("window", [1000, 25, 7])
@pytest.mark.parametrize("renderer", RENDERERS)
def test_every_sample_comes_once_in_three_epochs_of_each_tier_with_equal_views(shards, renderer, window):
    tiers = [loader(shards, renderer, tier=tier, window=window) for tier in ("host", "stream")]
    orders = []
    for epoch in range(3):
        for ours, theirs in zip(*(each.epoch(epoch) for each in tiers), strict=True):
            for name in ("ids", "labels", "targets", "views"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        batches = list(tiers[1].epoch(epoch))
        assert len(batches) == len(tiers[1]) == 5
        orders.append(torch.cat([batch.ids for batch in batches]).tolist())
        assert sorted(orders[-1]) == list(range(48))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("renderer", RENDERERS)
def test_on_a_gpu_every_tier_gives_equal_views(shards, renderer):
    gpu, opened, made = torch.device("cuda", 0), open_shards(shards), {}
    for tier in ("gpu", "host", "stream"):
        store = open_store(opened, tier=tier, renderer=renderer, device=gpu, batch_size=10, threads=2)
        views = open_renderer(
            renderer,
            Rendering(canvas=store.canvas, size=32, batch_size=20, device=gpu, dtype=torch.float32, threads=2),
        )
        loading = Loader(store, views, Augmentation(), batch_size=10, seed=4)
        made[tier] = [batch for epoch in range(3) for batch in loading.epoch(epoch)]
    for batches in zip(*made.values(), strict=True):
        for name in ("ids", "labels", "targets", "views"):
            assert torch.equal(getattr(batches[0], name), getattr(batches[1], name)), name
            assert torch.equal(getattr(batches[0], name), getattr(batches[2], name)), name


def test_labels_targets_and_views_belong_to_the_ids(shards):
    loading = loader(shards)
    for batch in loading.epoch(2):
        ids = batch.ids
        assert torch.equal(batch.labels, loading.store.labels[ids])
        assert torch.equal(batch.targets, loading.store.targets[ids])
        assert batch.views.shape == (2 * len(ids), 1, 32, 32)
        for view, rows in enumerate(batch.views.split(len(ids))):
            parameters = view_parameters(Augmentation(), 4, 2, ids.numpy(), view, 48)
            # Two of 255 levels, because the renderer rounds.
            torch.testing.assert_close(
                rows, render_view(loading.store.pixels[ids], parameters, 32), rtol=0, atol=2 / 255
            )


@pytest.mark.parametrize("tier", ["host", "stream"])
@pytest.mark.parametrize("renderer", RENDERERS)
def test_an_epoch_entered_in_its_middle_gives_the_batches_that_are_left(shards, renderer, tier):
    loading = loader(shards, renderer, tier=tier, window=25)
    whole = list(loading.epoch(1))
    rest = list(loading.epoch(1, start=3))
    assert len(rest) == 2
    for ours, theirs in zip(rest, whole[3:], strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.views, theirs.views)
    assert not list(loading.epoch(1, start=5))


@pytest.mark.parametrize("tier", ["host", "stream"])
@pytest.mark.parametrize("renderer", RENDERERS)
def test_an_epoch_left_early_does_not_reach_into_the_next(shards, renderer, tier):
    loading = loader(shards, renderer, tier=tier)
    expected = next(iter(loading.epoch(7))).views.clone()
    leaving = loading.epoch(0)
    next(leaving)
    leaving.close()
    assert torch.equal(next(iter(loading.epoch(7))).views, expected)


@pytest.mark.parametrize("tier", ["host", "stream"])
def test_ranks_share_a_batch_and_leave_nothing_out(shards, tier):
    alone = [batch.ids.tolist() for batch in loader(shards).epoch(0)]
    ranks = [loader(shards, tier=tier, rank=rank, world_size=3).epoch(0) for rank in range(3)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        together = [part.ids.tolist() for part in parts]
        assert sorted(sum(together, [])) == sorted(whole)
        assert max(map(len, together)) - min(map(len, together)) <= 1


@pytest.mark.parametrize("tier", ["host", "stream"])
def test_a_rest_with_fewer_images_than_ranks_leaves_some_with_an_empty_batch(shards, tier):
    # 48 images in batches of 46.
    seen = []
    for rank in range(3):
        batches = list(
            open_loader(
                shards,
                batch_size=46,
                image_size=32,
                drop_last=False,
                device="cpu",
                store=tier,
                threads=1,
                rank=rank,
                world_size=3,
            )
        )
        assert [batch.counts for batch in batches] == [(16, 15, 15), (1, 1, 0)]
        assert [len(batch.ids) for batch in batches] == [batch.counts[rank] for batch in batches]
        for batch in batches:
            count = len(batch.ids)
            assert batch.views.shape == (2 * count, 1, 32, 32)
            assert batch.views.dtype == torch.float32
            assert batch.labels.shape == (count, batches[0].labels.shape[1])
            assert batch.targets.shape == (count,)
            assert (batch.labels.dtype, batch.targets.dtype, batch.ids.dtype) == (
                torch.uint8,
                torch.int64,
                torch.int64,
            )
        seen += [sample for batch in batches for sample in batch.ids.tolist()]
    assert sorted(seen) == list(range(48)), "each sample once"


def test_a_batch_says_how_many_images_each_rank_has(shards):
    whole = open_loader(shards, batch_size=20, drop_last=False, device="cpu", threads=1)
    assert [batch.counts for batch in whole.epoch(0)] == [(20,), (20,), (8,)]
    assert [batch.counts for batch in whole.epoch(0, start=2)] == [(8,)]


def test_the_last_partial_batch_is_the_recipes_choice(shards):
    assert [len(batch.ids) for batch in loader(shards).epoch(0)] == [10, 10, 10, 10, 8]
    assert [len(batch.ids) for batch in loader(shards, drop_last=True).epoch(0)] == [10, 10, 10, 10]
    assert np.unique([batch.views.shape[0] for batch in loader(shards, drop_last=True).epoch(0)]).tolist() == [20]


def test_views_of_a_stream_do_not_depend_on_the_number_of_threads(shards):
    for one, many in zip(
        *(loader(shards, "auto", tier="stream", threads=threads).epoch(0) for threads in (1, 3)), strict=True
    ):
        assert torch.equal(one.views, many.views)
