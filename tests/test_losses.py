"""The losses against loops written from their formulas."""

import doctest
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modan_fast import losses
from modan_fast.losses import MulSupConLoss, NTXentLoss, SupConLoss


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


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_formula_written_as_loops(name):
    loss, temperature, weight_of = LOSSES[name]
    embeddings, labels = batch()
    ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    value, expected = loss(ours, labels), formula(theirs, labels, temperature, weight_of)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "weight_of"), [(MulSupConLoss, above(0.3)), (SupConLoss, lambda a, b: a == b or None)]
)
def test_the_instance_weight_adds_the_loops_of_ntxent(loss, weight_of):
    embeddings, labels = batch()
    ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    value = loss(0.1, instance_weight=0.7)(ours, labels)
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


@pytest.mark.parametrize("loss", [MulSupConLoss(), SupConLoss(), NTXentLoss()])
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


def test_large_embeddings_of_equal_direction_stay_finite():
    embeddings = torch.full((8, 4), 1e4, requires_grad=True)
    value = MulSupConLoss(temperature=0.01)(embeddings, torch.ones(4, 2))
    value.backward()
    assert value.isfinite()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_of_the_gradient_is_refused_rather_than_wrong(name):
    embeddings, labels = batch()
    value = LOSSES[name][0](embeddings.requires_grad_(), labels)
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
