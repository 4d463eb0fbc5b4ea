"""What closes a segment: INDEX and SEAL. The layout is in `format.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..errors import PacketError
from .codec import Frame, unpack_payload
from .format import SEAL_STRUCT

INDEX_PLACES = 1 << 15  # in a frame, at most; a segment has as many INDEX frames as it needs
_PLACE_BYTES = 30  # at most


class Place(NamedTuple):
    """Of a COMMIT: where it is, when it was written, and how many lines of its segment are before it."""

    offset: int
    time_ns: int
    lines: int


def pack_index(places: Iterable[Place]) -> bytes:
    out = bytearray()
    before = Place(0, 0, 0)
    for place in places:
        step = place.time_ns - before.time_ns  # a clock may be set back
        for number in (
            place.offset - before.offset,
            2 * step if step >= 0 else -2 * step - 1,
            place.lines - before.lines,
        ):
            while number > 0x7F:
                out.append(number & 0x7F | 0x80)
                number >>= 7
            out.append(number)
        before = place
    return bytes(out)


def unpack_index(frame: Frame) -> list[Place]:
    """Raises PacketError: numbers of more than 64 bits, not a whole number of places, or more than INDEX_PLACES."""
    if len(frame.payload) > INDEX_PLACES * _PLACE_BYTES:
        raise PacketError(f"INDEX is {len(frame.payload)} bytes, limit is {INDEX_PLACES * _PLACE_BYTES}", frame.offset)
    numbers: list[int] = []
    number = shift = 0
    for byte in frame.payload:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte <= 0x7F:
            numbers.append(number)
            number = shift = 0
        elif shift > 63:
            raise PacketError("INDEX holds a number of more than 64 bits", frame.offset)
    if shift or len(numbers) % 3:
        raise PacketError(f"INDEX ends inside a place, after {len(numbers)} numbers", frame.offset)
    places: list[Place] = []
    offset = time_ns = lines = 0
    for at in range(0, len(numbers), 3):
        step = numbers[at + 1]
        offset, lines = offset + numbers[at], lines + numbers[at + 2]
        time_ns += step >> 1 if not step & 1 else -(step >> 1) - 1
        places.append(Place(offset, time_ns, lines))
    return places


class SealInfo(NamedTuple):
    index_at: int
    lines: int
    begun_ns: int
    chain: bytes

    def pack(self) -> bytes:
        return SEAL_STRUCT.pack(*self)

    @classmethod
    def unpack(cls, frame: Frame) -> SealInfo:
        return cls(*unpack_payload(SEAL_STRUCT, frame, "SEAL"))
