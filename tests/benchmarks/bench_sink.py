"""What a line costs that is appended to a file: written one by one, one flush at the end.

The burst is what a program writes at once and the sink may hold; the long run is more than it may hold, so that its
writer has to wait for the disk again and again.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from pathlib import Path

import aiofiles
from measure import Figures, Options, Table, memory_folder, shuffled, tell

from offload import FileSink

LINE = b"x" * 99 + b"\n"


async def with_sink(path: Path, lines: int) -> float:
    async with FileSink(path) as sink:
        start = time.perf_counter()
        for _ in range(lines):
            await sink.write(LINE)
        await sink.flush()
        return time.perf_counter() - start


async def with_aiofiles(path: Path, lines: int) -> float:
    async with aiofiles.open(path, "wb") as file:
        start = time.perf_counter()
        for _ in range(lines):
            await file.write(LINE)
        await file.flush()
        return time.perf_counter() - start


def with_plain_file(path: Path, lines: int) -> float:
    with open(path, "wb") as file:
        start = time.perf_counter()
        for _ in range(lines):
            file.write(LINE)
        file.flush()
        return time.perf_counter() - start


CONTESTANTS: dict[str, Callable[[Path, int], float]] = {
    "offload FileSink": lambda path, lines: asyncio.run(with_sink(path, lines)),
    "aiofiles": lambda path, lines: asyncio.run(with_aiofiles(path, lines)),
    "plain buffered file": with_plain_file,
}


def run(options: Options) -> list[Table]:
    burst, long = options.count(20_000, 1_000), options.count(500_000, 50_000)
    rounds = options.round_count(7)
    figures = Figures()
    with memory_folder() as folder:
        for i in range(rounds):
            tell(f"sink: round {i + 1} of {rounds}")
            one_round(figures, folder / "out", shuffled(list(CONTESTANTS), i), burst, long)
    head = ("µs a line", "burst", "over offload", "long run", "over offload")
    table = Table("Lines of 100 bytes into a file, one flush at the end", head)
    for name in CONTESTANTS:
        table.rows.append(
            (
                name,
                figures.show(name, "burst"),
                figures.ratio(name, "offload FileSink", "burst"),
                figures.show(name, "long"),
                figures.ratio(name, "offload FileSink", "long"),
            )
        )
    table.notes.append(f"{rounds} rounds; burst: {burst:,} lines; long run: {long:,} lines, without aiofiles")
    table.notes.append("a plain file blocks the loop while the disk is slow; the other two never do")
    return [table]


def one_round(figures: Figures, path: Path, order: list[str], burst: int, long: int) -> None:
    for name in order:
        for quantity, lines in (("burst", burst), ("long", long)):
            if quantity == "long" and name == "aiofiles":
                continue
            path.unlink(missing_ok=True)
            gc.collect()
            figures.add(name, quantity, CONTESTANTS[name](path, lines) / lines * 1e6)
            if (size := path.stat().st_size) != lines * len(LINE):
                raise RuntimeError(f"{name} wrote {size} bytes, expected {lines * len(LINE)}")
