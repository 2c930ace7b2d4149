"""What a machine allows: a GPU that torch cannot use, a compiler that is missing, operations that repeat their bits."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.optim import Adam

from modan_fast import step
from modan_fast.devices import (
    compiler,
    compute_type,
    gpu_problem,
    is_not_deterministic,
    missing_for_compile,
    pick_device,
    python_header,
    same_bits,
    tuned_convolutions,
    wants_compile,
)
from modan_fast.recipes import pretrain_config
from modan_fast.step import TrainState
from shard_builder.settings import InputError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "sees_it", "visible", "said"),
    [
        (None, "13.2", False, None, None),
        (13000, "13.2", True, None, None),
        (
            12040,
            "13.2",
            False,
            None,
            "supports CUDA 12.4, this torch needs CUDA 13.2: install torch 2.10 with torchvision",
        ),
        (12080, None, False, None, "built without CUDA"),
        (13000, "13.2", False, "", "hides every GPU"),
        (13000, "13.2", False, None, "check the driver with nvidia-smi"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_its_remedy(driver, torch_cuda, sees_it, visible, said):
    problem = gpu_problem(driver, torch_cuda, sees_it, visible)
    assert problem is None if said is None else said in problem


def test_training_on_the_cpu_beside_such_a_gpu_is_said(monkeypatch, caplog):
    monkeypatch.setattr("modan_fast.devices.driver_cuda", lambda: 12040)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pick_device("auto").type == "cpu"
    assert "install torch 2.10 with torchvision 0.25" in caplog.text
    with pytest.raises(InputError, match="`device=cuda`: the NVIDIA driver supports CUDA 12.4"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_the_compute_type_is_what_the_gpu_computes_fast(monkeypatch, capability, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert compute_type("auto", torch.device("cuda", 0)) == expected
    assert compute_type("fp16", torch.device("cuda", 0)) == torch.float16
    assert compute_type("auto", torch.device("cpu")) == torch.float32


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose programs are those that are put into the folder it returns, and whose Python has its header."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    programs, header = tmp_path / "bin", tmp_path / "include" / "Python.h"
    programs.mkdir()
    header.parent.mkdir()
    header.touch()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(header.parent))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("modan_fast.devices.importlib.util.find_spec", lambda name: "found")
    monkeypatch.setattr("sys.platform", "linux")
    return programs


def install(folder, *names):
    for name in names:
        (folder / name).touch(0o755)


def test_with_all_that_compiling_needs_a_gpu_compiles_and_a_cpu_only_when_asked(machine, caplog):
    install(machine, "gcc", "g++")
    assert wants_compile(None, GPU)
    assert wants_compile(True, CPU)
    assert not wants_compile(None, CPU)
    assert not wants_compile(False, GPU)
    assert not caplog.text


@pytest.mark.parametrize(
    ("installed", "on_gpu", "on_cpu"),
    [
        (["g++", "gcc"], [], []),
        (["g++", "clang"], [], []),
        (["g++"], ["no C compiler (install gcc)"], []),
        (["gcc"], ["no C++ compiler (install g++)"], ["no C++ compiler (install g++)"]),
        # On Linux torch looks for g++ only.
        (["gcc", "clang++"], ["no C++ compiler (install g++)"], ["no C++ compiler (install g++)"]),
    ],
)
def test_the_compilers_that_torch_and_triton_look_for_are_looked_for(machine, installed, on_gpu, on_cpu):
    install(machine, *installed)
    assert missing_for_compile(GPU) == on_gpu
    assert missing_for_compile(CPU) == on_cpu


def test_a_compiler_that_the_environment_names_is_the_one_that_counts(machine, monkeypatch):
    install(machine, "gcc", "g++", "my-c++")
    monkeypatch.setenv("CXX", "my-c++ -O1")
    assert Path(compiler("C++")).name == "my-c++"
    monkeypatch.setenv("CC", "not-installed")
    assert compiler("C") is None
    assert missing_for_compile(GPU) == ["no C compiler (install gcc)"]


def test_all_that_is_missing_is_said_in_one_warning(machine, monkeypatch, caplog):
    python_header().unlink()
    monkeypatch.setattr("modan_fast.devices.importlib.util.find_spec", lambda name: None)
    assert not wants_compile(None, GPU)
    (record,) = caplog.records
    version = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    assert record.message == (
        f"nothing is compiled, which costs speed: no C++ compiler (install g++); no Python.h (install {version}, or "
        "use a Python that uv has installed); no C compiler (install gcc); no Triton (it comes with torch on Linux)"
    )


def test_a_gpu_too_old_for_triton_compiles_nothing(machine, monkeypatch, caplog):
    install(machine, "gcc", "g++")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (6, 1))
    assert not wants_compile(None, GPU)
    assert "a GPU that Triton does not know" in caplog.text


def test_the_header_that_is_found_is_the_one_that_compiles_an_extension(tmp_path):
    header = python_header()
    if header is None or compiler("C") is None:
        pytest.skip("this Python cannot compile extensions")
    (tmp_path / "empty.c").write_text("#include <Python.h>\n")
    subprocess.run([compiler("C"), f"-I{header.parent}", "-c", "empty.c"], cwd=tmp_path, check=True)


def settings_of_torch():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch._inductor.config.deterministic,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_same_bits_are_asked_of_a_gpu_and_the_settings_are_as_before_afterwards(monkeypatch, given):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)

    def interrupted():
        with same_bits(True, GPU):
            assert settings_of_torch() == (True, False, False, True, given or ":4096:8")
            raise KeyError("interrupted")

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings_of_torch()
        with pytest.raises(KeyError, match="interrupted"):
            interrupted()
        assert settings_of_torch() == before
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("wanted", "device"), [(False, GPU), (True, CPU)])
def test_same_bits_change_nothing_unless_wanted_and_on_a_gpu(wanted, device):
    before = settings_of_torch()
    with same_bits(wanted, device):
        assert settings_of_torch() == before


def test_an_operation_without_repeatable_bits_is_told_from_other_errors():
    with same_bits(True, GPU), pytest.raises(RuntimeError) as raised:
        # Torch refuses this one on a CPU, too.
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    assert is_not_deterministic(raised.value)
    assert not is_not_deterministic(RuntimeError("CUDA error"))


def test_convolutions_are_timed_unless_their_bits_must_repeat():
    with tuned_convolutions():
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (True, False)
    with tuned_convolutions(deterministic=True):
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_of_adam_that_was_saved_on_another_device_is_continued_as_this_device_needs_it(
    monkeypatch, fused
):
    """On a GPU Adam is fused, and torch decides by a group's `fused` where its step counter lives."""

    def state_with(fused):
        monkeypatch.setattr(
            step, "new_optimizer", lambda config, model: Adam(model.parameters(), 1e-3, fused=fused)
        )
        config = pretrain_config({"optimizer": "adam", "stem": "7x7", "warmup_epochs": 0}).resolved(32)
        return TrainState(config, classes=3, steps=10, device=CPU)

    saved, ours = state_with(not fused), state_with(fused)
    for parameter in saved.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    saved.optimise()
    ours.load_state_dict(deepcopy(saved.state_dict()))
    assert [group["fused"] for group in ours.optimizer.param_groups] == [fused]
    for state in (saved, ours):
        for parameter in state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        state.optimise()
    for mine, theirs in zip(ours.model.parameters(), saved.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert {float(each["step"]) for each in ours.optimizer.state.values()} == {2.0}
