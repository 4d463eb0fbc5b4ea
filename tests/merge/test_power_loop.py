"""The power of a real ext4 cut while a merge writes to it, again and again: what was called durable is there.

The file system stands on a loop device, whose image is what has reached the "disk". A cut: the merge is stopped where
it is, the image is copied, the merge killed, the copy put in the image's place and mounted, which replays its journal
as after a power cut. So all that the system had in memory only is gone. The logs are elsewhere and keep everything.

    Workload ─► logs ─► offload merge -f ─► merged.opk on ext4 on /dev/loopN on disk.img
                          │ SIGSTOP            │ what it calls durable             │ copied, while no write is under way
                          ▼ SIGKILL            └──────────── must be in ◄──────────┘

A copy takes time, and one that has a later write without an earlier one is no state of any disk. So it counts only if
the device completed no write meanwhile and has none under way; otherwise it is made again (`_settled`).

What nobody has synced, the system writes when it likes: before some cuts a few pages of the packet file, here and
there, are written out, and somebody else's fsync commits the journal, with sizes and places. Then the file has holes.
A folder's entry cannot be lost here without its file: ext4 commits both as one. That is for test_power_cut.py.

    OFFLOAD_LOOP_CUTS  how many cuts (12); each takes about half a second
    OFFLOAD_LOOP_SEED  of all that is random
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import offload
from offload.errors import PacketError
from offload.files.frame_source import FrameSource
from offload.merge.audit import verify
from offload.merge.split import split, stat
from offload.merge.torture import Round, read_up_to, size_of
from offload.packets.codec import CommitInfo
from offload.packets.format import FrameType

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="loop devices and ext4 are Linux's"),
]

CUTS = int(os.environ.get("OFFLOAD_LOOP_CUTS", "12"))
SEED = int(os.environ.get("OFFLOAD_LOOP_SEED", str(random.randrange(1 << 32))))
IMAGE_BYTES = 256 << 20
PAGE = 4096
AMPLE = 60.0

LINES = 60_000  # of 100 bytes; more than the file system has room for, until somebody makes room


def tool(*arguments: str | Path) -> str:
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=AMPLE, check=False)
    if done.returncode:
        raise OSError(f"{arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


class LoopDisk:
    """An ext4 on a loop device, mounted at `root`; its power can be cut."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "mounted"
        self.root.mkdir()
        self._image, self._copy = folder / "disk.img", folder / "copy.img"
        self._device = ""
        with self._image.open("wb") as image:
            image.truncate(IMAGE_BYTES)
        options = "lazy_itable_init=0,lazy_journal_init=0"
        tool(
            "mkfs.ext4",
            "-q",
            "-F",
            "-m",
            "0",
            "-N",
            "1000",
            "-b",
            str(PAGE),
            "-J",
            "size=4",
            "-E",
            options,
            self._image,
        )

    def mount(self) -> None:
        self._device = tool("losetup", "--find", "--show", self._image)
        tool("mount", "-t", "ext4", self._device, self.root)

    def unmount(self) -> None:
        if os.path.ismount(self.root):
            tool("umount", self.root)
        device, self._device = self._device, ""
        if device:
            tool("losetup", "--detach", device)

    def take(self) -> None:
        """Copy what has reached the disk."""
        deadline = time.monotonic() + AMPLE
        while True:
            before = self._settled()
            tool("cp", "--sparse=always", self._image, self._copy)
            if before is not None and self._settled() == before:
                return
            assert time.monotonic() < deadline, "the device never rests"

    def cut(self) -> None:
        """The disk is as it was when it was taken; nobody may have a file open there."""
        self.unmount()
        self._copy.replace(self._image)
        self.mount()

    def _settled(self) -> str | None:
        """How many writes the device has completed; None: one is under way."""
        fields = Path(f"/sys/block/{Path(self._device).name}/stat").read_text().split()
        writes, under_way = fields[4], fields[8]
        return writes if under_way == "0" else None


@pytest.fixture
def disk() -> Iterator[LoopDisk]:
    """Containers have no loop devices, and users may not mount."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="offload-loop-", dir=memory))
    disk = None
    try:
        try:
            disk = LoopDisk(folder)
            disk.mount()
        except OSError as exc:
            pytest.skip(f"no ext4 on a loop device here: {exc}")
        yield disk
    finally:
        if disk is not None:
            disk.unmount()
        shutil.rmtree(folder)


def durable_bytes(packet: Path) -> bytes:
    """The bytes of a packet file's live segment that it calls durable, as the system has them."""
    upto = 0
    with contextlib.suppress(FileNotFoundError, PacketError), FrameSource(packet, alone=True) as source:
        for frame in source:
            if frame.header.type is FrameType.COMMIT:
                upto = max(upto, CommitInfo.unpack(frame).durable_upto)
    return packet.read_bytes()[:upto] if upto else b""


def durable_segments(packet: Path) -> dict[int, bytes]:
    """Of each segment, by its number, what is called durable: of a closed one all."""
    found: dict[int, bytes] = {}
    with contextlib.suppress(FileNotFoundError, PacketError), FrameSource(packet) as source:
        for part in source.series.parts[:-1]:
            found[part.number] = source.read_at(part.base, part.size)
        found[source.series.parts[-1].number] = durable_bytes(packet)
    return found


def assert_holds(packet: Path, durable: dict[int, bytes]) -> None:
    left: dict[int, bytes] = {}
    with contextlib.suppress(FileNotFoundError), FrameSource(packet) as source:
        source.size()
        left = {part.number: source.read_at(part.base, part.size) for part in source.series.parts}
    for number, data in durable.items():
        there = left.get(number, b"")
        what = f"of {len(data)} durable bytes of segment {number}"
        assert there.startswith(data), f"{what} some are gone; {len(there)} bytes are left, segments {sorted(left)}"


def is_whole(packet: Path) -> bool:
    """Whether it ends with a whole frame, with no damage before."""
    if not packet.exists():
        return True
    with contextlib.suppress(PacketError), FrameSource(packet, alone=True) as source:  # cut while it is looked at
        found = source.series.recover()
        return found.torn == 0 and found.hole is None
    return False


class Cuts(Round):
    """A workload and a merge of it on a disk whose power is cut now and then; see Round."""

    def __init__(self, folder: Path, disk: LoopDisk, seed: int, *, cuts: int, options: Sequence[str]) -> None:
        super().__init__(folder, seed, steps=cuts * 1000, pause=0.006, options=options)
        self.packet = disk.root / "merged.opk"
        self._durable = folder / "durable.opk"
        self._disk = disk
        self._cuts = cuts
        self._at = 0.0

    def _torment(self) -> None:
        now = time.monotonic()
        if self._process is None:
            self._start()
            # Some while it starts, some between two COMMITs, some after many.
            self._at = now + self._chance.choice([0.2, 0.5, 1.0]) * self._chance.random() + 0.1
        elif now >= self._at and not self._ended():
            self._cut_power()
            if self.did["power cuts"] == self._cuts:
                self.stop()

    def _cut_power(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)
        self._write_out(self._chance.choice(["nothing", "journal", "pages"]))
        durable = durable_segments(self.packet)
        self._disk.take()
        self._kill()
        self._disk.cut()
        assert_holds(self.packet, durable)
        self.did["power cuts"] += 1
        self.did["with a hole or a torn tail"] += not is_whole(self.packet)

    def _write_out(self, what: str) -> None:
        """Have the system write what it might by itself."""
        if what == "pages" and self.packet.exists():
            fd = os.open(self.packet, os.O_RDONLY)
            for page in range(os.fstat(fd).st_size // PAGE + 1):
                if self._chance.random() < 0.3:
                    os.posix_fadvise(fd, page * PAGE, PAGE, os.POSIX_FADV_DONTNEED)  # begins to write it
            os.close(fd)
        if what != "nothing":
            with (self.packet.parent / "other").open("wb") as other:
                os.fsync(other.fileno())

    def _may_rotate(self, log: Path) -> bool:
        """Whether what is durable has something of the file that has this name: else a cut makes it nobody's."""
        return self._read(log) is not None

    def _is_read(self, path: Path) -> bool:
        return (self._read(path) or 0) >= size_of(path)

    def _read(self, path: Path) -> int | None:
        """How far what is durable has this file."""
        self._durable.write_bytes(durable_bytes(self.packet))
        found = read_up_to(self._durable, path)
        return None if found is None else found[0]


@pytest.mark.parametrize("options", ["--fsync interval", "--fsync always", "--segment-size 50000"])
def test_power_is_cut_and_nothing_is_lost_or_doubled(tmp_path: Path, disk: LoopDisk, options: str) -> None:
    """Each line is in the packet file once and in order, and what was durable at a cut is there after it."""
    this = Cuts(tmp_path, disk, SEED, cuts=CUTS, options=options.split())
    try:
        for _ in this.run():
            pass
        found = this.check()
        # Of a log that was rewritten while no merge ran, nobody can tell what it had; that may be stated.
        assert replace(found, gaps=[]).ok, f"OFFLOAD_LOOP_SEED={SEED}: {found}, {this.did}"
        assert this.did["power cuts"] == CUTS
    except BaseException as exc:
        exc.add_note(f"OFFLOAD_LOOP_SEED={SEED}, {dict(this.did)}")
        raise


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does: it is seen in a file, and no event of ours tells it."""
    deadline = time.monotonic() + AMPLE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def following(logs: Path, packet: Path, errors: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "offload", "merge", "-f", "-q", str(logs), "-o", str(packet)]
    path = {"PYTHONPATH": str(Path(offload.__file__).parents[1])}
    with errors.open("wb") as said, subprocess.Popen(command, stderr=said, env=os.environ | path) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("cut", [False, True], ids=["it goes on", "the power is cut"])
def test_a_disk_that_is_full(tmp_path: Path, disk: LoopDisk, cut: bool) -> None:
    """It waits behind whole frames and goes on by itself once there is room; a power cut meanwhile takes nothing."""
    logs, errors = tmp_path / "logs", tmp_path / "errors"
    packet, filler = disk.root / "merged.opk", disk.root / "filler"
    logs.mkdir()
    content = b"".join(b"%099d\n" % number for number in range(LINES))
    (logs / "a.log").write_bytes(content)
    room = os.statvfs(disk.root)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - len(content) // 3)
    with following(logs, packet, errors) as merge:
        until(lambda: b"waits for room" in errors.read_bytes())
        until(lambda: is_whole(packet))  # but for moments: a try writes what has room, and cuts it back
        assert packet.stat().st_size < len(content) // 2
        durable = durable_segments(packet)
        if cut:
            disk.take()
            merge.kill()
            merge.wait(AMPLE)
            disk.cut()
            assert_holds(packet, durable)
        filler.unlink()
        if not cut:
            until(lambda: stat(packet).lines == LINES)
            merge.send_signal(signal.SIGTERM)
            assert merge.wait(AMPLE) == 0
            assert b"goes on" in errors.read_bytes()
    if cut:
        with following(logs, packet, errors) as merge:
            until(lambda: packet.stat().st_size > len(content) and stat(packet).lines == LINES)
            merge.send_signal(signal.SIGTERM)
            assert merge.wait(AMPLE) == 0
    assert verify(packet).complete
    split(packet, tmp_path / "split")
    assert (tmp_path / "split" / "a.log").read_bytes() == content
