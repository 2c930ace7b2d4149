"""Training of a network image by image: fine-tuning, and the probe whose batch-norm statistics move.

N images, B of them a batch, C logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from modan_fast import models
from modan_fast.config import EvaluateConfig, Protocol, Stem
from modan_fast.downstream.probe import apply, apply_to_all, initial_head, lr_at
from modan_fast.downstream.tasks import Cell, Task


class Trainee(NamedTuple):
    """Encoder and head, which every cell resets, and what a step of a full batch calls: the same, maybe compiled."""

    network: nn.Sequential
    forward: Callable[[Tensor], Tensor]
    protocol: Protocol


def trainee(
    stem: Stem, protocol: Protocol, device: torch.device, *, headless: bool = False, compiled: bool = False
) -> Trainee:
    """Encoder and head on `device`, channels-last; only what the protocol trains has gradients.

    The head is a two-way linear layer. `headless` has none, and takes the 512 features as 512-way logits of which
    classes 0 and 1 occur, as the released code does.
    """
    encoder = models.encoder(stem).requires_grad_(protocol == "finetune")
    network = nn.Sequential(encoder, nn.Identity() if headless else nn.Linear(models.FEATURES, 2))
    network = network.to(device).to(memory_format=torch.channels_last)
    return Trainee(network, torch.compile(network, dynamic=False) if compiled else network, protocol)


def train(
    trainee: Trainee,
    encoder_state: Mapping[str, Tensor],
    pixels: Tensor,
    task: Task,
    cell: Cell,
    config: EvaluateConfig,
    compute_type: torch.dtype,
    tick: Callable[[int], None] = lambda epochs: None,
) -> tuple[Tensor, Tensor]:
    """Train on a cell's fold; scores of its test images, and the validation losses of its epochs, both float32 on
    the CPU.

    A score is the softmax probability of class 1. The encoder starts from `encoder_state`, a linear head from
    the cell's seed. `pixels` (N, 1, H, W) uint8 lie on the network's device. The weights of the lowest
    validation loss are kept, under `released-code` the last ones. `tick` is called with 1 after each epoch.
    """
    network = trainee.network
    encoder, head = network
    encoder.load_state_dict(encoder_state)
    if isinstance(head, nn.Linear):
        start = initial_head(cell, config.seed)
        head.load_state_dict({"weight": start[:, :-1], "bias": start[:, -1]})
    device = pixels.device
    fold = task.folds[cell.fold - 1]
    train_rows, val_rows, test_rows = (torch.from_numpy(rows) for rows in (fold.train, fold.val, fold.test))
    labels = torch.from_numpy(task.labels).to(device)
    val_pixels, val_labels = pixels[val_rows.to(device)], labels[val_rows.to(device)]

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    peak = config.lr if trainee.protocol == "finetune" else config.probe_lr
    assert peak is not None
    optimizer = torch.optim.Adam(trained, lr=peak, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=compute_type == torch.float16)
    order = cell.generator(config.seed, "order")
    best_loss, best_state = torch.inf, None
    losses = []
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = lr_at(epoch, peak=peak)
        network.train()
        shuffled = train_rows[torch.randperm(len(train_rows), generator=order)].to(device)
        for rows in batches(shuffled, config.batch_size):
            # What is compiled has one shape; the rest of an epoch is not worth another.
            forward = trainee.forward if len(rows) == config.batch_size else network
            loss = functional.cross_entropy(apply(forward, pixels[rows], compute_type), labels[rows])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(
            functional.cross_entropy(apply_to_all(network, val_pixels, compute_type), val_labels).item()
        )
        if config.recipe == "paper" and losses[-1] < best_loss:
            best_loss = losses[-1]
            best_state = {key: value.clone() for key, value in network.state_dict().items()}
        tick(1)
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
