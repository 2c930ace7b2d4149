"""Results folders made without training: a small one of two inits, and one with everything that there may be."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np
import pytest

from modan_fast.downstream.results import COLUMNS, CONVERGENCE_COLUMNS, CURVE_COLUMNS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<!doctype html><meta charset="utf-8"><body><iframe style="width:{width}px;height:900px;border:0"
srcdoc="{page}"></iframe><script>
document.querySelector("iframe").onload = event => {{
  const root = event.target.contentDocument.documentElement;
  document.body.setAttribute("data-widths", root.clientWidth + " " + root.scrollWidth);
  const images = [...event.target.contentDocument.images];
  document.body.setAttribute("data-images", images.filter(image => image.naturalWidth > 0).length);
}};
</script></body>"""


@pytest.fixture
def in_browser(tmp_path: Path) -> Callable[[str, int], subprocess.CompletedProcess[str]]:
    """A function that opens a page at a width, and returns what the browser makes of it and says; skips without one."""
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")

    def in_browser(text: str, width: int) -> subprocess.CompletedProcess[str]:
        (tmp_path / "probe.html").write_text(PROBE.format(width=width, page=escape(text)))
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
        command += [
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000",
        ]
        return subprocess.run(
            [*command, (tmp_path / "probe.html").as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )

    return in_browser


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


INITS = {"mulsupcon": 1.3, "imagenet": 1.0, "scratch": 0.5}  # with how much they know
PROTOCOLS = {"finetune": 1.2, "probe": 0.6, "logistic": 1.0, "knn": 0.9}
TASKS = {
    "breast": ("binary", ["benign", "malignant"]),
    "kidney": ("multiclass", ["cyst", "normal", "stone", "tumour"]),
    "hemorrhage": ("multilabel", ["epidural", "subdural", "intraventricular"]),
}
LABELS = (1, 5, 10, 25)
FOLDS, IMAGES = 5, 60  # test images of a fold


def scored(kind: str, classes: int, known: float, generator: np.random.Generator) -> list[tuple[str, str]]:
    """Labels and scores, as predictions.csv has them, of a fold's images; the labels are the same each time."""
    truth = np.random.default_rng(classes)
    if kind == "binary":
        labels = truth.integers(0, 2, IMAGES)
        scores = 1 / (1 + np.exp(-generator.normal(known * (2 * labels - 1), 1.2)))
        return [(str(label), f"{score:.6g}") for label, score in zip(labels, scores, strict=True)]
    if kind == "multiclass":
        labels = truth.integers(0, classes, IMAGES)
        logits = generator.normal(0, 1, (IMAGES, classes)) + 1.5 * known * (labels[:, None] == range(classes))
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return [
            (str(label), " ".join(f"{score:.6g}" for score in row))
            for label, row in zip(labels, shares, strict=True)
        ]
    labels = truth.integers(0, 3, (IMAGES, classes)) // 2
    shares = 1 / (1 + np.exp(-generator.normal(known * (2 * labels - 1) - 0.3, 1.2)))
    return [
        (" ".join(map(str, label)), " ".join(f"{score:.6g}" for score in row))
        for label, row in zip(labels, shares, strict=True)
    ]


def write_grid(folder: Path, repeats: int = 3) -> Path:
    """A results folder of three encoders, three kinds of tasks and four protocols, with everything beside them.

    Few-label curves, subgroups, patients of two images, probes that did not converge, and logs with the monitor's
    numbers.
    """
    generator = np.random.default_rng(0)
    folder.mkdir()
    lines, curves, convergence = [COLUMNS], [CURVE_COLUMNS], [CONVERGENCE_COLUMNS]
    for task, (kind, classes) in TASKS.items():
        for init, knows in INITS.items():
            experiments = [(protocol, repeats, helps) for protocol, helps in PROTOCOLS.items()]
            experiments += [
                (f"{protocol}:{labels}", 3, PROTOCOLS[protocol] * (0.2 + 0.8 * labels / 30))
                for protocol in ("logistic", "knn")
                for labels in LABELS
            ]
            for protocol, times, helps in experiments:
                for repeat in range(1, times + 1):
                    for fold in range(1, FOLDS + 1):
                        key = (task, init, "paper", protocol, repeat, fold)
                        rows = scored(kind, len(classes), knows * helps, generator)
                        lines += [(*key, f"{fold}-{image}.png", *row) for image, row in enumerate(rows)]
                        if protocol in ("finetune", "probe"):
                            curves += [(*key, epoch, round(1 / epoch**knows, 4)) for epoch in range(1, 11)]
                        if protocol == "probe":
                            convergence.append((*key, 0.61, 0.62, 0.1 * repeat))
        rows = [["image", "patient", "institution", "sex"]]
        for fold in range(1, FOLDS + 1):
            for image in range(IMAGES):
                sex = ("f", "m", "")[image % 3]
                rows.append([f"{fold}-{image}.png", f"p{fold}-{image // 2}", ("north", "south")[image % 2], sex])
        (folder / f"{task}-images.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    for name, content in (("predictions", lines), ("curves", curves), ("convergence", convergence)):
        (folder / f"{name}.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in content))
    inits: dict[str, dict[str, str]] = {"imagenet": {"kind": "encoder"}, "scratch": {"kind": "scratch"}}
    run = folder.parent / f"{folder.name}-run"
    run.mkdir()
    inits = {
        "mulsupcon": {"kind": "encoder", "method": "mulsupcon", "path": str(run / "encoder.safetensors")},
        **inits,
    }
    log = []
    for epoch in range(1, 41):
        line = {"epoch": epoch, "loss": 6 / epoch**0.3, "seconds": 20.0, "views_per_second": 900.0 + epoch}
        if epoch % 5 == 0:
            numbers = {"knn_class": epoch / 60, "knn_modality": 0.9, "knn_anatomy": 0.5 + epoch / 100}
            numbers |= {"rankme": 20.0 + epoch, "alignment": 0.4, "uniformity": -2.1, "collapsed": 0.1 / epoch}
            line |= {f"monitor/{name}": number for name, number in numbers.items()}
        log.append(json.dumps(line))
    (run / "log.jsonl").write_text("\n".join(log) + "\n")
    times = {
        "recipe": "paper",
        "device": "CPU",
        "cells": 15,
        "images": 900,
        "seconds": 3.0,
        "seconds_per_epoch": 0.02,
    }
    runs = {
        "format": 1,
        "settings": {"paper": {"image_size": 32, "epochs": 10, "stem": "7x7"}},
        "tasks": {
            task: {
                "images": FOLDS * IMAGES,
                "kind": kind,
                "classes": classes,
                "subgroups": ["institution", "sex"],
            }
            for task, (kind, classes) in TASKS.items()
        },
        "inits": inits,
        "times": [
            {"task": task, "init": init, "protocol": protocol, **times}
            for task in TASKS
            for init in INITS
            for protocol in PROTOCOLS
        ],
        "versions": {"modan_fast": "0"},
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    return folder


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `write_grid`, to be read only."""
    return write_grid(tmp_path_factory.mktemp("grid") / "results")
