"""What this machine offers, and what modan-fast does on it: the command `modan-fast doctor`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
import torch.distributed

from modan_fast import __version__
from modan_fast.decode import dali_installed
from modan_fast.devices import (
    compiler,
    compute_type,
    driver_cuda,
    missing_for_compile,
    pick_device,
    pixel_budget,
    python_header,
)
from shard_builder.settings import usable_cores

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Linux's folder in memory, whose size is looked at
LITTLE_SHARED_MEMORY = 2**30  # containers have 64 MiB by default, which NCCL soon fills


def examine() -> tuple[list[tuple[str, str]], list[str]]:
    """The findings as (name, finding), and as sentences what follows from them."""
    return _findings(), _consequences()


def _findings() -> list[tuple[str, str]]:
    memory = psutil.virtual_memory()
    driver = driver_cuda()
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
    found = [
        ("modan-fast", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("processor", f"{_processor()}, {usable_cores()} cores usable"),
        ("memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}"),
        ("torch", f"{torch.__version__}, built for {built_for}"),
        ("NVIDIA driver", "none" if driver is None else f"for CUDA up to {driver // 1000}.{driver % 1000 // 10}"),
    ]
    gpus = torch.cuda.device_count()
    found.append(("GPUs", str(gpus)))
    for index in range(gpus):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        found.append((f"GPU {index}", f"{properties.name}, {size}"))
    found.append(("NCCL", _nccl()))
    if (shared := _shared_memory()) is not None:
        found.append(("shared memory", f"{shared / 2**30:.2f} GiB ({SHARED_MEMORY})"))
    compilers = [(f"{language} compiler", compiler(language) or "none") for language in ("C", "C++")]
    return [*found, ("DALI", _dali()), *compilers, ("Python.h", str(python_header() or "none"))]


def _consequences() -> list[str]:
    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    dtype = str(compute_type("auto", device)).removeprefix("torch.")
    where = "the GPU" if on_gpu else "the CPU"
    missing = missing_for_compile(device)
    if not on_gpu:
        compiled = "nothing is compiled (it gains nothing on CPUs; --compile forces it)"
    else:
        compiled = f"nothing is compiled: {'; '.join(missing)}" if missing else "model and loss are compiled"
    room = f"{pixel_budget('host', device)[0] / 2**30:.1f} GiB in host memory"
    if on_gpu:
        room = f"{pixel_budget('gpu', device)[0] / 2**30:.1f} GiB on the GPU, else {room}"
    follows = [
        f"training runs on {where} in {dtype}",
        f"views are made by {'DALI' if on_gpu and dali_installed() else 'torch'} on {where}",
        compiled,
        f"decoded pixels may take {room}; larger sets are streamed",
    ]
    if (gpus := torch.cuda.device_count()) > 1:
        follows.append(f"`torchrun --nproc-per-node {gpus} -m modan_fast pretrain` trains on all {gpus} GPUs")
        shared = _shared_memory()
        if shared is not None and shared < LITTLE_SHARED_MEMORY:
            follows.append(
                f"{SHARED_MEMORY} is small for {gpus} GPUs: give the container more (docker run --shm-size=1g)"
            )
    return follows


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _nccl() -> str:
    """The library by which GPUs talk with one another."""
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return "none (training on several GPUs needs it; it comes with torch on Linux)"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _shared_memory() -> int | None:
    """Bytes that processes of this machine can share; None where there is no such folder."""
    return psutil.disk_usage(str(SHARED_MEMORY)).total if SHARED_MEMORY.is_dir() else None


def _dali() -> str:
    try:
        return version("nvidia-dali-cuda120")
    except PackageNotFoundError:
        return "installed" if dali_installed() else "none (it is built for Linux only)"
