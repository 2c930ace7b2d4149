"""Linear probes of a frozen encoder: features are extracted once, then all heads of an experiment train together.

N images, F features, G = F + 1 of them with a constant 1 for the bias, R heads (one per fold run), B images a batch,
C logits of a head: one a class or label, and in training only one for two classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from modan_fast.config import EvaluateConfig
from modan_fast.downstream.labels import Cell
from modan_fast.downstream.tasks import FoldRun, Task
from modan_fast.ranks import ONE, Ranks
from shard_builder.settings import InputError

SCORING_BATCH = 64  # images at once where nothing is trained; bounds memory, changes no result


def lr_at(epoch: int, *, peak: float) -> float:
    """The learning rate in `epoch`, counted from 0: a tenth after every five epochs."""
    return float(peak * 0.1 ** (epoch // 5))


def initial_head(fold_run: FoldRun, seed: int, num_features: int, outputs: int = 2) -> Tensor:
    """Initial weights of a linear head, with the biases in the last column (C, G); distributed as in nn.Linear."""
    bound = num_features**-0.5
    generator = fold_run.generator(seed, "head")
    return torch.empty(outputs, num_features + 1).uniform_(-bound, bound, generator=generator)


def apply(network: Callable[[Tensor], Tensor], pixels: Tensor, compute_type: torch.dtype) -> Tensor:
    """A network's float32 output for pixels (B, channels, H, W) uint8 on its device, scaled to [0, 1]."""
    views = pixels.to(torch.float32).div(255).contiguous(memory_format=torch.channels_last)
    with torch.autocast(views.device.type, compute_type, enabled=compute_type != torch.float32):
        return network(views).float()


@torch.no_grad()
def apply_to_all(network: nn.Module, pixels: Tensor, compute_type: torch.dtype) -> Tensor:
    """`apply` for any number of images, batch by batch, in evaluation mode and without gradients."""
    network.eval()
    return torch.cat([apply(network, batch, compute_type) for batch in pixels.split(SCORING_BATCH)])


def extract(encoder: nn.Module, pixels: Tensor, compute_type: torch.dtype, ranks: Ranks = ONE) -> Tensor:
    """Features (N, F) float32 of pixels (N, channels, H, W), by the ranks together, batch by batch in turn.

    Raises `InputError` if one is not finite.
    """
    batches = pixels.split(SCORING_BATCH)
    own = ranks.together(
        lambda: [apply_to_all(encoder, batch, compute_type) for batch in batches[ranks.rank :: ranks.size]]
    )
    if ranks.size > 1:
        found = ranks.all([batch.cpu() for batch in own])
        own = [found[index % ranks.size][index // ranks.size].to(pixels.device) for index in range(len(batches))]
    features = torch.cat(own)
    if not features.isfinite().all():
        raise InputError(
            "the encoder's features are not finite: its pretraining diverged, or its file is damaged"
        )
    return features


class Heads(NamedTuple):
    """Trained heads, all float32 on the CPU.

    `scores` (R, N) are probabilities of all images: of the positive class, or (R, N, C) of each class or label.
    `losses` (R, epochs) are those of the validation images after each epoch, `ends` (R, 2) those of the training images
    after the last epoch and after the one before, or before the only one.
    """

    scores: Tensor
    losses: Tensor
    ends: Tensor


def train_heads(
    features_NF: Tensor,
    task: Task,
    cells: Sequence[Cell],
    config: EvaluateConfig,
    advance: Callable[[int], None] = lambda epochs: None,
) -> Heads:
    """Train one linear head per cell.

    Each head is trained as by torch.optim.Adam alone: cross-entropy (of each label, where an image may have several),
    its own batch order and initial weights; `model_selection` chooses the epoch that is judged. Training is in
    float64, so that a score rounds to the same float32 whichever heads train beside it. `advance` is called after each
    epoch with the number of heads that trained in it.
    """
    inputs_NG = functional.pad(features_NF.double(), (0, 1), value=1.0)
    shape = (len(cells), len(inputs_NG)) if task.kind == "binary" else (len(cells), len(inputs_NG), task.outputs)
    trained = Heads(torch.empty(shape), torch.empty(len(cells), config.epochs), torch.empty(len(cells), 2))
    # Heads with equally many batches per epoch take every step together.
    steps = [-(-len(cell.fold.train) // config.batch_size) for cell in cells]
    for count in sorted(set(steps)):
        rows = [row for row, each in enumerate(steps) if each == count]
        found = _train_in_step(inputs_NG, task, [cells[row] for row in rows], config, advance)
        for whole, part in zip(trained, found, strict=True):
            whole[rows] = part.cpu()
    return trained


def _train_in_step(
    inputs_NG: Tensor,
    task: Task,
    cells: Sequence[Cell],
    config: EvaluateConfig,
    advance: Callable[[int], None],
) -> Heads:
    """`train_heads` for heads with equally many batches per epoch.

    With two classes the softmax is the sigmoid of the difference of the two logits, and Adam moves the two rows
    of a head by opposite steps of equal length. So the difference of the rows is trained, at twice the learning rate.
    """
    assert config.probe_lr is not None
    device, heads, num_features = inputs_NG.device, len(cells), inputs_NG.shape[1] - 1
    labels_N = torch.from_numpy(task.labels).to(device)
    # Weights of the images in a head's losses.
    val_RN = _shares([cell.fold.val for cell in cells], inputs_NG)
    train_RN = _shares([cell.fold.train for cell in cells], inputs_NG)
    orders = [cell.fold_run.generator(config.seed, "order") for cell in cells]

    starts = [initial_head(cell.fold_run, config.seed, num_features, task.outputs) for cell in cells]
    start_RCG = torch.stack(starts).to(inputs_NG)
    rate = 1.0
    if task.kind == "binary":
        start_RCG, rate = start_RCG[:, 1:] - start_RCG[:, :1], 2.0
    head_RCG = start_RCG.requires_grad_()
    optimizer = torch.optim.Adam([head_RCG], fused=True)
    best_RCG, best_R = head_RCG.detach(), inputs_NG.new_full((heads,), torch.inf)
    # One buffer for all batches: allocating one per step would cost as much as copying into it.
    buffer_MG = inputs_NG.new_empty(heads * config.batch_size, inputs_NG.shape[1])

    def losses_of(weights_RN: Tensor) -> Tensor:
        with torch.no_grad():
            return (
                _entropy(head_RCG @ inputs_NG.T, labels_N.expand(heads, *labels_N.shape), task) * weights_RN
            ).sum(1)

    losses, ends = [], [losses_of(train_RN)]
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = rate * lr_at(epoch, peak=config.probe_lr)
        order = _padded(
            [
                cell.fold.train[torch.randperm(len(cell.fold.train), generator=generator).numpy()]
                for cell, generator in zip(cells, orders, strict=True)
            ]
        )
        for rows_RB in order.to(device).split(config.batch_size, dim=1):
            batch_MG = buffer_MG[: rows_RB.numel()]
            torch.index_select(inputs_NG, 0, rows_RB.clamp(min=0).flatten(), out=batch_MG)
            inputs_RBG = batch_MG.unflatten(0, rows_RB.shape)
            real_RB = (rows_RB >= 0).to(inputs_NG)
            entropy_RB = _entropy(head_RCG @ inputs_RBG.mT, labels_N[rows_RB], task)
            loss = (entropy_RB * (real_RB / real_RB.sum(1, keepdim=True))).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        loss_R = losses_of(val_RN)
        better_R = loss_R < best_R
        best_R = torch.where(better_R, loss_R, best_R)
        best_RCG = torch.where(better_R[:, None, None], head_RCG.detach(), best_RCG)
        losses.append(loss_R)
        if epoch >= config.epochs - 2:
            ends.append(losses_of(train_RN))
        advance(heads)
    judged_RCG = best_RCG if config.model_selection == "lowest-val-loss" else head_RCG.detach()
    # One head at a time: a product with many heads would round differently from one with few.
    scores = torch.stack([probabilities(inputs_NG @ head_CG.T, task) for head_CG in judged_RCG])
    return Heads(scores.float(), torch.stack(losses, dim=1).float(), torch.stack(ends[:-3:-1], dim=1).float())


def probabilities(logits_NC: Tensor, task: Task) -> Tensor:
    """The scores for logits: (N,) of the positive class for one logit, its log odds, or two; else (N, C)."""
    if task.kind == "multilabel":
        return torch.sigmoid(logits_NC)
    if logits_NC.shape[1] == 1:
        return torch.sigmoid(logits_NC[:, 0])
    return torch.softmax(logits_NC, dim=1)[:, 1] if task.kind == "binary" else torch.softmax(logits_NC, dim=1)


def _entropy(logits_RCN: Tensor, labels_RN: Tensor, task: Task) -> Tensor:
    """The cross-entropy (R, N) of each image; of several labels (R, N, C) their mean."""
    if task.kind == "multiclass":
        return functional.cross_entropy(logits_RCN, labels_RN, reduction="none")
    labels_RNC = (labels_RN if labels_RN.ndim == 3 else labels_RN[:, :, None]).to(logits_RCN)
    entropy_RNC = functional.binary_cross_entropy_with_logits(logits_RCN.mT, labels_RNC, reduction="none")
    return entropy_RNC.mean(2)


def _shares(rows: Sequence[NDArray[np.int64]], inputs_NG: Tensor) -> Tensor:
    """For each array of rows (R, N): 1 / its length for the images in it, else 0."""
    shares_RN = inputs_NG.new_zeros(len(rows), len(inputs_NG))
    for shares_N, each in zip(shares_RN, rows, strict=True):
        shares_N[torch.from_numpy(each)] = 1 / len(each)
    return shares_RN


def _padded(rows: Sequence[NDArray[np.int64]]) -> Tensor:
    """Arrays of rows as one matrix, padded with -1."""
    tensors = [torch.from_numpy(each) for each in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-1)
