"""Split encapsulated Pixel Data into the codestreams of its frames (PS3.5 section A.4)."""

import struct
from bisect import bisect
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from cbmir_spark.dicom import codestream

__all__ = ["ITEM", "Fragments"]

ITEM = b"\xfe\xff\x00\xe0"
_HEADER = 8  # bytes of an item's tag and length


@dataclass(frozen=True)
class Fragments:
    """The fragments of an encapsulated value, and which of them make up each frame.

    `value` holds the items, without the delimiter. Where as many fragments begin as a codestream as there are frames,
    each begins a frame: then offset tables, which are wrong more often than fragments are, add nothing. Otherwise a
    table counts if it names the starts of such fragments. Of an unknown codec, any fragment may begin a frame.
    """

    value: memoryview
    frames: int
    extended: tuple[bytes, bytes] | None = None  # Extended Offset Table and its lengths (PS3.3 section C.7.6.3.1.8)
    has_items: bool = True  # False where the value is one codestream itself

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Offset and length of each fragment; the Basic Offset Table, the first item, is none."""
        if not self.has_items:
            return [(0, len(self.value))]
        found, at = [], 0
        while at + _HEADER <= len(self.value) and bytes(self.value[at : at + 4]) == ITEM:
            (length,) = struct.unpack_from("<L", self.value, at + 4)
            found.append((at + _HEADER, length))
            at += _HEADER + length
        # Some writers leave the table out: then the first item is the first fragment.
        return found if found and self._begins_frame(found[0]) else found[1:]

    @cached_property
    def starts(self) -> list[int] | None:
        """Number of the fragment that begins each frame; None where neither fragments nor tables show it."""
        count = len(self.spans)
        if self.frames == 1 and count:
            return (self._begins or [0])[:1]
        begins = self._begins or list(range(count))
        if len(begins) == self.frames and begins[0] == 0:
            return begins
        numbers = {offset - _HEADER: number for number, (offset, _) in enumerate(self.spans)}
        first = self.spans[0][0] - _HEADER if self.spans else 0
        for table in (self._extended_table(), self._basic_table()):
            named = [numbers.get(first + offset, -1) for offset in table]
            ascends = named[:1] == [0] and all(a < b for a, b in pairwise(named))
            if len(named) == self.frames and ascends and set(named) <= set(begins):
                return named
        return None

    def frame(self, number: int) -> bytes:
        """Return the codestream of a frame. Raises ValueError where fragments cannot be assigned to frames."""
        if self.starts is None:
            raise ValueError("fragments cannot be assigned to frames")
        first, starts = self.starts[number], self._begins or self.starts
        following = bisect(starts, first)
        last = starts[following] if following < len(starts) else len(self.spans)
        return b"".join(self.value[offset : offset + length] for offset, length in self.spans[first:last])

    @cached_property
    def _begins(self) -> list[int]:
        """Number of each fragment that begins as a codestream."""
        return [number for number, span in enumerate(self.spans) if self._begins_frame(span)]

    def _begins_frame(self, span: tuple[int, int]) -> bool:
        data = bytes(self.value[span[0] : span[0] + min(span[1], codestream.MAGIC_BYTES)])
        return codestream.begins(data) or codestream.begins_run_lengths(data)

    def _basic_table(self) -> tuple[int, ...]:
        (length,) = struct.unpack_from("<L", self.value, 4)
        if not self.spans or self.spans[0][0] != 2 * _HEADER + length or length % 4:
            return ()
        return struct.unpack_from(f"<{length // 4}L", self.value, _HEADER)

    def _extended_table(self) -> tuple[int, ...]:
        table = self.extended[0] if self.extended else b""
        return struct.unpack(f"<{len(table) // 8}Q", table) if len(table) % 8 == 0 else ()
