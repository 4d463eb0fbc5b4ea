"""What holds for every test of threads and loops: it ends, it leaves nothing behind, and nothing complains unheard."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import importlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path("/proc/self/fd")
HANG = float(os.environ.get("OFFLOAD_TEST_HANG", "60"))


def give_up(config: pytest.Config, test: str) -> None:
    """Say where every thread and task stands, and end the process: a hung test cannot be ended in another way."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    with open(2, "w", closefd=False) as stderr:
        print(f"\n{test} hangs for {HANG} s", file=stderr, flush=True)
        faulthandler.dump_traceback(stderr, all_threads=True)
        for task in [thing for thing in gc.get_objects() if isinstance(thing, asyncio.Task) and not thing.done()]:
            task.print_stack(file=stderr)
    os._exit(1)


@pytest.fixture(autouse=True)
def watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that hangs fails with all stacks."""
    timer = threading.Timer(HANG, give_up, (request.config, request.node.nodeid))
    timer.name = "watchdog"
    timer.start()
    yield
    timer.cancel()
    timer.join()


@pytest.fixture(autouse=True, scope="session")
def first_uvloop() -> None:
    """The first uvloop of a process opens a pipe for signals that stays open."""
    with suppress(ImportError):
        importlib.import_module("uvloop").new_event_loop().close()


class _Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def complaints() -> Iterator[list[logging.LogRecord]]:
    """Errors logged by asyncio and offload; a test that expects some takes them out of the list."""
    handler = _Complaints()
    loggers = [logging.getLogger(name) for name in ("asyncio", "offload", "concurrent.futures")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.records
    for logger in loggers:
        logger.removeHandler(handler)


def _open() -> tuple[set[threading.Thread], dict[str, str]]:
    descriptors = {}
    for path in list(FOLDER.iterdir()) if FOLDER.is_dir() else []:
        with suppress(OSError):  # the one that listed them
            descriptors[path.name] = os.readlink(path)
    return set(threading.enumerate()), descriptors


@pytest.fixture(autouse=True)
def nothing_left(first_uvloop: None, watchdog: None, complaints: list[logging.LogRecord]) -> Iterator[None]:
    """After the test there are no more threads and descriptors than before, and no error was logged."""
    threads, descriptors = _open()
    yield
    for last_try in (False, True):
        threads_now, descriptors_now = _open()
        new_threads = [thread.name for thread in threads_now - threads]
        new_descriptors = [name for number, name in descriptors_now.items() if number not in descriptors]
        if not (new_threads or new_descriptors) or last_try:
            break
        gc.collect()
    assert not new_threads
    assert not new_descriptors
    assert not [record.getMessage() for record in complaints]
