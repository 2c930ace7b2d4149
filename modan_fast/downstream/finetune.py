"""Training of encoder and head on images: fine-tuning, and the probe whose batch-norm statistics move.

N images, B of them a batch, C logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from modan_fast.config import EvaluateConfig, Protocol, Stem
from modan_fast.downstream.probe import apply, apply_to_all, initial_head, lr_at
from modan_fast.downstream.tasks import FoldRun, Task
from modan_fast.encoders import Encoder


class TaskNetwork(NamedTuple):
    """Encoder and head, which every fold run resets, and their forward pass for full batches, compiled if enabled."""

    network: nn.Sequential
    forward: Callable[[Tensor], Tensor]
    protocol: Protocol


def task_network(
    stem: Stem, protocol: Protocol, device: torch.device, *, headless: bool = False, compiled: bool = False
) -> TaskNetwork:
    """Encoder and head on `device`, channels-last; only what the protocol trains has gradients.

    The head is a two-way linear layer. With `headless` the features are the logits, and only the first two are classes,
    as in the released code.
    """
    encoder = Encoder(stem).requires_grad_(protocol == "finetune")
    network = nn.Sequential(encoder, nn.Identity() if headless else nn.Linear(encoder.num_features, 2))
    network = network.to(device).to(memory_format=torch.channels_last)
    return TaskNetwork(network, torch.compile(network, dynamic=False) if compiled else network, protocol)


def train(
    trained: TaskNetwork,
    encoder_state: Mapping[str, Tensor],
    pixels: Tensor,
    task: Task,
    fold_run: FoldRun,
    config: EvaluateConfig,
    compute_type: torch.dtype,
    advance: Callable[[int], None] = lambda epochs: None,
) -> tuple[Tensor, Tensor]:
    """Train on the fold of a fold run. Returns its test images' scores and the validation loss of each epoch, both
    float32 on the CPU.

    A score is the softmax probability of class 1. The encoder starts from `encoder_state`, a linear head from the fold
    run's seed. `pixels` (N, 1, H, W) uint8 are on the network's device. The weights of the epoch that `model_selection`
    chooses are judged. `advance` is called with 1 after each epoch.
    """
    network = trained.network
    encoder, head = network
    assert isinstance(encoder, Encoder)
    encoder.load_weights(encoder_state)
    if isinstance(head, nn.Linear):
        start = initial_head(fold_run, config.seed, encoder.num_features)
        head.load_state_dict({"weight": start[:, :-1], "bias": start[:, -1]})
    device = pixels.device
    fold = task.folds[fold_run.fold - 1]
    train_rows, val_rows, test_rows = (torch.from_numpy(rows) for rows in (fold.train, fold.val, fold.test))
    labels = torch.from_numpy(task.labels).to(device)
    val_pixels, val_labels = pixels[val_rows.to(device)], labels[val_rows.to(device)]

    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    peak = config.lr if trained.protocol == "finetune" else config.probe_lr
    assert peak is not None
    optimizer = torch.optim.Adam(parameters, lr=peak, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=compute_type == torch.float16)
    order = fold_run.generator(config.seed, "order")
    best_loss, best_state = torch.inf, None
    losses = []
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = lr_at(epoch, peak=peak)
        network.train()
        shuffled = train_rows[torch.randperm(len(train_rows), generator=order)].to(device)
        for rows in batches(shuffled, config.batch_size):
            # Only full batches are compiled: one shape, one graph.
            forward = trained.forward if len(rows) == config.batch_size else network
            loss = functional.cross_entropy(apply(forward, pixels[rows], compute_type), labels[rows])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(
            functional.cross_entropy(apply_to_all(network, val_pixels, compute_type), val_labels).item()
        )
        if config.model_selection == "lowest-val-loss" and losses[-1] < best_loss:
            best_loss = losses[-1]
            best_state = {key: value.clone() for key, value in network.state_dict().items()}
        advance(1)
    if best_state is not None:
        network.load_state_dict(best_state)
    logits = apply_to_all(network, pixels[test_rows.to(device)], compute_type)
    return torch.softmax(logits, dim=1)[:, 1].cpu(), torch.tensor(losses)


def batches(rows: Tensor, size: int) -> list[Tensor]:
    """`rows` in batches of `size`, the rest as a smaller last one; a rest of one joins the batch before.

    Batch-norm has no variance to divide by where a batch is one image and the last feature map one pixel.
    """
    parts = list(rows.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
