"""The losses against loops written from their formulas."""

import copy
import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from modan_fast import losses, tiles
from modan_fast.losses import ClassificationLoss, MulSupConLoss, NTXentLoss, SupConLoss


def similarity(a: list[int], b: list[int]) -> float:
    either = sum(x or y for x, y in zip(a, b, strict=True))
    return sum(x and y for x, y in zip(a, b, strict=True)) / either if either else 0.0


def formula(embeddings, labels, temperature, weight_of):
    """-1/|P(a)| sum_p w_ap log(exp(z_a.z_p/T) / sum_k exp(z_a.z_k/T)), averaged over anchors, as loops.

    `weight_of` gives the weight of a pair of label rows, None for a negative pair.
    """
    images, views = len(labels), len(embeddings)
    z = embeddings / embeddings.norm(dim=1, keepdim=True)
    rows = labels.tolist()
    total = 0.0
    for a in range(views):
        others = [k for k in range(views) if k != a]
        denominator = sum(torch.exp(z[a] @ z[k] / temperature) for k in others)
        weights = {
            p: 1.0 if p % images == a % images else weight_of(rows[a % images], rows[p % images]) for p in others
        }
        positives = [p for p in others if p % images == a % images or weights[p] is not None]
        weights = {p: weight or 0.0 for p, weight in weights.items()}
        terms = [weights[p] * torch.log(torch.exp(z[a] @ z[p] / temperature) / denominator) for p in positives]
        total = total - sum(terms) / len(positives)
    return total / views


def above(threshold):
    return lambda a, b: similarity(a, b) if similarity(a, b) >= threshold else None


LOSSES = {
    "mulsupcon": (MulSupConLoss(0.07, 0.3), 0.07, above(0.3)),
    "mulsupcon with another threshold": (MulSupConLoss(0.2, 0.5), 0.2, above(0.5)),
    "mulsupcon with all pairs positive": (MulSupConLoss(0.07, 0), 0.07, above(0)),
    "mulsupcon with equal labels positive": (MulSupConLoss(0.07, 1), 0.07, above(1)),
    "supcon": (SupConLoss(0.07), 0.07, lambda a, b: 1.0 if a == b else None),
    "ntxent": (NTXentLoss(0.1), 0.1, lambda a, b: None),
}


def batch(images=9, bits=5, dimensions=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(images, bits, generator=generator) < 0.4).to(torch.uint8)
    labels[1] = 0
    labels[2] = labels[0]
    embeddings = 3 * torch.randn(2 * images, dimensions, dtype=torch.float64, generator=generator)
    return embeddings, labels


def in_tiles(loss, tile):
    """The same loss in tiles of so many images; None: the loss as it is."""
    changed = copy.copy(loss)
    changed.tile = tile
    return changed


def value_and_gradient(loss, embeddings, labels):
    embeddings = embeddings.clone().requires_grad_()
    value = loss(embeddings, labels)
    value.backward()
    return value.detach(), embeddings.grad


@pytest.mark.parametrize("tile", [None, 1, 4, 9, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_formula_written_as_loops(name, tile):
    loss, temperature, weight_of = LOSSES[name]
    loss = in_tiles(loss, tile)
    embeddings, labels = batch()
    ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    value, expected = loss(ours, labels), formula(theirs, labels, temperature, weight_of)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize(
    ("loss", "weight_of"), [(MulSupConLoss, above(0.3)), (SupConLoss, lambda a, b: a == b or None)]
)
def test_the_instance_weight_adds_the_loops_of_ntxent(loss, weight_of, tile):
    embeddings, labels = batch()
    ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    value = loss(0.1, instance_weight=0.7, tile=tile)(ours, labels)
    expected = formula(theirs, labels, 0.1, weight_of) + 0.7 * formula(theirs, labels, 0.1, lambda a, b: None)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_an_instance_weight_below_zero_is_refused(weight):
    for loss in (MulSupConLoss, SupConLoss):
        with pytest.raises(ValueError, match="`instance_weight` must be at least 0"):
            loss(instance_weight=weight)


def test_two_images_that_share_one_of_three_labels_weigh_a_third():
    # By hand: all views orthogonal, so every softmax is uniform over the 3 other views and each log is -log 3.
    # An anchor has three positives: its other view (w = 1) and two views of the other image (w = 1/3 each).
    value = MulSupConLoss()(torch.eye(4), torch.tensor([[1, 1, 0], [1, 0, 1]]))
    assert value.item() == pytest.approx((1 + 2 / 3) / 3 * math.log(3))


def test_the_threshold_itself_is_a_positive():
    embeddings, labels = torch.eye(4), torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert MulSupConLoss(threshold=1 / 3)(embeddings, labels).item() == pytest.approx(5 / 9 * math.log(3))
    assert MulSupConLoss(threshold=0.34)(embeddings, labels).item() == pytest.approx(math.log(3))


def test_empty_label_sets_are_positives_for_supcon_and_never_for_mulsupcon():
    embeddings, labels = batch()[0][:6], torch.zeros(3, 4)
    torch.testing.assert_close(MulSupConLoss(0.1)(embeddings, labels), NTXentLoss(0.1)(embeddings, labels))
    assert SupConLoss(0.1)(embeddings, labels) != NTXentLoss(0.1)(embeddings, labels)


@given(seed=st.integers(0, 10_000), images=st.integers(2, 8), bits=st.integers(1, 6), scale=st.floats(0.01, 100))
def test_the_loss_depends_neither_on_the_scale_nor_on_the_order_of_images(seed, images, bits, scale):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(2 * images, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 2, (images, bits), generator=generator)
    order = torch.randperm(images, generator=generator)
    shuffled = embeddings[torch.cat([order, order + images])] * scale
    loss = MulSupConLoss()
    torch.testing.assert_close(loss(embeddings, labels), loss(shuffled, labels[order]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", [MulSupConLoss(), SupConLoss(), NTXentLoss(), MulSupConLoss(tile=4)])
def test_half_precision_input_is_computed_in_float32_inside_autocast(loss):
    embeddings, labels = batch()
    half = embeddings.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(half.float(), labels))


@pytest.mark.parametrize(("embeddings", "labels"), [((6, 4), (4, 2)), ((6, 4), (3,)), ((6,), (3, 2))])
def test_shapes_that_do_not_fit_are_refused(embeddings, labels):
    with pytest.raises(ValueError, match=r"must be \(2N, D\)"):
        MulSupConLoss()(torch.zeros(embeddings), torch.zeros(labels))


@pytest.mark.parametrize("tile", [None, 3])
def test_large_embeddings_of_equal_direction_stay_finite(tile):
    embeddings = torch.full((8, 4), 1e4, requires_grad=True)
    value = MulSupConLoss(temperature=0.01, tile=tile)(embeddings, torch.ones(4, 2))
    value.backward()
    assert value.isfinite()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("tile", [None, 3])
def test_a_view_opposite_to_all_others_keeps_its_loss_at_a_low_temperature(tile):
    embeddings = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) / 100 + 1
    embeddings[2] = -embeddings[2]  # its softmax has exp(-100) everywhere, which is 0 in float32
    loss, labels = MulSupConLoss(0.01, 0, tile=tile), torch.eye(4)[[0, 1, 2, 2]]
    value, gradient = value_and_gradient(loss, embeddings, labels)
    exact = embeddings.double().requires_grad_()
    expected = formula(exact, labels, 0.01, above(0))
    expected.backward()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-3, atol=1e-3)


def test_more_pairs_than_fit_are_computed_in_tiles_of_their_own_accord(monkeypatch):
    embeddings, labels = batch()
    expected, sizes = value_and_gradient(MulSupConLoss(), embeddings, labels), []
    monkeypatch.setattr(losses, "DENSE_PAIRS", 18**2 - 1)
    monkeypatch.setattr(tiles, "PAIRS_ON_CPU", 18 * 8)
    totals = tiles._totals
    monkeypatch.setattr(
        tiles, "_totals", lambda tile, every: sizes.append(len(tile.labels)) or totals(tile, every)
    )
    torch.testing.assert_close(
        value_and_gradient(MulSupConLoss(), embeddings, labels), expected, rtol=1e-12, atol=1e-12
    )
    assert sizes == [4, 4, 1]
    monkeypatch.setattr(losses, "DENSE_PAIRS", 18**2)
    MulSupConLoss()(embeddings, labels)
    assert len(sizes) == 3, "these are held at once"


@pytest.mark.parametrize("tile", [None, 2])
def test_a_compiled_loss_is_the_same_and_its_graphs_do_not_grow_with_the_tiles(tile):
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    embeddings, labels = batch()
    loss = MulSupConLoss(instance_weight=0.5, tile=tile)
    expected = value_and_gradient(loss, embeddings, labels)
    assert not counters["stats"]
    for _ in range(2):
        found = value_and_gradient(torch.compile(loss, dynamic=False), embeddings, labels)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # What is before and after the tiles, totals, gradient; the smaller last tile has two of its own.
    assert counters["stats"]["unique_graphs"] == (1 if tile is None else 6)


def test_tiles_without_gradient_give_the_value():
    embeddings, labels = batch()
    with torch.no_grad():
        value = MulSupConLoss(tile=4)(embeddings.requires_grad_(), labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, MulSupConLoss()(embeddings, labels).detach(), rtol=1e-12, atol=1e-12)


def test_what_comes_after_the_loss_scales_the_gradient_of_tiles():
    embeddings, labels = batch()
    _, expected = value_and_gradient(MulSupConLoss(), embeddings, labels)
    scaled = value_and_gradient(lambda *both: -3 * MulSupConLoss(tile=4)(*both), embeddings, labels)
    torch.testing.assert_close(scaled[1], -3 * expected, rtol=1e-10, atol=1e-12)


def test_without_other_ranks_there_is_nothing_to_gather():
    embeddings, labels = batch()
    for loss in (MulSupConLoss, SupConLoss, NTXentLoss):
        assert torch.equal(loss(gather_distributed=True)(embeddings, labels), loss()(embeddings, labels))
    logits, targets = embeddings[:9], torch.arange(9) % 6
    for gather in (False, True):
        value = ClassificationLoss(gather_distributed=gather)(logits, targets)
        assert torch.equal(value, functional.cross_entropy(logits, targets))


@pytest.mark.parametrize("loss", [MulSupConLoss, SupConLoss, NTXentLoss])
def test_a_tile_of_no_image_is_refused(loss):
    with pytest.raises(ValueError, match="`tile` must be at least 1 image, got 0"):
        loss(tile=0)


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_of_the_gradient_is_refused_rather_than_wrong(name, tile):
    embeddings, labels = batch()
    value = in_tiles(LOSSES[name][0], tile)(embeddings.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, embeddings, create_graph=True)


@pytest.mark.parametrize("temperature", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("loss", [MulSupConLoss, SupConLoss, NTXentLoss])
def test_a_temperature_that_is_not_above_zero_is_refused(loss, temperature):
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        loss(temperature)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_a_threshold_outside_zero_to_one_is_refused(threshold):
    with pytest.raises(ValueError, match=r"`threshold` must be in \[0, 1\]"):
        MulSupConLoss(threshold=threshold)


def test_the_examples_in_the_docstrings_run():
    assert doctest.testmod(losses) == (0, 2)
