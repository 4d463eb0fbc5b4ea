"""FileSink: order, the bound, whole writes only, errors that reach everybody, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.errors import BrokenResourceError, ClosedResourceError
from offload.files import append as append_module
from offload.files.append import AppendFile, whole_pieces
from offload.files.intake import DONE, Intake
from offload.files.sink import FileSink
from offload.loops import LoopThread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="named pipes of a set size, /dev/full, strace")

PIPE_BYTES = 4096


class StandingReader:
    """A named pipe whose reader stands still until it is asked: a disk as slow as the test wants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    async def take(self, count: int) -> bytes:
        """The next `count` bytes, or what there is up to the end."""
        loop, parts, left = asyncio.get_running_loop(), [], count
        while left:
            readable = asyncio.Event()
            loop.add_reader(self._fd, readable.set)
            await readable.wait()
            loop.remove_reader(self._fd)
            with contextlib.suppress(BlockingIOError):
                parts.append(os.read(self._fd, left))
                if not parts[-1]:
                    break
                left -= len(parts[-1])
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture(name="pipe")
def open_pipe(tmp_path: Path) -> Iterator[StandingReader]:
    """Closed before the sink is: a writer that still waits for it gets an error instead of waiting for ever."""
    pipe = StandingReader(tmp_path / "pipe")
    yield pipe
    pipe.close()


BLOCK = b"#" * (2 * PIPE_BYTES)  # the thread that writes this stands until somebody reads


@contextlib.contextmanager
def eager_switches() -> Iterator[None]:
    """Threads take the GIL from each other as often as they can, so that races happen."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def run_python(code: str, *arguments: object, expect: int = 0, before: list[str] | None = None) -> str:
    """What a program of its own prints, stdout and stderr together."""
    command = [*(before or []), sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
    assert done.returncode == expect, done.stdout
    return done.stdout


def run_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- order ------------------------------------------------------------------------------------------------------------


async def test_writes_land_in_the_order_made(tmp_path: Path) -> None:
    """Ten thousand writes that nobody awaits stand in the file in their order."""
    path = tmp_path / "out"
    async with FileSink(path) as sink:
        for number in range(10_000):
            _ = sink.write(f"{number}\n")
    assert path.read_text().split() == [str(n) for n in range(10_000)]


async def test_loops_and_threads_write_whole_and_in_order(tmp_path: Path) -> None:
    """What several loops and threads write under pressure lands whole, each one's in its order, none twice."""
    path, each = tmp_path / "out", 300

    async def from_loop(name: str) -> None:
        for number in range(each):
            await sink.write(f"{name} {number} {'x' * (number % 37)}\n")

    async def from_loops() -> None:
        async with LoopThread("one") as one, LoopThread("two") as two:
            await asyncio.gather(from_loop("here"), one.run(from_loop, "one"), two.run(from_loop, "two"))

    def from_thread(name: str) -> None:
        for number in range(each):
            sink.write(f"{name} {number} {'x' * (number % 37)}\n")

    with eager_switches():
        async with FileSink(path, max_bytes=200) as sink:
            threads = [threading.Thread(target=from_thread, args=(name,)) for name in ("t1", "t2", "t3")]
            for thread in threads:
                thread.start()
            await from_loops()
            for thread in threads:
                thread.join()
    seen: dict[str, int] = {}
    for line in path.read_text().splitlines():
        name, number, filling = line.split(" ")
        assert (int(number), len(filling)) == (seen.get(name, 0), int(number) % 37)
        seen[name] = int(number) + 1
    assert seen == dict.fromkeys(("here", "one", "two", "t1", "t2", "t3"), each)


async def test_a_write_made_after_another_lands_after_it(tmp_path: Path) -> None:
    """Threads that take turns under a lock of their own find their writes in the order of their turns."""
    path, lock, numbers = tmp_path / "out", threading.Lock(), itertools.count()

    def work(number: int) -> None:
        for _ in range(300):
            with lock:
                sink.write(f"{next(numbers)}\n")

    with eager_switches():
        async with FileSink(path) as sink:
            run_threads(work, 4)
    assert path.read_text().split() == [str(n) for n in range(1200)]


async def test_flush_returns_when_the_writes_before_it_are_in_the_file(tmp_path: Path) -> None:
    """After each flush the file holds exactly what was written before it."""
    path = tmp_path / "out"
    async with FileSink(path) as sink:
        for number in range(1, 50):
            _ = sink.write(b"ab")
            await sink.flush()
            assert path.stat().st_size == 2 * number


async def test_flush_covers_a_write_whose_wake_is_still_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that another thread made first, and relies on its wake, is in the file when the flush returns."""
    first_is_here, go_on = threading.Event(), threading.Event()
    real = LoopThread.post

    def late(thread: LoopThread, function: Callable[[], object]) -> None:
        first_is_here.set()
        go_on.wait()
        real(thread, function)

    monkeypatch.setattr(LoopThread, "post", late)
    path = tmp_path / "out"
    async with FileSink(path) as sink:
        first = threading.Thread(target=lambda: sink.write(b"first,"))
        first.start()
        first_is_here.wait()
        _ = sink.write(b"second")
        await sink.flush()
        found = path.read_bytes()
        go_on.set()
        first.join()
    assert found == b"first,second"


async def test_what_waits_goes_out_in_one_system_call(pipe: StandingReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred writes made while the thread is busy cost one write of the system."""
    calls: list[int] = []
    real = os.write

    def counting(fd: int, data: Any) -> int:
        calls.append(len(data))
        return real(fd, data)

    monkeypatch.setattr(os, "write", counting)
    async with FileSink(pipe.path) as sink:
        _ = sink.write(BLOCK)
        flushed = sink.flush()
        await pipe.take(1)  # the first write is under way
        for _ in range(100):
            _ = sink.write(b"twenty bytes a piece")
        await pipe.take(len(BLOCK) - 1 + 2000)
        await flushed
    assert calls == [len(BLOCK), 2000]


# --- the bound --------------------------------------------------------------------------------------------------------


async def test_over_the_bound_awaiting_a_write_waits(pipe: StandingReader) -> None:
    """While the disk stands, a task gets `max_bytes` accepted and one write more, then it waits; nothing is lost."""
    accepted = 0

    async def produce(sink: FileSink) -> None:
        nonlocal accepted
        for number in range(100):
            await sink.write(b"%0999d\n" % number)
            accepted += 1

    async with FileSink(pipe.path, max_bytes=len(BLOCK) + 10_000) as sink:
        await sink.write(BLOCK)
        task = asyncio.create_task(produce(sink))
        await pipe.take(1)  # the thread is in the middle of the block: nothing is taken until that is written
        assert accepted == 10
        got = await pipe.take(len(BLOCK) - 1 + 100_000)
        await task
    assert got[len(BLOCK) - 1 :] == b"".join(b"%0999d\n" % number for number in range(100))


async def test_a_write_over_the_bound_is_accepted_and_ends_when_it_is_written(pipe: StandingReader) -> None:
    """One piece larger than the bound goes through; its write is done when the disk has it, not before."""
    async with FileSink(pipe.path, max_bytes=10) as sink:
        waiting = asyncio.ensure_future(sink.write(BLOCK))
        assert len(await pipe.take(PIPE_BYTES - 1)) == PIPE_BYTES - 1
        assert not waiting.done()
        await pipe.take(len(BLOCK) - PIPE_BYTES + 1)
        await waiting


async def test_a_thread_without_a_loop_waits_in_write(pipe: StandingReader) -> None:
    """In a plain thread `write` itself returns only when there is room again."""
    reading = threading.Event()
    returned: list[bool] = []
    wrote = threading.Event()

    def work() -> None:
        sink.write(BLOCK)
        returned.append(reading.is_set())
        wrote.set()

    async with FileSink(pipe.path, max_bytes=100) as sink:
        thread = threading.Thread(target=work)
        thread.start()
        assert len(await pipe.take(1)) == 1  # the sink's thread writes, and the pipe is full
        assert not wrote.is_set()
        reading.set()
        await pipe.take(len(BLOCK) - 1)
        thread.join()
    assert returned == [True]


async def test_the_wait_for_room_does_not_end_before_the_item_is_taken() -> None:
    """A second writer's wait covers its item although the first writer, who wakes the thread for both, is late."""

    class LatePost(LoopThread):
        def post(self, function: Callable[[], object]) -> None:
            first_is_here.set()
            go_on.wait()
            super().post(function)

    first_is_here, go_on = threading.Event(), threading.Event()
    taken: list[str] = []
    async with LatePost("late") as thread:
        intake: Intake[str] = Intake(thread, taken.extend, 10)
        first = threading.Thread(target=lambda: intake.put("first", 1))
        first.start()
        first_is_here.wait()
        await intake.put("second", 100)
        found = list(taken), intake.waiting_bytes
        go_on.set()
        first.join()
    assert found == (["first", "second"], 0)


async def test_awaiting_a_write_within_the_bound_keeps_the_loop(tmp_path: Path) -> None:
    """A write that has room costs no turn of the loop, and what it returns can be gathered or waited for."""
    turns: list[None] = []
    async with FileSink(tmp_path / "out") as sink:
        asyncio.get_running_loop().call_soon(turns.append, None)
        for _ in range(10):
            await sink.write(b"x")
        assert not turns
        await asyncio.gather(sink.write(b"y"), asyncio.wait_for(DONE, 5))
    assert (tmp_path / "out").read_bytes() == b"x" * 10 + b"y"


def test_a_bound_below_one_is_refused(tmp_path: Path) -> None:
    """max_bytes=0 would never have room."""
    with pytest.raises(ValueError, match="max_bytes is 0, expected at least 1"):
        FileSink(tmp_path / "out", max_bytes=0)


# --- what is written --------------------------------------------------------------------------------------------------


async def test_mutable_buffers_are_copied(pipe: StandingReader) -> None:
    """What the caller does with its buffer after `write` does not show, even while the write still waits."""
    buffer = bytearray(b"first")
    async with FileSink(pipe.path) as sink:
        _ = sink.write(BLOCK)
        _ = sink.write(buffer)
        _ = sink.write(memoryview(buffer)[1:3])
        buffer[:] = b"OTHER"
        assert (await pipe.take(len(BLOCK) + 7))[len(BLOCK) :] == b"firstir"


async def test_text_is_encoded_as_told_and_bad_text_is_refused_at_once(tmp_path: Path) -> None:
    """The encoding is the sink's; text that it cannot hold raises in the caller and takes no place."""
    async with FileSink(tmp_path / "out", encoding="latin-1") as sink:
        _ = sink.write("ä")
        with pytest.raises(UnicodeEncodeError):
            _ = sink.write("€")
        _ = sink.write("ö")
    assert (tmp_path / "out").read_bytes() == b"\xe4\xf6"


async def test_append_goes_on_and_append_false_begins_anew(tmp_path: Path) -> None:
    """An existing file is continued, unless the sink is told to empty it."""
    path = tmp_path / "out"
    for options, content in (({}, b"1"), ({}, b"11"), ({"append": False}, b"1")):
        async with FileSink(path, **options) as sink:  # type: ignore[arg-type]
            _ = sink.write(b"1")
        assert path.read_bytes() == content


async def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes three bytes a call gets all of them, in order, for one buffer and for many."""
    real_write, real_writev = os.write, os.writev
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, bytes(data)[:3]))
    monkeypatch.setattr(os, "writev", lambda fd, buffers: real_writev(fd, [b"".join(buffers)[:5]]))
    async with FileSink(tmp_path / "out") as sink:
        for number in range(100):
            _ = sink.write(f"{number},")
    assert (tmp_path / "out").read_text() == "".join(f"{number}," for number in range(100))
    file = AppendFile(tmp_path / "many")
    file.append([b"abc", b"", b"defgh", b"i"], lambda taken: 0)
    file.append([], lambda taken: 0)
    file.close()
    assert (tmp_path / "many").read_bytes() == b"abcdefghi"
    assert file.end == 9


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    """An append of five thousand buffers is whole although the system takes a thousand at once."""
    file = AppendFile(tmp_path / "out")
    file.append([b"%d," % number for number in range(5000)], lambda taken: 0)
    file.close()
    assert (tmp_path / "out").read_bytes() == b"".join(b"%d," % number for number in range(5000))


@pytest.mark.parametrize(("sizes", "taken", "kept"), [([], 0, 0), ([3, 4], 2, 0), ([3, 4], 3, 3), ([3, 0, 4], 9, 7)])
def test_whole_pieces(sizes: list[int], taken: int, kept: int) -> None:
    """Of the bytes taken, those of whole pieces stay."""
    assert whole_pieces(sizes, taken) == kept


# --- what the disk refuses --------------------------------------------------------------------------------------------


async def write_all(path: Path | str, *pieces: bytes) -> None:
    async with FileSink(path) as sink:
        for piece in pieces:
            _ = sink.write(piece)


async def test_a_full_disk_reaches_flush_write_and_close() -> None:
    """ENOSPC is raised by the flush, by each later write and flush, and each time the sink is closed."""
    sink = await FileSink("/dev/full").start()
    _ = sink.write(b"accepted")
    calls: list[Callable[[], Awaitable[None]]] = [
        sink.flush,
        lambda: sink.write(b"more"),
        lambda: sink.flush(fsync=True),
        sink.aclose,
        sink.aclose,
    ]
    for call in calls:
        with pytest.raises(BrokenResourceError, match=r"sink /dev/full could not be written: .*No space") as info:
            await call()
        assert isinstance(info.value.__cause__, OSError)
        assert info.value.__cause__.errno == errno.ENOSPC


async def test_a_write_that_was_accepted_fails_loudly_without_flush() -> None:
    """A block that writes and ends raises at its end, although no call of its own failed."""
    with pytest.raises(BrokenResourceError, match="No space left"):
        await write_all("/dev/full", b"accepted")


async def test_the_error_in_the_block_is_not_hidden() -> None:
    """The block's own BrokenResourceError goes on as it is; another error is the context of the broken sink's."""
    inner: list[BaseException] = []

    async def flush_in_block() -> None:
        async with FileSink("/dev/full") as sink:
            _ = sink.write(b"x")
            try:
                await sink.flush()
            except BrokenResourceError as exc:
                inner.append(exc)
                raise

    async def fail_in_block() -> None:
        async with FileSink("/dev/full") as sink:
            _ = sink.write(b"x")
            raise KeyError("mine")

    with pytest.raises(BrokenResourceError) as info:
        await flush_in_block()
    assert info.value is inner[0]
    with pytest.raises(BrokenResourceError) as other:
        await fail_in_block()
    assert isinstance(other.value.__context__, KeyError)


async def test_a_failed_fsync_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an fsync error nobody can tell what is on the disk: no later call goes on as if nothing had happened."""

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "the disk says no")

    monkeypatch.setattr(append_module, "sync_descriptor", refuse)
    sink = await FileSink(tmp_path / "out").start()
    _ = sink.write(b"x")
    await sink.flush()
    with pytest.raises(BrokenResourceError, match="the disk says no"):
        await sink.flush(fsync=True)
    with pytest.raises(BrokenResourceError, match="the disk says no"):
        _ = sink.write(b"y")
    with pytest.raises(BrokenResourceError, match="the disk says no"):
        await sink.aclose()
    assert (tmp_path / "out").read_bytes() == b"x"


LIMITED = """
import asyncio, os, resource, signal, sys
from offload import BrokenResourceError, FileSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
pieces = [b"%03d" % n * 100 + b"%0699d\\n" % n for n in range(8)]

async def main(path, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        async with FileSink(path) as sink:
            for piece in pieces:
                _ = sink.write(piece)
    except BrokenResourceError as exc:
        assert exc.__cause__.errno == 27, exc.__cause__
    else:
        raise AssertionError("no error")
    found = open(path, "rb").read()
    assert found == b"".join(pieces[: limit // 1000]), (limit, len(found))
    # And going on from there gives whole writes again.
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    async with FileSink(path) as sink:
        await sink.write(b"again")
    assert open(path, "rb").read() == found + b"again"

for limit in (0, 1, 999, 1000, 1001, 4321, 7999):
    asyncio.run(main(f"{sys.argv[1]}{limit}", limit))
print("done")
"""


def test_a_partial_write_is_cut_back_to_the_last_whole_write(tmp_path: Path) -> None:
    """Wherever in a batch the disk stops, the file ends with the last write that fits as a whole."""
    assert run_python(LIMITED, tmp_path / "out") == "done\n"


SHARED = """
import asyncio, os, resource, signal, sys
from offload import BrokenResourceError, FileSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

async def main(path):
    other = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    sink = await FileSink(path).start()
    _ = sink.write(b"first\\n")
    await sink.flush()
    os.write(other, b"theirs\\n" * 100)
    await sink.write(b"second\\n")
    await sink.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 + 700 + 7 + 11, hard))
    _ = sink.write(b"third\\n" * 2)
    try:
        await sink.aclose()
    except BrokenResourceError:
        pass
    assert open(path, "rb").read() == b"first\\n" + b"theirs\\n" * 100 + b"second\\n", open(path, "rb").read()[-40:]
    # Emptied by somebody: no NULs come in when a write fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    sink = await FileSink(path).start()
    os.truncate(path, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    _ = sink.write(b"0123456789")
    try:
        await sink.aclose()
    except BrokenResourceError:
        pass
    assert open(path, "rb").read() == b"", open(path, "rb").read()

asyncio.run(main(sys.argv[1]))
print("done")
"""


def test_cutting_back_takes_no_bytes_of_others(tmp_path: Path) -> None:
    """A log that another process appends to or empties keeps that one's bytes, and gets no NULs, when a write fails."""
    assert run_python(SHARED, tmp_path / "out") == "done\n"


@pytest.fixture(name="small_disk")
def mount_small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 pages."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs may not be mounted here; it takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_file_system_keeps_whole_writes(small_disk: Path) -> None:
    """On a file system that fills up within a batch, the file is the longest row of whole writes that fits."""
    pieces = [b"%0999d\n" % number for number in range(100)]
    with pytest.raises(BrokenResourceError, match="No space left"):
        await write_all(small_disk / "out", *pieces)
    assert (small_disk / "out").read_bytes() == b"".join(pieces[:65])


# --- cancelling -------------------------------------------------------------------------------------------------------


async def test_cancelling_start_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while the file is being opened, start waits for that, closes the file again and ends the thread."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    async with FileSink(tmp_path / "first"):
        pass  # this loop has its way back now, which it keeps
    gc.collect()  # what earlier tests left in cycles would go while we look
    before = set(os.listdir("/proc/self/fd"))
    sink = FileSink(path)
    starting = asyncio.create_task(sink.start())
    opening = asyncio.Event()
    loop = asyncio.get_running_loop()
    real = os.open

    def telling(*arguments: Any) -> int:
        loop.call_soon_threadsafe(opening.set)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", telling)
        await opening.wait()  # the sink's thread opens the pipe, which lasts until somebody reads
    starting.cancel()
    await asyncio.sleep(0)
    assert not starting.done()
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(asyncio.CancelledError):
        await starting
    os.close(reader)
    assert not any(thread.name == "sink pipe" for thread in threading.enumerate())
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ClosedResourceError):
        _ = sink.write(b"x")


async def test_cancelling_a_wait_for_room_does_not_take_the_piece_back(pipe: StandingReader) -> None:
    """The piece stays at its place; a wait that is cancelled while it is queued, and one that runs, both end so."""
    async with FileSink(pipe.path, max_bytes=1) as sink:
        tasks = [asyncio.ensure_future(sink.write(piece)) for piece in (BLOCK, b"queued", b"after")]
        await pipe.take(1)
        for task in tasks[:2]:
            task.cancel()
        assert (await pipe.take(len(BLOCK) + 10))[len(BLOCK) - 1 :] == b"queuedafter"
        await tasks[2]
        assert [task.cancelled() for task in tasks] == [True, True, False]


async def test_cancelling_a_flush_takes_nothing_back(pipe: StandingReader) -> None:
    """A cancelled flush drops only itself: what it would have waited for lands, and the next flush holds."""
    async with FileSink(pipe.path) as sink:
        _ = sink.write(BLOCK)
        await pipe.take(1)
        _ = sink.write(b"more")
        flushing = asyncio.ensure_future(sink.flush())
        await asyncio.sleep(0)
        flushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flushing
        flushed = sink.flush()
        assert (await pipe.take(len(BLOCK) + 3)).endswith(b"more")
        await flushed


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelling_aclose_does_not_shorten_it(pipe: StandingReader, times: int) -> None:
    """However often it is cancelled, aclose ends when everything is written and the thread is gone."""
    sink = await FileSink(pipe.path).start()
    _ = sink.write(BLOCK + b"the end")
    closing = asyncio.create_task(sink.aclose())
    for _ in range(times):
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.sleep(0)
        assert not closing.done()
    got = await pipe.take(len(BLOCK) + 7)
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert got.endswith(b"the end")
    assert not any(thread.name == "sink pipe" for thread in threading.enumerate())


async def test_a_cancelled_block_writes_what_it_was_given(tmp_path: Path) -> None:
    """`async with` left by cancellation has written everything."""
    entered = asyncio.Event()

    async def block() -> None:
        async with FileSink(tmp_path / "out") as sink:
            for number in range(1000):
                _ = sink.write(f"{number}\n")
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(block())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (tmp_path / "out").read_text().split() == [str(n) for n in range(1000)]


# --- opening and closing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error"), [("missing/out", FileNotFoundError), (".", IsADirectoryError), ("a\0b", ValueError)]
)
async def test_what_cannot_be_opened_raises_from_start(tmp_path: Path, name: str, error: type[Exception]) -> None:
    """The error of opening is the caller's, no thread is left, and the sink says what it is when used."""
    sink = FileSink(tmp_path / name)
    with pytest.raises(error):
        await sink.start()
    assert not any(thread.name.startswith("sink ") for thread in threading.enumerate())
    with pytest.raises(ClosedResourceError, match="is not open"):
        _ = sink.write(b"x")


@pytest.mark.skipif(os.geteuid() != 0, reason="root gives up its rights in this test")
def test_no_permission_raises_from_start(tmp_path: Path) -> None:
    """A file that may not be written raises PermissionError."""
    (tmp_path / "out").write_bytes(b"")
    code = """
import asyncio, os, sys
from offload import FileSink
async def main():
    await FileSink(sys.argv[1]).start()
try:
    sink = FileSink  # imported before the rights are gone
    os.setuid(65534)
    asyncio.run(main())
except PermissionError as exc:
    print("refused", exc.filename)
"""
    assert run_python(code, tmp_path / "out") == f"refused {tmp_path / 'out'}\n"


async def test_before_start_and_after_close_nothing_is_accepted(tmp_path: Path) -> None:
    """A write or flush outside the sink's life raises ClosedResourceError and says what to do."""
    sink = FileSink(tmp_path / "out")
    with pytest.raises(ClosedResourceError, match=r"is not open; use it as `async with`, or await its start\(\)"):
        _ = sink.write(b"x")
    with pytest.raises(ClosedResourceError, match="is not started"):
        _ = sink.flush()
    assert not (tmp_path / "out").exists()
    await sink.start()
    await sink.aclose()
    with pytest.raises(ClosedResourceError, match=r"sink .*out is closed"):
        _ = sink.write(b"x")
    with pytest.raises(ClosedResourceError, match="is closed"):
        await sink.flush()
    await sink.aclose()
    assert (tmp_path / "out").read_bytes() == b""


async def test_writes_race_with_close(tmp_path: Path) -> None:
    """A write that was accepted while another thread closed is in the file; one that was not raised."""
    loop = asyncio.get_running_loop()
    with eager_switches():
        for attempt in range(30):
            path = tmp_path / str(attempt)
            accepted: list[int] = []
            begun = asyncio.Event()
            sink = await FileSink(path).start()

            def work(sink: FileSink = sink, accepted: list[int] = accepted, begun: asyncio.Event = begun) -> None:
                with contextlib.suppress(ClosedResourceError):
                    for number in range(100_000):
                        sink.write(f"{number}\n")
                        accepted.append(number)
                        if number == 10:
                            loop.call_soon_threadsafe(begun.set)

            thread = threading.Thread(target=work)
            thread.start()
            await begun.wait()
            await sink.aclose()
            thread.join()
            assert path.read_text().split() == [str(n) for n in accepted]


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise KeyError('boom')"])
def test_interpreter_exit_writes_what_a_forgotten_sink_accepted(tmp_path: Path, end: str) -> None:
    """A program that ends, by whatever way, without closing its sink has everything in the file."""
    code = f"""
import asyncio, sys
from offload import FileSink
async def main():
    global sink
    sink = await FileSink(sys.argv[1]).start()
    for number in range(5000):
        _ = sink.write(f"{{number}}\\n")
    {end}
asyncio.run(main())
"""
    run_python(code, tmp_path / "out", expect=3 if "Exit" in end else 1 if end else 0)
    assert (tmp_path / "out").read_text().split() == [str(n) for n in range(5000)]


def test_interpreter_exit_tells_what_could_not_be_written() -> None:
    """What the disk refuses at the very end is told on stderr: nothing is lost in silence."""
    code = """
import asyncio, sys
from offload import FileSink
async def main():
    global sink
    sink = await FileSink("/dev/full").start()
    _ = sink.write("lost")
asyncio.run(main())
"""
    said = run_python(code)
    assert "'sink full' could not be closed at the program's end" in said
    assert "No space left" in said


@pytest.mark.parametrize("pending", [False, True])
def test_in_a_forked_child_every_write_raises(tmp_path: Path, pending: bool) -> None:
    """A child never believes that its write was accepted, whether or not the parent had one under way at the fork."""
    code = """
import asyncio, os, sys
from offload import FileSink, ForkedError
async def main():
    sink = await FileSink(sys.argv[1]).start()
    for _ in range(20):
        _ = sink.write("parent\\n")
        if sys.argv[2] == "False":
            await sink.flush()
        child = os.fork()
        if child == 0:
            status = 0
            for _ in range(3):
                try:
                    _ = sink.write("child\\n")
                    status = 1
                except ForkedError as exc:
                    if "belongs to the parent" not in str(exc):
                        status = 2
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0, "the child's write was accepted"
    await sink.aclose()
asyncio.run(main())
print(open(sys.argv[1]).read() == "parent\\n" * 20)
"""
    said = run_python(code, tmp_path / "out", pending, before=None)
    assert said.endswith("True\n")


async def test_a_thread_that_is_gone_is_told_at_every_write(tmp_path: Path) -> None:
    """When the sink's loop was ended by somebody else, the second write and the third say so like the first."""
    sink = await FileSink(tmp_path / "out").start()
    sink._thread.submit(lambda: asyncio.get_running_loop().stop())
    sink._thread._thread.join()
    for _ in range(3):
        with pytest.raises(BrokenResourceError, match="has ended"):
            _ = sink.write(b"x")
    file = sink._file
    assert file is not None
    file.close()


# --- who touches the disk ---------------------------------------------------------------------------------------------


def strace(*options: str) -> list[str]:
    """A command that traces, or skip."""
    program = shutil.which("strace")
    assert program is not None
    if subprocess.run([program, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let processes be traced")
    return [program, "-f", "-qq", *options]


@pytest.mark.slow
@pytest.mark.peer("strace")
def test_the_loop_thread_makes_no_system_call_on_the_file(tmp_path: Path) -> None:
    """Opening, emptying, writing, syncing and closing all happen on the sink's thread."""
    code = """
import asyncio, sys
from offload import FileSink
async def main():
    async with FileSink(sys.argv[1], append=False, max_bytes=10) as sink:
        for number in range(20):
            await sink.write("line\\n")
        await sink.flush(fsync=True)
        await sink.write("line\\n")
asyncio.run(main())
import os
print(os.getpid())
"""
    path, trace = tmp_path / "out", tmp_path / "trace"
    pid = run_python(code, path, before=strace("-o", str(trace), "-P", str(path))).strip()
    lines = trace.read_text().splitlines()
    assert {line.split()[0] for line in lines}.isdisjoint({pid})
    called = {match[1] for line in lines if (match := re.match(r"\d+ +(\w+)\(", line))}
    assert called >= {"openat", "write", "fdatasync", "ftruncate", "close"}


@pytest.mark.slow
@pytest.mark.peer("strace")
def test_one_fsync_serves_all_that_was_written(tmp_path: Path) -> None:
    """A flush with fsync costs one, for a new file one for its folder too, and a flush without costs none."""
    code = """
import asyncio, sys
from offload import FileSink
async def main():
    async with FileSink(sys.argv[1]) as sink:
        for round in range(3):
            for number in range(100):
                _ = sink.write("line\\n")
            await sink.flush()
            await sink.flush(fsync=True)
asyncio.run(main())
"""
    trace = tmp_path / "trace"
    run_python(code, tmp_path / "out", before=strace("-o", str(trace), "-e", "trace=fsync,fdatasync"))
    calls = re.findall(r"(fsync|fdatasync)\(", trace.read_text())
    assert calls == ["fdatasync", "fsync", "fdatasync", "fdatasync"]


async def test_a_blocked_sink_blocks_nobody_else(tmp_path: Path, pipe: StandingReader) -> None:
    """While one sink's disk stands, another sink on the same loop writes, flushes and closes."""
    async with FileSink(pipe.path) as standing:
        _ = standing.write(BLOCK)
        await pipe.take(1)
        async with FileSink(tmp_path / "out") as sink:
            await sink.write(b"here")
            await sink.flush(fsync=True)
        assert (tmp_path / "out").read_bytes() == b"here"
        await pipe.take(len(BLOCK) - 1)


async def test_many_waiters_get_room_in_order(pipe: StandingReader) -> None:
    """Writers that wait for room go on in the order in which they wrote."""
    ended: list[int] = []

    async def write(number: int) -> None:
        waiting: Awaitable[None] = sink.write(b"%d" % number)
        await waiting
        ended.append(number)

    async with FileSink(pipe.path, max_bytes=1) as sink:
        first = asyncio.ensure_future(sink.write(BLOCK))
        tasks = [asyncio.create_task(write(number)) for number in range(10)]
        await pipe.take(1)
        assert ended == []
        assert (await pipe.take(len(BLOCK) + 9))[len(BLOCK) - 1 :] == b"0123456789"
        await asyncio.gather(first, *tasks)
    assert ended == list(range(10))
