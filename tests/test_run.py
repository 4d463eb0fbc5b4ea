"""`offload run` beside `python`: the same program, the same behaviour, and a report in the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

RUN = [sys.executable, "-m", "offload", "run"]
AMPLE = 60.0  # seconds until something that must happen is given up
TIMES = 6  # so often a program is run where the machine kept the detector from measuring what it is about

BLOCKS = """
    import asyncio, sys, time
    async def blocks():
        await asyncio.sleep(0)
        time.sleep(0.15)  # here
        await asyncio.sleep(0)
    asyncio.run(blocks())
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


def done(command: list[str], folder: Path, **options: Any) -> Done:
    # Buffered, as by default: what is printed last must not be lost.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"stdin": subprocess.DEVNULL, "errors": "backslashreplace", "env": environment, **options}
    process = subprocess.run(command, cwd=folder, capture_output=True, timeout=AMPLE, check=False, **options)
    return Done(process.returncode, process.stdout, process.stderr)


def write(folder: Path, program: str, name: str = "program.py") -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(program))
    return name


def stalls(folder: Path, name: str = "report.json") -> list[dict[str, Any]]:
    """Those of the program; a busy machine adds some of its own, which say so."""
    report = json.loads((folder / name).read_text())
    assert report["schema"] == 1
    return [stall for stall in report["stalls"] if stall["verdict"] != "unmeasured"]


def is_unclear(report: dict[str, Any]) -> bool:
    """Whether the watchdog was kept from seeing a stall, or was late where nothing but its ticks tells of one."""
    ticked = [stall for stall in report["stalls"] if stall["precision"] == "heartbeat"]
    in_time = [stall for stall in ticked if stall["numbers"]["late"] <= stall["threshold"] / 2]
    loops = [loop for loop in report["loops"] if loop["precision"] == "heartbeat"]  # each is blocked once
    return len(in_time) < len(loops) or any(stall["verdict"] == "unmeasured" for stall in report["stalls"])


def measured(command: list[str], folder: Path, run: Callable[[list[str], Path], Done] = done) -> Done:
    """Run it until its report.json is clear: that the machine stops the watchdog is no fault of anybody's."""
    found, report = run(command, folder), folder / "report.json"
    for _ in range(TIMES - 1):
        if report.exists() and is_unclear(json.loads(report.read_text())):
            found = run(command, folder)
    return found


def line_of(program: str, mark: str) -> int:
    return textwrap.dedent(program)[: textwrap.dedent(program).index(mark)].count("\n") + 1


def assert_reported(folder: Path) -> None:
    """The report tells of the one line of BLOCKS that blocks, and of nothing else."""
    (stall,) = stalls(folder)
    assert (stall["line"], stall["function"], stall["verdict"]) == (line_of(BLOCKS, "# here"), "blocks", "fail")
    assert 0.15 <= stall["duration"] < 10


@contextlib.contextmanager
def started(command: list[str], folder: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The command while it runs; whatever the test does, it has ended afterwards."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = cast("subprocess.Popen[bytes]", subprocess.Popen(command, cwd=folder, **options))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


# --- as by python -----------------------------------------------------------------------------------------------------

SAME = {
    "main module": """
        import sys, __main__
        print(__name__, __file__, __package__, __spec__, __cached__, __doc__, __annotations__, type(__loader__))
        print(type(__builtins__), __main__.__dict__ is globals(), sys.modules["__main__"] is __main__)
        print(sorted(globals()))
    """,
    "arguments": """
        import sys
        print(sys.argv, sys.path, sys.flags)
    """,
    "neighbour": """
        import neighbour
        print(neighbour.__file__)
    """,
    "docstring and future": '''
        """Doc."""
        from __future__ import annotations
        x: nonsense = 1
        print(__doc__, __annotations__)
    ''',
    "no future of ours": """
        def f(x: 1 + 1): ...
        print(f.__annotations__)
    """,
    "exception": """
        def inner():
            raise ValueError("what it says")
        try:
            inner()
        except ValueError as exc:
            raise RuntimeError("outer") from exc
    """,
    "exception group": """
        raise ExceptionGroup("two", [ValueError(1), TypeError(2)])
    """,
    "exception of an import": """
        import broken
    """,
    "exception with a hook": """
        import sys, traceback
        def hook(kind, value, tb):
            print("hook", kind, value, value.__traceback__ is tb, len(traceback.extract_tb(tb)))
        sys.excepthook = hook
        1 / 0
    """,
    "exception whose traceback is kept": """
        import atexit, sys, traceback
        atexit.register(lambda: print(traceback.format_tb(sys.last_traceback)))
        1 / 0
    """,
    "syntax error": "def f(:\n",
    "other encoding": "# coding: latin-1\nprint(ascii('\xe9'))\n",
    "exit": "import sys; sys.exit()",
    "exit with 0": "raise SystemExit(0)",
    "exit with 3": "raise SystemExit(3)",
    "exit with 259": "raise SystemExit(259)",
    "exit with -1": "raise SystemExit(-1)",
    "exit with True": "raise SystemExit(True)",
    "exit with words": "raise SystemExit('words')",
    "exit with a pair": "raise SystemExit(1, 2)",
    "keyboard interrupt": "raise KeyboardInterrupt('mine')",
    "base exception": "class Odd(BaseException): ...\nraise Odd",
    "killed by itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "_exit": "import os; os._exit(5)",
    "atexit": """
        import atexit
        atexit.register(print, "first registered, last called")
        atexit.register(print, "last registered, first called")
        print("main")
    """,
    "atexit that fails": """
        import atexit
        atexit.register(divmod, 1, 0)
    """,
    "thread outlives main": """
        import threading
        main = threading.main_thread()
        def work():
            main.join()
            print("thread", main.is_alive())
            raise ValueError("of the thread")
        threading.Thread(target=work, name="worker").start()
        print("main", threading.current_thread() is main)
    """,
    "stdin": """
        import sys
        print(sys.stdin.read().upper(), input.__module__)
    """,
    "what stdout cannot encode": """
        import sys
        print(sys.stdout.errors, sys.stderr.errors, sys.stdout.encoding)
        print(chr(0xdc80))
    """,
    "fork": """
        import os, sys
        pid = os.fork()
        if not pid:
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """,
    "fork that fails": """
        import os, sys
        pid = os.fork()
        if not pid:
            1 / 0
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """,
    "pickle": """
        import pickle
        class Own:
            class Inner: ...
        print(type(pickle.loads(pickle.dumps(Own.Inner()))) is Own.Inner, Own.__module__)
    """,
    "child inherits": """
        import subprocess, sys
        subprocess.run([sys.executable, "-c", "import sys; print(sys.argv, sys.path[0], 'offload' in sys.modules)"])
    """,
    "several loops": """
        import asyncio, threading
        async def turn(name):
            await asyncio.sleep(0.001)
            print(name)
        for n in range(3):
            asyncio.run(turn(n))
        for n in range(3):
            thread = threading.Thread(target=lambda: asyncio.run(turn(f"thread {n}")))
            thread.start()
            thread.join()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(turn("by hand"))
        loop.run_until_complete(turn("once more"))
        loop.close()
    """,
    "exception out of a loop": """
        import asyncio
        async def fails():
            await asyncio.sleep(0)
            raise ValueError("in the loop")
        asyncio.run(fails())
    """,
    "uvloop": """
        import asyncio, uvloop
        async def turn():
            await asyncio.sleep(0.001)
            print(type(asyncio.get_running_loop()))
        uvloop.run(turn())
    """,
    "signal handlers": """
        import signal
        print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGHUP))
    """,
}

POOL = """
    import multiprocessing, sys
    from concurrent.futures import ProcessPoolExecutor

    sys.stdout.write(f"imported as {__name__}\\n")  # one write, for several processes do so at once

    class Point:
        def __init__(self, x):
            self.x = x

    def double(point):
        return Point(2 * point.x)

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            print([type(p) is Point and p.x for p in pool.map(double, map(Point, range(3)))])
        with context.Pool(1) as pool:
            print(pool.apply(double, (Point(4),)).x)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", SAME)
def test_the_program_behaves_as_by_python(tmp_path: Path, case: str) -> None:
    """Exit code, stdout and stderr are those of `python script.py args…`, to the byte."""
    script = write(tmp_path, SAME[case])
    write(tmp_path, "here = 1", "neighbour.py")
    write(tmp_path, "1 / 0", "broken.py")
    options: dict[str, Any] = {"stdin": None, "input": "from stdin"}
    expected = done([sys.executable, script, "--report", "x", "--", "-h"], tmp_path, **options)
    found = done([*RUN, "-q", script, "--report", "x", "--", "-h"], tmp_path, **options)
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("case", ["main module", "arguments", "neighbour", "exception", "exit with 3", "pickle"])
def test_a_module_behaves_as_by_python(tmp_path: Path, case: str) -> None:
    """The same for `python -m module args…`, its `__spec__` and its search in the working directory included."""
    write(tmp_path, SAME[case], "package/program.py")
    write(tmp_path, "here = 1", "neighbour.py")
    for name in ("package.program", "package"):
        expected = done([sys.executable, "-m", name, "-m", "--live"], tmp_path)
        found = done([*RUN, "-q", "-m", name, "-m", "--live"], tmp_path)
        if case == "main module":  # addresses
            assert re.sub("0x[0-9a-f]+", "", found.out) == re.sub("0x[0-9a-f]+", "", expected.out)
            found = found._replace(out=expected.out)
        assert found == expected
        write(tmp_path, SAME[case], "package/__main__.py")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["../folder/program.py", "./program.py", "link.py", "folder", "archive.zip", "x.pyc"])
def test_other_shapes_of_a_script_behave_as_by_python(tmp_path: Path, shape: str) -> None:
    """A relative path, a link, a folder, a zip file and a compiled file get the `__file__` and paths of Python."""
    folder = tmp_path / "folder"
    text = "import sys\nprint(__file__, sys.argv, sys.path[:2], __package__, __spec__ is None)\nraise ValueError\n"
    for name in ("program.py", "__main__.py"):
        write(tmp_path, text, f"folder/{name}")
    (tmp_path / "other").mkdir()
    (folder / "link.py").symlink_to("../folder/program.py")
    (folder / "folder").mkdir()
    write(folder, text, "folder/__main__.py")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", text)
    code = "import py_compile; py_compile.compile('program.py', 'x.pyc')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    expected = done([sys.executable, shape], folder)
    assert done([*RUN, "-q", shape], folder) == expected


@pytest.mark.slow
def test_safe_path_is_kept(tmp_path: Path) -> None:
    """With -P no folder of the program comes into `sys.path`, as by Python."""
    script = write(tmp_path, "import sys; print(sys.path)")
    expected = done([sys.executable, "-P", script], tmp_path)
    assert done([sys.executable, "-P", *RUN[1:], "-q", script], tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_multiprocessing_works(tmp_path: Path, method: str) -> None:
    """Children find the program's main module again, and classes made in it cross; only the parent reports."""
    script = write(tmp_path, POOL)
    expected = done([sys.executable, script, method], tmp_path)
    found = done([*RUN, "-q", "--report", "report.json", script, method], tmp_path)
    assert (found.code, found.err) == (expected.code, expected.err) == (0, "")
    # As a set: how many workers a pool starts, and how many of them get to speak, is a matter of time.
    assert set(found.out.splitlines()) == set(expected.out.splitlines())
    assert stalls(tmp_path) == []


@pytest.mark.slow
def test_closed_streams_stay_closed(tmp_path: Path) -> None:
    """A program that was started without stdout and stderr finds none, and is reported all the same."""
    script = write(tmp_path, "import sys, os; os._exit(10 + (sys.stdout is None) + (sys.stderr is None))")
    command = f"{sys.executable} -m offload run {script} >&- 2>&-"
    assert done(["sh", "-c", command], tmp_path).code == 12
    script = write(tmp_path, BLOCKS)
    command = f"{sys.executable} -m offload run --report report.json {script} >&- 2>&-"
    assert measured(["sh", "-c", command], tmp_path).code == 0
    assert_reported(tmp_path)


# --- however it ends, there is a report -------------------------------------------------------------------------------

ENDINGS = {
    "its last line": ("", 0),
    "sys.exit": ("sys.exit(9)", 9),
    "an exception": ("1 / 0", 1),
    "Ctrl-C": ("raise KeyboardInterrupt", -signal.SIGINT),
    "SIGTERM": ("import signal; signal.raise_signal(signal.SIGTERM)", -signal.SIGTERM),
    "a thread's end": ("import threading; threading.Thread(target=time.sleep, args=(0.05,)).start()", 0),
    "another directory": ("import os; os.chdir('/')", 0),
    "a directory that is gone": ("import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')", 0),
    "no stderr": ("sys.stderr.close()", 0),
    "other streams": ("import io; sys.stdout = sys.stderr = io.StringIO()", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_report_is_written_however_the_program_ends(tmp_path: Path, ending: str) -> None:
    """The report tells of the blocking line, and the exit code is the program's own."""
    last, code = ENDINGS[ending]
    script = write(tmp_path, textwrap.dedent(BLOCKS) + last + "\n")
    found = measured([*RUN, "--report", "report.json", script], tmp_path)
    assert found.code == code, found.err
    assert found.out == ""
    assert_reported(tmp_path)
    if ending != "no stderr":
        assert f"program.py:{line_of(BLOCKS, '# here')}" in found.err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)])
def test_signal_from_outside_ends_it_and_is_reported(tmp_path: Path, number: int, code: int) -> None:
    """A program that waits in its loop ends by the signal as it would by Python, and is reported."""
    script = write(
        tmp_path,
        textwrap.dedent(BLOCKS)
        + textwrap.dedent("""
            async def waits():
                print("ready", flush=True)
                await asyncio.Event().wait()
            asyncio.run(waits())
        """),
    )

    def interrupted(command: list[str], folder: Path) -> Done:
        with started(command, folder) as process:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], AMPLE)[0], "it is not ready"
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(number)
            out, err = process.communicate(timeout=AMPLE)
        return Done(process.returncode, out.decode(), err.decode())

    found = measured([*RUN, "--report", "report.json", script], tmp_path, interrupted)
    assert found.code == code, found.err
    assert "offload/cli" not in found.err
    assert_reported(tmp_path)


# One step in C: the signal comes behind Python's last look for signals, and before the wait.
FALLS_ASLEEP = """
    import collections, ctypes, functools, operator, select, signal, threading, time
    taken = threading.Lock()
    taken.acquire()
    steps = functools.partial(ctypes.PyDLL(None)["raise"], {number}), functools.partial({wait})
    collections.deque(map(operator.call, steps), 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait", ["time.sleep, 3600", "taken.acquire", "select.epoll().poll"])
def test_signal_that_comes_just_before_a_wait_ends_it(tmp_path: Path, number: int, wait: str) -> None:
    """Python would see it after the wait; the more threads ask for the GIL, the more often a signal comes then."""
    code = textwrap.dedent(BLOCKS) + textwrap.dedent(FALLS_ASLEEP.format(number=number, wait=wait))
    found = measured([*RUN, "--report", "report.json", write(tmp_path, code)], tmp_path)
    assert found.code == -number, found.err
    assert_reported(tmp_path)


@pytest.mark.slow
def test_forked_child_has_its_signals_as_they_were(tmp_path: Path) -> None:
    """SIGTERM and SIGURG have their defaults in it, and no byte for a signal of its goes to the parent."""
    script = write(
        tmp_path,
        """
        import os, signal, sys
        from signal import SIG_DFL, SIGTERM, SIGURG, getsignal, set_wakeup_fd
        def in_a_child(handler, fd):
            if not os.fork():
                ours = getsignal(SIGTERM) is not handler, getsignal(SIGURG) is not handler
                os._exit(sum(ours) + 4 * (set_wakeup_fd(-1) != fd))
            print(os.waitstatus_to_exitcode(os.wait()[1]))
        in_a_child(SIG_DFL, -1)
        fd = os.open("/dev/null", os.O_WRONLY | os.O_NONBLOCK)
        set_wakeup_fd(fd)
        signal.signal(SIGTERM, print)
        signal.signal(SIGURG, print)
        in_a_child(print, fd if sys.version_info < (3, 12) else -1)  # from then on asyncio takes it from a child
        """,
    )
    assert done([*RUN, "-q", script], tmp_path) == (0, "0\n0\n", "")


@pytest.mark.slow
def test_program_uses_the_signals_pipe_and_sigurg_itself(tmp_path: Path) -> None:
    """What it sets is what it gets, as by python."""
    script = write(
        tmp_path,
        """
        import asyncio, os, signal, sys, time
        seen = []
        signal.signal(signal.SIGUSR2, lambda *_: None)
        signal.signal(signal.SIGURG, lambda *_: seen.append("urgent"))
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.05)  # for what must not come
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        signal.set_wakeup_fd(writes)
        os.kill(os.getpid(), signal.SIGURG)
        signal.signal(signal.SIGUSR1, lambda *_: seen.append("mine"))
        os.kill(os.getpid(), signal.SIGUSR1)
        print(seen, list(os.read(reads, 9)) == [signal.SIGURG, signal.SIGUSR1], signal.set_wakeup_fd(-1) == writes)

        async def main():
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()
            loop.add_signal_handler(signal.SIGTERM, ended.set)
            os.kill(os.getpid(), signal.SIGTERM)
            await ended.wait()
        asyncio.run(main())
        print(seen)
        """,
    )
    assert done([*RUN, "-q", script], tmp_path) == (0, "['urgent', 'mine'] True True\n['urgent', 'mine']\n", "")


@pytest.mark.slow
def test_signal_that_was_seen_is_over(tmp_path: Path) -> None:
    """What interrupts the main thread for a signal is a signal itself, for which it is not interrupted once more."""
    script = write(
        tmp_path,
        """
        import os, resource, signal, time
        def switches():
            return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        signal.signal(signal.SIGUSR2, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR2)
        before = switches()
        time.sleep(0.5)  # for what must not come: some six without it, a thousand with it
        print(switches() - before < 100)
        """,
    )
    assert done([*RUN, "-q", script], tmp_path) == (0, "True\n", "")


@pytest.mark.slow
def test_own_sigterm_handler_is_kept(tmp_path: Path) -> None:
    """A program that handles SIGTERM goes on handling it; a forked child that does not dies of it, without a report."""
    script = write(
        tmp_path,
        """
        import os, signal, sys
        pid = os.fork()
        if not pid:
            signal.raise_signal(signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.path.exists("report.json"))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        signal.raise_signal(signal.SIGTERM)
        """,
    )
    found = done([*RUN, "-q", "--report", "report.json", script], tmp_path)
    assert found == (4, f"{-signal.SIGTERM} False\n", "")
    assert stalls(tmp_path) == []


@pytest.mark.slow
def test_every_loop_is_watched(tmp_path: Path) -> None:
    """Loops one after the other, on threads, and uvloop's: each that was blocked is in the report."""
    program = """
        import asyncio, threading, time, uvloop
        async def blocks(seconds, after=0.001):
            await asyncio.sleep(after)
            time.sleep(seconds)
            await asyncio.sleep(0.001)
        asyncio.run(blocks(0.21))
        asyncio.run(blocks(0.22))
        thread = threading.Thread(target=lambda: asyncio.run(blocks(0.23)), name="side")
        thread.start()
        thread.join()
        uvloop.run(blocks(0.24, after=0.2))  # its clocks have been read by then, so that a late look shows
    """
    script = write(tmp_path, program)
    assert measured([*RUN, "-q", "--report", "report.json", script], tmp_path) == (0, "", "")
    found = stalls(tmp_path)
    assert [s["line"] for s in found] == [line_of(program, "time.sleep(seconds)")] * 4
    assert [s["precision"] for s in found] == ["exact"] * 3 + ["heartbeat"]
    assert [s["duration"] >= shortest for s, shortest in zip(found, (0.21, 0.22, 0.23, 0.2), strict=True)] == [True] * 4
    assert "side" in found[2]["loop"]


@pytest.mark.slow
def test_every_form_of_report_is_written(tmp_path: Path) -> None:
    """--report may be given several times; each file's ending picks its form."""
    script = write(tmp_path, BLOCKS)
    names = ["report.json", "r.html", "r.xml", "r.sarif", "r.folded"]
    assert measured([*RUN, "-q", *(f"--report={name}" for name in names), script], tmp_path) == (0, "", "")
    for name in names:
        assert "blocks" in (tmp_path / name).read_text(), name


@pytest.mark.slow
def test_table_and_log_go_to_stderr(tmp_path: Path) -> None:
    """What blocked stands on stderr, named by its line; stdout is the program's alone; -q says nothing."""
    script = write(tmp_path, textwrap.dedent(BLOCKS) + "print('out')")
    found = measured([*RUN, "--report", "report.json", script], tmp_path)
    assert (found.code, found.out) == (0, "out\n")
    assert "FAIL" in found.err
    assert f"program.py:{line_of(BLOCKS, '# here')}" in found.err
    assert done([*RUN, "--quiet", script], tmp_path) == (0, "out\n", "")


@pytest.mark.slow
def test_threshold_and_allow_decide_what_is_a_stall(tmp_path: Path) -> None:
    """What stays under the threshold is not reported, and what is allowed to block does not fail the run."""
    script = write(tmp_path, BLOCKS)
    options = ["-q", "--fail", "--report", "report.json"]
    assert done([*RUN, *options, "--threshold", "30", script], tmp_path).code == 0
    assert stalls(tmp_path) == []
    assert done([*RUN, *options, "--allow", "*/program.py:blocks", script], tmp_path).code == 0
    assert {stall["verdict"] for stall in stalls(tmp_path)} <= {"pass"}


@pytest.mark.slow
@pytest.mark.parametrize(("last", "code"), [("", 3), ("sys.exit(7)", 7), ("1 / 0", 1)])
def test_fail_sets_the_exit_code_only_of_a_program_that_ended_well(tmp_path: Path, last: str, code: int) -> None:
    """--fail turns 0 into 3 after a stall, and leaves any other exit code; nothing that was printed is lost."""
    script = write(tmp_path, textwrap.dedent(BLOCKS) + f"print('x' * 100_000)\n{last}\n")
    found = measured([*RUN, "--fail", "--report", "report.json", script], tmp_path)
    assert found.code == code
    assert found.out == "x" * 100_000 + "\n"


@pytest.mark.slow
def test_fail_leaves_a_clean_program_alone(tmp_path: Path) -> None:
    """A program that blocks nothing, or has no loop at all, ends with 0."""
    clean = write(tmp_path, "import asyncio\nfor _ in range(3): asyncio.run(asyncio.sleep(0.01))\n")
    assert done([*RUN, "-q", "--fail", "--threshold=1", clean], tmp_path) == (0, "", "")
    assert done([*RUN, "-q", "--fail", write(tmp_path, "print(1)")], tmp_path) == (0, "1\n", "")


@pytest.mark.slow
def test_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """It costs a program that ended well its 0, and the other reports are written."""
    (tmp_path / "folder.json").mkdir()
    script = write(tmp_path, BLOCKS)
    command = [*RUN, "-q", "--report", "folder.json", "--report", "report.json", script]
    found = measured(command, tmp_path)
    assert found == (4, "", f"offload: {tmp_path}/folder.json: Is a directory\n")
    assert_reported(tmp_path)
    write(tmp_path, textwrap.dedent(BLOCKS) + "sys.exit(8)")
    assert done(command, tmp_path).code == 8


# --- wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument.*"),
        (["missing.py"], "Invalid value for SCRIPT: missing.py: No such file or directory"),
        (["--threshold", "0", "p.py"], "Invalid value for '--threshold': .*0.001"),
        (["--threshold", "soon", "p.py"], "Invalid value for '--threshold': .*"),
        (["--report", "r.txt", "p.py"], r"Invalid value for --report: .*r\.txt.*\.json.*"),
        (["--report", "none/r.json", "p.py"], "Invalid value for --report: .*none/r.json: no such folder"),
        (["--nonsense", "p.py"], "No such option: --nonsense.*"),
    ],
)
def test_wrong_usage_is_told_before_the_program_begins(tmp_path: Path, arguments: list[str], says: str) -> None:
    """One line, exit code 2, and the program has not run."""
    write(tmp_path, "open('begun', 'w')", "p.py")
    found = done([*RUN, *arguments], tmp_path)
    assert (found.code, found.out) == (2, "")
    assert re.fullmatch(f"offload: {says}; see offload run --help\n", found.err), found.err
    assert not (tmp_path / "begun").exists()


@pytest.mark.slow
def test_module_that_is_missing_is_told_as_by_python(tmp_path: Path) -> None:
    """`-m` of what does not exist ends with 1 and Python's own words."""
    assert done([*RUN, "-q", "-m", "no_such_module"], tmp_path) == done(
        [sys.executable, "-m", "no_such_module"], tmp_path
    )


def test_command_line_does_not_pay_for_run(tmp_path: Path) -> None:
    """`offload --version` imports neither the detector, nor asyncio, nor what draws."""
    code = """
        import sys
        from offload.cli import main
        try:
            main()
        except SystemExit:
            print(*{"asyncio", "rich", "runpy", "offload.debug", "offload.cli_live"} & set(sys.modules))
    """
    found = done([sys.executable, "-c", textwrap.dedent(code), "--version"], tmp_path)
    assert re.fullmatch(r"offload \S+\n\n", found.out), found


# --- live -------------------------------------------------------------------------------------------------------------


class Screen:
    """A pseudo-terminal of 30 rows and 100 columns; what was written to it is kept."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.data = b""

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")

    @property
    def plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|\x1b[78]", "", self.text)

    def read_until(self, drawn: Callable[[], object]) -> None:
        """Read until this is on it, or nobody has it open any more."""
        deadline = time.monotonic() + AMPLE
        with contextlib.suppress(OSError):  # EIO: nobody has
            while not drawn() and select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.data += os.read(self.master, 65536)


LIVE = """
    import asyncio, os, sys, time
    async def blocks():
        while not os.path.exists("seen"):
            time.sleep(0.15)  # here
            await asyncio.sleep(0.05)
            print("a line", flush=True)
    asyncio.run(blocks())
"""


@pytest.mark.slow
@pytest.mark.parametrize("last", ["", "1 / 0", "import signal; signal.raise_signal(signal.SIGTERM)"])
def test_live_view_shows_loops_and_stalls_and_gives_the_terminal_back(tmp_path: Path, last: str) -> None:
    """On stderr: busy share, the blocking line, and the terminal's own scroll region again in the end."""
    script = write(tmp_path, textwrap.dedent(LIVE) + last)
    screen = Screen()
    busy, where = r"main +[█░]+ +\d+% busy", f"program.py:{line_of(LIVE, '# here')} in blocks"
    with started(
        [*RUN, "--live", script], tmp_path, stderr=screen.slave, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(screen.slave)
        screen.read_until(lambda: re.search(busy, screen.plain) and where in screen.plain)
        (tmp_path / "seen").touch()
        screen.read_until(lambda: False)
        out, _ = process.communicate(timeout=AMPLE)
    os.close(screen.master)
    assert out.decode() == "a line\n" * out.count(b"\n")  # nothing of ours, nothing lost
    assert re.search(busy, screen.plain)
    assert where in screen.plain
    text = screen.text
    region, whole = text.index("\x1b[1;20r"), text.rindex("\x1b[r")
    assert region < whole
    assert text[whole:].count("busy") <= 1, "the view is not drawn after it has ended; the table may say busy"
    assert ("ZeroDivisionError" in text) == (last == "1 / 0")


@pytest.mark.slow
def test_live_view_without_a_terminal_is_done_without(tmp_path: Path) -> None:
    """A pipe as stderr gets one line that says so, and the program runs."""
    script = write(tmp_path, "print('ran')")
    found = done([*RUN, "-q", "--live", script], tmp_path)
    assert found == (0, "ran\n", "offload: --live needs a terminal on stderr; going on without\n")
