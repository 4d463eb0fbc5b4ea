"""The cause of a stall, found by a small watchdog on real threads that really sleep, compute and wait.

The stalls take 150 to 300 ms, three and more thresholds; what they take is never the claim, only why.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import pdb
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.debug import clocks
from offload.debug.callee import called
from offload.debug.cause import Diagnosis, Sample, Window, classify
from offload.debug.clocks import Clock, Machine, Moment, Overtaken, Probe, Reading, clocks_patched, is_debugger, traced
from offload.debug.record import Cause, Frame, Verdict
from offload.debug.stack import program

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

THRESHOLD = 0.05
TICK = 0.025
FAST_TICK = 0.005


class Worker:
    """A thread that stands for a loop's: does one thing while it is watched, and notes when that began and ended."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.go = threading.Event()
        self.end = threading.Event()
        self.began = self.ended = 0.0
        self.thread = threading.Thread(target=self._run, name="worker")
        self.thread.start()

    def _run(self) -> None:
        self.go.wait()
        self.began = time.perf_counter()
        self.work()
        self.ended = time.perf_counter()
        self.end.wait()  # a loop's thread does not end with its stall


def observe(work: Callable[[], object], *, busy: bool = False) -> Diagnosis:
    """Why `work` takes so long; this thread is the watchdog, as in the detector.

    Other programs on this machine can starve it: then what was found says so, and it is tried again, unless it is meant
    to be `busy`.
    """
    for _ in range(8):
        window = watch(work)
        found = classify(window)
        print(f"{window.ended - window.began:.3f}", found)
        if busy or (found.numbers.runqueue or 0.0) < (window.ended - window.began) / 4:
            return found
    pytest.skip("other programs use all processors")


def watch(work: Callable[[], object]) -> Window:
    """What a small watchdog sees of `work`."""
    worker = Worker(work)
    ident, native = worker.thread.ident, worker.thread.native_id
    assert ident is not None
    assert native is not None
    machine, probe = Machine(), Probe(native, ident)
    readings: list[Reading] = []
    samples: list[Sample] = []
    late = 0.0
    ticks = 0
    try:
        while True:
            frames = current_frames()
            now = time.perf_counter()
            began, ended = worker.began, worker.ended
            top = frames.get(ident)
            frame = program(top) if top is not None else None
            others = {i: stack(f)[-1] for i, f in frames.items() if i not in (ident, threading.get_ident())}
            del frames
            readings.append(probe.read(machine.read(now, late)))
            if began:
                syscall = probe.syscall()
                call = called(frame.f_code, frame.f_lasti) if frame else None
                if worker.ended:
                    syscall = None
                samples.append(Sample(now, stack(frame), syscall, others, traced(frame), call, frame is not top))
            else:
                del readings[:-1]
            del frame, top
            if ended:
                return Window(worker.began, worker.ended, THRESHOLD, readings, samples, ident)
            ticks += 1
            if ticks == 2:
                worker.go.set()
            tick = FAST_TICK if began and now - began > THRESHOLD / 2 else TICK
            time.sleep(max(0.0, now + tick - time.perf_counter()))
            late = time.perf_counter() - now - tick
    finally:
        worker.go.set()
        worker.end.set()
        worker.thread.join()
        probe.close()
        machine.close()


def current_frames() -> dict[int, FrameType]:
    """As in the detector: CPython 3.11.0 to 3.11.11 wait for themselves if a collection begins in there (gh-106883)."""
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        gc.enable()


def innermost(frame: FrameType) -> Frame:
    return stack(frame)[-1]


def stack(frame: FrameType | None) -> tuple[Frame, ...]:
    found = []
    while frame is not None:
        found.append(Frame(frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_qualname))
        frame = frame.f_back
    return tuple(reversed(found))


# --- what one thread does to itself ----------------------------------------------------------------------------------

EVIL = re.compile(r"(a+)+$"), "a" * 23 + "b"


def parsing() -> Callable[[], object]:
    text = json.dumps([{"a": n} for n in range(400_000)])
    return lambda: json.loads(text)


def sorting() -> Callable[[], object]:
    numbers = [random.random() for _ in range(500_000)]
    return lambda: sorted(numbers)


def multiplying() -> Callable[[], object]:
    huge = 3**1_000_000
    return lambda: huge * huge


def compressing() -> Callable[[], object]:
    noise = random.Random(1).randbytes(6_000_000)
    return lambda: zlib.compress(noise, 9)


def compute(seconds: float = 0.15) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(50))


def generate() -> None:
    sum(i * i % 7 for i in range(2_500_000))


def write_durably() -> None:
    with tempfile.TemporaryFile(dir=Path(__file__).parent) as file:
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())


def receive() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(None)
        timer = threading.Timer(0.15, theirs.send, (b"x",))
        timer.start()
        ours.recv(1)
        timer.join()


def wait_for_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    timer = threading.Timer(0.15, lock.release)
    timer.start()
    with lock:
        timer.join()


def run_child(capture: bool) -> None:
    subprocess.run(["sleep", "0.15"], check=True, capture_output=capture)


# Each makes the work ready, so that this is not what is watched.
STALLS: dict[str, tuple[Callable[[], Callable[[], object]], Cause]] = {
    "loop in Python": (lambda: compute, Cause.PYTHON),
    "generator": (lambda: generate, Cause.PYTHON),
    "json, GIL held": (parsing, Cause.C),
    "sorted, GIL held": (sorting, Cause.C),
    "regex, GIL held": (lambda: match_evil, Cause.C),
    "operator, GIL held": (multiplying, Cause.C),
    "zlib, GIL released": (compressing, Cause.C),
    "time.sleep": (lambda: lambda: time.sleep(0.15), Cause.WAIT),
    "usleep, GIL released": (lambda: lambda: ctypes.CDLL(None).usleep(150_000), Cause.WAIT),
    "usleep, GIL held": (lambda: lambda: ctypes.PyDLL(None).usleep(150_000), Cause.WAIT),
    "child process": (lambda: lambda: run_child(False), Cause.WAIT),
    "child process, its output": (lambda: lambda: run_child(True), Cause.WAIT),
    "socket": (lambda: receive, Cause.WAIT),
    "fsync": (lambda: write_durably, Cause.WAIT),
    "lock": (lambda: wait_for_lock, Cause.LOCK),
    "event": (lambda: lambda: threading.Event().wait(0.15), Cause.LOCK),
}


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", STALLS)
def test_names_the_cause(name: str) -> None:
    """What a thread does to itself is told by its clocks, the kernel's word for its state, and who gets the GIL."""
    prepare, cause = STALLS[name]
    found = observe(prepare())
    assert found.cause is cause
    assert found.verdict is Verdict.FAIL


@linux
@pytest.mark.slow
def test_names_the_system_call_and_descriptor() -> None:
    """A wait comes with the system call's name, and its descriptor where it has one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(None)
        timer = threading.Timer(0.2, theirs.send, (b"x",))
        timer.start()
        found = classify(watch(lambda: ours.recv(1)))
        timer.join()
        assert found.syscall == f"recvfrom({ours.fileno()})"
    assert observe(lambda: time.sleep(0.15)).syscall == "clock_nanosleep"
    assert observe(lambda: run_child(False)).syscall == "wait4"
    assert observe(wait_for_lock).syscall == "futex"


@linux
@pytest.mark.slow
def test_numbers_say_where_the_time_went() -> None:
    """Of a wait followed by a computation both shares are given, within a tick or two."""

    def both() -> None:
        time.sleep(0.2)
        compute(0.1)

    found = observe(both)
    assert found.cause is Cause.WAIT
    assert found.numbers.cpu == pytest.approx(0.1, abs=0.05)
    assert found.numbers.wait == pytest.approx(0.2, abs=0.05)
    assert found.numbers.stopped == 0.0


# --- what other threads do to it -------------------------------------------------------------------------------------


@contextlib.contextmanager
def background(step: Callable[[], object], threads: int = 1) -> Iterator[None]:
    """Does `step` again and again on other threads."""
    ends = threading.Event()

    def again() -> None:
        while not ends.is_set():
            step()

    running = [threading.Thread(target=again) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in running:
            thread.join()


def match_evil() -> None:
    EVIL[0].match(EVIL[1])


def count() -> None:
    for _ in range(100_000):
        pass


def hold_gil_asleep() -> None:
    ctypes.PyDLL(None).usleep(200_000)


def let_others_run() -> None:
    """A few steps in Python, between which the GIL changes hands."""
    for _ in range(3):
        time.sleep(0)


@linux
@pytest.mark.slow
def test_gil_held_by_another_threads_regex() -> None:
    """A thread that waits for the GIL is not blamed; the line that held it is named."""
    with background(match_evil):
        found = observe(let_others_run)
    assert found.cause is Cause.GIL
    assert found.holder is not None
    assert found.holder.function == "match_evil"
    assert found.numbers.gil is not None
    assert found.numbers.gil > (found.numbers.cpu or 0.0)


@linux
@pytest.mark.slow
def test_gil_held_by_threads_that_compute_in_python() -> None:
    """Four threads that compute leave a fifth a fifth of the time: that is the GIL's doing, and a holder is named."""
    with background(count, 4):
        found = observe(lambda: compute(0.04))
    assert found.cause is Cause.GIL
    assert found.holder is not None
    assert found.holder.function in ("count", "background.<locals>.again")


@linux
@pytest.mark.slow
def test_gil_held_by_a_thread_that_sleeps() -> None:
    """Also a thread that holds the GIL without computing is told from a process that was stopped."""
    with background(hold_gil_asleep):
        found = observe(let_others_run)
    assert found.cause is Cause.GIL
    assert found.holder is not None
    assert found.holder.function == "hold_gil_asleep"


@linux
@pytest.mark.slow
def test_wait_is_a_wait_though_others_compute() -> None:
    """A thread that sleeps, or waits for a lock, does not want the GIL that others fight for."""
    with background(count, 2):
        for work, cause in ((lambda: time.sleep(0.2), Cause.WAIT), (wait_for_lock, Cause.LOCK)):
            assert observe(work).cause is cause


# --- what the machine and the interpreter do to it -------------------------------------------------------------------


@pytest.fixture
def large_heap() -> Iterator[None]:
    """Three million objects: a full collection takes 100 ms and more."""
    gc.disable()
    heap = [[n] for n in range(3_000_000)]
    gc.enable()
    yield
    heap.clear()
    gc.collect()


@linux
@pytest.mark.slow
@pytest.mark.usefixtures("large_heap")
def test_full_collection_is_the_collectors() -> None:
    """A pause of the garbage collector is not blamed on the line where it happened to begin."""
    found = observe(gc.collect)
    assert found.cause is Cause.GC
    assert found.numbers.gc is not None
    assert found.numbers.gc > 0.02


@linux
@pytest.mark.slow
@pytest.mark.usefixtures("large_heap")
def test_full_collection_is_guessed_before_collections_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the heap grew since it was last looked at, its size tells that a collection took the time."""
    monkeypatch.setattr(clocks, "GC_BLOCKS", 1 << 60)
    found = observe(gc.collect)
    assert found.numbers.gc is None
    assert found.cause is Cause.GC


def test_collector_is_left_alone_while_the_heap_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its callbacks cost every collection some time, so they are there for large heaps only, and gone after close."""
    before = list(gc.callbacks)
    monkeypatch.setattr(clocks, "GC_BLOCKS", 1 << 60)
    machine = Machine()
    assert machine.read(0.0, 0.0).gc is None
    assert gc.callbacks == before
    machine.close()
    monkeypatch.setattr(clocks, "GC_BLOCKS", 1)
    machine = Machine()
    timed = machine.read(0.0, 0.0).gc
    gc.collect()
    assert timed is not None
    assert (machine.read(0.0, 0.0).gc or 0.0) > timed
    assert len(gc.callbacks) == len(before) + 1
    machine.close()
    machine.close()
    assert gc.callbacks == before


@linux
@pytest.mark.slow
def test_starved_of_a_processor() -> None:
    """Code that is quick on its own is not blamed for programs that it shares a processor with."""
    cpu = min(os.sched_getaffinity(0))
    hog = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile True: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", hog, str(cpu)], stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for child in hogs:
            assert child.stdout is not None
            child.stdout.readline()

        def pinned() -> None:
            os.sched_setaffinity(0, {cpu})  # of this thread
            compute(0.04)

        found = observe(pinned, busy=True)
    finally:
        for child in hogs:
            child.kill()
            child.communicate()
    assert found.cause is Cause.DESCHEDULED
    assert found.verdict is Verdict.UNMEASURED


STOPPED = """
import os, signal, time
from {module} import compute, observe
def work():
    os.kill(os.getpid(), signal.SIGSTOP)
    {work}
found = observe(work, busy=True)
print(found.cause, found.verdict, found.numbers.stopped, flush=True)
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize("work", ["compute(0.1)", "time.sleep(0.1)"])
def test_process_that_was_stopped(work: str, tmp_path: Path) -> None:
    """A process that got SIGSTOP and, much later, SIGCONT is not blamed for the time in between."""
    root = Path(__file__).parent.parent.parent
    code = STOPPED.format(module="tests.debug.test_cause", work=work)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as child:
        assert child.stdout is not None
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        threading.Event().wait(0.6)  # the pause itself
        child.send_signal(signal.SIGCONT)
        lines = child.stdout.read().splitlines()
    cause, verdict, stopped = lines[-1].split()
    assert (cause, verdict) == ("stopped", "unmeasured")
    assert 0.3 < float(stopped) < 2.0


# --- what cannot be measured, or not trusted -------------------------------------------------------------------------


def reading(at: float, *, cpu: float | None = None, asleep: float | None = None, late: float = 0.0) -> Reading:
    return Reading(Moment(at, late, 0.0, asleep=asleep), cpu)


USER = Frame("app.py", 3, "handler")
LOOP = Frame("/usr/lib/python3.12/asyncio/base_events.py", 1, "BaseEventLoop._run_once")
PDB = Frame(pdb.__file__, 7, "Pdb.interaction")


def test_suspended_machine() -> None:
    """If the clock that also runs while the machine sleeps got ahead, that was it."""
    window = Window(1.0, 1.1, 0.05, [reading(0.9, cpu=0.0, asleep=5.0), reading(1.2, cpu=0.1, asleep=65.0)])
    assert classify(window)[0] is Cause.SUSPENDED
    assert classify(window).verdict is Verdict.UNMEASURED


def test_debugger_on_the_stack() -> None:
    """Who sits at a breakpoint is not told off; a program that was merely started by a debugger is."""

    def cause(*stack: Frame) -> Cause:
        readings = [reading(0.9, cpu=0.0), reading(1.2, cpu=0.0)]
        return classify(Window(1.0, 1.1, 0.05, readings, [Sample(1.05, stack)])).cause

    pydevd = Frame("/home/me/.vscode/ext/pydevd_bundle/pydevd.py", 7, "do_wait_suspend")
    assert cause(LOOP, USER, PDB) is Cause.DEBUGGER
    assert cause(LOOP, USER, pydevd) is Cause.DEBUGGER
    assert cause(USER, PDB) is Cause.DEBUGGER
    assert cause(PDB, LOOP, USER) is Cause.WAIT
    assert not is_debugger("/home/me/proteins/pdb.py")


def test_traced_by_a_debugger() -> None:
    """A frame that a debugger traces is known by its trace function; one that coverage traces is not meant."""

    class Tool(pdb.Pdb):
        pass

    def innocent(frame: FrameType, event: str, arg: object) -> None:
        pass

    frame = sys._getframe()
    before = frame.f_trace
    try:
        frame.f_trace = innocent
        assert not traced(frame)
        frame.f_trace = Tool(nosigint=True, readrc=False).trace_dispatch
        assert traced(frame)
    finally:
        frame.f_trace = before


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring")
def test_attached_debugger_makes_the_verdict_unmeasured() -> None:
    """While a debugger is attached, nobody knows how long the code would take without."""
    if sys.version_info >= (3, 12):
        machine = Machine()
        assert not machine.read(0.0, 0.0).attached
        sys.monitoring.use_tool_id(sys.monitoring.DEBUGGER_ID, "test")
        try:
            moment = machine.read(0.0, 0.0)
        finally:
            sys.monitoring.free_tool_id(sys.monitoring.DEBUGGER_ID)
            machine.close()
        assert moment.attached
        window = Window(1.0, 1.1, 0.05, [Reading(moment._replace(at=0.9), 0.0), reading(1.2, cpu=0.2)])
        assert classify(window).cause is Cause.PYTHON
        assert classify(window).verdict is Verdict.UNMEASURED


@pytest.mark.parametrize("name", ["monotonic", "perf_counter"])
def test_replaced_clock_makes_the_verdict_unmeasured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock frozen for a test the readings still tell the time, and the stall is not held against anybody."""
    machine = Machine()
    assert not clocks_patched()
    monkeypatch.setattr(time, name, lambda: 1.0)
    assert clocks_patched()
    moment = machine.read(0.9, 0.0)
    machine.close()
    window = Window(1.0, 1.1, 0.05, [Reading(moment, 0.0), reading(1.2, cpu=0.2)])
    assert classify(window).verdict is Verdict.UNMEASURED


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a call of its C library")
def test_who_is_kept_from_the_gil_while_it_reads_says_so() -> None:
    """A call in C that begins in the moment of a reading, and keeps the GIL: the caller hears when it is over."""
    usleep = ctypes.PyDLL(None).usleep
    done = threading.Event()

    def hogs() -> None:
        while not done.is_set():
            usleep(20_000)

    def reads() -> None:
        while True:
            machine.read(Clock.now(), 0.0, 0.01)

    machine = Machine()
    thread = threading.Thread(target=hogs)
    thread.start()
    try:
        with pytest.raises(Overtaken) as caught:
            reads()
        kept = Clock.now() - caught.value.since
        machine.read(Clock.now(), 0.0)
    finally:
        done.set()
        thread.join()
        machine.close()
    assert kept > 0.01


@pytest.mark.parametrize(
    ("tick", "late", "cause"),
    [
        (0.010, 0.005, Cause.PYTHON),  # asked for the GIL, and got it after a switch interval
        (0.005, 0.0001, Cause.C),  # nobody had it
        (0.120, 0.095, Cause.C),  # got it when the call was over
    ],
)
def test_lateness_of_the_watchdog_tells_what_computes(tick: float, late: float, cause: Cause) -> None:
    """A thread that computes is in Python if it gives up the GIL when asked, else in C, with the GIL or without."""
    readings = [
        Reading(Moment(1.0 + n * tick, late, n * tick, runqueue=0.0, slices=n * 50), n * tick, 0.0, n)
        for n in range(int(0.12 / tick) + 1)
    ]
    found = classify(Window(1.0, 1.12, 0.05, readings))
    assert found.cause is cause
    assert found.numbers.cpu == pytest.approx(0.12)


@pytest.mark.parametrize(
    ("slices", "others", "cause"),
    [
        (16, 0.005, Cause.DESCHEDULED),  # nobody ran who could have it, but the watchdog, which was not let run
        (16, 0.070, Cause.GIL),
        (2, 0.005, Cause.WAIT),
    ],
)
def test_gil_kept_by_a_watchdog_without_a_processor_is_the_machines_doing(
    slices: int, others: float, cause: Cause
) -> None:
    """A thread that wants it is not blamed for that; one that sleeps is, whatever the watchdog had to wait for."""
    readings = [
        Reading(Moment(1.0, 0.0, 0.0, 0.0, 0), 0.0, 0.0, 0),
        Reading(Moment(1.1, 0.078, 0.002 + others, 0.078, 3), 0.002, 0.015, slices),
    ]
    assert classify(Window(1.0, 1.1, 0.05, readings)).cause is cause


@pytest.mark.parametrize(("slices", "cause"), [(19, Cause.C), (3, Cause.PYTHON)])
def test_watchdog_without_a_processor_knows_by_how_often_it_asked_for_the_gil(slices: int, cause: Cause) -> None:
    """Code in Python gives it up at the first request, a call in C that holds it at none."""
    readings = [
        Reading(Moment(1.0, 0.0, 0.0, 0.0, 0), 0.0, 0.0, 0),
        Reading(Moment(1.12, 0.095, 0.12, 0.093, slices), 0.12, 0.0, 1),
    ]
    assert classify(Window(1.0, 1.12, 0.05, readings)).cause is cause


def test_wait_for_a_processor_is_counted_late() -> None:
    """The kernel adds a wait for a processor when it is over; until then it looks as if the thread slept."""
    readings = [
        Reading(Moment(1.0 + n / 100, 0.0, 0.0, runqueue=0.0), n / 500, 0.0 if n < 10 else 0.08, n) for n in range(11)
    ]
    found = classify(Window(1.0, 1.1, 0.05, readings))
    assert found.cause is Cause.DESCHEDULED
    assert found.numbers.runqueue == pytest.approx(0.08)
    assert found.numbers.wait == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("cpu", "runqueue", "cause"),
    [
        (0.077, 0.134, Cause.DESCHEDULED),  # alone it would have taken little over a threshold, if that
        (0.130, 0.163, Cause.PYTHON),  # it would have been a stall on any machine
        (0.045, 0.020, Cause.DESCHEDULED),
        (0.045, 0.009, Cause.PYTHON),  # too little to be told from chance
    ],
)
def test_own_computing_is_excused_by_a_starved_machine_up_to_twice_the_threshold(
    cpu: float, runqueue: float, cause: Cause
) -> None:
    """Who waits for processors computes slower, too; but not several thresholds' worth."""
    last = cpu + runqueue
    readings = [
        Reading(Moment(1.0 + n * last / 20, 0.005, n * cpu / 20, 0.0, n), n * cpu / 20, n * runqueue / 20, n)
        for n in range(21)
    ]
    found = classify(Window(1.0, 1.0 + last, 0.05, readings))
    assert found.cause is cause
    assert found.verdict is (Verdict.UNMEASURED if cause is Cause.DESCHEDULED else Verdict.FAIL)


@pytest.mark.parametrize(
    ("syscall", "last", "runqueue", "cause"),
    [
        ("", 1.06, 0.0, Cause.DESCHEDULED),  # it lasts: the kernel counts the wait for a processor when it is over
        ("", 1.12, 0.02, Cause.DESCHEDULED),
        ("", 1.12, 0.0, Cause.WAIT),  # on a quiet machine it was seen between two waits
        ("fsync(3)", 1.06, 0.0, Cause.WAIT),
        (None, 1.06, 0.0, Cause.WAIT),
    ],
)
def test_thread_that_is_ready_to_run_does_not_wait(
    syscall: str | None, last: float, runqueue: float, cause: Cause
) -> None:
    """Off the processors and in no system call, on a busy machine: it had none."""
    readings = [
        Reading(Moment(0.9, 0.0, 0.0, 0.0, 0), 0.0, 0.0, 0),
        Reading(Moment(last, 0.0, 0.002, 0.0, 4), 0.001, runqueue, 1),
    ]
    found = classify(Window(1.0, 1.06, 0.03, readings, [Sample(1.05, (USER,), syscall)]))
    assert (found.cause, found.syscall) == (cause, syscall or None)


def test_stall_of_which_less_than_half_was_measured_is_unmeasured() -> None:
    """Its cause is a guess then."""
    readings = [reading(0.9, cpu=0.0), reading(1.02, cpu=0.02)]
    assert classify(Window(1.0, 1.03, 0.02, readings)).verdict is Verdict.FAIL
    assert classify(Window(1.0, 1.1, 0.05, readings)).verdict is Verdict.UNMEASURED


def test_stall_of_which_nothing_was_measured_is_unmeasured() -> None:
    """It had begun before the first reading, and was over before the second."""
    for readings in ([], [reading(1.05, cpu=0.02)]):
        assert classify(Window(1.0, 1.06, 0.05, readings, [Sample(1.05, (USER,))])).verdict is Verdict.UNMEASURED


@pytest.mark.parametrize(
    ("runqueue", "stopped", "cause"), [(0.066, 0.069, Cause.STOPPED), (0.069, 0.066, Cause.DESCHEDULED)]
)
def test_two_excuses_that_only_together_are_one(runqueue: float, stopped: float, cause: Cause) -> None:
    """Without a processor for nearly half of it, and stopped for the other half: the program itself took 8 ms."""
    first, last = 1.008 + runqueue, 1.009 + runqueue + stopped
    readings = [
        Reading(Moment(1.0, 0.0, 0.0, 0.0, 0), 0.0, 0.0, 0),
        Reading(Moment(first, runqueue, 0.008, runqueue, 3), 0.008, runqueue, 3),
        Reading(Moment(last, stopped, 0.0085, runqueue, 4), 0.0085, runqueue, 4),
    ]
    found = classify(Window(1.0, last, 0.05, readings, [Sample(last, (USER,), "")]))
    assert (found.cause, found.verdict) == (cause, Verdict.UNMEASURED)


def test_collection_on_the_watchdogs_own_thread_is_no_stop() -> None:
    """The watchdog was late and did not ask for the GIL, but the process computed: nobody stopped it."""

    def cause(process: float) -> Cause:
        then, now = Moment(1.0, 0.0, 0.0, 0.0, 0), Moment(1.2, 0.19, process, 0.0, 2)
        return classify(Window(1.0, 1.2, 0.05, [Reading(then, 0.0, 0.0, 0), Reading(now, 0.0, 0.0, 1)])).cause

    assert cause(0.001) is Cause.STOPPED
    assert cause(0.19) is Cause.WAIT


def test_few_milliseconds_of_the_machine_are_no_excuse() -> None:
    """A stall just over the threshold is not excused by a clock's last digit."""
    window = Window(1.0, 1.0501, 0.05, [reading(0.9, cpu=0.0, asleep=1.0), reading(1.2, cpu=0.2, asleep=1.001)])
    assert classify(window).cause is Cause.PYTHON


def test_without_readings_nothing_is_claimed() -> None:
    """No reading, or a single one: the cause is unknown, and every number but the lateness is None."""
    for readings in ([], [reading(1.05, cpu=1.0)]):
        found = classify(Window(1.0, 1.1, 0.05, readings))
        assert found.cause is Cause.UNKNOWN
        assert (found.numbers.cpu, found.numbers.runqueue, found.numbers.gc) == (None, None, None)


@pytest.mark.parametrize(("process", "cause"), [(0.0, Cause.WAIT), (0.2, Cause.PYTHON)])
def test_without_clocks_of_threads_the_process_tells(process: float, cause: Cause) -> None:
    """Where only the process's CPU can be read, computing is still told from waiting."""
    readings = [Reading(Moment(0.9, 0.0, 0.0)), Reading(Moment(1.2, 0.0, process))]
    found = classify(Window(1.0, 1.2, 0.05, readings))
    assert found.cause is cause
    assert found.numbers.cpu is None


def test_thread_that_has_ended_reads_as_none() -> None:
    """A probe outlives its thread, and then tells nothing; never does it tell about another."""
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    assert thread.ident is not None
    while Path(f"/proc/self/task/{thread.native_id}").exists():  # the last steps after Python's
        time.sleep(0.001)
    machine, probe = Machine(), Probe(thread.native_id, thread.ident)
    found = probe.read(machine.read(1.0, 0.0))
    assert found[1:] == (None, None, None)
    assert probe.syscall() is None
    for _ in range(2):
        probe.close()
        machine.close()
    assert probe.read(machine.read(1.0, 0.0))[1:] == (None, None, None)


def test_forbidden_proc_degrades(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc is missing or forbidden, the other clocks are read all the same."""

    def forbidden(*args: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", forbidden)
    machine, probe = Machine(), Probe(threading.get_native_id(), threading.get_ident())
    found = probe.read(machine.read(1.0, 0.0))
    assert found.runqueue is None
    assert found.moment.slices is None
    assert probe.syscall() is None
    assert found.moment.process > 0.0
    machine.close()


def test_numbers_of_system_calls_are_used_once() -> None:
    """In each machine's column no number stands for two names."""
    for column in (1, 2):
        rows = [row.split(":") for row in (clocks._WITH_DESCRIPTOR + clocks._OTHERS).split()]
        numbers = [row[column] for row in rows if row[column]]
        assert len(numbers) == len(set(numbers)) > 80
    assert clocks._names("riscv64") == {}
    if sys.platform.startswith("linux"):
        assert clocks._names("aarch64")[82] == ("fsync", True)
        assert clocks._names("x86_64")[74] == ("fsync", True)


times = st.floats(0.0, 2.0)
maybe = st.none() | times
moments = st.builds(
    Moment,
    at=times,
    late=times,
    process=times,
    runqueue=maybe,
    slices=st.none() | st.integers(0, 1000),
    others=st.dictionaries(st.integers(1, 3), times, max_size=3),
    full=st.integers(0, 3),
    gc=maybe,
    blocks=st.integers(0, 10**8),
    asleep=maybe,
    attached=st.booleans(),
)
readings_lists = st.lists(st.builds(Reading, moments, maybe, maybe, st.none() | st.integers(0, 1000)), max_size=5)
samples_lists = st.lists(
    st.builds(
        Sample,
        times,
        st.lists(st.sampled_from([USER, LOOP, PDB]), max_size=3),
        st.none() | st.sampled_from(["futex", "fsync(7)"]),
        st.dictionaries(st.integers(1, 3), st.just(USER), max_size=3),
        call=st.none() | st.just("time.sleep"),
        collecting=st.booleans(),
    ),
    max_size=6,
)


@given(began=times, lasted=times, readings=readings_lists, samples=samples_lists)
def test_whatever_was_read_there_is_a_diagnosis(
    began: float, lasted: float, readings: list[Reading], samples: list[Sample]
) -> None:
    """Clocks that are missing, jump or disagree never raise; no share is negative or more than the stall's length."""
    readings.sort(key=lambda r: r.moment.at)
    samples.sort(key=lambda s: s.at)
    found = classify(Window(began, began + lasted, 0.05, readings, samples, 1))
    numbers = found.numbers
    shares = (numbers.cpu, numbers.runqueue, numbers.gc, numbers.gil, numbers.wait, numbers.stopped)
    for share in shares:
        assert share is None or (math.isfinite(share) and -1e-9 <= share <= lasted + 1e-9)
    assert found.verdict is Verdict.UNMEASURED or found.cause.by_code
