"""Watch: a change is reported, or "anything may have changed" is; never nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from offload.files import watch as module
from offload.files.watch import Watch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify")


@pytest.fixture(name="folder")
def make_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


@pytest.fixture(name="watch")
async def open_watch(folder: Path) -> AsyncIterator[Watch]:
    """Watches the folder, and has nothing left to report."""
    watch = Watch()
    watch.add(str(folder))
    assert watch.take() is None
    assert watch.take() == set()
    yield watch
    watch.close()


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("line\n")


def change(path: Path, how: str) -> None:
    match how:
        case "create":
            path.with_name("new").touch()
        case "append":
            append(path)
        case "truncate":
            os.truncate(path, 0)
        case "rename":
            path.rename(path.with_name("renamed"))
        case "move away":
            path.rename(path.parent.parent / "away")
        case "move here":
            (path.parent.parent / "new").rename(path.with_name("new"))
        case "delete":
            path.unlink()
        case "allow":
            path.chmod(0o600)
        case "link":
            os.link(path, path.with_name("new"))


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("create", {"new"}),
        ("append", {"app.log"}),
        ("truncate", {"app.log"}),
        ("rename", {"app.log", "renamed"}),
        ("move away", {"app.log"}),
        ("move here", {"new"}),
        ("delete", {"app.log"}),
        ("allow", {"app.log"}),
        ("link", {"new"}),
    ],
)
async def test_each_kind_of_change_is_reported(folder: Path, how: str, names: set[str]) -> None:
    """A wait ends, and `take` names the files that were written, made, renamed, removed or allowed, once."""
    path = folder / "app.log"
    append(path)
    append(folder.parent / "new")
    watch = Watch()
    watch.add(str(folder))
    watch.take()
    waiting = asyncio.ensure_future(watch.wait(60))
    await asyncio.sleep(0)
    assert not waiting.done()
    change(path, how)
    await waiting
    changed = watch.take()
    assert changed is not None
    # A link changes the count of links of its file too, and so on: more may be named, these must be.
    assert changed >= {str(folder / name) for name in names}
    assert changed <= {str(folder / name) for name in ("app.log", "new", "renamed")}
    assert watch.take() == set()
    watch.close()


async def test_a_change_between_two_waits_is_not_missed(watch: Watch, folder: Path) -> None:
    """What happens while nobody waits ends the next wait at once."""
    append(folder / "app.log")
    await watch.wait(60)
    assert watch.take() == {str(folder / "app.log")}


async def test_what_happened_before_the_watch_stood_may_be_anything(folder: Path) -> None:
    """The first look after `add` is told to look at everything, without waiting; adding again changes nothing."""
    watch = Watch()
    watch.add(str(folder))
    await watch.wait(60)
    assert watch.take() is None
    watch.add(str(folder))
    assert watch.take() == set()
    watch.close()


async def test_wait_ends_after_its_time_and_by_wake(watch: Watch) -> None:
    """Without a change, a wait ends after `longest` seconds, or when it is woken."""
    await watch.wait(0.001)
    assert watch.take() == set()
    waiting = asyncio.ensure_future(watch.wait(60))
    await asyncio.sleep(0)
    watch.wake()
    await waiting
    assert watch.take() == set()


async def test_cancelling_a_wait_leaves_the_loop_clean(watch: Watch, folder: Path) -> None:
    """After a cancelled wait no reader is left in the loop, and the next wait works."""
    waiting = asyncio.ensure_future(watch.wait(60))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    inotify = watch._inotify
    assert inotify is not None
    assert not asyncio.get_running_loop().remove_reader(inotify.fd)
    append(folder / "app.log")
    await watch.wait(60)
    assert watch.take() == {str(folder / "app.log")}


async def test_a_burst_is_told_as_anything(watch: Watch, folder: Path) -> None:
    """More events than are worth reading are thrown away, and the next look is told to look at everything, once."""
    for number in range(module._MANY + 1):
        append(folder / str(number))
    assert watch.take() is None
    append(folder / "after")
    seen: set[str] = set()
    while changed := watch.take():  # events that were read and not looked at may come once more
        seen |= changed
    assert str(folder / "after") in seen


def queue_limit() -> int:
    return int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


@pytest.mark.slow
async def test_a_queue_that_overflows_is_told_as_anything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel could not keep is not passed over."""
    limit = queue_limit()
    if limit > 20_000:
        pytest.skip("the queue is too long to fill")
    monkeypatch.setattr(module, "_MANY", 10 * limit)
    watch = Watch()
    watch.add(str(folder))
    watch.take()
    one, two = folder / "one", folder / "two"
    with one.open("w") as first, two.open("w") as second:
        for _ in range(limit // 2 + 10):  # neighbours that are the same count as one
            os.write(first.fileno(), b"x")
            os.write(second.fileno(), b"x")
    append(folder / "lost")
    assert watch.take() is None
    append(folder / "after")
    assert str(folder / "after") in (watch.take() or ())
    watch.close()


def end(folder: Path, how: str) -> None:
    if how == "moved":
        folder.rename(folder.with_name("elsewhere"))
    else:
        folder.rmdir()


def begin(folder: Path) -> None:
    folder.mkdir()


@pytest.mark.parametrize("how", ["deleted", "moved"])
@pytest.mark.parametrize("told", [True, False])
async def test_a_folder_that_is_made_again_is_watched_again(
    watch: Watch, folder: Path, how: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's new bearer is watched once `add` is called again, also if the event of its going was thrown away."""
    if not told:
        monkeypatch.setattr(module, "_MANY", 0)
    end(folder, how)
    assert watch.take() is None
    monkeypatch.undo()
    begin(folder)
    watch.add(str(folder))
    while watch.take() is None:
        pass
    append(folder / "app.log")
    changed = watch.take()
    assert changed is None or str(folder / "app.log") in changed


async def test_a_folder_of_two_names_is_reported_under_both(folder: Path) -> None:
    """Links to one folder are one watch for the kernel; who follows a file by either name hears of it."""
    link = folder.with_name("link")
    link.symlink_to(folder)
    watch = Watch()
    for name in (folder, link):
        watch.add(str(name))
        watch.take()
    append(folder / "app.log")
    assert watch.take() == {str(folder / "app.log"), str(link / "app.log")}
    watch.close()


async def test_several_folders(watch: Watch, folder: Path, tmp_path: Path) -> None:
    """Each folder added is watched, and what is below a folder is not its own."""
    below = folder / "below"
    below.mkdir()
    watch.take()
    append(below / "unseen")
    assert watch.take() == set()
    watch.add(str(below))
    assert watch.take() is None
    append(below / "seen")
    append(folder / "app.log")
    assert watch.take() == {str(below / "seen"), str(folder / "app.log")}


def missing(folder: Path) -> Path:
    return folder / "missing"


def no_folder(folder: Path) -> Path:
    append(folder / "file")
    return folder / "file"


@pytest.mark.parametrize("what", [missing, no_folder])
async def test_what_cannot_be_watched_makes_it_look_by_time(
    watch: Watch, folder: Path, what: Callable[[Path], Path]
) -> None:
    """A folder that cannot be watched is looked at by time, for changes and for its coming; others keep inotify."""
    other = what(folder)
    watch.add(str(other))
    assert watch.polled == [str(other)]
    assert watch.take() is None
    await watch.wait(0.001)
    assert watch.take() == set()
    append(folder / "app.log")
    assert watch.take() == {str(folder / "app.log")}
    other.unlink(missing_ok=True)
    other.mkdir()
    append(other / "new.log")
    changed = watch.take()
    assert changed is not None
    assert str(other / "new.log") in changed
    watch.add(str(other))  # as each look does
    assert not watch.polls


async def test_polling(folder: Path) -> None:
    """Told to poll it takes nothing of inotify, waits its interval or less, is woken, and finds what changed."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    watch = Watch(poll=True, interval=3600)
    watch.add(str(folder))
    assert watch.polls
    assert len(os.listdir("/proc/self/fd")) == before
    await watch.wait(0.001)
    assert watch.take() is None
    append(folder / "app.log")
    assert watch.take() == {str(folder / "app.log")}
    assert watch.take() == set()
    waiting = asyncio.ensure_future(watch.wait(3600))
    await asyncio.sleep(0)
    watch.wake()
    await waiting
    short = Watch(poll=True, interval=0.001)
    await short.wait(3600)
    assert short.take() == set()
    watch.close()


@pytest.mark.parametrize("how", ["create", "append", "truncate", "rename", "delete", "move here", "link"])
async def test_each_kind_of_change_is_found_by_time(folder: Path, how: str) -> None:
    """By inode, size and time of the last change, of what is there and of what is there no more."""
    path = folder / "app.log"
    append(path)
    append(folder.parent / "new")
    os.utime(path, (1, 1))
    watch = Watch(poll=True)
    watch.add(str(folder))
    watch.take()
    change(path, how)
    names = {"create": {"new"}, "rename": {"app.log", "renamed"}, "move here": {"new"}, "link": {"new"}}
    assert watch.take() == {str(folder / name) for name in names.get(how, {"app.log"})}


async def test_a_network_mount_is_looked_at_by_time(folder: Path, tmp_path: Path) -> None:
    """Its folders only; when something else is mounted there, it is asked again what that is."""
    odd = tmp_path / "a folder\twith \\ and \n"
    odd.mkdir()
    escaped = str(odd).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    mountinfo = tmp_path / "mountinfo"
    with open("/proc/self/mountinfo") as file:  # noqa: ASYNC230 - no file on a disk
        mountinfo.write_text(f"{file.read()}99 1 0:99 / {escaped} rw shared:9 - nfs4 host:/ rw\n")
    watch = Watch(mountinfo=str(mountinfo))
    watch.add(str(folder))
    watch.add(str(odd))
    assert watch.polled == [str(odd)]
    watch.take()
    for each in (folder, odd):
        append(each / "app.log")
    assert watch.take() == {str(folder / "app.log"), str(odd / "app.log")}
    watch.close()


async def test_a_folder_that_did_not_tell_twice_is_looked_at_by_time(watch: Watch, folder: Path) -> None:
    """Whoever finds a change that was not reported says so; others keep inotify, and one time proves nothing."""
    assert not watch.distrust(str(folder))
    assert not watch.polls
    assert watch.distrust(str(folder))
    assert watch.polled == [str(folder)]
    assert watch.take() is None
    append(folder / "app.log")
    assert watch.take() == {str(folder / "app.log")}
    assert not watch.distrust(str(folder))
    assert not watch.distrust("/no/folder/of/ours")


async def test_no_instance_left_falls_back_to_polling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system refuses another inotify, the watch looks by time instead of failing."""
    asyncinotify = pytest.importorskip("asyncinotify")

    def refuse(**options: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(asyncinotify, "Inotify", refuse)
    watch = Watch()
    watch.add(str(folder))
    assert watch.polls
    assert watch.take() is None
    watch.close()


async def test_close_gives_the_descriptor_back(folder: Path) -> None:
    """Closed once or twice, nothing stays open, and a look finds that anything may have changed."""
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    watch = Watch()
    watch.add(str(folder))
    watch.close()
    watch.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert watch.take() is None
