"""Anybody's weights: read from a file without running code in it, checked, and matched to a network by name."""

from __future__ import annotations

import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from shard_builder.files import open_regular
from shard_builder.settings import InputError

LARGEST_FILE = 2**33  # bytes; the largest encoders in use have 4 GB
# Of buffers that no encoder needs, such as counters.
INTEGERS = {torch.int64, torch.int32, torch.uint8, torch.bool}
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

CONTAINERS = ("state_dict", "model_state_dict", "model", "teacher")  # under which a file may keep its weights
PREFIXES = ("module.", "backbone.", "encoder.", "model.", "network.", "base_encoder.", "encoder_q.")
LONGEST_PREFIX = 64  # characters
COUNT = "num_batches_tracked"  # older files lack it, and nothing here reads it
# torchvision's first DenseNets, and RadImageNet's, have `norm.1` for today's `norm1`.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


class UnusableError(ValueError):
    """A file holds no weights; the message gives the reason in our own words."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The named tensors in a .safetensors, .pth or .pt file, on the CPU. No code in the file runs.

    Raises `UnusableError` for anything else.
    """
    if not os.path.isfile(path):
        raise UnusableError("it is no file")
    if unpacked_size(path) > LARGEST_FILE:
        raise UnusableError(f"it has over {LARGEST_FILE >> 30} GiB")
    try:
        if path.suffix == ".safetensors":
            weights = safetensors.torch.load_file(path)
        else:
            # The file is mapped, so that what is not used costs no memory; old files cannot be.
            mapped = zipfile.is_zipfile(path)
            weights = tensors_in(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except UnusableError:
        raise
    # The libraries raise anything, and torch's message advises to run code from the file.
    except Exception as error:
        reason = "no safetensors file" if path.suffix == ".safetensors" else "no file of tensors alone"
        raise UnusableError(f"it is {reason}, or damaged") from error
    for name, value in weights.items():
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_neg()
        number = value.dtype in FLOATS or (name.endswith(COUNT) and value.dtype == torch.int64)
        if not (plain and value.device.type == "cpu" and (number or value.dtype in INTEGERS)):
            raise UnusableError(f"{name[:100]} is {value.dtype}, {value.layout}, {value.device}")
    return weights


def unpacked_size(path: Path) -> int:
    """The bytes of a file, or of what a zip archive unpacks to. Raises OSError for a pipe or a device."""
    open_regular(path).close()
    size = os.path.getsize(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(part.file_size for part in archive.infolist()))
    return size


def check_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise `InputError` that names the first of an encoder's weights, read from `path`, that is not finite."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise InputError(f"{path} holds weights that are not finite ({name}): its pretraining diverged")


def tensors_in(content: Any) -> dict[str, Tensor]:
    """The named tensors of a checkpoint: those at its top, or those of the first of `CONTAINERS` in it.

    Entries of other types are left out. Raises `UnusableError` if there are no tensors.
    """
    for _ in range(len(CONTAINERS)):
        if not isinstance(content, Mapping):
            break
        found = {
            name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
        }
        if found:
            return found
        content = next((content[name] for name in CONTAINERS if name in content), None)
    raise UnusableError("it holds no named tensors, at its top or under " + ", ".join(CONTAINERS))


@dataclass(frozen=True)
class Matching:
    """`weights` under a network's names; the `prefix` that was stripped; the names of the file that were `left_out`;
    the network's names that are `missing`, without those that only count batches.
    """

    weights: dict[str, Tensor]
    prefix: str
    left_out: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{len(self.weights)} tensors matched"
        if self.prefix:
            text += f", `{self.prefix}` stripped"
        if self.left_out:
            tops = sorted({name.removeprefix(self.prefix).partition(".")[0] for name in self.left_out})
            text += f", {len(self.left_out)} left out ({', '.join(tops[:5])}{', …' * (len(tops) > 5)})"
        return text


def match(weights: Mapping[str, Tensor], wanted: Iterable[str]) -> Matching:
    """Match the names in a file to the names that a network has, in the network's order.

    Known prefixes are stripped, such that most names match. Numbers in the place of a network's parts, as in
    `backbone.4.0.conv1.weight`, count them: RadImageNet's files hold an `nn.Sequential` of a network's children.
    """
    names = list(wanted)
    best: dict[str, str] = {}
    prefix = ""
    for candidate in sorted(_prefixes(weights), key=len):
        inner = {name[len(candidate) :]: name for name in weights if name.startswith(candidate)}
        inner = {OLD_DENSENET.sub(r"\1\2", name): source for name, source in inner.items()}
        for renamed in (inner, _by_position(inner, names)):
            found = {name: renamed[name] for name in names if name in renamed}
            if len(found) > len(best):
                best, prefix = found, candidate
    used = set(best.values())
    return Matching(
        {name: weights[source] for name, source in best.items()},
        prefix,
        tuple(name for name in weights if name not in used),
        tuple(name for name in names if name not in best and not name.endswith(COUNT)),
    )


def _prefixes(names: Iterable[str]) -> set[str]:
    """Every beginning of a name that consists of known prefixes; also the empty one."""
    found = {""}
    for name in names:
        taken = ""
        while len(taken) < LONGEST_PREFIX and (
            known := next((each for each in PREFIXES if name.startswith(each, len(taken))), None)
        ):
            taken += known
            found.add(taken)
    return found


def _by_position(inner: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Names that begin with the number of a child, with the name of that child instead.

    Children without weights are not in a file, and some networks lack a child that others have (Inception's auxiliary
    head), so children are compared in order by the names of their weights.
    """
    given: dict[int, dict[str, str]] = defaultdict(dict)
    for name, source in inner.items():
        place, _, rest = name.partition(".")
        if place.isdecimal() and len(place) < 4:
            given[int(place)][rest] = source
    wanted: dict[str, set[str]] = defaultdict(set)
    for name in names:
        child, _, rest = name.partition(".")
        wanted[child].add(rest)
    found: dict[str, str] = {}
    children = iter(wanted.items())
    awaited = next(children, None)
    for number in sorted(given):
        if awaited and _without_counts(given[number]) == _without_counts(awaited[1]):
            found |= {f"{awaited[0]}.{rest}": source for rest, source in given[number].items()}
            awaited = next(children, None)
    return found


def _without_counts(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.endswith(COUNT)}
