"""Verifier: the order, the bounds, who does the work, and what happens when that one dies."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import hashlib
import hmac
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures import Future as ThreadFuture
from functools import partial
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from typing import Any, assert_type

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BrokenResourceError, ClosedResourceError, DeadlockError, QueueFullError
from offload.loops import LoopThread
from offload.verify import Check, Digest, Verdict, Verifier
from offload.verify.check import PACKET_BYTES
from offload.verify.order import BURST, SETTLE, SMALL_BYTES, Order

Workers = Any
EVERYWHERE = ["threads", pytest.param("processes", marks=pytest.mark.slow), "cooperative"]
LARGE = os.urandom(300_000)


@pytest.fixture(autouse=True, scope="session")
def first_process() -> None:
    """The first process of the "spawn" kind starts one that tracks shared memory, and that stays."""
    resource_tracker.ensure_running()
    importlib.import_module("multiprocessing.popen_spawn_posix")


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A test that hangs ends the run, with all stacks."""
    faulthandler.dump_traceback_later(float(os.environ.get("OFFLOAD_TEST_HANG", "30")) * 4, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After the test there are no more threads, processes and shared memory than before."""
    folder = Path("/dev/shm")
    threads = set(threading.enumerate())
    yield
    assert [thread.name for thread in set(threading.enumerate()) - threads] == []
    assert multiprocessing.active_children() == []
    assert list(folder.glob(f"offload_{os.getpid()}_*")) == []


class Gate:
    """A function of a packet that says when it has begun, and returns it when it may."""

    def __init__(self) -> None:
        self.entered: ThreadFuture[None] = ThreadFuture()
        self.seen: list[bytes] = []
        self._first = threading.Lock()
        self._open = threading.Event()

    def __call__(self, packet: bytes) -> bytes:
        self.seen.append(packet)
        if self._first.acquire(blocking=False):  # and never let go
            self.entered.set_result(None)
            self._open.wait()
        return packet

    def open(self) -> None:
        self._open.set()

    async def begun(self) -> None:
        await asyncio.wrap_future(self.entered)


@pytest.fixture(name="gate")
def new_gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def has_done(verifier: Verifier[Any], count: int) -> None:
    """So many packets have an outcome, which nothing tells us while it waits for its turn."""
    while verifier.stats().done < count:  # noqa: ASYNC110
        await asyncio.sleep(0)


JOBS = """
import os, signal

def length(packet):
    return len(packet)

def pid(packet):
    return os.getpid()

def behave(packet):
    if packet == b"raise":
        raise ValueError("no good", 7)
    if packet == b"exit":
        raise SystemExit(3)
    if packet == b"unpicklable":
        return lambda: None
    if packet == b"unpicklable error":
        raise type("Local", (Exception,), {})("from inside")
    if packet == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if packet == b"leave":
        os._exit(3)
    return packet

def once(packet):
    '''Tells its process and stays, the first time; says so the second time.'''
    if not packet.startswith(b"/"):
        return packet
    if os.path.exists(packet):
        return b"second"
    open(packet, "w").close()
    with open(packet + b".fifo", "w") as fifo:
        fifo.write(str(os.getpid()))
    signal.pause()

def swallow(packet):
    return type(packet)

def orphan(packet):
    child = os.fork()
    if child == 0:
        signal.pause()
    with open(packet, "a") as file:
        print(child, file=file)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(name="jobs")
def jobs_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Functions that another process can import."""
    (tmp_path / "offload_test_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("offload_test_jobs")
    del sys.modules["offload_test_jobs"]


# --- what it finds ----------------------------------------------------------------------------------------------------


def anything(value: Any) -> Any:
    return value


NAMES = ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "sha3_256", "blake2b", "blake2s"]


@pytest.mark.parametrize("workers", ["threads", "cooperative"])
@pytest.mark.parametrize("name", NAMES)
async def test_digest_is_hashlibs(name: str, workers: Workers) -> None:
    """Small and large packets, digested whole or by the slice, have the digest that hashlib finds."""
    packets = [b"", b"x" * 100, b"x" * 10_000, LARGE]
    async with Verifier(name, workers=workers) as verifier:
        found = await asyncio.gather(*map(verifier.digest, packets))
    assert found == [hashlib.new(name, packet).digest() for packet in packets]


@pytest.mark.parametrize(
    ("name", "packet", "digest"),
    [
        ("crc32", b"123456789", "cbf43926"),  # the check value that the catalogues of CRCs give
        ("blake3", b"", "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),  # its test vectors
        ("sha256", b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),  # FIPS 180-2, B.1
    ],
)
async def test_known_digests(name: str, packet: bytes, digest: str) -> None:
    """The digests are those that their specifications give."""
    if name == "blake3":
        need("blake3")
    async with Verifier(name) as verifier:
        assert (await verifier.digest(packet)).hex() == digest


@pytest.mark.parametrize("workers", ["threads", "cooperative"])
async def test_hmac(workers: Workers) -> None:
    """With a key it is the HMAC: test case 2 of RFC 4231, and packets that are digested by the slice."""
    async with Verifier("sha256", key=b"Jefe", workers=workers) as verifier:
        found = await verifier.digest(b"what do ya want for nothing?")
        assert found.hex() == "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        assert await verifier.digest(LARGE) == hmac.digest(b"Jefe", LARGE, "sha256")


async def test_large_packets_of_crc32_and_blake3_by_the_slice() -> None:
    """Digested by the slice, CRC-32 and BLAKE3 come out as digested whole."""
    need("blake3")
    for name in ("crc32", "blake3"):
        async with Verifier(name, workers="cooperative") as verifier:
            assert await verifier.digest(LARGE) == Digest(name)(LARGE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Verifier("sha257"), "no digest 'sha257'; there are blake3, crc32, blake2b, "),
        (lambda: Verifier("shake_128"), "no digest 'shake_128'"),
        (lambda: Verifier("crc32", key=b"x"), "crc32 with a key is no HMAC; use a digest of hashlib"),
        (
            lambda: Verifier(anything(len), key=b"x"),
            "a key is for the name of a digest, and this is <built-in function len>",
        ),
        (lambda: Verifier("md5", workers=anything("fibres")), "workers is 'fibres', expected 'threads', 'processes', "),
        (lambda: Verifier("md5", max_bytes=0), "max_bytes is 0, count is None; expected at least 1"),
        (lambda: Verifier("md5", count=0), "count is 0; expected at least 1"),
    ],
)
def test_wrong_arguments(make: Callable[[], object], message: str) -> None:
    """What makes no sense is refused at once, with what was found and what was expected."""
    with pytest.raises(ValueError, match="^.*" + message):
        make()


async def test_verdict_has_what_was_found_and_expected() -> None:
    """A check is true or false, and says what it found and what it should have been."""
    digest, other = hashlib.sha256(b"packet").digest(), hashlib.sha256(b"another").digest()
    async with Verifier("sha256") as verifier:
        right, wrong = await verifier.check(b"packet", digest), await verifier.check(b"packet", other)
        short = await verifier.check(b"packet", digest[:4])
    assert (bool(right), right) == (True, (True, digest, digest))
    assert (bool(wrong), wrong) == (False, (False, digest, other))
    assert not short
    assert_type(wrong, Verdict[bytes])


async def test_verdict_on_what_a_function_found() -> None:
    """Results of any type are compared; a comparison that raises is the packet's own error."""

    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ArithmeticError("cannot compare")

        __hash__ = None  # type: ignore[assignment]

    def text(packet: bytes) -> str:
        return packet.decode()

    async with Verifier(text) as verifier, Verifier(lambda packet: Odd()) as odd:
        assert (await verifier.check("ä".encode(), "ä")).ok
        assert not (await verifier.check(b"b", "a")).ok
        with pytest.raises(ArithmeticError, match="cannot compare"):
            await odd.check(b"", Odd())


@pytest.mark.parametrize("workers", EVERYWHERE)
async def test_any_buffer(workers: Workers) -> None:
    """bytes, bytearray and memoryview are digested alike, also one whose items are larger than a byte."""
    data = bytes(range(256)) * 1024
    numbers = memoryview(data).cast("I")
    async with Verifier("sha256", workers=workers, count=1) as verifier:
        found = [await verifier.digest(packet) for packet in (data, bytearray(data), memoryview(data), numbers)]
    assert set(found) == {hashlib.sha256(data).digest()}


@pytest.mark.parametrize("workers", EVERYWHERE)
async def test_function_gets_bytes(workers: Workers, jobs: Any) -> None:
    """Whatever the packet is and whoever works, a function gets bytes."""
    async with Verifier(jobs.swallow, workers=workers, count=1) as verifier:
        found = [await verifier.digest(packet) for packet in (b"x", bytearray(b"x"), memoryview(LARGE))]
    assert found == [bytes, bytes, bytes]


# --- order ------------------------------------------------------------------------------------------------------------


async def test_results_keep_the_order_of_calls(gate: Gate) -> None:
    """A packet that is done before the one in front of it waits for that, with its callbacks."""
    done: list[bytes] = []
    async with Verifier(gate, count=2) as verifier:
        slow = verifier.digest(b"slow")
        await gate.begun()
        quick = verifier.digest(b"quick")
        for check in (slow, quick):
            check.add_done_callback(lambda check: done.append(check.result()))
        await has_done(verifier, 1)  # the quick one
        await turns()
        assert (slow.done(), quick.done()) == (False, False)
        gate.open()
        await quick
    assert done == [b"slow", b"quick"]


@pytest.mark.parametrize("workers", ["threads", "cooperative", "executor"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(), sizes=st.lists(st.sampled_from([0, 100, 10_000, 70_000, 200_000]), max_size=60))
def test_order_of_any_mixture(workers: Workers, seed: int, sizes: list[int]) -> None:
    """Packets of any sizes, called in any bursts, some of them cancelled, come back right and in order."""
    chance = random.Random(seed)
    packets = [chance.randbytes(8) * (size // 8) for size in sizes]
    came: list[int] = []

    def arrived(number: int, check: Check[bytes]) -> None:
        if not check.cancelled():
            came.append(number)

    async def main(kind: Workers) -> None:
        async with Verifier("sha256", workers=kind, count=3) as verifier:
            checks: list[Check[bytes]] = []
            for number, packet in enumerate(packets):
                check = verifier.digest(packet)
                check.add_done_callback(partial(arrived, number))
                checks.append(check)
                if chance.random() < 0.2:
                    chance.choice(checks).cancel()
                if chance.random() < 0.2:
                    await asyncio.sleep(0)
        for check, packet in zip(checks, packets, strict=True):
            assert check.cancelled() or check.result() == hashlib.sha256(packet).digest()
        assert verifier.stats()[:3] == (0, 0, 0)
        await asyncio.sleep(0)  # callbacks

    if workers == "executor":
        with ThreadPoolExecutor(3) as pool:
            asyncio.run(main(pool))
    else:
        asyncio.run(main(workers))
    assert came == sorted(came)


async def test_several_loops_share_one_verifier() -> None:
    """Loops in other threads use it at the same time, each with its own order and its own futures."""

    async def use(verifier: Verifier[bytes]) -> list[bytes]:
        checks = [verifier.digest(b"%d" % number * 1000) for number in range(200)]
        return [await check for check in checks]

    expected = [hashlib.md5(b"%d" % number * 1000).digest() for number in range(200)]
    async with Verifier("md5") as verifier, LoopThread("one") as one, LoopThread("two") as two:
        results = await asyncio.gather(one.run(use, verifier), two.run(use, verifier), use(verifier))
    assert list(results) == [expected] * 3


@pytest.mark.parametrize("workers", ["threads", "cooperative"])
async def test_loop_that_is_gone_holds_up_nobody(workers: Workers) -> None:
    """What a loop asked for before it was closed neither blocks other loops nor the verifier's end."""

    async def ask(verifier: Verifier[bytes]) -> None:
        for size in (10, 100_000):
            verifier.digest(b"x" * size)

    async with Verifier("sha256", workers=workers) as verifier:
        loop = asyncio.new_event_loop()
        asyncio_task = threading.Thread(target=loop.run_until_complete, args=(ask(verifier),))
        asyncio_task.start()
        asyncio_task.join()
        loop.close()
        assert await verifier.digest(LARGE) == hashlib.sha256(LARGE).digest()
        assert await verifier.digest(b"") == hashlib.sha256(b"").digest()
    assert verifier.stats()[:3] == (0, 0, 0)


def test_uvloop() -> None:
    """It works on uvloop as on asyncio's own loop."""
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")

    async def main() -> list[bytes]:
        async with Verifier("sha1") as verifier:
            return [await verifier.digest(b""), await verifier.digest(LARGE)]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == [hashlib.sha1(b"").digest(), hashlib.sha1(LARGE).digest()]


# --- who works --------------------------------------------------------------------------------------------------------


async def test_threads_do_the_work() -> None:
    """A function runs on the verifier's threads, never on the caller's."""
    async with Verifier(lambda packet: threading.current_thread().name, name="v", count=2) as verifier:
        names = await asyncio.gather(*[verifier.digest(b"") for _ in range(50)])
    assert set(names) <= {"v 1", "v 2"}


async def test_small_digests_need_no_thread(gate: Gate) -> None:
    """Small packets are digested on the caller's loop, larger ones are not."""
    async with Verifier("sha256", count=1) as verifier:
        verifier._places[0].thread.post(lambda: gate(b""))
        await gate.begun()  # the only thread is busy
        assert await verifier.digest(b"x" * (SMALL_BYTES - 1)) == hashlib.sha256(b"x" * (SMALL_BYTES - 1)).digest()
        large = verifier.digest(b"x" * SMALL_BYTES)
        await turns()
        assert not large.done()
        gate.open()
        await large


async def test_cooperative_has_no_thread_and_gives_way() -> None:
    """Cooperative, everything is done on the loop, without a thread, and others get their turn during one packet."""
    count = 0

    async def others() -> None:
        nonlocal count
        while True:
            count += 1
            await asyncio.sleep(0)

    threads = threading.active_count()
    async with Verifier("sha256", workers="cooperative") as verifier:
        task = asyncio.create_task(others())
        packet = bytes(64 << 20)
        assert await verifier.digest(packet) == hashlib.sha256(packet).digest()
        assert threading.active_count() == threads
        task.cancel()
    assert count > 4  # 64 MiB take 30 ms or more, and a turn of it one


@pytest.mark.slow
async def test_processes_do_the_work(jobs: Any) -> None:
    """Packets are checked in as many processes as were asked for, and none of them is this one."""
    async with Verifier(jobs.pid, workers="processes", count=2) as verifier:
        pids = {await verifier.digest(b"")}
        while len(pids) < 2:
            pids.update(await asyncio.gather(*[verifier.digest(b"%d" % number) for number in range(50)]))
        assert len(pids) == 2
        assert os.getpid() not in pids


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 100, 64 << 10, (1 << 20) + 1, 5 << 20])
async def test_packets_of_any_size_cross_to_processes(size: int) -> None:
    """Packets arrive in a process as they are, by pipe and by shared memory that grows as they do."""
    packets = [os.urandom(size // parts) for parts in (3, 2, 1, 3)]
    async with Verifier("sha256", workers="processes", count=1) as verifier:
        verdicts = [verifier.check(packet, hashlib.sha256(packet).digest()) for packet in packets]
        assert all(await asyncio.gather(*verdicts))


async def test_function_that_cannot_be_pickled_does_not_start() -> None:
    """Processes for a function that they could not import are not started, and the error says which."""
    verifier = Verifier(lambda packet: packet, workers="processes", count=2)
    with pytest.raises(Exception, match=r"local object .*lambda"):
        await verifier.start()
    with pytest.raises(ClosedResourceError):
        await verifier.start()


@pytest.mark.parametrize("kind", ["threads", "loop thread", pytest.param("processes", marks=pytest.mark.slow)])
async def test_any_executor(kind: str, jobs: Any) -> None:
    """A pool of threads or processes, or a LoopThread, does the work and stays open afterwards."""
    pools: dict[str, Callable[[], Executor]] = {
        "threads": lambda: ThreadPoolExecutor(2),
        "loop thread": lambda: LoopThread("pool"),
        "processes": lambda: ProcessPoolExecutor(2, get_context("spawn")),
    }
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(pools[kind]())
        async with Verifier(jobs.behave, workers=pool) as verifier:
            checks = [verifier.digest(bytearray(b"%d" % number)) for number in range(100)]
            assert await asyncio.gather(*checks) == [b"%d" % number for number in range(100)]
            with pytest.raises(ValueError, match="no good") as raised:
                await verifier.digest(b"raise")
            notes = getattr(raised.value, "__notes__", [])
            assert ["in behave" in note for note in notes] == [True] * (kind == "processes")
        assert pool.submit(len, "open").result() == 4


async def test_executor_that_was_shut_down_fails_each_packet() -> None:
    """An executor that takes nothing any more breaks packets, with its own error as the cause, and hangs nobody."""
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    async with Verifier("md5", workers=pool) as verifier:
        with pytest.raises(BrokenResourceError, match="two workers and heard of neither: cannot schedule") as raised:
            await verifier.digest(b"")
        assert isinstance(raised.value.__cause__, RuntimeError)


# --- small digests, in the call itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["threads", "cooperative"])
async def test_small_digest_is_there_at_once(workers: Workers) -> None:
    """With nothing before it, a small packet is digested in the call, and counted."""
    async with Verifier("sha256", workers=workers) as verifier:
        check = verifier.check(b"x", hashlib.sha256(b"x").digest())
        assert check.done()
        assert check.result()
        assert not verifier.check(b"x", b"").result()
        assert verifier.stats() == (0, 0, 0, 2, 0, 0)
        await turns(2)
        assert verifier.stats() == (0, 0, 0, 2, 0, 0)


async def test_small_digest_overtakes_nobody(gate: Gate) -> None:
    """Behind a large packet, small ones wait for their turn, also when its result is on its way."""
    done: list[int] = []
    async with Verifier("sha256", count=1) as verifier:
        verifier._places[0].thread.post(lambda: gate(b""))
        await gate.begun()
        checks = [verifier.digest(packet) for packet in (LARGE, b"1", b"2")]
        for number, check in enumerate(checks):
            check.add_done_callback(lambda _, number=number: done.append(number))  # type: ignore[misc]
        await turns()
        assert [check.done() for check in checks] == [False] * 3
        gate.open()
        while verifier.stats().in_flight:  # the results may be on their way, not yet on this loop
            pass
        checks.append(verifier.digest(b"3"))
        checks[3].add_done_callback(lambda _: done.append(3))
        await checks[3]
        await turns(1)
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("wrong", ["text", 7, None])
async def test_small_digest_and_what_it_cannot_be_compared_with(wrong: Any) -> None:
    """An error in the comparison reaches the caller by the check, as it does for large packets."""
    async with Verifier("sha256") as verifier:
        for packet in (b"", LARGE):
            check = verifier.check(packet, wrong)
            with pytest.raises(TypeError):
                await check
        assert verifier.stats()[3:5] == (2, 2)


@pytest.mark.parametrize("workers", ["threads", "cooperative"])
async def test_who_only_awaits_small_digests_gives_way(workers: Workers) -> None:
    """A caller with thousands of small packets, who awaits each result, lets others run."""
    count = 0

    async def others() -> None:
        nonlocal count
        while True:
            count += 1
            await asyncio.sleep(0)

    async with Verifier("md5", workers=workers) as verifier:
        task = asyncio.create_task(others())
        for _ in range(5 * BURST):
            await verifier.digest(b"x")
        task.cancel()
    assert count >= 3


# --- context variables ------------------------------------------------------------------------------------------------

user: contextvars.ContextVar[str] = contextvars.ContextVar("user", default="nobody")


def who(packet: bytes) -> str:
    name = user.get()
    user.set(f"{name}, changed")
    return name


@pytest.mark.parametrize("workers", ["threads", "cooperative"])
async def test_context_variables_of_the_caller_go_in(workers: Workers) -> None:
    """Each packet's function sees its own caller's variables, as they were at the call; what it sets stays inside."""

    def ask(name: str) -> Check[str]:
        user.set(name)
        check = verifier.digest(b"")
        user.set("later")
        return check

    def submit(name: str) -> ThreadFuture[str]:
        user.set(name)
        return verifier.submit(b"")

    async with Verifier(who, workers=workers, count=1) as verifier, LoopThread("elsewhere") as elsewhere:
        checks = [contextvars.copy_context().run(ask, name) for name in ("anna", "bert", "carl")]
        assert await asyncio.gather(*checks) == ["anna", "bert", "carl"]
        assert await asyncio.wrap_future(await elsewhere.call(submit, "dora")) == "dora"
        assert await verifier.digest(b"") == "nobody"
    assert user.get() == "nobody"


# --- plain threads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [*EVERYWHERE, "executor"])
def test_plain_threads_and_no_loop(workers: Workers) -> None:
    """In a program without a loop, threads submit packets of all sizes, and each gets its results in order."""
    sizes = [10, 300_000, 10, 5000, 0, 70_000] * 6
    came: dict[int, list[int]] = {1: [], 2: [], 3: []}

    def use(me: int) -> list[Verdict[bytes]]:
        submissions = []
        for number, size in enumerate(sizes):
            packet = b"%d" % me * size
            submission = verifier.submit(packet, hashlib.sha256(packet).digest())
            submission.add_done_callback(lambda _, number=number: came[me].append(number))  # type: ignore[misc]
            submissions.append(submission)
            verifier.wait_room()
        return [submission.result() for submission in submissions]

    with contextlib.ExitStack() as stack:
        kind = stack.enter_context(ThreadPoolExecutor(2)) if workers == "executor" else workers
        verifier = stack.enter_context(Verifier("sha256", workers=kind, count=2, max_bytes=500_000))
        threads = stack.enter_context(ThreadPoolExecutor(3))
        assert all(all(verdicts) for verdicts in threads.map(use, came))
    assert list(came.values()) == [list(range(len(sizes)))] * 3
    assert verifier.stats() == (0, 0, 0, 3 * len(sizes), 0, 0)
    with pytest.raises(ClosedResourceError, match=r"^'verifier' is closed$"):
        verifier.submit(b"")


def test_submission_of_a_small_packet_waits_for_its_turn(gate: Gate) -> None:
    """A small digest is done in the thread that submits it, and given out after what that submitted before."""
    with Verifier("sha256", count=1) as verifier:
        assert verifier.submit(b"").done()
        verifier._places[0].thread.post(lambda: gate(b""))
        gate.entered.result()
        large, small = verifier.submit(LARGE), verifier.submit(b"x")
        assert (large.done(), small.done()) == (False, False)
        gate.open()
        assert small.result() == hashlib.sha256(b"x").digest()
        assert large.done()


def test_submission_is_cancelled_while_it_waits(gate: Gate) -> None:
    """One that waits is never looked at, and `wait` hears of it; one that a worker has is not cancelled."""
    with Verifier(gate, count=1) as verifier:
        one = verifier.submit(b"one")
        gate.entered.result()
        two, three = verifier.submit(b"two"), verifier.submit(b"three")
        assert (one.cancel(), two.cancel(), two.cancel()) == (False, True, True)
        assert two.cancelled()
        assert verifier.stats().bytes_in_flight == 2 * PACKET_BYTES + len(b"onethree")
        gate.open()
        assert wait([one, two, three]).not_done == set()
        assert (one.result(), three.result(), one.cancel()) == (b"one", b"three", False)
    assert gate.seen == [b"one", b"three"]


def test_submission_of_what_raises(gate: Gate) -> None:
    """Its error reaches the thread that submitted it, and only that packet."""

    def fail(packet: bytes) -> bytes:
        if packet:
            raise ValueError("no good")
        return packet

    for workers in anything(["threads", "cooperative"]):
        with Verifier(fail, workers=workers) as verifier:
            bad, good = verifier.submit(b"x"), verifier.submit(b"")
            assert (str(bad.exception()), good.result()) == ("no good", b"")


def test_wait_room(gate: Gate) -> None:
    """A thread waits while too much is in flight, with a limit if it likes, and is refused if it asked for that."""
    with Verifier(gate, count=1, max_bytes=1000) as verifier:
        first = verifier.submit(bytes(5000))
        gate.entered.result()
        with pytest.raises(TimeoutError, match=r"5512 bytes are still in flight after 0\.0 s, the bound is 1000"):
            verifier.wait_room(0.0)
        assert verifier._order._rooms == {}
        with pytest.raises(QueueFullError, match="5512 bytes are in flight, 513 more"):
            verifier.submit(b"x", nowait=True)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(verifier.wait_room)
            gate.open()
            assert waiting.result() is None
        assert first.result() == bytes(5000)


def test_wait_room_on_a_thread_that_would_make_it(gate: Gate) -> None:
    """A function that waits for room on its own thread would wait for ever, and is told."""

    def greedy(packet: bytes) -> None:
        verifier.submit(bytes(2000))
        verifier.wait_room()

    with Verifier(greedy, count=1, max_bytes=1000) as verifier:
        error = verifier.submit(b"x").exception()
    assert isinstance(error, DeadlockError)
    assert str(error) == "'verifier' cannot wait for room on its own thread; submit from another one"


@pytest.mark.parametrize("workers", ["threads", "cooperative"])
def test_close_without_a_loop_does_what_a_loop_left(workers: Workers) -> None:
    """Closed by a plain thread, it does what a loop that stands still asked for, and that finds the results."""

    async def ask(verifier: Verifier[bytes]) -> list[Check[bytes]]:
        return [verifier.digest(packet) for packet in packets]

    async def answers(checks: list[Check[bytes]]) -> list[bytes]:
        return [await check for check in checks]

    packets = [LARGE, *[b"%d" % number for number in range(2000)]]
    with asyncio.Runner() as runner:
        with Verifier("sha256", workers=workers) as verifier:
            checks = runner.run(ask(verifier))
        assert runner.run(answers(checks)) == [hashlib.sha256(packet).digest() for packet in packets]
        verifier.close()


def test_process_that_cannot_start_without_a_loop() -> None:
    """A function that processes cannot import is refused when the block is entered, and nothing stays."""
    with pytest.raises(Exception, match=r"local object .*lambda"), Verifier(lambda packet: packet, workers="processes"):
        pass


# --- errors and deaths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", EVERYWHERE)
async def test_error_belongs_to_its_packet(workers: Workers, jobs: Any) -> None:
    """What the function raises reaches the caller of that packet, and the neighbours in its batch are fine."""
    packets = [*[b"%d" % number for number in range(20)], b"raise", *[b"%d" % number for number in range(20)]]
    async with Verifier(jobs.behave, workers=workers, count=1) as verifier:
        found = await asyncio.gather(*map(verifier.digest, packets), return_exceptions=True)
        assert verifier.stats()[3:] == (41, 1, 0)
    error = found[20]
    assert isinstance(error, ValueError)
    assert error.args == ("no good", 7)
    assert found[:20] + found[21:] == packets[:20] + packets[21:]


@pytest.mark.parametrize("workers", ["threads", "cooperative"])
@pytest.mark.parametrize(
    ("raised", "kind"),
    [(StopIteration(1), RuntimeError), (asyncio.CancelledError(), asyncio.CancelledError), (OSError(5), OSError)],
)
async def test_errors_that_no_future_holds(workers: Workers, raised: BaseException, kind: type[BaseException]) -> None:
    """StopIteration arrives as RuntimeError, CancelledError as what it is, and neither ends a worker."""

    def fail(packet: bytes) -> bytes:
        if packet:
            raise raised
        return packet

    async with Verifier(fail, workers=workers, count=1) as verifier:
        with pytest.raises(kind):
            await verifier.digest(b"x")
        assert await verifier.digest(b"") == b""


@pytest.mark.parametrize("workers", EVERYWHERE[:2])
async def test_system_exit_ends_no_worker(workers: Workers, jobs: Any) -> None:
    """SystemExit in a function is an outcome like any other."""
    async with Verifier(jobs.behave, workers=workers, count=1) as verifier:
        check = verifier.digest(b"exit")
        assert await verifier.digest(b"next") == b"next"
        assert isinstance(check.exception(), SystemExit)
        assert verifier.stats().lost == 0


@pytest.mark.slow
async def test_result_or_error_that_cannot_be_pickled(jobs: Any) -> None:
    """A result that cannot leave its process is an error of its packet; an error that cannot is told in words."""
    async with Verifier(jobs.behave, workers="processes", count=1) as verifier:
        names = [b"one", b"unpicklable", b"unpicklable error", b"two"]
        one, result, error, two = await asyncio.gather(*map(verifier.digest, names), return_exceptions=True)
        assert (one, two, verifier.stats().lost) == (b"one", b"two", 0)
    assert isinstance(result, TypeError)
    assert str(result).startswith("the result, a function, cannot be pickled to leave its process: ")
    assert isinstance(error, RuntimeError)
    assert str(error) == "Local: from inside"
    assert "in behave" in error.__notes__[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packet", "how"), [(b"die", "was ended by signal 9"), (b"leave", "exited with code 3")], ids=["killed", "left"]
)
async def test_packet_that_kills_its_worker_fails_alone(packet: bytes, how: str, jobs: Any) -> None:
    """It gets a second worker, then fails with what became of them; all others succeed, in order."""
    packets = [*[b"%d" % number for number in range(40)], packet, *[b"%d" % number for number in range(40)]]
    order: list[int] = []
    async with Verifier(jobs.behave, workers="processes", count=2) as verifier:
        checks = [verifier.digest(packet) for packet in packets]
        for number, check in enumerate(checks):
            check.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]
        found = await asyncio.gather(*checks, return_exceptions=True)
        assert verifier.stats()[3:] == (81, 1, 2)
    error = found[40]
    assert isinstance(error, BrokenResourceError)
    assert "two workers and heard of neither: the process 'verifier" in str(error)
    assert str(error).endswith(how)
    assert found[:40] + found[41:] == packets[:40] + packets[41:]
    assert order == list(range(81))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
async def test_worker_killed_from_outside_costs_nothing(jobs: Any, tmp_path: Path) -> None:
    """kill -9 for a process with packets in hand: they are checked elsewhere, and the order stays."""
    path = tmp_path / "tried"
    fifo = tmp_path / "tried.fifo"
    os.mkfifo(fifo)
    packets = [b"before", str(path).encode(), *[b"%d" % number for number in range(100)]]
    async with Verifier(jobs.once, workers="processes", count=2) as verifier, LoopThread("reader") as reader:
        checks = [verifier.digest(packet) for packet in packets]
        os.kill(int(await reader.call(fifo.read_text)), signal.SIGKILL)
        assert await asyncio.gather(*checks) == [b"before", b"second", *packets[2:]]
        assert verifier.stats()[3:] == (102, 0, 1)


@pytest.mark.slow
async def test_worker_that_dies_idle_is_nobodys_fault(jobs: Any) -> None:
    """A process killed while it waits is made again for the next packet, which does not count as tried."""
    pid: Callable[[bytes], int] = jobs.pid
    async with Verifier(pid, workers="processes", count=1) as verifier:
        first = await verifier.digest(b"")
        os.kill(first, signal.SIGKILL)
        async with LoopThread("waiter") as waiter:
            await waiter.call(os.waitid, os.P_PID, first, os.WEXITED | os.WNOWAIT)
        assert await verifier.digest(b"") != first
        assert verifier.stats().lost == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
async def test_death_shows_while_a_grandchild_holds_the_pipe(jobs: Any, tmp_path: Path) -> None:
    """A process that died is noticed even if one that it left behind keeps its pipe from ending."""
    path = tmp_path / "orphans"
    async with Verifier(jobs.orphan, workers="processes", count=1) as verifier:
        try:
            with pytest.raises(BrokenResourceError, match="was ended by signal 9"):
                await verifier.digest(str(path).encode())
        finally:
            for pid in path.read_text().split():
                os.kill(int(pid), signal.SIGKILL)


async def test_packet_that_lost_a_worker_goes_alone() -> None:
    """It comes before all others and without any, so that each death is put to the right account."""
    order = Order(1000, 0, lambda desk: None, BrokenResourceError)
    order.refusal = None
    one, two, three = checks = [order.put(b"", None, nowait=False) for _ in range(3)]
    assert order.take(2) == [one, two]
    assert order.give_back([one, two]) == []
    assert [order.take(9), order.take(9), order.take(9)] == [[one], [two], [three]]
    assert order.give_back([two]) == [two]
    order.finish(checks, [(number, None) for number in range(3)], order.desk())
    assert [check.done() for check in checks] == [True] * 3


async def test_thread_that_ends_before_its_turn_breaks_the_verifier(gate: Gate) -> None:
    """A packet on its way to a thread whose loop stops is not waited for in vain."""

    def stop() -> None:
        gate(b"")
        asyncio.get_running_loop().stop()

    async with Verifier(bytes, count=1) as verifier:
        verifier._places[0].thread.post(stop)
        await gate.begun()
        check = verifier.digest(b"x")
        await turns()
        gate.open()
        with pytest.raises(BrokenResourceError, match="'verifier' has lost a thread: "):
            await check


async def test_thread_that_is_gone_breaks_the_verifier() -> None:
    """A function that stops its thread's loop leaves nobody waiting: later packets get an error that says why."""

    def stop(packet: bytes) -> bytes:
        asyncio.get_running_loop().stop()
        return packet

    async with Verifier(stop, count=1) as verifier:
        assert await verifier.digest(b"x") == b"x"
        verifier._places[0].thread._thread.join()  # before it stops, its loop may take another
        for _ in range(2):
            with pytest.raises(BrokenResourceError, match="'verifier' has lost a thread: "):
                await verifier.digest(b"y")
        assert verifier.closed


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_room_waits_while_too_much_is_in_flight(gate: Gate) -> None:
    """`room` returns at once below the bound, waits above it, and goes on as soon as results were given out."""
    async with Verifier(gate, count=1, max_bytes=2 * (1000 + PACKET_BYTES)) as verifier:
        verifier.digest(bytes(1000))
        verifier.digest(bytes(1000))
        with pytest.raises(StopIteration):  # it returns without giving up the loop
            verifier.room().send(None)
        verifier.digest(bytes(1000))
        room = asyncio.create_task(verifier.room())
        await gate.begun()
        await turns()
        assert not room.done()
        assert verifier.stats()[1:3] == (3, 3 * (1000 + PACKET_BYTES))
        gate.open()
        await room
    assert verifier.stats()[1:3] == (0, 0)


async def test_nowait_refuses_over_the_bound(gate: Gate) -> None:
    """With nowait a packet over the bound is refused, and not accepted; a single one of any size always is."""
    async with Verifier(gate, count=1, max_bytes=1000) as verifier:
        large = verifier.digest(bytes(5000), nowait=True)
        with pytest.raises(
            QueueFullError, match="5512 bytes are in flight, 513 more would go over the bound of 1000; await"
        ):
            verifier.digest(b"x", nowait=True)
        gate.open()
        assert await large == bytes(5000)
    assert len(gate.seen) == 1


async def test_room_gives_up_the_loop_now_and_then() -> None:
    """A caller with thousands of small packets at hand, who awaits room after each, lets others run."""
    count = 0

    async def others() -> None:
        nonlocal count
        while True:
            count += 1
            await asyncio.sleep(0)

    async with Verifier("md5") as verifier:
        task = asyncio.create_task(others())
        for _ in range(5 * BURST):
            verifier.digest(b"x")
            await verifier.room()
        task.cancel()
    assert count >= 3


# --- cancelling and closing -------------------------------------------------------------------------------------------


async def test_packet_cancelled_while_it_waits_is_never_looked_at(gate: Gate) -> None:
    """It is cancelled at once, its bytes are free, and the worker does not see it."""
    async with Verifier(gate, count=1) as verifier:
        verifier.digest(b"one")
        await gate.begun()
        two, three = verifier.digest(b"two"), verifier.digest(b"three")
        assert two.cancel("no more")
        assert two.cancelled()
        assert not two.cancel()
        assert verifier.stats().bytes_in_flight == 2 * PACKET_BYTES + len(b"onethree")
        gate.open()
        assert await three == b"three"
        with pytest.raises(asyncio.CancelledError, match="no more"):
            await two
    assert gate.seen == [b"one", b"three"]


async def test_packet_cancelled_under_way_is_waited_for(gate: Gate) -> None:
    """Its caller goes on when the worker is through with it, so that its buffer is free then."""
    async with Verifier(gate, count=1) as verifier:
        task = asyncio.create_task(asyncio.wait_for(verifier.digest(b"one"), None))
        await gate.begun()
        task.cancel()
        await turns()
        assert not task.done()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await verifier.digest(b"two") == b"two"


async def test_packet_cancelled_behind_a_slow_one_does_not_wait_for_it(gate: Gate) -> None:
    """A result that only waits for its turn is cancelled at once."""
    async with Verifier(gate, count=2) as verifier:
        slow = verifier.digest(b"slow")
        await gate.begun()
        quick = verifier.digest(b"quick")
        await has_done(verifier, 1)
        assert quick.cancel()
        assert quick.cancelled()
        gate.open()
        assert await slow == b"slow"


@pytest.mark.parametrize("workers", EVERYWHERE)
async def test_close_finishes_what_was_accepted(workers: Workers) -> None:
    """Every packet that was accepted has its result when `aclose` returns, and no other is accepted."""
    async with Verifier("sha256", workers=workers, count=2) as verifier:
        checks = [verifier.digest(b"%d" % number * (size // 3)) for number in range(20) for size in (9, 90_000)]
    assert all(check.done() for check in checks)
    with pytest.raises(ClosedResourceError, match=r"^'verifier' is closed$"):
        verifier.digest(b"")
    await verifier.aclose()
    assert verifier.closed
    with pytest.raises(ClosedResourceError, match="was started or closed before; make a new one"):
        await verifier.start()


def test_close_gives_out_all_results_before_it_returns(gate: Gate) -> None:
    """A burst of results, larger than what a loop settles in one turn, is settled when `aclose` returns."""

    async def main() -> list[bool]:
        async with Verifier(gate, count=1) as verifier:
            checks = [verifier.digest(b"") for _ in range(40 * SETTLE)]
            await gate.begun()
            holding = asyncio.create_task(hold(verifier._places[0].thread._thread))
        done = [check.done() for check in checks]
        await holding
        return done

    async def hold(thread: threading.Thread) -> None:
        """Keep this loop until the verifier's thread has ended, so that everything arrives at once."""
        await turns()
        gate.open()
        thread.join()

    assert set(asyncio.run(main())) == {True}  # without debug mode: twenty thousand of them


@pytest.mark.parametrize("workers", ["threads", "cooperative"])
def test_close_finishes_what_a_loop_that_stands_still_asked_for(workers: Workers) -> None:
    """Closed from another loop, it does what is left of one that does not run now, and that finds the results."""

    async def ask() -> list[Check[bytes]]:
        return [verifier.digest(packet) for packet in packets]

    async def answers(checks: list[Check[bytes]]) -> list[bytes]:
        return [await check for check in checks]

    packets = [*[b"%d" % number for number in range(20_000)], bytes(30 << 20)]  # more than one turn of a loop does
    verifier = Verifier("sha256", workers=workers)
    with asyncio.Runner() as one, asyncio.Runner() as two:
        two.run(verifier.start())
        checks = one.run(ask())
        two.run(verifier.aclose())
        assert one.run(answers(checks)) == [hashlib.sha256(packet).digest() for packet in packets]


async def test_cancelled_close_still_waits(gate: Gate) -> None:
    """Cancelling `aclose` does not leave work or threads behind; the cancellation comes afterwards."""
    verifier = await Verifier(gate, count=2).start()
    check = verifier.digest(b"x")
    await gate.begun()
    closing = asyncio.create_task(verifier.aclose())
    await turns()
    closing.cancel()
    await turns()
    assert not closing.done()
    with pytest.raises(ClosedResourceError):
        verifier.digest(b"y")
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert check.result() == b"x"


async def test_cancelled_start_leaves_nothing() -> None:
    """Cancelled while its processes start, it ends them again before the cancellation goes on."""
    task = asyncio.create_task(Verifier("sha256", workers="processes", count=2).start())
    await turns(3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert multiprocessing.active_children() == []


async def test_cancelled_room_is_forgotten(gate: Gate) -> None:
    """Who gives up waiting for room leaves nothing behind, and others still get theirs."""
    async with Verifier(gate, count=1, max_bytes=100) as verifier:
        verifier.digest(b"x")
        rooms = [asyncio.create_task(verifier.room()) for _ in range(3)]
        await turns()
        assert len(verifier._order._rooms) == 3
        for room in rooms[:2]:
            room.cancel()
        await turns()
        assert len(verifier._order._rooms) == 1
        gate.open()
        await rooms[2]


async def test_not_started_or_closed_from_inside() -> None:
    """Before its start it takes nothing; from its own thread it cannot be closed."""
    verifier = Verifier("md5")
    with pytest.raises(ClosedResourceError, match="'verifier' is not started; use it as `async with`"):
        verifier.digest(b"")

    def close(packet: bytes) -> None:
        with contextlib.closing(inside.aclose()) as coroutine:
            coroutine.send(None)

    inside: Verifier[None] = Verifier(close)
    async with inside:
        with pytest.raises(DeadlockError, match="cannot be closed from its own thread; close it where it was opened"):
            await inside.digest(b"")


# --- programs of their own --------------------------------------------------------------------------------------------

PRELUDE = """
import asyncio, atexit, hashlib, os, select, signal, sys, threading, time
from offload.errors import *
from offload.verify import Verifier
"""


def run_program(folder: Path, source: str, *, timeout: float = 60) -> tuple[int, str, str]:
    """Run a script with warnings as errors; exit code, stdout, stderr."""
    path = folder / "program.py"
    path.write_text(PRELUDE + textwrap.dedent(source))
    command = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_while_a_thread_is_inside_a_submission_leaves_no_lock_in_the_child(tmp_path: Path) -> None:
    """Its lock may be held by a thread that is not in the child, which is told all the same."""
    code, out, err = run_program(
        tmp_path,
        """
        held, release, gate = (threading.Event() for _ in range(3))

        def wait(packet):
            gate.wait()
            return packet

        def hold():
            with submission._condition:
                held.set()
                release.wait()

        with asyncio.Runner() as runner:
            verifier = runner.run(Verifier(wait, count=1).start())
            submission = verifier.submit(b"x" * 100_000)
            threading.Thread(target=hold).start()
            held.wait()
            pid = os.fork()
            if pid == 0:
                os._exit(7 if isinstance(submission.exception(), ForkedError) else 8)
            for _ in range(1000):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    break
                time.sleep(0.01)
            else:
                os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
            print(os.waitstatus_to_exitcode(status))
            release.set()
            gate.set()
            runner.run(verifier.aclose())
            print(len(submission.result()))
    """,
    )
    assert (code, out, err) == (0, "7\n100000\n", "")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("workers", EVERYWHERE)
def test_forked_child_is_told_and_the_parent_goes_on(workers: str, tmp_path: Path) -> None:
    """In the child new packets get ForkedError, old ones are let go, and closing returns; the parent works on."""
    code, out, err = run_program(
        tmp_path,
        f"""
        async def ask(*packets):
            return [verifier.digest(packet) for packet in packets]

        async def child():
            try:
                verifier.digest(b"")
            except ForkedError as exc:
                print(exc)
            await verifier.aclose()
            print(verifier.stats()[:3])

        if __name__ == "__main__":
            with asyncio.Runner() as runner:
                verifier = runner.run(Verifier("sha256", workers={workers!r}, count=1).start())
                checks = runner.run(ask(b"", b"x" * 100_000))
                pid = os.fork()
                if pid == 0:
                    signal.alarm(15)
                    asyncio.run(child())
                    sys.stdout.flush()
                    os._exit(7)
                print(os.getpid(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                runner.run(verifier.aclose())
                print([check.result() == hashlib.sha256(x).digest() for check, x in zip(checks, [b"", b"x" * 100_000])])
        """,
    )
    told, stats, ended, parent = out.splitlines()
    pid = ended.split()[0]
    assert told == f"'verifier' belongs to the parent process {pid}; open one in this process"
    assert (stats, ended, parent) == ("(0, 0, 0)", f"{pid} 7", "[True, True]")
    assert (code, err) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("workers", EVERYWHERE)
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_verifier_left_open_does_not_keep_the_program(workers: str, busy: bool, tmp_path: Path) -> None:
    """A program that never closes it ends, well and without a word, with packets under way or not."""
    code, out, err = run_program(
        tmp_path,
        f"""
        async def main():
            global verifier
            verifier = await Verifier("sha256", workers={workers!r}, count=2).start()
            await verifier.digest(b"")
            packet = bytes(1 << 20)
            for _ in range(50_000 * {busy}):  # half a minute's work
                verifier.digest(packet)
            await asyncio.sleep(0)
            print("main ends")

        if __name__ == "__main__":
            asyncio.run(main())
        """,
    )
    assert (code, out, err) == (0, "main ends\n", "")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system has no descriptors of processes")
def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    """kill -9 for the parent leaves no worker process behind."""
    path = tmp_path / "program.py"
    path.write_text(
        PRELUDE
        + textwrap.dedent("""
        async def main():
            verifier = await Verifier("sha256", workers="processes", count=2).start()
            print(*[place.worker._process.pid for place in verifier._places], flush=True)
            signal.pause()

        if __name__ == "__main__":
            asyncio.run(main())
        """)
    )
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        descriptors = [os.pidfd_open(int(pid)) for pid in program.stdout.readline().split()]
        program.kill()
        program.wait()
    import select

    for descriptor in descriptors:
        assert select.select([descriptor], [], [], 20)[0]  # readable: it has ended
        os.close(descriptor)
    assert len(descriptors) == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")
def test_ctrl_c_reaches_us_and_not_the_processes(tmp_path: Path) -> None:
    """Ctrl-C in a terminal, which every process gets, ends the program as always, and no worker complains."""
    path = tmp_path / "program.py"
    path.write_text(
        PRELUDE
        + textwrap.dedent("""
        async def main():
            async with Verifier("sha256", workers="processes", count=2) as verifier:
                print("ready", flush=True)
                while True:
                    await verifier.digest(bytes(1 << 20))

        if __name__ == "__main__":
            try:
                asyncio.run(main())
            except KeyboardInterrupt:
                print("interrupted")
        """)
    )
    command = [sys.executable, "-W", "error", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        os.killpg(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=30)
    assert (program.returncode, out, err) == (0, "interrupted\n", "")


def need(name: str) -> None:
    """A package that a test cannot do without."""
    if importlib.util.find_spec(name) is None:
        reason = f"{name} is not installed"
        if os.environ.get("OFFLOAD_REQUIRE_PEERS"):
            pytest.fail(f"{reason}, and OFFLOAD_REQUIRE_PEERS is set", pytrace=False)
        pytest.skip(reason)


@pytest.mark.slow
def test_packet_that_kills_a_clusters_workers(tmp_path: Path) -> None:
    """On a real cluster a packet that kills each worker that has it fails alone; all others succeed, in order."""
    need("distributed")
    (tmp_path / "dask_jobs.py").write_text(JOBS)
    path = tmp_path / "program.py"
    path.write_text(
        PRELUDE
        + textwrap.dedent("""
        import json
        import dask, dask_jobs
        from distributed import Client, LocalCluster

        async def main(executor):
            packets = [b"%d" % number for number in range(30)]
            packets[10] = b"die"
            async with Verifier(dask_jobs.behave, workers=executor) as verifier:
                checks = [verifier.digest(packet) for packet in packets]
                found = await asyncio.gather(*checks, return_exceptions=True)
                error, found[10] = found[10], b"die"
                stats = verifier.stats()
            print(json.dumps({
                "others": found == packets, "error": [type(error).__name__, type(error.__cause__).__name__],
                "done, failed": stats[3:5], "more than one try": stats.lost >= 2,
            }))

        if __name__ == "__main__":
            dask.config.set({"distributed.scheduler.allowed-failures": 0})  # else it kills four workers a try
            where = {"host": "127.0.0.1", "scheduler_port": 0, "dashboard_address": None}
            with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, silence_logs=50, **where) as cluster:
                with Client(cluster) as client, client.get_executor() as executor:
                    asyncio.run(main(executor))
        """)
    )
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "others": True,
        "error": ["BrokenResourceError", "KilledWorker"],
        "done, failed": [30, 1],
        "more than one try": True,
    }


@pytest.mark.slow
def test_dask_cluster(tmp_path: Path) -> None:
    """A real cluster's executor does the work, in order; a worker of it that is killed costs no packet."""
    need("distributed")
    (tmp_path / "dask_jobs.py").write_text(JOBS)
    path = tmp_path / "program.py"
    path.write_text(
        PRELUDE
        + textwrap.dedent("""
        import json, logging
        import dask_jobs
        from distributed import Client, LocalCluster

        async def main(executor):
            came = []
            packets = [os.urandom(size) for size in (0, 100, 10_000, 300_000) * 10]
            async with Verifier("sha256", workers=executor) as verifier:
                checks = [verifier.check(packet, hashlib.sha256(packet).digest()) for packet in packets]
                for number, check in enumerate(checks):
                    check.add_done_callback(lambda _, number=number: came.append(number))
                right = all(await asyncio.gather(*checks))
            async with Verifier(dask_jobs.pid, workers=executor) as verifier:
                pids = set()
                while len(pids) < 2:
                    pids.update(await asyncio.gather(*[verifier.digest(b"%d" % n) for n in range(20)]))
                checks = [verifier.digest(b"%d" % number) for number in range(300)]
                await checks[10]
                os.kill(min(pids), signal.SIGKILL)
                answers = await asyncio.gather(*checks)
            async with Verifier(dask_jobs.behave, workers=executor) as verifier:
                found = await asyncio.gather(*map(verifier.digest, [b"a", b"raise", b"b"]), return_exceptions=True)
            print(json.dumps({
                "right": right, "in order": came == list(range(40)), "elsewhere": os.getpid() not in pids,
                "answers": len(answers), "found": list(map(str, found)),
            }))

        if __name__ == "__main__":
            where = {"host": "127.0.0.1", "scheduler_port": 0, "dashboard_address": None}
            with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, silence_logs=50, **where) as cluster:
                with Client(cluster) as client, client.get_executor() as executor:
                    asyncio.run(main(executor))
        """)
    )
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "right": True,
        "in order": True,
        "elsewhere": True,
        "answers": 300,
        "found": ["b'a'", "('no good', 7)", "b'b'"],
    }


def test_digest_crosses_and_says_what_it_is() -> None:
    """A Digest can be pickled, with its key, and names itself."""
    import pickle

    digest = pickle.loads(pickle.dumps(Digest("sha256", b"secret")))
    assert digest(b"x") == hmac.digest(b"secret", b"x", "sha256")
    assert (repr(digest), repr(Digest("crc32"))) == ("hmac-sha256", "crc32")
    assert Digest("crc32")(b"x") == zlib.crc32(b"x").to_bytes(4, "big")
