"""`offload merge -f`, killed with SIGKILL again and again while five programs write: each line is there once, in order.

The kills are aimed at phases (see PHASES), at random within each, and after some of them bytes are cut off the packet
file's end, as a power cut may: the sources still have everything, so any cut must heal. Where somebody follows the
packet file nothing may be taken away; there, the beginning of a frame is put behind its end instead.

    OFFLOAD_KILLS      how often to kill in the long test (50)
    OFFLOAD_KILL_SEED  what to begin the random choices with; a failure names the one it had
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest

import offload
from offload.errors import PacketError
from offload.files.frame_source import FrameSource
from offload.files.packet_stream import PacketReader
from offload.files.rolling import on_the_disk
from offload.files.series import sealed_segments
from offload.packets import FrameType
from offload.packets.codec import SourceInfo
from offload.packets.format import HEADER_BYTES, MAGIC, Flag

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL"),
]

KILLS = int(os.environ.get("OFFLOAD_KILLS", "50"))
SEED = int(os.environ.get("OFFLOAD_KILL_SEED", str(random.randrange(1 << 32))))
PATIENCE = 60.0  # seconds until something that must happen counts as hung

OFFLOAD = (sys.executable, "-m", "offload")
SEGMENTED = (sys.executable, str(Path(__file__).with_name("segmented.py")), '["--segment-size", "60000", "--compress"]')
MUTANT = (sys.executable, str(Path(__file__).with_name("kill_mutant.py")))

NAMES = ("api.log", "web 1.log", "größe.log", "billing.log", "mail.log")
CRLF, LATE, UNENDED = 1, 4, 2  # which of them ends its lines so, appears later, has a last line without an end

MAX_CUT = 3000  # bytes: several frames with their COMMIT, or a part of a large one
# Text as in any log, and what may be taken for the start of a frame.
NOISE = random.Random(0).randbytes(3000).hex().encode() + MAGIC + b"\x01\x04\0\0" + bytes(40) + b"\xff\r\0 end"
HUGE = NOISE * (1_200_000 // len(NOISE))


# --- what writes ------------------------------------------------------------------------------------------------------


class Program(threading.Thread):
    """Appends numbered lines to its log: in bursts, in pieces cut anywhere, with random pauses, until told to stop."""

    def __init__(
        self, path: Path, seed: str, stop: threading.Event, begin: threading.Event, *, timed: bool = False
    ) -> None:
        super().__init__(name=f"program {path.name}")
        self.path = path
        self.timed = timed  # the time before each number
        self.lines = 0
        self.whole = 0  # bytes up to the last line end, once it has ended
        self.error: Exception | None = None
        self._chance = random.Random(seed)
        self._end = b"\r\n" if path.name == NAMES[CRLF] else b"\n"
        self._stop_event = stop
        self._begin_event = begin

    def run(self) -> None:
        try:
            self._begin_event.wait()
            with self.path.open("ab", buffering=0) as log:
                # A line at least, also if it was told to stop before it began.
                self._write(log, self._line() + self._end)
                while not self._stop_event.is_set():
                    self._write(log, b"".join(self._line() + self._end for _ in range(self._chance.randint(1, 20))))
                    self._pause(0.02)
                self.whole = log.tell()
                if self.path.name == NAMES[UNENDED]:
                    log.write(self._line())
        except Exception as exc:
            self.error = exc

    def _line(self) -> bytes:
        number, self.lines = self.lines, self.lines + 1
        if self._chance.random() < 0.0003:
            filling = HUGE[: self._chance.randrange(1 << 20, len(HUGE))]
        else:
            start = self._chance.randrange(len(NOISE))
            filling = NOISE[start : start + self._chance.randrange(250)]
        if self.timed:
            return b"%sZ %d %s" % (datetime.now(UTC).replace(tzinfo=None).isoformat().encode(), number, filling)
        return b"%d %s" % (number, filling)

    def _write(self, log: Any, data: bytes) -> None:
        cuts = sorted(self._chance.randrange(1, len(data)) for _ in range(self._chance.randrange(3)))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            log.write(data[start:end])
            if end < len(data) and self._chance.random() < 0.3:
                self._pause(0.01)

    def _pause(self, longest: float) -> None:
        self._stop_event.wait(self._chance.random() * longest)


# --- what kills -------------------------------------------------------------------------------------------------------

PHASES = {
    "while it starts": "any moment from its start on, whatever it does",
    "while it opens": "once it has the packet file open: recovery and the first batch",
    "first change": "as soon as the packet file's size is another: the cut of a torn tail, the first frames",
    "in a batch": "once some more bytes are written: within a batch or shortly after one",
    "while it follows": "some time after the first change: small batches, COMMITs, fsyncs",
}


@dataclass
class Torture:
    """A merge of five growing logs that is killed and started again.

    Attributes:
        kills: what happened, a line for each kill.
        torn: how many kills left a frame that is not whole.
    """

    folder: Path
    seed: str
    command: Sequence[str] = OFFLOAD
    options: Sequence[str] = ()
    harm: Literal["cut", "tear"] = "cut"
    timed: bool = False
    kills: list[str] = field(default_factory=list)
    torn: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.logs = self.folder / "logs"
        self.logs.mkdir()
        self.packet = self.folder / "merged.opk"
        self.stop, self.begin, self.begin_late = threading.Event(), threading.Event(), threading.Event()
        self.programs = [
            Program(
                self.logs / name,
                f"{self.seed} {name}",
                self.stop,
                self.begin_late if i == LATE else self.begin,
                timed=self.timed,
            )
            for i, name in enumerate(NAMES)
        ]
        self._errors = self.folder / "stderr"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The programs write within this block; behind it they have ended and `whole` is known."""
        for program in self.programs:
            program.start()
        self.begin.set()
        try:
            yield
        finally:
            self.stop.set()
            self.begin_late.set()
            for program in self.programs:
                program.join(PATIENCE)
        assert not [p.name for p in self.programs if p.is_alive()]
        assert [p.error for p in self.programs] == [None] * len(self.programs)

    @contextmanager
    def merging(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """`merge -f` runs within this block; it is killed behind it if it still does."""
        gets_on()
        command = [*self.command, "merge", "-f", str(self.logs), "-o", str(self.packet), "--quiet", *self.options]
        with (
            self._errors.open("wb") as errors,
            subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=errors, env=environment()) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def kill(self, times: int) -> None:
        """Start the merge and kill it, this many times, each phase in turn; the last program begins half-way."""
        for number in range(times):
            if number == times // 2:
                self.begin_late.set()
            phase = list(PHASES)[number % len(PHASES)]
            with self.merging() as process:
                before = self.size()
                self._await(phase, process)
                ended = process.poll()
                process.kill()
                process.wait()
                after = self.size()
            torn = self.torn_bytes()
            self.torn += torn > 0
            self.kills.append(f"{phase}: {before} to {after} bytes, {torn} of them torn")
            assert ended is None, f"the merge ended by itself: {ended}, {self.complaints()}"
            assert self.complaints() == ""
            if self.chance.random() < 0.5:
                if self.harm == "cut":
                    self.cut(self.chance.randint(1, MAX_CUT))
                elif not torn:
                    self.tear()

    def tear(self) -> None:
        """Put a beginning of a frame behind the packet file's end."""
        size = self.size()
        if size > MAX_CUT:
            with self.packet.open("r+b") as file:
                beginning = file.read(self.chance.randint(1, HEADER_BYTES + 10))
                file.seek(size)
                file.write(beginning)
            self.kills.append(f"  torn: {len(beginning)} bytes of another frame put behind its end")

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End the merge, which was started with --json, as `systemctl stop` or Ctrl-C would."""
        process.terminate()
        summary, _ = process.communicate(timeout=PATIENCE)
        assert (process.returncode, self.complaints()) == (0, "")
        assert json.loads(summary)["complete"]

    def cut(self, count: int) -> None:
        """Take bytes off the packet file's end."""
        if self.packet.exists():
            size = max(on_the_disk(self.packet), self.size() - count)
            os.truncate(self.packet, size)
            self.kills.append(f"  cut to {size} bytes")

    @contextmanager
    def told(self) -> Iterator[None]:
        """A failure within this block names the seed and what was done."""
        try:
            yield
        except BaseException as exc:
            exc.add_note(f"OFFLOAD_KILL_SEED={SEED}; {self.torn} kills left a torn tail")
            for line in self.kills:
                exc.add_note(line)
            raise

    def size(self) -> int:
        return self.packet.stat().st_size if self.packet.exists() else 0

    def torn_bytes(self) -> int:
        """Bytes behind the last whole frame, as the next writer will find them."""
        if not self.packet.exists():
            return 0
        with FrameSource(self.packet) as source:
            return source.series.recover().torn

    def complaints(self) -> str:
        return self._errors.read_text()

    def _await(self, phase: str, process: subprocess.Popen[bytes]) -> None:
        """Return at a random moment of this phase."""
        size = self.size()
        match phase:
            case "while it starts":
                time.sleep(self.chance.random() * 0.3)
            case "while it opens":
                until(lambda: self._is_open(process), process)
                time.sleep(self.chance.random() * 0.008)
            case "first change":
                until(lambda: self.size() != size, process)
                time.sleep(self.chance.choice([0, self.chance.random() * 0.003]))
            case "in a batch":
                more = self.chance.randrange(200_000)
                known = set(sealed_segments(self.packet))
                until(lambda: self.size() > size + more or set(sealed_segments(self.packet)) - known, process)
            case _:
                until(lambda: self.size() != size, process)
                time.sleep(self.chance.random() * 0.4)

    def _is_open(self, process: subprocess.Popen[bytes]) -> bool:
        descriptors = Path(f"/proc/{process.pid}/fd")
        if not Path("/proc/self/fd").is_dir():
            return self.packet.exists()
        with suppress(OSError):  # one that was closed meanwhile
            return any(os.readlink(path) == str(self.packet) for path in descriptors.iterdir())
        return False


def until(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    """Return once it holds or the process has ended; looks often, for a kill comes next and should hit."""
    patience = time.monotonic() + PATIENCE
    while not condition() and process.poll() is None:
        assert time.monotonic() < patience, f"the merge did nothing for {PATIENCE} s"
        time.sleep(0.0003)


def gets_on() -> None:
    """Only what stands still from now on hangs, however long it takes to kill as often as was asked for."""
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True, file=2)


# --- what checks ------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What is wrong; `ok` if nothing is.

    Attributes:
        verify, split: what these commands said, if they did not end with 0.
        lost, doubled, disordered: source -> numbers of its lines; `disordered` come after a higher one.
        differing: sources whose bytes are not those of the original.
    """

    verify: str = ""
    split: str = ""
    lost: dict[str, list[int]] = field(default_factory=dict)
    doubled: dict[str, list[int]] = field(default_factory=dict)
    disordered: dict[str, list[int]] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self == Findings()

    def look_at(self, original: Path, copy: Path, lines: int) -> None:
        """Compare a source that has the lines 0 to `lines` - 1 with what came back of it."""
        name = original.name
        data = copy.read_bytes() if copy.exists() else b""
        if data != original.read_bytes():
            self.differing.append(name)
        numbers = [int(number) for number in re.findall(rb"^(?:[\d-]+T[\d:.]+Z )?(\d+) ", data, re.MULTILINE)]
        times = Counter(numbers)
        highest = -1
        for number in numbers:
            if number < highest and times[number] == 1:
                self.disordered.setdefault(name, []).append(number)
            highest = max(highest, number)
        if lost := [number for number in range(lines) if number not in times]:
            self.lost[name] = lost
        if doubled := [number for number, count in times.items() if count > 1]:
            self.doubled[name] = doubled


def check(torture: Torture) -> Findings:
    """Let the commands verify and split the packet file, and compare each line and each byte."""
    found = Findings()
    verified = run("verify", torture.packet)
    if verified.returncode:
        found.verify = verified.stdout + verified.stderr
    copies = torture.folder / "split"
    taken_apart = run("split", torture.packet, "-d", copies)
    if taken_apart.returncode:
        found.split = taken_apart.stderr
    if copies.is_dir() and sorted(p.name for p in copies.iterdir()) != sorted(NAMES):
        found.split += f"made {sorted(p.name for p in copies.iterdir())}"
    for program in torture.programs:
        found.look_at(program.path, copies / program.path.name, program.lines)
    return found


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    gets_on()
    command = [*OFFLOAD, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False)


# Where compiled modules are kept, away from the tree: fifty starts are most of this test's time.
_compiled: list[Path] = []


def environment() -> dict[str, str]:
    """As ours, with the package under test."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    extra = {"PYTHONPATH": str(Path(offload.__file__).parents[1]), "PYTHONPYCACHEPREFIX": str(_compiled[0])}
    return kept | extra


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    _compiled.append(tmp_path_factory.mktemp("compiled"))
    yield
    _compiled.clear()


class Follower:
    """Reads the packet file while it is written, over all kills: what it has seen must never be taken back."""

    def __init__(self, packet: Path) -> None:
        self.content: dict[str, bytearray] = {}
        self._reader = PacketReader(packet, follow=True)
        self._more = asyncio.Condition()
        self._failed = False

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        async with self._reader:
            task = asyncio.create_task(self._follow())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    async def has_all_of(self, programs: Sequence[Program]) -> None:
        """Return once each program's lines are seen, but for a last one without its end; or following has failed."""

        def has_all() -> bool:
            return all(len(self.content.get(p.path.name, b"")) >= p.whole for p in programs)

        async with self._more:
            while not (has_all() or self._failed):
                gets_on()
                async with asyncio.timeout(PATIENCE):
                    await self._more.wait()
        gets_on()

    async def _follow(self) -> None:
        names: dict[int, str] = {}
        try:
            async for frame in self._reader:
                if frame.header.flags & Flag.RESTATED:
                    continue
                if frame.header.type is FrameType.SOURCE:
                    name = names[frame.header.source_id] = Path(os.fsdecode(SourceInfo.unpack(frame).path)).name
                    assert name not in self.content, "a second generation, but no log was ever replaced"
                    self.content[name] = bytearray()
                elif frame.header.type is FrameType.LINES:
                    self.content[names[frame.header.source_id]] += frame.payload
                async with self._more:
                    self._more.notify_all()
        except Exception:
            async with self._more:
                self._failed = True
                self._more.notify_all()
            raise


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def ended_if_it_hangs() -> Iterator[None]:
    """What hangs shows where each thread stands."""
    gets_on()
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("command", [OFFLOAD, SEGMENTED], ids=["one file", "segments"])
async def test_killed_at_random_moments_each_line_is_there_once_and_in_order(
    tmp_path: Path, command: Sequence[str]
) -> None:
    """Killed 50 times in every phase, with tails cut off too, it ends with each source whole, byte for byte."""
    torture = Torture(tmp_path, f"{SEED} cuts", command=command)
    with torture.told():
        with torture.writing():
            await asyncio.to_thread(torture.kill, KILLS)
        follower = Follower(torture.packet)
        with torture.merging("--json") as process:
            async with follower.following():
                await follower.has_all_of(torture.programs)
            torture.end(process)
        assert check(torture) == Findings()
    assert (len(sealed_segments(torture.packet)) > KILLS // 10) == (command is SEGMENTED)


async def test_killed_while_lines_wait_for_their_turn(tmp_path: Path) -> None:
    """Ordered by time, with lines held back at every moment, no kill loses or doubles one of them either."""
    torture = Torture(tmp_path, f"{SEED} by time", command=[*MUTANT, "by-time"], timed=True)
    with torture.told():
        with torture.writing():
            await asyncio.to_thread(torture.kill, max(len(PHASES), KILLS // 2))
        follower = Follower(torture.packet)
        with torture.merging("--json") as process:
            async with follower.following():
                await follower.has_all_of(torture.programs)
            torture.end(process)
        assert check(torture) == Findings()


@pytest.mark.parametrize("command", [OFFLOAD, SEGMENTED], ids=["one file", "segments"])
async def test_killed_with_fsync_always_what_a_follower_has_seen_stays(tmp_path: Path, command: Sequence[str]) -> None:
    """With `--fsync always` nothing is lost either, and a reader that follows over all kills sees each byte once."""
    torture = Torture(tmp_path, f"{SEED} always", command, ["--fsync", "always"], harm="tear")
    with torture.told():
        async with AsyncExitStack() as stack:
            with torture.writing():
                with torture.merging() as process:
                    until(lambda: torture.size() > 0, process)
                follower = Follower(torture.packet)
                await stack.enter_async_context(follower.following())
                await asyncio.to_thread(torture.kill, max(len(PHASES), KILLS // 4))
            with torture.merging("--json") as process:
                await follower.has_all_of(torture.programs)
                torture.end(process)
        assert check(torture) == Findings()
        for program in torture.programs:
            assert program.path.read_bytes().startswith(follower.content[program.path.name])


async def test_killed_while_old_segments_are_removed_the_rest_is_whole(tmp_path: Path) -> None:
    """What is kept of each source is its end, without a hole and byte for byte; that the rest is gone is no fault."""
    limits = '["--segment-size", "60000", "--compress", "--keep-size", "150000"]'
    torture = Torture(tmp_path, f"{SEED} kept", command=[*SEGMENTED[:2], limits])
    with torture.told():
        with torture.writing():
            await asyncio.to_thread(torture.kill, KILLS // 2)

        def has_all() -> bool:
            with FrameSource(torture.packet) as source, suppress(PacketError):
                states = source.series.recover().ledger.sources.values()
                read = {Path(os.fsdecode(state.path)).name: state.resume_off for state in states}
                return all(read.get(p.path.name, 0) >= p.whole for p in torture.programs)
            return False

        with torture.merging("--json") as process:
            until(has_all, process)
            torture.end(process)
        verified = run("verify", torture.packet)
        assert verified.returncode == 0, verified.stdout
        assert "are gone, as retention does" in verified.stdout
        taken_apart = run("split", torture.packet, "-d", torture.folder / "split")
        assert taken_apart.returncode in (0, 1), taken_apart.stderr
        for program in torture.programs:
            kept = (torture.folder / "split" / program.path.name).read_bytes()
            assert program.path.read_bytes().endswith(kept)
    sealed = list(sealed_segments(torture.packet).values())
    assert sum(path.stat().st_size for path in sealed) <= 150000


def test_offsets_beside_the_file_would_be_noticed(tmp_path: Path) -> None:
    """The same kills make a merge that keeps its offsets in a side file double lines, though its file verifies."""
    torture = Torture(tmp_path, f"{SEED} sidecar", command=[*MUTANT, "sidecar"])
    sidecar = Path(f"{torture.packet}.offsets")

    def has_all() -> bool:
        offsets = json.loads(sidecar.read_text()) if sidecar.exists() else {}
        return all(offsets.get(str(program.path), 0) >= program.whole for program in torture.programs)

    with torture.told():
        with torture.writing():
            torture.kill(2 * len(PHASES))
        with torture.merging("--json") as process:
            until(has_all, process)
            torture.end(process)
        found = check(torture)
        assert found.verify == ""
        assert found.doubled
        assert not found.ok


@pytest.mark.parametrize(("command", "sound"), [(OFFLOAD, True), ([*MUTANT, "uncut"], False)], ids=["cut", "uncut"])
def test_torn_tail_left_in_place_would_be_noticed(tmp_path: Path, command: Sequence[str], sound: bool) -> None:
    """A torn tail is cut by the next start; a merge that does not cut it makes a file that does not verify."""
    torture = Torture(tmp_path, f"{SEED} torn", command=command)
    with torture.told():
        with torture.writing():
            with torture.merging() as process:
                until(lambda: torture.size() > 0, process)
            if not torture.torn_bytes():
                torture.cut(1)
            before = torture.size()
            with torture.merging("--json") as process:
                until(lambda: torture.size() > before, process)
                torture.end(process)
        verified = run("verify", torture.packet)
        assert (verified.returncode == 0) == sound, verified.stdout + verified.stderr
        assert sound or "hold no valid frame" in verified.stdout


def test_checker_tells_lost_doubled_and_swapped_lines(tmp_path: Path) -> None:
    """What the tests above find nothing with does find what there is."""
    lines = [b"%d text\n" % number for number in range(5)]
    original, copy = tmp_path / "app.log", tmp_path / "copy"
    original.write_bytes(b"".join(lines))
    for wrong, expected in {
        (0, 1, 2, 3, 4): Findings(),
        (0, 1, 3, 4): Findings(lost={"app.log": [2]}, differing=["app.log"]),
        (0, 1, 2, 1, 2, 3, 4): Findings(doubled={"app.log": [1, 2]}, differing=["app.log"]),
        (0, 2, 1, 3, 4): Findings(disordered={"app.log": [1]}, differing=["app.log"]),
        (0, 1, 2, 3): Findings(lost={"app.log": [4]}, differing=["app.log"]),
    }.items():
        copy.write_bytes(b"".join(lines[number] for number in wrong))
        found = Findings()
        found.look_at(original, copy, len(lines))
        assert found == expected
