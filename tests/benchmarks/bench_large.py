"""Inputs from 10 MB to 10 GB: does memory stay the same, and how long until a large packet file can be written again?

`offload merge` of five files, whole processes, with `cat` beside it, which writes the same bytes and keeps nothing.
Then the packet file is opened again as a writer opens it, in this process: as it was closed, and cut off in the middle
of a frame, as a power cut leaves it. What that reads of it is counted by the system (/proc/self/io); "cold": the system
was asked to forget the file before. Beside it what a program needs that reads all of it.

Up to 1 GB by default, 10 GB with --large; twice that has to be free where TMPDIR leads. Takes 2 and 10 minutes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_merge import FILES, LINE_BYTES, idle_interpreter, names, run_cat, run_offload, write_sources
from measure import Figures, Options, Table, tell

from offload.files.packet_file import PacketFile
from offload.merge.split import stat

SIZES = (10_000_000, 100_000_000, 1_000_000_000)
LARGE = 10_000_000_000
TORN = 20_000_000  # bytes cut off the end: some COMMITs, and a frame in two
READ = 1 << 20


def run(options: Options) -> list[Table]:
    sizes = [*SIZES[: 1 if options.quick else None], *([LARGE] if options.large else [])]
    rounds = options.round_count(3)
    head: tuple[str, ...] = (
        "bytes of logs",
        "s",
        "cat, s",
        "over cat",
        "MB/s",
        "CPU s",
        "peak MiB over `pass`",
        "lines",
    )
    merges = Table(f"Merge of {FILES} files, on the disk", head)
    head = ("packet file", "ms", "cold, ms", "bytes read", "all of it, s")
    opens = Table("A packet file opened for writing again", head)
    figures = Figures()
    for size in sizes:
        need = 2 * size + (1 << 30)
        if shutil.disk_usage(tempfile.gettempdir()).free < need:
            merges.notes.append(f"{size:,} bytes left out: they need {need / 1e9:.0f} GB of room in TMPDIR")
            continue
        with folder() as place:
            measure(place, size, rounds if size <= SIZES[-1] else 1, figures, merges, opens)
    merges.notes.append(f"{rounds} rounds, of 10 GB one; `pass` has {idle_interpreter():.1f} MiB")
    opens.notes.append(f"torn: {TORN:,} bytes were cut off, amid a frame")
    return [merges, opens]


@contextmanager
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="offload-bench-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def measure(place: Path, size: int, rounds: int, figures: Figures, merges: Table, opens: Table) -> None:
    total, name, output = size // LINE_BYTES, f"{size:,}", place / "out"
    tell(f"large: {size:,} bytes")
    write_sources(place / "in", total)
    base = idle_interpreter()
    for _ in range(rounds):
        for program, run_it in (("cat", run_cat), ("offload", run_offload)):
            output.unlink(missing_ok=True)
            os.sync()  # what one of them left to be written is not the other's work
            done = run_it(place, total)
            figures.add(f"{program} {name}", "s", done.seconds)
            figures.add(f"{program} {name}", "CPU", done.cpu)
            figures.add(f"{program} {name}", "MB/s", size / 1e6 / done.seconds)
            figures.add(f"{program} {name}", "MiB", done.rss / 2**20 - base)
    lines = stat(output).lines
    if lines != total // FILES * FILES:
        raise RuntimeError(f"{lines:,} lines arrived of {total:,}")
    ours, cats = f"offload {name}", f"cat {name}"
    ratio = figures.ratio(ours, cats, "s")
    shown = [figures.show(ours, "s"), figures.show(cats, "s"), ratio, figures.show(ours, "MB/s")]
    merges.rows.append((name, *shown, figures.show(ours, "CPU"), figures.show(ours, "MiB"), f"{lines:,}"))
    for path in names(place / "in"):
        os.unlink(path)
    opened(output, f"{name}, as it was closed", rounds, figures, opens)
    if size > 2 * TORN:
        os.truncate(output, output.stat().st_size - TORN)
        opened(output, f"{name}, torn", rounds, figures, opens)


def opened(path: Path, name: str, rounds: int, figures: Figures, opens: Table) -> None:
    """Open it as a writer does, as it is; what is torn is torn again before the next time."""
    end = max(0, path.stat().st_size - 2 * TORN)
    with path.open("rb") as file:
        file.seek(end)
        torn = file.read()
    for _ in range(max(3, rounds)):
        for quantity, forget in (("cold", True), ("ms", False)):
            with path.open("rb+") as file:  # as it was, for opening it cuts what is torn
                file.seek(end)
                file.write(torn)
                file.flush()
                os.fsync(file.fileno())
                if forget and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            before, start = bytes_read(), time.perf_counter()
            writer = PacketFile(path)
            figures.add(name, quantity, time.perf_counter() - start)
            figures.add(name, "read", bytes_read() - before)
            writer.close(broken=True)  # without a COMMIT of its own
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(READ)
        while file.readinto(buffer):
            pass
    figures.add(name, "all", time.perf_counter() - start)
    read = f"{figures.median(name, 'read'):,.0f}" if sys.platform == "linux" else "–"
    shown = [figures.show(name, "ms", 1e3), figures.show(name, "cold", 1e3), read, figures.show(name, "all")]
    opens.rows.append((name, *shown))


def bytes_read() -> int:
    """What this process has read so far, from disk or memory."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
