"""A log that lost its end (its machine lost power) and went on: what was read of it is kept, and comes once.

Real files, real merges. The expected bytes are worked out here from all that the log ever held, byte by byte.
"""

# ruff: noqa: ASYNC240 - these files are small, and the loop has nothing else to do

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.errors import PacketError
from offload.files import series, succession
from offload.files.contents import open_contents
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.files.segments import Segments
from offload.merge import engine as engine_module
from offload.merge import shorter
from offload.merge.audit import verify
from offload.merge.by_time import ByTime
from offload.merge.engine import Merge, Progress
from offload.merge.repair import repair
from offload.merge.split import split, stat
from offload.net import wire
from offload.packets.codec import SourceInfo
from offload.packets.format import HEAD_BYTES, HOLE_STRUCT, NONE_U64, Compression, Flag, FrameType

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inodes, inotify")

AMPLE = 60.0
NEW = b"written after the power came back\n"


def lines(count: int, first: int = 0, size: int = 40) -> bytes:
    return b"".join(b"%d %s\n" % (number, b"x" * (number % size)) for number in range(first, first + count))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs" / "app.log"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged.opk"


async def merge(out: Path, *paths: Path, **options: Any) -> Progress:
    async with Merge([str(path) for path in paths], out, **options) as engine, asyncio.timeout(AMPLE):
        return await engine.run()


async def until_read(engine: Merge) -> None:
    while not engine.progress.lines or not engine.progress.caught_up:  # noqa: ASYNC110 - kept by another thread
        await asyncio.sleep(0.002)
    await engine.caught_up()


def add(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def held(out: Path) -> list[tuple[int, bytes]]:
    """Of the file's only source: where each generation begins, and its bytes. Every checksum must hold."""
    found = verify(out)
    assert found.faults == []
    assert found.complete
    generations: list[tuple[int, bytes]] = []
    with FrameSource(out) as source:
        for frame in source:
            header = frame.header
            if header.type is FrameType.SOURCE and not header.flags & Flag.RESTATED:
                generations.append((header.source_off, b""))
            elif header.type is FrameType.LINES:
                start, data = generations[-1]
                assert header.source_off == start + len(data)
                generations[-1] = start, data + frame.content() + bytes(frame.hole)
    return generations


def taken_out(out: Path, folder: Path) -> dict[str, bytes]:
    shutil.rmtree(folder, ignore_errors=True)
    done = split(out, folder)
    assert done.incomplete == {}
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- once -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [HEAD_BYTES, 5_000, 70_000, 899_990, 900_000])
@pytest.mark.parametrize("more", [1, 30_000], ids=["shorter than before", "longer than before"])
async def test_what_is_left_of_it_is_not_given_again(log: Path, out: Path, tmp_path: Path, cut: int, more: int) -> None:
    """It lost its end and its program wrote on: what is new comes, from the line on that it begins in."""
    before = lines(40_000)[:900_001]
    log.write_bytes(before)
    await merge(out, log)
    os.truncate(log, cut)
    add(log, NEW * more)
    for run in range(3):
        progress = await merge(out, log)
        assert (progress.regressions, progress.gaps) == (run == 0, 0)
    start = before.rfind(b"\n", 0, cut) + 1
    assert held(out) == [(0, before), (start, before[start:cut] + NEW * more)]
    assert taken_out(out, tmp_path / "taken") == {"app.log.gen0": before, "app.log": before[:cut] + NEW * more}
    (gap,) = verify(out).regressions
    assert gap[1:] == (len(before), len(before), "regression", None, 0)
    assert [source.gaps for source in stat(out).sources] == [0]


@pytest.mark.parametrize("cut", [1, 30, 5_000, 899_990])
async def test_with_nothing_new_it_goes_on_at_its_end(log: Path, out: Path, tmp_path: Path, cut: int) -> None:
    """It was merged before its program wrote on: nothing comes then, and later what stands behind its end."""
    before = lines(40_000)[:900_001]
    log.write_bytes(before)
    await merge(out, log)
    cut = before.rfind(b"\n", 0, cut) + 1 or 3
    os.truncate(log, cut)
    for _ in range(2):
        assert (await merge(out, log)).lines == 0
    assert held(out) == [(0, before), (cut, b"")]
    add(log, NEW)
    await merge(out, log)
    assert held(out) == [(0, before), (cut, NEW)]
    assert taken_out(out, tmp_path / "taken") == {"app.log.gen0": before, "app.log": before[:cut] + NEW}


@pytest.mark.parametrize("cut", [5_000, 899_990])
async def test_with_nothing_new_inside_a_line_it_waits(log: Path, out: Path, cut: int) -> None:
    """The rest of a line may be the beginning of a new one that begins alike: it is not torn, and not given twice."""
    before = lines(40_000)[:900_001]
    log.write_bytes(before)
    await merge(out, log)
    start = before.rfind(b"\n", 0, cut) + 1
    os.truncate(log, start)
    add(log, before[start : start + 2])  # of a new line, as the old one there began
    for _ in range(2):
        progress = await merge(out, log)
        assert (progress.lines, progress.gaps, progress.regressions) == (0, 0, 0)
    assert held(out) == [(0, before)]
    add(log, b" is new\n")
    await merge(out, log)
    assert held(out) == [(0, before), (start, log.read_bytes()[start:])]


async def test_it_loses_its_end_again_and_again(log: Path, out: Path, tmp_path: Path) -> None:
    """Each time; also further back than where the last generation began."""
    log.write_bytes(lines(1000))
    await merge(out, log)
    for number, cut in enumerate((9_000, 9_010, 4_000, 20_000)):
        os.truncate(log, min(cut, log.stat().st_size - 2))
        add(log, b"\n" + lines(500, 10_000 * (number + 1)))
        await merge(out, log)
        assert taken_out(out, tmp_path / "taken")["app.log"] == log.read_bytes()
    assert len(verify(out).regressions) == 4
    with FrameSource(out) as source:
        content = b"".join(frame.content() for frame in source if frame.header.type is FrameType.LINES)
    wanted = Counter(lines(1000).splitlines())
    for number in range(4):
        wanted += Counter(lines(500, 10_000 * (number + 1)).splitlines())
    got = Counter(content.splitlines())
    assert {line: got[line] for line in wanted} == wanted, "each whole line once"


async def test_bytes_that_were_never_read_are_stated(log: Path, out: Path) -> None:
    """It had a line without an end, which the power cut took too: nobody has that, so it is a gap."""
    log.write_bytes(lines(200) + b"a line that has no end")
    async with Merge([str(log)], out, follow=True) as engine, asyncio.timeout(AMPLE):
        running = asyncio.ensure_future(engine.run())
        await until_read(engine)
        running.cancel()
        await asyncio.wait([running])
    os.truncate(log, 2_000)
    add(log, NEW)
    progress = await merge(out, log)
    assert (progress.regressions, progress.gaps) == (1, 1)
    ((source, start, end, reason, *_),) = verify(out).lost
    assert (source, start, end, reason) == ("app.log", len(lines(200)), None, "regression")


@pytest.mark.parametrize("size", [900, 20_000])
async def test_a_log_that_was_written_anew_comes_whole(log: Path, out: Path, size: int) -> None:
    """Less than HEAD_BYTES of it are as they were: every file of this log may begin so."""
    head = lines(100)[:900]
    log.write_bytes((head + lines(5000, 500))[: max(size, 950)])
    await merge(out, log)
    log.write_bytes(head + NEW * 10)
    progress = await merge(out, log)
    assert (progress.regressions, progress.gaps) == (0, 1)
    with FrameSource(out) as source:
        content = b"".join(frame.content() for frame in source if frame.header.type is FrameType.LINES)
    assert content.endswith(head + NEW * 10)


async def test_a_copy_beside_it_tells_that_it_was_rotated(log: Path, out: Path) -> None:
    """copytruncate, and the same lines again at its start: they are new ones."""
    log.write_bytes(lines(500))
    await merge(out, log)
    shutil.copy(log, log.with_name("app.log.1"))
    log.write_bytes(lines(300) + NEW)
    await merge(out, log)
    with FrameSource(out) as source:
        content = b"".join(frame.content() for frame in source if frame.header.type is FrameType.LINES)
    assert content == lines(500) + lines(300) + NEW


async def test_among_others_and_in_segments(tmp_path: Path, out: Path) -> None:
    """What is compared stands in earlier segments, packed or not, between what came from others."""
    logs = tmp_path / "logs"
    logs.mkdir()
    paths = [logs / f"{name}.log" for name in "abc"]
    options: dict[str, Any] = {"segments": Segments(max_bytes=20_000, compress=True)}
    before: dict[Path, bytes] = dict.fromkeys(paths, b"")
    for turn in range(6):
        for path in paths:
            data = b"%s %s" % (path.name.encode(), lines(200, 1000 * turn))
            before[path] += data
            add(path, data)
        await merge(out, logs, **options)
    after: dict[Path, bytes] = {}
    for path, cut in zip(paths, (2_000, 15_000, 22_000), strict=True):
        os.truncate(path, cut)
        add(path, b"\n" + NEW)
        after[path] = path.read_bytes()
    progress = await merge(out, logs, **options)
    assert (progress.regressions, progress.gaps) == (3, 0)
    found = taken_out(out, tmp_path / "taken")
    assert found == {p.name: after[p] for p in paths} | {f"{p.name}.gen0": before[p] for p in paths}


async def test_where_segments_are_gone_it_comes_again(log: Path, out: Path) -> None:
    """What retention has removed cannot be compared: rather doubled than lost."""
    options: dict[str, Any] = {"segments": Segments(max_bytes=20_000, keep_bytes=20_000)}
    for turn in range(6):
        add(log, lines(500, 1000 * turn))
        await merge(out, log, **options)
    os.truncate(log, 3_000)
    add(log, NEW)
    progress = await merge(out, log, **options)
    assert progress.gaps == 1
    with FrameSource(out) as source:
        last = [frame for frame in source if frame.header.type is FrameType.LINES][-1]
    assert last.content().endswith(NEW)


async def test_by_time(log: Path, out: Path) -> None:
    """A merge by time goes on there too."""
    stamps = [b"2026-11-21 10:%02d:%02d line\n" % (i // 60, i % 60) for i in range(600)]
    log.write_bytes(b"".join(stamps))
    await merge(out, log, by_time=ByTime())
    os.truncate(log, 5_000)
    add(log, b"\n2026-11-21 11:00:00 new\n")
    await merge(out, log, by_time=ByTime())
    generations = held(out)
    assert generations[0] == (0, b"".join(stamps))
    assert generations[1][1].endswith(b"\n2026-11-21 11:00:00 new\n")
    assert len(generations[1][1]) < 60


@pytest.mark.parametrize("turns", [1, 4])
async def test_lines_that_came_late_to_another_file_stand_last(
    log: Path, out: Path, tmp_path: Path, turns: int
) -> None:
    """The packet file ends with lines of the rotated file: what is known of the one that has the name counts too."""
    log.write_bytes(lines(100))
    await merge(out, log)
    log.rename(log.with_name("app.log.1"))
    log.write_bytes(lines(100, 1000))
    await merge(out, log)
    for again in range(turns):
        add(log.with_name("app.log.1"), b"late\n")
        await merge(out, log)
        add(log, lines(400 // turns, 1100 + 400 // turns * again))
        await merge(out, log)
    add(log.with_name("app.log.1"), b"late\n")
    await merge(out, log)
    with FrameSource(out) as source:
        last = [frame for frame in source if frame.header.type is FrameType.LINES][-1]
    assert last.content() == b"late\n"
    os.truncate(out, last.end)  # it was killed there
    os.truncate(log, 3_000)
    add(log, b"\n" + NEW)
    for _ in range(2):
        await merge(out, log)
    with FrameSource(out) as source:
        content = b"".join(frame.content() for frame in source if frame.header.type is FrameType.LINES)
    assert Counter(content.splitlines()) >= Counter(lines(500, 1000).splitlines())
    assert max(Counter(line for line in content.splitlines() if line != b"late").values()) == 1
    found = taken_out(out, tmp_path / "taken")
    assert found.pop("app.log") == log.read_bytes()
    assert sorted(found.values()) == sorted([lines(100) + b"late\n" * (turns + 1), lines(500, 1000)])


@pytest.mark.parametrize(("named", "also"), [(True, False), (True, True), (False, True)])
async def test_rotated_when_its_program_began_anew(
    log: Path, out: Path, tmp_path: Path, named: bool, also: bool
) -> None:
    """It lost its end, got some lines, and was renamed before it was merged again."""
    log.write_bytes(lines(500))
    await merge(out, log)
    os.truncate(log, 4_000)
    add(log, b"\n" + NEW)
    old, before = log.with_name("app.log.1"), log.read_bytes()
    log.rename(old)
    if named:
        log.write_bytes(lines(200, 7000))
    for _ in range(2):
        progress = await merge(out, log.with_name("app.log*") if also else log)
        assert progress.gaps == 0
    wanted = {lines(500), before, *([lines(200, 7000)] if named else [])}
    assert set(taken_out(out, tmp_path / "taken").values()) == wanted
    start = lines(500).rfind(b"\n", 0, 4_000) + 1
    generations = [lines(500), before[start:], *([lines(200, 7000)] if named else [])]
    assert [data for _, data in held(out)] == generations


async def test_rotated_too_when_late_lines_stand_last(log: Path, out: Path, tmp_path: Path) -> None:
    """The file that had the name lost its end and the name, and the packet file ends with lines of the one before."""
    old = log.with_name("app.log.1")
    log.write_bytes(lines(100))
    await merge(out, log)
    log.rename(old)
    for turn in range(4):
        add(log, lines(200, 1000 + 200 * turn))
        await merge(out, log)
        add(old, b"late\n")
        await merge(out, log)
    with FrameSource(out) as source:
        last = [frame for frame in source if frame.header.type is FrameType.LINES][-1]
    os.truncate(out, last.end)  # it was killed there
    os.truncate(log, 9_000)
    add(log, b"\n" + NEW)
    before = log.read_bytes()
    log.rename(log.with_name("app.log.2"))
    log.write_bytes(lines(300, 5000))
    for _ in range(2):
        await merge(out, log)
        add(log, NEW)
    with FrameSource(out) as source:
        content = b"".join(frame.content() for frame in source if frame.header.type is FrameType.LINES)
    wanted = Counter((lines(100) + lines(800, 1000) + lines(300, 5000) + NEW + NEW + b"late\n" * 4).splitlines())
    found = Counter(content.splitlines())
    assert wanted - found == Counter(), "lost"
    torn = before[before.rfind(b"\n", 0, 9_000) + 1 : 9_000]
    assert found - wanted <= Counter([torn]), "doubled"


async def test_the_answer_is_of_another_file_by_then(log: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the question and the read it was written anew: the answer does not hold for that."""
    head = lines(100)
    log.write_bytes(head + lines(300, 1000))
    await merge(out, log)
    cut = log.read_bytes().rfind(b"\n", 0, 6_000) + 1
    os.truncate(log, cut)
    asked = shorter.start_of_new
    anew = head + b"".join(b"anew %d\n" % number for number in range(900))

    async def answered(*arguments: Any) -> Any:
        answer = await asked(*arguments)
        if log.stat().st_size == cut:
            log.write_bytes(anew)
        return answer

    monkeypatch.setattr(engine_module, "start_of_new", answered)
    await merge(out, log)
    with FrameSource(out) as source:
        content = b"".join(frame.content() for frame in source if frame.header.type is FrameType.LINES)
    assert content.startswith(head + lines(300, 1000))
    assert content.endswith(anew.removeprefix(head))


# --- while it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [False, True])
async def test_while_it_is_followed(log: Path, out: Path, monkeypatch: pytest.MonkeyPatch, network: bool) -> None:
    """A file server that comes back may have lost the end of what we have open; a local file was truncated."""
    mount = ("/", "nfs4") if network else None
    monkeypatch.setattr(succession, "network_mount", lambda path: mount)
    log.write_bytes(lines(500))
    async with Merge([str(log)], out, follow=True, poll=True) as engine, asyncio.timeout(AMPLE):
        running = asyncio.ensure_future(engine.run())
        await until_read(engine)
        os.truncate(log, 4_000)
        add(log, b"\n" + NEW)
        await engine.caught_up()
        add(log, NEW)
        await engine.caught_up()
        assert (engine.progress.regressions, engine.progress.gaps) == (network, not network)
        engine.stop()
        await running
    if network:
        start = lines(500).rfind(b"\n", 0, 4_000) + 1
        assert held(out) == [(0, lines(500)), (start, log.read_bytes()[start:])]
    else:
        assert len(verify(out).gaps) == 1


async def test_a_file_that_cannot_be_compared_now_is_told_and_waits(
    log: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO while it is compared says nothing of what it holds."""
    log.write_bytes(lines(500))
    await merge(out, log)
    os.truncate(log, 4_000)
    add(log, b"\n" + NEW)

    def refused(path: str) -> Any:
        raise OSError(5, "Input/output error", path)

    with monkeypatch.context() as patch:
        patch.setattr(shorter, "open_contents", refused)
        progress = await merge(out, log)
    assert [exc.errno for exc in progress.problems.values()] == [5]
    assert held(out) == [(0, lines(500))]
    await merge(out, log)
    start = lines(500).rfind(b"\n", 0, 4_000) + 1
    assert held(out) == [(0, lines(500)), (start, log.read_bytes()[start:])]


async def test_killed_anywhere_in_it(log: Path, out: Path, tmp_path: Path) -> None:
    """Each end that a kill may leave, at frames and inside them: the next run makes the same of it."""
    log.write_bytes(lines(300))
    await merge(out, log)
    begun = out.stat().st_size
    os.truncate(log, 3_000)
    add(log, NEW * 3)
    await merge(out, log)
    wanted = [data for _, data in held(out)]
    whole, copy = out.read_bytes(), tmp_path / "copy.opk"
    for end in range(begun, len(whole), 7):
        copy.write_bytes(whole[:end])
        await merge(copy, log)
        assert [data for _, data in held(copy) if data] == wanted


@pytest.mark.parametrize("fsync", ["interval", "none"])
@pytest.mark.parametrize("idle", [False, True])
async def test_killed_before_its_commit_and_its_end_is_lost_again(
    log: Path, out: Path, tmp_path: Path, fsync: Any, idle: bool
) -> None:
    """The generation that began has nothing yet that tells of its file: what is before it in the packet file does."""
    log.write_bytes(lines(300))
    await merge(out, log, fsync=fsync)
    cut = lines(300).rfind(b"\n", 0, 4_000) + 1
    os.truncate(log, cut)
    await merge(out, log, fsync=fsync)
    with FrameSource(out) as source:
        begun = [frame for frame in source if frame.header.type is FrameType.SOURCE][-1]
    os.truncate(out, begun.end)
    if idle:
        await merge(out, log, fsync=fsync)
    os.truncate(log, 3_000)
    add(log, b"\n" + lines(200, 5_000))
    await merge(out, log, fsync=fsync)
    start = lines(300).rfind(b"\n", 0, 3_000) + 1
    assert held(out) == [(0, lines(300)), (cut, b""), (start, log.read_bytes()[start:])]
    assert taken_out(out, tmp_path / "taken")["app.log"] == log.read_bytes()


@pytest.mark.parametrize("unread", [b"", b"x" * 3000 + b"\n"])
async def test_a_hole_tells_nothing(log: Path, out: Path, unread: bytes) -> None:
    """A writer without O_APPEND leaves one where its file was truncated, and a longer one the next time."""
    with log.open("wb", buffering=0) as file:
        for _ in range(3):
            file.write(lines(500))
            await merge(out, log)
            file.write(unread)
            os.truncate(log, 0)
        file.write(NEW)
        progress = await merge(out, log)
    assert (progress.regressions, progress.gaps) == (0, 1)
    assert len(verify(out).gaps) == 3


async def test_what_is_compared_cannot_be_read_now(log: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that cannot be opened says nothing: the source waits, and the packet file is written on."""
    segments = Segments(max_bytes=5_000)
    log.write_bytes(lines(1_000))
    for turn in range(4):
        add(log, lines(300, 1000 * turn))
        await merge(out, log, segments=segments)
    before = log.read_bytes()
    os.truncate(log, 3_000)
    add(log, b"\n" + NEW)
    other = log.with_name("other.log")
    other.write_bytes(NEW)

    def refused(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(series, "open_segment", refused)
        progress = await merge(out, log.parent, segments=segments)
    assert {Path(path).name: exc.errno for path, exc in progress.problems.items()} == {"app.log": 13}
    assert (progress.lines, progress.gaps) == (1, 0)
    await merge(out, log.parent, segments=segments)
    found = verify(out)
    assert (found.lost, len(found.regressions)) == ([], 1)
    start = before.rfind(b"\n", 0, 3_000) + 1
    with FrameSource(out) as source:
        last = [frame for frame in source if frame.header.type is FrameType.LINES][-1]
    assert last.content() == log.read_bytes()[start:]


async def test_segments_that_were_compared_can_go(log: Path, out: Path) -> None:
    """What held their bytes lets go of them: retention frees the disk."""
    options: dict[str, Any] = {"segments": Segments(max_bytes=20_000, keep_bytes=40_000)}
    for turn in range(6):
        add(log, lines(300, 1000 * turn))
        await merge(out, log, **options)
    os.truncate(log, log.stat().st_size - 9_000)
    add(log, b"\n" + NEW)
    async with Merge([str(log)], out, follow=True, **options) as engine, asyncio.timeout(AMPLE):
        running = asyncio.ensure_future(engine.run())
        while not engine.progress.regressions:  # noqa: ASYNC110 - kept by another thread
            await asyncio.sleep(0.002)
        for turn in range(10):
            add(log, lines(600, 10_000 * turn))
            await engine.caught_up()
            await asyncio.sleep(0.15)  # a tick of the writer, behind which it lets go
        assert [name for name in opened() if name.startswith(str(out.parent)) and name.endswith("(deleted)")] == []
        engine.stop()
        await running


def opened() -> Iterator[str]:
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed by another thread meanwhile
            yield os.readlink(f"/proc/self/fd/{number}")


async def test_repair_keeps_it(log: Path, out: Path, tmp_path: Path) -> None:
    """Written anew, with damage before it and behind it, both generations stay what they are."""
    log.write_bytes(lines(300))
    await merge(out, log)
    os.truncate(log, 3_000)
    add(log, NEW * 3)
    await merge(out, log)
    data = bytearray(out.read_bytes())
    with FrameSource(out) as source:
        first = next(frame for frame in source if frame.header.type is FrameType.LINES)
    data[first.end - 1] ^= 1
    out.write_bytes(data)
    done = repair(out, tmp_path / "new.opk")
    assert len(done.gaps) == 1
    found = verify(tmp_path / "new.opk")
    assert found.ok
    assert len(found.regressions) == 1
    again = split(tmp_path / "new.opk", tmp_path / "taken")
    assert sorted(again.incomplete) == [tmp_path / "taken" / "app.log", tmp_path / "taken" / "app.log.gen0"]


# --- any history ------------------------------------------------------------------------------------------------------

_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 60)),
        st.tuples(st.just("lose"), st.integers(0, 1 << 16)),
        st.tuples(st.just("merge"), st.booleans()),
    ),
    min_size=3,
    max_size=14,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=_STEPS, segmented=st.booleans())
def test_whatever_happens_to_its_end(tmp_path_factory: pytest.TempPathFactory, steps: Any, segmented: bool) -> None:
    """Lines are added, the end is lost, and it is merged: the generations are what comparing all bytes gives."""
    folder = tmp_path_factory.mktemp("any")
    log, out = folder / "app.log", folder / "merged.opk"
    options: dict[str, Any] = {"segments": Segments(max_bytes=3_000)} if segmented else {}
    log.write_bytes(lines(60))
    number = 60
    known = b""  # what the file had when it was merged last
    wanted: list[tuple[int, bytes]] = [(0, b"")]
    for what, much in [("merge", True), *steps, ("merge", True)]:
        if what == "add":
            add(log, lines(much, number))
            number += much
        elif what == "lose":
            os.truncate(log, log.stat().st_size * much >> 16)
        else:
            now = log.read_bytes()
            if not now.startswith(known):
                start = next((i for i, (a, b) in enumerate(zip(now, known, strict=False)) if a != b), len(now))
                if start == len(now) and not now.endswith(b"\n") and now:
                    continue
                if start < len(now):
                    start = now.rfind(b"\n", 0, start) + 1 if start >= HEAD_BYTES else 0
                wanted.append((start, b""))
            start, data = wanted[-1]
            wanted[-1] = start, data + now[start + len(data) :]
            known = now
            asyncio.run(merge(out, log, **options))
    lost = verify(out).lost
    assert len(lost) == sum(not start for start, _ in wanted[1:]), "only what was truncated is stated as a gap"
    if not lost:
        assert held(out) == wanted
        assert taken_out(out, folder / "taken")["app.log"] == known
    shutil.rmtree(folder)


# --- what a packet file holds -----------------------------------------------------------------------------------------


@pytest.fixture
def file(out: Path) -> Iterator[PacketFile]:
    with_lines = PacketFile(out, fsync="none")
    yield with_lines
    with_lines.close()


def info(inode: int, start: int = 0) -> SourceInfo:
    return SourceInfo(1, inode, 1, start, Compression.NONE, b"/a.log")


def test_held_bytes_are_found_by_their_place_in_the_file(file: PacketFile) -> None:
    """Pieces, a hole, another source between, another file between, a file that lost its end: any range, or nothing."""
    file.open_source(info(1))
    file.open_source(info(9)._replace(path=b"/b.log"))
    data = b"".join(b"%04d\n" % number for number in range(1000))
    file.append([Piece(0, data[:1000], 0, 200), Piece(1, b"b\n", 0, 1), Piece(0, data[1000:3000], 1000, 400)])
    file.append([Piece(0, HOLE_STRUCT.pack(500), 3000, 0, Flag.HOLE), Piece(0, data[3500:4000], 3500, 100)])
    whole = data[:3000] + bytes(500) + data[3500:4000]
    for start, end in [(0, 4000), (0, 1), (999, 1001), (2990, 3600), (3100, 3200), (3999, 4000), (1000, 3000)]:
        assert file.held(0, start, end) == whole[start:end]
    assert file.held(0, 0, 4001) == b""
    file.open_source(info(2), 0)
    file.append([Piece(0, b"other\n", 0, 1)])
    assert file.held(0, 0, 6) == b"other\n"
    assert file.held(0, 3990, 4000, generation=0) == whole[3990:]
    file.open_source(info(1, 2000), 0)
    file.append([Piece(0, b"anew\n", 2000, 1)])
    assert file.held(0, 1990, 2005) == data[1990:2000] + b"anew\n"
    assert file.held(0, 1990, 2006) == b""
    assert file.held(0, 1990, 2005, generation=0) == data[1990:2005]
    assert file.held(0, 0, 2, generation=7) == b""
    file.append([Piece(0, b"more\n", 2005, 1)])
    assert file.held(0, 2000, 2010) == b"anew\nmore\n", "also what was written since it was asked last"
    assert file.held(0, 1990, 2010) == data[1990:2000] + b"anew\nmore\n"
    file.open_source(info(5)._replace(path=b"/c.log"))
    file.append([Piece(2, b"one\n", 0, 1), Piece(2, HOLE_STRUCT.pack(7), 4, 0, Flag.HOLE), Piece(2, b"two\n", 11, 1)])
    assert file.held(2, 0, 15) == b"one\n" + bytes(7) + b"two\n", "and of sources that began since"
    assert file.held(2, 2, 13) == b"e\n" + bytes(7) + b"tw"
    assert file.held(1, 0, 2) == b"b\n"


def test_held_bytes_behind_damage_are_not_made_up(file: PacketFile, out: Path) -> None:
    """Where frames do not lead further back, nothing is given."""
    file.open_source(info(1))
    for number in range(10):
        file.append([Piece(0, b"%04d\n" % number, 5 * number, 1)])
    with FrameSource(out) as source:
        frames = [frame for frame in source if frame.header.type is FrameType.LINES]
    with out.open("r+b") as raw:
        raw.seek(frames[4].offset + 20)
        raw.write(b"\xff")
    assert file.held(0, 30, 50) == b"0006\n0007\n0008\n0009\n"
    assert file.held(0, 20, 50) == b""
    assert file.held(0, 0, 5) == b""


@pytest.mark.parametrize("same", [0, 1, 255, 256, 257, 65_536, 65_700, 200_000, 1_000_000])
async def test_the_common_beginning_is_found_to_the_byte(tmp_path: Path, same: int) -> None:
    """Wherever it ends, in the last block or far from it."""
    data = os.urandom(1_000_000)
    path = tmp_path / "file"
    path.write_bytes(data[:same] + bytes(byte ^ 0xFF for byte in data[same:]))
    asked: list[tuple[int, int]] = []

    async def held(start: int, end: int) -> bytes:
        asked.append((start, end))
        return data[start:end]

    contents = open_contents(str(path))
    assert await shorter.common_prefix(contents, len(data), held) == same
    contents.close()
    assert all(end - start <= wire.WANT_BYTES for start, end in asked)


@pytest.mark.parametrize("span", [(0, 0), (5, 4), (0, wire.WANT_BYTES + 1), (0, NONE_U64)])
def test_a_server_is_not_asked_for_more_than_a_message_holds(span: tuple[int, int]) -> None:
    """The range comes from outside."""
    with pytest.raises(PacketError, match="are wanted, expected 1 to"):
        wire.read_want(wire.want(0, *span, None))
    assert wire.read_want(wire.want(3, 4, 9, None)) == (3, 4, 9, None)
    assert wire.read_want(wire.want(3, 4, 9, 2)) == (3, 4, 9, 2)
