"""How soon a line that is written to a log can be read from the packet file, and what waiting for lines costs.

The line carries the time at which it was written; a reader in this process looks for it in the output, each
0.2 ms. GNU tail, which follows too and keeps nothing of where lines came from, does the same beside it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import Options, Table, environment, memory_folder, number, offload_command, tell

from offload.files.frame_source import FrameSource
from offload.packets.format import FrameType

LOOK = 0.0002
PAUSE = 0.01  # between two lines, on average
PATIENCE = 30.0


@contextmanager
def running(argv: list[str], stdout: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program that ends when it is asked to."""
    with open(stdout or os.devnull, "wb") as out, subprocess.Popen(argv, stdout=out, env=environment()) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


# --- latency ---------------------------------------------------------------------------------------------------------


def write_lines(path: Path, lines: int) -> None:
    """Lines at random times, as from a program that logs what happens to it."""
    clock = random.Random(lines)
    with open(path, "ab", buffering=0) as log:
        for _ in range(lines):
            time.sleep(clock.expovariate(1 / PAUSE))
            log.write(b"%d\n" % time.perf_counter_ns())


def latencies(read: Callable[[], list[bytes]], path: Path, lines: int) -> list[float]:
    """Milliseconds of each line, from before it was written to when it could be read."""
    path.touch()
    writer = threading.Thread(target=write_lines, args=(path, lines))
    found: list[float] = []
    deadline = time.monotonic() + PATIENCE + 2 * lines * PAUSE
    writer.start()
    while len(found) < lines:
        got = read()
        now = time.perf_counter_ns()
        found += [(now - int(line)) / 1e6 for line in got]
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(found)} of {lines} lines arrived")
        time.sleep(LOOK)
    writer.join()
    return found


def wait_for(seen: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not seen():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not happen")
        time.sleep(0.01)


def offload_latencies(folder: Path, lines: int) -> list[float]:
    log, output = folder / "in" / "a.log", folder / "out.opk"
    log.parent.mkdir()
    log.write_text("0\n")
    with running([*offload_command(), "merge", "-f", str(log.parent), "-o", str(output), "--quiet"]):
        wait_for(lambda: output.exists() and output.stat().st_size > 0, "a first frame")
        with FrameSource(output, follow=True) as frames:

            def read() -> list[bytes]:
                batch = frames.read() or ()
                return [line for f in batch if f.header.type is FrameType.LINES for line in f.lines() if line != b"0\n"]

            return latencies(read, log, lines)


def tail_latencies(folder: Path, lines: int) -> list[float]:
    log, output = folder / "tail.log", folder / "tail.out"
    log.write_text("0\n")
    with running(["tail", "-n", "+1", "-F", "-q", str(log)], stdout=output):
        wait_for(lambda: output.stat().st_size > 0, "a first line of tail")
        with open(output, "rb") as file:
            return latencies(lambda: [line for line in file.readlines() if line != b"0\n"], log, lines)


# --- idle ------------------------------------------------------------------------------------------------------------


def idle_share(folder: Path, files: int, seconds: float) -> float:
    """Percent of one CPU that `offload merge -f` uses while nothing happens."""
    sources, output = folder / "many", folder / "many.opk"
    sources.mkdir()
    for i in range(files):
        (sources / f"{i}.log").write_text(f"file {i}\n")
    with running([*offload_command(), "merge", "-f", str(sources), "-o", str(output), "--quiet"]) as process:
        wait_for(lambda: output.exists() and output.stat().st_size > 0, "a first frame")
        time.sleep(2.0)  # past the first look at everything
        before, start = cpu_seconds(process.pid), time.perf_counter()
        time.sleep(seconds)
        return 100 * (cpu_seconds(process.pid) - before) / (time.perf_counter() - start)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the tables ------------------------------------------------------------------------------------------------------


def run(options: Options) -> list[Table]:
    lines, rounds = options.count(600, 60), options.round_count(3)
    followers: dict[str, Callable[[Path, int], list[float]]] = {"offload merge -f": offload_latencies}
    if shutil.which("tail"):
        followers["tail -F"] = tail_latencies
    found: dict[str, list[float]] = {name: [] for name in followers}
    for i in range(rounds):
        tell(f"follow: round {i + 1} of {rounds}")
        for name, follower in followers.items():
            with memory_folder() as folder:
                found[name] += follower(folder, lines)
    latency = Table("Line written to line readable, ms", ("follower", "p50", "p90", "p99", "largest"))
    for name, values in found.items():
        cuts = statistics.quantiles(values, n=100)
        latency.rows.append((name, *(number(v) for v in (cuts[49], cuts[89], cuts[98], max(values)))))
    latency.notes.append(f"{rounds} rounds of {lines} lines, {PAUSE * 1e3:.0f} ms apart on average, at random")
    latency.notes.append("read by FrameSource(follow=True), or from tail's output, with a look each 0.2 ms")
    return [latency, idle(options)]


def idle(options: Options) -> Table:
    files, seconds = options.count(1_000, 50), options.count(10, 1)
    table = Table("CPU while nothing happens", ("what", "% of one CPU"))
    if sys.platform != "linux":
        table.notes.append("left out: it needs /proc")
        return table
    tell(f"follow: {seconds} s of nothing")
    with memory_folder() as folder:
        share = idle_share(folder, files, seconds)
    table.rows.append((f"offload merge -f, {files:,} files", number(share)))
    step = 100 / os.sysconf("SC_CLK_TCK") / seconds
    table.notes.append(f"over {seconds} s; the system counts in steps of {step:.1f} %")
    return table
