"""Training of encoder and head image by image: fine-tuning, and the probe whose batch-norm statistics move.

N images, B images a batch, C logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from modan_fast.config import EvaluateConfig, Protocol
from modan_fast.downstream.labels import Cell
from modan_fast.downstream.probe import apply, apply_to_all, initial_head, lr_at, probabilities
from modan_fast.downstream.tasks import FoldRun, Task
from modan_fast.encoders import Architecture, Encoder
from modan_fast.step import batches


class TaskNetwork(NamedTuple):
    """Encoder and head, which every fold run resets, and their forward pass for full batches, compiled if enabled."""

    network: nn.Sequential
    forward: Callable[[Tensor], Tensor]
    protocol: Protocol


def task_network(
    architecture: Architecture,
    protocol: Protocol,
    device: torch.device,
    *,
    outputs: int = 2,
    headless: bool = False,
    compiled: bool = False,
) -> TaskNetwork:
    """Encoder and head on `device`, channels-last; the encoder has gradients only in fine-tuning.

    The head is a linear layer with `outputs` logits. `headless` has none: the features are the logits, and only the
    first two of them occur as labels, as in the released code.
    """
    encoder = Encoder(architecture).requires_grad_(protocol == "finetune")
    network = nn.Sequential(encoder, nn.Identity() if headless else nn.Linear(encoder.num_features, outputs))
    network = network.to(device).to(memory_format=torch.channels_last)
    return TaskNetwork(network, torch.compile(network, dynamic=False) if compiled else network, protocol)


def train(
    trained: TaskNetwork,
    encoder_weights: Mapping[str, Tensor],
    pixels: Tensor,
    task: Task,
    cell: Cell,
    config: EvaluateConfig,
    compute_type: torch.dtype,
    advance: Callable[[int], None] = lambda epochs: None,
) -> tuple[Tensor, Tensor]:
    """Train one cell. Returns the scores of its test images and the validation losses of the epochs, both float32
    on the CPU.

    A score is a probability: of class 1 of two classes, else of each class or label. The encoder starts from
    `encoder_weights`, a linear head from the fold run's seed. `pixels` (N, channels, H, W) uint8 lie on the network's
    device. `model_selection` chooses the epoch that is judged. `advance` is called with 1 after each epoch.
    """
    network, device = trained.network, pixels.device
    fold_run, fold = cell
    torch.manual_seed(fold_run.seed(config.seed, "network"))  # some networks sample while they train
    _reset(network, encoder_weights, fold_run, config.seed)
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
            # One compiled shape: a second one for the smaller last batch is not worth its time.
            forward = trained.forward if len(rows) == config.batch_size else network
            loss = _loss(apply(forward, pixels[rows], compute_type), labels[rows], task)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        val_logits = apply_to_all(network, val_pixels, compute_type)
        losses.append(_loss(val_logits, val_labels, task).item())
        if config.model_selection == "lowest-val-loss" and losses[-1] < best_loss:
            best_loss = losses[-1]
            best_state = {name: value.clone() for name, value in network.state_dict().items()}
        advance(1)
    if best_state is not None:
        network.load_state_dict(best_state)
    logits = apply_to_all(network, pixels[test_rows.to(device)], compute_type)
    return probabilities(logits, task).cpu(), torch.tensor(losses)


def _loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    if task.kind == "multilabel":
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits))
    return functional.cross_entropy(logits, labels)


def _reset(network: nn.Sequential, encoder_weights: Mapping[str, Tensor], fold_run: FoldRun, seed: int) -> None:
    """Give encoder and head the weights from which a fold run starts."""
    encoder, head = network
    assert isinstance(encoder, Encoder)
    encoder.load_weights(encoder_weights)
    if isinstance(head, nn.Linear):
        start = initial_head(fold_run, seed, encoder.num_features, head.out_features)
        head.load_state_dict({"weight": start[:, :-1], "bias": start[:, -1]})
