"""`offload merge` with a fault at each of its system calls on files, a run for each: nothing lost or doubled.

strace kills it there, or has the call fail; `-P` says on which files. Between two calls the packet file does not
change, so with the states that a torn write leaves (test_kill.py, test_power_cut.py) this is every state that a kill
can leave behind: kills come at calls on the packet file and its folder. Refused are those, and those on the logs, with
rotated ones beside them, one packed. strace cannot make a write short: it could only say that one was. A disk
that is full (test_power_loop.py) and RLIMIT_FSIZE (test_engine.py) make real ones.

    OFFLOAD_SWEEP       "all": every call on the logs; otherwise the first of each kind, and of the others each SHARE-th
    OFFLOAD_SWEEP_SEED  from which one on
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest

import offload
from offload.files.frame_source import FrameSource
from offload.files.segments import Segments
from offload.files.series import next_path, sealed_segments, segment_path
from offload.merge.audit import verify
from offload.merge.engine import Merge
from offload.merge.sources import Sources
from offload.merge.split import split
from offload.merge.torture import read_lines
from offload.merge.workload import Checker, line, pack
from offload.packets.codec import CommitInfo
from offload.packets.format import FrameType

pytestmark = [pytest.mark.slow, pytest.mark.peer("strace")]

# What may change a file, and what stands between two changes: also a kill before the lock, or while the end is sought.
CALLS = "openat,flock,pread64,ftruncate,writev,pwrite64,write,fdatasync,fsync"
# What is done to logs and their folder.
READING = (
    "openat,newfstatat,fstat,statx,read,pread64,preadv,lseek,getdents64,readlink,readlinkat,close,inotify_add_watch"
)
SHARE = 12
ALL = os.environ.get("OFFLOAD_SWEEP") == "all"
SEED = int(os.environ.get("OFFLOAD_SWEEP_SEED", str(random.randrange(1 << 32))))
# And what a roll does besides: names that come and go.
ROLLS = CALLS + ",link,linkat,rename,renameat,renameat2,unlink,unlinkat,fchmod,close"

AMPLE = 60.0  # seconds until something that must happen is given up
MIB = 1 << 20
FIRST = {"api.log": b"first line\r\nsecond\n", "mail.log": b"no end"}
GROWN = {
    "api.log": b"".join(b"%d of many lines, so that they fill more than one batch\n" % n for n in range(20_000)),
    "mail.log": b" yet\nsecond",
    "long.log": b"x" * (MIB + MIB // 2) + b"\nshort\n",
    "empty.log": b"",
}


# Of each log a frame for each run, and each in a segment of its own.
FEW = {
    "api.log": b"".join(b"%d of some lines\n" % n for n in range(100)),
    "mail.log": b" yet\nsecond",
    "long.log": b"x" * 3000 + b"\nshort\n",
}
FEW_BYTES = 600


class Ended(NamedTuple):
    """A run: its exit code (negative: the signal), what it said, and the calls that it made, in strace's words."""

    code: int
    err: str
    trace: str

    @property
    def injected(self) -> bool:
        return "(INJECTED)" in self.trace or (self.code == -signal.SIGKILL)


class Traced:
    """Runs of the command under strace, in forks of one process (`forks.py`)."""

    def __init__(self, folder: Path) -> None:
        self._trace, self._stderr = folder / "trace", folder / "stderr"
        environment = os.environ | {"PYTHONPATH": str(Path(offload.__file__).parents[1])}
        self._forks = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forks.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self._forks.communicate(timeout=AMPLE)

    @contextmanager
    def running(
        self, calls: str, paths: Iterable[Path], options: tuple[str, ...], *arguments: str
    ) -> Iterator[tuple[int, list[Ended]]]:
        """A run, of which these calls on these paths are seen: its process number, and in the end how it ended."""
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._stderr.unlink(missing_ok=True)
        self._forks.stdin.write(json.dumps([str(self._stderr), *arguments]) + "\n")
        self._forks.stdin.flush()
        pid = int(self._forks.stdout.readline())
        seen = ["-e", "signal=none", "-e", f"trace={calls}", *(f"-P{path}" for path in paths)]
        command = ["strace", "-f", "-qq", "-o", str(self._trace), *seen, *options]
        ends: list[Ended] = []
        with subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True) as strace:
            try:
                yield pid, ends
            except BaseException:
                os.kill(pid, signal.SIGKILL)
                raise
            finally:
                code = int(self._forks.stdout.readline())
                _, said = strace.communicate(timeout=AMPLE)
        assert code < 98, said
        ends.append(Ended(code, self._stderr.read_text(), self._trace.read_text()))

    def said(self) -> str:
        """What the run has said so far."""
        return self._stderr.read_text() if self._stderr.exists() else ""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """Containers and hardened systems may not allow ptrace."""
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = f"strace may not trace here: {done.stderr.strip()}"
        if os.environ.get("OFFLOAD_REQUIRE_PEERS"):
            pytest.fail(f"{reason}, and OFFLOAD_REQUIRE_PEERS is set", pytrace=False)
        pytest.skip(reason)
    runs = Traced(tmp_path_factory.mktemp("traced"))
    yield runs
    runs.close()


class Scene:
    """Logs, a packet file as it was before the run, and the run."""

    def __init__(self, folder: Path, traced: Traced, max_bytes: int | None = None) -> None:
        self.logs, self.before = folder / "logs", folder / "before.opk"
        self._earlier = folder / "earlier"
        self._max_bytes = max_bytes
        self.packet = folder / "out" / "merged.opk"
        self.copies = folder / "split"
        self.seen = CALLS if max_bytes is None else ROLLS
        self._traced = traced
        for made in (self.logs, self.packet.parent):
            made.mkdir()

    def grow(self, content: dict[str, bytes]) -> None:
        for name, data in content.items():
            with (self.logs / name).open("ab") as log:
                log.write(data)

    def reset(self) -> None:
        shutil.rmtree(self.packet.parent)
        if self._earlier.exists():
            shutil.copytree(self._earlier, self.packet.parent)
        else:
            self.packet.parent.mkdir()
        if self.before.exists():
            shutil.copyfile(self.before, self.packet)

    def keep(self) -> None:
        """What is there now, with its last byte torn off, is what stands before each run."""
        shutil.copytree(self.packet.parent, self._earlier)
        self.before.write_bytes(self.packet.read_bytes()[:-1])

    def run(self, *options: str) -> Ended:
        """Run the command under strace, from the state before."""
        with self.running(*options) as (_, ends):
            pass
        return ends[0]

    @contextmanager
    def running(self, *options: str, flags: tuple[str, ...] = ()) -> Iterator[tuple[int, list[Ended]]]:
        self.reset()
        merge = ["merge", self.sources(), "-o", str(self.packet), "--fsync", "always", "--quiet", *flags]
        if self._max_bytes is not None:
            merge += ["--segment-size", str(self._max_bytes)]
        with self._traced.running(self.seen, self.watched(), options, *merge) as run:
            yield run

    def sources(self) -> str:
        return str(self.logs)

    def said(self) -> str:
        return self._traced.said()

    def watched(self) -> list[Path]:
        paths = [self.packet, self.packet.parent]
        if self._max_bytes is not None:
            paths += [next_path(self.packet), *(segment_path(self.packet, number) for number in range(20))]
        return paths

    def calls(self) -> Counter[str]:
        """The calls that a run makes of those that are seen, and how many of each one thread makes at most."""
        done = self.run()
        assert (done.code, done.err) == (0, "")
        made = Counter(re.findall(r"^(\d+) +(\w+)\(", done.trace, re.MULTILINE))
        return Counter({call: max(n for (_, c), n in made.items() if c == call) for _, call in sorted(made)})

    def torn(self) -> int:
        if not self.packet.exists():
            return 0
        with FrameSource(self.packet) as source:
            return source.series.recover().torn

    async def merge(self) -> None:
        """The run that comes after."""
        segments = None if self._max_bytes is None else Segments(max_bytes=self._max_bytes)
        async with Merge(Sources([str(self.logs)]), self.packet, segments=segments) as merge:
            await merge.run()

    def durable(self) -> list[int]:
        """What each COMMIT says."""
        if not self.packet.exists():
            return []
        with FrameSource(self.packet) as source:
            return [CommitInfo.unpack(frame).durable_upto for frame in source if frame.header.type is FrameType.COMMIT]

    def logged(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.logs.iterdir()}

    def check(self) -> None:
        """The packet file is sound and holds each log, byte for byte."""
        found = verify(self.packet)
        assert found.faults == []
        shutil.rmtree(self.copies, ignore_errors=True)
        split(self.packet, self.copies)
        assert {p.name: p.read_bytes() for p in self.copies.iterdir()} == self.logged()


class Rotated(Scene):
    """Logs that were rotated since the packet file was written: renamed, packed, copied and cut."""

    def __init__(self, folder: Path, traced: Traced) -> None:
        super().__init__(folder, traced)
        self.written: Counter[bytes] = Counter()

    def write(self, name: str, stream: bytes, lines: int) -> None:
        with (self.logs / name).open("ab") as log:
            for _ in range(lines):
                log.write(line(stream, self.written[stream], b"x" * 80))
                self.written[stream] += 1

    async def begin(self) -> None:
        for name in "abcd":
            self.write(f"{name}.log", name.encode(), 50)
        await self.merge()
        self.before.write_bytes(self.packet.read_bytes()[:-1])
        for name in "abc":
            self.write(f"{name}.log", name.encode(), 400)  # of which nobody has read anything as they are rotated
        for name in "ab":
            (self.logs / f"{name}.log").rename(self.logs / f"{name}.log.1")
        shutil.copy(self.logs / "c.log", self.logs / "c.log.1")
        os.truncate(self.logs / "c.log", 0)
        pack(self.logs / "b.log.1")
        self.write("a.log.1", b"a-late", 3)
        for name in "abcde":
            self.write(f"{name}.log", name.encode(), 300)

    async def merge(self) -> None:
        async with Merge(Sources([str(self.logs / "*.log")]), self.packet) as merge:
            await merge.run()

    def sources(self) -> str:
        return str(self.logs / "*.log")

    def check(self) -> None:
        """Each line is there once and in order, and nothing is stated as lost."""
        found = verify(self.packet)
        assert (found.faults, found.gaps) == ([], [])
        checker = Checker(dict(self.written))
        for each in read_lines(self.packet):
            checker.take(each)
        lines = checker.end()
        assert lines.ok, lines


class Read(Rotated):
    """The same, with an eye on the logs."""

    def __init__(self, folder: Path, traced: Traced) -> None:
        super().__init__(folder, traced)
        self.seen = READING

    def watched(self) -> list[Path]:
        return [self.logs, *self.logs.iterdir()]


async def scene_of(folder: Path, traced: Traced, *, torn: bool, max_bytes: int | None = None) -> Scene:
    scene = Scene(folder, traced, max_bytes)
    if torn:
        scene.grow(FIRST)
        await scene.merge()
        scene.keep()
    scene.grow(GROWN if max_bytes is None else FEW)
    return scene


@pytest.mark.parametrize("torn", [False, True], ids=["new", "torn"])
async def test_killed_before_any_call_on_the_packet_file_it_goes_on(tmp_path: Path, traced: Traced, torn: bool) -> None:
    """Wherever it is killed, the packet file holds whole frames (or is still as torn as it was); a run completes it."""
    scene = await scene_of(tmp_path, traced, torn=torn)
    before = scene.before.read_bytes() if torn else b""
    kills: Counter[str] = Counter()
    calls = scene.calls()
    scene.check()
    for call in calls:
        for number in count(1):
            ended = scene.run("-e", f"inject={call}:signal=SIGKILL:when={number}")
            if ended.code == 0:
                break  # it makes no more of them
            assert ended.code == -signal.SIGKILL
            kills[call] += 1
            assert scene.torn() == 0 or scene.packet.read_bytes() == before
            await scene.merge()
            scene.check()
    assert kills["writev"] >= 4
    assert kills["fdatasync"] >= 4
    assert kills["ftruncate"] == torn
    assert kills["pwrite64"] == torn


async def test_killed_before_any_call_with_rotated_logs_it_goes_on(tmp_path: Path, traced: Traced) -> None:
    """Also where logs were renamed, packed, copied and cut since the packet file, whose tail is torn, was written."""
    scene = Rotated(tmp_path, traced)
    await scene.begin()
    kills: Counter[str] = Counter()
    calls = scene.calls()
    scene.check()
    for call in calls:
        for number in count(1):
            ended = scene.run("-e", f"inject={call}:signal=SIGKILL:when={number}")
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL
            kills[call] += 1
            await scene.merge()
            scene.check()
    assert kills["writev"] >= 4
    assert kills["fdatasync"] >= 4


@pytest.mark.parametrize("error", ["EIO", "EINTR", "EMFILE", "EACCES"])
async def test_refused_at_a_call_on_the_logs_nothing_is_given_up(tmp_path: Path, traced: Traced, error: str) -> None:
    """What could not be read is told, not passed over and not stated as lost, for the next run reads it."""
    scene = Read(tmp_path, traced)
    await scene.begin()
    calls = scene.calls()
    scene.check()
    chance, refused = random.Random(f"{SEED} {error}"), 0
    for call, made in calls.items():
        if error == "EMFILE" and call not in ("openat", "inotify_add_watch"):
            continue
        begin = chance.randrange(SHARE)
        for number in range(1, made + 1):
            if not ALL and number > 1 and number % SHARE != begin:
                continue
            ended = scene.run("-e", f"inject={call}:error={error}:when={number}")
            refused += ended.injected
            where = f"OFFLOAD_SWEEP_SEED={SEED}: {error} from {call} {number} of {made}: {ended}"
            assert ended.code in (0, 1, 2, 4), where
            assert "Traceback" not in ended.err, where
            try:
                await scene.merge()
                scene.check()
            except BaseException as exc:
                exc.add_note(where)
                raise
    assert refused


@pytest.mark.parametrize("torn", [False, True], ids=["new", "torn"])
async def test_killed_before_any_call_of_a_roll_it_goes_on(tmp_path: Path, traced: Traced, torn: bool) -> None:
    """Wherever it is killed while segments are closed and begun, a run completes them, and nothing else is left."""
    scene = await scene_of(tmp_path, traced, torn=torn, max_bytes=FEW_BYTES)
    before = scene.before.read_bytes() if torn else b""
    kills: Counter[str] = Counter()
    calls = scene.calls()
    scene.check()
    rolls = len(sealed_segments(scene.packet))
    assert rolls >= 2
    for call in calls:
        for number in count(1):
            ended = scene.run("-e", f"inject={call}:signal=SIGKILL:when={number}")
            if ended.code == 0:
                break  # it makes no more of them
            assert ended.code == -signal.SIGKILL
            kills[call] += 1
            assert scene.torn() == 0 or scene.packet.read_bytes() == before
            await scene.merge()
            scene.check()
            assert not next_path(scene.packet).exists()
    print(kills)
    assert kills["link"] + kills["linkat"] >= rolls - torn
    assert kills["rename"] + kills["renameat"] >= rolls - torn
    assert kills["fsync"] >= 2 * (rolls - torn)


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EPERM"])
async def test_refused_at_any_call_of_a_roll_it_says_so_or_goes_on(tmp_path: Path, traced: Traced, error: str) -> None:
    """What is not needed (rights, links where none are) is passed over; else the run ends, and the next goes on."""
    scene = await scene_of(tmp_path, traced, torn=True, max_bytes=FEW_BYTES)
    outcomes: Counter[tuple[str, int]] = Counter()
    for call in set(scene.calls()) - {"pread64"}:
        for number in count(1):
            ended = scene.run("-e", f"inject={call}:error={error}:when={number}")
            if not ended.injected:
                break
            outcomes[call, ended.code] += 1
            assert ended.code in (0, 4, 5), (call, number, ended)
            if ended.code:
                assert re.fullmatch(r"offload: .*\n", ended.err), (call, number, ended)
            await scene.merge()
            scene.check()
            assert not next_path(scene.packet).exists()
    for call in ("writev", "fdatasync", "rename"):
        assert (call, 0) not in outcomes, "it was passed over"
    assert outcomes["link", 0 if error == "EPERM" else 4]


@pytest.mark.parametrize("fsync", ["none", "interval", "always"])
async def test_a_roll_has_on_the_disk_what_the_next_step_relies_on(tmp_path: Path, traced: Traced, fsync: str) -> None:
    """Both files before one takes the other's name, the segment's own name before that, the new one before more."""
    scene = await scene_of(tmp_path, traced, torn=False, max_bytes=FEW_BYTES)
    with scene.running("-y", flags=("--fsync", fsync)) as (_, ends):
        pass
    assert ends[0].code == 0
    live, following, folder = str(scene.packet), str(next_path(scene.packet)), str(scene.packet.parent)
    dirty: set[str] = set()
    linked = renamed = 0
    for seen in ends[0].trace.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", seen)
        assert call is not None, seen
        name, rest = call.groups()
        written = re.match(r"\d+<(.*?)>", rest)
        path = "" if written is None else written[1].removesuffix(" (deleted)")
        if name in ("writev", "write", "pwrite64"):
            assert not (path == live and folder in dirty and renamed), seen
            dirty.add(path)
        elif name in ("fdatasync", "fsync"):
            dirty.discard(path)
        elif name in ("link", "linkat"):
            assert not dirty & {live, following}, seen
            dirty.add(folder)
            linked += 1
        elif name in ("rename", "renameat", "renameat2"):
            assert not dirty & {live, following, folder}, seen
            dirty.add(folder)
            renamed += 1
    assert linked == renamed >= 2


# A new file has a folder to sync, a torn one is cut and has bytes to be written again; a full disk takes no bytes.
@pytest.mark.parametrize(
    ("error", "torn", "only"),
    [
        ("EIO", False, CALLS),
        ("EIO", True, "ftruncate,pwrite64,fdatasync"),
        ("ENOSPC", True, "openat,writev,pwrite64"),
    ],
)
async def test_refused_at_any_call_on_the_packet_file_it_says_so_and_goes_on(
    tmp_path: Path, traced: Traced, error: str, torn: bool, only: str
) -> None:
    """Exit code 4, one line, whole frames; no fsync after one that failed, nothing behind it is called durable."""
    scene = await scene_of(tmp_path, traced, torn=torn)
    before = scene.before.read_bytes() if torn else b""
    refused: Counter[str] = Counter()
    calls = scene.calls()
    for call in calls.keys() & set(only.split(",")):
        for number in count(1):
            ended = scene.run("-e", f"inject={call}:error={error}:when={number}")
            if not ended.injected:
                break
            refused[call] += 1
            assert ended.code == 4, (call, number, ended)
            assert re.fullmatch(r"offload: .*\n", ended.err)
            assert scene.torn() == 0 or scene.packet.read_bytes() == before
            if call in ("fdatasync", "fsync"):
                told = re.search(r"bytes (\d+) to (\d+) are not known to be on the disk", ended.err)
                assert told is not None
                assert max([0, *scene.durable()]) <= int(told[1]) < int(told[2]) <= scene.packet.stat().st_size
                behind = ended.trace.split("(INJECTED)")[1]
                assert "sync(" not in behind
                assert "writev(" not in behind
            await scene.merge()
            scene.check()
    assert refused["writev"] >= 4 * ("writev" in only)
    assert refused["fdatasync"] >= 4 * ("fdatasync" in only)
    assert refused["pwrite64"] == torn


def lines_in(packet: Path) -> int:
    return verify(packet).lines if packet.exists() and packet.stat().st_size > 64 else 0


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does: it is seen in a file, and no event of ours tells it."""
    deadline = time.monotonic() + AMPLE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("torn", "max_bytes"), [(False, None), (True, None), (True, FEW_BYTES)], ids=["new", "torn", "segments"]
)
async def test_following_gets_over_a_full_disk_at_every_write(
    tmp_path: Path, traced: Traced, torn: bool, max_bytes: int | None
) -> None:
    """Each write finds no room at first: it waits, goes on by itself, and all of it is in."""
    scene = await scene_of(tmp_path, traced, torn=torn, max_bytes=max_bytes)
    lines = sum(data.count(b"\n") for data in scene.logged().values())
    with scene.running("-e", "inject=writev:error=ENOSPC:when=1+2", flags=("-f",)) as (pid, ends):
        until(lambda: lines_in(scene.packet) >= lines)
        os.kill(pid, signal.SIGTERM)
        # Its last COMMIT finds no room either, and it was asked to end.
    assert ends[0].code in (0, 4)
    assert ends[0].err.count("waits for room") >= 4
    assert ends[0].err.count("goes on") >= 4
    assert scene.torn() == 0
    await scene.merge()
    scene.check()


@pytest.mark.parametrize("write", [1, 3, 5])
async def test_killed_while_it_waits_for_room_it_goes_on(tmp_path: Path, traced: Traced, write: int) -> None:
    """A kill while it waits leaves whole frames, whichever write found no room."""
    scene = await scene_of(tmp_path, traced, torn=True)
    with scene.running("-e", f"inject=writev:error=ENOSPC:when={write}+", flags=("-f",)) as (pid, ends):
        until(lambda: "waits for room" in scene.said())
        os.kill(pid, signal.SIGKILL)
    assert ends[0].code == -signal.SIGKILL
    assert scene.torn() == 0
    await scene.merge()
    scene.check()
