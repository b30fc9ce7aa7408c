"""Raw Modality and BodyPartExamined → one closed vocabulary, or UNKNOWN; pure lookups, run per task.

Body parts are the defined terms of DICOM PS3.16 Annex L (the general list, vessels folded to UNKNOWN), with
every class of the paper as a term of its own: HEAD, BRAIN and HEADNECK are three. Terms hold only A-Z and
digits, because they become the names of partition folders.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping

UNKNOWN = "UNKNOWN"

# Bump with any change of the code below that maps a value elsewhere; changes of the tables show by themselves.
REVISION = 1


def _names(text: str) -> list[str]:
    return text.split()


# PS3.3 C.7.3.1.1.1, the values that an image can carry; anything else is UNKNOWN.
MODALITIES: frozenset[str] = frozenset(
    _names(
        "AR BI BMD CR CT CTPROTOCOL DG DMS DX ECG EPS ES GM HC IO IVOCT IVUS KER LEN LS MG MR NM OAM OCT OP "
        "OPM OPT OPTBSV OPTENF OPV OSS OT PA PT PX RF RG RTDOSE RTIMAGE RTPLAN RTSTRUCT SC SEG SM SR TG US VA "
        "XA XC"
    )
) | {UNKNOWN}

# Retired terms (same section) and spellings that other sources use.
_MODALITY_SYNONYMS: Mapping[str, str] = {
    "XR": "DX",
    "XRAY": "DX",
    "DR": "DX",
    "MRI": "MR",
    "MA": "MR",
    "MS": "MR",
    "PET": "PT",
    "CAT": "CT",
    "ULTRASOUND": "US",
    "EC": "US",
    "DD": "US",
    "CD": "US",
    "MAMMO": "MG",
    "DF": "RF",
    "CF": "RF",
    "VF": "RF",
    "DS": "XA",
    "DSA": "XA",
    "ANGIO": "XA",
    "ST": "NM",
    "SPECT": "NM",
    "OTHER": "OT",
}

BODY_PARTS: tuple[str, ...] = (
    *_names(
        "ABDOMEN ABDOMENPELVIS ADRENAL ANKLE ANUS AORTA ARM AXILLA BACK BILEDUCT BLADDER BRAIN BREAST "
        "BRONCHUS BUTTOCK CALCANEUS CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS "
        "CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW "
        "ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FIBULA FINGER FOOT FOREARM GALLBLADDER GROIN HAND HEAD "
        "HEADNECK HEART HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY KNEE LARYNX LEG LIVER LOWERLIMB LSPINE "
        "LSSPINE LUNG LYMPHNODE MANDIBLE MASTOID MAXILLA MEDIASTINUM MOUTH NASOPHARYNX NECK NECKCHEST "
        "NECKCHESTABDOMEN NECKCHESTABDPELV NOSE OPTICCANAL ORBIT OVARY PANCREAS PARATHYROID PAROTID PATELLA "
        "PELVIS PENIS PHANTOM PHARYNX PLACENTA PROSTATE RADIUS RADIUSULNA RECTUM RETROPERITONEUM RIB SCALP "
        "SCAPULA SCLERA SCROTUM SELLA SHOULDER SIJOINT SINUS SKULL SMALLINTESTINE SPINALCORD SPINE SPLEEN "
        "SSPINE STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THUMB THYMUS THYROID TIBIA TIBIAFIBULA TLSPINE TMJ "
        "TOE TONGUE TOOTH TRACHEA TSPINE ULNA UPPERLIMB URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY WRIST "
        "ZYGOMA"
    ),
    UNKNOWN,
)

# Keys are folded (upper case, words apart by one space); a phrase is also found with its spaces left out.
_SYNONYMS: Mapping[str, str] = {
    # trunk
    "ABD": "ABDOMEN",
    "ABDO": "ABDOMEN",
    "ABDOM": "ABDOMEN",
    "ABDOMINAL": "ABDOMEN",
    "BELLY": "ABDOMEN",
    "KUB": "ABDOMEN",
    "ABD PEL": "ABDOMENPELVIS",
    "ABD PELV": "ABDOMENPELVIS",
    "ABDPEL": "ABDOMENPELVIS",
    "ABDPELV": "ABDOMENPELVIS",
    "ABDPELVIS": "ABDOMENPELVIS",
    "THORAX": "CHEST",
    "THORACIC": "CHEST",
    "CHST": "CHEST",
    "CXR": "CHEST",
    "BRUST": "CHEST",
    "TORAX": "CHEST",
    "CHESTABD": "CHESTABDOMEN",
    "THORAXABDOMEN": "CHESTABDOMEN",
    "TAP": "CHESTABDPELVIS",
    "CAP": "CHESTABDPELVIS",
    "CHESTABDPEL": "CHESTABDPELVIS",
    "CHESTABDPELV": "CHESTABDPELVIS",
    "CHESTABDOMENPELVIS": "CHESTABDPELVIS",
    "THORAXABDPELVIS": "CHESTABDPELVIS",
    "TRUNK": "CHESTABDPELVIS",
    "TORSO": "CHESTABDPELVIS",
    "NECKCHESTABDPELVIS": "NECKCHESTABDPELV",
    "NECKCHESTABDOMENPELVIS": "NECKCHESTABDPELV",
    "NECKTHORAX": "NECKCHEST",
    "PELV": "PELVIS",
    "PELVIC": "PELVIS",
    "BONYPELVIS": "PELVIS",
    "BECKEN": "PELVIS",
    "INGUINAL": "GROIN",
    "WHOLE BODY": "WHOLEBODY",
    "WHOLEBODYCT": "WHOLEBODY",
    "BODY": "WHOLEBODY",
    "ENTIREBODY": "WHOLEBODY",
    "TOTALBODY": "WHOLEBODY",
    "WB": "WHOLEBODY",
    # head and neck
    "CRANIUM": "SKULL",
    "CRANIAL": "HEAD",
    "KOPF": "HEAD",
    "TETE": "HEAD",
    "CEREBRAL": "BRAIN",
    "CEREBRUM": "BRAIN",
    "NEURO": "BRAIN",
    "BRAINSTEM": "BRAIN",
    "HEAD AND NECK": "HEADNECK",
    "HEAD NECK": "HEADNECK",
    "HN": "HEADNECK",
    "H N": "HEADNECK",
    "SOFT TISSUE NECK": "NECK",
    "HALS": "NECK",
    "FACIAL": "FACE",
    "FACIAL BONES": "FACE",
    "FACIALBONE": "FACE",
    "ORBITS": "ORBIT",
    "ORBITA": "ORBIT",
    "EYES": "EYE",
    "EARS": "EAR",
    "TEMPORAL BONE": "EAR",
    "TEMPORAL BONES": "EAR",
    "MASTOIDS": "MASTOID",
    "SINUSES": "SINUS",
    "PARANASAL SINUS": "SINUS",
    "PARANASAL SINUSES": "SINUS",
    "PNS": "SINUS",
    "PITUITARY": "SELLA",
    "SELLA TURCICA": "SELLA",
    "INTERNAL AUDITORY CANAL": "IAC",
    "IACS": "IAC",
    "TEETH": "TOOTH",
    "DENTAL": "TOOTH",
    "TEMPOROMANDIBULAR JOINT": "TMJ",
    "NASAL": "NOSE",
    "NASAL BONE": "NOSE",
    "NASAL BONES": "NOSE",
    "ORAL CAVITY": "MOUTH",
    "OROPHARYNX": "PHARYNX",
    "THROAT": "PHARYNX",
    "CAROTIDS": "CAROTID",
    "CAROTID ARTERY": "CAROTID",
    # chest organs
    "LUNGS": "LUNG",
    "PULMONARY": "LUNG",
    "CARDIAC": "HEART",
    "CARDIO": "HEART",
    "CORONARY": "CORONARYARTERY",
    "CORONARIES": "CORONARYARTERY",
    "CORONARY ARTERIES": "CORONARYARTERY",
    "BREASTS": "BREAST",
    "MAMMA": "BREAST",
    "MAMMARY": "BREAST",
    "RIBS": "RIB",
    "OESOPHAGUS": "ESOPHAGUS",
    "AORTIC": "AORTA",
    "THORACIC AORTA": "AORTA",
    "ABDOMINAL AORTA": "AORTA",
    "CLAVICULA": "CLAVICLE",
    "COLLARBONE": "CLAVICLE",
    "SHOULDERBLADE": "SCAPULA",
    # abdominal and pelvic organs
    "KIDNEYS": "KIDNEY",
    "RENAL": "KIDNEY",
    "NIERE": "KIDNEY",
    "HEPATIC": "LIVER",
    "LEBER": "LIVER",
    "PANCREATIC": "PANCREAS",
    "GASTRIC": "STOMACH",
    "COLORECTAL": "COLON",
    "LARGE INTESTINE": "COLON",
    "LARGE BOWEL": "COLON",
    "SMALL BOWEL": "SMALLINTESTINE",
    "GALL BLADDER": "GALLBLADDER",
    "BILIARY": "BILEDUCT",
    "BILE DUCT": "BILEDUCT",
    "MRCP": "BILEDUCT",
    "ADRENALS": "ADRENAL",
    "ADRENAL GLAND": "ADRENAL",
    "URINARY BLADDER": "BLADDER",
    "URINARYBLADDER": "BLADDER",
    "PROSTATA": "PROSTATE",
    "PROSTATIC": "PROSTATE",
    "OVARIES": "OVARY",
    "OVARIAN": "OVARY",
    "UTERINE": "UTERUS",
    "CERVIX UTERI": "CERVIX",
    "RECTAL": "RECTUM",
    "TESTES": "TESTIS",
    "TESTICLE": "TESTIS",
    "TESTICLES": "TESTIS",
    "SCROTAL": "SCROTUM",
    "THYROID GLAND": "THYROID",
    "PAROTID GLAND": "PAROTID",
    "LYMPH NODE": "LYMPHNODE",
    "LYMPH NODES": "LYMPHNODE",
    # spine
    "C SPINE": "CSPINE",
    "CERVICAL SPINE": "CSPINE",
    "CERVICAL": "CSPINE",
    "HWS": "CSPINE",
    "T SPINE": "TSPINE",
    "D SPINE": "TSPINE",
    "DSPINE": "TSPINE",
    "THORACIC SPINE": "TSPINE",
    "DORSAL SPINE": "TSPINE",
    "BWS": "TSPINE",
    "L SPINE": "LSPINE",
    "LUMBAR SPINE": "LSPINE",
    "LUMBAR": "LSPINE",
    "LWS": "LSPINE",
    "LS SPINE": "LSSPINE",
    "L S SPINE": "LSSPINE",
    "LUMBOSACRAL SPINE": "LSSPINE",
    "LUMBOSACRAL": "LSSPINE",
    "TL SPINE": "TLSPINE",
    "THORACOLUMBAR SPINE": "TLSPINE",
    "SACRUM": "SSPINE",
    "SACRAL SPINE": "SSPINE",
    "SPINAL": "SPINE",
    "VERTEBRA": "SPINE",
    "VERTEBRAE": "SPINE",
    "WHOLE SPINE": "SPINE",
    "SI JOINT": "SIJOINT",
    "SI JOINTS": "SIJOINT",
    "SACROILIAC JOINT": "SIJOINT",
    "SACROILIAC JOINTS": "SIJOINT",
    # limbs
    "LOWER LIMB": "LOWERLIMB",
    "LOWER EXTREMITY": "LOWERLIMB",
    "LOWER EXTREMITIES": "LOWERLIMB",
    "UPPER LIMB": "UPPERLIMB",
    "UPPER EXTREMITY": "UPPERLIMB",
    "UPPER EXTREMITIES": "UPPERLIMB",
    "EXTREMITIES": "EXTREMITY",
    "LIMB": "EXTREMITY",
    "LOWER LEG": "LEG",
    "LOWERLEG": "LEG",
    "LEGS": "LEG",
    "UPPER ARM": "ARM",
    "UPPER LEG": "THIGH",
    "THIGHS": "THIGH",
    "FORE ARM": "FOREARM",
    "LOWER ARM": "FOREARM",
    "ARMS": "ARM",
    "HANDS": "HAND",
    "FEET": "FOOT",
    "KNEES": "KNEE",
    "HIPS": "HIP",
    "HIP JOINT": "HIP",
    "SHOULDERS": "SHOULDER",
    "SHOULDER JOINT": "SHOULDER",
    "ELBOWS": "ELBOW",
    "WRISTS": "WRIST",
    "ANKLES": "ANKLE",
    "ANKLE JOINT": "ANKLE",
    "FINGERS": "FINGER",
    "TOES": "TOE",
    "HEEL": "CALCANEUS",
    "OS CALCIS": "CALCANEUS",
    "TIB FIB": "TIBIAFIBULA",
    "TIBFIB": "TIBIAFIBULA",
    "TIBIA FIBULA": "TIBIAFIBULA",
    "RADIUS ULNA": "RADIUSULNA",
    "PATELLAE": "PATELLA",
    # not a patient
    "QA": "PHANTOM",
    "QC": "PHANTOM",
    "WATER PHANTOM": "PHANTOM",
}

# Words that say how or on which side, never what; they are left out when a phrase as a whole is not known.
_SIDES = frozenset(_names("L R LT RT LEFT RIGHT BI BILAT BILATERAL BOTH UNILATERAL"))
_NOISE = _SIDES | frozenset(
    _names(
        "A AND AP C CE CM CON CONTR CONTRAST CR CT CTA DR DX ENHANCED FOR HR IV KM LAT LATERAL MG MR MRA MRI "
        "NM OF PA PET PLAIN POST PRE PT ROUTINE SCAN SERIES STUDY THE US VIEW VIEWS W WITH WITHOUT WO WWO XA "
        "XR"
    )
)

# A region's own organs: "CHEST LUNG" means the lung. Only plain containment; HEAD, BRAIN stay apart otherwise.
_INSIDE: Mapping[str, str] = {
    **dict.fromkeys(_names("LUNG HEART CORONARYARTERY MEDIASTINUM ESOPHAGUS RIB STERNUM TRACHEA BRONCHUS"), "CHEST"),
    **dict.fromkeys(
        _names("LIVER KIDNEY PANCREAS STOMACH SPLEEN ADRENAL GALLBLADDER BILEDUCT DUODENUM JEJUNUM COLON"), "ABDOMEN"
    ),
    **dict.fromkeys(_names("PROSTATE BLADDER UTERUS OVARY CERVIX RECTUM VAGINA"), "PELVIS"),
    **dict.fromkeys(_names("BRAIN FACE ORBIT SINUS SKULL SELLA IAC EAR EYE JAW"), "HEAD"),
    **dict.fromkeys(_names("THYROID LARYNX PHARYNX PAROTID CAROTID"), "NECK"),
    **dict.fromkeys(_names("CSPINE TSPINE LSPINE LSSPINE TLSPINE CTSPINE SSPINE"), "SPINE"),
    **dict.fromkeys(_names("FINGER THUMB"), "HAND"),
    **dict.fromkeys(_names("TOE CALCANEUS"), "FOOT"),
    "PATELLA": "KNEE",
}

_COMBINATIONS: Mapping[frozenset[str], str] = {
    frozenset({"HEAD", "NECK"}): "HEADNECK",
    frozenset({"ABDOMEN", "PELVIS"}): "ABDOMENPELVIS",
    frozenset({"CHEST", "ABDOMEN"}): "CHESTABDOMEN",
    frozenset({"CHEST", "ABDOMEN", "PELVIS"}): "CHESTABDPELVIS",
    frozenset({"CHEST", "ABDOMENPELVIS"}): "CHESTABDPELVIS",
    frozenset({"CHESTABDOMEN", "PELVIS"}): "CHESTABDPELVIS",
    frozenset({"NECK", "CHEST"}): "NECKCHEST",
    frozenset({"NECK", "CHEST", "ABDOMEN"}): "NECKCHESTABDOMEN",
    frozenset({"NECK", "CHEST", "ABDOMEN", "PELVIS"}): "NECKCHESTABDPELV",
    frozenset({"TIBIA", "FIBULA"}): "TIBIAFIBULA",
    frozenset({"RADIUS", "ULNA"}): "RADIUSULNA",
    frozenset({"CSPINE", "TSPINE"}): "CTSPINE",
    frozenset({"TSPINE", "LSPINE"}): "TLSPINE",
}

# Anatomic Region Sequence codes of PS3.16 CID 4, 4030 and 4031: SNOMED CT beside the SRT code it replaced.
_REGION_CODES: Mapping[str, str] = {
    code: term
    for term, codes in {
        "ABDOMEN": "818981001 818983003 113345001 T-D4000",
        "ABDOMENPELVIS": "818982008 818987002 416949008 R-FAB57",
        "ADRENAL": "23451007 T-B3000",
        "ANKLE": "70258002 344001 T-15750",
        "ANUS": "53505006 T-59900",
        "AORTA": "15825003 T-42000 113262008 T-42070 7832008 T-42500 57034009 T-42300",
        "ARM": "40983000 T-D8200",
        "AXILLA": "91470000 T-D8104 T-D8100",
        "BACK": "77568009 T-D2100",
        "BILEDUCT": "28273000 T-60610 34707002 T-60600 79741001 T-64500",
        "BLADDER": "89837001 T-74000 48367006 T-74250",
        "BRAIN": "12738006 T-A0100 1101003 T-D1400",
        "BREAST": "76752008 T-04000",
        "BRONCHUS": "955009 T-26000",
        "BUTTOCK": "46862004 T-D2600",
        "CALCANEUS": "80144004 T-12770",
        "CALF": "53840002 T-D9440",
        "CAROTID": "69105007 T-45010 32062004 T-45100 86117002 T-45300",
        "CEREBELLUM": "113305005 T-A6000",
        "CERVIX": "71252005 T-83200",
        "CHEEK": "60819002 T-D1206",
        "CHEST": "816094009 51185008 T-D3000 43799004 T-D3200",
        "CHESTABDOMEN": "416550000 R-FAB55",
        "CHESTABDPELVIS": "416775004 R-FAB56",
        "CIRCLEOFWILLIS": "11279006 T-45520",
        "CLAVICLE": "51299004 T-12310",
        "COCCYX": "64688005 T-11BF0",
        "COLON": "71854001 T-59300 14742008 T-59000 60184004 T-59470",
        "CORNEA": "28726007 T-AA200",
        "CORONARYARTERY": "41801008 T-43000",
        "CSPINE": "122494005 T-11501",
        "CTSPINE": "1217257000",
        "DUODENUM": "38848004 T-58200",
        "EAR": "117590005 T-AB001 T-AB000",
        "ELBOW": "16953009 127949000 T-15430 T-D8300",
        "ESOPHAGUS": "32849002 T-56000",
        "EXTREMITY": "66019005 T-D0300",
        "EYE": "81745001 T-AA000 371398005 T-D0801",
        "EYELID": "80243003 T-AA810",
        "FACE": "89545001 T-D1200 91397008 T-11196",
        "FEMUR": "71341001 T-12710",
        "FIBULA": "87342007 T-12750",
        "FINGER": "7569003 T-D8800",
        "FOOT": "56459004 T-D9700",
        "FOREARM": "14975008 T-D8500",
        "GALLBLADDER": "28231008 T-63000",
        "GROIN": "26893007 T-D7000",
        "HAND": "85562004 T-D8700",
        "HEAD": "69536005 T-D1100",
        "HEADNECK": "774007 T-D1000",
        "HEART": "80891009 T-32000",
        "HIP": "24136001 T-15710 29836001 T-D2500",
        "HUMERUS": "85050009 T-12410",
        "IAC": "361078006 T-AB959",
        "ILEUM": "34516001 T-58600",
        "ILIUM": "22356005 T-12340",
        "JAW": "661005 T-D1213",
        "JEJUNUM": "21306003 T-58400",
        "KIDNEY": "64033007 T-71000",
        "KNEE": "72696002 T-D9200",
        "LARYNX": "4596009 T-24100",
        "LEG": "30021000 T-D9400",
        "LIVER": "10200004 T-62000",
        "LOWERLIMB": "61685007 T-D9000",
        "LSPINE": "122496007 T-11503",
        "LSSPINE": "1217253001",
        "LUNG": "39607008 T-28000",
        "MANDIBLE": "91609006 T-11180",
        "MASTOID": "59066005 T-11133",
        "MAXILLA": "70925003 T-11170",
        "MEDIASTINUM": "72410000 T-D3300",
        "MOUTH": "123851003 T-D0662",
        "NASOPHARYNX": "360955006 T-2300C",
        "NECK": "45048000 T-D1600",
        "NECKCHEST": "417437006 R-FAB52",
        "NECKCHESTABDOMEN": "416152001 R-FAB53",
        "NECKCHESTABDPELV": "416319003 R-FAB54",
        "NOSE": "45206002 T-21000 74386004 T-11149",
        "OPTICCANAL": "55024004 T-11102",
        "ORBIT": "363654007 T-D14AE",
        "OVARY": "15497006 T-87000",
        "PANCREAS": "15776009 T-65000",
        "PARATHYROID": "111002 T-B7000",
        "PAROTID": "45289007 T-61100",
        "PATELLA": "64234005 T-12730",
        "PELVIS": "816092008 816989007 12921003 T-D6000",
        "PENIS": "18911002 T-91000",
        "PHANTOM": "706342009 R-FE0C7",
        "PHARYNX": "54066008 T-55000",
        "PLACENTA": "78067005 T-F1100",
        "PROSTATE": "41216001 T-92000 181422007",
        "RADIUS": "62413002 T-12420",
        "RECTUM": "34402009 T-59600",
        "RETROPERITONEUM": "82849001 T-D4900",
        "RIB": "113197003 T-11300",
        "SCALP": "41695006 T-D1160",
        "SCAPULA": "79601000 T-12280",
        "SCLERA": "18619003 T-AA110",
        "SCROTUM": "20233005 T-98000",
        "SELLA": "42575006 T-D1460",
        "SHOULDER": "16982005 T-D2220",
        "SIJOINT": "39723000 T-15680",
        "SINUS": "2095001 T-22000",
        "SKULL": "89546000 T-11100",
        "SMALLINTESTINE": "30315005 T-58000",
        "SPINALCORD": "2748008 T-A7010",
        "SPINE": "421060004 T-D04FF T-11500",
        "SPLEEN": "78961009 T-C3000",
        "SSPINE": "54735007 T-11AD0 1217254007",
        "STERNUM": "56873002 T-11210",
        "STOMACH": "69695003 T-57000",
        "SUBMANDIBULAR": "54019009 T-61300 5713008 T-D1603",
        "TESTIS": "40689003 T-94000",
        "THIGH": "68367000 T-D9100",
        "THUMB": "76505004 T-D8810",
        "THYMUS": "9875009 T-C8000",
        "THYROID": "69748006 T-B6000",
        "TIBIA": "12611008 T-12740",
        "TLSPINE": "1217256009",
        "TMJ": "53620006 T-15290",
        "TOE": "29707007 T-D9800",
        "TONGUE": "21974007 T-53000",
        "TRACHEA": "44567001 T-25000",
        "TSPINE": "122495006 T-11502",
        "ULNA": "23416004 T-12430",
        "UPPERLIMB": "53120007 T-D8000",
        "URETER": "87953007 T-73000",
        "URETHRA": "13648007 T-75000",
        "UTERUS": "35039007 T-83000",
        "VAGINA": "76784001 T-82000",
        "VULVA": "45292006 T-81000",
        "WHOLEBODY": "38266002 T-D0010",
        "WRIST": "74670003 T-15460",
        "ZYGOMA": "13881006 T-11166",
    }.items()
    for code in codes.split()
}


class Vocabulary:
    """The closed vocabulary, widened by a site's own spellings; small, immutable, cheap to build in each task."""

    def __init__(self, extra: Mapping[str, str] | None = None) -> None:
        """`extra` maps raw BodyPartExamined values to terms of BODY_PARTS and comes before the built-in tables.

        Raises ValueError naming the term when one lies outside BODY_PARTS, or the key when it holds no letter.
        """
        self.extra: Mapping[str, str] = dict(extra or {})
        table: dict[str, str] = {}
        for raw, term in self.extra.items():
            if term not in BODY_PARTS:
                raise ValueError(f"vocabulary: {raw!r} maps to {term!r}, which is not a term of the closed list")
            key = _joined(_words(raw))
            if not key:
                raise ValueError(f"vocabulary: the raw value {raw!r} has no letters or digits to match")
            table[key] = term
        self._table: Mapping[str, str] = {**_BODY_PART_TABLE, **table}
        self._nameless = frozenset(key for key, term in table.items() if term == UNKNOWN)

    @property
    def version(self) -> str:
        """A short name that changes with every mapping in force, a site's own among them; a table records it."""
        combinations = sorted((sorted(parts), term) for parts, term in _COMBINATIONS.items())
        words = [sorted(names) for names in (MODALITIES, BODY_PARTS, _SIDES, _NOISE)]
        text = json.dumps(
            [words, combinations, _MODALITY_SYNONYMS, self._table, _INSIDE, _REGION_CODES], sort_keys=True
        )
        return f"voc{REVISION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def is_settled(self, raw: str) -> bool:
        """Whether a BodyPartExamined has a term, or the site itself says that it has none."""
        return self.body_part(raw) != UNKNOWN or _joined(_words(raw)) in self._nameless

    def modality(self, raw: str | None) -> str:
        """Modality (0008,0060), or a label's spelling of it, as a term of MODALITIES."""
        key = _joined(_words(raw or ""))
        term = _MODALITY_SYNONYMS.get(key, key)
        return term if term in MODALITIES else UNKNOWN

    def body_part(self, raw: str | None) -> str:
        """BodyPartExamined (0018,0015) as a term of BODY_PARTS.

        The whole value first, then without sides and noise words, then its words one by one: one term among
        them (or one combined region, as chest, abdomen and pelvis) decides, several that disagree are UNKNOWN.
        """
        words = _words(raw or "")
        for phrase in (words, [w for w in words if w not in _SIDES], [w for w in words if w not in _NOISE]):
            if term := self._table.get(_joined(phrase)):
                return term
        found = set(self._terms(words))
        found -= {region for term in found if (region := _INSIDE.get(term))}
        if len(found) == 1:
            return found.pop()
        return _COMBINATIONS.get(frozenset(found), UNKNOWN)

    def region(self, codes: Iterable[str]) -> str:
        """The first known code value of an Anatomic Region Sequence (0008,2218), SNOMED CT or SRT."""
        return next((_REGION_CODES[c.strip().upper()] for c in codes if c.strip().upper() in _REGION_CODES), UNKNOWN)

    def _terms(self, words: list[str]) -> Iterable[str]:
        """Terms of the longest phrases (up to three words) found from left to right, noise words passed over."""
        at = 0
        while at < len(words):
            for length in (3, 2, 1):
                phrase = words[at : at + length]
                if len(phrase) < length or (length == 1 and phrase[0] in _NOISE):
                    continue
                term = self._table.get(_joined(phrase))
                if term is not None and term != UNKNOWN:
                    yield term
                    at += length
                    break
            else:
                at += 1


def _words(raw: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", raw).encode("ascii", "ignore").decode("ascii").upper()
    return re.findall(r"[A-Z0-9]+", plain)


def _joined(words: Iterable[str]) -> str:
    return "".join(words)


_BODY_PART_TABLE: Mapping[str, str] = {
    **{_joined(_words(key)): term for key, term in _SYNONYMS.items()},
    **{term: term for term in BODY_PARTS},
}
