"""The synthetic archive: its shape, its reproducibility and its physics; and the synthetic task."""

import csv
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modan_fast.phantom import phantom_archive, phantom_plan, phantom_task, physics
from modan_fast.phantom.anatomy import make_scene
from modan_fast.phantom.folders import CLASSES, FOLDERS, SMALL
from modan_fast.phantom.physics import Probe, Tissue
from modan_fast.phantom.picture import add_lesion, generator, picture
from shard_builder.settings import InputError

MIXED = ["CT/lung/Nodule", "MR/knee/acl_pathology", "US/liver", "US/thyroid_nodule"]


def files(root):
    """Relative path to bytes of every file under a folder."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_165_folders_are_radimagenets_in_11_pairs_of_nine_anatomies():
    assert len(FOLDERS) == 165
    assert len(CLASSES) == 11
    assert len({anatomy for _, anatomy in CLASSES}) == 9
    odd = {"MR/spine/foraminal_pathlogy", "MR/brain/pituatary_lesion", "MR/abd/liver_disease_"}
    assert odd | {"MR/shoulder/ca++_tendinosis", "CT/lung/Nodule", "US/liver"} <= FOLDERS.keys()
    assert Counter(folder.split("/")[0] for folder in FOLDERS) == {"CT": 34, "MR": 116, "US": 15}
    assert all(folder.count("/") == (1 if folder.startswith("US/") else 2) for folder in FOLDERS)


def test_100_per_class_are_16222_images_and_other_numbers_scale():
    plan = phantom_plan(100)
    assert sum(plan.values()) == 16_222
    assert {folder for folder, images in plan.items() if images < 100} == SMALL.keys()
    assert sum(phantom_plan(1).values()) == 165
    assert phantom_plan(1000)["MR/abd/bowel_mass"] == 970


def test_the_archive_is_a_tree_of_grey_png_images_of_the_size_asked_for(tmp_path):
    calls = []
    total = phantom_archive(
        tmp_path / "out", per_class=3, size=48, classes=MIXED, progress=lambda *call: calls.append(call)
    )
    paths = sorted((tmp_path / "out").rglob("*.png"))
    assert total == len(paths) == 12
    assert {path.parent.relative_to(tmp_path / "out").as_posix() for path in paths} == set(MIXED)
    for path in paths:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (48, 48))
            assert np.asarray(image).std() > 5
    assert calls[-1] == ("phantom", 12, 12, "")
    assert os.listdir(tmp_path) == ["out"]


def test_the_bytes_do_not_depend_on_the_run_the_workers_or_the_other_images(tmp_path):
    options = {"per_class": 30, "size": 32, "classes": MIXED}
    for out, workers in (("one", 1), ("again", 1), ("two", 2)):
        assert phantom_archive(tmp_path / out, workers=workers, **options) == 120
    one = files(tmp_path / "one")
    assert one == files(tmp_path / "again") == files(tmp_path / "two")
    assert len(set(one.values())) == 120
    phantom_archive(tmp_path / "fewer", per_class=2, size=32, classes=MIXED[:1])
    assert files(tmp_path / "fewer").items() <= one.items()


def test_another_seed_makes_other_images(tmp_path):
    for seed in (0, 1):
        phantom_archive(tmp_path / str(seed), per_class=2, size=32, seed=seed, classes=MIXED)
    zero, one = files(tmp_path / "0"), files(tmp_path / "1")
    assert zero.keys() == one.keys()
    assert not set(zero.values()) & set(one.values())


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_every_class_can_be_rendered(folder):
    image = picture(0, *FOLDERS[folder], index=0, size=64)
    assert image.shape == (64, 64)
    assert image.dtype == np.uint8
    assert image.std() > 5


def test_a_lesion_changes_a_small_part_of_a_scene():
    for modality, anatomy, name in FOLDERS.values():
        scene = make_scene(64, generator(3, name), modality, anatomy, name)
        if not scene.sites:  # ultrasound of the belly, whose classes are organs
            continue
        before = scene.labels()
        add_lesion(scene, anatomy, name)
        assert 0 < (before != scene.labels()).mean() < 0.08, (modality, anatomy, name)


def test_all_classes_have_a_lesion_except_the_normal_ones_and_the_organs_of_abdominal_ultrasound():
    for modality, anatomy, name in FOLDERS.values():
        image = picture(3, modality, anatomy, name, index=0, size=32)
        plain = picture(3, modality, anatomy, name, index=0, size=32, lesion=False)
        healthy = name in {"normal", "thyroid"} or (modality, anatomy) == ("US", "abd")
        assert np.array_equal(image, plain) == healthy, (modality, anatomy, name)


def ct_noise(radius, photons):
    """Mean and variance of the CT numbers in the middle of a disc of water of `radius` cm."""
    rows, columns = np.mgrid[:96, :96] - 47.5
    labels = np.where(np.hypot(rows, columns) * 0.36 < radius, Tissue.FLUID, Tissue.AIR).astype(np.uint8)
    tissues = physics.property_table()
    tissues[Tissue.FLUID, 0], tissues[:, 7] = 0, 0
    image = physics.ct_numbers(labels, tissues, generator(0, "noise"), photons, pixel_cm=0.36)
    return image[44:52, 44:52].mean(), image[34:62, 34:62].var()


def test_ct_noise_variance_is_inverse_to_the_dose():
    quarter, full = ct_noise(12, 5e4)[1], ct_noise(12, 2e5)[1]
    assert quarter / full == pytest.approx(4, rel=0.1)


def test_ct_noise_grows_with_the_attenuation_of_the_body_as_beers_law_says():
    thin, thick = ct_noise(10, 1e6)[1], ct_noise(14, 1e6)[1]
    rows, columns = np.mgrid[:96, :96] - 47.5

    def expected(radius):
        mu = physics.WATER * (np.hypot(rows, columns) * 0.36 < radius)
        through = mu.sum(0) * 0.36
        noise = np.exp(through)[:, None] + np.exp(through)[None, :]
        return noise[34:62, 34:62].mean()

    assert thick / thin == pytest.approx(expected(14) / expected(10), rel=0.15)


def test_ct_shows_water_at_0_and_air_at_minus_1000_hounsfield_units():
    assert ct_noise(10, 1e6)[0] == pytest.approx(0, abs=5)
    scene = physics.ct_numbers(np.zeros((64, 64), np.uint8), physics.property_table(), generator(0), 1e6, 0.2)
    assert scene.mean() == pytest.approx(-1000, abs=1)
    assert physics.windowed(np.float32([-200, 0, 200]), 0, 400).tolist() == [0, 128, 255]


def test_mr_noise_in_air_follows_a_rayleigh_distribution():
    labels = make_scene(96, generator(1), "MR", "brain", "normal").labels()
    signal = physics.mr_signal(labels, physics.property_table(), "T2")
    air = physics.rician(signal, 0.03, generator(2))[labels == Tissue.AIR]
    assert air.size > 1000
    assert stats.kstest(air, stats.rayleigh(scale=0.03).cdf).pvalue > 0.01


def test_mr_signal_follows_a_rice_distribution():
    values = physics.rician(np.full((90, 90), 0.06, np.float32), 0.03, generator(3)).ravel()
    assert stats.kstest(values, stats.rice(2, scale=0.03).cdf).pvalue > 0.01
    assert stats.kstest(values, stats.norm(0.06, 0.03).cdf).pvalue < 1e-6


def test_mr_weightings_show_fluid_dark_in_t1_and_bright_in_t2_and_fat_saturation_removes_fat():
    labels = np.array([[Tissue.FLUID, Tissue.WHITE, Tissue.GREY, Tissue.FAT]], np.uint8)
    t1, t2 = (physics.mr_signal(labels, physics.property_table(), weighting)[0] for weighting in ("T1", "T2"))
    assert t1[0] < t1[2] < t1[1] < t1[3]
    assert t2[1] < t2[2] < t2[0]
    assert physics.mr_signal(labels, physics.property_table(), "T2", fat_saturation=True)[0, 3] < 0.2 * t2[3]


def test_us_speckle_of_an_even_region_has_the_signal_to_noise_ratio_of_a_rayleigh_envelope():
    envelope = physics.speckle(np.full((400, 400), 0.6, np.float32), generator(4))
    assert envelope.mean() / envelope.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.03)  # 1.91
    assert np.sqrt((envelope**2).mean()) == pytest.approx(0.6, rel=0.03)
    sparse = envelope[::10, ::16].ravel()  # samples that the pulse does not correlate
    assert stats.kstest(sparse, stats.rayleigh(scale=0.6 / np.sqrt(2)).cdf).pvalue > 0.01


def test_us_speckle_is_correlated_more_laterally_than_axially():
    envelope = physics.speckle(np.ones((300, 300), np.float32), generator(5))
    envelope -= envelope.mean()
    axial, lateral = (envelope[2:] * envelope[:-2]).mean(), (envelope[:, 2:] * envelope[:, :-2]).mean()
    assert lateral > 2 * axial


def envelope_of(tissue):
    """The envelope of an even organ with a piece of `tissue` in its middle, under a linear probe."""
    labels = np.full((128, 128), Tissue.ORGAN, np.uint8)
    labels[50:64, 44:84] = tissue
    return physics.us_envelope(labels, physics.property_table(), Probe(0.0, 0.0, 2.0, 8.0, 5.0), generator(6))


def test_us_is_dark_behind_bone_and_bright_behind_fluid():
    beside = envelope_of(Tissue.ORGAN)[80:, 34:46].mean()
    assert envelope_of(Tissue.CORTEX)[80:, 34:46].mean() < 0.05 * beside
    assert envelope_of(Tissue.FLUID)[80:, 34:46].mean() > 1.1 * beside


def test_us_grows_darker_with_depth_in_tissue_that_attenuates_more_than_the_gain_compensates():
    labels = np.full((128, 128), Tissue.MUSCLE, np.uint8)
    envelope = physics.us_envelope(labels, physics.property_table(), Probe(0.0, 0.0, 2.0, 8.0, 5.0), generator(7))
    assert envelope[100:].mean() < 0.6 * envelope[10:38].mean()


def noise_statistics(image):
    """Three statistics that depend little on anatomy.

    In even regions, the lateral minus the axial correlation of the noise; the log ratio of the quartiles of the local
    standard deviation; the noise of dark regions.
    """
    values = image.astype(np.float32)
    mean = ndimage.uniform_filter(values, 7)
    spread = np.sqrt(np.maximum(ndimage.uniform_filter(values**2, 7) - mean**2, 0))
    lit, dark = (mean > 40) & (mean < 230), mean < 40
    low, middle, high = np.percentile(spread[lit], [25, 50, 75])
    even = lit & (spread < middle)
    noise = values - ndimage.gaussian_filter(values, 2)
    lateral = (noise[:, 1:] * noise[:, :-1])[even[:, 1:]].mean()
    axial = (noise[1:] * noise[:-1])[even[1:]].mean()
    background = np.median(spread[dark]) if dark.any() else 0
    return [(lateral - axial) / (noise[even] ** 2).mean(), np.log(high / low), np.log1p(background)]


def test_three_statistics_predict_the_modality_of_an_unseen_anatomy():
    rows = [
        (noise_statistics(picture(0, modality, anatomy, names.split()[index % 2], index, 128)), modality, anatomy)
        for (modality, anatomy), names in CLASSES.items()
        for index in range(16)
    ]
    features, modalities, anatomies = (np.array(column) for column in zip(*rows, strict=True))
    accuracies = []
    for anatomy in np.unique(anatomies):
        held_out = anatomies == anatomy
        model = make_pipeline(StandardScaler(), LogisticRegression())
        model.fit(features[~held_out], modalities[~held_out])
        accuracies.append(model.score(features[held_out], modalities[held_out]))
    assert np.mean(accuracies) > 0.9
    assert min(accuracies) > 0.75


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of 200 small images, and its fold files as lists of (filename, label)."""
    root = tmp_path_factory.mktemp("task") / "phantom"
    phantom_task(root, images=200, size=96)
    folds = {}
    for split in ("train", "val", "test"):
        for fold in range(1, 6):
            with open(root / "dataframe" / f"phantom_{split}_fold{fold}.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            folds[split, fold] = [(row["filename"], row["label"]) for row in rows]
    return root, folds


def test_the_folds_of_a_task_are_disjoint_and_their_tests_cover_every_image_once(task):
    root, folds = task
    everything = {f"images/{path.name}" for path in (root / "images").iterdir()}
    assert len(everything) == 200
    assert Counter(name for fold in range(1, 6) for name, _ in folds["test", fold]) == Counter(everything)
    for fold in range(1, 6):
        names = [name for split in ("train", "val", "test") for name, _ in folds[split, fold]]
        assert sorted(names) == sorted(everything)
        assert [len(folds[split, fold]) for split in ("train", "val", "test")] == [144, 16, 40]


def test_each_split_of_a_fold_is_stratified_and_the_validation_splits_differ(task):
    _, folds = task
    for rows in folds.values():
        counts = Counter(label for _, label in rows)
        assert counts["benign"] == counts["malignant"] == len(rows) / 2
    assert len({tuple(folds["val", fold]) for fold in range(1, 6)}) == 5


def test_the_task_is_not_solved_by_a_linear_model_on_pixels(task):
    root, folds = task

    def load(split, fold):
        images = [
            Image.open(root / name).resize((16, 16), Image.Resampling.BOX) for name, _ in folds[split, fold]
        ]
        pixels = np.stack([np.asarray(image, float).ravel() for image in images])
        return pixels, [label == "malignant" for _, label in folds[split, fold]]

    aucs = []
    for fold in range(1, 6):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000)).fit(
            *load("train", fold)
        )
        pixels, labels = load("test", fold)
        aucs.append(roc_auc_score(labels, model.decision_function(pixels)))
    assert 0.5 < np.mean(aucs) <= 0.8


@pytest.mark.parametrize("make", [phantom_archive, phantom_task])
def test_an_existing_output_is_refused_and_left_alone(make, tmp_path):
    full, plain = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    plain.write_text("keep")
    for out in (full, plain):
        with pytest.raises(InputError) as error:
            make(out)
        assert str(error.value) == f"{out} exists and is not an empty folder: choose another folder with `out`"
    assert (full / "mine.txt").read_text() == plain.read_text() == "keep"
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_an_empty_folder_is_filled(tmp_path):
    out = tmp_path / "empty"
    out.mkdir()
    assert phantom_archive(out, per_class=1, size=32, classes=["US/liver"]) == 1
    assert [path.name for path in out.rglob("*.png")] == ["usabd000000.png"]


def test_the_output_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "out"
    seen = []
    phantom_archive(
        out, per_class=1, size=32, classes=MIXED, progress=lambda *call: seen.append((call[1], out.exists()))
    )
    assert seen == [(1, False), (2, False), (3, False), (4, False)]
    assert len(list(out.rglob("*.png"))) == 4


@pytest.mark.parametrize("make", [phantom_archive, phantom_task])
def test_an_interrupted_run_leaves_nothing(make, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    options = {"per_class": 1, "classes": MIXED} if make is phantom_archive else {"images": 20}
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", size=32, progress=stop, **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["CT/lung/nodule"]}, "`classes`: CT/lung/nodule is no class folder"),
        ({"classes": []}, "`classes` is empty"),
        ({"per_class": 0}, "`per_class` must be at least 1"),
        ({"size": 8}, "`size` must be at least 32"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"workers": 0}, "`workers` must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        phantom_archive(tmp_path / "out", **options)
    assert os.listdir(tmp_path) == []


def test_a_task_of_too_few_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="`images` must be at least 20"):
        phantom_task(tmp_path / "out", images=19)
