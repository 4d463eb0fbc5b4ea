"""What holds for every test of the detector: it ends, and leaves no thread and no descriptor behind."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import inspect
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import offload
from offload.debug.record import Stall, Verdict

FOLDER = Path("/proc/self/fd")
HANG = float(os.environ.get("OFFLOAD_TEST_HANG", "60")) + float(os.environ.get("OFFLOAD_TEST_STARVED", "0"))
TRIES = 5
STARVED = 0.01  # seconds in all, above which the watchdog may have missed what lasts 0.15


def give_up(config: pytest.Config, test: str) -> None:
    """Say where every thread stands, and end the process: a hung test cannot be ended in another way."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    with open(2, "w", closefd=False) as stderr:
        print(f"\n{test} hangs for {HANG} s", file=stderr, flush=True)
        faulthandler.dump_traceback(stderr, all_threads=True)
    os._exit(1)


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs fails with all stacks."""
    timer = threading.Timer(HANG, give_up, (request.config, request.node.nodeid))
    timer.name = "watchdog"
    timer.start()
    yield
    timer.cancel()
    timer.join()


@pytest.fixture(autouse=True, scope="session")
def first_uvloop() -> None:
    """The first uvloop of a process opens a pipe for signals that stays open."""
    with suppress(ImportError):
        import uvloop

        uvloop.new_event_loop().close()


def _open() -> tuple[set[threading.Thread], dict[str, str]]:
    descriptors = {}
    for path in list(FOLDER.iterdir()) if FOLDER.is_dir() else []:
        with suppress(OSError):  # the one that listed them
            descriptors[path.name] = os.readlink(path)
    return set(threading.enumerate()), descriptors


@pytest.fixture(autouse=True)
def nothing_left(first_uvloop: None, watchdog: None, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After the test there are no more threads and descriptors than before, and the detector did not fail."""
    threads, descriptors = _open()
    yield
    for last_try in (False, True):
        threads_now, descriptors_now = _open()
        new_threads = [thread.name for thread in threads_now - threads]
        new_descriptors = [name for number, name in descriptors_now.items() if number not in descriptors]
        if not (new_threads or new_descriptors) or last_try:
            break
        gc.collect()
    assert not new_threads
    assert not new_descriptors
    assert not [record.getMessage() for record in caplog.get_records("call") if "watchdog failed" in record.message]


def line_of(function: Callable[..., object], mark: str = "# here") -> int:
    """Number of the line of a function that has this comment."""
    lines, first = inspect.getsourcelines(function)
    (number,) = [first + n for n, line in enumerate(lines) if mark in line]
    return number


@pytest.fixture(name="line_of", scope="session")
def line_of_fixture() -> Callable[..., int]:
    return line_of


def seconds_starved() -> float:
    """For which the threads that there are waited for a processor so far, or a host had taken it away; Linux only."""
    total = 0.0
    with suppress(OSError):
        for path in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # it has ended
                total += int((path / "schedstat").read_text().split()[1]) / 1e9
        total += int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")
    return total


class Place:
    """A loop to block: the main one, or a resource's.

    Attributes:
        loop: what reports call it.
        error: seconds that a duration may be off, in a quiet machine.
        starved: seconds for which our threads had no processor when it was blocked last.
    """

    def __init__(self, loop: str, thread: offload.LoopThread | None, error: float) -> None:
        self.loop = loop
        self.error = error
        self.starved = 0.0
        self._thread = thread

    async def run(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run a coroutine function there."""
        return await (function() if self._thread is None else self._thread.run(function))

    async def stall_of(
        self, function: Callable[[], Coroutine[Any, Any, Any]], *, late: float | None = None, **options: Any
    ) -> Stall:
        """The longest stall that it makes there. Again, if the machine was too busy to tell whose fault it was.

        Args:
            late: seconds by which the watchdog may have been late, where it should not be.
        """
        longest: Stall | None = None
        for _ in range(TRIES):
            async with offload.watch(log=False, **options) as detector:
                await asyncio.sleep(0.03)
                before = seconds_starved()
                await self.run(function)
                self.starved = seconds_starved() - before
                await asyncio.sleep(0.03)
            stalls = [stall for stall in detector.report().stalls if stall.loop == self.loop]
            if not stalls and self.loop != "main" and self.starved > STARVED:
                continue  # such a loop is told by looks, and the watchdog had none
            assert stalls, "nothing was found"
            longest = max(stalls, key=lambda stall: stall.duration)
            if longest.verdict is not Verdict.UNMEASURED and (late is None or (longest.numbers.late or 0.0) < late):
                return longest
        pytest.skip(f"the machine was too busy to tell: {longest and (longest.cause, longest.numbers)}")


@pytest.fixture(params=["main", "resource", "uvloop"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Each loop in turn; uvloop's as a resource's."""
    if request.param == "main":
        yield Place("main", None, 0.001)
        return
    uvloop = pytest.importorskip("uvloop") if request.param == "uvloop" else None
    factory = uvloop.new_event_loop if uvloop is not None else None
    async with offload.LoopThread("db", loop_factory=factory) as thread:
        yield Place("db", thread, 0.05 / 4 if uvloop is not None else 0.001)
