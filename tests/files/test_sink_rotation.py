"""FileSink: rotation by size and time, by others, and what is left when it is cut off in the middle."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from offload import BrokenResourceError, FileSink, Rotation
from offload.files import append as append_module


def parts(path: Path) -> list[Path]:
    """A file and its numbered old parts, oldest first."""
    old = [name for name in path.parent.iterdir() if name.name.startswith(f"{path.name}.")]
    return [*sorted(old, key=lambda name: -int(name.suffix[1:])), path]


def contents(folder: Path) -> dict[str, bytes]:
    return {name.name: name.read_bytes() for name in folder.iterdir()}


def run_python(code: str, *arguments: object, expect: int = 0) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
    assert done.returncode == expect, done.stdout
    return done.stdout


# --- by size ----------------------------------------------------------------------------------------------------------


async def test_concurrent_writers_lose_and_double_nothing(tmp_path: Path) -> None:
    """Over hundreds of rotations every line of loops and threads is there once, whole, each writer's in order."""
    path = tmp_path / "log"

    def from_thread(name: str) -> None:
        for number in range(500):
            sink.write(f"{name} {number}\n")

    async def from_task(name: str) -> None:
        for number in range(500):
            await sink.write(f"{name} {number}\n")
            if number % 50 == 0:
                await sink.commit()

    async with FileSink(path, max_bytes=300, rotate=Rotation(max_bytes=200, keep=None)) as sink:
        threads = [threading.Thread(target=from_thread, args=(name,)) for name in ("t1", "t2", "t3")]
        for thread in threads:
            thread.start()
        await asyncio.gather(from_task("a"), from_task("b"))
        for thread in threads:
            thread.join()
    found = parts(path)
    assert all(name.stat().st_size <= 200 for name in found)
    assert len(found) > 50
    seen: dict[str, list[int]] = {}
    for line in b"".join(name.read_bytes() for name in found).decode().splitlines():
        name, number = line.split()
        seen.setdefault(name, []).append(int(number))
    assert seen == {name: list(range(500)) for name in ("t1", "t2", "t3", "a", "b")}


async def test_a_write_is_never_split_and_keep_removes_the_oldest(tmp_path: Path) -> None:
    """A batch goes over several files at the seams of its writes; a write over the bound has its own; `keep` holds."""
    path = tmp_path / "log"
    async with FileSink(path, rotate=Rotation(max_bytes=10, keep=3)) as sink:
        for piece in (b"lost", b"lost too", b"aaaaa", b"bbbbb", b"c" * 25, b"dddd", b"eeee", b"fff"):
            _ = sink.write(piece)
    assert [name.read_bytes() for name in parts(path)] == [b"aaaaabbbbb", b"c" * 25, b"ddddeeee", b"fff"]
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1", "log.2", "log.3"]


async def test_a_write_over_the_bound_makes_no_empty_part(tmp_path: Path) -> None:
    """A write larger than `max_bytes` goes into a file that is empty, and does not rotate that away."""
    async with FileSink(tmp_path / "log", rotate=Rotation(max_bytes=10)) as sink:
        await sink.write(b"0123456789ab")
    assert contents(tmp_path) == {"log": b"0123456789ab"}


async def test_an_existing_file_counts(tmp_path: Path) -> None:
    """What was in the file before is part of its size."""
    path = tmp_path / "log"
    path.write_bytes(b"12345678")
    async with FileSink(path, rotate=Rotation(max_bytes=10)) as sink:
        await sink.write(b"abc")
    assert [name.read_bytes() for name in parts(path)] == [b"12345678", b"abc"]


async def test_a_commit_covers_what_was_rotated_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is synced before it is renamed, so that the commit behind it speaks for all of its writes."""
    synced: dict[int, int] = {}

    def sync(fd: int) -> None:
        status = os.fstat(fd)
        synced[status.st_ino] = status.st_size

    monkeypatch.setattr(append_module, "sync_descriptor", sync)
    path = tmp_path / "log"
    async with FileSink(path, rotate=Rotation(max_bytes=10)) as sink:
        for _ in range(4):
            _ = sink.write(b"0123456")
        await sink.commit()
        assert {name.stat().st_ino: 7 for name in parts(path)} == synced
        assert sink.stats().files == 4


async def test_a_rotation_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file cannot be renamed the sink is broken, like at any refusal of the disk; nothing is overwritten."""

    def refuse(*names: Any) -> None:
        raise PermissionError("not this folder")

    monkeypatch.setattr(os, "replace", refuse)
    sink = await FileSink(tmp_path / "log", rotate=Rotation(max_bytes=10)).start()
    _ = sink.write(b"first one")
    _ = sink.write(b"second")
    with pytest.raises(BrokenResourceError, match="not this folder"):
        await sink.aclose()
    assert (tmp_path / "log").read_bytes() == b"first one"


KILLED = """
import asyncio, os, signal, sys
from offload import FileSink, Rotation
path, steps = sys.argv[1], int(sys.argv[2])
real = os.replace
def dying(old, new):
    global steps
    steps -= 1
    if steps < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(old, new)
os.replace = dying
async def main():
    async with FileSink(path, rotate=Rotation(max_bytes=10, keep=4)) as sink:
        for number in range(4):
            await sink.write(f"{number} line\\n")
            await sink.flush()
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("steps", range(6))
async def test_killed_in_any_step_of_a_rotation_nothing_is_lost(tmp_path: Path, steps: int) -> None:
    """Whatever rename was next when the program was killed, all that was flushed is there, and a new sink goes on."""
    path = tmp_path / "log"
    run_python(KILLED, path, steps, expect=-9)
    flushed = {0: 1, 1: 2, 2: 2, 3: 3, 4: 3, 5: 3}[steps]
    async with FileSink(path, rotate=Rotation(max_bytes=10, keep=None)) as sink:
        _ = sink.write(b"the end\n")
        _ = sink.write(b"2nd end\n")
    lines = b"".join(name.read_bytes() for name in parts(path)).splitlines()
    assert lines == [*(b"%d line" % number for number in range(flushed)), b"the end", b"2nd end"]


# --- by time ----------------------------------------------------------------------------------------------------------


class Clock:
    """Wall time as a test wants it, in a time zone of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC
        monkeypatch.setenv("TZ", "UTC")
        time.tzset()
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture(name="clock")
def make_clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        yield Clock(patch)
    if hasattr(time, "tzset"):
        time.tzset()


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="no time zone to set")
async def test_each_day_has_its_file(tmp_path: Path, clock: Clock) -> None:
    """The first write of a new day begins a new file; the old one is named by its day; quiet days make none."""
    path = tmp_path / "log"
    async with FileSink(path, rotate=Rotation(every=86_400, suffix="%Y-%m-%d")) as sink:
        for hours in (0, 1, 2, 3, 75):
            clock.now = 1_700_000_000.0 + 3600 * hours
            _ = sink.write(b"%d," % hours)
            await sink.flush()
    assert contents(tmp_path) == {
        "log.2023-11-14": b"0,1,",
        "log.2023-11-15": b"2,3,",
        "log": b"75,",
    }


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="no time zone to set")
async def test_a_file_of_yesterday_is_rotated_by_its_last_change(tmp_path: Path, clock: Clock) -> None:
    """A program that starts today does not go on with yesterday's file; by time and size, names get numbers."""
    path = tmp_path / "log"
    path.write_bytes(b"yesterday")
    os.utime(path, (clock.now - 86_400, clock.now - 86_400))
    async with FileSink(path, rotate=Rotation(every=86_400, max_bytes=5, suffix="%Y%m%d")) as sink:
        for piece in (b"1111", b"2222", b"3333"):
            _ = sink.write(piece)
    assert contents(tmp_path) == {
        "log.20231113": b"yesterday",
        "log.20231114": b"1111",
        "log.20231114.1": b"2222",
        "log": b"3333",
    }


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="no time zone to set")
async def test_keep_removes_old_parts_and_nothing_else(tmp_path: Path, clock: Clock) -> None:
    """Of the dated parts the newest stay; files that only look alike stay too."""
    for name in ("log.2023", "log.20231101.gz", "log.backup", "blog.20231101", "log.20231101x"):
        (tmp_path / name).write_bytes(b"")
    others = set(os.listdir(tmp_path))
    path = tmp_path / "log"
    async with FileSink(path, rotate=Rotation(every=86_400, suffix="%Y%m%d", keep=2)) as sink:
        for day in range(5):
            clock.now = 1_700_000_000.0 + 86_400 * day
            _ = sink.write(b"x")
            await sink.flush()
    assert set(os.listdir(tmp_path)) - others == {"log", "log.20231116", "log.20231117"}
    assert others <= set(os.listdir(tmp_path))


@pytest.mark.parametrize(
    ("every", "seconds", "due"),
    [(3600, 2799, False), (3600, 2800, True), (60, 39, False), (60, 40, True), (604_800, 3600, False)],
)
@pytest.mark.skipif(not hasattr(time, "tzset"), reason="no time zone to set")
def test_periods_begin_at_round_local_times(clock: Clock, every: float, seconds: float, due: bool) -> None:
    """Hours and minutes are those of the clock on the wall, not counted from the start of the program."""
    assert Rotation(every=every).is_due(clock.now, clock.now + seconds) is due


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs max_bytes or every"),
        ({"max_bytes": 0}, "max_bytes is 0, expected at least 1"),
        ({"every": 60, "keep": 0}, "keep is 0, expected at least 1"),
        ({"every": 60, "suffix": "%Y/%m"}, "expected a part of a file name"),
    ],
)
def test_rotations_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    """A rotation that would never or always happen fails where it is made."""
    with pytest.raises(ValueError, match=message):
        Rotation(**options)


# --- by others --------------------------------------------------------------------------------------------------------


async def test_reopen_goes_on_in_a_new_file(tmp_path: Path) -> None:
    """What was written before lands in the renamed file, what comes after in a new one, whoever waits for it or not."""
    path = tmp_path / "log"
    async with FileSink(path) as sink:
        _ = sink.write(b"before")
        await sink.flush()
        path.rename(tmp_path / "old")
        _ = sink.write(b" still")
        reopened = sink.reopen()
        _ = sink.write(b"after")
        await reopened
    assert (tmp_path / "old").read_bytes() + (tmp_path / "log").read_bytes() == b"before stillafter"
    assert (tmp_path / "old").read_bytes().startswith(b"before still")


async def test_a_reopen_that_fails_goes_on_with_the_old_file(tmp_path: Path) -> None:
    """If the path cannot be opened the caller is told, and nothing is lost."""
    folder = tmp_path / "folder"
    folder.mkdir()
    async with FileSink(folder / "log") as sink:
        folder.rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError):
            await sink.reopen()
        _ = sink.write(b"x")
    assert (tmp_path / "moved" / "log").read_bytes() == b"x"


async def test_a_file_that_others_rotated_is_not_renamed_again(tmp_path: Path) -> None:
    """When the path is another file by now, a rotation by size goes on there and leaves both as they are named."""
    path = tmp_path / "log"
    async with FileSink(path, rotate=Rotation(max_bytes=10)) as sink:
        _ = sink.write(b"01234567")
        await sink.flush()
        path.rename(tmp_path / "theirs")
        path.write_bytes(b"new:")
        _ = sink.write(b"abcde")
    assert contents(tmp_path) == {"theirs": b"01234567", "log": b"new:abcde"}


HANGUP = """
import asyncio, os, signal, sys
from offload import FileSink
one, two = sys.argv[1:]
heard = []
def theirs(number, frame):
    heard.append(number)
async def hang_up():
    count = len(heard)
    os.kill(os.getpid(), signal.SIGHUP)
    while len(heard) == count:  # Python calls its handlers between two bytecodes, not at once
        await asyncio.sleep(0)
async def main():
    signal.signal(signal.SIGHUP, theirs)
    async with FileSink(one, reopen_on_sighup=True) as first:
        async with FileSink(two, reopen_on_sighup=True) as second:
            for sink in (first, second):
                _ = sink.write(b"before")
                await sink.flush()
                os.rename(sink.path, f"{sink.path}.1")
            await hang_up()
            await first.flush()
            await second.flush()
            for sink in (first, second):
                _ = sink.write(b"after")
                await sink.flush()
        os.rename(one, f"{one}.2")
        await hang_up()
        await first.flush()
        _ = first.write(b"again")
    assert signal.getsignal(signal.SIGHUP) is theirs
    await hang_up()
    assert heard == [signal.SIGHUP] * 3, heard
asyncio.run(main())
signal.signal(signal.SIGHUP, signal.SIG_DFL)
async def last():
    async with FileSink(one, reopen_on_sighup=True):
        os.kill(os.getpid(), signal.SIGHUP)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGHUP)
asyncio.run(last())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGHUP")
def test_sighup_opens_all_logs_again_and_the_old_handler_is_restored(tmp_path: Path) -> None:
    """Each sink that asked opens its path again, the program's own handler is called too, and is back at the end."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_python(HANGUP, one, two, expect=-1) == "still here\n"
    found = contents(tmp_path)
    assert found == {"one": b"again", "one.1": b"before", "one.2": b"after", "two": b"after", "two.1": b"before"}


def test_sighup_needs_the_main_thread(tmp_path: Path) -> None:
    """Where Python cannot handle signals, the start fails and leaves no thread."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            FileSink(tmp_path / "log", reopen_on_sighup=True).__enter__()
        except ValueError as exc:
            errors.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
    assert not any(thread.name == "sink log" for thread in threading.enumerate())
