"""Names that shells and formats trip over: the whole path from an archive to a report, with each in every place."""

import os
import shutil

import pytest

NAMES = {
    "spaces": " a  b ",
    "a line end": "a\nb",
    "percent and braces": "100%s{0}{}%d",
    "brackets and stars": "[a]*?[!b]",
    "a leading dash": "-rf",
    "quotes": "\"a'b`$(touch x)",
    "markup": "[bold red]<b>&amp;",
    "no UTF-8": os.fsdecode(b"a\xff\xfe"),
    "an escape": "a\x1b[31mb",
    "another script": "Röntgen 影像",
}


NOT_FOR_TABLES = (
    "a line end",
    "no UTF-8",
    "an escape",
)  # no task, no image of a task and no init can have such a name
QUICK = ("a line end", "a leading dash")


def marked(name):
    marks = [pytest.mark.slow] * (name not in QUICK)
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", map(marked, NAMES))
def test_a_name_is_no_hindrance_anywhere(made, start, fail, tmp_path, name):
    odd = NAMES[name]
    task, init = ("task", "init") if name in NOT_FOR_TABLES else (odd, f"{odd}-run")
    top = tmp_path / odd
    top.mkdir()
    for number, folder in enumerate(sorted({image.parent for image in made.archive.rglob("*.png")})):
        shutil.copytree(folder, top / "archive" / odd / odd / f"{odd}{number}")
    for folder in sorted((made.folder / "task").iterdir()):
        shutil.copytree(folder, top / task / (folder.name if name in NOT_FOR_TABLES else odd + folder.name))
    small = ("--epochs", "1", "--batch-size", "4", "--image-size", "32", "--stem", "7x7", "--device", "cpu")
    said = ""
    for words in (
        ("shard", "archive", "--size", "32", "--workers", "1", "--out=" + odd + "-shards"),
        (
            *("pretrain", "--method", "simclr", "--warmup-epochs", "0", "--renderer", "torch", *small),
            *(f"--shards={odd}-shards", f"--out={init}"),
        ),
        (
            *("evaluate", "--protocol", "probe", "--repeats", "1", *small, f"--task={task}"),
            *(f"--init={init}", f"--out={odd}-results"),
        ),
        ("report", "--samples", "0", "--", odd + "-results"),
    ):
        command = start(*words, cwd=top)
        said += command.succeeds()
    assert (top / f"{odd}-results/report.html").exists()
    assert "\x1b[31m" not in said
    assert {each.name for each in top.iterdir()} == {*("archive", task, init, f"{odd}-shards", f"{odd}-results")}
    if name in NOT_FOR_TABLES:
        for folder in (task, init):
            (top / folder).rename(top / (odd + folder))
        wrong = ((odd + task, "scratch"), (task, odd + init))
        (top / task).symlink_to(top / (odd + task))
        for judged, with_init in wrong:
            line = fail("evaluate", f"--task={judged}", f"--init={with_init}", "--out=other", cwd=top)
            assert "is no name that the tables can hold" in line
        assert not (top / "other").exists()
    assert [each.name for each in tmp_path.iterdir() if not each.name.startswith("said-")] == [odd]
