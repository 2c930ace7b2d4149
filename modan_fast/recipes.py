"""The named recipes as data: what each sets for each pretraining method, and for the evaluation.

A row lists only what differs from the defaults in `config`. A new recipe is a word in `config.Recipe` and a row in each
of the two tables.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from modan_fast.config import EvaluateConfig, Method, PretrainConfig, PretrainRecipe, Recipe, changed

_SIMCLR = {
    "temperature": 0.1,
    "schedule": "cosine",
    "warmup_epochs": 0,
    "milestones": (),
    "drop_last": True,
}
_SUPERVISED = {
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 0.0,
    "warmup_epochs": 0,
    "milestones": (),
}
_RELEASED = {
    "stem": "7x7",
    "sum_filters": False,
    "keep": (200,),
    "drop_last": False,
    "augmentation.scale": (0.08, 1.0),
}

_VIT = {
    "encoder": "timm/vit_small_patch16_224",
    "optimizer": "adamw",
    "lr": 5e-4,
    "weight_decay": 0.05,
    "decay_all": False,
    "clip_norm": 1.0,
    "drop_path": 0.1,
    "schedule": "warmup-cosine",
    "warmup_epochs": 10,
    "warmup_from": 1e-6,
    "milestones": (),
    "epochs": 300,
}

PRETRAIN: dict[tuple[Method, PretrainRecipe], Mapping[str, Any]] = {
    ("mulsupcon", "paper"): {},
    ("supcon", "paper"): {},
    ("simclr", "paper"): _SIMCLR,
    ("supervised", "paper"): _SUPERVISED,
    ("mulsupcon", "released-code"): _RELEASED,
    ("supcon", "released-code"): _RELEASED,
    ("simclr", "released-code"): _RELEASED | _SIMCLR | {"augmentation.blur": 0.5},
    **{(method, "vit"): (_SIMCLR if method == "simclr" else {}) | _VIT for method in typing.get_args(Method)},
    ("supervised", "released-code"): _RELEASED
    | _SUPERVISED
    | {
        "start_from": "imagenet",
        "epochs": 200,
        "batch_size": 32,
        "keep": (),
        "augmentation": {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "jitter": 0.0},
    },
}

EVALUATE: dict[Recipe, Mapping[str, Any]] = {
    "paper": {},
    "released-code": {
        "probe_lr": 1e-3,
        "probe_batch_norm": "training",
        "finetune_head": "identity-except-simclr",
        "model_selection": "last-epoch",
        "stem": "7x7",
        "sum_filters": False,
        "normalize": False,
    },
}


def pretrain_config(given: Mapping[str, Any]) -> PretrainConfig:
    """The settings of the method and recipe that `given` names (by default mulsupcon, paper), changed as `given` says.

    `imagenet_weights` alone implies `start_from=imagenet`. Raises `InputError` for unknown names and wrong values.
    """
    method, recipe = given.get("method", "mulsupcon"), given.get("recipe", "paper")
    # Compared, not looked up: a file may hold a list for a word, and a list is no key.
    whole = next((row for key, row in PRETRAIN.items() if key == (method, recipe)), {})
    row = {name: value for name, value in whole.items() if name not in given}
    if given.get("imagenet_weights") and "start_from" not in given:
        row["start_from"] = "imagenet"
    return changed(PretrainConfig(), {**row, **given})


def evaluate_config(given: Mapping[str, Any]) -> EvaluateConfig:
    """The settings of the recipe that `given` names (by default paper), changed as `given` says.

    Raises `InputError` for unknown names and wrong values.
    """
    recipe = given.get("recipe", "paper")
    row = next((row for key, row in EVALUATE.items() if key == recipe), {})
    any_encoder = EvaluateConfig(init=("scratch",))
    return changed(any_encoder, {"init": (), **row, **given})
