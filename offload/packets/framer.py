"""What all framings of a stream share: the pieces of a payload, the buffer to receive into, and faults.

The framings are in `framing.py`, and so are the promises about time and memory that this module keeps:
    - a piece of a payload stays where it was received (`_keep`), unless it is a crumb, until the packet is whole;
    - a large payload is received into chunks that grow with what has come (`get_buffer`), and joined once;
    - a buffer in which nothing is kept goes to the next framer that receives, so that idle streams hold none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

from ..errors import PacketError, PacketTooLargeError
from .codec import Buffer

OnError = Literal["close", "skip", "resync"]

MAX_PACKET: Final = 1 << 20
RECEIVE_BYTES: Final = 128 << 10  # twice 64 KiB takes a fifth more a second (bench_net.py); more only fills the cache
CRUMB_BYTES: Final = 4 << 10  # below, a view and its place in a list cost as much as copying
CHUNK_BYTES: Final = 512 << 10  # at most, so that one system call stays below a millisecond
_WASTE: Final = 4  # a piece that is kept is at least this part of its buffer
_SPARES: Final = 4


class Packet(NamedTuple):
    """One packet of a stream.

    Attributes:
        payload: its bytes, without header, digest and line end.
        offset: of its frame, in bytes from the start of the stream.
        fields: the header's fields, as `struct` gives them; empty where there is no such header.
        digest: as the sender stated it, for who checks it elsewhere (a CRC-32 in big-endian order, as a Verifier gives
            it); empty without one.
    """

    payload: bytes
    offset: int
    fields: tuple[Any, ...] = ()
    digest: bytes = b""


class Fault(Exception):
    """What is wrong with the packet under way; `skip`: how many bytes from its start belong to it, if that is known."""

    def __init__(self, message: str, *, skip: int | None = None, kind: type[PacketError] = PacketError) -> None:
        super().__init__(message)
        self.message, self.skip, self.kind = message, skip, kind


class Framer(ABC):
    """What all framings share: the pieces of a payload, the buffer to receive into, and faults. One for each stream.

    Args:
        max_packet: bytes that a payload may have.
        on_error: "close", "skip" or "resync", see the head of this module.
        on_fault: called with each fault that is passed over; it must neither feed nor raise.

    Attributes:
        error: the fault that ended the stream; None: it goes on.
        faults: how many were found.
        digest: what hashes the payloads; None: they have no digest.
        check_below: digests of payloads of fewer bytes are checked here, the others by who takes the packets.
    """

    digest: str | Callable[[bytes], bytes] | None = None
    check_below: int = 0

    def __init__(
        self,
        *,
        max_packet: int = MAX_PACKET,
        on_error: OnError = "close",
        on_fault: Callable[[PacketError], object] | None = None,
    ) -> None:
        if max_packet < 1:
            raise ValueError(f"max_packet is {max_packet}, expected at least 1 byte")
        if on_error not in ("close", "skip", "resync"):
            raise ValueError(f"on_error is {on_error!r}, expected 'close', 'skip' or 'resync'")
        self.max_packet = max_packet
        self.error: PacketError | None = None
        self.faults = 0
        self._on_error = on_error
        self._on_fault = on_fault
        self._offset = 0  # of what `_scan` looks at, in the stream
        self._start = 0  # of the packet under way
        self._pieces: list[memoryview | bytearray] = []  # of the payload under way
        self._have = 0  # bytes in the pieces and in the chunk
        self._held = 0  # bytes of memory that these keep
        self._small = bytearray()  # of a header or digest that is not whole yet
        self._buffer: bytearray | None = None  # to receive into
        self._pinned = False  # whether a piece is a view of what is scanned
        self._kept: list[bytearray] = []  # buffers of which pieces are views
        self._chunk: bytearray | None = None  # the next piece of a large payload, received where it stays
        self._filled = 0  # bytes in the chunk

    # --- in -----------------------------------------------------------------------------------------------------------

    def feed(self, data: Buffer) -> list[Packet]:
        """Take more bytes and return the packets that are whole now. A memoryview is copied first.

        Raises:
            PacketError: a fault that ends the stream. Packets before it are returned first: then `error` is set, and
                the next `feed` or `close` raises it.
        """
        self._check()
        assert self._chunk is None, "what was received comes by buffer_updated"
        if isinstance(data, memoryview):
            data = bytes(data)  # a view cannot be searched
        # What cannot change any more may be kept as it is.
        return self._scanned(data, len(data), stable=isinstance(data, bytes))

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where to receive next, as `asyncio.BufferedProtocol.get_buffer`; `buffer_updated` says how much came."""
        if self._chunk is None:
            missing = self._missing()
            if missing >= RECEIVE_BYTES:
                # Grows with what has come: an announced size alone must not cost memory.
                self._chunk, self._filled = bytearray(min(missing, max(RECEIVE_BYTES, self._have), CHUNK_BYTES)), 0
                self._held += len(self._chunk)
        if self._chunk is not None:
            return memoryview(self._chunk)[self._filled :]
        if self._buffer is None:
            try:
                self._buffer = _spares.pop()
            except IndexError:
                self._buffer = bytearray(RECEIVE_BYTES)
        return memoryview(self._buffer)

    def buffer_updated(self, nbytes: int) -> list[Packet]:
        """So many bytes were received into what `get_buffer` gave; returns and raises as `feed`."""
        self._check()
        if self._chunk is not None:
            self._filled += nbytes
            self._have += nbytes
            self._offset += nbytes
            if self._filled < len(self._chunk):
                return []
            self._pieces.append(memoryview(self._chunk))
            self._chunk = None
            return self._scanned(b"", 0, stable=True)
        buffer, self._buffer = self._buffer, None
        assert buffer is not None, "get_buffer comes first"
        self._pinned = False
        try:
            return self._scanned(buffer, nbytes, stable=True)
        finally:
            # If nothing of it is kept it goes to the next framer that receives: an idle stream holds none.
            if self._pinned:
                self._kept.append(buffer)
            elif len(_spares) < _SPARES:
                _spares.append(buffer)

    def close(self) -> list[Packet]:
        """Say that the stream has ended. Returns what its end makes whole: a last line without its line end.

        Raises:
            PacketError: it ended inside a packet and `on_error` is "close"; or it ended before, by a fault.
        """
        self._check()
        packets: list[Packet] = []
        try:
            self._end(packets)
        except Fault as fault:
            self._fail(fault)
        self._clear()
        return packets

    def reject(self, packet: Packet, reason: str) -> None:
        """Say that a packet which was given out is wrong, for who checks digests elsewhere; in order of the packets.

        Raises:
            PacketError: it ends the stream, where it stands; packets behind it are none.
        """
        error = PacketError(reason, packet.offset)
        if self._on_error == "close":
            self.faults += self.error is None  # one that stands behind it counts no more
            self.error = error
            raise error
        self.faults += 1
        if self._on_fault is not None:
            self._on_fault(error)

    @property
    def offset(self) -> int:
        """Bytes of the stream taken so far."""
        return self._offset

    @property
    def pending(self) -> int:
        """Bytes kept of a packet that is not whole yet; 0: the stream is between two packets."""
        return self._have + len(self._small)

    @property
    def held_bytes(self) -> int:
        """Bytes of memory kept for a packet that is not whole yet."""
        return self._held + len(self._small)

    # --- out ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self, payload: Buffer, *fields: Any) -> tuple[Buffer, ...]:
        """The frame of a payload as buffers in a row, for `writelines`; the payload is not copied.

        Args:
            fields: the header's other fields in order, where there are any.

        Raises:
            PacketTooLargeError: over `max_packet`, or over what the header can say.
            PacketError: this framing cannot carry it (a line end inside a line).
        """

    def forward(self, packet: Packet) -> bytes:
        """The frame of a packet that came in the same framing, its other fields with it; errors as for `parts`."""
        return self.encode(packet.payload)

    def encode(self, payload: Buffer, *fields: Any) -> bytes:
        """The frame of a payload as one; arguments and errors as for `parts`."""
        return b"".join(self.parts(payload, *fields))

    def _fits(self, payload: Buffer) -> int:
        size = len(payload)
        if size > self.max_packet:
            raise PacketTooLargeError(f"packet is {size} bytes, limit is {self.max_packet}; raise max_packet", 0)
        return size

    # --- for the framings ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _scan(self, data: bytes | bytearray, end: int, stable: bool, packets: list[Packet]) -> None:
        """Take `data[:end]`, appending the packets that are whole. `stable`: it will not be written again."""

    @abstractmethod
    def _end(self, packets: list[Packet]) -> None:
        """The stream ends. Raises Fault: inside a packet."""

    def _missing(self) -> int:
        """Bytes of the payload under way that are still to come, where its size is known."""
        return 0

    def _keep(self, piece: memoryview, buffer_bytes: int, stable: bool) -> None:
        """Hold a part of a payload until the rest has come."""
        size = len(piece)
        self._have += size
        if stable and size >= CRUMB_BYTES and _WASTE * size >= buffer_bytes:
            self._pieces.append(piece)
            self._held += buffer_bytes
            self._pinned = True
            return
        if not self._pieces or not isinstance(self._pieces[-1], bytearray):
            self._pieces.append(bytearray())
        self._pieces[-1] += piece  # type: ignore[operator]  # a bytearray
        self._held += size

    def _whole(self, last: memoryview) -> bytes:
        """The payload of which this is the last part."""
        if not self._pieces:
            return bytes(last)
        payload = _JOIN((*self._pieces, last))
        self._let_go()
        return payload

    def _let_go(self) -> None:
        """The pieces are not needed any more, nor are their buffers: making one anew costs as much as filling it."""
        self._pieces, self._have, self._held = [], 0, 0
        while self._kept:
            buffer = self._kept.pop()
            if len(_spares) < _SPARES:
                _spares.append(buffer)

    def _clear(self) -> None:
        self._let_go()
        self._chunk = None
        self._small.clear()

    def _fail(self, fault: Fault) -> None:
        """Report a fault; returns if `on_error` allows to go on behind it.

        Raises:
            PacketError: it ends the stream.
        """
        self.faults += 1
        self._clear()
        error = fault.kind(fault.message, self._start)
        if self._on_error == "close" or (fault.skip is None and self._on_error == "skip"):
            self.error = error
            raise error
        if self._on_fault is not None:
            self._on_fault(error)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _scanned(self, data: bytes | bytearray, end: int, *, stable: bool) -> list[Packet]:
        packets: list[Packet] = []
        try:
            self._scan(data, end, stable, packets)
        except PacketError:
            if not packets:
                raise
        finally:
            self._offset += end
        return packets

    def _check(self) -> None:
        if self.error is not None:
            raise self.error


# Buffers that no framer uses now. Lists are safe from several threads, and more than a few would only lie there.
_spares: list[bytearray] = []
_JOIN = b"".join
