"""Framing of streams: whole packets from any pieces, in linear time and bounded memory; faults that end or pass."""

from __future__ import annotations

import hashlib
import itertools
import logging
import logging.handlers
import pickle
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import PacketError, PacketTooLargeError
from offload.packets import framer as base
from offload.packets import framing as module
from offload.packets.framer import CRUMB_BYTES, RECEIVE_BYTES, Framer, Packet
from offload.packets.framing import LineFramer, OctetFramer, PrefixFramer, framer_factory

Make = Callable[..., Framer]

FRAMINGS: dict[str, Make] = {
    "u32": partial(PrefixFramer, "!I"),
    "u16 of all": partial(PrefixFramer, "<H", counts_header=True),
    "size first": partial(PrefixFramer, ">IB", size_field=0, counts_header=True),
    "signed size": partial(PrefixFramer, ">i"),
    "digest behind": partial(PrefixFramer, "!I", digest="md5"),
    "digest behind, counted": partial(PrefixFramer, "!I", digest="crc32", counts_digest=True),
    "digest before": partial(PrefixFramer, "!I", digest="sha1", digest_place="before"),
    "digest in the header": partial(PrefixFramer, "!16sI", digest="md5", digest_place=0),
    "crc in the header": partial(PrefixFramer, "<4sIHI", magic=b"ABAC", size_field=1, digest="crc32", digest_place=3),
    "own digest": partial(PrefixFramer, "!I", digest=lambda data: hashlib.blake2b(data, digest_size=3).digest()),
    "magic": partial(PrefixFramer, "!2sI", magic=b"AA"),
    "octet": OctetFramer,
    "lines": LineFramer,
}
FIELDS: dict[str, tuple[Any, ...]] = {"size first": (7,), "crc in the header": (513,)}
PAYLOADS = (b"", b"a", b"AAbc\0d", b"12 34", b"ABACABAC!")

every_framing = pytest.mark.parametrize("name", FRAMINGS)


def carried(name: str, payloads: Iterable[bytes]) -> list[bytes]:
    """Those that this framing can carry."""
    if name == "octet":
        return [p for p in payloads if p]
    return [p for p in payloads if name != "lines" or b"\n" not in p]


def stream_of(name: str, payloads: Sequence[bytes]) -> tuple[bytes, list[tuple[bytes, int]]]:
    """The stream, and each payload with the offset of its frame."""
    framer, stream, expected = FRAMINGS[name](), b"", []
    for payload in payloads:
        expected.append((payload, len(stream)))
        stream += framer.encode(payload, *FIELDS.get(name, ()))
    return stream, expected


def told(packets: Iterable[Packet]) -> list[tuple[bytes, int]]:
    return [(packet.payload, packet.offset) for packet in packets]


def pieces(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    places = [0, *sorted(cuts), len(data)]
    return (data[a:b] for a, b in itertools.pairwise(places))


def feed_bytes(framer: Framer, data: bytes) -> list[Packet]:
    return framer.feed(data)


def feed_reused(framer: Framer, data: bytes) -> list[Packet]:
    """From a buffer that its owner uses again at once."""
    buffer = bytearray(data)
    try:
        return framer.feed(buffer)
    finally:
        buffer[:] = b"\xee" * len(buffer)
        buffer.clear()


def feed_view(framer: Framer, data: bytes) -> list[Packet]:
    return framer.feed(memoryview(b"<" + data + b">")[1:-1])


def receive(framer: Framer, data: bytes) -> list[Packet]:
    """As asyncio's transports do for a BufferedProtocol."""
    packets: list[Packet] = []
    while data and framer.error is None:
        buffer = framer.get_buffer(-1)
        size = min(len(buffer), len(data))
        buffer[:size] = data[:size]
        data = data[size:]
        packets += framer.buffer_updated(size)
    return packets


WAYS: list[Callable[[Framer, bytes], list[Packet]]] = [feed_bytes, feed_reused, feed_view, receive]


# --- whole packets ----------------------------------------------------------------------------------------------------


@every_framing
@pytest.mark.parametrize("way", WAYS)
def test_every_pair_of_cuts_gives_the_same_packets(name: str, way: Callable[[Framer, bytes], list[Packet]]) -> None:
    """A small stream cut at any two places, also within headers and digests, gives the same packets and offsets."""
    stream, expected = stream_of(name, carried(name, PAYLOADS[:3]))
    for cuts in itertools.combinations_with_replacement(range(len(stream) + 1), 2):
        framer = FRAMINGS[name]()
        assert told(p for piece in pieces(stream, cuts) for p in way(framer, piece)) == expected, cuts
        assert (framer.close(), framer.pending, framer.held_bytes, framer.offset) == ([], 0, 0, len(stream))


@every_framing
@pytest.mark.parametrize("way", WAYS)
def test_each_packet_comes_with_its_last_byte(name: str, way: Callable[[Framer, bytes], list[Packet]]) -> None:
    """Fed byte by byte, each packet is given out with its last byte, not with the next packet's first."""
    stream, expected = stream_of(name, carried(name, PAYLOADS))
    ends = [offset for _, offset in expected[1:]] + [len(stream)]
    framer, got = FRAMINGS[name](), []
    for at in range(len(stream)):
        for packet in way(framer, stream[at : at + 1]):
            got.append((packet.payload, at + 1))
    assert got == [(payload, end) for (payload, _), end in zip(expected, ends, strict=True)]


@every_framing
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_round_trip_of_any_packets_in_any_pieces(name: str, data: st.DataObject) -> None:
    """What `encode` wrote comes back, whatever the payloads, the cuts and the way in."""
    drawn = data.draw(st.lists(st.binary(max_size=300) | st.binary(max_size=20).map(lambda b: b * 1000), max_size=8))
    stream, expected = stream_of(name, carried(name, drawn))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    framer = FRAMINGS[name]()
    got: list[Packet] = []
    for piece in pieces(stream, cuts):
        got += data.draw(st.sampled_from(WAYS))(framer, piece)
    assert told(got) == expected
    assert (framer.close(), framer.held_bytes) == ([], 0)


@pytest.mark.parametrize("size", [1, CRUMB_BYTES, RECEIVE_BYTES - 1, RECEIVE_BYTES, RECEIVE_BYTES + 1, 700_000])
@pytest.mark.parametrize("step", [1009, 10_000, RECEIVE_BYTES, 1 << 20])
@pytest.mark.parametrize("way", [feed_bytes, feed_reused, receive])
def test_large_packets_are_put_together_right(
    size: int, step: int, way: Callable[[Framer, bytes], list[Packet]]
) -> None:
    """Packets around every threshold come back byte for byte, between small ones, from pieces of any size."""
    payloads = [b"before", random.Random(size).randbytes(size), b"", b"behind"]
    framer = PrefixFramer("!I", digest="crc32")
    stream = b"".join(map(framer.encode, payloads))
    got = [p.payload for piece in pieces(stream, range(step, len(stream), step)) for p in way(framer, piece)]
    assert got == payloads
    assert framer.held_bytes == 0


def test_socket_handler_is_understood() -> None:
    """What logging's SocketHandler makes is a u32 packet: its pickle, which nobody needs to load."""
    record = logging.LogRecord("name", logging.INFO, "path", 1, "said %s", ("this",), None)
    (packet,) = PrefixFramer("!I").feed(logging.handlers.SocketHandler("host", 1).makePickle(record))
    assert pickle.loads(packet.payload)["msg"] == "said this"


def test_fields_and_digest_come_with_the_packet() -> None:
    """The header's fields and the stated digest are the packet's, for who checks it elsewhere."""
    framer = FRAMINGS["crc in the header"]()
    (packet,) = framer.feed(framer.encode(b"payload", 513))
    assert packet.fields == (b"ABAC", 7, 513, zlib.crc32(b"payload"))
    assert packet.digest == zlib.crc32(b"payload").to_bytes(4, "big")  # as Verifier("crc32") gives it
    unchecked = PrefixFramer("!I", digest="md5", check_digest=False)
    (packet,) = unchecked.feed(b"\0\0\0\x01" + b"x" + bytes(16))
    assert (packet.payload, packet.digest) == (b"x", bytes(16))


def test_costly_digest_is_not_called_for_each_framer() -> None:
    """A server makes a framer for each connection, on its loop: only the first asks the digest for its size."""
    calls: list[bytes] = []

    def digest(payload: bytes) -> bytes:
        calls.append(payload)
        return b"four"

    for _ in range(3):
        PrefixFramer("!I", digest=digest)
    assert calls == [b""]


@every_framing
def test_forwarded_packet_has_the_frame_that_it_came_in(name: str) -> None:
    """`forward` makes the very bytes of which the packet was made, also where a header has other fields."""
    stream, expected = stream_of(name, carried(name, PAYLOADS))
    packets = FRAMINGS[name]().feed(stream)
    assert len(packets) == len(expected)
    assert b"".join(map(FRAMINGS[name]().forward, packets)) == stream


def test_sizes_count_what_they_are_said_to_count() -> None:
    """A size counts the payload, or the header too, or the digest too."""
    assert PrefixFramer("!I").encode(b"abc") == b"\0\0\0\x03abc"
    assert PrefixFramer("!I", counts_header=True).encode(b"abc") == b"\0\0\0\x07abc"
    digest = hashlib.md5(b"abc").digest()
    assert PrefixFramer("!I", digest="md5").encode(b"abc") == b"\0\0\0\x03abc" + digest
    counted = PrefixFramer("!I", digest="md5", digest_place="before", counts_header=True, counts_digest=True)
    assert counted.encode(b"abc") == b"\0\0\0\x17" + digest + b"abc"
    assert OctetFramer().encode(b"abc") == b"3 abc"
    assert LineFramer().encode(b"abc\r") == b"abc\r\n"


def test_last_line_needs_no_end() -> None:
    """A stream's last line without a line end is given out when the stream ends."""
    framer = LineFramer()
    assert told(framer.feed(b"one\r\ntw")) == [(b"one\r", 0)]
    assert told(framer.close()) == [(b"tw", 5)]


# --- time and memory --------------------------------------------------------------------------------------------------


class Count:
    """Counts bytes that the framers copy, by standing in for the functions that copy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copied = self.searched = 0
        count = self

        class AnyBytes(type):
            def __instancecheck__(cls, value: object) -> bool:
                return isinstance(value, bytes)

        class Bytes(bytes, metaclass=AnyBytes):
            def __new__(cls, source: Any = b"") -> Any:
                made = bytes.__new__(bytes, source)
                count.copied += 0 if made is source else len(made)
                return made

        class Bytearray(bytearray):
            def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]
                count.copied += len(other)
                return super().__iadd__(other)

        def join(parts: Sequence[Any]) -> bytes:
            count.copied += sum(map(len, parts))
            return b"".join(parts)

        for place in (base, module):
            monkeypatch.setattr(place, "bytes", Bytes, raising=False)
            monkeypatch.setattr(place, "bytearray", Bytearray, raising=False)
        monkeypatch.setattr(base, "_JOIN", join)
        base._spares.clear()

        class Watched(bytes):
            def find(self, sub: Any, start: Any = 0, end: Any = None, /) -> int:
                found = bytes.find(self, sub, start, end)
                count.searched += (len(self) if end is None else end) - start if found < 0 else found - start + 1
                return found

        self.watched = Watched


@every_framing
@pytest.mark.parametrize(
    ("step", "size"),
    [(1, 10), (1, 20_000), (7, 3000), (1000, 10), (1000, 60_000), (5000, 60_000), (64 << 10, 3000), (1 << 20, 60_000)],
)
def test_bytes_copied_are_linear_in_bytes_fed(name: str, step: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each payload byte is copied once, in crumbs twice, and searched once, however the stream is cut."""
    stream, expected = stream_of(name, [b"x" * size] * max(2, 20_000 // size))
    count = Count(monkeypatch)
    framer = FRAMINGS[name]()
    parts = pieces(stream, range(step, len(stream), step))
    got = [packet.offset for part in parts for packet in framer.feed(count.watched(part))]
    assert got == [offset for _, offset in expected]
    small = 64 * (len(expected) + len(stream) // step + 1)  # headers and digests
    assert count.copied <= (1 if step >= CRUMB_BYTES and size > step else 2) * len(stream) + small
    assert count.searched <= len(stream) + small


@pytest.mark.parametrize("size", [RECEIVE_BYTES, 1 << 20])
def test_received_payloads_are_copied_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the socket writes into the framer's buffers is copied into the packet, and nowhere before."""
    framer = PrefixFramer("!I")
    stream = framer.encode(b"x" * size) * 8
    count = Count(monkeypatch)
    assert len(receive(framer, stream)) == 8
    assert count.copied <= len(stream) * 1.1


@pytest.mark.parametrize("step", [1, 3, 50_000])
def test_search_for_a_magic_is_linear(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of nothing but false magics is passed over in linear time."""
    stream = b"ABAC\xff\xff\xff\xff" * 5000
    count = Count(monkeypatch)
    framer = PrefixFramer("!4sI", magic=b"ABAC", on_error="resync")
    for piece in pieces(stream, range(step, len(stream), step)):
        assert framer.feed(count.watched(piece)) == []
    assert framer.faults == 5000
    assert count.copied <= 12 * len(stream)
    assert count.searched <= 2 * len(stream)


def test_announced_sizes_cost_no_memory() -> None:
    """A header that announces a gigabyte holds a receive buffer; memory grows with what comes, at most fourfold."""
    framer = PrefixFramer("!I", max_packet=1 << 30)
    receive(framer, struct.pack("!I", 1 << 30) + b"x")
    received = 1
    for _ in range(60):
        buffer = framer.get_buffer()
        assert framer.held_bytes <= 4 * received + RECEIVE_BYTES
        framer.buffer_updated(size := min(len(buffer), 50_000))
        received += size


def test_crumbs_cost_no_more_than_their_bytes() -> None:
    """A megabyte that comes byte by byte is held as a megabyte, not as a million pieces."""
    framer = PrefixFramer("!I")
    framer.feed(struct.pack("!I", 1 << 20))
    for _ in range(100_000):
        framer.feed(b"x")
    assert framer.held_bytes == framer.pending == 100_000
    assert len(framer._pieces) == 1


def test_idle_framers_hold_nothing() -> None:
    """Between two packets a framer has no buffer, so ten thousand idle connections have none."""
    base._spares.clear()
    framers = [PrefixFramer("!I") for _ in range(1000)]
    for framer in framers:
        assert len(receive(framer, framer.encode(b"some packet"))) == 1
    assert len(base._spares) == 1
    assert all(f._buffer is None and f.held_bytes == 0 for f in framers)


# --- faults -----------------------------------------------------------------------------------------------------------

GOOD = struct.pack("!2sI", b"AA", 4) + b"good"


def with_faults(framer_of: Make, on_error: Any, data: bytes, cuts: Iterable[int] = ()) -> tuple[Any, ...]:
    """Payloads with offsets, faults passed over, and the fault that ended it."""
    faults: list[str] = []
    framer = framer_of(max_packet=100, on_error=on_error, on_fault=lambda e: faults.append(str(e)))
    got: list[Packet] = []
    try:
        for piece in pieces(data, cuts):
            got += framer.feed(piece)
        got += framer.close()
    except PacketError as exc:
        return told(got), faults, str(exc) if exc is framer.error else repr(exc)
    return told(got), faults, None


MAGIC = partial(PrefixFramer, "!2sI", magic=b"AA")
CRC = partial(PrefixFramer, "!2sI", magic=b"AA", digest="crc32")
C = CRC().encode(b"good")
WRONG = C[:-1] + b"?"
FAULTS: list[tuple[str, Make, Any, bytes, list[tuple[bytes, int]], list[str], str | None]] = [
    (
        "too large, closed",
        FRAMINGS["u32"], "close", b"\0\0\0\x01x\0\0\0\x65", [(b"x", 0)], [],
        "byte 5: packet is 101 bytes, limit is 100",
    ),
    (
        "too large, skipped",
        FRAMINGS["u32"], "skip", b"\0\0\0\x65" + b"y" * 101 + b"\0\0\0\x01x", [(b"x", 105)],
        ["byte 0: packet is 101 bytes, limit is 100"], None,
    ),
    (
        "too large with a digest behind, skipped",
        partial(PrefixFramer, "!I", digest="crc32"), "skip",
        b"\0\0\0\x65" + b"y" * 105 + PrefixFramer("!I", digest="crc32").encode(b"x"), [(b"x", 109)],
        ["byte 0: packet is 101 bytes, limit is 100"], None,
    ),
    (
        "size that cannot be",
        FRAMINGS["u16 of all"], "skip", b"\x03\0x\x01\0", [(b"x", 0)], [],
        "byte 3: size is 1, expected at least 2",
    ),
    (
        "negative size",
        FRAMINGS["signed size"], "skip", b"\xff\xff\xff\xff", [], [], "byte 0: size is -1, expected at least 0",
    ),
    (
        "no magic, searched",
        MAGIC, "resync", GOOD + b"AxAAx" + GOOD + GOOD, [(b"good", 0), (b"good", 15), (b"good", 25)],
        ["byte 10: found 41 78, expected the magic 41 41", "byte 12: packet is 2017542400 bytes, limit is 100"], None,
    ),
    (
        "no magic, not believed",
        MAGIC, "skip", GOOD + b"no" + GOOD, [(b"good", 0)], [], "byte 10: found 6e 6f, expected the magic 41 41",
    ),
    (
        "damaged size, searched",
        MAGIC, "resync", b"AA\xff\0\0\x04" + GOOD, [(b"good", 6)],
        ["byte 0: packet is 4278190084 bytes, limit is 100"], None,
    ),
    (
        "wrong digest, closed",
        CRC, "close", C + WRONG + C, [(b"good", 0)], [],
        f"byte 14: digest is {C[-4:].hex()}, expected {WRONG[-4:].hex()}",
    ),
    (
        "wrong digest, skipped",
        CRC, "skip", C + WRONG + C, [(b"good", 0), (b"good", 28)],
        [f"byte 14: digest is {C[-4:].hex()}, expected {WRONG[-4:].hex()}"], None,
    ),
    (
        "octets: no count",
        OctetFramer, "skip", b"3 abcx", [(b"abc", 0)], [],
        "byte 5: found b'x', expected a count of bytes, a space, and so many bytes (RFC 6587, 3.4.1)",
    ),
    (
        "octets: leading zero",
        OctetFramer, "close", b"03 abc", [], [],
        "byte 0: found b'03 abc', expected a count of bytes, a space, and so many bytes (RFC 6587, 3.4.1)",
    ),
    (
        "octets: too many digits",
        OctetFramer, "close", b"1" * 11, [], [],
        "byte 0: found b'11111111111', expected a count of bytes, a space, and so many bytes (RFC 6587, 3.4.1)",
    ),
    (
        "octets: searched to the line end",
        OctetFramer, "resync", b"<13>an old line\n3 abc", [(b"abc", 16)],
        ["byte 0: found b'<13>an old ', expected a count of bytes, a space, and so many bytes (RFC 6587, 3.4.1)"], None,
    ),
    (
        "octets: too large, skipped",
        OctetFramer, "resync", b"101 " + b"1 \n" * 33 + b"xx3 abc", [(b"abc", 105)],
        ["byte 0: packet is 101 bytes, limit is 100"], None,
    ),
    (
        "line too long, closed",
        LineFramer, "close", b"ok\n" + b"x" * 101, [(b"ok", 0)], [], "byte 3: line is over the limit of 100 bytes",
    ),
    (
        "line too long, skipped",
        LineFramer, "skip", b"ok\n" + b"x" * 500 + b"\nok", [(b"ok", 0), (b"ok", 504)],
        ["byte 3: line is over the limit of 100 bytes"], None,
    ),
    (
        "end inside a packet",
        FRAMINGS["u32"], "close", b"\0\0\0\x05abc", [], [],
        "byte 0: the stream ends inside a packet: 3 bytes of 5 behind its header",
    ),
    (
        "end inside a header, passed over",
        FRAMINGS["u32"], "skip", b"\0\0\0\x01x\0\0", [(b"x", 0)],
        ["byte 5: the stream ends inside a header, after b'\\x00\\x00'"], None,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "on_error", "data", "packets", "faults", "error"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_fault_is_told_with_its_place(
    make: Make,
    on_error: Any,
    data: bytes,
    packets: list[tuple[bytes, int]],
    faults: list[str],
    error: str | None,
) -> None:
    """A fault names its frame's offset, what was found and what was expected; what is sound around it comes through."""
    assert with_faults(make, on_error, data) == (packets, faults, error)


@pytest.mark.parametrize(("make", "on_error", "data"), [f[1:4] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_fault_is_the_same_wherever_the_stream_is_cut(make: Make, on_error: Any, data: bytes) -> None:
    """Cut at any place, or everywhere, a stream with a fault gives the same packets, faults and end."""

    def unquoted(found: tuple[Any, ...]) -> tuple[Any, ...]:
        # What a message quotes of a header depends on how much of it had come.
        packets, faults, error = found
        return packets, [f.partition(": found")[0] for f in faults], (error or "").partition(": found")[0]

    expected = unquoted(with_faults(make, on_error, data))
    for cuts in [*((at,) for at in range(len(data))), range(1, len(data))]:
        assert unquoted(with_faults(make, on_error, data, cuts)) == expected, cuts


def test_packets_before_a_fault_come_first_and_then_the_error_stays() -> None:
    """The feed that meets a fault returns what was whole before; `error` is set, and later feeds raise it."""
    framer = PrefixFramer("!I", max_packet=3)
    assert told(framer.feed(b"\0\0\0\x01x\0\0\0\x04")) == [(b"x", 0)]
    assert isinstance(framer.error, PacketTooLargeError)
    assert framer.error.offset == 5
    with pytest.raises(PacketTooLargeError, match="packet is 4 bytes"):
        framer.feed(b"y")
    with pytest.raises(PacketTooLargeError, match="packet is 4 bytes"):
        framer.close()
    assert framer.held_bytes == 0


SMALL: dict[str, Make] = {
    **{name: partial(make, max_packet=20) for name, make in FRAMINGS.items()},
    "lines": partial(LineFramer, max_packet=5),
}
alphabet = st.sampled_from([b"\0", b"\x01", b"\x02", b"\x05", b"A", b"B", b"C", b"1", b"2", b" ", b"\n", b"\xff"])
noise = st.lists(alphabet | st.binary(max_size=3) | st.sampled_from([b"ABAC", b"AA\0\0\0\x01x", b"1 x", b"\0\0\0\x02"]))


@every_framing
@pytest.mark.parametrize("on_error", ["close", "skip", "resync"])
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_bytes_give_packets_or_packet_errors(name: str, on_error: Any, data: st.DataObject) -> None:
    """Arbitrary bytes end in packets within the limit or in PacketErrors, the same ones however they are cut."""
    make = SMALL[name]
    if on_error == "resync" and "magic" not in getattr(make, "keywords", {}) and name not in ("octet", "lines"):
        with pytest.raises(ValueError, match="resync needs a magic"):
            make(on_error=on_error)
        return
    stream = b"".join(data.draw(noise))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    whole = outcome(make, on_error, [stream], feed_bytes)
    assert outcome(make, on_error, pieces(stream, cuts), data.draw(st.sampled_from(WAYS))) == whole
    assert outcome(make, on_error, (stream[i : i + 1] for i in range(len(stream))), feed_bytes) == whole
    assert all(len(payload) <= 20 for payload, _ in whole[0])


def outcome(
    make: Make, on_error: Any, parts: Iterable[bytes], way: Callable[[Framer, bytes], list[Packet]]
) -> tuple[list[tuple[bytes, int]], list[str], str]:
    faults: list[str] = []
    framer = make(on_error=on_error, on_fault=lambda e: faults.append(str(e)))
    got: list[Packet] = []
    try:
        for part in parts:
            got += way(framer, part)
            assert framer.held_bytes <= 60
            if framer.error is not None:
                break
        got += framer.close()
    except PacketError:
        pass
    # What a message quotes of a header depends on how much of it had come.
    faults = [fault.partition(": found")[0] for fault in faults]
    return told(got), faults, str(framer.error).partition(": found")[0]


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("framer", "payload", "message"),
    [
        (PrefixFramer("!I", max_packet=3), b"four", "packet is 4 bytes, limit is 3; raise max_packet"),
        (PrefixFramer("!B"), bytes(256), "do not fit the header !B"),
        (LineFramer(), b"two\nlines", "packet holds a line end"),
        (LineFramer(), memoryview(b"two\nlines"), "packet holds a line end"),
        (OctetFramer(), b"", "packet is empty"),
    ],
)
def test_packet_that_a_framing_cannot_carry_is_refused(framer: Framer, payload: Any, message: str) -> None:
    """`encode` refuses what the other side could not read back as it was."""
    with pytest.raises(PacketError, match=message):
        framer.encode(payload)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"header": "!Z"}, "no struct format"),
        ({"header": "!4s"}, "cannot hold a size"),
        ({"header": "!I", "size_field": 1}, "field 1 of the header's 1 cannot hold a size"),
        ({"header": "!4sI", "magic": b"abc"}, "magic is 3 bytes"),
        ({"header": "!I", "magic": b"abc"}, "magic is 3 bytes"),
        ({"digest": "md6"}, "digest is 'md6', expected crc32 or one of hashlib's"),
        ({"digest": "shake_128"}, "which has no size of its own"),
        ({"header": "!8sI", "digest": "md5", "digest_place": 0}, "digest is 16 bytes, its field in '!8sI' has 8"),
        ({"on_error": "resync"}, "resync needs a magic"),
        ({"on_error": "ignore"}, "on_error is 'ignore', expected"),
        ({"max_packet": 0}, "max_packet is 0, expected at least 1 byte"),
    ],
)
def test_header_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    """A framer whose header cannot hold what it should is refused when it is made."""
    with pytest.raises(ValueError, match=message):
        PrefixFramer(**arguments)


def test_framings_are_named_as_on_a_command_line() -> None:
    """`u32`, `octet`, `lines` and struct formats with their options name framings."""
    made = [framer_factory(text)() for text in ("u32", "octet", "lines", ">H")]
    assert [f.encode(b"abc") for f in made] == [b"\0\0\0\x03abc", b"3 abc", b"abc\n", b"\0\x03abc"]
    full = framer_factory(">4sIH,size=1,counts=header,counts=digest,magic=OFF1,crc32=before")(max_packet=10)
    assert full.encode(b"abc", 9) == struct.pack(">4sIHI", b"OFF1", 17, 9, zlib.crc32(b"abc")) + b"abc"
    for text in ("u33", ">I,size", ">I,counts=all", ">I,md6", ""):
        with pytest.raises(ValueError, match="framing"):
            framer_factory(text)


def test_stream_through_a_real_socket() -> None:
    """Bytes received from a socket into the framer's buffers give the packets that were sent."""
    left, right = socket.socketpair()
    chance = random.Random(1)
    payloads = [chance.randbytes(chance.choice([0, 5, 2000, 90_000])) for _ in range(50)]
    framer = PrefixFramer("!I", digest="sha256")
    got: list[bytes] = []
    with left, right:
        right.setblocking(False)
        left.setblocking(False)
        waiting = memoryview(b"".join(map(framer.encode, payloads)))
        while len(got) < len(payloads):
            if waiting:
                waiting = waiting[left.send(waiting[: chance.randrange(1, 100_000)]) :]
            try:
                size = right.recv_into(framer.get_buffer())
            except BlockingIOError:
                continue
            got += [p.payload for p in framer.buffer_updated(size)]
    assert got == payloads
