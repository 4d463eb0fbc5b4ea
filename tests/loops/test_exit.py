"""A program that leaves resources open, and how it ends: within its deadline, with its data on disk, and quietly.

Every program here is a real process under `-X dev -W error`; most run with asyncio's loop and with uvloop's as the main
loop. They open one of each (FileSink, PacketWriter, `offload.open`, Resource, Service, LogHandler), fill them, and do
not close them. Each end is a test: what was accepted is on disk, once and in order, the exit code is what it would be
without us, and stderr has what Python itself says of such an end, or nothing at all.

Not here, because nothing can hold there: `os._exit`, `kill -9` and a signal's default action end a process at once,
with what is on disk at that moment (for SIGTERM a test says that this is whole). Other places of the same promise:
`test_thread.py` (what runs and what is named on a single thread, an on_close that raises, forks at awkward moments),
`test_options.py` (Ctrl-C in each way to wait), `test_resource.py` (children of multiprocessing), for each kind of file
`tests/files/test_sink.py`, `test_sink_logs.py`, `test_packet_stream.py` and `test_aio.py`; for `kill -9` `tests/merge`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload import PacketReader

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="signals and forks as on Unix")]

DEADLINE = 40  # seconds, then the program is killed; what must end within half a second would otherwise take for ever
COUNT = 300

PRELUDE = '''\
import asyncio, atexit, contextlib, gc, logging, multiprocessing, os, signal, sqlite3, sys, threading
import offload

FOLDER, LOOP, COUNT = sys.argv[1], sys.argv[2], int(sys.argv[3])

def new_loop():
    if LOOP == "uvloop":
        import uvloop
        return uvloop.new_event_loop()
    return asyncio.new_event_loop()

def run(coroutine):
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(coroutine)

def default_exit_timeout(seconds):
    offload.LoopThread.__init__.__kwdefaults__["exit_timeout"] = seconds

def connect():
    db = sqlite3.connect(everything.folder + "/db")
    db.execute("create table t (n)")
    return db

def insert(db, n):
    db.execute("insert into t values (?)", (n,))

def end(db):
    db.commit()
    db.close()

class Port(offload.Service):
    def on_open(self):
        self.lines = []
    def on_close(self):
        with open(everything.folder + "/port", "w") as file:
            file.writelines(self.lines)
    @offload.method
    def put(self, n):
        self.lines.append(f"{n}\\n")

class Everything:
    """One resource of each kind."""

    async def open(self, folder=FOLDER):
        self.folder = folder
        self.handler = offload.LogHandler(folder + "/log")
        self.log = logging.getLogger("mine")
        self.log.setLevel("INFO")
        self.log.propagate = False
        self.log.addHandler(self.handler)
        self.sink = await offload.FileSink(folder + "/sink").start()
        self.packets = await offload.PacketWriter(folder + "/packets", fsync="none").start()
        self.resource = offload.Resource(connect, close=end, name="db")
        self.db = await self.resource.start()
        self.port = await Port().start()
        self.file = await offload.open(folder + "/file", "w")

    def put(self, n):
        """From a loop. No call is awaited."""
        self.log.info("%d", n)
        _ = self.sink.write(f"{n}\\n")
        _ = self.packets.write(f"{n}\\n", "a")
        self.db.call(insert, n)
        self.port.put(n)

    async def fill(self, first=0, last=COUNT):
        for n in range(first, last):
            self.put(n)
        await self.file.write("".join(f"{n}\\n" for n in range(first, last)))  # aiofiles' calls begin when awaited

    def put_from_thread(self, n):
        self.log.info("%d", n)
        self.sink.write(f"{n}\\n")
        self.packets.write(f"{n}\\n", "a")
        self.db.submit(insert, n)

    async def aclose(self):
        for each in self.sink, self.packets, self.resource, self.port, self.handler:
            await each.aclose()
        await self.file.close()

everything = Everything()

async def opened_and_filled():
    await everything.open()
    await everything.fill()

def ready():
    print("ready", flush=True)

blocking = threading.Event()

def block():
    ready()
    blocking.set()
    threading.Event().wait()  # for ever

'''

KINDS = ("db", "file", "log", "packets", "port", "sink")
THREADED = ("db", "log", "packets", "sink")  # that take something from plain threads


class Program:
    """A program with the prelude above, in a folder where its data goes."""

    def __init__(self, folder: Path, loop: str, deadline: float = DEADLINE) -> None:
        self.folder = folder
        self.loop = loop
        self.deadline = deadline
        self.process: subprocess.Popen[str] | None = None
        self.killer: threading.Timer | None = None

    def start(self, source: str, *flags: str) -> subprocess.Popen[str]:
        script = self.folder / "program.py"
        script.write_text(PRELUDE + textwrap.dedent(source))
        command = [sys.executable, "-X", "dev", "-W", "error", *flags, str(script)]
        self.process = subprocess.Popen(
            [*command, str(self.folder), self.loop, str(COUNT)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONASYNCIODEBUG"},
        )
        self.killer = threading.Timer(self.deadline, self.kill, (signal.SIGABRT,))  # faulthandler says where it stood
        self.killer.start()
        return self.process

    def wait_ready(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.end()

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """A signal, once it is ready and its main thread waits.

        Python notices one that comes just before a wait only behind it. So does asyncio, which
        has a wakeup descriptor only if it is given handlers of its own.
        """
        self.wait_ready()
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/status")
        before, now = [""], ["R"]
        while now[0] != "Z" and (now[0] != "S" or now != before):  # who waits for the GIL wakes every 5 ms
            threading.Event().wait(0.03)
            before, now = (
                now,
                re.findall(r"^(?:State|\w*voluntary_ctxt_switches):\s+(\w+)", status.read_text(), re.MULTILINE),
            )
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr without asyncio's measurements: a busy machine is slow."""
        assert self.process is not None
        out, err = self.process.communicate()
        self.stop()
        lines = [line for line in err.splitlines(keepends=True) if not line.startswith("Executing <")]
        return self.process.returncode, out, "".join(lines)

    def stop(self) -> None:
        """Leave no process behind, whatever the test has come to."""
        if self.process is not None and self.killer is not None:
            self.killer.cancel()
            self.killer.join()
            with self.process:  # closes the pipes
                self.kill()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """The program and its children."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def run(self, source: str, *flags: str) -> tuple[int, str, str]:
        self.start(source, *flags)
        return self.end()


@pytest.fixture(name="program", params=["asyncio", "uvloop"])
def new_program(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Program]:
    if request.param == "uvloop":
        pytest.importorskip("uvloop", reason="uvloop is not installed")
    program = Program(tmp_path, request.param, DEADLINE)
    yield program
    program.stop()


@pytest.fixture(name="asyncio_program")
def new_asyncio_program(tmp_path: Path) -> Iterator[Program]:
    """For what has nothing to do with the main loop."""
    program = Program(tmp_path, "asyncio", DEADLINE)
    yield program
    program.stop()


def numbers(text: str) -> list[int]:
    return [int(line) for line in text.splitlines()]


def packet_lines(path: Path) -> str:
    async def read() -> bytes:
        async with PacketReader(path) as reader:  # raises for a torn tail
            return b"".join([b"".join(frame.packets()) async for frame in reader])

    return asyncio.run(read()).decode()


def rows(path: Path) -> str:
    db = sqlite3.connect(path)
    try:
        return "".join(f"{n}\n" for (n,) in db.execute("select n from t order by rowid"))
    finally:
        db.close()


READ: dict[str, Callable[[Path], str]] = {"db": rows, "packets": packet_lines}


def on_disk(folder: Path, kinds: tuple[str, ...] = KINDS) -> dict[str, list[int]]:
    """What each kind of resource has kept, in the order in which it stands there."""
    return {kind: numbers(READ.get(kind, Path.read_text)(folder / kind)) for kind in kinds}


def all_of_it(count: int = COUNT, kinds: tuple[str, ...] = KINDS) -> dict[str, list[int]]:
    return {kind: list(range(count)) for kind in kinds}


OURS = re.compile(
    r"Warning|ignored in|never retrieved|was destroyed|never awaited|Ctrl-C|program's end|[Ff]atal|OffloadError"
)


def complaints(stderr: str) -> list[str]:
    """What in a traceback that Python prints anyway does not belong there."""
    return [line for line in stderr.splitlines() if OURS.search(line)]


def last_line(stderr: str) -> str:
    return stderr.splitlines()[-1] if stderr else ""


# --- the program ends by itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "code"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(3)", 3), ("raise SystemExit", 0)],
)
def test_end_of_the_program_writes_what_was_accepted(program: Program, end: str, code: int) -> None:
    """However the main coroutine ends the program, everything that was accepted is on disk, and nothing is said."""
    done = program.run(f"""
        async def main():
            await opened_and_filled()
            {end}
        run(main())
    """)
    assert done == (code, "", "")
    assert on_disk(program.folder) == all_of_it()


@pytest.mark.parametrize("where", ["main coroutine", "main program", "task"])
def test_uncaught_exception_costs_no_data_and_is_all_that_is_said(program: Program, where: str) -> None:
    """An error that nobody catches is printed once, by Python or by asyncio; what was accepted is on disk."""
    code, out, err = program.run(
        {
            "main coroutine": """
                async def main():
                    await opened_and_filled()
                    1 / 0
                run(main())
            """,
            "main program": """
                run(opened_and_filled())
                1 / 0
            """,
            "task": """
                async def fail():
                    1 / 0
                async def main():
                    await opened_and_filled()
                    await asyncio.wait([asyncio.create_task(fail())])
                run(main())
            """,
        }[where]
    )
    assert (code, out) == (0 if where == "task" else 1, "")
    assert err.count("Traceback") == 1
    assert last_line(err) == "ZeroDivisionError: division by zero"
    assert [line for line in complaints(err) if line != "Task exception was never retrieved"] == []
    assert on_disk(program.folder) == all_of_it()


def test_sys_exit_in_a_task_ends_the_program(program: Program) -> None:
    """sys.exit in a task ends a program whose main coroutine waits for ever, with its code and all data on disk."""
    code, out, err = program.run("""
        async def leave():
            await everything.fill()
            sys.exit(3)
        async def main():
            await everything.open()
            task = asyncio.create_task(leave())
            await asyncio.Event().wait()
        run(main())
    """)
    # asyncio reports the task's SystemExit, which it has raised as well: that is its custom, not ours.
    assert (code, out, err.count("Traceback")) in [(3, "", 0), (3, "", 1)]
    assert [line for line in complaints(err) if line != "Task exception was never retrieved"] == []
    assert on_disk(program.folder) == all_of_it()


@pytest.mark.parametrize("end", ["sys.exit(3)", "raise LookupError('in a thread')"])
def test_end_of_a_plain_thread_is_not_the_end_of_its_resources(program: Program, end: str) -> None:
    """A thread that leaves by sys.exit or an error ends alone; what it and the main loop wrote is on disk."""
    code, out, err = program.run(f"""
        def work():
            for n in range(COUNT):
                everything.put_from_thread(n)
            {end}
        async def main():
            await everything.open()
            thread = threading.Thread(target=work)
            thread.start()
            async with offload.LoopThread("joins") as joins:
                await joins.call(thread.join)
        run(main())
    """)
    assert (code, out) == (0, "")
    assert last_line(err) == ("" if "sys" in end else "LookupError: in a thread")
    assert complaints(err) == []
    assert on_disk(program.folder, THREADED) == all_of_it(kinds=THREADED)


def test_calls_that_nobody_awaited_run_though_their_loop_is_gone(program: Program) -> None:
    """asyncio.run ends while every thread still has all calls in its queue; they run, and nobody complains."""
    done = program.run("""
        async def main():
            await everything.open()
            await everything.file.write("".join(f"{n}\\n" for n in range(COUNT)))
            threads = [everything.sink._thread, everything.packets._thread, everything.handler._sink._thread]
            for thread in [*threads, everything.resource._thread, everything.port._thread]:
                thread.post(gate.wait)
            for n in range(COUNT):
                everything.put(n)
        gate = threading.Event()
        run(main())
        gc.collect()
        atexit.register(gate.set)
    """)
    assert done == (0, "", "")
    assert on_disk(program.folder) == all_of_it()


def test_tasks_cancelled_at_the_end_of_the_loop_lose_nothing(program: Program) -> None:
    """Tasks that asyncio.run cancels while they wait for their calls: calls that ran are on disk, in one piece."""
    done = program.run("""
        async def work():
            for n in range(COUNT):
                everything.put(n)
            await everything.file.write("".join(f"{n}\\n" for n in range(COUNT)))
            filled.set()
            while True:
                await everything.sink.flush()
                await everything.db.call(lambda db: None)
        async def main():
            global filled
            filled = asyncio.Event()
            await everything.open()
            tasks = [asyncio.create_task(work())]
            await filled.wait()
        run(main())
    """)
    assert done == (0, "", "")
    assert on_disk(program.folder) == all_of_it()


@pytest.mark.parametrize("how", ["main is cancelled", "sys.exit in a task", "error in a task group"])
def test_block_that_is_left_by_cancellation_closes_before_the_loop_ends(program: Program, how: str) -> None:
    """Cancelled inside `async with`, every resource is closed, with its data, before asyncio.run returns."""
    cancel, code = {
        "main is cancelled": ("task.cancel()", 1),
        "sys.exit in a task": ("sys.exit(3)", 3),
        "error in a task group": ("1 / 0", 1),
    }[how]
    status, out, err = program.run(f"""
        async def end_it(task):
            {cancel}
        async def main():
            await everything.open()
            async with contextlib.aclosing(everything):
                await everything.fill()
                async with asyncio.TaskGroup() as group:
                    group.create_task(end_it(asyncio.current_task()))
                    await asyncio.Event().wait()
        try:
            run(main())
        finally:
            print(everything.resource.closed, everything.port.closed, everything.sink._thread.closed)
            print([thread.name for thread in threading.enumerate()])
    """)
    assert (status, out.splitlines()) == (code, ["True True True", "['MainThread']"])
    assert [line for line in complaints(err) if line != "Task exception was never retrieved"] == []
    assert on_disk(program.folder) == all_of_it()


def test_atexit_function_that_was_registered_later_still_writes(program: Program) -> None:
    """A function that the user registers after importing us runs before our drain, so it may use every resource."""
    done = program.run("""
        def late():
            for n in range(COUNT - 100, COUNT):
                everything.put_from_thread(n)
            everything.sink.close()  # and closing there is allowed
        atexit.register(late)
        async def main():
            await everything.open()
            await everything.fill(0, COUNT - 100)
        run(main())
    """)
    assert done == (0, "", "")
    assert on_disk(program.folder, THREADED) == all_of_it(kinds=THREADED)
    assert on_disk(program.folder, ("file", "port")) == all_of_it(COUNT - 100, ("file", "port"))


def test_atexit_function_that_runs_after_our_end_is_told_so(program: Program) -> None:
    """What runs after our drain gets ClosedResourceError from all but the log, which still appends; nothing hangs."""
    done = program.run("""
        def too_late():
            for use in (
                lambda: everything.sink.write("lost"),
                lambda: everything.sink.submit_flush(),
                lambda: everything.packets.write("lost", "a"),
                lambda: everything.db.submit(insert, -1),
                lambda: offload.LoopThread("new").submit(int),
            ):
                try:
                    use()
                except offload.ClosedResourceError:
                    print("told")
            everything.sink.close()
            everything.resource.close()
            everything.log.info("%d", COUNT)
        atexit._clear()  # as if this function had been registered before offload was imported
        atexit.register(too_late)
        from offload.loops import thread
        atexit.register(thread._drain_at_exit)
        atexit.register(logging.shutdown)
        run(opened_and_filled())
    """)
    assert done == (0, "told\n" * 5, "")
    log = on_disk(program.folder).pop("log")
    assert log == list(range(COUNT + 1))
    assert {**on_disk(program.folder), "log": log[:COUNT]} == all_of_it()


# --- threads that go on when the main program has ended ---------------------------------------------------------------


def test_thread_that_works_on_after_the_main_program_loses_nothing(program: Program) -> None:
    """An ordinary thread may go on writing when the main program has ended: Python waits for it, then we drain."""
    done = program.run("""
        def work():
            threading.main_thread().join()
            for n in range(COUNT):
                everything.put_from_thread(n)
            everything.sink.submit_flush().result()
            everything.db.submit(lambda db: db.commit()).result()
        run(everything.open())
        threading.Thread(target=work).start()
    """)
    assert done == (0, "", "")
    assert on_disk(program.folder, THREADED) == all_of_it(kinds=THREADED)


def test_daemon_thread_is_refused_at_the_end_and_has_what_was_accepted(program: Program) -> None:
    """A daemon thread that never stops writing is refused when the program ends; all that was accepted is on disk."""
    code, out, err = program.run("""
        def work():
            n = 0
            with contextlib.suppress(offload.ClosedResourceError):
                while True:
                    everything.sink.write(f"{n}\\n")
                    os.write(accepted, b"%d\\n" % n)
                    n += 1
                    if n == COUNT:
                        enough.set()
            os.write(accepted, b"refused\\n")
            refused.set()
            threading.Event().wait()
        accepted = os.open(FOLDER + "/accepted", os.O_WRONLY | os.O_CREAT)
        enough, refused = threading.Event(), threading.Event()
        run(everything.open())
        threading.Thread(target=work, daemon=True).start()
        enough.wait()
        # When the interpreter ends, daemons stop wherever they are: wait until this one has been told.
        from offload.loops import thread
        atexit._clear()
        atexit.register(refused.wait)
        atexit.register(thread._drain_at_exit)
    """)
    assert (code, out, err) == (0, "", "")
    *accepted, refused = (program.folder / "accepted").read_text().split()
    assert refused == "refused"
    assert len(accepted) >= COUNT
    assert (program.folder / "sink").read_text().split() == accepted


def test_daemon_thread_that_waits_for_room_does_not_keep_the_program(program: Program) -> None:
    """Daemon threads that stand in `result()`, `write` and `close` when the program ends do not keep it from ending."""
    code, out, err = program.run("""
        def wait_for_ever():
            everything.db.submit(block).result()
        def close():
            closing.set()
            stuck.close()
        closing = threading.Event()
        run(opened_and_filled())
        stuck = offload.LoopThread("stuck", exit_timeout=0.3).__enter__()
        stuck.submit(block)
        waiting = offload.LoopThread("waiting", exit_timeout=0.3).__enter__()
        threading.Thread(target=waiting.submit(threading.Event().wait).result, daemon=True).start()
        threading.Thread(target=close, daemon=True).start()
        closing.wait()
        blocking.wait()
    """)
    assert (code, out) == (0, "ready\n")
    assert err.count("still works 0.3 s after the program's end") == 2
    assert on_disk(program.folder) == all_of_it()


@pytest.mark.parametrize("daemon", [False, True])
def test_resource_of_a_loop_in_another_thread_is_drained(program: Program, daemon: bool) -> None:
    """Left open by a loop in another thread that has ended, or, in a daemon thread, runs on: all data is on disk."""
    done = program.run(f"""
        async def main():
            await opened_and_filled()
            filled.set()
            if {daemon}:
                await asyncio.Event().wait()
        filled = threading.Event()
        threading.Thread(target=lambda: run(main()), daemon={daemon}).start()
        filled.wait()
    """)
    assert done == (0, "", "")
    assert on_disk(program.folder) == all_of_it()


# --- signals ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_with_idle_resources_ends_quietly(program: Program) -> None:
    """One SIGINT ends a program that left everything open as it ends any other: a KeyboardInterrupt, and all data."""
    program.start("""
        async def main():
            await opened_and_filled()
            ready()
            await asyncio.Event().wait()
        run(main())
    """)
    program.interrupt()
    code, out, err = program.end()
    assert (code, out, last_line(err)) == (-signal.SIGINT, "", "KeyboardInterrupt")
    assert complaints(err) == []
    assert on_disk(program.folder) == all_of_it()


def test_ctrl_c_inside_async_with_closes_and_writes(program: Program) -> None:
    """One SIGINT inside `async with` closes every resource with its data, before asyncio.run has returned."""
    program.start("""
        async def main():
            await everything.open()
            async with contextlib.aclosing(everything):
                await everything.fill()
                ready()
                await asyncio.Event().wait()
        try:
            run(main())
        finally:
            print([thread.name for thread in threading.enumerate()])
    """)
    program.interrupt()
    code, out, err = program.end()
    assert (code, out, last_line(err)) == (-signal.SIGINT, "['MainThread']\n", "KeyboardInterrupt")
    assert complaints(err) == []
    assert on_disk(program.folder) == all_of_it()


def test_ctrl_c_with_a_query_that_can_be_interrupted_ends_quietly(program: Program) -> None:
    """One SIGINT interrupts the query that runs; nothing has to be left behind, so nothing is said of it."""
    program.start("""
        ENDLESS = "with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from n"
        def query(db):
            ready()
            return db.execute(ENDLESS).fetchall()
        async def main():
            await opened_and_filled()
            memory = lambda: sqlite3.connect(":memory:", check_same_thread=False)
            async with offload.Resource(memory, interrupt=sqlite3.Connection.interrupt) as db:
                await db.call(query)
        run(main())
    """)
    program.interrupt()
    code, out, err = program.end()
    assert (code, out, last_line(err)) == (-signal.SIGINT, "", "KeyboardInterrupt")
    assert complaints(err) == []
    assert on_disk(program.folder) == all_of_it()


WAYS_TO_BLOCK = {
    "in a block": """
        async with offload.LoopThread("stuck", exit_timeout=0.5) as stuck:
            await stuck.call(block)
    """,
    "left open": """
        stuck = await offload.LoopThread("stuck", exit_timeout=0.5).start()
        await stuck.call(block)
    """,
    "in an exclusive span": """
        async with offload.Resource(threading.Event, name="stuck", exit_timeout=0.5) as stuck:
            async with stuck.exclusive() as span:
                await span.call(lambda event: block())
    """,
    "in a task group": """
        async with offload.LoopThread("stuck", exit_timeout=0.5) as stuck, asyncio.TaskGroup() as group:
            group.create_task(asyncio.wait_for(stuck.call(block), None))
    """,
    "in a service": """
        class Stuck(offload.Service):
            thread_name, exit_timeout = "stuck", 0.5
            @offload.method
            def use(self):
                block()
        async with Stuck() as stuck:
            await stuck.use()
    """,
    "in its factory": """
        async with offload.Resource(block, name="stuck", exit_timeout=0.5):
            pass
    """,
    "in on_close": """
        async with offload.LoopThread("stuck", on_close=block, exit_timeout=0.5):
            pass
    """,
    "in an iteration": """
        async with offload.Resource(threading.Event, name="stuck", exit_timeout=0.5) as stuck:
            async for item in stuck.iter(lambda event: block()):
                pass
    """,
    "in a task beside": """
        async def beside():
            async with offload.LoopThread("stuck", exit_timeout=0.5) as stuck:
                await stuck.call(block)
        task = asyncio.create_task(beside())
        await asyncio.Event().wait()
    """,
}
BOTH_LOOPS = ("in a block", "left open", "in a task group", "in a task beside")


def main_that_blocks(way: str, before: str = "") -> str:
    lines = [before, *WAYS_TO_BLOCK[way].splitlines()]
    body = textwrap.indent(textwrap.dedent("\n".join(line for line in lines if line.strip())), "    ")
    return f"async def main():\n    await opened_and_filled()\n{body}\nrun(main())\n"


def check_that_ctrl_c_ends(program: Program, way: str) -> None:
    program.start(main_that_blocks(way))
    program.interrupt()
    code, out, err = program.end()
    assert (code, out) == (-signal.SIGINT, "")
    assert "KeyboardInterrupt" in err
    assert "'stuck' still works 0.5 s after" in err
    assert "in block\n    threading.Event().wait()  # for ever" in err
    assert on_disk(program.folder) == all_of_it()


def test_ctrl_c_waits_once_for_a_blocked_resource_that_is_left_open(asyncio_program: Program) -> None:
    """What the caller has waited since Ctrl-C, the end of the program does not wait again."""
    asyncio_program.start("""
        async def main():
            stuck = await offload.LoopThread("stuck", exit_timeout=DEADLINE).start()
            await stuck.call(block)
        import offload.loops.mailbox
        DEADLINE = 1.0
        real = offload.loops.mailbox.Mailbox.left_of_patience
        def left(mailbox):
            print("left", real(mailbox), flush=True)
            return real(mailbox)
        offload.loops.mailbox.Mailbox.left_of_patience = left
        run(main())
    """)
    asyncio_program.interrupt()
    code, out, err = asyncio_program.end()
    assert (code, out) == (-signal.SIGINT, "left 0.0\n")
    assert "'stuck' still works 1.0 s after Ctrl-C" in err


def test_sys_exit_in_a_task_with_a_blocked_resource_ends(asyncio_program: Program) -> None:
    """`sys.exit` in a callback ends the program as at its end, though a block waits for a call that never ends."""
    asyncio_program.start("""
        async def main():
            async with offload.LoopThread("stuck", exit_timeout=0.5) as stuck:
                call = stuck.call(block)
                blocking.wait()
                asyncio.get_running_loop().call_soon(sys.exit, 3)
                await asyncio.Event().wait()
        run(main())
    """)
    asyncio_program.wait_ready()
    code, out, err = asyncio_program.end()
    assert (code, out) == (3, "")
    assert "'stuck' still works 0.5 s after" in err


@pytest.mark.parametrize("way", BOTH_LOOPS)
def test_ctrl_c_with_a_blocked_resource_ends_and_says_what_blocks(program: Program, way: str) -> None:
    """One SIGINT ends the program within exit_timeout; the resource, its call and the line that blocks are named."""
    check_that_ctrl_c_ends(program, way)


@pytest.mark.parametrize(
    "way",
    [way for way in WAYS_TO_BLOCK if way not in BOTH_LOOPS],
)
def test_ctrl_c_ends_it_wherever_it_blocks(asyncio_program: Program, way: str) -> None:
    """One SIGINT is enough as well for a resource that blocks as it opens or closes, in a span, a service, a task."""
    check_that_ctrl_c_ends(asyncio_program, way)


def test_ctrl_c_with_a_blocked_file_on_a_shared_thread_is_a_keyboard_interrupt(asyncio_program: Program) -> None:
    """A file of offload.open on a thread given as executor= that blocks does not make an error of the interrupt."""
    fifo = asyncio_program.folder / "fifo"
    os.mkfifo(fifo)
    writer = os.open(fifo, os.O_RDWR)
    try:
        asyncio_program.start("""
            async def main():
                async with offload.LoopThread("shared", exit_timeout=0.5) as shared:
                    async with offload.open(FOLDER + "/fifo", executor=shared) as file:
                        reading = asyncio.ensure_future(file.read())
                        while not (shared.stats().running or "").endswith("read"):
                            await asyncio.sleep(0)
                        ready()
                        await reading
            run(main())
        """)
        asyncio_program.interrupt()
        code, out, err = asyncio_program.end()
    finally:
        os.close(writer)
    assert "'shared' still works 0.5 s after Ctrl-C" in err
    assert "KeyboardInterrupt" in err
    assert (code, out) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    "way",
    [
        "in a block",
        "left open",
    ],
)
def test_second_ctrl_c_does_not_make_it_wait_longer(program: Program, way: str) -> None:
    """Who presses Ctrl-C again waits no longer than exit_timeout either, and need not press a third time."""
    before = "        watching = asyncio.create_task(watch(asyncio.current_task()))"
    process = program.start(
        textwrap.dedent("""
            async def watch(task):
                while not task.cancelling():
                    await asyncio.sleep(0.01)
                ready()
        """)
        + main_that_blocks(way, before)
    )
    for _ in range(2):
        program.wait_ready()
        process.send_signal(signal.SIGINT)
    code, out, err = program.end()
    assert (code, out) == (-signal.SIGINT, "")
    assert "KeyboardInterrupt" in err
    assert "in block\n" in err
    assert on_disk(program.folder) == all_of_it()


def test_ctrl_c_while_the_program_drains_ends_it(asyncio_program: Program) -> None:
    """Ctrl-C during the drain at the end does not wait for the blocked resource; the others' data is on disk."""
    asyncio_program.start("""
        def block_the_drain():
            stuck.closing.wait()
            while set(threading.enumerate()) - {threading.main_thread(), threading.current_thread()}:
                threading.Event().wait(0.001)  # the others are drained
            block()
        run(opened_and_filled())
        stuck = offload.LoopThread("stuck", exit_timeout=600).__enter__()
        stuck.post(block_the_drain)
    """)
    asyncio_program.interrupt()
    code, out, err = asyncio_program.end()
    assert (code, out) == (0, "")
    assert "KeyboardInterrupt" in err
    assert on_disk(asyncio_program.folder) == all_of_it()


def test_ctrl_c_while_the_program_drains_leaves_others_the_time_they_need(asyncio_program: Program) -> None:
    """What another resource has accepted, and still works on when Ctrl-C ends the wait for the blocked one, is kept."""
    asyncio_program.start("""
        asked_again = threading.Event()

        def ask_again(*_):
            asked_again.set()
            raise KeyboardInterrupt

        def write():
            asked_again.wait()
            threading.Event().wait(0.1)
            with open(FOLDER + "/late", "w") as file:
                file.write("written")

        def block_the_drain():
            stuck.closing.wait()
            block()

        signal.signal(signal.SIGINT, ask_again)
        healthy = [offload.LoopThread(f"healthy {n}").__enter__() for n in range(3)]
        healthy[1].submit(write)
        stuck = offload.LoopThread("stuck", exit_timeout=600).__enter__()
        stuck.post(block_the_drain)
    """)
    asyncio_program.interrupt()
    code, out, err = asyncio_program.end()
    assert (code, out) == (0, "")
    assert "KeyboardInterrupt" in err
    assert "'stuck' still works 1.0 s after Ctrl-C" in err
    assert "healthy" not in err
    assert (asyncio_program.folder / "late").read_text() == "written"


def test_ctrl_c_in_a_plain_program_with_a_blocked_resource_ends_it(asyncio_program: Program) -> None:
    """Without any loop, too: one SIGINT in a `with` whose call blocks ends the program, and says what blocks."""
    asyncio_program.start("""
        run(opened_and_filled())
        with offload.LoopThread("stuck", exit_timeout=0.5) as stuck:
            stuck.submit(block).result()
    """)
    asyncio_program.interrupt()
    code, out, err = asyncio_program.end()
    assert (code, out) == (-signal.SIGINT, "")
    assert "KeyboardInterrupt" in err
    assert "'stuck' still works 0.5 s after" in err
    assert on_disk(asyncio_program.folder) == all_of_it()


def test_ctrl_c_while_a_plain_thread_closes_loses_nothing(asyncio_program: Program) -> None:
    """SIGINT that interrupts `close()` does not interrupt the drain: what is queued still runs at the end."""
    asyncio_program.start("""
        def take_a_while(db):
            everything.resource._thread.closing.wait()
            threading.Event().wait(0.1)  # now `close` waits
            ready()
            interrupted.wait()
            threading.Event().wait(0.2)  # now the drain does
        interrupted = threading.Event()
        try:
            run(everything.open())
            everything.db.submit(take_a_while)
            for n in range(COUNT):
                everything.put_from_thread(n)
            everything.resource.close()
        except KeyboardInterrupt:
            interrupted.set()
    """)
    asyncio_program.interrupt()
    assert asyncio_program.end() == (0, "", "")
    assert on_disk(asyncio_program.folder, THREADED) == all_of_it(kinds=THREADED)


def test_ctrl_c_that_the_program_handles_itself(program: Program) -> None:
    """A loop's own handler for SIGINT and SIGTERM that ends the main coroutine: exit code 0, all data, nothing said."""
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = program.folder / number.name
        folder.mkdir()
        each = Program(folder, program.loop)
        process = each.start("""
            async def main():
                stop = asyncio.Event()
                for number in signal.SIGINT, signal.SIGTERM:
                    asyncio.get_running_loop().add_signal_handler(number, stop.set)
                await everything.open()
                async with contextlib.aclosing(everything):
                    await everything.fill()
                    ready()
                    await stop.wait()
            run(main())
        """)
        with process:
            each.wait_ready()
            process.send_signal(number)
            assert each.end() == (0, "", "")
        assert on_disk(folder) == all_of_it()


def test_sigterm_handler_that_leaves_everything_open(program: Program) -> None:
    """A handler for SIGTERM that raises SystemExit is an end like any other."""
    program.start("""
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        async def main():
            await opened_and_filled()
            ready()
            await asyncio.Event().wait()
        run(main())
    """)
    program.interrupt(signal.SIGTERM)
    assert program.end() == (128 + signal.SIGTERM, "", "")
    assert on_disk(program.folder) == all_of_it()


def test_sigterm_without_a_handler_leaves_whole_files(program: Program) -> None:
    """The default action ends the process there and then: what was flushed is on disk, and every file is whole."""
    process = program.start("""
        async def main():
            await opened_and_filled()
            await everything.sink.flush()
            await everything.packets.flush()
            await everything.handler.aflush()
            await everything.file.flush()
            await everything.db.call(lambda db: db.commit())
            ready()
            await asyncio.Event().wait()
        run(main())
    """)
    program.wait_ready()
    process.send_signal(signal.SIGTERM)
    assert program.end() == (-signal.SIGTERM, "", "")
    kinds = ("db", "file", "log", "packets", "sink")
    assert on_disk(program.folder, kinds) == all_of_it(kinds=kinds)


# --- blocked at the end -----------------------------------------------------------------------------------------------


def test_blocked_resource_at_the_end_is_named_and_the_others_have_their_data(asyncio_program: Program) -> None:
    """One resource that never returns: the program ends all the same, says where it stands, and loses nothing else."""
    code, out, err = asyncio_program.run("""
        async def main():
            await opened_and_filled()
            stuck = await offload.Resource(threading.Event, name="stuck", exit_timeout=0.3).start()
            for _ in range(3):
                stuck.call(lambda event: block())
        run(main())
        blocking.wait()
    """)
    assert (code, out) == (0, "ready\n")
    assert "'stuck' still works 0.3 s after the program's end" in err
    assert "2 calls behind main.<locals>.<lambda>" in err
    assert "in block\n    threading.Event().wait()  # for ever" in err
    assert err.count("program's end") == 1
    assert on_disk(asyncio_program.folder) == all_of_it()


def test_file_that_takes_nothing_more_is_named_at_the_end(asyncio_program: Program) -> None:
    """A sink into a pipe that nobody reads: the program ends, names it, and the other resources have their data."""
    fifo = asyncio_program.folder / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        code, out, err = asyncio_program.run("""
            async def main():
                global stuck
                await opened_and_filled()
                stuck = await offload.FileSink(FOLDER + "/fifo", exit_timeout=0.5).start()
                _ = stuck.write(bytes(1 << 20))
            run(main())
        """)
    finally:
        os.close(reader)
    assert (code, out) == (0, "")
    assert "'sink fifo' still works 0.5 s after the program's end" in err
    assert on_disk(asyncio_program.folder) == all_of_it()


def test_opened_file_that_takes_nothing_more_is_named_at_the_end(asyncio_program: Program) -> None:
    """A file of offload.open whose closing blocks, as its buffer goes into a pipe that nobody reads, is named too."""
    fifo = asyncio_program.folder / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        code, out, err = asyncio_program.run("""
            async def main():
                global stuck
                await opened_and_filled()
                default_exit_timeout(0.5)
                stuck = await offload.open(FOLDER + "/fifo", "wb", buffering=1 << 21)
                await stuck.write(bytes(1 << 20))
            run(main())
        """)
    finally:
        os.close(reader)
    assert (code, out) == (0, "")
    assert "fifo' still works 0.5 s after the program's end" in err
    assert "behind on_close" in err
    assert on_disk(asyncio_program.folder) == all_of_it()


# --- more processes ---------------------------------------------------------------------------------------------------

# Python from 3.12 warns of every fork of a process with threads.
FORK = ["-W", "ignore:This process:DeprecationWarning"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_child_of_multiprocessing_that_leaves_everything_open(asyncio_program: Program, method: str) -> None:
    """A child ends without atexit; what it left open is drained all the same, its exit code stays, nothing is said."""
    done = asyncio_program.run(
        f"""
        def child():
            run(opened_and_filled())
            sys.exit(7)
        if __name__ == "__main__":
            process = multiprocessing.get_context({method!r}).Process(target=child)
            process.start()
            process.join()
            sys.exit(process.exitcode)
    """
    )
    assert done == (7, "", "")
    assert on_disk(asyncio_program.folder) == all_of_it()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_child_of_multiprocessing_that_blocks_is_named_and_ends(asyncio_program: Program, method: str) -> None:
    """A child with a resource that never returns ends within exit_timeout, and names it on its stderr."""
    code, out, err = asyncio_program.run(
        f"""
        def child():
            run(opened_and_filled())
            stuck = offload.LoopThread("stuck", exit_timeout=0.3).__enter__()
            stuck.submit(block)
            blocking.wait()
        if __name__ == "__main__":
            process = multiprocessing.get_context({method!r}).Process(target=child)
            process.start()
            process.join()
            sys.exit(process.exitcode)
    """
    )
    assert (code, out) == (0, "ready\n")
    assert "'stuck' still works 0.3 s after the program's end" in err
    assert on_disk(asyncio_program.folder) == all_of_it()


CHILDREN = {
    "fork, sys.exit": "pid = os.fork()\nif not pid: child(); sys.exit()\nassert os.waitpid(pid, 0)[1] == 0",
    "fork, end of main": "pid = os.fork()\nif pid: assert os.waitpid(pid, 0)[1] == 0\nelse: child()",
    "multiprocessing": """
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 0
""",
}


@pytest.mark.parametrize("how", CHILDREN)
@pytest.mark.parametrize("pending", [False, True])
def test_fork_with_everything_open_writes_the_parents_data_once(
    asyncio_program: Program, how: str, pending: bool
) -> None:
    """The child is refused, but for the log, and ends; the parent's data, written or under way, is on disk once."""
    done = asyncio_program.run(
        f"""
        def child():
            for use in (
                lambda: everything.sink.write("lost"),
                lambda: everything.packets.write("lost", "a"),
                lambda: everything.db.submit(insert, -1),
            ):
                with contextlib.suppress(offload.ForkedError):
                    use()
                    os.write(1, b"accepted in the child")
            everything.sink.close()
            everything.resource.close()
        async def main():
            await everything.open()
            await everything.fill(0, 100)
            if {pending}:
                for thread in everything.sink._thread, everything.packets._thread, everything.resource._thread:
                    thread.post(gate.wait)
            for n in range(100, 200):
                everything.put(n)
        gate = threading.Event()
        run(main())
        {textwrap.indent(CHILDREN[how], "        ").strip()}
        if os.getpid() == parent:
            gate.set()
            for n in range(200, COUNT):
                everything.put_from_thread(n)
    """.replace("def child", "parent = os.getpid()\n        def child", 1),
        *FORK,
    )
    assert done == (0, "", "")
    assert on_disk(asyncio_program.folder, THREADED) == all_of_it(kinds=THREADED)
    assert on_disk(asyncio_program.folder, ("file", "port")) == {"file": [*range(100)], "port": [*range(200)]}


def test_fork_with_everything_open_whose_child_opens_its_own(asyncio_program: Program) -> None:
    """A forked child opens everything anew, leaves it open and ends: its data and the parent's are each on disk."""
    other = asyncio_program.folder / "child"
    other.mkdir()
    done = asyncio_program.run(
        f"""
        async def again():
            global everything
            everything = Everything()
            await everything.open({str(other)!r})
            await everything.fill()
        logging.getLogger("mine")
        run(opened_and_filled())
        pid = os.fork()
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
        else:
            logging.getLogger("mine").handlers.clear()
            run(again())
    """,
        *FORK,
    )
    assert done == (0, "", "")
    assert on_disk(other) == all_of_it()
    assert on_disk(asyncio_program.folder) == all_of_it()
