"""People with Patient IDs as archives have them: any character set, backslashes, blanks, undecodable bytes, issuers."""

import random
import string
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.charset import convert_encodings, encode_string

from tests.support.dicom_files import TINY, made

# Specific Character Set, and characters that it can write.
CHARACTER_SETS = {
    "": string.ascii_letters + string.digits + " -_.#/^'\",",
    "ISO_IR 100": "Aé ñüßÿ¥£",
    "ISO_IR 101": "Ałżźő1",
    "ISO_IR 109": "Ħħĝ1",
    "ISO_IR 110": "ĀāķĶ1",
    "ISO_IR 126": "αβγΩ1",
    "ISO_IR 127": "ابتث1",
    "ISO_IR 138": "אבגד1",
    "ISO_IR 144": "ЖдиЯ 7",
    "ISO_IR 148": "ĞğİıŞ1",
    "ISO_IR 166": "กขคง1",
    "ISO_IR 13": "ｱｲｳｴ1A",
    "ISO_IR 192": "山ж é😀1",
    "GB18030": "张三李四1é",
    "GBK": "张三李四1",
    "\\ISO 2022 IR 87": "山田太郎1",
    "\\ISO 2022 IR 149": "김희중1",
    "\\ISO 2022 IR 58": "张三李1",
    "ISO 2022 IR 100\\ISO 2022 IR 144": "éЖд1",
}


@dataclass(frozen=True)
class Person:
    """One person: the Patient ID and issuer as people read them, and as bytes of a character set."""

    patient_id: str
    issuer: str
    charset: str = field(compare=False)
    raw_id: bytes = field(compare=False)
    raw_issuer: bytes = field(compare=False)


def people(count: int, seed: int) -> list[Person]:
    """Draw different people. A quarter have equal IDs of several issuers, a tenth IDs that do not decode."""
    draw = random.Random(seed)
    found: dict[Person, None] = {}
    while len(found) < count:
        charset = draw.choice(list(CHARACTER_SETS))
        undecodable = draw.random() < 0.1
        if undecodable:
            # No text in UTF-8, or not in the default repertoire: read as Latin-1.
            charset = draw.choice(["ISO_IR 192", ""])
            text = "".join(draw.choice("ABC\\") for _ in range(6)) + chr(draw.randrange(0xC0, 0x100))
            raw = text.encode("latin-1")
        else:
            text = _text(draw, CHARACTER_SETS[charset])
            raw = _encode(text, charset)
        issuers = [""] if draw.random() < 0.75 else ["", "HOSP A", "HOSP\\B", "H" + text[:2].strip()]
        for issuer in issuers:
            if text.strip(" \\") and issuer.isascii():
                found.setdefault(Person(text.strip(" "), issuer, charset, raw, issuer.encode("ascii")))
    return list(found)[:count]


def _text(draw: random.Random, characters: str) -> str:
    """A short text, often of parts separated by backslashes, often with blanks around it, which are padding."""
    parts = ["".join(draw.choice(characters) for _ in range(draw.randint(1, 6))) for _ in range(draw.randint(1, 3))]
    return draw.choice(["", "", " "]) + draw.choice(["\\", "\\\\"]).join(parts) + draw.choice(["", "", "  "])


def _encode(text: str, charset: str) -> bytes:
    if charset == "ISO_IR 13":
        return text.encode("shift_jis")
    if charset == "\\ISO 2022 IR 58":
        return b"".join(char.encode("ascii") if char.isascii() else b"\x1b$)A" + char.encode("gb2312") for char in text)
    return encode_string(text, convert_encodings(charset.split("\\")))


def named(raw_id: bytes, charset: str = "", raw_issuer: bytes = b"", **elements: object) -> bytes:
    """Make an image whose Patient ID and issuer are these bytes, whatever its Specific Character Set is."""
    raw_id, raw_issuer = (raw + b" " * (len(raw) % 2) for raw in (raw_id, raw_issuer))
    # The bytes are put in afterwards: pydicom would decode and encode them.
    content = made(
        TINY,
        **elements,
        SpecificCharacterSet=["Q" * len(term) for term in charset.split("\\")] if charset else None,
        PatientID="@" * len(raw_id),
        IssuerOfPatientID="&" * len(raw_issuer) or None,
    )
    declared = "\\".join("Q" * len(term) for term in charset.split("\\")).encode()
    places = {declared: charset.encode(), b"@" * len(raw_id): raw_id, b"&" * len(raw_issuer): raw_issuer}
    for placeholder, raw in places.items():
        if raw:
            assert content.count(placeholder) == 1
            content = content.replace(placeholder, raw)
    return content


def write(person: Person, folder: Path, number: int) -> str:
    """Write an image of a person, in a study of its own; returns its SOP Instance UID."""
    uid = f"1.2.826.1.{number}"
    of_image = {"SOPInstanceUID": uid, "StudyInstanceUID": f"1.2.826.2.{number}"}
    content = named(person.raw_id, person.charset, person.raw_issuer, **of_image)
    (folder / f"{number}.dcm").write_bytes(content)
    return uid
