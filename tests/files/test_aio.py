"""`offload.open`: aiofiles' whole API, on a thread of the file's own, which the file never leaves."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiofiles
import pytest

import offload

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="named pipes of a set size")

BLOCK = b"#" * 8192  # twice what the pipe holds


def opened_here() -> set[str]:
    """What this process has open, but for the folder that it looks into."""
    links = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            links.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return links


def threads_of_files() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("file ")]


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
    for mode, options in (("w", {}), ("rb", {}), ("r+b", {}), ("wb", {"buffering": 0})):
        theirs: Any = aiofiles.open(path, mode, **options)  # type: ignore[call-overload]
        async with offload.open(path, mode, **options) as file, theirs as other:
            assert type(file) is type(other)


async def test_calls_run_in_the_order_made(tmp_path: Path) -> None:
    """Writes that are made at once and awaited together stand in the file in their order."""
    async with offload.open(tmp_path / "file", "w") as file:
        await asyncio.gather(*(file.write(f"{number}\n") for number in range(150)))
    assert (tmp_path / "file").read_text().split() == [str(number) for number in range(150)]


async def test_every_call_runs_on_the_files_own_thread(tmp_path: Path) -> None:
    """Opening, reading, writing and closing happen on one thread, which is not the loop's, and ends with the block."""
    seen: list[tuple[str, str]] = []

    def note(name: str) -> None:
        seen.append((name, threading.current_thread().name))

    class Recorder:
        """Notes the thread of each call on the real file."""

        def __init__(self, file: Any) -> None:
            self._inner = file

        def __getattr__(self, name: str) -> Any:
            def method(*arguments: Any) -> Any:
                note(name)
                return getattr(self._inner, name)(*arguments)

            return method

    def opener(name: str, flags: int) -> int:
        note("open")
        return os.open(name, flags)

    async with offload.open(tmp_path / "file", "wb", opener=opener) as file:
        file._file = Recorder(file._file)
        await file.write(b"x" * 100_000)
        await file.flush()
        await file.tell()
    assert seen == [(name, "file file") for name in ("open", "write", "flush", "tell", "close")]
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
            left.append(file._file)
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
        assert sorted(threads_of_files()) == ["file one", "file two"]
    assert not threads_of_files()
