"""PacketWriter and PacketReader: each source's order, the bound, COMMIT in time, errors that reach everybody."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.errors import BrokenResourceError, BusyResourceError, ClosedResourceError, PacketError
from offload.files import append as append_module
from offload.files import packet_stream as module
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.files.packet_stream import LINES_BYTES, PacketReader, PacketWriter
from offload.loops import LoopThread
from offload.merge.audit import Verification, verify
from offload.packets.codec import CommitInfo, Frame, SourceInfo
from offload.packets.format import MAX_PAYLOAD, Compression, Flag, FrameType
from offload.packets.recover import Recovery

LINES, PACKETS = FrameType.LINES, FrameType.PACKETS


def frames_of(path: Path, *types: FrameType) -> list[Frame]:
    with FrameSource(path) as source:
        frames = list(source)
        source.end()
    return [frame for frame in frames if not types or frame.header.type in types]


def told(path: Path) -> dict[str, list[bytes | tuple[bytes]]]:
    """What each source says, in order: runs of line bytes, and packets in a tuple each."""
    names: dict[int, str] = {}
    said: dict[str, list[bytes | tuple[bytes]]] = {}
    for frame in frames_of(path):
        number = frame.header.source_id
        if frame.header.type is FrameType.SOURCE:
            names[number] = os.fsdecode(SourceInfo.unpack(frame).path)
        elif frame.header.type is LINES:
            items = said.setdefault(names[number], [])
            last = items[-1] if items else None
            if isinstance(last, bytes):
                items[-1] = last + frame.payload
            else:
                items.append(frame.payload)
        elif frame.header.type is PACKETS:
            said.setdefault(names[number], []).extend((packet,) for packet in frame.packets())
    return said


def sound(path: Path) -> Verification:
    found = verify(path)
    assert found.faults == []
    assert found.torn == 0
    return found


def threads_of_packets() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("packets ", "reader "))]


class Standstill:
    """The writer's thread stands until the test lets it go: a disk as slow as the test wants."""

    def __init__(self, writer: PacketWriter) -> None:
        self._go = threading.Event()
        self._standing = asyncio.Event()
        loop = asyncio.get_running_loop()

        def stand(file: PacketFile) -> None:
            loop.call_soon_threadsafe(self._standing.set)
            self._go.wait()

        self._call = writer.use(stand)

    async def __aenter__(self) -> None:
        await self._standing.wait()

    async def __aexit__(self, *error: object) -> None:
        self._go.set()
        await self._call

    def end(self) -> None:
        self._go.set()


# --- order ------------------------------------------------------------------------------------------------------------


async def test_each_source_keeps_its_order_over_loops_and_threads(tmp_path: Path) -> None:
    """Sources written by several loops and threads at once stand whole and in order, whoever waits for room."""
    path, each = tmp_path / "out.opk", 200

    async def from_loop(source: str) -> None:
        for number in range(each):
            await writer.write(b"%d\n" % number, source)

    def from_thread(source: str) -> None:
        for number in range(each):
            writer.write_packet(b"%d" % number, source)

    async with (
        PacketWriter(path, fsync="none", max_bytes=50) as writer,
        LoopThread("one") as one,
        LoopThread("two") as two,
    ):
        threads = [threading.Thread(target=from_thread, args=(name,)) for name in ("t1", "t2")]
        for thread in threads:
            thread.start()
        await asyncio.gather(from_loop("here"), one.run(from_loop, "one"), two.run(from_loop, "two"))
        for thread in threads:
            thread.join()
    lines = b"".join(b"%d\n" % number for number in range(each))
    packets = [(b"%d" % number,) for number in range(each)]
    assert told(path) == {"here": [lines], "one": [lines], "two": [lines], "t1": packets, "t2": packets}
    assert sound(path).lines == 5 * each


async def test_flush_and_use_cover_a_write_whose_wake_is_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that relies on the wake of another thread's, which is late, comes before a later flush or use."""
    first_is_here, go_on = threading.Event(), threading.Event()
    real = LoopThread.post

    def late(thread: LoopThread, function: Callable[[], object]) -> None:
        first_is_here.set()
        go_on.wait()
        real(thread, function)

    monkeypatch.setattr(LoopThread, "post", late)
    path = tmp_path / "out.opk"
    async with PacketWriter(path, fsync="none") as writer:
        first = threading.Thread(target=lambda: writer.write(b"first\n"))
        first.start()
        first_is_here.wait()
        _ = writer.write(b"second\n")
        lines = await writer.use(lambda file: file.ledger.total_lines)
        go_on.set()
        first.join()
    assert lines == 2
    assert told(path) == {"": [b"first\nsecond\n"]}


async def test_writes_that_wait_together_share_a_frame(tmp_path: Path) -> None:
    """A hundred lines that are there at once make one frame, whatever other source writes between them."""
    path = tmp_path / "out.opk"
    async with PacketWriter(path, fsync="none") as writer, Standstill(writer):
        for number in range(100):
            _ = writer.write(b"%d\n" % number, "a")
            _ = writer.write(b"-\n", "b")
    assert [f.header.count for f in frames_of(path, LINES)] == [100, 100]
    sound(path)


@pytest.mark.parametrize("seed", range(12))
async def test_lines_and_packets_of_one_source_keep_their_order(tmp_path: Path, seed: int) -> None:
    """Pieces of lines, packets, flushes and new runs in any order come back as they were written; all verifies."""
    rng = random.Random(seed)
    path = tmp_path / "out.opk"
    expected: dict[str, list[bytes | tuple[bytes]]] = {}
    for _ in range(3):
        async with PacketWriter(path, fsync="none") as writer:
            for _ in range(rng.randrange(40)):
                name = rng.choice(["a", "b"])
                said = expected.setdefault(name, [])
                data = rng.choice([b"", b"x", b"a line\n", b"\n", b"two\nlines\nand", b"\r\n\0\n", b"\xffOPK"])
                if rng.random() < 0.3:
                    _ = writer.write_packet(data, name)
                    said.append((data,))
                else:
                    _ = writer.write(data, name)
                    if said and isinstance(said[-1], bytes):
                        said[-1] += data
                    elif data:
                        said.append(data)
                if rng.random() < 0.1:
                    await writer.flush()
        sound(path)
    assert told(path) == {name: said for name, said in expected.items() if said}


# --- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", [False, True])
async def test_a_line_of_ten_megabytes_in_odd_pieces(tmp_path: Path, flush: bool) -> None:
    """A giant line comes in fragments, not one byte less, and counts once, whether or not it was flushed midway."""
    path = tmp_path / "out.opk"
    line = random.Random(1).randbytes(10 << 20).replace(b"\n", b"-") + b"\n"
    async with PacketWriter(path, fsync="none") as writer:
        _ = writer.write(b"before\n")
        for at in range(0, len(line), 99_991):
            await writer.write(line[at : at + 99_991])
            if flush and at % 13 == 0:
                await writer.flush()
        _ = writer.write(b"after\n")
    assert told(path) == {"": [b"before\n" + line + b"after\n"]}
    assert max(len(f.payload) for f in frames_of(path)) <= LINES_BYTES
    assert sound(path).lines == 3


@pytest.mark.parametrize("size", [LINES_BYTES - 1, LINES_BYTES, LINES_BYTES + 1, 2 * LINES_BYTES])
@pytest.mark.parametrize("end", ["close", "flush", "packet"])
async def test_a_line_that_ends_with_a_frame_is_counted(tmp_path: Path, size: int, end: str) -> None:
    """A last line without LF counts as one also if it fills its frames to the last byte; what follows goes on right."""
    path = tmp_path / "out.opk"
    async with PacketWriter(path, fsync="none") as writer:
        _ = writer.write(b"x" * size)
        if end == "flush":
            await writer.flush()
        elif end == "packet":
            _ = writer.write_packet(b"p")
    last = frames_of(path, LINES)[-1]
    assert last.header.flags & Flag.UNTERMINATED
    assert sound(path).lines == (2 if end == "packet" else 1)
    async with PacketWriter(path, fsync="none") as writer:
        _ = writer.write(b" end\nnext\n")
    assert sound(path).lines == (4 if end == "packet" else 2)


async def test_a_rest_waits_for_its_end(tmp_path: Path) -> None:
    """Bytes behind the last LF are held until more comes, or the flush; the line is one line in each case."""
    path = tmp_path / "out.opk"
    async with PacketWriter(path, fsync="none") as writer:
        _ = writer.write("whole\nha")
        await writer.use(lambda file: None)
        assert [f.payload for f in frames_of(path, LINES)] == [b"whole\n"]
        _ = writer.write("lf\nno")
        await writer.flush()
        assert told(path) == {"": [b"whole\nhalf\nno"]}
        _ = writer.write(" end\n")
    assert told(path) == {"": [b"whole\nhalf\nno end\n"]}
    assert sound(path).lines == 3


async def test_a_line_goes_on_in_the_next_run(tmp_path: Path) -> None:
    """What a run left without LF and the next run ended is one line."""
    path = tmp_path / "out.opk"
    for piece in (b"one", b" line", b" only\n", b"two\n"):
        async with PacketWriter(path, fsync="none") as writer:
            _ = writer.write(piece, "a")
    assert told(path) == {"a": [b"one line only\ntwo\n"]}
    assert sound(path).lines == 2


# --- packets ----------------------------------------------------------------------------------------------------------


async def test_packets_of_no_bytes_and_of_the_limit(tmp_path: Path) -> None:
    """0 bytes and 16 MiB are packets; more is refused at once and takes no place."""
    path = tmp_path / "out.opk"
    async with PacketWriter(path, fsync="none") as writer:
        _ = writer.write_packet(b"")
        await writer.write_packet(bytes(MAX_PAYLOAD))
        with pytest.raises(PacketError, match=r"packet is 16777217 bytes, limit is 16777216; use write for long lines"):
            _ = writer.write_packet(bytes(MAX_PAYLOAD + 1))
        _ = writer.write_packet("text ä")
    assert [len(packet) for f in frames_of(path, PACKETS) for packet in f.packets()] == [0, MAX_PAYLOAD, 7]
    assert sound(path).lines == 3


@pytest.mark.slow
async def test_packets_that_do_not_fit_one_frame_are_spread_over_several(tmp_path: Path) -> None:
    """A batch whose packets and table of lengths pass 16 MiB by a byte is cut between packets."""
    path = tmp_path / "out.opk"
    sizes = [MAX_PAYLOAD - 4, 0, MAX_PAYLOAD, 1, MAX_PAYLOAD // 2 - 4, MAX_PAYLOAD // 2 - 4, 0, 0]
    async with PacketWriter(path, fsync="none", max_bytes=1 << 30) as writer, Standstill(writer):
        for size in sizes:
            _ = writer.write_packet(bytes(size))
    frames = frames_of(path, PACKETS)
    assert [len(packet) for f in frames for packet in f.packets()] == sizes
    assert [f.header.count for f in frames] == [1, 1, 1, 2, 3]
    sound(path)


async def test_mutable_buffers_are_copied(tmp_path: Path) -> None:
    """A buffer changed after the write, while that still waits, does not change what is written."""
    path = tmp_path / "out.opk"
    buffer = bytearray(b"first\n")
    async with PacketWriter(path, fsync="none") as writer, Standstill(writer):
        _ = writer.write(buffer)
        _ = writer.write_packet(memoryview(buffer)[:2])
        buffer[:] = b"OTHER\n"
    assert told(path) == {"": [b"first\n", (b"fi",)]}


async def test_a_name_that_is_none_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    """A source name that has no bytes raises in the caller; what others wrote with it arrives."""
    path = tmp_path / "out.opk"
    async with PacketWriter(path, fsync="none") as writer:
        _ = writer.write("before\n", "a")
        with pytest.raises(UnicodeEncodeError):
            _ = writer.write("lost\n", "\ud800")
        _ = writer.write("after\n", "\udcff name from bytes")
    assert told(path) == {"a": [b"before\n"], "\udcff name from bytes": [b"after\n"]}


# --- the bound --------------------------------------------------------------------------------------------------------


async def test_over_the_bound_awaiting_a_write_waits(tmp_path: Path) -> None:
    """While the disk stands, a task gets `max_bytes` accepted and one write more, and everything arrives later."""
    path = tmp_path / "out.opk"
    accepted = 0

    async def produce(writer: PacketWriter) -> None:
        nonlocal accepted
        for number in range(100):
            await writer.write(b"%099d\n" % number)
            accepted += 1

    async with PacketWriter(path, fsync="none", max_bytes=1000) as writer:
        standstill = Standstill(writer)
        async with standstill:
            task = asyncio.create_task(produce(writer))
            for _ in range(5):
                await asyncio.sleep(0)
            assert accepted == 10
        await task
    assert told(path) == {"": [b"".join(b"%099d\n" % number for number in range(100))]}


# --- COMMIT and fsync -------------------------------------------------------------------------------------------------


async def test_what_was_written_gets_its_commit_without_being_asked(tmp_path: Path) -> None:
    """After the interval there is a COMMIT behind the write, with an fsync before it, seen by a follower."""
    path = tmp_path / "out.opk"
    async with PacketWriter(path, interval=0.01) as writer, PacketReader(path, follow=True, poll=0.001) as reader:
        for number in range(2):
            _ = writer.write(b"line %d\n" % number)
            end = 0
            async for frame in reader:
                if frame.header.type is LINES:
                    end = frame.end
                elif frame.header.type is FrameType.COMMIT:
                    commit = CommitInfo.unpack(frame)
                    assert commit.total_lines == number + 1
                    assert commit.durable_upto >= end > 0
                    break


async def test_flush_puts_a_commit_behind_and_fsync_makes_it_durable(tmp_path: Path) -> None:
    """When flush returns, the line is in the file under a COMMIT; with fsync that COMMIT covers the line."""
    path = tmp_path / "out.opk"
    async with PacketWriter(path, fsync="none", interval=3600) as writer:
        for fsync in (False, True):
            _ = writer.write("line\n")
            await writer.flush(fsync=fsync)
            *_, line, commit = frames_of(path)
            assert (line.header.type, commit.header.type) == (LINES, FrameType.COMMIT)
            assert CommitInfo.unpack(commit).durable_upto == (line.end if fsync else 0)
        size = path.stat().st_size
        await writer.flush()
        assert path.stat().st_size == size


async def test_use_comes_behind_what_was_written_and_its_errors_are_its_own(tmp_path: Path) -> None:
    """A function sees the file with all earlier writes; what it raises goes to its caller and breaks nothing."""
    path = tmp_path / "out.opk"

    def fail(file: PacketFile) -> None:
        raise KeyError("mine")

    async with PacketWriter(path, fsync="none") as writer:
        _ = writer.write("line\n", "a")
        assert await writer.use(lambda file: file.ledger.total_lines) == 1
        with pytest.raises(KeyError, match="mine"):
            await writer.use(fail)
        _ = writer.write("more\n", "a")
    assert told(path) == {"a": [b"line\nmore\n"]}


# --- what the disk refuses --------------------------------------------------------------------------------------------

LIMITED = """
import asyncio, resource, signal, sys
from offload import BrokenResourceError, ClosedResourceError, PacketWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

async def refused(call):
    try:
        await call()
    except BrokenResourceError as exc:
        assert exc.__cause__.errno == 27, exc.__cause__
        assert "could not be written" in str(exc)
        return
    raise AssertionError("no error")

async def main(path):
    writer = await PacketWriter(path, fsync="none").start()
    _ = writer.write("first\\n", "a")
    await writer.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    _ = writer.write("x" * 2000 + "\\n", "a")
    await refused(writer.flush)
    await refused(lambda: writer.write("y\\n", "a"))
    await refused(lambda: writer.write_packet("y", "a"))
    await refused(lambda: writer.use(lambda file: None))
    await refused(writer.aclose)

    async def block():
        async with PacketWriter(path + "2", fsync="none") as writer:
            await writer.write("x" * 2000 + "\\n", "a")
    await refused(block)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    async with PacketWriter(path) as writer:
        _ = writer.write("second\\n", "a")

asyncio.run(main(sys.argv[1]))
print("done")
"""


async def test_a_full_disk_reaches_every_caller_and_the_file_stays_whole(tmp_path: Path) -> None:
    """flush, write, write_packet, use, aclose and the end of the block raise; the next run goes on at a whole frame."""
    path = tmp_path / "out.opk"
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LIMITED, str(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = await child.communicate()
    assert said == b"done\n", said.decode()
    assert told(path) == {"a": [b"first\nsecond\n"]}
    sound(path)


@pytest.fixture(name="no_fsync")
async def fail_fsync(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when an fsync has failed."""
    failed, loop = asyncio.Event(), asyncio.get_running_loop()

    def refuse(fd: int) -> None:
        loop.call_soon_threadsafe(failed.set)
        raise OSError(errno.EIO, "the disk says no")

    monkeypatch.setattr(append_module, "sync_descriptor", refuse)
    return failed


async def write_line(path: Path, **options: Any) -> None:
    async with PacketWriter(path, **options) as writer:
        await writer.write("line\n")


async def test_an_fsync_that_fails_between_calls_reaches_the_next_one(tmp_path: Path, no_fsync: asyncio.Event) -> None:
    """The interval's fsync has no caller: the next write, and the end, raise what it met."""
    writer = await PacketWriter(tmp_path / "out.opk", interval=0.001).start()
    _ = writer.write("line\n")
    await no_fsync.wait()
    with pytest.raises(BrokenResourceError, match="the disk says no"):
        await writer.flush()
    with pytest.raises(BrokenResourceError, match="the disk says no"):
        _ = writer.write("more\n")
    with pytest.raises(BrokenResourceError, match="the disk says no"):
        await writer.aclose()


@pytest.mark.parametrize("fsync", ["interval", "always"])
async def test_an_fsync_that_fails_at_the_end_is_raised_there(
    tmp_path: Path, no_fsync: asyncio.Event, fsync: Any
) -> None:
    """Closing is not done before the policy's last fsync is; a block that saw no error itself raises."""
    with pytest.raises(BrokenResourceError, match="the disk says no"):
        await write_line(tmp_path / "out.opk", fsync=fsync, interval=3600)
    assert threads_of_packets() == []
    PacketFile(tmp_path / "out.opk", fsync="none").close()  # it is not locked any more


async def test_an_oserror_in_use_breaks_the_writer(tmp_path: Path) -> None:
    """After an OSError with the file in hand nobody knows how it stands: the writer takes nothing more."""

    def refuse(file: PacketFile) -> None:
        raise OSError(errno.ENOSPC, "full")

    writer = await PacketWriter(tmp_path / "out.opk", fsync="none").start()
    for _ in range(2):
        with pytest.raises(BrokenResourceError, match="full"):
            await writer.use(refuse)
    with pytest.raises(BrokenResourceError, match="full"):
        _ = writer.write("x\n")
    with pytest.raises(BrokenResourceError, match="full"):
        await writer.aclose()


# --- cancelling -------------------------------------------------------------------------------------------------------


def hole(path: Path) -> None:
    """A packet file with valid frames behind a damaged one, none of them under a COMMIT."""
    file = PacketFile(path, fsync="none")
    number = file.open_source(SourceInfo(0, 0, 0, 0, Compression.NONE, b"a"))
    file.commit()
    start = file.end
    file.append([Piece(number, b"lost\n", 0, 1), Piece(number, b"behind\n", 5, 1)])
    file.close(broken=True)
    with path.open("r+b") as raw:
        raw.seek(start)
        raw.write(bytes(64))


async def test_cancelling_start_leaves_nothing_open(tmp_path: Path) -> None:
    """Cancelled while it opens the file, start waits for that, lets go of the file, and ends the thread."""
    path = tmp_path / "out.opk"
    hole(path)
    loop, asked, answer = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def mend(recovery: Recovery) -> bool:
        loop.call_soon_threadsafe(asked.set)
        answer.wait()
        return True

    starting = asyncio.create_task(PacketWriter(path, mend=mend).start())
    await asked.wait()
    starting.cancel()
    await asyncio.sleep(0)
    assert not starting.done()
    answer.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert threads_of_packets() == []
    PacketFile(path).close()


async def test_cancelled_waits_take_nothing_back(tmp_path: Path) -> None:
    """A write that waits for room and a flush, both cancelled, drop only themselves; the lines are written."""
    path = tmp_path / "out.opk"
    async with PacketWriter(path, fsync="none", max_bytes=1) as writer:
        async with Standstill(writer):
            writes = writer.write(b"one\n"), writer.write_packet(b"two")
            waits: list[asyncio.Future[None]] = [*map(asyncio.ensure_future, writes), writer.flush()]
            await asyncio.sleep(0)
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
            assert all(wait.cancelled() for wait in waits)
        _ = writer.write(b"three\n")
    assert told(path) == {"": [b"one\n", (b"two",), b"three\n"]}


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelling_aclose_does_not_shorten_it(tmp_path: Path, times: int) -> None:
    """However often it is cancelled, aclose ends when all is written under a COMMIT and the thread is gone."""
    path = tmp_path / "out.opk"
    writer = await PacketWriter(path).start()
    standstill = Standstill(writer)
    await standstill.__aenter__()
    _ = writer.write(b"the end")
    closing = asyncio.create_task(writer.aclose())
    for _ in range(times):
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.sleep(0)
        assert not closing.done()
    standstill.end()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert told(path) == {"": [b"the end"]}
    assert frames_of(path)[-1].header.type is FrameType.COMMIT
    assert threads_of_packets() == []


# --- opening and closing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prepare", "error", "text"),
    [
        (lambda path: path.mkdir(), IsADirectoryError, "Is a directory"),
        (lambda path: path.write_text("a log\n"), PacketError, "byte 0"),
        (hole, PacketError, "damaged up to byte .*, with valid frames behind; keep this file and write to a new one"),
    ],
)
async def test_what_cannot_be_opened_raises_from_start(
    tmp_path: Path, prepare: Callable[[Path], object], error: type[Exception], text: str
) -> None:
    """The reason is the caller's, the file keeps its bytes and is not left locked, the thread is gone."""
    path = tmp_path / "out.opk"
    prepare(path)
    before = path.read_bytes() if path.is_file() else None
    writer = PacketWriter(path)
    with pytest.raises(error, match=text):
        await writer.start()
    assert threads_of_packets() == []
    if before is not None:
        assert path.read_bytes() == before
    with pytest.raises(ClosedResourceError):
        _ = writer.write("x")


async def test_a_missing_folder_and_a_second_writer(tmp_path: Path) -> None:
    """No folder is made; while one writer has the file, another's start raises BusyResourceError."""
    with pytest.raises(FileNotFoundError):
        await PacketWriter(tmp_path / "missing" / "out.opk").start()
    async with PacketWriter(tmp_path / "out.opk") as writer:
        with pytest.raises(BusyResourceError):
            await PacketWriter(tmp_path / "out.opk").start()
        _ = writer.write("mine\n")
    assert told(tmp_path / "out.opk") == {"": [b"mine\n"]}


async def test_mend_decides_about_a_hole(tmp_path: Path) -> None:
    """Asked once, with what stands behind the hole, on the writer's thread; True cuts, and writing goes on soundly."""
    path = tmp_path / "out.opk"
    hole(path)
    asked: list[tuple[int, str]] = []

    def mend(recovery: Recovery) -> bool:
        asked.append((recovery.behind[0].source_off, threading.current_thread().name))
        return True

    async with PacketWriter(path, mend=mend) as writer:
        _ = writer.write("again\n", "a")
    assert asked == [(5, "packets out.opk")]
    assert told(path) == {"a": [b"again\n"]}
    sound(path)


async def test_a_mend_that_says_no_or_fails_leaves_the_file(tmp_path: Path) -> None:
    """False keeps the bytes and raises PacketError; an error of its own is raised as it is; the lock is let go."""
    path = tmp_path / "out.opk"
    hole(path)
    before = path.read_bytes()

    def fail(recovery: Recovery) -> bool:
        raise KeyError("mine")

    with pytest.raises(PacketError, match="damaged"):
        await PacketWriter(path, mend=lambda recovery: False).start()
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            await PacketWriter(path, mend=fail).start()
    assert path.read_bytes() == before


async def test_before_start_and_after_close_nothing_is_accepted(tmp_path: Path) -> None:
    """A write outside the writer's life raises ClosedResourceError and says what to do."""
    writer = PacketWriter(tmp_path / "out.opk")
    for call in (writer.write, writer.write_packet):
        with pytest.raises(ClosedResourceError, match=r"is not open; use it as `async with`, or await its start\(\)"):
            _ = call("x")
    assert not (tmp_path / "out.opk").exists()
    await writer.start()
    await writer.aclose()
    for call in (writer.write, writer.write_packet):
        with pytest.raises(ClosedResourceError, match=r"out.opk is closed"):
            _ = call("x")
    assert (tmp_path / "out.opk").read_bytes() == b""


async def test_interpreter_exit_writes_what_a_forgotten_writer_accepted(tmp_path: Path) -> None:
    """A program that ends without closing its writer has every line and the last COMMIT in the file."""
    path = tmp_path / "out.opk"
    code = """
import asyncio, sys
from offload import PacketWriter
async def main():
    global writer
    writer = await PacketWriter(sys.argv[1]).start()
    for number in range(1000):
        _ = writer.write(f"{number}\\n", "a")
    _ = writer.write("no end", "a")
asyncio.run(main())
"""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(path))
    assert await child.wait() == 0
    assert told(path) == {"a": [b"".join(b"%d\n" % number for number in range(1000)) + b"no end"]}
    assert frames_of(path)[-1].header.type is FrameType.COMMIT
    assert sound(path).lines == 1001


@pytest.mark.slow
@pytest.mark.peer("strace")
async def test_the_loop_thread_makes_no_system_call_on_the_file(tmp_path: Path) -> None:
    """Opening, recovering, writing, syncing, reading and closing happen on the threads of writer and reader."""
    code = """
import asyncio, os, sys
from offload import PacketReader, PacketWriter
async def main():
    for _ in range(2):
        async with PacketWriter(sys.argv[1]) as writer:
            await writer.write("line\\n")
            await writer.flush(fsync=True)
            _ = writer.write("line\\n")
    async with PacketReader(sys.argv[1]) as reader:
        print(len([frame async for frame in reader]) > 4, os.getpid())
asyncio.run(main())
"""
    path, trace = tmp_path / "out.opk", tmp_path / "trace"
    program = shutil.which("strace")
    assert program is not None
    command = [program, "-f", "-qq", "-o", str(trace), "-P", str(path), sys.executable, "-c", code, str(path)]
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, complaint = await child.communicate()
    if b"ptrace" in complaint.lower():
        pytest.skip("this system does not let processes be traced")
    good, pid = said.decode().split()
    lines = trace.read_text().splitlines()
    assert good == "True"
    assert {line.split()[0] for line in lines}.isdisjoint({pid})
    called = {match[1] for line in lines if (match := re.match(r"\d+ +(\w+)\(", line))}
    assert called >= {"openat", "writev", "fdatasync", "flock", "pread64", "close"}


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_a_reader_gives_every_frame_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the reads, the frames are those of the file; reading them runs on the reader's thread."""
    path = tmp_path / "out.opk"
    async with PacketWriter(path, fsync="none") as writer:
        for number in range(50):
            _ = writer.write(b"%d\n" % number, f"source {number % 7}")
            await writer.flush()
    monkeypatch.setattr("offload.files.frame_source.READ_BYTES", 100)
    async with PacketReader(path) as reader:
        frames = [frame async for frame in reader]
    assert frames == frames_of(path)


async def test_a_torn_tail_ends_a_reader_with_an_error_and_a_follower_not(tmp_path: Path) -> None:
    """Without `follow` a last frame that is not whole is PacketError at its place; for a follower it is "not yet"."""
    path = tmp_path / "out.opk"
    async with PacketWriter(path, fsync="none") as writer:
        _ = writer.write("line\n")
    whole = frames_of(path)
    os.truncate(path, whole[-1].offset + 62)  # the rest of this header would not go with that of another run's
    async with PacketReader(path) as reader:
        frames = aiter(reader)
        assert [await anext(frames) for _ in whole[:-1]] == whole[:-1]
        with pytest.raises(PacketError, match="torn tail") as info:
            await anext(frames)
        assert info.value.offset == whole[-1].offset
    async with PacketReader(path, follow=True, poll=0.001) as reader:
        frames = aiter(reader)
        assert [await anext(frames) for _ in whole[:-1]] == whole[:-1]
        following = asyncio.ensure_future(anext(frames))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(following), 0.01)
        async with PacketWriter(path, fsync="none") as writer:  # cuts the torn frame, and writes its own
            _ = writer.write("more\n")
        assert (await following).header.type is FrameType.COMMIT
        assert (await anext(frames)).payload == b"more\n"


KILLED = """
import asyncio, sys
from offload import PacketWriter
async def main():
    async with PacketWriter(sys.argv[1], fsync="none", interval=0.001) as writer:
        start = await writer.use(lambda file: file.ledger.total_lines)
        for number in range(start, start + 20_000):
            await writer.write(f"{number} {'.' * (number * 37 % 1000)}\\n")
            if number % 10 == 0:
                await asyncio.sleep(0)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_follower_of_a_writer_that_is_killed_and_started_again(tmp_path: Path) -> None:
    """Through three kill -9, a follower gets each line once and in order, and never an error."""
    path = tmp_path / "out.opk"
    path.write_bytes(b"")
    expected = 0
    async with PacketReader(path, follow=True, poll=0.001) as reader:
        frames = aiter(reader)
        for _ in range(3):
            child = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, str(path))
            target = expected + 1000
            while expected < target:
                frame = await anext(frames)
                for line in frame.lines() if frame.header.type is LINES else ():
                    assert line.startswith(b"%d " % expected)
                    assert line.endswith(b"\n")
                    expected += 1
            child.send_signal(signal.SIGKILL)
            await child.wait()
    PacketFile(path, fsync="none").close()
    assert sound(path).lines >= expected


async def test_a_reader_that_is_not_open_says_so(tmp_path: Path) -> None:
    """Iterating before start or after close raises ClosedResourceError; a missing file raises from start."""
    reader = PacketReader(tmp_path / "out.opk")
    with pytest.raises(ClosedResourceError, match="is not open"):
        await anext(aiter(reader))
    with pytest.raises(FileNotFoundError):
        await reader.start()
    assert threads_of_packets() == []
    (tmp_path / "out.opk").write_bytes(b"")
    async with PacketReader(tmp_path / "out.opk") as reader:
        assert [frame async for frame in reader] == []
    with pytest.raises(ClosedResourceError):
        await anext(aiter(reader))


async def test_cancelling_a_follower_ends_it(tmp_path: Path) -> None:
    """A task that follows a file can be cancelled while it waits for more, and leaves nothing open."""
    path = tmp_path / "out.opk"
    path.write_bytes(b"")
    entered = asyncio.Event()

    async def follow() -> None:
        async with PacketReader(path, follow=True) as reader:
            entered.set()
            async for _ in reader:
                raise AssertionError("the file is empty")

    task = asyncio.create_task(follow())
    await entered.wait()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert threads_of_packets() == []


def pieces_of(text: bytes, rng: random.Random) -> Iterator[bytes]:
    at = 0
    while at < len(text):
        size = rng.randrange(1, 40)
        yield text[at : at + size]
        at += size


@pytest.mark.parametrize("limit", [16, 17, 64])
async def test_lines_longer_than_a_frame_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Lines around the size of a frame, in pieces of any size, come back whole, counted once each."""
    monkeypatch.setattr(module, "LINES_BYTES", limit)
    rng = random.Random(limit)
    path = tmp_path / "out.opk"
    text = b"".join(
        b"x" * rng.choice([0, 1, limit - 2, limit - 1, limit, limit + 1, 3 * limit]) + b"\n" for _ in range(60)
    )
    async with PacketWriter(path, fsync="none") as writer:
        for piece in pieces_of(text, rng):
            _ = writer.write(piece)
            if rng.random() < 0.2:
                await writer.flush()
    assert told(path) == {"": [text]}
    assert max(len(f.payload) for f in frames_of(path, LINES)) <= limit
    assert sound(path).lines == 60
