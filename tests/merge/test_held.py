"""What is held open although nobody has a name for it: counted, and given up where it is too much, never in silence."""

# ruff: noqa: ASYNC240 - these files are small, and the loop has nothing else to do

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from offload.files.packet_file import PacketFile
from offload.merge.audit import verify
from offload.merge.engine import Merge
from offload.merge.torture import read_lines

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files that are deleted while they are open")

AMPLE = 60.0
LINES = [b"%d of the lines of a log, all of them different\n" % number for number in range(400)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(AMPLE):
        while not condition():  # noqa: ASYNC110 - a count that another thread keeps; it has no event
            await asyncio.sleep(0.002)


class Output:
    """Holds the packet file's writer back until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.blocked, write = threading.Event(), threading.Event(), PacketFile.append

        def slow(file: PacketFile, *args: Any) -> None:
            self.blocked.set()
            assert self.gate.wait(AMPLE)
            write(file, *args)

        monkeypatch.setattr(PacketFile, "append", slow)
        monkeypatch.setattr("offload.merge.batches.ARENAS", 1)
        monkeypatch.setattr("offload.merge.engine._LOOK", 0.01)


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Output:
    return Output(monkeypatch)


@asynccontextmanager
async def following(out: Path, logs: Path, output: Output, max_held: int | None) -> AsyncIterator[Merge]:
    async with Merge([str(logs / "*.log")], out, follow=True, max_held=max_held) as engine:
        running = asyncio.ensure_future(engine.run())
        try:
            yield engine
        finally:
            output.gate.set()
            engine.stop()
            async with asyncio.timeout(AMPLE):
                await running


async def replace(engine: Merge, path: Path, lines: list[bytes]) -> None:
    """Delete the log and make it anew, and wait until that was opened."""
    path.unlink()
    path.write_bytes(b"".join(lines))
    status = path.stat()
    identity = status.st_dev, status.st_ino
    await until(lambda: identity in engine._tails[str(path)].identities)


async def test_held_bytes_are_counted_and_read_once_there_is_room(tmp_path: Path, output: Output) -> None:
    """Without a limit nothing is given up, however slow the output is: what is deleted is held, told and then read."""
    path, out = tmp_path / "app.log", tmp_path / "merged.opk"
    path.write_bytes(b"".join(LINES[:100]))
    async with following(out, tmp_path, output, None) as engine:
        await until(output.blocked.is_set)
        await replace(engine, path, LINES[100:200])
        path.unlink()
        size = sum(map(len, LINES[100:200]))
        await until(lambda: engine.progress.held_bytes == size)
        output.gate.set()
        await until(lambda: engine.progress.lines == 200 and not engine.progress.held_bytes)
    assert list(read_lines(out)) == LINES[:200]
    assert verify(out).gaps == []


async def test_what_is_over_the_limit_is_given_up_with_a_gap(tmp_path: Path, output: Output) -> None:
    """The oldest goes first, its descriptor is closed at once, and a GAP tells which bytes are gone."""
    path, out = tmp_path / "app.log", tmp_path / "merged.opk"
    path.write_bytes(b"".join(LINES[:100]))
    size = sum(map(len, LINES[100:200]))
    async with following(out, tmp_path, output, size + 100) as engine:
        await until(output.blocked.is_set)
        await replace(engine, path, LINES[100:200])
        gone = path.stat().st_ino
        await replace(engine, path, LINES[200:300])
        assert engine.progress.gaps == 0
        path.unlink()
        tail = engine._tails[str(path)]
        await until(lambda: gone not in {inode for _, inode in tail.identities})
        await until(lambda: engine.progress.held_bytes == sum(map(len, LINES[200:300])))
        path.write_bytes(LINES[300])
        output.gate.set()
        await until(lambda: engine.progress.lines == 201)
    assert list(read_lines(out)) == [*LINES[:100], *LINES[200:301]]
    found = verify(out)
    assert found.ok
    assert [gap[:4] for gap in found.gaps] == [("app.log", 0, size, "given_up")]


async def test_what_was_read_in_part_is_given_up_from_there_on(tmp_path: Path, output: Output) -> None:
    """The GAP begins where the packet file ends, also for a file that is in the middle of being read."""
    path, out = tmp_path / "app.log", tmp_path / "merged.opk"
    path.write_bytes(b"".join(LINES[:100]))
    async with following(out, tmp_path, output, 10) as engine:
        await until(output.blocked.is_set)
        with path.open("ab") as file:
            file.write(b"".join(LINES[100:200]))
        path.unlink()
        tail = engine._tails[str(path)]
        await until(lambda: not tail.is_open)
        await until(lambda: engine.progress.held_bytes == 0)
        path.write_bytes(LINES[300])
        output.gate.set()
        await until(lambda: engine.progress.lines == 101)
    assert list(read_lines(out)) == [*LINES[:100], LINES[300]]
    start, end = sum(map(len, LINES[:100])), sum(map(len, LINES[:200]))
    assert [gap[:4] for gap in verify(out).gaps] == [("app.log", start, end, "given_up")]
