"""Clocks of this process and of single threads, for the watchdog's thread to read. Linux tells most.

`Machine` and `Probe` read; they never wait, and give None for what this system does not tell (no /proc, no permission,
not Linux). All times are seconds.

Reading a file of /proc lets go of the GIL for a moment, so the caller takes its `sys._current_frames()` before anything
here. If a call in C begins in that moment that keeps the GIL, the reading goes on when that is over, and its thread
stands right behind it: the time to look. So `Overtaken` is raised then, if the caller cannot wait so long.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FrameType, ModuleType
from typing import Any, NamedTuple


def _genuine() -> ModuleType:
    """The module `time` as it is, also if we are imported while a test's library has frozen the time."""
    spec = time.__spec__
    if isinstance(time.perf_counter, BuiltinFunctionType) or spec is None or spec.loader is None:
        return time
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    """The detector's clock, bound at import; in a class, where libraries that freeze the time do not look for it."""

    genuine: Any = _genuine()
    _perf_counter: Callable[[], float] = genuine.perf_counter
    now = staticmethod(_perf_counter)


_CLOCKS: dict[str, Callable[[], float]] = {n: getattr(Clock.genuine, n) for n in ("perf_counter", "monotonic")}
_clock_gettime: Callable[[int], float] | None = getattr(time, "clock_gettime", None)
_process_time = time.process_time

MAX_OTHERS = 64  # threads whose clocks are read at a tick; 0.3 µs each
# A full collection takes 6 to 23 ns for each allocated block (measured, 3.11 and 3.13, one to nine million blocks).
# Below so many it cannot make a stall that anybody would ask about, and the collector is left alone.
GC_BLOCKS = 500_000
GC_SECONDS_A_BLOCK = 20e-9
GC_LOOK = 40  # ticks between two looks at the number of blocks, which cost 0.07 µs for a thousand of them


class Moment(NamedTuple):
    """What `Machine.read` read for the whole process at one tick of the watchdog."""

    at: float  # perf_counter
    late: float  # how much later than planned the watchdog woke
    process: float  # CPU of the process
    runqueue: float | None = None  # of the watchdog's thread: ready to run, without a processor
    slices: int | None = None  # how often the watchdog's thread was put on a processor
    others: Mapping[int, float] = {}  # CPU of each thread known to `threading`, by ident
    full: int = 0  # full collections so far
    gc: float | None = None  # seconds in collections so far; None: they are not timed, the heap is small
    blocks: int = 0  # allocated blocks of memory when last looked at, if that was late or just before `gc` began
    asleep: float | None = None  # CLOCK_BOOTTIME - CLOCK_MONOTONIC
    attached: bool = False  # a debugger is
    patched: bool = False  # a clock of `time` was replaced


class Reading(NamedTuple):
    """What `Probe.read` read for one loop's thread, with the moment it belongs to."""

    moment: Moment
    cpu: float | None = None
    runqueue: float | None = None
    slices: int | None = None  # how often it was put on a processor


class Overtaken(Exception):
    """While a file was read somebody took the GIL, and kept it for longer than the caller's patience.

    Attributes:
        since: perf_counter, when the GIL was let go.
    """

    def __init__(self, since: float) -> None:
        self.since = since


class Machine:
    """Readings that all loops share. For one thread, the watchdog's, which makes it; close it there or anywhere.

    Times the garbage collector (by `gc.callbacks`) only once so much memory is allocated that it matters.
    """

    def __init__(self) -> None:
        self._own = _SchedStat(threading.get_native_id())
        self._ident = threading.get_ident()
        self._clocks: dict[int, int] = {}  # CPU clock by native id
        self._gc: _GcTimer | None = None
        self._look = 0
        self._blocks = 0
        self._full = 0

    def read(self, at: float, late: float, patience: float = math.inf) -> Moment:
        """The process now; takes some 10 µs.

        Args:
            at: perf_counter, just after the caller woke.
            late: how much later that is than planned, and it should plan from the last one's `at`: what it took longer
                for its own looks, it waited for the GIL too. What it did for a report in between is no lateness.
            patience: seconds, see `Overtaken`.
        """
        full = gc.get_stats()[-1]["collections"]
        self._look -= 1
        if self._gc is None and (self._look < 0 or full != self._full):
            self._look = GC_LOOK
            self._blocks = sys.getallocatedblocks()
            if self._blocks >= GC_BLOCKS:
                self._gc = _GcTimer()
        self._full = full
        runqueue, slices = self._own.read(patience)
        return Moment(
            at,
            max(0.0, late),
            _process_time(),
            runqueue,
            slices,
            self._others(),
            full,
            self._gc.seconds if self._gc else None,
            self._blocks,
            _asleep(),
            _attached(),
            clocks_patched(),
        )

    def close(self) -> None:
        """Takes the timer off the garbage collector. Idempotent."""
        self._own.close()
        if self._gc is not None:
            self._gc.close()

    def _others(self) -> dict[int, float]:
        # threading's own table, copied: `threading.enumerate` takes a lock, and the watchdog must not wait.
        known: dict[int, Any] = vars(threading).get("_active", {}).copy()
        found: dict[int, float] = {}
        for ident, thread in known.items():
            if ident != self._ident and len(found) < MAX_OTHERS:
                cpu = _thread_cpu(getattr(thread, "native_id", None))
                if cpu is not None:
                    found[ident] = cpu
        return found


class Probe:
    """Clocks of one thread, for another thread to read. Make it again in a forked child.

    Args:
        native_id: `threading.get_native_id()` of the thread to watch.
        ident: its `threading.get_ident()`.
    """

    def __init__(self, native_id: int, ident: int) -> None:
        self.native_id = native_id
        self.ident = ident
        self._sched = _SchedStat(native_id)
        self._call = _open_proc(native_id, "syscall") if _NAMES else None

    def read(self, moment: Moment, patience: float = math.inf) -> Reading:
        """The thread now, 1 to 2 µs; None for what cannot be read, all of it once the thread has ended."""
        cpu = _thread_cpu(self.native_id)
        runqueue, slices = self._sched.read(patience)
        return Reading(moment, cpu, runqueue, slices)

    def syscall(self, patience: float = math.inf) -> str | None:
        """The system call that the thread waits in now: "fsync(7)", "futex"; "": in none; None: it is not told.

        Takes 2 µs. It is of this moment, not of the sample's: ask whether the stall still lasts after this returned.
        """
        text = _pread(self._call, patience)
        if text is None:
            return None
        words = text.split()
        if words[:1] == [b"-1"]:
            return "page fault"  # it waits, but in no system call
        if len(words) < 2:  # "running": it has a processor, or is ready to
            return ""
        name, has_descriptor = _NAMES.get(int(words[0]), (f"syscall {words[0].decode()}", False))
        return f"{name}({int(words[1], 16) & 0xFFFFFFFF})" if has_descriptor else name

    def close(self) -> None:
        """Closes its files. Idempotent."""
        self._sched.close()
        _close(self._call)
        self._call = None


class _SchedStat:
    """/proc/self/task/TID/schedstat: nanoseconds run, nanoseconds waited for a processor, times put on one."""

    def __init__(self, native_id: int) -> None:
        self._fd = _open_proc(native_id, "schedstat")

    def read(self, patience: float) -> tuple[float | None, int | None]:
        text = _pread(self._fd, patience)
        if text is None:
            return None, None
        words = text.split()
        return (int(words[1]) / 1e9, int(words[2])) if len(words) == 3 else (None, None)

    def close(self) -> None:
        _close(self._fd)
        self._fd = None


class _GcTimer:
    """Adds up the seconds in collections, also of one that runs."""

    def __init__(self) -> None:
        self._done = 0.0
        self._began = 0.0
        gc.callbacks.append(self._seen)

    # A look may find a thread here: see `stack.program`.
    def _seen(self, phase: str, info: Mapping[str, int]) -> None:
        if phase == "start":
            self._began = Clock.now()
        elif self._began:  # else: installed by a finaliser in the middle of a collection
            self._done += Clock.now() - self._began
            self._began = 0.0

    @property
    def seconds(self) -> float:
        began = self._began
        return self._done + (Clock.now() - began if began else 0.0)

    def close(self) -> None:
        if self._seen in gc.callbacks:
            gc.callbacks.remove(self._seen)


def _open_proc(native_id: int, name: str) -> int | None:
    # Kept open: a read then takes 0.7 µs instead of 5, and a thread's number that is used again is not mistaken.
    try:
        return os.open(f"/proc/self/task/{native_id}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, AttributeError):  # no /proc, forbidden; no O_CLOEXEC on Windows
        return None


def _pread(fd: int | None, patience: float) -> bytes | None:
    if fd is None:
        return None
    began = Clock.now()
    try:
        text = os.pread(fd, 256, 0)
    except OSError:  # the thread has ended, or reading is forbidden though opening was not
        text = None
    if Clock.now() - began > patience:
        raise Overtaken(began)
    return text


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _thread_cpu(native_id: int | None) -> float | None:
    """CPU seconds of any thread of this process."""
    # Linux makes the clock's number from the thread's (kernel, posix-timers.h: CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED), so
    # it can be read at any time; `time.pthread_getcpuclockid` reads the C library's memory of a thread, which is gone
    # when the thread is, and crashes then.
    if not native_id or _clock_gettime is None or not sys.platform.startswith("linux"):
        return None
    try:
        return _clock_gettime((~native_id << 3) | 6)
    except OSError:
        return None


def _asleep() -> float | None:
    if _clock_gettime is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    return _clock_gettime(time.CLOCK_BOOTTIME) - _clock_gettime(time.CLOCK_MONOTONIC)


def clocks_patched() -> bool:
    """Whether somebody replaced a clock of `time` since this was imported."""
    return any(getattr(time, name, None) is not clock for name, clock in _CLOCKS.items())


def _attached() -> bool:
    monitoring = getattr(sys, "monitoring", None)  # 3.12
    if monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None:
        return True
    return is_debugger(getattr(threading.gettrace(), "__module__", "") or "")


def traced(frame: FrameType | None, most: int = 50) -> bool:
    """Whether a debugger traces one of the innermost frames, because it steps there or has a breakpoint.

    Args:
        most: how many are looked at. Those outside of the loop should not be: a debugger that went on leaves its mark
            on the outermost frame for ever.
    """
    for _ in range(most):
        if frame is None:
            return False
        tracer = frame.f_trace
        if tracer is not None:
            owner: type[Any] = type(getattr(tracer, "__self__", tracer))
            if any(is_debugger(base.__module__) for base in owner.__mro__):
                return True
        frame = frame.f_back
    return False


def is_debugger(where: str) -> bool:
    """Whether a stack's file, or a module, is one of a debugger's."""
    if where in _STDLIB_DEBUGGER:
        return True
    parts = where.replace("\\", "/").replace(".", "/").split("/")
    return any(part.startswith(("pydevd", "_pydevd", "debugpy", "pudb")) for part in parts)


# By whole path: a user may well have a pdb.py, about proteins.
_STDLIB_DEBUGGER = {"bdb", "pdb", *(os.path.join(os.path.dirname(os.__file__), name) for name in ("bdb.py", "pdb.py"))}


# --- names of system calls -----------------------------------------------------------------------------------------

# name:number on x86_64:number on aarch64, those that can wait (Linux: syscall_64.tbl, asm-generic/unistd.h). First
# those whose first argument is a descriptor.
_WITH_DESCRIPTOR = """
read:0:63 write:1:64 pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66 preadv:295:69 pwritev:296:70 preadv2:327:286
pwritev2:328:287 lseek:8:62 close:3:57 fsync:74:82 fdatasync:75:83 sync_file_range:277:84 ftruncate:77:46
fallocate:285:47 flock:73:32 fcntl:72:25 ioctl:16:29 getdents64:217:61 sendfile:40:71 splice:275:76 tee:276:77
vmsplice:278:75 connect:42:203 accept:43:202 accept4:288:242 sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212
recvmmsg:299:243 sendmmsg:307:269 shutdown:48:210 fstat:5:80 syncfs:306:267 epoll_wait:232: epoll_pwait:281:22
epoll_pwait2:441:441 io_uring_enter:426:426 getdents:78:
"""
_OTHERS = """
open:2: openat:257:56 openat2:437:437 stat:4: lstat:6: newfstatat:262:79 statx:332:291 access:21: faccessat:269:48
unlink:87: unlinkat:263:35 rename:82: renameat:264:38 renameat2:316:276 mkdir:83: mkdirat:258:34 rmdir:84: link:86:
linkat:265:37 readlink:89: readlinkat:267:78 truncate:76:45 copy_file_range:326:285 sync:162:81 mount:165:40
umount2:166:39 poll:7: ppoll:271:73 select:23: pselect6:270:72 nanosleep:35:101 clock_nanosleep:230:115 futex:202:98
futex_waitv:449:449 futex_wait:455:455 wait4:61:260 waitid:247:95 pause:34: rt_sigtimedwait:128:137
rt_sigsuspend:130:133 sched_yield:24:124 mmap:9:222 munmap:11:215 mremap:25:216 msync:26:227 madvise:28:233
mlock:149:228 brk:12:214 io_getevents:208:4 semop:65:193 semtimedop:220:192 msgrcv:70:188 msgsnd:69:189
mq_timedsend:242:182 mq_timedreceive:243:183 restart_syscall:219:128 fork:57: vfork:58: clone:56:220 clone3:435:435
execve:59:221 getrandom:318:278
"""


def _names(machine: str) -> dict[int, tuple[str, bool]]:
    """Name of each system call by number, and whether its first argument is a descriptor; {} for other machines."""
    column = {"x86_64": 1, "AMD64": 1, "aarch64": 2, "arm64": 2}.get(machine)
    if column is None or not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return {}
    rows = [(row.split(":"), True) for row in _WITH_DESCRIPTOR.split()]
    rows += [(row.split(":"), False) for row in _OTHERS.split()]
    return {int(row[column]): (row[0], descriptor) for row, descriptor in rows if row[column]}


_NAMES = _names(platform.machine())
