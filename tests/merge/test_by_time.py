"""Order by the times in the lines: what must stand where, whatever comes when, and each line once."""

from __future__ import annotations

import asyncio
import heapq
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BrokenResourceError
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.files.reading import Begin, Gap, Step
from offload.merge import by_time
from offload.merge.audit import verify
from offload.merge.batches import pieces
from offload.merge.by_time import ByTime, TimeOrder
from offload.merge.engine import Merge
from offload.merge.progress import Progress
from offload.merge.split import split
from offload.packets.codec import GapInfo, SourceInfo, line_pieces
from offload.packets.format import HOLE_STRUCT, Compression, EntryFlag, Flag, FrameType, GapReason

AMPLE = 60.0  # seconds until something that must happen counts as hung
SECOND = 10**9
START = 1_700_000_000 * SECOND
LATENESS = 5 * SECOND


def stamp(time_ns: int) -> bytes:
    seconds, rest = divmod(time_ns, SECOND)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09}Z".encode()


def time_of(line: bytes) -> int | None:
    if len(line) < 30 or line[29:30] != b"Z":
        return None
    moment = datetime.strptime(line[:19].decode(), "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
    return int(moment.timestamp()) * SECOND + int(line[20:29])


# --- the stage alone, under a clock that we turn ----------------------------------------------------------------------


@dataclass(eq=False)
class Log:
    """A source that grows, and how far it was read. It stands for a Tail, of which the stage needs nothing but this."""

    number: int
    data: bytearray = field(default_factory=bytearray)
    offset: int = 0
    open: EntryFlag = EntryFlag.NONE
    newest: int = START  # the latest time that it wrote

    def read(self, steps: list[Step], limit: int, *, final: bool) -> bool:
        """As `Tail.read` with an arena of so many bytes."""
        end = min(len(self.data), self.offset + limit)
        last = end == len(self.data)
        given = self.offset
        for piece in line_pieces(self.data, given, end, self.open, ended=final and last, limit=limit):
            payload = memoryview(bytes(self.data[piece.start : piece.end]))
            steps.append(Piece(self.number, payload, piece.start, piece.count, piece.flags))
            self.offset, self.open = piece.end, piece.open
        return not last


class World:
    """Logs, the stage and a packet file. The stage may be lost at any time: what it held is read again."""

    def __init__(self, path: Path, logs: int) -> None:
        self.path, self.now = path, START
        self.logs = [Log(n) for n in range(logs)]
        self.kept: list[bytes] = []  # what was written, by lines of a run of the stage
        self.progress = Progress()
        self.file: PacketFile
        self.begin()

    def begin(self) -> None:
        self.file = PacketFile(self.path, fsync="none", clock=lambda: self.now)
        for log in self.logs:
            state = self.file.ledger.sources.get(log.number)
            log.offset, log.open = (state.resume_off, state.open) if state else (0, EntryFlag.NONE)
        self.progress = Progress()
        self.order = TimeOrder(
            ByTime(lateness=LATENESS / SECOND),
            self.progress,
            clock=lambda: self.now,
            monotonic=lambda: (self.now - START) / SECOND,
        )

    def kill(self) -> None:
        self.file.close()
        self.begin()

    def write(self, steps: list[Step]) -> None:
        self.file.append(pieces(self.file, steps))

    def run(self, chosen: list[Log], limit: int, *, final: bool = False) -> None:
        """A pass of the engine over some of the logs, as `Merge._pass` does it."""
        queue: deque[Any] = deque(chosen)
        self.order.expect(queue, final=final)
        while queue:
            log: Any = self.order.next(queue)
            if log is None:
                break
            steps: list[Step] = []
            if log.number not in self.file.ledger.sources and log.number == len(self.file.ledger.sources):
                info = SourceInfo(1, log.number, 0, 0, Compression.NONE, b"/logs/%d" % log.number)
                steps.append(Begin(log.number, info, first=True))
            more = log.read(steps, limit, final=final)
            self.order.put(log, steps, more=more)
            assert not steps
            if more:
                queue.append(log)
            self.write(self.order.released({})[0])
        self.write(self.order.released({})[0])

    def written(self) -> list[tuple[int, bytes]]:
        """Number of the source and bytes of each piece of a line in the file, as it stands there."""
        self.file.commit()
        found: list[tuple[int, bytes]] = []
        with FrameSource(self.path) as frames:
            for frame in frames:
                if frame.header.type is FrameType.LINES:
                    found += [(frame.header.source_id, line) for line in frame.payload.splitlines(keepends=True)]
        return found


def keys(lines: list[tuple[int, bytes]]) -> list[int]:
    """The time of each line, or of that before it in its source."""
    result, last = list[int](), dict[int, int]()
    for number, line in lines:
        found = time_of(line)
        last[number] = last.get(number, 0) if found is None else found
        result.append(last[number])
    return result


def late(order: list[int]) -> int:
    """How many of these stand behind a greater one."""
    count, highest = 0, 0
    for key in order:
        count += 0 < key < highest
        highest = max(highest, key)
    return count


THREE = st.integers(0, 2)
actions = st.lists(
    st.one_of(
        # Lines of a log, each so long ago, or without a time.
        st.tuples(st.just("lines"), THREE, st.lists(st.none() | st.integers(0, 9 * SECOND), max_size=6)),
        st.tuples(st.just("time"), st.integers(0, 7 * SECOND), st.none()),
        st.tuples(st.just("read"), st.sets(THREE), st.integers(40, 200)),
        st.tuples(st.just("kill"), st.none(), st.none()),
    ),
    max_size=30,
)


def play(world: World, happens: list[tuple[str, Any, Any]], *, orderly: bool) -> None:
    """`orderly`: no log goes back in time, and no line comes later than LATENESS."""
    count = 0
    for what, one, two in happens:
        if what == "lines":
            log = world.logs[one]
            # What belongs to a line comes with it: alone, it may come later than the lateness allows for that line.
            for ago in dropwhile(lambda ago: ago is None, two) if orderly else two:
                count += 1
                if ago is None:
                    log.data += b"\tline %d\n" % count
                    continue
                moment = world.now - min(ago, LATENESS) if orderly else world.now - ago
                moment = log.newest = max(log.newest, moment) if orderly else moment
                log.data += stamp(moment) + b" line %d" % count + b"\r\n"[count % 2 :]
            if orderly:
                world.run(world.logs, 150)
        elif what == "time":
            world.now += one
            if orderly:
                world.run(world.logs, 150)
        elif what == "read" and not orderly:
            world.run([world.logs[number] for number in one if number <= len(world.file.ledger.sources)], two)
        elif what == "kill" and not orderly:
            world.kill()


def check_all(world: World) -> list[tuple[int, bytes]]:
    """Each byte of each log is there once, in order, and the file says so itself."""
    written = world.written()
    for log in world.logs:
        assert b"".join(line for number, line in written if number == log.number) == log.data
    world.file.close()
    found = verify(world.path)
    assert found.ok, found.faults
    assert found.lines == sum(log.data.count(b"\n") + (bool(log.data) and log.data[-1:] != b"\n") for log in world.logs)
    return written


@settings(max_examples=200, deadline=None)
@given(actions, st.integers(40, 400), st.booleans())
def test_each_line_once_and_in_the_order_of_its_source(
    happens: list[tuple[str, Any, Any]], limit: int, unended: bool
) -> None:
    """Whatever comes when, and however often what is held is lost, each line is written once, as its source has it."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "p.opk", 3)
        play(world, happens, orderly=False)
        world.logs[0].data += b"no end" * unended
        before = len(world.written())
        world.run(world.logs, limit, final=True)
        told = world.progress.late
        written = check_all(world)
        assert before <= len(written)
        pieces = limit < 60 or any(what == "read" and length < 60 for what, _, length in happens)
        if not pieces and not any(what == "kill" for what, _, _ in happens):
            assert told == late(keys(written))


@settings(max_examples=200, deadline=None)
@given(actions)
def test_in_order_if_all_come_within_the_lateness(happens: list[tuple[str, Any, Any]]) -> None:
    """Where each line comes within the lateness, in order in its own source, the file is in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "p.opk", 3)
        world.run(world.logs, 150)
        play(world, happens, orderly=True)
        world.run(world.logs, 150, final=True)
        order = [key for key in keys(check_all(world)) if key]
        assert order == sorted(order)
        assert world.progress.late == 0


@settings(max_examples=100, deadline=None)
@given(actions)
def test_nothing_waits_longer_than_the_lateness(happens: list[tuple[str, Any, Any]]) -> None:
    """Once the lateness has passed and everything is read, everything is written, whatever the times say."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "p.opk", 3)
        world.run(world.logs, 150)
        play(world, happens, orderly=False)
        world.logs[1].data += stamp(START + 10**6 * SECOND) + b" from the future\n"
        world.run(world.logs, 150)
        world.now += LATENESS + SECOND // 1000
        world.run([], 150)
        check_all(world)


def test_a_busy_source_waits_for_no_longer_than_it_must() -> None:
    """What all others have passed is written at once, without any waiting."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "p.opk", 2)
        world.run(world.logs, 1000)
        for ago, number in enumerate([0, 1] * 3):
            world.logs[number].data += stamp(START + ago) + b" x\n"
            world.run(world.logs, 1000)
        assert len(world.written()) == 5  # the last may be followed by one of the other source
        assert world.order.due() == pytest.approx(LATENESS / SECOND, abs=0.1)
        world.file.close()


def test_a_source_that_holds_its_share_is_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one source is far ahead of another, it is left alone, and it is the other that is read."""
    monkeypatch.setattr(by_time, "HELD_BYTES", 3 * by_time._LEAST)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "p.opk", 3)
        for log in world.logs:
            first = START + (1000 if log.number == 2 else 0) * SECOND
            log.data += b"".join(stamp(first + n * SECOND // 100) + b"x" * 1000 + b"\n" for n in range(300))
        queue: deque[Any] = deque(world.logs)
        world.order.expect(queue, final=True)
        held, steps = list[int](), list[Step]()
        while queue:
            chosen: Any = world.order.next(queue)
            if chosen.read(steps, 20_000, final=True):
                queue.append(chosen)
            world.order.put(chosen, steps, more=chosen in queue)
            held.append(world.order._held)
        assert max(held) <= 3 * (by_time._LEAST + 20_000)
        assert len(world.logs[2].data) > 3 * by_time._LEAST
        world.file.close()


def test_a_time_within_a_long_line_is_none() -> None:
    """A piece of a long line that begins with what looks like a time goes with the line that it is of."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "p.opk", 2)
        world.run(world.logs, 60)
        world.logs[0].data += stamp(START) + b"x" * 30 + stamp(START + 9 * SECOND) + b" goes on\n"
        world.logs[1].data += stamp(START + SECOND) + b" other\n"
        world.run(world.logs, 60, final=True)
        assert [number for number, _ in world.written()] == [0, 0, 1]
        world.file.close()


def test_a_source_without_times_waits_for_nobody() -> None:
    """Lines of a source in which no time is found are written as they come, and nobody waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "p.opk", 2)
        world.logs[0].data += b"no time\n"
        world.logs[1].data += stamp(START) + b" a\n"
        world.run(world.logs, 1000)
        assert [line for _, line in world.written()] == [b"no time\n", stamp(START) + b" a\n"]
        world.file.close()


def test_what_is_no_line_keeps_its_place() -> None:
    """A gap, a hole and the next generation stand where they stood among their source's lines."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "p.opk", 2)
        info = [SourceInfo(1, n, 0, 0, Compression.NONE, b"/logs/%d" % n) for n in range(2)]
        line, other = stamp(START + 9) + b" a\n", stamp(START) + b" b\n"
        size = len(line)
        of_first: list[Step] = [
            Begin(0, info[0], first=True),
            Piece(0, line, 0, 1),
            Piece(0, HOLE_STRUCT.pack(4096), size, 0, Flag.HOLE),
            Gap(0, GapInfo(size + 4096, size + 5000, 3, GapReason.TRUNCATED)),
            Begin(0, info[0], first=False),
            Piece(0, line, 0, 1),
        ]
        logs = cast("list[Any]", world.logs)
        world.order.expect(logs, final=True)
        world.order.put(logs[0], of_first, more=False)
        world.write(world.order.released({})[0])  # only who the source is
        world.order.put(logs[1], [Begin(1, info[1], first=True), Piece(1, other, 0, 1)], more=False)
        world.write(world.order.released({})[0])
        world.file.close()
        with FrameSource(world.path) as frames:
            found = [(f.header.type.name, f.header.source_id, f.header.flags) for f in frames][1:-1]
        assert found == [
            ("SOURCE", 0, 0),
            ("SOURCE", 1, 0),
            ("LINES", 1, 0),
            ("LINES", 0, 0),
            ("LINES", 0, Flag.HOLE),
            ("GAP", 0, 0),
            ("SOURCE", 0, 0),
            ("LINES", 0, 0),
        ]
        assert verify(world.path).ok


def test_frames_tell_when_their_lines_were_read() -> None:
    """Each frame has the time of arrival of its lines, a later one for each read, but none of more than KEPT ago."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "p.opk", 2)
        logs = cast("list[Any]", world.logs)
        info = [SourceInfo(1, n, 0, 0, Compression.NONE, b"/logs/%d" % n) for n in range(2)]
        world.order.expect(logs, final=True)
        world.order.put(
            logs[0], [Begin(0, info[0], first=True), Piece(0, stamp(START + 5) + b" a\n", 0, 1)], more=False
        )
        world.order.put(logs[1], [Begin(1, info[1], first=True), Piece(1, stamp(START) + b" b\n", 0, 1)], more=True)
        world.write(world.order.released({})[0])
        world.now += 3 * SECOND
        world.order.put(logs[1], [Piece(1, stamp(START + 1) + b" c\n", 33, 1)], more=True)
        world.write(world.order.released({})[0])
        world.now += by_time.KEPT
        world.order.put(logs[1], [], more=False)
        world.write(world.order.released({})[0])
        world.file.close()
        with FrameSource(world.path) as frames:
            times = [f.header.time_ns - START for f in frames if f.header.type is FrameType.LINES]
        assert times == [1, 3 * SECOND, 3 * SECOND]


# --- the merge, with real files ---------------------------------------------------------------------------------------


async def merged(out: Path, folder: Path, **options: Any) -> Progress:
    async with Merge([str(folder)], out, by_time=ByTime(), **options) as engine, asyncio.timeout(AMPLE):
        return await engine.run()


def lines_of(out: Path) -> list[bytes]:
    with FrameSource(out) as frames:
        return [
            line
            for frame in frames
            if frame.header.type is FrameType.LINES
            for line in frame.payload.splitlines(keepends=True)
        ]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.none() | st.integers(0, 50), max_size=30), min_size=1, max_size=5))
def test_a_batch_is_in_the_order_of_time(logs: list[list[int | None]]) -> None:
    """A merge of files that are in order gives the order of all of them, records whole, what was named first first."""
    with tempfile.TemporaryDirectory() as name:
        folder, sources = Path(name) / "logs", list[list[tuple[int, int, bytes]]]()
        folder.mkdir()
        for number, moments in enumerate(logs):
            moments = [None] * moments.count(None) + sorted(m for m in moments if m is not None)
            last, lines = -1, list[tuple[int, int, bytes]]()
            for moment in moments:
                last = last if moment is None else moment
                text = b"\tat x %d\n" % number if moment is None else stamp(START + moment * SECOND) + b" %d\n" % number
                lines.append((last, number, text))
            sources.append(lines)
            (folder / f"{number}.log").write_bytes(b"".join(text for _, _, text in lines))
        out = Path(name) / "out.opk"
        progress = asyncio.run(merged(out, folder, fsync="none"))
        assert lines_of(out) == [text for _, _, text in heapq.merge(*sources, key=lambda one: one[:2])]
        assert progress.late == 0
        assert verify(out).ok


@pytest.mark.parametrize("most", [128 << 20, 1 << 20])
async def test_large_files_with_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Files much larger than what may be held come out in order; if not even a read of each may be held, complete."""
    monkeypatch.setattr(by_time, "HELD_BYTES", 1 << 20)
    monkeypatch.setattr(by_time, "MOST_BYTES", most)
    logs = tmp_path / "logs"
    logs.mkdir()
    contents: dict[str, bytes] = {}
    for number in range(30):
        # The last begins when most are over: all of them wait for it, and none may be read on far.
        begin = 3000 if number == 29 else number * 7
        texts = (stamp(START + (begin + k) * SECOND) + b" %d %d " % (number, k) + b"x" * 60 for k in range(4000))
        contents[f"{number:02}.log"] = data = b"\n".join(texts) + b"\n"
        (logs / f"{number:02}.log").write_bytes(data)
    most_held = 0
    released = TimeOrder.released

    def watched(self: TimeOrder, stats: dict[int, tuple[int, int]]) -> Any:
        nonlocal most_held
        result = released(self, stats)
        most_held = max(most_held, self._held)
        return result

    monkeypatch.setattr(TimeOrder, "released", watched)
    progress = await merged(tmp_path / "out.opk", logs, fsync="none")
    split(tmp_path / "out.opk", tmp_path / "back")
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == contents
    order = [key for line in lines_of(tmp_path / "out.opk") if (key := time_of(line)) is not None]
    assert progress.late == late(order)
    if most > 1 << 20:
        assert order == sorted(order)
        assert most_held <= 5 << 20  # a share and a read of each source
    else:
        assert most_held <= most


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(AMPLE):
        while not condition():  # noqa: ASYNC110 - a file that another thread writes; it has no event
            await asyncio.sleep(0.002)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


async def test_following_orders_what_comes(tmp_path: Path) -> None:
    """While following, a line waits for an earlier one of another source, and is then written without a stop."""
    logs, out = tmp_path / "logs", tmp_path / "out.opk"
    logs.mkdir()
    before = time.time_ns() - 30 * SECOND
    (logs / "a.log").write_bytes(stamp(before) + b" first\n")
    (logs / "b.log").write_bytes(stamp(before) + b" first\n")
    async with Merge([str(logs)], out, follow=True, by_time=ByTime(lateness=6.0)) as engine:
        running = asyncio.ensure_future(engine.run())
        await until(lambda: engine.progress.lines == 2)
        now = time.time_ns()  # the second is written within `lateness`, however busy the machine is
        early, later = stamp(now - 20 * SECOND) + b" early\n", stamp(now) + b" later\n"
        append(logs / "a.log", later)
        append(logs / "b.log", early)
        await until(lambda: len(lines_of(out)) == 4)
        assert lines_of(out)[2:] == [early, later]
        engine.stop()
        await running
    assert engine.progress.late == 0


async def test_a_stop_releases_what_is_held(tmp_path: Path) -> None:
    """What waits for others when the merge is stopped is written, in order."""
    logs, out = tmp_path / "logs", tmp_path / "out.opk"
    logs.mkdir()
    late_by = 3600.0
    now = time.time_ns()
    (logs / "a.log").write_bytes(stamp(now) + b" a\n" + stamp(now + SECOND) + b" c\n")
    (logs / "b.log").write_bytes(stamp(now + 1) + b" b\n")
    async with Merge([str(logs)], out, follow=True, by_time=ByTime(lateness=late_by)) as engine:
        running = asyncio.ensure_future(engine.run())
        await until(lambda: engine.progress.caught_up and engine.progress.lines == 2)
        engine.stop()
        await running
    assert [line[-2:] for line in lines_of(out)] == [b"a\n", b"b\n", b"c\n"]


async def test_cancelling_writes_what_is_held(tmp_path: Path) -> None:
    """A merge that is cancelled ends with what was read in the file."""
    logs, out = tmp_path / "logs", tmp_path / "out.opk"
    logs.mkdir()
    now = time.time_ns()
    (logs / "a.log").write_bytes(stamp(now) + b" a\n")
    (logs / "b.log").write_bytes(b"")
    async with Merge([str(logs)], out, follow=True, by_time=ByTime(lateness=3600.0)) as engine:
        running = asyncio.ensure_future(engine.run())
        await until(lambda: engine.progress.caught_up)
        assert engine.progress.lines == 0
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert lines_of(out) == [stamp(now) + b" a\n"]


async def test_a_broken_disk_ends_it_with_the_error(tmp_path: Path) -> None:
    """If the packet file is taken away, the merge says so, and does not hang on what it holds."""
    logs, out = tmp_path / "logs", tmp_path / "out.opk"
    logs.mkdir()
    (logs / "a.log").write_bytes(stamp(time.time_ns() + 3600 * SECOND) + b" a\n")
    (logs / "b.log").write_bytes(stamp(time.time_ns()) + b" b\n")
    engine = await Merge([str(logs)], out, follow=True, by_time=ByTime(lateness=3600.0)).start()
    running = asyncio.ensure_future(engine.run())
    await until(lambda: engine.progress.lines == 1)
    out.unlink()
    append(logs / "b.log", stamp(time.time_ns() + SECOND) + b" b\n")
    with pytest.raises(BrokenResourceError):
        await asyncio.wait_for(running, AMPLE)
    with suppress(BrokenResourceError):  # told again, or not
        await engine.aclose()


async def test_long_lines_and_odd_ends_are_kept(tmp_path: Path) -> None:
    """Lines longer than what is read at once, CRLF, NULs, a byte order mark, holes and a missing end: byte for byte."""
    logs, out = tmp_path / "logs", tmp_path / "out.opk"
    logs.mkdir()
    contents = {
        "a.log": b"\xef\xbb\xbf" + stamp(START) + b" bom\r\n" + stamp(START + 2) + b"x" * (3 << 20) + b"\r\n\tat\n",
        "b.log": stamp(START + 1) + b" nul \0\n" + bytes(8192) + stamp(START + 3) + b" behind a hole\n",
        "c.log": b"\n\n" + stamp(START + 1) + b" x\n" + stamp(START + 4) + b" without an end",
    }
    for name, data in contents.items():
        (logs / name).write_bytes(data)
    progress = await merged(out, logs)
    append(logs / "c.log", b" of its own\n" + stamp(START + 5) + b" y\n")
    contents["c.log"] = (logs / "c.log").read_bytes()
    again = await merged(out, logs)
    split(out, tmp_path / "back")
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == contents
    assert (progress.late, again.late) == (0, 0)
    assert verify(out).ok


@pytest.mark.parametrize(
    ("options", "error", "what"),
    [
        ({"lateness": -1.0}, ValueError, "lateness is -1.0, expected seconds, 0 or more"),
        ({"lateness": float("nan")}, ValueError, "lateness is nan"),
        ({"formats": "%Y"}, TypeError, r"expected a tuple of them; write \('%Y',\)"),
        ({"formats": ("%Y-%m-%d",)}, ValueError, "names no hour"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], error: type[Exception], what: str) -> None:
    """Settings that can never work are refused as they are made, with what is wrong."""
    with pytest.raises(error, match=what):
        ByTime(**options)


def test_late_counts_as_the_file_shows() -> None:
    """The count of late lines is that of lines behind one with a later time (the model above, on plain numbers)."""
    assert late([1, 2, 2, 1, 3]) == 1
    assert all(a <= b for a, b in pairwise(sorted([3, 1, 2])))
