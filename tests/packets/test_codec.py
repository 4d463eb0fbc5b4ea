"""Frames in any pieces, every kind of damage, the limits, and what decoding costs, counted."""

from __future__ import annotations

import importlib
import itertools
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import PacketError, PacketTooLargeError
from offload.packets import Damage, Flag, Frame, FrameType, GapReason, Header, PacketDecoder, encode
from offload.packets.codec import (
    CommitEntry,
    CommitInfo,
    FileInfo,
    GapInfo,
    SourceInfo,
    pack_header,
    packets_payload,
    unpack_header,
)
from offload.packets.format import (
    COMMIT_STRUCT,
    ENTRY_STRUCT,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MAX_PAYLOAD,
    NONE_U64,
    Compression,
    EntryFlag,
)

# Hypothesis' own deadline is a timed assertion: on a busy machine it fails for no reason.
calm = settings(deadline=None, max_examples=60)

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
known_flags = st.integers(0, 31)


def exact(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


@st.composite
def frames_as_bytes(draw: st.DrawFn) -> bytes:
    """A frame with any fields and a payload that likes to hold the beginnings of frames."""
    payload = b"".join(draw(st.lists(st.sampled_from([b"line\n", MAGIC, MAGIC[:2], b"\xff", bytes(70)]), max_size=4)))
    return encode(
        draw(st.sampled_from(FrameType)),
        payload,
        flags=draw(known_flags),
        source_id=draw(u32),
        seq=draw(u64),
        source_off=draw(u64),
        time_ns=draw(u64),
        count=draw(u32),
        generation=draw(u32),
        prev_len=draw(u32),
        epoch=draw(u32),
    )


def sealed(**fields: int) -> bytes:
    """A header with any numbers at all and the checksum that fits them."""
    values = {"version": 1, "type": 1, "flags": 0, "payload_len": 0, "payload_crc": 0} | fields
    head = HEADER.pack(
        MAGIC,
        values["version"],
        values["type"],
        values["flags"],
        values["payload_len"],
        *[0] * 5,
        values["payload_crc"],
        *[0] * 4,
    )[:-4]
    return head + struct.pack("<I", crc32(head))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces, cut at these places."""
    borders = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(borders)]


def decode(pieces: list[bytes]) -> tuple[list[Frame], list[Damage]]:
    """All frames and all damage, in one go over any damage."""
    damage: list[Damage] = []
    decoder = PacketDecoder(on_damage=damage.append)
    frames = [frame for piece in pieces for frame in decoder.feed(piece)]
    return frames + decoder.close(), damage


def decode_strictly(pieces: list[bytes]) -> tuple[list[Frame], PacketError | None]:
    """The frames before the first fault, and the fault."""
    decoder = PacketDecoder()
    frames: list[Frame] = []
    try:
        for piece in pieces:
            frames += decoder.feed(piece)
        frames += decoder.close()
    except PacketError as exc:
        return frames, exc
    return frames, None


def assert_tiled(frames: list[Frame], damage: list[Damage], size: int) -> None:
    """Every byte is in one frame or in one damaged stretch, and two stretches never touch."""
    stretches = sorted([(f.offset, f.end, "frame") for f in frames] + [(d.start, d.end, "damage") for d in damage])
    at = 0
    before = ""
    for start, end, kind in stretches:
        assert start == at
        assert end > start
        assert (before, kind) != ("damage", "damage")
        at, before = end, kind
    assert at == size


SMALL = [
    encode(FrameType.FILE, b"id", epoch=7),
    encode(FrameType.LINES, b"one\ntwo\n", count=2, prev_len=66, epoch=7),
    encode(FrameType.NOTE, b"", prev_len=72, epoch=7),
    encode(FrameType.LINES, b"three\n", seq=2, source_off=8, count=1, prev_len=64, epoch=7),
]


# --- whole frames ---------------------------------------------------------------------------------------------------


@given(st.lists(frames_as_bytes(), max_size=5), st.lists(st.integers(0, 10_000), max_size=8))
@calm
def test_frames_come_out_the_same_in_any_pieces(raw: list[bytes], places: list[int]) -> None:
    """However the bytes are cut, the frames are those of the bytes in one piece, each with its place in the file."""
    data = b"".join(raw)
    frames, error = decode_strictly(cut(data, places))
    assert error is None
    assert frames == decode_strictly([data])[0]
    assert [data[frame.offset : frame.end] for frame in frames] == raw


@given(st.lists(frames_as_bytes(), max_size=3))
@calm
def test_frames_come_out_the_same_byte_by_byte(raw: list[bytes]) -> None:
    """A frame is returned by the feed that brings its last byte, and by no earlier one."""
    decoder = PacketDecoder()
    for whole in raw:
        for byte in whole[:-1]:
            assert decoder.feed(bytes([byte])) == []
        (frame,) = decoder.feed(whole[-1:])
        assert (frame.header.frame_len, decoder.pending, decoder.offset) == (len(whole), 0, frame.end)
    decoder.close()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_like_object_is_taken(kind: Callable[[bytes], bytes]) -> None:
    """bytes, bytearray and memoryview encode to the same frame and are fed alike."""
    raw = encode(FrameType.LINES, kind(b"line\n"), count=1)
    assert raw == encode(FrameType.LINES, b"line\n", count=1)
    (frame,) = PacketDecoder().feed(kind(raw))
    assert frame.payload == b"line\n"


def test_fed_buffer_may_be_reused() -> None:
    """The decoder and its frames keep nothing of a buffer once feed has returned."""
    raw = bytearray(SMALL[1] + SMALL[2][:10])
    decoder = PacketDecoder()
    (frame,) = decoder.feed(raw)
    raw[:] = bytes(len(raw))
    assert frame.payload == b"one\ntwo\n"
    assert [f.header.type for f in decoder.feed(SMALL[2][10:])] == [FrameType.NOTE]


def test_offsets_count_from_where_the_caller_says() -> None:
    """With `offset`, frames, damage and errors are told in bytes of the file, not of what was fed."""
    decoder = PacketDecoder(offset=1_000_000)
    (frame,) = decoder.feed(SMALL[0])
    assert (frame.offset, frame.end, decoder.offset) == (1_000_000, 1_000_066, 1_000_066)
    with pytest.raises(PacketError) as caught:
        decoder.feed(bytes(64))
    assert caught.value.offset == 1_000_066
    assert str(caught.value) == "byte 1000066: found 00 00 00 00, expected the magic ff 4f 50 4b"


def test_pending_counts_the_bytes_of_the_unfinished_frame() -> None:
    """`pending` is what was fed behind the last whole frame."""
    decoder = PacketDecoder()
    decoder.feed(SMALL[0] + SMALL[1][:30])
    assert (decoder.pending, decoder.offset) == (30, len(SMALL[0]))


# --- one frame's content --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "lines"),
    [
        (b"", []),
        (b"\n", [b"\n"]),
        (b"a\nb\n", [b"a\n", b"b\n"]),
        (b"a\nb", [b"a\n", b"b"]),
        (b"\n\na\r\n", [b"\n", b"\n", b"a\r\n"]),
        (b"\x0b\x0c\x1c\x85\r", [b"\x0b\x0c\x1c\x85\r"]),
    ],
)
def test_lines_end_with_lf_only(payload: bytes, lines: list[bytes]) -> None:
    """Lines keep their LF, are cut at LF and at nothing else, and join to the payload."""
    (frame,) = PacketDecoder().feed(encode(FrameType.LINES, payload))
    assert frame.lines() == frame.packets() == lines
    assert b"".join(lines) == payload == frame.content()


@given(st.lists(st.binary(max_size=20), max_size=6))
@calm
def test_packets_keep_their_borders(packets: list[bytes]) -> None:
    """Arbitrary packets, empty ones too, come out with the borders they went in with; content is their bytes alone."""
    payload, flags = packets_payload(packets)
    (frame,) = PacketDecoder().feed(encode(FrameType.PACKETS, payload, flags=flags, count=len(packets)))
    assert frame.packets() == packets
    assert frame.content() == b"".join(packets)
    assert flags == (Flag.NONE if len(packets) == 1 else Flag.TABLE)


@pytest.mark.parametrize(
    ("payload", "count", "message"),
    [
        (b"", 1, "table of 1 lengths in a payload of 0 bytes"),
        (bytes(7), 2, "table of 2 lengths in a payload of 7 bytes"),
        (bytes(8), 2**32 - 1, "table of 4294967295 lengths in a payload of 8 bytes"),
        (b"\x02\0\0\0ab?", 1, "table of lengths ends at byte 6 of the payload, expected 7"),
        (b"\x02\0\0\0a", 1, "table of lengths ends at byte 6 of the payload, expected 5"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff", 2, "table of lengths ends at byte 8589934598 of the payload, expected 8"),
    ],
)
def test_table_of_lengths_is_checked(payload: bytes, count: int, message: str) -> None:
    """A table that does not fit its payload is a PacketError at the frame, and never a packet of other bytes."""
    raw = encode(FrameType.PACKETS, payload, flags=Flag.TABLE, count=count)
    (frame,) = PacketDecoder(offset=500).feed(raw)
    with pytest.raises(PacketError) as caught:
        frame.packets()
    assert (caught.value.message, caught.value.offset) == (message, 500)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", range(8))
def test_flipped_bit_anywhere_is_found(bit: int) -> None:
    """Each flipped bit of a file raises PacketError at the start of its frame, after the whole frames before it."""
    data = b"".join(SMALL)
    whole = decode_strictly([data])[0]
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << bit
        hit = next(frame for frame in whole if at < frame.end)
        frames, error = decode_strictly([bytes(bad)])
        assert error is not None
        assert error.offset == hit.offset
        assert frames == [frame for frame in whole if frame.end <= hit.offset]


@pytest.mark.parametrize("bit", range(8))
def test_resync_skips_just_the_flipped_frame(bit: int) -> None:
    """With `on_damage`, each flipped bit costs its own frame and no other, and the stretch told is that frame."""
    data = b"".join(SMALL)
    whole = decode_strictly([data])[0]
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << bit
        hit = next(frame for frame in whole if at < frame.end)
        frames, damage = decode([bytes(bad)])
        assert frames == [frame for frame in whole if frame is not hit]
        assert [(stretch.start, stretch.end) for stretch in damage] == [(hit.offset, hit.end)]


@given(
    st.lists(frames_as_bytes(), min_size=1, max_size=5),
    st.integers(0, 10_000),
    st.integers(0, 300),
    st.one_of(st.binary(max_size=200), st.lists(st.sampled_from([MAGIC, b"\xff", b"O"])).map(b"".join)),
    st.lists(st.integers(0, 10_000), max_size=6),
)
@calm
def test_any_damage_in_any_pieces_is_told_exactly(
    raw: list[bytes], at: int, gone: int, put: bytes, places: list[int]
) -> None:
    """Bytes replaced, taken out or put in: frames and damage tile the file, the same in any pieces, nothing before
    the damage is lost, and without `on_damage` the error stands where the first damage does."""
    data = b"".join(raw)
    at %= len(data) + 1
    bad = data[:at] + put + data[at + gone :]
    frames, damage = decode([bad])
    assert_tiled(frames, damage, len(bad))
    assert decode(cut(bad, places)) == (frames, damage)
    before = [frame for frame in decode_strictly([data])[0] if frame.end <= at]
    assert frames[: len(before)] == before
    strict, error = decode_strictly(cut(bad, places))
    assert (error is None) == (damage == [])
    if error is not None:
        assert (error.offset, error.message) == (damage[0].start, damage[0].reason)
    assert strict == [frame for frame in frames if not damage or frame.end <= damage[0].start]


@given(
    st.lists(frames_as_bytes(), min_size=2, max_size=5),
    st.integers(0, 10_000),
    st.one_of(st.binary(min_size=1, max_size=300), st.integers(0, 5000).map(lambda size: sealed(payload_len=size))),
)
@calm
def test_overwritten_stretch_costs_no_frame_outside_it(raw: list[bytes], at: int, put: bytes) -> None:
    """Where bytes change but none is lost, every frame that was not touched is found, whatever lengths came to be."""
    data = b"".join(raw)
    at %= len(data)
    bad = (data[:at] + put + data[at + len(put) :])[: len(data)]
    frames = decode([bad])[0]
    touched = at, min(at + len(put), len(data))
    for frame in decode_strictly([data])[0]:
        if frame.end <= touched[0] or frame.offset >= touched[1]:
            assert frame in frames


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=4))
@calm
def test_noise_ends_in_packet_errors_only(noise: bytes, places: list[int]) -> None:
    """Bytes that never were a packet file raise PacketError or nothing, and never another exception."""
    frames, error = decode_strictly(cut(noise, places))
    assert frames == []
    assert (error is None) == (noise == b"")
    assert_tiled(*decode(cut(noise, places)), len(noise))


@given(
    st.sampled_from(FrameType),
    known_flags,
    u32,
    st.one_of(st.binary(max_size=200), exact(64 + 88), exact(64 + 3 * 88)),
)
@calm
def test_sound_frames_with_senseless_payloads_raise_packet_errors_only(
    type: FrameType, flags: int, count: int, payload: bytes
) -> None:
    """Right checksums around any payload: reading its content gives a value or a PacketError at the frame's offset."""
    generation = flags % 2
    (frame,) = PacketDecoder(offset=9).feed(encode(type, payload, flags=flags, count=count, generation=generation))
    readers: list[Callable[[], Any]] = [
        frame.lines,
        frame.packets,
        frame.content,
        lambda: FileInfo.unpack(frame),
        lambda: SourceInfo.unpack(frame),
        lambda: GapInfo.unpack(frame),
        lambda: CommitInfo.unpack(frame),
    ]
    for read in readers:
        offset = 9
        try:
            read()
        except PacketError as exc:
            offset = exc.offset
        assert offset == 9


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xffOPK", "header is 4 bytes, expected 64"),
        (b"PK\x03\x04" + bytes(60), "found 50 4b 03 04, expected the magic ff 4f 50 4b"),
        (sealed()[:60] + bytes(4), f"header checksum is {crc32(sealed()[:60]):08x}, expected 00000000"),
        (sealed(version=2), "version is 2, this reader knows 1; use a newer offload"),
        (sealed(type=9), "frame type is 9, known are 0 to 8"),
        (sealed(flags=32), "flags are 0x20, known are 0xdf; use a newer offload"),
        (sealed(payload_len=MAX_PAYLOAD + 1), "payload is 16777217 bytes, limit is 16777216"),
    ],
)
def test_header_says_what_is_wrong_with_it(header: bytes, message: str) -> None:
    """Every reason to refuse a header has its sentence: what was found, what was expected, where."""
    with pytest.raises(PacketError) as caught:
        unpack_header(header, offset=77)
    assert (caught.value.message, caught.value.offset) == (message, 77)


@pytest.mark.parametrize("bit", range(16))
def test_unknown_flags_are_refused(bit: int) -> None:
    """Each single flag is known to this reader (all but ZSTD) or refused, so a new meaning is never passed over."""
    if bit < 5 or 1 << bit in (Flag.HOLE, Flag.RESTATED):
        assert unpack_header(sealed(flags=1 << bit)).flags == 1 << bit
    else:
        with pytest.raises(PacketError, match=f"flags are {1 << bit:#x}, known are 0xdf"):
            unpack_header(sealed(flags=1 << bit))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "HOLE payload is 0 bytes, expected 8"),
        (bytes(9), "HOLE payload is 9 bytes, expected 8"),
        (b"\xff" * 8, "hole of 18446744073709551615 bytes at byte 5 of its source ends behind 2**63"),
    ],
)
def test_a_hole_says_what_is_wrong_with_it(payload: bytes, message: str) -> None:
    """A hole holds one length that fits a file; it has no lines, packets or bytes of its own, whatever the length."""
    header = unpack_header(encode(FrameType.LINES, payload, flags=Flag.HOLE, source_off=5))
    with pytest.raises(PacketError) as caught:
        Frame(77, header, payload).hole  # noqa: B018 - it is asked for
    assert (caught.value.message, caught.value.offset) == (message, 77)
    length = (1 << 62).to_bytes(8, "little")
    frame = Frame(77, unpack_header(encode(FrameType.LINES, length, flags=Flag.HOLE)), length)
    assert (frame.hole, frame.lines(), frame.packets(), frame.content()) == (1 << 62, [], [], b"")


def test_payload_checksum_says_what_is_wrong() -> None:
    """A damaged payload is told with both checksums and the offset of its frame."""
    bad = SMALL[0] + SMALL[1][:-1] + b"!"
    found, expected = crc32(b"one\ntwo!"), crc32(b"one\ntwo\n")
    _, error = decode_strictly([bad])
    assert error is not None
    assert error.message == f"payload checksum is {found:08x}, expected {expected:08x}"
    assert error.offset == len(SMALL[0])


def test_frames_before_a_fault_are_returned_first() -> None:
    """One feed that brings a whole frame and a bad one returns the frame; every later call raises the same error."""
    decoder = PacketDecoder()
    assert len(decoder.feed(SMALL[0] + SMALL[1] + bytes(64))) == 2
    errors = []
    calls: list[Callable[[], Any]] = [lambda: decoder.feed(b""), lambda: decoder.feed(SMALL[2]), decoder.close]
    for call in calls:
        with pytest.raises(PacketError) as caught:
            call()
        errors.append(caught.value)
    assert {(error.offset, error.message) for error in errors} == {
        (len(SMALL[0] + SMALL[1]), "found 00 00 00 00, expected the magic ff 4f 50 4b")
    }


def test_error_is_final() -> None:
    """Once close has told a torn tail, the bytes that would complete it come too late."""
    decoder = PacketDecoder()
    decoder.feed(SMALL[1][:-1])
    with pytest.raises(PacketError, match="torn tail") as torn:
        decoder.close()
    with pytest.raises(PacketError) as later:
        decoder.feed(SMALL[1][-1:])
    assert later.value is torn.value


def test_torn_tail_is_told_at_close_for_every_cut() -> None:
    """Cut anywhere but at a border, close tells the torn tail: from the last frame's start to the end of the file."""
    data = b"".join(SMALL)
    whole = decode_strictly([data])[0]
    borders = {0, *(frame.end for frame in whole)}
    for end in range(len(data) + 1):
        frames, error = decode_strictly([data[:end]])
        last = max(border for border in borders if border <= end)
        assert [frame.end for frame in frames] == [border for border in sorted(borders) if 0 < border <= end]
        if end in borders:
            assert error is None
            continue
        hit = next(frame for frame in whole if frame.offset == last)
        need = HEADER_BYTES if end - last < HEADER_BYTES else hit.header.frame_len
        assert error is not None
        assert (error.offset, error.message) == (
            last,
            f"torn tail: {end - last} bytes of a frame of at least {need}",
        )
        assert decode([data[:end]])[1] == [Damage(last, end, error.message)]


def test_torn_tail_is_not_told_before_close() -> None:
    """An unfinished last frame of a file that is still being written is waited for, not reported."""
    damage: list[Damage] = []
    decoder = PacketDecoder(on_damage=damage.append)
    decoder.feed(SMALL[0] + SMALL[1][:-1])
    assert damage == []
    assert [frame.header.type for frame in decoder.feed(SMALL[1][-1:])] == [FrameType.LINES]
    decoder.close()
    assert damage == []


def test_damage_at_the_end_is_one_stretch() -> None:
    """A damaged frame with a torn one behind it is one stretch up to the end, told once."""
    bad = SMALL[0] + bytes(100) + SMALL[1][:70]
    frames, damage = decode([bad])
    assert len(frames) == 1
    assert damage == [Damage(len(SMALL[0]), len(bad), "found 00 00 00 00, expected the magic ff 4f 50 4b")]


def test_frame_behind_garbage_is_found_wherever_a_piece_ends() -> None:
    """A magic that is cut between two feeds is not passed over."""
    bad = SMALL[0] + bytes(100) + SMALL[1] + bytes(70) + SMALL[2]
    whole = decode([bad])
    assert len(whole[0]) == 3
    for place in range(len(bad)):
        assert decode([bad[:place], bad[place:]]) == whole


def test_damaged_length_is_never_followed() -> None:
    """A header whose length was changed does not lead the reader past the frames behind it."""
    raw = bytearray(SMALL[1])
    raw[8:12] = struct.pack("<I", 10_000_000)
    frames, damage = decode([SMALL[0] + bytes(raw) + SMALL[2]])
    assert [frame.header.type for frame in frames] == [FrameType.FILE, FrameType.NOTE]
    assert [(d.start, d.end) for d in damage] == [(len(SMALL[0]), len(SMALL[0] + SMALL[1]))]


def test_close_finds_what_a_false_length_hid() -> None:
    """A header that claims more than there is hides no frame behind it: close tells the damage, returns the rest."""
    claim = sealed(payload_len=10_000)
    damage: list[Damage] = []
    decoder = PacketDecoder(on_damage=damage.append)
    before = decoder.feed(SMALL[0] + claim + b"text" + SMALL[1] + SMALL[2])
    assert [frame.header.type for frame in before] == [FrameType.FILE]
    assert damage == []
    behind = decoder.close()
    start = len(SMALL[0])
    assert [(frame.offset, frame.header.type) for frame in behind] == [
        (start + 68, FrameType.LINES),
        (start + 68 + len(SMALL[1]), FrameType.NOTE),
    ]
    pending = 68 + len(SMALL[1] + SMALL[2])
    assert damage == [Damage(start, start + 68, f"torn tail: {pending} bytes of a frame of at least 10064")]
    assert (decoder.pending, decoder.close()) == (0, [])


def test_close_finds_frames_between_false_lengths() -> None:
    """Each of several headers that claim too much costs its own bytes, behind damage, a frame or one another."""
    claim = sealed(payload_len=1000)
    pieces = [b"noise" * 20, claim, claim, SMALL[1], claim, SMALL[2], SMALL[3], claim[:50]]
    frames, damage = decode([b"".join(pieces)])
    ends = list(itertools.accumulate(map(len, pieces)))
    assert [[frame.offset, frame.end] for frame in frames] == [ends[2:4], ends[4:6], ends[5:7]]
    assert [(d.start, d.end) for d in damage] == [(0, ends[2]), (ends[3], ends[4]), (ends[6], ends[7])]
    assert [d.reason for d in damage] == [
        "found 6e 6f 69 73, expected the magic ff 4f 50 4b",
        f"torn tail: {ends[7] - ends[3]} bytes of a frame of at least 1064",
        "torn tail: 50 bytes of a frame of at least 64",
    ]


def test_close_without_on_damage_returns_nothing_behind_a_torn_tail() -> None:
    """A strict reader raises at the header whose payload is not there, whatever stands in it."""
    decoder = PacketDecoder()
    decoder.feed(sealed(payload_len=1000) + SMALL[1])
    with pytest.raises(PacketError, match=f"torn tail: {64 + len(SMALL[1])} bytes of a frame of at least 1064"):
        decoder.close()
    whole = PacketDecoder()
    whole.feed(SMALL[1])
    assert whole.close() == []


def test_lost_bytes_inside_a_frame_cost_that_frame_only() -> None:
    """Bytes missing from a payload: the next frame is looked for at once, not where the length says."""
    bad = SMALL[0] + SMALL[1][:-3] + SMALL[2] + SMALL[3]
    frames, damage = decode([bad])
    assert [frame.header.type for frame in frames] == [FrameType.FILE, FrameType.NOTE, FrameType.LINES]
    assert [(d.start, d.end) for d in damage] == [(len(SMALL[0]), len(SMALL[0] + SMALL[1]) - 3)]


# --- limits and cost ------------------------------------------------------------------------------------------------


def test_largest_payload_goes_both_ways() -> None:
    """A payload of exactly 16 MiB is encoded and decoded."""
    payload = bytes(MAX_PAYLOAD)
    (frame,) = PacketDecoder().feed(encode(FrameType.PACKETS, payload, count=1))
    assert frame.payload == payload
    assert frame.header.frame_len == MAX_PAYLOAD + 64


def test_payload_over_the_limit_is_refused_before_it_is_copied() -> None:
    """One byte over 16 MiB is a PacketTooLargeError that says the limit and the cure."""
    with pytest.raises(PacketTooLargeError) as caught:
        pack_header(FrameType.LINES, MAX_PAYLOAD + 1, 0)
    assert caught.value.message == "payload is 16777217 bytes, limit is 16777216; split it"
    with pytest.raises(PacketTooLargeError):
        encode(FrameType.LINES, bytes(MAX_PAYLOAD + 1))


@pytest.mark.parametrize("field", ["source_id", "count", "generation", "prev_len", "epoch"])
def test_field_that_does_not_fit_is_the_callers_bug(field: str) -> None:
    """A number too large for its field raises struct.error and is never cut to fit."""
    with pytest.raises(struct.error):
        encode(FrameType.LINES, b"", **{field: 2**32})


class CountingBuffer(bytearray):
    """The decoder's buffer, counting the bytes that taking some off its front moves."""

    moved = 0

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        if isinstance(key, slice):
            CountingBuffer.moved += len(part)
            return CountingBuffer(part)
        return part

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        CountingBuffer.moved += len(self)


@pytest.mark.parametrize("piece", [1, 7, 64, 1000, 10**6])
def test_decoding_is_linear_in_bytes(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces: each header is read once, each byte is checksummed once and moved at most once."""
    codec = importlib.import_module("offload.packets.codec")
    headers = summed = 0

    def counted_header(*args: Any, **kwargs: Any) -> Header:
        nonlocal headers
        headers += 1
        return unpack_header(*args, **kwargs)

    def counted_crc(data: bytes) -> int:
        nonlocal summed
        summed += len(data)
        return crc32(data)

    raw = [encode(FrameType.LINES, b"x" * n) for n in (0, 1, 5000, 40, 40, 40, 3000, 0, 0, 700)]
    data = b"".join(raw)
    monkeypatch.setattr(codec, "unpack_header", counted_header)
    monkeypatch.setattr(codec, "crc32", counted_crc)
    monkeypatch.setattr(CountingBuffer, "moved", 0)
    decoder = PacketDecoder()
    decoder._buffer = CountingBuffer()  # the one thing that cannot be counted from outside
    count = sum(len(decoder.feed(data[at : at + piece])) for at in range(0, len(data), piece))
    assert count == headers == len(raw)
    assert summed == len(data) - 4 * len(raw)  # all but the header checksums
    assert CountingBuffer.moved <= len(data)


@pytest.mark.parametrize("piece", [1, 100, 10**6])
def test_searching_through_garbage_is_linear_in_bytes(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage full of magics: a header is tried at each magic once, however often more bytes come."""
    codec = importlib.import_module("offload.packets.codec")
    tried: list[int] = []

    def counted_header(data: bytes, at: int, *, offset: int) -> Header:
        tried.append(offset)
        return unpack_header(data, at, offset=offset)

    garbage = b"?" + (MAGIC + b"-" * 6) * 300 + b"\xff" * 300 + SMALL[0]
    monkeypatch.setattr(codec, "unpack_header", counted_header)
    damage: list[Damage] = []
    decoder = PacketDecoder(on_damage=damage.append)
    frames = [frame for at in range(0, len(garbage), piece) for frame in decoder.feed(garbage[at : at + piece])]
    assert [(d.start, d.end) for d in damage] == [(0, len(garbage) - len(SMALL[0]))]
    assert len(frames) == 1
    assert tried == [0, *range(1, 3001, 10), len(garbage) - len(SMALL[0])]


def test_decoder_holds_less_than_a_frame_between_feeds() -> None:
    """Between feeds the memory held is the unfinished frame's, whatever came before: not the file, not two frames."""
    size = 1 << 20
    raw = encode(FrameType.LINES, b"x" * size)
    # Each feed ends a frame and brings almost all of the next one. The first one ends a frame of a bit more than half
    # of that, which a buffer that only ever gave back its unused half would keep.
    short = encode(FrameType.LINES, b"x" * (size * 6 // 10))
    stream = short + raw * 6
    step = len(raw) - 1000
    decoder = PacketDecoder()
    tracemalloc.start()
    try:
        for at, end in itertools.pairwise([0, *range(len(short) + step, len(stream), step), len(stream)]):
            decoder.feed(memoryview(stream)[at:end])
            assert decoder.pending < len(raw)
            held, _ = tracemalloc.get_traced_memory()
            # CPython gives a growing bytearray an eighth more than it asks for.
            assert held <= decoder.pending * 9 // 8 + 100_000
    finally:
        tracemalloc.stop()


def test_noise_is_not_kept() -> None:
    """While it looks for a frame, the decoder keeps no more than could be the beginning of one."""
    decoder = PacketDecoder(on_damage=lambda damage: None)
    for _ in range(50):
        decoder.feed(b"\x00" * 10_000 + MAGIC[:3])
        assert decoder.pending < HEADER_BYTES


# --- the payloads that describe the file ----------------------------------------------------------------------------


def frame_of(type: FrameType, payload: bytes, generation: int = 0, flags: Flag = Flag.NONE) -> Frame:
    (frame,) = PacketDecoder().feed(encode(type, payload, generation=generation, flags=flags))
    return frame


entries = st.builds(
    CommitEntry, u32, u32, u64, u64, u64, u64, u64, u16, u16, st.sampled_from(EntryFlag), exact(16), exact(16)
)


@given(st.builds(FileInfo, exact(16), u32, exact(32), st.text(max_size=20)))
@calm
def test_file_info_goes_both_ways(info: FileInfo) -> None:
    """What FILE holds is read back as it was written."""
    assert FileInfo.unpack(frame_of(FrameType.FILE, info.pack())) == info


def test_file_info_reads_what_is_not_utf8() -> None:
    """The name of what wrote the file is for people: bytes that are not UTF-8 are shown, not refused."""
    info = FileInfo.unpack(frame_of(FrameType.FILE, FileInfo(bytes(16), 0, bytes(32), "").pack() + b"caf\xe9"))
    assert info.written_by == "caf\N{REPLACEMENT CHARACTER}"


@given(
    st.builds(
        SourceInfo,
        u64,
        u64,
        u64,
        u64,
        st.sampled_from(Compression),
        st.binary(max_size=140),
        st.one_of(st.none(), entries),
        st.one_of(st.none(), entries),
    )
)
@calm
def test_source_info_goes_both_ways(info: SourceInfo) -> None:
    """What SOURCE holds is read back as it was written, first generation or not; a path is bytes."""
    generation = 0 if info.before is None else info.before.generation % (2**32 - 1) + 1
    flags = Flag.NONE if info.stands is None else Flag.RESTATED
    found = SourceInfo.unpack(frame_of(FrameType.SOURCE, info.pack(), generation, flags))
    assert found == info
    assert isinstance(found.compression, Compression)
    assert found.before is None or isinstance(found.before.flags, EntryFlag)


def test_entry_in_a_source_frame_stands_before_the_path() -> None:
    """A SOURCE frame is 40 bytes, in a generation over 0 the 88 bytes of an entry, and then the path to its end."""
    entry = CommitEntry(1, 2, 3, 4, 5, 6, 7, 8, 9, EntryFlag.OPEN_LINE, b"h" * 16, b"g" * 16)
    first = SourceInfo(1, 2, 3, 4, Compression.XZ, b"path")
    fixed = struct.pack("<QQQQB7x", 1, 2, 3, 4, 2)
    assert first.pack() == fixed + b"path"
    assert first._replace(before=entry).pack() == fixed + ENTRY_STRUCT.pack(*entry) + b"path"


@given(st.builds(GapInfo, u64, u64, u64, st.sampled_from(GapReason)))
@calm
def test_gap_info_goes_both_ways(info: GapInfo) -> None:
    """What GAP holds is read back as it was written."""
    found = GapInfo.unpack(frame_of(FrameType.GAP, info.pack()))
    assert found == info
    assert isinstance(found.reason, GapReason)


@given(st.builds(CommitInfo, u64, u64, u64, exact(32), st.booleans(), st.lists(entries, max_size=4).map(tuple)))
@calm
def test_commit_info_goes_both_ways(info: CommitInfo) -> None:
    """What COMMIT holds is read back as it was written, entry by entry."""
    found = CommitInfo.unpack(frame_of(FrameType.COMMIT, info.pack()))
    assert found == info
    assert isinstance(found.full, bool)
    assert all(isinstance(entry.flags, EntryFlag) for entry in found.entries)


COMMIT = CommitInfo(0, NONE_U64, 0, bytes(32), True, ())


@pytest.mark.parametrize(
    ("unpack", "payload", "message"),
    [
        (FileInfo.unpack, bytes(51), "FILE payload is 51 bytes, expected at least 52"),
        (SourceInfo.unpack, bytes(39), "SOURCE payload is 39 bytes, expected at least 40"),
        (SourceInfo.unpack, bytes(32) + b"\x04" + bytes(7), "compression is 4, known are [0, 1, 2, 3]"),
        (GapInfo.unpack, bytes(31), "GAP payload is 31 bytes, expected at least 32"),
        (GapInfo.unpack, bytes(32), "gap reason is 0, known are [1, 2, 3, 4, 5]"),
        (CommitInfo.unpack, bytes(63), "COMMIT payload is 63 bytes, expected at least 64"),
        (CommitInfo.unpack, COMMIT.pack() + bytes(88), "COMMIT payload is 152 bytes, expected 64"),
        (
            CommitInfo.unpack,
            COMMIT_STRUCT.pack(0, NONE_U64, 0, bytes(32), 2, True) + bytes(88),
            "COMMIT payload is 152 bytes, expected 240",
        ),
    ],
)
def test_payload_that_cannot_be_read_says_why(unpack: Callable[[Frame], Any], payload: bytes, message: str) -> None:
    """A payload too short, too long or with an unknown value is a PacketError at its frame."""
    (frame,) = PacketDecoder(offset=40).feed(encode(FrameType.NOTE, payload))
    with pytest.raises(PacketError) as caught:
        unpack(frame)
    assert (caught.value.message, caught.value.offset) == (message, 40)


def test_later_generation_without_its_entry_says_why() -> None:
    """In a generation over 0, a SOURCE payload without room for the entry is a PacketError, never a shorter path."""
    payload = SourceInfo(0, 0, 0, 0, Compression.NONE, b"x" * 87).pack()
    (frame,) = PacketDecoder(offset=40).feed(encode(FrameType.SOURCE, payload, generation=1))
    with pytest.raises(PacketError) as caught:
        SourceInfo.unpack(frame)
    assert (caught.value.message, caught.value.offset) == ("SOURCE payload is 127 bytes, expected at least 128", 40)
