"""Several processes train as one does: the same losses, gradients and weights, to rounding; and how they agree."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from modan_fast.batch_norm import SyncedBatchNorm, synchronised
from modan_fast.ranks import ONE, Ranks
from modan_fast.step import micro_batches
from shard_builder.settings import InputError

# What every rank runs: three steps of each case, in float64 or float32. Rank 0 writes losses and weights.
STEPS = """
import json, sys, torch
from dataclasses import replace
from modan_fast.loader import loader_of
from modan_fast.ranks import joined
from modan_fast.recipes import pretrain_config
from modan_fast.shards import open_shards
from modan_fast.step import TrainState

shards, out, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
made = {}
with joined("cpu") as ranks:
    for name, (dtype, batch, given) in cases.items():
        torch.set_default_dtype(getattr(torch, dtype))
        config = pretrain_config({"shards": shards, "batch_size": batch, "drop_last": False, "device": "cpu", **given})
        config = config.resolved(48)
        opened = open_shards(shards)
        loader = loader_of(config, opened, device=torch.device("cpu"), ranks=ranks)
        classes = len(opened.manifest.classes)
        state = TrainState(config, classes=classes, steps=3, device=torch.device("cpu"), ranks=ranks)
        state.connect()
        losses = []
        for _, batch in zip(range(3), loader.epoch(0, max(0, len(loader) - 3))):
            before = float(state._loss_sum)
            state.update(replace(batch, views=batch.views.to(torch.get_default_dtype())))
            losses.append(float(state._loss_sum) - before)
        made[name] = {"losses": losses, "weights": state.model.state_dict()}
    if ranks.first:
        torch.save(made, out)
"""

SMALL = {"encoder": "timm/test_resnet", "image_size": 32, "lr": 0.05, "warmup_epochs": 0, "threads": 1}
# The dtype, the images of a batch, and settings. 48 images: the last batch of 47 has one, of 10 eight.
CASES = {
    **{method: ("float64", 10, {"method": method}) for method in ("mulsupcon", "supcon", "simclr")},
    # Not by Adam, which makes steps of one length of any gradient, also of one that is rounding only.
    "supervised": ("float64", 10, {"method": "supervised", "optimizer": "sgd"}),
    "every pair positive": ("float64", 10, {"threshold": 0.0}),
    "with the instance term": ("float64", 10, {"instance_weight": 0.7}),
    "a rank without an image": ("float64", 47, {"lr": 1e-4}),
    "micro-batches": ("float64", 20, {"micro_batch": 7}),
    "in float32": ("float32", 16, {"encoder": "resnet18", "stem": "7x7", "lr": 1e-3}),
}


def ranks_of(size, port, **more):
    """The environment of each rank, as torchrun sets it."""
    return [
        {
            **os.environ,
            **{
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
            },
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **more},
        }
        for rank in range(size)
    ]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_on(size, code, *arguments):
    """Run Python code on ranks; each must end well. Returns what each printed."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in ranks_of(size, free_port())
    ]
    said = [each.communicate(timeout=300)[0] for each in started]
    assert [each.returncode for each in started] == [0] * size, "\n".join(said)
    return said


@pytest.fixture(scope="module")
def steps(shards, tmp_path_factory):
    """The three steps of each case on one, two and three ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = {name: (dtype, batch, {**SMALL, **given}) for name, (dtype, batch, given) in CASES.items()}
    made = {}
    for size in (1, 2, 3):
        run_on(size, STEPS, shards, folder / str(size), json.dumps(cases))
        made[size] = torch.load(folder / str(size))
    return made


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", [name for name, each in CASES.items() if each[0] == "float64"])
def test_ranks_train_as_one_process_does(steps, case, size):
    one, several = steps[1][case], steps[size][case]
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-12)
    for name, weights in one["weights"].items():
        torch.testing.assert_close(several["weights"][name], weights, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_in_float32_differ_from_one_process_by_rounding(steps, size):
    one, several = steps[1]["in float32"], steps[size]["in float32"]
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, weights in one["weights"].items():
        torch.testing.assert_close(several["weights"][name], weights, rtol=1e-3, atol=1e-4, msg=name)


def test_without_other_ranks_synchronised_batch_norm_is_torchs():
    torch.manual_seed(0)
    plain, network = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double() for _ in range(2))
    network.load_state_dict(plain.state_dict())
    synchronised(network, torch.device("cpu"))
    assert isinstance(network[1], SyncedBatchNorm)
    for _ in range(2):
        images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
        outputs = [each(images) for each in (plain, network)]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
        for each in outputs:
            each.square().sum().backward()
    for one, other in zip(plain.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
    assert plain.state_dict().keys() == network.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain.eval()(images), network.eval()(images))


def test_each_rank_computes_its_images_of_each_micro_batch():
    rows = [micro_batches(10, 4, 2, Ranks(rank=rank, size=3)) for rank in range(3)]
    # Rank r has the images r, r + 3, … of the batch: row j is image 3j + r, and the second views come after the first.
    for number, images in enumerate([{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9}]):
        seen = []
        for rank, own in enumerate([4, 3, 3]):
            views = rows[rank][number].tolist()
            assert views[len(views) // 2 :] == [row + own for row in views[: len(views) // 2]]
            seen += [3 * row + rank for row in views[: len(views) // 2]]
        assert set(seen) == images


def test_one_rank_agrees_with_itself_and_hands_on_its_errors_as_they_are():
    assert ONE.first
    assert ONE.shares(7) == [7]
    assert ONE.highest([1, 0.5]) == [1, 0.5]
    with pytest.raises(FileNotFoundError):
        ONE.decided(lambda: open("/no/such/file"))  # noqa: SIM115


AGREEING = """
import sys
from modan_fast.ranks import EndedElsewhere, joined
from shard_builder.settings import InputError

def fails(rank, error):
    def work():
        if ranks.rank == rank:
            raise error
        return ranks.rank
    return work

with joined("cpu") as ranks:
    assert ranks.together(lambda: ranks.rank) == ranks.rank
    assert ranks.decided(lambda: "of rank %d" % ranks.rank) == "of rank 0"
    assert ranks.highest([ranks.rank, -ranks.rank]) == [1, 0]
    for rank, error in [(0, InputError("bad")), (1, InputError("bad")), (1, OSError(28, "full")), (1, KeyError("k")),
                        (1, KeyboardInterrupt()), (1, FloatingPointError("nan"))]:
        try:
            # A work within a work is agreed on once.
            ranks.together(lambda: ranks.together(fails(rank, error)))
        except BaseException as raised:
            print(type(raised).__name__, getattr(raised, "code", ""), raised)
    try:
        ranks.decided(fails(0, InputError("bad")))
    except (EndedElsewhere, InputError) as raised:
        print(type(raised).__name__, raised)
"""


def test_what_fails_on_one_rank_ends_all_with_the_same_line():
    first, second = (said.splitlines() for said in run_on(2, AGREEING))
    assert first == [
        "InputError  bad",
        "InputError  rank 1 of 2: bad",
        "InputError  rank 1 of 2: [Errno 28] full",
        "InputError  rank 1 of 2: KeyError: 'k'",
        "KeyboardInterrupt  ",
        "InputError  rank 1 of 2: nan",
        "InputError bad",
    ]
    assert second == [
        "EndedElsewhere 2 rank 0 of 2: bad",
        "EndedElsewhere 2 rank 1 of 2: bad",
        "EndedElsewhere 2 rank 1 of 2: [Errno 28] full",
        "EndedElsewhere 2 rank 1 of 2: KeyError: 'k'",
        "KeyboardInterrupt  ",
        "EndedElsewhere 1 rank 1 of 2: nan",
        "EndedElsewhere rank 0 of 2: bad",
    ]


def test_more_ranks_than_images_in_a_batch_are_refused():
    from modan_fast.recipes import pretrain_config
    from modan_fast.trainer import check_ranks

    with pytest.raises(InputError, match="`batch_size=4` leaves some of 8 ranks without an image"):
        check_ranks(pretrain_config({"batch_size": 4}), Ranks(size=8))
