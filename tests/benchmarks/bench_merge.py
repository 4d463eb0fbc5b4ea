"""Five files of 100-byte lines into one, on tmpfs: `offload merge` beside `cat` and rsyslog's imfile.

Whole programs, from before they start to after they have ended. rsyslog is a daemon, so for it the end is its
last write before it has nothing to do any more (the rest of its 64 KiB buffer comes when it is stopped, and counts as
written). `cat` neither knows which line came from where nor goes on after a crash: it is the floor.
What each wrote is read again and every line counted.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from measure import Figures, Options, Run, Table, memory_folder, offload_command, run_program, shuffled, tell

from offload.files.frame_source import FrameSource
from offload.packets.format import FrameType

FILES = 5
LINE_BYTES = 100
LOST = "lost / doubled / disordered"
_PADDING = b"x" * (LINE_BYTES - len(b"0 00000000 \n")) + b"\n"

RSYSLOG_CONFIG = """
global(workDirectory="{work}" maxMessageSize="64k")
module(load="imfile" mode="inotify")
template(name="raw" type="string" string="%$!metadata!filename%\\t%$!metadata!fileoffset%\\t%msg%\\n")
input(type="imfile" File="{sources}/*.log" Tag="x" addMetadata="on" reopenOnTruncate="on" persistStateInterval="1000"
      freshStartTail="off" ruleset="out")
ruleset(name="out"){{ action(type="omfile" file="{output}" template="raw" ioBufferSize="64k" flushOnTXEnd="off") }}
"""


def write_sources(folder: Path, lines: int) -> None:
    """Files of `lines` lines altogether; each line says which file and which line it is."""
    folder.mkdir()
    each = lines // FILES
    for file in range(FILES):
        with open(folder / f"{file}.log", "wb") as out:
            for at in range(0, each, 10_000):
                numbers = range(at, min(at + 10_000, each))
                out.write(b"".join(b"%d %08d %s" % (file, number, _PADDING) for number in numbers))


@dataclass
class Count:
    """What became of the lines."""

    lost: int
    doubled: int
    disordered: int
    damaged: int

    def __str__(self) -> str:
        text = f"{self.lost} / {self.doubled} / {self.disordered}"
        return f"{text}, {self.damaged} damaged" if self.damaged else text


def count(lines: Iterator[bytes], total: int) -> Count:
    """Look at every line; what a program puts before it does not matter."""
    each = total // FILES
    seen = [bytearray(each) for _ in range(FILES)]
    last = [-1] * FILES
    disordered = damaged = 0
    for line in lines:
        own = line[-LINE_BYTES:]
        if len(own) < LINE_BYTES or own[11:] != _PADDING:
            damaged += 1
            continue
        file, number = int(own[:1]), int(own[2:10])
        disordered += number < last[file]
        last[file] = number
        seen[file][number] = min(2, seen[file][number] + 1)
    return Count(sum(s.count(0) for s in seen), sum(s.count(2) for s in seen), disordered, damaged)


def packet_lines(path: Path) -> Iterator[bytes]:
    """The lines of a packet file. They all end in their frame here, so the frames can be taken one by one."""
    with FrameSource(path) as frames:
        for frame in frames:
            if frame.header.type is FrameType.LINES:
                yield from frame.lines()


def text_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file


# --- the programs ----------------------------------------------------------------------------------------------------


def run_offload(folder: Path, total: int) -> Run:
    sources, output = folder / "in", folder / "out"
    return run_program(*offload_command(), "merge", *names(sources), "-o", str(output), "--quiet")


def run_cat(folder: Path, total: int) -> Run:
    return run_program("cat", *names(folder / "in"), stdout=str(folder / "out"))


def run_rsyslog(folder: Path, total: int) -> Run:
    output, work, config, pid = (folder / name for name in ("out", "work", "rsyslog.conf", "rsyslog.pid"))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    config.write_text(RSYSLOG_CONFIG.format(work=work, sources=folder / "in", output=output))
    argv = [str(rsyslogd()), "-n", "-f", str(config), "-i", str(pid)]
    start = time.time()
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as daemon:
        try:
            size = settled_size(output, daemon)
            # The time of the last write, as the file system noted it: so looking costs the daemon nothing.
            seconds = output.stat().st_mtime - start
            cpu, rss = of_process(daemon.pid)
        finally:
            daemon.terminate()
    if (rest := output.stat().st_size - size) > 64 << 10:
        raise RuntimeError(f"rsyslog had {rest} bytes left to write when it seemed to be done")
    return Run(seconds, cpu, rss)


def settled_size(path: Path, writer: subprocess.Popen[bytes]) -> int:
    """The size of a file that has not grown for two seconds. What its writer's buffer still holds is not waited for."""
    size, since = -1, time.monotonic()
    while writer.poll() is None:
        time.sleep(0.05)
        now = path.stat().st_size if path.exists() else -1
        if now != size:
            size, since = now, time.monotonic()
        if size > 0 and time.monotonic() - since > 2:
            return size
    raise RuntimeError(f"rsyslogd ended with {writer.returncode}")


def of_process(pid: int) -> tuple[float, int]:
    """CPU seconds and peak memory of a process that runs."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), int(peak[1]) * 1024 if peak else 0


def rsyslogd() -> str | None:
    return shutil.which("rsyslogd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def names(folder: Path) -> list[str]:
    return sorted(map(str, folder.iterdir()))


# --- the tables ------------------------------------------------------------------------------------------------------


def run(options: Options) -> list[Table]:
    total = options.count(2_000_000, 50_000)
    tables = [compare(total, options.round_count(5))]
    if options.large:
        tables.append(large(options.count(20_000_000, 500_000)))
    return tables


def compare(total: int, rounds: int) -> Table:
    programs: dict[str, Callable[[Path, int], Run]] = {"offload merge": run_offload, "cat": run_cat}
    notes: list[str] = []
    if rsyslogd() and sys.platform == "linux":
        programs["rsyslog imfile"] = run_rsyslog
    else:
        notes.append("rsyslog is not installed: left out")
    figures, counts = Figures(), {name: Count(0, 0, 0, 0) for name in programs}
    with memory_folder() as folder:
        write_sources(folder / "in", total)
        for i in range(-1, rounds):  # the first one brings programs into the cache, and memory into the machine
            tell(f"merge: round {i + 1} of {rounds}")
            for name in shuffled(list(programs), i):
                (folder / "out").unlink(missing_ok=True)
                run = programs[name](folder, total)
                if i < 0:
                    read = packet_lines if name == "offload merge" else text_lines
                    counts[name] = count(read(folder / "out"), total)
                    continue
                add(figures, name, run, total)
    base = idle_interpreter()
    head = ("program", "s", "CPU s", "lines/s", "time over cat", "over offload", "peak MiB", LOST)
    table = Table(f"Merge of {FILES} files, {total:,} lines of {LINE_BYTES} bytes, on tmpfs", head)
    for name in programs:
        table.rows.append(
            (
                name,
                figures.show(name, "s"),
                figures.show(name, "CPU"),
                figures.show(name, "lines/s"),
                figures.ratio(name, "cat", "s"),
                figures.ratio(name, "offload merge", "s"),
                figures.show(name, "MiB"),
                str(counts[name]),
            )
        )
    over = figures.median("offload merge", "MiB") - base
    notes.append(f"offload's peak is {over:.1f} MiB over that of `python -c pass` ({base:.1f} MiB)")
    notes.append(f"{rounds} rounds; lines were counted in one more, before them")
    notes.append("rsyslog with mode=inotify and persistStateInterval=1000; offload with its default, --fsync interval")
    table.notes += notes
    return table


def large(total: int) -> Table:
    """Does memory stay the same however large the input?"""
    tell(f"merge: {total:,} lines")
    table = Table(f"Merge of {FILES} files, {total:,} lines", ("program", "s", "CPU s", "peak MiB", LOST))
    need = 2 * total * (LINE_BYTES + 1)
    with memory_folder() as folder:
        if shutil.disk_usage(folder).free < need:
            table.notes.append(f"left out: it needs {need / 1e9:.1f} GB of room")
            return table
        write_sources(folder / "in", total)
        done = run_offload(folder, total)
        counted = count(packet_lines(folder / "out"), total)
        row = ("offload merge", f"{done.seconds:.2f}", f"{done.cpu:.2f}", f"{done.rss / 2**20:.1f}", str(counted))
        table.rows.append(row)
        table.notes.append(f"peak is {done.rss / 2**20 - idle_interpreter():.1f} MiB over that of `python -c pass`")
    return table


def add(figures: Figures, name: str, run: Run, total: int) -> None:
    figures.add(name, "s", run.seconds)
    figures.add(name, "CPU", run.cpu)
    figures.add(name, "MiB", run.rss / 2**20)
    figures.add(name, "lines/s", total / run.seconds)


def idle_interpreter() -> float:
    """MiB of a Python that does nothing."""
    return run_program(sys.executable, "-c", "pass").rss / 2**20
