"""A results folder with two inits, made without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from modan_fast.downstream.results import COLUMNS, CURVE_COLUMNS


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Ten repeats of `mulsupcon` and `scratch` on a task `breast`, probed and fine-tuned; mulsupcon always wins."""
    folder = tmp_path / "results"
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines, curves = [COLUMNS], [CURVE_COLUMNS]
    for protocol in ("finetune", "probe"):
        for init, shift in (("mulsupcon", 1.5), ("scratch", 0.0)):
            for repeat in range(1, 11):
                for fold in range(1, 6):
                    key = ("breast", init, "paper", protocol, repeat, fold)
                    curves += [(*key, epoch, 1 / epoch) for epoch in (1, 2, 3)]
                    for image in range(12):
                        label = image % 2
                        score = 1 / (1 + np.exp(-generator.normal(shift * (2 * label - 1), 0.8)))
                        lines.append((*key, f"images/{fold}-{image}.png", label, round(float(score), 6)))
    for name, rows in (("predictions.csv", lines), ("curves.csv", curves)):
        (folder / name).write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    runs = {
        "format": 1,
        "settings": {"paper": {"image_size": 32, "epochs": 3, "stem": "7x7"}},
        "tasks": {"breast": {"path": "breast", "sha256": "0" * 64, "images": 60, "positive": "malignant"}},
        "inits": {
            "mulsupcon": {
                "kind": "encoder",
                "method": "mulsupcon",
                "path": "gone/encoder.safetensors",
                "sha256": "1" * 64,
            },
            "scratch": {"kind": "scratch"},
        },
        "times": [
            {
                **{"task": "breast", "init": "scratch", "recipe": "paper", "protocol": "probe", "device": "CPU"},
                **{"cells": 50, "images": 1500, "seconds": 3.0, "seconds_per_epoch": 0.02},
            }
        ],
        "versions": {"modan_fast": "0"},
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    return folder
