"""The detectors that `bench_detector` compares, each switched on as its documentation recommends it.

All have a threshold of 50 ms, where they have one. What they report becomes `Claim`s, by the same rules for all: a
claim names a line of `scenarios.py` if it is the innermost frame of that file in a stack that the detector shows,
whatever of the stack lies in libraries. Detectors are imported by name, for they need not be installed.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import re
import tempfile
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import offload

THRESHOLD = 0.05
UNMEASURED = "unmeasured"
HERE = "scenarios.py"


@dataclass
class Claim:
    """What a contestant said of one stall.

    Attributes:
        seconds: how long it says it was; None: it does not say.
        lines: those of `scenarios.py` that it names.
        cause: why, for who says so.
        how: "raises": an exception in the program; "logs": one that the loop swallowed; UNMEASURED: a report that does
            not count, for it blames a starved machine; "": a report.
    """

    seconds: float | None = None
    lines: list[int] = field(default_factory=list)
    cause: str = ""
    how: str = ""


Claims = list[Claim]
Contestant = Callable[[Claims], AbstractAsyncContextManager[None]]


def own_line(stack: Iterable[tuple[str, int]]) -> list[int]:
    """The first line of `scenarios.py` in a stack that has the innermost frame first."""
    return [line for file, line in stack if Path(file).name == HERE][:1]


@asynccontextmanager
async def with_nothing(claims: Claims) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def with_offload(claims: Claims) -> AsyncIterator[None]:
    async with offload.watch(every_loop=True) as detector:
        yield
    for stall in detector.report().stalls:
        if stall.verdict.value == UNMEASURED:
            claims.append(Claim(stall.duration, how=UNMEASURED))
        elif stall.verdict.value == "fail":
            # Who holds the GIL is shown beside the line that waits for it, and is the one to blame.
            frame = stall.holder if stall.cause.value == "gil" else stall.frame
            cause = stall.kind.value if stall.kind.value == "saturated" else stall.cause.value
            claims.append(Claim(stall.duration, own_line([(frame.file, frame.line)] if frame else []), cause))


@asynccontextmanager
async def with_offload_counting_nothing(claims: Claims) -> AsyncIterator[None]:
    async with offload.watch(histogram=False):
        yield


def read_lines(text: str) -> list[int]:
    """The lines of `scenarios.py` that a repr of a handle or a task names ("running at", "created at")."""
    return [int(number) for number in re.findall(rf"{re.escape(HERE)}:(\d+)", text)]


@asynccontextmanager
async def with_asyncio_debug(claims: Claims) -> AsyncIterator[None]:
    """`PYTHONASYNCIODEBUG` is set before the loop is made."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.match(r"Executing (.*) took ([\d.]+) seconds", record.getMessage(), re.DOTALL):
                claims.append(Claim(float(found[2]), read_lines(found[1])))

    asyncio.get_running_loop().slow_callback_duration = THRESHOLD
    logging.getLogger("asyncio").addHandler(Listener())
    yield


def read_stacks(folder: Path) -> Iterator[Claim]:
    """The first of the three files that aiodebug writes for one hang."""
    for path in folder.glob("*-0.txt"):
        for stack in path.read_text().split("# ThreadID")[1:]:
            frames = re.findall(r'^File: "(.*)", line (\d+), in', stack, re.MULTILINE)
            if line := own_line((file, int(number)) for file, number in reversed(frames)):
                yield Claim(lines=line)


@asynccontextmanager
async def with_aiodebug(claims: Claims) -> AsyncIterator[None]:
    """Both of its parts: slow callbacks are logged, and stacks of all threads written to files while the loop hangs."""
    slow, hang = (importlib.import_module(f"aiodebug.{part}") for part in ("log_slow_callbacks", "hang_inspection"))
    slow.enable(THRESHOLD, lambda name, seconds: claims.append(Claim(seconds, read_lines(name))))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        dumper = hang.start(folder, interval=THRESHOLD)
        yield
        await hang.stop_wait(dumper)
        claims += read_stacks(Path(folder))


@asynccontextmanager
async def with_aiocop(claims: Claims) -> AsyncIterator[None]:
    """A report of I/O that took less than the threshold does not count, nor is it held against it."""
    aiocop = importlib.import_module("aiocop")

    def first_line(trace: str) -> list[int]:
        return own_line((f, int(n)) for f, n in (part.rsplit(":", 2)[:2] for part in trace.split(" <- ")))

    def on_slow_task(event: Any) -> None:
        if event.exceeded_threshold:
            traces = [e["trace"] for e in event.blocking_events] + [s["trace"] for s in event.cpu_stack_samples[:1]]
            claims.append(Claim(event.elapsed_ms / 1e3, sorted({n for t in traces for n in first_line(t)})))

    aiocop.patch_audit_functions()
    aiocop.start_blocking_io_detection()
    aiocop.detect_slow_tasks(threshold_ms=int(THRESHOLD * 1e3), on_slow_task=on_slow_task)
    aiocop.activate()
    yield
    aiocop.deactivate()


@asynccontextmanager
async def with_pyleak(claims: Claims) -> AsyncIterator[None]:
    pyleak = importlib.import_module("pyleak")
    logging.getLogger("pyleak.eventloop").setLevel(logging.ERROR)
    try:
        async with pyleak.no_event_loop_blocking(action="raise", threshold=THRESHOLD, check_interval=0.01):
            yield
    except pyleak.EventLoopBlockError as error:
        for block in error.blocking_events:
            stack = [(frame.filename, frame.lineno) for frame in reversed(block.blocking_stack or [])]
            claims.append(Claim(block.duration, own_line(stack)))


@asynccontextmanager
async def with_blockbuster(claims: Claims) -> AsyncIterator[None]:
    """Its exception ends the call; where a callback raises it, it reaches only the log of the loop."""
    blockbuster = importlib.import_module("blockbuster")

    def claim(error: BaseException, how: str) -> None:
        lines = []
        chained: BaseException | None = error  # a second one, from a clean-up, hides the first
        while chained is not None:
            frames = traceback.extract_tb(chained.__traceback__)
            lines += own_line((frame.filename, frame.lineno or 0) for frame in reversed(frames))
            chained = chained.__context__
        claims.append(Claim(lines=lines, how=how))

    def on_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and isinstance(error, blockbuster.BlockingError):
            claim(error, "logs")
        else:
            loop.default_exception_handler(context)

    asyncio.get_running_loop().set_exception_handler(on_error)
    with blockbuster.blockbuster_ctx():
        try:
            yield
        except blockbuster.BlockingError as error:
            claim(error, "raises")


PLAIN = "plain asyncio"
AGAIN = "plain asyncio, again"
DEBUG = "asyncio debug"
OFFLOAD = "offload"
COUNTING_NOTHING = "offload, no histogram"
CONTESTANTS: dict[str, Contestant] = {
    PLAIN: with_nothing,
    AGAIN: with_nothing,
    OFFLOAD: with_offload,
    COUNTING_NOTHING: with_offload_counting_nothing,
    DEBUG: with_asyncio_debug,
    "aiodebug": with_aiodebug,
    "aiocop": with_aiocop,
    "pyleak": with_pyleak,
    "blockbuster": with_blockbuster,
}
DETECTORS = [name for name in CONTESTANTS if name not in (PLAIN, AGAIN, COUNTING_NOTHING)]


def prepare(contestant: str) -> None:
    """What has to happen before there is a loop."""
    os.environ.pop("PYTHONASYNCIODEBUG", None)
    if contestant == DEBUG:
        os.environ["PYTHONASYNCIODEBUG"] = "1"
