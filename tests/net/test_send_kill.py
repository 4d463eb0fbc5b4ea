"""`offload send` and `offload serve` as processes, either killed with SIGKILL while logs grow: each line is there once.

OFFLOAD_KILLS      how often to kill (default: 20 here)
OFFLOAD_KILL_SEED  what to begin the random choices with; a failure names the one it had
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import offload
from offload.merge.audit import verify
from offload.merge.split import split

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL"),
]

KILLS = int(os.environ.get("OFFLOAD_KILLS", "20"))
SEED = int(os.environ.get("OFFLOAD_KILL_SEED", str(random.randrange(1 << 32))))
PATIENCE = 60.0  # seconds until something that must happen counts as hung
OFFLOAD = (sys.executable, "-m", "offload")
NAMES = ("api.log", "web.log", "mail.log")


@pytest.fixture(autouse=True)
def time_for_all_kills() -> Iterator[None]:
    """Not a hang: as many kills as were asked for, on a busy machine."""
    faulthandler.dump_traceback_later(2 * PATIENCE + 3 * KILLS, exit=True, file=2)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As ours, with the package under test, its compiled modules kept: starts are most of this test's time."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    extra = {
        "PYTHONPATH": str(Path(offload.__file__).parents[1]),
        "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("compiled")),
    }
    return kept | extra


class Program(threading.Thread):
    """Appends numbered lines to its log, in pieces, and now and then begins a new one under the same name."""

    def __init__(self, path: Path, seed: str, stop: threading.Event) -> None:
        super().__init__(name=f"program {path.name}")
        self.path = path
        self.lines = 0
        self.rotations = 0
        self._chance = random.Random(seed)
        self._end = stop

    def run(self) -> None:
        while not self._end.is_set():
            with self.path.open("ab", buffering=0) as log:
                for _ in range(self._chance.randrange(50, 400)):
                    line = b"%d %s\n" % (self.lines, b"x" * self._chance.choice([0, 10, 100, 3000]))
                    cut = self._chance.randrange(len(line))
                    log.write(line[:cut])
                    if self._chance.random() < 0.1:
                        self._end.wait(self._chance.random() * 0.02)
                    log.write(line[cut:])
                    self.lines += 1
                    if self._end.is_set():
                        return
            if self.rotations < 3 and self._chance.random() < 0.2:
                self.rotations += 1
                self.path.rename(self.path.with_name(f"{self.path.stem}-{self.rotations}.old"))


class Pair:
    """A server and a sender, each a process that can be killed and started again."""

    def __init__(self, folder: Path, environment: dict[str, str], *, secret: bool) -> None:
        self.packet = folder / "out.opk"
        self.logs = folder / "logs"
        self.logs.mkdir()
        self._environment = environment
        address = f"unix:{folder}/socket"
        extra = []
        if secret:
            (folder / "secret").write_text("a secret of some length\n")
            extra = ["--secret-file", str(folder / "secret")]
        self._commands = {
            "server": ["serve", "--listen", address, "-o", str(self.packet), "--json", *extra],
            "sender": ["send", str(self.logs), "--to", address, "--name", "me", "-f", "--json", *extra],
        }
        self._errors = folder / "stderr"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, which: str) -> None:
        with self._errors.open("ab") as errors:
            self.processes[which] = subprocess.Popen(
                [*OFFLOAD, *self._commands[which]], stdout=subprocess.PIPE, stderr=errors, env=self._environment
            )

    def kill(self, which: str) -> None:
        process = self.processes.pop(which)
        assert process.poll() is None, f"the {which} ended by itself: {process.returncode}, {self.said()}"
        process.kill()
        process.communicate()

    def end(self, which: str) -> dict[str, object]:
        process = self.processes.pop(which)
        process.terminate()
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, self.said()
        summary = json.loads(out)
        assert isinstance(summary, dict)
        return summary

    def size(self) -> int:
        return self.packet.stat().st_size if self.packet.exists() else 0

    def wait_for_growth(self) -> None:
        size, patience = self.size(), time.monotonic() + PATIENCE
        while self.size() <= size:
            assert time.monotonic() < patience, f"nothing arrives: {self.said()}"
            for which, process in self.processes.items():
                assert process.poll() is None, f"the {which} ended by itself: {self.said()}"
            time.sleep(0.001)

    def said(self) -> str:
        return self._errors.read_text()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()


@pytest.mark.parametrize("secret", [False, True], ids=["open", "secret"])
def test_killed_at_either_end_each_line_is_there_once_and_in_order(
    secret: bool, tmp_path: Path, environment: dict[str, str]
) -> None:
    """With either process killed again and again, at random moments, each program's lines arrive once and in order."""
    chance = random.Random(f"{SEED} {secret}")
    stop = threading.Event()
    did: list[str] = []
    with Pair(tmp_path, environment, secret=secret) as pair:
        programs = [Program(pair.logs / name, f"{SEED} {name}", stop) for name in NAMES]
        for which in ("server", "sender"):
            pair.start(which)
        for program in programs:
            program.start()
        try:
            for _ in range(KILLS // 2):
                if chance.random() < 0.7:
                    pair.wait_for_growth()
                time.sleep(chance.random() * chance.choice([0.001, 0.02, 0.3]))
                which = chance.choice(["server", "sender"])
                pair.kill(which)
                did.append(f"killed the {which} at {pair.size()} bytes")
                pair.start(which)
        finally:
            stop.set()
            for program in programs:
                program.join()
        try:
            wanted = sum(path.stat().st_size for path in pair.logs.iterdir())
            patience = time.monotonic() + PATIENCE
            while content_bytes(pair.packet) < wanted:
                assert time.monotonic() < patience, pair.said()
                time.sleep(0.05)
            pair.end("sender")
            pair.end("server")
            assert verify(pair.packet).faults == []
            split(pair.packet, tmp_path / "back")
            for program in programs:
                assert lines_of(tmp_path / "back", program.path) == list(range(program.lines))
        except BaseException as exc:
            exc.add_note(f"OFFLOAD_KILL_SEED={SEED}; {pair.said()}")
            for line in did:
                exc.add_note(line)
            raise


def content_bytes(packet: Path) -> int:
    from offload.merge.split import stat

    with contextlib.suppress(ValueError):  # it is being begun
        return sum(source.bytes for source in stat(packet).sources)
    return 0


def lines_of(folder: Path, path: Path) -> list[int]:
    """The numbers of a program's lines, over all generations and rotated names of its log, in order."""
    files = [p for p in folder.rglob("*") if p.is_file() and re.match(rf"{path.stem}[-.]", p.name)]
    texts = [p.read_bytes() for p in files]
    texts.sort(key=lambda text: int(text.split(b" ", 1)[0]) if text else -1)
    return [int(number) for number in re.findall(rb"^(\d+) ", b"".join(texts), re.MULTILINE)]
