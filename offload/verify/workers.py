"""What makes something of packets: the digests, and the workers that do it, a batch at a time.

    Digest     a checksum by name, which crosses to other processes
    Here       does it on the worker's own thread
    Child      has a process of its own do it: small batches by pipe, large ones by shared memory
    Elsewhere  has an executor do it, which may be another machine's
    Place      a worker and the thread that it blocks

Promises:
    - What the function raises belongs to its packet: it is an outcome like any other.
    - What `run` raises belongs to the worker: its process died, its cluster is gone, or a result could not cross.
    - A child ends with its parent, however that ends, and is made again for the next batch if it died itself.

A worker's methods run on its own thread, where they may block; see `verifier.py`.
"""

from __future__ import annotations

import atexit
import hashlib
import hmac
import importlib
import os
import pickle
import signal
import threading
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import partial
from itertools import repeat
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BrokenResourceError
from ..loops.call import holdable
from ..loops.thread import LoopThread
from ..packets.codec import Buffer

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess
    from multiprocessing.shared_memory import SharedMemory

Function = Callable[[Any], Any]
Outcome = tuple[Any, BaseException | None]  # what the function returned, or what it raised
Done = tuple[list[Outcome], float]  # and the seconds that the work took, without the way there and back

# From here on bytes go by shared memory: a pipe takes 64 KiB at a time, and each time wakes the other side. A guess.
SHARED_BYTES = 64 << 10
BATCH_PACKETS = 256
_LOOK = 1.0  # seconds after which a silent child is looked after: a grandchild may hold its pipe open
_TO_END = 5.0  # seconds for a child that was told to end


class Hasher(Protocol):
    """A digest under way."""

    def update(self, data: Buffer, /) -> object: ...
    def digest(self) -> bytes: ...


class Digest:
    """A checksum by name: called with a packet it gives the digest, as bytes. It can be pickled.

    Args:
        name: "crc32" (RFC 1952, section 8; four bytes, big-endian), "blake3" (with the package of that name), or a
            digest of fixed length that hashlib has: md5, sha1, sha256, sha3_256, blake2b …
        key: makes it an HMAC (RFC 2104) of that digest.

    Raises:
        ValueError: no such digest here, or none that takes a key.
    """

    def __init__(self, name: str, key: bytes | None = None) -> None:
        self.name, self.key = name, key
        self.new: Callable[[], Hasher]
        self.once: Callable[[Buffer], bytes]
        if key is not None and name in ("crc32", "blake3"):
            raise ValueError(f"{name} with a key is no HMAC; use a digest of hashlib, for example sha256")
        if name == "crc32":
            self.new, self.once = _Crc32, _crc32
            return
        if name == "blake3":
            try:
                make = importlib.import_module("blake3").blake3
            except ImportError as exc:
                raise ValueError("blake3 is not installed; install the package blake3") from exc
        elif name not in hashlib.algorithms_available or name.startswith("shake"):
            known = ", ".join(sorted(n for n in hashlib.algorithms_guaranteed if not n.startswith("shake")))
            raise ValueError(f"no digest {name!r}; there are blake3, crc32, {known}")
        else:
            make = getattr(hashlib, name, None) or partial(hashlib.new, name)
            if name in ("md5", "sha1"):  # a system that forbids them as signatures has them as checksums
                make = partial(make, usedforsecurity=False)
        if key is None:
            self.new, self.once = make, lambda packet: make(packet).digest()
        else:
            secret = key
            self.new, self.once = lambda: hmac.new(secret, digestmod=name), lambda packet: _hmac(secret, packet, name)

    def __call__(self, packet: Buffer) -> bytes:
        return self.once(packet)

    def __reduce__(self) -> tuple[type[Digest], tuple[str, bytes | None]]:
        return Digest, (self.name, self.key)

    def __repr__(self) -> str:
        return self.name if self.key is None else f"hmac-{self.name}"


def _hmac(key: bytes, packet: Buffer, name: str) -> bytes:
    return hmac.digest(key, packet, name)


def _crc32(packet: Buffer) -> bytes:
    return zlib.crc32(packet).to_bytes(4, "big")


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Buffer, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


def apply(
    function: Function, packets: Sequence[Buffer], contexts: Iterable[Context | None] = repeat(None)
) -> list[Outcome]:
    """What the function makes of each packet. A function that is no Digest gets bytes, whatever the packet is.

    Args:
        contexts: of context variables, one for each packet; None: those of whoever calls this.
    """
    work = function.once if isinstance(function, Digest) else function
    as_is = isinstance(function, Digest)
    outcomes: list[Outcome] = []
    for packet, context in zip(packets, contexts, strict=False):
        try:
            if context is None:
                outcomes.append((work(packet if as_is else bytes(packet)), None))
            else:
                outcomes.append((context.run(work, bytes(packet)), None))
        except BaseException as exc:  # SystemExit too: it is the packet's, not the worker's
            # Without our frame, which refers to every packet of the batch.
            outcomes.append((None, holdable(exc.with_traceback(exc.__traceback__ and exc.__traceback__.tb_next))))
    return outcomes


def apply_timed(
    function: Function, packets: Sequence[Buffer], home: int = 0, contexts: Iterable[Context | None] = repeat(None)
) -> Done:
    """As `apply`, with the time that it took; errors that leave this process are made such that they arrive."""
    begun = perf_counter()
    outcomes = apply(function, packets, contexts)
    seconds = perf_counter() - begun
    if os.getpid() != home:
        outcomes = [(value, error and _portable(error)) for value, error in outcomes]
    return outcomes, seconds


def _portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note: pickling keeps no traceback. One that cannot be pickled is told of."""
    trace = "".join(traceback.format_exception(error))
    try:
        # There and back: some can be pickled and not unpickled, which would break who receives it.
        copy: BaseException = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__qualname__}: {error}")
    copy.add_note(f"in process {os.getpid()}:\n{trace}")
    return copy


def _pack(done: Done) -> bytes:
    with suppress(Exception):
        return pickle.dumps(done)
    outcomes, seconds = done
    return pickle.dumps(([_packable(outcome) for outcome in outcomes], seconds))


def _packable(outcome: Outcome) -> Outcome:
    try:
        pickle.dumps(outcome)
    except Exception as exc:
        kind = type(outcome[0]).__qualname__
        return None, TypeError(f"the result, a {kind}, cannot be pickled to leave its process: {exc}")
    return outcome


class Worker(Protocol):
    """Takes a batch at a time, on a thread of its own.

    Attributes:
        batch_seconds: of work there should be in a batch, so that what it costs to hand it over does not show.
    """

    batch_seconds: float

    def open(self) -> None:
        """Be ready for batches, or raise why not."""

    def run(self, packets: Sequence[Buffer], contexts: Sequence[Context | None], *, suspect: bool) -> Done:
        """An outcome for each packet, in its caller's context as far as that can reach the worker.

        It raises if there are none: the worker died, or they cannot reach us.

        Args:
            suspect: they had a worker that died; nothing else of ours may suffer if this one does too.
        """
        ...

    def close(self) -> None:
        """Leave nothing behind."""


class Here:
    """A worker that does it itself."""

    batch_seconds = 0.002

    def __init__(self, function: Function) -> None:
        self._function = function

    def open(self) -> None:
        pass

    def run(self, packets: Sequence[Buffer], contexts: Sequence[Context | None], *, suspect: bool) -> Done:
        return apply_timed(self._function, packets, os.getpid(), contexts)

    def close(self) -> None:
        pass


class Quarantine:
    """Lets in any number at a time, or a suspect alone: what queues at a cluster node that dies is blamed with it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = self._suspects = 0

    @contextmanager
    def inside(self, *, suspect: bool) -> Iterator[None]:
        """Wait to be let in; a suspect goes first."""
        with self._changed:
            if suspect:
                self._suspects += 1
            self._changed.wait_for(lambda: not self._inside if suspect else not self._suspects)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._suspects -= suspect
                self._changed.notify_all()


class Elsewhere:
    """A worker that hands its batches to an executor, which stays its owner's.

    Args:
        quarantine: shared by all workers with this executor.
    """

    batch_seconds = 0.02  # a hop to a Dask worker and back takes 5 ms

    def __init__(self, function: Function, executor: Executor, quarantine: Quarantine) -> None:
        self._function, self._executor, self._quarantine = function, executor, quarantine

    def open(self) -> None:
        pass

    def run(self, packets: Sequence[Buffer], contexts: Sequence[Context | None], *, suspect: bool) -> Done:
        as_bytes = [bytes(packet) for packet in packets]  # a memoryview cannot be pickled
        with self._quarantine.inside(suspect=suspect):
            return self._executor.submit(apply_timed, self._function, as_bytes, os.getpid()).result()

    def close(self) -> None:
        pass


class Place:
    """A worker, its thread, and how many packets it takes at a time."""

    def __init__(self, worker: Worker, name: str, exit_timeout: float) -> None:
        self.worker = worker
        self.thread = LoopThread(name, on_close=worker.close, exit_timeout=exit_timeout)
        self.limit = 1

    def learn(self, seconds: float, packets: int) -> None:
        """The work of a batch took so long: take twice as many if that is little, half if it is much."""
        if seconds > 2 * self.worker.batch_seconds:
            self.limit = max(1, packets // 2)
        elif seconds < self.worker.batch_seconds / 2 and packets >= self.limit:
            self.limit = min(BATCH_PACKETS, 2 * packets)


# Starting a process is not made for several threads at once: children are reaped in passing.
_starting = threading.Lock()


def after_fork() -> None:
    """In a forked child: the lock may have been held by a thread that is not here."""
    global _starting
    _starting = threading.Lock()


class Child:
    """A worker with a process of its own, started afresh ("spawn"): a fork would copy locks that other threads hold."""

    batch_seconds = 0.002

    def __init__(self, function: Function, name: str) -> None:
        self._function, self._name = function, name
        self._process: BaseProcess | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._shared: SharedMemory | None = None
        self._ending = False

    def open(self) -> None:
        from multiprocessing import get_context  # 15 ms, which those who stay on threads need not pay

        if self._ending:
            raise BrokenResourceError(f"{self._name} is not started again: the program ends")
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._function), name=self._name, daemon=True)
        try:
            with _starting:
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._process, self._pipe = process, ours
        # multiprocessing ends its daemons at exit: that is no reason to start them again. Registered after its own
        # function, and so called before.
        atexit.register(self._stop)
        self._receive()  # it is there

    def run(self, packets: Sequence[Buffer], contexts: Sequence[Context | None], *, suspect: bool) -> Done:
        if self._process is not None and not self._process.is_alive():
            self._end()  # it died while it had nothing to do: that is no packet's fault
        if self._process is None:
            self.open()
        assert self._pipe is not None
        size = sum(map(len, packets))
        batch = self._share(packets, size) if size >= SHARED_BYTES else [bytes(packet) for packet in packets]
        with suppress(OSError):  # it is gone, and `_receive` says how
            self._pipe.send(batch)
        done: Done = self._receive()
        return done

    def close(self) -> None:
        self._end()
        if self._shared is not None:
            self._shared.close()
            self._shared.unlink()
            self._shared = None

    def after_fork(self) -> None:
        """In a forked child: the process is the parent's, and must see its end."""
        atexit.unregister(self._stop)
        if self._pipe is not None:
            self._pipe.close()

    def _stop(self) -> None:
        self._ending = True

    def _share(self, packets: Sequence[Buffer], size: int) -> tuple[str, list[int]]:
        """Copy the packets into shared memory; its name, and their sizes."""
        from multiprocessing.shared_memory import SharedMemory

        if self._shared is not None and self._shared.size < size:
            self._shared.close()
            self._shared.unlink()
            self._shared = None
        if self._shared is None:
            # A name of ours, for whoever finds it and wonders; 31 characters are the limit of macOS.
            name = f"offload_{os.getpid()}_{os.urandom(4).hex()}"
            self._shared = SharedMemory(name, create=True, size=max(size, 1 << 20))
        at, buffer = 0, self._shared.buf
        assert buffer is not None, "it is open"
        for packet in packets:
            buffer[at : at + len(packet)] = packet
            at += len(packet)
        return self._shared.name, [len(packet) for packet in packets]

    def _receive(self) -> Any:
        assert self._process is not None
        assert self._pipe is not None
        try:
            while not self._pipe.poll(_LOOK):
                if not self._process.is_alive():
                    raise EOFError
            return self._pipe.recv()
        except (EOFError, OSError) as exc:
            code = self._end()
            how = f"exited with code {code}" if code >= 0 else f"was ended by signal {-code}"
            raise BrokenResourceError(f"the process {self._name!r} {how}") from exc

    def _end(self) -> int:
        """See the process to its end, which it finds when its pipe ends; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        atexit.unregister(self._stop)
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        process.join(_TO_END)
        if process.is_alive():  # the function left a thread behind
            process.kill()
            process.join()
        code = process.exitcode or 0
        if not self._ending:  # at exit multiprocessing goes through its daemons itself, at this very moment
            process.close()
        return code


def _serve(pipe: Connection[Any, Any], function: Function) -> None:
    """The child: batches in, outcomes out, until the pipe ends."""
    from multiprocessing.shared_memory import SharedMemory

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; our parent decides
    shared: SharedMemory | None = None
    pipe.send(None)
    while True:
        try:
            batch = pipe.recv()
        except (EOFError, OSError):
            break
        if isinstance(batch, list):
            pipe.send_bytes(_pack(apply_timed(function, batch)))
            continue
        name, sizes = batch
        if shared is None or shared.name != name:
            if shared is not None:
                shared.close()
            shared = SharedMemory(name)
        assert shared.buf is not None, "it is open"
        with shared.buf.toreadonly() as view:
            at = 0
            packets = [view[(start := at) : (at := start + size)] for size in sizes]
            done = apply_timed(function, packets)
            for packet in packets:
                packet.release()
        pipe.send_bytes(_pack(done))
    if shared is not None:
        shared.close()
