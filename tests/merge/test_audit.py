"""`verify`: one changed bit anywhere is found and placed, and a file that is right is called right."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from offload.errors import PacketError
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.merge.audit import Gap, verify
from offload.packets.codec import Frame, GapInfo, SourceInfo, encode, packets_payload
from offload.packets.format import HEADER_BYTES, NONE_U64, Compression, Flag, FrameType, GapReason


def begin(file: PacketFile, name: bytes, source_id: int | None = None) -> int:
    return file.open_source(SourceInfo(1, 2, 0, 0, Compression.NONE, b"/logs/" + name), source_id)


def write(path: Path) -> Path:
    """Every kind of frame that there is, two sources, two generations."""
    file = PacketFile(path, fsync="none")
    a, b = begin(file, b"a"), begin(file, b"b")
    file.append([Piece(a, b"one\ntwo\n", 0, 2), Piece(b, b"first\n", 0, 1)])
    file.commit()
    payload, flags = packets_payload([b"p1", b"p2"])
    file.append([Piece(b, payload, 6, 2, flags, FrameType.PACKETS), Piece(a, b"three\n", 8, 1)])
    file.gap(a, GapInfo(14, NONE_U64, NONE_U64, GapReason.TRUNCATED))
    begin(file, b"a", a)
    file.append([Piece(a, b"anew\n", 0, 1), Piece(b, b"end", 10, 1, Flag.UNTERMINATED)])
    file.close()
    return path


def frames(path: Path) -> list[Frame]:
    with FrameSource(path) as source:
        return list(source)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return write(tmp_path / "made.opk")


def test_a_whole_file_holds(made: Path) -> None:
    """Nothing is found wrong with a file that is right, and what is in it is counted."""
    found = verify(made)
    assert found.ok
    assert found.faults == []
    assert (found.frames, found.sources, found.lines) == (len(frames(made)), 2, 8)
    assert (found.size, found.torn, found.live) == (made.stat().st_size, 0, False)
    assert found.lost == [Gap("a", 14, None, "truncated", None, 0)]
    assert found.gaps == [("a", 14, None, "truncated")]
    assert len(bytes.fromhex(found.chain)) == 32


KINDS = ["FILE", "SOURCE", "LINES", "COMMIT", "PACKETS", "GAP"]


@pytest.mark.parametrize("place", ["header", "payload"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found_in_every_kind_of_frame(made: Path, kind: str, place: str) -> None:
    """One bit changed in the header or the payload of any kind of frame is a fault at that frame's byte."""
    frame = next(f for f in frames(made) if f.header.type.name == kind)
    assert frame.payload
    data = bytearray(made.read_bytes())
    data[frame.offset + (20 if place == "header" else HEADER_BYTES + len(frame.payload) // 2)] ^= 0x10
    made.write_bytes(data)
    found = verify(made)
    assert not found.ok
    assert found.faults[0][0] == frame.offset
    assert "checksum is" in found.faults[0][1]
    assert "bytes hold no valid frame" in found.faults[0][1]


@pytest.mark.slow
def test_every_single_flipped_bit_is_found(made: Path) -> None:
    """There is no bit in the file that could change unnoticed."""
    whole = made.read_bytes()
    unseen = []
    for at in range(4, len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        made.write_bytes(data)
        if verify(made).ok:
            unseen.append(at)
    assert not unseen


def test_a_file_without_the_magic_is_no_packet_file(made: Path) -> None:
    """Other bytes at the start are an error of their own: this is no packet file."""
    data = bytearray(made.read_bytes())
    data[1] ^= 1
    made.write_bytes(data)
    with pytest.raises(PacketError, match="byte 0: found ff 4e 50 4b, expected the magic"):
        verify(made)


@pytest.mark.parametrize("number", range(1, 12))
def test_a_missing_frame_in_the_middle_is_found(made: Path, number: int) -> None:
    """Whichever frame is cut out, with sound checksums on both sides, its neighbours tell."""
    parts = frames(made)
    assert len(parts) == 13
    data = made.read_bytes()
    made.write_bytes(data[: parts[number].offset] + data[parts[number].end :])
    found = verify(made)
    assert not found.ok
    assert found.faults[0][0] >= parts[number].offset


def test_missing_lines_are_named_with_source_and_numbers(made: Path) -> None:
    """A source's hole is told as what was found and what was expected there."""
    lines = next(f for f in frames(made) if f.header.type is FrameType.LINES)
    data = made.read_bytes()
    made.write_bytes(data[: lines.offset] + data[lines.end :])
    told = [fault for _, fault in verify(made).faults]
    assert "source 0 is at line 2, expected 0" in told
    assert "source 0 is at its byte 8, expected 0" in told


def test_a_doubled_frame_is_found(made: Path) -> None:
    """The same lines twice, each copy sound in itself, are a fault."""
    lines = next(f for f in frames(made) if f.header.type is FrameType.LINES)
    data = made.read_bytes()
    made.write_bytes(data[: lines.end] + data[lines.offset :])
    found = verify(made)
    assert (lines.end, "source 0 is at line 0, expected 2") in found.faults


def test_bytes_between_two_frames_are_found(made: Path) -> None:
    """What stands between two whole frames is told with its place and its length."""
    at = frames(made)[3].offset
    data = made.read_bytes()
    made.write_bytes(data[:at] + b"strangers" + data[at:])
    found = verify(made)
    assert found.faults[0][0] == at
    assert found.faults[0][1].startswith("9 bytes hold no valid frame")


def test_all_after_damage_is_still_checked(made: Path) -> None:
    """Damage does not end the search: each of two places is told."""
    parts = frames(made)
    data = bytearray(made.read_bytes())
    for frame in (parts[3], parts[8]):
        data[frame.end - 1] ^= 1
    made.write_bytes(data)
    found = verify(made)
    assert {parts[3].offset, parts[8].offset} <= {offset for offset, _ in found.faults}
    assert found.frames == len(parts) - 2


@pytest.mark.parametrize("left", [1, 3, 63, 64, 70])
def test_a_torn_tail_is_a_fault_of_a_file_that_nobody_writes(made: Path, left: int) -> None:
    """A last frame that is not whole is told, wherever it was torn."""
    last = frames(made)[-1]
    made.write_bytes(made.read_bytes()[: last.offset + left])
    found = verify(made)
    assert found.torn == left
    assert [offset for offset, _ in found.faults] == [last.offset]
    assert "torn tail" in found.faults[0][1]


def test_a_file_that_is_being_written_may_end_in_a_frame_under_way(made: Path) -> None:
    """While a writer has the file, what is behind its last whole frame is not a fault yet."""
    file = PacketFile(made, fsync="none")
    try:
        with made.open("ab") as other:
            other.write(encode(FrameType.LINES, b"x" * 100)[:90])
        found = verify(made)
        assert found.ok
        assert found.live
        assert found.torn == 90
    finally:
        file.close(broken=True)
    assert not verify(made).ok


def test_damage_in_a_file_that_is_being_written_is_a_fault(made: Path) -> None:
    """A writer does not excuse what stands before whole frames."""
    parts = frames(made)
    file = PacketFile(made, fsync="none")
    try:
        with made.open("r+b") as other:
            other.seek(parts[3].end - 1)
            other.write(b"?")
        assert verify(made).faults[0][0] == parts[3].offset
    finally:
        file.close(broken=True)


def test_frames_of_another_run_are_found(tmp_path: Path, made: Path) -> None:
    """Sound frames that another run wrote, at a place where they fit by number, are told by their epoch."""
    other = write(tmp_path / "other.opk")
    parts, others = frames(made), frames(other)
    lines = next(i for i, f in enumerate(parts) if f.header.type is FrameType.LINES)
    data, stale = made.read_bytes(), other.read_bytes()
    made.write_bytes(
        data[: parts[lines].offset] + stale[others[lines].offset : others[lines].end] + data[parts[lines].end :]
    )
    found = verify(made)
    assert found.faults[0][0] == parts[lines].offset
    assert "bytes of another run" in found.faults[0][1]


def test_a_changed_payload_with_new_checksums_is_found_by_the_chain(made: Path) -> None:
    """Who changes a line and mends its checksums is found out by the next COMMIT's chain."""
    parts = frames(made)
    lines = next(f for f in parts if f.header.type is FrameType.LINES)
    header = lines.header
    forged = encode(
        FrameType.LINES,
        lines.payload.replace(b"one", b"two"),
        flags=header.flags,
        source_id=header.source_id,
        seq=header.seq,
        source_off=header.source_off,
        time_ns=header.time_ns,
        count=header.count,
        generation=header.generation,
        prev_len=header.prev_len,
        epoch=header.epoch,
    )
    data = made.read_bytes()
    made.write_bytes(data[: lines.offset] + forged + data[lines.end :])
    commit = next(f for f in parts if f.header.type is FrameType.COMMIT)
    faults = verify(made).faults
    assert faults[0][0] == commit.offset
    assert "a frame was changed" in faults[0][1]


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xffOPK"])
def test_an_empty_file_and_the_first_bytes_of_one(tmp_path: Path, data: bytes) -> None:
    """A file whose first frame was torn while it was made is a packet file with a torn tail, an empty one is whole."""
    path = tmp_path / "x.opk"
    path.write_bytes(data)
    found = verify(path)
    assert found.torn == len(data)
    assert found.ok == (data == b"")


@pytest.mark.parametrize("data", [b"x", b"a text\n" * 100, bytes(1000)])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    """What does not begin as a packet file is PacketError, not a list of faults."""
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(PacketError, match="expected the magic"):
        verify(path)
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "nope")
    with pytest.raises(IsADirectoryError):
        verify(tmp_path)


def test_the_watcher_sees_how_far_it_is(made: Path) -> None:
    """Progress is told in bytes, and its last word is all of them."""
    told: list[tuple[int, int]] = []
    see: Callable[[int, int], None] = lambda done, size: told.append((done, size))  # noqa: E731
    verify(made, see)
    assert told[-1] == (made.stat().st_size,) * 2


def test_verify_writes_nothing(made: Path) -> None:
    """Readers never write: the file can be verified without the right to write it, and stays as it is."""
    before = made.read_bytes(), made.stat().st_mtime_ns
    os.chmod(made, 0o400)
    verify(made)
    assert (made.read_bytes(), made.stat().st_mtime_ns) == before


def test_a_writer_that_never_stops_does_not_keep_verify(tmp_path: Path) -> None:
    """Of a live file what was there at the beginning is checked, however fast it grows."""
    path = tmp_path / "live.opk"
    data = b"line\n" * 200_000
    with contextlib.closing(PacketFile(path, fsync="none")) as file:
        source = file.open_source(SourceInfo(0, 0, 0, 0, Compression.NONE, b"s"))

        def grow(done: int, size: int) -> None:
            offset = file.ledger.sources[source].resume_off
            file.append([Piece(source, data, offset, 200_000)])

        for _ in range(6):
            grow(0, 0)
        found = verify(path, watcher=grow)
    assert found.ok
    assert found.live
    assert 6 * 200_000 <= found.lines < 20 * 200_000


# --- complete, and the chain ------------------------------------------------------------------------------------------


def lost(path: Path) -> list[Gap]:
    found = verify(path)
    assert found.ok
    assert found.complete == (not found.lost)
    return found.lost


def test_a_beginning_that_was_never_read_is_a_gap(tmp_path: Path) -> None:
    """A generation that begins behind its file's start lacks what is before; one that goes on with a file does not."""
    with contextlib.closing(PacketFile(tmp_path / "p.opk", fsync="none")) as file:
        log = file.open_source(SourceInfo(1, 2, 0, 0, Compression.NONE, b"/logs/a"))
        file.append([Piece(log, b"one\n", 0, 1)])
        file.open_source(SourceInfo(1, 3, 0, 100, Compression.NONE, b"/logs/a"), log)
        file.append([Piece(log, b"other\n", 100, 1)])
        file.open_source(SourceInfo(1, 2, 0, 4, Compression.NONE, b"/logs/a"), log)
        file.append([Piece(log, b"late\n", 4, 1)])
    assert lost(tmp_path / "p.opk") == [Gap("a", 0, 100, "never read", None, 1)]
    assert verify(tmp_path / "p.opk").gaps == []


def test_an_anchor_holds_for_a_file_that_has_grown(made: Path) -> None:
    """The chain of an earlier state is found again at its COMMIT, whatever came behind it."""
    before = verify(made)
    assert before.chained == frames(made)[-1].offset
    file = PacketFile(made, fsync="none")
    file.append([Piece(0, b"more\n", 5, 1)])
    file.close()
    after = verify(made, anchor=bytes.fromhex(before.chain))
    assert after.anchor == (before.chained, before.lines)
    assert after.chain != before.chain


def test_an_anchor_does_not_hold_for_what_was_cut_or_written_anew(made: Path, tmp_path: Path) -> None:
    """A file that lost its end, and another with the same lines, are not what the anchor was taken of."""
    anchor = bytes.fromhex(verify(made).chain)
    assert verify(write(tmp_path / "other.opk"), anchor=anchor).anchor is None
    os.truncate(made, frames(made)[-1].offset)
    found = verify(made, anchor=anchor)
    assert found.ok
    assert found.anchor is None


def test_an_anchor_does_not_hold_behind_a_fault(made: Path) -> None:
    """A frame changed with its checksums, where the COMMIT states the chain of before, is no match."""
    anchor = bytes.fromhex(verify(made).chain)
    frame = next(f for f in frames(made) if f.header.type is FrameType.LINES and f.payload == b"three\n")
    header = frame.header
    fields = {name: getattr(header, name) for name in ("flags", "source_id", "seq", "source_off", "time_ns", "count")}
    fields |= {name: getattr(header, name) for name in ("generation", "prev_len", "epoch")}
    data = bytearray(made.read_bytes())
    data[frame.offset : frame.end] = encode(FrameType.LINES, b"THREE\n", **fields)
    made.write_bytes(data)
    found = verify(made, anchor=anchor)
    assert ["a frame was changed" in fault for _, fault in found.faults] == [True]
    assert found.chain == anchor.hex()
    assert found.anchor is None
