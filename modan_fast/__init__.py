"""modan-fast: pretrain medical-image encoders from modality and anatomy labels.

Importing this package imports nothing heavy; torch is imported when a name below is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modan_fast.api import build_shards, embed, evaluate, export_encoder, pretrain, write_report
    from modan_fast.config import Augmentation
    from modan_fast.encoders import Architecture, Encoder
    from modan_fast.loader import Batch, Loader, open_loader
    from modan_fast.losses import MulSupConLoss, NTXentLoss, SupConLoss
    from modan_fast.pretrained import load_encoder
    from shard_builder.settings import InputError

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "Augmentation",
    "Batch",
    "Encoder",
    "InputError",
    "Loader",
    "MulSupConLoss",
    "NTXentLoss",
    "SupConLoss",
    "build_shards",
    "embed",
    "evaluate",
    "export_encoder",
    "load_encoder",
    "open_loader",
    "pretrain",
    "write_report",
]

_MODULES = {
    "modan_fast.api": ("build_shards", "embed", "evaluate", "export_encoder", "pretrain", "write_report"),
    "modan_fast.config": ("Augmentation",),
    "modan_fast.encoders": ("Architecture", "Encoder"),
    "modan_fast.loader": ("Batch", "Loader", "open_loader"),
    "modan_fast.losses": ("MulSupConLoss", "NTXentLoss", "SupConLoss"),
    "modan_fast.pretrained": ("load_encoder",),
    "shard_builder.settings": ("InputError",),
}


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
