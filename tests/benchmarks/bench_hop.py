"""What it costs to have a plain function run on another thread and to await its result.

    100 bytes to an unbuffered file on tmpfs, so that the work itself is next to nothing
    one after another: each awaited before the next    100 at once: asyncio.gather, the same for all

How fast a call is when each waits for the one before is a matter of how fast a sleeping core wakes, and the machine's
state decides that. So there are three states, and beside every figure stands the floor: two threads that wake each
other through a descriptor and do nothing else. A burst costs what Python costs; its floors are `gather` alone, with a
hundred futures that the loop itself sets, and the writes alone.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import aiofiles
from measure import Figures, Options, Table, cpus, memory_folder, shuffled, tell

import offload
from offload import LoopThread

DATA = b"x" * 99 + b"\n"
BURST = 100

Write = Callable[[bytes], Awaitable[object]]
Contestant = Callable[[Path], AbstractAsyncContextManager[Write]]


# --- contestants -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def with_offload(path: Path) -> AsyncIterator[Write]:
    with raw_file(path) as file:
        async with LoopThread("bench") as thread:
            yield lambda data: thread.call(file.write, data)


@asynccontextmanager
async def with_open(path: Path) -> AsyncIterator[Write]:
    async with offload.open(path, "wb", buffering=0) as file:
        yield file.write


@asynccontextmanager
async def with_aiofiles(path: Path) -> AsyncIterator[Write]:
    async with aiofiles.open(path, "wb", buffering=0) as file:
        yield file.write


@asynccontextmanager
async def with_to_thread(path: Path) -> AsyncIterator[Write]:
    with raw_file(path) as file:
        yield lambda data: asyncio.to_thread(file.write, data)


@asynccontextmanager
async def with_executor(path: Path) -> AsyncIterator[Write]:
    loop = asyncio.get_running_loop()
    with raw_file(path) as file, ThreadPoolExecutor(1) as pool:
        yield lambda data: loop.run_in_executor(pool, file.write, data)


@asynccontextmanager
async def with_write_thread(path: Path) -> AsyncIterator[Write]:
    with raw_file(path) as file:
        async with WriteThread(file) as thread:
            yield thread.write


class WriteThread(threading.Thread):
    """The usual recipe: a thread that owns a file and a loop, and a coroutine sent over for each write."""

    def __init__(self, file: FileIO) -> None:
        super().__init__(daemon=True)
        self._file = file
        self._loop = asyncio.new_event_loop()

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _write(self, data: bytes) -> None:
        self._file.write(data)

    def write(self, data: bytes) -> Awaitable[None]:
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._write(data), self._loop))

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join()


def raw_file(path: Path) -> FileIO:
    return FileIO(path, "w")


CONTESTANTS: dict[str, Contestant] = {
    "offload": with_offload,
    "offload.open": with_open,
    "aiofiles": with_aiofiles,
    "asyncio.to_thread": with_to_thread,
    "run_in_executor(1 thread)": with_executor,
    "WriteThread": with_write_thread,
}
PING_PONG, GATHER, WRITES = "floor: ping-pong", "floor: gather alone", "floor: writes alone"
FLOORS = (PING_PONG, GATHER, WRITES)


# --- one measurement each --------------------------------------------------------------------------------------------


@contextmanager
def clocked(figures: Figures, name: str, quantity: str, calls: int) -> Iterator[None]:
    """Microseconds a call, by the clock and of CPU in all threads."""
    gc.collect()
    cpu, start = time.process_time(), time.perf_counter()
    yield
    figures.add(name, quantity, (time.perf_counter() - start) / calls * 1e6)
    figures.add(name, f"{quantity}, CPU", (time.process_time() - cpu) / calls * 1e6)


async def measure(figures: Figures, name: str, folder: Path, calls: int, bursts: int) -> None:
    path = folder / "out"
    async with CONTESTANTS[name](path) as write:
        await repeat(write, calls // 10, 2)
        with clocked(figures, name, "one", calls):
            await repeat(write, calls, 0)
        with clocked(figures, name, "burst", bursts * BURST):
            await repeat(write, 0, bursts)
    expected = (calls + calls // 10 + (bursts + 2) * BURST) * len(DATA)
    if (size := path.stat().st_size) != expected:
        raise RuntimeError(f"{name} wrote {size} bytes, expected {expected}")


async def repeat(write: Write, calls: int, bursts: int) -> None:
    for _ in range(calls):
        await write(DATA)
    for _ in range(bursts):
        await asyncio.gather(*[write(DATA) for _ in range(BURST)])


async def measure_gather(figures: Figures, bursts: int) -> None:
    loop = asyncio.get_running_loop()

    def soon() -> asyncio.Future[None]:
        future = loop.create_future()
        loop.call_soon(future.set_result, None)
        return future

    with clocked(figures, GATHER, "burst", bursts * BURST):
        for _ in range(bursts):
            await asyncio.gather(*[soon() for _ in range(BURST)])


def measure_writes(figures: Figures, folder: Path, calls: int) -> None:
    with raw_file(folder / "out") as file:
        for quantity in ("one", "burst"):
            with clocked(figures, WRITES, quantity, calls):
                for _ in range(calls):
                    file.write(DATA)


def measure_ping_pong(figures: Figures, calls: int) -> None:
    """Two threads, each asleep until the other wakes it: what one call after another cannot go below."""
    event = hasattr(os, "eventfd")
    there = (os.eventfd(0),) * 2 if event else os.pipe()
    back = (os.eventfd(0),) * 2 if event else os.pipe()
    token = (1).to_bytes(8, sys.byteorder)
    rounds = calls // 10 + calls

    def answer() -> None:
        for _ in range(rounds):
            os.read(there[0], 8)
            os.write(back[1], token)

    def ask(times: int) -> None:
        for _ in range(times):
            os.write(there[1], token)
            os.read(back[0], 8)

    thread = threading.Thread(target=answer)
    thread.start()
    ask(calls // 10)
    with clocked(figures, PING_PONG, "one", calls):
        ask(calls)
    thread.join()
    for fd in {*there, *back}:
        os.close(fd)


# --- the machine's states ---------------------------------------------------------------------------------------------


@contextmanager
def bound_to(wanted: list[int]) -> Iterator[None]:
    """This thread, and those that it starts, on these CPUs only."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def spinning_on(cpu: int) -> Iterator[None]:
    """Another process that keeps a CPU busy, and so awake."""
    code = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE) as child:
        try:
            os.sched_setaffinity(child.pid, [cpu])
            assert child.stdout is not None
            child.stdout.readline()
            yield
        finally:
            child.kill()


@dataclass
class State:
    """What the machine is like while a round runs."""

    name: str
    cpus: list[int]
    busy: int | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(bound_to(self.cpus))
            if self.busy is not None:
                stack.enter_context(spinning_on(self.busy))
            yield


def states() -> tuple[list[State], list[str]]:
    """The states that this machine can be brought into, and what to say of the others."""
    two = cpus()[:2]
    if not hasattr(os, "sched_setaffinity"):
        return [State("as the system schedules", two)], ["this system cannot bind a thread to a CPU: one state only"]
    if len(two) < 2:
        return [State("one core", two)], ["one CPU only: the states with two cores are left out"]
    return [
        State("two cores, quiet", two),
        State("two cores, the other one busy", two, busy=two[1]),
        State("pinned to one core", two[:1]),
    ], []


async def measure_all(figures: Figures, folder: Path, order: list[str], calls: int, bursts: int) -> None:
    for name in order:
        if name in CONTESTANTS:
            await measure(figures, name, folder, calls, bursts)
        elif name == PING_PONG:
            measure_ping_pong(figures, calls)
        elif name == GATHER:
            await measure_gather(figures, bursts)
        else:
            measure_writes(figures, folder, calls)


def run(options: Options) -> list[Table]:
    calls, bursts = options.count(500, 50), options.count(30, 3)
    rounds = options.round_count(15)
    found, notes = states()
    figures = {state.name: Figures() for state in found}
    names = [*CONTESTANTS, *FLOORS]
    with memory_folder() as folder:
        for i in range(rounds):
            tell(f"hop: round {i + 1} of {rounds}")
            for state in found:
                with state.entered():
                    asyncio.run(measure_all(figures[state.name], folder, shuffled(names, i), calls, bursts))
    notes.append(f"{rounds} rounds, in each {calls} calls one after another and {bursts} times {BURST} at once")
    tables = [table(state.name, figures[state.name], names) for state in found]
    tables[-1].notes += notes
    return tables


def table(state: str, figures: Figures, names: list[str]) -> Table:
    head = ("µs a call", "one after another", "its CPU", "over offload", f"{BURST} at once", "its CPU", "over offload")
    result = Table(f"Hop, {state}", head)
    for name in names:
        result.rows.append(
            (
                name,
                figures.show(name, "one"),
                figures.show(name, "one, CPU"),
                figures.ratio(name, "offload", "one"),
                figures.show(name, "burst"),
                figures.show(name, "burst, CPU"),
                figures.ratio(name, "offload", "burst"),
            )
        )
    return result
