"""Resources: one object on one thread, closed once, made again within its budget, read by the chunk."""

from __future__ import annotations

import asyncio
import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future as ThreadFuture
from pathlib import Path

import pytest

from offload import BrokenResourceError, ClosedResourceError, Handle, Resource


class Device:
    """Counts what is done to it, and by whom."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.number = type(self).made
        self.closed: list[str] = []
        self.sources_closed: list[str] = []

    def close(self) -> None:
        self.closed.append(threading.current_thread().name)

    def read(self, outcome: object = 1) -> object:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def lines(self, count: int = 10**9, error: Exception | None = None) -> Iterator[int]:
        try:
            yield from range(count)
            if error is not None:
                raise error
        finally:
            self.sources_closed.append(threading.current_thread().name)


@pytest.fixture(name="devices")
def new_devices() -> list[Device]:
    Device.made = 0
    return []


@pytest.fixture(name="make")
def new_factory(devices: list[Device]) -> type[Device]:
    class Recorded(Device):
        def __init__(self) -> None:
            super().__init__()
            devices.append(self)

    return Recorded


async def test_made_used_and_closed_on_its_thread_once(make: type[Device], devices: list[Device]) -> None:
    """By default the object's own close runs, on its thread, once."""
    resource = Resource(make, name="device")
    async with resource as device:
        assert await device.call(lambda _: threading.current_thread().name) == "device"
        assert await device.call(Device.read, 5) == 5
    await resource.aclose()
    resource.close()
    assert [d.closed for d in devices] == [["device"]]
    assert resource.closed
    with pytest.raises(ClosedResourceError):
        device.call(Device.read)


async def test_object_without_close_needs_none_and_close_may_be_given() -> None:
    """An object that has no close is left alone; `close=` is called instead of its own."""
    async with Resource(object) as thing:
        assert await thing.call(isinstance, object)
    closed: list[str] = []
    async with Resource(Device, close=lambda d: closed.extend(["given", *d.closed])):
        pass
    assert closed == ["given"]


@pytest.mark.parametrize("how", ["async with", "with"])
async def test_factory_that_fails_raises_its_error_and_leaves_no_thread(how: str) -> None:
    """What the factory raises is raised where the block is entered; nothing is closed."""
    closed: list[object] = []

    def fail() -> Device:
        raise OSError("no such device")

    resource = Resource(fail, close=closed.append)
    with pytest.raises(OSError, match="no such device"):
        _ = resource.__enter__() if how == "with" else await resource.start()
    assert resource.closed
    assert closed == []


async def test_cancelled_enter_closes_what_was_made(make: type[Device], devices: list[Device]) -> None:
    """A cancelled enter waits until the object is made, closes it on its thread, and leaves no thread."""
    entered: ThreadFuture[None] = ThreadFuture()
    opened = threading.Event()

    def slow() -> Device:
        entered.set_result(None)
        opened.wait()
        return make()

    task = asyncio.create_task(Resource(slow, name="slow").start())
    await asyncio.wrap_future(entered)
    task.cancel()
    await asyncio.sleep(0)
    opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [d.closed for d in devices] == [["slow"]]


def test_plain_threads_use_it_by_with(make: type[Device], devices: list[Device]) -> None:
    """`with` opens and closes it where no loop runs."""
    with Resource(make, name="plain") as device:
        assert device.submit(Device.read, 3).result() == 3
    assert [d.closed for d in devices] == [["plain"]]


async def test_broken_object_is_closed_and_made_again_within_its_budget(
    make: type[Device], devices: list[Device]
) -> None:
    """The call that broke it has its own error; so often in a row it is made again; a success begins a new count."""
    async with Resource(make, restart=2, backoff=0.0) as device:
        for _ in range(3):  # a success in between: never out of budget
            for _ in range(2):
                with pytest.raises(OSError, match="gone"):
                    await device.call(Device.read, OSError("gone"))
            assert await device.call(Device.read, 1) == 1
        for _ in range(3):
            with pytest.raises(EOFError):
                await device.call(Device.read, EOFError())
        with pytest.raises(BrokenResourceError, match=r"made again 2 of 2 times in a row") as caught:
            await device.call(Device.read)
        assert isinstance(caught.value.__cause__, EOFError)
        with pytest.raises(BrokenResourceError):
            await device.call(Device.read)
    assert [len(d.closed) for d in devices] == [1] * len(devices)
    assert len(devices) == 9


async def test_other_errors_and_no_budget_leave_the_object(make: type[Device], devices: list[Device]) -> None:
    """An error that does not mean broken, or any without a budget, changes nothing."""
    async with Resource(make, restart=1, broken=(ConnectionError,)) as device, Resource(make) as second:
        for handle in (device, second):
            with pytest.raises(FileNotFoundError):
                await handle.call(Device.read, FileNotFoundError())
            assert await handle.call(Device.read) == 1
    assert len(devices) == 2


async def test_factory_that_fails_again_uses_up_the_budget() -> None:
    """A factory that raises while it makes the object again is asked again, then callers hear why."""
    attempts: list[int] = []

    def make() -> Device:
        attempts.append(1)
        if len(attempts) > 1:
            raise OSError(f"attempt {len(attempts)}")
        return Device()

    async with Resource(make, restart=3, backoff=0.0) as device:
        with pytest.raises(ValueError, match="bad"):
            await device.call(Device.read, ValueError("bad"))
        with pytest.raises(OSError, match="gone"):
            await device.call(Device.read, OSError("gone"))
        with pytest.raises(BrokenResourceError, match="attempt 4"):
            await device.call(Device.read)
    assert len(attempts) == 4


async def test_two_coroutines_that_see_it_break_cost_one_restart(make: type[Device], devices: list[Device]) -> None:
    """The second of two coroutines that had the broken object does not close the new one."""

    async def break_late(device: Device, event: list[asyncio.Event]) -> None:
        event.append(asyncio.Event())
        await event[0].wait()
        raise OSError("late")

    async with Resource(make, restart=5, backoff=0.0) as device:
        events: list[asyncio.Event] = []
        late = device.run(break_late, events)
        with pytest.raises(OSError, match="first"):
            await device.call(Device.read, OSError("first"))
        assert await device.call(lambda d: d.number) == 2
        await device.call(lambda _: events[0].set())
        with pytest.raises(OSError, match="late"):
            await late
        assert await device.call(lambda d: d.number) == 2
    assert [len(d.closed) for d in devices] == [1, 1]


async def test_closing_ends_the_wait_before_it_is_made_again(make: type[Device], devices: list[Device]) -> None:
    """Whoever waits for a restart hears that it is being closed, at once."""
    async with Resource(make, restart=1, backoff=1000.0) as device:
        with pytest.raises(OSError, match="gone"):
            await device.call(Device.read, OSError("gone"))
        waiting = device.call(Device.read)
    with pytest.raises(BrokenResourceError, match="is being closed"):
        await waiting
    assert len(devices) == 1


@pytest.mark.parametrize(("chunk", "prefetch"), [(1, 0), (3, 1), (64, 4), (1000, 0)])
async def test_iter_gives_every_item_in_order(make: type[Device], chunk: int, prefetch: int) -> None:
    """Whatever the chunk, the items come in order, a hop for each chunk."""
    async with Resource(make) as device:
        before = device.stats().submitted
        assert [i async for i in device.iter(lambda d: d.lines(100), chunk=chunk, prefetch=prefetch)] == [*range(100)]
        hops = device.stats().submitted - before
        assert hops <= -(-100 // chunk) + 3 + prefetch


async def test_iter_fetches_no_more_than_it_was_asked_to(make: type[Device]) -> None:
    """Ahead of its consumer are `prefetch` chunks, not the whole source."""
    taken: list[int] = []

    def source(_: Device) -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    async with Resource(make) as device:
        items = device.iter(source, chunk=10, prefetch=2)
        assert await anext(items) == 0
        await device.call(Device.read)
        assert len(taken) == 30
        await items.aclose()


async def test_error_in_the_middle_comes_after_the_items_before_it(make: type[Device], devices: list[Device]) -> None:
    """All items before the error arrive, then the error, and the source is closed."""
    seen: list[int] = []
    async with Resource(make, name="device") as device:
        with pytest.raises(ValueError, match="bad line"):  # noqa: PT012
            async for number in device.iter(lambda d: d.lines(10, ValueError("bad line")), chunk=4):
                seen.append(number)
        assert seen == [*range(10)]
        assert devices[0].sources_closed == ["device"]


async def test_error_read_ahead_of_a_consumer_that_stops_is_silent(make: type[Device]) -> None:
    """An error in a chunk that nobody came to is no complaint."""
    async with Resource(make) as device:
        items = device.iter(lambda d: d.lines(2, ValueError("x")), chunk=2)
        assert await anext(items) == 0
        await device.call(Device.read)
        await asyncio.sleep(0)
        await items.aclose()


@pytest.mark.parametrize("how", ["break", "aclose", "cancel", "raise", "cancel at the start"])
async def test_source_is_closed_on_its_thread_when_the_consumer_stops(
    make: type[Device], devices: list[Device], how: str
) -> None:
    """However it stops, the source's close runs on the thread, once, with options that would refuse it too."""
    begun: ThreadFuture[None] = ThreadFuture()
    opened = threading.Event()

    def source(device: Device) -> Iterator[int]:
        lines = device.lines()
        next(lines)
        if how == "cancel at the start":
            begun.set_result(None)
            opened.wait()
        return lines

    async def consume(handle: Handle[Device]) -> None:
        async with contextlib.aclosing(handle.iter(source, chunk=2)) as items:
            async for _ in items:
                if not begun.done():
                    begun.set_result(None)
                if how == "break":
                    break
                if how == "aclose":
                    await items.aclose()
                if how == "raise":
                    raise KeyError("consumer")
                await asyncio.sleep(0)

    async with Resource(make, name="device") as device:
        task = asyncio.create_task(consume(device.options(nowait=True, timeout=30)))
        if "cancel" in how:
            await asyncio.wrap_future(begun)
            task.cancel()
            await asyncio.sleep(0)
            opened.set()
        with contextlib.suppress(asyncio.CancelledError, KeyError):
            await task
        assert devices[0].sources_closed == ["device"]


async def test_resource_closed_meanwhile_closes_its_source_first(make: type[Device], devices: list[Device]) -> None:
    """A source that is still open when the resource closes is closed before the object, on the thread."""
    async with Resource(make, name="device") as device:
        items = device.iter(lambda d: d.lines(), chunk=2)
        assert await anext(items) == 0
    assert devices[0].sources_closed == ["device"]
    with pytest.raises(ClosedResourceError):
        async for _ in items:
            pass


async def test_iteration_ends_when_the_object_is_made_again(make: type[Device], devices: list[Device]) -> None:
    """A source belongs to the object that broke: it is closed with it, and the consumer hears so."""
    async with Resource(make, restart=1, backoff=0.0) as device:
        items = device.iter(lambda d: d.lines(), chunk=1, prefetch=0)
        assert await anext(items) == 0
        with pytest.raises(OSError, match="gone"):
            await device.call(Device.read, OSError("gone"))
        assert len(devices[0].sources_closed) == 1
        with pytest.raises(BrokenResourceError, match="made again"):
            await anext(items)


async def test_file_that_is_its_own_iterator_stays_open(tmp_path: Path) -> None:
    """Reading a file's lines does not close the file: it is the resource, not what was read from it."""
    path = tmp_path / "lines"
    path.write_text("a\nb\n")
    async with Resource(path.open) as file:
        assert [line async for line in file.iter(iter)] == ["a\n", "b\n"]
        await file.call(lambda f: f.seek(0))
        assert await file.call(lambda f: f.read()) == "a\nb\n"


@pytest.mark.parametrize("bad", [{"chunk": 0}, {"prefetch": -1}])
async def test_senseless_arguments_are_refused(make: type[Device], bad: dict[str, int]) -> None:
    """A chunk of nothing is a ValueError, as is a negative budget."""
    with pytest.raises(ValueError, match="expected"):
        Resource(make, restart=-1)
    async with Resource(make) as device:
        with pytest.raises(ValueError, match="expected"):
            await anext(device.iter(lambda d: d.lines(), **bad))


def complaints(stderr: str) -> list[str]:
    """What a program said, without asyncio's measurement of callbacks: a busy machine is slow."""
    return [line for line in stderr.splitlines() if not line.startswith("Executing <")]


LEFT_OPEN = """
import asyncio, os, sys
from offload import Resource

class Log:
    def __init__(self): self.file, self.lines = open(sys.argv[1], "w"), []
    def write(self, line): self.lines.append(line)
    def close(self):
        self.file.writelines(self.lines); self.file.close()

async def main():
    global log
    log = await Resource(Log).start()
    for n in range(1000):
        log.call(Log.write, f"{n}\\n")

asyncio.run(main())
"""


def test_resource_left_open_has_its_data_on_disk_at_exit(tmp_path: Path) -> None:
    """A program that forgets to close it ends, its queued calls run and its close too."""
    path = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", LEFT_OPEN, str(path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, complaints(done.stderr)) == (0, [])
    assert path.read_text().splitlines() == [str(n) for n in range(1000)]


def write_and_forget(path: str) -> None:
    file = open(path, "w")  # noqa: SIM115
    resource = Resource(lambda: file)
    handle = resource.__enter__()
    for n in range(1000):
        handle.submit(io.TextIOWrapper.write, f"{n}\n")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_resource_left_open_in_a_multiprocessing_child_is_drained(tmp_path: Path, method: str) -> None:
    """A child that multiprocessing made, and ends without atexit, has its data on disk too."""
    path = tmp_path / "log"
    source = (
        "import sys, multiprocessing\n"
        "import importlib.util\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_resource import write_and_forget\n"
        "if __name__ == '__main__':\n"
        f"    child = multiprocessing.get_context({method!r}).Process(target=write_and_forget, args=({str(path)!r},))\n"
        "    child.start(); child.join(); sys.exit(child.exitcode)\n"
    )
    assert method in multiprocessing.get_all_start_methods()
    script = tmp_path / "program.py"
    script.write_text(source)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, complaints(done.stderr)) == (0, [])
    assert path.read_text().splitlines() == [str(n) for n in range(1000)]
