"""Files that are cut, that are not DICOM, and that lie about their contents."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from cbmir_spark.dicom import preflight
from cbmir_spark.dicom.preflight import EXPLICIT_LITTLE
from cbmir_spark.dicom.read import NotAnImage, Reason, Rejected
from cbmir_spark.dicom.stored import RLE
from tests.support.bombs import deep, deflate_bomb, deflated, encapsulated, huge_length, patched
from tests.support.damaged import pixel_end
from tests.support.dicom_files import SAMPLES, read, real


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"MZ\x90\x00" + bytes(500), Reason.NOT_DICOM),
        (b"\x7fELF" + bytes(500), Reason.NOT_DICOM),
        (b"\x08\x00" + bytes(500), Reason.NOT_DICOM),
        (b"\x02\x00\x10\x00UI\x04\x001.2\x00" * 20, Reason.NOT_DICOM),
        (bytes(range(256)) * 8, Reason.NOT_DICOM),
    ],
)
def test_bytes_that_are_no_dicom(content: bytes, reason: Reason) -> None:
    with pytest.raises(NotAnImage) as error:
        read(content)
    assert error.value.reason == reason


def test_an_executable_in_the_preamble_changes_nothing() -> None:
    content = real("CT_small.dcm")
    polyglot = b"MZ" + b"\x90" * 126 + content[128:]
    assert np.array_equal(read(polyglot).frames[0].pixels, read(content).frames[0].pixels)


def test_an_empty_object() -> None:
    with pytest.raises(Rejected) as error:
        read(b"")
    assert error.value.reason == Reason.EMPTY


def test_a_data_set_without_preamble_or_meta_information() -> None:
    with_meta = real("MR_small_implicit.dcm")
    layout = preflight.examine(with_meta)
    bare = with_meta[layout.start :]
    assert bare[:2] == b"\x08\x00"
    assert np.array_equal(read(bare).frames[0].pixels, read(with_meta).frames[0].pixels)
    with pytest.raises(Rejected) as error:
        read(bare[:-100])
    assert error.value.reason == Reason.TRUNCATED


def test_a_truncated_real_file() -> None:
    with pytest.raises(Rejected) as error:
        read(real("MR_truncated.dcm"))
    assert error.value.reason == Reason.TRUNCATED
    with pytest.raises(Rejected) as error:
        read(real("rtplan_truncated.dcm"))
    assert error.value.reason == Reason.TRUNCATED


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_cut_anywhere_is_never_accepted(name: str) -> None:
    """pydicom accepts 94 of 100 such files; here none, unless it lost only bytes behind the pixel data."""
    content = real(name)
    assert read(content).frames
    needed = pixel_end(content)
    source = random.Random(name)
    cuts = {source.randrange(1, len(content)) for _ in range(40)} | {len(content) - n for n in range(1, 12)}
    for cut in sorted(cuts):
        try:
            read(content[:cut])
        except Rejected as error:
            # NO_PIXELS where the cut fell between two elements before the pixels.
            assert error.reason in (Reason.TRUNCATED, Reason.NO_PIXELS), cut
            assert cut < needed or cut < len(content)
        except NotAnImage as error:
            # Cut within the preamble, or right before the SOP class.
            assert error.reason in (Reason.NO_PIXELS, Reason.NOT_DICOM), cut
            assert cut < needed
        else:
            assert cut >= needed, f"accepted {cut} of {len(content)} bytes, {needed} needed"


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (lambda: patched("Rows", 65535), {Reason.TRUNCATED}),
        (lambda: encapsulated(1, Rows=65535, Columns=65535), {Reason.TOO_LARGE}),
        (lambda: encapsulated(1000, Rows=65535, Columns=65535), {Reason.TOO_LARGE}),
        (lambda: encapsulated(2**31 - 1), {Reason.TRUNCATED}),
        (lambda: encapsulated(1, Rows=128), {Reason.UNDECODABLE}),
        (lambda: patched("NumberOfFrames", 1000), {Reason.TRUNCATED}),
        (lambda: patched("BitsAllocated", 64), {Reason.TRUNCATED}),
        (lambda: patched("BitsAllocated", 7), {Reason.UNSUPPORTED_FORMAT}),
        (lambda: patched("SamplesPerPixel", 4), {Reason.UNSUPPORTED_FORMAT}),
        (lambda: patched("PhotometricInterpretation", "CMYK"), {Reason.UNSUPPORTED_FORMAT}),
        (lambda: patched("Rows", 0), {Reason.MALFORMED}),
        (lambda: patched("NumberOfFrames", -1), {Reason.MALFORMED}),
        (lambda: patched("PhotometricInterpretation", "PALETTE COLOR"), {Reason.MALFORMED}),
        (lambda: deep(2000), {Reason.TOO_LARGE}),
        (lambda: deep(2000)[:-300], {Reason.TOO_LARGE}),
        (huge_length, {Reason.TRUNCATED}),
        (deflate_bomb, {Reason.TOO_LARGE}),
    ],
)
@pytest.mark.timeout(20)
def test_bombs_and_lies(content: object, reasons: set[Reason]) -> None:
    assert callable(content)
    with pytest.raises(Rejected) as error:
        read(content())
    assert error.value.reason in reasons


def under(syntax: str, content: bytes) -> bytes:
    """The file with another transfer syntax, whose UID has the length of the one it names."""
    before = b"\x02\x00\x10\x00UI\x14\x00"
    at = content.index(before) + len(before)
    assert len(syntax) == 19
    return content[:at] + syntax.encode() + content[at + 19 :]


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (lambda: under(RLE, patched("Rows", 4)), Reason.WRONG_SYNTAX, RLE),
        (lambda: under(EXPLICIT_LITTLE, real("MR_small_RLE.dcm")), Reason.WRONG_SYNTAX, EXPLICIT_LITTLE),
        (lambda: under("1.2.840.10008.1.2.7", real("MR_small_RLE.dcm")), Reason.UNSUPPORTED, "1.2.840.10008.1.2.7"),
        (lambda: under("1.2.840.10008.5.1.4", patched("Rows", 8)), Reason.UNSUPPORTED, "1.2.840.10008.5.1.4"),
        (lambda: under("1.2.276.0.7.1.1.2.3", patched("Rows", 8)), Reason.UNSUPPORTED, "not DICOM's"),
        (lambda: under("MILLER^ANNA 1950-01", patched("Rows", 8)), Reason.UNSUPPORTED, "not DICOM's"),
        (lambda: deflated(b"\xff" * 200), Reason.BAD_DEFLATE, ""),
        (lambda: patched("PhotometricInterpretation", "CMYK"), Reason.UNSUPPORTED_FORMAT, "Photometric Interpretation"),
        (lambda: patched("Rows", 9), Reason.TRUNCATED, "fewer pixels"),
        (lambda: patched("Rows", 8)[:-1], Reason.TRUNCATED, "it ends in PixelData"),
        (lambda: deep(2000), Reason.TOO_LARGE, "sequences nested deeper than 64"),
    ],
)
def test_a_rejection_says_more_without_values(content: Callable[[], bytes], reason: Reason, detail: str) -> None:
    with pytest.raises(Rejected) as error:
        read(content())
    assert error.value.reason == reason
    assert detail in error.value.detail
    assert "MILLER" not in str(error.value) and "1.2.276" not in str(error.value)


def test_a_modest_nesting_is_read() -> None:
    assert read(deep(12)).frames
