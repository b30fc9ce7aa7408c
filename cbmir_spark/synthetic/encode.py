"""Write pixels into data sets, and data sets as files in several transfer syntaxes."""

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames

__all__ = ["as_bytes", "set_gray_pixels", "set_pixels"]


def set_gray_pixels(ds: Dataset, values: NDArray[np.generic], stored: int, photometric: str = "MONOCHROME2") -> None:
    """Fill the Image Pixel module with gray values (rows, columns) of `stored` bits."""
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = photometric
    set_pixels(ds, values, stored)


def set_pixels(ds: Dataset, values: NDArray[np.generic], stored: int) -> None:
    """Fill the Image Pixel module (PS3.3 section C.7.6.3) but for samples and photometric interpretation.

    `values` are little-endian, (rows, columns) or (rows, columns, 3), of `stored` bits.
    """
    ds.Rows, ds.Columns = values.shape[:2]
    ds.BitsAllocated = values.dtype.itemsize * 8
    ds.BitsStored = stored
    ds.HighBit = stored - 1
    ds.PixelRepresentation = int(values.dtype.kind == "i")
    content = values.tobytes()
    ds.add_new("PixelData", "OB" if values.dtype.itemsize == 1 else "OW", content + b"\0" * (len(content) % 2))


def as_bytes(ds: Dataset, syntax: uid.UID) -> bytes:
    """Encode a data set with native little-endian pixels as a file (PS3.10 section 7) in a transfer syntax.

    Changes the data set. Encodes the uncompressed syntaxes, RLE, JPEG baseline, lossless JPEG, JPEG-LS and JPEG 2000.
    """
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    if syntax in (uid.JPEGLSLossless, uid.JPEGLosslessSV1):
        _encapsulate(ds, _gdcm_codestream(as_bytes(ds, uid.ExplicitVRLittleEndian), syntax), syntax)
    elif syntax == uid.JPEGBaseline8Bit:
        _jpeg(ds)
    elif syntax == uid.JPEG2000Lossless:
        ds.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    elif syntax == uid.RLELossless:
        ds.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
    elif syntax == uid.ExplicitVRBigEndian and ds.BitsAllocated == 16:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    ds.file_meta.TransferSyntaxUID = syntax
    stream = io.BytesIO()
    ds.save_as(
        stream,
        enforce_file_format=True,
        implicit_vr=syntax.is_implicit_VR,
        little_endian=syntax.is_little_endian,
    )
    return stream.getvalue()


def _jpeg(ds: Dataset) -> None:
    """Compress pixels as JPEG baseline, and declare the loss (PS3.3 section C.7.6.1.1.5)."""
    gray = ds.SamplesPerPixel == 1
    shape = (ds.Rows, ds.Columns) if gray else (ds.Rows, ds.Columns, 3)
    native = ds.PixelData[: int(np.prod(shape))]
    stream = io.BytesIO()
    # YBR_FULL_422 means 4:2:2 subsampling (PS3.5 section 8.2.1).
    Image.fromarray(np.frombuffer(native, "u1").reshape(shape)).save(stream, "JPEG", quality=92, subsampling=1)
    if not gray:
        ds.PhotometricInterpretation = "YBR_FULL_422"
    ds.LossyImageCompression = "01"
    ds.LossyImageCompressionRatio = f"{len(native) / len(stream.getvalue()):.1f}"
    ds.LossyImageCompressionMethod = "ISO_10918_1"
    _encapsulate(ds, stream.getvalue(), uid.JPEGBaseline8Bit)


def _encapsulate(ds: Dataset, codestream: bytes, syntax: uid.UID) -> None:
    ds.PixelData = encapsulate([codestream])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax


def _gdcm_codestream(content: bytes, syntax: uid.UID) -> bytes:
    """Compress a native file's pixels as JPEG-LS or lossless JPEG, for which pydicom has no encoder, through files."""
    # The import makes all symbols of GDCM's codecs global: avoid it where nothing is drawn.
    import gdcm

    wanted = {
        uid.JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
        uid.JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    }[syntax]
    with tempfile.TemporaryDirectory(prefix="cbmir-") as scratch:
        source, target = os.path.join(scratch, "native"), os.path.join(scratch, "encoded")
        Path(source).write_bytes(content)
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(source)
        read = reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(wanted))
        change.SetInput(reader.GetImage())
        changed = read and change.Change()
        writer.SetFileName(target)
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        if not (changed and writer.Write()):
            raise RuntimeError(f"GDCM did not encode a phantom as {syntax.name}")
        encoded = pydicom.dcmread(target)
    return next(generate_frames(encoded.PixelData, number_of_frames=1))
