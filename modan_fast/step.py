"""The training step: model, loss and optimiser of a run, each in its own type and layout."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from modan_fast import checkpoint, models
from modan_fast.config import PretrainConfig
from modan_fast.loader import Batch
from modan_fast.losses import MulSupConLoss, NTXentLoss, SupConLoss
from modan_fast.machine import compiler, compute_type
from modan_fast.models import Pretrainee, head

log = logging.getLogger(__name__)


class Step:
    """What is trained, and how: `update` makes one step of it.

    Weights are drawn from torch's global generator, seeded with the run's seed.
    """

    def __init__(self, config: PretrainConfig, *, classes: int, steps: int, device: torch.device) -> None:
        """`classes` counts the logits of the supervised method, `steps` the batches of an epoch."""
        self.config, self.steps, self.dtype = config, steps, compute_type(config.precision, device)
        self.compiled = wants_compile(config.compile, device)
        torch.manual_seed(config.seed)
        self.encoder = first_encoder(config)
        self.model = Pretrainee(self.encoder, head(config.method, classes))
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = optimizer_of(config, self.model)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        # A last batch of another size gets a graph of its own, and leaves that of the others as it is.
        self._forward: Any = torch.compile(self.model, dynamic=False) if self.compiled else self.model
        loss = loss_function(config)
        self._loss: Any = torch.compile(loss, dynamic=False) if self.compiled else loss
        self.model.train()

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch, a float32 scalar that stays on the device."""
        mixed = torch.autocast(batch.views.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with tuned_convolutions(), mixed:
            # Grey in each channel, and so saturation, hue and RandomGrayscale would change nothing here either.
            embeddings = self._forward(batch.views.expand(-1, self.config.channels, -1, -1))
        loss: Tensor = self._loss(embeddings.float(), batch.targets if self.config.views == 1 else batch.labels)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Fill the gradients."""
        with tuned_convolutions():
            self._scaler.scale(loss).backward()

    def optimise(self, step: int) -> None:
        """Change the weights, with the learning rate of `step`, counted from the start of the run."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.config, step, self.steps)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, batch: Batch, step: int) -> Tensor:
        """One step of training; returns its loss, which stays on the device."""
        loss = self.forward(batch)
        self.backward(loss)
        self.optimise(step)
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """All that `load_state` needs to go on from here."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.model.load_state_dict(state["model"])
        fused = self.optimizer.param_groups[0]["fused"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = fused  # is this machine's, and not that of the state
        if state["scaler"]:  # empty from where no loss is scaled
            self._scaler.load_state_dict(state["scaler"])


def tuned_convolutions() -> AbstractContextManager[None]:
    """Lets cuDNN time its algorithms once for each shape, and take the fastest; for shapes that stay the same."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True)


def first_encoder(config: PretrainConfig) -> ResNet:
    """The encoder that a run starts from: random, or with ImageNet's weights where they are named or the recipe
    has them (the published supervised baseline starts from them, with a first convolution drawn at random).
    """
    released = config.recipe == "released-code"
    if config.imagenet_weights is None and not (released and config.method == "supervised"):
        return models.encoder(config.stem, config.channels)
    return checkpoint.load_imagenet(
        config.imagenet_weights, config.stem, sum_filters=not released, channels=config.channels
    )


def loss_function(config: PretrainConfig) -> nn.Module:
    """The loss of a method, called with embeddings and labels, or with logits and targets for `supervised`."""
    losses: dict[str, Callable[[], nn.Module]] = {
        "mulsupcon": lambda: MulSupConLoss(config.temperature, config.threshold),
        "supcon": lambda: SupConLoss(config.temperature),
        "simclr": lambda: NTXentLoss(config.temperature),
        "supervised": nn.CrossEntropyLoss,
    }
    return losses[config.method]()


def optimizer_of(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a run; fused on a GPU, where with another one the loss scaler reads back every step."""
    parameters = list(model.parameters())
    fused = parameters[0].is_cuda
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay, fused=fused)


def lr_at(step: int, *, peak: float, start: float, warmup: int, milestones: Iterable[int]) -> float:
    """Learning rate of a step: linear from `start` to `peak` over `warmup` steps, a tenth from each milestone."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return peak * math.prod(0.1 for milestone in milestones if step >= milestone)


def cosine_lr_at(epoch: int, *, peak: float, epochs: int) -> float:
    """Learning rate of an epoch, from 0: from `peak` along half a cosine towards 0 (SGDR, Eq. 5, no restarts)."""
    return peak * (1 + math.cos(math.pi * epoch / epochs)) / 2


def rate_at(config: PretrainConfig, step: int, steps: int) -> float:
    """Learning rate of a step of a run whose epochs have `steps` steps."""
    if config.schedule == "cosine":
        return cosine_lr_at(step // steps, peak=config.lr, epochs=config.epochs)
    return lr_at(
        step,
        peak=config.lr,
        start=min(config.warmup_from, config.lr),
        warmup=config.warmup_epochs * steps,
        milestones=[epoch * steps for epoch in config.milestones],
    )


def wants_compile(asked: bool | None, device: torch.device) -> bool:
    """Whether to compile: as asked, by default on GPUs only; never, with a warning, without a C++ compiler."""
    if not (device.type == "cuda" if asked is None else asked):
        return False
    if compiler():
        return True
    log.warning("no C++ compiler found, so nothing is compiled: install g++ for more speed")
    return False
