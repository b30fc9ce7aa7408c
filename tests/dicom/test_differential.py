"""Stored values of real files beside those of decoders that the package does not use: DCMTK, imagecodecs, numpy."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from cbmir_spark.dicom import codecs, read
from cbmir_spark.dicom.elements import Array
from cbmir_spark.dicom.quiet import quiet
from cbmir_spark.dicom.read import NotAnImage, Rejected
from tests.support import reference
from tests.support.tools import require_tool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

MOST_FRAMES = 12  # of each file
# By transfer syntax; 0 of any other. Two inverse transforms of JPEG differ by a level of 8 bits, or by four of 12 bits,
# which libjpeg computes with as many fractional bits as those of 8. JPEG 2000 with loss rounds real numbers.
BOUNDS = {
    "1.2.840.10008.1.2.4.50": 1,
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{part}" for part in (51, 53, 55)), 4),
    "1.2.840.10008.1.2.4.91": 1,
}
# Files that a decoder reads as something else, or not at all.
EXPLAINED = {
    (
        "SC_rgb_jpeg.dcm",
        "dcmdjpeg",
    ): "the file is implicit under an explicit transfer syntax, which DCMTK does not read",
    ("rtdose_expb.dcm", "dcmconv"): "DCMTK swaps OW by 16 bits, where the samples, those of rtdose.dcm, have 32",
    ("rtdose_expb_1frame.dcm", "dcmconv"): "the same",
    ("FreezePattern.dcm", "dcmconv"): "DCMTK ends at an item outside a sequence",
    ("GH364.dcm", "dcmdjpls"): "DCMTK ends at an item outside a sequence",
    ("GH1339.dcm", "dcmdjpeg"): "no delimiter closes the fragments, as DCMTK requires",
    ("JLSL_08_07_0_1F.dcm", "dcmdjpls"): "DCMTK refuses the stream of 7 bits, which imagecodecs reads",
}
TOOLS = ("dcmconv", "dcmdjpeg", "dcmdjpls", "dcmdrle")


@dataclass
class Comparison:
    """Number of equal files by decoder, and the difference of each other file and decoder."""

    equal: Counter[str] = field(default_factory=Counter)
    different: dict[tuple[str, str], str] = field(default_factory=dict)


def compare(paths: Iterable[Path], scratch: Path) -> Comparison:
    found = Comparison()
    seen = set()
    for path in sorted(paths):
        content = path.read_bytes()
        if content in seen:
            continue
        seen.add(content)
        try:
            with quiet():
                ds, layout, sop_class = read._open(content)
                described = read._stored(ds, layout, sop_class)
        except (NotAnImage, Rejected):
            continue
        for decoder in reference.decoders_of(described.transfer_syntax):
            with quiet():
                ours = codecs.decode(ds, layout, described, range(min(MOST_FRAMES, described.frames)))
                try:
                    theirs = reference.frames_of(path, decoder, described.frames, scratch)
                    problem = _difference(ours, theirs, BOUNDS.get(described.transfer_syntax, 0))
                except (reference.Unreadable, Rejected) as error:
                    problem = f"{type(error).__name__}: {error}"
            if problem:
                found.different[path.name, decoder] = problem
            else:
                found.equal[decoder] += 1
    return found


def _difference(ours: Iterable[tuple[int, Array, str]], theirs: Iterator[Array], bound: int) -> str:
    for number, array, _ in ours:
        other = next(theirs, None)
        if other is None:
            return f"frame {number} is not there"
        if array.shape != other.shape:
            return f"frame {number} is {array.shape}, not {other.shape}"
        apart = np.abs(array.astype(np.float64) - other)
        if np.nanmax(apart, initial=0) > bound:
            return f"frame {number} differs by {apart.max():g}"
    return ""


@pytest.fixture(autouse=True)
def tools() -> None:
    for name in TOOLS:
        require_tool(name)


def test_files_of_pydicom_have_the_values_that_other_decoders_find(tmp_path: Path) -> None:
    folder = Path(str(get_testdata_file("CT_small.dcm", download=False))).parent
    found = compare((path for path in folder.rglob("*") if path.is_file()), tmp_path)
    assert {file: problem for file, problem in found.different.items() if file not in EXPLAINED} == {}
    least = Counter(dcmconv=50, dcmdjpeg=15, dcmdjpls=5, dcmdrle=9, imagecodecs=28)
    assert found.equal >= least, found.equal


@pytest.mark.slow
def test_files_of_the_index_have_the_values_that_other_decoders_find(tmp_path: Path, shared_data: Path) -> None:
    found = compare((path for path in (shared_data / "dicom").rglob("*") if path.is_file()), tmp_path)
    assert {file: problem for file, problem in found.different.items() if file not in EXPLAINED} == {}
    least = Counter(dcmconv=205, dcmdjpeg=61, dcmdjpls=16, dcmdrle=15, imagecodecs=104)
    assert found.equal >= least, found.equal


def test_the_reference_on_values_worked_by_hand() -> None:
    """What is compared could be equal because both are wrong: bits and chroma of three small frames."""
    ds = pydicom.Dataset()
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, 2, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 1
    ds.PixelData = bytes.fromhex("ff5f 0008")
    assert [frame.tolist() for frame in reference.native_frames(ds, has_unused_bits=True)] == [[[-1, -2048]]]
    ds.PixelRepresentation = 0
    assert [frame.tolist() for frame in reference.native_frames(ds, has_unused_bits=True)] == [[[0xFFF, 0x800]]]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated = 3, "YBR_FULL_422", 8
    ds.BitsStored, ds.HighBit, ds.PixelData = 8, 7, bytes([1, 2, 3, 4])
    (frame,) = reference.native_frames(ds, has_unused_bits=True)
    assert frame.tolist() == [[[1, 3, 4], [2, 3, 4]]]
