"""LogHandler: it never holds up a loop, keeps every record to the very end, and complains the library's way."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload import LogHandler, LoopThread, QueueFullError, Rotation
from offload.files.append import AppendFile


@pytest.fixture(name="logger")
def make_logger(tmp_path: Path) -> Iterator[logging.Logger]:
    """A logger of its own, whose handlers are closed at the end."""
    logger = logging.Logger("test")
    yield logger
    for handler in logger.handlers:
        handler.close()


@contextlib.contextmanager
def standing(handler: LogHandler) -> Iterator[None]:
    """The handler's thread stands still in this block, as it would at a slow disk."""
    stands, go_on = threading.Event(), threading.Event()

    def stand() -> None:
        stands.set()
        go_on.wait()

    handler._sink._thread.post(stand)
    stands.wait()
    try:
        yield
    finally:
        go_on.set()


def run_python(code: str, *arguments: object, expect: int = 0) -> str:
    # From 3.12 on Python warns of every fork beside threads: the fork is what one of these tests is about.
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
    assert done.returncode == expect, done.stdout
    return done.stdout


def errors_of(handler: LogHandler, monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """What reaches `handleError`, as its author sees it."""
    seen: list[BaseException | None] = []
    monkeypatch.setattr(handler, "handleError", lambda record: seen.append(sys.exc_info()[1]))
    return seen


def lines_of(path: Path) -> list[str]:
    """Of a log and its numbered old parts, oldest first."""
    old = sorted(path.parent.glob(f"{path.name}.*"), key=lambda name: -int(name.suffix[1:]))
    return "".join(name.read_text() for name in (*old, path)).splitlines()


async def test_five_threads_and_a_loop(tmp_path: Path, logger: logging.Logger) -> None:
    """Every record is there once, whole, those of each thread in order, over rotations too."""
    path = tmp_path / "log"
    handler = LogHandler(path, rotate=Rotation(max_bytes=20_000, keep=None))
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)

    def work(name: str) -> None:
        for number in range(1000):
            logger.info("%s %d", name, number)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(5)]
    for thread in threads:
        thread.start()
    for number in range(1000):
        logger.info("loop %d", number)
        if number % 100 == 0:
            await asyncio.sleep(0)
    async with LoopThread("joiner") as joiner:
        for thread in threads:
            await joiner.call(thread.join)
    await handler.aflush(fsync=True)
    seen: dict[str, list[int]] = {}
    for line in lines_of(path):
        writer, count = line.split()
        seen.setdefault(writer, []).append(int(count))
    assert seen == {name: list(range(1000)) for name in ("loop", "t0", "t1", "t2", "t3", "t4")}
    await handler.aclose()


async def test_a_loop_never_waits_and_the_log_says_what_was_dropped(tmp_path: Path, logger: logging.Logger) -> None:
    """While the disk stands and a thread waits for room, a loop logs on; what found no room is counted and told."""
    handler = LogHandler(tmp_path / "log", max_bytes=100)
    logger.addHandler(handler)
    with standing(handler):
        waits = threading.Thread(target=logger.info, args=("x" * 200,))
        waits.start()
        async with LoopThread("watcher") as watcher:
            await watcher.call(wait_for_bytes, handler, 201)
        for _ in range(7):
            logger.info("dropped")
        handler.flush()  # does not wait either
        assert waits.is_alive()
        assert handler.stats().dropped == 7
    await handler.aflush()
    logger.info("room")
    await handler.aclose()
    waits.join()
    assert (tmp_path / "log").read_text().splitlines() == [
        "x" * 200,
        "7 records dropped: more bytes waited than max_bytes",
        "room",
    ]


def wait_for_bytes(handler: LogHandler, count: int) -> None:
    while handler.stats().waiting_bytes < count:
        os.sched_yield()


def test_a_plain_thread_waits_for_room(tmp_path: Path, logger: logging.Logger) -> None:
    """Threads without a loop lose nothing at a slow disk."""
    logger.addHandler(handler := LogHandler(tmp_path / "log", max_bytes=100))
    for number in range(5000):
        logger.info("%d", number)
    handler.close()
    assert (tmp_path / "log").read_text().split() == [str(n) for n in range(5000)]
    assert handler.stats().dropped == 0


def test_a_record_that_cannot_be_formatted_goes_to_handle_error(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong arguments of a log call, and text that the encoding lacks, never raise in the program."""
    logger.addHandler(handler := LogHandler(tmp_path / "log", encoding="ascii"))
    errors = errors_of(handler, monkeypatch)
    logger.info("%d", "no number")
    logger.info("ä")
    handler.flush()
    assert [type(error) for error in errors] == [TypeError]
    assert (tmp_path / "log").read_bytes() == b"\\xe4\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_what_the_disk_refuses_goes_to_handle_error(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is told at the flush, at each later record and at the close, and raises nowhere."""
    logger.addHandler(handler := LogHandler("/dev/full"))
    errors = errors_of(handler, monkeypatch)
    logger.info("accepted")
    handler.flush()
    logger.info("refused")
    handler.close()
    assert len(errors) == 3
    assert all("No space left" in str(error) for error in errors)


async def test_raise_gives_the_full_queue_to_handle_error(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With overflow="raise" each record without room is an error of its own."""
    logger.addHandler(handler := LogHandler(tmp_path / "log", max_bytes=4, overflow="raise"))
    errors = errors_of(handler, monkeypatch)
    with standing(handler):
        logger.info("one")
        logger.info("two")
    assert [type(error) for error in errors] == [QueueFullError]
    await handler.aclose()


def test_what_cannot_be_opened_raises_where_the_handler_is_made(tmp_path: Path) -> None:
    """A wrong path is found when the program starts, and leaves neither thread nor half a handler."""
    with pytest.raises(FileNotFoundError):
        LogHandler(tmp_path / "missing" / "log")
    with pytest.raises(ValueError, match="Unknown level"):
        LogHandler(tmp_path / "log", level="LOUD")
    assert not any(thread.name.startswith("sink ") for thread in threading.enumerate())


def test_it_is_a_handler_like_any_other(tmp_path: Path, logger: logging.Logger) -> None:
    """Levels, filters, formatters, tracebacks and terminators do what they do elsewhere."""
    handler = LogHandler(tmp_path / "log", level="WARNING")
    reference = logging.StreamHandler(io.StringIO())
    reference.setLevel("WARNING")
    for each in (handler, reference):
        each.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
        each.addFilter(lambda record: "secret" not in record.getMessage())
        logger.addHandler(each)
    logger.info("too low")
    logger.warning("secret")
    logger.warning("two\nlines")
    try:
        raise KeyError("mine")
    except KeyError:
        logger.exception("with a traceback")
    handler.close()
    assert (tmp_path / "log").read_text() == reference.stream.getvalue()


EXIT = """
import atexit, logging, sys, threading
how = sys.argv[2]
if how == "early":
    atexit.register(lambda: log.info("from atexit"))  # runs after offload has closed its threads
import offload
log = logging.getLogger()
log.setLevel("INFO")
handler = offload.LogHandler(sys.argv[1])
log.addHandler(handler)
if how == "late":
    atexit.register(lambda: log.info("from atexit"))
class Dying:
    def __del__(self):
        log.info("finalizer")
if how == "shutdown":
    log.info("before")
    logging.shutdown()
    log.info("from atexit")
def work():
    for number in range(2000):
        log.info("%d", number)
thread = threading.Thread(target=work)
if how != "shutdown":
    thread.start()
    import asyncio
    async def main():
        for number in range(2000):
            log.info("loop %d", number)
        if how == "raise":
            log.info("from atexit")
            raise SystemExit(0)
    asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["early", "late", "raise", "shutdown"])
def test_nothing_is_lost_at_exit(tmp_path: Path, how: str) -> None:
    """A program that just ends has every record in its log, also those of its last functions, in order."""
    assert run_python(EXIT, tmp_path / "log", how) == ""
    lines = (tmp_path / "log").read_text().splitlines()
    if how == "shutdown":
        assert lines == ["before", "from atexit"]
        return
    assert [line for line in lines if line.isdigit()] == [str(n) for n in range(2000)]
    assert [line for line in lines if line.startswith("loop")] == [f"loop {n}" for n in range(2000)]
    assert lines.count("from atexit") == 1
    assert how == "raise" or lines[-1] == "from atexit"


async def test_after_close_a_loop_is_told_and_a_thread_appends(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that was closed and is still in use holds up no loop: there the record is an error."""
    logger.addHandler(handler := LogHandler(tmp_path / "log"))
    errors = errors_of(handler, monkeypatch)
    logger.info("before")
    handler.close()  # on a loop: only begun
    await handler.aclose()
    logger.info("after")
    assert [type(error).__name__ for error in errors] == ["ClosedResourceError"]
    thread = threading.Thread(target=logger.info, args=("late",))
    thread.start()
    thread.join()
    assert (tmp_path / "log").read_text().split() == ["before", "late"]


def test_a_late_record_stands_behind_what_is_still_written(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that comes while the closing thread writes its last batch is appended behind that."""
    logger.addHandler(handler := LogHandler(tmp_path / "log"))
    writing, go_on = threading.Event(), threading.Event()
    sink, real_append, real_close = handler._sink, AppendFile.append, handler._sink.close

    def append(file: AppendFile, *arguments: Any) -> None:
        if sink._thread.is_here():
            writing.set()
            go_on.wait()
        real_append(file, *arguments)

    def close(timeout: float | None = None) -> None:
        go_on.set()
        real_close(timeout)

    monkeypatch.setattr(AppendFile, "append", append)
    with standing(handler):
        logger.info("accepted")
        sink._thread.shutdown(wait=False)
        sink._intake.refuse(sink._closed)  # as the end of the thread does before it writes the last batch
    writing.wait()
    monkeypatch.setattr(sink, "close", close)
    logger.info("late")
    go_on.set()
    handler.close()
    assert (tmp_path / "log").read_text().split() == ["accepted", "late"]


FORK = """
import logging, os, sys
import offload
log = logging.getLogger()
log.setLevel("INFO")
log.addHandler(offload.LogHandler(sys.argv[1]))
log.info("parent %d", 1)
for _ in range(2):
    log.handlers[0].flush()
    child = os.fork()
    if child == 0:
        log.info("child")
        logging.shutdown()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
if os.fork() == 0:
    sys.exit()  # a child that logs nothing has nothing to say
os.wait()
log.info("parent %d", 2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_logs_too(tmp_path: Path) -> None:
    """Parent and children write whole lines into the same file."""
    assert run_python(FORK, tmp_path / "log") == ""
    assert (tmp_path / "log").read_text().splitlines() == ["parent 1", "child", "child", "parent 2"]


def test_logging_config_can_make_one(tmp_path: Path) -> None:
    """A dictConfig names it like any handler, with the options of the sink."""
    code = """
import logging.config, sys
logging.config.dictConfig({
    "version": 1,
    "handlers": {"file": {"class": "offload.LogHandler", "path": sys.argv[1], "fsync": "interval"}},
    "root": {"handlers": ["file"], "level": "INFO"},
})
logging.info("configured")
"""
    run_python(code, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "configured\n"


def test_options_reach_the_sink(tmp_path: Path) -> None:
    """A misspelt option fails where the handler is made."""
    options: dict[str, Any] = {"fsnyc": "always"}
    with pytest.raises(TypeError, match="fsnyc"):
        LogHandler(tmp_path / "log", **options)
