"""The command as users run it: a process of its own, its exit code, what it prints, and what it leaves behind."""

from __future__ import annotations

import array
import base64
import contextlib
import fcntl
import filecmp
import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pytest

from offload.files.frame_source import FrameSource
from offload.merge.audit import verify
from offload.merge.split import split, stat
from offload.packets.format import FrameType

COMMAND = [sys.executable, "-m", "offload"]
LOGS = Path(__file__).parents[2] / "shared" / "data" / "logs"
AMPLE = 60.0  # seconds until something that must happen is given up

Argument = str | bytes | Path


class Done(NamedTuple):
    code: int
    out: bytes
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: Argument, code: int = 0, **options: Any) -> Done:
    """Run the command to its end; it must end with this exit code and never with a traceback."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=AMPLE, check=False, **options)
    err = done.stderr.decode(errors="replace")
    assert "Traceback" not in err, err
    assert done.returncode == code, (arguments, done.returncode, done.stdout[-500:], err)
    return Done(done.returncode, done.stdout, err)


def fails(*arguments: Argument, code: int, says: str, **options: Any) -> None:
    """The command must end with this code and say this, and nothing else, in one line on stderr."""
    done = run(*arguments, code=code, **options)
    assert re.fullmatch(f"offload: {says}\n", done.err), done.err
    assert done.out == b""


@contextlib.contextmanager
def started(
    *arguments: Argument, command: Sequence[str] = COMMAND, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """The command while it runs; whatever the test does, it has ended afterwards."""
    options.setdefault("stderr", subprocess.PIPE)
    process = cast(
        "subprocess.Popen[bytes]", subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, **options)
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process: subprocess.Popen[bytes], code: int = 0) -> Done:
    out, err = process.communicate(timeout=AMPLE)
    text = (err or b"").decode(errors="replace")
    assert "Traceback" not in text, text
    assert process.returncode == code, (process.returncode, out[-500:], text)
    return Done(process.returncode, out, text)


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait for something that another process does: it is seen in a file, and no event of ours tells it."""
    deadline = time.monotonic() + AMPLE
    while not condition():
        assert process is None or process.poll() is None, "the process has ended"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def read_line(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    assert select.select([stream], [], [], AMPLE)[0], "no line came"
    return stream.readline()


def holds(out: Path, lines: int) -> Callable[[], bool]:
    """Whether the packet file has so many lines now."""
    return lambda: out.exists() and out.stat().st_size >= 64 and stat(out).lines >= lines


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def restored(out: Path, folder: Path) -> dict[str, bytes]:
    """Verify, take apart, and give the files; for packet files that are not large."""
    run("verify", "-q", out)
    run("split", "-q", out, "-d", folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged.opk"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packet file with 10,000 lines of one source called `log`."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "log").write_bytes(b"one\n" * 10_000)
    run("merge", "-q", folder / "log", "-o", folder / "good.opk")
    return folder / "good.opk"


# --- the real logs ----------------------------------------------------------------------------------------------------


def stand_in(folder: Path) -> Path:
    """Five small logs as the real ones are: CR LF, long and short lines, no line end at the end of the file."""
    folder.mkdir()
    for number, name in enumerate(("apache", "hdfs", "linux", "openssh", "zookeeper")):
        lines = [f"Jun {line % 30} {name}[{line}]: {'x' * (line * 7 % 190)} größe" for line in range(300 + number)]
        (folder / f"{name}.log").write_bytes("\r\n".join(lines).encode())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["real", "stand-in"])
def test_five_logs_merged_and_taken_apart_again(tmp_path: Path, kind: str, out: Path) -> None:
    """Logs with CR LF and without a line end at the end come back identical, by split and by cat."""
    if kind == "real" and not LOGS.is_dir():
        pytest.skip(f"the real logs are not at {LOGS}")
    folder = LOGS if kind == "real" else stand_in(tmp_path / "stand-in")
    originals = sorted(folder.glob("*.log"))
    assert len(originals) == 5
    assert all(b"\r\n" in original.read_bytes() for original in originals)
    assert not all(original.read_bytes().endswith(b"\n") for original in originals)
    done = run("merge", folder / "*.log", "-o", out, "--json").json
    assert done["sources"] == 5
    assert done["bytes"] == sum(original.stat().st_size for original in originals)
    assert done["lines"] == sum(len(original.read_bytes().splitlines()) for original in originals)
    assert b"every checksum and every sequence holds" in run("verify", out).out
    run("split", out, "-d", tmp_path / "back")
    for original in originals:
        assert filecmp.cmp(original, tmp_path / "back" / original.name, shallow=False)
        assert run("cat", out, "--source", original.name).out == original.read_bytes()
    assert run("merge", folder / "*.log", "-o", out, "--json").json["lines"] == 0


# --- hard inputs ------------------------------------------------------------------------------------------------------


NAMES = [b"two words.log", "größe.log".encode(), b"-dash.log", b"new\nline.log", b"\xff\xfe.log", b"\x1b[31m.log"]


@pytest.mark.slow
def test_names_and_contents_of_every_kind(logs: Path, out: Path, tmp_path: Path) -> None:
    """Any name, and any bytes in it, go through merge, verify, split, stat and cat --source unchanged."""
    contents: dict[bytes, bytes] = {
        b"empty": b"",
        b"nul": b"\0\0\n\0",
        b"not utf-8": b"\xff\xfe\n\xc3\x28",
        b"newlines": b"\n\n",
        **dict.fromkeys(NAMES, b"in a strange file\n"),
    }
    for name, data in contents.items():
        (logs / os.fsdecode(name)).write_bytes(data)
    run("merge", "-o", out, "--", *sorted(contents), cwd=logs)
    back = restored(out, tmp_path / "back")
    assert {os.fsencode(name): data for name, data in back.items()} == contents
    entries = run("stat", out, "--json").json["sources"]
    assert {os.fsencode(entry["name"]): entry["bytes"] for entry in entries} == {n: len(d) for n, d in contents.items()}
    rows = run("stat", out).out.decode().splitlines()
    assert len(rows) == 1 + len(contents)
    assert all("\x1b" not in row for row in rows)
    for name in (b"-dash.log", b"\xff\xfe.log", b"nul", b"not utf-8"):
        assert run("cat", out, b"--source=" + name).out == contents[name]
    records = [
        json.loads(line) for line in run("cat", out, "--json", "-s", os.fsdecode(b"\xff\xfe.log")).out.splitlines()
    ]
    assert [os.fsencode(record["source"]) for record in records] == [b"\xff\xfe.log"]


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_names_are_told_in_any_locale(logs: Path, out: Path, locale: str) -> None:
    """A name that the locale cannot show is no error: JSON is UTF-8, lines for people are escaped."""
    env = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name in (b"\xff.log", "größe.log".encode()):
        (logs / os.fsdecode(name)).write_bytes(b"x")
    done = run("merge", logs, logs / os.fsdecode(b"nope\xff"), "-o", out, "--json", code=1, env=env)
    assert [os.fsencode(path) for path in done.json["problems"]] == [os.fsencode(logs) + b"/nope\xff"]
    assert done.err.count("\n") == 1
    assert len(run("stat", out, env=env).out.splitlines()) == 3


def write_lines(path: Path, size: int) -> int:
    """Ordinary lines of some 100 bytes; returns how many."""
    block = b"".join(b"%08d %s\n" % (number, b"x" * (60 + number % 64)) for number in range(10_000))
    turns = -(-size // len(block))
    with path.open("wb") as file:
        for _ in range(turns):
            file.write(block)
    return turns * 10_000


@pytest.fixture(scope="module")
def big() -> Iterator[tuple[Path, int]]:
    """300 MB of lines, and how many; on a disk in memory if there is one, and gone afterwards."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and os.access(shm, os.W_OK) and _free(shm) > 2 << 30
    with tempfile.TemporaryDirectory(prefix="offload-test-", dir=shm if roomy else None) as name:
        path = Path(name) / "big.log"
        yield path, write_lines(path, 300_000_000)


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


# Runs the command in this process and tells the peak of its memory, as the kernel counts it.
MEASURE = """
import resource, runpy, sys
code = 0
if len(sys.argv) > 1:
    try:
        runpy.run_module("offload", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("peak", peak[0], file=sys.stderr)
sys.exit(code)
"""


def peak(*arguments: Argument) -> int:
    """The most memory, in bytes, that the command used at any time."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        capture_output=True,
        timeout=AMPLE,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    found = re.findall(rb"^peak (\d+)$", done.stderr, re.MULTILINE)
    return int(found[-1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
@pytest.mark.parametrize("kind", ["one line of 100 MB", "300 MB of lines"])
def test_memory_does_not_grow_with_the_sources(big: tuple[Path, int], kind: str) -> None:
    """A merge stays within 64 MiB over the bare interpreter, for one line of 100 MB and for 300 MB of ordinary ones."""
    path, lines = big
    folder = path.parent / "memory"
    folder.mkdir()
    try:
        if kind.startswith("one"):
            path, lines = folder / "line", 1
            with path.open("wb") as file:
                for _ in range(100):
                    file.write(b"x" * 1_000_000)
        out = folder / "out.opk"
        used = peak("merge", path, "-o", out, "--fsync", "none") - peak()
        assert used <= 64 << 20, f"{used >> 20} MiB over the interpreter"
        found = verify(out)
        assert found.ok
        assert found.lines == lines
        split(out, folder / "back")
        assert filecmp.cmp(path, folder / "back" / path.name, shallow=False)
    finally:
        for child in sorted(folder.rglob("*"), reverse=True):
            child.rmdir() if child.is_dir() else child.unlink()
        folder.rmdir()


@pytest.mark.slow
def test_a_line_of_many_frames_through_cat(logs: Path, out: Path) -> None:
    """A line longer than any buffer comes out of cat whole, as text and as JSON."""
    data = b"short\n" + b"x" * 5_000_000 + b"\nlast"
    (logs / "a").write_bytes(data)
    run("merge", logs, "-o", out)
    assert run("cat", out).out == data
    assert run("cat", "--prefix", out).out == b"".join(b"a: " + line for line in data.splitlines(keepends=True))
    assert [len(json.loads(line)["text"]) for line in run("cat", "--json", out).out.splitlines()] == [5, 5_000_000, 4]


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, few_descriptors], ids=["as it is", "256 descriptors"])
def test_two_thousand_files(logs: Path, out: Path, tmp_path: Path, limit: Callable[[], None] | None) -> None:
    """Many files are merged, followed and taken apart, also where a process may open few at once."""
    for number in range(2000):
        (logs / f"{number}.log").write_bytes(b"line of %d\n" % number)
    done = run("merge", logs, "-o", out, "--json", preexec_fn=limit).json
    assert (done["sources"], done["lines"], done["problems"]) == (2000, 2000, {})
    with started("merge", "-f", logs, "-o", out, "--json", preexec_fn=limit) as merge:
        for name in ("7.log", "1999.log", "new.log"):
            append(logs / name, b"more\n")
        until(holds(out, 2003), merge)
        append(logs / "7.log", b"and more\n")
        until(holds(out, 2004), merge)
        merge.send_signal(signal.SIGINT)
        assert ended(merge).err == ""
    run("split", "-q", out, "-d", tmp_path / "back", preexec_fn=limit)
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted(p.name for p in logs.iterdir())
    assert not filecmp.cmpfiles(logs, tmp_path / "back", [p.name for p in logs.iterdir()], shallow=False)[1]
    assert (tmp_path / "back" / "7.log").read_bytes() == b"line of 7\nmore\nand more\n"


# Runs the command twice: once to load all that it needs while that can be read, and then as somebody else.
UNPRIVILEGED = """
import os, runpy, sys
warm, arguments = sys.argv[1].split("\\n"), sys.argv[2:]
for run in (warm, arguments):
    if run is arguments and os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    sys.argv = ["offload", *run]
    for name in [name for name in sys.modules if name == "offload.__main__"]:
        del sys.modules[name]
    try:
        runpy.run_module("offload", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
sys.exit(code)
"""


@pytest.mark.slow
def test_a_file_that_may_not_be_read_does_not_hold_up_the_rest() -> None:
    """What may not be read is told in one line with exit code 1, the rest is merged; allowed, it comes too."""
    with tempfile.TemporaryDirectory(prefix="offload-test-") as name:
        folder = Path(name)
        if any(not parent.stat().st_mode & 0o001 for parent in folder.parents):
            pytest.skip("nobody else can reach the folder for temporary files")
        for below in (folder, folder / "logs", folder / "logs" / "closed"):
            below.mkdir(exist_ok=True)
            below.chmod(0o777)
        for log in ("a", "secret", "z", "closed/c"):
            (folder / "logs" / log).write_bytes(log.encode() + b"\n")
        (folder / "logs" / "secret").chmod(0)
        (folder / "logs" / "closed").chmod(0)
        logs, out = str(folder / "logs"), str(folder / "out.opk")
        warm = "\n".join(["merge", "-q", logs + "/a", "-o", str(folder / "warm.opk")])
        try:
            done = subprocess.run(
                [sys.executable, "-c", UNPRIVILEGED, warm, "merge", logs, "-o", out, "--json"],
                capture_output=True,
                timeout=AMPLE,
                check=False,
            )
            if b"setgroups" in done.stderr or b"setuid" in done.stderr:
                pytest.skip("may not act as somebody else")
            assert done.returncode == 1, done.stderr
            assert done.stderr.decode().splitlines() == [
                f"offload: {logs}/closed: Permission denied",
                f"offload: {logs}/secret: Permission denied",
            ]
            report = json.loads(done.stdout)
            assert (report["sources"], report["lines"], report["complete"]) == (3, 2, False)
            assert set(report["problems"]) == {f"{logs}/closed", f"{logs}/secret"}
        finally:
            (folder / "logs" / "closed").chmod(0o777)
            (folder / "logs" / "secret").chmod(0o666)
        assert run("merge", logs, "-o", out, "--json").json["lines"] == 2
        assert sorted(run("cat", out).out.splitlines()) == [b"a", b"closed/c", b"secret", b"z"]


@pytest.mark.slow
def test_a_fifo_is_refused_and_not_waited_for(logs: Path, out: Path) -> None:
    """A FIFO that nobody writes is no source; alone it is an error, among others it is told."""
    os.mkfifo(logs / "fifo")
    fails("merge", logs / "fifo", "-o", out, code=1, says=".*/fifo: no regular file, folder or glob")
    assert not out.exists()
    (logs / "a").write_bytes(b"one\n")
    done = run("merge", logs / "fifo", logs, "-o", out, code=1)
    assert done.err.splitlines()[0].endswith("/fifo: no regular file, folder or glob")
    assert verify(out).lines == 1


# --- where it goes ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """A disk of 2 MB on this folder; what it yields makes it larger."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "offload-test", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk")

    def enlarge() -> None:
        subprocess.run(["mount", "-o", "remount,size=32m", folder], check=True, capture_output=True)

    try:
        yield enlarge
    finally:
        subprocess.run(["umount", folder], check=True, capture_output=True)


@contextlib.contextmanager
def no_limits() -> Iterator[Callable[[], None]]:
    yield lambda: None


def no_large_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode"), [("full disk", "ends"), ("limit", "ends"), ("limit", "follows")])
def test_a_full_disk_costs_nothing_that_was_written(logs: Path, tmp_path: Path, kind: str, mode: str) -> None:
    """One line and exit code 4; what was written stays and verifies; with room, a later run completes it, once."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk) if kind == "full disk" else no_limits() as enlarge:
        out = disk / "merged.opk"
        write_lines(logs / "a", 5_000_000)
        (logs / "b").write_bytes(b"small\n")
        flags = ["-f"] if mode == "follows" else []
        limit = no_large_files if kind == "limit" else None
        reason = "No space left on device" if kind == "full disk" else "File too large"
        told = f"{out}: {reason}; what is in it stays, start again to go on"
        fails("merge", *flags, logs, "-o", out, code=4, says=re.escape(told), preexec_fn=limit)
        fails("merge", *flags, logs, "-o", out, code=4, says=re.escape(told), preexec_fn=limit)
        found = verify(out)
        assert found.ok
        assert found.lines > 1000
        enlarge()
        run("merge", "-q", logs, "-o", out)
        assert restored(out, tmp_path / "back") == {name: (logs / name).read_bytes() for name in "ab"}


FULL = r"offload: {out}: No space left on device; waits for room, nothing is lost; Ctrl-C ends it"


@pytest.mark.slow
def test_follow_waits_for_room_and_goes_on(logs: Path, tmp_path: Path) -> None:
    """On a full disk the file ends with a whole frame, logs grow and rotate, and with room all of it comes in, once."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk) as enlarge:
        out = disk / "merged.opk"
        write_lines(logs / "a", 5_000_000)
        command = "merge", "-f", logs, "-o", out, "--status", tmp_path / "status"  # for which there would be no room
        whole = b""

        def ends_with_a_frame() -> bool:
            """Each new try leaves a part of the next one there until it is cut back."""
            nonlocal whole
            whole = out.read_bytes()
            with FrameSource(out) as source:
                return [frame.end for frame in source][-1] == len(whole)

        with (tmp_path / "told").open("wb") as told, started(*command, stderr=told) as process:
            until(lambda: b"waits" in (tmp_path / "told").read_bytes(), process)
            assert verify(out).lines > 1000
            assert verify(out).faults == []
            until(ends_with_a_frame, process)
            (logs / "a").rename(logs / "a.1")
            (logs / "a").write_bytes(b"anew\n")
            (logs / "b").write_bytes(b"small\n")
            enlarge()
            lines = (logs / "a.1").read_bytes().count(b"\n") + 2
            until(holds(out, lines), process)
            process.send_signal(signal.SIGTERM)
            ended(process)
        first, second, summary = (tmp_path / "told").read_text().splitlines()
        assert first == FULL.format(out=out)
        assert second == f"offload: {out}: goes on"
        assert re.fullmatch(rf".*merged\.opk: {lines:,} lines .*", summary)
        assert out.read_bytes().startswith(whole), "a reader of what was there saw nothing vanish"
        assert run("cat", out, "-s", "a").out == (logs / "a.1").read_bytes() + b"anew\n"
        assert run("cat", out, "-s", "b").out == b"small\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_room(logs: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C or SIGTERM while it waits: exit code 4 at once, whole frames, and the next run goes on behind them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk) as enlarge:
        out = disk / "merged.opk"
        write_lines(logs / "a", 5_000_000)
        with started("merge", "-f", logs, "-o", out, "--status", tmp_path / "status", bufsize=0) as process:
            assert read_line(process.stderr).decode().rstrip() == FULL.format(out=out)
            process.send_signal(number)
            done = ended(process, 4)
        assert done.err == f"offload: {out}: No space left on device; what is in it stays, start again to go on\n"
        found = verify(out)
        assert (found.faults, found.torn) == ([], 0)
        assert found.lines > 1000
        enlarge()
        run("merge", "-q", logs, "-o", out)
        assert restored(out, tmp_path / "back") == {"a": (logs / "a").read_bytes()}


@pytest.mark.slow
def test_an_output_that_cannot_be_made(logs: Path, out: Path, tmp_path: Path) -> None:
    """A folder, a missing folder, a FIFO or another file as output: one line that names it, and nothing is touched."""
    (logs / "a").write_bytes(b"one\n")
    fails("merge", logs, "-o", logs, code=4, says=f"{logs}: Is a directory")
    fails("merge", logs, "-o", tmp_path / "no" / "x.opk", code=4, says=".*/no/x.opk: No such file or directory")
    os.mkfifo(tmp_path / "fifo")
    fails(
        "merge",
        logs,
        "-o",
        tmp_path / "fifo",
        code=4,
        says=".*/fifo: no regular file; a packet file cannot be written there",
    )
    novel = tmp_path / "novel.txt"
    novel.write_bytes(b"It was a dark and stormy night.\n" * 9)
    fails(
        "merge",
        logs,
        "-o",
        novel,
        code=3,
        says=".*: no packet file: found 49 74 20 77, expected .*; it was not touched",
    )
    assert novel.read_bytes() == b"It was a dark and stormy night.\n" * 9


@pytest.mark.slow
def test_the_output_in_the_source_folder_is_not_merged(logs: Path, tmp_path: Path) -> None:
    """`offload merge . -o merged.opk`, again and again, takes in the logs and never the packet file."""
    (logs / "a").write_bytes(b"one\n")
    for lines in (1, 0):
        done = run("merge", ".", "-o", "merged.opk", "--json", cwd=logs).json
        assert (done["sources"], done["lines"]) == (1, lines)
    with started("merge", "-f", ".", "-o", "merged.opk", cwd=logs) as merge:
        append(logs / "a", b"two\n")
        until(holds(logs / "merged.opk", 2), merge)
        merge.send_signal(signal.SIGTERM)
        ended(merge)
    assert restored(logs / "merged.opk", tmp_path / "back") == {"a": b"one\ntwo\n"}


@pytest.mark.slow
def test_links_to_one_file_are_one_source(logs: Path, out: Path) -> None:
    """Whatever names a file has, its lines come once."""
    (logs / "a").write_bytes(b"one\n")
    (logs / "hard").hardlink_to(logs / "a")
    (logs / "soft").symlink_to("a")
    assert run("merge", logs, logs / "soft", "-o", out, "--json").json["sources"] == 1
    assert run("cat", out).out == b"one\n"


@pytest.mark.slow
def test_a_second_merge_into_the_same_file_is_refused(logs: Path, out: Path) -> None:
    """Exit code 5 and one line that says what to do; the first merge does not notice."""
    (logs / "a").write_bytes(b"one\n")
    with started("merge", "-f", logs, "-o", out) as merge:
        until(holds(out, 1), merge)
        fails("merge", logs, "-o", out, code=5, says=".* is being written by somebody else; wait for it or write .*")
        append(logs / "a", b"two\n")
        until(holds(out, 2), merge)
        merge.send_signal(signal.SIGINT)
        ended(merge)
    assert run("cat", out).out == b"one\ntwo\n"


# --- again, and until it is stopped -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_started_again_it_goes_on(logs: Path, out: Path, tmp_path: Path) -> None:
    """What was added between two runs is taken in once, also to a line that had no end."""
    path = logs / "a"
    path.write_bytes(b"one\ntw")
    (logs / "b").write_bytes(b"other")
    for addition, lines in ((b"", 3), (b"o\nthree\nfo", 2), (b"", 0), (b"ur", 0), (b"\n", 0), (b"five\n", 1)):
        append(path, addition)
        assert run("merge", logs, "-o", out, "--json").json["lines"] == lines
    assert {s["name"]: s["lines"] for s in run("stat", out, "--json").json["sources"]} == {"a": 5, "b": 1}
    assert restored(out, tmp_path / "back") == {"a": b"one\ntwo\nthree\nfour\nfive\n", "b": b"other"}
    assert run("cat", out, "-s", "a").out == b"one\ntwo\nthree\nfour\nfive\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_follow_with_everything_in(logs: Path, out: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C or SIGTERM ends `merge -f` with exit code 0; lines, files and a partial line of the last moment are in."""
    (logs / "a").write_bytes(b"one\n")
    with started("merge", "-f", logs, "-o", out) as merge:
        until(holds(out, 1), merge)
        append(logs / "a", b"two\n")
        (logs / "b").write_bytes(b"new\n")
        until(holds(out, 3), merge)
        append(logs / "a", b"three\npart")
        (logs / "c").write_bytes(b"last moment\n")
        merge.send_signal(number)
        done = ended(merge)
    assert re.fullmatch(r".*merged\.opk: 6 lines \(\d+ B\) from 3 sources in .* s\n", done.err)
    assert restored(out, tmp_path / "back") == {"a": b"one\ntwo\nthree\npart", "b": b"new\n", "c": b"last moment\n"}
    with started("merge", "-f", logs, "-o", out) as merge:
        append(logs / "a", b"ial\n")
        until(lambda: b"partial" in run("cat", out).out, merge)
        merge.send_signal(number)
        ended(merge)
    assert run("cat", out, "-s", "a").out == b"one\ntwo\nthree\npartial\n"


@pytest.mark.slow
def test_follow_through_rename_and_truncation(logs: Path, out: Path) -> None:
    """A renamed file is read to its end and then its successor; a truncated one leaves a gap that everybody tells."""
    with (logs / "app.log").open("ab", buffering=0) as old, started("merge", "-f", logs, "-o", out) as merge:
        old.write(b"1\n")
        until(holds(out, 1), merge)
        (logs / "app.log").rename(logs / "app.log.1")
        old.write(b"2\n")
        until(
            holds(out, 2), merge
        )  # else it may find the new file just when it has read the old one, and go back to that
        (logs / "app.log").write_bytes(b"3\n")
        until(holds(out, 3), merge)
        os.truncate(logs / "app.log", 0)
        append(logs / "app.log", b"four\n")
        until(holds(out, 4), merge)
        merge.send_signal(signal.SIGINT)
        assert ", 1 gap\n" in ended(merge).err
    assert run("cat", out).out == b"1\n2\n3\nfour\n"
    told = run("verify", out).out.decode()
    assert "stated as lost: app.log from byte 2 to its end: truncated" in told
    entry = run("stat", "--json", out).json["sources"][0]
    assert (entry["lines"], entry["generation"], entry["gaps"]) == (4, 2, 1)
    assert [gap["reason"] for gap in run("verify", "--json", out).json["gaps"]] == ["truncated"]


HELD_DISK = """
import os, threading
from offload.cli import main
from offload.files.append import AppendFile
from offload.merge.engine import Merge
sync, stop, asked = AppendFile.sync, Merge.stop, threading.Event()
def hold(self):  # from the first megabyte on, until the merge was asked to stop
    if os.fstat(self.fd).st_size > 1_000_000:
        asked.wait()
    sync(self)
def stop_and_tell(self):
    stop(self)
    asked.set()
AppendFile.sync, Merge.stop = hold, stop_and_tell
main()
"""


@pytest.mark.slow
def test_a_batch_merge_that_is_interrupted_goes_on_later(big: tuple[Path, int]) -> None:
    """Stopped before its end, a merge without -f ends with 1 and says so; started again it completes, exactly once."""
    path, lines = big
    out = path.parent / "interrupted.opk"
    try:
        command = [sys.executable, "-c", HELD_DISK]
        with started("merge", path, "-o", out, "--json", "--fsync", "always", command=command) as merge:
            until(lambda: out.exists() and out.stat().st_size > 1_000_000, merge)
            merge.send_signal(signal.SIGINT)
            done = ended(merge, code=1)
        assert done.err == "offload: stopped before the end; start it again to go on\n"
        assert done.json["complete"] is False
        first = verify(out)
        assert first.ok
        assert 0 < first.lines == done.json["lines"] < lines
        again = run("merge", path, "-o", out, "--json", "--fsync", "none").json
        assert again["lines"] + first.lines == lines
        assert again["complete"] is True
        run("verify", out)
        with FrameSource(out) as source, path.open("rb") as original:
            for frame in source:
                if frame.header.type is FrameType.LINES:
                    assert frame.payload == original.read(len(frame.payload))
            assert original.read() == b""
    finally:
        out.unlink(missing_ok=True)


HUNG_DISK = """
import time
from offload.files.append import AppendFile
AppendFile.sync = lambda self: time.sleep(600)  # no disk can be made to hang without a kernel module
from offload.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_asked_twice_it_ends_at_once(logs: Path, out: Path, second: signal.Signals) -> None:
    """With a disk that hangs, a second signal ends it: 130, one line, and what is in the file is right."""
    (logs / "a").write_bytes(b"one\n")
    command = [sys.executable, "-c", HUNG_DISK]
    while True:
        out.unlink(missing_ok=True)
        with started("merge", "-f", logs, "-o", out, "--fsync", "always", command=command) as merge:
            until(lambda: out.exists() and out.stat().st_size > 0, merge)  # its first frame is synced alone
            began = time.monotonic()
            merge.send_signal(signal.SIGINT)
            merge.send_signal(second)  # forwarded by a shell or a supervisor: it is the same one
            if time.monotonic() - began > 1:
                continue  # it came too late for that
            with pytest.raises(subprocess.TimeoutExpired):
                merge.wait(1.2)
            deadline = time.monotonic() + AMPLE
            while merge.poll() is None and time.monotonic() < deadline:
                merge.send_signal(second)  # on a busy machine the first may have come to it only now
                with contextlib.suppress(subprocess.TimeoutExpired):
                    merge.wait(1.2)
            done = ended(merge, code=130)
            break
    assert done.err == "offload: left at once; start it again to go on\n"
    assert run("merge", logs, "-o", out, "--json").out
    assert run("cat", out).out == b"one\n"


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.2, 1.0])
def test_ctrl_c_ends_the_demo(tmp_path: Path, after: float) -> None:
    """Whoever has seen enough of the demo does not have to kill it."""
    with started("demo", "--dir", tmp_path / "demo") as demo:
        until(lambda: (tmp_path / "demo" / "logs" / "api.log").exists(), demo)
        time.sleep(after)  # early and late in what it does; it tells of neither moment
        demo.send_signal(signal.SIGINT)
        assert ended(demo, code=130).code == 130


@pytest.mark.slow
def test_split_of_a_file_that_grows_takes_what_was_there(logs: Path, out: Path, tmp_path: Path) -> None:
    """What is in it before split begins comes out whole; of sources that appear meanwhile there may be a beginning."""
    content = b"line\n" * 1000
    with contextlib.ExitStack() as stack:
        merge = stack.enter_context(started("merge", "-f", logs, "-o", out))
        splits = {}
        for number in range(200):
            (logs / f"{number}.log").write_bytes(content)
            time.sleep(0.01)  # it grows all the while that a split runs
            if number % 40 == 20:
                until(holds(out, 1000 * (number + 1)), merge)
                splits[number] = stack.enter_context(started("split", "-d", tmp_path / f"back{number}", out))
        for process in splits.values():
            ended(process)
        merge.send_signal(signal.SIGTERM)
        ended(merge)
    for last in splits:
        back = tmp_path / f"back{last}"
        assert all((back / f"{number}.log").read_bytes() == content for number in range(last + 1))
        assert all(content.startswith(file.read_bytes()) for file in back.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "", "-o", "x.opk"], "a path is empty, expected a file, folder or glob; is a variable unset?"),
        (["merge", "a", "-o", os.devnull], f"{os.devnull}: no regular file; a packet file cannot be written there"),
    ],
)
def test_arguments_that_mean_something_else(tmp_path: Path, arguments: list[str], message: str) -> None:
    """An unset variable is not the working folder, and a device keeps no packet file."""
    (tmp_path / "a").write_bytes(b"1\n")
    done = run(*arguments, cwd=tmp_path, code=2 if "" in arguments else 4)
    assert done.err == f"offload: {message}\n"


def test_packet_files_in_a_folder_are_no_sources(logs: Path) -> None:
    """Two merges of one folder into itself do not feed each other."""
    (logs / "a").write_bytes(b"1\n")
    for name in ("x.opk", "y.opk"):
        assert b'"sources": 1' in run("merge", logs, "-o", logs / name, "--json").out


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_summaries_and_quiet(logs: Path, out: Path, tmp_path: Path) -> None:
    """By default one line on stderr, with --quiet none, with --json only JSON on stdout."""
    (logs / "a").write_bytes(b"one\n")
    done = run("merge", logs, "-o", out)
    assert done.out == b""
    assert re.fullmatch(r".*merged\.opk: 1 line \(4 B\) from 1 source in \d+\.\d\d s\n", done.err)
    assert run("merge", "--quiet", logs, "-o", out) == (0, b"", "")
    assert run("merge", "--json", logs, "-o", out).err == ""
    assert run("verify", "--quiet", out) == (0, b"", "")
    assert run("verify", out).out.decode() == (
        f"{out}: every checksum and every sequence holds (4 frames, 1 line, 1 source)\n"
    )
    assert run("split", "--quiet", out, "-d", tmp_path / "one") == (0, b"", "")
    assert run("split", out, "-d", tmp_path / "two") == (0, b"", f"{tmp_path / 'two'}: 1 file, 4 B\n")


@pytest.mark.slow
def test_json_of_every_command(logs: Path, out: Path, tmp_path: Path) -> None:
    """Each --json is one JSON document (cat: one a line) with these fields."""
    (logs / "a").write_bytes("größe\n".encode())
    (logs / "b").write_bytes(b"\xff")
    merged = run("merge", logs, logs / "nope", "-o", out, "--json", code=1).json
    assert merged.pop("seconds") > 0
    assert merged == {
        "output": str(out),
        "sources": 2,
        "lines": 2,
        "bytes": 9,
        "gaps": 0,
        "regressions": 0,
        "problems": {str(logs / "nope"): "no such file, and no file matches"},
        "complete": False,
    }
    found = run("verify", out, "--json").json
    assert len(bytes.fromhex(found.pop("chain"))) == 32
    assert found == {
        "file": str(out),
        "ok": True,
        "complete": True,
        "size": out.stat().st_size,
        "frames": 6,
        "sources": 2,
        "lines": 2,
        "torn_bytes": 0,
        "being_written": False,
        "faults": [],
        "gaps": [],
        "regressions": [],
        "segments": ["merged.opk"],
        "segments_gone": 0,
    }
    told = run("stat", out, "--json").json
    assert (told["file"], told["size"]) == (str(out), out.stat().st_size)
    first = told["sources"][0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", first.pop("first_time"))
    assert first.pop("last_time")
    assert first == {"name": "a", "path": str(logs / "a"), "lines": 1, "bytes": 8, "generation": 0, "gaps": 0}
    parts = run("split", out, "-d", tmp_path / "back", "--json").json
    assert parts == {"files": {str(tmp_path / "back" / "a"): 8, str(tmp_path / "back" / "b"): 1}, "incomplete": {}}
    a, b = [json.loads(line) for line in run("cat", out, "--json").out.splitlines()]
    assert a.pop("time_ns") > 1_600_000_000 * 10**9
    assert b.pop("time_ns") > 1_600_000_000 * 10**9
    assert a == {"source": "a", "seq": 0, "text": "größe"}
    assert b == {"source": "b", "seq": 0, "unterminated": True, "base64": base64.b64encode(b"\xff").decode()}


@pytest.mark.slow
def test_what_is_wrong_with_a_file_is_told(logs: Path, out: Path, tmp_path: Path) -> None:
    """verify says where and ends with 1; cat, stat and split with 3 and one line; what is whole before it comes out."""
    (logs / "a").write_bytes(b"one\n")
    (logs / "b").write_bytes(b"two\n")
    run("merge", logs, "-o", out)
    data = bytearray(out.read_bytes())
    at = data.rfind(b"two\n")
    data[at] ^= 1
    out.write_bytes(data)
    done = run("verify", out, code=1)
    assert f"{out}: byte {at - 64}: 68 bytes hold no valid frame: payload checksum is" in done.out.decode()
    assert run("verify", "-q", out, code=1).out.count(b"\n") >= 1
    faults = run("verify", "--json", out, code=1).json["faults"]
    assert faults[0]["offset"] == at - 64
    says = rf"offload: .*merged\.opk: byte {at - 64}: payload checksum is .*\n"
    done = run("cat", out, code=3)
    assert done.out == b"one\n"
    assert re.fullmatch(says, done.err)
    done = run("split", out, "-d", tmp_path / "back", code=3)
    assert re.fullmatch(r"offload: .*; what stands before it was written to .*back\n", done.err)
    assert (tmp_path / "back" / "a").read_bytes() == b"one\n"


@pytest.mark.slow
def test_a_torn_tail_is_told_by_readers_and_cut_by_the_next_merge(logs: Path, out: Path) -> None:
    """A file that ends in the middle of a frame: verify 1, cat 3 with all whole lines; the next merge repairs it."""
    (logs / "a").write_bytes(b"one\n")
    run("merge", logs, "-o", out)
    os.truncate(out, out.stat().st_size - 1)
    assert b"torn tail" in run("verify", out, code=1).out
    done = run("cat", out, code=3)
    assert done.out == b"one\n"
    assert "torn tail" in done.err
    assert done.err.count("\n") == 1
    run("merge", "-q", logs, "-o", out)
    assert run("cat", out).out == b"one\n"
    run("verify", out)


@pytest.mark.slow
def test_a_live_file_verifies(logs: Path, out: Path) -> None:
    """While a merge writes, verify, cat and stat read the file and are content."""
    (logs / "a").write_bytes(b"one\n")
    with started("merge", "-f", logs, "-o", out) as merge:
        until(holds(out, 1), merge)
        found = run("verify", "--json", out).json
        assert found["being_written"] is True
        assert found["ok"] is True
        assert run("cat", out).out == b"one\n"
        assert run("stat", "--json", out).json["sources"][0]["lines"] == 1
        merge.send_signal(signal.SIGINT)
        ended(merge)


MISUSE: list[tuple[Sequence[str], str]] = [
    (["merge"], r"Missing argument 'PATH\.\.\.', or sources in a --config file; see offload merge --help"),
    (["merge", "a"], r"Missing option '--output' / '-o', or output in a --config file; see offload merge --help"),
    (
        ["merge", "a", "-o", "x", "--fsync", "often"],
        r"--fsync: found 'often', expected none, interval or always; see offload merge --help",
    ),
    (["merge", "--nope"], r"No such option: --nope.*; see offload merge --help"),
    (["cat"], r"Missing argument 'FILE'; see offload cat --help"),
    (["split", "x.opk"], r"Missing option '--directory' / '-d'; see offload split --help"),
    (["nope"], r"No such command 'nope'; see offload --help"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), MISUSE, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_wrong_usage_is_one_line_and_2(arguments: Sequence[str], says: str) -> None:
    """Wrong usage says what is wrong and where to look, in one line, with exit code 2."""
    fails(*arguments, code=2, says=says)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["merge", "nope", "-o", "x.opk"], 1, r".*/nope: no such file, and no file matches"),
        (["merge", "*.nope", "void", "-o", "x.opk"], 1, r".*/\*\.nope: no such file, and no file matches"),
        (["merge", "void", "-o", "x.opk"], 1, r"void: no files in there"),
        (["verify", "nope.opk"], 3, "nope.opk: No such file or directory"),
        (["verify", "void"], 3, "void: Is a directory"),
        (["verify", "text"], 3, "text: no packet file: found 61 20 6c 6f, expected the magic ff 4f 50 4b"),
        (["cat", "nope.opk"], 3, "nope.opk: No such file or directory"),
        (["cat", "void"], 3, "void: Is a directory"),
        (["cat", "text"], 3, "text: no packet file: found 61 20 6c 6f, expected the magic ff 4f 50 4b"),
        (["cat", "-f", "text"], 3, "text: no packet file: found .*"),
        (["cat", "good.opk", "-s", "x"], 2, "no source 'x' in good.opk; there are 1: log"),
        (["stat", "nope.opk"], 3, "nope.opk: No such file or directory"),
        (["stat", "text"], 3, "text: no packet file: found 61 20 6c 6f, expected the magic ff 4f 50 4b"),
        (["split", "text", "-d", "back"], 3, "text: no packet file: found .*"),
        (["split", "nope.opk", "-d", "back"], 3, "nope.opk: No such file or directory"),
        (["split", "good.opk", "-d", "."], 4, "log is there already; give an empty folder, or --force"),
        (["split", "good.opk", "-d", "text"], 4, "text is there already; give an empty folder, or --force"),
        (["demo", "--dir", "."], 4, r".*: the folder holds other files; give an empty or a new one"),
        (["demo", "--dir", "text"], 4, r"text: Not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_error_is_one_line_with_its_code(
    tmp_path: Path, good: Path, arguments: list[str], code: int, says: str
) -> None:
    """Each error tells what was found, where and what to do, in one line, with the exit code of the list in --help."""
    (tmp_path / "void").mkdir()
    (tmp_path / "log").write_bytes(b"one\n")
    (tmp_path / "text").write_bytes(b"a log, not a packet file\n" * 9)
    (tmp_path / "good.opk").write_bytes(good.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    fails(*arguments, code=code, says=says, cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_names_cannot_forge_messages(logs: Path, out: Path) -> None:
    """A line end or an escape sequence in a name does not become one on the terminal."""
    done = run("merge", logs / "no\nsuch\x1b[2J file", "-o", out, code=1)
    assert done.err.count("\n") == 1
    assert "\x1b" not in done.err
    assert r"no\nsuch\x1b[2J file" in done.err


@pytest.mark.slow
def test_help_and_version() -> None:
    """--version and --help end with 0; every command's help lists the exit codes."""
    assert re.fullmatch(rb"offload \d+\.\d+\.\d+\n", run("--version").out)
    for command in ("merge", "cat", "verify", "split", "stat", "demo"):
        text = " ".join(run(command, "--help").out.decode().split())
        assert "5 somebody else writes the packet file" in text


BUFFERED_AND_NOT = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])


def with_stdout(unbuffered: str) -> dict[str, str]:
    """An environment; unbuffered as in many containers."""
    return {**os.environ, "PYTHONUNBUFFERED": unbuffered}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@BUFFERED_AND_NOT
@pytest.mark.parametrize(
    "command",
    [
        ["cat"],
        ["cat", "--json"],
        ["verify"],
        ["stat"],
        ["stat", "--json"],
        ["verify", "--json"],
        ["verify", "--complete"],
    ],
)
def test_output_that_cannot_be_written_is_4(good: Path, command: list[str], unbuffered: str) -> None:
    """Where stdout takes no more, the command says so in one line and ends with 4, whatever it prints."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *command, good],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=AMPLE,
            check=False,
            env=with_stdout(unbuffered),
        )
    assert done.stderr.decode() == "offload: stdout: No space left on device\n"
    assert done.returncode == 4


def test_closed_standard_streams_do_no_harm(logs: Path, out: Path) -> None:
    """Started without stdout and stderr, as some daemons are, it does its work, and no message lands in its files."""
    (logs / "a").write_bytes(b"one\n")
    script = f'exec "{sys.executable}" -m offload merge --json "$0" "$0/nope" -o "$1" >&- 2>&-'
    done = subprocess.run(["sh", "-c", script, logs, out], timeout=AMPLE, check=False)
    assert done.returncode == 1
    found = verify(out)
    assert found.ok
    assert found.lines == 1


# --- on a terminal and in pipes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_status_line_on_a_terminal_and_nothing_in_a_pipe(logs: Path, out: Path, tmp_path: Path) -> None:
    """On a terminal the merge tells what it does; in a pipe there is no status line and no escape code."""
    (logs / "a").write_bytes(b"one\n" * 1000)
    master, slave = pty.openpty()
    try:
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        piped_env = {**env, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}
        other = tmp_path / "other.opk"
        with (
            started("merge", "-f", logs, "-o", out, stderr=slave, env=env) as shown,
            started("merge", "-f", logs, "-o", other, env=piped_env) as piped,
            started("merge", "-f", "--quiet", logs, "-o", tmp_path / "quiet.opk", env=piped_env) as quiet,
        ):
            seen = b""
            while b"1 sources" not in seen or b"1,000 lines" not in seen or b"lag 0 B" not in seen:
                assert select.select([master], [], [], AMPLE)[0], seen
                seen += os.read(master, 65536)
            until(holds(other, 1000), piped)
            until(holds(tmp_path / "quiet.opk", 1000), quiet)
            for process in (shown, piped, quiet):
                process.send_signal(signal.SIGINT)
            assert ended(shown).out == b""
            while select.select([master], [], [], 0)[0]:
                seen += os.read(master, 65536)
            done = ended(piped)
            assert re.fullmatch(r".*other\.opk: 1,000 lines \(4\.0 kB\) from 1 source in .* s\n", done.err)
            assert done.out == b""
            assert ended(quiet) == (0, b"", "")
        assert b"\x1b[" in seen
        assert b"merged.opk: 1,000 lines" in seen  # the summary, behind it
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.slow
def test_cat_into_head_ends_in_silence(logs: Path, out: Path) -> None:
    """When its reader goes, cat ends by SIGPIPE as the system's own does, without a word."""
    (logs / "a").write_bytes(b"a line that is printed\n" * 200_000)
    run("merge", "-q", logs, "-o", out)
    for command in (["cat"], ["cat", "--json"], ["cat", "--prefix"]):
        with started(*command, out) as cat:
            assert b"a line that is printed" in read_line(cat.stdout)
            assert cat.stdout is not None
            cat.stdout.close()
            assert cat.wait(timeout=AMPLE) == -signal.SIGPIPE
            assert cat.stderr is not None
            assert cat.stderr.read() == b""


@pytest.mark.slow
@BUFFERED_AND_NOT
def test_stat_into_a_closed_pipe_ends_in_silence(good: Path, unbuffered: str) -> None:
    """What prints little ends quietly too when nobody reads it."""
    for command in ("stat", "verify"):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [*COMMAND, command, good],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=AMPLE,
            check=False,
            env=with_stdout(unbuffered),
        )
        os.close(writer)
        assert done.stderr == b""
        assert done.returncode == 1


@pytest.mark.slow
def test_cat_never_runs_two_lines_together(logs: Path, out: Path) -> None:
    """Last lines without their ends get one where another line follows, with and without names.

    They come last, for each could go on until the end of the file is reached.
    """
    for name in "abc":
        (logs / name).write_bytes(b"%s1\n%s2" % ((name.encode(),) * 2))
    run("merge", "-q", logs, "-o", out)
    assert run("cat", out).out == b"a1\nb1\nc1\na2\nb2\nc2"
    assert run("cat", "--prefix", out).out == b"a: a1\nb: b1\nc: c1\na: a2\nb: b2\nc: c2"
    assert run("cat", "--source", "b", out).out == b"b1\nb2"
    assert run("cat", "--source", "[ab]", out).out == b"a1\nb1\na2\nb2"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--prefix"], ["--json"]], ids=" ".join)
def test_cat_follows_through_a_killed_and_restarted_merge(logs: Path, out: Path, flags: list[str]) -> None:
    """`cat -f` shows each line once, in order, however the writer ended, and ends with 0 on Ctrl-C."""
    (logs / "a").write_bytes(b"1\n")

    def shown(number: int) -> bytes:
        line = read_line(cat.stdout).rstrip(b"\n")
        text = json.loads(line)["text"].encode() if flags == ["--json"] else line.removeprefix(b"a: ")
        assert text == b"%d" % number
        return line

    run("merge", "-q", logs, "-o", out)
    with started("cat", "-f", *flags, out, bufsize=0) as cat:
        shown(1)
        for turn in range(2, 6, 2):
            with started("merge", "-f", logs, "-o", out) as merge:
                append(logs / "a", b"%d\n" % turn)
                shown(turn)
                merge.kill()
                merge.wait()
            append(out, b"\xffOPK\x01\x01 torn")  # what a kill can leave
            append(logs / "a", b"%d\n" % (turn + 1))
            run("merge", "-q", logs, "-o", out)
            shown(turn + 1)
        cat.send_signal(signal.SIGINT)
        done = ended(cat)
        assert done.out == b""
        assert done.err == ""
    run("verify", out)


@pytest.mark.slow
def test_cat_follow_holds_a_line_back_until_it_is_whole(logs: Path, out: Path) -> None:
    """A line whose end is not there yet is not shown in two parts; at the end, what there is of it is."""
    (logs / "a").write_bytes(b"one\npar")
    run("merge", "-q", logs, "-o", out)
    with started("cat", "-f", out, bufsize=0) as cat:
        assert read_line(cat.stdout) == b"one\n"
        append(logs / "a", b"tial\nopen")
        run("merge", "-q", logs, "-o", out)
        assert read_line(cat.stdout) == b"partial\n"
        (logs / "b").write_bytes(b"behind it\n")  # shown: what was held back has been read by then
        run("merge", "-q", logs, "-o", out)
        assert read_line(cat.stdout) == b"behind it\n"
        cat.send_signal(signal.SIGINT)
        assert ended(cat).out == b"open"


def until_blocked(process: subprocess.Popen[bytes]) -> int:
    """It writes, and nobody reads; how many bytes wait in the pipe."""
    status, waiting = Path(f"/proc/{process.pid}/stat"), array.array("i", [0])

    def blocked() -> bool:
        fcntl.ioctl(cast("Any", process.stdout), termios.FIONREAD, waiting)
        return waiting[0] > 60_000 and status.read_text().rpartition(")")[2].split()[0] == "S"

    until(blocked, process)
    return waiting[0]


@pytest.mark.slow
def test_cat_follow_interrupted_amid_lines_adds_nothing_behind_them(logs: Path, out: Path) -> None:
    """What was printed until Ctrl-C is how the whole begins; a line held back has no place where another was cut."""
    (logs / "a").write_bytes(b"open")
    run("merge", "-q", logs, "-o", out)
    write_lines(logs / "b", 500_000)
    run("merge", "-q", logs, "-o", out)
    whole = run("cat", "--source", "b", out).out
    with started("cat", "-f", out, bufsize=0) as cat:
        waiting = until_blocked(cat)
        cat.send_signal(signal.SIGINT)
        shown = ended(cat).out
    assert len(shown) >= waiting
    assert whole.startswith(shown)
    assert len(shown) < len(whole)


@pytest.mark.slow
@BUFFERED_AND_NOT
def test_cat_that_is_stopped_amid_a_write_goes_on_with_all_of_it(logs: Path, out: Path, unbuffered: str) -> None:
    """Ctrl-Z and `fg` cut a write short; also where Python runs unbuffered, as in many containers, nothing is lost."""
    write_lines(logs / "a", 500_000)
    run("merge", "-q", logs, "-o", out)
    with started("cat", out, bufsize=0, env=with_stdout(unbuffered)) as cat:
        until_blocked(cat)
        cat.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, cat.pid, os.WSTOPPED)
        cat.send_signal(signal.SIGCONT)
        assert ended(cat).out == (logs / "a").read_bytes()


# --- the demo ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_proves_itself_in_under_15_seconds(tmp_path: Path) -> None:
    """What a newcomer runs first: it says what it does, proves it, and leaves the packet file."""
    folder = tmp_path / "demo"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("demo", "--dir", folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # What it computes; it also pauses for 3 s, and waits for what else the machine has to do.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 12
    text = done.out.decode()
    assert done.err == ""
    assert "Merged: 10000 lines" in text
    assert "every checksum and every sequence holds" in text
    assert "all 5 files are the same, byte for byte" in text
    assert f"The packet file is {folder / 'merged.opk'}" in text
    run("verify", folder / "merged.opk")
