"""The detector itself: what it measures, whom it excuses, what it tells whom, and what it leaves alone."""

from __future__ import annotations

import asyncio
import contextvars
import faulthandler
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import pytest

import offload
from offload.debug import deadman
from offload.debug.allow import Allowed
from offload.debug.clocks import Clock, Machine
from offload.debug.edge import POINTS, Timeline, make_edge
from offload.debug.record import Cause, Frame, Kind, LoopRecord, Stall, Verdict
from offload.debug.session import MINUTE, Logbook, Session
from offload.debug.stack import Look, Who, blamed, contributors, is_user, stretches
from offload.debug.watchdog import current_frames
from offload.debug.watched import Settings, Watched

BLOCK = 0.15


def block() -> None:
    time.sleep(BLOCK)  # which is what blocks a loop


def long(detector: offload.SlowCallbackDetector) -> list[Stall]:
    return [s for s in detector.report().stalls if s.duration >= 0.9 * BLOCK]


# --- measuring --------------------------------------------------------------------------------------------------------


async def test_every_turn_is_counted() -> None:
    """Turns, the histogram's sum and the busy time agree; a block shows as the longest."""
    async with offload.watch(log=False) as detector:
        for _ in range(200):
            await asyncio.sleep(0)
        block()
        await asyncio.sleep(0.02)  # a turn ends where the next begins
    (record,) = detector.report().loops
    assert record.iterations >= 200
    assert sum(record.histogram) >= record.iterations
    assert sum(record.histogram[27:29]) >= 1  # 0.15 s is between 2**27 and 2**28 ns
    assert BLOCK <= record.longest <= record.busy <= record.watched
    assert record.timeline
    assert all(0 <= share <= 1 for _, share in record.timeline)


async def test_the_histogram_can_be_left_out() -> None:
    """`histogram=False` counts turns, and no more."""
    async with offload.watch(log=False, histogram=False) as detector:
        await asyncio.sleep(0)
    (record,) = detector.report().loops
    assert record.histogram == ()
    assert record.iterations > 0


async def test_a_report_while_it_runs_has_the_stall_so_far() -> None:
    """Whoever looks before the end sees what is known."""
    async with offload.watch(log=False) as detector:
        block()
        while all(stall.ongoing for stall in long(detector)):  # noqa: ASYNC110 - a tick tells of its end
            await asyncio.sleep(0.01)
        (early,) = long(detector)
    assert long(detector) == [early]
    assert detector.report().verdict is Verdict.FAIL


async def test_a_stall_that_ends_while_the_watchdog_ticks_is_told_at_the_next() -> None:
    """The clocks were read before its end, so its cause is not known yet."""
    loop: Any = asyncio.get_running_loop()
    told: list[bool] = []
    settings = Settings(0.02, 1.0, Allowed(()), ())
    edge = make_edge(loop, "main", 0.02, Clock.now(), wake=lambda: None, begins=Clock.now())
    watched = Watched(edge, settings, Session(0.02), lambda stall: told.append(stall.ongoing))
    machine = Machine()

    def tick(meanwhile: Callable[[], object] = int) -> None:
        now = Clock.now()
        watched.look(current_frames(), now, ())
        watched.read(machine.read(now, 0.0), None, 1.0)
        meanwhile()
        watched.tell(now, current_frames(), ())

    try:
        tick()
        time.sleep(0.03)  # a stall  # noqa: ASYNC251
        tick(meanwhile=lambda: loop._selector.select(0))  # where it ends
        assert told == [True]
        tick()
        assert told == [True, False]
    finally:
        edge.unhook()
        watched.forget()
        machine.close()


def test_a_timeline_never_grows_beyond_its_points() -> None:
    """Pairs are joined, and the mean of the shares is kept."""
    line = Timeline(0.0)
    busy = 0.0
    for n in range(1, 10_001):
        busy += 0.2 * (n % 2)
        line.add(n * 0.2, busy)
    points = line.points()
    assert POINTS / 4 < len(points) <= POINTS
    assert points[-1][0] > 1900
    spans = [t2 - t1 for (t1, _), (t2, _) in zip(((0.0, 0.0), *points), points, strict=False)]
    mean = sum(span * share for span, (_, share) in zip(spans, points, strict=True)) / points[-1][0]
    assert mean == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"queue_threshold": -1.0}, {"allow": ["no colon"]}])
def test_options_that_make_no_sense_are_refused(options: Any) -> None:
    """At once, by ValueError."""
    with pytest.raises(ValueError, match="expected"):
        offload.SlowCallbackDetector(**options)


# --- whom to blame ----------------------------------------------------------------------------------------------------


def test_the_users_line_is_blamed_before_a_librarys() -> None:
    """The innermost line of the program; else of an installed package; else the innermost of all."""
    mine, theirs, standard = (
        Frame("/srv/app/db.py", 1, "load"),
        Frame("/srv/.venv/lib/python3.12/site-packages/requests/api.py", 2, "get"),
        Frame(logging.__file__, 3, "info"),
    )
    assert blamed([mine, theirs, standard]) == mine
    assert blamed([theirs, standard]) == theirs
    assert blamed([standard]) == standard
    assert blamed([mine, theirs, Frame("<string>", 2, "__init__")]) == mine
    assert blamed([Frame("<string>", 1, "<module>"), theirs]) == Frame("<string>", 1, "<module>")
    assert blamed([]) is None
    assert not is_user("<frozen importlib._bootstrap>")
    assert not is_user(offload.__file__)
    assert is_user("<stdin>")


def looks(*turns: tuple[float, int, str], of: int) -> list[Look]:
    return [Look(at, (), Who(label), turn, of) for at, turn, label in turns]


def test_a_long_callback_among_short_ones_is_told_from_many() -> None:
    """What passed between two looks may belong to either, and nothing runs before the first callback of a turn."""
    one = looks((0.03, 0, "a"), (0.035, 0, "a"), (0.09, 0, "a"), (0.095, 1, "b"), of=2)
    first, second = stretches(one, 0.0, 0.1)
    assert first.least == pytest.approx(0.09)
    assert first.most == pytest.approx(0.095)
    assert second.least == pytest.approx(0.005)
    assert contributors(one, 1.0) == (("a", 0.75), ("b", 0.25))


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("request")
UNSET: contextvars.ContextVar[str] = contextvars.ContextVar("unset")


async def test_the_context_of_the_request_is_reported() -> None:
    """Of a task and of a plain callback, as text, for the variables that were asked for and are set."""

    async def handles() -> None:
        VARIABLE.set("r-17")
        block()
        asyncio.get_running_loop().call_soon(block)
        await asyncio.sleep(0)

    async with offload.watch(log=False, context=[VARIABLE, UNSET]) as detector:
        await asyncio.create_task(handles())
        await asyncio.sleep(0.03)
    assert [dict(stall.context) for stall in long(detector)] == [{"request": "r-17"}] * 2


async def test_those_that_had_to_wait_are_counted() -> None:
    """Callbacks that were ready while one blocked."""
    loop = asyncio.get_running_loop()
    async with offload.watch(log=False) as detector:
        await asyncio.sleep(0.03)
        loop.call_soon(block)
        for _ in range(7):
            loop.call_soon(lambda: None)
        await asyncio.sleep(0.03)
    (stall,) = long(detector)
    assert stall.kind is Kind.SLOW
    assert stall.waited >= 7
    assert stall.callbacks >= 8


# --- who may ----------------------------------------------------------------------------------------------------------


class Startup:
    async def load(self) -> None:
        block()


async def loads() -> None:
    await Startup().load()


@pytest.mark.parametrize(
    ("pattern", "passes"),
    [
        ("test_slow.py:load", True),
        ("test_slow.py:Startup.load", True),
        ("*/tests/debug/*.py:lo*", True),
        ("test_slow.py:block", True),
        ("test_slow.py:save", False),
        ("slow.py:load", False),
    ],
)
async def test_the_allow_list_is_of_files_and_functions(pattern: str, passes: bool) -> None:
    """A function in it may block with all it calls: found, with the verdict "pass"."""
    async with offload.watch(log=False, allow=[pattern]) as detector:
        await loads()
        await asyncio.sleep(0.03)
    (stall,) = long(detector)
    assert (stall.verdict is Verdict.PASS) is passes


@offload.may_block("a function")
def may() -> None:
    block()


@offload.may_block("a coroutine function")
async def may_await() -> None:
    await asyncio.sleep(0)
    block()


async def may_inside() -> None:
    with offload.may_block("a block"):
        block()


async def calls_may() -> None:
    may()


@pytest.mark.parametrize("function", [calls_may, may_await, may_inside])
async def test_code_may_say_that_it_blocks(function: Callable[[], Any]) -> None:
    """By decorator or context manager; a plain callback or a task."""
    async with offload.watch(log=False) as detector:
        await function()
        asyncio.get_running_loop().call_soon(may)
        await asyncio.sleep(0.03)
    assert [stall.verdict for stall in long(detector)] == [Verdict.PASS] * 2
    assert detector.report().verdict is Verdict.PASS


async def test_only_the_task_that_says_so_may_block() -> None:
    """Another task is not excused while one is inside and awaits."""

    async def other() -> None:
        block()

    async with offload.watch(log=False) as detector:
        with offload.may_block():
            await asyncio.create_task(other())
        block()
        await asyncio.sleep(0.03)
    assert [stall.verdict for stall in long(detector)] == [Verdict.FAIL] * 2


# --- telling ----------------------------------------------------------------------------------------------------------


async def test_on_stall_runs_on_a_thread_of_its_own() -> None:
    """Not in the loop, and not on the watchdog's thread; with the stall while it lasts and at its end."""
    seen: list[tuple[bool, int]] = []
    async with offload.watch(log=False, on_stall=lambda s: seen.append((s.ongoing, threading.get_ident()))):
        block()
        await asyncio.sleep(0.03)
    assert [ongoing for ongoing, _ in seen] == [True, False]
    assert threading.get_ident() not in {ident for _, ident in seen}


async def test_an_on_stall_that_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """And the next stall is told all the same."""
    seen: list[Stall] = []

    def on_stall(stall: Stall) -> None:
        seen.append(stall)
        raise RuntimeError("mine")

    async with offload.watch(log=False, on_stall=on_stall):
        for _ in range(2):
            block()
            await asyncio.sleep(0.03)
    assert sum(not stall.ongoing and stall.duration >= BLOCK for stall in seen) == 2
    assert {r.exc_info[1].args for r in caplog.records if r.exc_info and r.exc_info[1]} == {("mine",)}


async def test_an_on_stall_that_blocks_keeps_nobody_from_being_watched() -> None:
    """The watchdog goes on looking, and `stop` waits for the reporter for so long and no longer."""
    go_on = threading.Event()

    def on_stall(stall: Stall) -> None:
        go_on.wait()

    try:
        async with offload.watch(log=False, on_stall=on_stall) as detector:
            for _ in range(2):
                block()
                await asyncio.sleep(0.03)
        assert [stall.frame and stall.frame.function for stall in long(detector)] == ["block", "block"]
    finally:
        go_on.set()
        for thread in threading.enumerate():
            if thread.name == "offload reporter":
                thread.join()


async def test_a_loop_that_blocks_inside_a_log_handler_is_reported() -> None:
    """Its lock is held as long as the stall lasts; the report waits for it, the watching does not."""
    told = threading.Event()

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == "program":
                told.wait(5.0)

    handler = Slow()
    logger = logging.getLogger("program")
    ours = logging.getLogger("offload.debug")
    logger.addHandler(handler)
    ours.addHandler(handler)
    timer = threading.Timer(0.4, told.set)
    timer.start()
    try:
        async with offload.watch() as detector:
            logger.warning("now")
            await asyncio.sleep(0.03)
    finally:
        timer.join()
        logger.removeHandler(handler)
        ours.removeHandler(handler)
    (stall,) = long(detector)
    assert stall.samples > 20
    assert stall.innermost is not None
    assert stall.innermost.file == threading.__file__


def made(number: int, duration: float, line: int = 1, **fields: Any) -> Stall:
    return Stall(number, "main", 0.0, duration, 0.05, Cause.WAIT, frame=Frame("a.py", line, "f"), **fields)


def test_one_line_a_fingerprint_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """The first at once; those within the minute are counted, and told with their quantiles when it is over."""
    book = Logbook()
    with caplog.at_level(logging.DEBUG, logger="offload.debug"):
        for n in range(100):
            book.add(made(n, 0.1 + n / 1000), now=n * 0.1)
        book.add(made(100, 0.1, line=2), now=10.0)
        assert len(caplog.messages) == 2
        assert book.pending == 1
        book.flush(now=MINUTE - 1)
        assert len(caplog.messages) == 2
        book.flush(now=MINUTE)
    assert len(caplog.messages) == 3
    assert book.pending == 0
    assert "99 times, p50 150 ms, p99 199 ms, max 199 ms" in caplog.messages[2]


def test_what_is_logged_and_how_loudly(caplog: pytest.LogCaptureFixture) -> None:
    """Failed: warning; unmeasured: info; allowed: not at all; while it lasts: once it is 16 times too long."""
    book = Logbook()
    with caplog.at_level(logging.DEBUG, logger="offload.debug"):
        book.add(made(1, 0.1, line=1), now=0.0)
        book.add(made(2, 0.1, line=2, verdict=Verdict.UNMEASURED), now=0.0)
        book.add(made(3, 0.1, line=3, verdict=Verdict.PASS), now=0.0)
        book.add(made(4, 0.2, line=4, ongoing=True), now=0.0)
        book.add(made(4, 0.8, line=4, ongoing=True), now=0.0)
        book.add(made(4, 0.9, line=4), now=0.0)
    assert [(r.levelname, "still" in r.message) for r in caplog.records] == [
        ("WARNING", False),
        ("INFO", False),
        ("WARNING", True),
        ("WARNING", False),
    ]


def test_what_is_kept_is_bounded() -> None:
    """1,000 stalls, the others counted; a stall gives way to its own end; loops of one name are one."""
    session = Session(0.05)
    for n in range(1, 1201):
        session.add(made(n, 0.1, ongoing=True))
        session.add(made(n, 0.2))
        session.bury(LoopRecord("main", "MainThread", iterations=2, busy=0.5, timeline=((n * 0.1, 0.5),)))
    report = session.report([])
    assert len(report.stalls) == 1000
    assert report.lost == 200
    assert {stall.duration for stall in report.stalls} == {0.2}
    (record,) = report.loops
    assert (record.iterations, record.busy) == (2400, 600.0)
    assert len(record.timeline) <= POINTS


# --- resources --------------------------------------------------------------------------------------------------------


async def test_a_call_on_a_resource_is_its_job() -> None:
    """However long it blocks its own loop, while nobody waits."""
    async with offload.watch(log=False) as detector, offload.LoopThread("db") as thread:
        await thread.call(block)
        thread.submit(block).result()
        await asyncio.sleep(0.03)
    assert [stall for stall in detector.report().stalls if stall.loop == "db"] == []
    (db,) = [record for record in detector.report().loops if record.name == "db"]
    assert db.resource
    assert db.longest >= BLOCK


async def test_a_call_that_waits_too_long_in_the_queue() -> None:
    """It names the call that runs and where it stands, while it lasts and at its end."""
    seen: list[Stall] = []
    go_on = threading.Event()

    def on_stall(stall: Stall) -> None:
        if stall.kind is Kind.QUEUE:
            seen.append(stall)
            if stall.duration >= 0.4:
                go_on.set()

    def hogs() -> None:
        go_on.wait()

    async with (
        offload.watch(log=False, queue_threshold=0.1, on_stall=on_stall) as detector,
        offload.LoopThread("db") as thread,
    ):
        first, _, last = thread.call(hogs), thread.call(int), thread.call(int)
        await first
        await last
        await asyncio.sleep(0.1)
    assert [stall.ongoing for stall in seen] == [True, True, False]
    (stall,) = [s for s in detector.report().stalls if s.loop == "db"]
    assert stall == seen[-1]
    assert (stall.kind, stall.threshold, stall.waited) == (Kind.QUEUE, 0.1, 2)
    assert stall.duration >= 0.4
    assert stall.callback is not None
    assert stall.callback.endswith("hogs")
    assert stall.frame is not None
    assert stall.frame.function.endswith("hogs")
    assert stall.cause in (Cause.LOCK, Cause.WAIT)


async def test_a_coroutine_on_a_resource_must_not_block() -> None:
    """It has neighbours, like a coroutine on any loop; the job of a call in the same turn is not held against it."""

    async def blocks() -> None:
        block()

    async with offload.watch(log=False) as detector, offload.LoopThread("db") as thread:
        await asyncio.gather(thread.call(block), thread.run(blocks))
        await asyncio.sleep(0.03)
    (stall,) = [s for s in detector.report().stalls if s.loop == "db"]
    assert stall.resource
    assert stall.coroutine is not None
    assert stall.coroutine.endswith("blocks")
    assert 0.8 * BLOCK <= stall.duration < 1.8 * BLOCK


def test_a_loop_that_is_called_a_resource() -> None:
    """Of one that is not a LoopThread's all plain callbacks are its job; steps of tasks are not."""

    async def blocks() -> None:
        block()

    async def main() -> None:
        detector.watch_loop(asyncio.get_running_loop(), name="mine", resource=True)
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(block)
        await asyncio.sleep(0)
        await asyncio.create_task(blocks())
        await asyncio.sleep(0.03)

    with offload.watch(log=False) as detector:
        thread = threading.Thread(target=lambda: asyncio.run(main()))
        thread.start()
        thread.join()
    (stall,) = [s for s in detector.report().stalls if s.loop == "mine"]
    assert stall.coroutine is not None
    assert stall.coroutine.endswith("blocks")


# --- deep mode --------------------------------------------------------------------------------------------------------


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def set_timer(file: TextIO) -> None:
    faulthandler.dump_traceback_later(100, file=file)
    while not deadman._in_use():  # its thread is about to begin
        time.sleep(0.01)


def cancel_timer() -> None:
    faulthandler.cancel_dump_traceback_later()
    while deadman._in_use():  # its thread is about to end
        time.sleep(0.01)


@linux
async def test_deep_mode_leaves_a_timer_alone_that_is_set(caplog: pytest.LogCaptureFixture) -> None:
    """Somebody waits for it; the detector works without, and says so."""
    with open("/dev/null", "w") as nowhere:  # noqa: ASYNC230
        set_timer(nowhere)
        setter = faulthandler.dump_traceback_later
        try:
            async with offload.watch(log=False, deep=True) as detector:
                await asyncio.sleep(0.1)
                assert faulthandler.dump_traceback_later is setter
                assert deadman._in_use()
                block()
                await asyncio.sleep(0.03)
        finally:
            cancel_timer()
    assert len(long(detector)) == 1
    assert [record.message for record in caplog.records if record.name == "offload.debug"] == [
        "deep mode is off: faulthandler's timer seems to be in use"
    ]


@linux
async def test_deep_mode_gives_the_timer_to_whoever_sets_it(caplog: pytest.LogCaptureFixture) -> None:
    """Theirs is not set anew by us, and faulthandler is as it was when we leave."""
    setter = faulthandler.dump_traceback_later
    with open("/dev/null", "w") as nowhere:  # noqa: ASYNC230
        try:
            async with offload.watch(log=False, deep=True):
                await asyncio.sleep(0.1)
                set_timer(nowhere)
                await asyncio.sleep(0.1)
            assert faulthandler.dump_traceback_later is setter
            assert deadman._in_use()
        finally:
            cancel_timer()
    assert ["from now on" in record.message for record in caplog.records if record.name == "offload.debug"] == [True]


@pytest.mark.slow
def test_a_librarys_thread_is_not_taken_for_the_timers() -> None:
    """jemalloc's, which comes with pyarrow, blocks all signals too; the timer is found beside it all the same."""
    pytest.importorskip("pyarrow")
    code = """
import faulthandler, pyarrow
from offload.debug import deadman
def ask():
    while deadman._in_use() is not wanted:  # until the library's thread has named itself, the timer's begun or ended
        pass
wanted = False; ask()
faulthandler.dump_traceback_later(1000)
wanted = True; ask()
faulthandler.cancel_dump_traceback_later()
wanted = False; ask()
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert done.stdout == b"done\n"


def test_the_text_of_faulthandler_is_read() -> None:
    """Innermost line first there, last here; the last text of each thread counts."""
    text = """Timeout (0:00:00.050000)!
Thread 0x00007f4e69cb2b80 (most recent call first):
  File "/srv/a b.py", line 12 in inner
  File "/srv/a b.py", line 3 in <module>

Thread 0x0000000000000abc [name] (most recent call first):
  <no Python frame>
"""
    assert deadman.parse(text) == {
        0x7F4E69CB2B80: (Frame("/srv/a b.py", 3, "<module>"), Frame("/srv/a b.py", 12, "inner")),
        0xABC: (),
    }
