"""The paper's printed numbers: AUCs and p-values of Tables 4 and 5, and times per epoch."""

from __future__ import annotations

import csv
import re
from importlib.resources import files
from typing import NamedTuple

TABLES = {"finetune": "Table 4", "probe": "Table 5"}
SECONDS = {"pretraining": 600.0, "finetune": 0.7, "probe": 0.1}  # per epoch, on a Quadro RTX 8000 at 224 px
METHODS = {
    "mulsupcon": "ModAn-MulSupCon",
    "simclr": "miniRINSimCLR",
    "supervised": "miniRIN165",
    "imagenet": "ImageNet",
    "scratch": "Scratch",
}  # by pretraining method, or by init for inits without one


class Printed(NamedTuple):
    """An AUC and a p-value as the paper prints them; the reference has no p-value."""

    auc: str
    p_value: str


def published() -> dict[tuple[str, str, str], Printed]:
    """The printed numbers by (protocol, task, method), with the paper's names of tasks and methods."""
    text = files("modan_fast.report").joinpath("paper_tables.csv").read_text(encoding="utf-8")
    return {
        (row["protocol"], row["task"], row["method"]): Printed(row["auc"], row["p_value"])
        for row in csv.DictReader(text.splitlines())
    }


def task_of(name: str) -> str | None:
    """The paper's task that is a word of a task folder's name, such as `acl` in `mrnet-acl`; None if there is none."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((task for task in ("acl", "breast", "thyroid") if task in words), None)
