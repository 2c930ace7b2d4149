"""The doctor names what matters on a machine, and what follows from it."""

from types import SimpleNamespace

import torch

from modan_fast import doctor
from modan_fast.doctor import examine


def test_the_examination_names_what_matters():
    found, follows = examine()
    named = dict(found)
    assert {"Python", "memory", "torch", "NVIDIA driver", "GPUs", "NCCL", "DALI"} <= set(named)
    assert {"C compiler", "C++ compiler", "Python.h"} <= set(named)
    assert named["torch"].startswith(torch.__version__)
    assert named["GPUs"] == str(torch.cuda.device_count())
    assert any("training runs on" in line for line in follows)


def on_two_gpus(monkeypatch, tmp_path, shared):
    """Findings and consequences of a machine with two GPUs and a given size of shared memory."""
    gpu = SimpleNamespace(total_memory=80 * 2**30, major=9, minor=0, name="NVIDIA Example")
    fakes = {"is_available": True, "device_count": 2, "current_device": 0, "get_device_capability": (9, 0)}
    fakes |= {"get_device_properties": gpu, "mem_get_info": (2**36, 2**36)}
    for name, value in fakes.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    monkeypatch.setattr("psutil.disk_usage", lambda path: SimpleNamespace(total=shared))
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    found, follows = examine()
    return dict(found), "\n".join(follows)


def test_several_gpus_are_counted_and_how_to_use_them_is_said(monkeypatch, tmp_path):
    found, follows = on_two_gpus(monkeypatch, tmp_path, 2**33)
    assert found["GPUs"] == "2"
    assert found["GPU 1"] == "NVIDIA Example, 80 GiB, sm_90"
    assert "torchrun --nproc-per-node 2 -m modan_fast pretrain" in follows
    assert "is small" not in follows


def test_shared_memory_that_is_too_small_for_several_gpus_is_told_with_its_remedy(monkeypatch, tmp_path):
    found, follows = on_two_gpus(monkeypatch, tmp_path, 2**26)
    assert found["shared memory"].startswith("0.06 GiB")
    assert "docker run --shm-size=1g" in follows


def test_what_compiling_lacks_is_told_where_a_gpu_would_gain_by_it(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("modan_fast.devices.importlib.util.find_spec", lambda name: None)
    found, follows = on_two_gpus(monkeypatch, tmp_path, 2**33)
    assert (found["C compiler"], found["C++ compiler"]) == ("none", "none")
    assert "nothing is compiled: no C++ compiler (install g++)" in follows
    assert "no Triton" in follows
