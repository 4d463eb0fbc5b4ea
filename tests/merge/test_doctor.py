"""Each reason why a file is not read, made for real: folders that may not be entered, processes, mounts, merges."""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from offload.files.packet_file import PacketFile
from offload.merge import machine
from offload.merge.doctor import Finding, diagnose
from offload.merge.engine import Merge
from offload.merge.workload import pack

NOBODY = 65534
LINES = b"".join(b"line %d of a log\n" % number for number in range(100))


def seen(*arguments: Path | str, output: Path | None = None) -> list[Finding]:
    """What is found of the arguments, without the packet file and the machine."""
    found = diagnose([str(argument) for argument in arguments], output)
    return [f for f in found if f.path and f.kind != "packet-file"]


def only(*arguments: Path | str, output: Path | None = None) -> tuple[str, str, str, str]:
    """The one thing that is found: name, verdict, kind, text."""
    (finding,) = seen(*arguments, output=output)
    return os.path.basename(finding.path), finding.verdict.value, finding.kind, finding.text


async def merge(out: Path, *paths: Path | str) -> None:
    async with Merge([str(path) for path in paths], out) as engine:
        await engine.run()


def test_a_file_that_is_left_out_by_a_pattern(tmp_path: Path) -> None:
    """A file that include or exclude keeps out is told with the pattern that does."""
    for name in ("app.log", "app.log.1", "other.txt"):
        (tmp_path / name).write_bytes(name.encode() + LINES)
    for argument in (tmp_path, tmp_path / "*"):
        found = diagnose([str(argument)], include=["app*"], exclude=["*.1"])
        told = {os.path.basename(f.path): (f.verdict.value, f.kind, f.text.partition(";")[0]) for f in found if f.path}
        assert told == {
            "app.log": ("ok", "ok", f"can be read, {len(LINES) + 7:,} bytes"),
            "app.log.1": ("note", "excluded", "--exclude '*.1' matches it"),
            "other.txt": ("note", "excluded", "no --include matches it: 'app*'"),
        }


# --- what an argument names -------------------------------------------------------------------------------------------


def test_a_file_that_can_be_read(tmp_path: Path) -> None:
    """All is well."""
    (tmp_path / "app.log").write_bytes(LINES)
    assert only(tmp_path / "app.log") == ("app.log", "ok", "ok", f"can be read, {len(LINES):,} bytes")


def test_a_missing_file_and_its_nearest(tmp_path: Path) -> None:
    """A misspelt name is told with what it may have meant; so is a folder on the way."""
    (tmp_path / "nginx").mkdir()
    (tmp_path / "nginx" / "access.log").write_bytes(LINES)
    near = tmp_path / "nginx" / "access.log"
    assert only(tmp_path / "nginx" / "acces.log") == (
        "acces.log",
        "wrong",
        "missing",
        f"no such file; the nearest: {near}",
    )
    name, verdict, kind, text = only(tmp_path / "ngnix" / "deep" / "access.log")
    assert (name, verdict, kind) == ("access.log", "wrong", "missing")
    assert text == f"folder {tmp_path / 'ngnix'} is not there; the nearest: {tmp_path / 'nginx'}"
    assert only(near / "x")[3] == f"{near} is a file, expected a folder"


def test_a_link_to_nothing(tmp_path: Path) -> None:
    """The target is named."""
    (tmp_path / "app.log").symlink_to("gone.log")
    assert only(tmp_path / "app.log")[2:] == ("missing", "is a link to gone.log, which is not there")


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    """What is there that looks most like it; or that its folder is not."""
    (tmp_path / "app.log").write_bytes(LINES)
    assert only(tmp_path / "*.logs")[1:] == (
        "wrong",
        "no-match",
        f"no file matches; the nearest: {tmp_path / 'app.log'}",
    )
    (tmp_path / "logs").mkdir()
    assert only(tmp_path / "lgos" / "*" / "*.log") == (
        "*.log",
        "wrong",
        "missing",
        f"folder {tmp_path / 'lgos'} is not there; the nearest: {tmp_path / 'logs'}",
    )
    assert only(tmp_path / "logs")[2] == "no-match"


def test_what_is_left_out(tmp_path: Path) -> None:
    """Hidden files, packet files and links to folders are told, for a folder and for a glob."""
    for name in (".hidden", "merged.opk", "app.log"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "elsewhere").symlink_to("/")
    found = {(os.path.basename(f.path), f.kind): f.text for f in seen(tmp_path)}
    assert found.keys() == {(tmp_path.name, "excluded"), ("merged.opk", "excluded"), ("app.log", "ok")}
    assert [f.text.split(":")[0] for f in seen(tmp_path) if f.path == str(tmp_path)] == [
        "hidden files and folders in it are left out",
        "links to folders in it are not followed",
    ]
    assert [(os.path.basename(f.path), f.kind) for f in seen(tmp_path / "*")] == [
        ("merged.opk", "excluded"),
        ("app.log", "ok"),
    ]


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """FIFOs, sockets and devices are named as what they are, and not opened."""
    os.mkfifo(tmp_path / "fifo")
    assert only(tmp_path / "fifo")[2:] == ("not-regular", "is a FIFO, expected a regular file, a folder or a glob")
    assert only("/dev/null")[2:] == ("not-regular", "is a device, expected a regular file, a folder or a glob")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(tmp_path):
        server.bind("socket")
        assert only("socket")[2:] == ("not-regular", "is a socket, expected a regular file, a folder or a glob")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, as pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="offload-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def without_rights() -> Iterator[str]:
    """As somebody who is not root; gives the name."""
    if os.geteuid() != 0:
        yield machine.user()
        return
    os.seteuid(NOBODY)
    try:
        yield machine.user()
    finally:
        os.seteuid(0)


def test_no_permission_names_the_door(open_folder: Path) -> None:
    """A file that may not be read, and the first folder on the way that may not be entered, with the cure."""
    secret = open_folder / "private" / "deep" / "app.log"
    secret.parent.mkdir(parents=True)
    secret.write_bytes(LINES)
    door = open_folder / "private"
    own = open_folder / "own.log"
    own.write_bytes(LINES)
    own.chmod(0)
    door.chmod(0)
    rights = machine.rights(str(door))
    try:
        with without_rights() as me:
            assert only(own)[1:] == (
                "wrong",
                "no-permission",
                f"{me} may not read {own} ({machine.rights(str(own))}); setfacl -m u:{me}:r {own}",
            )
            for path in (secret, door / "*.log", door / "deep"):
                name, verdict, kind, text = only(path)
                assert (name, verdict, kind) == (path.name, "wrong", "no-permission")
                assert text.startswith(f"{me} may not ")
                assert f"{door} ({rights})" in text
    finally:
        door.chmod(0o700)


# --- what is in a file ------------------------------------------------------------------------------------------------


def test_empty(tmp_path: Path) -> None:
    """Nothing is wrong with an empty file, but one may wonder."""
    (tmp_path / "app.log").touch()
    assert only(tmp_path / "app.log")[1:] == ("note", "empty", "is empty: there is nothing to read yet")


def test_the_same_file_twice(tmp_path: Path) -> None:
    """A link to another of the files is read once."""
    (tmp_path / "app.log").write_bytes(LINES)
    os.link(tmp_path / "app.log", tmp_path / "web.log")
    kinds = {os.path.basename(f.path): f.kind for f in seen(tmp_path / "*.log")}
    assert kinds == {"app.log": "ok", "web.log": "same"}


def test_compressed(tmp_path: Path) -> None:
    """Packed files are read unpacked if their name says so; torn ones, other names and other formats are wrong."""
    files = {
        "good.log.gz": gzip.compress(LINES),
        "good.log.xz": lzma.compress(LINES),
        "torn.log.gz": gzip.compress(LINES)[:-9],
        "plain.log": gzip.compress(LINES),
        "other.log.bz2": b"BZh91AY",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = {os.path.basename(f.path): (f.verdict.value, f.text) for f in seen(tmp_path) if f.kind == "compressed"}
    assert found == {
        "good.log.gz": ("note", f"is packed with gzip, and read unpacked: {len(LINES):,} bytes"),
        "good.log.xz": ("note", f"is packed with xz, and read unpacked: {len(LINES):,} bytes"),
        "torn.log.gz": ("wrong", "gzip data is damaged or not complete yet"),
        "plain.log": (
            "wrong",
            "is packed with gzip, but its name does not end in .gz: its bytes would be merged as they are",
        ),
        "other.log.bz2": (
            "wrong",
            "is packed with bzip2, which is not unpacked: its bytes would be merged as they are",
        ),
    }


def test_a_copy(tmp_path: Path) -> None:
    """A rotated name whose bytes are the beginning of the log is a copy; one byte more, and it is not."""
    log, copy = tmp_path / "app.log", tmp_path / "app.log.1"
    log.write_bytes(LINES)
    copy.write_bytes(LINES[:1500])
    assert [(f.kind, f.detail) for f in seen(copy)] == [("copy", {"other": str(log)})]
    copy.write_bytes(LINES[:1500] + b"x")
    assert only(copy)[2] == "ok"


# --- the packet file --------------------------------------------------------------------------------------------------


async def test_how_far_it_was_read(tmp_path: Path) -> None:
    """Read to its end; behind, with nobody who reads; not in the packet file at all."""
    log, out = tmp_path / "app.log", tmp_path / "merged.opk"
    log.write_bytes(LINES)
    assert seen(log, output=out)[0].kind == "no-packet-file"
    await merge(out, log)
    size = len(LINES)
    assert only(log, output=out)[1:] == ("ok", "read", f"read to its end, byte {size:,}")
    with log.open("ab") as file:
        file.write(b"more\n")
    assert only(log, output=out)[1:] == (
        "wrong",
        "behind",
        f"read up to byte {size:,} of {size + 5:,}, 5 behind; no merge runs",
    )
    (tmp_path / "web.log").write_bytes(LINES)
    assert only(tmp_path / "web.log", output=out)[1:3] == ("wrong", "not-merged")


async def test_a_merge_that_runs(tmp_path: Path) -> None:
    """While somebody writes the packet file, a last line without its end is waited for, and new files are expected."""
    log, out = tmp_path / "app.log", tmp_path / "merged.opk"
    log.write_bytes(LINES)
    await merge(out, log)
    file = PacketFile(out)
    try:
        with log.open("ab") as program:
            program.write(b"begun")
        assert only(log, output=out)[1:3] == ("note", "unended")
        with log.open("ab") as program:
            program.write(b"\nmore\n")
        os.utime(log, (0, time.time() + 3600))  # just now, however long it takes to look
        assert only(log, output=out)[1:3] == ("ok", "behind")
        os.utime(log, ns=(0, 1_000_000_000_000_000_000))
        assert only(log, output=out)[1:3] == ("wrong", "behind")
        (tmp_path / "web.log").write_bytes(LINES)
        assert only(tmp_path / "web.log", output=out)[3].endswith("is it among its paths?")
    finally:
        file.close()


async def test_rotated(tmp_path: Path) -> None:
    """Where the file is that was read, plain or packed, and how much of it is not read; and what has its name now."""
    log, out, first = tmp_path / "app.log", tmp_path / "merged.opk", tmp_path / "app.log.1"
    log.write_bytes(LINES)
    await merge(out, log)
    with log.open("ab") as file:
        file.write(b"more\n")
    log.rename(first)
    size = len(LINES)
    was = f"rotated: what was read up to byte {size:,} is {first} now, 5 bytes of it not read"
    assert only(log, output=out)[1:] == ("wrong", "rotated", was)
    assert only(first, output=out)[3].startswith(f"is what {log} was; read up to byte {size:,} of {size + 5:,}")
    log.write_bytes(b"new\n")
    assert [(f.kind, f.text) for f in seen(log, output=out)] == [
        ("rotated", was),
        ("new-file", "is another file than the one that was read, with 4 bytes, none of them read yet"),
    ]
    with first.open("ab") as writer:
        found = seen(log, output=out)[0].text
        assert found == f"{was}; process {os.getpid()} ({machine_name()}) still writes to it"
        writer.flush()
    pack(first)
    assert seen(log, output=out)[0].text == was.replace("app.log.1", "app.log.1.gz")
    (tmp_path / "app.log.1.gz").unlink()
    assert [f.kind for f in seen(log, output=out)] == ["gone", "new-file"]


def machine_name() -> str:
    return Path("/proc/self/comm").read_text().strip()


async def test_truncated(tmp_path: Path) -> None:
    """The same file with less in it, or with something else, is told from one that was only read."""
    log, out = tmp_path / "app.log", tmp_path / "merged.opk"
    log.write_bytes(LINES)
    await merge(out, log)
    os.truncate(log, 0)
    with log.open("ab") as file:
        file.write(b"anew\n")
    assert only(log, output=out)[1:3] == ("wrong", "truncated")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_deleted_and_held(tmp_path: Path) -> None:
    """A file that was deleted while a program has it open: which one, and how much."""
    log, out = tmp_path / "app.log", tmp_path / "merged.opk"
    log.write_bytes(LINES)
    await merge(out, log)
    code = "import sys; f = open(sys.argv[1], 'ab'); f.write(b'more'); f.flush(); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, log], **pipes) as program:  # type: ignore[call-overload]  # noqa: ASYNC220
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdout.readline()
        log.unlink()
        (finding,) = seen(log)
        assert (finding.kind, finding.detail) == ("held-deleted", {"pid": program.pid, "size": len(LINES) + 4})
        assert [f.kind for f in seen(log, output=out)] == ["held-deleted", "held-deleted"]
        program.stdin.close()
    assert only(log)[2] == "missing"
    assert only(log, output=out)[2] == "gone"


def test_a_damaged_packet_file(tmp_path: Path) -> None:
    """What is no packet file is told; the files are looked at all the same."""
    (tmp_path / "app.log").write_bytes(LINES)
    (tmp_path / "merged.opk").write_bytes(LINES)
    kinds = [f.kind for f in seen(tmp_path / "app.log", output=tmp_path / "merged.opk")]
    assert kinds == ["damaged", "not-merged"]


# --- the machine ------------------------------------------------------------------------------------------------------


MOUNTS = """\
22 1 0:20 / / rw shared:1 - ext4 /dev/sda1 rw
30 22 0:30 / /mnt/with\\040space rw - nfs4 server:/logs rw
31 22 0:31 / /mnt/with\\040space/local rw - xfs /dev/sdb1 rw
32 22 0:32 / /data rw,relatime master:7 - fuse.sshfs me@host: rw
"""


@pytest.mark.parametrize(
    ("path", "mount"),
    [
        ("/var/log/app.log", None),
        ("/mnt/with space/app.log", ("/mnt/with space", "nfs4")),
        ("/mnt/with space", ("/mnt/with space", "nfs4")),
        ("/mnt/with spaces/app.log", None),
        ("/mnt/with space/local/app.log", None),
        ("/data/app.log", ("/data", "fuse.sshfs")),
    ],
)
def test_network_mounts(
    path: str, mount: tuple[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount that a path is on is the longest one above it, as proc(5) writes it."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(machine, "PROC", str(tmp_path))
    assert machine.network_mount(path) == mount


def test_a_network_mount_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file on one is read, and it is told how."""
    log = tmp_path / "app.log"
    log.write_bytes(LINES)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(f"30 22 0:30 / {tmp_path} rw - cifs //server/logs rw\n")
    monkeypatch.setattr(machine, "PROC", str(tmp_path))
    assert only(log)[1:] == (
        "note",
        "network",
        f"is on a network mount (cifs at {tmp_path}), which does not report what others write: looked at by time",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="inotify")
def test_inotify_use_is_counted(tmp_path: Path) -> None:
    """Watches and instances of this user, as the system has them."""
    from asyncinotify import Inotify, Mask

    before = machine.inotify_use()
    assert before is not None
    with Inotify() as inotify:
        inotify.add_watch(tmp_path, Mask.MODIFY)
        now = machine.inotify_use()
    assert now is not None
    assert now.watches > 0
    assert now.instances > 0
    assert (now.max_watches, now.max_instances) == (before.max_watches, before.max_instances)


def test_limits_that_are_nearly_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """inotify's and that of open files are told with the cure, and not before they are near."""
    for name in ("a.log", "b.log"):
        (tmp_path / name).write_bytes(LINES)

    def about_machine() -> list[str]:
        return [f.text.split(",")[0] for f in diagnose([str(tmp_path)]) if not f.path]

    for watches, instances, files, expected in (
        (10, 1, None, []),
        (995, 1, 70, []),
        (999_999, 1, None, ["inotify: 999"]),
        (10, 128, None, ["inotify: 128 of 128 instances are in use"]),
        (10, 1, 65, ["2 files"]),
    ):
        use = machine.InotifyUse(watches, 1_000_000, instances, 128)
        monkeypatch.setattr(machine, "inotify_use", lambda use=use: use)
        monkeypatch.setattr(machine, "descriptor_limit", lambda files=files: files)
        assert about_machine() == expected


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command: Sequence[str | Path] = [sys.executable, "-m", "offload", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command(tmp_path: Path) -> None:
    """Exit code 0 if all is well and 1 if something is not; a line for each finding, or JSON."""
    (tmp_path / "app.log").write_bytes(LINES)
    good = command(tmp_path / "app.log")
    assert (good.returncode, good.stderr) == (0, "")
    assert f"{tmp_path / 'app.log'}\tok\tcan be read" in good.stdout
    bad = command("--json", tmp_path / "app.log", tmp_path / "web.log")
    assert (bad.returncode, bad.stderr) == (1, "")
    assert [(f["verdict"], f["kind"]) for f in json.loads(bad.stdout) if f["path"]] == [
        ("wrong", "missing"),
        ("ok", "ok"),
    ]
    assert command("").returncode == 2
