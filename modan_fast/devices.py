"""Device, precision (bf16, fp16 or float32), compiling and memory: what a machine allows, and what is used."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from shard_builder.settings import InputError

log = logging.getLogger(__name__)

REMEDY = "uv pip install 'torch==2.10.*' 'torchvision==0.25.*'"
TYPES = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by `precision`
# Shares of the free memory that decoded pixels may take. The rest is for activations and for other programs.
GPU_SHARE, HOST_SHARE = 0.5, 0.8


def pick_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; `auto` is the GPU if torch can use one.

    Warns if there is a GPU that torch cannot use. Raises `InputError` if `cuda` was asked for and cannot be used.
    """
    problem = None if torch.cuda.is_available() else unusable_gpu()
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"`device=cuda`: {problem or 'this machine has no NVIDIA GPU: leave the setting out'}")
    if name == "auto" and problem:
        log.warning("the CPU is used: %s", problem)
    on_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The GPU's product name, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def compute_type(precision: str, device: torch.device) -> torch.dtype:
    """The dtype for `precision`; `auto` is bf16 from Ampere on, fp16 on older GPUs, float32 on CPUs."""
    if precision != "auto":
        if device.type == "cpu" and precision != "float32":
            log.warning("most CPUs only emulate %s, which takes many times as long as float32", precision)
        return TYPES[precision]
    if device.type != "cuda":
        return torch.float32  # bf16 is emulated on most CPUs, and far slower
    # Not torch.cuda.is_bf16_supported, which is also true for GPUs that only emulate it.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all work given to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tuned_convolutions(deterministic: bool = False) -> AbstractContextManager[None]:
    """Let cuDNN time its algorithms once per shape and take the fastest; for shapes that stay the same.

    If `deterministic`, it takes the same algorithm each time instead, and only one that gives the same bits.
    """
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=not deterministic, deterministic=deterministic, allow_tf32=True
    )


@contextmanager
def same_bits(wanted: bool, device: torch.device) -> Iterator[None]:
    """Within it, if `wanted`, a GPU uses only operations that give the same bits each time.

    An operation without such an implementation raises a RuntimeError, which `is_not_deterministic` knows. Beside it,
    convolutions need `tuned_convolutions(deterministic=True)`. Nothing changes on a CPU, which always gives the same
    bits. cuBLAS reads its variable when it is first used, so this must begin before any work on the GPU.
    """
    if not wanted or device.type == "cpu":
        yield
        return
    variable = "CUBLAS_WORKSPACE_CONFIG"
    before = os.environ.get(variable)
    strict = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # mypy does not see its attribute
    filled = memory.fill_uninitialized_memory
    os.environ.setdefault(variable, ":4096:8")
    # Only warned of, attention would stay as it is: strict, it changes to an algorithm that gives the same bits.
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # every value is written before it is read
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(strict, warn_only=lenient)
        if before is None:
            os.environ.pop(variable, None)


def is_not_deterministic(error: BaseException) -> bool:
    """Whether an error says that an operation cannot give the same bits each time, as `same_bits` wants."""
    return isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error)


def wants_compile(asked: bool | None, device: torch.device) -> bool:
    """Whether to compile: as `asked`, by default on GPUs only.

    Never, with a warning that says what to install, where something is missing that torch.compile needs.
    """
    if not (device.type == "cuda" if asked is None else asked):
        return False
    missing = missing_for_compile(device)
    if missing:
        log.warning("nothing is compiled, which costs speed: %s", "; ".join(missing))
    return not missing


def missing_for_compile(device: torch.device) -> list[str]:
    """What torch.compile needs and this machine lacks, each with what to install; empty if nothing is missing."""
    missing = []
    if not compiler("C++"):
        missing.append("no C++ compiler (install g++)")
    if not python_header():
        version = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        missing.append(f"no Python.h (install {version}, or use a Python that uv has installed)")
    if device.type == "cuda":
        # Triton compiles GPU code, and with a C compiler what starts it.
        if not compiler("C"):
            missing.append("no C compiler (install gcc)")
        if importlib.util.find_spec("triton") is None:
            missing.append("no Triton (it comes with torch on Linux)")
        elif torch.cuda.get_device_capability(device) < (7, 0):
            missing.append("a GPU that Triton does not know (it needs compute capability 7.0)")
    return missing


def compiler(language: str) -> str | None:
    """The compiler that torch.compile would use for `C` or `C++`, as a path, or None."""
    if language == "C++":  # as torch._inductor searches
        usual = ["clang++"] if sys.platform == "darwin" else ["cl"] if sys.platform == "win32" else ["g++"]
    else:  # as Triton does
        usual = ["gcc", "clang"]
    given = os.environ.get({"C": "CC", "C++": "CXX"}[language])
    if given is not None:
        usual = shlex.split(given)[:1]  # options may follow
    return next((path for name in usual if (path := shutil.which(name))), None)


def python_header() -> Path | None:
    """Python.h, without which no extension of Python can be compiled; None where Python came without it."""
    # Debian's own scheme differs from where its package puts the file.
    folders = [sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")]
    return next((path for folder in folders if (path := Path(folder, "Python.h")).is_file()), None)


def pixel_budget(tier: str, device: torch.device) -> tuple[float, int]:
    """Bytes that decoded pixels may take in the tier `gpu` or `host`, and the free bytes there."""
    if tier == "gpu":
        free = torch.cuda.mem_get_info(device)[0]
        return GPU_SHARE * free, free
    free = psutil.virtual_memory().available
    return HOST_SHARE * free, free


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory so far in GiB: `peak_host_gib` of this process, and on a GPU `peak_gpu_gib` of all processes.

    Torch's and DALI's memory pools on a GPU never shrink, so the memory in use is the peak.
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
    """The newest CUDA version that the NVIDIA driver supports, as 1000 × major + 10 × minor; None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
        found = ctypes.c_int()
        return found.value if driver.cuDriverGetVersion(ctypes.byref(found)) == 0 else None
    except OSError:
        return None


def gpu_problem(
    driver: int | None, torch_cuda: str | None, torch_sees_it: bool, visible: str | None
) -> str | None:
    """Why torch cannot use the GPU of a machine that has a driver, and the remedy; None if it can.

    `driver` is the result of `driver_cuda`, `torch_cuda` the CUDA version that torch was built for, such as `13.2`,
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
        supported = f"{major}.{driver % 1000 // 10}"
        remedy = f"torch 2.10 with torchvision 0.25 ({REMEDY}), or a newer driver"
        return (
            f"the NVIDIA driver supports CUDA {supported}, this torch needs CUDA {torch_cuda}: install {remedy}"
        )
    return "there is an NVIDIA driver, but torch finds no GPU: check the driver with nvidia-smi"


def unusable_gpu() -> str | None:
    """`gpu_problem` of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpu_problem(driver_cuda(), torch.version.cuda, torch.cuda.is_available(), visible)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a GPU or of the machine is used up."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
