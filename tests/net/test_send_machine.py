"""A Hypothesis machine of `offload serve` and `offload send` as processes: started, paused and killed in any order.

A child that has imported everything forks them, so that a start costs milliseconds and hundreds of them are possible.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import offload
from offload.files.frame_source import FrameSource
from offload.merge.audit import verify
from offload.merge.split import split
from offload.packets.format import FrameType

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")]

PATIENCE = 30.0
EXAMPLES = int(os.environ.get("OFFLOAD_SEND_EXAMPLES", "20"))

# A line of JSON: a list of arguments, with which it forks `offload` and says the pid; a pid, whose exit code it says.
NURSERY = """
import json, os, sys
import offload.net.client, offload.net.receiver, offload.net.server, offload.net.fanout, offload.files.packet_stream
import offload.packets.framing, asyncio
from offload import cli
for line in sys.stdin:
    order = json.loads(line)
    if isinstance(order, int):
        print(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        log = os.open(order.pop(0), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for fd in (1, 2):
            os.dup2(log, fd)
        os.close(0)
        sys.argv = ["offload", *order]
        code = 99
        try:
            cli.main()
        except SystemExit as exc:
            code = exc.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(pid, flush=True)
"""


class Nursery:
    """Starts `offload` commands."""

    def __enter__(self) -> Nursery:
        environment = os.environ | {"PYTHONPATH": str(Path(offload.__file__).parents[1])}
        pipe = subprocess.PIPE
        command = [sys.executable, "-W", "ignore", "-c", NURSERY]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        return self

    def _ask(self, order: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, log: Path, *arguments: str) -> int:
        return self._ask([str(log), *arguments])

    def wait(self, pid: int) -> int:
        return self._ask(pid)

    def __exit__(self, *error: object) -> None:
        self._process.communicate()


nursery = Nursery()
base = Path()
numbers = itertools.count()


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """What hangs here would hang for ever: say where, and end."""
    faulthandler.dump_traceback_later(20 * PATIENCE, exit=True, file=2)
    yield
    faulthandler.cancel_dump_traceback_later()


class ProcessMachine(RuleBasedStateMachine):
    """Each line of each log is in the file once and in order; of each other connection its first packets, in order."""

    @initialize()
    def begin(self) -> None:
        self.folder = base / str(next(numbers))
        (self.folder / "logs").mkdir(parents=True)
        self.address = f"unix:{self.folder}/s"
        self.pids: dict[str, int] = {}
        self.paused: set[str] = set()
        self.plain: dict[int, tuple[socket.socket, int]] = {}  # socket, packets sent
        self.sent: dict[int, int] = {}
        self.logs: dict[str, int] = {"a.log": 0, "b.log": 0}  # which file has this name now
        self.lines: dict[str, int] = {}  # of each file

    # --- what happens to the logs

    @rule(
        name=st.sampled_from(["a.log", "b.log"]),
        count=st.integers(1, 50),
        size=st.sampled_from([0, 100, 5000, 200_000]),
    )
    def append(self, name: str, count: int, size: int) -> None:
        file = f"{name[0]}{self.logs[name]}"
        with (self.folder / "logs" / name).open("ab", buffering=0) as log:
            for _ in range(count if size < 10_000 else 3):
                number = self.lines.get(file, 0)
                log.write(b"%s %d %s\n" % (file.encode(), number, b"x" * size))
                self.lines[file] = number + 1

    @rule(name=st.sampled_from(["a.log", "b.log"]))
    def rotate(self, name: str) -> None:
        path = self.folder / "logs" / name
        if path.exists():
            path.rename(path.with_name(f"{path.stem}-{self.logs[name]}.old"))
            self.logs[name] += 1

    # --- what happens to the processes

    @precondition(lambda self: "server" not in self.pids)
    @rule()
    def start_server(self) -> None:
        self._start("server", "serve", "--listen", self.address, "-o", str(self.folder / "out.opk"))
        deadline = time.monotonic() + PATIENCE
        while not self._connects():
            assert time.monotonic() < deadline, self._said()
            time.sleep(0.001)

    def _connects(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(f"{self.folder}/s")
            return True
        return False

    @precondition(lambda self: "sender" not in self.pids)
    @rule()
    def start_sender(self) -> None:
        self._start("sender", "send", "-f", str(self.folder / "logs"), "--to", self.address, "--name", "me")

    @precondition(lambda self: self.pids)
    @rule(data=st.data(), after=st.sampled_from([0.0, 0.001, 0.01, 0.05]))
    def kill(self, data: st.DataObject, after: float) -> None:
        which = data.draw(st.sampled_from(sorted(self.pids)))
        time.sleep(after)  # at any moment of what it does
        self._kill(which)

    @precondition(lambda self: set(self.pids) - self.paused)
    @rule(data=st.data(), after=st.sampled_from([0.0, 0.001, 0.01]))
    def pause(self, data: st.DataObject, after: float) -> None:
        which = data.draw(st.sampled_from(sorted(set(self.pids) - self.paused)))
        time.sleep(after)
        os.kill(self.pids[which], signal.SIGSTOP)
        self.paused.add(which)

    @precondition(lambda self: self.paused)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        which = data.draw(st.sampled_from(sorted(self.paused)))
        os.kill(self.pids[which], signal.SIGCONT)
        self.paused.remove(which)

    @precondition(lambda self: set(self.pids) == {"server", "sender"} and not self.paused)
    @rule()
    def let_some_arrive(self) -> None:
        packet = self.folder / "out.opk"
        size, deadline = packet.stat().st_size, time.monotonic() + 0.05
        while packet.stat().st_size == size and time.monotonic() < deadline:
            time.sleep(0.001)

    # --- other connections

    @precondition(lambda self: "server" in self.pids and len(self.plain) < 5)
    @rule()
    def connect(self) -> None:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(PATIENCE)
        peer.connect(f"{self.folder}/s")
        self.plain[number := len(self.sent)] = peer, 0
        self.sent[number] = 0

    @precondition(lambda self: self.plain)
    @rule(data=st.data(), count=st.integers(1, 20), end=st.sampled_from(["stay", "close", "half", "noise"]))
    def say(self, data: st.DataObject, count: int, end: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.plain)))
        peer, sent = self.plain[number]
        payloads = [b"plain %d %d\n" % (number, n) for n in range(sent, sent + count)]
        stream = b"".join(struct.pack("!I", len(p)) + p for p in payloads)
        stream += {"half": b"\0\0\1\0 and no more", "noise": b"\xff" * 50}.get(end, b"")
        with contextlib.suppress(OSError):  # its server has gone
            peer.sendall(stream)
        self.plain[number] = peer, sent + count
        self.sent[number] = sent + count
        if end != "stay":
            self.plain.pop(number)[0].close()

    # --- the end

    def teardown(self) -> None:
        if not hasattr(self, "pids"):
            return
        try:
            self._finish()
        except BaseException as exc:
            exc.add_note(self._said())
            raise
        finally:
            for which in list(self.pids):
                self._kill(which)
            for peer, _ in self.plain.values():
                peer.close()

    def _finish(self) -> None:
        if "sender" in self.pids:
            self._kill("sender")
        if "server" in self.paused:
            os.kill(self.pids["server"], signal.SIGCONT)
        if "server" not in self.pids:
            self.start_server()
        self._start("sender", "send", str(self.folder / "logs"), "--to", self.address, "--name", "me")
        assert nursery.wait(self.pids.pop("sender")) == 0
        os.kill(self.pids["server"], signal.SIGTERM)
        assert nursery.wait(self.pids.pop("server")) == 0
        packet = self.folder / "out.opk"
        assert verify(packet).faults == []
        split(packet, self.folder / "back")
        texts = [path.read_bytes() for path in (self.folder / "back").rglob("*") if path.is_file()]
        for file, count in self.lines.items():
            runs = [re.findall(rb"^%s (\d+) " % file.encode(), text, re.MULTILINE) for text in texts]
            runs.sort(key=lambda run: int(run[0]) if run else -1)
            assert [int(number) for run in runs for number in run] == list(range(count)), file
        with FrameSource(packet) as source:
            packets = [p for f in source if f.header.type is FrameType.PACKETS for p in f.packets()]
        for number, sent in self.sent.items():
            got = [p for p in packets if p.startswith(b"plain %d " % number)]
            assert got == [b"plain %d %d\n" % (number, n) for n in range(len(got))]
            assert len(got) <= sent

    # --- inside

    def _start(self, which: str, *arguments: str) -> None:
        self.pids[which] = nursery.start(self.folder / "said", *arguments)

    def _kill(self, which: str) -> None:
        pid = self.pids.pop(which)
        self.paused.discard(which)
        os.kill(pid, signal.SIGKILL)
        assert nursery.wait(pid) == -signal.SIGKILL, f"the {which} had ended by itself: {self._said()}"

    def _said(self) -> str:
        said = self.folder / "said"
        return said.read_text() if said.exists() else "nothing was said"


def test_machine_of_processes(tmp_path: Path) -> None:
    """Whoever is started, paused and killed in whatever order, and whoever else connects: nothing is lost or twice."""
    global base
    base = tmp_path
    with nursery:
        run_state_machine_as_test(
            ProcessMachine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
