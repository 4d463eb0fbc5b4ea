"""Advice fits what was called, and says nothing that does not exist: every example runs, and mypy accepts it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from offload.debug.advice import RULES, SETUP, Rule, advise
from offload.debug.record import Cause, Frame, Kind, Numbers, Stall

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = [rule for rule in RULES if rule.example]
USER = Frame("/home/me/app.py", 7, "handler")
LIB = "/usr/lib/python3.12"


def stall(*inner: tuple[str, str], cause: Cause = Cause.WAIT, duration: float = 0.2, **fields: Any) -> Stall:
    stack = (Frame("/home/me/app.py", 90, "main"), USER, *(Frame(file, 1, function) for file, function in inner))
    return Stall(1, "main", 0.0, duration, 0.05, cause, frame=USER, stack=stack, innermost=stack[-1], **fields)


def source(rule: Rule, doc: str = "") -> str:
    body = f"{doc!r}\n{textwrap.dedent(rule.example).strip()}\n"
    return f"async def main() -> None:\n{textwrap.indent(body, '    ')}"


RUN = """
if __name__ == "__main__":
    for example in examples:
        print(example.__doc__, flush=True)
        asyncio.run(asyncio.wait_for(example(), 20), debug=True)
"""


@pytest.mark.slow
def test_examples_run(tmp_path: Path) -> None:
    """What is advised does what it says, on real files, sockets, threads and processes, without a warning."""
    examples = [rule for rule in EXAMPLES if "localhost" not in rule.example]  # names a server; mypy has to do
    text = SETUP + "examples = []\n"
    for rule in examples:
        text += f"{source(rule, doc=rule.advice)}examples.append(main)\n"
    script = tmp_path / "examples.py"  # a program of its own: processes that are started must be able to import it
    script.write_text(text + RUN)
    (tmp_path / "folder").mkdir()
    found = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input="yes\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, f"{found.stdout.splitlines()[-1:]}: {found.stderr}"
    assert len([line for line in found.stdout.splitlines() if line.strip()]) == len(examples)


@pytest.mark.slow
def test_examples_type_check(tmp_path: Path) -> None:
    """mypy --strict finds nothing wrong with any example."""
    mypy = shutil.which("mypy", path=str(Path(sys.executable).parent)) or shutil.which("mypy")
    if mypy is None:
        pytest.skip("mypy is not installed")
    for n, rule in enumerate(EXAMPLES):
        (tmp_path / f"example_{n}.py").write_text(SETUP + source(rule))
    command = [mypy, "--strict", "--python-executable", sys.executable, str(tmp_path)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.startswith("Success"), found.stdout


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.advice[:40])
def test_names_in_advice_exist(rule: Rule) -> None:
    """Every name of asyncio, concurrent.futures, sqlite3, gc, loops and this package that is advised is there."""
    import concurrent.futures
    import gc
    import sqlite3

    import offload

    places: dict[str, Any] = {
        "offload": offload,
        "asyncio": asyncio,
        "loop": asyncio.AbstractEventLoop,
        "concurrent.futures": concurrent.futures,
        "sqlite3": sqlite3,
        "gc": gc,
        "handle": offload.Handle,
        "thread": offload.LoopThread,
        "console": offload.LoopThread,
        "files": offload.LoopThread,
    }
    for place, name in re.findall(r"\b(concurrent\.futures|\w+)\.(\w+)", rule.advice):
        if place in places:
            assert hasattr(places[place], name), f"{place}.{name}"
    assert "\n" not in rule.advice
    assert len(rule.advice) < 250


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (stall(call="time.sleep", syscall="clock_nanosleep"), "asyncio.sleep"),
        (stall(call="sleep"), "asyncio.sleep"),
        (stall(syscall="clock_nanosleep"), "asyncio.sleep"),
        (stall(("/x/site-packages/requests/api.py", "get"), (f"{LIB}/socket.py", "readinto")), "requests.Session"),
        (stall((f"{LIB}/urllib/request.py", "urlopen"), (f"{LIB}/socket.py", "getaddrinfo")), "async client"),
        (stall(call="db.execute", syscall="fdatasync(5)"), "sqlite3.connect"),
        (stall(call="cursor.fetchall", cause=Cause.C), "offload.Resource"),
        (stall(("/x/site-packages/pymysql/connections.py", "_read_bytes")), "offload.Resource"),
        (stall(call="psycopg2.connect", syscall="poll"), "offload.Resource"),
        (stall((f"{LIB}/subprocess.py", "run"), call="subprocess.run"), "create_subprocess_exec"),
        (stall((f"{LIB}/subprocess.py", "wait"), call="process.wait"), "create_subprocess_exec"),
        (stall(call="os.system", syscall="wait4"), "create_subprocess_exec"),
        (stall((f"{LIB}/socket.py", "getaddrinfo"), call="socket.getaddrinfo"), "loop().getaddrinfo"),
        (stall(call="socket.gethostbyname"), "loop().getaddrinfo"),
        (stall(call="shutil.copytree", syscall="copy_file_range"), "shutil.copytree"),
        (stall(call="input", syscall="read(0)"), "call(input)"),
        (stall(call="self._lock.acquire", cause=Cause.LOCK, syscall="futex"), "asyncio.Lock"),
        (stall(call="with lock", cause=Cause.LOCK, syscall="futex"), "asyncio.Lock"),
        (stall((f"{LIB}/queue.py", "get"), cause=Cause.LOCK, call="jobs.get"), "asyncio.Queue"),
        (stall((f"{LIB}/threading.py", "wait"), cause=Cause.LOCK, call="ready.wait"), "asyncio.Event"),
        (stall((f"{LIB}/concurrent/futures/_base.py", "result"), cause=Cause.LOCK, call="f.result"), "wrap_future"),
        (stall(call="open", syscall="openat"), "offload.open"),
        (stall(call="file.write", syscall="write(3)"), "offload.open"),
        (stall(call="os.fsync", syscall="fsync(3)"), "offload.open"),
        (stall((f"{LIB}/pathlib.py", "Path.read_bytes"), call="path.read_bytes"), "offload.open"),
        (stall(call="sock.recv", syscall="recvfrom(3)"), "asyncio.open_connection"),
        (stall(call="vendor.wait_for_card", syscall="ioctl(3)"), "offload.LoopThread"),
        (stall(call="json.loads", cause=Cause.C, numbers=Numbers(late=0.19)), "ProcessPoolExecutor"),
        (stall(call="zlib.compress", cause=Cause.C, numbers=Numbers(late=0.001)), "offload.LoopThread"),
        (stall(cause=Cause.PYTHON), "asyncio.sleep(0)"),
        (stall(cause=Cause.GIL, holder=USER), "another thread"),
        (stall(call="gc.collect", cause=Cause.GC), "gc.freeze"),
        (stall(cause=Cause.PYTHON, kind=Kind.SATURATED), "asyncio.Semaphore"),
        (stall(kind=Kind.QUEUE, resource=True), "handle.call"),
        (stall(call="time.sleep", resource=True), "neighbours"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.call}-{value.cause}",
)
def test_advice_fits(given: Stall, wanted: str) -> None:
    """Each kind of stall gets the advice that is meant for it, whichever way it is known."""
    assert wanted in advise(given)


@pytest.mark.parametrize("cause", [Cause.DESCHEDULED, Cause.STOPPED, Cause.SUSPENDED, Cause.DEBUGGER])
def test_no_advice_for_what_the_program_did_not_do(cause: Cause) -> None:
    """Where the machine was at fault, changing the program would not help."""
    assert advise(stall(call="time.sleep", cause=cause)) == ""


def test_no_advice_where_nothing_is_known() -> None:
    """Without a call, a stack or a system call there is none; nothing raises."""
    assert advise(Stall(1, "main", 0.0, 0.1, 0.05)) == ""
    assert advise(stall()) == ""


def test_callers_of_the_blamed_line_do_not_count() -> None:
    """A library that called the user's function, a web framework say, is not what is to be replaced."""
    caller = Frame("/x/site-packages/requests/api.py", 1, "get")
    given = Stall(1, "main", 0.0, 0.2, 0.05, Cause.WAIT, frame=USER, stack=(caller, USER), call="time.sleep")
    assert "asyncio.sleep" in advise(given)
