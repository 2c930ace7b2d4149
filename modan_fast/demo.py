"""Every command in miniature on synthetic images: phantom, shard, pretrain, evaluate; with two pictures."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modan_fast.augment import view_parameters
from modan_fast.config import Augmentation
from modan_fast.downstream.evaluate import evaluate
from modan_fast.downstream.probe import apply_to_all
from modan_fast.encoders import Encoder
from modan_fast.folder import LOCK, check_writable, locked
from modan_fast.phantom import phantom_archive, phantom_plan, phantom_task
from modan_fast.pretrained import load_encoder
from modan_fast.recipes import evaluate_config, pretrain_config
from modan_fast.render import render_view
from modan_fast.report.figures import contact_sheet, embedding
from modan_fast.shards import open_shards
from modan_fast.store import read_all
from modan_fast.trainer import pretrain
from shard_builder.atomic import UNFINISHED
from shard_builder.build import build
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError, Progress, no_progress

# Two CPU cores need less than three minutes for these sizes.
SIZE, PER_CLASS, TASK_IMAGES = 64, 14, 160
PRETRAINING: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 64,
    "image_size": SIZE,
    "stem": "7x7",
    "warmup_epochs": 0,
    "lr": 0.02,
}
EVALUATION: dict[str, Any] = {"repeats": 1, "epochs": 6, "image_size": SIZE, "stem": "7x7", "lr": 1e-3}


@dataclass(frozen=True)
class Made:
    """The files and folders that the demo wrote."""

    archive: Path
    task: Path
    shards: Path
    run: Path
    results: Path
    contact_sheet: Path
    embedding: Path


def demo(out: Path, *, overwrite: bool = False, progress: Progress = no_progress) -> Made:
    """Run the demo in the folder `out`; a rerun continues where it was.

    With `overwrite` the demo's own files are made anew. Raises `InputError` if `out` holds anything else, or if another
    demo is writing to it.
    """
    parts = ("archive", "lesion", "shards", "run", "results", "views.png", "embedding.png")
    # What a stopped demo leaves of an unfinished folder.
    unfinished = re.compile(r"\.?(archive|lesion|shards|run)\..+")
    if out.exists() and (
        not out.is_dir()
        or any(path.name not in (*parts, LOCK) and not unfinished.fullmatch(path.name) for path in out.iterdir())
    ):
        raise InputError(f"{out} exists and is no folder of a demo: choose another one with `out`")
    check_writable(out)
    made = Made(*(out / part for part in parts))
    with locked(out, "demo"):
        if overwrite:
            for path in vars(made).values():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in out.iterdir():
            if re.fullmatch(rf"(archive|lesion){UNFINISHED}", path.name):
                shutil.rmtree(path)
        _make(made, progress)
    return made


def _make(made: Made, progress: Progress) -> None:
    """Do all steps of the demo that are not done."""
    if not made.archive.exists():
        phantom_archive(made.archive, per_class=PER_CLASS, size=96, classes=some_classes(), progress=progress)
    if not made.task.exists():
        phantom_task(made.task, images=TASK_IMAGES, size=96, progress=progress)
    build(made.archive, made.shards, BuildOptions(size=SIZE), progress=progress)
    settings = pretrain_config({**PRETRAINING, "shards": made.shards, "out": made.run})
    begun, saved = ((made.run / name).exists() for name in ("config.json", "checkpoint.pt"))
    pretrain(settings, resume=saved, overwrite=begun and not saved, progress=progress)
    inits = (str(made.run), "scratch")
    evaluate(evaluate_config({**EVALUATION, "task": made.task, "init": inits, "out": made.results}), progress)
    progress("figures", 0, 2, "")
    pixels, names = _pixels_and_names(made.shards)
    plot_views(made.contact_sheet, pixels, names, settings.augmentation)
    progress("figures", 1, 2, "")
    plot_embedding(made.embedding, pixels, names, made.run)
    progress("figures", 2, 2, "")


def some_classes() -> list[str]:
    """Three classes of each modality and anatomy, or all of them if there are fewer."""
    groups = defaultdict(list)
    for folder in phantom_plan(1):
        parts = folder.split("/")
        thyroid = parts[0] == "US" and parts[1].startswith("thyroid")
        groups[(parts[0], "thyroid" if thyroid else parts[1] if len(parts) == 3 else "abd")].append(folder)
    return [folder for folders in groups.values() for folder in folders[:3]]


def plot_views(path: Path, pixels: torch.Tensor, names: list[str], augmentation: Augmentation) -> None:
    """Plot an image of each modality and anatomy beside its two views in the first epoch."""
    ids = np.array([names.index(name) for name in sorted(set(names))])
    pixels = pixels[torch.from_numpy(ids)]
    columns = [pixels.numpy()]
    for view in (0, 1):
        parameters = view_parameters(augmentation, 0, 0, ids, view, pixels.shape[1])
        columns.append((255 * render_view(pixels, parameters, pixels.shape[1])[:, 0]).round().byte().numpy())
    rows = [(names[sample], [column[row] for column in columns]) for row, sample in enumerate(ids)]
    contact_sheet(path, rows, ["image", "view 1", "view 2"])


@torch.no_grad()
def plot_embedding(path: Path, pixels: torch.Tensor, names: list[str], run: Path) -> None:
    """Plot UMAPs of the images' features before and after pretraining."""
    torch.manual_seed(0)
    encoders = {"before pretraining": Encoder("7x7"), "after": load_encoder(run)}
    panels = [
        (title, apply_to_all(encoder, pixels[:, None], torch.float32).numpy())
        for title, encoder in encoders.items()
    ]
    embedding(path, panels, names)


def _pixels_and_names(shards: Path) -> tuple[torch.Tensor, list[str]]:
    """The pixels of a shard set, and the modality and anatomy of each sample."""
    opened = open_shards(shards)
    store = read_all(opened, renderer="torch", device=torch.device("cpu"), threads=1)
    bits = [name.partition("=")[2] for name in opened.manifest.labels]
    return store.pixels, [" ".join(bits[bit] for bit in row.nonzero()[:, 0].tolist()) for row in store.labels]
