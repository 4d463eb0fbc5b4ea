"""PacketFile and FrameSource: whatever ends a writer, the file holds whole frames, once each, and promises no more."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from offload.errors import BusyResourceError, PacketError
from offload.files import append as append_module
from offload.files import frame_source
from offload.files import packet_file as module
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.files.series import Plain
from offload.merge.audit import verify
from offload.packets.codec import CommitInfo, Damage, Frame, GapInfo, PacketDecoder, SourceInfo, packets_payload
from offload.packets.format import MAX_PAYLOAD, NONE_U64, Compression, Flag, FrameType, GapReason

LINES = FrameType.LINES
CONTENT = (FrameType.LINES, FrameType.PACKETS, FrameType.GAP, FrameType.SOURCE)


def about(path: bytes) -> SourceInfo:
    return SourceInfo(7, 11, 0, 0, Compression.NONE, path)


def fd_of(reader: FrameSource) -> int:
    last = reader.series._last
    assert isinstance(last, Plain)
    return last.fd


def frames_of(path: Path) -> list[Frame]:
    with FrameSource(path) as source:
        frames = list(source)
        source.end()
    return frames


def told(frames: Sequence[Frame]) -> list[tuple[int, int, int, int, bytes]]:
    """What the frames say about sources, without what differs from run to run."""
    return [
        (f.header.type, f.header.source_id, f.header.seq, f.header.source_off, said(f))
        for f in frames
        if f.header.type in CONTENT
    ]


def said(frame: Frame) -> bytes:
    return SourceInfo.unpack(frame).path if frame.header.type is FrameType.SOURCE else frame.payload


def commits_of(path: Path) -> list[tuple[int, CommitInfo]]:
    return [(f.offset, CommitInfo.unpack(f)) for f in frames_of(path) if f.header.type is FrameType.COMMIT]


def assert_sound(path: Path) -> None:
    found = verify(path)
    assert found.faults == []
    assert found.torn == 0


def fill(file: PacketFile, *lines: bytes, source_id: int | None = None) -> int:
    """Append these lines, a frame each, in one batch; begin the source if it is new."""
    if source_id is None:
        state = file.source_named(b"/log")
        source_id = file.open_source(about(b"/log")) if state is None else state.source_id
    at = file.ledger.sources[source_id].resume_off
    pieces = []
    for line in lines:
        pieces.append(Piece(source_id, line, at, line.count(b"\n")))
        at += len(line)
    file.append(pieces)
    return source_id


# Every kind of frame that a source can have, a step each. A step is exactly one frame, so that a writer that goes on
# knows by counting which one is next.
def steps() -> list[Any]:
    table, flags = packets_payload([b"", b"\0packet", b"\xffOPK"])

    def piece(
        number: int, payload: bytes, count: int, flags: Flag = Flag.NONE, kind: FrameType = FrameType.LINES
    ) -> Any:
        def step(file: PacketFile) -> None:
            file.append([Piece(number, payload, file.ledger.sources[number].resume_off, count, flags, kind)])

        return step

    def gap(file: PacketFile) -> None:
        file.gap(0, GapInfo(file.ledger.sources[0].resume_off, NONE_U64, NONE_U64, GapReason.TRUNCATED))
        file.append([])

    def source(number: int, path: bytes, *, again: bool = False) -> Any:
        def step(file: PacketFile) -> None:
            assert file.open_source(about(path), number if again else None) == number
            file.append([])

        return step

    return [
        source(0, b"/a"),
        piece(0, b"one\ntwo\n", 2),
        source(1, b"/b"),
        piece(1, table, 3, flags, FrameType.PACKETS),
        piece(0, b"half", 0, Flag.FIRST),
        piece(0, b" more", 0, Flag.MIDDLE),
        piece(0, b" end\n", 1, Flag.LAST),
        piece(1, b"", 1, Flag.NONE, FrameType.PACKETS),
        piece(0, b"no end", 1, Flag.UNTERMINATED),
        piece(0, b" yet\nline\n", 1, Flag.LAST),
        gap,
        source(0, b"/a", again=True),
        piece(0, b"anew\n" * 20, 20),
        piece(1, b"last", 1, Flag.NONE, FrameType.PACKETS),
    ]


def go_on(file: PacketFile, done: int) -> None:
    """Take the steps that the file does not hold yet."""
    for number, step in enumerate(steps()):
        if number >= done:
            step(file)
            if number % 5 == 4:
                file.commit()


@pytest.fixture(scope="module", name="whole")
def write_whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[tuple[int, int, int, int, bytes]]]:
    """A file of every kind of frame, and what it tells."""
    path = tmp_path_factory.mktemp("whole") / "out.opk"
    file = PacketFile(path, fsync="none")
    go_on(file, 0)
    file.close()
    assert_sound(path)
    return path.read_bytes(), told(frames_of(path))


# --- going on ---------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    """Frames come back in order, with the clock's time, and the file verifies."""
    ticks = itertools.count(1000)
    file = PacketFile(tmp_path / "out.opk", written_by="a test", clock=lambda: next(ticks))
    fill(file, b"a\nb\n", b"c\n")
    file.close()
    frames = frames_of(tmp_path / "out.opk")
    assert [f.header.type.name for f in frames] == ["FILE", "SOURCE", "LINES", "LINES", "COMMIT"]
    assert [f.packets() for f in frames[2:4]] == [[b"a\n", b"b\n"], [b"c\n"]]
    assert [f.header.time_ns for f in frames[2:4]] == [1002, 1002]
    assert frames[0].payload.endswith(b"a test")
    assert_sound(tmp_path / "out.opk")


def test_a_later_run_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    """Each run continues numbers and offsets, begins with a COMMIT of a new epoch, and the file stays sound."""
    path = tmp_path / "out.opk"
    for run in range(4):
        file = PacketFile(path)
        fill(file, b"line %d\n" % run)
        file.close()
        assert_sound(path)
    frames = frames_of(path)
    lines = [f for f in frames if f.header.type is FrameType.LINES]
    assert [(f.header.seq, f.header.source_off, f.payload) for f in lines] == [
        (run, 7 * run, b"line %d\n" % run) for run in range(4)
    ]
    assert len({f.header.epoch for f in lines}) == 4
    for before, after in itertools.pairwise(frames):
        if before.header.epoch != after.header.epoch:
            assert after.header.type is FrameType.COMMIT


@pytest.mark.slow
def test_cut_anywhere_a_run_goes_on_and_nothing_is_missing_or_twice(
    tmp_path: Path, whole: tuple[bytes, list[tuple[int, int, int, int, bytes]]]
) -> None:
    """At every length that a killed writer can leave, the next one cuts the torn frame and writes the rest, once."""
    data, content = whole
    path = tmp_path / "out.opk"
    borders = {0, *(frame.end for frame in frames_in(data))}
    # Every byte of the last frames, and of the others those where something may begin or end.
    near = {border + more for border in borders for more in (-1, 0, 1, 4, 63, 64, 65)}
    for length in sorted(near | set(range(len(data) - 700, len(data)))):
        if not 0 <= length <= len(data):
            continue
        path.write_bytes(data[:length])
        file = PacketFile(path, fsync="none")
        assert file.recovery.hole is None
        assert file.end == max(border for border in borders if border <= length)
        assert path.stat().st_size == file.end
        go_on(file, sum(1 for frame in frames_in(data[: file.end]) if frame.header.type in CONTENT))
        file.close()
        assert_sound(path)
        assert told(frames_of(path)) == content


def frames_in(data: bytes) -> list[Frame]:
    return PacketDecoder().feed(data)


def test_a_run_that_adds_nothing_leaves_the_bytes(tmp_path: Path) -> None:
    """Opening and closing a file that was closed in order changes nothing, under each fsync policy."""
    path = tmp_path / "out.opk"
    file = PacketFile(path)
    fill(file, b"a\n", b"b\n")
    file.close()
    before = path.read_bytes()
    for fsync in ("none", "interval", "always"):
        file = PacketFile(path, fsync=fsync)
        file.append([])
        file.tick()
        file.commit()
        file.sync()
        file.close()
        assert path.read_bytes() == before


def test_a_run_that_adds_nothing_behind_a_killed_one_adds_its_commit_once(tmp_path: Path) -> None:
    """Frames that a killed writer left without COMMIT get one from the next run; the run after that changes nothing."""
    path = tmp_path / "out.opk"
    file = PacketFile(path)
    fill(file, b"a\n", b"b\n")
    file.close(broken=True)
    before = path.read_bytes()
    PacketFile(path).close()
    added = path.read_bytes()
    assert added.startswith(before)
    assert [f.header.type for f in frames_of(path) if f.offset >= len(before)] == [FrameType.COMMIT]
    PacketFile(path).close()
    assert path.read_bytes() == added
    assert_sound(path)


def test_an_empty_file_stays_empty(tmp_path: Path) -> None:
    """Opening and closing without a write makes no frame."""
    PacketFile(tmp_path / "out.opk").close()
    assert (tmp_path / "out.opk").read_bytes() == b""


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"a log line, no packet file\n" * 10, PacketError), (b"x", PacketError), (b"\xffOPK" + bytes(100), PacketError)],
)
def test_what_is_no_packet_file_is_not_touched(tmp_path: Path, content: bytes, error: type[Exception]) -> None:
    """A file that does not begin as a packet file raises PacketError, keeps its bytes, and is not left locked."""
    path = tmp_path / "out.opk"
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(error):
            PacketFile(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(("name", "error"), [("missing/out.opk", FileNotFoundError), (".", IsADirectoryError)])
def test_what_cannot_be_opened(tmp_path: Path, name: str, error: type[Exception]) -> None:
    """The system's own error, and nothing is made."""
    with pytest.raises(error):
        PacketFile(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_policy_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    """A misspelt fsync policy raises and makes no file."""
    with pytest.raises(ValueError, match="fsync is 'sometimes', expected 'none', 'interval' or 'always'"):
        PacketFile(tmp_path / "out.opk", fsync="sometimes")  # type: ignore[arg-type]
    assert not (tmp_path / "out.opk").exists()


# --- one writer -------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from offload.files.packet_file import PacketFile, Piece
from offload.packets.codec import SourceInfo
file = PacketFile(sys.argv[1], fsync="none")
state = file.source_named(b"/log")
number = file.open_source(SourceInfo(0, 0, 0, 0, 0, b"/log")) if state is None else state.source_id
state = file.ledger.sources[number]
size = 1
for batch in range(3000):
    pieces, at, seq = [], state.resume_off, state.next_seq
    for _ in range(3):
        line = b"%d %s\\n" % (seq, b"." * (size * 37 % 1000))
        pieces.append(Piece(number, line, at, 1))
        at, seq, size = at + len(line), seq + 1, size + 1
    file.append(pieces)
    state = file.ledger.sources[number]
    if batch % 5 == 4:
        file.commit()
    if batch == 0:
        print("writing", flush=True)
sys.stdin.read()
"""


class Writer:
    """A program that writes lines, numbered from where the file stands, until it is killed."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", WRITER, str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"writing\n"

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    """While a writer has the file, another gets BusyResourceError and changes nothing; afterwards it may write."""
    path = tmp_path / "out.opk"
    first = PacketFile(path)
    fill(first, b"a\n")
    before = path.read_bytes()
    with pytest.raises(BusyResourceError, match=r"out.opk is being written by somebody else; wait for it or write"):
        PacketFile(path)
    assert path.read_bytes() == before
    fill(first, b"b\n")
    first.close()
    second = PacketFile(path)
    fill(second, b"c\n")
    second.close()
    assert_sound(path)


@pytest.mark.slow
def test_a_writer_in_another_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    """The lock ends with the process that had it, and what that one left is gone on with."""
    path = tmp_path / "out.opk"
    with Writer(path):
        with pytest.raises(BusyResourceError):
            PacketFile(path)
        assert verify(path).live
    file = PacketFile(path, fsync="none")
    seq = file.ledger.sources[0].next_seq
    fill(file, b"%d the end\n" % seq)
    file.close()
    assert_sound(path)
    lines = [line for f in frames_of(path) if f.header.type is FrameType.LINES for line in f.lines()]
    assert [int(line.split()[0]) for line in lines] == list(range(seq + 1))


@pytest.mark.parametrize("looks", [1, 500])
def test_a_reader_that_asks_who_writes_keeps_no_writer_out(
    looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that opens in the very moment in which a reader looks at the lock is let in, if it stops there too."""
    path = tmp_path / "out.opk"
    PacketFile(path).close()
    real = fcntl.flock
    waits: list[float] = []
    with FrameSource(path) as reader:

        def done_looking(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == looks:
                real(fd_of(reader), fcntl.LOCK_UN)

        monkeypatch.setattr(time, "sleep", done_looking)
        real(fd_of(reader), fcntl.LOCK_SH | fcntl.LOCK_NB)  # as is_being_written() does, for a moment
        file = PacketFile(path)
        assert reader.is_being_written()
        file.close()
        assert not reader.is_being_written()
    assert len(waits) == looks


def test_somebody_who_shares_the_lock_for_good_is_told_as_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is held on and on ends in BusyResourceError, not in waiting for ever."""
    path = tmp_path / "out.opk"
    PacketFile(path).close()
    monkeypatch.setattr("offload.files.descriptor.PATIENCE", 0.05)
    with FrameSource(path) as reader:
        fcntl.flock(fd_of(reader), fcntl.LOCK_SH)
        with pytest.raises(BusyResourceError):
            PacketFile(path)


# --- COMMIT and fsync -------------------------------------------------------------------------------------------------


def test_commits_stand_where_they_are_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than COMMIT_BYTES and one batch stand before a COMMIT; the first lists all sources; none is empty."""
    monkeypatch.setattr(module, "COMMIT_BYTES", 2000)
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="none")
    for number in range(100):
        fill(file, b"%099d\n" % number)
    file.commit()
    end = file.end
    file.commit()
    file.tick()
    assert file.end == end
    file.close()
    assert path.stat().st_size == end
    offsets = [offset for offset, _ in commits_of(path)]
    assert max(b - a for a, b in itertools.pairwise([0, *offsets])) <= 2000 + 64 + 100
    assert len(offsets) < 12
    assert commits_of(path)[0][1].full
    assert_sound(path)


class Syncs:
    """Notes how long the file was at each fsync."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.fail = False
        real = append_module.sync_descriptor

        def sync(fd: int) -> None:
            if self.fail:
                raise OSError(errno.EIO, "the disk says no")
            real(fd)
            self.sizes.append(os.fstat(fd).st_size)

        monkeypatch.setattr(append_module, "sync_descriptor", sync)


@pytest.fixture(name="syncs")
def note_syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)


@pytest.mark.parametrize("fsync", ["none", "interval", "always"])
def test_durable_upto_never_passes_what_was_synced(tmp_path: Path, syncs: Syncs, fsync: Any) -> None:
    """In any order of appends, ticks, COMMITs, syncs and runs, each COMMIT names a size that an fsync before it saw."""
    rng = random.Random(7)
    for attempt in range(20):
        path = tmp_path / f"{attempt}.opk"
        syncs.sizes.clear()
        for _ in range(3):
            file = PacketFile(path, fsync=fsync)
            for _ in range(rng.randrange(12)):
                action = rng.choice(["append", "append", "tick", "commit", "sync"])
                if action == "append":
                    fill(file, b"line\n")
                else:
                    getattr(file, action)()
            file.close(broken=rng.random() < 0.3)
        for offset, commit in commits_of(path):
            assert commit.durable_upto in {0, *syncs.sizes}
            assert commit.durable_upto <= offset
        assert_sound(path)


def test_policy_none_leaves_syncing_to_the_system(tmp_path: Path, syncs: Syncs) -> None:
    """Nothing is synced, and no COMMIT says otherwise; asked for, one is done."""
    file = PacketFile(tmp_path / "out.opk", fsync="none")
    fill(file, b"a\n")
    file.tick()
    fill(file, b"b\n")
    file.close()
    assert syncs.sizes == []
    assert [commit.durable_upto for _, commit in commits_of(tmp_path / "out.opk")] == [0, 0]


def test_policy_interval_syncs_before_the_commit_of_a_tick(tmp_path: Path, syncs: Syncs) -> None:
    """One fsync serves all appends of an interval, and the COMMIT behind it says how far; the end is synced too."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="interval")
    for _ in range(5):
        fill(file, b"a\n", b"b\n")
    first = frames_of(path)[0].end
    assert syncs.sizes == [first], "of a new file the first frame is synced alone"
    end = file.end
    file.tick()
    file.tick()
    assert syncs.sizes == [first, end]
    file.close()
    assert syncs.sizes == [first, end, path.stat().st_size]
    assert [commit.durable_upto for _, commit in commits_of(path)] == [end]


def test_policy_always_returns_once_it_is_on_the_disk(tmp_path: Path, syncs: Syncs) -> None:
    """Each append is synced whole before it returns, a batch with one fsync."""
    file = PacketFile(tmp_path / "out.opk", fsync="always")
    for number in range(1, 6):
        fill(file, *[b"line\n"] * number)
        assert syncs.sizes[-1] == file.end
        assert len(syncs.sizes) == 1 + number, "and before them the first frame of a new file"
    file.close()


def test_the_first_fsync_finds_no_descriptor(tmp_path: Path, descriptors: Any) -> None:
    """Others may take all that there are once a packet file is open: it is on the disk with its name nevertheless."""
    descriptors.limit(10)
    file = PacketFile(tmp_path / "out.opk", fsync="always")
    descriptors.take_all()
    fill(file, b"a\n")
    file.close()
    descriptors.give()
    assert_sound(tmp_path / "out.opk")


def test_an_append_whose_fsync_fails_raises_and_no_commit_says_it_is_durable(tmp_path: Path, syncs: Syncs) -> None:
    """A failed fsync is never taken for a good one, not even by the run after."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="always")
    fill(file, b"a\n")
    good = syncs.sizes[-1]
    syncs.fail = True
    with pytest.raises(OSError, match="the disk says no"):
        fill(file, b"b\n")
    file.commit()
    file.close(broken=True)
    syncs.fail = False
    PacketFile(path, fsync="none").close()
    assert {commit.durable_upto for _, commit in commits_of(path)} <= {0, good}
    assert_sound(path)


@pytest.mark.parametrize("settle", [False, True])
def test_a_source_is_on_the_disk_before_its_content_is_written(tmp_path: Path, syncs: Syncs, settle: bool) -> None:
    """With `settle`: sources that begin together share an fsync, and a generation that begins has one of its own."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, settle=settle)
    first, second = file.open_source(about(b"/a")), file.open_source(about(b"/b"))
    for source_id in (first, second, first):
        fill(file, b"line\n", source_id=source_id)
    file.open_source(about(b"/a"), first)
    fill(file, b"anew\n", b"and on\n", source_id=first)
    file.close(broken=True)
    frames = frames_of(path)
    begun = [frame.end for frame in frames if frame.header.type is FrameType.SOURCE]
    assert syncs.sizes == [frames[0].end, *begun[1:]][: 3 if settle else 1]


def test_a_file_that_cannot_be_cut_is_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk while opening leaves no lock behind."""
    path = tmp_path / "out.opk"
    with contextlib.closing(PacketFile(path)) as file:
        fill(file, b"a\n")
    path.write_bytes(path.read_bytes()[:-1])

    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "the disk says no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(OSError, match="the disk says no") as caught:
            PacketFile(path)
    PacketFile(path).close()
    del caught


def test_an_fsync_that_failed_is_not_tried_again(tmp_path: Path, syncs: Syncs) -> None:
    """The disk may say yes the next time: this writer does not ask, and says which bytes it does not know of."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="interval")
    fill(file, b"a\n")
    file.tick()
    good, end = syncs.sizes[-1], file.end
    fill(file, b"b\n")
    syncs.fail = True
    for _ in range(2):
        with pytest.raises(OSError, match=f"bytes {good} to {file.end} are not known to be on the disk"):
            file.sync()
        syncs.fail = False
    assert syncs.sizes[-1] == good
    assert good <= end
    file.close(broken=True)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_was_left_unsynced_is_written_again_before_the_first_fsync(
    tmp_path: Path, syncs: Syncs, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """The same bytes, at their place; if the system has lost them since it was opened, nothing is called durable."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="interval")
    fill(file, b"a\n")
    file.tick()
    synced = syncs.sizes[-1]
    fill(file, b"b\n", b"c\n")
    syncs.fail = True
    with pytest.raises(OSError, match="the disk says no"):
        file.sync()
    file.close(broken=True)
    syncs.fail = False
    before = path.read_bytes()
    written: list[tuple[int, bytes]] = []
    real = os.pwrite

    def pwrite(fd: int, data: bytes, at: int) -> int:
        written.append((at, bytes(data)))
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    file = PacketFile(path, fsync="interval")
    if damaged:
        path.write_bytes(before[:-1] + b"?")
        with pytest.raises(OSError, match="damaged since it was opened"):
            file.sync()
        file.close(broken=True)
        return
    fill(file, b"d\n")
    assert written == []
    file.sync()
    assert written == [(synced, before[synced:])]
    assert path.read_bytes().startswith(before)
    file.sync()
    file.close()
    assert len(written) == 1
    assert_sound(path)


@pytest.mark.slow
@pytest.mark.peer("strace")
def test_the_system_sees_one_write_a_batch_and_the_fsyncs_of_the_policy(tmp_path: Path) -> None:
    """By strace: a batch is one writev, and the policy's fsyncs are really made, for a new file the folder's too."""
    code = """
import sys
from offload.files.packet_file import PacketFile, Piece
from offload.packets.codec import SourceInfo
file = PacketFile(sys.argv[1], fsync=sys.argv[2])
number = file.open_source(SourceInfo(0, 0, 0, 0, 0, b"/log"))
for batch in range(3):
    file.append([Piece(number, b"line\\n", 15 * batch + 5 * n, 1) for n in range(3)])
    if batch == 1:
        file.tick()
file.close()
"""
    program = shutil.which("strace")
    assert program is not None
    if subprocess.run([program, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let processes be traced")
    seen = {}
    for fsync in ("none", "interval", "always"):
        path, trace = tmp_path / f"{fsync}.opk", tmp_path / "trace"
        command = [program, "-f", "-qq", "-o", str(trace), "-e", "trace=fsync,fdatasync,writev,ftruncate"]
        subprocess.run([*command, sys.executable, "-c", code, str(path), fsync], check=True, timeout=30)
        seen[fsync] = re.findall(r"\d+ +(\w+)\(", trace.read_text())
    begun = ["writev", "fdatasync", "fsync"]  # the first frame, and the folder
    assert seen == {
        "none": ["writev"] * 5,
        "interval": [*begun, "writev", "writev", "fdatasync", "writev", "writev", "fdatasync", "writev", "fdatasync"],
        "always": [*begun, *["writev", "fdatasync"] * 2, "writev", *["writev", "fdatasync"] * 2],
    }


# --- a disk that refuses ----------------------------------------------------------------------------------------------

FULL = """
import resource, signal, sys
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.merge.audit import verify
from offload.packets.codec import SourceInfo
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
lines = [b"%d\\n" % n * (n + 1) for n in range(6)]

def write(file, start):
    pieces, at = [], sum(map(len, lines[:start]))
    for n in range(start, 6):
        pieces.append(Piece(0, lines[n], at, n + 1))
        at += len(lines[n])
    file.append(pieces)

def begin(path):
    file = PacketFile(path, fsync="none")
    if not file.ledger.sources:
        assert file.open_source(SourceInfo(0, 0, 0, 0, 0, b"/log")) == 0
    return file

whole = sys.argv[1] + "/whole"
file = begin(whole)
write(file, 0)
file.close(broken=True)
with FrameSource(whole) as source:
    borders = [0] + [frame.end for frame in source]
for limit in range(borders[-1]):
    path = f"{sys.argv[1]}/{limit}"
    file = begin(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        write(file, 0)
    except OSError as exc:
        assert exc.errno == 27, exc
    else:
        raise AssertionError(limit)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    file.close(broken=True)
    found = open(path, "rb").read()
    assert len(found) == max(b for b in borders if b <= limit), (limit, len(found), borders)
    file = begin(path)
    state = file.ledger.sources[0]
    start = [sum(map(len, lines[:n])) for n in range(7)].index(state.resume_off)
    write(file, start)
    file.close()
    good = verify(path)
    assert good.ok and not good.torn, (limit, good)
    with FrameSource(path) as source:
        content = b"".join(f.payload for f in source if f.header.type == 1)
    assert content == b"".join(lines), limit
    assert open(path, "rb").read().startswith(found)
print("done", limit)
"""


@pytest.mark.slow
def test_a_batch_that_the_disk_refuses_in_the_middle_keeps_its_whole_frames(tmp_path: Path) -> None:
    """Wherever in a batch the disk is full, whole frames stay, the torn one goes, and the next run writes the rest."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"done \d\d\d\n", done.stdout), done.stderr


def test_a_follower_sees_no_frame_vanish_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that a reader got from a batch that then failed is still there in the next run, and not given again."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="none")
    fill(file, b"first\n")
    with FrameSource(path, follow=True) as follower:
        seen = read_all(follower)

        def half(fd: int, buffers: Sequence[bytes]) -> int:
            os.write(fd, b"".join(buffers)[:-1])
            seen.extend(read_all(follower))
            raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patch:
            patch.setattr(os, "writev", half)
            # The short count gets lost with the error: as if the system had told it, and the call after it had failed.
            patch.setattr(append_module, "_write_all", lambda fd, buffers: short(half, fd, buffers))
            with pytest.raises(OSError, match="full"):
                fill(file, b"second\n", b"third\n")
        file.close(broken=True)
        file = PacketFile(path, fsync="none")
        fill(file, b"3\n")
        file.close()
        seen += read_all(follower)
    assert [f.offset for f in seen] == [f.offset for f in frames_of(path)]
    assert [f.payload for f in seen if f.header.type is FrameType.LINES] == [b"first\n", b"second\n", b"3\n"]


def short(write: Any, fd: int, buffers: Sequence[bytes]) -> Iterator[int]:
    """One system call that takes all but a byte, and one that fails."""
    error = None
    try:
        write(fd, buffers)
    except OSError as exc:
        error = exc
    yield len(b"".join(buffers)) - 1
    assert error is not None
    raise error


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged(path: Path) -> tuple[int, int]:
    """A file with a COMMIT, then three frames of which the middle one is zeros, as unsynced pages come back."""
    file = PacketFile(path, fsync="none")
    fill(file, b"committed\n")
    file.commit()
    fill(file, b"kept\n")
    start = file.end
    fill(file, b"lost\n" * 10)
    end = file.end
    fill(file, b"behind\n")
    file.close(broken=True)
    with path.open("r+b") as raw:
        raw.seek(start)
        raw.write(bytes(end - start))
    return start, end


def test_a_hole_with_frames_behind_it_is_told_and_kept(tmp_path: Path) -> None:
    """Opening says where the hole is and what stands behind it, and leaves the bytes alone."""
    path = tmp_path / "out.opk"
    start, end = damaged(path)
    before = path.read_bytes()
    file = PacketFile(path)
    hole = file.recovery.hole
    assert hole is not None
    assert (hole.start, hole.end) == (start, end)
    assert [(h.source_off, h.payload_len) for h in file.recovery.behind] == [(10 + 5 + 50, 7)]
    file.close(broken=True)
    assert path.read_bytes() == before


def test_a_hole_can_be_cut(tmp_path: Path) -> None:
    """cut_hole() ends the file before the hole; the source goes on there, so what is read again stands once."""
    path = tmp_path / "out.opk"
    start, _ = damaged(path)
    file = PacketFile(path)
    file.cut_hole()
    assert file.recovery.hole is None
    assert file.end == path.stat().st_size == start
    fill(file, b"lost\n" * 10, b"behind\n")
    file.close()
    assert_sound(path)
    lines = [f.payload for f in frames_of(path) if f.header.type is FrameType.LINES]
    assert lines == [b"committed\n", b"kept\n", b"lost\n" * 10, b"behind\n"]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_all(source: FrameSource, *, looks: int = 1) -> list[Frame]:
    frames: list[Frame] = []
    for _ in range(looks):
        while (more := source.read()) is not None:
            frames += more
    return frames


def test_a_follower_gets_each_frame_once_however_the_file_grows(
    tmp_path: Path, whole: tuple[bytes, list[tuple[int, int, int, int, bytes]]]
) -> None:
    """Byte by byte, a frame is given when its last byte is there: none early, none twice, none left out."""
    data, _ = whole
    path = tmp_path / "out.opk"
    path.write_bytes(b"")
    expected = frames_in(data)
    seen: list[Frame] = []
    with path.open("ab", buffering=0) as raw, FrameSource(path, follow=True) as source:
        for at in range(len(data)):
            raw.write(data[at : at + 1])
            seen += read_all(source)
            assert len(seen) == sum(1 for f in expected if f.end <= at + 1)
            assert source.pending == 0
            assert source.offset == (seen[-1].end if seen else 0)
    assert seen == expected


def test_a_follower_outlives_a_torn_tail_that_is_cut(
    tmp_path: Path, whole: tuple[bytes, list[tuple[int, int, int, int, bytes]]]
) -> None:
    """Whatever part of a frame a follower saw before the writer was killed, it reads what the next writer put there."""
    data, content = whole
    path = tmp_path / "out.opk"
    for length in range(0, len(data), 11):
        path.write_bytes(data[:length])
        with FrameSource(path, follow=True) as source:
            seen = read_all(source)
            file = PacketFile(path, fsync="none")
            seen += read_all(source)
            go_on(file, sum(1 for f in seen if f.header.type in CONTENT))
            file.close()
            seen += read_all(source)
        assert seen == frames_of(path)
        assert told(seen) == content


@pytest.mark.slow
def test_a_follower_of_a_writer_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """Following a file through three kill -9, a reader gets every frame that the file holds in the end, once."""
    path = tmp_path / "out.opk"
    path.write_bytes(b"")
    seen: list[Frame] = []
    with FrameSource(path, follow=True) as source:
        for _ in range(3):
            target = len(seen) + 500
            with Writer(path):
                while len(seen) < target:
                    seen += source.read() or []
        file = PacketFile(path, fsync="none")
        file.close()
        seen += read_all(source)
    assert_sound(path)
    assert [f.offset for f in seen] == [f.offset for f in frames_of(path)]
    lines = [line for f in seen if f.header.type is FrameType.LINES for line in f.lines()]
    assert [int(line.split()[0]) for line in lines] == list(range(len(lines)))


def test_a_torn_tail_that_ends_with_a_read_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn frame whose last byte is the last of a full read is not kept: the next writer puts another there."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="none")
    fill(file, b"x" * 500 + b"\n")
    file.close(broken=True)
    torn = path.read_bytes()[:-5]
    path.write_bytes(torn)
    monkeypatch.setattr(frame_source, "READ_BYTES", len(torn))
    with FrameSource(path, follow=True) as source:
        read_all(source)
        file = PacketFile(path, fsync="none")
        fill(file, b"another\n")
        file.close()
        monkeypatch.undo()
        seen = read_all(source)
    assert [f.payload for f in seen if f.header.type is FrameType.LINES] == [b"another\n"]


def test_a_read_that_a_new_writer_gets_into_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a read from before the torn tail was cut, half from after it: that is no damage."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="none")
    fill(file, b"first\n")
    border = file.end
    fill(file, b"T" * 100 + b"\n")
    file.close(broken=True)
    os.truncate(path, border + 100)
    real = os.pread
    with FrameSource(path, follow=True) as source:
        seen = read_all(source)

        def between(fd: int, length: int, offset: int) -> bytes:
            data = real(fd, length, offset)
            monkeypatch.undo()
            new = PacketFile(path, fsync="none")
            fill(new, b"n" * 300 + b"\n")
            new.close()
            return data

        monkeypatch.setattr(os, "pread", between)
        seen += read_all(source)
        seen += read_all(source)
    assert seen == frames_of(path)


def test_real_damage_reaches_a_follower(tmp_path: Path) -> None:
    """A flipped byte that stays is PacketError with its place, at the second look at the latest, and from then on."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="none")
    fill(file, b"first\n")
    border = file.end
    fill(file, b"second\n", b"third\n")
    file.close()
    with path.open("r+b") as raw:
        raw.seek(border + 64)
        raw.write(b"S")
    with FrameSource(path, follow=True) as source:
        seen = source.read() or []
        assert [f.payload for f in seen if f.header.type is FrameType.LINES] == [b"first\n"]
        with pytest.raises(PacketError, match="payload checksum") as info:
            read_all(source, looks=3)
        assert info.value.offset == border
        with pytest.raises(PacketError, match="payload checksum"):
            source.read()


def test_a_follower_with_on_damage_hears_of_damage_behind_a_torn_tail(tmp_path: Path) -> None:
    """The callback holds for the whole life of a follower, also after it has read a tail anew."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="none")
    fill(file, b"first\n")
    border = file.end
    fill(file, b"second\n", b"third\n")
    file.close()
    data = bytearray(path.read_bytes())
    data[border + 64] ^= 1
    path.write_bytes(data[: border + 10])
    heard: list[Damage] = []
    with FrameSource(path, follow=True, on_damage=heard.append) as source:
        seen = read_all(source)
        path.write_bytes(data)
        seen += read_all(source)
    assert [f.payload for f in seen if f.header.type is FrameType.LINES] == [b"first\n", b"third\n"]
    assert [(damage.start, damage.end) for damage in heard] == [(border, border + 64 + 7)]


def test_readers_do_not_change_the_file_and_headers_leave_content_out(
    tmp_path: Path, whole: tuple[bytes, list[tuple[int, int, int, int, bytes]]]
) -> None:
    """A walk over headers gives every frame, payloads only of those that describe the file, and ends at a torn tail."""
    data, _ = whole
    path = tmp_path / "out.opk"
    path.write_bytes(data + data[:70])
    path.chmod(0o444)
    with FrameSource(path) as source:
        walked = list(source.headers())
        assert source.size() == len(data) + 70
    whole_frames = frames_in(data)
    assert [f.header for f in walked[: len(whole_frames)]] == [f.header for f in whole_frames]
    for short_frame, frame in zip(walked, whole_frames, strict=False):
        content = frame.header.type in (FrameType.LINES, FrameType.PACKETS)
        assert short_frame.payload == (b"" if content else frame.payload)
    with FrameSource(path) as source:
        assert read_all(source) == whole_frames
        with pytest.raises(PacketError, match="torn tail"):
            source.end()
    assert path.read_bytes() == data + data[:70]


def test_the_largest_packet_and_the_smallest(tmp_path: Path) -> None:
    """A payload of 16 MiB and one of no bytes are written and read; one byte more is refused and nothing is written."""
    path = tmp_path / "out.opk"
    file = PacketFile(path, fsync="none")
    number = file.open_source(about(b"/log"))
    file.append([Piece(number, bytes(MAX_PAYLOAD), 0, 1, type=FrameType.PACKETS)])
    file.append([Piece(number, b"", MAX_PAYLOAD, 1, type=FrameType.PACKETS)])
    end = path.stat().st_size
    with pytest.raises(PacketError, match="limit is 16777216"):
        file.append([Piece(number, bytes(MAX_PAYLOAD + 1), MAX_PAYLOAD, 1, type=FrameType.PACKETS)])
    assert path.stat().st_size == end
    file.close()
    sizes = [len(f.payload) for f in frames_of(path) if f.header.type is FrameType.PACKETS]
    assert sizes == [MAX_PAYLOAD, 0]
    assert_sound(path)


def test_headers_are_read_while_a_writer_cuts_a_torn_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who walks over them had seen the tail; that a writer which begins takes it away is no damage."""
    path = tmp_path / "m.opk"
    file = PacketFile(path)
    source = file.open_source(SourceInfo(1, 1, 0, 0, Compression.NONE, b"/a.log"))
    file.append([Piece(source, b"one\n", 0, 1), Piece(source, b"two\n", 4, 1)])
    file.close()
    with FrameSource(path) as frames:
        whole = list(frames)
    torn = path.read_bytes()[whole[-1].offset : whole[-1].end - 5]
    read_at = FrameSource.read_at

    def cut_then_longer(self: FrameSource, offset: int, length: int) -> bytes:
        """The tail is cut before it is read, and the writer has gone on before anybody asks for the file's length."""
        if offset < whole[-1].end:
            return read_at(self, offset, length)
        os.truncate(path, whole[-1].end)
        data = read_at(self, offset, length)
        with path.open("ab") as raw:
            raw.write(torn * 2)
        return data

    def walk() -> Iterator[int]:
        with path.open("ab") as raw:
            raw.write(torn)
        with FrameSource(path) as frames:
            yield from (frame.offset for frame in frames.headers())

    found = []
    for offset in walk():
        found.append(offset)
        if len(found) == len(whole):
            os.truncate(path, whole[-1].end)
    assert found == [frame.offset for frame in whole]
    monkeypatch.setattr(FrameSource, "read_at", cut_then_longer)
    assert list(walk()) == found
