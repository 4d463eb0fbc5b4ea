"""What holds for every test of the detector: it ends, and leaves no thread and no descriptor behind."""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import gc
import inspect
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import offload
from offload.debug.record import Stall, Verdict

FOLDER = Path("/proc/self/fd")
TASKS = Path("/proc/self/task")
HANG = float(os.environ.get("OFFLOAD_TEST_HANG", "120")) + float(os.environ.get("OFFLOAD_TEST_STARVED", "0"))
HERE = Path(__file__).parent
# Files, and a test: what they look at takes time, and so does looking.
TIMED = {
    "test_scenarios.py",
    "test_cause.py",
    "test_slow.py",
    "test_lifecycle.py",
    "test_real_stall_reaches_every_form",
}
TRIES = 5
BUSY = 0.2  # of all processors' time, from which on others are in the way
KEPT = 0.02  # seconds that one of our threads was kept from the processors, from which on it may have come too late
ENDING = 10.0  # seconds that threads have to end which have done their work


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
def watchdog(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """A test that hangs fails with all stacks; what is yielded says that it begins anew."""
    begins: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def watches() -> None:
        try:
            while begins.get(timeout=HANG):
                pass
        except queue.Empty:
            give_up(request.config, request.node.nodeid)

    thread = threading.Thread(target=watches, name="watchdog")
    thread.start()
    yield lambda: begins.put(True)
    begins.put(False)
    thread.join()


@pytest.fixture(autouse=True)
def own_heap() -> Iterator[None]:
    """What earlier tests left is not collected here: that may take longer than what is tested."""
    gc.freeze()
    yield
    gc.unfreeze()


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
def nothing_left(first_uvloop: None, watchdog: object, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After the test there are no more threads and descriptors than before, and the detector did not fail."""
    threads, descriptors = _open()
    yield
    until = time.monotonic() + ENDING
    while True:
        threads_now, descriptors_now = _open()
        new_threads = [thread.name for thread in threads_now - threads]
        new_descriptors = [name for number, name in descriptors_now.items() if number not in descriptors]
        if not (new_threads or new_descriptors) or time.monotonic() > until:
            break
        gc.collect()
        time.sleep(0.01)  # a thread that has done its work has its last steps to do
    assert not new_threads
    assert not new_descriptors
    assert not failures(caplog)


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of the detector itself."""
    return [record.getMessage() for record in caplog.get_records("call") if "watchdog failed" in record.message]


def line_of(function: Callable[..., object], mark: str = "# here") -> int:
    """Number of the line of a function that has this comment."""
    lines, first = inspect.getsourcelines(function)
    (number,) = [first + n for n, line in enumerate(lines) if mark in line]
    return number


@pytest.fixture(name="line_of", scope="session")
def line_of_fixture() -> Callable[..., int]:
    return line_of


class Others:
    """Who else uses the processors, from now on; Linux only."""

    def __init__(self) -> None:
        self._began = self._read()
        self._waited = self._delays()

    def in_the_way(self) -> bool:
        return self.share() >= BUSY or self.kept() >= KEPT

    def kept(self) -> float:
        """Seconds that one of our threads was ready to run and did not: for a burst, or for who is not counted."""
        return max((delay - self._waited.get(task, 0.0) for task, delay in self._delays().items()), default=0.0)

    def share(self) -> float:
        """Of all processors' time, what went to other processes, or was taken away by the machine's host."""
        (at, used, own), (now, used_now, own_now) = self._began, self._read()
        return max(0.0, used_now - used - (own_now - own)) / ((now - at) * (os.cpu_count() or 1))

    def _read(self) -> tuple[float, float, float]:
        used = 0.0
        with suppress(OSError):
            # user nice system idle iowait irq softirq steal
            fields = [int(word) for word in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
            used = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), used, sum(os.times()[:4])

    def _delays(self) -> dict[str, float]:
        delays = {}
        for path in list(TASKS.iterdir()) if TASKS.is_dir() else []:
            with suppress(OSError):  # it has ended, or the kernel does not count
                delays[path.name] = int((path / "schedstat").read_text().split()[1]) / 1e9
        return delays


@contextmanager
def one_try(item: pytest.Function, *, last: bool) -> Iterator[None]:
    """Passes over a failure of the test if it may be others' doing; nothing of an earlier try is held against it."""
    fixtures: dict[str, Any] = item.funcargs
    fixtures["watchdog"]()
    fixtures["caplog"].clear()
    others = Others()
    try:
        yield
    except (AssertionError, ValueError) as exc:
        asserted = isinstance(exc, AssertionError) or "values to unpack" in str(exc)  # by `(stall,) = ...`
        if last or not asserted or failures(fixtures["caplog"]) or not others.in_the_way():
            raise


def tried_again(item: pytest.Function) -> Callable[..., Any]:
    """The test, tried again if it fails while others use the processors.

    What is told of a stall is then told by a watchdog that did not get to run when it should have: it may have come too
    late to see who held the GIL, which the README says. With the processors to itself the first failure counts.
    """
    test = item.obj

    @functools.wraps(test)
    def plain(**kwargs: Any) -> None:
        for n in range(1, TRIES + 1):
            with one_try(item, last=n == TRIES):
                test(**kwargs)
                break

    @functools.wraps(test)
    async def on_loop(**kwargs: Any) -> None:
        for n in range(1, TRIES + 1):
            with one_try(item, last=n == TRIES):
                await test(**kwargs)
                break

    return on_loop if inspect.iscoroutinefunction(test) else plain


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and item.path.parent == HERE
            and TIMED & {item.path.name, item.originalname}
        ):
            item.obj = tried_again(item)


class Place:
    """A loop to block: the main one, or a resource's.

    Attributes:
        loop: what reports call it.
        error: seconds that a duration may be off, in a quiet machine.
    """

    def __init__(self, loop: str, thread: offload.LoopThread | None, error: float) -> None:
        self.loop = loop
        self.error = error
        self._thread = thread

    async def run(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run a coroutine function there."""
        return await (function() if self._thread is None else self._thread.run(function))

    async def stall_of(self, function: Callable[[], Coroutine[Any, Any, Any]], **options: Any) -> Stall:
        """The longest stall that it makes there. Again, if the machine was too busy to tell whose fault it was."""
        longest: Stall | None = None
        for _ in range(TRIES):
            async with offload.watch(log=False, **options) as detector:
                await asyncio.sleep(0.03)
                await self.run(function)
                await asyncio.sleep(0.03)
            stalls = [stall for stall in detector.report().stalls if stall.loop == self.loop]
            assert stalls, "nothing was found"
            longest = max(stalls, key=lambda stall: stall.duration)
            if longest.verdict is not Verdict.UNMEASURED:
                return longest
        pytest.skip(f"the machine was too busy to tell: {longest}")


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
