"""What is said of a GPU that torch cannot use."""

import pytest
import torch

from modan_fast.devices import compute_type, gpu_problem, pick_device
from shard_builder.settings import InputError


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
