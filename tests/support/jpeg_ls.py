"""Encode JPEG-LS of any precision without loss, one scan for each component (ITU-T T.87 annex A, with NEAR 0).

Names of variables are those of the standard. The encoders at hand write 8 and 16 bits alone.
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RESET, _MIN_C, _MAX_C = 64, -128, 127
_J = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14, 15)


def encode(pixels: NDArray[Any], precision: int) -> bytes:
    """Encode (rows, columns) or (rows, columns, components) of unsigned integers below 2 ** precision."""
    planes = pixels.reshape(*pixels.shape[:2], -1)
    rows, columns, count = planes.shape
    frame = struct.pack(">BHHB", precision, rows, columns, count)
    frame += b"".join(bytes([number + 1, 0x11, 0]) for number in range(count))
    out = [b"\xff\xd8\xff\xf7", struct.pack(">H", 2 + len(frame)), frame]
    for number in range(count):
        scan = bytes([1, number + 1, 0, 0, 0, 0])
        out += [b"\xff\xda", struct.pack(">H", 2 + len(scan)), scan, _Scan(precision).encoded(planes[..., number])]
    return b"".join([*out, b"\xff\xd9"])


class _Bits:
    """Bits of a scan; after a byte of ones the next has a bit of zero in front (section A.1)."""

    def __init__(self) -> None:
        self.bits: list[int] = []

    def add(self, number: int, length: int) -> None:
        self.bits += [number >> shift & 1 for shift in reversed(range(length))]

    def packed(self) -> bytes:
        out = bytearray()
        at = 0
        while at < len(self.bits):
            length = 7 if out and out[-1] == 0xFF else 8
            part = self.bits[at : at + length]
            part += [0] * (length - len(part))
            out.append(int("".join(map(str, part)), 2))
            at += length
        return bytes(out) + (b"\0" if out and out[-1] == 0xFF else b"")


class _Scan:
    def __init__(self, precision: int) -> None:
        self.maxval = 2**precision - 1
        self.range, self.qbpp = 2**precision, precision
        bpp = max(2, precision)
        self.limit = 2 * (bpp + max(8, bpp))
        self.thresholds = self._thresholds()
        first = max(2, (self.range + 32) // 64)
        # 365 contexts of the regular mode, two of the run interruption.
        self.A, self.N = [first] * 367, [1] * 367
        self.B, self.C, self.Nn = [0] * 365, [0] * 365, {365: 0, 366: 0}
        self.run_index = 0
        self.out = _Bits()

    def _thresholds(self) -> tuple[int, int, int]:
        def clamp(value: int, low: int) -> int:
            return low if value > self.maxval or value < low else value

        if self.maxval >= 128:
            factor = (min(self.maxval, 4095) + 128) // 256
            wanted = (factor + 2, 4 * factor + 3, 17 * factor + 4)
        else:
            factor = 256 // (self.maxval + 1)
            wanted = (max(2, 3 // factor), max(3, 7 // factor), max(4, 21 // factor))
        first = clamp(wanted[0], 1)
        second = clamp(wanted[1], first)
        return first, second, clamp(wanted[2], second)

    def encoded(self, plane: NDArray[Any]) -> bytes:
        columns = plane.shape[1]
        above, corner = [0] * columns, 0
        for line in plane.tolist():
            self._line(line, above, corner)
            above, corner = line, above[0]
        return self.out.packed()

    def _line(self, line: list[int], above: list[int], corner: int) -> None:
        at = 0
        while at < len(line):
            ra, rb = (line[at - 1] if at else above[0]), above[at]
            rc = above[at - 1] if at else corner
            rd = above[at + 1] if at + 1 < len(line) else rb
            if rd == rb == rc == ra:
                at = self._run(line, above, at, ra)
            else:
                self._regular(line[at], ra, rb, rc, rd)
                at += 1

    def _run(self, line: list[int], above: list[int], at: int, ra: int) -> int:
        end = at
        while end < len(line) and line[end] == ra:
            end += 1
        count = end - at
        while count >= 1 << _J[self.run_index]:
            self.out.add(1, 1)
            count -= 1 << _J[self.run_index]
            self.run_index = min(31, self.run_index + 1)
        if end == len(line):
            if count:
                self.out.add(1, 1)
            return end
        self.out.add(0, 1)
        self.out.add(count, _J[self.run_index])
        self._interruption(line[end], ra, above[end])
        self.run_index = max(0, self.run_index - 1)
        return end + 1

    def _interruption(self, ix: int, ra: int, rb: int) -> None:
        kind = int(ra == rb)
        q = 365 + kind
        error = self._modulo(rb - ix if ra > rb else ix - rb)
        temp = self.A[q] + (self.N[q] >> 1) * kind
        k = 0
        while self.N[q] << k < temp:
            k += 1
        many = 2 * self.Nn[q] >= self.N[q]
        mapped = (error > 0 and k == 0 and not many) or (error < 0 and (many or k != 0))
        code = 2 * abs(error) - kind - int(mapped)
        self._golomb(code, k, self.limit - _J[self.run_index] - 1)
        self.Nn[q] += error < 0
        self.A[q] += (code + 1 - kind) >> 1
        if self.N[q] == _RESET:
            self.A[q], self.N[q], self.Nn[q] = self.A[q] >> 1, self.N[q] >> 1, self.Nn[q] >> 1
        self.N[q] += 1

    def _regular(self, ix: int, ra: int, rb: int, rc: int, rd: int) -> None:
        q1, q2, q3 = (self._quantized(difference) for difference in (rd - rb, rb - rc, rc - ra))
        q = 81 * q1 + 9 * q2 + q3
        sign = 1 if q > 0 else -1
        q = abs(q)
        px = min(ra, rb) if rc >= max(ra, rb) else max(ra, rb) if rc <= min(ra, rb) else ra + rb - rc
        px = int(np.clip(px + sign * self.C[q], 0, self.maxval))
        error = self._modulo(sign * (ix - px))
        k = 0
        while self.N[q] << k < self.A[q]:
            k += 1
        if k == 0 and 2 * self.B[q] <= -self.N[q]:
            code = 2 * error + 1 if error >= 0 else -2 * (error + 1)
        else:
            code = 2 * error if error >= 0 else -2 * error - 1
        self._golomb(code, k, self.limit)
        self.B[q] += error
        self.A[q] += abs(error)
        if self.N[q] == _RESET:
            self.A[q], self.B[q], self.N[q] = self.A[q] >> 1, self.B[q] >> 1, self.N[q] >> 1
        self.N[q] += 1
        if self.B[q] <= -self.N[q]:
            self.B[q] = max(self.B[q] + self.N[q], 1 - self.N[q])
            self.C[q] = max(_MIN_C, self.C[q] - 1)
        elif self.B[q] > 0:
            self.B[q] = min(self.B[q] - self.N[q], 0)
            self.C[q] = min(_MAX_C, self.C[q] + 1)

    def _quantized(self, difference: int) -> int:
        first, second, third = self.thresholds
        size = abs(difference)
        level = 0 if size == 0 else 1 if size < first else 2 if size < second else 3 if size < third else 4
        return level if difference >= 0 else -level

    def _modulo(self, error: int) -> int:
        error %= self.range
        return error - self.range if error >= (self.range + 1) // 2 else error

    def _golomb(self, code: int, k: int, limit: int) -> None:
        longest = limit - self.qbpp - 1
        if code >> k < longest:
            self.out.add(1, (code >> k) + 1)
            self.out.add(code, k)
        else:
            self.out.add(1, longest + 1)
            self.out.add(code - 1, self.qbpp)
