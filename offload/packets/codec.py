"""Frames to bytes and bytes to frames. The layout is in `format.py`; nothing here does I/O or keeps time.

    pack_header(...)            64 bytes for a payload that the caller holds: nothing is copied
    encode(...)                 header and payload as one bytes object
    PacketDecoder().feed(data)  whole frames out of data in any pieces, linear in bytes

Promises: bytes from outside end in frames or in a PacketError that names the byte, never in another exception; a
damaged length is never followed; the decoder holds at most one frame (16 MiB and its header) and what the last `feed`
brought, twice that while it looks through damage. Time is linear in bytes there too, whatever looks like headers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

from ..errors import PacketError, PacketTooLargeError
from .format import (
    COMMIT_STRUCT,
    ENTRY_STRUCT,
    FILE_STRUCT,
    GAP_STRUCT,
    HEADER,
    HEADER_BYTES,
    HEADER_CRC,
    HEADER_CRC_AT,
    HOLE_STRUCT,
    MAGIC,
    MAX_PAYLOAD,
    SOURCE_STRUCT,
    VERSION,
    Compression,
    EntryFlag,
    Flag,
    FrameType,
    GapReason,
)
from .sums import STEP, Sums

Buffer = bytes | bytearray | memoryview


@dataclass(slots=True)
class Header:
    """A frame's header, checked; the fields are those of the table in `format.py`."""

    type: FrameType
    flags: Flag
    payload_len: int
    source_id: int
    seq: int
    source_off: int
    time_ns: int
    count: int
    payload_crc: int
    generation: int
    prev_len: int
    epoch: int

    @property
    def frame_len(self) -> int:
        return HEADER_BYTES + self.payload_len


def pack_header(
    type: FrameType,
    payload_len: int,
    payload_crc: int,
    *,
    flags: int = 0,
    source_id: int = 0,
    seq: int = 0,
    source_off: int = 0,
    time_ns: int = 0,
    count: int = 0,
    generation: int = 0,
    prev_len: int = 0,
    epoch: int = 0,
) -> bytes:
    """The 64 bytes that go before a payload of `payload_len` bytes whose CRC-32 is `payload_crc`.

    Raises:
        PacketTooLargeError: the payload is over MAX_PAYLOAD.
        struct.error: a field does not fit its width: a caller's bug, never bytes from outside.
    """
    if payload_len > MAX_PAYLOAD:
        raise PacketTooLargeError(f"payload is {payload_len} bytes, limit is {MAX_PAYLOAD}; split it", 0)
    header = HEADER.pack(
        MAGIC,
        VERSION,
        type,
        flags,
        payload_len,
        source_id,
        seq,
        source_off,
        time_ns,
        count,
        payload_crc,
        generation,
        prev_len,
        epoch,
        0,
    )[:HEADER_CRC_AT]
    return header + HEADER_CRC.pack(crc32(header))


def unpack_header(data: Buffer, at: int = 0, *, offset: int = 0) -> Header:
    """Read the header at `data[at:]`; `offset` is its place in the file, for the error.

    Raises:
        PacketError: not 64 bytes, no magic, another version, a wrong checksum, an unknown type or flag, or a length
            over MAX_PAYLOAD.
    """
    if len(data) - at < HEADER_BYTES:
        raise PacketError(f"header is {len(data) - at} bytes, expected {HEADER_BYTES}", offset)
    magic, version, type_, flags, *rest, header_crc = HEADER.unpack_from(data, at)
    if magic != MAGIC:
        raise PacketError(f"found {magic.hex(' ')}, expected the magic {MAGIC.hex(' ')}", offset)
    found = crc32(memoryview(data)[at : at + HEADER_CRC_AT])
    if found != header_crc:
        raise PacketError(f"header checksum is {found:08x}, expected {header_crc:08x}", offset)
    if version != VERSION:
        raise PacketError(f"version is {version}, this reader knows {VERSION}; use a newer offload", offset)
    if type_ not in _TYPES:
        raise PacketError(f"frame type is {type_}, known are 0 to {max(_TYPES)}", offset)
    if flags & ~_KNOWN_FLAGS:
        raise PacketError(f"flags are {flags:#x}, known are {_KNOWN_FLAGS:#x}; use a newer offload", offset)
    if rest[0] > MAX_PAYLOAD:
        raise PacketError(f"payload is {rest[0]} bytes, limit is {MAX_PAYLOAD}", offset)
    return Header(_TYPES[type_], Flag(flags), *rest)


_TYPES = {int(t): t for t in FrameType}
# An int, because ~ of a Flag is only the other flags that have a name, and an unnamed bit would pass.
_KNOWN_FLAGS = int(Flag.FIRST | Flag.MIDDLE | Flag.LAST | Flag.UNTERMINATED | Flag.TABLE | Flag.HOLE | Flag.RESTATED)


@dataclass(slots=True, frozen=True)
class Frame:
    """A whole frame: where it starts in the file, its checked header, its checked payload."""

    offset: int
    header: Header
    payload: bytes

    @property
    def end(self) -> int:
        return self.offset + self.header.frame_len

    def lines(self) -> list[bytes]:
        """The pieces of a LINES frame between line ends, each with its LF where it has one."""
        if not self.payload or self.header.flags & Flag.HOLE:
            return []
        *whole, rest = self.payload.split(b"\n")
        return [line + b"\n" for line in whole] + ([rest] if rest else [])

    def packets(self) -> list[bytes]:
        """The packets of a PACKETS frame, or the lines of a LINES frame; none in a frame that describes the file.

        Raises:
            PacketError: the table of lengths does not fit the payload.
        """
        if self.header.type is FrameType.LINES:
            return self.lines()
        if self.header.type is not FrameType.PACKETS:
            return []
        if not self.header.flags & Flag.TABLE:
            return [self.payload]
        count = self.header.count
        at = 4 * count
        if at > len(self.payload):
            raise PacketError(f"table of {count} lengths in a payload of {len(self.payload)} bytes", self.offset)
        out: list[bytes] = []
        for length in struct.unpack_from(f"<{count}I", self.payload):
            out.append(self.payload[at : at + length])
            at += length
        if at != len(self.payload):
            raise PacketError(
                f"table of lengths ends at byte {at} of the payload, expected {len(self.payload)}", self.offset
            )
        return out

    @property
    def hole(self) -> int:
        """How many NULs of the source this frame stands for; 0: none.

        Raises:
            PacketError: a HOLE frame that does not hold one length.
        """
        return hole_len(self.header, self.payload, self.offset)

    def content(self) -> bytes:
        """The source's own bytes: the payload, without a table of lengths; of a hole, which may be huge, none."""
        if self.header.flags & Flag.HOLE:
            return b""
        return self.payload[4 * self.header.count :] if self.header.flags & Flag.TABLE else self.payload


def hole_len(header: Header, payload: Buffer, offset: int = 0) -> int:
    """As `Frame.hole`."""
    if not header.flags & Flag.HOLE:
        return 0
    if len(payload) != HOLE_STRUCT.size:
        raise PacketError(f"HOLE payload is {len(payload)} bytes, expected {HOLE_STRUCT.size}", offset)
    (length,) = HOLE_STRUCT.unpack(payload)
    if header.source_off + length >= 1 << 63:
        raise PacketError(f"hole of {length} bytes at byte {header.source_off} of its source ends behind 2**63", offset)
    return int(length)


def encode(type: FrameType, payload: Buffer, **fields: int) -> bytes:
    """One frame as bytes; `fields` are those of `pack_header`."""
    return pack_header(type, len(payload), crc32(payload), **fields) + bytes(payload)


def packets_payload(packets: Sequence[Buffer]) -> tuple[bytes, Flag]:
    """Payload and flags of one PACKETS frame that holds these packets, each of 0 to 2**32 - 1 bytes."""
    if len(packets) == 1:
        return bytes(packets[0]), Flag.NONE
    table = struct.pack(f"<{len(packets)}I", *map(len, packets))
    return table + b"".join(packets), Flag.TABLE


@dataclass(slots=True)
class LinePiece:
    """The bytes [start, end) for one LINES frame, and the header fields that go with it; `open` is the state behind."""

    start: int
    end: int
    flags: Flag
    count: int
    open: EntryFlag


def line_pieces(
    data: bytes | bytearray, start: int, end: int, open: EntryFlag, *, ended: bool, limit: int = MAX_PAYLOAD
) -> Iterator[LinePiece]:
    """Cut `data[start:end]`, the next bytes of a source, into LINES frames of at most `limit` bytes. Copies nothing.

    Args:
        open: whether the line before `start` goes on (`SourceState.open`).
        ended: the source ends here as far as is known, so a rest without a line end is given out too. Otherwise the
            rest behind the last line end is left, unless it fills a whole frame.
    """
    while start < end:
        window = min(start + limit, end)
        cut = data.rfind(b"\n", start, window) + 1
        unterminated = ended and window == end and cut != end
        if cut and not unterminated:
            window = cut
        elif not unterminated and window - start < limit:
            return
        count = data.count(b"\n", start, window)
        if not cut and open is EntryFlag.OPEN_LINE:
            unterminated = True  # a fragment of a line that was counted when it was first seen
        if unterminated:
            flags, after = Flag.UNTERMINATED | (Flag.MIDDLE if open else Flag.NONE), EntryFlag.OPEN_LINE
            count += 0 if open is EntryFlag.OPEN_LINE else 1
        elif cut:
            flags, after = Flag.LAST if open else Flag.NONE, EntryFlag.NONE
            count -= 1 if open is EntryFlag.OPEN_LINE else 0
        else:
            flags, after = Flag.MIDDLE if open else Flag.FIRST, EntryFlag.OPEN_FRAGMENT
        yield LinePiece(start, window, flags, count, after)
        start, open = window, after


@dataclass(slots=True, frozen=True)
class Damage:
    """A stretch of bytes, [start, end), that holds no valid frame, and what was wrong at its start."""

    start: int
    end: int
    reason: str


class PacketDecoder:
    """Whole frames from bytes that come in any pieces.

    Args:
        offset: place of the first byte fed, in the file.
        on_damage: None: the first invalid byte raises PacketError, and so does every later feed. Otherwise called
            with each damaged stretch once its end is known; decoding goes on at the next valid header.
    """

    def __init__(self, *, offset: int = 0, on_damage: Callable[[Damage], None] | None = None) -> None:
        self._buffer = bytearray()
        self._at = 0  # of the next frame, in the buffer
        self._base = offset  # of the buffer, in the file
        self._on_damage = on_damage
        self._header: Header | None = None  # of the frame at _at, once it is there
        self._damage: tuple[int, str] | None = None  # where the present damage began
        self._sums: Sums | None = None  # while looking through bytes that were summed in vain, up to:
        self._summed = 0
        self._error: PacketError | None = None

    @property
    def offset(self) -> int:
        """Where the next frame is expected, in bytes from the start of the file."""
        return self._base + self._at

    @property
    def pending(self) -> int:
        """Bytes fed that belong to no whole frame yet."""
        return len(self._buffer) - self._at

    def feed(self, data: Buffer) -> list[Frame]:
        """Take more bytes and return the frames that are whole now.

        Raises:
            PacketError: an invalid frame, and no `on_damage`. Whole frames before it are returned first: then the
                next `feed` or `close` raises, and every later one.
        """
        if self._error is not None:
            raise self._error
        self._buffer += data
        frames: list[Frame] = []
        try:
            frames.extend(self._frames())
        except PacketError:
            if not frames:
                raise
        if self._at:
            self._drop()
        return frames

    def _drop(self) -> None:
        """Let go of what was consumed. A new buffer, as `del` at the front would keep its room."""
        place = self.offset
        kept = place
        if self._sums is not None and place < self._summed:
            # What is left may have waited here for long; so it moves only if it is less than what goes.
            if 2 * self._at < len(self._buffer):
                return
            with memoryview(self._buffer) as view:
                kept = self._sums.forget(view, self._base, place)
        else:
            self._sums = None  # what is left came with this feed, so each byte moves once at most: linear too
        self._buffer = self._buffer[kept - self._base :]
        self._base, self._at = kept, place - kept

    def close(self) -> list[Frame]:
        """Say that no more bytes come.

        Returns:
            With `on_damage`, whole frames that stand in what a header before them claims as its payload while the file
            ends before that payload does. Damage may leave such a header, and so may text that looks like one. (Behind
            a sound header they are its own payload, torn: `recover` tells the two apart.)

        Raises:
            PacketError: the last frame is not whole (a torn tail), and no `on_damage`.
        """
        if self._error is not None:
            raise self._error
        frames: list[Frame] = []
        while self._header is not None or (self.pending and self._damage is None):
            need = self._header.frame_len if self._header else HEADER_BYTES
            self._fail(f"torn tail: {self.pending} bytes of a frame of at least {need}")
            self._header = None
            self._at += 1
            frames.extend(self._frames())
        if self._damage is not None:
            self._end_damage(self._base + len(self._buffer))
        self._at = len(self._buffer)
        return frames

    def _frames(self) -> Iterator[Frame]:
        while len(self._buffer) - self._at >= HEADER_BYTES:
            if self._header is None:
                if self._damage is not None and not self._skip_to_magic():
                    return
                try:
                    self._header = unpack_header(self._buffer, self._at, offset=self.offset)
                except PacketError as exc:
                    self._fail(exc.message)
                    self._at += 1
                    continue
            end = self._at + self._header.frame_len
            if len(self._buffer) < end:
                return
            header, start = self._header, self.offset
            found = self._crc(self._at + HEADER_BYTES, end)
            if found != header.payload_crc:
                # The length is sound (the header's checksum holds), yet bytes may have been lost or put in between:
                # so look for the next header from here, not from the end that the length names.
                self._header = None
                self._fail(f"payload checksum is {found:08x}, expected {header.payload_crc:08x}")
                self._sums = self._sums or Sums(start)
                self._summed = max(self._summed, self._base + end)
                self._at += 1
                continue
            payload = bytes(memoryview(self._buffer)[self._at + HEADER_BYTES : end])
            if self._damage is not None:
                self._end_damage(start)
            self._header, self._at = None, end
            yield Frame(start, header, payload)

    def _crc(self, start: int, end: int) -> int:
        """Of these bytes of the buffer; those that were summed before, for a payload that is none, are not again."""
        with memoryview(self._buffer) as view:
            if self._sums is None or end - start <= STEP or self.offset >= self._summed:
                return crc32(view[start:end])
            return self._sums.crc(view, self._base, self._base + start, self._base + end)

    def _skip_to_magic(self) -> bool:
        """Move to the next place that may be a header; False: the buffer holds none, and a possible start is kept."""
        found = self._buffer.find(MAGIC, self._at)
        if found >= 0:
            self._at = found
            return len(self._buffer) - found >= HEADER_BYTES
        self._at = max(self._at, len(self._buffer) - len(MAGIC) + 1)
        return False

    def _fail(self, reason: str) -> None:
        if self._on_damage is None:
            self._error = PacketError(reason, self.offset)
            raise self._error
        if self._damage is None:
            self._damage = self.offset, reason

    def _end_damage(self, end: int) -> None:
        assert self._damage is not None
        assert self._on_damage is not None
        start, reason = self._damage
        self._damage = None
        self._on_damage(Damage(start, end, reason))


# --- the payloads that describe the file itself ---------------------------------------------------------------------


class FileInfo(NamedTuple):
    file_id: bytes
    segment: int
    previous_chain: bytes
    written_by: str

    def pack(self) -> bytes:
        return FILE_STRUCT.pack(self.file_id, self.segment, self.previous_chain) + self.written_by.encode()

    @classmethod
    def unpack(cls, frame: Frame) -> FileInfo:
        file_id, segment, chain = unpack_payload(FILE_STRUCT, frame, "FILE")
        return cls(file_id, segment, chain, frame.payload[FILE_STRUCT.size :].decode(errors="replace"))


class SourceInfo(NamedTuple):
    device: int
    inode: int
    birth_ns: int
    start_off: int
    compression: Compression
    path: bytes
    before: CommitEntry | None = None
    """How the generation before ended; None in a source's first one, and there only."""
    stands: CommitEntry | None = None
    """Where this generation stands, if the frame only states it again (RESTATED)."""

    def pack(self) -> bytes:
        entries = b"".join(ENTRY_STRUCT.pack(*entry) for entry in self[6:] if entry is not None)
        return SOURCE_STRUCT.pack(*self[:5]) + entries + self.path

    @classmethod
    def unpack(cls, frame: Frame) -> SourceInfo:
        device, inode, birth, start, compression = unpack_payload(SOURCE_STRUCT, frame, "SOURCE")
        kind = _enum(Compression, compression, frame, "compression")
        at, before, stands = SOURCE_STRUCT.size, None, None
        if frame.header.generation:
            before = CommitEntry.make(unpack_payload(ENTRY_STRUCT, frame, "SOURCE", at))
            at += ENTRY_STRUCT.size
        if frame.header.flags & Flag.RESTATED:
            stands = CommitEntry.make(unpack_payload(ENTRY_STRUCT, frame, "SOURCE", at))
            at += ENTRY_STRUCT.size
        return cls(device, inode, birth, start, kind, frame.payload[at:], before, stands)


class GapInfo(NamedTuple):
    start: int
    end: int
    lines: int
    reason: GapReason

    @property
    def is_loss(self) -> bool:
        """Whether bytes are lost by it; False: a REGRESSION, and the packet file has all that anybody knows of."""
        return self.reason is not GapReason.REGRESSION or self.end != self.start

    def pack(self) -> bytes:
        return GAP_STRUCT.pack(*self)

    @classmethod
    def unpack(cls, frame: Frame) -> GapInfo:
        start, end, lines, reason = unpack_payload(GAP_STRUCT, frame, "GAP")
        return cls(start, end, lines, _enum(GapReason, reason, frame, "gap reason"))


class CommitEntry(NamedTuple):
    source_id: int
    generation: int
    source_frame: int
    resume_off: int
    next_seq: int
    size: int
    mtime_ns: int
    head_len: int
    guard_len: int
    flags: EntryFlag
    head: bytes
    guard: bytes

    @classmethod
    def make(cls, fields: tuple[Any, ...]) -> CommitEntry:
        """From what ENTRY_STRUCT gives."""
        return cls._make((*fields[:9], EntryFlag(fields[9]), *fields[10:]))


class CommitInfo(NamedTuple):
    durable_upto: int
    previous_commit: int
    total_lines: int
    chain: bytes
    full: bool
    entries: tuple[CommitEntry, ...]

    def pack(self) -> bytes:
        fixed = COMMIT_STRUCT.pack(
            self.durable_upto, self.previous_commit, self.total_lines, self.chain, len(self.entries), self.full
        )
        return fixed + b"".join(ENTRY_STRUCT.pack(*entry) for entry in self.entries)

    @classmethod
    def unpack(cls, frame: Frame) -> CommitInfo:
        durable, previous, total, chain, count, full = unpack_payload(COMMIT_STRUCT, frame, "COMMIT")
        expected = COMMIT_STRUCT.size + count * ENTRY_STRUCT.size
        if len(frame.payload) != expected:
            raise PacketError(f"COMMIT payload is {len(frame.payload)} bytes, expected {expected}", frame.offset)
        entries = map(CommitEntry.make, ENTRY_STRUCT.iter_unpack(memoryview(frame.payload)[COMMIT_STRUCT.size :]))
        return cls(durable, previous, total, chain, bool(full), tuple(entries))


def unpack_payload(layout: struct.Struct, frame: Frame, what: str, at: int = 0) -> tuple[Any, ...]:
    """Of a frame's payload, from `at` on. Raises PacketError: it is too short."""
    if len(frame.payload) < at + layout.size:
        raise PacketError(
            f"{what} payload is {len(frame.payload)} bytes, expected at least {at + layout.size}", frame.offset
        )
    return layout.unpack_from(frame.payload, at)


_E = TypeVar("_E", Compression, GapReason)


def _enum(kind: type[_E], value: int, frame: Frame, what: str) -> _E:
    try:
        return kind(value)
    except ValueError:
        raise PacketError(f"{what} is {value}, known are {[int(k) for k in kind]}", frame.offset) from None
