"""The losses on several ranks against one process that has all images.

One start computes all cases: this file is also a program, which imports torch once and forks into the ranks.
"""

import multiprocessing
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from modan_fast.losses import ClassificationLoss, MulSupConLoss, NTXentLoss, SupConLoss

LOSSES = {
    "mulsupcon": (MulSupConLoss, {"temperature": 0.1, "threshold": 0.3}),
    "mulsupcon with all pairs positive": (MulSupConLoss, {"threshold": 0.0}),
    "mulsupcon with equal labels positive": (MulSupConLoss, {"threshold": 1.0}),
    "mulsupcon and ntxent": (MulSupConLoss, {"instance_weight": 0.7}),
    "supcon": (SupConLoss, {}),
    "supcon and ntxent": (SupConLoss, {"instance_weight": 0.7}),
    "ntxent": (NTXentLoss, {}),
}
# Images and images of a tile: even or not, a tile that does not divide a rank's images, a rank without any image.
SHAPES = {2: [(8, None), (9, 2), (1, None)], 3: [(9, 2), (7, None), (2, 1)]}
DIMENSIONS, CLASSES = 6, 4


def batch(images):
    """Embeddings, labels with an empty row and equal rows, and classes."""
    generator = torch.Generator().manual_seed(images)
    labels = (torch.rand(images, 5, generator=generator) < 0.4).to(torch.uint8)
    labels[1:2] = 0
    labels[4:5] = labels[:1]
    embeddings = 3 * torch.randn(2 * images, DIMENSIONS, dtype=torch.float64, generator=generator)
    return embeddings, labels, torch.arange(images) % CLASSES


def network():
    torch.manual_seed(0)
    return nn.Linear(DIMENSIONS, CLASSES, dtype=torch.float64)


def rows_of(rank, size, images):
    """The rows of the views of a rank's images, which are dealt out in turn."""
    own = torch.arange(images)[rank::size]
    return torch.cat([own, own + images])


def found_by(rank, size):
    """What a rank computes: by case, the loss and the gradient at its embeddings, or at a network's weights."""
    found = {}

    def record(case, value, inputs):
        value.backward()
        found[case] = (value.detach(), [each.grad for each in inputs])

    for images, tile in SHAPES[size]:
        embeddings, labels, targets = batch(images)
        rows, own = rows_of(rank, size, images), slice(rank, None, size)
        counts = [len(range(each, images, size)) for each in range(size)]
        for name, (kind, settings) in LOSSES.items():
            loss = kind(**settings, gather_distributed=True, tile=tile)
            for given in (counts, None):
                here = embeddings[rows].requires_grad_()
                record((name, images, given is None), loss(here, labels[own], given), [here])
            wrapped = DistributedDataParallel(network())
            record((name, images, "weights"), loss(wrapped(embeddings[rows]), labels[own]), wrapped.parameters())
        loss = ClassificationLoss(gather_distributed=True)
        wrapped = DistributedDataParallel(network())
        value = loss(wrapped(embeddings[:images][own]), targets[own], counts)
        record(("classification", images, "weights"), value, wrapped.parameters())
    images, tile = SHAPES[size][1]
    embeddings, labels, targets = batch(images)
    rows, own = rows_of(rank, size, images), slice(rank, None, size)
    with torch.autocast("cpu", torch.bfloat16):
        here = embeddings[rows].bfloat16().requires_grad_()
        record("bfloat16", MulSupConLoss(gather_distributed=True)(here, labels[own]), [here])
    with pytest.raises(ValueError, match="`counts` says 100 images on rank"):
        MulSupConLoss(gather_distributed=True)(embeddings[rows], labels[own], [100] * size)
    if size == 2:
        compiled = torch.compile(MulSupConLoss(gather_distributed=True, tile=tile), dynamic=False)
        here = embeddings[rows].requires_grad_()
        record("compiled", compiled(here, labels[own]), [here])
        here = embeddings[rows][: len(targets[own])].requires_grad_()
        compiled = torch.compile(ClassificationLoss(gather_distributed=True), dynamic=False)
        record("compiled classification", compiled(here, targets[own]), [here])
    return found


@pytest.fixture(scope="module")
def found_by_ranks(tmp_path_factory):
    """The folder with what all ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, __file__, folder], check=True, timeout=400)
    return folder


@pytest.fixture(scope="module", params=SHAPES, ids=lambda size: f"{size} ranks")
def by_rank(request, found_by_ranks):
    """What each rank of so many found."""
    return [torch.load(found_by_ranks / f"{rank} of {request.param}.pt") for rank in range(request.param)]


def at_once(name, embeddings, labels):
    """The loss of all images in one process, and its gradient at their embeddings."""
    kind, settings = LOSSES[name]
    embeddings = embeddings.clone().requires_grad_()
    value = kind(**settings)(embeddings, labels)
    value.backward()
    return value.detach(), embeddings.grad


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_each_rank_has_the_loss_of_all_images_and_its_gradient_times_the_ranks(by_rank, name):
    size = len(by_rank)
    for images, _ in SHAPES[size]:
        embeddings, labels, _ = batch(images)
        value, gradient = at_once(name, embeddings, labels)
        for exchanged in (False, True):
            for rank, found in enumerate(by_rank):
                own_value, (own_gradient,) = found[name, images, exchanged]
                close(own_value, value)
                assert torch.equal(own_value, by_rank[0][name, images, exchanged][0]), "one value on all ranks"
                close(own_gradient, size * gradient[rows_of(rank, size, images)])


@pytest.mark.parametrize("name", [*LOSSES, "classification"])
def test_averaged_over_ranks_the_gradients_of_weights_are_those_of_one_process(by_rank, name):
    for images, _ in SHAPES[len(by_rank)]:
        embeddings, labels, targets = batch(images)
        alone = network()
        if name == "classification":
            value = functional.cross_entropy(alone(embeddings[:images]), targets)
        else:
            kind, settings = LOSSES[name]
            value = kind(**settings)(alone(embeddings), labels)
        value.backward()
        for found in by_rank:
            own_value, gradients = found[name, images, "weights"]
            close(own_value, value.detach())
            close(gradients, [each.grad for each in alone.parameters()])


def test_half_precision_travels_as_float32(by_rank):
    images, _ = SHAPES[len(by_rank)][1]
    embeddings, labels, _ = batch(images)
    for found in by_rank:
        value, _ = found["bfloat16"]
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, MulSupConLoss()(embeddings.bfloat16(), labels))


@pytest.mark.parametrize("by_rank", [2], indirect=True)
def test_compiled_losses_are_the_same_on_ranks(by_rank):
    images, _ = SHAPES[2][1]
    embeddings, labels, targets = batch(images)
    inputs = embeddings.clone().requires_grad_()
    MulSupConLoss()(inputs, labels).backward()
    logits = embeddings[:images].clone().requires_grad_()
    functional.cross_entropy(logits, targets).backward()
    for rank, found in enumerate(by_rank):
        value, (gradient,) = found["compiled"]
        close(value, MulSupConLoss()(embeddings, labels))
        close(gradient, 2 * inputs.grad[rows_of(rank, 2, images)])
        value, (gradient,) = found["compiled classification"]
        close(value, functional.cross_entropy(embeddings[:images], targets))
        close(gradient, 2 * logits.grad[rank::2])


def run_rank(folder, rank, size):
    store = dist.FileStore(str(folder / f"store of {size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=200))
    torch.save(found_by(rank, size), folder / f"{rank} of {size}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    import modan_fast.tiles  # noqa: F401 - once, before the fork

    folder, fork = Path(sys.argv[1]), multiprocessing.get_context("fork")
    arguments = [(folder, rank, size) for size in SHAPES for rank in range(size)]
    processes = [fork.Process(target=run_rank, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
