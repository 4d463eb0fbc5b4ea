"""Tail: every byte of a file once and in order, or stated as a Gap, whatever is done to the file meanwhile."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from offload.files import tail as module
from offload.files.descriptor import open_regular
from offload.files.packet_file import PacketFile, Piece
from offload.files.reading import ARENA_BYTES, Arena, Begin, Gap, Seen, Step, fill
from offload.files.rotated import Resume, is_former
from offload.files.tail import Tail
from offload.merge.audit import verify
from offload.packets.format import GUARD_BYTES, Flag, GapReason

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="renames under open descriptors, inodes")


@dataclass(eq=False)
class Generation:
    """What a tail gave out of one file."""

    inode: int
    data: bytearray = field(default_factory=bytearray)
    gaps: list[tuple[int, GapReason]] = field(default_factory=list)
    pieces: list[tuple[bytes, int, Flag]] = field(default_factory=list)


class Log:
    """A packet file with one source and the tail that fills it, as a merge would."""

    def __init__(self, path: Path, *, follow: bool = True) -> None:
        self.path = path
        self.packets = path.parent / "merged" / "out.opk"
        self.packets.parent.mkdir(exist_ok=True)
        self.generations: list[Generation] = []
        self.file = PacketFile(self.packets, fsync="none")
        self.tail = Tail(str(path), 0, follow=follow)

    def read(self, *sizes: int, final: bool = False) -> list[Generation]:
        """Read all that is there, in arenas of these sizes (the last one again and again)."""
        wanted = list(sizes) or [ARENA_BYTES + GUARD_BYTES]
        for _ in range(20_000):
            arena = Arena(wanted.pop(0) if len(wanted) > 1 else wanted[0])
            steps: list[Step] = []
            try:
                more = self.tail.read(arena, steps, final=final)
            finally:
                self._keep(steps)
            if not more:
                return self.generations
        raise AssertionError("reading goes on without an end")

    def _keep(self, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, Begin):
                assert self.file.open_source(step.info, None if step.first else 0) == 0
                self.generations.append(Generation(step.info.inode))
                assert os.fsdecode(step.info.path) == str(self.path)
            elif isinstance(step, Gap):
                assert step.info.start == len(self.generations[-1].data)
                self.file.gap(0, step.info)
                self.generations[-1].gaps.append((step.info.start, step.info.reason))
            elif isinstance(step, Seen):
                state = self.file.ledger.sources[0]
                state.head, state.tail = step.head, step.guard
            else:
                self.file.append([step])
                generation = self.generations[-1]
                assert step.source_off == len(generation.data)
                generation.data += step.payload
                generation.pieces.append((bytes(step.payload), step.count, step.flags))
        self.file.append([], {0: (self.tail.size, self.tail.mtime_ns)} if steps else None)

    def restart(self, *, killed: bool = False, follow: bool = True) -> None:
        """End, and begin again with nothing but the packet file."""
        self.tail.close()
        self.file.close(broken=killed)
        self.file = PacketFile(self.packets, fsync="none")
        state = self.file.ledger.sources.get(0)
        resume = None if state is None else Resume(state.info, state.entry())
        self.tail = Tail(str(self.path), 0, resume, follow=follow)

    def close(self) -> None:
        self.tail.close()
        self.file.close()
        found = verify(self.packets)
        assert found.faults == []

    @property
    def given(self) -> list[bytes]:
        """What was given out of each generation."""
        return [bytes(generation.data) for generation in self.generations]

    @property
    def gaps(self) -> list[list[tuple[int, GapReason]]]:
        return [generation.gaps for generation in self.generations]


@pytest.fixture(name="log")
def open_log(tmp_path: Path) -> Any:
    log = Log(tmp_path / "app.log")
    yield log
    log.close()


def add(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


# --- lines ------------------------------------------------------------------------------------------------------------


def test_only_whole_lines_until_the_end_is_final(log: Log) -> None:
    """The last line without LF waits; `final` gives it out as unterminated, and what follows goes on with it."""
    add(log.path, b"one\ntw")
    log.read()
    assert log.given == [b"one\n"]
    assert log.tail.lag == 2
    add(log.path, b"o\nthr")
    log.read()
    assert log.given == [b"one\ntwo\n"]
    log.read(final=True)
    log.read(final=True)
    assert log.given == [b"one\ntwo\nthr"]
    add(log.path, b"ee")
    log.read(final=True)
    add(log.path, b"!\nfour\n")
    log.read()
    assert log.generations[0].pieces[-3:] == [
        (b"thr", 1, Flag.UNTERMINATED),
        (b"ee", 0, Flag.MIDDLE | Flag.UNTERMINATED),
        (b"!\nfour\n", 1, Flag.LAST),
    ]


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"\r\n\r\n", b"a\0b\n\0\n", b"\xff\xfe\xffOPK\n", b"\n" * 1000, b"a\rb\n"]
)
def test_bytes_are_given_out_as_they_are(log: Log, data: bytes) -> None:
    """CR, NUL, bytes that are no text and empty lines come through; only LF ends a line."""
    add(log.path, data)
    log.read(final=True)
    assert log.given == [data]
    assert sum(count for _, count, _ in log.generations[0].pieces) == data.count(b"\n")


@pytest.mark.parametrize("length", [1, 100, 255, 256, 257, 300, 1000, 5000])
@pytest.mark.parametrize("size", [GUARD_BYTES + 20, 300, 1024])
def test_a_line_longer_than_the_buffer_comes_in_fragments(
    log: Log, monkeypatch: pytest.MonkeyPatch, size: int, length: int
) -> None:
    """However long a line and however small the buffer, nothing is cut off, and the line counts once."""
    monkeypatch.setattr(module, "_ROOM", 16)
    data = b"before\n" + b"x" * length + b"\nafter\nrest"
    add(log.path, data)
    log.read(size)
    assert log.given == [data.removesuffix(b"rest")]
    assert sum(count for _, count, _ in log.generations[0].pieces) == 3
    log.read(size, final=True)
    assert log.given == [data]


def test_several_tails_fill_one_arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds the room that the one before left, and no payload is written over by the next."""
    monkeypatch.setattr(module, "_ROOM", 16)
    tails = []
    for number in range(5):
        add(tmp_path / str(number), b"%d line\n" % number * 20 + b"partial")
        tails.append(Tail(str(tmp_path / str(number)), number, follow=True))
    arena = Arena(GUARD_BYTES + 5 * 160 + 64)
    steps: list[Step] = []
    for tail in tails:
        assert not tail.read(arena, steps)
    pieces = [bytes(step.payload) for step in steps if isinstance(step, Piece)]
    assert pieces == [b"%d line\n" % number * 20 for number in range(5)]
    full: list[Step] = []
    add(tmp_path / "0", b"\n")
    arena.at = len(arena.data) - 8
    assert tails[0].read(arena, full)  # there is more, and no room for it
    assert full == []
    for tail in tails:
        tail.close()


def test_ten_megabytes_without_an_end(log: Log) -> None:
    """A file that is one endless line is given out as it grows, in the buffer's size, and ends as one line."""
    block = b"x" * (1 << 20)
    for _ in range(10):
        add(log.path, block)
    log.read()
    assert log.given == [block * 10][:0] or len(log.given[0]) >= 9 << 20
    add(log.path, b"\n")
    log.read()
    assert log.given == [block * 10 + b"\n"]
    assert sum(count for _, count, _ in log.generations[0].pieces) == 1


def test_without_follow_it_ends_where_the_file_ended_when_it_was_opened(log: Log) -> None:
    """What is added later is left for the next run."""
    add(log.path, b"one\ntwo\nha")
    log.restart(follow=False)
    log.read()
    add(log.path, b"lf\nlater\n")
    log.read(final=True)
    assert log.given == [b"one\ntwo\nha"]
    assert log.tail.lag == 0
    log.restart(follow=False)
    log.read(final=True)
    assert log.given == [b"one\ntwo\nhalf\nlater\n"]
    log.path.rename(log.path.with_suffix(".1"))
    log.path.write_bytes(b"new\n")
    log.read(final=True)
    assert log.given == [b"one\ntwo\nhalf\nlater\n"]


# --- renamed ----------------------------------------------------------------------------------------------------------


def test_a_renamed_file_is_read_to_its_end_before_the_new_one(log: Log) -> None:
    """Lines added before and after the rename come, then the rest without LF, then the new file's."""
    add(log.path, b"one\n")
    log.read()
    add(log.path, b"two\n")
    old = log.path.rename(log.path.with_suffix(".1"))
    add(old, b"three\n")
    log.read()
    add(old, b"four\nhalf")
    log.read()
    assert log.given == [b"one\ntwo\nthree\nfour\n"]
    log.path.write_bytes(b"")
    log.read()
    assert len(log.given) == 1  # nothing in the new file: the program may still write to the old one
    add(old, b"!")
    add(log.path, b"new\n")
    log.read()
    assert log.given == [b"one\ntwo\nthree\nfour\nhalf!", b"new\n"]
    assert log.gaps == [[], []]
    assert log.generations[0].pieces[-1] == (b"half!", 1, Flag.UNTERMINATED)


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("read_before", [b"one\n", b"", b"par"])
def test_renamed_while_nobody_looked(log: Log, read_before: bytes, killed: bool, follow: bool) -> None:
    """After a restart the file is found under its new name in its folder, drained, then the new one is begun."""
    add(log.path, read_before + b"ti")
    log.read()
    log.restart(killed=killed, follow=follow)
    add(log.path, b"al\ntwo\nrest")
    log.path.rename(log.path.with_suffix(".1"))
    log.path.write_bytes(b"new\n")
    log.read()
    assert log.given == [read_before + b"tial\ntwo\nrest", b"new\n"]
    assert log.gaps == [[], []]


@pytest.mark.parametrize("down", [False, True])
def test_a_new_file_that_begins_like_the_old_one(log: Log, down: bool) -> None:
    """Logs that begin with the same header are told apart by the file they are: the renamed one is drained first."""
    add(log.path, b"#header\n")
    log.read()
    if down:
        log.restart()
    else:
        log.tail.close()
    add(log.path, b"old\n")
    log.path.rename(log.path.with_suffix(".1"))
    log.path.write_bytes(b"#header\nnew\n")
    log.read()
    assert log.given == [b"#header\nold\n", b"#header\nnew\n"]
    assert log.gaps == [[], []]


def test_a_file_put_back_from_a_copy_goes_on(log: Log) -> None:
    """Another inode with the same beginning, and the old one nowhere to be found, is the same log moved over."""
    add(log.path, b"one\ntwo\n")
    log.read()
    log.restart()
    copy = log.path.with_suffix(".copy")
    shutil.copy(log.path, copy)
    copy.rename(log.path)
    add(log.path, b"three\n")
    log.read()
    assert log.given == [b"one\ntwo\nthree\n"]
    assert log.gaps == [[]]


def test_renamed_while_its_descriptor_was_closed(log: Log) -> None:
    """A tail that was closed between two reads finds its file by its inode, also if nothing was read of it yet."""
    add(log.path, b"half")
    log.read()
    log.tail.close()
    log.path.rename(log.path.with_suffix(".1"))
    log.path.write_bytes(b"new\n")
    log.read()
    assert log.given == [b"half", b"new\n"]
    assert log.gaps == [[], []]


def test_renamed_and_its_name_not_taken_yet(log: Log) -> None:
    """After a restart a file whose name is free is read on under the name it has, and the next one when it comes."""
    add(log.path, b"one\n")
    log.read()
    log.restart()
    old = log.path.rename(log.path.with_suffix(".1"))
    add(old, b"two\n")
    log.read()
    assert log.given == [b"one\ntwo\n"]
    add(old, b"three")
    log.path.write_bytes(b"new\n")
    log.read()
    assert log.given == [b"one\ntwo\nthree", b"new\n"]
    assert log.gaps == [[], []]


@pytest.mark.parametrize("first", [b"", b"one\n"])
def test_renamed_and_closed_again_before_its_name_is_taken(log: Log, first: bytes) -> None:
    """A descriptor of the renamed file that is closed too leaves no mark: the file is found again and drained."""
    add(log.path, first + b"half")
    log.read()
    log.tail.close()
    old = log.path.rename(log.path.with_suffix(".1"))
    log.read()
    log.tail.close()
    add(old, b"!")
    log.path.write_bytes(b"new, and longer than the old\n")
    log.read()
    assert log.given == [first + b"half!", b"new, and longer than the old\n"]
    assert log.gaps == [[], []]


def test_renamed_away_and_deleted_while_nobody_looked(log: Log) -> None:
    """What nobody can find any more is a Gap from the offset on, and the new file is a new generation."""
    add(log.path, b"one\ntwo\n")
    log.read()
    log.restart()
    add(log.path, b"never seen\n")
    keep = log.path.parent / "keeps the inode in use"
    keep.mkdir()
    log.path.rename(keep / "elsewhere")
    log.path.write_bytes(b"something else entirely, and longer than the old one was\n")
    log.read()
    assert log.given == [b"one\ntwo\n", b"something else entirely, and longer than the old one was\n"]
    assert log.gaps == [[(8, GapReason.UNLINKED)], []]


@pytest.mark.parametrize(("seen", "gaps"), [(b"half", [(0, GapReason.UNLINKED)]), (b"", [])])
def test_a_file_that_is_gone_and_of_which_nothing_was_given_out(
    log: Log, seen: bytes, gaps: list[tuple[int, GapReason]]
) -> None:
    """The beginning of a line that was seen is a Gap; a file that was empty at the last look lost nothing known."""
    add(log.path, seen)
    log.read()
    log.restart()
    keep = log.path.parent / "keeps the inode in use"
    keep.mkdir()
    log.path.rename(keep / "elsewhere")
    log.path.write_bytes(b"new\n")
    log.read()
    assert log.given == [b"", b"new\n"]
    assert log.gaps == [gaps, []]


def test_a_file_that_lost_its_name_is_known_again(log: Log) -> None:
    """A file that was read to its end under its old name is told as such, and another with its inode is not."""
    former: dict[tuple[int, int], Any] = {}
    log.tail = Tail(str(log.path), 0, follow=True, former=former)
    add(log.path, b"one\n")
    log.read()
    old = log.path.rename(log.path.with_suffix(".1"))
    add(log.path, b"new\n")
    log.read()
    status = old.stat()
    entry = former[status.st_dev, status.st_ino]
    assert is_former(str(old), entry)
    assert not is_former(str(log.path.with_suffix(".2")), entry)
    with old.open("r+b") as file:
        file.write(b"ONE")
    assert not is_former(str(old), entry)


# --- truncated, deleted -----------------------------------------------------------------------------------------------


def test_a_truncated_file_begins_a_new_generation(log: Log) -> None:
    """What was not read of it is a Gap, and what is written then comes from offset 0."""
    add(log.path, b"one\ntwo\nhalf")
    log.read()
    os.truncate(log.path, 0)
    add(log.path, b"new\n")
    log.read()
    assert log.given == [b"one\ntwo\n", b"new\n"]
    assert log.gaps == [[(8, GapReason.TRUNCATED)], []]


@pytest.mark.parametrize("more", [-1, 0, 1, 1000])
@pytest.mark.parametrize("down", [False, True])
def test_a_file_that_was_truncated_and_grew_again_is_noticed(log: Log, more: int, down: bool) -> None:
    """Also if it is as long as before or longer: the bytes before the offset are others."""
    add(log.path, b"old line\n" * 50)
    log.read()
    if down:
        log.restart()
    os.truncate(log.path, 0)
    new = (b"NEW line\n" * 200)[: 450 + more - 1] + b"\n"
    add(log.path, new)
    log.read()
    add(log.path, b"and more\n")  # as long as before, it is noticed with the first byte that is new
    log.read()
    assert log.given == [b"old line\n" * 50, new + b"and more\n"]
    assert log.gaps == [[(450, GapReason.TRUNCATED)], []]


def test_a_partial_line_that_was_seen_and_cut_off_is_stated(log: Log) -> None:
    """Bytes that were there at the last look and are gone at this one are a Gap, although none was given out yet."""
    add(log.path, b"one\npartial")
    log.read()
    os.truncate(log.path, 6)
    log.read()
    add(log.path, b"st\n")
    log.read()
    assert log.given == [b"one\npast\n"]
    assert log.gaps == [[(4, GapReason.TRUNCATED)]]


def test_a_partial_first_line_that_was_cut_off_is_stated(log: Log) -> None:
    """The same where nothing at all was given out of the file."""
    add(log.path, b"partial")
    log.read()
    os.truncate(log.path, 0)
    add(log.path, b"new\n")
    log.read()
    assert log.given == [b"new\n"]
    assert log.gaps == [[(0, GapReason.TRUNCATED)]]


@pytest.mark.parametrize(("keeps", "gaps"), [(b"two\n", []), (b"t", [(5, GapReason.TRUNCATED)])])
def test_room_that_is_given_back_while_it_is_read(
    log: Log, monkeypatch: pytest.MonkeyPatch, keeps: bytes, gaps: list[tuple[int, GapReason]]
) -> None:
    """Between the look at the length and the read: nothing but the NULs that were seen is gone, or something is."""
    log.path.write_bytes(b"one\ntw" + bytes(100_000))
    log.read()

    def cut(*args: Any) -> tuple[int, int]:
        monkeypatch.undo()
        with log.path.open("r+b") as file:
            file.seek(4)
            file.write(keeps)
            file.truncate()
        return fill(*args)

    monkeypatch.setattr(module, "fill", cut)
    log.read()
    log.read(final=True)
    assert log.given == [b"one\n" + keeps]
    assert log.gaps == [gaps]


def test_a_deleted_file_is_read_to_its_end(log: Log) -> None:
    """The open descriptor gives what was written before the name went, and after; then the new file's turn comes."""
    add(log.path, b"one\n")
    log.read()
    with log.path.open("ab", buffering=0) as program:
        log.path.unlink()
        program.write(b"two\n")
        log.read()
        program.write(b"three")
        log.path.write_bytes(b"new\n")
        log.read()
    assert log.given == [b"one\ntwo\nthree", b"new\n"]
    assert log.gaps == [[], []]


def test_deleted_while_nobody_looked(log: Log) -> None:
    """There is no such file until it is made again; then what was lost is a Gap."""
    add(log.path, b"one\n")
    log.read()
    log.restart()
    log.path.unlink()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            log.read()
    log.path.write_bytes(b"another, longer\n")
    log.read()
    assert log.given == [b"one\n", b"another, longer\n"]
    assert [len(gaps) for gaps in log.gaps] == [1, 0]


def test_a_file_copied_and_truncated_goes_on_in_place(log: Log) -> None:
    """logrotate's copytruncate: the copy is another file, the source begins a new generation."""
    add(log.path, b"one\ntwo\n")
    log.read()
    shutil.copy2(log.path, log.path.with_suffix(".1"))
    os.truncate(log.path, 0)
    add(log.path, b"three\n")
    log.restart()
    log.read()
    assert log.given == [b"one\ntwo\n", b"three\n"]
    assert log.gaps == [[(8, GapReason.TRUNCATED)], []]


def test_a_resumed_fragment_goes_on(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart in the middle of a long line, before or after `final`, leaves it one line."""
    monkeypatch.setattr(module, "_ROOM", 16)
    add(log.path, b"x" * 1000)
    log.read(400)
    log.restart()
    add(log.path, b"y" * 1000)
    log.read(400, final=True)
    log.restart(killed=True)
    add(log.path, b"\nnext\n")
    log.read(400)
    assert log.given == [b"x" * 1000 + b"y" * 1000 + b"\nnext\n"]
    assert sum(count for _, count, _ in log.generations[0].pieces) == 2


# --- what cannot be read ----------------------------------------------------------------------------------------------


def test_a_fifo_does_not_block_and_is_refused(tmp_path: Path) -> None:
    """A FIFO without a writer, a folder, a device and a missing file raise at once, and nothing stays open."""
    os.mkfifo(tmp_path / "fifo")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for path, error, text in (
        (tmp_path / "fifo", OSError, "no regular file"),
        (tmp_path, IsADirectoryError, "Is a directory"),
        (Path("/dev/zero"), OSError, "no regular file"),
        (tmp_path / "missing", FileNotFoundError, "No such file"),
    ):
        steps: list[Step] = []
        tail = Tail(str(path), 0, follow=True)
        with pytest.raises(error, match=text):
            tail.read(Arena(), steps)
        assert steps == []
        assert not tail.is_open
        with pytest.raises(error, match=text):
            open_regular(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_name_taken_by_something_else_and_given_back(log: Log) -> None:
    """While a folder has the name the reason is raised; when the file is back it goes on where it was."""
    add(log.path, b"one\n")
    log.read()
    log.restart()
    old = log.path.rename(log.path.with_suffix(".old"))
    log.path.mkdir()
    for _ in range(2):
        with pytest.raises(IsADirectoryError):
            log.read()
    log.path.rmdir()
    add(old, b"two\n")
    old.rename(log.path)
    log.read()
    assert log.given == [b"one\ntwo\n"]
    assert log.gaps == [[]]


def test_no_permission(log: Log) -> None:
    """A file that may not be read raises PermissionError, and is read on when it may."""
    add(log.path, b"one\n")
    log.path.chmod(0)
    code = """
import os, sys
from offload.files.reading import Arena
from offload.files.tail import Tail
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    Tail(sys.argv[1], 0).read(Arena(), [])
except PermissionError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code, str(log.path)], capture_output=True, text=True, timeout=30)
    assert done.stdout == "refused\n", done.stderr
    log.path.chmod(0o644)
    log.read()
    assert log.given == [b"one\n"]


# --- everything at once -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Incarnation:
    """One file as it was under the log's name: what a reader can at most get of it."""

    inode: int
    content: bytearray
    excused: bool = False  # some of it was gone before anybody could look
    gone: bool = False  # nobody has it open, and no name that a reader looks at is its


NUMBER = 6  # digits that each piece begins with


class TailMachine(RuleBasedStateMachine):
    """A program writes, rotates, truncates and deletes its log, while a tail is read, closed, killed and resumed.

    Each piece that is written is unlike all others, so what was given out tells which file it came from. The model
    allows what no reader can know: bytes that came and went between two looks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="tail"))
        self.path = self.folder / "app.log"
        self.path.write_bytes(b"")
        (self.folder / "kept").mkdir()
        self.log = Log(self.path)
        self.files = [Incarnation(self.path.stat().st_ino, bytearray())]
        self.of: list[Incarnation] = []  # of each generation
        self.must_gap: list[Generation] = []
        self.number = 0
        self.rotations = 0
        self.old: Path | None = None  # the file before, while the tail may still be at it
        self.exists = True
        self.unlinked: Incarnation | None = None  # a file that only the tail's descriptor holds

    def piece(self, kind: int, length: int) -> bytes:
        self.number += 1
        body = (b"%06d" % self.number) * (1 + length // 6)
        return body + (b"", b"\r", b"\0\n", b"\n\n")[kind % 4] + (b"\n" if kind >= 4 else b"")

    def given(self) -> int:
        """How much was given out of the log's present file."""
        if self.of and self.of[-1] is self.files[-1]:
            return len(self.log.generations[-1].data)
        return 0

    @rule(kinds=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 60)), min_size=1, max_size=6))
    def append(self, kinds: list[tuple[int, int]]) -> None:
        data = b"".join(self.piece(kind, length) for kind, length in kinds)
        add(self.path, data)
        if not self.exists:
            self.appeared()
        self.files[-1].content += data

    @rule(length=st.integers(200, 3000), ended=st.booleans())
    def append_long_line(self, length: int, ended: bool) -> None:
        self.append([(4 if ended else 0, length)])

    def appeared(self) -> None:
        """The name has a new file."""
        self.files.append(Incarnation(self.path.stat().st_ino, bytearray()))
        self.exists = True

    @precondition(lambda self: self.exists and self.files[-1].content)
    @rule(empty=st.booleans())
    def rotate(self, empty: bool) -> None:
        """Renamed, whether or not the tail has seen the rotation before this one."""
        self.rotations += 1
        self.old = self.path.rename(self.folder / f"app.log.{self.rotations}")
        self.exists = False
        if empty:
            self.path.write_bytes(b"")
            self.appeared()

    @precondition(lambda self: self.old is not None and not (self.exists and self.files[-1].content))
    @rule(kind=st.integers(0, 7))
    def append_to_the_renamed(self, kind: int) -> None:
        """The program has not opened its new file yet."""
        assert self.old is not None
        data = self.piece(kind, 10)
        add(self.old, data)
        self.files[-2 if self.exists else -1].content += data

    @precondition(lambda self: self.exists and self.old is None)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        file = self.files[-1]
        # A beginning that each of these files has, of some zeros, would tell none of them from another.
        size = data.draw(st.one_of(st.just(0), st.integers(min(NUMBER, len(file.content)), len(file.content))))
        given = self.given()
        os.truncate(self.path, size)
        if size >= given:
            if size < len(file.content):
                file.excused = file.excused or not given
            del file.content[size:]
        else:
            self.must_gap.append(self.log.generations[-1])
            self.files.append(Incarnation(file.inode, file.content[:size]))

    def gone(self, file: Incarnation) -> None:
        """Nobody can read this file any more: a Gap must say so, unless nothing of it was ever given out."""
        if self.of and self.of[-1] is file and self.given_of(-1):
            self.must_gap.append(self.log.generations[-1])
        file.excused = file.gone = True

    @precondition(lambda self: self.exists and self.old is None)
    @rule()
    def delete(self) -> None:
        # Its inode stays in use: a new file that got it, and of which nothing was read, no reader could tell from it.
        os.link(self.path, self.folder / "kept" / str(len(self.files)))
        self.path.unlink()
        self.exists = False
        file = self.files[-1]
        if self.log.tail.is_open and self.of and self.of[-1] is file:
            self.unlinked = file
        else:
            self.gone(file)

    @rule(sizes=st.lists(st.integers(GUARD_BYTES + 24, 1500), min_size=1, max_size=3), final=st.booleans())
    def read(self, sizes: list[int], final: bool) -> None:
        before = len(self.log.generations)
        new = self.files[-1]
        data = self.log.generations[-1].data if self.of else b""
        same = self.of and self.of[-1].inode == new.inode
        lost = self.of and self.of[-1].gone and data
        if self.exists and (same or lost) and new.content.startswith(data):
            # Cut off and written again as it was: nobody can tell, and nothing is missing.
            self.of[-1] = new
            self.must_gap = [generation for generation in self.must_gap if generation is not self.log.generations[-1]]
        try:
            self.log.read(*sizes, final=final)
        except FileNotFoundError:
            assert not self.exists
            return
        finally:
            self.tie(before)
        if same and len(new.content) == len(data) and len(self.log.generations) == before:
            return  # written anew, as long as before: it shows with the next byte
        if self.exists and self.files[-1].content:
            assert self.of[-1] is self.files[-1], "the tail is not at the file that has the name"
            self.old = self.unlinked = None
        rest = self.of[-1].content[self.given_of(-1) :]
        assert b"\n" not in rest, "a whole line was left"
        if final:
            assert not rest, "a final read left bytes"
        self.check()

    def tie(self, before: int) -> None:
        """Say of which file each new generation is: the newest with its inode that no other generation was of."""
        for generation in self.log.generations[before:]:
            if generation is self.log.generations[-1] and self.exists and generation.inode == self.files[-1].inode:
                self.of.append(self.files[-1])
            else:
                self.of.append([f for f in self.files if f.inode == generation.inode][-1])

    def given_of(self, index: int) -> int:
        return len(self.log.generations[index].data)

    def check(self) -> None:
        """Each generation is a beginning of its file; all of it, or a Gap says that there was more."""
        assert len(self.of) == len(self.log.generations)
        for file, generation in zip(self.of, self.log.generations, strict=True):
            assert file.content.startswith(generation.data) or generation in self.must_gap, "bytes of another file"
        for file, generation in zip(self.of[:-1], self.log.generations[:-1], strict=True):
            if generation in self.must_gap:
                assert generation.gaps, "bytes are gone and nothing says so"
            elif not generation.gaps and not file.excused:
                assert generation.data == file.content, "bytes were passed over"

    def check_all(self) -> None:
        """No file was passed over that had the name after the first one that was seen, and could be found."""
        for file in self.files[self.files.index(self.of[0]) :]:
            assert not file.content or file.excused or file.gone or file in self.of, "a file was passed over"

    @rule()
    def close_descriptor(self) -> None:
        self.log.tail.close()
        if self.unlinked is not None:
            self.gone(self.unlinked)
            self.unlinked = None

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        self.close_descriptor()
        self.log.restart(killed=killed)

    def teardown(self) -> None:
        try:
            self.append([(4, 1)])
            self.restart(killed=False)
            self.read([2000], final=False)
            self.read([2000], final=True)
            self.check_all()
            self.log.close()
        finally:
            self.log.tail.close()
            self.log.file.close(broken=True)
            shutil.rmtree(self.folder)


@pytest.mark.slow
def test_whatever_happens_to_the_file_each_byte_comes_once_or_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over random histories of a log and its reader, against a model of what each file held."""
    monkeypatch.setattr(module, "_ROOM", 16)
    run_state_machine_as_test(
        TailMachine,
        settings=settings(
            max_examples=120, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
