"""The state of a training run: encoder with head, loss, optimiser and schedule; one step of it; saving and restoring.

N images, C channels, H x W pixels, F features, D embedding dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from modan_fast.config import Method, PretrainConfig
from modan_fast.devices import compute_type, tuned_convolutions, wants_compile
from modan_fast.encoders import Encoder, imagenet_encoder
from modan_fast.loader import Batch
from modan_fast.losses import MulSupConLoss, NTXentLoss, SupConLoss
from modan_fast.metrics import EpochClock


# What each optimiser gathers for a parameter.
OPTIMIZER_STATE = {"sgd": {"momentum_buffer"}, "adam": {"step", "exp_avg", "exp_avg_sq"}}


class EncoderWithHead(nn.Module):
    """An encoder with its pretraining head: views (N, 1, H, W) to embeddings (N, D)."""

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, views: Tensor) -> Tensor:
        embeddings: Tensor = self.head(self.encoder(views))
        return embeddings


class TrainState:
    """A training run at one moment: weights, optimiser, and the position (`epoch` and `step` in it, from 0).

    `update` advances it by a step, `end_epoch` to the next epoch; `state_dict` and `load_state_dict` save and restore
    it. New weights are sampled from torch's global generator, seeded with the run's seed.
    """

    def __init__(
        self, config: PretrainConfig, *, classes: int, steps: int, device: torch.device, resumed: bool = False
    ) -> None:
        """`classes` is the number of logits of the supervised method, `steps` that of batches in an epoch.

        A state that is to be `resumed` gets its weights from `load_state_dict`, so those of ImageNet are not read.
        """
        self.config, self.steps, self.device = config, steps, device
        self.dtype = compute_type(config.precision, device)
        self.compiled = wants_compile(config.compile, device)
        torch.manual_seed(config.seed)
        self.encoder = Encoder(config.stem, config.channels) if resumed else new_encoder(config)
        self.model = EncoderWithHead(self.encoder, new_head(config.method, classes, self.encoder.num_features))
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.train()
        self.optimizer = new_optimizer(config, self.model)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        # Static shapes: a smaller last batch gets a graph of its own and leaves the other one as it is.
        self._model: Any = torch.compile(self.model, dynamic=False) if self.compiled else self.model
        loss = new_loss(config)
        self._loss: Any = torch.compile(loss, dynamic=False) if self.compiled else loss
        self.epoch = self.step = 0
        self._loss_sum = torch.zeros((), device=device)
        self.clock = EpochClock(device)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch: a float32 scalar that stays on the device."""
        mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with tuned_convolutions(), mixed:
            embeddings = self._model(batch.views)
        labels = batch.targets if self.config.method == "supervised" else batch.labels
        loss: Tensor = self._loss(embeddings.float(), labels)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        with tuned_convolutions():
            self._scaler.scale(loss).backward()

    def optimise(self) -> None:
        """Update the weights with the learning rate of the current step."""
        rate = rate_at(self.config, self.epoch * self.steps + self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, batch: Batch) -> None:
        """Train one step on a batch."""
        loss = self.forward(batch)
        self.backward(loss)
        self.optimise()
        self._loss_sum += loss.detach()
        self.step += 1

    @property
    def epoch_finished(self) -> bool:
        """Whether all batches of the current epoch were trained on."""
        return self.step >= self.steps

    @property
    def loss(self) -> float:
        """The mean loss of the epoch so far, of at least one step; this synchronises."""
        return self._loss_sum.item() / self.step

    def metrics(self, samples: int) -> dict[str, float]:
        """The numbers of the current epoch so far, of a set of `samples` images; this synchronises."""
        seconds = self.clock.seconds
        images = min(self.step * self.config.batch_size, samples)
        return {
            "loss": self.loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "views_per_second": round(images * self.config.views / seconds, 1),
            "wait_share": round(self.clock.wait_share, 4),
        }

    def end_epoch(self) -> None:
        """Move on to the start of the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self._loss_sum = torch.zeros_like(self._loss_sum)
        self.clock = EpochClock(self.device)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to continue from here, also within an epoch."""
        encoder = {f"encoder.{name}": value for name, value in self.encoder.weights.items()}
        head = {f"head.{name}": value for name, value in self.model.head.state_dict().items()}
        begun = self.step > 0
        return {
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self._loss_sum,
            "model": encoder | head,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "seconds": self.clock.seconds if begun else 0.0,
            "waited": self.clock.waited if begun else 0.0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError or ValueError if it does not fit.
        """
        epoch, step = int(state["epoch"]), int(state["step"])
        if not (0 <= epoch <= self.config.epochs and 0 <= step <= self.steps):
            raise ValueError(f"epoch {epoch} and step {step} are outside the run")
        model = state["model"]
        for part, name in ((self.encoder.network, "encoder."), (self.model.head, "head.")):
            part.load_state_dict({key.removeprefix(name): model[key] for key in model if key.startswith(name)})
        # The settings of the optimiser are the run's, and `fused` is this machine's choice: only what it has gathered
        # for each parameter comes from the state.
        gathered = {number: dict(state["optimizer"]["state"][number]) for number in state["optimizer"]["state"]}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": gathered, "param_groups": groups})
        for parameter, values in self.optimizer.state.items():
            tensors = [value for value in values.values() if value is not None]  # SGD without momentum has None
            if set(values) != OPTIMIZER_STATE[self.config.optimizer] or not all(
                each.shape in (parameter.shape, ()) and bool(torch.isfinite(each).all()) for each in tensors
            ):
                raise ValueError("the optimiser's state does not belong to the parameters")
        if not all(bool(torch.isfinite(value).all()) for value in self.model.state_dict().values()):
            raise ValueError("the weights are not finite")
        if state["scaler"]:  # empty if the state was saved where losses are not scaled
            self._scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = epoch, step
        self._loss_sum = state["loss_sum"].to(self.device, torch.float32).reshape(())
        self.clock = EpochClock(self.device, float(state["seconds"]), float(state["waited"]))


def new_encoder(config: PretrainConfig) -> Encoder:
    """The encoder that a run starts from: random, or with ImageNet's weights."""
    if config.start_from == "random":
        return Encoder(config.stem, config.channels)
    return imagenet_encoder(
        config.imagenet_weights, config.stem, sum_filters=config.sum_filters, channels=config.channels
    )


def new_head(method: Method, classes: int, num_features: int) -> nn.Module:
    """The pretraining head: features (N, F) to embeddings (N, D), or to one logit per class.

    MulSupCon and SupCon have no projection head: their embedding is the 1000 outputs of a layer like the ResNet's own
    `fc`. SimCLR's head has one hidden layer.
    """
    if method == "supervised":
        return nn.Linear(num_features, classes)
    if method == "simclr":
        return nn.Sequential(nn.Linear(num_features, 2048), nn.ReLU(inplace=True), nn.Linear(2048, 128))
    return nn.Linear(num_features, 1000)


def new_loss(config: PretrainConfig) -> nn.Module:
    """The loss of a method, called with embeddings and labels, or with logits and targets for `supervised`."""
    losses: dict[str, Callable[[], nn.Module]] = {
        "mulsupcon": lambda: MulSupConLoss(config.temperature, config.threshold),
        "supcon": lambda: SupConLoss(config.temperature),
        "simclr": lambda: NTXentLoss(config.temperature),
        "supervised": nn.CrossEntropyLoss,
    }
    return losses[config.method]()


def new_optimizer(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a run, fused on a GPU: the loss scaler reads a value back at each step of any other."""
    parameters = list(model.parameters())
    fused = parameters[0].is_cuda
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay, fused=fused)


def lr_at(step: int, *, peak: float, start: float, warmup: int, milestones: Iterable[int]) -> float:
    """Learning rate of a step: linear from `start` to `peak` over `warmup` steps, a tenth from each milestone on."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return peak * math.prod(0.1 for milestone in milestones if step >= milestone)


def cosine_lr_at(epoch: int, *, peak: float, epochs: int) -> float:
    """Learning rate of an epoch, from 0: from `peak` along half a cosine towards 0 (SGDR, Eq. 5, no restarts)."""
    return peak * (1 + math.cos(math.pi * epoch / epochs)) / 2


def rate_at(config: PretrainConfig, step: int, steps: int) -> float:
    """Learning rate of a step, counted from the start of the run, with `steps` steps an epoch.

    The milestones of `config` must be epochs, as in `PretrainConfig.resolved`.
    """
    if config.schedule == "cosine":
        return cosine_lr_at(step // steps, peak=config.lr, epochs=config.epochs)
    return lr_at(
        step,
        peak=config.lr,
        start=min(config.warmup_from, config.lr),
        warmup=config.warmup_epochs * steps,
        milestones=[int(epoch) * steps for epoch in config.milestones],
    )
