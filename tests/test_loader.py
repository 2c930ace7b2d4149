"""Batches: every sample once an epoch, the same views whatever makes them."""

import numpy as np
import pytest
import torch

from modan_fast.augment import view_parameters
from modan_fast.config import Augmentation
from modan_fast.loader import Loader
from modan_fast.render import open_renderer, render_view
from modan_fast.shards import open_shards
from modan_fast.store import dali_installed, open_store

RENDERERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI here"))]
CPU = torch.device("cpu")


def loader(shards, renderer="torch", batch_size=10, **settings):
    store = open_store(open_shards(shards), device=CPU, threads=2)
    made = open_renderer(renderer, size=32, batch_size=batch_size, device=CPU, dtype=torch.float32, threads=2)
    return Loader(store, made, Augmentation(), batch_size=batch_size, seed=4, **settings)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_every_sample_comes_once_in_each_of_three_epochs(shards, renderer):
    loading = loader(shards, renderer)
    orders = []
    for epoch in range(3):
        batches = list(loading.epoch(epoch))
        assert len(batches) == loading.steps == 5
        ids = torch.cat([batch.ids for batch in batches])
        assert sorted(ids.tolist()) == list(range(48))
        orders.append(ids.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_labels_targets_and_views_belong_to_the_ids(shards):
    loading = loader(shards)
    for batch in loading.epoch(2):
        ids = batch.ids
        assert torch.equal(batch.labels, loading.store.labels[ids])
        assert torch.equal(batch.targets, loading.store.targets[ids])
        assert batch.views.shape == (2 * len(ids), 1, 32, 32)
        for view, rows in enumerate(batch.views.split(len(ids))):
            parameters = view_parameters(Augmentation(), 4, 2, ids.numpy(), view, 48)
            assert torch.equal(rows, render_view(loading.store.pixels[ids], parameters, 32))


@pytest.mark.parametrize("renderer", RENDERERS)
def test_an_epoch_entered_in_its_middle_gives_the_batches_that_are_left(shards, renderer):
    loading = loader(shards, renderer)
    whole = list(loading.epoch(1))
    rest = list(loading.epoch(1, start=3))
    assert len(rest) == 2
    for ours, theirs in zip(rest, whole[3:], strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.views, theirs.views)
    assert not list(loading.epoch(1, start=5))


@pytest.mark.parametrize("renderer", RENDERERS)
def test_an_epoch_left_early_does_not_reach_into_the_next(shards, renderer):
    loading = loader(shards, renderer)
    expected = next(iter(loading.epoch(7))).views.clone()
    leaving = loading.epoch(0)
    next(leaving)
    leaving.close()
    assert torch.equal(next(iter(loading.epoch(7))).views, expected)


def test_ranks_share_a_batch_and_leave_nothing_out(shards):
    alone = [batch.ids.tolist() for batch in loader(shards).epoch(0)]
    ranks = [loader(shards, rank=rank, world_size=3).epoch(0) for rank in range(3)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        together = [part.ids.tolist() for part in parts]
        assert sorted(sum(together, [])) == sorted(whole)
        assert max(map(len, together)) - min(map(len, together)) <= 1


def test_the_last_partial_batch_is_the_recipes_choice(shards):
    assert [len(batch.ids) for batch in loader(shards).epoch(0)] == [10, 10, 10, 10, 8]
    assert [len(batch.ids) for batch in loader(shards, drop_last=True).epoch(0)] == [10, 10, 10, 10]
    assert np.unique([batch.views.shape[0] for batch in loader(shards, drop_last=True).epoch(0)]).tolist() == [20]
