"""Linear probes of a frozen encoder: features are extracted once, then all heads of an experiment train together.

N images, F features, G = F + 1 of them with a constant 1 for the bias, R heads (one per fold run), B images a batch,
C = 2 classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from modan_fast.config import EvaluateConfig
from modan_fast.downstream.tasks import FoldRun, Task
from shard_builder.settings import InputError

CLASSES = 2
SCORING_BATCH = 64  # images at once where nothing is trained; bounds memory, changes no result


def lr_at(epoch: int, *, peak: float) -> float:
    """The learning rate in `epoch`, counted from 0: a tenth after every five epochs."""
    return float(peak * 0.1 ** (epoch // 5))


def initial_head(fold_run: FoldRun, seed: int, num_features: int) -> Tensor:
    """Initial weights of a linear head, with the biases in the last column (C, G); distributed as in nn.Linear."""
    bound = num_features**-0.5
    generator = fold_run.generator(seed, "head")
    return torch.empty(CLASSES, num_features + 1).uniform_(-bound, bound, generator=generator)


def apply(network: Callable[[Tensor], Tensor], pixels: Tensor, compute_type: torch.dtype) -> Tensor:
    """A network's float32 output for pixels (B, 1, H, W) uint8 on its device, scaled to [0, 1]."""
    views = pixels.to(torch.float32).div(255).contiguous(memory_format=torch.channels_last)
    with torch.autocast(views.device.type, compute_type, enabled=compute_type != torch.float32):
        return network(views).float()


@torch.no_grad()
def apply_to_all(network: nn.Module, pixels: Tensor, compute_type: torch.dtype) -> Tensor:
    """`apply` for any number of images, batch by batch, in evaluation mode and without gradients."""
    network.eval()
    return torch.cat([apply(network, batch, compute_type) for batch in pixels.split(SCORING_BATCH)])


def extract(encoder: nn.Module, pixels: Tensor, compute_type: torch.dtype) -> Tensor:
    """Features (N, F) float32 of pixels (N, 1, H, W). Raises `InputError` if one is not finite."""
    features = apply_to_all(encoder, pixels, compute_type)
    if not features.isfinite().all():
        raise InputError(
            "the encoder's features are not finite: its pretraining diverged, or its file is damaged"
        )
    return features


def train_heads(
    features_NF: Tensor,
    task: Task,
    fold_runs: Sequence[FoldRun],
    config: EvaluateConfig,
    advance: Callable[[int], None] = lambda epochs: None,
) -> tuple[Tensor, Tensor]:
    """Train one linear head per fold run. Returns the scores (R, N) of all images and the validation losses
    (R, epochs), both float32 on the CPU.

    A score is the probability of the positive class. Each head is trained as by torch.optim.Adam alone: cross-entropy,
    its own batch order and initial weights; `model_selection` chooses the epoch that is judged. Training is in
    float64, so that a score rounds to the same float32 whichever heads train beside it. `advance` is called after each
    epoch with the number of heads that trained in it.
    """
    inputs_NG = functional.pad(features_NF.double(), (0, 1), value=1.0)
    scores_RN = torch.empty(len(fold_runs), len(inputs_NG))
    losses_RE = torch.empty(len(fold_runs), config.epochs)
    # Heads with equally many batches per epoch take every step together.
    steps = [-(-len(task.fold_of(fold_run).train) // config.batch_size) for fold_run in fold_runs]
    for count in sorted(set(steps)):
        rows = [row for row, each in enumerate(steps) if each == count]
        scores, losses = _train_in_step(inputs_NG, task, [fold_runs[row] for row in rows], config, advance)
        scores_RN[rows], losses_RE[rows] = scores.cpu(), losses.cpu()
    return scores_RN, losses_RE


def _train_in_step(
    inputs_NG: Tensor,
    task: Task,
    fold_runs: Sequence[FoldRun],
    config: EvaluateConfig,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """`train_heads` for heads with equally many batches per epoch.

    With two classes the softmax is the sigmoid of the difference of the two logits, and Adam moves the two rows
    of a head by opposite steps of equal length. So the difference of the rows is trained, at twice the learning rate.
    """
    assert config.probe_lr is not None
    device, heads, num_features = inputs_NG.device, len(fold_runs), inputs_NG.shape[1] - 1
    folds = [task.fold_of(fold_run) for fold_run in fold_runs]
    labels_N = torch.from_numpy(task.labels).to(inputs_NG)
    val_RN = inputs_NG.new_zeros(heads, len(inputs_NG))  # weights of the images in a head's validation loss
    for weights_N, fold in zip(val_RN, folds, strict=True):
        weights_N[torch.from_numpy(fold.val)] = 1 / len(fold.val)
    orders = [fold_run.generator(config.seed, "order") for fold_run in fold_runs]

    starts = [initial_head(fold_run, config.seed, num_features) for fold_run in fold_runs]
    start_RCG = torch.stack(starts).to(inputs_NG)
    head_R1G = (start_RCG[:, 1:] - start_RCG[:, :1]).requires_grad_()
    optimizer = torch.optim.Adam([head_R1G], fused=True)
    best_R1G, best_R = head_R1G.detach(), inputs_NG.new_full((heads,), torch.inf)
    # One buffer for all batches: allocating one per step would cost as much as copying into it.
    buffer_MG = inputs_NG.new_empty(heads * config.batch_size, inputs_NG.shape[1])
    losses: list[Tensor] = []
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = 2 * lr_at(epoch, peak=config.probe_lr)
        order = _padded(
            [
                fold.train[torch.randperm(len(fold.train), generator=generator).numpy()]
                for fold, generator in zip(folds, orders, strict=True)
            ]
        )
        for rows_RB in order.to(device).split(config.batch_size, dim=1):
            batch_MG = buffer_MG[: rows_RB.numel()]
            torch.index_select(inputs_NG, 0, rows_RB.clamp(min=0).flatten(), out=batch_MG)
            inputs_RBG = batch_MG.unflatten(0, rows_RB.shape)
            real_RB = (rows_RB >= 0).to(inputs_NG)
            loss = functional.binary_cross_entropy_with_logits(
                (head_R1G @ inputs_RBG.mT)[:, 0],
                labels_N[rows_RB],
                real_RB / real_RB.sum(1, keepdim=True),
                reduction="sum",
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        with torch.no_grad():
            logits_RN = head_R1G[:, 0] @ inputs_NG.T
            entropy_RN = functional.binary_cross_entropy_with_logits(
                logits_RN, labels_N.expand(heads, -1), reduction="none"
            )
            loss_R = (entropy_RN * val_RN).sum(1)
            better_R = loss_R < best_R
            best_R = torch.where(better_R, loss_R, best_R)
            best_R1G = torch.where(better_R[:, None, None], head_R1G, best_R1G)
        losses.append(loss_R)
        advance(heads)
    judged_R1G = best_R1G if config.model_selection == "lowest-val-loss" else head_R1G.detach()
    # One head at a time: a product with many heads would round differently from one with few.
    scores = [torch.sigmoid(inputs_NG @ head_1G[0]) for head_1G in judged_R1G]
    return torch.stack(scores).float(), torch.stack(losses, dim=1).float()


def _padded(rows: Sequence[NDArray[np.int64]]) -> Tensor:
    """Arrays of rows as one matrix, padded with -1."""
    tensors = [torch.from_numpy(each) for each in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-1)
