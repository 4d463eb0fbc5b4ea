"""What it costs to check packets in order: on the loop itself, by a Verifier of each kind, by a process behind queues.

    sha256     100 B to 1 MiB: the cost grows with the bytes, so moving these must cost less
    functions  one that keeps the GIL (decompress, parse, validate) and one that does not (a key derivation)

On the loop: the digest in place, others get their turn after each 256 KiB, as a protocol's callbacks would. Two queues:
one process, a `multiprocessing.Queue` to it and one back, whose reader is a thread that wakes the loop for each packet.
The ratio is in throughput. The stall is the longest time by which a task that sleeps a millisecond was late. A busy
machine stalls a loop without any work too, so the second figure leaves out the time that Linux counts as ready to run
and without a CPU; what waits for the GIL is in it. CPU time is that of this process, where that does the work.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from typing import Any

from measure import Figures, Options, Table, shuffled, tell

from offload.verify import Verifier

Function = Callable[[bytes], Any]
Contestant = Callable[[Function, Sequence[bytes], Sequence[Any]], Awaitable[float]]

TURN_BYTES = 256 << 10
SIZES = (100, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 1 << 20)
INLINE, THREADS, COOPERATIVE = "on the loop", "threads", "cooperative"
ALONE = (INLINE, THREADS, COOPERATIVE)  # have no help from other processes


# --- what is checked: importable, for other processes -----------------------------------------------------------------


def sha256(packet: bytes) -> bytes:
    return hashlib.sha256(packet).digest()


def validate(packet: bytes) -> int:
    """Decompress, parse and validate: nearly all of it under the GIL."""
    rows = json.loads(zlib.decompress(packet))
    return sum(row["size"] for row in rows if row["name"].startswith("row ") and 0 <= row["size"] < 1000)


def derive(packet: bytes) -> bytes:
    """A key derivation (PBKDF2, RFC 8018), which gives up the GIL."""
    return hashlib.pbkdf2_hmac("sha256", packet, b"salt", 20_000)


def compressed(rows: int) -> bytes:
    return zlib.compress(json.dumps([{"name": f"row {n}", "size": n % 1000} for n in range(rows)]).encode())


# --- contestants ------------------------------------------------------------------------------------------------------


async def with_nothing(function: Function, packets: Sequence[bytes], expected: Sequence[Any]) -> float:
    start = time.perf_counter()
    since = 0
    for packet, right in zip(packets, expected, strict=True):
        check(function(packet) == right)
        since += len(packet)
        if since >= TURN_BYTES:
            since = 0
            await asyncio.sleep(0)
    return time.perf_counter() - start


def with_verifier(workers: Any) -> Contestant:
    async def run(function: Function, packets: Sequence[bytes], expected: Sequence[Any]) -> float:
        what: Any = "sha256" if function is sha256 else function
        async with Verifier(what, workers=workers) as verifier:
            await asyncio.gather(*map(verifier.digest, packets[:8]))
            start = time.perf_counter()
            checks: deque[Awaitable[object]] = deque()
            for packet, right in zip(packets, expected, strict=True):
                checks.append(verifier.check(packet, right))
                await verifier.room()
                if len(checks) > 512:
                    check(await checks.popleft())
            while checks:
                check(await checks.popleft())
            return time.perf_counter() - start

    return run


def serve_queues(function: Function, there: Any, back: Any) -> None:
    while (packet := there.get()) is not None:
        back.put(function(packet))


async def with_two_queues(function: Function, packets: Sequence[bytes], expected: Sequence[Any]) -> float:
    loop = asyncio.get_running_loop()
    context = multiprocessing.get_context("spawn")
    there, back = context.Queue(), context.Queue()
    process = context.Process(target=serve_queues, args=(function, there, back), daemon=True)
    process.start()
    there.put(packets[0])
    await asyncio.to_thread(back.get)
    done = loop.create_future()
    count = 0

    def distribute(found: Any) -> None:
        nonlocal count
        check(found == expected[count])
        count += 1
        if count == len(packets):
            done.set_result(None)

    def read() -> None:
        for _ in packets:
            loop.call_soon_threadsafe(distribute, back.get())

    reader = threading.Thread(target=read)
    reader.start()
    start = time.perf_counter()
    since = 0
    for packet in packets:
        there.put(packet)
        since += len(packet)
        if since >= TURN_BYTES:
            since = 0
            await asyncio.sleep(0)
    await done
    seconds = time.perf_counter() - start
    there.put(None)
    process.join()
    reader.join()
    for queue in (there, back):
        queue.close()
        queue.join_thread()
    return seconds


def check(ok: object) -> None:
    if not ok:
        raise RuntimeError("a packet was found damaged, or came out of order")


# --- measuring --------------------------------------------------------------------------------------------------------


def without_cpu() -> float:
    """Seconds for which this thread was ready to run and did not."""
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
    except OSError:  # not Linux
        return 0.0


async def watched(work: Callable[[], Awaitable[float]]) -> tuple[float, float, float]:
    """Seconds that the work took, the longest by which a task beside it was late, and the same with a CPU."""
    worst = worst_with_cpu = 0.0
    task = asyncio.ensure_future(work())
    while not task.done():
        start, waited = time.perf_counter(), without_cpu()
        await asyncio.sleep(0.001)
        late = time.perf_counter() - start - 0.001
        worst = max(worst, late)
        worst_with_cpu = max(worst_with_cpu, late - (without_cpu() - waited))
    return await task, worst, worst_with_cpu


async def idle() -> float:
    await asyncio.sleep(0.2)
    return 0.2


def measure(figures: Figures, name: str, quantity: str, contestant: Contestant, job: Job) -> None:
    gc.collect()
    cpu = time.process_time()
    seconds, stall, with_cpu = asyncio.run(watched(lambda: contestant(job.function, job.packets, job.expected)))
    cpu = time.process_time() - cpu
    figures.add(name, quantity, len(job.packets) / seconds)
    figures.add(name, f"{quantity}, stall", stall * 1e3)
    figures.add(name, f"{quantity}, stall with a CPU", with_cpu * 1e3)
    if name in ALONE:
        figures.add(name, f"{quantity}, CPU", cpu / len(job.packets) * 1e6)


class Job:
    """Packets for one run, a few different ones again and again, and what is to be found in them."""

    def __init__(self, function: Function, kinds: Sequence[bytes], count: int) -> None:
        self.function = function
        found = [function(packet) for packet in kinds]
        self.packets = [kinds[n % len(kinds)] for n in range(count)]
        self.expected = [found[n % len(kinds)] for n in range(count)]
        start = time.perf_counter()
        for packet in kinds:
            function(packet)
        self.cost = (time.perf_counter() - start) / len(kinds)


def contestants(executor: Executor | None) -> dict[str, Contestant]:
    found = {
        INLINE: with_nothing,
        THREADS: with_verifier("threads"),
        COOPERATIVE: with_verifier("cooperative"),
        "processes": with_verifier("processes"),
        "two queues": with_two_queues,
    }
    if executor is not None:
        found["Dask, two workers"] = with_verifier(executor)
    return found


def run(options: Options) -> list[Table]:
    rounds = options.round_count(4)
    total = options.count(64 << 20, 2 << 20)
    jobs = {}
    for size in SIZES:
        title = f"sha256, {size if size < 1024 else size >> 10} {'B' if size < 1024 else 'KiB'}"
        jobs[title] = Job(sha256, [os.urandom(size) for _ in range(8)], min(total // size, options.count(40_000, 500)))
    for title, rows, count in (("validate, small", 20, 4_000), ("validate", 400, 400), ("validate, large", 8000, 24)):
        jobs[title] = Job(validate, [compressed(rows + n) for n in range(4)], options.count(count, 8))
    jobs["derive a key"] = Job(derive, [b"%d" % n for n in range(4)], options.count(100, 8))
    figures = Figures()
    notes: list[str] = []
    with ExitStack() as stack:
        named = contestants(dask(stack, notes))
        gc.collect()
        gc.freeze()  # what was imported, for Dask above all: to look through it takes longer than any stall here
        for i in range(rounds):
            for name in shuffled(list(named), i):
                tell(f"verify: round {i + 1} of {rounds}, {name}")
                for title, job in jobs.items():
                    measure(figures, name, title, named[name], fewer(job, name))
            figures.add("idle", "stall", asyncio.run(watched(idle))[1] * 1e3)
    notes.append(f"{rounds} rounds; a loop without any work is late by {figures.show('idle', 'stall')} ms at worst")
    tables = [table(title, job, figures, list(named)) for title, job in jobs.items()]
    tables[-1].notes += notes
    return tables


def fewer(job: Job, name: str) -> Job:
    """Who needs a millisecond for each packet does not get forty thousand."""
    if name in ALONE or len(job.packets) <= 4000:
        return job
    return Job(job.function, job.packets[:8], 4000)


def dask(stack: ExitStack, notes: list[str]) -> Executor | None:
    """The executor of a cluster on this machine."""
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        notes.append("distributed is not installed")
        return None
    where = {"host": "127.0.0.1", "scheduler_port": 0, "dashboard_address": None, "silence_logs": 50}
    cluster = stack.enter_context(distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **where))
    executor: Executor = stack.enter_context(stack.enter_context(distributed.Client(cluster)).get_executor())
    return executor


def table(title: str, job: Job, figures: Figures, names: list[str]) -> Table:
    size = len(job.packets[0])
    moves = job.function is not derive  # whose packets are a few bytes: no MB/s
    rate = ("packets/s", "MB/s") if moves else ("calls/s",)
    head = ("", *rate, "times on the loop", "CPU, µs/packet", "longest stall, ms", "with a CPU, ms")
    result = Table(f"Verify: {title} ({size:,} bytes, {job.cost * 1e6:,.1f} µs)", head)
    for name in names:
        result.rows.append(
            (
                name,
                figures.show(name, title),
                *([figures.show(name, title, size / 1e6)] if moves else []),
                figures.ratio(name, INLINE, title),
                figures.show(name, f"{title}, CPU"),
                figures.show(name, f"{title}, stall"),
                figures.show(name, f"{title}, stall with a CPU"),
            )
        )
    return result
