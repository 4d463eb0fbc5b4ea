"""What watching a loop costs, and what each detector finds: offload beside asyncio's debug mode and its peers.

    overhead    each contestant has a new process in each round; they work in turn, for a fiftieth of a second each, in
                changing order: first wherever the system puts them, then all bound to one core
    idle        a process whose loops do nothing, or next to nothing; all contestants at the same time
    scenarios   `scenarios.py`: each contestant meets each of them alone, in a new process

CPU time is of the whole process, so a detector's own threads count; what other programs on the machine do does not. The
clock counts both, and is shown beside it. Differences and percentages are taken from plain asyncio in the same round,
and plain asyncio takes part twice, so that chance has a row of its own.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple

from detectors import AGAIN, CONTESTANTS, COUNTING_NOTHING, DETECTORS, OFFLOAD, PLAIN, UNMEASURED, prepare
from measure import Figures, Options, Table, cpus, environment, number, shuffled, tell
from scenarios import SCENARIOS

FOLDER = Path(__file__).parent
PATIENCE = 60.0
SETTLE = 0.5  # before idleness is measured: what was busy has come to rest
Work = Callable[[int], Awaitable[object]]

# --- work for a loop; in a process of its own -------------------------------------------------------------------------


async def turning() -> Work:
    async def work(count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    return work


async def calling() -> Work:
    call_soon = asyncio.get_running_loop().call_soon

    def nothing() -> None:
        pass

    async def work(count: int) -> None:
        for _ in range(count // 100):
            for _ in range(100):
                call_soon(nothing)
            await asyncio.sleep(0)

    return work


class Echo(asyncio.Protocol):
    """Sends back what it receives, until it has done so often enough."""

    transport: asyncio.Transport
    left = -1

    def __init__(self) -> None:
        self.done = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.left -= 1
        if self.left == 0:
            self.done.set()
        else:
            self.transport.write(data)


async def echoing() -> Work:
    loop = asyncio.get_running_loop()
    near, far = socket.socketpair()
    await loop.create_connection(Echo, sock=far)
    _, echo = await loop.create_connection(Echo, sock=near)

    async def work(count: int) -> None:
        echo.left = count
        echo.done.clear()
        echo.transport.write(b"x" * 100)
        await echo.done.wait()

    return work


async def computing() -> Work:
    async def work(count: int) -> None:
        for _ in range(count):
            total = 0
            for n in range(8_000):
                total += n * n
            await asyncio.sleep(0)

    return work


class Workload(NamedTuple):
    title: str
    unit: str
    scale: float  # of a nanosecond
    make: Callable[[], Awaitable[Work]]
    block: int  # how often it is done between two looks at the clock


WORKLOADS = {
    "turn": Workload("An empty turn: `sleep(0)`", "ns", 1, turning, 200),
    "callback": Workload("A callback, 100 in a turn: `call_soon`", "ns", 1, calling, 500),
    "echo": Workload("Socket echo: 100 bytes there and back, two protocols, two turns", "µs", 1e-3, echoing, 50),
    "compute": Workload("Some 0.4 ms of Python, then `sleep(0)`", "µs", 1e-3, computing, 2),
}


async def cost(work: Work, block: int, seconds: float) -> tuple[float, float]:
    """Nanoseconds of CPU and by the clock, each time."""
    count = 0
    cpu, start = time.process_time(), time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        await work(block)
        count += block
    return (time.process_time() - cpu) / count * 1e9, took / count * 1e9


def idle(seconds: float) -> tuple[float, float]:
    """Share of a core, in percent; by the clock it is all. On another thread, so that no loop wakes meanwhile."""
    time.sleep(SETTLE)
    cpu, start = time.process_time(), time.perf_counter()
    time.sleep(seconds)
    return (time.process_time() - cpu) / (time.perf_counter() - start) * 100, 100.0


def bind_to_one_core() -> None:
    """All threads of this process."""
    for thread in threading.enumerate():
        if thread.native_id is not None:
            os.sched_setaffinity(thread.native_id, cpus()[:1])


FOR_ONE_LOOP = ("pyleak",)  # switched on on each loop, for that is how it watches several


async def tick(period: float) -> None:
    while True:  # noqa: ASYNC110  # waking is what it is there for
        await asyncio.sleep(period)


async def watched_tick(contestant: str, period: float) -> None:
    async with CONTESTANTS[contestant if contestant in FOR_ONE_LOOP else PLAIN]([]):
        await tick(period)


async def serve(contestant: str, loops: int, period: float) -> None:
    """Do as each line of the input says, and print what it cost."""
    async with CONTESTANTS[contestant]([]):
        for _ in range(loops - 1):
            threading.Thread(target=lambda: asyncio.run(watched_tick(contestant, period)), daemon=True).start()
        ticks = asyncio.create_task(tick(period))
        await asyncio.sleep(0.3)
        works = {key: (await workload.make(), workload.block) for key, workload in WORKLOADS.items()}
        for work, block in works.values():
            await work(block)
        gc.collect()
        gc.freeze()
        print("ready", flush=True)
        while command := (await asyncio.to_thread(sys.stdin.readline)).split():
            what, *args = command
            if what == "bind":
                bind_to_one_core()
                print("bound", flush=True)
                continue
            seconds = float(args[0])
            answer = await (asyncio.to_thread(idle, seconds) if what == "idle" else cost(*works[what], seconds))
            print(json.dumps(answer), flush=True)
        assert not ticks.done()
        os._exit(0)  # the other loops have no end


# --- rounds -----------------------------------------------------------------------------------------------------------


class Field:
    """The contestants that are here, and what became of those that are not: their row says so, and a note why."""

    def __init__(self, names: Iterable[str]) -> None:
        everyone = list(names)
        self.names = [name for name in everyone if self._is_here(name)]
        self.notes = [f"{name} is not installed, and left out" for name in everyone if name not in self.names]
        self.broken: dict[str, str] = {}

    @staticmethod
    def _is_here(name: str) -> bool:
        return name.startswith((OFFLOAD, "plain", "asyncio")) or importlib.util.find_spec(name) is not None

    def cells(self, name: str, cells: list[str]) -> list[str]:
        return ["error"] * len(cells) if name in self.broken else cells

    def all_notes(self) -> list[str]:
        return self.notes + [f"{name}: error: {why}" for name, why in self.broken.items()]


class ChildError(Exception):
    """A process of ours failed; the text is its last line."""


class Round:
    """A process for each contestant, all at the same time; they are asked in an order of this round's own.

    A contestant whose process fails is out of this round and of all to come.
    """

    def __init__(self, field: Field, number_: int, loops: int = 1, period: float = 3600.0) -> None:
        self._field = field
        self._number = number_
        self._processes: dict[str, subprocess.Popen[str]] = {}
        for name in field.names:
            if name not in field.broken:
                argv = [sys.executable, __file__, name, str(loops), str(period)]
                self._processes[name] = subprocess.Popen(
                    argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, env=environment()
                )
        for name in list(self._processes):
            self._answer(name)

    def each(self, command: str) -> Iterator[tuple[str, Any]]:
        """One after the other."""
        self._number += 1
        for name in shuffled(list(self._processes), self._number):
            self._tell(name, command)
            if (answer := self._answer(name)) is not None:
                yield name, answer

    def all(self, command: str) -> Iterator[tuple[str, Any]]:
        """All at once."""
        for name in list(self._processes):
            self._tell(name, command)
        for name in list(self._processes):
            if (answer := self._answer(name)) is not None:
                yield name, answer

    def end(self) -> None:
        for process in self._processes.values():
            process.communicate()

    def _tell(self, name: str, command: str) -> None:
        stdin = self._processes[name].stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # it has ended; its answer says so
            stdin.write(f"{command}\n")
            stdin.flush()

    def _answer(self, name: str) -> Any:
        process = self._processes[name]
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            _, err = self._processes.pop(name).communicate()
            self._field.broken[name] = (err.strip().splitlines() or ["it ended without a word"])[-1]
            return None
        return json.loads(line) if line.startswith("[") else line


def add_round(figures: Figures, found: dict[tuple[str, str], float]) -> None:
    """Book each figure, and how much it is over that of plain asyncio."""
    for (name, quantity), value in found.items():
        figures.add(name, quantity, value)
        if name != PLAIN:
            plain = found[PLAIN, quantity]
            figures.add(name, f"{quantity}: more", value - plain)
            figures.add(name, f"{quantity}: percent", (value / plain - 1) * 100)


FREE, BOUND = "free", "bound"
STATES = (FREE, BOUND) if hasattr(os, "sched_setaffinity") else (FREE,)


def overhead(options: Options) -> list[Table]:
    rounds, slices, seconds = options.round_count(30), options.count(3, 1), 0.02
    field = Field(CONTESTANTS)
    figures = Figures()
    for i in range(rounds):
        tell(f"detector: overhead, round {i + 1} of {rounds}")
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        contestants = Round(field, i)
        for state in STATES:
            if state == BOUND:
                list(contestants.all("bind"))
            for key, workload in slices * list(WORKLOADS.items()):
                for name, (cpu, clock) in contestants.each(f"{key} {seconds}"):
                    found[name, f"{state} {key} CPU"].append(cpu * workload.scale)
                    found[name, f"{state} {key} clock"].append(clock * workload.scale)
        contestants.end()
        add_round(figures, {what: statistics.median(values) for what, values in found.items()})
    tables = [overhead_table(key, workload, field, figures) for key, workload in WORKLOADS.items()]
    tables[-1].notes = [
        f"{rounds} rounds of {slices} times {seconds * 1e3:.0f} ms, of which the median counts; CPU time of the "
        f'process but for one column; what "{AGAIN}" has over plain is what this machine cannot tell from nothing',
        *field.all_notes(),
    ]
    return tables


def overhead_table(key: str, workload: Workload, field: Field, figures: Figures) -> Table:
    head = (workload.unit, "CPU", "over plain", "%", "by the clock, %", "one core: over plain", "one core: %")
    table = Table(f"Overhead. {workload.title}", head)
    for name in field.names:
        cells = [
            figures.show(name, f"{FREE} {key} CPU"),
            figures.show(name, f"{FREE} {key} CPU: more"),
            figures.show(name, f"{FREE} {key} CPU: percent"),
            figures.show(name, f"{FREE} {key} clock: percent"),
            figures.show(name, f"{BOUND} {key} CPU: more"),
            figures.show(name, f"{BOUND} {key} CPU: percent"),
        ]
        table.rows.append((name, *field.cells(name, cells)))
    return table


class Idle(NamedTuple):
    title: str
    loops: int
    period: float  # seconds after which each loop wakes


IDLE = (
    Idle("1 loop, asleep", 1, 3600.0),
    Idle("1 loop, wakes 10 times a second", 1, 0.1),
    Idle("32 loops, asleep", 32, 3600.0),
    Idle("32 loops, each wakes twice a second", 32, 0.5),
)


def idle_table(options: Options) -> Table:
    rounds, seconds = options.count(5, 1), options.count(2, 1)
    field = Field(name for name in CONTESTANTS if name not in (AGAIN, COUNTING_NOTHING))
    figures = Figures()
    for i in range(rounds):
        tell(f"detector: idle, round {i + 1} of {rounds}")
        shares: dict[tuple[str, str], float] = {}
        for kind in IDLE:
            contestants = Round(field, i, kind.loops, kind.period)
            shares |= {(name, kind.title): cpu for name, (cpu, _) in contestants.all(f"idle {seconds}")}
            contestants.end()
        add_round(figures, shares)
    table = Table("Idle. CPU time, % of one core", ("", *(kind.title for kind in IDLE)))
    for name in field.names:
        cells = [figures.show(name, kind.title if name == PLAIN else f"{kind.title}: more") for kind in IDLE]
        table.rows.append((name if name == PLAIN else f"{name}: more", *field.cells(name, cells)))
    table.notes = [
        f"{rounds} rounds of {seconds} s; offload watches all loops (`every_loop=True`), asyncio debug and aiodebug's "
        "log too; pyleak is switched on on each; aiocop and aiodebug's hang inspection watch the first only",
        *field.all_notes(),
    ]
    return table


# --- scenarios --------------------------------------------------------------------------------------------------------


def ask(contestant: str, key: str) -> Any:
    """Run a scenario in a process of its own."""
    argv = [sys.executable, str(FOLDER / "scenarios.py"), contestant, key]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, env=environment())
    except subprocess.TimeoutExpired:
        raise ChildError(f"did not end within {PATIENCE:.0f} s") from None
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        raise ChildError((done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1])
    return json.loads(lines[-1])


class Score:
    """What a contestant did in all scenarios."""

    def __init__(self) -> None:
        self.blocked = self.found = self.named = self.causes = self.false = 0
        self.off: list[float] = []  # milliseconds

    def judge(self, answer: dict[str, Any], causes: tuple[str, ...]) -> tuple[str, str]:
        """The cell for one scenario, and the cause that was given."""
        claims = [claim for claim in answer["claims"] if claim["how"] != UNMEASURED]
        if not causes:
            self.false += len(claims)
            return f"{len(claims)} false" if claims else "none", ""
        self.blocked += 1
        if not claims:
            return (UNMEASURED if answer["claims"] else "no"), ""
        self.found += 1
        lines = {line for claim in claims for line in claim["lines"]}
        named = not lines.isdisjoint(answer["lines"])
        self.named += named
        cell = "line" if named else "wrong line" if lines else "no line"
        if how := next((claim["how"] for claim in claims if claim["how"]), ""):
            return (how if named else f"{how}, {cell}"), ""
        longest = max(claims, key=lambda claim: claim["seconds"] or 0.0)
        self.causes += longest["cause"] in causes
        if longest["seconds"] is None:
            return f"{cell}, no time", ""
        off = abs(longest["seconds"] - answer["true"]) * 1e3
        self.off.append(off)
        return f"{cell}, {off:.1f} ms", longest["cause"] + ("" if longest["cause"] in causes else " (wrong)")


def comparison(options: Options) -> Table:
    field = Field(DETECTORS)
    scenarios = dict(list(SCENARIOS.items())[:: options.count(1, 5)])
    scores = {name: Score() for name in field.names}
    table = Table("Scenarios: what is found", ("", "ms", *field.names, "cause, by offload"))
    errors: Counter[str] = Counter()
    for number_, (key, scenario) in enumerate(scenarios.items()):
        if importlib.util.find_spec(scenario.needs) is None:
            field.notes.append(f"{key}: left out, for {scenario.needs} is not installed")
            continue
        tell(f"detector: scenario {number_ + 1} of {len(scenarios)}, {key}")
        cells: dict[str, str] = {}
        took, cause = [], ""
        for name in shuffled(field.names, number_):
            try:
                answer = ask(name, key)
            except ChildError as error:
                cells[name] = "error"
                errors[f"{name}: error: {error}"] += 1
                continue
            cells[name], given = scores[name].judge(answer, scenario.causes)
            if name != "blockbuster":  # which ends the call before it blocks
                took.append(answer["true"] * 1e3)
            cause = given if name == OFFLOAD else cause
        blocked = number(statistics.median(took)) if scenario.causes and took else "–"
        table.rows.append((key, blocked, *(cells[name] for name in field.names), cause or "–"))
    add_totals(table, [scores[name] for name in field.names], scores[OFFLOAD])
    table.notes = [
        'line: it names the line that blocked, and by how much it was wrong about how long. "wrong line": it names '
        'another; "no line": it gives only a name or a function; "unmeasured": it saw it, and blames a starved machine',
        "aiodebug: its files show all threads; any of their lines counts. aiocop: reports below the threshold do not "
        "count. blockbuster raises instead of timing; logs: the loop swallowed what it raised, and a test would pass",
        *field.all_notes(),
        *(f"{text} (in {times} of {len(scenarios)} scenarios)" for text, times in errors.items()),
    ]
    return table


def add_totals(table: Table, scores: list[Score], offload: Score) -> None:
    def off(score: Score) -> str:
        return f"{statistics.median(score.off):.1f} / {max(score.off):.1f} ms" if score.off else "–"

    cause = f"{offload.causes} of {offload.blocked}"
    table.rows += [
        ("**found**", "", *(f"{s.found} of {s.blocked}" for s in scores), ""),
        ("**line named**", "", *(f"{s.named} of {s.blocked}" for s in scores), cause),
        ("**wrong by, median / most**", "", *map(off, scores), ""),
        ("**false reports**", "", *(str(s.false) for s in scores), ""),
    ]


def run(options: Options) -> list[Table]:
    return [*overhead(options), idle_table(options), comparison(options)]


def main(contestant: str, loops: str, period: str) -> None:
    """A process of a round."""
    prepare(contestant)
    asyncio.run(serve(contestant, int(loops), float(period)))


if __name__ == "__main__":
    main(*sys.argv[1:])
