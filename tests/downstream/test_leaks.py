from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from modan_fast.downstream.leaks import Leak, describe, find_leaks, read_leaks, update_leaks
from modan_fast.downstream.tasks import read_task

MakeTask = Callable[..., Path]


def test_leaks_are_found_by_bytes_and_by_a_patient_column(make_task: MakeTask) -> None:
    folder = make_task()
    assert find_leaks(read_task(folder)) == []
    for path in (folder / "dataframe").iterdir():
        head, *rows = path.read_text().splitlines()
        # Images 0 and 6 are of one patient, the others of one each.
        rows = [f"{row},{row[7:10].replace('006', '000')}" for row in rows]
        path.write_text("\n".join([f"{head},patient", *rows]) + "\n")
    # Fold 1 tests image 0 and trains on image 6; fold 4 tests image 6 and trains on image 0.
    assert find_leaks(read_task(folder, group="patient")) == [
        Leak(1, "patient", "images/000.png", "images/006.png"),
        Leak(4, "patient", "images/006.png", "images/000.png"),
    ]
    (folder / "images" / "006.png").write_bytes((folder / "images" / "000.png").read_bytes())
    found = find_leaks(read_task(folder))
    assert {leak.shared for leak in found} == {"bytes"}
    assert describe(found).endswith(": 2 by the same bytes"), "patients are unknown here"


def test_a_list_of_leaks_is_read_back_and_removed_with_the_last_leak(make_task: MakeTask, tmp_path: Path) -> None:
    folder, path = make_task(), tmp_path / "leaks.csv"
    image = folder / "images" / "006.png"
    before = image.read_bytes()
    image.write_bytes((folder / "images" / "000.png").read_bytes())
    found = update_leaks(read_task(folder), path)
    assert read_leaks(path) == sorted(found) != []
    image.write_bytes(before)
    assert update_leaks(read_task(folder), path) == []
    assert not path.exists()
