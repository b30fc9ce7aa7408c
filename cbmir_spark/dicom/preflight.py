"""Check the structure of a DICOM file before any parser reads it: locate its elements, or find why it is not whole.

pydicom takes a file that ends early for a short one, and inflates a deflated data set without bound. So this module
first walks the structure (PS3.5 sections 7.1, 7.5, A.4 and A.5, PS3.10 section 7.1): every declared length must fit
into the bytes that follow, every list of items must be closed, and every count is bounded before anything is allocated
for it.
"""

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag

from cbmir_spark.dicom.reasons import NotAnImage, Reason, Rejected

MAX_INFLATED_BYTES = 512 * 2**20  # of a deflated data set; scanners do not deflate that many pixels
MAX_DEPTH = 64  # of nested sequences; real reports and functional groups stay below 12
MAX_ELEMENTS = 500_000  # 5,000 frames of an enhanced object carry about 100 elements each


@dataclass(frozen=True)
class Element:
    """One top-level element; offsets in bytes into the data set."""

    tag: int  # group and element in one, such as 0x00080016
    vr: str  # "" where implicit
    header: int  # offset of the element
    offset: int  # of its value
    length: int  # of its value in bytes, with all items
    encapsulated: bool = False  # of undefined length
    closed: bool = True  # False where an encapsulated value lacks its delimiter


@dataclass(frozen=True)
class Repair:
    """Bytes of the data set that no parser takes as they are, and what they mean."""

    offset: int
    length: int  # of the bytes that are replaced
    meant: bytes


@dataclass(frozen=True)
class Layout:
    """A whole data set: its bytes, inflated where they were deflated, and its top-level elements by tag."""

    data: memoryview = field(repr=False)
    start: int  # offset of the first element
    transfer_syntax: str
    media_class: str  # SOP class of the file meta information, "" where it names none
    media_uid: str  # SOP Instance UID of the file meta information, likewise
    implicit: bool
    little_endian: bool
    elements: Mapping[int, Element] = field(repr=False)
    repairs: tuple[Repair, ...] = ()  # in the order of their offsets

    def value(self, tag: int) -> bytes:
        """Return the raw value of a top-level element; empty where it is absent."""
        element = self.elements.get(tag)
        return bytes(self.data[element.offset : element.offset + element.length]) if element else b""

    def repaired(self, start: int, end: int) -> bytes:
        """Return the data set from `start` to `end` as it is meant."""
        parts: list[bytes | memoryview] = []
        at = start
        for repair in self.repairs:
            if start <= repair.offset < end:
                parts += [self.data[at : repair.offset], repair.meant]
                at = repair.offset + repair.length
        return b"".join([*parts, self.data[at:end]])

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

_STANDARD_UID = re.compile(r"1\.2\.840\.10008\.[0-9.]{1,50}")
_MEDIA_CLASS, _MEDIA_UID, _TRANSFER_SYNTAX = 0x00020002, 0x00020003, 0x00020010
_TRAILING_PADDING = 0xFFFCFFFC
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
# Group 0002 or 0008, in both byte orders.
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x08")
# PS3.5 section 7.1.2: the VRs whose explicit length takes 32 bits.
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))


def named(syntax: str) -> str:
    """Name a transfer syntax in a message, unless it is not the Standard's: then it may be any text."""
    return syntax if _STANDARD_UID.fullmatch(syntax) else "a transfer syntax that is not DICOM's"


def examine(content: bytes | bytearray) -> Layout:
    """Walk a file from its first byte to its last.

    Raises Rejected (EMPTY, TRUNCATED, MALFORMED, BAD_DEFLATE, TOO_LARGE, UNSUPPORTED) or NotAnImage (NOT_DICOM).
    Ignores the 128 bytes of the preamble, which may be anything (PS3.10 section 7.1), an executable's header too.
    """
    if not content:
        raise Rejected(Reason.EMPTY)
    view = memoryview(content)
    if content[128:132] == b"DICM":
        # By chance, these may be bytes of a value in a data set without preamble.
        if content[132:134] in _FIRST_GROUPS or content[:2] not in _FIRST_GROUPS:
            return _data_set(view, 132)
        try:
            return _without_preamble(view)
        except NotAnImage:
            return _data_set(view, 132)
    if len(content) < 132 and not any(content[:128]):
        raise Rejected(Reason.TRUNCATED, "it ends in the preamble")
    return _without_preamble(view)


def _without_preamble(view: memoryview) -> Layout:
    """Walk a data set that starts at byte 0, as in ACR-NEMA; accept it only if it has a standard SOP class."""
    if bytes(view[:2]) not in _FIRST_GROUPS:
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
    if bytes(view[start + 128 : start + 132]) == b"DICM" and not any(view[start : start + 128]):
        # A whole file stored as the data set of another one.
        start = _Walker(view, implicit=False, little_endian=True).elements(start + 132, meta, only_group=0x0002)
    information = Layout(view, 0, EXPLICIT_LITTLE, "", "", False, True, meta)
    syntax, media_class = information.text(_TRANSFER_SYNTAX), information.text(_MEDIA_CLASS)
    media_uid = information.text(_MEDIA_UID)
    if syntax == DEFLATED:
        view, start = _inflate(view, start)
    elif syntax and not syntax.startswith("1.2.840.10008.1."):
        raise Rejected(Reason.UNSUPPORTED, named(syntax))
    # Some writers store the command set (PS3.7 section 6.3) before the data set.
    start = _Walker(view, implicit=True, little_endian=True).elements(start, {}, only_group=0x0000)
    little_endian = syntax != EXPLICIT_BIG
    if not syntax and bytes(view[start : start + 2]) == b"\x00\x08":
        little_endian = False
    implicit = _looks_implicit(view, start, assumed=syntax in ("", IMPLICIT_LITTLE))
    if not syntax:
        syntax = IMPLICIT_LITTLE if implicit else EXPLICIT_LITTLE if little_endian else EXPLICIT_BIG
    elements: dict[int, Element] = {} if found is None else found
    walker = _Walker(view, implicit, little_endian)
    end = walker.elements(start, elements)
    if not elements:
        raise Rejected(Reason.TRUNCATED, "it ends before the data set")
    repairs = tuple(walker.repairs)
    return Layout(view[:end], start, syntax, media_class, media_uid, implicit, little_endian, elements, repairs)


def _inflate(view: memoryview, start: int) -> tuple[memoryview, int]:
    """Inflate a data set (PS3.5 section A.5) up to a bound: a megabyte can inflate to a gigabyte of zeros.

    Return it with the offset of its first element: a data set that is not deflated at all starts where it did.
    """
    # The standard wants bare deflate; some writers add zlib's header.
    for window in (-zlib.MAX_WBITS, zlib.MAX_WBITS):
        stream = zlib.decompressobj(window)
        try:
            data = stream.decompress(view[start:], MAX_INFLATED_BYTES)
        except zlib.error:
            continue
        if not stream.eof and len(data) >= MAX_INFLATED_BYTES:
            raise Rejected(Reason.TOO_LARGE, f"it inflates to more than {MAX_INFLATED_BYTES // 2**20} MiB")
        if not stream.eof:
            raise Rejected(Reason.TRUNCATED, "the deflated data set has no end")
        return memoryview(data), 0
    if bytes(view[start : start + 2]) == b"\x08\x00" and not _looks_implicit(view, start, assumed=True):
        return view, start
    raise Rejected(Reason.BAD_DEFLATE)


def _looks_implicit(view: memoryview, at: int, assumed: bool) -> bool:
    """Tell by the bytes in the place of an explicit VR: some files are encoded in another way than they declare."""
    vr = bytes(view[at + 4 : at + 6])
    return assumed if len(vr) < 2 else not (vr.isalpha() and vr.isupper())


def _keyword(tag: int) -> str:
    """Name an element in a message; a tag that is not in the dictionary may be any bytes."""
    return keyword_for_tag(tag) or "an element that is not in the dictionary"


def _short_vr(tag: int) -> bytes:
    """Return the VR of the dictionary for an element that has none, or one whose length takes two bytes as well."""
    vr = dictionary_VR(tag).encode("ascii") if dictionary_has_tag(tag) else b"LO"
    return vr if len(vr) == 2 and vr not in _LONG_VRS else b"LO"


class _Walker:
    """Steps through the elements of a data set in one encoding; counts them against MAX_ELEMENTS."""

    def __init__(self, view: memoryview, implicit: bool, little_endian: bool) -> None:
        self.view = view
        self.implicit = implicit
        self.count = 0
        self.repairs: list[Repair] = []
        order = "<" if little_endian else ">"
        self.item_end = struct.pack(f"{order}HHL", 0xFFFE, 0xE00D, 0)
        self.tag_and_long = struct.Struct(f"{order}HHL").unpack_from
        self.short = struct.Struct(f"{order}H").unpack_from
        self.long = struct.Struct(f"{order}L").unpack_from

    def elements(self, at: int, found: dict[int, Element], only_group: int | None = None) -> int:
        """Walk top-level elements from `at` into `found`; return where they end.

        With `only_group`, stops before the first element of another group.
        """
        end = len(self.view)
        while at < end:
            if only_group is not None and end - at >= 8 and self.short(self.view, at)[0] != only_group:
                return at
            try:
                following = self._element(at, found, only_group)
            except Rejected as error:
                # Whatever follows whole pixel data, a line break or the boundary of a multipart message, is no part of
                # the data set.
                if error.reason is Reason.TOO_LARGE or not any(tag in found for tag in PIXEL_DATA_TAGS):
                    raise
                return at
            if following is None:
                return at
            at = following
        return at

    def _element(self, at: int, found: dict[int, Element], only_group: int | None) -> int | None:
        """Walk the top-level element at `at` into `found`; return where it ends, None for padding."""
        end = len(self.view)
        if end - at < 8:
            self._padding(at)
            return None
        tag, vr, offset, length = self._header(at, self.implicit)
        if tag == 0 and length == 0 and only_group is None:
            self._padding(at)
            return None
        if length == _UNDEFINED and tag in PIXEL_DATA_TAGS:
            stop, following = self._fragments(offset)
            found[tag] = Element(tag, vr, at, offset, stop - offset, True, following > stop)
            return following
        if length == _UNDEFINED:
            following = self._items(offset, self.implicit, 1)
            # The closing delimiter belongs to the encoding, not to the value.
            found[tag] = Element(tag, vr, at, offset, following - 8 - offset, True)
            return following
        if length > end - offset:
            if tag == _TRAILING_PADDING:
                return None
            raise Rejected(Reason.TRUNCATED, f"it ends in {_keyword(tag)}")
        found[tag] = Element(tag, vr, at, offset, length)
        return offset + length

    def _padding(self, at: int) -> None:
        """Accept zeros up to the end of the file as padding; anything else is the start of a missing element."""
        if any(self.view[at:]):
            raise Rejected(Reason.TRUNCATED, "it ends where an element begins")

    def _fragments(self, at: int) -> tuple[int, int]:
        """Walk the fragments of pixel data; return where they end, and where the delimiter ends if there is one.

        Where it is missing, or zeros stand in its place, whole fragments are still whole: whether they are enough for
        the frames is left to who knows their number.
        """
        end = len(self.view)
        while end - at >= 8:
            tag, _, offset, length = self._header(at, True)
            if tag in (_SEQUENCE_END, _ITEM_END):
                return at, offset
            if tag != _ITEM:
                if tag == 0 and not any(self.view[at:]):
                    return at, at
                if PIXEL_DATA < tag < _ITEM:
                    return at, at
                raise Rejected(Reason.MALFORMED, "pixel data of undefined length with something else than fragments")
            if length > end - offset:
                raise Rejected(Reason.TRUNCATED, "it ends in a fragment of pixel data")
            at = offset + length
        return at, at

    def _header(self, at: int, implicit: bool) -> tuple[int, str, int, int]:
        """Read the element at `at`: tag, VR ("" where implicit), offset of the value, declared length."""
        self.count += 1
        if self.count > MAX_ELEMENTS:
            raise Rejected(Reason.TOO_LARGE, f"more than {MAX_ELEMENTS} elements")
        view = self.view
        if at + 8 > len(view):
            raise Rejected(Reason.TRUNCATED, "it ends where an element begins")
        group, element, length = self.tag_and_long(view, at)
        tag = group << 16 | element
        if implicit or group == 0xFFFE:
            return tag, "", at + 8, length
        vr = bytes(view[at + 4 : at + 6])
        if vr in _LONG_VRS:
            if at + 12 > len(view):
                raise Rejected(Reason.TRUNCATED, "it ends where an element begins")
            return tag, vr.decode("ascii"), at + 12, self.long(view, at + 8)[0]
        if vr.isalpha() and vr.isupper():
            return tag, vr.decode("ascii"), at + 8, self.short(view, at + 6)[0]
        short = self.short(view, at + 6)[0]
        if self._continues(tag, at + 8 + length) or not self._continues(tag, at + 8 + short):
            return tag, "", at + 8, length
        self.repairs.append(Repair(at + 4, 2, _short_vr(tag)))
        return tag, "", at + 8, short

    def _continues(self, tag: int, at: int) -> bool:
        """Tell whether the element after `tag` may begin at `at`: there, tags ascend."""
        if at + 8 > len(self.view):
            return at == len(self.view)
        group, element, _ = self.tag_and_long(self.view, at)
        following: int = group << 16 | element
        return following > tag

    def _items(self, at: int, implicit: bool, depth: int) -> int:
        """Walk the items of a sequence of undefined length; return the end of the delimiter."""
        if depth > MAX_DEPTH:
            raise Rejected(Reason.TOO_LARGE, f"sequences nested deeper than {MAX_DEPTH}")
        end = len(self.view)
        while True:
            tag, _, offset, length = self._header(at, implicit)
            if tag == _SEQUENCE_END:
                return offset
            if tag != _ITEM:
                raise Rejected(Reason.MALFORMED, "a sequence with something else than items")
            if length == _UNDEFINED:
                at = self._item(offset, implicit or _looks_implicit(self.view, offset, implicit), depth)
                continue
            if length > end - offset:
                raise Rejected(Reason.TRUNCATED, "it ends in an item of a sequence")
            at = offset + length

    def _item(self, at: int, implicit: bool, depth: int) -> int:
        """Walk the elements of an item of undefined length; return the end of its delimiter."""
        while True:
            tag, _, offset, length = self._header(at, implicit)
            if tag == _ITEM_END:
                return offset
            if tag == _SEQUENCE_END:
                # It closes the item too, which lacks its own delimiter.
                self.repairs.append(Repair(at, 0, self.item_end))
                return at
            if length == _UNDEFINED:
                at = self._items(offset, implicit, depth + 1)
                continue
            if length > len(self.view) - offset:
                raise Rejected(Reason.TRUNCATED, f"it ends in {_keyword(tag)}, in an item of a sequence")
            at = offset + length
