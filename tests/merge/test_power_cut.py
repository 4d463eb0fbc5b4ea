"""The merge on a disk whose power is cut: what was called durable is there, and the next run completes the rest.

The files are real, and so are the merges; only the calls by which a packet file is written and synced go through a
`Disk`, which knows what of them a disk has by now. At a cut the packet file becomes what such a disk may hold: of each
page that was written since the last fsync, and of the file's size, some version since then, in any combination; the
name of a new file only if its folder was synced, otherwise perhaps. A power cut can come at any call, in its midst; so
can a kill. A disk can also be full, and refuse a write or an fsync; after that fsync it has some of the pages and the
system calls all of them clean, as Linux does.

    OFFLOAD_POWER_EXAMPLES  how many histories to try (100)
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from offload.errors import BrokenResourceError
from offload.files import append as append_module
from offload.files import packet_file as packet_file_module
from offload.files import tail as tail_module
from offload.files.frame_source import FrameSource
from offload.files.packet_file import Fsync
from offload.files.packet_stream import PacketWriter
from offload.files.reading import Arena
from offload.merge import batches as batches_module
from offload.merge.audit import verify
from offload.merge.engine import Merge
from offload.merge.sources import Sources
from offload.packets.codec import CommitInfo
from offload.packets.format import FrameType

EXAMPLES = int(os.environ.get("OFFLOAD_POWER_EXAMPLES", "100"))
PAGE = 512
ARENA = 4096
COMMIT_BYTES, SYNC_BYTES = 5000, 40_000  # as small as the logs here are
POLICIES = st.sampled_from(["interval", "always"])
SEEDS = st.integers(0, 1 << 32)
EARLY = st.integers(0, 3)
# Which calls a fault may come at; those are counted.
CALLS = {
    "power": ("write", "sync", "cut"),
    "kill": ("write", "sync", "cut"),
    "write": ("write",),
    "full": ("write",),
    "short": ("write",),
    "fsync": ("sync",),
    "none": (),
}


class Disk:
    """What a disk has of one packet file and its name; stands for `os` where such files are written.

    Attributes:
        fault: what happens at the call with number `fault_at` of its CALLS.
        calls: how many of those were made in this run.
        dead: the process has ended, or the machine: no call does anything any more.
    """

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.path = path
        self.chance = chance
        self.named = False
        self.size = 0
        self.pages: dict[int, bytes] = {}
        self.versions: dict[int, list[bytes]] = {}  # of the pages that are dirty, oldest first
        self.sizes: list[int] = []
        self.power_was_cut = False
        self._folders: set[int] = set()
        self.begin("none", 0)

    def begin(self, fault: str, at: int) -> None:
        self.fault, self.fault_at = fault, at
        self.calls = 0
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    # --- the calls --------------------------------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        self._alive()
        made = bool(flags & os.O_CREAT) and not self.path.exists()
        fd = os.open(path, flags, mode)
        if Path(path) == self.path.parent:
            self._folders.add(fd)
        elif made:
            self.named, self.size, self.pages, self.versions, self.sizes = False, 0, {}, {}, []
        return fd

    def close(self, fd: int) -> None:
        self._folders.discard(fd)
        os.close(fd)

    def writev(self, fd: int, buffers: Sequence[bytes]) -> int:
        return self.write(fd, b"".join(buffers))

    def write(self, fd: int, data: Any) -> int:
        return self._write(fd, bytes(data), os.fstat(fd).st_size, lambda part: os.write(fd, part))

    def pwrite(self, fd: int, data: Any, at: int) -> int:
        return self._write(fd, bytes(data), at, lambda part: os.pwrite(fd, part, at))

    def ftruncate(self, fd: int, size: int) -> None:
        self._call("cut")
        os.ftruncate(fd, size)
        self._note(fd, size, size)

    def fdatasync(self, fd: int) -> None:
        fault = self._call("sync")
        if fault == "fsync":
            for page, contents in self.versions.items():
                if self.chance.random() < 0.5:
                    self.pages[page] = contents[-1]
            self.versions.clear()  # clean, the system says
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.pages |= {page: contents[-1] for page, contents in self.versions.items()}
        self.size = os.fstat(fd).st_size
        self.versions, self.sizes = {}, []

    def fsync(self, fd: int) -> None:
        if fd not in self._folders:
            self.fdatasync(fd)
        elif self._call("sync") == "fsync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        else:
            self.named = True

    def _write(self, fd: int, data: bytes, at: int, write: Any) -> int:
        fault = self._call("write")
        if fault in ("write", "full"):
            number = errno.EIO if fault == "write" else errno.ENOSPC
            raise OSError(number, os.strerror(number))
        if fault is not None:  # in its midst
            data = data[: self.chance.randrange(len(data))]
        done: int = write(data)
        self._note(fd, at, at + done)
        if fault == "short" and self.chance.random() < 0.5:
            self.fault, self.fault_at = "full", self.calls  # as a disk that has room for half of it
        if fault in ("power", "kill"):
            self._alive()
        return done

    def _call(self, kind: str) -> str | None:
        """Count a call; say what is wrong with it."""
        self._alive()
        if kind not in CALLS[self.fault]:
            return None
        self.calls += 1
        if self.calls - 1 != self.fault_at:
            return None
        self.dead = self.fault in ("power", "kill")
        if self.dead and self.chance.random() < 0.5:
            self._alive()  # before it; otherwise in its midst, or behind it
        return self.fault

    def _alive(self) -> None:
        if self.dead:
            raise OSError(errno.EIO, "the process has ended")

    # --- what of it is on the disk ------------------------------------------------------------------------------------

    def _note(self, fd: int, start: int, end: int) -> None:
        """Take in that these bytes are new in the file."""
        size = os.fstat(fd).st_size
        self.sizes.append(size)
        for page in range(start // PAGE, -(-end // PAGE)):
            content = read_page(fd, page)
            self.versions.setdefault(page, []).append(content)

    def cut(self) -> None:
        """Make the packet file what the disk has of it, perhaps."""
        if not self.named and self.chance.random() < 0.5:
            self.path.unlink(missing_ok=True)
            self.size, self.pages, self.versions, self.sizes = 0, {}, {}, []
            return
        size = self.chance.choice([self.size, *self.sizes, *self.sizes[-1:]])
        survival = self.chance.choice([0.0, 0.5, 0.9, 0.97])
        for page, contents in self.versions.items():
            if self.chance.random() < survival:
                self.pages[page] = self.chance.choice([contents[-1], self.chance.choice(contents)])
        self._restart(size)

    def lose(self, page: int) -> None:
        """Make it what a disk has that got everything but this page."""
        self.pages |= {each: contents[-1] for each, contents in self.versions.items() if each != page}
        self._restart(self.sizes[-1])

    def _restart(self, size: int) -> None:
        self._show(size)
        self.size, self.versions, self.sizes, self.named = size, {}, [], True

    def evict(self) -> None:
        """Forget the pages that are called clean: they are read from the disk again."""
        if self.path.exists():
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                for page in range(-(-size // PAGE)):
                    if page in self.versions:
                        self.versions[page][-1] = read_page(file.fileno(), page)
            self._show(size, {page: contents[-1] for page, contents in self.versions.items()})

    def _show(self, size: int, dirty: dict[int, bytes] | None = None) -> None:
        pages = self.pages | (dirty or {})
        content = b"".join(pages.get(page, b"").ljust(PAGE, b"\0") for page in range(-(-size // PAGE)))
        self.path.write_bytes(content[:size])


def read_page(fd: int, page: int) -> bytes:
    return os.pread(fd, PAGE, page * PAGE)


class PowerCuts(RuleBasedStateMachine):
    """Logs that grow and rotate, and merges of them, each with a fault at some call."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="offload-power-"))
        self.logs = self.folder / "logs"
        self.logs.mkdir()
        self.out = self.folder / "out" / "merged.opk"
        self.out.parent.mkdir()
        self.disk = Disk(self.out, random.Random(0))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(append_module, "os", self.disk)
        self.patch.setattr(packet_file_module, "COMMIT_BYTES", COMMIT_BYTES)
        self.patch.setattr(packet_file_module, "SYNC_BYTES", SYNC_BYTES)
        self.patch.setattr(tail_module, "_ROOM", ARENA // 8)
        self.patch.setattr(batches_module, "Arena", functools.partial(Arena, ARENA))
        self.number = 0
        self.written: dict[str, bytes] = {}  # all that each log ever had
        self.durable = b""  # of the packet file: what was called so

    def teardown(self) -> None:
        try:
            self.completed()
        finally:
            self.patch.undo()
            shutil.rmtree(self.folder)

    @rule(name=st.sampled_from("abc"), lines=st.integers(1, 120), cut=st.booleans())
    def grow(self, name: str, lines: int, cut: bool) -> None:
        """A log grows, perhaps by half a line at its end."""
        text = b""
        for _ in range(lines):
            self.number += 1
            length = 3 + self.number % 97 if self.number % 7 else 3 * PAGE  # longer than a page, now and then
            text += b"%s %06d %s\n" % (name.encode(), self.number, b"x" * length)
        text = text[: len(text) - 3 * cut]
        with (self.logs / f"{name}.log").open("ab") as log:
            log.write(text)
        self.written[name] = self.written.get(name, b"") + text

    @rule(name=st.sampled_from("abc"))
    def rotate(self, name: str) -> None:
        """A log is renamed, and begins anew; it ends with a whole line."""
        log = self.logs / f"{name}.log"
        if log.exists():
            if not self.written[name].endswith(b"\n"):
                with log.open("ab") as file:
                    file.write(b"\n")
                self.written[name] += b"\n"
            self.number += 1
            log.rename(self.logs / f"{name}.log.{self.number}")
            self.grow(name, 1, False)

    @precondition(lambda self: self.written)
    @rule(fsync=POLICIES, seed=SEEDS, cut=st.booleans())
    def merge(self, fsync: Fsync, seed: int, cut: bool) -> None:
        """A merge runs; perhaps the power is cut after it."""
        assert self.faulty_merge("none", 0, fsync, seed, cut=cut)

    @precondition(lambda self: self.written)
    @rule(fault=st.sampled_from(["power", "kill"]), at=EARLY | st.integers(0, 25), fsync=POLICIES, seed=SEEDS)
    def ended_merge(self, fault: str, at: int, fsync: Fsync, seed: int) -> None:
        """A merge is ended at some call."""
        self.faulty_merge(fault, at, fsync, seed)

    @precondition(lambda self: self.written)
    @rule(
        fault=st.sampled_from(["fsync", "full", "short", "write"]),
        at=st.integers(0, 12),
        fsync=POLICIES,
        seed=SEEDS,
        patient=st.booleans(),
        cut=st.booleans(),
    )
    def refused_merge(self, fault: str, at: int, fsync: Fsync, seed: int, patient: bool, cut: bool) -> None:
        """A merge is refused some call; perhaps the power is cut after it."""
        self.faulty_merge(fault, at, fsync, seed, patient=patient, cut=cut)

    def faulty_merge(
        self, fault: str, at: int, fsync: Fsync, seed: int, *, patient: bool = False, cut: bool = False
    ) -> bool:
        self.disk.chance = random.Random(seed)
        self.disk.begin(fault, at)
        whole = self.go(fsync, patient=patient)
        self.disk.begin("none", 0)
        self.see(whole=whole)
        if cut or (fault == "power" and not whole):
            self.cut()
        return whole

    @precondition(lambda self: self.out.exists())
    @rule(seed=SEEDS)
    def memory_is_short(self, seed: int) -> None:
        """Pages that the system calls clean are read from the disk again."""
        self.disk.chance = random.Random(seed)
        self.disk.evict()

    def go(self, fsync: Fsync = "interval", *, patient: bool = False) -> bool:
        """Merge what there is; False: the disk refused. `patient`: a write without room is tried again."""

        async def merge() -> None:
            merge = Merge(Sources([str(self.logs / "*.log*")]), self.out, fsync=fsync)
            assert isinstance(merge._writer, PacketWriter)
            merge._writer._interval = 3600.0  # so that its calls depend on no time
            if patient:  # as following does, which pauses
                merge._writer._full = lambda error: True
            async with merge:
                progress = await merge.run()
            assert not progress.problems

        try:
            asyncio.run(merge())
        except (BrokenResourceError, OSError):
            assert self.disk.fault != "none", "nothing was wrong"
            return False
        return True

    def see(self, *, whole: bool) -> None:
        """Take in what the packet file calls durable now; all of it, if a merge ended well."""
        if not self.out.exists():
            assert not self.durable
            return
        data = self.out.read_bytes()
        assert data.startswith(self.durable), "what was durable has changed"
        upto = len(data) if whole else len(self.durable)
        with FrameSource(self.out, on_damage=lambda damage: None) as source:
            for frame in source:
                if frame.header.type is FrameType.COMMIT:
                    upto = max(upto, CommitInfo.unpack(frame).durable_upto)
        self.durable = data[:upto]

    def cut(self) -> None:
        self.disk.cut()
        data = self.out.read_bytes() if self.out.exists() else b""
        assert data.startswith(self.durable), f"of {len(self.durable)} durable bytes some are gone"

    def completed(self) -> None:
        """A run with which nothing goes wrong leaves every line of every log in the file, once and in order."""
        if not self.written:
            return
        self.disk.begin("none", 0)
        assert self.go()
        self.see(whole=True)
        self.cut()
        found = verify(self.out)
        assert (found.faults, found.gaps, found.torn) == ([], [], 0)
        held: dict[int, bytes] = {}
        with FrameSource(self.out) as source:
            for frame in source:
                if frame.header.type is FrameType.LINES:
                    held[frame.header.source_id] = held.get(frame.header.source_id, b"") + frame.payload
        found_lines: Counter[bytes] = Counter()
        for content in held.values():
            lines = content.splitlines(keepends=True)
            found_lines.update(lines)
            assert lines == sorted(lines, key=number_of), "out of order"
        wanted = Counter(line for text in self.written.values() for line in text.splitlines(keepends=True))
        assert not wanted - found_lines, "lost"
        assert not found_lines - wanted, "doubled"


def number_of(line: bytes) -> int:
    return int(line.split()[1])


@pytest.mark.slow
def test_all_but_one_page_is_there_after_a_power_cut() -> None:
    """Each of those that were written since the last fsync in turn: what stands behind it is not believed either."""
    lost, dirty = 0, [0]
    while lost < len(dirty):
        machine = PowerCuts()
        try:
            machine.grow("a", 120, False)
            machine.disk.begin("kill", 8)
            assert not machine.go()
            machine.disk.begin("none", 0)
            machine.see(whole=False)
            dirty = sorted(machine.disk.versions)
            machine.disk.lose(dirty[lost])
        finally:
            machine.teardown()
        lost += 1
    assert lost > 10


@pytest.mark.slow
def test_a_power_cut_takes_nothing_that_was_durable_and_the_next_run_the_rest() -> None:
    """Whatever was cut, killed, full or refused, and however often: each line is there once and in order."""
    run_state_machine_as_test(
        PowerCuts,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
            print_blob=True,
        ),
    )
