"""What recovery finds after any end of a file, and what a ledger finds wrong with a frame."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import importlib
import inspect
import itertools
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from offload.errors import PacketError
from offload.packets import Flag, Frame, FrameType, GapReason, Ledger, PacketDecoder, Recovery, encode, recover
from offload.packets.codec import (
    CommitEntry,
    CommitInfo,
    FileInfo,
    GapInfo,
    SourceInfo,
    line_pieces,
    pack_header,
    packets_payload,
    unpack_header,
)
from offload.packets.format import (
    GUARD_BYTES,
    HEAD_BYTES,
    HEADER_BYTES,
    MAGIC,
    NONE_U64,
    Compression,
    EntryFlag,
)
from offload.packets.ledger import SourceState, digest
from offload.packets.recover import Hole, generations
from offload.packets.sealed import SealInfo

# By import_module, as the name `recover` in the package is the function.
recover_module = importlib.import_module("offload.packets.recover")
ledger_module = importlib.import_module("offload.packets.ledger")


class Draft:
    """A packet file in memory, written as a writer would: each frame as the ledger asks for it, then applied."""

    def __init__(self, data: bytes = b"", ledger: Ledger | None = None, epoch: int = 0xA0) -> None:
        self.data = bytearray(data)
        self.ledger = Ledger() if ledger is None else ledger
        self.epoch = epoch
        self.frames: list[Frame] = []
        self.snapshots = {self.ledger.end: snapshot(self.ledger)}
        if not data:
            self.put(FrameType.FILE, FileInfo(b"0123456789abcdef", 0, bytes(32), "test").pack())

    def put(self, type: FrameType, payload: bytes = b"", *, source_id: int = 0, **fields: int) -> Frame:
        """Append a frame that has no faults."""
        frame, raw = self.make(type, payload, source_id=source_id, **fields)
        assert list(self.ledger.faults(frame)) == []
        self.ledger.apply(frame.header, payload, raw[:HEADER_BYTES], frame.offset)
        self.data += raw
        self.frames.append(frame)
        assert self.ledger.end == len(self.data)
        self.snapshots[len(self.data)] = snapshot(self.ledger)
        return frame

    def make(self, type: FrameType, payload: bytes = b"", *, source_id: int = 0, **fields: int) -> tuple[Frame, bytes]:
        """The frame that is due next, with `fields` other than the ledger would have them."""
        due = {"prev_len": self.ledger.prev_len, "epoch": self.epoch, "time_ns": 1_700_000_000_000_000_000}
        state = self.ledger.sources.get(source_id)
        if type in (FrameType.LINES, FrameType.PACKETS, FrameType.GAP) and state is not None:
            due |= {"generation": state.generation, "seq": state.next_seq, "source_off": state.resume_off}
        raw = encode(type, payload, source_id=source_id, **(due | fields))
        return Frame(len(self.data), unpack_header(raw), payload), raw

    def source(self, path: bytes = b"app.log", start: int = 0) -> int:
        source_id = len(self.ledger.sources)
        info = SourceInfo(1, 100 + source_id, 0, start, Compression.NONE, path)
        self.put(FrameType.SOURCE, info.pack(), source_id=source_id, source_off=start)
        return source_id

    def generation(self, source_id: int, inode: int = 0) -> Frame:
        state = self.ledger.sources[source_id]
        info = state.info._replace(inode=inode or state.info.inode, before=state.entry(), start_off=0)
        return self.put(
            FrameType.SOURCE,
            info.pack(),
            source_id=source_id,
            generation=state.generation + 1,
            seq=state.next_seq,
        )

    def lines(self, source_id: int, text: bytes, *, flags: int = 0, count: int | None = None) -> Frame:
        count = text.count(b"\n") if count is None else count
        return self.put(FrameType.LINES, text, source_id=source_id, flags=flags, count=count)

    def packets(self, source_id: int, packets: list[bytes]) -> Frame:
        payload, flags = packets_payload(packets)
        return self.put(FrameType.PACKETS, payload, source_id=source_id, flags=flags, count=len(packets))

    def gap(self, source_id: int, size: int | None) -> Frame:
        start = self.ledger.sources[source_id].resume_off
        end = NONE_U64 if size is None else start + size
        return self.put(FrameType.GAP, GapInfo(start, end, NONE_U64, GapReason.TRUNCATED).pack(), source_id=source_id)

    def commit(self, durable_upto: int | None = None) -> Frame:
        durable = len(self.data) if durable_upto is None else durable_upto  # as a writer does that syncs
        return self.put(FrameType.COMMIT, self.ledger.commit(durable).pack())

    def recover(self, size: int | None = None) -> Recovery:
        return recover_bytes(bytes(self.data[:size]))


def snapshot(ledger: Ledger) -> dict[str, Any]:
    """All of a ledger that must be the same after recovery as after reading the whole file.

    Heads and tails are not: recovery knows their hashes only; `assert_hashes` checks those.
    """
    return {
        "end": ledger.end,
        "prev_len": ledger.prev_len,
        "epoch": ledger.epoch,
        "info": ledger.info,
        "lines": ledger.total_lines,
        "chain": (ledger.chain, ledger.next_chain()),
        "commits": (ledger.last_commit, ledger.last_full),
        "durable_upto": ledger.durable_upto,
        "changed": set(ledger.changed),
        "sources": {
            key: (s.source_id, s.info, s.generation, s.source_frame, s.resume_off, s.next_seq, s.open)
            for key, s in ledger.sources.items()
        },
    }


def recover_bytes(data: bytes) -> Recovery:
    def read_at(offset: int, length: int) -> bytes:
        assert 0 <= offset <= len(data)  # os.pread would take no offset that a file cannot have
        return data[offset : offset + length]

    return recover(read_at, len(data))


def replay(data: bytes) -> Ledger:
    """The ledger of a whole file, read from its start."""
    ledger = Ledger()
    for frame in PacketDecoder().feed(data):
        assert list(ledger.faults(frame)) == []
        ledger.apply(frame.header, frame.payload, data[frame.offset : frame.offset + HEADER_BYTES], frame.offset)
    return ledger


def story() -> Draft:
    """A small file with everything in it: three sources, a second generation, a gap, two runs, four COMMITs."""
    d = Draft()
    app = d.source(b"app.log")
    d.lines(app, b"one\ntwo\n")
    d.commit()
    bus = d.source(b"bus", start=7)
    d.packets(bus, [b"\xffOPK", b"", b"x"])
    d.lines(app, b"long ", flags=Flag.FIRST)
    d.commit(durable_upto=len(d.data))
    d.lines(app, b"end\n", flags=Flag.LAST)
    d.lines(app, b"cut", flags=Flag.UNTERMINATED, count=1)
    d.epoch = 0xB1
    d.commit(durable_upto=len(d.data))
    d.lines(app, b" off\n", flags=Flag.LAST, count=0)
    d.generation(app)
    d.lines(app, b"new\n")
    d.gap(bus, 1000)
    d.put(FrameType.NOTE, b"note")
    d.commit(durable_upto=len(d.data))
    d.packets(bus, [b"single"])
    late = d.source(b"late")
    d.lines(late, b"last\n")
    return d


# --- cut anywhere ---------------------------------------------------------------------------------------------------


def test_recovery_after_any_cut_finds_the_state_of_a_full_replay() -> None:
    """Cut at each byte, the state found is that after the last whole frame; what is behind it is torn, and no hole."""
    d = story()
    borders = sorted(d.snapshots)
    for size in range(len(d.data) + 1):
        found = d.recover(size)
        end = max(border for border in borders if border <= size)
        assert snapshot(found.ledger) == d.snapshots[end], size
        assert (found.torn, found.hole, found.behind) == (size - end, None, ())


def test_recovery_looks_at_no_byte_behind_the_size_it_was_given() -> None:
    """A file that grew since it was measured recovers to its state at that size, for every size."""
    d = story()
    data = bytes(d.data)
    for size in range(len(data) + 1):
        found = recover(lambda offset, length: data[offset : offset + length], size)
        end = max(border for border in d.snapshots if border <= size)
        assert snapshot(found.ledger) == d.snapshots[end], size
        assert (found.torn, found.hole, found.behind) == (size - end, None, ())


@pytest.mark.parametrize("window", [1, 3, 61, 64, 150])
def test_recovery_finds_the_last_commit_wherever_a_window_ends(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the search from the end is cut into reads, it finds the last COMMIT and reads no text before it."""
    monkeypatch.setattr(recover_module, "_WINDOW", window)
    d = Draft()
    app = d.source()
    text = d.lines(app, b"x" * 2000 + b"\n")
    d.commit()
    for size in (0, 40, 200):  # of what stands between the last COMMIT and the end
        d.lines(app, b"y" * size + b"\n")
        data = bytes(d.data)
        reads: list[tuple[int, int]] = []

        def read_at(offset: int, length: int, data: bytes = data, reads: list[tuple[int, int]] = reads) -> bytes:
            reads.append((offset, offset + length))
            return data[offset : offset + length]

        assert snapshot(recover(read_at, len(data)).ledger) == snapshot(d.ledger)
        inside = text.offset + HEADER_BYTES, text.end - window
        assert not any(start < inside[1] and end > inside[0] for start, end in reads)


def test_full_replay_is_the_writers_own_state() -> None:
    """A reader's ledger, from the start of the file, ends where the writer's does, and finds no fault on the way."""
    d = story()
    assert snapshot(replay(bytes(d.data))) == snapshot(d.ledger)


def test_recovered_hashes_are_of_the_sources_own_bytes() -> None:
    """After recovery the next COMMIT states hashes of bytes that the source really has before its resume offset."""
    text = b"".join(b"line %d\n" % n for n in range(300))
    d = Draft()
    app = d.source()
    for at in range(0, len(text), 600):
        d.lines(app, text[at : at + 600])
        d.commit()
    assert len(text) > HEAD_BYTES + GUARD_BYTES
    ledger = d.recover().ledger
    assert_hashes(ledger.sources[app].entry(), text)
    assert ledger.sources[app].entry() == d.ledger.sources[app].entry()
    assert ledger.sources[app].entry().head_len == HEAD_BYTES
    again = Draft(bytes(d.data), ledger)
    again.lines(app, b"more\n")
    assert_hashes(ledger.sources[app].entry(), text + b"more\n")


def assert_hashes(entry: Any, content: bytes) -> None:
    before = content[: entry.resume_off]
    assert entry.head_len <= HEAD_BYTES
    assert entry.head == (digest(content[: entry.head_len]) if entry.head_len else bytes(16))
    assert entry.guard_len <= min(GUARD_BYTES, len(before))
    assert entry.guard == (digest(before[len(before) - entry.guard_len :]) if entry.guard_len else bytes(16))


def test_gap_takes_the_tail_guard_away() -> None:
    """Behind a gap no guard is stated, as the bytes before the resume offset are not known."""
    d = Draft()
    app = d.source()
    d.lines(app, b"known\n")
    d.commit()
    d.gap(app, 100)
    entry = d.ledger.sources[app].entry()
    assert (entry.resume_off, entry.guard_len, entry.guard) == (106, 0, bytes(16))
    assert (entry.head_len, entry.head) == (6, digest(b"known\n"))


def test_gap_without_an_end_keeps_the_place() -> None:
    """A gap whose end nobody knows states the loss; the source stays where it was."""
    d = Draft()
    app = d.source()
    d.lines(app, b"known\n")
    d.gap(app, None)
    assert d.ledger.sources[app].resume_off == 6


@pytest.mark.parametrize("size", [0, 1, 3, 4, 63])
def test_beginning_of_a_first_header_is_an_empty_packet_file(size: int) -> None:
    """A file torn in its very first header is begun again from byte 0."""
    found = Draft().recover(size)
    assert (found.ledger.end, found.torn, found.hole) == (0, size, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a log file\n", "header is 11 bytes, expected 64"),
        (b"PK", "header is 2 bytes, expected 64"),
        (b"PK\x03\x04" + bytes(100), "found 50 4b 03 04, expected the magic ff 4f 50 4b"),
        (MAGIC + bytes(60), f"header checksum is {crc32(MAGIC + bytes(56)):08x}, expected 00000000"),
        (
            encode(FrameType.LINES, b"a\n", count=1),
            "found a LINES frame, expected FILE: no packet file, or not its start",
        ),
    ],
)
def test_what_is_no_packet_file_is_refused(data: bytes, message: str) -> None:
    """Bytes that are somebody else's file raise PacketError at 0, so nothing of them is cut."""
    with pytest.raises(PacketError) as caught:
        recover_bytes(data)
    assert (caught.value.message, caught.value.offset) == (message, 0)


def test_recovery_from_a_real_file(tmp_path: Path) -> None:
    """os.pread is all that recovery needs of a file."""
    d = story()
    path = tmp_path / "a.opk"
    path.write_bytes(d.data + b"\xffOPK torn")
    fd = os.open(path, os.O_RDONLY)
    try:
        found = recover(lambda offset, length: os.pread(fd, length, offset), os.fstat(fd).st_size)
    finally:
        os.close(fd)
    assert snapshot(found.ledger) == snapshot(d.ledger)
    assert found.torn == 9


def test_recovery_walks_back_to_the_last_full_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that did not change for long are found in the last COMMIT that lists all, and it is one at least every
    FULL_COMMIT_BYTES."""
    monkeypatch.setattr(ledger_module, "FULL_COMMIT_BYTES", 1500)
    d = Draft()
    quiet = d.source(b"quiet.log")
    d.lines(quiet, b"said once\n")
    busy = d.source(b"busy.log")
    for n in range(40):
        d.lines(busy, b"%d\n" % n)
        d.commit()
    commits = [(f.offset, CommitInfo.unpack(f)) for f in d.frames if f.header.type is FrameType.COMMIT]
    full = [offset for offset, info in commits if info.full]
    assert len(full) > 2
    assert all([entry.source_id for entry in info.entries] == ([0, 1] if info.full else [1]) for _, info in commits)
    assert all(1500 <= b - a < 2000 for a, b in itertools.pairwise(full))
    for end, expected in d.snapshots.items():
        assert snapshot(d.recover(end).ledger) == expected


def test_size_and_mtime_survive_recovery() -> None:
    """What the writer noted about a source's file comes back with its COMMIT."""
    d = Draft()
    state = d.ledger.sources[d.source()]
    state.size, state.mtime_ns = 123, 456
    d.commit()
    found = d.recover().ledger.sources[0]
    assert (found.size, found.mtime_ns) == (123, 456)


# --- damage ---------------------------------------------------------------------------------------------------------


def test_flipped_byte_anywhere_never_gives_a_state_that_was_not() -> None:
    """With any one byte changed, recovery names the damaged frame or finds a state that the writer really was in."""
    d = story()
    refused = set()
    for at in range(len(d.data)):
        bad = bytearray(d.data)
        bad[at] ^= 0x10
        try:
            found = recover_bytes(bytes(bad))
        except PacketError as exc:
            (hit,) = [frame for frame in d.frames if frame.offset == exc.offset]
            refused.add(hit.header.type)
            continue
        assert snapshot(found.ledger) == d.snapshots[found.ledger.end]
        assert found.ledger.end + found.torn == len(bad)
    assert refused == {FrameType.FILE, FrameType.SOURCE, FrameType.COMMIT}


def test_hole_after_the_last_commit_is_told_with_what_stands_behind() -> None:
    """Any flipped byte of a frame behind the last COMMIT: the state before it, the hole, the headers behind it."""
    d = story()
    app = d.ledger.sources[0].source_id
    hit = d.lines(app, b"damaged\n")
    behind = [d.lines(app, b"behind\n"), d.packets(1, [b"packet"])]
    d.put(FrameType.NOTE, b"no source's bytes")
    for at in range(hit.offset, hit.end):
        bad = bytearray(d.data)
        bad[at] ^= 1
        found = recover_bytes(bytes(bad))
        assert snapshot(found.ledger) == d.snapshots[hit.offset]
        assert found.hole == Hole(hit.offset, hit.end)
        assert found.behind == tuple(frame.header for frame in behind)
        assert found.torn == len(bad) - hit.offset


def test_bytes_put_in_between_two_frames_are_a_hole() -> None:
    """A frame that would follow well is not taken in where other bytes stand before it."""
    d = story()
    border = len(d.data)
    behind = d.lines(0, b"behind\n")
    bad = bytes(d.data[:border]) + b"not a frame" + bytes(d.data[border:])
    found = recover_bytes(bad)
    assert snapshot(found.ledger) == d.snapshots[border]
    assert found.hole == Hole(border, border + 11)
    assert found.behind == (behind.header,)


def test_commit_that_points_to_another_sources_frame_is_refused() -> None:
    """Recovery takes no source's path from the SOURCE frame of another."""
    d = Draft()
    first, second = d.source(b"first"), d.source(b"second")
    info = d.ledger.commit(d.ledger.end)
    entries = tuple(e._replace(source_frame=d.ledger.sources[first].source_frame) for e in info.entries)
    _, raw = d.make(FrameType.COMMIT, info._replace(entries=entries).pack())
    with pytest.raises(PacketError, match=f"the SOURCE frame of source {second} is damaged"):
        recover_bytes(bytes(d.data) + raw)


def test_commit_that_points_to_an_earlier_generations_frame_is_refused() -> None:
    """Recovery takes no file's identity from the SOURCE frame of a generation before."""
    d = Draft()
    app = d.source()
    first = d.ledger.sources[app].source_frame
    d.generation(app)
    info = d.ledger.commit(d.ledger.end)
    entries = tuple(e._replace(source_frame=first) for e in info.entries)
    _, raw = d.make(FrameType.COMMIT, info._replace(entries=entries).pack())
    with pytest.raises(PacketError, match=f"the SOURCE frame of source {app} is damaged"):
        recover_bytes(bytes(d.data) + raw)


def test_commit_that_says_it_is_the_first_behind_others_is_not_taken_in() -> None:
    """A frame of the file's own chain that contradicts the COMMITs before it is a hole, as any other with a fault."""
    d = story()
    d.commit()
    _, raw = d.make(FrameType.COMMIT, d.ledger.commit(0)._replace(previous_commit=NONE_U64, total_lines=99).pack())
    found = recover_bytes(bytes(d.data) + raw)
    assert snapshot(found.ledger) == snapshot(d.ledger)
    assert found.hole == Hole(len(d.data), len(d.data))


def test_hole_over_several_frames_is_one_hole() -> None:
    """Zeros over two frames and a half: the hole ends at the first whole frame behind them."""
    d = story()
    frames = [d.lines(0, b"line %d\n" % n) for n in range(5)]
    bad = bytearray(d.data)
    start, end = frames[1].offset, frames[3].offset + 20
    bad[start:end] = bytes(end - start)
    found = recover_bytes(bytes(bad))
    assert found.hole == Hole(frames[1].offset, frames[4].offset)
    assert found.behind == (frames[4].header,)
    assert snapshot(found.ledger) == d.snapshots[frames[1].offset]


def test_zeros_at_the_end_are_a_torn_tail() -> None:
    """A file that the disk made longer than what reached it has nothing behind the zeros, so no hole."""
    d = story()
    found = recover_bytes(bytes(d.data) + bytes(5000))
    assert (found.torn, found.hole) == (5000, None)
    assert snapshot(found.ledger) == snapshot(d.ledger)


def test_damaged_payload_before_the_last_commit_costs_recovery_nothing() -> None:
    """The COMMIT holds what the frames before it did: damage to their bytes is a reader's matter."""
    d = story()
    bad = bytearray(d.data)
    bad[bad.index(b"new\n")] ^= 1
    assert snapshot(recover_bytes(bytes(bad)).ledger) == snapshot(d.ledger)


def test_damage_behind_what_is_durable_is_found_although_a_commit_stands_behind() -> None:
    """Recovery goes on from the last COMMIT before which all was on the disk, and checks every payload behind it."""
    d = Draft()
    app = d.source()
    d.lines(app, b"one\n" * 9)
    durable = d.commit()
    lost = d.lines(app, b"two\n" * 9)
    d.commit(durable.offset)
    d.lines(app, b"three\n")
    last = d.commit(durable.offset)
    whole = recover(lambda at, n: bytes(d.data[at : at + n]), len(d.data))
    assert (whole.checked, whole.ledger.end, whole.hole) == (durable.offset, last.end, None)
    d.data[lost.end - 3] ^= 1
    found = recover(lambda at, n: bytes(d.data[at : at + n]), len(d.data))
    assert found.ledger.end == lost.offset
    assert found.hole == Hole(lost.offset, lost.end)
    assert [header.seq for header in found.behind] == [18]


def test_commit_far_from_the_end_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was never synced is not read whole: farther back than a writer ever leaves unsynced, all is taken."""
    d = Draft()
    app = d.source()
    commits = []
    for _ in range(50):
        d.lines(app, b"line\n" * 20)
        commits.append(d.commit(0))
    assert recover(lambda at, n: bytes(d.data[at : at + n]), len(d.data)).checked == 0
    monkeypatch.setattr(recover_module, "_CHECKED", 1000)
    found = recover(lambda at, n: bytes(d.data[at : at + n]), len(d.data))
    assert found.checked == next(c.offset for c in reversed(commits) if len(d.data) - c.offset >= 1000)
    assert snapshot(found.ledger) == snapshot(d.ledger)


@pytest.mark.parametrize(("size", "empty"), [(64, True), (123, True), (512, True), (513, False)])
def test_zeros_instead_of_the_first_frame_are_an_empty_packet_file(size: int, empty: bool) -> None:
    """A power cut can keep a new file's size and not its one frame; what is longer is no packet file."""
    if empty:
        found = recover(lambda at, n: bytes(max(0, min(n, size - at))), size)
        assert (found.ledger.end, found.torn, found.hole) == (0, size, None)
    else:
        with pytest.raises(PacketError, match="expected the magic"):
            recover(lambda at, n: bytes(max(0, min(n, size - at))), size)


def test_damaged_header_before_the_last_commit_leads_to_the_commit_before() -> None:
    """A COMMIT that no walk confirms is not believed: the state is that before the damage, and the hole is told."""
    d = story()
    (hit,) = [frame for frame in d.frames if frame.payload == b"new\n"]
    last = max(frame.offset for frame in d.frames if frame.header.type is FrameType.COMMIT)
    assert hit.offset < last
    bad = bytearray(d.data)
    bad[hit.offset + 8] ^= 1
    found = recover_bytes(bytes(bad))
    assert snapshot(found.ledger) == d.snapshots[hit.offset]
    assert found.hole == Hole(hit.offset, hit.end)
    kinds = (FrameType.LINES, FrameType.PACKETS)
    assert found.behind == tuple(f.header for f in d.frames if f.offset > hit.offset and f.header.type in kinds)


@pytest.mark.parametrize(
    ("type", "number", "message"),
    [
        (FrameType.FILE, 0, "the FILE frame is damaged"),
        (FrameType.SOURCE, 1, "the SOURCE frame of source 1 is damaged"),
        (FrameType.COMMIT, 0, "the COMMIT here is damaged and holds sources' states"),
    ],
)
def test_damage_to_what_the_state_needs_is_refused(type: FrameType, number: int, message: str) -> None:
    """Where a state cannot be told for sure, recovery names the frame, and changes nothing."""
    d = story()
    hit = [frame for frame in d.frames if frame.header.type is type][number]
    bad = bytearray(d.data)
    bad[hit.end - 1] ^= 1
    with pytest.raises(PacketError) as caught:
        recover_bytes(bytes(bad))
    assert (caught.value.message, caught.value.offset) == (message, hit.offset)


def test_frame_of_another_run_is_not_taken_in() -> None:
    """Stale bytes behind the end, whole frames of an earlier run, stay outside the state."""
    d = story()
    stale, raw = d.make(FrameType.LINES, b"stale\n", count=1, epoch=0xDEAD)
    found = recover_bytes(bytes(d.data) + raw)
    assert snapshot(found.ledger) == snapshot(d.ledger)
    assert found.hole == Hole(len(d.data), len(d.data))
    assert found.behind == (stale.header,)


def test_sound_frame_with_a_senseless_payload_is_not_taken_in() -> None:
    """A COMMIT with right checksums that cannot be read is a hole, and no reason to refuse the file."""
    d = story()
    _, raw = d.make(FrameType.COMMIT, b"too short")
    found = recover_bytes(bytes(d.data) + raw)
    assert snapshot(found.ledger) == snapshot(d.ledger)
    assert found.hole == Hole(len(d.data), len(d.data))


# --- a log line is not believed -------------------------------------------------------------------------------------


def forge(d: Draft, at: int, previous: int, *, full: bool = True) -> bytes:
    """A COMMIT with right checksums for byte `at`, which puts source 0 far ahead."""
    entry = d.ledger.sources[0].entry()._replace(resume_off=10**9, next_seq=10**6)
    info = CommitInfo(at, previous, 10**6, bytes(32), full, (entry,))
    return encode(FrameType.COMMIT, info.pack(), prev_len=d.ledger.prev_len, epoch=d.epoch)


PREVIOUS: dict[str, Callable[[Draft, int], int]] = {
    "none": lambda d, at: NONE_U64,
    "the real one": lambda d, at: d.ledger.last_commit,
    "itself": lambda d, at: at,
    "behind itself": lambda d, at: at + 10,
    "behind the file": lambda d, at: NONE_U64 - 1,
    "its own line": lambda d, at: len(d.data),
    "inside a frame": lambda d, at: 5,
    "one before the real one": lambda d, at: CommitInfo.unpack(d.frames[last_commit(d)]).previous_commit,
    "its source": lambda d, at: d.ledger.sources[0].source_frame,
}


def last_commit(d: Draft) -> int:
    return max(n for n, frame in enumerate(d.frames) if frame.header.type is FrameType.COMMIT)


@pytest.mark.parametrize("full", [True, False], ids=["full", "partial"])
@pytest.mark.parametrize("torn", [0, 1], ids=["whole line", "torn line"])
@pytest.mark.parametrize("previous", PREVIOUS)
def test_forged_commit_in_a_log_line_is_not_believed(previous: str, torn: int, full: bool) -> None:
    """A line that holds a COMMIT, whatever it names as the one before, changes nothing of the state."""
    d = story()
    before = d.snapshots[len(d.data)]
    at = len(d.data) + HEADER_BYTES + 6
    text = b"look: " + forge(d, at, PREVIOUS[previous](d, at), full=full) + b" :look\n"
    frame = d.lines(0, text)
    assert d.data[at : at + 4] == b"\xffOPK"
    data = bytes(d.data[: len(d.data) - torn])
    found = recover_bytes(data)
    if torn:
        assert (found.torn, found.hole) == (frame.header.frame_len - 1, None)
        assert snapshot(found.ledger) == before
    else:
        assert (found.torn, found.hole) == (0, None)
        assert snapshot(found.ledger) == snapshot(d.ledger)


def test_forged_commit_in_a_damaged_line_is_not_believed() -> None:
    """Where the line's own header is damaged, the COMMIT in it is still not one that a walk leads to."""
    d = story()
    at = len(d.data) + HEADER_BYTES
    frame = d.lines(0, forge(d, at, NONE_U64) + b"\n")
    behind = d.lines(0, b"behind\n")
    bad = bytearray(d.data)
    bad[frame.offset + 20] ^= 1
    found = recover_bytes(bytes(bad))
    assert snapshot(found.ledger) == d.snapshots[frame.offset]
    assert found.hole == Hole(frame.offset, at)
    assert found.behind == (behind.header,)


def test_what_stands_behind_damage_is_told_in_bounded_memory() -> None:
    """Of each source the frame that ends farthest, and one of those that nobody knows, however many there are."""
    d = story()
    app, sources = d.ledger.sources[0].source_id, len(d.ledger.sources)
    hit = d.lines(app, b"damaged\n")
    behind = [d.lines(app, b"behind %d\n" % number) for number in range(50)]
    unknown = [d.lines(d.source(b"new %d" % number), b"x\n") for number in range(50)]
    bad = bytearray(d.data)
    bad[hit.offset] ^= 1
    found = recover_bytes(bytes(bad))
    assert found.behind == (behind[-1].header, unknown[0].header)
    assert len(found.behind) <= sources + 1


def test_header_in_a_damaged_line_hides_no_frame_behind_it() -> None:
    """A damaged line holds a header that claims 16 MiB: the frames behind it are told, and nothing is cut as torn."""
    d = story()
    claim = pack_header(FrameType.LINES, 16 << 20, 0, prev_len=d.ledger.prev_len, epoch=d.epoch)
    frame = d.lines(0, claim + b"\n")
    behind = [d.lines(0, b"behind\n"), d.packets(1, [b"packet"])]
    bad = bytearray(d.data)
    bad[frame.offset + 20] ^= 1
    found = recover_bytes(bytes(bad))
    assert snapshot(found.ledger) == d.snapshots[frame.offset]
    assert found.hole == Hole(frame.offset, frame.end)
    assert found.behind == tuple(frame.header for frame in behind)


@pytest.mark.parametrize(
    ("type", "prev_len", "epoch"),
    [(FrameType.LINES, 0, 0xDEAD), (FrameType.LINES, 1, 0), (FrameType.COMMIT, 1, 0), (FrameType.FILE, 0, 0)],
    ids=["another run's", "another place's", "another place's COMMIT", "another file's"],
)
def test_header_that_does_not_follow_is_no_torn_frame(type: FrameType, prev_len: int, epoch: int) -> None:
    """A sound header that claims more than there is does not make frames its payload where it cannot be the next."""
    d = story()
    border = len(d.data)
    claim = pack_header(type, 16 << 20, 0, prev_len=d.ledger.prev_len + prev_len, epoch=epoch or d.epoch)
    behind = d.lines(0, b"behind\n")
    found = recover_bytes(bytes(d.data[:border]) + claim + bytes(d.data[border:]))
    assert found.hole == Hole(border, border + HEADER_BYTES)
    assert found.behind == (behind.header,)


@pytest.mark.parametrize("type", [FrameType.LINES, FrameType.PACKETS, FrameType.COMMIT])
def test_frames_in_the_payload_of_a_torn_frame_are_its_payload(type: FrameType) -> None:
    """A packet file that was merged while the writer was killed is a torn tail, however whole the frames in it are."""
    d = story()
    before = snapshot(d.ledger)
    epoch = d.epoch + (type is FrameType.COMMIT)  # the first frame of a new run may be torn, too
    _, raw = d.make(type, bytes(story().data), count=1, epoch=epoch)
    for torn in (1, 50):
        found = recover_bytes(bytes(d.data) + raw[:-torn])
        assert (found.torn, found.hole, found.behind) == (len(raw) - torn, None, ())
        assert snapshot(found.ledger) == before


def test_first_frame_torn_is_a_torn_tail() -> None:
    """A FILE frame that names its writer with the bytes of a frame and was torn is an empty file."""
    info = FileInfo(bytes(16), 0, bytes(32), "").pack() + encode(FrameType.NOTE, b"x")
    raw = encode(FrameType.FILE, info)
    found = recover_bytes(raw[:-1])
    assert (found.ledger.end, found.torn, found.hole) == (0, len(raw) - 1, None)


calm = settings(deadline=None, max_examples=100)
anything = st.one_of(st.integers(0, 3), st.integers(0, 2000), st.just(2**32 - 1), st.just(NONE_U64))


@given(
    st.lists(st.tuples(st.sampled_from(FrameType), st.binary(max_size=180), st.integers(0, 31)), max_size=4),
    st.tuples(anything, anything, anything, st.booleans(), anything, st.integers(0, 3), st.integers(0, 3)),
    st.booleans(),
)
@calm
def test_sound_checksums_around_nonsense_end_in_packet_errors_only(
    frames: list[tuple[FrameType, bytes, int]], numbers: tuple[int, int, int, bool, int, int, int], linked: bool
) -> None:
    """Whatever stands in frames with right checksums, recovery and ledger answer with a state, sentences or
    PacketError, and never read behind the end of the file."""
    d = story()
    for type, payload, flags in frames:
        _, raw = d.make(type, payload, flags=flags)
        d.data += raw
    durable, previous, total, full, source_frame, source_id, generation = numbers
    entry = d.ledger.sources[0].entry()._replace(source_id=source_id, generation=generation, source_frame=source_frame)
    previous = d.ledger.last_commit if linked else previous
    _, raw = d.make(FrameType.COMMIT, CommitInfo(durable, previous, total, bytes(32), full, (entry,)).pack())
    data = bytes(d.data) + raw
    with contextlib.suppress(PacketError):
        recover_bytes(data)
    ledger = Ledger()
    for frame in PacketDecoder().feed(data):
        sentences = list(ledger.faults(frame))
        assert all(sentences)
        raw = data[frame.offset : frame.offset + HEADER_BYTES]
        if not sentences:
            ledger.apply(frame.header, frame.payload, raw, frame.offset)
            continue
        with contextlib.suppress(PacketError):
            ledger.apply(frame.header, frame.payload, raw, frame.offset)


# --- what recovery reads --------------------------------------------------------------------------------------------


class Reader:
    """A file of any size in little memory: frames laid end to end; counts the calls and the bytes read."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, bytes]] = []
        self.size = self.calls = self.bytes = 0

    def append(self, part: bytes) -> None:
        self.parts.append((self.size, part))
        self.size += len(part)

    def read_at(self, offset: int, length: int) -> bytes:
        out = b"".join(
            part[max(0, offset - at) : offset + length - at]
            for at, part in self.parts
            if at < offset + length and offset < at + len(part)
        )
        self.calls += 1
        self.bytes += len(out)
        return out


def big_file(mebibytes: int) -> tuple[Reader, Ledger]:
    """Frames of 1 MiB with a COMMIT after every fourth and a few small frames at the end."""
    reader, d = Reader(), Draft()
    d.source()
    payload = b"x" * ((1 << 20) - 1) + b"\n"
    crc = crc32(payload)
    reader.append(bytes(d.data))
    ledger = d.ledger

    def write(type: FrameType, payload: bytes, crc: int, **fields: int) -> None:
        header = pack_header(type, len(payload), crc, prev_len=ledger.prev_len, epoch=d.epoch, **fields)
        ledger.apply(unpack_header(header), payload, header, reader.size)
        reader.append(header)
        reader.append(payload)

    def lines(payload: bytes, crc: int) -> None:
        state = ledger.sources[0]
        write(FrameType.LINES, payload, crc, seq=state.next_seq, source_off=state.resume_off, count=1)

    for n in range(mebibytes):
        lines(payload, crc)
        if n % 4 == 3:
            commit = ledger.commit(reader.size).pack()
            write(FrameType.COMMIT, commit, crc32(commit))
    for _ in range(3):
        lines(b"small\n", crc32(b"small\n"))
    return reader, ledger


def test_recovery_reads_as_little_of_a_large_file_as_of_a_small_one() -> None:
    """Recovery of 4 GiB reads what recovery of 64 MiB does: a window at the end and a few headers, no more."""
    cost = []
    # The full COMMITs are at 4 MiB and each 64 MiB (16 COMMITs) after: both files end 15 COMMITs behind one.
    for mebibytes in (64, 4096):
        reader, ledger = big_file(mebibytes)
        assert reader.size > mebibytes << 20
        found = recover(reader.read_at, reader.size)
        assert snapshot(found.ledger) == snapshot(ledger)
        assert (found.torn, found.hole) == (0, None)
        cost.append((reader.calls, reader.bytes))
    assert cost[0] == cost[1]
    assert cost[1][0] < 100
    assert cost[1][1] < (1 << 20) + 20_000


def test_recovery_far_behind_a_full_commit_reads_a_bounded_chain() -> None:
    """The walk back is bounded by FULL_COMMIT_BYTES: at any length of the file it is 16 COMMITs of 4 MiB at most."""
    most = 0
    for mebibytes in range(132, 200, 4):
        reader, ledger = big_file(mebibytes)
        found = recover(reader.read_at, reader.size)
        assert snapshot(found.ledger) == snapshot(ledger)
        most = max(most, reader.calls)
    assert most < 100


def hostile(filler: int, line: bytes) -> tuple[Reader, Ledger]:
    """A file of `filler` small frames under one COMMIT each 100, and then a line that was written to be read here."""
    d = Draft()
    app = d.source()
    for n in range(filler):
        d.lines(app, b"%d\n" % n)
        if n % 100 == 99:
            d.commit()
    d.lines(app, line)
    reader = Reader()
    reader.append(bytes(d.data))
    return reader, d.ledger


def claimed(previous: int, entries: int = 0, *, payload_len: int | None = None) -> bytes:
    """A COMMIT without its entries, which may say that they take more room than there is."""
    payload = CommitInfo(0, previous, 0, bytes(32), True, ()).pack()
    payload = payload[:56] + entries.to_bytes(4, "little") + payload[60:]
    size = len(payload) + 88 * entries if payload_len is None else payload_len
    return pack_header(FrameType.COMMIT, size, 0) + payload


def first_commit(filler: int) -> int:
    reader, _ = hostile(filler, b"\n")
    return next(
        frame.offset
        for frame in PacketDecoder().feed(reader.read_at(0, reader.size))
        if frame.header.type is FrameType.COMMIT
    )


@pytest.mark.parametrize("commits", [1, 1000], ids=["one", "a thousand"])
def test_false_first_commits_cost_one_walk_in_all(commits: int) -> None:
    """A line full of COMMITs that say they are the first: recovery reads each header of the file once, not for each."""
    reader, ledger = hostile(1000, claimed(NONE_U64) * commits + b"\n")
    assert snapshot(recover(reader.read_at, reader.size).ledger) == snapshot(ledger)
    assert 1000 < reader.calls < 1200


def test_false_commits_behind_a_true_one_cost_the_way_to_the_next_commit() -> None:
    """A COMMIT that names one far back is not believed from the next COMMIT on, so no walk is longer than that."""
    reader, ledger = hostile(1000, claimed(first_commit(1000)) * 10 + b"\n")
    assert snapshot(recover(reader.read_at, reader.size).ledger) == snapshot(ledger)
    assert 1000 < reader.calls < 1300


def test_false_commits_cost_what_effort_there_is_and_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each false COMMIT costs a walk, all of them together get no more than the effort, and then one walk over
    all headers finds the true one."""
    monkeypatch.setattr(recover_module, "_EFFORT", 500)
    reader, ledger = hostile(1000, claimed(first_commit(1000)) * 300 + b"\n")
    assert snapshot(recover(reader.read_at, reader.size).ledger) == snapshot(ledger)
    assert 1500 < reader.calls < 1700


def test_false_first_commits_behind_damage_cost_one_walk_in_all() -> None:
    """Where the walk from the start ends at a damaged header, it is not tried again for each that asks for it."""
    reader, ledger = hostile(1000, claimed(NONE_U64) * 1000 + b"\n")
    data = bytearray(reader.read_at(0, reader.size))
    damaged = Reader()
    data[data.index(b"550\n") - 1] ^= 1  # the last byte of a header
    damaged.append(bytes(data))
    assert snapshot(recover(damaged.read_at, damaged.size).ledger) == snapshot(ledger)
    assert 550 < damaged.calls < 750


def test_payload_of_a_false_commit_is_read_only_behind_all_that_is_cheap() -> None:
    """COMMITs in a line that claim large payloads are refused from their headers; none of the payloads is read."""
    most = 11_000  # entries: not quite 1 MiB, and all of it there
    lies = [
        claimed(
            NONE_U64, most
        ),  # the last that is looked at, as the walk from the start that it asks for ends the search
        claimed(5, most),
        claimed(first_commit(100) + 1, most),
        claimed(0, most),
        claimed(NONE_U64 - 1, most),
    ]
    # A walk leads to this one, but it is not as long as its entries are.
    at = hostile(100, b"\n")[0].size - 1 + len(b"".join(lies))
    lies.append(encode(FrameType.COMMIT, CommitInfo(0, 0, 0, bytes(32), True, ()).pack()))
    lies.append(claimed(at, most, payload_len=(1 << 20) - 500))
    reader, ledger = hostile(100, b"".join(lies) + bytes(1 << 20) + b"\n")
    assert snapshot(recover(reader.read_at, reader.size).ledger) == snapshot(ledger)
    plain, _ = hostile(100, bytes(len(b"".join(lies)) + (1 << 20)) + b"\n")
    recover(plain.read_at, plain.size)
    assert reader.bytes - plain.bytes < 10_000  # headers


def test_payloads_of_false_commits_that_a_walk_leads_to_cost_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line may hold chains that lead to COMMITs with large payloads and wrong checksums: a few of those are read."""
    monkeypatch.setattr(recover_module, "_EFFORT", 600)
    most = 11_000  # entries: 237 times 4 KiB
    before = CommitInfo(0, 0, 0, bytes(32), True, ()).pack()
    line = hostile(100, b"\n")[0].size - 1  # where its payload begins
    pairs = [encode(FrameType.COMMIT, before) + claimed(line + 256 * n, most) for n in range(50)]
    assert {len(pair) for pair in pairs} == {256}
    reader, ledger = hostile(100, b"".join(pairs) + bytes(1 << 20) + b"\n")
    assert snapshot(recover(reader.read_at, reader.size).ledger) == snapshot(ledger)
    # Two of them, and otherwise what is read in a line that holds none.
    plain, _ = hostile(100, bytes(256 * 50 + (1 << 20)) + b"\n")
    recover(plain.read_at, plain.size)
    assert 2 << 19 < reader.bytes - plain.bytes < 2 << 20


# --- earlier generations --------------------------------------------------------------------------------------------


def rotations(count: int) -> tuple[Draft, list[tuple[int, bytes]]]:
    """A source rotated `count` times, one COMMIT at the end; and each generation's inode and content, oldest first."""
    d = Draft()
    d.source(b"other.log")
    app = d.source()
    told = []
    for n in range(count + 1):
        content = b"".join(b"%d %d\n" % (n, k) for k in range(n * 20))
        if n:
            d.generation(app, 1000 + n)
        told.append((d.ledger.sources[app].info.inode, content))
        if content:
            d.lines(app, content)
        d.lines(0, b"between\n")
    d.commit()
    return d, told


def walk(d: Draft, data: bytes | None = None, state: SourceState | None = None) -> list[tuple[SourceInfo, Any]]:
    data = bytes(d.data) if data is None else data

    def read_at(offset: int, length: int) -> bytes:
        assert 0 <= offset <= len(data)
        return data[offset : offset + length]

    return list(generations(read_at, len(data), state or recover(read_at, len(data)).ledger.sources[1]))


def test_each_earlier_generation_is_found_after_a_restart() -> None:
    """From the newest SOURCE frame back: each generation's file, where it ended, and the hashes of its own bytes."""
    d, told = rotations(4)
    found = walk(d)
    assert [(info.inode, e.generation, e.resume_off) for info, e in found] == [
        (inode, n, len(content)) for n, (inode, content) in reversed(list(enumerate(told[:-1])))
    ]
    for (_, entry), (_, content) in zip(found, reversed(told[:-1]), strict=True):
        assert_hashes(entry, content)
        assert entry.guard_len == min(GUARD_BYTES, len(content))
    assert walk(d, state=d.ledger.sources[1]) == found
    assert walk(d, state=d.ledger.sources[0]) == []


def test_writer_and_recovery_know_how_the_generation_before_ended() -> None:
    """The state that recovery finds has the entry of the generation before in it, as the writer's has."""
    d, told = rotations(1)
    before = d.recover().ledger.sources[1].info.before
    assert before is not None
    assert before == d.ledger.sources[1].info.before
    assert (before.generation, before.resume_off) == (0, len(told[0][1]))


def test_walk_over_generations_stops_at_a_damaged_frame() -> None:
    """A damaged SOURCE frame ends the walk without an error: those behind it are told, those before it are not."""
    d, _ = rotations(4)
    sources = [f for f in d.frames if f.header.type is FrameType.SOURCE and f.header.source_id == 1]
    whole = walk(d)
    for number, hit in enumerate(sources[:-1]):
        for place in (hit.offset + 20, hit.end - 1):
            bad = bytearray(d.data)
            bad[place] ^= 1
            assert walk(d, bytes(bad), d.ledger.sources[1]) == whole[: len(sources) - 2 - number]


def test_walk_over_generations_ends_whatever_the_frames_say() -> None:
    """Entries that lead forward, to themselves, to another source or behind the file end the walk."""
    d, _ = rotations(3)
    state = d.ledger.sources[1]
    assert state.info.before is not None
    before = state.info.before
    other = d.ledger.sources[0].source_frame
    lies: list[dict[str, Any]] = [
        {"source_frame": state.source_frame},
        {"source_frame": state.source_frame + 1},
        {"source_frame": other},
        {"source_frame": 0},
        {"source_frame": 7},
        {"source_frame": NONE_U64},
        {"generation": before.generation - 1},
        {"generation": before.generation + 1},
        {"source_id": 0},
    ]
    for changes in lies:
        info = state.info._replace(before=before._replace(**changes))
        assert walk(d, state=dataclasses.replace(state, info=info)) == [], changes
    # The right generation of the right source, but behind the one that names it.
    raw = encode(FrameType.SOURCE, source_payload(), source_id=1, generation=0)
    info = state.info._replace(before=before._replace(generation=0, source_frame=len(d.data)))
    assert walk(d, bytes(d.data) + raw, dataclasses.replace(state, info=info, generation=1)) == []
    # A frame with right checksums that names itself: at the place of the one before, as long, and its own before.
    (hit,) = [f for f in d.frames if f.offset == before.source_frame]
    assert SourceInfo.unpack(hit).before is not None
    lie = SourceInfo.unpack(hit)._replace(before=before)
    raw = encode(FrameType.SOURCE, lie.pack(), source_id=1, generation=hit.header.generation)
    assert len(raw) == hit.header.frame_len
    data = bytes(d.data[: hit.offset]) + raw + bytes(d.data[hit.end :])
    assert walk(d, data, state) == [(lie, before)]


# --- each sentence of faults ----------------------------------------------------------------------------------------


def fresh() -> Draft:
    """A file with a committed source 0 and a source 1 with an open fragment, not committed yet."""
    d = Draft()
    app = d.source(b"app.log")
    d.lines(app, b"one\ntwo\n")
    d.commit()
    other = d.source(b"other.log")
    d.lines(other, b"begun ", flags=Flag.FIRST)
    return d


def due(d: Draft, type: FrameType, payload: bytes = b"", **fields: int) -> Frame:
    return d.make(type, payload, **fields)[0]


def commit_with(d: Draft, **changes: Any) -> Frame:
    return due(d, FrameType.COMMIT, d.ledger.commit(0)._replace(**changes).pack())


def entry_with(d: Draft, **changes: Any) -> Frame:
    (entry,) = d.ledger.commit(0).entries
    return commit_with(d, entries=(entry._replace(**changes),))


def source_payload(d: Draft | None = None, **changes: Any) -> bytes:
    """Of a new source; with a draft, of the next generation of source 0, `changes` being made to its entry."""
    before = None if d is None else d.ledger.sources[0].entry()._replace(**changes)
    return SourceInfo(0, 0, 0, 0, Compression.NONE, b"new", before).pack()


def next_generation(d: Draft, **changes: Any) -> Frame:
    return due(d, FrameType.SOURCE, source_payload(d, **changes), generation=1, seq=2)


def gap_payload(start: int, end: int) -> bytes:
    return GapInfo(start, end, NONE_U64, GapReason.TRUNCATED).pack()


def empty_ledger(d: Draft) -> None:
    d.ledger = Ledger(epoch=d.epoch)


def unterminated(d: Draft) -> None:
    d.lines(0, b"cut", flags=Flag.UNTERMINATED, count=1)


def no_commit_yet(d: Draft) -> None:
    d.ledger.last_full = NONE_U64


def committed(d: Draft) -> None:
    d.lines(1, b"end\n", flags=Flag.LAST, count=1)
    d.commit()
    d.ledger.total_lines = 2


def seal_with(d: Draft, **changes: Any) -> Frame:
    info = SealInfo(NONE_U64, d.ledger.total_lines, 5, d.ledger.next_chain())
    return due(d, FrameType.SEAL, info._replace(**changes).pack())


def seal(d: Draft) -> None:
    d.ledger.sealed = True


def uncommitted(d: Draft) -> None:
    d.ledger.last_commit = NONE_U64


def again(d: Draft, before: CommitEntry | None = None, *, source_id: int = 0, **changes: Any) -> Frame:
    """A source that is stated again, at line 5 and byte 50; `changes` are made to what its entry says."""
    generation = changes.get("generation", 0)
    stands = CommitEntry(source_id, generation, 0, 50, 5, 0, 0, 0, 0, EntryFlag.NONE, bytes(16), bytes(16))
    info = SourceInfo(0, 0, 0, 0, Compression.NONE, b"new", before, stands._replace(**changes))
    place = {"source_id": source_id, "generation": generation, "seq": 5, "source_off": 50}
    return due(d, FrameType.SOURCE, info.pack(), flags=Flag.RESTATED, **place)


Prepare = Callable[[Draft], None] | None
CASES: list[tuple[str, Prepare, Callable[[Draft], Frame]]] = [
    ("no FILE frame at the start", empty_ledger, lambda d: due(d, FrameType.NOTE)),
    ("a second FILE frame", None, lambda d: due(d, FrameType.FILE, bytes(52))),
    ("FILE payload is 1 bytes, expected at least 52", empty_ledger, lambda d: due(d, FrameType.FILE, b"x")),
    ("SOURCE payload is 1 bytes, expected at least 40", None, lambda d: due(d, FrameType.SOURCE, b"x")),
    ("gap reason is 0, known are [1, 2, 3, 4, 5]", None, lambda d: due(d, FrameType.GAP, bytes(32))),
    ("COMMIT payload is 1 bytes, expected at least 64", None, lambda d: due(d, FrameType.COMMIT, b"x")),
    (
        "table of 2 lengths in a payload of 1 bytes",
        None,
        lambda d: due(d, FrameType.PACKETS, b"x", flags=Flag.TABLE, count=2),
    ),
    (
        "names a frame of 1 bytes before it, found one of 70",
        None,
        lambda d: due(d, FrameType.NOTE, prev_len=1),
    ),
    (
        "epoch is 0000beef, expected 000000a0: bytes of another run",
        None,
        lambda d: due(d, FrameType.NOTE, epoch=0xBEEF),
    ),
    ("source 5 has no SOURCE frame", None, lambda d: due(d, FrameType.LINES, source_id=5)),
    ("source 0 is at generation 1, expected 0", None, lambda d: due(d, FrameType.LINES, generation=1)),
    ("source 0 is at line 3, expected 2", None, lambda d: due(d, FrameType.LINES, seq=3)),
    ("source 0 is at its byte 9, expected 8", None, lambda d: due(d, FrameType.LINES, source_off=9)),
    (
        "source 0 goes on a line that is not open",
        None,
        lambda d: due(d, FrameType.LINES, b"x\n", count=1, flags=Flag.LAST),
    ),
    (
        "source 0 goes on a counted line, expected UNTERMINATED or LAST",
        unterminated,
        lambda d: due(d, FrameType.LINES, b"x", flags=Flag.MIDDLE),
    ),
    (
        "source 1 begins a line inside another",
        None,
        lambda d: due(d, FrameType.LINES, b"x\n", source_id=1, count=1),
    ),
    (
        "source 0 begins a line inside one that was counted, expected MIDDLE or LAST",
        unterminated,
        lambda d: due(d, FrameType.LINES, b"x\n", count=1),
    ),
    *(
        (
            f"source 0 has LINES with flags {flags:#x}, which do not stand together",
            None,
            lambda d, flags=flags: due(d, FrameType.LINES, b"x\n", count=1, flags=flags),
        )
        for flags in sorted(set(range(32)) - {0, 1, 2, 4, 8, 2 | 8})
    ),
    (
        "source 0 has PACKETS with flags 0x4, which do not stand together",
        None,
        lambda d: due(d, FrameType.PACKETS, b"x", count=1, flags=Flag.LAST),
    ),
    (
        "source 0 has a gap from its byte 7, expected 8",
        None,
        lambda d: due(d, FrameType.GAP, gap_payload(7, 100)),
    ),
    (
        "source 0 has a gap from its byte 8 back to 7",
        None,
        lambda d: due(d, FrameType.GAP, gap_payload(8, 7)),
    ),
    ("source 0 counts 1 lines, found 2", None, lambda d: due(d, FrameType.LINES, b"x\ny\n", count=1)),
    (
        "source 0 counts 1 lines in a hole, expected 0",
        None,
        lambda d: due(d, FrameType.LINES, bytes(8), flags=Flag.HOLE, count=1),
    ),
    ("HOLE payload is 7 bytes, expected 8", None, lambda d: due(d, FrameType.LINES, bytes(7), flags=Flag.HOLE)),
    (
        "source 0 has LINES with flags 0x42, which do not stand together",
        None,
        lambda d: due(d, FrameType.LINES, bytes(8), flags=Flag.HOLE | Flag.MIDDLE),
    ),
    ("source 0 counts 2 packets, found 1", None, lambda d: due(d, FrameType.PACKETS, b"x", count=2)),
    ("defines source 3, expected 2", None, lambda d: due(d, FrameType.SOURCE, source_payload(), source_id=3)),
    (
        "source 2 begins generation 1, expected 0",
        None,
        lambda d: due(d, FrameType.SOURCE, source_payload(d, source_id=2), source_id=2, generation=1),
    ),
    (
        "source 0 begins generation 2, expected 1",
        None,
        lambda d: due(d, FrameType.SOURCE, source_payload(d), generation=2, seq=2),
    ),
    (
        "source 2 begins at line 7, expected 0",
        None,
        lambda d: due(d, FrameType.SOURCE, source_payload(), source_id=2, seq=7),
    ),
    (
        "source 0 begins at line 0, expected 2",
        None,
        lambda d: due(d, FrameType.SOURCE, source_payload(d), generation=1),
    ),
    (
        "SOURCE payload is 43 bytes, expected at least 128",
        None,
        lambda d: due(d, FrameType.SOURCE, source_payload(), generation=1, seq=2),
    ),
    (
        "source 0 has the end of source 1 before it",
        None,
        lambda d: next_generation(d, source_id=1),
    ),
    (
        "puts source 0 at generation 1, byte 8, line 2; found 0, 8, 2",
        None,
        lambda d: next_generation(d, generation=1),
    ),
    (
        "puts source 0 at generation 0, byte 7, line 2; found 0, 8, 2",
        None,
        lambda d: next_generation(d, resume_off=7),
    ),
    (
        "puts source 0 at generation 0, byte 8, line 3; found 0, 8, 2",
        None,
        lambda d: next_generation(d, next_seq=3),
    ),
    (
        "states source 0 with SOURCE at byte 7 and flags 0; found {first}, 0",
        None,
        lambda d: next_generation(d, source_frame=7),
    ),
    (
        "states source 0 with SOURCE at byte {first} and flags 2; found {first}, 0",
        None,
        lambda d: next_generation(d, flags=EntryFlag.OPEN_LINE),
    ),
    (
        f"chain is {'11' * 8}…, found {{chain}}…: a frame was changed",
        None,
        lambda d: commit_with(d, chain=b"\x11" * 32),
    ),
    (
        "says that the file is on the disk up to byte {over}, expected {end} at most",
        None,
        lambda d: commit_with(d, durable_upto=len(d.data) + 1),
    ),
    ("names a COMMIT at byte 3 before it, found {commit}", None, lambda d: commit_with(d, previous_commit=3)),
    ("counts 4 lines in the file, found 2", None, lambda d: commit_with(d, total_lines=4)),
    (
        "lists changed sources only, expected all in the first COMMIT",
        no_commit_yet,
        lambda d: commit_with(d, full=False),
    ),
    ("does not list all sources", None, lambda d: commit_with(d, full=True)),
    ("does not list all changed sources", None, lambda d: commit_with(d, entries=())),
    (
        "lists source 9, which has no SOURCE frame",
        None,
        lambda d: commit_with(
            d, entries=(*d.ledger.commit(0).entries, d.ledger.commit(0).entries[0]._replace(source_id=9))
        ),
    ),
    (
        "puts source 1 at generation 0, byte 8, line 0; found 0, 6, 0",
        None,
        lambda d: entry_with(d, resume_off=8),
    ),
    (
        "states source 1 with SOURCE at byte 0 and flags 1; found {source}, 1",
        None,
        lambda d: entry_with(d, source_frame=0),
    ),
    (
        "states source 1 with SOURCE at byte {source} and flags 2; found {source}, 1",
        None,
        lambda d: entry_with(d, flags=EntryFlag.OPEN_LINE),
    ),
    ("stands behind the SEAL, which is a segment's last frame", seal, lambda d: due(d, FrameType.NOTE)),
    ("SEAL payload is 1 bytes, expected at least 56", None, lambda d: due(d, FrameType.SEAL, b"x")),
    (
        f"chain is {'11' * 8}…, found {{chain}}…: a frame was changed",
        committed,
        lambda d: seal_with(d, chain=b"\x11" * 32),
    ),
    ("counts 7 lines in the segment, found 2", committed, lambda d: seal_with(d, lines=7)),
    ("seals what no COMMIT lists", None, seal_with),
    ("source 2 is stated again behind the first COMMIT", None, lambda d: again(d, source_id=2)),
    ("states source 3 again, expected 2", uncommitted, lambda d: again(d, source_id=3)),
    (
        "source 0 is stated again at generation 3, expected 1",
        uncommitted,
        lambda d: again(d, d.ledger.sources[0].entry(), generation=3),
    ),
    (
        "source 2 is stated again with an entry of another place",
        uncommitted,
        lambda d: again(d, source_id=2, next_seq=8),
    ),
    (
        "puts source 0 at generation 0, byte 7, line 2; found 0, 8, 2",
        uncommitted,
        lambda d: again(d, d.ledger.sources[0].entry()._replace(resume_off=7), generation=1),
    ),
]


@pytest.mark.parametrize(("sentence", "prepare", "make"), CASES, ids=[case[0] for case in CASES])
def test_each_fault_is_told_in_one_sentence(sentence: str, prepare: Prepare, make: Callable[[Draft], Frame]) -> None:
    """A frame with one thing wrong gives one sentence, which says what was found and what was expected."""
    d = fresh()
    if prepare is not None:
        prepare(d)
    source = d.ledger.sources[1].source_frame if 1 in d.ledger.sources else None
    first = d.ledger.sources[0].source_frame if d.ledger.sources else None
    expected = sentence.format(
        chain=d.ledger.next_chain().hex()[:16],
        commit=d.ledger.last_commit,
        first=first,
        source=source,
        end=len(d.data),
        over=len(d.data) + 1,
    )
    assert list(d.ledger.faults(make(d))) == [expected]


def test_every_sentence_has_a_case() -> None:
    """The list of cases reaches each `yield` of the ledger, and of the function that judges entries."""
    yields: set[int] = set()
    for part in (Ledger, ledger_module.entry_faults):
        lines, start = inspect.getsourcelines(part)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        yields |= {start + node.lineno - 1 for node in ast.walk(tree) if isinstance(node, ast.Yield)}
    reached: set[int] = set()
    for _, prepare, make in CASES:
        d = fresh()
        if prepare is not None:
            prepare(d)
        found = d.ledger.faults(make(d))
        for _ in found:
            frame = found  # the innermost generator stands at the yield
            while getattr(frame, "gi_yieldfrom", None) is not None:
                frame = frame.gi_yieldfrom  # type: ignore[attr-defined]
            reached.add(frame.gi_frame.f_lineno)  # type: ignore[attr-defined]
    assert yields <= reached


def test_what_stands_together_has_no_fault() -> None:
    """A gap from where the source stands, an empty one too; a COMMIT that all before it is on the disk; a generation
    behind a counted line."""
    d = fresh()
    for frame in (
        due(d, FrameType.GAP, gap_payload(8, 8)),
        due(d, FrameType.GAP, gap_payload(8, NONE_U64)),
        commit_with(d, durable_upto=len(d.data)),
        next_generation(d),
    ):
        assert list(d.ledger.faults(frame)) == []
    unterminated(d)
    d.generation(0)
    d.lines(0, b"a line of its own\n")


pieces_of_text = st.lists(st.text(alphabet="ab\n", max_size=12).map(str.encode), max_size=8)


@given(pieces_of_text, st.lists(st.booleans(), min_size=8, max_size=8), st.integers(1, 9))
@settings(deadline=None, max_examples=200)
def test_frames_cut_by_the_writer_have_no_faults(pieces: list[bytes], ends: list[bool], limit: int) -> None:
    """Text that comes in any pieces, the source seeming to end behind some of them: `line_pieces` makes frames that
    hold its bytes in order, count each line once, and never begin a line inside another."""
    d = Draft()
    app = d.source()
    rest = b""
    for piece, ended in zip(pieces, ends, strict=False):
        data = rest + piece
        at = 0
        state = d.ledger.sources[app]
        for cut in line_pieces(data, 0, len(data), state.open, ended=ended, limit=limit):
            assert cut.start == at
            d.lines(app, data[cut.start : cut.end], flags=cut.flags, count=cut.count)  # asserts that it has no faults
            assert cut.open is state.open
            at = cut.end
        rest = data[at:]
        assert len(rest) < limit
        assert not (ended and rest)
    written = b"".join(frame.payload for frame in d.frames if frame.header.type is FrameType.LINES)
    assert written + rest == b"".join(pieces)
    counted = written.count(b"\n") + (d.ledger.sources[app].open is EntryFlag.OPEN_LINE)
    assert d.ledger.total_lines == counted


def test_ledgers_of_the_same_file_are_equal() -> None:
    """Two ledgers that read the same frames compare equal, and not equal to one that read a frame more."""
    d = story()
    data = bytes(d.data)
    assert replay(data) == replay(data)
    assert replay(data) != replay(data[: d.frames[-1].offset])
    assert recover_bytes(data).ledger == recover_bytes(data).ledger


def test_two_faults_are_two_sentences() -> None:
    """A frame with more wrong with it is told in full."""
    d = fresh()
    frame = due(d, FrameType.LINES, seq=3, source_off=9)
    assert list(d.ledger.faults(frame)) == [
        "source 0 is at line 3, expected 2",
        "source 0 is at its byte 9, expected 8",
    ]


def test_a_fault_is_told_once() -> None:
    """A ledger that took a frame with a fault in goes on from what the frame says, so the next one has none."""
    d = fresh()
    frame, raw = d.make(FrameType.LINES, b"x\n", seq=10, source_off=100, count=1)
    assert len(list(d.ledger.faults(frame))) == 2
    d.ledger.apply(frame.header, frame.payload, raw[:HEADER_BYTES], frame.offset)
    d.data += raw
    assert list(d.ledger.faults(due(d, FrameType.LINES, b"y\n", count=1))) == []


def test_new_run_begins_with_a_commit() -> None:
    """A COMMIT may bring a new epoch, and from then on frames of the old one are faults."""
    d = fresh()
    old, d.epoch = d.epoch, 0xC2
    d.commit()
    d.lines(0, b"new run\n")
    assert list(d.ledger.faults(due(d, FrameType.NOTE, epoch=old))) == [
        "epoch is 000000a0, expected 000000c2: bytes of another run"
    ]


# --- any history ----------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What the model knows of a source: the bytes of its generation (a gap's are None) and its lines."""

    generation: int = 0
    content: tuple[int | None, ...] = ()
    counted: int = 0
    open: str = ""  # "fragment": not counted yet; "line": counted, and may go on


@dataclass(frozen=True)
class Model:
    """The file as the spec tells it, in the plainest words; one for each frame written."""

    sources: tuple[Source, ...] = ()
    lines: int = 0
    durable: int = 0

    def change(self, number: int, data: bytes, counted: int, open: str = "") -> Model:
        source = self.sources[number]
        source = source._replace(content=source.content + tuple(data), counted=source.counted + counted, open=open)
        return self.replace(number, source, counted)

    def replace(self, number: int, source: Source, counted: int = 0) -> Model:
        sources = list(self.sources)
        sources[number] = source
        return Model(tuple(sources), self.lines + counted, self.durable)


OPEN = {"": EntryFlag.NONE, "fragment": EntryFlag.OPEN_FRAGMENT, "line": EntryFlag.OPEN_LINE}
text = st.binary(max_size=12).map(lambda data: data.replace(b"\n", b"~"))
whole_lines = st.lists(text.map(lambda line: line + b"\n"), max_size=4)


def some(*open: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Only where a source has its last line open in one of these ways."""
    return precondition(lambda self: any(source.open in open for source in self.model.sources))


class History(RuleBasedStateMachine):
    """A writer appends, commits and crashes with any bytes cut; what recovery finds is what the model remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.draft = Draft()
        self.model = Model()
        self.history = [(0, Model()), (len(self.draft.data), Model())]

    def wrote(self, model: Model) -> None:
        self.model = model
        self.history.append((len(self.draft.data), model))

    def pick(self, number: int, *open: str) -> int:
        """One of the sources whose last line is open in one of these ways."""
        fits = [n for n, source in enumerate(self.model.sources) if source.open in open]
        return fits[number % len(fits)]

    @precondition(lambda self: len(self.model.sources) < 4)
    @rule(path=st.binary(max_size=8))
    def new_source(self, path: bytes) -> None:
        self.draft.source(path)
        self.wrote(Model((*self.model.sources, Source()), self.model.lines, self.model.durable))

    @some("")
    @rule(number=st.integers(0, 3), lines=whole_lines)
    def append_lines(self, number: int, lines: list[bytes]) -> None:
        n = self.pick(number, "")
        self.draft.lines(n, b"".join(lines))
        self.wrote(self.model.change(n, b"".join(lines), len(lines)))

    @some("")
    @rule(number=st.integers(0, 3), piece=text)
    def begin_long_line(self, number: int, piece: bytes) -> None:
        n = self.pick(number, "")
        self.draft.lines(n, piece, flags=Flag.FIRST)
        self.wrote(self.model.change(n, piece, 0, "fragment"))

    @some("fragment")
    @rule(number=st.integers(0, 3), piece=text)
    def go_on_long_line(self, number: int, piece: bytes) -> None:
        n = self.pick(number, "fragment")
        self.draft.lines(n, piece, flags=Flag.MIDDLE)
        self.wrote(self.model.change(n, piece, 0, "fragment"))

    @some("fragment")
    @rule(number=st.integers(0, 3), piece=text)
    def end_long_line(self, number: int, piece: bytes) -> None:
        n = self.pick(number, "fragment")
        self.draft.lines(n, piece + b"\n", flags=Flag.LAST)
        self.wrote(self.model.change(n, piece + b"\n", 1))

    @some("")
    @rule(number=st.integers(0, 3), lines=whole_lines, piece=text)
    def source_ends_inside_a_line(self, number: int, lines: list[bytes], piece: bytes) -> None:
        n = self.pick(number, "")
        data = b"".join(lines) + piece
        self.draft.lines(n, data, flags=Flag.UNTERMINATED, count=len(lines) + 1)
        self.wrote(self.model.change(n, data, len(lines) + 1, "line"))

    @some("fragment")
    @rule(number=st.integers(0, 3), piece=text)
    def source_ends_inside_a_long_line(self, number: int, piece: bytes) -> None:
        n = self.pick(number, "fragment")
        self.draft.lines(n, piece, flags=Flag.MIDDLE | Flag.UNTERMINATED, count=1)
        self.wrote(self.model.change(n, piece, 1, "line"))

    @some("line")
    @rule(number=st.integers(0, 3), piece=text)
    def cut_line_goes_on(self, number: int, piece: bytes) -> None:
        n = self.pick(number, "line")
        self.draft.lines(n, piece, flags=Flag.MIDDLE | Flag.UNTERMINATED, count=0)
        self.wrote(self.model.change(n, piece, 0, "line"))

    @some("line")
    @rule(number=st.integers(0, 3), piece=text)
    def cut_line_ends(self, number: int, piece: bytes) -> None:
        n = self.pick(number, "line")
        self.draft.lines(n, piece + b"\n", flags=Flag.LAST, count=0)
        self.wrote(self.model.change(n, piece + b"\n", 0))

    @some("")
    @rule(number=st.integers(0, 3), packets=st.lists(st.binary(max_size=9), max_size=3))
    def append_packets(self, number: int, packets: list[bytes]) -> None:
        n = self.pick(number, "")
        self.draft.packets(n, packets)
        self.wrote(self.model.change(n, b"".join(packets), len(packets)))

    @some("", "fragment", "line")
    @rule(number=st.integers(0, 3), size=st.integers(0, 40))
    def lose_bytes(self, number: int, size: int) -> None:
        n = self.pick(number, "", "fragment", "line")
        self.draft.gap(n, size)
        source = self.model.sources[n]
        lost = source._replace(content=source.content + (None,) * size, open="")
        self.wrote(self.model.replace(n, lost))

    @some("", "fragment", "line")
    @rule(number=st.integers(0, 3))
    def new_generation(self, number: int) -> None:
        n = self.pick(number, "", "fragment", "line")
        self.draft.generation(n)
        source = self.model.sources[n]
        self.wrote(self.model.replace(n, Source(source.generation + 1, (), source.counted)))

    @rule(fsynced=st.booleans())
    def commit(self, fsynced: bool) -> None:
        durable = len(self.draft.data) if fsynced else self.model.durable
        self.draft.commit(durable)
        self.wrote(Model(self.model.sources, self.model.lines, durable))

    @rule(cut=st.one_of(st.integers(0, 100), st.integers(0, 5000)), junk=st.binary(max_size=5))
    def crash(self, cut: int, junk: bytes) -> None:
        """The file loses its last bytes, perhaps gets a few senseless ones, and a new run goes on with what is left."""
        size = max(0, len(self.draft.data) - cut)
        torn = bytes(self.draft.data[:size])
        if size >= HEADER_BYTES:
            # Never the byte that was cut: that would put a frame of which only this byte is missing together again.
            other = bytes(byte ^ 1 for byte in self.draft.data[size : size + 1])
            torn += (other + junk)[: len(junk)]
        while self.history[-1][0] > size:
            self.history.pop()
        end, self.model = self.history[-1]
        found = recover_bytes(torn)
        assert (found.ledger.end, found.torn, found.hole, found.behind) == (end, len(torn) - end, None, ())
        self.check(found.ledger)
        epoch = self.draft.epoch + 1
        if end == 0:
            self.draft = Draft(epoch=epoch)
            self.history.append((len(self.draft.data), self.model))
        else:
            self.draft = Draft(torn[:end], found.ledger, epoch)
            self.commit(fsynced=False)

    def check(self, ledger: Ledger) -> None:
        """The ledger says what the model remembers."""
        assert ledger.total_lines == self.model.lines
        assert ledger.durable_upto == self.model.durable
        assert list(ledger.sources) == list(range(len(self.model.sources)))
        for source, state in zip(self.model.sources, ledger.sources.values(), strict=True):
            assert state.generation == source.generation
            assert state.resume_off == len(source.content)
            assert state.next_seq == source.counted
            assert state.open is OPEN[source.open]
            entry = copy.deepcopy(state).entry()
            known = [entry.resume_off - entry.guard_len, entry.resume_off]
            if entry.guard_len:
                assert entry.guard == digest(bytes(b for b in source.content[slice(*known)] if b is not None))
                assert None not in source.content[slice(*known)]
            if entry.head_len:
                assert None not in source.content[: entry.head_len]
                assert entry.head == digest(bytes(b for b in source.content[: entry.head_len] if b is not None))

    @invariant()
    def writer_agrees(self) -> None:
        """The writer's own ledger says what the model remembers, after every step."""
        self.check(self.draft.ledger)

    def teardown(self) -> None:
        """Read from its start, the file has no faults, holds each source's bytes once, and recovers to the same."""
        data = bytes(self.draft.data)
        ledger = replay(data)
        self.check(ledger)
        assert snapshot(ledger) == snapshot(recover_bytes(data).ledger) == snapshot(self.draft.ledger)
        content: dict[tuple[int, int], dict[int, int]] = {}
        for frame in PacketDecoder().feed(data):
            h = frame.header
            if h.type in (FrameType.LINES, FrameType.PACKETS):
                held = content.setdefault((h.source_id, h.generation), {})
                for at, byte in enumerate(frame.content(), h.source_off):
                    assert at not in held
                    held[at] = byte
        for n, source in enumerate(self.model.sources):
            held = content.get((n, source.generation), {})
            assert held == {at: byte for at, byte in enumerate(source.content) if byte is not None}


TestHistory = pytest.mark.slow(History.TestCase)
TestHistory.settings = settings(deadline=None, max_examples=80, stateful_step_count=30)
