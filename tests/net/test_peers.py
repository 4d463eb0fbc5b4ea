"""Real clients, unchanged: Python's SocketHandler, `logger`, rsyslog's omfwd plain and over TLS, netcat's kin.

`offload serve` runs as a process, as its user runs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import logging.handlers
import os
import pickle
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import offload
from offload.files.frame_source import FrameSource
from offload.merge.audit import verify
from offload.packets.format import FrameType

pytestmark = pytest.mark.slow

PATIENCE = 30.0


class Serve:
    """`offload serve` within a block; behind it `summary` is what it said, and it has ended well."""

    def __init__(self, folder: Path, framing: str, *options: str | Path) -> None:
        self.packet = folder / "out.opk"
        self._errors = folder / "stderr"
        self._asked = False
        command = [sys.executable, "-m", "offload", "serve", "--listen", "127.0.0.1:0", "--framing", framing, "--json"]
        self._command = [*command, *map(str, options)]
        if "-o" not in options and "--subscribers" not in options:
            self._command += ["-o", str(self.packet)]

    def __enter__(self) -> Serve:
        environment = os.environ | {"PYTHONPATH": str(Path(offload.__file__).parents[1])}
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        wanted = 2 if "--subscribers" in self._command else 1
        patience = time.monotonic() + PATIENCE
        while len(addresses := re.findall(r" on (\S+):(\d+)\n", self.said())) < wanted:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < patience, self.said()
            time.sleep(0.01)
        self.host, self.port = addresses[0][0], int(addresses[0][1])
        self.subscribers = addresses[-1][0], int(addresses[-1][1])
        return self

    def terminate(self) -> None:
        """Once: a second SIGTERM means "at once"."""
        if not self._asked:
            self._asked = True
            self.process.terminate()

    def __exit__(self, *error: object) -> None:
        self.terminate()
        out, _ = self.process.communicate(timeout=PATIENCE)
        if error[0] is None:
            assert self.process.returncode == 0, self.said()
            self.summary = json.loads(out)

    def said(self) -> str:
        return self._errors.read_text()

    def packets(self) -> list[bytes]:
        """All packets in the file; which verifies."""
        assert verify(self.packet).faults == []
        with FrameSource(self.packet) as source:
            return [p for f in source if f.header.type in (FrameType.PACKETS, FrameType.LINES) for p in f.packets()]

    def wait_for(self, count: int) -> list[bytes]:
        """Until so many packets are in the file."""
        patience = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError, ValueError):
                if len(packets := self.packets()) >= count:
                    return packets
            assert time.monotonic() < patience, self.said()
            time.sleep(0.02)


def test_socket_handler(tmp_path: Path) -> None:
    """Python's logging.handlers.SocketHandler sends pickles; they are stored as they are, in order, never loaded."""
    with Serve(tmp_path, "u32") as serve:
        handler = logging.handlers.SocketHandler(serve.host, serve.port)
        logger = logging.Logger("peer")
        logger.addHandler(handler)
        for number in range(500):
            logger.warning("message %d", number)
        handler.close()
    messages = [pickle.loads(packet)["msg"] for packet in serve.packets()]
    assert messages == [f"message {number}" for number in range(500)]
    assert serve.summary["packets"] == 500


@pytest.mark.peer("logger")
@pytest.mark.parametrize(("framing", "options"), [("octet", ["--octet-count"]), ("lines", [])])
def test_logger(framing: str, options: list[str], tmp_path: Path) -> None:
    """util-linux's `logger --tcp`, with octet counting and without."""
    lines = [f"message {number} {'x' * (number % 50)}" for number in range(200)]
    with Serve(tmp_path, framing) as serve:
        command = ["logger", "--tcp", *options, "-n", serve.host, "-P", str(serve.port), "--rfc5424", "-t", "peer"]
        subprocess.run(command, input="\n".join(lines) + "\n", text=True, check=True, timeout=PATIENCE)
        serve.wait_for(len(lines))
    got = [re.search(rb"(message .*?)\n?$", packet) for packet in serve.packets()]
    assert [match[1].decode() for match in got if match] == lines
    assert serve.summary["bad"] == 0


RSYSLOG = """
global(workDirectory="{folder}" {tls_global})
module(load="imfile" mode="inotify")
input(type="imfile" file="{folder}/app.log" tag="app" persistStateInterval="1" ruleset="out")
template(name="plain" type="string" string="%msg%")
ruleset(name="out") {{
  action(type="omfwd" target="127.0.0.1" port="{port}" protocol="tcp" TCP_Framing="octet-counted" template="plain"
    queue.type="LinkedList" action.resumeRetryCount="-1" action.resumeInterval="1" {tls})
}}
"""


@pytest.mark.peer("rsyslogd")
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_rsyslog_omfwd(tls: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """rsyslog's omfwd with octet counting, plain and over TLS with certificates on both sides: all in order."""
    options: list[str | Path] = []
    tls_global = tls_action = ""
    if tls:
        if not any(Path(folder, "lmnsd_gtls.so").exists() for folder in _rsyslog_modules()):
            if os.environ.get("OFFLOAD_REQUIRE_PEERS"):
                pytest.fail("rsyslog-gnutls is not installed, and OFFLOAD_REQUIRE_PEERS is set", pytrace=False)
            pytest.skip("rsyslog-gnutls is not installed")
        folder: Path = request.getfixturevalue("certificates")
        options = ["--tls-cert", folder / "server.pem", "--tls-key", folder / "server.key"]
        options += ["--tls-client-ca", folder / "ca.pem"]
        tls_global = (
            f'defaultNetstreamDriver="gtls" defaultNetstreamDriverCAFile="{folder}/ca.pem" '
            f'defaultNetstreamDriverCertFile="{folder}/client.pem" defaultNetstreamDriverKeyFile="{folder}/client.key"'
        )
        tls_action = (
            'StreamDriver="gtls" StreamDriverMode="1" StreamDriverAuthMode="x509/name" '
            'StreamDriverPermittedPeers="localhost"'
        )
    lines = [f"message {number}" for number in range(500)]
    (tmp_path / "app.log").write_text("".join(f"{line}\n" for line in lines))
    with Serve(tmp_path, "octet", *options) as serve:
        config = tmp_path / "rsyslog.conf"
        config.write_text(RSYSLOG.format(folder=tmp_path, port=serve.port, tls=tls_action, tls_global=tls_global))
        program = shutil.which("rsyslogd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        assert program is not None
        with (
            (tmp_path / "rsyslog.out").open("wb") as said,
            subprocess.Popen(
                [program, "-n", "-f", str(config), "-i", str(tmp_path / "rsyslog.pid")], stdout=said, stderr=said
            ) as rsyslog,
        ):
            try:
                got = serve.wait_for(len(lines))
            finally:
                rsyslog.send_signal(signal.SIGTERM)
                rsyslog.wait(PATIENCE)
    assert [packet.decode().strip() for packet in got] == lines
    if tls:
        with FrameSource(serve.packet) as source:
            names = [f.payload for f in source if f.header.type is FrameType.SOURCE]
        assert names[0].endswith(b"client"), "the source is called by the certificate's name"


def _rsyslog_modules() -> Iterator[str]:
    for base in ("/usr/lib", "/usr/lib64", "/usr/local/lib"):
        yield f"{base}/rsyslog"
        yield from (str(p) for p in Path(base).glob("*/rsyslog"))


@pytest.mark.parametrize(
    ("framing", "stream"),
    [
        (">HB,size=0,counts=header", struct.pack(">HB", 6, 7) + b"abc"),
        ("<4sI,magic=OFF1,crc32", struct.pack("<4sI", b"OFF1", 3) + b"abc" + struct.pack("<I", 0x352441C2)),
    ],
)
def test_struct_framing_of_ones_own(framing: str, stream: bytes, tmp_path: Path) -> None:
    """A header of one's own is described on the command line, with magic and digest."""
    with Serve(tmp_path, framing) as serve:
        with socket.create_connection((serve.host, serve.port)) as peer:
            peer.sendall(stream * 3)
        assert serve.wait_for(3) == [b"abc"] * 3


def test_subscribers_get_what_others_send(tmp_path: Path) -> None:
    """Two subscribers get every line that two senders send, and the packet file has them too; SIGTERM ends it all."""
    serve = Serve(tmp_path, "lines", "--subscribers", "127.0.0.1:0", "-o", tmp_path / "out.opk")
    with serve, contextlib.ExitStack() as stack:
        readers = [stack.enter_context(socket.create_connection(serve.subscribers)) for _ in range(2)]
        warm = stack.enter_context(socket.create_connection((serve.host, serve.port)))
        while len(select.select(readers, [], [], 0.02)[0]) < 2:  # nothing else says that both subscriptions stand
            warm.sendall(b"warm\n")
        for number in range(2):
            with socket.create_connection((serve.host, serve.port)) as sender:
                sender.sendall(b"".join(b"%d %d\n" % (number, n) for n in range(100)))
        got = [b"", b""]
        for index, reader in enumerate(readers):
            reader.settimeout(PATIENCE)
            while len(re.findall(rb"^\d+ \d+\n", got[index], re.MULTILINE)) < 200:
                got[index] += reader.recv(1 << 16)
        serve.terminate()
        assert [reader.recv(1) for reader in readers] == [b"", b""]
    for data in got:
        for number in range(2):
            mine = [line for line in data.splitlines() if line.startswith(b"%d " % number)]
            assert mine == [b"%d %d" % (number, n) for n in range(100)]
    numbered = [line for line in serve.packets() if line != b"warm\n"]
    assert sorted(numbered) == sorted(line for line in got[0].splitlines(keepends=True) if line != b"warm\n")


def test_sigterm_drains_what_was_sent(tmp_path: Path) -> None:
    """What clients had sent when SIGTERM came is in the file, though nobody had closed."""
    with Serve(tmp_path, "lines") as serve, contextlib.ExitStack() as stack:
        for number in range(10):
            peer = stack.enter_context(socket.create_connection((serve.host, serve.port)))
            peer.sendall(b"".join(b"%d %d\n" % (number, n) for n in range(1000)))
        serve.terminate()
        serve.process.wait(PATIENCE)
    assert len(serve.packets()) == 10_000
    assert serve.summary["cut"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--listen", "127.0.0.1:0"], "the packets go nowhere: give --output or --subscribers"),
        (["serve", "--listen", "nowhere", "-o", "OUT"], "address is 'nowhere', expected HOST:PORT or unix:PATH"),
        (["serve", "--listen", ":0", "-o", "OUT", "--framing", "u99"], "framing is 'u99', expected u32, octet, lines"),
        (["serve", "--listen", ":0", "-o", "OUT", "--tls-cert", "x"], "TLS needs --tls-cert and --tls-key"),
        (["send", "LOG", "--to", "nowhere"], "address is 'nowhere'"),
        (["send", "LOG", "--to", ":1", "--name", "a:b"], "name is 'a:b'"),
        (["send", "LOG", "--to", ":1", "--tls-cert", "x"], "a certificate needs its key"),
    ],
)
def test_wrong_usage_is_told_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    """What cannot be meant ends with 2 and a sentence that says what was found."""
    (tmp_path / "LOG").write_text("line\n")
    environment = os.environ | {"PYTHONPATH": str(Path(offload.__file__).parents[1])}
    command = [sys.executable, "-m", "offload", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_send_without_retry_says_why_it_cannot(tmp_path: Path) -> None:
    """`--no-retry` ends with the reason when nobody listens; nothing else is printed."""
    (tmp_path / "LOG").write_text("line\n")
    environment = os.environ | {"PYTHONPATH": str(Path(offload.__file__).parents[1])}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "offload", "send", "LOG", "--to", address, "--no-retry"]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    assert result.returncode not in (0, 2)
    assert len(result.stderr.splitlines()) == 1
    assert "onnect" in result.stderr


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(offload.__file__).parents[1])}
    command = [sys.executable, "-m", "offload", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--listen", "TAKEN", "-o", "out"], 4, "TAKEN: Address already in use"),
        (["--listen", "unix:no/dir/s", "-o", "out"], 4, "unix:no/dir/s: No such file or directory"),
        (["--listen", "127.0.0.1:0", "-o", "no/dir/out"], 4, "no/dir/out: No such file or directory"),
        (["--listen", "127.0.0.1:0", "-o", "LOG"], 3, "LOG: no packet file, or a damaged one"),
        (["--listen", "127.0.0.1:0", "-o", "out", "--tls-cert", "no", "--tls-key", "no"], 4, "no: No such file"),
        (["--listen", "127.0.0.1:0", "-o", "out", "--tls-cert", "LOG", "--tls-key", "LOG"], 4, "LOG: TLS: "),
        (["--listen", "127.0.0.1:0", "-o", "out", "--secret-file", "no"], 4, "no: No such file or directory"),
        (["--listen", "127.0.0.1:0", "-o", "out", "--max-connections", "0"], 2, "connections is 0, expected more than"),
        (["--listen", "127.0.0.1:0", "-o", "out", "--on-error", "resync"], 2, "resync needs a magic"),
    ],
)
def test_serve_that_cannot_says_what_is_wrong(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    """A port in use, a folder that is not there, a file that is no certificate: one line that names it."""
    (tmp_path / "LOG").write_text("a log, and no packet file\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run("serve", *[a.replace("TAKEN", address) for a in arguments], cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert message.replace("TAKEN", address) in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_serve_tells_why_it_closed_a_connection(tmp_path: Path) -> None:
    """A peer that speaks another framing is closed, and told why; a flood of them not one by one."""
    with Serve(tmp_path, "octet") as serve, contextlib.ExitStack() as stack:
        address = serve.host, serve.port
        peers = [stack.enter_context(socket.create_connection(address)) for _ in range(100)]
        for peer in peers:
            peer.sendall(b"GET / HTTP/1.0\r\n\r\n")
        for peer in peers:
            assert peer.recv(1) == b""
    reasons = [line for line in serve.said().splitlines() if "is closed: byte 0: found b'GET / HTTP/'" in line]
    assert 1 <= len(reasons) < 100
    assert serve.summary["bad"] == 100


def test_serve_skips_bad_packets_if_told_to(tmp_path: Path) -> None:
    """With --on-error skip a packet with a wrong digest is left out and counted, and those behind it are stored."""
    good = struct.pack(">I", 3) + b"abc" + struct.pack(">I", 0x352441C2)
    with Serve(tmp_path, ">I,crc32", "--on-error", "skip") as serve:
        with socket.create_connection((serve.host, serve.port)) as peer:
            peer.sendall(good + good[:-1] + b"?" + good)
        assert serve.wait_for(2) == [b"abc"] * 2
    assert (serve.summary["skipped"], serve.summary["bad"]) == (1, 0)


def test_serve_checks_large_packets_and_drains_them(tmp_path: Path) -> None:
    """A wrong digest of a large packet is told with its byte; what had come before SIGTERM is checked and stored."""
    payloads = [b"%02d" % n + bytes(100_000) for n in range(20)]
    frames = [struct.pack(">I", len(p)) + p + hashlib.sha256(p).digest() for p in payloads]
    with Serve(tmp_path, ">I,sha256") as serve:
        address = serve.host, serve.port
        with socket.create_connection(address) as peer, contextlib.suppress(ConnectionError):
            peer.sendall(frames[0] + frames[1][:-1] + b"?" + frames[2])  # more than it wants to read
            assert peer.recv(1) == b""
        with socket.create_connection(address) as peer:
            peer.sendall(b"".join(frames[3:]))
            serve.terminate()
            serve.process.wait(PATIENCE)
    assert serve.packets() == [payloads[0], *payloads[3:]]
    assert f"is closed: byte {len(frames[0])}: digest is" in serve.said()
    assert (serve.summary["bad"], serve.summary["cut"]) == (1, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_serve_checks_digests_on_other_threads(tmp_path: Path) -> None:
    """With a digest in the framing `serve` has threads for it; without one it has none."""
    threads = []
    for framing in (">I", ">I,sha256"):
        (tmp_path / framing).mkdir()
        with Serve(tmp_path / framing, framing) as serve:
            threads.append(len(os.listdir(f"/proc/{serve.process.pid}/task")))
    assert threads[1] - threads[0] == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_send_ends_while_it_waits_for_an_answer(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM end a `send` whose server takes the connection and says nothing, with 1: not all was sent."""
    (tmp_path / "LOG").write_text("line\n")
    environment = os.environ | {"PYTHONPATH": str(Path(offload.__file__).parents[1])}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "offload", "send", str(tmp_path / "LOG"), "--to", address]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as sending:
            peer, _ = silent.accept()
            with peer:
                assert peer.recv(4) != b""  # its hello: now it waits
                sending.send_signal(number)
                _, said = sending.communicate(timeout=PATIENCE)
    assert sending.returncode == 1, said
    assert said.splitlines()[0] == "offload: ended before everything was sent; start it again to go on"
