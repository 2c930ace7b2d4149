"""convergence.csv: what is said of probes that did not converge."""

from __future__ import annotations

from pathlib import Path

import pytest

from modan_fast.downstream.convergence import read_convergence
from modan_fast.downstream.results import CONVERGENCE_COLUMNS
from modan_fast.report.tables import convergence_warning
from shard_builder.settings import InputError


def write(folder: Path, *losses: tuple[float, float, float], init: str = "scratch", end: str = "\n") -> Path:
    lines = [",".join(CONVERGENCE_COLUMNS)]
    lines += [
        f"breast,{init},paper,probe,1,{fold},{last},{before},{optimum}"
        for fold, (last, before, optimum) in enumerate(losses, start=1)
    ]
    (folder / "convergence.csv").write_text("\n".join(lines) + end)
    return folder


def test_losses_that_fall_by_over_one_percent_are_counted_and_the_distance_averaged(tmp_path: Path) -> None:
    [row] = read_convergence(write(tmp_path, (0.60, 0.61, 0.2), (0.60, 0.605, 0.1)))
    # 0.61 to 0.60 is 1.6 %, 0.605 to 0.60 is 0.8 %.
    assert (row.init, row.trainings, row.falling, row.converged) == ("scratch", 2, 1, False)
    assert (row.loss, row.optimum, row.distance) == (pytest.approx(0.6), pytest.approx(0.15), pytest.approx(0.45))
    text = convergence_warning("breast", "paper", [row])
    assert text.startswith("The probe did not converge.")
    assert "scratch 1 of 2, loss 0.600, optimum 0.150" in text


def test_a_loss_that_stands_still_far_from_the_optimum_did_not_converge(tmp_path: Path) -> None:
    [row] = read_convergence(write(tmp_path, (0.6, 0.6, 0.2)))
    assert (row.falling, row.converged) == (0, False)


def test_of_probes_that_converged_nothing_is_said(tmp_path: Path) -> None:
    [row] = read_convergence(write(tmp_path, (0.202, 0.203, 0.2)))
    assert row.converged
    assert convergence_warning("breast", "paper", [row]) == ""


def test_a_loss_that_is_no_number_did_not_converge(tmp_path: Path) -> None:
    [row] = read_convergence(write(tmp_path, (float("nan"), 0.5, 0.2), (float("inf"), float("inf"), 0.2)))
    assert (row.falling, row.converged) == (2, False)


def test_an_older_folder_has_no_such_file_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    assert read_convergence(tmp_path) == []
    [row] = read_convergence(write(tmp_path, (0.6, 0.6, 0.2), (0.6, 0.6, 0.2), end=""))
    assert row.trainings == 1


@pytest.mark.parametrize("line", ["breast,scratch,paper,probe,1,1,x,0.5,0.2\n", "a,b\n", "\x80\n"])
def test_a_damaged_file_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, (0.6, 0.6, 0.2)) / "convergence.csv"
    path.write_bytes(path.read_bytes() + line.encode("latin-1"))
    with pytest.raises(InputError, match=r"convergence\.csv is damaged .*: the same evaluation again repairs it"):
        read_convergence(tmp_path)
