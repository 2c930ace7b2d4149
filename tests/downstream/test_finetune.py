from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modan_fast.config import EvaluateConfig, Protocol
from modan_fast.downstream.finetune import TaskNetwork, task_network, train
from modan_fast.downstream.labels import cells_of
from modan_fast.downstream.tasks import FoldRun, Kind, Task, decode, read_task
from modan_fast.encoders import Architecture, Encoder
from modan_fast.recipes import evaluate_config
from modan_fast.step import batches

CPU = torch.device("cpu")


def config(recipe: str = "paper", **settings: object) -> EvaluateConfig:
    values = {"init": ("scratch",), "recipe": recipe, "epochs": 1, "batch_size": 8, "stem": "7x7", **settings}
    return evaluate_config(values).resolved()


@pytest.fixture
def task(make_task: Callable[..., Path]) -> Task:
    return read_task(make_task())


def encoder_state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return Encoder("7x7").weights


def run(task: Task, settings: EvaluateConfig, fold_run: FoldRun, network: TaskNetwork) -> Tensor:
    pixels = torch.from_numpy(decode(task, 32))
    [cell] = cells_of(task, [fold_run], 0)
    return train(network, encoder_state(), pixels, task, cell, settings, torch.float32)[0]


@pytest.mark.parametrize(
    ("count", "sizes"), [(24, [8, 8, 8]), (25, [8, 8, 9]), (26, [8, 8, 8, 2]), (1, [1]), (9, [9])]
)
def test_batches_keep_every_row_and_leave_none_alone(count: int, sizes: list[int]) -> None:
    found = batches(torch.arange(count), 8)
    assert [len(batch) for batch in found] == sizes
    assert torch.cat(found).tolist() == list(range(count))


@pytest.mark.parametrize(("recipe", "protocol"), [("paper", "finetune"), ("released-code", "probe")])
def test_a_reset_network_trains_as_a_rebuilt_one(task: Task, recipe: str, protocol: Protocol) -> None:
    settings = config(recipe)
    used = task_network(Architecture(stem="7x7"), protocol, CPU)
    other = run(task, settings, FoldRun(1, 2), used)
    reset = run(task, settings, FoldRun(1, 1), used)
    rebuilt = task_network(Architecture(stem="7x7"), protocol, CPU)
    assert torch.equal(run(task, settings, FoldRun(1, 1), rebuilt), reset)
    for key, value in rebuilt.network.state_dict().items():
        assert torch.equal(used.network.state_dict()[key], value), key
    assert reset.shape == (len(task.folds[0].test),)
    assert other.shape == (len(task.folds[1].test),)


@pytest.mark.slow
def test_one_compiled_step_serves_all_fold_runs_and_trains_as_the_plain_one(task: Task) -> None:
    # pytest -m slow: compiling takes a minute.
    settings = config()
    compiled, plain = (
        task_network(Architecture(stem="7x7"), "finetune", CPU, compiled=each) for each in (True, False)
    )
    torch._dynamo.utils.counters.clear()
    for fold_run in (FoldRun(1, 1), FoldRun(1, 2), FoldRun(2, 1)):
        scores = run(task, settings, fold_run, compiled)
        torch.testing.assert_close(scores, run(task, settings, fold_run, plain), atol=0.02, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_paper_keeps_the_weights_of_the_lowest_validation_loss(task: Task) -> None:
    # The labels of the validation images are turned round, so that their loss rises while the task is learnt.
    fold = task.folds[0]
    labels = task.labels.copy()
    labels[fold.val] = 1 - labels[fold.val]
    task = replace(task, labels=labels)
    settings = config(epochs=4, lr=1e-3, batch_size=4)
    tuned = task_network(Architecture(stem="7x7"), "finetune", CPU)
    network = tuned.network
    pixels = torch.from_numpy(decode(task, 32))
    views, truth = pixels[fold.val].float() / 255, torch.from_numpy(labels[fold.val])
    seen = []

    def val_loss() -> float:
        network.eval()
        with torch.no_grad():
            return nn.functional.cross_entropy(network(views), truth).item()

    def look(epochs: int) -> None:
        seen.append(val_loss())

    start = encoder_state()
    [cell] = cells_of(task, [FoldRun(1, 1)], 0)
    _, losses = train(tuned, start, pixels, task, cell, settings, torch.float32, look)
    assert losses.tolist() == pytest.approx(seen, rel=1e-4)
    assert len(seen) == 4
    assert min(seen) < seen[-1], "the last epoch must not be the best for this test to say anything"
    assert val_loss() == pytest.approx(min(seen), rel=1e-4)


def test_released_code_fine_tunes_the_features_as_512_logits(task: Task) -> None:
    settings = config("released-code")
    headless = task_network(Architecture(stem="7x7"), "finetune", CPU, headless=True)
    scores = run(task, settings, FoldRun(1, 1), headless)
    pixels = torch.from_numpy(decode(task, 32))[task.folds[0].test].float() / 255
    with torch.no_grad():
        logits = headless.network.eval()(pixels)
    assert logits.shape[1] == 512
    torch.testing.assert_close(scores, logits.exp()[:, 1] / logits.exp().sum(1), atol=1e-5, rtol=1e-4)


def test_released_codes_probe_trains_the_head_and_moves_only_batch_norm_statistics(task: Task) -> None:
    settings = config("released-code")
    assert settings.probe_lr == 1e-3
    probed = task_network(Architecture(stem="7x7"), "probe", CPU)
    run(task, settings, FoldRun(1, 1), probed)
    start = encoder_state()
    moved = {key for key, value in probed.network[0].weights.items() if not torch.equal(value, start[key])}
    assert moved == {key for key in start if "running" in key or "num_batches" in key}


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_several_classes_and_labels_are_learnt_by_a_head_with_an_output_for_each(task: Task, kind: Kind) -> None:
    chance = np.random.default_rng(0)
    labels = np.arange(43) % 3 if kind == "multiclass" else chance.integers(0, 2, (43, 3))
    shown = np.eye(3, dtype=int)[labels] if kind == "multiclass" else labels
    pixels = chance.integers(0, 60, (43, 3, 32, 32))
    pixels += 150 * shown[:, :, None, None]  # the classes are colours
    task = replace(task, kind=kind, labels=labels, classes=("a", "b", "c"))
    network = task_network(Architecture(stem="7x7", channels=3), "finetune", CPU, outputs=3)
    torch.manual_seed(3)
    weights = Encoder(Architecture(stem="7x7", channels=3)).weights
    [cell] = cells_of(task, [FoldRun(1, 1)], 0)
    tuned = torch.from_numpy(pixels.astype(np.uint8))
    scores, losses = train(network, weights, tuned, task, cell, config(epochs=12, lr=1e-3), torch.float32)
    assert scores.shape == (len(cell.fold.test), 3)
    with torch.no_grad():
        logits = network.network.eval()(tuned[cell.fold.val].float() / 255)
    truth = torch.from_numpy(labels[cell.fold.val])
    if kind == "multiclass":
        assert (scores.argmax(1).numpy() == labels[cell.fold.test]).mean() > 0.8
        loss = nn.functional.cross_entropy(logits, truth).item()
    else:
        assert ((scores > 0.5).numpy() == labels[cell.fold.test]).mean() > 0.8
        loss = nn.functional.binary_cross_entropy(logits.sigmoid(), truth.float()).item()
    assert loss == pytest.approx(losses.min().item(), rel=1e-3)
