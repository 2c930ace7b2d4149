"""An archive with every form of folder and every kind of damaged file."""

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

# The 165 folders of the archive as shipped: parent folder, anatomy, names of the folders.
RADIMAGENET = """
CT/abd abd: abnormal_entire_organ adrenal_pathology arterial_pathology ascites bil_dil bladder_pathology
  bowel_abnormality bowel_inflammation bowel_mass degenerative_changes dilated_urinary_tract
  fat_containing_tumor gallbladder_pathology gallstone intraperitoneal_mass liver_lesion normal osseous_neoplasm
  ovarian_pathology pancreatic_lesion post_op prostate_lesion renal_lesion soft_tissue_collection
  soft_tissue_mass splenic_lesion urolithiasis uterine_pathology
CT/lung lung: Airspace_opacity Bronchiectasis Nodule Parenchyma_destruction interstitial_lung_disease normal
MR/abd abd: adrenal_pathology arterial_pathology ascites bil_dil bladder_pathology bowel_abnormality
  bowel_inflammation bowel_mass degenerative_changes dilated_urinary_tract enlarged_organ gallbladder_pathology
  intraperitoneal_mass liver_disease_ liver_lesion marrow_abn normal osseous_neoplasm ovarian_pathology
  pancreatic_lesion prostate_lesion renal_lesion soft_tissue_collection soft_tissue_mass splenic_lesion
  uterine_pathology
MR/af af: Plantar_plate_tear achilles_pathology_ atfl_pathology bone_inflammation cfl_pathology
  chondral_abnormality coalition deltoid_pathology extensor_pathology_ fat_containing_tumor flexor_pathology_
  hematoma intra lisfranc_pathology normal osseous_disruption osseous_neoplasm peroneal_pathology
  plantar_fascia_pathology post_op soft_tissue_edema soft_tissue_fluid soft_tissue_mass spring_ligament_injury
  syndesmosis_pathology
MR/brain brain: acute_infarct arteriovenous_anomaly chronic_infarct edema extra focal_flair_hyper intra normal
  pituatary_lesion white_matter_changes
MR/hip hip: abductor_pathology_ capsular_pathology chondral_pathology hamstring_pathology hematoma
  labral_pathology marrow_inflammation normal osseous_disruption osseous_lesion post_op soft_tissue_edema
  soft_tissue_fluid soft_tissue_mass
MR/knee knee: acl_pathology bone_inflammation chondral_abnormality fcl_pathology fracture hematoma intra
  mcl_pathology meniscal_abnormality muscle_strain normal patella_pathology pcl_pathology post_operative_acl
  quad_pathology soft_tissue_edema soft_tissue_fluid_collection soft_tissue_mass
MR/shoulder shoulder: acj_oa biceps_pathology ca++_tendinosis ghj_oa infraspinatus_pathology labral_pathology
  marrow_inflammation normal osseous_lesion post_op soft_tissue_edema soft_tissue_fluid subscapularis_pathology
  supraspinatus_pathology
MR/spine spine: cord_pathology_ cystic_lesions disc_pathology dural_epidural_abn facet_arthropathy
  foraminal_pathlogy normal osseous_abn scoliosis
US abd: aorta bladder cbd fibroid gb ivc kidney liver ovary pancreas portal_vein spleen uterus
US thyroid: thyroid thyroid_nodule
"""


@pytest.fixture(scope="session")
def radimagenet():
    """(folder, modality, anatomy) of each class."""
    classes = []
    for line in re.sub(r"\n  ", " ", RADIMAGENET).strip().splitlines():
        head, names = line.split(": ")
        above, anatomy = head.split()
        classes += [(f"{above}/{name}", above[:2], anatomy) for name in names.split()]
    return classes


def picture(seed, *, size=(40, 30)):
    """A smooth grey image (rows, columns) uint8; each seed gives another."""
    generator = np.random.default_rng(seed)
    return np.asarray(
        Image.fromarray(generator.integers(0, 256, (6, 5), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    )


def save(path, seed, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path, **settings)


def bomb():
    """A PNG file of about 60 bytes that declares 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture
def tree(tmp_path):
    """Ten images a folder: two in CT, one in MR, and RadImageNet's US folders without an anatomy level."""
    root = tmp_path / "archive"
    folders = ("CT/lung/Nodule", "CT/abd/normal", "MR/shoulder/ca++_tendinosis", "US/liver", "US/thyroid_nodule")
    for number, folder in enumerate(folders):
        for image in range(10):
            ending = "png" if image % 2 else "JPG"
            save(root / folder / f"{folder[:2]} {image}.{ending}", number * 100 + image)
    (root / "CT" / "Thumbs.db").write_bytes(b"x")
    (root / "RadiologyAI_train.csv").write_text("filename,label\n")
    return root


@pytest.fixture
def damaged(tree):
    """`tree` with five more images in CT/lung/Nodule that cannot be packed; maps their paths to the reasons."""
    folder = tree / "CT" / "lung" / "Nodule"
    save(folder / "whole.png", 1)
    save(folder / "whole.jpeg", 2)
    for name in ("whole.png", "whole.jpeg"):
        data = (folder / name).read_bytes()
        (folder / name.replace("whole", "cut")).write_bytes(data[: len(data) // 2])
        (folder / name).unlink()
    (folder / "text.png").write_text("no image at all")
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(bomb())
    reasons = {
        "bomb.png": "declares over 67,108,864 pixels",
        "cut.jpeg": "truncated",
        "cut.png": "truncated",
        "empty.png": "empty file",
        "text.png": "not a PNG or JPEG image",
    }
    return tree, {f"CT/lung/Nodule/{name}": reason for name, reason in reasons.items()}


@pytest.fixture(scope="session")
def killer():
    """Makes the environment of processes that run `action` when they read an image with `killer` in its name."""

    def killer(folder, action):
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            "import os, signal\nfrom pathlib import Path\nfrom shard_builder import image\nread = image.read\n"
            f"flag = Path({str(folder / 'flag')!r})\n"
            f"def deadly(path):\n    if 'killer' in path.name:\n        {action}\n    return read(path)\n"
            "image.read = deadly\n"
        )
        return {"PYTHONPATH": str(site)}

    return killer
