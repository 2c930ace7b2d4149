"""RadImageNet's 165 class folders, under their original names, and the number of images that each gets."""

from __future__ import annotations

CLASSES = {
    ("CT", "abd"): (
        "abnormal_entire_organ adrenal_pathology arterial_pathology ascites bil_dil bladder_pathology "
        "bowel_abnormality bowel_inflammation bowel_mass degenerative_changes dilated_urinary_tract "
        "fat_containing_tumor gallbladder_pathology gallstone intraperitoneal_mass liver_lesion normal "
        "osseous_neoplasm ovarian_pathology pancreatic_lesion post_op prostate_lesion renal_lesion "
        "soft_tissue_collection soft_tissue_mass splenic_lesion urolithiasis uterine_pathology"
    ),
    (
        "CT",
        "lung",
    ): "Airspace_opacity Bronchiectasis Nodule Parenchyma_destruction interstitial_lung_disease normal",
    ("MR", "abd"): (
        "adrenal_pathology arterial_pathology ascites bil_dil bladder_pathology bowel_abnormality "
        "bowel_inflammation bowel_mass degenerative_changes dilated_urinary_tract enlarged_organ "
        "gallbladder_pathology intraperitoneal_mass liver_disease_ liver_lesion marrow_abn normal "
        "osseous_neoplasm ovarian_pathology pancreatic_lesion prostate_lesion renal_lesion "
        "soft_tissue_collection soft_tissue_mass splenic_lesion uterine_pathology"
    ),
    ("MR", "af"): (
        "Plantar_plate_tear achilles_pathology_ atfl_pathology bone_inflammation cfl_pathology "
        "chondral_abnormality coalition deltoid_pathology extensor_pathology_ fat_containing_tumor "
        "flexor_pathology_ hematoma intra lisfranc_pathology normal osseous_disruption osseous_neoplasm "
        "peroneal_pathology plantar_fascia_pathology post_op soft_tissue_edema soft_tissue_fluid "
        "soft_tissue_mass spring_ligament_injury syndesmosis_pathology"
    ),
    ("MR", "brain"): (
        "acute_infarct arteriovenous_anomaly chronic_infarct edema extra focal_flair_hyper intra normal "
        "pituatary_lesion white_matter_changes"
    ),
    ("MR", "hip"): (
        "abductor_pathology_ capsular_pathology chondral_pathology hamstring_pathology hematoma "
        "labral_pathology marrow_inflammation normal osseous_disruption osseous_lesion post_op "
        "soft_tissue_edema soft_tissue_fluid soft_tissue_mass"
    ),
    ("MR", "knee"): (
        "acl_pathology bone_inflammation chondral_abnormality fcl_pathology fracture hematoma intra "
        "mcl_pathology meniscal_abnormality muscle_strain normal patella_pathology pcl_pathology "
        "post_operative_acl quad_pathology soft_tissue_edema soft_tissue_fluid_collection soft_tissue_mass"
    ),
    ("MR", "shoulder"): (
        "acj_oa biceps_pathology ca++_tendinosis ghj_oa infraspinatus_pathology labral_pathology "
        "marrow_inflammation normal osseous_lesion post_op soft_tissue_edema soft_tissue_fluid "
        "subscapularis_pathology supraspinatus_pathology"
    ),
    ("MR", "spine"): (
        "cord_pathology_ cystic_lesions disc_pathology dural_epidural_abn facet_arthropathy "
        "foraminal_pathlogy normal osseous_abn scoliosis"
    ),
    ("US", "abd"): "aorta bladder cbd fibroid gb ivc kidney liver ovary pancreas portal_vein spleen uterus",
    ("US", "thyroid"): "thyroid thyroid_nodule",
}
"""The classes of each of the 11 (modality, anatomy) pairs, separated by spaces; the odd spellings are RadImageNet's."""

PREFIXES = {("MR", "abd"): "mriabd", ("US", "abd"): "usabd", ("US", "thyroid"): "usthyroid"}
"""Prefixes of the file names of these pairs. All other file names begin with the anatomy."""

SMALL = {
    "MR/abd/arterial_pathology": 80,
    "MR/abd/bowel_mass": 97,
    "MR/abd/dilated_urinary_tract": 58,
    "MR/abd/prostate_lesion": 68,
    "MR/af/coalition": 61,
    "MR/af/lisfranc_pathology": 49,
    "MR/brain/pituatary_lesion": 72,
    "MR/knee/post_operative_acl": 81,
    "MR/shoulder/ca++_tendinosis": 72,
    "MR/shoulder/infraspinatus_pathology": 84,
}
"""The number of images in each class that has fewer than 100.

The published counts of these classes cover only a part of RadImageNet, so they are lower bounds. Each is raised by
4.75 % here. With at most 100 images per class, the 165 classes then total 16,222 images, as miniRIN does.
"""


def folder_of(modality: str, anatomy: str, name: str) -> str:
    """The folder of a class: `CT/lung/Nodule`, but `US/liver`, because ultrasound has no anatomy level."""
    return f"US/{name}" if modality == "US" else f"{modality}/{anatomy}/{name}"


FOLDERS = {
    folder_of(modality, anatomy, name): (modality, anatomy, name)
    for (modality, anatomy), names in CLASSES.items()
    for name in names.split()
}
"""Maps each of the 165 class folders to its (modality, anatomy, class)."""


def images_in(folder: str, per_class: int) -> int:
    """The number of images in a class: `per_class`, scaled down and rounded for a `SMALL` class; at least one."""
    return max(1, round(per_class * SMALL.get(folder, 100) / 100))
