"""How long is an epoch, from the published style of training to the ceiling, when one thing at a time is changed?

The published rung decodes with Pillow in the training process, looks up every label by scanning a table of file
names, and compares the label sets of all pairs of images in a Python loop. The ceiling is the last rung's step on one
batch that never changes, so no data is needed. An epoch is scaled from the steps that were timed.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from argparse import Namespace
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from common.baselines import TwoViews, augmentation, published_loss, read_file, torch_batches
from common.images import image_files, shard_set
from common.measuring import in_turn, options, positive, publish
from torch import Tensor
from torchvision import transforms

from modan_fast.config import PretrainConfig, Tier
from modan_fast.devices import peak_memory, pick_device, synchronise, tuned_convolutions
from modan_fast.loader import Batch, loader_of
from modan_fast.losses import MulSupConLoss
from modan_fast.metrics import EpochClock
from modan_fast.shards import ShardSet
from modan_fast.step import EncoderWithHead, TrainState, new_encoder, new_head
from shard_builder.settings import usable_cores

WARM_UP = 2  # steps before those that are timed

Batches = Generator[Batch, None, None]


class Training(Protocol):
    """What is measured of a training; `TrainState` is one."""

    def update(self, batch: Batch) -> None:
        """Train one step on a batch."""

    def metrics(self, samples: int) -> dict[str, float]:
        """Numbers of the training so far, among them the `loss`."""


class UsualTraining:
    """A training step as it is usually written: contiguous layout, and fp16 autocast on a GPU."""

    def __init__(
        self, config: PretrainConfig, device: torch.device, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        torch.manual_seed(config.seed)
        encoder = new_encoder(config)
        self.model = EncoderWithHead(encoder, new_head(config.method, 1, encoder.num_features)).to(device).train()
        # Not fused, as `step.new_optimizer` is on a GPU.
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        self.loss, self.device, self.on_gpu = loss, device, device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.on_gpu)
        self.last_loss = torch.zeros(())

    def update(self, batch: Batch) -> None:
        """See `Training.update`."""
        self.optimizer.zero_grad()
        # Copied, because views of one channel count as contiguous in either layout.
        views = batch.views.clone(memory_format=torch.contiguous_format)
        with tuned_convolutions(), torch.autocast(self.device.type, torch.float16, enabled=self.on_gpu):
            embeddings = self.model(views)
        loss = self.loss(embeddings.float(), batch.labels.float())
        with tuned_convolutions():
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.last_loss = loss.detach()

    def metrics(self, samples: int) -> dict[str, float]:
        """See `Training.metrics`."""
        return {"loss": self.last_loss.item()}


@dataclass
class Rung:
    """One way of training: `steps` steps of `training` on batches from `open` are timed in a turn, after `warm_up`.

    `waits` holds the share of each turn that the device waited for data. `gpu_gib` is the most memory that torch held
    on the GPU in a turn, including what other rungs keep.
    """

    title: str
    open: Callable[[], Batches]
    training: Callable[[], Training]
    steps: int
    warm_up: int = WARM_UP
    waits: list[float] = field(default_factory=list)
    gpu_gib: float = 0.0


def scanned_labels(files: list[Path], table: list[tuple[str, bytes]], index: int) -> Tensor:
    """The label bits of a file, found as in the published code by scanning a table of file names."""
    labels = next(labels for name, labels in table if name == files[index].name)
    return torch.tensor(list(labels), dtype=torch.uint8)


def file_batches(data: TwoViews, samples: int, batch_size: int, workers: int, device: torch.device) -> Batches:
    """Batches of a torch DataLoader; the loss needs neither targets nor ids."""
    for views, labels in torch_batches(data, samples, batch_size, workers, device):
        yield Batch(views, labels, labels[:, 0].long(), torch.empty(0, dtype=torch.int64))


def one_batch(batches: Batches) -> Batches:
    """The first batch, again and again."""
    batch = next(batches)
    batches.close()
    while True:
        yield batch


def turn(rung: Rung, epoch_steps: int, device: torch.device) -> list[float]:
    """One timing: the seconds of an epoch of `epoch_steps` steps, scaled from the rung's steps."""
    training = rung.training()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with closing(rung.open()) as batches:
        for batch in itertools.islice(batches, rung.warm_up):
            training.update(batch)
        loss = training.metrics(1)["loss"]
        assert math.isfinite(loss), f"{rung.title}: the loss is {loss}"
        synchronise(device)
        clock = EpochClock(device)
        for batch in itertools.islice(clock.watch(batches), rung.steps):
            training.update(batch)
        synchronise(device)
        seconds = clock.seconds
        rung.waits.append(clock.wait_share)
    if device.type == "cuda":
        rung.gpu_gib = max(rung.gpu_gib, torch.cuda.max_memory_reserved(device) / 2**30)
    return [seconds / rung.steps * epoch_steps]


def rungs_of(
    arguments: Namespace, shards: ShardSet, folder: Path, epoch_steps: int, device: torch.device
) -> list[Rung]:
    """The ladder, from the bottom up; the images are written to the new `folder` as files."""
    files, labels = image_files(shards, folder)
    table = [(path.name, bits) for path, bits in zip(files, labels, strict=True)]
    batch_size, size, steps = arguments.batch_size, arguments.image_size, arguments.steps
    transform = augmentation(transforms, size, transforms.ToTensor(), published=True)
    data = TwoViews(partial(read_file, files), transform, partial(scanned_labels, files, table))
    config = PretrainConfig(
        batch_size=batch_size, image_size=size, stem=arguments.stem, shards=shards.location, renderer="dali"
    )
    automatic = replace(config.resolved(shards.manifest.size), compile=False)
    float32 = replace(automatic, precision="float32")
    tier: Tier = "gpu" if device.type == "cuda" else "host"

    def from_files(workers: int) -> Callable[[], Batches]:
        return partial(file_batches, data, len(files), batch_size, workers, device)

    def ours(store: Tier, config: PretrainConfig) -> Callable[[], Batches]:
        return loader_of(replace(config, store=store), shards, device=device).endless

    # One training for all turns of a rung, because compiling takes long.
    def our_training(config: PretrainConfig) -> Callable[[], Training]:
        return cache(partial(TrainState, config, classes=1, steps=epoch_steps, device=device))

    published = cache(partial(UsualTraining, automatic, device, published_loss))
    usual = cache(partial(UsualTraining, automatic, device, MulSupConLoss()))
    cores = usable_cores()
    rungs = [
        Rung("published style", from_files(0), published, arguments.slow_steps),
        Rung("+ vectorised loss", from_files(0), usual, arguments.slow_steps),
        # Each worker prepares two batches ahead of time; they are used up before the timing.
        Rung(f"+ {cores} workers", from_files(cores), usual, steps, WARM_UP + 2 * cores),
        Rung("+ DALI, streaming", ours("stream", float32), usual, steps),
        Rung("+ decode-once store", ours(tier, float32), usual, steps),
        Rung("+ channels-last, own precision", ours(tier, automatic), our_training(automatic), steps),
    ]
    if arguments.compile or device.type == "cuda":
        compiled = replace(automatic, compile=True)
        rungs.append(Rung("+ compile", rungs[-1].open, our_training(compiled), steps))
    top = rungs[-1]
    return [
        *rungs,
        Rung("ceiling: one batch again and again", lambda: one_batch(top.open()), top.training, steps),
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shards", type=Path, help="PNG shards; synthetic images if not given")
    parser.add_argument("--images-count", type=positive, default=1024, help="synthetic images to make")
    parser.add_argument("--image-size", type=positive, default=64, help="side of the views in pixels")
    parser.add_argument("--batch-size", type=positive, default=64, help="images in a batch")
    parser.add_argument("--stem", choices=("3x3", "7x7"), default="7x7", help="first convolution")
    parser.add_argument("--steps", type=positive, default=6, help="steps that a turn times")
    parser.add_argument("--slow-steps", type=positive, default=3, help="the same for the first two rungs")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU, too")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        shards = shard_set(arguments.shards, Path(scratch), count=arguments.images_count)
        samples = shards.manifest.samples
        if shards.manifest.codec != "png" or samples < 2 * arguments.batch_size:
            parser.error("needs PNG shards with at least two batches of images")
        epoch_steps = samples // arguments.batch_size
        rungs = rungs_of(arguments, shards, Path(scratch, "files"), epoch_steps, device)
        measured = in_turn(
            {rung.title: partial(turn, rung, epoch_steps, device) for rung in rungs},
            arguments.rounds,
            "s an epoch",
        )
    bottom, *_, top, ceiling = (rung.title for rung in rungs)
    waits = ", ".join(f"{rung.title} {median(rung.waits):.1%}" for rung in rungs)
    peaks = ", ".join(f"{name} {value:.1f}" for name, value in peak_memory(device).items())
    held = ", ".join(f"{rung.title} {rung.gpu_gib:.1f} GiB" for rung in rungs)
    publish(
        "epoch",
        measured,
        unit="s an epoch",
        ratios=[(bottom, top), (top, ceiling)],
        notes=[
            f"{samples:,} images, {epoch_steps} steps of {arguments.batch_size} images with two views of "
            f"{arguments.image_size} px, ResNet-18 with a {arguments.stem} stem. Every figure is scaled from "
            f"{arguments.steps} steps, those of the first two rungs from {arguments.slow_steps}.",
            f"Share of the time that the device waited for data: {waits}.",
            f"Peak memory of all rungs together: {peaks}.",
            *([f"Most memory that torch held on the GPU: {held}."] if device.type == "cuda" else []),
        ],
        arguments=arguments,
        device=device,
        variant=arguments.stem,
    )


if __name__ == "__main__":
    main()
