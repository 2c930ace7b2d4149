"""Tiny downstream tasks, and encoders for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from modan_fast.encoders import Architecture, Encoder


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task of `count` images, image i of class i % 2; the classes differ in brightness if `separable`.

    The folds differ in size: fold f tests the images with i // 2 % 5 == f - 1 and validates on the next fold's.
    """

    def make(
        name: str = "nodule",
        count: int = 43,
        separable: bool = True,
        columns: str = "filename,label",
        words: tuple[str, ...] = ("benign", "malignant"),
        prefix: str = "nodule_",
    ) -> Path:
        folder = tmp_path / name
        (folder / "dataframe").mkdir(parents=True)
        (folder / "images").mkdir()
        noise = np.random.default_rng(0).integers(0, 100, (count, 40, 36), dtype=np.uint8)
        for index in range(count):
            pixels = noise[index] + 120 * (separable and index % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{index:03}.png")
        part = np.arange(count) // 2 % 5
        for fold in range(5):
            chosen = {"test": part == fold, "val": part == (fold + 1) % 5}
            chosen["train"] = ~chosen["test"] & ~chosen["val"]
            for split, rows in chosen.items():
                lines = [f"images/{index:03}.png,{words[index % len(words)]}" for index in np.flatnonzero(rows)]
                path = folder / "dataframe" / f"{prefix}{split}_fold{fold + 1}.csv"
                path.write_text("\n".join([columns, *lines]) + "\n")
        return folder

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder with an encoder of random weights, whose batch-norm has seen images of any brightness.

    Without these statistics the few steps of a test would not do: those of a fresh encoder lag behind.
    """

    def make(name: str, seed: int = 1, channels: int = 1) -> Path:
        torch.manual_seed(seed)
        run = tmp_path / name
        run.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(Architecture(stem="7x7", channels=channels))
        with torch.no_grad():
            for _ in range(20):
                encoder.network(torch.rand(16, 1, 1, 1) * torch.rand(16, channels, 32, 32))
        save_file(encoder.weights, run / "encoder.safetensors")
        return run

    return make
