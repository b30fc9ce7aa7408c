"""Identifiers from raw bytes: whole, and the same however a writer spells its character set."""

import pytest

from tests.support.dicom_files import read
from tests.support.patients import named

# pydicom warns about the placeholders that these objects are made with; nothing of ours does.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

UTF_8, LATIN_1, JAPANESE = "é山1".encode(), "é1".encode("latin-1"), "山田1".encode("iso2022_jp")


@pytest.mark.parametrize(
    ("raw", "charset", "text"),
    [
        *((UTF_8, each, "é山1") for each in ("ISO_IR 192", "UTF-8", "ISO 192", "iso_ir_192", "ISO 2022 IR 192", "")),
        *((UTF_8, each, "é山1") for each in ("ISO_IR 6", "\\ISO_IR 192", "ISO_IR 999")),
        *((LATIN_1, each, "é1") for each in ("ISO_IR 100", "ISO-IR 100", "ISO IR 100", " ISO_IR 100", "ISO8859-1")),
        # Undeclared, or declared as something that it is not.
        *((LATIN_1, each, "é1") for each in ("", "ISO_IR 192", "\\ISO 2022 IR 100")),
        *((JAPANESE, each, "山田1") for each in ("\\ISO 2022 IR 87", "ISO 2022 IR 87", "ISO_IR 87")),
        ("김".encode("euc_kr"), "\\ISO 2022 IR 149", "김"),
        (b"\x1b$)C" + "김".encode("euc_kr"), "\\ISO 2022 IR 149", "김"),
        (b"\x1b$)A" + "张".encode("gb2312"), "\\ISO 2022 IR 58", "张"),
        # The second byte of this character is that of a backslash.
        ("運\\1".encode("gb18030"), "GB18030", "運\\1"),
        ("ソ\\1".encode("shift_jis"), "SHIFT_JIS", "ソ\\1"),
        (b"SITE\\0001", "ISO_IR 13", "SITE\\0001"),
        (b"  A B\\ C \0", "", "A B\\ C"),
        (b" \0", "", None),
    ],
)
def test_a_patient_id_is_whole_in_any_character_set(raw: bytes, charset: str, text: str | None) -> None:
    tags = read(named(raw, charset, b"HOSP\\A ")).tags
    assert (tags.patient_id_raw, tags.patient_issuer) == (text, "HOSP\\A")


def test_different_bytes_are_different_identifiers() -> None:
    for charset in ("", "ISO_IR 192"):
        found = {read(named(bytes([65, high]), charset)).tags.patient_id_raw for high in range(128, 256)}
        assert len(found) == 128


def test_escape_sequences_that_nothing_declares_stay_part_of_an_identifier() -> None:
    escaped, plain = (read(named(raw)).tags.patient_id_raw for raw in (b"\x1b$B;3ED\x1b(B", b";3ED"))
    assert escaped != plain


@pytest.mark.parametrize("charset", ["hex", "base64", "rot13", "punycode", "idna"])
def test_codecs_of_python_that_decode_no_text_are_no_character_sets(charset: str) -> None:
    assert read(named("é1".encode("latin-1"), charset)).tags.patient_id_raw == "é1"
    assert read(named(b"A\x1b(B1", charset)).tags.patient_id_raw is not None
