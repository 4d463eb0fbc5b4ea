"""Mounts: which of them do not report what others write; with this machine's own list and, where it can, a real one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.files.mounts import mounts, network_mount
from offload.files.watch import Watch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/mountinfo")

LINE = "36 35 98:0 / {point} rw,noatime master:1 - {kind} server:/logs rw,errors=continue\n"


@pytest.mark.parametrize(
    "kind",
    ["nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "lustre", "virtiofs", "fuse", "fuse.sshfs", "fuse.s3fs"],
)
def test_kinds_that_are_changed_unseen(kind: str, tmp_path: Path) -> None:
    """Each of them is polled, where it is mounted and below."""
    table = tmp_path / "mountinfo"
    table.write_text(LINE.format(point="/logs", kind=kind))
    assert network_mount("/logs", str(table)) == network_mount("/logs/of/web/app.log", str(table)) == ("/logs", kind)
    assert network_mount("/logs2/app.log", str(table)) is None


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "fuseblk", "zfs", "nfsd"])
def test_kinds_that_report_all_changes(kind: str, tmp_path: Path) -> None:
    """Each of them keeps inotify."""
    table = tmp_path / "mountinfo"
    table.write_text(LINE.format(point="/", kind=kind))
    assert network_mount("/var/log/app.log", str(table)) is None


@pytest.mark.parametrize(
    "name", ["a b", "tab\there", "line\nend", "back\\slash", "\\040", "Zürich", "\udcff\udcfe", "#"]
)
def test_odd_names(name: str, tmp_path: Path) -> None:
    """Written as the kernel writes them: space, tab, line end, backslash and # as octal numbers, others as they are."""
    raw = os.fsencode(f"/logs/{name}")
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in raw)
    table = tmp_path / "mountinfo"
    before, _, after = LINE.encode().partition(b"{point}")
    table.write_bytes(before + escaped + after.replace(b"{kind}", b"nfs"))
    assert network_mount(f"/logs/{name}/app.log", str(table)) == (f"/logs/{name}", "nfs")


def test_the_last_mount_hides_those_before(tmp_path: Path) -> None:
    """What was mounted over a network mount is what is there; a longer mount point wins, whatever its place."""
    table = tmp_path / "mountinfo"
    lines = [("/logs/local", "xfs"), ("/logs", "nfs"), ("/over", "nfs"), ("/over", "ext4")]
    table.write_text("".join(LINE.format(point=point, kind=kind) for point, kind in lines))
    assert network_mount("/logs/app.log", str(table)) == ("/logs", "nfs")
    assert network_mount("/logs/local/app.log", str(table)) is None
    assert network_mount("/over/app.log", str(table)) is None


def test_this_machine(tmp_path: Path) -> None:
    """Every mount point in the system's own list is read as it is; where there is no list, all is local."""
    points = [point for point, _ in mounts()]
    assert "/" in points
    assert all(os.path.lexists(point) for point in points if not point.startswith("/proc/"))
    assert network_mount("/logs", str(tmp_path / "missing")) is None
    assert list(mounts(str(tmp_path / "missing"))) == []


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A folder, and a FUSE mount of it with a space in its name."""
    if shutil.which("bindfs") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("bindfs is not installed, or there is no /dev/fuse")
    behind, mount = tmp_path / "behind", tmp_path / "the mount"
    behind.mkdir()
    mount.mkdir()
    done = subprocess.run(["bindfs", str(behind), str(mount)], capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip(f"bindfs: {done.stderr}")
    try:
        yield behind, mount
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=30)


def test_what_is_written_behind_a_fuse_mount_is_found(fuse: tuple[Path, Path], tmp_path: Path) -> None:
    """inotify says nothing of it; the folder is looked at by time, by itself, and the others are not."""
    behind, mount = fuse
    found = network_mount(str(mount / "app.log"))
    assert found is not None
    assert found[0] == str(mount)
    assert found[1].startswith("fuse")
    watch, silent = Watch(), Watch(mountinfo=os.devnull)
    for each in (watch, silent):
        each.add(str(mount))
        each.add(str(tmp_path))
        each.take()
    assert (watch.polled, silent.polled) == ([str(mount)], [])
    (behind / "app.log").write_bytes(b"a line\n")
    (tmp_path / "local.log").write_bytes(b"a line\n")
    assert silent.take() == {str(tmp_path / "local.log")}, "then nothing of this is needed"
    assert watch.take() == {str(mount / "app.log"), str(tmp_path / "local.log")}
    for each in (watch, silent):
        each.close()


def test_a_network_mount_over_a_folder_that_is_watched(fuse: tuple[Path, Path], tmp_path: Path) -> None:
    """What a folder is on is asked again when that has changed: it may be mounted later than we began."""
    behind, mount = fuse
    watch = Watch()
    subprocess.run(["umount", str(mount)], check=True, timeout=30)
    watch.add(str(mount))
    assert not watch.polls
    subprocess.run(["bindfs", str(behind), str(mount)], check=True, timeout=30)
    watch.add(str(mount))
    assert watch.polled == [str(mount)]
    watch.close()
