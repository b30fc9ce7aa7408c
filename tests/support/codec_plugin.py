"""A pydicom plugin for JPEG that dies in a given way, for processes that decode: `sitecustomize` on their path adds it.

A file with `FAULT:hang` in its pixel data makes the codec hang, where a native codec would.
"""

import textwrap
from pathlib import Path

from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit

from tests.support.dicom_files import header, real, written

_CODEC = """
    import os, signal, sys, time

    DECODER_DEPENDENCIES = {"1.2.840.10008.1.2.4.50": ("numpy",)}

    def is_available(uid):
        return True

    class PanicException(BaseException):
        pass

    def decode(src, runner):
        fault = bytes(src).split(b"FAULT:")[-1].split(b"!")[0].decode()
        if fault == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "abort":
            os.abort()
        if fault == "hang":
            while True:
                pass
        if fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "exit":
            os._exit(0)
        if fault == "sys.exit":
            sys.exit(0)
        if fault == "panic":
            raise PanicException("panicked")
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "memory":
            hoard = []
            while True:
                hoard.append(bytearray(2**24))
        if fault == "noise":
            os.write(1, b"\\xff" * 100_000)
            os.write(2, b"\\xff" * 100_000)
        raise ValueError("no such fault")
"""
_SITE = """
    from pydicom.pixels.decoders.base import JPEGBaseline8BitDecoder as decoder

    for label in decoder.available_plugins:
        decoder.remove_plugin(label)
    decoder.add_plugin("faulty", ("faulty_codec", "decode"))
"""


def install(folder: Path) -> None:
    """Write the codec into a folder; every Python process with that folder on its path then has it."""
    (folder / "faulty_codec.py").write_text(textwrap.dedent(_CODEC))
    (folder / "sitecustomize.py").write_text(textwrap.dedent(_SITE))


def faulty(fault: str) -> bytes:
    """Make a file on which the codec dies in the given way."""
    ds = header(real("MR_small_RLE.dcm"))
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    # A frame header of 64×64 samples of 8 bits and an end, as the codestream has to have before any codec sees it.
    start = bytes.fromhex("ffd8 ffc0 000b 08 0040 0040 01 011100 ffda")
    ds.PixelData = encapsulate([start + f"FAULT:{fault}!".encode().ljust(126, b"\0") + b"\xff\xd9"])
    return written(ds)
