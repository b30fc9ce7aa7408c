"""Raw codes of real archives and their terms in the closed vocabulary."""

import re
from pathlib import Path

import idc_index_data
import pandas as pd
import pyarrow.parquet as parquet
import pytest
from pydicom.sr._snomed_dict import mapping as snomed

from cbmir_spark.dicom import vocabulary, vocabulary_tables
from cbmir_spark.dicom.region_codes import REGION_CODES
from cbmir_spark.dicom.vocabulary import Vocabulary
from cbmir_spark.dicom.vocabulary_tables import BODY_PARTS, MODALITIES, UNKNOWN
from cbmir_spark.errors import ConfigError

VOCABULARY = Vocabulary({})


@pytest.mark.parametrize(
    ("raw", "term"),
    [
        ("CHEST", "CHEST"),
        ("chest ", "CHEST"),
        ("Thorax", "CHEST"),
        ("THORAX^ROUTINE", "CHEST"),
        ("TH CT CHEST WO C", "CHEST"),
        ("CHEST (THORAX) W", "CHEST"),
        ("BD CT ABD WO_W C", "ABDOMEN"),
        ("CHESTABDPELVIS", "CHESTABDPELVIS"),
        ("CHEST/ABD/PELVIS", "CHESTABDPELVIS"),
        ("Chest Abdomen", "CHESTABDOMEN"),
        ("ABDOMEN AND PELVIS", "ABDOMENPELVIS"),
        ("LUNG", "LUNG"),
        ("CHEST LUNG", "LUNG"),
        ("HEAD", "HEAD"),
        ("BRAIN", "BRAIN"),
        ("HEADNECK", "HEADNECK"),
        ("Head & Neck", "HEADNECK"),
        ("head neck", "HEADNECK"),
        ("L SPINE", "LSPINE"),
        ("C-SPINE", "CSPINE"),
        ("LUMBAR SPINE", "LSPINE"),
        ("Left Breast", "BREAST"),
        ("RT KNEE", "KNEE"),
        ("KNEE_R", "KNEE"),
        ("BONYPELVIS", "PELVIS"),
        ("WHOLE BODY", "WHOLEBODY"),
        ("Lower extremity", "LOWERLIMB"),
        ("Prostata", "PROSTATE"),
        ("ABDÓMEN", "ABDOMEN"),
        ("HEART LIVER", UNKNOWN),
        ("OUTSIDE FIL", UNKNOWN),
        ("WO INTER", UNKNOWN),
        ("CT", UNKNOWN),
        ("OTHER", UNKNOWN),
        ("../../etc", UNKNOWN),
        ("", UNKNOWN),
        (None, UNKNOWN),
    ],
)
def test_body_parts_as_archives_write_them(raw: str | None, term: str) -> None:
    assert VOCABULARY.body_part(raw) == term


def test_the_paper_classes_are_terms_of_their_own() -> None:
    names = "Brain, Breast, Liver, Stomach, Leg, Kidney, Chest, Heart, Cervix, Uterus, Thyroid, Rectum, Prostate, "
    names += "Phantom, Pancreas, Ovary, Lung, Head neck, Head, Colon, Bladder"
    classes = names.split(", ")
    terms = [VOCABULARY.body_part(name) for name in classes]
    assert UNKNOWN not in terms
    assert len(set(terms)) == len(classes) == 21


@pytest.mark.parametrize(
    ("raw", "term"),
    [
        ("CT", "CT"),
        (" mr ", "MR"),
        ("XR", "DX"),
        ("MRI", "MR"),
        ("PET", "PT"),
        ("DSA", "XA"),
        ("SPECT", "NM"),
        ("EC", "US"),
        ("ZZ", UNKNOWN),
        ("CT/../..", "CT"),
        ("", UNKNOWN),
        (None, UNKNOWN),
    ],
)
def test_modalities(raw: str | None, term: str) -> None:
    assert VOCABULARY.modality(raw) == term


def test_every_term_maps_to_itself_and_can_name_a_folder() -> None:
    for term in BODY_PARTS:
        assert VOCABULARY.body_part(term) == term
    for term in MODALITIES:
        assert VOCABULARY.modality(term) == term
    assert all(re.fullmatch(r"[A-Z0-9_]+", term) for term in {*BODY_PARTS, *MODALITIES})
    assert len(set(BODY_PARTS)) == len(BODY_PARTS)


def test_every_synonym_leads_to_a_term() -> None:
    """A table entry that names no term, or that another entry hides, would never be noticed."""
    for raw, term in vocabulary_tables.BODY_PART_SYNONYMS.items():
        assert VOCABULARY.body_part(raw) == term, raw
    for raw, term in vocabulary_tables.MODALITY_SYNONYMS.items():
        assert VOCABULARY.modality(raw) == term, raw
    for table in (vocabulary_tables.COMBINED_REGIONS, REGION_CODES):
        assert set(table.values()) <= set(BODY_PARTS)


def test_region_codes_agree_with_the_published_map_from_srt_to_snomed() -> None:
    checked = 0
    for code, term in REGION_CODES.items():
        twin = snomed["SRT"].get(code) or snomed["SCT"].get(code)
        if twin in REGION_CODES:
            assert REGION_CODES[twin] == term, code
            checked += 1
    assert checked > 200


def test_the_coded_region_takes_the_first_known_code() -> None:
    assert VOCABULARY.region(["0000", "T-32000"]) == "HEART"
    assert VOCABULARY.region(["774007"]) == "HEADNECK"
    assert VOCABULARY.region(["t-a0100 "]) == "BRAIN"
    assert VOCABULARY.region([]) == UNKNOWN


def test_a_site_adds_its_own_spellings() -> None:
    site = Vocabulary({"Schädel nativ": "HEAD", "THORAX": "LUNG"})
    assert site.body_part("SCHAEDEL NATIV") == UNKNOWN
    assert site.body_part("SCHADEL  NATIV") == "HEAD"
    assert site.body_part("thorax") == "LUNG"
    assert VOCABULARY.body_part("thorax") == "CHEST"


@pytest.mark.parametrize(
    ("extra", "named"),
    [({"KOPF": "KOPF"}, "'KOPF'"), ({"x": "head"}, "'head'"), ({"x": "../HEAD"}, "HEAD"), ({"--": "HEAD"}, "--")],
)
def test_a_term_outside_the_closed_list_is_refused(extra: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        Vocabulary(extra)


def test_the_version_names_the_mappings_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Vocabulary({"KOPF NATIV": "HEAD", "THORAX": "LUNG"})
    assert VOCABULARY.version == Vocabulary().version != site.version
    assert Vocabulary({"thorax": "LUNG", "Kopf nativ": "HEAD"}).version == site.version, "spelt otherwise, the same"
    assert Vocabulary({"THORAX": "CHEST"}).version == VOCABULARY.version, "already so"
    seen = {VOCABULARY.version, site.version}
    for table in ("MODALITY_SYNONYMS", "ENCLOSING_REGION", "REGION_CODES"):
        with monkeypatch.context() as patched:
            patched.setattr(vocabulary, table, {**getattr(vocabulary, table), "ZZ": "HEAD"})
            seen.add(VOCABULARY.version)
    monkeypatch.setattr(vocabulary, "COMBINED_REGIONS", {frozenset({"ARM", "LEG"}): "EXTREMITY"})
    seen.add(VOCABULARY.version)
    assert len(seen) == 6


def test_nearly_all_that_real_archives_write_has_a_term() -> None:
    """The values of all CT, MR and US series of the Imaging Data Commons, weighted by their instances."""
    index = Path(idc_index_data.__file__).with_name("idc_index.parquet")
    series = parquet.read_table(index, columns=["Modality", "BodyPartExamined", "instanceCount"]).to_pandas()
    named = series[
        series["Modality"].isin(["CT", "MR", "US"]) & series["BodyPartExamined"].fillna("").str.strip().ne("")
    ]
    assert len(named) > 100_000
    counted = named.groupby(["Modality", "BodyPartExamined"])["instanceCount"].sum()
    without = counted[[VOCABULARY.body_part(raw) == UNKNOWN for _, raw in counted.index]]
    listed = ", ".join(f"{modality} {raw!r} {count}" for (modality, raw), count in without.items())
    for modality in ("CT", "MR", "US"):
        share = 1 - without.get(modality, pd.Series(dtype=int)).sum() / counted[modality].sum()
        assert share >= 0.99, f"{modality}: {share:.4f} have a term; without one are {listed}"
    # Values without a term name no part of the body, or a vessel.
    assert {raw for _, raw in without.index} <= {"FEMORALA", "UNKNOWN", "OTHER", "OUTSIDE FIL", "WO INTER"}
