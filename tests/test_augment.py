"""Views and orders as pure functions, against numpy's and torchvision's own generators."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ks_2samp, kstest
from torchvision.transforms import ColorJitter, RandomResizedCrop

from modan_fast.augment import philox, sample_order, view_parameters
from modan_fast.config import Augmentation

DRAWS = 20_000


def parameters(augmentation=None, *, canvas=224, draws=DRAWS, **where):
    coordinates = {"seed": 0, "epoch": 0, "view": 0} | where
    augmentation = augmentation or Augmentation()
    return view_parameters(augmentation, ids=np.arange(draws), canvas=canvas, **coordinates)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # The known answers that Random123 is published with.
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_generator_gives_the_published_answers(counter, key, expected):
    words = philox(tuple(np.array([word], np.uint32) for word in counter), key)
    assert " ".join(f"{word:08x}" for word in words[0]) == expected


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize("canvas", [64, 224])
def test_crop_boxes_are_distributed_as_torchvisions(scale, canvas):
    torch.manual_seed(1)
    image = torch.empty(1, canvas, canvas)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(DRAWS)])
    ours = parameters(Augmentation(scale=scale), canvas=canvas).box
    for number, side in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(ours[:, number], theirs[:, number]).pvalue > 1e-3, side
    area_of, ratio_of = (lambda box: box[:, 2] * box[:, 3]), (lambda box: box[:, 3] / box[:, 2])
    for shape_of in (area_of, ratio_of):
        assert ks_2samp(shape_of(ours), shape_of(theirs)).pvalue > 1e-3


def test_jitter_factors_are_distributed_as_torchvisions():
    torch.manual_seed(1)
    drawn = [ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), None, None)[1:3] for _ in range(DRAWS)]
    ours = parameters(Augmentation(jitter=1.0))
    assert ks_2samp(ours.brightness, [brightness for brightness, _ in drawn]).pvalue > 1e-3
    assert ks_2samp(ours.contrast, [contrast for _, contrast in drawn]).pvalue > 1e-3
    assert abs(np.corrcoef(ours.brightness, ours.contrast)[0, 1]) < 0.03


def test_blur_comes_with_its_probability_and_a_uniform_sigma():
    sigma = parameters(Augmentation(blur=0.5)).sigma
    blurred = sigma[sigma > 0]
    assert binomtest(len(blurred), DRAWS, 0.5).pvalue > 1e-3
    assert kstest((blurred - 0.1) / 1.9, "uniform").pvalue > 1e-3
    assert not parameters().sigma.any()


def test_flip_and_jitter_come_with_their_probability():
    ours = parameters(Augmentation(flip=0.5, jitter=0.8))
    changed = ours.brightness != 1
    assert binomtest(int(ours.flip.sum()), DRAWS, 0.5).pvalue > 1e-3
    assert binomtest(int(changed.sum()), DRAWS, 0.8).pvalue > 1e-3
    assert (changed == (ours.contrast != 1)).all()
    assert not parameters(Augmentation(flip=0.0)).flip.any()


@given(
    canvas=st.integers(8, 600),
    seed=st.integers(0, 2**63),
    low=st.floats(0.01, 1.0),
    epoch=st.integers(0, 10_000),
)
def test_every_box_lies_on_the_canvas(canvas, seed, low, epoch):
    box = parameters(Augmentation(scale=(low, 1.0)), canvas=canvas, seed=seed, epoch=epoch, draws=50).box
    assert (box[:, :2] >= 0).all()
    assert (box[:, 2:] >= 1).all()
    assert (box[:, :2] + box[:, 2:] <= canvas).all()


@given(ids=st.lists(st.integers(0, 2**31), min_size=1, max_size=20, unique=True))
def test_a_view_does_not_depend_on_the_batch_it_falls_in(ids):
    together = view_parameters(Augmentation(), 3, 5, np.array(ids), 1, 64)
    for row, sample in enumerate(ids):
        alone = view_parameters(Augmentation(), 3, 5, np.array([sample]), 1, 64)
        assert (together.box[row] == alone.box[0]).all()
        assert together.brightness[row] == alone.brightness[0]
        assert together.flip[row] == alone.flip[0]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"seed": 2**32}, {"epoch": 1}, {"view": 1}])
def test_seed_epoch_and_view_each_change_the_view(changed):
    base, other = parameters(), parameters(**changed)
    assert (base.box == other.box).all(1).mean() < 0.01
    assert abs(np.corrcoef(base.brightness, other.brightness)[0, 1]) < 0.03


counts = st.lists(st.integers(1, 40), max_size=12)


@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 10_000), counts=counts, window=st.integers(1, 200))
def test_an_order_holds_every_sample_once(seed, epoch, counts, window):
    assert sorted(sample_order(seed, epoch, counts, window)) == list(range(sum(counts)))


@given(seed=st.integers(0, 2**63), counts=counts, window=st.integers(1, 100))
def test_whoever_reads_the_shards_as_they_are_due_holds_no_more_than_a_window(seed, counts, window):
    order = sample_order(seed, 3, counts, window).tolist()
    shard_of = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum([0, *counts])
    # Read sample by sample, the shards in the order in which their first sample is due.
    shards = list(dict.fromkeys(shard_of[order].tolist()))
    reading = iter([sample for shard in shards for sample in range(starts[shard], starts[shard + 1])])
    held = set()
    for sample in order:
        while sample not in held:
            held.add(next(reading))
        # One more shard, because two may be due in another order than that in which they were shuffled.
        assert len(held) <= max(window, 1) + max(counts)
        held.remove(sample)


def test_a_set_no_larger_than_the_window_is_shuffled_as_a_whole():
    assert (sample_order(0, 0, [500, 500], 1000) == sample_order(0, 0, [10] * 100, 2000)).all()


def test_a_larger_set_is_mixed_within_the_window_and_its_shards_change_places():
    counts, window = [100] * 200, 2000
    first, second = (sample_order(0, epoch, counts, window) for epoch in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
    # A batch draws on many shards, as a window of twenty suggests.
    shards = [len(set(batch // 100)) for batch in first.reshape(-1, 100)]
    assert np.median(shards) > 15


def test_orders_of_two_epochs_are_unrelated_and_without_drift():
    first, second = (sample_order(0, epoch, [DRAWS], DRAWS) for epoch in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first, np.arange(DRAWS))[0, 1]) < 0.03
    # The place of one sample over many epochs is uniform.
    places = [int(np.argmax(sample_order(0, epoch, [100], 100) == 7)) for epoch in range(1000)]
    assert kstest(np.array(places) / 100 + 0.005, "uniform").pvalue > 1e-3
