"""Check the structure of a DICOM file before any parser reads it: locate its elements, or find why it is not whole.

pydicom takes a file that ends early for a short one, and inflates a deflated data set without bound. So this module
first walks the structure (PS3.5 sections 7.1, 7.5, A.4 and A.5, PS3.10 section 7.1): every declared length must fit
into the bytes that follow, every list of items must be closed, and every count is bounded before anything is allocated
for it.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MAX_INFLATED_BYTES = 512 * 2**20  # of a deflated data set; scanners do not deflate that many pixels
MAX_DEPTH = 64  # of nested sequences; real reports and functional groups stay below 12
MAX_ELEMENTS = 500_000  # 5,000 frames of an enhanced object carry about 100 elements each


class Reason(StrEnum):
    """Reasons why an object has no image; values of the column `reason`."""

    # not_an_image
    NOT_DICOM = "NOT_DICOM"  # not a DICOM file, whatever its name
    DICOMDIR = "DICOMDIR"  # a media directory
    NOT_IMAGE_CLASS = "NOT_IMAGE_CLASS"  # a report, plan, segmentation, waveform … by its SOP class
    NO_PIXELS = "NO_PIXELS"  # a header without pixel data; rejected where its SOP class is an image's
    # rejected
    EMPTY = "EMPTY"  # an object of no bytes
    TRUNCATED = "TRUNCATED"  # bytes that the file declares are missing
    MALFORMED = "MALFORMED"  # the structure contradicts itself
    NO_UID = "NO_UID"  # no valid SOP Instance UID
    UNSUPPORTED = "UNSUPPORTED"  # a transfer syntax or pixel format without a decoder
    UNDECODABLE = "UNDECODABLE"  # the codec refused the pixel data
    TOO_LARGE = "TOO_LARGE"  # past a bound of size, depth or count, or past the decoder's memory
    TIMEOUT = "TIMEOUT"  # past the decoder's time
    CRASHED = "CRASHED"  # the decoder died
    INTERNAL = "INTERNAL"  # a bug of this package


class NotAnImage(Exception):
    """A valid object that is not an image; `reason` is its kind. The message carries no tag value."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Rejected(Exception):
    """An object that should be an image and cannot be read as one, for `reason`. The message carries no tag value.

    `detail` is the type and line of code of an INTERNAL error, else "".
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value} ({detail})" if detail else reason.value)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Element:
    """One top-level element; offsets in bytes into the data set."""

    tag: int  # group and element in one, such as 0x00080016
    vr: str  # "" where implicit
    header: int  # offset of the element
    offset: int  # of its value
    length: int  # of its value in bytes, with all items
    encapsulated: bool = False  # of undefined length
    fragments: int = 0  # items of an encapsulated value


@dataclass(frozen=True)
class Layout:
    """A whole data set: its bytes, inflated where they were deflated, and its top-level elements by tag."""

    data: memoryview = field(repr=False)
    start: int  # offset of the first element
    transfer_syntax: str
    media_class: str  # SOP class of the file meta information, "" where it names none
    implicit: bool
    little_endian: bool
    elements: Mapping[int, Element] = field(repr=False)

    def value(self, tag: int) -> bytes:
        """Return the raw value of a top-level element; empty where it is absent."""
        element = self.elements.get(tag)
        return bytes(self.data[element.offset : element.offset + element.length]) if element else b""

    def text(self, tag: int) -> str:
        """Return the value of a top-level UI or CS element; empty where it is absent."""
        return self.value(tag).decode("ascii", "replace").strip("\0 ")


IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"

SOP_CLASS = 0x00080016
PIXEL_DATA = 0x7FE00010
PIXEL_DATA_TAGS = (PIXEL_DATA, 0x7FE00008, 0x7FE00009)  # Pixel, Float Pixel, Double Float Pixel Data

_MEDIA_CLASS, _TRANSFER_SYNTAX = 0x00020002, 0x00020010
_TRAILING_PADDING = 0xFFFCFFFC
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
# PS3.5 section 7.1.2: the VRs whose explicit length takes 32 bits.
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))


def examine(content: bytes | bytearray) -> Layout:
    """Walk a file from its first byte to its last.

    Raises Rejected (EMPTY, TRUNCATED, MALFORMED, TOO_LARGE, UNSUPPORTED) or NotAnImage (NOT_DICOM). Ignores the 128
    bytes of the preamble, which may be anything (PS3.10 section 7.1), an executable's header too.
    """
    if not content:
        raise Rejected(Reason.EMPTY)
    view = memoryview(content)
    if content[128:132] == b"DICM":
        return _data_set(view, 132)
    if len(content) < 132 and not any(content[:128]):
        raise Rejected(Reason.TRUNCATED)
    return _without_preamble(view)


def _without_preamble(view: memoryview) -> Layout:
    """Walk a data set that starts at byte 0, as in ACR-NEMA; accept it only if it has a standard SOP class."""
    if bytes(view[:2]) not in (b"\x02\x00", b"\x08\x00", b"\x00\x08"):
        raise NotAnImage(Reason.NOT_DICOM)
    found: dict[int, Element] = {}
    try:
        layout = _data_set(view, 0, found)
    except Rejected:
        if SOP_CLASS in found:
            raise
        raise NotAnImage(Reason.NOT_DICOM) from None
    if not layout.text(SOP_CLASS).startswith("1.2.840.10008."):
        raise NotAnImage(Reason.NOT_DICOM)
    return layout


def _data_set(view: memoryview, start: int, found: dict[int, Element] | None = None) -> Layout:
    """Walk the file meta information and the data set from `start`; elements also go into `found` as they are met."""
    meta: dict[int, Element] = {}
    # PS3.10 section 7.1: group 0002 is explicit little endian whatever follows it.
    start = _Walker(view, implicit=False, little_endian=True).elements(start, meta, only_group=0x0002)
    information = Layout(view, 0, EXPLICIT_LITTLE, "", False, True, meta)
    syntax, media_class = information.text(_TRANSFER_SYNTAX), information.text(_MEDIA_CLASS)
    if syntax == DEFLATED:
        view, start = memoryview(_inflate(view[start:])), 0
    elif syntax and not syntax.startswith("1.2.840.10008.1."):
        raise Rejected(Reason.UNSUPPORTED)
    # Some writers store the command set (PS3.7 section 6.3) before the data set.
    start = _Walker(view, implicit=True, little_endian=True).elements(start, {}, only_group=0x0000)
    little_endian = syntax != EXPLICIT_BIG
    if not syntax and bytes(view[start : start + 2]) == b"\x00\x08":
        little_endian = False
    implicit = _looks_implicit(view, start, assumed=syntax in ("", IMPLICIT_LITTLE))
    if not syntax:
        syntax = IMPLICIT_LITTLE if implicit else EXPLICIT_LITTLE if little_endian else EXPLICIT_BIG
    elements: dict[int, Element] = {} if found is None else found
    end = _Walker(view, implicit, little_endian).elements(start, elements)
    if not elements:
        raise Rejected(Reason.TRUNCATED)
    return Layout(view[:end], start, syntax, media_class, implicit, little_endian, elements)


def _inflate(deflated: memoryview) -> bytes:
    """Inflate a data set (PS3.5 section A.5) up to a bound: a megabyte can inflate to a gigabyte of zeros."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = stream.decompress(deflated, MAX_INFLATED_BYTES)
    except zlib.error:
        raise Rejected(Reason.MALFORMED) from None
    if not stream.eof:
        raise Rejected(Reason.TOO_LARGE if len(data) >= MAX_INFLATED_BYTES else Reason.TRUNCATED)
    return data


def _looks_implicit(view: memoryview, at: int, assumed: bool) -> bool:
    """Tell by the bytes in the place of an explicit VR: some files are encoded in another way than they declare."""
    vr = bytes(view[at + 4 : at + 6])
    return assumed if len(vr) < 2 else not (vr.isalpha() and vr.isupper())


class _Walker:
    """Steps through the elements of a data set in one encoding; counts them against MAX_ELEMENTS."""

    def __init__(self, view: memoryview, implicit: bool, little_endian: bool) -> None:
        self.view = view
        self.implicit = implicit
        self.count = 0
        order = "<" if little_endian else ">"
        self.tag_and_long = struct.Struct(f"{order}HHL").unpack_from
        self.short = struct.Struct(f"{order}H").unpack_from
        self.long = struct.Struct(f"{order}L").unpack_from

    def elements(self, at: int, found: dict[int, Element], only_group: int | None = None) -> int:
        """Walk top-level elements from `at` into `found`; return where they end.

        With `only_group`, stops before the first element of another group.
        """
        end = len(self.view)
        while at < end:
            if end - at < 8:
                return self._padding(at)
            if only_group is not None and self.short(self.view, at)[0] != only_group:
                return at
            tag, vr, offset, length = self._header(at, self.implicit)
            if tag == 0 and length == 0 and only_group is None:
                return self._padding(at)
            if length == _UNDEFINED:
                stop, fragments = self._items(offset, self.implicit, 1)
                # The closing delimiter belongs to the encoding, not to the value.
                found[tag] = Element(tag, vr, at, offset, stop - 8 - offset, True, fragments)
                at = stop
                continue
            if length > end - offset:
                if tag == _TRAILING_PADDING:
                    return at
                raise Rejected(Reason.TRUNCATED)
            found[tag] = Element(tag, vr, at, offset, length)
            at = offset + length
        return at

    def _padding(self, at: int) -> int:
        """Accept zeros up to the end of the file as padding; anything else is the start of a missing element."""
        if any(self.view[at:]):
            raise Rejected(Reason.TRUNCATED)
        return at

    def _header(self, at: int, implicit: bool) -> tuple[int, str, int, int]:
        """Read the element at `at`: tag, VR ("" where implicit), offset of the value, declared length."""
        self.count += 1
        if self.count > MAX_ELEMENTS:
            raise Rejected(Reason.TOO_LARGE)
        view = self.view
        if at + 8 > len(view):
            raise Rejected(Reason.TRUNCATED)
        group, element, length = self.tag_and_long(view, at)
        tag = group << 16 | element
        if implicit or group == 0xFFFE:
            return tag, "", at + 8, length
        vr = bytes(view[at + 4 : at + 6])
        if vr in _LONG_VRS:
            if at + 12 > len(view):
                raise Rejected(Reason.TRUNCATED)
            return tag, vr.decode("ascii"), at + 12, self.long(view, at + 8)[0]
        if vr.isalpha() and vr.isupper():
            return tag, vr.decode("ascii"), at + 8, self.short(view, at + 6)[0]
        return tag, "", at + 8, length

    def _items(self, at: int, implicit: bool, depth: int) -> tuple[int, int]:
        """Walk the items of an undefined length; return the end of the delimiter and the number of items."""
        if depth > MAX_DEPTH:
            raise Rejected(Reason.TOO_LARGE)
        end = len(self.view)
        items = 0
        while True:
            tag, _, offset, length = self._header(at, implicit)
            if tag == _SEQUENCE_END:
                return offset, items
            if tag != _ITEM:
                raise Rejected(Reason.MALFORMED)
            items += 1
            if length == _UNDEFINED:
                at = self._item(offset, implicit or _looks_implicit(self.view, offset, implicit), depth)
                continue
            if length > end - offset:
                raise Rejected(Reason.TRUNCATED)
            at = offset + length

    def _item(self, at: int, implicit: bool, depth: int) -> int:
        """Walk the elements of an item of undefined length; return the end of its delimiter."""
        while True:
            tag, _, offset, length = self._header(at, implicit)
            if tag == _ITEM_END:
                return offset
            if length == _UNDEFINED:
                at, _ = self._items(offset, implicit, depth + 1)
                continue
            if length > len(self.view) - offset:
                raise Rejected(Reason.TRUNCATED)
            at = offset + length
