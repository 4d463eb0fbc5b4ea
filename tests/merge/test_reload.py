"""SIGHUP and what it changes: the real command under load, reloaded and killed; nothing lost, nothing doubled."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload.merge.audit import verify
from offload.merge.split import split, stat

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP"),
]

STATUS: list[str | Path] = [sys.executable, "-m", "offload", "status", "--json"]
COMMAND = [sys.executable, "-m", "offload", "merge", "-q"]
AMPLE = 60.0


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for something that another process does: it is seen in a file, and no event of ours tells it."""
    deadline = time.monotonic() + AMPLE
    while not condition():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


class Running:
    """The command, and what it said so far."""

    def __init__(self, folder: Path, *arguments: str | Path, **options: str) -> None:
        self._said = (folder / f"said-{time.monotonic_ns()}").open("w+b")
        env = {**os.environ, **options}
        self.process = subprocess.Popen([*COMMAND, *arguments], stderr=self._said, env=env)

    def said(self) -> str:
        return os.pread(self._said.fileno(), 1 << 20, 0).decode()

    def hang_up(self, says: str | None = None) -> None:
        """Send SIGHUP; return once it has said this once more than before."""
        before = self.said().count(says) if says else 0
        self.process.send_signal(signal.SIGHUP)
        if says:
            until(lambda: self.said().count(says) > before, self.process)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(AMPLE)
        assert "Traceback" not in self.said(), self.said()
        self._said.close()
        return code


@contextlib.contextmanager
def running(folder: Path, *arguments: str | Path, **options: str) -> Iterator[Running]:
    it = Running(folder, *arguments, **options)
    try:
        yield it
    finally:
        if it.process.poll() is None:
            it.process.kill()
            it.process.wait()


def holds(out: Path, lines: int) -> Callable[[], bool]:
    return lambda: out.exists() and out.stat().st_size >= 64 and stat(out).lines >= lines


def opened(process: subprocess.Popen[bytes]) -> set[str]:
    links = set()
    for path in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.add(os.readlink(path))
    return links


def status(out: Path) -> dict[str, object]:
    with contextlib.suppress(OSError):
        found: dict[str, object] = json.loads(Path(f"{out}.status").read_text())
        return found
    return {}


def sources(out: Path) -> set[str]:
    found = status(out).get("sources", [])
    assert isinstance(found, list)
    return {Path(source["path"]).name for source in found}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged.opk"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_sources_come_and_go(logs: Path, out: Path, tmp_path: Path) -> None:
    """A removed source is read to its end and let go, its lines stay; added again, it goes on where it was."""
    config = tmp_path / "merge.toml"
    both, one = 'sources = ["logs/a", "logs/b"]\noutput = "merged.opk"', 'sources = ["logs/a"]\noutput = "merged.opk"'
    config.write_text(both)
    for name in "ab":
        append(logs / name, b"1\n")
    with running(tmp_path, "-f", "--config", config) as merge:
        until(lambda: sources(out) == {"a", "b"}, merge.process)
        os.kill(merge.process.pid, signal.SIGSTOP)  # so that there is an unread rest when it is taken out
        append(logs / "b", b"rest\nof a li")
        config.write_text(one)
        merge.hang_up()
        os.kill(merge.process.pid, signal.SIGCONT)
        until(lambda: sources(out) == {"a"}, merge.process)
        append(logs / "b", b"ne\nwhile away\n")
        append(logs / "a", b"2\n")
        until(holds(out, 5), merge.process)
        assert str(logs / "b") not in opened(merge.process)
        (logs / "b").rename(logs / "b.1")  # rotated meanwhile
        append(logs / "b", b"next\n")
        config.write_text(both)
        merge.hang_up()
        until(holds(out, 7), merge.process)
        assert merge.end() == 0
    assert verify(out).ok
    split(out, tmp_path / "back")
    back = {p.name: p.read_bytes() for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert back["a"] == b"1\n2\n"
    assert b"".join(data for name, data in sorted(back.items(), key=lambda kv: len(kv[0])) if name != "a") in (
        b"1\nrest\nof a line\nwhile away\nnext\n",
        b"next\n1\nrest\nof a line\nwhile away\n",
    )


def test_a_wrong_config_changes_nothing_and_what_is_fixed_is_told(logs: Path, out: Path, tmp_path: Path) -> None:
    """What is wrong, and what cannot change while it runs, is told on stderr; the old settings stay in force."""
    config = tmp_path / "merge.toml"
    right = 'sources = ["logs/"]\noutput = "merged.opk"\n'
    config.write_text(right)
    append(logs / "a", b"1\n")
    with running(tmp_path, "-f", "--config", config) as merge:
        until(holds(out, 1), merge.process)
        for wrong, says in [
            ("sources = [", "merge.toml: is no TOML: "),
            (right + "lingre = 5", "merge.toml: lingre: unknown key; is linger meant?; goes on as before"),
            (right + 'linger = "soon"', "merge.toml: linger: found 'soon', expected a duration"),
            (right.replace('["logs/"]', "[]"), "no sources given; goes on as before"),
            (right + 'status = "logs/status"', "which would be one of the sources; goes on as before"),
            (right.replace("merged", "other") + 'fsync = "always"', "output: cannot change while it runs"),
            (right + "[segments]\nsize = 5", "segments: cannot change while it runs"),
        ]:
            config.write_text(wrong)
            merge.hang_up(says)
        assert "fsync: cannot change while it runs" in merge.said()
        config.unlink()
        merge.hang_up("merge.toml: No such file or directory; goes on as before")
        append(logs / "b", b"2\n")
        until(holds(out, 2), merge.process)
        assert merge.end() == 0
    assert not (tmp_path / "other.opk").exists()


def test_without_a_file_it_looks_at_once_and_lives(logs: Path, out: Path, tmp_path: Path) -> None:
    """SIGHUP to a merge without --config ends nothing."""
    append(logs / "a", b"1\n")
    with running(tmp_path, "-f", logs, "-o", out) as merge:
        until(holds(out, 1), merge.process)
        for number in range(20):
            append(logs / "b", b"%d\n" % number)
            merge.hang_up()
        until(holds(out, 21), merge.process)
        assert merge.end() == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_any_number_of_reloads_and_kills_under_load(logs: Path, out: Path, tmp_path: Path, seed: int) -> None:
    """Files are taken out and in by SIGHUP while they grow, with kill -9 in between: each line is there once."""
    chance = random.Random(seed)
    config = tmp_path / "merge.toml"
    names = [f"{n}.log" for n in "abcdef"]
    written = dict.fromkeys(names, 0)
    over = threading.Event()

    def write() -> None:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context((logs / name).open("ab", buffering=0)) for name in names}
            while not over.is_set():
                for name in chance.sample(names, 3):
                    count = chance.randrange(1, 50)
                    start = written[name]
                    data = b"".join(b"%s %d\n" % (name.encode(), start + n) for n in range(count))
                    cut = chance.randrange(len(data))
                    files[name].write(data[:cut])
                    files[name].write(data[cut:])
                    written[name] += count
                over.wait(0.002)

    def set_up(wanted: list[str]) -> None:
        listed = ", ".join(f'"logs/{name}"' for name in wanted)
        beside = tmp_path / "merge.toml.new"
        lines = [f"sources = [{listed}]", 'output = "merged.opk"', "follow = true", f"linger = {chance.randrange(60)}"]
        beside.write_text("\n".join([*lines, 'exclude = ["a.*"]' if chance.random() < 0.3 else ""]))
        beside.replace(config)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(5):
            set_up(names)
            with running(tmp_path, "--config", config) as merge:
                size = out.stat().st_size if out.exists() else 0
                until(lambda size=size: out.exists() and out.stat().st_size > size, merge.process)  # type: ignore[misc]
                for _ in range(12):
                    set_up(chance.sample(names, chance.randrange(1, 6)))
                    merge.hang_up()
                    size = out.stat().st_size
                    until(lambda size=size: out.stat().st_size > size, merge.process)  # type: ignore[misc]
                assert merge.end(signal.SIGKILL) == -signal.SIGKILL
    finally:
        over.set()
        writer.join()
    config.unlink()
    subprocess.run([*COMMAND, *(logs / name for name in names), "-o", out], check=True, timeout=AMPLE)
    found = verify(out)
    assert found.ok, found.faults
    assert found.lines == sum(written.values())
    split(out, tmp_path / "back")
    for name in names:
        back = next(p for p in (tmp_path / "back").rglob(name))
        assert back.read_bytes() == (logs / name).read_bytes() != b""


def test_limits_of_segments_change(logs: Path, out: Path, tmp_path: Path) -> None:
    """A new size of segments, and how many are kept, hold from the reload on; every segment that is there is whole."""
    config = tmp_path / "merge.toml"
    plain = 'sources = ["logs/"]\noutput = "merged.opk"\nfollow = true\n'
    config.write_text(plain + '[segments]\nsize = "1GiB"')

    def closed() -> list[Path]:
        return sorted(p for p in tmp_path.glob("merged.*.opk") if p.name != "merged.opk")

    lines = 0

    def write() -> None:
        nonlocal lines
        append(logs / "a", b"line of some length\n" * 1000)
        lines += 1000

    with running(tmp_path, "--config", config) as merge:
        write()
        until(lambda: status(out).get("lines") == lines, merge.process)
        assert not closed()
        config.write_text(plain + '[segments]\nsize = "50kB"')
        merge.hang_up()
        for _ in range(10):
            write()
            until(lambda: status(out).get("lines") == lines, merge.process)
        until(holds(out, lines), merge.process)  # the writer, who was told of them, may be closing a segment
        until(lambda: status(out).get("segment") == len(closed()), merge.process)
        before = len(closed())
        assert before >= 3
        found = json.loads(subprocess.run([*STATUS, out], capture_output=True, check=True, timeout=AMPLE).stdout)
        assert (found["current"], found["segment"]) == (True, before)
        config.write_text(plain + '[segments]\nsize = "50kB"\nkeep-size = "100kB"')
        merge.hang_up()
        until(lambda: len(closed()) < before, merge.process)
        assert merge.end() == 0
    assert verify(out).ok


def test_it_tells_systemd(logs: Path, out: Path, tmp_path: Path) -> None:
    """With NOTIFY_SOCKET it says when it is ready, reloads, is ready again, and stops, as sd_notify(3) has it."""
    append(logs / "a", b"1\n")
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(os.fspath(path))
        listener.settimeout(AMPLE)
        with running(tmp_path, "-f", logs, "-o", out, NOTIFY_SOCKET=os.fspath(path)) as merge:
            assert listener.recv(1000) == b"READY=1"
            merge.hang_up()
            state, _, time_us = listener.recv(1000).partition(b"\nMONOTONIC_USEC=")
            assert state == b"RELOADING=1"
            assert abs(int(time_us) * 1000 - time.monotonic_ns()) < AMPLE * 1e9
            assert listener.recv(1000) == b"READY=1"
            assert merge.end() == 0
            assert listener.recv(1000) == b"STOPPING=1"
