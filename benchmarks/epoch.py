"""How long is an epoch, from the published style of training to the ceiling, when one thing at a time is changed?

The published rung decodes with Pillow in the training process, looks every label up by scanning a table of file
names, and compares the label sets of all pairs of images in a Python loop. The ceiling is the last rung's step on one
batch that never changes, so that no data is needed. An epoch is scaled from the steps that were timed.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import device_of, in_turn, options, positive, publish, synchronise
from loader import augmented, members, shards_or_made
from loss import published_loss
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from modan_fast import models
from modan_fast.config import PretrainConfig
from modan_fast.loader import Batch, open_loader
from modan_fast.losses import MulSupConLoss
from modan_fast.machine import compute_type, peak_memory
from modan_fast.pretrain import EpochClock
from modan_fast.shards import ShardSet
from modan_fast.step import Step, tuned_convolutions
from shard_builder.settings import usable_cores

WARM_UP = 2  # steps before those that are timed

Update = Callable[[Batch], Tensor]


@dataclass
class Rung:
    """Batches from `open` and what is done with one; `steps` of them are timed in a turn, after `warm_up`.

    `gpu_gib` is the most memory that torch held on a GPU in a turn, this rung's and that of what others keep.
    """

    title: str
    open: Callable[[], Iterator[Batch]]
    update: Callable[[], Update]
    steps: int
    warm_up: int = WARM_UP
    waits: list[float] = field(default_factory=list)
    gpu_gib: float = 0.0


class Files(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Two views and the labels of each image file, as the published code reads them."""

    def __init__(self, files: list[Path], table: list[tuple[str, bytes]], size: int) -> None:
        self.files, self.table = files, table
        self.transform = augmented(transforms, size, transforms.ToTensor(), published=True)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        path = self.files[index]
        image = Image.open(path).convert("L")
        bits = next(bits for name, bits in self.table if name == path.name)
        return self.transform(image), self.transform(image), torch.tensor(list(bits), dtype=torch.uint8)


def extract(shards: ShardSet, folder: Path) -> tuple[list[Path], list[tuple[str, bytes]]]:
    """The images as files in `folder`, and the table of their names and labels."""
    table = []
    for name, content in members(shards):
        stem, _, kind = name.partition(".")
        if kind == "png":
            (folder / name).write_bytes(content)
        elif kind == "labels":
            table.append((f"{stem}.png", content))
    return sorted(folder.iterdir()), table


def file_batches(files: Files, batch_size: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """Batches of a torch DataLoader, epoch after epoch."""
    loader = DataLoader(
        files,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    for _ in itertools.count():
        for first, second, labels in loader:
            views = torch.cat([first, second]).to(device, non_blocking=True)
            there = labels.to(device, non_blocking=True)
            yield Batch(views, there, there[:, 0].long(), torch.empty(0, dtype=torch.int64))


def usual_update(
    config: PretrainConfig, device: torch.device, loss: Callable[[Tensor, Tensor], Tensor]
) -> Update:
    """A training step as it is usually written: contiguous layout, and fp16 autocast on a GPU."""
    torch.manual_seed(0)
    model = models.Pretrainee(models.encoder(config.stem), models.head(config.method, 1)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)

    def update(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        # Copied, because views of one channel count as contiguous in either layout.
        views = batch.views.clone(memory_format=torch.contiguous_format)
        with tuned_convolutions(), torch.autocast(device.type, torch.float16, enabled=on_gpu):
            embeddings = model(views)
        value = loss(embeddings.float(), batch.labels.float())
        with tuned_convolutions():
            scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        return value.detach()

    return update


def our_update(config: PretrainConfig, device: torch.device) -> Update:
    """modan-fast's training step."""
    step = Step(config, classes=1, steps=1, device=device)
    return lambda batch: step.update(batch, 0)


def turn(rung: Rung, update: Callable[[], Update], epoch: int, device: torch.device) -> list[float]:
    """One timing: the seconds of an epoch, scaled from the rung's steps."""
    batches = rung.open()
    step = update()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for batch in itertools.islice(batches, rung.warm_up):
        loss = step(batch)
    assert torch.isfinite(loss), f"{rung.title}: the loss is {loss}"
    synchronise(device)
    clock, begun = EpochClock(device), time.perf_counter()
    for batch in itertools.islice(clock.watch(batches), rung.steps):
        step(batch)
    synchronise(device)
    seconds = time.perf_counter() - begun
    rung.waits.append(clock.wait_share)
    if device.type == "cuda":
        rung.gpu_gib = max(rung.gpu_gib, torch.cuda.max_memory_reserved(device) / 2**30)
    if hasattr(batches, "close"):
        batches.close()
    return [seconds / rung.steps * epoch]


def rungs_of(arguments: Any, shards: ShardSet, scratch: Path, device: torch.device) -> list[Rung]:
    """The ladder, from the bottom up."""
    files, table = extract(shards, scratch)
    batch_size, size, steps = arguments.batch_size, arguments.image_size, arguments.steps
    data = Files(files, table, size)
    base = PretrainConfig(
        batch_size=batch_size, image_size=size, stem=arguments.stem, shards=shards.place, renderer="dali"
    )
    plain = replace(base, precision="float32", compile=False)
    quick = replace(base, compile=False)
    compiled = arguments.compile or device.type == "cuda"
    last = replace(base, compile=compiled)

    def ours(store: Any, config: PretrainConfig) -> Callable[[], Iterator[Batch]]:
        dtype = compute_type(config.precision, device)
        loader = open_loader(replace(config, store=store), shards, device=device, dtype=dtype)
        return loader.endless

    from_files = partial(file_batches, data, batch_size)
    vectorised = MulSupConLoss()
    usual = partial(usual_update, base, device, vectorised)
    kept = "gpu" if device.type == "cuda" else "host"
    published = partial(usual_update, base, device, published_loss)
    cores = usable_cores()
    rungs = [
        Rung("published style", partial(from_files, 0, device), published, arguments.slow_steps),
        Rung("+ vectorised loss", partial(from_files, 0, device), usual, arguments.slow_steps),
        # Their workers make two batches each ahead of time, which must not count as made while timed.
        Rung(f"+ {cores} workers", partial(from_files, cores, device), usual, steps, WARM_UP + 2 * cores),
        Rung("+ DALI, streaming", ours("stream", plain), usual, steps),
        Rung("+ decode-once store", ours(kept, plain), usual, steps),
        Rung("+ channels-last, own precision", ours(kept, quick), partial(our_update, quick, device), steps),
    ]
    if compiled:
        rungs.append(Rung("+ compile", rungs[-1].open, partial(our_update, last, device), steps))
    top = rungs[-1]
    batch = next(top.open())
    rungs.append(Rung("ceiling: one batch again and again", lambda: itertools.repeat(batch), top.update, steps))
    return rungs


def main() -> None:
    parser = options((__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--shards", type=Path, help="PNG shards; synthetic images if not given")
    parser.add_argument("--images-count", type=positive, default=1024, help="synthetic images to make")
    parser.add_argument("--image-size", type=positive, default=64, help="side of the views in pixels")
    parser.add_argument("--batch-size", type=positive, default=64, help="images in a batch")
    parser.add_argument("--stem", choices=("3x3", "7x7"), default="7x7", help="first convolution")
    parser.add_argument("--steps", type=positive, default=6, help="steps that a turn times")
    parser.add_argument("--slow-steps", type=positive, default=3, help="the same of the first two rungs")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU, too")
    arguments = parser.parse_args()
    device = device_of(arguments.device)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shards = shards_or_made(arguments.shards, scratch, arguments.images_count)
        if shards.manifest.codec != "png" or shards.manifest.samples < 2 * arguments.batch_size:
            parser.error("needs PNG shards, and as many images as two batches have")
        (scratch / "files").mkdir()
        rungs = rungs_of(arguments, shards, scratch / "files", device)
        epoch = shards.manifest.samples // arguments.batch_size
        # One step for all turns of a rung, because compiling takes long; the ceiling's is that of the rung below.
        updates: dict[Any, Update] = {}

        def made(rung: Rung) -> Update:
            if rung.update not in updates:
                updates[rung.update] = rung.update()
            return updates[rung.update]

        measured = in_turn(
            {rung.title: partial(turn, rung, partial(made, rung), epoch, device) for rung in rungs},
            arguments.rounds,
            "s an epoch",
        )
        samples = shards.manifest.samples
    times = {name: median(values) for name, values in measured.items()}
    ceiling, top = rungs[-1], rungs[-2]
    held = ", ".join(f"{rung.title} {rung.gpu_gib:.1f} GiB" for rung in rungs)
    gpu_notes = [f"Most that torch held on the GPU: {held}."] if device.type == "cuda" else []
    publish(
        "epoch",
        measured,
        unit="s an epoch",
        ratios={
            f"{rungs[0].title} / {top.title}, of medians": times[rungs[0].title] / times[top.title],
            f"{top.title} / {ceiling.title}, of medians": times[top.title] / times[ceiling.title],
        },
        notes=[
            f"{samples:,} images, {epoch} steps of {arguments.batch_size} images with two views of "
            f"{arguments.image_size} px, ResNet-18 with a {arguments.stem} stem. Every figure is scaled from "
            f"{arguments.steps} steps, those of the first two rungs from {arguments.slow_steps}.",
            "Share of the time that the device waited for data: "
            + ", ".join(f"{rung.title} {median(rung.waits):.1%}" for rung in rungs)
            + ".",
            f"Most memory of all rungs together: "
            f"{', '.join(f'{name} {value:.1f}' for name, value in peak_memory(device).items())}.",
            *gpu_notes,
        ],
        arguments=arguments,
        device=device,
        variant=arguments.stem,
    )


if __name__ == "__main__":
    main()
