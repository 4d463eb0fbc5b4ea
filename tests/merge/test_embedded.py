"""`offload.merge`: a merge beside a block, which ends with it, whole and with what went wrong."""

# ruff: noqa: ASYNC240 - these files are small, and the loop has nothing else to do

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import offload
from offload.errors import BrokenResourceError, BusyResourceError, ClosedResourceError
from offload.merge.audit import verify
from offload.merge.engine import Merge

AMPLE = 60.0
DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After a test there are no more threads and descriptors than before."""
    gc.collect()
    threads, count = set(threading.enumerate()), len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.is_dir() else 0
    yield
    gc.collect()
    assert not set(threading.enumerate()) - threads
    assert (len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.is_dir() else 0) <= count


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "a").write_bytes(b"one\n")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged.opk"


def lines(out: Path) -> int:
    found = verify(out)
    assert found.ok, found.faults
    return found.lines


def test_the_room_has_the_function_s_name() -> None:
    """`offload.merge` can be called and is still the package, in whatever order they are imported."""
    assert sys.modules["offload.merge"].engine.Merge is Merge
    assert isinstance(offload.merge(["x"], "x.opk"), offload.Merge)


async def test_leaving_the_block_ends_it_with_everything_in(logs: Path, out: Path) -> None:
    """What was there when the block was left is in the file, and its threads have ended."""
    async with asyncio.timeout(AMPLE), offload.merge([str(logs)], out, follow=True) as merge:
        await merge.caught_up()
        assert lines(out) == 1
        with (logs / "a").open("ab") as file:
            file.write(b"two\nthree")
    assert merge.progress.lines == 2 + 1
    assert lines(out) == 3


async def test_caught_up_covers_what_was_written_before(logs: Path, out: Path) -> None:
    """After each `caught_up()` every line written before the call is in the file, however it was noticed."""
    async with asyncio.timeout(AMPLE), offload.merge([str(logs)], out, follow=True, poll=True) as merge:
        for number in range(20):
            with (logs / f"b{number % 3}").open("ab") as file:
                file.write(b"line\n")
            await merge.caught_up()
            assert lines(out) == number + 2
        await asyncio.gather(*(merge.caught_up() for _ in range(50)))


async def test_without_follow_the_block_ends_when_all_is_in(logs: Path, out: Path) -> None:
    """A merge that does not follow is waited for; `run()` and `caught_up()` say when."""
    async with asyncio.timeout(AMPLE), offload.merge([str(logs)], out):
        pass
    assert lines(out) == 1
    async with asyncio.timeout(AMPLE), offload.merge([str(logs)], out) as merge:
        await merge.caught_up()
        assert (await merge.run()).caught_up
    with pytest.raises(ClosedResourceError, match="not started"):
        await offload.merge([str(logs)], out).run()


async def test_an_error_of_the_disk_reaches_the_block(logs: Path, out: Path) -> None:
    """It is raised to who waits, and where the block is left; an exception of the block's own comes first."""

    async def block(what: str) -> None:
        async with asyncio.timeout(AMPLE), offload.merge([str(logs)], out, follow=True) as merge:
            await merge.caught_up()
            out.rename(out.with_suffix(f".{what}"))
            if what == "waits":
                await merge.run()
                raise AssertionError("it has not failed")
            if what == "catches up":
                while True:
                    with (logs / "a").open("ab") as file:
                        file.write(b"more\n")
                    await merge.caught_up()
            while not merge._running or not merge._running.done():  # noqa: ASYNC110 - it is not told to the block
                await asyncio.sleep(0.01)
            if what == "raises":
                raise ZeroDivisionError

    for what in ("waits", "catches up", "leaves"):
        with pytest.raises(BrokenResourceError):
            await block(what)
    with pytest.raises(ZeroDivisionError):
        await block("raises")


async def test_a_second_writer_is_refused_where_the_block_begins(logs: Path, out: Path) -> None:
    """What keeps the packet file from being opened is raised before the block, and leaves nothing open."""
    async with asyncio.timeout(AMPLE), offload.merge([str(logs)], out, follow=True):
        with pytest.raises(BusyResourceError):
            await offload.merge([str(logs)], out, follow=True).__aenter__()


async def test_cancelled_at_any_moment_it_ends_whole(logs: Path, out: Path) -> None:
    """After any number of its task's steps a cancellation comes through, and the file is right and goes on."""
    (logs / "b").write_bytes(b"line\n" * 1000)

    async def block() -> None:
        async with offload.merge([str(logs)], out, follow=True) as merge:
            await merge.caught_up()
            await asyncio.sleep(0)

    before = set(threading.enumerate())
    for steps in [*range(30), *range(30, 100, 10)]:
        task = asyncio.create_task(block())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert not set(threading.enumerate()) - before
        if out.exists():
            verify(out)
    async with offload.merge([str(logs)], out):
        pass
    assert lines(out) == 1001
