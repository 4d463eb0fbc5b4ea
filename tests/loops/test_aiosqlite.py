"""aiosqlite, its worker thread swapped for a LoopThread, passes the tests that it ships."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import offload

PINNED = "aiosqlite==0.22.1"

# aiosqlite's connection puts (future, function) into a queue that its own thread takes from. Here what is put goes to a
# LoopThread instead; nothing else of aiosqlite is touched. Its thread runs what is put before it is started as soon as
# it is, so this queue keeps that much.
SWAP = '''
import sys
import threading
import unittest

import aiosqlite.core as core
from offload import LoopThread

used = []


class Transport:
    """Stands for a connection's queue and its thread: `put_nowait` and `empty` of one, `start` of the other."""

    def __init__(self):
        self._thread = LoopThread("aiosqlite")
        used.append(self._thread)
        self._early = []
        self._started = False

    def start(self):
        self._thread.__enter__()
        self._started = True
        for item in self._early:
            self.put_nowait(item)
        self._early.clear()

    def put_nowait(self, item):
        if not self._started:
            self._early.append(item)
            return
        future, function = item
        self._thread.submit(self._work, future, function)
        if getattr(function, "__name__", "") == "close_and_stop":  # their worker ends behind it; ours drains, then ends
            self._thread.shutdown(wait=False)

    def empty(self):
        return not self._thread.stats().queued and not self._early

    def _work(self, future, function):
        try:
            result = function()
        except BaseException as error:
            answer = core.set_exception, future, error
        else:
            answer = core.set_result, future, result
        if future:
            future.get_loop().call_soon_threadsafe(*answer)


def connection(self, *arguments, **options):
    real(self, *arguments, **options)
    self._tx = self._thread = Transport()


real, core.Connection.__init__ = core.Connection.__init__, connection
core._connection_worker_thread = None  # theirs cannot run

result = unittest.main("aiosqlite.tests", argv=["aiosqlite", *sys.argv[1:]], exit=False).result
for thread in used:
    assert thread.closed, f"{thread} was left open by aiosqlite"
    thread.shutdown(wait=True)
left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
assert not left, f"threads are left: {left}"
print(f"{sum(thread.stats().submitted > 0 for thread in used)} threads of offload were used")
sys.exit(not result.wasSuccessful())
'''


@pytest.fixture(name="wheel", scope="module")
def install_aiosqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pinned aiosqlite, which has its tests in its wheel."""
    folder = tmp_path_factory.mktemp("aiosqlite")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), PINNED]
    options = ["--retries", "1", "--timeout", "10", "--disable-pip-version-check", "--only-binary", ":all:"]
    result = subprocess.run([*install, *options], capture_output=True, text=True, check=False)
    if not (folder / "aiosqlite" / "tests").is_dir():
        reason = f"{PINNED} cannot be had: {result.stderr.strip()[-300:]}"
        if os.environ.get("OFFLOAD_REQUIRE_PEERS"):
            pytest.fail(f"{reason}, and OFFLOAD_REQUIRE_PEERS is set", pytrace=False)
        pytest.skip(reason)
    return folder


@pytest.mark.slow
def test_the_smoke_tests_of_aiosqlite_pass_on_a_loop_thread(wheel: Path, tmp_path: Path) -> None:
    """All its shipped tests pass when each connection's worker is a LoopThread, and no thread is left."""
    program = tmp_path / "on_a_loop_thread.py"
    program.write_text(SWAP)
    # One of their tests closes a loop of its own, then has asyncio make another, which nobody closes.
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-W", "ignore::ResourceWarning", str(program), "-v"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(wheel), str(Path(offload.__file__).parents[1])))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    print(result.stdout[-4000:], result.stderr[-4000:])
    assert result.returncode == 0
    assert "Exception ignored" not in result.stderr
    ran = re.search(r"Ran (\d+) tests", result.stderr)
    used = re.search(r"(\d+) threads of offload were used", result.stdout)
    assert ran is not None
    assert used is not None
    assert int(ran[1]) == 30
    assert int(used[1]) >= 30
