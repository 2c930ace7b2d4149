"""The doctor names what matters on a machine, and what follows from it."""

import torch

from modan_fast.doctor import examine


def test_the_examination_names_what_matters():
    found, follows = examine()
    assert {"Python", "memory", "torch", "NVIDIA driver", "DALI", "C++ compiler"} <= {name for name, _ in found}
    assert dict(found)["torch"].startswith(torch.__version__)
    assert any("training runs on" in line for line in follows)
