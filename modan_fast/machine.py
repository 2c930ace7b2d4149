"""What the machine offers, where and in which type to train on it, and why torch sees no GPU where there is one."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from modan_fast import __version__
from modan_fast.decode import dali_installed
from modan_fast.store import GPU_SHARE, HOST_SHARE
from shard_builder.settings import InputError, usable_cores

log = logging.getLogger(__name__)

REMEDY = "uv pip install 'torch==2.10.*' 'torchvision==0.25.*'"


def pick_device(name: str) -> torch.device:
    """The device that `name` stands for; `auto` is the GPU where torch can use one.

    Says so where there is a GPU that torch cannot use, and raises `InputError` where just that was asked for.
    """
    problem = None if torch.cuda.is_available() else unusable_gpu()
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: {problem or 'this machine has no NVIDIA GPU: leave the option out'}")
    if name == "auto" and problem:
        log.warning("the CPU is used: %s", problem)
    on_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def compute_type(precision: str, device: torch.device) -> torch.dtype:
    """The type that `precision` names; `auto` is bf16 from Ampere on, fp16 on older GPUs, float32 on CPUs."""
    named = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision != "auto":
        if device.type == "cpu" and precision != "float32":
            log.warning("most CPUs only emulate %s, which takes many times as long as float32", precision)
        return named[precision]
    if device.type != "cuda":
        return torch.float32  # bf16 is emulated on most CPUs, and far slower
    # Asked without emulation, because torch reports bf16 for GPUs that only emulate it.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory taken so far, in GiB: `peak_host_gib` by this process, and on a GPU `peak_gpu_gib` by all.

    Torch's and DALI's pools keep what they once took on a GPU, so what is taken now is the most so far.
    """
    if sys.platform == "win32":
        host = psutil.Process().memory_info().peak_wset
    else:
        import resource  # Unix only

        unit = 1 if sys.platform == "darwin" else 1024
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = {"peak_host_gib": host}
    if device.type == "cuda":
        free, size = torch.cuda.mem_get_info(device)
        found["peak_gpu_gib"] = size - free
    return {name: round(value / 2**30, 3) for name, value in found.items()}


def driver_cuda() -> int | None:
    """The newest CUDA that the NVIDIA driver serves, as 1000 × major + 10 × minor; None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
        found = ctypes.c_int()
        return found.value if driver.cuDriverGetVersion(ctypes.byref(found)) == 0 else None
    except OSError:
        return None


def gpu_problem(
    driver: int | None, torch_cuda: str | None, torch_sees_it: bool, visible: str | None
) -> str | None:
    """Why torch cannot use the GPU of a machine that has a driver, and the remedy; None where all is well.

    `driver` is as `driver_cuda` gives it, `torch_cuda` the CUDA that torch was built for, such as `13.2`,
    `visible` the variable CUDA_VISIBLE_DEVICES.
    """
    if driver is None or torch_sees_it:
        return None
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU: unset it to use one"
    if torch_cuda is None:
        return (
            "there is an NVIDIA driver, but this torch is built without CUDA: install torch from its usual index"
        )
    major = driver // 1000
    if int(torch_cuda.partition(".")[0]) > major:
        knows = f"{major}.{driver % 1000 // 10}"
        remedy = f"torch 2.10 with torchvision 0.25 ({REMEDY}), or a newer driver"
        return f"the NVIDIA driver knows CUDA {knows}, this torch needs CUDA {torch_cuda}: install {remedy}"
    return "there is an NVIDIA driver, but torch finds no GPU: nvidia-smi tells whether the driver works"


def unusable_gpu() -> str | None:
    """`gpu_problem` of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpu_problem(driver_cuda(), torch.version.cuda, torch.cuda.is_available(), visible)


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def examine() -> tuple[list[tuple[str, str]], list[str]]:
    """What there is, as (name, finding), and what follows from it, as sentences."""
    memory = psutil.virtual_memory()
    driver = driver_cuda()
    found = [
        ("modan-fast", __version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("processor", f"{_processor()}, {usable_cores()} cores usable"),
        ("memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}"),
        (
            "torch",
            f"{torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'}",
        ),
        ("NVIDIA driver", "none" if driver is None else f"for CUDA up to {driver // 1000}.{driver % 1000 // 10}"),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        found.append((f"GPU {index}", f"{properties.name}, {size}"))
    found += [("DALI", _dali()), ("C++ compiler", compiler() or "none")]

    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    dtype = str(compute_type("auto", device)).removeprefix("torch.")
    place = "the GPU" if on_gpu else "the CPU"
    follows = [f"training runs on {place} in {dtype}"]
    follows.append(f"views are made by {'DALI' if on_gpu and dali_installed() else 'torch'} on {place}")
    if not on_gpu:
        follows.append("nothing is compiled (it gains nothing on CPUs; --compile forces it)")
    else:
        follows.append("model and loss are compiled" if compiler() else "nothing is compiled: install g++")
    free = f"{HOST_SHARE * memory.available / 2**30:.1f} GiB in host memory"
    if on_gpu:
        free = f"{GPU_SHARE * torch.cuda.mem_get_info(device)[0] / 2**30:.1f} GiB on the GPU, else {free}"
    follows.append(f"decoded pixels may take {free}; larger sets are streamed")
    return found, follows


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _dali() -> str:
    try:
        return version("nvidia-dali-cuda120")
    except PackageNotFoundError:
        return "installed" if dali_installed() else "none (it is built for Linux only)"
