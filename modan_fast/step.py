"""The state of a training run: encoder with head, loss, optimiser and schedule; one step of it; saving and restoring.

N images, C channels, H x W pixels, F features, D embedding dimensions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modan_fast.batch_norm import synchronised
from modan_fast.config import Method, PretrainConfig
from modan_fast.devices import compute_type, out_of_memory, tuned_convolutions, wants_compile
from modan_fast.encoders import Architecture, Encoder, described, published_architecture
from modan_fast.loader import Batch
from modan_fast.losses import ClassificationLoss, MulSupConLoss, NTXentLoss, SupConLoss
from modan_fast.metrics import EpochClock
from modan_fast.pretrained import imagenet_encoder, load_encoder
from modan_fast.ranks import ONE, Ranks
from shard_builder.settings import InputError

# What each optimiser gathers for a parameter.
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
OPTIMIZER_STATE = {"sgd": {"momentum_buffer"}, "adam": _MOMENTS, "adamw": _MOMENTS}


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

    With several ranks each has the same state, and trains on its own images of each batch. Losses and gradients are
    those of the whole batch; `connect` must be called, on all ranks, before the first step.
    """

    def __init__(
        self,
        config: PretrainConfig,
        *,
        classes: int,
        steps: int,
        device: torch.device,
        resumed: bool = False,
        ranks: Ranks = ONE,
    ) -> None:
        """`classes` is the number of logits of the supervised method, `steps` that of batches in an epoch.

        A state that is to be `resumed` gets its weights from `load_state_dict`, so those of ImageNet are not read.
        """
        self.config, self.steps, self.device, self.ranks = config, steps, device, ranks
        self.dtype = compute_type(config.precision, device)
        self.compiled = wants_compile(config.compile, device)
        torch.manual_seed(config.seed)
        self.encoder = Encoder(architecture_of(config)) if resumed else new_encoder(config)
        if config.checkpoint_activations:
            self.encoder.checkpoint_activations()
        self.model = EncoderWithHead(self.encoder, new_head(config.method, classes, self.encoder.num_features))
        if ranks.size > 1 and config.sync_batch_norm:
            synchronised(self.model, device)
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.train()
        self.optimizer = new_optimizer(config, self.model)
        self._norms = [each for each in self.model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        # Static shapes: a smaller last batch gets a graph of its own and leaves the other one as it is.
        self._model: Any = torch.compile(self.model, dynamic=False) if self.compiled else self.model
        self._ddp: DistributedDataParallel | None = None
        loss = new_loss(config, gather_distributed=ranks.size > 1)
        self._loss: Any = torch.compile(loss, dynamic=False) if self.compiled else loss
        self.epoch = self.step = 0
        self._loss_sum = torch.zeros((), device=device)
        self.clock = EpochClock(device)

    def connect(self) -> None:
        """Let the ranks average their gradients from now on; all start from the weights of rank 0."""
        if self.ranks.size == 1:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `broadcast_buffers` has a new name in new versions
            # Statistics of batch-norm are either the same on all ranks or each rank's own.
            self._ddp = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        # The wrapped network is compiled, so that gradients travel while others are computed.
        self._model = torch.compile(self._ddp, dynamic=False) if self.compiled else self._ddp

    def embed(self, views: Tensor) -> Tensor:
        """The float32 embeddings (V, D) of views, or their logits; float64 ones of a float64 network."""
        mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with tuned_convolutions(self.config.deterministic), mixed:
            embeddings: Tensor = self._model(views)
        return embeddings if embeddings.dtype == torch.float64 else embeddings.float()

    def loss_of(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """The loss of a whole batch, on all ranks: a float32 scalar that stays on the device."""
        labels = batch.targets if self.config.method == "supervised" else batch.labels
        loss: Tensor = self._loss(embeddings, labels, batch.counts or None)
        return loss

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch: a float32 scalar that stays on the device."""
        self._seed(0)
        return self.loss_of(self.embed(batch.views), batch)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        with tuned_convolutions(self.config.deterministic):
            self._scaler.scale(loss).backward()

    def forward_backward(self, batch: Batch, micro_batch: int | None = None) -> Tensor:
        """The loss of a batch, its gradients added to the parameters'; `micro_batch` replaces that of the settings.

        In micro-batches, first all embeddings are computed without keeping activations, then the loss and its gradient
        at the embeddings; then each micro-batch again, backwards from that gradient (GradCache, Gao et al. 2021). Loss
        and gradients are those of the whole batch, except that batch-norm sees a micro-batch.
        """
        micro_batch = micro_batch or self.config.micro_batch
        images = sum(batch.counts) or len(batch.ids)
        if micro_batch is None or micro_batch >= images:
            loss = self.forward(batch)
            self.backward(loss)
            return loss.detach()
        rows = micro_batches(images, micro_batch, self.config.views, self.ranks)
        views = [batch.views[each].contiguous(memory_format=torch.channels_last) for each in rows]
        embeddings = torch.empty(0)
        with torch.no_grad(), self._statistics_kept():
            for number, each in enumerate(rows):
                self._seed(number)
                embedded = self.embed(views[number])
                if not number:
                    embeddings = embedded.new_empty(len(batch.views), embedded.shape[1])
                embeddings[each] = embedded
        loss = self.loss_of(embeddings.requires_grad_(), batch)
        self.backward(loss)
        assert embeddings.grad is not None
        for number, each in enumerate(rows):
            self._seed(number)
            with self._gradients_kept() if number < len(rows) - 1 else nullcontext():
                embedded = self.embed(views[number])
                with tuned_convolutions(self.config.deterministic):
                    embedded.backward(embeddings.grad[each])
        return loss.detach()

    def _gradients_kept(self) -> AbstractContextManager[None]:
        """Each rank keeps its gradients: they are averaged once, with those of the last micro-batch."""
        return self._ddp.no_sync() if self._ddp else nullcontext()

    def largest_micro_batch(self) -> int | None:
        """The largest halving of the batch with which a step fits into memory, found by trying; None if none does.

        The state cannot be trained any further: what batch-norm has gathered is changed.
        """
        images, views, size = self.config.batch_size, self.config.views, self.config.image_size
        assert size is not None, "the settings are resolved"
        self._model = self.model  # compiling takes longer than trying
        micro_batch = min(self.config.micro_batch or images, images)
        while (micro_batch := micro_batch // 2) >= 2:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                blank = torch.zeros(views * images, 1, size, size, dtype=self.dtype, device=self.device)
                labels = torch.ones(images, 1, dtype=torch.uint8, device=self.device)
                targets = torch.zeros(images, dtype=torch.int64, device=self.device)
                self.forward_backward(Batch(blank, labels, targets, torch.arange(images)), micro_batch)
                return micro_batch
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
        return None

    def _seed(self, micro_batch: int) -> None:
        """Seed what the network samples while it trains, so that a resumed run and a second pass sample the same.

        Some networks sample without being asked to: a tenth of timm's have dropout or stochastic depth by default.
        """
        entropy = [self.config.seed, self.epoch, self.step, micro_batch]
        if self.ranks.rank:
            entropy.append(self.ranks.rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """Batch-norm trains, but its running statistics stay: they should move once for each image."""
        for norm in self._norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for norm in self._norms:
                norm.track_running_stats = True

    def optimise(self) -> None:
        """Update the weights with the learning rate of the current step."""
        rate = rate_at(self.config, self.epoch * self.steps + self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.config.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, batch: Batch) -> None:
        """Train one step on a batch."""
        loss = self.forward_backward(batch)
        self.optimise()
        self._loss_sum += loss
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
        """The numbers of the current epoch so far, of a set of `samples` images; this synchronises.

        They are those of all ranks together; `wait_share` is that of the rank that waited longest.
        """
        seconds = self.clock.seconds
        images = min(self.step * self.config.batch_size, samples)
        return {
            "loss": self.loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "views_per_second": round(images * self.config.views / seconds, 1),
            "wait_share": round(self.ranks.highest([self.clock.wait_share])[0], 4),
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


def batches(rows: Tensor, size: int) -> list[Tensor]:
    """`rows` in batches of `size`; the last one may be smaller, but a single row joins the batch before it.

    The last feature map of a small image is one pixel, and batch-norm cannot train on one value per channel.
    """
    found = list(rows.split(size))
    if len(found) > 1 and len(found[-1]) == 1:
        found[-2:] = [torch.cat(found[-2:])]
    return found


def micro_batches(images: int, size: int, views: int, ranks: Ranks = ONE) -> list[Tensor]:
    """The rows of all views of `size` images at a time, as `batches` divides the images of all ranks.

    They are rows of this rank's views: it has every image whose number leaves its rank when divided by their number.
    """
    own = ranks.share(images)
    parts = [part[part % ranks.size == ranks.rank] // ranks.size for part in batches(torch.arange(images), size)]
    return [torch.cat([part + view * own for view in range(views)]) for part in parts]


def architecture_of(config: PretrainConfig) -> Architecture:
    """The network that a run trains. Raises `InputError` if there is none of that name."""
    values: dict[str, Any] = {"stem": config.stem, "drop_path": config.drop_path}
    if config.normalize:
        return published_architecture(config.encoder, image_size=config.image_size, **values)
    return Architecture.of(config.encoder, channels=config.channels, image_size=config.image_size, **values)


def new_encoder(config: PretrainConfig) -> Encoder:
    """The encoder that a run starts from: random, or with the weights that it names.

    Raises `InputError` if there are no such weights, or if they are of another network.
    """
    architecture = architecture_of(config)
    if config.start_from == "imagenet":
        return imagenet_encoder(config.imagenet_weights, architecture, sum_filters=config.sum_filters)
    encoder = Encoder(architecture)
    if config.init_from is not None:
        given = load_encoder(config.init_from, normalize=config.normalize, grey=config.channels == 1)
        if config.image_size:
            given = given.resized(config.image_size)
        if (found := replace(given.architecture, drop_path=config.drop_path)) != architecture:
            raise InputError(
                f"`init_from={config.init_from}` is a {described(found)}, and the run's encoder a "
                f"{described(architecture)}: change `encoder`, `stem`, `channels` or `normalize`"
            )
        encoder.load_weights(given.weights)
    return encoder


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


def new_loss(config: PretrainConfig, *, gather_distributed: bool = False) -> nn.Module:
    """The loss of a method, called with embeddings and labels, or with logits and targets for `supervised`.

    `gather_distributed` makes it the loss of the images of all ranks.
    """
    ranks = {"gather_distributed": gather_distributed}
    losses: dict[str, Callable[[], nn.Module]] = {
        "mulsupcon": lambda: MulSupConLoss(config.temperature, config.threshold, config.instance_weight, **ranks),
        "supcon": lambda: SupConLoss(config.temperature, config.instance_weight, **ranks),
        "simclr": lambda: NTXentLoss(config.temperature, **ranks),
        "supervised": lambda: ClassificationLoss(**ranks),
    }
    return losses[config.method]()


def new_optimizer(config: PretrainConfig, model: EncoderWithHead) -> torch.optim.Optimizer:
    """The optimiser of a run, fused on a GPU: the loss scaler reads a value back at each step of any other."""
    groups: Any = list(model.parameters())
    fused = groups[0].is_cuda
    if not config.decay_all:
        kept = {id(each) for each in _not_decayed(model)}
        groups = [
            {"params": [each for each in groups if id(each) not in kept]},
            {"params": [each for each in groups if id(each) in kept], "weight_decay": 0.0},
        ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, config.momentum, weight_decay=config.weight_decay, fused=fused)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, config.lr, weight_decay=config.weight_decay, fused=fused)


def _not_decayed(model: EncoderWithHead) -> Iterator[nn.Parameter]:
    """Norms and biases, which have one axis, and what the network itself names, such as a ViT's positions."""
    named = model.encoder.not_decayed
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1 or name.removeprefix("encoder.network.") in named:
            yield parameter


def lr_at(step: int, *, peak: float, start: float, warmup: int, milestones: Iterable[int]) -> float:
    """Learning rate of a step: linear from `start` to `peak` over `warmup` steps, a tenth from each milestone on."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return peak * math.prod(0.1 for milestone in milestones if step >= milestone)


def cosine_lr_at(epoch: float, *, peak: float, epochs: float) -> float:
    """Learning rate of an epoch, from 0: from `peak` along half a cosine towards 0 (SGDR, Eq. 5, no restarts)."""
    return peak * (1 + math.cos(math.pi * epoch / epochs)) / 2


def rate_at(config: PretrainConfig, step: int, steps: int) -> float:
    """Learning rate of a step, counted from the start of the run, with `steps` steps an epoch.

    The milestones of `config` must be epochs, as in `PretrainConfig.resolved`.
    """
    warmup_epochs = 0 if config.schedule == "cosine" else config.warmup_epochs
    warmup = warmup_epochs * steps
    if config.schedule != "steps" and step >= warmup:
        return cosine_lr_at(step // steps - warmup_epochs, peak=config.lr, epochs=config.epochs - warmup_epochs)
    return lr_at(
        step,
        peak=config.lr,
        start=min(config.warmup_from, config.lr),
        warmup=warmup,
        milestones=[int(epoch) * steps for epoch in config.milestones],
    )
