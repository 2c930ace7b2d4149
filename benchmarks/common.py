"""What the benchmarks share: options, the machine, turns between candidates, and the results they write."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import psutil
import torch

from shard_builder.settings import usable_cores

LOAD = os.getloadavg()[0]  # shows whether others used the machine
DISTRIBUTIONS = {
    "torch": "torch",
    "torchvision": "torchvision",
    "DALI": "nvidia-dali-cuda120",
    "webdataset": "webdataset",
    "Pillow": "pillow",
    "numpy": "numpy",
}


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each candidate")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder to write the results to"
    )
    return parser


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def device_of(name: str) -> torch.device:
    """The device that `--device` stands for."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", 0)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    candidates: Mapping[str, Callable[[], Sequence[float]]], rounds: int, unit: str
) -> dict[str, list[float]]:
    """Measure all candidates in each round, so that whatever disturbs the machine meets all of them.

    A candidate returns what it measured in its turn, after a warm-up of its own.
    """
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(1, rounds + 1):
        for name, measure in candidates.items():
            values = measure()
            measured[name].extend(values)
            print(
                f"round {number}/{rounds}  {name}: {_figure(median(values))} {unit}", file=sys.stderr, flush=True
            )
    return measured


def publish(
    benchmark: str,
    measured: Mapping[str, Sequence[float]],
    *,
    unit: str,
    ratios: Mapping[str, float],
    notes: Sequence[str],
    arguments: argparse.Namespace,
    device: torch.device,
    variant: str = "",
) -> None:
    """Print a table of the measured values and write it, as JSON and Markdown, beside the earlier ones.

    Results of different variants of a benchmark do not replace each other.
    """
    summary = {
        name: {"median": median(values), "lowest": min(values), "highest": max(values)}
        for name, values in measured.items()
    }
    record = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": _command(benchmark),
        "settings": {
            name: value.name if isinstance(value, Path) else value
            for name, value in vars(arguments).items()
            if name != "results"
        },
        "machine": _machine(device),
        "versions": _versions(),
        "unit": unit,
        "measured": {name: {**summary[name], "values": list(values)} for name, values in measured.items()},
        "ratios": dict(ratios),
        "notes": list(notes),
    }
    lines = [f"{record['date']}: `{record['command']}`", ""]
    lines += [_listed(_machine(device)), "", _listed(_versions()), ""]
    lines += _table(
        ["", f"median, {unit}", "lowest", "highest", "timings"],
        [[name, *map(_figure, summary[name].values()), str(len(values))] for name, values in measured.items()],
    )
    lines += ["", *(f"- **{_figure(ratio)} ×**: {name}" for name, ratio in ratios.items())]
    lines += [f"- {note}" for note in notes]
    markdown = "\n".join(lines) + "\n"
    print("\n" + markdown)
    arguments.results.mkdir(parents=True, exist_ok=True)
    place = arguments.results / "-".join(filter(None, [benchmark, variant, _host_kind(device)]))
    for suffix, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", f"# {benchmark}\n\n{markdown}")):
        beside = place.with_name(place.name + suffix + ".part")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, place.with_name(place.name + suffix))
    print(f"written to {place.name}.json and .md", file=sys.stderr)


def _machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on; it names no host."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    machine = {
        "CPU": model[1] if model else platform.processor() or platform.machine(),
        "cores": str(usable_cores()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": "none used",
        "load": f"{LOAD:.1f} before the start",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["GPU"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    return machine


def _versions() -> dict[str, str]:
    """Python's version and those of the packages that the figures depend on."""
    versions = {"Python": platform.python_version()}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            versions[name] = version(distribution)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _host_kind(device: torch.device) -> str:
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"cpu-{usable_cores()}-cores"


def _command(benchmark: str) -> str:
    """The command line; of paths only their last part."""
    given = [re.sub(r"[^=]*/", "", argument.rstrip("/")) for argument in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{benchmark}.py", *given])


def _listed(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose columns are aligned in a terminal, too."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        figures = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *figures]) + " |"

    rule = [width * "-" for width in widths]
    return [line(head), line([rule[0], *(dashes[:-1] + ":" for dashes in rule[1:])]), *map(line, rows)]
