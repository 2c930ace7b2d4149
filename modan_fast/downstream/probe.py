"""Linear probes of a frozen encoder: its features are extracted once, and all heads train together.

N images, F = 512 features, G = F + 1 of them with the constant 1 that carries the bias, R heads, B images a
batch, C = 2 classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from modan_fast.config import EvaluateConfig
from modan_fast.downstream.tasks import Cell, Task
from modan_fast.models import FEATURES
from shard_builder.settings import InputError

SCORING_BATCH = 64  # images at once where nothing is trained; bounds memory, changes no result
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, as torch.optim has them


def lr_at(epoch: int, *, peak: float) -> float:
    """The learning rate in `epoch`, counted from 0: a tenth after every five epochs."""
    return float(peak * 0.1 ** (epoch // 5))


def initial_head(cell: Cell, seed: int) -> Tensor:
    """Weights and, in the last column, biases (C, G) of a cell's linear head, drawn as nn.Linear draws them."""
    bound = FEATURES**-0.5
    generator = cell.generator(seed, "head")
    return torch.empty(2, FEATURES + 1).uniform_(-bound, bound, generator=generator)


def apply(network: nn.Module, pixels: Tensor, compute_type: torch.dtype) -> Tensor:
    """A network's float32 output for pixels (B, 1, H, W) uint8 on its device, scaled to [0, 1]."""
    views = pixels.to(torch.float32).div(255).contiguous(memory_format=torch.channels_last)
    with torch.autocast(views.device.type, compute_type, enabled=compute_type != torch.float32):
        output: Tensor = network(views)
    return output.float()


@torch.no_grad()
def apply_to_all(network: nn.Module, pixels: Tensor, compute_type: torch.dtype) -> Tensor:
    """The same for any number of pixels, in evaluation mode, batch by batch."""
    network.eval()
    return torch.cat([apply(network, batch, compute_type) for batch in pixels.split(SCORING_BATCH)])


def extract(encoder: nn.Module, pixels: Tensor, compute_type: torch.dtype) -> Tensor:
    """Features (N, F) float32 of pixels (N, 1, H, W). Raises `InputError` where one is not finite."""
    features = apply_to_all(encoder, pixels, compute_type)
    if not features.isfinite().all():
        raise InputError(
            "the encoder's features are not finite: its pretraining diverged, or its file is damaged"
        )
    return features


@torch.no_grad()
def train_heads(
    features_NF: Tensor,
    task: Task,
    cells: Sequence[Cell],
    config: EvaluateConfig,
    tick: Callable[[int], None] = lambda epochs: None,
) -> Tensor:
    """Train one linear head a cell and return the scores (R, N) float32 that they give all images.

    A score is the probability of the positive class. Each head is what torch.optim.Adam makes of it alone:
    cross-entropy, its own order and initial weights, the weights of the lowest validation loss. They are
    trained in float64, so that a score rounds to the same float32 whichever heads train beside it. `tick` is
    called after each epoch with the number of epochs done, one a head.
    """
    device = features_NF.device
    folds = [task.folds[cell.fold - 1] for cell in cells]
    inputs_NG = functional.pad(features_NF.double(), (0, 1), value=1.0)
    labels_N = torch.from_numpy(task.labels).to(device)
    val_RV = _padded([fold.val for fold in folds]).to(device)
    inputs_RVG = inputs_NG[val_RV]
    orders = [cell.generator(config.seed, "order") for cell in cells]

    head_RCG = torch.stack([initial_head(cell, config.seed) for cell in cells]).double().to(device)
    mean_RCG, square_RCG = torch.zeros_like(head_RCG), torch.zeros_like(head_RCG)
    steps_R11 = torch.zeros(len(cells), 1, 1, dtype=torch.float64, device=device)
    best_RCG, best_R = head_RCG.clone(), torch.full((len(cells),), torch.inf, dtype=torch.float64, device=device)

    assert config.probe_lr is not None
    for epoch in range(config.epochs):
        lr = lr_at(epoch, peak=config.probe_lr)
        order = _padded(
            [
                fold.train[torch.randperm(len(fold.train), generator=generator).numpy()]
                for fold, generator in zip(folds, orders, strict=True)
            ]
        )
        for rows_RB in order.to(device).split(config.batch_size, dim=1):
            real_RB = rows_RB >= 0
            inputs_RBG = inputs_NG[rows_RB]
            error_RBC = torch.softmax(inputs_RBG @ head_RCG.mT, dim=2) - functional.one_hot(labels_N[rows_RB], 2)
            error_RBC *= (real_RB / real_RB.sum(1, keepdim=True).clamp(min=1))[:, :, None]
            gradient_RCG = error_RBC.mT @ inputs_RBG

            # A head whose fold has no batch left stands still, its moments and step count included.
            moves_R11 = real_RB.any(1)[:, None, None]
            steps_R11 += moves_R11
            mean_RCG = torch.where(moves_R11, mean_RCG.lerp(gradient_RCG, 1 - BETAS[0]), mean_RCG)
            square_RCG = torch.where(moves_R11, square_RCG.lerp(gradient_RCG**2, 1 - BETAS[1]), square_RCG)
            scale_RCG = (square_RCG / (1 - BETAS[1] ** steps_R11)).sqrt() + EPSILON
            change_RCG = mean_RCG / (1 - BETAS[0] ** steps_R11) / scale_RCG
            head_RCG = head_RCG - lr * moves_R11 * change_RCG

        loss_RV = functional.cross_entropy((inputs_RVG @ head_RCG.mT).mT, labels_N[val_RV], reduction="none")
        real_RV = val_RV >= 0
        loss_R = (loss_RV * real_RV).sum(1) / real_RV.sum(1)
        better_R = loss_R < best_R
        best_R = torch.where(better_R, loss_R, best_R)
        best_RCG = torch.where(better_R[:, None, None], head_RCG, best_RCG)
        tick(len(cells))
    return torch.stack([torch.softmax(inputs_NG @ head_CG.T, dim=1)[:, 1] for head_CG in best_RCG]).float()


def _padded(rows: Sequence[NDArray[np.int64]]) -> Tensor:
    """Arrays of rows as one matrix, -1 where an array has ended."""
    tensors = [torch.from_numpy(each) for each in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-1)
