"""Packets out of streams, and back: length-prefixed, octet-counted and line framings. No I/O and no clock.

    PrefixFramer("!I")     a header with the payload's size, as `struct` describes it; a digest if you like
    OctetFramer()          "LEN SP payload": syslog over TCP and TLS (RFC 6587, section 3.4.1; RFC 5425, section 4.3)
    LineFramer()           each line is a packet: RFC 6587, section 3.4.2, and most of the world

    framer.feed(data)      whole packets, in whatever pieces their bytes come
    framer.get_buffer()    the same for `asyncio.BufferedProtocol`: the socket writes where the packet is put together
    framer.encode(payload) the way back

Promises:
    - Every whole packet that has come is given out at once, in order, with the offset of its frame in the stream.
    - Time is linear in the bytes fed, however they are cut. A payload byte is copied once, from where it was received
      into its packet; once more only if it came in a crumb: less than CRUMB_BYTES, or so little of its buffer that
      keeping the buffer for it would waste more memory than it holds.
    - Memory is bounded by the bytes of one packet that have come, not by the length that it announces: at most four
      times these and RECEIVE_BYTES; between packets nothing is held.
    - Bytes from outside end in packets or in a PacketError that names the byte, never in another exception.

A fault is a header that cannot be, a payload over `max_packet`, a wrong digest, or an end inside a packet. What
happens then is the framer's `on_error`:
    "close"   packets before the fault are given out, `error` is set, and every later feed raises it;
    "skip"    that packet is left out, as far as its length can be believed; otherwise as "close";
    "resync"  as "skip", and behind a header that cannot be the stream is searched for the next mark: the header's
              magic, for octet counts the next line end. No byte is searched twice, so this is linear too; a damaged
              size takes at most one more packet with it, of at most `max_packet` bytes.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import sys
import zlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

from ..errors import PacketError, PacketTooLargeError
from .codec import Buffer
from .framer import MAX_PACKET, Fault, Framer, OnError, Packet

_ZERO = ord("0")
_packet = tuple.__new__  # makes a Packet of its four fields: NamedTuple's own __new__ takes twice as long

Digest = str | Callable[[bytes], bytes]


class _CountedFramer(Framer):
    """A header that tells the payload's size, the payload, perhaps a digest behind it.

    The state is what comes next: `_skip` bytes that nobody wants, a mark (`_searching`), a header (`_size` is -1), the
    payload (`_body` is None), or the digest behind it.
    """

    _mark: bytes  # what a search looks for
    _mark_stays = False  # whether the mark is the next packet's beginning
    _header_max: int  # bytes that a header may have
    _tail_bytes = 0  # of the digest behind the payload

    def __init__(
        self,
        *,
        max_packet: int = MAX_PACKET,
        on_error: OnError = "close",
        on_fault: Callable[[PacketError], object] | None = None,
    ) -> None:
        super().__init__(max_packet=max_packet, on_error=on_error, on_fault=on_fault)
        self._skip = 0
        self._searching = False
        self._size = -1
        self._body: bytes | None = None

    @abstractmethod
    def _open(self, data: memoryview | bytearray, at: int, end: int) -> tuple[int, int]:
        """Read the header at `at`: how many bytes it has (0: it is not whole), and the payload's size."""

    @abstractmethod
    def _packet(self, payload: bytes, tail: bytes) -> Packet:
        """Raises Fault: the digest is wrong."""

    def _quick(self, data: bytes | bytearray, view: memoryview, at: int, end: int, packets: list[Packet]) -> int:
        """Take packets that are whole and right, as long as there are some: most are, and small ones in a row cost
        several times less so. Returns where something else is, for the others to look at."""
        return at

    def _missing(self) -> int:
        return 0 if self._size < 0 or self._body is not None else self._size - self._have

    def _scan(self, data: bytes | bytearray, end: int, stable: bool, packets: list[Packet]) -> None:
        with memoryview(data) as whole, whole[:end] as view:  # released at once: its owner may want to resize it
            self._walk(data, view, end, stable, packets)

    def _walk(self, data: bytes | bytearray, view: memoryview, end: int, stable: bool, packets: list[Packet]) -> None:
        at = 0
        while True:
            if self._size < 0 and not (self._small or self._skip or self._searching):
                at = self._quick(data, view, at, end, packets)
            if self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
                at += step
            if self._searching:
                at = self._search(data, at, end)
            if self._size < 0:
                if at == end:
                    return
                at = self._header(view, at, end)
                if self._size < 0:
                    continue
            if self._body is None:
                need = self._size - self._have
                if end - at < need:
                    if at < end:
                        self._keep(view[at:end], len(data), stable)
                    return
                self._body = self._whole(view[at : at + need])
                at += need
            tail = b""
            if self._tail_bytes:
                need = self._tail_bytes - len(self._small)
                self._small += view[at : at + need]
                if end - at < need:
                    self._have = self._held = len(self._body)
                    return
                at += need
                tail = bytes(self._small)
                self._clear()
            payload, self._body, self._size = self._body, None, -1
            try:
                packets.append(self._packet(payload, tail))
            except Fault as fault:
                self._fail(fault)

    def _header(self, view: memoryview, at: int, end: int) -> int:
        """Read a header, whose beginning may have come before; returns where to go on."""
        before = len(self._small)
        try:
            if not before:
                self._start = self._offset + at
                used, size = self._open(view, at, end)
                if not used:
                    self._small += view[at:end]
                    return end
            else:
                self._small += view[at : at + self._header_max - before]
                used, size = self._open(self._small, 0, len(self._small))
                if not used:
                    return end
                self._small.clear()
        except Fault as fault:
            begun = bytes(self._small[:before])
            self._fail(fault)
            if fault.skip is not None:
                self._skip = fault.skip - before
                return at
            self._searching = True
            self._small += begun[1:]  # the next header may begin behind this one's first byte
            return at if before else at + 1
        self._size = size
        return at + used - before

    def _search(self, data: bytes | bytearray, at: int, end: int) -> int:
        """Look for the mark; returns where to go on."""
        before, size = len(self._small), len(self._mark)
        # First on the border to what came before, then in place: copying the rest at each false mark is quadratic.
        border = bytes(self._small) + bytes(memoryview(data)[at : min(end, at + size - 1)])
        self._small.clear()
        begin = at - before + border.find(self._mark) if self._mark in border else data.find(self._mark, at, end)
        if begin < 0 and self._mark not in border:
            rest = border if end - at < size else data[end - size + 1 : end]
            self._small += rest[max(0, len(rest) - size + 1) :]
            return end
        self._searching = False
        begin += 0 if self._mark_stays else size
        stop = max(at, begin)
        self._small += border[begin - at + before : stop - at + before]
        self._start = self._offset + begin
        return stop

    def _end(self, packets: list[Packet]) -> None:
        if self._searching:
            return
        if self._size >= 0:
            size = self._size + self._tail_bytes
            raise Fault(f"the stream ends inside a packet: {self.pending} bytes of {size} behind its header", skip=0)
        if self._small:
            found = bytes(self._small)
            raise Fault(f"the stream ends inside a header, after {found!r}", skip=0)


class PrefixFramer(_CountedFramer):
    """Packets behind a header of fixed size that tells the payload's size.

        PrefixFramer("!I")                                         u32, big-endian: `logging.handlers.SocketHandler`
        PrefixFramer("<4sHI", magic=b"OFF1", digest="crc32")       a magic, a kind, the size; CRC-32 behind the payload
        PrefixFramer(">IB", size_field=0, counts_header=True)      a size that counts all

    Args:
        header: a `struct` format.
        size_field: which of the header's fields is the size.
        counts_header, counts_digest: whether the size counts these too.
        digest: what hashes the payload: "crc32", a name that `hashlib` knows, or a function of bytes to bytes.
        digest_place: "after" the payload, "before" it (behind the header), or which of the header's fields.
        check_digest: False leaves checking to who takes the packets, for example on another thread.
        magic: the bytes that each header begins with; they are its first field.
        max_packet, on_error, on_fault: as for Framer; "resync" needs a magic.

    Raises:
        ValueError: the header has no such field, or "resync" no magic.
    """

    def __init__(
        self,
        header: str = "!I",
        *,
        size_field: int = -1,
        counts_header: bool = False,
        counts_digest: bool = False,
        digest: Digest | None = None,
        digest_place: Literal["before", "after"] | int = "after",
        check_digest: bool = True,
        magic: bytes = b"",
        max_packet: int = MAX_PACKET,
        on_error: OnError = "close",
        on_fault: Callable[[PacketError], object] | None = None,
    ) -> None:
        super().__init__(max_packet=max_packet, on_error=on_error, on_fault=on_fault)
        if on_error == "resync" and not magic:
            raise ValueError("resync needs a magic to look for; give one, or skip")
        try:
            self._header_struct = struct.Struct(header)
        except struct.error as exc:
            raise ValueError(f"header is {header!r}, no struct format: {exc}") from None
        fields = self._header_struct.unpack(bytes(self._header_struct.size))
        self._size_at = _field(fields, size_field, "size", int)
        self._mark, self._mark_stays = magic, True
        if magic and (not isinstance(fields[0], bytes) or len(magic) != len(fields[0])):
            raise ValueError(f"magic is {len(magic)} bytes, expected a first field of so many in {header!r}")
        self._digest = None if digest is None else _digest(digest, "<" if header[:1] == "<" else ">")
        self.digest = digest
        self.check_below = sys.maxsize if check_digest else 0
        self._is_crc_reversed = digest == "crc32" and header[:1] == "<"
        digest_bytes = 0 if digest is None else _digest_bytes(digest)
        self._digest_at: int | None = None
        if digest is not None and isinstance(digest_place, int):
            self._digest_at = _field(fields, digest_place, "digest", int, bytes)
            field = fields[self._digest_at]
            if isinstance(field, bytes) and len(field) != digest_bytes:
                raise ValueError(f"digest is {digest_bytes} bytes, its field in {header!r} has {len(field)}")
            self._byteorder: Literal["little", "big"] = "little" if header[:1] == "<" else "big"
            self._digest_bytes = digest_bytes
            digest_bytes = 0
        self._before = digest_bytes if digest_place == "before" else 0
        self._tail_bytes = digest_bytes if digest_place == "after" else 0
        self._header_max = self._header_struct.size + self._before
        self._extra = self._header_struct.size * counts_header + digest_bytes * counts_digest
        self._fields: tuple[Any, ...] = ()
        self._stated = b""

    def parts(self, payload: Buffer, *fields: Any) -> tuple[Buffer, ...]:
        size = self._fits(payload) + self._extra
        digest = b"" if self._digest is None else self._digest(payload)
        values: list[Any] = [*fields]
        special: list[tuple[int, Any]] = [(self._size_at, size)]
        if self._digest_at is not None:
            is_number = isinstance(self._header_struct.unpack(bytes(self._header_struct.size))[self._digest_at], int)
            special.append((self._digest_at, int.from_bytes(digest, self._byteorder) if is_number else digest))
        if self._mark:
            special.append((0, self._mark))
        for place, value in sorted(special):
            values.insert(place, value)
        try:
            header = self._header_struct.pack(*values)
        except struct.error as exc:
            raise PacketTooLargeError(
                f"{values} do not fit the header {self._header_struct.format}: {exc}", 0
            ) from None
        if self._before:
            return header, digest, payload
        return (header, payload, digest) if self._tail_bytes else (header, payload)

    def forward(self, packet: Packet) -> bytes:
        ours = {self._size_at, self._digest_at, 0 if self._mark else None}
        return self.encode(packet.payload, *(f for place, f in enumerate(packet.fields) if place not in ours))

    def _open(self, data: memoryview | bytearray, at: int, end: int) -> tuple[int, int]:
        if self._mark and (found := bytes(data[at : min(end, at + len(self._mark))])) != self._mark[: end - at]:
            raise Fault(f"found {found.hex(' ')}, expected the magic {self._mark.hex(' ')}")
        if end - at < self._header_max:
            return 0, 0
        fields = self._header_struct.unpack_from(data, at)
        size = fields[self._size_at] - self._extra
        if size < 0:
            raise Fault(f"size is {fields[self._size_at]}, expected at least {self._extra}")
        if size > self.max_packet:
            whole = self._header_max + size + self._tail_bytes
            raise Fault(
                f"packet is {size} bytes, limit is {self.max_packet}",
                skip=None if self._on_error == "resync" else whole,
                kind=PacketTooLargeError,
            )
        self._fields = fields
        if self._before:
            self._stated = bytes(data[at + self._header_struct.size : at + self._header_max])
        return self._header_max, size

    def _quick(self, data: bytes | bytearray, view: memoryview, at: int, end: int, packets: list[Packet]) -> int:
        if self._digest is not None:
            return at
        unpack, place, extra, mark = self._header_struct.unpack_from, self._size_at, self._extra, self._mark
        header, largest, offset, append = self._header_max, self.max_packet, self._offset, packets.append
        while end - at >= header:
            fields = unpack(data, at)
            size = fields[place] - extra
            body = at + header
            if not 0 <= size <= largest or body + size > end or (mark and fields[0] != mark):
                break
            append(_packet(Packet, (bytes(view[body : body + size]), offset + at, fields, b"")))
            at = body + size
        return at

    def _packet(self, payload: bytes, tail: bytes) -> Packet:
        if self._digest is None:
            return Packet(payload, self._start, self._fields)
        stated = tail or self._stated
        if self._digest_at is not None:
            field = self._fields[self._digest_at]
            stated = field if isinstance(field, bytes) else _number(field, self._digest_bytes, self._byteorder)
        if len(payload) < self.check_below:
            found = self._digest(payload)
            if found != stated:
                raise Fault(f"digest is {found.hex()}, expected {stated.hex()}", skip=0)
        return Packet(payload, self._start, self._fields, stated[::-1] if self._is_crc_reversed else stated)


class OctetFramer(_CountedFramer):
    """Octet counting: the payload's size in decimal, a space, the payload (RFC 6587, section 3.4.1).

    `logger --tcp --octet-count`, rsyslog's omfwd with `TCP_Framing="octet-counted"`, and every syslog over TLS send it.
    """

    _mark = b"\n"  # many senders end their messages so
    _header_max = 11  # ten digits and the space

    def parts(self, payload: Buffer, *fields: Any) -> tuple[Buffer, ...]:
        size = self._fits(payload)
        if not size:
            raise PacketError("packet is empty, which octet counting has no count for; leave it out", 0)
        return b"%d " % size, payload

    def _open(self, data: memoryview | bytearray, at: int, end: int) -> tuple[int, int]:
        head = bytes(data[at : min(end, at + self._header_max)])
        digits, space, _ = head.partition(b" ")
        # ASCII digits only: `int` takes signs and underscores too.
        if (
            (digits and not digits.isdigit())
            or head[:1] in (b"0", b" ")
            or (not space and len(head) == self._header_max)
        ):
            raise Fault(f"found {head!r}, expected a count of bytes, a space, and so many bytes (RFC 6587, 3.4.1)")
        if not space:
            return 0, 0
        size, used = int(digits), len(digits) + 1
        if size > self.max_packet:
            message = f"packet is {size} bytes, limit is {self.max_packet}"
            raise Fault(message, skip=used + size, kind=PacketTooLargeError)
        return used, size

    def _quick(self, data: bytes | bytearray, view: memoryview, at: int, end: int, packets: list[Packet]) -> int:
        largest, offset, append = self.max_packet, self._offset, packets.append
        while (space := data.find(b" ", at, min(end, at + self._header_max))) > at:
            digits = data[at:space]
            if not digits.isdigit() or data[at] == _ZERO:
                break
            size = int(digits)
            body = space + 1
            if size > largest or body + size > end:
                break
            append(_packet(Packet, (bytes(view[body : body + size]), offset + at, (), b"")))
            at = body + size
        return at

    def _packet(self, payload: bytes, tail: bytes) -> Packet:
        return Packet(payload, self._start)


class LineFramer(Framer):
    """Each line is a packet, without its LF (RFC 6587, section 3.4.2); a CR before it stays.

    A line over `max_packet` can be skipped; the last one need not have its end.
    """

    def __init__(
        self,
        *,
        max_packet: int = MAX_PACKET,
        on_error: OnError = "close",
        on_fault: Callable[[PacketError], object] | None = None,
    ) -> None:
        super().__init__(max_packet=max_packet, on_error=on_error, on_fault=on_fault)
        self._skipping = False  # the rest of a line that is too long

    def parts(self, payload: Buffer, *fields: Any) -> tuple[Buffer, ...]:
        self._fits(payload)
        if b"\n" in (payload if isinstance(payload, bytes | bytearray) else bytes(payload)):
            raise PacketError("packet holds a line end, which would make two of it; use a framing with sizes", 0)
        return payload, b"\n"

    def _scan(self, data: bytes | bytearray, end: int, stable: bool, packets: list[Packet]) -> None:
        at, largest, offset, append = 0, self.max_packet, self._offset, packets.append
        with memoryview(data) as view:
            while at < end:
                found = data.find(b"\n", at, end)
                if 0 <= found - at <= largest and not (self._have or self._skipping):  # most lines
                    append(_packet(Packet, (bytes(view[at:found]), offset + at, (), b"")))
                elif not self._piece(data, at, found, end, stable, packets):
                    return
                at = found + 1

    def _piece(
        self, data: bytes | bytearray, at: int, found: int, end: int, stable: bool, packets: list[Packet]
    ) -> bool:
        """Take a part of a line, its end if that was found; whether it was."""
        stop = end if found < 0 else found
        if not self._skipping:
            if not self._have:
                self._start = self._offset + at
            if self._have + stop - at > self.max_packet:
                self._skipping = True
                self._fail(
                    Fault(f"line is over the limit of {self.max_packet} bytes", skip=0, kind=PacketTooLargeError)
                )
            elif found < 0:
                self._keep(memoryview(data)[at:end], len(data), stable)
            else:
                packets.append(Packet(self._whole(memoryview(data)[at:found]), self._start))
        self._skipping = self._skipping and found < 0
        return found >= 0

    def _end(self, packets: list[Packet]) -> None:
        if self._have:
            packets.append(Packet(self._whole(memoryview(b"")), self._start))


def framer_factory(text: str) -> Callable[..., Framer]:
    """The framing that a command line names, as a function that makes a framer of it.

    Args:
        text: "u32", "octet", "lines", or a `struct` format of the header, for example ">HI"; behind it, with commas,
            what PrefixFramer takes: `size=FIELD`, `counts=header`, `counts=digest`, `magic=TEXT`, and a digest with its
            place, `crc32`, `sha256=before`, `md5=2`.

    Returns:
        Takes `max_packet`, `on_error` and `on_fault`.

    Raises:
        ValueError: it names none.
    """
    simple: dict[str, Callable[..., Framer]] = {"u32": PrefixFramer, "octet": OctetFramer, "lines": LineFramer}
    if text in simple:
        return simple[text]
    header, *words = text.split(",")
    options: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name == "size" and value.lstrip("-").isdecimal():
            options["size_field"] = int(value)
        elif name == "counts" and value in ("header", "digest"):
            options[f"counts_{value}"] = True
        elif name == "magic":
            options["magic"] = value.encode()
        elif value in ("", "before", "after") or value.isdecimal():
            options["digest"] = name
            options["digest_place"] = int(value) if value.isdecimal() else value or "after"
        else:
            raise ValueError(f"framing {text!r} has {word!r}, expected size=, counts=, magic= or a digest")
    try:
        PrefixFramer(header, **options)
    except ValueError as exc:
        raise ValueError(f"framing is {text!r}, expected u32, octet, lines or a struct format: {exc}") from None
    return functools.partial(PrefixFramer, header, **options)


def _field(fields: tuple[Any, ...], place: int, what: str, *kinds: type) -> int:
    at = place if place >= 0 else len(fields) + place
    if not 0 <= at < len(fields) or not isinstance(fields[at], kinds) or isinstance(fields[at], bool):
        raise ValueError(f"field {place} of the header's {len(fields)} cannot hold a {what}")
    return at


def _digest(digest: Digest, order: str) -> Callable[[Buffer], bytes]:
    if callable(digest):
        function = digest
        return lambda payload: function(bytes(payload))
    if digest == "crc32":
        crc = struct.Struct(f"{order}I")
        return lambda payload: crc.pack(zlib.crc32(payload))
    try:
        made = hashlib.new(digest)
    except (ValueError, TypeError):
        raise ValueError(f"digest is {digest!r}, expected crc32 or one of hashlib's") from None
    if not made.digest_size:
        raise ValueError(f"digest is {digest!r}, which has no size of its own; give a function")
    return lambda payload: hashlib.new(digest, payload).digest()


@functools.lru_cache(maxsize=64)  # a digest may be costly, and a server makes a framer for each connection
def _digest_bytes(digest: Digest) -> int:
    return len(_digest(digest, ">")(b""))


def _number(value: int, size: int, byteorder: Literal["little", "big"]) -> bytes:
    """A digest that stands in the header as a number; one that cannot be is none."""
    return value.to_bytes(size, byteorder) if 0 <= value < 1 << 8 * size else b""
