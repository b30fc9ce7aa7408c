"""An archive in which every attribute that could tell of a person holds a value of its own, and what finds such values.

The attributes are all of the DICOM data dictionary (PS3.6), and so all that the Basic Application Level Confidentiality
Profile names (PS3.15 Table E.1-1), but for those that make an object an image and those that TAGS may keep. Values can
be told from everything else by how they begin: text, personal names in three character sets, UIDs, numbers. Dates are
of the eighth century, which no number is taken for, or, where ingest makes something of them, of the early twentieth.
"""

import binascii
import hashlib
import io
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pydicom
from pydicom import uid
from pydicom.datadict import DicomDictionary, dictionary_VR, tag_for_keyword  # type: ignore[attr-defined]
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence

TEXT = "ZQXJVK"
LATIN = "ÞÆÐØ"
KANJI = "鑿齲贔"
NUMBER = "73914826"
UID_ROOT = f"1.2.826.0.1.{NUMBER}."
TIME = "073914."
FIRST_DAY, FIRST_REAL_DAY = date(701, 1, 1), date(1901, 1, 1)

# Digits as kana, so that a name in kanji is one of a kind.
_KANA = "あいうえおかきくけこ"
_CHARACTER_SETS = {
    "ISO_IR 100": lambda number: f"{LATIN}{number:05d}^{TEXT}{number:05d}W",
    "ISO_IR 192": lambda number: f"{LATIN}{KANJI}{number:05d}^{TEXT}{number:05d}W",
    "ISO 2022 IR 87": lambda number: (
        f"{TEXT}{number:05d}W^{TEXT}={KANJI}{''.join(_KANA[int(digit)] for digit in f'{number:05d}')}^{KANJI}"
    ),
}


def _words(text: str) -> list[str]:
    return text.split()


# Groups that are no attributes of an image: commands, file meta information, media directories, pixels, delimiters.
_OTHER_GROUPS = {0x0000, 0x0002, 0x0004, 0x0028, 0x7FE0, 0xFFFE}
# What an image is made of, and what TAGS may keep: values in other places than these would be leaks.
KEPT = _words("""
    SpecificCharacterSet SOPClassUID Modality ImageType ConversionType BurnedInAnnotation BodyPartExamined PatientSex
    PatientAge Laterality ImageLaterality FrameLaterality ViewPosition SliceThickness ImagerPixelSpacing
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence SequenceOfUltrasoundRegions
    AnatomicRegionSequence LengthToEnd
""")
# Attributes in which text is out of place.
_MALFORMED = _words("""
    Rows BitsAllocated BitsStored SamplesPerPixel PixelRepresentation PhotometricInterpretation NumberOfFrames
    PixelSpacing RescaleSlope RescaleIntercept WindowCenter WindowWidth VOILUTFunction PixelPaddingValue
    PixelAspectRatio PlanarConfiguration SliceThickness SOPClassUID SOPInstanceUID SeriesInstanceUID
    StudyInstanceUID Modality BodyPartExamined PatientSex PatientAge PatientBirthDate StudyDate ImageType
    Laterality ViewPosition BurnedInAnnotation SpecificCharacterSet ModalityLUTSequence VOILUTSequence
    SharedFunctionalGroupsSequence
""")
_GROUP_28 = (
    "ImagePresentationComments",
    "PixelIntensityRelationship",
    "QualityControlImage",
    "PaletteColorLookupTableUID",
    "LargePaletteColorLookupTableUID",
)
_TOKEN_LENGTH = len(TEXT) + 6


def attributes() -> list[int]:
    """Tags that get a value of their own."""
    found = [tag for tag, entry in DicomDictionary.items() if tag >> 16 not in _OTHER_GROUPS and entry[4] not in KEPT]
    extra = [tag_for_keyword(keyword) for keyword in _GROUP_28]
    return sorted({*found, *(tag for tag in extra if tag is not None)})


@dataclass
class Tokens:
    """Makes values that occur once, and remembers them."""

    count: int = 0
    dates: set[str] = field(default_factory=set)
    days: set[str] = field(default_factory=set)
    numbers: set[str] = field(default_factory=set)
    digests: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        return self._kept(f"{TEXT}{self._next():05d}W")

    def name(self, character_set: str) -> str:
        return self._kept(_CHARACTER_SETS[character_set](self._next()))

    def uid(self) -> str:
        return self._kept(f"{UID_ROOT}{self._next()}")

    def day(self, real: bool = False) -> str:
        number = self._next()
        day = (FIRST_REAL_DAY if real else FIRST_DAY) + timedelta(days=number)
        plain = f"{day.year:04d}{day.month:02d}{day.day:02d}"
        (self.days if real else self.dates).add(plain)
        self.dates |= {day.isoformat(), f"{day.year:04d}.{day.month:02d}.{day.day:02d}"}
        return self._kept(plain)

    def number(self, sign: int = 1) -> int:
        number = sign * int(f"7391{self._next():05d}")
        self.numbers.add(str(number))
        self._kept(str(number))
        return number

    def decimal(self) -> str:
        return self._kept(f"{NUMBER}.{self._next():05d}")

    def time(self) -> str:
        return self._kept(f"{TIME}{self._next():06d}")

    def of(self, vr: str, character_set: str) -> object:
        """A value of the given representation; None where it has no room for one of a kind."""
        kind = vr.split(" or ")[-1]
        if kind in ("AE", "CS", "LO", "LT", "SH", "ST", "UC", "UR", "UT"):
            return self.text()
        if kind == "PN":
            return self.name(character_set)
        if kind == "UI":
            return self.uid()
        if kind == "DA":
            return self.day()
        if kind == "DT":
            return self.day() + self.time()
        if kind == "TM":
            return self.time()
        if kind == "DS":
            return self.decimal()
        if kind == "FD":
            return float(self.decimal())
        if kind in ("UL", "UV"):
            return self.number()
        if kind in ("IS", "SL", "SV"):
            return self.number(-1)  # which no count and no duration is
        if kind in ("OB", "OW", "OD", "OF", "OL", "OV", "UN"):
            return (self.text() + self.text()).encode()  # 24 bytes: whole words of each of them
        return {"FL": 7391.5, "US": 7391, "SS": 7391, "AS": "044Y"}.get(kind)

    def _next(self) -> int:
        self.count += 1
        return self.count

    def _kept(self, value: str) -> str:
        forms = {value, value.replace("^", " "), *value.split("^"), *value.split("=")}
        for form in forms:
            for encoding in ("utf-8", "latin-1"):
                content = form.encode(encoding, "replace")
                self.digests[hashlib.sha256(content).hexdigest()] = form
        return value


def fill(folder: Path, files: int) -> Tokens:
    """Write the archive: `files` sound images that share out all attributes, then objects with malformed values."""
    tokens = Tokens()
    tags = attributes()
    for number in range(files):
        character_set = list(_CHARACTER_SETS)[number % 3]
        ds = _image(tokens, number, character_set)
        for tag in tags[number::files]:
            _plant(ds, tag, tokens, character_set)
        # Anything may sit in a sequence, and below that in another.
        inner = _item(tokens, character_set)
        inner.ReferencedStudySequence = Sequence([_item(tokens, character_set)])
        ds.RequestAttributesSequence = Sequence([inner])
        block = ds.private_block(0x0009, tokens.text(), create=True)
        block.add_new(0x01, "LO", tokens.text())
        block.add_new(0x02, "PN", tokens.name(character_set))
        block.add_new(0x03, "SQ", Sequence([_item(tokens, character_set)]))
        if number % 6 == 5:
            _overlay(ds, tokens)
        _write(ds, folder, tokens, number)
    _malformed(folder, tokens)
    return tokens


def _image(tokens: Tokens, number: int, character_set: str) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = (
        uid.ExplicitVRLittleEndian,
        uid.ImplicitVRLittleEndian,
        uid.DeflatedExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
    )[number % 4]
    ds.file_meta.SourceApplicationEntityTitle = tokens.text()
    ds.file_meta.PrivateInformationCreatorUID = uid.UID(tokens.uid())
    ds.file_meta.PrivateInformation = (tokens.text() + tokens.text()).encode()
    ct = number % 2 == 0
    ds.SpecificCharacterSet = ["", character_set] if character_set.startswith("ISO 2022") else character_set
    ds.SOPClassUID = uid.CTImageStorage if ct else uid.MRImageStorage
    ds.Modality, ds.BodyPartExamined = ("CT", "CHEST") if ct else ("MR", "HEAD")
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.PatientName = tokens.name(character_set)
    ds.PatientID, ds.AccessionNumber, ds.StudyID = tokens.text(), tokens.text(), tokens.text()
    ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID = tokens.uid(), tokens.uid(), tokens.uid()
    ds.PatientBirthDate, ds.StudyDate, ds.StudyTime = tokens.day(real=True), tokens.day(real=True), tokens.time()
    ds.PatientSex = "F"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.Rows = ds.Columns = 32
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    rows, columns = np.mgrid[0:32, 0:32]
    noise = np.random.default_rng(number).integers(0, 64, (32, 32))
    pixels = (rows if ct else columns) * 60 + noise
    order = ">u2" if ds.file_meta.TransferSyntaxUID == uid.ExplicitVRBigEndian else "<u2"
    ds.add_new("PixelData", "OW", pixels.astype(order).tobytes())
    return ds


def _plant(ds: Dataset, tag: int, tokens: Tokens, character_set: str) -> None:
    vr, tagged = dictionary_VR(tag), tag in ds
    if vr == "SQ":
        ds.add_new(tag, "SQ", Sequence([_item(tokens, character_set)]))
        return
    value = tokens.of(vr, character_set)
    if value is not None and not tagged:
        ds.add_new(tag, vr.split(" or ")[-1], value)


def _item(tokens: Tokens, character_set: str) -> Dataset:
    item = Dataset()
    item.PatientName = tokens.name(character_set)
    item.PatientID, item.CodeMeaning, item.TextValue = tokens.text(), tokens.text(), tokens.text()
    item.ReferencedSOPInstanceUID, item.StudyDate = tokens.uid(), tokens.day()
    block = item.private_block(0x0011, tokens.text(), create=True)
    block.add_new(0x07, "UT", tokens.text())
    return item


def _overlay(ds: Dataset, tokens: Tokens) -> None:
    for element, vr, value in [
        (0x0010, "US", 16),
        (0x0011, "US", 12),
        (0x0022, "LO", tokens.text()),
        (0x0040, "CS", "G"),
        (0x0050, "SS", [1, 1]),
        (0x0100, "US", 1),
        (0x0102, "US", 0),
        (0x1500, "LO", tokens.text()),
        (0x3000, "OW", (tokens.text() + tokens.text()).encode()),
        (0x4000, "LT", tokens.text()),
    ]:
        ds.add_new((0x6000, element), vr, value)
    ds.add_new((0x5000, 0x3000), "OW", (tokens.text() + tokens.text()).encode())


def _write(ds: Dataset, folder: Path, tokens: Tokens, number: int) -> None:
    """Below folders and under names that tell of somebody, too."""
    name = (tokens.text(), f"{LATIN} {tokens.text()}", f"{KANJI}+{tokens.text()}%20")[number % 3]
    path = folder / tokens.text() / f"{name}.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_written(ds))


def _written(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", UID_ROOT + "0")
        pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def _malformed(folder: Path, tokens: Tokens) -> None:
    """A value of somebody's where a number, a UID or a code has to be, cut and foreign files: the ways of errors."""
    for keyword in _MALFORMED:
        ds = _image(tokens, 0, "ISO_IR 100")
        tag = tag_for_keyword(keyword)
        assert tag is not None
        if keyword in ds:
            del ds[tag]
        # Lower case, or it would pass for a code of Modality and BodyPartExamined, which are kept.
        ds.add_new(tag, "LO", "name " + tokens.text())
        path = folder / tokens.text() / f"{tokens.text()} {keyword}.dcm"
        path.parent.mkdir()
        path.write_bytes(_written(ds))
    whole = _written(_image(tokens, 0, "ISO_IR 100"))
    (folder / f"{tokens.text()} cut.dcm").write_bytes(whole[:-700])
    syntax = whole.replace(b"1.2.840.10008.1.2.1\0", tokens.text().encode() + b"-syntax\0", 1)
    (folder / f"{tokens.text()} syntax.dcm").write_bytes(syntax)
    (folder / f"{tokens.text()} large.dcm").write_bytes(tokens.text().encode() * 200_000)
    (folder / f"{tokens.text()}.txt").write_text(tokens.text())
    (folder / f".{tokens.text()}").write_text(tokens.text() * 90)
    (folder / f"{tokens.text()} empty.dcm").touch()
    with zipfile.ZipFile(folder / f"{tokens.text()}.zip", "w") as packed:
        packed.writestr(tokens.text(), tokens.text())


# --- what finds them ---

_HEX = re.compile(rb"[0-9a-f]{12,}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{11,}")
_DATE = re.compile(rb"(?<![0-9a-z.])(?:[0-9]{8}(?=073914|(?![0-9a-z]))|[0-9]{4}[-.][0-9]{2}[-.][0-9]{2}(?![0-9a-z]))")
_INTEGER = re.compile(rb"(?<![0-9a-z.])-?7391[0-9]{5}(?![0-9a-z])")


def _spellings(text: str) -> Iterator[bytes]:
    """Lower-case bytes of a marker in every encoding that a file could have it in."""
    for form in {text, text.lower(), text.upper()}:
        for encoding in ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "iso2022_jp", "shift_jis", "euc_jp"):
            try:
                content = form.encode(encoding)
            except UnicodeEncodeError:
                continue
            if encoding == "iso2022_jp":
                content = content.removeprefix(b"\x1b$B").removesuffix(b"\x1b(B")
            yield content.strip(b"\0").lower()
        if not form.isascii():
            yield quote(form).encode().lower()
            yield form.encode("unicode_escape").lower()


class Scanner:
    """Finds planted values in bytes: as they are, in any case, in UTF-8, UTF-16, Latin-1 and Japanese encodings, as
    hexadecimal digits, base64 and plain SHA-256."""

    def __init__(self, tokens: Tokens) -> None:
        markers = [TEXT, LATIN, KANJI, UID_ROOT, f"{NUMBER}."]
        self._markers = sorted({spelling for marker in markers for spelling in _spellings(marker)})
        # Doubles between NUMBER and NUMBER + 1 have these bytes in common.
        double = struct.pack("<d", float(f"{NUMBER}.5"))[3:]
        self._markers += [double.lower(), double[::-1].lower()]
        self._dates = {day.encode() for day in tokens.dates}
        self._days = {day.encode() for day in tokens.days}
        self._numbers = {number.encode() for number in tokens.numbers}
        self._digests = {digest.encode() for digest in tokens.digests}

    def find(self, content: bytes, days: bool = True) -> list[str]:
        """What was found, with what stands around it; nothing where there is nothing.

        Without `days` eight digits are no date of the twentieth century: logs have durations in nanoseconds.
        """
        found = self._plain(content, days)
        for number, hidden in enumerate(_decoded(content)):
            found += [f"{'hex' if number < 2 else 'base64'}: {each}" for each in self._plain(hidden, days)]
        return found

    def _plain(self, content: bytes, days: bool) -> list[str]:
        lower, found = content.lower(), []
        for marker in self._markers:
            at = lower.find(marker)
            if at >= 0:
                found.append(_around(content, at, marker))
        dates = self._dates | self._days if days else self._dates
        for pattern, known in ((_DATE, dates), (_INTEGER, self._numbers)):
            found += [_around(content, m.start(), m[0]) for m in pattern.finditer(lower) if m[0] in known]
        found += [_around(content, match.start(), b"time") for match in _TIME.finditer(lower)]
        for match in _DIGEST.finditer(lower):
            digits = match[0]
            if any(digits[start : start + 64] in self._digests for start in range(len(digits) - 63)):
                found.append(_around(content, match.start(), b"SHA-256"))
        return found


_TIME = re.compile(rb"073914\.[0-9]{6}")
_DIGEST = re.compile(rb"[0-9a-f]{64,}")


def _decoded(content: bytes) -> Iterator[bytes]:
    """All that could be hexadecimal digits or base64, decoded from each place where such could begin."""
    runs = _HEX.findall(content.lower())
    for start in (0, 1):
        yield b"\n".join(bytes.fromhex(r[start : len(r) - (len(r) - start) % 2].decode()) for r in runs)
    runs = [run.translate(bytes.maketrans(b"-_", b"+/")) for run in _BASE64.findall(content)]
    for start in range(4):
        parts = [run[start : len(run) - ((len(run) - start) % 4 == 1)] for run in runs]
        yield b"\n".join(binascii.a2b_base64(part + b"=" * (-len(part) % 4)) for part in parts)


def _around(content: bytes, at: int, what: bytes) -> str:
    return f"{what!r} in {content[max(0, at - 40) : at + 60]!r}"
