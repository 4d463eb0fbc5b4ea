"""What would fix a stall: one line, by what the program had called when its loop stood still.

The table is tried from the top, so what is special stands before what is general: the library that the blamed line
called into, the function it called, the system call, and last what kind of computation it was. Each rule has an example
that really runs; the tests run them all and check them with mypy, so that no advice names what does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from .record import Cause, Kind, Stall


class Rule(NamedTuple):
    """When to give which advice: if any of its three patterns matches. Without any, the cause alone decides.

    Attributes:
        advice: one line.
        example: body of a coroutine function, which runs as it is in a folder where it may write, after `SETUP`.
        call: for `Stall.call`, searched in it.
        file: for the files of the stack from the blamed line inwards, searched in "path/to/file.py:function", with
            slashes; so a library that is written in Python is known whatever its user called it.
        syscall: for `Stall.syscall`, from its beginning.
    """

    advice: str
    example: str = ""
    call: str = ""
    file: str = ""
    syscall: str = ""


SETUP = """
import asyncio
import concurrent.futures
import http.client
import multiprocessing
import queue
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
import zlib

import offload
"""

LIBRARIES = (
    Rule(
        "use an async client (httpx.AsyncClient, aiohttp), or keep the connection on a thread of its own: "
        "`async with offload.Resource(requests.Session) as http: await http.call(requests.Session.get, url)`",
        """
        async with offload.Resource(lambda: http.client.HTTPConnection("localhost")) as web:
            await web.call(http.client.HTTPConnection.set_tunnel, "example.org")
        """,
        call=r"^(requests|httpx|urllib3|urllib\.request)\.|^urlopen$|^http\.client\.|\.getresponse$",
        file=r"/(requests|urllib3|httpx|botocore|boto3)/|/urllib/request\.py:|/http/client\.py:",
    ),
    Rule(
        "keep the connection on a thread of its own: `async with offload.Resource(lambda: sqlite3.connect(path), "
        "interrupt=sqlite3.Connection.interrupt) as db: await db.call(lambda c: c.execute(sql).fetchall())`",
        """
        connect = lambda: sqlite3.connect("data.db")
        async with offload.Resource(connect, interrupt=sqlite3.Connection.interrupt) as db:
            rows = await db.call(lambda c: c.execute("select 1").fetchall())
            assert rows == [(1,)]
        """,
        call=r"sqlite3\.|\.(execute|executemany|executescript|fetchone|fetchmany|fetchall|commit|rollback)$"
        r"|^(psycopg2|psycopg|pymysql|MySQLdb|pyodbc|cx_Oracle|oracledb|duckdb)\.",
        file=r"/(sqlite3|psycopg2|psycopg|pymysql|MySQLdb|mysql|pyodbc|oracledb|sqlalchemy|peewee|duckdb|redis|pymongo)"
        r"/|/django/db/",
    ),
    Rule(
        "start it with `await asyncio.create_subprocess_exec(program, …)`, then `await process.communicate()`",
        """
        process = await asyncio.create_subprocess_exec("echo", "hello", stdout=subprocess.PIPE)
        output, _ = await process.communicate()
        assert output == b"hello\\n"
        """,
        call=r"^subprocess\.|^os\.(system|popen|wait\w*)$|\.communicate$|^Popen$",
        file=r"/subprocess\.py:",
        syscall="wait",
    ),
    Rule(
        "look names up with `await asyncio.get_running_loop().getaddrinfo(host, port)`",
        """
        found = await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
        assert found[0][4][:2] == ("127.0.0.1", 80)
        """,
        call=r"(getaddrinfo|gethostby\w+|getfqdn|getnameinfo)$",
        file=r"/socket\.py:(getaddrinfo|getfqdn)|/dns/resolver\.py:",
    ),
    Rule(
        "keep the mail or file server's connection on a thread of its own: `async with offload.Resource(connect) as "
        "server: await server.call(send, message)`",
        call=r"^(smtplib|ftplib|imaplib|poplib|paramiko)\.",
        file=r"/(smtplib|ftplib|imaplib|poplib)\.py:|/paramiko/",
    ),
    Rule(
        "call it on a thread that is there for it: `async with offload.LoopThread() as files: "
        "await files.call(shutil.copytree, source, target)`",
        """
        async with offload.LoopThread() as files:
            await files.call(shutil.copytree, "folder", "copy")
        """,
        call=r"^(shutil|tarfile|zipfile|glob)\.|^os\.(walk|listdir|scandir|remove|unlink|rename|replace|stat|sync)$",
        file=r"/(shutil|tarfile|zipfile|glob)\.py:",
    ),
)

FUNCTIONS = (
    Rule(
        "`await asyncio.sleep(seconds)` instead of `time.sleep(seconds)`",
        "await asyncio.sleep(0.001)",
        call=r"(^|\.)u?sleep$",
        syscall="clock_nanosleep",
    ),
    Rule(
        "read it on a thread of its own: `async with offload.LoopThread() as console: await console.call(input)`",
        """
        async with offload.LoopThread() as console:
            assert await console.call(input) == "yes"
        """,
        call=r"^(input|getpass\.\w+|sys\.stdin\.\w+)$",
        file=r"/getpass\.py:",
    ),
    Rule(
        "`async with asyncio.Lock()` between tasks; for what is shared with threads, give the object a thread of its "
        "own: `offload.Resource(factory)`",
        """
        lock = asyncio.Lock()
        async with lock:
            pass
        async with offload.Resource(lambda: [1]) as shared:
            await shared.call(list[int].append, 2)
        """,
        call=r"^with .*(lock|mutex|cond|sem)|(lock|mutex|sem\w*|cond\w*)\.(acquire|wait|wait_for)$",
    ),
    Rule(
        "an `asyncio.Queue`, or call the other side: `await thread.call(function)` on an `offload.LoopThread`",
        """
        items: asyncio.Queue[int] = asyncio.Queue()
        items.put_nowait(1)
        assert await items.get() == 1
        async with offload.LoopThread() as thread:
            waiting: queue.Queue[int] = queue.Queue()
            waiting.put(2)
            assert await thread.call(waiting.get) == 2
        """,
        call=r"(queue|^q)\.(get|put|join)$",
        file=r"/queue\.py:|/multiprocessing/(queues|connection)\.py:",
    ),
    Rule(
        "`await asyncio.wrap_future(future)` instead of `future.result()`",
        """
        async with offload.LoopThread() as thread:
            future = thread.submit(len, "abc")
            assert await asyncio.wrap_future(future) == 3
        """,
        call=r"\.result$|futures\.(wait|as_completed)$",
        file=r"/concurrent/futures/",
    ),
    Rule(
        "an `asyncio.Event`, which its own loop sets: other threads by `loop.call_soon_threadsafe(event.set)`",
        """
        event = asyncio.Event()
        loop = asyncio.get_running_loop()
        threading.Thread(target=loop.call_soon_threadsafe, args=(event.set,)).start()
        await event.wait()
        """,
        call=r"\.(wait|join)$",
        file=r"/threading\.py:",
    ),
    Rule(
        "`async with offload.open(path) as file: text = await file.read()`: files on a thread of their own",
        """
        async with offload.open("file.txt", "w") as file:
            await file.write("line\\n")
        """,
        call=r"^(io\.)?open$|(^|\.)(read|readline|readlines|write|writelines|flush|read_text|read_bytes|write_text"
        r"|write_bytes)$|^os\.(fsync|fdatasync|read|write|pread|pwrite|open|ftruncate)$",
        file=r"/pathlib(/\w+)?\.py:|/tempfile\.py:",
        syscall="fsync|fdatasync|open|pread|pwrite|flock|fallocate|copy_file_range|page fault",
    ),
    Rule(
        "use a stream: `reader, writer = await asyncio.open_connection(host, port)`; or keep the blocking socket on a "
        "thread of its own, in an `offload.Resource`",
        """
        async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(host, port)
            assert await reader.read() == b""
            writer.close()
        """,
        call=r"\.(recv\w*|send|sendall|sendto|connect|accept|makefile|do_handshake)$|^socket\.",
        file=r"/(socket|ssl|socketserver)\.py:",
        syscall="recv|send|connect|accept",
    ),
    Rule(
        "call it on a thread that is there for it, and await that: `async with offload.LoopThread() as thread: "
        "await thread.call(function, …)`",
        """
        async with offload.LoopThread() as thread:
            await thread.call(time.sleep, 0.001)
        """,
        syscall=".",
    ),
)

_PROCESS = """
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as processes:
            assert await asyncio.get_running_loop().run_in_executor(processes, len, "abc") == 3
"""

GIL_RELEASED = Rule(
    "it lets other threads run meanwhile, so give it one: `async with offload.LoopThread() as thread: "
    "await thread.call(function, data)`",
    """
    async with offload.LoopThread() as thread:
        assert await thread.call(zlib.compress, b"") == zlib.compress(b"")
    """,
)
GIL_HELD = Rule(
    "it holds the GIL, so a thread would not help: take smaller pieces, or `await loop.run_in_executor(processes, "
    "function, data)` with a `concurrent.futures.ProcessPoolExecutor`",
    _PROCESS,
)
PYTHON = Rule(
    "let others have a turn with `await asyncio.sleep(0)` now and then, or compute elsewhere: "
    "`await loop.run_in_executor(processes, function, data)` with a `concurrent.futures.ProcessPoolExecutor`",
    """
    for _ in range(3):
        await asyncio.sleep(0)
    """,
)
GIL = Rule(
    "another thread holds the GIL, at the line named as holder: take smaller pieces there, or move that work to a "
    "`concurrent.futures.ProcessPoolExecutor`",
    _PROCESS,
)
GC = Rule(
    "full collections of a large heap: `gc.collect(); gc.freeze()` once the program is set up keeps what is there out "
    "of them",
    """
    import gc
    gc.collect()
    gc.freeze()
    gc.unfreeze()
    """,
)
SATURATED = Rule(
    "no callback is slow, there are too many at once: start fewer with an `asyncio.Semaphore`, or more of them in one "
    "callback",
    """
    few = asyncio.Semaphore(10)
    async with few:
        pass
    """,
)
QUEUE = Rule(
    "the resource is asked faster than it answers: make one call of several (`handle.call(lambda o: …)` runs as many "
    "steps as you like in one), or open a second one",
    """
    async with offload.Resource(lambda: sqlite3.connect("data.db")) as handle:
        assert await handle.call(lambda c: [c.execute("select ?", (n,)).fetchone() for n in range(2)]) == [(0,), (1,)]
    """,
)
NEIGHBOURS = Rule(
    "a coroutine on a resource's loop must not block its neighbours: make it a plain function, and run it by "
    "`handle.call(function, …)`, which is the resource's one call at a time",
    """
    async with offload.Resource(lambda: [1]) as handle:
        assert await handle.call(len) == 1
    """,
)

RULES = (*LIBRARIES, *FUNCTIONS, GIL_RELEASED, GIL_HELD, PYTHON, GIL, GC, SATURATED, QUEUE, NEIGHBOURS)


def advise(stall: Stall) -> str:
    """What would fix this stall, one line; "": it is not the program's fault, or nothing is known. Any thread."""
    rule = _rule(stall)
    return rule.advice if rule is not None else ""


def _rule(stall: Stall) -> Rule | None:
    cause = stall.cause
    if not cause.by_code:
        return None
    if stall.kind is Kind.QUEUE:
        return QUEUE
    if cause is Cause.GIL:
        return GIL
    if cause is Cause.GC:
        return GC
    if stall.kind is Kind.SATURATED:
        return SATURATED
    if stall.resource:
        return NEIGHBOURS
    # What only looks like a wait, a `write` that compresses, is not helped by what helps waits; a database is.
    computes = cause in (Cause.PYTHON, Cause.C)
    for rule in LIBRARIES if computes else (*LIBRARIES, *FUNCTIONS):
        if _fits(rule, stall):
            return rule
    if cause is Cause.C:
        # What held the GIL kept the watchdog from waking.
        return GIL_HELD if stall.numbers.late >= stall.duration / 4 else GIL_RELEASED
    return PYTHON if cause is Cause.PYTHON else None


def _fits(rule: Rule, stall: Stall) -> bool:
    return bool(
        (rule.call and stall.call and re.search(rule.call, stall.call, re.IGNORECASE))
        or (rule.file and any(re.search(rule.file, place) for place in _places(stall)))
        or (rule.syscall and stall.syscall and re.match(rule.syscall, stall.syscall))
    )


def _places(stall: Stall) -> Iterator[str]:
    """What the blamed line called, outermost first; a library's own callers do not count."""
    stack = stall.stack
    begin = max((n for n, frame in enumerate(stack) if frame == stall.frame), default=-1) + 1
    for frame in stack[begin:]:
        yield f"{frame.file.replace(chr(92), '/')}:{frame.function}"
