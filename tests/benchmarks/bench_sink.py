"""What a line costs that is appended to a file, what it costs to know that it is on the disk, and an SQLite insert.

Lines: written one by one, one flush at the end.

The burst is what a program writes at once and the sink may hold; the long run is more than it may hold, so that its
writer has to wait for the disk again and again.

Durable: a hundred tasks, each of which writes a line and waits until that is on the disk, again and again; against an
fsync for each write. On a disk, not on tmpfs, where an fsync costs nothing.

SQLite: one call an insert, none awaited alone, in one transaction; against aiosqlite, where it is installed, awaited
in the same groups, and plain sqlite3 in the same thread.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiofiles
from measure import Figures, Options, Table, memory_folder, shuffled, tell

from offload import FileSink, Resource

LINE = b"x" * 99 + b"\n"
TASKS = 100
GROUP = 1000  # inserts under way at once
CREATE = "create table lines (number integer, text text)"
INSERT = "insert into lines values (?, ?)"


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
    return [table, durable(options), inserts(options)]


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


# --- durable writes ---------------------------------------------------------------------------------------------------


async def with_commits(path: Path, each: int) -> int:
    async def work() -> None:
        for _ in range(each):
            await sink.write(LINE)
            await sink.commit()

    async with FileSink(path) as sink:
        await asyncio.gather(*(work() for _ in range(TASKS)))
        return sink.stats().syncs


def with_fsync_each(path: Path, count: int) -> None:
    sync = getattr(os, "fdatasync", os.fsync)
    with open(path, "wb", buffering=0) as file:
        for _ in range(count):
            file.write(LINE)
            sync(file.fileno())


def durable(options: Options) -> Table:
    each, alone = options.count(50, 3), options.count(1_000, 50)
    rounds = options.round_count(7)
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="offload-bench-", dir=Path.cwd()) as folder:
        path = Path(folder) / "out"
        for i in range(rounds):
            tell(f"durable: round {i + 1} of {rounds}")
            for name in shuffled(["commit", "fsync"], i):
                path.unlink(missing_ok=True)
                start = time.perf_counter()
                if name == "commit":
                    syncs = asyncio.run(with_commits(path, each))
                    figures.add(name, "syncs", each * TASKS / syncs)
                else:
                    with_fsync_each(path, alone)
                writes = each * TASKS if name == "commit" else alone
                figures.add(name, "durable", (time.perf_counter() - start) / writes * 1e6)
    table = Table(f"Durable writes by {TASKS} tasks", ("µs a write", "durable", "over offload", "writes an fsync"))
    for name, title in (("commit", "offload FileSink.commit"), ("fsync", "one fsync a write")):
        row = (title, figures.show(name, "durable"), figures.ratio(name, "commit", "durable"))
        table.rows.append((*row, figures.show(name, "syncs") if name == "commit" else "1"))
    table.notes.append(f"{rounds} rounds; {each * TASKS:,} writes with commit, {alone:,} with one fsync each")
    return table


# --- SQLite -----------------------------------------------------------------------------------------------------------


async def with_resource(path: Path, count: int) -> None:
    async with Resource(lambda: sqlite3.connect(path)) as db:
        await db.call(sqlite3.Connection.execute, CREATE)
        for start in range(0, count, GROUP):
            numbers = range(start, min(start + GROUP, count))
            calls = [db.call(sqlite3.Connection.execute, INSERT, (number, "a line")) for number in numbers]
            await calls[-1]
        await db.call(sqlite3.Connection.commit)


async def with_aiosqlite(path: Path, count: int) -> None:
    aiosqlite: Any = importlib.import_module("aiosqlite")
    async with aiosqlite.connect(path) as db:
        await db.execute(CREATE)
        for start in range(0, count, GROUP):
            numbers = range(start, min(start + GROUP, count))
            await asyncio.gather(*(db.execute(INSERT, (number, "a line")) for number in numbers))
        await db.commit()


def with_plain_sqlite(path: Path, count: int) -> None:
    db = sqlite3.connect(path)
    db.execute(CREATE)
    for number in range(count):
        db.execute(INSERT, (number, "a line"))
    db.commit()
    db.close()


def inserts(options: Options) -> Table:
    contestants: dict[str, Callable[[Path, int], None]] = {
        "offload Resource": lambda path, count: asyncio.run(with_resource(path, count)),
        "aiosqlite": lambda path, count: asyncio.run(with_aiosqlite(path, count)),
        "plain sqlite3": with_plain_sqlite,
    }
    count, fewer = options.count(1_000_000, 10_000), options.count(100_000, 2_000)
    rounds = options.round_count(3)
    figures = Figures()
    table = Table("SQLite inserts, one call each", ("µs an insert", "insert", "over offload"))
    try:
        importlib.import_module("aiosqlite")
    except ImportError:
        del contestants["aiosqlite"]
        table.notes.append("aiosqlite is not installed")
    with memory_folder() as folder:
        path = folder / "db"
        for i in range(rounds):
            for name in shuffled(list(contestants), i):
                tell(f"sqlite: round {i + 1} of {rounds}, {name}")
                path.unlink(missing_ok=True)
                gc.collect()
                rows = fewer if name == "aiosqlite" else count
                start = time.perf_counter()
                contestants[name](path, rows)
                figures.add(name, "insert", (time.perf_counter() - start) / rows * 1e6)
                check_rows(path, rows)
    for name in contestants:
        row = (name, figures.show(name, "insert"), figures.ratio(name, "offload Resource", "insert"))
        table.rows.append(row)
    table.notes.append(f"{rounds} rounds; {count:,} inserts, {fewer:,} with aiosqlite, {GROUP:,} under way at once")
    return table


def check_rows(path: Path, count: int) -> None:
    db = sqlite3.connect(path)
    found = db.execute("select count(*) from lines").fetchone()[0]
    db.close()
    if found != count:
        raise RuntimeError(f"{found} rows in the table, expected {count}")
