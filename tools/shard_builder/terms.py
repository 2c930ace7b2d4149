"""Vocabularies that turn words of DICOM headers into label values. A header's own text is never written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shard_builder.entries import ValueMap

KEYWORDS = {
    "modality": ("Modality",),
    "anatomy": ("BodyPartExamined",),
    "laterality": ("ImageLaterality", "Laterality"),
    "view": ("ViewPosition",),
}
"""The header elements of each field; the first one with a value counts."""

NO_IMAGES = {"SEG", "RTDOSE"}
"""Modalities whose pixels are no image of a patient."""

_REGIONS = {
    "abd": "ABDOMEN ABD ABDO ABDOMENPELVIS ABDPELVIS ADRENAL AORTA APPENDIX BILEDUCT BLADDER CERVIX COLON DUODENUM "
    "ENDOMETRIUM GALLBLADDER ILEUM INTESTINE JEJUNUM KIDNEY LARGEINTESTINE LIVER OVARY PANCREAS PANCBILEDUCT PROSTATE "
    "RECTUM RENAL SMALLINTESTINE SPLEEN STOMACH URETER URETHRA UTERUS VAGINA",
    "af": "ANKLE CALCANEUS FOOT HEEL TARSUS TOE",
    "arm": "ARM CLAVICLE FOREARM HUMERUS RADIUS RADIUSULNA ULNA UPPERARM",
    "brain": "BRAIN CEREBELLUM CEREBRUM CIRCLEOFWILLIS PITUITARY SELLA",
    "breast": "BREAST",
    "chest": "BRONCHUS CHEST CHESTWALL ESOPHAGUS MEDIASTINUM RIB STERNUM THORAX THYMUS TRACHEA",
    "elbow": "ELBOW",
    "hand": "CARPUS FINGER HAND THUMB WRIST",
    "head": "EAR EYE FACE FACIALBONES HEAD IAC JAW MANDIBLE MASTOID MAXILLA MOUTH NASALBONE NOSE ORBIT PARANASALSINUS "
    "PAROTID SCALP SINUS SKULL TEETH TMJ TONGUE ZYGOMA",
    "headneck": "HEADANDNECK HEADNECK",
    "heart": "CARDIAC CORONARYARTERY HEART PERICARDIUM",
    "hip": "HIP",
    "knee": "KNEE PATELLA",
    "leg": "CALF FEMUR FIBULA LEG LOWERLEG LOWERLIMB THIGH TIBIA TIBIAFIBULA",
    "lung": "LUNG LUNGS",
    "neck": "CAROTID LARYNX NECK PHARYNX SUBMANDIBULAR",
    "pelvis": "COXA ILIUM PELVIS SACROILIAC SIJOINT",
    "shoulder": "ACJOINT SCAPULA SHOULDER",
    "spine": "BACK COCCYX CSPINE CTSPINE LSPINE LSSPINE SACRUM SPINE SSPINE TLSPINE TSPINE "
    "CERVICALSPINE LUMBARSPINE THORACICSPINE",
    "thyroid": "THYROID",
    "trunk": "CHESTABDOMEN CHESTABDOMENPELVIS CHESTABDPELVIS NECKCHEST NECKCHESTABDOMEN NECKCHESTABDPELVIS "
    "CHESTTOPELVIS TORSO TRUNK",
    "wholebody": "BODY WHOLEBODY",
}
"""The terms of each region: the defined terms of Body Part Examined (PS3.16, annex L), and variants from scanners.

Regions of RadImageNet have its names: abd, af, brain, hip, knee, lung, shoulder, spine, thyroid.
"""

_MODALITIES = (
    "BI BMD CR CT DG DX EPS ES FID GM HC IO IVOCT IVUS LS MG MR NM OAM OCT OP OPM OPT OPTBSV OPTENF OSS OT PA PT PX RF "
    "RG RTIMAGE SM TG US VL XA XC"
)
"""Modalities whose objects can be images (PS3.3, C.7.3.1.1.1)."""

_LATERALITIES = "B L R U"

_VIEWS = (
    "AP PA LL RL LLD RLD LLO RLO LAO RAO LPO RPO "
    "AT CC CCID CV EXAG ISO LM LMO LMX ML MLID MLO SIO TAN XCC XCCL XCCM RM RL"
)
"""View positions of projection radiography and mammography."""

_VALUES = {
    "modality": {term: term for term in _MODALITIES.split()},
    "anatomy": {term: region for region, terms in _REGIONS.items() for term in terms.split()},
    "laterality": {term: term for term in _LATERALITIES.split()},
    "view": {term: term for term in _VIEWS.split()},
}


def label_values(
    texts: Mapping[str, str], fields: Sequence[str], value_map: ValueMap
) -> tuple[dict[str, str], list[str]]:
    """The values of `fields` for a header's `texts`, and the fields whose text is in no vocabulary.

    `value_map` wins over the vocabularies; its old values are `plain` texts or values of a vocabulary.
    """
    values, unknown = {}, []
    for field in fields:
        if not (text := plain(texts.get(field, ""))):
            continue
        value = value_map.get((field, text))
        if value is None:
            if (known := _VALUES[field].get(text)) is None:
                unknown.append(field)
                continue
            value = value_map.get((field, plain(known)), known)
        if value:
            values[field] = value
    return values, unknown


def plain(text: str) -> str:
    """A header's text in upper case, without blanks, `-` and `_`, which do not count."""
    return "".join(each for each in text.upper() if each not in " -_")
