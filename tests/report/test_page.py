from __future__ import annotations

import json
import re
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from PIL import Image

from modan_fast.config import ReportConfig
from modan_fast.report.page import write_report
from shard_builder.settings import InputError

PLAIN = ReportConfig(samples=0)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_the_page_holds_everything_and_needs_nothing_else(results: Path) -> None:
    text = write_report(results, PLAIN).read_text()
    assert re.findall(r"(?:src|href)=\"(?!#|data:)", text) == []
    assert "url(" not in text
    assert "@import" not in text
    for wanted in (
        "Table 4: fine-tuning",
        "Table 5: linear probing",
        "noise of training",
        "0.926",
        "Holm",
        "at least 0.5",
    ):
        assert wanted in text
    assert text.count("<img ") == len(list((results / "figures").iterdir())) == 4
    assert {path.suffix for path in (results / "tables").iterdir()} == {".md", ".csv", ".tex"}


def test_the_same_results_give_the_same_bytes(results: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(results, replace(PLAIN, out=tmp_path / name))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_the_umap_shows_the_pretraining_images_of_each_init_that_is_left(
    results: Path, shards: Path, tmp_path: Path
) -> None:
    text = write_report(results, ReportConfig(shards=shards, samples=20, device="cpu")).read_text()
    assert "Penultimate features of 20 pretraining images" in text
    assert "Without a panel: mulsupcon: gone/encoder.safetensors is gone or has changed" in text
    assert min(Image.open(results / "figures" / "umap.png").size) > 300
    assert "name one with `shards`" in write_report(results, ReportConfig(samples=20)).read_text()
    assert not (results / "figures" / "umap.png").exists(), "a figure that the page does not show"
    with pytest.raises(InputError, match="nowhere"):
        write_report(results, ReportConfig(shards=tmp_path / "nowhere"))


def test_a_recorded_url_of_a_shard_set_is_not_opened(results: Path, tmp_path: Path) -> None:
    run, opened = tmp_path / "run", tmp_path / "opened"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"settings": {"shards": f"pipe:touch {opened} {{}}"}}))
    runs = json.loads((results / "runs.json").read_text())
    runs["inits"]["mulsupcon"] |= {"path": str(run / "encoder.safetensors"), "shards": {"fingerprint": "0" * 64}}
    (results / "runs.json").write_text(json.dumps(runs))
    text = write_report(results, ReportConfig(samples=20, device="cpu")).read_text()
    assert "No UMAP" in text
    assert "name the shard set with `shards`" in text
    assert not opened.exists()


def test_names_cannot_break_the_page(results: Path) -> None:
    evil = "<script>alert(1)</script>"
    for name in ("predictions.csv", "runs.json", "curves.csv"):
        path = results / name
        path.write_text(path.read_text().replace("scratch", evil))
    text = write_report(results, PLAIN).read_text()
    assert evil not in text
    assert escape(evil) in text


def test_a_wrong_reference_and_empty_results_are_named(results: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`reference=nobody` is none of the inits judged: mulsupcon, scratch"):
        write_report(results, replace(PLAIN, reference="nobody"))
    with pytest.raises(InputError, match="no predictions at"):
        write_report(tmp_path / "nowhere", PLAIN)
    assert "scratch against the others" in write_report(results, replace(PLAIN, reference="scratch")).read_text()


def test_predictions_alone_make_tables_and_roc_curves(results: Path, shards: Path) -> None:
    (results / "runs.json").unlink()
    (results / "curves.csv").unlink()
    text = write_report(results, ReportConfig(shards=shards, samples=20)).read_text()
    assert "0.000977" in text
    assert "No UMAP" in text
    assert sorted(path.name for path in (results / "figures").iterdir()) == [
        *("calibration-breast-paper.svg", "forest.svg", "roc-breast-paper.svg")
    ]


def test_the_page_states_that_unfinished_repeats_are_left_out(results: Path) -> None:
    runs = json.loads((results / "runs.json").read_text())
    runs["tasks"]["breast"]["test_images"] = [12] * 5
    (results / "runs.json").write_text(json.dumps(runs))
    for name, kept, half in (("predictions.csv", -5, 0), ("curves.csv", -1, 9)):
        lines = (results / name).read_text().splitlines(keepends=True)
        (results / name).write_text("".join(lines[:kept]) + lines[kept][:half])
    text = write_report(results, PLAIN).read_text()
    assert "not finished: 5 trainings of unfinished repeats are left out" in text


def test_a_page_of_another_program_is_not_replaced_and_few_images_make_no_umap(
    results: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "report.html").write_text("<p>mine</p>")
    with pytest.raises(
        InputError, match=r"report\.html was written by another program: choose another folder with `out`"
    ):
        write_report(results, replace(PLAIN, out=tmp_path / "site"))
    assert (tmp_path / "site" / "report.html").read_text() == "<p>mine</p>"
    text = write_report(results, ReportConfig(shards=shards, samples=3, device="cpu")).read_text()
    assert "No UMAP: 3 images are too few" in text


def test_the_page_states_the_leaks_that_the_evaluation_listed(results: Path) -> None:
    (results / "breast-leakage.csv").write_text(
        "fold,shared,test_image,train_image\n1,bytes,a.png,b.png\n2,bytes,a.png,c.png\n1,patient,a.png,d.png\n"
    )
    assert (
        "with a training image: 1 by the same bytes, 1 by the same patient"
        in write_report(results, PLAIN).read_text()
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_in_a_browser_without_an_error_and_fits_its_width(
    results: Path, in_browser, width: int
) -> None:
    text = write_report(results, PLAIN).read_text()
    shown = in_browser(text, width)
    assert "CONSOLE" not in shown.stderr
    assert f'data-widths="{width} {width}"' in shown.stdout
    assert 'data-images="4"' in shown.stdout
