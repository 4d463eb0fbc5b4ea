"""`offload.open`: aiofiles' whole API, on a thread of the file's own, which the file never leaves."""

from __future__ import annotations

import asyncio
import contextvars
import fcntl
import gc
import inspect
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiofiles
import aiofiles.os
import aiofiles.ospath
import aiofiles.tempfile
import pytest
from aiofiles.threadpool import wrap
from aiofiles.threadpool.binary import AsyncBufferedIOBase

import offload
from offload.files import aio

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="named pipes of a set size")

AMPLE = 60.0  # seconds until what must happen is given up
BLOCK = b"#" * 8192  # twice what the pipe holds


def opened_here() -> set[str]:
    """What this process has open, but for the folder that it looks into, and what event loops have."""
    links = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            links.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return {link for link in links if "anon_inode" not in link}


def threads_of_files() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("file ")]


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE")


class Refusing(ThreadPoolExecutor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        raise AssertionError(f"{fn} runs on the default executor")


async def until_no_thread() -> None:
    """Wait for a thread that nobody can await, as its file was dropped."""
    for thread in threading.enumerate():
        if thread.name.startswith("file "):
            await asyncio.to_thread(thread.join)


class Opener:
    """Opens what it is told to, but stands until the test lets it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.begun = asyncio.Event()
        self.go_on = threading.Event()

    def __call__(self, name: str, flags: int) -> int:
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.go_on.wait(AMPLE)
        return os.open(name, flags)


class Pipe:
    """A named pipe that nobody reads until the test does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, 4096)

    async def take(self, count: int) -> bytes:
        loop, data = asyncio.get_running_loop(), b""
        while len(data) < count:
            readable = asyncio.Event()
            loop.add_reader(self.fd, readable.set)
            await readable.wait()
            loop.remove_reader(self.fd)
            data += os.read(self.fd, count - len(data))
        return data


@pytest.fixture(name="pipe")
def open_pipe(tmp_path: Path) -> Iterator[Pipe]:
    pipe = Pipe(tmp_path / "pipe")
    yield pipe
    os.close(pipe.fd)


async def test_it_reads_and_writes_as_aiofiles_does(tmp_path: Path) -> None:
    """Text, lines, seeking, truncation and `async for` give what aiofiles gives for the same calls."""

    async def use(open: Any, path: Path) -> list[object]:
        seen: list[object] = []
        async with open(path, "w+", encoding="utf-8", newline="\n") as file:
            seen += [await file.write("ä\nb\r\nc"), await file.tell(), await file.seek(0), await file.readline()]
            seen += [[line async for line in file], await file.truncate(3), file.closed, file.mode, file.encoding]
            await file.writelines(["x\n", "y"])
            await file.flush()
        async with open(path, "rb") as file:
            seen += [await file.read(2), await file.readlines(), await file.read(), file.readable(), type(file)]
        return seen

    assert await use(offload.open, tmp_path / "one") == await use(aiofiles.open, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


async def test_it_has_the_whole_api_of_aiofiles(tmp_path: Path) -> None:
    """The object is aiofiles' own, so no method is missing, whatever the kind of file."""
    path = tmp_path / "file"
    for mode, buffering in (("w", -1), ("rb", -1), ("r+b", -1), ("wb", 0)):
        theirs: Any = aiofiles.open(path, mode, buffering)  # type: ignore[call-overload]
        async with offload.open(path, mode, buffering) as file, theirs as other:
            assert type(file) is type(other)


async def test_calls_run_in_the_order_made(tmp_path: Path) -> None:
    """Writes that are made at once and awaited together stand in the file in their order."""
    async with offload.open(tmp_path / "file", "w") as file:
        await asyncio.gather(*(file.write(f"{number}\n") for number in range(150)))
    assert (tmp_path / "file").read_text().split() == [str(number) for number in range(150)]


@pytest.mark.parametrize("by_hand", [True, False])
async def test_every_call_runs_on_the_files_own_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_hand: bool
) -> None:
    """Opening, reading, writing and closing happen on one thread, which is not the loop's, and ends with the block."""
    seen: list[tuple[str, str]] = []

    def note(name: str) -> None:
        seen.append((name, threading.current_thread().name))

    class Recorder:
        """Notes the thread of each call on the real file."""

        def __init__(self, file: Any) -> None:
            self._inner = file

        def __exit__(self, *error: object) -> None:
            note("__exit__")
            self._inner.close()

        def __getattr__(self, name: str) -> Any:
            def method(*arguments: Any) -> Any:
                note(name)
                return getattr(self._inner, name)(*arguments)

            return method

    def opener(name: str, flags: int) -> int:
        note("open")
        return os.open(name, flags)

    def sync_open(*arguments: Any, **options: Any) -> Any:
        return Recorder(open(*arguments, **options))

    monkeypatch.setattr("aiofiles.threadpool.sync_open", sync_open)
    wrap.register(Recorder)(lambda file, **options: AsyncBufferedIOBase(file, **options))
    async with offload.open(tmp_path / "file", "wb", opener=opener) as file:
        await file.write(b"x" * 100_000)
        await file.flush()
        await file.tell()
        if by_hand:
            await file.close()
    names = ["open", "write", "flush", "tell", "close" if by_hand else "__exit__"]
    assert seen == [(name, f"file {tmp_path / 'file'}") for name in names]
    assert not threads_of_files()


async def test_a_blocked_file_blocks_only_itself(tmp_path: Path, pipe: Pipe) -> None:
    """While one file's write stands, another file, and the loop's default executor, go on."""
    loop = asyncio.get_running_loop()
    async with offload.open(pipe.path, "wb", buffering=0) as standing:
        writing = asyncio.ensure_future(standing.write(BLOCK))
        await pipe.take(1)
        async with offload.open(tmp_path / "other", "w") as other:
            await other.write("here")
        assert (tmp_path / "other").read_text() == "here"
        assert loop._default_executor is None  # type: ignore[attr-defined]
        assert not writing.done()
        await pipe.take(len(BLOCK) - 1)
        assert await writing == len(BLOCK)


async def test_a_server_goes_on_while_a_file_is_opened(tmp_path: Path) -> None:
    """While the file that one server gives out is being opened, another answers; then all of it comes."""
    path, opener = tmp_path / "file", Opener()
    path.write_bytes(b"one\ntwo\n")

    async def give(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with offload.open(path, "rb", opener=opener) as file:
            while data := await file.read(1):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"1")
        await writer.drain()
        writer.close()

    async with (
        asyncio.timeout(AMPLE),
        await asyncio.start_server(give, "127.0.0.1", 0) as slow,
        await asyncio.start_server(answer, "127.0.0.1", 0) as quick,
    ):
        reader, writer = await asyncio.open_connection(*slow.sockets[0].getsockname())
        await opener.begun.wait()
        for _ in range(31):
            asked, asker = await asyncio.open_connection(*quick.sockets[0].getsockname())
            assert await asked.read() == b"1"
            asker.close()
        opener.go_on.set()
        assert await reader.read() == path.read_bytes()
        writer.close()


@pytest.mark.parametrize(
    ("name", "mode", "error"),
    [("missing/file", "w", FileNotFoundError), (".", "w", IsADirectoryError), ("file", "q", ValueError)],
)
async def test_what_cannot_be_opened_raises_on_entering(
    tmp_path: Path, name: str, mode: str, error: type[Exception]
) -> None:
    """The error is the built-in open's, and no thread is left."""
    with pytest.raises(error):
        await offload.open(tmp_path / name, mode).__aenter__()
    assert not threads_of_files()


async def test_an_error_while_closing_reaches_the_block() -> None:
    """What the disk refuses when the buffer is written at the end is raised, and the thread ends."""

    async def write() -> None:
        async with offload.open("/dev/full", "wb") as file:
            await file.write(b"x")

    with pytest.raises(OSError, match="No space left"):
        await write()
    assert not threads_of_files()


async def test_a_descriptor_can_be_opened(tmp_path: Path) -> None:
    """An open descriptor is taken over and closed, as `open` does."""
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    async with offload.open(fd, "wb") as file:
        await file.write(b"x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert (tmp_path / "file").read_bytes() == b"x"


async def test_closed_in_the_block_it_ends_quietly(tmp_path: Path) -> None:
    """Closing the file yourself before the block ends is no error."""
    async with offload.open(tmp_path / "file", "w") as file:
        await file.write("x")
        await file.close()
    assert (tmp_path / "file").read_text() == "x"


async def test_cancelled_while_opening_it_leaves_nothing_open(tmp_path: Path) -> None:
    """A file that opens only after nobody wants it any more is closed again, on its thread, which then ends."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    before = opened_here()
    loop, opening = asyncio.get_running_loop(), asyncio.Event()

    def opener(name: str, flags: int) -> int:
        loop.call_soon_threadsafe(opening.set)
        return os.open(name, flags)  # lasts until somebody reads

    entering = asyncio.ensure_future(offload.open(path, "wb", opener=opener).__aenter__())
    await opening.wait()
    entering.cancel()
    await asyncio.sleep(0)
    assert not entering.done()
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(asyncio.CancelledError):
        await entering
    os.close(reader)
    assert opened_here() == before
    assert not threads_of_files()


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelled_while_closing_it_closes_all_the_same(pipe: Pipe, times: int) -> None:
    """Cancelled behind a write that stands, the block still waits for it and closes the file on its own thread."""
    before = opened_here()
    entered = asyncio.Event()
    left: list[Any] = []

    async def block() -> None:
        async with offload.open(pipe.path, "wb", buffering=0) as file:
            left.append(file)
            _ = asyncio.ensure_future(file.write(BLOCK))  # noqa: RUF006 - its end is seen in the pipe
            await asyncio.sleep(0)
            entered.set()

    task = asyncio.create_task(block())
    await entered.wait()
    assert await pipe.take(1) == b"#"
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
    await pipe.take(len(BLOCK) - 1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left[0].closed
    assert opened_here() == before
    assert not threads_of_files()


async def test_two_files_have_two_threads(tmp_path: Path) -> None:
    """Each open file has a thread of its own, named for it."""
    async with offload.open(tmp_path / "one", "w"), offload.open(tmp_path / "two", "w"):
        assert sorted(threads_of_files()) == [f"file {tmp_path / name}" for name in ("one", "two")]
    assert not threads_of_files()


# --- closed, dropped, cancelled --------------------------------------------------------------------------------


async def test_a_closed_file_raises_closed_resource_error(tmp_path: Path) -> None:
    """Calls on a closed file raise ClosedResourceError, which names it and is the ValueError that `io` raises."""
    async with offload.open(tmp_path / "file", "w+") as file:
        pass
    for call in (file.read, file.readline, file.flush, file.tell, lambda: file.write("x")):
        with pytest.raises(offload.ClosedResourceError, match=r"'file .*/file' is closed") as caught:
            await call()
        assert isinstance(caught.value, ValueError)
    await file.close()


async def test_the_thread_has_ended_when_close_has(tmp_path: Path) -> None:
    """A file that was awaited, not entered, ends its thread when it is closed, however often."""
    file = await offload.open(tmp_path / "file", "w")
    assert threads_of_files()
    await file.write("x")
    await asyncio.gather(file.close(), file.close())
    assert not threads_of_files()
    assert (tmp_path / "file").read_text() == "x"
    await file.close()


async def test_awaited_and_then_entered_it_is_opened_once(tmp_path: Path) -> None:
    """An opening that was awaited gives the same file to the block; one that is through opens nothing again."""
    opening = offload.open(tmp_path / "file", "w")
    file = await opening
    async with opening as same:
        assert same is file
        assert len(threads_of_files()) == 1
        await same.write("kept")
    with pytest.raises(offload.ClosedResourceError, match="was opened before; open it anew"):
        await opening
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("in_a_ring", [False, True])
async def test_a_dropped_file_is_closed_on_its_thread_which_ends(tmp_path: Path, in_a_ring: bool) -> None:
    """Dropped unclosed, a file is written out and closed, its thread ends, and nothing complains."""
    file: Any = await offload.open(tmp_path / "file", "w")
    await file.write("kept")
    raw = file._file
    if in_a_ring:
        file.ring = file
    del file
    gc.collect()
    await until_no_thread()
    assert raw.closed
    assert (tmp_path / "file").read_text() == "kept"


async def test_a_file_may_be_dropped_by_its_own_thread(tmp_path: Path) -> None:
    """A garbage collection in one of the file's own calls ends its thread as any other would."""
    file: Any = await offload.open(tmp_path / "file", "w")
    await file.write("kept")
    keeper = file._ref_loop
    file.ring = file
    gc.disable()
    try:
        del file
        await keeper.run_in_executor(keeper.executor, gc.collect)
    finally:
        gc.enable()
    await until_no_thread()
    assert (tmp_path / "file").read_text() == "kept"


async def test_a_dropped_file_that_cannot_be_closed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What the disk refuses when a dropped file is closed is in the log, since nobody awaits it."""
    file = await offload.open("/dev/full", "w")
    await file.write("x")
    del file
    gc.collect()
    await until_no_thread()
    assert [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "offload"] == [
        (logging.ERROR, "'file /dev/full' was left unclosed, and could not be closed")
    ]
    assert "No space left" in caplog.text


@pytest.mark.slow
def test_a_file_left_open_at_exit_is_on_disk(tmp_path: Path) -> None:
    """A program that ends with a file open ends quietly, with what was written in the file."""
    program = """
import asyncio, sys, offload
async def main():
    global file
    file = await offload.open(sys.argv[1], "w")
    await file.write("kept")
asyncio.run(main())
"""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", program, str(tmp_path / "file")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    said = [line for line in result.stderr.splitlines() if not line.startswith("Executing <")]  # a busy machine is slow
    assert said == []
    assert (tmp_path / "file").read_text() == "kept"


async def test_an_error_is_raised_by_the_first_close_only() -> None:
    """What closing raises in the block is not raised once more at its end, as with `io`."""
    async with offload.open("/dev/full", "w") as file:
        await file.write("x")
        with pytest.raises(OSError, match="No space left"):
            await file.close()
    assert not threads_of_files()


async def test_a_call_cancelled_while_queued_never_runs(pipe: Pipe) -> None:
    """Behind a write that stands, a cancelled write ends at once and leaves nothing in the file."""
    async with offload.open(pipe.path, "wb", buffering=0) as file:
        writing = asyncio.create_task(file.write(BLOCK))
        await pipe.take(1)
        queued = asyncio.create_task(file.write(b"never"))
        await asyncio.sleep(0)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        assert not writing.done()
        await pipe.take(len(BLOCK) - 1)
        await writing
    assert os.read(pipe.fd, 10) == b""


async def test_a_running_call_is_waited_for_when_cancelled(pipe: Pipe) -> None:
    """A write that stands is not left behind by its cancelled caller, so its bytes are whole."""
    async with offload.open(pipe.path, "wb", buffering=0) as file:
        writing = asyncio.create_task(file.write(BLOCK))
        await pipe.take(1)
        writing.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not writing.done()
        await pipe.take(len(BLOCK) - 1)
        with pytest.raises(asyncio.CancelledError):
            await writing


async def test_context_variables_hold_in_a_call(tmp_path: Path) -> None:
    """What runs on the file's thread sees its caller's context."""
    seen = []

    def opener(name: str, flags: int) -> int:
        seen.append(VARIABLE.get())
        return os.open(name, flags)

    token = VARIABLE.set("here")
    async with offload.open(tmp_path / "file", "w", opener=opener):
        VARIABLE.reset(token)
    assert seen == ["here"]


async def test_another_loop_may_use_the_file(tmp_path: Path) -> None:
    """A call answers on the loop that awaits it, which need not be the one that opened the file."""
    (tmp_path / "file").write_text("one\ntwo\n")
    async with offload.open(tmp_path / "file") as file:
        assert await file.readline() == "one\n"

        async def elsewhere() -> str:
            return await file.readline()

        assert await asyncio.to_thread(asyncio.run, elsewhere()) == "two\n"


async def test_many_files_are_open_at_once(tmp_path: Path) -> None:
    """A hundred files, each with its thread, are written together and leave nothing behind."""
    before = opened_here()

    async def write(number: int) -> None:
        async with offload.open(tmp_path / str(number), "w") as file:
            for line in range(5):
                await file.write(f"{number} {line}\n")
            waiting.append(number)
            if len(waiting) == 100:
                all_open.set()
            await all_open.wait()

    waiting: list[int] = []
    all_open = asyncio.Event()
    await asyncio.gather(*map(write, range(100)))
    for number in range(100):
        assert (tmp_path / str(number)).read_text() == "".join(f"{number} {line}\n" for line in range(5))
    assert opened_here() == before
    assert not threads_of_files()


async def test_the_default_executor_is_never_used(tmp_path: Path) -> None:
    """With a default executor that refuses all work, files, temporary files, folders and functions work."""
    asyncio.get_running_loop().set_default_executor(Refusing())
    async with offload.open(tmp_path / "file", "w") as file:
        await file.write("x")
    file = await offload.open(tmp_path / "file", "a")
    await file.close()
    async with aio.tempfile.NamedTemporaryFile("w") as named, aio.tempfile.TemporaryFile("w") as unnamed:
        await named.write("x")
        await unnamed.write("x")
    async with aio.tempfile.SpooledTemporaryFile(max_size=1) as spooled:
        await spooled.write(b"xx")
        await spooled.seek(0)
        assert await spooled.read() == b"xx"
    async with aio.tempfile.TemporaryDirectory() as folder:
        assert await aio.ospath.isdir(folder)
    assert await aio.os.listdir(tmp_path) == ["file"]
    await aio.stderr.write("")
    with pytest.raises(AssertionError, match="the default executor"):
        await aiofiles.os.listdir(tmp_path)


# --- executor= -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LoopThread", "pool"])
async def test_calls_run_on_the_executor_given(tmp_path: Path, kind: str) -> None:
    """With `executor=` no thread is made, opening and closing happen there too, and it stays open for others."""
    seen: list[str] = []

    def opener(name: str, flags: int) -> int:
        seen.append(threading.current_thread().name)
        return os.open(name, flags)

    executor: Executor
    executor = offload.LoopThread("given 0") if kind == "LoopThread" else ThreadPoolExecutor(1, "given")
    with executor:
        async with offload.open(tmp_path / "one", "w", opener=opener, executor=executor) as file:
            await file.write("x")
            await file.close()
        async with offload.open(tmp_path / "two", "w", opener=opener, executor=executor) as file:
            await file.write("x")
            assert not threads_of_files()
        assert file.closed
        assert await aio.ospath.getsize(tmp_path / "two", executor=executor) == 1
        async with aio.tempfile.TemporaryDirectory(executor=executor) as folder:
            assert not threads_of_files()
        assert not await aio.ospath.exists(folder)
        with pytest.raises(ValueError, match="closed file"):
            await file.write("x")
    assert [name.replace("_", " ") for name in seen] == ["given 0"] * 2


@pytest.mark.parametrize("kind", ["LoopThread", "pool"])
async def test_cancelled_while_opening_on_an_executor_it_leaves_nothing_open(tmp_path: Path, kind: str) -> None:
    """A file that another executor opens only after nobody wants it any more is closed there."""
    opener = Opener()
    before = opened_here()
    executor: Executor = await offload.LoopThread("given").start() if kind == "LoopThread" else ThreadPoolExecutor(1)

    async def enter() -> None:
        async with offload.open(tmp_path / "file", "w", opener=opener, executor=executor):
            pytest.fail("it was entered")

    entering = asyncio.create_task(enter())
    await opener.begun.wait()
    entering.cancel()
    await asyncio.sleep(0)
    opener.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await entering
    await asyncio.to_thread(executor.shutdown)
    assert opened_here() == before


async def test_cancelled_while_closing_on_an_executor_it_closes_all_the_same(tmp_path: Path) -> None:
    """A block that is cancelled while its executor is busy waits for its turn, and the file is closed."""
    gate, entered = threading.Event(), asyncio.Event()
    with ThreadPoolExecutor(1) as pool:
        files: list[Any] = []

        async def block() -> None:
            async with offload.open(tmp_path / "file", "w", executor=pool) as file:
                files.append(file)
                await file.write("kept")
                pool.submit(gate.wait)
                entered.set()

        task = asyncio.create_task(block())
        await entered.wait()
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert files[0].closed
    assert (tmp_path / "file").read_text() == "kept"


# --- the rest of aiofiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in aiofiles.__all__ if name not in ("open", "tempfile")])
def test_it_has_the_standard_streams_of_aiofiles(name: str) -> None:
    """Each of aiofiles' standard streams is here, of the same type."""
    assert type(getattr(aio, name)) is type(getattr(aiofiles, name))


def test_it_has_all_functions_of_aiofiles() -> None:
    """Each name that aiofiles' `os`, `ospath` and `tempfile` list is here, awaitable where theirs is."""
    pairs: list[tuple[Any, Any]] = [
        (aio.os, aiofiles.os),
        (aio.ospath, aiofiles.ospath),
        (aio.tempfile, aiofiles.tempfile),
    ]
    for ours, theirs in pairs:
        for name in theirs.__all__:
            here, there = getattr(ours, name), getattr(theirs, name)
            assert inspect.iscoroutinefunction(here) == inspect.iscoroutinefunction(there), name
            assert callable(here) or here is aio.ospath


async def test_a_wrapped_function_runs_on_a_thread_of_its_own() -> None:
    """`os.wrap` makes a function that runs alone, or where `executor=` says."""
    name: Any = aio.os.wrap(lambda: threading.current_thread().name)
    assert await name() == "<lambda>"
    async with offload.LoopThread("shared") as thread:
        assert await name(executor=thread) == "shared"
    assert "<lambda>" not in [thread.name for thread in threading.enumerate()]


async def test_a_function_that_stands_blocks_no_other(tmp_path: Path) -> None:
    """While one function stands, as many others as there may be go on."""
    gate = threading.Event()
    wait: Any = aio.os.wrap(gate.wait)
    standing = [asyncio.create_task(wait()) for _ in range(40)]  # more than a pool would take
    assert await aio.ospath.exists(tmp_path)
    gate.set()
    assert await asyncio.gather(*standing) == [True] * 40


async def test_a_temporary_file_is_gone_after_its_block() -> None:
    """A named temporary file is there in the block and deleted at its end; so is one that was closed in between."""
    async with aio.tempfile.NamedTemporaryFile("w") as file:
        assert await aio.ospath.exists(file.name)
    assert not await aio.ospath.exists(file.name)
    if sys.version_info >= (3, 12):
        kept: Any = aio.tempfile.NamedTemporaryFile
        async with kept("w", delete_on_close=False) as file:
            await file.close()
            assert await aio.ospath.exists(file.name)
        assert not await aio.ospath.exists(file.name)
    assert not threads_of_files()


async def test_a_temporary_folder_ends_with_its_thread(tmp_path: Path) -> None:
    """Awaited, a temporary folder is deleted by `cleanup` or `close`; dropped, it is deleted too."""
    make: Callable[..., Any] = aio.tempfile.TemporaryDirectory
    for end in ("cleanup", "close"):
        folder = await make(dir=tmp_path)
        assert os.listdir(tmp_path)
        await getattr(folder, end)()
        assert not os.listdir(tmp_path)
        assert not threads_of_files()
    folder = await make(dir=tmp_path)
    del folder
    gc.collect()
    await until_no_thread()
    assert not os.listdir(tmp_path)


async def test_writes_to_a_standard_stream_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and bytes written at once to one stream run on one thread, in the order made, from the first on."""
    monkeypatch.setattr(aio.stdout._ref_loop, "_thread", None)  # type: ignore[attr-defined]
    threads = set()

    with tempfile.TemporaryFile("w+") as stream:

        class Noting:
            buffer = stream.buffer

            def write(self, text: str) -> int:
                threads.add(threading.current_thread().name)
                return stream.write(text)

        monkeypatch.setattr(sys, "stdout", Noting())
        await asyncio.gather(*(aio.stdout.write(f"{number}\n") for number in range(100)))
        stream.seek(0)
        assert stream.read().split() == [str(number) for number in range(100)]
    assert threads == {"stdout"}
    thread = aio.stdout._ref_loop._thread  # type: ignore[attr-defined]
    assert aio.stdout_bytes._ref_loop is aio.stdout._ref_loop  # type: ignore[attr-defined]
    await thread.aclose()


async def test_a_cancelled_read_of_stdin_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for somebody to type can be cancelled at once."""
    monkeypatch.setattr(aio.stdin._ref_loop, "_thread", None)  # type: ignore[attr-defined]
    reading_end, writing_end = os.pipe()
    loop, begun = asyncio.get_running_loop(), asyncio.Event()

    class Typed:
        def readline(self) -> str:
            loop.call_soon_threadsafe(begun.set)
            return os.read(reading_end, 10).decode()

    monkeypatch.setattr(sys, "stdin", Typed())
    reading = asyncio.create_task(aio.stdin.readline())
    await begun.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    thread = aio.stdin._ref_loop._thread  # type: ignore[attr-defined]
    os.write(writing_end, b"late")
    await thread.aclose()
    os.close(reading_end)
    os.close(writing_end)


@pytest.mark.slow
@pytest.mark.parametrize("amid", [False, True])
def test_a_forked_child_writes_to_its_standard_streams(amid: bool) -> None:
    """After a fork the child's streams get threads of their own, also if another thread was just about to write."""
    program = """
import asyncio, os, signal, sys, threading
os.register_at_fork(after_in_child=lambda: signal.alarm(15))
from offload.files import aio
async def say(text):
    await aio.stdout.write(text)
    await aio.stdout.flush()
asyncio.run(say("parent\\n"))
held, release = threading.Event(), threading.Event()
def hold():
    with aio._stdout._gate:
        held.set()
        release.wait()
if sys.argv[1] == "True":
    threading.Thread(target=hold).start()
    held.wait()
child = os.fork()
if not child:
    asyncio.run(say("child\\n"))
    os._exit(0)
status = os.waitpid(child, 0)[1]
release.set()
assert status == 0, status
"""
    command = [sys.executable, "-W", "ignore", "-c", program, str(amid)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "parent\nchild\n"
    assert result.stderr == ""
