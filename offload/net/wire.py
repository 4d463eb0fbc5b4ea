"""What `offload send` and its server say to each other, each message in a u32 packet. No I/O.

    client ► server   HELLO  name                         who sends; its sources are called `name:path` in the file
    server ► client   STATE  entry, SOURCE frame          each of its sources: where the packet file has it, …
                      FORMER entry, SOURCE frame          … and each earlier generation of it
                      READY
    client ► server   FRAME  a SOURCE, LINES or GAP frame of the packet file's layout (`packets/format.py`)
                      SEEN   source, head, guard          the bytes that a source is known by
                      BATCH  source, size, mtime, …       ends a batch: it goes into the file in one system call
                      WANT   source, generation, range    between batches: what the file has of a shorter log
    server ► client   DURABLE count                       so many batches of this connection are on the disk
                      HELD   bytes                        the answer to WANT; none: it does not have all of them
                      REPLACED                        another connection has this name now: do not come back
                      REFUSED text                        why the connection ends

There is no other state: a client that starts, or starts again, learns from the packet file where each source stands.
A frame that does not go on exactly there is refused and ends the connection, so nothing is in the file twice.
Integers are little-endian, as in the packet file; the frames keep their own checksums.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import PacketError
from ..packets.codec import CommitEntry, Frame, Header, PacketDecoder, SourceInfo, encode
from ..packets.format import ENTRY_STRUCT, Flag, FrameType

HELLO_MAGIC = b"\xffoffload send 1\0"  # 0xFF and NUL: no pickle, no text begins so
NAME_BYTES = 255
STATE, FORMER, READY, DURABLE, REPLACED, REFUSED = b"S", b"G", b"R", b"D", b"T", b"E"
FRAME, SEEN, BATCH, WANT, HELD = b"F", b"N", b"B", b"W", b"H"
WANT_BYTES = 4 << 20  # that may be asked for at once

_SEEN = struct.Struct("<IHH")
_STAT = struct.Struct("<IQQ")
_COUNT = struct.Struct("<Q")
_WANT = struct.Struct("<IIQQ")
_PRESENT = 0xFFFF_FFFF  # in place of a generation's number


class Known(NamedTuple):
    """A generation of a source, as the packet file has it."""

    former: bool
    source_id: int
    generation: int
    info: SourceInfo
    entry: CommitEntry


def hello(name: str) -> bytes:
    """Raises ValueError: no name."""
    raw = name.encode(errors="replace")
    if not raw or len(raw) > NAME_BYTES or not name.isprintable() or ":" in name or "\ufffd" in name:
        raise ValueError(f"name is {name[:NAME_BYTES]!r}, expected 1 to {NAME_BYTES} bytes of UTF-8 without a colon")
    return HELLO_MAGIC + raw


def read_hello(payload: bytes) -> str | None:
    """The client's name; None: this is no hello.

    Raises:
        PacketError: a name that is none.
    """
    if not payload.startswith(HELLO_MAGIC):
        return None
    name = payload[len(HELLO_MAGIC) :].decode(errors="replace")
    try:
        hello(name)
    except ValueError as exc:
        raise PacketError(str(exc), 0) from None
    return name


def known(item: Known) -> bytes:
    frame = encode(
        FrameType.SOURCE,
        item.info.pack(),
        source_id=item.source_id,
        generation=item.generation,
        source_off=item.info.start_off,
    )
    return (FORMER if item.former else STATE) + ENTRY_STRUCT.pack(*item.entry) + frame


def read_known(payload: bytes) -> Known:
    """Raises PacketError."""
    at = 1 + ENTRY_STRUCT.size
    if len(payload) < at:
        raise PacketError(f"state is {len(payload)} bytes, expected at least {at}", 0)
    try:
        entry = CommitEntry.make(ENTRY_STRUCT.unpack_from(payload, 1))
    except ValueError as exc:
        raise PacketError(f"state has an entry that cannot be: {exc}", 0) from None
    frame = read_frame(payload[at:])
    return Known(
        payload[:1] == FORMER, frame.header.source_id, frame.header.generation, SourceInfo.unpack(frame), entry
    )


def read_frame(data: bytes) -> Frame:
    """The one frame that these bytes are. Raises PacketError."""
    frames = PacketDecoder().feed(data)
    if len(frames) != 1 or frames[0].end != len(data):
        raise PacketError(f"found {len(frames)} frames in {len(data)} bytes, expected one", 0)
    return frames[0]


def seen(source_id: int, head: bytes, guard: bytes) -> bytes:
    return SEEN + _SEEN.pack(source_id, len(head), len(guard)) + head + guard


def read_seen(payload: bytes) -> tuple[int, bytes, bytes]:
    """Source, head, guard. Raises PacketError."""
    source_id, head, guard = _unpack(_SEEN, payload)
    at = 1 + _SEEN.size
    if len(payload) != at + head + guard:
        raise PacketError(f"head and guard are {len(payload) - at} bytes, expected {head + guard}", 0)
    return source_id, payload[at : at + head], payload[at + head :]


def batch(stats: Mapping[int, tuple[int, int]]) -> bytes:
    return BATCH + b"".join(_STAT.pack(source_id, *stat) for source_id, stat in stats.items())


def read_batch(payload: bytes) -> dict[int, tuple[int, int]]:
    """Source -> size and mtime. Raises PacketError."""
    if (len(payload) - 1) % _STAT.size:
        raise PacketError(f"batch is {len(payload) - 1} bytes, expected a multiple of {_STAT.size}", 0)
    return {source_id: (size, mtime) for source_id, size, mtime in _STAT.iter_unpack(memoryview(payload)[1:])}


def durable(count: int) -> bytes:
    return DURABLE + _COUNT.pack(count)


def read_durable(payload: bytes) -> int:
    """Raises PacketError."""
    (count,) = _unpack(_COUNT, payload)
    return int(count)


def want(source_id: int, start: int, end: int, generation: int | None) -> bytes:
    return WANT + _WANT.pack(source_id, _PRESENT if generation is None else generation, start, end)


def read_want(payload: bytes) -> tuple[int, int, int, int | None]:
    """Source, range and generation. Raises PacketError."""
    source_id, generation, start, end = _unpack(_WANT, payload)
    if not 0 < end - start <= WANT_BYTES:
        raise PacketError(f"bytes {start} to {end} are wanted, expected 1 to {WANT_BYTES} bytes", 0)
    return source_id, start, end, None if generation == _PRESENT else generation


def refused(reason: str) -> bytes:
    return REFUSED + reason.encode(errors="backslashreplace")[:1000]


def check(header: Header) -> None:
    """Raises PacketError: no frame that a client may send."""
    if header.type not in (FrameType.SOURCE, FrameType.LINES, FrameType.GAP) or header.flags & Flag.TABLE:
        raise PacketError(f"a client sent a {header.type.name} frame, expected SOURCE, LINES or GAP", 0)


def _unpack(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) < 1 + layout.size:
        raise PacketError(f"message is {len(payload)} bytes, expected at least {1 + layout.size}", 0)
    return layout.unpack_from(payload, 1)
