"""Starting and stopping at bad moments, loops that come and go, forks, exits: no leak, no hang, no false stall."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import offload
from offload.debug import watchdog as watchdog_module
from offload.debug.allow import Allowed
from offload.debug.record import Stall, Verdict
from offload.debug.session import Session
from offload.debug.watchdog import Watchdog
from offload.debug.watched import Settings

BLOCK = 0.15


def block() -> None:
    time.sleep(BLOCK)


async def blocks() -> None:
    block()


def long(detector: offload.SlowCallbackDetector) -> list[Stall]:
    return [s for s in detector.report().stalls if s.duration >= 0.9 * BLOCK and s.verdict is Verdict.FAIL]


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=30.0,
        check=False,
        env={**os.environ, **env},
    )


# --- start and stop ---------------------------------------------------------------------------------------------------


async def test_stopping_leaves_the_loop_as_it_was() -> None:
    """Nothing of ours stays on the loop or its selector."""
    loop: Any = asyncio.get_running_loop()
    select = loop._selector.select
    async with offload.watch():
        assert loop._selector.select is not select
    assert "select" not in vars(loop._selector)
    assert "run_forever" not in vars(loop)


@pytest.mark.parametrize("first", [0, 1])
async def test_two_detectors_end_in_any_order(first: int) -> None:
    """Each takes its own function out of the row, and the other goes on measuring."""
    loop: Any = asyncio.get_running_loop()
    detectors = [offload.watch(log=False).start(), offload.watch(log=False).start()]
    detectors[first].stop()
    block()
    await asyncio.sleep(0.03)
    detectors[1 - first].stop()
    assert len(long(detectors[1 - first])) == 1
    assert long(detectors[first]) == []
    assert "select" not in vars(loop._selector)


async def test_starting_and_stopping_twice_is_once() -> None:
    """A second start adds nothing, a second stop returns the same session."""
    detector = offload.watch(log=False).start()
    assert detector.start() is detector
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("offload watchdog") == 1
    block()
    report = detector.stop()
    assert len(report.stalls) == 1
    assert detector.stop().stalls == report.stalls


async def test_a_second_session_begins_anew() -> None:
    """What was found before the stop is not in the next session's report."""
    detector = offload.watch(log=False)
    with detector:
        block()
    assert len(long(detector)) == 1
    with detector:
        await asyncio.sleep(0)
    assert long(detector) == []


async def test_a_block_without_any_await_is_found() -> None:
    """The detector starts and stops within one step of a task; the block in between is timed exactly."""
    with offload.watch(log=False) as detector:
        block()
    (stall,) = long(detector)
    assert not stall.ongoing
    assert stall.frame is not None
    assert stall.frame.function == "block"


class Blocked:
    """A loop on a plain thread that a lock blocks until `release`."""

    def __init__(self) -> None:
        self.inside, self._go_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="blocked")
        self._thread.start()
        self.inside.wait()

    async def _main(self) -> None:
        await asyncio.sleep(0)
        self.inside.set()
        self._go_on.wait()
        await asyncio.sleep(0.02)
        block()
        await asyncio.sleep(0.02)

    def release(self) -> None:
        self._go_on.set()
        self._thread.join()


def test_stopping_does_not_wait_for_a_blocked_loop() -> None:
    """The stall is in the report as far as it had come."""
    told = threading.Event()
    detector = offload.watch(log=False, every_loop=True, threshold=0.02, on_stall=lambda stall: told.set()).start()
    blocked = Blocked()
    told.wait()
    began = time.perf_counter()
    report = detector.stop()
    took = time.perf_counter() - began
    blocked.release()
    assert took < 1.0
    assert [(stall.loop, stall.ongoing) for stall in report.stalls] == [("blocked", True)]


def test_starting_while_a_loop_is_blocked() -> None:
    """What began before is not seen, what comes after is."""
    blocked = Blocked()
    with offload.watch(log=False, every_loop=True) as detector:
        blocked.release()
    assert [stall.frame and stall.frame.function for stall in long(detector)] == ["block"]


async def test_stopping_from_on_stall() -> None:
    """The reporter's thread may stop the detector that it works for."""
    stopped = threading.Event()

    def on_stall(stall: Stall) -> None:
        detector.stop()
        stopped.set()

    detector = offload.watch(log=False, on_stall=on_stall).start()
    block()
    stopped.wait()
    for thread in threading.enumerate():
        if thread.name == "offload reporter":
            thread.join()


async def test_watching_needs_a_running_detector() -> None:
    """A loop given to a detector that is not started would never be watched; that is an error."""
    with pytest.raises(RuntimeError, match="start it before"):
        offload.watch().watch_loop(asyncio.get_running_loop())


# --- loops that come and go -------------------------------------------------------------------------------------------


def test_a_loop_that_starts_later_on_this_thread() -> None:
    """Started where no loop runs, it watches those that run there later."""
    with offload.watch(log=False) as detector:
        asyncio.run(blocks())
    assert [stall.loop for stall in long(detector)] == ["main"]


def test_the_time_between_two_runs_is_no_stall() -> None:
    """A loop that is stopped and run again was not busy in between."""
    loop = asyncio.new_event_loop()
    try:
        with offload.watch(log=False) as detector:
            detector.watch_loop(loop)
            for _ in range(2):
                loop.run_until_complete(asyncio.sleep(0.001))
                block()
            loop.run_until_complete(asyncio.sleep(0.001))
    finally:
        loop.close()
    assert long(detector) == []


async def test_a_loop_that_is_stopped_in_a_run_that_began_before() -> None:
    """The detector came in the middle of its run, and did not see how that ended; it is not blocked for ever."""
    loop = asyncio.new_event_loop()
    began, ended = threading.Event(), threading.Event()

    def main() -> None:
        loop.call_soon(began.set)
        loop.run_forever()
        ended.set()

    thread = threading.Thread(target=main)
    thread.start()
    began.wait()
    async with offload.watch(log=False) as detector:
        detector.watch_loop(loop, name="other")
        loop.call_soon_threadsafe(lambda: None)
        await asyncio.sleep(0.05)
        loop.call_soon_threadsafe(loop.stop)
        ended.wait()
        await asyncio.sleep(BLOCK)
    thread.join()
    loop.close()
    assert [s for s in detector.report().stalls if s.loop == "other" and s.duration >= 0.9 * BLOCK] == []


def test_a_callback_that_blocks_and_stops_its_loop() -> None:
    """The last turn of a run ends with the run."""

    def last() -> None:
        block()
        loop.stop()

    loop = asyncio.new_event_loop()
    try:
        with offload.watch(log=False) as detector:
            detector.watch_loop(loop)
            loop.call_soon(last)
            loop.run_forever()
            block()
    finally:
        loop.close()
    (stall,) = long(detector)
    assert not stall.ongoing
    assert stall.callback is not None
    assert stall.callback.endswith("last")
    assert stall.duration < 1.9 * BLOCK


@pytest.mark.slow
def test_a_thousand_short_loops() -> None:
    """They are one in the report, and none of them is kept."""
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def main() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await asyncio.sleep(0)

    with offload.watch(log=False) as detector:
        for _ in range(1000):
            asyncio.run(main())
        while len(detector._watched) > 1:
            time.sleep(0.01)
        gc.collect()
        assert sum(loop() is not None for loop in loops) <= 1
    (record,) = detector.report().loops
    assert record.name == "main"
    assert record.iterations >= 2000


def test_loops_on_all_threads() -> None:
    """With `every_loop` each is watched, whichever thread runs it, under the thread's name."""
    with offload.watch(log=False, every_loop=True) as detector:
        threads = [threading.Thread(target=lambda: asyncio.run(blocks()), name=f"loop {n}") for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {stall.loop for stall in long(detector)} == {f"loop {n}" for n in range(4)}


UVLOOP = """
import asyncio, threading, time
{before}
import offload

async def blocks():
    await asyncio.sleep(0.05)
    time.sleep(0.2)
    await asyncio.sleep(0.05)

with offload.watch(log=False, every_loop=True) as detector:
    import uvloop
    thread = threading.Thread(target=lambda: uvloop.run(blocks()), name="fast")
    thread.start()
    thread.join()
for stall in detector.report().stalls:
    print(stall.loop, stall.precision, stall.frame.line)
"""


@pytest.mark.parametrize("before", ["import uvloop", ""], ids=["imported before", "imported after"])
def test_uvloop_on_another_thread(before: str) -> None:
    """It is found whether uvloop was imported before the detector began or after."""
    pytest.importorskip("uvloop")
    result = run(UVLOOP.format(before=before))
    assert (result.stdout, result.stderr) == ("fast heartbeat 8\n", "")


async def test_a_closed_resource_is_no_longer_watched() -> None:
    """What its thread does on closing is its own affair, and its record stays."""
    async with offload.watch(log=False) as detector:
        async with offload.LoopThread("db", on_close=block) as thread:
            await thread.call(time.sleep, 0)
        await asyncio.sleep(0.05)
        assert [record.name for record in detector.report().loops] == ["db", "main"]
    assert [stall for stall in long(detector) if stall.loop == "db"] == []


# --- idle -------------------------------------------------------------------------------------------------------------


async def test_the_watchdog_sleeps_when_all_loops_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing turns it does not tick, but for once a second."""
    ticks: list[float] = []
    current_frames = watchdog_module.current_frames

    def counted() -> Any:
        ticks.append(time.perf_counter())
        return current_frames()

    monkeypatch.setattr(watchdog_module, "current_frames", counted)
    async with offload.watch(log=False):
        for _ in range(200):
            await asyncio.sleep(0.001)
        before = len(ticks)
        await asyncio.sleep(1.0)
        asleep = len(ticks)
        for _ in range(10):
            await asyncio.sleep(0.1)
        seldom = len(ticks) - asleep
    assert before > 5
    assert asleep - before < 5
    assert seldom < 25  # without sleep they would be forty


async def test_a_stall_right_after_a_long_sleep_has_its_line() -> None:
    """The loop that wakes wakes the watchdog."""
    async with offload.watch(log=False) as detector:
        for _ in range(2):
            await asyncio.sleep(0.5)
            block()
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
    assert [stall.frame and stall.frame.function for stall in long(detector)] == ["block", "block"]


# --- forks and exits --------------------------------------------------------------------------------------------------

FORK = """
import asyncio, os, sys, threading, time
import offload

async def blocks():
    await asyncio.sleep(0.05)
    time.sleep(0.15)
    await asyncio.sleep(0.05)

def tell(who, detector):
    report = detector.stop()
    lines = [(stall.loop, stall.frame.line) for stall in report.stalls if stall.duration > 0.14]
    print(who, lines, [thread.name for thread in threading.enumerate()], flush=True)
"""

FORK_IN_MAIN = (
    FORK
    + """
detector = offload.watch(log=False).start()
asyncio.run(blocks())
pid = os.fork()
if not pid:
    asyncio.run(blocks())
    tell("child", detector)
    os._exit(0)
os.waitpid(pid, 0)
asyncio.run(blocks())
tell("parent", detector)
"""
)

FORK_IN_LOOP = (
    FORK
    + """
async def main():
    detector = offload.watch(log=False).start()
    await blocks()
    pid = os.fork()
    if not pid:  # asyncio lets no child go on with its parent's loop
        asyncio.run(blocks())
        tell("child", detector)
        os._exit(0)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        await asyncio.sleep(0.01)
    await blocks()
    tell("parent", detector)

asyncio.run(main())
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("code", [FORK_IN_MAIN, FORK_IN_LOOP], ids=["outside", "inside a loop"])
def test_parent_and_child_are_both_watched_after_a_fork(code: str) -> None:
    """Each reports its own stalls, no thread is left, and the fork does not warn of threads."""
    result = run(code)
    assert result.stderr == ""
    assert sorted(result.stdout.splitlines()) == [
        "child [('main', 7)] ['MainThread']",
        "parent [('main', 7), ('main', 7)] ['MainThread']",
    ]


FORK_AMID_STARTS = """
import asyncio, os, threading, warnings
import offload

warnings.simplefilter("ignore")  # of forks with other threads, which is the point

def opens():
    with offload.LoopThread("db", debug=True) as thread:
        thread.submit(int).result()

opens()  # a fork amid imports is Python's to lose
done = threading.Event()
def again_and_again():
    while not done.is_set():
        opens()

other = threading.Thread(target=again_and_again)
other.start()
for _ in range(40):
    pid = os.fork()
    if not pid:
        opens()
        asyncio.run(asyncio.sleep(0))  # which nobody asked to watch
        os._exit(len(threading.enumerate()) - 1)
    assert os.waitpid(pid, 0)[1] == 0
done.set()
other.join()
print([thread.name for thread in threading.enumerate()])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_amid_starts_and_stops() -> None:
    """Nothing is raised, no thread is left here or in the child, and that can start a detector of its own."""
    result = run(FORK_AMID_STARTS)
    assert (result.returncode, result.stdout, result.stderr) == (0, "['MainThread']\n", "")


def test_two_loops_that_start_at_once_in_a_forked_child_begin_one_watchdog() -> None:
    """There no thread of ours runs until a loop does, and two threads may find that at the same time."""
    within, go_on = threading.Event(), threading.Event()
    begun = []

    class Slow(Watchdog):
        def begin(self) -> None:
            begun.append(threading.current_thread())
            within.set()
            go_on.wait(10.0)
            super().begin()

    watchdog = Slow({}, Settings(0.05, 1.0, Allowed(()), ()), Session(0.05), None)
    first = threading.Thread(target=watchdog.rouse)
    first.start()
    within.wait(10.0)
    watchdog.rouse()
    watchdog.wake()
    go_on.set()
    first.join()
    watchdog.stop()
    assert begun == [first]


@pytest.mark.parametrize("deep", [False, True])
def test_a_program_that_never_stops_its_detector_ends(deep: bool) -> None:
    """Interpreter exit needs no goodbye."""
    result = run(f"""
import asyncio, offload, time
async def main():
    offload.watch(deep={deep}, log=False).start()
    time.sleep(0.1)
    await asyncio.sleep(0.05)
asyncio.run(main())
""")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --- offload.run ------------------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, logging, time
import offload
logging.basicConfig(format="%(name)s %(levelname)s")
async def main():
    time.sleep(0.15)
    return "result"
print(offload.run(main(), debug={debug}))
"""


@pytest.mark.parametrize(
    ("debug", "env", "found"),
    [
        ("True", {}, True),
        ("False", {"OFFLOAD_DEBUG": "1"}, False),
        ("None", {}, False),
        ("None", {"OFFLOAD_DEBUG": "1"}, True),
        ("None", {"OFFLOAD_DEBUG": "0"}, False),
        ("None", {"PYTHONASYNCIODEBUG": "1"}, True),
    ],
)
def test_run_watches_if_asked_to(debug: str, env: dict[str, str], found: bool) -> None:
    """By its argument, or else by the environment; the program's result is returned either way."""
    result = run(PROGRAM.format(debug=debug), **{"OFFLOAD_DEBUG": "", "PYTHONASYNCIODEBUG": "", **env})
    assert result.stdout == "result\n"
    assert ("offload.debug WARNING" in result.stderr) is found


async def test_run_refuses_a_running_loop() -> None:
    """As `asyncio.run` does."""
    coroutine = blocks()
    with pytest.raises(RuntimeError, match="running event loop"):
        offload.run(coroutine)
    coroutine.close()


def test_run_takes_a_loop_factory() -> None:
    """uvloop, for one."""
    uvloop = importlib.import_module("uvloop") if importlib.util.find_spec("uvloop") else pytest.skip("no uvloop")

    async def main() -> type:
        return type(asyncio.get_running_loop())

    assert offload.run(main(), debug=True, loop_factory=uvloop.new_event_loop) is uvloop.Loop


async def test_debug_of_a_loop_thread_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    """`LoopThread(debug=True)` is watched though no detector was started, and takes the watchdog along when it ends."""
    async with offload.LoopThread("db", debug=True) as thread:
        await thread.run(blocks)
        await asyncio.sleep(0.05)
    (line,) = [record.message for record in caplog.records if record.name == "offload.debug"]
    assert line.startswith("db")
    assert "in block" in line


@pytest.mark.skipif(sys.version_info >= (3, 11, 12), reason="later ones do not need it")
def test_the_collector_is_held_off_while_frames_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `sys._current_frames` can deadlock with it (gh-106883); and it is left off where it was off."""
    seen: list[bool] = []
    frames: Callable[[], Any] = sys._current_frames

    def asked() -> Any:
        seen.append(gc.isenabled())
        return frames()

    monkeypatch.setattr(sys, "_current_frames", asked)
    watchdog_module.current_frames()
    assert gc.isenabled()
    gc.disable()
    try:
        watchdog_module.current_frames()
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert seen == [False, False]


def test_closed_resource_is_one_loop_of_the_report() -> None:
    """asyncio runs a resource's loop once more to close it, which does not make a second one of it."""
    with offload.SlowCallbackDetector(every_loop=True, log=False) as detector, offload.LoopThread("db") as thread:
        thread.submit(int).result()
    assert [loop.name for loop in detector.report().loops].count("db") == 1
