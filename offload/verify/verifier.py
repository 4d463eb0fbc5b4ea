"""Checks packets off the event loop, and gives the results in the order of the calls.

    async with Verifier("sha256") as v:                caller's loop       │  threads "verifier 1", "verifier 2" …
        check = v.check(packet, expected)              ────────────────────┼─► take a batch, digest it
        await v.room()                                                     │   (or have a process or executor do it)
        if not (verdict := await check):               ◄───────────────────┼── what is done, up to the first that is not
            print(verdict.found, verdict.expected)

Plain threads use `with`, `submit` and `wait_room`. Every worker has a LoopThread, on which it takes packets from one
queue until that is empty. Neighbours go in batches, as many as take its `batch_seconds`: so a packet of 100 bytes does
not pay for a hop, and one that takes a second does not hold up its neighbours. `order.py` keeps the order, `workers.py`
does the work.

Where (tests/benchmarks/bench_verify.py measures it; the bounds were found on a busy machine of two cores):
    "threads"      digests, and what else gives up the GIL while it works. Packets below 8 KiB are digested on the
                   caller's loop: in the call itself, a few hundred in a row, if nothing is under way before them, else
                   half a millisecond at a time. A hop would cost more than the digest.
    "processes"    Python code, and what keeps the GIL, from about a tenth of a millisecond a packet. Functions must be
                   importable, and a program that uses this needs its `if __name__ == "__main__":`.
    an Executor    a cluster (Dask's `Client.get_executor()`), from about ten milliseconds a packet.
    "cooperative"  no thread at all: the caller's loop does it, digests in slices, and turns to others in between.

Promises, beyond those of `order.py`:
    - A function's error reaches the caller of its packet only.
    - A worker that dies (a killed process, a lost cluster node) takes nothing with it: its packets are tried once more,
      each alone (on an executor with nothing else of ours beside it), so that the one that kills its worker fails
      alone, with BrokenResourceError. An executor that does not survive its worker, as ProcessPoolExecutor, fails all
      packets from then on.
    - Context variables of the caller hold in a function on threads, and cooperatively. They cannot leave the process,
      so neither processes nor an executor see them.
    - A packet cancelled while it waits is never looked at. One under way is waited for, then it is cancelled: until
      then a worker may read it. (After Ctrl-C nobody waits.)
    - `aclose` takes no more, and returns when what was accepted is done and threads and processes have ended.
    - What ends a worker's thread, a fork and the interpreter's exit resolve every check with an error that says why.

Packets are not copied, but into another process: leave a bytearray as it is until its result is there.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from concurrent.futures import Future as ThreadFuture
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload

from ..errors import BrokenResourceError, ClosedResourceError, DeadlockError, ForkedError, OffloadError
from ..loops import outlast
from ..packets.codec import Buffer
from . import workers as workers_module
from .check import DONE, NOTHING, RUNNING, Check, Packet, Verdict
from .order import BURST, SMALL_BYTES, LoopDesk, Order, VerifierStats
from .workers import Child, Digest, Elsewhere, Here, Outcome, Place, Quarantine, Worker, apply

R = TypeVar("R")

Workers = Literal["threads", "processes", "cooperative"]

MAX_BYTES = 8 << 20
TURN = 0.0005  # seconds of digesting on a caller's loop before others get their turn
SLICE_BYTES = 64 << 10  # of a large packet there: 0.1 ms of md5


class Verifier(Generic[R]):
    """Digests, or any function of a packet, in order and off the event loop; see the head of this module.

    Args:
        what: the name of a digest (see Digest), or a function from bytes to a result. Processes and clusters need one
            that can be pickled.
        key: makes the digest an HMAC.
        workers: "threads", "processes", "cooperative", or an Executor; that one stays yours to shut down.
        count: how many threads or processes, or how many batches an executor is given at once; None: as many as there
            are CPUs for this process, for an executor twice as many.
        max_bytes: bytes in flight, 512 added for each packet, up to which `room` returns at once.
        name: of its threads and processes.
        exit_timeout: seconds for which the interpreter's exit waits for batches that run.

    Use it as `async with`, or by `start()` and `aclose()`, from any loop and from several at once; in a program without
    a loop as `with`. Either way plain threads may `submit`.

    Raises:
        ValueError: no such digest, or a number that makes no sense.
    """

    @overload
    def __init__(
        self: Verifier[bytes],
        what: str,
        *,
        key: bytes | None = None,
        workers: Workers | Executor = "threads",
        count: int | None = None,
        max_bytes: int = MAX_BYTES,
        name: str = "verifier",
        exit_timeout: float = 5.0,
    ) -> None: ...
    @overload
    def __init__(
        self,
        what: Callable[[bytes], R],
        *,
        workers: Workers | Executor = "threads",
        count: int | None = None,
        max_bytes: int = MAX_BYTES,
        name: str = "verifier",
        exit_timeout: float = 5.0,
    ) -> None: ...
    def __init__(
        self,
        what: Any,
        *,
        key: bytes | None = None,
        workers: Workers | Executor = "threads",
        count: int | None = None,
        max_bytes: int = MAX_BYTES,
        name: str = "verifier",
        exit_timeout: float = 5.0,
    ) -> None:
        if max_bytes < 1 or (count is not None and count < 1):
            raise ValueError(f"max_bytes is {max_bytes}, count is {count}; expected at least 1")
        if key is not None and not isinstance(what, str):
            raise ValueError(f"a key is for the name of a digest, and this is {what!r}")
        self.name = name
        self._function: Callable[[Any], Any] = Digest(what, key) if isinstance(what, str) else what
        self._places = [
            Place(worker, f"{name} {number}", exit_timeout)
            for number, worker in enumerate(self._workers(workers, count), 1)
        ]
        digest = self._function if isinstance(self._function, Digest) else None
        in_process = workers in ("threads", "cooperative")
        here_below = 1 << 62 if not self._places else SMALL_BYTES if digest and in_process else 0
        self._order = Order(
            max_bytes,
            here_below,
            self._turn,
            lambda: ClosedResourceError(f"{name!r} is not started; use it as `async with`, or await its start()"),
            digest=digest if in_process else None,
            context=in_process and digest is None,
        )
        self._idle: list[Place] = []
        self._started = self._closing = False
        self._lost_batches = 0

    def _workers(self, kind: Workers | Executor, count: int | None) -> list[Worker]:
        function = self._function
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if isinstance(kind, Executor):
            quarantine = Quarantine()
            return [Elsewhere(function, kind, quarantine) for _ in range(count or 2 * cpus)]
        if kind == "threads":
            return [Here(function) for _ in range(count or cpus)]
        if kind == "processes":
            return [Child(function, f"{self.name} {n}") for n in range(1, 1 + (count or cpus))]
        if kind == "cooperative":
            return []
        raise ValueError(f"workers is {kind!r}, expected 'threads', 'processes', 'cooperative' or an Executor")

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Start the threads, and the processes; return when they are ready.

        Raises:
            ClosedResourceError: it was started or closed before.
            BrokenResourceError: a process could not be started.
            Exception: whatever says that the function cannot be pickled. All has ended again then.
        """
        self._launch()
        try:
            for place in self._places:
                await place.thread.start()
            await _all([place.thread.call(place.worker.open) for place in self._places])
        except BaseException:
            await self.aclose()
            raise
        self._opened()
        return self

    def _launch(self) -> None:
        with self._order.lock:
            if self._started or self._closing:
                raise ClosedResourceError(f"{self.name!r} was started or closed before; make a new one")
            self._started = True

    def _opened(self) -> None:
        with self._order.lock:
            self._idle = list(self._places)
            if not self._closing:
                self._order.refusal = None
        _live.add(self)

    async def aclose(self) -> None:
        """Take no more packets, finish those that are here, end threads and processes. Cancelling does not shorten it.

        Raises:
            DeadlockError: called from one of its threads.
        """
        left = self._begin_close()
        order = self._order
        desk = order.desk()
        try:
            if self._places:
                self._kick()
                await _all([asyncio.ensure_future(place.thread.aclose()) for place in self._places])
            elif order.bytes:
                desk.local.extend(left)
                desk.schedule()
                await outlast(order.until(0))
        finally:
            _live.discard(self)
            order.fail(self._closed)
            while desk.ready:
                desk.settle()

    def close(self) -> None:
        """As `aclose`, for plain threads: blocks until all has ended."""
        left = self._begin_close()
        try:
            self._kick()
            for check in left if not self._places else ():
                self._order.finish([check], [self._whole(check)])
            for place in self._places:
                place.thread.close()
        finally:
            _live.discard(self)
            self._order.fail(self._closed)

    def _begin_close(self) -> list[Packet]:
        """Take no more; what is left of loops that may stand still: this one, or the workers, do it."""
        if any(place.thread.is_here() for place in self._places):
            raise DeadlockError(f"{self.name!r} cannot be closed from its own thread; close it where it was opened")
        order = self._order
        with order.lock:
            self._closing = True
            order.refusal = order.refusal or self._closed
            left = [check for desk in list(order.desks.values()) for check in iter(desk.next_local, None)]
            if self._places:
                order.waiting.extend(left)
            for check in left if not self._places else ():
                check.state = max(check.state, RUNNING)  # its own loop may cancel it while this one does it
        return left

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        self._launch()
        try:
            for place in self._places:
                place.thread.__enter__()
            for ready in [place.thread.submit(place.worker.open) for place in self._places]:
                ready.result()
        except BaseException:
            self.close()
            raise
        self._opened()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- for callers ------------------------------------------------------------------------------------------------

    def digest(self, packet: Buffer, *, nowait: bool = False) -> Check[R]:
        """The digest of a packet, or what the function makes of it; its place in the order is taken now.

        Args:
            packet: any bytes; a memoryview must be contiguous. A function gets them as `bytes`.
            nowait: raise QueueFullError if `max_bytes` are in flight.

        Returns:
            A future of the running loop, with the digest, or the function's result or error.

        Raises:
            ClosedResourceError, BrokenResourceError, ForkedError, QueueFullError: nothing was accepted.
            RuntimeError: no event loop runs here.
        """
        return self._order.put(packet, NOTHING, nowait=nowait)

    def check(self, packet: Buffer, expected: R, *, nowait: bool = False) -> Check[Verdict[R]]:
        """As `digest`, compared with what is expected, bytes and text in constant time; true if it is that."""
        return self._order.put(packet, expected, nowait=nowait)

    @overload
    def submit(self, packet: Buffer, *, nowait: bool = False) -> ThreadFuture[R]: ...
    @overload
    def submit(self, packet: Buffer, expected: R, *, nowait: bool = False) -> ThreadFuture[Verdict[R]]: ...
    def submit(self, packet: Buffer, expected: Any = NOTHING, *, nowait: bool = False) -> ThreadFuture[Any]:
        """As `digest` or `check`, from any thread, with or without a loop; in order for each thread.

        What other callers have done on their loop (small digests; everything, if cooperative) is done here and now.

        Returns:
            A concurrent future: `result(timeout)` waits, `cancel()` drops the packet if no worker has it. Its callbacks
            run on whichever thread has the result, and delay that.
        """
        submission, for_worker = self._order.submit(packet, expected, self._whole, nowait=nowait)
        if for_worker:
            self._kick()
        return submission

    async def room(self) -> None:
        """Wait until no more than `max_bytes` are in flight; await it after each call, and memory stays bounded.

        It gives up the loop after a few hundred calls in a row, too: who has everything at hand would never do that.
        """
        order = self._order
        while order.bytes > order.max_bytes:
            room = order.until(order.max_bytes)
            try:
                await room
            finally:
                order.forget(room)
        if order.desk().burst > BURST:
            await asyncio.sleep(0)

    def wait_room(self, timeout: float | None = None) -> None:
        """As `room`, for plain threads: block after each `submit` until there is room, and memory stays bounded.

        Raises:
            TimeoutError: there is none after `timeout` seconds.
            DeadlockError: called from one of its threads, which would have to make it.
        """
        order = self._order
        if order.bytes <= order.max_bytes:
            return
        if any(place.thread.is_here() for place in self._places):
            raise DeadlockError(f"{self.name!r} cannot wait for room on its own thread; submit from another one")
        room = order.thread_until(order.max_bytes)
        try:
            room.result(timeout)
        except TimeoutError:
            message = f"{order.bytes} bytes are still in flight after {timeout} s, the bound is {order.max_bytes}"
            raise TimeoutError(message) from None
        finally:
            order.forget(room)

    def stats(self) -> VerifierStats:
        """How it fares; from any thread."""
        return self._order.stats(self._lost_batches)

    @property
    def closed(self) -> bool:
        """Whether packets are refused: it was closed, or has not been started, or a thread of it is gone."""
        return self._order.refusal is not None

    # --- on a caller's loop -----------------------------------------------------------------------------------------

    def _turn(self, desk: LoopDesk) -> None:
        """A burst of calls is over: wake who is needed, and do what is to be done here."""
        if desk.at_once:
            self._order.counted(desk)
        self._kick()
        if not desk.local:
            return
        batch: list[Packet] = []
        outcomes: list[Outcome] = []
        until = perf_counter() + TURN
        while perf_counter() < until and (check := desk.next_local()) is not None:
            if check.state is DONE:
                continue
            outcome = self._do_here(check)
            if outcome is None:
                desk.local.appendleft(check)
            else:
                batch.append(check)
                outcomes.append(outcome)
        if desk.local:
            desk.schedule()
        self._order.finish(batch, outcomes, desk)

    def _whole(self, check: Packet) -> Outcome:
        return apply(self._function, [check.packet], [check.context])[0]

    def _do_here(self, check: Packet) -> Outcome | None:
        """Do a packet, or a slice of it; then None."""
        function, size = self._function, len(check.packet)
        if not isinstance(function, Digest) or size <= SLICE_BYTES:
            return self._whole(check)
        if check.hasher is None:
            check.hasher, check.at = function.new(), 0
        check.hasher.update(memoryview(check.packet)[check.at : check.at + SLICE_BYTES])
        check.at += SLICE_BYTES
        return (check.hasher.digest(), None) if check.at >= size else None

    def _kick(self) -> None:
        """Wake as many workers as there is work for; from any thread."""
        if not self._order.waiting or not self._idle:
            return
        with self._order.lock:
            woken = [self._idle.pop() for _ in range(min(len(self._order.waiting), len(self._idle)))]
        for place in woken:
            try:
                place.thread.submit(self._work, place).add_done_callback(self._worked)
            except OffloadError as exc:
                self._break(exc)

    # --- on the workers' threads ------------------------------------------------------------------------------------

    def _work(self, place: Place) -> None:
        """Take batches until there are none."""
        order = self._order
        while True:
            with order.lock:
                batch = order.take(min(place.limit, -(-len(order.waiting) // len(self._places))))
                if not batch:
                    self._idle.append(place)
                    return
            try:
                outcomes, seconds = place.worker.run(
                    [c.packet for c in batch], [c.context for c in batch], suspect=bool(batch[0].deaths)
                )
            except BaseException as exc:
                self._lost(batch, exc)
            else:
                place.learn(seconds, len(batch))
                order.finish(batch, outcomes)
            if place.thread.closing.is_set() and not self._closing:
                order.fail(lambda: BrokenResourceError(f"{self.name!r} was left open when the program ended"))

    def _lost(self, batch: Sequence[Packet], cause: BaseException) -> None:
        """A worker died, or could not tell us what it found: once more, each packet alone, so that one is to blame."""
        self._lost_batches += 1
        for check in self._order.give_back(batch):
            error = BrokenResourceError(f"{self.name!r} gave this packet to two workers and heard of neither: {cause}")
            error.__cause__ = cause
            self._order.finish([check], [(None, error)])
        self._kick()

    def _worked(self, future: ThreadFuture[None]) -> None:
        if future.cancelled() or (error := future.exception()) is None:
            return
        if not isinstance(error, ForkedError):  # else `_after_fork` comes, which first makes the locks free
            self._break(error)

    # --- ends -------------------------------------------------------------------------------------------------------

    def _closed(self) -> OffloadError:
        return ClosedResourceError(f"{self.name!r} is closed")

    def _break(self, cause: BaseException) -> None:
        """A thread of it is gone; from any thread."""

        def broken() -> OffloadError:
            error = BrokenResourceError(f"{self.name!r} has lost a thread: {cause!r}")
            error.__cause__ = cause
            return error

        self._order.refusal = broken
        self._order.fail(broken)

    def _after_fork(self, parent: int) -> None:
        message = f"{self.name!r} belongs to the parent process {parent}; open one in this process"
        self._order.after_fork()
        for place in self._places:
            if isinstance(place.worker, Child):
                place.worker.after_fork()
        self._order.refusal = lambda: ForkedError(message)
        self._order.fail(self._order.refusal)


async def _all(futures: Sequence[asyncio.Future[Any]]) -> None:
    """Wait for all of them, even if cancelled or if one fails; then raise the first error."""
    for result in await asyncio.gather(*futures, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


# --- every open verifier, for fork ------------------------------------------------------------------------------------

_live: weakref.WeakSet[Verifier[Any]] = weakref.WeakSet()
_process = os.getpid()


def _mark_forked() -> None:
    global _process
    parent, _process = _process, os.getpid()
    workers_module.after_fork()
    for verifier in list(_live):
        verifier._after_fork(parent)
    _live.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)
