"""What is found beside a log, where a merge asks; more of it in tests/merge/test_rotation_complaints.py."""

from __future__ import annotations

import gzip
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from offload.files import beside
from offload.files.contents import Unpacked, open_contents
from offload.files.rotated import Folders, Resume, entry_of
from offload.files.segments import Segments
from offload.merge.audit import verify
from offload.merge.engine import Merge
from offload.merge.torture import read_lines
from offload.merge.workload import pack
from offload.packets.codec import SourceInfo
from offload.packets.format import GUARD_BYTES, HEAD_BYTES, Compression


async def merge(logs: Path, out: Path) -> None:
    async with Merge([str(logs / "app.log")], out) as running:
        await running.run()


async def write_late(logs: Path, out: Path) -> Path:
    """Merge a log of 200 lines and the one behind it, then write a line to the first, which is renamed: its path."""
    log, old = logs / "app.log", logs / "app.log.1"
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(200)))
    await merge(logs, out)
    log.rename(old)
    log.write_bytes(b"of the next file\n")
    await merge(logs, out)
    with old.open("ab") as file:
        file.write(b"late\n")
    return old


@pytest.mark.parametrize("plain_goes", [False, True], ids=["both are there", "packed"])
async def test_late_lines_of_a_file_that_is_being_packed_come_once(tmp_path: Path, plain_goes: bool) -> None:
    """For a moment it is there twice, plain and packed: what came late to it is read from one of them."""
    logs, out = tmp_path / "logs", tmp_path / "merged.opk"
    logs.mkdir()
    old = await write_late(logs, out)
    inode = logs / "app.log.2"
    if not plain_goes:
        inode.hardlink_to(old)
    pack(old)
    if not plain_goes:
        inode.rename(old)  # the very file, as if gzip had not unlinked it yet
    await merge(logs, out)
    lines = list(read_lines(out))
    assert lines.count(b"late\n") == 1
    assert len(lines) == 202
    assert verify(out).complete


@pytest.mark.parametrize("asked", ["copy", "between"])
async def test_names_that_change_during_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """Rotation renames what is looked for, to a name that was not there when the names were listed."""
    logs, out = tmp_path / "logs", tmp_path / "merged.opk"
    logs.mkdir()
    log = logs / "app.log"
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(200)))
    await merge(logs, out)
    if asked == "copy":
        shutil.copy(log, logs / "app.log.1")
    else:
        log.rename(logs / "app.log.2")
        (logs / "app.log.1").write_bytes(b"of the file in between\n")
    log.write_bytes(b"of the next file\n")
    renamed: list[str] = []

    def rotating(path: str) -> Any:
        if path.endswith(".1") and not renamed:
            renamed.append(path)
            (logs / "app.log.1").rename(logs / "app.log.3")
        return open_contents(path)

    monkeypatch.setattr(beside, "open_contents", rotating)
    await merge(logs, out)
    assert renamed
    lines = list(read_lines(out))
    assert lines[:200] == [b"line %d\n" % number for number in range(200)]
    assert lines[200:] == [*([b"of the file in between\n"] if asked == "between" else []), b"of the next file\n"]
    assert verify(out).complete


async def test_a_file_with_late_lines_that_is_packed_during_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found under its new name, in the same run."""
    logs, out = tmp_path / "logs", tmp_path / "merged.opk"
    logs.mkdir()
    old = await write_late(logs, out)

    def rotating(path: str) -> Any:
        if path.endswith(".1") and old.exists():
            old.rename(logs / "app.log.2")
            pack(logs / "app.log.2")
        return open_contents(path)

    monkeypatch.setattr(beside, "open_contents", rotating)
    await merge(logs, out)
    assert not old.exists()
    assert list(read_lines(out))[200:] == [b"of the next file\n", b"late\n"]
    assert verify(out).complete


@pytest.mark.parametrize("how", ["whole", "grown", "copied"])
async def test_packed_files_that_were_read_are_not_unpacked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Each start looks at what came late to packed files; where nothing did, their times say so."""
    logs, out = tmp_path / "logs", tmp_path / "merged.opk"
    logs.mkdir()
    log = logs / "app.log"
    for number in range(12):
        log.write_bytes(b"".join(b"line %d of file %d\n" % (line, number) for line in range(9000)))
        await merge(logs, out)
        if how == "grown":  # the last of it is read together with the next file
            with log.open("ab") as file:
                file.write(b"one more\n")
        old = logs / f"app.log.{90 - number}"
        if how == "copied":
            shutil.copy2(log, old)
            os.truncate(log, 0)
        else:
            log.rename(old)
        pack(old)
    log.write_bytes(b"the last\n")
    await merge(logs, out)
    read: list[int] = []
    read_into = Unpacked.read_into

    def noted(self: Unpacked, view: memoryview, offset: int) -> int:
        read.append(offset + len(view))
        return read_into(self, view, offset)

    monkeypatch.setattr(Unpacked, "read_into", noted)
    await merge(logs, out)
    assert not read
    late = logs / "app.log.85.gz"
    late.write_bytes(late.read_bytes() + gzip.compress(b"late\n"))
    await merge(logs, out)
    # Nobody writes to a copy.
    assert (max(read, default=0) > HEAD_BYTES) == (how != "copied")
    assert list(read_lines(out)).count(b"late\n") == (how != "copied")


async def test_a_file_that_was_packed_while_it_was_read(tmp_path: Path) -> None:
    """The packed one has less than was read by the descriptor of the plain one: nothing of it is new."""
    logs, out = tmp_path / "logs", tmp_path / "merged.opk"
    logs.mkdir()
    log, old = logs / "app.log", logs / "app.log.1"
    lines = [b"line %d\n" % number for number in range(200)]
    log.write_bytes(b"".join(lines))
    await merge(logs, out)
    with log.open("ab", buffering=0) as program:
        log.rename(old)
        log.write_bytes(b"of the next file\n")
        await merge(logs, out)
        program.write(b"late\n")
        taken = old.read_bytes(), old.stat().st_mtime_ns
        program.write(b"later\n")
        await merge(logs, out)
    old.write_bytes(taken[0])
    os.utime(old, ns=(taken[1], taken[1]))
    pack(old)
    log.rename(old)
    log.write_bytes(b"the last\n")
    for _ in range(3):
        await merge(logs, out)
    assert list(read_lines(out)) == [*lines, b"of the next file\n", b"late\n", b"later\n", b"the last\n"]
    assert verify(out).complete


def test_two_generations_of_a_file_that_end_alike(tmp_path: Path) -> None:
    """As a kill leaves it that came before the first late line: what is packed goes on with the last of them."""
    log, old = tmp_path / "app.log", tmp_path / "app.log.1"
    log.write_bytes(b"line\n" * 500)
    contents = open_contents(str(log))
    data, (size, mtime_ns) = contents.read_at(0, 2500), contents.look()
    info = SourceInfo(*contents.identity, contents.birth_ns, 0, Compression.NONE, bytes(log))
    entry = entry_of(data[:HEAD_BYTES], data[-GUARD_BYTES:], size, size, mtime_ns)
    contents.close()
    history = [Resume(info, entry), Resume(info._replace(start_off=size), entry)]
    log.rename(old)
    with old.open("ab") as file:
        file.write(b"late\n")
    pack(old)
    log.write_bytes(b"of the next file\n")
    contents = open_contents(str(log))
    present = Resume(info._replace(inode=contents.identity[1], birth_ns=contents.birth_ns), entry_of(b"", b"", 0, 0, 0))
    contents.close()
    near = beside.Beside(str(log), Folders(), lambda path, identity: False, lambda path: False)
    (found,) = near.grown(present, history, set(), start=True)
    assert (found.path, found.known.entry.resume_off, found.contents.look()[0]) == (f"{old}.gz", 2500, 2505)
    found.close()


async def test_a_rotated_file_that_may_not_be_read_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it belongs to another user now, and stands there packed too: the log is read on all the same."""
    logs, out = tmp_path / "logs", tmp_path / "merged.opk"
    logs.mkdir()
    log, old = logs / "app.log", logs / "app.log.1"
    for number in range(2):
        log.write_bytes(b"".join(b"line %d of %d\n" % (line, number) for line in range(200)))
        await merge(logs, out)
        if not number:
            log.rename(old)
    kept = tmp_path / "kept"
    kept.hardlink_to(old)
    pack(old)
    kept.rename(old)
    refused: list[str] = []

    def refusing(path: str) -> Any:
        if path == str(old):
            refused.append(path)
            raise PermissionError(13, "Permission denied", path)
        return open_contents(path)

    monkeypatch.setattr(beside, "open_contents", refusing)
    with log.open("ab") as file:
        file.write(b"the last\n")
    await merge(logs, out)
    assert refused
    assert list(read_lines(out))[400:] == [b"the last\n"]


@pytest.mark.parametrize("packed", [True, False])
async def test_copies_that_begin_like_one_of_which_there_is_no_more(tmp_path: Path, packed: bool) -> None:
    """A copy with a header only was read as a file of its own: no other copy is taken for it, with late lines."""
    logs, out = tmp_path / "logs", tmp_path / "merged.opk"
    logs.mkdir()
    log, head, wanted = logs / "app.log", b"# the header\n", Counter[bytes]()
    for number, count in enumerate((30, 0, 30, 60)):
        lines = [b"line %d of file %d\n" % (line, number) for line in range(count)]
        log.write_bytes(head + b"".join(lines))
        wanted.update([head, *lines])
        if count:  # otherwise nobody looks
            await merge(logs, out)
        if number < 3:
            copy = logs / f"app.log.{9 - number}"
            shutil.copy(log, copy)
            os.truncate(log, 0)
            if packed or number > 1:
                pack(copy)
    for _ in range(2):
        await merge(logs, out)
    assert Counter(read_lines(out)) == wanted


async def test_packed_files_of_which_the_packet_file_says_no_more(tmp_path: Path) -> None:
    """A segment states the last 32 files of a source: an older one with the same header is not taken for one of them
    of which nothing but that header was read."""
    logs, out = tmp_path / "logs", tmp_path / "merged.opk"
    logs.mkdir()
    log, head, wanted = logs / "app.log", b"# the header\n", Counter[bytes]()

    def write(number: int) -> None:
        lines = [b"line %d of file %d\n" % (line, number) for line in range(30)] if number else []
        log.write_bytes(head + b"".join(lines))
        wanted.update([head, *lines])

    async def roll() -> None:
        async with Merge([str(log)], out, segments=Segments(max_bytes=4096)) as running:
            await running.run()

    write(1)
    await roll()
    for number in range(2, 46):
        pack(log.rename(logs / f"app.log.{200 - number}"))
        write(number)
        await roll()
    for number in (0, 46):  # twice while nobody looks; in the first is a header only
        log.rename(logs / f"app.log.{100 - number}")
        write(number)
    await roll()
    log.rename(logs / "app.log.2")
    write(47)
    for _ in range(2):
        await roll()
    assert Counter(read_lines(out)) == wanted


async def test_a_search_that_cannot_list_again_keeps_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is left for the listing, perhaps: what was found by then is closed."""
    logs, out = tmp_path / "logs", tmp_path / "merged.opk"
    logs.mkdir()
    log = logs / "app.log"
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(200)))
    await merge(logs, out)
    shutil.copy(log, logs / "app.log.1")
    log.write_bytes(b"of the next file\n")
    opened: list[Any] = []

    def noted(path: str) -> Any:
        opened.append(open_contents(path))
        return opened[-1]

    def refused(self: Folders, path: str) -> Any:
        if opened:
            raise OSError(24, "Too many open files", path)
        return listing(self, path)

    listing = Folders.listing
    with monkeypatch.context() as patch:
        patch.setattr(beside, "open_contents", noted)
        patch.setattr(Folders, "listing", refused)
        await merge(logs, out)
    assert opened
    assert all(contents.fd == -1 for contents in opened)
    await merge(logs, out)
    assert list(read_lines(out))[200:] == [b"of the next file\n"]
