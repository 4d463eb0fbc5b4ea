"""A packet file that is damaged where a merge goes on: what it holds is kept, and what it lacks is read again."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offload.errors import BusyResourceError, PacketError
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.files.packet_stream import PacketWriter
from offload.merge.audit import verify
from offload.merge.engine import Merge, Progress
from offload.merge.mend import can_be_read_again, write_anew
from offload.merge.split import split
from offload.packets.codec import Frame, SourceInfo
from offload.packets.format import HOLE_STRUCT, Compression, Flag, FrameType

AMPLE = 60.0
WHY = PacketError("damaged", 0)


def merge(out: Path, logs: Path) -> Progress:
    async def run() -> Progress:
        engine = Merge([str(logs)], out)
        assert isinstance(engine._writer, PacketWriter)
        engine._writer._interval = 3600.0  # the only COMMIT is that of the end, however long reading takes
        async with engine, asyncio.timeout(AMPLE):
            return await engine.run()

    return asyncio.run(run())


def taken_out(out: Path, folder: Path) -> dict[str, bytes]:
    split(out, folder)
    return {os.fspath(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def frames_of(out: Path) -> list[Frame]:
    with FrameSource(out) as source:
        return list(source)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def numbered(name: str, size: int) -> bytes:
    data = b"".join(b"%s line %07d\n" % (name.encode(), i) for i in range(size // 15))
    return data[: data.rfind(b"\n") + 1]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged.opk"


def merged(logs: Path, out: Path) -> list[Frame]:
    """Two sources of some frames each, whose COMMIT is missing; the frames with lines."""
    (logs / "a").write_bytes(numbered("a", 7 << 19))
    (logs / "b").write_bytes(numbered("b", 3 << 19))
    merge(out, logs)
    frames = frames_of(out)
    while frames[-1].header.type is FrameType.COMMIT:
        os.truncate(out, frames.pop().offset)
    lines = [frame for frame in frames if frame.header.type is FrameType.LINES]
    assert [frame.header.source_id for frame in lines] == [0, 1, 0, 1, 0, 0]
    return lines


@pytest.mark.parametrize("rotated", [False, True])
def test_what_damage_took_is_read_from_the_source_that_has_it(
    logs: Path, out: Path, tmp_path: Path, rotated: bool
) -> None:
    """Between frames that are kept, the lost ones come from their source, in their place, with their numbers."""
    lines = merged(logs, out)
    damaged = lines[2]
    flip(out, damaged.end - 1)
    data = out.read_bytes()
    os.chmod(out, 0o640)
    (logs / "b").unlink()
    wanted = (logs / "a").read_bytes()
    if rotated:
        subprocess.run(["gzip", "-k", logs / "a"], check=True)
        (logs / "a").unlink()
    progress = merge(out, logs)
    assert verify(out).complete
    found = taken_out(out, tmp_path / "found")
    assert found == {"a": wanted, "b": numbered("b", 3 << 19)}
    assert progress.repair is not None
    assert (progress.repair.filled, progress.repair.gaps) == (damaged.header.count, [])
    assert progress.damaged is not None
    assert progress.damaged.name == "merged.damaged-1.opk"
    assert progress.damaged.read_bytes() == data
    assert out.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("change", ["gone", "other lines", "a line more", "shorter"])
def test_what_its_source_has_no_more_is_stated(logs: Path, out: Path, change: str) -> None:
    """What the source had there is put in only if it still has that; else a gap has its place and its lines."""
    lines = merged(logs, out)
    flip(out, lines[2].end - 1)
    path = logs / "a"
    (logs / "b").unlink()
    if change == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        cut, end = lines[2].header.source_off, lines[4].header.source_off
        if change == "other lines":
            path.write_bytes(data.replace(b"a line", b"x line"))
        elif change == "a line more":
            path.write_bytes(data[: cut + 3] + b"\n" + data[cut + 4 :])
        else:
            path.write_bytes(data[: end - 1])
    progress = merge(out, logs)
    assert progress.repair is not None
    assert progress.repair.filled == 0
    (gap,) = progress.repair.gaps
    assert (gap.source, gap.start, gap.end, gap.lines) == (
        "a",
        lines[2].header.source_off,
        lines[4].header.source_off,
        lines[2].header.count,
    )
    assert verify(out).ok


def test_a_state_that_is_damaged_is_worked_out_anew(logs: Path, out: Path, tmp_path: Path) -> None:
    """The last COMMIT and the SOURCE frame of a generation that ended are lost: all lines stay, none comes twice."""
    (logs / "a").write_bytes(b"a1\n")
    (logs / "b").write_bytes(b"b1\n")
    merge(out, logs)
    (logs / "a").rename(logs / "a.1")
    (logs / "a").write_bytes(b"a2\n")
    merge(out, logs)
    frames = frames_of(out)
    for frame in frames:
        if frame.header.type is FrameType.COMMIT:
            flip(out, frame.end - 1)
    (logs / "b").unlink()
    (logs / "a").write_bytes(b"a2\na3\n")
    merge(out, logs)
    assert verify(out).ok
    lines = [frame for frame in frames_of(out) if frame.header.type is FrameType.LINES]
    assert b"".join(frame.payload for frame in lines) == b"a1\nb1\na2\na3\n"
    assert out.with_name("merged.damaged-1.opk").exists()


def test_a_source_whose_path_is_lost_is_left_to_the_user(logs: Path, out: Path) -> None:
    """A merge that went on would read it again from its beginning: the file stays as it is, with none beside it."""
    lines = merged(logs, out)
    first = next(frame for frame in frames_of(out) if frame.header.type is FrameType.SOURCE)
    flip(out, first.end - 1)
    flip(out, lines[2].end - 1)
    (logs / "b").unlink()
    data = out.read_bytes()
    with pytest.raises(PacketError, match="path of a source cannot be read"):
        merge(out, logs)
    assert out.read_bytes() == data
    assert sorted(path.name for path in out.parent.iterdir()) == ["logs", "merged.opk"]


def test_a_merge_that_was_ended_over_it_begins_it_again(logs: Path, out: Path, tmp_path: Path) -> None:
    """What was left of it is used or is in nobody's way; a name that another damaged file has is not taken."""
    lines = merged(logs, out)
    flip(out, lines[2].end - 1)
    (logs / "b").unlink()
    before = out.with_name("merged.damaged-1.opk")
    before.write_bytes(b"of last year")
    out.with_name("merged.damaged-2.opk").hardlink_to(out)
    progress = merge(out, logs)
    assert progress.damaged == out.with_name("merged.damaged-2.opk")
    assert before.read_bytes() == b"of last year"
    assert taken_out(out, tmp_path / "found") == {"a": (logs / "a").read_bytes(), "b": numbered("b", 3 << 19)}
    assert len(list(out.parent.glob("*merged*"))) == 3


def test_a_hole_behind_the_damage_is_as_long_as_it_was(tmp_path: Path) -> None:
    """Whether a source still has it is told by the NULs that it stands for, not by its frame."""
    log, out = tmp_path / "a", tmp_path / "merged.opk"
    log.write_bytes(b"one\ntwo\n")
    status = log.stat()
    file = PacketFile(out)
    file.open_source(SourceInfo(status.st_dev, status.st_ino, 0, 0, Compression.NONE, os.fsencode(log)))
    file.append([Piece(0, b"one\n", 0, 1)])
    file.tick()
    file.append([Piece(0, b"two\n", 4, 1)])
    damaged = file.end - 1
    file.append([Piece(0, HOLE_STRUCT.pack(5000), 8, 0, Flag.HOLE)])
    file.close(broken=True)
    flip(out, damaged)
    file = PacketFile(out)
    try:
        assert [(h.source_off, h.payload_len) for h in file.recovery.behind] == [(8, 5000)]
        assert not can_be_read_again(file.recovery)
        os.truncate(log, 5008)
        assert can_be_read_again(file.recovery)
    finally:
        file.close(broken=True)


def test_a_source_that_lost_its_end_in_the_same_power_cut(logs: Path, out: Path, tmp_path: Path) -> None:
    """It is as long as before by now, but what stands behind the damage is nowhere else: both sides are kept."""
    lines = merged(logs, out)
    before = (logs / "a").read_bytes()
    flip(out, lines[2].end - 1)
    os.truncate(logs / "a", lines[4].header.source_off + 100)
    with (logs / "a").open("ab") as file:
        file.write(numbered("new", 3 << 20))
    after = (logs / "a").read_bytes()
    assert len(after) > len(before)
    progress = merge(out, logs)
    assert progress.repair is not None
    assert (progress.repair.filled, progress.regressions, progress.gaps) == (lines[2].header.count, 1, 0)
    assert verify(out).complete
    assert taken_out(out, tmp_path / "found") == {"a": after, "a.gen0": before, "b": numbered("b", 3 << 19)}


def test_what_somebody_writes_is_not_written_anew(tmp_path: Path) -> None:
    """Nor is what is no packet file."""
    out = tmp_path / "merged.opk"
    file = PacketFile(out)
    file.open_source(SourceInfo(1, 1, 0, 0, Compression.NONE, b"/logs/a"))
    file.append([])
    try:
        with pytest.raises(BusyResourceError):
            write_anew(out, WHY)
    finally:
        file.close()
    (tmp_path / "novel").write_bytes(b"my novel\n" * 100)
    with pytest.raises(PacketError, match="damaged"):
        write_anew(tmp_path / "novel", WHY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged.opk", "novel"]


def test_the_command_tells_what_it_did(tmp_path: Path) -> None:
    """On stderr: what was damaged, how many lines were read again, and where the damaged file is."""
    logs, out = tmp_path / "logs", tmp_path / "merged.opk"
    logs.mkdir()
    lines = merged(logs, out)
    flip(out, lines[2].end - 1)
    (logs / "b").unlink()
    command = [sys.executable, "-m", "offload", "merge", "logs", "-o", "merged.opk", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=AMPLE)
    assert (done.returncode, done.stdout) == (0, "")
    first, second = done.stderr.splitlines()
    assert first.startswith(f"offload: merged.opk: byte {lines[2].offset}: ")
    assert second == (
        f"offload: merged.opk: written anew with all that is valid, {lines[2].header.count:,} lines read again, 0 gaps "
        "stated; the damaged one is beside it: merged.damaged-1.opk"
    )
