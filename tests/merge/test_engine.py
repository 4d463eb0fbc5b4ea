"""The merge itself, in this process: real files, real threads; each claim of `offload/merge/engine.py`."""

# ruff: noqa: ASYNC240 - these files are small, and the loop has nothing else to do

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from offload.errors import BrokenResourceError, BusyResourceError, ClosedResourceError, PacketError
from offload.files.frame_source import FrameSource
from offload.files.reading import Arena, Step
from offload.files.tail import Tail
from offload.merge.audit import verify
from offload.merge.engine import Merge, Progress
from offload.merge.sources import Sources
from offload.merge.split import split, stat
from offload.packets.codec import CommitInfo
from offload.packets.format import FrameType

AMPLE = 60.0  # seconds until a condition that must come true is given up
DESCRIPTORS = Path("/proc/self/fd")


def _open() -> tuple[set[threading.Thread], dict[str, str]]:
    descriptors = {}
    for path in list(DESCRIPTORS.iterdir()) if DESCRIPTORS.is_dir() else []:
        with suppress(OSError):  # the one that listed them
            descriptors[path.name] = os.readlink(path)
    return set(threading.enumerate()), descriptors


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After a test there are no more threads and descriptors than before."""
    threads, descriptors = _open()
    yield
    gc.collect()
    threads_now, descriptors_now = _open()
    assert not [thread.name for thread in threads_now - threads]
    assert not [name for number, name in descriptors_now.items() if number not in descriptors]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(AMPLE):
        while not condition():  # noqa: ASYNC110 - a count that another thread keeps; it has no event
            await asyncio.sleep(0.002)


async def merge(out: Path, *paths: Path | str) -> Progress:
    async with Merge(Sources([str(path) for path in paths]), out) as engine, asyncio.timeout(AMPLE):
        return await engine.run()


@asynccontextmanager
async def following(out: Path, *paths: Path | str, poll: bool = False) -> AsyncIterator[Merge]:
    """A merge that follows until the block ends; then everything that was there must be in the file."""
    async with Merge(Sources([str(path) for path in paths]), out, follow=True, poll=poll) as engine:
        running = asyncio.ensure_future(engine.run())
        try:
            yield engine
        finally:
            engine.stop()
            async with asyncio.timeout(AMPLE):
                await running


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def contents(out: Path) -> dict[str, bytes]:
    """What the packet file holds of each source, generations one behind the other; every checksum must hold."""
    found = verify(out)
    assert found.ok, found.faults
    report = stat(out)  # of a file that may be growing: what comes after is for the next look
    names = {entry.source_id: entry.name for entry in report.sources}
    held = dict.fromkeys(names.values(), b"")
    with FrameSource(out) as source:
        for frame in source:
            if frame.offset < report.end and frame.header.type is FrameType.LINES:
                held[names[frame.header.source_id]] += frame.payload
    assert {entry.name: entry.bytes for entry in report.sources} == {n: len(data) for n, data in held.items()}
    return held


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged.opk"


# --- what is there ----------------------------------------------------------------------------------------------------


ODD = {
    "empty": b"",
    "newline only": b"\n",
    "blank lines": b"\n\n\n",
    "crlf": b"one\r\ntwo\r\nno end",
    "nul": b"\0\0\n\0",
    "not utf-8": b"\xff\xfe\x80\n\xc3\x28\n",
    "looks like a frame": b"\xffOPK\x01\x04" + bytes(200) + b"\n\xffOPK",
    "long": b"x" * (3 << 20) + b"\nshort\n" + b"y" * (2 << 20),
}


async def test_odd_contents_are_taken_in_as_they_are(logs: Path, out: Path) -> None:
    """Empty files, NUL, CR LF, bytes that are no text and lines longer than any buffer come out as they went in."""
    for name, data in ODD.items():
        (logs / name).write_bytes(data)
    progress = await merge(out, logs)
    assert contents(out) == ODD
    assert progress.bytes == sum(map(len, ODD.values()))
    assert progress.lines == sum(
        data.count(b"\n") + (not data.endswith(b"\n") and data != b"") for data in ODD.values()
    )
    assert not progress.problems


async def test_any_name_that_a_file_can_have(logs: Path, out: Path) -> None:
    """Spaces, a leading dash, line ends, quotes, glob signs and bytes that are no UTF-8 in a name do no harm."""
    names = [b"two words", "größe.log".encode(), b"-dash", b"new\nline", b"\xff\xfe", b"[a]*?", b"'\"$(x)", b"x" * 255]
    for name in names:
        Path(logs, os.fsdecode(name)).write_bytes(b"in " + name.replace(b"\n", b" ") + b"\n")
    await merge(out, logs)
    assert {os.fsencode(name) for name in contents(out)} == set(names)


async def test_a_second_run_without_news_adds_nothing(logs: Path, out: Path) -> None:
    """Started again with nothing new, the packet file stays as it is, to the byte."""
    (logs / "a").write_bytes(b"one\ntwo")
    await merge(out, logs)
    before = out.read_bytes()
    progress = await merge(out, logs)
    assert out.read_bytes() == before
    assert (progress.lines, progress.bytes, progress.sources) == (0, 0, 1)


async def test_goes_on_where_the_packet_file_ends(logs: Path, out: Path, tmp_path: Path) -> None:
    """What was added between runs is added once, also to a last line without its end, and new files come in."""
    a, b = logs / "a", logs / "b"
    a.write_bytes(b"one\ntw")
    assert (await merge(out, logs)).lines == 2
    append(a, b"o\nthree\n")
    b.write_bytes(b"new\n")
    assert (await merge(out, logs)).lines == 2  # "tw" was counted when it was read
    append(a, b"four")
    assert (await merge(out, logs)).lines == 1
    append(a, b"!")
    assert (await merge(out, logs)).lines == 0
    append(a, b"\nfive\n")
    assert (await merge(out, logs)).lines == 1
    assert contents(out) == {"a": a.read_bytes(), "b": b"new\n"}
    assert [(s.name, s.lines) for s in stat(out).sources] == [("a", 5), ("b", 1)]
    split(out, tmp_path / "back")
    assert (tmp_path / "back" / "a").read_bytes() == a.read_bytes()


async def test_a_path_means_the_same_source_however_it_is_written(
    logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative or absolute, as a folder, a glob or a file: the source is the same one the next time."""
    (logs / "a").write_bytes(b"one\n")
    monkeypatch.chdir(logs.parent)
    for argument in ("logs", "logs/a", str(logs), "./logs/../logs/*"):
        await merge(out, argument)
    assert contents(out) == {"a": b"one\n"}


async def test_links_to_one_file_are_one_source(logs: Path, out: Path) -> None:
    """A file that has several names, hard or symbolic, is merged once."""
    (logs / "a").write_bytes(b"one\n")
    (logs / "hard").hardlink_to(logs / "a")
    (logs / "soft").symlink_to("a")
    (logs / "round").symlink_to(logs)
    (logs / "dangling").symlink_to("nowhere")
    progress = await merge(out, logs, logs / "soft", logs / "hard")
    assert contents(out) == {"a": b"one\n"}
    assert not progress.problems


async def test_the_output_is_never_its_own_source(logs: Path) -> None:
    """A packet file inside the folder that it merges is not taken in, by any of its names, in any run."""
    out = logs / "merged.opk"
    (logs / "a").write_bytes(b"one\n")
    for _ in range(2):
        await merge(out, logs, logs / "*.opk")
        (logs / "also").unlink(missing_ok=True)
        (logs / "also").hardlink_to(out)
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.caught_up)
        append(logs / "a", b"two\n")
        await until(lambda: engine.progress.lines == 1)
    assert contents(out) == {"a": b"one\ntwo\n"}


async def test_what_is_no_regular_file_is_refused_and_does_not_hold_up_the_rest(logs: Path, out: Path) -> None:
    """A FIFO without a writer and a device are told as problems; nothing waits for them."""
    (logs / "a").write_bytes(b"one\n")
    os.mkfifo(logs / "fifo")
    progress = await merge(out, logs / "fifo", "/dev/zero", logs / "a", logs)
    assert {path: str(exc.strerror) for path, exc in progress.problems.items()} == {
        str(logs / "fifo"): "no regular file, folder or glob",
        "/dev/zero": "no regular file, folder or glob",
    }
    assert contents(out) == {"a": b"one\n"}


async def test_a_fifo_that_takes_a_files_place_is_refused(logs: Path, out: Path) -> None:
    """A file that becomes a FIFO between listing and opening is a problem, not a hang."""
    (logs / "a").write_bytes(b"one\n")
    (logs / "b").write_bytes(b"two\n")

    class Changing(Sources):
        def scan(self) -> tuple[dict[str, os.stat_result], dict[str, OSError]]:
            found = super().scan()
            (logs / "a").unlink()
            os.mkfifo(logs / "a")
            return found

    async with Merge(Changing([str(logs)]), out) as engine:
        progress = await engine.run()
    assert [exc.strerror for exc in progress.problems.values()] == ["no regular file"]
    assert contents(out) == {"b": b"two\n"}


async def test_a_file_that_vanishes_before_it_is_opened_is_told(logs: Path, out: Path) -> None:
    """A file that goes between listing and opening is a problem with its name; the others are merged."""
    for name in "abc":
        (logs / name).write_bytes(name.encode() + b"\n")

    class Vanishing(Sources):
        def scan(self) -> tuple[dict[str, os.stat_result], dict[str, OSError]]:
            found = super().scan()
            (logs / "b").unlink()
            return found

    async with Merge(Vanishing([str(logs)]), out) as engine:
        progress = await engine.run()
    assert {path: exc.errno for path, exc in progress.problems.items()} == {str(logs / "b"): errno.ENOENT}
    assert contents(out) == {"a": b"a\n", "c": b"c\n"}


def after_first_read(monkeypatch: pytest.MonkeyPatch, path: Path, action: Callable[[], object]) -> None:
    """Do something to a file once a part of it has been read."""
    read = Tail.read
    todo = [action]

    def reading(self: Tail, arena: Arena, steps: list[Step], *, final: bool = False) -> bool:
        more = read(self, arena, steps, final=final)
        if self.path == str(path) and todo and self.offset:
            assert more, "the file must not fit into one arena"
            todo.pop()()
        return more

    monkeypatch.setattr(Tail, "read", reading)


async def test_a_file_that_vanishes_while_it_is_read_is_read_to_its_end(
    logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a file is open, losing its name costs nothing."""
    data = b"".join(b"line %d\n" % number for number in range(300_000))
    (logs / "a").write_bytes(data)
    after_first_read(monkeypatch, logs / "a", (logs / "a").unlink)
    progress = await merge(out, logs)
    assert not (logs / "a").exists()
    assert not progress.problems
    assert contents(out) == {"a": data}


async def test_a_file_that_is_truncated_while_it_is_read_leaves_a_gap(
    logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody can read any more is stated as a gap, and what stands in the file now is a new generation."""
    path = logs / "a"
    data = b"".join(b"line %d\n" % number for number in range(300_000))
    path.write_bytes(data)
    after_first_read(monkeypatch, path, lambda: path.write_bytes(b"anew\n"))
    progress = await merge(out, logs)
    held = contents(out)["a"]
    assert held.endswith(b"anew\n")
    assert data.startswith(held.removesuffix(b"anew\n"))
    assert progress.gaps == 1
    assert verify(out).gaps == [("a", len(held) - 5, None, "truncated")]
    assert stat(out).sources[0].generation == 1


async def test_what_grows_while_it_is_read_is_read_up_to_the_size_it_had(
    logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without follow a merge ends, however fast its sources grow."""
    path = logs / "a"
    data = b"".join(b"line %d\n" % number for number in range(300_000))
    path.write_bytes(data)
    after_first_read(monkeypatch, path, lambda: append(path, b"late\n"))
    await merge(out, logs)
    assert contents(out) == {"a": data}
    await merge(out, logs)
    assert contents(out) == {"a": data + b"late\n"}


@pytest.mark.slow
async def test_two_thousand_small_files_in_follow_mode_and_again(logs: Path, out: Path) -> None:
    """Many files cost neither lines nor descriptors beyond their own."""
    for number in range(2000):
        (logs / f"{number}.log").write_bytes(b"line of %d\n" % number)
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 2000)
        append(logs / "7.log", b"more\n")
        (logs / "new.log").write_bytes(b"new\n")
        await until(lambda: engine.progress.lines == 2002)
    held = contents(out)
    assert len(held) == 2001
    assert held["7.log"] == b"line of 7\nmore\n"
    assert (await merge(out, logs)).lines == 0


# --- what comes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("poll", [False, True], ids=["notified", "by time"])
async def test_follow_takes_new_lines_and_new_files(logs: Path, out: Path, poll: bool) -> None:
    """Following, new lines, new files and files in new folders come in, with and without help of the system."""
    (logs / "a").write_bytes(b"a1\n")
    async with following(out, logs, poll=poll) as engine:
        await until(lambda: engine.progress.lines == 1)
        append(logs / "a", b"a2\na3\n")
        await until(lambda: engine.progress.lines == 3)
        (logs / "b").write_bytes(b"b1\n")
        await until(lambda: engine.progress.lines == 4)
        (logs / "below").mkdir()
        (logs / "below" / "c").write_bytes(b"c1\n")
        await until(lambda: engine.progress.lines == 5)
        append(logs / "below" / "c", b"c2\n")
        await until(lambda: engine.progress.lines == 6)
    assert contents(out) == {"a": b"a1\na2\na3\n", "b": b"b1\n", "below/c": b"c1\nc2\n"}


async def test_follow_takes_only_files_that_match(logs: Path, out: Path) -> None:
    """A new file beside the sources comes in if the glob names it, and only then."""
    (logs / "a.log").write_bytes(b"a\n")
    async with following(out, logs / "*.log") as engine:
        await until(lambda: engine.progress.lines == 1)
        (logs / "b.txt").write_bytes(b"not this\n")
        (logs / "c.log").write_bytes(b"c\n")
        await until(lambda: engine.progress.lines == 2)
    assert contents(out) == {"a.log": b"a\n", "c.log": b"c\n"}


async def test_a_problem_that_stays_is_told_all_the_while(logs: Path, out: Path) -> None:
    """Whoever looks while files are looked for again, from another thread, does not find it gone."""

    class Problems(dict[str, OSError]):
        def __delitem__(self, path: str) -> None:
            gone.append(path)
            super().__delitem__(path)

    gone: list[str] = []
    missing = str(logs / "missing")
    async with Merge([missing], out, follow=True) as engine:
        engine.progress.problems = Problems()
        for _ in range(2):
            engine._finder.scan(None)
            assert list(engine.progress.problems) == [missing]
    assert gone == []


async def test_follow_waits_for_a_file_that_is_not_there_yet(logs: Path, out: Path) -> None:
    """A name that names nothing yet is a problem until it does."""
    async with following(out, logs / "later") as engine:
        await until(lambda: engine.progress.caught_up)
        assert [exc.errno for exc in engine.progress.problems.values()] == [errno.ENOENT]
        (logs / "later").write_bytes(b"here\n")
        await until(lambda: engine.progress.lines == 1)
        await until(lambda: not engine.progress.problems)
    assert contents(out) == {"later": b"here\n"}


@pytest.mark.parametrize("poll", [False, True], ids=["notified", "by time"])
async def test_a_renamed_file_is_read_to_its_end_before_its_successor(logs: Path, out: Path, poll: bool) -> None:
    """Rotation by rename: the rest of the old file comes first, the new one is the next generation, nothing twice."""
    path = logs / "app.log"
    with path.open("ab", buffering=0) as old:
        old.write(b"1\n2\n")
        async with following(out, logs, poll=poll) as engine:
            await until(lambda: engine.progress.lines == 2)
            path.rename(logs / "app.log.1")
            old.write(b"3\n")
            path.write_bytes(b"4\n")
            await until(lambda: engine.progress.lines == 4)
            append(path, b"5\n")
            await until(lambda: engine.progress.lines == 5)
    assert contents(out) == {"app.log": b"1\n2\n3\n4\n5\n"}
    assert [(s.lines, s.generation, s.gaps) for s in stat(out).sources] == [(5, 1, 0)]


async def test_a_last_line_without_its_end_ends_with_its_generation(logs: Path, out: Path) -> None:
    """What stands behind the last line end of a file that was renamed away is a line of its own."""
    path = logs / "app.log"
    path.write_bytes(b"1\ntorn")
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 1)
        path.rename(logs / "app.log.1")
        path.write_bytes(b"new\n")
        await until(lambda: engine.progress.lines == 3)
    assert contents(out) == {"app.log": b"1\ntornnew\n"}
    assert stat(out).sources[0].lines == 3


@pytest.mark.parametrize("anew", [b"anew\n", b"longer than it was before\nx\n"], ids=["shorter", "longer"])
async def test_a_truncated_file_leaves_a_gap_and_begins_anew(logs: Path, out: Path, anew: bytes) -> None:
    """Truncation is noticed even if the file has grown past the place since, and told by verify and stat."""
    path = logs / "a"
    path.write_bytes(b"one\ntwo\n")
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 2)
        os.truncate(path, 0)
        append(path, anew)
        await until(lambda: engine.progress.bytes == 8 + len(anew))
        assert engine.progress.gaps == 1
    assert contents(out) == {"a": b"one\ntwo\n" + anew}
    assert verify(out).gaps == [("a", 8, None, "truncated")]
    assert [(s.generation, s.gaps) for s in stat(out).sources] == [(1, 1)]


async def test_a_deleted_file_is_read_to_its_end_and_its_successor_too(logs: Path, out: Path) -> None:
    """A file that loses its name is followed as long as it is written; the next file of that name comes behind it."""
    path = logs / "a"
    with path.open("ab", buffering=0) as old:
        old.write(b"1\n")
        async with following(out, logs) as engine:
            await until(lambda: engine.progress.lines == 1)
            path.unlink()
            old.write(b"2\n")
            await until(lambda: engine.progress.lines == 2)
            path.write_bytes(b"3\n")
            await until(lambda: engine.progress.lines == 3)
            assert not engine.progress.problems
    assert contents(out) == {"a": b"1\n2\n3\n"}


async def test_stop_takes_what_is_there_and_lines_without_an_end(logs: Path, out: Path) -> None:
    """Stopped when it had caught up, everything that is there is in the file, a partial last line too; it goes on."""
    path = logs / "a"
    path.write_bytes(b"one\n")
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.caught_up and engine.progress.lines == 1)
        append(path, b"two\nthr")
        (logs / "b").write_bytes(b"new, and no end")
    assert contents(out) == {"a": b"one\ntwo\nthr", "b": b"new, and no end"}
    async with following(out, logs) as engine:
        append(path, b"ee\nfour\n")
        await until(lambda: engine.progress.bytes == 8)
    assert contents(out)["a"] == path.read_bytes()
    assert [s.lines for s in stat(out).sources] == [4, 1]


async def test_stop_before_and_after_the_run_and_many_times(logs: Path, out: Path) -> None:
    """`stop()` is right at any moment, from any thread, any number of times; what was not read comes the next time."""
    (logs / "a").write_bytes(b"one\n")
    async with Merge(Sources([str(logs)]), out, follow=True) as engine:
        engine.stop()
        await asyncio.gather(engine.run(), *(asyncio.to_thread(engine.stop) for _ in range(4)))
        engine.stop()
    await merge(out, logs)
    assert contents(out) == {"a": b"one\n"}


async def test_stop_ends_a_run_that_has_not_caught_up_with_what_it_has_read(
    logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped half-way, what was read is in the file and verifies, and the next run brings the rest."""
    data = b"".join(b"line %d\n" % number for number in range(300_000))
    (logs / "a").write_bytes(data)
    async with Merge(Sources([str(logs)]), out) as engine:
        after_first_read(monkeypatch, logs / "a", engine.stop)
        progress = await engine.run()
        assert not progress.caught_up
    held = contents(out)["a"]
    assert 0 < len(held) < len(data)
    assert len(held) == progress.bytes
    await merge(out, logs)
    assert contents(out) == {"a": data}


async def test_a_cancelled_run_ends_with_what_was_read_in_the_file(logs: Path, out: Path) -> None:
    """Cancelling loses nothing that was read: the block ends when it is in the file, and another run goes on."""
    path = logs / "a"
    path.write_bytes(b"one\n")
    async with Merge(Sources([str(logs)]), out, follow=True) as engine:
        running = asyncio.ensure_future(engine.run())
        await until(lambda: engine.progress.lines == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert contents(out) == {"a": b"one\n"}
    append(path, b"two\n")
    await merge(out, logs)
    assert contents(out) == {"a": b"one\ntwo\n"}


async def test_progress_tells_what_is_left(logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lag_bytes` is what is in the sources and not read: all at first, nothing at the end."""
    data = b"".join(b"line %d\n" % number for number in range(300_000))
    (logs / "a").write_bytes(data)
    lags: list[int] = []
    async with Merge(Sources([str(logs)]), out) as engine:
        after_first_read(monkeypatch, logs / "a", lambda: lags.append(engine.progress.lag_bytes))
        progress = await engine.run()
    assert 0 < lags[0] < len(data)
    assert progress.lag_bytes == 0
    assert (progress.sources, progress.bytes, progress.lines) == (1, len(data), 300_000)
    assert progress.seconds > 0


# --- started again after files got other names ------------------------------------------------------------------------


@pytest.mark.parametrize("old", ["app.log.1", "app.1.log"], ids=["sorts behind", "sorts before"])
async def test_rotation_between_two_runs_reads_nothing_twice(logs: Path, out: Path, old: str) -> None:
    """A file renamed while nobody looked is drained under its new name, and then the one that has its name comes."""
    path = logs / "app.log"
    path.write_bytes(b"1\n2\n")
    await merge(out, logs)
    append(path, b"3\n")
    path.rename(logs / old)
    path.write_bytes(b"4\n")
    await merge(out, logs)
    assert contents(out) == {"app.log": b"1\n2\n3\n4\n"}
    assert [(s.lines, s.generation, s.gaps) for s in stat(out).sources] == [(4, 1, 0)]


@pytest.mark.parametrize("times", [1, 2])
async def test_a_rotated_file_is_known_in_later_runs(logs: Path, out: Path, times: int) -> None:
    """A file that was read under its former name is not read again under its new one, however often it moves on."""
    path = logs / "app.log"
    path.write_bytes(b"0\n")
    for number in range(1, times + 1):
        async with following(out, logs) as engine:
            await until(lambda: engine.progress.caught_up)
            for older in range(number - 1, 0, -1):
                (logs / f"app.log.{older}").rename(logs / f"app.log.{older + 1}")
            path.rename(logs / "app.log.1")
            path.write_bytes(b"%d\n" % number)
            await until(lambda: engine.progress.lines >= 1 and path.stat().st_size <= engine.progress.bytes)
    for _ in range(2):
        await merge(out, logs)
    assert contents(out) == {"app.log": b"".join(b"%d\n" % number for number in range(times + 1))}


async def test_a_file_renamed_between_two_runs_without_a_successor_is_not_read_twice(logs: Path, out: Path) -> None:
    """Only moved, nothing new under the old name: its lines are in the file already, and what it grew comes once."""
    path = logs / "app.log"
    path.write_bytes(b"1\n2\n")
    await merge(out, logs)
    path.rename(logs / "app.log.1")
    append(logs / "app.log.1", b"3\n")
    await merge(out, logs)
    held = contents(out)
    assert b"".join(sorted(b"".join(held.values()).splitlines(keepends=True))) == b"1\n2\n3\n"


async def test_a_new_file_with_the_number_of_a_deleted_one_is_merged(logs: Path, out: Path) -> None:
    """File systems use inodes again: a new file is not taken for the one that had its inode when it was read."""
    first = logs / "a"
    first.write_bytes(b"old a\n")
    await merge(out, logs)
    number = first.stat().st_ino
    first.rename(logs / "b")  # the inode of a, with other contents: as if a had been deleted and b got its inode
    (logs / "b").write_bytes(b"new b\n")
    first.write_bytes(b"new a, another file\n")
    assert (logs / "b").stat().st_ino == number != first.stat().st_ino
    progress = await merge(out, logs)
    assert not progress.problems
    assert contents(out) == {"a": b"old a\nnew a, another file\n", "b": b"new b\n"}


# --- when the output fails --------------------------------------------------------------------------------------------


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file may grow past `size` bytes: a full disk that needs no privileges."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
async def test_a_full_disk_ends_the_run_and_keeps_what_was_written(
    logs: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that takes no more is BrokenResourceError; what was written verifies, and with room it goes on."""
    data = b"".join(b"line %d\n" % number for number in range(1_000_000))
    (logs / "a").write_bytes(data)
    (logs / "b").write_bytes(b"small\n")
    with files_limited_to(3 << 20):
        engine = await Merge(Sources([str(logs)]), out).start()
        with pytest.raises(BrokenResourceError, match="could not be written") as caught:
            await engine.run()
        with pytest.raises(BrokenResourceError):
            await engine.aclose()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    held = contents(out)
    assert len(held["a"]) > 1 << 20
    assert data.startswith(held["a"])
    await merge(out, logs)
    assert contents(out) == {"a": data, "b": b"small\n"}
    del caught, engine
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], "nothing is left unheard"


async def test_a_full_disk_ends_a_merge_that_follows(logs: Path, out: Path) -> None:
    """While following, too, a disk that takes no more ends the run with the error; nothing that was there is lost."""
    (logs / "a").write_bytes(b"before\n")
    with files_limited_to(1 << 20):
        engine = await Merge(Sources([str(logs)]), out, follow=True).start()
        running = asyncio.ensure_future(engine.run())
        await until(lambda: engine.progress.lines == 1)
        append(logs / "a", b"x" * 600_000 + b"\n")
        append(logs / "b", b"y" * 600_000 + b"\n")
        async with asyncio.timeout(AMPLE):
            with pytest.raises(BrokenResourceError):
                await running
        with pytest.raises(BrokenResourceError):
            await engine.aclose()
    assert contents(out)["a"].startswith(b"before\n")
    await merge(out, logs)
    assert contents(out) == {name: (logs / name).read_bytes() for name in "ab"}


@contextmanager
def no_room(monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> Iterator[list[int]]:
    """A disk that takes half of each write and then has no room; gives the sizes of what was refused."""
    refused: list[int] = []

    def half(fd: int, buffers: Sequence[bytes]) -> int:
        data = b"".join(buffers)
        refused.append(len(data))
        return os.write(fd, data[: len(data) // 2])

    def full(fd: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        disk = SimpleNamespace(**vars(os) | {"writev": half, "write": full})
        patch.setattr("offload.files.append.os", disk)
        yield refused


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
async def test_following_waits_for_room_and_tells(
    logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """`on_full` hears once that it waits and once that it goes on, `Progress.full` says so meanwhile."""
    told: list[OSError | None] = []
    (logs / "a").write_bytes(b"one\n")
    engine = Merge(Sources([str(logs)]), out, follow=True, on_full=told.append)
    async with engine:
        running = asyncio.ensure_future(engine.run())
        await until(lambda: out.exists() and out.stat().st_size > 200)
        with no_room(monkeypatch, code) as refused:
            append(logs / "a", b"two\n" * 100_000)
            await until(lambda: len(refused) > 2)
            assert engine.progress.full is told[0]
            assert told[0] is not None
            assert told[0].errno == code
            assert verify(out).faults == []
        await until(lambda: len(told) == 2)
        assert engine.progress.full is None
        engine.stop()
        await running
    assert told[1:] == [None]
    assert contents(out) == {"a": b"one\n" + b"two\n" * 100_000}


@pytest.mark.parametrize("how", ["stop", "cancel", "leave"])
async def test_a_wait_for_room_can_be_ended(logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """`stop()`, cancelling and leaving the block end it with the error, or the cancellation; the file stays whole."""
    (logs / "a").write_bytes(b"one\n")
    engine = await Merge(Sources([str(logs)]), out, follow=True).start()
    running = asyncio.ensure_future(engine.run())
    await until(lambda: out.exists() and out.stat().st_size > 200)
    with no_room(monkeypatch):
        append(logs / "a", b"two\n")
        await until(lambda: engine.progress.full is not None)
        if how == "stop":
            engine.stop()
        elif how == "cancel":
            running.cancel()
        async with asyncio.timeout(AMPLE):
            if how != "leave":
                await asyncio.wait([running])
            with pytest.raises(BrokenResourceError, match="No space left"):
                await engine.aclose()
            with pytest.raises((BrokenResourceError, asyncio.CancelledError)):
                await running
    await merge(out, logs)
    assert contents(out) == {"a": b"one\ntwo\n"}


async def test_an_fsync_that_fails_ends_a_merge_that_has_nothing_to_write(
    logs: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fsync of the interval is met within the next look; the error says which bytes may not be on the disk."""
    (logs / "a").write_bytes(b"one\n")
    engine = await Merge(Sources([str(logs)]), out, follow=True).start()
    running = asyncio.ensure_future(engine.run())
    await until(lambda: out.exists() and verify(out).lines == 1 and bool(verify(out).chain.strip("0")))
    durable = out.stat().st_size

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("offload.files.append.sync_descriptor", refuse)
    append(logs / "a", b"two\n")
    async with asyncio.timeout(AMPLE):
        with pytest.raises(BrokenResourceError, match=r"bytes \d+ to \d+ are not known to be on the disk") as caught:
            await running
    with pytest.raises(BrokenResourceError):
        await engine.aclose()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO
    monkeypatch.undo()
    with FrameSource(out) as source:
        commits = [CommitInfo.unpack(frame) for frame in source if frame.header.type is FrameType.COMMIT]
    assert max(commit.durable_upto for commit in commits) <= durable
    await merge(out, logs)
    assert contents(out) == {"a": b"one\ntwo\n"}


async def test_a_second_writer_is_refused(logs: Path, out: Path) -> None:
    """Two merges into one file: the second gets BusyResourceError, the first does not notice."""
    (logs / "a").write_bytes(b"one\n")
    async with following(out, logs) as engine:
        await until(lambda: engine.progress.lines == 1)
        with pytest.raises(BusyResourceError, match="being written by somebody else"):
            await Merge(Sources([str(logs)]), out).start()
        append(logs / "a", b"two\n")
        await until(lambda: engine.progress.lines == 2)
    assert contents(out) == {"a": b"one\ntwo\n"}


async def test_an_output_that_is_no_packet_file_is_not_touched(logs: Path, out: Path) -> None:
    """Another file given as output stays as it is, and a folder is an OSError."""
    (logs / "a").write_bytes(b"one\n")
    out.write_bytes(b"my novel\n" * 100)
    with pytest.raises(PacketError, match="expected the magic"):
        await merge(out, logs)
    assert out.read_bytes() == b"my novel\n" * 100
    with pytest.raises(IsADirectoryError):
        await merge(logs, logs)
    with pytest.raises(FileNotFoundError):
        await merge(logs / "nowhere" / "x.opk", logs)


async def damage_behind_the_last_commit(logs: Path, out: Path) -> None:
    """Two runs of two sources; of the second one, the COMMIT is missing and the first frame with lines is damaged."""
    for number in (1, 2):
        for name in "ab":
            append(logs / name, f"{name}{number}\n".encode())
        await merge(out, logs)
    with FrameSource(out) as source:
        frames = list(source)
    first, second = [frame for frame in frames if frame.header.type is FrameType.LINES][-2:]
    assert frames[-1].header.type is FrameType.COMMIT
    assert frames[-1].offset == second.end
    data = bytearray(out.read_bytes()[: second.end])
    data[first.end - 1] ^= 1
    out.write_bytes(data)


async def test_damage_behind_the_last_commit_is_read_again(logs: Path, out: Path) -> None:
    """A hole behind the last COMMIT, as a power cut leaves it, is cut and read again from the sources."""
    await damage_behind_the_last_commit(logs, out)
    await merge(out, logs)
    assert contents(out) == {"a": b"a1\na2\n", "b": b"b1\nb2\n"}


async def test_damage_is_read_again_from_a_rotated_file(logs: Path, out: Path) -> None:
    """Also where the source has been renamed since, and another file has its name."""
    await damage_behind_the_last_commit(logs, out)
    (logs / "b").rename(logs / "b.1")
    (logs / "b").write_bytes(b"b3\n")
    await merge(out, logs)
    assert contents(out) == {"a": b"a1\na2\n", "b": b"b1\nb2\nb3\n"}


@pytest.mark.parametrize("change", ["gone", "other contents"])
async def test_damage_that_cannot_be_cut_is_written_anew(logs: Path, out: Path, change: str) -> None:
    """Where a source has changed since, what it had behind the damage is kept, and the others are read again."""
    await damage_behind_the_last_commit(logs, out)
    data = out.read_bytes()
    if change == "gone":
        (logs / "b").unlink()
    else:
        (logs / "b").write_bytes(b"other\n")
    progress = await merge(out, logs)
    b = b"b1\nb2\n" + (b"" if change == "gone" else b"other\n")
    assert contents(out) == {"a": b"a1\na2\n", "b": b}
    assert verify(out).complete is (change == "gone")
    assert progress.damaged is not None
    assert progress.damaged.name == "merged.damaged-1.opk"
    assert progress.damaged.read_bytes() == data


async def test_leftovers_of_a_torn_frame_are_cut_and_read_again(logs: Path, out: Path) -> None:
    """A tail that is no whole frame, as kill -9 leaves it, is cut wherever it was torn; nothing is lost or doubled."""
    (logs / "a").write_bytes(b"one\n" * 50)
    await merge(out, logs)
    whole = out.read_bytes()
    with FrameSource(out) as source:
        last = next(frame for frame in source if frame.header.type is FrameType.LINES)
    for cut in (last.offset + 1, last.offset + 63, last.offset + 64, last.offset + 100, last.end - 1, last.end + 10):
        out.write_bytes(whole[:cut])
        await merge(out, logs)
        assert contents(out) == {"a": b"one\n" * 50}, cut


async def test_more_generations_of_a_source_keep_their_order(logs: Path, out: Path) -> None:
    """Truncated again and again, each generation stands behind the one before, with its number."""
    path = logs / "a"
    async with following(out, logs) as engine:
        for number in range(4):
            path.write_bytes(b"generation %d\n" % number * (number + 1))
            await until(lambda n=number: engine.progress.bytes == sum(13 * (k + 1) for k in range(n + 1)))  # type: ignore[misc]
    assert contents(out)["a"] == b"".join(b"generation %d\n" % number * (number + 1) for number in range(4))
    assert stat(out).sources[0].generation == 3


@pytest.mark.parametrize("poll", [False, True], ids=["notified", "by time"])
async def test_a_chain_of_rotations_moves_sources_on_without_reading_them_twice(
    logs: Path, out: Path, poll: bool
) -> None:
    """Where the old logs are sources too, as in any log folder, rotation moves each on; no line comes twice."""
    for number, name in enumerate(("app.log", "app.log.1", "app.log.2")):
        (logs / name).write_bytes(b"file %d\n" % number)
    async with following(out, logs, poll=poll) as engine:
        await until(lambda: engine.progress.lines == 3)
        (logs / "app.log.2").rename(logs / "app.log.3")
        (logs / "app.log.1").rename(logs / "app.log.2")
        (logs / "app.log").rename(logs / "app.log.1")
        (logs / "app.log").write_bytes(b"new\n")
        await until(lambda: b"new\n" in b"".join(contents(out).values()))
    await merge(out, logs)
    lines = b"".join(contents(out).values()).splitlines()
    assert sorted(lines) == [b"file 0", b"file 1", b"file 2", b"new"]


async def test_a_chain_of_rotations_between_two_runs(logs: Path, out: Path) -> None:
    """The same while nobody looked."""
    for number, name in enumerate(("app.log", "app.log.1", "app.log.2")):
        (logs / name).write_bytes(b"file %d\n" % number)
    await merge(out, logs)
    (logs / "app.log.2").rename(logs / "app.log.3")
    (logs / "app.log.1").rename(logs / "app.log.2")
    (logs / "app.log").rename(logs / "app.log.1")
    (logs / "app.log").write_bytes(b"new\n")
    for _ in range(2):
        await merge(out, logs)
    lines = b"".join(contents(out).values()).splitlines()
    assert sorted(lines) == [b"file 0", b"file 1", b"file 2", b"new"]


@contextmanager
def descriptors_limited_to(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.slow
@pytest.mark.parametrize("follow", [False, True], ids=["ends", "follows"])
async def test_more_long_files_than_descriptors(logs: Path, out: Path, follow: bool) -> None:
    """Files that take several reads each, and more of them than may be open, are read whole, and followed."""
    data = {f"{number}.log": b"%02d %s\n" % (number, b"x" * 60) * 20_000 for number in range(40)}
    for name, content in data.items():
        (logs / name).write_bytes(content)
    with descriptors_limited_to(len(_open()[1]) + 30):
        if not follow:
            assert not (await merge(out, logs)).problems
        else:
            async with following(out, logs) as engine:
                await until(lambda: engine.progress.lines == 800_000)
                for name in data:
                    append(logs / name, b"more\n")
                    data[name] += b"more\n"
                await until(lambda: engine.progress.lines == 800_040)
                (logs / "39.log").rename(logs / "old")
                append(logs / "old", b"rest\n")
                (logs / "39.log").write_bytes(b"anew\n")
                data["39.log"] += b"rest\nanew\n"
                await until(lambda: engine.progress.lines == 800_042)
            assert not engine.progress.problems
    assert contents(out) == data


async def test_a_file_that_can_be_opened_only_later_gets_its_own_number(logs: Path, out: Path) -> None:
    """A source that fails at first and comes later is not mixed up with those that came meanwhile."""
    for name in "abc":
        (logs / name).write_bytes(name.encode() + b"1\n")

    class Changing(Sources):
        def scan(self) -> tuple[dict[str, os.stat_result], dict[str, OSError]]:
            found = super().scan()
            if not out.stat().st_size:
                (logs / "b").unlink()
                os.mkfifo(logs / "b")
            return found

    async with Merge(Changing([str(logs)]), out, follow=True) as engine:
        running = asyncio.ensure_future(engine.run())
        await until(lambda: engine.progress.lines == 2)
        assert [exc.strerror for exc in engine.progress.problems.values()] == ["no regular file"]
        (logs / "d").write_bytes(b"d1\n")
        await until(lambda: engine.progress.lines == 3)
        (logs / "b").unlink()
        (logs / "b").write_bytes(b"b1\n")
        await until(lambda: engine.progress.lines == 4)
        engine.stop()
        assert not (await running).problems
    assert contents(out) == {"a": b"a1\n", "b": b"b1\n", "c": b"c1\n", "d": b"d1\n"}


@pytest.mark.parametrize("down", [False, True], ids=["followed", "down"])
async def test_a_link_that_is_swapped(logs: Path, out: Path, tmp_path: Path, down: bool) -> None:
    """A source that is a link into another folder: what it led to is read to its end, then what it leads to now."""
    targets, link = tmp_path / "targets", logs / "app.log"
    targets.mkdir()
    (targets / "one").write_bytes(b"1\n")
    (targets / "two").write_bytes(b"4\n")
    link.symlink_to(targets / "one")

    def swap() -> None:
        append(targets / "one", b"3\n")
        (logs / "next").symlink_to(targets / "two")
        (logs / "next").rename(link)

    async with following(out, link) as engine:
        await until(lambda: engine.progress.lines == 1)
        append(targets / "one", b"2\n")
        await until(lambda: engine.progress.lines == 2)
        if not down:
            swap()
            await until(lambda: engine.progress.lines == 4)
            append(targets / "two", b"5\n")
            await until(lambda: engine.progress.lines == 5)
    if down:
        swap()
        append(targets / "two", b"5\n")
        await merge(out, link)
    assert contents(out) == {"app.log": b"1\n2\n3\n4\n5\n"}
    assert verify(out).gaps == []


async def test_late_lines_of_a_renamed_file_are_read(logs: Path, out: Path) -> None:
    """One of two writers that still has the old file when the other writes the new one loses nothing."""
    path = logs / "app.log"
    with path.open("ab", buffering=0) as slow:
        slow.write(b"1\n")
        async with following(out, logs) as engine:
            await until(lambda: engine.progress.lines == 1)
            path.rename(logs / "app.log.1")
            path.write_bytes(b"2\n")
            await until(lambda: engine.progress.lines == 2)
            slow.write(b"late\n")
    await merge(out, logs)
    assert sorted(b"".join(contents(out).values()).splitlines()) == [b"1", b"2", b"late"]


@pytest.mark.parametrize("error", [None, KeyError("mine")])
async def test_leaving_the_block_while_it_runs_stops_it(logs: Path, out: Path, error: Exception | None) -> None:
    """Whoever leaves `async with` does not wait for a merge that nobody stops; what was read is in the file."""
    (logs / "a").write_bytes(b"1\n")
    with pytest.raises(KeyError) if error else contextlib.nullcontext():
        async with Merge([str(logs)], out, follow=True) as engine:
            running = asyncio.ensure_future(engine.run())
            await until(lambda: engine.progress.lines == 1)
            if error is not None:
                raise error
    await running
    assert contents(out) == {"a": b"1\n"}


async def test_a_file_rewritten_to_the_same_length_is_begun_again(logs: Path, out: Path) -> None:
    """A status file that is written anew each time, always as long: each content is there, and a gap between them."""
    path = logs / "status"
    path.write_bytes(b"state 1\n")
    async with following(out, logs) as engine:
        for number in (2, 3):
            await until(lambda before=number - 1: engine.progress.lines == before)  # type: ignore[misc]
            path.write_bytes(b"state %d\n" % number)
        await until(lambda: engine.progress.lines == 3)
    assert contents(out) == {"status": b"state 1\nstate 2\nstate 3\n"}
    assert engine.progress.gaps == 2


async def test_a_merge_runs_once(logs: Path, out: Path) -> None:
    """A second run of the same merge is refused, and does not tell the first one's counts again."""
    async with Merge([str(logs)], out) as engine:
        await engine.run()
        with pytest.raises(ClosedResourceError, match="make another"):
            await engine.run()


async def test_an_output_that_is_gone_is_an_error(logs: Path, out: Path) -> None:
    """Removed or replaced while it is written: nobody is told that all went well."""
    (logs / "a").write_bytes(b"1\n")
    engine = await Merge([str(logs)], out, follow=True).start()
    running = asyncio.ensure_future(engine.run())
    await until(lambda: engine.progress.lines == 1)
    out.unlink()
    engine.stop()
    await asyncio.wait([running])
    with pytest.raises(BrokenResourceError, match="removed or replaced"):
        await engine.aclose()
