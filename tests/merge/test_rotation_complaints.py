"""What people complain of in other log collectors, one test each, with the number that the complaint has in our list.

The docstring is the complaint and, behind the colon, our rule. Real files, real merges; "down": no merge runs.
"""

# ruff: noqa: ASYNC240 - these files are small, and the loop has nothing else to do

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import lzma
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from offload.errors import BrokenResourceError, BusyResourceError
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile
from offload.files.segments import Segments
from offload.files.series import sealed_segments
from offload.files.watch import Watch
from offload.merge.audit import verify
from offload.merge.engine import Merge, Progress
from offload.merge.lines import LineReader
from offload.merge.split import split, stat
from offload.packets.codec import Frame, SourceInfo
from offload.packets.format import Compression, Flag, FrameType

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="renames under open descriptors, inodes, inotify")

AMPLE = 60.0  # seconds until a condition that must come true is given up
LINES = [b"%d of the lines of a log, all of them different\n" % number for number in range(1000)]
HEAD = b"".join(LINES[:100])  # longer than any head that is compared


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged.opk"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(AMPLE):
        while not condition():  # noqa: ASYNC110 - a count that another thread keeps; it has no event
            await asyncio.sleep(0.002)


async def merge(out: Path, *paths: Path | str) -> Progress:
    async with Merge([str(path) for path in paths], out) as engine, asyncio.timeout(AMPLE):
        return await engine.run()


@asynccontextmanager
async def following(
    out: Path, *paths: Path | str, poll: bool = False, linger: float = 60.0, segments: Segments | None = None
) -> AsyncIterator[Merge]:
    """A merge that follows until the block ends; then everything that was there must be in the file."""
    async with Merge(
        [str(path) for path in paths], out, follow=True, poll=poll, linger=linger, segments=segments
    ) as engine:
        running = asyncio.ensure_future(engine.run())
        try:
            yield engine
        finally:
            engine.stop()
            async with asyncio.timeout(AMPLE):
                await running


def add(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def frames(out: Path) -> list[Frame]:
    with FrameSource(out) as source:
        return list(source)


def given(out: Path) -> dict[str, bytes]:
    """What the packet file holds of each source, in the order in which it came; every checksum must hold."""
    found = verify(out)
    assert found.ok, found.faults
    report = stat(out)
    names = {entry.source_id: entry.name for entry in report.sources}
    held = dict.fromkeys(names.values(), b"")
    for frame in frames(out):
        if frame.header.type is FrameType.LINES and frame.end <= report.end:
            held[names[frame.header.source_id]] += frame.content()
    return held


def all_lines(out: Path) -> list[bytes]:
    return b"".join(given(out).values()).splitlines(keepends=True)


def once(out: Path, wanted: list[bytes]) -> None:
    """Each of these lines is there once, and nothing else."""
    found, expected = Counter(all_lines(out)), Counter(wanted)
    assert expected - found == Counter(), "lost"
    assert found - expected == Counter(), "doubled"


def copytruncate(path: Path, to: Path) -> None:
    shutil.copy2(path, to)
    os.truncate(path, 0)


@pytest.mark.parametrize("nothing_read", [False, True])
async def test_01_inode_reuse(logs: Path, out: Path, nothing_read: bool) -> None:
    """A new file gets the inode of a deleted one and is skipped or read from the middle: birth time, head and guard
    tell it is another file, from 0."""
    before = b"" if nothing_read else b"#header\n"
    paths = [logs / f"{number}.log" for number in range(100)]
    for path in paths:
        path.write_bytes(before)
    await merge(out, logs)
    numbers = {path: path.stat().st_ino for path in paths}
    for path in paths:
        path.unlink()
    for path in paths:
        path.write_bytes(b"#header\nnew\n")
    again = [path for path in paths if path.stat().st_ino == numbers[path]]
    if not again:
        pytest.skip("this file system did not use the numbers of files again")
    await merge(out, logs)
    held = given(out)
    assert {held[path.name] for path in again} == {before + b"#header\nnew\n"}


@pytest.mark.parametrize("glob", ["*", "*.log"])
async def test_02_equal_heads(logs: Path, out: Path, glob: str) -> None:
    """Two files that begin alike are taken for one, and one is never read: the inode counts too, and a file is taken
    for a copy only if all of it stands in the other."""
    (logs / "messages.log").write_bytes(HEAD + b"messages\n")
    async with following(out, logs / glob) as engine:
        await until(lambda: engine.progress.lines == 101)
        (logs / "syslog.log").write_bytes(HEAD)
        (logs / "messages-1.log").write_bytes(HEAD)
        await until(lambda: engine.progress.lines == 201 and len(engine.progress.copies) == 1)
        assert engine.progress.copies == {str(logs / "messages-1.log"): str(logs / "messages.log")}
        add(logs / "messages-1.log", b"its own\n")  # no copy, after all
        add(logs / "syslog.log", b"syslog\n")
        await until(lambda: engine.progress.lines == 303)
        assert not engine.progress.copies
    assert given(out) == {
        "messages.log": HEAD + b"messages\n",
        "syslog.log": HEAD + b"syslog\n",
        "messages-1.log": HEAD + b"its own\n",
    }


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1023, 1024, 1025])
async def test_03_small_files(logs: Path, out: Path, size: int) -> None:
    """Files below 256 or 1024 bytes are never read, for want of a fingerprint: the head grows from the first byte."""
    path = logs / "app.log"
    path.write_bytes(b"x" * (size - 1) + b"\n")
    await merge(out, path)
    path.rename(logs / "app.log.1")
    add(logs / "app.log.1", b"late\n")
    path.write_bytes(b"new\n")
    await merge(out, path)
    assert given(out) == {"app.log": b"x" * (size - 1) + b"\nlate\nnew\n"}


@pytest.mark.parametrize("down", [False, True], ids=["followed", "down"])
@pytest.mark.parametrize("glob", ["*.log", "*"])
async def test_04_copytruncate(logs: Path, out: Path, glob: str, down: bool) -> None:
    """copytruncate doubles all or loses a part: the copy is read on from where the file was left, and is nobody's
    source; then the file from its start."""
    path, wanted = logs / "app.log", LINES[:800]
    path.write_bytes(b"".join(LINES[:200]))
    if down:
        await merge(out, logs / glob)
        add(path, b"".join(LINES[200:400]))
        copytruncate(path, logs / "app.log.1")
        add(path, b"".join(LINES[400:800]))
        await merge(out, logs / glob)
    else:
        async with following(out, logs / glob) as engine:
            await until(lambda: engine.progress.lines == 200)
            add(path, b"".join(LINES[200:400]))
            copytruncate(path, logs / "app.log.1")
            add(path, b"".join(LINES[400:600]))
            await until(lambda: engine.progress.lines == 600)
            (logs / "app.log.1").rename(logs / "app.log.2")
            copytruncate(path, logs / "app.log.1")
            add(path, b"".join(LINES[600:800]))
            await until(lambda: engine.progress.lines == 800)
    await merge(out, logs / glob)
    assert all_lines(out) == wanted
    assert verify(out).gaps == []


async def test_04_copytruncate_without_a_copy(logs: Path, out: Path) -> None:
    """… without a copy that can be seen, what is gone is stated, never passed over."""
    path = logs / "app.log"
    path.write_bytes(b"one\ntwo\n")
    await merge(out, path)
    add(path, b"never seen\n")
    os.truncate(path, 0)
    add(path, b"new\n")
    progress = await merge(out, path)
    assert (progress.gaps, all_lines(out)) == (1, [b"one\n", b"two\n", b"new\n"])
    assert verify(out).gaps == [("app.log", 8, None, "truncated")]


async def test_04_the_copy_is_older_than_what_was_read(logs: Path, out: Path) -> None:
    """… and a copy that ends before what was read is no source of its own, now or after a start."""
    path = logs / "app.log"
    path.write_bytes(HEAD)
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 100)
        shutil.copy(path, logs / "app.log.1")
        add(path, b"in the gap between copy and cut\n")
        await until(lambda: engine.progress.lines == 101 and len(engine.progress.copies) == 1)
        os.truncate(path, 0)
        add(path, b"new\n")
        await until(lambda: engine.progress.lines == 102)
    await merge(out, logs)
    assert given(out) == {"app.log": HEAD + b"in the gap between copy and cut\nnew\n"}
    assert verify(out).gaps == [("app.log", len(HEAD) + 32, None, "truncated")]  # perhaps; nobody can tell


@pytest.mark.parametrize("down", [False, True], ids=["followed", "down"])
async def test_04_where_the_copies_are_sources_too(logs: Path, out: Path, down: bool) -> None:
    """… where app.log.1 is a source, it is not the copy's: that is known by what is in it."""
    path, one = logs / "app.log", logs / "app.log.1"
    one.write_bytes(b"".join(LINES[:50]))
    path.write_bytes(b"".join(LINES[50:200]))
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 200)
        if not down:
            one.rename(logs / "app.log.2")
            copytruncate(path, one)
            add(path, b"".join(LINES[200:300]))
            await until(lambda: engine.progress.lines == 300)
    if down:
        one.rename(logs / "app.log.2")
        copytruncate(path, one)
        add(path, b"".join(LINES[200:300]))
    for _ in range(2):
        await merge(out, logs)
    once(out, LINES[:300])


@pytest.mark.parametrize("down", [False, True], ids=["followed", "down"])
async def test_15_delaycompress_where_rotated_names_are_sources_too(logs: Path, out: Path, down: bool) -> None:
    """… where app.log.1 is a source, app.log.2.gz is what that one read, and no source of its own."""
    path, one, two = logs / "app.log", logs / "app.log.1", logs / "app.log.2"

    def rotate() -> None:
        one.rename(two)
        with gzip.open(logs / "app.log.2.gz", "wb") as packed:
            packed.write(two.read_bytes())
        two.unlink()
        path.rename(one)
        path.write_bytes(b"".join(LINES[200:300]))

    one.write_bytes(b"".join(LINES[:100]))
    path.write_bytes(b"".join(LINES[100:200]))
    if down:
        await merge(out, logs)
        rotate()
    else:
        async with following(out, logs) as engine:
            await until(lambda: engine.progress.lines == 200)
            rotate()
            await until(lambda: engine.progress.lines == 300)
    for _ in range(2):
        await merge(out, logs)
    once(out, LINES[:300])
    assert verify(out).gaps == []


@pytest.mark.parametrize("times", [False, True], ids=["cp", "cp -p"])
@pytest.mark.parametrize("kind", [None, "gz"])
async def test_04_copied_twice_while_down_and_little_was_read(
    logs: Path, out: Path, kind: str | None, times: bool
) -> None:
    """Of a generation that was begun nothing may be in the packet file when it is copied and cut: a copy that is none
    of those known, and is no beginning of what is there now, is read too."""
    path, copy = logs / "app.log", shutil.copy2 if times else shutil.copy
    path.write_bytes(HEAD)
    await merge(out, path)
    copy(path, logs / "app.log.1")
    os.truncate(path, 0)
    path.write_bytes(LINES[100])
    size = out.stat().st_size
    await merge(out, path)
    # As a power cut leaves it: the second generation has begun, and its line is gone.
    begun = next(f for f in frames(out) if f.header.type is FrameType.SOURCE and f.header.generation == 1)
    assert begun.offset >= size
    os.truncate(out, begun.end)
    for number in range(101, 103):
        (logs / "app.log.1").rename(logs / f"app.log.{103 - number + 1}")
        add(path, LINES[number])
        copy(path, logs / "app.log.1")
        os.truncate(path, 0)
        if kind is not None:
            pack(logs / f"app.log.{103 - number + 1}", kind)
    path.write_bytes(LINES[103])
    for _ in range(2):
        await merge(out, path)
    assert all_lines(out) == LINES[:104]
    assert verify(out).gaps == []


@pytest.mark.parametrize("kind", ["gz", "xz"])
async def test_04_a_copy_with_its_times_that_is_packed_later(logs: Path, out: Path, kind: str) -> None:
    """What was read as a copy (made by `cp -p`, so last written to before it was made) is known when it is packed."""
    path = logs / "app.log"
    path.write_bytes(HEAD)
    await merge(out, path)
    for number in (100, 101):  # twice while nobody looks: the second copy is read as a file of its own
        if number > 100:
            (logs / "app.log.1").rename(logs / "app.log.2")
        path.write_bytes((HEAD if number == 100 else b"") + LINES[number] * 30)
        os.utime(path, ns=(number, path.stat().st_mtime_ns - 1))  # a moment before the copy is made
        copytruncate(path, logs / "app.log.1")
    path.write_bytes(LINES[102])
    await merge(out, path)
    (logs / "app.log.1").rename(logs / "app.log.3")
    pack(logs / "app.log.3", kind)
    copytruncate(path, logs / "app.log.1")
    path.write_bytes(LINES[103])
    for _ in range(2):
        await merge(out, path)
    wanted = [*LINES[:100], *[LINES[100]] * 30, *[LINES[101]] * 30, LINES[102], LINES[103]]
    assert Counter(all_lines(out)) == Counter(wanted)


async def test_05_truncated_while_down(logs: Path, out: Path) -> None:
    """A file cut while the agent was down is sent again at every start, or not seen at all if it grew again: the 256
    bytes before the offset are compared, and the new generation is written down once."""
    path = logs / "app.log"
    path.write_bytes(HEAD)
    await merge(out, path)
    path.write_bytes(HEAD[:900] + b"written anew, and longer than it was\n" + HEAD)
    for _ in range(3):
        await merge(out, path)
    assert all_lines(out) == (HEAD + path.read_bytes()).splitlines(keepends=True)
    assert len(verify(out).gaps) == 1


@pytest.mark.parametrize("zeros", [False, True])
async def test_06_torn_state(logs: Path, out: Path, zeros: bool) -> None:
    """A registry torn or zeroed by a power cut keeps the agent from starting: there is none, and a torn or zeroed end
    of the packet file is cut and read again."""
    path = logs / "app.log"
    path.write_bytes(HEAD)
    await merge(out, path)
    whole = out.read_bytes()
    last = frames(out)[-1]
    for cut in range(last.offset, len(whole), 13):
        out.write_bytes(whole[:cut] + (bytes(len(whole) - cut) if zeros else b""))
        await merge(out, path)
        assert given(out) == {"app.log": HEAD}


async def test_07_data_and_ledger_disagree(logs: Path, out: Path) -> None:
    """Data file and ledger disagree after a crash, and the agent loops or panics for ever: one checksum covers bytes
    and offset, so any end of the file is a state that it goes on from."""
    path = logs / "app.log"
    for part in range(5):
        add(path, b"".join(LINES[part * 10 : part * 10 + 10]))
        await merge(out, path)
    whole, ends = out.read_bytes(), [frame.end for frame in frames(out)]
    for end in ends:
        out.write_bytes(whole[:end])
        await merge(out, path)
        assert all_lines(out) == LINES[:50]


async def test_08_shared_state(logs: Path, out: Path, tmp_path: Path) -> None:
    """Another input's offsets are deleted or mixed up: state belongs to the packet file, a second writer is refused,
    and a source that is not asked for this time is not forgotten."""
    for name in ("a.log", "b.log"):
        (logs / name).write_bytes(HEAD)
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 200)
        with pytest.raises(BusyResourceError):
            await merge(out, logs)
        await merge(tmp_path / "other.opk", logs)
    await merge(out, logs / "a.log")
    await merge(out, logs)
    assert given(out) == given(tmp_path / "other.opk") == {"a.log": HEAD, "b.log": HEAD}


async def test_09_state_that_cannot_be_saved(logs: Path, out: Path) -> None:
    """Offsets are not saved, in silence, because the database is locked: bytes and offset are one write, and one that
    fails ends the merge with the error; started again, it goes on."""
    (logs / "app.log").write_bytes(HEAD * 100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(BrokenResourceError):
            await merge(out, logs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    await merge(out, logs)
    assert given(out) == {"app.log": HEAD * 100}


async def test_10_queue_overflow(logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """inotify's queue overflows and a rename is lost for good: overflow means that anything may have changed."""
    path = logs / "app.log"
    path.write_bytes(LINES[0])
    take = Watch.take
    lost: list[set[str]] = []
    looks: list[None] = []

    def overflow(watch: Watch) -> set[str] | None:
        changed = take(watch)
        if changed:
            lost.append(changed)
            return None  # what Watch makes of IN_Q_OVERFLOW; test_watch.py has a real one
        looks.append(None)
        return changed

    monkeypatch.setattr(Watch, "take", overflow)
    async with following(out, path) as engine:
        await until(lambda: engine.progress.lines == 1 and bool(looks))
        path.rename(logs / "app.log.1")
        add(logs / "app.log.1", LINES[1])
        path.write_bytes(LINES[2])
        await until(lambda: engine.progress.lines == 3 and bool(lost))
    assert all_lines(out) == LINES[:3]


async def test_11_one_long_line(logs: Path, out: Path) -> None:
    """One line longer than a buffer stops the file, or is thrown away: it comes in fragments, whatever its length."""
    line = b"x" * (5 << 20) + b"\n"
    (logs / "app.log").write_bytes(LINES[0] + line + LINES[1])
    progress = await merge(out, logs)
    assert (progress.lines, all_lines(out)) == (3, [LINES[0], line, LINES[1]])


async def test_12_lines_cut_in_two(logs: Path, out: Path) -> None:
    """A line that is written in two pieces comes out as two, or mixed with another file's: only whole lines are given
    out, and the rest is held as an offset."""
    a, b = logs / "a.log", logs / "b.log"
    a.write_bytes(b"one\nfirst ha")
    b.write_bytes(b"other\npart")
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 2)
        add(b, b" of b\n")
        await until(lambda: engine.progress.lines == 3)
        add(a, b"lf and second\n")
        await until(lambda: engine.progress.lines == 4)
    with FrameSource(out) as source:
        assert all(frame.payload.endswith(b"\n") for frame in source if frame.header.type is FrameType.LINES)


async def test_13_last_line_without_its_end(logs: Path, out: Path) -> None:
    """The last line of a file that does not end in a line end is never read: it is given out when the file has lost its
    name and is quiet, and when the merge ends."""
    path = logs / "app.log"
    path.write_bytes(b"one\nno end")
    async with following(out, path) as engine:
        await until(lambda: engine.progress.lines == 1)
        path.rename(logs / "app.log.1")
        path.write_bytes(b"two\nno end either")
        await until(lambda: engine.progress.lines == 3)
    assert given(out) == {"app.log": b"one\nno endtwo\nno end either"}
    assert stat(out).lines == 4


@pytest.mark.parametrize("glob", ["*.log", "*"])
@pytest.mark.parametrize("when", ["soon", "after the linger", "down", "down and packed"])
async def test_14_late_lines(logs: Path, out: Path, tmp_path: Path, glob: str, when: str) -> None:
    """Lines that a program writes to the renamed file after the new one has begun are lost: the old descriptor is kept
    for a while, and later the file is known by what is in it."""
    path, old = logs / "app.log", logs / "app.log.1"
    linger = 0.0 if when == "after the linger" else 60.0
    path.write_bytes(LINES[0])
    with path.open("ab", buffering=0) as program:
        async with following(out, logs / glob, linger=linger) as engine:
            await until(lambda: engine.progress.lines == 1)
            path.rename(old)
            path.write_bytes(LINES[1])
            await until(lambda: engine.progress.lines == 2)
            if not when.startswith("down"):
                program.write(LINES[2])
                await until(lambda: engine.progress.lines == 3)
                add(path, LINES[3])
                await until(lambda: engine.progress.lines == 4)
                program.write(LINES[4])
                await until(lambda: engine.progress.lines == 5)
        if when.startswith("down"):
            program.write(LINES[2] + LINES[4])
            add(path, LINES[3])
    if when == "down and packed":
        pack(old, "gz")
    for _ in range(2):
        await merge(out, logs / glob)
    once(out, LINES[:5])
    assert set(given(out)) == {"app.log"}
    split(out, tmp_path / "back")
    assert (tmp_path / "back" / "app.log").read_bytes() == path.read_bytes()
    assert (tmp_path / "back" / "app.log.gen0").read_bytes() == LINES[0] + LINES[2] + LINES[4]


@pytest.mark.parametrize("how", ["moved away", "deleted"])
async def test_14_late_lines_to_a_file_that_no_name_leads_to(logs: Path, out: Path, tmp_path: Path, how: str) -> None:
    """… also if the file is in another folder, or has no name at all: its descriptor is open."""
    path = logs / "app.log"
    path.write_bytes(LINES[0])
    with path.open("ab", buffering=0) as program:
        async with following(out, logs) as engine:
            await until(lambda: engine.progress.lines == 1)
            path.rename(tmp_path / "elsewhere") if how == "moved away" else path.unlink()
            path.write_bytes(LINES[1])
            await until(lambda: engine.progress.lines == 2)
            program.write(LINES[2])
            await until(lambda: engine.progress.lines == 3)
            add(path, LINES[3])
            await until(lambda: engine.progress.lines == 4)
    assert all_lines(out) == LINES[:4]


@pytest.mark.parametrize("packed", [None, "gz"])
@pytest.mark.parametrize("glob", ["*.log", "*"])
async def test_15_two_rotations_while_down(logs: Path, out: Path, glob: str, packed: str | None) -> None:
    """Of two rotations between two looks the middle file is lost: all that had the name in between are found beside it,
    in their order, packed or not."""
    path = logs / "app.log"
    path.write_bytes(LINES[0])
    await merge(out, logs / glob)
    add(path, LINES[1])
    for number in range(2, 5):
        rotate(path, packed=packed)
        path.write_bytes(LINES[number])
    for _ in range(2):
        await merge(out, logs / glob)
    once(out, LINES[:5])
    if glob == "*.log":
        assert all_lines(out) == LINES[:5]
    assert verify(out).gaps == []


@pytest.mark.parametrize("packed", [None, "gz"])
async def test_14_late_lines_after_a_kill(logs: Path, out: Path, packed: str | None) -> None:
    """… and a kill right behind the first of them: the packet file has no hash yet of what stands before, but of the
    file's earlier generation it has; so it is known again, also packed."""
    path = logs / "app.log"
    path.write_bytes(HEAD)
    await merge(out, path)
    rotate(path)
    path.write_bytes(LINES[100])
    await merge(out, path)
    add(logs / "app.log.1", LINES[101])
    await merge(out, path)
    late = next(f for f in frames(out) if f.header.type is FrameType.LINES and f.payload == LINES[101])
    os.truncate(out, late.end)
    if packed is not None:
        pack(logs / "app.log.1", packed)
    add(path, LINES[102])
    await merge(out, path)
    once(out, LINES[:103])
    assert verify(out).gaps == []


@pytest.mark.parametrize("packed", ["gz", "xz"])
async def test_14_late_lines_that_are_older_than_what_was_read_behind_them(
    logs: Path, out: Path, tmp_path: Path, packed: str
) -> None:
    """… and also if two files were read behind it before anybody looked at it again, now packed: its time of change is
    older than what was read last. A cut behind a kill leaves the packet file like that."""
    path, archive = logs / "app.log", tmp_path / "archive"
    archive.mkdir()
    path.write_bytes(HEAD)
    with path.open("ab", buffering=0) as program:
        await merge(out, path)
        rotate(path)
        path.write_bytes(LINES[100])
        await merge(out, path)
        (logs / "app.log.1").rename(archive / "app.log")  # not beside it, so nobody looks
        program.write(LINES[101])
        add(path, LINES[102])
    await merge(out, path)
    rotate(path)
    path.write_bytes(LINES[103])
    await merge(out, path)
    pack(archive / "app.log", packed)
    (archive / f"app.log.{packed}").rename(logs / f"app.log.2.{packed}")
    for _ in range(2):
        await merge(out, path)
    once(out, LINES[:104])
    assert verify(out).gaps == []


@pytest.mark.parametrize("how", ["linked", "renamed"])
async def test_14_late_lines_of_which_the_system_tells_under_another_name(logs: Path, out: Path, how: str) -> None:
    """… and while a merge follows that did not see the rotation: where the file was linked and unlinked, the system
    tells of what is written to it under the name that its program had opened it by."""
    path, old = logs / "app.log", logs / "app.log.1"
    with path.open("ab", buffering=0) as program:
        program.write(HEAD)
        await merge(out, path)
        if how == "linked":
            old.hardlink_to(path)
            path.unlink()
        else:
            path.rename(old)
        path.write_bytes(LINES[100])
        await merge(out, path)
        async with following(out, path) as engine:
            add(path, LINES[101])
            await until(lambda: engine.progress.lines == 1)
            for _ in range(3):  # the first looks are at everything
                await engine.caught_up()
            program.write(LINES[102])
            await until(lambda: engine.progress.lines == 2)
            program.write(LINES[103])
            await until(lambda: engine.progress.lines == 3)
    once(out, LINES[:104])
    assert verify(out).gaps == []


@pytest.mark.parametrize("packed", [None, "gz"])
async def test_14_late_lines_many_files_ago(logs: Path, out: Path, tmp_path: Path, packed: str | None) -> None:
    """… and also after many other files: at its start a merge looks back as far as a segment states them."""
    path, archive = logs / "app.log", tmp_path / "archive"
    archive.mkdir()
    path.write_bytes(HEAD)
    await merge(out, path)
    rotate(path)
    path.write_bytes(LINES[100])
    await merge(out, path)
    (logs / "app.log.1").rename(archive / "app.log.50")
    for number in range(101, 120):
        rotate(path)
        path.write_bytes(LINES[number])
        await merge(out, path)
    add(archive / "app.log.50", LINES[120])
    if packed is not None:
        pack(archive / "app.log.50", packed)
    for name in os.listdir(archive):
        (archive / name).rename(logs / name)
    for _ in range(2):
        await merge(out, path)
    once(out, LINES[:121])
    assert verify(out).gaps == []


async def test_14_late_lines_do_not_stand_inside_another_line(logs: Path, out: Path) -> None:
    """… and never in the middle of a line of the new file, whose beginning was given out already as it is longer than
    all buffers: they wait for its end."""
    path = logs / "app.log"
    path.write_bytes(HEAD)
    async with following(out, path) as engine:
        await until(lambda: engine.progress.lines == 100)
        path.rename(logs / "app.log.1")
        path.write_bytes(LINES[100] + b"long " * 500_000)
        await until(lambda: engine.progress.bytes > len(HEAD) + 2_000_000)
        add(logs / "app.log.1", LINES[101])
        await until(lambda: engine._tails[str(path)].lag >= len(LINES[101]) and engine.progress.caught_up)
        add(path, b"line\n")
        await until(lambda: engine.progress.lines == 103)
    with FrameSource(out) as source:
        reader = LineReader(source)
        found = [line for frame in source for lines in reader.feed(frame) for line in lines.each()]
    assert Counter(found) == Counter([*LINES[:102], b"long " * 500_000 + b"line\n"])


async def test_14_late_lines_of_a_file_that_is_packed_meanwhile(logs: Path, out: Path) -> None:
    """… and once: a packed file that has what we read on by the descriptor of the plain one is no other file."""
    path = logs / "app.log"
    path.write_bytes(HEAD)
    async with following(out, path) as engine:
        await until(lambda: engine.progress.lines == 100)
        path.rename(logs / "app.log.1")
        path.write_bytes(LINES[100])
        await until(lambda: engine.progress.lines == 101)
        add(logs / "app.log.1", LINES[101])
        (logs / "app.log.1").rename(logs / "app.log.2")
        pack(logs / "app.log.2", "gz")
        path.rename(logs / "app.log.1")
        path.write_bytes(LINES[102])
        await until(lambda: engine.progress.lines >= 103)
    once(out, LINES[:103])


async def test_02_a_file_that_only_begins_like_one_that_was_read(logs: Path, out: Path) -> None:
    """… nor is one lost that came and went while nobody looked, after a file that held nothing but the header."""
    path = logs / "app.log"
    path.write_bytes(LINES[0])
    await merge(out, path)
    rotate(path)
    for number in (1, 2):
        path.write_bytes(LINES[0] + LINES[number])
        if number == 1:
            rotate(path)
    await merge(out, path)
    assert all_lines(out) == [LINES[0], LINES[0], LINES[1], LINES[0], LINES[2]]


@pytest.mark.parametrize("linked", ["hard", "symbolic"])
async def test_14_a_file_of_two_names_is_read_once(logs: Path, out: Path, linked: str) -> None:
    """… also where another name leads to the log's own file, which was left for late lines of the one before."""
    path, files = logs / "app.log", logs / "files"
    files.mkdir()
    for number in range(2):
        target = files / f"app.log.2026-{number}"
        target.write_bytes(HEAD if not number else LINES[100])
        path.unlink(missing_ok=True)
        if linked == "hard":
            path.hardlink_to(target)
        else:
            path.symlink_to(target)
        await merge(out, path)
    add(files / "app.log.2026-0", LINES[101])
    if linked == "hard":
        (files / "app.log.2026-0").rename(logs / "app.log.2")
        (logs / "app.log.1").hardlink_to(path)
    await merge(out, path)
    add(path, LINES[102])
    for _ in range(2):
        await merge(out, path)
    once(out, LINES[:103])


async def test_15_the_newest_is_empty(logs: Path, out: Path) -> None:
    """… and those in between are read at once, though nothing is in the newest yet."""
    path = logs / "app.log"
    path.write_bytes(HEAD)
    async with following(out, path) as engine:
        await until(lambda: engine.progress.lines == 100)
        for number in range(100, 103):
            path.rename(logs / f"app.log.{200 - number}")
            path.write_bytes(LINES[number])
        path.rename(logs / "app.log.1")
        path.write_bytes(b"")
        await until(lambda: engine.progress.lines == 103)
        assert path.stat().st_size == 0
    assert all_lines(out) == LINES[:103]
    assert verify(out).gaps == []


async def test_15_two_rotations_while_blocked(logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """… and while the output is blocked, files are opened as they come, so that deleting them loses nothing."""
    path, write = logs / "app.log", PacketFile.append
    gate, blocked = threading.Event(), threading.Event()

    def slow(file: PacketFile, *args: Any) -> None:
        blocked.set()
        assert gate.wait(AMPLE)
        write(file, *args)

    monkeypatch.setattr(PacketFile, "append", slow)
    monkeypatch.setattr("offload.merge.batches.ARENAS", 1)
    monkeypatch.setattr("offload.merge.engine._LOOK", 0.02)
    path.write_bytes(HEAD)
    async with following(out, path) as engine:
        try:
            await until(blocked.is_set)
            for number in range(100, 103):
                path.unlink()
                path.write_bytes(LINES[number])
                status = path.stat()
                identity = status.st_dev, status.st_ino
                await until(lambda identity=identity: identity in engine._tails[str(path)].identities)  # type: ignore[misc]
        finally:
            gate.set()
        await until(lambda: engine.progress.lines == 103)
    assert all_lines(out) == LINES[:103]
    assert verify(out).gaps == []


async def test_16_descriptors_of_deleted_files(logs: Path, out: Path, descriptors: Any) -> None:
    """Descriptors of deleted files fill the disk, or run out: they are closed once read and quiet, and more files than
    descriptors are followed with none lost."""
    count, wanted = 60, []
    for number in range(count):
        (logs / f"{number}.log").write_bytes(LINES[number])
        wanted.append(LINES[number])
    descriptors.limit(64 + 20)
    async with following(out, logs / "*.log", linger=0.1) as engine:
        await until(lambda: engine.progress.lines == count)
        for number in range(count):
            path = logs / f"{number}.log"
            path.rename(logs / f"{number}.log.1")
            add(logs / f"{number}.log.1", LINES[100 + number])
            path.write_bytes(LINES[200 + number])
            wanted += [LINES[100 + number], LINES[200 + number]]
        await until(lambda: engine.progress.lines == 3 * count)
        for number in range(count):
            (logs / f"{number}.log.1").unlink()
        await until(lambda: not [fd for fd in held() if fd.endswith("(deleted)") and str(logs) in fd])
        assert not engine.progress.problems
    once(out, wanted)
    assert verify(out).gaps == []


ROTATES = """
cd "$0"; read go
for number in $(seq 0 $(($1 - 1))); do
  mv $number.log $number.log.1; echo late $number >> $number.log.1; echo new $number > $number.log
done
"""


@pytest.mark.parametrize("segments", [None, Segments(max_bytes=20_000)], ids=["one", "segments"])
async def test_16_descriptors_that_others_take(
    logs: Path, out: Path, descriptors: Any, segments: Segments | None
) -> None:
    """A program that opens all that the system grants, once logs are followed, leaves them enough: none is lost."""
    count = 80
    for number in range(count):
        (logs / f"{number}.log").write_bytes(b"first %d\n" % number)
    command = ["sh", "-c", ROTATES, str(logs), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as rotates:  # noqa: ASYNC220
        descriptors.limit(64 + 60)
        async with following(out, logs / "*.log", linger=0.1, segments=segments) as engine:
            await until(lambda: engine.progress.lines == count)
            descriptors.take_all()
            rotates.communicate(b"go\n")
            await until(lambda: engine.progress.lines == 3 * count)
            assert not engine.progress.problems
    descriptors.give()
    once(out, [b"%s %d\n" % (what, number) for what in (b"first", b"late", b"new") for number in range(count)])
    assert verify(out).gaps == []
    assert (len(sealed_segments(out)) > 1) == (segments is not None)


async def test_16_descriptors_for_the_output(logs: Path, out: Path, descriptors: Any) -> None:
    """The packet file's next segment needs one, and the logs that are followed have the last: they make room for it."""
    for number in range(40):
        (logs / f"{number}.log").write_bytes(LINES[number])
    descriptors.limit(64 + 60)
    with (logs / "0.log").open("ab", buffering=0) as log:
        async with following(out, logs / "*.log", segments=Segments(max_bytes=20_000)) as engine:
            await until(lambda: engine.progress.lines == 40)
            await until(lambda: engine.progress.durable is not None and engine.progress.durable.lines == 40)
            descriptors.take_all()
            for number in range(100, 1000, 300):
                log.write(b"".join(LINES[number : number + 300]))
                await until(lambda number=number: engine.progress.lines == 240 + number)  # type: ignore[misc]
            await until(lambda: engine.progress.segment > 0)
    descriptors.give()
    once(out, [*LINES[:40], *LINES[100:]])
    assert verify(out).gaps == []


def held() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return found


async def test_17_blocked_output(logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blocked output stops the discovery of rotations, and a record that was begun is dropped: discovery goes on, and
    what is read stops only between frames."""
    gate, blocked, write = threading.Event(), threading.Event(), PacketFile.append

    def slow(file: PacketFile, *args: Any) -> None:
        blocked.set()
        assert gate.wait(AMPLE)
        write(file, *args)

    monkeypatch.setattr(PacketFile, "append", slow)
    monkeypatch.setattr("offload.merge.batches.ARENAS", 1)
    monkeypatch.setattr("offload.merge.engine._LOOK", 0.02)
    path = logs / "app.log"
    path.write_bytes(HEAD + b"half")
    async with following(out, logs / "*.log") as engine:
        try:
            await until(blocked.is_set)
            (logs / "new.log").write_bytes(b"new\n")
            new = str(logs / "new.log")
            await until(lambda: new in engine._tails and engine._tails[new].descriptors > 0)
            os.unlink(new)  # it was opened when it was found
            add(path, b" a line\n")
        finally:
            gate.set()
        await until(lambda: engine.progress.lines == 102)
    assert given(out) == {"app.log": HEAD + b"half a line\n", "new.log": b"new\n"}


async def test_18_offset_before_delivery(logs: Path, out: Path) -> None:
    """The offset is saved before the data, and a kill in between loses lines: it stands in the frame of the data, so
    whichever frame is the last, the next line is the next one."""
    path = logs / "app.log"
    async with following(out, path) as engine:
        for number in range(30):
            add(path, LINES[number])
            await until(lambda number=number: engine.progress.lines == number + 1)  # type: ignore[misc]
    whole = out.read_bytes()
    ends = [frame.end for frame in frames(out)]
    for end in ends[:: len(ends) // 8]:
        out.write_bytes(whole[: end + 7])
        await merge(out, path)
        assert all_lines(out) == LINES[:30]


@pytest.mark.parametrize("times", [1, 5])
async def test_19_rotation_sends_all_again(logs: Path, out: Path, times: int) -> None:
    """A rotated file is read again from its start, for hours: it is known by inode and by content under any name."""
    path, wanted = logs / "app.log", [LINES[0]]
    path.write_bytes(LINES[0])
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 1)
        for number in range(1, times + 1):
            rotate(path)
            path.write_bytes(LINES[number])
            wanted.append(LINES[number])
            await until(lambda: engine.progress.lines == len(wanted))
    for _ in range(2):
        assert (await merge(out, logs)).lines == 0
    once(out, wanted)


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
@pytest.mark.parametrize("down", [False, True], ids=["followed", "down"])
async def test_20_plain_and_packed(logs: Path, out: Path, kind: str, down: bool) -> None:
    """The same data comes twice, plain and packed: a packed file is known by what is in it, and goes on."""
    if kind == "zst" and not any(map(has, ("compression.zstd", "backports.zstd", "zstandard"))):
        pytest.skip("nothing here reads zstd")
    path = logs / "app.log"
    path.write_bytes(HEAD)
    if down:
        await merge(out, logs)
        add(path, LINES[100] + LINES[101])
        path.rename(logs / "app.log.1")
        pack(logs / "app.log.1", kind)
        path.write_bytes(LINES[102])
        await merge(out, logs)
    else:
        async with following(out, logs) as engine:
            await until(lambda: engine.progress.lines == 100)
            add(path, LINES[100] + LINES[101])
            path.rename(logs / "app.log.1")
            path.write_bytes(LINES[102])
            await until(lambda: engine.progress.lines == 103)
            pack(logs / "app.log.1", kind)
            (logs / "other.log").write_bytes(LINES[103])
            await until(lambda: engine.progress.lines == 104)
            (logs / "other.log").unlink()
    pack(path, kind, keep=True)
    assert (await merge(out, logs)).lines == 0
    assert given(out)["app.log"] == b"".join(LINES[:103])
    assert all(frame.header.generation <= 1 for frame in frames(out))
    assert verify(out).gaps == []


async def test_20_packed_files_of_their_own(logs: Path, out: Path) -> None:
    """… one that nobody has read is read unpacked; one that is not complete waits, and is told."""
    (logs / "old.log.gz").write_bytes(gzip.compress(HEAD))
    (logs / "torn.log.xz").write_bytes(lzma.compress(HEAD)[:-8])
    progress = await merge(out, logs)
    assert {Path(name).name: exc.strerror for name, exc in progress.problems.items()} == {
        "torn.log.xz": "xz data is damaged or not complete yet"
    }
    (logs / "torn.log.xz").write_bytes(lzma.compress(HEAD))
    assert not (await merge(out, logs)).problems
    assert given(out) == {"old.log.gz": HEAD, "torn.log.xz": HEAD}
    kinds = {SourceInfo.unpack(f).compression for f in frames(out) if f.header.type is FrameType.SOURCE}
    assert kinds == {Compression.GZIP, Compression.XZ}


async def test_20_packed_while_it_is_open(logs: Path, out: Path) -> None:
    """The same as it happens: a copy that came and went between two looks was read and is still open; packed, it is
    known by what is in it."""
    path = logs / "app.log"
    path.write_bytes(b"".join(LINES[:100]))
    await merge(out, logs / "*.log")
    copytruncate(path, logs / "app.log.2")
    add(path, b"".join(LINES[100:200]))
    shutil.copy(path, logs / "app.log.1")
    os.truncate(path, 0)
    add(path, b"".join(LINES[200:250]))
    async with following(out, logs / "*.log") as engine:
        await until(lambda: engine.progress.lines == 150)
        (logs / "app.log.1").rename(logs / "app.log.2")
        pack(logs / "app.log.2", "gz")
        copytruncate(path, logs / "app.log.1")
        add(path, b"".join(LINES[250:300]))
        await until(lambda: engine.progress.lines >= 200)
    once(out, LINES[:300])


async def test_21_state_files(logs: Path, out: Path) -> None:
    """State files pile up: there is none but the packet file."""
    path = logs / "app.log"
    for number in range(5):
        path.write_bytes(LINES[number])
        await merge(out, path)
        rotate(path)
    assert {entry.name for entry in out.parent.iterdir()} == {"logs", "merged.opk"}
    assert all(entry.name.startswith("app.log") for entry in logs.iterdir())


@pytest.mark.parametrize("sparse", [True, False])
async def test_22_holes(logs: Path, out: Path, tmp_path: Path, sparse: bool) -> None:
    """A program without O_APPEND writes on behind a truncation, and gigabytes of NUL are a line: a hole is stated by
    its length, and split makes it again."""
    path, length = logs / "app.log", (1 << 40) if sparse else (3 << 20) + 5
    with path.open("wb", buffering=0) as program:
        program.write(b"one\nin two ")
        program.truncate(11 + length) if sparse else program.write(bytes(length))
        program.seek(11 + length)
        program.write(b"parts\n" + bytes(4095) + b"three\n")
        async with following(out, path) as engine:
            await until(lambda: engine.progress.lines == 3)
            program.write(bytes(100_000))  # room that it will fill
            await until(lambda: engine.progress.lag_bytes == 100_000)
            program.seek(-100_000, os.SEEK_CUR)
            program.write(b"four\n")
            program.truncate()
            await until(lambda: engine.progress.lines == 4)
    assert out.stat().st_size < 10_000
    with FrameSource(out) as source:
        reader = LineReader(source)
        lines = [line for frame in source for group in reader.feed(frame) for line in group.each()]
    assert lines == [b"one\n", b"in two parts\n", bytes(4095) + b"three\n", b"four\n"]
    assert sum(frame.hole for frame in frames(out)) == length
    assert verify(out).gaps == []
    assert stat(out).bytes == path.stat().st_size
    split(out, tmp_path / "back")
    back = tmp_path / "back" / "app.log"
    assert back.stat().st_size == path.stat().st_size
    with back.open("rb") as one, path.open("rb") as other:
        for place, count in ((0, 5000), (length - 5000, 20_000)):
            one.seek(max(0, place))
            other.seek(max(0, place))
            assert one.read(count) == other.read(count)


@pytest.mark.parametrize("fate", ["packed", "renamed"])
async def test_22_a_copy_of_which_only_a_hole_was_read(logs: Path, out: Path, fate: str) -> None:
    """A program that does not append leaves a hole where its log was cut; so the log holds what was read of a copy of
    it, and is still another file: the copy is looked for."""
    path, copy = logs / "app.log", logs / "app.log.1"
    with path.open("wb", buffering=0) as program:
        for number in range(200):
            program.write(LINES[number])
        await merge(out, path)
        for number in (200, 250):
            if copy.exists():
                copy.rename(logs / "app.log.2")
            copytruncate(path, copy)
            for line in LINES[number : number + 50]:
                program.write(line)
        await merge(out, path)
        once(out, LINES[:300])
        # As a kill leaves it: of the second copy, which has the lines from 200 on, the hole.
        hole = next(f for f in frames(out) if f.header.flags & Flag.HOLE)
        os.truncate(out, hole.end)
        copy.rename(logs / "app.log.3")
        if fate == "packed":
            pack(logs / "app.log.3", "gz")
        copytruncate(path, copy)
        program.write(LINES[300])
    for _ in range(2):
        await merge(out, path)
    once(out, LINES[:301])
    assert verify(out).gaps == []


@pytest.mark.parametrize("lines", [0, 100])
async def test_22_a_log_with_holes_that_is_put_back(logs: Path, out: Path, lines: int) -> None:
    """… and where there is no copy, the file that has the name and holds what was read is the log, put back."""
    path, saved = logs / "app.log", out.with_name("saved")
    path.write_bytes(bytes(8192) + b"".join(LINES[:lines]) + bytes(8192) + LINES[lines])
    await merge(out, path)
    holes = [f for f in frames(out) if f.header.flags & Flag.HOLE]
    os.truncate(out, holes[-1].end)
    shutil.copy2(path, saved)
    saved.replace(path)
    await merge(out, path)
    once(out, LINES[: lines + 1])
    assert verify(out).gaps == []


async def test_23_bom_and_cr(logs: Path, out: Path, tmp_path: Path) -> None:
    """BOM and CR stay in every line, or are lost for good: the packet file has the bytes, a reader may drop them."""
    data = b"\xef\xbb\xbfone\r\ntwo\r\nthree\rand\n"
    (logs / "app.log").write_bytes(data)
    await merge(out, logs)
    split(out, tmp_path / "back")
    assert (tmp_path / "back" / "app.log").read_bytes() == data
    with FrameSource(out) as source:
        reader = LineReader(source, text=True)
        lines = [line for frame in source for group in reader.feed(frame) for line in group.each()]
    assert lines == [b"one\n", b"two\n", b"three\rand\n"]


async def test_24_rename_race(logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file's inode is stored with the old one's offset, for it was asked for by name: what is stored comes from
    the descriptor that was read."""
    path = logs / "app.log"
    path.write_bytes(HEAD)
    number = path.stat().st_ino
    real = os.open
    raced: list[str] = []

    def race(name: str, *args: Any, **options: Any) -> int:
        fd = real(name, *args, **options)
        if name == str(path) and not raced:
            raced.append(name)
            path.rename(logs / "app.log.1")
            path.write_bytes(LINES[500])
        return fd

    monkeypatch.setattr(os, "open", race)
    await merge(out, path)
    monkeypatch.undo()
    infos = [SourceInfo.unpack(frame) for frame in frames(out) if frame.header.type is FrameType.SOURCE]
    assert [info.inode for info in infos] == [number]
    await merge(out, path)
    assert given(out) == {"app.log": HEAD + LINES[500]}


async def test_25_stuck_until_restart(logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that never came leaves a file unread until a restart: whatever is reported, all is looked at now and
    then."""
    monkeypatch.setattr(Watch, "take", lambda watch: set())
    path = logs / "app.log"
    path.write_bytes(LINES[0])
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 1)
        add(path, LINES[1])
        await until(lambda: engine.progress.lines == 2)
        rotate(path)
        path.write_bytes(LINES[2])
        await until(lambda: engine.progress.lines == 3)
    assert all_lines(out) == LINES[:3]


async def test_25_events_that_never_come_are_told_and_done_without(
    logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """… that it was so is counted, and after the second time the folder is looked at by time."""
    monkeypatch.setattr("offload.merge.engine._LOOK", 0.05)
    monkeypatch.setattr(Watch, "_stand_by", lambda watch, folder: None)  # no event ever comes
    path = logs / "app.log"
    path.write_bytes(LINES[0])
    number = 1
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 1 and engine._watch is not None)
        watch = engine._watch
        assert watch is not None
        while not watch.polled:
            add(path, LINES[number])
            os.utime(path, (1, number))  # long ago
            number += 1
            await until(lambda number=number: engine.progress.lines == number)  # type: ignore[misc]
        assert engine.progress.unreported >= 2
        monkeypatch.setattr("offload.merge.engine._LOOK", AMPLE)
        add(path, LINES[number])
        await until(lambda: engine.progress.lines == number + 1)
    assert all_lines(out) == LINES[: number + 1]


def rotate(path: Path, *, packed: str | None = None) -> None:
    """As logrotate: app.log.1 becomes app.log.2, and so on; with `packed`, all behind the first are packed."""
    end = "" if packed is None else f".{packed}"
    numbers = sorted((int(p.name.split(".")[2]) for p in path.parent.glob(f"{path.name}.*")), reverse=True)
    for number in numbers:
        old = path.with_name(f"{path.name}.{number}{end if number > 1 else ''}")
        new = old.rename(path.with_name(f"{path.name}.{number + 1}{end if number > 1 else ''}"))
        if packed is not None and number == 1:
            pack(new, packed)
    path.rename(path.with_name(f"{path.name}.1"))


def pack(path: Path, kind: str, *, keep: bool = False) -> None:
    """As gzip, xz and zstd do: another inode, the time of the last change kept, then the plain one goes."""
    status, data = path.stat(), path.read_bytes()
    packed = path.with_name(f"{path.name}.{kind}")
    if kind == "gz":
        packed.write_bytes(gzip.compress(data))
    elif kind == "xz":
        packed.write_bytes(lzma.compress(data))
    else:
        subprocess.run(["zstd", "-q", str(path), "-o", str(packed)], check=True)
    os.utime(packed, ns=(status.st_atime_ns, status.st_mtime_ns))
    if not keep:
        path.unlink()


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
