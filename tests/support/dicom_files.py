"""Real DICOM files by name, small ones made around given pixels, and what reads them back; no Spark."""

import io
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from cbmir_spark.dicom.preprocessing import Preprocessing
from cbmir_spark.dicom.read import Instance, decode_frames, read_instance
from cbmir_spark.dicom.vocabulary import Vocabulary

VOCABULARY = Vocabulary({})
PREPROCESSING = Preprocessing(
    aspect="keep",
    windows={"CT": {"*": (-160.0, 240.0), "HEAD": (-20.0, 100.0)}, "PT": {"*": (0.0, 10.0)}},
    percentiles=(1.0, 99.0),
    max_frames=8,
)
CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
PET = "1.2.840.10008.5.1.4.1.1.128"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
ULTRASOUND = "1.2.840.10008.5.1.4.1.1.6.1"

TINY: NDArray[np.uint16] = np.arange(64, dtype=np.uint16).reshape(8, 8)

# Whole images of pydicom's, of every encoding and pixel format: what tests damage starts from these.
SAMPLES = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_implicit.dcm",
    "MR_small_padded.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "JPGExtended.dcm",
    "SC_rgb_rle_16bit_2frame.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "SC_rgb_dcmtk_+eb+cy+np.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "SC_rgb_small_odd.dcm",
    "examples_ybr_color.dcm",
    "examples_overlay.dcm",
    "examples_palette.dcm",
    "image_dfl.dcm",
    "693_J2KI.dcm",
    "J2K_pixelrep_mismatch.dcm",
)


@cache
def real(name: str) -> bytes:
    """One of the test files that pydicom's package carries."""
    path = get_testdata_file(name, download=False)
    if path is None:
        raise FileNotFoundError(name)
    return Path(str(path)).read_bytes()


def header(content: bytes) -> Dataset:
    """The whole file as pydicom reads it."""
    return pydicom.dcmread(io.BytesIO(content), force=True)


def read(content: bytes, preprocessing: Preprocessing = PREPROCESSING) -> Instance:
    """Read an object with the settings above, in this process."""
    return read_instance(content, preprocessing, VOCABULARY)


def only_frame(content: bytes) -> NDArray[Any]:
    """Decode the stored values of an object that has one frame."""
    (frame,) = decode_frames(content)
    return frame


def stored_in(content: bytes, dtype: str, *shape: int) -> NDArray[Any]:
    """Cut the pixel values of a native file out of its bytes."""
    raw = header(content).PixelData
    return np.frombuffer(raw, dtype=dtype)[: int(np.prod(shape))].reshape(shape)


def header_offset(content: bytes) -> int:
    """Length of the Basic Offset Table, the first item of encapsulated pixel data."""
    (length,) = struct.unpack("<4xL", header(content).PixelData[:8])
    return 8 + int(length)


def written(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def made(pixel_values: NDArray[Any], **elements: object) -> bytes:
    """Make a small native object around pixel values; `elements` are keywords, None leaves one out."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    frames = pixel_values.shape[0] if pixel_values.ndim == 3 else 1
    rows, columns = pixel_values.shape[-2:]
    defaults: dict[str, object] = {
        "SOPClassUID": CT,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "Modality": "CT",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "NumberOfFrames": frames if frames > 1 else None,
        "Rows": rows,
        "Columns": columns,
        "BitsAllocated": 8 * pixel_values.dtype.itemsize,
        "BitsStored": 8 * pixel_values.dtype.itemsize,
        "HighBit": 8 * pixel_values.dtype.itemsize - 1,
        "PixelRepresentation": int(pixel_values.dtype.kind == "i"),
    }
    for keyword, value in {**defaults, **elements}.items():
        if value is not None:
            setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID") or generate_uid()
    data = pixel_values.tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OW" if pixel_values.dtype.itemsize > 1 else "OB"
    return written(ds)


def item(**elements: object) -> Dataset:
    """Make the item of a sequence."""
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds
