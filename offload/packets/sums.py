"""CRC-32 of any stretch of bytes, for the price of reading each byte once.

Where damage is searched, every header found names a payload, and payloads may overlap: bytes made to look like headers
that each claim 16 MiB would have every byte summed thousands of times. But checksums can be taken apart:

    crc(A + B) = crc(A) · x^(8 · len(B)) + crc(B)      over GF(2), modulo the polynomial of RFC 1952, section 8

so the CRC of [start, end) follows from those of all bytes before `start` and before `end`. One is kept each STEP bytes.
"""

from __future__ import annotations

from array import array
from functools import cache
from zlib import crc32

_POLYNOMIAL = 0xEDB8_8320  # its bits in reverse, as in CRCs: the highest bit is x^0
_ONE = 1 << 31
STEP = 4096  # summing what is behind the last mark takes about as long as the arithmetic


class Sums:
    """Running checksums of a stream from the byte at `start` on; for one search through damage.

    Places are offsets in the stream. `view` is what the caller holds of it, `base` the place of its first byte.
    """

    def __init__(self, start: int) -> None:
        self._start = start
        self._marks = array("L", [0])  # CRC of all bytes up to _start, _start + STEP, …

    def crc(self, view: memoryview, base: int, start: int, end: int) -> int:
        """CRC-32 of the bytes from `start` to `end`, at most 16 MiB, neither before what `forget` gave up."""
        before = self._upto(view, base, start)
        return shifted(before, end - start) ^ self._upto(view, base, end)

    def forget(self, view: memoryview, base: int, place: int) -> int:
        """Nothing before `place` will be asked for; returns where the bytes begin that must still be held."""
        self._upto(view, base, place)
        passed = (place - self._start) // STEP
        del self._marks[:passed]
        self._start += passed * STEP
        return self._start

    def _upto(self, view: memoryview, base: int, place: int) -> int:
        number, rest = divmod(place - self._start, STEP)
        while len(self._marks) <= number:
            at = self._start + (len(self._marks) - 1) * STEP - base
            self._marks.append(crc32(view[at : at + STEP], self._marks[-1]))
        return crc32(view[place - rest - base : place - base], self._marks[number])


def shifted(crc: int, count: int) -> int:
    """What this CRC of some bytes adds to that of the same with `count` more behind them."""
    for table in _powers():
        count, digit = divmod(count, 256)
        if digit:
            crc = _multiplied(table[digit], crc)
    assert not count, "a stretch of 4 GiB: no frame is so long"
    return crc


def _multiplied(a: int, b: int) -> int:
    """a · b modulo the polynomial."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFF_FFFF
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@cache
def _powers() -> list[list[int]]:
    """x^(8 · d · 256^k) for each digit d of each place k."""
    tables: list[list[int]] = []
    base = _ONE >> 8  # x^8: one byte
    for _ in range(4):
        table = [_ONE]
        for _ in range(255):
            table.append(_multiplied(base, table[-1]))
        tables.append(table)
        base = _multiplied(base, table[-1])
    return tables
