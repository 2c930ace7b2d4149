"""Options, timing in turns, and results as JSON and Markdown with the machine and the versions."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from modan_fast.devices import device_name, synchronise
from modan_fast.doctor import examine
from modan_fast.folder import write_json, write_text
from modan_fast.run import versions
from shard_builder.settings import usable_cores

LOAD = os.getloadavg()[0]  # shows whether others used the machine


def options(doc: str | None, *, device: bool = True) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark, described by the first line of its docstring `doc`.

    Without `device` it has no `--device`.
    """
    parser = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each candidate")
    if device:
        parser.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any"
        )
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder to write the results to")
    return parser


def positive(text: str) -> int:
    """The argparse type of a count."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def timed(work: Callable[[], object], device: torch.device, *, times: int = 1, warm_up: int = 0) -> list[float]:
    """Seconds of each of `times` calls, after `warm_up` calls that are not timed."""
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(times):
        synchronise(device)
        begun = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - begun)
    return seconds


def in_turn(
    candidates: Mapping[str, Callable[[], Sequence[float]]], rounds: int, unit: str
) -> dict[str, list[float]]:
    """Measure all candidates in each round, so that other load on the machine affects all of them.

    A candidate warms up in each turn, then returns its measurements.
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
    ratios: Iterable[tuple[str, str]] = (),
    notes: Sequence[str],
    arguments: argparse.Namespace,
    device: torch.device,
    variant: str = "",
) -> None:
    """Print a table of the measurements and write it to the results folder, as JSON and Markdown.

    `ratios` are pairs of candidates; the medians of each pair are divided. The files are named after the benchmark, its
    `variant` and the device; older ones of the same name are replaced.
    """
    summary = {
        name: {"median": median(values), "lowest": min(values), "highest": max(values)}
        for name, values in measured.items()
    }
    quotients = {
        f"{one} / {other}, of medians": summary[one]["median"] / summary[other]["median"] for one, other in ratios
    }
    machine, used = _machine_and_versions(device)
    date, command = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), _command(benchmark)
    settings = {
        name: value.name if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name != "results"
    }
    lines = [f"{date}: `{command}`", "", _listed(machine), "", _listed(used), ""]
    lines += _table(
        ["", f"median, {unit}", "lowest", "highest", "timings"],
        [[name, *map(_figure, summary[name].values()), str(len(values))] for name, values in measured.items()],
    )
    lines += ["", *(f"- **{_figure(ratio)} ×**: {name}" for name, ratio in quotients.items())]
    lines += [f"- {note}" for note in notes]
    markdown = "\n".join(lines) + "\n"
    print("\n" + markdown)
    hardware = device_name(device) if device.type == "cuda" else f"cpu {usable_cores()} cores"
    name = "-".join(filter(None, [benchmark, variant, re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")]))
    write_json(
        arguments.results / f"{name}.json",
        {
            "benchmark": benchmark,
            "date": date,
            "command": command,
            "settings": settings,
            "machine": machine,
            "versions": used,
            "unit": unit,
            "measured": {name: {**summary[name], "values": list(values)} for name, values in measured.items()},
            "ratios": quotients,
            "notes": list(notes),
        },
    )
    write_text(arguments.results / f"{name}.md", f"# {benchmark}\n\n{markdown}")
    print(f"written to {name}.json and .md", file=sys.stderr)


def _machine_and_versions(device: torch.device) -> tuple[dict[str, str], dict[str, str]]:
    """The machine, without its host name, and the versions of the packages that the figures depend on."""
    findings = dict(examine()[0])
    machine = {
        "processor": findings["processor"],
        "memory": findings["memory"],
        "GPU": findings[f"GPU {device.index}"] if device.type == "cuda" else "none used",
        "load": f"{LOAD:.1f} before the start",
    }
    used = {**versions(), "torch": findings["torch"]}  # with the CUDA version
    return machine, used | {name: version(name) for name in ("webdataset", "pillow")}


def _command(benchmark: str) -> str:
    """The command line, with only the last component of each path."""
    words = [re.sub(r"[^=]*/", "", argument.rstrip("/")) for argument in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{benchmark}.py", *words])


def _listed(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table with its columns padded, to be readable in a terminal."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        figures = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *figures]) + " |"

    rule = [width * "-" for width in widths]
    return [line(head), line([rule[0], *(dashes[:-1] + ":" for dashes in rule[1:])]), *map(line, rows)]
