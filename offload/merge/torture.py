"""`offload merge -f`, killed and started again under a workload of rotations; and the proof that nothing was lost.

    this process                                   child, killed with SIGKILL again and again
    ────────────                                   ──────────────────────────────────────────
    Workload.step ─► logs ───────────────────────► offload merge -f ─► merged.opk
    kills it while it starts, at its first                                 │
    change, in a batch, while it follows;                                  │
    cuts some of the packet file's end, or of a log's                      │
    at the end: Checker ◄──────────────────────────────────────────────────┘

A round is one folder, one seed, one packet file. What is written, and where in that it is killed, comes from the seed;
how far the merge has come by then is the machine's doing. So a seed repeats the workload, and mostly the fault.

A torn tail is what a power cut leaves; it is made by cutting bytes off the packet file after a kill. The sources have
everything, so any cut must heal. Bytes up to where a log was known when it was rotated are not cut: a file that loses
its name before anybody has seen it is nobody's. A `wild` round knows no such mercy from the second rotation on: then
files come and go between two looks, as when a merge was stopped for long.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import PacketError
from ..files.contents import open_contents
from ..files.frame_source import FrameSource
from ..files.rolling import on_the_disk
from ..files.rotated import holds, is_same
from ..packets.format import Compression
from ..packets.recover import generations
from .audit import verify
from .lines import LineReader
from .rotations import ALL
from .split import stat
from .workload import Checker, Findings, Workload

STEPS = 3000  # of a round: some 15 s
PAUSE = 0.008  # seconds between two steps, at most
PATIENCE = 30.0
MAX_CUT = 3000  # bytes: several frames with their COMMIT, or a part of a large one
_LOOK = 0.1


@dataclass
class Report:
    """What was done, and what is wrong; of one round or of several.

    Attributes:
        seeds: of the rounds, in order; the last one is the one that failed if any did.
        did: what was done to the logs and the merge -> how often.
        seconds: how long it took.
    """

    seeds: list[int] = field(default_factory=list)
    lines: int = 0
    bytes: int = 0
    seconds: float = 0.0
    did: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)


class Round:
    """One workload and one merge of it that is killed; for one thread.

    Args:
        folder: empty; the logs and the packet file stay in it.
        seed: of everything that is random.
        steps: of the workload.
        pause: seconds between two steps, at most.
        pattern: what of the logs' folder is merged. One that rotated files match too makes them sources of their own,
            so lines are in order within each file only, and a Checker finds them "reordered".
        wild: rotate a log although nothing of its present file was read yet.
        patience: seconds without a new byte in the packet file after which what is missing counts as lost.
        command: what runs in place of `offload`.
        options: more of `offload merge`.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        steps: int = STEPS,
        pause: float = PAUSE,
        pattern: str = "*.log",
        wild: bool = False,
        patience: float = PATIENCE,
        command: Sequence[str] = (sys.executable, "-P", "-m", "offload"),
        options: Sequence[str] = (),
    ) -> None:
        self.packet = folder / "merged.opk"
        self.did: Counter[str] = Counter()
        self._steps = steps
        self._pause = pause
        self._command = command
        self._options = options
        self._folder = folder
        self._errors = folder / "merge.err"
        self._chance = random.Random(f"{seed} kills")
        self._pattern = str(folder / "logs" / pattern)
        self._wild = wild
        self._patience = patience
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._fault = ""  # how a merge ended by itself
        self._start_at = 0.0
        self._kill_at: float | None = None
        self._delay = 0.0
        self._size = self._growth = 0
        self._floor = 0, 0  # a segment, and a byte in it
        (folder / "logs").mkdir()
        # What begins alike cannot be told apart if nobody has read more of it.
        kinds = [kind for kind in ALL if not (wild and kind.headed and kind.way == "rename")]
        self.workload = Workload(folder / "logs", f"{seed} logs", kinds=kinds)
        self.workload.is_read = self._is_read

    def stop(self) -> None:
        """End the writing at the next step; what was written is merged and checked as ever. From a signal handler."""
        self._stopping = True

    def run(self) -> Generator[str, None, None]:
        """Run it; gives out what it does at present, many times a second. Closing it ends the merge and the writing."""
        try:
            yield from self._until_merged("beginning")
            self.workload.may_rotate = self._may_rotate
            self._raise_floor()
            for _ in range(self._steps):
                if self._stopping or self._ended():
                    break
                self.workload.step()
                self._torment()
                time.sleep(self._chance.random() * self._pause)
                yield "writing"
            self.workload.finish()
            yield from self._until_merged("merging the rest")
            self._end()
        finally:
            self.workload.close()
            self._kill()

    def check(self) -> Findings:
        """Read the packet file and compare each line; then verify it."""
        checker = Checker(self.workload.written, self.workload.repeated)
        faults: list[str] = []
        gaps: list[str] = []
        try:
            for line in read_lines(self.packet):
                checker.take(line)
            audit = verify(self.packet)
            faults += [f"byte {offset}: {fault}" for offset, fault in audit.faults]
            # Of a file that is cut or deleted nobody can tell that all of it was read.
            gone = {f"{kind.name}.log" for kind in ALL if kind.way in ("delete", "rewrite")}
            stated = [gap for gap in audit.gaps if gap[0] not in gone]
            gaps += [f"{name} from byte {start} to {end}: {reason}" for name, start, end, reason in stated]
        except (PacketError, OSError) as exc:
            faults.append(f"{self.packet.name}: {exc}")
        found = checker.end()
        found.faults, found.gaps = faults, gaps
        if self._fault:
            found.faults.append(self._fault)
        return found

    def size(self) -> int:
        return self.packet.stat().st_size if self.packet.exists() else 0

    def _may_rotate(self, log: Path) -> bool:
        """Whether the packet file has something of the file that has this name, which it keeps from now on."""
        found = None if self._wild else read_up_to(self.packet, log)
        if found is not None:
            self._floor = max(self._floor, found[1])
        return self._wild or found is not None

    def _is_read(self, path: Path) -> bool:
        """Whether the packet file has this file to its end, and keeps it."""
        found = read_up_to(self.packet, path)
        if found is None or found[0] < size_of(path):
            return False
        self._floor = max(self._floor, found[1])
        return True

    # --- the merge ----------------------------------------------------------------------------------------------------

    def _torment(self) -> None:
        """Start the merge, kill it, or leave it alone."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self._start()
                self._plan(now)
            return
        if self._kill_at is None and abs(self.size() - self._size) > self._growth:
            self._kill_at = now + self._delay
        if self._kill_at is not None and now >= self._kill_at and not self._ended():
            self._kill()
            self.did["kills"] += 1
            if self._chance.random() < 0.4:
                self._cut(self._chance.randint(1, MAX_CUT))
            if not self._wild and self._chance.random() < 0.4:
                self.workload.lose_end(self._chance)
            self._start_at = now + self._chance.choice([0, 0, self._chance.random() * 0.3])

    def _plan(self, now: float) -> None:
        """When the merge that begins now is killed: each phase has faults of its own."""
        phase = self._chance.randrange(4)
        self._size, self._growth, self._delay, self._kill_at = self.size(), 0, 0.0, None
        if phase == 0:  # while it starts
            self._kill_at = now + self._chance.random() * 0.4
        elif phase == 1:  # as soon as it changes anything
            self._delay = self._chance.choice([0, self._chance.random() * 0.003])
        elif phase == 2:  # in a batch or shortly behind one
            self._growth = self._chance.randrange(100_000)
        else:  # while it follows
            self._delay = self._chance.random()

    def _start(self) -> None:
        command = [*self._command, "merge", "-f", "--quiet", *self._options, "-o", str(self.packet), self._pattern]
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": path},
                process_group=0,  # Ctrl-C is for us: we end it when all is merged
            )
        self.did["starts"] += 1

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _cut(self, count: int) -> None:
        size, (segment, floor) = self.size(), self._floor
        if not size:
            return
        with FrameSource(self.packet, alone=True) as source:
            present = source.series.parts[0].number
        floor = max(on_the_disk(self.packet), floor if present == segment else 0)
        if size > floor:
            os.truncate(self.packet, max(floor, size - count))
            self.did["packet files cut"] += 1

    def _raise_floor(self) -> None:
        """What is there now is not cut."""
        if not self.size():
            return  # the merge has ended by itself, which is told
        with FrameSource(self.packet, alone=True) as source:
            self._floor = source.series.parts[0].number, source.size()

    def _until_merged(self, doing: str) -> Generator[str, None, None]:
        """Have a merge run until it has all lines, or gets no further."""
        if self._process is None:
            self._start()
        size, since = -1, time.monotonic()
        while not self._ended() and self._merged() < self.workload.lines:
            if self.size() != size:
                size, since = self.size(), time.monotonic()
            elif time.monotonic() - since > self._patience:
                return
            time.sleep(_LOOK)
            yield doing

    def _merged(self) -> int:
        """Lines that the packet file holds, by its headers."""
        try:
            return stat(self.packet).lines
        except (OSError, PacketError):
            return 0  # it is being cut or begun; `check` tells what is wrong

    def _ended(self) -> bool:
        """Whether a merge has ended by itself, which none may."""
        process = self._process
        if not self._fault and process is not None and process.poll() is not None:
            complaint = self._errors.read_text(errors="replace").splitlines() or ["without a word"]
            self._fault = f"the merge ended with {process.returncode}: {complaint[-1]} (all in {self._errors.name})"
        return bool(self._fault)

    def _end(self) -> None:
        """As `systemctl stop` does: what is there is merged."""
        process = self._process
        if process is None or self._ended():
            return
        process.send_signal(signal.SIGTERM)
        try:
            if process.wait(self._patience):
                self._ended()
            self._process = None
        except subprocess.TimeoutExpired:
            self._fault = f"the merge did not end within {self._patience:.0f} s of SIGTERM"


def read_up_to(packet: Path, path: Path) -> tuple[int, tuple[int, int]] | None:
    """How far the packet file has a file, whatever its name is now, and its own end then: a segment, and a byte in it.

    None: it has nothing of that file.
    """
    try:
        contents = open_contents(str(path))
    except OSError:
        return None
    found = 0
    try:
        with FrameSource(packet) as source:
            part = source.series.parts[-1]
            read, ledger = source.series.reader(part), source.series.recover().ledger
            for state in ledger.sources.values():
                for info, entry in ((state.info, state.entry()), *generations(read, ledger.end, state)):
                    known = is_same(contents, info) or contents.compression is not Compression.NONE
                    if known and entry.resume_off > found and holds(contents, entry) is not None:
                        found = entry.resume_off
    except (OSError, PacketError):
        return None  # it is being cut
    finally:
        contents.close()
    return (found, (part.number, ledger.end)) if found else None


def size_of(path: Path) -> int:
    """Of a file that is there, unpacked."""
    contents = open_contents(str(path))
    try:
        return contents.look()[0]
    finally:
        contents.close()


class Torture:
    """Rounds with one seed after another, for some time or until one fails; for one thread.

    Args:
        folder: empty, or not there yet. The last round's files stay in it, in a folder named after its seed.
        seed: of the first round.
        seconds: after these the present round is cut short.
        steps, wild: see Round.
    """

    def __init__(self, folder: Path, seed: int, *, seconds: float, steps: int = STEPS, wild: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(17, "the folder is not empty; give an empty or a new one", str(folder))
        self.folder = folder
        self.report = Report()
        self._seed = seed
        self._steps = steps
        self._wild = wild
        self._seconds = seconds
        self._round: Round | None = None
        self._stopping = False

    def stop(self) -> None:
        """End the present round soon, and check it. From a signal handler."""
        self._stopping = True
        if self._round is not None:
            self._round.stop()

    def run(self) -> Generator[str, None, None]:
        """Run it; gives out what it does at present. `report` is up to date each time, and has the verdict at the end.

        Raises:
            OSError: the disk does not take what the workload writes.
        """
        started = time.monotonic()
        report, seed = self.report, self._seed
        while not self._stopping and report.seconds < self._seconds:
            folder = self.folder / f"seed-{seed}"
            folder.mkdir()
            report.seeds.append(seed)
            before = report.lines, report.bytes, report.did
            self._round = this = Round(folder, seed, steps=self._steps, wild=self._wild)
            for doing in this.run():
                report.seconds = time.monotonic() - started
                report.lines, report.bytes = before[0] + this.workload.lines, before[1] + this.workload.bytes
                report.did = before[2] + this.did + this.workload.did
                if report.seconds >= self._seconds:
                    this.stop()
                yield doing
            report.findings = this.check()
            report.seconds = time.monotonic() - started
            yield "checked"
            if not report.findings.ok:
                return
            if not self._stopping and report.seconds < self._seconds:
                shutil.rmtree(folder)
            seed += 1


def read_lines(path: Path) -> Generator[bytes, None, None]:
    """The lines of a packet file as `offload cat` gives them.

    Raises:
        OSError, PacketError: as FrameSource.
    """
    with FrameSource(path) as source:
        reader = LineReader(source)
        for frame in source:
            for lines in reader.feed(frame):
                yield from lines.each()
        for lines in reader.close():
            yield from lines.each()
        if not source.is_being_written():
            source.end()
