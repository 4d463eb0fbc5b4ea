"""Segments: closed where they are due, gone on from alone, read as one file, packed and removed."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.errors import BusyResourceError, PacketError
from offload.files import rolling, series
from offload.files.append import sync_folder
from offload.files.descriptor import lock
from offload.files.frame_source import FrameSource
from offload.files.keeper import Keeper
from offload.files.packet_file import PacketFile, Piece
from offload.files.packet_stream import PacketReader, PacketWriter
from offload.files.seekable import BLOCK, Packed, pack
from offload.files.segments import Segments
from offload.files.series import next_path, sealed_segments, segment_path
from offload.merge import seek
from offload.merge.audit import verify
from offload.merge.engine import Merge
from offload.merge.pick import Picker, Wanted
from offload.merge.repair import repair
from offload.merge.split import split, stat
from offload.packets.codec import Frame, SourceInfo
from offload.packets.format import Compression, Flag, FrameType
from offload.packets.restate import HISTORY
from offload.packets.sealed import SealInfo, unpack_index

SMALL = Segments(max_bytes=2000)


def about(path: bytes = b"/log", inode: int = 1, start: int = 0) -> SourceInfo:
    return SourceInfo(7, inode, 0, start, Compression.NONE, path)


def put(file: PacketFile, *lines: bytes, path: bytes = b"/log") -> None:
    """Append these, a frame each, in one batch."""
    state = file.source_named(path)
    source_id = file.open_source(about(path)) if state is None else state.source_id
    state = file.ledger.sources[source_id]
    at, pieces = state.resume_off, []
    for line in lines:
        pieces.append(Piece(source_id, line, at, line.count(b"\n")))
        at += len(line)
    file.append(pieces)


def filled(path: Path, count: int = 20, segments: Segments | None = SMALL) -> None:
    """Batches of a line of 500 bytes each, so that a few fill a segment."""
    file = PacketFile(path, segments=segments)
    for number in range(count):
        put(file, numbered(number))
    file.close()


def numbered(number: int) -> bytes:
    return b"%0499d\n" % number


def lines_of(path: Path, **wanted: object) -> list[bytes]:
    with FrameSource(path) as frames:
        picker = Picker(frames, Wanted(**wanted))  # type: ignore[arg-type]
        found = []
        while (batch := picker.read()) is not None:
            found += [line for lines in batch for line in lines.each()]
        return found + [line for lines in picker.close() for line in lines.each()]


def frames_of(path: Path, *, alone: bool = False) -> list[Frame]:
    with FrameSource(path, alone=alone) as source:
        return list(source)


def content(frames: list[Frame]) -> bytes:
    return b"".join(frame.content() for frame in frames if frame.header.type is FrameType.LINES)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pack_all(live: Path) -> None:
    for path in sealed_segments(live).values():
        target = path.with_name(path.name + ".zst")
        for _ in pack(path, target, path.with_name("part")):
            pass


# --- one after the other --------------------------------------------------------------------------------------------


def test_a_segment_is_closed_before_it_would_grow_over_its_size(tmp_path: Path) -> None:
    """Each segment but the live one is at most `max_bytes` with its frames of content, and ends in a SEAL."""
    live = tmp_path / "m.opk"
    filled(live)
    sealed = sealed_segments(live)
    assert list(sealed) == list(range(len(sealed)))
    assert len(sealed) > 4
    for number, path in sealed.items():
        frames = frames_of(path)
        assert frames[-1].header.type is FrameType.SEAL
        assert max(f.end for f in frames if f.header.type is FrameType.LINES) <= 2000
        assert any(f.header.type is FrameType.LINES for f in frames), number
    found = verify(live)
    assert found.faults == []
    assert found.segments == [*(path.name for path in sealed.values()), "m.opk"]
    assert lines_of(live) == [numbered(n) for n in range(20)]


def test_no_descriptor_for_the_next_segment(tmp_path: Path, descriptors: Any) -> None:
    """Others have all that there are: it is waited for as for room, and the next segment is the next one."""
    live = tmp_path / "m.opk"
    said: list[int | None] = []

    def full(error: OSError | None) -> bool:
        said.append(None if error is None else error.errno)
        if error is not None:
            descriptors.give(1)
        return True

    descriptors.limit(20)
    file = PacketFile(live, segments=SMALL, full=full)
    put(file, numbered(0))
    descriptors.take_all()
    for number in range(1, 20):
        put(file, numbered(number))
    file.close()
    descriptors.give()
    assert said == [errno.EMFILE, None] * 2, "for the next file, and for the folder; then the last one's is free"
    assert len(sealed_segments(live)) > 4
    assert lines_of(live) == [numbered(number) for number in range(20)]


def test_a_seal_says_what_is_in_its_segment(tmp_path: Path) -> None:
    """Lines, the time of the first frame, the chain, and an INDEX that leads to COMMITs."""
    live = tmp_path / "m.opk"
    filled(live)
    frames = frames_of(segment_path(live, 1))
    seal = SealInfo.unpack(frames[-1])
    assert seal.lines == sum(f.header.count for f in frames)
    assert seal.begun_ns == frames[0].header.time_ns
    (index,) = [f for f in frames if f.offset == seal.index_at]
    commits = {f.offset: f.header.time_ns for f in frames if f.header.type is FrameType.COMMIT}
    places = unpack_index(index)
    assert places
    assert all(commits[place.offset] == place.time_ns for place in places)


def test_the_live_segment_alone_is_enough_to_go_on(tmp_path: Path) -> None:
    """With all others gone, each source goes on at its line and byte, in its generation, with its head and guard."""
    live = tmp_path / "m.opk"
    file = PacketFile(live, segments=SMALL)
    put(file, b"begun\n")
    file.open_source(about(inode=2), 0)
    put(file, *(numbered(n) for n in range(9)))
    put(file, b"other\n", path=b"/other")
    file.close()
    with FrameSource(live) as source:
        before = source.series.recover().ledger
    for path in sealed_segments(live).values():
        path.unlink()
    file = PacketFile(live, segments=SMALL)
    state, other = file.ledger.sources.values()
    assert (state.generation, state.next_seq, state.resume_off) == (1, 10, 4500)
    assert state.head_len == 1024
    assert state.entry() == before.sources[0].entry()
    assert (other.next_seq, other.resume_off) == (1, 6)
    (former,) = file.generations(state)
    assert (former[0].inode, former[1].resume_off, former[1].next_seq) == (1, 6, 1)
    put(file, b"more\n")
    file.close()
    found = verify(live)
    assert found.faults == []
    assert found.gone == before.info.segment if before.info else False


def test_known_generations_go_on_from_segment_to_segment_and_are_bounded(tmp_path: Path) -> None:
    """Of a source that was rotated often, the newest HISTORY generations are known in each segment, and no more."""
    live = tmp_path / "m.opk"
    file = PacketFile(live, segments=Segments(max_bytes=40_000))
    for inode in range(HISTORY + 40):
        if inode:
            file.open_source(about(inode=inode), 0)
        put(file, numbered(inode))
    for number in range(200):
        put(file, numbered(number))
    assert file.segment > 1
    known = [info.inode for info, _ in file.generations(file.ledger.sources[0])]
    assert known == list(range(HISTORY + 38, 38, -1))[: len(known)]
    assert len(known) == HISTORY
    file.close()
    assert verify(live).faults == []
    for path in sealed_segments(live).values():
        path.unlink()
    file = PacketFile(live)
    assert [info.inode for info, _ in file.generations(file.ledger.sources[0])] == known
    file.close()


def test_a_line_in_pieces_goes_on_in_the_next_segment(tmp_path: Path) -> None:
    """Pieces of one line in several segments are one line; without the first of them, no line is made up."""
    live = tmp_path / "m.opk"
    file = PacketFile(live, segments=SMALL)
    put(file, b"whole\n")
    at = 6
    for number in range(6):
        flags = Flag.FIRST if number == 0 else Flag.LAST if number == 5 else Flag.MIDDLE
        data = b"%d" % number * 900 + (b"\n" if number == 5 else b"")
        file.append([Piece(0, data, at, number == 5, flags)])
        at += len(data)
    put(file, b"after\n")
    file.close()
    assert len(sealed_segments(live)) >= 2
    assert verify(live).faults == []
    assert lines_of(live) == [b"whole\n", b"".join(b"%d" % n * 900 for n in range(6)) + b"\n", b"after\n"]
    segment_path(live, 0).unlink()
    assert lines_of(live) == [b"after\n"]


def test_age_closes_a_segment_that_holds_something(tmp_path: Path) -> None:
    """Older than `max_age`, it is closed at the next tick; one that only states its sources again is not."""
    now = [10**18]
    live = tmp_path / "m.opk"
    file = PacketFile(live, segments=Segments(max_age=60), clock=lambda: now[0])
    put(file, b"a\n")
    now[0] += 59 * 10**9
    file.tick()
    assert (file.segment, file.due_in()) == (0, 1.0)
    now[0] += 10**9
    file.tick()
    assert (file.segment, file.due_in()) == (1, None)
    now[0] += 3600 * 10**9
    file.tick()
    assert file.segment == 1
    put(file, b"b\n")
    assert file.segment == 1, "what it holds is newer than it is itself"
    file.tick()
    assert file.segment == 2
    file.close()
    assert lines_of(live) == [b"a\n", b"b\n"]


async def test_an_idle_writer_closes_what_has_become_too_old(tmp_path: Path) -> None:
    """Nothing more needs to be written for that."""
    closed = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with PacketWriter(tmp_path / "m.opk", segments=Segments(max_age=0.05)) as writer:
        real = writer._sealed

        def sealed(number: int) -> None:
            real(number)
            loop.call_soon_threadsafe(closed.set)

        await writer.use(lambda file: setattr(file, "_on_sealed", sealed))
        await writer.write("a line\n")
        await asyncio.wait_for(closed.wait(), 30)
    assert names(tmp_path) == ["m.000000.opk", "m.opk"]


def test_the_rights_of_the_file_go_on(tmp_path: Path) -> None:
    """The next segment may be read by whoever might read the one before."""
    live = tmp_path / "m.opk"
    PacketFile(live).close()
    live.chmod(0o640)
    filled(live)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_a_link_to_the_packet_file_stays_one(tmp_path: Path) -> None:
    """Segments stand beside the file that a link leads to, and are read by the link's name too."""
    (tmp_path / "far").mkdir()
    link = tmp_path / "m.opk"
    link.symlink_to(tmp_path / "far" / "real.opk")
    filled(link)
    assert link.is_symlink()
    assert "real.000000.opk" in names(tmp_path / "far")
    assert lines_of(link) == [numbered(n) for n in range(20)]


# --- ended anywhere -------------------------------------------------------------------------------------------------


class Ended(BaseException):
    """As a kill: nothing behind it runs but what lets go of descriptors."""


STEPS = ["begin_next", "link", "first folder", "replace", "second folder"]


def ending_at(step: str) -> Callable[[], None]:
    """Have the next roll end before this step; returns what takes that back."""
    folders = iter(("first folder", "second folder"))

    def guard(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            if step == (next(folders, "") if name == "folder" else name):
                raise Ended(step)
            return real(*args)

        return call

    patch = pytest.MonkeyPatch()
    if step == "begin_next":
        from offload.files import packet_file

        patch.setattr(packet_file, "begin_next", guard("begin_next", rolling.begin_next))
    patch.setattr(rolling, "sync_folder", guard("folder", sync_folder))
    patch.setattr(os, "link", guard("link", os.link))
    patch.setattr(os, "replace", guard("replace", os.replace))
    return patch.undo


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("step", STEPS)
def test_a_roll_that_was_ended_is_finished_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, links: bool
) -> None:
    """Whatever was done of it, with or without hard links, each line is there once, and nothing is left over."""
    live = tmp_path / "m.opk"
    if not links:

        def refused(*args: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refused)
    file = PacketFile(live, segments=SMALL)
    done = 0
    put(file, numbered(0))
    undo = ending_at(step)
    try:
        for done in range(1, 10):
            put(file, numbered(done))
    except Ended:
        pass
    finally:
        undo()
        file.close(broken=True)
    assert done < 9, "there was no roll to end"
    # The piece that was due is not in the file: its source has it.
    found = lines_of(live) if live.exists() or sealed_segments(live) else []
    assert found == [numbered(n) for n in range(done)]
    file = PacketFile(live, segments=SMALL)
    assert file.segment == 1
    assert file.ledger.sources[0].next_seq == done
    for number in range(done, 12):
        put(file, numbered(number))
    file.close()
    assert lines_of(live) == [numbered(n) for n in range(12)]
    assert verify(live).faults == []
    assert not next_path(live).exists()


def test_a_second_writer_is_refused_between_any_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step of a roll somebody else who opens the file is told that it is busy, with and without links."""
    live = tmp_path / "m.opk"
    refusals = 0

    def look() -> None:
        nonlocal refusals
        with pytest.raises(BusyResourceError):
            PacketFile(live)
        refusals += 1

    def watched(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            look()
            done = real(*args)
            look()
            return done

        return call

    for links in (True, False):
        patch = pytest.MonkeyPatch()
        file = PacketFile(live, segments=SMALL)
        patch.setattr(os, "replace", watched(os.replace))
        patch.setattr(rolling, "sync_folder", watched(sync_folder))
        if links:
            patch.setattr(os, "link", watched(os.link))
        else:

            def refused(*args: object) -> None:
                raise OSError(errno.EPERM, "no links here")

            patch.setattr(os, "link", refused)
        try:
            for number in range(6):
                put(file, numbered(number))
            look()
        finally:
            patch.undo()
            file.close()
    assert refusals > 20
    assert verify(live).faults == []


def test_who_waited_for_a_file_that_was_closed_opens_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on what has lost the name meanwhile is not taken for the file's."""
    live = tmp_path / "m.opk"
    file = PacketFile(live, segments=SMALL)
    put(file, numbered(0))

    def wait(fd: int, path: Path) -> None:
        if path == live:
            monkeypatch.setattr(rolling, "lock", lock)
            for number in range(1, 6):
                put(file, numbered(number))  # it is another file from here on
            file.close()
        lock(fd, path)

    monkeypatch.setattr(rolling, "lock", wait)
    second = PacketFile(live, segments=SMALL)
    assert second.segment >= 1
    put(second, numbered(6))
    second.close()
    assert lines_of(live) == [numbered(n) for n in range(7)]
    assert verify(live).faults == []


def test_without_the_live_file_the_newest_segment_goes_on(tmp_path: Path) -> None:
    """Somebody removed it: nothing that a segment holds comes twice."""
    live = tmp_path / "m.opk"
    filled(live)
    kept = content([f for path in sealed_segments(live).values() for f in frames_of(path)])
    live.unlink()
    file = PacketFile(live, segments=SMALL)
    assert file.ledger.sources[0].resume_off == len(kept)
    put(file, b"more\n")
    file.close()
    assert verify(live).faults == []
    assert b"".join(lines_of(live)) == kept + b"more\n"


def test_another_file_of_a_segments_name_is_told_and_kept(tmp_path: Path) -> None:
    """It is not overwritten; the next run tries again."""
    live = tmp_path / "m.opk"
    segment_path(live, 0).write_bytes(b"mine")
    file = PacketFile(live, segments=SMALL)
    for number in range(3):
        put(file, numbered(number))
    with pytest.raises(FileExistsError, match="is there already"):
        put(file, numbered(3))
    file.close(broken=True)
    with pytest.raises(FileExistsError, match="is there already"):
        PacketFile(live)
    assert segment_path(live, 0).read_bytes() == b"mine"
    live.rename(tmp_path / "away")
    PacketFile(live).close()
    assert segment_path(live, 0).read_bytes() == b"mine", "nor is it taken for the newest segment"
    live.unlink()
    (tmp_path / "away").rename(live)
    segment_path(live, 0).unlink()
    PacketFile(live).close()
    assert verify(live).faults == []


# --- readers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_all_segments_are_read_as_one_file_and_each_alone(tmp_path: Path, packed: bool) -> None:
    """By the live name all lines, sources and bytes; by a segment's name its own."""
    live = tmp_path / "m.opk"
    filled(live)
    middle = [line for f in frames_of(segment_path(live, 2)) for line in f.packets()]
    if packed:
        pack_all(live)
    alone = sealed_segments(live)[2]
    assert lines_of(live) == [numbered(n) for n in range(20)]
    assert lines_of(live, tail=7) == [numbered(n) for n in range(13, 20)]
    assert lines_of(alone) == middle
    report = stat(live)
    assert (report.lines, report.bytes) == (20, 10_000)
    done = split(live, tmp_path / "back")
    assert not done.incomplete
    assert [p.read_bytes() for p in done.written] == [b"".join(numbered(n) for n in range(20))]
    assert verify(live).faults == []
    assert verify(alone).faults == []


def test_what_retention_removed_is_no_fault_and_what_is_missing_between_is(tmp_path: Path) -> None:
    """The oldest may go; a hole in the numbers is told with its neighbours' names; `split` says what it lacks."""
    live = tmp_path / "m.opk"
    filled(live)
    segment_path(live, 0).unlink()
    segment_path(live, 1).unlink()
    found = verify(live)
    assert (found.faults, found.gone, found.lost) == ([], 2, [])
    (why,) = split(live, tmp_path / "back").incomplete.values()
    assert why.startswith("begins at its byte")
    segment_path(live, 3).unlink()
    faults = [fault for _, fault in verify(live).faults]
    assert faults == ["segment 3 is missing between m.000002.opk and m.000004.opk"]


def test_what_retention_removes_while_a_reader_begins_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest may go between the look at the folder and the look at them, also when some were looked at."""
    live = tmp_path / "m.opk"
    filled(live)
    looked = series._sealed_size

    def removing(path: Path) -> int:
        size = looked(path)
        if path == segment_path(live, 0):
            segment_path(live, 0).unlink()
            segment_path(live, 1).unlink()
        return size

    monkeypatch.setattr(series, "_sealed_size", removing)
    assert verify(live).gone == 2
    found = sealed_segments(live)
    monkeypatch.setattr(series, "sealed_segments", lambda path: found)
    segment_path(live, 3).unlink()
    with pytest.raises(FileNotFoundError, match="this segment is gone, as retention does"):
        FrameSource(live)


def test_segments_of_two_files_do_not_pass_for_one(tmp_path: Path) -> None:
    """A segment that was put in another's place is told by its file, and by what it states."""
    filled(tmp_path / "a.opk")
    filled(tmp_path / "b.opk", 12)
    shutil.copyfile(tmp_path / "b.000001.opk", tmp_path / "a.000001.opk")
    faults = " ".join(fault for _, fault in verify(tmp_path / "a.opk").faults)
    assert "is of another packet file than the segment before" in faults
    assert "names the chain" in faults


def test_an_anchor_of_an_earlier_segment_holds(tmp_path: Path) -> None:
    """The chain goes on over segments, also over packed ones; a byte that changes breaks it."""
    live = tmp_path / "m.opk"
    filled(live, 5)
    anchor = bytes.fromhex(verify(live).chain)
    filled(live, 20)
    found = verify(live, anchor=anchor)
    assert found.anchor is not None
    assert found.anchor.lines == 5
    pack_all(live)
    assert verify(live, anchor=anchor).anchor == found.anchor


def test_damage_is_told_with_its_segment(tmp_path: Path) -> None:
    """Where a byte is wrong is said by the segment's name and the byte in it, by `verify` and by an error."""
    live = tmp_path / "m.opk"
    filled(live)
    path = segment_path(live, 2)
    (place, *_) = [f.offset for f in frames_of(path) if f.header.type is FrameType.LINES]
    data = bytearray(path.read_bytes())
    data[place + 100] ^= 1
    path.write_bytes(data)
    found = verify(live)
    assert (path.name, place) in [found.where(offset) for offset, _ in found.faults]
    with pytest.raises(PacketError, match=rf"byte {place}: \(of m.000002.opk\) payload checksum"):
        lines_of(live)
    mended = tmp_path / "mended.opk"
    done = repair(path, mended)
    assert len(done.gaps) == 1
    assert verify(mended).faults == []


async def test_following_goes_on_across_segments(tmp_path: Path) -> None:
    """A follower that is slow, while segments are closed, packed and renamed, gets each line once and in order."""
    live = tmp_path / "m.opk"
    found: list[bytes] = []
    segments = Segments(max_bytes=3000, compress=True)
    async with asyncio.timeout(60) as patience, PacketWriter(live, segments=segments) as writer:
        await writer.write(numbered(0))
        await writer.flush()
        async with PacketReader(live, follow=True, poll=0.001) as reader:
            number = 1
            async for frame in reader:
                found += frame.packets()
                patience.reschedule(asyncio.get_running_loop().time() + 60)  # only what stands still hangs
                for _ in range(3):
                    if number < 200:
                        await writer.write(numbered(number))
                        await writer.flush()
                        number += 1
                if len(found) == 200:
                    break
    assert found == [numbered(n) for n in range(200)]
    assert len(sealed_segments(live)) > 20


def test_a_follower_that_was_far_behind_reads_all_of_them(tmp_path: Path) -> None:
    """It had the first segment open; meanwhile ten came, packed; it reads each to its end."""
    live = tmp_path / "m.opk"
    filled(live, 1, None)
    with FrameSource(live, follow=True) as frames:
        filled(live, 40)
        pack_all(live)
        found: list[bytes] = []
        while (batch := frames.read()) is not None:
            found += [line for frame in batch for line in frame.packets()]
    assert found == [numbered(0), *(numbered(n) for n in range(40))]


@pytest.mark.parametrize(("size", "step"), [(2000, 1 << 20), (20_000, 0), (20_000, 3000), (20_000, 1 << 20)])
def test_a_time_is_found_in_the_right_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, step: int
) -> None:
    """`since` gives what came then or later, packed or not, however much the INDEX has; few segments are opened."""
    monkeypatch.setattr(rolling, "INDEX_STEP", step)
    monkeypatch.setattr(seek, "_NEAR", 0)
    live = tmp_path / "m.opk"
    now = [10**18]
    file = PacketFile(live, segments=Segments(max_bytes=size), clock=lambda: now[0])
    for number in range(60):
        now[0] += 3600 * 10**9
        put(file, numbered(number))
        file.commit()
    file.close()
    for packed in (False, True):
        if packed:
            pack_all(live)
        for first in (0, 1, 7, 30, 58, 59):
            since = 10**18 + (first + 1) * 3600 * 10**9
            assert lines_of(live, since=since) == [numbered(n) for n in range(first, 60)], first
            with FrameSource(live) as frames:
                begin = seek.begin_in_series(frames.series, since)
                frames.seek(begin)
                early = next(f for f in frames if f.header.type is FrameType.LINES)
                assert early.packets() in ([numbered(first - 1)], [numbered(first)]), "much more than was wanted"
        with FrameSource(live) as frames:
            Picker(frames, Wanted(since=10**18 + 31 * 3600 * 10**9))
            assert len(frames.series._open) <= 6


# --- packed and removed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 12345])
def test_a_packed_file_gives_any_byte(tmp_path: Path, size: int) -> None:
    """Whatever its size, places at and around borders of frames are what they were."""
    plain, target = tmp_path / "a", tmp_path / "a.zst"
    data = (b"%d " * 1000 % tuple(range(1000)) * (size // 3000 + 1))[:size]
    plain.write_bytes(data)
    os.utime(plain, ns=(1, 2))
    for _ in pack(plain, target, tmp_path / "part"):
        pass
    assert names(tmp_path) == ["a.zst"]
    assert target.stat().st_mtime_ns == 2
    packed = Packed(target)
    assert packed.size() == size
    for at in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 7, size - 1, size, size + 5):
        if at >= 0:
            assert packed.read_at(at, 100) == data[at : at + 100]
    assert packed.read_at(0, size + 1) == data
    packed.close()


def test_a_packed_segment_is_zstd_for_everybody(tmp_path: Path) -> None:
    """The package's stream reader, which knows no tables, and so `zstdcat`, unpacks what was packed."""
    import zstandard

    live = tmp_path / "m.opk"
    filled(live)
    plain = segment_path(live, 0).read_bytes()
    pack_all(live)
    with open(sealed_segments(live)[0], "rb") as file:
        found = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read()
    assert found == plain
    if shutil.which("zstd"):
        done = subprocess.run(["zstd", "-dc", sealed_segments(live)[0]], capture_output=True, check=True)
        assert done.stdout == plain


@pytest.mark.parametrize("at", [0, 5, -1, -4, -6, -9, -13, -18])
def test_a_damaged_packed_segment_is_an_error(tmp_path: Path, at: int) -> None:
    """Whatever byte of it is another, bytes that were never written are not given."""
    live = tmp_path / "m.opk"
    filled(live)
    plain = segment_path(live, 0).read_bytes()
    pack_all(live)
    path = sealed_segments(live)[0]
    data = bytearray(path.read_bytes())
    data[at] ^= 0x41
    path.write_bytes(data)
    try:
        packed = Packed(path)
        found = packed.read_at(0, packed.size())
        packed.close()
    except OSError:
        return
    assert found == plain


def test_any_bytes_for_a_packed_segment_are_an_error(tmp_path: Path) -> None:
    """A file of that name that is something else is told as such, not read."""
    path = tmp_path / "m.000000.opk.zst"
    for data in (b"", b"x" * 5, b"x" * 500, b"\xb1\xea\x92\x8f" * 9):
        path.write_bytes(data)
        with pytest.raises(OSError, match="whole table"):
            Packed(path)


def test_packing_that_was_ended_is_done_again(tmp_path: Path) -> None:
    """Left in the midst, or with both there: the next start leaves one of each, and nothing else."""
    live = tmp_path / "m.opk"
    filled(live)
    expected = [path.read_bytes() for path in sealed_segments(live).values()]
    part = tmp_path / ".m.000000.opk.zst.part"
    part.write_bytes(b"half")
    first = segment_path(live, 1)
    kept = first.read_bytes()
    for _ in pack(first, first.with_name(first.name + ".zst"), part):
        pass
    first.write_bytes(kept)
    keeper = Keeper(live, Segments(compress=True), len(expected) - 1, at_close=math.inf)
    keeper.start()
    keeper.close()
    assert names(tmp_path) == [*(f"m.{n:06}.opk.zst" for n in range(len(expected))), "m.opk"]
    for path, data in zip(sealed_segments(live).values(), expected, strict=True):
        packed = Packed(path)
        assert packed.read_at(0, packed.size()) == data
        packed.close()


def test_closing_packs_what_is_under_way_and_no_more_than_there_is_time_for(tmp_path: Path) -> None:
    """A program that ends gets on by a segment at least, however short it ran."""
    live = tmp_path / "m.opk"
    filled(live)
    count = len(sealed_segments(live))
    for done in (1, 2):
        keeper = Keeper(live, Segments(compress=True), count - 1, at_close=0)
        keeper.start()
        keeper.close()
        assert sum(path.suffix == ".zst" for path in sealed_segments(live).values()) >= done


def test_what_cannot_be_packed_stays_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder in the way of one segment: the others are packed, and a warning names this one."""
    live = tmp_path / "m.opk"
    filled(live)
    count = len(sealed_segments(live))
    (tmp_path / "m.000001.opk.zst").mkdir()
    keeper = Keeper(live, Segments(compress=True), count - 1, at_close=math.inf)
    keeper.start()
    keeper.close()
    assert segment_path(live, 1).exists()
    assert sum(path.suffix == ".zst" for path in sealed_segments(live).values()) == count - 1
    assert "m.000001.opk could not be packed, and stays as it is" in caplog.text
    assert lines_of(live) == [numbered(n) for n in range(20)]


def kept_by(live: Path, upto: int, **limits: float) -> list[int]:
    keeper = Keeper(live, Segments(**limits), upto)  # type: ignore[arg-type]
    keeper.start()
    keeper.close()
    return list(sealed_segments(live))


def test_the_oldest_are_removed_by_size(tmp_path: Path) -> None:
    """As many go as are over `keep_bytes`, and the live one never, however large it is."""
    live = tmp_path / "m.opk"
    filled(live)
    sizes = {number: path.stat().st_size for number, path in sealed_segments(live).items()}
    last = max(sizes)
    assert kept_by(live, last, keep_bytes=sum(sizes.values())) == list(sizes)
    assert kept_by(live, last, keep_bytes=sizes[last] + sizes[last - 1]) == [last - 1, last]
    assert kept_by(live, last - 1, keep_bytes=1) == [last], "the newest is not known to be closed"
    assert kept_by(live, last, keep_bytes=1) == []
    assert live.exists()
    assert verify(live).faults == []
    PacketFile(live, segments=SMALL).close()


def test_the_oldest_are_removed_by_age(tmp_path: Path) -> None:
    """What was sealed longer ago than `keep_age` goes, packed or not."""
    live = tmp_path / "m.opk"
    filled(live)
    last = max(sealed_segments(live))
    for number in (0, 1, 3):
        os.utime(segment_path(live, number), (0, 0))
    assert kept_by(live, last, keep_age=3600) == list(range(2, last + 1)), "3 stays: 2 is before it"


async def test_age_is_looked_at_while_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle writer removes a segment once it has become too old."""
    live = tmp_path / "m.opk"
    removed = asyncio.Event()
    loop, real = asyncio.get_running_loop(), os.unlink

    def unlink(path: str | os.PathLike[str]) -> None:
        real(path)
        if path == segment_path(live, 0):
            loop.call_soon_threadsafe(removed.set)

    monkeypatch.setattr(os, "unlink", unlink)
    async with PacketWriter(live, segments=Segments(max_bytes=600, keep_age=0.3)) as writer:
        for number in range(2):
            await writer.write(numbered(number))
            await writer.flush()
        await asyncio.wait_for(removed.wait(), 30)
    assert sealed_segments(live) == {}


async def test_without_the_package_packing_is_refused_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install, and nothing was made."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"pip install 'offload\[zstd\]'"):
        async with PacketWriter(tmp_path / "m.opk", segments=Segments(compress=True)):
            pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["max_bytes", "max_age", "keep_bytes", "keep_age"])
def test_limits_are_over_zero(name: str) -> None:
    """A limit of nothing is a mistake, told at once."""
    with pytest.raises(ValueError, match=f"{name} is 0, expected more than 0"):
        Segments(**{name: 0})  # type: ignore[arg-type]


# --- the merge ------------------------------------------------------------------------------------------------------


async def merged(folder: Path, live: Path, segments: Segments | None) -> None:
    async with Merge([str(folder)], live, segments=segments) as merge:
        progress = await merge.run()
    assert not progress.problems


@pytest.mark.parametrize("name", ["m.opk", "m.log", "merged"])
async def test_a_merge_never_reads_its_own_segments(tmp_path: Path, name: str) -> None:
    """Whatever the packet file is called, in the very folder that is merged."""
    (tmp_path / "a.txt").write_bytes(b"".join(numbered(n) for n in range(20)))
    live = tmp_path / name
    for _ in range(3):
        await merged(tmp_path, live, Segments(max_bytes=2000, compress=True))
        with (tmp_path / "a.txt").open("ab") as log:
            log.write(numbered(99))
    with FrameSource(live) as source:
        paths = {state.path for state in source.series.recover().ledger.sources.values()}
    assert paths == {os.fsencode(tmp_path / "a.txt")}


def rotations(folder: Path, count: int) -> Iterator[bytes]:
    """Write to a log and rotate it, again and again, the second one back is packed; gives out what was written."""
    log = folder / "app.log"
    for number in range(count):
        for older in range(number, 0, -1):
            for end in ("", ".gz"):
                old = folder / f"app.log.{older}{end}"
                if old.exists():
                    old.rename(folder / f"app.log.{older + 1}{end}")
        second = folder / "app.log.2"
        if second.exists():
            with gzip.open(f"{second}.gz", "wb") as packed:
                packed.write(second.read_bytes())
            second.unlink()
        if log.exists():
            log.rename(folder / "app.log.1")
        text = b"".join(b"rotation %d line %d %s\n" % (number, n, b"x" * 300) for n in range(9))
        log.write_bytes(text)
        yield text


@pytest.mark.parametrize("pattern", ["app.log", "*"])
async def test_rotated_files_are_known_when_older_segments_are_gone(tmp_path: Path, pattern: str) -> None:
    """With only the live segment left after each run, what app.log.1 … hold is not read again as new."""
    logs, live, written, found = tmp_path / "logs", tmp_path / "m.opk", b"", b""
    logs.mkdir()
    for text in rotations(logs, 6):
        written += text
        async with Merge([str(logs / pattern)], live, segments=Segments(max_bytes=1500)) as merge:
            await merge.run()
        for path in sealed_segments(live).values():
            found += content(frames_of(path))
            path.unlink()
    found += content(frames_of(live, alone=True))
    assert sorted(found.splitlines()) == sorted(written.splitlines())


def offload(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offload", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_the_commands_read_segments(tmp_path: Path) -> None:
    """What they print for several segments is what they print for one file; places are said by segment."""
    live = tmp_path / "m.opk"
    filled(live)
    pack_all(live)
    assert offload("cat", live).stdout == "".join(numbered(n).decode() for n in range(20))
    assert offload("cat", "-n", "3", live).stdout == "".join(numbered(n).decode() for n in range(17, 20))
    assert "\t20\t10,000\t" in offload("stat", live).stdout
    done = offload("verify", live)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"20 lines, 1 source, {len(sealed_segments(live)) + 1} segments" in done.stdout
    sealed_segments(live)[0].unlink()
    assert "1 segment before m.000001.opk.zst is gone, as retention does" in offload("verify", live).stdout
    sealed_segments(live)[2].unlink()
    done = offload("verify", live)
    assert done.returncode == 1
    fault = "byte 0: segment 2 is missing between m.000001.opk.zst and m.000003.opk.zst"
    assert f"m.000003.opk.zst: {fault}" in done.stdout
    assert json.loads(offload("verify", "--json", live).stdout)["faults"][0]["segment"] == "m.000003.opk.zst"
    path = sealed_segments(live)[4]
    path.write_bytes(path.read_bytes()[:-1])
    done = offload("cat", live)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "m.000004.opk.zst" in done.stderr
