"""`offload.tail`: whole lines, exactly once over any number of ends, and nothing left behind however a loop is left."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import aclosing, suppress
from pathlib import Path

import pytest

import offload
from offload.files.reading import Arena, Step
from offload.files.tail import Tail
from offload.merge.tailing import pack_position, unpack_position
from offload.merge.workload import Checker, Workload

AMPLE = 60.0  # seconds until what must happen is given up
DESCRIPTORS = Path("/proc/self/fd")


def _open() -> tuple[set[threading.Thread], dict[str, str]]:
    descriptors = {}
    for path in list(DESCRIPTORS.iterdir()) if DESCRIPTORS.is_dir() else []:
        with suppress(OSError):  # the one that listed them
            descriptors[path.name] = os.readlink(path)
    return set(threading.enumerate()), descriptors


class Lines:
    """Lines in the order in which they came, those put together that came in two parts."""

    def __init__(self) -> None:
        self.all: list[bytes] = []
        self.of: dict[str, list[int]] = {}  # which of them each source has
        self._open: dict[tuple[str, int], int] = {}  # where a part ended -> which line it is

    def take(self, batch: offload.Batch) -> None:
        new = batch.lines
        begun = self._open.pop((batch.source, batch.offset), None)
        if begun is not None and new:
            self.all[begun] += new.pop(0)
        self.of.setdefault(batch.source, []).extend(range(len(self.all), len(self.all) + len(new)))
        self.all += new
        if batch.open:
            end = batch.source, batch.offset + len(batch.data)
            self._open[end] = begun if begun is not None and not new else len(self.all) - 1


@pytest.fixture(scope="module", autouse=True)
def uvloop_has_its_pipe() -> None:
    """uvloop opens one for the process with its first loop, and keeps it."""
    with suppress(ImportError):
        import uvloop

        uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After a test there are no more threads and descriptors than before."""
    threads, descriptors = _open()
    yield
    gc.collect()
    threads_now, descriptors_now = _open()
    assert not [thread.name for thread in threads_now - threads]
    assert not [name for number, name in descriptors_now.items() if number not in descriptors]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


async def read(*paths: Path, resume: dict[str, str] | None = None, max_line: int = 1 << 24) -> list[offload.Batch]:
    """All that is there."""
    tail = offload.tail(list(map(str, paths)), resume=resume or {}, max_line=max_line)
    async with asyncio.timeout(AMPLE), aclosing(tail) as batches:
        return [batch async for batch in batches]


def text(batches: list[offload.Batch]) -> dict[str, bytes]:
    names = {Path(batch.source).name for batch in batches}
    return {name: b"".join(b.data for b in batches if Path(b.source).name == name) for name in names}


def positions(batches: list[offload.Batch]) -> dict[str, str]:
    return {batch.source: batch.position for batch in batches}


# --- what it gives ----------------------------------------------------------------------------------------------------


async def test_lines_as_they_are_with_their_place(logs: Path) -> None:
    """Whole lines of each file in order, with number and offset; CR, NUL and bytes that are no text stay."""
    (logs / "a").write_bytes(b"one\r\n\0two\n\xff\n")
    (logs / "b").write_bytes(b"\n\nlast")
    batches = await read(logs)
    assert text(batches) == {"a": b"one\r\n\0two\n\xff\n", "b": b"\n\nlast"}
    a = next(b for b in batches if b.source == str(logs / "a"))
    assert a.lines == [b"one\r\n", b"\0two\n", b"\xff\n"]
    assert (a.seq, a.offset, a.generation, a.open, a.gap) == (0, 0, 0, False, None)
    assert next(b for b in batches if b.source == str(logs / "b")).open


@pytest.mark.parametrize("size", [100, 3_000_000])
async def test_a_long_line_is_whole_up_to_the_limit_and_in_pieces_over_it(logs: Path, size: int) -> None:
    """A line comes whole, however many reads it takes, unless it is over `max_line`: then marked pieces make it up."""
    line = random.Random(0).randbytes(size).replace(b"\n", b" ") + b"\n"
    (logs / "a").write_bytes(b"before\n" + line + b"after\n")
    batches = await read(logs)
    assert [line for b in batches for line in b.lines] == [b"before\n", line, b"after\n"]
    assert not any(b.continues or b.open for b in batches)
    pieces = await read(logs, max_line=1 << 20)
    assert b"".join(b.data for b in pieces) == b"before\n" + line + b"after\n"
    assert [b.continues for b in pieces][1:] == [b.open for b in pieces][:-1]
    assert any(b.open for b in pieces) is (size > 1 << 20)
    numbers = [b.seq + n for b in pieces for n in range(len(b.lines))]
    assert sorted(set(numbers)) == [0, 1, 2]


async def test_a_line_without_its_end_goes_on_later(logs: Path) -> None:
    """What was given without a line end is not given again: the rest comes, marked, with the same number."""
    (logs / "a").write_bytes(b"one\ntw")
    first = await read(logs)
    append(logs / "a", b"o\nthree\n")
    second = await read(logs, resume=positions(first))
    assert (first[-1].open, second[0].continues, second[0].data) == (True, True, b"o\nthree\n")
    assert (first[-1].seq, second[0].seq) == (0, 1)


async def test_what_nobody_has_any_more_is_told(logs: Path) -> None:
    """A file truncated before it was read on leaves a gap in its place, and begins anew behind it."""
    (logs / "a").write_bytes(b"one\ntwo\n")
    first = await read(logs)
    (logs / "a").write_bytes(b"new\n")
    second = await read(logs, resume=positions(first))
    gaps = [b.gap for b in second if b.gap]
    assert [gap.reason for gap in gaps] in (["truncated"], [])
    assert text(second) == {"a": b"new\n"}
    assert second[-1].generation == 1


async def test_what_cannot_be_read_is_an_error_behind_the_rest(logs: Path) -> None:
    """Without `follow`, a missing file is raised once all that could be read was given."""
    (logs / "a").write_bytes(b"one\n")
    batches = offload.tail([str(logs / "a"), str(logs / "nope")])
    assert (await anext(batches)).data == b"one\n"
    with pytest.raises(FileNotFoundError):
        await anext(batches)


def test_what_is_no_position_is_refused_at_once(logs: Path) -> None:
    """A wrong, damaged or doubled position is told before anything is read."""
    for wrong in ("", "nonsense", "AQEAAAAA", "ö", "x" * 500):
        with pytest.raises(ValueError, match="as a position, expected"):
            offload.tail([str(logs)], resume=[wrong])
    (logs / "a").write_bytes(b"one\n")
    right = asyncio.run(read(logs))[0].position
    assert json.loads(json.dumps(right)) == right
    path, generations = unpack_position(right)
    assert (path, pack_position(generations)) == (os.fsencode(logs / "a"), right)
    with pytest.raises(ValueError, match="two positions"):
        offload.tail([str(logs)], resume=[right, right])
    with pytest.raises(ValueError, match="no sources"):
        offload.tail([])


# --- exactly once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_exactly_once_over_many_ends(logs: Path, seed: int) -> None:
    """Left after any batch and taken up from its positions, through rotation of every kind, each line comes once."""
    chance = random.Random(seed)
    work = Workload(logs, str(seed), longest=5000, rotations=0.05)
    kept: dict[str, str] = {}
    moved: set[Path] = set()

    def may_rotate(path: Path) -> bool:
        # Once until all was read: the copy of a copy of which nothing was read is a file of its own.
        if str(path) not in kept or path in moved:
            return False
        moved.add(path)
        return True

    work.may_rotate = may_rotate
    lines = Lines()
    for _ in range(25):
        for _ in range(20):
            work.step()
        left = chance.randrange(1, 12)
        async with asyncio.timeout(AMPLE), aclosing(offload.tail([str(logs)], resume=kept)) as batches:
            async for batch in batches:
                assert batch.gap is None
                lines.take(batch)
                kept[batch.source] = batch.position
                left -= 1
                if not left:
                    break
            else:
                moved.clear()
    work.finish()
    for batch in await read(logs, resume=kept):
        lines.take(batch)
    assert await read(logs, resume={**kept, **positions(await read(logs, resume=kept))}) == []
    work.close()
    checker = Checker(work.written)
    for line in lines.all:
        checker.take(line)
    found = checker.end()
    assert (found.lost, found.doubled, found.garbled) == (0, 0, 0), found
    for source, numbers in lines.of.items():  # a copy may be a source of its own, which has its own order
        checker = Checker(work.written)
        for number in numbers:
            checker.take(lines.all[number])
        assert not (found := checker.end()).reordered, (source, found)


@pytest.mark.parametrize("packed", [False, True])
async def test_what_was_read_is_known_under_its_rotated_names(logs: Path, packed: bool) -> None:
    """Renamed and packed while nobody read, a file is read on where it was left, and no line of it comes twice."""
    (logs / "a.log").write_bytes(b"one\n" * 100)
    first = await read(logs)
    append(logs / "a.log", b"two\n")
    (logs / "a.log").rename(logs / "a.log.1")
    if packed:
        import gzip

        with (logs / "a.log.1").open("rb") as plain, gzip.open(logs / "a.log.1.gz", "wb") as out:
            shutil.copyfileobj(plain, out)
        (logs / "a.log.1").unlink()
    (logs / "a.log").write_bytes(b"three\n")
    second = await read(logs, resume=positions(first))
    assert text(second) == {"a.log": b"two\nthree\n"}
    assert len(second) == 2
    for number, batch in enumerate(second):  # both are of one look: what is behind each is told by its own position
        behind = await read(logs, resume={batch.source: batch.position})
        assert b"".join(b.data for b in second[: number + 1] + behind) == b"two\nthree\n"
    assert await read(logs, resume={**positions(first), **positions(second)}) == []
    append(logs / "a.log", b"four\n")
    assert text(await read(logs, resume={**positions(first), **positions(second)})) == {"a.log": b"four\n"}


async def test_each_batch_of_a_look_has_its_own_position(logs: Path) -> None:
    """Lines before and behind a hole come in two batches of one look, and each position is where that batch ends."""
    (logs / "a").write_bytes(b"one\n" + bytes(10_000) + b"two\n" + bytes(10_000) + b"three\n")
    batches = await read(logs)
    assert [b.data for b in batches] == [b"one\n", b"two\n", b"three\n"]
    assert [b.seq for b in batches] == [0, 1, 2]
    for number, batch in enumerate(batches):
        behind = await read(logs, resume={batch.source: batch.position})
        assert [b.data for b in behind] == [b.data for b in batches[number + 1 :]]


async def test_follow_gives_lines_as_they_come(logs: Path) -> None:
    """Followed, new lines, new files and a rotation's next file come without another call."""
    (logs / "a").write_bytes(b"1\n")
    got: dict[str, bytes] = {}
    async with asyncio.timeout(AMPLE), aclosing(offload.tail([str(logs)], follow=True)) as batches:
        async for batch in batches:
            name = Path(batch.source).name
            got[name] = got.get(name, b"") + batch.data
            if got == {"a": b"1\n"}:
                append(logs / "b", b"2\n")
            elif got == {"a": b"1\n", "b": b"2\n"}:
                (logs / "a").rename(logs / "a.1")
                append(logs / "a", b"3\n")
            elif got == {"a": b"1\n3\n", "b": b"2\n"}:
                break


# --- what it costs ----------------------------------------------------------------------------------------------------


async def test_no_more_is_read_ahead_than_some_mebibytes(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that does not take what comes keeps the rest in the files."""
    (logs / "a").write_bytes(b"x" * 99 + b"\n" + b"y" * 99 + b"\n" * 1)
    with (logs / "a").open("ab") as file:
        for _ in range(64):
            file.write((b"z" * 99 + b"\n") * 10_000)
    given = 0
    begun = threading.Event()
    before = Tail.read

    def counted(self: Tail, arena: Arena, steps: list[Step], *, final: bool = False) -> bool:
        nonlocal given
        at = self.offset
        more = before(self, arena, steps, final=final)
        given += self.offset - at
        if given > 3 << 20:
            begun.set()
        return more

    monkeypatch.setattr(Tail, "read", counted)
    total = 0
    async with asyncio.timeout(AMPLE), aclosing(offload.tail([str(logs)])) as batches:
        async for batch in batches:
            if not total:
                while not begun.is_set():  # noqa: ASYNC110 - another thread sets it
                    await asyncio.sleep(0.001)
                for _ in range(50):  # chances to read on
                    await asyncio.sleep(0.001)
                assert given <= 8 << 20
            total += len(batch.data)
    assert total == given == (logs / "a").stat().st_size


# --- how it is left ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("uv", [False, True])
@pytest.mark.parametrize("closing", [False, True])
def test_break_ends_threads_and_closes_files(logs: Path, follow: bool, uv: bool, closing: bool) -> None:
    """After a `break`, with `aclosing` or without, the threads have ended when the loop has."""
    for number in range(20):
        (logs / f"{number}.log").write_bytes(b"one\n" * 1000)
    factory = None
    if uv:
        factory = pytest.importorskip("uvloop").new_event_loop

    async def main() -> None:
        before = set(threading.enumerate())
        if closing:
            async with aclosing(offload.tail([str(logs)], follow=follow)) as batches:
                async for _ in batches:
                    break
            assert not set(threading.enumerate()) - before
        else:
            async for _ in offload.tail([str(logs)], follow=follow):
                break
            async with asyncio.timeout(AMPLE):
                while set(threading.enumerate()) - before:  # noqa: ASYNC110 - asyncio closes it in a task
                    await asyncio.sleep(0.001)

    with asyncio.Runner(loop_factory=factory, debug=not uv) as runner:
        runner.run(main())


async def test_an_exception_of_the_block_comes_through(logs: Path) -> None:
    """What the block raises reaches its caller, and the threads have ended."""
    (logs / "a").write_bytes(b"one\n")

    async def block() -> None:
        async with aclosing(offload.tail([str(logs)], follow=True)) as batches:
            async for _ in batches:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await block()


async def test_cancelled_at_any_moment_it_ends_and_goes_on_from_its_positions(logs: Path) -> None:
    """After any number of its task's steps a cancellation comes through, nothing stays, and each line comes once."""
    for name in "abc":
        (logs / name).write_bytes(b"".join(b"%s %d\n" % (name.encode(), n) for n in range(2000)))
    kept: dict[str, str] = {}
    lines: dict[str, list[bytes]] = {}

    async def consume() -> None:
        async with aclosing(offload.tail([str(logs)], follow=True, resume=kept)) as batches:
            async for batch in batches:
                lines.setdefault(batch.source, []).extend(batch.lines)
                kept[batch.source] = batch.position
                await asyncio.sleep(0)

    before = set(threading.enumerate())
    for steps in [*range(40), *range(40, 400, 20)]:
        task = asyncio.create_task(consume())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not set(threading.enumerate()) - before
        append(logs / "a", b"more %d\n" % steps)
    for batch in await read(logs, resume=kept):
        lines.setdefault(batch.source, []).extend(batch.lines)
    assert {Path(source).name: b"".join(found) for source, found in lines.items()} == {
        name: (logs / name).read_bytes() for name in "abc"
    }


def test_several_loops_at_once(logs: Path) -> None:
    """Iterators on loops of different threads do not disturb each other."""
    (logs / "a").write_bytes(b"line\n" * 100_000)
    sizes: list[int] = []

    def one() -> None:
        sizes.append(sum(len(batch.data) for batch in asyncio.run(read(logs))))

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [500_000] * 3
