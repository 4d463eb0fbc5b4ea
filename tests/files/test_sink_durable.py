"""FileSink: what fsync and commit promise, what happens at the bound, and whole files that replace others."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import offload
from offload import BrokenResourceError, ClosedResourceError, FileSink, LoopThread, QueueFullError
from offload.files import append as append_module


class Syncs:
    """Every sync of a file, with its size at that moment; `gate` holds them up, `error` makes them fail."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.error: OSError | None = None

    def __call__(self, fd: int) -> None:
        self.begun.set()
        self.gate.wait()
        if self.error is not None:
            raise self.error
        self.sizes.append(os.fstat(fd).st_size)


@pytest.fixture(name="syncs")
def watch_syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    syncs = Syncs()
    monkeypatch.setattr(append_module, "sync_descriptor", syncs)
    return syncs


@contextlib.contextmanager
def standing(sink: FileSink) -> Iterator[None]:
    """The sink's thread stands still in this block, as it would at a slow disk."""
    stands, go_on = threading.Event(), threading.Event()

    def stand() -> None:
        stands.set()
        go_on.wait()

    sink._thread.post(stand)
    stands.wait()
    try:
        yield
    finally:
        go_on.set()


def run_python(code: str, *arguments: object, expect: int = 0) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
    assert done.returncode == expect, done.stdout
    return done.stdout


# --- commit and the policies ------------------------------------------------------------------------------------------


async def test_a_hundred_tasks_share_one_fsync(tmp_path: Path, syncs: Syncs) -> None:
    """A hundred tasks that write and commit at once cost one fsync, behind the last of their writes."""

    async def write(number: int) -> None:
        await sink.write(b"%04d\n" % number)
        await sink.commit()

    async with FileSink(tmp_path / "out") as sink:
        with standing(sink):
            tasks = [asyncio.create_task(write(n)) for n in range(100)]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert syncs.sizes == [500]
        assert sink.stats().syncs == 1
    assert (tmp_path / "out").read_bytes() == b"".join(b"%04d\n" % n for n in range(100))


async def test_commits_behind_a_running_fsync_share_the_next(tmp_path: Path, syncs: Syncs) -> None:
    """A commit made while an fsync runs is not served by that one, which may have begun before its write."""
    async with FileSink(tmp_path / "out") as sink:
        syncs.gate.clear()
        _ = sink.write(b"first")
        first = sink.commit()
        syncs.begun.wait()
        later = []
        for _ in range(50):
            _ = sink.write(b"+")
            later.append(sink.commit())
        assert not any(call.done() for call in (first, *later))
        syncs.gate.set()
        await asyncio.gather(first, *later)
        assert syncs.sizes == [5, 55]


async def test_a_commit_with_nothing_new_costs_no_fsync(tmp_path: Path, syncs: Syncs) -> None:
    """What is on the disk is not synced again; the first commit of a new file makes its name durable."""
    async with FileSink(tmp_path / "out") as sink:
        await sink.commit()
        await sink.commit()
        assert syncs.sizes == [0]
        _ = sink.write(b"x")
        await sink.flush()
        assert syncs.sizes == [0]
        await sink.flush(fsync=True)
        await sink.commit()
    assert syncs.sizes == [0, 1]


async def test_a_failed_fsync_reaches_all_who_share_it(tmp_path: Path, syncs: Syncs) -> None:
    """No task of a group believes that its write is durable when the group's fsync failed."""
    sink = await FileSink(tmp_path / "out").start()
    syncs.error = OSError(errno.EIO, "the disk says no")
    _ = sink.write(b"x")
    outcomes = await asyncio.gather(*(sink.commit() for _ in range(10)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BrokenResourceError] * 10
    with pytest.raises(BrokenResourceError, match="the disk says no"):
        await sink.aclose()


@pytest.mark.parametrize("fsync", ["interval", "always"])
async def test_the_first_fsync_finds_no_descriptor(tmp_path: Path, descriptors: Any, fsync: Any) -> None:
    """Others may take all that there are once a sink is open: it loses nothing."""
    descriptors.limit(30)
    async with FileSink(tmp_path / "out", fsync=fsync) as sink:
        descriptors.take_all()
        _ = sink.write("line\n")
        await sink.flush(fsync=True)
    assert (tmp_path / "out").stat().st_size == 5


async def test_a_file_that_replaces_another_needs_no_descriptor(tmp_path: Path, descriptors: Any) -> None:
    """Nor is it kept from its place by others who have taken them all."""
    (tmp_path / "out").write_text("old\n")
    descriptors.limit(30)
    async with FileSink(tmp_path / "out", replace=True) as sink:
        descriptors.take_all()
        _ = sink.write("new\n")
        await sink.flush(fsync=True)
    assert (tmp_path / "out").read_text() == "new\n"
    assert os.listdir(tmp_path) == ["out"]


async def test_always_syncs_each_batch_before_flush_returns(tmp_path: Path, syncs: Syncs) -> None:
    """With fsync="always" a plain flush means the disk, and one fsync serves all that was taken together."""
    async with FileSink(tmp_path / "out", fsync="always") as sink:
        with standing(sink):
            for _ in range(20):
                _ = sink.write(b"x")
            flushed = sink.flush()
        await flushed
        assert syncs.sizes == [20]
        await sink.flush()
    assert syncs.sizes == [20]


async def test_interval_syncs_by_itself_and_at_the_end(tmp_path: Path, syncs: Syncs) -> None:
    """With fsync="interval" what was written is synced without anybody's call, once; and the rest at the end."""
    async with LoopThread("helper") as helper, FileSink(tmp_path / "out", fsync="interval", interval=0.001) as sink:
        _ = sink.write(b"x")
        await asyncio.get_running_loop().run_in_executor(helper, syncs.begun.wait)
    async with FileSink(tmp_path / "out", fsync="interval", interval=3600) as sink:
        _ = sink.write(b"y")
        await sink.flush()
        assert syncs.sizes == [1]
    assert syncs.sizes == [1, 2]


async def test_none_never_syncs(tmp_path: Path, syncs: Syncs) -> None:
    """With fsync="none" only a commit costs an fsync."""
    async with FileSink(tmp_path / "out") as sink:
        for _ in range(10):
            await sink.write(b"x")
            await sink.flush()
    assert syncs.sizes == []


# --- overflow ---------------------------------------------------------------------------------------------------------


async def test_raise_refuses_at_the_bound_and_takes_no_place(tmp_path: Path) -> None:
    """At the bound a write raises QueueFullError, what was accepted lands, and there is room again afterwards."""
    async with FileSink(tmp_path / "out", max_bytes=10, overflow="raise") as sink:
        with standing(sink):
            await sink.write(b"0123456789")
            with pytest.raises(
                QueueFullError, match="10 bytes wait for 'sink out', 1 more would go over the bound of 10"
            ):
                await sink.write(b"x")
            flushed = sink.flush()
        await flushed
        await sink.write(b"larger than the bound, but nothing waits")
    assert (tmp_path / "out").read_bytes() == b"0123456789larger than the bound, but nothing waits"


async def test_drop_counts_what_found_no_room(tmp_path: Path) -> None:
    """At the bound a write is dropped and counted, from loops and threads; nobody waits."""
    async with FileSink(tmp_path / "out", max_bytes=10, overflow="drop") as sink:
        with standing(sink):
            for number in range(15):
                await sink.write(b"%d" % (number % 10))
            thread = threading.Thread(target=sink.write, args=(b"x",))
            thread.start()
            thread.join()
            assert sink.stats().dropped == 6
            assert sink.stats().waiting_bytes == 10
        await sink.flush()
        assert sink.stats() == (0, 10, 6, 0, 1)
    assert (tmp_path / "out").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "lose"}, "overflow is 'lose', expected 'wait', 'raise' or 'drop'"),
        ({"fsync": "often"}, "fsync is 'often', expected"),
        ({"interval": 0}, "interval is 0 s, expected more than 0"),
        ({"replace": True, "reopen_on_sighup": True}, "cannot be rotated or opened again"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    """A misspelt policy fails where it is given."""
    with pytest.raises(ValueError, match=message):
        FileSink("out", **options)


# --- plain threads ----------------------------------------------------------------------------------------------------


def test_without_a_loop_a_with_block_does(tmp_path: Path) -> None:
    """A program without asyncio opens, writes, flushes and closes; errors are those of the async block."""
    with FileSink(tmp_path / "out") as sink:
        sink.write("a")
        sink.submit_flush(fsync=True).result()
        assert (tmp_path / "out").read_bytes() == b"a"
        sink.write("b")
    assert (tmp_path / "out").read_bytes() == b"ab"
    with pytest.raises(ClosedResourceError):
        sink.write("c")
    with pytest.raises(FileNotFoundError), FileSink(tmp_path / "missing" / "out"):
        pass
    assert not any(thread.name.startswith("sink ") for thread in threading.enumerate())


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_without_a_loop_the_disk_is_told_once() -> None:
    """A `with` block that raised what the disk refused is not told again; one that did not is told."""
    raised: list[BaseException] = []

    def flush_in_block() -> None:
        with FileSink("/dev/full") as sink:
            sink.write(b"x")
            try:
                sink.submit_flush().result()
            except BrokenResourceError as exc:
                raised.append(exc)
                raise

    with pytest.raises(BrokenResourceError) as info:
        flush_in_block()
    assert info.value is raised[0]
    with pytest.raises(BrokenResourceError, match="No space"), FileSink("/dev/full") as sink:
        sink.write(b"x")


# --- whole files ------------------------------------------------------------------------------------------------------


async def test_replace_shows_the_old_file_until_the_new_one_is_whole_and_durable(tmp_path: Path, syncs: Syncs) -> None:
    """While the sink is open the old content stands; then the new one, synced before its name, with the same rights."""
    path = tmp_path / "config"
    path.write_bytes(b"old")
    path.chmod(0o640)
    async with FileSink(path, replace=True) as sink:
        _ = sink.write(b"new ")
        _ = sink.write(b"content")
        await sink.flush()
        assert path.read_bytes() == b"old"
        assert syncs.sizes == []
    assert syncs.sizes == [11]
    assert path.read_bytes() == b"new content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["config"]


async def test_replace_makes_a_file_that_was_not_there(tmp_path: Path) -> None:
    """A new name appears with its content, or not at all."""
    async with FileSink(tmp_path / "new", replace=True) as sink:
        _ = sink.write(b"x")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new").read_bytes() == b"x"


@pytest.mark.parametrize("error", [KeyError("mine"), asyncio.CancelledError()])
async def test_an_exception_in_the_block_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    """A block that fails or is cancelled leaves the old content and nothing beside it."""
    path = tmp_path / "config"
    path.write_bytes(b"old")

    async def fail() -> None:
        async with FileSink(path, replace=True) as sink:
            await sink.write(b"half")
            await sink.flush()
            raise error

    with pytest.raises(type(error)):
        await fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config"]


async def test_a_failed_sync_keeps_the_old_file(tmp_path: Path, syncs: Syncs) -> None:
    """A new content that the disk did not confirm does not take the old one's place."""
    path = tmp_path / "config"
    path.write_bytes(b"old")
    syncs.error = OSError(errno.EIO, "the disk says no")
    sink = await FileSink(path, replace=True).start()
    _ = sink.write(b"new")
    with pytest.raises(BrokenResourceError, match="the disk says no"):
        await sink.aclose()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config"]


async def test_replace_follows_a_link_and_refuses_what_is_no_file(tmp_path: Path) -> None:
    """A link stays a link to the file, which is replaced; a pipe or folder is refused."""
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    async with FileSink(tmp_path / "link", replace=True) as sink:
        _ = sink.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    with pytest.raises(OSError, match="not a regular file"):
        await FileSink(tmp_path, replace=True).start()


REPLACE = """
import asyncio, os, resource, signal, sys
from offload import BrokenResourceError, FileSink
path, how = sys.argv[1:]
real = os.replace
def dying(*names):
    os.kill(os.getpid(), signal.SIGKILL)
async def main():
    global sink
    sink = await FileSink(path, replace=True).start()
    if how == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    _ = sink.write(b"new " * 1000)
    if how == "killed":
        os.replace = dying
        await sink.aclose()
    elif how == "disk":
        try:
            await sink.aclose()
        except BrokenResourceError as exc:
            print("refused", exc.__cause__.errno)
    await sink.flush()
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals, resource")
@pytest.mark.parametrize(("how", "status", "left"), [("killed", -9, 2), ("forgotten", 0, 1), ("disk", 1, 1)])
def test_whatever_ends_the_program_the_old_file_stands(tmp_path: Path, how: str, status: int, left: int) -> None:
    """Killed before the rename, ended without closing, or at a full disk: the old content is whole."""
    path = tmp_path / "config"
    path.write_bytes(b"old")
    said = run_python(REPLACE, path, how, expect=status)
    assert ("refused 27" in said) == (how == "disk")
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == left  # who is killed cannot clean up


def test_public_names() -> None:
    """What a sink takes and gives is exported."""
    assert offload.SinkStats._fields == ("waiting_bytes", "written_bytes", "dropped", "syncs", "files")
