"""`offload merge`, killed before each of its system calls on the packet file, a run for each: nothing lost or doubled.

strace kills it there; calls on other files are left alone (-P). Between two calls the packet file does not change, so
with the states that a torn write leaves (test_kill.py) this is every state that a kill can leave behind.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

import offload
from offload.files.packet_file import FrameSource
from offload.merge.audit import verify
from offload.merge.engine import Merge
from offload.merge.sources import Sources
from offload.merge.split import split
from offload.packets import recover

pytestmark = [pytest.mark.slow, pytest.mark.peer("strace")]

# What may change a file, and what stands between two changes: also a kill before the lock, or while the end is sought.
CALLS = "openat,flock,pread64,ftruncate,writev,pwrite64,write,fdatasync,fsync"

MIB = 1 << 20
FIRST = {"api.log": b"first line\r\nsecond\n", "mail.log": b"no end"}
GROWN = {
    "api.log": b"".join(b"%d of many lines, so that they fill more than one batch\n" % n for n in range(30_000)),
    "mail.log": b" yet\nsecond",
    "long.log": b"x" * (MIB + MIB // 2) + b"\nshort\n",
    "empty.log": b"",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As ours, with the package under test, and compiled modules kept in a folder of their own."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    compiled = str(tmp_path_factory.mktemp("compiled"))
    return kept | {"PYTHONPATH": str(Path(offload.__file__).parents[1]), "PYTHONPYCACHEPREFIX": compiled}


@pytest.fixture(scope="module", autouse=True)
def traceable() -> None:
    """Containers and hardened systems may not allow ptrace."""
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = f"strace may not trace here: {done.stderr.strip()}"
        if os.environ.get("OFFLOAD_REQUIRE_PEERS"):
            pytest.fail(f"{reason}, and OFFLOAD_REQUIRE_PEERS is set", pytrace=False)
        pytest.skip(reason)


class Scene:
    """Logs, a packet file as it was before the run, and the run."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.logs, self.before = folder / "logs", folder / "before.opk"
        self.packet = folder / "out" / "merged.opk"
        self.copies = folder / "split"
        self._trace = folder / "trace"
        self._environment = environment
        for made in (self.logs, self.packet.parent):
            made.mkdir()

    def grow(self, content: dict[str, bytes]) -> None:
        for name, data in content.items():
            with (self.logs / name).open("ab") as log:
                log.write(data)

    def reset(self) -> None:
        self.packet.unlink(missing_ok=True)
        if self.before.exists():
            shutil.copyfile(self.before, self.packet)

    def run(self, *options: str) -> int:
        """Run the command under strace, from the state before; return how it ended."""
        self.reset()
        watched = ["-P", str(self.packet), "-P", str(self.packet.parent)]
        merge = ["merge", str(self.logs), "-o", str(self.packet), "--fsync", "always", "--quiet"]
        command = ["strace", "-f", "-qq", "-o", str(self._trace), "-e", f"trace={CALLS}", *watched, *options]
        done = subprocess.run(
            [*command, sys.executable, "-m", "offload", *merge],
            env=self._environment,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.stderr == b""
        return done.returncode

    def calls(self) -> set[str]:
        """The calls that a run makes, of CALLS."""
        assert self.run() == 0
        return set(re.findall(r"^\d+ +(\w+)\(", self._trace.read_text(), re.MULTILINE))

    def torn(self) -> int:
        if not self.packet.exists():
            return 0
        with FrameSource(self.packet) as source:
            return recover(source.read_at, source.size()).torn

    async def merge(self) -> None:
        """The run that comes after."""
        async with Merge(Sources([str(self.logs)]), self.packet) as merge:
            await merge.run()

    def check(self) -> None:
        """The packet file is sound and holds each log, byte for byte."""
        found = verify(self.packet)
        assert found.faults == []
        shutil.rmtree(self.copies, ignore_errors=True)
        split(self.packet, self.copies)
        assert {p.name: p.read_bytes() for p in self.copies.iterdir()} == {
            p.name: p.read_bytes() for p in self.logs.iterdir()
        }


@pytest.mark.parametrize("torn", [False, True], ids=["new", "torn"])
async def test_killed_before_any_call_on_the_packet_file_it_goes_on(
    tmp_path: Path, environment: dict[str, str], torn: bool
) -> None:
    """Wherever it is killed, the packet file holds whole frames (or is still as torn as it was); a run completes it."""
    scene = Scene(tmp_path, environment)
    if torn:
        scene.grow(FIRST)
        await scene.merge()
        scene.before.write_bytes(scene.packet.read_bytes()[:-1])
    before = scene.before.read_bytes() if torn else b""
    scene.grow(GROWN)
    kills: Counter[str] = Counter()
    calls = scene.calls()
    scene.check()
    for call in sorted(calls):
        for number in count(1):
            ended = scene.run("-e", f"inject={call}:signal=SIGKILL:when={number}")
            if ended == 0:
                break  # it makes no more of them
            assert ended == -signal.SIGKILL
            kills[call] += 1
            assert scene.torn() == 0 or scene.packet.read_bytes() == before
            await scene.merge()
            scene.check()
    assert kills["writev"] >= 4
    assert kills["fdatasync"] >= 4
    assert kills["ftruncate"] == torn
